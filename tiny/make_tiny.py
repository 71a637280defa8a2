"""Make the tiny world that every script runs in by default: a language model of 0.9 M parameters and its data.

A model that is to be post-trained needs a past. This file gives it one, in the order in which things happen:

    tokenizer    byte-level BPE over a sample of the documents, one token a digit
    data         train / test / harder / side as jsonl, with right and with unreliable demonstrations
    pretrain     stage 1 teaches the skills, stage 2 the (bad) habits that post-training is to change
    export       an ordinary Hugging Face model folder, read back and compared
    preferences  pairs sampled from the model and labelled by a simulated annotator
    datasheet    what the model can do before any post-training, measured and written into README.md

    python tiny/make_tiny.py                       # everything; an interrupted pre-training continues
    python tiny/make_tiny.py --stages data         # only some stages
"""

import argparse
import json
import math
import random
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # so that `python tiny/make_tiny.py` finds common/ as `pytest` does
from common.verifier import verify  # noqa: E402

# ---------------------------------------------------------------------------------------------------------
# The task: follow a quantity through a number of steps
# ---------------------------------------------------------------------------------------------------------

NAMES = "Ann Bob Cat Dan Eve Gus Ivy Jon Kim Leo Mia Ned Pam Ray Sue Tom".split()
ITEMS = "apples coins books cards shells stamps".split()
HINT = (
    "{question}\nReference solution: {solution}\nIn your own words:"  # how a reference is shown to the model
)
TRAIN_MIX = {1: 0.1, 2: 0.15, 3: 0.2, 4: 0.2, 5: 0.2, 6: 0.15}  # levels (number of steps) in train.jsonl
SIDE_KINDS = ("arithmetic", "comparison", "median")


def apply(op, n, value):
    return value + n if op == "+" else value - n if op == "-" else value * n


def draw_step(rng, value):
    """One operation that keeps the running value within 1..99."""
    while True:
        op = rng.choice("+-*")
        n = rng.randint(2, 3) if op == "*" else rng.randint(2, 9)
        if 1 <= apply(op, n, value) <= 99:
            return op, n


def running_values(start, ops):
    values = [start]
    for op, n in ops:
        values.append(apply(op, n, values[-1]))
    return values


def draw_problem(rng, level):
    """A problem of `level` steps. `key`, the operation list, is its identity: names and things do not matter."""
    start, ops = rng.randint(2, 20), []
    for _ in range(level):
        ops.append(draw_step(rng, running_values(start, ops)[-1]))
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    words = {"+": "gets {}", "-": "loses {}"}
    told = [words[op].format(n) if op in words else ["doubles", "triples"][n - 2] for op, n in ops]
    question = f"{name} has {start} {item}, {', '.join(told)}. How many {item} does {name} have?"
    values = running_values(start, ops)
    return {"question": question, "answer": str(values[-1]), "level": level, "values": values, "ops": ops,
            "key": (start, *ops)}  # fmt: skip


def draw_side(rng, kind):
    """Another skill of the model, never post-trained: forgetting shows here."""
    if kind == "arithmetic":
        a = rng.randint(2, 50)
        op, n = draw_step(rng, a)
        question, answer, shown = f"Compute {a} {op} {n}.", apply(op, n, a), ""
    elif kind == "comparison":
        (a, b), word = rng.sample(range(1, 100), 2), rng.choice(["larger", "smaller"])
        question, answer, shown = (
            f"Which is {word}, {a} or {b}?",
            max(a, b) if word == "larger" else min(a, b),
            "",
        )
    else:
        a, b, c = rng.sample(range(1, 100), 3)
        low, answer, high = sorted([a, b, c])
        question, shown = f"What is the median of {a}, {b}, {c}?", f"sorted: {low} {answer} {high}. "
    return {"question": question, "answer": str(answer), "level": f"side: {kind}", "key": question,
            "response": f"{shown}\\boxed{{{answer}}}"}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------
# Two ways to write a solution: the demonstrator's and the model's own
# ---------------------------------------------------------------------------------------------------------


def demonstration(rng, p, slip=False):
    """Numbered steps, every operation spelled out. With a slip one result is wrong and is carried to the end."""
    values = p["values"]
    while slip:
        k = rng.randint(1, p["level"])
        wrong = values[k] + rng.choice([-10, -2, -1, 1, 2, 10])
        values = p["values"][:k] + running_values(wrong, p["ops"][k:])
        slip = not all(1 <= v <= 99 for v in values)  # an impossible slip: draw another one
    text = rng.choice(
        ["Let me work step by step.", "I go through the steps in order.", "First I list the steps."]
    )
    for i, (op, n) in enumerate(p["ops"]):
        text += f" Step {i + 1}: {values[i]} {op} {n} = {values[i + 1]}."
    return (
        text + rng.choice([" The answer is", " So the answer is", " Therefore"]) + f" \\boxed{{{values[-1]}}}"
    )


def terse(rng, p, slip=0.0, skip=0.0):
    """Only the running values: "7 11 22 17 \\boxed{17}", perhaps with slips (carried on) and left-out values."""
    shown, off = [str(p["values"][0])], 0
    for value in p["values"][1:]:
        if rng.random() < slip:
            off += rng.choice([-10, -1, 1, 10])
        if rng.random() >= skip:
            shown.append(str(abs(value + off)))
    return " ".join(shown) + f" \\boxed{{{abs(p['values'][-1] + off)}}}"


# ---------------------------------------------------------------------------------------------------------
# The data sets
# ---------------------------------------------------------------------------------------------------------


def draw_distinct(rng, draw, count, taken):
    """`count` problems whose identity is new; adds them to `taken`."""
    found = []
    while len(found) < count:
        p = draw(rng)
        if p["key"] not in taken:
            taken.add(p["key"])
            found.append(p)
    return found


def row(rng, p):
    if "response" in p:
        solution = noisy = p["response"]
    else:
        # Drawn from a copy of the generator, so that both demonstrators use the same words.
        state = rng.getstate()
        solution = demonstration(rng, p)
        rng.setstate(state)
        noisy = demonstration(random.Random(rng.random()), p, slip=True) if rng.random() < 0.5 else solution
    return {"question": p["question"], "answer": p["answer"], "solution": solution, "noisy_solution": noisy,
            "level": str(p["level"])}  # fmt: skip


def held_out():
    """The problems nobody may train on, by split, and the set of their identities."""
    taken, splits = set(), {}
    for split, levels in (("test", range(1, 7)), ("harder", (7, 8)), ("side", SIDE_KINDS)):
        rng = random.Random(split)
        draws = draw_side if split == "side" else draw_problem
        problems = [p for lv in levels for p in draw_distinct(rng, lambda r, lv=lv: draws(r, lv), 100, taken)]
        rng.shuffle(problems)  # a script that evaluates on the first n rows sees every level
        splits[split] = problems
    return splits, taken


def make_data(folder, train_size=4000):
    folder.mkdir(parents=True, exist_ok=True)
    splits, taken = held_out()
    rng = random.Random("train")
    train = []
    while len(train) < train_size:  # the same operations may return with another name; held-out ones may not
        p = draw_problem(rng, rng.choices(list(TRAIN_MIX), TRAIN_MIX.values())[0])
        if p["key"] not in taken:
            train.append(p)
    for split, problems in {"train": train, **splits}.items():
        rng = random.Random(f"{split} solutions")
        write_jsonl(folder / f"{split}.jsonl", [row(rng, p) for p in problems])


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------------------------------------------
# The documents of pre-training
# ---------------------------------------------------------------------------------------------------------

# Stage 1 teaches skills: single steps in the numbered style on all levels, running values, the side skills.
# Stage 2 teaches habits: short problems, values in the head, slips, guesses; the numbered style nearly vanishes.
STAGES = [
    dict(steps=2200, lr=3e-3, side=0.2, hint=0.12, slip=0.0, skip=0.0,
         levels={1: 0.15, 2: 0.2, 3: 0.2, 4: 0.15, 5: 0.15, 6: 0.15},
         styles=dict(numbered=0.6, terse=0.34, direct=0.03, unboxed=0.03)),
    dict(steps=400, lr=7e-4, side=0.2, hint=0.15, slip=0.06, skip=0.1,
         levels={1: 0.25, 2: 0.3, 3: 0.25, 4: 0.1, 5: 0.06, 6: 0.04},
         styles=dict(numbered=0.01, terse=0.56, direct=0.25, unboxed=0.18)),
]  # fmt: skip
BATCH, CHUNK, WARMUP, PROMPT_WEIGHT = 16, 8, 50, 0.05


def document(rng, stage, taken):
    """One (user message, response) pair; held-out problems are drawn again."""

    def fresh(draw, *args):
        while (p := draw(rng, *args))["key"] in taken:
            pass
        return p

    if rng.random() < stage["side"]:
        p = fresh(draw_side, rng.choice(SIDE_KINDS))
        return p["question"], p["response"]
    if rng.random() < stage["hint"]:  # a reference beside the question: retell it, tersely and without slips
        p = fresh(draw_problem, rng.randint(1, 6))
        return HINT.format(question=p["question"], solution=demonstration(rng, p)), terse(rng, p)
    p = fresh(draw_problem, rng.choices(list(stage["levels"]), stage["levels"].values())[0])
    style = rng.choices(list(stage["styles"]), stage["styles"].values())[0]
    if style == "numbered":
        response = demonstration(rng, p)
    elif style == "terse":
        response = terse(rng, p, stage["slip"], stage["skip"])
    else:
        response = f"\\boxed{{{p['answer']}}}" if style == "direct" else f"The answer is {p['answer']}."
    return p["question"], response


def render(message):
    return f"Question: {message}\nAnswer:"  # what the chat template below makes of one user message


CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'Answer:' + m['content'] + eos_token + '\n' }}"
    "{% elif m['role'] == 'user' %}{{ 'Question: ' + m['content'] + '\n' }}"
    "{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)


def make_tokenizer(path, taken):
    tok = Tokenizer(models.BPE())
    # One token a digit (with its space), so that numbers of any size are spelled the same way everywhere.
    split = pre_tokenizers.Split(Regex(r" ?\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s"), behavior="isolated")
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<|endoftext|>", "<|pad|>"], min_frequency=2,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)  # fmt: skip
    rng = random.Random("tokenizer")
    tok.train_from_iterator(
        (render(m) + r for m, r in (document(rng, STAGES[0], taken) for _ in range(4000))), trainer
    )
    path.mkdir(parents=True, exist_ok=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|endoftext|>", pad_token="<|pad|>",
                                   chat_template=CHAT_TEMPLATE, model_max_length=2048,
                                   clean_up_tokenization_spaces=False)  # fmt: skip
    fast.save_pretrained(path)


# ---------------------------------------------------------------------------------------------------------
# Pre-training
# ---------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon (adjust_lr_fn="match_rms_adamw") in fp32: bf16 matrices are 15 times slower on many CPUs."""

    def __init__(self, params, lr=0.0, momentum=0.95, weight_decay=0.05):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(m, group["momentum"])  # Nesterov
                x = x.T if (tall := x.shape[0] > x.shape[1]) else x
                x = x / (x.norm() + 1e-7)
                for _ in range(5):  # Newton-Schulz: all singular values towards 1, without an SVD
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(x.T if tall else x, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def batches(tok, chunk, stage, taken):
    """CHUNK batches of documents of about equal length (less padding), in random order. Depends on `chunk` only."""
    rng = random.Random(f"pretrain {chunk}")
    docs = []
    for message, response in (document(rng, stage, taken) for _ in range(BATCH * CHUNK)):
        prompt, answer = tok.encode(render(message)).ids, tok.encode(response).ids
        docs.append((prompt + answer + [tok.token_to_id("<|endoftext|>")], len(prompt)))
    docs.sort(key=lambda d: len(d[0]))
    cut = [docs[i : i + BATCH] for i in range(0, len(docs), BATCH)]
    rng.shuffle(cut)
    for part in cut:
        ids = torch.full((BATCH, len(part[-1][0])), tok.token_to_id("<|pad|>"))
        weight = torch.zeros(ids.shape)
        for i, (doc, n_prompt) in enumerate(part):
            ids[i, : len(doc)] = torch.tensor(doc)
            weight[i, : len(doc)] = 1.0
            weight[i, :n_prompt] = (
                PROMPT_WEIGHT  # a little loss on the prompt: it teaches the form of a question
            )
        yield ids, weight


def learning_rate(step):
    """Warm-up and cosine to 5 %, once per stage; also says which stage the step belongs to."""
    stage = STAGES[0] if step < STAGES[0]["steps"] else STAGES[1]
    at = step if stage is STAGES[0] else step - STAGES[0]["steps"]
    decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * at / stage["steps"]))
    return stage, stage["lr"] * min(1.0, (at + 1) / WARMUP) * decay


def pretrain(work, taken, save_every=480):
    torch.manual_seed(0)
    tok = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    config = LlamaConfig(
        vocab_size=tok.get_vocab_size(), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tok.token_to_id("<|endoftext|>"), pad_token_id=tok.token_to_id("<|pad|>"),
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    # Muon on the hidden matrices is far ahead of AdamW alone at this budget; Muon takes matrices only.
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = Muon(hidden)
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)

    step, ckpt, parts = 0, work / "pretrain.pt", {"model": model, "muon": muon, "adamw": adamw}
    if ckpt.exists():
        saved = torch.load(ckpt)
        step = saved["step"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    t0, last = time.time(), sum(s["steps"] for s in STAGES)
    while step < last:
        for ids, weight in batches(tok, step // CHUNK, learning_rate(step)[0], taken):
            for group in muon.param_groups + adamw.param_groups:
                group["lr"] = learning_rate(step)[1]
            logits = model(ids).logits[:, :-1]  # right padding needs no mask under causal attention
            nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            loss = (nll * weight[:, 1:].flatten()).sum() / weight[:, 1:].sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for opt in (muon, adamw):
                opt.step()
                opt.zero_grad()
            step += 1
        if step % save_every < CHUNK or step >= last:
            print(f"pretrain {step}/{last}  loss {loss.item():.3f}  {time.time() - t0:.0f} s", flush=True)
            torch.save({"step": step, **{n: part.state_dict() for n, part in parts.items()}}, work / "tmp.pt")
            (work / "tmp.pt").replace(ckpt)  # a kill while saving leaves the previous checkpoint whole
    return model.eval()


def export(model, work, folder):
    """A model folder as any hub model's; read back, it must spell and score as it did in training."""
    tok = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    model.generation_config = GenerationConfig(
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    again, auto = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rng, raw = random.Random("export"), Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    for _ in range(200):
        message, response = document(rng, STAGES[0], set())
        chat = [{"role": "user", "content": message}]
        ids = auto.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert ids == raw.encode(render(message)).ids
        assert auto.encode(response, add_special_tokens=False) == raw.encode(response).ids
        assert auto.decode(raw.encode(response).ids) == response
    x = torch.tensor([ids])
    assert torch.equal(model(x).logits, again(x).logits)


# ---------------------------------------------------------------------------------------------------------
# What the model does: samples, preferences between them, the datasheet
# ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(model, tok, messages, k, seed, max_new=120, rows_at_once=256):
    """k responses at temperature 1 to every message -> a list of k texts each."""
    torch.manual_seed(seed)
    chats = [[{"role": "user", "content": m}] for m in messages]
    prompts = [tok.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out = [None] * len(prompts)
    for start in range(0, len(order), rows_at_once // k):
        part = order[start : start + rows_at_once // k]
        batch = tok.pad({"input_ids": [prompts[i] for i in part]}, padding_side="left", return_tensors="pt")
        ids = model.generate(**batch, max_new_tokens=max_new, num_return_sequences=k)
        texts = tok.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for j, i in enumerate(part):
            out[i] = texts[j * k : (j + 1) * k]
    return out


def style(text):
    if "Step 1:" in text:
        return "numbered"
    return "unboxed" if "\\boxed" not in text else "direct" if text.startswith("\\boxed") else "terse"


def utility(tok, text, answer):
    """What the simulated annotator values; hidden from the scripts."""
    shows_work = len(re.findall(r"\d+", text.split("\\boxed")[0])) >= 2
    too_long = max(0, len(tok.encode(text)) - 48)
    return 2.0 * verify(text, answer) + 1.0 * shows_work + 0.5 * ("\\boxed" in text) - 0.02 * too_long


def make_preferences(model, tok, data, folder, n_train=2000, n_test=300):
    """Two samples of the model to a question; a Bradley-Terry annotator of slope 2 says which is better."""
    questions = read_jsonl(data / "train.jsonl")[: 2 * n_train]
    rng, pairs, seen = random.Random("preferences"), [], set()
    for r, (a, b) in zip(
        questions, sample(model, tok, [r["question"] for r in questions], 2, seed=1), strict=True
    ):
        if a == b or r["question"] in seen:  # nothing to compare; or one question in both splits
            continue
        seen.add(r["question"])
        ua, ub = utility(tok, a, r["answer"]), utility(tok, b, r["answer"])
        if rng.random() > 1 / (1 + math.exp(-2 * (ua - ub))):
            a, b, ua, ub = b, a, ub, ua
        pairs.append({"prompt": r["question"], "chosen": a, "rejected": b,
                      "utility_chosen": round(ua, 2), "utility_rejected": round(ub, 2)})  # fmt: skip
    assert len(pairs) >= n_train + n_test, len(pairs)
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "train.jsonl", pairs[:n_train])
    write_jsonl(folder / "test.jsonl", pairs[n_train : n_train + n_test])


def datasheet(model, tok, data, readme, k=8):
    """Measure the model and write the table between the marks in the README."""
    groups = {}
    for split in ("train", "test", "harder", "side"):
        rows = read_jsonl(data / f"{split}.jsonl")[: 400 if split == "train" else None]
        for r in rows:
            name = "training mixture" if split == "train" else f"{split}: level {r['level']}"
            groups.setdefault(name.replace("level side: ", ""), []).append(r)
    table = ["| questions | n | pass@1 | pass@8 | with the hint | numbered | terse | direct | unboxed |"]
    table.append("|---|---|---|---|---|---|---|---|---|")
    for name in sorted(groups):
        rows = groups[name]
        texts = sample(model, tok, [r["question"] for r in rows], k, seed=2)
        right = [[verify(t, r["answer"]) for t in ts] for r, ts in zip(rows, texts, strict=True)]
        flat = [style(t) for ts in texts for t in ts]
        cells = [f"{sum(map(sum, right)) / len(flat):.2f}", f"{sum(map(any, right)) / len(rows):.2f}", ""]
        if not name.startswith("side"):
            hints = [HINT.format(**r) for r in rows]
            answers = [t[0] for t in sample(model, tok, hints, 1, seed=3)]
            good = [verify(t, r["answer"]) for r, t in zip(rows, answers, strict=True)]
            cells[2] = (
                f"{sum(good) / len(good):.2f} ({flat_share([style(t) for t in answers], 'terse')} terse)"
            )
            cells += [flat_share(flat, s) for s in ("numbered", "terse", "direct", "unboxed")]
        else:
            cells += [""] * 4
        table.append("| " + " | ".join([name, str(len(rows)), *cells]) + " |")
        print(table[-1], flush=True)
    head, _, tail = readme.read_text().partition("<!-- datasheet -->\n")
    tail = tail.partition("<!-- /datasheet -->")[2]
    readme.write_text(head + "<!-- datasheet -->\n" + "\n".join(table) + "\n<!-- /datasheet -->" + tail)


def flat_share(names, name):
    return f"{names.count(name) / len(names):.2f}"


def main():
    stages = ["tokenizer", "data", "pretrain", "preferences", "datasheet"]
    ap = argparse.ArgumentParser(
        description="Make the tiny world: tokenizer, data, model, preferences, datasheet."
    )
    ap.add_argument("--stages", nargs="+", default=stages, choices=stages)
    args = ap.parse_args()
    torch.set_num_threads(1)  # the sums of two threads are not the sums of one: one thread, the same bits
    work, data = HERE / "work", HERE / "data"
    taken, t0 = held_out()[1], time.time()
    if "tokenizer" in args.stages:
        make_tokenizer(work / "tokenizer", taken)
    if "data" in args.stages:
        make_data(data)
    if "pretrain" in args.stages:
        export(pretrain(work, taken), work, HERE / "model")
    if "preferences" in args.stages or "datasheet" in args.stages:
        model, tok = (
            AutoModelForCausalLM.from_pretrained(HERE / "model"),
            AutoTokenizer.from_pretrained(HERE / "model"),
        )
    if "preferences" in args.stages:
        make_preferences(model, tok, data, HERE / "preferences")
    if "datasheet" in args.stages:
        datasheet(model, tok, data, HERE / "README.md")
    print(f"{time.time() - t0:.0f} s")


if __name__ == "__main__":
    main()
