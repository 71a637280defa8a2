"""The state of a checkpoint: JSON and .safetensors, written by any number of ranks, read by any number."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import common.tokenization as tok
from common.plumbing import folders, ranks, storage


def state_of(seed, rows):
    """What a script saves: numbers, lists and text of any depth, moments, weights of a second network."""
    torch.manual_seed(seed)
    shapes = [(count, width) for count, width in zip(rows, (3, 1, 8))] + [(rows[0],)]
    moments = {}
    for i, shape in enumerate(shapes):
        moments[i] = {
            "step": torch.tensor(7.0),
            "exp_avg": torch.randn(shape),
            "exp_avg_sq": torch.rand(shape),
        }
    group = {
        "lr": 0.1 + 0.2,
        "betas": [0.9, 0.99],
        "maximize": False,
        "foreach": None,
        "params": [0, 1, 2, 3],
    }
    return {
        "step": 12,
        "args": {"lr": 1e-323, "model": "a/ü", "eval_data": None},
        "initial": [[[1, 2], [3]], [[-0.1, 1e30]]],
        "critic": {
            "layers.0.weight": torch.randn(rows[1], 2).double(),
            "layers.0.bias": torch.randn(rows[1]),
        },
        "optimizer": {"state": moments, "param_groups": [group]},
    }


def equal(a, b):
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return a == b and type(a) is type(b)


def as_rank(patch, rank, count):
    """What `weights` sees on one of several ranks; a divided tensor is a tensor with a mark."""
    patch.setattr(ranks, "shard", lambda: (rank, count))
    patch.setattr(ranks, "is_divided", lambda x: count > 1 and x.dim() > 0)
    patch.setattr(ranks, "whole", lambda x: x)
    patch.setattr(ranks, "part", lambda x: x[slice(*ranks.rows(len(x)))] if ranks.is_divided(x) else x)
    patch.setattr(ranks, "divided", lambda x, shape: x)


def write(folder, state, count):
    for rank in range(count):
        with pytest.MonkeyPatch.context() as patch:
            as_rank(patch, rank, count)
            storage.write_state(folder, state)


def read(folder, rank, count):
    with pytest.MonkeyPatch.context() as patch:
        as_rank(patch, rank, count)
        return storage.read_state(folder)


def joined(states):
    """One state from those of several ranks."""
    first = states[0]
    if torch.is_tensor(first):
        return torch.cat(states) if first.dim() else first
    if isinstance(first, dict):
        return {key: joined([state[key] for state in states]) for key in first}
    return first


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.tuples(*[st.integers(1, 9)] * 3),
    writers=st.integers(1, 5),
    readers=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_any_number_of_ranks_reads_what_any_number_wrote(rows, writers, readers, seed, tmp_path_factory):
    """To the bit, also where a rank has no row of a tensor."""
    folder = tmp_path_factory.mktemp("state")
    state = state_of(seed, rows)
    write(folder, state, writers)
    assert len(list(folder.glob("state*.safetensors"))) == writers
    assert equal(joined([read(folder, rank, readers) for rank in range(readers)]), state)
    shutil.rmtree(folder)


@pytest.mark.parametrize("count", range(1, 8))
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 479])
def test_rows_are_divided_as_torch_divides_them(rows, count, monkeypatch):
    """FSDP's rule is torch.chunk's."""
    chunks = list(torch.arange(rows).chunk(count)) + [torch.tensor([])] * count
    for rank in range(count):
        monkeypatch.setattr(ranks, "shard", lambda rank=rank: (rank, count))
        assert list(range(*ranks.rows(rows))) == chunks[rank].tolist()


def test_the_files_are_those_of_the_library(tmp_path):
    """Every type, no rows, no dimension; what is read by safetensors is what was written."""
    tensors = {f"x.{i}": torch.arange(i).to(dtype) for i, dtype in enumerate(storage.DTYPES)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "strided": torch.rand(4, 5).T}
    storage.write_tensors(tmp_path / "a.safetensors", tensors)
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys() and all(equal(tensors[key], found[key]) for key in tensors)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    "damage", ["a file is gone", "a file ends early", "no rows", "no json", "half a json"]
)
@pytest.mark.parametrize("count", [1, 2])
def test_a_damaged_state_is_refused(damage, count, tmp_path):
    write(tmp_path, state_of(0, (4, 5, 6)), count)
    last = sorted(tmp_path.glob("state*.safetensors"))[-1]
    index = tmp_path / "state.json"
    if damage == "a file is gone":
        last.unlink()
    elif damage == "a file ends early":
        last.write_bytes(last.read_bytes()[:-3])
    elif damage == "no rows":
        plain = json.loads(index.read_text())
        plain["index"]["optimizer/state/0/exp_avg"][0] += 1
        index.write_text(json.dumps(plain))
    elif damage == "no json":
        index.unlink()
    else:
        index.write_text(index.read_text()[:-9])
    with pytest.raises(SystemExit, match="--resume: .*damaged or missing.*; start without --resume"):
        folders.load_state(tmp_path, None)


def test_a_state_of_an_older_version_is_named(tmp_path):
    torch.save({"step": 1}, tmp_path / "state.pt")
    with pytest.raises(SystemExit, match="from an older version"):
        folders.load_state(tmp_path, None)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    count=st.integers(1, 5),
    most=st.integers(1, 40),
)
def test_every_rank_has_as_many_micro_batches(lengths, count, most):
    """Each row on one rank, once; what is missing are micro-batches without rows, at the end."""
    mask = torch.tensor([[1] * n + [0] * (12 - n) for n in lengths])
    dealt = [tok.micro_batches(mask, most, (rank, count)) for rank in range(count)]
    assert len({len(batches) for batches in dealt}) == 1
    rows = [row for batches in dealt for batch, _ in batches for row in batch]
    assert sorted(rows) == [i for i, n in enumerate(lengths) if n]
    for batches in dealt:
        full = [bool(batch) for batch, _ in batches]
        assert full == sorted(full, reverse=True)
        for micro in batches:
            assert mask[micro].shape == (len(micro[0]), micro[1].stop)
    assert all(batch for batch, _ in dealt[0])  # no pass in which nobody has a row
