"""What the texts promise: every command parses, the toy world's run, the walkthrough is true."""
import argparse
import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import HfArgumentParser

import eval as evaluation
import prepare_data
import rpo
from conftest import ENV, ROOT, run

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = {"rpo.py": rpo, "prepare_data.py": prepare_data, "eval.py": evaluation}
# what makes a command of the toy world short; of two equal flags the last one counts
SHORTER = {
    "prepare_data.py": ["--limit", "40", "--test_size", "8", "--sft_steps", "150"],
    "rpo.py": ["--max_steps", "3"],
    "prefs": ["--prompts", "4", "--max_new_tokens", "4"],
    "generate": ["--limit", "40"],
}

# ------------------------------------------------------------------------------------------------
# commands

def simple_commands(text):
    """The commands of a shell text, as lists of words: chains, pipes and loops are taken apart."""
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"\$(\w+|\{\w+\})", "1", line)  # a variable becomes 1
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        words.commenters = "#"
        command = []
        for word in [*words, ";"]:
            if word and set(word) <= set(";&|()<>"):
                if command:
                    yield command
                command = []
            elif command or not re.fullmatch(r"do|then|\w+=.*", word):
                command.append(word)

def calls(text):
    """(launcher, program, arguments) of every command that starts one of the three programs."""
    for command in simple_commands(text):
        for i, word in enumerate(command):
            if word in PROGRAMS and command[0] in ("python", "python3", "torchrun"):
                yield command[:i], word, command[i + 1 :]

def shell_text(page):
    """The shell blocks of a page, and what it indents by four."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:bash|sh|shell)\n(.*?)```", text, flags=re.S)
    without_blocks = re.sub(r"```.*?```", "", text, flags=re.S)
    indented = re.findall(r"^ {4}(.*)$", without_blocks, flags=re.M)
    commands = "\n".join(indented).replace("\\\n", " ").splitlines()
    typed = [line for line in commands if re.match(r" *(python|torchrun) ", line)]
    return "\n".join([*blocks, *typed])

README_CALLS = list(calls(shell_text(ROOT / "README.md")))
ALL_CALLS = [call for page in PAGES for call in calls(shell_text(page))]

def processes(launcher):
    """How many processes a launcher starts, on all nodes."""
    flags = dict(zip(launcher[1:], launcher[2:]))
    return int(flags.get("--nproc_per_node", 1)) * int(flags.get("--nnodes", 1))

def options_of(arguments):
    """rpo.py's own reading of its flags; --fsdp comes with a patch, which has tests of its own."""
    arguments = [word for word in arguments if word != "--fsdp"]
    groups = [rpo.TrainOptions, rpo.RunOptions]
    return HfArgumentParser(groups, allow_abbrev=False).parse_args(arguments)

def parses(program, arguments, monkeypatch):
    """Whether a program takes the flags; nothing is run."""
    class Parsed(Exception):
        pass

    parse_args = argparse.ArgumentParser.parse_args

    def parse_only(self, argv=None, namespace=None):
        parse_args(self, argv, namespace)
        raise Parsed

    if program == "rpo.py":
        options_of(arguments)
        return
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setenv("RPO_TRACEBACK", "1")
    with pytest.raises(Parsed):
        PROGRAMS[program].run(arguments)

@pytest.mark.parametrize("launcher, program, arguments", ALL_CALLS, ids=lambda part: str(part))
def test_every_command_parses(launcher, program, arguments, monkeypatch):
    """A flag that was renamed, or a value that is no longer allowed, must not survive in a text."""
    parses(program, arguments, monkeypatch)

def script(name):
    """A program of docs/ as a module."""
    place = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module

@pytest.fixture
def rounds(tmp_path, monkeypatch):
    """The commands of docs/online.py for one seed, none of them run, and the models it measures."""
    online = script("online")
    monkeypatch.chdir(tmp_path)
    commands = []

    def record(done, program, *arguments):
        if Path(done).exists():
            return
        commands.append((program, list(arguments)))
        if "label" in arguments:
            Path(done).mkdir(parents=True)
            Path(done, "train.jsonl").write_text(f"{done}\n")

    monkeypatch.setattr(online, "run", record)
    return commands, online.policies(0)

def test_the_online_rounds_are_the_programs_commands(rounds, monkeypatch):
    commands, _ = rounds
    for program, arguments in commands:
        with monkeypatch.context() as patch:
            parses(program, arguments, patch)

def test_a_round_begins_with_the_policy_of_the_one_before(rounds):
    """It answers, is trained on its own answers, and is or is not its own reference."""
    commands, _ = rounds
    out = "out/online-s0"
    asked = {value(words, "--out"): value(words, "--model") for _, words in commands}
    trained = {value(words, "--out_dir"): words for _, words in commands}
    for method in ("rpo", "dpo"):
        for reference in ("previous", "first"):
            name = f"{method}-{reference}-round"
            second, third = trained[f"{out}/{name}2"], trained[f"{out}/{name}3"]
            assert value(second, "--model") == f"{out}/{method}-round1/final"
            assert value(third, "--model") == f"{out}/{name}2/final"
            assert value(third, "--data") == f"{out}/labels-{name}3"
            assert asked[f"{out}/labels-{name}3.json"] == value(third, "--model")
            own = value(third, "--model") if reference == "previous" else "data/online-s0/model"
            assert value(third, "--ref_model") == own

def test_offline_spends_as_many_labels_all_of_the_first_models_answers(rounds):
    commands, models = rounds
    out = "out/online-s0"
    labelled = Path(out, "labels-offline", "train.jsonl").read_text().split()
    assert labelled == [f"{out}/labels-round1", f"{out}/labels-offline2", f"{out}/labels-offline3"]
    asked = {value(words, "--out"): value(words, "--model") for _, words in commands}
    assert {asked[f"{folder}.json"] for folder in labelled} == {"data/online-s0/model"}
    assert {name for name in models if "offline" in name} == {
        "rpo-offline", "dpo-offline", "sft-offline"}

def test_the_runs_on_a_real_model_differ_in_the_loss_and_the_order_alone(tmp_path, monkeypatch):
    """The commands of docs/real.py, none of them run."""
    real, commands = script("real"), []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(real, "run", lambda program, *words: commands.append((program, [*words])))
    models = real.train("MODEL", "DATA")
    real.own_samples(models, "DATA")
    for program, arguments in commands:
        with monkeypatch.context() as patch:
            parses(program, arguments, patch)
    runs = [options_of(arguments) for program, arguments in commands if program == "rpo.py"]
    assert len(runs) == len(real.RUNS) == len(models) - 1
    free = {"beta", "eta", "sft", "seed", "out_dir"}
    same = [{key: of for key, of in vars(o).items() if key not in free} for o in runs]
    assert all(options == same[0] for options in same)

def test_a_pass_counts_each_training_pair_once():
    """Ten pairs in batches of eight and two, twice: the small batch weighs a quarter."""
    real = script("real")
    assert real.pass_means([{"x": 1.0}, {"x": 6.0}, {"x": 0.0}, {"x": 5.0}], "x", 10) == [2.0, 1.0]

def value(arguments, flag, default=""):
    return arguments[arguments.index(flag) + 1] if flag in arguments else default

def is_toy(program, arguments, folder):
    """Whether a command needs only what the toy world's commands before it left in the folder."""
    if program == "prepare_data.py":
        return not arguments or arguments[0].startswith("--") or arguments[0] == "toy"
    wanted = [value(arguments, "--data", "data/toy"), value(arguments, "--model", "data/toy/model")]
    if program == "eval.py":
        out = value(arguments, "--out")
        words = [word for word in arguments[1:] if "/" in word and not word.startswith("--")]
        wanted = [word for word in words if word != out]
    return all(Path(folder, path).exists() for path in wanted)

def run_as_typed(launcher, program, arguments):
    env = ENV | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), ENV["PATH"]])}
    command = [*launcher, ROOT / program, *arguments]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]

def test_the_toy_worlds_commands_run(tmp_path, monkeypatch):
    """In the order of the README, in an empty folder, each shortened; the quick start as typed."""
    monkeypatch.chdir(tmp_path)
    done = []
    for launcher, program, arguments in README_CALLS:
        if not is_toy(program, arguments, tmp_path) or processes(launcher) > 1:
            continue
        kind = arguments[0] if program == "eval.py" else program
        arguments = arguments + SHORTER.get(kind, [])
        if program == "rpo.py" and not arguments[0].startswith("--out_dir") and "rpo.py" not in done:
            run_as_typed(launcher, program, arguments)
        elif program == "rpo.py":
            run(program, *arguments)
        else:
            PROGRAMS[program].run(arguments)
        done.append(kind)
        # a shortened run ends in a step folder: the commands that follow ask for final/
        for folder in Path("out").glob("*/step_*"):
            if not (folder.parent / "final").exists():
                folder.rename(folder.parent / "final")
    shown = {"rpo.py", "prepare_data.py", "prefs", "generate", "winrate", "plot", "label"}
    assert set(done) >= shown

def test_installation_is_shown():
    """What CI does in a fresh environment is what the README says."""
    commands = list(simple_commands(shell_text(ROOT / "README.md")))
    assert ["pip", "install", "-r", "requirements.txt"] in commands
    assert ["python", "-m", "pytest", "-n", "2", "--dist", "loadfile"] in commands

def tables_of_numbers(page):
    """(the text of its section up to its end, a table) of each table with ten numbers or more."""
    for section in re.split(r"(?m)^(?=## )", page.read_text(encoding="utf-8")):
        for table in re.finditer(r"(?m)(?:^\|.*\n)+", section):
            if len(re.findall(r"-?\d+\.\d+", table[0])) >= 10:
                yield section[: table.end()], table[0]

MEASURED = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in (
    "results", "benchmark"))]

@pytest.mark.parametrize("page", MEASURED, ids=lambda page: page.name)
def test_a_table_of_numbers_names_the_command_that_prints_it(page):
    """In its section, before it; a link from the README leads to the commands."""
    found = list(tables_of_numbers(page))
    assert found
    for before, table in found:
        named = re.search(r"python (?:eval|rpo|tests/\w+|docs/\w+)\.py|`plot` prints", before)
        assert named, table

# ------------------------------------------------------------------------------------------------
# recipes

PAPER = dict(
    learning_rate=5e-7, batch_size=128, max_length=1024, seed=42, dtype="bfloat16",
    ref_model="", weight_decay=0.0, grad_clip=1.0)
BETA_SERIES = dict(model="HuggingFaceH4/mistral-7b-sft-beta", data="data/ultrafeedback")
GEMMA = dict(model="HuggingFaceH4/zephyr-7b-gemma-sft-v0.1", data="data/dpo-mix-7k", epochs=2)
SUM = dict(eta=0.005, sft="sum", warmup_ratio=0.1, max_prompt_length=512)
# as long as the whole pair may be: no limit of its own
MEAN = dict(eta=0.2, sft="mean", warmup_ratio=0.03, max_prompt_length=1024)
RECIPES = {
    "out/zephyr-beta": PAPER | BETA_SERIES | SUM | dict(beta=0.01, epochs=1),
    "out/zephyr-gemma": PAPER | GEMMA | SUM | dict(beta=0.05),
    "out/zephyr-gemma-mean": PAPER | GEMMA | MEAN | dict(beta=0.5),
}

@pytest.mark.parametrize("out_dir", RECIPES)
def test_recipes_are_the_papers(out_dir):
    """Each of the paper's runs is one command with every flag in sight, for eight GPUs."""
    (found,) = [call for call in README_CALLS if value(call[2], "--out_dir") == out_dir]
    launcher, program, arguments = found
    o = options_of(arguments)
    assert {name: getattr(o, name) for name in RECIPES[out_dir]} == RECIPES[out_dir]
    assert processes(launcher) == 8 and o.batch_size % 8 == 0
    shown = {word.removeprefix("--") for word in arguments if word.startswith("--")}
    assert shown >= RECIPES[out_dir].keys() - {"ref_model", "weight_decay", "grad_clip"}

# ------------------------------------------------------------------------------------------------
# the walkthrough

BLOCKS = re.findall(r"```(python|text)\n(.*?)```", TEXT[TEXT.index("## The walkthrough") :], flags=re.S)

def test_the_walkthrough_prints_what_it_shows():
    """Its blocks, run in their order in one session, print the texts below them, to the letter."""
    names, printed = {}, ""
    compared = 0
    for language, text in BLOCKS:
        if language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(text, names)
            printed = out.getvalue()
        else:
            assert printed == text
            compared += 1
    assert compared == 5

LINKS = re.findall(r"\[`(\w+)`\]\(rpo\.py#L(\d+)\)", TEXT)

@pytest.mark.parametrize("name, line", LINKS)
def test_line_links_point_at_what_they_name(name, line):
    source = (ROOT / "rpo.py").read_text(encoding="utf-8").splitlines()
    assert re.match(rf"(def|class) {name}\b", source[int(line) - 1])

def test_every_hop_is_linked():
    hops = {"tokenize_pair", "micro_batches", "collate", "PairLogps", "rpo_loss"}
    assert hops <= {name for name, _ in LINKS}

# ------------------------------------------------------------------------------------------------
# form

@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """A link to a file of the repository, or to a heading of the page itself."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("http"):
            assert (page.parent / target.split("#")[0]).exists(), target

def test_the_readme_is_read_in_one_sitting():
    """Between 2,000 and 2,800 words, code and tables counted."""
    assert 2000 <= len(TEXT.split()) <= 2800

def test_code_and_tables_fit_a_page():
    """Lines of code are at most 100 columns wide, tables have at most 6 columns."""
    inside = False
    for number, line in enumerate(TEXT.splitlines(), 1):
        inside ^= line.startswith("```")
        if inside or line.startswith("    "):
            assert len(line) <= 100, number
        if line.startswith("|") and not inside:
            assert len(re.findall(r"(?<!\\)\|", line)) - 1 <= 6, number

def test_shell_texts_are_taken_apart():
    """Chains, loops, continued lines, variables and comments, as the other tests rely on."""
    text = (
        "pip install -r requirements.txt && python prepare_data.py --show 3  # three pairs\n"
        "for s in 1 2; do N=1 torchrun --nproc_per_node 2 rpo.py --seed $s --out_dir 'a b'; done\n"
        "torchrun --nnodes 2 --nproc_per_node 8 \\\n    rpo.py --beta 1\ncat rpo.py | head\n")
    two_ranks = ["torchrun", "--nproc_per_node", "2"]
    two_nodes = ["torchrun", "--nnodes", "2", "--nproc_per_node", "8"]
    found = list(calls(text))
    assert found == [
        (["python"], "prepare_data.py", ["--show", "3"]),
        (two_ranks, "rpo.py", ["--seed", "1", "--out_dir", "a b"]),
        (two_nodes, "rpo.py", ["--beta", "1"]),
    ]
    assert [processes(launcher) for launcher, _, _ in found] == [1, 2, 16]
