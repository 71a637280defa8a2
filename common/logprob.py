"""Log-probability and entropy of every target token, from hidden states, without ever holding the logits.

The plain way writes z = h·Wᵀ for N tokens and V words, then its softmax, its logarithm and their gradients:
10 GB for 4,096 tokens and 152k words. Each number is used once, so a tile at a time is enough.

Forward, of one token with target t, logits z_j = h·w_j / T and p = softmax(z):

    m = max_j z_j      s = Σ_j e^(z_j - m)      u = Σ_j e^(z_j - m)·(z_j - m)
    log p_t = (z_t - m) - log s                 because log Σ_j e^z_j = m + log s
    H = -Σ_j p_j·log p_j = log s - u / s        because log p_j = (z_j - m) - log s and Σ_j p_j = 1

Merge. The triples of two disjoint parts of the vocabulary give the triple of their union, so the parts may be
visited in any tiling. This is the chain rule of entropy, H = H(which part) + Σ_i P(part i)·H(inside part i):

    m = max(m_1, m_2)  s = Σ_i e^(m_i - m)·s_i  u = Σ_i e^(m_i - m)·(u_i + (m_i - m)·s_i)

Backward, with the upstream gradients g of log p_t and k of H, and x_j = z_j - m computed again, tile by tile:

    ∂log p_t / ∂z_j = [j = t] - p_j             ∂H / ∂z_j = -p_j·(log p_j + H)
    dz_j = g·[j = t] + e^x_j·(a + b·x_j)        a = (k·(log s - H) - g) / s        b = -k / s
    dh = Σ_j dz_j·w_j / T                       dw_j = Σ_tokens dz_j·h / T

A fourth GEMM, z again, keeps every temporary within [N, chunk]. On CUDA, Triton kernels make the tiles and
their epilogues, and library GEMMs make dh and dW; elsewhere torch takes the same steps, each below its twin.
No atomics and no tuning by shape: results are deterministic and, from Triton, log p and H of a token do not
depend, to the bit, on the rest of the batch. Heads with a bias or a soft-cap are not supported: their logits
are not h·wᵀ.
"""

from __future__ import annotations  # without triton, tl.constexpr below is only a name

import math
import os

import torch

try:  # it comes with CUDA builds of torch; one binary serves every batch size n
    import triton
    import triton.language as tl

    jit = triton.jit(do_not_specialize=["n"])
except ImportError:
    triton, jit = None, lambda kernel: kernel

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # tests: the kernels run in Python, on CPU tensors
BM, BN, SPAN = 128, 128, 8  # a tile is BM rows by BN words; one forward program visits SPAN tiles
BK_BYTES, LAUNCH = 128, {"num_warps": 8, "num_stages": 3}  # a step in D; all of it fits without spills
BLOCK = 2**18  # torch: elements of [N, chunk] that go through the elementwise steps together, in cache


def _chunk(h, V):
    """Words per chunk: a buffer [N, chunk] of 64 to 128 MB, with GEMMs that are still large."""
    low, high, budget = (2048, 8192, 2**26) if h.is_cuda else (512, 4096, 2**24)
    budget //= 1 if _gemm_dtype(h) == h.dtype else 2  # fp32 copies take memory, too
    return min(max(budget // max(len(h), 1), low), high, V)


def _gemm_dtype(h):
    """fp32 on CPUs without bf16 or fp16 instructions, where half-precision GEMMs are 7 to 60 times slower."""
    if h.device.type != "cpu" or h.dtype not in (torch.bfloat16, torch.float16):
        return h.dtype
    name = "_is_mkldnn_bf16_supported" if h.dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    native = torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, name)()
    return h.dtype if native else torch.float32


# ---------------------------------------------------------------------------------------- 1. a tile of logits


@jit
def _tile(h, w, n, V, D, sh, sw, row0, col0, inv_T, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
          UPCAST: tl.constexpr):  # fmt: skip
    """z [BM, BN] of rows row0... and words col0..., in fp32; past the end it repeats the last."""
    row = tl.minimum(row0 + tl.arange(0, BM), n - 1).to(tl.int64)  # [BM]      int64: N·D passes 2^31,
    col = tl.minimum(col0 + tl.arange(0, BN), V - 1).to(tl.int64)  # [BN]      and so does V·D
    k = tl.arange(0, BK)  # [BK]
    h_ptr = h + row[:, None] * sh + k[None, :]  # [BM, BK]
    w_ptr = w + col[None, :] * sw + k[:, None]  # [BK, BN]
    z = tl.zeros((BM, BN), tl.float32)  # [BM, BN]
    for k0 in range(0, D, BK):
        h_k = tl.load(h_ptr + k0, mask=k[None, :] < D - k0, other=0.0)  # [BM, BK]
        w_k = tl.load(w_ptr + k0, mask=k[:, None] < D - k0, other=0.0)  # [BK, BN]
        if UPCAST:  # the interpreter's dot would multiply the raw bits of bf16
            h_k, w_k = h_k.to(tl.float32), w_k.to(tl.float32)
        z = tl.dot(h_k, w_k, z, input_precision="ieee")  # [BM, BN]    fp32 inputs: no TF32
    return z * inv_T  # [BM, BN]    in fp32: scaled bf16 hidden states would be rounded again


def _tile_torch(h, w, buffer):
    """T·z [N, c], rounded to the dtype of the GEMM, at the start of the buffer [N·chunk]."""
    z = buffer[: len(h) * len(w)].view(len(h), len(w))  # [N, c]
    return torch.mm(h, w.T, out=z)  # [N, c]


# ----------------------------------------------------------- 2. forward: target logit and (m, s, u) of a part


@jit
def _forward_kernel(h, w, t, zt, stats, n, V, D, sh, sw, inv_T, BM: tl.constexpr, BN: tl.constexpr,
                    BK: tl.constexpr, SPAN: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """One program: one block of rows over one part of SPAN·BN words."""
    row0, part = tl.program_id(0) * BM, tl.program_id(1)  # rows on axis 0: neighbours share a part of W in L2
    row = row0 + tl.arange(0, BM)  # [BM]
    start, stop = part * SPAN * BN, tl.minimum((part + 1) * SPAN * BN, V)
    target = tl.load(t + row, mask=row < n, other=-1)  # [BM]
    m = tl.full((BM,), -float("inf"), tl.float32)  # [BM]
    s = tl.zeros((BM,), tl.float32)  # [BM]
    u = tl.zeros((BM,), tl.float32)  # [BM]
    z_target = tl.zeros((BM,), tl.float32)  # [BM]
    for col0 in range(start, stop, BN):
        z = _tile(h, w, n, V, D, sh, sw, row0, col0, inv_T, BM, BN, BK, UPCAST)  # [BM, BN]
        col = col0 + tl.arange(0, BN)[None, :]  # [1, BN]
        hit = col == target[:, None]  # [BM, BN]
        z_target += tl.sum(tl.where(hit, z, 0.0), 1)  # [BM]        the very z that s sums: log p <= 0
        m_new = tl.maximum(m, tl.max(z, 1))  # [BM]        repeated words do not change a maximum,
        x = z - m_new[:, None]  # [BM, BN]
        e = tl.where(col < V, tl.exp(x), 0.0)  # [BM, BN]    but would change a sum
        d = tl.where(s == 0.0, 0.0, m - m_new)  # [BM]        first tile: not -inf·0
        u = tl.exp(d) * (u + d * s) + tl.sum(e * x, 1)  # [BM]        the merge rule
        s = tl.exp(d) * s + tl.sum(e, 1)  # [BM]
        m = m_new  # [BM]
    tl.store(zt + row, z_target, mask=(row < n) & (target >= start) & (target < stop))  # one writer a row
    out = stats + part.to(tl.int64) * 3 * n + row  # [BM]        stats [S, 3, N]
    tl.store(out, m, mask=row < n)
    tl.store(out + n, s, mask=row < n)
    tl.store(out + 2 * n, u, mask=row < n)


def _forward_triton(h, w, t, inv_T):
    """Target logits [N] and the triples [S, 3, N] of S parts of the vocabulary."""
    (n, D), V = h.shape, len(w)
    stats = torch.empty(triton.cdiv(V, SPAN * BN), 3, n, dtype=torch.float32, device=h.device)  # [S, 3, N]
    zt = torch.empty(n, dtype=torch.float32, device=h.device)  # [N]
    _forward_kernel[(triton.cdiv(n, BM), len(stats))](
        h, w, t, zt, stats, n, V, D, h.stride(0), w.stride(0), inv_T,
        BM, BN, BK_BYTES // h.element_size(), SPAN, INTERPRET, **LAUNCH,
    )  # fmt: skip
    return zt, stats


def _forward_torch(h, w, t, inv_T):
    """Target logits [N] and the triples [S, 3, N] of S chunks of the vocabulary."""
    C = _chunk(h, len(w))  # words per chunk
    step = max(BLOCK // C, 1)  # rows that go through the elementwise steps together
    starts = range(0, len(w), C)
    dtype = torch.promote_types(h.dtype, torch.float32)
    h = h.to(_gemm_dtype(h))  # [N, D]
    buffer = h.new_empty(len(h) * C)
    stats = torch.empty(len(starts), 3, len(h), dtype=dtype, device=h.device)  # [S, 3, N]
    zt = stats.new_zeros(len(h), 1)  # [N, 1]
    for (m, s, u), v in zip(stats, starts, strict=True):
        z = _tile_torch(h, w[v : v + C].to(h.dtype), buffer)  # [N, c]
        at, inside = _target_column(t, v, z.shape[1])  # [N, 1]
        zt = torch.where(inside, z.gather(1, at).to(dtype) * inv_T, zt)  # [N, 1]
        for R in (slice(r, r + step) for r in range(0, len(h), step)):
            x = z[R].to(dtype).mul_(inv_T)  # [R, c]
            x.sub_(torch.amax(x, 1, out=m[R])[:, None])  # [R, c]
            e = x.exp()  # [R, c]
            torch.sum(e, 1, out=s[R])  # [R]
            torch.sum(e.mul_(x), 1, out=u[R])  # [R]
    return zt[:, 0], stats


def _target_column(t, v, c):
    """Column of each target in the chunk of c words from v on, and whether it is there; both [N, 1]."""
    at = t[:, None] - v  # [N, 1]
    return at.clamp(0, c - 1), (at >= 0) & (at < c)


# ----------------------------------------------------------------------------- 3. merge: one triple per token


def _merge(stats):
    """(m, s, u), each [N], from the [S, 3, N] of S parts, by pairs: in an order that never depends on N."""
    while len(stats) > 1:
        m, s, u = torch.stack([stats[:-1:2], stats[1::2]]).unbind(2)  # [2, S/2, N]
        top = m.amax(0)  # [S/2, N]
        d = m - top  # [2, S/2, N]
        pairs = torch.stack([top, (d.exp() * s).sum(0), (d.exp() * (u + d * s)).sum(0)], 1)  # [S/2, 3, N]
        stats = torch.cat([pairs, stats[len(stats) // 2 * 2 :]])  # [(S+1)/2, 3, N]
    return stats[0].unbind()


# ----------------------------------------------------------- 4. backward: gradient of the logits of one chunk


@jit
def _backward_kernel(h, w, t, m, a, b, g, dz, n, V, D, sh, sw, v, c, inv_T, BM: tl.constexpr,
                     BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """One program: one tile of dz [N, c] for the chunk of c words from v on."""
    row0, col0 = tl.program_id(0) * BM, tl.program_id(1) * BN
    row, col = row0 + tl.arange(0, BM), col0 + tl.arange(0, BN)[None, :]  # [BM], [1, BN]
    live = row < n  # [BM]
    target = tl.load(t + row, mask=live, other=-1)[:, None]  # [BM, 1]
    m_row = tl.load(m + row, mask=live, other=0.0)[:, None]  # [BM, 1]
    a_row = tl.load(a + row, mask=live, other=0.0)[:, None]  # [BM, 1]
    b_row = tl.load(b + row, mask=live, other=0.0)[:, None]  # [BM, 1]
    g_row = tl.load(g + row, mask=live, other=0.0)[:, None]  # [BM, 1]
    x = _tile(h, w, n, V, D, sh, sw, row0, v + col0, inv_T, BM, BN, BK, UPCAST) - m_row  # [BM, BN]
    grad = tl.where(v + col == target, g_row, 0.0) + tl.exp(x) * (a_row + b_row * x)  # g·(1 - p) in fp32
    out = dz + row.to(tl.int64)[:, None] * c + col  # [BM, BN]    int64: N·c passes 2^31
    tl.store(out, grad.to(dz.dtype.element_ty), mask=live[:, None] & (col < c))  # the only rounding


def _dz_triton(h, w, t, m, a, b, g, v, c, inv_T, buffer):
    """dz [N, c] for the chunk of c words from v on, in the dtype of h."""
    (n, D), V, dz = h.shape, len(w), buffer[: len(h) * c].view(len(h), c)  # [N, c]
    _backward_kernel[(triton.cdiv(n, BM), triton.cdiv(c, BN))](
        h, w, t, m, a, b, g, dz, n, V, D, h.stride(0), w.stride(0), v, c, inv_T,
        BM, BN, BK_BYTES // h.element_size(), INTERPRET, **LAUNCH,
    )  # fmt: skip
    return dz


def _dz_torch(h, w_chunk, t, m, a, b, g, v, inv_T, buffer):
    """dz [N, c] for the chunk of c words from v on, in the dtype of h."""
    z = _tile_torch(h, w_chunk, buffer)  # [N, c]
    at, inside = _target_column(t, v, z.shape[1])  # [N, 1]
    m, a, b, g = (y[:, None] for y in (m, a, b, g))  # [N, 1]
    step = max(BLOCK // z.shape[1], 1)
    for R in (slice(r, r + step) for r in range(0, len(h), step)):
        x = z[R].to(m.dtype).mul_(inv_T).sub_(m[R])  # [R, c]
        e = x.exp()  # [R, c]
        grad = e.mul_(x.mul_(b[R]).add_(a[R]))  # [R, c]
        grad.scatter_add_(1, at[R], g[R] * inside[R])  # [R, c]      g·(1 - p) in fp32
        z[R] = grad  # [R, c]      the only rounding
    return z


# ----------------------------------------------------------------------------------- 5. the differentiable op


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, rows, temperature):
        h, t = (hidden, targets) if rows is None else (hidden[rows], targets[rows])  # [n, D], [n]
        # fp64, and CUDA without triton, take the torch path, which runs anywhere
        ctx.triton = triton is not None and (h.is_cuda or INTERPRET) and h.dtype != torch.float64
        if ctx.triton:  # the kernels want unit stride in D, and no more
            h, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (h, weight))
        with torch.cuda.device_of(h):  # triton launches on the current device
            forward = _forward_triton if ctx.triton else _forward_torch
            zt, stats = forward(h, weight, t, 1 / temperature)
        m, s, u = _merge(stats)  # [n]
        logp, entropy = (zt - m) - s.log(), s.log() - u / s  # [n]
        ctx.save_for_backward(h, weight, t, rows, m, s, entropy)
        ctx.shape, ctx.temperature = hidden.shape, temperature
        ctx.set_materialize_grads(False)
        if rows is None:
            return logp, entropy
        return tuple(y.new_zeros(len(targets)).index_copy_(0, rows, y) for y in (logp, entropy))  # [N]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, k):
        h, weight, t, rows, m, s, entropy = ctx.saved_tensors
        inv_T, V, C = 1 / ctx.temperature, len(weight), _chunk(h, len(weight))
        g = _upstream(g, rows, m) * inv_T  # [n]  contiguous, whatever strides came in
        k = _upstream(k, rows, m) * inv_T  # [n]
        a, b = (k * (s.log() - entropy) - g) / s, -k / s  # [n]
        dtype = h.dtype if ctx.triton else _gemm_dtype(h)
        h = h.to(dtype)  # [n, D]
        dh = torch.zeros_like(h, dtype=m.dtype) if ctx.needs_input_grad[0] else None  # [n, D]  fp32
        dw = torch.empty_like(weight) if ctx.needs_input_grad[1] else None  # [V, D]
        buffer = h.new_empty(len(h) * C)
        for v in range(0, V, C):
            w = weight[v : v + C].to(dtype)  # [c, D]
            if ctx.triton:
                dz = _dz_triton(h, weight, t, m, a, b, g, v, len(w), inv_T, buffer)  # [n, c]
            else:
                dz = _dz_torch(h, w, t, m, a, b, g, v, inv_T, buffer)  # [n, c]
            if dh is not None:
                dh = _add_product(dh, dz, w)  # [n, D]
            if dw is not None:
                _write_product(dw[v : v + C], dz.T, h, w)  # [c, D]  once; else w is a copy
            del w  # if it is an fp32 copy, it goes before the next one comes
        if dh is not None and rows is not None:
            dh = dh.new_zeros(ctx.shape).index_copy_(0, rows, dh)  # [N, D]
        return None if dh is None else dh.to(weight.dtype), dw, None, None, None


def _upstream(grad, rows, like):
    """The upstream gradient of the rows that are kept, [n]; zeros where the loss does not use the output."""
    if grad is None:
        return torch.zeros_like(like)
    return grad if rows is None else grad[rows]


def _add_product(total, x, y):
    """total + x @ y in the dtype of total, which may be wider."""
    if total.dtype == x.dtype:
        return total.addmm_(x, y)
    if total.is_cuda:
        return torch.addmm(total, x, y, out_dtype=total.dtype)  # no rounding to bf16 before the sum
    return total.add_(x @ y)


def _write_product(out, x, y, scratch):
    """out = x @ y, through a scratch of the same shape if out is narrower than they are."""
    if out.dtype == x.dtype:
        torch.mm(x, y, out=out)
    else:
        out.copy_(torch.mm(x, y, out=scratch))


def token_logprobs(hidden, weight, targets, temperature=1.0, ignore_index=-100):
    """(logp, entropy) of softmax(hidden @ weight.T / temperature) at targets, in nats, shaped like targets.

    hidden [..., D], weight [V, D], targets [...] int64. Outputs are fp32 (fp64 for fp64) and differentiable
    in hidden and weight. Positions whose target is ignore_index return 0 and cost nothing.
    """
    if weight.dim() != 2 or weight.numel() == 0 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden {[*hidden.shape]} and weight {[*weight.shape]} must be [..., D] and [V, D]")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets {[*targets.shape]} must be shaped like hidden {[*hidden.shape]} without D")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be finite and above 0, not {temperature}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, not {targets.dtype}")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # what autocast does for a linear layer; .to() is differentiable
        low = torch.get_autocast_dtype(device)
        hidden, weight = (x if x.dtype == torch.float64 else x.to(low) for x in (hidden, weight))
    if hidden.dtype != weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype} but weight is {weight.dtype}: cast one, or use autocast")
    t, V = targets.reshape(-1), len(weight)  # [N]
    keep = t != ignore_index  # [N]
    bad = keep & ((t < 0) | (t >= V))  # [N]
    n_keep, n_bad = torch.stack([keep.sum(), bad.sum()]).tolist()  # the one synchronisation with the device
    if n_bad:
        raise IndexError(f"{n_bad} targets are outside [0, {V}) and are not ignore_index={ignore_index}")
    rows = None if n_keep == len(t) else torch.nonzero_static(keep, size=n_keep)[:, 0]  # [n]
    with torch.autocast(device, enabled=False):
        out = _TokenLogProbs.apply(hidden.reshape(-1, hidden.shape[-1]), weight, t, rows, float(temperature))
    return out[0].view(targets.shape), out[1].view(targets.shape)
