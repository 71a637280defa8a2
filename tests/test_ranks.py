"""Several processes: under torchrun the update is the one that a single process makes of the same batch.

Run by torchrun, this file is the worker: it replays a recorded run of every script on each rank.
"""

import importlib
import inspect
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest  # noqa: E402
import torch  # noqa: E402
from conftest import read_jsonl, same_weights  # noqa: E402

import common.tokenization as tok  # noqa: E402
from common.plumbing import folders, models, ranks, runs  # noqa: E402

FLAGS = {
    "sft": "--micro-batch-tokens 100",
    "rft_rejection": "--k 2 --questions 8 --micro-batch-tokens 1",
    "idft_hinted": "--hinted off",
    "dpo": "--k 4 --pair-questions 8 --micro-batch-tokens 200",
    "grpo": "--group-size 4 --minibatches 2 --kl-coef 0.1 --micro-batch-tokens 300",
    "prefix_rft": "--group-size 3 --prefix-weight luffy --loss-norm token",
    "rlhf_ppo": "--preference-questions 16 --reward-epochs 1 --kl-coef 0.3 --micro-batch-tokens 200",
    "sft-less_rows_than_ranks": "--batch-size 1",
}
SAME = "loss entropy grad_norm lr tokens_trained response_len accuracy reward kl phi reward_margin clip_frac"


def replayed(name, folder, out, data, monkeypatch):
    """A run in float64 whose samples are recorded, or read from a record: ranks draw others."""
    script = importlib.import_module(name.split("-")[0])
    record = folder / f"{name}.pickle"
    records = pickle.loads(record.read_bytes()) if record.exists() else []
    draw, load, load_scorer = script.sample, models.load_model, models.load_scorer
    recorded = iter(records)
    made = []

    def sample(*args):
        if records:
            ranks.generator("cpu")  # the draw from the global generator that `sample` makes
            made.append(next(recorded))
        else:
            made.append(draw(*args))
        return made[-1]

    def double(*args):
        model, tokenizer = load(*args)
        return model.double(), tokenizer

    monkeypatch.setattr(script, "sample", sample)
    monkeypatch.setattr(models, "load_model", double)
    monkeypatch.setattr(models, "load_scorer", lambda *args, **more: load_scorer(*args, **more).double())
    flags = f"--output-dir {out} --data {data} --model {ROOT}/tiny/model --steps 2 --batch-size 5 --seed 3"
    flags += f" --max-new-tokens 48 --eval-questions 4 --eval-samples 1 --warmup-steps 0 {FLAGS[name]}"
    script.main(script.parse_args(flags.split()))
    if not records:
        record.write_bytes(pickle.dumps(made))


def torchrun(*command, **more):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*launch, *map(str, command)], cwd=ROOT, **pipes, **more)


@pytest.fixture(scope="module")
def replay(tmp_path_factory, data):
    """A folder with <name>-1 and <name>-2: each script in one process and, with the same samples, in two."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in FLAGS:
        with pytest.MonkeyPatch.context() as monkeypatch:
            replayed(name, folder, folder / f"{name}-1", data, monkeypatch)
    process = torchrun(__file__, folder, data)
    stdout, stderr = process.communicate(timeout=400)
    assert process.returncode == 0, stderr
    return folder


@pytest.mark.parametrize("name", FLAGS)
def test_two_ranks_make_the_update_of_one(name, replay):
    """The same weights up to rounding in float64, the same numbers in the log, written once."""
    one, two = (replay / f"{name}-{n}" for n in (1, 2))
    same_weights(one / "final", two / "final", 1e-9)
    lines = [read_jsonl(out / "metrics.jsonl") for out in (one, two)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for x, y in zip(*lines):
        for key in set(SAME.split()) & x.keys():
            assert y[key] == pytest.approx(x[key], rel=1e-6, abs=1e-9), key
    assert lines[0][1].get("grad_norm", 1) > 0
    before = replay / f"{name}-0"
    before.symlink_to(ROOT / "tiny/model")
    with pytest.raises(AssertionError):
        same_weights(one / "final", before, 1e-6)


def test_ranks_stay_equal_to_the_bit_and_divide_the_work(replay):
    """20 steps with real sampling: equal parameters on both ranks, each moment of Adam on one only."""
    a, b = (torch.load(replay / f"rank-{rank}.pt") for rank in (0, 1))
    assert len(a["digests"]) == 20 and len(set(a["digests"])) > 10 and a["digests"] == b["digests"]
    assert 0 < a["moments"] < a["parameters"] * 2 and a["moments"] + b["moments"] == a["parameters"] * 2
    assert a["samples"] == b["samples"], "a rank lacks what the other has sampled"
    assert a["greedy"] == b["greedy"] == a["greedy alone"]
    first, second = a["samples"][:16], a["samples"][16:]  # of one prompt, drawn by rank 0 and by rank 1
    assert len(set(map(tuple, first))) > 1 and first != second
    assert a["rows"] != b["rows"] and sorted(a["rows"] + b["rows"]) == list(range(7))


def test_a_checkpoint_of_two_ranks_resumes_on_one(replay, run, data):
    """It has the moments of both ranks."""
    state = torch.load(replay / "twenty/checkpoint-000020/state.pt", weights_only=True)
    assert len(state["optimizer"]["state"]) == len(state["optimizer"]["param_groups"][0]["params"]) > 10
    assert "skipped" in state and state["step"] == 20


@pytest.mark.parametrize("how", ["killed", "exception"])
def test_a_rank_that_dies_ends_all(how, tmp_path, data):
    """No process hangs, the message is printed, and the last checkpoint is complete."""
    out = tmp_path / "run"
    flags = f"--output-dir {out} --data {data} --steps 500 --save-every 1 --eval-questions 1 --eval-samples 0"
    if how == "exception":
        process = torchrun(__file__, "fail", *flags.split())
        _, stderr = process.communicate(timeout=120)
        assert process.returncode != 0 and "rank 1 is out of luck" in stderr
        return
    process = torchrun("sft.py", *flags.split(), "--batch-size", 2)
    deadline = time.time() + 120
    while not folders.checkpoints(out) and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0 and not (out / "final").exists()
    whole = folders.checkpoints(out)[-1]
    assert torch.load(whole / "state.pt", weights_only=True)["step"] > 0
    models.load_model(str(whole))


# ---- the worker ------------------------------------------------------------------------------------------


def work(folder, data):
    rank, _ = ranks.shard()
    for name in FLAGS:
        with pytest.MonkeyPatch.context() as monkeypatch:
            replayed(name, folder, folder / f"{name}-2", data, monkeypatch)
    grpo, digests, optimizers = importlib.import_module("grpo"), [], []
    due, adamw = runs.due, ranks.adamw

    def watch(state, every):
        digests.append(hash(tuple(p.sum().item() for p in optimizers[0].param_groups[0]["params"])))
        return due(state, every)

    def recorded(*args, **settings):
        optimizers.append(adamw(*args, **settings))
        return optimizers[0]

    runs.due, ranks.adamw = watch, recorded
    flags = f"--output-dir {folder}/twenty --data {data} --steps 20 --batch-size 3 --group-size 4 --lr 1e-3"
    flags += " --max-new-tokens 24 --eval-questions 1 --eval-samples 0 --save-every 20 --advantage grpo"
    args = grpo.parse_args(flags.split())
    grpo.main(args)
    model, tokenizer = models.load_model(str(ROOT / "tiny/model"))
    moments = sum(m.numel() for s in optimizers[0].optim.state.values() for k, m in s.items() if k != "step")
    mask = torch.ones(7, 5, dtype=torch.int64)
    seen = {"digests": digests, "moments": moments, "parameters": sum(p.numel() for p in model.parameters())}
    seen["rows"] = [i for rows, _ in tok.micro_batches(mask, 10, ranks.shard()) for i in rows]
    prompts = tok.encode_prompts(tokenizer, ["Compute 1 + 1."] * 32)
    others = tok.encode_prompts(tokenizer, [f"Compute {i} + {i * i}." for i in range(9)])
    torch.manual_seed(0)
    seen["samples"] = grpo.sample(model, tokenizer, prompts, 1.5, args)[0]
    seen["greedy"] = grpo.sample(model, tokenizer, others, 0.0, args)[0]
    ranks.shard = lambda: (0, 1)
    seen["greedy alone"] = grpo.sample(model, tokenizer, others, 0.0, args)[0]
    torch.save(seen, folder / f"rank-{rank}.pt")


def fail(*flags):
    sft = importlib.import_module("sft")
    if ranks.shard()[0] == 1:

        def unlucky(*args):
            raise RuntimeError("rank 1 is out of luck")

        sft.sft_loss = unlucky
    sft.main(sft.parse_args(flags))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "fail":
        fail(*sys.argv[2:])
    else:
        work(Path(sys.argv[1]), sys.argv[2])


def test_zero_sends_its_state_with_our_broadcast():
    """torch's own takes minutes for a gigabyte. If torch calls it differently one day, this fails."""
    from torch.distributed.optim import ZeroRedundancyOptimizer, zero_redundancy_optimizer

    assert zero_redundancy_optimizer._broadcast_object is ranks.broadcast_object
    assert "_broadcast_object(" in inspect.getsource(ZeroRedundancyOptimizer.consolidate_state_dict)
