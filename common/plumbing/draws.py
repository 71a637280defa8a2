"""One token for each row of logits [B, V]: token i with probability softmax(logits / T)_i, and its logarithm.

The draw is an exponential race. Runner i has weight w_i and takes the time e_i / w_i, with e_i from Exp(1).
The first to arrive is i with probability w_i / Σ_j w_j, so argmax w_i / e_i is a draw, and unlike multinomial
it never makes the host wait. In torch, below, that is seven kernels over fp32 [B, V], which take 1.4 ms for
512 rows of 152k words on an H100. The kernels here read the logits once, in the dtype that they have.

They draw in two stages, from disjoint parts of the vocabulary, with z = logits / T:

    P(word) = P(part)·P(word | part)

1. of each part:    m = max z,    s = Σ e^(z - m)
2. of each row:     M = max m,    W_part = s·e^(m - M),    log Σ e^z = M + log Σ W
                    a race between the parts with weights W, then, in the part that has won,
                    a race between its words with weights e^(z - m)

So only the words of one part need noise. It comes from Philox, a function of a key and a counter: the key is
a number from the generator, new for every call, and the counter is the runner's. A CUDA graph in which the
generator is registered draws a new key in every replay. T = 0 takes the likeliest word, and the logarithm of
its probability at T = 1.
"""

from __future__ import annotations  # without triton, tl.constexpr below is only a name

import torch

from common.plumbing import fused_ops

try:  # it comes with CUDA builds of torch; one binary serves every batch size B
    import triton
    import triton.language as tl

    jit = triton.jit(do_not_specialize=["B"])
except ImportError:
    triton, jit = None, lambda kernel: kernel

ROWS, PART = 1, 4096  # a program has so many rows and words


def race(logits, temperature, generator):
    """From logits [B, V]: a token of each row and its log-probability, both [B]."""
    fused = fused_ops.FUSED and fused_ops.runs_kernels(logits)
    return (_race_triton if fused else _race_torch)(logits, temperature, generator)


def _race_torch(logits, temperature, generator):
    logits = logits.float()  # before any softmax
    p = (logits / (temperature or 1.0)).softmax(-1)
    if temperature:
        noise = torch.empty_like(p).exponential_(generator=generator)
        token = (p / noise).argmax(-1, keepdim=True)  # [B, 1]
    else:
        token = logits.argmax(-1, keepdim=True)
    logp = p.gather(1, token).log()  # [B, 1]
    return token[:, 0], logp[:, 0]


@jit
def _exponential(key, counter):
    """Numbers from Exp(1), all above 0, one for each counter."""
    bits = tl.randint(key, counter).to(tl.uint32, bitcast=True)
    u = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # times 2^-32: above 0,
    u = tl.minimum(u, 0.99999994)  # and below 1, to which the largest would be rounded
    # -log(1 - u). Small numbers win races, and 1 - u would round them to multiples of 2^-24
    series = u * (1.0 + u * (0.5 + u * 0.3333333333))
    return tl.where(u < 0.02, series, -tl.log(1.0 - u))


@jit
def _parts_kernel(logits, stats, B, V, stride, parts, inv_T, ROWS: tl.constexpr, PART: tl.constexpr):
    """One program: m and s of one part of ROWS rows."""
    row, part = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)  # [ROWS]
    word = part * PART + tl.arange(0, PART)[None, :]  # [1, PART]
    inside = (row[:, None] < B) & (word < V)  # [ROWS, PART]
    at = row[:, None].to(tl.int64) * stride + word  # [ROWS, PART]    int64: B·V passes 2^31
    z = tl.load(logits + at, mask=inside, other=-float("inf")).to(tl.float32) * inv_T  # [ROWS, PART]
    m = tl.maximum(tl.max(z, 1), -1e30)  # [ROWS]    finite: s = 0 where no word is possible
    out = stats + row * 2 * parts + part  # [ROWS]    stats [B, 2, parts]
    tl.store(out, m, mask=row < B)
    tl.store(out + parts, tl.sum(tl.exp(z - m[:, None]), 1), mask=row < B)


@jit
def _race_kernel(logits, stats, key, token, logp, B, V, stride, parts, inv_T, ROWS: tl.constexpr,
                 PART: tl.constexpr, PARTS: tl.constexpr, SAMPLE: tl.constexpr):  # fmt: skip
    """One program: the race of ROWS rows; PARTS is the number of parts, rounded up to a power of 2."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    part, lane = tl.arange(0, PARTS)[None, :], tl.arange(0, PART)[None, :]  # [1, PARTS], [1, PART]
    inside = (row[:, None] < B) & (part < parts)  # [ROWS, PARTS]
    at = row[:, None] * 2 * parts + part  # [ROWS, PARTS]
    m = tl.load(stats + at, mask=inside, other=-1e30)  # [ROWS, PARTS]
    s = tl.load(stats + at + parts, mask=inside, other=0.0)  # [ROWS, PARTS]
    M = tl.max(m, 1)  # [ROWS]
    W = s * tl.exp(m - M[:, None])  # [ROWS, PARTS]
    if SAMPLE:
        seed = tl.load(key)
        first = row[:, None].to(tl.int64) * (PARTS + PART)  # each runner of each row has its own counter
        winner = tl.argmax(W / _exponential(seed, first + part), 1)  # [ROWS]
    else:
        winner = tl.argmax(m, 1)  # [ROWS]    of equals the first
    word = winner[:, None] * PART + lane  # [ROWS, PART]
    inside = (row[:, None] < B) & (word < V)  # [ROWS, PART]
    at = row[:, None].to(tl.int64) * stride + word  # [ROWS, PART]
    z = tl.load(logits + at, mask=inside, other=-float("inf")).to(tl.float32) * inv_T  # [ROWS, PART]
    score = z
    if SAMPLE:
        score = tl.exp(z - tl.max(z, 1)[:, None]) / _exponential(seed, first + PARTS + lane)  # [ROWS, PART]
    place = tl.argmax(score, 1)  # [ROWS]
    z_place = tl.max(tl.where(lane == place[:, None], z, -float("inf")), 1)  # [ROWS]
    tl.store(token + row, tl.minimum(winner * PART + place, V - 1).to(tl.int64), mask=row < B)
    tl.store(logp + row, (z_place - M) - tl.log(tl.sum(W, 1)), mask=row < B)


def _race_triton(logits, temperature, generator):
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    (B, V), parts, device = logits.shape, triton.cdiv(logits.shape[1], PART), logits.device
    stats = torch.empty(B, 2, parts, device=device)
    token = torch.empty(B, dtype=torch.int64, device=device)
    logp = torch.empty(B, device=device)
    key = torch.empty(1, dtype=torch.int64, device=device)
    if temperature:
        key.random_(generator=generator)
    sizes = (B, V, logits.stride(0), parts, 1 / (temperature or 1.0), ROWS, PART)
    blocks, power = triton.cdiv(B, ROWS), triton.next_power_of_2(parts)
    with torch.cuda.device_of(logits):  # triton launches on the current device
        _parts_kernel[(blocks, parts)](logits, stats, *sizes)
        _race_kernel[(blocks,)](logits, stats, key, token, logp, *sizes, power, temperature > 0, num_warps=8)
    return token, logp
