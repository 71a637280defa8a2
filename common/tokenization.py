"""Between the disk and the tensors: text, token ids and masks, the files that they come from and go to.

Four rules, each the cure of a bug that this field keeps having:

1. Prompt and response are encoded apart and joined as ids: no token straddles the boundary, masks are exact.
2. EOS is part of the response: sampled, scored, trained. A model that never has it as a target never stops.
3. Masks come from lengths, never from comparing ids with the pad id: for many models pad *is* EOS.
4. Scoring pads on the right, where causal attention does not look; only sampling pads on the left.
"""

import atexit
import glob
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from math import exp, isfinite
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from datasets import get_dataset_split_names, load_dataset
from torch.distributed.optim import ZeroRedundancyOptimizer, zero_redundancy_optimizer
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DynamicCache,
)
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

datasets.disable_progress_bars()  # one bar, the script's
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()  # what matters of their warnings is demanded below
datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # an error is said once, as BadInput


class BadInput(SystemExit):
    """The user's mistake: one sentence with flag, file or row and the remedy; exit status 2, no traceback."""

    def __init__(self, sentence):
        print(f"error: {sentence}", file=sys.stderr)
        super().__init__(2)
        self.sentence = sentence

    def __str__(self):
        return self.sentence


def demand(condition, sentence):
    """Raise BadInput unless the condition holds."""
    if not condition:
        raise BadInput(sentence)


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- text -> ids -----------------------------------------------------------------------------------------


def encode_prompts(tokenizer, questions, template="{question}"):
    """For each question the ids of everything up to the first response token.

    `template` wraps the question ("{question} Box the answer."); it is filled by replacement, not by
    str.format, because LaTeX is full of braces. A model without a chat template gets a plain prompt; it ends
    in a newline, so that a response needs no leading space to be tokenised as in running text.
    """
    texts = [template.replace("{question}", question) for question in questions]
    if tokenizer.chat_template is None:
        return [tokenizer.encode(f"Question: {text}\nAnswer:\n") for text in texts]
    chats = [[{"role": "user", "content": text}] for text in texts]
    return [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]


def encode_response(tokenizer, text):
    """Ids of a demonstration, EOS included."""
    return tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]


def decode_responses(tokenizer, responses):
    """Texts of responses without EOS, exactly as the verifier and `samples.jsonl` see them."""
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]


def stop_ids(tokenizer, config):
    """Every id that ends a response: the tokenizer's EOS and the model config's (Llama 3 has three)."""
    more = as_list(config.get_text_config().eos_token_id)
    return sorted({i for i in [tokenizer.eos_token_id, *more] if i is not None})


def as_list(ids):
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


# ---- ids -> tensors --------------------------------------------------------------------------------------


def cut(ids, stops, budget):
    """A response ends with its first EOS or with the budget, whichever comes first."""
    end = next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[: min(end, budget)]


def pad(rows, side="right", device=None):
    """Ragged lists of ids -> tokens [B, T] int64 and attention_mask [B, T], 1 on real tokens.

    The pad id is never read by anything (rule 3), so any valid id serves; 0 exists in every vocabulary.
    """
    width = max(map(len, rows), default=0)
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    attention_mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[i, where] = torch.tensor(row, dtype=torch.int64)
        attention_mask[i, where] = 1
    return tokens.to(device), attention_mask.to(device)


def join(prompts, responses, device=None):
    """Prompt + response, right-padded: tokens [B, T] and response_mask [B, T], 1 on response and EOS."""
    tokens, response_mask = pad([list(p) + list(r) for p, r in zip(prompts, responses)])
    for i, prompt in enumerate(prompts):
        response_mask[i, : len(prompt)] = 0  # what is left of the attention mask is the response
    return tokens.to(device), response_mask.to(device)


def align(values, response_mask):
    """Ragged lists of one number per response token -> [B, T], each on the position of its token."""
    grid = torch.zeros(response_mask.shape)
    grid[response_mask.bool()] = torch.tensor([v for row in values for v in row])
    return grid


def split_by_tokens(response_mask, rows, max_tokens):
    """Cut the row numbers `rows` into micro-batches [(rows, width), ...] with rows x width <= `max_tokens`.

    Rows of similar length go together, so little is padding; `width` ends at the longest row's last response
    token. A row longer than the budget goes alone, a row without response tokens nowhere. Under torchrun each
    rank gets every n-th row, so that all have the same mix of lengths. Every script divides by a normaliser
    of the whole optimizer batch, so how the batch is cut changes no gradient.
    """
    index = torch.arange(1, response_mask.shape[1] + 1, device=response_mask.device)
    end = (response_mask * index).amax(1).tolist()  # of each row: last response token + 1
    micro_batches, width, (rank, n) = [], 0, ranks()
    for i in sorted((i for i in rows if end[i]), key=lambda i: -end[i])[rank::n]:
        if not micro_batches or width * (len(micro_batches[-1]) + 1) > max_tokens:
            micro_batches.append([])
            width = end[i]  # rows come longest first
        micro_batches[-1].append(i)
    return [(micro, end[micro[0]]) for micro in micro_batches]


# ---- ranks -----------------------------------------------------------------------------------------------
#
# Under `torchrun` every process runs the whole script on the same data, in the same order and with the same
# random numbers; only three things are divided: sampling (`share`), scoring and training (`split_by_tokens`).
# What these give is put together again at once (`reduce`, `gather`), so everything else, rewards,
# advantages, normalisers and metrics, is computed from the whole batch and is equal on all ranks.


def ranks():
    """This process's number and how many there are: (0, 1) without torchrun."""
    if "RANK" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        kind = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(kind, timeout=timedelta(minutes=30))  # of waiting for a rank that is lost
        atexit.register(dist.destroy_process_group)
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")  # one rank reports; errors are heard from all
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def dice(device):
    """A generator of this rank's own for its samples; the common one stays in step on all ranks."""
    return torch.Generator(device).manual_seed(torch.randint(2**60, ()).item() + ranks()[0])


def share(rows, size, lengths):
    """This rank's part of the row numbers `rows`, every n-th, in tensors of at most `size`.

    `rows` come shortest first, and what is padded together has like `lengths`: beside a demonstration of
    thousands of tokens a short prompt would take as much of the KV cache.
    """
    (rank, n), parts = ranks(), []
    for i in rows[rank::n]:
        if not parts or len(parts[-1]) == size or lengths[i] > 2 * lengths[parts[-1][0]] + 256:
            parts.append([])
        parts[-1].append(i)
    return [torch.tensor(part) for part in parts]


def reduce(x, how="SUM"):
    """The sum (or "MAX") of a tensor over the ranks, in place."""
    if ranks()[1] > 1:
        dist.all_reduce(x, getattr(dist.ReduceOp, how))
    return x


def gather(items):
    """The lists of all ranks as one."""
    lists = [items] * ranks()[1]
    if len(lists) > 1:
        dist.all_gather_object(lists, items)
    return [x for items in lists for x in items]


def reduce_gradients(parameters):
    """The parameters, each with the sum of its gradient over the ranks, of which some may have had no row.

    Where no rank has a gradient there is still none: an optimizer would take a zero for one.
    """
    parameters = list(parameters)
    if ranks()[1] > 1:
        have = torch.tensor([float(p.grad is not None) for p in parameters])
        for p, anybody in zip(parameters, reduce(have).tolist()):
            if anybody:
                p.grad = reduce(torch.zeros_like(p) if p.grad is None else p.grad)
    return parameters


def adamw(parameters, **settings):
    """torch's AdamW; under torchrun each rank keeps the moments of its share of the parameters (ZeRO 1)."""
    if ranks()[1] > 1:
        return ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, **settings)
    return torch.optim.AdamW(parameters, **settings)


def broadcast_object(item, src_rank, group, device):
    """An object of one rank on all, for ZeRO's state in a checkpoint.

    torch's own turns bytes into a tensor one by one, which takes minutes for a gigabyte of moments.
    """
    mine = dist.get_rank() == src_rank
    if mine:
        torch.save(item, buffer := io.BytesIO())
        data = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8).to(device)
    size = torch.tensor([len(data) if mine else 0], device=device)
    dist.broadcast(size, src_rank, group)
    data = data if mine else torch.empty(int(size), dtype=torch.uint8, device=device)
    for part in data.split(2**30):
        dist.broadcast(part, src_rank, group)
    return item if mine else torch.load(io.BytesIO(data.cpu().numpy()), weights_only=True, map_location="cpu")


zero_redundancy_optimizer._broadcast_object = broadcast_object


# ---- the cache of a sampler ------------------------------------------------------------------------------


class Cache(DynamicCache):
    """transformers' keys and values, in the dtype of activations and with room for the tokens to come.

    RoPE's cosines are fp32 where the weights are, so under autocast bf16 keys come out of it as fp32; the
    cache would take twice the memory and be cast to bf16 again for every token that is sampled.
    """

    def __init__(self, config):
        super().__init__(config=config)
        # a layer with a sliding window holds few tokens anyway
        self.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]

    def update(self, keys, values, *args, **kwargs):
        kind = keys.device.type
        if torch.is_autocast_enabled(kind):
            keys, values = (x.to(torch.get_autocast_dtype(kind)) for x in (keys, values))
        return super().update(keys, values, *args, **kwargs)


class RoomyLayer(DynamicLayer):
    """Keys and values [B, heads, T, D] of a layer: a view of a buffer that grows by so many tokens at once.

    transformers' own layer copies all that it holds for each new token, which after some hundred tokens
    takes longer than to attend to it.
    """

    ROOM, buffers = 32, ()

    def update(self, keys, values, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        seen = self.get_seq_length()
        end = seen + keys.shape[-2]
        if not self.buffers or self.buffers[0].shape[-2] < end:
            both = torch.cat([self.keys, keys], -2), torch.cat([self.values, values], -2)
            self.buffers = [F.pad(x, (0, 0, 0, self.ROOM)) for x in both]
        else:
            for buffer, new in zip(self.buffers, (keys, values)):
                buffer[:, :, seen:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        if self.buffers:  # a layer that shares another's keys has none
            self.buffers, seen = [buffer[indices] for buffer in self.buffers], self.get_seq_length()
            self.keys, self.values = (buffer[:, :, :seen] for buffer in self.buffers)


# ---- values of tokens ------------------------------------------------------------------------------------


def at_end(value, response_mask):
    """The value at the last response token, [B], be it EOS or where the budget cut; value [B, T]."""
    index = torch.arange(value.shape[1], device=value.device)  # from the mask, so from lengths: rule 3
    return value.gather(1, (response_mask * index).argmax(1, keepdim=True))[:, 0]


def put_at_end(score, response_mask):
    """The reverse: [B, T], the score at the last response token and 0 elsewhere."""
    return score[:, None] * (response_mask * response_mask.cumsum(1) == response_mask.sum(1, keepdim=True))


def before(value, response_mask):
    """[B, T]: at a response token the value one position earlier, of what it is an answer to; 0 elsewhere."""
    return F.pad(value[:, :-1], (1, 0)) * response_mask


# ---- preference pairs ------------------------------------------------------------------------------------


PAIR = ("row", "prompt", "chosen", "rejected", "utility_chosen", "utility_rejected")  # of preferences.jsonl


def load_pairs(path, split, flag):
    """The pairs of a preference set, a list for each prompt: columns prompt, chosen, rejected."""
    if ranks()[1] > 1:
        dist.barrier()  # the first rank has written
    none = "all answers to a question are cut, the same or equally good; see --max-new-tokens, --group-size"
    demand(
        flag != "--annotator" or os.path.getsize(path), f"--annotator: there is nothing to choose: {none}."
    )
    rows, groups = load_split(path, split, {f"column {key}:": key for key in PAIR[1:4]}, flag), {}
    for row in rows:
        groups.setdefault(row["prompt"], []).append(row)
    demand(len(groups) > 1, f"{flag}: {path} has one prompt; it cannot be trained on and held out.")
    return list(groups.values())


def append_pairs(path, row, ranked, ties):
    """Write down at once what a ranking of the completions of question `row` says: K (K - 1) / 2 pairs.

    Without `ties` those of equal utility are left out: the annotator would only toss a coin.
    """
    pairs = [(a, b) for i, a in enumerate(ranked) for b in ranked[i + 1 :]]
    pairs = [(a, b) for a, b in pairs if ties or a["utility"] != b["utility"]]
    pairs = [(a, b) for a, b in pairs if a["text"].strip() and b["text"].strip()]  # no row without text
    seen = [(row, a["question"], a["text"], b["text"], a["utility"], b["utility"]) for a, b in pairs]
    append(path, [dict(zip(PAIR, values)) for values in seen])


def ask(group):
    """A person ranks the completions of a question, best first: `2` of two, `2 3 1` of three."""
    demand(ranks()[1] == 1, "--annotator human: one person, one process; run step 1 without torchrun.")
    if len(group) < 2:
        return []
    print("", group[0]["question"], *(f"  {i}  {c['text']}" for i, c in enumerate(group, 1)), sep="\n")
    while True:
        try:
            said = input("best first, or skip, or quit: ").split()
        except EOFError:  # the end of a file, or Ctrl-D
            said = ["quit"]
        if said == ["skip"]:
            return []
        if said == ["quit"]:
            print("every judgement is kept: the same command with --resume continues here")
            raise SystemExit
        order = [int(word) - 1 for word in said if word.isdecimal()]
        if len(order) == len(said) == len(group) - 1:
            order += set(range(len(group))) - set(order)  # the last one need not be said
        if len(order) >= len(said) and sorted(order) == list(range(len(group))):
            return [group[i] for i in order]


def join_pairs(tokenizer, pairs, template, device=None):
    """tokens and response_mask [P, 2, T] of pairs: the chosen and the rejected response to one prompt."""
    prompts = encode_prompts(tokenizer, [pair["prompt"] for pair in pairs], template)
    texts = [encode_response(tokenizer, pair[key]) for pair in pairs for key in ("chosen", "rejected")]
    tokens, mask = join([prompt for prompt in prompts for _ in range(2)], texts, device)
    return tokens.view(len(pairs), 2, -1), mask.view(len(pairs), 2, -1)


def agreement(scores, pairs, slope):
    """How well scores [P, 2] foresee held-out judgements: share, bound, and share by confidence.

    The bound is that of a judge who knows the utilities: an annotator who is right in sigmoid(slope gap) of
    such pairs cannot be foreseen more often. Confidence is sigmoid(|difference of scores|).
    """
    margin = (scores[:, 0] - scores[:, 1]).tolist()
    metrics = {"pair_accuracy": sum(m > 0 for m in margin) / len(margin)}
    if pairs[0].get("utility_chosen") is not None:
        gaps = [pair["utility_chosen"] - pair["utility_rejected"] for pair in pairs]
        metrics["pair_accuracy_max"] = sum(1 / (1 + exp(-slope * abs(gap))) for gap in gaps) / len(gaps)
    for tenth in range(5, 10):
        sure = [m > 0 for m in margin if min(9, int(10 / (1 + exp(-abs(m))))) == tenth]
        if sure:
            print(f"  {len(sure):4} pairs, sure to 0.{tenth}: right in {sum(sure) / len(sure):.2f}")
    return metrics


# ---- data sets -------------------------------------------------------------------------------------------


def split_names(path, flag):
    """Names of the splits of a data set; a single file is one split, "train"."""
    if os.path.isfile(path):
        kinds = (".jsonl", ".json", ".csv", ".parquet")
        demand(
            path.endswith(kinds), f"{flag} {path}: the name of a data file must end in {', '.join(kinds)}."
        )
        return ["train"]
    try:
        return get_dataset_split_names(*configured(path))
    except Exception as error:  # one of a dozen types, and every one of them is about the user's path
        raise BadInput(f"{flag} {path}: no data file, folder or hub name ({first_line(error)}).") from None


def configured(path):
    """A hub name and its configuration, if one is given: openai/gsm8k:main."""
    return path.rsplit(":", 1) if ":" in path and not os.path.exists(path) else [path]


def load_split(path, split, columns, flag="--data"):
    """One split of a data set, memory-mapped: of a data file, a folder, a hub name or name:configuration.

    `columns` maps the flag that names a column to the column: each must exist and hold text in every row.
    """
    names = ", ".join(split_names(path, flag))
    demand(
        split in names.split(", "), f"{path}: no split {split}, only {names}; see --split and --eval-split."
    )
    is_empty = os.path.isfile(path) and os.path.getsize(path) == 0
    demand(not is_empty, f"{flag} {path}: the file is empty.")
    kind = path.rsplit(".", 1)[-1].replace("jsonl", "json")
    source = dict(zip(("path", "name"), configured(path)))
    source = {"data_files": glob.escape(path)} if os.path.isfile(path) else source  # it may hold [ or *
    try:
        rows = load_dataset(**{"path": kind} | source, split=split)
    except Exception as error:
        reason = first_line(error.__cause__ or error)
        raise BadInput(f"{flag} {path}: {split} cannot be read ({reason}).") from None
    demand(len(rows), f"{flag} {path}: {split} has no rows.")
    for key_flag, key in columns.items():
        names = ", ".join(rows.column_names)
        demand(key in rows.column_names, f"{key_flag} {key}: no such column in {path}, only {names}.")
        for i, text in enumerate(rows[key]):
            good = isinstance(text, str) and text.strip()
            demand(good, f"{path}, {split}, row {i}: {key_flag} {key} holds no text; mend or remove the row.")
    return rows


def check_lengths(rows, name, args, demonstrations=False):
    """Each prompt and its response must fit into the positions of the model, and demonstrations be text.

    A row is encoded only where that is in question: an id stands for a byte at least.
    """
    texts = rows[args.solution_key] if args.solution_key in rows.column_names else []
    for i, text in enumerate(texts):
        good = text is None or isinstance(text, str)
        demand(
            good, f"{name}, row {i}: --solution-key {args.solution_key} is no text; mend or remove the row."
        )
    if args.resume:  # the first run has looked
        return
    config = read_folder(AutoConfig, args.model, "--model").get_text_config()
    tokenizer = read_folder(AutoTokenizer, args.model, "--model")
    try:
        [frame] = encode_prompts(tokenizer, [""], args.prompt_template)
    except Exception as error:
        reason = f"its chat template takes no question ({first_line(error)})"
        raise BadInput(f"--model {args.model}: {reason}.") from None
    positions, budget = getattr(config, "max_position_embeddings", None) or 10**9, args.max_new_tokens
    for i, question in enumerate(rows[args.question_key]):
        answer = texts[i] if demonstrations else ""
        if len(frame) + len(question.encode()) + max(budget, len(answer.encode()) + 1) > positions:
            [prompt] = encode_prompts(tokenizer, [question], args.prompt_template)
            response = encode_response(tokenizer, answer)[: args.max_demo_tokens] if answer else []
            need = f"{len(prompt)} tokens of prompt and {max(budget, len(response))} of response"
            remedy = "lower --max-new-tokens or --max-demo-tokens, or remove the row"
            fits = len(prompt) + max(budget, len(response)) <= positions
            demand(fits, f"{name}, row {i}: {need} exceed the model's {positions} positions; {remedy}.")


def load_splits(args, extract_answer, check_gold, demonstrations=False, no_gold=False):
    """Training and held-out rows, by --data --split --eval-data --eval-split --eval-questions.

    The held-out rows are --eval-split of --eval-data (or of --data), by default its split "test". Where
    there is none, every tenth training row is kept apart for evaluation and never trained on. Held-out rows
    have a column `gold`; so have training rows, but `demonstrations` need a solution instead. `no_gold`: data
    without an answer will do, and none is right.
    """
    ranks()  # from here on one process reports
    check_arguments(args)
    if not args.resume:
        check_sources(args)
    columns = {"--question-key": args.question_key}
    solution = {"--solution-key": args.solution_key} if demonstrations else {}
    train = load_split(args.data, args.split, columns | solution)
    check_lengths(train, f"{args.data}, {args.split}", args, bool(solution))
    path = args.eval_data or args.data
    trained = (args.data, args.split)
    names = [name for name in split_names(path, "--eval-data") if (path, name) != trained]
    split = args.eval_split or ("test" if "test" in names else names[0] if args.eval_data and names else None)
    if split:
        test = load_split(path, split, columns, "--eval-data")
        check_lengths(test, f"{path}, {split}", args)
    else:
        demand(len(train) > 1, f"--data {path}: one row cannot be trained on and held out; give --eval-data.")
        print(f"no split test beside it: every tenth row of {args.split} is held out and not trained on")
        test = train.select(range(0, len(train), 10))
        train = train.select([i for i in range(len(train)) if i % 10])
    args.unparseable_gold = 0  # counted by with_gold, for args.json and the first line of metrics.jsonl
    if not demonstrations:
        train = with_gold(train, args, extract_answer, check_gold, no_gold)
    test = with_gold(test, args, extract_answer, check_gold, no_gold)
    return train, test.select(range(min(len(test), args.eval_questions)))


def with_gold(rows, args, extract_answer, check_gold, no_gold=False):
    """The rows whose gold parses, with a column `gold`; the others are dropped and counted.

    The answer column holds the bare answer or a text that ends in it (GSM8K's ####, MATH's \\boxed{}, "The
    answer is"); where there is none, the end of the solution is the gold. A demonstration may be wrong, the
    gold may not: it has its own column then.
    """
    key = args.answer_key if args.answer_key in rows.column_names else args.solution_key
    names = ", ".join(rows.column_names)
    if no_gold and key not in rows.column_names:
        print(f"{len(rows):,} questions without a gold answer: verdicts and utility read as of wrong answers")
        return without_ours(rows).add_column("gold", [""] * len(rows))
    missing = f"--answer-key {args.answer_key}, --solution-key {args.solution_key}: no such column"
    demand(key in rows.column_names, f"{missing}, only {names}.")
    texts = ["" if text is None else str(text).strip() for text in rows[key]]
    marks = ("\\boxed", "####", "answer is", "answer:")
    bare = [key == args.answer_key and not any(mark in text.lower() for mark in marks) for text in texts]
    golds = [text if alone else extract_answer(text) for text, alone in zip(texts, bare)]
    parsed = [i for i, gold in enumerate(golds) if gold and check_gold(gold)]
    print(f"{len(rows):,} questions, {len(parsed):,} with a gold answer that parses (column {key})")
    demand(parsed, f"--answer-key {key}: not one gold answer parses.")
    args.unparseable_gold += len(rows) - len(parsed)
    return without_ours(rows).add_column("gold", golds).select(parsed)


def without_ours(rows):
    """Scripts add columns of these names; what data has under them is not read any more."""
    return rows.remove_columns([name for name in ("gold", "demonstrated") if name in rows.column_names])


# ---- model folders and run folders -----------------------------------------------------------------------

LOGS = ("metrics.jsonl", "samples.jsonl")
MODEL_FOLDER = "it has to be a folder or hub name with config.json, a tokenizer and weights in .safetensors"

# what a number must be at least and at most, where it is a flag of the script; of others: 0 and no limit
LEAST = {"group_size": 2, "no_eos_score": -1e9, "temperature": 1e-3}  # a smaller one overflows: logits / T
LEAST |= dict.fromkeys("batch_size micro_batch_tokens max_new_tokens sample_rows eval_questions k".split(), 1)
LEAST |= dict.fromkeys("epochs_per_batch minibatches prefix_decay_steps max_demo_tokens rounds".split(), 1)
LEAST |= dict.fromkeys("pair_questions preference_questions reward_epochs".split(), 1)
MOST = {"steps": 10**6 - 1, "seed": 10**12}  # the draws of step s are those of seed * 10**6 + s
MOST |= {"lr": 1, "reward_lr": 1}  # AdamW moves each weight by about lr a step
MOST |= dict.fromkeys("clip_low prefix_entropy_keep demo_fraction lam".split(), 1)


def check_arguments(args):
    """Every flag by itself, before anything is loaded."""
    for name, given in vars(args).items():
        flag = f"--{name.replace('_', '-')} {given}"
        if isinstance(given, (int, float)):
            # no limit of its own: what int64 and fp32 hold with room to spare
            least, most = LEAST.get(name, 0), MOST.get(name, 10**12 if isinstance(given, int) else 1e30)
            least -= name == "k" and getattr(args, "add_gold", False)  # demonstrations without any sample
            demand(abs(given) < float("inf"), f"{flag}: must be a finite number.")  # NaN is not below, either
            demand(given >= least, f"{flag}: must be at least {least}.")
            demand(given <= most, f"{flag}: must be at most {most}.")
    demand(args.max_grad_norm > 0, f"--max-grad-norm {args.max_grad_norm}: must be above 0.")
    rows, parts = args.batch_size * getattr(args, "group_size", 1), getattr(args, "minibatches", 1)
    demand(parts <= rows, f"--minibatches {parts}: a step has {rows} completions only; lower it.")
    penalty, budget = getattr(args, "overlong_tokens", 0), args.max_new_tokens
    demand(penalty <= budget, f"--overlong-tokens {penalty}: must be at most --max-new-tokens {budget}.")
    if not args.steps and hasattr(args, "hinted"):
        args.hinted = "off"  # nothing is trained, so nothing is rewritten
    longest, own = getattr(args, "max_demo_tokens", budget), getattr(args, "hinted", "off") == "on"
    own |= hasattr(args, "k") and not getattr(args, "pairs", None)  # samples are trained as demonstrations
    less = f"less than --max-new-tokens {budget}, samples would be trained without their end; raise it"
    demand(longest >= budget or not own, f"--max-demo-tokens {longest}: {less}.")
    steered = "--kl-target: what it steers is multiplied by factors; give a --kl-coef above 0."
    demand(getattr(args, "kl_coef", 1) or not getattr(args, "kl_target", 0), steered)
    asks = "{question}" in args.prompt_template
    demand(
        asks, "--prompt-template: the model would not see the question; write {question} where it belongs."
    )


def check_sources(args):
    """What a script reads later, of --base, --reward-model, --pairs and --preferences, before it samples."""
    shapes = []
    for flag in ("--model", "--base") if getattr(args, "base", None) else ():
        with torch.device("meta"):  # shapes without weights
            config = read_folder(AutoConfig, getattr(args, flag[2:]), flag)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        shapes.append({name: p.shape for name, p in model.named_parameters()})
    other = "its weights have other shapes than those of --model; take one of the same architecture"
    demand(shapes[:1] == shapes[1:], f"--base {getattr(args, 'base', None)}: {other}.")
    if getattr(args, "reward_model", None):
        read_folder(AutoConfig, args.reward_model, "--reward-model")
    for flag in ("--pairs", "--preferences"):
        if path := getattr(args, flag[2:], None):
            load_split(path, args.split, {f"column {key}:": key for key in PAIR[1:4]}, flag)


def read_folder(kind, source, flag):
    """A configuration or a tokenizer, as `kind` says, of a hub name or folder."""
    try:
        return kind.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise BadInput(f"{flag} {source} cannot be loaded ({first_line(error)}); {MODEL_FOLDER}.") from None


def load_model(source, recompute=False, flag="--model"):
    """Model and tokenizer of a hub name or folder, on the GPU if there is one, without dropout.

    Weights are fp32 whatever the file holds: an update at RL's learning rates is below the resolution of
    bf16, Adam at 1e-6 leaves 98 % of bf16 weights unmoved. `--dtype bf16` is autocast over these fp32
    weights. `recompute`: the layers keep their inputs only, for --gradient-checkpointing.
    Nothing of a folder is executed: its Python files are not imported, pickled weights are not read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        safe = dict(trust_remote_code=False, use_safetensors=True)
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, **safe
        )
    except Exception as error:  # one of a dozen types, and every one of them is about the user's folder
        raise BadInput(f"{flag} {source} cannot be loaded ({first_line(error)}); {MODEL_FOLDER}.") from None
    check_model(model, tokenizer, sorted(info["missing_keys"]), f"{flag} {source}")
    return placed(model, recompute), tokenizer


def placed(model, recompute):
    """On the GPU if there is one; eval(): dropout off."""
    model.base_model.register_forward_pre_hook(check_positions, with_kwargs=True)
    for layer in model.modules() if recompute else ():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(recomputed, layer.forward)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def check_positions(model, tokens, inputs):
    """What `check_lengths` cannot know before a run, such as pairs or a hint: the model has the positions."""
    at = inputs.get("position_ids")
    fits(model, (tokens or [inputs["input_ids"]])[0].shape[1] if at is None else 1 + int(at.max()))


def fits(model, need):
    """Demand that the model has positions for so many tokens."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    many = f"--model {model.config.name_or_path}: {need} tokens of prompt and response exceed its {most}"
    demand(need <= most, f"{many} positions; lower --max-new-tokens or remove long rows.")


def load_scorer(source, tokenizer, args, new_head=False):
    """A reward model or critic: one number for each position instead of logits, of a folder or hub name.

    It is read as a token classifier with one label, because that class picks no position by itself; a
    sequence classifier of the same architecture has the same weights. With `new_head` the folder may be a
    language model's, and the head is drawn.
    """
    try:
        safe = dict(trust_remote_code=False, use_safetensors=True, dtype=torch.float32)
        scorer, info = AutoModelForTokenClassification.from_pretrained(
            source, num_labels=1, output_loading_info=True, **safe
        )
    except Exception as error:
        raise BadInput(f"--reward-model {source} cannot be loaded ({first_line(error)}).") from None
    known = read_folder(AutoTokenizer, source, "--reward-model").get_vocab().items()
    ids = tokenizer.get_vocab().items()
    demand(ids <= known, f"--reward-model {source}: its tokenizer gives other ids than that of {args.model}.")
    if new_head:  # as Stiennon et al.: scores of about 1
        torch.nn.init.normal_(head(scorer).weight, std=(head(scorer).in_features + 1) ** -0.5)
        torch.nn.init.zeros_(head(scorer).bias)
    lacks = [key for key in info["missing_keys"] if key.endswith("weight")]
    demand(new_head or not lacks, f"--reward-model {source}: no scalar head in it ({', '.join(lacks)}).")
    return placed(scorer, args.gradient_checkpointing)


def head(scorer):
    """Its linear layer from a hidden state to a number; it comes last, whatever an architecture calls it."""
    return list(scorer.children())[-1]


def read_scores(scorer, hidden):
    """The number at each position, [B, T], of hidden states [B, T, D]; fp32 whatever autocast does.

    In bf16 values between 2 and 4 are 1/64 apart: differences of neighbours, which GAE adds up, would be
    rounding errors.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return head(scorer)(hidden.to(head(scorer).weight.dtype))[..., 0].float()


def check_model(model, tokenizer, missing, name):
    """What the scripts count on: all weights, finite; a head that is a plain product; an EOS."""
    demand(not missing, f"{name} lacks weights ({', '.join(missing[:3])}); take a complete language model.")
    broken = next((key for key, p in model.named_parameters() if not p.isfinite().all()), None)
    demand(broken is None, f"{name}: {broken} holds NaN or inf; take an earlier checkpoint.")
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    cap, bias = getattr(config, "final_logit_softcapping", None), getattr(head, "bias", None)
    plain = "common/logprob.py computes hidden states times weights; take another model"
    demand(not cap, f"{name}: its logits have a soft cap, and {plain}.")
    demand(bias is None, f"{name}: its head has a bias, and {plain}.")
    attends = all(hasattr(layer, "batch_select_indices") for layer in Cache(config=model.config).layers)
    demand(attends, f"{name}: sampling needs attention in all its layers; take another model.")
    eos = tokenizer.eos_token_id
    demand(eos is not None, f"{name}: its tokenizer has no EOS; set eos_token in tokenizer_config.json.")
    stops = {*stop_ids(tokenizer, config), *as_list(model.generation_config.eos_token_id)}
    if stops > {*as_list(config.eos_token_id)}:  # Qwen's further EOS ids are in generation_config.json only
        config.eos_token_id = sorted(stops)


def recomputed(forward, *args, **kwargs):
    """Without gradient (sampling) as ever. transformers' own switch works in train() only: with dropout."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def save_model(folder, model, tokenizer, optimizer=None, state=None):
    """A model folder; with optimizer and state it is a checkpoint and replaces older ones.

    Written under another name and renamed when complete: under its own it is whole or absent, so a run that
    is killed at any moment leaves its last checkpoint.
    """
    half, old = (folder.with_name(folder.name + end) for end in (".half", ".old"))
    if optimizer and ranks()[1] > 1:
        optimizer.consolidate_state_dict()  # the moments of all ranks, on the first
    if ranks()[0] == 0:
        shutil.rmtree(half, ignore_errors=True)  # of a run that was killed here
        try:
            model.save_pretrained(half)
            tokenizer.save_pretrained(half)
            if optimizer:
                state = state | {"optimizer": optimizer.state_dict()}
                state["written"] = {name: (folder.parent / name).stat().st_size for name in LOGS}
                torch.save(state, half / "state.pt")
        except Exception as error:  # no space left, in the words of three libraries
            shutil.rmtree(half, ignore_errors=True)
            raise unwritable(folder, error) from None
        if folder.exists():
            folder.rename(old)
        half.rename(folder)
        for path in {old, *checkpoints(folder.parent)} - {folder} if optimizer else {old}:
            shutil.rmtree(path, ignore_errors=True)  # only now, when the new one is whole
    if ranks()[1] > 1:
        dist.barrier()


def unwritable(path, error):
    """No space left, or no right: what still can be used."""
    whole = ([str(p) for p in checkpoints(path.parent)] or ["none"])[-1]
    remedy = f"make room and continue with --resume; whole checkpoint: {whole}"
    return BadInput(f"--output-dir: {path} cannot be written ({first_line(error)}); {remedy}.")


def checkpoints(folder):
    """The whole checkpoints of a run, oldest first."""
    numbered = "checkpoint-" + "[0-9]" * 6
    found = [*Path(folder).glob(numbered + ".old"), *Path(folder).glob(numbered)]
    return sorted(found, key=lambda path: (path.stem, not path.suffix))


def environment():
    """What args.json records beside the arguments: package versions and, in a git checkout, the commit."""
    packages = {name: version(name) for name in ("torch", "transformers", "datasets", "sympy")}
    ask = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    git = subprocess.run(ask, capture_output=True, text=True, check=False) if shutil.which("git") else None
    return {"versions": packages, "commit": git.stdout.strip() if git else ""}


def open_run(args):
    """Begin or continue a run: its folder (Path), its state (a dict with `step`), model and tokenizer.

    Without --resume the folder is new; an earlier run of that name is moved aside, never overwritten, and
    only when nothing can be wrong with the arguments any more. With --resume all comes from the newest
    checkpoint, and the lines of metrics.jsonl and samples.jsonl that came after it are cut: they will be
    made again.
    """
    out, whole = Path(args.output_dir), checkpoints(args.output_dir)
    state = {"step": 0, "args": vars(args), "skipped": 0}
    if args.resume and not whole:  # killed before its first checkpoint, or never begun?
        begun = (out / "args.json").exists() and not (out / "final").exists()
        demand(begun, f"--resume: there is no checkpoint in {out}; start without --resume.")
        same_arguments(json.loads((out / "args.json").read_text()), args)  # its name says that it is whole
        print(f"--resume: there is no checkpoint in {out} yet; the run begins anew")
        args.resume = False
    if args.resume:
        state = load_state(whole[-1], args)
        model, tokenizer = load_model(whole[-1], args.gradient_checkpointing, "--resume")
    else:
        model, tokenizer = load_model(args.model, args.gradient_checkpointing)
    if ranks()[0] == 0:
        try:
            open_folder(out, state, args, sum(p.nbytes for p in model.parameters()))
        except OSError as error:
            raise BadInput(f"--output-dir {out}: cannot be written ({first_line(error)}).") from None
    if ranks()[1] > 1:
        dist.barrier()
    return out, state | {"faults": 0, "stop": 0, "leave": 0}, model, tokenizer


def load_state(folder, args):
    """What a checkpoint holds beside the model; the arguments must be those of the first run."""
    try:
        state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    except Exception as error:
        damaged = f"{folder}/state.pt is damaged or holds more than tensors and numbers"
        kind = type(error).__name__  # torch's own text advises to execute what is in it
        raise BadInput(f"--resume: {damaged} ({kind}); start again without --resume.") from None
    demand("written" in state, f"--resume: {folder} is of an older version; start again without --resume.")
    same_arguments(state["args"], args)
    return state


APART = ("resume", "output_dir", "stop_after", "unparseable_gold")  # the last is counted, not given


def same_arguments(first, args):
    """Those of the first run, but for the folder, which may have been moved."""
    now = {k: v for k, v in vars(args).items() if k not in APART}
    changed = ", ".join(k for k in now if k in first and first[k] != now[k])
    demand(not changed, f"--resume: {changed} differ from the first run; give the same arguments.")


# flags that may name what a run has left
SOURCES = "model base reward_model pairs preferences data eval_data".split()


def open_folder(out, state, args, model_bytes):
    """The run's folder, ready for the step after `state`."""
    if args.resume:
        for name, size in state["written"].items():  # what came after the checkpoint will be made again
            whole = (out / name).stat().st_size >= size
            demand(whole, f"--resume: {out / name} has lost lines; start again without --resume.")
            os.truncate(out / name, size)
        return
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    parts = 12 if hasattr(args, "reward_model") else 6  # weights, two moments; a critic's; old and new
    need, free = parts * model_bytes / 2**30, shutil.disk_usage(place).free / 2**30
    room = f"{free:.1f} GiB free, two checkpoints take {need:.1f} GiB"
    demand(need <= free, f"--output-dir {out}: {room}; make room or take another folder.")
    if (out / "metrics.jsonl").exists() or checkpoints(out):
        given = {f"--{k.replace('_', '-')} {v}": v for k, v in vars(args).items() if k in SOURCES and v}
        inside = ", ".join(k for k, v in given.items() if out.resolve() in Path(v).resolve().parents)
        demand(not inside, f"--output-dir {out}: {inside} is in it, which is moved aside; take another one.")
        out.rename(next(p for i in range(1, 10**6) if not (p := Path(f"{out}.{i}")).exists()))
    out.mkdir(parents=True, exist_ok=True)
    (out / "args.json.half").write_text(json.dumps(vars(args) | environment(), indent=1))
    (out / "args.json.half").rename(out / "args.json")  # half a file has no name


def steps(state, last):
    """Count state["step"] up to `last` under a progress bar; what ends a run early is acted on between steps.

    SIGINT and SIGTERM let a step come to its end and to its checkpoint (`due`), then the exit status is 130
    or 143; a second signal ends the process at once.
    """

    def stop(number, frame):
        state["stop"] = number
        signal.signal(number, signal.SIG_DFL)

    was = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with tqdm(initial=state["step"], total=last, disable=ranks()[0] > 0) as bar:
            while state["step"] < last:
                state["step"] += 1
                yield state["step"]
                bar.update()
                faults = "not finite in three updates running; lower --lr, look at the last samples"
                demand(state["faults"] < 3, f"step {state['step']}: the gradient is {faults}.")
                if leave := state.get("leave", state["stop"]):  # without `due` no checkpoint to wait for
                    print(f"stopped after step {state['step']}; --resume continues", file=sys.stderr)
                    sys.exit(128 + leave)
    finally:
        for number, handler in was.items():
            signal.signal(number, handler)


def finite(norm, state):
    """Whether a gradient of this norm can be used; with NaN or inf in it an update is skipped and counted."""
    state["faults"] = 0 if isfinite(norm) else state["faults"] + 1  # running
    state["skipped"] += not isfinite(norm)  # in all
    return isfinite(norm)


def due(state, every):
    """Whether this step ends with a checkpoint: every so many do, and one after which the run stops."""
    # all ranks or none; a signal that comes after this ends the next step
    state["leave"] = int(reduce(torch.tensor(state["stop"]), "MAX"))
    return state["leave"] or state["faults"] >= 3 or (every and state["step"] % every == 0)


def append(path, rows):
    """Add rows to a .jsonl file; the first rank writes."""
    if ranks()[0] == 0:
        with open(path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def read_jsonl(path):
    """The rows of a .jsonl file, none if there is none; half a row that a killed run left is cut off."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    if ranks()[0] == 0:
        path.write_text("".join(f"{line}\n" for line in lines))
    return [json.loads(line) for line in lines]


def log(out, metrics, samples=()):
    """A step's line in metrics.jsonl, a few of its responses in samples.jsonl, the main numbers on screen."""
    if ranks()[0]:
        return dist.barrier()  # what the first rank writes, others may read
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes or KiB
    peak = torch.cuda.max_memory_allocated() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    metrics = {k: v.item() if torch.is_tensor(v) else v for k, v in metrics.items()} | {"peak_memory": peak}
    samples = [{k: v for k, v in x.items() if not isinstance(v, list)} for x in samples]  # text, not ids
    strict = {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in metrics.items()}  # JSON
    for name, lines in zip(LOGS, ([strict], samples)):
        try:
            with open(out / name, "a") as file:
                file.writelines(json.dumps({"step": metrics["step"]} | line) + "\n" for line in lines)
        except OSError as error:
            raise unwritable(out / name, error) from None
    first, levels = list(metrics)[:6], metrics.get("levels", {})
    shown = [k for k in metrics if k in first or k == "accuracy" or "pass@" in k]
    tqdm.write("  ".join(f"{k} {metrics[k]:.4g}" for k in shown if k != "levels"))
    for level, scores in levels.items():
        tqdm.write(f"  level {level:20}" + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()))
    if ranks()[1] > 1:
        dist.barrier()
