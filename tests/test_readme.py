"""The commands that a reader types, from README.md and the heads of the files: all parse, the toy world's run."""
import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import eval as evaluation
import prepare_data
import rpo
from conftest import ENV, ROOT, run

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.exists() else ""
needs_readme = pytest.mark.skipif(not TEXT, reason="there is no README.md yet")
PROGRAMS = {"rpo.py": rpo, "prepare_data.py": prepare_data, "eval.py": evaluation}
# what makes a command of the toy world short; the last of two equal flags counts
SHORTER = {"prepare_data.py": ["--limit", "40", "--test_size", "8", "--sft_steps", "20"],
           "rpo.py": ["--max_steps", "3"],
           "prefs": ["--prompts", "4", "--max_new_tokens", "4"], "generate": ["--max_new_tokens", "4"]}

def simple_commands(text):
    """The commands of a shell text, loops, pipes and chains taken apart, as lists of words; a variable is set to 1."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(re.sub(r"\$(\w+|\{\w+\})", "1", line), posix=True, punctuation_chars=True)
        words.whitespace_split, words.commenters = True, "#"
        command = []
        for word in [*words, ";"]:
            if word and set(word) <= set(";&|()<>"):
                if command:
                    yield command
                command = []
            elif command or not re.fullmatch(r"do|then|\w+=.*", word):
                command.append(word)

def calls(text):
    """(launcher, program, arguments) of each command in a text that starts one of the three programs."""
    for command in simple_commands(text):
        for i, word in enumerate(command):
            if word in PROGRAMS and command[0] in ("python", "python3", "torchrun"):
                yield command[:i], word, command[i + 1:]

BLOCKS = "\n".join(re.findall(r"```(?:bash|sh|shell)\n(.*?)```", TEXT, flags=re.S))
HEADS = "\n".join(line for program in PROGRAMS.values() for line in program.__doc__.splitlines()
                  if re.match(r" *(python|torchrun) ", line) and " | " not in line)
README_CALLS = list(calls(BLOCKS))

def ranks(launcher):
    flags = dict(zip(launcher[1:], launcher[2:]))
    flags |= dict(word.split("=", 1) for word in launcher if "=" in word)
    return int(flags.get("--nproc_per_node", 1)) * int(flags.get("--nnodes", 1))

@pytest.mark.parametrize("launcher, program, arguments", README_CALLS + list(calls(HEADS)),
                         ids=lambda part: " ".join(part) if isinstance(part, list) else part)
def test_every_command_parses(launcher, program, arguments, monkeypatch):
    """A flag that was renamed, or a value that is no longer allowed, must not survive in a text."""
    class Parsed(Exception):
        pass
    parse = argparse.ArgumentParser.parse_args
    def parse_only(self, argv=None, namespace=None):
        raise Parsed(parse(self, argv, namespace))
    monkeypatch.setattr(rpo, "WORLD_SIZE", ranks(launcher))
    monkeypatch.setattr(rpo.importlib.util, "find_spec", lambda name: True)  # trackers need not be installed here
    if program == "rpo.py":
        rpo.parse_options(arguments)
    else:
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(Parsed):
            PROGRAMS[program].main()

def value(arguments, flag, default=""):
    return arguments[arguments.index(flag) + 1] if flag in arguments else default

def is_toy(program, arguments, folder):
    """Whether a command needs no more than what the toy world's commands before it have left in the folder."""
    if program == "prepare_data.py":
        return not arguments or arguments[0].startswith("--") or arguments[0] == "toy"
    wanted = [value(arguments, "--data", "data/toy"), value(arguments, "--model", "data/toy/model")]
    if program == "eval.py":
        out = value(arguments, "--out")
        wanted = [word for word in arguments[1:] if "/" in word and word != out and not word.startswith("--")]
    return all(Path(folder, path).exists() for path in wanted) and not {"--recipe", "--tracker"} & set(arguments)

@needs_readme
def test_the_toy_worlds_commands_run(tmp_path, monkeypatch):
    """In the order of the README, in an empty folder, each shortened; the first `torchrun rpo.py` as typed."""
    monkeypatch.chdir(tmp_path)
    done, env = [], ENV | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), ENV["PATH"]])}
    for launcher, program, arguments in README_CALLS:
        if not is_toy(program, arguments, tmp_path) or ranks(launcher) > 2:
            continue
        kind = arguments[0] if program == "eval.py" else program
        arguments = arguments + SHORTER.get(kind, [])
        if program == "rpo.py" and (ranks(launcher) == 2 or "torchrun" not in str(done)):
            launcher = launcher[:1] + ["--standalone"] + launcher[1:] if launcher[0] == "torchrun" else launcher
            result = subprocess.run([*launcher, ROOT / program, *arguments], env=env, capture_output=True, text=True,
                                    timeout=120)
            assert result.returncode == 0, result.stderr[-3000:]
        elif program == "rpo.py":
            run(program, *arguments, *([] if "--out_dir" in arguments else ["--out_dir", "out/toy-rpo"]))
        else:
            monkeypatch.setattr(sys, "argv", [program, *arguments])
            PROGRAMS[program].main()
        done.append((launcher[0], kind))
    assert ("python", "prepare_data.py") in done and ("torchrun", "rpo.py") in done
    shown = {arguments[0] for _, program, arguments in README_CALLS if program == "eval.py"}
    assert {kind for _, kind in done} >= shown & {"prefs", "generate", "winrate", "plot"}  # each was run once at least
    assert Path("out/toy-rpo/final/model.safetensors").exists()

@needs_readme
def test_installation_is_shown():
    """What CI does in a fresh environment is what the README says."""
    commands = list(simple_commands(BLOCKS))
    assert ["pip", "install", "-r", "requirements.txt"] in commands and ["python", "-m", "pytest"] in commands

@needs_readme
@pytest.mark.parametrize("recipe", rpo.RECIPES)
def test_recipes_are_in_the_readme(recipe):
    """The README's row of a recipe has its numbers, and a command shows it on eight GPUs, 16 pairs each."""
    o = rpo.parse_options(["--recipe", recipe])
    rows = [line for line in TEXT.splitlines() if re.match(rf"\| *`?{recipe}`? *\|", line)]
    assert rows, f"no table row begins with {recipe}"
    for number in (o.beta, o.eta, o.sft, o.batch_size, o.epochs):
        assert any(re.search(rf"(?<![\w.]){re.escape(str(number))}(?![\w.]|-\w)", row) for row in rows), (number, rows)
    assert any(ranks(launcher) == 8 and o.batch_size % 8 == 0 for launcher, program, arguments in README_CALLS
               if "--recipe" in arguments)

def test_size():
    """The trainer fits in one sitting: under 500 lines; no line of the programs is longer than 120 characters."""
    assert len((ROOT / "rpo.py").read_text(encoding="utf-8").splitlines()) < 500
    for program in PROGRAMS:
        for number, line in enumerate((ROOT / program).read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 120, f"{program} line {number} has {len(line)} characters"

def test_shell_texts_are_taken_apart():
    """Chains, loops, continued lines, variables, comments and assignments, as the other tests here rely on."""
    text = ("pip install -r requirements.txt && python prepare_data.py --show 3  # three pairs\n"
            "for s in 1 2; do N=1 torchrun --nproc_per_node=2 rpo.py --seed $s --out_dir 'out/a b'; done\n"
            "torchrun --nnodes 2 --nproc_per_node 8 \\\n    rpo.py --recipe zephyr-beta\ncat rpo.py | head\n")
    assert list(calls(text)) == [
        (["python"], "prepare_data.py", ["--show", "3"]),
        (["torchrun", "--nproc_per_node=2"], "rpo.py", ["--seed", "1", "--out_dir", "out/a b"]),
        (["torchrun", "--nnodes", "2", "--nproc_per_node", "8"], "rpo.py", ["--recipe", "zephyr-beta"])]
    assert [ranks(launcher) for launcher, _, _ in calls(text)] == [1, 2, 16]
