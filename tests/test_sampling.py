"""Sampling and scoring are one distribution; greedy decoding is that of transformers; nothing leaks in."""

from math import exp
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, gpt2, read_jsonl
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import common.tokenization as tok
import grpo
import luffy
import prefix_rft
from common.plumbing import cuda_graph, decoding, models

# of different lengths, so all but the longest are padded on the left; two are equal
QUESTIONS = [
    "Compute 1 + 1.",
    "Who?",
    "What is the median of 75, 60, 21, 3, 8?",
    "Compute 1 + 1.",
    "a b " * 12,
]


def settings(**changed):
    return grpo.parse_args([x for k, v in changed.items() for x in (f"--{k.replace('_', '-')}", str(v))])


@pytest.fixture(params=["tiny", "pad is eos"])
def pair(request, tiny, pad_is_eos):
    """A model with relative positions; one with absolute positions whose pad token is EOS."""
    if request.param == "tiny":
        return tiny
    return AutoModelForCausalLM.from_pretrained(pad_is_eos).eval(), AutoTokenizer.from_pretrained(pad_is_eos)


# ---- greedy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [512, 2])
def test_greedy_is_what_generate_gives(pair, rows):
    """In any batch of prompts: padding, rows that leave and equal prompts change nothing."""
    model, tokenizer = pair
    prompts = tok.encode_prompts(tokenizer, QUESTIONS)
    args = settings(max_new_tokens=24, sample_rows=rows)
    responses, _ = grpo.sample(model, tokenizer, prompts, 0.0, args)
    for prompt, response in zip(prompts, responses):
        ids = torch.tensor([prompt])
        want = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        assert response == want[0, len(prompt) :].tolist()
    assert len({len(response) for response in responses}) > 1 or tokenizer.chat_template is None


# ---- sampled = scored ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.8])
def test_log_probs_of_samples_are_those_of_scoring(pair, temperature):
    """The ratio of sampling (left-padded, cached) and scoring (right-padded) is 1 at any temperature."""
    model, tokenizer = pair
    torch.manual_seed(0)
    prompts = tok.encode_prompts(tokenizer, QUESTIONS * 4)
    args = settings(max_new_tokens=24, temperature=temperature, sample_rows=12, micro_batch_tokens=200)
    responses, sampled = grpo.sample(model, tokenizer, prompts, temperature, args)
    assert [len(x) for x in sampled] == [len(x) for x in responses]
    tokens, mask = tok.join(prompts, responses)
    scored, entropy = grpo.score(model, tokens, mask, args)
    ratio = (scored - tok.align(sampled, mask)).exp()
    assert (ratio - 1).abs().max() < 1e-4
    logits = model(tokens).logits.float() / temperature  # the plain formula
    p = logits.log_softmax(-1)[:, :-1]
    plain = p.gather(-1, tokens[:, 1:, None])[..., 0] * mask[:, 1:]
    torch.testing.assert_close(scored[:, 1:], plain, atol=1e-4, rtol=0)
    torch.testing.assert_close(entropy[:, 1:], -(p.exp() * p).sum(-1) * mask[:, 1:], atol=1e-4, rtol=0)
    assert (scored[mask == 0] == 0).all()


def rolled_out(script, tiny, *flags):
    """The completions of four groups of four, and the arguments; demonstrations of different lengths."""
    args = script.parse_args(["--group-size", "4", "--max-new-tokens", "40", *flags])
    solution = "Let me work step by step. Step 1: 3 * 2 = 6. So the answer is \\boxed{6}"
    rows = [{"question": q, "gold": "6", "solution": solution, "demonstrated": True} for q in QUESTIONS[:4]]
    torch.manual_seed(0)
    groups = script.rollout(*tiny, rows, *([1] * (script is not grpo)), args)
    return [completion for group in groups for completion in group], args


@pytest.mark.parametrize(
    "script, flags",
    [
        (grpo, ""),
        (prefix_rft, ""),
        (luffy, ""),
        (luffy, "--uft-steps 4 --hybrids 3"),
        (luffy, "--max-new-tokens 12"),  # truncated within the demonstration
    ],
)
def test_a_completion_has_the_log_probs_of_its_sampler(script, flags, tiny):
    """One for each response token: what scoring gives, and 0 for a prefix, which nobody sampled."""
    batch, args = rolled_out(script, tiny, *flags.split())
    tokens, mask = tok.join([c["prompt"] for c in batch], [c["response"] for c in batch])
    scored, _ = script.score(tiny[0], tokens, mask, args)
    sampled = 0
    for completion, logp, on in zip(batch, scored, mask):
        n = completion.get("prefix_len", 0)
        seen = completion["sampled_logp"]
        assert len(seen) == len(completion["response"]) and seen[:n] == [0.0] * n
        torch.testing.assert_close(torch.tensor(seen[n:]), logp[on == 1][n:], atol=1e-4, rtol=0)
        sampled += len(seen) - n
    assert sampled > 20


@pytest.mark.parametrize("hybrids", [1, 3, 4])
def test_the_first_few_completions_of_a_group_share_a_prefix(hybrids, tiny):
    batch, _ = rolled_out(luffy, tiny, "--uft-steps", "4", "--hybrids", str(hybrids))
    lengths = torch.tensor([c["prefix_len"] for c in batch]).view(4, 4)
    assert (lengths[:, :hybrids] == lengths[:, :1]).all() and (lengths[:, hybrids:] == 0).all()
    assert len(set(lengths[:, 0].tolist())) > 1  # drawn for each question anew
    for i, completion in enumerate(batch):
        first = batch[i - i % 4]["response"]
        assert completion["response"][: lengths[i // 4, i % 4]] == first[: lengths[i // 4, i % 4]]


@pytest.mark.parametrize("name, updates", [("grpo", 1), ("prefix_rft", 1), ("prefix_rft", 2), ("luffy", 2)])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_sampler_gap_is_the_distance_of_the_sampler(name, updates, shift, run, tmp_path, monkeypatch):
    """Sampler and policy agree but for rounding. A sampler with e^-0.5 times the probabilities is seen.

    With --tis-cap each gradient is multiplied by e^0.5, or by the cap. Prefix tokens count as 0.
    """
    script = {"grpo": grpo, "prefix_rft": prefix_rft, "luffy": luffy}[name]
    rollout = script.rollout

    def shifted(*args):
        groups = rollout(*args)
        for completion in [completion for group in groups for completion in group]:
            n = completion.get("prefix_len", 0)
            own = [logp - shift for logp in completion["sampled_logp"][n:]]
            completion["sampled_logp"] = completion["sampled_logp"][:n] + own
        return groups

    monkeypatch.setattr(script, "rollout", shifted)
    few = "--steps 1 --eval-questions 1 --eval-samples 0 --save-every 0 --overlong-tokens 40".split()
    lines = []
    for i, cap in enumerate((0, 2, 1.2)):
        out = run(name, tmp_path / str(i), *few, "--minibatches", updates, "--tis-cap", cap)
        lines.append(read_jsonl(out / "metrics.jsonl")[1])
    sampled = 1 - lines[0].get("prefix_frac", 0)
    assert name == "grpo" or sampled < 0.9
    for line in lines:
        assert line["sampler_gap"] == pytest.approx(shift * sampled, abs=1e-5)
    if name == "grpo":
        norms = [line["grad_norm"] for line in lines]
        assert norms[1] / norms[0] == pytest.approx(exp(shift), rel=1e-4)
        assert norms[2] / norms[0] == pytest.approx(min(1.2, exp(shift)), rel=1e-4)


def test_response_tokens_in_a_prompt_count_against_the_budget(tiny, monkeypatch):
    """A row that has spent its budget is not sampled. No row needs positions beyond prompt and budget."""
    model, tokenizer = tiny
    prompts = tok.encode_prompts(tokenizer, QUESTIONS * 4)
    spent = [0, 3, 10, 12, 7] * 4
    starts = [x + [50] * n for x, n in zip(prompts, spent)]
    most = max(map(len, prompts)) + 12
    monkeypatch.setattr(model.config, "max_position_embeddings", most)
    args = settings(max_new_tokens=12)
    torch.manual_seed(0)
    responses, logps = grpo.sample(model, tokenizer, starts, 50.0, args, spent)  # hardly an EOS
    lengths = list(map(len, responses))
    assert all(n <= 12 - k for n, k in zip(lengths, spent)) and lengths == list(map(len, logps))
    assert {n for n, k in zip(lengths, spent) if k == 12} == {0}
    assert sum(n == 12 - k for n, k in zip(lengths, spent)) > 12
    # a finished row stays in place: one of twenty is too few to leave the batch
    model, _ = models.load_model(str(ROOT / "tiny/model"))  # refuses positions that do not exist
    model.config.max_position_embeddings = most
    grpo.sample(model, tokenizer, prompts[:-1] + [prompts[-1] + [50] * 7], 50.0, args, [0] * 19 + [7])


def test_the_cache_has_the_dtype_of_activations(tiny, monkeypatch):
    """Under autocast RoPE makes fp32 keys. The cache holds bf16, and samples are still what is scored."""
    model, tokenizer = tiny
    caches, make = [], decoding.Cache

    def remember(config):
        caches.append(make(config))
        return caches[-1]

    monkeypatch.setattr(decoding, "Cache", remember)
    prompts = tok.encode_prompts(tokenizer, QUESTIONS * 8)
    for enabled, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            responses, sampled = grpo.sample(model, tokenizer, prompts, 1.0, settings(max_new_tokens=16))
            tokens, mask = tok.join(prompts, responses)
            scored, _ = grpo.score(model, tokens, mask, settings())
        layers = caches.pop().layers
        assert {x.dtype for layer in layers for x in (layer.keys, layer.values)} == {dtype}
        gap = ((scored - tok.align(sampled, mask)).exp() - 1).abs().sum() / mask.sum()
        assert gap < (0.05 if enabled else 1e-5)


def test_buffers_give_the_samples_of_transformers_cache(tiny, monkeypatch):
    """Bit for bit, while rows leave and columns are added; a step does not copy the keys it has."""
    model, tokenizer = tiny
    prompts = tok.encode_prompts(tokenizer, QUESTIONS * 8)
    args = settings(max_new_tokens=200)
    places, update = [], decoding.Cache.update

    def watched(cache, keys, values, layer_idx, *more, **others):
        seen = update(cache, keys, values, layer_idx, *more, **others)
        places.append((layer_idx, seen[0].data_ptr(), seen[1].data_ptr()))
        return seen

    monkeypatch.setattr(decoding.Cache, "update", watched)
    torch.manual_seed(0)
    fixed = grpo.sample(model, tokenizer, prompts, 3.0, args)
    lengths = [len(response) for response in fixed[0]]
    assert min(lengths) < 100 < 150 < max(lengths)
    calls = model.config.num_hidden_layers * max(lengths)
    assert len(places) == calls and len(set(places)) < calls / 4
    monkeypatch.setattr(cuda_graph, "obstacles", lambda *_: ("transformers manages its cache",) * 2)
    torch.manual_seed(0)
    assert grpo.sample(model, tokenizer, prompts, 3.0, args) == fixed


def test_a_model_with_sliding_windows_samples_what_it_scores():
    """Its cache has a fixed size of its own, so transformers manages it."""
    torch.manual_seed(0)
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, initializer_range=0.3)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, sliding_window=4, head_dim=8)
    model = MistralForCausalLM(MistralConfig(vocab_size=30, eos_token_id=0, **size, **heads)).eval()
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [2], [7, 7, 7]] * 8
    args = settings(max_new_tokens=24)
    responses, sampled = grpo.sample(model, SimpleNamespace(eos_token_id=0), prompts, 1.0, args)
    tokens, mask = tok.join(prompts, responses)
    scored, _ = grpo.score(model, tokens, mask, args)
    assert ((scored - tok.align(sampled, mask)).exp() - 1).abs().max() < 1e-4
    assert len({len(response) for response in responses}) > 2  # rows left


def test_self_check_stops_a_run_whose_head_is_not_a_plain_product(tiny):
    """`logprobs` cannot score a head with a bias: an error before any training."""
    tokenizer, rows = tiny[1], {"question": QUESTIONS}
    model = AutoModelForCausalLM.from_pretrained(ROOT / "tiny/model").eval()
    args = settings(max_new_tokens=8)
    grpo.self_check(model, tokenizer, rows, args)
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(0, 1, len(model.lm_head.weight)))
    with pytest.raises(SystemExit, match="sampling and in scoring disagree"):
        grpo.self_check(model, tokenizer, rows, args)


VOCABULARY, EOS = 7, 0


@pytest.fixture(scope="module")
def seven_words():
    """A model with a vocabulary of seven, of which 0 is EOS, and two prompts of different lengths."""
    model = gpt2(VOCABULARY, eos_token_id=EOS, pad_token_id=EOS, initializer_range=0.15)
    return model, SimpleNamespace(eos_token_id=EOS), ([3, 1, 4, 1, 5], [2])


def every_response(prompt):
    """All responses of at most two tokens: EOS alone, or a word and then any word or EOS."""
    return [[EOS], *([a, b] for a in range(1, VOCABULARY) for b in range(VOCABULARY))]


def probabilities(model, prompt, temperature):
    """P of each response of two tokens, unpadded and in float64, by the plain formula."""
    responses = every_response(prompt)
    p = []
    for response in responses:
        logits = model(torch.tensor([prompt + response])).logits[0].double() / temperature
        steps = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        p.append(torch.stack([logits[i].log_softmax(-1)[y] for i, y in zip(steps, response)]).sum().exp())
    return torch.stack(p).detach()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scored_probabilities_of_all_responses_sum_to_one(seven_words, temperature):
    """`logprobs` of all possible responses in one batch are the distribution of the model."""
    model, _, prompts = seven_words
    for prompt in prompts:
        responses = every_response(prompt)
        tokens, mask = tok.join([prompt] * len(responses), responses)
        scored = grpo.logprobs(model, tokens, mask, temperature)[0].sum(1).exp().detach()
        assert abs(scored.sum() - 1) < 1e-5
        torch.testing.assert_close(
            scored.double(), probabilities(model, prompt, temperature), atol=1e-6, rtol=1e-4
        )


def chi_square_p(counts, p):
    """P(chi-square >= observed). Cells with an expected count below 5 are merged."""
    expected = p / p.sum() * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]]).clamp(min=1e-9)
    statistic = ((observed - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2).item()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_frequencies_are_the_scored_probabilities(seven_words, temperature):
    """8,000 responses of two tokens to two prompts in one batch, against enumerated probabilities."""
    model, tokenizer, prompts = seven_words
    torch.manual_seed(0)
    args = settings(max_new_tokens=2, sample_rows=4000)
    responses, _ = grpo.sample(model, tokenizer, [p for _ in range(4000) for p in prompts], temperature, args)
    for k, prompt in enumerate(prompts):
        cells = {tuple(response): i for i, response in enumerate(every_response(prompt))}
        counts = torch.zeros(len(cells), dtype=torch.float64)
        for response in responses[k::2]:
            counts[cells[tuple(response)]] += 1  # a KeyError: an impossible response
        assert chi_square_p(counts, probabilities(model, prompt, temperature)) > 1e-3
        for wrong in (temperature * 1.3, temperature / 1.3):  # the test has power
            assert chi_square_p(counts, probabilities(model, prompt, wrong)) < 1e-6
        assert chi_square_p(counts, probabilities(model, prompts[1 - k], temperature)) < 1e-6


# ---- budgets and leaks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 2, 9])
def test_a_response_ends_with_eos_or_with_the_budget(seven_words, budget):
    model, tokenizer, prompts = seven_words
    torch.manual_seed(0)
    responses, logps = grpo.sample(model, tokenizer, list(prompts) * 99, 1.0, settings(max_new_tokens=budget))
    for response, logp in zip(responses, logps):
        assert 1 <= len(response) <= budget and len(logp) == len(response)
        assert EOS not in response[:-1] and (response[-1] == EOS or len(response) == budget)
        assert max(logp) <= 0
    assert {len(response) for response in responses} == set(range(1, budget + 1))


def test_no_prompts_no_responses(seven_words):
    assert grpo.sample(*seven_words[:2], [], 1.0, settings()) == ([], [])


def test_responses_come_in_the_order_of_their_prompts(seven_words):
    """A greedy response depends on its prompt alone, not on other rows or its place."""
    model, tokenizer, _ = seven_words
    prompts = [[1 + i % 6] * (1 + i % 5) for i in range(30)] * 2  # thirty prompts, twice
    together, _ = grpo.sample(model, tokenizer, prompts, 0.0, settings(max_new_tokens=5, sample_rows=25))
    alone = [grpo.sample(model, tokenizer, [p], 0.0, settings(max_new_tokens=5))[0][0] for p in prompts[:30]]
    assert together == alone * 2 and len(set(map(tuple, alone))) > 3


def test_a_generation_config_does_not_leak_into_rollouts(tiny, tmp_path):
    """The same samples, bit for bit, from a folder that asks for top-k, top-p, a penalty and T = 0.1."""
    model, tokenizer = tiny
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    biased = dict(
        do_sample=True, top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=5.0, min_new_tokens=20
    )
    GenerationConfig(**biased, eos_token_id=0, pad_token_id=1).save_pretrained(tmp_path)
    other, other_tokenizer = models.load_model(str(tmp_path))
    assert other.generation_config.top_k == 1  # it has been read
    prompts, samples = tok.encode_prompts(tokenizer, QUESTIONS), []
    for m, t in ((model, tokenizer), (other, other_tokenizer)):
        torch.manual_seed(0)
        samples.append(grpo.sample(m, t, prompts, 1.0, settings(max_new_tokens=16)))
    assert samples[0] == samples[1]


# ---- padding and memory ----------------------------------------------------------------------------------


def test_padded_is_unpadded(pair):
    """Log-probabilities and entropies of a row do not depend on the padding to its right."""
    model, tokenizer = pair
    prompts = tok.encode_prompts(tokenizer, QUESTIONS)
    responses = [tok.encode_response(tokenizer, f"\\boxed{{{'7' * n}}}") for n in (1, 9, 2, 5, 3)]
    tokens, mask = tok.join(prompts, responses)
    together = grpo.logprobs(model, tokens, mask, 0.9)
    for i, row in enumerate(zip(prompts, responses)):
        alone_tokens, alone_mask = tok.join([row[0]], [row[1]])
        alone = grpo.logprobs(model, alone_tokens, alone_mask, 0.9)
        for a, b in zip(alone, together):
            torch.testing.assert_close(a[0], b[i, : a.shape[1]], atol=2e-5, rtol=0)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation creates, forward or backward."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_a_training_step_never_holds_tokens_times_vocabulary():
    """A vocabulary of 8,192, 1,000 trained tokens: no tensor has 8 million elements."""
    torch.manual_seed(0)
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8192, max_position_embeddings=512, **size)).eval()
    tokens, mask = tok.join([[5] * 10] * 5, [list(range(200))] * 5)
    one = torch.ones_like(mask, dtype=torch.float32)
    with Largest() as ours:
        logp, _ = grpo.logprobs(model, tokens, mask, 1.0)
        loss, _, _ = grpo.policy_loss(logp, logp.detach(), logp.detach(), one, mask, one, settings())
        loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0
    with Largest() as plain:
        model(tokens).logits.log_softmax(-1)
    assert plain.elements >= 1000 * 8192  # the hook does see the logits of the plain way
    assert ours.elements < 1000 * 8192 * 0.6
