"""The decode step under every script's `sample`: the cache, rows that leave, and how a GPU replays a step.

A step appends one token to every row of a batch. Prompts are padded on the left, so all rows write the same
column of the key-value buffers. Buffers, mask and tokens keep their addresses from step to step and are
changed in place, and a step never asks the host. So it can be recorded as a CUDA graph and replayed: its
thousand kernels take far longer to launch from Python than to run. On a CPU the same lines run eagerly.
Only between steps does the host look at the rows, drop those that have finished, and add columns.
"""

import torch
import torch.nn.functional as F
from transformers import DynamicCache

import common.tokenization as tok
from common.plumbing import cuda_graph, fused_step, models, ranks

# a look costs a CPU nothing and a GPU a stop; new shapes cost a GPU a recording, about 0.2 s
LOOK = {"cpu": 1, "cuda": 32}  # steps between two looks at the rows
COLUMNS = {"cpu": 32, "cuda": 256}  # buffers grow by so many
LEAVE = {"cpu": 0.9, "cuda": 0.5}  # finished rows leave when a smaller share is alive
RECORD = {"cpu": False, "cuda": True}
ENDED = []  # functions that are told how many rows have ended since the last time


def batches(rows, sizes, lengths):
    """This rank's part of the row numbers `rows`, every n-th, in tensors, shortest first.

    `sizes` says of each row how many of its length are sampled at once. What is padded together has similar
    `lengths`: beside a prompt that ends in a long demonstration, a short one would take as much of the cache.
    """
    rank, world_size = ranks.shard()
    parts = []
    for row in sorted(rows, key=lambda row: lengths[row])[rank::world_size]:
        part = parts[-1] if parts else []
        full = len(part) >= sizes[row]  # this row is the longest so far
        if not part or full or lengths[row] > 2 * lengths[part[0]] + 256:
            parts.append([])
        parts[-1].append(row)
    return [torch.tensor(part) for part in parts]


# ---- keys and values -------------------------------------------------------------------------------------


class Cache(DynamicCache):
    """Keys and values in the dtype of activations; after `fix` in buffers [B, heads, columns, D] per layer.

    RoPE's cosines are fp32, so under autocast bf16 keys become fp32. Cached like that they would take twice
    the memory and be cast again for every token that is sampled.
    """

    checked = True  # `Batch` has looked whether the model has the positions: no step asks again

    def __init__(self, config):
        super().__init__(config=config)
        self.column = None  # where a step writes, [1]; None until `fix`
        self.visible = 0  # columns that attention sees
        self.exact = False  # whether the last of these is the one that a step writes

    def update(self, keys, values, layer_idx, *args, **kwargs):
        if self.column is None:  # prompts, or a model whose cache transformers manages
            kind = keys.device.type
            if torch.is_autocast_enabled(kind):
                dtype = torch.get_autocast_dtype(kind)
                keys, values = keys.to(dtype), values.to(dtype)
            return super().update(keys, values, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        return self.write(layer.keys, keys), self.write(layer.values, values)

    def write(self, buffer, new):
        """Put what is new into its column; what attention reads."""
        if self.exact:  # on a CPU twice as fast
            buffer[:, :, self.visible - 1 : self.visible] = new
        else:
            buffer.index_copy_(2, self.column, new.to(buffer.dtype))
        return buffer[:, :, : self.visible]

    def fix(self, rows, more):
        """These rows of the prompts, with `more` columns, of which the first is written first."""
        layer = self.layers[0]
        self.column = torch.tensor([layer.keys.shape[2]], device=layer.keys.device)
        self.grow(more)
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]

    def grow(self, more):
        for layer in self.layers:  # one by one: only of one layer there are two copies at a time
            layer.keys = F.pad(layer.keys, (0, 0, 0, more))
            layer.values = F.pad(layer.values, (0, 0, 0, more))

    def move(self, sources, targets, rows):
        """Copy the rows `sources` over the rows `targets`; only the first `rows` rows stay."""
        for layer in self.layers:
            for buffer in (layer.keys, layer.values):
                buffer.index_copy_(0, targets, buffer.index_select(0, sources))
            layer.keys, layer.values = layer.keys[:rows], layer.values[:rows]


# ---- a batch ---------------------------------------------------------------------------------------------


class Batch:
    """Rows that are decoded side by side. A row has one prompt, or one in each of several contexts.

    `prompts` has the contexts of a row next to each other, `budgets` a number of tokens per row. A draw may
    read `slot` [B], each row's number at the start (rows leave and move), and `t` [1], tokens drawn so far.
    """

    @torch.no_grad()
    def __init__(self, model, prompts, budgets, contexts=1):
        lengths = [len(prompt) + budgets[i // contexts] for i, prompt in enumerate(prompts)]
        models.demand_positions(model, max(lengths) - 1)  # the last token that is drawn is not read
        self.model, self.contexts, self.device = model, contexts, model.device
        self.width = max(map(len, prompts))

        rows = self.unfinished = len(budgets)
        self.budget = torch.tensor(budgets, device=self.device)
        self.alive = self.budget > 0
        self.slot = torch.arange(rows, device=self.device)
        self.t = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.ids = torch.full((rows, max(budgets)), -1, device=self.device)  # -1: not sampled
        self.logps = torch.zeros(self.ids.shape, device=self.device)
        self.read(prompts)

    def read(self, prompts):
        """Keys, values and logits of the prompts; one that several rows have is read once."""
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        place = {prompt: i for i, prompt in enumerate(distinct)}
        tokens, mask = tok.pad(distinct, side="left", device=self.device)  # [distinct, width]
        position = (mask.cumsum(1) - 1).clamp(min=0)  # counts real tokens: padding shifts nothing
        self.cache = Cache(self.model.config)
        inputs = dict(attention_mask=mask, position_ids=position, past_key_values=self.cache)
        logits = self.model(tokens, **inputs, logits_to_keep=1).logits  # [distinct, 1, V]

        copies = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=self.device)
        self.logits = logits[copies, -1]
        self.position = position[copies, -1:]  # [B, 1], of the last token
        self.token = torch.zeros_like(self.position)  # [B, 1], the last token
        not_fixed, self.not_recorded = cuda_graph.obstacles(self.model, self.cache)
        if not_fixed:
            self.cache.batch_select_indices(copies)
            self.mask = mask[copies]  # [B, columns], 1 on what is read
            return
        more = self.columns(self.width) - self.width
        self.cache.fix(copies, more)
        # added to the scores of attention; what has four dimensions transformers leaves as it is
        dtype = self.cache.layers[0].keys.dtype
        mask = torch.zeros(mask.shape, dtype=dtype, device=self.device).masked_fill(mask == 0, -torch.inf)
        self.mask = F.pad(mask, (0, more), value=-torch.inf)[copies, None, None]  # [B, 1, 1, columns]
        if not self.not_recorded:
            self.model = fused_step.stand_in(self.model, self.width + self.ids.shape[1])

    def next_logits(self):
        """Logits after the last token, [B x contexts, V], in the dtype of activations."""
        if self.cache.column is None:
            self.mask = mask = F.pad(self.mask, (0, 1), value=1)
        else:
            self.mask.index_fill_(3, self.cache.column, 0.0)  # a token sees the column that it writes
            mask = self.mask[..., : self.cache.visible]
        inputs = dict(attention_mask=mask, position_ids=self.position, past_key_values=self.cache)
        logits = self.model(self.token, **inputs).logits[:, -1]
        if self.cache.column is not None:
            self.cache.column += 1
        return logits

    def append(self, token, logp, ended):
        """What has been drawn, all [B]; nothing is kept of finished rows, and their position stays."""
        where = (self.slot, self.t.expand_as(token))
        self.ids.index_put_(where, token.masked_fill(~self.alive, -1))
        self.logps.index_put_(where, logp)
        self.t += 1
        self.alive &= ~ended & (self.budget > self.t)
        self.token.view(-1, self.contexts).copy_(token[:, None])
        self.position.view(-1, self.contexts).add_(self.alive[:, None])

    def columns(self, used):
        """Columns of buffers of which `used` are in use; the longest budget needs no more."""
        need = min(used + COLUMNS[self.device.type], self.width + self.ids.shape[1])
        return -(-need // 16) * 16  # kernels of attention want multiples of 16

    def look(self, t, steps):
        """Before `steps` steps, beginning with token t: how many rows are alive, and did tensors move?"""
        alive = int(self.alive.sum())  # the only place where the host waits for the device
        leave = 0 < alive < LEAVE[self.device.type] * len(self.alive)
        if leave:
            self.leave(alive)
        used, columns = self.width + t - 1, self.mask.shape[-1]
        grow = self.cache.column is not None and used + steps > columns
        if grow:
            more = self.columns(used) - columns
            self.cache.grow(more)
            self.mask = F.pad(self.mask, (0, more), value=-torch.inf)
        # attention need not see columns before they are written, but a recorded step always sees the same
        self.cache.exact = LOOK[self.device.type] == 1
        self.cache.visible = used + 1 if self.cache.exact else self.mask.shape[-1]
        return alive, leave or grow

    def leave(self, rows):
        """Only the `rows` alive stay: the last of them take the seats of finished ones in front."""
        free = (~self.alive[:rows]).nonzero()[:, 0]
        order = torch.arange(rows, device=self.device)
        order[free] = self.alive[rows:].nonzero()[:, 0] + rows
        self.alive, self.budget, self.slot = self.alive[order], self.budget[order], self.slot[order]

        # rows of the model's batch: those of each context
        context = torch.arange(self.contexts, device=self.device)
        targets = (free[:, None] * self.contexts + context).flatten()
        order = (order[:, None] * self.contexts + context).flatten()
        self.token, self.position, self.mask = self.token[order], self.position[order], self.mask[order]
        if self.cache.column is None:
            self.cache.batch_select_indices(order)
        else:
            self.cache.move(order[targets], targets, len(order))

    def tell_bar(self, alive):
        for function in ENDED:
            function(self.unfinished - alive)
        self.unfinished = alive

    @torch.no_grad()
    def decode(self, draw, generator=None):
        """Ids and log-probabilities, [B, budget] on the CPU; -1 and 0 after the end of a response.

        `draw` turns logits [B x contexts, V] into token, log-probability and whether the response has ended,
        all [B]. It must not ask the host anything. What else it remembers, it changes in place.
        """

        def step():
            self.append(*draw(self.next_logits()))

        self.append(*draw(self.logits))
        self.logits = None
        every, budget = LOOK[self.device.type], self.ids.shape[1]
        run = cuda_graph.Replay(step, generator, RECORD[self.device.type], self.not_recorded)
        for t in range(1, budget):
            if (t - 1) % every == 0:
                alive, moved = self.look(t, min(every, budget - t))
                self.tell_bar(alive)
                if moved:
                    run.forget()
                if not alive:
                    break
            run()
        self.tell_bar(0)
        self.cache = None  # its memory is the next batch's
        ids = self.ids.cpu()
        return ids, self.logps.cpu().masked_fill(ids < 0, 0.0)
