"""What a fused decode step does between two products: kernels in Triton, each below its twin in torch.

The twins run where there is no Triton. A kernel has a program for each row, or for a part of one, so what
becomes of a row does not depend on the others.
"""

from __future__ import annotations  # without triton, tl.constexpr below is only a name

import os

import torch
import torch.nn.functional as F
from torch import nn

try:  # it comes with CUDA builds of torch
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:
    triton, jit = None, lambda kernel: kernel

FUSED = os.environ.get("FUSED_DECODING") == "1"  # not the default before a GPU has measured it
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # tests: the kernels run in Python, on CPU tensors
ATTENTION = "kernel"  # or "library", which reads all columns of the buffers
COLUMNS = 64  # that attention reads at a time
LAUNCH = {"num_warps": 4, "num_stages": 2}  # of attention


def runs_kernels(x):
    return triton is not None and (x.is_cuda or INTERPRET)


# ---- 1 and 6: add to the residual, RMSNorm ---------------------------------------------------------------


def add_norm(x, new, norm, dtype):
    """x += new, in place; the normalised x, [B, width], in this dtype."""
    if not runs_kernels(x):
        if new is not None:
            x += new
        return norm(x).to(dtype)
    (B, width), out = x.shape, torch.empty(x.shape, dtype=dtype, device=x.device)
    size = triton.next_power_of_2(width)
    some = x if new is None else new
    _add_norm[(B,)](x, some, norm.weight, out, norm.variance_epsilon, width, size, new is not None)
    return out


@jit
def _add_norm(x, new, weight, out, epsilon, width, SIZE: tl.constexpr, ADD: tl.constexpr):
    """One program: one row."""
    d = tl.arange(0, SIZE)  # [SIZE]
    at, inside = tl.program_id(0).to(tl.int64) * width + d, d < width
    h = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)  # [SIZE]
    if ADD:
        h += tl.load(new + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(x + at, h.to(x.dtype.element_ty), mask=inside)
    h *= 1.0 / tl.sqrt(tl.sum(h * h, 0) / width + epsilon)
    h *= tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, h.to(out.dtype.element_ty), mask=inside)


# ---- 3: q and k turned by their position, k and v into the cache -----------------------------------------


def turn(qkv, attention, cos, sin, position, keys, values, column):
    """Queries [B, q heads, D] in the dtype of the cache; writes keys and values [B, heads, columns, D]."""
    (B, heads, columns, D), (q_norm, k_norm) = keys.shape, head_norms(attention)
    queries = qkv.shape[1] // D - 2 * heads
    if not runs_kernels(qkv):
        q, k, v = qkv.view(B, -1, D).split([queries, heads, heads], 1)
        q, k = q_norm(q), k_norm(k)
        cos, sin = cos[position, None], sin[position, None]  # [B, 1, D]
        q, k = (x * cos + torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1) * sin for x in (q, k))
        for buffer, new in ((keys, k), (values, v)):
            buffer.index_copy_(2, column, new[:, :, None].to(buffer.dtype))
        return q.to(keys.dtype)
    assert keys.is_contiguous() and values.is_contiguous()
    q, normed = (
        torch.empty(B, queries, D, dtype=keys.dtype, device=keys.device),
        type(q_norm) is not nn.Identity,
    )
    weights = (q_norm.weight, k_norm.weight, q_norm.variance_epsilon) if normed else (qkv, qkv, 0.0)
    size = triton.next_power_of_2(queries + 2 * heads)
    sizes = (queries, heads, columns, D, size, normed)
    _turn[(B,)](qkv, *weights, cos, sin, position, position.stride(0), q, keys, values, column, *sizes)
    return q


def head_norms(attention):
    """Qwen3 normalises each head of q and k."""
    return getattr(attention, "q_norm", nn.Identity()), getattr(attention, "k_norm", nn.Identity())


@jit
def _turn(qkv, q_weight, k_weight, epsilon, cos, sin, position, stride, q, keys, values, column, Q, K,
          columns, D: tl.constexpr, SIZE: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """One program: all heads of one row, Q of queries, K of keys and K of values."""
    row, head, d = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)[:, None], tl.arange(0, D)[None, :]
    other = (d + D // 2) % D  # where the other half is
    at, inside = qkv + (row * (Q + 2 * K) + head) * D, head < Q + 2 * K
    x = tl.load(at + d, mask=inside, other=0.0).to(tl.float32)  # [SIZE, D]
    y = tl.load(at + other, mask=inside, other=0.0).to(tl.float32)  # [SIZE, D]
    v = x
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 1)[:, None] / D + epsilon)  # [SIZE, 1]
        low = qkv.dtype.element_ty  # the norm rounds before it multiplies by its weight
        x, y = (x * scale).to(low).to(tl.float32), (y * scale).to(low).to(tl.float32)
        x *= tl.where(head < Q, tl.load(q_weight + d), tl.load(k_weight + d))
        y *= tl.where(head < Q, tl.load(q_weight + other), tl.load(k_weight + other))
    angle = tl.load(position + row * stride) * D + d  # [1, D]
    x = x * tl.load(cos + angle) + tl.where(d < D // 2, -y, y) * tl.load(sin + angle)
    tl.store(q + (row * Q + head) * D + d, x.to(q.dtype.element_ty), mask=head < Q)
    to = ((row * K + head - Q) * columns + tl.load(column)) * D + d  # [SIZE, D]
    tl.store(keys + to, x.to(keys.dtype.element_ty), mask=(head >= Q) & (head < Q + K))
    to -= K * columns * D
    tl.store(values + to, v.to(values.dtype.element_ty), mask=(head >= Q + K) & inside)


# ---- 4: attention ----------------------------------------------------------------------------------------


def attend(q, keys, values, mask, column):
    """[B, q heads x D] of queries [B, q heads, D]; the mask [B, 1, 1, columns] is added to scores."""
    (B, queries, D), heads, visible = q.shape, keys.shape[1], mask.shape[-1]
    if ATTENTION == "library" or not runs_kernels(q):
        keys, values = keys[:, :, :visible], values[:, :, :visible]
        groups = q.view(B, heads, -1, D)  # queries that share keys stand side by side
        return F.scaled_dot_product_attention(groups, keys, values, attn_mask=mask).reshape(B, -1)
    out, group = torch.empty_like(q), queries // heads
    size = max(16, triton.next_power_of_2(group))  # of a product's rows
    sizes = (group, keys.shape[2], D, size, COLUMNS, INTERPRET)
    _attend[(B, heads)](q, keys, values, mask, mask.stride(0), column, out, D**-0.5, *sizes, **LAUNCH)
    return out.view(B, -1)


@jit
def _attend(q, keys, values, mask, stride, column, out, scale, G, columns, D: tl.constexpr,
            SIZE: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """One program: G queries of one row and one head of keys, by a softmax that is summed as it goes."""
    row, head, heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    g, d = tl.arange(0, SIZE)[:, None], tl.arange(0, D)
    at = ((row * heads + head) * G + g) * D + d[None, :]  # [SIZE, D]
    queries = tl.load(q + at, mask=g < G, other=0.0)  # [SIZE, D]
    if UPCAST:  # the interpreter's dot would multiply the raw bits of bf16
        queries = queries.to(tl.float32)
    start, end = (row * heads + head) * columns * D, tl.load(column) + 1
    m = tl.full((SIZE,), -1e30, tl.float32)  # finite: the first columns may all be masked
    s = tl.zeros((SIZE,), tl.float32)
    total = tl.zeros((SIZE, D), tl.float32)
    for first in range(0, end, BN):
        n = first + tl.arange(0, BN)  # [BN]
        k = tl.load(keys + start + n[None, :] * D + d[:, None], mask=n[None, :] < end, other=0.0)  # [D, BN]
        v = tl.load(values + start + n[:, None] * D + d[None, :], mask=n[:, None] < end, other=0.0)  # [BN, D]
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        seen = tl.load(mask + row * stride + n, mask=n < end, other=-float("inf")).to(tl.float32)  # [BN]
        z = tl.dot(queries, k, input_precision="ieee") * scale + seen[None, :]  # [SIZE, BN]
        m_new = tl.maximum(m, tl.max(z, 1))  # [SIZE]
        e, d_m = tl.exp(z - m_new[:, None]), tl.exp(m - m_new)
        s = s * d_m + tl.sum(e, 1)
        total = tl.dot(e.to(v.dtype), v, total * d_m[:, None], input_precision="ieee")  # [SIZE, D]
        m = m_new
    tl.store(out + at, (total / s[:, None]).to(out.dtype.element_ty), mask=g < G)


# ---- 8: SiLU(gate) times up ------------------------------------------------------------------------------


def swiglu(both):
    """[B, width] from gate and up side by side, [B, 2 x width]."""
    B, width = both.shape[0], both.shape[1] // 2
    if not runs_kernels(both):
        gate, up = both.split(width, 1)
        return F.silu(gate) * up
    out = torch.empty(B, width, dtype=both.dtype, device=both.device)
    _swiglu[(B, triton.cdiv(width, 1024))](both, out, width, 1024)
    return out


@jit
def _swiglu(both, out, width, SIZE: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    gate = tl.load(both + row * 2 * width + d, mask=d < width, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + d, mask=d < width, other=0.0).to(tl.float32)
    low = out.dtype.element_ty
    gate = (gate / (1.0 + tl.exp(-gate))).to(low).to(tl.float32)  # silu's result is rounded, too
    tl.store(out + row * width + d, (gate * up).to(low), mask=d < width)
