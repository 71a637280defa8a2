"""common/logprob.py against float64, on both paths.

What is not marked `torch_only` runs twice: here on the torch path, and once more in a child process under
TRITON_INTERPRET=1, where the same calls run the Triton kernels on CPU tensors. The variable has to be set
before triton is imported; the child keeps it away from the other test modules.
"""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from common import logprob
from common.logprob import token_logprobs

ROOT = Path(__file__).resolve().parent.parent
TRITON = logprob.INTERPRET and logprob.triton is not None
torch_only = pytest.mark.skipif(TRITON, reason="does not depend on the path, or belongs to the torch path")
BOUND = 2e-6  # of the logit scale, in fp32


def inputs(n, d, v, dtype=torch.float32, seed=0, scale=1.0, ignore=0.0):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(n, d, generator=g).mul_(scale).to(dtype).requires_grad_()
    w = torch.randn(v, d, generator=g).to(dtype).requires_grad_()
    t = torch.randint(0, v, (n,), generator=g)
    t[torch.rand(n, generator=g) < ignore] = -100
    return h, w, t, torch.randn(n, generator=g), torch.randn(n, generator=g)


def oracle(h, w, t, g, k, temperature=1.0):
    """logp, entropy, dh, dw in float64 from the plain form; g and k are the upstream gradients."""
    h, w = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    keep = (t != -100).double()
    z = h @ w.T / temperature
    logp_all = z.log_softmax(-1)
    logp = logp_all.gather(-1, t.clamp(min=0)[:, None])[:, 0] * keep
    entropy = -(logp_all.exp() * logp_all).sum(-1) * keep
    grads = torch.autograd.grad((g * logp).sum() + (k * entropy).sum(), (h, w))
    return max(z.abs().max().item() if z.numel() else 0.0, 1.0), [logp.detach(), entropy.detach(), *grads]


def ours(h, w, t, g, k, temperature=1.0):
    logp, entropy = token_logprobs(h, w, t, temperature)
    return [logp, entropy, *torch.autograd.grad((g * logp).sum() + (k * entropy).sum(), (h, w))]


def check(args, temperature=1.0, bound=BOUND, bound_gradient=None):
    scale, expected = oracle(*args, temperature)
    for name, a, b in zip(("logp", "entropy", "dh", "dw"), ours(*args, temperature), expected, strict=True):
        if not b.numel():
            continue
        limit = (bound if name in ("logp", "entropy") else bound_gradient or bound) * scale
        limit *= 1.0 if name in ("logp", "entropy") else max(b.abs().max().item(), 1 / temperature)
        error = (a.detach().double() - b).abs().max().item()
        assert error <= limit, f"{name}: error {error:.2e}, allowed {limit:.2e} at logit scale {scale:.1f}"


@contextlib.contextmanager
def blocks(bm=16, bn=16, span=2, block=200, chunk=None):
    """Small tiles, parts and chunks, so that small inputs cross all their borders."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("BM", bm), ("BN", bn), ("SPAN", span), ("BLOCK", block)):
            patch.setattr(logprob, name, value)
        if chunk:
            patch.setattr(logprob, "_chunk", lambda h, V: min(chunk, V))
        yield


# --------------------------------------------------------------------------------------- values and gradients


@settings(max_examples=10 if TRITON else 120, deadline=None, derandomize=True, database=None)
@given(
    n=st.integers(1, 40),
    d=st.integers(1, 100),
    v=st.integers(1, 100),
    temperature=st.sampled_from([0.05, 0.6, 1.0, 3.0]),
    ignore=st.sampled_from([0.0, 0.0, 0.5]),
    chunk=st.integers(20 if TRITON else 1, 110),
    block=st.sampled_from([16, 32]),
    span=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_random_cases(n, d, v, temperature, ignore, chunk, block, span, seed):
    with blocks(block, block, span, block=block * 7, chunk=chunk):
        check(inputs(n, d, v, seed=seed, scale=d**-0.5, ignore=ignore), temperature)


@pytest.mark.parametrize("n, d, v", [(1, 1, 1), (1, 7, 3), (129, 70, 2300), (3, 65, 1025), (130, 64, 128)])
def test_shapes_at_the_default_blocks(n, d, v):
    check(inputs(n, d, v, scale=d**-0.5, ignore=0.1 if n > 3 else 0.0), 0.7)


@pytest.mark.parametrize("g, k", [(1.0, 0.0), (0.0, 1.0)])
def test_losses_of_one_output_alone(g, k):
    h, w, t, *_ = inputs(33, 20, 75)
    with blocks(chunk=32):
        logp, entropy = token_logprobs(h, w, t, 0.8)
        grads = torch.autograd.grad((logp if g else entropy).sum(), (h, w))
    _, expected = oracle(h, w, t, torch.full((33,), g), torch.full((33,), k), 0.8)
    for a, b in zip(grads, expected[2:], strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_bf16():
    """Statistics are fp32 and dz is rounded once; only native bf16 GEMMs of torch round the logits."""
    fp32_logits = TRITON or logprob._gemm_dtype(torch.empty(0, dtype=torch.bfloat16)) == torch.float32
    with blocks(chunk=50):
        check(inputs(40, 48, 130, torch.bfloat16), 0.9, BOUND if fp32_logits else 4e-3, 4e-3)


@torch_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("native", [False, True])
def test_half_precision_gemms_on_any_cpu(dtype, native, monkeypatch):
    monkeypatch.setattr(logprob, "_gemm_dtype", lambda h: dtype if native else torch.float32)
    args = inputs(40, 48, 130, dtype)
    with blocks(chunk=50):
        out = ours(*args)
        check(args, 1.0, 4e-3 if native else BOUND, 4e-3)
    assert [x.dtype for x in out] == [torch.float32, torch.float32, dtype, dtype]


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_extreme_offsets(offset):
    """Adding a constant to all logits changes nothing, and no maximum may start at 0."""
    h, w, t, g, k = inputs(20, 4, 90)
    h, w = h.detach(), w.detach()
    h[:, 0], w[:, 0] = 1.0, offset
    with blocks(chunk=20):
        logp, entropy, dh, _ = ours(h.requires_grad_(), w.requires_grad_(), t, g, k)
    _, expected = oracle(h, w, t, g, k)
    assert (logp - expected[0]).abs().max() <= 4e-3  # logits of 1e4 have steps of 1e-3 in fp32
    assert (entropy - expected[1]).abs().max() <= 2e-3
    assert (dh - expected[2])[:, 1:].abs().max() <= 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_confident_tokens(dtype, monkeypatch):
    """Where p_t is nearly 1, the gradient is g·(1 - p_t), not a difference of roundings, and log p <= 0."""
    monkeypatch.setattr(logprob, "_gemm_dtype", lambda h: h.dtype)  # bf16 in bf16, whatever the CPU has
    h = torch.full((17, 1), 12.0, dtype=dtype, requires_grad=True)
    w = torch.cat([torch.ones(1, 1), torch.zeros(40, 1)]).to(dtype).requires_grad_()
    with blocks(chunk=16):
        logp, entropy = token_logprobs(h, w, torch.zeros(17, dtype=torch.int64))
        (dh,) = torch.autograd.grad(logp.sum(), h)
    p = 1 / (1 + 40 * math.exp(-12))
    assert (logp <= 0).all() and (entropy >= 0).all()
    torch.testing.assert_close(dh.float(), torch.full((17, 1), 1 - p), rtol=8e-3, atol=0)


@pytest.mark.parametrize("chunk", [64, 5000] if TRITON else [1, 7, 64, 90, 5000])
def test_chunk_size_changes_rounding_only(chunk):
    args = inputs(50, 30, 90, ignore=0.2)
    with blocks(chunk=90):
        whole = ours(*args)
    with blocks(chunk=chunk):
        parts = ours(*args)
    for a, b in zip(parts, whole, strict=True):
        assert (a - b).abs().max() <= 2e-6 * b.abs().max()


def test_ignored_rows_return_zero_and_cost_nothing():
    h, w, t, g, k = inputs(37, 20, 75, ignore=0.4)
    ignored = t == -100
    assert ignored.any() and not ignored.all()
    with torch.no_grad():
        h[ignored] = math.nan  # nobody may even look
    with blocks():
        logp, entropy, dh, dw = ours(h, w, t, g, k)
        other = token_logprobs(h, w, t.where(~ignored, -7), ignore_index=-7)
    for x in (logp, entropy, dh):
        assert (x[ignored] == 0).all() and x.isfinite().all() and (x[~ignored] != 0).all()
    assert dw.isfinite().all()
    assert torch.equal(other[0], logp) and torch.equal(other[1], entropy)


def test_nan_stays_in_its_row():
    h, w, t, g, k = inputs(20, 20, 75)
    with torch.no_grad():
        h[3, 5] = math.nan
    logp, entropy, dh, _ = ours(h, w, t, g, k)
    for x in (logp, entropy, dh.sum(1)):
        assert x.isnan().nonzero().tolist() == [[3]]


def test_strided_inputs_and_upstream_gradients():
    args = inputs(24, 20, 75)
    expected = ours(*args)
    h, w, t, g, k = args
    h2 = torch.randn(24, 2, 20).copy_(h.detach()[:, None].expand(24, 2, 20))[:, 1].requires_grad_()
    wide = torch.cat([w.detach(), torch.randn(75, 12)], 1)[:, :20]  # rows of 32, of which 20 are used
    across = w.detach().T.contiguous().T  # unit stride in V, not in D
    upstream = (torch.stack([g, g], 1)[:, 0].view(4, 6), k.view(4, 6).T.contiguous().T)
    assert not upstream[0].is_contiguous() and not upstream[1].is_contiguous()
    for w2 in (wide.requires_grad_(), across.requires_grad_()):
        logp, entropy = token_logprobs(h2.view(4, 6, 20), w2, t.view(6, 4).T.contiguous().T.reshape(4, 6))
        grads = torch.autograd.grad((logp, entropy), (h2, w2), upstream)
        for a, b in zip([logp.flatten(), entropy.flatten(), *grads], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    # a sum hands back an expanded gradient, of stride 0
    (ones,) = torch.autograd.grad(token_logprobs(h, w, t)[0].sum(), h)
    _, exact = oracle(h, w, t, torch.ones(24), torch.zeros(24))
    torch.testing.assert_close(ones, exact[2].float(), rtol=1e-4, atol=1e-5)


def test_empty_and_all_ignored_stay_on_the_graph():
    for n, shape in ((0, (0,)), (0, (2, 0)), (5, (5,))):
        h, w, *_ = inputs(n, 20, 75)
        t = torch.full(shape, -100)
        logp, entropy = token_logprobs(h.view(*shape, 20), w, t)
        assert (
            logp.shape == entropy.shape == torch.Size(shape) and logp.requires_grad and entropy.requires_grad
        )
        dh, dw = torch.autograd.grad(logp.sum() + entropy.sum(), (h, w))
        assert logp.eq(0).all() and dh.shape == h.shape and dh.eq(0).all() and dw.eq(0).all()


def test_a_row_does_not_depend_on_its_batch():
    h, w, t, *_ = inputs(40, 30, 120, seed=3)
    h, w = (
        x.detach().mul(4).round().div(4) for x in (h, w)
    )  # exact products: the interpreter's dot is numpy's
    with blocks():
        whole = torch.stack(token_logprobs(h, w, t))
        for rows in (slice(7, 8), slice(0, 17), slice(23, 40)):
            part = torch.stack(token_logprobs(h[rows], w, t[rows]))
            if TRITON:
                assert torch.equal(part, whole[:, rows])
            else:  # the library GEMM does not promise it
                torch.testing.assert_close(part, whole[:, rows], rtol=1e-5, atol=1e-5)


def test_deterministic():
    args = inputs(40, 30, 200, ignore=0.2)
    with blocks(chunk=64):
        assert all(torch.equal(a, b) for a, b in zip(ours(*args), ours(*args), strict=True))


@torch_only
def test_the_triton_path_passes_this_file():
    pytest.importorskip("triton", reason="triton is not installed: the kernels cannot be interpreted")
    env = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "--durations=0", __file__]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 20, run.stdout[-2000:]


# ---------------------------------------------------------------------------------------- autograd's contract


@torch_only
@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradcheck_in_float64(chunk, temperature):
    h, w, t, *_ = inputs(4, 3, 13, torch.float64)
    t[2] = -100
    with blocks(block=30, chunk=chunk):
        assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, t, temperature), (h, w))
        assert token_logprobs(h, w, t)[0].dtype == torch.float64


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_costs_no_gemm(frozen, monkeypatch):
    h, w, t, g, k = inputs(20, 20, 75)
    _, _, dh, dw = ours(h, w, t, g, k)
    (h if frozen == "hidden" else w).requires_grad_(False)
    monkeypatch.setattr(
        logprob, "_add_product" if frozen == "hidden" else "_write_product", None
    )  # not callable
    logp, entropy = token_logprobs(h, w, t)
    ((g * logp).sum() + (k * entropy).sum()).backward()
    assert (h if frozen == "hidden" else w).grad is None
    assert torch.equal(*((w.grad, dw) if frozen == "hidden" else (h.grad, dh)))


@torch_only
def test_no_grad():
    h, w, t, *_ = inputs(20, 20, 75)
    with torch.no_grad():
        out = token_logprobs(h, w, t)
    assert not any(x.requires_grad for x in out)
    assert all(torch.equal(a, b) for a, b in zip(out, token_logprobs(h, w, t), strict=True))


@torch_only
def test_autocast_keeps_fp32_master_weights():
    h, w, t, g, k = inputs(20, 20, 75)
    hb, wb = (x.detach().bfloat16().requires_grad_() for x in (h, w))
    logp, entropy, dh, dw = ours(hb, wb, t, g, k)
    with torch.autocast("cpu", torch.bfloat16):
        out = token_logprobs(h, w, t)
        mixed = token_logprobs(hb, w, t)  # what a model under autocast passes: bf16 activations, fp32 head
        inside = torch.autograd.grad((out[0] * g + out[1] * k).sum(), (h, w), retain_graph=True)
    outside = torch.autograd.grad((out[0] * g + out[1] * k).sum(), (h, w))
    assert torch.equal(out[0], logp) and torch.equal(out[1], entropy) and torch.equal(mixed[0], logp)
    for a, b, c in zip(inside, outside, (dh, dw), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b) and torch.equal(a, c.float())


@torch_only
def test_backward_under_autocast_of_a_forward_without_it():
    h, w, t, g, k = inputs(20, 20, 75)
    expected = ours(h, w, t, g, k)
    logp, entropy = token_logprobs(h, w, t)
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad((logp * g + entropy * k).sum(), (h, w))
    assert torch.equal(grads[0], expected[2]) and torch.equal(grads[1], expected[3])


@torch_only
def test_tied_weights_get_both_gradients():
    """The same matrix embeds and scores, as in most small models."""
    _, _, t, g, k = inputs(20, 20, 75, seed=1)
    embedding = torch.nn.Embedding(75, 20)
    ids = torch.arange(20) % 75

    def gradient(head):
        embedding.zero_grad()
        logp, entropy = head(embedding(ids).tanh(), embedding.weight, t)
        ((g * logp).sum() + (k * entropy).sum()).backward()
        return embedding.weight.grad.clone()

    def plain(h, w, t):
        logp = (h @ w.T).log_softmax(-1)
        return logp.gather(-1, t[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    torch.testing.assert_close(gradient(token_logprobs), gradient(plain), rtol=1e-4, atol=1e-5)


@torch_only
@pytest.mark.parametrize(
    "error, change, message",
    [
        (ValueError, {"hidden": torch.zeros(3, 5)}, "hidden [3, 5] and weight [7, 4]"),
        (ValueError, {"weight": torch.zeros(7, 4, 1)}, "[V, D]"),
        (ValueError, {"weight": torch.zeros(0, 4)}, "[V, D]"),
        (ValueError, {"targets": torch.zeros(4, dtype=torch.int64)}, "targets [4]"),
        (ValueError, {"targets": torch.zeros(3, 1, dtype=torch.int64)}, "targets [3, 1]"),
        (ValueError, {"temperature": 0.0}, "temperature"),
        (ValueError, {"temperature": -1.0}, "temperature"),
        (ValueError, {"temperature": math.nan}, "temperature"),
        (ValueError, {"temperature": math.inf}, "temperature"),
        (TypeError, {"targets": torch.zeros(3, dtype=torch.int32)}, "int64"),
        (TypeError, {"hidden": torch.zeros(3, 4, dtype=torch.bfloat16)}, "bfloat16"),
        (IndexError, {"targets": torch.tensor([0, 7, -100])}, "outside [0, 7)"),
        (IndexError, {"targets": torch.tensor([0, -1, -100])}, "outside [0, 7)"),
        (IndexError, {"targets": torch.tensor([0, 1, -100]), "ignore_index": -1}, "outside [0, 7)"),
    ],
)
def test_errors(error, change, message):
    args = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "targets": torch.tensor([0, 6, -100])}
    token_logprobs(**args)
    with pytest.raises(error, match=re.escape(message)) as raised:
        token_logprobs(**args | change)
    assert "\n" not in str(raised.value)


# ------------------------------------------------------------------------------------------- memory and sizes


class TensorShapes(TorchDispatchMode):
    """Records the shape of every tensor that any operation returns, forward or backward.

    with TensorShapes() as seen:
        loss.backward()
    assert not seen.of_size(n_tokens, vocabulary)
    """

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.shapes.add(tuple(x.shape))
        return out

    def of_size(self, n, v):
        """Shapes of n·v elements or more, in any arrangement."""
        return sorted(x for x in self.shapes if math.prod(x) >= n * v)


@torch_only
def test_no_operation_returns_logits():
    h, w, t, g, k = inputs(300, 8, 2000)
    with blocks(block=2**14, chunk=512), TensorShapes() as seen:
        ours(h, w, t, g, k)
    assert (300, 512) in seen.shapes and not seen.of_size(300, 2000)
    with TensorShapes() as seen:
        (h @ w.T).log_softmax(-1).sum().backward()
    assert (300, 2000) in seen.of_size(300, 2000)


MEMORY = """
import ctypes, json, sys, torch
from pathlib import Path
from common.logprob import token_logprobs
torch.set_num_threads(1)
def status(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) * 1024
def plain(h, w, t):
    logp = (h @ w.T).log_softmax(-1)
    return logp.gather(-1, t[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
def extra(f, n, d, v):
    h, w, t = torch.randn(n, d), torch.randn(v, d), torch.randint(0, v, (n,))
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    logp, entropy = f(h.requires_grad_(), w.requires_grad_(), t)
    (logp.sum() + entropy.sum()).backward()
    return status("VmHWM") - before
extra(token_logprobs, 64, 16, 1024), extra(plain, 64, 16, 1024)
print(json.dumps([extra(token_logprobs, 1024, 16, 32768), extra(plain, 1024, 16, 32768)]))
"""


@torch_only
@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="no resettable high-water mark here"
)
def test_peak_memory_has_no_room_for_logits():
    ours_peak, plain_peak = json.loads(subprocess.check_output([sys.executable, "-c", MEMORY], cwd=ROOT))
    logits = 1024 * 32768 * 4
    assert plain_peak > 1.5 * logits  # the mark sees them where they exist
    assert ours_peak < 0.25 * logits  # not even one, in one byte a value


@torch_only
def test_chunk_rule():
    words = {n: logprob._chunk(torch.empty(n, 2), 10**6) for n in (0, 1, 4096, 8192, 10**5)}
    assert words == {0: 4096, 1: 4096, 4096: 4096, 8192: 2048, 10**5: 512}
    assert logprob._chunk(torch.empty(3, 2), 460) == 460


# --------------------------------------------------------------------------------- what only a GPU would show


@pytest.mark.skipif(not TRITON, reason="belongs to the Triton path")
def test_one_part_of_the_vocabulary_writes_the_logit_of_a_target():
    """Two writers of a row race on a GPU, but in the interpreter the last one wins: here part 0 is alone."""
    h, w, *_ = inputs(75, 20, 75)
    t, zt, stats = torch.arange(75), torch.full((75,), math.nan), torch.empty(1, 3, 75)
    shape = (75, 75, 20, 20, 20, 1.0, 16, 16, 32, 2, True)  # n, V, D, strides, 1/T, tile, SPAN: words 0 to 31
    logprob._forward_kernel[(5, 1)](h.detach(), w.detach(), t, zt, stats, *shape)
    torch.testing.assert_close(zt[:32], (h * w).sum(1)[:32].detach(), rtol=1e-4, atol=1e-4)
    assert zt[32:].isnan().all()


OVERFLOW = """
import mmap, torch, triton
from common import logprob as L
L.BM = L.BN = 16
def far(shape, stride):  # rows 2^26 elements apart in memory that is never touched between them
    size = (sum((n - 1) * k for n, k in zip(shape, stride)) + 2**10) * 4
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    return torch.as_strided(torch.frombuffer(memory, dtype=torch.float32), shape, stride)
g = torch.Generator().manual_seed(0)
near = torch.randn(33, 16, generator=g)
small = torch.randn(40, 16, generator=g)
x = far((33, 16), (2**26, 1))
x.copy_(near)
t = torch.arange(33) % 33
for (h, w), (fh, fw) in (((near, small), (x, small)), ((small[:33], near), (small[:33], x))):
    a, b = L.token_logprobs(h, w, t), L.token_logprobs(fh, fw, t)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
m, a, b, up = torch.zeros(33), -torch.ones(33), torch.ones(33), torch.ones(33)
for c, dz in ((40, torch.empty(33, 40)), (2**26, far((33, 40), (2**26, 1)))):  # words in the chunk
    L._backward_kernel[(3, 3)](
        near, small, t, m, a, b, up, dz, 33, 40, 16, 16, 16, 0, c, 1.0, 16, 16, 32, True)
    first = dz.clone() if c == 40 else first
    assert torch.equal(dz, first)
for n in (33, 2**29):  # the triples of 3 parts [3, 3, n], of which the first rows are computed
    zt, stats = torch.zeros(33), far((3, 3, 33), (3 * n, n, 1))
    L._forward_kernel[(2, 3)](
        near, small, t, zt, stats, n, 40, 16, 16, 16, 1.0, 16, 16, 32, 1, True)
    triples = stats[..., :32].clone() if n == 33 else triples
    assert torch.equal(stats[..., :32], triples)
print("right")
"""


@torch_only
def test_offsets_beyond_int32():
    """In a child: an offset that wraps around reads far outside its memory, which kills the process."""
    pytest.importorskip("triton", reason="triton is not installed: the kernels cannot be interpreted")
    env = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", OVERFLOW], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, "right"), (run.returncode, run.stderr[-2000:])


@torch_only
@pytest.mark.parametrize("dtype, cc", [("bf16", 80), ("bf16", 86), ("bf16", 90), ("fp32", 86)])
def test_ahead_of_time_compilation(dtype, cc):
    """The default tile fits the registers and the shared memory of A100, RTX 30/A6000 and H100."""
    bk = logprob.BK_BYTES // (2 if dtype == "bf16" else 4)
    constants = {"BM": logprob.BM, "BN": logprob.BN, "BK": bk, "UPCAST": False}
    for kernel in (logprob._forward_kernel, logprob._backward_kernel):
        own = constants | ({"SPAN": logprob.SPAN} if "SPAN" in kernel.arg_names else {})
        types = dict.fromkeys(kernel.arg_names, "i32") | {"t": "*i64", "inv_T": "fp32"}
        types |= dict.fromkeys(("h", "w", "dz"), f"*{dtype}")
        types |= dict.fromkeys(("zt", "stats", "m", "a", "b", "g"), "*fp32")
        aligned = [name for name in kernel.arg_names if name not in own and name not in ("n", "inv_T")]
        binary = compiled(kernel, types, own, aligned, cc, logprob.LAUNCH)
        if dtype == "bf16":
            assert ("wgmma" if cc == 90 else "mma.sync") in binary.asm["ptx"]
        else:  # products of fp32 are not those of TF32's ten bits, which no interpreter would show
            assert "fma.rn.f32" in binary.asm["ptx"] and "tf32" not in binary.asm["ptx"]


WITHOUT_TRITON = """
import sys, torch
sys.modules["triton"] = None  # import triton now raises ImportError
from common import logprob
assert logprob.triton is None
h, w = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
sum(x.sum() for x in logprob.token_logprobs(h, w, torch.arange(5))).backward()
assert h.grad.isfinite().all() and w.grad.isfinite().all()
"""


@torch_only
def test_works_without_triton():
    env = os.environ | {"TRITON_INTERPRET": "1"}  # no reason to miss it either
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, env=env, check=True)
