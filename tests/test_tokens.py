"""
Hop 1, text to token ids: what render, tokenize_pair, load_pairs and show_pair make of a record.
The ids of the word tokenizer can be read off the text: <s> is 1, </s> 2, <|user|> 4,
<|assistant|> 5, and "w17" 17.
"""
import copy
import json
import math
import os
import runpy
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import rpo
from conftest import ROOT, word_tokenizer, write_jsonl

def user(text):
    return {"role": "user", "content": text}

def assistant(text):
    return {"role": "assistant", "content": text}

def record_of(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

def messages_of(prompt, chosen, rejected):
    return record_of([user(prompt)], [assistant(chosen)], [assistant(rejected)])

def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids

# ------------------------------------------------------------------------------------------------
# tokenizers with the habits of those in use

CHATML = (
    "{% for turn in messages %}"
    "<|im_start|>{{ turn['role'] }}\n{{ turn['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# ends no turn by a token
PLAIN = (
    "{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# a BOS token of its own in front
LLAMA = (
    "<|begin|>{% for turn in messages %}"
    "<|im_start|>{{ turn['role'] }}\n\n{{ turn['content'] }}<|im_end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
CORPUS = [
    "user assistant system",
    "the costs are $46 and $7",
    "Q: what are the costs?\nA: $46\n",
    "end stop yes no",
    "one two three four five six seven eight nine ten",
]

@pytest.fixture(scope="session")
def bpe():
    """
    Byte-level, in the style of SmolLM2: <|im_end|> is end-of-turn token and pad at once, the
    template writes a newline behind it. "A: $46" has a token " $" where "A: " ends in a token " ".
    """
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False)
    words.train_from_iterator(CORPUS * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<|im_start|>", eos_token="<|im_end|>",
        pad_token="<|im_end|>", unk_token="<|endoftext|>", extra_special_tokens=["<|begin|>"])
    tokenizer.chat_template = CHATML
    return tokenizer

def changed(tokenizer, template=None, **tokens):
    """A copy with another template or other special tokens."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template or tokenizer.chat_template
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    return tokenizer

def adding_bos(tokenizer):
    """A copy that puts its BOS before every text by itself, as Llama's does."""
    tokenizer = copy.deepcopy(tokenizer)
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos])
    return tokenizer

# ------------------------------------------------------------------------------------------------
# ids

def test_a_conversation(tokenizer):
    """BOS once, earlier assistant turns are prompt, one end token a response."""
    record = record_of(
        [user("w10 w11"), assistant("w12"), user("w13")],
        [assistant("w12")],
        [assistant("w14 w15")])
    assert rpo.tokenize_pair(record, tokenizer) == {
        # <s> <|user|> w10 w11 </s> <|assistant|> w12 </s> <|user|> w13 </s> <|assistant|>
        "prompt": [1, 4, 10, 11, 2, 5, 12, 2, 4, 13, 2, 5],
        "chosen": [12, 2],
        "rejected": [14, 15, 2],
    }

def test_a_conversation_gets_the_templates_bos_alone(tokenizer):
    """A tokenizer that adds a BOS by itself must not double the template's."""
    pair = rpo.tokenize_pair(messages_of("w10", "w11", "w12"), adding_bos(tokenizer))
    assert pair["prompt"] == [1, 4, 10, 2, 5]

def test_raw_text(tokenizer):
    """No template; EOS once behind each response; no BOS where the tokenizer adds none."""
    pair = rpo.tokenize_pair(record_of("w10 w11 ", "w12", "w13 w14"), tokenizer)
    assert pair == {"prompt": [10, 11], "chosen": [12, 2], "rejected": [13, 14, 2]}

def test_raw_text_gets_the_tokenizers_bos(tokenizer):
    pair = rpo.tokenize_pair(record_of("w10 w11 ", "w12", "w13 w14"), adding_bos(tokenizer))
    assert pair == {"prompt": [1, 10, 11], "chosen": [12, 2], "rejected": [13, 14, 2]}

def test_other_keys_of_a_record_are_ignored(tokenizer):
    record = record_of("w10 ", "w11", "w12")
    more = record | {"baseline": "w13", "source": "somewhere"}
    assert rpo.tokenize_pair(more, tokenizer) == rpo.tokenize_pair(record, tokenizer)

def test_a_prompt_is_the_same_with_and_without_its_pair(bpe):
    """What evaluation feeds a model that answers is what training showed it as the prompt."""
    prompt = [user("what"), assistant("yes"), user("the costs")]
    text = rpo.render(bpe, prompt)
    pair = rpo.tokenize_pair(record_of(prompt, [assistant("$46")], [assistant("no")]), bpe)
    assert pair["prompt"] == ids_of(bpe, text)
    assert text == (
        "<|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>user\nthe costs<|im_end|>\n<|im_start|>assistant\n")

# ------------------------------------------------------------------------------------------------
# end-of-turn tokens

def test_the_end_token_is_scored_once_where_it_is_the_pad_too(bpe):
    """The newline that the template writes behind it is not scored."""
    pair = rpo.tokenize_pair(messages_of("what", "seven eight", "nine\n"), bpe)
    end = bpe.eos_token_id
    assert end == bpe.pad_token_id
    assert pair["chosen"] == ids_of(bpe, "seven eight") + [end]
    assert pair["rejected"] == ids_of(bpe, "nine\n") + [end]

def test_a_templates_end_token_counts_where_it_is_not_the_eos(bpe):
    other = changed(bpe, eos_token="<|endoftext|>")
    pair = rpo.tokenize_pair(messages_of("what", "yes", "no"), other)
    assert pair["chosen"] == ids_of(bpe, "yes<|im_end|>")

def test_the_eos_is_added_where_a_template_ends_no_turn(bpe):
    """A model that never sees an end learns never to stop."""
    other = changed(bpe, PLAIN, eos_token="<|endoftext|>")
    pair = rpo.tokenize_pair(messages_of("what", "yes", "no"), other)
    assert other.decode(pair["prompt"]) == "user: what\nassistant:"
    assert pair["chosen"] == ids_of(bpe, " yes<|endoftext|>")
    assert pair["rejected"] == ids_of(bpe, " no<|endoftext|>")

@pytest.mark.parametrize("response", ["end", "im_end", "|", ">", "yes |>", "<|"])
def test_a_response_spelt_like_a_piece_of_the_end_token(bpe, response):
    """The end token stands right behind it, and the answer stays an answer like others."""
    pair = rpo.tokenize_pair(messages_of("what", response, "no"), bpe)
    assert pair["chosen"] == ids_of(bpe, response) + [bpe.eos_token_id]

# ------------------------------------------------------------------------------------------------
# the boundary between prompt and response

@pytest.mark.parametrize(
    "chosen, rejected", [("$46", "$7"), ("$46", "nine"), ("yes", "$46"), ("$46", "\nno")])
def test_a_token_across_the_boundary(bpe, chosen, rejected):
    """It belongs to the responses: nothing is lost, and both sides have the same prompt."""
    prompt = "Q: what are the costs?\nA: "
    # the trap is set
    assert ids_of(bpe, prompt + "$46") != ids_of(bpe, prompt) + ids_of(bpe, "$46")
    pair = rpo.tokenize_pair(record_of(prompt, chosen, rejected), bpe)
    assert pair["prompt"] == ids_of(bpe, prompt)[:-1]
    assert pair["prompt"] + pair["chosen"] == ids_of(bpe, f"{prompt}{chosen}<|im_end|>")
    assert pair["prompt"] + pair["rejected"] == ids_of(bpe, f"{prompt}{rejected}<|im_end|>")

# ------------------------------------------------------------------------------------------------
# long pairs

LONG = record_of("w10 w11 w12 w13 w14 w15 ", "w20 w21", "w22")

@pytest.mark.parametrize("limit, prompt", [
    (4, [12, 13, 14, 15]),
    (5, [11, 12, 13, 14, 15]),
    (6, [10, 11, 12, 13, 14, 15]),
    (math.inf, [10, 11, 12, 13, 14, 15])])
def test_a_long_prompt_keeps_its_end(tokenizer, limit, prompt):
    """The question stands at the end; the limit itself is allowed; responses stay whole."""
    pair = rpo.tokenize_pair(LONG, tokenizer, max_prompt_length=limit)
    assert pair == {"prompt": prompt, "chosen": [20, 21, 2], "rejected": [22, 2]}

def test_a_cut_prompt_keeps_its_bos(tokenizer):
    """Models lean on the BOS token; it counts among those that the limit allows."""
    pair = rpo.tokenize_pair(LONG, adding_bos(tokenizer), max_prompt_length=4)
    assert pair["prompt"] == [1, 13, 14, 15]
    # 8 tokens: <s> <|user|> w10 w11 w12 w13 </s> <|assistant|>
    record = messages_of("w10 w11 w12 w13", "w20", "w22")
    pair = rpo.tokenize_pair(record, tokenizer, max_prompt_length=5)
    assert pair["prompt"] == [1, 12, 13, 2, 5]

@pytest.mark.parametrize("chosen, rejected", [("w20 w21", "w22"), ("w22", "w20 w21")])
def test_a_pair_that_does_not_fit_is_dropped(tokenizer, chosen, rejected):
    """
    A cut response has lost its end token, which SFT would teach. The longer side must fit behind
    the cut prompt: 4 + 3 tokens; without the cut 6 + 3.
    """
    record = LONG | {"chosen": chosen, "rejected": rejected}
    assert rpo.tokenize_pair(record, tokenizer, 7, 4)["prompt"] == [12, 13, 14, 15]
    assert rpo.tokenize_pair(record, tokenizer, 6, 4) == "longer than max_length"
    assert rpo.tokenize_pair(record, tokenizer, 9)["prompt"] == [10, 11, 12, 13, 14, 15]
    assert rpo.tokenize_pair(record, tokenizer, 8) == "longer than max_length"

# ------------------------------------------------------------------------------------------------
# what is no pair to train on

@pytest.mark.parametrize("record, reason", [
    (record_of("w10 ", "", "w11"), "empty response"),
    (record_of("w10 ", "w11", " \n"), "empty response"),
    (messages_of("w10", "w11", " "), "empty response"),
    (record_of("w10 ", "w11 </s> w12", "w13"), "end-of-turn token inside a response"),
    (messages_of("w10", "w11", "w12 </s> w13"), "end-of-turn token inside a response"),
    (record_of("", "w10", "w11"), "empty prompt"),
    (messages_of("<s> w10", "w11", "w11"), "identical responses"),
    (record_of("w10 ", "w11", "w11"), "identical responses")])
def test_a_reason_to_drop(tokenizer, record, reason):
    """Words that can be counted, not an exception."""
    assert reason in rpo.tokenize_pair(record, tokenizer)

def test_two_bos_tokens_are_a_reason_to_drop(tokenizer):
    """Whether the text or the template writes the one that the tokenizer adds, or both do."""
    record = record_of("<s> w10 ", "w11", "w12")
    assert "two BOS" in rpo.tokenize_pair(record, adding_bos(tokenizer))
    double = changed(tokenizer, "<s>" + tokenizer.chat_template)
    assert "two BOS" in rpo.tokenize_pair(messages_of("w10", "w11", "w12"), double)

def test_a_turn_inside_a_response_is_a_reason_to_drop(bpe):
    """A response that goes on as the user would teach to write the user's turns."""
    response = "no<|im_end|>\n<|im_start|>user\nyes"
    found = rpo.tokenize_pair(messages_of("yes", response, "no"), bpe)
    assert found == "end-of-turn token inside a response"

def test_a_prompt_that_a_response_changes_is_a_reason_to_drop(tokenizer):
    """Generation starts behind a word that a whole conversation does not have."""
    end = "<|assistant|>{% endif %}"
    template = tokenizer.chat_template.replace(end, end.replace("{%", "w47{%"))
    found = rpo.tokenize_pair(messages_of("w10", "w11", "w12"), changed(tokenizer, template))
    assert found == "the template renders the prompt differently when a response follows"

# ------------------------------------------------------------------------------------------------
# any record

REASONS = {
    "identical responses",
    "the template renders the prompt differently when a response follows",
    "empty prompt or two BOS tokens",
    "empty response",
    "end-of-turn token inside a response",
    "longer than max_length",
}
SPECIAL = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|begin|>", "<|im_", "|>"]
PIECES = [
    "A: ", "$46", " ", "\n", "\t", "\u2028", "\x1c", "é", "e\u0301", "日本", "👍🏽", "\u202e",
    "{{ x }}"]

def exchange(question, answer):
    return [user(question), assistant(answer)]

def conversation(earlier, question, chosen, rejected):
    prompt = sum(earlier, []) + [user(question)]
    return record_of(prompt, [assistant(chosen)], [assistant(rejected)])

pieces = st.one_of(st.sampled_from(PIECES), st.sampled_from(SPECIAL), st.text(max_size=8))
texts = st.lists(pieces, max_size=4).map("".join)
exchanges = st.lists(st.builds(exchange, texts, texts), max_size=2)
records = st.one_of(
    st.builds(record_of, texts, texts, texts),
    st.builds(conversation, exchanges, texts, texts, texts))

@pytest.fixture(scope="module", params=[CHATML, PLAIN, LLAMA], ids=["chatml", "plain", "llama"])
def template(request):
    return request.param

@pytest.fixture(scope="module", params=[False, True], ids=["no BOS", "BOS"])
def any_tokenizer(request, bpe, template):
    """The three templates, on a tokenizer that adds a BOS to raw text and on one that does not."""
    tokenizer = changed(bpe, template, bos_token="<|begin|>")
    return adding_bos(tokenizer) if request.param else tokenizer

def whole_text(tokenizer, prompt, response):
    """Prompt and response as the template writes them, up to the end-of-turn token."""
    if isinstance(prompt, str):
        return prompt + response + tokenizer.eos_token
    text = tokenizer.apply_chat_template(prompt + response, tokenize=False).rstrip()
    if tokenizer.chat_template == PLAIN and not text.endswith(tuple(SPECIAL[:4])):
        text += tokenizer.eos_token
    return text

@given(record=records)
def test_any_record_is_a_pair_or_a_reason(any_tokenizer, record):
    """Whatever the text, special tokens and pieces of them among it: never an exception."""
    found = rpo.tokenize_pair(record, any_tokenizer)
    if isinstance(found, str):
        assert found in REASONS
    else:
        assert list(found) == ["prompt", "chosen", "rejected"]

@given(record=records)
def test_any_pair_spells_the_templates_text(any_tokenizer, record):
    """Nothing is lost and nothing is added, in ids and in letters."""
    found = rpo.tokenize_pair(record, any_tokenizer)
    if isinstance(found, str):
        return
    raw = isinstance(record["prompt"], str)
    for side in ("chosen", "rejected"):
        text = whole_text(any_tokenizer, record["prompt"], record[side])
        ids = any_tokenizer(text, add_special_tokens=raw).input_ids
        assert found["prompt"] + found[side] == ids
        assert any_tokenizer.decode(ids).removeprefix("<|begin|>") == text.removeprefix("<|begin|>")

@given(record=records)
def test_any_response_has_one_end_token(any_tokenizer, record):
    """At its end, and something stands before it."""
    found = rpo.tokenize_pair(record, any_tokenizer)
    if isinstance(found, str):
        return
    for side in ("chosen", "rejected"):
        *response, end = found[side]
        assert response
        assert end in any_tokenizer.added_tokens_decoder
        assert end not in response

@given(record=records)
def test_no_token_of_any_prompt_is_scored(any_tokenizer, record):
    """But for one that a response changes, which no longer is the prompt's."""
    found = rpo.tokenize_pair(record, any_tokenizer)
    if isinstance(found, str):
        return
    text = rpo.render(any_tokenizer, record["prompt"])
    alone = any_tokenizer(text, add_special_tokens=isinstance(record["prompt"], str)).input_ids
    n = len(found["prompt"])
    assert found["prompt"] == alone[:n]
    assert n >= 1
    following = [*alone[n : n + 1], found["chosen"][0], found["rejected"][0]]
    assert n == len(alone) or len(set(following)) > 1

@given(record=records, max_length=st.integers(1, 80), max_prompt_length=st.integers(1, 40))
def test_any_limit_is_kept(any_tokenizer, record, max_length, max_prompt_length):
    """A pair within limits is the unlimited one with the start of its prompt cut, or dropped."""
    whole = rpo.tokenize_pair(record, any_tokenizer)
    found = rpo.tokenize_pair(record, any_tokenizer, max_length, max_prompt_length)
    if isinstance(found, str):
        assert found in REASONS
        return
    assert 1 <= len(found["prompt"]) <= max_prompt_length
    for side in ("chosen", "rejected"):
        assert found[side] == whole[side]
        assert len(found["prompt"]) + len(found[side]) <= max_length
    bos = int(whole["prompt"][0] == any_tokenizer.bos_token_id)
    end = found["prompt"][bos:]
    assert found["prompt"][:bos] == whole["prompt"][:bos]
    assert end == whole["prompt"][len(whole["prompt"]) - len(end) :]

# ------------------------------------------------------------------------------------------------
# files

def test_drops_are_counted_and_printed(tokenizer, tmp_path, capsys):
    """Every line of the file counts once; the pairs keep the file's order."""
    path = tmp_path / "train.jsonl"
    write_jsonl(path, [
        record_of("w10 ", "w11", "w12"),
        record_of("w10 ", "", "w12"),
        record_of("w10 ", "w12", "w12"),
        record_of("w10 w11 w12 w13 ", "w14", "w12"),
        record_of("w10 ", "w11 w12 w13 w14 w15 w16", "w12"),
        record_of("w10 ", "w11", "")])
    pairs = rpo.load_pairs(path, tokenizer, 6, 3)
    assert [pair["prompt"] for pair in pairs] == [[10], [11, 12, 13]]
    assert capsys.readouterr().out == (
        f"{path}: 2 pairs, dropped: "
        "{'empty response': 2, 'identical responses': 1, 'longer than max_length': 1}\n")

def test_blank_lines_are_skipped(tokenizer, tmp_path):
    """Many a file ends in one; prepare_data.py skips them too."""
    path = tmp_path / "train.jsonl"
    line = json.dumps(record_of("w10 ", "w11", "w12"))
    path.write_text(f"{line}\n\n{line}\r\n  \n{line}\n\n")
    assert len(rpo.load_pairs(path, tokenizer)) == 3

def test_a_line_ends_at_a_line_feed_alone(tokenizer, tmp_path):
    """Other separators, which JSON allows inside a string, do not cut a record in two."""
    path = tmp_path / "train.jsonl"
    record = record_of("w10 ", "w11\u2028w12\x85w13", "w14")
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n")
    (pair,) = rpo.load_pairs(path, tokenizer)
    assert pair == rpo.tokenize_pair(record, tokenizer)

def processes_used(tokenizer, path, monkeypatch, lines, cores):
    """The processes that load_pairs calls tokenize_pair in; each line holds the same pair."""
    def tokenize_pair(record, *rest):
        with open(f"{path}.pids", "a") as file:
            file.write(f"{os.getpid()}\n")
        return pair

    pair = rpo.tokenize_pair(record_of("w8 ", "w10", "w9"), tokenizer)
    monkeypatch.setattr(rpo, "tokenize_pair", tokenize_pair)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    path.write_text("{}\n" * lines)
    rpo.load_pairs(path, tokenizer)
    return set(Path(f"{path}.pids").read_text().split())

def test_few_pairs_are_tokenized_in_this_process(tokenizer, tmp_path, monkeypatch):
    """A fork takes longer than a few pairs do, and one beside live threads can die."""
    used = processes_used(tokenizer, tmp_path / "train.jsonl", monkeypatch, lines=1999, cores=2)
    assert used == {str(os.getpid())}

def test_many_pairs_are_shared_by_this_ranks_cores(tokenizer, tmp_path, monkeypatch):
    """Two thousand lines are worth a process; two ranks of a machine with four cores have two each."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    used = processes_used(tokenizer, tmp_path / "train.jsonl", monkeypatch, lines=8000, cores=4)
    assert len(used) == 2 and str(os.getpid()) not in used

def test_several_processes_tokenize_in_the_files_order(tokenizer, tmp_path, monkeypatch):
    """Whoever tokenizes which share: the pairs come as the lines do."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    path = tmp_path / "train.jsonl"
    words = [f"w{10 + i % 37} w{10 + i // 37 % 37} " for i in range(4000)]
    write_jsonl(path, [record_of("w8 ", text, text + "w9") for text in words])
    pairs = rpo.load_pairs(path, tokenizer)
    assert [pair["chosen"] for pair in pairs] == [ids_of(tokenizer, text) + [2] for text in words]

def test_the_line_of_a_fault_is_named_by_several_processes(tokenizer, tmp_path, monkeypatch):
    """Counted over the whole file, not within a process's share."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    path = tmp_path / "train.jsonl"
    lines = [json.dumps(record_of("w8 ", "w10", "w9"))] * 4000
    lines[3000] = "{"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="train.jsonl line 3001 "):
        rpo.load_pairs(path, tokenizer)

# ------------------------------------------------------------------------------------------------
# the cache of `datasets`

@pytest.fixture
def caching():
    datasets.enable_caching()
    yield
    datasets.disable_caching()

def test_a_second_start_does_not_tokenize_again(tmp_path, capsys, caching):
    """UltraFeedback's 61,135 pairs take a while, and a sweep starts many times."""
    path = tmp_path / "train.jsonl"
    write_jsonl(path, [record_of("w10 ", "w11", "w12")])
    pairs = rpo.load_pairs(path, word_tokenizer())
    first = capsys.readouterr()
    assert rpo.load_pairs(path, word_tokenizer()) == pairs
    second = capsys.readouterr()
    # the bar of Dataset.map
    assert "Map" in first.err and "Map" not in second.err
    assert second.out == first.out

@pytest.mark.parametrize("change", ["file", "tokenizer", "max_length", "max_prompt_length"])
def test_the_cache_is_of_this_file_tokenizer_and_limit(tokenizer, tmp_path, caching, change):
    path = tmp_path / "train.jsonl"
    records = [record_of("w10 w11 ", "w12", "w13"), record_of("w10 ", "w12", "w13")]
    write_jsonl(path, records)
    arguments = {"max_length": math.inf, "max_prompt_length": math.inf}
    before = rpo.load_pairs(path, tokenizer, *arguments.values())
    if change == "file":
        write_jsonl(path, records[1:])
    elif change == "tokenizer":
        tokenizer = adding_bos(tokenizer)
    else:
        arguments[change] = {"max_length": 3, "max_prompt_length": 1}[change]
    found = rpo.load_pairs(path, tokenizer, *arguments.values())
    assert found != before
    records = [json.loads(line) for line in path.read_text().splitlines()]
    tokenized = [rpo.tokenize_pair(record, tokenizer, **arguments) for record in records]
    assert found == [pair for pair in tokenized if isinstance(pair, dict)]

def test_the_cache_is_of_this_program(world, tokenizer, tmp_path, caching):
    """Who edits a function that load_pairs calls, here render, trains on what it now writes."""
    source = (ROOT / "rpo.py").read_text().replace('if __name__ == "__main__":\n    run()\n', "")
    edited = source.replace(".rstrip()", ".rstrip().replace('w9', 'w8')")
    assert edited != source
    pairs = []
    for name, text in (("a", source), ("b", edited), ("c", source)):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        # as the program that is started
        program = runpy.run_path(str(path), run_name="__main__")
        pairs.append(program["load_pairs"](f"{world.data}/train.jsonl", tokenizer))
    assert pairs[0] == pairs[2]
    assert pairs[1] != pairs[0]

# ------------------------------------------------------------------------------------------------
# what is shown before training

def test_the_shown_pair_has_a_bar_before_each_scored_token(tokenizer):
    """None in the prompt: what a person checks before believing a run."""
    pair = rpo.tokenize_pair(messages_of("w10", "w11 w12", "w13"), tokenizer)
    assert rpo.show_pair(pair, tokenizer).splitlines() == [
        "prompt    <s> <|user|> w10 </s> <|assistant|>",
        "chosen    |w11|w12|</s>",
        "rejected  |w13|</s>"]
