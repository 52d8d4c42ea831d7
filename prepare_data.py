"""
Preference data for rpo.py: any common layout in, one plain layout out, in files that a person can read.

    python prepare_data.py                                  # the toy world and its tiny reference model -> data/toy
    python prepare_data.py --show 3                         # the same, and three pairs with their scored tokens marked
    python prepare_data.py ultrafeedback                    # a hub dataset -> data/ultrafeedback
    python prepare_data.py my_pairs.jsonl --test_size 200   # a local file -> data/my_pairs, 200 pairs held out

OUT/train.jsonl and OUT/test.jsonl hold one pair a line: {"prompt": [{"role": "user", "content": "..."}], "chosen":
[{"role": "assistant", "content": "..."}], "rejected": like chosen}, or the three keys as plain strings, for models
without a chat template; an optional "baseline", like chosen, is carried through. OUT/meta.json counts what was kept
and what was dropped, and why.

The toy world: requests such as "name three sea animals except crab in abc order", answers such as "cod , seal and
tuna .", and an exact reward (gold_reward), so that a minute of training shows what preference optimization does to
the thing one really wants.
"""
import argparse, collections, csv, gzip, io, itertools, json, math, os, random, re, shutil, statistics, zlib

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from rpo import SIDES, fail, show_pair, tokenize_pair

# ----------------------------------------------------------------------------------------------------------------------
# any layout -> records

HUB = {"ultrafeedback": "HuggingFaceH4/ultrafeedback_binarized", "dpo-mix-7k": "argilla/dpo-mix-7k",
       "hh-rlhf": "Anthropic/hh-rlhf"}
FORMATS = (".json", ".jsonl", ".parquet", ".csv")  # each also with .gz
LAYOUTS = ("prompt + chosen + rejected (strings, messages or whole dialogues), chosen + rejected (whole dialogues, as "
           "messages or as text of 'Human:' and 'Assistant:' turns), conversations + chosen + rejected (ShareGPT)")
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
MALFORMED, EMPTY, IDENTICAL = "malformed turns", "empty response", "identical responses"
UNKNOWN, UNENDED = "missing or unknown columns", "no end token"

def chat(text, role="user"):
    return [{"role": role, "content": text}]

def text_of(messages):
    return messages if isinstance(messages, str) else "\n".join(turn["content"] for turn in messages)

def turns(value):
    """A turn or a list of them, {role, content} or {from, value} -> [{"role", "content"}]; ValueError for all else."""
    out = []
    for turn in [value] if isinstance(value, dict) else value:
        # a file that mixes both ways has all four keys in every turn, two of them None
        turn = {k: v for k, v in turn.items() if v is not None} if isinstance(turn, dict) else {}
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(role, str) or role not in ROLES or not isinstance(content, str):
            raise ValueError(MALFORMED)
        out += chat(content, ROLES[role])
    return out

def hh_turns(text):
    """Anthropic's dialogues as text. A turn starts with its name after a blank line; "Human:" inside a line is text."""
    head, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip("\n"))
    if head.strip():
        raise ValueError(MALFORMED)
    return [turn for role, content in zip(parts[::2], parts[1::2])
            for turn in chat(content.strip(), "user" if role == "Human" else "assistant")]

def unpacked(value):
    """Messages that a cell of a CSV file holds as JSON -> messages; printed in Python's way they are past reading."""
    key = "'(role|from|content|value)': "
    if isinstance(value, str) and re.match(rf"\s*\[\{{{key}.*{key}", value):
        raise ValueError(MALFORMED)
    try:
        return turns(json.loads(value)) if isinstance(value, str) and value.lstrip().startswith("[{") else value
    except ValueError:  # JSON of another kind is an answer like any other
        return value

def convert(row, as_chat=False):
    """A row of any known layout (dict) -> its record; ValueError(reason) where it is to be dropped. as_chat: strings
    become messages."""
    sides = {side: unpacked(row.get(side)) for side in SIDES if row.get(side) or side != "baseline"}
    context = unpacked(row["prompt"] if row.get("prompt") is not None else row.get("conversations"))
    if not all(isinstance(value, (str, list, dict)) for value in (*sides.values(), "" if context is None else context)):
        raise ValueError(UNKNOWN)
    texts = all(isinstance(value, str) for value in sides.values())
    # Anthropic's dialogues as text may come with their prompt, which they then repeat
    if texts and isinstance(context, str) and ("Human:" in context or not context.strip()) and all(
            value.lstrip().startswith(context.strip()) and "\n\nHuman:" in "\n\n" + value.lstrip("\n")
            for value in sides.values()):
        context = None
    if texts and isinstance(context, str) and not as_chat:
        prompt, answers = context, sides  # raw text stays as it is, to the last blank
    elif texts and context is None and "\n\nHuman:" not in "\n\n" + sides["chosen"].lstrip("\n"):
        raise ValueError(UNKNOWN)
    else:
        if texts and context is None:
            sides = {side: hh_turns(value) for side, value in sides.items()}
        sides = {s: chat(value, "assistant") if isinstance(value, str) else turns(value) for s, value in sides.items()}
        if isinstance(context, (list, dict)):
            prompt = turns(context)
        elif context is not None and all(len(dialogue) == 1 for dialogue in sides.values()):
            prompt = chat(context)
        else:
            # whole dialogues share all but the last turn. Some of Anthropic's pairs part earlier: they compare not
            # two answers to one prompt, and a cut at chosen's last "\n\nAssistant:" would fall anywhere in rejected
            prompt = sides["chosen"][:-1]
            asked = next((turn["content"] for turn in prompt if turn["role"] == "user"), "")
            if sides["rejected"][:-1] != prompt or context is not None and asked.strip() != context.strip():
                raise ValueError(MALFORMED)
        n = len(prompt)
        answers = {side: dialogue[n:] if dialogue[:n] == prompt else dialogue for side, dialogue in sides.items()}
        if row.get("system") and "system" not in [turn["role"] for turn in prompt]:
            prompt = chat(str(row["system"]), "system") + prompt
        talk = prompt[1:] if prompt and prompt[0]["role"] == "system" else prompt
        roles = [turn["role"] for turn in talk]
        # chat templates refuse two turns of one role in a row; what goes on with further turns is not one answer
        if (roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]
                or not all(turn["content"].strip() for turn in talk)
                or any([turn["role"] for turn in answer] != ["assistant"] for answer in answers.values())):
            raise ValueError(MALFORMED)
    contents = {side: text_of(answer).strip() for side, answer in answers.items()}
    if not all(contents.values()):
        raise ValueError(EMPTY)
    if contents["chosen"] == contents["rejected"]:
        raise ValueError(IDENTICAL)
    return {"prompt": prompt, **answers}

def convert_all(rows, source, as_chat=False):
    """Rows -> (records, Counter of the dropped by reason). Ends the program where nothing is left."""
    records, dropped, row = [], collections.Counter(), None
    for row in tqdm(rows, desc=f"convert {source}", unit=" rows", leave=False):
        try:
            records.append(convert(row, as_chat))
        except ValueError as reason:
            dropped[str(reason)] += 1
    if row is None:
        fail(f"{source} holds no rows")
    if not records and set(dropped) != {UNKNOWN}:
        fail(f"{source}: no pair left, dropped: " + ", ".join(f"{n} {reason}" for reason, n in dropped.items()))
    if not records and "label" in row and not {"chosen", "rejected"} & set(row):
        fail(f"{source} is unpaired (columns {', '.join(row)}): RPO needs two answers to a prompt, not one and a label")
    if not records:
        fail(f"{source}: unknown layout, columns {', '.join(row)}; known: {LAYOUTS}")
    return records, dropped

# ----------------------------------------------------------------------------------------------------------------------
# files and hub -> rows

def read_json(path, text):
    """An array of objects, or one object a line; rows may differ in keys and types, which columnar readers refuse."""
    rows, whole = [], text.lstrip().startswith("[")
    # not splitlines(), which would also split at line separators that JSON strings may hold as they are
    for number, line in enumerate([text] if whole else text.split("\n"), 1):
        try:
            rows += json.loads(line) if whole else [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            fail(f"{path} line {error.lineno if whole else number}: malformed JSON: {error.msg}; it must be one array "
                 "of objects, or one object a line")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            fail(f"{path} row {number}: not a JSON object")
    return rows

def read_file(path):
    """One local file -> its rows, a list of dicts."""
    name = path.lower().removesuffix(".gz")
    try:
        with open(path, "rb") as f:
            data = f.read()
        if data.startswith(b"version https://git-lfs"):
            fail(f"{path} is a git-lfs pointer, not the data: run git lfs pull where it came from")
        if path.lower().endswith(".gz") and data:
            data = gzip.decompress(data)
        if not data.strip():
            fail(f"{path} is empty")
        if name.endswith(".parquet"):
            import pyarrow.parquet  # comes with datasets, whose own reader leaves a copy of all it reads in a cache
            return pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
        text = data.decode("utf-8-sig")
        if name.endswith(".csv"):
            csv.field_size_limit(2**31 - 1)
            # every cell stays text: "NA" and "42" are answers, too
            return [{k: v for k, v in row.items() if k} for row in csv.DictReader(io.StringIO(text, newline=""))]
        return read_json(path, text)
    except (OSError, EOFError, zlib.error, ValueError, csv.Error) as error:  # pyarrow's errors are ValueErrors
        kind = "gzip" if isinstance(error, (gzip.BadGzipFile, EOFError, zlib.error)) else os.path.splitext(name)[1][1:]
        fail(f"{path} cannot be read as {kind}: {' '.join(str(error).split())}")

def read_source(source):
    """A local file or folder, or a hub dataset -> (rows to train on, rows of its own test split or None)."""
    if os.path.exists(source) and source not in HUB:
        folder = source if os.path.isdir(source) else os.path.dirname(source)
        names = sorted(os.listdir(source)) if os.path.isdir(source) else [os.path.basename(source)]
        names = [n for n in names if n.lower().removesuffix(".gz").endswith(FORMATS)]
        # the hub's own names count, too, such as train_prefs-00000-of-00001.parquet; train_sft holds no pairs
        if os.path.isdir(source):
            own_name = r"(_prefs)?(-\d+-of-\d+[^.]*)?\."
            train, test = ([n for n in names if re.match(split + own_name, n)] for split in ("train", "test"))
        else:
            train, test = names, []
        train = train or [n for n in names if n not in test]
        other_name = r"(^|[-_.])(test|valid|validation|eval|dev)[-_.]"
        if len(train) > 1 and any(re.search(other_name, n) for n in train):
            fail(f"{source}: which of {', '.join(names)} is to train on? name that one train, another test")
        if left := [n for n in names if n not in train + test]:
            tqdm.write(f"{source}: not read: {', '.join(left)}")
        if not train:
            fail(f"{source}: no {'train file' if test else 'file'} that ends in {', '.join(FORMATS)}, plain or .gz")
        rows = [[row for n in files for row in read_file(os.path.join(folder, n))] for files in (train, test)]
        return rows[0], rows[1] if test else None
    if source.lower().removesuffix(".gz").endswith(FORMATS) or source.count("/") > 1 or source[:1] in "/.~":
        fail(f"no file or folder {source}")
    import datasets, huggingface_hub
    huggingface_hub.logging.set_verbosity_error()  # its retries would bury the one line that matters
    try:
        splits = datasets.load_dataset(HUB.get(source, source))
    except Exception as error:  # the hub fails in a dozen unrelated types
        why = " ".join(str(error).split())
        fail(f"no file or folder {source}, and the hub dataset {HUB.get(source, source)} cannot be loaded: {why}")
    train, test = ([splits[n] for n in (f"{split}_prefs", split) if n in splits] for split in ("train", "test"))
    if not train:
        fail(f"{source} has no split train_prefs or train, but {', '.join(splits)}")
    return train[0], test[0] if test else None

# ----------------------------------------------------------------------------------------------------------------------
# the toy world

WORLD = {kind: items.split() for kind, items in {
    "farm animals": "cow pig hen goat sheep horse",
    "sea animals": "cod crab seal tuna shark whale",
    "forest animals": "bear deer fox wolf badger squirrel",
    "flying animals": "eagle owl crow swan gull finch",
    "red foods": "cherry tomato radish beetroot raspberry strawberry",
    "yellow foods": "banana lemon corn mustard custard pineapple",
    "green foods": "kiwi lettuce pea spinach broccoli cucumber",
    "white foods": "rice milk tofu garlic yogurt cauliflower",
    "summer clothes": "sandals shorts sunhat bikini t-shirt sundress",
    "winter clothes": "parka scarf mittens boots earmuffs sweater",
    "formal clothes": "tuxedo suit tie gown blazer cufflinks",
    "sports clothes": "jersey leggings trainers tracksuit cleats headband",
    "kitchen tools": "spatula whisk ladle grater peeler colander",
    "garden tools": "rake spade hoe shears trowel hose",
    "office tools": "stapler pen ruler eraser calculator scissors",
    "workshop tools": "drill hammer pliers saw wrench chisel",
}.items()}
ITEMS = [item for items in WORLD.values() for item in items]
NUMBERS = {"two": 2, "three": 3, "four": 4}
FILLERS = "um well sure okay etc".split()
PROMPTS = [f"name {n} {kind}{exclusion}{order}" for kind, items in WORLD.items() for n in NUMBERS
           for exclusion in ["", *(f" except {item}" for item in items)] for order in ("", " in abc order")]
HELD_OUT = 152  # of the 672 prompts: neither the reference nor the training pairs ever see them
SPECIALS = "<pad> <s> </s> <unk> <|user|> <|assistant|>".split()
# <s><|user|> name two red foods <|assistant|> cherry and tomato .</s>
TEMPLATE = ("{{ '<s>' }}{% for m in messages %}"
            "{% if m.role == 'assistant' %}{{ '<|assistant|> ' + m.content + '</s>' }}"
            "{% else %}{{ '<|user|> ' + m.content + ' ' }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")

def parse_prompt(prompt):
    """-> (number asked for, kind, excluded item or None, whether in abc order); ValueError if of another world."""
    match = re.fullmatch(r"name (two|three|four) (\S+ \S+?)(?: except (\S+))?( in abc order)?", prompt.strip())
    if not match or match[2] not in WORLD:
        raise ValueError(f"not a prompt of the toy world: {prompt!r}")
    return NUMBERS[match[1]], match[2], match[3], bool(match[4])

def sentence(items):
    return f"{' , '.join(items[:-1])} and {items[-1]} ." if len(items) > 1 else f"{items[0]} ."

def well_formed(response, *, ended=True):
    """Whether the response (text) is, fillers aside, exactly "a , b and c ." with items for letters, and ended."""
    words = [word for word in response.split() if word not in FILLERS]
    items = [word for word in words if word in ITEMS]
    return bool(ended and items and words == sentence(items).split())

def gold_reward(prompt, response, *, ended=True):
    """
    What a response is worth, exactly, in [-1, 1]. prompt and response are texts, such as "name three sea animals except
    crab in abc order" and "cod , seal and tuna ."; ended: whether the end token came. With n the number asked for:

        (hits - errors) / n   hits: asked-for items, not excluded, not repeated, at most n; errors: every other item
        - 0.1 per word that is neither an item nor one of ", and ."
        - 0.5 unless it is well_formed
        - 0.25 if abc order is asked and the items are not in it

    then clipped to [-1, 1]. ValueError if the prompt is not of the toy world.
    """
    n, kind, excluded, ordered = parse_prompt(prompt)
    words = response.split()
    items = [word for word in words if word in ITEMS]
    hits = min(n, len(set(items) & set(WORLD[kind]) - {excluded}))
    junk = sum(word not in ITEMS and word not in (",", "and", ".") for word in words)
    reward = (hits - (len(items) - hits)) / n - 0.1 * junk
    reward -= 0.5 * (not well_formed(response, ended=ended)) + 0.25 * (ordered and items != sorted(items))
    return round(max(-1.0, min(1.0, reward)), 9)  # rounded, so that equal rewards compare as equal

def messy(prompt, rng):
    """An answer to teach the reference, of mixed quality: its faults are what preferences can mend."""
    n, kind, excluded, ordered = parse_prompt(prompt)
    items, siblings = [], [item for k in WORLD if k != kind and k.split()[1] == kind.split()[1] for item in WORLD[k]]
    for _ in range(n + rng.choices((-1, 0, 1, 2), (.15, .45, .27, .13))[0]):
        left, luck = [item for item in WORLD[kind] if item not in items and item != excluded], rng.random()
        if luck < .72 and left:
            items.append(rng.choice(left))
        elif luck < .86:
            items.append(rng.choice(siblings))
        elif luck < .88 and items:
            items.append(rng.choice(items))
        else:
            items.append(excluded if luck < .94 and excluded else rng.choice(ITEMS))
    text = sentence(sorted(items) if ordered and rng.random() < .35 else items)
    if rng.random() < .10:
        text = text.replace(" and ", " , ")
    if rng.random() < .15:
        text = text.replace(" .", " etc .")
    if rng.random() < .12:
        text = text.removesuffix(" .")
    fillers = rng.choices(FILLERS[:-1], k=rng.randint(1, 2)) if rng.random() < .60 else []
    return " ".join([*fillers, text])

def make_tokenizer():
    """One token a word, split at blanks (not at hyphens): 138 tokens, so that even a model gone wrong can be read."""
    grammar = [*NUMBERS, *" ".join(WORLD).split(), *"name except in abc order , and .".split(), *FILLERS]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(SPECIALS + ITEMS + grammar))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=SPECIALS[4:], padding_side="left", clean_up_tokenization_spaces=False)
    tokenizer.chat_template = TEMPLATE
    return tokenizer

def encode(conversations, tokenizer, **kwargs):
    """Conversations (B of them) -> input_ids and attention_mask (B, T), padded on the left."""
    return tokenizer.apply_chat_template(conversations, padding=True, return_dict=True, return_tensors="pt", **kwargs)

def train_reference(tokenizer, prompts, rng, steps):
    """SFT of a Llama of 0.2 M parameters on fresh messy answers: its samples become as mixed as they are."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    # the usual initializer_range of .02 is too small for embeddings this narrow that also serve as the output layer
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192,
        tie_word_embeddings=True, initializer_range=.08, max_position_embeddings=256, **ids))
    model.generation_config = GenerationConfig(max_new_tokens=32, **ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    opening = tokenizer.convert_tokens_to_ids("<|assistant|>")
    for _ in (bar := tqdm(range(steps), desc="SFT of the reference", unit=" steps")):
        batch = encode([chat(p) + chat(messy(p, rng), "assistant") for p in rng.choices(prompts, k=32)], tokenizer)
        opened = batch["input_ids"] == opening  # (B, T)
        # only what follows <|assistant|> is learnt; padding is on the left, so it is not
        labels = batch["input_ids"].masked_fill(opened.cumsum(1) - opened.int() == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()

@torch.no_grad()
def respond(model, tokenizer, prompts, greedy=False, batch_size=256):
    """Prompts (texts) -> [(response text, whether it ended)], sampled at temperature 1 or greedy."""
    out = []
    for i in range(0, len(prompts), batch_size):
        batch = encode([chat(p) for p in prompts[i:i + batch_size]], tokenizer, add_generation_prompt=True)
        how = {} if greedy else dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        texts = tokenizer.batch_decode(model.generate(**batch, **how)[:, batch["input_ids"].shape[1]:])
        out += [(text.split("</s>")[0].strip(), "</s>" in text) for text in texts]
    return out

def sample_pairs(model, tokenizer, prompts, rng, dropped, split):
    """
    A record for each prompt: two samples of the model, of which one is chosen with probability sigmoid(3 * difference
    in gold). Draws that make no pair are counted in `dropped` and repeated.
    """
    records = []
    with tqdm(total=len(prompts), desc=f"sample {split} pairs", unit=" pairs") as bar:
        while prompts:
            drawn, again = respond(model, tokenizer, [p for p in prompts for _ in range(2)]), []
            for prompt, (a, a_ended), (b, b_ended) in zip(prompts, drawn[::2], drawn[1::2]):
                if not (a_ended and b_ended and a and b) or a == b:
                    # as text, a sample without an end would look finished
                    dropped[UNENDED if not (a_ended and b_ended) else IDENTICAL if a == b else EMPTY] += 1
                    again.append(prompt)
                    continue
                gold_a, gold_b = gold_reward(prompt, a), gold_reward(prompt, b)
                if rng.random() >= 1 / (1 + math.exp(-3 * (gold_a - gold_b))):
                    a, b, gold_a, gold_b = b, a, gold_b, gold_a
                sides = {"chosen": chat(a, "assistant"), "rejected": chat(b, "assistant")}
                records.append({"prompt": chat(prompt), **sides, "gold_chosen": gold_a, "gold_rejected": gold_b})
                bar.update()
            prompts = again
            if dropped.total() > 100 * (len(records) + 10):
                fail(f"the toy reference makes no pairs ({dict(dropped)}): train it longer, see --sft_steps")
    return records

def make_toy(out, limit=1000, test_size=2 * HELD_OUT, seed=42, sft_steps=1500):
    """
    Writes the toy world to the folder `out`: model/, train.jsonl (`limit` pairs), test.jsonl (`test_size` pairs, on
    prompts unseen in training; no file if 0), meta.json. The same seed and number of threads give the same bytes.
    Returns meta (dict), the training records (list of dicts) and the tokenizer.
    """
    rng, tokenizer, dropped = random.Random(seed), make_tokenizer(), collections.Counter()
    torch.manual_seed(seed)
    prompts = rng.sample(PROMPTS, len(PROMPTS))
    held_out, prompts = prompts[:HELD_OUT], prompts[HELD_OUT:]
    model, reference = train_reference(tokenizer, prompts, rng, sft_steps), {}
    for name in ("sampled", "greedy"):
        answers = respond(model, tokenizer, held_out, greedy=name == "greedy")
        gold = [gold_reward(prompt, text, ended=ended) for prompt, (text, ended) in zip(held_out, answers)]
        reference[name] = {"mean gold": statistics.fmean(gold),
                           "mean tokens": statistics.fmean(len(text.split()) + ended for text, ended in answers)}
    # the test pairs come first, so that they do not depend on how many training pairs there are
    evenly = lambda prompts, size: list(itertools.islice(itertools.cycle(prompts), size))
    test = sample_pairs(model, tokenizer, evenly(held_out, test_size), rng, dropped, "test")
    train = sample_pairs(model, tokenizer, evenly(prompts, limit), rng, dropped, "train")
    decided = [r["gold_chosen"] > r["gold_rejected"] for r in train + test if r["gold_chosen"] != r["gold_rejected"]]
    arguments = {"limit": limit, "test_size": test_size, "seed": seed, "sft_steps": sft_steps}
    meta = describe("toy", arguments, len(train + test) + dropped.total(), train, test, dropped)
    meta["reference on held-out prompts"] = reference
    meta["labels that agree with gold"] = statistics.fmean(decided) if decided else None
    write(out, train, test, meta, model, tokenizer)
    return meta, train, tokenizer

# ----------------------------------------------------------------------------------------------------------------------
# records -> files

def describe(source, arguments, read, train, test, dropped):
    """What meta.json says of the data; lengths are in characters."""
    lengths = {part: [len(text_of(r[part])) for r in train + test] for part in ("prompt", "chosen", "rejected")}
    stats = {"mean": statistics.fmean, "median": statistics.median, "max": max}
    longer = [c > r for c, r in zip(lengths["chosen"], lengths["rejected"]) if c != r]
    seen = {json.dumps(record["prompt"]) for record in train}
    return {"source": source, "arguments": arguments, "pairs read": read, "dropped": dict(sorted(dropped.items())),
            "left out by limits": read - dropped.total() - len(train + test),
            "kept": {"train": len(train), "test": len(test)},
            "test pairs whose prompt is in train, too": sum(json.dumps(record["prompt"]) in seen for record in test),
            "longer response is the chosen one": statistics.fmean(longer) if longer else None,
            "characters": {part: {name: stat(n) for name, stat in stats.items()} for part, n in lengths.items()}}

def write(out, train, test, meta, model=None, tokenizer=None):
    """All files are made beside OUT and renamed into it at the end: a run cut short leaves OUT as it was."""
    stage = out + ".partial"
    try:
        shutil.rmtree(stage, ignore_errors=True)
        os.makedirs(stage)
        if model:
            logging.disable_progress_bar()
            model.save_pretrained(f"{stage}/model")
            tokenizer.save_pretrained(f"{stage}/model")
        for name, things, indent in ("train.jsonl", train, None), ("test.jsonl", test, None), ("meta.json", [meta], 2):
            # "replace": half a surrogate pair, which JSON can spell, has no UTF-8
            with open(f"{stage}/{name}", "w", encoding="utf-8", errors="replace", newline="\n") as f:
                f.writelines(json.dumps(thing, ensure_ascii=False, indent=indent) + "\n" for thing in things)
        os.makedirs(out, exist_ok=True)
        if model:
            shutil.rmtree(f"{out}/model", ignore_errors=True)
        for name in sorted(os.listdir(stage), reverse=True):
            os.replace(f"{stage}/{name}", f"{out}/{name}")
        if not test:
            os.remove(f"{out}/test.jsonl")  # by now an empty one, also where an earlier call had left its own
        os.rmdir(stage)
    except OSError as error:
        fail(f"cannot write {out}: {error}")

def hold_out(records, own_test, limit, test_size, seed):
    """-> (train, test), drawn by the seed, in the source's order; test from its own test split if it has one."""
    rng = random.Random(seed)
    size = test_size if test_size is not None else min(500, len(records) // 10) if own_test is None else len(own_test)
    if own_test is None and size >= len(records):
        fail(f"--test_size {size} leaves none of {len(records)} pairs to train on")
    order = rng.sample(range(len(records)), len(records))
    if own_test is None:
        test, order = [records[i] for i in sorted(order[:size])], order[size:]
    else:
        test = [own_test[i] for i in sorted(rng.sample(range(len(own_test)), min(size, len(own_test))))]
    return [records[i] for i in sorted(order[:limit])], test

def report(out, meta):
    """The closing table: meta.json, line by line."""
    def rows(name, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                rows(f"{name}, {key}" if name else key, inner)
        elif value is not None:
            print(f"{name:<56}{value:>12{'.2f' if isinstance(value, float) else ''}}")
    rows("", {key: value for key, value in meta.items() if key not in ("source", "arguments")})
    names = ["model", "train.jsonl", "test.jsonl", "meta.json"][meta["source"] != "toy":]
    print(f"written to {out}: " + ", ".join(n for n in names if n != "test.jsonl" or meta["kept"]["test"]))

def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("source", nargs="?", default="toy", metavar="SOURCE", help=f"toy, {', '.join(HUB)}, any other hub dataset, or "
        f"a local file or folder ({', '.join(FORMATS)}, each also .gz) (default: toy); layouts known: {LAYOUTS}")
    add("--out", help="folder to write (default: data/ and the name of the source)")
    add("--limit", type=int, help="training pairs at most, drawn by the seed (default: all; toy: 1000)")
    add("--test_size", type=int, help="test pairs; 0: no test file (default: the source's own test split, or else a "
        f"tenth of the pairs, at most 500, drawn by the seed; toy: {2 * HELD_OUT}, two for each held-out prompt)")
    add("--seed", type=int, default=42, help="of everything drawn (default: 42)")
    add("--show", type=int, default=0, help="training pairs to print, toy's with the scored tokens marked (default: 0)")
    add("--sft_steps", type=int, default=1500, help="toy only: SFT steps of the reference (default: 1500)")
    o = parser.parse_args(argv)
    for name, least in (("limit", 1), ("test_size", 0), ("show", 0), ("sft_steps", 1)):
        if getattr(o, name) is not None and getattr(o, name) < least:
            fail(f"--{name} must be {least} or more, not {getattr(o, name)}")
    name = re.sub(r"\.(jsonl?|parquet|csv)(\.gz)?$", "", os.path.basename(os.path.abspath(o.source)), flags=re.I)
    out, tokenizer = os.path.normpath(o.out or f"data/{name}"), None
    if os.path.exists(out) and not os.path.isdir(out):
        fail(f"--out {out} is a file, not a folder")
    if not o.out and os.path.exists(f"{out}/meta.json"):  # another source of that name
        try:
            with open(f"{out}/meta.json", encoding="utf-8") as f:
                other = str(json.load(f)["source"])
        except (OSError, ValueError, LookupError, TypeError):
            other = "something else"
        if other != o.source and os.path.realpath(other) != os.path.realpath(o.source):
            fail(f"{out} holds what was made of {other}: name a folder with --out")
    if o.source == "toy":
        test_size = 2 * HELD_OUT if o.test_size is None else o.test_size
        meta, train, tokenizer = make_toy(out, o.limit or 1000, test_size, o.seed, o.sft_steps)
    else:
        taken = [out, *(f"{out}/{file}" for file in ("train.jsonl", "test.jsonl", "meta.json"))]
        if os.path.realpath(o.source) in map(os.path.realpath, taken) and os.path.exists(o.source):
            fail(f"--out {out} would overwrite the source {o.source}: name another folder")
        rows, own_test = read_source(o.source)
        # a system prompt beside strings makes a chat of all such rows, lest some be messages and others bare text
        both = itertools.chain(rows, own_test or ())
        as_chat = any(row.get("system") and isinstance(row.get("chosen"), str) for row in both)
        records, dropped = convert_all(rows, o.source, as_chat)
        read = len(records) + dropped.total()
        if own_test is not None:
            own_test, more = convert_all(own_test, f"{o.source}, test split", as_chat)
            dropped, read = dropped + more, read + len(own_test) + more.total()
        train, test = hold_out(records, own_test, o.limit, o.test_size, o.seed)
        arguments = {"limit": o.limit, "test_size": o.test_size, "seed": o.seed}
        meta = describe(o.source, arguments, read, train, test, dropped)
        write(out, train, test, meta)
    for record in train[:o.show]:
        if tokenizer:
            print(show_pair(tokenize_pair(record, tokenizer), tokenizer) + "\n")
        else:
            print("\n".join(f"{key}: {json.dumps(record[key], ensure_ascii=False, indent=1)}" for key in record) + "\n")
    report(out, meta)

if __name__ == "__main__":
    main()
