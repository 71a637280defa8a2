"""Time and memory of a step of sft.py and grpo.py, and of sampling, against TRL and transformers' generate.

    pip install "trl==1.16.0" && python experiments/speed.py         # without TRL: ours and generate only

Same model, questions, group size, budget and batch on both sides, on the CPU, one thread and two; the
tiny model and a random one of 135 M parameters (the shape of SmolLM2-135M). A response of the latter
counts as correct if it has an odd number of letters, so that every group has both and grpo.py trains on
all rows, as TRL does. Every measurement is a process of its own and the sides take turns, so that a busy
machine is busy for both. Reported is the median over turns of the CPU seconds per step, without the first
step, and of the peak memory, in MiB, above that before the first step; for sampling, of sampled tokens
per CPU second.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import grpo  # noqa: E402
import sft  # noqa: E402
from common import tokenization as tok  # noqa: E402
from common.plumbing import models, runs  # noqa: E402
from common.verifier import math_reward  # noqa: E402
from experiments.tables import insert  # noqa: E402


def odd(completions, golds):
    return [float(len(text) % 2) for text in completions]


# model/responses: questions a step, group size, budget, demonstrations a step, padded tokens of our passes,
# rows of TRL's (14 GiB for 32 of the big model), steps of which the first is not counted, reward
SIZES = {
    "tiny/128": (16, 8, 100, 16, 1024, 128, 6, math_reward),
    "135M/32": (4, 8, 128, 8, 512, 32, 3, odd),
    "135M/128": (16, 8, 128, 8, 512, 32, 2, odd),
}


def big_model(folder):
    """A random Llama of SmolLM2-135M's shape; one word in 32 ends a response, so that lengths spread."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/model")
    shape = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9)
    shape |= dict(num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True)
    ends = [tokenizer.eos_token_id, *range(480, 49152, 32)]
    LlamaForCausalLM(LlamaConfig(**shape, eos_token_id=ends, pad_token_id=1)).save_pretrained(folder)
    tokenizer.add_tokens([f"<{i}>" for i in range(len(tokenizer), 49152)])  # else most of its text is empty
    tokenizer.save_pretrained(folder)


class Meter:
    """CPU seconds between calls of `turn`, and the peak of memory since the first."""

    def __init__(self):
        self.times = []

    def turn(self):
        if not self.times:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
            self.before = self.memory("VmRSS")
        self.times.append(time.process_time())

    def memory(self, name):
        return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith(name)) / 1024

    def result(self):
        steps = [b - a for a, b in zip(self.times, self.times[1:])][1:]
        return {"seconds": median(steps), "MiB": self.memory("VmHWM") - self.before}


def rows_of(n):
    return [json.loads(x) for x in open(ROOT / "tiny/data/train.jsonl")][:n]


RECORDS = ROOT / "experiments/results/speed.json"
UNITS = {"sampling": "sampling: tokens/s", "sft": "sft.py: s a step", "grpo": "grpo.py: s a step"}


# ---- one side, in a process of its own -------------------------------------------------------------------


def ours(script, model, size, out):
    questions, group, budget, demonstrations, micro, _, steps, grpo.math_reward = size
    meter, count = Meter(), runs.steps

    def watched(state, last):
        for step in count(state, last):
            meter.turn()
            yield step
        meter.turn()

    runs.steps = watched
    flags = f"--model {model} --output-dir {out} --steps {steps} --eval-questions 1 --eval-samples 0"
    flags += f" --save-every 0 --max-new-tokens {budget} --micro-batch-tokens {micro}"
    if script is grpo:
        flags += f" --batch-size {questions} --group-size {group}"
    else:
        flags += f" --batch-size {demonstrations}"
    script.evaluate = lambda *args: {}
    script.main(script.parse_args(flags.split()))
    return meter.result()


def trl(kind, model, size, out):
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    questions, group, budget, demonstrations, _, rows_of_a_pass, steps, judge = size
    meter, tokenizer = Meter(), AutoTokenizer.from_pretrained(model)

    class Watch(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            meter.turn()

        def on_train_end(self, *args, **kwargs):
            meter.turn()

    prompts = lambda row: tokenizer.decode(tok.encode_prompts(tokenizer, [row["question"]])[0])  # noqa: E731
    rows = rows_of(4000)
    data = Dataset.from_dict(
        {"prompt": [prompts(r) for r in rows], "completion": [r["solution"] for r in rows]}
    )
    same = dict(output_dir=out, max_steps=steps, report_to="none", save_strategy="no", logging_strategy="no")
    same |= dict(use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True)
    if kind == "sft":
        config = SFTConfig(
            **same, per_device_train_batch_size=demonstrations, learning_rate=1e-4, max_length=None
        )
        trainer = SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer)
    else:
        method = dict(num_generations=group, max_completion_length=budget, loss_type="dr_grpo", beta=0.0)
        method |= dict(scale_rewards="none", temperature=1.0, learning_rate=2e-4)
        passes = questions * group // rows_of_a_pass  # of one update, on responses that are sampled at once
        method |= dict(per_device_train_batch_size=rows_of_a_pass, gradient_accumulation_steps=passes)
        config = GRPOConfig(**same, **method)
        data = data.add_column("gold", [row["answer"] for row in rows])
        reward = lambda completions, gold, **_: judge(completions, gold)  # noqa: E731
        trainer = GRPOTrainer(model, reward, config, train_dataset=data, processing_class=tokenizer)
    trainer.add_callback(Watch())
    trainer.train()
    return meter.result()


@torch.no_grad()
def sampling(side, model, size):
    """Sampled tokens per CPU second: 512 responses of the tiny model, those of a step of the big one."""
    questions, group, budget, *_ = size
    net, tokenizer = models.load_model(model)
    asked = rows_of(512 // group if size == SIZES["tiny/128"] else questions)
    prompts = tok.encode_prompts(tokenizer, [r["question"] for r in asked]) * group
    stops, rates = tok.stop_ids(tokenizer, net.config), []
    args = grpo.parse_args(["--max-new-tokens", str(budget)])
    for turn, some in enumerate((prompts[:group], prompts, prompts)):  # the first warms up
        torch.manual_seed(turn)
        began = time.process_time()
        if side == "ours":
            responses, _ = grpo.sample(net, tokenizer, some, 1.0, args)
        else:
            tokens, mask = tok.pad(some, side="left")
            plain = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=budget)
            ids = net.generate(tokens, attention_mask=mask, **plain, eos_token_id=stops, pad_token_id=1)
            responses = [tok.truncate(x, stops, budget) for x in ids[:, tokens.shape[1] :].tolist()]
        rates.append(sum(map(len, responses)) / (time.process_time() - began))
    return {"tokens per second": median(rates[1:])}


def one(what, side, model, size):
    with tempfile.TemporaryDirectory() as out:
        if what == "sampling":
            return sampling(side, model, size)
        return (
            ours(sft if what == "sft" else grpo, model, size, out)
            if side == "ours"
            else trl(what, model, size, out)
        )


# ---- all of it -------------------------------------------------------------------------------------------


def measured(what, model, name, threads, turns):
    """Medians over turns, {side: {figure: value}}; the sides take turns."""
    sides = ("ours", "theirs") if what == "sampling" or find_spec("trl") else ("ours",)
    done = {side: [] for side in sides}
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    for side in sides * turns:
        command = [sys.executable, __file__, "--one", what, side, model, name]
        child = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert child.returncode == 0, child.stderr[-3000:]
        done[side].append(json.loads(child.stdout.splitlines()[-1]))
    return {side: {k: median(x[k] for x in found) for k in found[0]} for side, found in done.items()}


def table(records):
    head = (
        "| model/responses | threads | | ours | theirs | ours / theirs | MiB, ours | theirs | ours / theirs |"
    )
    text, form = [head, "|---" * 9 + "|"], lambda x: f"{x:.0f}" if x >= 100 else f"{x:.3g}"
    for name, found in sorted(records.items(), key=lambda item: list(SIZES).index(item[0].split(", ")[0])):
        line = name.split(", ")
        for key in found["ours"]:
            a, b = found["ours"][key], found.get("theirs", {}).get(key, float("nan"))
            line += [form(a), form(b), f"{a / b:.2f}"]
        text.append("| " + " | ".join(line + [""] * (9 - len(line))) + " |")
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3, help="processes per side")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--what", nargs="+", choices=list(UNITS), default=list(UNITS), help="what to measure")
    parser.add_argument(
        "--write", action="store_true", help="keep what was measured, write the table of docs/benchmarks.md"
    )
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)  # what, side, model folder, size
    args = parser.parse_args()
    if args.one:
        what, side, model, size = args.one
        print("\n" + json.dumps(one(what, side, model, SIZES[size])))
        return
    records = json.loads(RECORDS.read_text()) if args.write and RECORDS.exists() else {}
    with tempfile.TemporaryDirectory() as big:
        big_model(big)
        for name, threads, what in product(args.models, args.threads, args.what):
            if (name, what) == ("135M/128", "sft"):
                continue  # has no responses: as with 32
            model = str(ROOT / "tiny/model") if name == "tiny/128" else big
            found = measured(what, model, name, threads, args.turns)
            key = f"{name}, {threads}, {UNITS[what]}"
            records[key] = found
            print(table({key: found})[-1], flush=True)
            if args.write:
                RECORDS.write_text(json.dumps(records, indent=1) + "\n")
                insert("speed", table(records))
    print("\n".join(table(records)))


if __name__ == "__main__":
    main()
