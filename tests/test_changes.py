"""
docs/changes/*.diff: each is applied to a copy of rpo.py, the copy is run, and its effect is there.

    OMP_NUM_THREADS=1 pytest tests/test_changes.py -q

A diff that no longer applies fails its test. The copies run in this process, those on two gloo
ranks in one torchrun. Runs are those of conftest.py: a tiny model, 17 pairs, two epochs of three
steps; `whole` is the run of the unchanged rpo.py.
"""
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import (
    CLOSE, ROOT, assert_close_weights, assert_same_rows, assert_same_run, command, contents,
    copy_data, launch, plain_logp, random_records, read_rows, save_model, word_tokenizer,
    write_jsonl)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import rpo

CHANGES = ROOT / "docs/changes"
NAMES = sorted(path.stem for path in CHANGES.glob("*.diff"))

# ------------------------------------------------------------------------------------------------
# applying and running

def apply(folder, *names, undo=False):
    """A copy of rpo.py in folder with these changes, made one after another -> its path."""
    if not undo:
        shutil.copy(ROOT / "rpo.py", folder)
    for name in names:
        argv = ["git", "apply", *(["-R"] if undo else []), CHANGES / f"{name}.diff"]
        # a repository around the folder, if there is one, is none of its business
        env = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
        done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{name}.diff does not apply: {done.stderr}"
    return folder / "rpo.py"

@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """changed(NAME, ...) -> rpo.py with these changes, a module."""
    @functools.cache
    def build(*names):
        path = apply(tmp_path_factory.mktemp("changed"), *names)
        spec = importlib.util.spec_from_file_location("_".join(["rpo", *names]), path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # its dataclass looks itself up there
        spec.loader.exec_module(module)
        return module
    return build

def train(module, *argv):
    """A run of the changed program in this process -> the rows of its metrics.jsonl."""
    try:
        module.run(list(argv[1:]))
    finally:
        for bar in list(getattr(tqdm, "_instances", [])):
            bar.close()
        if dist.is_initialized():
            dist.destroy_process_group()
    return read_rows(argv[argv.index("--out_dir") + 1])

def read_pairs(data, split="test", module=rpo):
    tokenizer = word_tokenizer()
    lines = Path(data, f"{split}.jsonl").read_text().splitlines()
    return [module.tokenize_pair(json.loads(line), tokenizer) for line in lines]

@torch.no_grad()
def plain_logps(model, pairs, sides=("chosen", "rejected")):
    """Log-probs (N, K) by the definition, float64, of a folder or a model."""
    if not isinstance(model, torch.nn.Module):
        model = AutoModelForCausalLM.from_pretrained(model)
    rows = [[plain_logp(model, pair, side).item() for side in sides] for pair in pairs]
    return np.array(rows)

# ------------------------------------------------------------------------------------------------
# the folder

@pytest.mark.parametrize("name", NAMES)
def test_change_applies_and_can_be_undone(name, tmp_path):
    """`git apply`, then `git apply -R`; what it adds keeps to the width of the house."""
    path = apply(tmp_path, name)
    assert path.read_text() != (ROOT / "rpo.py").read_text()
    for line in (CHANGES / f"{name}.diff").read_text().splitlines():
        assert not line.startswith("+") or len(line) <= 101, line
    apply(tmp_path, name, undo=True)
    assert path.read_bytes() == (ROOT / "rpo.py").read_bytes()

SMALL = {
    "ipo", "label_smoothing", "length_norm", "dpo_positive", "chi_square", "authors_average",
    "compile", "tracker", "linear", "eta_print", "old_checkpoints"}

def test_table_of_changes():
    """README.md names every change with its number of lines; the small ones have at most five."""
    table = (CHANGES / "README.md").read_text()
    listed = dict(re.findall(r"^\| `(\w+)\.diff` \|.*\| (\+\d+ -\d+) \|$", table, re.MULTILINE))
    assert sorted(listed) == NAMES
    for name in NAMES:
        lines = (CHANGES / f"{name}.diff").read_text().splitlines()[2:]
        added = sum(line.startswith("+") for line in lines)
        removed = sum(line.startswith("-") for line in lines)
        assert listed[name] == f"+{added} -{removed}"
        assert name not in SMALL or added <= 5
        assert name != "lora" or added <= 10
    assert SMALL < set(NAMES)

# ------------------------------------------------------------------------------------------------
# other losses: (policy (B, 2), reference (B, 2), lengths (B, 2), beta) -> preference losses (B,)

def log_sigmoid(x):
    return -np.logaddexp(0, -x)

def ipo(policy, ref, lengths, beta):
    ratios = policy - ref
    return (ratios[:, 0] - ratios[:, 1] - 1 / (2 * beta)) ** 2

def label_smoothing(policy, ref, lengths, beta):
    ratios = policy - ref
    margin = beta * (ratios[:, 0] - ratios[:, 1])
    return -0.9 * log_sigmoid(margin) - 0.1 * log_sigmoid(-margin)

def length_norm(policy, ref, lengths, beta):
    ratios = (policy - ref) / lengths
    return -log_sigmoid(beta * (ratios[:, 0] - ratios[:, 1]))

def dpo_positive(policy, ref, lengths, beta):
    ratios = policy - ref
    penalty = np.maximum(0, ref[:, 0] - policy[:, 0])
    return -log_sigmoid(beta * (ratios[:, 0] - ratios[:, 1] - 50 * penalty))

def chi_square(policy, ref, lengths, beta):
    log_ratio = policy - ref
    link = np.exp(np.minimum(log_ratio, 20)) + log_ratio
    return -log_sigmoid(beta * (link[:, 0] - link[:, 1]))

LOSSES = [ipo, label_smoothing, length_norm, dpo_positive, chi_square]

@pytest.mark.parametrize("formula", LOSSES, ids=[formula.__name__ for formula in LOSSES])
def test_loss_is_its_formula(changed, formula):
    """Random log-probs on both sides of the reference: both terms, in both forms, by numpy."""
    module = changed(formula.__name__)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, (50, 2))
    policy, ref = rng.normal(-9, 3, (50, 2)), rng.normal(-9, 3, (50, 2))
    pairs = [{"prompt": [1], "chosen": [7] * w, "rejected": [7] * l} for w, l in lengths.tolist()]
    for sft in ("sum", "mean"):
        o = SimpleNamespace(beta=0.3, eta=0.7, sft=sft)
        logps = torch.tensor(policy), torch.tensor(ref)
        losses, metrics = module.pair_losses(*logps, pairs, o)
        per_token = formula is length_norm or sft == "mean"
        nll = -policy[:, 0] / lengths[:, 0] if per_token else -policy[:, 0]
        sft_losses = 0.7 * nll if sft == "mean" else 0.7 * 0.3 * nll
        wanted = formula(policy, ref, lengths, 0.3)
        np.testing.assert_allclose(metrics["loss/dpo"], wanted, rtol=1e-12)
        np.testing.assert_allclose(metrics["loss/sft"], sft_losses, rtol=1e-12)
        np.testing.assert_allclose(losses, wanted + sft_losses, rtol=1e-12)

@pytest.mark.parametrize("formula", LOSSES, ids=[formula.__name__ for formula in LOSSES])
def test_loss_is_trained_on(changed, world, whole, tmp_path, formula):
    """Four steps: the logged loss is the formula's at the weights that were saved."""
    argv = command(world, tmp_path, "--max_steps", 4, "--save_every", 0)
    last = train(changed(formula.__name__), *argv)[-1]
    pairs = read_pairs(world.data)
    lengths = np.array([[len(pair["chosen"]), len(pair["rejected"])] for pair in pairs])
    policy = plain_logps(tmp_path / "step_000004", pairs)
    ref = plain_logps(world.model, pairs)
    wanted = formula(policy, ref, lengths, 0.5).mean()
    assert last["eval/loss/dpo"] == pytest.approx(wanted, rel=1e-4)
    # the plain loss leads elsewhere
    plain = plain_logps(whole / "step_000004", pairs)
    assert np.abs(policy - plain).max() > 0.1

# ------------------------------------------------------------------------------------------------
# optimizer, schedule, logging

def test_authors_average(changed, world, tmp_path):
    """
    The rate ends near a tenth of its peak. After one step Adam's moments are m = (1 - 0.9) g and
    v = (1 - 0.95) g^2, so v = 5 m^2; with the usual 0.999 it would be 0.1 m^2.
    """
    rows = train(changed("authors_average"), *command(world, tmp_path, "--save_every", 1))
    rates = [row["lr"] for row in rows if "lr" in row]
    cosine = [0.5 * (1 + math.cos(math.pi * step / 5)) for step in range(5)]
    assert rates == pytest.approx([0.01] + [0.001 + 0.009 * share for share in cosine], rel=1e-12)
    moments = load_file(tmp_path / "step_000001/optimizer.safetensors")
    m = torch.cat([moments[key].flatten() for key in moments if key.endswith("exp_avg")])
    v = torch.cat([moments[key].flatten() for key in moments if key.endswith("exp_avg_sq")])
    assert m.abs().max() > 1e-3
    torch.testing.assert_close(v, 5 * m**2, rtol=1e-4, atol=1e-12)

def test_linear(changed, world, tmp_path):
    rows = train(changed("linear"), *command(world, tmp_path, "--eval_every", 0))
    wanted = [0.01] + [0.01 * (1 - step / 5) for step in range(5)]
    assert [row["lr"] for row in rows] == pytest.approx(wanted, rel=1e-12)

@pytest.mark.parametrize("sft, other", [("sum", "mean"), ("mean", "sum")])
def test_eta_print(changed, world, tmp_path, capsys, sft, other):
    """The eta that is printed gives the other form the same SFT loss at the mean length."""
    lengths = [len(pair["chosen"]) for pair in read_pairs(world.data, "train")]
    mean = sum(lengths) / len(lengths)
    argv = command(world, tmp_path, "--sft", sft, "--beta", 0.3, "--max_steps", 1)
    train(changed("eta_print"), *argv)
    printed = re.search(rf"as much as --sft {other} --eta (\S+)", capsys.readouterr().out)
    weights = {sft: 0.5, other: float(printed[1])}
    assert weights["sum"] * 0.3 == pytest.approx(weights["mean"] / mean, rel=1e-5)

def test_eta_print_without_beta(changed, world, tmp_path, capsys):
    """SFT alone has no equal in the other form: nothing is printed, and nothing divided by 0."""
    argv = command(world, tmp_path, "--sft", "mean", "--beta", 0, "--max_steps", 1)
    train(changed("eta_print"), *argv)
    assert "as much as" not in capsys.readouterr().out

@pytest.mark.parametrize("keep", [0, 2])
def test_old_checkpoints(changed, world, tmp_path, keep):
    train(changed("old_checkpoints"), *command(world, tmp_path, "--save_every", 1, "--keep", keep))
    kept = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    steps = range(1, 6) if keep == 0 else (4, 5)
    assert kept == ["final", *[f"step_{step:06d}" for step in steps]]

def test_old_checkpoints_outlive_a_failed_save(changed, world, tmp_path, monkeypatch):
    """The second save fails: the first checkpoint is still there, and it is whole."""
    module, saved = changed("old_checkpoints"), []

    def full_disk(path, *args):
        saved.append(path.name)
        if path.name == "step_000002":
            raise OSError("no space left")
        rpo.save_checkpoint(path, *args)

    monkeypatch.setattr(module, "save_checkpoint", full_disk)
    with pytest.raises(SystemExit):
        train(module, *command(world, tmp_path, "--save_every", 1, "--keep", 1))
    assert saved == ["step_000001", "step_000002"]
    monkeypatch.undo()
    resume = command(world, tmp_path, "--save_every", 1, "--keep", 1, "--resume")
    assert train(module, *resume)[-1]["step"] == 6
    kept = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert kept == ["final", "step_000005"]

def test_tracker(changed, world, tmp_path, monkeypatch):
    """A stand-in for wandb is told the run's name and options, then every row with its step."""
    wandb = ModuleType("wandb")
    started, logged = [], []

    def init(**settings):
        started.append(settings)

    def log(row, step):
        logged.append((step, row))

    wandb.init, wandb.log = init, log
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    rows = train(changed("tracker"), *command(world, tmp_path, "--max_steps", 2))
    assert len(started) == 1
    assert started[0]["name"] == str(tmp_path)
    assert started[0]["config"]["eta"] == 0.5
    assert [step for step, _ in logged] == [0, 1, 2, 2]
    for (_, row), written in zip(logged, rows):
        assert row.items() <= written.items()
        assert "loss" in row or "eval/loss" in row

# ------------------------------------------------------------------------------------------------
# torch.compile

def count_graphs(monkeypatch, backend):
    """torch.compile with this backend, its counters at zero -> the counters."""
    compile = functools.partial(torch.compile, backend=backend)
    monkeypatch.setattr(torch, "compile", compile)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch._dynamo.utils.counters

def test_compile(changed, world, whole, tmp_path, monkeypatch):
    """
    Layers run as graphs without a break, of reference and policy, and train as before. The graphs
    are run by torch itself here, for C++ takes a minute to generate, and the check at the start,
    which would be four graphs of its own, is left out.
    """
    module, counters = changed("compile"), count_graphs(monkeypatch, "eager")
    monkeypatch.setattr(module, "can_share", always)
    rows = train(module, *command(world, tmp_path, "--max_steps", 2, "--eval_every", 0))
    assert_same_rows(rows, [row for row in read_rows(whole) if "loss" in row][:2])
    assert counters["stats"]["unique_graphs"] >= 2
    assert not counters["graph_break"]

def always(*args):
    return True

slow = pytest.mark.skipif(
    not os.environ.get("RPO_SLOW_TESTS"), reason="takes a minute; set RPO_SLOW_TESTS=1")

@slow
def test_compile_generates_code(changed, world, whole, tmp_path, monkeypatch):
    counters = count_graphs(monkeypatch, "inductor")
    train(changed("compile"), *command(world, tmp_path))
    assert_same_run(tmp_path, whole)
    assert counters["inductor"]

# ------------------------------------------------------------------------------------------------
# LoRA

def test_lora(changed, world, tmp_path):
    """
    The base model is the reference and stays what it is; only the adapter moves and is saved. The
    saved folder loads as a model that gives the logged log-probs, merged or not.
    """
    before = contents(world.model)
    rows = train(changed("lora"), *command(world, tmp_path / "run"))
    assert contents(world.model) == before
    assert rows[0]["eval/logps/chosen_vs_ref"] == 0
    assert rows[1]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-7)

    folder = tmp_path / "run/final"
    saved = load_file(folder / "adapter_model.safetensors")
    assert all("lora_A" in name or "lora_B" in name for name in saved)
    assert len(saved) == 2 * 2 * 7  # two layers of seven linear maps
    assert not (folder / "model.safetensors").exists()
    moments = load_file(folder / "optimizer.safetensors")
    assert len(moments) == 3 * len(saved)

    base = load_file(f"{world.model}/model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in loaded.named_parameters():
        if "lora_" in name:
            assert weight.abs().max() > 1e-3
        else:
            assert torch.equal(weight, base[name.replace(".base_layer", "")])

    pairs = read_pairs(world.data)
    logged = rows[-1]["eval/logps/chosen"], rows[-1]["eval/logps/rejected"]
    assert abs(logged[0] - rows[0]["eval/logps/chosen"]) > 0.1
    assert plain_logps(loaded, pairs).mean(0) == pytest.approx(logged, rel=1e-5)
    # the command of README.md that merges it
    text = (CHANGES / "README.md").read_text()
    merge = re.search(r'python -c "(.*?)"', text, re.DOTALL)[1].replace("\\\n", "")
    exec(merge.replace("out/run", str(tmp_path / "run")))
    merged = rpo.load_model(tmp_path / "run/merged")
    assert plain_logps(merged, pairs).mean(0) == pytest.approx(logged, rel=1e-5)

def test_lora_resumes_bit_for_bit(changed, world, tmp_path):
    module = changed("lora")
    train(module, *command(world, tmp_path / "a"))
    train(module, *command(world, tmp_path / "b", "--max_steps", 4))
    train(module, *command(world, tmp_path / "b", "--resume"))
    assert_same_rows(read_rows(tmp_path / "b"), read_rows(tmp_path / "a"), 0)
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        found = load_file(tmp_path / "b/final" / name)
        assert_close_weights(found, load_file(tmp_path / "a/final" / name), 0)

# ------------------------------------------------------------------------------------------------
# soft caps on logits

def tiny_gemma(model_type, cap, vocab_size=48):
    """Gemma 2 has eager attention, which cannot share prompts; Gemma 3's can."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=vocab_size, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        query_pre_attn_scalar=16, initializer_range=0.2, final_logit_softcapping=cap,
        pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return AutoModelForCausalLM.from_config(config)

def gradients(model, logps):
    """Of a weighted sum of log-probs, so that none cancels another: {name: gradient}."""
    model.zero_grad()
    (logps * torch.arange(1, logps.numel() + 1).view_as(logps)).sum().backward()
    named = model.named_parameters()
    return {name: weight.grad.clone() for name, weight in named if weight.grad is not None}

@pytest.mark.parametrize("model_type, shared", [("gemma2", False), ("gemma3_text", True)])
@pytest.mark.parametrize("cap", [0.7, None])
def test_soft_cap_gives_the_models_own_log_probs(changed, world, cap, model_type, shared):
    """Values and gradients of capped and of ordinary logits, against the model's full logits."""
    module, pairs = changed("soft_cap"), read_pairs(world.data)
    model = tiny_gemma(model_type, cap)
    assert module.can_share(model, pairs[0]) == shared
    logps = module.PairLogps(model)(module.collate(pairs, shared))
    sides = ("chosen", "rejected")
    plain = torch.stack([plain_logp(model, pair, side) for pair in pairs for side in sides])
    found, wanted = gradients(model, logps), gradients(model, plain.view(-1, 2))
    assert (logps - plain.view(-1, 2)).abs().max() < 1e-4
    assert_close_weights(found, wanted)
    # what rpo.py itself computes is another number where there is a cap
    uncapped = rpo.PairLogps(model)(rpo.collate(pairs, shared))
    assert ((uncapped - logps).abs().max() > 1) == (cap is not None)

def test_soft_cap_in_a_run(changed, world, tmp_path, capsys):
    """rpo.py refuses such a model and names the change; with it, training logs the truth."""
    tiny_gemma("gemma2", 0.7).save_pretrained(tmp_path / "gemma2")
    word_tokenizer().save_pretrained(tmp_path / "gemma2")
    argv = command(world, tmp_path / "refused", "--model", tmp_path / "gemma2")
    with pytest.raises(SystemExit):
        train(rpo, *argv)
    assert "docs/changes/soft_cap.diff" in capsys.readouterr().err
    argv = command(world, tmp_path / "run", "--model", tmp_path / "gemma2")
    last = train(changed("soft_cap"), *argv)[-1]
    logps = plain_logps(tmp_path / "run/final", read_pairs(world.data)).mean(0)
    logged = last["eval/logps/chosen"], last["eval/logps/rejected"]
    assert logged == pytest.approx(logps, rel=1e-5)
    start = plain_logps(tmp_path / "gemma2", read_pairs(world.data)).mean(0)
    assert np.abs(logps - start).max() > 0.1

class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns, backward included."""
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out

def no_change(tensor):
    return tensor

def test_soft_cap_never_has_all_logits(changed):
    """600 scored tokens, 20,000 words: no tensor holds the logits of more than 256 tokens."""
    words, ids = 20_000, torch.Generator().manual_seed(0)
    model = tiny_gemma("gemma3_text", 0.7, words)
    pair = {"prompt": [1, 7, 8]}
    for side in ("chosen", "rejected"):
        pair[side] = torch.randint(3, words, (300,), generator=ids).tolist()
    module = changed("soft_cap")
    kept = []

    def keep(tensor):
        kept.append(0 if isinstance(tensor, torch.nn.Parameter) else tensor.numel())
        return tensor

    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, no_change):
            logps = module.PairLogps(model)(module.collate([pair]))
        logps.sum().backward()
    assert largest.elements == 256 * words
    assert sum(kept) < 600 * words  # nor does backward keep them in parts
    with Largest() as largest:
        model(torch.tensor([pair["chosen"]]))
    assert largest.elements == 300 * words  # the measure sees them where they are

# ------------------------------------------------------------------------------------------------
# baseline responses

THREE = ("chosen", "rejected", "baseline")

def test_baseline_is_tokenized(changed, tokenizer, tmp_path):
    """Where one record of a file has a baseline, all pairs get one; no text is none."""
    module = changed("baseline")
    pair = {"prompt": "w10", "chosen": " w11", "rejected": " w12"}
    records = [pair, pair | {"baseline": " w13 w14"}, pair | {"baseline": ""}]
    write_jsonl(tmp_path / "some.jsonl", records)
    write_jsonl(tmp_path / "none.jsonl", [pair])
    some = module.load_pairs(tmp_path / "some.jsonl", tokenizer)
    assert [list(pair) for pair in some] == [["prompt", *THREE]] * 3
    assert [pair["baseline"] for pair in some] == [[11, 2], [13, 14, 2], [11, 2]]
    assert list(module.load_pairs(tmp_path / "none.jsonl", tokenizer)[0]) == ["prompt", *THREE[:2]]
    reason = module.tokenize_pair(records[1], tokenizer, max_length=3)
    assert reason == "longer than max_length"
    assert module.show_pair(some[1], tokenizer).endswith("baseline  |w13|w14|</s>")

def filled(pairs):
    return [pair | {"baseline": pair.get("baseline", pair["chosen"])} for pair in pairs]

@pytest.mark.parametrize("shared", [True, False])
def test_baseline_is_a_third_branch(changed, world, shared):
    """Log-probs (N, 3) are the plain ones, and those of the two sides are what they were."""
    module, model = changed("baseline"), rpo.load_model(world.model)
    pairs = filled(read_pairs(world.with_baseline, "train", module))
    found = module.score(module.PairLogps(model), pairs, 150, shared)
    assert found.shape == (17, 3)
    np.testing.assert_allclose(found, plain_logps(model, pairs, THREE), atol=1e-4)
    two = [{key: ids for key, ids in pair.items() if key != "baseline"} for pair in pairs]
    before = rpo.score(rpo.PairLogps(model), two, 150, shared)
    assert (found[:, :2] - before).abs().max() < 1e-4
    one = module.collate([{"prompt": [1, 5], "chosen": [7, 2], "rejected": [2], "baseline": [8]}])
    assert one["input_ids"].tolist() == [[1, 5, 7, 2, 5, 2, 5, 8]]
    assert one["branch"].tolist() == [[0, 1, 1, 1, 2, 2, 3, 3]]
    assert one["position_ids"].tolist() == [[0, 1, 2, 3, 1, 2, 1, 2]]

@pytest.mark.parametrize("sft", ["sum", "mean"])
def test_baseline_takes_the_sft_term(changed, world, tmp_path, sft):
    """
    The first step's loss and gradient by the book, and the last evaluation from the saved weights:
    the preference term is on chosen and rejected, the SFT term on the baseline.
    """
    argv = command(world, tmp_path, "--sft", sft, data=world.with_baseline)
    rows = train(changed("baseline"), *argv)

    def by_the_book(policy, ref, lengths):
        ratios = policy[:, :2] - ref[:, :2]
        dpo = torch.log1p(torch.exp(-0.5 * (ratios[:, 0] - ratios[:, 1]))).mean()
        weight = 0.5 * 0.5 if sft == "sum" else 0.5 / lengths
        return dpo, (-weight * policy[:, 2]).mean(), (-policy[:, 2] / lengths).mean()

    pairs = filled(read_pairs(world.with_baseline, "train", changed("baseline")))
    batch = [pairs[i] for i in next(rpo.global_batches(17, 8, 42, 2))]
    lengths = torch.tensor([len(pair["baseline"]) for pair in batch])
    model = rpo.load_model(world.model)
    logps = torch.stack([plain_logp(model, pair, side) for pair in batch for side in THREE])
    logps = logps.view(8, 3)
    dpo, nll, per_token = by_the_book(logps, logps.detach(), lengths)
    (dpo + nll).backward()
    norm = torch.stack([weight.grad.norm() for weight in model.parameters()]).norm()
    first = rows[1]
    assert first["loss/sft"] == pytest.approx(nll.item(), rel=1e-5)
    assert first["nll_per_token"] == pytest.approx(per_token.item(), rel=1e-5)
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)

    pairs = filled(read_pairs(world.with_baseline, "test", changed("baseline")))
    lengths = torch.tensor([len(pair["baseline"]) for pair in pairs])
    logps = [torch.tensor(plain_logps(path, pairs, THREE)) for path in
             (tmp_path / "final", world.model)]
    dpo, nll, per_token = by_the_book(*logps, lengths)
    assert rows[-1]["eval/loss/dpo"] == pytest.approx(dpo.item(), rel=1e-4)
    assert rows[-1]["eval/loss/sft"] == pytest.approx(nll.item(), rel=1e-4)
    assert rows[-1]["eval/nll_per_token"] == pytest.approx(per_token.item(), rel=1e-4)

def test_without_baselines_nothing_changes(changed, world, whole, tmp_path):
    train(changed("baseline"), *command(world, tmp_path))
    assert_same_run(tmp_path, whole, 0)

# ------------------------------------------------------------------------------------------------
# the reference cache

class Cached:
    """Runs with ref_cache.diff on data of their own, and how often they score the reference."""
    def __init__(self, changed, world, data, monkeypatch):
        self.module, self.world, self.data = changed("ref_cache"), world, Path(data)
        self.passes = self.runs = 0
        score = self.module.score

        def count(module, *args):
            self.passes += not any(weight.requires_grad for weight in module.parameters())
            return score(module, *args)

        monkeypatch.setattr(self.module, "score", count)

    def run(self, *flags):
        """A run of two steps -> its rows, how many splits of the reference it scored."""
        self.passes, self.runs = 0, self.runs + 1
        out_dir = self.data.parent / f"run{self.runs}"
        argv = command(self.world, out_dir, "--max_steps", 2, *flags, data=self.data)
        return train(self.module, *argv), self.passes

    def files(self):
        return sorted(path for path in Path(self.data, "ref_logps").iterdir())

@pytest.fixture(scope="module")
def first_run(changed, world, tmp_path_factory):
    """The rows of a run that found no cache, how often it scored, and the data with its cache."""
    with pytest.MonkeyPatch.context() as patch:
        data = copy_data(world, tmp_path_factory.mktemp("first") / "data")
        cached = Cached(changed, world, data, patch)
        rows, passes = cached.run()
        kept, = cached.files()
    return SimpleNamespace(rows=rows, passes=passes, data=data, kept=kept)

@pytest.fixture
def cached(changed, world, first_run, tmp_path, monkeypatch):
    """Data that a run has left its cache in."""
    data = shutil.copytree(first_run.data, tmp_path / "data")
    return Cached(changed, world, data, monkeypatch)

def test_the_cache_keeps_the_reference(first_run, world, whole):
    """The first run scores both splits, trains as ever, and keeps the reference's own log-probs."""
    assert first_run.passes == 2
    assert_same_rows(first_run.rows, read_rows(whole)[:4], 0)
    for split in ("train", "test"):
        logps = plain_logps(world.model, read_pairs(world.data, split))
        np.testing.assert_allclose(load_file(first_run.kept)[split], logps, atol=1e-4)

def test_the_cache_is_as_readable_as_the_data(first_run):
    """Written for its owner alone, it would serve no colleague on the same data."""
    assert first_run.kept.stat().st_mode == (first_run.data / "train.jsonl").stat().st_mode
    assert first_run.kept.stat().st_mode & 0o044

def test_a_second_run_makes_no_reference_pass(cached, world, tmp_path):
    """Other beta, eta, form and rate: the kept numbers train as computed ones do."""
    flags = ["--beta", 0.2, "--eta", 1, "--sft", "mean", "--learning_rate", 1e-3]
    rows, passes = cached.run(*flags)
    assert passes == 0
    assert len(cached.files()) == 1
    argv = command(world, tmp_path / "plain", "--max_steps", 2, *flags)
    assert_same_rows(rows, train(rpo, *argv), 0)

def test_the_cache_belongs_to_weights_tokens_and_precision(cached, tmp_path):
    """Whatever decides a log-prob makes a file of its own, and the header names it."""
    other = save_model(tmp_path / "other", seed=1)
    for flags in (["--dtype", "bfloat16"], ["--max_prompt_length", 5], ["--ref_model", other]):
        assert cached.run(*flags)[1] == 2, flags
    assert cached.run("--eval_every", 0)[1] == 1  # there is no test split
    save_model(other, seed=2)  # other weights in the same place
    assert cached.run("--ref_model", other)[1] == 2
    write_jsonl(Path(cached.data, "train.jsonl"), random_records(17, 9))
    assert cached.run()[1] == 2
    headers = [safe_open(path, "pt").metadata() for path in cached.files()]
    assert len(headers) == 7
    assert len({header["weights"] for header in headers}) == 3
    assert len({header["tokens"] for header in headers}) == 4
    assert {header["model"] for header in headers} == {cached.world.model, other}
    assert {header["dtype"] for header in headers} == {"float32", "bfloat16"}

def foreign(path):
    """The numbers of another reference under this one's name, with the header of their own."""
    save_file({key: tensor - 1 for key, tensor in load_file(path).items()}, path, {"model": "x"})

def no_header(path):
    save_file(load_file(path), path)

def cut_short(path):
    path.write_bytes(path.read_bytes()[:-8])

def flipped_bit(path):
    damaged = bytearray(path.read_bytes())
    damaged[-20] ^= 1
    path.write_bytes(damaged)

def emptied(path):
    path.write_bytes(b"")

@pytest.mark.parametrize("damage", [foreign, no_header, cut_short, flipped_bit, emptied])
def test_a_cache_that_does_not_fit_is_computed_again(cached, first_run, damage):
    """And replaced by one that is whole."""
    kept, = cached.files()
    damage(kept)
    assert kept.read_bytes() != first_run.kept.read_bytes()
    rows, passes = cached.run()
    assert passes == 2
    assert_same_rows(rows, first_run.rows, 0)
    assert cached.files() == [kept]
    assert safe_open(kept, "pt").metadata() == safe_open(first_run.kept, "pt").metadata()
    assert_close_weights(load_file(kept), load_file(first_run.kept), 0)

def test_no_cache_where_nothing_can_be_written(cached, first_run, capsys):
    shutil.rmtree(cached.data / "ref_logps")
    Path(cached.data, "ref_logps").write_text("a file stands where the folder would")
    rows, passes = cached.run()
    assert passes == 2
    assert_same_rows(rows, first_run.rows, 0)
    assert "not kept for other runs" in capsys.readouterr().out

def test_no_cache_on_a_full_disk(cached, first_run, capsys, monkeypatch):
    """Writing fails in safetensors, too, in a way of its own."""
    def full(tensors, path, metadata):
        save_file(tensors, "/proc/nowhere", metadata)

    shutil.rmtree(cached.data / "ref_logps")
    monkeypatch.setattr(cached.module, "save_file", full)
    # which saves the moments with the true one
    monkeypatch.setattr(cached.module, "save_checkpoint", rpo.save_checkpoint)
    rows, _ = cached.run()
    assert_same_rows(rows, first_run.rows, 0)
    assert "not kept for other runs" in capsys.readouterr().out
    assert cached.files() == []

# ------------------------------------------------------------------------------------------------
# FSDP2 and what goes with it, on two gloo ranks

def test_fsdp2_shards_reference_and_policy(changed, world, whole, tmp_path, monkeypatch):
    """One rank, so that it can be watched: each layer and the root are sharded when they score."""
    module, seen = changed("fsdp2"), []
    score = module.score

    def watch(pair_logps, *args):
        parts = [type(part) for part in pair_logps.modules() if isinstance(part, FSDPModule)]
        seen.append([part.__name__.removeprefix("FSDP") for part in parts])
        return score(pair_logps, *args)

    monkeypatch.setattr(module, "score", watch)
    train(module, *command(world, tmp_path, "--fsdp"))
    assert seen == [["PairLogps", "LlamaDecoderLayer", "LlamaDecoderLayer"]] * (2 + 4)
    assert_same_run(tmp_path, whole)

def test_fsdp2_gathers_weights_in_bfloat16(changed, world, tmp_path, monkeypatch):
    """What a layer computes with; in the check at the start, and on the ranks, it is float32."""
    seen, forward = [], LlamaMLP.forward

    def watch(mlp, hidden):
        seen.append(mlp.up_proj.weight.dtype)
        return forward(mlp, hidden)

    monkeypatch.setattr(LlamaMLP, "forward", watch)
    argv = command(world, tmp_path, "--dtype", "bfloat16", "--max_steps", 1, "--eval_every", 0)
    train(changed("fsdp2"), *argv, "--fsdp")
    layers, rows = 2, 2 + 1  # two plain forwards and one of the shared row
    check = [torch.float32] * layers * rows
    scoring, training = [torch.bfloat16] * layers, [torch.bfloat16] * layers
    assert seen == check + scoring + check + training

def test_fsdp2_without_its_flag_changes_nothing(changed, world, whole, tmp_path):
    train(changed("fsdp2"), *command(world, tmp_path))
    assert_same_run(tmp_path, whole, 0)

@pytest.fixture(scope="module")
def on_two_ranks(changed, world, tmp_path_factory):
    """All runs on two ranks, in one torchrun -> the folder with theirs, what they printed."""
    root = tmp_path_factory.mktemp("two_ranks")
    # a run's first argument is the program that it runs
    starter = root / "starter.py"
    program = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    starter.write_text(program)
    save_model(root / "tied", tie_word_embeddings=True)
    copy_data(world, root / "data0")
    copy_data(world, root / "data1")

    def go(changes, out_dir, *flags, data=None):
        # several passes a step, so that the ranks must meet in each
        argv = command(world, root / out_dir, "--max_tokens", 100, *flags, data=data)
        return ["starter", changed(*changes.split()).__file__, *argv[1:]]

    each = root / "data{rank}"
    done = launch(
        2, root,
        go("fsdp2", "fsdp", "--fsdp"),
        go("fsdp2", "again", "--fsdp", "--max_steps", 4),
        go("fsdp2", "again", "--fsdp", "--resume"),
        go("fsdp2", "mixed", "--max_steps", 2),
        go("fsdp2", "mixed", "--max_steps", 4, "--fsdp", "--resume"),
        go("fsdp2", "mixed", "--resume", "--gradient_checkpointing"),
        go("fsdp2", "tied", "--fsdp", "--max_steps", 2, "--model", root / "tied"),
        go("fsdp2", "half", "--fsdp", "--dtype", "bfloat16", "--learning_rate", 1e-5),
        go("fsdp2 baseline", "baseline", "--fsdp", data=world.with_baseline),
        go("fsdp2 lora", "lora", "--fsdp"),
        go("fsdp2_ref_cache", "cache1", "--fsdp", "--max_steps", 1, data=each),
        go("fsdp2_ref_cache", "cache2", "--fsdp", "--max_steps", 2, "--beta", 0.2, data=each),
        go("fsdp2_ref_cache", "cache3", "--fsdp", "--max_steps", 2, "--beta", 0.2,
           data=root / "data0"),
        script=starter)
    assert done.returncode == 0, done.stderr[-20_000:]
    return SimpleNamespace(root=root, out=done.stdout)

def test_fsdp2_trains_as_one_rank_does(on_two_ranks, whole):
    """The same rows, weights, moments and files, though each rank holds a part of each weight."""
    assert_same_run(on_two_ranks.root / "fsdp", whole)
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*"))
             for folder in (on_two_ranks.root / "fsdp", whole)]
    assert files[0] == files[1]
    AutoModelForCausalLM.from_pretrained(on_two_ranks.root / "fsdp/final")

def test_fsdp2_resumes_bit_for_bit(on_two_ranks):
    assert_same_run(on_two_ranks.root / "again", on_two_ranks.root / "fsdp", 0)

def test_fsdp2_and_ddp_go_on_from_each_others_checkpoints(on_two_ranks, whole):
    """Two steps of DDP, two of FSDP2, two of DDP: as one rank in one go."""
    assert_same_run(on_two_ranks.root / "mixed", whole)

def test_fsdp2_saves_a_tied_weight_once(on_two_ranks, world, tmp_path):
    tied = on_two_ranks.root / "tied"
    argv = command(world, tmp_path, "--model", tied, "--max_steps", 2)
    assert_same_rows(read_rows(tied), train(rpo, *argv))
    weights = load_file(tied / "step_000002/model.safetensors")
    assert_close_weights(weights, load_file(tmp_path / "step_000002/model.safetensors"))
    assert "lm_head.weight" not in weights

def test_fsdp2_keeps_float32_weights_in_bfloat16(on_two_ranks, world, whole):
    """Losses near those of float32; steps far below a bfloat16 weight's own rounding arrive."""
    half = on_two_ranks.root / "half"
    first, full = read_rows(half)[1], read_rows(whole)[1]
    assert first["loss"] == pytest.approx(full["loss"], rel=0.02)
    assert first["loss"] != full["loss"]
    assert first["loss/dpo"] == pytest.approx(math.log(2), abs=0.05)
    start = load_file(f"{world.model}/model.safetensors")
    for name, weight in load_file(half / "final/model.safetensors").items():
        moved = (weight - start[name]).abs()
        assert weight.dtype == torch.float32
        assert 0 < moved.max() < 1e-4
        assert (moved > 0).float().mean() > 0.5

def test_fsdp2_with_baseline(on_two_ranks, changed, world, tmp_path):
    argv = command(world, tmp_path, data=world.with_baseline)
    train(changed("baseline"), *argv)
    assert_same_run(on_two_ranks.root / "baseline", tmp_path)

def test_fsdp2_with_lora(on_two_ranks, changed, world, tmp_path):
    train(changed("lora"), *command(world, tmp_path))
    assert_same_rows(read_rows(on_two_ranks.root / "lora"), read_rows(tmp_path))
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        found = load_file(on_two_ranks.root / "lora/final" / name)
        assert_close_weights(found, load_file(tmp_path / "final" / name))

def test_ranks_agree_on_the_cache(on_two_ranks, world, tmp_path):
    """
    Each rank looks into a folder of its own, and rank 0 alone writes: in the second run rank 0
    finds the cache and rank 1 does not, so both compute. In the third both look where it is.
    """
    argv = command(world, tmp_path, "--max_steps", 2, "--beta", 0.2)
    rows = train(rpo, *argv)
    for name in ("cache2", "cache3"):
        assert_same_rows(read_rows(on_two_ranks.root / name), rows)
    assert len(list(Path(on_two_ranks.root, "data0/ref_logps").iterdir())) == 1
    assert not Path(on_two_ranks.root, "data1/ref_logps").exists()
    assert on_two_ranks.out.count("reference log-probs are those of") == 1

# ------------------------------------------------------------------------------------------------
# several changes at once

TOGETHER = [
    ("fsdp2", "baseline"), ("fsdp2", "lora"), ("fsdp2", "soft_cap"), ("baseline", "ref_cache"),
    ("fsdp2_ref_cache", "baseline")]

@pytest.mark.parametrize("names", TOGETHER, ids=" + ".join)
def test_changes_combine(names, tmp_path):
    """In any order the result is the same."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    assert apply(one, *names).read_text() == apply(two, *reversed(names)).read_text()

def test_baseline_with_ref_cache(changed, world, tmp_path):
    """The kept log-probs have three columns, and a second run trains from them as from its own."""
    data = shutil.copytree(world.with_baseline, tmp_path / "data")
    module = changed("baseline", "ref_cache")
    train(module, *command(world, tmp_path / "a", "--max_steps", 2, data=data))
    kept, = Path(data, "ref_logps").iterdir()
    assert load_file(kept)["train"].shape == (17, 3)
    rows = train(module, *command(world, tmp_path / "b", "--max_steps", 2, data=data))
    alone = command(world, tmp_path / "c", "--max_steps", 2, data=world.with_baseline)
    assert_same_rows(rows, train(changed("baseline"), *alone), 0)
