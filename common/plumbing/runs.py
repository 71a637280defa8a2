"""Runs: begin, continue, count steps, save, log, and sum up at the end."""

import json
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from math import cos, isfinite, pi
from pathlib import Path

import torch
from tqdm import tqdm

from common.plumbing import configs, decoding, folders, memory, models, ranks, storage
from common.plumbing.flags import BadInput, demand, one_line
from common.plumbing.screen import hint, peak_memory, show, speed, summary

# ---- the run folder --------------------------------------------------------------------------------------


def open_run(args):
    """Begin or continue a run: its folder (Path), its state (a dict with `step`), model and tokenizer.

    Without --resume the folder is new. An earlier run of that name is moved aside, never
    overwritten, and only when nothing can be wrong with the arguments any more. With --resume
    everything comes from the newest checkpoint, and later lines of metrics.jsonl and
    samples.jsonl are removed: they will be written again.
    """
    out = Path(args.output_dir)
    is_taken = torch.tensor(int(ranks.is_first() and not folders.claim(out)))
    if ranks.reduce(is_taken, "MAX"):  # all ranks leave
        raise folders.taken(out)
    whole = folders.checkpoints(out)
    state = {"step": 0, "args": vars(args), "skipped": 0}
    if args.resume and not whole:  # killed before its first checkpoint, or never started?
        started = (out / "args.json").exists() and not (out / "final").exists()
        demand(started, f"--resume: there is no checkpoint in {out}; start without --resume.")
        folders.same_arguments(json.loads((out / "args.json").read_text()), args)
        print(f"--resume: there is no checkpoint in {out} yet; the run starts again")
        args.resume = False
    if args.resume:
        state = folders.load_state(whole[-1], args)
        model, tokenizer = models.load_model(whole[-1], args.gradient_checkpointing, "--resume")
    else:
        memory.check_training(args)
        model, tokenizer = models.load_model(args.model, args.gradient_checkpointing)
    configs.set_template(tokenizer, args)
    if ranks.is_first():
        try:
            folders.open_folder(out, state, args, sum(p.nbytes for p in model.parameters()))
        except OSError as error:
            raise BadInput(f"--output-dir {out}: cannot be written ({one_line(error)}).") from None
    ranks.barrier()
    folders.demand_shared(out)
    return out, state | {"faults": 0, "stop": 0, "leave": 0}, model, tokenizer


# ---- checkpoints -----------------------------------------------------------------------------------------


def save_model(folder, model, tokenizer, optimizer=None, state=None):
    """Save a model folder. With optimizer and state it is a checkpoint and replaces older ones.

    It is written under another name and renamed when complete. So under its own name it is
    complete or absent, and a run that is killed at any moment leaves its last checkpoint.
    """
    half = folder.with_name(folder.name + ".half")
    old = folder.with_name(folder.name + ".old")
    try:
        if ranks.is_first():
            shutil.rmtree(half, ignore_errors=True)  # of a run that was killed here
            half.mkdir(parents=True)
        ranks.barrier()
        storage.write_model(half, model, tokenizer)
        if optimizer:
            written = {name: (folder.parent / name).stat().st_size for name in folders.LOGS}
            storage.write_state(half, state | {"optimizer": optimizer.state_dict(), "written": written})
    except Exception as error:  # no space left, in the words of three libraries
        shutil.rmtree(half, ignore_errors=True)
        raise folders.unwritable(folder, error) from None
    ranks.barrier()  # all ranks have written
    if ranks.is_first():
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)  # of a run that was killed below
            folder.rename(old)
        half.rename(folder)
        outdated = {old, *folders.checkpoints(folder.parent)} - {folder} if optimizer else {old}
        for path in outdated:  # only now that the new one is complete
            shutil.rmtree(path, ignore_errors=True)
    ranks.barrier()


# ---- steps -----------------------------------------------------------------------------------------------

bar = None  # the progress bar of `steps`, while there is one
OFTEN = 1.0  # seconds between two changes of what it says within a step


def steps(state, last):
    """Count state["step"] up to `last` under a progress bar. What ends a run early does so between steps.

    After SIGINT or SIGTERM the step is finished and saved (`due`), then the exit status is
    130 or 143. A second signal ends the process at once. SIGUSR1, which Slurm sends before a
    limit, is treated as SIGTERM.
    """
    global bar

    def stop(number, frame):
        state["stop"] = int(signal.SIGTERM) if number == signal.SIGUSR1 else number
        signal.signal(number, signal.SIG_DFL)

    sampled, shown = 0, 0.0  # responses of this step, and when the bar said so

    def count(ended):
        nonlocal sampled, shown
        sampled += ended
        if ended and time.time() - shown > OFTEN and decoding.ENDED == [count]:  # not within an evaluation
            shown = time.time()
            bar.set_postfix_str(f"{sampled} responses sampled")

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = {number: signal.signal(number, stop) for number in numbers}
    decoding.ENDED.append(count)
    try:
        with tqdm(initial=state["step"], total=last, disable=not ranks.is_first()) as bar:
            while state["step"] < last:
                state["step"] += 1
                sampled = 0
                yield state["step"]
                bar.update()
                sentence = "not finite in three consecutive updates; lower --lr, look at the last samples"
                demand(state["faults"] < 3, f"step {state['step']}: the gradient is {sentence}.")
                # without `due` there is no checkpoint to wait for
                leave = state["leave"] if "leave" in state else signalled(state)
                if leave:
                    ranks.end()
                    print(f"stopped after step {state['step']}; --resume continues", file=sys.stderr)
                    sys.exit(128 + leave)
    finally:
        bar = None
        decoding.ENDED.remove(count)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def evaluating(responses=0):
    """While in it, a bar of its own counts the responses that have ended, with an estimate of the rest."""
    rank, world_size = ranks.shard()
    total, quiet = len(range(rank, responses, world_size)), not ranks.is_first()
    layout = None if total else "{desc}"
    with tqdm(desc="evaluating", total=total, bar_format=layout, leave=False, disable=quiet) as counter:
        decoding.ENDED.append(counter.update)
        try:
            yield
        finally:
            decoding.ENDED.remove(counter.update)


def learning_rate(step, args):
    """Linear warm-up times --schedule: a function of the step alone, so a resumed run repeats it."""
    progress = (step - 1) / args.steps
    decay = {"constant": 1, "linear": 1 - progress, "cosine": (1 + cos(pi * progress)) / 2}
    return args.lr * min(1, step / max(1, args.warmup_steps)) * decay[args.schedule]


def finite(norm, state):
    """Whether a gradient of this norm can be used. With NaN or inf the update is skipped and counted."""
    usable = isfinite(norm)
    state["faults"] = 0 if usable else state["faults"] + 1  # consecutive ones
    state["skipped"] += not usable  # all of them
    return usable


def signalled(state):
    """The signal that ends the run, the same on all ranks; 0: none. A later one ends the next step."""
    return int(ranks.reduce(torch.tensor(state["stop"]), "MAX"))


def due(state, every):
    """Whether this step ends with a checkpoint: every so many do, and one after which the run stops."""
    state["leave"] = signalled(state)
    return state["leave"] or state["faults"] >= 3 or (every and state["step"] % every == 0)


# ---- logs ------------------------------------------------------------------------------------------------


def append(path, rows):
    """Add rows to a .jsonl file of a run folder; the first rank writes."""
    if ranks.is_first():
        try:
            with open(path, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        except OSError as error:
            raise folders.unwritable(path, error) from None


def read_jsonl(path):
    """The rows of a .jsonl file, none without a file. Half a row, left by a killed run, is removed."""
    text = path.read_bytes() if path.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    if ranks.is_first() and len(whole) < len(text):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.split(b"\n")[:-1]]


def log(out, metrics, samples=()):
    """A step's line in metrics.jsonl, some responses in samples.jsonl, the main numbers on screen."""
    if ranks.is_first():
        metrics = {k: v.item() if torch.is_tensor(v) else v for k, v in metrics.items()}
        samples = [*samples, *metrics.pop("completions", [])]  # of an evaluation
        metrics["peak_memory"] = peak_memory()
        # JSON has no NaN and no infinity
        line = {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in metrics.items()}
        texts = [{k: v for k, v in x.items() if not isinstance(v, list)} for x in samples]  # text, not ids
        for name, rows in zip(folders.LOGS, ([line], texts)):
            append(out / name, [{"step": metrics["step"]} | row for row in rows])
        show(metrics)
        hint(metrics)
        if bar is not None:
            bar.set_postfix_str(speed(metrics), refresh=False)
    ranks.barrier()  # what the first rank has written, others may read


# ---- the end ---------------------------------------------------------------------------------------------


def finish(out, args, script=None):
    """Say what has come out. `script` evaluates the model; by default the one that runs."""
    if ranks.is_first():
        summary(out, args, script)
    ranks.end()
