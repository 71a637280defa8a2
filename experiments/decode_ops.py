"""Operations of a decode step, counted on a CPU, and where a GPU spent the time of a step.

    python experiments/decode_ops.py            # about three minutes, most of it for torch.compile
    python experiments/decode_ops.py --write    # keep what was counted, write the tables of docs/gpu.md

An operation of aten that is no view stands for a kernel. The model has the 24 layers of Qwen2.5-0.5B and its
groups of heads, but narrow layers, because widths change no number of operations. Counted are

    as it is      the step that a GPU records, bf16
    one cast      linear layers that read the same tensor share its cast to bf16: q, k and v; gate and up.
                  The bits stay those of autocast.
    compiled      `gpu.compiled`: the model's pass through torch.compile, attention outside of it.
                  The bits are others: what is fused rounds less often.

A compiled step is counted for two and for three layers, and each further layer counts like the third. On a
CPU torch.compile makes C++ of what would be Triton on a GPU; it fuses by the same rules, up to details.
"""

import argparse
import json
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import grpo  # noqa: E402
from common.plumbing import cuda_graph, models  # noqa: E402
from experiments import gpu  # noqa: E402
from experiments.tables import insert  # noqa: E402

RECORD = ROOT / "experiments/results/decode_ops.json"
MEASURED = ROOT / "experiments/results/decoding.json"
LAYERS = 24
# width of the model and of its MLP, words, query and key-value heads, width of a head, tied
NARROW = (56, 304, 1000, 14, 2, 4, True)
# a view whose schema does not say so, and memory that nothing has been written into
NO_KERNEL = {"aten._unsafe_view.default", "aten.empty_like.default"}

# ---- counting --------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts what computes: every operation that is no view."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = any(x.alias_info and not x.alias_info.is_write for x in func._schema.returns)
        if not is_view and str(func) not in NO_KERNEL:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def compiled_kernels(events, names):
    """From a profile: kernels that torch.compile made, and operations that it calls as they are.

    What an operation calls inside counts with it, as in `Operations`.
    """
    counts = Counter()
    for event in events:
        parent = event.cpu_parent
        while parent and parent.name not in names:
            parent = parent.cpu_parent
        if "cpp_fused" in event.name:
            counts["made by torch.compile"] += 1
        elif event.name in names and not parent:
            counts[event.name] += 1
    return counts


def third_step(model, watched):
    """Decode with a GPU's constants; `watched(step)` stands for the third replay."""
    calls = []

    def run(replay):
        calls.append(replay)
        if len(calls) == 3:
            watched(replay.step)
        else:
            replay.step()

    with gpu.as_on_a_gpu(), patch.object(cuda_graph.Replay, "__call__", run):
        return gpu.draw_with(grpo.sample, model, "bf16", 1.0, 6, rows=8)


def counted(how, layers=LAYERS):
    """Operations of a step by name, and the tokens that were drawn."""
    model = gpu.random_model((layers, *NARROW), "cpu")
    found = {}

    def watched(step):
        with Operations() as operations:
            step()
        found.update(operations.counts)

    with one_cast() if how == "one cast" else nullcontext():
        tokens = third_step(model, watched)
    return found, tokens


def counted_compiled(layers):
    """As `counted`: the draw with it, which is not compiled."""
    plain, _ = counted("as it is", layers)
    names = {"aten::" + name.split(".")[1] for name in plain}
    model, found = gpu.random_model((layers, *NARROW), "cpu"), []

    def watched(step):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
        found.append(compiled_kernels(profiler.events(), names))

    with gpu.compiled(), torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):
        third_step(model, watched)
    return sum(found[0].values())


# ---- a variant -------------------------------------------------------------------------------------------


@contextmanager
def one_cast():
    """Linear layers of the copy that samples remember the last tensor that was cast, and its cast."""
    last = {}

    def cast(layer, inputs):
        x = inputs[0]
        if last.get("tensor") is not x:
            last["tensor"], last["cast"] = x, x.to(layer.weight.dtype)
        return (last["cast"],)

    sampler = models.sampler

    def hooked(model):
        copy = sampler(model)
        if copy is not model and not last:
            last["tensor"] = None
            for layer in copy.modules():
                if isinstance(layer, torch.nn.Linear):
                    layer.register_forward_pre_hook(cast)
        return copy

    with patch.object(models, "sampler", hooked):
        yield


# ---- the page --------------------------------------------------------------------------------------------


def count():
    plain, tokens = counted("as it is")
    shared, same = counted("one cast")
    two, three = counted_compiled(2), counted_compiled(3)
    return {
        "as it is": sum(plain.values()),
        "one cast": sum(shared.values()),
        "one cast: the same tokens and log-probabilities": tokens == same,
        "compiled": two + (LAYERS - 2) * (three - two),
        "by name": plain,
        "torch": torch.__version__,
    }


def operations_table(record):
    lines = [
        ("as it is", record["as it is"]),
        ("one cast for q, k and v, one for gate and up; bits unchanged", record["one cast"]),
        ("torch.compile around attention; other bits", record["compiled"]),
    ]
    text = ["| operations of a decode step, 24 layers, counted on a CPU | |", "|---|---|"]
    return text + [f"| {name} | {n:,} |" for name, n in lines]


def part_of(kernel, launches):
    """The part of a step that a kernel belongs to."""
    if kernel.startswith("nvjet"):
        return "matrix products"
    if "sdpa" in kernel:
        return "attention"
    if launches <= 2:
        return "logits and draw"
    return "rest"


def time_table(records):
    """ms of the kernels of one step; what is not among the longest 25 belongs to the rest."""
    columns, sizes = {}, ("0.5B", "1.5B")
    for size in sizes:
        profiled, times = records[f"profile {size}"], Counter()
        for kernel, (ms, launches) in profiled["longest"].items():
            times[part_of(kernel, launches)] += ms
        whole = profiled["ms of kernels a step"]
        times["rest"] = whole - sum(ms for part, ms in times.items() if part != "rest")
        columns[size] = times | {"all kernels": whole}
        columns[size]["memory traffic alone"] = records[f"speed {size} recorded"]["floor, ms"]
    rows = {
        "matrix products": "matrix products, head included",
        "attention": "attention",
        "logits and draw": "fp32 logits, softmax, noise, argmax: seven kernels",
        "rest": "norms, rotary embedding, casts, SwiGLU, cache: all others",
        "all kernels": "all kernels",
        "memory traffic alone": "the least: memory traffic alone",
    }
    text = ["| ms of a recorded step, 512 rows, H100 | 0.5B | 1.5B |", "|---|---|---|"]
    for part, name in rows.items():
        text.append(f"| {name} | " + " | ".join(f"{columns[size][part]:.2f}" for size in sizes) + " |")
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--write", action="store_true", help="keep the counts, write the tables of docs/gpu.md"
    )
    args = parser.parse_args()
    record = count()
    tables = {
        "decode operations": operations_table(record),
        "decode time": time_table(json.loads(MEASURED.read_text())),
    }
    for mark, lines in tables.items():
        print("\n".join(lines) + "\n")
        if args.write:
            insert(mark, lines)
    if args.write:
        RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
