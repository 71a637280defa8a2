"""Several processes: what torchrun starts makes the update that one process makes of the same batch.

Run by torchrun, this file is the worker: it replays a recorded run of every script on each rank.
"""

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest  # noqa: E402
import torch  # noqa: E402
from conftest import read_jsonl, same_metrics, same_weights  # noqa: E402
from safetensors import safe_open  # noqa: E402

import common.tokenization as tok  # noqa: E402
from common.plumbing import folders, models, ranks, runs, storage  # noqa: E402
from common.plumbing.flags import BadInput  # noqa: E402

FLAGS = {
    "sft": "--micro-batch-tokens 100",
    "rft_rejection": "--k 2 --questions 8 --micro-batch-tokens 1 --rounds 2 --restart base --steps 1",
    "idft_hinted": "--hinted off",
    "dpo": "--k 4 --pair-questions 8 --micro-batch-tokens 200",
    # no minibatches: one without advantages has the gradient of a KL of 0, which Adam makes of rounding alone
    "grpo": "--group-size 4 --epochs-per-batch 2 --kl-coef 0.1 --micro-batch-tokens 300 --save-every 2",
    "prefix_rft": "--group-size 3 --loss-norm token --gradient-checkpointing",
    "luffy": "--group-size 3 --loss-norm token --minibatches 2 --micro-batch-tokens 300",
    "opsd": "--group-size 2 --kl-coef 0.1 --micro-batch-tokens 300",
    "rlhf_ppo": "--preference-questions 16 --reward-epochs 1 --kl-coef 0.3 --micro-batch-tokens 200",
    "sft-less_rows_than_ranks": "--batch-size 1",
    "sft-fp32": "--micro-batch-tokens 100",
}
SAME = "loss entropy grad_norm lr tokens_trained response_len accuracy reward kl phi reward_margin clip_frac"
RESUMED = (
    "--steps 4 --save-every 2 --batch-size 3 --eval-questions 1 --eval-samples 0 --micro-batch-tokens 99"
)


def replayed(name, folder, out, data):
    """A run of a script in float64 whose samples are recorded, or taken from a record: ranks draw others."""
    script = importlib.import_module(name.split("-")[0])
    tape = folder / f"{name}.json"
    record = json.loads(tape.read_text()) if tape.exists() else []
    sample, load, scorer = script.sample, models.load_model, models.load_scorer
    made = []

    def recorded(*args):
        if record:
            ranks.generator("cpu")  # the draw from the common generator that `sample` makes
            made.append(record[len(made)])
        else:
            made.append(sample(*args))
        return made[-1]

    def double(*args, **more):
        model, tokenizer = load(*args, **more)
        return model.double(), tokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "sample", recorded)
        if not name.endswith("fp32"):
            patch.setattr(models, "load_model", double)
            patch.setattr(models, "load_scorer", lambda *args, **more: scorer(*args, **more).double())
        flags = f"--output-dir {out} --data {data} --model {ROOT}/tiny/model --steps 2 --batch-size 5"
        flags += " --seed 3 --max-new-tokens 48 --eval-questions 4 --eval-samples 1 --warmup-steps 0"
        script.main(script.parse_args(f"{flags} {FLAGS[name]}".split()))
    if not record:
        tape.write_text(json.dumps(made))


def torchrun(count, *command):
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", "--standalone"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*launch, *map(str, command)], cwd=ROOT, **pipes)


@pytest.fixture(scope="module")
def replay(tmp_path_factory, data):
    """The folder of <name>-1, <name>-2: each script in one process and, with the same samples, in two."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in FLAGS:
        replayed(name, folder, folder / f"{name}-1", data)
    process = torchrun(2, __file__, "work", folder, data)
    _, stderr = process.communicate(timeout=400)
    assert process.returncode == 0, stderr
    return folder


@pytest.mark.parametrize("name", FLAGS)
def test_two_ranks_make_the_update_of_one(name, replay):
    """The same weights to rounding, the same numbers in the log, written once."""
    one, two = (replay / f"{name}-{n}" for n in (1, 2))
    same_weights(one / "final", two / "final", 1e-6 if "fp32" in name else 1e-12)
    lines = [read_jsonl(out / "metrics.jsonl") for out in (one, two)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for x, y in zip(*lines):
        for key in set(SAME.split()) & x.keys():
            assert y[key] == pytest.approx(x[key], rel=1e-6, abs=1e-6 if name.endswith("fp32") else 1e-9), key
    trained = [line["grad_norm"] for line in lines[0] if "grad_norm" in line]
    assert trained and min(trained) > 0
    before = replay / f"{name}-0"
    before.symlink_to(ROOT / "tiny/model")
    with pytest.raises(AssertionError):
        same_weights(one / "final", before, 1e-5)


@pytest.mark.parametrize("name", ["grpo", "rlhf_ppo"])
def test_a_folder_is_the_one_of_one_process(name, replay):
    """The same files, tensors, types and texts, in final/ and in a checkpoint but for its state."""
    for folder in ("final", "checkpoint-000002" if name == "grpo" else "reward_model"):
        one, two = (replay / f"{name}-{n}" / folder for n in (1, 2))
        contents = []
        for path in (one, two):
            found = {}
            for file in path.iterdir():
                if file.suffix in (".json", ".jinja") and not file.name.startswith("state"):
                    found[file.name] = file.read_text()
                if file.name.startswith("model"):
                    with safe_open(file, "pt") as tensors:
                        shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
                        types = {key: tensors.get_slice(key).get_dtype() for key in shapes}
                        found[file.name] = shapes, types, tensors.metadata()
            contents.append(found)
        assert contents[0] == contents[1] and len(contents[0]) > 3


def test_ranks_stay_equal_to_the_bit_and_share_the_work(replay):
    """20 steps of real sampling: the same weights for both ranks, each row and its moments on one only."""
    a, b = (json.loads((replay / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert len(a["digests"]) == 20 and len(set(a["digests"])) > 10 and a["digests"] == b["digests"]
    for kind, count in ("weights", 1), ("moments", 2):
        assert a[kind] + b[kind] == a["parameters"] * count
        assert abs(a[kind] - b[kind]) < 0.01 * a["parameters"]
    assert a["samples"] == b["samples"], "a rank lacks what the other has sampled"
    assert a["greedy"] == b["greedy"] == a["greedy alone"]
    assert a["rewrites"] == b["rewrites"] == a["rewrites alone"]
    assert len(a["rewrites"]) == 9 and all(a["rewrites"])
    first, second = a["samples"][:16], a["samples"][16:]  # of one prompt, drawn by rank 0 and by rank 1
    assert len(set(map(tuple, first))) > 1 and first != second
    assert a["bf16"] == b["bf16"] and a["bf16"] < 0.05  # |ratio - 1| of the sampling copy
    assert a["copy"] == "cpu" and a["copy later"] == "meta", "the copy holds memory while the model trains"
    assert a["first hook"] == "release"
    assert a["skipped"] == b["skipped"] == [1, True]


def test_a_large_model_is_written_in_several_files(replay):
    """With an index, as save_pretrained writes it."""
    folder = replay / "in-parts"
    same_weights(folder, ROOT / "tiny/model")
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2 and files[0].startswith("model-00001-of-")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    total = sum((folder / name).stat().st_size for name in files)
    assert 0 < total - index["metadata"]["total_size"] < 0.01 * total


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_checkpoint_of_two_ranks_is_continued_on_any_number(count, replay, data):
    """sft's updates do not depend on samples: on two ranks to the bit those of a run that was not stopped."""
    out = replay / f"on-{count}"
    if count == 1:
        shutil.copytree(replay / "stopped", out)
        resumed(replay, data, out)
    if count == 3:
        shutil.copytree(replay / "stopped", out)
        process = torchrun(3, __file__, "resume", replay, data, out)
        _, stderr = process.communicate(timeout=100)
        assert process.returncode == 0, stderr
    same_weights(replay / "whole/final", out / "final", 0.0 if count == 2 else 2e-7)
    if count == 2:
        same_metrics(replay / "whole", out)
    checkpoint = out / "checkpoint-000004"
    files = json.loads((checkpoint / "state.json").read_text())["files"]
    assert sorted(path.name for path in checkpoint.glob("state*.safetensors")) == files
    assert len(files) == count
    with pytest.raises(AssertionError):
        same_weights(replay / "whole/final", replay / "stopped/checkpoint-000002", 1e-5)


@pytest.mark.parametrize("most, after", [(1.0, (0.6, 0.8)), (5.0, (3.0, 4.0)), (10.0, (3.0, 4.0))])
def test_a_gradient_is_scaled_down_to_a_norm(most, after):
    """Over all weights together; the norm before is returned."""
    model = torch.nn.ParameterList([torch.zeros(1), torch.zeros(1), torch.zeros(2)])
    for p, slope in zip(model, (3.0, 4.0)):  # the third has no gradient
        p.grad = torch.tensor([slope])
    norm = ranks.clip_gradient(model, most)
    assert type(norm) is float and norm == pytest.approx(5)
    assert [p.grad.item() for p in model[:2]] == pytest.approx(after, rel=1e-5)


def test_the_group_is_closed_at_exit_only_if_the_work_of_all_ranks_is_done(monkeypatch, tmp_path):
    """Closing it is collective with NCCL: a rank that fails would wait for the others, which wait for it."""
    close, at_exit = ranks.dist.destroy_process_group, []
    # progress bars register something, too
    monkeypatch.setattr(ranks.atexit, "register", lambda f: at_exit.extend([f] * (f is close)))
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: False)
    for name in ranks.TORCHRUN:
        monkeypatch.setenv(name, "0")
    with monkeypatch.context() as patch:
        patch.setattr(ranks.dist, "init_process_group", lambda *_, **__: None)
        patch.setattr(ranks.dist, "get_rank", lambda: 0)
        ranks.start()
    assert at_exit == []
    monkeypatch.setattr(ranks, "shard", lambda: (0, 1))
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    state = {"step": 0, "stop": 0, "faults": 3, "leave": 0}
    with pytest.raises(BadInput, match="not finite"):
        list(runs.steps(state, 1))
    assert at_exit == []
    state |= {"step": 0, "faults": 0, "leave": signal.SIGTERM}
    with pytest.raises(SystemExit, match="143"):
        list(runs.steps(state, 1))
    assert at_exit == [close]
    runs.finish(tmp_path / "nothing", argparse.Namespace(steps=1))
    assert at_exit == [close, close]


@pytest.mark.parametrize("how", ["killed", "exception"])
def test_a_rank_that_dies_ends_all(how, tmp_path, data):
    """No hang; the message is heard; the last checkpoint is whole."""
    out = tmp_path / "run"
    flags = f"--output-dir {out} --data {data} --steps 500 --save-every 1 --eval-questions 1 --eval-samples 0"
    if how == "exception":
        process = torchrun(2, __file__, "fail", *flags.split())
        _, stderr = process.communicate(timeout=120)
        assert process.returncode != 0 and "rank 1 is out of luck" in stderr
        return
    process = torchrun(2, "sft.py", *flags.split(), "--batch-size", 2)
    deadline = time.time() + 120
    while not folders.checkpoints(out) and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0 and not (out / "final").exists()
    whole = folders.checkpoints(out)[-1]
    state = storage.read_state(whole)
    assert state["step"] > 0 and len(state["optimizer"]["state"]) > 10
    models.load_model(str(whole))


# ---- the worker ------------------------------------------------------------------------------------------


def work(folder, data):
    for name in FLAGS:
        replayed(name, folder, folder / f"{name}-2", data)
    sft = importlib.import_module("sft")
    log = runs.log

    def stop(out, metrics, samples=()):
        log(out, metrics, samples)
        if metrics["step"] == 3 and ranks.is_first():
            shutil.copytree(out, folder / "stopped")  # as a run that is killed here leaves it
        ranks.barrier()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "log", stop)
        flags = f"--output-dir {folder}/whole --data {data} --model {ROOT}/tiny/model {RESUMED}"
        sft.main(sft.parse_args(flags.split()))
    if ranks.is_first():
        shutil.copytree(folder / "stopped", folder / "on-2")
    ranks.barrier()
    resumed(folder, data, folder / "on-2")
    seen = twenty_steps(folder, data)
    (folder / f"rank-{ranks.shard()[0]}.json").write_text(json.dumps(seen))


def resumed(folder, data, out):
    sft = importlib.import_module("sft")
    flags = f"--output-dir {out} --data {data} --model {ROOT}/tiny/model {RESUMED} --resume"
    sft.main(sft.parse_args(flags.split()))


def twenty_steps(folder, data):
    grpo, digests, optimizers = importlib.import_module("grpo"), [], []
    due, adamw = runs.due, torch.optim.AdamW
    seen = {"digests": digests}

    def watch(state, every):
        parameters = optimizers[0].param_groups[0]["params"]
        digests.append(hash(tuple(ranks.whole(p).sum().item() for p in parameters)))
        return due(state, every)

    def kept(*args, **settings):
        optimizers.append(adamw(*args, **settings))
        return optimizers[0]

    flags = f"--output-dir {folder}/twenty --data {data} --steps 20 --batch-size 3 --group-size 4 --lr 1e-3"
    flags += " --max-new-tokens 24 --eval-questions 1 --eval-samples 0 --save-every 20 --advantage grpo"
    args = grpo.parse_args(flags.split())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "due", watch)
        patch.setattr(torch.optim, "AdamW", kept)
        grpo.main(args)
    parameters = optimizers[0].param_groups[0]["params"]
    moments = [m for state in optimizers[0].state.values() for k, m in state.items() if k != "step"]
    seen["parameters"] = sum(p.numel() for p in parameters)
    seen["weights"] = sum(ranks.part(p).numel() for p in parameters)
    seen["moments"] = sum(ranks.part(m).numel() for m in moments)

    model, tokenizer = models.load_model(str(ROOT / "tiny/model"))
    prompts = tok.encode_prompts(tokenizer, ["Compute 1 + 1."] * 32)
    others = tok.encode_prompts(tokenizer, [f"Compute {i} + {i * i}." for i in range(9)])
    torch.manual_seed(0)
    seen["samples"] = grpo.sample(model, tokenizer, prompts, 1.5, args)[0]
    seen["copy"] = next(models.COPIES[model].parameters()).device.type
    # FSDP's hook gathers the root's weights, for which the copy has to give way first
    seen["first hook"] = next(iter(model._forward_pre_hooks.values())).__name__
    seen["greedy"] = grpo.sample(model, tokenizer, others, 0.0, args)[0]
    seen["rewrites"] = rewrites(model, tokenizer, others)
    with torch.autocast("cpu", torch.bfloat16):
        responses, sampled = grpo.sample(model, tokenizer, others, 1.0, args)
        tokens, mask = tok.join(others, responses)
        scored, _ = grpo.score(model, tokens, mask, args)
    ratio = (scored - tok.align(sampled, mask)).exp()[mask.bool()]
    seen["bf16"] = (ratio - 1).abs().mean().item()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "LARGEST_FILE", "1MB")
        runs.save_model(folder / "in-parts", model, tokenizer)
    logp, _ = grpo.logprobs(model, tokens, mask, 1.0)
    seen["copy later"] = next(models.COPIES[model].parameters()).device.type
    (logp.sum() * torch.inf).backward()
    state = {"faults": 0, "skipped": 0}
    usable = runs.finite(ranks.clip_gradient(model, 1.0), state)
    seen["skipped"] = [state["skipped"], not usable]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "shard", lambda: (0, 1))
        alone, _ = models.load_model(str(ROOT / "tiny/model"))
        seen["greedy alone"] = grpo.sample(alone, tokenizer, others, 0.0, args)[0]
        seen["rewrites alone"] = rewrites(alone, tokenizer, others)
    return seen


def rewrites(model, tokenizer, prompts):
    """What hinted decoding writes where the race has no noise."""
    idft = importlib.import_module("idft_hinted")
    hinted = tok.encode_prompts(tokenizer, [f"Compute {i}." for i in range(len(prompts))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "exponential_", lambda noise, generator: noise.fill_(1))
        return idft.rewrite(model, tokenizer, hinted, prompts, idft.parse_args(["--max-new-tokens", "24"]))


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
    elif sys.argv[1] == "resume":
        resumed(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
    else:
        work(Path(sys.argv[2]), sys.argv[3])
