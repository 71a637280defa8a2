"""DPO: direct preference optimisation, chosen against rejected responses, without a reward model.

Rafailov et al., Direct Preference Optimization, arXiv 2305.18290; SimPO: Meng et al., 2405.14734.
If a policy pi is optimal for a reward under a KL penalty to the initial policy pi_0, that reward is,
up to a term of x alone, beta log pi(y|x) / pi_0(y|x). Read it off pi, and fit it to preferences
y_w > y_l:

    L = - 1/Z sum_pairs log sigmoid(h)        h = r(y_w) - r(y_l)        s = sigmoid(-h)
    DPO    r(y) = beta ( log pi(y|x) - log pi_0(y|x) ), sums over tokens
    SimPO  r(y) = beta log pi(y|x) / |y|, the mean, without pi_0; h is reduced by a margin

In the one equation, grad L = - 1/Z sum mask weight grad log pi; against sft.py:
    data    pairs: from --pairs, or a correct and an incorrect one of k samples of the initial policy
    weight  + beta s on y_w, - beta s on y_l (SimPO: divided by |y|); at DPO's first step s = 1/2
    mask    the response, EOS included, of both
    Z       pairs of the whole global batch
log pi_0 is computed once, before training, and stored with the pairs: one model is in memory.

    python dpo.py                      # tiny world, minutes on 2 CPU cores: pass@1 0.26 -> 0.39
    python dpo.py --pairs tiny/preferences --loss simpo  # labels of a noisy annotator, no verifier
    python dpo.py --model Qwen/Qwen2.5-Math-1.5B-Instruct --data DIR --dtype bf16 --lr 1e-6 --k 16
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
    add("--output-dir", default="runs/dpo", help="folder for logs, checkpoints and final/")
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
    add("--lr", type=flags.number(0, 1), default=flags.Rate(3e-5, 1e-6), help="learning rate")
    add("--schedule", choices=["constant", "linear", "cosine"], default="linear", help="learning rate decay")
    add("--warmup-steps", type=flags.integer(0), default=5, help="steps until --lr is reached")
    add("--max-grad-norm", type=flags.positive, default=1.0, help="clip gradients to this norm")
    add("--batch-size", type=flags.integer(1), default=16, help="pairs per step")
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
    add("--loss", choices=["dpo", "simpo"], default="dpo", help="simpo: no reference policy")
    add("--beta", type=flags.number(0), default=0.1, help="DPO: penalty for leaving --model")
    add("--simpo-beta", type=flags.number(0), default=2.0, help="SimPO: scale of the mean logp")
    add("--simpo-margin", type=flags.number(0), default=1.0, help="SimPO: margin to aim for")
    add("--pairs", help="data set with columns prompt, chosen, rejected; default: sampled")
    add("--pairs-split", default="train", help="split of --pairs")
    add("--k", type=flags.integer(1), default=8, help="samples per question, without --pairs")
    add("--pair-questions", type=flags.integer(1), default=1000, help="questions to sample")
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


def load_pairs(args, test=()):
    """(prompt, chosen, rejected) for each row of --pairs that is not held out."""
    rows = data.load_pairs(args.pairs, args.pairs_split, "--pairs", args, test)
    return list(zip(rows["prompt"], rows["chosen"], rows["rejected"]))


def sample_pairs(model, tokenizer, rows, args):
    """(question, correct, incorrect) from k samples of each question; and the tokens sampled."""
    rows = data.subset(rows, args.pair_questions, args.seed)
    questions = list(rows["question"])
    prompts = tok.encode_prompts(tokenizer, questions, args.prompt_template)
    responses, _ = sample(model, tokenizer, prompts * args.k, args.temperature, args)
    texts = tok.decode_responses(tokenizer, responses)
    verdicts = math_reward(texts, list(rows["gold"]) * args.k)
    stops = tok.stop_ids(tokenizer, model.config)
    pairs = []
    for i, question in enumerate(questions):
        correct = {}  # distinct texts, in the order of sampling
        incorrect = {}
        for j in range(i, len(texts), len(rows)):  # the k samples of this question
            if responses[j][-1] in stops:  # truncated ones are left out
                side = correct if verdicts[j] else incorrect
                side[texts[j]] = True
        for chosen, rejected in zip(correct, incorrect):
            pairs.append((question, chosen, rejected))
    sentence = "no question has both a correct and an incorrect sample; raise it or change --data."
    flags.demand(pairs, f"--k {args.k}: {sentence}")
    return pairs, sum(len(ids) for ids in responses)


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


def with_initial_logp(model, tokenizer, pairs, args):
    """Rows 2j and 2j + 1: chosen and rejected response of pair j, each with its log pi_0(y | x)."""
    rows = []
    for question, *both in pairs:
        rows += [{"question": question, "solution": text} for text in both]
    for i in range(0, len(rows), args.sample_rows):
        part = rows[i : i + args.sample_rows]
        questions = [row["question"] for row in part]
        prompts = tok.encode_prompts(tokenizer, questions, args.prompt_template)
        responses = [tok.encode_response(tokenizer, row["solution"]) for row in part]
        responses = [ids[: args.max_demo_tokens] for ids in responses]
        logp, _ = score(model, *tok.join(prompts, responses, model.device), args)  # [N, T]
        for row, total in zip(part, logp.sum(1).tolist()):
            row["initial_logp"] = total
    return rows


# ---- the method ------------------------------------------------------------------------
def dpo_loss(logp, initial_logp, response_mask, z, args):
    """- 1/Z sum log sigmoid(h); logp, mask [B, T], pairs adjacent; initial_logp log pi_0(y | x), [B]."""
    total = (logp * response_mask).sum(1)  # log pi(y | x), [B]
    if args.loss == "dpo":
        reward = args.beta * (total - initial_logp)  # r(y), [B]
        margin = 0.0
    else:
        reward = args.simpo_beta * total / response_mask.sum(1)
        margin = args.simpo_margin
    h = reward[0::2] - reward[1::2] - margin  # r(y_w) - r(y_l), [B/2]
    return -F.logsigmoid(h).sum() / z, reward.detach()  # slope -sigmoid(-h): 0 for a clear pair


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


def kl_from_initial(model, prompts, responses, initial_logp, args):
    """KL(pi_0 || pi) per token, on held-out responses that pi_0 sampled before training."""
    tokens, mask = tok.join(prompts, responses, model.device)
    logp, _ = score(model, tokens, mask, args)
    log_ratio = logp - logp.new_tensor(initial_logp)  # log pi / pi_0, [N, T]
    k3 = log_ratio.exp() - log_ratio - 1  # >= 0, unbiased since y ~ pi_0
    return k3.sum() / mask.sum()


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
    train, test = data.load_splits(args)
    pairs = load_pairs(args, data.held_out(args)) if args.pairs and args.steps else []
    torch.manual_seed(args.seed)
    out, state, model, tokenizer = runs.open_run(args)
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
            if args.steps:  # else no pairs are needed
                began = time.time()
                generated = 0  # tokens
                if not pairs:
                    pairs, generated = sample_pairs(model, tokenizer, train, args)
                rows = with_initial_logp(model, tokenizer, pairs, args)
                costs = {"tokens_generated": generated, "seconds_sample": time.time() - began}
                runs.log(out, {"step": 0} | costs, rows)
                # for the KL: sampled once, scored as it will be scored again
                prompts = tok.encode_prompts(tokenizer, test["question"], args.prompt_template)
                responses, _ = sample(model, tokenizer, prompts, args.temperature, args)
                logp, _ = score(model, *tok.join(prompts, responses, model.device), args)
                state["initial"] = (prompts, responses, logp.tolist())
                runs.save_model(out / "checkpoint-000000", model, tokenizer, optimizer, state)
    train = data.load_samples(out)  # two rows per pair
    torch.manual_seed(args.seed)
    order = data.shuffled_batches(len(train) // 2, args.steps, args.batch_size)  # pair numbers
    print(f"one step: {args.batch_size} of {len(train) // 2:,} pairs")

    for step in runs.steps(state, args.steps):
        began = time.time()
        torch.manual_seed(args.seed * 10**6 + step)  # a resumed run repeats its draws
        lr = runs.learning_rate(step, args)  # warm-up, then --schedule
        optimizer.param_groups[0]["lr"] = lr

        # pairs
        rows = []
        for pair in order[step - 1].tolist():
            rows += [2 * pair, 2 * pair + 1]
        batch = train[rows]  # column -> list
        questions = batch["question"]
        prompts = tok.encode_prompts(tokenizer, questions, args.prompt_template)
        solutions = batch["solution"]
        responses = [tok.encode_response(tokenizer, text) for text in solutions]
        lengths = [len(ids) for ids in responses]
        truncated = sum(length > args.max_demo_tokens for length in lengths)
        responses = [ids[: args.max_demo_tokens] for ids in responses]
        tokens, mask = tok.join(prompts, responses, model.device)  # [N, T]
        initial_logp = torch.tensor(batch["initial_logp"], device=model.device)  # [N]

        # train
        losses = []
        entropies = []
        rewards = torch.zeros(len(tokens), dtype=model.dtype)
        # a micro-batch holds whole pairs, each as long as its longer response, [N/2, T]
        longer = mask.view(-1, 2, mask.shape[1]).amax(1)
        for pair_rows, columns in tok.micro_batches(longer, args.micro_batch_tokens // 2, ranks.shard()):
            rows = [row for pair in pair_rows for row in (2 * pair, 2 * pair + 1)]
            micro = rows, columns
            y = tokens[micro]  # [B, width]
            m = mask[micro]
            with autocast:
                logp, entropy = logprobs(model, y, m, args.temperature)
            loss, reward = dpo_loss(logp, initial_logp[rows], m, len(longer), args)
            loss.backward()
            losses.append(loss.item())
            entropies.append(entropy.detach()[m.bool()].cpu())  # [tokens]
            rewards[rows] = reward.cpu()
        norm = ranks.clip_gradient(model, args.max_grad_norm)  # summed, as Z is global
        if runs.finite(norm, state):  # else the update is skipped
            optimizer.step()
        optimizer.zero_grad()

        losses = ranks.gather(losses)  # of all ranks
        entropies = ranks.gather(entropies)

        # log, evaluate, save
        rewards = ranks.reduce(rewards)
        chosen, rejected = rewards[0::2], rewards[1::2]
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
            "reward_chosen": chosen.mean(),  # often both fall
            "reward_rejected": rejected.mean(),
            "reward_margin": (chosen - rejected).mean(),
            "reward_accuracy": (chosen > rejected).float().mean(),
        }
        if step == args.steps or (args.eval_every and step % args.eval_every == 0):
            with autocast:
                metrics |= evaluate(model, tokenizer, test, args)
                metrics |= {"kl": kl_from_initial(model, *state["initial"], args)}
        runs.log(out, metrics)
        if runs.due(state, args.save_every):
            runs.save_model(out / f"checkpoint-{step:06}", model, tokenizer, optimizer, state)
    runs.save_model(out / "final", model, tokenizer)
    runs.finish(out, args)


if __name__ == "__main__":
    main(parse_args())
