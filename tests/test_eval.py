"""
eval.py: log-probs and KL against independent computations, file formats, the win-rate rule, pairs
made of samples, servers that misbehave, and one line for whatever goes wrong.
"""
import contextlib
import errno
import http.server
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openai._base_client
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import eval as evaluation
import rpo
from prepare_data import gold_reward

ROOT = Path(evaluation.__file__).parent

# ------------------------------------------------------------------------------------------------
# helpers

def run(*argv):
    """eval.py in this process: (exit code, stdout, stderr)."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            evaluation.run([str(word) for word in argv])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()

def succeeds(*argv):
    """What eval.py prints when all is well."""
    code, out, err = run(*argv)
    assert code in (0, None), err
    return out

def refused(*argv):
    """The one line with which eval.py refuses bad input."""
    code, _, err = run(*argv)
    assert code == 2 and "Traceback" not in err
    lines = [line for line in re.split(r"[\r\n]", err) if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]

def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]

def numbers(line):
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", line)]

def line_of(name, out):
    """The numbers in a printed table's row."""
    return numbers(re.search(rf"(?m)^{re.escape(name)}  .*", out)[0][len(name) :])

TOY_PROMPTS = [
    "name two red foods except cherry",
    "name two red foods except tomato",
    "name two red foods except radish",
    "name two red foods except beetroot",
]

def outputs(path, name, answers, prompts=None, **further):
    """A file in AlpacaEval's layout; the prompts are of the toy world unless others are given."""
    rows = []
    for prompt, answer in zip(prompts or TOY_PROMPTS, answers):
        rows.append(dict(dataset="d", instruction=prompt, output=answer, generator=name, **further))
    path.write_text(json.dumps(rows))
    return path

@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """
    The toy world with a barely trained reference, model/; policy/, which is it with noise; and
    run/, a run folder with both.
    """
    folder = tmp_path_factory.mktemp("toy")
    flags = "toy --limit 12 --test_size 40 --seed 1 --sft_steps 150 --out".split()
    subprocess.run(
        [sys.executable, ROOT / "prepare_data.py", *flags, folder], check=True, capture_output=True
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight += 0.1 * weight.std() * torch.randn_like(weight)
        # flatter: KL to the reference stands well above the noise of an estimate
        model.model.norm.weight *= 0.5
    # rules that must not reach our samples
    model.generation_config.update(do_sample=True, top_k=2, min_p=0.6)
    model.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")

    checkpoints = [(5, "step_000005", "policy"), (10, "final", "model")]
    checkpoints.append((10, "step_000010", "policy"))
    for step, name, source in checkpoints:
        shutil.copytree(folder / source, folder / "run" / name)
        state = dict(step=step, options=dict(beta=0.5, model=str(folder / "model")))
        (folder / "run" / name / "trainer_state.json").write_text(json.dumps(state))
    # a save that was cut short
    shutil.copytree(folder / "run" / "final", folder / "run" / "step_000020.tmp")
    return folder

@pytest.fixture(scope="module")
def tokenizer(toy):
    return AutoTokenizer.from_pretrained(toy / "model")

@pytest.fixture(scope="module")
def models(toy):
    """(policy, reference), as transformers loads them."""
    return [AutoModelForCausalLM.from_pretrained(toy / name).eval() for name in ("policy", "model")]

# ------------------------------------------------------------------------------------------------
# prefs

@pytest.fixture(scope="module")
def measured(toy):
    """(rows of RUN/prefs.jsonl, what was printed) for the run and the policy."""
    flags = "--ref_model", toy / "model", "--data", toy, "--batch_size", 16
    out = succeeds("prefs", "--model", toy / "run", toy / "policy", *flags)
    return read_lines(toy / "run" / "prefs.jsonl"), out

def test_a_run_folder_gives_its_checkpoints_by_step_and_each_step_once(measured, toy):
    rows, _ = measured
    assert [row["step"] for row in rows] == [0, 5, 10]
    assert rows[2]["model"].endswith("final")
    assert [row["beta"] for row in rows] == [0.5] * 3
    assert not (toy / "policy" / "prefs.jsonl").exists()

def test_a_run_that_cannot_be_written_to_is_not_measured_first(toy, tmp_path, monkeypatch):
    """Minutes of work would be lost, of each checkpoint."""
    (shutil.copytree(toy / "run", tmp_path / "run") / "prefs.jsonl").unlink(missing_ok=True)
    (tmp_path / "run/prefs.jsonl").mkdir()
    monkeypatch.setattr(evaluation, "measure", None)
    flags = "--ref_model", toy / "model", "--data", toy
    assert "run/prefs.jsonl is a folder" in refused("prefs", "--model", tmp_path / "run", *flags)

def test_a_checkpoint_without_a_state_is_left_out_and_that_is_said(toy, tmp_path, capsys):
    (shutil.copytree(toy / "run", tmp_path / "run") / "step_000005/trainer_state.json").unlink()
    found = evaluation.checkpoints(str(tmp_path / "run"), "the reference")
    assert [step for _, step, _ in found] == [0, 10]
    assert "step_000005 is left out" in capsys.readouterr().out

@pytest.mark.parametrize("start", ["policy", "ORG/REFERENCE"])
def test_step_0_is_the_model_that_the_run_began_with(toy, tmp_path, start):
    """Of a later online round this is no longer the reference; a hub's name is no folder."""
    start = str(toy / "policy") if start == "policy" else start
    shutil.copytree(toy / "model", tmp_path / "run/final")
    state = dict(step=4, options=dict(model=start))
    (tmp_path / "run/final/trainer_state.json").write_text(json.dumps(state))
    first, _ = evaluation.checkpoints(str(tmp_path / "run"), "ORG/REFERENCE")
    assert first == (start, 0, state["options"])

def test_step_0_is_left_out_where_the_first_model_is_gone(toy, tmp_path, capsys):
    """The reference in its place would be another model's numbers."""
    shutil.copytree(toy / "model", tmp_path / "run/final")
    state = dict(step=4, options=dict(model="moved/away"))
    (tmp_path / "run/final/trainer_state.json").write_text(json.dumps(state))
    found = evaluation.checkpoints(str(tmp_path / "run"), "the reference")
    assert [step for _, step, _ in found] == [4]
    assert "step 0 is left out: moved/away" in capsys.readouterr().out
    flags = "--ref_model", toy / "model", "--data", toy, "--prompts", 0
    succeeds("prefs", "--model", tmp_path / "run", *flags)
    assert [row["step"] for row in read_lines(tmp_path / "run/prefs.jsonl")] == [4]

def test_a_checkpoint_of_transformers_trainer_is_a_model_like_any_other(toy, tmp_path):
    """Its trainer_state.json is about other things."""
    model = shutil.copytree(toy / "model", tmp_path / "checkpoint-500")
    (model / "trainer_state.json").write_text('{"global_step": 500, "log_history": []}')
    assert evaluation.checkpoints(str(model), "the reference") == [(str(model), None, {})]

def test_a_model_with_a_soft_cap_is_refused(toy, tokenizer, tmp_path):
    """Its log-probs would be those of other logits."""
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    more = dict(num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.7)
    config = Gemma2Config(vocab_size=len(tokenizer), initializer_range=0.2, **sizes, **more)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "capped")
    tokenizer.save_pretrained(tmp_path / "capped")
    flags = "--ref_model", toy / "model", "--data", toy
    assert "soft_cap.diff" in refused("prefs", "--model", tmp_path / "capped", *flags)

def test_an_untouched_policy_has_margin_0_accuracy_half_and_no_kl(measured):
    rows, _ = measured
    for row in (rows[0], rows[2]):
        assert row["eval/rewards/accuracies"] == 0.5
        for name in ("rewards/margins", "logps/chosen_vs_ref", "logps/rejected_vs_ref"):
            assert row[f"eval/{name}"] == 0
        assert row["kl"] == 0 == row["kl_median"]

def logp(model, tokenizer, prompt, answer):
    """Summed log-prob of an answer and its end token, by nothing of ours."""
    start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(f"{start} {answer}</s>", add_special_tokens=False).input_ids
    begin = len(tokenizer(start, add_special_tokens=False).input_ids)
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logits[i - 1, ids[i]].item() for i in range(begin, len(ids)))

@torch.no_grad()
def independent_logps(models, tokenizer, file):
    """{side: array (2, N)} of policy and reference on the pairs of a file."""
    found = {}
    for side in ("chosen", "rejected"):
        pairs = [(record["prompt"], record[side][0]["content"]) for record in read_lines(file)]
        found[side] = np.array([[logp(m, tokenizer, *pair) for pair in pairs] for m in models])
    return found

def test_log_probs_and_errors_agree_with_an_independent_computation(
    measured, models, tokenizer, toy
):
    row = measured[0][1]
    logps = independent_logps(models, tokenizer, toy / "test.jsonl")
    n = logps["chosen"].shape[1]
    ratios = {side: policy - reference for side, (policy, reference) in logps.items()}
    for side, values in ratios.items():
        assert row[f"eval/logps/{side}_vs_ref"] == pytest.approx(values.mean(), abs=1e-4)
        error = values.std(ddof=1) / math.sqrt(n)
        assert row[f"eval/logps/{side}_vs_ref_se"] == pytest.approx(error, abs=1e-4)
    assert row["eval/logps/chosen"] == pytest.approx(logps["chosen"][0].mean(), abs=1e-4)
    margins = 0.5 * (ratios["chosen"] - ratios["rejected"])
    assert row["eval/rewards/margins"] == pytest.approx(margins.mean(), abs=1e-4)
    assert row["eval/rewards/accuracies"] == (margins > 0).mean()

def test_training_pairs_are_measured_beside_held_out_ones(models, tokenizer, toy):
    flags = "--ref_model", toy / "model", "--data", toy, "--split", "train"
    out = succeeds("prefs", "--model", toy / "run", *flags)
    row = read_lines(toy / "run" / "prefs_train.jsonl")[1]
    logps = independent_logps(models, tokenizer, toy / "train.jsonl")["chosen"]
    assert row["train/logps/chosen"] == pytest.approx(logps[0].mean(), abs=1e-4)
    assert row["train/logps/chosen_vs_ref"] == pytest.approx((logps[0] - logps[1]).mean(), abs=1e-4)
    assert "kl" not in row and "12 pairs" in out

def test_the_first_pairs_alone_are_measured_where_asked(models, tokenizer, toy, tmp_path):
    shutil.copytree(toy / "run", tmp_path / "run")
    flags = "--ref_model", toy / "model", "--data", toy, "--pairs", 5, "--prompts", 0
    succeeds("prefs", "--model", tmp_path / "run", *flags)
    row = read_lines(tmp_path / "run" / "prefs.jsonl")[1]
    logps = independent_logps(models, tokenizer, toy / "test.jsonl")["chosen"][0, :5]
    assert row["eval/logps/chosen"] == pytest.approx(logps.mean(), abs=1e-4)
    assert row["by_length"]["all"]["pairs"] == 5 and "kl" not in row

def test_length_groups_are_a_partition(measured):
    parts = dict(measured[0][1]["by_length"])
    whole = parts.pop("all")
    assert len(parts) == 3
    assert sum(part["pairs"] for part in parts.values()) == whole["pairs"] == 40
    name = "eval/logps/chosen_vs_ref"
    total = sum(part["pairs"] * part[name][0] for part in parts.values())
    assert total / 40 == pytest.approx(whole[name][0], abs=1e-6)

def test_one_row_a_checkpoint_and_length_groups_of_the_last_alone(measured, toy):
    _, out = measured
    of_run, of_policy = out.split(f"{toy}/policy: ")
    for text, steps in ((of_run, ["0", "5", "10"]), (of_policy, ["-"])):
        table, groups = text.split("by length")
        rows = table.split("\nstep ")[1].splitlines()[1:]
        assert [row.split()[0] for row in rows if row[:1].strip() and "±" in row] == steps
        assert len([row for row in groups.splitlines() if row.count("±") == 5]) == 4
    assert max(len(line) for line in out.splitlines()) <= 120

@torch.no_grad()
def test_kl_of_one_token_answers_is_a_sum_over_the_vocabulary(models, tokenizer, toy, tmp_path):
    """Samples by other rules than the policy's own (top_k, min_p) would miss it."""
    shutil.copytree(toy / "policy", tmp_path / "run" / "final")
    state = dict(step=1, options=dict(model=str(toy / "model")))
    (tmp_path / "run" / "final" / "trainer_state.json").write_text(json.dumps(state))
    flags = "--ref_model", toy / "model", "--data", toy, "--max_new_tokens", 1
    succeeds("prefs", "--model", tmp_path / "run", *flags)
    row = read_lines(tmp_path / "run" / "prefs.jsonl")[1]

    exact = []
    for prompt in {record["prompt"][0]["content"] for record in read_lines(toy / "test.jsonl")}:
        start = f"<s><|user|> {prompt} <|assistant|>"
        ids = tokenizer(start, add_special_tokens=False, return_tensors="pt").input_ids
        p, q = [model(ids).logits[0, -1].log_softmax(-1) for model in models]
        exact.append((p.exp() * (p - q)).sum().item())
    exact = sum(exact) / len(exact)
    assert abs(row["kl"] - exact) < 3.5 * row["kl_se"] < exact
    assert row["length"] == 1 and row["well_formed"] == 0

def test_gold_is_the_reward_of_the_samples(measured, toy, tmp_path):
    """Greedy samples are the same for prefs and generate, so the mean of their rewards must be."""
    out = tmp_path / "greedy.json"
    succeeds("generate", "--model", toy / "policy", "--data", toy, "--out", out)
    gold = []
    for row in json.loads(out.read_text()):
        gold.append(gold_reward(row["instruction"], row["output"], ended=row["ended"]))
    row = measured[0][1]
    assert row["gold_greedy"] == pytest.approx(sum(gold) / len(gold))
    assert 0 <= row["well_formed"] <= 1 and -1 <= row["gold"] <= 1

def test_two_draws_of_a_prompt_are_not_independent(monkeypatch, tmp_path):
    """Where both draws of each prompt are the same, the errors are those of one draw a prompt."""
    lengths = [2, 5, 9, 4]
    answers = [dict(prompt=[1], response=[7] * n, text="", ended=True) for n in lengths]
    logps = {"policy": torch.tensor([[n, n] for n in lengths]), "reference": torch.zeros(4, 2)}
    monkeypatch.setattr(evaluation, "sample", lambda policy, prompts, **_: answers * 2)
    monkeypatch.setattr(evaluation, "log_probs", lambda model, *_: logps[model])
    o = SimpleNamespace(seed=0, batch_size=4, max_new_tokens=9, dtype="float32", data=tmp_path)
    found = evaluation.own_samples(("policy", None), ("reference", None), list("abcd"), o)
    error = np.std(lengths, ddof=1) / 2
    assert found["length"] == found["kl"] == (5, pytest.approx(error))

# ------------------------------------------------------------------------------------------------
# generate

def greedy(models, tokenizer, chat, limit=32):
    """(text, whether it ended): the reference's own greedy answer, in no batch."""
    how = dict(add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = tokenizer.apply_chat_template(chat, **how).input_ids
    out = models[1].generate(ids, do_sample=False, max_new_tokens=limit)[0, ids.shape[1] :].tolist()
    return tokenizer.decode(out, skip_special_tokens=True).strip(), out[-1] == 2

def ask_user(text):
    return {"role": "user", "content": text}

def say(text):
    return {"role": "assistant", "content": text}

def test_alpaca_eval_answers_equal_unbatched_generation(models, tokenizer, toy, tmp_path):
    out = tmp_path / "deep" / "mine.json"
    how = "--batch_size", 3, "--max_new_tokens", 9
    succeeds("generate", "--model", toy / "model", "--data", toy, "--out", out, *how)
    rows = json.loads(out.read_text())
    prompts = [record["prompt"][0]["content"] for record in read_lines(toy / "test.jsonl")]
    assert [row["instruction"] for row in rows] == list(dict.fromkeys(prompts))
    # batches of unequal prompts are padded
    assert len({len(prompt.split()) for prompt in prompts}) > 2
    for row in rows:
        assert (row["dataset"], row["generator"]) == (toy.name, "mine")
        assert row["prompt"] == [ask_user(row["instruction"])]
        answer = row["output"], row["ended"]
        assert answer == greedy(models, tokenizer, row["prompt"], 9)
    # nine tokens are enough for some
    assert {row["ended"] for row in rows} == {True, False}
    assert os.listdir(out.parent) == ["mine.json"]

DIALOGUE = [
    ask_user("name two red foods"),
    say("cherry and tomato ."),
    ask_user("name two red foods in abc order"),
]
PARAGRAPHS = "\n\n".join(f"{message['role']}: {message['content']}" for message in DIALOGUE)
SOURCES = {
    "instruction": (dict(instruction="name two red foods", output="x"), "name two red foods"),
    "record": (dict(prompt=DIALOGUE, chosen="", rejected=""), PARAGRAPHS),
    "record of other keys": (dict(prompt=DIALOGUE, instruction="z", turns=2, system=0), PARAGRAPHS),
    "bare text": (dict(prompt="name two red foods", chosen="", rejected=""), "name two red foods"),
}

@pytest.mark.parametrize("source", SOURCES)
def test_each_kind_of_prompt_becomes_one_instruction_and_survives(toy, tmp_path, source):
    row, instruction = SOURCES[source]
    path = write_lines(tmp_path / "p.jsonl", [row])
    out = tmp_path / "o.json"
    succeeds("generate", "--model", toy / "model", "--prompts", path, "--out", out)
    (answer,) = json.loads(out.read_text())
    assert (answer["instruction"], answer["dataset"]) == (instruction, "p.jsonl")
    assert answer["prompt"] == row.get("prompt", [ask_user(instruction)])

def test_training_records_are_prompts_and_the_limit_counts_distinct_ones(toy, tmp_path):
    out = tmp_path / "o.json"
    flags = "--prompts", toy / "train.jsonl", "--limit", 3, "--out", out
    succeeds("generate", "--model", toy / "model", *flags)
    prompts = [json.dumps(record["prompt"]) for record in read_lines(toy / "train.jsonl")]
    answered = [json.dumps(row["prompt"]) for row in json.loads(out.read_text())]
    assert answered == list(dict.fromkeys(prompts))[:3]

def test_fast_chat_rows_where_turn_2_sees_the_answer_of_turn_1(models, tokenizer, toy, tmp_path):
    """Questions of one, two and three turns share a batch."""
    turns = ["name two sea animals", "name two red foods", "name four sea animals"]
    questions = [dict(question_id=81 + n, turns=turns[: n + 1]) for n in (1, 0, 2)]
    path = write_lines(tmp_path / "question.jsonl", questions)
    out = tmp_path / "tiny.jsonl"
    succeeds("generate", "--model", toy / "model", "--prompts", path, "--out", out)
    rows = read_lines(out)
    assert [row["question_id"] for row in rows] == [82, 81, 83]
    assert len({row["answer_id"] for row in rows}) == 3
    for row, question in zip(rows, questions):
        assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert row["model_id"] == "tiny" and abs(row["tstamp"] - time.time()) < 600
        (choice,) = row["choices"]
        assert set(choice) == {"index", "turns"} and choice["index"] == 0
        chat = []
        for asked, answered in zip(question["turns"], choice["turns"], strict=True):
            chat.append(ask_user(asked))
            assert answered == greedy(models, tokenizer, chat)[0]
            chat.append(say(answered))

def test_mt_bench_temperatures_follow_the_category(toy, tmp_path, monkeypatch):
    expected = dict(writing=0.7, roleplay=0.7, extraction=0.0, math=0.0, coding=0.0)
    expected |= dict(reasoning=0.0, stem=0.1, humanities=0.1, other=0.7)
    questions = []
    for i, category in enumerate(expected):
        question = dict(question_id=i, category=category, turns=[f"name two {category}"])
        questions.append(question)
    drawn = {}
    real = evaluation.sample_batch

    def record(sampler, chats, limit, temperature, top_p):
        for chat in chats:
            drawn[chat[0]["content"].split()[-1]] = temperature
        return real(sampler, chats, limit, temperature, top_p)

    monkeypatch.setattr(evaluation, "sample_batch", record)
    path = write_lines(tmp_path / "question.jsonl", questions)
    flags = "--prompts", path, "--out", tmp_path / "o.jsonl", "--temperature", "mt_bench"
    succeeds("generate", "--model", toy / "model", *flags)
    assert drawn == expected
    assert [row["question_id"] for row in read_lines(tmp_path / "o.jsonl")] == list(range(9))

@pytest.fixture
def sampling(toy):
    """The words of a command that draws three samples a prompt, in batches of eight."""
    how = "--n", 3, "--temperature", 1, "--batch_size", 8
    return ["generate", "--model", toy / "model", "--data", toy, *how]

def texts(path):
    return [row["output"] for row in json.loads(path.read_text())]

def test_samples_are_many_and_follow_from_the_seed(sampling, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(int(time.time()))
        succeeds(*sampling, "--seed", seed, "--out", tmp_path / name)
    rows = json.loads((tmp_path / "a").read_text())
    assert [row["sample"] for row in rows[:6]] == [0, 1, 2] * 2
    assert len(set(texts(tmp_path / "a"))) > len({row["instruction"] for row in rows})
    assert texts(tmp_path / "a") == texts(tmp_path / "b") != texts(tmp_path / "c")

def interrupt(monkeypatch, *argv):
    """Runs a command of generate that is interrupted in its fourth batch."""
    calls, real = [], evaluation.sample_batch

    def breaks(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "sample_batch", breaks)
        assert "interrupted" in refused(*argv)

def test_an_interrupted_generation_goes_on_with_the_same_draws(sampling, tmp_path, monkeypatch):
    succeeds(*sampling, "--out", tmp_path / "whole.json")
    out = tmp_path / "part.json"
    interrupt(monkeypatch, *sampling, "--out", out)
    kept = Path(f"{out}.partial").read_text()
    assert not out.exists() and len(kept.splitlines()) == 3
    # killed while it wrote
    Path(f"{out}.partial").write_text(kept + '{"id": "half a li')

    asked, real = [], evaluation.sample_batch

    def count(sampler, prompts, *further):
        asked.extend(prompts)
        return real(sampler, prompts, *further)

    monkeypatch.setattr(evaluation, "sample_batch", count)
    succeeds(*sampling, "--out", out)
    assert texts(out) == texts(tmp_path / "whole.json")
    # three batches of eight were kept
    assert len(asked) == len(texts(out)) - 24
    assert not Path(f"{out}.partial").exists()

@pytest.mark.parametrize("flags", ["--seed 1", "--temperature 0.5", "--top_p 0.5"])
def test_other_draws_are_not_gone_on_with(sampling, tmp_path, monkeypatch, flags):
    """What was interrupted under other flags is of no use."""
    out = tmp_path / "part.json"
    interrupt(monkeypatch, *sampling, "--out", out)
    for path in (out, tmp_path / "whole.json"):
        succeeds(*sampling, *flags.split(), "--out", path)
    assert texts(out) == texts(tmp_path / "whole.json")

@pytest.mark.parametrize("left", ['{"id": "other", "answers": [[["stale", true]]]}\n', "no JSON\n"])
def test_what_other_settings_have_left_is_not_mixed_in(toy, tmp_path, left):
    out = tmp_path / "o.json"
    Path(f"{out}.partial").write_text(left)
    flags = "--data", toy, "--limit", 4, "--out", out
    succeeds("generate", "--model", toy / "model", *flags)
    assert "stale" not in out.read_text()

# ------------------------------------------------------------------------------------------------
# the win-rate rule and its tables

def judgment(question, a, b, g1, g2, **further):
    return dict(question_id=question, model_1=a, model_2=b, g1_winner=g1, g2_winner=g2, **further)

RULE = [
    ("model_1", "model_1", 1),
    ("model_2", "model_2", 0),
    ("tie", "tie", 0.5),
    ("model_1", "model_2", 0.5),  # the two orders disagree
    ("tie", "model_1", 0.5),
    ("error", "model_1", None),
    ("model_2", "error", None),
]

@pytest.mark.parametrize("g1, g2, point", RULE)
def test_a_win_counts_only_if_both_orders_agree(g1, g2, point):
    row = judgment(1, "x", "y", g1, g2)
    assert evaluation.row_point(row, "x") == point
    assert evaluation.row_point(row, "y") == (None if point is None else 1 - point)

HAND = [
    judgment(1, "x", "y", "model_1", "model_1"),
    judgment(2, "x", "y", "model_1", "model_2"),
    judgment(3, "x", "y", "tie", "tie"),
    judgment(4, "x", "y", "tie", "model_1"),
    judgment(5, "y", "x", "model_2", "model_2"),
    judgment(6, "x", "y", "model_2", "model_2"),
    judgment(7, "x", "y", "error", "model_2"),
    judgment(7, "x", "y", "model_2", "error", turn=2),
    judgment(8, "x", "z", "model_2", "model_2"),
]

def test_the_tables_by_hand(tmp_path):
    """x against y: two wins, three ties, one loss in six rows, 58.33 percent; two errors."""
    out = succeeds("winrate", "--judgments", write_lines(tmp_path / "hand.jsonl", HAND))
    assert line_of("x", out) == [50.00, 58.33, 0.00]
    assert line_of("y", out)[:2] == [41.67, 50.00]
    assert line_of("x against y", out)[0] == 58.33
    assert line_of("x against y", out)[3:] == [2, 3, 1, 2, 6]
    assert line_of("x against z", out)[:3] == [0, 0, 0]
    # never played
    assert re.search(r"y against z +- +- +0 +0 +0 +0 +0", out)

def test_percentages_have_two_decimals_and_headers_stand_over_their_columns(tmp_path):
    """Sixty-seven of eighty rows won are 83.75 percent."""
    rows = [judgment(i, "x", "y", *["model_1" if i < 67 else "model_2"] * 2) for i in range(80)]
    out = succeeds("winrate", "--judgments", write_lines(tmp_path / "j.jsonl", rows))
    lines = out.splitlines()
    header = next(line for line in lines if "win rate " in line)
    row = next(line for line in lines if line.startswith("x against y"))
    assert "83.75" in row and "16.25" in out
    for title, cell in (("win rate", "83.75"), ("wins", "67"), ("losses", "13")):
        end = header.index(title) + len(title)
        assert row[:end].endswith(cell)

def test_intervals_are_those_of_the_binomial_and_the_same_each_time(tmp_path):
    """400 prompts, 60% won: near 0.6 +- 1.96 sqrt(.6 .4 / 400)."""
    rows = [judgment(i, "x", "y", *["model_1" if i % 5 < 3 else "model_2"] * 2) for i in range(400)]
    path = write_lines(tmp_path / "many.jsonl", rows)
    out = succeeds("winrate", "--judgments", path)
    assert out == succeeds("winrate", "--judgments", path)
    half = 196 * math.sqrt(0.6 * 0.4 / 400)
    expected = [60, 60 - half, 60 + half]
    assert line_of("x against y", out)[:3] == pytest.approx(expected, abs=0.6)
    # two turns of a question go together: twice the rows, no more certainty
    both = write_lines(tmp_path / "turns.jsonl", rows + [row | dict(turn=2) for row in rows])
    out_of_both = succeeds("winrate", "--judgments", both)
    assert line_of("x against y", out_of_both)[:3] == line_of("x against y", out)[:3]

def test_equal_questions_of_two_files_are_two_prompts(tmp_path):
    for name in ("a", "b"):
        write_lines(tmp_path / name, [judgment(1, "x", "y", "tie", "tie")])
    out = succeeds("winrate", "--judgments", tmp_path / "a", tmp_path / "b")
    assert line_of("x against y", out)[-1] == 2

def test_outputs_beside_judgments_show_their_lengths(tmp_path):
    x = outputs(tmp_path / "x.json", "x", ["four", "six666"])
    path = write_lines(tmp_path / "j.jsonl", [judgment(1, "x", "y", "tie", "tie")])
    assert line_of("x", succeeds("winrate", x, "--judgments", path))[-1] == 5

# ------------------------------------------------------------------------------------------------
# judges that score

@pytest.fixture
def three(tmp_path):
    """Files of x, with rewards 1, 0, -0.5 (no sentence), 0; of y, 0, 1, -0.5, 0; of z, all bad."""
    said = dict(
        x=["tomato and radish .", "cherry and milk .", "cherry radish", "tomato and cod ."],
        y=["tomato and cod .", "cherry and radish .", "tomato radish", "tomato and cod ."],
        z=["cod cod cod"] * 4,
    )
    return [outputs(tmp_path / f"{name}.json", name, said[name]) for name in said]

def test_gold_judges_by_the_exact_reward(three, tmp_path):
    out = succeeds("winrate", *three[:2], "--judge", "gold")
    rows = read_lines(tmp_path / "judgments_gold.jsonl")
    winners = ["model_1", "model_2", "tie", "tie"]
    assert [(row["g1_winner"], row["g2_winner"]) for row in rows] == list(zip(winners, winners))
    assert [row["question_id"] for row in rows] == [1, 2, 3, 4]
    # FastChat's own loader makes a tuple of two of it
    assert rows[0]["judge"] == ["gold", "pair"] and rows[0]["turn"] == 1
    assert line_of("x against y", out)[0] == 50
    assert line_of("x", out)[-1] == 16

def test_a_killed_judging_run_goes_on_with_the_half_line(three, tmp_path):
    path = tmp_path / "judgments_gold.jsonl"
    succeeds("winrate", *three[:2], "--judge", "gold")
    before = path.read_text().splitlines(keepends=True)
    path.write_text("".join(before[:2]) + before[2][:30])
    # the order of the files plays no part
    succeeds("winrate", three[1], three[0], "--judge", "gold")
    after = path.read_text().splitlines(keepends=True)
    assert after[:2] == before[:2] and len(after) == 4
    assert json.loads(after[2])["tstamp"] > json.loads(before[2])["tstamp"]

def test_a_further_model_adds_its_rows_and_changed_answers_are_refused(three, tmp_path):
    path = tmp_path / "judgments_gold.jsonl"
    succeeds("winrate", *three[:2], "--judge", "gold")
    before = path.read_text()
    succeeds("winrate", *three, "--judge", "gold")
    assert path.read_text().startswith(before) and len(read_lines(path)) == 12
    outputs(three[0], "x", ["changed"] * 4)
    before = path.read_text()
    assert "other answers" in refused("winrate", *three, "--judge", "gold")
    assert path.read_text() == before

def test_a_recount_of_the_judgments_prints_the_same_tables(three, tmp_path):
    out = succeeds("winrate", *three, "--judge", "gold")
    again = succeeds("winrate", *three, "--judgments", tmp_path / "judgments_gold.jsonl")
    assert out == again

def test_intervals_do_not_depend_on_how_questions_are_named():
    """A recount names them by file and number: 10 must not move among them."""
    points = {i: [math.sin(i) ** 2] for i in range(40)}
    named = {f"judgments.jsonl {i}": value for i, value in points.items()}
    assert evaluation.bootstrap(points) == evaluation.bootstrap(named)

def test_one_game_a_prompt_in_an_order_that_the_seed_draws(three, tmp_path):
    prompts = [f"name two red foods except {item}" for item in ("tomato", "cod") for _ in range(20)]
    x = outputs(tmp_path / "x.json", "x", ["cherry and radish ."] * 40, prompts)
    y = outputs(tmp_path / "y.json", "y", ["cod ."] * 40, prompts)
    for seed in (0, 1):
        path = tmp_path / f"j{seed}.jsonl"
        flags = "--judge", "gold", "--games", 1, "--seed", seed, "--out", path
        assert line_of("x against y", succeeds("winrate", x, y, *flags))[3] == 40
    first = [[row["first"] for row in read_lines(tmp_path / f"j{seed}.jsonl")] for seed in (0, 1)]
    assert 10 < first[0].count("model_1") < 30 and first[0] != first[1]
    for row in read_lines(path):
        # one game was played, and its winner stands in both places
        played = "g1_judgment" if row["first"] == "model_1" else "g2_judgment"
        assert {"g1_judgment", "g2_judgment"} & row.keys() == {played}
        assert row["g1_winner"] == row["g2_winner"] == "model_1"

def test_an_answer_that_is_missing_is_an_error_and_no_loss(three, tmp_path):
    outputs(three[1], "y", ["", "cherry and radish .", "", "cod ."], error="HTTP 400 too long")
    succeeds_not = refused("winrate", *three[:2], "--judge", "gold")
    assert "HTTP 400 too long" in succeeds_not

def test_a_reward_that_is_no_number_is_an_error_and_no_tie():
    expected = {(math.nan, math.nan): "error", (1.0, math.nan): "error"}
    expected |= {(2.0, 2.0): "tie", (2.0, 1.0): "A", (1.0, 2.0): "B"}
    for (a, b), verdict in expected.items():
        assert evaluation.judge_by_score(None, dict(score=a), dict(score=b))[0] == verdict

@pytest.fixture(scope="module")
def reward_model(toy, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(3)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    ids = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    model = LlamaForSequenceClassification(LlamaConfig(num_labels=1, **sizes, **ids))
    with torch.no_grad():
        # apart beyond the rounding of bfloat16
        model.score.weight *= 50
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

def test_a_reward_model_without_its_head_is_refused(reward_model, three, tmp_path):
    """transformers would draw the head at random, and judge by it."""
    headless = shutil.copytree(reward_model, tmp_path / "headless")
    weights = load_file(headless / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, headless / "model.safetensors", metadata={"format": "pt"})
    said = refused("winrate", *three[:2], "--judge", f"reward:{headless}")
    assert "headless lacks weights" in said and "score.weight" in said

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reward_model_judges_the_conversation_in_its_template(
    reward_model, tokenizer, three, tmp_path, dtype
):
    flags = "--judge", f"reward:{reward_model}", "--dtype", dtype
    succeeds("winrate", *three[:2], *flags)
    kind = getattr(torch, dtype)
    model = LlamaForSequenceClassification.from_pretrained(reward_model, dtype=kind).eval()
    answers = [json.loads(path.read_text()) for path in three[:2]]
    rows = read_lines(tmp_path / "judgments_reward.jsonl")
    for row, *pair in zip(rows, *answers, strict=True):
        scores = []
        for answer in pair:
            text = f"<s><|user|> {answer['instruction']} <|assistant|> {answer['output']}</s>"
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
            scores.append(model(**ids).logits.item())
        winner = "model_1" if scores[0] > scores[1] else "model_2"
        winner = "tie" if scores[0] == scores[1] else winner
        assert (row["g1_winner"], row["g2_winner"]) == (winner, winner)
        assert numbers(row["g1_judgment"]) == pytest.approx(scores, abs=2e-4)
    assert len({row["g1_winner"] for row in rows}) > 1

# ------------------------------------------------------------------------------------------------
# chat servers: a small stand-in on the loopback address

KEY = "sk-SECRETKEY123-abcdefghijklmnopqrstuvwxyz"

class StandIn(http.server.ThreadingHTTPServer):
    """
    A chat server. reply(text of the last message, number of the request) -> the text of an answer,
    or (status, body, headers), or ("sleep", seconds, {}), or ("close", "", {}).
    """

    daemon_threads = True

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.requests, self.lock = reply, [], threading.Lock()
        self.address = f"chat:http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *_):
        """Clients that went away are no news."""

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request = dict(path=self.path, key=self.headers["Authorization"], body=body)
        with self.server.lock:
            self.server.requests.append(request | dict(time=time.time()))
            n = len(self.server.requests)
        answer = self.server.reply(body["messages"][-1]["content"], n)
        if isinstance(answer, str):
            choice = {"message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
            answer = 200, json.dumps({"choices": [choice]}), {}
        self.send(*answer)

    def send(self, status, text, headers):
        if status == "close":
            self.close_connection = True
            return self.connection.close()
        if status == "sleep":
            return time.sleep(text)
        self.send_response(status)
        for name, value in (headers | {"Content-Length": len(text.encode())}).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(text.encode())

@pytest.fixture
def serve():
    """serve(reply) starts a stand-in, which is gone after the test."""
    started = []

    def start(reply):
        started.append(StandIn(reply))
        return started[-1]

    yield start
    for server in started:
        server.shutdown()
        server.server_close()

@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """A server has one second to answer, and the second try comes after ten milliseconds."""
    monkeypatch.setattr(evaluation, "TIMEOUT", 1)
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

def honest(text, n):
    """Prefers an answer that says good to one that does not."""
    sides = re.findall(r"\[Answer .\]\n(.*?)\n\[End of answer .\]", text, re.DOTALL)
    good = ["good" in side for side in sides]
    verdict = "TIE" if good[0] == good[1] else "A" if good[0] else "B"
    return f"I looked at both.\n**Verdict: {verdict}**\n"

@pytest.fixture
def pair(tmp_path):
    """Files of 8 prompts: x is good, y is good, neither is, and again on a riddle; and so on."""
    prompts = [f"{'a riddle' if i % 4 == 3 else 'a request'} number {i}" for i in range(8)]
    x = outputs(tmp_path / "x.json", "x", ["good", "bad", "bad", "good"] * 2, prompts)
    y = outputs(tmp_path / "y.json", "y", ["bad", "good", "bad", "bad"] * 2, prompts)
    return x, y

VERDICTS = {
    "Reason.\nVERDICT: A": "A",
    "**Verdict: B**\n": "B",
    "verdict - tie.": "tie",
    "VERDICT: [[A]]": "A",
    "[[B]] is better": "B",
    "so it is [[C]]": "tie",
    "[[A]] and again [[A]]": "A",
    "[[A]] or [[B]]": "error",
    "VERDICT: A or VERDICT: B, who knows": "error",
    "VERDICT: A\nor not": "error",
    "A": "error",
}

@pytest.mark.parametrize("words", VERDICTS)
def test_verdicts_that_are_understood(words):
    assert evaluation.parse_verdict(words) == VERDICTS[words]

def test_both_orders_are_asked_and_a_game_without_a_verdict_is_no_tie(serve, pair, tmp_path):
    server = serve(lambda text, n: "who knows" if "riddle" in text else honest(text, n))
    flags = "--judge", server.address, "--judge_model", "j"
    out = succeeds("winrate", *pair, *flags, "--workers", 4)
    assert line_of("x against y", out)[0] == 50
    assert line_of("x against y", out)[3:] == [2, 2, 2, 2, 6]
    assert len(server.requests) == 16
    about_0 = []
    for request in server.requests:
        assert request["path"] == "/v1/chat/completions" and request["key"] == f"Bearer {KEY}"
        assert (request["body"]["model"], request["body"]["temperature"]) == ("j", 0)
        assert request["body"]["messages"][0]["content"] == evaluation.JUDGE
        about_0 += re.findall(r"(?s)number 0\n.*", request["body"]["messages"][1]["content"])
    assert sorted(text.index("good") < text.index("bad") for text in about_0) == [False, True]
    # all of it again: only the two rows without a verdict are asked again
    assert succeeds("winrate", *pair, *flags) == out
    assert len(server.requests) == 16 + 4

def test_a_judge_that_always_prefers_the_first_answer_ties_everything(serve, pair):
    server = serve(lambda text, n: "The first.\nVERDICT: A")
    # an address with a path stays as it is
    out = succeeds("winrate", *pair, "--judge", f"{server.address}/api/v2")
    assert line_of("x against y", out)[3:] == [0, 8, 0, 0, 8]
    assert server.requests[0]["path"] == "/api/v2/chat/completions"

def test_a_judges_prompt_and_parameters_are_the_users(serve, pair, tmp_path):
    server = serve(lambda text, n: "[[C]]")
    (tmp_path / "prompt.txt").write_text("Which one? End with [[A]], [[B]] or [[C]].\n")
    params = '{"max_tokens": null, "max_completion_tokens": 7, "temperature": 0.5}'
    flags = "--judge_prompt", tmp_path / "prompt.txt", "--judge_params", params
    out = succeeds("winrate", *pair, "--judge", server.address, *flags)
    assert line_of("x against y", out)[3:] == [0, 8, 0, 0, 8]
    body = server.requests[0]["body"]
    assert body["messages"][0]["content"] == "Which one? End with [[A]], [[B]] or [[C]]."
    assert body["max_completion_tokens"] == 7 and body["temperature"] == 0.5
    assert "max_tokens" not in body
    # judgments by another prompt or other parameters are not taken for these
    for other in (flags[:2], flags[2:]):
        assert "another judge" in refused("winrate", *pair, "--judge", server.address, *other)

def test_a_server_that_stumbles_is_asked_again(serve, pair):
    stumbles = [
        (503, '{"error": {"message": "Loading model"}}', {}),
        (429, "slow down", {"Retry-After": "0.3"}),
        (500, "oops", {}),
        ("sleep", 2, {}),
        ("close", "", {}),
        (200, "no gzip", {"Content-Encoding": "gzip"}),
    ]
    server = serve(lambda text, n: stumbles[n - 1] if n <= len(stumbles) else honest(text, n))
    out = succeeds("winrate", *pair, "--judge", server.address, "--workers", 1)
    assert line_of("x against y", out)[6] == 0
    assert len(server.requests) == len(stumbles) + 16
    # Retry-After was heeded
    assert server.requests[2]["time"] - server.requests[1]["time"] > 0.3

def test_a_judge_that_dies_leaves_what_it_said_and_the_same_command_goes_on(serve, pair, tmp_path):
    path = tmp_path / "judgments_chat.jsonl"
    flags = "--judge", serve(lambda text, n: honest(text, n) if n <= 6 else (401, "no", {})).address
    line = refused("winrate", *pair, *flags, "--judge_model", "j", "--workers", 1)
    kept = path.read_text()
    assert "HTTP 401 no" in line and str(path) in line
    # six answers are three rows
    assert len(kept.splitlines()) == 3
    server = serve(honest)
    succeeds("winrate", *pair, "--judge", server.address, "--judge_model", "j")
    assert path.read_text().startswith(kept) and len(server.requests) == 2 * 5

def test_a_server_whose_answers_are_errors_is_quoted(serve, pair):
    """A refusal of one request does not end the run; what all say stands in the closing line."""
    server = serve(lambda text, n: (200, '{"error": {"message": "out of credit"}}', {}))
    assert "out of credit" in refused("winrate", *pair, "--judge", server.address)
    server = serve(lambda text, n: (400, "context too long", {}))
    flags = "--judge", server.address, "--out", pair[0].parent / "other.jsonl"
    assert "HTTP 400 context too long" in refused("winrate", *pair, *flags)

@pytest.mark.parametrize("limit", [300, 700])
def test_the_key_is_masked_before_anything_is_cut(limit):
    """Wherever a cut falls, a key that was cut is no longer recognised."""
    for n in range(limit):
        assert KEY[:4] not in evaluation.shortened("x" * n + KEY + "y" * limit, limit)

@pytest.mark.parametrize("spelled", [r"sk-Ab3+/x\\y", r"sk-Ab3+\/x\\y", r"sk-Ab3\u002B\u002fx\\y"])
def test_the_key_is_masked_however_json_spells_it(monkeypatch, spelled):
    monkeypatch.setenv("OPENAI_API_KEY", r"sk-Ab3+/x\y")
    assert json.loads(f'"{spelled}"') == r"sk-Ab3+/x\y"
    assert evaluation.masked(f'{{"error": "Bearer {spelled}"}}') == '{"error": "Bearer ***"}'

@pytest.mark.parametrize("status", [400, 401, 200])
def test_a_server_that_repeats_the_header_does_not_print_the_key(serve, pair, tmp_path, status):
    """The cut at 300 letters falls into the key."""
    server = serve(lambda text, n: (status, "x" * 270 + f" key Bearer {KEY}" + "y" * 300, {}))
    code, out, err = run("winrate", *pair, "--judge", server.address)
    written = "".join(path.read_text() for path in tmp_path.glob("judgments*"))
    assert code == 2 and "xxx" in err
    for length in range(len(KEY), 9, -1):
        assert KEY[:length] not in out + err + written

def test_an_answer_that_repeats_the_key_is_kept_without_it(serve, pair, tmp_path):
    server = serve(lambda text, n: f"Your key is {KEY}.\n{honest(text, n)}")
    succeeds("winrate", *pair, "--judge", server.address)
    written = (tmp_path / "judgments_chat.jsonl").read_text()
    assert KEY not in written and "Your key is ***." in written

def test_a_word_in_place_of_a_key_is_not_masked(monkeypatch):
    """Local servers are given any key: EMPTY, or A, which would be a judge's verdict."""
    monkeypatch.setenv("OPENAI_API_KEY", "A")
    assert evaluation.masked("VERDICT: A") == "VERDICT: A"

def test_a_server_answers_in_place_of_a_model(serve, tmp_path):
    """Two turns, three samples, other seeds for each; the file is that of a local model."""
    server = serve(lambda text, n: f"answer to {text}")
    questions = [dict(question_id=i, category="math", turns=[f"q{i}", "why?"]) for i in range(4)]
    path = write_lines(tmp_path / "question.jsonl", questions)
    flags = "--prompts", path, "--n", 3, "--temperature", "mt_bench", "--max_new_tokens", 50
    out = tmp_path / "m.jsonl"
    flags += "--model", server.address, "--model_name", "big", "--out", out
    succeeds("generate", *flags, "--workers", 3)
    for i, row in enumerate(read_lines(out)):
        assert row["model_id"] == "m" and row["question_id"] == i
        assert [choice["turns"] for choice in row["choices"]] == [
            [f"answer to q{i}", "answer to why?"]
        ] * 3
    bodies = [request["body"] for request in server.requests]
    assert len(bodies) == 24
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in bodies} == {
        ("big", 0.0, 50)
    }
    # the samples of a prompt are drawn apart, the turns of a sample together
    assert len({body["seed"] for body in bodies}) == 12
    second = next(body for body in bodies if len(body["messages"]) == 3)
    assert second["messages"][1]["content"].startswith("answer to q")

def test_answers_of_a_server_that_fails_midway_are_kept(serve, tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [dict(instruction=f"q{i}") for i in range(5)])
    out = tmp_path / "o.json"
    flags = "generate", "--prompts", path, "--out", out, "--workers", 1, "--model"
    server = serve(lambda text, n: text.upper() if n <= 3 else ("close", "", {}))
    assert "goes on from there" in refused(*flags, server.address)
    assert not out.exists()
    asked = len(server.requests)
    server.reply = lambda text, n: text.upper()
    succeeds(*flags, server.address)
    assert texts(out) == ["Q0", "Q1", "Q2", "Q3", "Q4"]
    # three answers were kept
    assert len(server.requests) - asked == 2

def test_refused_requests_are_counted_and_asked_again(serve, tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [dict(instruction=f"q{i}") for i in range(3)])
    out = tmp_path / "o.json"
    server = serve(lambda text, n: (400, "not allowed", {}) if text == "q1" else text)
    flags = "generate", "--prompts", path, "--out", out, "--model", server.address
    printed = succeeds(*flags)
    assert "1 answers are missing" in printed and "not allowed" in printed
    rows = json.loads(out.read_text())
    assert [row["output"] for row in rows] == ["q0", "", "q2"]
    assert "not allowed" in rows[1]["error"] and not rows[1]["ended"]
    server.reply = lambda text, n: text
    succeeds(*flags)
    assert texts(out) == ["q0", "q1", "q2"] and len(server.requests) == 4

# ------------------------------------------------------------------------------------------------
# label

def samples(path, answers):
    """A file of generate: answers is {prompt: [text or (text, ended), ...]}."""
    rows = []
    for prompt, said in answers.items():
        for s, answer in enumerate(said):
            text, ended = answer if isinstance(answer, tuple) else (answer, True)
            row = dict(instruction=prompt, output=text, generator="m", sample=s, ended=ended)
            rows.append(row | dict(prompt=[ask_user(prompt)]))
    path.write_text(json.dumps(rows))
    return path

RED = "name two red foods except cherry"
GOOD, FAIR, POOR = "tomato and radish .", "tomato and cod .", "cod and shark ."

def test_the_best_answer_is_chosen_against_the_worst(tokenizer, tmp_path):
    path = samples(tmp_path / "o.json", {RED: [FAIR, POOR, GOOD, FAIR]})
    succeeds("label", path, "--judge", "gold", "--out", tmp_path / "new")
    (record,) = read_lines(tmp_path / "new" / "train.jsonl")
    assert record["prompt"] == [ask_user(RED)]
    assert (record["chosen"], record["rejected"]) == ([say(GOOD)], [say(POOR)])
    assert (record["reward_chosen"], record["reward_rejected"]) == (1, -1)
    # a dict is a pair that the trainer keeps, a text the reason why not
    assert isinstance(rpo.tokenize_pair(record, tokenizer), dict)

def test_prompts_that_make_no_pair_are_dropped_and_counted_by_reason(tmp_path):
    prompts = TOY_PROMPTS
    answers = {
        prompts[0]: [GOOD, POOR],
        prompts[1]: ["cherry and radish .", "radish and cherry ."],
        prompts[2]: [GOOD, GOOD],
        prompts[3]: [GOOD, (FAIR, False), ""],
    }
    out = tmp_path / "new"
    path = samples(tmp_path / "o.json", answers)
    printed = succeeds("label", path, "--judge", "gold", "--out", out)
    meta = json.loads((out / "meta.json").read_text())
    assert meta["dropped"] == {
        "tie": 1,
        "identical answers": 1,
        "fewer than two finished answers": 1,
    }
    assert meta["kept"]["train"] == 1 == len(read_lines(out / "train.jsonl"))
    assert "1 pairs" in printed

def many_pairs(tmp_path):
    """A good and a fair answer, whose rewards are 1 and 0, to 400 prompts that are alike."""
    rows = []
    for _ in range(400):
        for s, text in enumerate((GOOD, FAIR)):
            rows.append(dict(instruction=RED, output=text, generator="m", sample=s))
    path = tmp_path / "many.json"
    path.write_text(json.dumps(rows))
    return path

def test_the_coin_has_bradley_terry_odds_and_follows_from_the_seed(tmp_path):
    """sigmoid(3 x 1) = .953 of 400 labels, give or take four standard errors of .0106."""
    path = many_pairs(tmp_path)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        flags = "--judge", "gold", "--coin", "--seed", seed, "--out", tmp_path / name
        succeeds("label", path, *flags)
    labels = {}
    for name in "abc":
        records = read_lines(tmp_path / name / "train.jsonl")
        labels[name] = [record["reward_chosen"] > record["reward_rejected"] for record in records]
    assert labels["a"] == labels["b"] != labels["c"]
    assert np.mean(labels["a"]) == pytest.approx(0.953, abs=0.043)

def test_a_chat_judge_labels_only_where_both_orders_agree(serve, tmp_path):
    def reply(text, n):
        if "undecided" in text:
            return "VERDICT: A"
        if "strange" in text:
            return "no idea"
        return honest(text, n)

    answers = {"clear": ["bad", "good"], "undecided": ["bad", "good"], "strange": ["bad", "good"]}
    path = samples(tmp_path / "o.json", answers)
    server = serve(reply)
    flags = "--judge", server.address, "--judge_model", "j", "--out", tmp_path / "new"
    succeeds("label", path, *flags)
    (record,) = read_lines(tmp_path / "new" / "train.jsonl")
    assert record["chosen"] == [say("good")] and record["prompt"] == [ask_user("clear")]
    meta = json.loads((tmp_path / "new" / "meta.json").read_text())
    assert meta["dropped"] == {"no verdict": 1, "tie, or the two orders disagree": 1}
    # only what has no verdict is asked again
    assert len(server.requests) == 6
    succeeds("label", path, *flags)
    assert len(server.requests) == 8

def test_labels_of_a_server_that_fails_midway_are_kept(serve, tmp_path):
    path = samples(tmp_path / "o.json", {f"q{i}": ["good", "bad"] for i in range(4)})
    server = serve(lambda text, n: honest(text, n) if n <= 4 else (403, "no more", {}))
    flags = "label", path, "--judge_model", "j", "--out", tmp_path / "new", "--judge"
    assert "no more" in refused(*flags, server.address, "--workers", 1)
    assert not (tmp_path / "new" / "train.jsonl").exists()
    assert len(read_lines(tmp_path / "new" / "judgments.jsonl")) == 2
    server = serve(honest)
    succeeds(*flags, server.address)
    assert len(server.requests) == 4
    assert len(read_lines(tmp_path / "new" / "train.jsonl")) == 4

def test_raw_text_prompts_stay_raw_text(tmp_path):
    rows = []
    for s, text in enumerate((GOOD, POOR)):
        row = dict(instruction=RED, prompt=RED, output=text, generator="m", sample=s)
        rows.append(row)
    path = tmp_path / "o.json"
    path.write_text(json.dumps(rows))
    succeeds("label", path, "--judge", "gold", "--out", tmp_path / "new")
    (record,) = read_lines(tmp_path / "new" / "train.jsonl")
    assert (record["prompt"], record["chosen"], record["rejected"]) == (RED, GOOD, POOR)

def test_a_round_of_generate_and_label_makes_pairs_for_the_trainer(toy, tokenizer, tmp_path):
    out = tmp_path / "samples.json"
    flags = "--prompts", toy / "train.jsonl", "--n", 4, "--temperature", 1, "--out", out
    succeeds("generate", "--model", toy / "policy", *flags)
    succeeds("label", out, "--judge", "gold", "--coin", "--out", tmp_path / "round2")
    records = read_lines(tmp_path / "round2" / "train.jsonl")
    known = [record["prompt"] for record in read_lines(toy / "train.jsonl")]
    assert records and all(record["prompt"] in known for record in records)
    assert all(isinstance(rpo.tokenize_pair(record, tokenizer), dict) for record in records)

# ------------------------------------------------------------------------------------------------
# plot

@pytest.fixture
def runs(tmp_path):
    """dpo-s1 and dpo-s2, two seeds with gold and KL, and rpo-s1, without."""
    for name, shift, gold in (("dpo-s1", 0.0, 0.1), ("dpo-s2", -2.0, 0.3), ("rpo-s1", 5.0, None)):
        metrics = [dict(step=step, loss=1.0) for step in (1, 2)]
        for step in (0, 50, 100):
            row = {"step": step, "eval/logps/chosen_vs_ref": shift - step}
            metrics.append(row | {"eval/logps/chosen": shift - step - 20})
        write_lines(tmp_path / name / "metrics.jsonl", metrics)
        if gold:
            rows = [dict(step=step, gold=gold, kl=2 * step, model="m") for step in (0, 100)]
            write_lines(tmp_path / name / "prefs.jsonl", rows)
            train = [{"step": step, "train/logps/chosen": gold} for step in (0, 100)]
            write_lines(tmp_path / name / "prefs_train.jsonl", train)
    return [tmp_path / name for name in ("dpo-s1", "dpo-s2", "rpo-s1")]

def test_the_lines_are_means_over_seeds_with_a_band_of_one_sd(runs):
    settings = evaluation.group_runs(map(str, runs))
    figure = evaluation.draw(settings, ["eval/logps/chosen_vs_ref", "gold"])
    pairs, gold = figure.axes[:2]
    dpo, rpo_line = pairs.lines
    assert dpo.get_xydata().tolist() == [[0, -1], [50, -51], [100, -101]]
    assert rpo_line.get_xydata().tolist() == [[0, 5], [50, -45], [100, -95]]
    # apart by colour and by style
    assert dpo.get_color() != rpo_line.get_color()
    assert dpo.get_linestyle() != rpo_line.get_linestyle()
    heights = pairs.collections[0].get_paths()[0].vertices[:, 1]
    assert max(heights) == pytest.approx(-1 + math.sqrt(2))
    assert min(heights) == pytest.approx(-101 - math.sqrt(2))
    assert [line.get_ydata().tolist() for line in gold.lines] == [[0.2, 0.2]]

def test_the_legend_names_each_setting_once_and_hides_no_line(runs):
    settings = evaluation.group_runs(map(str, runs))
    figure = evaluation.draw(settings, ["eval/logps/chosen_vs_ref", "gold", "kl"])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["dpo", "rpo"]
    figure.draw_without_rendering()
    box = legend.get_window_extent()
    assert not any(box.overlaps(axis.get_tightbbox()) for axis in figure.axes)

def test_titles_are_words_and_text_is_legible_at_700_pixels(runs):
    figure = evaluation.draw(evaluation.group_runs(map(str, runs)), ["gold", "kl"])
    assert figure.axes[0].get_title() == "true reward of samples"
    # points become pixels at 700 / 72 / width
    sizes = [figure.axes[0].title.get_fontsize()]
    sizes += [label.get_fontsize() for label in figure.axes[0].get_xticklabels()]
    assert min(sizes) * 700 / 72 / figure.get_figwidth() > 10

def test_a_full_disk_costs_the_new_figure_not_the_old_one(runs, tmp_path, monkeypatch):
    """And leaves nothing half-written that would keep the disk full."""
    out = tmp_path / "figure.png"
    out.write_bytes(b"the old one")

    def savefig(self, path, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    assert f"{out} cannot be written: No space left" in refused("plot", *runs, "--out", out)
    assert out.read_bytes() == b"the old one"
    assert list(tmp_path.glob("figure*")) == [out]

def test_plot_writes_a_figure_and_the_last_values(runs, tmp_path):
    out = succeeds("plot", *runs, "--out", tmp_path / "new" / "figure.png")
    assert (tmp_path / "new" / "figure.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    rows = [line.split() for line in out.splitlines() if line.startswith(("dpo", "rpo"))]
    assert rows == [
        ["dpo", "2", "-121.00±1.41", "-101.00±1.41"],
        ["rpo", "1", "-115.00", "-95.00"],
        ["dpo", "2", "200.00±0.00", "0.20±0.14", "0.20±0.14"],
        ["rpo", "1", "-", "-", "-"]]
    assert max(len(line) for line in out.splitlines()) <= 120

def test_the_best_reward_is_each_runs_own_wherever_it_was(tmp_path, capsys):
    """Runs peak at steps of their own: the mean of 0.5 and 0.3, not the peak of the mean."""
    for name, gold in (("dpo-s1", [0.0, 0.5, 0.1]), ("dpo-s2", [0.3, 0.1, 0.2])):
        rows = [dict(step=step, gold=value) for step, value in enumerate(gold)]
        write_lines(tmp_path / name / "prefs.jsonl", rows)
    settings = evaluation.group_runs([f"{tmp_path}/dpo-s1", f"{tmp_path}/dpo-s2"])
    evaluation.print_ends(settings, {"gold"})
    assert capsys.readouterr().out.split()[-4:] == ["dpo", "2", "0.15±0.07", "0.40±0.14"]

def test_training_pairs_stand_beside_held_out_ones_with_absolute_log_probs(
    runs, tmp_path, monkeypatch
):
    drawn, real = [], evaluation.draw

    def record(settings, panels):
        drawn.extend(panels)
        return real(settings, panels)

    monkeypatch.setattr(evaluation, "draw", record)
    flags = "--metric", "chosen", "--split", "train", "test", "--out", tmp_path / "f.png"
    succeeds("plot", *runs[:2], *flags)
    assert drawn == ["train/logps/chosen", "eval/logps/chosen", "gold", "kl"]
    assert "prefs --split train" in refused("plot", runs[2], *flags)

def test_what_prefs_measured_wins_over_the_runs_own_rows(tmp_path):
    name = "eval/logps/chosen_vs_ref"
    write_lines(tmp_path / "r" / "metrics.jsonl", [{"step": 0, name: 1.0}, {"step": 5, name: 2.0}])
    write_lines(tmp_path / "r" / "prefs.jsonl", [{"step": 5, name: 3.0}])
    assert evaluation.load_curves(tmp_path / "r")[name] == {0: 1.0, 5: 3.0}

def test_a_run_is_known_by_its_whole_path_where_names_are_alike(tmp_path):
    for name, value in (("a/dpo", 0), ("b/dpo", -10)):
        rows = [{"step": 0, "eval/logps/chosen_vs_ref": value}]
        write_lines(tmp_path / name / "metrics.jsonl", rows)
    settings = evaluation.group_runs([f"{tmp_path}/a/dpo", f"{tmp_path}/b/dpo"])
    assert list(settings) == [f"{tmp_path}/a/dpo", f"{tmp_path}/b/dpo"]

def test_brackets_in_the_name_of_a_run_are_no_pattern(tmp_path):
    for step in (1, 2):
        folder = tmp_path / "run[1]" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        state = dict(step=step, options=dict(model="reference"))
        (folder / "trainer_state.json").write_text(json.dumps(state))
    found = evaluation.checkpoints(f"{tmp_path}/run[1]", "reference")
    assert [step for _, step, _ in found] == [0, 1, 2]

# ------------------------------------------------------------------------------------------------
# the command line, and what goes wrong

@pytest.mark.parametrize("command", ["prefs", "generate", "winrate", "label", "plot"])
def test_help_is_readable_and_nothing_is_abbreviated(command):
    out = succeeds(command, "--help")
    assert max(len(line) for line in out.splitlines()) <= 100
    for flag in re.split(r"\n  --", out)[1:]:
        assert flag.count("default") <= 1
    assert "--help explains the flags" in refused(command, "--ou", "x")

def test_help_shows_a_percent_sign_once():
    for command in ([], ["winrate"]):
        assert "with 95% intervals" in " ".join(succeeds(*command, "--help").split())

def test_the_traceback_is_there_for_who_wants_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RPO_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        evaluation.run(["winrate", "--judgments", str(tmp_path / "none")])

def change_weights(toy, folder, change):
    """A copy of the toy's model with other weights."""
    model = AutoModelForCausalLM.from_pretrained(toy / "model")
    change(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(toy / "model").save_pretrained(folder)

def spoil(model):
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan

def shrink(model):
    model.resize_token_embeddings(60)

@pytest.fixture(scope="module")
def broken(toy, tokenizer, tmp_path_factory):
    """Models, runs and data with faults, each in a folder that is named after it."""
    folder = tmp_path_factory.mktemp("broken")
    change_weights(toy, folder / "nan", spoil)
    change_weights(toy, folder / "small_vocabulary", shrink)
    shutil.copytree(toy / "model", folder / "other_vocabulary")
    words = (folder / "other_vocabulary" / "tokenizer.json").read_text()
    words = words.replace('"cod"', '"?"').replace('"crab"', '"cod"').replace('"?"', '"crab"')
    (folder / "other_vocabulary" / "tokenizer.json").write_text(words)
    sizes = dict(n_positions=16, n_embd=8, n_layer=1, n_head=1, vocab_size=len(tokenizer))
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(folder / "short")
    tokenizer.save_pretrained(folder / "short")

    write_lines(folder / "run" / "metrics.jsonl", [dict(step=1, loss=1.0)])
    shutil.copytree(toy / "run" / "final", folder / "damaged" / "final")
    (folder / "damaged" / "final" / "trainer_state.json").write_text('{"step": 4, "opt')
    # a data folder that says toy and is not
    records = [dict(prompt=[ask_user("name hi")], chosen=[say("cod .")], rejected=[say("crab .")])]
    write_lines(folder / "foreign" / "test.jsonl", records * 2)
    (folder / "foreign" / "meta.json").write_text('{"source": "toy"}')
    (folder / "afile").write_text("a file")
    return folder

def reply_of_faults(text, n):
    """What the stand-in says depends on the prompt."""
    if "busy" in text:
        return 500, "always busy", {}
    return 404, "no such model", {}

LINE = '{"instruction": "hi", "output": "x", "generator": "a"}\n'
OTHER = '{"instruction": "hi", "output": "x", "generator": "b"}\n'
MODEL = "generate --model TOY/model --out o.json --prompts p.jsonl"
GAME = '{"question_id": 1, "model_1": "a", "model_2": "b", "g1_winner": "tie", "g2_winner": "tie"}'
COUNT = "winrate --judgments p.jsonl"
PREFS = "prefs --ref_model TOY/model --data TOY --model"
PLAY = "winrate p.jsonl q.jsonl --judge"
ASK = "winrate q.jsonl r.jsonl --judge SERVER"
TWO = """\
{"instruction": "hi", "output": "x", "generator": "a", "sample": 0}
{"instruction": "hi", "output": "y", "generator": "a", "sample": 1}
"""
TIED = """\
{"instruction": "name two red foods", "output": "crab .", "generator": "a", "sample": 0}
{"instruction": "name two red foods", "output": "cod .", "generator": "a", "sample": 1}
"""

# (what is wrong, p.jsonl, command, words of the one line)
FAULTS = [
    ("turns are a text", '{"question_id": 1, "turns": "hello"}', MODEL, "line 1: turns must be"),
    ("turns are numbers", '{"question_id": 1, "turns": [3]}', MODEL, "line 1: turns must be"),
    ("a prompt is a number", '{"prompt": 5}', MODEL, "line 1 has no prompt"),
    ("a prompt of other keys", '{"prompt": [{"from": "x"}]}', MODEL, "line 1 has no prompt"),
    ("no prompt at all", LINE + '{"text": "hi"}', MODEL, "line 2 has no prompt"),
    ("a question's id is a list", '{"question_id": [1], "turns": ["a"]}', MODEL, "question_id [1]"),
    ("questions and prompts", LINE + '{"question_id": 1, "turns": ["a"]}', MODEL, "mixes FastChat"),
    ("no JSON", LINE + "{", MODEL, "p.jsonl line 2 is no JSON"),
    ("absurd nesting", "{}\n" + '{"a":' + "[" * 100_000, MODEL, "p.jsonl line 2 is no JSON"),
    ("no objects", '["a", "b"]', MODEL, "item 1 is no JSON object but 'a'"),
    ("an empty file", "\n\n", MODEL, "p.jsonl is empty"),
    ("a file that is not there", LINE, MODEL.replace("p.jsonl", "none"), "none"),
    ("no prompts named", LINE, "generate --model TOY/model --out o.json", "--data and --prompts"),
    ("out is a folder", LINE, MODEL.replace("o.json", "."), "is a folder"),
    ("out below a file", LINE, MODEL.replace("o.json", "BROKEN/afile/o"), "cannot be written"),
    ("a huge seed", LINE, MODEL + " --seed 99999999999999999999", "is not between 0 and"),
    ("no samples", LINE, MODEL + " --n 0", "0 is not between 1 and"),
    ("temperature -1", LINE, MODEL + " --temperature -1", "-1 is not between 0 and"),
    ("top_p 2", LINE, MODEL + " --top_p 2", "2 is not between 0 and 1"),
    ("a word for a number", LINE, MODEL + " --batch_size many", "invalid int value: 'many'"),
    ("no such model", LINE, MODEL.replace("TOY/model", "TOY/none"), "there is no folder"),
    ("weights nan", LINE, MODEL.replace("TOY/model", "BROKEN/nan"), "norm.weight holds nan"),
    (
        "embeddings too few",
        LINE,
        MODEL.replace("TOY/model", "BROKEN/small_vocabulary"),
        "embeds 60 tokens, its tokenizer has",
    ),
    (
        "too few positions",
        LINE,
        MODEL.replace("TOY/model", "BROKEN/short") + " --max_new_tokens 30",
        "lower --max_new_tokens",
    ),
    ("a server without an address", LINE, MODEL.replace("TOY/model", "chat:host"), "no address"),
    ("a server that fails", LINE, MODEL.replace("TOY/model", "SERVER"), "HTTP 404 no such model"),
    (
        "a server that is busy",
        LINE.replace("hi", "busy"),
        MODEL.replace("TOY/model", "SERVER"),
        "HTTP 500 always busy",
    ),
    (
        "no server",
        LINE,
        MODEL.replace("TOY/model", "chat:http://127.0.0.1:9"),
        "http://127.0.0.1:9/v1/: Connection error",
    ),
    ("prefs: weights nan", LINE, f"{PREFS} BROKEN/nan", "holds nan or inf"),
    ("prefs: another vocabulary", LINE, f"{PREFS} BROKEN/other_vocabulary", "another vocabulary"),
    ("prefs: a run without a model", LINE, f"{PREFS} BROKEN/run", "has no checkpoint"),
    ("prefs: a damaged state", LINE, f"{PREFS} BROKEN/damaged", "final/trainer_state.json"),
    ("prefs: no pairs", LINE, f"{PREFS} TOY/model --data BROKEN", "there is no file"),
    (
        "prefs: a foreign prompt",
        LINE,
        f"{PREFS} TOY/policy --data BROKEN/foreign",
        "not a prompt of the toy world: 'name hi'",
    ),
    ("a verdict named draw", GAME.replace('"tie"}', '"draw"}'), COUNT, "g2_winner is 'draw', none"),
    ("a judgment without winners", GAME + '\n{"question_id": 1}', COUNT, "line 2: g1_winner is"),
    ("question_id is a list", GAME.replace("1, ", "[1], ", 1), COUNT, "question_id is [1]"),
    ("a model null", GAME.replace('"b"', "null"), COUNT, "model_2 is no text but None"),
    ("self-play", GAME.replace('"b"', '"a"'), COUNT, "a plays against itself"),
    ("errors alone", GAME.replace('"tie"', '"error"'), COUNT, "says 'nothing'"),
    ("errors alone, the second game's",
     GAME.replace('"tie"', '"error"').replace("}", ', "g2_judgment": "I pass"}'),
     COUNT, "says 'I pass'"),
    ("generator is a list", LINE.replace('"a"', '["a"]'), f"{PLAY} gold", "generator is no text"),
    ("sample is a list", TWO.replace("0", "[]"), f"{PLAY} gold", "sample is no number but '[]'"),
    ("output is a number", LINE.replace('"x"', "4"), f"{PLAY} gold", "output is no text but '4'"),
    ("answers of two models", LINE + OTHER, f"{PLAY} gold", "several models: a, b"),
    ("one model twice", OTHER, f"{PLAY} gold", "a second file of the model b"),
    ("other prompts", LINE.replace("hi", "ho"), f"{PLAY} gold", "((1, 0), 'ho'), ((1, 0), 'hi')"),
    ("more prompts", LINE + LINE, f"{PLAY} gold", "((2, 0), 'hi'), None"),
    ("one file", LINE, "winrate p.jsonl --judge gold", "two models or more"),
    ("no judge", LINE, "winrate p.jsonl q.jsonl", "winrate needs one of --judge"),
    ("two judges", GAME, f"{COUNT} --judge gold", "winrate needs one of --judge"),
    ("half a judge", LINE, f"{PLAY} reward:", "is none of gold, reward:HF_MODEL"),
    ("an unknown judge", LINE, f"{PLAY} golden", "is none of gold, reward:HF_MODEL"),
    ("a judge's address", LINE, f"{PLAY} chat:localhost:8000", "is no address"),
    ("no reward model", LINE, f"{PLAY} reward:TOY/model", "no reward model: 2 outputs, not 1"),
    ("gold in another world", LINE, f"{PLAY} gold", "not a prompt of the toy world: 'hi'"),
    ("an empty judge's prompt", "", f"{ASK} --judge_prompt p.jsonl", "p.jsonl is empty"),
    ("parameters no object", LINE, f"{ASK} --judge_params 3", "invalid json_object value: '3'"),
    ("out holds answers", LINE, f"{PLAY} gold --out p.jsonl", "something else than judgments"),
    ("out holds text", LINE, f"{PLAY} gold --out BROKEN/afile", "something else than judgments"),
    ("label: one answer", LINE, "label p.jsonl --judge gold --out new", "needs generate --n 2"),
    ("label: other pairs", TWO, "label p.jsonl --judge gold --out TOY", "holds other pairs"),
    (
        "label: no answers",
        TWO.replace('"x"', '""').replace('"y"', '" "'),
        "label p.jsonl --judge gold --out new",
        "makes no pair, dropped: {'fewer than two finished answers': 1}",
    ),
    (
        "label: all ties",
        TIED,
        "label p.jsonl --judge gold --out new",
        "makes no pair, dropped: {'tie': 1}",
    ),
    ("label: a failing server", TWO, "label p.jsonl --judge SERVER --out new", "HTTP 404"),
    ("label: coin and chat", TWO, "label p.jsonl --judge SERVER --coin --out new", "--coin needs"),
    ("plot: no run", LINE, "plot BROKEN/none --out f.png", "none is no folder of a run"),
    ("plot: one run of two", LINE, "plot TOY/run BROKEN/none --out f.png", "none is no folder of a run"),
    ("plot: no such kind", LINE, "plot TOY/run --out f.bmp", "is no .png, .pdf or .svg"),
    ("plot: out below a file", LINE, "plot TOY/run --out BROKEN/afile/f.png", "cannot be written"),
]

@pytest.mark.parametrize("fault", FAULTS, ids=[fault[0] for fault in FAULTS])
def test_bad_input_ends_in_one_line_and_exit_code_2(
    fault, toy, broken, serve, tmp_path, monkeypatch
):
    _, content, command, words = fault
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text(content)
    Path("q.jsonl").write_text(OTHER)
    Path("r.jsonl").write_text(LINE)
    server = serve(reply_of_faults).address
    for name, value in (("TOY", toy), ("BROKEN", broken), ("SERVER", server)):
        command = command.replace(name, str(value))
    before = {path: path.read_bytes() for path in Path(".").glob("*")}
    assert words in refused(*command.split())
    # nothing is lost, and nothing stands there half-written
    assert {path: path.read_bytes() for path in before} == before
    assert not list(Path(".").glob("**/*.tmp")) and not Path("o.json").exists()
