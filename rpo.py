"""
RPO: Regularized Preference Optimization (Liu et al., NeurIPS 2024, arXiv 2405.16436), the whole trainer in one file.

    python prepare_data.py && torchrun rpo.py                            # RPO in a toy world, a minute on a laptop
    torchrun rpo.py --eta 0 --out_dir out/toy-dpo                        # DPO; --beta 0 --sft mean --eta 1 is SFT
    torchrun --nproc_per_node 8 rpo.py --recipe zephyr-beta              # the paper's run on eight GPUs

From DPO to RPO it is one term. With h = (log pi(y_w|x) - log ref(y_w|x)) - (log pi(y_l|x) - log ref(y_l|x)), y_w the
chosen and y_l the rejected response, log-probs summed over a response's tokens, end-of-turn token included, the loss is
    --sft sum    -log sigmoid(beta h) + eta beta (-log pi(y_w|x))            Algorithm 2 of the paper
    --sft mean   -log sigmoid(beta h) + eta      (-log pi(y_w|x) / |y_w|)    Appendix F
averaged over the pairs of a step, all ranks together (tests/test_theory.py shows where the SFT term comes from).
The way of a pair: tokenize_pair, global_batches, micro_batches, collate, PairLogps, rpo_loss.
"""
import argparse, atexit, collections, gc, hashlib, importlib.util, json, math, os, resource, shutil, sys, time
from pathlib import Path

import numpy as np, torch, torch.distributed as dist, torch.nn.functional as F
from jinja2 import TemplateError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS, causal_mask_function

SIDES = ("chosen", "rejected", "baseline")  # baseline is optional: what SFT imitates in place of the chosen response
METRICS = ("loss loss/dpo loss/sft rewards/chosen rewards/rejected rewards/margins rewards/accuracies logps/chosen "
           "logps/rejected logps/chosen_vs_ref logps/rejected_vs_ref nll_per_token").split()
SHOWN = "loss", "rewards/margins", "rewards/accuracies", "logps/chosen_vs_ref"  # in the terminal
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
say = tqdm.write if RANK == 0 else lambda message: None
PAPER = dict(beta=0.01, eta=0.005, sft="sum", learning_rate=5e-7, lr_scheduler="cosine", warmup_ratio=0.1, epochs=1,
             batch_size=128, max_length=1024, max_prompt_length=512, seed=42, dtype="bfloat16")
GEMMA = PAPER | dict(model="HuggingFaceH4/zephyr-7b-gemma-sft-v0.1", data="data/dpo-mix-7k", beta=0.05, epochs=2)
RECIPES = {"zephyr-beta": PAPER | dict(model="HuggingFaceH4/mistral-7b-sft-beta", data="data/ultrafeedback"),
           "zephyr-gemma": GEMMA, "zephyr-gemma-mean": GEMMA | dict(beta=0.5, eta=0.2, sft="mean", max_prompt_length=0)}

def parse_options(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    def add(name, default, text, **how):
        how |= dict(action=argparse.BooleanOptionalAction) if isinstance(default, bool) else dict(type=type(default))
        parser.add_argument("--" + name, default=default, help=f"{text} (default: {default})", **how)
    add("model", "data/toy/model", "policy at the start: Hugging Face folder or hub name")
    add("ref_model", "", "reference policy: folder or hub name; empty: --model as it is before training")
    add("beta", 0.1, "strength of the pull to the reference; 0 with --sft mean: SFT only")
    add("eta", 0.5, "weight of the SFT term; 0: DPO")
    add("sft", "sum", "SFT term: eta * beta * summed NLL, or eta * mean NLL per token", choices=("sum", "mean"))
    add("batch_size", 16, "pairs per optimizer step, over all ranks")
    add("max_length", 1024, "tokens of prompt + response, pairs beyond are dropped and counted; 0: no limit")
    add("max_prompt_length", 512, "tokens of the prompt, cut from the left; 0: no limit")
    add("epochs", 10, "passes over the pairs; the schedule is planned on them")
    add("learning_rate", 5e-4, "peak learning rate of AdamW; about 5e-7 for a 7B model")
    add("lr_scheduler", "cosine", "after the warm-up", choices=("cosine", "linear", "constant"))
    add("warmup_ratio", 0.1, "share of the planned steps in which the learning rate rises")
    add("weight_decay", 0.0, "of AdamW, on all weights")
    add("grad_clip", 1.0, "largest gradient norm; 0: no clipping")
    add("dtype", "float32", "bfloat16: computed so, weights kept in float32", choices=("float32", "bfloat16"))
    add("seed", 42, "of the order of pairs, the only random draw in training")
    add("data", "data/toy", "folder with train.jsonl and, for evaluation, test.jsonl")  # --resume keeps all above
    add("out_dir", "out/toy-rpo", "folder of this run: metrics.jsonl, step_000100/, final/; with --recipe out/RECIPE")
    add("max_tokens", 8192, "tokens of a micro-batch of one rank, padding included: sets the memory")
    add("max_steps", 0, "stop after this many steps, on the schedule of all epochs; 0: do not stop early")
    add("attn", "sdpa", "attention code", choices=("sdpa", "eager", *["flex_attention"] * torch.cuda.is_available()))
    add("compile", False, "torch.compile of each decoder layer: slow to start, then faster on a GPU")
    add("fsdp", False, "shard weights, gradients and optimizer over the ranks (FSDP2); else each has all (DDP)")
    add("gradient_checkpointing", False, "recompute activations in backward: less memory, more time")
    add("precompute_ref", True, "reference log-probs once, cached in DATA/ref_logps; else keep it in memory")
    add("eval_every", 100, "steps between evaluations on test.jsonl, also done at the start and end; 0: none")
    add("save_every", 0, "steps between checkpoints; 0: final/ only")
    add("resume", False, "continue from the newest complete checkpoint in out_dir, start afresh if none")
    add("tracker", "none", "also log to this tracker, which must be installed", choices=("none", "wandb", "trackio"))
    add("recipe", "", "the paper's settings, which other flags override, see RECIPES", choices=tuple(RECIPES))
    if recipe := parser.parse_args(argv).recipe:
        parser.set_defaults(out_dir=f"out/{recipe}", **RECIPES[recipe])
    o = parser.parse_args(argv)
    for name, value in vars(o).items():
        if isinstance(value, (int, float)) and not value >= (least := name in ("batch_size", "epochs", "max_tokens")):
            fail(f"--{name} {value}: must be {least:d} or more")
    if o.beta == 0 and (o.sft == "sum" or o.eta == 0):
        fail("with --beta 0 this loss is a constant; SFT alone is --beta 0 --sft mean --eta 1")
    if o.tracker != "none" and not importlib.util.find_spec(o.tracker):
        fail(f"--tracker {o.tracker}: pip install {o.tracker} first")
    return o

def fail(message):
    """Bad input ends in one line on stderr and exit code 2."""
    time.sleep(2 * (RANK > 0))  # rank 0 mostly has the same complaint; torchrun then ends this rank before it speaks
    tqdm.write(f"error: {message}", file=sys.stderr)
    sys.exit(2)

def load(auto_class, path, **kwargs):
    try:
        return auto_class.from_pretrained(path, **kwargs)
    except Exception as error:  # a file that is missing, cut short, or of another kind: each fails in its own type
        fail(f"cannot load {path} ({' '.join(str(error).split())[:200]}); python prepare_data.py makes the toy's model")

def load_model(path, attn="sdpa", checkpointing=False):
    """A causal language model with float32 weights and no dropout, which would make the log-ratio a random number."""
    config = load(AutoConfig, path)
    config.update({name: 0.0 for name in vars(config) if "dropout" in name or name.endswith("pdrop")})
    model = load(AutoModelForCausalLM, path, config=config, dtype=torch.float32, attn_implementation=attn)
    if checkpointing:
        model.activation_checkpointing_enable()
    return model

def text_of(prompt, response, tokenizer):
    """The text that generation starts from (response None), or that of both up to and with the end-of-turn token."""
    if isinstance(prompt, str):
        return prompt + (response + (tokenizer.eos_token or fail("the tokenizer has no EOS")) if response else "")
    start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    if response is None:
        return start
    # what the template writes behind the end-of-turn token, often a newline, is not for a model to learn
    text, content = tokenizer.apply_chat_template(prompt + response, tokenize=False), response[-1]["content"].strip()
    end = text.find(content, len(start)) + len(content)
    specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    stops = [(text.find(token, end), len(token)) for token in specials if token in text[end:]]
    return text[:sum(min(stops))] if stops else text[:end] + tokenizer.eos_token

def encode(text, tokenizer, raw):
    """Token ids, a list. A template writes its own special tokens; raw text gets the BOS of the tokenizer, once."""
    ids, bos = tokenizer(text, add_special_tokens=False).input_ids, tokenizer.bos_token_id
    return [bos] + ids if raw and tokenizer("a").input_ids[:1] == [bos] != ids[:1] else ids

def tokenize_pair(record, tokenizer, max_length=0, max_prompt_length=0):
    """A record -> {"prompt": ids, "chosen": ids, "rejected": ids[, "baseline": ids][, "cut": tokens the prompt lost]},
    each response with its one end-of-turn token; or the reason (str) to drop it. Raises on what is no such record."""
    prompt, raw, bos = record["prompt"], isinstance(record["prompt"], str), tokenizer.bos_token_id
    responses = {side: record[side] for side in SIDES if side != "baseline" or record.get(side)}
    if not all((response if raw else response[-1]["content"]).strip() for response in responses.values()):
        return "empty response"
    try:
        start = text_of(prompt, None, tokenizer)
        texts = {side: text_of(prompt, response, tokenizer) for side, response in responses.items()}
    except TemplateError as error:
        return f"chat template: {error}"
    prompt_ids, *ids = (encode(text, tokenizer, raw) for text in (start, *texts.values()))
    # where a token spans the boundary the prompt ends before it, for every side: no text is lost (trl#2054)
    n = next((i for i, column in enumerate(zip(prompt_ids, *ids)) if len(set(column)) > 1), len(prompt_ids))
    answers = {side: some[n:] for side, some in zip(texts, ids)}
    pair = {"prompt": prompt_ids[:n], **answers}
    if 0 < max_prompt_length < n:
        keep = 1 if prompt_ids[0] == bos else 0  # models lean on their first token: BOS stays
        pair.update(prompt=prompt_ids[:keep] + prompt_ids[n - max_prompt_length + keep:n], cut=n - max_prompt_length)
    drop = {"empty prompt": n == 0, "two BOS tokens": bos is not None and prompt_ids[:2] == [bos, bos],
            "prompt rendered differently when alone": not all(text.startswith(start) for text in texts.values()),
            "end-of-turn token inside the response": any(a.count(a[-1]) > 1 for a in answers.values() if a),
            # not cut: a response without its end-of-turn token would teach SFT never to stop
            "longer than max_length": 0 < max_length < len(pair["prompt"]) + max(map(len, answers.values()))}
    return next((reason for reason, holds in drop.items() if holds), pair)

def load_pairs(path, tokenizer, max_length=0, max_prompt_length=0):
    """The pairs of a jsonl file, ids as int32 arrays, and a Counter of those dropped, by reason, and of prompts cut."""
    if not os.path.isfile(path):
        fail(f"no file {path}; python prepare_data.py makes the toy world, python prepare_data.py SOURCE other data")
    pairs, counts = [], collections.Counter()
    for number, line in enumerate(tqdm(open(path, "rb"), f"tokenize {path}", disable=RANK > 0), 1):
        try:
            pair = tokenize_pair(json.loads(line), tokenizer, max_length, max_prompt_length)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            fail(f"{path} line {number} is no pair of prompt, chosen, rejected: {type(error).__name__} {error}")
        counts[f"dropped: {pair}" if isinstance(pair, str) else "prompts cut" if "cut" in pair else "whole"] += 1
        pairs += [{key: np.array(ids, np.int32) for key, ids in pair.items()}] if isinstance(pair, dict) else []
    if not pairs:
        fail(f"{path} has no pair left ({dict(counts) or 'it is empty'})")
    if any("baseline" in pair for pair in pairs):  # then every pair has one: its chosen response where none is given
        pairs = [{"baseline": pair["chosen"], **pair} for pair in pairs]
    return pairs, counts

def show_pair(pair, tokenizer):
    """The pair as text, a bar before each scored token: what the model will be taught, to be looked at once a run."""
    texts = {side: "".join("|" + tokenizer.decode([token]) for token in pair[side]) for side in SIDES if side in pair}
    return "\n".join(f"{key:9s} {text}" for key, text in {"prompt": tokenizer.decode(pair["prompt"]), **texts}.items())

def global_batches(n, batch_size, seed, epoch):
    """The steps of an epoch, lists of pair indices, from (seed, epoch) alone: all ranks draw the same permutation."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed((seed << 20) + epoch)).tolist()
    return [order[i:i + batch_size] for i in range(0, n, batch_size)]  # the last may be smaller, its mean is its own

def micro_batches(batch, lengths, max_tokens, rank=0, world_size=1):
    """This rank's share of a batch, by falling length, in runs whose padded rows fit max_tokens: (indices, weight).
    Ranks deal out runs of neighbours, so all make equally many passes; one left without gets a stand-in of weight 0."""
    batch = sorted(batch, key=lambda i: -lengths[i])  # the longest first: running out of memory shows at once
    while batch:
        rows = max(1, max_tokens // lengths[batch[0]]) * world_size
        run, batch = batch[:rows], batch[rows:]
        yield run[rank::world_size] or run[:1], float(rank < len(run))

def row_length(pair, shared):
    """Tokens that a pair brings to a micro-batch: one row, or as many rows as responses, padded to the longest."""
    prompt, responses = len(pair["prompt"]), [len(pair[side]) for side in SIDES if side in pair]
    return prompt + sum(responses) if shared else len(responses) * (prompt + max(responses))

def collate(pairs, pad_token_id, shared=True):
    """B pairs of K = 2 or 3 responses -> tensors, in R rows of T tokens: a prompt and all responses if shared, or one.
    (R, T): input_ids, attention_mask; position_ids, each response goes on from the prompt; branch, 0 prompt, 1 chosen,
    2 rejected, 3 baseline, -1 padding. (N,), of all response tokens: target; row, place predicting it; pair, side."""
    rows, sides = [], [side for side in SIDES if side in pairs[0]]
    for b, pair in enumerate(pairs):
        for some in [range(len(sides))] if shared else [[k] for k in range(len(sides))]:
            parts = [pair["prompt"], *(pair[sides[k]] for k in some)]
            P, sizes = len(parts[0]), [len(part) for part in parts]
            position = np.concatenate([np.arange(P), *(np.arange(P, P + size) for size in sizes[1:])])
            branch = np.repeat([0, *(k + 1 for k in some)], sizes)
            place = np.where(position == P, P, np.arange(len(position))) - 1  # each first token: at the prompt's end
            rows.append((np.concatenate(parts).astype(int), position, branch, place, np.full(len(position), b)))
    stack = lambda i, fill: torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row[i]) for row in rows], True, fill)
    ids, position, branch, place, pair = map(stack, range(5), (pad_token_id, 0, -1, 0, 0))  # (R, T) each
    at = (branch > 0).nonzero(as_tuple=True)  # (N,) rows, (N,) columns
    batch = dict(input_ids=ids, attention_mask=(branch >= 0).long(), row=at[0], place=place[at], target=ids[at],
                 pair=pair[at], side=branch[at] - 1, logps=torch.zeros(len(pairs), len(sides)))
    return batch | dict(position_ids=position, branch=branch) if shared else batch

SHARED_ROWS = {}  # position_ids and branch (R, T) of the shared rows under way
def share_prompts(build_mask):
    """Wraps a mask builder of transformers: a token sees its prompt and its branch, and within them what the model's
    own rule (causal, sliding window, chunks) says of their positions, never of their places in the row."""
    def build(*args, mask_function=causal_mask_function, **kwargs):
        position, branch = SHARED_ROWS.get("position_ids"), SHARED_ROWS.get("branch")
        def rule(b, head, q, k):
            kin = (branch[b, k] == 0) | (branch[b, k] == branch[b, q])
            return kin & mask_function(b, head, position[b, q], position[b, k])
        shared = dict(mask_function=rule, allow_is_causal_skip=False) if SHARED_ROWS else {}
        return build_mask(*args, **dict(mask_function=mask_function) | kwargs | shared)
    return build
MASKS.update({name: share_prompts(MASKS[name]) for name in ("sdpa", "eager", "flex_attention")})

class TokenLogps(torch.autograd.Function):
    """hidden (N, D), weight (V, D), target (N,) -> log softmax(cap(hidden @ weight.T))[target] (N,), float32. Logits
    are of n positions at a time, all but n computed again in backward: no (R, T, V) exists; one gradient of weight."""
    @staticmethod
    def logits(ctx, i, hidden, weight):  # (n, V) from position i on, computed unless the buffer still holds them
        logits = ctx.buffer[:len(hidden) - i]  # one for all chunks: on a CPU new memory comes page by page, zeroed
        if ctx.held != i:
            torch.mm(hidden[i:i + ctx.n], weight.T, out=logits)
        ctx.held = i
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # near -300 bfloat16 steps by 2 nats
        return ctx.cap * torch.tanh(logits / ctx.cap) if ctx.cap else logits
    @staticmethod
    def forward(ctx, hidden, weight, target, cap, n):
        ctx.save_for_backward(hidden, weight, target)
        ctx.cap, ctx.n, ctx.held, ctx.buffer = cap, n, None, hidden.new_empty(min(n, len(hidden)), len(weight))
        logps = [-F.cross_entropy(TokenLogps.logits(ctx, i, hidden, weight), target[i:i + n], reduction="none")
                 for i in reversed(range(0, len(hidden), n))]  # backward begins with the chunk that is still there
        return torch.cat(logps[::-1])
    @staticmethod
    def backward(ctx, grad):
        hidden, weight, target = ctx.saved_tensors
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=grad.dtype)
        for i in range(0, len(hidden), ctx.n):
            h, y, g = (some[i:i + ctx.n] for some in (hidden, target[:, None], grad[:, None]))
            logits = TokenLogps.logits(ctx, i, hidden, weight)
            d_logits = logits.softmax(-1).mul_(-g).scatter_add_(1, y, g)  # d logp_y / d logits = onehot(y) - p
            d_logits = (d_logits * (1 - (logits / ctx.cap)**2) if ctx.cap else d_logits).to(h.dtype)
            torch.mm(d_logits, weight, out=d_hidden[i:i + ctx.n])
            d_weight = d_weight.addmm_(d_logits.T, h) if h.dtype == grad.dtype else d_weight.add_(d_logits.T @ h)
        return d_hidden, d_weight, None, None, None

class PairLogps(torch.nn.Module):
    """forward(batch) -> (B, K) summed log-probs [chosen, rejected(, baseline)], float32; what DDP and FSDP wrap."""
    def __init__(self, model, dtype=torch.float32):
        super().__init__()
        self.model, self.dtype, self.config = model, dtype, model.config.get_text_config()
        self.layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    def forward(self, batch):
        batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
        with torch.autocast(self.model.device.type, self.dtype, enabled=self.dtype != torch.float32):
            try:
                SHARED_ROWS.update({name: batch[name] for name in ("position_ids", "branch") if name in batch})
                hidden = getattr(self.model, "model", self.model.base_model)(**inputs, use_cache=False)[0]  # (R, T, D)
            finally:
                SHARED_ROWS.clear()
        of, head = lambda name: getattr(self.config, name, None), self.model.get_output_embeddings()
        dtype, weight = hidden.dtype if self.dtype == torch.float32 else self.dtype, head.weight  # (V, D)
        hidden = hidden[batch["row"], batch["place"]] * (of("logit_scale") or 1) / (of("logits_scaling") or 1)  # (N, D)
        if getattr(head, "bias", None) is not None:  # is one more column
            hidden, weight = F.pad(hidden, (0, 1), value=1), torch.cat([weight, head.bias[:, None]], 1)
        n = max(1, 2**(24 if hidden.is_cuda else 23) // len(weight))
        logps = TokenLogps.apply(hidden.to(dtype), weight.to(dtype), batch["target"], of("final_logit_softcapping"), n)
        return logps.new_zeros(batch["logps"].shape).index_put((batch["pair"], batch["side"]), logps, accumulate=True)

def rpo_loss(policy_logps, ref_logps, chosen_lengths, *, beta, eta, sft="sum", baseline_logps=None):
    """The objective of arXiv 2405.16436. policy_logps, ref_logps (B, 2): summed log-probs of [chosen, rejected], nats.
    chosen_lengths (B,): tokens of the response SFT imitates, the chosen one unless baseline_logps (B,) names another.
    Returns losses (B,), whose mean over the global batch is to be minimised, and {key of METRICS: (B,)}, detached."""
    logratios = policy_logps - ref_logps  # (B, 2)
    h = logratios[:, 0] - logratios[:, 1]  # (B,)
    nll = -(policy_logps[:, 0] if baseline_logps is None else baseline_logps)  # (B,)
    dpo_losses = -F.logsigmoid(beta * h)  # Bradley-Terry, with beta log(pi/ref) as the reward
    sft_losses = {"sum": eta * beta * nll, "mean": eta * nll / chosen_lengths}[sft]  # Algorithm 2, Appendix F
    losses, rewards = dpo_losses + sft_losses, beta * logratios
    correct = (h > 0) + 0.5 * (h == 0)  # a tie counts half
    values = (losses, dpo_losses, sft_losses, *rewards.T, rewards[:, 0] - rewards[:, 1], correct, *policy_logps.T,
              *logratios.T, nll / chosen_lengths)
    return losses, {key: value.detach() for key, value in zip(METRICS, values)}

@torch.no_grad()
def score(module, pairs, max_tokens, pad_token_id, shared):
    """The module's log-probs of all pairs (N, K), float32, in their order, on every rank; the ranks share the work."""
    logps = torch.zeros(len(pairs), len(pairs[0].keys() & set(SIDES)), device=next(module.parameters()).device)
    micro = list(micro_batches(range(len(pairs)), [row_length(p, shared) for p in pairs], max_tokens, RANK, WORLD_SIZE))
    for indices, weight in tqdm(micro, "log-probs", leave=False, disable=RANK > 0):
        logps[indices] = weight * module(collate([pairs[i] for i in indices], pad_token_id, shared))
    if WORLD_SIZE > 1:
        dist.all_reduce(logps)
    return logps

def can_share(model, pair):
    """Whether rows may share a prompt: whether they give this pair's log-probs and gradients as separate rows do, which
    is measured, as no list of models is complete. Ends the program where separate rows miss the model's own loss."""
    probes = [p for p in model.parameters() if p.dim() == 1] or [next(model.parameters())]  # some in every layer
    def with_grads(logps):
        grads = torch.autograd.grad(logps[0] - logps[1] / 2, probes, materialize_grads=True)
        return logps.detach(), torch.cat([grad.flatten() for grad in grads])
    def own_logp(side):
        ids = torch.tensor(np.concatenate([pair["prompt"], pair[side]]), device=model.device).long()[None]  # (1, T)
        logps = model(ids, use_cache=False).logits[0, :-1].log_softmax(-1)  # (T - 1, V)
        return logps.gather(1, ids[0, 1:, None])[-len(pair[side]):].sum()
    near = lambda some, others, far: all((a - b).norm() <= far * b.norm() for a, b in zip(some, others))
    own = with_grads(torch.stack([own_logp("chosen"), own_logp("rejected")]))
    one, two = (with_grads(PairLogps(model)(collate([pair], 0, shared))[0, :2]) for shared in (True, False))
    if not near(two, own, 1e-3):
        fail(f"{type(model).__name__} is not supported: its log-probs are {own[0].tolist()}, not {two[0].tolist()}")
    return near(one, two, 2e-5)  # rounding: 3e-6 at most; wrong masks: mostly above 1e-4

def digest(arrays):  # names data and weights by their content
    return hashlib.sha256(b"".join(hashlib.sha256(np.ascontiguousarray(a)).digest() for a in arrays)).hexdigest()[:16]

def shard(module):
    """FSDP2: weights, gradients and moments in float32 shards; each layer gathers its weights, computing in dtype."""
    for part in (*module.layers, module):
        fully_shard(part, mp_policy=MixedPrecisionPolicy(param_dtype=module.dtype, reduce_dtype=torch.float32))
    module.dtype = torch.float32  # no autocast on top
    return module

def learning_rate(step, steps, o):
    """Of step 0, 1, ...: a linear rise, then --lr_scheduler, which reaches 0 at the end of the planned steps."""
    warmup = math.ceil(o.warmup_ratio * steps)
    done = (step - warmup) / max(1, steps - warmup)
    fall = dict(cosine=(1 + math.cos(math.pi * done)) / 2, linear=1 - done, constant=1)[o.lr_scheduler]
    return o.learning_rate * ((step + 1) / warmup if step < warmup else fall)

FULL = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=WORLD_SIZE > 1)  # any sharding
def save_checkpoint(path, policy, tokenizer, optimizer, state):
    """A Hugging Face folder, optimizer.safetensors, trainer_state.json: written aside, flushed, renamed, never half."""
    model = getattr(policy, "module", policy).model
    weights = dcp.get_model_state_dict(model, options=FULL)
    moments = dcp.get_optimizer_state_dict(policy, optimizer, options=FULL)
    if RANK == 0:
        shutil.rmtree(path + ".tmp", ignore_errors=True)
        once = dict((*model.named_parameters(), *model.named_buffers()))  # a tied weight has two names
        model.save_pretrained(path + ".tmp", state_dict={name: weights[name] for name in once if name in weights})
        tokenizer.save_pretrained(path + ".tmp")
        moments = {f"{name}.{key}": tensor for name, of in moments["state"].items() for key, tensor in of.items()}
        save_file(moments, path + ".tmp/optimizer.safetensors")
        Path(path + ".tmp/trainer_state.json").write_text(json.dumps(state, indent=1))
        os.sync()
        if os.path.exists(path):  # the final/ of a shorter run: it stays, under its step's name
            old = json.loads(Path(path, "trainer_state.json").read_text())["step"]
            os.rename(path, Path(path).with_name(f"step_{old:06d}"))
        os.rename(path + ".tmp", path)

def newest_checkpoint(out_dir):
    """(folder, trainer state) of the complete checkpoint, not *.tmp, with the most steps, or (None, None)."""
    found = [(str(p.parent), json.loads(p.read_text())) for p in Path(out_dir).glob("*[!p]/trainer_state.json")]
    return max(found, key=lambda each: each[1]["step"], default=(None, None))

def main():
    o, cuda = parse_options(), torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    torch.cuda.set_device(device) if cuda else None  # FSDP and broadcasts go by the current device
    alone = {} if "RANK" in os.environ else dict(rank=0, world_size=1, store=dist.HashStore())  # without torchrun
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None, **alone)
    metrics_file, (folder, saved) = Path(o.out_dir, "metrics.jsonl"), newest_checkpoint(o.out_dir)
    if not o.resume and (saved or metrics_file.exists()):
        fail(f"{o.out_dir} holds a run: continue it with --resume, or choose another --out_dir")
    tokenizer, known, pairs = load(AutoTokenizer, o.model), load(AutoTokenizer, o.ref_model or o.model).get_vocab(), {}
    if any(known.get(token, i) != i for token, i in tokenizer.get_vocab().items()):
        fail(f"--ref_model {o.ref_model} has another vocabulary than {o.model}: log-ratios would mean nothing")
    for split in ("train", "test") if o.eval_every and os.path.exists(f"{o.data}/test.jsonl") else ("train",):
        pairs[split], counts = load_pairs(f"{o.data}/{split}.jsonl", tokenizer, o.max_length, o.max_prompt_length)
        say(f"{split}: {len(pairs[split])} pairs ({', '.join(f'{n} {what}' for what, n in counts.items())})")
    of = lambda *splits: digest(pair[key] for split in splits for pair in pairs[split] for key in sorted(pair))
    train, longest = pairs["train"], max(pairs["train"], key=lambda pair: row_length(pair, True))
    sft_lengths = lambda some: torch.tensor([len(pair.get("baseline", pair["chosen"])) for pair in some], device=device)
    per_epoch, tokens = -(-len(train) // o.batch_size), sft_lengths(train).double().mean().item()
    steps, factor = o.epochs * per_epoch, o.beta * tokens
    say(show_pair(train[0], tokenizer))  # to be looked at before believing a run
    say(f"{o.batch_size} pairs a step over {WORLD_SIZE} rank(s), {per_epoch} steps an epoch, {steps} steps planned")
    say(f"--sft {o.sft} --eta {o.eta:g} weighs like " + (f"--sft mean --eta {o.eta * factor:.3g}" if o.sft == "sum" else
        f"--sft sum --eta {o.eta / factor if factor else math.inf:.3g}") + f" at {tokens:.1f} tokens a response")
    # the reference's log-probs: once, by the same module and dtype as the policy's; then the reference is freed
    def build(path):  # train(): what is measured here is what is trained, and eval() would turn checkpointing off
        return PairLogps(load_model(path, o.attn, o.gradient_checkpointing), getattr(torch, o.dtype)).to(device).train()
    reference = build(o.ref_model or o.model)
    shared = can_share(reference.model, longest) & (not o.ref_model or can_share(build(o.model).model, longest))
    say("rows: one a pair, its prompt shared" if shared else "rows: one a response, shared prompts are not exact here")
    weights = digest(weight.cpu().numpy() for weight in reference.requires_grad_(False).parameters())
    facts = dict(fingerprint=of("train"), reference=weights)
    for name in [*list(vars(o))[:list(vars(o)).index("data")], *facts] if saved else ():
        if (was := (saved | saved["options"]).get(name, now := (vars(o) | facts)[name])) != now:
            fail(f"--resume: {name} was {was} in {folder}, now it is {now}; restore it, or change --out_dir")
    cache = Path(o.data, "ref_logps", f"{weights}-{of(*pairs)}-{o.dtype}{'-fsdp' * o.fsdp}.safetensors")
    dist.all_reduce(cached := torch.tensor(float(o.precompute_ref and cache.exists()), device=device))
    reference = shard(reference) if o.fsdp else reference
    ref_logps = load_file(cache, device=str(device)) if cached == WORLD_SIZE else {
        split: score(reference, some, o.max_tokens, 0, shared) for split, some in pairs.items()
        if o.precompute_ref or split == "test"}
    if o.precompute_ref and RANK == 0 and cached < WORLD_SIZE:
        cache.parent.mkdir(exist_ok=True)
        save_file(ref_logps, aside := f"{cache}.{os.getpid()}")  # other runs may be at the same
        os.rename(aside, cache)
    reference = None if o.precompute_ref else reference
    gc.collect()  # FSDP's modules refer to themselves
    policy = build(folder or o.model)
    for layer in policy.layers if o.compile else ():
        layer.compile(dynamic=True)
    if o.fsdp or WORLD_SIZE > 1:
        policy = shard(policy) if o.fsdp else DDP(policy, gradient_as_bucket_view=True, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=o.learning_rate, weight_decay=o.weight_decay, fused=True)
    step, rows = (saved["step"], saved["log_history"]) if saved else (0, [])
    if saved:
        moments = dcp.get_optimizer_state_dict(policy, optimizer, options=FULL)
        for key, tensor in load_file(f"{folder}/optimizer.safetensors").items() if RANK == 0 else ():
            name, _, key = key.rpartition(".")
            moments["state"][name][key] = tensor
        dcp.set_optimizer_state_dict(policy, optimizer, moments, options=FULL)
    metrics_file.parent.mkdir(parents=True, exist_ok=True)
    out = open(metrics_file if RANK == 0 else os.devnull, "w")  # steps lost behind a checkpoint will be logged again
    out.writelines(json.dumps(row) + "\n" for row in rows)
    tracker = importlib.import_module(o.tracker) if RANK == 0 and o.tracker != "none" else None
    if tracker:
        tracker.init(project="rpo", name=Path(o.out_dir).name, config=vars(o))
        atexit.register(tracker.finish)
    def log(row):
        rows.append({"step": step, "epoch": step / per_epoch, **row})
        print(json.dumps(rows[-1]), file=out, flush=True)
        if tracker:
            tracker.log(rows[-1], step=step)
    def objective(some, logps, ref):
        return rpo_loss(logps[:, :2], ref[:, :2], sft_lengths(some), beta=o.beta, eta=o.eta, sft=o.sft,
                        baseline_logps=logps[:, 2] if logps.size(1) == 3 else None)
    sync = policy.set_requires_gradient_sync if o.fsdp else lambda on: setattr(policy, "require_backward_grad_sync", on)
    lengths, stop = [row_length(pair, shared) for pair in train], min(steps, o.max_steps or steps)
    bar = tqdm(total=stop, initial=step, unit="step", disable=RANK > 0)
    while True:
        fresh = saved is None or step > saved["step"]  # a resumed checkpoint has its evaluation behind it
        if "test" in pairs and fresh and (step % o.eval_every == 0 or step == stop):
            logps = score(policy, pairs["test"], o.max_tokens, 0, shared)  # (N, K)
            metrics = objective(pairs["test"], logps, ref_logps["test"])[1]
            log({"eval/" + key: value.mean().item() for key, value in metrics.items()})
            say(f"step {step:6d} " + " ".join(f"| {key} {metrics[key].mean():8.3f} " for key in SHOWN))
        if fresh and (step == stop or step and o.save_every and step % o.save_every == 0):
            save_checkpoint(f"{o.out_dir}/" + ("final" if step == stop else f"step_{step:06d}"), policy, tokenizer,
                            optimizer, dict(step=step, options=vars(o), **facts, log_history=rows))
        if step >= stop:
            break
        start, (epoch, n) = time.perf_counter(), divmod(step, per_epoch)
        batch = global_batches(len(train), o.batch_size, o.seed, epoch)[n]
        micro = list(micro_batches(batch, lengths, o.max_tokens, RANK, WORLD_SIZE))
        sums = torch.zeros(len(METRICS) + WORLD_SIZE, device=device, dtype=torch.float64)
        for m, (indices, weight) in enumerate(micro, 1):
            sync(m == len(micro))  # ranks meet in the last pass only; until then FSDP holds whole gradients
            inputs = collate(some := [train[i] for i in indices], 0, shared)
            ref = reference(inputs) if reference else ref_logps["train"][indices]  # (B, K)
            losses, metrics = objective(some, policy(inputs), ref)
            # the mean over the global batch, however it is split: DDP and FSDP divide by the ranks, hence the factor
            (losses.sum() * weight * WORLD_SIZE / len(batch)).backward()
            sums[:len(METRICS)] += weight / len(batch) * torch.stack([metrics[key].sum() for key in METRICS])
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**(30 if sys.platform == "darwin" else 20)
        sums[len(METRICS) + RANK] = torch.cuda.max_memory_allocated(device) / 2**30 if cuda else memory
        dist.all_reduce(sums)
        means, memory = dict(zip(METRICS, sums.tolist())), sums[len(METRICS):].max().item()
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), o.grad_clip or math.inf).item()
        if not math.isfinite((loss := means["loss"]) + grad_norm):
            fail(f"step {step + 1}: loss {loss}, gradient norm {grad_norm}; kept {newest_checkpoint(o.out_dir)[0]}")
        off = means["loss/dpo"] - math.log(2)
        if step == 0 and not o.ref_model and abs(off) > (1e-3 if o.dtype == "float32" else 0.1):
            fail(f"loss/dpo starts {off:+.4f} away from log 2: policy and reference disagree before any training")
        optimizer.param_groups[0]["lr"] = lr = learning_rate(step, steps, o)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        log({"lr": lr, **means, "grad_norm": grad_norm, "tokens_per_second":
             sum(row_length(train[i], True) for i in batch) / (time.perf_counter() - start), "peak_memory_gib": memory})
        bar.set_postfix_str(", ".join(f"{key} {means[key]:.3f}" for key in SHOWN), refresh=False)
        bar.update()
    bar.close()
    ends = [row for row in rows if "eval/loss" in row] or rows or [{}]
    for key in ends[0]:
        say(f"{key:28s}{ends[0][key]:12.4f} at step {ends[0]['step']}{ends[-1][key]:12.4f} at step {ends[-1]['step']}")
    dist.destroy_process_group()

if __name__ == "__main__":
    main()
