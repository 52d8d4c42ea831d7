"""
A tiny random model, pairs of unequal lengths, and three ways to run the trainer: in this process,
as a person starts it, and on several gloo ranks.
"""
import gc
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# read by libraries when they are imported, in this process and in those that it starts
CACHE = tempfile.TemporaryDirectory(prefix="tests-of-rpo-")
os.environ |= {
    "HF_DATASETS_CACHE": f"{CACHE.name}/datasets",
    "HF_HUB_OFFLINE": "1",
    "HYPOTHESIS_STORAGE_DIRECTORY": f"{CACHE.name}/hypothesis",
    "OMP_NUM_THREADS": "1",
}
ENV = os.environ | {"PYTHONPATH": str(ROOT)}

import datasets
import pytest
import torch
import torch.distributed as dist
from hypothesis import settings
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rpo

# what was imported is no garbage, and collecting the rest is quick
gc.freeze()
# runs are compared bit for bit, and thread counts change the last bits
torch.set_num_threads(1)
# the cache of `datasets` does not see that an imported function has changed
datasets.disable_caching()
# the same random examples in every run of the tests
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("repeatable")

# ------------------------------------------------------------------------------------------------
# a world to train in

SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>"]  # ids 0 to 5
WORDS = [f"w{i}" for i in range(6, 48)]  # the word "w17" has id 17
TEMPLATE = (
    "{{ bos_token }}"
    "{% for turn in messages %}<|{{ turn['role'] }}|> {{ turn['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

def word_tokenizer(**kwargs):
    """One token a word: ids can be read off the text."""
    vocabulary = {word: i for i, word in enumerate(SPECIALS + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, extra_special_tokens=SPECIALS[4:], **names | kwargs)
    tokenizer.chat_template = TEMPLATE
    return tokenizer

def tiny_llama(seed=0, **kwargs):
    """Weights so large that every token matters: a wrong mask or position shows at once."""
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return LlamaForCausalLM(LlamaConfig(**sizes | kwargs))

def save_model(path, seed=0, tokenizer=None, **kwargs):
    tiny_llama(seed, **kwargs).save_pretrained(path)
    (tokenizer or word_tokenizer()).save_pretrained(path)
    return str(path)

def random_records(n, seed, baseline=False):
    """Prompts of 1 to 12 words, every third with an earlier turn; responses of 1 to 9 words."""
    rng = random.Random(seed)

    def say(role, most):
        return {"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(1, most)))}

    records = []
    for i in range(n):
        history = [say("user", 4), say("assistant", 4)] if i % 3 == 0 else []
        record = {
            "prompt": history + [say("user", 12)],
            "chosen": [say("assistant", 9)],
            "rejected": [say("assistant", 9)],
        }
        if baseline and i % 2 == 1:
            record["baseline"] = [say("assistant", 5)]
        records.append(record)
    return records

def write_jsonl(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))

@pytest.fixture(scope="session")
def tokenizer():
    return word_tokenizer()

@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """
    Folders model, data, and with_baseline, in which half the pairs carry a baseline response.

    17 training pairs: with 8 a step, the third step of an epoch has one pair, fewer than there are
    ranks. 3 held-out pairs: fewer than four ranks.
    """
    root = tmp_path_factory.mktemp("world")
    for name, baseline in (("data", False), ("with_baseline", True)):
        write_jsonl(root / name / "train.jsonl", random_records(17, 1, baseline))
        write_jsonl(root / name / "test.jsonl", random_records(3, 2, baseline))
    return SimpleNamespace(
        root=root, model=save_model(root / "model"), data=str(root / "data"),
        with_baseline=str(root / "with_baseline"))

@pytest.fixture(scope="session")
def whole(world, tmp_path_factory):
    """The run that others are held against: one rank, each step in one pass, 2 x 3 steps."""
    out_dir = tmp_path_factory.mktemp("whole")
    run(*command(world, out_dir))
    return out_dir

def read_pairs(data, split, tokenizer):
    """The pairs of a file one by one, without load_pairs."""
    lines = Path(data, f"{split}.jsonl").read_text().splitlines()
    return [rpo.tokenize_pair(json.loads(line), tokenizer) for line in lines]

def plain_logp(model, pair, side):
    """A response's log-prob by the definition: the full logits of one row without padding."""
    ids = torch.tensor([pair["prompt"] + pair[side]])  # (1, T)
    logps = model(ids).logits[0, :-1].double().log_softmax(-1)  # (T - 1, V)
    scored = logps.gather(1, ids[0, 1:, None])[:, 0]  # (T - 1,)
    return scored[len(pair["prompt"]) - 1 :].sum()

# ------------------------------------------------------------------------------------------------
# running the trainer

def command(world, out_dir, *flags, data=None):
    """Two epochs of three steps with hard updates; a later flag overrides an earlier one."""
    argv = [
        "rpo.py", "--model", world.model, "--data", data or world.data, "--out_dir", out_dir,
        "--batch_size", 8, "--epochs", 2, "--learning_rate", 0.01, "--beta", 0.5, "--eta", 0.5,
        "--eval_every", 2, "--save_every", 2, *flags]
    return [str(flag) for flag in argv]

def run(*argv):
    """The trainer in this process; argv begins with the program's name -> rows of metrics.jsonl."""
    try:
        rpo.run(list(argv[1:]))
    finally:
        # a run that is refused leaves these open, and the next one of this process would meet them
        for bar in list(getattr(tqdm, "_instances", [])):
            bar.close()
        if dist.is_initialized():
            dist.destroy_process_group()
    return read_rows(argv[argv.index("--out_dir") + 1])

def refused(capsys, *argv):
    """A run that ends in one line on stderr and exit code 2 -> that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    code = stop.value.code
    # what holds the run's lock would end with its process
    del stop
    gc.collect()
    assert code == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    # progress bars rewrite their line
    lines = [line for line in re.split("\\r|\\n|\\x1b\\[A", err) if "error:" in line]
    assert len(lines) == 1, err
    return lines[0]

def run_script(path, *flags, **kwargs):
    """Any copy of rpo.py as a person starts it -> subprocess.CompletedProcess with its texts."""
    argv = [sys.executable, str(path), *map(str, flags)]
    options = dict(env=ENV, capture_output=True, text=True, timeout=120)
    return subprocess.run(argv, **options | kwargs)

def read_rows(out_dir):
    return [json.loads(line) for line in Path(out_dir, "metrics.jsonl").read_text().splitlines()]

DRIVER = """
import json, os, runpy, sys
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # the ranks of each run meet at its own port
script = sys.argv[1]
for port, argv in json.loads(sys.argv[2]):
    os.environ["MASTER_PORT"] = str(port)
    sys.argv = [flag.replace("{rank}", os.environ["RANK"]) for flag in argv]
    runpy.run_path(script, run_name="__main__")
"""

def port_is_free(port):
    with socket.socket() as each:
        return each.connect_ex(("127.0.0.1", port)) != 0

def launch(ranks, folder, *runs, script=ROOT / "rpo.py"):
    """
    Several runs of the trainer, or of a changed copy, one after another in one torchrun, which
    takes seconds to start. In a run's flags, {rank} becomes the number of the rank.
    """
    # below the ports that a system gives to outgoing connections, such as those of earlier runs
    candidates = random.Random(os.getpid()).sample(range(10000, 32000), 1000)
    ports = list(itertools.islice(filter(port_is_free, candidates), len(runs)))
    driver = Path(folder, "driver.py")
    driver.write_text(DRIVER)
    argv = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
        str(ranks), str(driver), str(script), json.dumps(list(zip(ports, runs)))]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen(argv, env=ENV, text=True, **pipes)
    try:
        out, err = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        # ranks wait for each other; torchrun, asked to end, ends them, too
        process.terminate()
        raise AssertionError("hangs: " + process.communicate()[1][-3000:])
    return subprocess.CompletedProcess(argv, process.returncode, out, err)

# ------------------------------------------------------------------------------------------------
# comparing runs

# the numbers of a row that may differ between equal runs
TIMINGS = ("tokens_per_second", "peak_memory_gib")

# float32 sums of another order differ by about 1e-7 of their size. AdamW divides by sqrt(v), so a
# weight whose gradient is small against that noise still moves by about the learning rate, 0.01
# here: after six steps single weights were seen to differ by 1e-4, the rows by 2e-5, the mean
# weight by 1e-7. CLOSE holds for rows, ten times CLOSE for the worst weight, a tenth for the mean.
CLOSE = 1e-4

def assert_close_weights(found, wanted, tolerance=CLOSE):
    """Two dictionaries of tensors; with tolerance 0 they are equal to the last bit."""
    assert found.keys() == wanted.keys()
    for key in found:
        assert found[key].shape == wanted[key].shape
        assert found[key].dtype == wanted[key].dtype
        off = (found[key] - wanted[key]).abs()
        scale = max(1, wanted[key].abs().max())
        assert off.max() <= 10 * tolerance * scale, (key, off.max())
        assert off.mean() <= tolerance / 10 * scale, (key, off.mean())

def assert_same_rows(found, wanted, tolerance=CLOSE):
    """Two lists of rows, timings apart; with tolerance 0 they are equal to the last bit."""
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for row, other in zip(found, wanted):
        assert row.keys() == other.keys()
        for key in row.keys() - set(TIMINGS):
            # noise makes of a tie a win or a loss
            if tolerance and key.endswith("accuracies"):
                continue
            difference = abs(row[key] - other[key])
            allowed = tolerance * max(1, abs(other[key]))
            assert difference <= allowed, (row["step"], key, row[key], other[key])

def assert_same_run(out_dir, other, tolerance=CLOSE):
    """The same rows, and the same weights and moments in final/."""
    assert_same_rows(read_rows(out_dir), read_rows(other), tolerance)
    for name in ("model.safetensors", "optimizer.safetensors"):
        found = load_file(Path(out_dir, "final", name))
        wanted = load_file(Path(other, "final", name))
        assert_close_weights(found, wanted, tolerance)

def contents(folder):
    """{file: digest} of a whole folder, to see whether anything was touched."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

def copy_data(world, folder):
    return shutil.copytree(world.data, folder)
