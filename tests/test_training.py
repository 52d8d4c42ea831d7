"""
Whole runs in one process. The yardstick is plain_training, RPO by the book: full logits of one
response at a time, the batch's mean, torch's AdamW.
"""
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

import rpo
from conftest import (
    CLOSE, TIMINGS, assert_close_weights, assert_same_run, command, contents, plain_logp,
    read_pairs, read_rows, run, save_model, word_tokenizer)

def train_rows(rows):
    return [row for row in rows if "loss" in row]

def eval_rows(rows):
    return [row for row in rows if "eval/loss" in row]

def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

# ------------------------------------------------------------------------------------------------
# the update

def rate(step):
    """The schedule of command(): six steps, one of them warm-up, then a cosine."""
    return 0.01 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 5)) if step > 1 else 0.01

def plain_training(world, seed, eta, sft, clip, weight_decay):
    """Losses and gradient norms of six steps, and the model that they end in."""
    policy, ref = load(world.model), load(world.model).requires_grad_(False)
    pairs = read_pairs(world.data, "train", word_tokenizer())
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=weight_decay)
    means, norms = [], []
    for step, batch in enumerate(rpo.global_batches(17, 8, seed, 2), start=1):
        losses = []
        for pair in [pairs[i] for i in batch]:
            chosen = plain_logp(policy, pair, "chosen")
            rejected = plain_logp(policy, pair, "rejected")
            h = chosen - plain_logp(ref, pair, "chosen")
            h = h - rejected + plain_logp(ref, pair, "rejected")
            weight = eta * 0.5 if sft == "sum" else eta / len(pair["chosen"])
            losses.append(torch.log(1 + torch.exp(-0.5 * h)) - weight * chosen)
        loss = sum(losses) / len(losses)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), clip).item())
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad()
        means.append(loss.item())
    return means, norms, policy

@pytest.mark.parametrize("sft, eta, clip, weight_decay", [
    ("sum", 0.5, 1.0, 0.1),
    ("mean", 2.0, math.inf, 0.0)])
def test_training_is_plain_training(world, tmp_path, sft, eta, clip, weight_decay):
    """Every loss and, in the end, every weight: order, mean, clipping, schedule and decay."""
    rows = run(*command(
        world, tmp_path, "--sft", sft, "--eta", eta, "--grad_clip", clip, "--seed", 7,
        "--weight_decay", weight_decay, "--max_tokens", 150, "--eval_every", 0))
    means, norms, policy = plain_training(world, 7, eta, sft, clip, weight_decay)
    assert [row["loss"] for row in rows] == pytest.approx(means, rel=1e-4)
    # before clipping
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-3)
    trained = load_file(tmp_path / "final/model.safetensors")
    assert_close_weights(trained, policy.state_dict())
    # there was something to see
    start = load_file(f"{world.model}/model.safetensors")
    assert all((trained[name] - start[name]).abs().mean() > 10 * CLOSE for name in start)

def test_two_runs_of_one_command_are_equal(world, whole, tmp_path):
    """Rows, weights and moments to the last bit: nothing is drawn but the order of the pairs."""
    run(*command(world, tmp_path))
    assert_same_run(tmp_path, whole, tolerance=0)

def test_bfloat16_is_for_computing(world, whole, tmp_path):
    """Weights stay in float32, so that steps far below a bfloat16's rounding arrive."""
    rows = run(*command(world, tmp_path, "--dtype", "bfloat16", "--learning_rate", 1e-5))
    start = load_file(f"{world.model}/model.safetensors")
    weights = load_file(tmp_path / "final/model.safetensors")
    for name in start:
        moved = (weights[name] - start[name]).abs()
        assert weights[name].dtype == torch.float32
        assert moved.max() < 1e-4
        assert (moved > 0).float().mean() > 0.5
    # and bfloat16 was computed in
    exact = train_rows(read_rows(whole))[0]["loss"]
    first = train_rows(rows)[0]["loss"]
    assert first == pytest.approx(exact, rel=0.02) and first != exact

# ------------------------------------------------------------------------------------------------
# splits of a step

@pytest.fixture(scope="module", params=[1, 150])
def split(request, world, tmp_path_factory):
    """A run of few tokens a micro-batch -> its folder and the pairs of each training pass."""
    sizes, forward = [], rpo.PairLogps.forward

    def spy(module, batch):
        logps = forward(module, batch)
        if logps.requires_grad:
            sizes.append(len(logps))
        return logps

    out_dir = tmp_path_factory.mktemp("split")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rpo.PairLogps, "forward", spy)
        run(*command(world, out_dir, "--max_tokens", request.param))
    return out_dir, sizes, request.param

def test_max_tokens_splits_a_step(split):
    """Steps of 8, 8 and 1 pairs: one a pass, or as many as fit 150 tokens."""
    _, sizes, max_tokens = split
    assert sum(sizes) == 2 * 17
    if max_tokens == 1:
        assert set(sizes) == {1}
    else:
        assert 6 < len(sizes) < 34

def test_any_split_makes_the_same_updates(split, whole):
    """The mean is over the global batch, whose size is known before its first pass."""
    out_dir, _, _ = split
    assert_same_run(out_dir, whole)

# ------------------------------------------------------------------------------------------------
# gradient checkpointing

@pytest.fixture(scope="module")
def checkpointed(world, tmp_path_factory):
    """A run with gradient checkpointing -> its folder and the activations kept with and without."""
    kept, forward = {}, rpo.PairLogps.forward

    def count(tensor):
        kept[out_dir] = kept.get(out_dir, 0) + tensor.numel()
        return tensor

    def spy(module, batch):
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            return forward(module, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rpo.PairLogps, "forward", spy)
        for flags in ([], ["--gradient_checkpointing"]):
            out_dir = tmp_path_factory.mktemp("checkpointed")
            run(*command(world, out_dir, *flags))
    return out_dir, *kept.values()

def test_gradient_checkpointing_keeps_less(checkpointed):
    """Activations inside the layers are computed again in the backward pass."""
    _, without, with_it = checkpointed
    assert with_it < 0.5 * without

def test_gradient_checkpointing_changes_nothing(checkpointed, whole):
    out_dir, _, _ = checkpointed
    assert_same_run(out_dir, whole)

# ------------------------------------------------------------------------------------------------
# the reference

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_before_training_the_policy_is_its_reference(world, tmp_path, dtype):
    """Margins are 0 and all are ties: one module computes both, on the same rows."""
    row = run(*command(world, tmp_path, "--dtype", dtype, "--max_steps", 1))[0]
    assert row["step"] == 0
    assert row["eval/loss/dpo"] == pytest.approx(math.log(2), rel=1e-12)
    assert row["eval/rewards/accuracies"] == 0.5
    for side in ("chosen", "rejected"):
        assert row[f"eval/rewards/{side}"] == 0
        assert row[f"eval/logps/{side}_vs_ref"] == 0
    assert row["eval/rewards/margins"] == 0

def test_the_first_steps_preference_loss_is_log_2(whole):
    """Anything else means that policy and reference disagree before any update."""
    assert train_rows(read_rows(whole))[0]["loss/dpo"] == pytest.approx(math.log(2), rel=1e-5)

def test_the_reference_stays_the_model_before_training(world, whole):
    """Log-ratios after training are against it, by plain log-probs."""
    policy, ref = load(whole / "final"), load(world.model)
    pairs = read_pairs(world.data, "test", word_tokenizer())
    last = eval_rows(read_rows(whole))[-1]
    for side in ("chosen", "rejected"):
        ratios = [plain_logp(policy, p, side) - plain_logp(ref, p, side) for p in pairs]
        expected = torch.stack(ratios).mean().item()
        assert last[f"eval/logps/{side}_vs_ref"] == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert abs(expected) > 0.1

def test_the_models_folder_is_not_touched(world, tmp_path):
    before = contents(world.model)
    run(*command(world, tmp_path, "--max_steps", 1))
    assert contents(world.model) == before

def test_another_reference(world, tmp_path):
    """--ref_model is what log-ratios are taken against, from the first step on."""
    other = save_model(tmp_path / "other", seed=1)
    rows = run(*command(world, tmp_path / "run", "--ref_model", other, "--max_steps", 1))
    policy, ref = load(world.model), load(other)
    pairs = read_pairs(world.data, "test", word_tokenizer())
    ratios = [plain_logp(policy, p, "chosen") - plain_logp(ref, p, "chosen") for p in pairs]
    expected = torch.stack(ratios).mean().item()
    assert rows[0]["eval/logps/chosen_vs_ref"] == pytest.approx(expected, rel=1e-5)
    assert abs(rows[1]["loss/dpo"] - math.log(2)) > 0.1

def test_policy_and_reference_are_measured_each_for_itself(world, tmp_path, monkeypatch):
    """
    ALiBi counts places, not positions: the rows of such a policy are separate, whatever the
    reference can do. With the roles swapped, each log-ratio changes its sign.
    """
    torch.manual_seed(0)
    sizes = dict(vocab_size=48, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
    bloom = tmp_path / "bloom"
    BloomForCausalLM(BloomConfig(**sizes)).save_pretrained(bloom)
    word_tokenizer().save_pretrained(bloom)
    flags = ("--max_steps", 1)
    shared = []

    def can_share(model, pair, ask=rpo.can_share):
        shared.append(ask(model, pair))
        return shared[-1]

    monkeypatch.setattr(rpo, "can_share", can_share)
    one = run(*command(world, tmp_path / "a", *flags, "--model", bloom, "--ref_model", world.model))
    other = run(*command(world, tmp_path / "b", *flags, "--ref_model", bloom))
    # reference, policy; reference, policy
    assert shared == [True, False, False, True]
    for side in ("chosen", "rejected"):
        key = f"eval/logps/{side}_vs_ref"
        assert one[0][key] == pytest.approx(-other[0][key], abs=1e-4)
        assert abs(one[0][key]) > 0.1

# ------------------------------------------------------------------------------------------------
# what is logged

METRICS = {
    "loss", "loss/dpo", "loss/sft", "rewards/chosen", "rewards/rejected", "rewards/margins",
    "rewards/accuracies", "logps/chosen", "logps/rejected", "logps/chosen_vs_ref",
    "logps/rejected_vs_ref", "nll_per_token"}

def test_every_row_has_every_key(whole):
    """Whoever reads metrics.jsonl as a table finds no hole in it."""
    rows = read_rows(whole)
    for row in train_rows(rows):
        assert row.keys() - set(TIMINGS) == METRICS | {"step", "epoch", "lr", "grad_norm"}
        assert row.keys() >= set(TIMINGS)
        assert row["tokens_per_second"] > 0
    for row in eval_rows(rows):
        assert row.keys() == {f"eval/{name}" for name in METRICS} | {"step", "epoch"}

STATUS = Path("/proc/self/status")

@pytest.mark.skipif(torch.cuda.is_available() or not STATUS.exists(), reason="a GPU, or no Linux")
def test_memory_without_a_gpu_is_the_process_peak(world, tmp_path):
    """In GiB, as the kernel counts it elsewhere: between the peaks before and after the run."""
    def peak():
        return int(STATUS.read_text().split("VmHWM:")[1].split()[0]) / 2**20

    before = peak()
    rows = train_rows(run(*command(world, tmp_path, "--max_steps", 2)))
    for row in rows:
        assert before * 0.999 <= row["peak_memory_gib"] <= 1.1 * peak()

def test_a_row_a_step_and_evaluations_between(whole):
    """--eval_every 2: before training, every second step, and at the end."""
    rows = read_rows(whole)
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert [row["step"] for row in eval_rows(rows)] == [0, 2, 4, 6]
    epochs = [row["epoch"] for row in train_rows(rows)]
    assert epochs == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])

def test_the_last_step_is_evaluated_whatever_its_number(world, tmp_path):
    rows = run(*command(world, tmp_path, "--eval_every", 4, "--max_steps", 5))
    assert [row["step"] for row in eval_rows(rows)] == [0, 4, 5]

def test_the_logged_rate_is_the_schedules(whole):
    rates = [row["lr"] for row in train_rows(read_rows(whole))]
    assert rates == pytest.approx([rate(step) for step in range(1, 7)], rel=1e-12)

def plain_logps(model, pairs):
    """(B, 2), of [chosen, rejected]."""
    rows = [[plain_logp(model, p, side).item() for side in ("chosen", "rejected")] for p in pairs]
    return np.array(rows)

def expected_means(policy, ref, pairs):
    """Every metric by its definition, from plain log-probs; beta 0.5, eta 0.5, the sum."""
    logps, ref_logps = plain_logps(policy, pairs), plain_logps(ref, pairs)
    ratios = logps - ref_logps
    margins = 0.5 * (ratios[:, 0] - ratios[:, 1])
    dpo, sft = np.logaddexp(0, -margins), -0.5 * 0.5 * logps[:, 0]
    lengths = np.array([len(pair["chosen"]) for pair in pairs])
    values = {
        "loss": dpo + sft,
        "loss/dpo": dpo,
        "loss/sft": sft,
        "rewards/chosen": 0.5 * ratios[:, 0],
        "rewards/rejected": 0.5 * ratios[:, 1],
        "rewards/margins": margins,
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps[:, 1],
        "logps/chosen_vs_ref": ratios[:, 0],
        "logps/rejected_vs_ref": ratios[:, 1],
        "nll_per_token": -logps[:, 0] / lengths,
    }
    return {name: value.mean() for name, value in values.items()}, (margins > 0).mean()

def test_evaluation_means_are_over_the_whole_split(world, whole):
    pairs = read_pairs(world.data, "test", word_tokenizer())
    means, accuracy = expected_means(load(whole / "final"), load(world.model), pairs)
    row = eval_rows(read_rows(whole))[-1]
    for name, mean in means.items():
        assert row[f"eval/{name}"] == pytest.approx(mean, rel=1e-5, abs=2e-5), name
    assert row["eval/rewards/accuracies"] == pytest.approx(accuracy)

@pytest.mark.parametrize("step", [3, 5])
def test_training_means_are_over_the_whole_batch(world, whole, step):
    """Of the policy before the step's update: those of steps 2 and 4 are saved."""
    batch = list(rpo.global_batches(17, 8, 42, 2))[step - 1]
    pairs = read_pairs(world.data, "train", word_tokenizer())
    policy = load(whole / f"step_{step - 1:06d}")
    means, accuracy = expected_means(policy, load(world.model), [pairs[i] for i in batch])
    row = train_rows(read_rows(whole))[step - 1]
    for name, mean in means.items():
        assert row[name] == pytest.approx(mean, rel=1e-5, abs=2e-5), name
    assert row["rewards/accuracies"] == pytest.approx(accuracy)

def test_without_held_out_pairs_nothing_is_evaluated(world, tmp_path):
    """A folder with train.jsonl alone trains like one with both, and so does --eval_every 0."""
    data = shutil.copytree(world.data, tmp_path / "data")
    (data / "test.jsonl").unlink()
    rows = run(*command(world, tmp_path / "a", "--max_steps", 2, data=data))
    others = run(*command(world, tmp_path / "b", "--max_steps", 2, "--eval_every", 0))
    assert [row["step"] for row in rows] == [row["step"] for row in others] == [1, 2]
    assert [row["loss"] for row in rows] == [row["loss"] for row in others]

# ------------------------------------------------------------------------------------------------
# what is printed

def test_counts_and_the_first_pair_are_printed(world, tmp_path, capsys):
    """To be looked at before a run is believed."""
    run(*command(world, tmp_path, "--max_steps", 1))
    out = capsys.readouterr().out
    assert f"{world.data}/train.jsonl: 17 pairs, dropped: none\n" in out
    assert f"{world.data}/test.jsonl: 3 pairs, dropped: none\n" in out
    tokenizer = word_tokenizer()
    first = read_pairs(world.data, "train", tokenizer)[0]
    assert rpo.show_pair(first, tokenizer) in out

def test_evaluations_are_printed(world, tmp_path, capsys):
    rows = run(*command(world, tmp_path, "--max_steps", 2))
    out = capsys.readouterr().out
    for row in eval_rows(rows):
        assert f"step {row['step']}: eval/loss {row['eval/loss']:.3f}" in out

# ------------------------------------------------------------------------------------------------
# tokens that a model does not know

def test_a_pad_token_without_an_embedding(world, tmp_path):
    """Many a tokenizer was given one; padding is never scored, so none is needed."""
    tokenizer = word_tokenizer(pad_token="<padding>")
    assert tokenizer.pad_token_id == 48
    model = save_model(tmp_path / "model", tokenizer=tokenizer)
    with_it = run(*command(world, tmp_path / "a", "--model", model, "--max_steps", 1))
    without = run(*command(world, tmp_path / "b", "--max_steps", 1))
    assert with_it[1]["loss"] == without[1]["loss"]
