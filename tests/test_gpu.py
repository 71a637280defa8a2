"""What only a GPU shows: the kernels as compiled, every script in both dtypes, the CPU's numbers."""

import importlib
import math
import os
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

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
WIDE = [(1000, 128, 479), (2000, 576, 49152), (777, 896, 32003), (3000, 1536, 151936)]  # tokens, D, V


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_the_compiled_kernels_against_float64(shape, dtype):
    args = [x.detach().cuda().requires_grad_(x.requires_grad) for x in inputs(*shape, dtype, ignore=0.2)]
    check(args, 0.7, BOUND, BOUND if dtype == torch.float32 else 4e-3)


def on_cpu(patch):
    patch.setattr(torch.cuda, "is_available", lambda: False)


def test_greedy_responses_are_the_cpu_s(monkeypatch):
    questions = ["Compute 1 + 1.", "Who?", "What is the median of 75, 60, 21, 3, 8?", "a b " * 12] * 2
    args, done = grpo.parse_args(["--max-new-tokens", "60"]), []
    for place in ("cuda", "cpu"):
        with monkeypatch.context() as patch:
            if place == "cpu":
                on_cpu(patch)
            model, tokenizer = tok.load_model("tiny/model")
            assert model.device.type == place
            prompts = tok.encode_prompts(tokenizer, questions)
            responses, logps = grpo.sample(model, tokenizer, prompts, 0.0, args)
            scored = grpo.score(model, *tok.join(prompts, responses, model.device), args)[0].cpu()
            done.append((responses, torch.tensor(sum(logps, [])), scored[scored != 0]))
    assert done[0][0] == done[1][0]
    for a, b in zip(done[0][1:], done[1][1:]):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_supervised_steps_are_the_cpu_s(small, tmp_path, monkeypatch):
    """Same rows, same order: the metrics and weights of four steps, but for rounding."""
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
    moved = max((a[k] - p).abs().max().item() for k, p in weights("tiny/model").items())
    assert (
        max((a[k] - b[k]).abs().max().item() for k in a) < 0.1 * moved
    )  # AdamW moves a tiny gradient by lr, too


TWO = """
import runpy, sys, torch
import torch.distributed as dist
begin = dist.init_process_group
dist.init_process_group = lambda kind, **more: begin("gloo", **more)  # NCCL wants a GPU for each
torch.cuda.set_device = lambda number: None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_two_ranks_share_a_gpu(name, small, tmp_path):
    """As many ranks as there are GPUs cannot be tested here; what they exchange can, on the GPU's tensors."""
    (tmp_path / "two.py").write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    argv = [*launch, tmp_path / "two.py", f"{name}.py", *small(name, tmp_path / "run")]
    where = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, env=os.environ | where)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert [x["step"] for x in lines] == [0, 1, 2, 3, 4] and (tmp_path / "run/final").is_dir()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name, flags", RUNS, ids=[" ".join(x).strip() for x in RUNS])
def test_a_script_runs_and_resumes(name, flags, dtype, small, tmp_path):
    """Every number of every line is finite, in training something moves, and half a run goes on."""
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
