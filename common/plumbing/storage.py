"""Weights and states in files: written without pickles, and without gathering a model on one rank.

A checkpoint is a model folder with a state. What JSON can hold of the state is in state.json,
with an index of its tensors, which are moments and weights. These are in state.safetensors, or
in a file for each rank with that rank's rows. Any number of ranks can read them, each its own
rows.
"""

import json
import os

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open

from common.plumbing import ranks

DTYPES = {  # torch's name -> that of .safetensors
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
LARGEST_FILE = "50GB"  # as in save_pretrained

# ---- models ----------------------------------------------------------------------------------------------


def write_model(folder, model, tokenizer):
    """An ordinary model folder. Weights that are divided are gathered and written one after the other."""
    if not ranks.is_sharded(model):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return
    if ranks.is_first():
        model.save_pretrained(folder, state_dict={})  # configurations only
        tokenizer.save_pretrained(folder)
    weights = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        if not any(weight is other for other in weights.values()):  # tied weights are written once
            weights[name] = weight
    shapes = {name: torch.empty(x.shape, dtype=x.dtype, device="meta") for name, x in weights.items()}
    files = split_torch_state_dict_into_shards(shapes, max_shard_size=LARGEST_FILE)
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


# ---- states ----------------------------------------------------------------------------------------------


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
        # AdamW's state has parameter numbers as keys
        *outer, last = [int(key) if key.isdigit() else key for key in path.split("/")]
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
        raise ValueError(f"{name} has {start} rows, not {shape[0]}")
    x = torch.cat(parts) if parts else files[0].get_tensor(name)[:0]  # no row for the last ranks
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
