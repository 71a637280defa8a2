"""The fused decode step and the draw of plumbing/draws.py, on both paths.

Whole models run on the torch path. In a child process under TRITON_INTERPRET=1 each kernel runs beside its
twin, on a few rows because a program takes the interpreter a second, and the tests of the draw run again.
"""

from __future__ import annotations  # without triton, tl.constexpr below is only a name

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, are_greedy, compiled, gpt2
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import common.tokenization as tok
import grpo
import idft_hinted
from common.plumbing import decoding, draws, fused_ops, fused_step, models

tl = getattr(draws, "tl", None)
TRITON = fused_ops.INTERPRET and fused_ops.triton is not None
torch_only = pytest.mark.skipif(TRITON, reason="does not depend on the path, or belongs to the torch path")
SIZE = dict(hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=6, head_dim=16)
SIZE |= dict(num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, vocab_size=50)
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=64)
FAMILY = {
    "llama": LlamaConfig(**SIZE),
    "llama, biases": LlamaConfig(**SIZE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama, scaled": LlamaConfig(**SIZE, rope_parameters=LLAMA3),
    "qwen2": Qwen2Config(**SIZE),
    "qwen2, tied": Qwen2Config(**SIZE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZE),
    "qwen3, tied": Qwen3Config(**SIZE, tie_word_embeddings=True),
}
PROMPTS = [[3 + i] * (2 + 3 * i) for i in range(5)]
EOS = SimpleNamespace(eos_token_id=0)


def random_model(config):
    torch.manual_seed(0)
    config.eos_token_id, config.pad_token_id = 0, 1
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, p in model.named_parameters():  # as they are after training, not ones and zeros
        if "norm" in name or "bias" in name:
            p.data += 0.3 * torch.randn_like(p)
    return model


@pytest.fixture(params=FAMILY)
def model(request):
    return random_model(FAMILY[request.param])


@pytest.fixture
def fused(monkeypatch):
    """The fused step on this CPU, over buffers that grow in small steps and rows that leave."""
    monkeypatch.setattr(fused_ops, "FUSED", True)
    monkeypatch.setattr(fused_ops, "COLUMNS", 16)
    monkeypatch.setattr(decoding, "LOOK", {"cpu": 3})
    monkeypatch.setattr(decoding, "COLUMNS", {"cpu": 16})
    monkeypatch.setattr(decoding, "LEAVE", {"cpu": 0.9})


def settings(**changed):
    return grpo.parse_args([x for k, v in changed.items() for x in (f"--{k.replace('_', '-')}", str(v))])


# ---- the step --------------------------------------------------------------------------------------------


def both_ways(model, steps):
    """Logits of some steps by the fused step and by the model's forward pass, each with its own cache."""
    found = []
    for how in (False, True):
        fused_ops.FUSED = how
        batch, logits = decoding.Batch(model, PROMPTS, [steps] * len(PROMPTS)), []
        assert isinstance(batch.model, fused_step.Step) == how
        forced = torch.Generator().manual_seed(0)
        for t in range(1, steps):
            batch.look(t, 1)
            token = torch.randint(2, 50, (len(PROMPTS),), generator=forced)
            batch.append(token, torch.zeros(len(PROMPTS)), token < 0)
            logits.append(batch.next_logits())
        found.append((torch.stack(logits), batch.cache))
    return found


@torch_only
@torch.no_grad()
def test_logits_are_the_model_s_in_fp32(model, fused):
    """And so are the keys and values; a step sees no columns that are written later."""
    (want, plain), (got, own) = both_ways(model, 20)
    scale = want.abs().max()
    torch.testing.assert_close(got, want, atol=2e-6 * scale, rtol=0)
    for a, b in zip(own.layers, plain.layers, strict=True):
        torch.testing.assert_close(a.keys, b.keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=0)


@torch_only
@torch.no_grad()
def test_logits_are_the_model_s_in_bf16_up_to_its_noise(model, fused):
    """The two differ by less than the model in bf16 differs from itself in fp32."""
    exact = both_ways(model, 20)[0][0].log_softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        (want, _), (got, own) = both_ways(models.sampler(model), 20)
    assert got.dtype == want.dtype == own.layers[0].keys.dtype == torch.bfloat16
    want, got = (x.float().log_softmax(-1) for x in (want, got))
    noise = (want - exact).square().mean().sqrt()
    assert 1e-3 < noise < 0.2
    assert (got - exact).square().mean().sqrt() < 1.1 * noise
    assert (got - want).square().mean().sqrt() < noise


@torch_only
def test_greedy_is_what_generate_gives(model, fused):
    """Rows end at different steps and leave, buffers grow."""
    model.lm_head.weight.data[0] *= 3  # EOS comes sooner
    args = settings(max_new_tokens=40, sample_rows=3)
    responses, logps = grpo.sample(model, EOS, PROMPTS, 0.0, args)
    assert are_greedy(responses, model, PROMPTS, 40)
    tokens, mask = tok.join(PROMPTS, responses)
    scored, _ = grpo.score(model, tokens, mask, args)
    assert (scored - tok.align(logps, mask)).abs().max() < 1e-5


@torch_only
def test_the_tiny_model_samples_what_is_scored(tiny, fused):
    model, tokenizer = tiny
    questions = ["Compute 1 + 1.", "Who?", "What is the median of 75, 60, 21, 3, 8?"] * 6
    prompts, args = tok.encode_prompts(tokenizer, questions), settings(max_new_tokens=60)
    torch.manual_seed(0)
    responses, logps = grpo.sample(model, tokenizer, prompts, 1.0, args)
    assert len({len(x) for x in responses}) > 3
    tokens, mask = tok.join(prompts, responses)
    scored, _ = grpo.score(model, tokens, mask, args)
    assert (scored - tok.align(logps, mask)).abs().max() < 1e-5


@torch_only
def test_two_contexts(tiny, fused, monkeypatch):
    model, tokenizer = tiny
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda x, generator: x.fill_(1))
    hinted, student = (tok.encode_prompts(tokenizer, q) for q in (["Who?", "1 + 1"], ["2 + 2", "Where?"]))
    args = idft_hinted.parse_args("--beta 1 --max-new-tokens 30".split())
    got = idft_hinted.rewrite(model, tokenizer, hinted, student, args)
    monkeypatch.setattr(fused_ops, "FUSED", False)
    assert got == idft_hinted.rewrite(model, tokenizer, hinted, student, args)


# ---- weights ---------------------------------------------------------------------------------------------


@torch_only
@torch.no_grad()
def test_joined_weights_follow_the_optimizer(model, fused):
    """In the copy q, k and v, and gate and up, are one matrix; it is refreshed where it is."""
    places = set()
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            copy = models.sampler(model)
            (want, _), (got, _) = both_ways(copy, 3)
            assert torch.equal(
                copy(torch.tensor(PROMPTS[-1:])).logits, model(torch.tensor(PROMPTS[-1:])).logits
            )
        assert (want - got).abs().max() < 0.05 * want.abs().max()
        for layer, own in zip(copy.model.layers, model.model.layers):
            for find in (fused_step.queries_keys_values, fused_step.gate_and_up):
                weights = [x.weight for x in find(layer)]
                assert fused_step.neighbours(weights)
                assert not fused_step.neighbours([x.weight for x in find(own)])
                places.add(weights[0].data_ptr())
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    assert len(places) == 2 * len(model.model.layers)


@torch_only
def test_the_copy_takes_no_more_memory(fused):
    model = random_model(Qwen2Config(**SIZE))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        copy = models.sampler(model)
        before = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in copy.parameters()}
        decoding.Batch(copy, PROMPTS, [4] * 5)
        after = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in copy.parameters()}
    assert sum(before.values()) == sum(after.values()) and len(after) == len(before) - 2 * 5


# ---- other models ----------------------------------------------------------------------------------------

OTHERS = {
    "mistral": MistralConfig(**SIZE, sliding_window=None),
    "gemma": GemmaConfig(**SIZE),
    "gelu": LlamaConfig(**SIZE, hidden_act="gelu"),
    "odd heads": LlamaConfig(**SIZE | dict(head_dim=24)),
    "dynamic": LlamaConfig(**SIZE, rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)),
    "windows": Qwen2Config(**SIZE, use_sliding_window=True, sliding_window=6, max_window_layers=1),
}


@torch_only
@pytest.mark.parametrize("name", [*OTHERS, "gpt2"])
def test_other_models_keep_their_forward_pass(name, fused):
    model = gpt2(50) if name == "gpt2" else random_model(OTHERS[name])
    assert decoding.Batch(model, PROMPTS, [4] * 5).model is model


@torch_only
def test_it_is_off():
    assert not fused_ops.FUSED


# ---- the draw --------------------------------------------------------------------------------------------


@pytest.fixture
def parts(monkeypatch):
    """Several parts, of which the last is not full; many rows a program make the interpreter bearable."""
    monkeypatch.setattr(fused_ops, "FUSED", True)
    monkeypatch.setattr(draws, "PART", 16)
    monkeypatch.setattr(draws, "ROWS", 2048)


def p_of_chi_square(counts, expected):
    """Cells that expect fewer than five are one cell."""
    counts, expected = counts.double(), expected.double()
    small = expected < 5
    if small.any():
        counts = torch.cat([counts[~small], counts[small].sum()[None]])
        expected = torch.cat([expected[~small], expected[small].sum()[None]])
    chi = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), chi / 2).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("words", [7, 50])
def test_draws_have_the_distribution_of_softmax(words, temperature, dtype, parts):
    """Counts of 4,000 draws, one part and several; log-probabilities exactly."""
    logits = (2 * torch.randn(words, generator=torch.Generator().manual_seed(1))).to(dtype)
    logp = (logits.double() / temperature).log_softmax(-1)
    generator = torch.Generator().manual_seed(2)
    token, got = draws.race(logits.expand(4000, words), temperature, generator)
    assert p_of_chi_square(torch.bincount(token, minlength=words), 4000 * logp.exp()) > 1e-3
    torch.testing.assert_close(got.double(), logp[token], atol=1e-5, rtol=0)


def test_rows_calls_and_seeds_are_independent(parts):
    """Pairs of neighbours are uniform: two rows of a call, and two calls of a row; a seed repeats."""
    generator, logits = torch.Generator().manual_seed(0), torch.zeros(2000, 6)
    first, second = (draws.race(logits, 1.0, generator)[0] for _ in range(2))
    for a, b in ((first, second), (first[:-1], first[1:]), (first, second.roll(1))):
        counts = torch.bincount(a * 6 + b, minlength=36)
        assert p_of_chi_square(counts, torch.full((36,), len(a) / 36)) > 1e-3
    assert torch.equal(first, draws.race(logits, 1.0, torch.Generator().manual_seed(0))[0])


def test_impossible_words_and_parts(parts):
    """A part whose words all have probability 0, and words far below the likeliest."""
    logits = torch.full((300, 50), -torch.inf)
    logits[:, [3, 40]] = torch.tensor([0.0, 90.0])
    token, logp = draws.race(logits, 1.0, torch.Generator().manual_seed(0))
    assert (token == 40).all() and (logp == 0).all()
    logits[:, 40] = 0.0
    token, logp = draws.race(logits, 1.0, torch.Generator().manual_seed(0))
    assert set(token.tolist()) == {3, 40} and (logp - torch.tensor(0.5).log()).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_likeliest_token(dtype, parts):
    """Of equals the first; logits that are not contiguous."""
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0)).to(dtype).T
    logits[:3] = logits[:3].round()
    token, logp = draws.race(logits, 0.0, None)
    assert torch.equal(token, logits.float().argmax(-1))
    want = logits.double().log_softmax(-1).gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(logp.double(), want, atol=1e-5, rtol=0)


@draws.jit
def exponential_numbers(out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, draws._exponential(7, i.to(tl.int64)))


@pytest.mark.skipif(not TRITON, reason="belongs to the Triton path")
def test_the_numbers_of_a_race_are_exponential():
    """Their distribution up to its tail near 0, where races are won."""
    out = torch.empty(2**16)
    exponential_numbers[(1,)](out, len(out))
    assert 0 < out.min() and out.max() < 20
    u = 1 - (-out.double()).exp()
    assert p_of_chi_square(torch.histc(u, 64, 0, 1), torch.full((64,), len(out) / 64)) > 1e-3
    near = u[u < 0.01] * 100  # by the series
    assert p_of_chi_square(torch.histc(near, 16, 0, 1), torch.full((16,), len(out) / 1600)) > 1e-3


# ---- the kernels -----------------------------------------------------------------------------------------


triton_only = pytest.mark.skipif(not TRITON, reason="belongs to the Triton path")
DTYPES = pytest.mark.parametrize("low", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def twins(monkeypatch, operation, *tensors):
    """What the kernel and its twin return, and the tensors that each has changed."""
    found = []
    for interpret in (True, False):
        monkeypatch.setattr(fused_ops, "INTERPRET", interpret)
        own = [x.clone() for x in tensors]
        found.append([operation(*own), *own])
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        # twins may round to neighbours in bf16; in fp32 they add in another order
        step = 2**-7 if a.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(a, b, rtol=step, atol=step * b.abs().max().item())


@triton_only
@DTYPES
def test_kernel_add_norm(low, monkeypatch):
    norm = random_model(FAMILY["llama"]).model.norm
    x, new = torch.randn(2, 48), torch.randn(2, 48).to(low)
    twins(monkeypatch, lambda x, new: fused_ops.add_norm(x, new, norm, low).clone(), x, new)
    twins(monkeypatch, lambda x: fused_ops.add_norm(x, None, norm, low), x)


@triton_only
@DTYPES
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_kernel_turn(name, low, monkeypatch):
    """Every element of the buffers except that of the column stays."""
    attention = random_model(FAMILY[name]).model.layers[0].self_attn
    cos, sin = torch.randn(9, 16), torch.randn(9, 16)
    position, column = torch.tensor([[7], [2]])[:, 0], torch.tensor([3])
    qkv, buffers = torch.randn(2, 10 * 16).to(low), torch.randn(2, 2, 2, 5, 16).to(low)

    def turned(qkv, keys, values):
        return fused_ops.turn(qkv, attention, cos, sin, position, keys, values, column)

    twins(monkeypatch, turned, qkv, *buffers)


@triton_only
@DTYPES
def test_kernel_attend(low, monkeypatch):
    """Columns masked at the left, two tiles of columns, and columns after the one that was written."""
    monkeypatch.setattr(fused_ops, "COLUMNS", 16)
    mask = torch.zeros(2, 1, 1, 32, dtype=low)
    mask[1, ..., :17], mask[..., 21:] = -torch.inf, -torch.inf
    q, (keys, values) = torch.randn(2, 6, 16).to(low), torch.randn(2, 2, 2, 32, 16).to(low)
    values[:, :, 21:] = torch.nan  # must not be read: 0 times NaN is NaN
    column = torch.tensor([20])
    got = fused_ops.attend(q, keys, values, mask, column)
    values[:, :, 21:] = 0
    monkeypatch.setattr(fused_ops, "INTERPRET", False)
    want = fused_ops.attend(q, keys, values, mask, column)
    step = 2**-6 if low == torch.bfloat16 else 1e-6
    torch.testing.assert_close(got, want, rtol=step, atol=step)


@triton_only
@DTYPES
def test_kernel_swiglu(low, monkeypatch):
    twins(monkeypatch, fused_ops.swiglu, (3 * torch.randn(2, 2 * 1100)).to(low))


@triton_only
@torch.no_grad()
def test_a_step_of_kernels(fused):
    config = Qwen3Config(**SIZE | dict(num_hidden_layers=1))
    (want, plain), (got, own) = both_ways(random_model(config), 2)
    torch.testing.assert_close(got, want, atol=2e-6 * want.abs().max().item(), rtol=0)
    torch.testing.assert_close(own.layers[0].keys, plain.layers[0].keys, atol=1e-5, rtol=0)


@torch_only
def test_the_triton_path_passes_this_file():
    pytest.importorskip("triton", reason="triton is not installed: the kernels cannot be interpreted")
    env = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", "-rs", __file__]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 20, run.stdout[-2000:]


def kernels(D, low):
    """Each kernel, the types of its arguments, its constants and how it is launched."""
    small = dict(B="i32", V="i32", stride="i32", parts="i32", inv_T="fp32", logits=f"*{low}", stats="*fp32")
    small |= dict(key="*i64", token="*i64", logp="*fp32", column="*i64", position="*i64", width="i32")
    small |= dict(epsilon="fp32", scale="fp32", Q="i32", K="i32", G="i32", columns="i32", x="*fp32")
    small |= dict.fromkeys(("weight", "q_weight", "k_weight", "cos", "sin"), "*fp32")
    small |= dict.fromkeys(("new", "out", "qkv", "q", "keys", "values", "mask", "both"), f"*{low}")
    parts = dict(ROWS=1, PART=draws.PART)
    return small, [
        (draws._parts_kernel, parts, {}),
        (draws._race_kernel, parts | dict(PARTS=64, SAMPLE=True), dict(num_warps=8)),
        (draws._race_kernel, parts | dict(PARTS=64, SAMPLE=False), dict(num_warps=8)),
        (fused_ops._add_norm, dict(SIZE=1024, ADD=True), {}),
        (fused_ops._add_norm, dict(SIZE=4096, ADD=False), {}),
        (fused_ops._turn, dict(D=D, SIZE=32, NORM=False), {}),
        (fused_ops._turn, dict(D=D, SIZE=64, NORM=True), {}),
        (fused_ops._attend, dict(D=D, SIZE=16, BN=fused_ops.COLUMNS, UPCAST=False), fused_ops.LAUNCH),
        (fused_ops._swiglu, dict(SIZE=1024), {}),
    ]


@torch_only
@pytest.mark.parametrize(
    "dtype, D, cc", [("bf16", 64, 90), ("bf16", 128, 90), ("fp32", 64, 90), ("bf16", 128, 80)]
)
def test_ahead_of_time_compilation(dtype, D, cc):
    """Every kernel compiles for an H100 and an A100, without spills."""
    types, cases = kernels(D, dtype)
    for kernel, constants, launch in cases:
        names = [name for name in kernel.arg_names if name not in constants]
        aligned = [name for name in names if types[name][0] == "*" or name in ("V", "width")]
        compiled(kernel, types, constants, aligned, cc, launch)
