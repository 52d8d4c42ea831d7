"""
rpo.py beside TRL's DPOTrainer(loss_type=["sigmoid", "sft"]): time, memory and the effect of each part.

    python tests/bench.py                                # UltraFeedback-like lengths, CPU or the GPU at hand
    python tests/bench.py --profile all                  # also HH-like and TL;DR-like
    python tests/bench.py --profile hh --steps 2 --model tiny --threads 1
    python tests/bench.py --memory                       # no run: what models of 0.5B, 1B and 7B need, computed

Same model (a random Llama), same pairs (random token ids, lengths drawn from the profile), same batches in the same
order, same AdamW at a constant rate, same clipping, same attention code; every configuration in a process of its own.
The losses of every step are compared and must agree. What had to be matched for that: TRL's SFT term is a mean over the
chosen tokens of a micro-batch, here of the whole batch, so rpo_loss(sft="mean") is given the batch's mean length as the
length of every pair; TRL computes in bfloat16 unless told otherwise, so --dtype rules both; pairs come in the order
drawn. Reference log-probs computed beforehand are not in the time of a step. TRL is needed here only (pip install
trl); without it our own configurations are measured.

Ratios compare the same batch: the median over the timed steps, with the lowest and highest. Tokens are those of prompt,
chosen and rejected, the prompt counted once. Memory is the peak above what the process held before the model was built:
weights, gradients and moments included; on a GPU, the most that tensors took there.
"""
import argparse
import contextlib
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

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
# tokens: median of prompt, chosen, rejected and spread of the logarithm; the most that prompt + response may have
PROFILES = {
    "ultrafeedback": dict(prompt=(129, 0.9), chosen=(277, 0.75), rejected=(230, 0.8), most=1024),
    "hh": dict(prompt=(129, 0.8), chosen=(47, 0.9), rejected=(43, 0.9), most=1024),
    "tldr": dict(prompt=(339, 0.35), chosen=(33, 0.35), rejected=(31, 0.35), most=1024),
}
MODELS = {  # layers, width, feed-forward width, heads, vocabulary
    "tiny": (2, 64, 176, 2, 1000),
    "small": (6, 256, 688, 4, 32000),
    "135m": (30, 576, 1536, 9, 49152),
    "1b": (16, 2048, 8192, 32, 128256),
}
REAL = {  # for --memory: kind; layers, width, feed-forward width, heads, key-value heads, vocabulary, tied embeddings
    "0.5B (24 layers x 896)": ("Qwen2", (24, 896, 4864, 14, 2, 151936, True)),
    "1B (16 x 2048)": ("Llama", (16, 2048, 8192, 32, 8, 128256, True)),
    "7B (32 x 4096)": ("Mistral", (32, 4096, 14336, 32, 8, 32000, False)),
}
CONFIGS = {  # name: (line of the table, settings)
    "ours": ("ours", {}),
    "separate": ("  separate rows, no shared prompt", dict(shared=False)),
    "unsorted": ("  one micro-batch, no sorting, no token budget", dict(max_tokens=0)),
    "full_head": ("  logits of all positions, no chunks", dict(full_head=True)),
    "fly": ("  reference on the fly", dict(precompute=False)),
    "checkpointing": ("  gradient checkpointing", dict(checkpointing=True)),
    "trl_head": ("TRL best + its head as on CUDA", dict(trl=True, compact=True)),
    "trl_best": ("TRL best: reference beforehand, no checkpointing", dict(trl=True)),
    "trl_default": ("TRL defaults: reference on the fly, checkpointing", dict(trl=True, precompute=False,
                                                                              checkpointing=True)),
}
BETA, ETA, LEARNING_RATE, CLIP = 0.1, 0.5, 1e-4, 1.0

def parse_options(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--profile", default="ultrafeedback", choices=(*PROFILES, "all"),
        help="lengths of the pairs (default: %(default)s)")
    add("--model", default="small", choices=MODELS, help="size of the random Llama (default: %(default)s)")
    add("--configs", default=",".join(CONFIGS), help="which to measure, of %(default)s (default: all)")
    add("--pairs", type=int, default=8, help="pairs of an optimizer step (default: %(default)s, TRL's own default)")
    add("--steps", type=int, default=4, help="timed steps, after one that is not (default: %(default)s)")
    add("--repeats", type=int, default=1, help="times that all is run (default: %(default)s)")
    add("--max_tokens", type=int, default=1024, help="rpo.py's token budget of a micro-batch (default: %(default)s)")
    add("--device", default="", help="cpu or cuda (default: cuda if there is one)")
    add("--dtype", default="", choices=("", "float32", "bfloat16"), help="bfloat16: autocast (default: float32 on a "
        "CPU, bfloat16 on a GPU)")
    add("--threads", type=int, default=0, help="CPU threads (default: one a core)")
    add("--seed", type=int, default=0, help="of weights and pairs (default: %(default)s)")
    add("--peak_tflops", type=float, default=989, help="dense bfloat16 peak of the GPU in TFLOP/s, for the MFU "
        "(default: %(default)s, H100 and H200)")
    add("--memory", action="store_true", help="only print what weights, gradients, moments and activations take")
    add("--worker", default="", help=argparse.SUPPRESS)
    o = parser.parse_args(argv)
    if unknown := set(o.configs.split(",")) - set(CONFIGS):
        parser.error(f"--configs: no {', '.join(sorted(unknown))}; known are {', '.join(CONFIGS)}")
    return o

def draw_pairs(profile, number, vocab, seed):
    """Pairs of random token ids, int32 arrays; log-normal lengths, drawn again where prompt + response is too long."""
    rng, of, pairs = np.random.default_rng(seed), PROFILES[profile], []
    while len(pairs) < number:
        prompt, chosen, rejected = (max(4, round(float(rng.lognormal(np.log(of[key][0]), of[key][1]))))
                                    for key in ("prompt", "chosen", "rejected"))
        if prompt + max(chosen, rejected) <= of["most"]:
            pairs.append({key: rng.integers(3, vocab, n).astype(np.int32) for key, n in
                          zip(("prompt", "chosen", "rejected"), (prompt, chosen, rejected))})
    return pairs

def flops(batch, sizes):
    """
    Model FLOPs of a step over this batch, forward and backward, by layout ("head": padded rows, logits of responses).
    A multiplication and an addition are 2, the backward pass is twice the forward pass. With W weights in the layers'
    matrices, D the width, L layers, V words:
        2 W a token + 4 L D a (query, key) pair that the causal mask admits + 2 D V a position scored
    """
    L, D, H, _, V = sizes
    W = L * (4 * D * D + 3 * D * H)
    cost = lambda tokens, seen, scored: 3 * (2 * W * tokens + 4 * L * D * seen + 2 * D * V * scored)
    triangle = lambda n: n * (n + 1) // 2
    total = dict.fromkeys(("padded", "head", "separate", "shared"), 0)
    longest = max(len(p["prompt"]) + len(p[side]) for p in batch for side in ("chosen", "rejected"))
    for pair in batch:
        P, *answers = (len(pair[key]) for key in ("prompt", "chosen", "rejected"))
        total["padded"] += 2 * cost(longest, triangle(longest), longest)
        total["head"] += 2 * cost(longest, triangle(longest), 0) + cost(0, 0, sum(answers))
        total["separate"] += sum(cost(P + n, triangle(P + n), n) for n in answers)
        total["shared"] += cost(P + sum(answers), triangle(P) + sum(P * n + triangle(n) for n in answers), sum(answers))
    return total

# ---------------------------------------------------------------------------------------------------------------------
# memory on paper

def kept_bytes(module):
    """Bytes that the backward pass of one shared row keeps apart from the module's own weights, per token."""
    import rpo
    import torch
    own, kept = {p.untyped_storage().data_ptr() for p in module.parameters()}, {}
    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, lest another tensor be given its address
        return tensor
    pair = {key: np.full(n, 3, np.int32) for key, n in (("prompt", 130), ("chosen", 280), ("rejected", 280))}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(rpo.collate([pair], 0))
    return sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in own) / 690

def memory_table(tokens=8192):
    """What fits where in bfloat16, GiB of a GPU, as a table in Markdown: all of it computed, nothing measured."""
    sys.path.insert(0, os.path.join(HERE, ".."))
    import rpo
    import torch
    import transformers
    print("| model | weights, gradients, AdamW | the same, FSDP on 8 | bfloat16 copies | head | activations, plain | "
          "activations, `--gradient_checkpointing` | bytes / token, layer, width |\n" + "|---" * 8 + "|")
    for name, (kind, (L, D, H, heads, groups, V, tied)) in REAL.items():
        def build(layers, vocab):
            return getattr(transformers, kind + "ForCausalLM")(getattr(transformers, kind + "Config")(
                num_hidden_layers=layers, hidden_size=D, intermediate_size=H, num_attention_heads=heads,
                num_key_value_heads=groups, vocab_size=vocab, tie_word_embeddings=tied))
        one, two = (rpo.PairLogps(build(layers, 100), torch.bfloat16) for layers in (1, 2))
        with torch.device("meta"):
            whole = build(L, V)
        sizes = [sum(p.numel() for p in model.parameters()) for model in (one, two, whole)]
        # of one layer; autocast's bfloat16 copies of its weights are kept, too, and have a column of their own
        each = (kept_bytes(two) - kept_bytes(one) - 2 * (sizes[1] - sizes[0]) / 690) / D
        numbers = (16 * sizes[2], 2 * sizes[2], 2 * sizes[2], 6 * D * V, tokens * L * D * each,
                   tokens * D * (4 * L + each))
        print(f"| {name} | " + " | ".join(f"{number / 2**30:.1f}" for number in numbers) + f" | {each:.0f} |")

# ---------------------------------------------------------------------------------------------------------------------
# one configuration, in a process of its own

def held():
    """Bytes that this process holds now."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

class Clock:
    """Wall and CPU seconds between ticks."""
    def __init__(self, device):
        import torch
        self.wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        self.rows, self.last = [], None

    def tick(self):
        self.wait()
        now = (time.perf_counter(), time.process_time())
        if self.last:
            self.rows.append([b - a for a, b in zip(self.last, now)])
        self.last = now

def worker(o, profile, name):
    """Trains 1 + o.steps steps and prints a JSON line: seconds, CPU seconds and loss of each, and the peak memory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    how = dict(trl=False, shared=True, max_tokens=o.max_tokens, full_head=False, precompute=True, checkpointing=False,
               compact=False) | CONFIGS[name][1]
    torch.set_num_threads(o.threads or os.cpu_count())
    L, D, H, heads, V = MODELS[o.model]
    pairs = draw_pairs(profile, o.pairs * (1 + o.steps), V, o.seed)
    if how["trl"]:
        import datasets  # noqa: F401
        import trl  # noqa: F401
    else:
        sys.path.insert(0, os.path.join(HERE, ".."))
        import rpo  # noqa: F401
    start = held()
    def build():
        torch.manual_seed(o.seed)
        config = LlamaConfig(vocab_size=V, hidden_size=D, intermediate_size=H, num_hidden_layers=L, pad_token_id=0,
                             bos_token_id=1, eos_token_id=2, num_attention_heads=heads, max_position_embeddings=2048)
        config._attn_implementation = "sdpa"
        return LlamaForCausalLM(config).to(o.device)
    clock, losses = Clock(o.device), []
    (train_trl if how["trl"] else train_ours)(o, how, build, pairs, clock, losses)
    memory = torch.cuda.max_memory_allocated() if o.device == "cuda" else peak() - start
    gpu = torch.cuda.get_device_name() if o.device == "cuda" else ""
    print("RESULT " + json.dumps(dict(rows=clock.rows[1:], losses=losses, memory=memory, gpu=gpu)))

def train_ours(o, how, build, pairs, clock, losses):
    import rpo
    import torch
    dtype, shared = getattr(torch, o.dtype), how["shared"]
    policy = rpo.PairLogps(build(), dtype)
    if how["full_head"]:
        # the same module but for its head: logits of all positions, then those of the responses are picked
        def forward(batch):
            batch = {key: tensor.to(o.device) for key, tensor in batch.items()}
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
            with torch.autocast(o.device, dtype, enabled=dtype != torch.float32):
                rpo.SHARED_ROWS.update({key: batch[key] for key in ("position_ids", "branch") if key in batch})
                logits = policy.model(**inputs, use_cache=False).logits  # (R, T, V)
                rpo.SHARED_ROWS.clear()
            logps = logits.float().log_softmax(-1)[batch["row"], batch["place"], batch["target"]]  # (N,)
            sums = logps.new_zeros(batch["logps"].shape)  # (B, 2)
            return sums.index_put((batch["pair"], batch["side"]), logps, accumulate=True)
        policy.forward = forward
    lengths = [rpo.row_length(pair, shared) for pair in pairs]
    if how["precompute"]:
        ref_logps = rpo.score(policy, pairs, o.max_tokens, 0, shared)
    else:
        reference = rpo.PairLogps(build().requires_grad_(False), dtype)
    if how["checkpointing"]:
        policy.model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    clock.tick()
    for i in range(0, len(pairs), o.pairs):
        batch, loss = list(range(i, i + o.pairs)), 0.0
        mean_length = sum(len(pairs[j]["chosen"]) for j in batch) / len(batch)
        micro = rpo.micro_batches(batch, lengths, how["max_tokens"]) if how["max_tokens"] else [(batch, 1.0)]
        for indices, _ in micro:
            inputs = rpo.collate([pairs[j] for j in indices], 0, shared)
            with torch.no_grad():
                ref = ref_logps[indices] if how["precompute"] else reference(inputs)
            each, _ = rpo.rpo_loss(policy(inputs), ref, mean_length, beta=BETA, eta=ETA, sft="mean")
            (each.sum() / len(batch)).backward()
            loss += each.detach().sum() / len(batch)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        clock.tick()

def train_trl(o, how, build, pairs, clock, losses):
    import datasets
    import trl
    import trl.trainer.utils
    from tokenizers import Tokenizer, models
    from torch.utils.data import SequentialSampler
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    if how["compact"]:  # on CUDA TRL scores response positions only, on a CPU all; its kernels stay those of the CPU
        trl.trainer.utils._use_triton = lambda device: True

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args):  # token ids as they are
            return dataset
        def _get_train_sampler(self, *args, **kwargs):  # pairs in the order drawn
            return SequentialSampler(self.train_dataset)
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.detach().item())
            return loss

    class Ticks(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            clock.tick()
        def on_step_end(self, *args, **kwargs):
            clock.tick()

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2},
                                                                                    "<pad>")),
                                        pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    rows = [{f"{key}_ids": ids.tolist() for key, ids in pair.items()} for pair in pairs]
    with tempfile.TemporaryDirectory() as folder:
        config = trl.DPOConfig(
            output_dir=folder, loss_type=["sigmoid", "sft"], loss_weights=[1.0, ETA], beta=BETA, max_length=None,
            per_device_train_batch_size=o.pairs, gradient_accumulation_steps=1, max_steps=1 + o.steps,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=CLIP,
            precompute_ref_log_probs=how["precompute"], gradient_checkpointing=how["checkpointing"],
            bf16=o.dtype == "bfloat16", use_cpu=o.device == "cpu", report_to="none", save_strategy="no",
            disable_tqdm=True, seed=o.seed)
        dataset, reference = datasets.Dataset.from_list(rows), None if how["precompute"] else build()
        Trainer(model=build(), ref_model=reference, args=config, train_dataset=dataset, processing_class=tokenizer,
                callbacks=[Ticks()]).train()

# ---------------------------------------------------------------------------------------------------------------------
# all configurations, and the table

def run(o, profile, name):
    command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--device", o.device,
               "--dtype", o.dtype, "--worker", f"{profile}:{name}"]
    with tempfile.TemporaryDirectory() as cache:  # TRL caches reference log-probs: not those of an earlier run
        env = dict(os.environ, HF_DATASETS_CACHE=cache, HF_HUB_OFFLINE="1", TQDM_DISABLE="1",
                   OMP_NUM_THREADS=str(o.threads or os.cpu_count()))
        done = subprocess.run(command, capture_output=True, text=True, env=env)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"error: {name} on {profile} ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1][7:])

def spread(values):
    return f"{statistics.median(values):6.2f} ({min(values):.2f}-{max(values):.2f})"

def main():
    o = parse_options()
    if o.worker:
        return worker(o, *o.worker.split(":"))
    if o.memory:
        return memory_table()
    from tqdm import tqdm
    if not o.device:  # torch is not imported in this process: on Linux a child's peak starts from its parent's size
        ask = [sys.executable, "-c", "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')"]
        o.device = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    o.dtype = o.dtype or ("bfloat16" if o.device == "cuda" else "float32")
    has_trl = importlib.util.find_spec("trl") is not None
    names = [name for name in o.configs.split(",") if has_trl or not CONFIGS[name][1].get("trl")]
    profiles = list(PROFILES) if o.profile == "all" else [o.profile]
    work = [(r, p, n) for r in range(o.repeats) for p in profiles for n in names]
    results, bar = {}, tqdm(work, unit="run")
    for _, profile, name in bar:
        bar.set_postfix_str(f"{profile}, {name}")
        results.setdefault((profile, name), []).append(run(o, profile, name))

    version = lambda package: importlib.metadata.version(package)
    machine = next(iter(results.values()))[0]["gpu"] or f"{cpu_name()}, {o.threads or os.cpu_count()} threads"
    L, D, H, _, V = MODELS[o.model]
    print(f"\n$ python tests/bench.py {' '.join(sys.argv[1:])}\n{time.strftime('%Y-%m-%d')}, {machine}, {o.dtype}; "
          f"torch {version('torch')}, transformers {version('transformers')}, "
          + (f"TRL {version('trl')}" if has_trl else "no TRL (pip install trl): ours only")
          + f"\nLlama of {L} layers x {D}, {V} words, random weights; {o.pairs} pairs a step, {o.steps} timed steps"
          + (f" x {o.repeats}" if o.repeats > 1 else "") + f", --max_tokens {o.max_tokens}")
    for profile in profiles:
        report(o, profile, {name: results[profile, name] for name in names})

def cpu_name():
    with contextlib.suppress(OSError):
        for line in open("/proc/cpuinfo"):
            if line.lower().startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()

def report(o, profile, found):
    pairs = draw_pairs(profile, o.pairs * (1 + o.steps), MODELS[o.model][4], o.seed)
    batches = [pairs[i:i + o.pairs] for i in range(0, len(pairs), o.pairs)][1:]
    medians = {key: int(np.median([len(pair[key]) for pair in pairs])) for key in ("prompt", "chosen", "rejected")}
    tokens = [sum(map(len, (a for pair in b for a in pair.values()))) for b in batches] * o.repeats  # no token twice
    work = [flops(batch, MODELS[o.model]) for batch in batches] * o.repeats
    print(f"\n{profile}: median tokens " + ", ".join(f"{key} {n}" for key, n in medians.items()))
    base = next(iter(found))  # ours, unless it was left out
    wall, cpu = ({name: [row[i] for r in runs for row in r["rows"]] for name, runs in found.items()} for i in (0, 1))
    memory = {name: statistics.median(r["memory"] for r in runs) for name, runs in found.items()}
    print(f"{'':50s} {'s a step':>8s} {'CPU s':>7s} {'x time (low-high)':>20s} {'x CPU':>6s} {'tokens/s':>9s} "
          f"{'pairs/s':>8s} {'GB':>6s} {'x GB':>6s}")
    for name in found:
        ratio = [a / b for a, b in zip(wall[name], wall[base])]
        cpu_ratio = statistics.median(a / b for a, b in zip(cpu[name], cpu[base]))
        seconds = sum(wall[name])
        print(f"{CONFIGS[name][0]:50s} {statistics.median(wall[name]):8.3f} {statistics.median(cpu[name]):7.3f} "
              f"{spread(ratio):>20s} {cpu_ratio:6.2f} {sum(tokens) / seconds:9.0f} "
              f"{o.pairs * len(tokens) / seconds:8.2f} {memory[name] / 1e9:6.2f} {memory[name] / memory[base]:6.2f}")
    L, D, H, _, V = MODELS[o.model]
    fixed = 16 * (2 * V * D + L * (4 * D * D + 3 * D * H + 2 * D) + D)  # bytes
    print(f"weights, gradients and AdamW's moments: {fixed / 1e9:.2f} GB of each; the rest: " + ", ".join(
          f"{name} {(held - fixed) / (memory[base] - fixed):.1f}x" for name, held in memory.items()))
    total = {key: sum(w[key] for w in work) / (o.pairs * len(work)) for key in work[0]}
    giga = {key: flop / 1e9 for key, flop in total.items()}
    print(f"model GFLOP a pair, forward and backward, on a shared prompt: {giga['shared']:.1f}; at equal FLOP/s")
    for key, text in (("padded", "TRL's padded rows, logits of all positions"),
                      ("head", "TRL's padded rows, logits of the responses only"),
                      ("separate", "separate rows without padding, logits of the responses only")):
        print(f"  {giga[key] / giga['shared']:.2f}x, {giga[key]:.1f} GFLOP: {text}")
    rates = {name: sum(w["shared"] for w in work) / sum(wall[name]) / 1e12 for name in found}
    unit = 1 / o.peak_tflops if o.device == "cuda" else 1
    label = "those of the shared prompt"
    print(f"MFU, {label} over {o.peak_tflops:g} TFLOP/s: " if o.device == "cuda" else
          f"TFLOP/s, {label}:",
          ", ".join(f"{name} {rate * unit:{'.1%' if o.device == 'cuda' else '.3f'}}" for name, rate in rates.items()))
    limit = 1e-4 if o.dtype == "float32" else 2e-2
    losses = {name: np.array([r["losses"] for r in runs]) for name, runs in found.items()}  # (repeats, steps)
    off = {name: float(np.max(np.abs(loss / losses[base][:1] - 1))) for name, loss in losses.items()}
    print(f"loss of each step, {base}: " + " ".join(f"{loss:.5f}" for loss in losses[base][0]))
    print("largest relative difference from it: " + ", ".join(f"{name} {value:.0e}" for name, value in off.items()))
    if not max(off.values()) < limit:  # nan fails too
        sys.exit(f"error: the losses differ by {max(off.values()):.1e}, more than {limit:g}: not the same runs")

if __name__ == "__main__":
    main()
