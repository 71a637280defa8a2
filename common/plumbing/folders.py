"""Run folders on disk: what is in one, whether it can be continued, and what may be moved aside."""

import fcntl
import json
import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

from common.plumbing import storage
from common.plumbing.flags import BadInput, demand, one_line

LOGS = ("metrics.jsonl", "samples.jsonl")

# ---- one owner -------------------------------------------------------------------------------------------

OWNED = {}  # (process, file system, inode) -> the open file that holds the lock, as long as the process lives


def claim(out, create=False):
    """Whether this process is the only one that writes to a run folder; without a lock file it is free.

    The lock is one of the process: it ends with it, however it ends, and no child inherits it.
    Nothing else may open the file, because closing it would end the lock.
    """
    path = out / ".lock"
    if not create and not path.exists():
        return True  # a run that is refused later has changed nothing
    if path.exists() and identity(path) in OWNED:
        return True
    file = open(path, "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        print(f"--output-dir {out}: its file system has no locks; see that no other process uses this folder")
    OWNED[identity(file.fileno())] = file
    return path.exists() and identity(path) in OWNED  # no longer if it has just been moved aside


def identity(file):
    """What a lock belongs to: a file, by whatever name, and a process."""
    stat = os.stat(file)
    return os.getpid(), stat.st_dev, stat.st_ino


def taken(out):
    """The refusal of a folder that another process writes to."""
    remedy = "wait until it has ended, stop it, or choose another folder"
    return BadInput(f"--output-dir {out}: another process is writing to this folder; {remedy}.")


# ---- a new run -------------------------------------------------------------------------------------------


def open_folder(out, state, args, model_bytes):
    """Make the folder ready for the step after `state`."""
    if not claim(out, create=args.resume):  # it may have been made while the model was read
        raise taken(out)
    if args.resume:
        for name, size in state["written"].items():
            complete = (out / name).stat().st_size >= size
            demand(complete, f"--resume: {out / name} has lost lines; start without --resume.")
            os.truncate(out / name, size)  # what came after the checkpoint will be written again
        return
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free / 2**30
    need, what = model_bytes / 2**30, "final/ takes"  # all that --steps 0 writes
    has_critic = hasattr(args, "reward_model")  # then stages 1 and 2 write, too
    if args.steps or has_critic:
        # weights and two moments, in the old and the new checkpoint; with a critic twice as much
        need, what = (12 if has_critic else 6) * need, "two checkpoints take"
    space = f"{free:.1f} GiB free, {what} {need:.1f} GiB"
    demand(need <= free, f"--output-dir {out}: {space}; free some space or choose another folder.")
    if need > 2 and args.steps:
        print(f"{out}: a checkpoint takes {need / 2:.1f} GiB, for a moment there are two")
    if (out / "metrics.jsonl").exists() or checkpoints(out):
        move_aside(out, args)
    out.mkdir(parents=True, exist_ok=True)
    if not claim(out, create=True):
        raise taken(out)
    half = out / "args.json.half"
    half.write_text(json.dumps(vars(args) | environment(), indent=1))
    half.rename(out / "args.json")  # under this name it is complete


def demand_shared(out):
    """Every rank writes its part of a checkpoint here, so all machines must see the folder."""
    sentence = "not the same folder on all machines; put it on a file system that all of them see"
    demand((out / "args.json").exists(), f"--output-dir {out}: {sentence}.")


def move_aside(out, args):
    """Rename an earlier run, unless a flag names something in it."""
    for name in "model base reward_model pairs preferences data eval_data".split():
        source = getattr(args, name, None)
        inside = source and out.resolve() in Path(source).resolve().parents
        flag = f"--{name.replace('_', '-')} {source}"
        sentence = f"{flag} is in this folder, which would be moved aside; choose another one."
        demand(not inside, f"--output-dir {out}: {sentence}")
    i = 1
    while Path(f"{out}.{i}").exists():
        i += 1
    out.rename(f"{out}.{i}")


def environment():
    """What args.json records beside the arguments: package versions and the commit of a git checkout."""
    packages = ("torch", "transformers", "datasets", "sympy")
    commit = ""
    if shutil.which("git"):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {"versions": {name: version(name) for name in packages}, "commit": commit}


# ---- a run that is continued -----------------------------------------------------------------------------


def checkpoints(folder):
    """The complete checkpoints of a run, oldest first."""
    numbered = "checkpoint-" + "[0-9]" * 6
    found = [*Path(folder).glob(numbered + ".old"), *Path(folder).glob(numbered)]
    return sorted(found, key=lambda path: (path.stem, not path.suffix))


def load_state(folder, args):
    """What a checkpoint has beside the model. The arguments must be those of the first run."""
    is_current = not (folder / "state.pt").exists()
    demand(is_current, f"--resume: {folder} is from an older version; start without --resume.")
    try:
        state = storage.read_state(folder)
    except Exception as error:
        damaged = f"state.json or a state*.safetensors in {folder} is damaged or missing"
        raise BadInput(f"--resume: {damaged} ({one_line(error)}); start without --resume.") from None
    same_arguments(state["args"], args)
    return state


def same_arguments(first, args):
    """Demand the arguments of the first run, but for the folder, which may have been moved."""
    # unparseable_gold is not given but counted
    may_differ = ("resume", "output_dir", "stop_after", "unparseable_gold")
    names = [name for name in vars(args) if name in first and name not in may_differ]
    changed = [name for name in names if first[name] != getattr(args, name)]
    sentence = "the rows of --data or --eval-data have changed since the first run; start without --resume."
    demand(changed != ["fingerprint"], f"--resume: {sentence}")
    names = ", ".join(name for name in changed if name != "fingerprint")
    demand(not changed, f"--resume: {names} differ from the first run; give the same arguments.")


def unwritable(path, error):
    """No space left or no permission: say what can still be used."""
    whole = checkpoints(path.parent)
    last = whole[-1] if whole else "none"
    remedy = f"free some space and continue with --resume; last complete checkpoint: {last}"
    return BadInput(f"--output-dir: {path} cannot be written ({one_line(error)}); {remedy}.")
