"""
rpo.py on the models of transformers: which rows they can be given, whether log-probs and gradients
are the model's own, what is refused, the head, precision, recomputation.

    OMP_NUM_THREADS=1 pytest tests/test_models.py -q

Every model is small, random and drawn wide (initializer_range 0.2), so that a wrong mask moves a
log-prob by nats. The yardstick is `plain`: one unpadded row a response through the model's own
forward, the loss written out by hand.
"""
import random

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import rpo

SIDES = ("chosen", "rejected")

# ------------------------------------------------------------------------------------------------
# models

V = 99
SPECIALS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
SIZES = SPECIALS | dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
    initializer_range=0.2)
HEADS = SIZES | dict(head_dim=8)
GPT = SPECIALS | dict(
    vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=1024, initializer_range=0.2)
SHORT = dict(sliding_window=6)
LONG = dict(sliding_window=512)
# one layer of each kind
BOTH = dict(layer_types=["sliding_attention", "full_attention"])
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
QWEN2 = SIZES | dict(use_sliding_window=True, max_window_layers=1)
GEMMA2 = HEADS | dict(query_pre_attn_scalar=8, final_logit_softcapping=None)
GEMMA3 = HEADS | BOTH | dict(query_pre_attn_scalar=8)
CAPPED = dict(final_logit_softcapping=30.0)
LLAMA4 = HEADS | EXPERTS | dict(
    intermediate_size_mlp=48, layer_types=["chunked_attention", "full_attention"],
    no_rope_layers=[1, 0])
STATE = dict(mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=4,
             mamba_chunk_size=16)
MAMBA = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4,
             initializer_range=0.2)
FALCON_H1 = SIZES | STATE | dict(mamba_d_ssm=64)
RECURRENT_GEMMA = SIZES | dict(attention_window_size=8, lru_width=32)

# Models whose rows share a prompt: name, model type, settings. Windows are longer than a row.
SHARED = {
    "llama": ("llama", SIZES),
    "mistral": ("mistral", SIZES | LONG),
    "qwen2": ("qwen2", SIZES),
    "qwen2, long window": ("qwen2", QWEN2 | LONG),
    "qwen3": ("qwen3", HEADS),
    "gemma": ("gemma", HEADS),
    "gemma3, long window": ("gemma3_text", GEMMA3 | LONG),
    "phi": ("phi", SIZES),
    "phi3, long window": ("phi3", SIZES | LONG),
    "gpt2": ("gpt2", GPT),
    "gpt_neox": ("gpt_neox", SIZES),
    "olmo2": ("olmo2", SIZES),
    "olmo3, long window": ("olmo3", SIZES | BOTH | LONG),
    "smollm3": ("smollm3", SIZES | dict(no_rope_layers=[1, 0])),
    "cohere": ("cohere", SIZES | dict(logit_scale=0.5)),
    "cohere2, long window": ("cohere2", SIZES | BOTH | LONG | dict(logit_scale=0.5)),
    "granite": ("granite", SIZES | dict(logits_scaling=0.5)),
    "stablelm": ("stablelm", SIZES),
    "starcoder2, long window": ("starcoder2", SIZES | LONG),
    "falcon": ("falcon", SIZES),
    "opt": ("opt", SIZES | dict(ffn_dim=48, word_embed_proj_dim=32, init_std=0.2)),
    "mixtral, long window": ("mixtral", SIZES | EXPERTS | LONG),
    "llama4, long chunks": ("llama4_text", LLAMA4 | dict(attention_chunk_size=512)),
}

# Models of which each response needs a row of its own, and why.
SEPARATE = {
    # a window or chunk that is shorter than a row: the mask of a shared row knows no window
    "mistral, window": ("mistral", SIZES | SHORT),
    "qwen2, window": ("qwen2", QWEN2 | SHORT),
    "gemma3, window": ("gemma3_text", GEMMA3 | SHORT),
    "phi3, window": ("phi3", SIZES | SHORT),
    "olmo3, window": ("olmo3", SIZES | BOTH | SHORT),
    "cohere2, window": ("cohere2", SIZES | BOTH | SHORT | dict(logit_scale=0.5)),
    "starcoder2, window": ("starcoder2", SIZES | SHORT),
    "mixtral, window": ("mixtral", SIZES | EXPERTS | SHORT),
    "llama4, chunks": ("llama4_text", LLAMA4 | dict(attention_chunk_size=6)),
    # eager attention only, which adds its mask to the scores: True is no mask to it
    "gptj": ("gptj", GPT | dict(rotary_dim=4)),
    "gpt_oss": ("gpt_oss", HEADS | EXPERTS | LONG),
    "gpt_oss, window": ("gpt_oss", HEADS | EXPERTS | SHORT),
    "gemma2, no cap": ("gemma2", GEMMA2 | LONG),
    "gemma2, no cap, window": ("gemma2", GEMMA2 | SHORT),
    # a state that runs along the row
    "mamba": ("mamba", MAMBA),
    "mamba2": ("mamba2", MAMBA | dict(num_heads=8, head_dim=8, n_groups=1, chunk_size=16)),
    "rwkv": ("rwkv", dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, context_length=256)),
    "jamba": ("jamba", SIZES | dict(
        attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=4)),
    "falcon_h1": ("falcon_h1", FALCON_H1),
    "bamba": ("bamba", SIZES | STATE | dict(attn_layer_indices=[1])),
    "granite hybrid": ("granitemoehybrid", SIZES | STATE | dict(
        layer_types=["mamba", "attention"], num_local_experts=2, num_experts_per_tok=1,
        shared_intermediate_size=32)),
    "qwen3_next": ("qwen3_next", HEADS | dict(
        layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)),
    "minimax": ("minimax", SIZES | dict(
        layer_types=["linear_attention", "full_attention"], num_local_experts=2, block_size=8)),
    "lfm2": ("lfm2", SIZES | dict(layer_types=["conv", "full_attention"])),
    # a distance that is counted along the row: ALiBi
    "bloom": ("bloom", dict(
        vocab_size=V, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)),
    "mpt": ("mpt", dict(
        vocab_size=V, d_model=32, n_layers=2, n_heads=4, max_seq_len=1024,
        initializer_range=0.2)),
    "falcon, alibi": ("falcon", SIZES | dict(alibi=True)),
    # masks of the model's own making
    "gpt_neo, local": ("gpt_neo", SIZES | dict(
        num_layers=2, num_heads=4, window_size=6, attention_types=[[["global", "local"], 1]])),
    "gpt1": ("openai-gpt", GPT),
}
MODELS = SHARED | SEPARATE

# Some code computes in float32 at most: experts, recurrences, eager attention with a mask value
# that is -inf in float64, where a row masked as a whole becomes nan. All others are compared in
# float64.
SINGLE = {"gemma2", "mixtral", "llama4_text", "gpt_oss", *(kind for kind, _ in SEPARATE.values())}
SINGLE -= {"mistral", "qwen2", "gemma3_text", "phi3", "olmo3", "cohere2", "starcoder2"}

def make(kind, sizes, dtype=torch.float32, cls=AutoModelForCausalLM):
    """A random model in train mode without dropout, with the attention code of its own choice."""
    config = AutoConfig.for_model(kind, **sizes)
    for name in list(vars(config)):
        if "dropout" in name or name.endswith("pdrop"):
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    model = cls.from_config(config) if cls is AutoModelForCausalLM else cls(config)
    with torch.no_grad():
        for weight in model.parameters():
            # norms start at one, biases at zero: a lost one would not show
            if weight.dim() == 1:
                weight += 0.1 * torch.randn_like(weight)
    return model.train().to(dtype)

def make_named(name):
    kind, sizes = MODELS[name]
    return make(kind, sizes, torch.float32 if kind in SINGLE else torch.float64)

def random_pairs(n=3, low=12, high=24, vocab=V, seed=0):
    """Pairs of random ids, of unequal lengths: there is padding in either layout."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(n):
        lengths = {key: rng.randrange(low, high) for key in ("prompt", *SIDES)}
        pairs.append({key: rng.choices(range(3, vocab), k=m) for key, m in lengths.items()})
    return pairs

def long_pair():
    """What can_share is shown: longer than the short windows, shorter than the long ones."""
    return random_pairs(1, 40, 60)[0]

@pytest.fixture(autouse=True)
def one_thread():
    """Many tiny problems: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

# ------------------------------------------------------------------------------------------------
# the way of rpo.py, and the plain way

BETA, ETA = 0.1, 0.5

def reference(pairs):
    """Reference log-probs (B, 2) of about the right size."""
    lengths = torch.tensor([[len(pair[side]) for side in SIDES] for pair in pairs])
    rates = torch.linspace(-4.0, -3.0, lengths.numel(), dtype=torch.float64)
    return rates.view_as(lengths) * lengths

def gradients(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters()
            if weight.grad is not None}

def ours(model, pairs, shared, sft="sum", dtype=None):
    """Log-probs (B, 2) and {weight: gradient of the summed loss}, by rpo.py."""
    model.zero_grad()
    logps = rpo.PairLogps(model, dtype or model.dtype)(rpo.collate(pairs, shared))
    lengths = torch.tensor([len(pair["chosen"]) for pair in pairs])
    losses, _ = rpo.rpo_loss(logps, reference(pairs), lengths, beta=BETA, eta=ETA, sft=sft)
    losses.sum().backward()
    return logps.detach(), gradients(model)

def plain_logp(model, prompt, response):
    """Log-prob of a response by the model's own logits, softmax in float32 or better."""
    ids = torch.tensor([prompt + response])
    logits = model(ids, use_cache=False).logits[0]  # (T, V)
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    start = len(prompt)
    return sum(logps[t - 1, ids[0, t]] for t in range(start, ids.size(1))).double()

def plain(model, pairs, sft="sum"):
    """The same without padding, and with nothing of rpo.py."""
    model.zero_grad()
    found = []
    for pair, (ref_w, ref_l) in zip(pairs, reference(pairs).tolist()):
        chosen, rejected = (plain_logp(model, pair["prompt"], pair[side]) for side in SIDES)
        h = (chosen - ref_w) - (rejected - ref_l)
        weight = ETA * BETA if sft == "sum" else ETA / len(pair["chosen"])
        (torch.log1p(torch.exp(-BETA * h)) - weight * chosen).backward()
        found.append([chosen.item(), rejected.item()])
    return torch.tensor(found, dtype=torch.float64), gradients(model)

def norm(grads):
    return sum(grad.double().square().sum() for grad in grads.values()).sqrt().item()

def assert_close(found, wanted, atol, rtol):
    """
    Log-probs (nats) to atol, each weight's gradient to rtol of its norm. Gradients that are zero
    but for rounding, such as that of a key's bias, are judged by a thousandth of the norm of all.
    """
    assert torch.isfinite(found[0]).all()
    assert (found[0] - wanted[0]).abs().max() <= atol, (found[0] - wanted[0]).abs().max()
    assert found[1].keys() == wanted[1].keys()
    floor = 1e-3 * norm(wanted[1])
    for name, grad in wanted[1].items():
        off = (found[1][name] - grad).norm().item()
        assert off <= rtol * (grad.norm().item() + floor), (name, off)

def limits(model):
    """
    Log-probs in float64 are as good as exact: norms and rotary tables, which most models compute in
    float32, are the same numbers in either row. Their backward passes sum in float32, too, in
    another order, hence 2e-6 for gradients.
    """
    if model.dtype == torch.float64:
        return dict(atol=1e-10, rtol=2e-6)
    return dict(atol=2e-4, rtol=2e-5)

# ------------------------------------------------------------------------------------------------
# every model that trains

@pytest.mark.parametrize("name", MODELS)
def test_whether_rows_may_share_a_prompt_is_found_out(name):
    """By measuring, in float32, as the trainer does at its start; no list of models is complete."""
    kind, sizes = MODELS[name]
    assert rpo.can_share(make(kind, sizes), long_pair()) is (name in SHARED)

@pytest.mark.parametrize("name", MODELS)
def test_log_probs_and_gradients_are_the_models_own(name):
    """In the rows that the trainer gives it."""
    model, pairs = make_named(name), random_pairs()
    assert_close(ours(model, pairs, name in SHARED), plain(model, pairs), **limits(model))

@pytest.mark.parametrize("name", SHARED)
def test_separate_rows_are_exact_as_well(name):
    """What sharing saves is time: a model that can share loses nothing by separate rows."""
    model, pairs = make_named(name), random_pairs()
    assert_close(ours(model, pairs, False), plain(model, pairs), **limits(model))

@pytest.mark.parametrize("name", SEPARATE)
def test_separate_rows_are_needed(name):
    """On shared rows these models raise, or err by a hundredth of a nat and more."""
    kind, sizes = SEPARATE[name]
    model, pair = make(kind, sizes), long_pair()
    with torch.no_grad():
        wanted = [plain_logp(model, pair["prompt"], pair[side]) for side in SIDES]
        try:
            (found,) = rpo.PairLogps(model)(rpo.collate([pair], True))
        except (RuntimeError, ValueError):
            return
    assert (found - torch.stack(wanted)).abs().max() > 1e-2

@pytest.mark.parametrize("shared", [True, False])
def test_a_prompt_may_be_one_token(shared):
    """Then every response starts with a copy of the first token of the row."""
    model, pairs = make_named("llama"), random_pairs()
    pairs[0]["prompt"], pairs[2]["prompt"] = [1], [7]
    assert_close(ours(model, pairs, shared), plain(model, pairs), **limits(model))

@pytest.mark.parametrize("window, expected", [(60, True), (59, False)])
def test_a_window_is_noticed_from_the_first_token_that_it_cuts(window, expected):
    """Of a row of 61 tokens 60 are read; the last of these looks back on 59 and on itself."""
    pair = {"prompt": random_pairs(1, 30, 31)[0]["prompt"]}
    pair |= {"chosen": [5] * 30 + [2], "rejected": [9] * 8 + [2]}
    model = make("mistral", SIZES | dict(sliding_window=window))
    assert rpo.can_share(model, pair) is expected

# ------------------------------------------------------------------------------------------------
# what is refused

def refusal(model):
    """The sentence in which a model is refused."""
    with pytest.raises(ValueError) as error:
        rpo.can_share(model, long_pair())
    text = str(error.value)
    assert "\n" not in text
    return text

@pytest.mark.parametrize("kind, sizes", [
    ("gemma2", GEMMA2 | LONG | CAPPED),
    ("gemma3_text", GEMMA3 | LONG | CAPPED),
    ("vaultgemma", HEADS | dict(query_pre_attn_scalar=8) | CAPPED),
    ("nanochat", SIZES | dict(final_logit_softcapping=15.0)),
    # its random logits are too small for a cap of 30 to bend them at all
    ("recurrent_gemma", RECURRENT_GEMMA | dict(logits_soft_cap=1.0)),
], ids=["gemma2", "gemma3", "vaultgemma", "nanochat", "recurrent_gemma"])
def test_soft_capped_logits_are_refused_with_the_patch_that_helps(kind, sizes):
    """Caps are those that the models are published with, and bend these logits by little."""
    assert "docs/changes/soft_cap.diff" in refusal(make(kind, sizes))

class HalfLogits(LlamaForCausalLM):
    """A head with a scale of its own, which rpo.py cannot know of."""
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 2
        return output

@pytest.mark.parametrize("kind, sizes, cls", [
    ("llama", SIZES, HalfLogits),
    # it multiplies by the number by which Granite divides
    ("hyperclovax", SIZES | dict(logits_scaling=4.0), AutoModelForCausalLM),
    ("falcon_h1", FALCON_H1 | dict(lm_head_multiplier=0.5), AutoModelForCausalLM),
], ids=["a scale", "hyperclovax", "falcon_h1"])
def test_unknown_scales_of_the_head_are_refused(kind, sizes, cls):
    """The head is applied by rpo.py itself, so it must know all that a model does there."""
    refusal(make(kind, sizes, cls=cls))

def test_noise_in_training_is_refused():
    """Not every noise is a dropout: this router jitters where it trains. No ratio is exact then."""
    sizes = SIZES | EXPERTS | dict(router_jitter_noise=0.3)
    assert rpo.can_share(make("phimoe", sizes | dict(router_jitter_noise=0.0)), long_pair())
    refusal(make("phimoe", sizes))

def test_broken_weights_are_named():
    """One nan is enough; every log-prob is nan then, which no comparison may take for agreement."""
    model = make_named("llama").float()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    assert "nan: broken weights" in refusal(model)

# ------------------------------------------------------------------------------------------------
# small faults in long rows. A model drawn as narrow as most are, at 0.02, hardly attends yet: what
# a fault changes there is less than rounding, and gradients would be needed to see it. Trained
# models attend, and so does one drawn at 0.2.

def leak(inputs, rejected):
    """The rejected response sees one token of the chosen one."""
    inputs["attention_mask"][:, :, rejected, rejected[0] - 5] = True

def look_ahead(inputs, rejected):
    """One token sees the next."""
    inputs["attention_mask"][:, :, rejected[100], rejected[101]] = True

def blindness(inputs, rejected):
    """The rejected response does not see one token of the prompt."""
    inputs["attention_mask"][:, :, rejected, 20] = False

def run_on(inputs, rejected):
    """Positions are those in the row."""
    inputs["position_ids"] = torch.arange(inputs["input_ids"].size(1))[None]

def off_by_one(inputs, rejected):
    """The rejected response begins a position too late."""
    inputs["position_ids"] = inputs["position_ids"].clone()
    inputs["position_ids"][:, rejected] += 1

@pytest.mark.parametrize("fault", [leak, look_ahead, blindness, run_on, off_by_one])
def test_small_faults_in_long_rows_are_noticed(fault):
    """In a row of 900 tokens."""
    model = make("llama", SIZES)
    pair = random_pairs(1, 300, 301)[0]
    rejected = range(600, 901)
    assert rpo.can_share(model, pair) is True

    def hook(module, args, inputs):
        if inputs.get("attention_mask") is not None and inputs["attention_mask"].dim() == 4:
            fault(inputs, rejected)
        return args, inputs

    model.model.register_forward_pre_hook(hook, with_kwargs=True)
    assert rpo.can_share(model, pair) is False

# ------------------------------------------------------------------------------------------------
# the head

HEAD = {
    "untied": ("llama", SIZES | dict(tie_word_embeddings=False)),
    "tied": ("llama", SIZES | dict(tie_word_embeddings=True)),
    "bias": ("phi", SIZES),
    "multiplied": ("cohere", SIZES | dict(logit_scale=3.0)),
    "divided": ("granite", SIZES | dict(logits_scaling=0.2)),
}

@pytest.mark.parametrize("name", HEAD)
def test_the_head_in_chunks_equals_full_logits(name):
    """Value and gradient, over more than two chunks of 512 tokens."""
    kind, sizes = HEAD[name]
    model, pairs = make(kind, sizes, torch.float64), random_pairs(3, 180, 220)
    found, wanted = ours(model, pairs, True, "mean"), plain(model, pairs, "mean")
    assert_close(found, wanted, atol=1e-9, rtol=2e-6)

WORDS = 2**15
WIDE = HEADS | dict(
    vocab_size=WORDS, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=True)

def largest_allocation(work):
    """Bytes of the largest tensor that is born in work(), inside the library's operations, too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    events = trace.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")

@pytest.mark.parametrize("shared", [True, False])
def test_logits_of_all_positions_never_exist(shared):
    """Neither forward nor backward has a tensor of half the size of those of the responses."""
    module = rpo.PairLogps(make("llama", WIDE))
    batch = rpo.collate(random_pairs(2, 600, 601, WORDS), shared)
    responses, everywhere = 4 * 600 * WORDS * 4, batch["input_ids"].numel() * WORDS * 4

    def full_logits():
        with torch.no_grad():
            module.model(batch["input_ids"])

    assert largest_allocation(lambda: module(batch).sum().backward()) < responses / 2
    # the measure sees full logits where there are some
    assert largest_allocation(full_logits) >= everywhere

@pytest.mark.parametrize("pairs, tokens", [(2, 32), (1, 450)], ids=["in chunks", "in one piece"])
def test_few_logits_wait_for_backward(pairs, tokens):
    """
    Beyond 512 scored tokens the forward pass keeps, beside the weights, less than the logits of 32
    of them, below that (here 402) little more than their own.
    """
    module, kept = rpo.PairLogps(make("llama", WIDE)), {}
    batch = rpo.collate(random_pairs(pairs, 200, 201, WORDS))

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(batch)
    for weight in module.parameters():
        kept.pop(weight.untyped_storage().data_ptr(), None)
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) < tokens * WORDS * 4

# ------------------------------------------------------------------------------------------------
# precision

def test_bfloat16_is_close_to_float32():
    """Autocast rounds at 2**-8: log-probs within 1%, the gradient within 5% of its norm."""
    model, pairs = make(*MODELS["llama"]), random_pairs()
    full, half = ours(model, pairs, True), ours(model, pairs, True, dtype=torch.bfloat16)
    assert not torch.equal(full[0], half[0])
    assert ((half[0] - full[0]) / full[0]).abs().max() < 0.01
    difference = {name: grad - half[1][name] for name, grad in full[1].items()}
    assert norm(difference) < 0.05 * norm(full[1])

def test_in_bfloat16_the_two_layouts_agree():
    model, pairs = make(*MODELS["llama"]), random_pairs()
    shared, separate = (ours(model, pairs, rows, dtype=torch.bfloat16)[0] for rows in (True, False))
    assert ((shared - separate) / shared).abs().max() < 0.01

def test_the_head_multiplies_numbers_of_one_dtype(monkeypatch):
    """Which the library asks for on a GPU only: a CPU would let a mixed product pass."""
    seen = []
    head = F.linear_cross_entropy

    def spy(hidden, weight, *args, **kwargs):
        seen.append((hidden.dtype, weight.dtype))
        return head(hidden, weight, *args, **kwargs)

    monkeypatch.setattr(F, "linear_cross_entropy", spy)
    model = make(*MODELS["llama"])
    for dtype in (torch.float32, torch.bfloat16):
        ours(model, random_pairs(), True, dtype=dtype)
    assert seen == [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)]

def test_the_gradient_of_a_bfloat16_head_survives_many_chunks():
    """
    The library adds the chunks of a micro-batch up in bfloat16. Over 4,000 tokens that costs less
    than bfloat16 costs elsewhere; token by token the sum would stop growing and lose half of it.
    """
    model, pairs = make(*MODELS["llama"]), random_pairs(5, 400, 401)
    full, half = (ours(model, pairs, False, dtype=dtype)[1]["lm_head.weight"]
                  for dtype in (torch.float32, torch.bfloat16))
    assert (half - full).norm() < 0.03 * full.norm()

def test_weights_and_their_gradients_stay_float32_in_bfloat16():
    """What AdamW adds to a weight is often below bfloat16's rounding. Log-probs are float64."""
    model = make(*MODELS["llama"])
    logps, grads = ours(model, random_pairs(), True, dtype=torch.bfloat16)
    assert logps.dtype == torch.float64
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert {grad.dtype for grad in grads.values()} == {torch.float32}

# ------------------------------------------------------------------------------------------------
# recomputation

@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mistral, window"])
def test_gradient_checkpointing_changes_nothing(name):
    """Neither a log-prob nor, but for the last bits, a gradient."""
    model, pairs = make_named(name), random_pairs()
    kept = ours(model, pairs, name in SHARED)
    model.activation_checkpointing_enable()
    assert_close(ours(model, pairs, name in SHARED), kept, atol=0, rtol=1e-6)

def test_gradient_checkpointing_recomputes():
    """Each layer runs forward once more, in the backward pass; in eval mode it would not."""
    model, runs = make_named("llama"), []
    layer = model.model.layers[0].self_attn
    layer.register_forward_pre_hook(lambda *args: runs.append(torch.is_grad_enabled()))
    ours(model, random_pairs(), True)
    assert len(runs) == 1
    model.activation_checkpointing_enable()
    ours(model, random_pairs(), True)
    assert len(runs) == 3
