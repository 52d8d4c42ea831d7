"""
Hops 2 and 3, from pairs to padded rows: the order of an epoch, the micro-batches of a step, the
tensors of a micro-batch. Small cases are written out whole.
"""
import itertools
import math
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rpo

def pair_of(prompt, chosen, rejected):
    """A pair of token ids with responses of these lengths; the ids do not matter."""
    return {"prompt": [5] * prompt, "chosen": [6] * chosen, "rejected": [7] * rejected}

# ------------------------------------------------------------------------------------------------
# global batches

def batches_of(*arguments):
    """As lists, which compare and add."""
    return [batch.tolist() for batch in rpo.global_batches(*arguments)]

def test_an_epoch_meets_each_pair_once():
    """In an order of its own, and the last batch is the rest, not dropped."""
    batches = batches_of(21, 8, 42, 1)
    assert [len(batch) for batch in batches] == [8, 8, 5]
    order = sum(batches, [])
    assert sorted(order) == list(range(21))
    assert order != list(range(21))

def test_batches_of_one_epoch_follow_those_of_the_one_before():
    """No batch spans two epochs."""
    batches = batches_of(21, 8, 42, 3)
    assert [len(batch) for batch in batches] == [8, 8, 5] * 3
    for start in (0, 3, 6):
        assert sorted(sum(batches[start : start + 3], [])) == list(range(21))

def test_the_order_depends_on_seed_and_epoch_alone():
    """Ranks, resumed runs and tests that draw numbers in between agree on it."""
    batches = batches_of(21, 8, 42, 2)
    rpo.torch.rand(3)
    assert batches_of(21, 8, 42, 2) == batches

def test_no_two_seeds_or_epochs_share_an_order():
    """Also not seed 42 in epoch 1 and seed 43 in epoch 0, which seed + epoch would confuse."""
    orders = set()
    for seed in (41, 42, 43):
        order = sum(batches_of(21, 8, seed, 3), [])
        orders |= {tuple(order[start : start + 21]) for start in (0, 21, 42)}
    assert len(orders) == 9

# ------------------------------------------------------------------------------------------------
# micro-batches

def test_row_length_counts_what_collate_makes():
    """Responses start with a copy of the prompt's last token; separate rows are padded."""
    pair = pair_of(3, 2, 4)
    for shared, rows, length in ((True, 1, 2 + 3 + 5), (False, 2, 3 + 4)):
        assert rpo.collate([pair], shared)["input_ids"].shape == (rows, length)
        assert rpo.row_length(pair, shared) == rows * length

def test_micro_batches_by_hand():
    """
    Rows of 8, 12, 10 and 9 tokens, the longest first. Two rows of at most 12 fit 24 tokens, and
    then two of at most 9. Each of two ranks takes every other one.
    """
    pairs = [pair_of(2, 2, 3), pair_of(2, 4, 5), pair_of(2, 3, 4), pair_of(2, 3, 3)]
    assert [rpo.row_length(pair, True) for pair in pairs] == [8, 12, 10, 9]
    assert list(rpo.micro_batches(pairs, 24, True)) == [([1, 2], 1.0), ([3, 0], 1.0)]
    assert list(rpo.micro_batches(pairs, 12, True, 0, 2)) == [([1], 1.0), ([3], 1.0)]
    assert list(rpo.micro_batches(pairs, 12, True, 1, 2)) == [([2], 1.0), ([0], 1.0)]

def test_a_rank_without_a_pair_repeats_anothers_with_weight_0():
    """DDP waits for every rank in the last pass, so each has one."""
    pairs = [pair_of(2, 2, 3)]
    assert list(rpo.micro_batches(pairs, 100, True, 0, 2)) == [([0], 1.0)]
    assert list(rpo.micro_batches(pairs, 100, True, 1, 2)) == [([0], 0.0)]

sizes = st.tuples(st.integers(1, 20), st.integers(2, 20), st.integers(2, 20))

@given(
    pairs=st.lists(sizes.map(lambda size: pair_of(*size)), min_size=1, max_size=17),
    max_tokens=st.sampled_from([1, 50, 200, 10**6]),
    shared=st.booleans(),
    world_size=st.sampled_from([1, 2, 3, 8]))
def test_any_micro_batches(pairs, max_tokens, shared, world_size):
    """Over all ranks each pair counts once; ranks pass equally often; the budget is kept."""
    ranks = [
        list(rpo.micro_batches(pairs, max_tokens, shared, rank, world_size))
        for rank in range(world_size)]
    assert len({len(passes) for passes in ranks}) == 1

    lengths = [rpo.row_length(pair, shared) for pair in pairs]
    counts = Counter()
    for indices, weight in itertools.chain(*ranks):
        padded = len(indices) * max(lengths[i] for i in indices)
        assert len(indices) == 1 or padded <= max_tokens
        assert weight in (0.0, 1.0)
        counts.update({i: weight for i in indices})
    assert counts == {i: 1 for i in range(len(pairs))}

@given(pairs=st.lists(sizes.map(lambda size: pair_of(*size)), min_size=1, max_size=17))
def test_the_longest_rows_come_first(pairs):
    """Running out of memory shows in the first pass, not after hours."""
    passes = rpo.micro_batches(pairs, 50, True)
    lengths = [rpo.row_length(pairs[i], True) for indices, _ in passes for i in indices]
    assert lengths == sorted(lengths, reverse=True)

def test_eight_ranks_share_a_batch_of_128_evenly():
    """The paper's batch: 16 pairs a rank."""
    pairs = [pair_of(40, 30, 30)] * 128
    for rank in range(8):
        passes = rpo.micro_batches(pairs, 4096, True, rank, 8)
        assert sum(weight * len(indices) for indices, weight in passes) == 16

# ------------------------------------------------------------------------------------------------
# rows

PAIRS = [
    {"prompt": [5, 6, 7], "chosen": [8, 9], "rejected": [10, 2]},
    {"prompt": [5], "chosen": [6, 2], "rejected": [2]},
]

def as_lists(batch):
    return {name: batch[name].tolist() for name in ("input_ids", "position_ids", "branch")}

def test_shared_rows():
    """
    One row a pair. Both responses continue the prompt's positions, each behind a copy of the
    prompt's last token; -1 is padding.
    """
    assert as_lists(rpo.collate(PAIRS)) == {
        "input_ids": [[5, 6, 7, 8, 9, 7, 10, 2], [5, 6, 2, 5, 2, 0, 0, 0]],
        "position_ids": [[0, 1, 2, 3, 4, 2, 3, 4], [0, 1, 2, 0, 1, 0, 0, 0]],
        "branch": [[0, 0, 1, 1, 1, 2, 2, 2], [3, 3, 3, 4, 4, -1, -1, -1]],
    }

def test_separate_rows():
    """One row a response, for models on which shared prompts are not exact."""
    assert as_lists(rpo.collate(PAIRS, shared=False)) == {
        "input_ids": [[5, 6, 7, 8, 9], [5, 6, 7, 10, 2], [5, 6, 2, 0, 0], [5, 2, 0, 0, 0]],
        "position_ids": [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 0, 0], [0, 1, 0, 0, 0]],
        "branch": [[0, 0, 1, 1, 1], [0, 0, 2, 2, 2], [3, 3, 3, -1, -1], [4, 4, -1, -1, -1]],
    }

def test_more_than_two_responses_share_a_row():
    """Nothing counts to two: a pair may carry a third response, such as a baseline."""
    pair = {"prompt": [5, 6], "chosen": [7], "rejected": [8], "baseline": [9, 2]}
    assert as_lists(rpo.collate([pair])) == {
        "input_ids": [[5, 6, 7, 6, 8, 6, 9, 2]],
        "position_ids": [[0, 1, 2, 1, 2, 1, 2, 3]],
        "branch": [[0, 1, 1, 2, 2, 3, 3, 3]],
    }
    assert len(rpo.collate([pair], shared=False)["input_ids"]) == 3

# ------------------------------------------------------------------------------------------------
# the schedule

def test_learning_rate():
    """20 steps, warm-up 0.1: half the peak at step 1, the peak at 2 and 3, near 0 at step 20."""
    o = SimpleNamespace(learning_rate=8.0, warmup_ratio=0.1)
    rates = [rpo.learning_rate(step, 20, o) for step in (1, 2, 3, 12, 20)]
    end = 4 * (1 + math.cos(math.pi * 17 / 18))
    assert rates == pytest.approx([4, 8, 8, 4, end], rel=1e-12)

@pytest.mark.parametrize("warmup_ratio, first", [(0, 8.0), (1, 0.4)])
def test_learning_rate_without_and_with_nothing_but_warm_up(warmup_ratio, first):
    """Both ends of what --warmup_ratio may be."""
    o = SimpleNamespace(learning_rate=8.0, warmup_ratio=warmup_ratio)
    assert rpo.learning_rate(1, 20, o) == pytest.approx(first)
    rates = [rpo.learning_rate(step, 20, o) for step in range(1, 21)]
    assert max(rates) == 8.0 and min(rates) > 0
