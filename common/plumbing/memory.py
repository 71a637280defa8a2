"""Memory: what a run needs against what is free, said before the machine ends it."""

import os
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common.plumbing import configs, ranks
from common.plumbing.flags import demand

GIB = 2**30
SHARE = 0.6  # of the free memory that sampling may take: the rest is for what is not counted here
SAID = set()  # numbers of rows that have been said

# ---- what is free ----------------------------------------------------------------------------------------


def free():
    """Free bytes: of the GPU, or of this machine or container, divided among the ranks on it."""
    if torch.cuda.is_available():
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    return min(machine(), container()) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def machine():
    """What the kernel says is available, else all there is."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def container(folder="/sys/fs/cgroup"):
    """The limit of a control group without what is in use; files that were read do not count."""
    folder = Path(folder)
    try:
        limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
        lines = (folder / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no control group, or no limit
        return 10**15
    files = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    return max(0, limit - used + files)


# ---- training --------------------------------------------------------------------------------------------


def check_training(args):
    """Demand that fp32 weights, gradients and AdamW's moments fit, before weights are read.

    Under torchrun they are divided in ways that are not counted here.
    """
    if ranks.world_size() > 1:
        return
    config = configs.read_folder(AutoConfig, args.model, "--model")
    try:
        with torch.device("meta"):  # shapes without weights
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception:  # said when the weights are read
        return
    weights = 4 * sum(p.numel() for p in skeleton.parameters())
    has_critic = hasattr(args, "reward_model")
    copies = 4 if args.steps else 1  # weights, gradients, two moments
    copies *= 2 if has_critic else 1
    has_reference = getattr(args, "kl_coef", 0) or getattr(args, "teacher", "") == "initial"
    copies += 2 if has_critic else bool(has_reference)  # frozen ones
    need, have = copies * weights, free()
    parts = "weights, gradients and AdamW's moments" if args.steps else "its weights"
    sentence = f"{parts} take {need / GIB:.1f} GiB, {have / GIB:.1f} GiB are free; use a smaller model."
    demand(need <= have, f"--model {args.model}: {sentence}")


# ---- sampling --------------------------------------------------------------------------------------------


def row_bytes(model, tokens, budget):
    """Bytes that one row takes while it is sampled, its prompt padded to `tokens`."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None)
    kv_heads = kv_heads if isinstance(kv_heads, int) else heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    size = 2 if torch.is_autocast_enabled(model.device.type) else 4
    cache = 2 * config.num_hidden_layers * kv_heads * width * size * (tokens + budget)
    logits = 6 * 4 * config.vocab_size  # with softmax and noise
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    inner = inner if isinstance(inner, int) else max(inner)  # some models have one for each layer
    prompt = 4 * tokens * (6 * config.hidden_size + 3 * inner)  # activations of a layer, fp32
    return cache + logits + prompt


def rows(model, lengths, args, contexts=1):
    """For each prompt, how many rows of its length are sampled at once: a list.

    It is --sample-rows, or a smaller power of two where memory allows fewer. `lengths` are those
    of the prompts. Each row may have a prompt in several contexts. A prompt that ends in a long
    demonstration takes much memory, and should not make batches of short ones small.
    """
    have = free()
    at_once = {}  # tokens of a prompt -> rows
    for tokens in set(lengths):
        need = contexts * row_bytes(model, tokens, args.max_new_tokens)
        fitting = int(SHARE * have / need)
        sentence = f"a response takes {need / GIB:.1f} GiB, {have / GIB:.1f} GiB are free; lower it."
        demand(fitting >= 1, f"--max-new-tokens {args.max_new_tokens}: {sentence}")
        power_of_two = 2 ** (fitting.bit_length() - 1)
        at_once[tokens] = args.sample_rows if fitting >= args.sample_rows else power_of_two
    fewest = min(at_once.values(), default=args.sample_rows)
    if fewest not in SAID and fewest < min(args.sample_rows, len(lengths)):
        SAID.add(fewest)
        where = " of the longest prompts" if len(set(at_once.values())) > 1 else ""
        print(f"--sample-rows {args.sample_rows}: memory has room for {fewest} rows{where} at once")
    return [at_once[tokens] for tokens in lengths]
