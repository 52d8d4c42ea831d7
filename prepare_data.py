"""
Preference data for rpo.py: any common layout in, one plain layout out, in files people can read.

    python prepare_data.py                                  # the toy world and its tiny model
    python prepare_data.py --show 3                         # the same, and print three pairs
    python prepare_data.py ultrafeedback                    # a dataset of the Hugging Face hub
    python prepare_data.py my_pairs.jsonl --test_size 200   # a local file, 200 pairs held out
    python prepare_data.py data/toy --baseline answers.json --out data/toy-baseline

OUT/train.jsonl and OUT/test.jsonl hold one record, a pair of answers to a prompt, a line:
    {"prompt": [{"role": "user", "content": "..."}],
     "chosen": [{"role": "assistant", "content": "..."}],
     "rejected": [{"role": "assistant", "content": "..."}]}
or the same keys as plain strings, for models without a chat template. A record may also have a
"baseline", an answer like "chosen". OUT/meta.json counts what was kept, what was dropped, and why.

The toy world has requests such as "name three sea animals except crab in abc order", answers such
as "cod , seal and tuna ." and an exact reward, gold_reward. A minute of training there shows what
preference optimization does to the thing one really wants.
"""
import argparse
import csv
import gzip
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import statistics
import sys
import zlib
from collections import Counter

from tqdm import tqdm

# torch, transformers, datasets and pyarrow take seconds to import. The functions that need them
# import them, so that --help and most refusals come at once.

# --------------------------------------------------------------------------------------------------
# any layout -> a record

FORMATS = (".json", ".jsonl", ".parquet", ".csv")
HUB = {
    "ultrafeedback": "HuggingFaceH4/ultrafeedback_binarized",
    "dpo-mix-7k": "argilla/dpo-mix-7k",
    "hh-rlhf": "Anthropic/hh-rlhf",
}
LAYOUTS = (
    "prompt + chosen + rejected (strings, messages or whole dialogues), "
    "chosen + rejected (whole dialogues, as messages or as text of 'Human:' and 'Assistant:' "
    "turns), conversations + chosen + rejected (ShareGPT)"
)

# Messages are {"role", "content"}; ShareGPT spells them {"from", "value"} and names other speakers.
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}
MESSAGE_KEYS = {"role", "content", "from", "value"}

# The reasons for which a row is dropped, as meta.json counts them.
UNKNOWN = "missing or unknown columns"
MALFORMED = "malformed turns"
EMPTY = "empty response"
IDENTICAL = "identical responses"
UNENDED = "no end token"

def message(role, content):
    return {"role": role, "content": content}

def clean(text):
    """JSON can spell half a surrogate pair. It has no place in a UTF-8 file and becomes "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")

def to_message(turn):
    """{role, content} or {from, value}, a dict, -> {"role", "content"}, two strings."""
    # A parquet file that mixes both spellings has all four keys in every turn, two of them None.
    role = turn.get("role") or turn.get("from")
    content = turn.get("content")
    if content is None:
        content = turn.get("value")

    # Content may come in parts, [{"type": "text", "text": "..."}, ...]. An image has no text.
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None

    if not isinstance(role, str) or role not in ROLES or not isinstance(content, str):
        raise ValueError(MALFORMED)
    return message(ROLES[role], clean(content))

def to_messages(turns):
    """A list of turns, however they are spelt, -> a list of messages."""
    for turn in turns:
        if not isinstance(turn, dict) or not MESSAGE_KEYS & turn.keys():
            raise ValueError(UNKNOWN)
    return [to_message(turn) for turn in turns]

def unpack(text):
    """A cell of a csv file may hold messages as JSON -> messages. Any other text stays a text."""
    # What str() makes of a list of messages, as pandas writes it, is not JSON: the row is dropped.
    key = r"'(role|from|content|value)': "
    if re.match(rf"\s*\[\{{{key}.*{key}", text):
        raise ValueError(MALFORMED)

    if not re.match(r"\s*\[\s*\{", text):
        return text
    try:
        turns = json.loads(text)
    except (ValueError, RecursionError):
        return text
    # Other JSON, such as an answer asked for as JSON, is a text. An unknown role is a fault.
    for turn in turns:
        if not isinstance(turn, dict):
            return text
        if not {"role", "content"} <= turn.keys() and not {"from", "value"} <= turn.keys():
            return text
    return to_messages(turns)

def read_cell(row, column):
    """-> a text, a list of turns, or None where the row has none; ValueError for anything else."""
    value = row.get(column)
    if isinstance(value, str):
        return unpack(clean(value))
    if isinstance(value, dict):
        return [value]
    if value is None or isinstance(value, list):
        return value
    raise ValueError(UNKNOWN)

def to_dialogue(answer):
    """An answer, a text or a list of turns, -> a list of messages."""
    if isinstance(answer, str):
        return [message("assistant", answer)]
    return to_messages(answer)

def from_strings(prompt, answers):
    """Raw text stays as it is, to the last blank."""
    return {"prompt": prompt, **answers}

def from_messages(prompt, answers):
    """The prompt as messages. The answers may be texts, messages, or dialogues that repeat it."""
    prompt = to_messages(prompt)
    record = {"prompt": prompt}
    for side, answer in answers.items():
        dialogue = to_dialogue(answer)
        repeats = dialogue[: len(prompt)] == prompt
        record[side] = dialogue[len(prompt) :] if repeats else dialogue
    return record

def from_dialogues(prompt, answers):
    """
    Whole dialogues, which share all but their last turn: what they share is the prompt. Datasets in
    the manner of UltraFeedback give the first request as well, as text; else `prompt` is None.
    """
    dialogues = {side: to_dialogue(answer) for side, answer in answers.items()}
    shared = dialogues["chosen"][:-1]

    # Some of Anthropic's pairs part earlier. These do not compare two answers to one prompt.
    if dialogues["rejected"][:-1] != shared:
        raise ValueError(MALFORMED)

    requests = [turn["content"].strip() for turn in shared if turn["role"] == "user"]
    if prompt is not None and requests[:1] != [prompt.strip()]:
        raise ValueError(MALFORMED)
    return from_messages(shared, dialogues)

def is_hh(prompt, answers):
    """Whether texts are Anthropic's dialogues. A prompt beside them is one that they repeat."""
    if isinstance(prompt, list):
        return False
    whole = ["\n\nHuman:" in "\n\n" + text.lstrip("\n") for text in answers.values()]
    if prompt is None:
        return whole[0]

    asked = prompt.strip()
    if asked and "Human:" not in asked:
        return False
    repeats = [text.lstrip().startswith(asked) for text in answers.values()]
    return all(whole) and all(repeats)

def from_hh(answers):
    """Anthropic's dialogues: "\\n\\nHuman: ... \\n\\nAssistant: ...", a text for each answer."""
    dialogues = {}
    for side, text in answers.items():
        # A speaker's name counts behind a blank line only: "Human:" inside a line is text.
        head, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip("\n"))
        if head.strip():
            raise ValueError(MALFORMED)
        speakers, contents = parts[::2], parts[1::2]
        roles = ["user" if speaker == "Human" else "assistant" for speaker in speakers]
        dialogues[side] = [message(role, text.strip()) for role, text in zip(roles, contents)]
    return from_dialogues(None, dialogues)

def by_layout(prompt, answers, as_chat=False):
    """
    Which layout is it? prompt: a text, a list of turns or None; answers: {side: text or list of
    turns}. Returns a record, of which the turns and texts are still to be checked.
    """
    all_texts = all(isinstance(answer, str) for answer in answers.values())
    if all_texts and is_hh(prompt, answers):
        return from_hh(answers)
    if all_texts and prompt is None:
        raise ValueError(UNKNOWN)
    if all_texts and isinstance(prompt, str) and not as_chat:
        return from_strings(prompt, answers)
    if isinstance(prompt, list):
        return from_messages(prompt, answers)

    # A text beside answers of one message each is their whole prompt; beside longer ones it is the
    # first request of dialogues.
    single = all(isinstance(answer, str) or len(answer) == 1 for answer in answers.values())
    if isinstance(prompt, str) and single:
        return from_messages([message("user", prompt)], answers)
    return from_dialogues(prompt, answers)

def add_system(prompt, system):
    """Puts the text of a row's system column, if it has one, in front of a list of messages."""
    has_one = any(turn["role"] == "system" for turn in prompt)
    if system and not has_one:
        prompt.insert(0, message("system", clean(str(system))))

def check_turns(record):
    """Raises ValueError unless user and assistant take turns and each answer is one message."""
    # Chat templates refuse two turns of one role in a row and a system prompt that comes late.
    prompt = record["prompt"]
    turns = prompt[1:] if prompt and prompt[0]["role"] == "system" else prompt
    roles = [turn["role"] for turn in turns]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise ValueError(MALFORMED)
    if not all(turn["content"].strip() for turn in turns):
        raise ValueError(MALFORMED)

    for side in record.keys() - {"prompt"}:
        if [turn["role"] for turn in record[side]] != ["assistant"]:
            raise ValueError(MALFORMED)

def content_of(messages):
    """The bare text of a prompt or an answer."""
    if isinstance(messages, str):
        return messages
    return "\n".join(turn["content"] for turn in messages)

def check_texts(record):
    """Raises ValueError unless all answers say something, and the two to compare say two things."""
    sides = record.keys() - {"prompt"}
    texts = {side: content_of(record[side]).strip() for side in sides}
    if not all(texts.values()):
        raise ValueError(EMPTY)
    if texts["chosen"] == texts["rejected"]:
        raise ValueError(IDENTICAL)

def to_record(row, as_chat=False):
    """
    A row of any known layout, a dict, -> its record. With as_chat plain strings become messages.
    Raises ValueError, whose text is the reason to drop the row.
    """
    # ShareGPT calls the prompt "conversations".
    prompt = read_cell(row, "prompt")
    if prompt is None:
        prompt = read_cell(row, "conversations")
    answers = {side: read_cell(row, side) for side in ("chosen", "rejected")}
    if row.get("baseline"):
        answers["baseline"] = read_cell(row, "baseline")
    if None in answers.values():
        raise ValueError(UNKNOWN)

    record = by_layout(prompt, answers, as_chat)
    if isinstance(record["prompt"], list):
        add_system(record["prompt"], row.get("system"))
        check_turns(record)
    check_texts(record)
    return record

def describe_columns(row):
    """A row's columns and what they hold, for whoever has to find out why no layout fits."""
    kinds = {str: "text", list: "list", dict: "object", int: "number", float: "number"}
    parts = []
    for column, value in row.items():
        kind = kinds.get(type(value), type(value).__name__)
        if isinstance(value, list) and value:
            kind = "list of " + kinds.get(type(value[0]), type(value[0]).__name__)
        parts.append(f"{column} ({kind})")
    return ", ".join(parts)

def to_records(rows, source, as_chat=False):
    """Rows -> (records, Counter of the dropped by reason). Raises ValueError if none is left."""
    records = []
    dropped = Counter()
    row = None
    for row in tqdm(rows, desc=f"convert {source}", unit=" rows", leave=False):
        try:
            records.append(to_record(row, as_chat))
        except ValueError as reason:
            dropped[str(reason)] += 1

    if row is None:
        raise ValueError(f"{source} holds no rows")
    if records:
        return records, dropped

    # Nothing is left: say why, from the last row.
    if set(dropped) != {UNKNOWN}:
        counts = ", ".join(f"{n} {reason}" for reason, n in dropped.items())
        raise ValueError(f"{source}: no pair left, dropped: {counts}")
    if "label" in row and not {"chosen", "rejected"} & row.keys():
        raise ValueError(
            f"{source} is unpaired (columns {', '.join(row)}): "
            "RPO needs two answers to a prompt, not one and a label"
        )
    raise ValueError(f"{source}: unknown layout, columns {describe_columns(row)}; known: {LAYOUTS}")

# --------------------------------------------------------------------------------------------------
# files and hub -> rows

def has_known_format(name):
    return name.lower().removesuffix(".gz").endswith(FORMATS)

def read_bytes(path):
    """A file's content, decompressed if its name ends in .gz."""
    with open(path, "rb") as file:
        data = file.read()
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a git-lfs pointer, not the data: run git lfs pull where it came from"
        )

    if path.lower().endswith(".gz") and data:
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} cannot be read as gzip: {error}") from error
    if not data.strip():
        raise ValueError(f"{path} is empty")
    return data

def parse_json(text, path, line=1):
    """A JSON text that begins in a file's given line -> what it spells."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{path} line {line}: nested too deeply for a pair") from error
    except ValueError as error:
        line += getattr(error, "lineno", 1) - 1
        raise ValueError(
            f"{path} line {line}: malformed JSON: {getattr(error, 'msg', error)}; "
            "it must be one array of objects, or one object a line"
        ) from error

def read_json(text, path):
    """One array of objects, or one object a line, -> rows."""
    # Rows may differ in their keys and types, a prompt being a text in one and messages in the
    # next. datasets and pyarrow refuse such files and pandas fills them up with NaN, hence json.
    if text.lstrip().startswith("["):
        rows = parse_json(text, path)
    else:
        # Not splitlines(): a JSON string may hold line separators other than "\n" as they are.
        lines = enumerate(text.split("\n"), 1)
        rows = [parse_json(line, path, number) for number, line in lines if line.strip()]

    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path} row {number}: not a JSON object")
    return rows

def read_csv(text, path):
    """Lines of cells below a header -> rows. Every cell stays a text: "NA" and "01" are answers."""
    # A quote that opens by mistake closes where it meets the next one, and what lies between, rows
    # perhaps, becomes one cell: '"a, b\nc, "d"'. Python's csv in its strict mode refuses that text
    # follows a closing quote, or that the file ends inside a cell. pandas refuses the second only.
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    line = 1
    try:
        # Columns without a name may be several; they go.
        names = [name for name in reader.fieldnames or [] if name]
        line = reader.line_num + 1
        if len(set(names)) < len(names):
            raise ValueError(f"{path}: two columns have one name: {', '.join(names)}")
        for row in reader:
            # DictReader files cells beyond the header under None.
            surplus = row.pop(None, [])
            if any(surplus):
                raise ValueError(
                    f"{path} line {line}: more cells than the header has; "
                    "an answer with a comma in it needs quotes around it"
                )
            row.pop("", None)
            rows.append(row)
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}: the row that begins in line {line} cannot be read: {error}; "
            "does it hold a quote that does not close?"
        ) from error
    return rows

def read_parquet(data, path):
    # pyarrow comes with datasets, whose own reader leaves a copy of all it reads in a cache.
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error

def read_file(path):
    """One local file -> its rows, a list of dicts."""
    data = read_bytes(path)
    name = path.lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        return read_parquet(data, path)

    try:
        # Some programs put a byte order mark in front, which "utf-8-sig" takes off.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from error
    return read_csv(text, path) if name.endswith(".csv") else read_json(text, path)

def choose_files(folder):
    """The names of a folder's files -> (to train on, to test on, others), sorted lists."""
    # The hub's own names count, such as train_prefs-00000-of-00001.parquet; train_sft has no pairs.
    names = sorted(name for name in os.listdir(folder) if has_known_format(name))
    rest_of_name = r"(_prefs)?(-\d+-of-\d+[^.]*)?\."
    train = [name for name in names if re.match("train" + rest_of_name, name, re.IGNORECASE)]
    test = [name for name in names if re.match("test" + rest_of_name, name, re.IGNORECASE)]
    others = [name for name in names if name not in train + test]
    if train:
        return train, test, others

    # No file is called train: all are to train on, unless a name gives reason to doubt it.
    if not others:
        kind = "train file" if test else "file"
        raise ValueError(f"{folder}: no {kind} that ends in {', '.join(FORMATS)}, plain or .gz")
    held_out_name = r"(^|[-_.])(test|val|valid|validation|eval|dev)[-_.]"
    if len(others) > 1 and any(re.search(held_out_name, name.lower()) for name in others):
        raise ValueError(
            f"{folder}: which of {', '.join(names)} is to train on? "
            "name that one train, another test"
        )
    return others, test, []

def read_files(folder, names):
    return [row for name in names for row in read_file(os.path.join(folder, name))]

def read_folder(folder):
    """-> (rows to train on, rows of the folder's own test split or None)."""
    train, test, others = choose_files(folder)
    if others:
        tqdm.write(f"{folder}: not read: {', '.join(others)}")
    return read_files(folder, train), read_files(folder, test) if test else None

def read_hub(source):
    """-> (rows to train on, rows of the dataset's own test split or None)."""
    import datasets
    import huggingface_hub

    name = HUB.get(source, source)
    # The hub's retries would bury the one line that matters.
    huggingface_hub.logging.set_verbosity_error()
    try:
        splits = datasets.load_dataset(name)
    except Exception as error:
        # The hub fails in a dozen unrelated types.
        raise ValueError(
            f"no file or folder {source}, and the hub dataset {name} cannot be loaded: {error}"
        ) from error

    train = splits.get("train_prefs", splits.get("train"))
    if train is None:
        raise ValueError(f"{source} has no split train_prefs or train, but {', '.join(splits)}")
    return train, splits.get("test_prefs", splits.get("test"))

def read_source(source):
    """A local file or folder, or a hub dataset -> (rows to train on, rows to test on or None)."""
    if source in HUB:
        return read_hub(source)
    if os.path.isdir(source):
        return read_folder(source)
    if os.path.exists(source):
        if not has_known_format(source):
            raise ValueError(f"{source}: no file that ends in {', '.join(FORMATS)}, plain or .gz")
        return read_file(source), None

    # What looks like a path is not looked for on the hub, whose names are "owner/name".
    if has_known_format(source) or source.count("/") > 1 or source.startswith(("/", ".", "~")):
        raise ValueError(f"no file or folder {source}")
    return read_hub(source)

# --------------------------------------------------------------------------------------------------
# records -> files

def describe(source, arguments, read, train, test, dropped):
    """What meta.json says of the data. Lengths are in characters."""
    records = train + test
    lengths = {
        part: [len(content_of(record[part])) for record in records]
        for part in ("prompt", "chosen", "rejected")
    }
    characters = {
        part: {"mean": statistics.fmean(n), "median": statistics.median(n), "max": max(n)}
        for part, n in lengths.items()
    }
    unequal = [(c, r) for c, r in zip(lengths["chosen"], lengths["rejected"]) if c != r]
    longer = statistics.fmean(c > r for c, r in unequal) if unequal else None

    seen = {json.dumps(record["prompt"]) for record in train}
    leaked = sum(json.dumps(record["prompt"]) in seen for record in test)
    return {
        "source": source,
        "arguments": arguments,
        "pairs read": read,
        "dropped": dict(sorted(dropped.items())),
        "left out by limits": read - dropped.total() - len(records),
        "kept": {"train": len(train), "test": len(test)},
        "test pairs whose prompt is in train, too": leaked,
        "longer response is the chosen one": longer,
        "characters": characters,
    }

def read_meta(folder):
    """What a data folder's meta.json holds, a dict, empty where there is none to be read."""
    try:
        with open(f"{folder}/meta.json", encoding="utf-8") as file:
            meta = json.load(file)
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}

def write_json_lines(path, things, indent=None):
    with open(path, "w", encoding="utf-8", errors="replace", newline="\n") as file:
        for thing in things:
            file.write(json.dumps(thing, ensure_ascii=False, indent=indent) + "\n")

def fill_stage(stage, train, test, meta, model=None, tokenizer=None):
    """Writes a data folder's files, and the toy's model, into the empty folder `stage`."""
    write_json_lines(f"{stage}/train.jsonl", train)
    if test:
        write_json_lines(f"{stage}/test.jsonl", test)
    write_json_lines(f"{stage}/meta.json", [meta], indent=2)
    if model is None:
        return

    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(f"{stage}/model")
    tokenizer.save_pretrained(f"{stage}/model")
    # safetensors makes files that only their owner can read. The umask is to decide, as it did
    # for the file beside it.
    shutil.copymode(f"{stage}/meta.json", f"{stage}/model/model.safetensors")

def move_stage(stage, out):
    """Moves what `stage` holds to its place in the folder `out`, meta.json last."""
    os.makedirs(out, exist_ok=True)
    names = sorted(os.listdir(stage), reverse=True)
    for name in names:
        # A folder cannot be renamed onto another: the old model goes with the stage.
        if name == "model" and os.path.exists(f"{out}/model"):
            os.rename(f"{out}/model", f"{stage}/old_model")
        os.replace(f"{stage}/{name}", f"{out}/{name}")

    # A test file that an earlier call has left is not of these pairs.
    if "test.jsonl" not in names and os.path.exists(f"{out}/test.jsonl"):
        os.remove(f"{out}/test.jsonl")

def write(out, train, test, meta, model=None, tokenizer=None):
    """All files are made beside OUT and moved at the end: a run cut short leaves OUT as it was."""
    stage = f"{out}.partial"
    try:
        shutil.rmtree(stage, ignore_errors=True)
        os.makedirs(stage)
        fill_stage(stage, train, test, meta, model, tokenizer)
        move_stage(stage, out)
    except Exception as error:
        # A full disk is an OSError for Python and a type of its own for safetensors.
        raise OSError(f"cannot write {out}: {error}") from error
    finally:
        # On a full disk, what is left here would keep it full.
        shutil.rmtree(stage, ignore_errors=True)

def hold_out(records, own_test, limit, test_size, seed):
    """
    -> (train, test), drawn by the seed, each in the source's order. The test records come from
    the source's own test split where it has one, and `own_test` is not None.
    """
    rng = random.Random(seed)
    order = rng.sample(range(len(records)), len(records))
    if own_test is not None:
        size = len(own_test) if test_size is None else min(test_size, len(own_test))
        drawn = rng.sample(range(len(own_test)), size)
        test = [own_test[i] for i in sorted(drawn)]
    else:
        size = min(500, len(records) // 10) if test_size is None else test_size
        if size >= len(records):
            raise ValueError(f"--test_size {size} leaves none of {len(records)} pairs to train on")
        test = [records[i] for i in sorted(order[:size])]
        order = order[size:]
    return [records[i] for i in sorted(order[:limit])], test

def prepare(source, out, limit=None, test_size=None, seed=42):
    """
    Writes the pairs of `source`, a local file or folder or a hub dataset, to the folder `out`.
    Returns meta (dict) and the training records (list of dicts).
    """
    rows, own_test = read_source(source)
    # A system prompt beside plain strings makes a chat of them, and then of all such rows: records
    # of two kinds in one file would be two kinds of training.
    both = itertools.chain(rows, own_test or [])
    as_chat = any(row.get("system") and isinstance(row.get("chosen"), str) for row in both)

    records, dropped = to_records(rows, source, as_chat)
    read = len(records) + dropped.total()
    if own_test is not None:
        own_test, also_dropped = to_records(own_test, f"{source}, test split", as_chat)
        read += len(own_test) + also_dropped.total()
        dropped += also_dropped

    train, test = hold_out(records, own_test, limit, test_size, seed)
    arguments = {"limit": limit, "test_size": test_size, "seed": seed}
    meta = describe(source, arguments, read, train, test, dropped)
    write(out, train, test, meta)
    return meta, train

# --------------------------------------------------------------------------------------------------
# another baseline policy

def as_text(prompt):
    """A prompt as one text: a lone message's content, or paragraphs of "role: content"."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)

def read_answers(path):
    """A file that `eval.py generate` wrote -> {prompt as text: its first answer with an end}."""
    answers = {}
    for number, row in enumerate(read_file(path), 1):
        instruction, output = row.get("instruction"), row.get("output")
        if not isinstance(instruction, str) or not isinstance(output, str):
            raise ValueError(
                f"{path} row {number} has no instruction and output: "
                "an answers file is one that eval.py generate wrote"
            )
        # Training puts an end token behind each answer. One that was cut short must not get it.
        if row.get("ended", True) and output.strip():
            answers.setdefault(instruction, output)
    return answers

def read_records(path):
    """The records of a data folder's file, with all their keys."""
    records = read_file(path)
    for number, record in enumerate(records, 1):
        if not {"prompt", "chosen", "rejected"} <= record.keys():
            raise ValueError(f"{path} row {number} has no prompt, chosen and rejected")
        if isinstance(record["prompt"], str):
            continue
        try:
            record["prompt"] = to_messages(record["prompt"])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} row {number} has a prompt of no known kind") from error
    return records

def add_baseline(records, answers):
    """Gives each record whose prompt has an answer that answer as baseline. Returns the others."""
    without = []
    for record in records:
        text = answers.get(as_text(record["prompt"]))
        if text is None:
            without.append(record)
        elif isinstance(record["prompt"], str):
            record["baseline"] = text
        else:
            record["baseline"] = [message("assistant", text)]
    return without

def fill_baseline(folder, path, out):
    """
    Copies the pairs of the data folder `folder` to `out`, with the answers in `path` as baselines:
    what the SFT term of docs/changes/baseline.diff imitates in place of the chosen responses. Every
    training pair needs an answer; test pairs without one stay as they are. Returns meta (dict) and
    the training records.
    """
    if not os.path.exists(f"{folder}/train.jsonl"):
        raise ValueError(
            f"--baseline fills a folder that prepare_data.py wrote, and {folder}/train.jsonl "
            "does not exist"
        )
    train = read_records(f"{folder}/train.jsonl")
    has_test = os.path.exists(f"{folder}/test.jsonl")
    test = read_records(f"{folder}/test.jsonl") if has_test else []

    answers = read_answers(path)
    without = add_baseline(train, answers)
    if without:
        raise ValueError(
            f"{path} answers all but {len(without)} of {len(train)} training pairs, such as "
            f"{as_text(without[0]['prompt'])[:60]!r}: eval.py generate answers them with "
            f"--prompts {folder}/train.jsonl"
        )
    test_without = add_baseline(test, answers)

    meta = {"source": folder, **read_meta(folder)}
    filled = {"train": len(train), "test": len(test) - len(test_without)}
    meta["baseline"] = {"answers": path, "filled": filled}
    write(out, train, test, meta)
    return meta, train

# --------------------------------------------------------------------------------------------------
# the toy world

WORLD = {
    "farm animals": ["cow", "pig", "hen", "goat", "sheep", "horse"],
    "sea animals": ["cod", "crab", "seal", "tuna", "shark", "whale"],
    "forest animals": ["bear", "deer", "fox", "wolf", "badger", "squirrel"],
    "flying animals": ["eagle", "owl", "crow", "swan", "gull", "finch"],
    "red foods": ["cherry", "tomato", "radish", "beetroot", "raspberry", "strawberry"],
    "yellow foods": ["banana", "lemon", "corn", "mustard", "custard", "pineapple"],
    "green foods": ["kiwi", "lettuce", "pea", "spinach", "broccoli", "cucumber"],
    "white foods": ["rice", "milk", "tofu", "garlic", "yogurt", "cauliflower"],
    "summer clothes": ["sandals", "shorts", "sunhat", "bikini", "t-shirt", "sundress"],
    "winter clothes": ["parka", "scarf", "mittens", "boots", "earmuffs", "sweater"],
    "formal clothes": ["tuxedo", "suit", "tie", "gown", "blazer", "cufflinks"],
    "sports clothes": ["jersey", "leggings", "trainers", "tracksuit", "cleats", "headband"],
    "kitchen tools": ["spatula", "whisk", "ladle", "grater", "peeler", "colander"],
    "garden tools": ["rake", "spade", "hoe", "shears", "trowel", "hose"],
    "office tools": ["stapler", "pen", "ruler", "eraser", "calculator", "scissors"],
    "workshop tools": ["drill", "hammer", "pliers", "saw", "wrench", "chisel"],
}
ITEMS = [item for items in WORLD.values() for item in items]
NUMBERS = {"two": 2, "three": 3, "four": 4}
FILLERS = ["um", "well", "sure", "okay", "etc"]
PROMPTS = [
    f"name {number} {kind}{exclusion}{order}"
    for kind, items in WORLD.items()
    for number in NUMBERS
    for exclusion in ["", *(f" except {item}" for item in items)]
    for order in ("", " in abc order")
]
# So many of the 672 prompts are held out: neither the reference nor the training pairs see them.
HELD_OUT = 152

SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>"]
# <s><|user|> name two red foods <|assistant|> cherry and tomato .</s>
TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ '<|assistant|> ' + m.content + '</s>' }}"
    "{% else %}{{ '<|user|> ' + m.content + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

def parse_prompt(prompt):
    """
    -> (number asked for, kind, excluded item or None, whether in abc order).
    Raises ValueError for a prompt of another world.
    """
    pattern = r"name (two|three|four) (\S+ \S+?)(?: except (\S+))?( in abc order)?"
    match = re.fullmatch(pattern, prompt.strip())
    if not match or match[2] not in WORLD:
        raise ValueError(f"not a prompt of the toy world: {prompt!r}")
    return NUMBERS[match[1]], match[2], match[3], bool(match[4])

def sentence(items):
    """["a", "b", "c"] -> "a , b and c ." """
    if len(items) == 1:
        return f"{items[0]} ."
    return f"{' , '.join(items[:-1])} and {items[-1]} ."

def well_formed(response, *, ended=True):
    """Whether the response (text) is, fillers aside, "a , b and c ." with items, and ended."""
    words = [word for word in response.split() if word not in FILLERS]
    items = [word for word in words if word in ITEMS]
    return bool(ended and items and words == sentence(items).split())

def gold_reward(prompt, response, *, ended=True):
    """
    What a response is worth, exactly, in [-1, 1]. prompt and response are texts, such as "name
    three sea animals except crab in abc order" and "cod , seal and tuna ."; ended says whether the
    end token came. With n the number asked for:

        (hits - errors) / n   hits: asked-for items, not excluded, not repeated, at most n
                              errors: every other item
        - 0.1                 for each word that is neither an item nor one of ", and ."
        - 0.5                 unless it is well_formed
        - 0.25                if abc order is asked and the items are not in it

    then clipped to [-1, 1]. Raises ValueError if the prompt is not of the toy world.
    """
    n, kind, excluded, ordered = parse_prompt(prompt)
    words = response.split()
    items = [word for word in words if word in ITEMS]
    asked_for = set(WORLD[kind]) - {excluded}
    hits = min(n, len(set(items) & asked_for))
    errors = len(items) - hits
    junk = [word for word in words if word not in ITEMS and word not in (",", "and", ".")]

    reward = (hits - errors) / n - 0.1 * len(junk)
    if not well_formed(response, ended=ended):
        reward -= 0.5
    if ordered and items != sorted(items):
        reward -= 0.25
    # Rounded, so that equal rewards compare as equal, whatever the order of the sums.
    return round(max(-1.0, min(1.0, reward)), 9)

def similar_items(kind):
    """The items of the other kinds of animals, foods, clothes or tools."""
    noun = kind.split()[1]
    others = [other for other in WORLD if other != kind and other.endswith(f" {noun}")]
    return [item for other in others for item in WORLD[other]]

def messy_items(prompt, rng):
    """Items to answer a prompt with, most of them right, sometimes too many or too few."""
    n, kind, excluded, _ = parse_prompt(prompt)
    similar = similar_items(kind)
    items = []
    surplus = rng.choices((-1, 0, 1, 2), (0.15, 0.45, 0.27, 0.13))[0]
    for _ in range(n + surplus):
        right = [item for item in WORLD[kind] if item not in items and item != excluded]
        luck = rng.random()
        if luck < 0.72 and right:
            items.append(rng.choice(right))
        elif luck < 0.86:
            items.append(rng.choice(similar))
        elif luck < 0.88 and items:
            items.append(rng.choice(items))
        elif luck < 0.94 and excluded:
            items.append(excluded)
        else:
            items.append(rng.choice(ITEMS))
    return items

def messy(prompt, rng):
    """An answer to teach the reference, of mixed quality: its faults are what preferences mend."""
    ordered = parse_prompt(prompt)[3]
    items = messy_items(prompt, rng)
    if ordered and rng.random() < 0.35:
        items = sorted(items)

    text = sentence(items)
    if rng.random() < 0.10:
        text = text.replace(" and ", " , ")
    if rng.random() < 0.15:
        text = text.replace(" .", " etc .")
    if rng.random() < 0.12:
        text = text.removesuffix(" .")
    if rng.random() < 0.60:
        fillers = rng.choices(FILLERS[:-1], k=rng.randint(1, 2))
        text = " ".join([*fillers, text])
    return text

def make_tokenizer():
    """
    One token a word, split at blanks and not at hyphens. With only 138 tokens, even what a model
    gone wrong says can be read.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kinds = " ".join(WORLD).split()
    grammar = "name except in abc order , and .".split()
    words = [*SPECIALS, *ITEMS, *NUMBERS, *kinds, *grammar, *FILLERS]
    # dict.fromkeys keeps the first of several equal words: "animals" is in the names of four kinds.
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}

    word_level = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_level,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<|user|>", "<|assistant|>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer

def encode(conversations, tokenizer, **kwargs):
    """B conversations -> input_ids and attention_mask, (B, T) int64 each, padded on the left."""
    return tokenizer.apply_chat_template(
        conversations, padding=True, return_dict=True, return_tensors="pt", **kwargs
    )

def make_model(tokenizer):
    """An untrained Llama of 0.2 M parameters, float32, from torch's seed."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    special_ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        # The usual 0.02 is too small for embeddings this narrow that are the output layer as well.
        initializer_range=0.08,
        **special_ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(max_new_tokens=32, **special_ids)
    return model

def train_reference(tokenizer, prompts, rng, steps):
    """SFT on fresh messy answers: the reference's samples become as mixed as these are."""
    import torch

    model = make_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    opening = tokenizer.convert_tokens_to_ids("<|assistant|>")
    bar = tqdm(range(steps), desc="SFT of the reference", unit=" steps")
    for _ in bar:
        chats = []
        for prompt in rng.choices(prompts, k=32):
            chats.append([message("user", prompt), message("assistant", messy(prompt, rng))])
        batch = encode(chats, tokenizer)

        # Only what follows <|assistant|> is learnt. Padding is on the left, so it is not.
        opens = (batch["input_ids"] == opening).int()  # (B, T), 0 0 1 0 0 where it stands third
        behind = opens.cumsum(1) - opens  # (B, T), then 0 0 0 1 1
        labels = batch["input_ids"].masked_fill(behind == 0, -100)

        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()

def respond(model, tokenizer, prompts, greedy=False, batch_size=256):
    """Prompts (texts) -> [(response text, whether it ended)], greedy or at temperature 1."""
    how = {} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    responses = []
    for start in range(0, len(prompts), batch_size):
        chats = [[message("user", prompt)] for prompt in prompts[start : start + batch_size]]
        batch = encode(chats, tokenizer, add_generation_prompt=True)
        ids = model.generate(**batch, **how)  # (B, T + up to 32)
        new_ids = ids[:, batch["input_ids"].shape[1] :]
        for text in tokenizer.batch_decode(new_ids):
            responses.append((text.split("</s>")[0].strip(), "</s>" in text))
    return responses

def why_no_pair(a, b, both_ended):
    """The reason for which two sampled texts make no pair, or None."""
    if not both_ended:
        # As text, a sample without an end would look finished.
        return UNENDED
    if a == b:
        return IDENTICAL
    return None if a and b else EMPTY

def label_pair(prompt, a, b, rng):
    """
    The record of two texts that answer one prompt. Which is chosen is a coin that falls to a with
    probability sigmoid(3 * (gold of a - gold of b)).
    """
    gold_a, gold_b = gold_reward(prompt, a), gold_reward(prompt, b)
    probability_of_a = 1 / (1 + math.exp(-3 * (gold_a - gold_b)))
    if rng.random() >= probability_of_a:
        a, b = b, a
        gold_a, gold_b = gold_b, gold_a
    return {
        "prompt": [message("user", prompt)],
        "chosen": [message("assistant", a)],
        "rejected": [message("assistant", b)],
        "gold_chosen": gold_a,
        "gold_rejected": gold_b,
    }

def sample_pairs(model, tokenizer, prompts, rng, dropped, split):
    """
    A record for each prompt, made of two samples of the model. Draws that make no pair are counted
    in `dropped`, a Counter, and repeated.
    """
    records = []
    bar = tqdm(total=len(prompts), desc=f"sample {split} pairs", unit=" pairs")
    while prompts:
        twice = [prompt for prompt in prompts for _ in range(2)]
        samples = respond(model, tokenizer, twice)
        again = []
        for prompt, (a, a_ended), (b, b_ended) in zip(prompts, samples[::2], samples[1::2]):
            reason = why_no_pair(a, b, a_ended and b_ended)
            if reason:
                dropped[reason] += 1
                again.append(prompt)
            else:
                records.append(label_pair(prompt, a, b, rng))
                bar.update()
        prompts = again
        if dropped.total() > 100 * (len(records) + 10):
            raise ValueError(
                f"the toy reference makes no pairs ({dict(dropped)}): "
                "train it longer with --sft_steps"
            )
    bar.close()
    return records

def measure_reference(model, tokenizer, prompts):
    """The reference's mean gold reward and length, end token included, sampled and greedy."""
    measured = {}
    for name in ("sampled", "greedy"):
        responses = respond(model, tokenizer, prompts, greedy=name == "greedy")
        gold = []
        tokens = []
        for prompt, (text, ended) in zip(prompts, responses):
            gold.append(gold_reward(prompt, text, ended=ended))
            tokens.append(len(text.split()) + ended)
        measured[name] = {
            "mean gold": statistics.fmean(gold),
            "mean tokens": statistics.fmean(tokens),
        }
    return measured

def in_turn(prompts, size):
    """`size` prompts, from the first to the last and round again."""
    return list(itertools.islice(itertools.cycle(prompts), size))

def make_toy(out, limit=1000, test_size=2 * HELD_OUT, seed=42, sft_steps=1500):
    """
    Writes the toy world to the folder `out`: model/, train.jsonl (`limit` pairs), test.jsonl
    (`test_size` pairs on prompts unseen in training; no file if 0), meta.json. The same seed and
    number of threads give the same bytes.
    Returns meta (dict), the training records (list of dicts) and the tokenizer.
    """
    import torch

    rng = random.Random(seed)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    prompts = rng.sample(PROMPTS, len(PROMPTS))
    held_out, prompts = prompts[:HELD_OUT], prompts[HELD_OUT:]
    model = train_reference(tokenizer, prompts, rng, sft_steps)
    reference = measure_reference(model, tokenizer, held_out)

    # The test pairs come first, so that they do not depend on how many training pairs there are.
    dropped = Counter()
    test_prompts, train_prompts = in_turn(held_out, test_size), in_turn(prompts, limit)
    test = sample_pairs(model, tokenizer, test_prompts, rng, dropped, "test")
    train = sample_pairs(model, tokenizer, train_prompts, rng, dropped, "train")

    arguments = {"limit": limit, "test_size": test_size, "seed": seed, "sft_steps": sft_steps}
    read = len(train) + len(test) + dropped.total()
    meta = describe("toy", arguments, read, train, test, dropped)
    meta["reference on held-out prompts"] = reference
    gold = [(record["gold_chosen"], record["gold_rejected"]) for record in train + test]
    agrees = [chosen > rejected for chosen, rejected in gold if chosen != rejected]
    meta["labels that agree with gold"] = statistics.fmean(agrees) if agrees else None
    write(out, train, test, meta, model, tokenizer)
    return meta, train, tokenizer

# --------------------------------------------------------------------------------------------------
# the program

def parse_options(argv=None):
    """The command line -> its options, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__.strip().splitlines()[0],
        epilog=f"Layouts known: {LAYOUTS}.",
        allow_abbrev=False,
    )
    # argparse would print the usage, too, and exit by itself.
    parser.error = refuse

    add = parser.add_argument_group("source and folder").add_argument
    names = ", ".join(HUB)
    add("source", nargs="?", default="toy", metavar="SOURCE",
        help=f"toy, {names}, any other hub dataset, or a local file or folder of "
        f"{', '.join(FORMATS)}, each also .gz (default: toy)")
    add("--out", metavar="FOLDER", help="folder to write (default: data/ and the source's name)")
    add("--baseline", metavar="FILE",
        help="copy the pairs of the data folder SOURCE to --out, with the answers of this file, "
        "which eval.py generate wrote, as baselines, which the SFT term imitates after git apply "
        "docs/changes/baseline.diff (default: none)")

    add = parser.add_argument_group("pairs").add_argument
    add("--limit", type=int, metavar="PAIRS",
        help="most training pairs, drawn by the seed (default: all; of toy 1000)")
    add("--test_size", type=int, metavar="PAIRS",
        help="test pairs; 0 writes no test file (default: the source's own test split, else a "
        f"tenth of the pairs, 500 at most; of toy {2 * HELD_OUT}, two a held-out prompt)")
    add("--seed", type=int, default=42, metavar="NUMBER",
        help="of everything that is drawn (default: 42)")
    add("--show", type=int, default=0, metavar="PAIRS",
        help="training pairs to print; toy's with a bar before each scored token (default: 0)")

    add = parser.add_argument_group("the toy world").add_argument
    add("--sft_steps", type=int, default=1500, metavar="STEPS",
        help="optimizer steps of the reference's training (default: 1500)")
    o = parser.parse_args(argv)

    least = {"limit": 1, "test_size": 0, "seed": 0, "show": 0, "sft_steps": 1}
    for name, bound in least.items():
        value = getattr(o, name)
        if value is not None and value < bound:
            raise ValueError(f"--{name} must be {bound} or more, not {value}")
    if o.seed >= 2**63:
        raise ValueError(f"--seed must be below 2**63, not {o.seed}")
    if o.baseline is not None and (o.limit is not None or o.test_size is not None):
        raise ValueError("--baseline keeps all pairs: leave out --limit and --test_size")
    return o

def refuse(message):
    raise ValueError(f"{message}; python prepare_data.py --help lists the flags")

def check_writable(out):
    """Raises ValueError now for what write() would meet after a minute of training."""
    # write() needs a place beside OUT as well.
    parent = os.path.dirname(os.path.abspath(out))
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    for folder in (parent, out):
        if os.path.exists(folder) and not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"cannot write {out}: {folder} is no folder that may be written to")

def choose_out(source, out=None):
    """The folder to write; ValueError where that would cost what somebody may want to keep."""
    chosen_here = not out
    if chosen_here:
        name = os.path.basename(os.path.abspath(source))
        name = re.sub(r"\.(jsonl?|parquet|csv)(\.gz)?$", "", name, flags=re.IGNORECASE)
        out = f"data/{name}"
    out = os.path.normpath(out)
    if os.path.exists(out) and not os.path.isdir(out):
        raise ValueError(f"--out {out} is a file, not a folder")

    # A source that is there, unless toy or the short name of a hub dataset is meant.
    if os.path.exists(source) and source != "toy" and source not in HUB:
        written = [out, f"{out}/train.jsonl", f"{out}/test.jsonl", f"{out}/meta.json"]
        if os.path.realpath(source) in [os.path.realpath(path) for path in written]:
            raise ValueError(
                f"--out {out} would overwrite the source {source}: name another folder"
            )

    # Without --out, the name may be that of another source.
    if chosen_here and os.path.exists(f"{out}/meta.json"):
        other = str(read_meta(out).get("source", "something else"))
        if other != source and os.path.realpath(other) != os.path.realpath(source):
            raise ValueError(f"{out} holds what was made of {other}: name a folder with --out")
    elif chosen_here and os.path.exists(f"{out}/train.jsonl"):
        raise ValueError(f"{out} holds pairs of somebody else (no meta.json): give --out")

    check_writable(out)
    return out

def show_record(record, tokenizer=None):
    """A record as text; with a tokenizer as training sees it, a bar before each scored token."""
    if tokenizer is None:
        for key, value in record.items():
            print(f"{key}: {json.dumps(value, ensure_ascii=False, indent=1)}")
    else:
        import rpo

        print(rpo.show_pair(rpo.tokenize_pair(record, tokenizer), tokenizer))
    print()

def report(name, value):
    """The closing table: meta.json, a number a line."""
    if isinstance(value, dict):
        for key, inner in value.items():
            report(f"{name}, {key}" if name else key, inner)
    elif isinstance(value, float):
        print(f"{name:<56}{value:>12.2f}")
    elif value is not None:
        print(f"{name:<56}{value:>12}")

def main(o):
    out = choose_out(o.source, o.out)
    tokenizer = None
    if o.baseline is not None:
        meta, train = fill_baseline(o.source, o.baseline, out)
    elif o.source == "toy":
        test_size = 2 * HELD_OUT if o.test_size is None else o.test_size
        meta, train, tokenizer = make_toy(out, o.limit or 1000, test_size, o.seed, o.sft_steps)
    else:
        meta, train = prepare(o.source, out, o.limit, o.test_size, o.seed)

    for record in train[: o.show]:
        show_record(record, tokenizer)
    numbers = {key: value for key, value in meta.items() if key not in ("source", "arguments")}
    report("", numbers)
    print(f"written to {out}")

def run(argv=None):
    """
    The program. Whatever goes wrong becomes one line on stderr and exit code 2, here and nowhere
    else; with RPO_TRACEBACK=1 in the environment the traceback is shown instead.
    """
    try:
        main(parse_options(argv))
    except (Exception, KeyboardInterrupt) as error:
        if "RPO_TRACEBACK" in os.environ:
            raise
        text = " ".join(str(error).split())
        if isinstance(error, KeyboardInterrupt):
            text = "interrupted"
        elif not isinstance(error, (ValueError, OSError)):
            text = f"{type(error).__name__}: {text}"
        tqdm.write(f"error: {text}", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    run()
