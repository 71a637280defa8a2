"""What common/logprob.py costs: time, memory and error of the log-probabilities, forward and backward.

    python experiments/kernel_bench.py                   the table of docs/kernel.md, one CPU thread (or GPU)
    python experiments/kernel_bench.py --peers           and Liger, TRL, cut-cross-entropy where installed
    python experiments/kernel_bench.py --cases small     a few minutes instead of half an hour

On a CPU, time is CPU-seconds of one thread; all contenders take turns in one process, there and back, so
that a busy machine slows all of them alike. A ratio of times is the median over the turns of the ratio
within a turn. Memory is the high-water mark of a process of its own, over its inputs and gradients. On a
GPU, time is between synchronisations and memory is the allocator's peak. "4 GEMMs" are the bare products
that the method needs: logits, logits again, dh, dW; TF/s counts them for everyone. Errors are against
float64, divided by the largest value.

A CPU without bf16 instructions emulates products of bf16 matrices, up to 60 times slower than fp32 ones.
There, "naive in fp32" (cast, then naive) is the second bf16 baseline, and what is emulated gets fewer turns:
the naive form and Liger's scaled CE one, and none at N = 4096. The memory of the emulated naive form is
measured at D = 16, where its [N, V] tensors are the same.
"""

import argparse
import ctypes
import gc
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common.logprob import token_logprobs  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# case: (N, D, V), dtypes, turns, memory?, peers and entropy?
CASES = {
    "small": ((512, 896, 16384), ("fp32", "bf16"), 3, True, True),
    "tiny": ((2000, 128, 479), ("fp32",), 60, False, False),  # the embedded default of this project
    "peers": ((1024, 896, 32768), ("fp32", "bf16"), 3, False, True),
    "head": ((1024, 896, 151936), ("fp32", "bf16"), 3, True, False),
    "long": ((4096, 896, 151936), ("fp32", "bf16"), 2, True, False),
    "gpu-small": ((4096, 896, 151936), ("bf16", "fp32"), 10, True, True),
    "gpu-large": ((8192, 1536, 151936), ("bf16",), 10, True, True),
    "gpu-wide": ((8192, 4096, 151936), ("bf16",), 5, True, True),
}


def naive(h, w, t):
    logp = torch.nn.functional.linear(h, w).float().log_softmax(-1)  # [N, V]
    return logp.gather(-1, t[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def naive_fp32(h, w, t):
    return naive(h.float(), w.float(), t)


def gemms(h, w, t):
    """The four products over chunks of the vocabulary, with nothing between them; no gradients."""
    h, w = h.detach(), w.detach()
    with torch.no_grad():
        for c in w.split(4096):
            z = h @ c.T
            z = h @ c.T
            z @ c, z.T @ h


def peers():
    """The peers that are installed, by name; the others are named on stderr and left out."""
    found = {}
    try:
        from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction as liger

        found["Liger chunked log-prob"] = lambda h, w, t: (liger.apply(h, w, t, None, 1.0, 4096), None)
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
            LigerFusedLinearScaledCrossEntropyFunction as scaled,
        )

        def liger_scaled(h, w, t):
            nll, entropy = scaled.apply(h, w, t, 1.0, -100, 1, True)[:2]
            return -nll, entropy

        found["Liger scaled CE"] = liger_scaled
        if torch.cuda.is_available():
            from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction as flce

            found["Liger FLCE (sum)"] = lambda h, w, t: (
                -flce.apply(h, w, t, None, None, -100, 0.0, 0.0, "sum")[0],
                None,
            )
    except ImportError as e:
        print(f"liger-kernel left out: {e}", file=sys.stderr)
    try:
        from trl.kernels import ChunkedLogProbFunction as trl

        found["TRL chunked log-prob"] = lambda h, w, t: (
            trl.apply(h, w, None, t, 1.0, 32768, None, 1.0, ())[0],
            None,
        )
    except ImportError as e:
        print(f"trl left out: {e}", file=sys.stderr)
    try:
        from cut_cross_entropy import linear_cross_entropy as cce

        if torch.cuda.is_available():  # its CPU path is a compiled naive form
            found["CCE"] = lambda h, w, t: (-cce(h, w, t, reduction="none"), None)
            found["CCE exact"] = lambda h, w, t: (-cce(h, w, t, reduction="none", impl="cce_exact"), None)
    except ImportError as e:
        print(f"cut-cross-entropy left out: {e}", file=sys.stderr)
    for name in list(found):  # some load what they need when they are called
        try:
            kind = "cuda" if torch.cuda.is_available() else "cpu"
            found[name](*inputs((8, 64, 512), "bf16", kind))
        except (ImportError, NotImplementedError) as e:
            print(f"{name} left out: {e}", file=sys.stderr)
            del found[name]
    return found


def slow(dtype):
    """Whether this machine only emulates products of this dtype."""
    native = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == "bf16" and not native


def contenders(dtype, with_peers):
    found = {"naive": naive, "ours": token_logprobs}
    found |= {"naive in fp32": naive_fp32} if slow(dtype) else {"4 GEMMs": gemms}
    if with_peers:
        found |= peers()
    return found


def inputs(shape, dtype, device, seed=0):
    n, d, v = shape
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(n, d, generator=g).to(device, DTYPES[dtype]).requires_grad_()
    w = (torch.randn(v, d, generator=g) * 2 / d**0.5).to(device, DTYPES[dtype]).requires_grad_()
    return h, w, torch.randint(0, v, (n,), generator=g).to(device)


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(": ")[1] for x in lines if x.startswith("model name")), "CPU")


def clock(device):
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def once(fn, args, device, entropy=False):
    """(seconds forward, seconds in all)."""
    h, w, _ = args
    h.grad = w.grad = None
    gc.collect()
    start = clock(device)
    out = fn(*args)
    middle = clock(device)
    if out is not None:  # the bare GEMMs have nothing to differentiate
        logp, ent = out
        (logp.sum() + (0.1 * ent.sum() if entropy else 0.0)).backward()
    return middle - start, clock(device) - start


def high_water(field):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def memory(fn, shape, dtype, device):
    """Bytes at the peak over inputs and gradients."""
    once(fn, inputs((8, shape[1], 4096), dtype, device), device)  # libraries take their workspaces first
    args = inputs(shape, dtype, device)
    gc.collect()
    if device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)  # what is free must not hide what is taken next
    grads = sum(x.numel() * x.element_size() for x in args[:2])
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(fn, args, device)
        return torch.cuda.max_memory_allocated() - before - grads
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from here
    before = high_water("VmRSS")
    once(fn, args, device)
    return high_water("VmHWM") - before - grads


def errors(fn, dtype, device):
    """Largest error of (logp, entropy, dh, dW) against float64, over the largest value."""
    args = inputs((192, 896, 16384), dtype, device, seed=1)
    exact = tuple(x.detach().double().requires_grad_() for x in args[:2]) + args[2:]
    out, ref = fn(*args), naive_fp64(*exact)
    if out[0].dim() == 0:  # a summed loss has no rows to compare
        return None
    out[0].sum().backward()
    ref[0].sum().backward()
    pairs = [(out[0], ref[0]), (out[1], ref[1]), (args[0].grad, exact[0].grad), (args[1].grad, exact[1].grad)]
    return [None if a is None else ((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]


def naive_fp64(h, w, t):
    logp = (h @ w.T).log_softmax(-1)
    return logp.gather(-1, t[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def run_case(name, dtypes, with_peers, device, out):
    shape, own, turns, with_memory, extra = CASES[name]
    for dtype in [x for x in own if x in dtypes]:
        fns = contenders(dtype, with_peers and extra)
        keys = [(k, e) for e in (False, True)[: 1 + extra] for k in fns if not e or k in ("naive", "ours")]
        times, args = {}, inputs(shape, dtype, device)
        for fn in fns.values():
            once(fn, inputs((64, shape[1], 512), dtype, device), device)
            if device == "cuda":
                once(fn, args, device)  # compilation and choice of algorithms
        for turn in range(turns):
            for key in keys[:: -1 if turn % 2 else 1]:
                emulated = slow(dtype) and key[0] in ("naive", "Liger scaled CE")
                if emulated and (turn or key[1] or name == "long"):  # minutes each, half an hour in "long"
                    continue
                times.setdefault(key, []).append(once(fns[key[0]], args, device, key[1]))
        for key in keys:
            row = {"case": name, "shape": shape, "dtype": dtype, "name": key[0], "entropy": key[1]}
            if key in times:
                row["forward"], row["seconds"] = (statistics.median(x) for x in zip(*times[key], strict=True))
                row["turns"] = [round(x[1], 5) for x in times[key]]
            if with_memory and not key[1] and key[0] != "4 GEMMs":
                if device == "cuda":
                    row["extra_bytes"] = memory(fns[key[0]], shape, dtype, device)
                else:
                    command = [sys.executable, __file__, "--one", name, dtype, key[0], str(int(with_peers))]
                    row["extra_bytes"] = json.loads(subprocess.check_output(command))
            if extra and not key[1] and key[0] != "4 GEMMs":
                row["errors"] = errors(fns[key[0]], dtype, device)
            if device == "cuda" and "seconds" in row:
                row["tflops"] = 8e-12 * shape[0] * shape[1] * shape[2] / row["seconds"]
            out["rows"].append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)


def ratio(a, b):
    """Time of row a over row b: turn by turn where both took as many, else of their medians."""
    if a is None or b is None or "turns" not in a or "turns" not in b:
        return ""
    if len(a["turns"]) == len(b["turns"]):
        return f"{statistics.median(x / y for x, y in zip(a['turns'], b['turns'], strict=True)):.2f}"
    return f"{a['seconds'] / b['seconds']:.2f}"


def table(rows):
    """Markdown: one line a contender, beside the naive form and ours in the same case, dtype and loss."""
    head = "case|dtype|contender|s|/ naive|ours / it|extra MB|/ naive|err logp|entropy|dh|dW".split("|")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        same = [x for x in rows if all(x[k] == r[k] for k in ("case", "dtype", "entropy"))]
        base, our = (next((x for x in same if x["name"] == name), None) for name in ("naive", "ours"))
        mb, base_mb = r.get("extra_bytes"), base.get("extra_bytes")
        cells = ["N={} D={} V={}".format(*r["shape"]), r["dtype"]]
        cells += [r["name"] + (" + entropy gradient" if r["entropy"] else "")]
        cells += [f"{r['seconds']:.4g}" if "seconds" in r else ""]
        cells += [ratio(r, base), ratio(our, r)]
        cells += ["", ""] if mb is None else [f"{mb / 1e6:.0f}", f"{mb / base_mb:.4f}"]
        cells += ["" if e is None else f"{e:.1e}" for e in r.get("errors") or [None] * 4]
        if "tflops" in r:
            cells[3] += f" ({r['tflops']:.0f} TF/s)"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all of this kind of device")
    parser.add_argument(
        "--peers", action="store_true", help="add the installed peers; nothing gets installed"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--name", help="results are written to results/kernel_<name>.json and .md")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)  # a process of its own, for memory
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    if args.one:
        case, dtype, name, with_peers = args.one
        fn = contenders(dtype, int(with_peers))[name]
        n, d, v = CASES[case][0]
        d = 16 if slow(dtype) and name == "naive" else d
        print(json.dumps(memory(fn, (n, d, v), dtype, device)))
        return
    gpu = ["gpu-small", "gpu-large", "gpu-wide"]
    cases = args.cases or (gpu if device == "cuda" else ["tiny", "peers", "head", "long"])
    versions = {}
    for package in ("torch", "triton", "liger-kernel", "trl", "cut-cross-entropy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    out = {"device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(), "rows": []}
    out |= {"slow_bf16": slow("bf16"), "versions": versions}
    installed = ", ".join(f"{k} {v}" for k, v in versions.items() if v)
    about = f"`{' '.join(['python', 'experiments/kernel_bench.py', *sys.argv[1:]])}` on {out['device']}, "
    about += f"{'one thread; ' if device == 'cpu' else ''}{installed}. Turns: "
    about += ", ".join(f"{CASES[c][2]} at N={CASES[c][0][0]} V={CASES[c][0][2]}" for c in cases) + "."
    if out["slow_bf16"]:
        about += (
            "\n\nThis CPU has no bf16 instructions; torch emulates them. The naive form and Liger's scaled CE"
        )
        about += " in bf16\nhave one turn, and none at N=4096; naive memory in bf16 is measured at D=16."
    path = ROOT / "experiments" / "results" / f"kernel_{args.name or device}"
    for case in cases:
        run_case(case, args.dtypes, args.peers, device, out)
        head = json.dumps({k: v for k, v in out.items() if k != "rows"})
        rows = ",\n".join(json.dumps(row) for row in out["rows"])
        path.with_suffix(".json").write_text(f'{head[:-1]}, "rows": [\n{rows}\n]}}\n')
        path.with_suffix(".md").write_text(f"{about}\n\n{table(out['rows'])}\n")
    print(table(out["rows"]))


if __name__ == "__main__":
    main()
