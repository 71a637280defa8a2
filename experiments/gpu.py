"""Checks and figures that need a GPU: recorded decoding, its speed beside other samplers, training, memory.

    python experiments/gpu.py --all                      # at most 8 minutes on one card; appends to --out
    python experiments/gpu.py --all --tiny               # the same parts on any machine, small shapes
    python experiments/gpu.py --models 0.5B 1.5B         # steps of grpo.py; then --report --write
    python experiments/gpu.py --compare tiny 512 6       # new and old loop on this CPU: rows, turns

Models have random weights and the shape of Qwen2.5, so every response takes the whole budget, which is the
worst case for the cache. A part is a process of its own with a time limit; every result is written as soon as
it is there, and a part that dies takes only the measurement with it that it was at.

Sampling: 512 rows of 16 prompts, 256 tokens, bf16. The floor of a step is what memory must deliver: linear
weights once, the keys and values cached so far once, logits written and read in bf16. "Compiled" is the
recorded step with torch.compile around the model, which no script has. "Fused" is the step of
common/plumbing/fused_step.py with the draw of common/plumbing/draws.py, "library" the same with the library's
attention, "drawn" the model's own step with that draw; `--parts fused` has all of that, in at most 150 s.
Training: a step of grpo.py, 16 questions x 32 responses of 256 tokens, 8,192 tokens a pass, the second step;
a response is right if it has an odd number of letters. MFU counts 6 FLOPs a weight and token of prompt and
response. Memory is the allocator's peak.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import grpo  # noqa: E402
import idft_hinted  # noqa: E402
from common import tokenization as tok  # noqa: E402
from common.plumbing import cuda_graph, decoding, draws, fused_ops, fused_step, models, ranks, runs  # noqa: E402
from experiments import memory  # noqa: E402

QUESTIONS, GROUP, BUDGET, MICRO = 16, 32, 256, 8192
RECORDS = ROOT / "experiments/results/gpu.json"
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TINY = (2, 64, 160, 500, 4, 2, 16, True)  # a shape for --tiny
# bytes and bf16 FLOPs a second, by NVIDIA's data sheets
CARDS = {"H100": (3.35e12, 989e12), "H200": (4.8e12, 989e12), "A100": (2.04e12, 312e12)}


# ---- models ----------------------------------------------------------------------------------------------


def config_of(shape, **more):
    from transformers import Qwen2Config

    layers, d, f, v, q, k, _, tied = shape
    size = dict(hidden_size=d, intermediate_size=f, num_hidden_layers=layers, num_attention_heads=q)
    size |= dict(num_key_value_heads=k, vocab_size=v, tie_word_embeddings=tied)
    return Qwen2Config(**size, eos_token_id=0, pad_token_id=1, **more)


def random_model(shape, device=DEVICE, **more):
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2ForCausalLM(config_of(shape, **more))
    return models.placed(model, False).to(device)


def build(shape, folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/model")
    random_model(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def shape_of(name, tiny):
    return TINY if tiny else memory.SHAPES[f"Qwen2.5-{name}"]


def card():
    """Name, bytes and FLOPs a second."""
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    known = next((key for key in CARDS if key in name), None)
    return name, *CARDS.get(known, (1e11, 1e12))


def autocast(dtype):
    return torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bf16")


def prompts_of(rows, vocabulary):
    """`rows` prompts of 16 different ones, of 18 to 33 tokens."""
    generator = torch.Generator().manual_seed(0)
    some = [torch.randint(2, vocabulary, (18 + i,), generator=generator).tolist() for i in range(QUESTIONS)]
    return [some[i % QUESTIONS] for i in range(rows)]


@contextmanager
def eager():
    """No step is recorded."""
    was, decoding.RECORD = decoding.RECORD, {"cpu": False, "cuda": False}
    try:
        yield
    finally:
        decoding.RECORD = was


@contextmanager
def as_on_a_gpu():
    """A CPU looks at its rows and grows its buffers as seldom as a GPU: steps have the same shapes."""
    with ExitStack() as stack:
        for name in ("LOOK", "COLUMNS", "LEAVE"):
            of_gpu = getattr(decoding, name)["cuda"]
            stack.enter_context(patch.object(decoding, name, {"cpu": of_gpu, "cuda": of_gpu}))
        yield


@contextmanager
def compiled():
    """The model's pass of a decode step goes through torch.compile; its attention stays outside, as it is.

    Inside, transformers would repeat keys and values for every query head of a group. The draw
    stays outside, too: a compiled graph has no generator of one's own.
    """
    from torch._dynamo import config
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attention, next_logits, passes = ALL_ATTENTION_FUNCTIONS["sdpa"], decoding.Batch.next_logits, {}

    def through(batch):
        model = batch.model
        if model not in passes:
            passes[model] = torch.compile(model, dynamic=False)
        with patch.object(batch, "model", passes[model]):
            return next_logits(batch)

    # every layer has its own number, which is a constant of its code
    limits = config.patch(recompile_limit=500, accumulated_recompile_limit=5000)
    ALL_ATTENTION_FUNCTIONS.register("sdpa", torch.compiler.disable(attention))
    try:
        with as_on_a_gpu(), patch.object(decoding.Batch, "next_logits", through), limits:
            yield
    finally:
        ALL_ATTENTION_FUNCTIONS.register("sdpa", attention)


@contextmanager
def fused(attention="kernel", step=True):
    """The decode step with few kernels, and the draw."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(fused_ops, "FUSED", True))
        stack.enter_context(patch.object(fused_ops, "ATTENTION", attention))
        if not step:
            stack.enter_context(patch.object(fused_step, "stand_in", lambda model, length: model))
        yield


HOW = {
    "eager": eager,
    "compiled": compiled,
    "fused": fused,
    "library": lambda: fused("library"),
    "drawn": lambda: fused(step=False),
}


# ---- the loop before recorded steps, for comparison only -------------------------------------------------


class OldCache(decoding.DynamicCache):
    def __init__(self, config):
        super().__init__(config=config)
        self.layers = [OldLayer() for _ in self.layers]

    def update(self, keys, values, *args, **kwargs):
        kind = keys.device.type
        if torch.is_autocast_enabled(kind):
            keys, values = (x.to(torch.get_autocast_dtype(kind)) for x in (keys, values))
        return super().update(keys, values, *args, **kwargs)


class OldLayer(cuda_graph.DynamicLayer):
    ROOM, buffers = 32, ()

    def update(self, keys, values, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        seen = self.get_seq_length()
        end = seen + keys.shape[-2]
        if not self.buffers or self.buffers[0].shape[-2] < end:
            both = torch.cat([self.keys, keys], -2), torch.cat([self.values, values], -2)
            self.buffers = [F.pad(x, (0, 0, 0, self.ROOM)) for x in both]
        else:
            for buffer, new in zip(self.buffers, (keys, values)):
                buffer[:, :, seen:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        self.buffers, seen = [buffer[indices] for buffer in self.buffers], self.get_seq_length()
        self.keys, self.values = (buffer[:, :, :seen] for buffer in self.buffers)


@torch.no_grad()
def old_sample(model, tokenizer, prompts, temperature, args):
    stops = torch.tensor(tok.stop_ids(tokenizer, model.config), device=model.device)
    ids = torch.full((len(prompts), args.max_new_tokens), -1)
    logps, dice = torch.zeros(len(prompts), args.max_new_tokens), ranks.generator(model.device)
    room = args.max_new_tokens - torch.zeros(len(prompts), dtype=torch.int64)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    size = args.sample_rows
    for rows in (torch.tensor(order[i : i + size]) for i in range(0, len(order), size)):
        distinct = list(dict.fromkeys(tuple(prompts[i]) for i in rows))
        copies = [distinct.index(tuple(prompts[i])) for i in rows]
        token, mask = tok.pad(distinct, side="left", device=model.device)
        position = (mask.cumsum(1) - 1).clamp(min=0)
        cache = OldCache(config=model.config)
        for t in range(args.max_new_tokens):
            inputs = dict(attention_mask=mask, position_ids=position, past_key_values=cache, logits_to_keep=1)
            logits = model(token, **inputs).logits[:, -1].float()
            if t == 0:
                cache.batch_select_indices(keep := torch.tensor(copies, device=model.device))
                logits, mask, position, alive = logits[keep], mask[keep], position[keep, -1:], keep >= 0
            logp = (logits / (temperature or 1.0)).log_softmax(-1)
            token = logp.exp().multinomial(1, generator=dice) if temperature else logp.argmax(-1, True)
            ids[rows, t], logps[rows, t] = token[:, 0].cpu(), logp.gather(1, token)[:, 0].cpu()
            alive = alive & ~torch.isin(token[:, 0], stops) & (room[rows] > t + 1).to(model.device)
            if not (left := alive.sum().item()):
                break
            if left < 0.8 * len(rows):
                cache.batch_select_indices(keep := alive.nonzero()[:, 0])
                rows, token, mask, position = rows[keep.cpu()], token[keep], mask[keep], position[keep]
                alive = alive[keep]
            mask, position = F.pad(mask, (0, 1), value=1), position + alive[:, None]
    stops = stops.tolist()
    ids = [tok.truncate(x[x >= 0].tolist(), stops, n) for x, n in zip(ids, room.tolist())]
    return ids, [lp[: len(x)].tolist() for x, lp in zip(ids, logps)]


# ---- checks ----------------------------------------------------------------------------------------------


def flat(lists):
    return torch.tensor([x for row in lists for x in row])


def differ(a, b):
    """Of two samplings: share of responses with other ids, largest difference of log-probabilities."""
    same = [i for i, (x, y) in enumerate(zip(a[0], b[0])) if x == y]
    gaps = (flat([a[1][i] for i in same]) - flat([b[1][i] for i in same])).abs()
    return 1 - len(same) / len(a[0]), gaps.max().item() if len(gaps) else 0.0


def check_syncs(tiny):
    """A step of `sample` and of `rewrite` asks nothing of the host: torch raises if it does."""
    if not CUDA:
        return {"skipped": "no GPU"}
    call = cuda_graph.Replay.__call__

    def strict(run):
        if run.warm:
            torch.cuda.set_sync_debug_mode("error")
        try:
            run.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        run.warm = True

    cuda_graph.Replay.__call__ = strict
    try:
        done = {}
        for dtype in ("fp32", "bf16"):
            draw_with(grpo.sample, small(tiny), dtype, 1.0, 8)
            draw_with(grpo.sample, small(tiny), dtype, 0.0, 8)
            rewritten(small(tiny), dtype, 8)
            done[dtype] = "no synchronisation in a step"
        return done
    finally:
        cuda_graph.Replay.__call__ = call


SMALL = {}


def small(tiny):
    """A model of two layers with grouped heads of width 64 and a large vocabulary."""
    if not SMALL:
        shape = TINY if tiny else (2, 448, 1216, 151936, 7, 1, 64, True)
        SMALL["model"] = random_model(shape, initializer_range=0.1)
    return SMALL["model"]


def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "tiny/model")


def draw_with(sampler, model, dtype, temperature, budget, rows=64, seed=0):
    vocabulary = model.config.vocab_size
    prompts = prompts_of(rows, vocabulary)
    args = grpo.parse_args(["--max-new-tokens", str(budget)])
    torch.manual_seed(seed)
    with autocast(dtype):
        return sampler(model, SimpleNamespace(eos_token_id=0), prompts, temperature, args)


def rewritten(model, dtype, budget, rows=16):
    prompts = prompts_of(rows, min(400, model.config.vocab_size))
    args = idft_hinted.parse_args(["--max-new-tokens", str(budget), "--beta", "1"])
    torch.manual_seed(0)
    with autocast(dtype):
        return idft_hinted.rewrite(model, tokenizer(), prompts, prompts[::-1], args)


def check_greedy(tiny):
    """The tiny world's model, whose responses end at many steps: recorded, eager and on the CPU."""
    model, words = models.load_model(str(ROOT / "tiny/model"))
    rows = [json.loads(line) for line in open(ROOT / "tiny/data/train.jsonl")][:96]
    prompts = tok.encode_prompts(words, [row["question"] for row in rows])
    args = grpo.parse_args(["--max-new-tokens", "100"])
    recorded = grpo.sample(model, words, prompts, 0.0, args)
    with eager():
        launched = grpo.sample(model, words, prompts, 0.0, args)
    scored = grpo.score(model, *tok.join(prompts, recorded[0], model.device), args)[0].cpu()
    _, mask = tok.join(prompts, recorded[0])
    gap = (scored - tok.align(recorded[1], mask)).abs().max().item()
    here = grpo.sample(model.cpu(), words, prompts, 0.0, args)
    found = {"ids differ, recorded and eager": differ(recorded, launched)[0]}
    found |= {"ids differ, recorded and CPU": differ(recorded, here)[0]}
    found |= {"log-probs, recorded and eager": differ(recorded, launched)[1]}
    found |= {"log-probs, recorded and CPU": differ(recorded, here)[1], "log-probs, recorded and scored": gap}
    found["responses end at"] = len({len(x) for x in recorded[0]})
    limits = (0, 0, 1e-4, 1e-4, 1e-4)
    return found | {"ok": all(x <= most for x, most in zip(found.values(), limits))}


def check_draws(tiny):
    """Sampled ids and log-probabilities: recorded = eager with one seed; a seed repeats, another does not."""
    found = {}
    for dtype in ("fp32", "bf16"):
        a, b, other = (draw_with(grpo.sample, small(tiny), dtype, 1.0, 80, seed=seed) for seed in (0, 0, 1))
        with eager():
            launched = draw_with(grpo.sample, small(tiny), dtype, 1.0, 80)
        ids, gap = differ(a, launched)
        found |= {f"{dtype}: ids differ, recorded and eager": ids, f"{dtype}: log-probs": gap}
        found[f"{dtype}: a seed repeats"] = a == b
        found[f"{dtype}: another seed differs"] = a[0] != other[0]
    return found


def check_replayed_noise(tiny):
    """Seven equal words: pairs of neighbours are uniform only if each replay draws new noise."""
    model = random_model((1, 16, 32, 7, 1, 1, 16, False))
    model.config.eos_token_id = 6
    model.lm_head.weight.data.zero_()
    args = grpo.parse_args(["--max-new-tokens", "129"])
    torch.manual_seed(0)
    rows, _ = grpo.sample(model, SimpleNamespace(eos_token_id=6), [[1, 2]] * 500, 1.0, args)
    rows = [row for row in rows if len(row) > 2]
    pairs = torch.stack([flat([row[:-2] for row in rows]), flat([row[1:-1] for row in rows])])
    counts = torch.bincount(pairs[0] * 6 + pairs[1], minlength=36).double()
    chi = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    p = torch.special.gammaincc(torch.tensor(35 / 2).double(), chi / 2).item()
    return {"p of chi-square": p, "pairs": int(counts.sum()), "ok": p > 1e-4}


def check_copy(tiny):
    """Logits of the copy and of autocast over fp32 weights, bit for bit."""
    model = small(tiny)
    tokens = torch.randint(2, model.config.vocab_size, (4, 33), device=DEVICE)
    with torch.no_grad(), autocast("bf16"):
        a, b = model(tokens).logits, models.sampler(model)(tokens).logits
    return {"bits equal": torch.equal(a, b), "ok": torch.equal(a, b)}


def check_rewrite(tiny):
    found = {}
    for dtype in ("fp32", "bf16"):
        recorded = rewritten(small(tiny), dtype, 40)
        with eager():
            launched = rewritten(small(tiny), dtype, 40)
        found[f"{dtype}: ids differ"] = sum(a != b for a, b in zip(recorded, launched)) / len(recorded)
    return found


def check_ratio(tiny):
    """|ratio - 1| of sampled and scored, fp32 and bf16."""
    found, model = {}, small(tiny)
    args = grpo.parse_args(["--micro-batch-tokens", "4096"])
    prompts = prompts_of(64, model.config.vocab_size)
    for dtype in ("fp32", "bf16"):
        ids, logps = draw_with(grpo.sample, model, dtype, 1.0, 40)
        tokens, mask = tok.join(prompts, ids, DEVICE)
        with autocast(dtype):
            scored = grpo.score(model, tokens, mask, args)[0].cpu()
        gap = (scored - tok.align(logps, mask.cpu())).exp().sub(1).abs()[mask.cpu().bool()]
        found |= {f"{dtype}: mean": gap.mean().item(), f"{dtype}: max": gap.max().item()}
    return found | {"ok": found["fp32: max"] < 1e-3}


def check_windows(tiny):
    """A model with sliding windows takes the eager path and still samples what is scored."""
    model = random_model(TINY, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    prompts = prompts_of(8, 500)
    args = grpo.parse_args(["--max-new-tokens", "40"])
    ids, logps = grpo.sample(model, SimpleNamespace(eos_token_id=0), prompts, 1.0, args)
    tokens, mask = tok.join(prompts, ids, DEVICE)
    scored = grpo.score(model, tokens, mask, args)[0].cpu()
    gap = (scored - tok.align(logps, mask.cpu())).abs().max().item()
    return {"log-probs, sampled and scored": gap, "ok": gap < 1e-4}


def check_compiled(tiny):
    """|ratio - 1| of what the compiled pass samples, fp32 and bf16."""
    with compiled():
        return check_ratio(tiny)


@torch.no_grad()
def forced(model, dtype, steps=24, rows=64):
    """Log-probabilities of given tokens, [steps, rows], as a decode step sees them."""
    vocabulary = model.config.vocab_size
    generator, found = torch.Generator().manual_seed(0), []
    tokens = torch.randint(2, vocabulary, (steps, rows), generator=generator).to(DEVICE)
    with autocast(dtype), as_on_a_gpu():
        batch = decoding.Batch(models.sampler(model), prompts_of(rows, vocabulary), [steps + 1] * rows)
        assert isinstance(batch.model, fused_step.Step) == fused_ops.FUSED
        for t, token in enumerate(tokens, 1):
            batch.look(t, 1)
            batch.append(token, torch.zeros(rows, device=DEVICE), token < 0)
            logp = batch.next_logits().float().log_softmax(-1)
            found.append(logp.gather(1, tokens[t % steps, :, None])[:, 0])
    return torch.stack(found).double()


def check_fused_step(tiny):
    """Log-probabilities of the fused step and of the model; in bf16 beside the noise of bf16."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    size = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=6)
    size |= dict(num_key_value_heads=2, head_dim=128, vocab_size=1000, initializer_range=0.1)
    torch.manual_seed(0)
    qwen3 = models.placed(Qwen3ForCausalLM(Qwen3Config(**size, eos_token_id=0, pad_token_id=1)), False)
    found, ok = {}, True
    for name, model in (("qwen2", small(tiny)), ("qwen3", qwen3)):
        exact = forced(model, "fp32")
        for attention in ("kernel", "library"):
            for dtype in ("fp32", "bf16"):
                plain = forced(model, dtype)
                with fused(attention):
                    own = forced(model, dtype)
                gaps = {"model": own - plain, "fp32": own - exact, "model to fp32": plain - exact}
                rms = {key: gap.square().mean().sqrt().item() for key, gap in gaps.items()}
                largest = gaps["model"].abs().max().item()
                found[f"{name}, {attention}, {dtype}"] = rms | {"largest, to the model": largest}
                bf16 = dtype == "bf16"
                ok &= rms["fp32"] < 1.2 * rms["model to fp32"] if bf16 else largest < 1e-4
    return found | {"ok": ok}


def check_fused_draw(tiny):
    """The likeliest words one by one and the others in 64 groups: chi-square of many draws, both dtypes."""
    words, rows, found = (500, 2**14, {}) if tiny else (151936, 2**18, {})
    generator = torch.Generator(DEVICE).manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for temperature in (1.0, 0.6):
            logits = (3 * torch.randn(words, generator=generator, device=DEVICE)).to(dtype)
            logp = (logits.double() / temperature).log_softmax(-1)
            cell = 64 + torch.arange(words, device=DEVICE) % 64
            cell[logp.topk(64).indices] = torch.arange(64, device=DEVICE)
            with fused():
                token, got = draws.race(logits.expand(rows, words), temperature, generator)
            counts = torch.bincount(cell[token], minlength=128).double()
            expected = rows * torch.zeros(128, dtype=torch.float64, device=DEVICE).index_add(
                0, cell, logp.exp()
            )
            chi = ((counts - expected) ** 2 / expected).sum()
            p = torch.special.gammaincc(torch.full_like(chi, 127 / 2), chi / 2).item()
            gap = (got - logp[token]).abs().max().item()
            found[f"{dtype}, T = {temperature}"] = {"p of chi-square": p, "log-probs": gap}
    ok = all(x["p of chi-square"] > 1e-4 and x["log-probs"] < 1e-4 for x in found.values())
    return found | {"ok": ok}


def when_fused(check):
    def checked(tiny):
        with fused():
            return check(tiny)

    return checked


CHECKS = {
    "host asked": check_syncs,
    "greedy": check_greedy,
    "copy": check_copy,
    "draws": check_draws,
    "replayed noise": check_replayed_noise,
    "ratio": check_ratio,
    "rewrite": check_rewrite,
    "windows": check_windows,
    "compiled": check_compiled,
    "fused step": check_fused_step,
    "fused draw": check_fused_draw,
}
FUSED = ("host asked", "greedy", "draws", "replayed noise", "ratio", "rewrite")
CHECKS |= {f"fused {name}": when_fused(CHECKS[name]) for name in FUSED}


# ---- speed -----------------------------------------------------------------------------------------------


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def timed(work, warm):
    """Seconds of `work()`, after `warm()`, and peak GiB."""
    warm()
    synchronize()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.time()
    out = work()
    synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0
    reserved = torch.cuda.memory_reserved() / 2**30 if CUDA else 0.0
    return out, time.time() - began, peak, reserved


def products(shape):
    """Weights that a token is multiplied with: matrices of the layers, and the head."""
    return memory.parameters(shape)[1] + shape[3] * shape[1]


def traffic(shape, rows, length):
    """Bytes that a decode step reads and writes at least, at this mean length of the cache."""
    return 2 * products(shape) + rows * length * memory.cached(shape) + 4 * rows * shape[3]


def floor(shape, rows, length):
    """Seconds a step at least: of memory traffic, and of FLOPs."""
    _, bandwidth, flops = card()
    return traffic(shape, rows, length) / bandwidth, 2 * products(shape) * rows / flops


def speed(name, how, tiny):
    """Tokens a second of one sampler, after a short run that warms it up."""
    shape = shape_of(name, tiny)
    rows, budget = (32, 40) if tiny else (QUESTIONS * GROUP, BUDGET)
    model = random_model(shape)
    prompts = prompts_of(rows, shape[3])
    width = max(map(len, prompts))
    if how == "generate" or how == "generate_batch":
        model = model.to(torch.bfloat16)  # as its users have it
        run = {"generate": generated, "generate_batch": generated_in_batches}[how]
        ids, seconds, peak, reserved = timed(
            lambda: run(model, prompts, budget), lambda: run(model, prompts, 8)
        )
    else:
        sampler = old_sample if how == "old" else grpo.sample
        # what is compiled is compiled for a shape, so it warms up with the shapes of the whole budget
        first = budget if how == "compiled" else 8
        with HOW.get(how, nullcontext)():
            go = lambda n: draw_with(sampler, model, "bf16", 1.0, n, rows)[0]  # noqa: E731
            ids, seconds, peak, reserved = timed(lambda: go(budget), lambda: go(first))
    tokens, steps = sum(map(len, ids)), max(map(len, ids))
    memory_floor, flops_floor = floor(shape, rows, width + budget / 2)
    computed = memory.sampling(shape, rows, width + budget, 1) - 8 * memory.parameters(shape)[0]
    found = {"tokens/s": tokens / seconds, "ms a step": 1e3 * seconds / steps, "seconds": seconds}
    found |= {"floor, ms": 1e3 * memory_floor, "FLOPs, ms": 1e3 * flops_floor}
    found |= {"times the floor": seconds / steps / memory_floor, "tokens": tokens, "steps": steps}
    # computed: weights, copy with an untied head, cache, logits; no optimizer here
    return found | {
        "peak GiB": peak,
        "reserved GiB": reserved,
        "computed GiB": (computed + 2 * shape[3] * shape[1]) / 2**30,
    }


@torch.no_grad()
def generated(model, prompts, budget):
    from transformers import GenerationConfig

    tokens, mask = tok.pad(prompts, side="left", device=DEVICE)
    plain = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=budget, pad_token_id=1)
    plain |= dict(eos_token_id=None, min_new_tokens=None)
    out = model.generate(tokens, attention_mask=mask, generation_config=GenerationConfig(**plain))
    return out[:, tokens.shape[1] :].tolist()


@torch.no_grad()
def generated_in_batches(model, prompts, budget):
    from transformers import GenerationConfig

    plain = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=budget, pad_token_id=1)
    config = GenerationConfig(**plain, eos_token_id=model.config.vocab_size - 1)
    done = model.generate_batch(inputs=prompts, generation_config=config)
    return [output.generated_tokens for output in done.values()]


def profiled(name, how, tiny):
    """What the kernels of a step cost, by name: the mean of some steps, early ones or in the `middle`."""
    from torch.profiler import ProfilerActivity, profile

    shape = shape_of(name, tiny)
    rows = 32 if tiny else QUESTIONS * GROUP
    model = random_model(shape)
    found, call = {}, cuda_graph.Replay.__call__
    kinds = [ProfilerActivity.CUDA] if CUDA else [ProfilerActivity.CPU]
    late = how in ("middle", "fused", "library") and not tiny  # attention reads as much as in the mean step
    budget = BUDGET if late else 24
    count, first, steps = [0], BUDGET // 2 if late else 8, 8
    profiler = profile(activities=kinds)

    def watched(run):
        count[0] += 1
        if count[0] == first:
            synchronize()
            profiler.__enter__()
            count.append(time.time())
        call(run)
        if count[0] == first + steps - 1:
            synchronize()
            count.append(time.time())
            profiler.__exit__(None, None, None)

    cuda_graph.Replay.__call__ = watched
    with HOW.get(how, nullcontext)():
        draw_with(grpo.sample, model, "bf16", 1.0, budget, rows)
    cuda_graph.Replay.__call__ = call
    events = profiler.key_averages()
    key = "self_device_time_total" if CUDA else "self_cpu_time_total"
    events = sorted(events, key=lambda event: -getattr(event, key))
    found["ms a step"] = 1e3 * (count[2] - count[1]) / steps
    found["kernels a step"] = sum(event.count for event in events) / steps
    found["ms of kernels a step"] = sum(getattr(event, key) for event in events) / steps / 1e3
    found["longest"] = {
        event.key[:90]: [round(getattr(event, key) / steps / 1e3, 4), event.count / steps]
        for event in events[:25]
    }
    return found


class Measured(Exception):
    """What was to be measured has been."""


def attention_variants(name, tiny):
    """us of attention in one layer, by columns written, and by tile, warps and stages of the kernel."""
    layers, _, _, _, q, k, width, _ = shape_of(name, tiny)
    rows, columns = (4, 48) if tiny else (QUESTIONS * GROUP, 304)
    dtype, found = torch.bfloat16, {}
    # more than a cache of the GPU holds
    buffers = torch.zeros(8, 2, rows, k, columns, width, dtype=dtype, device=DEVICE)
    queries = torch.randn(rows, q, width, dtype=dtype, device=DEVICE)
    mask = torch.zeros(rows, 1, 1, columns, dtype=dtype, device=DEVICE)
    variants = [(64, 4, 2), (64, 4, 3), (64, 2, 2), (32, 2, 3), (32, 4, 3), (128, 4, 2), (128, 8, 2), None]
    column = torch.zeros(1, dtype=torch.int64, device=DEVICE)

    def step():
        for keys, values in buffers:
            fused_ops.attend(queries, keys, values, mask, column)

    for written in (columns // 2, columns - 1):
        column.fill_(written)
        for variant in variants:
            tile, warps, stages = variant or (64, 4, 2)
            launch = {"num_warps": warps, "num_stages": stages}
            with ExitStack() as stack:
                stack.enter_context(fused("kernel" if variant else "library"))
                stack.enter_context(patch.object(fused_ops, "COLUMNS", tile))
                stack.enter_context(patch.object(fused_ops, "LAUNCH", launch))
                step()
                synchronize()
                run = cuda_graph.record(step, None) if CUDA else step
                run()
                synchronize()
                began = time.time()
                for _ in range(10):
                    run()
                synchronize()
                took = (time.time() - began) / 10 / len(buffers) * 1e6
            found[f"{written} columns, {variant or 'library'}"] = round(took, 1)
    return found


def parts_of_a_step(name, how, tiny):
    """How long a recording takes, and the first, eager step of a shape."""
    if not CUDA:
        return {"skipped": "no GPU"}
    shape = shape_of(name, tiny)
    model, seen, record = random_model(shape), {}, cuda_graph.record

    def watched(step, generator):
        torch.cuda.synchronize()
        began = time.time()
        step()
        torch.cuda.synchronize()
        seen["seconds, eager step"] = time.time() - began
        began = time.time()
        replay = record(step, generator)
        seen["seconds, recording"] = time.time() - began
        torch.cuda.synchronize()
        began = time.time()
        for _ in range(20):
            replay()
        torch.cuda.synchronize()
        seen["ms, replayed"] = (time.time() - began) / 20 * 1e3
        raise Measured  # the extra steps have used up the buffers

    cuda_graph.record = watched
    with suppress(Measured), HOW.get(how, nullcontext)():
        draw_with(grpo.sample, model, "bf16", 1.0, 48, QUESTIONS * GROUP)
    cuda_graph.record = record
    return seen


def compare(name, rows, turns, budget=100):
    """Old and new loop take turns; CPU seconds a token, the least of all turns, and their ratio."""
    from experiments import speed as shapes

    with tempfile.TemporaryDirectory() as folder:
        if name == "135M":
            shapes.big_model(folder)
        model, words = models.load_model(folder if name == "135M" else str(ROOT / "tiny/model"))
    asked = [row["question"] for row in shapes.rows_of(max(1, rows // 8))]
    prompts = tok.encode_prompts(words, asked) * (rows // len(asked))
    args, spent = grpo.parse_args(["--max-new-tokens", str(budget)]), {"old": [], "new": []}
    for turn in range(turns + 1):  # the first warms up
        for how, sampler in (("old", old_sample), ("new", grpo.sample)):
            torch.manual_seed(turn)
            began = time.process_time()
            ids, _ = sampler(model, words, prompts, 1.0, args)
            spent[how].append((time.process_time() - began) / sum(map(len, ids)))
    old, new = (min(x[1:]) for x in (spent["old"], spent["new"]))
    ratios = sorted(b / a for a, b in zip(spent["old"][1:], spent["new"][1:]))
    print(
        f"{name}, {rows} rows, {torch.get_num_threads()} threads: "
        f"{1e6 * old:.0f} -> {1e6 * new:.0f} us a token,"
    )
    print(f"  new / old {new / old:.3f}; of single turns {ratios[0]:.2f} to {ratios[-1]:.2f}")


# ---- training --------------------------------------------------------------------------------------------


def train(name, recompute, tiny=False):
    """What the second step of a run of grpo.py takes."""
    shape = shape_of(name, tiny)
    questions, group, budget = (4, 4, 24) if tiny else (QUESTIONS, GROUP, BUDGET)
    seen, rollout = {}, grpo.rollout

    def peak():
        found = torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        return found

    def watched(*args):
        peak()
        groups = rollout(*args)
        done = [completion for completions in groups for completion in completions]
        seen["GiB sampling"], seen["length"] = peak(), max(len(c["prompt"]) for c in done) + budget
        seen["tokens"] = sum(len(c["prompt"]) + len(c["response"]) for c in done)
        return groups

    def log(out, metrics, samples=()):
        keys = ("seconds_sample", "seconds_train", "tokens_generated", "tokens_trained")
        seen.update({key: metrics[key] for key in keys if key in metrics} | {"GiB training": peak()})

    grpo.rollout, grpo.evaluate = watched, lambda *args: {}
    runs.log, runs.save_model = log, lambda *args: None
    grpo.math_reward = lambda texts, golds: [float(len(text) % 2) for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        build(shape, f"{folder}/model")
        flags = f"--model {folder}/model --output-dir {folder}/run --dtype bf16 --lr 1e-6 --steps 2"
        flags += f" --batch-size {questions} --group-size {group} --max-new-tokens {budget}"
        flags += f" --micro-batch-tokens {MICRO}" + " --gradient-checkpointing" * recompute
        grpo.main(grpo.parse_args(flags.split()))
    seen["tokens_trained"] = int(seen["tokens_trained"])
    seen["sampling, tokens/s"] = seen["tokens_generated"] / seen["seconds_sample"]
    seen["training, tokens/s"] = seen["tokens_trained"] / seen["seconds_train"]
    seen["MFU"] = 6 * products(shape) * seen["tokens"] / seen["seconds_train"] / card()[2]
    seen["computed sampling"] = memory.sampling(shape, questions * group, seen["length"], 1) / 2**30
    seen["computed sampling"] += 2 * shape[3] * shape[1] / 2**30  # the copy's own head
    seen["computed training"] = memory.total(shape, MICRO, recompute, 1) / 2**30
    return seen


def table(records):
    head = "| | GPU | sampling, tokens/s | training, tokens/s "
    head += "| GiB sampling | computed | GiB training | computed |"
    text = [head, "|---" * 8 + "|"]
    for name, x in records.items():
        if "GiB training" not in x:
            continue
        speeds = (x["tokens_generated"] / x["seconds_sample"], x["tokens_trained"] / x["seconds_train"])
        line = [name, x["device"], *(f"{speed:,.0f}" for speed in speeds)]
        for phase in ("sampling", "training"):
            line += [f"{x[f'GiB {phase}']:.1f}", f"{x[f'computed {phase}']:.1f}"]
        text.append("| " + " | ".join(line) + " |")
    return text


# ---- all of it -------------------------------------------------------------------------------------------

# process -> its measurements and seconds; what matters most comes first
PARTS = {
    "checks": ([f"check {name}" for name in CHECKS if name.split()[0] not in ("compiled", "fused")], 120),
    "speed": (["speed 0.5B recorded", "speed 0.5B old", "profile 0.5B", "speed 0.5B eager"], 140),
    "parts": (["parts 0.5B"], 60),
    "train": (["train 0.5B"], 90),
    "generate": (["speed 0.5B generate"], 75),
    "1.5B": (["speed 1.5B recorded", "profile 1.5B"], 75),
    "generate_batch": (["speed 0.5B generate_batch"], 75),
    "train recomputed": (["train 1.5B recomputed"], 90),
    "fused": (
        [
            "check fused step",
            "speed 0.5B fused",
            "profile 0.5B fused",
            "check fused draw",
            *(f"check fused {name}" for name in ("replayed noise", "draws", "greedy", "ratio")),
            "attention 0.5B",
            "profile 0.5B middle",
            "speed 0.5B recorded",
            "speed 0.5B library",
            "speed 0.5B drawn",
            "parts 0.5B fused",
            "speed 1.5B fused",
            "profile 1.5B fused",
            *(f"check fused {name}" for name in ("host asked", "rewrite")),
            "attention 1.5B",
        ],
        150,
    ),
    # it compiles for a minute or more, so it comes last
    "compiled": (["check compiled", "speed 0.5B compiled", "profile 0.5B compiled"], 240),
}


def measure(what, tiny):
    kind, *rest = what.split()
    if kind == "check":
        return CHECKS[" ".join(rest)](tiny)
    if kind == "speed":
        return speed(*rest, tiny)
    if kind == "profile":
        return profiled(rest[0], rest[1] if rest[1:] else "recorded", tiny)
    if kind == "attention":
        return attention_variants(rest[0], tiny)
    if kind == "parts":
        return parts_of_a_step(rest[0], rest[1] if rest[1:] else "recorded", tiny)
    return train(rest[0], "recomputed" in rest, tiny)


def child(names, tiny):
    """Measure these one by one; a line for each as soon as it is there."""
    for name in names:
        print("BEGIN " + json.dumps(name), flush=True)
        began = time.time()
        try:
            found = measure(name, tiny)
        except Exception as error:
            found = {
                "error": f"{type(error).__name__}: {error}"[:600],
                "trace": traceback.format_exc()[-2500:],
            }
        found |= {"device": card()[0], "torch": torch.__version__, "took": round(time.time() - began, 1)}
        print("RESULT " + json.dumps([name, found]), flush=True)
        if "error" in found and CUDA:
            sys.exit(1)  # a fault of the GPU stays with the process: the rest gets a new one
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


def everything(args):
    """All parts within --minutes, results into --out."""
    out, ends = Path(args.out), time.time() + 60 * args.minutes
    out.parent.mkdir(parents=True, exist_ok=True)
    records = json.loads(out.read_text()) if out.exists() else {}
    for part, (names, most) in PARTS.items():
        if args.parts and part not in args.parts:
            continue
        left = list(names)
        until = min(time.time() + most, ends)
        while left and until - time.time() > 10:
            command = [sys.executable, __file__, "--child", json.dumps(left), *["--tiny"] * args.tiny]
            log = tempfile.TemporaryFile("w+")
            with subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT) as process:
                try:
                    process.wait(max(1, until - time.time()))
                    end = f"exit status {process.returncode}"
                except subprocess.TimeoutExpired:
                    process.kill()
                    end = "time is up"
            log.seek(0)
            lines = log.read().splitlines()
            done = dict(json.loads(line[7:]) for line in lines if line.startswith("RESULT "))
            begun = [json.loads(line[6:]) for line in lines if line.startswith("BEGIN ")]
            lost = [name for name in begun if name not in done] or ([] if done else left[:1])
            for name in lost:
                done[name] = {"error": end, "trace": "\n".join(lines)[-2500:]}
            for name, found in done.items():
                records[name] = found
                show = {k: v for k, v in found.items() if k not in ("device", "torch", "longest")}
                print(f"{name}: {json.dumps(show)}", flush=True)
            out.write_text(json.dumps(records, indent=1) + "\n")
            left = [name for name in left if name not in done]
    print(f"{len(records)} records in {out}; {ends - time.time():.0f} s left")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="checks, samplers, training, memory")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on a CPU too")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="of --all, only these")
    parser.add_argument("--minutes", type=float, default=8, help="of --all")
    record = str(ROOT / "experiments/results/decoding.json")
    parser.add_argument("--out", default=record, help="record of --all")
    parser.add_argument("--models", nargs="+", default=["0.5B", "1.5B"], choices=["0.5B", "1.5B", "7B"])
    parser.add_argument("--how", nargs="+", default=["plain", "recomputed"], choices=["plain", "recomputed"])
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--write", action="store_true", help="write the table into docs/gpu.md")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--compare", nargs=3, metavar=("MODEL", "ROWS", "TURNS"), help="tiny or 135M")
    parser.add_argument("--budget", type=int, default=100, help="of --compare")
    args = parser.parse_args()
    if args.child:
        return child(json.loads(args.child), args.tiny)
    if args.all:
        return everything(args)
    if args.compare:
        name, rows, turns = args.compare
        return compare(name, int(rows), int(turns), args.budget)
    if args.one:
        found = train(args.one[0], args.one[1] == "recomputed")
        print("\n" + json.dumps(found | {"device": card()[0], "torch": torch.__version__}))
        return
    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    for name in [] if args.report else args.models:
        for how in args.how:
            command = [sys.executable, __file__, "--one", name, how]
            out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if out.returncode:
                print(f"{name}, {how}: {out.stderr[-1500:]}", flush=True)
                continue
            records[f"Qwen2.5-{name}, {how}"] = json.loads(out.stdout.splitlines()[-1])
            RECORDS.write_text(json.dumps(records, indent=1) + "\n")
            print(table(records)[-1], flush=True)
    print("\n".join(table(records)))
    if args.write:
        from experiments.tables import insert

        insert("gpu", table(records))


if __name__ == "__main__":
    main()
