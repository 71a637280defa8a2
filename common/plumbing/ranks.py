"""Ranks: what torchrun starts, what is divided among them, and what is summed or gathered over them.

Under `torchrun` every process runs the whole script on the same data, in the same order and
with the same random numbers. Only three things are divided: sampling (`decoding.batches`),
scoring and training (`tok.micro_batches`). Their results are combined again at once
(`reduce`, `gather`). So everything else, that is rewards, advantages, normalisers and
metrics, is computed from the whole batch and is equal on all ranks.
"""

import atexit
import io
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer, zero_redundancy_optimizer

# ---- rank and world size ---------------------------------------------------------------------------------

# torchrun sets all of them; one alone may be left over, or be another program's
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def shard():
    """(rank, world size) of this process; (0, 1) without torchrun. The first call joins the others."""
    if all(name in os.environ for name in TORCHRUN) and not dist.is_initialized():
        start()
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def start():
    """Join the process group. From here on only the first rank prints to stdout."""
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    # how long the others wait for a rank that is lost
    dist.init_process_group(backend, timeout=timedelta(minutes=30))
    atexit.register(dist.destroy_process_group)
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # errors go to stderr, from every rank


def is_first():
    """Whether this is the rank that prints and writes files."""
    return shard()[0] == 0


def generator(device):
    """A generator for this rank's samples alone; the global generator stays the same on all ranks."""
    rank, _ = shard()
    seed = torch.randint(2**60, ()).item()
    return torch.Generator(device).manual_seed(seed + rank)


def barrier():
    """Wait for all ranks."""
    if shard()[1] > 1:
        dist.barrier()


# ---- combining results -----------------------------------------------------------------------------------


def reduce(x, how="SUM"):
    """The sum (or "MAX") of a tensor over the ranks, in place."""
    if shard()[1] > 1:
        dist.all_reduce(x, getattr(dist.ReduceOp, how))
    return x


def gather(items):
    """The lists of all ranks as one list."""
    _, world_size = shard()
    if world_size == 1:
        return list(items)
    lists = [None] * world_size
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def reduce_gradients(parameters):
    """The parameters, each with the sum of its gradient over the ranks. Some ranks may have had no row.

    Where no rank has a gradient there is still none: an optimizer would take a zero for one.
    """
    parameters = list(parameters)
    if shard()[1] == 1:
        return parameters
    has_gradient = torch.tensor([float(p.grad is not None) for p in parameters])
    count = reduce(has_gradient).tolist()  # of ranks, for each parameter
    for p, ranks_with_gradient in zip(parameters, count):
        if ranks_with_gradient:
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad = reduce(gradient)
    return parameters


def adamw(parameters, **settings):
    """torch's AdamW. Under torchrun each rank keeps the moments of its part of the parameters (ZeRO 1)."""
    if shard()[1] > 1:
        return ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, **settings)
    return torch.optim.AdamW(parameters, **settings)


def broadcast_object(item, src_rank, group, device):
    """Send an object from one rank to all: ZeRO's state, for a checkpoint.

    torch's own function turns bytes into a tensor one by one, which takes minutes for a
    gigabyte of moments.
    """
    is_source = dist.get_rank() == src_rank
    length = 0
    if is_source:
        buffer = io.BytesIO()
        torch.save(item, buffer)
        data = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8).to(device)
        length = len(data)
    size = torch.tensor([length], device=device)
    dist.broadcast(size, src_rank, group)
    if not is_source:
        data = torch.empty(int(size), dtype=torch.uint8, device=device)
    for part in data.split(2**30):
        dist.broadcast(part, src_rank, group)
    if is_source:
        return item
    return torch.load(io.BytesIO(data.cpu().numpy()), weights_only=True, map_location="cpu")


zero_redundancy_optimizer._broadcast_object = broadcast_object
