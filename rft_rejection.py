"""RFT: rejection-sampling fine-tuning, maximum likelihood on the model's own correct samples.

Yuan et al., Scaling Relationship on Learning Mathematical Reasoning, arXiv 2308.01825;
STaR 2203.14465; RAFT 2304.06767; ReST-EM 2312.06585. Sample k completions of each question, let a
verifier judge them, keep the correct ones, deduplicated by their reasoning, and train on them as
demonstrations:

    y ~ pi_sampler( . | x), V(x, y) = 1, distinct;    L = - 1/Z sum_i sum_t m_it log pi(y_it | x_i, y_i<t)

In the one equation, grad L = - 1/Z sum mask weight grad log pi; against sft.py:
    data    correct self-generated samples, deduplicated; --add-gold adds the demonstrations
    weight  1, as in sft.py: an incorrect sample is left out, not pushed down as in grpo.py
    mask    the response, EOS included
    Z       response tokens of the whole global batch
RFT is one round: an SFT model samples, and its base is trained. RFT also checks the equations of a
sample; this script does not. STaR (--rationalize --k 1) and ReST-EM have several rounds. RAFT and
expert iteration are --restart continue --keep-per-question 1. With sft.py's --lr, --k 0 --add-gold
--questions 0 is sft.py, bit by bit.

    python rft_rejection.py            # tiny world, minutes on 2 CPU cores: pass@1 0.26 -> 0.39
    python rft_rejection.py --model runs/sft/final --base tiny/model --add-gold    # samples of SFT, its base
    python rft_rejection.py --model Qwen/Qwen2.5-Math-1.5B --data DIR --dtype bf16 --lr 2e-5
    # set the lengths for your data, for example --max-demo-tokens 2048 --max-new-tokens 2048
"""

import re
import time

import torch
import torch.nn.functional as F

import common.tokenization as tok
from common.logprob import token_logprobs
from common.plumbing import data, decoding, draws, evaluation, flags, memory, models, ranks, runs
from common.verifier import math_reward


# ---- arguments -------------------------------------------------------------------------
def parse_args(argv=None):
    parser = flags.Parser(__doc__)
    add = parser.add_argument_group("run").add_argument
    add("--output-dir", default="runs/rft_rejection", help="folder for logs, checkpoints and final/")
    add("--seed", type=flags.integer(0), default=0, help="seed of every random draw")
    add("--steps", type=flags.steps, default=200, help="steps per round; 0 only evaluates")
    add("--save-every", type=flags.integer(0), default=50, help="save every N steps; 0: never")
    add("--resume", action="store_true", help="continue this run from its newest checkpoint")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="tiny/model", help="hub name or folder of the model to train")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="precision of activations")
    add("--gradient-checkpointing", action="store_true", help="less memory, slower training")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="tiny/data", help="hub name, folder or json(l), csv, parquet file")
    add("--split", default="train", help="split to train on")
    add("--eval-data", help="data set with the held-out rows; default: --data")
    add("--eval-split", help="split with held-out rows; default: test, else a tenth of --split")
    add("--question-key", default="question", help="column with the question")
    add("--answer-key", default="answer", help="gold answers; if not there, --solution-key")
    add("--solution-key", default="solution", help="column with the demonstration")
    add("--prompt-template", default="{question}", help="prompt; {question} is filled in")
    add("--chat-template", choices=["on", "off"], default="on", help="use the model's template")
    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=flags.number(0, 1), default=flags.Rate(1e-4, 2e-5), help="learning rate")
    add("--schedule", choices=["constant", "linear", "cosine"], default="linear", help="learning rate decay")
    add("--warmup-steps", type=flags.integer(0), default=5, help="steps until --lr is reached")
    add("--max-grad-norm", type=flags.positive, default=1.0, help="clip gradients to this norm")
    add("--batch-size", type=flags.integer(1), default=16, help="demonstrations per step")
    add("--micro-batch-tokens", type=flags.integer(1), default=1024, help="tokens in one pass")
    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", type=flags.number(1e-3), default=1.0, help="of sampling, not training")
    add("--max-new-tokens", type=flags.integer(1), default=100, help="max tokens per response")
    add("--sample-rows", type=flags.integer(1), default=512, help="responses sampled at once")
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-every", type=flags.integer(0), default=0, help="evaluate every N steps; 0: start and end")
    add("--eval-questions", type=flags.integer(1), default=300, help="held-out questions used")
    add("--eval-samples", type=flags.integer(0), default=4, help="per question; 0: greedy only")
    add("--eval-temperature", type=flags.number(1e-3), default=1.0, help="of --eval-samples")
    add("--eval-first", choices=["on", "off"], default="on", help="evaluate before training")
    add = parser.add_argument_group("the method").add_argument
    add("--max-demo-tokens", type=flags.integer(1), default=512, help="truncate longer texts")
    add("--k", type=flags.integer(0), default=8, help="samples per question and round")
    add("--questions", type=flags.integer(0), default=1000, help="questions per round; 0: all")
    add("--keep-per-question", type=flags.integer(0), default=0, help="samples kept; 0: all")
    add("--add-gold", action="store_true", help="also train on the demonstrations")
    const = "{question}\nAnswer: {gold}"
    add("--rationalize", nargs="?", const=const, help="STaR: retry failures, shown the answer")
    add("--rounds", type=flags.integer(1), default=1, help="rounds of sampling and training")
    add("--restart", choices=["base", "continue"], default="base", help="what a round trains")
    add("--base", help="model that --restart base trains; default: --model")
    return parser.parse_args(argv)


# ---- sampling --------------------------------------------------------------------------
@torch.no_grad()
def sample(model, tokenizer, prompts, temperature, args, spent=None):
    """Complete each prompt. Returns two ragged lists: response ids and their log-probabilities.

    A response ends with EOS unless the budget truncates it. `spent` is the number of response
    tokens that each prompt already holds; they count against the budget.
    """
    model = models.sampler(model)  # under bf16 a copy, refreshed from the weights
    stops = torch.tensor(tok.stop_ids(tokenizer, model.config), device=model.device)
    generator = ranks.generator(model.device)  # each rank has its own generator
    spent = spent or [0] * len(prompts)
    budget_left = [args.max_new_tokens - n for n in spent]

    def draw(logits):
        """From logits [B, V]: next token, its log-probability, whether the response ends; all [B]."""
        # from softmax(logits / temperature), the likeliest at 0; no top-p: what `logprobs` scores
        token, logp = draws.race(logits, temperature, generator)  # [B], [B]
        ended = (token[:, None] == stops).any(1)  # [B]
        return token, logp, ended

    ids = torch.full((len(prompts), args.max_new_tokens), -1)  # [N, budget], -1: not sampled
    logps = torch.zeros(ids.shape)
    unfinished = [i for i, budget in enumerate(budget_left) if budget > 0]  # row numbers
    lengths = [len(prompt) for prompt in prompts]
    at_once = memory.rows(model, lengths, args)  # for each prompt: how many of its length fit
    for rows in decoding.batches(unfinished, at_once, lengths):
        parts = [prompts[i] for i in rows]
        budgets = [budget_left[i] for i in rows]
        batch = decoding.Batch(model, parts, budgets)
        drawn, drawn_logp = batch.decode(draw, generator)  # every row to its end, step by step
        ids[rows, : drawn.shape[1]] = drawn
        logps[rows, : drawn.shape[1]] = drawn_logp
    ids, logps = ranks.reduce(ids, "MAX"), ranks.reduce(logps)  # -1 and 0 where other ranks sampled
    responses = [row[row >= 0].tolist() for row in ids]
    return responses, [row[: len(y)].tolist() for y, row in zip(responses, logps)]


def attempt(model, tokenizer, rows, template, args):
    """k judged samples of each question, a list for each; the template may show the gold."""
    questions = [row["question"] for row in rows]
    golds = [row["gold"] for row in rows]
    shown = [template.replace("{gold}", gold) for gold in golds]
    asked = [text.replace("{question}", q) for text, q in zip(shown, questions)]
    prompts = tok.encode_prompts(tokenizer, asked, args.prompt_template)
    responses, _ = sample(model, tokenizer, prompts * args.k, args.temperature, args)
    texts = tok.decode_responses(tokenizer, responses)
    rewards = math_reward(texts, golds * args.k)
    stops = tok.stop_ids(tokenizer, model.config)

    samples = [[] for _ in rows]  # k for each question
    for i, text in enumerate(texts):  # k rounds over all questions
        question = i % len(rows)
        found = {
            "question": questions[question],
            "solution": text,
            "gold": golds[question],
            "reward": rewards[i],
            "kept": False,
            "tokens": len(responses[i]),
            "ended": responses[i][-1] in stops,  # by EOS, not truncated
        }
        samples[question].append(found)
    return samples


def sample_and_filter(model, tokenizer, rows, args):
    """Metrics of a round and its rows for samples.jsonl, of which `kept` says what to train on."""
    samples = attempt(model, tokenizer, rows, "{question}", args)
    rewards = [s["reward"] for found in samples for s in found]
    # questions without a correct sample
    failed = [i for i, found in enumerate(samples) if not any(s["reward"] for s in found)]
    if args.rationalize:  # shown the answer, the model may find a way there; not shown in training
        retries = attempt(model, tokenizer, rows.select(failed), args.rationalize, args)
        for i, more in zip(failed, retries):
            samples[i] += more

    logged = []
    paths = 0
    for row, found in zip(rows, samples):
        distinct = {}  # reasoning path -> sample
        for j in torch.randperm(len(found)).tolist():  # random, so that no path is preferred
            s = found[j]
            if s["reward"] and s["ended"]:
                distinct[path(s["solution"])] = s
        paths += len(distinct)  # what RFT's gain grows with, in the paper
        if args.add_gold:  # the demonstration stands for its own path
            gold = {"question": row["question"], "solution": row["solution"], "kept": True}
            logged.append(gold)
            distinct.pop(path(row["solution"]), None)
        for s in list(distinct.values())[: args.keep_per_question or None]:  # 0: all
            s["kept"] = True  # trained
        logged += found

    metrics = {
        "reward": sum(rewards) / max(1, len(rewards)),
        "kept": sum(s["kept"] for s in logged),  # size of the training set
        "unsolved": len(failed) / len(rows),
        "tokens_generated": sum(s["tokens"] for found in samples for s in found),
        "paths": paths / len(rows),  # distinct correct ones per question
    }
    flags.demand(metrics["kept"], "--k: no sample is correct; raise it, or start with sft.py.")
    return metrics, logged


# ---- log-probabilities -----------------------------------------------------------------
@ranks.forward
def logprobs(model, tokens, response_mask, temperature):
    """log pi(y_t | x, y_<t) and entropy of pi(. | x, y_<t), [B, T] each; 0 outside the response."""
    # no attention mask: padding is on the right, where causal attention never looks
    hidden = model.base_model(tokens, use_cache=False).last_hidden_state
    hidden = hidden[:, :-1]  # position t - 1 predicts y_t, [B, T - 1, D]
    targets = tokens[:, 1:].masked_fill(response_mask[:, 1:] == 0, -100)  # not scored: returns 0
    head = model.get_output_embeddings().weight  # [V, D]
    logp, entropy = token_logprobs(hidden, head, targets, models.logit_temperature(model, temperature))
    return F.pad(logp, (1, 0)), F.pad(entropy, (1, 0))  # aligned with the tokens again


@torch.no_grad()
def score(model, tokens, response_mask, args):
    """`logprobs` of a whole batch [N, T], in micro-batches and without gradient."""
    logp = torch.zeros(tokens.shape, dtype=model.dtype, device=model.device)
    entropy = torch.zeros_like(logp)
    for micro in tok.micro_batches(response_mask, args.micro_batch_tokens, ranks.shard()):
        part = logprobs(model, tokens[micro], response_mask[micro], args.temperature)
        logp[micro], entropy[micro] = part  # [B, width]
    return ranks.reduce(logp), ranks.reduce(entropy)


# ---- the method ------------------------------------------------------------------------
def path(text):
    """The reasoning of a text: its equations without words and spaces, or without any, the text."""
    parts = re.split(r"[,;:$\n]|\.(?!\d)", text)
    equations = [part for part in parts if "=" in part]
    equations = [re.sub(r"(?<!\\)\b[A-Za-z]{2,}|\s", "", part) for part in equations]
    return tuple(equations or text.split())


def sft_loss(logp, response_mask, z):
    """- 1/Z sum m log pi; logp and mask [B, T] of a micro-batch, Z of the global batch."""
    weight = torch.ones_like(logp)  # every demonstration has advantage 1
    return -(weight * logp * response_mask).sum() / z


# ---- evaluation ------------------------------------------------------------------------
def evaluate(model, tokenizer, rows, args):
    """Held-out greedy accuracy and pass@k, overall and for each level if the rows have one."""
    torch.manual_seed(args.seed)  # the same draws at every evaluation
    prompts = tok.encode_prompts(tokenizer, rows["question"], args.prompt_template)
    with runs.evaluating(len(prompts) * (1 + args.eval_samples)):
        greedy, _ = sample(model, tokenizer, prompts, 0.0, args)  # one answer each
        prompts *= args.eval_samples
        sampled, _ = sample(model, tokenizer, prompts, args.eval_temperature, args)
    return evaluation.report(model, tokenizer, rows, greedy + sampled, math_reward, args)


def self_check(model, tokenizer, rows, args):
    """Sampling and scoring must be one distribution: the ratio of fresh samples is 1."""
    prompts = tok.encode_prompts(tokenizer, rows["question"][:8], args.prompt_template)
    responses, sampled_logp = sample(model, tokenizer, prompts, args.temperature, args)
    tokens, mask = tok.join(prompts, responses, model.device)  # [8, T]
    logp, _ = score(model, tokens, mask, args)
    ratio = (logp.cpu() - tok.align(sampled_logp, mask.cpu())).exp()
    evaluation.check_ratio(ratio, mask, args)
    evaluation.show(tokenizer, prompts[0], responses[0])


# ---- training --------------------------------------------------------------------------
def main(args):
    asked, test = data.load_splits(args, demonstrations=args.add_gold)
    if args.add_gold:
        asked = data.with_gold(asked, args)
    models.check_same_shapes(args.model, args.base)
    torch.manual_seed(args.seed)
    out, state, model, tokenizer = runs.open_run(args)
    asked = data.subset(asked, args.questions, args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    # bf16 for activations only: weights and Adam's moments stay fp32
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=args.dtype == "bf16")
    if args.resume:
        optimizer.load_state_dict(state.pop("optimizer"))
    else:
        with autocast:
            self_check(model, tokenizer, test, args)
            first = evaluate(model, tokenizer, test, args) if args.eval_first == "on" else {}
            runs.log(out, {"step": 0, "unparseable_gold": args.unparseable_gold} | first)
    print(f"one round: {args.k} samples of {len(asked):,} questions, {args.steps} steps")
    train = None

    for step in runs.steps(state, args.rounds * args.steps):
        began = time.time()
        torch.manual_seed(args.seed * 10**6 + step)  # a resumed run repeats its draws
        earlier = (step - 1) // args.steps * args.steps  # steps of earlier rounds
        nth = step - earlier  # step of this round
        lr = runs.learning_rate(nth, args)  # warm-up, then --schedule
        optimizer.param_groups[0]["lr"] = lr

        # sample, verify, keep; save a checkpoint, so that no round is sampled twice
        if state.get("sampled", -1) < earlier:
            with autocast:
                metrics, found = sample_and_filter(model, tokenizer, asked, args)
            metrics["seconds_sample"] = time.time() - began
            runs.log(out, {"step": earlier} | metrics, found)
            state["sampled"] = earlier  # this round need not be sampled again
            if args.restart == "base":  # better samples, but the same initial weights
                base, _ = models.load_model(args.base or args.model)
                model.load_state_dict(base.state_dict())
                del base  # or training would hold a second model in memory
                optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
            now = state | {"step": earlier}
            runs.save_model(out / f"checkpoint-{earlier:06}", model, tokenizer, optimizer, now)
        if nth == 1 or not train:  # train what samples.jsonl says
            train = data.load_samples(out)
            train = train.select([i for i, at in enumerate(train["step"]) if at == earlier])
            train = train.filter(bool, input_columns="kept")
            torch.manual_seed(args.seed + earlier)  # a resumed run draws the same order
            order = data.shuffled_batches(len(train), args.steps, args.batch_size)  # of row numbers
        began = time.time()

        # demonstrations
        batch = train[order[nth - 1].tolist()]  # column -> list
        questions = batch["question"]
        prompts = tok.encode_prompts(tokenizer, questions, args.prompt_template)
        solutions = batch["solution"]
        responses = [tok.encode_response(tokenizer, text) for text in solutions]
        lengths = [len(ids) for ids in responses]
        truncated = sum(length > args.max_demo_tokens for length in lengths)
        responses = [ids[: args.max_demo_tokens] for ids in responses]
        tokens, mask = tok.join(prompts, responses, model.device)  # [N, T]

        # train
        z = mask.sum()  # response tokens of the global batch
        losses = []
        entropies = []
        for micro in tok.micro_batches(mask, args.micro_batch_tokens, ranks.shard()):
            y = tokens[micro]  # [B, width]
            m = mask[micro]
            with autocast:
                logp, entropy = logprobs(model, y, m, 1.0)
            loss = sft_loss(logp, m, z)
            loss.backward()
            losses.append(loss.item())
            entropies.append(entropy.detach()[m.bool()].cpu())  # [tokens]
        norm = ranks.clip_gradient(model, args.max_grad_norm)  # summed, as Z is global
        if runs.finite(norm, state):  # else the update is skipped
            optimizer.step()
        optimizer.zero_grad()

        losses = ranks.gather(losses)  # of all ranks
        entropies = ranks.gather(entropies)

        # log, evaluate, save
        metrics = {
            "step": step,
            "loss": sum(losses),
            "entropy": torch.cat(entropies).mean(),
            "grad_norm": norm,
            "response_len": mask.sum(1).float().mean(),
            "truncated_frac": truncated / len(tokens),
            "lr": lr,
            "skipped": state["skipped"],
            "tokens_trained": mask.sum(),
            "seconds_train": time.time() - began,
        }
        if step % args.steps == 0 or (args.eval_every and step % args.eval_every == 0):
            with autocast:
                metrics |= evaluate(model, tokenizer, test, args)
        runs.log(out, metrics)
        if runs.due(state, args.save_every):
            runs.save_model(out / f"checkpoint-{step:06}", model, tokenizer, optimizer, state)
    runs.save_model(out / "final", model, tokenizer)
    runs.finish(out, args)


if __name__ == "__main__":
    main(parse_args())
