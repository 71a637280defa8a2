"""Run methods x seeds on the tiny world and write the tables of results.

    python experiments/reproduce.py                            # all cells, two at a time, one thread each
    python experiments/reproduce.py --cells sft grpo --seeds 0 1
    python experiments/reproduce.py --report                   # run nothing: report what has been run

A cell is a command line and a seed; its folder is runs/reproduce/<cell>-<seed>, what came out of it is
experiments/results/cells/<cell>-<seed>.json. A cell that has such a file is not run again (delete it to run
it again) and an interrupted one continues from its last checkpoint, so the whole can be stopped and started
at any time. Cells do not evaluate themselves: `measure` asks every final model the same questions.

Fixed before the runs: the main number is pass@1, the share of right answers among 8 samples at temperature 1
to each of 300 held-out questions; an interval is the middle 95 % of 2,000 bootstrap draws that resample seeds
and questions; two methods are compared on the same questions and seeds, and they differ if the interval of
their difference does not hold 0, over three seeds at least.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sft  # noqa: E402
from common import tokenization as tok  # noqa: E402
from common.verifier import math_reward  # noqa: E402

IDFT, RFT = "idft_hinted.py --hinted", "rft_rejection.py --rounds 2 --steps 100"
FULL, NOISY = "prefix_rft.py --prefix-schedule full --prefix-loss all", "--solution-key noisy_solution"
DAPO = "grpo.py --advantage grpo --loss-norm token --clip-high 0.28"
# half of SFT's steps and six tenths of GRPO's, with longer samples: about the tokens of Prefix-RFT
HALF = "sft.py --steps 100"
CELLS = {
    "sft": "sft.py",
    "dft": f"{IDFT} off --weight dft",
    "eaft": f"{IDFT} off --weight eaft",
    "idft": f"{IDFT} off --weight idft",
    "hinted + sft": f"{IDFT} on --weight sft",
    "hinted + dft": f"{IDFT} on --weight dft",
    "hinted + eaft": f"{IDFT} on --weight eaft",
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
    "grpo, as in DeepSeekMath": "grpo.py --advantage grpo --loss-norm sequence --kl-coef 0.04",
    "dapo": f"{DAPO} --skip-dead-groups 3 --overlong-tokens 20",
    "sft, then grpo": f"{HALF} && grpo.py --steps 60",
    "prefix_rft": "prefix_rft.py",
    "prefix_rft, prefix not trained": "prefix_rft.py --prefix-loss none",
    "prefix_rft, whole prefix": "prefix_rft.py --prefix-loss all",
    "prefix_rft, random 20 %": "prefix_rft.py --prefix-loss random",
    "prefix_rft, bottom 20 %": "prefix_rft.py --prefix-loss bottom",
    "prefix_rft, uniform": "prefix_rft.py --prefix-schedule uniform",
    "luffy": f"{FULL} --prefix-weight luffy",
    "rl + sft loss": f"{FULL} --prefix-weight sft",
    "prefix_rft, 10 % demonstrated": "prefix_rft.py --demo-fraction 0.1",
    "prefix_rft, 1 % demonstrated": "prefix_rft.py --demo-fraction 0.01",
    "sft, noisy demonstrations": f"sft.py {NOISY}",
    "idft, noisy demonstrations": f"{IDFT} off --weight idft {NOISY}",
    "sft, then grpo, noisy demonstrations": f"{HALF} {NOISY} && grpo.py --steps 60",
    "luffy, noisy demonstrations": f"{FULL} --prefix-weight luffy {NOISY}",
    "prefix_rft, noisy demonstrations": f"prefix_rft.py {NOISY}",
}
COLORS = {"sft": "#7f7f7f", "dft": "#e08020", "eaft": "#9467bd", "idft": "#d62728", "dpo": "#a5723c"}
COLORS |= {"grpo": "#1f83d6", "luffy": "#2a9d5c", "prefix_rft": "#e0559f", "rl + sft loss": "#b8a000"}
COLORS |= {"ppo": "#17a2b8", "best of n": "#6b8e23"}  # of a method in every figure
SPLITS = {"test": (300, 8), "harder": (200, 4), "side": (300, 4)}  # questions, samples of each
CLAIMS = [  # (better, worse, number): what the papers say; the interval of the difference decides
    ("rft, k = 16, base", "rft, k = 1, base", "pass@1"),
    ("rft, k = 16, continue", "rft, k = 16, base", "pass@1"),
    ("dft", "sft", "pass@1"),
    ("idft", "sft", "pass@1"),
    ("idft", "sft", "side"),
    ("hinted + sft", "sft", "side"),
    ("hinted + idft", "hinted + sft", "side"),
    ("hinted + idft", "dpo", "pass@1"),
    ("hinted + idft", "simpo", "pass@1"),
    ("prefix_rft", "sft", "pass@1"),
    ("prefix_rft", "grpo", "pass@1"),
    ("prefix_rft", "sft, then grpo", "pass@1"),
    ("prefix_rft", "luffy", "pass@1"),
    ("prefix_rft", "rl + sft loss", "pass@1"),
    ("prefix_rft", "prefix_rft, prefix not trained", "pass@1"),
    ("prefix_rft", "prefix_rft, whole prefix", "pass@1"),
    ("prefix_rft", "prefix_rft, random 20 %", "pass@1"),
    ("prefix_rft", "prefix_rft, bottom 20 %", "pass@1"),
    ("prefix_rft", "prefix_rft, uniform", "pass@1"),
    ("prefix_rft, 10 % demonstrated", "grpo", "pass@1"),
    ("prefix_rft, 1 % demonstrated", "grpo", "pass@1"),
    ("prefix_rft", "sft", "side"),
    ("prefix_rft", "grpo", "harder"),
    ("prefix_rft, noisy demonstrations", "sft, noisy demonstrations", "pass@1"),
    ("prefix_rft, noisy demonstrations", "idft, noisy demonstrations", "pass@1"),
    ("prefix_rft, noisy demonstrations", "luffy, noisy demonstrations", "pass@1"),
    ("prefix_rft, noisy demonstrations", "sft, then grpo, noisy demonstrations", "pass@1"),
    ("prefix_rft, noisy demonstrations", "grpo", "pass@1"),
    ("grpo", "grpo, as in DeepSeekMath", "pass@1"),
    ("dapo", "grpo, as in DeepSeekMath", "pass@1"),
    ("grpo", "rft, k = 16, base", "pass@1"),
]


RESULTS, README = ROOT / "experiments/results", ROOT / "README.md"
# what is logged of a stage before training
STAGE = "paths unsolved kept verified_demo verified_own verified_hinted phi_demo phi_own phi_hinted".split()


def name_of(cell, seed):
    for a, b in ((", ", "-"), (" = ", ""), (" + ", "_"), (" %", ""), (" ", "_")):
        cell = cell.replace(a, b)
    return f"{cell}-{seed}"


# ---- running ---------------------------------------------------------------------------------------------


def process(screen, *command):
    """CPU and wall seconds of a command with one thread; what it prints goes to the file `screen`."""
    began = time.time()
    with open(screen, "a") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        _, status, usage = os.wait4(child.pid, 0)
    assert status == 0, f"{' '.join(command)} failed, see {screen}"
    return {"cpu": usage.ru_utime + usage.ru_stime, "wall": time.time() - began}


def settings(args):
    """What makes a run another method: its arguments, without what names, measures or places it."""
    apart = "output_dir seed model base resume eval_questions eval_samples commit versions".split()
    apart += ["unparseable_gold"]
    return {k: v for k, v in args.items() if k not in apart}


def run(cell, seed, runs):
    """One cell and its measurement, each a process; the screen goes to <folder>.log."""
    out, result = runs / name_of(cell, seed), RESULTS / f"cells/{name_of(cell, seed)}.json"
    if result.exists():
        return
    stages = CELLS[cell].split(" && ")  # each begins with the model that the one before has left
    folders = [Path(f"{out}-stage{i}") for i in range(1, len(stages))] + [out]
    for command, folder, before in zip(stages, folders, [None, *folders]):
        if not (folder / "final").exists():
            flags = f"--seed {seed} --output-dir {folder} --eval-questions 1 --eval-samples 0"
            flags += f" --model {before}/final" if before else ""
            flags += " --resume" * bool(tok.checkpoints(folder))
            seconds = process(f"{out}.log", sys.executable, *command.split(), *flags.split())
            if "--resume" not in flags:  # else this is a part of them only
                (folder / "seconds.json").write_text(json.dumps(seconds))
    if not (out / "measured.json").exists():
        process(f"{out}.log", sys.executable, __file__, "--measure", str(out / "final"))
    lines = [json.loads(line) for folder in folders for line in open(folder / "metrics.jsonl")]
    record = {"cell": cell, "command": CELLS[cell], "seed": seed}
    record |= {"commit": json.loads((out / "args.json").read_text())["commit"]}
    record |= {f: sum(x.get(f, 0) for x in lines) for f in ("tokens_generated", "tokens_trained")}
    record |= {"args": [settings(json.loads((folder / "args.json").read_text())) for folder in folders]}
    if all((folder / "seconds.json").exists() for folder in folders):
        record |= {"cpu": sum(json.loads((f / "seconds.json").read_text())["cpu"] for f in folders)}
    curve = [
        [x["reward"], x["entropy"], x["response_len"]] for x in lines if "reward" in x and "entropy" in x
    ]
    record |= {"curve": [[round(y, 4) for y in x] for x in curve]} if curve else {}
    record["stage"] = {k: v for x in lines for k, v in x.items() if k in STAGE}
    record |= json.loads((out / "measured.json").read_text())
    half = result.with_suffix(".half")
    half.write_text(json.dumps(record) + "\n")
    half.rename(result)
    print(f"done: {cell}, seed {seed}", flush=True)


@torch.no_grad()
def measure(folder):
    """Right answers per question on each split, and on own samples: KL to the base, entropy, length."""
    args = sft.parse_args(["--max-new-tokens", "128"])
    model, tokenizer = tok.load_model(str(folder))
    base, _ = tok.load_model(str(ROOT / "tiny/model"))
    measured, stops = {}, tok.stop_ids(tokenizer, model.config)
    for split, (questions, n) in SPLITS.items():
        rows = tok.load_split(str(ROOT / "tiny/data"), split, {}).select(range(questions))
        prompts, golds = tok.encode_prompts(tokenizer, rows["question"]), list(rows["answer"])
        for name, temperature, copies in ((split, 1.0, n), (f"{split}_greedy", 0.0, 1)):
            torch.manual_seed(0)
            responses, _ = sft.sample(model, tokenizer, prompts * copies, temperature, args)
            right = math_reward(tok.decode_responses(tokenizer, responses), golds * copies)
            measured[name] = torch.tensor(right).view(copies, questions).sum(0).int().tolist()
            if name == "test":
                measured["levels"], own = list(rows["level"]), (prompts, responses[:questions])
                measured["length"] = sum(map(len, responses)) / len(responses)
                measured["cut"] = sum(ids[-1] not in stops for ids in responses) / len(responses)
    tokens, mask = tok.join(*own)
    log_p, log_q = (m(tokens).logits[:, :-1].log_softmax(-1) for m in (model, base))
    seen = mask[:, 1:].bool()
    measured["kl"] = (log_p.exp() * (log_p - log_q)).sum(-1)[seen].mean().item()  # KL(pi | base), per token
    measured["entropy"] = -(log_p.exp() * log_p).sum(-1)[seen].mean().item()
    return measured


# ---- reporting -------------------------------------------------------------------------------------------


def read(cell, seeds):
    """What the finished seeds of a cell gave, and what they cost."""
    files = [RESULTS / f"cells/{name_of(cell, seed)}.json" for seed in seeds]
    return [json.loads(file.read_text()) for file in files if file.exists()]


ASKED = ("test", "harder", "side", "test_greedy")


def shares(done, name):
    """Share of right answers, [seeds, questions]."""
    n = 1 if name.endswith("greedy") else SPLITS[name][1]
    return torch.tensor([x[name] for x in done]).float() / n


def draws(right, times=2000):
    """Bootstrap means of [seeds, questions]: both are resampled, as they would be in another study.

    Of S seeds S - 1 are drawn: S draws of so few would have (S - 1) / S of the variance of their mean.
    """
    seeds, questions = right.shape
    dice = torch.Generator().manual_seed(0)  # the same draws for every row: comparisons are paired
    some = torch.randint(seeds, (times, max(1, seeds - 1)), generator=dice)
    of = torch.randint(questions, (times, questions), generator=dice)
    return right[some].mean(1).gather(1, of).mean(1)


def interval(right):
    low, high = draws(right).quantile(torch.tensor([0.025, 0.975])).tolist()
    return [round(x, 4) for x in (right.mean().item(), low, high)]


def summary(done):
    """A row of results.json."""
    levels, test = torch.tensor([int(x) for x in done[0]["levels"]]), shares(done, "test")
    row = {"seeds": [x["seed"] for x in done], "pass@1": interval(test)}
    row |= {name: interval(shares(done, name)) for name in ASKED[1:]}
    wrong = torch.tensor([x["test"] for x in done]) == 0
    row["pass@8"] = round(1 - wrong.float().mean().item(), 4)
    row["levels"] = {str(i): round(test[:, levels == i].mean().item(), 4) for i in range(1, 7)}
    for key in ("kl", "entropy", "length", "cut", "tokens_generated", "tokens_trained", "cpu"):
        if known := [x[key] for x in done if key in x]:
            row[key] = round(sum(known) / len(known), 4)
    stages = done[0].get("stage", {})
    row["stage"] = {k: round(sum(x["stage"][k] for x in done) / len(done), 4) for k in stages}
    row["pass@1 by seed"] = [round(x.mean().item(), 4) for x in test]
    return row


def report(cells, seeds, write):
    base = RESULTS / "cells/base-0.json"
    if not base.exists():
        base.write_text(json.dumps({"cell": "base", "seed": 0} | measure(ROOT / "tiny/model")) + "\n")
    every = {cell: done for cell in cells if (done := read(cell, seeds))}
    rows = {"base": summary([json.loads(base.read_text())])}
    rows |= {cell: summary(done) for cell, done in every.items()}
    compared = []
    for better, worse, number in CLAIMS:
        both = [{x["seed"]: x for x in every.get(cell, [])} for cell in (better, worse)]
        if common := sorted(set(both[0]) & set(both[1])):
            a, b = (shares([x[s] for s in common], number.replace("pass@1", "test")) for x in both)
            gain = {"seeds": len(common), "gain": interval(a - b)}
            compared.append({"better": better, "worse": worse, "number": number} | gain)
    head = "| |pass@1|greedy|pass@8|L1|L2|L3|L4|L5|L6|harder|side|KL|entropy|length|generated|trained|CPU s|"
    text = [head, "|---" * (head.count("|") - 1) + "|"]
    for cell, row in rows.items():
        ends = {key: "{:.3f} [{:.3f}, {:.3f}]".format(*row[key]) for key in ("pass@1", "harder", "side")}
        name = (
            cell
            if cell == "base" or len(row["seeds"]) == len(seeds)
            else f"{cell} ({len(row['seeds'])} seeds)"
        )
        line = [name, ends["pass@1"], f"{row['test_greedy'][0]:.3f}", f"{row['pass@8']:.3f}"]
        line += [f"{x:.2f}" for x in row["levels"].values()] + [ends["harder"], ends["side"]]
        line += [f"{row['kl']:.3f}", f"{row['entropy']:.3f}", f"{row['length']:.1f}"]
        line += [f"{row.get(f'tokens_{k}', 0) / 1000:.0f}k" for k in ("generated", "trained")]
        text.append("| " + " | ".join([*line, f"{row['cpu']:.0f}" if "cpu" in row else ""]) + " |")
    claims = ["| better? | than | number | gain, 95 % interval | seeds | |", "|---|---|---|---|---|---|"]
    for c in compared:
        mean, low, high = c["gain"]
        verdict = "yes" if low > 0 else "no, worse" if high < 0 else "not decided"
        verdict = verdict if c["seeds"] >= 3 else "too few seeds"
        gain = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        claims.append(f"| {c['better']} | {c['worse']} | {c['number']} | {gain} | {c['seeds']} | {verdict} |")
    print("\n".join([*text, "", *claims]))
    if write:
        both = {"rows": rows, "compared": compared}
        (RESULTS / "results.json").write_text(json.dumps(both, indent=1) + "\n")
        (RESULTS / "results.md").write_text("\n".join([*text, "", *claims]) + "\n")
        insert("results", short(rows))
        insert("claims", claims)
        plot_curves(every)


def canvas(columns, size):
    """Axes of a figure that a light page and a dark one both show: transparent, with grey text and lines."""
    import matplotlib.pyplot as plt

    keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    plt.rcParams |= dict.fromkeys(keys, "#808080") | {"font.size": 11}
    figure, axes = plt.subplots(1, columns, figsize=size, squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def save(figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=130, transparent=True)


def plot_curves(every):
    """Reward, entropy and length of the samples of each step, mean of the seeds and of five steps."""
    curves = {cell: [x["curve"] for x in every.get(cell, []) if "curve" in x] for cell in COLORS}
    if not any(curves.values()):
        return
    figure, axes = canvas(3, (13, 3.8))
    for cell in filter(curves.get, curves):
        steps = torch.tensor(curves[cell]).mean(0)  # [steps, 3]
        for i, (axis, title) in enumerate(zip(axes, ("reward", "entropy, nats", "response, tokens"))):
            smooth = [steps[max(0, t - 4) : t + 1, i].mean().item() for t in range(len(steps))]
            axis.plot(range(1, len(steps) + 1), smooth, color=COLORS[cell], label=cell, linewidth=2)
            axis.set(title=title, xlabel="step")
    axes[0].legend(frameon=False)
    save(figure, RESULTS / "curves.png")


def short(rows):
    """The rows as the README has them."""
    head = "| | pass@1 | greedy | levels 1–3 | levels 4–6 | harder | side skills | KL to the base "
    text = [head + "| generated | trained | seeds |", "|---" * 11 + "|"]
    for cell, row in rows.items():
        levels = list(row["levels"].values())
        line = [cell, "{:.3f} [{:.3f}, {:.3f}]".format(*row["pass@1"]), f"{row['test_greedy'][0]:.3f}"]
        line += [f"{sum(levels[i : i + 3]) / 3:.2f}" for i in (0, 3)]
        line += [f"{row[k][0]:.3f}" for k in ("harder", "side")] + [f"{row['kl']:.3f}"]
        line += [f"{row.get(f'tokens_{k}', 0) / 1000:.0f}k" for k in ("generated", "trained")]
        text.append("| " + " | ".join([*line, str(len(row["seeds"])) if cell != "base" else ""]) + " |")
    return text


def insert(name, lines):
    """Put a table between its two marks in the README."""
    before, mark, rest = README.read_text().partition(f"<!-- {name} -->\n")
    assert mark, f"README.md has no mark <!-- {name} -->"
    _, end, after = rest.partition(f"<!-- /{name} -->")
    README.write_text(before + mark + "\n".join(lines) + "\n" + end + after)


def flags(doc, cells, runs):
    """A parser with what the experiments of many cells have in common."""
    add = (parser := argparse.ArgumentParser(description=doc.splitlines()[0])).add_argument
    add("--cells", nargs="+", choices=list(cells), default=list(cells), help="which rows")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="which seeds")
    add("--runs", type=Path, default=runs, help="where the cells are")
    add("--jobs", type=int, default=2, help="cells at a time, one thread each")
    add("--report", action="store_true", help="run nothing, report")
    add(
        "--write",
        action="store_true",
        help="write the tables and plots of experiments/results and the README",
    )
    return parser


def main():
    parser = flags(__doc__, CELLS, ROOT / "runs/reproduce")
    parser.add_argument("--measure", type=Path, help="measure one model folder (a cell does this itself)")
    args = parser.parse_args()
    for folder in (args.runs, RESULTS / "cells"):
        folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if args.measure:
        (args.measure.parent / "measured.json").write_text(json.dumps(measure(args.measure)))
        return
    if not args.report:
        with ThreadPoolExecutor(args.jobs) as pool:
            jobs = [pool.submit(run, cell, seed, args.runs) for seed in args.seeds for cell in args.cells]
            for job in jobs:
                job.result()
    report(list(CELLS), args.seeds, args.write)


if __name__ == "__main__":
    main()
