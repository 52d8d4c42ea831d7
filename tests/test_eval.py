"""eval.py: log-probs and KL against independent computations, formats, the win-rate rule, a judge that misbehaves."""

import json
import math
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

import eval as evaluation
from prepare_data import gold_reward, make_toy


def run(capsys, *argv):
    """eval.py in this process: (exit code, stdout, stderr)."""
    code, old = 0, sys.argv
    sys.argv = ["eval.py", *map(str, argv)]
    capsys.readouterr()
    try:
        evaluation.main()
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = old
    return code, *capsys.readouterr()


def refused(capsys, *argv):
    """The one line with which eval.py refuses bad input."""
    code, _, err = run(capsys, *argv)
    assert code == 2 and "Traceback" not in err
    return re.search(r"error: .*", err)[0]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy world with a barely trained reference; `policy`, which is it with noise; `run`, with both."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("toy")
    make_toy(str(folder), limit=8, test_size=40, seed=1, sft_steps=150)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        AutoTokenizer.from_pretrained(folder / "model"),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter) if parameter.dim() > 1 else 0
        model.model.norm.weight *= 0.5  # flatter: KL to the reference stands well above the noise of an estimate
    model.generation_config.update(do_sample=True, top_k=2, min_p=0.6)  # rules that must not reach our samples
    model.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    for step, name, source in ((5, "step_000005", "policy"), (10, "final", "model"), (10, "step_000010", "policy")):
        shutil.copytree(folder / source, folder / "run" / name)
        (folder / "run" / name / "trainer_state.json").write_text(json.dumps(dict(step=step, options=dict(beta=0.5))))
    shutil.copytree(folder / "run" / "final", folder / "run" / "step_000020.tmp")  # a save that was cut short
    return folder


def records(toy):
    return [json.loads(line) for line in open(toy / "test.jsonl")]


def logp(model, tokenizer, prompt, answer):
    """Summed log-prob of an answer and its end token, one sequence at a time, by nothing of ours."""
    start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    ids, P = (
        tokenizer(start + " " + answer + "</s>", add_special_tokens=False).input_ids,
        len(tokenizer(start, add_special_tokens=False).input_ids),
    )
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logits[i - 1, ids[i]].item() for i in range(P, len(ids)))


# ----------------------------------------------------------------------------------------------------------------------
# prefs


@pytest.fixture(scope="module")
def rows(toy):
    """RUN/prefs.jsonl, and the table that was printed."""
    out = subprocess.run(
        [
            sys.executable,
            evaluation.__file__,
            "prefs",
            "--model",
            toy / "run",
            toy / "policy",
            "--ref_model",
            toy / "model",
            "--data",
            toy,
            "--batch_size",
            "16",
        ],
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    return [json.loads(line) for line in open(toy / "run" / "prefs.jsonl")], out.stdout


def test_an_untouched_policy_has_margin_0_accuracy_half_and_no_kl(rows):
    for row in (rows[0][0], rows[0][2]):
        assert row["eval/rewards/accuracies"] == 0.5 and row["eval/rewards/margins"] == 0
        assert (
            row["eval/logps/chosen_vs_ref"] == 0 == row["eval/logps/rejected_vs_ref"] == row["kl"] == row["kl_median"]
        )


def test_a_run_folder_gives_its_checkpoints_in_order_and_each_step_once(rows, toy):
    assert [row["step"] for row in rows[0]] == [0, 5, 10]
    assert rows[0][2]["model"].endswith("final") and all(row["beta"] == 0.5 for row in rows[0])
    assert str(toy / "policy") in rows[1] and not (toy / "policy" / "prefs.jsonl").exists()


def test_log_probs_and_their_errors_against_an_independent_computation(rows, toy):
    ratios = {"chosen": [], "rejected": []}
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    with torch.no_grad():
        models = [AutoModelForCausalLM.from_pretrained(toy / name).eval() for name in ("policy", "model")]
        for record in records(toy):
            for side in ratios:
                policy, reference = (
                    logp(model, tokenizer, record["prompt"], record[side][0]["content"]) for model in models
                )
                ratios[side].append(policy - reference)
    row, n = rows[0][1], len(ratios["chosen"])
    for side, values in ratios.items():
        mean = sum(values) / n
        assert row[f"eval/logps/{side}_vs_ref"] == pytest.approx(mean, abs=1e-4)
        error = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
        assert row[f"eval/logps/{side}_vs_ref_se"] == pytest.approx(error, abs=1e-4)
    margins = [0.5 * (c - r) for c, r in zip(ratios["chosen"], ratios["rejected"])]
    assert row["eval/rewards/margins"] == pytest.approx(sum(margins) / n, abs=1e-4)
    assert row["eval/rewards/accuracies"] == sum(margin > 0 for margin in margins) / n


def test_length_buckets_are_a_partition(rows):
    row = rows[0][1]
    parts = {tokens: part for tokens, part in row["by_length"].items() if tokens != "all"}
    assert sum(part["pairs"] for part in parts.values()) == 40 and len(parts) == 3
    total = sum(part["pairs"] * part["eval/logps/chosen_vs_ref"][0] for part in parts.values())
    assert total / 40 == pytest.approx(row["eval/logps/chosen_vs_ref"], abs=1e-6)


def test_kl_is_exact_for_one_token(toy, tmp_path, capsys):
    """For answers of one token KL(policy || reference) is a sum over the vocabulary; other rules would show."""
    shutil.copytree(toy / "policy", tmp_path / "run" / "final")
    (tmp_path / "run" / "final" / "trainer_state.json").write_text(json.dumps(dict(step=1, options={})))
    code, *_ = run(
        capsys, "prefs", "--model", tmp_path / "run", "--ref_model", toy / "model", "--data", toy, "--max_new_tokens", 1
    )
    _, row = [json.loads(line) for line in open(tmp_path / "run" / "prefs.jsonl")]
    exact, tokenizer = [], AutoTokenizer.from_pretrained(toy / "model")
    with torch.no_grad():
        policy, reference = (AutoModelForCausalLM.from_pretrained(toy / name).eval() for name in ("policy", "model"))
        for prompt in {record["prompt"][0]["content"] for record in records(toy)}:
            ids = tokenizer(
                f"<s><|user|> {prompt} <|assistant|>", add_special_tokens=False, return_tensors="pt"
            ).input_ids
            p, q = (model(ids).logits[0, -1].log_softmax(-1) for model in (policy, reference))
            exact.append((p.exp() * (p - q)).sum().item())
    assert (
        code == 0
        and sum(exact) / len(exact) > 3.5 * row["kl_se"] > 0
        and abs(row["kl"] - sum(exact) / len(exact)) < 3.5 * row["kl_se"]
    )
    assert row["length"] == 1 and row["well_formed"] == 0  # one token is no sentence


def test_gold_is_the_reward_of_the_samples(rows, toy, tmp_path, capsys):
    """Greedy samples are the same for prefs and generate, so the mean of their exact rewards must be."""
    assert run(capsys, "generate", "--model", toy / "policy", "--data", toy, "--out", tmp_path / "greedy.json")[0] == 0
    said = json.load(open(tmp_path / "greedy.json"))
    gold = [gold_reward(row["instruction"], row["output"], ended=row["ended"]) for row in said]
    assert rows[0][1]["gold_greedy"] == pytest.approx(sum(gold) / len(gold))
    assert 0 <= rows[0][1]["well_formed"] <= 1 and -1 <= rows[0][1]["gold"] <= 1


def test_an_empty_test_split_is_refused(toy, tmp_path, capsys):
    (tmp_path / "test.jsonl").write_text("")
    argv = "prefs", "--model", toy / "model", "--ref_model", toy / "model", "--data", tmp_path
    assert "test.jsonl" in refused(capsys, *argv)
    (tmp_path / "test.jsonl").unlink()
    assert "test.jsonl" in refused(capsys, *argv)


# ----------------------------------------------------------------------------------------------------------------------
# generate


def greedy(toy, chat, limit=32):
    """The model's own unbatched greedy answer."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(toy / "model"), AutoTokenizer.from_pretrained(toy / "model")
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
    out = model.generate(ids, do_sample=False, max_new_tokens=limit)[0, ids.shape[1] :].tolist()
    return tokenizer.decode(out, skip_special_tokens=True).strip(), out[-1] == tokenizer.eos_token_id


def test_alpaca_eval_file_of_greedy_answers_equals_unbatched_generation(toy, tmp_path, capsys):
    out = tmp_path / "deep" / "mine.json"
    code, *_ = run(
        capsys,
        "generate",
        "--model",
        toy / "model",
        "--data",
        toy,
        "--out",
        out,
        "--batch_size",
        3,
        "--max_new_tokens",
        9,
    )
    said = json.load(open(out))
    prompts = list(dict.fromkeys(record["prompt"][0]["content"] for record in records(toy)))
    assert (
        code == 0 and [row["instruction"] for row in said] == prompts and len({len(p.split()) for p in prompts}) > 2
    )  # padding
    for row in said:
        assert (row["dataset"], row["generator"]) == (toy.name, "mine")
        assert (row["output"], row["ended"]) == greedy(toy, [dict(role="user", content=row["instruction"])], 9)
    assert {row["ended"] for row in said} == {True, False}  # nine tokens are enough for some
    assert not (tmp_path / "deep" / "mine.json.partial").exists()


def test_alpaca_eval_instructions_and_dialogues(toy, tmp_path, capsys):
    (tmp_path / "eval.json").write_text(
        json.dumps([dict(instruction="name two red foods", output="x", generator="y", dataset="selfinstruct")])
    )
    dialogue = [
        dict(role="user", content="name two red foods"),
        dict(role="assistant", content="cherry and tomato ."),
        dict(role="user", content="name two red foods in abc order"),
    ]
    write_lines(tmp_path / "records.jsonl", [dict(prompt=dialogue, chosen="", rejected="")])
    for source, instruction, dataset in (
        ("eval.json", "name two red foods", "selfinstruct"),
        (
            "records.jsonl",
            "user: name two red foods\n\nassistant: cherry and tomato .\n\nuser: name two red foods in abc order",
            "records.jsonl",
        ),
    ):
        assert (
            run(
                capsys,
                "generate",
                "--model",
                toy / "model",
                "--prompts",
                tmp_path / source,
                "--out",
                tmp_path / "o.json",
            )[0]
            == 0
        )
        (row,) = json.load(open(tmp_path / "o.json"))
        assert (row["instruction"], row["dataset"], row["generator"]) == (instruction, dataset, "o")
    assert row["output"] == greedy(toy, dialogue)[0]


def test_fast_chat_rows_where_turn_2_sees_the_answer_of_turn_1(toy, tmp_path, capsys):
    questions = [
        dict(question_id=81 + i, category="writing", turns=[f"name {n} sea animals", "name two red foods"])
        for i, n in enumerate(["two", "four"])
    ]
    write_lines(tmp_path / "question.jsonl", questions)
    code, *_ = run(
        capsys,
        "generate",
        "--model",
        toy / "model",
        "--prompts",
        tmp_path / "question.jsonl",
        "--out",
        tmp_path / "tiny.jsonl",
    )
    rows = [json.loads(line) for line in open(tmp_path / "tiny.jsonl")]
    assert code == 0 and [row["question_id"] for row in rows] == [81, 82]
    for row, question in zip(rows, questions):
        assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert (
            row["model_id"] == "tiny" and isinstance(row["answer_id"], str) and abs(row["tstamp"] - time.time()) < 600
        )
        (choice,) = row["choices"]
        assert set(choice) == {"index", "turns"} and choice["index"] == 0
        chat = [dict(role="user", content=question["turns"][0])]
        first = greedy(toy, chat)[0]
        second = greedy(
            toy, chat + [dict(role="assistant", content=first), dict(role="user", content=question["turns"][1])]
        )[0]
        assert choice["turns"] == [first, second]
    assert len({row["answer_id"] for row in rows}) == 2


def test_samples_are_many_seeded_and_resumed(toy, tmp_path, capsys, monkeypatch):
    argv = "generate", "--model", toy / "model", "--data", toy, "--n", 3, "--temperature", 1, "--batch_size", 8
    assert run(capsys, *argv, "--out", tmp_path / "whole.json")[0] == 0
    whole = json.load(open(tmp_path / "whole.json"))
    n = len({row["instruction"] for row in whole})
    assert (
        len(whole) == 3 * n
        and [row["sample"] for row in whole[:3]] == [0, 1, 2]
        and len({row["output"] for row in whole}) > n
    )

    real, calls = evaluation.sample, []

    def breaks(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(evaluation, "sample", breaks)
    with pytest.raises(KeyboardInterrupt):
        run(capsys, *argv, "--out", tmp_path / "part.json")
    assert not (tmp_path / "part.json").exists() and (tmp_path / "part.json.partial").exists()
    calls[:] = [1] * 10
    torch.manual_seed(123)
    assert run(capsys, *argv, "--out", tmp_path / "part.json")[0] == 0
    assert len(calls) - 10 == math.ceil(3 * n / 8) - 3  # three batches were kept
    assert [row["output"] for row in json.load(open(tmp_path / "part.json"))] == [row["output"] for row in whole]
    assert run(capsys, *argv, "--out", tmp_path / "other.json", "--seed", 1)[0] == 0
    assert [row["output"] for row in json.load(open(tmp_path / "other.json"))] != [row["output"] for row in whole]


def test_a_partial_file_of_other_settings_is_not_mixed_in(toy, tmp_path, capsys):
    out = tmp_path / "o.json"
    (tmp_path / "o.json.partial").write_text(json.dumps(dict(plan="other", said=[[["stale", True]]])))
    assert run(capsys, "generate", "--model", toy / "model", "--data", toy, "--out", out)[0] == 0
    assert "stale" not in out.read_text()


# ----------------------------------------------------------------------------------------------------------------------
# win rates


def judgment(question, a, b, g1, g2, **other):
    return dict(question_id=question, model_1=a, model_2=b, g1_winner=g1, g2_winner=g2, turn=1, **other)


def numbers(line):
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", line)]


HAND = [
    judgment(1, "x", "y", "model_1", "model_1"),  # x wins
    judgment(2, "x", "y", "model_1", "model_2"),  # the two orders disagree: half
    judgment(3, "x", "y", "tie", "tie"),  # half
    judgment(4, "x", "y", "tie", "model_1"),  # a tie in one order: half
    judgment(5, "y", "x", "model_2", "model_2"),  # x wins, written the other way round
    judgment(6, "x", "y", "model_2", "model_2"),  # y wins
    judgment(7, "x", "y", "error", "model_2"),  # left out
    judgment(7, "x", "y", "model_2", "error", turn2=2),  # left out
    judgment(8, "x", "z", "model_2", "model_2"),  # z wins
]


def test_the_rule_by_hand(tmp_path, capsys):
    code, out, _ = run(capsys, "winrate", "--judgments", write_lines(tmp_path / "hand.jsonl", HAND))
    lines = {line.strip().split("  ")[0]: line for line in out.splitlines() if line.strip()}
    rate = round(100 * (2 + 3 / 2) / 6, 1)  # x: two wins, three ties, one loss in six rows
    assert code == 0 and numbers(lines["x"])[:3] == [50.0, rate, 0.0]
    assert numbers(lines["y"])[:2] == [round(100 - rate, 1), 50.0]
    assert numbers(lines["x against y"])[0] == rate
    assert numbers(lines["x against y"])[3:] == [2, 3, 1, 2, 6]  # wins, ties, losses, errors, prompts
    assert numbers(lines["x against z"])[:3] == [0.0, 0.0, 0.0] and "nan" in lines["y against z"]


def test_rows_and_columns_add_up_and_intervals_are_those_of_the_binomial(tmp_path, capsys):
    """400 prompts, 60% won: the bootstrap interval is near 0.6 +- 1.96 sqrt(.6 .4 / 400), and the same each time."""
    path = write_lines(
        tmp_path / "many.jsonl",
        [judgment(i, "x", "y", *["model_1" if i % 5 < 3 else "model_2"] * 2) for i in range(400)],
    )
    code, out, _ = run(capsys, "winrate", "--judgments", path)
    again = run(capsys, "winrate", "--judgments", path)[1]
    rate, low, high = numbers(re.search(r"x against y.*", out)[0])[:3]
    half = 196 * math.sqrt(0.6 * 0.4 / 400)
    assert (
        code == 0
        and out == again
        and rate == 60.0
        and low == pytest.approx(60 - half, abs=0.6)
        and high == pytest.approx(60 + half, abs=0.6)
    )
    rows = [numbers(line) for line in out.splitlines() if re.match(r" *[xy]  ", line)]
    assert rows[0][1] + rows[1][0] == 100 and rows[0][0] == rows[1][1] == 50
    # the two turns of a question go together: twice the rows, no more certainty
    rows = [json.loads(line) for line in open(path)]
    both = run(
        capsys,
        "winrate",
        "--judgments",
        write_lines(tmp_path / "turns.jsonl", rows + [dict(row, turn=2) for row in rows]),
    )[1]
    assert numbers(re.search(r"x against y.*", both)[0])[:3] == [rate, low, high]


@pytest.mark.parametrize(
    "bad", ['{"question_id": 1', '{"question_id": 1}', "3", json.dumps(judgment(1, "x", "y", "A", "tie"))]
)
def test_a_malformed_judgment_is_named_by_its_line(tmp_path, capsys, bad):
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in HAND[:2]) + bad + "\n")
    assert "line 3" in refused(capsys, "winrate", "--judgments", path)


def outputs(path, name, answers, prompts=None):
    path.write_text(
        json.dumps(
            [
                dict(dataset="d", instruction=prompt, output=answer, generator=name)
                for prompt, answer in zip(
                    prompts
                    or [f"name two red foods except {item}" for item in "cherry tomato radish beetroot".split()],
                    answers,
                )
            ]
        )
    )
    return path


def test_outputs_on_different_prompts_name_the_first_that_differs(tmp_path, capsys):
    a, b = (
        outputs(tmp_path / name, name, "xyz", prompts)
        for name, prompts in (("a", ["p1", "p2", "p3"]), ("b", ["p1", "other", "more"]))
    )
    error = refused(capsys, "winrate", a, b, "--judge", "gold")
    assert refused(capsys, "winrate", b, a, "--judge", "gold") != error
    assert "p2" in error and "other" in error and "p3" not in error
    c = outputs(tmp_path / "c", "c", "xy", ["p1", "p2"])
    assert "p3" in refused(capsys, "winrate", a, c, "--judge", "gold")
    refused(
        capsys, "winrate", a, outputs(tmp_path / "a2", "a", "xyz", ["p1", "p2", "p3"]), "--judge", "gold"
    )  # one name twice
    refused(capsys, "winrate", a, "--judge", "gold")
    refused(capsys, "winrate", a, a)


def test_gold_judges_by_the_exact_reward_and_goes_on_where_it_stopped(tmp_path, capsys):
    # rewards of x 1, 0, -0.5 (no sentence), 0; of y 0, 1, -0.5, 0
    x = outputs(
        tmp_path / "x.json", "x", ["tomato and radish .", "cherry and milk .", "cherry radish", "tomato and cod ."]
    )
    y = outputs(
        tmp_path / "y.json", "y", ["tomato and cod .", "cherry and radish .", "tomato radish", "tomato and cod ."]
    )
    z = outputs(tmp_path / "z.json", "z", ["cod cod cod"] * 4)
    code, out, _ = run(capsys, "winrate", x, y, "--judge", "gold")
    rows = [json.loads(line) for line in open(tmp_path / "judgments_gold.jsonl")]
    assert code == 0 and [(row["g1_winner"], row["g2_winner"]) for row in rows] == [
        ("model_1",) * 2,
        ("model_2",) * 2,
        ("tie",) * 2,
        ("tie",) * 2,
    ]
    assert [row["question_id"] for row in rows] == [1, 2, 3, 4] and {
        (row["model_1"], row["model_2"], row["turn"]) for row in rows
    } == {("x", "y", 1)}
    assert len(rows[0]["judge"]) == 2  # FastChat's own loader makes a tuple of it
    assert (
        numbers(re.search(r"x against y.*", out)[0])[0] == 50.0 and numbers(re.search(r"(?m)^ *x  .*", out)[0])[2] == 16
    )  # characters
    with open(tmp_path / "judgments_gold.jsonl", "rb+") as file:  # killed in the middle of the third row
        file.truncate(len("".join(json.dumps(row) + "\n" for row in rows[:2])) + 30)
    assert run(capsys, "winrate", y, x, "--judge", "gold")[0] == 0  # the order of the files plays no part
    again = [json.loads(line) for line in open(tmp_path / "judgments_gold.jsonl")]
    assert again[:2] == rows[:2] and len(again) == 4 and again[2]["tstamp"] > rows[2]["tstamp"]
    assert run(capsys, "winrate", x, y, z, "--judge", "gold")[0] == 0  # a further model adds its rows
    code, out, _ = run(capsys, "winrate", "--judgments", tmp_path / "judgments_gold.jsonl")
    assert (
        code == 0
        and len(open(tmp_path / "judgments_gold.jsonl").readlines()) == 12
        and numbers(re.search(r"x against z.*", out)[0])[0] == 100
    )
    outputs(tmp_path / "x.json", "x", ["changed"] * 4)
    assert "other answers" in refused(capsys, "winrate", x, y, "--judge", "gold")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reward_model_judges_the_conversation_in_its_chat_template(toy, tmp_path, capsys, dtype):
    torch.manual_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=1,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with torch.no_grad():
        model.score.weight *= 50  # apart beyond the rounding of bfloat16
    model.eval().save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    answers = (
        ["tomato and radish .", "cod .", "cherry radish", "tomato and cod ."],
        ["cow .", "cod .", "tomato", "goat"],
    )
    x, y = (outputs(tmp_path / f"{name}.json", name, said) for name, said in zip("xy", answers))
    code, *_ = run(capsys, "winrate", x, y, "--judge", f"reward:{tmp_path / 'rm'}", "--dtype", dtype)
    rows = sorted(
        (json.loads(line) for line in open(tmp_path / "judgments_reward.jsonl")), key=lambda row: row["question_id"]
    )
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "rm", dtype=getattr(torch, dtype)).eval()
    prompts = [row["instruction"] for row in json.load(open(x))]
    for row, prompt, *said in zip(rows, prompts, *answers):
        scores = [
            model(
                **tokenizer(
                    f"<s><|user|> {prompt} <|assistant|> {text}</s>", add_special_tokens=False, return_tensors="pt"
                )
            ).logits.item()
            for text in said
        ]
        expected = "tie" if said[0] == said[1] else "model_1" if scores[0] > scores[1] else "model_2"
        assert (row["g1_winner"], row["g2_winner"]) == (expected, expected)
        first, second = numbers(row["g1_judgment"])
        assert (first, second) == pytest.approx(tuple(scores), abs=2e-4)
    assert code == 0 and len({row["g1_winner"] for row in rows}) > 1
    assert "2 outputs, not 1" in refused(
        capsys, "winrate", x, y, "--judge", f"reward:{toy / 'model'}", "--out", tmp_path / "other.jsonl"
    )


# ----------------------------------------------------------------------------------------------------------------------
# the chat judge, against a real server in a process of its own

SERVER = """
import http.server, json, os, re, sys, threading, time
mode, log = sys.argv[1:3]
lock, n, answered = threading.Lock(), 0, 0

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass
    def reply(self, code, body, **headers):
        self.send_response(code)
        for name, value in dict(headers, Content_Length=str(len(body))).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self): self.reply(404, b"{}")
    def do_POST(self):
        global n, answered
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers.get("Authorization", "")
        text = body["messages"][-1]["content"]
        with lock:
            n += 1
            turn = n
            with open(log, "a") as file:
                file.write(json.dumps(dict(path=self.path, key=key, body=body, time=time.time())) + "\\n")
        if mode == "locked": return self.reply(401, ("wrong key " + key).encode())
        if mode == "faulty":
            if turn == 1: return self.reply(503, b'{"error": {"message": "Loading model"}}')
            if turn == 2: return self.reply(429, b"slow down", Retry_After="0.3")
            if turn == 3: return self.reply(500, b"oops")
            if turn == 4: return time.sleep(2)                       # longer than the client waits
            if turn == 5: return self.reply(200, b'{"choices": [')   # cut off
            if turn == 6: return self.reply(200, b'{"choices": []}')
            if turn == 7: return self.connection.close()
        sides = re.findall(r"\\[Answer .\\]\\n(.*?)\\n\\[End of answer .\\]", text, re.S)
        good = ["good" in side.split("\\n\\n")[-1] for side in sides]
        verdict = "TIE" if good[0] == good[1] else "A" if good[0] else "B"
        said = f"I looked at both for you, {key}.\\n**Verdict: {verdict}**\\n"
        if mode == "biased": said = "The first.\\nVERDICT: A"
        if "riddle" in text: said = "VERDICT: A or VERDICT: B, who knows"
        with lock:
            if mode == "dies" and answered == 6: os._exit(1)
            answered += 1
        self.reply(200, json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode())

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@pytest.fixture
def serve(tmp_path):
    """serve(mode) -> (base URL, function that reads the requests so far)."""
    started = []

    def start(mode):
        log = tmp_path / f"requests{len(started)}.log"
        started.append(
            subprocess.Popen([sys.executable, "-c", SERVER, mode, str(log)], stdout=subprocess.PIPE, text=True)
        )
        port = int(started[-1].stdout.readline())
        return f"chat:http://127.0.0.1:{port}", lambda: [json.loads(line) for line in open(log)] if log.exists() else []

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def pair(tmp_path):
    """Two files of 12 prompts, whose answers are good and bad, bad and good, both bad, good and bad on a riddle."""
    prompts = [f"{'a riddle' if i % 4 == 3 else 'a request'} number {i}" for i in range(12)]
    x = outputs(tmp_path / "x.json", "x", [("good", "bad", "bad", "good")[i % 4] for i in range(12)], prompts)
    return x, outputs(tmp_path / "y.json", "y", [("bad", "good", "bad", "bad")[i % 4] for i in range(12)], prompts)


CHAT = "--judge_model", "j"


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """A chat judge has one second to answer, and the second try comes after ten milliseconds."""
    monkeypatch.setattr(evaluation.chat_judge, "__defaults__", (1, 0.01))


def test_chat_judge_survives_a_misbehaving_server_and_counts_no_verdict_as_error(
    serve, pair, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    judge, requests = serve("faulty")
    code, out, err = run(capsys, "winrate", *pair, "--judge", judge, *CHAT, "--workers", 4)
    assert code == 0
    # of 12 rows three are riddles; of the other nine, x and y win three each and three are ties
    assert numbers(re.search(r"x against y.*", out)[0])[0] == 50.0 and numbers(re.search(r"x against y.*", out)[0])[
        3:
    ] == [3, 3, 3, 3, 9]
    rows = {row["question_id"]: row for row in map(json.loads, open(tmp_path / "judgments_chat.jsonl"))}
    expected = {0: "tie", 1: "model_1", 2: "model_2", 3: "tie"}
    for i in range(12):
        winner = "error" if i % 4 == 3 else expected[(i + 1) % 4]
        assert (rows[i + 1]["g1_winner"], rows[i + 1]["g2_winner"]) == (winner, winner)
    asked = requests()
    again = next(request for request in asked[2:] if request["body"] == asked[1]["body"])
    assert again["time"] - asked[1]["time"] > 0.3  # Retry-After was heeded
    assert len(asked) == 24 + 7  # both orders of 12 rows, and each of the seven faults once more
    assert all(request["key"] == "Bearer sk-secret" and request["path"] == "/v1/chat/completions" for request in asked)
    texts = [
        request["body"]["messages"][-1]["content"]
        for request in asked
        if "number 0" in request["body"]["messages"][-1]["content"]
    ]
    assert sum(text.index("good") < text.index("bad") for text in texts[-2:]) == 1  # presented in both orders
    assert asked[0]["body"]["model"] == "j" and asked[0]["body"]["temperature"] == 0
    assert "sk-secret" not in out + err + "".join(path.read_text() for path in tmp_path.glob("*.json*"))
    # all of it again: only the three rows without a verdict are asked again
    assert run(capsys, "winrate", *pair, "--judge", judge, *CHAT)[:2] == (0, out) and len(requests()) == 31 + 6


def test_a_judge_that_always_prefers_the_first_answer_ties_everything(serve, pair, capsys):
    judge, _ = serve("biased")
    code, out, _ = run(capsys, "winrate", *pair, "--judge", judge + "/v1", *CHAT)
    assert code == 0 and numbers(re.search(r"x against y.*", out)[0]) == [50, 50, 50, 0, 9, 0, 3, 9]


def test_a_judge_that_dies_leaves_what_it_said_and_the_same_command_goes_on(serve, pair, tmp_path, capsys):
    judge, requests = serve("dies")
    error = refused(capsys, "winrate", *pair, "--judge", judge, *CHAT, "--workers", 1)
    kept = open(tmp_path / "judgments_chat.jsonl").read()
    assert (
        "no verdict" in error and "judgments_chat.jsonl" in error and len(kept.splitlines()) == 3
    )  # six answers are three rows
    judge, requests = serve("honest")
    assert run(capsys, "winrate", *pair, "--judge", judge, *CHAT)[0] == 0
    assert open(tmp_path / "judgments_chat.jsonl").read().startswith(kept) and len(requests()) == 2 * 9


def test_an_unreachable_judge_and_a_wrong_key(serve, pair, tmp_path, capsys, monkeypatch):
    assert "127.0.0.1:9" in refused(capsys, "winrate", *pair, "--judge", "chat:http://127.0.0.1:9", *CHAT)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    judge, requests = serve("locked")
    code, out, err = run(capsys, "winrate", *pair, "--judge", judge, *CHAT, "--workers", 1)
    assert code == 2 and "401" in err and "sk-secret" not in out + err and len(requests()) < 8  # no use in asking again


# ----------------------------------------------------------------------------------------------------------------------
# plot and flags


def test_plot_draws_means_and_spreads_over_seeds(tmp_path, capsys):
    for name, shift, gold in (("dpo-s1", 0.0, 0.1), ("dpo-s2", -2.0, 0.3), ("rpo-s1", 5.0, None)):
        (tmp_path / name).mkdir()
        metrics = [dict(step=step, loss=1.0) for step in (1, 2)] + [
            {"step": step, "eval/logps/chosen_vs_ref": shift - step} for step in (0, 50, 100)
        ]
        write_lines(tmp_path / name / "metrics.jsonl", metrics)
        if gold:
            write_lines(
                tmp_path / name / "prefs.jsonl",
                [dict(step=step, gold=gold, kl=2 * step, model="m") for step in (0, 100)],
            )
    runs = [tmp_path / name for name in ("dpo-s1", "dpo-s2", "rpo-s1")]
    code, out, _ = run(capsys, "plot", *runs, "--out", tmp_path / "figure.png")
    assert code == 0 and (tmp_path / "figure.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    dpo, rpo = (re.search(rf"(?m)^ *{name}  .*", out)[0] for name in ("dpo", "rpo"))
    assert (
        "-101.00 ± 1.41" in dpo
        and "0.20 ± 0.14" in dpo
        and "200.00 ± 0.00" in dpo
        and dpo.split()[1] == "2" == str(len(runs) - 1)
    )
    assert "-95.00  " in rpo and "±" not in rpo and "0.20" not in rpo
    (tmp_path / "none").mkdir()
    assert "none" in refused(capsys, "plot", tmp_path / "none", "--out", tmp_path / "f.png")


@pytest.mark.filterwarnings("ignore:No artists")  # what draws them is replaced here
def test_the_lines_that_are_drawn(tmp_path, capsys, monkeypatch):
    import matplotlib.axes

    drawn, filled = [], []
    monkeypatch.setattr(
        matplotlib.axes.Axes,
        "plot",
        lambda self, x, y, **kw: drawn.append((list(x), list(y), kw["color"], kw["linestyle"])) or [],
    )
    monkeypatch.setattr(
        matplotlib.axes.Axes, "fill_between", lambda self, x, a, b, **kw: filled.append((list(a), list(b)))
    )
    for name, values in (("a-s1", (0, 1)), ("a-s2", (0, 3)), ("b-s1", (0, 7))):
        (tmp_path / name).mkdir()
        write_lines(
            tmp_path / name / "metrics.jsonl",
            [{"step": 10 * i, "eval/logps/chosen_vs_ref": value} for i, value in enumerate(values)],
        )
    run(capsys, "plot", *(tmp_path / name for name in ("a-s1", "a-s2", "b-s1")), "--out", tmp_path / "f.png")
    assert [line[:2] for line in drawn] == [([0, 10], [0, 2]), ([0, 10], [0, 7])]
    assert drawn[0][2] != drawn[1][2] and drawn[0][3] != drawn[1][3]  # apart by colour and by style
    assert filled[0] == ([0, pytest.approx(2 - math.sqrt(2))], [0, pytest.approx(2 + math.sqrt(2))])


@pytest.mark.parametrize("command", ["prefs", "generate", "winrate", "plot"])
def test_flags_are_explained_and_not_abbreviated(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0 and "--" in out
    assert run(capsys, command, "--ou", "x", "--dat", "x")[0] == 2


# ----------------------------------------------------------------------------------------------------------------------
# bad input, and input that looks like other input


@pytest.mark.parametrize("content", ["answers", "one line without an end", '{"question_id": 1, "text": "not ours"}\n'])
def test_a_file_that_holds_no_judgments_is_never_touched(pair, tmp_path, capsys, content):
    path = pair[0] if content == "answers" else tmp_path / "notes.txt"
    before = path.read_text() if content == "answers" else path.write_text(content) and content
    assert str(path) in refused(capsys, "winrate", *pair, "--judge", "chat:http://127.0.0.1:9", "--out", path)
    assert path.read_text() == before


def test_judgments_that_another_judge_left_are_kept(pair, tmp_path, capsys):
    """Also where none has a verdict: rows without one are played again only for the judge and models that left them."""
    row = dict(question_id=1, model_1="x", model_2="z", judge=["gold", "pair"], g1_winner="error", g2_winner="tie")
    row["id"] = "1"
    for change in (dict(), dict(model_2="y", judge=["other", "pair"])):
        path = write_lines(tmp_path / "j.jsonl", [row | change])
        refused(capsys, "winrate", *pair, "--judge", "gold", "--out", path)
        assert [json.loads(line) for line in open(path)] == [row | change]


def test_outputs_beside_judgments_show_their_lengths(pair, tmp_path, capsys):
    row = dict(question_id=1, model_1="x", model_2="y", g1_winner="model_1", g2_winner="model_1")
    path = write_lines(tmp_path / "j.jsonl", [row])
    code, out, _ = run(capsys, "winrate", *pair, "--judgments", path)
    assert code == 0 and re.search(r"(?m)^ *x +50.0 +100.0 +\d+$", out)
    assert "one of the two" in refused(capsys, "winrate", *pair, "--judgments", path, "--judge", "gold")


@pytest.mark.parametrize("judge", ["reward", "reward:", "chat", "chat:localhost:8000", "gold:", "golden"])
def test_half_a_judge_is_none(pair, capsys, judge):
    assert "winrate needs" in refused(capsys, "winrate", *pair, "--judge", judge)


def test_a_reward_that_is_no_number_is_an_error_and_no_tie():
    judge, nan = evaluation.reward_judge("", "float32"), math.nan
    assert [judge(dict(score=a), dict(score=b))[0] for a, b in ((nan, nan), (1.0, nan), (2.0, 2.0), (2.0, 1.0))] == [
        "error",
        "error",
        "tie",
        "A",
    ]


def test_judgments_without_any_verdict_end_with_an_error(tmp_path, capsys):
    row = dict(question_id=1, model_1="x", model_2="y", g1_winner="error", g2_winner="tie", g1_judgment="HTTP 400")
    code, out, err = run(capsys, "winrate", "--judgments", write_lines(tmp_path / "j.jsonl", [row]))
    assert code == 2 and "HTTP 400" in err and "errors" in out


@pytest.mark.parametrize("first", [1, 2])
def test_questions_of_one_and_of_two_turns_in_one_batch(toy, tmp_path, capsys, first):
    questions = [dict(question_id=i, turns=["name two red foods"] * n) for i, n in enumerate((first, 3 - first))]
    path = write_lines(tmp_path / "question.jsonl", questions)
    code, _, err = run(capsys, "generate", "--model", toy / "model", "--prompts", path, "--out", tmp_path / "m.jsonl")
    assert code == 0, err
    rows = [json.loads(line) for line in open(tmp_path / "m.jsonl")]
    assert [len(row["choices"][0]["turns"]) for row in rows] == [first, 3 - first]


def test_further_keys_of_a_record_are_not_its_prompt(toy, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    chat = [dict(role="user", content="name two red foods")]
    path = write_lines(tmp_path / "p.jsonl", [dict(prompt=chat, instruction="other", turns=2, system=None)])
    assert [item["chat"] for item in evaluation.load_prompts(str(path), tokenizer)] == [chat]


@pytest.mark.parametrize(
    "row", [dict(prompt=[{"from": "human", "value": "hi"}]), dict(turns=[3]), dict(instruction=None), dict(text="hi")]
)
def test_a_row_without_a_prompt_is_named(toy, tmp_path, capsys, row):
    path = write_lines(tmp_path / "p.jsonl", [dict(instruction="fine"), row])
    line = refused(capsys, "generate", "--model", toy / "model", "--prompts", path, "--out", tmp_path / "o.json")
    assert "p.jsonl line 2" in line


def test_two_draws_of_a_prompt_are_not_independent(monkeypatch, tmp_path):
    """Where both draws of each prompt are the same, the errors are those of one draw a prompt."""
    lengths = [2, 5, 9, 4]
    said = [([1], [7] * n, "text", True) for n in lengths]
    monkeypatch.setattr(evaluation, "sample", lambda policy, chats, *rest: said * (len(chats) // 4))
    args = type("Args", (), dict(seed=0, data=str(tmp_path)))
    own = evaluation.own_samples([None], ["a", "b", "c", "d"], lambda model, pairs: torch.zeros(4, 2), args)
    sd = (sum((n - 5) ** 2 for n in lengths) / 3) ** 0.5
    assert own["length"] == (5, pytest.approx(sd / 2))


def test_a_run_is_known_by_its_whole_path(tmp_path, capsys):
    """a/dpo and b/dpo are two settings, not two seeds of one; and brackets in a name are no pattern."""
    for name, value in (("a/dpo", 0), ("b/dpo", -10)):
        (tmp_path / name).mkdir(parents=True)
        write_lines(tmp_path / name / "metrics.jsonl", [{"step": 0, "eval/logps/chosen_vs_ref": value}])
    code, out, _ = run(capsys, "plot", tmp_path / "a/dpo", tmp_path / "b/dpo", "--out", tmp_path / "new/f.png")
    assert code == 0 and "-5.00" not in out and f"{tmp_path}/b/dpo" in out and (tmp_path / "new/f.png").exists()
    for step in ("step_000001", "step_000002"):
        (tmp_path / "run[1]" / step).mkdir(parents=True)
        (tmp_path / "run[1]" / step / "trainer_state.json").write_text(json.dumps(dict(step=int(step[-1]), options={})))
    assert [state["step"] for _, state in evaluation.checkpoints(str(tmp_path / "run[1]"))] == [1, 2]


@pytest.mark.parametrize(
    "flags",
    ["--n 0", "--batch_size 0", "--temperature -1", "--top_p 2", "--max_new_tokens -3", "--out .", "--prompts nowhere"],
)
def test_a_number_out_of_range_or_a_path_of_the_wrong_kind_is_refused(toy, tmp_path, capsys, flags):
    model, prompts = ("--model", toy / "model"), write_lines(tmp_path / "p.jsonl", [dict(instruction="hi")])
    line = refused(capsys, "generate", *model, "--prompts", prompts, "--out", tmp_path / "o.json", *flags.split())
    assert flags.split()[1] in line and "line 1" not in line


def test_help_shows_a_percent_sign_once(capsys):
    for command in ([], ["winrate"]):
        assert "with 95% intervals" in " ".join(run(capsys, *command, "--help")[1].split())
