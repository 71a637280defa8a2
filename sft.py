"""SFT: supervised fine-tuning, maximum likelihood on demonstrations.

Given prompts x and demonstrations y*, minimise the mean negative log-likelihood of their tokens:

    L = - 1/Z sum_i sum_t m_it log pi(y*_it | x_i, y*_i<t)

This is the policy gradient on off-policy responses whose advantage is always 1.
In the one equation, grad L = - 1/Z sum mask weight grad log pi:
    data    demonstrations
    weight  1
    mask    the response, EOS included; no token of the prompt
    Z       response tokens of the whole global batch. In a mean of micro-batch means, a token of a
            shorter micro-batch would weigh more: the smaller of two bugs that 2604.23747 reports

    python sft.py                    # tiny world, one minute on 2 CPU cores: pass@1 0.26 -> 0.97
    python sft.py --model Qwen/Qwen2.5-Math-1.5B --data DIR --dtype bf16 --lr 5e-5
    # set the lengths for your data, for example --max-demo-tokens 2048 --max-new-tokens 2048
"""

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
    add("--output-dir", default="runs/sft", help="folder for logs, checkpoints and final/")
    add("--seed", type=flags.integer(0), default=0, help="seed of every random draw")
    add("--steps", type=flags.steps, default=200, help="training steps; 0 only evaluates")
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
    add("--lr", type=flags.number(0, 1), default=flags.Rate(9e-4, 5e-5), help="learning rate")
    add("--schedule", choices=["constant", "linear", "cosine"], default="linear", help="learning rate decay")
    add("--warmup-steps", type=flags.integer(0), default=5, help="steps until --lr is reached")
    add("--max-grad-norm", type=flags.positive, default=1.0, help="clip gradients to this norm")
    add("--batch-size", type=flags.integer(1), default=16, help="demonstrations per step")
    add("--micro-batch-tokens", type=flags.integer(1), default=1024, help="tokens in one pass")
    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", type=flags.number(1e-3), default=1.0, help="of sampling and the loss")
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
    train, test = data.load_splits(args, demonstrations=True)
    torch.manual_seed(args.seed)
    out, state, model, tokenizer = runs.open_run(args)
    order = data.shuffled_batches(len(train), args.steps, args.batch_size)  # of row numbers
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
    print(f"one step: {args.batch_size} of {len(train):,} demonstrations")

    for step in runs.steps(state, args.steps):
        began = time.time()
        torch.manual_seed(args.seed * 10**6 + step)  # a resumed run repeats its draws
        lr = runs.learning_rate(step, args)  # warm-up, then --schedule
        optimizer.param_groups[0]["lr"] = lr

        # demonstrations
        batch = train[order[step - 1].tolist()]  # column -> list
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
                logp, entropy = logprobs(model, y, m, args.temperature)
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
        if step == args.steps or (args.eval_every and step % args.eval_every == 0):
            with autocast:
                metrics |= evaluate(model, tokenizer, test, args)
        runs.log(out, metrics)
        if runs.due(state, args.save_every):
            runs.save_model(out / f"checkpoint-{step:06}", model, tokenizer, optimizer, state)
    runs.save_model(out / "final", model, tokenizer)
    runs.finish(out, args)


if __name__ == "__main__":
    main(parse_args())
