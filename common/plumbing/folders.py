"""Run folders on disk: what is in one, whether it can be continued, and what may be moved aside."""

import json
import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open

from common.plumbing import ranks
from common.plumbing.flags import BadInput, demand, first_line

LOGS = ("metrics.jsonl", "samples.jsonl")
DTYPES = {  # torch's name -> that of .safetensors
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}

# ---- a new run -------------------------------------------------------------------------------------------


def open_folder(out, state, args, model_bytes):
    """Make the folder ready for the step after `state`."""
    if args.resume:
        for name, size in state["written"].items():
            complete = (out / name).stat().st_size >= size
            demand(complete, f"--resume: {out / name} has lost lines; start without --resume.")
            os.truncate(out / name, size)  # what came after the checkpoint will be written again
        return
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free / 2**30
    # weights and two moments, in the old and the new checkpoint; with a critic twice as much
    need = (12 if hasattr(args, "reward_model") else 6) * model_bytes / 2**30
    space = f"{free:.1f} GiB free, two checkpoints take {need:.1f} GiB"
    demand(need <= free, f"--output-dir {out}: {space}; free some space or choose another folder.")
    if (out / "metrics.jsonl").exists() or checkpoints(out):
        move_aside(out, args)
    out.mkdir(parents=True, exist_ok=True)
    half = out / "args.json.half"
    half.write_text(json.dumps(vars(args) | environment(), indent=1))
    half.rename(out / "args.json")  # under this name it is complete


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
        state = read_state(folder)
    except Exception as error:
        damaged = f"state.json or a state*.safetensors in {folder} is damaged or missing"
        raise BadInput(f"--resume: {damaged} ({first_line(error)}); start without --resume.") from None
    same_arguments(state["args"], args)
    return state


def same_arguments(first, args):
    """Demand the arguments of the first run, but for the folder, which may have been moved."""
    # unparseable_gold is not given but counted
    may_differ = ("resume", "output_dir", "stop_after", "unparseable_gold")
    names = [name for name in vars(args) if name in first and name not in may_differ]
    changed = ", ".join(name for name in names if first[name] != getattr(args, name))
    demand(not changed, f"--resume: {changed} differ from the first run; give the same arguments.")


def unwritable(path, error):
    """No space left or no permission: say what can still be used."""
    whole = checkpoints(path.parent)
    last = whole[-1] if whole else "none"
    remedy = f"free some space and continue with --resume; last complete checkpoint: {last}"
    return BadInput(f"--output-dir: {path} cannot be written ({first_line(error)}); {remedy}.")


# ---- models and states in files --------------------------------------------------------------------------
#
# A checkpoint is a model folder with a state. What JSON can hold of the state is in state.json, with an index
# of its tensors, which are weights and moments. These are in state.safetensors, or in a file for each rank
# with that rank's rows. Any number of ranks can read them, each its own rows. No file is a pickle, and no
# rank holds more than it trains.


def write_model(folder, model, tokenizer):
    """An ordinary model folder. Weights that are divided are gathered and written one after the other."""
    if not ranks.is_sharded(model):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return
    if ranks.is_first():
        model.save_pretrained(folder, state_dict={})  # configurations, and a file that is written below
        tokenizer.save_pretrained(folder)
    weights = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        if not any(weight is other for other in weights.values()):  # tied weights are written once
            weights[name] = weight
    shapes = {name: torch.empty(x.shape, dtype=x.dtype, device="meta") for name, x in weights.items()}
    files = split_torch_state_dict_into_shards(shapes, max_shard_size="50GB")  # as transformers does
    for name, inside in files.filename_to_tensors.items():
        path = folder / name if ranks.is_first() else None
        write_tensors(path, {key: weights[key] for key in inside})
    if files.is_sharded and ranks.is_first():
        index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_tensors(path, tensors):
    """A .safetensors file, tensor after tensor, so that of divided ones only one at a time is whole.

    A rank without path takes part in gathering them.
    """
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, x in tensors.items():
        start, end = end, end + x.numel() * x.element_size()
        header[name] = {"dtype": DTYPES[x.dtype], "shape": [*x.shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns tensors to 8 bytes
    with open(path or os.devnull, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            x = ranks.whole(x.detach())
            if path:
                x.cpu().contiguous().flatten().view(torch.uint8).numpy().tofile(file)


def write_state(folder, state):
    """Every rank writes the rows that it has, the first one also what is not divided."""
    rank, world_size = ranks.shard()
    plain, tensors = without_tensors(state)
    files = ["state.safetensors"]
    if world_size > 1:
        files = [f"state-{i + 1:05}-of-{world_size:05}.safetensors" for i in range(world_size)]
    mine = {name: ranks.part(x) for name, x in tensors.items() if rank == 0 or ranks.is_divided(x)}
    write_tensors(folder / files[rank], mine)
    if rank == 0:
        index = {name: [*x.shape] for name, x in tensors.items()}
        (folder / "state.json").write_text(json.dumps(plain | {"files": files, "index": index}))


def read_state(folder):
    """The state of a checkpoint. Under torchrun its tensors are divided anew, and a rank reads its rows."""
    state = json.loads((folder / "state.json").read_text())
    places = {}  # name -> the files that have rows of it, in order
    for name in state.pop("files"):
        file = safe_open(folder / name, "pt")
        for key in file.keys():  # noqa: SIM118
            places.setdefault(key, []).append(file)
    for path, shape in state.pop("index").items():
        *outer, last = (int(key) if key.isdigit() else key for key in path.split("/"))
        node = state
        for key in outer:
            node = node.setdefault(key, {})
        node[last] = read_tensor(places[path], path, shape)
    return state


def read_tensor(files, name, shape):
    """A tensor whose rows are in several files; under torchrun this rank's rows of it."""
    if not shape:
        return files[0].get_tensor(name)
    first, last = ranks.rows(shape[0])
    parts, start = [], 0  # the row at which a file begins
    for file in files:
        rows = file.get_slice(name)
        count = rows.get_shape()[0]
        if max(first, start) < min(last, start + count):
            parts.append(rows[max(first - start, 0) : min(last - start, count)])
        start += count
    if start != shape[0]:
        raise ValueError(f"{name} has {start} rows")
    x = torch.cat(parts) if parts else file.get_tensor(name)[:0]  # no row for the last ranks
    return ranks.divided(x, shape)


def without_tensors(tree, path=""):
    """Of a nested dict: what JSON can hold, and its tensors by path, such as optimizer/state/0/exp_avg."""
    plain, tensors = {}, {}
    for key, value in tree.items():
        if torch.is_tensor(value):
            tensors[f"{path}{key}"] = value
        elif isinstance(value, dict):
            inside, below = without_tensors(value, f"{path}{key}/")
            tensors |= below
            if inside or not below:  # dicts of tensors come back with their tensors
                plain[key] = inside
        else:
            plain[key] = value
    return plain, tensors
