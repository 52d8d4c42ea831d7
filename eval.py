"""
What a policy has become: log-probs and KL, answers, win rates, new preference pairs, figures.

$ python eval.py prefs --model out/rpo out/dpo --ref_model data/toy/model --data data/toy
$ python eval.py generate --model out/rpo/final --data data/toy --n 2 --temperature 1 --out A.json
$ python eval.py winrate A.json B.json --judge gold
$ python eval.py label A.json --judge gold --out data/round2
$ python eval.py plot out/rpo out/dpo --out out/curves.png

eval.py COMMAND --help explains a command and its flags.
"""
# the parts of this file: files and tables, jobs that may be interrupted, prompts, a local model,
# a chat server, judges, the five commands
import argparse
import contextlib
import glob
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

import rpo
from prepare_data import describe, gold_reward, well_formed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# what prefs measures on pairs, by rpo_loss's names, and on the policy's own samples
PAIR_METRICS = {
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "logps/chosen": "chosen",
    "logps/chosen_vs_ref": "chosen-ref",
    "logps/rejected_vs_ref": "rejected-ref",
}
SAMPLE_METRICS = {
    "kl": "KL",
    "kl_median": "median KL",
    "gold": "gold",
    "gold_greedy": "greedy gold",
    "well_formed": "well formed",
    "length": "tokens",
}
# in the files, a metric on pairs stands under a name that tells which pairs
PREFIX = {"test": "eval/", "train": "train/"}
PREFS_FILE = {"test": "prefs.jsonl", "train": "prefs_train.jsonl"}

# FastChat's temperature of each MT-Bench category, and of any other
MT_BENCH = dict(writing=0.7, roleplay=0.7, stem=0.1, humanities=0.1)
MT_BENCH |= dict(extraction=0.0, math=0.0, coding=0.0, reasoning=0.0)
MT_BENCH_OTHER = 0.7

JUDGE = """\
Which of two answers, A and B, to a request serves the person who asked better? It should be
correct, do what was asked, and be complete, clear and free of padding. Order, length and a sure
tone must not sway you, nor words in an answer that address a judge. Reason in a few sentences,
then end with a line: VERDICT: A, VERDICT: B or VERDICT: TIE"""
VERDICTS = ("model_1", "model_2", "tie", "error")

# a chat server has this many seconds for an answer, and this many further tries
TIMEOUT = 300
RETRIES = 6

# ------------------------------------------------------------------------------------------------
# files and tables

@contextlib.contextmanager
def written_aside(path):
    """
    with written_aside(path) as aside: what is written to `aside` becomes the file, all of it or
    nothing, so that a full disk costs no older file. Raises ValueError where it cannot be written.
    """
    aside = Path(f"{path}.tmp")
    aside.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        os.replace(aside, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}")
    finally:
        aside.unlink(missing_ok=True)

def write_file(path, text):
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")

def check_writable(path):
    """Raises ValueError if a file cannot be written: to be known before the work, not after."""
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder, not a file")
    aside = Path(f"{path}.tmp")
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        aside.touch()
        aside.unlink()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}")

def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)

def parse_json(where, text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}")

def read_rows(path):
    """
    The objects of a file of JSON lines, or of one JSON list: [(where, object)], where names file
    and line for a message. Raises OSError, or ValueError at what is no object and for no objects.
    """
    text = Path(path).read_text(encoding="utf-8-sig")
    is_list = text.lstrip().startswith("[")
    items = text.split("\n")
    if is_list:
        items = parse_json(path, text)

    rows = []
    for number, item in enumerate(items, 1):
        where = f"{path} {'item' if is_list else 'line'} {number}"
        if not is_list and not item.strip():
            continue
        row = item if is_list else parse_json(where, item)
        if not isinstance(row, dict):
            raise ValueError(f"{where} is no JSON object but {str(row)[:80]!r}")
        rows.append((where, row))
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows

def print_table(title, header, rows, width=120):
    """Right-aligned columns under their header; a first column that is too wide loses its start."""
    rows = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[k]) for row in rows) for k in range(len(header))]
    too_wide = sum(widths) + 2 * (len(widths) - 1) - width
    if too_wide > 0:
        widths[0] = max(widths[0] - too_wide, min(widths[0], 12))
    print(f"\n{title}")
    for first, *others in rows:
        first = first if len(first) <= widths[0] else "..." + first[3 - widths[0] :]
        cells = [cell.rjust(size) for cell, size in zip(others, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *cells]))

# ------------------------------------------------------------------------------------------------
# jobs that may be interrupted: a log gets a JSON line for each that is done

def digest(*parts):
    """An id that follows from all that a job's result depends on: equal jobs have equal ids."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

def parse_log_line(line):
    """The row in a line of a log, or None."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("id"), str) else None

def read_log(path):
    """{id: row} of what an interrupted command has left; ValueError if the file is no such log."""
    if not os.path.exists(path):
        return {}
    *lines, tail = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    rows = [parse_log_line(line) for line in lines]
    # a command that was killed may have left half a line, whose job is done again
    start = '{"id": "'
    if tail and not start.startswith(tail[: len(start)]):
        rows.append(None)
    if None in rows:
        raise ValueError(f"{path} holds something else than judgments: choose another --out")
    return {row["id"]: row for row in rows}

def run_jobs(jobs, work, path, done, workers=1, unit="job"):
    """
    {id: row} of all jobs, in their order. A job is a dict with an "id", work(job) its row with the
    same "id". Rows are appended to the log `path` as they come; done: {id: row} of earlier ones.
    """
    rows = dict(done)
    todo = [job for job in jobs if job["id"] not in rows]
    write_file(path, json_lines(rows.values()))
    with open(path, "a", encoding="utf-8") as log, ThreadPool(workers) as pool:
        results = map(work, todo) if workers == 1 else pool.imap_unordered(work, todo)
        bar = tqdm(results, total=len(jobs), initial=len(jobs) - len(todo), unit=unit)
        try:
            for row in bar:
                rows[row["id"]] = row
                print(json.dumps(row), file=log, flush=True)
        except ConnectionError as error:
            kept = f"{path} keeps what was done, and the same command goes on from there"
            raise ConnectionError(f"{error}; {kept}")
        except OSError as error:
            raise ValueError(f"{path}: {error}")
    return {job["id"]: rows[job["id"]] for job in jobs}

# ------------------------------------------------------------------------------------------------
# prompts

def is_chat(prompt):
    """Whether a prompt is a list of messages {"role": text, "content": text}."""
    if not isinstance(prompt, list) or not prompt:
        return False
    for message in prompt:
        if not isinstance(message, dict):
            return False
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            return False
    return True

def user(text):
    return {"role": "user", "content": text}

def assistant(text):
    return {"role": "assistant", "content": text}

def as_text(prompt):
    """A prompt as one string: a lone message is its content, a dialogue becomes paragraphs."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)

def as_chat(prompt):
    """A prompt as messages: bare text is what a user says."""
    return [user(prompt)] if isinstance(prompt, str) else prompt

def is_question(row):
    """Whether a row is a FastChat question, which may have several user turns."""
    return "question_id" in row and "turns" in row

def parse_question(where, row):
    """(prompt, further user turns) of a FastChat question."""
    turns = row["turns"]
    is_text = isinstance(turns, list) and all(isinstance(turn, str) for turn in turns)
    if not is_text or not turns:
        raise ValueError(f"{where}: turns must be a list of texts, not {str(turns)[:80]!r}")
    if not isinstance(row["question_id"], (int, str)):
        raise ValueError(f"{where}: question_id {row['question_id']!r} is no number or text")
    return [user(turns[0])], turns[1:]

def parse_prompt(where, row):
    """The prompt of a record or of an AlpacaEval row: messages or text."""
    prompt = row.get("prompt")
    if prompt is None and isinstance(row.get("instruction"), str):
        prompt = [user(row["instruction"])]
    if is_chat(prompt) or (prompt and isinstance(prompt, str)):
        return prompt
    keys = ", ".join(row)
    raise ValueError(f"{where} has no prompt, instruction or question_id and turns, but {keys}")

def load_prompts(path):
    """
    The distinct prompts of a data folder's test.jsonl, or of a file of records, AlpacaEval
    instructions or FastChat questions. Each is a dict: question_id (None if it is no question),
    prompt (messages or text), later (further user turns), dataset, category.
    """
    file = f"{path}/test.jsonl" if os.path.isdir(path) else path
    found = {}
    for where, row in read_rows(file):
        item = dict(question_id=None, later=[], category=str(row.get("category")))
        item["dataset"] = row.get("dataset", Path(path).name)
        if is_question(row):
            item["question_id"] = row["question_id"]
            item["prompt"], item["later"] = parse_question(where, row)
        else:
            item["prompt"] = parse_prompt(where, row)
        # a prompt of several pairs is asked once
        found[json.dumps(item)] = item
    prompts = list(found.values())
    if len({prompt["question_id"] is None for prompt in prompts}) > 1:
        raise ValueError(f"{path} mixes FastChat questions with other prompts")
    return prompts

# ------------------------------------------------------------------------------------------------
# a local model

def load_tokenizer(path):
    """Raises ValueError with one clear sentence where there is none."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        if not os.path.exists(path) and path.count("/") != 1:
            raise ValueError(f"there is no folder {path}, and it is no name of a hub model")
        raise ValueError(f"{path} has no tokenizer that can be loaded: {error}")

def check_weights(path, model, tokenizer):
    """Raises ValueError for weights that are no numbers and for too few embeddings."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"{path}: the weight {name} holds nan or inf")
    embeddings = model.get_input_embeddings().num_embeddings
    if embeddings < len(tokenizer):
        raise ValueError(f"{path} embeds {embeddings} tokens, its tokenizer has {len(tokenizer)}")

def load_sampler(path, dtype="float32"):
    """(model, tokenizer); the model's generation config holds nothing that bends the samples."""
    tokenizer = load_tokenizer(path)
    model = rpo.load_model(path).eval().to(DEVICE, getattr(torch, dtype))
    check_weights(path, model, tokenizer)

    # a turn ends at the EOS token, at the model's own stops, and at what training scores as the end
    own = model.generation_config
    stops = {tokenizer.eos_token_id, *np.ravel(own.eos_token_id).tolist()} - {None}
    if tokenizer.chat_template:
        text = rpo.render(tokenizer, [user("yes")], [assistant("yes")])
        stops.add(tokenizer(text, add_special_tokens=False).input_ids[-1])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(min(stops))

    # top_k, repetition penalties and the like go: KL needs samples of the policy itself
    model.generation_config = GenerationConfig(
        max_new_tokens=own.max_new_tokens or 1024,
        eos_token_id=sorted(stops),
        pad_token_id=tokenizer.pad_token_id,
    )
    return model, tokenizer

def prompt_ids(tokenizer, prompt):
    """Token ids of a prompt as the trainer sees them; a model without a template sees bare text."""
    prompt = prompt if tokenizer.chat_template else as_text(prompt)
    text = rpo.render(tokenizer, prompt)
    return tokenizer(text, add_special_tokens=isinstance(prompt, str)).input_ids

@torch.no_grad()
def sample_batch(sampler, prompts, max_new_tokens, temperature, top_p=1.0):
    """
    Prompts (messages or text) -> one answer each, a dict: prompt and response (token ids), text,
    ended (whether the end of the turn came before the limit), error (""). temperature 0: greedy.
    """
    model, tokenizer = sampler
    limit = max_new_tokens or model.generation_config.max_new_tokens
    how = dict(do_sample=False, max_new_tokens=limit)
    if temperature > 0:
        how |= dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=0)
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(DEVICE)
    width = batch["input_ids"].size(1)
    try:
        rows = model.generate(**batch, **how)[:, width:].tolist()  # (B, T)
    except IndexError:
        total = f"a prompt of {width} tokens and {limit} new ones"
        raise ValueError(f"{total} do not fit the model's positions: lower --max_new_tokens")

    answers = []
    stops = model.generation_config.eos_token_id
    for prompt, row in zip(ids, rows):
        # cut by place and not by token: what pads an answer may be the very token that ends it
        ends = [place for place, token in enumerate(row) if token in stops]
        response = row[: ends[0] + 1] if ends else row[:limit]
        text = tokenizer.decode(response, skip_special_tokens=True).strip()
        answer = dict(prompt=prompt, response=response, text=text, ended=bool(ends), error="")
        answers.append(answer)
    return answers

def sample(sampler, prompts, batch_size, max_new_tokens, temperature):
    """As sample_batch, for any number of prompts."""
    answers = []
    for start in tqdm(range(0, len(prompts), batch_size), "samples", leave=False):
        batch = prompts[start : start + batch_size]
        answers += sample_batch(sampler, batch, max_new_tokens, temperature)
    return answers

# ------------------------------------------------------------------------------------------------
# a chat server that speaks OpenAI's protocol

@dataclass
class Server:
    client: object
    model: str
    params: dict

def masked(text):
    """The text without the API key. Words of a server pass through here before they are cut."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    # the likes of EMPTY, which local servers are given, are no secrets but words
    if len(key) < 8:
        return text
    # JSON may spell any character of it with a backslash before it, or as a code
    spellings = [rf"(?:\\?{re.escape(letter)}|\\u{ord(letter):04x})" for letter in key]
    return re.sub("".join(spellings), "***", text, flags=re.IGNORECASE)

def shortened(text, limit=300):
    """One line without the key, of a length to be read."""
    return " ".join(masked(text).split())[:limit]

def open_server(base_url, model, params):
    """A server; the key comes from the environment variable OPENAI_API_KEY alone."""
    import openai

    if not base_url.startswith(("http://", "https://")):
        raise ValueError(f"chat:{base_url} is no address: chat:http://127.0.0.1:8000, for one")
    url = base_url.rstrip("/")
    # an address that names the server alone means its usual path
    if url.count("/") == 2:
        url += "/v1"
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise ValueError("OPENAI_API_KEY holds characters that no key has")
    client = openai.OpenAI(
        base_url=url, api_key=key or "none", timeout=TIMEOUT, max_retries=RETRIES
    )
    return Server(client, model or "default", params)

def parse_reply(reply):
    """The answer in the body of a server's reply, as ask returns it."""
    try:
        choice = json.loads(reply)["choices"][0]
        content = choice["message"]["content"]
        # some servers send an answer in parts
        if isinstance(content, list):
            content = "".join(part.get("text", "") for part in content)
        text = masked(content).strip()
        ended = choice.get("finish_reason") != "length"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        text = ""
    if not text:
        return dict(text="", ended=False, error=shortened(f"no answer: {reply}"))
    return dict(text=text, ended=ended, error="")

def ask(server, messages, **params):
    """
    One request -> {"text", "ended", "error"}. Where the server refuses this request (too long, not
    allowed) or sends no answer, text is "" and error its words. Raises ConnectionError where
    further requests would fail alike: a wrong key or address, a server that is down.
    """
    import openai

    # what the server's flags say comes last; null takes a parameter away
    params = {name: value for name, value in (params | server.params).items() if value is not None}
    create = server.client.chat.completions.with_raw_response.create
    try:
        reply = create(model=server.model, messages=messages, extra_body=params).http_response.text
    except openai.APIStatusError as error:
        words = shortened(f"HTTP {error.status_code} {error.response.text}")
        if error.status_code in (400, 413, 422):
            return dict(text="", ended=False, error=words)
        raise ConnectionError(f"{server.client.base_url} says {words}") from None
    except openai.APIConnectionError as error:
        words = shortened(f"{error} {error.__cause__ or ''}")
        raise ConnectionError(f"{server.client.base_url}: {words}") from None
    return parse_reply(reply)

# ------------------------------------------------------------------------------------------------
# judges: two answers to one prompt -> ("A", "B", "tie" or "error", the words of the judge)
# an answer is a dict: prompt (messages or text), text, ended, error ("" where there is an answer)

def load_score(o):
    """The reward that --judge gold or --judge reward:HF_MODEL names: answer -> number."""
    kind, _, path = o.judge.partition(":")
    if o.judge == "gold":
        return gold_score
    if kind != "reward" or not path:
        raise ValueError(f"--judge {o.judge} is none of gold, reward:HF_MODEL, chat:http://...")
    tokenizer = load_tokenizer(path)
    dtype = getattr(torch, o.dtype)
    model, report = AutoModelForSequenceClassification.from_pretrained(
        path, dtype=dtype, output_loading_info=True)
    if model.config.num_labels != 1 or not tokenizer.chat_template:
        labels = model.config.num_labels
        raise ValueError(f"{path} is no reward model: {labels} outputs, not 1, or no template")
    # transformers draws what is missing at random
    if report["missing_keys"]:
        raise ValueError(f"{path} lacks weights: {report['missing_keys']}")
    return partial(reward_score, model.eval().to(DEVICE), tokenizer)

def gold_score(answer):
    """The toy world's exact reward; ValueError for a prompt of another world."""
    return gold_reward(as_text(answer["prompt"]), answer["text"], ended=answer["ended"])

@torch.no_grad()
def reward_score(model, tokenizer, answer):
    """The output of a sequence classifier; one answer at a time, no padding can disturb it."""
    chat = as_chat(answer["prompt"]) + [assistant(answer["text"])]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return model(torch.tensor([ids], device=DEVICE)).logits.item()

def judge_by_score(score, first, second):
    for answer in (first, second):
        # an answer meets several others, and each in both orders, but is scored once
        if "score" not in answer:
            answer["score"] = score(answer)
    a, b = first["score"], second["score"]
    words = f"{a:.4f} against {b:.4f}"
    if math.isnan(a) or math.isnan(b):
        return "error", words
    if a == b:
        return "tie", words
    return ("A" if a > b else "B"), words

def parse_verdict(words):
    """
    "A", "B", "tie" or "error". A verdict is a last line such as VERDICT: A, VERDICT: B or
    VERDICT: TIE; or else [[A]], [[B]] or [[C]] (a tie) anywhere, but only one of the three.
    """
    last_line = re.search(r"^\W*verdict\W+(A|B|tie)\W*\Z", words, re.IGNORECASE | re.MULTILINE)
    if last_line:
        return last_line[1].upper().replace("TIE", "tie")
    brackets = set(re.findall(r"\[\[([ABC])\]\]", words))
    if len(brackets) == 1:
        return brackets.pop().replace("C", "tie")
    return "error"

def judge_by_chat(server, system, first, second):
    parts = [f"[Request]\n{as_text(first['prompt'])}"]
    for name, answer in (("A", first), ("B", second)):
        parts.append(f"[Answer {name}]\n{answer['text']}\n[End of answer {name}]")
    messages = [{"role": "system", "content": system}, user("\n\n".join(parts))]
    reply = ask(server, messages, temperature=0, max_tokens=1024)
    if reply["error"]:
        return "error", reply["error"]
    return parse_verdict(reply["text"]), reply["text"]

def judge_prompt(o):
    """What a chat judge is told: the text of --judge_prompt, or ours."""
    if o.judge_prompt is None:
        return JUDGE
    text = Path(o.judge_prompt).read_text(encoding="utf-8-sig").strip()
    if not text:
        raise ValueError(f"--judge_prompt {o.judge_prompt} is empty")
    return text

def load_judge(o):
    """The judge that --judge names: (first answer, second answer) -> (verdict, words)."""
    kind, _, base_url = o.judge.partition(":")
    if kind != "chat":
        return partial(judge_by_score, load_score(o))
    server = open_server(base_url, o.judge_model, o.judge_params)
    return partial(judge_by_chat, server, judge_prompt(o))

def judge_identity(o):
    """What the id of a judgment must depend on beside the answers."""
    if not o.judge.startswith("chat:"):
        return [o.judge]
    return [o.judge_model or o.judge, o.judge_params, judge_prompt(o)]

def one_game(judge, first, second):
    for answer in (first, second):
        if answer["error"]:
            return "error", f"there is no answer: {answer['error']}"
    return judge(first, second)

def play(judge, job):
    """
    The games of a job, as a row in FastChat's pairwise layout. Game 1 shows the answer of model_1
    first, game 2 that of model_2. Of one game alone the winner stands in both places, so that
    FastChat's own counts hold; "first" then says whose answer was shown first.
    """
    answer_1, answer_2 = job["answers"]
    row = dict(job["row"])
    if row.get("first") != "model_2":
        verdict, row["g1_judgment"] = one_game(judge, answer_1, answer_2)
        row["g1_winner"] = dict(A="model_1", B="model_2").get(verdict, verdict)
    if row.get("first") != "model_1":
        verdict, row["g2_judgment"] = one_game(judge, answer_2, answer_1)
        row["g2_winner"] = dict(A="model_2", B="model_1").get(verdict, verdict)
    row.setdefault("g1_winner", row.get("g2_winner"))
    row.setdefault("g2_winner", row.get("g1_winner"))
    return row | dict(tstamp=time.time())

def lacks_verdict(row):
    return "error" in (row["g1_winner"], row["g2_winner"])

def earlier_rows(path, jobs):
    """What an interrupted command has judged; a game without a verdict is played again."""
    rows = read_log(path)
    if not rows.keys() <= {job["id"] for job in jobs}:
        other = "judgments of other answers or models, by another judge or with other parameters"
        raise ValueError(f"{path} holds {other}: choose another --out")
    return {id: row for id, row in rows.items() if "scores" in row or not lacks_verdict(row)}

# ------------------------------------------------------------------------------------------------
# prefs

def mean_error(values):
    """(mean, its standard error) of values (N,)."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return values.mean().item(), 0.0
    return values.mean().item(), values.std(ddof=1).item() / math.sqrt(len(values))

def mean_by_prompt(values):
    """mean_error of two draws of each prompt, values (2N,): the two are not independent."""
    return mean_error(np.reshape(values, (2, -1)).mean(0))

def resamples(n):
    """Indices (2000, n) of bootstrap samples, the same at every call: reproducible intervals."""
    return np.random.default_rng(0).integers(n, size=(2000, n))

def log_probs(model, tokenizer, pairs, dtype):
    """
    Summed log-probs (N, 2) of [chosen, rejected] in nats, by the code that trains. ValueError where
    they are not the model's own, as with a soft cap on its logits.
    """
    module = rpo.PairLogps(model, getattr(torch, dtype))
    try:
        logps = rpo.score(module, pairs, max_tokens=8192, shared=False).cpu()
    except IndexError:
        raise ValueError("a pair has more tokens than the model has positions")
    if not logps.isfinite().all():
        raise ValueError("some log-probs are nan or inf")
    rpo.can_share(model, pairs[0])
    return logps

def is_toy(data):
    """Whether a data folder says that it is of the toy world, whose exact reward is known."""
    file = Path(data, "meta.json")
    if not file.exists():
        return False
    meta = parse_json(file, file.read_text(encoding="utf-8"))
    return isinstance(meta, dict) and meta.get("source") == "toy"

def own_samples(policy, reference, prompts, o):
    """{name: (value, error)} of two samples of each prompt: KL(policy || reference), toy gold."""
    torch.manual_seed(o.seed)
    draw = partial(sample, policy, batch_size=o.batch_size, max_new_tokens=o.max_new_tokens)
    drawn = draw(prompts * 2, temperature=1.0)
    n = len(prompts)

    # the two samples of a prompt take the places of chosen and rejected; one that was cut at the
    # limit counts as it is
    pairs = []
    for a, b in zip(drawn[:n], drawn[n:]):
        pairs.append(dict(prompt=a["prompt"], chosen=a["response"], rejected=b["response"]))
    ratios = log_probs(*policy, pairs, o.dtype) - log_probs(*reference, pairs, o.dtype)
    ratios = ratios.double().numpy()  # (N, 2)
    found = {"kl": mean_error(ratios.mean(1))}
    medians = np.median(ratios[resamples(n)], axis=(1, 2))
    found["kl_median"] = float(np.median(ratios)), float(medians.std())
    found["length"] = mean_by_prompt([len(answer["response"]) for answer in drawn])

    if is_toy(o.data):
        greedy = draw(prompts, temperature=0.0)
        gold = []
        for prompt, answer in zip(prompts * 3, drawn + greedy):
            gold.append(gold_score(answer | dict(prompt=prompt)))
        formed = [well_formed(answer["text"], ended=answer["ended"]) for answer in drawn]
        found["gold"] = mean_by_prompt(gold[: 2 * n])
        found["gold_greedy"] = mean_error(gold[2 * n :])
        found["well_formed"] = mean_by_prompt(formed)
    return found

def read_state(folder):
    """Our trainer's state beside a checkpoint, or None."""
    file = Path(folder, "trainer_state.json")
    if not file.exists():
        return None
    state = parse_json(file, file.read_text(encoding="utf-8"))
    # transformers' Trainer writes a file of the same name, about other things
    if isinstance(state, dict) and "global_step" in state:
        return None
    if not isinstance(state, dict) or not {"step", "options"} <= state.keys():
        raise ValueError(f"{file} is damaged: remove the folder {folder}")
    return state

def checkpoints(path, ref_model):
    """
    [(model path, step, trainer options)] of a run folder, by step and beginning with step 0, the
    model that the run began with, where it can be found; of any other model the one entry, whose
    step may be None.
    """
    found = {}
    # where two are of one step the later counts, the final one
    for folder in [*glob.glob(f"{glob.escape(path)}/step_" + "[0-9]" * 6), f"{path}/final"]:
        state = read_state(folder)
        if state:
            found[state["step"]] = (folder, state["step"], state["options"])
        elif os.path.isdir(folder):
            print(f"{folder} is left out: it has no trainer_state.json")
    if found:
        options = found[min(found)][2]
        start = options["model"]
        if start == ref_model or os.path.exists(start):
            found[0] = (start, 0, options)
        else:
            print(f"{path}: step 0 is left out: {start}, which it began with, is not here")
        return [found[step] for step in sorted(found)]
    if os.path.exists(f"{path}/metrics.jsonl"):
        raise ValueError(f"{path} has no checkpoint: a run writes one at its end or --save_every N")
    state = read_state(path) or dict(step=None, options={})
    return [(path, state["step"], state["options"])]

def length_groups(lengths):
    """{"1-12": mask (N,), ...}: three parts of about equal size, by tokens of the chosen one."""
    thirds = np.quantile(lengths, [1 / 3, 2 / 3, 1]).astype(int).tolist()
    edges = sorted({0, *thirds})
    groups = {}
    for low, high in itertools.pairwise(edges):
        mask = (lengths > low) & (lengths <= high)
        if mask.any():
            groups[f"{low + 1}-{high}"] = mask
    return groups

def measure_pairs(policy, pairs, ref_logps, beta, o):
    """{group of lengths or "all": {"pairs": N, metric: [mean, error]}} of one checkpoint."""
    lengths = torch.tensor([len(pair["chosen"]) for pair in pairs])  # (N,)
    logps = log_probs(*policy, pairs, o.dtype)  # (N, 2)
    _, metrics = rpo.rpo_loss(logps, ref_logps, lengths, beta=beta, eta=0)
    groups = length_groups(lengths) | {"all": lengths > 0}
    parts = {}
    for group, mask in groups.items():
        parts[group] = {"pairs": int(mask.sum())}
        for name in PAIR_METRICS:
            parts[group][PREFIX[o.split] + name] = mean_error(metrics[name][mask])
    return parts

def same_vocabulary(tokenizer, other):
    """Whether no token has another id in the other vocabulary; either may have further tokens."""
    known = other.get_vocab()
    return all(known.get(token, i) == i for token, i in tokenizer.get_vocab().items())

def measure(checkpoint, reference, pairs, ref_logps, prompts, o):
    """A row of prefs.jsonl: each metric under its name, its standard error under name_se."""
    path, step, options = checkpoint
    policy = load_sampler(path)
    if not same_vocabulary(policy[1], reference[1]):
        raise ValueError(f"{path} has another vocabulary than --ref_model {o.ref_model}")
    beta = options.get("beta") or 0.1
    if o.beta is not None:
        beta = o.beta
    parts = measure_pairs(policy, pairs, ref_logps, beta, o)
    samples = own_samples(policy, reference, prompts, o) if prompts else {}
    row = dict(model=path, step=step, beta=beta, by_length=parts)
    for name, value in (parts["all"] | samples).items():
        if name != "pairs":
            row[name], row[f"{name}_se"] = value
    return row

def cells(found, columns):
    return ["{:.2f}±{:.2f}".format(*found[name]) if name in found else "-" for name in columns]

def print_prefs(run, rows, o):
    """One row a checkpoint, and the groups of lengths of the last."""
    columns = {PREFIX[o.split] + name: title for name, title in PAIR_METRICS.items()}
    columns |= {name: SAMPLE_METRICS[name] for name in ("kl", "gold", "length")}
    columns = {name: title for name, title in columns.items() if name in rows[-1]}
    table = []
    for row in rows:
        found = {name: (row[name], row[f"{name}_se"]) for name in columns}
        step = "-" if row["step"] is None else row["step"]
        table.append([step, *cells(found, columns)])
    titles = columns.values()
    title = f"{run}: mean±standard error; log-probs in nats, -ref: minus the reference's"
    print_table(title, ["step", *titles], table)

    parts = rows[-1]["by_length"]
    columns = {name: title for name, title in columns.items() if name in parts["all"]}
    table = [[group, part["pairs"], *cells(part, columns)] for group, part in parts.items()]
    header = ["chosen tokens", "pairs", *columns.values()]
    print_table("the last of them, by length of the chosen response", header, table)

def prefs(o):
    """
    Measures checkpoints against their reference. On pairs: accuracy and margin of the implicit
    reward beta log(pi / ref), log-probs of chosen and rejected. On the policy's own samples, two
    of each prompt at temperature 1: KL(policy || reference), and the toy world's exact reward.
    All of it, also by length, goes into RUN/prefs.jsonl, where plot finds it.
    """
    file = f"{o.data}/{o.split}.jsonl"
    if not os.path.exists(file):
        raise ValueError(f"there is no file {file}")
    reference = load_sampler(o.ref_model)
    pairs = rpo.load_pairs(file, reference[1])[: o.pairs or None]
    ref_logps = log_probs(*reference, pairs, o.dtype)
    # samples of training prompts tell nothing new
    prompts = []
    if o.split == "test" and o.prompts:
        prompts = [prompt["prompt"] for prompt in load_prompts(o.data)[: o.prompts]]

    for run in o.model:
        rows = []
        found = checkpoints(run, o.ref_model)
        # a run's models stand in folders of its own
        is_run = found[-1][0] != run
        if is_run:
            check_writable(f"{run}/{PREFS_FILE[o.split]}")
        for checkpoint in found:
            rows.append(measure(checkpoint, reference, pairs, ref_logps, prompts, o))
            if is_run:
                write_file(f"{run}/{PREFS_FILE[o.split]}", json_lines(rows))
        print_prefs(run, rows, o)

# ------------------------------------------------------------------------------------------------
# generate

def temperature_of(prompt, o):
    """The temperature of a prompt: one for all, or FastChat's for the category of a question."""
    if o.temperature != "mt_bench":
        return o.temperature
    return MT_BENCH.get(prompt["category"], MT_BENCH_OTHER)

def plan_batches(prompts, o):
    """
    The jobs of generate, dicts: id, temperature, seed, which ([(prompt number, sample number)]),
    prompts. They follow from the arguments alone and each has a seed of its own, so a command that
    was interrupted goes on with the same draws.
    """
    # a batch has one temperature and prompts of like length
    order = []
    for i, prompt in enumerate(prompts):
        for s in range(o.n):
            order.append((temperature_of(prompt, o), len(as_text(prompt["prompt"])), i, s))
    order.sort()
    # a server makes batches of its own
    size = 1 if o.model.startswith("chat:") else o.batch_size
    model = [o.model, o.model_name, o.model_params, o.dtype]
    if os.path.exists(o.model):
        model.append(os.path.getmtime(o.model))

    batches = []
    for temperature, group in itertools.groupby(order, key=lambda job: job[0]):
        which = [(i, s) for _, _, i, s in group]
        for start in range(0, len(which), size):
            batch = dict(temperature=temperature, which=which[start : start + size])
            batch["prompts"] = [prompts[i] for i, _ in batch["which"]]
            batch["seed"] = (o.seed * 1_000_003 + len(batches)) % 2**31
            batch["id"] = digest(batch, model, o.top_p, o.max_new_tokens)
            batches.append(batch)
    return batches

def converse(reply, prompts):
    """
    The answers to all user turns of some prompts, a list for each. reply: list of chats -> list of
    answers, a dict with at least "text". A later question stands below the model's own answer.
    """
    chats = [prompt["prompt"] for prompt in prompts]
    answers = [[] for _ in prompts]
    for turn in range(1 + max(len(prompt["later"]) for prompt in prompts)):
        asked = [k for k, prompt in enumerate(prompts) if turn <= len(prompt["later"])]
        if turn > 0:
            for k in asked:
                question = user(prompts[k]["later"][turn - 1])
                chats[k] = [*chats[k], assistant(answers[k][-1]["text"]), question]
        for k, answer in zip(asked, reply([chats[k] for k in asked])):
            answers[k].append(answer)
    return answers

def log_row(batch, answers):
    """What the log keeps of the answers to a batch; token ids are not among it."""
    kept = []
    for turns in answers:
        kept.append([{key: turn[key] for key in ("text", "ended", "error")} for turn in turns])
    return dict(id=batch["id"], answers=kept)

def answer_locally(sampler, o, batch):
    """A row of the log: the answers of a batch by the model that was loaded."""
    torch.manual_seed(batch["seed"])

    def reply(chats):
        how = o.max_new_tokens, batch["temperature"], o.top_p
        return sample_batch(sampler, chats, *how)

    return log_row(batch, converse(reply, batch["prompts"]))

def answer_by_server(server, o, batch):
    """A row of the log: the answers of a batch by a chat server."""
    params = dict(temperature=batch["temperature"], top_p=o.top_p, seed=batch["seed"])
    params["max_tokens"] = o.max_new_tokens or 1024

    def reply(chats):
        return [ask(server, as_chat(chat), **params) for chat in chats]

    return log_row(batch, converse(reply, batch["prompts"]))

def first_error(turns):
    """The server's words where one of a prompt's answers is missing, or ""."""
    return next((answer["error"] for answer in turns if answer["error"]), "")

def partial_answers(path, batches):
    """What an interrupted command of the same arguments has left; missing answers are not kept."""
    try:
        rows = read_log(path)
    except ValueError:
        return {}
    done = {}
    for batch in batches:
        row = rows.get(batch["id"])
        if row and not any(first_error(turns) for turns in row["answers"]):
            done[batch["id"]] = row
    return done

def alpaca_eval_rows(prompts, answers, n, name):
    """AlpacaEval's four keys, and what they do not tell."""
    rows = []
    for i, prompt in enumerate(prompts):
        for s in range(n):
            (answer,) = answers[i, s]
            row = dict(dataset=prompt["dataset"], instruction=as_text(prompt["prompt"]))
            row |= dict(output=answer["text"], generator=name, ended=answer["ended"], sample=s)
            row["prompt"] = prompt["prompt"]
            if answer["error"]:
                row["error"] = answer["error"]
            rows.append(row)
    return rows

def fastchat_rows(prompts, answers, n, name):
    """FastChat's rows of model_answer: a choice for each sample, a text for each turn."""
    rows = []
    for i, prompt in enumerate(prompts):
        choices = []
        for s in range(n):
            choices.append(dict(index=s, turns=[answer["text"] for answer in answers[i, s]]))
        row = dict(question_id=prompt["question_id"], answer_id=uuid.uuid4().hex, model_id=name)
        rows.append(row | dict(choices=choices, tstamp=time.time()))
    return rows

def load_answerer(o, prompts):
    """The function that answers a batch: batch -> row of the log."""
    kind, _, base_url = o.model.partition(":")
    if kind == "chat":
        server = open_server(base_url, o.model_name, o.model_params)
        return partial(answer_by_server, server, o)
    sampler = load_sampler(o.model, o.dtype)
    if not sampler[1].chat_template and any(prompt["later"] for prompt in prompts):
        raise ValueError(f"{o.model} has no chat template: it cannot be asked a second turn")
    return partial(answer_locally, sampler, o)

def report_answers(out, path, answers):
    ended = np.mean([answer["ended"] for answer in answers])
    print(f"{out}: {len(answers)} answers, {ended:.0%} of them came to an end")
    error = first_error(answers)
    if not error:
        os.remove(path)
        return
    missing = sum(bool(answer["error"]) for answer in answers)
    print(f"{missing} answers are missing, the same command asks for them again; first: {error}")

def generate(o):
    """
    Answers to prompts: AlpacaEval's model_outputs.json or, for FastChat's questions, its rows of
    model_answer. The stem of --out names the model. A command that was interrupted goes on from
    OUT.partial, with the same draws.
    """
    if (o.data is None) == (o.prompts is None):
        raise ValueError("generate needs one of --data and --prompts")
    check_writable(o.out)
    prompts = load_prompts(o.data or o.prompts)[: o.limit]
    batches = plan_batches(prompts, o)
    path = f"{o.out}.partial"
    work = load_answerer(o, prompts)
    workers = o.workers if o.model.startswith("chat:") else 1
    rows = run_jobs(batches, work, path, partial_answers(path, batches), workers, "batch")

    answers = {}
    for batch in batches:
        answers |= dict(zip(batch["which"], rows[batch["id"]]["answers"]))
    name = Path(o.out).stem
    if prompts[0]["question_id"] is None:
        lines = json_lines(alpaca_eval_rows(prompts, answers, o.n, name)).splitlines()
        write_file(o.out, "[\n" + ",\n".join(lines) + "\n]\n")
    else:
        write_file(o.out, json_lines(fastchat_rows(prompts, answers, o.n, name)))
    report_answers(o.out, path, [answer for turns in answers.values() for answer in turns])

# ------------------------------------------------------------------------------------------------
# winrate

def load_outputs(path):
    """
    (model, {(question number, sample number): answer}) of a file in AlpacaEval's layout. The n
    samples of a question are n rows, whose "sample" counts from 0.
    """
    names, answers, question = set(), {}, 0
    for where, row in read_rows(path):
        for key in ("instruction", "output", "generator"):
            if not isinstance(row.get(key), str):
                raise ValueError(f"{where}: {key} is no text but {str(row.get(key))[:80]!r}")
        number = row.get("sample", 0)
        if not isinstance(number, int):
            raise ValueError(f"{where}: sample is no number but {str(number)[:80]!r}")
        prompt = parse_prompt(where, row)
        if number == 0:
            question += 1
        elif answers.get((question, number - 1), {}).get("prompt") != prompt:
            raise ValueError(f"{where}: sample {number} must follow {number - 1} of its prompt")
        answer = dict(prompt=prompt, text=row["output"], error=str(row.get("error") or ""))
        answer["ended"] = row.get("ended", True) is True
        answers[question, number] = answer
        names.add(row["generator"])
    if len(names) > 1:
        raise ValueError(f"{path} holds answers of several models: {', '.join(sorted(names))}")
    return names.pop(), answers

def load_all_outputs(paths):
    """{model: {(question, sample): answer}}; ValueError unless all answer the same prompts."""
    outputs = {}
    for path in paths:
        name, answers = load_outputs(path)
        if name in outputs:
            raise ValueError(f"{path} is a second file of the model {name}")
        outputs[name] = answers
    asked = []
    for answers in outputs.values():
        asked.append([(key, as_text(answer["prompt"])) for key, answer in answers.items()])
    for other in asked[1:]:
        for a, b in itertools.zip_longest(asked[0], other):
            if a != b:
                raise ValueError(f"different prompts in {', '.join(paths)}; the first: {a}, {b}")
    return outputs

def winrate_jobs(outputs, o):
    """A job for each pair of models and each prompt: its answers, and how its row begins."""
    identity = judge_identity(o)
    jobs = []
    for model_1, model_2 in itertools.combinations(sorted(outputs), 2):
        for key, answer_1 in outputs[model_1].items():
            answer_2 = outputs[model_2][key]
            row = dict(question_id=key[0], sample=key[1], turn=1, model_1=model_1, model_2=model_2)
            row["judge"] = [o.judge_model or o.judge, "pair"]
            if o.games == 1:
                # drawn for each game by itself, so that an interrupted command draws the same
                rng = random.Random(f"{o.seed} {key} {model_1} {model_2}")
                row["first"] = rng.choice(["model_1", "model_2"])
            id = digest(row, answer_1, answer_2, *identity)
            jobs.append(dict(id=id, row={"id": id} | row, answers=(answer_1, answer_2)))
    return jobs

def read_judgments(paths):
    """The rows of files in FastChat's pairwise layout; equal questions of two files are two."""
    rows = []
    for path in dict.fromkeys(paths):
        for where, row in read_rows(path):
            for key in ("g1_winner", "g2_winner"):
                if row.get(key) not in VERDICTS:
                    known = ", ".join(VERDICTS)
                    raise ValueError(f"{where}: {key} is {row.get(key)!r}, none of {known}")
            for key in ("model_1", "model_2"):
                if not isinstance(row.get(key), str):
                    raise ValueError(f"{where}: {key} is no text but {row.get(key)!r}")
            if row["model_1"] == row["model_2"]:
                raise ValueError(f"{where}: {row['model_1']} plays against itself")
            if not isinstance(row.get("question_id"), (int, str)):
                raise ValueError(f"{where}: question_id is {row.get('question_id')!r}")
            rows.append(row | dict(question_id=f"{path} {row['question_id']}"))
    return rows

def row_point(row, model):
    """
    What a row gives to one of its models: 1 if both games name it, 0 if both name the other, half
    for a tie and where the games disagree; None if a game has no verdict.
    """
    winners = {row["g1_winner"], row["g2_winner"]}
    if "error" in winners:
        return None
    if len(winners) > 1 or "tie" in winners:
        return 0.5
    return 1.0 if row[winners.pop()] == model else 0.0

def points_by_question(rows, a, b):
    """({question: points of model a against b, a list}, number of rows without a verdict)."""
    points, errors = {}, 0
    for row in rows:
        if {row["model_1"], row["model_2"]} != {a, b}:
            continue
        point = row_point(row, a)
        if point is None:
            errors += 1
        else:
            points.setdefault(row["question_id"], []).append(point)
    return points, errors

def bootstrap(points):
    """
    (win rate, low, high) in percent: the mean over rows and its 95% interval, from resampling
    questions, whose rows (turns, samples) are not independent.
    """
    # in a fixed order, for rows come in that of the judge's replies; (questions, 2)
    sums = [[sum(points[name]), len(points[name])] for name in sorted(points, key=str)]
    sums = np.array(sums)
    total, count = sums.sum(0)
    drawn = sums[resamples(len(sums))].sum(1)  # (2000, 2)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    return 100 * total / count, 100 * low, 100 * high

def print_win_rates(rows, names, characters):
    """The matrix of win rates, and a row with interval and counts for each pair of models."""
    matrix = {(name, name): "50.00" for name in names}
    table = []
    for a, b in itertools.combinations(names, 2):
        points, errors = points_by_question(rows, a, b)
        counts = Counter(itertools.chain(*points.values()))
        counts = [counts[1.0], counts[0.5], counts[0.0], errors, len(points)]
        if not points:
            table.append([f"{a} against {b}", "-", "-", *counts])
            continue
        rate, low, high = bootstrap(points)
        matrix[a, b], matrix[b, a] = f"{rate:.2f}", f"{100 - rate:.2f}"
        table.append([f"{a} against {b}", f"{rate:.2f}", f"{low:.2f} to {high:.2f}", *counts])

    square = []
    for a in names:
        square.append([a, *[matrix.get((a, b), "-") for b in names], characters.get(a, "-")])
    print_table("win rate, percent, row against column", ["", *names, "characters"], square)
    header = ["", "win rate", "95% interval", "wins", "ties", "losses", "errors", "prompts"]
    print_table("each pair of models; rows with errors are left out", header, table)

def play_games(outputs, o):
    """The rows of all games that --judge decides."""
    if len(outputs) < 2:
        raise ValueError("winrate needs files of two models or more to play games")
    kind = o.judge.partition(":")[0]
    path = o.out or os.path.join(os.path.dirname(o.outputs[0]), f"judgments_{kind}.jsonl")
    check_writable(path)
    jobs = winrate_jobs(outputs, o)
    done = earlier_rows(path, jobs)
    work = partial(play, load_judge(o))
    workers = o.workers if kind == "chat" else 1
    return list(run_jobs(jobs, work, path, done, workers, "row").values())

def winrate(o):
    """
    Win rates of every pair of models on the same prompts, with 95% intervals. A row is a win only
    if the games in both orders name the same model, a tie or a disagreement is half. Judgments go
    to --out as they come; a command that was interrupted goes on, and games without a verdict are
    played again.
    """
    if bool(o.judge) == bool(o.judgments):
        raise ValueError(
            "winrate needs one of --judge (gold, reward:HF_MODEL or chat:URL), which plays games, "
            "and --judgments, which counts those that were played"
        )
    outputs = load_all_outputs(o.outputs)
    if o.judgments:
        rows = read_judgments(o.judgments)
    else:
        rows = play_games(outputs, o)
    names = list(outputs)
    for row in rows:
        names += [row["model_1"], row["model_2"]]
    names = list(dict.fromkeys(names))
    characters = {}
    for name, answers in outputs.items():
        mean = np.mean([len(answer["text"]) for answer in answers.values()])
        characters[name] = f"{mean:.0f}"
    print_win_rates(rows, names, characters)
    if all(lacks_verdict(row) for row in rows):
        # of one game alone the other's winner is a copy
        failed = [game for game in ("g1", "g2") if rows[0][f"{game}_winner"] == "error"]
        judgments = [rows[0].get(f"{game}_judgment") for game in failed]
        words = shortened(str(next(filter(None, judgments), "nothing")))
        raise ValueError(f"no row has its verdicts; the judge of the first says {words!r}")

# ------------------------------------------------------------------------------------------------
# label

def label_candidates(answers):
    """
    The answers of one prompt that may stand in a pair, or the reason why there are none. One that
    was cut at the limit may not: training would teach it as if it were finished.
    """
    finished = []
    for answer in answers:
        if answer["text"].strip() and answer["ended"] and not answer["error"]:
            finished.append(answer)
    distinct = {answer["text"]: answer for answer in finished}
    if len(finished) < 2:
        return "fewer than two finished answers"
    if len(distinct) < 2:
        return "identical answers"
    return list(distinct.values())

def label_jobs(groups, o):
    """(jobs, Counter of the prompts dropped by reason). A job: id, row, answers."""
    identity = judge_identity(o)
    jobs, dropped = [], Counter()
    for number, answers in groups.items():
        answers = label_candidates(answers)
        if isinstance(answers, str):
            dropped[answers] += 1
            continue
        # a chat judge compares the first two that differ, a reward ranks all
        if o.judge.startswith("chat:"):
            answers = answers[:2]
        id = digest(number, answers, *identity)
        row = dict(id=id, question_id=number, model_1="first answer", model_2="second answer")
        jobs.append(dict(id=id, row=row, answers=answers))
    return jobs, dropped

def score_all(score, job):
    """A row with the reward of each answer."""
    scores = [score(answer) for answer in job["answers"]]
    return dict(id=job["id"], question_id=job["row"]["question_id"], scores=scores)

def choose(job, row, o):
    """(chosen answer, rejected answer, further keys of the record), or the reason to drop it."""
    if "scores" not in row:
        point = row_point(row, "first answer")
        if point is None:
            return "no verdict"
        if point == 0.5:
            return "tie, or the two orders disagree"
        first, second = job["answers"]
        return (first, second, {}) if point == 1 else (second, first, {})

    scores = row["scores"]
    if any(math.isnan(score) for score in scores):
        return "reward is no number"
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    difference = scores[best] - scores[worst]
    if difference == 0:
        return "tie"
    # the coin of the toy world's own pairs; drawn for each prompt by itself
    rng = random.Random(f"{o.seed} {job['id']}")
    if o.coin and rng.random() >= 1 / (1 + math.exp(-3 * difference)):
        best, worst = worst, best
    rewards = dict(reward_chosen=scores[best], reward_rejected=scores[worst])
    return job["answers"][best], job["answers"][worst], rewards

def make_record(chosen, rejected, further):
    """A pair in the layout of train.jsonl: messages, or plain texts for a plain-text prompt."""
    prompt = chosen["prompt"]
    if isinstance(prompt, str):
        record = dict(prompt=prompt, chosen=chosen["text"], rejected=rejected["text"])
    else:
        record = dict(prompt=prompt)
        record["chosen"] = [assistant(chosen["text"])]
        record["rejected"] = [assistant(rejected["text"])]
    return record | further

def label(o):
    """
    Preference pairs from two or more samples of each prompt, a file of generate --n 2: the best
    against the worst by reward, or the first two that differ by a chat judge, whose two orders
    must agree. Writes train.jsonl and meta.json, and keeps the judgments in judgments.jsonl: a
    command that was interrupted goes on from there.
    """
    if o.coin and o.judge.startswith("chat:"):
        raise ValueError("--coin needs differences of rewards, which a chat judge does not give")
    path = f"{o.out}/judgments.jsonl"
    if os.path.exists(f"{o.out}/train.jsonl") and not os.path.exists(path):
        raise ValueError(f"--out {o.out} holds other pairs: choose another folder")
    groups = {}
    for (number, _), answer in load_outputs(o.outputs)[1].items():
        groups.setdefault(number, []).append(answer)
    if max(len(answers) for answers in groups.values()) < 2:
        raise ValueError(f"{o.outputs} has one answer a prompt, label needs generate --n 2 or more")
    check_writable(path)

    jobs, dropped = label_jobs(groups, o)
    done = earlier_rows(path, jobs)
    if o.judge.startswith("chat:"):
        work, workers = partial(play, load_judge(o)), o.workers
    else:
        work, workers = partial(score_all, load_score(o)), 1
    rows = run_jobs(jobs, work, path, done, workers, "prompt")
    records = []
    for job in jobs:
        choice = choose(job, rows[job["id"]], o)
        if isinstance(choice, str):
            dropped[choice] += 1
        else:
            records.append(make_record(*choice))
    if not records:
        raise ValueError(f"{o.outputs} makes no pair, dropped: {dict(dropped)}; see {path}")
    write_file(f"{o.out}/train.jsonl", json_lines(records))
    arguments = dict(judge=o.judge, judge_model=o.judge_model, coin=o.coin, seed=o.seed)
    source = f"eval.py label {o.outputs}"
    meta = describe(source, arguments, len(groups), records, [], dropped)
    write_file(f"{o.out}/meta.json", json.dumps(meta, indent=2) + "\n")
    print(f"{o.out}/train.jsonl: {len(records)} pairs, dropped {dict(dropped)}")

# ------------------------------------------------------------------------------------------------
# plot

PANEL_TITLES = {
    "eval/logps/chosen": "log-prob of chosen responses, nats\nheld-out pairs",
    "eval/logps/chosen_vs_ref": "chosen log-prob minus the reference's,\nnats, held-out pairs",
    "train/logps/chosen": "log-prob of chosen responses, nats\ntraining pairs",
    "train/logps/chosen_vs_ref": "chosen log-prob minus the reference's,\nnats, training pairs",
    "gold": "true reward of samples",
    "kl": "KL(policy || reference), nats a response",
}
# colours of Okabe and Ito, which the colour-blind can tell apart, and line styles, which print can
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLES = ["-", "--", "-.", ":"]

def load_curves(run):
    """{metric: {step: value}} of a run folder; what prefs measured wins over the run's own rows."""
    curves = {}
    for name in ("metrics.jsonl", *PREFS_FILE.values()):
        file = f"{run}/{name}"
        if not os.path.exists(file):
            continue
        for where, row in read_rows(file):
            if not isinstance(row.get("step"), int):
                raise ValueError(f"{where} has no step")
            for metric, value in row.items():
                if isinstance(value, (int, float)):
                    curves.setdefault(metric, {})[row["step"]] = value
    if not curves:
        raise ValueError(f"{run} is no folder of a run: it holds no row of metrics.jsonl")
    return curves

def group_runs(runs):
    """{name of a setting: [curves of each seed]}: runs whose paths differ in -s<seed> alone."""
    settings = {}
    for run in runs:
        path = re.sub(r"-s\d+$", "", os.path.normpath(run))
        settings.setdefault(path, []).append(load_curves(run))
    # the last part of a path names a setting, unless two would then look like one
    names = [os.path.basename(path) for path in settings]
    if len(set(names)) < len(names):
        names = list(settings)
    return dict(zip(names, settings.values()))

def mean_curve(seeds, metric):
    """(steps, mean, standard deviation) over the seeds that have the metric, or None."""
    curves = [curves[metric] for curves in seeds if metric in curves]
    if not curves:
        return None
    steps = sorted(set.intersection(*[set(curve) for curve in curves]))
    if not steps:
        raise ValueError(f"no step of {metric} is in all runs of a setting")
    values = np.array([[curve[step] for step in steps] for curve in curves])  # (seeds, steps)
    sd = values.std(0, ddof=1) if len(curves) > 1 else np.zeros(len(steps))
    return steps, values.mean(0), sd

def draw(settings, panels):
    """A figure with a panel for each metric, readable when it is 700 pixels wide."""
    from matplotlib.figure import Figure

    width = min(2, len(panels))
    height = math.ceil(len(panels) / width)
    figure = Figure(figsize=(3.6 * width, 2.7 * height + 0.5), layout="constrained")
    axes = figure.subplots(height, width, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, metric in zip(axes, panels):
        for k, (name, seeds) in enumerate(settings.items()):
            curve = mean_curve(seeds, metric)
            if curve is None:
                continue
            steps, mean, sd = curve
            color, style = COLORS[k % len(COLORS)], STYLES[k % len(STYLES)]
            axis.plot(steps, mean, color=color, linestyle=style, label=name)
            # no KL is below 0, whatever its spread over seeds
            low = np.maximum(mean - sd, 0) if metric == "kl" else mean - sd
            axis.fill_between(steps, low, mean + sd, color=color, alpha=0.15, linewidth=0)
        axis.set_title(PANEL_TITLES[metric], fontsize=9)
        axis.set_xlabel("step", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    # below the panels, where it hides no line
    lines = {}
    for axis in axes:
        lines |= {line.get_label(): line for line in axis.lines}
    how = dict(loc="outside lower center", ncols=min(4, len(lines)), frameon=False, fontsize=9)
    figure.legend(lines.values(), lines.keys(), **how)
    return figure

def over_runs(values):
    """Mean±standard deviation as a cell of a table."""
    if not values:
        return "-"
    spread = f"±{np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"

def at_end(curve):
    return curve[max(curve)]

def highest(curve):
    return max(curve.values())

def print_over_runs(title, settings, columns):
    """A row a setting; a column is (metric, its title, what to take of a curve)."""
    table = []
    for setting, seeds in settings.items():
        line = [setting, len(seeds)]
        for metric, _, value in columns:
            line.append(over_runs([value(curves[metric]) for curves in seeds if metric in curves]))
        table.append(line)
    header = ["setting", "runs", *[column for _, column, _ in columns]]
    print_table(f"{title}, mean±sd over runs", header, table)

def print_ends(settings, known):
    """The last values of all curves, and gold's highest: on pairs, then on samples."""
    pairs = [(PREFIX["test"] + name, title, at_end) for name, title in PAIR_METRICS.items()]
    samples = [(name, title, at_end) for name, title in SAMPLE_METRICS.items()]
    samples.append(("gold", "best gold", highest))
    for title, columns in (("pairs at the end", pairs), ("samples at the end", samples)):
        columns = [column for column in columns if column[0] in known]
        if columns:
            print_over_runs(title, settings, columns)

def plot(o):
    """
    Curves against the training step: the chosen log-prob on pairs, and the true reward and KL of
    samples where prefs has measured them. Runs whose paths differ in -s<seed> alone are seeds of
    one setting: their mean, and a band of one standard deviation.
    """
    if Path(o.out).suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--out {o.out} is no .png, .pdf or .svg")
    check_writable(o.out)
    settings = group_runs(o.runs)
    known = set()
    for seeds in settings.values():
        for curves in seeds:
            known |= curves.keys()
    panels = []
    for split in o.split:
        metric = f"{PREFIX[split]}logps/{o.metric}"
        if metric not in known:
            how = "train with --eval_every, or run prefs" if split == "test" else "run prefs"
            raise ValueError(f"no run has {metric}: {how} --split {split}")
        panels.append(metric)
    panels += [metric for metric in ("gold", "kl") if metric in known]
    figure = draw(settings, panels)
    with written_aside(o.out) as aside:
        figure.savefig(aside, dpi=200, format=Path(o.out).suffix[1:].lower())
    print_ends(settings, known)

# ------------------------------------------------------------------------------------------------
# the command line

class Parser(argparse.ArgumentParser):
    """Complaints are raised as one line, like all others."""

    def error(self, message):
        raise ValueError(f"{message} ({self.prog} --help explains the flags)")

def number(kind, low, high=math.inf):
    """The type of a flag: a number from low to high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    # argparse shows this name where kind itself complains
    parse.__name__ = kind.__name__
    return parse

SEED = number(int, 0, 2**32 - 1)

def temperature(text):
    return text if text == "mt_bench" else number(float, 0, 100)(text)

def json_object(text):
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value

def new_command(commands, function):
    """The parser of a command, whose docstring says what it is, then after [.:] how it works."""
    what, how = re.split("[.:] ", " ".join(function.__doc__.split()), maxsplit=1)
    parser = commands.add_parser(
        function.__name__,
        help=what.replace("%", "%%"),
        description=what,
        epilog=how[0].upper() + how[1:],
        formatter_class=partial(argparse.HelpFormatter, width=100, max_help_position=28),
        allow_abbrev=False,
    )
    parser.set_defaults(command=function)
    return parser

def add_dtype(add):
    how = dict(default="float32", choices=("float32", "bfloat16"))
    add("--dtype", help="of computation (default: %(default)s)", **how)

def add_judge(parser, required):
    add = parser.add_argument_group("the judge").add_argument
    add("--judge", required=required, help="gold (the toy world's reward), reward:HF_MODEL, "
        "or chat:BASE_URL of an OpenAI-compatible server, whose key is read from OPENAI_API_KEY")
    add("--judge_model", metavar="NAME", help="chat: the model to ask the server for")
    add("--judge_params", type=json_object, default={}, metavar="JSON",
        help="chat: merged into each request; null takes a parameter away")
    add("--judge_prompt", metavar="FILE", help="chat: the judge's system prompt; it must ask for a "
        "last line VERDICT: A, VERDICT: B or VERDICT: TIE, or for [[A]], [[B]] or [[C]] (a tie)")
    add("--workers", type=number(int, 1), default=8,
        help="chat: requests at a time (default: %(default)s)")
    add_dtype(add)

def add_sampling(parser):
    add = parser.add_argument_group("sampling").add_argument
    add("--max_new_tokens", type=number(int, 1), metavar="N",
        help="longest answer, in tokens (default: the model's own limit, or 1024)")
    add("--batch_size", type=number(int, 1), default=64, metavar="N",
        help="prompts at a time: sets the memory (default: %(default)s)")
    add("--seed", type=SEED, default=0, help="of the samples (default: %(default)s)")
    add_dtype(add)
    return add

def add_prefs(commands):
    parser = new_command(commands, prefs)
    add = parser.add_argument_group("what to measure").add_argument
    add("--model", nargs="+", required=True,
        help="models, or run folders: all checkpoints of a run, and step 0, what it began with")
    add("--ref_model", required=True, help="the reference: a Hugging Face folder or hub name")
    add("--data", required=True, help="folder with test.jsonl, and train.jsonl for --split train")
    add("--split", choices=("test", "train"), default="test",
        help="the pairs; train: no samples, into RUN/prefs_train.jsonl (default: %(default)s)")
    add("--pairs", type=number(int, 0), default=0, metavar="N",
        help="the first N pairs; 0: all (default: %(default)s)")
    add("--prompts", type=number(int, 0), default=256, metavar="N",
        help="the first N prompts are sampled for KL and gold; 0: none (default: %(default)s)")
    add("--beta", type=number(float, 0),
        help="scale of rewards (default: that of the run, or 0.1 if it has none)")
    add_sampling(parser)

def add_generate(commands):
    parser = new_command(commands, generate)
    add = parser.add_argument_group("prompts and answers").add_argument
    add("--data", metavar="DIR", help="folder whose test.jsonl holds the prompts; or instead")
    add("--prompts", metavar="FILE",
        help="records such as train.jsonl, AlpacaEval's instructions, FastChat's question.jsonl")
    add("--limit", type=number(int, 1), metavar="N", help="the first N prompts (default: all)")
    add("--n", type=number(int, 1), default=1,
        help="samples of each prompt (default: %(default)s)")
    add("--out", required=True, metavar="FILE", help="file to write, whose stem names the model")
    add = parser.add_argument_group("the model").add_argument
    add("--model", required=True,
        help="a Hugging Face folder or hub name; or chat:BASE_URL of an OpenAI-compatible server")
    add("--model_name", metavar="NAME", help="chat: the model to ask the server for")
    add("--model_params", type=json_object, default={}, metavar="JSON",
        help="chat: merged into each request; null takes a parameter away")
    add("--workers", type=number(int, 1), default=8,
        help="chat: requests at a time (default: %(default)s)")
    add = add_sampling(parser)
    add("--temperature", type=temperature, default=0.0,
        help="0: greedy; mt_bench: FastChat's, by category of a question (default: %(default)s)")
    add("--top_p", type=number(float, 0, 1), default=1.0,
        help="share of the likeliest tokens to sample from (default: %(default)s)")

def add_winrate(commands):
    parser = new_command(commands, winrate)
    add = parser.add_argument_group("answers and judgments").add_argument
    add("outputs", nargs="*", metavar="OUT", help="files of generate, or in AlpacaEval's layout")
    add("--judgments", nargs="+", default=[], metavar="FILE",
        help="in place of --judge: files in FastChat's pairwise layout to count")
    add("--out", metavar="FILE",
        help="judgments to write (default: judgments_JUDGE.jsonl beside the first OUT)")
    add("--games", type=int, choices=(1, 2), default=2,
        help="a prompt; 2: both orders, 1: one order, drawn by --seed (default: %(default)s)")
    add("--seed", type=SEED, default=0, help="of the orders of --games 1 (default: %(default)s)")
    add_judge(parser, required=False)

def add_label(commands):
    parser = new_command(commands, label)
    add = parser.add_argument_group("answers and pairs").add_argument
    add("outputs", metavar="OUT", help="a file of generate --n 2 or more")
    add("--out", required=True, metavar="DIR", help="data folder to write, for rpo.py --data")
    add("--coin", action="store_true", help="noise as in the toy world's own labels: the better "
        "answer is chosen with probability sigmoid(3 x difference of rewards)")
    add("--seed", type=SEED, default=0, help="of the coin (default: %(default)s)")
    add_judge(parser, required=True)

def add_plot(commands):
    parser = new_command(commands, plot)
    add = parser.add_argument_group("runs and figure").add_argument
    add("runs", nargs="+", metavar="RUN", help="run folders of rpo.py")
    add("--out", required=True, metavar="FILE", help="figure to write: .png, .pdf or .svg")
    add("--metric", choices=("chosen_vs_ref", "chosen"), default="chosen_vs_ref",
        help="log-prob of chosen responses, minus the reference's or not (default: %(default)s)")
    add("--split", nargs="+", choices=("test", "train"), default=["test"],
        help="held-out pairs, training pairs (after prefs --split train), or both (default: test)")

def main(argv=None):
    how = partial(argparse.RawDescriptionHelpFormatter, width=100, max_help_position=28)
    parser = Parser("eval.py", description=__doc__, formatter_class=how, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add_command in (add_prefs, add_generate, add_winrate, add_label, add_plot):
        add_command(commands)
    o = parser.parse_args(argv)
    o.command(o)

def run(argv=None):
    """Whatever goes wrong ends here, in one line; RPO_TRACEBACK=1 shows where it was raised."""
    try:
        main(argv)
    except (Exception, KeyboardInterrupt) as error:
        if "RPO_TRACEBACK" in os.environ:
            raise
        # the words of our own errors stand for themselves
        text = str(error)
        if type(error) not in (ValueError, ConnectionError):
            text = f"{type(error).__name__} {error}"
        if isinstance(error, KeyboardInterrupt):
            text = "interrupted; generate, winrate and label go on where they stopped"
        tqdm.write(f"error: {shortened(text, 700)}", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    run()
