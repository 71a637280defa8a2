"""The tiny world's task: problems, ways to solve them, the data sets and the pre-training documents.

    Ann has 7 coins, gets 4, doubles, loses 5. How many coins does Ann have?
    demonstrator  Let me work step by step. Step 1: 7 + 4 = 11. Step 2: 11 * 2 = 22. ... Therefore \\boxed{17}
    model         7 11 22 17 \\boxed{17}

Everything is drawn from `random.Random(seed)`: the same seed gives the same text on every machine.
"""

import json
import random

NAMES = "Ann Bob Cat Dan Eve Gus Ivy Jon Kim Leo Mia Ned Pam Ray Sue Tom".split()
ITEMS = "apples coins books cards shells stamps".split()
OPENINGS = ["Let me work step by step.", "I go through the steps in order.", "First I list the steps."]
CLOSINGS = ["The answer is", "So the answer is", "Therefore"]
SIDE_KINDS = ("arithmetic", "comparison", "median")
TRAIN_MIX = {1: 0.1, 2: 0.15, 3: 0.2, 4: 0.2, 5: 0.2, 6: 0.15}  # share of each level (number of steps)
EASY = ("1", "2", "3")  # the levels that the column easy_solution demonstrates
FEW = {16: (1, 2, 3, 4, 3, 3), 64: (3, 10, 13, 14, 14, 10)}  # of levels 1 to 6, in the shares of train
HINT = (
    "{question}\nReference solution: {solution}\nIn your own words:"  # a user message that shows a reference
)


# -- problems ---------------------------------------------------------------------------------------------


def apply(op, n, value):
    return value + n if op == "+" else value - n if op == "-" else value * n


def running_values(start, ops):
    values = [start]
    for op, n in ops:
        values.append(apply(op, n, values[-1]))
    return values


def draw_step(rng, value):
    """One operation that keeps the running value within 1..99."""
    while True:
        op = rng.choice("+-*")
        n = rng.randint(2, 3) if op == "*" else rng.randint(2, 9)
        if 1 <= apply(op, n, value) <= 99:
            return op, n


def draw_problem(rng, level):
    """A problem of `level` steps. Its identity is `key`, the operations; names and things are dress."""
    start, ops = rng.randint(2, 20), []
    for _ in range(level):
        ops.append(draw_step(rng, running_values(start, ops)[-1]))
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    verbs = {"+": "gets {}", "-": "loses {}"}
    told = [verbs[op].format(n) if op in verbs else ["doubles", "triples"][n - 2] for op, n in ops]
    values = running_values(start, ops)
    return dict(
        question=f"{name} has {start} {item}, {', '.join(told)}. How many {item} does {name} have?",
        answer=str(values[-1]), level=str(level), key=(start, *ops), ops=ops, values=values,
    )  # fmt: skip


def draw_side(rng, kind):
    """A skill that no script trains, with the model's own answer to it: forgetting shows here."""
    if kind == "arithmetic":
        a = rng.randint(2, 50)
        op, n = draw_step(rng, a)
        question, answer, shown = f"Compute {a} {op} {n}.", apply(op, n, a), ""
    elif kind == "comparison":
        (a, b), word = rng.sample(range(1, 100), 2), rng.choice(["larger", "smaller"])
        answer, shown = max(a, b) if word == "larger" else min(a, b), ""
        question = f"Which is {word}, {a} or {b}?"
    else:
        a, b, c = rng.sample(range(1, 100), 3)
        low, answer, high = sorted([a, b, c])
        question, shown = f"What is the median of {a}, {b}, {c}?", f"sorted: {low} {answer} {high}. "
    response = f"{shown}\\boxed{{{answer}}}"
    return dict(question=question, answer=str(answer), level=f"side: {kind}", key=question, response=response)


# -- solutions --------------------------------------------------------------------------------------------


def demonstration(rng, p, slip=False):
    """Numbered steps, every operation spelled out; with a slip one incorrect result is carried on."""
    values = p["values"]
    while slip:
        k = rng.randint(1, len(p["ops"]))
        incorrect = p["values"][k] + rng.choice([-10, -2, -1, 1, 2, 10])
        values = p["values"][:k] + running_values(incorrect, p["ops"][k:])
        slip = not all(1 <= v <= 99 for v in values)  # not a plausible slip: draw another
    steps = [f"Step {i + 1}: {values[i]} {op} {n} = {values[i + 1]}." for i, (op, n) in enumerate(p["ops"])]
    return " ".join([rng.choice(OPENINGS), *steps, rng.choice(CLOSINGS), f"\\boxed{{{values[-1]}}}"])


def terse(rng, p, slip=0.0, skip=0.0):
    """The running values alone, perhaps with slips (carried on) and with values left out."""
    shown, off = [str(p["values"][0])], 0
    for value in p["values"][1:]:
        if rng.random() < slip:
            off += rng.choice([-10, -1, 1, 10])
        if rng.random() >= skip:
            shown.append(str(abs(value + off)))
    return " ".join([*shown, f"\\boxed{{{abs(p['values'][-1] + off)}}}"])


# -- data sets --------------------------------------------------------------------------------------------


def held_out(per_level=100):
    """The problems nobody may train on, by split, and the set of their identities."""
    taken, splits = set(), {}
    for split, draw, levels in (
        ("test", draw_problem, range(1, 7)),
        ("harder", draw_problem, range(7, 9)),
        ("side", draw_side, SIDE_KINDS),
    ):
        rng, splits[split] = random.Random(split), []
        for level in levels:
            enough = len(splits[split]) + per_level
            while len(splits[split]) < enough:
                p = draw(rng, level)
                if p["key"] not in taken:
                    taken.add(p["key"])
                    splits[split].append(p)
        rng.shuffle(splits[split])  # a script that evaluates on the first n rows sees every level
    return splits, taken


def make_data(folder, train_size=4000):
    splits, taken = held_out()
    rng, train = random.Random("train"), []
    while len(train) < train_size:  # operations may return under another name, but never held-out ones
        p = draw_problem(rng, rng.choices(list(TRAIN_MIX), TRAIN_MIX.values())[0])
        if p["key"] not in taken:
            train.append(p)
    data = {}
    for split, problems in {"train": train, **splits}.items():
        rng, rows = random.Random(f"{split} solutions"), []
        for p in problems:
            solution = p["response"] if split == "side" else demonstration(rng, p)
            unreliable = split != "side" and rng.random() < 0.5
            noisy = demonstration(rng, p, slip=True) if unreliable else solution
            easy = solution if p["level"] in EASY else ""
            rows.append(dict(question=p["question"], answer=p["answer"], solution=solution,
                             noisy_solution=noisy, level=p["level"], easy_solution=easy))  # fmt: skip
        data[split] = rows
    data |= few_demonstrations(train, data["train"])
    for split, rows in data.items():
        write_jsonl(folder / f"{split}.jsonl", rows)


def few_demonstrations(problems, rows, half=1000):
    """The splits few_16 and few_64: half of the rows repeat a few demonstrations, the others have none.

    The others are the same in both, and no problem of theirs is demonstrated.
    """
    rng = random.Random("few")
    order = rng.sample(range(len(rows)), len(rows))
    first = {problems[i]["key"]: i for i in reversed(order)}  # problem -> the row that may demonstrate it
    of_level = {level: [] for level in TRAIN_MIX}
    for i in order:
        if i == first[problems[i]["key"]]:
            of_level[int(rows[i]["level"])].append(i)
    drawn = {}
    for count, shares in FEW.items():  # the demonstrations of few_16 are among those of few_64
        drawn[count] = [i for n, numbers in zip(shares, of_level.values()) for i in numbers[:n]]
    demonstrated = {problems[i]["key"] for i in drawn[64]}
    others = {rows[i]["question"]: i for i in order if problems[i]["key"] not in demonstrated}
    nothing = dict(solution="", noisy_solution="", easy_solution="")
    plain = [rows[i] | nothing for i in list(others.values())[:half]]
    splits = {}
    for count, numbers in drawn.items():
        rng.shuffle(numbers)  # some occur once more than others, whatever their level
        repeated = [rows[numbers[k % count]] for k in range(half)]
        splits[f"few_{count}"] = rng.sample(repeated + plain, 2 * half)
    return splits


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# -- pre-training documents -------------------------------------------------------------------------------

# Stage 1 teaches skills: numbered solutions, running values, other small tasks, retelling a reference.
# Stage 2 teaches habits: short problems, slips, skipped values, guesses; numbered steps become a rarity.
STAGES = [
    dict(steps=2200, lr=3e-3, side=0.2, hint=0.12, slip=0.0, skip=0.0,
         levels={1: 0.15, 2: 0.2, 3: 0.2, 4: 0.15, 5: 0.15, 6: 0.15},
         styles=dict(numbered=0.6, terse=0.34, direct=0.03, unboxed=0.03)),
    dict(steps=400, lr=7e-4, side=0.2, hint=0.15, slip=0.05, skip=0.08,
         levels={1: 0.25, 2: 0.28, 3: 0.25, 4: 0.12, 5: 0.06, 6: 0.04},
         styles=dict(numbered=0.01, terse=0.65, direct=0.18, unboxed=0.16)),
]  # fmt: skip


def document(rng, stage, taken):
    """One (user message, response) pair; held-out problems are drawn again."""

    def fresh(draw, *args):
        while (p := draw(rng, *args))["key"] in taken:
            pass
        return p

    if rng.random() < stage["side"]:
        p = fresh(draw_side, rng.choice(SIDE_KINDS))
        return p["question"], p["response"]
    if rng.random() < stage["hint"]:  # a reference beside the question: retell it tersely, without a slip
        p = fresh(draw_problem, rng.randint(1, 6))
        return HINT.format(question=p["question"], solution=demonstration(rng, p)), terse(rng, p)
    p = fresh(draw_problem, rng.choices(list(stage["levels"]), stage["levels"].values())[0])
    style = rng.choices(list(stage["styles"]), stage["styles"].values())[0]
    if style == "numbered":
        return p["question"], demonstration(rng, p)
    if style == "terse":
        return p["question"], terse(rng, p, stage["slip"], stage["skip"])
    return p[
        "question"
    ], f"\\boxed{{{p['answer']}}}" if style == "direct" else f"The answer is {p['answer']}."
