"""Time and memory of a step of grpo.py on a GPU, beside what experiments/memory.py computes for it.

    python experiments/gpu.py --models 0.5B 1.5B           # then --report --write, here or elsewhere

The models have random weights and the shape of Qwen2.5, so every response takes the whole budget, which
is the worst case for the cache. A response counts as correct if it has an odd number of letters: without
rewards that differ nothing would be trained. 16 questions x 32 responses of 256 tokens in bf16, 8,192
tokens a pass; a process for each line, its second step. Memory is the allocator's peak, while sampling
and while training.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import grpo  # noqa: E402
from common.plumbing import runs  # noqa: E402
from experiments import memory  # noqa: E402
from experiments.reproduce import insert  # noqa: E402

QUESTIONS, GROUP, BUDGET, MICRO = 16, 32, 256, 8192
RECORDS = ROOT / "experiments/results/gpu.json"


def build(shape, folder):
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    layers, d, f, v, q, k, _, tied = shape
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/model")
    size = dict(hidden_size=d, intermediate_size=f, num_hidden_layers=layers, num_attention_heads=q)
    size |= dict(num_key_value_heads=k, vocab_size=v, tie_word_embeddings=tied)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(Qwen2Config(**size, eos_token_id=tokenizer.eos_token_id, pad_token_id=1))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def one(name, recompute):
    """What the second step of a run takes."""
    shape = memory.SHAPES[f"Qwen2.5-{name}"]
    seen, rollout = {}, grpo.rollout

    def peak():
        found = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return found

    def watched(*args):
        peak()
        groups = rollout(*args)
        seen["GiB sampling"], seen["length"] = peak(), len(groups[0][0]["prompt"]) + BUDGET
        return groups

    def log(out, metrics, samples=()):
        keys = ("seconds_sample", "seconds_train", "tokens_generated", "tokens_trained")
        seen.update({key: metrics[key] for key in keys if key in metrics} | {"GiB training": peak()})

    grpo.rollout, grpo.evaluate = watched, lambda *args: {}
    runs.log, runs.save_model = log, lambda *args: None
    grpo.math_reward = lambda texts, golds: [float(len(text) % 2) for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        build(shape, f"{folder}/model")
        torch.cuda.empty_cache()
        flags = f"--model {folder}/model --output-dir {folder}/run --dtype bf16 --lr 1e-6 --steps 2"
        flags += f" --batch-size {QUESTIONS} --group-size {GROUP} --max-new-tokens {BUDGET}"
        flags += f" --micro-batch-tokens {MICRO}" + " --gradient-checkpointing" * recompute
        grpo.main(grpo.parse_args(flags.split()))
    seen["computed sampling"] = memory.sampling(shape, QUESTIONS * GROUP, seen["length"], 1) / 2**30
    seen["computed training"] = memory.total(shape, MICRO, recompute, 1) / 2**30
    return seen | {"device": torch.cuda.get_device_name(), "torch": torch.__version__}


def table(records):
    head = "| | GPU | sampling, tokens/s | training, tokens/s "
    head += "| GiB sampling | computed | GiB training | computed |"
    text = [head, "|---" * 8 + "|"]
    for name, x in records.items():
        speeds = (x["tokens_generated"] / x["seconds_sample"], x["tokens_trained"] / x["seconds_train"])
        line = [name, x["device"], *(f"{speed:,.0f}" for speed in speeds)]
        for phase in ("sampling", "training"):
            line += [f"{x[f'GiB {phase}']:.1f}", f"{x[f'computed {phase}']:.1f}"]
        text.append("| " + " | ".join(line) + " |")
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["0.5B", "1.5B"], choices=["0.5B", "1.5B", "7B"])
    parser.add_argument("--how", nargs="+", default=["plain", "recomputed"], choices=["plain", "recomputed"])
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--write", action="store_true", help="write the table into the README")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("\n" + json.dumps(one(args.one[0], args.one[1] == "recomputed")))
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
        insert("gpu", table(records))


if __name__ == "__main__":
    main()
