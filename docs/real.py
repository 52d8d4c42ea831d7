"""DPO, RPO and SFT on a real model and real pairs: a table, docs/real.png, docs/answers.md.

$ OMP_NUM_THREADS=1 python docs/real.py                  # about five hours on one core, 6 GB
$ python docs/real.py MODEL PAIRS                        # another model, other pairs

Eight runs of three passes over the UltraFeedback pairs of at most 256 tokens. What exists under
data/real and out/real already is not computed again, and a run that was stopped goes on.
"""
import argparse
import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path

from matplotlib.figure import Figure
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
import rpo

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PAIRS = "trl-lib/ultrafeedback_binarized"
TOKENS = 256
BATCH = 8
OPTIONS = [
    "--batch_size", str(BATCH), "--epochs", "3", "--learning_rate", "2e-5",
    "--max_length", str(TOKENS), "--max_prompt_length", str(TOKENS), "--max_tokens", "1024",
    "--eval_every", "12", "--save_every", "36",
]
# {folder: (title, flags)}: the last two are there to choose eta
RUNS = {
    "dpo-s0": ("DPO, seed 0", ["--eta", "0", "--seed", "0"]),
    "dpo-s1": ("DPO, seed 1", ["--eta", "0", "--seed", "1"]),
    "rpo-0.1-s0": ("RPO sum, eta 0.1, seed 0", ["--eta", "0.1", "--seed", "0"]),
    "rpo-0.1-s1": ("RPO sum, eta 0.1, seed 1", ["--eta", "0.1", "--seed", "1"]),
    "rpo-mean-0.4-s0": ("RPO mean, eta 0.4", ["--sft", "mean", "--eta", "0.4", "--seed", "0"]),
    "sft-s0": ("SFT only", ["--beta", "0", "--sft", "mean", "--eta", "1", "--seed", "0"]),
    "rpo-0.02-s0": ("RPO sum, eta 0.02", ["--eta", "0.02", "--seed", "0"]),
    "rpo-0.5-s0": ("RPO sum, eta 0.5", ["--eta", "0.5", "--seed", "0"]),
}
# {metric: decimals}
COLUMNS = {"logps/chosen_vs_ref": 1, "logps/rejected_vs_ref": 1, "loss/dpo": 3}
SHOWN = ("dpo-s0", "rpo-0.1-s0", "rpo-mean-0.4-s0", "sft-s0")
LINES = {
    "dpo-s0": ("DPO", "#D55E00", "-"),
    "dpo-s1": (None, "#D55E00", "--"),
    "rpo-0.1-s0": ("RPO, eta 0.1", "#0072B2", "-"),
    "rpo-0.1-s1": ("dashed: seed 1", "#0072B2", "--"),
    "rpo-0.02-s0": ("RPO, eta 0.02", "#56B4E9", ":"),
    "rpo-0.5-s0": ("RPO, eta 0.5", "#009E73", "-."),
    "rpo-mean-0.4-s0": ("RPO mean, eta 0.4", "#CC79A7", "-"),
    "sft-s0": ("SFT only", "#555555", "-"),
}


def run(*command):
    """A command of the README."""
    print("$ python", *command, flush=True)
    subprocess.run([sys.executable, ROOT / command[0], *command[1:]], check=True)


def short_pairs(model, source):
    """A folder with the pairs of which rpo.py would drop none, so that eval.py meets no other."""
    if not Path("data/real/all").exists():
        limits = ["--limit", "1000", "--test_size", "200"]
        run("prepare_data.py", source, *limits, "--out", "data/real/all")
    short = Path("data/real/short")
    short.mkdir(exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for name in ("train.jsonl", "test.jsonl"):
        lines = []
        for line in Path("data/real/all", name).read_text(encoding="utf-8").splitlines():
            pair = rpo.tokenize_pair(json.loads(line), tokenizer, TOKENS, TOKENS)
            if isinstance(pair, dict):
                lines.append(line + "\n")
        (short / name).write_text("".join(lines), encoding="utf-8")
        print(f"{short / name}: {len(lines)} pairs")
    return str(short)


def read_rows(name):
    """(training rows, evaluation rows) of a run's log."""
    lines = Path("out/real", name, "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if "loss" in row], [row for row in rows if "eval/loss" in row]


def pass_means(rows, key, pairs):
    """A training metric's mean over each pass: every pair once, before the update that it is in."""
    steps = math.ceil(pairs / BATCH)
    # the last batch of a pass holds what is left
    sizes = [BATCH] * (steps - 1) + [pairs - BATCH * (steps - 1)]
    means = []
    for start in range(0, len(rows), steps):
        total = sum(size * row[key] for size, row in zip(sizes, rows[start : start + steps]))
        means.append(total / pairs)
    return means


def series(values, places):
    """Numbers in a cell, a rounded -0 as 0."""
    return ", ".join(f"{round(value, places) + 0.0:.{places}f}" for value in values)


def print_table(title, curve):
    """A row a run; curve(name, metric) -> the metric's values, of which accuracy shows the last."""
    print(f"{title}; log-probs minus the reference's, nats a response")
    print("| run | chosen | rejected | `loss/dpo` | accuracy at the end |")
    print("|---|---|---|---|---|")
    for name, (run_title, _) in RUNS.items():
        cells = [series(curve(name, metric), places) for metric, places in COLUMNS.items()]
        accuracy = curve(name, "rewards/accuracies")[-1]
        print(f"| {run_title} | {' | '.join(cells)} | {accuracy:.2f} |")
    print()


def print_tables(pairs):
    def held_out(name, metric):
        _, rows = read_rows(name)
        return [row[f"eval/{metric}"] for row in rows]

    def training(name, metric):
        rows, _ = read_rows(name)
        return pass_means(rows, metric, pairs)

    print_table("held-out pairs, at steps 0, 12, ... 72", held_out)
    print_table("training pairs, means over passes 1, 2 and 3", training)


def draw(path):
    """Held-out pairs but for one panel; a dashed line is a second order of the same pairs."""
    figure = Figure(figsize=(7.2, 6), layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    minus_ref = "log-prob minus the reference's,\nnats,"
    panels = {
        "eval/logps/chosen_vs_ref": f"chosen {minus_ref} held-out pairs",
        "eval/logps/rejected_vs_ref": f"rejected {minus_ref} held-out pairs",
        "logps/chosen_vs_ref": f"chosen {minus_ref} training pairs, six steps a point",
        "eval/loss/dpo": "DPO's part of the loss,\nheld-out pairs",
    }
    for axis, (key, title) in zip(axes, panels.items()):
        for name, (label, color, style) in LINES.items():
            rows = read_rows(name)[key.startswith("eval/")]
            steps = [row["step"] for row in rows]
            values = [row[key] for row in rows]
            if not key.startswith("eval/"):
                steps = [3.5 + start for start in range(0, len(values), 6)]
                values = [sum(values[i : i + 6]) / 6 for i in range(0, len(values), 6)]
            axis.plot(steps, values, color=color, linestyle=style, label=label)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    lines, labels = axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=200)


def answers(model, name, data):
    """One sample to each of ten held-out prompts, the same seed for all models."""
    out = f"out/real/answers/{name}.json"
    if not Path(out).exists():
        samples = ["--limit", "10", "--seed", "1", "--temperature", "1", "--max_new_tokens", "120"]
        run("eval.py", "generate", "--model", model, "--data", data, *samples, "--out", out)
    return json.loads(Path(out).read_text(encoding="utf-8"))


HEAD = """SmolLM2-135M-Instruct at temperature 1, the same seed for all, at most 120 tokens, by
`docs/real.py`; nothing was chosen or corrected. [The runs](results.md#a-real-model).
"""


def quoted(text):
    """As a block, whose long lines are broken."""
    lines = [textwrap.fill(line, 96) for line in text.strip().splitlines()]
    return "\n".join(["~~~text", *lines, "~~~\n"])


def write_answers(models, data, path):
    """Ten prompts, the answers of five models below each, as they are."""
    titles = {"reference": "reference"} | {name: RUNS[name][0] for name in SHOWN}
    sets = {name: answers(models[name], name, data) for name in titles}
    parts = ["# Ten held-out prompts, one sample each\n", HEAD]
    for k, first in enumerate(sets["reference"]):
        parts.append(f"## {k + 1}\n")
        parts.append(quoted(first["instruction"]))
        for name, title in titles.items():
            answer = sets[name][k]
            end = "" if answer["ended"] else " (cut at 120 tokens)"
            parts.append(f"**{title}**{end}\n")
            parts.append(quoted(answer["output"]))
    Path(path).write_text("\n".join(parts), encoding="utf-8")


def train(model, data):
    """All runs, where they are not there yet -> {name: folder of the model}."""
    models = {"reference": model}
    for name, (_, flags) in RUNS.items():
        out = f"out/real/{name}"
        models[name] = f"{out}/final"
        if not Path(models[name]).exists():
            options = [*OPTIONS, *flags, "--resume", "--out_dir", out]
            run("rpo.py", "--model", model, "--data", data, *options)
    return models


def own_samples(models, data):
    """KL of the policies' own samples, two to each of 20 prompts; the logs know the pairs."""
    samples = ["--pairs", "1", "--prompts", "20", "--max_new_tokens", "120", "--beta", "0.1"]
    finals = [models[name] for name in RUNS]
    reference = models["reference"]
    run("eval.py", "prefs", "--model", *finals, "--ref_model", reference, "--data", data, *samples)


def main(model, source):
    data = short_pairs(model, source)
    models = train(model, data)
    pairs = len(Path(data, "train.jsonl").read_text(encoding="utf-8").splitlines())
    print_tables(pairs)
    draw(ROOT / "docs" / "real.png")
    write_answers(models, data, ROOT / "docs" / "answers.md")
    own_samples(models, data)


if __name__ == "__main__":
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("model", nargs="?", default=MODEL, help="folder or hub name")
    parser.add_argument("pairs", nargs="?", default=PAIRS, help="what prepare_data.py takes")
    o = parser.parse_args()
    main(o.model, o.pairs)
