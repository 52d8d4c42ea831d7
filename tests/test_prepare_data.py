"""
prepare_data.py: the gold reward by hand, every layout, files and folders, what is refused and how,
baselines from another policy, the toy's tokenizer, model and pairs.
"""
import ast
import csv
import gzip
import hashlib
import io
import json
import os
import random
import resource
import stat
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import prepare_data
from prepare_data import EMPTY, IDENTICAL, MALFORMED, UNENDED, UNKNOWN
from prepare_data import PROMPTS, WORLD, gold_reward, messy, to_record

ROOT = Path(prepare_data.__file__).parent

def user(text):
    return {"role": "user", "content": text}

def assistant(text):
    return {"role": "assistant", "content": text}

def system(text):
    return {"role": "system", "content": text}

def pair(i):
    return {"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"}

def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

def put(path, content):
    """Writes a text or bytes, compressed if the name says so."""
    data = content if isinstance(content, bytes) else content.encode()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(gzip.compress(data) if str(path).endswith(".gz") else data)

def read(path):
    """The records of a jsonl file."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]

def files(folder):
    """{path: content} of all files below a folder."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}

def prepare(*argv):
    """Runs the program with --out out. Returns meta.json and the training records."""
    prepare_data.run([*map(str, argv), "--out", "out"])
    return json.loads(Path("out/meta.json").read_text()), read("out/train.jsonl")

def refusal(capsys, *argv):
    """Runs the program, which is to end with exit code 2 and one line. Returns the line."""
    with pytest.raises(SystemExit) as exit:
        prepare_data.run(list(map(str, argv)))
    assert exit.value.code == 2
    # Progress bars erase themselves with carriage returns.
    err = capsys.readouterr().err.split("\r")[-1]
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err

def cases(arguments, table):
    """A test for each row of a table, whose first column is its name."""
    rows = [row[1:] for row in table]
    return pytest.mark.parametrize(arguments, rows, ids=[row[0] for row in table])

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path

# --------------------------------------------------------------------------------------------------
# the gold reward

THREE = "name three sea animals except crab in abc order"
THREE_ANY_ORDER = "name three sea animals except crab"
TWO = "name two red foods"
TOOLS = "name three workshop tools except drill in abc order"
CLOTHES = "name four summer clothes"

GOLD = [
    (THREE, "cod , seal and tuna .", 1.0),
    # too few, too many: one error for each item beyond the number
    (THREE, "cod and seal .", 2 / 3),
    (THREE, "cod .", 1 / 3),
    (THREE, "cod , seal , shark and tuna .", 2 / 3),
    (THREE, "cod , seal , shark , tuna and whale .", 1 / 3),
    (TWO, "cherry , tomato and radish .", 0.5),
    # repeated, excluded, of another kind: each an error
    (THREE, "cod , cod and seal .", 1 / 3),
    (THREE, "cod , cod and cod .", -1 / 3),
    (THREE, "cod , crab and seal .", 1 / 3),
    (THREE, "cod , owl and seal .", 1 / 3),
    (THREE, "cow , hen and pig .", -1.0),
    (f"{CLOTHES} except shorts", "t-shirt , sandals , bikini and sunhat .", 1.0),
    (CLOTHES, "t-shirt , sandals , bikini and spatula .", 0.5),
    # abc order, asked for or not
    (THREE, "tuna , seal and cod .", 0.75),
    (THREE_ANY_ORDER, "tuna , seal and cod .", 1.0),
    (THREE, "owl , cod and seal .", 1 / 3 - 0.25),
    # fillers cost and leave the form whole; a stray word breaks it as well
    (THREE, "um cod , seal and tuna .", 0.9),
    (THREE, "um okay cod , seal and tuna etc .", 0.7),
    (THREE, "um name cod , seal and tuna .", 0.3),
    (TWO, "<|user|> cherry and tomato .", 0.4),
    # form
    (TWO, "tomato and cherry .", 1.0),
    (TWO, "cherry and tomato", 0.5),
    (TWO, "cherry , tomato .", 0.5),
    (TWO, "cherry tomato .", 0.5),
    (TWO, "and cherry and tomato .", 0.5),
    (TWO, "cherry and tomato . .", 0.5),
    # nothing at all, and the clipping at -1
    (TWO, "", -0.5),
    (TWO, ".", -0.5),
    (TWO, "um um um um um um", -1.0),
    (TWO, "lemon , milk , rice and corn .", -1.0),
    # several at once
    (THREE, "um okay drill , cod , seal and tuna .", 2 / 3 - 0.2 - 0.25),
    (TOOLS, "um okay drill , hammer , pliers and saw .", 2 / 3 - 0.2),
    (TOOLS, "um okay hammer , hammer , pliers and saw .", 2 / 3 - 0.2),
    (TOOLS, "um okay hammer and hammer .", -0.2),
]

@pytest.mark.parametrize("prompt, response, gold", GOLD)
def test_gold_reward_by_hand(prompt, response, gold):
    assert gold_reward(prompt, response) == pytest.approx(gold, abs=1e-8)

def test_a_response_that_never_ended_is_not_well_formed():
    assert gold_reward(THREE, "cod , seal and tuna .", ended=False) == 0.5

def test_equal_rewards_compare_as_equal():
    """1/2 - .2 and 1 - .2 - .5 are one worth: the last bit of two sums must not decide who wins."""
    one = gold_reward("name two farm animals", "sure well tracksuit , horse and sheep .")
    other = gold_reward("name two farm animals", "um well sheep and pig")
    assert one == other == 0.3

@pytest.mark.parametrize("response, formed", [
    ("cod .", True),
    ("um cod and owl etc .", True),
    ("cod , owl and cow .", True),
    ("cod and owl and cow .", False),
    ("cod , and owl .", False),
    ("um .", False),
])
def test_well_formed(response, formed):
    assert prepare_data.well_formed(response) is formed
    assert prepare_data.well_formed(response, ended=False) is False

@pytest.mark.parametrize("prompt", [
    "",
    "name five red foods",
    "name two red animals",
    "name two red foods please",
    "say two red foods",
])
def test_gold_reward_refuses_prompts_of_another_world(prompt):
    with pytest.raises(ValueError, match="not a prompt of the toy world"):
        gold_reward(prompt, "cherry and tomato .")

def test_prompts_are_taken_apart():
    assert prepare_data.parse_prompt(THREE) == (3, "sea animals", "crab", True)
    assert prepare_data.parse_prompt(TWO) == (2, "red foods", None, False)

def test_the_toy_world_has_96_items_and_672_prompts():
    items = [item for kind in WORLD.values() for item in kind]
    assert len(WORLD) == 16 and {len(kind) for kind in WORLD.values()} == {6}
    assert len(set(items)) == 96
    assert len(set(PROMPTS)) == len(PROMPTS) == 672

def test_no_word_of_the_grammar_is_an_item_or_a_filler():
    """Else gold_reward would count it as one."""
    items = {item for kind in WORLD.values() for item in kind}
    grammar = set(" ".join(PROMPTS).split()) - items
    assert not grammar & set(prepare_data.FILLERS) and not items & set(prepare_data.FILLERS)
    assert grammar >= {"name", "except", "in", "abc", "order", "animals"}

def test_what_the_reference_learns_is_mixed():
    """Some answers are all right, some all wrong, on the whole hardly better than nothing."""
    rng = random.Random(0)
    gold = [gold_reward(prompt, messy(prompt, rng)) for prompt in PROMPTS * 10]
    assert 0.08 < sum(gold) / len(gold) < 0.15
    assert min(gold) == -1 and max(gold) == 1

def test_the_reference_learns_the_same_answers_as_ever():
    """Published numbers rest on the toy world, so every draw keeps its place."""
    rng = random.Random(0)
    assert [messy(prompt, rng) for prompt in (TWO, THREE, TOOLS, CLOTHES)] == [
        "well milk , raspberry and radish .",
        "well colander , crab , trainers and tuna .",
        "pliers , suit and wrench",
        "um parka , sunhat , bikini , sandals and sundress .",
    ]
    rng = random.Random(1)
    answers = "\n".join(messy(prompt, rng) for prompt in PROMPTS * 20)
    assert hashlib.sha256(answers.encode()).hexdigest().startswith("e0fed7aefcfee5b4795b")

# --------------------------------------------------------------------------------------------------
# layouts

PLAIN = {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}
TEXTS = {"prompt": "q", "chosen": "good", "rejected": "bad"}
TALK = [system("be kind"), user("q1"), assistant("a1"), user("q2")]
DEEP = {"prompt": TALK, "chosen": [assistant("good")], "rejected": [assistant("bad")]}
KIND = {**PLAIN, "prompt": [system("be kind"), user("q")]}

def dialogues(prompt):
    """Both answers as whole dialogues."""
    return {"chosen": [*prompt, assistant("good")], "rejected": [*prompt, assistant("bad")]}

def sharegpt(messages):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in messages]

def hh(prompt, chosen="good", rejected="bad"):
    """Anthropic's dialogues, as texts."""
    opening = f"\n\nHuman: {prompt}\n\nAssistant: "
    return {"chosen": opening + chosen, "rejected": opening + rejected}

def part(text):
    return {"type": "text", "text": text}

# name, row, record
KEPT = [
    ("strings", TEXTS, TEXTS),
    ("strings, to the last blank",
     {"prompt": "2+2=", "chosen": " 4\n", "rejected": " 5"},
     {"prompt": "2+2=", "chosen": " 4\n", "rejected": " 5"}),
    ("strings, other columns left out", {**TEXTS, "score": 1}, TEXTS),
    ("strings with a baseline", {**TEXTS, "baseline": "so so"}, {**TEXTS, "baseline": "so so"}),
    ("strings without one in this row", {**TEXTS, "baseline": None}, TEXTS),
    ("an answer with a bracket in front",
     {"prompt": "q", "chosen": "[{a: 1}]", "rejected": "[1]"},
     {"prompt": "q", "chosen": "[{a: 1}]", "rejected": "[1]"}),
    ("an answer in JSON", {**TEXTS, "chosen": '[{"role": "admin"}]'},
     {**TEXTS, "chosen": '[{"role": "admin"}]'}),
    ("messages as indented JSON", {**PLAIN, "prompt": json.dumps([user("q")], indent=1)}, PLAIN),
    ("an answer that begins in JSON", {**TEXTS, "chosen": '{"content": "x"}\nYes'},
     {**TEXTS, "chosen": '{"content": "x"}\nYes'}),

    ("messages", DEEP, DEEP),
    ("messages with other keys",
     {**PLAIN, "chosen": [{**assistant("good"), "name": None, "weight": 1}]}, PLAIN),
    ("messages with a baseline",
     {**PLAIN, "baseline": [assistant("so so")]}, {**PLAIN, "baseline": [assistant("so so")]}),
    ("a single message, not in a list",
     {"prompt": user("q"), "chosen": assistant("good"), "rejected": assistant("bad")}, PLAIN),
    ("content in parts",
     {**PLAIN, "prompt": [{"role": "user", "content": [part("q1 "), part("q2")]}]},
     {**PLAIN, "prompt": [user("q1 q2")]}),
    ("message prompt, answers as strings", {**TEXTS, "prompt": [user("q")]}, PLAIN),
    ("message prompt, whole dialogues", {"prompt": [user("q")], **dialogues([user("q")])}, PLAIN),
    ("prompt string, answers as messages", {**PLAIN, "prompt": "q"}, PLAIN),
    ("messages as JSON in the cells of a csv file",
     {"prompt": "q", **{side: json.dumps(turns) for side, turns in dialogues([user("q")]).items()}},
     PLAIN),

    ("whole dialogues", dialogues(TALK), DEEP),
    ("whole dialogues with a baseline",
     {**dialogues([user("q")]), "baseline": [user("q"), assistant("so so")]},
     {**PLAIN, "baseline": [assistant("so so")]}),
    ("UltraFeedback",
     {"prompt": "q", "prompt_id": "f0", **dialogues([user("q")]), "score_chosen": 8.5,
      "messages": [user("q"), assistant("good")]}, PLAIN),
    ("UltraFeedback, several turns", {"prompt": "q1", **dialogues(TALK)}, DEEP),

    ("HH", hh("q"), PLAIN),
    ("HH, several turns", hh("q1\n\nAssistant: a1\n\nHuman: q2 "),
     {**PLAIN, "prompt": [user("q1"), assistant("a1"), user("q2")]}),
    ("HH, answers that begin alike", hh("q", "I see. good", "I see. bad"),
     {"prompt": [user("q")], "chosen": [assistant("I see. good")],
      "rejected": [assistant("I see. bad")]}),
    ("HH, names inside a line or after one newline are text",
     hh("he said Human: hi\nAssistant: no", "good\nHuman: x"),
     {"prompt": [user("he said Human: hi\nAssistant: no")],
      "chosen": [assistant("good\nHuman: x")], "rejected": [assistant("bad")]}),
    ("HH beside its prompt", {"prompt": "\n\nHuman: q\n\nAssistant:", **hh("q")}, PLAIN),
    ("HH beside an empty prompt", {"prompt": "", **hh("q")}, PLAIN),

    ("ShareGPT",
     {"conversations": sharegpt(TALK), "chosen": sharegpt([assistant("good")])[0],
      "rejected": sharegpt([assistant("bad")])[0]}, DEEP),
    ("ShareGPT, answers in lists",
     {"conversations": sharegpt(TALK), "chosen": sharegpt([assistant("good")]),
      "rejected": sharegpt([assistant("bad")])}, DEEP),
    ("both spellings in one file",
     {**PLAIN, "prompt": [{**user("q"), "from": None, "value": None}]}, PLAIN),

    ("a system column beside a string and messages",
     {"system": "be kind", **PLAIN, "prompt": "q"}, KIND),
    ("a system column beside messages", {"system": "be kind", **PLAIN}, KIND),
    ("a system column beside UltraFeedback",
     {"system": "be kind", "prompt": "q", **dialogues([user("q")])}, KIND),
    ("a system column beside whole dialogues",
     {"system": "be kind", **dialogues([user("q")])}, KIND),
    ("a system column beside HH", {"system": "be kind", **hh("q")}, KIND),
    ("a system column beside ShareGPT",
     {"system": "be kind", "conversations": sharegpt(TALK[1:]),
      "chosen": sharegpt([assistant("good")]), "rejected": sharegpt([assistant("bad")])}, DEEP),
    ("a system column beside a system turn", {"system": "be mean", **DEEP}, DEEP),
]

@cases("row, record", KEPT)
def test_layouts(row, record):
    assert to_record(row) == record

# name, row, reason
DROPPED = [
    ("an empty string", {**TEXTS, "rejected": " \n"}, EMPTY),
    ("an empty message", {**PLAIN, "chosen": [assistant("")]}, EMPTY),
    ("an empty baseline", {**PLAIN, "baseline": [assistant(" ")]}, EMPTY),
    ("HH, an empty answer", hh("q", "good", ""), EMPTY),

    ("equal strings", {**TEXTS, "chosen": "bad"}, IDENTICAL),
    ("messages equal but for blanks", {**PLAIN, "rejected": [assistant("good\n")]}, IDENTICAL),
    ("equal dialogues", {side: [user("q"), assistant("a")] for side in ("chosen", "rejected")},
     IDENTICAL),
    ("HH, equal but for blanks", hh("q", "good", "good "), IDENTICAL),
    ("equal once UTF-8 has no half surrogate pairs",
     {**TEXTS, "chosen": "\ud83d", "rejected": "\ud83e"}, IDENTICAL),
    ("messages equal once UTF-8 has no half surrogate pairs",
     {**PLAIN, "chosen": [assistant("\ud83d")], "rejected": [assistant("\ud83e")]}, IDENTICAL),

    ("no chosen", {**TEXTS, "chosen": None}, UNKNOWN),
    ("a number for an answer", {**TEXTS, "rejected": 4}, UNKNOWN),
    ("a number for a prompt", {**PLAIN, "prompt": 4}, UNKNOWN),
    ("a number for a baseline", {**PLAIN, "baseline": 4}, UNKNOWN),
    ("neither prompt nor dialogue", {"chosen": "good", "rejected": "bad"}, UNKNOWN),
    ("texts for turns", {**PLAIN, "prompt": ["q"]}, UNKNOWN),
    ("objects for turns", {**PLAIN, "prompt": {"0": "q"}}, UNKNOWN),

    ("the prompt ends with the assistant", {**PLAIN, "prompt": [user("q"), assistant("a")]},
     MALFORMED),
    ("the prompt starts with the assistant", {**PLAIN, "prompt": [assistant("a"), user("q")]},
     MALFORMED),
    ("two user turns", {**PLAIN, "prompt": [user("q"), user("q")]}, MALFORMED),
    ("a late system turn", {**PLAIN, "prompt": [user("q"), system("s"), user("q")]}, MALFORMED),
    ("an empty user turn", {**PLAIN, "prompt": [user(" ")]}, MALFORMED),
    ("no prompt turn", {**PLAIN, "prompt": []}, MALFORMED),
    ("two answers", {**PLAIN, "chosen": [assistant("good"), assistant("better")]}, MALFORMED),
    ("an answer by the user", {**PLAIN, "chosen": [user("good")]}, MALFORMED),
    ("an unknown role", {**PLAIN, "prompt": [{"role": "tool", "content": "q"}]}, MALFORMED),
    ("an unknown role, as JSON", {**PLAIN, "prompt": '[{"role": "tool", "content": "q"}]'}, MALFORMED),
    ("no content", {**PLAIN, "prompt": [{"role": "user", "content": None}]}, MALFORMED),
    ("an image", {**PLAIN, "prompt": [{"role": "user", "content": [{"type": "image"}]}]},
     MALFORMED),
    ("messages printed by Python", {**TEXTS, "chosen": str([user("q"), assistant("a")])},
     MALFORMED),
    ("ShareGPT, an unknown speaker",
     {"conversations": [{"from": "observation", "value": "q"}],
      "chosen": sharegpt([assistant("a")]), "rejected": sharegpt([assistant("b")])}, MALFORMED),
    ("UltraFeedback, another prompt", {"prompt": "x", **dialogues([user("q")])}, MALFORMED),

    ("dialogues that share nothing",
     {"chosen": [user("q1"), assistant("good")], "rejected": [user("q2"), assistant("bad")]},
     MALFORMED),
    ("dialogues that part at a user turn",
     {"chosen": [user("q"), assistant("a"), user("x"), assistant("good")],
      "rejected": [user("q"), assistant("a"), user("y"), assistant("bad")]}, MALFORMED),
    ("dialogues that part early",
     {"chosen": [user("q"), assistant("a"), user("x"), assistant("good")],
      "rejected": [user("q"), assistant("bad")]}, MALFORMED),
    ("a dialogue without its prompt",
     {"chosen": [user("q"), assistant("good")], "rejected": [assistant("bad")]}, MALFORMED),
    # The last "\n\nAssistant:" of chosen is no cut for both: rejected would lose or keep too much.
    ("HH, parting before chosen's last turn",
     {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: more\n\nAssistant: good",
      "rejected": "\n\nHuman: q\n\nAssistant: bad"}, MALFORMED),
    ("HH, two turns of one role", hh("q\n\nHuman: q"), MALFORMED),
    ("HH, answer after answer", hh("q\n\nAssistant: a"), MALFORMED),
    ("HH, text before the first turn", {side: "x" + text for side, text in hh("q").items()},
     MALFORMED),
]

@cases("row, why", DROPPED)
def test_rows_are_dropped_for_a_reason(row, why):
    with pytest.raises(ValueError) as error:
        to_record(row)
    assert str(error.value) == why

def test_one_system_prompt_makes_a_chat_of_all_rows(folder):
    """Not of its own row alone: records of two kinds in one file would be two kinds of training."""
    put("p.jsonl", jsonl([{"system": "be kind", **pair(0)}, pair(1), {"system": None, **pair(2)}]))
    _, train = prepare("p.jsonl")
    assert [record["prompt"] for record in train] == [
        [system("be kind"), user("q0")],
        [user("q1")],
        [user("q2")],
    ]

def test_an_empty_system_column_makes_no_chat(folder):
    put("p.jsonl", jsonl([{"system": "", **pair(0)}]))
    assert prepare("p.jsonl")[1] == [pair(0)]

# --------------------------------------------------------------------------------------------------
# files, folders, hub

# Numbers and words for "nothing" stay text; line breaks stay in their cell.
ODD_ROWS = [
    pair(0),
    {"prompt": 'a, "b"\nc', "chosen": "42", "rejected": "NA"},
    {"prompt": "\u2028 \u00fc", "chosen": "01", "rejected": "null"},
]

def as_csv(rows):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()

def as_parquet(rows):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()

FILES = {
    "array.json": json.dumps(ODD_ROWS, indent=1),
    "lines.json": jsonl(ODD_ROWS),
    "p.jsonl": jsonl(ODD_ROWS),
    "blank_lines.jsonl": "\n" + jsonl(ODD_ROWS).replace("}\n", "}\r\n \r\n"),
    "p.csv": as_csv(ODD_ROWS),
    "trailing_comma.csv": as_csv(ODD_ROWS).replace("\r\n", ",\r\n"),
    "p.parquet": as_parquet(ODD_ROWS),
    "UPPER.JSONL": jsonl(ODD_ROWS),
    "bom.csv": "\ufeff" + as_csv(ODD_ROWS),
    "bom.json": "\ufeff" + json.dumps(ODD_ROWS),
}

@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("name", FILES)
def test_formats(folder, name, ending):
    put(name + ending, FILES[name])
    assert prepare(name + ending)[1] == ODD_ROWS
    assert sorted(os.listdir("out")) == ["meta.json", "train.jsonl"]

def test_parquet_of_messages(folder):
    put("p.parquet", as_parquet([{**dialogues(TALK), "dataset": "x"}]))
    assert prepare("p.parquet")[1] == [DEEP]

def test_quotes_inside_a_csv_cell_are_text(folder):
    put("p.csv", 'prompt,chosen,rejected\n6" or 7"?,it is 7",""" is an inch"\n')
    record = {"prompt": '6" or 7"?', "chosen": 'it is 7"', "rejected": '" is an inch'}
    assert prepare("p.csv")[1] == [record]

def test_rows_of_all_layouts_in_one_file(folder):
    # A system column beside texts would make a chat of all rows.
    kept = [case for case in KEPT if case[0] != "a system column beside HH"]
    put("p.jsonl", jsonl(row for _, row, _ in kept))
    assert prepare("p.jsonl", "--test_size", 0)[1] == [record for _, _, record in kept]

def test_half_a_surrogate_pair_becomes_a_question_mark(folder):
    put("p.jsonl", '{"prompt": "q", "chosen": "\\ud83d!", "rejected": "b"}')
    assert prepare("p.jsonl")[1] == [{"prompt": "q", "chosen": "?!", "rejected": "b"}]

def test_dropped_rows_are_counted(folder):
    put("p.jsonl", jsonl([pair(0), *(row for name, row, _ in DROPPED if "UTF-8" not in name)]))
    meta, train = prepare("p.jsonl")
    reasons = Counter(reason for name, _, reason in DROPPED if "UTF-8" not in name)
    assert train == [pair(0)]
    assert meta["dropped"] == dict(sorted(reasons.items()))
    assert meta["pairs read"] == 1 + reasons.total()
    assert meta["left out by limits"] == 0

def test_a_folder_has_its_own_test_split(folder):
    put("mine/train_prefs-00000-of-00002.jsonl.gz", jsonl(map(pair, range(5))))
    put("mine/train_prefs-00001-of-00002.json", json.dumps([pair(5)]))
    put("mine/test.jsonl", jsonl([pair(0), *map(pair, range(100, 104))]))
    put("mine/README.md", "no data")
    meta, train = prepare("mine")
    assert train == [pair(i) for i in range(6)]
    assert read("out/test.jsonl") == [pair(0), *map(pair, range(100, 104))]
    assert meta["pairs read"] == 11
    assert meta["test pairs whose prompt is in train, too"] == 1

def test_test_size_limits_a_source_s_own_test_split(folder):
    put("mine/train.jsonl", jsonl(map(pair, range(6))))
    put("mine/test.jsonl", jsonl(map(pair, range(100, 105))))
    _, train = prepare("mine", "--test_size", 2)
    test = read("out/test.jsonl")
    assert len(train) == 6
    assert len(test) == 2 and all(record in map(pair, range(100, 105)) for record in test)

def test_the_case_of_a_file_s_name_does_not_matter(folder):
    """Else both were trained on, and nothing were held out."""
    put("mine/Train.jsonl", jsonl(map(pair, range(6))))
    put("mine/Test.jsonl", jsonl(map(pair, range(100, 104))))
    assert prepare("mine")[1] == [pair(i) for i in range(6)]
    assert read("out/test.jsonl") == [pair(i) for i in range(100, 104)]

def test_files_that_are_not_read_are_named(folder, capsys):
    put("mine/train.jsonl", jsonl([pair(0)]))
    put("mine/train_sft.jsonl", jsonl([{"messages": []}]))
    assert prepare("mine")[1] == [pair(0)]
    assert "mine: not read: train_sft.jsonl" in capsys.readouterr().out

def test_a_lone_file_is_to_train_on_whatever_its_name(folder):
    put("mine/my_test.jsonl", jsonl([pair(0)]))
    assert prepare("mine")[1] == [pair(0)]

def test_the_hub_s_preference_splits_are_taken(folder, monkeypatch):
    import datasets

    rows = {
        "train_sft": [{"messages": []}],
        "train_prefs": [{"prompt": "q", **dialogues([user("q")])}],
        "test_prefs": [{"prompt": "r", **dialogues([user("r")])}],
    }
    splits = {name: datasets.Dataset.from_list(some) for name, some in rows.items()}
    hub = {"HuggingFaceH4/ultrafeedback_binarized": datasets.DatasetDict(splits)}
    monkeypatch.setattr(datasets, "load_dataset", hub.__getitem__)
    assert prepare("ultrafeedback")[1] == [PLAIN]
    assert read("out/test.jsonl") == [{**PLAIN, "prompt": [user("r")]}]

def test_a_hub_out_of_reach_is_one_line(folder, capsys, monkeypatch):
    import datasets

    def load_dataset(name):
        raise ConnectionResetError(f"no\n\nroute to {name}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    line = refusal(capsys, "hh-rlhf")
    assert "hub dataset Anthropic/hh-rlhf cannot be loaded: no route to Anthropic/hh-rlhf" in line
    assert os.listdir() == []

# --------------------------------------------------------------------------------------------------
# what is kept, what is written

def test_statistics_by_hand(folder):
    put("p.jsonl", jsonl([
        {"prompt": "abc", "chosen": "xx", "rejected": "x"},
        {"prompt": "abc", "chosen": "xx", "rejected": "xxxxx"},
        {"prompt": "abcdef", "chosen": "yy", "rejected": "xx"},
        {"prompt": "abc", "chosen": "xx", "rejected": "x"},
    ]))
    meta, _ = prepare("p.jsonl", "--test_size", 0)
    # The duplicated pair stays; two of the three pairs that differ in length have a longer chosen.
    assert meta["kept"] == {"train": 4, "test": 0}
    assert meta["longer response is the chosen one"] == pytest.approx(2 / 3)
    assert meta["characters"]["prompt"] == {"mean": 3.75, "median": 3.0, "max": 6}
    assert meta["characters"]["rejected"] == {"mean": 2.25, "median": 1.5, "max": 5}

def test_the_closing_table_is_meta_json(folder, capsys):
    put("p.jsonl", jsonl([pair(0), {**pair(1), "chosen": ""}]))
    prepare("p.jsonl")
    table = capsys.readouterr().out.splitlines()
    assert f"{'dropped, empty response':56}{1:12}" in table
    assert f"{'kept, train':56}{1:12}" in table
    assert f"{'characters, prompt, mean':56}{2:12.2f}" in table
    assert table[-1] == "written to out"

@pytest.fixture
def forty(folder):
    put("p.jsonl", jsonl(map(pair, range(40))))

def held_out(*argv):
    """-> the numbers of the training pairs and of the test pairs."""
    prepare("p.jsonl", *argv)
    paths = ["out/train.jsonl", "out/test.jsonl"]
    return [[int(record["prompt"][1:]) for record in read(path)] for path in paths]

def test_held_out_pairs_are_not_trained_on(forty):
    train, test = held_out("--test_size", 7)
    assert len(test) == 7 and sorted(train + test) == list(range(40))
    assert train == sorted(train) and test == sorted(test)

def test_a_tenth_is_held_out_by_default(forty):
    assert len(held_out()[1]) == 4

def test_the_split_is_drawn_by_the_seed(forty):
    assert held_out("--test_size", 7) == held_out("--test_size", 7)
    assert held_out("--test_size", 7)[1] != held_out("--test_size", 7, "--seed", 1)[1]

def test_limit_draws_training_pairs_and_leaves_the_test_pairs(forty):
    train, test = held_out("--test_size", 7)
    fewer, same = held_out("--test_size", 7, "--limit", 10)
    assert same == test
    assert len(fewer) == 10 and set(fewer) < set(train) and fewer != train[:10]
    assert json.loads(Path("out/meta.json").read_text())["left out by limits"] == 23

def test_no_test_file_of_an_earlier_call_is_left(forty):
    held_out()
    prepare("p.jsonl", "--test_size", 0)
    assert not os.path.exists("out/test.jsonl") and len(read("out/train.jsonl")) == 40

def test_the_folder_is_named_after_the_source(folder):
    put("mine.jsonl.gz", jsonl([pair(0)]))
    prepare_data.run(["mine.jsonl.gz"])
    prepare_data.run(["./mine.jsonl.gz"])  # the same source may be prepared again
    assert read("data/mine/train.jsonl") == [pair(0)]

def test_pairs_of_somebody_else_are_not_overwritten_unasked(folder, capsys):
    """A folder without meta.json was not written here."""
    put("data/mine/train.jsonl", jsonl([pair(1)]))
    put("mine.jsonl", jsonl([pair(0)]))
    with pytest.raises(SystemExit):
        prepare_data.run(["mine.jsonl"])
    assert "data/mine holds pairs of somebody else" in capsys.readouterr().err
    assert read("data/mine/train.jsonl") == [pair(1)]

def test_the_current_folder_as_source_is_called_by_its_name(folder, monkeypatch):
    put("here/train.jsonl", jsonl([pair(0)]))
    monkeypatch.chdir("here")
    prepare_data.run(["."])
    assert read("data/here/train.jsonl") == [pair(0)]

def test_show_prints_records(folder, capsys):
    put("p.jsonl", jsonl([pair(0), pair(1)]))
    prepare("p.jsonl", "--show", 1)
    shown = capsys.readouterr().out
    assert 'prompt: "q0"\nchosen: "good 0"\nrejected: "bad 0"\n' in shown and "q1" not in shown

def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)

@pytest.mark.parametrize("umask", [0o022, 0o002])
def test_what_is_written_obeys_the_umask(folder, umask):
    """safetensors alone makes files that no colleague can read."""
    tokenizer = prepare_data.make_tokenizer()
    before = os.umask(umask)
    try:
        prepare_data.write("out", [pair(0)], [], {}, prepare_data.make_model(tokenizer), tokenizer)
    finally:
        os.umask(before)
    for path in Path("out").rglob("*"):
        assert mode(path) == (0o777 if path.is_dir() else 0o666) & ~umask, path

def test_a_new_toy_model_takes_the_place_of_the_old_one(folder):
    tokenizer = prepare_data.make_tokenizer()
    put("out/model/model.safetensors", "old")
    put("out/model/another.safetensors", "old")
    prepare_data.write("out", [pair(0)], [], {}, prepare_data.make_model(tokenizer), tokenizer)
    assert not os.path.exists("out/model/another.safetensors")
    assert os.path.getsize("out/model/model.safetensors") > 100_000
    assert os.listdir() == ["out"]

def test_other_pairs_leave_a_model_that_is_there(folder):
    put("out/model/model.safetensors", "old")
    put("p.jsonl", jsonl([pair(0)]))
    prepare("p.jsonl")
    assert Path("out/model/model.safetensors").read_text() == "old"

def test_what_a_killed_run_left_is_cleared_away(folder):
    put("out.partial/test.jsonl", "half a li")
    put("p.jsonl", jsonl([pair(0)]))
    prepare("p.jsonl")
    assert sorted(os.listdir()) == ["out", "p.jsonl"]
    assert sorted(os.listdir("out")) == ["meta.json", "train.jsonl"]

@contextmanager
def as_nobody():
    """Permissions do not bind root. Within its working directory it may act as another user."""
    root = os.geteuid() == 0
    if root:
        os.chmod(".", 0o777)
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)

@pytest.mark.parametrize("closed", ["p.jsonl", "mine"])
def test_a_source_that_may_not_be_read_is_one_line(folder, capsys, closed):
    put("p.jsonl", jsonl([pair(0)]))
    put("mine/train.jsonl", jsonl([pair(0)]))
    os.chmod(closed, 0)
    with as_nobody():
        line = refusal(capsys, closed, "--out", "out")
    assert "Permission denied" in line and closed in line

def test_a_folder_that_may_not_be_written_stays_as_it_was(folder, capsys):
    put("p.jsonl", jsonl(map(pair, range(3))))
    prepare("p.jsonl")
    before = files(folder)
    os.chmod("out", 0o555)
    with as_nobody():
        assert "cannot write out" in refusal(capsys, "p.jsonl", "--out", "out", "--limit", 1)
    assert files(folder) == before and sorted(os.listdir()) == ["out", "p.jsonl"]

@contextmanager
def full_disk(size):
    """Files cannot grow beyond a size in bytes: the write itself fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

def test_a_full_disk_leaves_the_folder_as_it_was_and_nothing_beside_it(folder, capsys):
    put("p.jsonl", jsonl(map(pair, range(2000))))
    prepare("p.jsonl", "--limit", 5)
    before = files(folder)
    with full_disk(20_000):
        line = refusal(capsys, "p.jsonl", "--out", "out")
    assert "cannot write out: [Errno 27] File too large" in line
    assert files(folder) == before and sorted(os.listdir()) == ["out", "p.jsonl"]

def test_a_disk_that_the_toy_model_fills_leaves_nothing(folder):
    """safetensors raises an error of its own type."""
    tokenizer = prepare_data.make_tokenizer()
    model = prepare_data.make_model(tokenizer)
    with full_disk(100_000), pytest.raises(OSError, match="cannot write out: .*File too large"):
        prepare_data.write("out", [pair(0)], [], {}, model, tokenizer)
    assert os.listdir() == []

def test_a_run_that_is_interrupted_leaves_the_folder_as_it_was(folder, capsys, monkeypatch):
    put("p.jsonl", jsonl(map(pair, range(3))))
    prepare("p.jsonl")
    before = files(folder)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data, "move_stage", interrupted)
    assert refusal(capsys, "p.jsonl", "--out", "out", "--limit", 1) == "error: interrupted\n"
    assert files(folder) == before

# --------------------------------------------------------------------------------------------------
# what is refused

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
GOOD = jsonl(map(pair, range(3)))
HEADER = "prompt,chosen,rejected\n"
CSV_ROWS = "".join(f'q{i},"a, {i}","b, {i}"\n' for i in range(20))
TOY = jsonl([PLAIN, {**PLAIN, "prompt": TALK}])

def answers(*instructions, **more):
    return json.dumps([{"instruction": text, "output": "so so", **more} for text in instructions])

# name, {file: its content, not compressed here}, arguments, what the line says
FAULTS = [
    ("an empty file", {"p.jsonl": ""}, "p.jsonl", "p.jsonl is empty"),
    ("blank lines", {"p.jsonl": "\n\n"}, "p.jsonl", "p.jsonl is empty"),
    ("an empty array", {"p.json": "[]"}, "p.json", "p.json holds no rows"),
    ("a header alone", {"p.csv": HEADER}, "p.csv", "p.csv holds no rows"),
    ("an empty gz", {"p.jsonl.gz": ""}, "p.jsonl.gz", "p.jsonl.gz is empty"),
    ("a git-lfs pointer", {"p.jsonl": LFS}, "p.jsonl", "p.jsonl is a git-lfs pointer"),
    ("a git-lfs pointer to parquet", {"p.parquet": LFS}, "p.parquet", "run git lfs pull"),
    ("a git-lfs pointer to a gz", {"p.json.gz": LFS}, "p.json.gz", "is a git-lfs pointer"),
    ("no gz", {"p.jsonl.gz": GOOD}, "p.jsonl.gz", "p.jsonl.gz cannot be read as gzip"),
    ("half a gz", {"p.jsonl.gz": gzip.compress(GOOD.encode())[:40]}, "p.jsonl.gz", "as gzip"),
    ("no parquet", {"p.parquet": b"PAR1 not"}, "p.parquet", "p.parquet cannot be read as parquet"),
    ("another format", {"p.txt": "x"}, "p.txt", "p.txt: no file that ends in .json, .jsonl"),
    ("Latin-1", {"p.jsonl": b'{"prompt": "\xff"}'}, "p.jsonl", "p.jsonl is not UTF-8 text"),
    ("UTF-16", {"p.csv": HEADER.encode("utf-16")}, "p.csv", "save it as UTF-8"),

    ("half a line", {"p.jsonl": GOOD + '{"prompt": \n'}, "p.jsonl", "line 4: malformed JSON"),
    ("a missing colon", {"p.json": '[\n{"a": 1},\n{"a" 2}]'}, "p.json", "p.json line 3: malformed"),
    ("a number for a row", {"p.jsonl": GOOD + "7\n"}, "p.jsonl", "row 4: not a JSON object"),
    ("a line of brackets", {"p.jsonl": GOOD + "[" * 100_000}, "p.jsonl",
     "p.jsonl line 4: nested too deeply"),
    ("a file of brackets", {"p.json": "[" * 100_000}, "p.json", "p.json line 1: nested too deeply"),
    ("a huge number", {"p.jsonl": '{"a": ' + "1" * 5000 + "}"}, "p.jsonl",
     "p.jsonl line 1: malformed JSON"),

    ("a quote that opens the last cell", {"p.csv": HEADER + CSV_ROWS + 'q,a,"b'}, "p.csv",
     "the row that begins in line 22 cannot be read: unexpected end of data"),
    ("a quote that nothing closes", {"p.csv": HEADER + 'q,"a,b\n' + "q,a,b\n" * 30}, "p.csv",
     "the row that begins in line 2 cannot be read: unexpected end of data"),
    ("a quote that the next one closes", {"p.csv": HEADER + 'q,"a,b\n' + CSV_ROWS}, "p.csv",
     "does it hold a quote that does not close?"),
    ("one stray quote among three rows", {"p.csv": HEADER + 'q,a,b\nq,a,"b\nq,a,b\n'}, "p.csv",
     "the row that begins in line 3"),
    ("a quote in the header that nothing closes", {"p.csv": 'prompt,"chosen,rejected\nq,a,b\n'},
     "p.csv", "the row that begins in line 1"),
    ("quotes escaped with backslashes", {"p.csv": HEADER + r'q,"say \"hi\" twice",b' + "\n"},
     "p.csv", "the row that begins in line 2"),
    ("a comma without quotes", {"p.csv": HEADER + "q,a\n\nq,yes, it is,b\n"}, "p.csv",
     "p.csv line 3: more cells than the header has"),
    ("two columns of one name", {"p.csv": "prompt,chosen,rejected,chosen\n"}, "p.csv",
     "p.csv: two columns have one name: prompt, chosen, rejected, chosen"),
    ("a line break in the header", {"p.csv": '"the\nquestion",answer\nq,a\n'}, "p.csv",
     "unknown layout, columns the question (text), answer (text)"),

    ("columns of another task", {"p.jsonl": jsonl([{"question": "q", "answer": "a"}])}, "p.jsonl",
     "unknown layout, columns question (text), answer (text); known: prompt + chosen + rejected"),
    ("a json of columns", {"p.json": json.dumps({key: ["a", "b"] for key in pair(0)})}, "p.json",
     "unknown layout, columns prompt (list of text), chosen (list of text), rejected"),
    ("a json of columns by row number",
     {"p.json": json.dumps({key: {"0": "a"} for key in pair(0)})}, "p.json",
     "unknown layout, columns prompt (object), chosen (object), rejected (object)"),
    ("answers of other kinds", {"p.jsonl": jsonl([{"prompt": "q", "chosen": 1, "rejected": None}])},
     "p.jsonl", "columns prompt (text), chosen (number), rejected (NoneType)"),
    ("unpaired messages", {"p.jsonl": jsonl([{"messages": [user("q")], "label": True}])}, "p.jsonl",
     "p.jsonl is unpaired (columns messages, label)"),
    ("an unpaired csv", {"p.csv": "prompt,completion,label\nq,a,False\n"}, "p.csv",
     "p.csv is unpaired (columns prompt, completion, label)"),
    ("equal answers only", {"p.jsonl": jsonl([{**TEXTS, "chosen": "bad"}] * 3)}, "p.jsonl",
     "no pair left, dropped: 3 identical responses"),
    ("a test split without pairs", {"in/train.jsonl": GOOD, "in/test.jsonl": "{}"}, "in",
     "in, test split: unknown layout"),

    ("no such file", {}, "none.jsonl", "no file or folder none.jsonl\n"),
    ("no such folder", {}, "./none", "no file or folder ./none\n"),
    ("no such folder below others", {}, "some/where/else", "no file or folder some/where/else\n"),
    ("an empty folder", {"in/README.md": "x"}, "in", "in: no file that ends in .json"),
    ("a folder without a train file", {"in/test.jsonl": GOOD}, "in", "in: no train file"),
    ("a folder of doubtful names", {"in/my_test.jsonl": GOOD, "in/my_train.jsonl": GOOD}, "in",
     "in: which of my_test.jsonl, my_train.jsonl is to train on?"),
    ("--out is a file", {"p.jsonl": GOOD}, "p.jsonl --out p.jsonl", "p.jsonl is a file"),
    ("--out lies in a file", {"p.jsonl": GOOD, "x": ""}, "p.jsonl --out x/y",
     "x is no folder that may be written to"),
    ("--out is the source", {"in/train.jsonl": GOOD}, "in --out in/../in",
     "--out in would overwrite the source in"),
    ("--out holds the source", {"in/test.jsonl": GOOD}, "in/test.jsonl --out in",
     "--out in would overwrite the source in/test.jsonl"),
    ("a name that is taken", {"p.jsonl": GOOD, "data/p/meta.json": '{"source": "p.csv"}'},
     "p.jsonl", "data/p holds what was made of p.csv: name a folder with --out"),
    ("a name taken by who knows what", {"p.jsonl": GOOD, "data/p/meta.json": "[1]"}, "p.jsonl",
     "data/p holds what was made of something else"),

    ("--limit 0", {"p.jsonl": GOOD}, "p.jsonl --limit 0", "--limit must be 1 or more, not 0"),
    ("--limit many", {}, "--limit many", "--limit: invalid int value: 'many'"),
    ("--test_size -1", {}, "--test_size -1", "--test_size must be 0 or more, not -1"),
    ("--test_size of all pairs", {"p.jsonl": GOOD}, "p.jsonl --test_size 3",
     "--test_size 3 leaves none of 3 pairs to train on"),
    ("--show -1", {}, "--show -1", "--show must be 0 or more, not -1"),
    ("--sft_steps 0", {}, "--sft_steps 0", "--sft_steps must be 1 or more, not 0"),
    ("--seed -1", {}, "--seed -1", "--seed must be 0 or more, not -1"),
    ("--seed beyond 64 bits", {}, "--seed 99999999999999999999", "--seed must be below 2**63"),
    ("an unknown flag", {}, "--sead 1", "unrecognized arguments: --sead; python"),
    ("half a flag", {}, "--test 1", "unrecognized arguments: --test; python"),

    ("--baseline without a data folder", {"a.json": answers("q")}, "toy --baseline a.json",
     "toy/train.jsonl does not exist"),
    ("--baseline on other rows", {"in/train.jsonl": '{"text": "x"}', "a.json": answers("q")},
     "in --baseline a.json --out o", "in/train.jsonl row 1 has no prompt, chosen and rejected"),
    ("--baseline on odd prompts", {"in/train.jsonl": jsonl([{**PLAIN, "prompt": ["q"]}])},
     "in --baseline a.json --out o", "in/train.jsonl row 1 has a prompt of no known kind"),
    ("no answers", {"in/train.jsonl": TOY}, "in --baseline a.json --out o", "No such file"),
    ("answers of another kind", {"in/train.jsonl": TOY, "a.jsonl": GOOD},
     "in --baseline a.jsonl --out o", "a.jsonl row 1 has no instruction and output"),
    ("a prompt without an answer", {"in/train.jsonl": TOY, "a.json": answers("q")},
     "in --baseline a.json --out o", "a.json answers all but 1 of 2 training pairs, such as 'sys"),
    ("an answer cut short", {"in/train.jsonl": TOY, "a.json": answers("q", ended=False)},
     "in --baseline a.json --out o", "a.json answers all but 2 of 2 training pairs"),
    ("--baseline into its source", {"in/train.jsonl": TOY, "a.json": answers("q")},
     "in --baseline a.json --out in", "--out in would overwrite the source in"),
    ("--baseline with --limit", {}, "in --baseline a.json --out o --limit 1", "leave out --limit"),
]

@cases("contents, argv, says", FAULTS)
def test_a_fault_is_one_line_and_changes_nothing(folder, capsys, contents, argv, says):
    for path, content in contents.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = files(folder)
    assert says in refusal(capsys, *argv.split())
    assert files(folder) == before

def test_the_traceback_is_there_for_who_asks(folder, monkeypatch):
    monkeypatch.setenv("RPO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no file or folder none.jsonl"):
        prepare_data.run(["none.jsonl"])

def test_the_exit_code_of_the_program_is_2(folder):
    command = [sys.executable, ROOT / "prepare_data.py", "none.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: no file or folder none.jsonl\n"

def test_an_error_that_no_check_expects_is_named(folder, capsys, monkeypatch):
    def broken(path):
        raise KeyError("x")

    monkeypatch.setattr(prepare_data, "read_bytes", broken)
    put("p.jsonl", GOOD)
    assert refusal(capsys, "p.jsonl") == "error: KeyError: 'x'\n"

def test_help_needs_no_slow_import():
    """torch and transformers take seconds, and whoever asks for help waits for them."""
    tree = ast.parse((ROOT / "prepare_data.py").read_text(encoding="utf-8"))
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    assert names - sys.stdlib_module_names == {"tqdm"}

def test_help_fits_100_columns_and_states_each_default_once(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        prepare_data.run(["--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    # Eight arguments, --help itself aside.
    flags = [line for line in text.splitlines() if line.startswith("  --")]
    assert len(flags) == 7 and " ".join(text.split()).count("(default: ") == 8

# --------------------------------------------------------------------------------------------------
# another baseline policy

def data_folder():
    """Two training pairs, of which the first has keys of its own, a test pair, and meta.json."""
    put("in/train.jsonl", jsonl([{**PLAIN, "gold_chosen": 0.5}, DEEP]))
    put("in/test.jsonl", jsonl([{**PLAIN, "prompt": [user("r")]}]))
    put("in/meta.json", '{"source": "toy", "kept": {"train": 2, "test": 1}}')

# A lone message asks with its content, a dialogue with paragraphs of "role: content".
TALK_AS_TEXT = "system: be kind\n\nuser: q1\n\nassistant: a1\n\nuser: q2"

def test_baselines_are_filled_in_by_prompt(folder):
    data_folder()
    put("a.json", json.dumps([
        {"instruction": TALK_AS_TEXT, "output": "deep", "generator": "ref"},
        {"instruction": "q", "output": "plain", "generator": "ref"},
    ]))
    _, train = prepare("in", "--baseline", "a.json")
    assert train == [
        {**PLAIN, "gold_chosen": 0.5, "baseline": [assistant("plain")]},
        {**DEEP, "baseline": [assistant("deep")]},
    ]

def test_the_first_answer_that_ended_is_the_baseline(folder):
    data_folder()
    put("a.jsonl", jsonl([
        {"instruction": TALK_AS_TEXT, "output": "deep"},
        {"instruction": "q", "output": "on and on and", "ended": False, "sample": 0},
        {"instruction": "q", "output": " ", "ended": True, "sample": 1},
        {"instruction": "q", "output": "first", "ended": True, "sample": 2},
        {"instruction": "q", "output": "second", "ended": True, "sample": 3},
    ]))
    _, train = prepare("in", "--baseline", "a.jsonl")
    assert train[0]["baseline"] == [assistant("first")]

def test_a_test_pair_without_an_answer_stays_as_it_is(folder):
    data_folder()
    put("a.json", answers("q", TALK_AS_TEXT))
    meta, _ = prepare("in", "--baseline", "a.json")
    assert read("out/test.jsonl") == read("in/test.jsonl")
    assert meta["baseline"] == {"answers": "a.json", "filled": {"train": 2, "test": 0}}

def test_a_test_pair_with_an_answer_gets_it(folder):
    data_folder()
    put("a.json", answers("q", TALK_AS_TEXT, "r"))
    meta, _ = prepare("in", "--baseline", "a.json")
    assert [record["baseline"] for record in read("out/test.jsonl")] == [[assistant("so so")]]
    assert meta["baseline"]["filled"] == {"train": 2, "test": 1}

def test_meta_json_goes_along_with_baselines(folder):
    """eval.py knows by its source that the toy's gold reward applies."""
    data_folder()
    put("a.json", answers("q", TALK_AS_TEXT))
    meta, _ = prepare("in", "--baseline", "a.json")
    assert meta["source"] == "toy" and meta["kept"] == {"train": 2, "test": 1}

def test_a_baseline_of_raw_text_is_raw_text(folder):
    put("in/train.jsonl", jsonl([pair(0)]))
    put("a.json", answers("q0"))
    assert prepare("in", "--baseline", "a.json")[1] == [{**pair(0), "baseline": "so so"}]
    assert not os.path.exists("out/test.jsonl")

# --------------------------------------------------------------------------------------------------
# the toy's tokenizer, model and pairs

@pytest.fixture(scope="module")
def tokenizer():
    return prepare_data.make_tokenizer()

ASKED = [user("name two summer clothes")]
ANSWERED = [*ASKED, assistant("t-shirt and shorts .")]

def test_the_template_writes_a_conversation(tokenizer):
    text = tokenizer.apply_chat_template(ANSWERED, tokenize=False)
    assert text == "<s><|user|> name two summer clothes <|assistant|> t-shirt and shorts .</s>"

def test_the_template_opens_a_response(tokenizer):
    prompt = [*ASKED, assistant("x"), user("again")]
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    opening = "<s><|user|> name two summer clothes <|assistant|> x</s>"
    assert text == opening + "<|user|> again <|assistant|>"

def test_a_word_is_a_token(tokenizer):
    ids = tokenizer.apply_chat_template(ANSWERED)["input_ids"]
    words = "<s> <|user|> name two summer clothes <|assistant|> t-shirt and shorts . </s>".split()
    assert tokenizer.convert_ids_to_tokens(ids) == words
    assert tokenizer.decode(ids[7:-1]) == "t-shirt and shorts ."

def test_a_prompt_s_tokens_begin_those_of_the_conversation(tokenizer):
    prompt = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True)["input_ids"]
    assert tokenizer.apply_chat_template(ANSWERED)["input_ids"][:7] == prompt

def test_the_tokenizer_knows_every_word_of_the_world(tokenizer):
    texts = [*PROMPTS, *(messy(prompt, random.Random(prompt)) for prompt in PROMPTS)]
    ids = tokenizer.convert_tokens_to_ids(" ".join(texts).split())
    assert tokenizer.unk_token_id not in ids and len(tokenizer) == 138

def test_the_reference_learns_answers_only(tokenizer, monkeypatch):
    batches = []
    forward = LlamaForCausalLM.forward

    def spy(self, **batch):
        batches.append(batch)
        return forward(self, **batch)

    monkeypatch.setattr(LlamaForCausalLM, "forward", spy)
    prepare_data.train_reference(tokenizer, PROMPTS, random.Random(0), 1)
    (batch,) = batches
    assert batch["labels"].shape == batch["input_ids"].shape and len(batch["labels"]) == 32
    for ids, labels in zip(batch["input_ids"], batch["labels"]):
        answer = tokenizer.decode(ids).split("<|assistant|> ")[1]
        n = len(answer.split())
        # The answer is at the end of its row, up to and with the end token, and nothing else is.
        assert answer.endswith(" </s>")
        assert labels[-n:].tolist() == ids[-n:].tolist() and (labels[:-n] == -100).all()

class Parrot:
    """A model that says what it is told to and keeps how it was asked."""

    def __init__(self, tokenizer, said):
        self.ids = torch.tensor([tokenizer.convert_tokens_to_ids(text.split()) for text in said])
        self.tokenizer = tokenizer
        self.asked = []
        self.how = []

    def generate(self, input_ids, attention_mask, **how):
        for ids, mask in zip(input_ids, attention_mask):
            self.asked.append(self.tokenizer.decode(ids[mask == 1]))
        self.how.append(how)
        return torch.cat([input_ids, self.ids], 1)

SAID = [
    "cherry and tomato . </s> <pad>",
    "cherry , cherry , cherry ,",
    "</s> <pad> <pad> <pad> <pad> <pad>",
]
HEARD = [("cherry and tomato .", True), ("cherry , cherry , cherry ,", False), ("", True)]

def test_responses_end_at_the_end_token_or_not_at_all(tokenizer):
    model = Parrot(tokenizer, SAID)
    assert prepare_data.respond(model, tokenizer, [TWO, THREE, TOOLS]) == HEARD
    assert prepare_data.respond(model, tokenizer, [TWO, THREE, TOOLS], greedy=True) == HEARD

def test_the_model_is_asked_the_prompts_alone(tokenizer):
    """No padding is seen, of which prompts of unequal lengths have unequally much."""
    model = Parrot(tokenizer, SAID)
    prepare_data.respond(model, tokenizer, [TWO, THREE, TOOLS])
    assert model.asked == [f"<s> <|user|> {prompt} <|assistant|>" for prompt in (TWO, THREE, TOOLS)]

def test_samples_are_drawn_from_the_model_itself(tokenizer):
    """At temperature 1 and from all tokens: the pairs are on policy."""
    model = Parrot(tokenizer, SAID)
    prepare_data.respond(model, tokenizer, [TWO, THREE, TOOLS])
    prepare_data.respond(model, tokenizer, [TWO, THREE, TOOLS], greedy=True)
    assert model.how == [{"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}, {}]

GOOD_ANSWER, BAD_ANSWER = ("cherry and tomato .", True), ("lemon , milk , rice and corn .", True)

class Coin(random.Random):
    """A coin that always falls the same way."""

    def __init__(self, value):
        super().__init__(0)
        self.value = value

    def random(self):
        return self.value

def test_draws_that_make_no_pair_are_counted_and_repeated(monkeypatch):
    first = [GOOD_ANSWER, ("um um", False), ("", True), BAD_ANSWER]
    first += [GOOD_ANSWER, GOOD_ANSWER, BAD_ANSWER, GOOD_ANSWER]
    script = [first, [GOOD_ANSWER, BAD_ANSWER] * 3]
    monkeypatch.setattr(prepare_data, "respond", lambda *args: script.pop(0))
    dropped = Counter()
    made = prepare_data.sample_pairs(None, None, [TWO] * 4, Coin(0.5), dropped, "train")
    assert dropped == {UNENDED: 1, EMPTY: 1, IDENTICAL: 1} and script == []
    assert made == 4 * [{
        "prompt": [user(TWO)],
        "chosen": [assistant(GOOD_ANSWER[0])],
        "rejected": [assistant(BAD_ANSWER[0])],
        "gold_chosen": 1.0,
        "gold_rejected": -1.0,
    }]

def test_a_model_that_makes_no_pairs_is_not_asked_for_ever(monkeypatch):
    monkeypatch.setattr(prepare_data, "respond", lambda model, tokenizer, prompts: [
        GOOD_ANSWER for _ in prompts
    ])
    with pytest.raises(ValueError, match="makes no pairs .*train it longer with --sft_steps"):
        prepare_data.sample_pairs(None, None, [TWO] * 40, Coin(0.5), Counter(), "train")

BETTER, WORSE = "cherry and tomato .", "cherry , tomato ."

# Their gold is 1 and 0.5: the first is chosen below sigmoid(1.5) = 0.8176 or below 0.1824.
@pytest.mark.parametrize("first, second, coin, chosen", [
    (BETTER, WORSE, 0.817, BETTER),
    (BETTER, WORSE, 0.818, WORSE),
    (WORSE, BETTER, 0.182, WORSE),
    (WORSE, BETTER, 0.183, BETTER),
])
def test_the_coin_falls_by_sigmoid_of_three_times_the_gap(first, second, coin, chosen):
    record = prepare_data.label_pair(TWO, first, second, Coin(coin))
    assert record["chosen"] == [assistant(chosen)]
    assert record["gold_chosen"] == gold_reward(TWO, chosen)
    assert {record["gold_chosen"], record["gold_rejected"]} == {1.0, 0.5}

def toy(out, **changes):
    """A toy world of little training."""
    settings = {"limit": 30, "test_size": 8, "seed": 0, "sft_steps": 60, **changes}
    return prepare_data.make_toy(str(out), **settings)

@pytest.fixture(scope="module")
def small_toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "toy"
    toy(folder)
    return folder

def asked_in(path):
    return {record["prompt"][0]["content"] for record in read(path)}

def test_the_toy_is_a_data_folder_and_a_hugging_face_model(small_toy):
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    names |= {"tokenizer_config.json", "chat_template.jinja"}
    written = {"train.jsonl", "test.jsonl", "meta.json", *(f"model/{name}" for name in names)}
    assert set(files(small_toy)) == written

def test_the_toy_is_deterministic_in_the_seed(small_toy, tmp_path):
    toy(tmp_path / "again")
    assert files(tmp_path / "again") == files(small_toy)

def test_another_seed_is_another_toy(small_toy, tmp_path):
    toy(tmp_path / "other", seed=1)
    one, other = files(small_toy), files(tmp_path / "other")
    for name in ("train.jsonl", "test.jsonl", "model/model.safetensors"):
        assert one[name] != other[name]
    assert asked_in(small_toy / "test.jsonl") != asked_in(tmp_path / "other/test.jsonl")

def test_fewer_training_pairs_leave_model_and_test_pairs_as_they_are(small_toy, tmp_path):
    toy(tmp_path / "fewer", limit=5)
    one, fewer = files(small_toy), files(tmp_path / "fewer")
    assert one["test.jsonl"] == fewer["test.jsonl"]
    assert one["model/model.safetensors"] == fewer["model/model.safetensors"]
    assert len(read(tmp_path / "fewer/train.jsonl")) == 5

@pytest.fixture(scope="module")
def large_toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "toy"
    toy(folder, limit=600, test_size=304)
    return folder

def test_toy_prompts_are_asked_in_turn_and_held_out_ones_are_never_trained_on(large_toy):
    counts = {}
    for split in ("train", "test"):
        asked = [record["prompt"][0]["content"] for record in read(large_toy / f"{split}.jsonl")]
        counts[split] = Counter(asked)
    assert Counter(counts["test"].values()) == {2: 152}
    assert Counter(counts["train"].values()) == {1: 440, 2: 80}
    assert not counts["train"].keys() & counts["test"].keys()

def test_toy_records_carry_their_gold(large_toy):
    for record in read(large_toy / "train.jsonl") + read(large_toy / "test.jsonl"):
        prompt, chosen, rejected = (
            record[key][0]["content"] for key in ("prompt", "chosen", "rejected")
        )
        assert chosen != rejected
        assert record["gold_chosen"] == gold_reward(prompt, chosen)
        assert record["gold_rejected"] == gold_reward(prompt, rejected)

def test_toy_labels_agree_with_gold_as_often_as_the_coin_says(large_toy):
    """The mean of sigmoid(3 * gap) over the pairs, within four standard errors."""
    gaps = []
    for record in read(large_toy / "train.jsonl") + read(large_toy / "test.jsonl"):
        gaps.append(abs(record["gold_chosen"] - record["gold_rejected"]))
    p = torch.sigmoid(3 * torch.tensor([gap for gap in gaps if gap > 0]))
    error = (p * (1 - p)).sum().sqrt() / len(p)
    meta = json.loads((large_toy / "meta.json").read_text())
    assert error < 0.02
    assert abs(meta["labels that agree with gold"] - p.mean()) < 4 * error

def test_the_toy_model_loads_as_any_other(small_toy, tokenizer):
    loaded = AutoTokenizer.from_pretrained(small_toy / "model")
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.get_vocab() == tokenizer.get_vocab()
    model = AutoModelForCausalLM.from_pretrained(small_toy / "model")
    layer = 4 * 96 * 96 + 3 * 96 * 192 + 2 * 96
    assert model.num_parameters() == 138 * 96 + 2 * layer + 96

def test_the_toy_model_generates_within_its_limit(small_toy):
    tokenizer = AutoTokenizer.from_pretrained(small_toy / "model")
    model = AutoModelForCausalLM.from_pretrained(small_toy / "model")
    settings = model.generation_config
    ids = (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id)
    assert ids == (1, 2, 0) and settings.max_new_tokens == 32
    batch = prepare_data.encode([[user(TWO)], [user(THREE)]], tokenizer, add_generation_prompt=True)
    assert batch["input_ids"][0, 0] == 0  # padded on the left
    assert model.generate(**batch).shape[1] <= batch["input_ids"].shape[1] + 32

def test_toy_pairs_are_shown_with_their_scored_tokens(folder, capsys):
    prepare_data.run("--out t --limit 4 --test_size 0 --sft_steps 60 --show 2".split())
    out = capsys.readouterr().out
    assert out.count("|</s>\n") == 4 and out.count("<|assistant|>") == 2
    assert "reference on held-out prompts, greedy, mean gold" in out
    assert not os.path.exists("t/test.jsonl")
