"""Time and host memory of a checkpoint at size: random weights in the shape of Qwen2.5, divided among ranks.

    torchrun --nproc-per-node=2 experiments/checkpoints.py --model 0.5B --folder FOLDER
    python experiments/checkpoints.py --model 0.5B --folder FOLDER       # one process
    python experiments/checkpoints.py --model 1.5B --folder FOLDER --write-only     # 20 GiB of memory

Weights and both moments of Adam are fp32. Memory is the resident set of a rank beyond what it trains, sampled
while it writes; on a CPU the weights and moments themselves are in it, on a GPU they are not.
"""

import argparse
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from common.plumbing import ranks, runs, storage  # noqa: E402
from experiments import memory  # noqa: E402


class Peak(threading.Thread):
    """How far the resident set grows while it runs, bytes. Pages of files do not count."""

    def __enter__(self):
        self.running, self.start_size, self.most = True, resident(), 0
        self.began = time.time()
        self.start()
        return self

    def run(self):
        while self.running:
            self.most = max(self.most, resident() - self.start_size)
            time.sleep(0.005)

    def __exit__(self, *error):
        self.seconds = time.time() - self.began
        self.running = False
        self.join()


def resident():
    pages = Path("/proc/self/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")  # resident - shared


def build(shape, moments):
    """A model and its optimizer after a step; a rank makes only what it keeps."""
    layers, d, f, v, q, k, _, tied = shape
    size = dict(hidden_size=d, intermediate_size=f, num_hidden_layers=layers, num_attention_heads=q)
    size |= dict(num_key_value_heads=k, vocab_size=v, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**size))
    model = ranks.sharded(model).to_empty(device="cpu")
    model.tie_weights()
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        ranks.part(p.detach()).normal_()
        names = ("exp_avg", "exp_avg_sq")[:moments]
        optimizer.state[p] = {"step": torch.tensor(1.0)} | {name: torch.ones_like(p) for name in names}
    return model, optimizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="0.5B", choices=[name[8:] for name in memory.SHAPES])
    parser.add_argument("--folder", required=True, help="where to write; it is removed at the end")
    parser.add_argument("--moments", type=int, default=2, help="of Adam; fewer take less memory here")
    parser.add_argument("--write-only", action="store_true", help="not read: that takes the moments twice")
    args = parser.parse_args()
    rank, count = ranks.shard()
    folder = Path(args.folder) / "checkpoint-000001"
    if ranks.is_first():
        folder.parent.mkdir(parents=True)
        for name in runs.folders.LOGS:
            (folder.parent / name).touch()
    ranks.barrier()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/model")
    shape = memory.SHAPES[f"Qwen2.5-{args.model}"]
    model, optimizer = build(shape, args.moments)
    kept = sum(ranks.part(p).nbytes for p in model.parameters()) * (1 + args.moments)

    with Peak() as model_only:
        runs.save_model(folder.parent / "final", model, tokenizer)
    if ranks.is_first():
        shutil.rmtree(folder.parent / "final")
    with Peak() as save:
        runs.save_model(folder, model, tokenizer, optimizer, {"step": 1})
    size = sum(path.stat().st_size for path in folder.iterdir())
    measured = [("final/", model_only), ("checkpoint", save)]
    verdict = ""
    if not args.write_only:
        with Peak() as load:
            state = storage.read_state(folder)
        measured.append(("state read", load))
        equal = []
        for i, p in enumerate(model.parameters()):
            for name, x in optimizer.state[p].items():
                equal.append(torch.equal(ranks.part(x), ranks.part(state["optimizer"]["state"][i][name])))
        verdict = f"; equal: {all(equal)}"
    line = f"rank {rank} of {count}: holds {kept / 2**30:.2f} GiB, checkpoint {size / 2**30:.2f} GiB"
    for name, peak in measured:
        line += f"; {name} {peak.seconds:.1f} s, {peak.most / 2**30:.2f} GiB more"
    for text in ranks.gather([line + verdict]):
        print(text)
    if ranks.is_first():
        shutil.rmtree(folder.parent)


if __name__ == "__main__":
    main()
