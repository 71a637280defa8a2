"""What people bring: it works, or is refused in one sentence. Each kind of fault once, in its smallest form.

Inputs are built here, from a few rows and the tiny model.
"""

import argparse
import csv
import decimal
import importlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, CohereConfig, GraniteConfig

import common.tokenization as tok
import dpo
import grpo
import idft_hinted
import luffy
import opsd
import prefix_rft
import rft_rejection
import rlhf_ppo
import sft
from common.plumbing import (
    configs,
    data,
    decoding,
    evaluation,
    flags,
    folders,
    heads,
    memory,
    models,
    ranks,
    runs,
    screen,
)
from common.plumbing.flags import BadInput
from common.verifier import math_reward

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tiny/model"
SCRIPTS = (sft, rft_rejection, idft_hinted, dpo, grpo, prefix_rft, luffy, opsd, rlhf_ppo)


def rows(n=24):
    """Questions with different numbers, golds and demonstrations."""
    return [
        {
            "question": f"Ann has {i} cards, gets {i + 1}. How many cards does Ann have?",
            "answer": str(2 * i + 1),
            "solution": f"Step 1: {i} + {i + 1} = {2 * i + 1}. The answer is \\boxed{{{2 * i + 1}}}",
        }
        for i in range(n)
    ]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """load(lines, *flags, script=sft): training and held-out rows of a jsonl file, or of a path."""
    monkeypatch.chdir(ROOT)

    def go(lines, *more, script=sft, **how):
        path = lines if isinstance(lines, str) else write(tmp_path / "d.jsonl", lines)
        args = script.parse_args(["--data", path, "--model", str(TINY), *map(str, more)])
        if script in (sft, idft_hinted, opsd):
            how = {"demonstrations": True} | how
        return data.load_splits(args, **how)

    return go


@pytest.fixture
def refused(load):
    """refused(lines, *flags): the sentence with which an input is refused."""

    def go(*args, **how):
        with pytest.raises(BadInput) as stop:
            load(*args, **how)
        assert stop.value.code == 2 and "\n" not in stop.value.sentence
        return stop.value.sentence

    return go


def folder_of(tmp_path, template=None, change=None):
    """A copy of the tiny model's folder, with another chat template or a changed tokenizer."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    if change:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        change(tokenizer)
        tokenizer.chat_template = None
        (folder / "chat_template.jinja").unlink()
        tokenizer.save_pretrained(folder)
    return folder


# ---- one fact, one place ---------------------------------------------------------------------------------


def moved_eos(tmp_path, places):
    """The tiny model with an EOS of its own, id 480, which only some of its files know."""
    folder, end = tmp_path / "model", 480
    tokenizer, model = AutoTokenizer.from_pretrained(TINY), AutoModelForCausalLM.from_pretrained(TINY)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():  # it says the new one where it said the old one
        weight = model.get_input_embeddings().weight
        weight[end] = weight[0]
        weight[0] = 0
    if "tokenizer" in places:
        tokenizer.eos_token = "<|im_end|>"
    model.config.eos_token_id = end if "config" in places else 0
    model.generation_config.eos_token_id = [0, end] if "generation" in places else 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, end


@pytest.mark.parametrize("place", ["tokenizer", "config", "generation"])
def test_generate_stops_where_the_script_does(place, tmp_path):
    """Whatever file of a folder names an id that ends a response, all files of a saved one do."""
    folder, end = moved_eos(tmp_path, [place])
    model, tokenizer = models.load_model(folder)
    runs.save_model(tmp_path / "final", model, tokenizer)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    again = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert (
        {0, end}
        <= {*tok.as_list(final.generation_config.eos_token_id)}
        == {*tok.stop_ids(again, final.config)}
    )

    question = "Ann has 3 stamps, doubles. How many stamps does Ann have?"
    args = sft.parse_args(["--max-new-tokens", "60"])
    [prompt] = tok.encode_prompts(tokenizer, [question])
    [[response], _] = sft.sample(model, tokenizer, [prompt], 0.0, args)
    ids = torch.tensor([prompt])
    whole = final.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)
    assert response[-1] == end and whole[0, len(prompt) :].tolist() == response


# ---- one owner -------------------------------------------------------------------------------------------


def start(function):
    """A child that calls a function and then waits to be killed; it has called it when this returns."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.write(writer, b"1" if function() else b"0")
        time.sleep(60)
        os._exit(0)
    return child, os.read(reader, 1) == b"1"


def test_a_folder_has_one_owner_while_its_process_lives(tmp_path):
    """By another name of the folder, too. After kill -9 it is free, and no child inherits it."""
    out, link = tmp_path / "run", tmp_path / "link"
    out.mkdir()
    link.symlink_to(out)
    child, claimed = start(lambda: folders.claim(out, create=True))
    assert claimed and not folders.claim(link)
    args = sft.parse_args(["--output-dir", str(link), "--model", str(TINY)])
    with pytest.raises(BadInput, match="another process is writing"):
        runs.open_run(args)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert folders.claim(out, create=True) and folders.claim(link)  # as often as the owner likes
    child, claimed = start(lambda: folders.claim(out))  # a child does not inherit it
    assert not claimed
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_folder_that_only_the_first_machine_sees_is_refused(monkeypatch, tmp_path):
    """Under torchrun on two machines every rank writes its part of a checkpoint there."""
    args = sft.parse_args(["--output-dir", str(tmp_path / "run")])
    monkeypatch.setattr(runs.ranks, "is_first", lambda: False)  # so nobody makes it
    with pytest.raises(BadInput, match="--output-dir .*run: not the same folder on all machines"):
        runs.open_run(args)


def test_a_folder_that_appears_while_the_model_is_read_is_not_moved_aside(tmp_path):
    out = tmp_path / "run"

    def begin():
        out.mkdir()
        (out / "metrics.jsonl").write_text("{}\n")
        return folders.claim(out, create=True)

    assert folders.claim(out)  # there is none yet
    child, _ = start(begin)
    args = sft.parse_args(["--output-dir", str(out)])
    assert folders.claim(tmp_path / "none") and not (tmp_path / "none").exists()
    with pytest.raises(BadInput, match="another process is writing"):
        folders.open_folder(out, {}, args, 0)
    assert (out / "metrics.jsonl").exists()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


# ---- no first N ------------------------------------------------------------------------------------------


def test_a_subset_is_a_seeded_sample():
    table = data.Dataset.from_dict({"n": list(range(1000))})
    sample = {n: data.subset(table, n, 0)["n"] for n in (10, 100)}
    assert sample[10] != list(range(10)) and {*sample[10]} < {*sample[100]} and max(sample[10]) > 500
    assert sample[10] == sorted(sample[10]) == data.subset(table, 10, 0)["n"][:]
    assert sample[10] != data.subset(table, 10, 1)["n"]
    assert len(data.subset(table, 0, 0)) == len(data.subset(table, 2000, 0)) == 1000


def test_sorted_data_are_evaluated_and_held_out_at_all_levels(load, tmp_path):
    lines = [row | {"level": i // 100} for i, row in enumerate(rows(1000))]
    folder = tmp_path / "sorted"
    folder.mkdir()
    write(folder / "train.jsonl", lines[:500])
    write(folder / "test.jsonl", [row | {"question": "So: " + row["question"]} for row in lines])
    for path in (str(folder), write(tmp_path / "one.jsonl", lines)):
        _, test = load(path, "--eval-questions", 50)
        assert len(test) == 50 and len({*test["level"]}) > 6


ASKED = {  # script: the flags with which it asks five training questions
    "rft_rejection": "--questions 5",
    "dpo": "--pair-questions 5",
    "rlhf_ppo": "--preference-questions 5",
    "idft_hinted": "--steps 5 --batch-size 1",
}


@pytest.mark.parametrize("name", ASKED)
def test_what_is_sampled_for_training_is_a_seeded_sample(name, small, tmp_path, monkeypatch):
    """The first prompts that are not held-out questions are a `subset` of the training rows."""

    class Asked(Exception):
        pass

    def encode(tokenizer, questions, *template):
        if {*questions} <= {*test["question"]}:
            return encode_prompts(tokenizer, questions, *template)
        raise Asked(questions)

    script, encode_prompts = importlib.import_module(name), tok.encode_prompts
    flags = [*ASKED[name].split(), "--seed", 7, "--eval-first", "off"]
    args = script.parse_args(small(name, tmp_path / "run", *flags))
    train, test = data.load_splits(args)
    monkeypatch.setattr(tok, "encode_prompts", encode)
    with pytest.raises(Asked) as asked:
        script.main(args)
    [questions] = asked.value.args
    assert list(dict.fromkeys(questions)) == data.subset(train, 5, 7)["question"][:]


# ---- columns ---------------------------------------------------------------------------------------------


def test_columns_may_change_their_type_after_10_MB(load):
    """The one with golds from integers to text, one that is not in use from null to an object; a late one."""
    lines = []
    for i, row in enumerate(rows(2400)):
        late = i >= 2200
        row |= {"note": "x" * 5000, "meta": {"id": i} if late else None, "answer": int(row["answer"])}
        lines.append(row | ({"extra": 1, "answer": f"{row['answer']}/1"} if late else {}))
    train, test = load(lines, script=grpo)
    assert len(train) + len(test) == 2400 and "4799/1" in train["gold"][:] + test["gold"][:]


def test_numbers_keep_their_digits(load, tmp_path):
    """Integers above 2^53, decimals with a 0 at the end; from each format."""
    exact = [12345678901234567890 + i for i in range(20)]
    lines = [row | {"answer": n} for row, n in zip(rows(20), exact)]
    arrow = pyarrow.Table.from_pylist([line | {"answer": decimal.Decimal(line["answer"])} for line in lines])
    pyarrow.parquet.write_table(arrow, tmp_path / "d.parquet")
    (tmp_path / "d.json").write_text(json.dumps(lines, indent=1))
    with open(tmp_path / "d.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    for path in ("d.parquet", "d.json", "d.csv", lines):
        parts = load(path if path is lines else str(tmp_path / path), script=grpo)
        assert {int(gold) for part in parts for gold in part["gold"]} == {*exact}
    mixed = rows(20)
    mixed[3] |= {"question": 7, "solution": 8}  # a number among texts is text
    train, test = load(mixed)
    assert "7" in train["question"][:] + test["question"][:]
    price = [row | {"answer": json.loads("1.10", parse_float=decimal.Decimal)} for row in rows(4)]
    text = "".join(json.dumps(row, default=str).replace('"1.10"', "1.10") + "\n" for row in price)
    (tmp_path / "price.jsonl").write_text(text)
    assert {*load(str(tmp_path / "price.jsonl"), script=grpo)[0]["gold"]} == {"1.10"}


def test_a_list_of_one_is_unwrapped_and_of_several_any_is_correct(load, refused):
    for answer, want in (([7], "7"), (["7"], "7"), ([["7"]], "7"), (["1/2", "0.5", "1/2"], "1/2\n0.5")):
        train, _ = load([row | {"answer": answer} for row in rows()], script=grpo)
        assert {*train["gold"]} == {want}
    assert math_reward(["\\boxed{4}", "\\boxed{5}", "\\boxed{6}", "no"], ["4\n5"] * 4) == [1, 1, 0, 0]
    train, _ = load([row | {"solution": [row["solution"]], "question": [row["question"]]} for row in rows()])
    assert train["solution"][0].startswith("Step 1")
    several = rows()
    several[3]["solution"] = ["one", "two"]
    assert "row 3: --solution-key solution is a list of 2" in refused(several)
    value = rows()
    value[2]["answer"] = {"value": "5", "aliases": []}
    assert "row 2: --answer-key answer is an object with value, aliases" in refused(value, script=grpo)


@pytest.mark.parametrize(
    "name", ["gold", "demonstrated", "kept", "row", "step", "reward", "question", "solution"]
)
def test_our_names_are_free_for_the_users_columns(name, load):
    other = "question" if name != "question" else "solution"
    lines = [{other: row["question"], name: row["solution"]} for row in rows()]
    train, test = load(lines, "--question-key", other, "--solution-key", name)
    assert all(text.startswith("Step 1") for text in train["solution"])
    assert all(text.startswith("Ann") for text in train["question"]) and all(
        g.isdigit() for g in test["gold"]
    )
    lines = [{other: row["question"], name: row["answer"]} for row in rows()]
    train, _ = load(lines, "--question-key", other, "--answer-key", name, script=grpo)
    assert all(gold.isdigit() for gold in train["gold"])


def said(*messages):
    return [{"role": role, "content": content} for role, content in messages]


def test_messages_are_read(load):
    question, answer = ("user", "What is 1 + 1?"), ("assistant", "It is \\boxed{2}")
    other = [{"from": "human", "value": "What is 1 + 1?"}, {"from": "gpt", "value": "It is \\boxed{2}"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is 1 + 1?"}]}, said(answer)[0]]
    for both in (said(question, answer), other, parts):
        lines = [{"m": both}, *({"m": said(("user", row["question"]), answer)} for row in rows(4))]
        train, test = load(lines, "--question-key", "m", "--solution-key", "m")
        assert "What is 1 + 1?" in train["question"][:] + test["question"][:]
        assert {*train["solution"]} == {"It is \\boxed{2}"}


def test_what_else_messages_hold_is_said(refused):
    q, a = ("user", "1 + 1?"), ("assistant", "2")
    image = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    for messages, reason in (
        (said(("system", "Be brief."), q), "has the messages system, user; only"),
        (said(q, a, q), "has the messages user, assistant, user; only"),
        (said(a), "has no message of the user"),
        (image, "has a message with image; only text"),
    ):
        sentence = refused([*rows(2), rows(3)[2] | {"question": messages}])
        assert f"row 2: --question-key question {reason}" in sentence


def pairs(tmp_path, lines, *more):
    args = dpo.parse_args(["--pairs", write(tmp_path / "p.jsonl", lines), "--model", str(TINY), *more])
    return dpo.load_pairs(args)


def test_pairs_of_messages(tmp_path):
    prompt, good, bad = "1 + 1?", ("assistant", "2"), ("assistant", "3")
    both = {"chosen": said(("user", prompt), good), "rejected": said(("user", prompt), bad)}
    alone = {"chosen": said(good), "rejected": said(bad)}
    for line in (both | {"prompt": prompt}, both, alone | {"prompt": said(("user", prompt))}):
        assert pairs(tmp_path, [line]) == [(prompt, "2", "3")]
    with pytest.raises(BadInput, match="row 0: column chosen begins with another question"):
        pairs(tmp_path, [both | {"prompt": "2 + 2?"}])
    turns = said(("user", prompt), good, ("user", "Sure?"), good)
    with pytest.raises(BadInput, match="row 0: column chosen: has the messages user, assistant, user"):
        pairs(tmp_path, [both | {"prompt": prompt, "chosen": turns}])
    with pytest.raises(BadInput, match="no column prompt"):
        pairs(tmp_path, [{"chosen": "2", "rejected": "3"}])


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("d.jsonl", b'{"question": "a?"}\n{"question": "b?"\n', "line 2: not JSON"),
        ("d.jsonl", b'{"question": "a?"}\n["b?"]\n', "line 2: not an object"),
        ("d.jsonl", b'{"question": "\xe9?"}\n', "line 1: not UTF-8"),
        (
            "d.jsonl",
            b'{"question": "\\ud800?", "solution": "1"}\n',
            "row 0: --question-key question holds half a character",
        ),
        ("d.csv", b"question,answer\na?,1,2\n", "row 0: 3 cells, but the header has 2"),
        ("d.csv", b'question,answer\n"a?,1\n', "not a row of a csv file"),
        ("d.json", b"[{]", "not JSON"),
    ],
)
def test_a_damaged_file_is_refused_where_it_is_damaged(name, content, reason, refused, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert reason in refused(str(tmp_path / name))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_of_other_habits(encoding, load, tmp_path):
    """A mark at the start, CRLF, blank lines, an object over several lines, a table in an object."""
    lines = [json.dumps(row) for row in rows(12)]
    forms = {
        "crlf.jsonl": "\r\n".join([lines[0], "", *lines[1:]]),
        "pretty.json": json.dumps({"version": 1, "data": rows(12)}, indent=1),
        "array.jsonl": f"\n[{','.join(lines)}]",
        "table.csv": "\r\n".join(
            ["question,answer,solution", *(f'"{x["question"]}",1,"a ""b"" c"' for x in rows(12))]
        ),
    }
    for name, text in forms.items():
        (tmp_path / name).write_bytes(text.encode(encoding))
        train, test = load(str(tmp_path / name), script=grpo)
        assert len(train) + len(test) == 12


# ---- one look at ids -------------------------------------------------------------------------------------

PARTS = (
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "over content parts": "{% for m in messages %}{{ m['role'] }}:" + PARTS + "{% endfor %}assistant:",
    "without the question": "{% for m in messages %}{{ m['role'] }}:{% endfor %}assistant:",
    "of its first letter": "{% for m in messages %}{{ m['content'][:1] }}{% endfor %}assistant:",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_prompt_without_its_question_is_refused(kind, refused, load, tmp_path):
    folder = folder_of(tmp_path, TEMPLATES[kind])
    assert "its chat template leaves the question out" in refused(rows(), "--model", folder)
    load(rows(), "--model", folder, "--chat-template", "off")


def test_a_prompt_does_not_end_in_eos(refused, tmp_path):
    """What a tokenizer appends is left out; what a chat template has there is refused."""

    def append(tokenizer):
        end = [("<|endoftext|>", 0)]
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single="$A <|endoftext|>", special_tokens=end
        )

    tokenizer = AutoTokenizer.from_pretrained(folder_of(tmp_path, change=append))
    assert tokenizer.encode("a")[-1] == 0
    [prompt] = tok.encode_prompts(tokenizer, ["a?"])
    assert tokenizer.decode(prompt) == "Question: a?\nAnswer:\n"
    shutil.rmtree(tmp_path / "model")
    folder = folder_of(tmp_path, "{{ messages[0]['content'] }}<|endoftext|>")
    assert "its prompts end in <|endoftext|>" in refused(rows(), "--model", folder)


@pytest.mark.parametrize("end", ["<|endoftext|>", "<|endoftext|>\n", " <|endoftext|><|endoftext|>"])
def test_a_demonstration_has_one_eos(end, load, capsys):
    train, _ = load([row | {"solution": row["solution"] + end} for row in rows()])
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    for text in train["solution"]:
        assert tok.encode_response(tokenizer, text).count(0) == 1 and text.rstrip().endswith("}")
    assert "24 rows of --solution-key solution end in the text of EOS" in capsys.readouterr().out


def test_an_eos_anywhere_else_is_refused_by_row(refused, tmp_path):
    for column, where in (("solution", "2. Step"), ("question", "cards, gets")):
        lines = rows()
        first, last = where.split()
        lines[5][column] = f"{first}<|endoftext|> {last}"
        assert f"row 5: --{column}-key {column} holds <|endoftext|>, which ends a response" in refused(lines)
    lines = [
        {"prompt": "a?", "chosen": "b", "rejected": "c"},
        {"prompt": "d?", "chosen": "<|endoftext|>e", "rejected": "f"},
    ]
    with pytest.raises(BadInput, match="row 1: column chosen holds"):
        pairs(tmp_path, lines)


@pytest.mark.parametrize(
    "tag, space", [("<think>", "\n"), ("<reasoning>", ""), ("[THINK]", "\n"), ("<|think|>", "\n")]
)
def test_a_tag_is_not_opened_twice(tag, space, load, tmp_path):
    folder = folder_of(tmp_path, "{{ messages[0]['content'] }} Answer:" + "{{ " + repr(tag + space) + " }}")
    lines = [row | {"solution": f"{tag}\n{row['solution']}"} for row in rows()]
    train, _ = load(lines, "--model", folder)
    assert {text[: len("Step")] for text in train["solution"]} == {"Step" if space else "\nSte"}


def test_ids_beyond_the_embedding_are_refused_where_they_occur(load, refused, tmp_path):
    """Tokens were added, and the embedding was not resized. A spare token that nobody uses does no harm."""
    folder = folder_of(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(folder)
    load(rows(), "--model", folder)
    lines = rows()
    lines[7]["solution"] = "<think>so" + lines[7]["solution"]
    sentence = refused(lines, "--model", folder)
    assert (
        "row 7: --solution-key solution holds <think>, which is an id beyond the embedding of 479 rows"
        in sentence
    )
    (folder / "chat_template.jinja").write_text("<think>{{ messages[0]['content'] }}:")
    assert "a prompt has <think>, an id beyond the embedding" in refused(rows(), "--model", folder)


def test_the_first_example_is_shown_with_its_boundary(load, capsys):
    load(rows())
    first = rows()[0]
    shown = f"Question: {first['question']}\nAnswer:[{first['solution']}<|endoftext|>]"
    assert shown in capsys.readouterr().out.replace("Answer:\n[", "Answer:[")


# ---- demonstrations and their lengths --------------------------------------------------------------------

BLANKS = ("", None, " \n", "<|endoftext|>")


def partly_demonstrated(n=24):
    """`rows`, of which the second half and the first have no demonstration, in every way to have none."""
    lines = rows(n)
    for i in [0, *range(n // 2, n)]:
        lines[i]["solution"] = BLANKS[i % len(BLANKS)]
    del lines[-1]["solution"]
    return lines


@pytest.mark.parametrize("script", [sft, idft_hinted, rft_rejection, opsd])
def test_rows_without_a_demonstration_are_counted_and_left_out(script, load, capsys):
    how = {"demonstrations": True, "script": script}
    train, _ = load(partly_demonstrated(), "--eval-data", "tiny/data", **how)
    assert train["question"][:] == [row["question"] for row in rows()[1:12]]
    assert train["solution"][:] == [row["solution"] for row in rows()[1:12]]
    printed = capsys.readouterr().out
    said = "13 of 24 training rows have no demonstration (--solution-key solution): they are left out\n"
    assert said in printed
    assert "train, row 1, the demonstration in brackets" in printed  # the first that has one
    load(rows(), "--eval-data", "tiny/data", **how)
    assert "no demonstration" not in capsys.readouterr().out


@pytest.mark.parametrize("script, draw", [(prefix_rft, "draw_prefix"), (luffy, "draw_demonstration")])
def test_rows_without_a_demonstration_are_sampled_like_any_other(script, draw, load, capsys):
    train, _ = load(partly_demonstrated(), "--eval-data", "tiny/data", script=script)
    said = "13 of 24 training rows have no demonstration (--solution-key solution): all their completions are"
    assert said in capsys.readouterr().out
    assert train["question"][:] == [row["question"] for row in rows()]
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    args = script.parse_args([])
    drawn = [getattr(script, draw)(tokenizer, row | {"demonstrated": True}, 1, args) for row in train]
    assert [len(ids) > 0 for ids in drawn] == [False] + [True] * 11 + [False] * 12


def test_prefix_rft_without_prefixes_needs_no_demonstration(load, capsys):
    load(partly_demonstrated(), "--eval-data", "tiny/data", "--prefix-schedule", "none", script=prefix_rft)
    assert "no demonstration" not in capsys.readouterr().out


def test_the_held_out_tenth_is_the_same_whether_questions_are_demonstrated_or_not(load):
    every, test = load(rows(60), script=grpo)
    demonstrated, same = load(partly_demonstrated(60))
    assert test["question"][:] == same["question"][:]
    assert set(demonstrated["question"]) < set(every["question"])


def test_regimes_of_the_tiny_world(load):
    """Every row has an answer; how many have a demonstration is a choice of column or split."""
    regimes = {("--solution-key", "easy_solution"): (1649, 4000), ("--split", "few_64"): (1000, 2000)}
    for regime, (demonstrated, every) in regimes.items():
        assert len(load("tiny/data", *regime)[0]) == demonstrated
        train, _ = load("tiny/data", *regime, script=prefix_rft)
        assert len(train) == every and sum(map(bool, train["solution"])) == demonstrated


def test_the_share_beyond_the_budget_is_one_of_demonstrations(load, capsys):
    lines = partly_demonstrated()
    lines[1]["solution"] = "Let me think. " * 80 + lines[1]["solution"]
    train, _ = load(lines, "--eval-data", "tiny/data", "--max-new-tokens", 100, script=prefix_rft)
    assert "1 of 11 demonstrations (9%) exceed --max-new-tokens 100" in capsys.readouterr().out
    assert train["solution"][:3] == [None, None, lines[2]["solution"]]


def test_demonstrations_beyond_the_budget_are_counted_and_not_unlearnt(load, capsys):
    lines = [
        row | {"solution": "Let me think. " * 80 * (i % 2) + row["solution"]}
        for i, row in enumerate(rows(60))
    ]
    train, _ = load(lines, "--max-new-tokens", 100, script=prefix_rft)
    assert "demonstrations (" in (printed := capsys.readouterr().out)
    assert "exceed --max-new-tokens 100: their questions have on-policy completions only" in printed
    kept = [text for text in train["solution"] if text]
    assert 0 < len(kept) < len(train) and all(text.startswith("Step") for text in kept)
    args = prefix_rft.parse_args([])
    row = train[train["solution"][:].index(None)] | {"demonstrated": True}
    assert prefix_rft.draw_prefix(None, row, 1, args) == []
    load(lines, "--max-demo-tokens", 64)
    assert "exceed --max-demo-tokens 64: they are trained up to there, without EOS" in capsys.readouterr().out


def test_pairs_that_are_equal_where_they_end_are_dropped(tmp_path, capsys):
    start = "Let me think. " * 80
    same = {"prompt": "a?", "chosen": start + "1", "rejected": start + "2"}
    short = {"prompt": "b?", "chosen": "1", "rejected": "2"}
    equal = {"prompt": "c?", "chosen": "1", "rejected": "1"}
    assert pairs(tmp_path, [same, short, equal], "--max-demo-tokens", "100") == [("b?", "1", "2")]
    assert "2 of 3 pairs do not differ within --max-demo-tokens 100" in capsys.readouterr().out
    with pytest.raises(BadInput, match="has no pair whose responses differ"):
        pairs(tmp_path, [same, same])


@pytest.mark.parametrize(
    "rope, want",
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "yarn", "factor": 4.0}, 2048),
        ({"rope_type": "linear", "factor": 2.0}, 1024),
        ({"rope_type": "default"}, 512),
    ],
)
def test_extended_positions_are_positions(rope, want):
    config = AutoConfig.from_pretrained(TINY, max_position_embeddings=512)
    config.rope_parameters = {"rope_theta": 10000.0} | rope
    assert configs.max_positions(config) == want


# ---- held out --------------------------------------------------------------------------------------------


def test_what_is_held_out_is_held_out_by_question(load):
    """However often it occurs, in whatever order, whatever the seed."""
    lines = [
        row | {"solution": start + row["solution"]} for start in ("", "So. ", "Well. ") for row in rows(50)
    ]
    parts = [load(order, "--seed", seed) for order, seed in ((lines, 0), (lines[::-1], 1))]
    for train, test in parts:
        assert not {*train["question"]} & {*test["question"]}
        assert len(test) == 5 and len(train) == 135
    assert {*parts[0][1]["question"]} == {*parts[1][1]["question"]}


def test_held_out_data_that_are_trained_on_are_noticed(load, refused, tmp_path, capsys, monkeypatch):
    lines = rows(20)
    own = write(tmp_path / "d.jsonl", lines)
    (tmp_path / "link.jsonl").symlink_to(own)
    for other in (
        own,
        str(tmp_path / "." / "link.jsonl"),
        f"{tmp_path}/./d.jsonl",
        f"{tmp_path}/../{tmp_path.name}/d.jsonl",
    ):
        train, test = load(own, "--eval-data", other)
        assert len(test) == 2 and not {*train["question"]} & {*test["question"]}
    copy = write(tmp_path / "copy.jsonl", lines)
    assert "all 20 training questions are held out" in refused(own, "--eval-data", copy)
    capsys.readouterr()
    part = write(tmp_path / "part.jsonl", [row | {"question": row["question"] + " "} for row in lines[:5]])
    train, test = load(own, "--eval-data", part)
    assert len(train) == 15 and len(test) == 5
    assert "5 of 20 training rows ask what is held out: they are left out" in capsys.readouterr().out
    assert len(load(own, "--eval-data", copy, "--steps", 0)[1]) == 20  # nothing is trained


def test_pairs_about_held_out_questions_are_left_out(tmp_path):
    lines = [{"prompt": f"q{i}", "chosen": "1", "rejected": "2"} for i in range(3)]
    path, test = write(tmp_path / "p.jsonl", lines), {"question": ["q1"]}
    args = dpo.parse_args(["--pairs", path, "--model", str(TINY)])
    assert [question for question, *_ in dpo.load_pairs(args, test)] == ["q0", "q2"]
    groups = rlhf_ppo.load_pairs(path, "train", "--preferences", args, test)
    assert [group[0]["prompt"] for group in groups] == ["q0", "q2"]


@pytest.mark.parametrize("split", ["test", None])
def test_all_held_out_questions_are_held_out_whatever_is_evaluated(split, tmp_path):
    """Those that --eval-questions leaves out, too; with and without a split of their own."""
    given = ["--eval-data", write(tmp_path / "t.jsonl", rows(9))] if split else []
    path = write(tmp_path / "d.jsonl", [row | {"question": f"And {row['question']}"} for row in rows(90)])
    args = grpo.parse_args(["--data", path, "--eval-questions", "2", *given])
    train, test = data.load_splits(args)
    held_out = {*data.held_out(args)["question"]}
    assert len(test) == 2 and len(held_out) == 9
    assert {*test["question"]} < held_out and not held_out & {*train["question"]}


def test_pairs_have_a_split_of_their_own(tmp_path):
    for split in ("train", "test"):
        lines = [{"prompt": f"{split}?", "chosen": "1", "rejected": "2"}] * 2
        write(tmp_path / f"{split}.jsonl", lines)
    given = ["--pairs", str(tmp_path), "--split", "few_64"]
    for more, asked in (([], "train?"), (["--pairs-split", "test"], "test?")):
        assert dpo.load_pairs(dpo.parse_args([*given, *more]))[0][0] == asked


# ---- environment -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [["RANK"], ["RANK", "WORLD_SIZE"], ["WORLD_SIZE"]])
def test_a_part_of_torchruns_variables_is_no_torchrun(given, monkeypatch):
    for name in ranks.TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name in given:
        monkeypatch.setenv(name, "3")
    assert ranks.shard() == (0, 1)


def test_sigusr1_is_treated_as_sigterm():
    """Slurm's signal before a limit: the step is finished and saved, the exit status is 143."""
    state, before = {"step": 0, "stop": 0, "faults": 0, "leave": 0}, signal.getsignal(signal.SIGUSR1)
    with pytest.raises(SystemExit) as stop:
        for _ in runs.steps(state, 3):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert runs.due(state, 0)
    assert stop.value.code == 143 and state["step"] == 1 and type(state["stop"]) is int
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_run_is_continued_on_the_rows_that_it_began_with(load, tmp_path):
    args = sft.parse_args(["--data", write(tmp_path / "a.jsonl", rows(30)), "--model", str(TINY)])
    data.load_splits(args, demonstrations=True)
    first = dict(vars(args))
    data.load_splits(args, demonstrations=True)
    folders.same_arguments(first, args)
    lines = rows(30)
    lines[3]["solution"] += " "
    write(tmp_path / "a.jsonl", lines)
    data.load_splits(args, demonstrations=True)
    with pytest.raises(BadInput, match="--resume: the rows of --data or --eval-data have changed"):
        folders.same_arguments(first, args)
    args.lr = 1.0
    with pytest.raises(BadInput, match="--resume: lr differ"):
        folders.same_arguments(first, args)


def test_a_run_is_continued_without_its_first_model(tmp_path):
    """A checkpoint has all of it; --model may be gone."""
    shutil.copytree(TINY, tmp_path / "checkpoint-000001")
    args = sft.parse_args(["--model", str(tmp_path / "gone"), "--output-dir", str(tmp_path), "--resume"])
    assert configs.load_tokenizer(args).eos_token_id == 0 and configs.load_config(args).vocab_size == 479
    args.resume = False
    with pytest.raises(BadInput, match="--model .*gone cannot be loaded"):
        configs.load_config(args)


def test_configurations_are_named(load, refused, tmp_path):
    folder = tmp_path / "gsm"
    names, files = ("main", "socratic"), ""
    for name in names:
        (folder / name).mkdir(parents=True)
        write(folder / name / "train.jsonl", rows())
        files += f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train.jsonl\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    sentence = refused(str(folder))
    assert f"several configurations, main, socratic; choose one, as in --data {folder}:main." in sentence
    assert "no such configuration, only main, socratic" in refused(f"{folder}:other")
    assert len(load(f"{folder}:main")[0]) == 21


def test_a_reward_model_that_is_none_gets_its_own_sentence(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    config = AutoConfig.from_pretrained(TINY, num_labels=2, architectures=["LlamaForSequenceClassification"])
    config.save_pretrained(tmp_path / "two")
    args = argparse.Namespace(
        reward_model=str(tmp_path / "two"), model=str(TINY), gradient_checkpointing=False
    )
    with pytest.raises(BadInput, match="two: it has 2 labels, and a reward model has one"):
        models.load_scorer(args.reward_model, tokenizer, args)
    CohereConfig(num_hidden_layers=1).save_pretrained(tmp_path / "cohere")
    args.reward_model = None
    with pytest.raises(BadInput, match="^--model .*cohere has no token classifier in transformers"):
        models.load_scorer(tmp_path / "cohere", tokenizer, args, new_head=True)


def test_a_sentence_keeps_the_part_that_helps_and_names_what_was_given(refused, tmp_path):
    error = flags.one_line(ValueError("Cannot read.\n\n" + "x" * 1000 + "\nGive a name."))
    assert error.startswith("Cannot read. xx") and error.endswith("Give a name") and len(error) < 420
    folder = tmp_path / "bare"
    folder.mkdir()
    for sentence in (refused(str(folder)), refused(rows(), "--eval-split", "none")):
        assert "--data" in sentence and "--eval-data" not in sentence
    sentence = refused([row | {"question": "a" * 5000} for row in rows()], script=grpo)
    assert "lower --max-new-tokens, or" in sentence and "--max-demo-tokens" not in sentence


# ---- scaled logits ---------------------------------------------------------------------------------------

SIZE = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
SCALED = {
    "granite": GraniteConfig(**SIZE, num_key_value_heads=2, logits_scaling=8.0),
    "cohere": CohereConfig(**SIZE, num_key_value_heads=2, logit_scale=0.0625),
}


@pytest.mark.parametrize("name", SCALED)
def test_scaled_logits_are_a_temperature(name):
    """`logprobs` of a Granite and of a Cohere are those of their logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SCALED[name]).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    model.logit_divisor = heads.logit_divisor(model, "--model x")
    assert model.logit_divisor == {"granite": 8.0, "cohere": 16.0}[name]
    tokens = torch.randint(50, (2, 9))
    mask = torch.ones_like(tokens)
    mask[:, 0] = 0
    got, _ = grpo.logprobs(model, tokens, mask, 0.7)
    want = (model(tokens).logits[:, :-1] / 0.7).log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(got[:, 1:], want, rtol=0, atol=1e-5)


def test_logits_that_are_scaled_by_more_than_a_factor_are_refused_by_name():
    model = AutoModelForCausalLM.from_config(SCALED["granite"]).eval()
    model.lm_head.register_forward_hook(lambda head, inputs, logits: logits.tanh() + 1)
    with pytest.raises(BadInput, match=r"--model x: its logits are scaled \(logits_scaling\) by more than"):
        heads.logit_divisor(model, "--model x")


# ---- a real model's first hour ---------------------------------------------------------------------------


def test_sampling_keeps_within_the_memory_that_is_free(tiny, monkeypatch, capsys):
    """Cache: 2 x 4 layers x 4 heads x 32 x 4 bytes a token. Fewer rows give the same responses in parts."""
    model, tokenizer = tiny
    args = grpo.parse_args(["--max-new-tokens", "100", "--sample-rows", "512"])
    need = memory.row_bytes(model, 100, 100)
    assert 200 * 4096 < need < 3 * 200 * 4096
    monkeypatch.setattr(memory, "free", lambda: 10**12)
    assert memory.rows(model, [100] * 600, args) == [512] * 600
    monkeypatch.setattr(memory, "free", lambda: int(need * 40 / memory.SHARE) + 1)
    memory.SAID.clear()
    assert memory.rows(model, [100] * 600, args) == [32] * 600
    assert memory.rows(model, [100] * 600, args, contexts=2) == [16] * 600
    assert "--sample-rows 512: memory has room for 32 rows at once" in capsys.readouterr().out

    seen = []
    batch = decoding.Batch
    monkeypatch.setattr(decoding, "Batch", lambda *a, **k: seen.append(len(a[1])) or batch(*a, **k))
    prompts = tok.encode_prompts(tokenizer, ["1 + 1?"] * 40)
    args.max_new_tokens = 2
    monkeypatch.setattr(
        memory, "free", lambda: 9 * memory.row_bytes(model, len(prompts[0]), 2) / memory.SHARE
    )
    grpo.sample(model, tokenizer, prompts, 1.0, args)
    assert seen == [8] * 5
    monkeypatch.setattr(memory, "free", lambda: 10)
    with pytest.raises(BadInput, match="--max-new-tokens 2: a response takes 0.0 GiB, 0.0 GiB are free"):
        memory.rows(model, [100], args)


def test_a_long_prompt_does_not_make_batches_of_short_ones_small(tiny, monkeypatch, capsys):
    """A hybrid that ends in a demonstration of 900 tokens, beside completions of prompts of 20."""
    model, _ = tiny
    args = grpo.parse_args(["--max-new-tokens", "100", "--sample-rows", "512"])
    short, long = (memory.row_bytes(model, tokens, 100) for tokens in (20, 900))
    assert long > 8 * short
    monkeypatch.setattr(memory, "free", lambda: 2.5 * long / memory.SHARE)
    memory.SAID.clear()
    sizes = memory.rows(model, [900, *[20] * 15], args)
    assert sizes == [2, *[32] * 15]
    said = "--sample-rows 512: memory has room for 2 rows of the longest prompts at once"
    assert said in capsys.readouterr().out
    parts = decoding.batches(range(16), sizes, [900, *[20] * 15])
    assert [len(part) for part in parts] == [15, 1]


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(monkeypatch):
    weights = memory.GIB * 915_000 * 4 // memory.GIB  # of the tiny model, about
    monkeypatch.setattr(memory, "free", lambda: 2 * weights)
    args = sft.parse_args(["--model", str(TINY)])
    with pytest.raises(BadInput, match="weights, gradients and AdamW's moments take 0.0 GiB"):
        memory.check_training(args)
    args.steps = 0
    memory.check_training(args)  # its weights alone fit


def test_what_a_teacher_reads_is_not_truncated(load, refused):
    """Long solutions stay whole, because the answer is at their end; one that cannot fit is refused."""
    lines = rows()
    lines[3]["solution"] = "word " * 300 + lines[3]["solution"]
    train, _ = load(lines, script=opsd)
    assert max(map(len, train["solution"])) == len(lines[3]["solution"])
    lines[3]["solution"] = "word " * 3000
    said = refused(lines, script=opsd)
    assert "row 3: " in said and "lower --max-new-tokens, or remove the row" in said


def test_a_teacher_of_its_own_weights_counts(monkeypatch):
    """The initial policy beside weights, gradients and two moments; the current one is the model itself."""
    monkeypatch.setattr(memory, "free", lambda: 4.5 * 4 * 915_000)
    args = opsd.parse_args(["--model", str(TINY), "--teacher", "current"])
    memory.check_training(args)
    args.teacher = "initial"
    with pytest.raises(BadInput, match="use a smaller model"):
        memory.check_training(args)


def test_the_limit_of_a_container_counts(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 200\n")
    assert memory.container(tmp_path) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.container(tmp_path) == memory.container(tmp_path / "none") == 10**15


@pytest.fixture
def judged(load, tiny, monkeypatch):
    """judged(*flags): what `evaluate` of the tiny model returns on a few questions."""
    model, tokenizer = tiny

    def go(*more):
        args = sft.parse_args(["--eval-samples", "1", *more])
        _, test = load(rows(40), *more)
        return sft.evaluate(model, tokenizer, test, args)

    return go


def test_an_evaluation_leaves_its_texts_and_says_what_was_truncated(judged, tmp_path, capsys):
    ended = []
    decoding.ENDED.append(ended.append)
    metrics = judged("--max-new-tokens", "5")
    decoding.ENDED.remove(ended.append)
    printed, bar = capsys.readouterr()
    assert "of the responses were truncated at --max-new-tokens 5; raise it" in printed
    assert "evaluating" in bar and "/8 [" in bar and sum(ended) == 8  # responses, with an estimate
    (tmp_path / "samples.jsonl").touch()
    runs.log(tmp_path, {"step": 3} | metrics)
    [line] = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert "completions" not in line and "accuracy" in line
    lines = [json.loads(x) for x in (tmp_path / "samples.jsonl").read_text().splitlines()]
    names = {"step", "kind", "question", "text", "gold", "correct", "truncated", "temperature"}
    assert (
        len(lines) == 8
        and {*lines[0]} == names
        and [x["temperature"] for x in lines] == [0.0] * 4 + [1.0] * 4
    )
    runs.append(tmp_path / "samples.jsonl", [{"step": 3, "question": "a?", "solution": "b", "kept": True}])
    train = data.load_samples(tmp_path)  # what is trained is not what was evaluated
    assert train["question"][:] == ["a?"] and train["kept"][:] == [True]


def test_evaluation_has_a_temperature_of_its_own(judged, monkeypatch):
    seen, sample = [], sft.sample
    monkeypatch.setattr(
        sft,
        "sample",
        lambda m, t, p, temperature, *a: seen.append(temperature) or sample(m, t, p, temperature, *a),
    )
    judged("--max-new-tokens", "3", "--eval-temperature", "0.6")
    assert seen == [0.0, 0.6]


def test_the_first_evaluation_can_be_skipped(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    small = (
        f"--data {write(tmp_path / 'd.jsonl', rows())} --output-dir {tmp_path}/run --steps 1 --batch-size 2"
    )
    small += " --eval-questions 2 --eval-samples 0 --max-new-tokens 8 --save-every 0"
    sft.main(sft.parse_args([*small.split(), "--eval-first", "off"]))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert ["accuracy" in line for line in lines] == [False, True]
    with pytest.raises(BadInput, match="--eval-first off"):
        flags.check(sft.parse_args(["--steps", "0", "--eval-first", "off"]))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_real_model_does_not_get_the_tiny_worlds_learning_rate(script, tmp_path, capsys):
    args = script.parse_args([])
    tiny = args.lr
    flags.settle_rates(args, is_small=True)
    assert args.lr == tiny and type(args.lr) is float
    real = script.parse_args([])
    flags.settle_rates(real, is_small=False)
    assert real.lr < tiny / 4 and type(real.lr) is float
    assert f"--lr is not given: {real.lr:g}, usual for real models" in capsys.readouterr().out
    given = script.parse_args(["--lr", f"{tiny:g}"])
    flags.settle_rates(given, is_small=False)
    assert given.lr == tiny
    assert configs.is_small(AutoConfig.from_pretrained(TINY))
    assert not configs.is_small(AutoConfig.from_pretrained(TINY, hidden_size=576))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_real_model_is_told_that_the_budget_is_the_tiny_worlds(script, capsys):
    """There is no usual one, so it is kept and said; not in the tiny world, and not if one is given."""
    for small, given, said in (
        (False, [], True),
        (True, [], False),
        (False, ["--max-new-tokens", "64"], False),
    ):
        args = script.parse_args(given)
        flags.settle_rates(args, small)
        assert ("--max-new-tokens 100 is for the tiny world" in capsys.readouterr().out) == said
        assert args.max_new_tokens == int(given[1] if given else flags.TINY_BUDGET)


@pytest.mark.parametrize("given, is_small", [([], False), ([], True), (["--annotator", "human"], False)])
def test_the_simulated_annotators_taste_is_said_for_a_real_model(given, is_small, capsys):
    flags.settle_rates(rlhf_ppo.parse_args(given), is_small)
    said = "--annotator simulated likes short answers" in capsys.readouterr().out
    assert said == (not given and not is_small)


def test_a_step_with_mostly_truncated_completions_gets_one_hint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(screen, "SAID", set())
    step = {"step": 1, "truncated_frac": 0.77, "tokens_generated": 9}
    runs.log(tmp_path, step | {"truncated_frac": 0.5})
    runs.log(tmp_path, {"step": 1, "truncated_frac": 0.77})  # demonstrations: `check_budget` speaks of these
    assert "raise --max-new-tokens" not in capsys.readouterr().out
    runs.log(tmp_path, step)
    runs.log(tmp_path, step)
    printed = capsys.readouterr().out
    assert printed.count("step 1: 77% of the completions were truncated; raise --max-new-tokens") == 1


def test_the_bar_counts_responses_while_a_step_samples(monkeypatch, capsys):
    """On its first change, and then once a second; an evaluation has a bar of its own."""
    monkeypatch.setattr(runs, "OFTEN", 0)
    state = {"step": 0, "faults": 0, "stop": 0, "leave": 0}
    for step in runs.steps(state, 2):
        for ended in (0, 3, 0, 2):
            for function in decoding.ENDED:
                function(ended)
        assert ", 5 responses sampled" in capsys.readouterr().err, step  # of this step alone
        with runs.evaluating(7):
            for function in decoding.ENDED:
                function(7)
        assert "responses sampled" not in capsys.readouterr().err
    assert decoding.ENDED == []


def test_the_size_of_a_checkpoint_is_said_before_a_large_run(tmp_path, capsys):
    args = sft.parse_args(["--output-dir", str(tmp_path / "run")])
    for size, said in ((2**20, False), (540 * 10**6, True)):
        folders.open_folder(tmp_path / f"run{size}", {}, args, size)
        assert ("a checkpoint takes 1.5 GiB, for a moment there are two" in capsys.readouterr().out) == said


def test_annotations_of_a_calculator_are_said(load, capsys):
    some = rows(12) + [{"question": "Q?", "solution": "He has 48/2 = <<48/2=24>>24.", "answer": "24"}]
    some += [{"question": "Shift?", "solution": "1 << 2 = 4, and 9 >> 1 = 4.", "answer": "4"}]
    load(some)
    printed = capsys.readouterr().out
    sentence = "solution hold annotations of a calculator, such as <<48/2=24>>, and are trained"
    assert f"1 rows of --solution-key {sentence}" in printed
    load(rows(12))
    assert "calculator" not in capsys.readouterr().out


def test_without_a_chat_template_prompts_are_plain(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder = folder_of(tmp_path, "system: Be brief. user: {{ messages[0]['content'] }} assistant:")
    args = sft.parse_args(
        ["--model", str(folder), "--chat-template", "off", "--output-dir", str(tmp_path / "run")]
    )
    _, _, model, tokenizer = runs.open_run(args)
    for read in (tokenizer, configs.load_tokenizer(args)):
        [prompt] = tok.encode_prompts(read, ["a?"])
        assert read.decode(prompt) == "Question: a?\nAnswer:\n"
    runs.save_model(tmp_path / "final", model, tokenizer)  # a model that is used as it was trained
    assert AutoTokenizer.from_pretrained(tmp_path / "final").chat_template is None


def test_a_gguf_file_gets_a_sentence(refused, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for path in (tmp_path / "m.gguf", tmp_path):
        assert "it is in the GGUF format, which is for inference" in refused(rows(), "--model", path)


def test_bf16_on_a_cpu_without_it_is_said(monkeypatch, capsys):
    args = argparse.Namespace(dtype="bf16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for computes, said in ((True, ""), (False, "--dtype bf16: this CPU has no instructions for it")):
        monkeypatch.setattr(configs, "computes_bf16", lambda computes=computes: computes)
        configs.check_dtype(args)
        assert capsys.readouterr().out.startswith(said) and bool(said) != computes


def test_the_bar_shows_the_speed_and_the_share_of_sampling(tmp_path, capsys):
    state = {"step": 0, "faults": 0, "stop": 0, "leave": 0}
    for step in runs.steps(state, 1):
        spent = {"seconds_sample": 3.0, "seconds_train": 1.0, "tokens_generated": 300, "tokens_trained": 100}
        runs.log(tmp_path, {"step": step} | spent)
    assert "100 tokens/s, sampling 75%" in capsys.readouterr().err


def test_disagreement_of_sampling_and_scoring_says_what_it_may_be():
    args, mask = grpo.parse_args([]), torch.ones(2, 3)
    with pytest.raises(BadInput, match="its logits are not hidden states times"):
        evaluation.check_ratio(torch.full((2, 3), 2.0), mask, args)
