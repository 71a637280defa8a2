"""Run methods x seeds on the tiny world and write the tables of results.

    python experiments/reproduce.py                            # all cells, two at a time, one thread each
    python experiments/reproduce.py --cells sft grpo --seeds 0 1
    python experiments/reproduce.py --report                   # run nothing: report what has been run

A cell is a command line and a seed; its folder is runs/reproduce/<cell>-<seed>, its results are in
experiments/results/cells/<cell>-<seed>.json. A cell that has such a file is not run again (delete the
file to run it again), and an interrupted one continues from its last checkpoint. So everything can be
stopped and started at any time. Cells do not evaluate themselves: `measure` asks every final model the
same questions.

Fixed before the runs: the main metric is pass@1, the share of correct answers among 8 samples at
temperature 1 to each of 300 held-out questions; an interval is the middle 95 % of bootstrap draws that
resample seeds and questions; two methods are compared on the same questions and seeds, and they differ if
the interval of their difference does not contain 0, with at least three seeds. A claim is reproduced if
every comparison that it makes holds. docs/protocol.md lists what changed after runs had been seen, and
what an audit found.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from math import comb
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sft  # noqa: E402
from common import tokenization as tok  # noqa: E402
from common.plumbing import data, folders, models  # noqa: E402
from common.verifier import math_reward  # noqa: E402
from experiments import ppo_sweep  # noqa: E402
from experiments.figures import COLORS, canvas, styled  # noqa: E402
from experiments.ppo_sweep import flags  # noqa: E402
from experiments.study import process  # noqa: E402
from experiments.tables import insert  # noqa: E402

IDFT, RFT = "idft_hinted.py --hinted", "rft_rejection.py --rounds 2 --steps 100"
FULL, NOISY = "prefix_rft.py --prefix-schedule full --prefix-loss all", "--solution-key noisy_solution"
GRPO = "grpo.py --advantage grpo --loss-norm sequence"
# with one update a step no ratio leaves the trust region; 67 steps: resampling makes 1.5 times the tokens
DAPO = "grpo.py --steps 67 --advantage grpo --loss-norm token --clip-high 0.28 --minibatches 4"
# half of SFT's steps and six tenths of GRPO's, with longer samples: about the tokens of Prefix-RFT
HALF = "sft.py --steps 100"
CELLS = {
    "sft": "sft.py",
    "dft": f"{IDFT} off --weight dft",
    "eaft": f"{IDFT} off --weight eaft",
    "sft, a third of the rate": "sft.py --lr 3e-4",
    "dft, a third of the rate": f"{IDFT} off --weight dft --lr 3e-4",
    "idft": f"{IDFT} off --weight idft --lr 3e-4",
    "hinted + sft": f"{IDFT} on --weight sft",
    "hinted + dft": f"{IDFT} on --weight dft",
    "hinted + idft": f"{IDFT} on --weight idft",
    "rft, k = 1, base": f"{RFT} --k 1 --restart base",
    "rft, k = 4, base": f"{RFT} --k 4 --restart base",
    "rft, k = 16, base": f"{RFT} --k 16 --restart base",
    "rft, k = 1, continue": f"{RFT} --k 1 --restart continue",
    "rft, k = 4, continue": f"{RFT} --k 4 --restart continue",
    "rft, k = 16, continue": f"{RFT} --k 16 --restart continue",
    "dpo": "dpo.py --loss dpo",
    "simpo": "dpo.py --loss simpo",
    "grpo": "grpo.py",
    "grpo, as in DeepSeekMath": f"{GRPO} --kl-coef 0.04",
    "grpo, std and length": GRPO,
    "grpo, four updates": f"{GRPO} --minibatches 4",
    "dapo": f"{DAPO} --dynamic-sampling 3 --overlong-tokens 20",
    "sft, then grpo": f"{HALF} && grpo.py --steps 60",
    "prefix_rft": "prefix_rft.py",
    "prefix_rft, prefix not trained": "prefix_rft.py --prefix-loss none",
    "prefix_rft, whole prefix": "prefix_rft.py --prefix-loss all",
    "prefix_rft, random 20 %": "prefix_rft.py --prefix-loss random",
    "prefix_rft, bottom 20 %": "prefix_rft.py --prefix-loss bottom",
    "prefix_rft, uniform": "prefix_rft.py --prefix-schedule uniform",
    "luffy": f"{FULL} --prefix-weight luffy",
    "rl + sft loss": f"{FULL} --prefix-weight sft --lr 6e-4",
    "prefix_rft, 10 % demonstrated": "prefix_rft.py --demo-fraction 0.1",
    "prefix_rft, 1 % demonstrated": "prefix_rft.py --demo-fraction 0.01",
    "sft, noisy demonstrations": f"sft.py {NOISY}",
    "idft, noisy demonstrations": f"{IDFT} off --weight idft --lr 3e-4 {NOISY}",
    "sft, then grpo, noisy demonstrations": f"{HALF} {NOISY} && grpo.py --steps 60",
    "luffy, noisy demonstrations": f"{FULL} --prefix-weight luffy {NOISY}",
    "prefix_rft, noisy demonstrations": f"prefix_rft.py {NOISY}",
}
SPLITS = {"test": (300, 8), "harder": (200, 4), "side": (300, 4)}  # questions, samples of each
MANY_QUESTIONS, MANY_SAMPLES = 100, 64  # of the held-out ones and of the harder ones, for pass@k of large k
MANY_SEEDS = 3  # of a row at least: this is half of a cell's time
SHOWN = ("base", "sft", "grpo", "sft, then grpo", "prefix_rft", "luffy")  # of pass@k, in docs/results.md
PREFIX, NOISED = "prefix_rft", ", noisy demonstrations"


def above(better, others, number="pass@1"):
    return [(better, other, number) for other in others]


CLAIMS = [  # what a paper says, its numbers, and what has to come out here: (better, worse, number)
    (
        "Prefix-RFT is above SFT, GRPO, SFT then RL, LUFFY, RL with an SFT loss (2507.01679)",
        "51.8; 44.1, 45.5, 48.2, 50.1, 40.1",
        above(PREFIX, ["sft", "grpo", "sft, then grpo", "luffy", "rl + sft loss"]),
    ),
    (
        "against it: SFT then RL is above the methods that mix (2604.23747)",
        "57.0; 51.8, 46.3",
        above("sft, then grpo", [PREFIX, "luffy"]),
    ),
    (
        "of a prefix, train the tokens of highest entropy: not all, none, random ones or the lowest",
        "51.8; 45.7 all, 45.4 none",
        above(PREFIX, [f"{PREFIX}, {x}" for x in ("whole prefix", "prefix not trained", "random 20 %")])
        + above(PREFIX, [f"{PREFIX}, bottom 20 %"]),
    ),
    (
        "10 % or 1 % of the demonstrations suffice: above GRPO",
        "40.8, 37.6; 30.0",
        [(f"{PREFIX}, {share} % demonstrated", "grpo", "pass@1") for share in (10, 1)],
    ),
    (
        "half of the demonstrations incorrect: Prefix-RFT is above what else trains on them, and above GRPO",
        "",
        above(PREFIX + NOISED, [x + NOISED for x in ("sft", "idft", "luffy", "sft, then grpo")] + ["grpo"]),
    ),
    (
        "a cosine schedule of prefix lengths is above a uniform one",
        "a figure",
        above(PREFIX, [f"{PREFIX}, uniform"]),
    ),
    (
        "the guidance fades: the lead of completions with a prefix shrinks",
        "a figure",
        [(PREFIX, None, "lead lost")],
    ),
    (
        "Prefix-RFT raises pass@k at large k",
        "pass@2048, AIME24: 96.7; RL 90.0, base 86.7",
        above(PREFIX, ["grpo", "base"], "pass@64")
        + above(PREFIX, ["grpo", "base"], "pass@64, harder")
        + above(PREFIX, ["grpo", "base"], "8 of 64, harder"),
    ),
    ("Prefix-RFT forgets less than SFT", "", above(PREFIX, ["sft"], "side")),
    ("Prefix-RFT carries further than GRPO: harder questions", "", above(PREFIX, ["grpo"], "harder")),
    (
        "LUFFY keeps entropy where on-policy RL loses it (2504.14945)",
        "a figure",
        above("luffy", ["grpo"], "entropy in training") + above("luffy", ["grpo"], "entropy left"),
    ),
    ("RL raises pass@1 (2402.03300)", "a figure", above("grpo", ["base"])),
    (
        "at large k the base is ahead of RL (2504.13837)",
        "figures",
        above("base", ["grpo"], "pass@64") + above("base", ["grpo"], "pass@64, harder"),
    ),
    (
        "Dr. GRPO is above GRPO with 1 / std and own lengths, both without KL",
        "",
        above("grpo", ["grpo, std and length"]),
    ),
    (
        "DAPO's clip-higher, token mean and dynamic sampling help, at equal sampled tokens (2503.14476)",
        "AIME24 30 to 50, with a soft length limit",
        above("dapo", ["grpo, four updates"]),
    ),
    ("RL is above rejection sampling", "", above("grpo", ["rft, k = 16, base", "rft, k = 1, continue"])),
    (
        "RFT grows with k, as distinct paths do (2308.01825)",
        "41.7 k = 100, 49.3 pooled",
        above("rft, k = 16, base", ["rft, k = 1, base"]),
    ),
    (
        "continuing from the last round is above starting again (RAFT does; STaR and ReST-EM start again)",
        "",
        [(f"rft, k = {k}, continue", f"rft, k = {k}, base", "pass@1") for k in (1, 4, 16)],
    ),
    ("DFT is above SFT (2508.05629)", "31.6; 18.0", above("dft", ["sft"])),
    ("IDFT is above SFT (2602.12222)", "68; 60, MATH500, read from a chart", above("idft", ["sft"])),
    ("IDFT is above DFT (2602.12222)", "68; 65, the same chart", above("idft", ["dft"])),
    ("IDFT forgets less than SFT", "", above("idft", ["sft"], "side")),
    (
        "hinted decoding raises phi",
        "one example: self-generated -0.1, hinted -0.05",
        [("hinted + idft", None, "phi gained")],
    ),
    (
        "self-generated targets reduce forgetting: hinted + SFT over SFT, hinted + IDFT over hinted + SFT",
        "",
        above("hinted + sft", ["sft"], "side") + above("hinted + idft", ["hinted + sft"], "side"),
    ),
    (
        "hinted + IDFT is above DPO and SimPO",
        "27.4; 22.4 DPO",
        above("hinted + idft", ["dpo", "simpo"]),
    ),
]


UNDER_REVIEW = {  # beginnings of claims that an audit doubts; docs/protocol.md has the reasons
    "Prefix-RFT is above SFT",
    "of a prefix, train the tokens of highest entropy",
    "10 % or 1 % of the demonstrations suffice",
    "half of the demonstrations incorrect",
    "Prefix-RFT forgets less than SFT",
    "RL is above rejection sampling",
    "RFT grows with k",
    "DFT is above SFT",
    "IDFT forgets less than SFT",
    "hinted decoding raises phi",
}
RESULTS, PAGES = ROOT / "experiments/results", ROOT / "docs"
# metrics of a stage before training
STAGE = "paths unsolved kept verified_demo verified_own verified_hinted phi_demo phi_own phi_hinted".split()


def name_of(cell, seed):
    for a, b in ((", ", "-"), (" = ", ""), (" + ", "_"), (" %", ""), (" ", "_")):
        cell = cell.replace(a, b)
    return f"{cell}-{seed}"


# ---- running ---------------------------------------------------------------------------------------------


# arguments that records up to 0.1.0 lack, with the values that those runs had
SINCE = {"chat_template": "on", "clip": "ppo", "ratio": "token", "tis_cap": 0.0}
SINCE |= {"hpt_gate": -1.0, "hybrids": 1, "sft_coef": 1.0}


def settings(args):
    """What makes a run another method: its arguments, without what names, measures or places it."""
    apart = "output_dir seed model base resume eval_questions eval_samples commit versions".split()
    apart += "eval_first eval_temperature unparseable_gold fingerprint".split()
    return {k: v for k, v in args.items() if k not in apart and (k, v) not in SINCE.items()}


QUICK = "--eval-questions 1 --eval-samples 0"  # `measure` asks every final model the same


def train(cell, seed, out, more=QUICK):
    """The folders of a cell's runs, each on the model that the one before has left; `more` for the last."""
    stages = CELLS[cell].split(" && ")
    outs = [Path(f"{out}-stage{i}") for i in range(1, len(stages))] + [out]
    for command, folder, before in zip(stages, outs, [None, *outs]):
        if not (folder / "final").exists():
            flags = f"--seed {seed} --output-dir {folder} {more if folder == out else QUICK}"
            flags += f" --model {before}/final" if before else ""
            flags += " --resume" * bool(folders.checkpoints(folder))
            seconds = process(f"{out}.log", sys.executable, *command.split(), *flags.split())
            if "--resume" not in flags:  # else this is a part of them only
                (folder / "seconds.json").write_text(json.dumps(seconds))
    return outs


def run(cell, seed, runs):
    """One cell and its measurement, each a process; the screen goes to <folder>.log."""
    out, result = runs / name_of(cell, seed), RESULTS / f"cells/{name_of(cell, seed)}.json"
    if result.exists():
        return
    outs = train(cell, seed, out)
    if not (out / "measured.json").exists():
        few = ["--few"] * (seed >= MANY_SEEDS)
        process(f"{out}.log", sys.executable, __file__, "--measure", str(out / "final"), *few)
    lines = [json.loads(line) for folder in outs for line in open(folder / "metrics.jsonl")]
    record = {"cell": cell, "command": CELLS[cell], "seed": seed}
    record |= {"commit": json.loads((out / "args.json").read_text())["commit"]}
    record |= {f: sum(x.get(f, 0) for x in lines) for f in ("tokens_generated", "tokens_trained")}
    record |= {"args": [settings(json.loads((folder / "args.json").read_text())) for folder in outs]}
    if all((folder / "seconds.json").exists() for folder in outs):
        record |= {"cpu": sum(json.loads((f / "seconds.json").read_text())["cpu"] for f in outs)}
    numbers = ["reward", "entropy", "response_len"] + ["reward_hybrid"] * ("reward_hybrid" in lines[-1])
    curve = [[x[k] for k in numbers] for x in lines if {"reward", "entropy"} <= x.keys()]
    record |= {"curve": [[round(y, 4) for y in x] for x in curve]} if curve else {}
    record["stage"] = {k: v for x in lines for k, v in x.items() if k in STAGE}
    record |= json.loads((out / "measured.json").read_text())
    half = result.with_suffix(".half")
    half.write_text(json.dumps(record) + "\n")
    half.rename(result)
    print(f"done: {cell}, seed {seed}", flush=True)


@torch.no_grad()
def measure(folder, few=False):
    """Correct answers per question on each split; KL to the base, entropy and length of on-policy samples.

    Unless `few`, also correct answers among 64 to each of 100 held-out questions and of 100 harder ones.
    """
    args = sft.parse_args(["--max-new-tokens", "128"])
    model, tokenizer = models.load_model(str(folder))
    base, _ = models.load_model(str(ROOT / "tiny/model"))
    measured, stops = {}, tok.stop_ids(tokenizer, model.config)
    for split, (questions, n) in SPLITS.items():
        rows = data.load_split(str(ROOT / "tiny/data"), split, {}).select(range(questions))
        prompts, golds = tok.encode_prompts(tokenizer, rows["question"]), list(rows["answer"])
        for name, temperature, copies in ((split, 1.0, n), (f"{split}_greedy", 0.0, 1)):
            torch.manual_seed(0)
            responses, _ = sft.sample(model, tokenizer, prompts * copies, temperature, args)
            correct = math_reward(tok.decode_responses(tokenizer, responses), golds * copies)
            measured[name] = torch.tensor(correct).view(copies, questions).sum(0).int().tolist()
            if name == "test":
                measured["levels"], own = list(rows["level"]), (prompts, responses[:questions])
                measured["length"] = sum(map(len, responses)) / len(responses)
                truncated = sum(ids[-1] not in stops for ids in responses)
                measured["truncated"] = truncated / len(responses)
    for split in () if few else ("test", "harder"):
        torch.manual_seed(0)
        rows = data.load_split(str(ROOT / "tiny/data"), split, {}).select(range(MANY_QUESTIONS))
        prompts = tok.encode_prompts(tokenizer, rows["question"]) * MANY_SAMPLES
        responses, _ = sft.sample(model, tokenizer, prompts, 1.0, args)
        texts = tok.decode_responses(tokenizer, responses)
        correct = math_reward(texts, list(rows["answer"]) * MANY_SAMPLES)
        measured[f"many_{split}"] = torch.tensor(correct).view(MANY_SAMPLES, -1).sum(0).int().tolist()
    tokens, mask = tok.join(*own)
    log_p, log_q = (m(tokens).logits[:, :-1].log_softmax(-1) for m in (model, base))
    seen = mask[:, 1:].bool()
    measured["kl"] = (log_p.exp() * (log_p - log_q)).sum(-1)[seen].mean().item()  # KL(pi | base), per token
    measured["entropy"] = -(log_p.exp() * log_p).sum(-1)[seen].mean().item()
    return measured


# ---- reporting -------------------------------------------------------------------------------------------


# records up to 0.1.0 have other names for three things
RENAMED = {
    "skip-dead-groups": "dynamic-sampling",
    "skip_dead_groups": "dynamic_sampling",
    '"cut"': '"truncated"',
}


def record_of(file):
    """A committed record, with the names of today. The file stays as it was recorded."""
    text = file.read_text()
    for old, new in RENAMED.items():
        text = text.replace(old, new)
    return json.loads(text)


def read(cell, seeds):
    """The results and the cost of the finished seeds of a cell."""
    files = [RESULTS / f"cells/{name_of(cell, seed)}.json" for seed in seeds]
    return [record_of(file) for file in files if file.exists()]


ASKED = ("test", "harder", "side", "test_greedy")


def ends(x):
    """Reward of completions with a prefix and of the others, in the first ten steps and the last: [2, 2]."""
    reward, _, _, hybrid = torch.tensor(x["curve"]).T  # [steps] each; reward: mean of the whole group
    group = x["args"][-1]["group_size"]
    both = torch.stack([hybrid, (group * reward - hybrid) / (group - 1)])
    return torch.stack([both[:, :10].mean(1), both[:, -10:].mean(1)])


def lead_lost(x):
    """Lead of the completions with a prefix over the others in reward: first ten steps less last ten."""
    first, last = ends(x)
    return (first[0] - first[1] - last[0] + last[1]).item()


OF_RUN = {
    "lead lost": lead_lost,
    "phi gained": lambda x: x["stage"]["phi_hinted"] - x["stage"]["phi_demo"],
    "entropy left": lambda x: x["entropy"],  # of on-policy samples after training
    "entropy in training": lambda x: torch.tensor(x["curve"])[:, 1].mean().item(),  # demonstrations included
}
# share of questions with so many correct answers among 64 samples
OF_MANY = {"pass@64": ("many_test", 1), "pass@64, harder": ("many_harder", 1)}
OF_MANY |= {"8 of 64, harder": ("many_harder", 8)}


def shares(done, name):
    """Share of correct answers, [seeds, questions], or one number per run, [seeds, 1]."""
    if name in OF_RUN:
        return torch.tensor([[OF_RUN[name](x)] for x in done])
    if name in OF_MANY:
        key, least = OF_MANY[name]
        return (torch.tensor([x[key] for x in done]) >= least).float()
    name = name.replace("pass@1", "test")
    n = 1 if name.endswith("greedy") else SPLITS[name][1]
    return torch.tensor([x[name] for x in done]).float() / n


STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % point of t, by the number of runs


def interval(correct):
    """Mean and the ends of its 95 % interval; of one number a run, [seeds, 1], Student's."""
    mean, runs = correct.mean().item(), len(correct)
    if correct.shape[1] > 1 or runs == 1:
        return ppo_sweep.interval(correct)
    half = STUDENT[runs] * correct.std().item() / runs**0.5
    low, high = mean - half, mean + half
    return [round(x, 4) for x in (mean, low, high)]


def summary(done):
    """A row of results.json."""
    levels, test = torch.tensor([int(x) for x in done[0]["levels"]]), shares(done, "test")
    row = {"seeds": [x["seed"] for x in done], "pass@1": interval(test)}
    row |= {name: interval(shares(done, name)) for name in ASKED[1:]}
    unsolved = torch.tensor([x["test"] for x in done]) == 0
    row["pass@8"] = round(1 - unsolved.float().mean().item(), 4)
    row["levels"] = {str(i): round(test[:, levels == i].mean().item(), 4) for i in range(1, 7)}
    for key in ("kl", "entropy", "length", "truncated", "tokens_generated", "tokens_trained", "cpu"):
        if known := [x[key] for x in done if key in x]:
            row[key] = round(sum(known) / len(known), 4)
    stages = done[0].get("stage", {})
    row["stage"] = {k: round(sum(x["stage"][k] for x in done) / len(done), 4) for k in stages}
    if len(done[0].get("curve", [[]])[0]) == 4:  # first ten steps, last ten
        mean = torch.stack([ends(x) for x in done]).mean(0)
        row["reward with a prefix, without"] = [[round(x, 4) for x in half] for half in mean.tolist()]
    row["pass@1 by seed"] = [round(x.mean().item(), 4) for x in test]
    return row


def report(cells, seeds, write):
    base = RESULTS / "cells/base-0.json"
    if not base.exists():
        measured = {"cell": "base", "seed": 0} | measure(ROOT / "tiny/model")
        base.write_text(json.dumps(measured) + "\n")
    every = {"base": [record_of(base)]}
    every |= {cell: done for cell in cells if (done := read(cell, seeds))}
    rows = {cell: summary(done) for cell, done in every.items()}
    compared = [versus(every, *pair) | {"claim": claim} for claim, _, pairs in CLAIMS for pair in pairs]
    tables = {"results": full(rows, seeds), "pass@k": covered(every), "claims": claimed(compared)}
    text = "\n\n".join("\n".join(lines) for lines in tables.values())
    print(text)
    if write:
        both = {"rows": rows, "compared": compared}
        (RESULTS / "results.json").write_text(json.dumps(both, indent=1) + "\n")
        (RESULTS / "results.md").write_text(text + "\n")
        some = covered({cell: every[cell] for cell in SHOWN if cell in every})
        for name, lines in (tables | {"results": short(rows), "pass@k": some}).items():
            insert(name, lines)
        plot_curves(every)


def full(rows, seeds):
    """Every column."""
    head = "| |pass@1|greedy|pass@8|L1|L2|L3|L4|L5|L6|harder|side|KL|entropy|length|generated|trained|CPU s|"
    text = [head, "|---" * (head.count("|") - 1) + "|"]
    for cell, row in rows.items():
        ends = {key: "{:.3f} [{:.3f}, {:.3f}]".format(*row[key]) for key in ("pass@1", "harder", "side")}
        few = f" ({len(row['seeds'])} seeds)" * (cell != "base" and len(row["seeds"]) < len(seeds))
        line = [cell + few, ends["pass@1"], f"{row['test_greedy'][0]:.3f}", f"{row['pass@8']:.3f}"]
        line += [f"{x:.2f}" for x in row["levels"].values()] + [ends["harder"], ends["side"]]
        line += [f"{row['kl']:.3f}", f"{row['entropy']:.3f}", f"{row['length']:.1f}"]
        line += [f"{row.get(f'tokens_{k}', 0) / 1000:.0f}k" for k in ("generated", "trained")]
        text.append("| " + " | ".join([*line, f"{row['cpu']:.0f}" if "cpu" in row else ""]) + " |")
    return text


def short(rows):
    """The rows as docs/results.md has them."""
    head = "| | pass@1 | greedy | levels 1–3 | levels 4–6 | longer | retention | KL to the base "
    text = [head + "| generated | trained | seeds |", "|---" * 11 + "|"]
    for cell, row in rows.items():
        levels = list(row["levels"].values())
        line = [cell, "{:.3f} [{:.3f}, {:.3f}]".format(*row["pass@1"]), f"{row['test_greedy'][0]:.3f}"]
        line += [f"{sum(levels[i : i + 3]) / 3:.2f}" for i in (0, 3)]
        line += [f"{row[k][0]:.3f}" for k in ("harder", "side")] + [f"{row['kl']:.3f}"]
        line += [f"{row.get(f'tokens_{k}', 0) / 1000:.0f}k" for k in ("generated", "trained")]
        text.append("| " + " | ".join([*line, str(len(row["seeds"])) if cell != "base" else ""]) + " |")
    return text


def covered(every):
    """pass@k, unbiased, of cells that were asked many times; questions with 8 correct answers or more."""
    ks = [2**i for i in range(MANY_SAMPLES.bit_length())]
    text = [f"| pass@k, k = | {' | '.join(map(str, ks))} | 8 of 64 | seeds |"]
    text += ["|---" * (len(ks) + 3) + "|"]
    for key, more in (("many_test", ""), ("many_harder", ", harder")):
        for cell, done in every.items():
            if some := [x[key] for x in done if key in x]:
                correct = torch.tensor(some)  # [seeds, questions]
                missed = [MANY_SAMPLES - c for c in correct.flatten().tolist()]
                line = [1 - sum(comb(m, k) for m in missed) / comb(MANY_SAMPLES, k) / len(missed) for k in ks]
                line += [(correct >= 8).float().mean().item()]
                line = " | ".join(f"{x:.2f}" for x in line)
                text.append(f"| {cell}{more} | {line} | {len(some)} |")
    return text


def claimed(compared):
    text = ["| claim | paper | here: gain, 95 % interval | seeds | |", "|---" * 5 + "|"]
    for claim, paper, _ in CLAIMS:
        some = [c for c in compared if c["claim"] == claim]
        gains, least = "<br>".join(map(gain_of, some)), min(c["seeds"] for c in some)
        review = " \\*" * claim.startswith(tuple(UNDER_REVIEW))
        text.append(f"| {claim} | {paper} | {gains} | {least} | {verdict(some)}{review} |")
    return text


def versus(every, better, worse, number):
    """Gain of one cell over another, or over 0, on the seeds that both have; the base has every seed."""
    seeds = {x["seed"] for done in every.values() for x in done}
    found = [{x["seed"]: x for x in every.get(cell, [])} for cell in (better, worse) if cell]
    for i, cell in enumerate((better, worse)):
        if cell == "base":
            found[i] = dict.fromkeys(seeds, every["base"][0])
    if number in OF_MANY:  # older records lack it
        found = [{seed: x for seed, x in f.items() if OF_MANY[number][0] in x} for f in found]
    common = sorted(set.intersection(*map(set, found)))
    gain = {"better": better, "worse": worse, "number": number, "seeds": len(common)}
    if common:
        share = [shares([x[seed] for seed in common], number) for x in found]
        gain["gain"] = interval(share[0] - share[1] if worse else share[0])
    return gain


def gain_of(c):
    """A comparison in words; the number is pass@1 if none is named."""
    over = f" over {c['worse']}" * bool(c["worse"])
    number = f" ({c['number']})" * (c["number"] != "pass@1")
    gain = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*c["gain"]) if c["seeds"] else "not run"
    return f"{c['better']}{over}{number}: {gain}"


def verdict(some):
    """Of the comparisons that a claim makes."""
    if min(c["seeds"] for c in some) < 3:
        return "too few seeds"
    holds, opposed = sum(c["gain"][1] > 0 for c in some), sum(c["gain"][2] < 0 for c in some)
    if holds == len(some):
        return "reproduced"
    if opposed == len(some):
        return "not reproduced: the reverse"
    words = (holds, "holds" if holds == 1 else "hold"), (opposed, "the reverse")
    parts = [f"{n} of {len(some)} {how}" for n, how in words if n]
    return "not reproduced" + f": {', '.join(parts)}" * bool(parts)


@styled
def plot_curves(every):
    """Reward, entropy and length of the samples of each step, mean of the seeds and of five steps."""
    curves = {cell: [x["curve"] for x in every.get(cell, []) if "curve" in x] for cell in COLORS}
    if not any(curves.values()):
        return
    figure, [axes] = canvas(1, 3, 3)
    for cell in filter(curves.get, curves):
        steps = torch.tensor(curves[cell]).mean(0)  # [steps, 3]
        for i, (axis, title) in enumerate(zip(axes, ("reward", "entropy, nats", "response, tokens"))):
            smooth = [steps[max(0, t - 4) : t + 1, i].mean().item() for t in range(len(steps))]
            axis.plot(range(1, len(steps) + 1), smooth, color=COLORS[cell], label=cell, linewidth=2)
            axis.set(title=title, xlabel="step")
    axes[1].legend(frameon=False)
    figure.savefig(RESULTS / "curves.png", dpi=130, transparent=True)


def main():
    parser = flags(__doc__, CELLS, ROOT / "runs/reproduce")
    parser.add_argument("--measure", type=Path, help="measure one model folder (a cell does this itself)")
    parser.add_argument("--few", action="store_true", help="with --measure: without 64 samples of a question")
    parser.add_argument("--compare", nargs=3, help="two cells and a number: print the gain, run nothing")
    args = parser.parse_args()
    for folder in (args.runs, RESULTS / "cells"):
        folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if args.measure:
        measured = measure(args.measure, args.few)
        (args.measure.parent / "measured.json").write_text(json.dumps(measured))
        return
    if args.compare:
        every = {cell: read(cell, args.seeds) for cell in args.compare[:2]}
        print(gain_of(versus(every, *args.compare)))
        return
    if not args.report:
        with ThreadPoolExecutor(args.jobs) as pool:
            jobs = [pool.submit(run, cell, seed, args.runs) for seed in args.seeds for cell in args.cells]
            for job in jobs:
                job.result()
    report(list(CELLS), args.seeds, args.write)


if __name__ == "__main__":
    main()
