"""
rpo.py beside TRL's DPOTrainer(loss_type=["sigmoid", "sft"]) and beside another version of itself:
time, memory and the effect of each part.

    python tests/bench.py                                  # UltraFeedback-like lengths
    python tests/bench.py --profile all                    # also HH-like and TL;DR-like
    python tests/bench.py --profile hh --steps 2 --model tiny --threads 1
    python tests/bench.py --configs ours --baseline_repo ../before      # before and after a change
    python tests/bench.py --startup                        # pairs tokenized a second
    python tests/bench.py --memory                         # what fits on which GPU, computed

Same model (a random Llama), same pairs (random token ids, lengths drawn from the profile), same
batches in the same order, same AdamW at a constant rate, same clipping, same attention code. Every
configuration runs in a process of its own. The losses of every step are compared and must agree.

Three things are matched to TRL for that. TRL's SFT term is a mean over the chosen tokens of a
micro-batch, so rpo_loss(sft="mean") is given the batch's mean length as the length of every pair.
TRL computes in bfloat16 unless told otherwise, so --dtype rules both. Pairs come in the order
drawn. Reference log-probs computed beforehand are not in the time of a step. TRL is needed here
only (pip install trl); without it our own configurations are measured.

--baseline_repo names a checkout of another version. Its own tests/bench.py drives its rpo.py, so
that a version with other functions can be measured, too. Runs of the two alternate.

Ratios compare the same batch: the median over the timed steps, with the lowest and the highest.
Tokens are those of prompt, chosen and rejected, the prompt counted once. Memory is the peak above
what the process held before the model was built: weights, gradients and moments included. On a
GPU it is the most that tensors took there. On a machine that others use, CPU seconds are what
counts.
"""
import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("chosen", "rejected")

# tokens: the median and the spread of the logarithm; the most that prompt + response may have
PROFILES = {
    "ultrafeedback": dict(prompt=(129, 0.9), chosen=(277, 0.75), rejected=(230, 0.8), most=1024),
    "hh": dict(prompt=(129, 0.8), chosen=(47, 0.9), rejected=(43, 0.9), most=1024),
    "tldr": dict(prompt=(339, 0.35), chosen=(33, 0.35), rejected=(31, 0.35), most=1024),
}

# layers, width, feed-forward width, heads, vocabulary
MODELS = {
    "tiny": (2, 64, 176, 2, 1000),
    "small": (6, 256, 688, 4, 32000),
    "135m": (30, 576, 1536, 9, 49152),
    "1b": (16, 2048, 8192, 32, 128256),
}

# for --memory: transformers' class and the settings of its config
REAL = {
    "0.5B (24 layers x 896)": ("Qwen2", dict(
        num_hidden_layers=24, hidden_size=896, intermediate_size=4864, num_attention_heads=14,
        num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True)),
    "1B (16 x 2048)": ("Llama", dict(
        num_hidden_layers=16, hidden_size=2048, intermediate_size=8192, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True)),
    "7B (32 x 4096)": ("Mistral", dict(
        num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000, tie_word_embeddings=False)),
    "gemma-7b (28 x 3072)": ("Gemma", dict(
        num_hidden_layers=28, hidden_size=3072, intermediate_size=24576, num_attention_heads=16,
        num_key_value_heads=16, head_dim=256, vocab_size=256000, tie_word_embeddings=True)),
}

# name: the line of the table, settings
CONFIGS = {
    "ours": ("ours", {}),
    "before": ("before: that of --baseline_repo", {}),
    "separate": ("  separate rows, no shared prompt", dict(shared=False)),
    "unsorted": ("  one micro-batch, no sorting, no token budget", dict(max_tokens=0)),
    "full_head": ("  logits of all positions, no chunks", dict(full_head=True)),
    "fly": ("  reference on the fly", dict(precompute=False)),
    "checkpointing": ("  gradient checkpointing", dict(checkpointing=True)),
    "trl_head": ("TRL best + its head as on CUDA", dict(trl=True, compact=True)),
    "trl_best": ("TRL best: reference beforehand, no checkpointing", dict(trl=True)),
    "trl_default": ("TRL defaults: reference on the fly, checkpointing",
                    dict(trl=True, precompute=False, checkpointing=True)),
}
USUAL = dict(trl=False, shared=True, full_head=False, precompute=True, checkpointing=False,
             compact=False)
BETA, ETA, LEARNING_RATE, CLIP = 0.1, 0.5, 1e-4, 1.0

# what a worker is told; a checkout of --baseline_repo must know these flags
WORKER_FLAGS = ("model", "pairs", "steps", "max_tokens", "device", "dtype", "threads", "seed")

def parse_options(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    add = parser.add_argument
    add("--profile", default="ultrafeedback", choices=(*PROFILES, "all"),
        help="lengths of the pairs (default: %(default)s)")
    add("--model", default="small", choices=MODELS,
        help="size of the random Llama (default: %(default)s)")
    add("--configs", default=",".join(name for name in CONFIGS if name != "before"),
        help="which to measure, of %(default)s (default: all)")
    add("--baseline_repo", default="",
        help="checkout of another version, measured beside ours")
    add("--pairs", type=int, default=8,
        help="pairs of an optimizer step (default: %(default)s, TRL's own default)")
    add("--steps", type=int, default=4,
        help="timed steps, after one that is not (default: %(default)s)")
    add("--repeats", type=int, default=1, help="times that all is run (default: %(default)s)")
    add("--max_tokens", type=int, default=1024,
        help="rpo.py's token budget of a micro-batch (default: %(default)s)")
    add("--device", default="", help="cpu or cuda (default: cuda if there is one)")
    add("--dtype", default="", choices=("", "float32", "bfloat16"),
        help="bfloat16: autocast (default: float32 on a CPU, bfloat16 on a GPU)")
    add("--threads", type=int, default=0, help="CPU threads (default: one a core)")
    add("--seed", type=int, default=0, help="of weights and pairs (default: %(default)s)")
    add("--peak_tflops", type=float, default=989,
        help="dense bfloat16 peak of the GPU in TFLOP/s, for the MFU "
             "(default: %(default)s, H100 and H200)")
    add("--memory", action="store_true",
        help="only print what weights, gradients, moments and activations take")
    add("--startup", action="store_true", help="only measure how fast pairs are tokenized")
    add("--records", type=int, default=10000,
        help="records that --startup writes and tokenizes (default: %(default)s)")
    add("--tokenizer", default="",
        help="folder of --startup's tokenizer, with a chat template "
             "(default: a BPE of 32,000 tokens trained on the spot)")
    add("--worker", default="", help=argparse.SUPPRESS)
    o = parser.parse_args(argv)
    o.configs = o.configs.split(",")
    unknown = set(o.configs) - set(CONFIGS)
    if unknown:
        parser.error(f"--configs: no {', '.join(sorted(unknown))}; known are {', '.join(CONFIGS)}")
    if o.baseline_repo and "before" not in o.configs:
        o.configs.insert(1, "before")
    if o.baseline_repo and not Path(o.baseline_repo, "tests", "bench.py").is_file():
        parser.error(f"--baseline_repo {o.baseline_repo} has no tests/bench.py")
    if "before" in o.configs and not o.baseline_repo:
        parser.error("--configs before: give --baseline_repo as well")
    return o

def draw_lengths(profile, rng):
    """Tokens of a prompt, a chosen and a rejected response: log-normal, again where too long."""
    shape = PROFILES[profile]
    while True:
        lengths = {}
        for key in ("prompt", *SIDES):
            median, spread = shape[key]
            lengths[key] = max(4, round(float(rng.lognormal(np.log(median), spread))))
        if lengths["prompt"] + max(lengths[side] for side in SIDES) <= shape["most"]:
            return lengths

def draw_pairs(profile, number, vocab, seed):
    """Pairs of random token ids, the same for every version and for TRL."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(number):
        lengths = draw_lengths(profile, rng)
        pairs.append({key: rng.integers(3, vocab, n).tolist() for key, n in lengths.items()})
    return pairs

# ------------------------------------------------------------------------------------------------
# FLOPs and memory on paper

def flops(batch, sizes):
    """
    Model FLOPs of a step over this batch, forward and backward, by layout.

    padded: rows of TRL. head: the same, but logits of responses only. separate: rows without
    padding. shared: rows that share a prompt. A multiplication and an addition are 2 FLOPs, the
    backward pass is twice the forward pass. With W weights in the layers' matrices, D the width,
    L layers and V words the forward pass takes
        2 W a token + 4 L D a (query, key) pair that the causal mask admits + 2 D V a scored token
    """
    L, D, H, _, V = sizes
    W = L * (4 * D * D + 3 * D * H)

    def cost(tokens, seen, scored):
        return 3 * (2 * W * tokens + 4 * L * D * seen + 2 * D * V * scored)

    def triangle(n):
        return n * (n + 1) // 2

    total = dict.fromkeys(("padded", "head", "separate", "shared"), 0)
    longest = max(len(pair["prompt"]) + len(pair[side]) for pair in batch for side in SIDES)
    for pair in batch:
        P = len(pair["prompt"])
        answers = [len(pair[side]) for side in SIDES]
        seen = triangle(P) + sum(P * n + triangle(n) for n in answers)
        total["padded"] += 2 * cost(longest, triangle(longest), longest)
        total["head"] += 2 * cost(longest, triangle(longest), 0) + cost(0, 0, sum(answers))
        total["separate"] += sum(cost(P + n, triangle(P + n), n) for n in answers)
        total["shared"] += cost(P + sum(answers), seen, sum(answers))
    return total

def kept_bytes(module):
    """Bytes a token that the backward pass of one shared row keeps, the module's weights aside."""
    import rpo
    import torch
    own = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
    kept = {}

    def pack(tensor):
        # held, lest another tensor be given its address
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def unpack(tensor):
        return tensor

    pair = {"prompt": [3] * 130, "chosen": [3] * 280, "rejected": [3] * 280}
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        module(rpo.collate([pair]))
    sizes = [tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in own]
    return sum(sizes) / 690

def activation_bytes(build):
    """Bytes a token that one decoder layer keeps for backward: a second layer's share."""
    import rpo
    import torch
    one = rpo.PairLogps(build(num_hidden_layers=1, vocab_size=100), torch.bfloat16)
    two = rpo.PairLogps(build(num_hidden_layers=2, vocab_size=100), torch.bfloat16)
    weights = [sum(p.numel() for p in module.parameters()) for module in (one, two)]
    # autocast's bfloat16 copies of the weights are kept, too, and have a column of their own
    copies = 2 * (weights[1] - weights[0]) / 690
    return kept_bytes(two) - kept_bytes(one) - copies

def memory_table(tokens=8192):
    """What fits where in bfloat16, GiB of a GPU, in Markdown: all computed, nothing measured."""
    sys.path.insert(0, str(ROOT))
    import torch
    import transformers
    columns = ("model", "parameters", "weights, gradients, AdamW", "the same, FSDP on 8",
               "bfloat16 copies", "head", "activations, plain",
               "activations, `--gradient_checkpointing`", "bytes / token, layer, width")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name, (kind, sizes) in REAL.items():
        def build(**some):
            config = getattr(transformers, kind + "Config")(**sizes | some)
            return getattr(transformers, kind + "ForCausalLM")(config)

        with torch.device("meta"):
            parameters = sum(weight.numel() for weight in build().parameters())
        L, D, V = (sizes[key] for key in ("num_hidden_layers", "hidden_size", "vocab_size"))
        each = activation_bytes(build)
        # the gradient of the head's weight in bfloat16 and as float32, and the logits of one chunk
        # in either
        head = 6 * D * V + 6 * 256 * V
        numbers = (
            16 * parameters,
            16 * parameters / 8,
            2 * parameters,
            head,
            tokens * L * each,
            tokens * (4 * L * D + each),
        )
        cells = [f"{number / 2**30:.1f}" for number in numbers]
        print(f"| {name} | {parameters / 1e9:.2f}e9 | {' | '.join(cells)} | {each / D:.0f} |")

# ------------------------------------------------------------------------------------------------
# one configuration, in a process of its own

def peak():
    """The most bytes that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

def held():
    """Bytes that this process holds now."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return peak()
    return int(pages) * os.sysconf("SC_PAGE_SIZE")

class Clock:
    """Wall and CPU seconds between ticks."""
    def __init__(self, device):
        self.device, self.rows, self.last = device, [], None

    def tick(self):
        import torch
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter(), time.process_time()
        if self.last:
            self.rows.append([now[0] - self.last[0], now[1] - self.last[1]])
        self.last = now

def worker(o, profile, name):
    """Trains 1 + o.steps steps; prints seconds and loss of each and the peak memory, as JSON."""
    sys.path.insert(0, str(ROOT))
    import torch
    how = USUAL | {"max_tokens": o.max_tokens} | CONFIGS[name][1]
    train = train_ours
    if how["trl"]:
        # what is imported is no memory of the run
        import datasets  # noqa: F401
        import trl  # noqa: F401
        train = train_trl
    import rpo  # noqa: F401
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.set_num_threads(o.threads or os.cpu_count())
    L, D, H, heads, V = MODELS[o.model]
    pairs = draw_pairs(profile, o.pairs * (1 + o.steps), V, o.seed)
    start = held()

    def build():
        torch.manual_seed(o.seed)
        config = LlamaConfig(
            vocab_size=V, hidden_size=D, intermediate_size=H, num_hidden_layers=L,
            num_attention_heads=heads, max_position_embeddings=2048, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, attn_implementation="sdpa")
        return LlamaForCausalLM(config).to(o.device)

    clock, losses = Clock(o.device), []
    train(o, how, build, pairs, clock, losses)
    memory = peak() - start
    gpu = ""
    if o.device == "cuda":
        memory, gpu = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
    result = {"rows": clock.rows[1:], "losses": losses, "memory": memory, "gpu": gpu}
    print("RESULT " + json.dumps(result))

def full_head_logps(module, batch):
    """What PairLogps computes on shared rows, picked from logits of all positions."""
    import torch
    ids, branch = batch["input_ids"], batch["branch"]  # (R, T) each
    query, key = branch[:, :, None], branch[:, None, :]
    mask = ((key == 0) | (key == query)).tril()[:, None]  # (R, 1, T, T)
    half = module.dtype == torch.bfloat16
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=half):
        logits = module.model(ids, attention_mask=mask, position_ids=batch["position_ids"],
                              use_cache=False).logits  # (R, T, V)
    scored = (branch[:, 1:] > 0) & (branch[:, 1:] == branch[:, :-1])  # (R, T - 1)
    row, column = scored.nonzero(as_tuple=True)  # (N,) each
    logps = logits.float().log_softmax(-1)[row, column, ids[row, column + 1]]  # (N,)
    sums = torch.zeros(branch.max() + 1, dtype=torch.float64, device=ids.device)
    return sums.index_add(0, branch[row, column], logps.double())[1:].view(-1, 2)

def train_ours(o, how, build, pairs, clock, losses):
    import rpo
    import torch
    dtype, shared = getattr(torch, o.dtype), how["shared"]
    policy = rpo.PairLogps(build(), dtype)
    if how["precompute"]:
        ref_logps = rpo.score(policy, pairs, o.max_tokens, shared)  # (N, 2)
    else:
        reference = rpo.PairLogps(build().requires_grad_(False), dtype)
    if how["checkpointing"]:
        policy.model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    clock.tick()
    for start in range(0, len(pairs), o.pairs):
        batch, loss = pairs[start : start + o.pairs], 0.0
        mean_length = sum(len(pair["chosen"]) for pair in batch) / len(batch)
        micro = [(list(range(len(batch))), 1.0)]
        if how["max_tokens"]:
            micro = rpo.micro_batches(batch, how["max_tokens"], shared)
        for indices, _ in micro:
            inputs = rpo.collate([batch[i] for i in indices], shared, o.device)
            with torch.no_grad():
                if how["precompute"]:
                    ref = ref_logps[[start + i for i in indices]]
                else:
                    ref = reference(inputs)
            logps = full_head_logps(policy, inputs) if how["full_head"] else policy(inputs)
            each, _ = rpo.rpo_loss(logps, ref, mean_length, beta=BETA, eta=ETA, sft="mean")
            (each.sum() / len(batch)).backward()
            loss += each.detach().sum() / len(batch)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        clock.tick()

def word_tokenizer():
    """TRL wants a tokenizer, but the pairs are ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, "<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")

def train_trl(o, how, build, pairs, clock, losses):
    import datasets
    import trl
    import trl.trainer.utils
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback

    def yes(device):
        return True

    # on CUDA TRL scores response positions only, on a CPU all; its kernels stay those of the CPU
    if how["compact"]:
        trl.trainer.utils._use_triton = yes

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset  # token ids as they are

        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)  # pairs in the order drawn

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.detach().item())
            return loss

    class Ticks(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            clock.tick()

        def on_step_end(self, *args, **kwargs):
            clock.tick()

    rows = [{f"{key}_ids": ids for key, ids in pair.items()} for pair in pairs]
    reference = None if how["precompute"] else build()
    with tempfile.TemporaryDirectory() as folder:
        config = trl.DPOConfig(
            output_dir=folder, loss_type=["sigmoid", "sft"], loss_weights=[1.0, ETA], beta=BETA,
            max_length=None, per_device_train_batch_size=o.pairs, gradient_accumulation_steps=1,
            max_steps=1 + o.steps, learning_rate=LEARNING_RATE, lr_scheduler_type="constant",
            warmup_steps=0, max_grad_norm=CLIP, precompute_ref_log_probs=how["precompute"],
            gradient_checkpointing=how["checkpointing"], bf16=o.dtype == "bfloat16",
            use_cpu=o.device == "cpu", report_to="none", save_strategy="no", disable_tqdm=True,
            seed=o.seed)
        Trainer(
            model=build(), ref_model=reference, args=config,
            train_dataset=datasets.Dataset.from_list(rows), processing_class=word_tokenizer(),
            callbacks=[Ticks()]).train()

# ------------------------------------------------------------------------------------------------
# the start of a run: pairs tokenized a second

TEMPLATE = ("{% for turn in messages %}<|{{ turn['role'] }}|>\n{{ turn['content'] }}</s>\n"
            "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}")

def draw_lexicon(rng, words=50000):
    """Words of two to five syllables, without meaning."""
    consonants, vowels = list("bcdfghjklmnprstvwz"), list("aeiou")
    lexicon = []
    for _ in range(words):
        count = rng.integers(2, 6)
        syllables = zip(rng.choice(consonants, count), rng.choice(vowels, count))
        lexicon.append("".join(first + second for first, second in syllables))
    return lexicon

def draw_text(rng, lexicon, words):
    """Sentences of twelve words, drawn by Zipf's law as in a real text."""
    ranks = np.minimum(rng.zipf(1.2, words), len(lexicon)) - 1
    drawn = [lexicon[rank] for rank in ranks]
    return "\n".join(" ".join(drawn[i : i + 12]) + "." for i in range(0, words, 12))

def train_tokenizer(rng, lexicon, folder):
    """A byte-level BPE as large as that of a real model, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    specials = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=32000, special_tokens=specials, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    # every word of the lexicon once, so that there are pairs enough for 32,000 tokens
    texts = [draw_text(rng, lexicon, 200000), "\n".join(lexicon)]
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>",
        extra_special_tokens=specials[2:])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)

def write_records(rng, lexicon, path, number):
    """Chat records of UltraFeedback-like lengths: 1.4 tokens a word, roughly."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(number):
            record = {}
            for key, tokens in draw_lengths("ultrafeedback", rng).items():
                text = draw_text(rng, lexicon, max(2, round(tokens / 1.4)))
                record[key] = [{"role": roles[key], "content": text}]
            file.write(json.dumps(record) + "\n")

def cpu_seconds():
    """CPU seconds of this process and of those that it has started and awaited."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    others = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime

def startup_worker(how, folder, tokenizer_path):
    """Tokenizes the records once; prints seconds and a digest of the pairs, as JSON."""
    sys.path.insert(0, str(ROOT))
    import rpo
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    path = Path(folder, "train.jsonl")
    wall, cpu = time.perf_counter(), cpu_seconds()
    if how == "loop":
        pairs = []
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                pairs.append(rpo.tokenize_pair(json.loads(line), tokenizer, 1024, 512))
        pairs = [pair for pair in pairs if isinstance(pair, dict)]
    else:
        pairs = rpo.load_pairs(path, tokenizer, 1024, 512)
    seconds = time.perf_counter() - wall, cpu_seconds() - cpu
    lengths = {key: statistics.median(len(pair[key]) for pair in pairs) for key in pairs[0]}
    result = {
        "seconds": seconds,
        "pairs": len(pairs),
        "digest": hashlib.sha256(json.dumps(pairs).encode()).hexdigest(),
        "lengths": lengths,
        "vocabulary": len(tokenizer),
    }
    print("RESULT " + json.dumps(result))

def startup(o):
    """Pairs a second: one process in a loop, load_pairs, and load_pairs when it is run again."""
    rng = np.random.default_rng(o.seed)
    lexicon = draw_lexicon(rng)
    lines = {
        "loop": "one process, tokenize_pair in a loop",
        "first": "load_pairs",
        "second": "load_pairs, second start",
    }
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = o.tokenizer or f"{folder}/tokenizer"
        if not o.tokenizer:
            train_tokenizer(rng, lexicon, tokenizer)
        write_records(rng, lexicon, f"{folder}/train.jsonl", o.records)
        for how in lines:
            flags = ["--worker", f"startup:{how}:{folder}:{tokenizer}"]
            results[how] = call_worker(ROOT, flags, f"{folder}/cache", o.threads)
    loop = results["loop"]
    print(f"{o.records} chat records, {loop['pairs']} pairs of median lengths {loop['lengths']}, "
          f"{loop['vocabulary']} tokens in the vocabulary, {os.cpu_count()} cores")
    print(f"{'':40s} {'seconds':>8s} {'CPU s':>7s} {'pairs/s':>9s} {'x':>6s}")
    for how, text in lines.items():
        wall, cpu = results[how]["seconds"]
        rate = o.records / wall
        factor = loop["seconds"][0] / wall
        print(f"{text:40s} {wall:8.2f} {cpu:7.2f} {rate:9.0f} {factor:6.2f}")
    if len({result["digest"] for result in results.values()}) > 1:
        sys.exit("error: the three did not give the same pairs")

# ------------------------------------------------------------------------------------------------
# all configurations, and the table

def call_worker(root, flags, cache, threads):
    """Runs a worker of root's tests/bench.py in a process of its own -> its RESULT."""
    env = os.environ | {
        "HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1",
        "OMP_NUM_THREADS": str(threads or os.cpu_count())}
    command = [sys.executable, str(Path(root, "tests", "bench.py")), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"error: {' '.join(command)} ended with exit code {done.returncode}:\n"
                 f"{done.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))

def run(o, profile, name):
    root, config = ROOT, name
    if name == "before":
        root, config = Path(o.baseline_repo).resolve(), "ours"
    flags = [f"--{flag}={getattr(o, flag)}" for flag in WORKER_FLAGS]
    # TRL caches reference log-probs: those of an earlier run must not be found
    with tempfile.TemporaryDirectory() as cache:
        return call_worker(root, [*flags, "--worker", f"{profile}:{config}"], cache, o.threads)

def default_device():
    """Asked in another process: on Linux a child's peak starts from its parent's size."""
    code = "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')"
    ask = [sys.executable, "-c", code]
    return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()

def main():
    o = parse_options()
    if o.worker:
        kind, *rest = o.worker.split(":")
        return startup_worker(*rest) if kind == "startup" else worker(o, kind, *rest)
    if o.memory:
        return memory_table()
    if o.startup:
        return startup(o)

    from tqdm import tqdm
    o.device = o.device or default_device()
    o.dtype = o.dtype or ("bfloat16" if o.device == "cuda" else "float32")
    has_trl = importlib.util.find_spec("trl") is not None
    names = [name for name in o.configs if has_trl or not CONFIGS[name][1].get("trl")]
    profiles = list(PROFILES) if o.profile == "all" else [o.profile]
    work = [(r, p, n) for r in range(o.repeats) for p in profiles for n in names]
    results, bar = {}, tqdm(work, unit="run")
    for _, profile, name in bar:
        bar.set_postfix_str(f"{profile}, {name}")
        results.setdefault((profile, name), []).append(run(o, profile, name))

    print_head(o, has_trl, next(iter(results.values()))[0]["gpu"])
    for profile in profiles:
        report(o, profile, {name: results[profile, name] for name in names})

def cpu_name():
    with contextlib.suppress(OSError):
        for line in open("/proc/cpuinfo"):
            if line.lower().startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()

def print_head(o, has_trl, gpu):
    """What was measured, on what."""
    version = importlib.metadata.version
    machine = gpu or f"{cpu_name()}, {o.threads or os.cpu_count()} threads"
    trl = f"TRL {version('trl')}" if has_trl else "no TRL (pip install trl): ours only"
    L, D, _, _, V = MODELS[o.model]
    print(f"\n$ python tests/bench.py {' '.join(sys.argv[1:])}")
    print(f"{time.strftime('%Y-%m-%d')}, {machine}, {o.dtype}; torch {version('torch')}, "
          f"transformers {version('transformers')}, {trl}")
    print(f"Llama of {L} layers x {D}, {V} words, random weights; {o.pairs} pairs a step, "
          f"{o.steps} timed steps x {o.repeats}, --max_tokens {o.max_tokens}")

def spread(values):
    return f"{statistics.median(values):6.3f} ({min(values):.2f}-{max(values):.2f})"

def report(o, profile, found):
    """The table of one profile. found: {configuration: its results, one a repeat}."""
    pairs = draw_pairs(profile, o.pairs * (1 + o.steps), MODELS[o.model][4], o.seed)
    # the first step is not timed
    batches = [pairs[i : i + o.pairs] for i in range(o.pairs, len(pairs), o.pairs)]
    medians = {key: int(np.median([len(pair[key]) for pair in pairs])) for key in pairs[0]}
    print(f"\n{profile}: median tokens " + ", ".join(f"{key} {n}" for key, n in medians.items()))
    seconds = {name: [row for r in runs for row in r["rows"]] for name, runs in found.items()}
    memory = {name: statistics.median(r["memory"] for r in runs) for name, runs in found.items()}
    print_table(o, batches, seconds, memory)
    print_memory(o, memory)
    print_flops(o, batches, seconds)
    check_losses(o, found)

def print_table(o, batches, seconds, memory):
    # no token counts twice: the prompt stands once in a pair
    tokens = o.repeats * sum(len(ids) for batch in batches for pair in batch
                             for ids in pair.values())
    pairs = o.repeats * o.pairs * len(batches)
    print(f"{'':50s} {'s a step':>8s} {'CPU s':>7s} {'x time (low-high)':>20s} "
          f"{'x CPU (low-high)':>20s} {'tokens/s':>9s} {'pairs/s':>8s} {'GB':>6s} {'x GB':>6s}")
    base = next(iter(seconds))  # ours, unless it was left out
    for name, rows in seconds.items():
        wall, cpu = zip(*rows)
        ratios = [spread([a / b for a, b in zip(column, other)])
                  for column, other in zip((wall, cpu), zip(*seconds[base]))]
        print(f"{CONFIGS[name][0]:50s} {statistics.median(wall):8.3f} "
              f"{statistics.median(cpu):7.3f} {ratios[0]:>20s} {ratios[1]:>20s} "
              f"{tokens / sum(wall):9.0f} {pairs / sum(wall):8.2f} {memory[name] / 1e9:6.2f} "
              f"{memory[name] / memory[base]:6.2f}")
    if "before" in seconds and "ours" in seconds:
        # the same step on either side, and the sum over all steps
        after, before = ([row[1] for row in seconds[name]] for name in ("ours", "before"))
        each = spread([a / b for a, b in zip(after, before)])
        print(f"ours over before: CPU seconds a step {each}, of all steps "
              f"{sum(after) / sum(before):.3f}; memory {memory['ours'] / memory['before']:.3f}")

def print_memory(o, memory):
    """What no loop can save, and how the rest compares."""
    L, D, H, _, V = MODELS[o.model]
    fixed = 16 * (2 * V * D + L * (4 * D * D + 3 * D * H + 2 * D) + D)  # bytes
    base = next(iter(memory.values()))
    rest = [f"{name} {(all_ - fixed) / (base - fixed):.1f}x" for name, all_ in memory.items()]
    print(f"weights, gradients and AdamW's moments: {fixed / 1e9:.2f} GB of each; the rest: "
          + ", ".join(rest))

def print_flops(o, batches, seconds):
    work = [flops(batch, MODELS[o.model]) for batch in batches] * o.repeats
    pairs = o.pairs * len(work)
    giga = {key: sum(step[key] for step in work) / pairs / 1e9 for key in work[0]}
    print("model GFLOP a pair, forward and backward, on a shared prompt: "
          f"{giga['shared']:.1f}; at equal FLOP/s")
    layouts = {
        "padded": "TRL's padded rows, logits of all positions",
        "head": "TRL's padded rows, logits of the responses only",
        "separate": "separate rows without padding, logits of the responses only",
    }
    for key, text in layouts.items():
        print(f"  {giga[key] / giga['shared']:.2f}x, {giga[key]:.1f} GFLOP: {text}")

    total = sum(step["shared"] for step in work) / 1e12
    rates = {name: total / sum(row[0] for row in rows) for name, rows in seconds.items()}
    if o.device == "cuda":
        label = f"MFU, those of the shared prompt over {o.peak_tflops:g} TFLOP/s: "
        cells = [f"{name} {rate / o.peak_tflops:.1%}" for name, rate in rates.items()]
    else:
        label = "TFLOP/s, those of the shared prompt: "
        cells = [f"{name} {rate:.3f}" for name, rate in rates.items()]
    print(label + ", ".join(cells))

def check_losses(o, found):
    """All configurations must have trained the same model on the same pairs."""
    limit = 1e-4 if o.dtype == "float32" else 2e-2
    losses = {name: np.array([r["losses"] for r in runs]) for name, runs in found.items()}
    base, expected = next((name, rows[0]) for name, rows in losses.items())  # (steps,)
    off = {name: float(np.max(np.abs(rows / expected - 1))) for name, rows in losses.items()}
    print(f"loss of each step, {base}: " + " ".join(f"{loss:.5f}" for loss in expected))
    print("largest relative difference from it: "
          + ", ".join(f"{name} {value:.0e}" for name, value in off.items()))
    if not max(off.values()) < limit:  # nan fails, too
        sys.exit(f"error: the losses differ by {max(off.values()):.1e}, more than {limit:g}: "
                 "not the same runs")

if __name__ == "__main__":
    main()
