"""Decoding: the key-value cache under every script's `sample`, and how prompts are batched for it."""

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from common.plumbing import ranks


def batches(rows, size, lengths):
    """This rank's part of the row numbers `rows`, every n-th, as tensors of at most `size` rows.

    `rows` come shortest first, and only rows of similar `lengths` are padded together: beside
    a demonstration of thousands of tokens a short prompt would take as much of the key-value
    cache.
    """
    rank, world_size = ranks.shard()
    parts = []
    for i in rows[rank::world_size]:
        if not parts or len(parts[-1]) == size or lengths[i] > 2 * lengths[parts[-1][0]] + 256:
            parts.append([])
        parts[-1].append(i)
    return [torch.tensor(part) for part in parts]


class Cache(DynamicCache):
    """transformers' keys and values, in the dtype of activations and with space for tokens to come.

    RoPE's cosines are fp32 where the weights are, so under autocast bf16 keys come out of it
    as fp32. The cache would take twice the memory and would be cast to bf16 again for every
    token that is sampled.
    """

    def __init__(self, config):
        super().__init__(config=config)
        for i, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:  # a layer with a sliding window holds few tokens anyway
                self.layers[i] = RoomyLayer()

    def update(self, keys, values, *args, **kwargs):
        device = keys.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            keys = keys.to(dtype)
            values = values.to(dtype)
        return super().update(keys, values, *args, **kwargs)


class RoomyLayer(DynamicLayer):
    """Keys and values [B, heads, T, D] of a layer: views of buffers that grow by `SPARE` tokens at once.

    transformers' own layer copies all that it holds for each new token. After a few hundred
    tokens that takes longer than attending to them.
    """

    SPARE = 32
    buffers = ()

    def update(self, keys, values, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        seen = self.get_seq_length()
        end = seen + keys.shape[-2]
        if not self.buffers or self.buffers[0].shape[-2] < end:
            self.buffers = [
                F.pad(torch.cat([old, new], -2), (0, 0, 0, self.SPARE))
                for old, new in ((self.keys, keys), (self.values, values))
            ]
        else:
            for buffer, new in zip(self.buffers, (keys, values)):
                buffer[:, :, seen:end] = new
        self.view(end)
        return self.keys, self.values

    def view(self, end):
        """Show the first `end` tokens of the buffers as keys and values."""
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)

    def batch_select_indices(self, indices):
        if self.buffers:  # a layer that shares the keys of another has none
            seen = self.get_seq_length()
            self.buffers = [buffer[indices] for buffer in self.buffers]
            self.view(seen)
