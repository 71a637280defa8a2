"""Log-probability and entropy of each target token, straight from hidden states, without [N, V] logits.

With z = h·Wᵀ / T, p = softmax(z):  logp = z_t - lse,  entropy = lse - Σ p·z, both in nats.
The vocabulary is visited in chunks; the backward pass recomputes each chunk of z:
    dz = gl·onehot(t) - p·(gl + ge·(z - lse + entropy)),    dh = dz·W / T,    dW = dzᵀ·h / T.
"""

import math

import torch


def token_logprobs(hidden, weight, targets, temperature=1.0, ignore_index=-100):
    """(logp, entropy) of softmax(hidden @ weight.T / temperature) at targets, in nats, shaped like targets.

    hidden [..., D], weight [V, D], targets [...] int64. Outputs are fp32 (fp64 for fp64) and differentiable
    in hidden and weight. Positions whose target is ignore_index return 0 and cost nothing.
    """
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"need hidden [..., D] and weight [V, D], got {[*hidden.shape]} and {[*weight.shape]}"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets {[*targets.shape]} must have the shape {[*hidden.shape[:-1]]} of hidden[..., 0]"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be finite and > 0, got {temperature}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # .to is differentiable, so fp32 master weights get fp32 gradients
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = (x if x.dtype == torch.float64 else x.to(dtype) for x in (hidden, weight))
    if hidden.dtype != weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype} but weight is {weight.dtype}")
    t = targets.reshape(-1)  # [N]
    keep = t != ignore_index  # [N]
    bad = keep & ((t < 0) | (t >= weight.shape[0]))  # [N]
    n_keep, n_bad = torch.stack([keep.sum(), bad.sum()]).tolist()
    if n_bad:
        raise IndexError(
            f"{n_bad} targets are outside [0, {weight.shape[0]}) and are not ignore_index={ignore_index}"
        )
    rows = None if n_keep == t.numel() else torch.nonzero_static(keep, size=n_keep).view(-1)  # [n]
    h = hidden.reshape(-1, hidden.shape[-1])  # [N, D]
    with torch.autocast(device, enabled=False):
        logp, entropy = _TokenLogProbs.apply(h, weight, t, rows, float(temperature))
    return logp.view(targets.shape), entropy.view(targets.shape)


def _chunk(n):
    return min(max(2**24 // max(n, 1), 512), 4096)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, rows, temperature):
        h, t = (hidden, targets) if rows is None else (hidden[rows], targets[rows])  # [n, D], [n]
        acc = torch.promote_types(h.dtype, torch.float32)
        logp, ls, es = torch.zeros(len(t), dtype=acc, device=h.device), [], []
        for v in range(0, weight.shape[0], _chunk(len(t))):
            w = weight[v : v + _chunk(len(t))]  # [C, D]
            z = (h @ w.T).to(acc).mul_(1 / temperature)  # [n, C]
            at = (t - v).clamp(0, len(w) - 1)[:, None]
            logp = torch.where((t >= v) & (t < v + len(w)), z.gather(1, at)[:, 0], logp)
            m = z.amax(1, keepdim=True)
            x = z.sub_(m)
            e = x.exp()
            s = e.sum(1)
            ls.append(m[:, 0] + s.log())
            es.append(s.log() - e.mul_(x).sum(1) / s)
        L, E = torch.stack(ls), torch.stack(es)  # [S, n]
        lse = L.logsumexp(0)
        lw = L - lse
        entropy = (lw.exp() * (E - lw)).sum(0)
        ctx.save_for_backward(h, weight, t, rows, lse, entropy)
        ctx.temperature, ctx.n = temperature, len(targets)
        outs = logp - lse, entropy
        return outs if rows is None else tuple(o.new_zeros(ctx.n).index_copy_(0, rows, o) for o in outs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gl, ge):
        h, weight, t, rows, lse, entropy = ctx.saved_tensors
        gl, ge = (g if rows is None else g[rows] for g in (gl, ge))
        dh = torch.zeros_like(h, dtype=lse.dtype) if ctx.needs_input_grad[0] else None
        dw = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for v in range(0, weight.shape[0], _chunk(len(t))):
            w = weight[v : v + _chunk(len(t))]  # [C, D]
            x = (h @ w.T).to(lse.dtype).mul_(1 / ctx.temperature).sub_(lse[:, None])  # [n, C]
            dz = -x.exp() * (gl[:, None] + ge[:, None] * (x + entropy[:, None]))
            here = ((t >= v) & (t < v + len(w))).nonzero()[:, 0]
            dz[here, t[here] - v] += gl[here]
            dz = (dz / ctx.temperature).to(h.dtype)
            if dh is not None:
                dh += dz @ w
            if dw is not None:
                torch.mm(dz.T, h, out=dw[v : v + len(w)])
        if dh is not None and rows is not None:
            dh = dh.new_zeros(ctx.n, dh.shape[1]).index_copy_(0, rows, dh)
        return None if dh is None else dh.to(h.dtype), dw, None, None, None
