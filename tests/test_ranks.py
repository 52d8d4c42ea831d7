"""
Several ranks, gloo on CPU, started by torchrun: they share a step's work and change nothing else.
Starting takes seconds, so one launch makes several runs, and each test looks at one of them.
"""
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from conftest import (
    assert_close_weights, assert_same_run, command, launch, read_rows, run, save_model)

def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))

@pytest.fixture(scope="module")
def two(world, tmp_path_factory):
    """
    Folders of runs on two ranks. 100 tokens a micro-batch make several passes a step: ranks meet in
    the last one alone.
    """
    folder = tmp_path_factory.mktemp("two")
    many, stop = ("--max_tokens", 100), ("--max_steps", 4)
    tied = ("--model", save_model(folder / "tied", tie_word_embeddings=True))
    run(*command(world, folder / "from_one", *stop))
    done = launch(
        2, folder,
        command(world, folder / "plain", *many),
        command(world, folder / "again", *many, *stop),
        command(world, folder / "again", *many, "--resume"),
        command(world, folder / "from_one", "--resume"),
        command(world, folder / "to_one", "--gradient_checkpointing", *stop),
        command(world, folder / "tied_run", *tied, "--max_steps", 2))
    assert done.returncode == 0, done.stderr[-20000:]
    run(*command(world, folder / "to_one", "--resume"))
    run(*command(world, folder / "tied_alone", *tied, "--max_steps", 2))
    return SimpleNamespace(folder=folder, out=done.stdout)

@pytest.fixture(scope="module")
def four(world, tmp_path_factory):
    """
    A run on four ranks, more than there are pairs in the third step and in the held-out split; then
    one whose rank 1 alone misses its data.
    """
    folder = tmp_path_factory.mktemp("four")
    shutil.copytree(world.data, folder / "data")
    done = launch(
        4, folder,
        command(world, folder / "plain", "--max_tokens", 100),
        command(world, folder / "failing", data=folder / "data{rank}"))
    return SimpleNamespace(folder=folder, done=done)

# ------------------------------------------------------------------------------------------------
# the same numbers

def test_two_ranks_train_as_one(two, whole):
    """Every row, weight and moment: the mean is over the global batch, whoever computes it."""
    assert_same_run(two.folder / "plain", whole)

def test_ranks_without_a_pair_change_nothing(four, whole):
    """In the third step one of four ranks has a pair, in evaluation three of four."""
    assert_same_run(four.folder / "plain", whole)

def test_ranks_begin_at_log_2(four):
    """The reference's log-probs, computed in shares, come back in the pairs' order."""
    row = read_rows(four.folder / "plain")[0]
    assert row["eval/rewards/margins"] == 0
    assert row["eval/rewards/accuracies"] == 0.5

def test_tied_embeddings_train_as_one(two):
    """DDP meets the weight once, in whose gradient both uses count, and it is saved once."""
    found, wanted = (
        load_file(two.folder / name / "step_000002/model.safetensors")
        for name in ("tied_run", "tied_alone"))
    assert "lm_head.weight" not in found
    assert_close_weights(found, wanted)

# ------------------------------------------------------------------------------------------------
# the same files

def test_ranks_write_the_files_of_one(two, four, whole):
    """Rank 0 writes them; a checkpoint does not know how many ranks there were."""
    assert files(two.folder / "plain") == files(four.folder / "plain") == files(whole)

def test_ranks_resume_bit_for_bit(two):
    assert_same_run(two.folder / "again", two.folder / "plain", tolerance=0)

def test_one_ranks_checkpoint_goes_on_on_two(two, whole):
    assert_same_run(two.folder / "from_one", whole)

def test_two_ranks_checkpoint_goes_on_on_one(two, whole):
    assert_same_run(two.folder / "to_one", whole)

# ------------------------------------------------------------------------------------------------
# the same words

def test_rank_0_speaks_for_all(two):
    """Counts are printed once a run, not once a rank."""
    assert two.out.count("train.jsonl: 17 pairs, dropped: none") == 6

def test_a_rank_that_fails_ends_the_run(four):
    """What only rank 1 sees is said, and nobody waits for it until a time-out."""
    done = four.done
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "error:" in line and "data1" in line]
    assert lines and "no folder" in lines[0]
    assert not (four.folder / "failing/final").exists()

def test_ranks_whose_pairs_differ_do_not_train(world, tmp_path):
    """The same pairs in another order: each rank scores places, not pairs, for all of them."""
    for rank in (0, 1):
        shutil.copytree(world.data, tmp_path / f"data{rank}")
    lines = Path(world.data, "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data1/train.jsonl").write_text("".join(reversed(lines)))
    done = launch(2, tmp_path, command(world, tmp_path / "run", data=tmp_path / "data{rank}"))
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "rank 0: training pairs" in line
    assert not (tmp_path / "run/final").exists()

# ------------------------------------------------------------------------------------------------
# devices

def test_each_rank_takes_the_gpu_of_its_own(world, tmp_path, monkeypatch):
    """It is the current device before there is a process group, whose broadcasts go by it."""
    calls = []

    class Enough(Exception):
        pass

    def group(*args, **kwargs):
        calls.append("group")
        raise Enough

    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("RPO_TRACEBACK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", group)
    with pytest.raises(Enough):
        run(*command(world, tmp_path))
    assert calls == [torch.device("cuda", 3), "group"]
