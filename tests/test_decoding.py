"""The recorded step on any machine, a tape for a CUDA graph; rows that leave, windows, the copy."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, are_greedy, gpt2
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

import common.tokenization as tok
import grpo
import idft_hinted
from common.plumbing import cuda_graph, decoding, models

SIZE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
SIZE |= dict(num_key_value_heads=1, max_position_embeddings=512, initializer_range=0.2, vocab_size=50)
QUESTIONS = ["Compute 1 + 1.", "Who?", "What is the median of 75, 60, 21, 3, 8?", "a b " * 12]
EOS = SimpleNamespace(eos_token_id=0)


def settings(**changed):
    return grpo.parse_args([x for k, v in changed.items() for x in (f"--{k.replace('_', '-')}", str(v))])


def random_model(config):
    torch.manual_seed(0)
    config.eos_token_id, config.pad_token_id = 0, 1
    return AutoModelForCausalLM.from_config(config).eval()


class Tape(TorchDispatchMode):
    """What a CUDA graph is: the operations of a step, repeated on the same memory, without its Python."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            schema = func._schema
            if any(x.alias_info and not x.alias_info.is_write for x in schema.returns):
                continue  # a view is there already
            new = func(*args, **kwargs)
            if not schema.is_mutable:
                for a, b in zip(*(x if isinstance(x, (tuple, list)) else [x] for x in (out, new))):
                    if isinstance(a, torch.Tensor):
                        a.copy_(b)


@pytest.fixture
def recorded(monkeypatch):
    """The constants of a GPU, smaller, and a tape for a graph; the list has an entry for each recording."""
    tapes = []

    def record(step, generator):
        tapes.append(tape := Tape())
        with tape:
            step()  # a graph only records: what this computes stands for the first replay
        first = [True]

        def replay():
            if not first:
                tape.replay()
            first.clear()

        return replay

    monkeypatch.setattr(cuda_graph, "record", record)
    monkeypatch.setattr(decoding, "RECORD", {"cpu": True})
    monkeypatch.setattr(decoding, "LOOK", {"cpu": 3})
    monkeypatch.setattr(decoding, "COLUMNS", {"cpu": 16})
    monkeypatch.setattr(decoding, "LEAVE", {"cpu": 0.7})
    return tapes


# ---- the recorded step -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_replayed_is_what_runs_eagerly(tiny, temperature, request):
    """Tokens to the bit, over rows that leave and buffers that grow; no step asks the host."""
    model, tokenizer = tiny
    prompts = tok.encode_prompts(tokenizer, QUESTIONS * 6)
    args = settings(max_new_tokens=60)
    torch.manual_seed(0)
    eager = grpo.sample(model, tokenizer, prompts, temperature, args)
    tapes = request.getfixturevalue("recorded")
    torch.manual_seed(0)
    replayed = grpo.sample(model, tokenizer, prompts, temperature, args)
    if temperature:  # rows leave at other steps, so the generator's numbers fall on other rows
        assert replayed[0] != eager[0]
    else:
        assert replayed[0] == eager[0]
    assert len(tapes) > 3 and len({len(x) for x in eager[0]}) > 3
    tokens, mask = tok.join(prompts, replayed[0])
    scored, _ = grpo.score(model, tokens, mask, args)
    assert (scored - tok.align(replayed[1], mask)).abs().max() < 1e-5


def test_a_step_is_recorded_once_for_each_shape(recorded):
    """Seventeen rows of a model that hardly ever stops: as many recordings as its buffers grow."""
    model = random_model(LlamaConfig(**SIZE))
    model.lm_head.weight.data[0] = 0
    args = settings(max_new_tokens=100)
    torch.manual_seed(0)
    rows, _ = grpo.sample(model, SimpleNamespace(eos_token_id=49), [[3, 4, 5]] * 17, 0.3, args)
    assert 4 <= len(recorded) <= 12 and max(map(len, rows)) > 60


def test_replayed_draws_are_new(recorded):
    """Seven equal words, replayed for a hundred steps: neighbours are independent."""
    model = gpt2(7, eos_token_id=6, pad_token_id=6)
    model.transformer.wte.weight.data.zero_()
    torch.manual_seed(0)
    rows, _ = grpo.sample(
        model, SimpleNamespace(eos_token_id=6), [[1]] * 600, 1.0, settings(max_new_tokens=99)
    )
    pairs = torch.tensor([pair for row in rows for pair in zip(row[:-2], row[1:-1])])
    counts = torch.bincount(pairs[:, 0] * 6 + pairs[:, 1], minlength=36).double()
    chi = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert recorded and torch.special.gammaincc(torch.tensor(17.5).double(), chi / 2) > 1e-3


def test_rewrites_are_replayed(tiny, request, monkeypatch):
    """Two contexts, nucleus, the table of \\boxed{: the likeliest tokens are those of the eager step."""
    model, tokenizer = tiny
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda x, generator: x.fill_(1))
    hinted, student = (tok.encode_prompts(tokenizer, q) for q in (QUESTIONS, QUESTIONS[::-1]))
    args = idft_hinted.parse_args("--beta 1 --max-new-tokens 40".split())
    eager = idft_hinted.rewrite(model, tokenizer, hinted, student, args)
    tapes = request.getfixturevalue("recorded")
    assert idft_hinted.rewrite(model, tokenizer, hinted, student, args) == eager and tapes


# ---- rows and buffers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("columns", [16, 33])
def test_odd_sizes_change_nothing(tiny, rows, columns, monkeypatch):
    """Greedy responses and log-probs in batches of any size, whose buffers grow by any number of columns."""
    model, tokenizer = tiny
    prompts = tok.encode_prompts(tokenizer, QUESTIONS * 5)
    want = grpo.sample(model, tokenizer, prompts, 0.0, settings(max_new_tokens=70))
    monkeypatch.setattr(decoding, "COLUMNS", {"cpu": columns})
    monkeypatch.setattr(decoding, "LOOK", {"cpu": 5})
    got = grpo.sample(model, tokenizer, prompts, 0.0, settings(max_new_tokens=70, sample_rows=rows))
    assert got[0] == want[0]
    for a, b in zip(got[1], want[1]):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=1e-5, rtol=0)


def test_batches_have_like_lengths_and_a_bound_on_what_they_hold():
    lengths = [5, 900, 4, 300, 6, 7]
    parts = [part.tolist() for part in decoding.batches(range(6), [3] * 6, lengths)]
    assert parts == [[2, 0, 4], [5], [3], [1]]  # 300 > 2 x 7 + 256
    sizes = [9, 1, 9, 9, 2, 9]  # two rows of length 6, one of 900
    parts = [part.tolist() for part in decoding.batches(range(6), sizes, lengths)]
    assert parts == [[2, 0], [4, 5], [3], [1]]
    assert decoding.batches([], [3] * 6, lengths) == []


# ---- models that cannot have fixed buffers ---------------------------------------------------------------

WINDOWS = {
    "mistral": MistralConfig(sliding_window=6, **SIZE),
    "qwen2": Qwen2Config(use_sliding_window=True, sliding_window=6, max_window_layers=1, **SIZE),
    "gemma3": Gemma3TextConfig(head_dim=16, sliding_window=6, sliding_window_pattern=2, **SIZE),
}
DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)


@pytest.mark.parametrize("name", WINDOWS)
def test_models_with_sliding_windows_take_the_eager_path(name, recorded, capsys, monkeypatch):
    """Which is said once a process."""
    monkeypatch.setattr(cuda_graph.Replay, "said", set())
    model = random_model(WINDOWS[name])
    prompts = [[3 + i] * (3 + i) for i in range(9)]
    args = settings(max_new_tokens=30, sample_rows=5)
    for _ in range(2):
        responses, logps = grpo.sample(model, EOS, prompts, 0.0, args)
    assert not recorded and capsys.readouterr().out.count("sliding windows") == 1
    assert are_greedy(responses, model, prompts, 30)
    tokens, mask = tok.join(prompts, responses)
    scored, _ = grpo.score(model, tokens, mask, args)
    assert (scored - tok.align(logps, mask)).abs().max() < 1e-4


def test_a_reason_is_given_for_what_is_not_recorded():
    plain = random_model(LlamaConfig(**SIZE))
    dynamic = random_model(LlamaConfig(**SIZE, rope_parameters=DYNAMIC))
    reasons = [cuda_graph.obstacles(m, decoding.Cache(m.config)) for m in (plain, dynamic)]
    assert reasons[0] == ("", "") and reasons[1][0] == "" and "RoPE" in reasons[1][1]


# ---- the copy that samples -------------------------------------------------------------------------------


@pytest.fixture(params=["tiny", "gpt2", "qwen2"])
def trained(request):
    """Tied and untied heads, biases, transposed weights."""
    if request.param == "tiny":
        return AutoModelForCausalLM.from_pretrained(ROOT / "tiny/model").eval()
    if request.param == "gpt2":
        return gpt2(50)
    return random_model(Qwen2Config(tie_word_embeddings=False, **SIZE))


def test_the_copy_has_the_logits_of_autocast(trained):
    """Bit for bit, also after an optimizer step; in fp32 it is the model."""
    tokens = torch.randint(2, trained.config.vocab_size, (3, 11))
    assert models.sampler(trained) is trained
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    places = set()
    for _ in range(3):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            copy = models.sampler(trained)
            assert copy is not trained and torch.equal(copy(tokens).logits, trained(tokens).logits)
        places.add(copy.get_output_embeddings().weight.data_ptr())
        trained(tokens).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(places) == 1  # refreshed in place: what is recorded stays valid
    assert trained.get_input_embeddings().weight is copy.get_input_embeddings().weight
    names = [name for name, p in trained.named_parameters() if p.grad is not None]
    assert not names and all(p.dtype == torch.float32 for p in trained.parameters())


def test_the_copy_takes_half_of_the_linear_weights_and_no_more():
    model = random_model(Qwen2Config(**SIZE, tie_word_embeddings=True))
    with torch.autocast("cpu", torch.bfloat16):
        copy = models.sampler(model)
    own = {id(p) for p in model.parameters()}
    more = sum(p.nbytes for p in copy.parameters() if id(p) not in own)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert more == sum(2 * p.numel() for m in linear for p in m.parameters())


def test_samples_in_bf16_are_scored_alike(tiny):
    model, tokenizer = tiny
    prompts, args = tok.encode_prompts(tokenizer, QUESTIONS * 8), settings(max_new_tokens=16)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        responses, logps = grpo.sample(model, tokenizer, prompts, 1.0, args)
        tokens, mask = tok.join(prompts, responses)
        scored, _ = grpo.score(model, tokens, mask, args)
    assert ((scored - tok.align(logps, mask)).exp() - 1).abs().sum() / mask.sum() < 0.05


def test_the_boxed_answer_is_spelled_whatever_its_tokens():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/model")
    table = tok.spelling(tokenizer, len(tokenizer) + 3, "\\boxed{")
    assert table.shape == (8, len(tokenizer) + 3)
    for text in ("so \\boxed{7}", "\\\\boxed{", "\\boxe \\boxed 7", "\\box\\boxed{", "b{oxed"):
        pieces = [tokenizer.encode(text, add_special_tokens=False)]
        pieces.append([i for c in text for i in tokenizer.encode(c, add_special_tokens=False)])
        for ids in pieces:
            spelled = 0
            for i in ids:
                spelled = table[spelled, i].item()
            assert (spelled == 7) == ("\\boxed{" in tokenizer.decode(ids))
