"""
Bad input to rpo.py: each fault ends in one line that says what and where, and in exit code 2; what
was there before is there afterwards, to the byte. And no file that it is given runs code.
"""
import ast
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForSequenceClassification,
    T5Config, T5ForConditionalGeneration)

import rpo
from conftest import (
    ROOT, command, contents, copy_data, read_rows, refused, run, run_script, save_model, tiny_llama,
    word_tokenizer, write_jsonl)

# ------------------------------------------------------------------------------------------------
# how a fault is made: functions of (world, folder) -> flags of the run

GOOD = json.dumps({"prompt": "w10 ", "chosen": "w11", "rejected": "w12"}) + "\n"

def flags(*words):
    def make(world, folder):
        return words

    return make

def data(text):
    """A data folder whose train.jsonl is this text, or bytes; None: there is none."""
    def make(world, folder):
        path = folder / "data/train.jsonl"
        path.parent.mkdir()
        if isinstance(text, str):
            path.write_text(text)
        elif text is not None:
            path.write_bytes(text)
        return "--data", path.parent

    return make

def line(**changes):
    """A train.jsonl with a good line and one in which this is changed; None takes a key away."""
    record = json.loads(GOOD) | changes
    record = {key: value for key, value in record.items() if value is not None}
    return data(GOOD + json.dumps(record) + "\n")

def model(damage, flag="--model"):
    """A copy of the world's model, damaged."""
    def make(world, folder):
        path = shutil.copytree(world.model, folder / "model")
        damage(path)
        return flag, path

    return make

def checkpoint(damage):
    """--resume of a run whose newest of two checkpoints is damaged."""
    def make(world, folder):
        shutil.copytree(world.begun, folder / "run")
        damage(folder / "run/step_000004")
        return ("--resume",)

    return make

def out_dir(name):
    """Beside a file named file, and a folder whose metrics.jsonl is a folder."""
    def make(world, folder):
        (folder / "file").write_text("a file")
        (folder / "odd/metrics.jsonl").mkdir(parents=True)
        # an absolute name stays as it is
        return "--out_dir", folder / name if name else ""

    return make

def data_is_a_folder(world, folder):
    (folder / "data/train.jsonl").mkdir(parents=True)
    return "--data", folder / "data"

# ------------------------------------------------------------------------------------------------
# damages of a folder

def cut(name, size):
    def damage(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[:size])

    return damage

def without(name):
    def damage(folder):
        (folder / name).unlink()

    return damage

def text(name, replacement):
    def damage(folder):
        (folder / name).write_text(replacement)

    return damage

def without_norms(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    kept = {name: tensor for name, tensor in tensors.items() if "norm" not in name}
    save_file(kept, path, {"format": "pt"})

def one_weight(value):
    def damage(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        tensors["model.norm.weight"][3] = value
        save_file(tensors, path, {"format": "pt"})

    return damage

def double_bos(folder):
    path = folder / "chat_template.jinja"
    path.write_text("<s>" + path.read_text())

def swapped_words(folder):
    path = folder / "tokenizer.json"
    words = path.read_text().replace('"w17"', '"x"').replace('"w18"', '"w17"')
    path.write_text(words.replace('"x"', '"w18"'))

def instead(make):
    """Another model in the folder, with the same tokenizer."""
    def damage(folder):
        shutil.rmtree(folder)
        make().save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)

    return damage

def few_embeddings():
    return tiny_llama(vocab_size=20)

def few_positions():
    sizes = dict(vocab_size=48, n_embd=32, n_layer=1, n_head=4, n_positions=16)
    return GPT2LMHeadModel(GPT2Config(**sizes))

def classifier():
    return LlamaForSequenceClassification(tiny_llama().config)

def encoder_and_decoder():
    sizes = dict(vocab_size=48, d_model=32, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(T5Config(**sizes))

def soft_capped():
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2))

class Code:
    """What a pickle runs when it is loaded: it leaves a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)

def pickled_code(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Code(str(folder / "this ran"))}, folder / "pytorch_model.bin")

def own_code(folder):
    """A model that brings its code, which would leave a file."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "own"}
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    path.write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(folder / 'this ran')!r}, 'w')\n")

# ------------------------------------------------------------------------------------------------
# the table: how a fault is made, and what its line must contain; FOLDER is the test's own folder

USER = {"role": "user", "content": "w10"}
NORM = "layernorm.weight"
NEWEST = "FOLDER/run/step_000004"
DELETE = "delete it if damaged: " + NEWEST
FAULTS = {
    # data
    "no train.jsonl": (data(None), ["FOLDER/data/train.jsonl"]),
    "no data folder": (flags("--data", "nowhere"), ["no folder nowhere", "prepare_data.py"]),
    "train.jsonl is a folder": (data_is_a_folder, ["FOLDER/data/train.jsonl"]),
    "empty": (data(""), ["FOLDER/data"]),
    "blank lines alone": (data("\n\n"), ["FOLDER/data/train.jsonl", "no pair"]),
    "a torn line": (data(GOOD + GOOD[:30] + "\n"), ["FOLDER/data/train.jsonl line 2", "JSON"]),
    "latin-1": (data(GOOD.replace("w11", "caf\xe9").encode("latin-1")), ["train.jsonl line 1", "UTF-8"]),
    "a byte order mark": (data(b"\xef\xbb\xbf" + GOOD.encode()), ["train.jsonl line 1", "BOM"]),
    "no rejected": (line(rejected=None), ["train.jsonl line 2", "rejected"]),
    "no prompt": (line(prompt=None), ["train.jsonl line 2", "prompt"]),
    "a list": (data(GOOD + "[1, 2]\n"), ["train.jsonl line 2"]),
    "null": (data(GOOD + "null\n"), ["train.jsonl line 2"]),
    "a number": (line(chosen=3), ["train.jsonl line 2"]),
    "messages and text": (line(prompt=[USER]), ["train.jsonl line 2"]),
    "text and messages": (line(chosen=[USER]), ["train.jsonl line 2"]),
    "half a letter": (line(chosen="\ud83d"), ["train.jsonl line 2"]),
    "100,000 brackets": (data(GOOD + "[" * 100_000 + "\n"), ["train.jsonl line 2", "Recursion"]),
    "empty responses": (data(GOOD.replace("w11", "")), ["FOLDER/data/train.jsonl", "no pair"]),
    "identical responses": (data(GOOD.replace("w11", "w12")), ["train.jsonl", "no pair"]),
    # models
    "no such model": (flags("--model", "/nowhere/model"), ["/nowhere/model"]),
    "no such folder, or hub": (flags("--model", "no/model"), ["model no/model"]),
    "no model": (flags("--model", ""), ["''"]),
    "weights cut": (model(cut("model.safetensors", 1000)), ["FOLDER/model"]),
    "no weights": (model(without("model.safetensors")), ["FOLDER/model", "model.safetensors"]),
    "norms missing": (model(without_norms), ["FOLDER/model", NORM]),
    "reference's norms missing": (model(without_norms, "--ref_model"), ["FOLDER/model", NORM]),
    "a weight is nan": (model(one_weight(math.nan)), ["nan", "weights"]),
    "a weight is inf": (model(one_weight(math.inf)), ["nan", "weights"]),
    "reference's weight is nan": (model(one_weight(math.nan), "--ref_model"), ["nan", "weights"]),
    "no chat template": (model(without("chat_template.jinja")), ["chat_template is not set"]),
    "a broken template": (model(text("chat_template.jinja", "{% for %}")), ["TemplateSyntaxError"]),
    "two BOS tokens": (model(double_bos), ["train.jsonl", "no pair"]),
    "another vocabulary": (model(swapped_words, "--ref_model"), ["another vocabulary"]),
    "fewer embeddings than words": (model(instead(few_embeddings)), ["index out of range"]),
    "rows longer than positions": (model(instead(few_positions)), ["index out of range"]),
    "a classifier": (model(instead(classifier)), ["FOLDER/model", "lm_head.weight"]),
    "an encoder": (model(instead(encoder_and_decoder)), ["T5Config"]),
    "a soft cap": (model(instead(soft_capped)), ["FOLDER/model", "soft_cap.diff"]),
    "code in a pickle": (model(pickled_code), ["Weights only load failed"]),
    "code beside the model": (model(own_code), ["FOLDER/model", "custom code"]),
    # flags
    "an abbreviation": (flags("--bet", 0.2), ["--bet"]),
    "a word for a number": (flags("--beta", "large"), ["--beta", "large"]),
    "a form that is none": (flags("--sft", "average"), ["--sft", "average"]),
    "a dtype that is none": (flags("--dtype", "float16"), ["--dtype", "float16"]),
    "no loss": (flags("--beta", 0), ["--beta 0"]),
    "warmup_ratio 5": (flags("--warmup_ratio", 5), ["warmup_ratio"]),
    "batch_size 0": (flags("--batch_size", 0), ["batch_size"]),
    "epochs 0": (flags("--epochs", 0), ["epochs"]),
    "max_prompt_length 0": (flags("--max_prompt_length", 0), ["max_prompt_length"]),
    "max_length 0": (flags("--max_length", 0), ["train.jsonl", "no pair"]),
    "max_steps -1": (flags("--max_steps", -1), ["max_steps"]),
    "grad_clip 0": (flags("--grad_clip", 0), ["grad_clip"]),
    "learning_rate -0.001": (flags("--learning_rate", -1e-3), ["learning_rate"]),
    "weight_decay -1": (flags("--weight_decay", -1), ["weight_decay"]),
    "beta -1": (flags("--beta", -1), ["beta"]),
    "eta nan": (flags("--eta", "nan"), ["eta", "nan"]),
    "a seed of 20 digits": (flags("--seed", 10**19), ["verflow"]),
    # folders
    "out_dir is empty": (out_dir(""), ["No such file or directory: ''"]),
    "out_dir is a file": (out_dir("file"), ["FOLDER/file"]),
    "out_dir in a file": (out_dir("file/run"), ["FOLDER/file/run"]),
    "out_dir where none can be": (out_dir("/proc/run"), ["/proc/run"]),
    "metrics.jsonl is a folder": (out_dir("odd"), ["FOLDER/odd/metrics.jsonl"]),
    # checkpoints
    "state cut": (checkpoint(cut("trainer_state.json", 50)), [DELETE]),
    "state empty": (checkpoint(cut("trainer_state.json", 0)), [DELETE]),
    "state of nothing": (checkpoint(text("trainer_state.json", "{}")), [DELETE]),
    "no state": (checkpoint(without("trainer_state.json")), [DELETE]),
    "no moments": (checkpoint(without("optimizer.safetensors")), [DELETE]),
    "moments cut": (checkpoint(cut("optimizer.safetensors", 5000)), [DELETE]),
    "saved weights cut": (checkpoint(cut("model.safetensors", 5000)), [DELETE]),
    "no saved weights": (checkpoint(without("model.safetensors")), [DELETE]),
    "no saved config": (checkpoint(without("config.json")), [DELETE]),
    "saved norms missing": (checkpoint(without_norms), [DELETE, NORM]),
    "a saved weight is nan": (checkpoint(one_weight(math.nan)), [DELETE, "nan"]),
}

@pytest.fixture(scope="module")
def world_with_a_run(world, tmp_path_factory):
    """The world, and a run of four steps with checkpoints of steps 2 and 4."""
    world.begun = tmp_path_factory.mktemp("begun")
    run(*command(world, world.begun, "--max_steps", 4))
    return world

@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_and_nothing_is_lost(world_with_a_run, tmp_path, capsys, name):
    """The only file that may be new is the log, in a folder that was made for it."""
    make, words = FAULTS[name]
    fault = make(world_with_a_run, tmp_path)
    before = contents(tmp_path)
    line = refused(capsys, *command(world_with_a_run, tmp_path / "run", *fault))
    for word in words:
        assert word.replace("FOLDER", str(tmp_path)) in line
    after = contents(tmp_path)
    assert before.items() <= after.items()
    assert after.keys() - before.keys() <= {str(tmp_path / "run/metrics.jsonl")}

@pytest.mark.parametrize("name", [
    "no train.jsonl", "out_dir is empty", "out_dir is a file", "out_dir in a file",
    "out_dir where none can be", "metrics.jsonl is a folder"])
def test_folders_are_tried_before_a_model_is_loaded(world, tmp_path, capsys, monkeypatch, name):
    """Scoring the reference takes long; what would stop the run then, stops it before."""
    loaded = []
    monkeypatch.setattr(rpo, "load_model", loaded.append)
    make, _ = FAULTS[name]
    refused(capsys, *command(world, tmp_path / "run", *make(world, tmp_path)))
    assert not loaded

# ------------------------------------------------------------------------------------------------
# after a fault

def test_a_corrected_command_runs_in_the_same_folder(world, tmp_path, capsys):
    """A run that was refused before its first row has not taken the folder."""
    argv = command(world, tmp_path / "run", "--max_steps", 1, data=tmp_path / "data")
    refused(capsys, *argv)
    copy_data(world, tmp_path / "data")
    assert [row["step"] for row in run(*argv)] == [0, 1, 1]

DIVERGING = ("--learning_rate", 1e30, "--save_every", 1)

def test_a_loss_that_is_no_number_ends_the_run(world, tmp_path, capsys):
    """No update is made and no row is logged of that step; the checkpoint before it is whole."""
    line = refused(capsys, *command(world, tmp_path, *DIVERGING))
    assert "nan" in line and str(tmp_path / "step_000001") in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "step_000001"]
    weights = load_file(tmp_path / "step_000001/model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert [row["step"] for row in read_rows(tmp_path) if "loss" in row] == [1]

def test_the_step_of_a_loss_that_is_no_number_is_named(world, tmp_path, capsys):
    """So one knows which row of the log is missing."""
    assert "step 2" in refused(capsys, *command(world, tmp_path, *DIVERGING))

@pytest.mark.parametrize("flags", [["--eta", "inf"], ["--beta", "inf"]])
def test_the_log_is_strict_json(world, tmp_path, capsys, flags):
    """nan and Infinity are no JSON: a row that holds one would spoil the file for its readers."""
    refused(capsys, *command(world, tmp_path, *flags))

    def refuse(constant):
        raise AssertionError(f"{constant} in metrics.jsonl")

    for row in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(row, parse_constant=refuse)

def test_rpo_traceback_shows_where(world, tmp_path, monkeypatch):
    """For whoever changes the program: the exception itself, not its line."""
    monkeypatch.setenv("RPO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="--beta 0"):
        run(*command(world, tmp_path, "--beta", 0))

def test_the_program_ends_with_code_2(tmp_path):
    """As a person starts it, where nothing was prepared: one line and no traceback."""
    done = run_script(ROOT / "rpo.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1 and "data/toy" in done.stderr

def test_where_nothing_was_prepared_the_line_says_what_to_do(tmp_path, monkeypatch, capsys):
    """The first mistake of all: to start in another folder, or before prepare_data.py."""
    monkeypatch.chdir(tmp_path)
    assert "prepare_data.py" in refused(capsys, "rpo.py", "--out_dir", "run")

# ------------------------------------------------------------------------------------------------
# no code from elsewhere

def names_of(tree):
    """Every name, attribute, imported module and keyword of a program."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield f"{ast.unparse(node.value)}.{node.attr}"
        elif isinstance(node, ast.alias):
            yield node.name
        elif isinstance(node, ast.ImportFrom):
            yield node.module

@pytest.mark.parametrize("program", ["rpo.py", "eval.py", "prepare_data.py"])
def test_no_program_can_run_code_that_it_reads(program):
    """No pickle and nothing that loads one, no eval, no code that a model brings."""
    tree = ast.parse((ROOT / program).read_text())
    names = set(names_of(tree))
    assert not names & {
        "eval", "exec", "compile", "__import__", "pickle", "dill", "cloudpickle", "shelve",
        "joblib", "marshal", "torch.load", "torch.save", "numpy.load", "np.load", "os.system"}
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            assert isinstance(node.value, ast.Constant) and node.value.value is False
