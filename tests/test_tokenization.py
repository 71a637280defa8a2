"""Text to ids to masks: EOS is trained, the prompt is not, and how a batch is split changes nothing."""

import functools

import datasets
import hypothesis.strategies as st
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

import common.tokenization as tok
import sft
from common.plumbing import columns as plumbing_columns
from common.plumbing import data as plumbing_data
from common.plumbing import decoding

PROPERTY = settings(derandomize=True, deadline=None, max_examples=150)
tiny_tokenizer = functools.cache(lambda: AutoTokenizer.from_pretrained(ROOT / "tiny/model"))
ragged = st.lists(st.lists(st.integers(0, 9), max_size=12), min_size=1, max_size=8)


@pytest.fixture(params=["tiny", "pad is eos"])
def folder(request, pad_is_eos):
    return ROOT / "tiny/model" if request.param == "tiny" else pad_is_eos


# ---- masks -----------------------------------------------------------------------------------------------


def test_mask_of_one_example_position_by_position():
    """Prompt 0, response 1 with its EOS, padding 0; the pad id and EOS (both 0 here) decide nothing."""
    tokens, mask = tok.join([[5, 6, 0], [7]], [[0, 8, 0], [9, 0]])
    assert tokens.tolist() == [[5, 6, 0, 0, 8, 0], [7, 9, 0, 0, 0, 0]]
    assert mask.tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0]]


def test_trained_tokens_are_the_response_and_its_eos(folder):
    """What the mask selects reads as the demonstration and EOS, also where pad is EOS; never the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    questions, texts = (
        ["Ann has 3 stamps, doubles. How many?", "2?"],
        ["3 * 2 = 6. So \\boxed{6}", "\\boxed{2}"],
    )
    prompts = tok.encode_prompts(tokenizer, questions)
    tokens, mask = tok.join(prompts, [tok.encode_response(tokenizer, text) for text in texts])
    for prompt, text, row, m in zip(prompts, texts, tokens, mask):
        assert tokenizer.decode(row[m.bool()]) == text + tokenizer.eos_token
        assert m.nonzero()[0].item() == len(prompt) and row[: len(prompt)].tolist() == prompt
        assert m.sum() == m.nonzero()[-1].item() + 1 - len(prompt)  # without a hole


@pytest.mark.parametrize("script", [sft])
def test_eos_has_a_gradient_and_the_prompt_has_none(script, folder):
    """The hidden state that predicts EOS learns from it, those that predict prompt or padding do not."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompts = tok.encode_prompts(tokenizer, ["Compute 1 + 1.", "Compute 15 + 22."])
    tokens, mask = tok.join(prompts, [tok.encode_response(tokenizer, x) for x in ("\\boxed{2}", "37")])
    hidden = []
    model.base_model.register_forward_hook(lambda m, i, out: hidden.append(out.last_hidden_state))
    logp, _ = script.logprobs(model, tokens, mask, 1.0)
    [gradient] = torch.autograd.grad(script.sft_loss(logp, mask, mask.sum()), hidden)
    learns = gradient.abs().sum(-1) > 0  # [B, T]: which positions the head is trained at
    for i, prompt in enumerate(prompts):
        end = len(prompt) + int(mask[i].sum())  # one past EOS
        assert learns[i].nonzero()[:, 0].tolist() == list(range(len(prompt) - 1, end - 1))
        assert tokens[i, end - 1] == tokenizer.eos_token_id


# ---- text -> ids -----------------------------------------------------------------------------------------


def test_prompt_and_response_never_merge(folder):
    """Ids are those of the parts: a token that straddles the boundary would move it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    [prompt] = tok.encode_prompts(tokenizer, ["What is 1 + 2?"])
    text = "\n The answer"  # with the prompt's last newline these would be other tokens
    tokens, mask = tok.join([prompt], [tok.encode_response(tokenizer, text)])
    assert tokens[0, : len(prompt)].tolist() == prompt
    assert tokenizer.decode(tokens[0][mask[0].bool()], skip_special_tokens=True) == text


def test_a_model_with_a_chat_template_gets_it_with_the_turn_of_the_assistant_open():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/model")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    [prompt] = tok.encode_prompts(tokenizer, ["What is \\frac{1}{2}?"], "{question} {Box} it.")
    assert tokenizer.decode(prompt) == "<user>What is \\frac{1}{2}? {Box} it.<assistant>"
    tokenizer.chat_template = None
    [prompt] = tok.encode_prompts(tokenizer, ["Who?"])
    assert tokenizer.decode(prompt) == "Question: Who?\nAnswer:\n"


def test_bos_is_in_the_prompt_once_and_in_the_response_never():
    """A tokenizer that puts BOS in front of everything does it before the prompt, not before the response."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/model")
    tokenizer.chat_template, tokenizer.bos_token = None, "<|pad|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", tokenizer.bos_token_id)]
    )
    [prompt], response = tok.encode_prompts(tokenizer, ["a"]), tok.encode_response(tokenizer, "a")
    assert prompt.count(tokenizer.bos_token_id) == 1 and prompt[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in response and response[-1] == tokenizer.eos_token_id


@PROPERTY
@given(text=st.text("abc 0123456789\n\\boxed{}=+", max_size=40))
def test_decoding_undoes_encoding(text):
    tokenizer = tiny_tokenizer()
    ids = tok.encode_response(tokenizer, text)
    assert ids.count(tokenizer.eos_token_id) == 1 and tok.decode_responses(tokenizer, [ids]) == [text]


@pytest.mark.parametrize("config, stops", [(None, [0]), (0, [0]), (5, [0, 5]), ([7, 5, 0], [0, 5, 7])])
def test_stop_ids_are_those_of_the_tokenizer_and_of_the_config(config, stops, tiny):
    """Llama 3 has three: a response that ends with any of them has ended."""
    model, tokenizer = tiny
    other = type(model.config).from_dict(model.config.to_dict() | {"eos_token_id": config})
    assert tok.stop_ids(tokenizer, other) == stops


# ---- ids -> tensors --------------------------------------------------------------------------------------


@PROPERTY
@given(ids=st.lists(st.integers(0, 5), max_size=12), budget=st.integers(1, 14))
def test_truncate_ends_at_the_first_eos_or_the_budget(ids, budget):
    out = tok.truncate(ids, [0, 3], budget)
    assert out == ids[: len(out)] and len(out) <= budget
    assert not {0, 3} & set(out[:-1])  # nothing after an EOS
    assert len(out) == min(len(ids), budget) or out[-1] in (0, 3)  # as long as it may be


@PROPERTY
@given(rows=ragged, side=st.sampled_from(["left", "right"]))
def test_pad(rows, side):
    tokens, mask = tok.pad(rows, side)
    assert tokens.shape == mask.shape == (len(rows), max(map(len, rows)))
    for row, t, m in zip(rows, tokens, mask):
        assert t[m.bool()].tolist() == row
        real = [0] * (len(m) - len(row)) + [1] * len(row)
        assert m.tolist() == (real if side == "left" else real[::-1])


@PROPERTY
@given(prompts=ragged, responses=ragged)
def test_join_and_align(prompts, responses):
    """The mask selects the responses and nothing else; numbers per token land on their tokens."""
    pairs = list(zip(prompts, responses))
    tokens, mask = tok.join(*zip(*pairs))
    numbers = [[100.0 * i + t for t in range(len(response))] for i, (_, response) in enumerate(pairs)]
    grid = tok.align(numbers, mask)
    assert grid.shape == mask.shape and (grid[mask == 0] == 0).all()
    for i, (prompt, response) in enumerate(pairs):
        assert tokens[i, : len(prompt) + len(response)].tolist() == prompt + response
        assert mask[i].nonzero()[:, 0].tolist() == list(range(len(prompt), len(prompt) + len(response)))
        assert grid[i, mask[i].bool()].tolist() == numbers[i]


# ---- micro-batches ---------------------------------------------------------------------------------------


@PROPERTY
@given(data=st.data(), max_tokens=st.integers(1, 60), world_size=st.integers(1, 3))
def test_micro_batches(data, max_tokens, world_size):
    """Over all ranks each row with a response comes once; within the limit; as wide as the longest row."""
    shape = st.tuples(st.integers(1, 6), st.integers(0, 6))  # lengths of prompt and response
    lengths = data.draw(st.lists(shape, min_size=1, max_size=10))
    rows = data.draw(st.none() | st.lists(st.sampled_from(range(len(lengths))), unique=True))
    tokens, mask = tok.join(*zip(*[([1] * p, [2] * r) for p, r in lengths]))
    found, counts = [], set()
    for rank in range(world_size):
        micro_batches = tok.micro_batches(mask, max_tokens, (rank, world_size), rows)
        counts.add(len(micro_batches))
        for micro in micro_batches:
            batch, columns = micro
            if not batch:  # a rank with fewer rows: every rank has the same number of passes
                assert world_size > 1 and columns == slice(1)
                continue
            width = max(sum(lengths[i]) for i in batch)
            assert tokens[micro].shape == (len(batch), width) and columns == slice(width)
            assert tokens[micro].tolist() == [tokens[i, :width].tolist() for i in batch]
            assert len(batch) == 1 or len(batch) * width <= max_tokens
            found += batch
    asked = range(len(lengths)) if rows is None else rows
    assert sorted(found) == sorted(i for i in asked if lengths[i][1])
    assert len(counts) == 1


def test_micro_batches_are_few():
    """As many rows as fit: 8 rows of 10 are two micro-batches of 40 tokens, or one of 80."""
    _, mask = tok.join([[1] * 4] * 8, [[2] * 6] * 8)
    assert [len(tok.micro_batches(mask, most)) for most in (9, 40, 80)] == [8, 2, 1]
    _, mask = tok.join([[1]] * 4, [[2] * 9, [2] * 99, [2] * 9, [2] * 99])
    # rows of similar length go together
    assert tok.micro_batches(mask, 200) == [([1, 3], slice(100)), ([0, 2], slice(10))]


def test_ranks_have_the_same_mix_of_lengths():
    """Each takes every n-th row, longest first."""
    _, mask = tok.join([[1]] * 6, [[2] * n for n in (1, 6, 3, 5, 2, 4)])
    parts = [tok.micro_batches(mask, 100, (rank, 2)) for rank in range(2)]
    assert parts == [[([1, 5, 4], slice(7))], [([3, 2, 0], slice(6))]]


# ---- data sets, rows that are sampled together -----------------------------------------------------------


def test_a_hub_name_may_have_a_configuration(monkeypatch, tmp_path):
    """openai/gsm8k has two of them, and none by default; a path with a colon that exists is a path."""
    seen, rows = [], datasets.Dataset.from_dict({"question": ["1 + 1?"]})

    def get_names(*name):
        seen.append(name)
        return ["train"]

    def load(**given):
        seen.append(given)
        return rows

    monkeypatch.setattr(plumbing_columns, "get_dataset_split_names", get_names)
    monkeypatch.setattr(plumbing_columns, "load_dataset", load)
    folder = tmp_path / "a:b"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"question": "2 + 2?"}\n')
    for path, question in (
        ("openai/gsm8k:main", "1 + 1?"),
        ("owner/name", "1 + 1?"),
        (str(folder), "2 + 2?"),
    ):
        assert plumbing_data.load_split(path, "train", {})["question"][:] == [question]
    assert seen == [
        ("openai/gsm8k", "main"),
        {"path": "openai/gsm8k", "name": "main", "split": "train"},
        ("owner/name",),
        {"path": "owner/name", "split": "train"},
        (str(folder),),  # its file is read here
    ]


def test_rows_that_are_sampled_together_have_similar_lengths():
    """At most `sizes` rows, none more than twice as long as another but for 256 tokens, shortest first."""
    lengths = [10, 20, 266, 277, 800, 811, 5000]
    parts = decoding.batches(range(7), [10] * 7, lengths)
    assert [part.tolist() for part in parts] == [[0, 1, 2], [3, 4], [5], [6]]
    assert [part.tolist() for part in decoding.batches([4, 1, 2], [2] * 5, [1] * 5)] == [[4, 1], [2]]
    assert [part.tolist() for part in decoding.batches([0, 1, 2], [9] * 3, [3, 1, 2])] == [[1, 2, 0]]
    assert decoding.batches([], [], []) == []


def test_a_batch_has_as_many_rows_as_fit_of_its_longest():
    """Forty tokens in all: four rows of 10 would fit, two of 20, none of 50 beside another."""
    parts = decoding.batches(range(4), [4, 4, 2, 1], [10, 10, 20, 50])
    assert [part.tolist() for part in parts] == [[0, 1], [2], [3]]
