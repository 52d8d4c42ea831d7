"""
rpo.py against the models of transformers: rows that share a prompt, the response-only head, attention code, precision.

    OMP_NUM_THREADS=1 pytest tests/test_models.py -q

Every model is small, random, and drawn wide (initializer_range 0.2), so that a wrong mask moves a log-prob by nats. The
yardstick is `plain`: one unpadded row a response through the model's own forward, the loss written out by hand.
"""
import os
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import rpo  # noqa: E402

V = 99
SIZES = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
             pad_token_id=0)
GPT = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=1024, initializer_range=0.2, bos_token_id=1,
           eos_token_id=2, pad_token_id=0)
HEADS = SIZES | dict(head_dim=8)
BOTH = dict(layer_types=["sliding_attention", "full_attention"])  # one layer of each kind
STATE = dict(mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=4, mamba_chunk_size=16)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)

# model type, its settings, and the dtype of the comparison: float64 unless the model's own code cannot
CONFIGS = {
    "llama": ("llama", SIZES),
    "mistral, window": ("mistral", SIZES | dict(sliding_window=6)),
    "qwen2": ("qwen2", SIZES),
    "qwen2, window": ("qwen2", SIZES | dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)),
    "qwen3": ("qwen3", HEADS),
    "gemma": ("gemma", HEADS),
    # eager attention softmaxes in float32, where float64's mask value is -inf and a row masked as a whole becomes nan
    "gemma2, window": ("gemma2", HEADS | dict(sliding_window=6, query_pre_attn_scalar=8), torch.float32),
    "gemma3, window": ("gemma3_text", HEADS | BOTH | dict(sliding_window=6, query_pre_attn_scalar=8)),
    "phi3, window": ("phi3", SIZES | dict(sliding_window=6)),
    "phi": ("phi", SIZES),
    "gpt2": ("gpt2", GPT),
    "gpt_neox": ("gpt_neox", SIZES),
    "gptj": ("gptj", GPT | dict(rotary_dim=4)),
    "olmo2": ("olmo2", SIZES),
    "olmo3, window": ("olmo3", SIZES | BOTH | dict(sliding_window=6)),
    "smollm3": ("smollm3", SIZES | dict(no_rope_layers=[1, 0])),
    "cohere": ("cohere", SIZES | dict(logit_scale=0.5)),
    "cohere2, window": ("cohere2", SIZES | BOTH | dict(sliding_window=6, logit_scale=0.5)),
    "granite": ("granite", SIZES | dict(logits_scaling=0.5)),
    "stablelm": ("stablelm", SIZES),
    "starcoder2, window": ("starcoder2", SIZES | dict(sliding_window=6)),
    "falcon": ("falcon", SIZES),
    "opt": ("opt", SIZES | dict(ffn_dim=48, word_embed_proj_dim=32, init_std=0.2)),
    # experts are multiplied in at most float32
    "mixtral, window": ("mixtral", SIZES | EXPERTS | dict(sliding_window=6), torch.float32),
    "llama4, chunks": ("llama4_text", HEADS | EXPERTS | dict(attention_chunk_size=6, intermediate_size_mlp=48,
                                                             layer_types=["chunked_attention", "full_attention"],
                                                             no_rope_layers=[1, 0]), torch.float32),
    "gpt_oss, window": ("gpt_oss", HEADS | EXPERTS | dict(sliding_window=6), torch.float32),
}
# a state that flows from token to token, distances counted in the row, windows of the model's own making
SEPARATE = {
    "mamba": ("mamba", dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.2)),
    "mamba2": ("mamba2", dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4, num_heads=8, head_dim=8,
                              n_groups=1, chunk_size=16, initializer_range=0.2)),
    "rwkv": ("rwkv", dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, context_length=256)),
    "jamba": ("jamba", SIZES | dict(attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=4)),
    "falcon_h1": ("falcon_h1", SIZES | STATE | dict(mamba_d_ssm=64)),
    "bamba": ("bamba", SIZES | STATE | dict(attn_layer_indices=[1])),
    "granite hybrid": ("granitemoehybrid", SIZES | STATE | dict(layer_types=["mamba", "attention"], num_local_experts=2,
                                                                num_experts_per_tok=1, shared_intermediate_size=32)),
    "qwen3_next": ("qwen3_next", HEADS | dict(
        layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16)),
    "minimax": ("minimax", SIZES | dict(layer_types=["linear_attention", "full_attention"], num_local_experts=2,
                                        block_size=8)),
    "lfm2": ("lfm2", SIZES | dict(layer_types=["conv", "full_attention"])),
    "bloom": ("bloom", dict(vocab_size=V, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)),
    "mpt": ("mpt", dict(vocab_size=V, d_model=32, n_layers=2, n_heads=4, max_seq_len=1024, initializer_range=0.2)),
    "falcon, alibi": ("falcon", SIZES | dict(alibi=True)),
    "gpt_neo, local": ("gpt_neo", SIZES | dict(num_layers=2, num_heads=4, window_size=6,
                                               attention_types=[[["global", "local"], 1]])),
    "gpt1": ("openai-gpt", GPT),
}

@pytest.fixture(autouse=True)
def one_thread():
    """Many tiny problems: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

def make(model_type, sizes, dtype=torch.float64, attn="sdpa", cls=AutoModelForCausalLM):
    config = AutoConfig.for_model(model_type, **sizes)
    for name in [name for name in vars(config) if "dropout" in name or name.endswith("pdrop")]:
        setattr(config, name, 0.0)
    torch.manual_seed(0)
    build = cls.from_config if cls is AutoModelForCausalLM else cls._from_config
    try:
        model = build(config, attn_implementation=attn)
    except (ValueError, ImportError):  # some models have eager attention only
        model = build(config, attn_implementation="eager")
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:  # norms start at one, biases at zero: a lost one would not show
                p += torch.randn_like(p) * 0.1
    return model.train().to(dtype)

def some_pairs(n=3, low=12, high=24, sides=("chosen", "rejected", "baseline"), seed=0, vocab=V):
    rng = np.random.default_rng(seed)
    return [{key: rng.integers(3, vocab, rng.integers(low, high)).astype(np.int32) for key in ("prompt", *sides)}
            for _ in range(n)]

def shapes_of(pairs):
    """Reference log-probs (B, K) and SFT lengths (B,) for these pairs: numbers of about the right size."""
    sides = [side for side in rpo.SIDES if side in pairs[0]]
    ref = torch.linspace(-4.0, -3.0, len(pairs) * len(sides), dtype=torch.float64).view(len(pairs), -1)
    ref = ref * torch.tensor([[len(pair[side]) for side in sides] for pair in pairs])
    return sides, ref, torch.tensor([len(pair.get("baseline", pair["chosen"])) for pair in pairs])

BETA, ETA = 0.1, 0.5

def ours(model, pairs, shared, sft="sum", dtype=torch.float32):
    """The way the trainer goes: log-probs (B, K) and {weight: gradient of the summed RPO loss}."""
    model.zero_grad(set_to_none=True)
    logps = rpo.PairLogps(model, dtype)(rpo.collate(pairs, 0, shared))
    _, ref, lengths = shapes_of(pairs)
    losses, _ = rpo.rpo_loss(logps[:, :2], ref[:, :2].to(logps), lengths, beta=BETA, eta=ETA, sft=sft,
                             baseline_logps=logps[:, 2] if logps.size(1) == 3 else None)
    losses.sum().backward()
    return logps.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

def plain(model, pairs, sft="sum"):
    """The same from the model's own logits, a row at a time, no padding, nothing of rpo.py."""
    model.zero_grad(set_to_none=True)
    sides, ref, lengths = shapes_of(pairs)
    found = []
    for pair, r, n in zip(pairs, ref, lengths):
        logps = []
        for side in sides:
            ids, P = torch.tensor([*pair["prompt"], *pair[side]]).long()[None], len(pair["prompt"])
            logits = model(ids, use_cache=False).logits[0]  # (T, V)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logps.append(logits.log_softmax(-1)[range(P - 1, ids.size(1) - 1), ids[0, P:]].sum())
        w, l, imitated = logps[0], logps[1], logps[sides.index("baseline") if "baseline" in sides else 0]
        h = (w - r[0].item()) - (l - r[1].item())
        loss = torch.log1p(torch.exp(-BETA * h)) - (ETA * BETA * imitated if sft == "sum" else ETA * imitated / n)
        loss.backward()
        found.append(torch.stack(logps).detach())
    return torch.stack(found), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

def norm(grads):
    return sum(g.double().square().sum() for g in grads.values()).sqrt().item()

def assert_close(a, b, atol, rtol):
    """Log-probs (nats) to atol; each weight's gradient to rtol of its norm. Weights whose gradient is zero but for
    rounding, such as the bias of a key, are judged by a thousandth of the norm of all."""
    assert torch.isfinite(a[0]).all() and (a[0] - b[0]).abs().max() <= atol, (a[0] - b[0]).abs().max()
    assert a[1].keys() == b[1].keys()
    for name, g in a[1].items():
        off, size = (g - b[1][name]).norm().item(), g.norm().item() + 1e-3 * norm(a[1])
        assert off <= rtol * size, (name, off / size)

# log-probs in float64 are as good as exact: norms and rotary tables, computed in float32 by most models, are the same
# numbers in either row. Their backward passes sum in float32 too, in another order, hence 1e-6 for gradients.
DOUBLE, SINGLE = dict(atol=1e-10, rtol=2e-6), dict(atol=2e-4, rtol=2e-5)

# ---------------------------------------------------------------------------------------------------------------------
# shared rows

@pytest.mark.parametrize("name", CONFIGS)
def test_shared_rows_equal_separate_rows_and_the_models_own_logits(name):
    model, pairs = make(*CONFIGS[name]), some_pairs()  # unequal lengths: there is padding in either layout
    limits = DOUBLE if model.dtype == torch.float64 else SINGLE
    by_hand, separate, shared = plain(model, pairs), ours(model, pairs, False), ours(model, pairs, True)
    assert_close(by_hand, separate, **limits)
    assert_close(by_hand, shared, **limits)

@pytest.mark.parametrize("name", CONFIGS)
def test_shared_rows_are_found_to_be_exact(name):
    model = make(*CONFIGS[name][:2], dtype=torch.float32)
    assert rpo.can_share(model, some_pairs(1, 40, 60, ("chosen", "rejected"))[0]) is True

@pytest.mark.parametrize("name", SEPARATE)
def test_separate_rows_where_sharing_is_not_exact(name):
    model = make(*SEPARATE[name], dtype=torch.float32)
    assert rpo.can_share(model, some_pairs(1, 40, 60, ("chosen", "rejected"))[0]) is False
    pairs = some_pairs()
    by_hand, separate, shared = plain(model, pairs), ours(model, pairs, False), ours(model, pairs, True)
    assert_close(by_hand, separate, **SINGLE)
    assert (by_hand[0] - shared[0]).abs().max() > 5e-3  # nats: what would be wrong, and is refused above

class HalfLogits(LlamaForCausalLM):
    """A head with a scale of its own, which rpo.py cannot know of."""
    def forward(self, *args, labels=None, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits / 2
        if labels is not None:
            out.loss = self.loss_function(out.logits, labels, V)
        return out

@pytest.mark.parametrize("model_type, sizes, cls", [
    ("llama", SIZES, HalfLogits),
    ("hyperclovax", SIZES | dict(logits_scaling=4.0), AutoModelForCausalLM),  # multiplies where Granite divides
    ("falcon_h1", SIZES | STATE | dict(mamba_d_ssm=64, lm_head_multiplier=0.5), AutoModelForCausalLM),
    ("recurrent_gemma", SIZES | dict(attention_window_size=8, lru_width=32, logits_soft_cap=1.0), AutoModelForCausalLM),
], ids=["scale", "hyperclovax", "falcon_h1", "recurrent_gemma"])
def test_a_model_whose_separate_rows_are_wrong_is_refused(model_type, sizes, cls, capsys):
    model = make(model_type, sizes, torch.float32, cls=cls)
    with pytest.raises(SystemExit) as stop:
        rpo.can_share(model, some_pairs(1, 40, 60, ("chosen", "rejected"))[0])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and type(model).__name__ in error

def test_noise_in_training_is_noticed(capsys):
    """Not every noise is a dropout: this router jitters where it trains, so two passes differ and no ratio is exact."""
    router = dict(num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.3)
    model = make("phimoe", SIZES | router, torch.float32)
    with pytest.raises(SystemExit):
        rpo.can_share(model.train(), some_pairs(1, 40, 60, ("chosen", "rejected"))[0])
    assert "not supported" in capsys.readouterr().err

@pytest.mark.parametrize("width", [0.02, 0.2])  # 0.02: as most models are drawn, so that attention hardly matters yet
@pytest.mark.parametrize("fault", ["rejected sees chosen", "positions run on", "positions off by one"])
def test_small_faults_in_long_rows_are_noticed(monkeypatch, width, fault):
    model, collate = make("llama", SIZES | dict(initializer_range=width), torch.float32), rpo.collate
    pair = some_pairs(1, 299, 301, ("chosen", "rejected"))[0]
    def wrong(pairs, pad_token_id, shared=True):
        batch = collate(pairs, pad_token_id, shared)
        if shared and fault == "rejected sees chosen":
            batch["branch"][batch["branch"] == 1] = 0
        elif shared and fault == "positions run on":
            batch["position_ids"] = torch.arange(batch["input_ids"].size(1))[None]
        elif shared:
            batch["position_ids"][batch["branch"] == 2] += 1
        return batch
    assert rpo.can_share(model, pair) is True
    monkeypatch.setattr(rpo, "collate", wrong)
    assert rpo.can_share(model, pair) is False

def test_nothing_of_a_shared_row_outlives_its_forward():
    """After shared rows, and after one that failed, plain calls of the model see the model's own masks."""
    model, pairs = make(*CONFIGS["mistral, window"]), some_pairs()
    before = plain(model, pairs)[0]
    batch = rpo.collate(pairs, 0)
    rpo.PairLogps(model)(batch)
    with pytest.raises(IndexError):
        rpo.PairLogps(model)(batch | dict(input_ids=batch["input_ids"] + V))
    assert torch.equal(plain(model, pairs)[0], before)

# ---------------------------------------------------------------------------------------------------------------------
# the head: chunks of 2**23 // V positions on a CPU

@pytest.mark.parametrize("name, sizes", [
    ("llama", dict(tie_word_embeddings=False)), ("llama", dict(tie_word_embeddings=True)),
    ("gemma2, window", dict(final_logit_softcapping=0.7)), ("gemma2, window", dict(final_logit_softcapping=None)),
    ("cohere", dict(logit_scale=3.0)), ("granite", dict(logits_scaling=0.2)),
    ("phi", {})], ids=["untied", "tied", "soft cap", "no soft cap", "times", "divided", "bias"])
@pytest.mark.parametrize("chunk", [1, 7, 10**6])
def test_head_in_chunks_equals_full_logits(name, sizes, chunk, monkeypatch):
    model_type, given, *dtype = CONFIGS[name]
    model, pairs = make(model_type, given | sizes, *dtype), some_pairs()
    by_hand = plain(model, pairs, "mean")
    apply = rpo.TokenLogps.apply
    monkeypatch.setattr(rpo.TokenLogps, "apply", lambda *args: apply(*args[:-1], chunk))  # for the n of the model's size
    assert_close(by_hand, ours(model, pairs, True, "mean"), **(SINGLE if dtype else DOUBLE))

WORDS = 2**19  # 16 positions a chunk
WIDE = HEADS | dict(vocab_size=WORDS, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                    num_key_value_heads=1)

class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns, backward included."""
    elements = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            self.elements = max(self.elements, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return out

@pytest.mark.parametrize("shared", [True, False])
def test_logits_of_all_positions_never_exist(shared):
    model = make("llama", WIDE | dict(tie_word_embeddings=True), torch.float32)
    pairs = some_pairs(1, 33, 40, ("chosen", "rejected"), vocab=WORDS)
    batch, kept = rpo.collate(pairs, 0, shared), {}
    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor
    chunk = 2**23  # elements of the logits of one chunk
    assert batch["input_ids"].numel() * WORDS > 2 * chunk and batch["target"].numel() * WORDS > 2 * chunk
    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logps = rpo.PairLogps(model)(batch)
        logps.sum().backward()
    assert largest.elements == chunk  # one chunk, none larger, also when recomputed in backward
    for p in model.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) < chunk / 20  # what backward keeps beside the weights: no logits
    with Largest() as largest, torch.no_grad():
        model(batch["input_ids"])
    assert largest.elements >= batch["input_ids"].numel() * WORDS  # the measure sees full logits where there are some

# ---------------------------------------------------------------------------------------------------------------------
# precision, attention code, recomputation, compilation

@pytest.mark.parametrize("name", ["llama", "mistral, window", "qwen2, window", "gemma3, window", "gpt2", "cohere"])
def test_eager_attention_equals_sdpa(name):
    pairs = some_pairs()
    sdpa, eager = (ours(make(*CONFIGS[name][:2], torch.float32, attn), pairs, True) for attn in ("sdpa", "eager"))
    assert_close(sdpa, eager, **SINGLE)

@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mistral, window"])
def test_gradient_checkpointing_changes_nothing(name):
    model, pairs = make(*CONFIGS[name]), some_pairs()
    runs, layer = [], rpo.PairLogps(model).layers[0]
    next(layer.children()).register_forward_pre_hook(lambda *_: runs.append(1))
    kept, passes = ours(model, pairs, True), len(runs)
    model.activation_checkpointing_enable()
    recomputed = ours(model, pairs, True)
    assert (passes, len(runs)) == (1, 3)  # it did recompute
    assert_close(kept, recomputed, atol=0, rtol=1e-12)

def test_bfloat16_is_close_to_float32():
    """Autocast rounds at 2**-8: log-probs within 1%, the gradient within 5% of its norm; out comes float32."""
    model, pairs = make(*CONFIGS["llama"][:2], torch.float32), some_pairs()
    full, half = ours(model, pairs, True), ours(model, pairs, True, dtype=torch.bfloat16)
    assert half[0].dtype == torch.float32 and all(p.dtype == torch.float32 for p in model.parameters())
    assert not torch.equal(full[0], half[0])
    assert ((half[0] - full[0]) / full[0]).abs().max() < 0.01
    assert norm({name: g - half[1][name] for name, g in full[1].items()}) < 0.05 * norm(full[1])
    shared, separate = half, ours(model, pairs, False, dtype=torch.bfloat16)
    assert ((shared[0] - separate[0]) / full[0]).abs().max() < 0.01

@pytest.mark.parametrize("cap", [None, 3.0])
def test_log_probs_by_chunks_equal_those_at_once(cap):
    """Eighteen positions, seven at a time, against autograd through a plain log-softmax: values and both gradients."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (18, 30))
    target, of_loss = torch.randint(30, (18,)), torch.randn(18, dtype=torch.float64)
    logits = hidden @ weight.T
    expected = (cap * torch.tanh(logits / cap) if cap else logits).log_softmax(-1)[torch.arange(18), target]
    found = rpo.TokenLogps.apply(hidden, weight, target, cap, 7)
    assert (found - expected).abs().max() < 1e-13
    for a, b in zip(*(torch.autograd.grad(logps @ of_loss, (hidden, weight)) for logps in (found, expected))):
        assert (a - b).abs().max() < 1e-13
    assert torch.autograd.gradcheck(lambda *some: rpo.TokenLogps.apply(*some, target, cap, 7), (hidden, weight))

class Products(TorchDispatchMode):
    """The shapes of all matrix products, in their order."""
    def __init__(self):
        super().__init__()
        self.shapes = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.shapes += [tuple(out.shape)] if func.overloadpacket is torch.ops.aten.mm else []
        return out

def test_logits_are_computed_again_but_for_one_chunk():
    """18 positions, 7 at a time: the first 7 are still there for backward; not for a second one, nor need they be."""
    hidden, weight = (torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (18, 30))
    with Products() as products:
        logps = rpo.TokenLogps.apply(hidden, weight, torch.randint(30, (18,)), None, 7)
    assert products.shapes == [(4, 30), (7, 30), (7, 30)]
    for again in ([(7, 30), (4, 30)], [(7, 30), (7, 30), (4, 30)]):
        with Products() as products:
            grads = torch.autograd.grad(logps.sum(), (hidden, weight), retain_graph=True)
        assert [shape for shape in products.shapes if shape[1] == 30] == again
    first = torch.autograd.grad(logps.sum(), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(grads, first))

def test_the_gradient_of_a_bfloat16_head_is_summed_in_float32():
    """Of 512 chunks with one position each: in bfloat16 the sum would stop growing where a term is below its rounding."""
    torch.manual_seed(0)
    hidden, weight = torch.ones(512, 4).bfloat16(), torch.zeros(8, 4).bfloat16().requires_grad_()
    logps = rpo.TokenLogps.apply(hidden, weight, torch.zeros(512, dtype=torch.long), None, 1)
    grad, = torch.autograd.grad(logps.sum(), weight)
    assert grad[0, 0] == 512 * 7 / 8 and grad[1, 0] == -64

def test_softmax_of_bfloat16_logits_is_taken_in_float32():
    module = rpo.PairLogps(make(*CONFIGS["llama"][:2], torch.bfloat16))
    hidden, target = torch.randn(50, 32, dtype=torch.bfloat16), torch.randint(V, (50,))
    logits = module.model.lm_head(hidden)  # bfloat16
    expected = logits.double().log_softmax(-1).gather(-1, target[:, None])[:, 0]
    found = rpo.TokenLogps.apply(hidden, module.model.lm_head.weight, target, None, 7)
    assert found.dtype == torch.float32 and (found - expected).abs().max() < 1e-5  # in bfloat16: 0.03

# Two checks build C++ kernels, which takes about a minute. FlexAttention has no backward on a CPU: no test here covers
# its gradients, only its masks.
slow = pytest.mark.skipif(not os.environ.get("RPO_SLOW_TESTS"), reason="slow: set RPO_SLOW_TESTS=1")

@slow
@pytest.mark.parametrize("name", ["llama", "mistral, window"])
@torch.no_grad()
def test_flex_attention_equals_sdpa(name):
    pairs = some_pairs()
    flex, sdpa = (make(*CONFIGS[name][:2], torch.float32, attn) for attn in ("flex_attention", "sdpa"))
    for shared in (True, False):
        batch = rpo.collate(pairs, 0, shared)
        assert (rpo.PairLogps(flex)(batch) - rpo.PairLogps(sdpa)(batch)).abs().max() < 5e-4

@slow
@pytest.mark.parametrize("name", ["llama", "mistral, window"])
def test_compiled_layers_equal_eager_ones(name):
    model, counters = make(*CONFIGS[name][:2], torch.float32), torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    sets = [some_pairs(3, seed=0), some_pairs(3, 24, 40, seed=1), some_pairs(2, 5, 9, seed=2)]  # three shapes
    before = [ours(model, pairs, True) for pairs in sets]
    for layer in rpo.PairLogps(model).layers:
        layer.compile(dynamic=True)
    for pairs, expected in zip(sets, before):
        assert_close(expected, ours(model, pairs, True), **SINGLE)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
