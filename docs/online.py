"""Online rounds against one offline run in the toy world: five seeds, a table, docs/online.png.

$ OMP_NUM_THREADS=1 python docs/online.py

Online, a round samples two answers of the current policy to each of 500 prompts, has them labelled,
and trains the policy on those labels. Offline, the first model answers three times, and one run
trains on all the labels at once. What exists under out/ already is not computed again.
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
import prepare_data

SEEDS = range(5)
PROMPTS = 500
ROUNDS = 3
METHODS = {"rpo": [], "dpo": ["--eta", "0"], "sft": ["--beta", "0", "--sft", "mean", "--eta", "1"]}


def run(done, *command):
    """A command of the README, unless the file or folder that it makes is there."""
    if not Path(done).exists():
        print("$ python", *command, flush=True)
        subprocess.run([sys.executable, ROOT / command[0], *command[1:]], check=True)


def label(model, data, out, seed):
    """Two samples of a model to each prompt, labelled as the toy world labels its own."""
    answers = f"{out}.json"
    samples = ["--limit", str(PROMPTS), "--n", "2", "--temperature", "1", "--seed", str(seed)]
    prompts = ["--prompts", f"{data}/train.jsonl"]
    run(answers, "eval.py", "generate", "--model", model, *prompts, *samples, "--out", answers)
    judge = ["--judge", "gold", "--coin", "--seed", str(seed)]
    run(out, "eval.py", "label", answers, *judge, "--out", out)
    return out


def train(method, model, ref_model, data, out, seed):
    """Five passes over a folder of pairs -> the policy's folder."""
    models = ["--model", model, "--ref_model", ref_model]
    options = ["--epochs", "5", "--eval_every", "0", "--seed", str(seed), *METHODS[method]]
    run(f"{out}/final", "rpo.py", *models, "--data", data, *options, "--resume", "--out_dir", out)
    return f"{out}/final"


def policies(seed):
    """All models of one seed, {name: folder}."""
    data, out = f"data/online-s{seed}", f"out/online-s{seed}"
    options = ["--seed", str(seed), "--limit", str(PROMPTS)]
    run(data, "prepare_data.py", *options, "--out", data)
    first = f"{data}/model"
    models = {"reference": first}

    for method in ("rpo", "dpo"):
        # the reference of a round is the policy it starts from, or the first model throughout
        for reference in ("previous", "first"):
            policy = first
            for number in range(1, ROUNDS + 1):
                name = f"{method}-{reference}-round{number}"
                labels = f"{out}/labels-{name}"
                if number == 1:
                    # the first round is the same for all but the loss
                    name, labels = f"{method}-round1", f"{out}/labels-round1"
                label(policy, data, labels, 100 * seed + number)
                ref_model = policy if reference == "previous" else first
                policy = train(method, policy, ref_model, labels, f"{out}/{name}", seed)
                models[f"{method}-{reference}-round{number}"] = policy

    # the first model's answers, as many as the rounds have had
    parts = [f"{out}/labels-round1"]
    for number in range(2, ROUNDS + 1):
        parts.append(label(first, data, f"{out}/labels-offline{number}", 100 * seed + number))
    together = Path(out, "labels-offline")
    together.mkdir(exist_ok=True)
    records = "".join(Path(part, "train.jsonl").read_text() for part in parts)
    (together / "train.jsonl").write_text(records)
    for method in METHODS:
        name = f"{method}-offline"
        models[name] = train(method, first, first, str(together), f"{out}/{name}", seed)
    return models


def reward(model, name, seed, temperature):
    """Mean true reward of a model's answers to the held-out prompts, two each, or one if greedy."""
    kind = "answers" if temperature else "answers-greedy"
    out = f"out/online-s{seed}/{kind}/{name}.json"
    samples = ["--n", "2" if temperature else "1", "--temperature", str(temperature), "--seed", "7"]
    data = f"data/online-s{seed}"
    run(out, "eval.py", "generate", "--model", model, "--data", data, *samples, "--out", out)
    answers = json.loads(Path(out).read_text())
    rewards = []
    for answer in answers:
        text, ended = answer["output"], answer["ended"]
        rewards.append(prepare_data.gold_reward(answer["instruction"], text, ended=ended))
    return statistics.mean(rewards)


def draw(rewards, path):
    """True reward against labels spent, a line a method; offline runs stand at the right."""
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axis = figure.subplots()
    styles = {"rpo": ("RPO", "#0072B2", "o"), "dpo": ("DPO", "#D55E00", "s")}
    labels = [PROMPTS * number for number in range(ROUNDS + 1)]
    for method, (title, colour, marker) in styles.items():
        names = [f"{method}-previous-round{number}" for number in range(1, ROUNDS + 1)]
        columns = [rewards[name] for name in ["reference", *names]]
        means = [statistics.mean(column) for column in columns]
        deviations = [statistics.stdev(column) for column in columns]
        low = [mean - sd for mean, sd in zip(means, deviations)]
        high = [mean + sd for mean, sd in zip(means, deviations)]
        axis.fill_between(labels, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.plot(labels, means, color=colour, marker=marker, label=f"{title}, online")
    offline = styles | {"sft": ("SFT", "#555555", "^")}
    for k, (method, (title, colour, marker)) in enumerate(offline.items()):
        column = rewards[f"{method}-offline"]
        how = dict(color=colour, marker=marker, markerfacecolor="white", capsize=3, linestyle="none")
        place = labels[-1] + 60 * (k + 1)
        mean, sd = statistics.mean(column), statistics.stdev(column)
        axis.errorbar(place, mean, sd, label=f"{title}, all labels at once", **how)
    axis.set_xlabel("labels spent; the runs on all labels at once spend 1,500, too")
    axis.set_title("true reward of samples, mean and standard deviation of five seeds", fontsize=10)
    axis.set_xticks(labels)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(path, dpi=200)


def main():
    sampled, greedy = {}, {}
    for seed in SEEDS:
        for name, model in policies(seed).items():
            sampled.setdefault(name, []).append(reward(model, name, seed, temperature=1))
            greedy.setdefault(name, []).append(reward(model, name, seed, temperature=0))
    print("| model | sampled | greedy | sampled, seed by seed |")
    print("|---|---|---|---|")
    for name in sampled:
        cells = []
        for column in (sampled[name], greedy[name]):
            cells.append(f"{statistics.mean(column):.2f} ± {statistics.stdev(column):.2f}")
        seeds = " ".join(f"{value:.2f}" for value in sampled[name])
        print(f"| {name} | {cells[0]} | {cells[1]} | {seeds} |")
    draw(sampled, ROOT / "docs" / "online.png")


if __name__ == "__main__":
    how = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=how).parse_args()
    main()
