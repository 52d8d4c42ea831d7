"""RPO, Regularized Preference Optimization (Liu et al., NeurIPS 2024, arXiv 2405.16436), in one file.

$ python prepare_data.py && python rpo.py                            # a toy world; --eta 0: DPO
$ torchrun --nproc_per_node 8 rpo.py --model ...                     # on eight GPUs, a rank each

RPO trains a policy pi from pairs: DPO plus SFT on the chosen response y_w, whose probability DPO
lets fall. With a prompt x, a rejected response y_l and a frozen reference ref, a pair's loss is
    --sft sum    -log sigmoid(beta * h) - eta * beta * log pi(y_w|x)      (Algorithm 2)
    --sft mean   -log sigmoid(beta * h) - eta * log pi(y_w|x) / |y_w|     (averaged, no beta)
    where h = log(pi(y_w|x) / ref(y_w|x)) - log(pi(y_l|x) / ref(y_l|x))
One pair's way: 1) tokenize_pair  2) micro_batches  3) collate  4) PairLogps  5) rpo_loss"""
import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, fields
from glob import escape  # load_dataset takes patterns
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from datasets import load_dataset
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers.hf_argparser import HfArg

@dataclass
class TrainOptions:
    _argument_group_name = "what decides the numbers: a resumed run must agree in it"  # for --help
    model: str = HfArg(default="data/toy/model", help="policy at the start: folder or hub name")
    ref_model: str = HfArg(default="", help="reference; empty: --model as it is before training")
    beta: float = HfArg(default=0.1, help="larger: closer to ref; 0, with --sft mean: SFT alone")
    eta: float = HfArg(default=0.5, help="weight of the SFT term; 0: DPO")
    sft: Literal["sum", "mean"] = HfArg(default="sum", help="form of the SFT term, see rpo_loss")
    batch_size: int = HfArg(default=16, help="pairs of an optimizer step, over all ranks")
    max_length: int = HfArg(default=1024, help="tokens, prompt + response; longer pairs are dropped")
    max_prompt_length: int = HfArg(default=512, help="tokens; longer prompts are cut on the left")
    epochs: int = HfArg(default=10, help="passes over the pairs")
    learning_rate: float = HfArg(default=5e-4, help="peak; about 5e-7 for a 7B model")
    warmup_ratio: float = HfArg(default=0.1, help="share of the steps in which the rate rises")
    weight_decay: float = HfArg(default=0.0, help="of AdamW, on all weights")
    grad_clip: float = HfArg(default=1.0, help="largest gradient norm; inf: no clipping")
    dtype: Literal["float32", "bfloat16"] = HfArg(default="float32", help="of computation")
    seed: int = HfArg(default=42, help="of the order of the pairs, the only random draw")

@dataclass
class RunOptions:
    _argument_group_name = "the run: may change when it is resumed"  # for --help
    data: str = HfArg(default="data/toy", help="folder with train.jsonl and perhaps test.jsonl")
    out_dir: str = HfArg(default="out/toy-rpo", help="for metrics.jsonl and checkpoints")
    max_tokens: int = HfArg(default=8192, help="tokens of a rank's micro-batch: sets the memory")
    max_steps: int = HfArg(default=0, help="stop after this step of the full schedule; 0: run all")
    eval_every: int = HfArg(default=100, help="steps between evaluations; 0: none")
    save_every: int = HfArg(default=0, help="steps between checkpoints; 0: the last only")
    resume: bool = HfArg(default=False, help="continue from the newest checkpoint in --out_dir")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory, more time")

def rpo_loss(policy_logps, ref_logps, chosen_lengths, *, beta, eta, sft="sum", baseline_logps=None):
    """5) The loss of each pair (B,), to be averaged over the global batch, and metrics {name: (B,)}.
    policy_logps, ref_logps (B, 2): summed log-probs, in nats, of [chosen, rejected].
    chosen_lengths (B,): tokens of the chosen response. baseline_logps (B,): of another response, for
    SFT to imitate; chosen_lengths are then its tokens; unused here (docs/changes/baseline.diff)."""
    logratios = policy_logps - ref_logps  # (B, 2)
    rewards = beta * logratios  # DPO: the rewards, up to f(x), for which this policy is optimal
    h = logratios[:, 0] - logratios[:, 1]  # (B,)
    dpo_losses = -F.logsigmoid(beta * h)

    # the one term that makes RPO of DPO
    nll = -policy_logps[:, 0] if baseline_logps is None else -baseline_logps  # (B,)
    nll_per_token = nll / chosen_lengths
    if sft == "sum":
        sft_losses = eta * beta * nll  # Algorithm 2
    else:
        sft_losses = eta * nll_per_token  # the averaged form, Appendix G of the camera-ready
    losses = dpo_losses + sft_losses

    metrics = {
        "loss": losses,
        "loss/dpo": dpo_losses,
        "loss/sft": sft_losses,
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/margins": beta * h,
        "rewards/accuracies": (1 + h.sign()) / 2,  # a tie counts half
        "logps/chosen": policy_logps[:, 0],
        "logps/rejected": policy_logps[:, 1],
        "logps/chosen_vs_ref": logratios[:, 0],
        "logps/rejected_vs_ref": logratios[:, 1],
        "nll_per_token": nll_per_token,
    }
    return losses, {name: value.detach() for name, value in metrics.items()}

def print0(message):
    if os.environ.get("RANK", "0") == "0":  # torchrun sets it, plain python does not
        tqdm.write(message)

def render(tokenizer, prompt, response=None):
    """The text of a prompt, ready for a response; or of both, up to the end-of-turn token."""
    if isinstance(prompt, str):  # raw text, for base models
        return prompt if response is None else prompt + response + tokenizer.eos_token
    if response is None:
        return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    # two lists of messages; what the template writes after the end-of-turn token is not learnt
    text = tokenizer.apply_chat_template(prompt + response, tokenize=False).rstrip()
    special = tuple(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
    return text if text.endswith(special) else text + tokenizer.eos_token  # if it writes none

def tokenize_pair(record, tokenizer, max_length=math.inf, max_prompt_length=math.inf):
    """1) A record {"prompt", "chosen", "rejected"}, strings or lists of messages, -> the same keys,
    in this order, with lists of token ids; or the reason to drop the record, a string."""
    texts = {"prompt": render(tokenizer, record["prompt"])}
    for side in ("chosen", "rejected"):
        texts[side] = render(tokenizer, record["prompt"], record[side])
        if not texts[side].startswith(texts["prompt"]):
            return "the template renders the prompt differently when a response follows"
    if texts["chosen"] == texts["rejected"]:
        return "identical responses"

    # chat templates write their own BOS token, raw text gets the tokenizer's
    raw = isinstance(record["prompt"], str)
    ids = {key: tokenizer(text, add_special_tokens=raw).input_ids for key, text in texts.items()}
    # the prompt is what all three begin with; a token merged across its end is the response's
    n = len(os.path.commonprefix(list(ids.values())))  # which takes any lists
    prompt = ids.pop("prompt")[:n]
    if not prompt or prompt[:2] == [tokenizer.bos_token_id] * 2:
        return "empty prompt or two BOS tokens"
    if n > max_prompt_length:  # keep its end, and the BOS token that models lean on
        bos = int(prompt[0] == tokenizer.bos_token_id)
        prompt = prompt[:bos] + prompt[n - (max_prompt_length - bos) :]

    pair = {"prompt": prompt}
    for side in ids:  # chosen, rejected
        pair[side] = response = ids[side][n:]
        if len(response) < 2:  # nothing before its end-of-turn token
            return "empty response"
        if response.count(response[-1]) > 1:
            return "end-of-turn token inside a response"
        # never cut: a response without its end-of-turn token would teach SFT not to stop
        if len(prompt) + len(response) > max_length:
            return "longer than max_length"
    return pair

def load_pairs(path, tokenizer, *limits):
    """The pairs of a JSON-lines file, limits: see tokenize_pair; prints what is dropped and why."""
    def tokenize(line, number, program=Path(__file__).read_text()):  # unused; map's cache hashes it
        try:
            pair = tokenize_pair(json.loads(line), tokenizer, *limits) if line.strip() else "blank line"
        except Exception as error:
            raise ValueError(f"{path} line {number + 1} is no UTF-8 prompt, chosen, rejected: {error!r}")
        return {"pair": json.dumps(pair)}  # a pair or a reason: a column holds one type, here text

    # on this rank's cores; cached until file, flags or program change; \xNN, a bad byte, is no JSON
    lines = load_dataset("text", data_files=escape(path), split="train", encoding_errors="backslashreplace")
    cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    jobs = min(cores, len(lines) // 2000)  # 0: in this process
    rows = lines.map(tokenize, input_columns="text", with_indices=True, num_proc=jobs)
    results = [json.loads(text) for text in rows["pair"]]
    pairs = [result for result in results if isinstance(result, dict)]
    dropped = Counter(result for result in results if isinstance(result, str))
    print0(f"{path}: {len(pairs)} pairs, dropped: {dict(dropped) or 'none'}")
    if not pairs:
        raise ValueError(f"{path} has no pair that can be used")
    return pairs

def show_pair(pair, tokenizer):
    """A pair as text, with a bar before every token that is scored."""
    lines = [f"prompt    {tokenizer.decode(pair['prompt'])}"]
    for side in list(pair)[1:]:
        lines.append(f"{side:9s} " + "".join("|" + tokenizer.decode(t) for t in pair[side]))
    return "\n".join(lines)

def global_batches(n, batch_size, seed, epochs):
    """Indices of the pairs of each step; every rank draws the same permutation for each epoch."""
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed((seed << 20) + epoch)  # seeds share no epoch
        yield from torch.randperm(n, generator=generator).split(batch_size)  # (B,) each

def row_length(pair, shared):
    """Tokens of a pair's rows; prompt ab, responses cd, e: abcdbe if shared, else abcd and abe_."""
    prompt, *responses = [len(ids) for ids in pair.values()]
    one_row = prompt - 1 + len(responses) + sum(responses)
    return one_row if shared else len(responses) * (prompt + max(responses))

def micro_batches(pairs, max_tokens, shared, rank=0, world_size=1):
    """2) This rank's share of a batch, longest pairs first: lists of indices, of as many pairs as
    max_tokens holds (at least one), with a weight. Ranks average gradients in a step's last backward
    pass (DDP), so each must have one: without a pair it runs another's, weight 0: gradient 0."""
    lengths = [row_length(pair, shared) for pair in pairs]
    rest = sorted(range(len(pairs)), key=lambda i: lengths[i], reverse=True)
    while rest:
        size = max(1, max_tokens // lengths[rest[0]]) * world_size  # all padded to the longest
        group, rest = rest[:size], rest[size:]
        mine = group[rank::world_size]
        yield (mine, 1.0) if mine else (group[:1], 0.0)

def collate(pairs, shared=True, device="cpu"):
    """3) B pairs -> R padded rows of T tokens: each a prompt and its responses, or, where a model
    cannot share the prompt, a prompt and one response. Each response follows its own copy of the
    prompt's last token, which predicts its first. Prompt ab with responses cd and e: input_ids
    a b c d b e, position_ids 0 1 2 3 1 2, branch 0 1 1 1 2 2 (prompt 0, padding -1), all (R, T)."""
    if not shared:
        pairs = [{"prompt": p["prompt"], side: p[side]} for p in pairs for side in list(p)[1:]]
    rows, number = [], 0
    for prompt, *responses in map(dict.values, pairs):  # in the order of tokenize_pair
        start = len(prompt) - 1
        ids, position, branch = prompt[:-1], list(range(start)), [0] * start
        for response in responses:
            number += 1  # over all rows: PairLogps sums by it
            ids += prompt[-1:] + response
            position += range(start, start + 1 + len(response))
            branch += [number] * (1 + len(response))
        rows.append({"input_ids": ids, "position_ids": position, "branch": branch})

    batch = {"shared": shared}
    for name in rows[0]:
        column = [torch.tensor(row[name]) for row in rows]
        fill = -1 if name == "branch" else 0  # padding is masked: any token will do
        batch[name] = torch.nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=fill).to(device)
    return batch

class PairLogps(torch.nn.Module):
    """4) A language model -> log-probs (B, 2) of [chosen, rejected]; what DDP wraps."""
    def __init__(self, model, dtype=torch.float32):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, batch):
        ids, branch = batch["input_ids"], batch["branch"]  # (R, T) each
        inputs = {"input_ids": ids, "attention_mask": (branch >= 0).long()}
        if batch["shared"]:
            # a token sees itself and what stands before it in its prompt and in its own response
            query, key = branch[:, :, None], branch[:, None, :]
            mask = ((key == 0) | (key == query)).tril().unsqueeze(1)  # (R, 1, T, T)
            inputs |= {"attention_mask": mask, "position_ids": batch["position_ids"]}

        with torch.autocast(ids.device.type, self.dtype, enabled=self.dtype == torch.bfloat16):
            # the layers below the head: .model, else base_model (Llama 4's base_model has the head)
            body = getattr(self.model, "model", self.model.base_model)
            hidden = body(**inputs, use_cache=False)[0]  # (R, T, D)

            # score positions whose next token is in their response: in collate's example b c and b
            scored = (branch[:, 1:] > 0) & (branch[:, 1:] == branch[:, :-1])  # (R, T - 1)
            row, column = scored.nonzero(as_tuple=True)  # (N,) each
            # Cohere multiplies its logits by a number (or None), Granite divides them by one
            config = self.model.config.get_text_config()
            scale = (getattr(config, "logit_scale", None) or 1) / getattr(config, "logits_scaling", 1)
            hidden = scale * hidden[row, column]  # (N, D)

            # = cross_entropy(hidden @ weight.T, next ids); in chunks slower, never all of (N, V)
            head = self.model.get_output_embeddings()  # weight (V, D), perhaps a bias (V,)
            chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512) if len(hidden) > 512 else None
            nll = F.linear_cross_entropy(  # chunks escape autocast, hence .to; nll gets that dtype
                hidden.to(self.dtype), head.weight.to(self.dtype), ids[row, column + 1],
                linear_bias=getattr(head, "bias", None), reduction="none", options=chunks)  # (N,)

        # sums by branch, in float64: 0, of prompts, is empty; 1, 2: the first pair's responses ...
        logps = torch.zeros(branch.max() + 1, dtype=torch.float64, device=nll.device)
        return logps.index_add(0, branch[row, column], -nll.double())[1:].view(-1, 2)

def load_model(path):
    """A language model with float32 weights and without dropout, which would blur log-ratios."""
    config = AutoConfig.from_pretrained(path)
    config.update({name: 0.0 for name in vars(config) if "drop" in name})
    model, report = AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"{path} lacks weights: {report['missing_keys']}")
    return model.train()  # eval() would turn gradient checkpointing off

@torch.no_grad()
def can_share(model, pair):
    """Compares our log-probs with those of the model's plain forward: True, rows may share a prompt;
    False, it ignores our mask or positions (Mamba, ALiBi), or the mask undoes a sliding window."""
    prompt, *responses = pair.values()
    own = torch.zeros(len(responses), dtype=torch.float64, device=model.device)
    for n, response in enumerate(responses):
        ids = torch.tensor([prompt + response], device=model.device)  # (1, T)
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]  # (response tokens, V)
        own[n] = -F.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum")
    for shared in (True, False):
        with suppress(Exception):  # models that know no mask of four dimensions fail as they like
            logps = PairLogps(model)(collate([pair], shared, model.device))[0]
            if torch.allclose(logps, own, rtol=1e-5, atol=1e-4):
                return shared
    raise ValueError(f"the rows do not give the model's own log-probs {own}. "
                     "nan: broken weights; else perhaps a soft cap: apply docs/changes/soft_cap.diff")

@torch.no_grad()
def score(module, pairs, max_tokens, shared, rank=0, world_size=1):
    """Log-probs (N, 2) of all pairs in their order, on every rank; the ranks share the work."""
    logps = torch.zeros(len(pairs), 2, dtype=torch.float64, device=module.model.device)
    micro = list(micro_batches(pairs, max_tokens, shared, rank, world_size))
    for indices, weight in tqdm(micro, "log-probs", leave=False, disable=rank > 0):
        logps[indices] = weight * module(collate([pairs[i] for i in indices], shared, logps.device))
    if world_size > 1:
        dist.all_reduce(logps)  # a sum: on all ranks but one a pair's entry is 0
    return logps

def save_checkpoint(path, model, optimizer, tokenizer, state):
    """A Hugging Face folder + optimizer.safetensors + trainer_state.json: all there or not."""
    aside = Path(f"{path}.tmp")
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        moments = {f"{name}.{key}": tensor for name, weight in model.named_parameters()
                   for key, tensor in optimizer.state[weight].items()}
        save_file(moments, aside / "optimizer.safetensors")
        (aside / "trainer_state.json").write_text(json.dumps(state))
        for file in aside.glob("*.safetensors"):  # written as private: give them the json's mode
            shutil.copymode(aside / "trainer_state.json", file)
        os.sync()
        os.rename(aside, path)  # killed at any moment, there is no half checkpoint
    finally:
        shutil.rmtree(aside, ignore_errors=True)

def newest_checkpoint(out_dir):  # final, else the last step's (no .tmp), else None
    return [None, *sorted(Path(out_dir).glob("step_*[0-9]")), *Path(out_dir).glob("final")][-1]

def learning_rate(step, steps, o):  # o, here and below: all options
    """Of step 1, 2, ...: a linear warm-up, then a cosine that would reach 0 after the last step."""
    warmup_steps = math.ceil(o.warmup_ratio * steps)
    if step <= warmup_steps:
        return o.learning_rate * step / warmup_steps
    done = (step - 1 - warmup_steps) / (steps - warmup_steps)
    return o.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

def pair_losses(logps, ref_logps, pairs, o):
    lengths = torch.tensor([len(pair["chosen"]) for pair in pairs], device=logps.device)  # (B,)
    return rpo_loss(logps, ref_logps, lengths, beta=o.beta, eta=o.eta, sft=o.sft)

def train_step(step, policy, optimizer, pairs, ref_logps, o, shared):
    """One update on a global batch of pairs -> means over it, {name: float}."""
    start, rank, world_size = time.perf_counter(), dist.get_rank(), dist.get_world_size()
    micro = list(micro_batches(pairs, o.max_tokens, shared, rank, world_size))
    sums = 0
    for m, (indices, weight) in enumerate(micro):
        # ranks average their gradients once a step, in the last backward pass
        policy.require_backward_grad_sync = m == len(micro) - 1  # DDP's switch, idle without DDP
        mine = [pairs[i] for i in indices]
        logps = policy(collate(mine, shared, ref_logps.device))  # (B, 2)
        losses, metrics = pair_losses(logps, ref_logps[indices], mine, o)
        # the mean over the global batch: dividing by its size, not by the micro-batch's, gives
        # every split the same gradient; DDP divides by the number of ranks, hence the factor
        (weight * losses.sum() / len(pairs) * world_size).backward()
        sums += weight * torch.stack([values.sum() for values in metrics.values()])

    dist.all_reduce(sums)
    row = dict(zip(metrics, (sums / len(pairs)).tolist()))  # of metrics the names alone
    row["grad_norm"] = torch.nn.utils.clip_grad_norm_(policy.parameters(), o.grad_clip).item()
    if not math.isfinite(row["loss"] + row["grad_norm"]):
        raise ValueError(f"no step {step}: loss {row['loss']}, gradient norm {row['grad_norm']}")
    optimizer.step()
    optimizer.zero_grad()
    tokens = sum(len(ids) for pair in pairs for ids in pair.values())
    row["tokens_per_second"] = tokens / (time.perf_counter() - start)
    # the GPU's; without one the process's, which Linux counts in KiB and macOS in bytes
    process_peak = getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    row["peak_memory_gib"] = (torch.cuda.max_memory_allocated() or process_peak) / 2**30
    return row

def evaluate(step, module, pairs, ref_logps, o, shared):
    logps = score(module, pairs, o.max_tokens, shared, dist.get_rank(), dist.get_world_size())
    _, metrics = pair_losses(logps, ref_logps, pairs, o)
    row = {f"eval/{name}": values.mean().item() for name, values in metrics.items()}
    shown = ("eval/loss", "eval/loss/dpo", "eval/rewards/accuracies", "eval/logps/chosen_vs_ref")
    print0(f"step {step}: " + ", ".join(f"{name} {row[name]:.3f}" for name in shown))
    return row

def open_run(o):
    """The log in --out_dir, locked against a second run; the checkpoint to go on from; its state."""
    if not os.path.isdir(o.data):
        raise ValueError(f"there is no folder {o.data}: prepare_data.py makes one")
    os.makedirs(o.out_dir, exist_ok=True)
    log = tempfile.TemporaryFile("w")  # thrown away: rank 0 alone writes the log
    if dist.get_rank() == 0:
        log = open(f"{o.out_dir}/metrics.jsonl", "a", buffering=1)  # appends: tell() is its size
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError("another run is writing to --out_dir")
    folder = newest_checkpoint(o.out_dir)
    if not o.resume and (folder or log.tell()):
        raise ValueError("--out_dir holds a run: --resume it, or choose another")

    # a resumed run agrees with the one it continues in all that decides its numbers
    options = {field.name: getattr(o, field.name) for field in fields(TrainOptions)}
    options["training pairs"] = hashlib.sha256(Path(o.data, "train.jsonl").read_bytes()).hexdigest()
    state = {"step": -1, "options": options, "log_size": 0}  # a new run goes on with step 0
    if folder:
        print0(f"resumes from {folder}")
        state = json.loads((folder / "trainer_state.json").read_text())
    states = [state]
    dist.broadcast_object_list(states)  # all compare with rank 0: a machine may hold other data
    for name, value in states[0]["options"].items():
        if options[name] != value:
            raise ValueError(f"--resume, or rank 0: {name} was {value}, now it is {options[name]}")
    return log, folder, state  # each rank reads folder itself: all must see the same --out_dir

def main(o):
    if o.beta == 0 and (o.sft == "sum" or o.eta == 0):
        raise ValueError("--beta 0 leaves no loss; SFT alone is --beta 0 --sft mean --eta 1")
    lowest = min(o.beta, o.eta, o.learning_rate, o.warmup_ratio, 1 - o.warmup_ratio, o.max_steps)
    if lowest < 0 or min(o.batch_size, o.epochs, o.max_prompt_length, o.grad_clip) <= 0:
        raise ValueError("batch_size, epochs, max_prompt_length, grad_clip: above 0; warmup_ratio: 0 to 1; "
                         "beta, eta, learning_rate, max_steps: 0 or more")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    # ranks talk through NCCL on GPUs, else gloo; without torchrun this is a world of one process
    alone = {} if "RANK" in os.environ else {"rank": 0, "world_size": 1, "store": dist.HashStore()}
    dist.init_process_group(**alone)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    log, folder, state = open_run(o)

    tokenizer = AutoTokenizer.from_pretrained(o.model)
    if AutoTokenizer.from_pretrained(o.ref_model or o.model).get_vocab() != tokenizer.get_vocab():
        raise ValueError("--ref_model has another vocabulary than --model")
    pairs = {"train": load_pairs(f"{o.data}/train.jsonl", tokenizer, o.max_length, o.max_prompt_length)}
    if o.eval_every and os.path.exists(f"{o.data}/test.jsonl"):
        pairs["test"] = load_pairs(f"{o.data}/test.jsonl", tokenizer, o.max_length, o.max_prompt_length)
    print0(show_pair(pairs["train"][0], tokenizer))  # look at it before you believe a run
    batches = list(global_batches(len(pairs["train"]), o.batch_size, o.seed, o.epochs))
    steps = len(batches)
    stop = min(steps, o.max_steps or steps)  # the schedule is planned on all steps

    # the pair to try can_share on: a sliding window cuts the longest prompt + response first
    longest = max(sum(pairs.values(), []), key=lambda pair: row_length(pair, False))
    # the reference: its log-probs are computed once, by the code that computes the policy's
    model = load_model(o.ref_model or o.model).to(device).requires_grad_(False)
    shared = can_share(model, longest)
    module = PairLogps(model, getattr(torch, o.dtype))
    ref_logps = {k: score(module, pairs[k], o.max_tokens, shared, rank, world_size) for k in pairs}
    del model, module  # from here on its memory is the policy's

    # the policy
    model = load_model(folder or o.model).to(device)
    shared = can_share(model, longest)  # again: the reference may be of another architecture
    if o.gradient_checkpointing:
        model.activation_checkpointing_enable()  # transformers' newer name of it
    module = policy = PairLogps(model, getattr(torch, o.dtype))
    if world_size > 1:  # find_unused: an expert of a mixture may get no token in a step
        policy = torch.nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=o.weight_decay, fused=True)
    if folder:
        for name, tensor in load_file(folder / "optimizer.safetensors", str(device)).items():
            parameter, _, key = name.rpartition(".")  # as save_checkpoint named it
            optimizer.state[model.get_parameter(parameter)][key] = tensor

    # cut rows after the checkpoint, they come again; min: never lengthen a file
    log.truncate(min(log.tell(), state["log_size"]))
    def write_row(step, row):
        log.write(json.dumps({"step": step, "epoch": step * o.epochs / steps} | row, allow_nan=False) + "\n")

    for step in tqdm(range(state["step"] + 1, stop + 1), "train", disable=rank > 0):
        # step 0 makes no update: it is the policy before training
        if step > 0:
            lr = optimizer.param_groups[0]["lr"] = learning_rate(step, steps, o)
            indices = batches[step - 1]
            batch, ref = [pairs["train"][i] for i in indices], ref_logps["train"][indices]
            write_row(step, {"lr": lr} | train_step(step, policy, optimizer, batch, ref, o, shared))

        last = step == stop
        if "test" in pairs and (last or step % o.eval_every == 0):  # no "test" if eval_every is 0
            write_row(step, evaluate(step, module, pairs["test"], ref_logps["test"], o, shared))
        if rank == 0 and step > 0 and (last or (o.save_every and step % o.save_every == 0)):
            # a run that --max_steps stopped early can go on: its last checkpoint is not final
            path = Path(o.out_dir, "final" if step == steps else f"step_{step:06d}")
            state |= {"step": step, "log_size": log.tell()}
            save_checkpoint(path, model, optimizer, tokenizer, state)

def run(argv=None):
    """What main raises ends here, in one line; RPO_TRACEBACK=1 shows where it was raised."""
    groups = [TrainOptions, RunOptions]
    o = HfArgumentParser(groups, description="trains DPO + eta * SFT", allow_abbrev=False).parse_args(argv)
    try:
        main(o)
        dist.destroy_process_group()  # not in main, whose DDP object must be gone: else a hang
    except (Exception, KeyboardInterrupt) as error:
        if "RPO_TRACEBACK" in os.environ:
            raise
        newest = f"newest checkpoint, delete it if damaged: {newest_checkpoint(o.out_dir)}"
        text = " ".join(f"{type(error).__name__} {error}".split())[:500]
        tqdm.write(f"error: {text} (model {o.model}, data {o.data}; {newest})", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    run()
