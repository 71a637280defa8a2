"""A decode step with few kernels, for Llama, Qwen2 and Qwen3; `stand_in` takes the place of the model.

A recorded step of transformers' model has about 45 kernels a layer, and most of them only move numbers to
memory that the next one reads. Here a layer has nine:

    1 add to the residual, RMSNorm        6 add to the residual, RMSNorm
    2 product: q, k and v                 7 product: gate and up
    3 q and k turned, k and v cached      8 SiLU(gate) times up
    4 attention                           9 product: down
    5 product: output

Products are the library's, the others are in `fused_ops`. Numbers are rounded to bf16 where autocast rounds
them in the model: what enters a product and what leaves it, q, k and v once they are turned, SiLU(gate), and
its product with up. The residual, the norms and the turning are fp32.

Other models, and RoPE that depends on the longest position, keep the model's own forward pass.
"""

from itertools import pairwise
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from common.plumbing import fused_ops as ops
from common.plumbing import models

FAMILY = (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)


def stand_in(model, length):
    """What decodes in the place of the model, rows of at most `length` tokens; the model, if nothing can."""
    device = model.device.type
    known = ops.FUSED and type(model) in FAMILY and model.config.hidden_act == "silu"
    if not known or (device == "cuda" and ops.triton is None):
        return model
    width = model.model.layers[0].self_attn.head_dim
    if width < 16 or width & (width - 1):  # the kernels want a power of 2
        return model
    return Step(model, length)


# ---- the step --------------------------------------------------------------------------------------------


class Step:
    """Called like the model in a decode step, with one token a row and buffers in the cache."""

    def __init__(self, model, length):
        base, self.head, self.embed = model.model, model.lm_head, model.model.embed_tokens
        position = torch.arange(length, device=model.device)[None]
        angles = base.rotary_emb(self.embed.weight, position)
        self.cos, self.sin = (x[0].contiguous() for x in angles)  # [length, D]
        self.layers, self.norm = base.layers, base.norm

        own = any(model is copy for copy in models.COPIES.values())  # nobody else trains these weights
        for layer in self.layers:
            if own:
                join(queries_keys_values(layer))
                join(gate_and_up(layer))

    def __call__(self, token, attention_mask, position_ids, past_key_values):
        cache, position = past_key_values, position_ids[:, 0]  # [B]
        dtype = self.head.weight.dtype  # of what enters a product
        x, new = self.embed(token[:, 0]), None  # residual, [B, width]; what is to be added to it
        for layer, buffers in zip(self.layers, cache.layers, strict=True):
            keys, values = buffers.keys, buffers.values
            h = ops.add_norm(x, new, layer.input_layernorm, dtype)
            qkv = products(h, queries_keys_values(layer))
            q = ops.turn(qkv, layer.self_attn, self.cos, self.sin, position, keys, values, cache.column)
            mixed = ops.attend(q, keys, values, attention_mask, cache.column)
            new = product(mixed, layer.self_attn.o_proj)
            h = ops.add_norm(x, new, layer.post_attention_layernorm, dtype)
            new = product(ops.swiglu(products(h, gate_and_up(layer))), layer.mlp.down_proj)
        logits = product(ops.add_norm(x, new, self.norm, dtype), self.head)
        return SimpleNamespace(logits=logits[:, None])  # [B, 1, V]


# ---- products --------------------------------------------------------------------------------------------


def queries_keys_values(layer):
    return [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]


def gate_and_up(layer):
    return [layer.mlp.gate_proj, layer.mlp.up_proj]


def product(x, layer):
    return F.linear(x, layer.weight, layer.bias)


def products(x, layers):
    """What these layers make of x, side by side; one product if their weights are neighbours in memory."""
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    if not neighbours(weights) or (biases[0] is not None and not neighbours(biases)):
        return torch.cat([product(x, layer) for layer in layers], -1)
    return F.linear(x, whole(weights), None if biases[0] is None else whole(biases))


def neighbours(tensors):
    """Whether each begins where the one before ends, in the same memory."""
    same = len({x.untyped_storage().data_ptr() for x in tensors}) == 1
    return same and all(a.data_ptr() + a.nbytes == b.data_ptr() for a, b in pairwise(tensors))


def whole(tensors):
    first = tensors[0]
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())


@torch.no_grad()
def join(layers):
    """Move the weights next to each other. `sampler` refreshes them in place, so they stay there."""
    for name in ("weight", "bias"):
        old = [getattr(layer, name) for layer in layers]
        if old[0] is None or neighbours(old):
            continue
        parts = torch.cat(old).split([len(x) for x in old])
        for layer, part in zip(layers, parts):
            setattr(layer, name, nn.Parameter(part, requires_grad=False))
