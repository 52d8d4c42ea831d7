"""
Checkpoints and what is left when a run ends early: a resumed run equals the unbroken one to the
last bit, wherever it was stopped, and nothing that a run has written is lost.
"""
import copy
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import rpo
from conftest import (
    ENV, ROOT, assert_close_weights, assert_same_rows, assert_same_run, command, contents,
    copy_data, random_records, read_rows, refused, run, save_model, write_jsonl)

def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())

def refuse(message):
    """A stand-in for a function that fails."""
    def fail(*args, **kwargs):
        raise OSError(message)

    return fail

# ------------------------------------------------------------------------------------------------
# what a checkpoint is

@pytest.fixture(scope="module")
def saved(world, tmp_path_factory):
    """A run with checkpoints -> its folder and {checkpoint: the policy as it was in memory}."""
    out_dir, policies, save = tmp_path_factory.mktemp("saved"), {}, rpo.save_checkpoint

    def spy(path, model, *args):
        policies[path.name] = copy.deepcopy(model)
        return save(path, model, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rpo, "save_checkpoint", spy)
        run(*command(world, out_dir))
    return out_dir, policies

def test_a_folder_every_save_every_steps_and_a_final_one(saved):
    out_dir, _ = saved
    assert names(out_dir) == ["final", "metrics.jsonl", "step_000002", "step_000004"]

def test_a_checkpoint_loads_by_from_pretrained(saved):
    """The policy's logits, bit for bit; so other programs need nothing of ours."""
    out_dir, policies = saved
    ids = torch.arange(3, 30)[None]
    for name, policy in policies.items():
        loaded = AutoModelForCausalLM.from_pretrained(out_dir / name)
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded(ids).logits, policy(ids).logits)
    assert not torch.equal(policies["step_000002"](ids).logits, policies["final"](ids).logits)

def test_a_checkpoint_brings_its_tokenizer_and_template(saved):
    out_dir, _ = saved
    tokenizer = AutoTokenizer.from_pretrained(out_dir / "final")
    messages = [{"role": "user", "content": "w10"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<s><|user|> w10 </s>"
    assert (out_dir / "final/generation_config.json").exists()

def test_nothing_is_pickled(saved):
    """To load a checkpoint runs no code: safetensors and texts alone."""
    out_dir, _ = saved
    for path in out_dir.rglob("*"):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                assert tensors.keys()
        elif path.is_file():
            assert path.suffix in (".json", ".jsonl", ".jinja"), path
            path.read_text(encoding="utf-8")

def test_tied_embeddings_are_saved_once(world, tmp_path):
    """They load tied, and the resumed run equals the unbroken one."""
    model = save_model(tmp_path / "tied", tie_word_embeddings=True)
    flags = ("--model", model, "--save_every", 0)
    run(*command(world, tmp_path / "a", *flags))
    run(*command(world, tmp_path / "b", *flags, "--max_steps", 4))
    run(*command(world, tmp_path / "b", *flags, "--resume"))
    assert_same_run(tmp_path / "a", tmp_path / "b", tolerance=0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a/final")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "a/final/model.safetensors")

@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_the_umask_decides_who_can_read(world, tmp_path, umask, mode):
    """Colleagues read what the user lets them; safetensors writes for the owner alone."""
    before = os.umask(umask)
    try:
        run(*command(world, tmp_path / "run", "--max_steps", 2))
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}
    folders = [tmp_path / "run", tmp_path / "run/step_000002"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o777 & ~umask}

# ------------------------------------------------------------------------------------------------
# stopping and going on

def test_max_steps_stops_on_the_schedule_of_all_epochs(world, whole, tmp_path):
    """The rates are those of the whole run; the last checkpoint bears its step's number."""
    rows = run(*command(world, tmp_path, "--max_steps", 3))
    rates = [row["lr"] for row in rows if "lr" in row]
    assert rates == [row["lr"] for row in read_rows(whole) if "lr" in row][:3]
    assert names(tmp_path) == ["metrics.jsonl", "step_000002", "step_000003"]

def test_a_resumed_run_is_the_unbroken_one(world, whole, tmp_path):
    """Stopped in the middle of an epoch: weights, moments and rows are equal to the last bit."""
    run(*command(world, tmp_path, "--max_steps", 4))
    run(*command(world, tmp_path, "--resume"))
    assert_same_run(tmp_path, whole, tolerance=0)
    assert names(tmp_path) == names(whole)

def test_a_finished_run_has_nothing_to_resume(world, whole, tmp_path):
    """A job script may start once more: nothing is written, nothing is lost."""
    out_dir = shutil.copytree(whole, tmp_path / "run")
    before = contents(out_dir)
    run(*command(world, out_dir, "--resume"))
    assert contents(out_dir) == before

def test_resume_starts_afresh_where_there_is_nothing(world, whole, tmp_path):
    """It can stand in a job script from the first start on."""
    run(*command(world, tmp_path, "--resume"))
    assert_same_run(tmp_path, whole, tolerance=0)

def test_resume_after_a_kill_before_the_first_checkpoint(world, whole, tmp_path):
    """Rows without a checkpoint are logged again."""
    shutil.copy(whole / "metrics.jsonl", tmp_path)
    run(*command(world, tmp_path, "--resume"))
    assert_same_run(tmp_path, whole, tolerance=0)

@pytest.mark.parametrize("name", ["final", "step_000004"])
def test_resume_after_a_kill_while_saving(world, whole, tmp_path, name):
    """A half-written folder is no checkpoint, a torn last line is no row."""
    out_dir = shutil.copytree(whole, tmp_path / "run")
    half = out_dir / f"{name}.tmp"
    os.rename(out_dir / name, half)
    shutil.rmtree(out_dir / "final", ignore_errors=True)
    for torn in ("model.safetensors", "trainer_state.json"):
        (half / torn).write_bytes((half / torn).read_bytes()[:40])
    with open(out_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "epoch": 2.0, "eval/lo')
    run(*command(world, out_dir, "--resume"))
    assert_same_run(out_dir, whole, tolerance=0)
    assert names(out_dir) == names(whole)

def test_a_damaged_checkpoint_deleted_leaves_the_one_before(world, whole, tmp_path):
    """What the refusal of a damaged one tells to do leads to the unbroken run's end."""
    out_dir = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(out_dir / "final")
    shutil.rmtree(out_dir / "step_000004")
    run(*command(world, out_dir, "--resume"))
    assert_same_run(out_dir, whole, tolerance=0)

def test_a_resumed_run_says_from_where(world, whole, tmp_path, capsys):
    out_dir = shutil.copytree(whole, tmp_path / "run")
    run(*command(world, out_dir, "--resume"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "resume" in line]
    assert str(out_dir / "final") in line

# ------------------------------------------------------------------------------------------------
# ends that nobody planned

def test_a_kill_at_any_moment(world, tmp_path, capsys):
    """
    A process that saves after every step is killed while it does. Before, a second run into its
    folder is refused; afterwards the folder is free, and resumed bit for bit.
    """
    out_dir = tmp_path / "killed"
    flags = ("--epochs", 300, "--save_every", 1, "--eval_every", 50)
    argv = command(world, out_dir, *flags)
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    process = subprocess.Popen(
        [sys.executable, ROOT / "rpo.py", *argv[1:]], env=ENV, text=True, **pipes)

    def wait_for(name):
        deadline = time.time() + 60
        while not list(out_dir.glob(name)):
            assert process.poll() is None and time.time() < deadline, process.stderr.read()

    try:
        wait_for("step_000003")
        assert "another run" in refused(capsys, *argv, "--resume")
        wait_for("*.tmp")
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()

    newest = rpo.newest_checkpoint(out_dir)
    step = json.loads((newest / "trainer_state.json").read_text())["step"]
    assert newest.name == f"step_{step:06d}" and 3 <= step < 898
    stop = ("--max_steps", step + 2)
    run(*command(world, out_dir, *flags, *stop, "--resume"))
    run(*command(world, tmp_path / "whole", *flags, *stop, "--save_every", 0))
    assert_same_rows(read_rows(out_dir), read_rows(tmp_path / "whole"), tolerance=0)
    for file in ("model.safetensors", "optimizer.safetensors"):
        path = Path(f"step_{step + 2:06d}", file)
        found, wanted = load_file(out_dir / path), load_file(tmp_path / "whole" / path)
        assert_close_weights(found, wanted, tolerance=0)

def stop_at(step, error):
    """rpo.train_step, but with an end at this step."""
    train_step, calls = rpo.train_step, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == step:
            raise error
        return train_step(*args)

    return stopped

def test_ctrl_c_names_the_checkpoint_that_is_kept(world, whole, tmp_path, monkeypatch, capsys):
    """And the run goes on from there."""
    with monkeypatch.context() as patch:
        patch.setattr(rpo, "train_step", stop_at(4, KeyboardInterrupt))
        line = refused(capsys, *command(world, tmp_path))
    assert "KeyboardInterrupt" in line and str(tmp_path / "step_000002") in line
    run(*command(world, tmp_path, "--resume"))
    assert_same_run(tmp_path, whole, tolerance=0)

@pytest.mark.parametrize("module, function", [
    (rpo, "save_file"), (rpo.os, "sync"), (rpo.os, "rename"), (rpo.json, "dumps")])
def test_a_save_that_fails_loses_nothing(
        world, whole, tmp_path, monkeypatch, capsys, module, function):
    """
    A full disk at step 4: nothing half-written is left that would keep it full, the checkpoint of
    step 2 is whole, and once there is room the run goes on from it.
    """
    save, message = rpo.save_checkpoint, "No space left on device"

    def save_on_a_full_disk(path, *args):
        with pytest.MonkeyPatch.context() as patch:
            if path.name == "step_000004":
                patch.setattr(module, function, refuse(message))
            save(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(rpo, "save_checkpoint", save_on_a_full_disk)
        line = refused(capsys, *command(world, tmp_path))
    assert message in line and str(tmp_path / "step_000002") in line
    assert names(tmp_path) == ["metrics.jsonl", "step_000002"]
    run(*command(world, tmp_path, "--resume"))
    assert_same_run(tmp_path, whole, tolerance=0)

# ------------------------------------------------------------------------------------------------
# what a resumed run must agree in

CHANGES = {
    "model": "OTHER",
    "ref_model": "OTHER",
    "beta": 0.25,
    "eta": 0.75,
    "sft": "mean",
    "batch_size": 4,
    "max_length": 99,
    "max_prompt_length": 77,
    "epochs": 3,
    "learning_rate": 0.02,
    "warmup_ratio": 0.2,
    "weight_decay": 0.01,
    "grad_clip": 2.0,
    "dtype": "bfloat16",
    "seed": 43,
}
MAY_CHANGE = {
    "data", "out_dir", "max_tokens", "max_steps", "eval_every", "save_every", "resume",
    "gradient_checkpointing"}

def test_every_flag_is_tried_here():
    """A new one belongs to the objective, until somebody says otherwise."""
    assert CHANGES.keys() == vars(rpo.TrainOptions()).keys()
    assert MAY_CHANGE == vars(rpo.RunOptions()).keys()

@pytest.fixture(scope="module")
def begun(world, tmp_path_factory):
    """A run of two steps, for resumes that are refused and touch nothing."""
    out_dir = tmp_path_factory.mktemp("begun")
    run(*command(world, out_dir, "--max_steps", 2))
    return out_dir

@pytest.mark.parametrize("name", CHANGES)
def test_resume_refuses_another_objective(world, begun, capsys, name):
    """Both values are named, and nothing is touched."""
    value = CHANGES[name]
    if value == "OTHER":
        value = save_model(world.root / "other", seed=1)
    state = json.loads((begun / "step_000002/trainer_state.json").read_text())
    before = contents(begun)
    line = refused(capsys, *command(world, begun, "--resume", f"--{name}", value))
    assert f" {name} " in line
    assert str(state["options"][name]) in line and str(value) in line
    assert contents(begun) == before

def test_resume_refuses_other_pairs(world, begun, tmp_path, capsys):
    """Under another name or the same one: what counts is what train.jsonl holds."""
    write_jsonl(tmp_path / "data/train.jsonl", random_records(17, 9))
    before = contents(begun)
    line = refused(capsys, *command(world, begun, "--resume", data=tmp_path / "data"))
    assert "training pairs" in line
    assert contents(begun) == before

def test_resume_may_change_the_rest(world, whole, begun, tmp_path):
    """Where the pairs lie, how they are split and what is reported is not the objective."""
    out_dir = shutil.copytree(begun, tmp_path / "run")
    flags = ("--resume", "--max_tokens", 200, "--gradient_checkpointing", "--save_every", 1)
    run(*command(world, out_dir, *flags, data=copy_data(world, tmp_path / "data")))
    assert_same_run(out_dir, whole)

@pytest.mark.parametrize("before, after", [(0, 2), (2, 0)])
def test_resume_may_begin_and_end_evaluation(world, whole, tmp_path, before, after):
    """Evaluation is looking on: with it or without, the updates are the same."""
    run(*command(world, tmp_path, "--max_steps", 2, "--eval_every", before))
    run(*command(world, tmp_path, "--resume", "--eval_every", after))
    found, wanted = (load_file(path / "final/model.safetensors") for path in (tmp_path, whole))
    assert_close_weights(found, wanted)

# ------------------------------------------------------------------------------------------------
# one run, one folder

@pytest.mark.parametrize("left", [["final", "metrics.jsonl"], ["final"], ["metrics.jsonl"]])
def test_a_run_is_not_overwritten(world, whole, tmp_path, capsys, left):
    """Without --resume a folder that holds a checkpoint or rows is refused, and stays as it is."""
    out_dir = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(out_dir / "step_000002")
    shutil.rmtree(out_dir / "step_000004")
    if "final" not in left:
        shutil.rmtree(out_dir / "final")
    if "metrics.jsonl" not in left:
        (out_dir / "metrics.jsonl").unlink()
    before = contents(out_dir)
    assert "--out_dir holds a run" in refused(capsys, *command(world, out_dir))
    after = contents(out_dir)
    assert before.items() <= after.items()

@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_a_second_run_into_the_folder_of_a_first_is_refused(world, whole, tmp_path, flags):
    """Already while the first one scores its reference; and the first one is not disturbed."""
    o = SimpleNamespace(**vars(rpo.TrainOptions()) | vars(rpo.RunOptions()))
    o.data, o.out_dir, o.resume = world.data, str(tmp_path), "--resume" in flags
    refusals, load_model = [], rpo.load_model

    def second_run(path):
        with pytest.raises(ValueError, match="another run") as refusal:
            rpo.open_run(o)
        refusals.append(refusal)
        return load_model(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rpo, "load_model", second_run)
        run(*command(world, tmp_path, *flags))
    assert len(refusals) == 2
    assert_same_run(tmp_path, whole, tolerance=0)

def test_the_lock_ends_with_the_run(world, tmp_path, capsys, monkeypatch):
    """Also with a run that failed."""
    with monkeypatch.context() as patch:
        patch.setattr(rpo, "train_step", refuse("here"))
        assert "here" in refused(capsys, *command(world, tmp_path))
    run(*command(world, tmp_path, "--resume", "--max_steps", 2))
    run(*command(world, tmp_path, "--resume"))
    assert (tmp_path / "final").exists()
