"""Reward-model over-optimisation: PPO at several beta, best-of-n and DPO, by score, hidden utility and KL.

    python experiments/ppo_sweep.py                            # all cells, two at a time, one thread each
    python experiments/ppo_sweep.py --cells "ppo, 0.2" --seeds 0 1
    python experiments/ppo_sweep.py --report                   # run nothing: report what has been run

For each seed `rlhf_ppo.py --stop-after reward` collects pairs and fits a reward model to them. On these
    ppo, beta       is its third stage, from the base model
    dpo             is dpo.py on the same pairs: no reward model, no sampling
    best of n       trains nothing: of n samples of the base model the one with the highest score is taken
Every result answers the same 300 held-out questions. `score` is the proxy reward, from the seed's reward
model, 0 for the base model on average; `utility` is the gold reward of the simulated annotator, 3.5 at
most, which no method sees; KL is that of whole responses to the base model in nats, for best-of-n its
bound log n - (n - 1) / n (Stiennon et al., 2009.01325, appendix G.3; Beirami et al., 2401.01879, show
that it is one).

What has been measured is kept in experiments/results/ppo/, a file a cell. An interval is Student's 95 % over
the seeds; each has a reward model of its own. Differences are paired by seed.
Fixed before the runs: PPO works if the interval of its gain in utility is above 0; the reward model is
over-optimised where a smaller beta has a higher score and a lower utility, both intervals off 0.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from math import comb, log, nan
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import rlhf_ppo  # noqa: E402
from common import tokenization as tok  # noqa: E402
from common.plumbing import data, folders, models  # noqa: E402
from experiments.figures import COLORS, canvas, label, save, styled  # noqa: E402
from experiments.intervals import student  # noqa: E402
from experiments.study import process  # noqa: E402
from experiments.tables import insert  # noqa: E402

QUESTIONS = 300
BETAS, TIMES = (0.0, 0.05, 0.1, 0.2, 0.5), (1, 2, 4, 8, 16, 32, 64)
CELLS = {f"ppo, {beta}": f"rlhf_ppo.py --reward-model {{0}}/reward_model --kl-coef {beta}" for beta in BETAS}
CELLS |= {"dpo": "dpo.py --pairs {0}/preferences.jsonl", "best of n": ""}
COMPARED = [("ppo, 0.2", "best of 1"), ("dpo", "best of 1"), ("ppo, 0.2", "dpo"), ("ppo, 0.2", "best of 4")]
COMPARED += [("best of 32", "best of 4"), ("ppo, 0.0", "best of 1")]
COMPARED += [(f"ppo, {low}", f"ppo, {high}") for low, high in zip(BETAS, BETAS[1:])]
RESULTS = ROOT / "experiments/results"


# ---- running ---------------------------------------------------------------------------------------------


def name_of(cell, seed):
    return f"{cell.replace(', ', '-').replace(' ', '_')}-{seed}"


def train(command, seed, out, *more):
    """One run of a script, continued where it was killed; its screen goes to <out>.log."""
    if not (out / "final").exists():
        more += ("--resume",) * bool(folders.checkpoints(out))
        run = (*command.split(), "--seed", str(seed), "--output-dir", str(out), *more)
        process(f"{out}.log", sys.executable, *run)


def reward_model(seed, runs):
    """Stages 1 and 2 of a seed: its pairs, its reward model, and the line of metrics about it."""
    out, result = runs / f"reward-{seed}", RESULTS / f"ppo/reward-{seed}.json"
    if not result.exists() or not (out / "reward_model").exists():
        train("rlhf_ppo.py --stop-after reward", seed, out)
        lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
        fitted = next(line for line in lines if "pair_accuracy" in line)
        result.write_text(json.dumps({"seed": seed} | fitted) + "\n")


def run(cell, seed, runs):
    """Train and measure one cell; nothing if its file is there."""
    reward, out = runs / f"reward-{seed}", runs / name_of(cell, seed)
    if (RESULTS / f"ppo/{out.name}.json").exists():
        return
    if CELLS[cell]:
        train(CELLS[cell].format(reward), seed, out, "--eval-questions", "1", "--eval-samples", "0")
    process(f"{out}.log", sys.executable, __file__, "--measure", cell, str(seed), "--runs", str(runs))
    print(f"done: {cell}, seed {seed}", flush=True)


@torch.no_grad()
def measure(cell, seed, runs):
    """Score, utility and KL of each held-out question: means of 8 samples, or of the best of n of 64."""
    out = runs / name_of(cell, seed)
    args = rlhf_ppo.parse_args(["--group-size", "8" if CELLS[cell] else str(max(TIMES))])
    args.eval_questions = 10**6  # all; a smaller number would be a random sample
    _, rows = data.load_splits(args)
    rows = rows.select(range(QUESTIONS))  # the first, as in study.py
    base, tokenizer = models.load_model(args.model)
    model = models.load_model(str(out / "final"))[0] if CELLS[cell] else base
    scorer = models.load_scorer(str(runs / f"reward-{seed}/reward_model"), tokenizer, args)
    torch.manual_seed(seed)
    groups = rlhf_ppo.rollout(model, tokenizer, rows, args)
    batch = [completion for group in groups for completion in group]
    tokens, mask = tok.join([c["prompt"] for c in batch], [c["response"] for c in batch])
    score = rlhf_ppo.at_end(rlhf_ppo.all_values(scorer, tokens, mask, args), mask)
    score = score.view(len(rows), -1)  # [Q, G]
    utility = torch.tensor([c["utility"] for c in batch]).view(len(rows), -1)
    record = {"cell": cell, "seed": seed, "length": sum(len(c["response"]) for c in batch) / len(batch)}
    if CELLS[cell]:
        logp, ref_logp = (rlhf_ppo.score(m, tokens, mask, args)[0] for m in (model, base))
        kl = (logp - ref_logp).sum(1).view(len(rows), -1)
        points = {"final": {"score": score.mean(1), "utility": utility.mean(1), "kl": kl.mean(1)}}
    else:
        points = {str(n): best_of(n, score, utility) for n in TIMES}
    record["points"] = {
        name: {k: [round(x, 4) for x in v.tolist()] for k, v in point.items()}
        for name, point in points.items()
    }
    (RESULTS / f"ppo/{out.name}.json").write_text(json.dumps(record) + "\n")


def best_of(n, score, utility):
    """Expected score and utility of the best of n samples, unbiased: over all choices of n of the N; [Q]."""
    order, samples = score.argsort(1), score.shape[1]
    weight = torch.tensor([comb(i, n - 1) / comb(samples, n) for i in range(samples)])  # i are worse
    both = {"score": score, "utility": utility}
    bound = torch.full((len(score),), log(n) - (n - 1) / n)
    return {k: (v.gather(1, order) * weight).sum(1) for k, v in both.items()} | {"kl": bound}


# ---- intervals -------------------------------------------------------------------------------------------


def interval(numbers):
    """Mean and Student's 95 % interval of [seeds, questions]; of a single seed the mean alone."""
    means = numbers.mean(1).tolist()
    ends = student(means).interval() if len(means) > 1 else (nan, nan)
    return [round(x, 4) for x in (numbers.mean().item(), *ends)]


# ---- reporting -------------------------------------------------------------------------------------------


def read(cell, seeds):
    files = [RESULTS / f"ppo/{name_of(cell, seed)}.json" for seed in seeds]
    found = [json.loads(file.read_text()) for file in files if file.exists()]
    own = [{"length": x["length"]} if CELLS[cell] else {} for x in found]  # of the best only the score counts
    return {x["seed"]: {k: v | y for k, v in x["points"].items()} for x, y in zip(found, own)}


def stack(done, number, seeds=None):
    return torch.tensor([done[seed][number] for seed in seeds or done])  # [seeds, questions]


def shown(ends, form="{:.2f} [{:.2f}, {:.2f}]"):
    return form.format(*ends)


def report(seeds, write):
    every = {cell: done for cell in CELLS if (done := read(cell, seeds))}
    fits = [json.loads(x.read_text()) for s in seeds if (x := RESULTS / f"ppo/reward-{s}.json").exists()]
    points = {  # every row: what its seeds gave
        name: {seed: found[point] for seed, found in done.items()}
        for cell, done in every.items()
        for point in done[min(done)]
        for name in [cell if CELLS[cell] else f"best of {point}"]
    }
    rows = {name: row_of(done) for name, done in points.items()}
    head = "| | proxy reward | gold reward | KL, nats per response | response, tokens | seeds |"
    text = [head, "|---" * 6 + "|"]
    for name, row in rows.items():
        kl = f"≤ {row['kl'][0]:.2f}" if name.startswith("best") else shown(row["kl"])  # a bound, not measured
        ends = [shown(row[k]) for k in ("score", "utility")] + [kl]
        text.append(f"| {name} | " + " | ".join([*ends, row["length"], str(len(row["seeds"]))]) + " |")
    gains = ["| | minus | proxy reward | gold reward | KL | seeds |", "|---" * 6 + "|"]
    for a, b in COMPARED:
        if both := sorted(points.get(a, {}).keys() & points.get(b, {}).keys()):
            ends = [
                shown(
                    interval(stack(points[a], k, both) - stack(points[b], k, both)),
                    "{:+.2f} [{:+.2f}, {:+.2f}]",
                )
                for k in ("score", "utility", "kl")
            ]
            ends[2] *= not b.startswith("best")
            gains.append(f"| {a} | {b} | " + " | ".join([*ends, str(len(both))]) + " |")
    accuracy = ["| seed | held-out preference accuracy | oracle accuracy |", "|---" * 3 + "|"]
    accuracy += [f"| {x['seed']} | {x['pair_accuracy']:.3f} | {x['pair_accuracy_max']:.3f} |" for x in fits]
    whole = "\n".join([*accuracy, "", *text, "", *gains]) + "\n"
    print(whole)
    if write:
        (RESULTS / "ppo_sweep.md").write_text(whole)
        (RESULTS / "ppo_sweep.json").write_text(json.dumps(rows, indent=1) + "\n")
        insert("ppo", text)
        insert("ppo compared", gains)
        save(draw(rows), RESULTS / "ppo_sweep.svg")


def row_of(done):
    row = {k: interval(stack(done, k)) for k in ("score", "utility", "kl")}
    lengths = [x["length"] for x in done.values() if "length" in x]
    return row | {"length": f"{sum(lengths) / max(1, len(lengths)):.1f}" * bool(lengths), "seeds": list(done)}


@styled
def draw(rows):
    """Proxy and gold reward over KL, whose axis is logarithmic beyond half a nat."""
    figure, [axes] = canvas(1, 2, 3.6)
    titles = {"score": "optimised: the proxy reward", "utility": "not seen: the gold reward"}
    lines = {"ppo, ": ("o-", "ppo"), "best of ": ("s-", "best of n"), "dpo": ("D", "dpo")}
    named = []
    for axis, (number, title) in zip(axes, titles.items()):
        axis.set_xscale("symlog", linthresh=0.5)
        ticks = [0, 0.5, 1, 2, 5, 10, 100, 300]
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.minorticks_off()
        axis.set(title=title, ylabel="reward, mean of 300 questions")
        axis.set(xlabel="KL from the base model, nats per response")
        points = []
        for start, (sign, method) in lines.items():
            some = {name.removeprefix(start): row for name, row in rows.items() if name.startswith(start)}
            some = dict(sorted(some.items(), key=lambda item: item[1]["kl"][0]))
            x, y = ([row[k][0] for row in some.values()] for k in ("kl", number))
            bars = [[abs(row[number][i] - row[number][0]) for row in some.values()] for i in (1, 2)]
            name = {"ppo": "PPO, by β", "dpo": "DPO"}.get(method, "best of n, by n")
            color = COLORS[method]
            axis.errorbar(x, y, bars, fmt=sign, color=color, label=name, capsize=2, markersize=5)
            points += [(at, xy, color) for at, *xy in zip(some, x, y) if at]
        named.append(points)
    figure.draw_without_rendering()
    for axis, points in zip(axes, named):
        label(axis, points)
    axes[0].legend(loc="upper left")
    return figure


def flags(doc, cells, runs, seeds=(0, 1, 2, 3, 4)):
    """A parser with what the experiments of many cells have in common."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    add = parser.add_argument
    add("--cells", nargs="+", choices=list(cells), default=list(cells), help="which rows")
    if seeds:
        add("--seeds", nargs="+", type=int, default=seeds, help="which seeds")
    add("--runs", type=Path, default=runs, help="where the cells are")
    add("--jobs", type=int, default=2, help="cells at a time, one thread each")
    add("--report", action="store_true", help="run nothing, report")
    add(
        "--write",
        action="store_true",
        help="write the tables and plots of experiments/results and docs",
    )
    return parser


def main():
    parser = flags(__doc__, CELLS, ROOT / "runs/ppo_sweep")
    parser.add_argument("--measure", nargs=2, help="cell and seed: measure it (a cell does this itself)")
    args = parser.parse_args()
    for folder in (args.runs, RESULTS / "ppo"):
        folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if args.measure:
        measure(args.measure[0], int(args.measure[1]), args.runs)
        return
    if not args.report:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda seed: reward_model(seed, args.runs), args.seeds))
            list(pool.map(lambda job: run(*job, args.runs), [(c, s) for s in args.seeds for c in args.cells]))
    report(args.seeds, args.write)


if __name__ == "__main__":
    main()
