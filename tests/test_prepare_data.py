"""prepare_data.py: the gold reward by hand, every layout with its traps, files, the toy's tokenizer and model."""

import gzip
import json
import os
import random
import subprocess
import sys
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import prepare_data
from prepare_data import PROMPTS, WORLD, convert, gold_reward, make_tokenizer, main, messy, parse_prompt, well_formed

U, A, S = (lambda text, role=role: {"role": role, "content": text} for role in ("user", "assistant", "system"))
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"

# ----------------------------------------------------------------------------------------------------------------------
# the gold reward

THREE = "name three sea animals except crab in abc order"  # cod crab seal tuna shark whale
TWO = "name two red foods"  # cherry tomato radish beetroot raspberry strawberry

@pytest.mark.parametrize(
    "prompt, response, ended, gold",
    [
        (THREE, "cod , seal and tuna .", True, 1.0),
        (THREE, "cod , seal and tuna .", False, 0.5),  # never ended: not well formed
        (THREE, "cod and seal .", True, 2 / 3),  # one short: two hits of three
        (THREE, "cod .", True, 1 / 3),  # a list of one is well formed
        (THREE, "cod , seal , shark and tuna .", True, 2 / 3),  # surplus: three hits, one error
        (THREE, "cod , seal , shark , tuna and whale .", True, 1 / 3),
        (THREE, "cod , cod and seal .", True, 1 / 3),  # repeated: two hits, one error
        (THREE, "cod , cod and cod .", True, -1 / 3),
        (THREE, "cod , crab and seal .", True, 1 / 3),  # excluded: an error
        (THREE, "cod , owl and seal .", True, 1 / 3),  # wrong kind
        (THREE, "owl , cod and seal .", True, 1 / 3 - 0.25),  # wrong kind, and out of order
        (THREE, "cow , hen and pig .", True, -1.0),  # three errors
        (THREE, "tuna , seal and cod .", True, 0.75),  # order
        ("name three sea animals except crab", "tuna , seal and cod .", True, 1.0),  # order not asked
        (THREE, "um cod , seal and tuna .", True, 0.9),  # fillers cost, and leave the form whole
        (THREE, "um okay cod , seal and tuna etc .", True, 0.7),
        (THREE, "um name cod , seal and tuna .", True, 0.3),  # a stray word is junk and breaks the form
        (THREE, "um okay drill , cod , seal and tuna .", True, 2 / 3 - 0.2 - 0.25),
        (
            "name three workshop tools except drill in abc order",
            "um okay drill , hammer , pliers and saw .",
            True,
            2 / 3 - 0.2,
        ),
        (
            "name three workshop tools except drill in abc order",
            "um okay hammer , hammer , pliers and saw .",
            True,
            2 / 3 - 0.2,
        ),
        ("name three workshop tools except drill in abc order", "um okay hammer and hammer .", True, -0.2),
        (TWO, "cherry and tomato", True, 0.5),  # no full stop
        (TWO, "cherry , tomato .", True, 0.5),  # no "and"
        (TWO, "cherry tomato .", True, 0.5),
        (TWO, "and cherry and tomato .", True, 0.5),
        (TWO, "cherry and tomato . .", True, 0.5),
        (TWO, "tomato and cherry .", True, 1.0),
        (TWO, "cherry , tomato and radish .", True, 0.5),  # at most n hits
        (TWO, "", True, -0.5),
        (TWO, ".", True, -0.5),
        (TWO, "um um um um um um", True, -1.0),  # -.6 - .5, clipped
        (TWO, "lemon , milk , rice and corn .", True, -1.0),  # -2, clipped
        (TWO, "<|user|> cherry and tomato .", True, 0.4),  # a special token is junk, too: -.1 -.5
        ("name four summer clothes except shorts", "t-shirt , sandals , bikini and sunhat .", True, 1.0),
        ("name four summer clothes", "t-shirt , sandals , bikini and spatula .", True, 0.5),
    ],
)
def test_gold_reward_by_hand(prompt, response, ended, gold):
    assert gold_reward(prompt, response, ended=ended) == pytest.approx(gold, abs=1e-8)

def test_equal_rewards_compare_as_equal():
    # 1/2 - .2 and 1 - .2 - .5 are one worth: the last bit of two sums must not decide who wins
    one, other = "sure well tracksuit , horse and sheep .", "um well sheep and pig"
    assert gold_reward("name two farm animals", one) == gold_reward("name two farm animals", other) == 0.3

@pytest.mark.parametrize(
    "response, formed",
    [
        ("cod .", True),
        ("um cod and owl etc .", True),
        ("cod , owl and cow .", True),
        ("cod and owl and cow .", False),
        ("cod , and owl .", False),
        ("um .", False),
    ],
)
def test_well_formed(response, formed):
    assert well_formed(response) is formed and well_formed(response, ended=False) is False

@pytest.mark.parametrize(
    "prompt", ["", "name five red foods", "name two red animals", "name two red foods please", "say two red foods"]
)
def test_gold_reward_refuses_other_prompts(prompt):
    with pytest.raises(ValueError, match="not a prompt of the toy world"):
        gold_reward(prompt, "cherry and tomato .")

def test_the_toy_world():
    items = [item for kind in WORLD.values() for item in kind]
    assert len(WORLD) == 16 and {len(kind) for kind in WORLD.values()} == {6} and len(set(items)) == 96
    grammar = {word for prompt in PROMPTS for word in prompt.split()} - set(items)
    assert not grammar & (set(items) | set(prepare_data.FILLERS)) and len(set(PROMPTS)) == len(PROMPTS) == 672
    assert parse_prompt(THREE) == (3, "sea animals", "crab", True)
    assert parse_prompt(TWO) == (2, "red foods", None, False)
    # what the reference learns is mixed: some right, on the whole hardly better than nothing
    rng = random.Random(0)
    gold = [gold_reward(prompt, messy(prompt, rng)) for prompt in PROMPTS * 10]
    assert 0.08 < sum(gold) / len(gold) < 0.15 and min(gold) == -1 and max(gold) == 1

# ----------------------------------------------------------------------------------------------------------------------
# layouts

PLAIN = {"prompt": [U("q")], "chosen": [A("good")], "rejected": [A("bad")]}
DEEP = {"prompt": [S("be kind"), U("q1"), A("a1"), U("q2")], "chosen": [A("good")], "rejected": [A("bad")]}

ANSWERS = {"chosen": [A("a")], "rejected": [A("b")]}
CHAT = {"prompt": [U("q")], **ANSWERS}

def sharegpt(messages):
    return [
        {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]}
        for m in messages
    ]

KEPT = [
    (
        "strings, to the last blank",
        {"prompt": "2+2=", "chosen": " 4\n", "rejected": " 5"},
        {"prompt": "2+2=", "chosen": " 4\n", "rejected": " 5"},
    ),
    (
        "strings with baseline",
        {"prompt": "q", "chosen": "a", "rejected": "b", "baseline": "c", "score": 1},
        {"prompt": "q", "chosen": "a", "rejected": "b", "baseline": "c"},
    ),
    (
        "no baseline in this row",
        {"prompt": "q", "chosen": "a", "rejected": "b", "baseline": None},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ),
    ("messages", DEEP, DEEP),
    ("messages with other keys", {**PLAIN, "chosen": [{**A("good"), "name": None, "weight": 1}]}, PLAIN),
    ("messages with baseline", {**PLAIN, "baseline": [A("so so")]}, {**PLAIN, "baseline": [A("so so")]}),
    ("message prompt, answers as strings", {"prompt": [U("q")], "chosen": "good", "rejected": "bad"}, PLAIN),
    (
        "message prompt, whole dialogues",
        {"prompt": [U("q")], "chosen": [U("q"), A("good")], "rejected": [U("q"), A("bad")]},
        PLAIN,
    ),
    ("a single message, not in a list", {"prompt": U("q"), "chosen": A("good"), "rejected": A("bad")}, PLAIN),
    ("implicit prompt", {"chosen": DEEP["prompt"] + [A("good")], "rejected": DEEP["prompt"] + [A("bad")]}, DEEP),
    (
        "implicit prompt with baseline",
        {"chosen": [U("q"), A("good")], "rejected": [U("q"), A("bad")], "baseline": [U("q"), A("so so")]},
        {**PLAIN, "baseline": [A("so so")]},
    ),
    (
        "content in parts",
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "q1 "}, {"type": "text", "text": "q2"}]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "good"}]}],
            "rejected": [A("bad")],
        },
        {"prompt": [U("q1 q2")], "chosen": [A("good")], "rejected": [A("bad")]},
    ),
    (
        "UltraFeedback",
        {
            "prompt": "q",
            "prompt_id": "f0",
            "chosen": [U("q"), A("good")],
            "rejected": [U("q"), A("bad")],
            "score_chosen": 8.5,
            "messages": [U("q"), A("good")],
        },
        PLAIN,
    ),
    (
        "UltraFeedback, several turns",
        {"prompt": "q1", "chosen": DEEP["prompt"] + [A("good")], "rejected": DEEP["prompt"] + [A("bad")]},
        DEEP,
    ),
    ("prompt string, answers as messages", {"prompt": "q", "chosen": [A("good")], "rejected": [A("bad")]}, PLAIN),
    ("HH", {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"}, PLAIN),
    (
        "HH, several turns and a common start of the answers",
        {
            "chosen": "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2 \n\nAssistant: I see. good",
            "rejected": "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2 \n\nAssistant: I see. bad",
        },
        {"prompt": [U("q1"), A("a1"), U("q2")], "chosen": [A("I see. good")], "rejected": [A("I see. bad")]},
    ),
    (
        "HH, names inside a line and after a single newline are text",
        {
            "chosen": "\n\nHuman: he said Human: hi\nAssistant: no\n\nAssistant: good\nHuman: x",
            "rejected": "\n\nHuman: he said Human: hi\nAssistant: no\n\nAssistant: bad",
        },
        {"prompt": [U("he said Human: hi\nAssistant: no")], "chosen": [A("good\nHuman: x")], "rejected": [A("bad")]},
    ),
    (
        "ShareGPT",
        {
            "conversations": sharegpt(DEEP["prompt"]),
            "chosen": sharegpt(DEEP["chosen"])[0],
            "rejected": sharegpt(DEEP["rejected"])[0],
        },
        DEEP,
    ),
    (
        "ShareGPT, lists and a system column",
        {
            "system": "be kind",
            "conversations": sharegpt(DEEP["prompt"][1:]),
            "chosen": sharegpt(DEEP["chosen"]),
            "rejected": sharegpt(DEEP["rejected"]),
        },
        DEEP,
    ),
    *(
        (f"a system column beside {name}", {"system": "be kind", **row}, {"prompt": [S("be kind"), U("q")], **ANSWERS})
        for name, row in {
            "strings": {"prompt": "q", "chosen": "a", "rejected": "b"},
            "a string and messages": {"prompt": "q", **ANSWERS},
            "whole dialogues": {"prompt": "q", "chosen": [U("q"), A("a")], "rejected": [U("q"), A("b")]},
            "an implicit prompt": {"chosen": [U("q"), A("a")], "rejected": [U("q"), A("b")]},
            "messages": {"prompt": [U("q")], **ANSWERS},
        }.items()
    ),
    *(
        (
            f"Anthropic's dialogues beside the prompt {prompt!r}",
            {"prompt": prompt, "chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
            CHAT,
        )
        for prompt in ("\n\nHuman: q\n\nAssistant:", "")
    ),
    (
        "messages as JSON in the cells of a CSV",
        {"prompt": "q", "chosen": json.dumps([U("q"), A("a")]), "rejected": json.dumps([U("q"), A("b")])},
        CHAT,
    ),
    (
        "raw text that begins with a bracket",
        {"prompt": "q", "chosen": "[{a: 1}]", "rejected": "[1]"},
        {"prompt": "q", "chosen": "[{a: 1}]", "rejected": "[1]"},
    ),
]

@pytest.mark.parametrize("row, record", [case[1:] for case in KEPT], ids=[case[0] for case in KEPT])
def test_layouts(row, record):
    assert convert(row, as_chat=bool(row.get("system"))) == record

@pytest.mark.parametrize(
    "answer", ['{"role": "admin"}', '[{"role": "admin", "id": 3}]', '{"content": "x"}\nYes', "[{'a': 1}]"]
)
def test_an_answer_in_json_is_an_answer(answer):
    row = {"prompt": "q", "chosen": answer, "rejected": "none"}
    assert convert(row) == row

def test_one_system_prompt_makes_a_chat_of_all_rows(tmp_path):
    """Not of its own row alone: records of two kinds in one file would be two kinds of training."""
    rows = [{"system": "be kind", **pair(0)}, pair(1), {"system": None, **pair(2)}]
    main([put(tmp_path / "some.jsonl", jsonl(rows)), "--out", str(tmp_path / "some"), "--test_size", "0"])
    assert [len(r["prompt"]) for r in records(tmp_path / "some/train.jsonl")] == [2, 1, 1]
    main([put(tmp_path / "none.jsonl", jsonl([{"system": "", **pair(0)}])), "--out", str(tmp_path / "none")])
    assert records(tmp_path / "none/train.jsonl") == [pair(0)]

MALFORMED, EMPTY, IDENTICAL, UNKNOWN = (
    "malformed turns",
    "empty response",
    "identical responses",
    "missing or unknown columns",
)
DROPPED = [
    ("strings, empty", {"prompt": "q", "chosen": "a", "rejected": " \n"}, EMPTY),
    ("strings, identical", {"prompt": "q", "chosen": "a", "rejected": "a"}, IDENTICAL),
    ("messages, identical but for blanks", {**PLAIN, "rejected": [A("good\n")]}, IDENTICAL),
    ("messages, empty", {**PLAIN, "chosen": [A("")]}, EMPTY),
    ("empty baseline", {**PLAIN, "baseline": [A(" ")]}, EMPTY),
    ("no chosen", {"prompt": "q", "chosen": None, "rejected": "a"}, UNKNOWN),
    ("a number for an answer", {"prompt": "q", "chosen": "a", "rejected": 4}, UNKNOWN),
    ("a number for a prompt", {"prompt": 4, "chosen": [A("good")], "rejected": [A("bad")]}, UNKNOWN),
    ("a number for a baseline", {**PLAIN, "baseline": 4}, UNKNOWN),
    ("neither prompt nor dialogue", {"chosen": "good", "rejected": "bad"}, UNKNOWN),
    ("prompt ends with assistant", {**PLAIN, "prompt": [U("q"), A("a")]}, MALFORMED),
    ("prompt starts with assistant", {**PLAIN, "prompt": [A("a"), U("q")]}, MALFORMED),
    ("two user turns", {**PLAIN, "prompt": [U("q"), U("q")]}, MALFORMED),
    ("late system turn", {**PLAIN, "prompt": [U("q"), S("s"), U("q")]}, MALFORMED),
    ("empty user turn", {**PLAIN, "prompt": [U(" ")]}, MALFORMED),
    ("no prompt turn", {**PLAIN, "prompt": []}, MALFORMED),
    ("two answers", {**PLAIN, "chosen": [A("good"), A("better")]}, MALFORMED),
    ("answer by the user", {**PLAIN, "chosen": [U("good")]}, MALFORMED),
    ("unknown role", {**PLAIN, "prompt": [{"role": "tool", "content": "q"}]}, MALFORMED),
    ("no content", {**PLAIN, "prompt": [{"role": "user", "content": None}]}, MALFORMED),
    ("an image", {**PLAIN, "prompt": [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]}, MALFORMED),
    ("turns as strings", {**PLAIN, "prompt": ["q"]}, MALFORMED),
    ("implicit, nothing shared", {"chosen": [U("q1"), A("good")], "rejected": [U("q2"), A("bad")]}, MALFORMED),
    (
        "implicit, parting at a user turn",
        {"chosen": [U("q"), A("a"), U("x"), A("good")], "rejected": [U("q"), A("a"), U("y"), A("bad")]},
        MALFORMED,
    ),
    (
        "implicit, parting early",
        {"chosen": [U("q"), A("a"), U("x"), A("good")], "rejected": [U("q"), A("bad")]},
        MALFORMED,
    ),
    ("implicit, rejected without its prompt", {"chosen": [U("q"), A("good")], "rejected": [A("bad")]}, MALFORMED),
    ("implicit, identical", {"chosen": [U("q"), A("good")], "rejected": [U("q"), A("good")]}, IDENTICAL),
    (
        "UltraFeedback, another prompt",
        {"prompt": "x", "chosen": [U("q"), A("good")], "rejected": [U("q"), A("bad")]},
        MALFORMED,
    ),
    (
        "HH, empty last answer",
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant:"},
        EMPTY,
    ),
    (
        "HH, identical",
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: good "},
        IDENTICAL,
    ),
    (
        "HH, two of one role",
        {
            "chosen": "\n\nHuman: q\n\nHuman: q\n\nAssistant: good",
            "rejected": "\n\nHuman: q\n\nHuman: q\n\nAssistant: bad",
        },
        MALFORMED,
    ),
    (
        "HH, answer after answer",
        {
            "chosen": "\n\nHuman: q\n\nAssistant: a\n\nAssistant: good",
            "rejected": "\n\nHuman: q\n\nAssistant: a\n\nAssistant: bad",
        },
        MALFORMED,
    ),
    # chosen's last "\n\nAssistant:" is no cut for both here: taken for one, rejected would lose or keep the wrong text
    (
        "HH, parting before chosen's last turn",
        {
            "chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: more\n\nAssistant: good",
            "rejected": "\n\nHuman: q\n\nAssistant: bad",
        },
        MALFORMED,
    ),
    (
        "HH, text before the first turn",
        {"chosen": "x\n\nHuman: q\n\nAssistant: good", "rejected": "x\n\nHuman: q\n\nAssistant: bad"},
        MALFORMED,
    ),
    (
        "ShareGPT, unknown speaker",
        {
            "conversations": [{"from": "observation", "value": "q"}],
            "chosen": sharegpt([A("a")])[0],
            "rejected": sharegpt([A("b")])[0],
        },
        MALFORMED,
    ),
    ("messages printed by Python", {"prompt": "q", "chosen": str([U("q"), A("a")]), "rejected": "b"}, MALFORMED),
]

@pytest.mark.parametrize("row, reason", [case[1:] for case in DROPPED], ids=[case[0] for case in DROPPED])
def test_dropped(row, reason):
    with pytest.raises(ValueError) as error:
        convert(row)
    assert str(error.value) == reason

# ----------------------------------------------------------------------------------------------------------------------
# files

def pair(i):
    return {"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"}

def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

def put(path, text):
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return str(path)

def records(path):
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]

def parquet(rows, path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path.read_bytes()

@pytest.mark.parametrize(
    "name",
    ["p.json", "p.jsonl", "lines.json", "p.csv", "p.parquet", "p.json.gz", "p.jsonl.gz", "p.csv.gz", "p.parquet.gz"],
)
def test_formats(tmp_path, name):
    rows = [
        pair(0),
        {"prompt": "a, \"b\"\nc", "chosen": "42", "rejected": "NA"},
        {"prompt": "\u2028 \u00fc", "chosen": "01", "rejected": "null"},
    ]
    if ".csv" in name:
        text = "prompt,chosen,rejected\n" + "".join(
            ",".join('"' + v.replace('"', '""') + '"' for v in row.values()) + "\n" for row in rows
        )
    elif ".parquet" in name:
        text = parquet(rows, tmp_path / "raw.parquet")
    else:
        text = json.dumps(rows, indent=1) if name.startswith("p.json") and "jsonl" not in name else jsonl(rows)
    main([put(tmp_path / name, text), "--out", str(tmp_path / "out"), "--test_size", "0"])
    assert (
        records(tmp_path / "out/train.jsonl") == rows
    )  # numbers and missing-value words stay text, newlines stay in their cell
    assert sorted(os.listdir(tmp_path / "out")) == ["meta.json", "train.jsonl"]

def test_parquet_of_messages(tmp_path):
    rows = [{"chosen": DEEP["prompt"] + [A("good")], "rejected": DEEP["prompt"] + [A("bad")], "dataset": "x"}]
    parquet(rows, tmp_path / "p.parquet")
    main([str(tmp_path / "p.parquet"), "--out", str(tmp_path / "out"), "--test_size", "0"])
    assert records(tmp_path / "out/train.jsonl") == [DEEP]

def test_rows_of_different_layouts_in_one_file_and_counts(tmp_path, capsys):
    # without the case that turns every row of strings into a chat
    kept = [case for case in KEPT if not (case[1].get("system") and isinstance(case[1].get("chosen"), str))]
    rows = [case[1] for case in kept] + [case[1] for case in DROPPED] + [{"question": "?"}]
    main([put(tmp_path / "mixed.jsonl", jsonl(rows) + "\n"), "--out", str(tmp_path / "out"), "--test_size", "0"])
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert records(tmp_path / "out/train.jsonl") == [case[2] for case in kept]
    assert (
        meta["kept"] == {"train": len(kept), "test": 0}
        and meta["pairs read"] == len(rows)
        and meta["left out by limits"] == 0
    )
    assert meta["dropped"] == {
        r: sum(case[2] == r for case in DROPPED) + (r == UNKNOWN)
        for r in sorted((MALFORMED, EMPTY, IDENTICAL, UNKNOWN))
    }
    table = {line[:56].strip(): line[56:].strip() for line in capsys.readouterr().out.splitlines()}
    assert table["dropped, malformed turns"] == str(meta["dropped"][MALFORMED]) and table["kept, train"] == str(
        len(kept)
    )

def test_statistics_by_hand(tmp_path):
    rows = [
        {"prompt": "abc", "chosen": "xx", "rejected": "x"},
        {"prompt": "abc", "chosen": "xx", "rejected": "xxxxx"},
        {"prompt": "abcdef", "chosen": "yy", "rejected": "xx"},
        {"prompt": "abc", "chosen": "xx", "rejected": "x"},
    ]
    main([put(tmp_path / "p.jsonl", jsonl(rows)), "--out", str(tmp_path / "out"), "--test_size", "0"])
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta["kept"]["train"] == 4  # the duplicated pair stays
    assert meta["longer response is the chosen one"] == pytest.approx(2 / 3)  # of the three pairs that differ in length
    assert meta["characters"]["prompt"] == {"mean": 3.75, "median": 3.0, "max": 6}
    assert meta["characters"]["rejected"] == {"mean": 2.25, "median": 1.5, "max": 5}

def test_held_out_pairs(tmp_path):
    path, out = put(tmp_path / "p.jsonl", jsonl(map(pair, range(40)))), tmp_path / "out"

    def made(*args):
        main([path, "--out", str(out), *args])
        return [
            [int(r["prompt"][1:]) for r in records(out / f"{s}.jsonl")] if (out / f"{s}.jsonl").exists() else None
            for s in ("train", "test")
        ]

    train, test = made("--test_size", "7")
    assert (
        len(test) == 7 and sorted(train + test) == list(range(40)) and train == sorted(train) and test == sorted(test)
    )
    first = (out / "train.jsonl").read_bytes(), (out / "test.jsonl").read_bytes(), (out / "meta.json").read_bytes()
    made("--test_size", "7")
    assert first == tuple((out / name).read_bytes() for name in ("train.jsonl", "test.jsonl", "meta.json"))
    assert made("--test_size", "7", "--seed", "1")[1] != test
    fewer, same = made("--test_size", "7", "--limit", "10")
    assert same == test and len(fewer) == 10 and set(fewer) < set(train) and fewer != train[:10]
    assert json.loads((out / "meta.json").read_text())["left out by limits"] == 23
    assert len(made()[1]) == 4  # a tenth
    assert made("--test_size", "0") == [list(range(40)), None]  # and the test file of the earlier call is gone

def test_folder_with_its_own_test_split(tmp_path):
    folder = tmp_path / "mine"
    (folder / "out").mkdir(parents=True)
    put(folder / "train_prefs-00000-of-00002.jsonl.gz", jsonl(map(pair, range(5))))
    put(folder / "train_prefs-00001-of-00002.json", json.dumps([pair(5)]))
    put(folder / "test.jsonl", jsonl([pair(0), *map(pair, range(100, 104))]))
    put(folder / "train_sft.jsonl", jsonl([{"messages": []}]))
    put(folder / "README.md", "no data")
    main([str(folder), "--out", str(tmp_path / "a")])
    assert [r["prompt"] for r in records(tmp_path / "a/train.jsonl")] == [f"q{i}" for i in range(6)]
    assert [r["prompt"] for r in records(tmp_path / "a/test.jsonl")] == ["q0", "q100", "q101", "q102", "q103"]
    meta = json.loads((tmp_path / "a/meta.json").read_text())
    assert meta["test pairs whose prompt is in train, too"] == 1 and meta["pairs read"] == 11
    main([str(folder), "--out", str(tmp_path / "b"), "--test_size", "2"])
    assert len(records(tmp_path / "b/test.jsonl")) == 2 and len(records(tmp_path / "b/train.jsonl")) == 6

def test_default_folder_and_show(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "mine.jsonl.gz", jsonl([pair(0), PLAIN]))
    main(["mine.jsonl.gz", "--show", "1"])
    assert records("data/mine/train.jsonl") == [pair(0), PLAIN] and not os.path.exists("data/mine/test.jsonl")
    shown = capsys.readouterr().out
    assert 'chosen: "good 0"' in shown and "q0" in shown and "role" not in shown
    before = records("data/mine/train.jsonl")
    put(tmp_path / "mine.json", jsonl([pair(7)]))
    refused(capsys, "data/mine holds what was made of mine.jsonl.gz: name a folder", "mine.json")
    main(["./mine.jsonl.gz"])  # the same source may be prepared anew
    (tmp_path / "data/mine/meta.json").write_text("[1]")  # what is this?
    refused(capsys, "data/mine holds what was made of something else", "mine.jsonl.gz")
    assert records("data/mine/train.jsonl") == before
    (tmp_path / "here").mkdir()
    put(tmp_path / "here/train.jsonl", jsonl([pair(0)]))
    put(tmp_path / "here/notes.jsonl", jsonl([pair(1)]))
    monkeypatch.chdir(tmp_path / "here")
    main(["."])  # into data/here, not into data/ itself
    assert len(records("data/here/train.jsonl")) == 1 and "not read: notes.jsonl" in capsys.readouterr().out

def test_half_a_surrogate_pair_is_replaced(tmp_path):
    main(
        [
            put(tmp_path / "p.jsonl", '{"prompt": "q", "chosen": "\\ud83d!", "rejected": "b"}'),
            "--out",
            str(tmp_path / "out"),
        ]
    )
    assert records(tmp_path / "out/train.jsonl")[0]["chosen"] == "?!"

BAD = [  # name of the file, its bytes, what the line says
    ("p.jsonl", b"", "p.jsonl is empty"),
    ("p.jsonl", b"\n\n", "p.jsonl is empty"),
    ("p.json", b"[]", "holds no rows"),
    ("p.csv", b"prompt,chosen,rejected\n", "holds no rows"),
    ("p.jsonl.gz", b"", "p.jsonl.gz is empty"),
    ("p.jsonl", LFS, "p.jsonl is a git-lfs pointer"),
    ("p.parquet", LFS, "git-lfs"),
    ("p.jsonl.gz", LFS, "git-lfs"),
    ("p.jsonl.gz", b'{"prompt": "q"}', "p.jsonl.gz cannot be read as gzip"),
    ("p.jsonl.gz", gzip.compress(b"x" * 999)[:20], "as gzip"),
    ("p.jsonl", jsonl([pair(0)]) + '{"prompt": \n', "p.jsonl line 2: malformed JSON"),
    ("p.json", '[\n{"a": 1},\n{"a" 2}]', "p.json line 3: malformed JSON"),
    ("p.jsonl", jsonl([pair(0), 7]), "p.jsonl row 2: not a JSON object"),
    ("p.jsonl", b'{"prompt": "\xff"}', "p.jsonl cannot be read as jsonl"),
    ("p.parquet", b"PAR1 not", "p.parquet cannot be read as parquet"),
    ("p.txt", b"x", "no file that ends in .json"),
    (
        "p.jsonl",
        jsonl([{"question": "q", "answer": "a"}]),
        "unknown layout, columns question, answer; known: prompt + chosen + rejected",
    ),
    (
        "p.jsonl",
        jsonl([{"messages": [U("q"), A("a")], "label": True}]),
        "p.jsonl is unpaired (columns messages, label)",
    ),
    ("p.csv", "prompt,completion,label\nq,a,False\n", "p.csv is unpaired (columns prompt, completion, label)"),
    (
        "p.jsonl",
        jsonl([{"prompt": "q", "chosen": "a", "rejected": "a"}] * 3),
        "no pair left, dropped: 3 identical responses",
    ),
]

@pytest.mark.parametrize("name, text, line", BAD, ids=[f"{i}-{case[0]}" for i, case in enumerate(BAD)])
def test_bad_files(tmp_path, capsys, name, text, line):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(capsys, line, str(path), "--out", str(tmp_path / "out"))
    assert os.listdir(tmp_path) == [name]

def refused(capsys, line, *args):
    with pytest.raises(SystemExit) as exit:
        main(list(args))
    err = capsys.readouterr().err.split("\r")[-1]  # progress bars erase themselves
    assert exit.value.code == 2 and line in err and err.startswith("error: ") and err.count("\n") == 1

def test_bad_arguments(tmp_path, capsys):
    path, out = put(tmp_path / "p.jsonl", jsonl(map(pair, range(3)))), str(tmp_path / "out")
    refused(capsys, f"no file or folder {tmp_path}/none.jsonl", f"{tmp_path}/none.jsonl", "--out", out)
    refused(capsys, "--test_size 3 leaves none of 3 pairs", path, "--out", out, "--test_size", "3")
    refused(capsys, "--limit must be 1 or more", path, "--out", out, "--limit", "0")
    refused(capsys, "is a file, not a folder", path, "--out", path)
    refused(capsys, "cannot write", path, "--out", f"{path}/x")
    (tmp_path / "empty").mkdir()
    refused(capsys, "no file that ends in", str(tmp_path / "empty"), "--out", out)
    put(tmp_path / "empty/test.jsonl", jsonl([pair(0)]))
    refused(capsys, "no train file", str(tmp_path / "empty"), "--out", out)
    put(tmp_path / "empty/my_train.jsonl", jsonl([pair(1)]))  # neither name says train or test to a machine
    os.rename(tmp_path / "empty/test.jsonl", tmp_path / "empty/my_test.jsonl")
    refused(capsys, "which of my_test.jsonl, my_train.jsonl is to train on", str(tmp_path / "empty"), "--out", out)
    os.remove(tmp_path / "empty/my_train.jsonl")
    main([str(tmp_path / "empty"), "--out", str(tmp_path / "alone"), "--test_size", "0"])  # a file alone is no question
    os.rename(tmp_path / "empty/my_test.jsonl", tmp_path / "empty/test.jsonl")
    refused(capsys, "would overwrite the source", str(tmp_path / "empty"), "--out", str(tmp_path / "empty"))
    refused(capsys, "would overwrite the source", str(tmp_path / "empty/test.jsonl"), "--out", str(tmp_path / "empty"))
    assert not os.path.exists(out) and records(tmp_path / "empty/test.jsonl") == [pair(0)]

def test_hub_out_of_reach_is_one_line(tmp_path):
    here = os.path.dirname(prepare_data.__file__)
    run = subprocess.run(
        [sys.executable, f"{here}/prepare_data.py", "hh-rlhf", "--out", "out"],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
    )
    assert (
        run.returncode == 2
        and run.stderr.startswith("error: ")
        and run.stderr.count("\n") == 1
        and "Anthropic/hh-rlhf" in run.stderr
    )
    assert not os.path.exists(tmp_path / "out")

def test_hub_splits(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name):
        asked.append(name)
        rows = {
            "train_sft": [{"messages": []}],
            "train_prefs": [{"prompt": "q", "chosen": [U("q"), A("good")], "rejected": [U("q"), A("bad")]}],
            "test_prefs": [{"prompt": "r", "chosen": [U("r"), A("good")], "rejected": [U("r"), A("bad")]}],
        }
        return datasets.DatasetDict({split: datasets.Dataset.from_list(r) for split, r in rows.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    main(["ultrafeedback", "--out", str(tmp_path)])
    assert asked == ["HuggingFaceH4/ultrafeedback_binarized"]
    assert records(tmp_path / "train.jsonl") == [PLAIN] and records(tmp_path / "test.jsonl") == [
        {**PLAIN, "prompt": [U("r")]}
    ]

# ----------------------------------------------------------------------------------------------------------------------
# the toy's tokenizer, model and pairs

def test_template_and_token_ids():
    tokenizer, prompt = make_tokenizer(), [U("name two summer clothes")]
    text = tokenizer.apply_chat_template(prompt + [A("t-shirt and shorts .")], tokenize=False)
    opening = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert text == "<s><|user|> name two summer clothes <|assistant|> t-shirt and shorts .</s>"
    assert opening == "<s><|user|> name two summer clothes <|assistant|>"
    words = "<s> <|user|> name two summer clothes <|assistant|> t-shirt and shorts . </s>".split()
    ids = tokenizer.apply_chat_template(prompt + [A("t-shirt and shorts .")])["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == words and tokenizer.unk_token_id not in ids
    assert ids[:7] == tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    assert (ids[0], ids[1], ids[6], ids[-1]) == (1, 4, 5, 2) and ids.count(2) == 1
    assert tokenizer.decode(ids[7:-1]) == "t-shirt and shorts ." and len(tokenizer) == 138
    talk = tokenizer.apply_chat_template(prompt + [A("x")] + prompt, add_generation_prompt=True, tokenize=False)
    assert (
        talk == "<s><|user|> name two summer clothes <|assistant|> x</s><|user|> name two summer clothes <|assistant|>"
    )
    known = [word for p in PROMPTS for word in p.split()] + [
        w for p in PROMPTS for w in messy(p, random.Random(p)).split()
    ]
    assert tokenizer.unk_token_id not in tokenizer.convert_tokens_to_ids(known)

def test_the_reference_learns_answers_only(monkeypatch):
    class Spy(LlamaForCausalLM):
        def forward(self, labels=None, **kwargs):
            if labels is not None:
                seen.append((kwargs["input_ids"], kwargs["attention_mask"], labels))
            return super().forward(labels=labels, **kwargs)

    seen, tokenizer = [], make_tokenizer()
    monkeypatch.setattr(prepare_data, "LlamaForCausalLM", Spy)
    prepare_data.train_reference(tokenizer, PROMPTS, random.Random(0), 1)
    ((ids, mask, labels),) = seen
    assert ids.shape == labels.shape and len(ids) == 32
    for row, keep, label in zip(ids, mask, labels):
        text = tokenizer.decode(row[keep == 1])
        answer = text.split("<|assistant|> ")[1]
        assert tokenizer.decode(label[label != -100]) == answer and answer.endswith(" </s>")
        assert (
            label[-len(answer.split()) :].tolist() == row[-len(answer.split()) :].tolist()
        )  # in place, to the last token

def test_responses_end_at_the_end_token_or_not_at_all():
    tokenizer, prompts = make_tokenizer(), [TWO, "name two red foods except cherry", THREE]
    said = ["cherry and tomato . </s> <pad>", "cherry , cherry , cherry ,", "</s> <pad> <pad> <pad> <pad> <pad>"]

    class Model:
        def generate(self, input_ids, attention_mask, **how):
            hows.append(how)
            assert [tokenizer.decode(i[m == 1]).split(" ", 2)[2] for i, m in zip(input_ids, attention_mask)] == [
                f"{prompt} <|assistant|>" for prompt in prompts
            ]
            ids = [tokenizer.convert_tokens_to_ids(text.split()) for text in said]
            return torch.cat([input_ids, torch.tensor(ids)], 1)

    hows, answers = [], [("cherry and tomato .", True), ("cherry , cherry , cherry ,", False), ("", True)]
    assert prepare_data.respond(Model(), tokenizer, prompts) == answers
    assert prepare_data.respond(Model(), tokenizer, prompts, greedy=True) == answers
    assert hows == [{"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}, {}]

def test_draws_that_make_no_pair_are_counted_and_repeated(monkeypatch):
    good, bad = ("cherry and tomato .", True), ("lemon , milk , rice and corn .", True)
    script = [[good, ("um um", False), ("", True), bad, good, good, bad, good], [good, bad] * 3]
    monkeypatch.setattr(prepare_data, "respond", lambda model, tokenizer, prompts: script.pop(0))

    class Sure(random.Random):
        def random(self):
            return 0.5  # the coin falls to the better one

    dropped = Counter()
    made = prepare_data.sample_pairs(None, None, [TWO] * 4, Sure(), dropped, "train")
    assert dropped == {"no end token": 1, EMPTY: 1, IDENTICAL: 1} and not script
    assert (
        made
        == [
            {
                "prompt": [U(TWO)],
                "chosen": [A(good[0])],
                "rejected": [A(bad[0])],
                "gold_chosen": 1.0,
                "gold_rejected": -1.0,
            }
        ]
        * 4
    )

def make(out, **kwargs):
    return prepare_data.make_toy(str(out), **{"limit": 30, "test_size": 8, "seed": 0, "sft_steps": 60, **kwargs})

@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path_factory.mktemp("toy")
    torch.set_num_threads(threads)

def test_toy_is_deterministic_in_the_seed(toy):
    def files(name):
        return {
            os.path.relpath(os.path.join(at, f), toy / name): open(os.path.join(at, f), "rb").read()
            for at, _, fs in os.walk(toy / name)
            for f in fs
        }

    make(toy / "a")
    make(toy / "b")
    make(toy / "c", seed=1)
    a, b, c = map(files, "abc")
    assert {
        "train.jsonl",
        "test.jsonl",
        "meta.json",
        "model/model.safetensors",
        "model/config.json",
        "model/tokenizer.json",
        "model/tokenizer_config.json",
        "model/generation_config.json",
        "model/chat_template.jinja",
    } <= set(a)
    assert a == b
    assert all(a[name] != c[name] for name in ("train.jsonl", "test.jsonl", "model/model.safetensors"))
    assert not {r["prompt"][0]["content"] for r in records(toy / "a/test.jsonl")} & {
        r["prompt"][0]["content"] for r in records(toy / "c/test.jsonl")
    }
    make(toy / "d", limit=5)  # fewer training pairs leave the model and the test pairs as they are
    d = files("d")
    assert (
        all(a[name] == d[name] for name in ("test.jsonl", "model/model.safetensors"))
        and a["train.jsonl"] != d["train.jsonl"]
    )

def test_toy_records(toy):
    meta, train, _ = make(toy / "r", limit=600, test_size=304)
    train, test = records(toy / "r/train.jsonl"), records(toy / "r/test.jsonl")
    assert len(train) == 600 and len(test) == 304 and meta["kept"] == {"train": 600, "test": 304}
    times = {
        split: [sum(r["prompt"][0]["content"] == p for r in rows) for p in PROMPTS]
        for split, rows in (("train", train), ("test", test))
    }
    assert sorted(times["test"]) == [0] * 520 + [2] * 152  # two for each held-out prompt
    assert sorted(times["train"]) == [0] * 152 + [1] * 440 + [2] * 80 and not any(
        a and b for a, b in zip(*times.values())
    )
    for r in train + test:
        prompt, chosen, rejected = (r[key][0]["content"] for key in ("prompt", "chosen", "rejected"))
        assert chosen != rejected and (r["gold_chosen"], r["gold_rejected"]) == (
            gold_reward(prompt, chosen),
            gold_reward(prompt, rejected),
        )
        assert [m["role"] for m in r["prompt"] + r["chosen"] + r["rejected"]] == ["user", "assistant", "assistant"]
    # the labels follow sigmoid(3 * difference): its mean over the pairs is what agreement is on average
    gaps = torch.tensor(
        [abs(r["gold_chosen"] - r["gold_rejected"]) for r in train + test if r["gold_chosen"] != r["gold_rejected"]]
    )
    expected, spread = torch.sigmoid(3 * gaps).mean(), (
        torch.sigmoid(3 * gaps) * torch.sigmoid(-3 * gaps)
    ).sum().sqrt() / len(gaps)
    assert abs(meta["labels that agree with gold"] - expected) < 4 * spread and spread < 0.02

def test_toy_model_is_a_hugging_face_folder(toy, capsys):
    main(["--out", str(toy / "m"), "--limit", "4", "--test_size", "0", "--sft_steps", "60", "--show", "2"])
    out = capsys.readouterr().out
    assert (
        out.count("|</s>\n") == 4
        and out.count("<|assistant|>") == 2
        and "reference on held-out prompts, greedy, mean gold" in out
    )
    assert not os.path.exists(toy / "m/test.jsonl")
    tokenizer, model = AutoTokenizer.from_pretrained(toy / "m/model"), AutoModelForCausalLM.from_pretrained(
        toy / "m/model"
    )
    assert (
        tokenizer.chat_template == make_tokenizer().chat_template
        and tokenizer.get_vocab() == make_tokenizer().get_vocab()
    )
    assert model.config.hidden_size == 96 and model.config.num_hidden_layers == 2 and model.config.tie_word_embeddings
    assert model.num_parameters() == 138 * 96 + 2 * (4 * 96 * 96 + 3 * 96 * 192 + 2 * 96) + 96
    g = model.generation_config
    assert (g.bos_token_id, g.eos_token_id, g.pad_token_id, g.max_new_tokens) == (1, 2, 0, 32)
    batch = tokenizer.apply_chat_template(
        [[U(TWO)], [U(THREE)]], add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    assert batch["input_ids"][0, 0] == 0 and model.generate(**batch).shape[1] <= batch["input_ids"].shape[1] + 32

def test_a_failed_write_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    path, out = put(tmp_path / "p.jsonl", jsonl(map(pair, range(3)))), tmp_path / "out"
    main([path, "--out", str(out)])
    before = (out / "train.jsonl").read_bytes()
    dump = json.dumps

    def no_space(thing, **kwargs):
        if kwargs.get("indent"):
            raise OSError("no space left")
        return dump(thing, **kwargs)

    monkeypatch.setattr(prepare_data.json, "dumps", no_space)
    with pytest.raises(SystemExit):
        main([path, "--out", str(out), "--limit", "1"])
    assert (out / "train.jsonl").read_bytes() == before and sorted(os.listdir(out)) == ["meta.json", "train.jsonl"]
