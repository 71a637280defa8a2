"""The decode step under every script's `sample`: what is cached, how rows leave, how a GPU replays a step.

A step appends one token to every row of a batch. Prompts are padded on the left, so all rows write the same
column of the key-value buffers; buffers, mask and tokens stay at the same addresses from step to step and are
changed in place, and nothing in a step asks the host. Such a step can be recorded as a CUDA graph and
replayed, which matters: launching its thousand kernels from Python takes ten times as long as running them.
On a CPU the same lines run eagerly. Only between steps does the host look, drop finished rows, add columns.
"""

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import common.tokenization as tok
from common.plumbing import models, ranks

# steps between two looks at the rows; columns that buffers grow by; the share of rows alive below which the
# others leave. A look costs a CPU nothing and a GPU a stop; new shapes cost a GPU a recording, about 0.2 s
LOOK = {"cpu": 1, "cuda": 32}
COLUMNS = {"cpu": 64, "cuda": 256}
LEAVE = {"cpu": 0.8, "cuda": 0.5}
ENDED = []  # functions that are called with the number of rows that have ended since the last call


# ---- which rows together ---------------------------------------------------------------------------------


def batches(rows, size, lengths, max_tokens=float("inf")):
    """This rank's part of the row numbers `rows`, every n-th, in tensors of at most `size`, shortest first.

    What is padded together has similar `lengths`: beside a prompt that ends in a long demonstration, a short
    one would take as much of the cache. `max_tokens` bounds rows x longest, which is what a cache holds.
    """
    rank, world_size = ranks.shard()
    parts = []
    for row in sorted(rows, key=lambda row: lengths[row])[rank::world_size]:
        part = parts[-1] if parts else []
        full = len(part) == size or (len(part) + 1) * lengths[row] > max_tokens
        if not part or full or lengths[row] > 2 * lengths[part[0]] + 256:
            parts.append([])
        parts[-1].append(row)
    return [torch.tensor(part) for part in parts]


# ---- keys and values -------------------------------------------------------------------------------------


class Cache(DynamicCache):
    """Keys and values in the dtype of activations; after `fix` in buffers [B, heads, columns, D] per layer.

    RoPE's cosines are fp32, so under autocast bf16 keys become fp32; cached like that they would take twice
    the memory and be cast for every token that is sampled.
    """

    checked = True  # `Batch` has looked whether the model has the positions: no step asks again

    def __init__(self, config):
        super().__init__(config=config)
        self.column = None  # where a step writes, [1]; None until `fix`
        self.visible = 0  # columns that attention sees

    def update(self, keys, values, layer_idx, *args, **kwargs):
        if self.column is None:  # a prompt, or a model whose cache transformers manages
            kind = keys.device.type
            if torch.is_autocast_enabled(kind):
                dtype = torch.get_autocast_dtype(kind)
                keys, values = keys.to(dtype), values.to(dtype)
            return super().update(keys, values, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        layer.keys.index_copy_(2, self.column, keys.to(layer.keys.dtype))
        layer.values.index_copy_(2, self.column, values.to(layer.values.dtype))
        return layer.keys[:, :, : self.visible], layer.values[:, :, : self.visible]

    def fix(self, used):
        """From now on a step writes into column `used` and the following ones."""
        self.column = torch.tensor([used], device=self.layers[0].keys.device)

    def fit(self, rows, columns):
        """Keep `rows` (None: all) and add columns, layer by layer: of one layer only there are two at a time."""
        for layer in self.layers:
            layer.keys = resized(layer.keys, rows, 2, columns)
            layer.values = resized(layer.values, rows, 2, columns)


def resized(x, rows, dim, columns, value=0.0):
    """Rows of a buffer, None for all, with more columns along `dim`."""
    if rows is not None:
        x = x.index_select(0, rows)
    if columns:
        x = F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, columns), value=value)
    return x


def unlike(model, cache):
    """Why a model cannot have a cache of fixed buffers, or why its step cannot be recorded; both "" if it can."""
    config = model.config.get_text_config()
    rope = str(getattr(config, "rope_parameters", None))
    fixed = recorded = ""
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        fixed = "its attention has sliding windows"
    elif getattr(config, "num_kv_shared_layers", 0):
        fixed = "its layers share keys and values"
    elif "'dynamic'" in rope or "'longrope'" in rope:
        recorded = "its RoPE depends on the longest position"
    return fixed, fixed or recorded


# ---- a batch ---------------------------------------------------------------------------------------------


class Batch:
    """Rows that are decoded side by side. A row has one prompt, or one in each of several contexts.

    For the draw of a script: `slot` [B], the number of each row at the start (rows leave, so row 3 of the
    logits need not be row 3 of the prompts), and `t` [1], the number of tokens that all rows have by now.
    """

    def __init__(self, model, prompts, budgets, contexts=1, recorded=True):
        device, width = model.device, max(map(len, prompts))
        self.model, self.contexts, self.width, self.recorded = model, contexts, width, recorded
        longest = max(len(prompt) + budget for prompt, budget in zip(prompts, budgets * contexts))
        models.fits(model, longest - 1)  # the last token that is drawn is not read

        # a prompt that several rows have is read once
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        place = {prompt: i for i, prompt in enumerate(distinct)}
        copies = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=device)
        tokens, mask = tok.pad(distinct, side="left", device=device)  # [distinct, width]
        position = (mask.cumsum(1) - 1).clamp(min=0)  # counts real tokens: padding shifts nothing
        self.cache = Cache(model.config)
        inputs = dict(attention_mask=mask, position_ids=position, past_key_values=self.cache)
        logits = model(tokens, **inputs, logits_to_keep=1).logits  # [distinct, 1, V]

        # from a row for each distinct prompt to a row for each response
        self.logits = logits[copies, -1].float()
        self.position = position[copies, -1:]  # [B, 1] of the last token
        self.token = torch.zeros_like(self.position)  # [B, 1], the last one
        not_fixed, self.not_recorded = unlike(model, self.cache)
        if not_fixed:
            self.cache.batch_select_indices(copies)
            self.mask = mask[copies]  # [B, columns], 1 on what is read
        else:
            dtype = self.cache.layers[0].keys.dtype
            self.cache.fit(copies, 0)
            self.cache.fix(width)
            # added to attention's scores, [B, 1, 1, columns]: of four dimensions transformers makes nothing else
            closed = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(mask == 0, -torch.inf)
            self.mask = closed[copies, None, None]

        rows = self.unfinished = len(budgets)
        self.budget = torch.tensor(budgets, device=device)
        self.alive = self.budget > 0
        self.slot = torch.arange(rows, device=device)
        self.t = torch.zeros(1, dtype=torch.int64, device=device)
        self.ids = torch.full((rows, max(budgets)), -1, device=device)  # -1: not sampled
        self.logps = torch.zeros(self.ids.shape, device=device)

    def next_logits(self):
        """Logits after the last token, [contexts x B, V]; fp32 before any softmax."""
        if self.cache.column is None:
            self.mask = mask = F.pad(self.mask, (0, 1), value=1)
        else:
            self.mask.index_fill_(3, self.cache.column, 0.0)  # a token sees the column that it writes
            mask = self.mask[..., : self.cache.visible]
        inputs = dict(attention_mask=mask, position_ids=self.position, past_key_values=self.cache)
        logits = self.model(self.token, **inputs).logits[:, -1].float()
        if self.cache.column is not None:
            self.cache.column += 1
        return logits

    def append(self, token, logp, ended):
        """What has been drawn, all [B]; of rows that have finished nothing is kept, and they stay in place."""
        where = (self.slot, self.t.expand_as(token))
        self.ids.index_put_(where, token.masked_fill(~self.alive, -1))
        self.logps.index_put_(where, logp)
        self.t += 1
        self.alive &= ~ended & (self.budget > self.t)
        self.token.copy_(token.repeat(self.contexts)[:, None])
        self.position += self.alive.repeat(self.contexts)[:, None]

    def last_tokens(self, count):
        """The last response tokens of each row, up to `count` of them: lists of ids; it asks the host."""
        t = int(self.t)
        last = self.ids[self.slot, max(0, t - count) : t].tolist()
        return [[token for token in row if token >= 0] for row in last]

    def look(self, t, steps):
        """Before the next `steps` steps, the first of which draws token t: is a row alive, did tensors move?"""
        rows, kind = len(self.alive), self.token.device.type
        alive = int(self.alive.sum())  # the only place where the host waits for the device
        fixed, used = self.cache.column is not None, self.width + t - 1
        more = 0
        if fixed and used + steps > self.mask.shape[3]:
            # multiples of 16 for the kernels of attention, no more than the longest budget needs
            most = self.width + self.ids.shape[1]
            columns = min(used + COLUMNS[kind], most)
            more = -(-columns // 16) * 16 - self.mask.shape[3]
        leave = alive < LEAVE[kind] * rows
        if alive and (leave or more):
            self.fit(self.alive.nonzero()[:, 0] if leave else None, more)
        # what is not recorded need not look at columns that are not written yet
        self.cache.visible = used + steps if kind == "cpu" and fixed else fixed and self.mask.shape[3]
        return alive, bool(leave or more)

    def fit(self, keep, columns):
        """Rows `keep` stay in all contexts (None: all rows); `columns` more for tokens to come."""
        rows = None
        if keep is not None:
            rows = torch.cat([keep + i * len(self.alive) for i in range(self.contexts)])
            self.token, self.position = self.token[rows], self.position[rows]
            self.alive, self.budget, self.slot = self.alive[keep], self.budget[keep], self.slot[keep]
        if self.cache.column is None:
            self.cache.batch_select_indices(rows)
            self.mask = self.mask[rows]
        else:
            self.cache.fit(rows, columns)
            self.mask = resized(self.mask, rows, 3, columns, value=-torch.inf)

    def tell(self, alive):
        """Tell a bar how many rows have ended."""
        for function in ENDED:
            function(self.unfinished - alive)
        self.unfinished = alive

    def decode(self, draw, generator=None):
        """Ids and log-probabilities, [B, budget] on the CPU; -1 and 0 after the end of a response.

        `draw` turns logits [contexts x B, V] into token, log-probability and whether the response has ended,
        all [B]. It must not ask the host anything. What else it remembers, it changes in place.
        """

        def step():
            self.append(*draw(self.next_logits()))

        self.append(*draw(self.logits))
        self.logits = None
        run = Replay(step, generator, self.not_recorded) if self.recorded else step
        every, budget = LOOK[self.token.device.type], self.ids.shape[1]
        for t in range(1, budget):
            if (t - 1) % every == 0:
                alive, moved = self.look(t, min(every, budget - t))
                self.tell(alive)
                if moved and self.recorded:
                    run.forget()
                if not alive:
                    break
            run()
        self.tell(0)
        ids = self.ids.cpu()
        return ids, self.logps.cpu().masked_fill(ids < 0, 0.0)


class Replay:
    """A step that is run again and again; on a GPU it is recorded once per shape and then replayed."""

    said = set()  # why something was not recorded; each reason is given once

    def __init__(self, step, generator, not_recorded=""):
        self.step, self.generator = step, generator
        self.graph, self.warm = None, False
        self.records = torch.cuda.is_available() and not not_recorded
        if torch.cuda.is_available() and not_recorded and not_recorded not in self.said:
            self.said.add(not_recorded)
            print(f"sampling is not recorded as a CUDA graph: {not_recorded}")

    def forget(self):
        """Tensors have moved. The memory of a graph is freed with it: only one is alive at a time."""
        self.graph, self.warm = None, False

    def __call__(self):
        if not (self.records and self.warm):
            self.step()  # the first of a shape counts, and lets libraries allocate what they need
            self.warm = True
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            if self.generator is not None:
                self.graph.register_generator_state(self.generator)
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.step()  # nothing is computed while it is recorded
        self.graph.replay()
