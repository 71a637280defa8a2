"""Ranks: what torchrun starts, what is divided among them, and what is summed or gathered over them.

Under `torchrun` every process runs the whole script on the same data, in the same order and
with the same random numbers. The work of three things is divided: sampling
(`decoding.batches`), scoring and training (`tok.micro_batches`). Their results are combined
again at once (`reduce`, `gather`). So everything else, that is rewards, advantages,
normalisers and metrics, is computed from the whole batch and is equal on all ranks.

Divided, too, are the weights, and with them gradients and Adam's moments (`sharded`). In one
process nothing is: models are those of transformers, and every function here is the identity.
"""

import atexit
import os
import sys
from datetime import timedelta
from functools import cache, wraps

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import tree_map_only
from transformers.modeling_layers import GradientCheckpointingLayer

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


def world_size():
    """How many processes torchrun has started; 1 without it."""
    return shard()[1]


def start():
    """Join the process group. From here on only the first rank prints to stdout."""
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    # how long the others wait for a rank that is lost
    dist.init_process_group(backend, timeout=timedelta(minutes=30))
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # errors go to stderr, from every rank


def end():
    """The work of all ranks is done: when they exit, each closes the process group.

    Never after a failure of one rank: NCCL would wait there for the others, which wait for it.
    """
    if dist.is_initialized():
        atexit.unregister(dist.destroy_process_group)  # of an earlier run in this process
        atexit.register(dist.destroy_process_group)


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
    if world_size() > 1:
        dist.barrier()


# ---- combining results -----------------------------------------------------------------------------------


def reduce(x, how="SUM"):
    """The sum (or "MAX") of a tensor over the ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x, getattr(dist.ReduceOp, how))
    return x


def gather(items):
    """The lists of all ranks as one list."""
    if world_size() == 1:
        return list(items)
    lists = [None] * world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


# ---- weights that are divided ----------------------------------------------------------------------------


@cache
def mesh():
    """All ranks in one dimension, along which weights are divided."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return init_device_mesh(kind, (world_size(),))


def is_sharded(model):
    """Whether each rank has only a part of every weight."""
    return isinstance(model, FSDPModule)


def sharded(model):
    """Under torchrun each rank keeps its rows of every weight, gradient and moment (FSDP2, ZeRO stage 3).

    The weights of a layer are gathered for as long as it computes. Embedding, last norm and
    head are gathered together for the whole pass, so what is tied stays tied.
    """
    if world_size() == 1:
        return model
    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    for part in [*layers, model]:
        # also of the whole model: what is gathered for longer would hide a direct write to its weights
        fully_shard(part, mesh=mesh(), reshard_after_forward=True)
        part.set_gradient_divide_factor(1.0)  # sums, not means: Z is that of the global batch
        part.set_force_sum_reduction_for_comms(True)  # the only reduction that gloo has
    model.forward = apply
    # cached bf16 copies of weights would outlive the gathered weights
    torch.set_autocast_cache_enabled(False)
    return model


def apply(function, model, *args):
    """What the forward pass of a sharded model is: a function that sees all of its weights."""
    return function(model, *args)


def forward(function):
    """A decorator: `function(model, tokens, ...)` is a forward pass and sees the whole weights of a model.

    Every pass of one rank is a pass of all ranks. A rank without rows takes part with a token
    of which nothing is returned: its loss is 0, and so is its gradient.
    """

    @wraps(function)
    def call(model, tokens, *args):
        if not is_sharded(model):
            return function(model, tokens, *args)
        if len(tokens):
            return model(function, model, tokens, *args)
        args = tree_map_only(torch.Tensor, lambda x: x.new_zeros(1, 1), args)
        outputs = model(function, model, tokens.new_zeros(1, 1), *args)
        return tree_map_only(torch.Tensor, lambda x: x[:0], outputs)

    return call


def clip_gradient(model, max_norm):
    """Scale the gradient down to a norm of at most `max_norm`. Returns the norm before, a number.

    Gradients are sums over micro-batches and ranks, because Z is that of the global batch.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return whole(norm).item()


# ---- a part and the whole --------------------------------------------------------------------------------


def is_divided(x):
    """Whether each rank has some rows of this tensor."""
    return isinstance(x, DTensor)


def whole(x):
    """A divided tensor gathered on all ranks; any other as it is."""
    return x.full_tensor() if is_divided(x) else x


def part(x):
    """This rank's rows of a divided tensor; any other as it is."""
    return x.to_local() if is_divided(x) else x


def rows(count):
    """(first, last + 1): which rows of a divided tensor this rank has, of `count`."""
    rank, world_size = shard()
    size = -(-count // world_size)  # as torch.chunk: the last ranks may have fewer, or none
    return min(rank * size, count), min((rank + 1) * size, count)


def divided(x, shape):
    """A tensor of this shape of which this rank has the rows `x`; in one process `x` itself."""
    if world_size() == 1:
        return x
    stride = torch.empty(shape, device="meta").stride()
    shape = torch.Size(shape)
    return DTensor.from_local(x, mesh(), [Shard(0)], run_check=False, shape=shape, stride=stride)
