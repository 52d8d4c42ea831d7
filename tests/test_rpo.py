"""
rpo.py, from a pair's text to the weights of a resumed run. Numbers are held against plain code of this file, which
takes full logits of one response at a time, and against values worked by hand.
"""
import copy
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

import rpo
from conftest import (ENV, ROOT, command, copy_data, launch, random_records, read_rows, run, save_model, tiny_llama,
                      word_tokenizer, write_jsonl)

TIMINGS = ("tokens_per_second", "peak_memory_gib")  # the only numbers of a row that may differ between equal runs

# ----------------------------------------------------------------------------------------------------------------------
# the loss

def loss_by_numpy(policy, ref, lengths, beta, eta, sft, baseline=None):
    """The two formulas of the paper, written apart from rpo.py, in float64."""
    policy, ref = np.asarray(policy, np.float64), np.asarray(ref, np.float64)
    h = (policy[:, 0] - ref[:, 0]) - (policy[:, 1] - ref[:, 1])
    imitated = policy[:, 0] if baseline is None else np.asarray(baseline, np.float64)
    weight = eta * beta if sft == "sum" else eta / np.asarray(lengths, np.float64)
    return np.logaddexp(0, -beta * h), -weight * imitated

def random_logps(seed=0, n=7):
    draw = torch.Generator().manual_seed(seed)
    logps = lambda *shape: -40 * torch.rand(*shape, generator=draw, dtype=torch.float64)
    return logps(n, 2), logps(n, 2), torch.randint(1, 30, (n,), generator=draw), logps(n)

@pytest.mark.parametrize("sft", ["sum", "mean"])
@pytest.mark.parametrize("with_baseline", [False, True])
def test_loss_is_the_papers(sft, with_baseline):
    """Both forms, DPO and SFT apart and together, against the formulas in numpy."""
    policy, ref, lengths, baseline = random_logps()
    baseline = baseline if with_baseline else None
    losses, metrics = rpo.rpo_loss(policy, ref, lengths, beta=0.3, eta=0.7, sft=sft, baseline_logps=baseline)
    dpo, nll = loss_by_numpy(policy, ref, lengths, 0.3, 0.7, sft, baseline)
    assert losses.shape == (7,)
    np.testing.assert_allclose(losses, dpo + nll, rtol=1e-13)
    np.testing.assert_allclose(metrics["loss/dpo"], dpo, rtol=1e-13)
    np.testing.assert_allclose(metrics["loss/sft"], nll, rtol=1e-13)
    np.testing.assert_allclose(metrics["loss"], losses, rtol=0)
    imitated = policy[:, 0] if baseline is None else baseline
    np.testing.assert_allclose(metrics["nll_per_token"], -imitated / lengths, rtol=1e-13)

@pytest.mark.parametrize("sft, loss_sft", [("sum", 1.0), ("mean", 0.5)])
def test_loss_by_hand(sft, loss_sft):
    """
    One pair: log pi = -10 (chosen), -12 (rejected); log ref = -11, -11; 4 chosen tokens; beta 0.5, eta 0.2.
    h = (-10 + 11) - (-12 + 11) = 2, beta h = 1, -log sigmoid(1) = log(1 + 1/e) = 0.3132617.
    sum: 0.2 * 0.5 * 10 = 1, mean: 0.2 * 10 / 4 = 0.5.
    """
    losses, metrics = rpo.rpo_loss(torch.tensor([[-10.0, -12.0]]), torch.tensor([[-11.0, -11.0]]), torch.tensor([4]),
                                   beta=0.5, eta=0.2, sft=sft)
    expected = {"loss": 0.3132617 + loss_sft, "loss/dpo": 0.3132617, "loss/sft": loss_sft, "rewards/chosen": 0.5,
                "rewards/rejected": -0.5, "rewards/margins": 1.0, "rewards/accuracies": 1.0, "logps/chosen": -10.0,
                "logps/rejected": -12.0, "logps/chosen_vs_ref": 1.0, "logps/rejected_vs_ref": -1.0,
                "nll_per_token": 2.5}
    assert {key: value.item() for key, value in metrics.items()} == pytest.approx(expected, abs=1e-6)
    assert losses.item() == pytest.approx(expected["loss"], abs=1e-6)
    assert set(expected) == set(rpo.METRICS)

@pytest.mark.parametrize("sft", ["sum", "mean"])
def test_loss_gradients(sft):
    """Automatic gradients against finite differences, of all log-probs that a policy gives."""
    policy, ref, lengths, baseline = random_logps(1)
    def loss(policy, baseline):
        return rpo.rpo_loss(policy, ref, lengths, beta=0.2, eta=0.7, sft=sft, baseline_logps=baseline)[0]
    policy.requires_grad_()
    assert torch.autograd.gradcheck(lambda policy: loss(policy, None), policy)
    assert torch.autograd.gradcheck(loss, (policy, baseline.requires_grad_()))

@pytest.mark.parametrize("sft", ["sum", "mean"])
def test_eta_zero_is_dpo(sft):
    """DPO's gradient is beta sigmoid(-beta h), down on the chosen side and up on the rejected one, and no more."""
    policy, ref, lengths, _ = random_logps(2)
    policy.requires_grad_()
    losses, metrics = rpo.rpo_loss(policy, ref, lengths, beta=0.1, eta=0, sft=sft)
    losses.sum().backward()
    h = (policy - ref).detach() @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    push = 0.1 * torch.sigmoid(-0.1 * h)
    torch.testing.assert_close(policy.grad, torch.stack([-push, push], 1), rtol=1e-12, atol=0)
    assert not metrics["loss/sft"].any() and torch.equal(losses, metrics["loss/dpo"])

def test_what_beta_and_length_weigh():
    """beta scales the SFT term of 'sum' and not that of 'mean'; the length divides in 'mean' and not in 'sum'."""
    policy, ref, lengths, _ = random_logps(3)
    part = lambda sft, beta=0.1, times=1: rpo.rpo_loss(policy, ref, times * lengths, beta=beta, eta=0.5,
                                                       sft=sft)[1]["loss/sft"]
    torch.testing.assert_close(part("sum", beta=0.2), 2 * part("sum"))
    torch.testing.assert_close(part("mean", beta=0.2), part("mean"))
    torch.testing.assert_close(part("sum", times=2), part("sum"))
    torch.testing.assert_close(part("mean", times=2), part("mean") / 2)

def test_beta_zero_is_sft():
    """With beta 0 the preference part is the constant log 2, so that 'mean' is SFT alone."""
    policy, ref, lengths, _ = random_logps(4)
    losses, _ = rpo.rpo_loss(policy, ref, lengths, beta=0, eta=1, sft="mean")
    torch.testing.assert_close(losses, math.log(2) - policy[:, 0] / lengths)

def test_baseline_takes_the_sft_term_alone():
    """SFT moves to the baseline, the preference part stays on the pair."""
    policy, ref, lengths, baseline = random_logps(5)
    policy.requires_grad_(), baseline.requires_grad_()
    losses, metrics = rpo.rpo_loss(policy, ref, lengths, beta=0.1, eta=3, baseline_logps=baseline)
    losses.sum().backward()
    assert torch.equal(metrics["loss/dpo"], rpo.rpo_loss(policy, ref, lengths, beta=0.1, eta=0)[0].detach())
    torch.testing.assert_close(baseline.grad, torch.full((7,), -0.3, dtype=torch.float64))
    torch.testing.assert_close(policy.grad.sum(1), torch.zeros(7, dtype=torch.float64))  # no NLL on the chosen side

def test_accuracy_of_a_tie_and_huge_margins():
    """A tie counts half, so an untouched policy shows 0.5; a huge loss is a number, not infinity."""
    policy = torch.tensor([[-5.0, -5.0], [-4.0, -5.0], [-5.0, -4.0], [-1e4, 0.0]])
    losses, metrics = rpo.rpo_loss(policy, torch.full((4, 2), -5.0), torch.ones(4), beta=1.0, eta=0.0)
    assert metrics["rewards/accuracies"].tolist() == [0.5, 1, 0, 0]
    assert losses[0].item() == pytest.approx(math.log(2)) and losses[3].item() == pytest.approx(1e4)

def test_loss_refuses_other_forms_and_detaches():
    """A misspelt form must not train something; metrics must not keep the graph of a step alive."""
    policy, ref, lengths, _ = random_logps(6)
    with pytest.raises(KeyError):
        rpo.rpo_loss(policy, ref, lengths, beta=0.1, eta=1, sft="average")
    losses, metrics = rpo.rpo_loss(policy.requires_grad_(), ref, lengths, beta=0.1, eta=1)
    assert losses.requires_grad and not any(value.requires_grad for value in metrics.values())

# ----------------------------------------------------------------------------------------------------------------------
# text to token ids

U, A, S = (lambda text, role=role: {"role": role, "content": text} for role in ("user", "assistant", "system"))
CHATML = ("{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{{ turn['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
CORPUS = ["user assistant system", "the costs are $46 and $7", "Q: what are the costs?\nA: $46\n", "end stop yes no",
          "one two three four five six seven eight nine ten"] * 5

@pytest.fixture(scope="session")
def bpe():
    """
    A byte-level BPE in the style of SmolLM2: <|im_end|> is both end-of-turn token and pad, the template writes a
    newline behind it, and "A: $" has a token " $" where "A: " alone ends in a token " ".
    """
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=420, special_tokens=specials, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<|im_start|>", eos_token="<|im_end|>",
                                        pad_token="<|im_end|>", unk_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer

def adding_bos(tokenizer):
    """The same tokenizer, now one that puts a BOS before every text by itself, as Llama's does."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    assert tokenizer("w9").input_ids == [1, 9]
    return tokenizer

def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids

def test_conversation_ids(tokenizer):
    """The exact ids of a multi-turn conversation: BOS once, earlier assistant turns are prompt, one end token each."""
    record = {"prompt": [U("w10 w11"), A("w12"), U("w13")], "chosen": [A("w12")], "rejected": [A("w14 w15")]}
    assert rpo.tokenize_pair(record, tokenizer, 0, 0) == {
        "prompt": [1, 4, 10, 11, 2, 5, 12, 2, 4, 13, 2, 5],  # <s> <|user|> w10 w11 </s> <|assistant|> w12 </s> ...
        "chosen": [12, 2],
        "rejected": [14, 15, 2]}
    record["baseline"] = [A("w16")]
    assert rpo.tokenize_pair(record, tokenizer, 0, 0)["baseline"] == [16, 2]
    assert rpo.tokenize_pair(record, adding_bos(tokenizer), 0, 0)["prompt"][:3] == [1, 4, 10]  # the template's BOS only

def test_conversation_to_tensors(tokenizer):
    """What is scored in the end, through collate: the last turn's tokens and end token, each predicted one before."""
    record = {"prompt": [U("w10"), A("w12"), U("w13")], "chosen": [A("w20 w21")], "rejected": [A("w30")]}
    pair = rpo.tokenize_pair(record, tokenizer, 0, 0)
    batch = rpo.collate([pair], tokenizer.pad_token_id)
    # place            0  1  2   3  4  5   6  7  8   9  10 | 11  12  13 | 14  15
    ids = torch.tensor([[1, 4, 10, 2, 5, 12, 2, 4, 13, 2, 5, 20, 21, 2, 30, 2]])
    assert torch.equal(batch["input_ids"], ids)
    assert batch["target"].tolist() == [20, 21, 2, 30, 2]
    assert batch["place"].tolist() == [10, 11, 12, 10, 14]
    assert batch["side"].tolist() == [0, 0, 0, 1, 1]

def test_string_ids(tokenizer):
    """Raw text: BOS once where the tokenizer would add it, also when the text brings its own; EOS once; no template."""
    record = {"prompt": "w10 w11 ", "chosen": "w12", "rejected": "w13 w14"}
    without = {"prompt": [10, 11], "chosen": [12, 2], "rejected": [13, 14, 2]}
    assert rpo.tokenize_pair(record, tokenizer, 0, 0) == without
    assert rpo.tokenize_pair(record, adding_bos(tokenizer), 0, 0) == without | {"prompt": [1, 10, 11]}
    record["prompt"] = "<s> w10 w11 "
    assert rpo.tokenize_pair(record, adding_bos(tokenizer), 0, 0) == without | {"prompt": [1, 10, 11]}

def test_end_token_once_when_it_is_the_pad(bpe):
    """SmolLM2's habits: the end token, also the pad, is scored once and last; the template's newline is not scored."""
    record = {"prompt": [S("the costs"), U("yes"), A("no"), U("what")], "chosen": [A("seven eight")],
              "rejected": [A("nine\n")]}
    pair = rpo.tokenize_pair(record, bpe, 0, 0)
    end, newline = ids_of(bpe, "<|im_end|>\n")
    assert end == bpe.pad_token_id == bpe.eos_token_id and ids_of(bpe, "\n") == [newline]
    assert pair["chosen"] == ids_of(bpe, "seven eight") + [end]
    assert pair["rejected"] == ids_of(bpe, "nine\n") + [end]
    assert bpe.decode(pair["prompt"]) == ("<|im_start|>system\nthe costs<|im_end|>\n<|im_start|>user\nyes<|im_end|>\n"
                                          "<|im_start|>assistant\nno<|im_end|>\n<|im_start|>user\nwhat<|im_end|>\n"
                                          "<|im_start|>assistant\n")
    for shared in (True, False):  # padding has the end token's id too: it must not count
        batch = rpo.collate([pair, {"prompt": [5], "chosen": [6, end], "rejected": [7, end]}], end, shared)
        scored = Counter(zip(batch["pair"].tolist(), batch["side"].tolist(), (batch["target"] == end).tolist()))
        assert all(scored[b, k, True] == 1 for b in (0, 1) for k in (0, 1))
        others = [scored[b, k, False] for b in (0, 1) for k in (0, 1)]
        assert others == [len(pair["chosen"]) - 1, len(pair["rejected"]) - 1, 1, 1]

@pytest.mark.parametrize("response", ["end", "im_end", "|", ">", "yes |>", "<|"])
def test_response_that_is_part_of_the_end_token(bpe, response):
    """An answer spelt like a piece of the end-of-turn token, which stands right behind it, is an answer like others."""
    record = {"prompt": [U("what")], "chosen": [A(response)], "rejected": [A("no")]}
    pair = rpo.tokenize_pair(record, bpe, 0, 0)
    assert isinstance(pair, dict), pair
    assert pair["chosen"] == ids_of(bpe, response) + [bpe.eos_token_id]

def test_end_token_of_the_template(bpe):
    """A template's end-of-turn token is scored where it is not the EOS; EOS is added where the template ends none."""
    other = copy.deepcopy(bpe)
    other.eos_token = "<|endoftext|>"
    record = {"prompt": [U("what")], "chosen": [A("yes")], "rejected": [A("no")]}
    assert rpo.tokenize_pair(record, other, 0, 0)["chosen"] == ids_of(bpe, "yes<|im_end|>")
    other.chat_template = ("{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}\n{% endfor %}"
                           "{% if add_generation_prompt %}assistant:{% endif %}")
    pair = rpo.tokenize_pair(record, other, 0, 0)
    assert other.decode(pair["prompt"]) == "user: what\nassistant:"
    assert pair["chosen"] == ids_of(bpe, " yes<|endoftext|>") and pair["rejected"] == ids_of(bpe, " no<|endoftext|>")

@pytest.mark.parametrize("chosen, rejected", [("$46", "$7"), ("$46", "nine"), ("yes", "$46"), ("$46", "\nno")])
def test_token_across_the_boundary(bpe, chosen, rejected):
    """Where prompt and response share a token, nothing is lost and the prompt is the same for both sides."""
    prompt = "Q: what are the costs?\nA: "
    assert ids_of(bpe, prompt + "$46") != ids_of(bpe, prompt) + ids_of(bpe, "$46")  # the trap is set
    pair = rpo.tokenize_pair({"prompt": prompt, "chosen": chosen, "rejected": rejected}, bpe, 0, 0)
    assert pair["prompt"] == ids_of(bpe, prompt)[:-1]  # all but " "
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        assert pair["prompt"] + pair[side] == ids_of(bpe, prompt + text + "<|im_end|>")
        assert bpe.decode(pair["prompt"] + pair[side]) == prompt + text + "<|im_end|>"

def test_long_prompts_are_cut_from_the_left(tokenizer):
    """The end of the prompt stays, and BOS before it; responses are whole; the limit itself is allowed."""
    record = {"prompt": "w10 w11 w12 w13 w14 w15 ", "chosen": "w20 w21", "rejected": "w22"}
    responses = {"chosen": [20, 21, 2], "rejected": [22, 2]}
    assert rpo.tokenize_pair(record, adding_bos(tokenizer), 0, 4) == {"prompt": [1, 13, 14, 15], "cut": 3} | responses
    assert rpo.tokenize_pair(record, tokenizer, 0, 4) == {"prompt": [12, 13, 14, 15], "cut": 2} | responses
    assert rpo.tokenize_pair(record, tokenizer, 0, 6) == {"prompt": [10, 11, 12, 13, 14, 15]} | responses
    record = {"prompt": [U("w10 w11 w12 w13")], "chosen": [A("w20")], "rejected": [A("w22")]}
    pair = rpo.tokenize_pair(record, tokenizer, 0, 5)  # 8 tokens: <s> <|user|> w10 w11 w12 w13 </s> <|assistant|>
    assert pair == {"prompt": [1, 12, 13, 2, 5], "chosen": [20, 2], "rejected": [22, 2], "cut": 3}

@pytest.mark.parametrize("chosen, rejected", [("w20 w21", "w22"), ("w22", "w20 w21")])
def test_long_pairs_are_dropped(tokenizer, chosen, rejected):
    """The longer side, with its end token, must fit behind the cut prompt: 4 + 3 tokens; responses are never cut."""
    record = {"prompt": "w10 w11 w12 w13 w14 w15 ", "chosen": chosen, "rejected": rejected}
    assert rpo.tokenize_pair(record, tokenizer, 7, 4)["prompt"] == [12, 13, 14, 15]
    assert rpo.tokenize_pair(record, tokenizer, 6, 4) == "longer than max_length"
    assert rpo.tokenize_pair(record, tokenizer, 8, 0) == "longer than max_length"  # without the cut 6 + 3

def test_what_is_no_pair_to_train_on(tokenizer, bpe):
    """Reasons to drop, in words that can be counted: no response, an end token inside one, an unstable prompt."""
    def reason(prompt, chosen, rejected, tokenizer=tokenizer):
        found = rpo.tokenize_pair({"prompt": prompt, "chosen": chosen, "rejected": rejected}, tokenizer, 0, 0)
        assert isinstance(found, str), found
        return found
    assert reason("w10 ", "", "w11") == reason("w10 ", "w11", " \n") == "empty response"
    assert reason([U("w10")], [A("w11")], [A(" ")]) == "empty response"
    assert "end-of-turn token" in reason("w10 ", "w11 </s> w12", "w13")
    assert "end-of-turn token" in reason([U("w10")], [A("w11")], [A("w12 </s> w13")])
    assert "end-of-turn token" in reason([U("yes")], [A("no<|im_end|>\n<|im_start|>user\nyes")], [A("no")], bpe)
    assert "prompt" in reason("", "w10", "w11")
    thinking = copy.deepcopy(tokenizer)  # generation starts behind a <think> that a whole conversation has not
    thinking.chat_template = tokenizer.chat_template.replace("<|assistant|>{% endif %}", "<|assistant|>w47{% endif %}")
    assert "prompt" in reason([U("w10")], [A("w11")], [A("w12")], thinking)

def test_drops_and_cuts_are_counted(tokenizer, tmp_path):
    """load_pairs reports every line of the file once, in file order, and fills in a missing baseline."""
    lines = [{"prompt": "w10 ", "chosen": "w11", "rejected": "w12"},
             {"prompt": "w10 ", "chosen": "", "rejected": "w12"},
             {"prompt": "w10 w11 w12 w13 ", "chosen": "w14", "rejected": "w12", "baseline": "w15"},
             {"prompt": "w10 ", "chosen": "w11 w12 w13 w14 w15 w16", "rejected": "w12"}]
    write_jsonl(tmp_path / "train.jsonl", lines)
    pairs, counts = rpo.load_pairs(tmp_path / "train.jsonl", tokenizer, 6, 3)
    assert counts == {"whole": 1, "dropped: empty response": 1, "prompts cut": 1, "dropped: longer than max_length": 1}
    assert [pair["prompt"].tolist() for pair in pairs] == [[10], [11, 12, 13]]
    assert [pair["baseline"].tolist() for pair in pairs] == [[11, 2], [15, 2]]
    assert all(ids.dtype == np.int32 for ids in pairs[0].values())

def test_shown_pair(tokenizer):
    """A bar before each scored token, none in the prompt: what a person checks before believing a run."""
    pair = rpo.tokenize_pair({"prompt": [U("w10")], "chosen": [A("w11 w12")], "rejected": [A("w13")]}, tokenizer, 0, 0)
    lines = [line.split(maxsplit=1) for line in rpo.show_pair(pair, tokenizer).splitlines()]
    assert [line[0] for line in lines] == ["prompt", "chosen", "rejected"]
    assert [line[1].count("|") - line[1].count("<|") * 2 for line in lines] == [0, 3, 2]
    assert lines[1][1].replace(" ", "") == "|w11|w12|</s>"

# ----------------------------------------------------------------------------------------------------------------------
# token ids to tensors

PAIRS = [{"prompt": [5, 6, 7], "chosen": [8, 9], "rejected": [10, 2], "baseline": [11, 12, 2]},
         {"prompt": [5], "chosen": [6, 2], "rejected": [2], "baseline": [6, 2]}]

def test_shared_rows():
    """One row a pair, written out: responses restart behind the prompt, their first tokens are predicted at its end."""
    batch = rpo.collate(PAIRS, 0)
    expected = dict(
        input_ids=[[5, 6, 7, 8, 9, 10, 2, 11, 12, 2], [5, 6, 2, 2, 6, 2, 0, 0, 0, 0]],
        attention_mask=[[1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0, 0, 0]],
        position_ids=[[0, 1, 2, 3, 4, 3, 4, 3, 4, 5], [0, 1, 2, 1, 1, 2, 0, 0, 0, 0]],
        branch=[[0, 0, 0, 1, 1, 2, 2, 3, 3, 3], [0, 1, 1, 2, 3, 3, -1, -1, -1, -1]],
        target=[8, 9, 10, 2, 11, 12, 2, 6, 2, 2, 6, 2],
        row=[0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1],
        place=[2, 3, 2, 5, 2, 7, 8, 0, 1, 0, 0, 4],
        pair=[0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1],
        side=[0, 0, 1, 1, 2, 2, 2, 0, 0, 1, 2, 2])
    assert {key: batch[key].tolist() for key in expected} == expected
    assert batch["logps"].shape == (2, 3)
    assert [rpo.row_length(pair, True) for pair in PAIRS] == [10, 6]

def test_separate_rows():
    """One row a response, for models on which shared prompts are not exact; the model counts positions itself."""
    batch = rpo.collate([{key: pair[key] for key in ("prompt", "chosen", "rejected")} for pair in PAIRS], 0, False)
    expected = dict(
        input_ids=[[5, 6, 7, 8, 9], [5, 6, 7, 10, 2], [5, 6, 2, 0, 0], [5, 2, 0, 0, 0]],
        attention_mask=[[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]],
        target=[8, 9, 10, 2, 6, 2, 2],
        row=[0, 0, 1, 1, 2, 2, 3],
        place=[2, 3, 2, 3, 0, 1, 0],
        pair=[0, 0, 0, 0, 1, 1, 1],
        side=[0, 0, 1, 1, 0, 0, 1])
    assert {key: batch[key].tolist() for key in expected} == expected
    assert "position_ids" not in batch and batch["logps"].shape == (2, 2)
    assert rpo.row_length(PAIRS[0], False) == 3 * (3 + 3)

# ----------------------------------------------------------------------------------------------------------------------
# log-probs

def plain_logp(model, pair, side):
    """A response's log-prob from the full logits of one plain row, by the definition."""
    ids = torch.tensor([[*pair["prompt"], *pair[side]]])
    logps = model(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return logps[len(pair["prompt"]) - 1:].sum()

def random_pairs(n=4, seed=0, baseline=True):
    """Ids at random, in prompts and responses of unequal lengths."""
    rng = random.Random(seed)
    ids = lambda most: rng.choices(range(3, 48), k=rng.randint(1, most))
    return [{"prompt": ids(9), "chosen": ids(7), "rejected": ids(7), **({"baseline": ids(4)} if baseline else {})}
            for _ in range(n)]

def grads(model, value):
    model.zero_grad()
    value.backward()
    return {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}

@pytest.mark.parametrize("shared", [True, False])
def test_log_probs_and_gradients_are_the_plain_ones(shared, monkeypatch):
    """Shared rows, padding and chunks change no value and no gradient, up to float32 rounding."""
    model, pairs = tiny_llama(), random_pairs()
    weights = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = torch.stack([torch.stack([plain_logp(model, pair, side) for side in rpo.SIDES]) for pair in pairs])
    expected = grads(model, (weights * plain).sum())
    apply = rpo.TokenLogps.apply
    monkeypatch.setattr(rpo.TokenLogps, "apply", lambda *args: apply(*args[:-1], 4))  # four positions a chunk
    logps = rpo.PairLogps(model)(rpo.collate(pairs, 0, shared))
    torch.testing.assert_close(logps.double(), plain, rtol=1e-5, atol=1e-5)
    found = grads(model, (weights * logps).sum())
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=5e-5, msg=lambda m: f"{key}: {m}")

@pytest.mark.parametrize("shared", [True, False])
def test_padding_does_not_matter(shared):
    """A pair's neighbours, their padding and its token do not matter; pairs and sides come back in order."""
    model, pairs = tiny_llama(), random_pairs(6, seed=1)
    module = rpo.PairLogps(model)
    logps = module(rpo.collate(pairs, 0, shared))
    assert logps.shape == (6, 3) and logps.dtype == torch.float32
    alone = torch.cat([module(rpo.collate([pair], 0, shared)) for pair in pairs])
    torch.testing.assert_close(alone, logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module(rpo.collate(pairs, 17, shared)), logps, rtol=1e-6, atol=1e-6)  # pad by any token

@pytest.mark.parametrize("shared", [True, False])
def test_the_prompt_gets_no_sft_loss(shared):
    """
    A forgotten prompt mask is invisible to DPO, where it cancels, and wrong for SFT. The gradient must be that of full
    logits under a mask of the chosen response, which is far from the one without a mask; and the final hidden states
    that get a gradient must be those that predict a response token: none before the prompt's last.
    """
    model, pairs = tiny_llama().double(), random_pairs(baseline=False)
    def plain(masked):
        losses = []
        for pair in pairs:
            ids = torch.tensor([[*pair["prompt"], *pair["chosen"]]])
            nll = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            mask = torch.arange(1, ids.size(1)) >= len(pair["prompt"]) if masked else torch.ones(ids.size(1) - 1)
            losses.append((nll * mask).sum() / len(pair["chosen"]))
        return grads(model, torch.stack(losses).mean())
    hidden = []
    model.model.register_forward_hook(lambda module, args, out: (out[0].retain_grad(), hidden.append(out[0]))[1])
    with_mask, without_mask = plain(True), plain(False)
    hidden.clear()
    batch = rpo.collate(pairs, 0, shared)
    lengths = torch.tensor([len(pair["chosen"]) for pair in pairs])
    logps = rpo.PairLogps(model)(batch)
    losses, _ = rpo.rpo_loss(logps, logps.detach(), lengths, beta=0, eta=1, sft="mean")
    found = grads(model, losses.mean())
    for key in found:
        torch.testing.assert_close(found[key], with_mask[key], rtol=1e-7, atol=1e-9, msg=lambda m: f"{key}: {m}")
    distance = lambda some: sum((found[key] - some[key]).square().sum() for key in found).sqrt()
    assert distance(without_mask) > 0.3 * distance({key: 0 for key in found})
    touched = hidden[0].grad.abs().sum(-1) > 0  # (R, T)
    for b, pair in enumerate(pairs):
        P, C = len(pair["prompt"]), len(pair["chosen"])
        row = touched[b if shared else 2 * b].tolist()
        assert row == [P - 1 <= t < P + C - 1 for t in range(len(row))]

def test_no_dropout_and_float32(tmp_path):
    """Dropout would make the log-ratio random; it is off in the config, so train mode may stay on for checkpointing."""
    config = transformers.GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.5, embd_pdrop=0.5,
                                     attn_pdrop=0.5, bos_token_id=1, eos_token_id=2)
    transformers.GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path)
    model = rpo.load_model(str(tmp_path)).train()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids = torch.arange(3, 20)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)

# ----------------------------------------------------------------------------------------------------------------------
# pairs to steps

def test_global_batches():
    """One permutation for all ranks: each pair once an epoch, the tail kept, other orders by epoch and by seed."""
    batches = rpo.global_batches(21, 8, 42, 0)
    assert [len(batch) for batch in batches] == [8, 8, 5]
    assert sorted(sum(batches, [])) == list(range(21)) and sum(batches, []) != list(range(21))
    torch.rand(3)  # the global generator has no say
    assert rpo.global_batches(21, 8, 42, 0) == batches
    orders = {(seed, epoch): tuple(sum(rpo.global_batches(21, 8, seed, epoch), [])) for seed in (41, 42, 43)
              for epoch in (0, 1, 2)}
    assert len(set(orders.values())) == 9  # also (42, 1) and (43, 0), which seed + epoch would confuse

@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("max_tokens", [1, 50, 200, 10**6])
def test_micro_batches(world_size, max_tokens):
    """Each pair once over all ranks, as many passes on each rank, the budget kept, stand-ins of weight 0."""
    rng = random.Random(0)
    for n in (1, 2, 7, 8, 17):
        batch, lengths = rng.sample(range(40), n), [rng.randint(5, 60) for _ in range(40)]
        ranks = [list(rpo.micro_batches(batch, lengths, max_tokens, rank, world_size)) for rank in range(world_size)]
        assert len({len(passes) for passes in ranks}) == 1
        weights = Counter()
        for indices, weight in (one for passes in ranks for one in passes):
            assert indices and weight in (0.0, 1.0)
            assert len(indices) == 1 or len(indices) * max(lengths[i] for i in indices) <= max_tokens
            weights.update({i: weight for i in indices})
        assert weights == Counter({i: 1.0 for i in batch}) | Counter({i: 0 for i in weights})
        order = [lengths[i] for i in sum((indices for indices, _ in ranks[0]), [])]
        assert order == sorted(order, reverse=True)  # the longest first: running out of memory shows at once

def test_micro_batches_by_hand():
    """Lengths 5, 9, 7, 6 under 14 tokens, two ranks: rows of 9 fit once each, then those of 6 twice."""
    lengths = [5, 9, 7, 6]
    assert list(rpo.micro_batches(range(4), lengths, 14, 0, 2)) == [([1], 1.0), ([3], 1.0)]
    assert list(rpo.micro_batches(range(4), lengths, 14, 1, 2)) == [([2], 1.0), ([0], 1.0)]
    assert list(rpo.micro_batches(range(4), lengths, 18)) == [([1, 2], 1.0), ([3, 0], 1.0)]
    assert list(rpo.micro_batches([2], lengths, 18, 1, 2)) == [([2], 0.0)]

@pytest.mark.parametrize("scheduler, halfway, last", [("cosine", 0.5, (1 + math.cos(math.pi * 17 / 18)) / 2),
                                                      ("linear", 0.5, 1 / 18), ("constant", 1, 1)])
def test_learning_rate(scheduler, halfway, last):
    """20 steps at 0.1 warm-up: halves up in steps 0 and 1, full at 2, then 18 steps to what would be 0 at step 20."""
    o = SimpleNamespace(learning_rate=8.0, lr_scheduler=scheduler, warmup_ratio=0.1)
    rates = [rpo.learning_rate(step, 20, o) for step in (0, 1, 2, 11, 19)]
    assert rates == pytest.approx([4, 8, 8, 8 * halfway, 8 * last], rel=1e-12)
    o.warmup_ratio = 0
    assert rpo.learning_rate(0, 20, o) == 8

# ----------------------------------------------------------------------------------------------------------------------
# recipes and flags

RECIPES = """
zephyr-beta       | HuggingFaceH4/mistral-7b-sft-beta      | ultrafeedback | 0.01 | 0.005 sum | 1 | 512
zephyr-gemma      | HuggingFaceH4/zephyr-7b-gemma-sft-v0.1 | dpo-mix-7k    | 0.05 | 0.005 sum | 2 | 512
zephyr-gemma-mean | HuggingFaceH4/zephyr-7b-gemma-sft-v0.1 | dpo-mix-7k    | 0.5  | 0.2 mean  | 2 | 0
"""  # recipe     | model                                | data          | beta | eta, sft  | epochs | max_prompt_length

@pytest.mark.parametrize("line", RECIPES.strip().splitlines(), ids=lambda line: line.split()[0])
def test_recipes(line, monkeypatch):
    """The paper's settings, to the digit; every flag still overrides; eight ranks make its 128 pairs, 16 each."""
    recipe, model, data, beta, sft, epochs, max_prompt_length = (cell.strip() for cell in line.split("|"))
    monkeypatch.setattr(rpo, "WORLD_SIZE", 8)
    expected = dict(model=model, data=f"data/{data}", beta=float(beta), eta=float(sft.split()[0]), sft=sft.split()[1],
                    learning_rate=5e-7, lr_scheduler="cosine", warmup_ratio=0.1, batch_size=128, epochs=int(epochs),
                    max_length=1024, max_prompt_length=int(max_prompt_length), seed=42, dtype="bfloat16", ref_model="",
                    weight_decay=0.0, out_dir=f"out/{recipe}")
    found = vars(rpo.parse_options(["--recipe", recipe]))
    assert {key: found[key] for key in expected} == expected
    override = vars(rpo.parse_options(["--beta", "0.7", "--recipe", recipe, "--out_dir", "x", "--epochs", "9"]))
    assert override == found | dict(beta=0.7, out_dir="x", epochs=9)
    batch, lengths = rpo.global_batches(1000, found["batch_size"], 42, 0)[0], [100] * 1000
    shares = [sum(len(indices) * weight for indices, weight in rpo.micro_batches(batch, lengths, 4096, rank, 8))
              for rank in range(8)]
    assert shares == [16] * 8 and set(rpo.RECIPES) == {row.split()[0] for row in RECIPES.strip().splitlines()}

# ----------------------------------------------------------------------------------------------------------------------
# runs: the same pairs, however they are split

# float32 sums of another order differ by about 1e-7 of their size. AdamW divides by sqrt(v), so a weight whose gradient
# is small against that noise still moves by about the learning rate, 0.01 here: after six steps single weights were
# seen to differ by 1e-4, the rows by 2e-5, the mean weight by 1e-7.
# CLOSE holds for rows, ten times CLOSE for the worst weight, a tenth of it for the mean weight.
CLOSE = 1e-4

def assert_close_weights(found, wanted, tolerance=CLOSE):
    assert found.keys() == wanted.keys()
    for key in found:
        assert found[key].shape == wanted[key].shape and found[key].dtype == wanted[key].dtype
        off, scale = (found[key] - wanted[key]).abs(), max(1, wanted[key].abs().max())
        assert off.max() <= 10 * tolerance * scale and off.mean() <= tolerance / 10 * scale, (key, off.max())

def assert_same_run(out_dir, other, tolerance=CLOSE):
    """The same rows, timings apart, and the same weights and moments in final/; with tolerance 0 to the last bit."""
    rows, others = read_rows(out_dir), read_rows(other)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, expected in zip(rows, others):
        assert row.keys() == expected.keys()
        for key in row.keys() - set(TIMINGS):
            if tolerance and key.endswith("accuracies"):
                continue  # noise makes of a tie a win or a loss
            allowed = tolerance * max(1, abs(expected[key]))
            assert abs(row[key] - expected[key]) <= allowed, f"step {row['step']} {key}: {row[key]} != {expected[key]}"
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert_close_weights(load_file(Path(out_dir, "final", name)), load_file(Path(other, "final", name)), tolerance)

def contents(*folders):
    """{file: digest} of whole folders, to see whether anything was touched."""
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for folder in folders
            for path in sorted(Path(folder).rglob("*")) if path.is_file()}

@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The run that others are held against: one rank, each step in one pass, two epochs of three steps."""
    out_dir = tmp_path_factory.mktemp("whole")
    run(*command(world, out_dir))
    return out_dir

def read_pairs(data, split, tokenizer):
    return [rpo.tokenize_pair(json.loads(line), tokenizer) for line in Path(data, f"{split}.jsonl").open()]

def plain_training(world, data, eta, sft, clip, steps=6):
    """RPO by the book: full logits, one response at a time, the batch's mean, torch's AdamW -> losses, norms, model."""
    load = lambda: AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.float32)
    policy, ref, tokenizer = load(), load().requires_grad_(False), AutoTokenizer.from_pretrained(world.model)
    pairs = read_pairs(data, "train", tokenizer)
    optimizer, means, norms = torch.optim.AdamW(policy.parameters(), lr=0.01, weight_decay=0.1), [], []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - (step - 1) / 5) if step else 0.01  # linear, one step of warm-up
        losses = []
        for pair in (pairs[i] for i in rpo.global_batches(17, 8, 7, step // 3)[step % 3]):
            imitated = "baseline" if "baseline" in pair else "chosen"
            chosen, rejected, other = (plain_logp(policy, pair, side) for side in ("chosen", "rejected", imitated))
            h = chosen - rejected - plain_logp(ref, pair, "chosen") + plain_logp(ref, pair, "rejected")
            weight = eta * 0.5 if sft == "sum" else eta / len(pair[imitated])
            losses.append(torch.log(1 + torch.exp(-0.5 * h)) - weight * other)
        loss = sum(losses) / len(losses)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), clip).item())
        optimizer.step()
        optimizer.zero_grad()
        means.append(loss.item())
    return means, norms, policy

@pytest.mark.parametrize("sft, eta, clip, baseline", [("sum", 0.5, 1, False), ("mean", 2.0, 0, True)])
def test_training_is_plain_training(world, tmp_path, sft, eta, clip, baseline):
    """Every loss and, in the end, every weight is that of the textbook loop: order, mean, clipping, schedule, decay."""
    data = world.with_baseline if baseline else world.data
    rows = run(*command(world, tmp_path / "run", "--sft", sft, "--eta", eta, "--seed", 7, "--weight_decay", 0.1,
                        "--lr_scheduler", "linear", "--eval_every", 0, "--max_tokens", 150, "--grad_clip", clip,
                        data=data))
    means, norms, policy = plain_training(world, data, eta, sft, clip or math.inf)
    assert [row["loss"] for row in rows] == pytest.approx(means, rel=1e-4)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-3)  # before clipping
    assert all(row["loss"] == pytest.approx(row["loss/dpo"] + row["loss/sft"]) for row in rows)
    trained, start = load_file(tmp_path / "run/final/model.safetensors"), load_file(f"{world.model}/model.safetensors")
    assert_close_weights(trained, policy.state_dict())
    assert all((trained[name] - start[name]).abs().mean() > 10 * CLOSE for name in start)  # there was something to see

@pytest.mark.parametrize("flags", [["--max_tokens", 1], ["--max_tokens", 190], ["--gradient_checkpointing"],
                                   ["--no-precompute_ref"], ["--attn", "eager"], ["--fsdp"]],
                         ids=lambda flags: " ".join(map(str, flags)))
def test_splits_and_memory_savers_change_nothing(world, whole, tmp_path, flags, monkeypatch):
    """8 pairs as one pass, two or eight, recomputed activations, a reference in memory: the same losses and weights."""
    sizes, calls, deal, forward = [], [], rpo.micro_batches, transformers.models.llama.modeling_llama.LlamaMLP.forward
    def spy(batch, *args):
        passes = list(deal(batch, *args))
        sizes.append([len(indices) for indices, _ in passes])
        return iter(passes)
    monkeypatch.setattr(rpo, "micro_batches", spy)
    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward",
                        lambda self, x: (calls.append(x.requires_grad), forward(self, x))[1])
    run(*command(world, tmp_path / "run", *flags))
    assert_same_run(tmp_path / "run", whole)
    steps = [size for size in sizes if sum(size) in (8, 1)]  # not those of scoring: 17 and 3
    assert all(size in ([1], {1: [1] * 8, 190: [4, 4]}.get(flags[-1], [8])) for size in steps) and len(steps) == 6
    passes = sum(map(len, steps))  # two layers each, twice if recomputed; some more in the check at the start
    assert ("--gradient_checkpointing" in flags) == (calls.count(True) > 2 * passes + 10)

def test_tracker_gets_the_rows_of_metrics(world, tmp_path, monkeypatch):
    """A tracker, here a stand-in with the same three calls, is told the run's name and every row with its step."""
    (tmp_path / "trackio.py").write_text("import atexit\ncalls = []\ninit = lambda **how: calls.append(how)\n"
                                         "log = lambda row, step: calls.append((row, step))\nfinish = lambda: None\n")
    monkeypatch.syspath_prepend(tmp_path)
    rows = run(*command(world, tmp_path / "run", "--max_steps", 2, "--tracker", "trackio"))
    import trackio
    start, *logged = trackio.calls
    assert (start["project"], start["name"], start["config"]["eta"]) == ("rpo", "run", 0.5)
    assert logged == [(row, row["step"]) for row in rows] and [step for _, step in logged] == [0, 1, 2, 2]

def test_metrics_rows(world, whole):
    """Every key of the contract in every row, at every step, and means over whole splits, by plain log-probs."""
    rows = read_rows(whole)
    train, held_out = ([row for row in rows if (key in row)] for key in ("loss", "eval/loss"))
    assert [row["step"] for row in train] == [1, 2, 3, 4, 5, 6] and [row["step"] for row in held_out] == [0, 2, 4, 6]
    assert [row["epoch"] for row in train] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    for row in train:
        assert set(row) == {"step", "epoch", "lr", "grad_norm", *TIMINGS, *rpo.METRICS}
        assert row["tokens_per_second"] > 0 and row["peak_memory_gib"] > 0 and row["grad_norm"] > 0
    for row in held_out:
        assert set(row) == {"step", "epoch"} | {"eval/" + key for key in rpo.METRICS}
    assert [row["lr"] for row in train] == pytest.approx(
        [0.01] + [0.005 * (1 + math.cos(math.pi * k / 5)) for k in range(5)], rel=1e-12)
    assert train[0]["loss/dpo"] == pytest.approx(math.log(2)) and held_out[0]["eval/rewards/accuracies"] == 0.5
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    train_pairs, test_pairs = (read_pairs(world.data, split, tokenizer) for split in ("train", "test"))
    first = [train_pairs[i] for i in rpo.global_batches(17, 8, 42, 0)[0]]
    policy, ref = (AutoModelForCausalLM.from_pretrained(path) for path in (whole / "final", world.model))
    for row, prefix, some, model in ((train[0], "", first, ref), (held_out[-1], "eval/", test_pairs, policy)):
        logps = lambda model: np.array([[plain_logp(model, pair, side).item() for side in ("chosen", "rejected")]
                                        for pair in some])
        policy_logps, ref_logps = logps(model), logps(ref)
        ratios, lengths = policy_logps - ref_logps, np.array([len(pair["chosen"]) for pair in some])
        dpo, nll = loss_by_numpy(policy_logps, ref_logps, None, 0.5, 0.5, "sum")
        margins = ratios[:, 0] - ratios[:, 1]
        expected = {"loss": dpo + nll, "loss/dpo": dpo, "loss/sft": nll, "logps/chosen": policy_logps[:, 0],
                    "logps/rejected": policy_logps[:, 1], "logps/chosen_vs_ref": ratios[:, 0],
                    "logps/rejected_vs_ref": ratios[:, 1], "rewards/chosen": 0.5 * ratios[:, 0],
                    "rewards/rejected": 0.5 * ratios[:, 1], "rewards/margins": 0.5 * margins,
                    "nll_per_token": -policy_logps[:, 0] / lengths}
        for key, values in expected.items():
            assert row[prefix + key] == pytest.approx(values.mean(), rel=1e-5, abs=2e-5), key
        if prefix:  # at the start all are ties, up to noise
            assert row["eval/rewards/accuracies"] == pytest.approx((margins > 0).mean())

def test_weights_are_float32_in_bfloat16(world, whole, tmp_path):
    """bfloat16 is for computing: the weights, and steps of 1e-5 of their size, stay in float32."""
    rows = run(*command(world, tmp_path / "run", "--dtype", "bfloat16"))
    weights = load_file(tmp_path / "run/final/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights.values())
    for row, exact in zip(rows[:3], read_rows(whole)):
        key = "eval/loss" if "eval/loss" in row else "loss"
        assert row[key] == pytest.approx(exact[key], rel=0.03) and row[key] != exact[key]

# ----------------------------------------------------------------------------------------------------------------------
# runs: the reference

def test_reference_is_fixed_and_cached(world, whole, tmp_path):
    """Log-probs of the untouched model, kept under its content and used again; anything else makes another file."""
    data, out_dirs = copy_data(world, tmp_path / "data"), iter(tmp_path / f"run{i}" for i in range(9))
    calls, score = [], rpo.score
    def train(*flags):
        calls.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rpo, "score", lambda module, pairs, *args: (calls.append(len(pairs)),
                                                                      score(module, pairs, *args))[1])
            rows = run(*command(world, next(out_dirs), "--max_steps", 2, *flags, data=data))
        return rows, sorted((tmp_path / "data/ref_logps").iterdir()), calls.count(17)
    before = contents(world.model)
    rows, files, scored = train()
    assert contents(world.model) == before and len(files) == 1 and scored == 1
    cached = load_file(files[0])
    tokenizer, ref = AutoTokenizer.from_pretrained(world.model), AutoModelForCausalLM.from_pretrained(world.model)
    for split in ("train", "test"):
        plain = [[plain_logp(ref, pair, side).item() for side in ("chosen", "rejected")]
                 for pair in read_pairs(data, split, tokenizer)]
        np.testing.assert_allclose(cached[split], plain, rtol=1e-5, atol=1e-5)
    stamp = files[0].stat().st_mtime_ns
    again, files, scored = train("--max_tokens", 100)
    assert len(files) == 1 and files[0].stat().st_mtime_ns == stamp and scored == 0
    assert again[1]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-6)
    save_file({key: tensor + 1 for key, tensor in cached.items()}, files[0])  # the file is what is used
    shifted, _, _ = train()
    assert shifted[0]["eval/logps/chosen_vs_ref"] == pytest.approx(-1, abs=1e-5)
    save_file(cached, files[0])
    _, files, scored = train("--max_prompt_length", 5)  # other tokens
    assert len(files) == 2 and scored == 1
    _, files, scored = train("--ref_model", save_model(tmp_path / "other", seed=1))  # other weights
    assert len(files) == 3 and scored == 1
    _, files, scored = train("--dtype", "bfloat16")  # another precision
    assert len(files) == 4 and scored == 1
    write_jsonl(tmp_path / "data/train.jsonl", random_records(17, 9))  # other data
    _, files, scored = train()
    assert len(files) == 5 and scored == 1 and not [path for path in files if path.suffix != ".safetensors"]

def test_another_reference_model(world, tmp_path):
    """--ref_model is what log-ratios are taken against, in memory as from the cache."""
    other = save_model(tmp_path / "other", seed=1)
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    policy, ref = (AutoModelForCausalLM.from_pretrained(path) for path in (world.model, other))
    expected = np.mean([(plain_logp(policy, pair, "chosen") - plain_logp(ref, pair, "chosen")).item()
                        for pair in read_pairs(world.data, "test", tokenizer)])
    rows = run(*command(world, tmp_path / "a", "--ref_model", other, "--max_steps", 3))
    assert rows[0]["eval/logps/chosen_vs_ref"] == pytest.approx(expected, rel=1e-5)
    assert abs(rows[1]["loss/dpo"] - math.log(2)) > 0.1
    run(*command(world, tmp_path / "b", "--ref_model", other, "--max_steps", 3, "--no-precompute_ref"))
    assert_same_run(tmp_path / "a", tmp_path / "b")

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_cache_is_noticed(world, tmp_path, capsys, dtype):
    """Where policy and reference are one model, a first loss/dpo other than log 2 means that something is broken."""
    data = copy_data(world, tmp_path / "data")
    run(*command(world, tmp_path / "a", "--max_steps", 1, "--dtype", dtype, data=data))
    cache, = (tmp_path / "data/ref_logps").iterdir()
    cached = load_file(cache)
    for nats in (1.0, -1.0):
        save_file(cached | {"train": cached["train"] + torch.tensor([nats, 0.0])}, cache)
        assert "log 2" in refused(capsys, *command(world, tmp_path / f"b{nats}", "--dtype", dtype, data=data))

# ----------------------------------------------------------------------------------------------------------------------
# runs: checkpoints

def test_checkpoints_are_hugging_face_folders(world, tmp_path, monkeypatch):
    """from_pretrained gives the policy's logits, with tokenizer and template; safetensors only, nothing pickled."""
    policies, save = {}, rpo.save_checkpoint
    monkeypatch.setattr(rpo, "save_checkpoint", lambda path, policy, *args: (
        policies.update({Path(path).name: copy.deepcopy(policy.model)}), save(path, policy, *args))[1])
    run(*command(world, tmp_path / "run"))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["final", "metrics.jsonl", "step_000002",
                                                                         "step_000004"]
    ids = torch.arange(3, 30)[None]
    for name in ("step_000002", "step_000004", "final"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name)
        assert torch.equal(loaded(ids).logits, policies[name](ids).logits)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / name)
        assert tokenizer.apply_chat_template([U("w10")], tokenize=False) == "<s><|user|> w10 </s>"
        assert (tmp_path / "run" / name / "generation_config.json").exists()
    assert not torch.equal(policies["step_000002"](ids).logits, policies["final"](ids).logits)
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert path.suffix in (".json", ".jsonl", ".jinja", ".safetensors"), path
            assert path.read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), path

def test_tied_embeddings(world, tmp_path):
    """A tied weight is saved once, loads tied, and resumes, sharded over two ranks too."""
    model = save_model(tmp_path / "tied", tie_word_embeddings=True)
    flags = ["--model", model, "--save_every", 0]
    done = launch(2, tmp_path, command(world, tmp_path / "fsdp", *flags, "--fsdp", "--max_steps", 4),
                  command(world, tmp_path / "fsdp", *flags, "--fsdp", "--resume"))
    assert done.returncode == 0, done.stderr[-60000:]
    run(*command(world, tmp_path / "a", *flags))
    run(*command(world, tmp_path / "b", *flags, "--max_steps", 4))
    run(*command(world, tmp_path / "b", *flags, "--resume"))
    assert_same_run(tmp_path / "a", tmp_path / "b", tolerance=0)
    assert_same_run(tmp_path / "fsdp", tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a/final")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "a/final/model.safetensors")

# ----------------------------------------------------------------------------------------------------------------------
# runs: resume

def test_resume_is_bit_for_bit(world, whole, tmp_path):
    """Stopped in the middle of an epoch and continued: weights, moments and rows equal those of the unbroken run."""
    run(*command(world, tmp_path, "--max_steps", 4))
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 4, 4]
    assert [row.get("lr") for row in rows] == [row.get("lr") for row in read_rows(whole)[:7]]  # the schedule is unbent
    run(*command(world, tmp_path, "--resume", "--max_tokens", 5000))
    assert_same_run(tmp_path, whole, tolerance=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "metrics.jsonl", "step_000002", "step_000004"]
    before = contents(tmp_path)
    run(*command(world, tmp_path, "--resume"))  # nothing left to do
    assert contents(tmp_path) == before

def test_resume_starts_afresh_where_there_is_nothing(world, whole, tmp_path):
    """--resume can stand in a job script from the first start on, also after a kill before the first checkpoint."""
    run(*command(world, tmp_path / "a", "--resume"))
    assert_same_run(tmp_path / "a", whole, tolerance=0)
    (tmp_path / "b").mkdir()
    shutil.copy(whole / "metrics.jsonl", tmp_path / "b/metrics.jsonl")
    run(*command(world, tmp_path / "b", "--resume"))
    assert_same_run(tmp_path / "b", whole, tolerance=0)

def test_resume_after_a_kill_while_saving(world, whole, tmp_path):
    """A half-written folder is no checkpoint; rows of lost steps are logged again, a torn last line is no row."""
    shutil.copytree(whole, tmp_path / "run")
    os.rename(tmp_path / "run/final", tmp_path / "run/final.tmp")
    for torn in ("model.safetensors", "trainer_state.json"):
        path = tmp_path / "run/final.tmp" / torn
        path.write_bytes(path.read_bytes()[:40])
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 6, "epoch": 2.0, "eval/lo')
    run(*command(world, tmp_path / "run", "--resume"))
    assert_same_run(tmp_path / "run", whole, tolerance=0)
    assert not (tmp_path / "run/final.tmp").exists()

def test_kill_9(world, tmp_path):
    """A killed process, python rpo.py with a checkpoint a step, leaves a folder that continues bit for bit."""
    flags = ["--epochs", 300, "--save_every", 1, "--eval_every", 50]
    argv = command(world, tmp_path / "killed", *flags)
    process = subprocess.Popen([sys.executable, ROOT / "rpo.py", *argv[1:]], env=ENV, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not ((tmp_path / "killed/step_000003").exists() and list((tmp_path / "killed").glob("*.tmp"))):
        assert process.poll() is None and time.time() < deadline, process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    folder, state = rpo.newest_checkpoint(tmp_path / "killed")
    stop = state["step"] + 2
    assert state["step"] >= 3 and not folder.endswith(".tmp") and stop < 900
    run(*command(world, tmp_path / "killed", *flags, "--resume", "--max_steps", stop))
    run(*command(world, tmp_path / "whole", *flags, "--save_every", 0, "--max_steps", stop))
    assert_same_run(tmp_path / "killed", tmp_path / "whole", tolerance=0)

def refused(capsys, *argv):
    """A run that ends in one line on stderr and exit code 2 -> that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err
    lines = [line for line in re.split("\\r|\\n|\\x1b\\[A", err) if "error:" in line]  # bars rewrite their line
    assert len(lines) == 1, err
    return lines[0]

CHANGES = dict(model="", ref_model="", beta=0.25, eta=0.75, sft="mean", batch_size=4, max_length=99,
               max_prompt_length=77, epochs=3, learning_rate=0.02, lr_scheduler="linear", warmup_ratio=0.2,
               weight_decay=0.01, grad_clip=2.0, dtype="bfloat16", seed=43)

def test_resume_refuses_another_objective(world, whole, tmp_path, capsys):
    """Each flag that makes the run what it is, and the data: both values are named, nothing is touched."""
    other = save_model(tmp_path / "other", seed=1)
    run(*command(world, tmp_path / "run", "--max_steps", 2))
    before = contents(tmp_path / "run")
    was = json.loads((tmp_path / "run/final/trainer_state.json").read_text())["options"]
    for name, value in (CHANGES | dict(model=other, ref_model=other)).items():
        line = refused(capsys, *command(world, tmp_path / "run", "--resume", f"--{name}", value))
        assert f" {name} " in line and str(was[name]) in line and str(value) in line, line
    write_jsonl(tmp_path / "data/train.jsonl", random_records(17, 9))
    shutil.copy(f"{world.data}/test.jsonl", tmp_path / "data/test.jsonl")
    line = refused(capsys, *command(world, tmp_path / "run", "--resume", data=tmp_path / "data"))
    assert "fingerprint" in line and len(set(re.findall(r"\b[0-9a-f]{16}\b", line))) == 2
    assert contents(tmp_path / "run") == before

def test_resume_refuses_another_reference_of_the_same_name(world, tmp_path, capsys):
    """The folder that --model names holds other weights by now: log-ratios would be against those."""
    model, data = save_model(tmp_path / "model"), copy_data(world, tmp_path / "data")
    argv = command(world, tmp_path / "run", "--model", model, data=data)
    run(*argv, "--max_steps", "2")
    save_model(tmp_path / "model", seed=1)
    line = refused(capsys, *argv, "--resume")
    assert " reference was " in line and len(set(re.findall(r"\b[0-9a-f]{16}\b", line))) == 2

def test_resume_may_change_the_rest(world, whole, tmp_path):
    """Where the same pairs lie, how they are split and what is reported are not the objective's business."""
    run(*command(world, tmp_path / "run", "--max_steps", 2))
    run(*command(world, tmp_path / "run", "--resume", "--max_tokens", 200, "--gradient_checkpointing", "--save_every",
                 1, "--no-precompute_ref", data=copy_data(world, tmp_path / "data")))
    assert_same_run(tmp_path / "run", whole)

@pytest.mark.parametrize("before, after", [(0, 2), (2, 0)])
def test_resume_may_begin_and_end_evaluation(world, whole, tmp_path, before, after):
    """Evaluation is looking on: with it or without, the training pairs are the same and the run goes on."""
    run(*command(world, tmp_path, "--max_steps", 2, "--eval_every", before))
    run(*command(world, tmp_path, "--resume", "--eval_every", after))
    assert_close_weights(*(load_file(path / "final/model.safetensors") for path in (tmp_path, whole)))

def test_a_run_is_not_overwritten(world, whole, capsys):
    """Without --resume a folder that holds a run is refused and stays as it is."""
    before = contents(whole)
    assert f"{whole} holds a run" in refused(capsys, *command(world, whole))
    assert contents(whole) == before

# ----------------------------------------------------------------------------------------------------------------------
# runs: bad input

GOOD = json.dumps({"prompt": "w10 ", "chosen": "w11", "rejected": "w12"}) + "\n"

@pytest.mark.parametrize("text, words", [
    (None, ["no file", "train.jsonl", "prepare_data.py"]),
    ("", ["train.jsonl", "empty"]),
    (GOOD + '{"prompt": "w10 ", "chosen": \n', ["train.jsonl line 2"]),
    (GOOD + "\n", ["train.jsonl line 2"]),
    (GOOD * 2 + '{"prompt": "w10 ", "chosen": "w11"}\n', ["train.jsonl line 3", "rejected"]),
    (GOOD + '{"chosen": "w10 ", "rejected": "w11"}\n', ["train.jsonl line 2", "prompt"]),
    (GOOD + "[1, 2]\n", ["train.jsonl line 2"]),
    (GOOD + '{"prompt": "w10 ", "chosen": 3, "rejected": "w12"}\n', ["train.jsonl line 2"]),
    (GOOD + '{"prompt": [{"role": "user"}], "chosen": [], "rejected": []}\n', ["train.jsonl line 2"]),
    (GOOD.replace("w11", ""), ["train.jsonl", "empty response"])],
    ids=["missing", "empty", "malformed", "blank line", "no rejected", "no prompt", "list", "number", "no turns",
         "all dropped"])
def test_bad_data(world, tmp_path, capsys, text, words):
    """One line that names the file, the line and what is wrong; no folder is begun."""
    (tmp_path / "data").mkdir()
    if text is not None:
        (tmp_path / "data/train.jsonl").write_text(text)
    line = refused(capsys, *command(world, tmp_path / "run", data=tmp_path / "data"))
    assert line.startswith("error:") and all(word in line for word in words), line
    assert not (tmp_path / "run").exists()

def test_bad_model(world, tmp_path, capsys):
    """No such folder, messages without a template, a template that doubles the BOS."""
    line = refused(capsys, *command(world, tmp_path / "run", "--model", tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in line
    bare = word_tokenizer()
    bare.chat_template = None
    model = save_model(tmp_path / "bare", tokenizer=bare)
    assert "chat template" in refused(capsys, *command(world, tmp_path / "run", "--model", model))
    double = word_tokenizer()
    double.chat_template = "<s>" + double.chat_template
    model = save_model(tmp_path / "double", tokenizer=double)
    assert "two BOS" in refused(capsys, *command(world, tmp_path / "run", "--model", model))

def test_bad_flags(world, tmp_path, capsys):
    """Abbreviations, unknown values, a loss that is a constant, attention code without a backward pass here."""
    assert "--bet" in refused(capsys, *command(world, tmp_path / "run", "--bet", 0.2))
    assert "average" in refused(capsys, *command(world, tmp_path / "run", "--sft", "average"))
    assert "--beta 0" in refused(capsys, *command(world, tmp_path / "run", "--beta", 0))
    if not torch.cuda.is_available():
        assert "flex_attention" in refused(capsys, *command(world, tmp_path / "run", "--attn", "flex_attention"))

@pytest.mark.parametrize("flag, value", [("max_steps", -1), ("batch_size", 0), ("epochs", 0), ("max_tokens", 0),
                                         ("eta", "nan"), ("learning_rate", -1e-3), ("max_length", -1)])
def test_a_number_out_of_range_is_refused(world, tmp_path, capsys, flag, value):
    assert f"--{flag}" in refused(capsys, *command(world, tmp_path / "run", f"--{flag}", value))
    assert not (tmp_path / "run").exists()

def test_files_cut_short_or_of_another_encoding(world, tmp_path, capsys):
    model = Path(save_model(tmp_path / "model"), "model.safetensors")
    model.write_bytes(model.read_bytes()[:1000])
    assert "cannot load" in refused(capsys, *command(world, tmp_path / "run", "--model", tmp_path / "model"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_bytes(GOOD.encode() + GOOD.replace("w11", "caf\u00e9").encode("latin-1"))
    assert "train.jsonl line 2" in refused(capsys, *command(world, tmp_path / "run", data=tmp_path / "data"))

def test_a_reference_of_another_vocabulary_is_refused(world, tmp_path, capsys):
    more = word_tokenizer()
    more.add_tokens(["w99"])  # one that the pairs do not use is no reason
    more = save_model(tmp_path / "more", tokenizer=more, vocab_size=49)
    run(*command(world, tmp_path / "run", "--max_steps", 1, "--ref_model", more))
    shutil.copytree(world.model, tmp_path / "other")
    words = (tmp_path / "other/tokenizer.json").read_text().replace('"w17"', '"x"').replace('"w18"', '"w17"')
    (tmp_path / "other/tokenizer.json").write_text(words.replace('"x"', '"w18"'))
    line = refused(capsys, *command(world, tmp_path / "next", "--ref_model", tmp_path / "other"))
    assert "another vocabulary" in line

def test_a_policy_that_cannot_share_is_heard_beside_a_reference_that_can(world, tmp_path, capsys):
    """ALiBi counts places, not positions: the rows of such a policy are separate, whatever the reference could do."""
    torch.manual_seed(0)
    BloomForCausalLM(BloomConfig(vocab_size=48, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
                     ).save_pretrained(tmp_path / "bloom")
    word_tokenizer().save_pretrained(tmp_path / "bloom")
    flags = "--attn", "eager", "--max_steps", 1
    run(*command(world, tmp_path / "run", *flags, "--model", tmp_path / "bloom", "--ref_model", world.model))
    assert "rows: one a response" in capsys.readouterr().out
    run(*command(world, tmp_path / "swap", *flags, "--ref_model", tmp_path / "bloom"))
    rows, swap = read_rows(tmp_path / "run")[0], read_rows(tmp_path / "swap")[0]  # each is the other's reference
    for side in ("chosen", "rejected"):
        key = f"eval/logps/{side}_vs_ref"
        assert rows[key] == pytest.approx(-swap[key], abs=1e-4) and abs(rows[key]) > 0.1

def test_a_pad_token_without_an_embedding(world, tmp_path):
    """Many a tokenizer was given one that the model does not know; padding is never scored, so none is needed."""
    tokenizer = word_tokenizer(pad_token="<padding>")
    assert tokenizer.pad_token_id == 48
    model = save_model(tmp_path / "model", tokenizer=tokenizer)
    with_it = run(*command(world, tmp_path / "run", "--model", model, "--max_steps", 1))
    without = run(*command(world, tmp_path / "plain", "--max_steps", 1))
    assert with_it[1]["loss"] == without[1]["loss"]

def test_non_finite_loss(world, tmp_path, capsys):
    """The step is named, the update not made, the last checkpoint kept; its row is not logged."""
    line = refused(capsys, *command(world, tmp_path / "run", "--learning_rate", 1e30, "--save_every", 1))
    assert "step 2" in line and "step_000001" in line, line
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["metrics.jsonl", "step_000001"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "run/step_000001")
    assert [row["step"] for row in read_rows(tmp_path / "run") if "loss" in row] == [1]

def test_weights_that_are_not_numbers(world, tmp_path, capsys):
    """A model with an infinite weight ends at once, and the line says that the numbers are not finite."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[3] = math.inf
    model.save_pretrained(tmp_path / "inf")
    word_tokenizer().save_pretrained(tmp_path / "inf")
    line = refused(capsys, *command(world, tmp_path / "run", "--model", tmp_path / "inf"))
    assert "nan" in line or "finite" in line, line

def test_exit_code_of_the_program(tmp_path):
    """As a person starts it: python rpo.py where nothing was prepared; one line, exit code 2, no traceback."""
    done = subprocess.run([sys.executable, ROOT / "rpo.py"], cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1 and "data/toy/model" in done.stderr and "prepare_data.py" in done.stderr

# ----------------------------------------------------------------------------------------------------------------------
# several ranks, gloo on CPU

def test_each_rank_takes_the_gpu_of_its_own(world, tmp_path, monkeypatch):
    """FSDP and broadcasts go by the current device, which must be set before there is a process group."""
    calls = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: sys.exit(f"{args} {kwargs}"))
    with pytest.raises(SystemExit, match="nccl.*index=3"):
        run(*command(world, tmp_path))
    assert calls == [torch.device("cuda", 3)]

@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_change_nothing(world, whole, tmp_path, ranks):
    """
    1, 2 and 4 ranks, DDP and FSDP: the losses and weights of one rank, also where the last batch of an epoch has one
    pair for all ranks and the held-out split 3. Checkpoints have the same keys and go from any to any: bit for bit on
    as many ranks in the same way, else as close as the runs themselves.
    """
    data = copy_data(world, tmp_path / "data")  # several passes a step: ranks must meet in the last one
    def go(name, *flags):
        return command(world, tmp_path / name, *flags, data=data)
    run(*command(world, tmp_path / "from_one", "--max_steps", 4))
    done = launch(ranks, tmp_path, go("ddp", "--max_tokens", 100), go("fsdp", "--fsdp", "--max_tokens", 100),
                  go("ddp_again", "--max_tokens", 100, "--max_steps", 4),
                  go("ddp_again", "--max_tokens", 100, "--resume"),
                  go("fsdp_again", "--fsdp", "--max_tokens", 100, "--max_steps", 4),
                  go("fsdp_again", "--fsdp", "--max_tokens", 100, "--resume"),
                  go("to_one", "--fsdp", "--no-precompute_ref", "--gradient_checkpointing", "--max_steps", 4),
                  go("from_one", "--fsdp", "--resume"), go("fsdp_to_ddp", "--fsdp", "--max_steps", 4),
                  go("fsdp_to_ddp", "--resume"))
    assert done.returncode == 0, done.stderr[-60000:]
    run(*go("to_one", "--resume"))
    for name in ("ddp", "fsdp", "to_one", "from_one", "fsdp_to_ddp"):
        assert_same_run(tmp_path / name, whole)
    assert_same_run(tmp_path / "ddp_again", tmp_path / "ddp", tolerance=0)
    assert_same_run(tmp_path / "fsdp_again", tmp_path / "fsdp", tolerance=0)
    files = lambda folder: sorted(path.relative_to(folder) for path in Path(folder).rglob("*"))
    assert files(tmp_path / "ddp") == files(tmp_path / "fsdp") == files(whole)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "fsdp/final").dtype == torch.float32
    # one each, since in bfloat16 FSDP rounds elsewhere
    assert sorted("fsdp" in path.name for path in (tmp_path / "data/ref_logps").iterdir()) == [False, True]

def test_fsdp_in_bfloat16(world, whole, tmp_path):
    """Two ranks compute in bfloat16 on shards in float32: losses near those of float32, and steps far below a bfloat16
    weight's own rounding arrive. A reference on the fly meets the same rows and rounds as the policy does; one computed
    beforehand met other micro-batches."""
    flags = ("--fsdp", "--dtype", "bfloat16", "--learning_rate", 1e-5)
    done = launch(2, tmp_path, command(world, tmp_path / "half", *flags),
                  command(world, tmp_path / "fly", *flags, "--no-precompute_ref"))
    assert done.returncode == 0, done.stderr[-60000:]
    start, full = load_file(f"{world.model}/model.safetensors"), read_rows(whole)[1]
    for name in ("half", "fly"):
        row, weights = read_rows(tmp_path / name)[1], load_file(tmp_path / name / "final/model.safetensors")
        assert row["loss"] == pytest.approx(full["loss"], rel=0.02) and row["loss"] != full["loss"]
        assert row["loss/dpo"] == pytest.approx(math.log(2), abs=1e-6 if name == "fly" else 0.05)
        assert all(tensor.dtype == torch.float32 for tensor in weights.values())
        moved = {key: (weights[key] - start[key]).abs() for key in start}
        assert all(0 < tensor.max() < 1e-4 for tensor in moved.values())
        assert all((tensor > 0).float().mean() > 0.5 for tensor in moved.values())

def test_a_rank_that_fails_ends_the_run(world, tmp_path):
    """What only rank 1 sees, its data missing, is said, and rank 0 does not wait for it until a time-out."""
    shutil.copytree(world.data, tmp_path / "data0")
    done = launch(2, tmp_path, command(world, tmp_path / "run", data=tmp_path / "data{rank}"))
    assert done.returncode != 0
    assert f"error: no file {tmp_path}/data1/train.jsonl" in done.stderr
    assert "Traceback" not in done.stderr.partition("error:")[0] and not (tmp_path / "run/final").exists()
