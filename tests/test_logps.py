"""
Hop 4, PairLogps: from rows to log-probs. The yardstick is the full logits of one response at a
time. Other architectures are in test_models.py.
"""
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import rpo
from conftest import plain_logp, random_records, tiny_llama

SIDES = ("chosen", "rejected")

def random_pairs(n=4, seed=0):
    """Ids at random, in prompts and responses of unequal lengths."""
    rng = random.Random(seed)
    return [
        {key: rng.choices(range(3, 48), k=rng.randint(1, 9)) for key in ("prompt", *SIDES)}
        for _ in range(n)]

def plain_logps(model, pairs):
    rows = [torch.stack([plain_logp(model, pair, side) for side in SIDES]) for pair in pairs]
    return torch.stack(rows)  # (B, 2)

def gradients(model, value):
    """{weight: gradient of value}."""
    model.zero_grad()
    value.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}

def assert_close_gradients(found, wanted, rtol, atol):
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=rtol, atol=atol)

GPT2 = dict(
    vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=600, initializer_range=0.2,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2)

def in_float64():
    """A model that computes in float64 throughout; Llama's norms would round to float32."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**GPT2)).double()
    return model, rpo.PairLogps(model, torch.float64)

# ------------------------------------------------------------------------------------------------
# values and gradients

@pytest.mark.parametrize("shared", [True, False])
def test_log_probs_are_the_plain_ones(shared):
    """Shared rows, padding and chunks change no value."""
    (model, module), pairs = in_float64(), random_pairs()
    logps = module(rpo.collate(pairs, shared))
    torch.testing.assert_close(logps, plain_logps(model, pairs), rtol=1e-12, atol=1e-12)

@pytest.mark.parametrize("shared", [True, False])
def test_gradients_are_the_plain_ones(shared):
    """Nor any gradient, whatever each log-prob weighs in the loss."""
    (model, module), pairs = in_float64(), random_pairs()
    weights = torch.tensor([[1.0, -2.0], [0.5, 3.0], [-1.0, 1.0], [2.0, -0.5]]).double()
    wanted = gradients(model, (weights * plain_logps(model, pairs)).sum())
    found = gradients(model, (weights * module(rpo.collate(pairs, shared))).sum())
    assert_close_gradients(found, wanted, rtol=1e-9, atol=1e-12)

@pytest.mark.parametrize("shared", [True, False])
def test_float32_differs_by_rounding_alone(shared):
    """Values and gradients of a Llama, in what training computes in."""
    model, pairs = tiny_llama(), random_pairs()
    logps, plain = rpo.PairLogps(model)(rpo.collate(pairs, shared)), plain_logps(model, pairs)
    torch.testing.assert_close(logps, plain, rtol=1e-5, atol=1e-5)
    found, wanted = gradients(model, logps.sum()), gradients(model, plain.sum())
    assert_close_gradients(found, wanted, rtol=1e-4, atol=1e-4)

def test_bfloat16_computes_in_bfloat16():
    """In the layers and in the head; weights and the sum over a response's tokens do not."""
    model, pairs, dtypes = tiny_llama(), random_pairs(), []
    down = model.model.layers[0].mlp.down_proj
    down.register_forward_hook(lambda layer, inputs, output: dtypes.append(output.dtype))
    batch = rpo.collate(pairs)
    logps = rpo.PairLogps(model, torch.bfloat16)(batch)
    assert dtypes == [torch.bfloat16]
    assert down.weight.dtype == torch.float32 and logps.dtype == torch.float64
    exact = rpo.PairLogps(model)(batch)
    assert not torch.equal(logps, exact)
    torch.testing.assert_close(logps, exact, rtol=0.05, atol=0)

@pytest.mark.parametrize("shared", [True, False])
def test_many_chunks_are_one(shared):
    """The head takes 256 tokens at a time; here are 1,500, in value and gradient."""
    (model, module), rng = in_float64(), random.Random(0)
    pairs = [
        {key: rng.choices(range(3, 48), k=250) for key in ("prompt", *SIDES)} for _ in range(3)]
    plain = plain_logps(model, pairs)
    logps = module(rpo.collate(pairs, shared))
    torch.testing.assert_close(logps, plain, rtol=1e-12, atol=0)
    found, wanted = gradients(model, logps.sum()), gradients(model, plain.sum())
    assert_close_gradients(found, wanted, rtol=1e-9, atol=1e-9)

ids = st.lists(st.integers(0, 47), min_size=1, max_size=12)
any_pair = st.tuples(ids, ids, ids).map(lambda three: dict(zip(("prompt", *SIDES), three)))

@settings(max_examples=50)
@given(pairs=st.lists(any_pair, min_size=1, max_size=6))
def test_any_shared_rows_equal_separate_rows(pairs):
    """Any lengths, any ids, the padding's and repeated ones among them."""
    _, module = in_float64()
    with torch.no_grad():
        shared, separate = (module(rpo.collate(pairs, shared)) for shared in (True, False))
    torch.testing.assert_close(shared, separate, rtol=1e-9, atol=1e-9)

# ------------------------------------------------------------------------------------------------
# what does not matter

@pytest.mark.parametrize("shared", [True, False])
def test_neighbours_do_not_matter(shared):
    """A pair's log-probs are those that it has alone, and they stand in the pairs' order."""
    (_, module), pairs = in_float64(), random_pairs(6, seed=1)
    logps = module(rpo.collate(pairs, shared))
    alone = torch.cat([module(rpo.collate([pair], shared)) for pair in pairs])
    assert logps.shape == (6, 2)
    torch.testing.assert_close(logps, alone, rtol=1e-12, atol=1e-12)

@pytest.mark.parametrize("shared", [True, False])
def test_the_padding_does_not_matter(shared):
    """It has the id of a real token, which must not count."""
    (_, module), pairs = in_float64(), random_pairs(6, seed=1)
    batch = rpo.collate(pairs, shared)
    logps = module(batch)
    padding = batch["branch"] < 0
    assert padding.any()
    batch["input_ids"][padding] = 17
    torch.testing.assert_close(module(batch), logps, rtol=1e-12, atol=1e-12)

@pytest.mark.parametrize("world_size", [1, 3])
def test_score_keeps_the_pairs_order(world_size):
    """However micro-batches are sorted, and with every rank's share in its place."""
    (model, module), pairs = in_float64(), random_pairs(7, seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rpo.dist, "all_reduce", lambda tensor: None)
        shares = [rpo.score(module, pairs, 1, True, rank, world_size) for rank in range(world_size)]
    torch.testing.assert_close(sum(shares), plain_logps(model, pairs), rtol=1e-12, atol=0)

# ------------------------------------------------------------------------------------------------
# what is scored

@pytest.mark.parametrize("shared", [True, False])
def test_a_conversations_last_turn_is_scored(tokenizer, shared):
    """From text to log-prob: its tokens and its end token, each predicted by the one before it."""
    record = random_records(1, seed=3)[0]
    pair = rpo.tokenize_pair(record, tokenizer)
    model, module = in_float64()
    (logps,) = module(rpo.collate([pair], shared))
    for side, logp in zip(SIDES, logps):
        text = tokenizer.apply_chat_template(record["prompt"] + record[side], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        words = len(record[side][0]["content"].split())
        tokens = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        # the words and </s>
        wanted = sum(tokens[t - 1, ids[t]] for t in range(len(ids) - words - 1, len(ids)))
        torch.testing.assert_close(logp, wanted, rtol=1e-12, atol=0)

def sft_loss(model, pairs, masked):
    """NLL a token of the chosen responses; without the mask, of the prompts as well."""
    losses = []
    for pair in pairs:
        ids = torch.tensor([pair["prompt"] + pair["chosen"]])
        nll = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        scored = nll[len(pair["prompt"]) - 1 :] if masked else nll
        losses.append(scored.sum() / len(pair["chosen"]))
    return torch.stack(losses).mean()

@pytest.mark.parametrize("shared", [True, False])
def test_the_prompt_gets_no_sft_loss(shared):
    """
    A forgotten prompt mask is invisible to DPO, where it cancels, and wrong for SFT. The gradient
    is that of full logits under a mask, which is far from the one without.
    """
    (model, module), pairs = in_float64(), random_pairs()
    lengths = torch.tensor([len(pair["chosen"]) for pair in pairs])
    logps = module(rpo.collate(pairs, shared))
    losses, _ = rpo.rpo_loss(logps, logps.detach(), lengths, beta=0, eta=1, sft="mean")
    found = gradients(model, losses.mean())
    masked = gradients(model, sft_loss(model, pairs, masked=True))
    unmasked = gradients(model, sft_loss(model, pairs, masked=False))
    assert_close_gradients(found, masked, rtol=1e-9, atol=1e-12)
    distance = sum((found[name] - unmasked[name]).square().sum() for name in found).sqrt()
    size = sum(gradient.square().sum() for gradient in found.values()).sqrt()
    assert distance > 0.3 * size

def test_only_tokens_before_a_scored_one_meet_the_vocabulary(monkeypatch):
    """No (R, T, V) exists: the head sees one hidden state for each token of a response."""
    seen = []
    head = F.linear_cross_entropy

    def spy(hidden, *args, **kwargs):
        seen.append(hidden.shape)
        return head(hidden, *args, **kwargs)

    monkeypatch.setattr(F, "linear_cross_entropy", spy)
    pairs = random_pairs()
    rpo.PairLogps(tiny_llama())(rpo.collate(pairs))
    assert seen == [(sum(len(pair[side]) for pair in pairs for side in SIDES), 32)]

# ------------------------------------------------------------------------------------------------
# loading

def test_dropout_is_off_and_weights_are_float32(tmp_path):
    """Dropout would blur log-ratios; train mode stays on, for gradient checkpointing needs it."""
    dropout = dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    config = GPT2Config(**GPT2 | dropout)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path)
    model = rpo.load_model(str(tmp_path))
    assert model.training
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    ids = torch.arange(3, 20)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)

def test_sharing_is_found_out_by_measuring():
    """Llama's rows may share a prompt; those of a window shorter than a row may not."""
    pair = random_pairs(1, seed=4)[0] | {"prompt": list(range(3, 20))}
    assert rpo.can_share(tiny_llama(), pair)
    sizes = tiny_llama().config.to_diff_dict() | {"model_type": "mistral", "sliding_window": 6}
    torch.manual_seed(0)
    mistral = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes))
    assert not rpo.can_share(mistral, pair)

def test_a_model_whose_rows_are_not_its_own_is_refused():
    """Here one that doubles its logits, which PairLogps computes from hidden states by itself."""
    model = tiny_llama()
    model.lm_head.register_forward_hook(lambda head, inputs, logits: 2 * logits)
    with pytest.raises(ValueError, match="do not give the model's own log-probs"):
        rpo.can_share(model, random_pairs(1)[0])
