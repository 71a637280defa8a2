"""What only a GPU shows: the compiled kernels, every script in both dtypes, agreement with the CPU."""

import importlib
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, killed_after, read_jsonl, weights
from test_devices import RUNS
from test_logprob import BOUND, check, inputs

import common.tokenization as tok
import grpo
import sft
from common.logprob import token_logprobs
from common.plumbing import fused_ops, models

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
WIDE = [(1000, 128, 479), (2000, 576, 49152), (777, 896, 32003), (3000, 1536, 151936)]  # tokens, D, V


def bound(dtype, d):
    """The allowed error of logp and entropy for hidden states of width d, relative to the logit scale.

    fp32: the d products of a logit are added with rounding to nearest, so errors cancel and grow as
    sqrt(d). Measured is 0.7 sqrt(d) 2**-24 at most, which is below BOUND up to d = 2000.
    bf16: a tensor core adds 16 products at a time and truncates each sum, always toward 0, so errors
    add up and grow as d. Each of the d / 16 additions loses 2**-24 of a partial sum on average, and
    partial sums are on average half of a large logit: in all d / 16 * 2**-25 = d * 2**-29. In logp the
    target's logit and the largest one may have opposite signs, which doubles it. Measured on an H100
    is 0.4 to 0.5 of d * 2**-28, d from 128 to 4096; logits of torch's own GEMM lose as much.
    """
    return BOUND if dtype == torch.float32 else max(BOUND, d * 2.0**-28)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_the_compiled_kernels_against_float64(shape, dtype):
    args = [x.detach().cuda().requires_grad_(x.requires_grad) for x in inputs(*shape, dtype, ignore=0.2)]
    check(args, 0.7, bound(dtype, shape[1]), BOUND if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_rank_without_rows_adds_no_gradient(dtype):
    """Under torchrun it computes with no tokens at all, as all ranks have equal numbers of micro-batches."""
    h, w, *_ = inputs(0, 128, 479, dtype)
    h, w = (x.detach().cuda().requires_grad_() for x in (h, w))
    logp, entropy = token_logprobs(h, w, torch.full((0,), -100, device=h.device))
    dh, dw = torch.autograd.grad(logp.sum() + entropy.sum(), (h, w))
    assert logp.shape == entropy.shape == (0,) and dh.shape == h.shape and dw.eq(0).all()


def on_cpu(patch):
    """Run on the CPU of a machine with a GPU."""
    patch.setattr(torch.cuda, "is_available", lambda: False)


def test_peak_memory_on_the_cpu_of_a_machine_with_a_gpu():
    """In a new process, in which CUDA has not been initialised."""
    lines = [
        "import torch",
        "torch.cuda.is_available = lambda: False",
        "from common.plumbing import runs",
        "assert runs.peak_memory() > 10**6",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, check=True)


@pytest.mark.parametrize("fused", [False, True], ids=["as it is", "fused"])
def test_greedy_responses_are_the_cpu_s(fused, monkeypatch):
    monkeypatch.setattr(fused_ops, "FUSED", fused)
    questions = ["Compute 1 + 1.", "Who?", "What is the median of 75, 60, 21, 3, 8?", "a b " * 12] * 2
    args, done = grpo.parse_args(["--max-new-tokens", "60"]), []
    for place in ("cuda", "cpu"):
        with monkeypatch.context() as patch:
            if place == "cpu":
                on_cpu(patch)
            model, tokenizer = models.load_model(str(ROOT / "tiny/model"))
            assert model.device.type == place
            prompts = tok.encode_prompts(tokenizer, questions)
            responses, logps = grpo.sample(model, tokenizer, prompts, 0.0, args)
            scored = grpo.score(model, *tok.join(prompts, responses, model.device), args)[0].cpu()
            done.append((responses, torch.tensor(sum(logps, [])), scored[scored != 0]))
    assert done[0][0] == done[1][0]
    for a, b in zip(done[0][1:], done[1][1:]):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_supervised_steps_are_the_cpu_s(small, tmp_path, monkeypatch):
    """The same rows in the same order: metrics and weights of four steps agree up to rounding."""
    args = sft.parse_args(small("sft", tmp_path / "cuda"))
    sft.main(args)
    with monkeypatch.context() as patch:
        on_cpu(patch)
        sft.main(sft.parse_args(small("sft", tmp_path / "cpu")))
    a, b = (read_jsonl(tmp_path / place / "metrics.jsonl") for place in ("cuda", "cpu"))
    for x, y in zip(a[1:], b[1:], strict=True):
        for key in ("loss", "entropy", "grad_norm"):
            assert x[key] == pytest.approx(y[key], rel=1e-3), key
    a, b = (weights(tmp_path / place / "final") for place in ("cuda", "cpu"))
    start = weights(ROOT / "tiny/model")
    moved = max((a[name] - p).abs().max().item() for name, p in start.items())
    # AdamW moves a weight by about lr even if its gradient is tiny
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 0.1 * moved


# two ranks cannot share a GPU: NCCL wants one each, and gloo lacks what FSDP2 asks of CUDA tensors
# (https://github.com/pytorch/pytorch/issues/132471)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_two_ranks_train_on_two_gpus(name, small, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    argv = [*launch, f"{name}.py", *small(name, tmp_path / "run")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert [x["step"] for x in lines] == [0, 1, 2, 3, 4] and (tmp_path / "run/final").is_dir()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name, flags", RUNS, ids=[" ".join(x).strip() for x in RUNS])
def test_a_script_runs_and_resumes(name, flags, dtype, small, tmp_path):
    """All numbers of all lines are finite, there is a gradient, and an interrupted run resumes."""
    script, out = importlib.import_module(name), tmp_path / "run"
    argv = small(name, out, "--dtype", dtype, *flags.split(), "--gradient-checkpointing")
    with killed_after(3):  # of four steps, with a checkpoint after two
        script.main(script.parse_args(argv))
    script.main(script.parse_args([*argv, "--resume"]))
    lines = [x for x in read_jsonl(out / "metrics.jsonl") if "grad_norm" in x]
    assert [x["step"] for x in lines] == [*range(1, lines[-1]["step"] + 1)] and len(lines) >= 4
    assert max(x["grad_norm"] for x in lines) > 0
    assert all(math.isfinite(x[k]) for x in lines for k in ("loss", "grad_norm", "entropy", "tokens_trained"))
    assert all(p.isfinite().all() for p in weights(out / "final").values())
