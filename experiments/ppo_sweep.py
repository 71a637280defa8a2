"""What a reward model is worth: PPO at several beta, best-of-n and DPO, by score, hidden utility and KL.

    python experiments/ppo_sweep.py                            # all cells, two at a time, one thread each
    python experiments/ppo_sweep.py --cells "ppo, 0.2" --seeds 0 1
    python experiments/ppo_sweep.py --report                   # run nothing: report what has been run

For each seed `rlhf_ppo.py --stop-after reward` collects pairs and fits a reward model to them. On these
    ppo, beta       is its third step, from the base model
    dpo             is dpo.py on the same pairs: no reward model, no sampling
    best of n       trains nothing: of n answers of the base model the one with the highest score counts
Every result answers the same 300 held-out questions. `score` is what the seed's reward model says, 0 for the
base model on average; `utility` what the simulated annotator values, 3.5 at most, which nothing is told;
KL is that of whole responses from the base model in nats, for best-of-n its bound log n - (n - 1) / n
(Stiennon et al., 2009.01325, appendix G.3; Beirami et al., 2401.01879, show that it is one).

What has been measured is kept in experiments/results/ppo/, a file a cell; intervals as in reproduce.py. Fixed
before the runs: PPO works if the interval of its gain in utility is above 0; the reward model is
over-optimised where a smaller beta has a higher score and a lower utility, both intervals off 0.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from math import comb, log
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import rlhf_ppo  # noqa: E402
from common import tokenization as tok  # noqa: E402
from common.verifier import check_gold, extract_answer  # noqa: E402
from experiments.reproduce import interval, process  # noqa: E402

BETAS, TIMES = (0.0, 0.05, 0.1, 0.2, 0.5), (1, 2, 4, 8, 16, 32, 64)
CELLS = {f"ppo, {beta}": f"rlhf_ppo.py --reward-model {{0}}/reward_model --kl-coef {beta}" for beta in BETAS}
CELLS |= {"dpo": "dpo.py --pairs {0}/preferences.jsonl", "best of n": ""}
RESULTS = ROOT / "experiments/results"
HELD_OUT = ["--eval-questions", "300"]


# ---- running ---------------------------------------------------------------------------------------------


def name_of(cell, seed):
    return f"{cell.replace(', ', '-').replace(' ', '_')}-{seed}"


def train(command, seed, out, *more):
    """One run of a script, continued where it was killed; its screen goes to <out>.log."""
    if not (out / "final").exists():
        more += ("--resume",) * bool(tok.checkpoints(out))
        run = (*command.split(), "--seed", str(seed), "--output-dir", str(out), *more)
        process(f"{out}.log", sys.executable, *run)


def reward_model(seed, runs):
    """Steps 1 and 2 of a seed: its pairs, its reward model, and the line of metrics about it."""
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
    args = rlhf_ppo.parse_args(HELD_OUT + ["--group-size", "8" if CELLS[cell] else str(max(TIMES))])
    _, rows = tok.load_splits(args, extract_answer, check_gold)
    base, tokenizer = tok.load_model(args.model)
    model = tok.load_model(str(out / "final"))[0] if CELLS[cell] else base
    scorer = tok.load_scorer(str(runs / f"reward-{seed}/reward_model"), tokenizer, args)
    torch.manual_seed(seed)
    batch = sum(rlhf_ppo.rollout(model, tokenizer, rows, args), [])
    tokens, mask = tok.join([c["prompt"] for c in batch], [c["response"] for c in batch])
    score = tok.at_end(rlhf_ppo.all_values(scorer, tokens, mask, args), mask).view(len(rows), -1)  # [Q, G]
    utility = torch.tensor([c["utility"] for c in batch]).view(len(rows), -1)
    record = {"cell": cell, "seed": seed, "length": sum(len(c["response"]) for c in batch) / len(batch)}
    if CELLS[cell]:
        logp, ref_logp = (rlhf_ppo.score(m, tokens, mask, args)[0] for m in (model, base))
        kl = (logp - ref_logp).sum(1).view(len(rows), -1)
        points = {"final": {"score": score.mean(1), "utility": utility.mean(1), "kl": kl.mean(1)}}
    else:
        points = {str(n): best_of(n, score, utility) for n in TIMES}
    record["points"] = {name: {k: v.tolist() for k, v in point.items()} for name, point in points.items()}
    (RESULTS / f"ppo/{out.name}.json").write_text(json.dumps(record) + "\n")


def best_of(n, score, utility):
    """Expected score and utility of the best of n samples, unbiased: over all choices of n of the N; [Q]."""
    order, samples = score.argsort(1), score.shape[1]
    weight = torch.tensor([comb(i, n - 1) / comb(samples, n) for i in range(samples)])  # i are worse
    both = {"score": score, "utility": utility}
    bound = torch.full((len(score),), log(n) - (n - 1) / n)
    return {k: (v.gather(1, order) * weight).sum(1) for k, v in both.items()} | {"kl": bound}


# ---- reporting -------------------------------------------------------------------------------------------


def read(cell, seeds):
    files = [RESULTS / f"ppo/{name_of(cell, seed)}.json" for seed in seeds]
    return {x["seed"]: x["points"] for file in files if file.exists() for x in [json.loads(file.read_text())]}


def stack(done, point, number, seeds=None):
    return torch.tensor([done[seed][point][number] for seed in seeds or done])  # [seeds, questions]


def report(seeds):
    every = {cell: done for cell in CELLS if (done := read(cell, seeds))}
    fits = [json.loads(x.read_text()) for s in seeds if (x := RESULTS / f"ppo/reward-{s}.json").exists()]
    for fit in fits:
        print(f"reward model {fit['seed']}: {fit['pair_accuracy']:.3f} of {fit['pair_accuracy_max']:.3f}")
    start = every.get("best of n", {})
    text = ["| |score|hidden utility|utility, less the base's|KL|seeds|", "|---|---|---|---|---|---|"]
    rows = {}
    for cell, done in every.items():
        for point in done[min(done)]:
            both = sorted(done.keys() & start.keys())
            ends = {k: interval(stack(done, point, k)) for k in ("score", "utility", "kl")}
            if not both:
                continue
            gain = stack(done, point, "utility", both) - stack(start, "1", "utility", both)
            ends["gain"], name = interval(gain), cell if CELLS[cell] else f"best of {point}"
            rows[name] = ends | {"seeds": list(done)}
            numbers = ["{:.2f} [{:.2f}, {:.2f}]".format(*ends[k]) for k in ("score", "utility", "gain", "kl")]
            text.append("| " + " | ".join([name, *numbers, str(len(done))]) + " |")
    text += ["", "| beta | than | score | utility | seeds |", "|---|---|---|---|---|"]
    for low, high in zip(BETAS, BETAS[1:]):
        a, b = (every.get(f"ppo, {beta}", {}) for beta in (low, high))
        if both := sorted(a.keys() & b.keys()):
            gains = [
                interval(stack(a, "final", k, both) - stack(b, "final", k, both))
                for k in ("score", "utility")
            ]
            gains = ["{:+.2f} [{:+.2f}, {:+.2f}]".format(*gain) for gain in gains]
            text.append(f"| {low} | {high} | " + " | ".join(gains) + f" | {len(both)} |")
    print("\n".join(text))
    accuracy = [f"{x['pair_accuracy']:.3f} of at most {x['pair_accuracy_max']:.3f}" for x in fits]
    head = "Held-out judgements that the reward models foresee, by seed: " + ", ".join(accuracy) + ".\n\n"
    (RESULTS / "ppo_sweep.md").write_text(head + "\n".join(text) + "\n")
    (RESULTS / "ppo_sweep.json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows)


def plot(rows):
    """Score and hidden utility over KL; transparent, in colours that a light and a dark page both show."""
    import matplotlib.pyplot as plt

    grey = "#808080"
    keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    plt.rcParams |= dict.fromkeys(keys, grey) | {"font.size": 11}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharex=True)
    for axis, number in zip(axes, ("score", "utility")):
        for label, sign, color in (
            ("ppo", "o-", "#1f83d6"),
            ("best of", "s-", "#e08020"),
            ("dpo", "D", "#2a9d5c"),
        ):
            some = sorted(
                (row for name, row in rows.items() if name.startswith(label)), key=lambda r: r["kl"][0]
            )
            x, y = ([row[k][0] for row in some] for k in ("kl", number))
            bars = [[abs(row[number][i] - row[number][0]) for row in some] for i in (1, 2)]
            axis.errorbar(x, y, bars, fmt=sign, color=color, label=label.replace("of", "of n"), capsize=3)
        for name, row in rows.items():
            if not name.startswith("dpo"):
                text = name.removeprefix("ppo, ").removeprefix("best of ")
                axis.annotate(
                    text, (row["kl"][0], row[number][0]), (4, -12), textcoords="offset points", fontsize=8
                )
        axis.set(
            xlabel="KL from the base model, nats per response",
            title={"score": "what is optimised: score"}.get(number, "what it stands for: hidden utility"),
        )
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(RESULTS / "ppo_sweep.png", dpi=130, transparent=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS), help="which rows")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="which seeds")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/ppo_sweep", help="where the cells are")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, one thread each")
    parser.add_argument("--report", action="store_true", help="run nothing, report")
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
    report(args.seeds)


if __name__ == "__main__":
    main()
