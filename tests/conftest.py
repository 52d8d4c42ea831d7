"""A tiny random model, pairs of unequal lengths, and two ways to run the trainer: in this process and on gloo ranks."""
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import rpo  # noqa: E402

torch.set_num_threads(1)  # runs are compared bit for bit, and thread counts change the last bits
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}

SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>"]  # ids 0 to 5
WORDS = [f"w{i}" for i in range(6, 48)]  # the word "w17" has id 17
TEMPLATE = ("{{ bos_token }}{% for turn in messages %}<|{{ turn['role'] }}|> {{ turn['content'] }} </s>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")

def word_tokenizer(**kwargs):
    """One token a word: ids can be read off the text."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIALS + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>") | kwargs
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, extra_special_tokens=SPECIALS[4:], **names)
    tokenizer.chat_template = TEMPLATE
    return tokenizer

def tiny_llama(seed=0, **kwargs):
    """Weights large enough for every token to matter, so that a wrong mask or position shows in the first digits."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return LlamaForCausalLM(LlamaConfig(**sizes | kwargs))

def save_model(path, seed=0, tokenizer=None, **kwargs):
    tiny_llama(seed, **kwargs).save_pretrained(path)
    (tokenizer or word_tokenizer()).save_pretrained(path)
    return str(path)

def random_records(n, seed, baseline=False):
    """Messages; prompts of 1 to 12 words, every third with an earlier turn, responses of 1 to 9 words."""
    rng = random.Random(seed)
    say = lambda role, most: {"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(1, most)))}
    records = []
    for i in range(n):
        history = [say("user", 4), say("assistant", 4)] if i % 3 == 0 else []
        record = {"prompt": history + [say("user", 12)], "chosen": [say("assistant", 9)],
                  "rejected": [say("assistant", 9)]}
        records.append(record | ({"baseline": [say("assistant", 5)]} if baseline and i % 2 else {}))
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
    Folders model, data (17 training pairs: with 8 a step, the third step of an epoch has one pair, fewer than there are
    ranks; 3 held-out pairs, fewer than four ranks) and with_baseline, in which half the pairs carry a baseline.
    """
    root = tmp_path_factory.mktemp("world")
    for name, baseline in (("data", False), ("with_baseline", True)):
        write_jsonl(root / name / "train.jsonl", random_records(17, 1, baseline))
        write_jsonl(root / name / "test.jsonl", random_records(3, 2, baseline))
    return SimpleNamespace(root=root, model=save_model(root / "model"), data=str(root / "data"),
                           with_baseline=str(root / "with_baseline"))

def command(world, out_dir, *flags, data=None):
    """Two epochs of three steps with hard updates; a later flag overrides an earlier one."""
    return [str(flag) for flag in (
        "rpo.py", "--model", world.model, "--data", data or world.data, "--out_dir", out_dir, "--batch_size", 8,
        "--epochs", 2, "--learning_rate", 0.01, "--beta", 0.5, "--eta", 0.5, "--eval_every", 2, "--save_every", 2,
        *flags)]

def run(*argv):
    """The trainer in this process -> the rows of metrics.jsonl."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(argv))
        try:
            rpo.main()
        finally:
            for bar in list(getattr(tqdm, "_instances", [])):
                bar.close()  # a run that was refused leaves its bars open, and those of the next would stand below
            if dist.is_initialized():
                dist.destroy_process_group()
    return read_rows(argv[argv.index("--out_dir") + 1])

def read_rows(out_dir):
    return [json.loads(line) for line in Path(out_dir, "metrics.jsonl").read_text().splitlines()]

DRIVER = """
import json, os, sys
import rpo
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # the ranks of each run meet at its own port
for port, argv in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)
    sys.argv = [flag.replace("{rank}", os.environ["RANK"]) for flag in argv]
    rpo.main()
"""

def port_is_free(port):
    with socket.socket() as each:
        return each.connect_ex(("127.0.0.1", port)) != 0

def launch(ranks, folder, *runs):
    """Several runs of the trainer one after another in one torchrun, which takes seconds to start."""
    # a free port for each, below those that a system gives to outgoing connections, such as those of the runs before
    ports = (port for port in random.sample(range(10000, 32000), 1000) if port_is_free(port))
    ports = list(itertools.islice(ports, len(runs)))
    driver = Path(folder, "driver.py")
    driver.write_text(DRIVER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    process = subprocess.Popen([*torchrun, driver, json.dumps(list(zip(ports, runs)))], env=ENV, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:  # ranks that wait for each other; torchrun, asked to end, ends them, too
        process.terminate()
        raise AssertionError("hangs:" + process.communicate()[1][-3000:])
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)

def copy_data(world, folder):
    """The same pairs without the reference cache of other runs."""
    return shutil.copytree(world.data, folder, ignore=shutil.ignore_patterns("ref_logps"))
