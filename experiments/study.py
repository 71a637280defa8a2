"""Run the rows of experiments/rows.py by the protocol of experiments/protocol.md.

    python experiments/study.py                      # everything that is not yet recorded, two runs at a time
    python experiments/study.py --rows "easy: sft"   # some rows
    python experiments/study.py --plan               # what is left to run, nothing is run
    python experiments/report.py                     # tables, verdicts and figures of the records

Each row is tuned first: four learning rates, two seeds each, on questions that no table uses. Then the best
rate runs with fresh seeds, and `measure` asks every final model the same questions. "SFT, then GRPO" also
tunes how many steps SFT has.

A run is one line of experiments/results/study.jsonl, with its command, commit and versions. What has a line
is not run again, and an interrupted run continues from its checkpoint, so the study can be stopped and
started at any time.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sft  # noqa: E402
from common import tokenization as tok  # noqa: E402
from common.plumbing import data, folders, models  # noqa: E402
from common.verifier import math_reward  # noqa: E402
from experiments.rows import BY_KEY, REGIMES, ROWS, SEEDS, SHARES, TUNING_SEEDS  # noqa: E402

RECORDS = ROOT / "experiments/results/study.jsonl"
QUIET = "--eval-questions 1 --eval-samples 0 --eval-first off"  # `measure` asks instead
FIRST, LAST = 300, 300  # questions of the test split: for measuring, and for tuning
TUNING_QUESTIONS, TUNING_SAMPLES = 200, 4
ASKED = {  # split: questions, {temperature: samples of each}
    "test": (FIRST, {0.6: 8, 1.0: 4, 0.0: 1}),
    "harder": (200, {0.6: 4}),
    "side": (300, {0.6: 4}),
}
EVERY = 5  # steps between the points of a recorded curve


# ---- what is to be run -----------------------------------------------------------------------------------


def name_of(key):
    for old, new in ((": ", "-"), (", ", "-"), (" = ", ""), (" + ", "_"), (" %", ""), (" ", "_")):
        key = key.replace(old, new)
    return key.replace(",", "")


def options(row):
    """What is tuned: (share, rate) pairs. Of shares only a first look is taken, at the second rate."""
    if not row.after_sft:
        return [(None, rate) for rate in row.rates]
    return [(share, row.rates[1]) for share in SHARES]


def of_row(records, row, phase):
    return [x for x in records if x["row"] == row.key and x["phase"] == phase]


def share_of(record):
    """The share of a record as in SHARES; JSON makes it a list."""
    return tuple(record["share"]) if record["share"] else None


def tuned(records, row):
    """{option: mean of the primary number over the tuning seeds}, of options with both seeds."""
    found = {}
    for x in of_row(records, row, "tune"):
        found.setdefault((share_of(x), x["lr"]), []).append(x["primary"])
    return {option: sum(y) / len(y) for option, y in found.items() if len(y) == len(TUNING_SEEDS)}


def best_share(records, row):
    """The share of "SFT, then GRPO" that is tuned further, or None."""
    found = tuned(records, row)
    wanted = options(row)
    if not row.after_sft or not all(option in found for option in wanted):
        return None
    return max(wanted, key=found.get)[0]


def best(records, row):
    """The option to run with, or None while tuning is not complete."""
    found = tuned(records, row)
    share = best_share(records, row)
    if row.after_sft and not share:
        return None
    wanted = [(share, rate) for rate in row.rates]
    if not all(option in found for option in wanted):
        return None
    return max(wanted, key=found.get)


def tasks(records, row):
    """The runs of a row that can be started now: (phase, option, seed)."""
    if row.after_sft and best(records, BY_KEY[f"{row.regime}: sft"]) is None:
        return []
    done = set()
    for x in records:
        if x["row"] == row.key:
            done.add((x["phase"], (share_of(x), x["lr"]), x["seed"]))
    option = best(records, row)
    if option:
        some = [("final", option, seed) for seed in SEEDS[: row.seeds]]
    else:
        wanted = options(row)
        share = best_share(records, row)
        if share:
            wanted += [(share, rate) for rate in row.rates]
        some = [("tune", option, seed) for option in wanted for seed in TUNING_SEEDS]
    return [x for x in dict.fromkeys(some) if x not in done]


def stages(records, row, option):
    """The command lines of a run; the second continues with the model of the first."""
    share, rate = option
    flags = REGIMES[row.regime][0]
    command = f"{row.command} {flags} --lr {rate:g}"
    if not row.after_sft:
        return [" ".join(command.split())]
    first, second = share
    sft_rate = best(records, BY_KEY[f"{row.regime}: sft"])[1]
    command = f"{row.command} --lr {rate:g} --steps {second}"
    return [" ".join(f"sft.py {flags} --lr {sft_rate:g} --steps {first}".split()), command]


# ---- running ---------------------------------------------------------------------------------------------


def process(screen, *command):
    """CPU and wall seconds of a command with one thread; what it prints goes to the file `screen`."""
    began = time.time()
    with open(screen, "a") as file:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed, see {screen}")
    return {"cpu": usage.ru_utime + usage.ru_stime, "wall": time.time() - began}


def train(commands, seed, out, more):
    """Run the stages in folders beside `out`; flags `more` go to the last. Returns the folders."""
    outs = [Path(f"{out}-stage{i}") for i in range(1, len(commands))] + [out]
    before = None
    for command, folder in zip(commands, outs):
        if not (folder / "final").exists():
            flags = f"--seed {seed} --output-dir {folder} {more if folder == out else QUIET}"
            if before:
                flags += f" --model {before}/final"
            resumed = bool(folders.checkpoints(folder))
            if resumed:
                flags += " --resume"
            seconds = process(f"{out}.log", sys.executable, *command.split(), *flags.split())
            if not resumed:  # else this is a part of them only
                (folder / "seconds.json").write_text(json.dumps(seconds))
        before = folder
    return outs


def questions(runs, regime):
    """A file with the questions for tuning, of the levels of the regime's primary number."""
    levels = REGIMES[regime][1]
    path = runs / f"questions-{levels}.jsonl"
    if not path.exists():
        rows = (ROOT / "tiny/data/test.jsonl").read_text().splitlines(keepends=True)
        rows = [row for row in rows[-LAST:] if json.loads(row)["level"] in levels]
        half = path.with_suffix(f".{threading.get_ident()}")
        half.write_text("".join(rows))
        half.rename(path)
    return path


def run(row, phase, option, seed, commands, runs):
    """One run and its numbers: a record."""
    share, rate = option
    part = f"-{share[0]}" if share else ""
    out = runs / f"{name_of(row.key)}-{phase}{part}-{rate:g}-{seed}"
    more = QUIET
    if phase == "tune":
        more = f"--eval-data {questions(runs, row.regime)} --eval-questions {TUNING_QUESTIONS}"
        more += f" --eval-samples {TUNING_SAMPLES} --eval-temperature 0.6 --eval-first off"
    outs = train(commands, seed, out, more)
    lines = [json.loads(line) for folder in outs for line in open(folder / "metrics.jsonl")]
    arguments = json.loads((out / "args.json").read_text())
    record = {"row": row.key, "phase": phase, "seed": seed, "lr": rate, "share": share}
    record |= {"commands": commands, "commit": arguments["commit"], "versions": arguments["versions"]}
    for key in ("tokens_generated", "tokens_trained"):
        record[key] = sum(x.get(key, 0) for x in lines)
    record["cpu"] = None  # of an interrupted run it is not known
    if all((folder / "seconds.json").exists() for folder in outs):
        seconds = [json.loads((folder / "seconds.json").read_text()) for folder in outs]
        record["cpu"] = round(sum(x["cpu"] for x in seconds), 1)
    if phase == "tune":
        record["primary"] = round(lines[-1]["pass@1"], 4)
    else:
        if not (out / "measured.json").exists():
            process(f"{out}.log", sys.executable, __file__, "--measure", str(out / "final"))
        record["curve"] = curve(lines)
        record |= json.loads((out / "measured.json").read_text())
    for folder in outs:
        shutil.rmtree(folder)
    return record


def curve(lines):
    """[step, reward, entropy, response length, reward of hybrids or None] of every fifth step of RL."""
    points = []
    for x in lines:
        if "reward" in x and "entropy" in x and x["step"] % EVERY == 0:  # not what RFT says of a round
            numbers = [x["reward"], x["entropy"], x["response_len"], x.get("reward_hybrid")]
            points.append([x["step"], *[y if y is None else round(y, 4) for y in numbers]])
    return points


@torch.no_grad()
def measure(folder):
    """Shares of correct answers on each split; KL to the base, entropy and length of on-policy samples.

    "test@0.6": one number for each level 1 to 6, so that any primary number can be read. Others: one number.
    """
    args = sft.parse_args(["--max-new-tokens", "128"])
    model, tokenizer = models.load_model(str(folder))
    base, _ = models.load_model(str(ROOT / "tiny/model"))
    stops = tok.stop_ids(tokenizer, model.config)
    measured = {}
    for split, (count, asked) in ASKED.items():
        rows = data.load_split(str(ROOT / "tiny/data"), split, {}).select(range(count))
        prompts, golds = tok.encode_prompts(tokenizer, rows["question"]), list(rows["answer"])
        levels = torch.tensor([int(x) if x.isdigit() else 0 for x in rows["level"]])
        for temperature, copies in asked.items():
            torch.manual_seed(0)
            responses, _ = sft.sample(model, tokenizer, prompts * copies, temperature, args)
            correct = math_reward(tok.decode_responses(tokenizer, responses), golds * copies)
            correct = torch.tensor(correct).view(copies, count).float()
            share = [round(correct[:, levels == i].mean().item(), 4) for i in sorted(set(levels.tolist()))]
            measured[f"{split}@{temperature:g}"] = (
                share if split == "test" else round(correct.mean().item(), 4)
            )
            if split == "test" and temperature == 0.6:
                measured["pass@8"] = round((correct.sum(0) > 0).float().mean().item(), 4)
            if split == "test" and temperature == 1:
                own = prompts, responses[:count]
                measured["length"] = round(sum(map(len, responses)) / len(responses), 2)
                truncated = sum(ids[-1] not in stops for ids in responses)
                measured["truncated"] = round(truncated / len(responses), 4)
    tokens, mask = tok.join(*own)
    log_p, log_q = (m(tokens).logits[:, :-1].log_softmax(-1) for m in (model, base))
    seen = mask[:, 1:].bool()
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[seen].mean().item()  # KL(pi || base), nats a token
    entropy = -(log_p.exp() * log_p).sum(-1)[seen].mean().item()
    return measured | {"kl": round(kl, 4), "entropy": round(entropy, 4)}


# ---- the study -------------------------------------------------------------------------------------------


def read_records(path=RECORDS):
    path = Path(path)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def work(rows, runs, deadline, lock, running, failures):
    """Take the first run that can be started, until there is none."""
    while time.time() < deadline:
        with lock:
            records = read_records()
            waiting = [(row, *task) for row in rows for task in tasks(records, row)]
            free = [task for task in waiting if task not in running | failures]
            if free:
                task = free[0]
                running.add(task)
                commands = stages(records, task[0], task[2])
        if free:
            row, phase, option, seed = task
            try:
                record = run(row, phase, option, seed, commands, runs)
            except RuntimeError as error:  # one failed run does not stop the others
                print(f"failed: {row.key}, {phase}, {option}, seed {seed}: {error}", flush=True)
                with lock:
                    running.discard(task)
                    failures.add(task)
                continue
            with lock:
                with open(RECORDS, "a") as file:
                    file.write(json.dumps(record) + "\n")
                running.discard(task)
            primary = f" {record['primary']:.3f}" if phase == "tune" else ""
            print(f"{row.key}, {phase}, {option}, seed {seed}:{primary}", flush=True)
        elif running:
            time.sleep(1)  # what it waits for may be tuned by then
        else:
            return


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=list(BY_KEY), default=list(BY_KEY), help="which rows")
    parser.add_argument(
        "--runs", type=Path, default=ROOT / "runs/study", help="where runs are kept until recorded"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--minutes", type=float, default=1e6, help="start nothing new after so many minutes")
    parser.add_argument("--plan", action="store_true", help="print what is left, run nothing")
    parser.add_argument("--measure", type=Path, help="measure one model folder (a run does this itself)")
    return parser.parse_args(argv)


def main(args):
    torch.set_num_threads(1)
    if args.measure:
        (args.measure.parent / "measured.json").write_text(json.dumps(measure(args.measure)))
        return
    rows = [row for row in ROWS if row.key in args.rows]
    if args.plan:
        for row in rows:
            records = read_records()
            done = {phase: len(of_row(records, row, phase)) for phase in ("tune", "final")}
            print(f"{row.key}: {done['tune']} tuning runs, {done['final']} of {row.seeds} seeds")
        return
    args.runs.mkdir(parents=True, exist_ok=True)
    if not any(x["row"] == "base" for x in read_records()):
        record = {"row": "base", "phase": "final", "seed": 0, "lr": None, "share": None}
        with open(RECORDS, "a") as file:
            file.write(json.dumps(record | measure(ROOT / "tiny/model")) + "\n")
    lock, running, failures = threading.Lock(), set(), set()
    deadline = time.time() + 60 * args.minutes
    shared = (rows, args.runs, deadline, lock, running, failures)
    workers = [threading.Thread(target=work, args=shared) for _ in range(args.jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main(parse_args())
