"""LUFFY: one completion of each group is a demonstration, and its tokens have a weight of their own.

Yan et al., Learning to Reason under Off-Policy Guidance, 2504.14945.
The demonstration y* is judged like any completion and shares the baseline of its group, so it is
imitated where the policy's own completions earn less. Against grpo.py:

    data    G - 1 on-policy completions and y*, whole
    weight  on y* A f'(p) p, as f(p) = p / (p + 0.1) takes the place of r: largest at p = 0.1
    mask    unchanged: every token of y* is trained
    Z       unchanged

Related methods have another weight on y*: --demo-weight sft (RL plus an SFT loss), chord
(CHORD-phi, 2508.11408), srft (the demonstration's part of SRFT, 2506.19767); sft with --hpt-gate 0
is HPT (2509.04419). UFT (2505.16984) begins every completion with a part of y*, and after N steps
none: --uft-steps 60 --hybrids 8 --demo-weight sft --sft-coef 0.001.

    python luffy.py                    # tiny world, minutes on 2 CPU cores: pass@1 0.26 -> 0.53
    python luffy.py --model Qwen/Qwen2.5-Math-1.5B --data DIR --dtype bf16 --lr 1e-6
    # set the lengths for your data; docs/methods/luffy.md has the recipes of the papers
"""

import time
from math import cos, pi

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
    add("--output-dir", default="runs/luffy", help="folder for logs, checkpoints and final/")
    add("--seed", type=flags.integer(0), default=0, help="seed of every random draw")
    add("--steps", type=flags.steps, default=100, help="training steps; 0 only evaluates")
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
    add("--lr", type=flags.number(0, 1), default=flags.Rate(2e-4, 1e-6), help="learning rate")
    add("--schedule", choices=["constant", "linear", "cosine"], default="linear", help="learning rate decay")
    add("--warmup-steps", type=flags.integer(0), default=5, help="steps until --lr is reached")
    add("--max-grad-norm", type=flags.positive, default=1.0, help="clip gradients to this norm")
    add("--batch-size", type=flags.integer(1), default=16, help="questions per step")
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
    add("--group-size", type=flags.integer(2), default=8, help="completions per question, G")
    kinds = ["grpo", "dr_grpo", "maxrl"]
    text = "R - mean of the group; grpo: divided by the std; maxrl: divided by the mean"
    add("--advantage", choices=kinds, default="dr_grpo", help=text)
    text = "sequence: mean of means; token: mean of tokens; constant: sum / responses / budget"
    add("--loss-norm", choices=["sequence", "token", "constant"], default="constant", help=text)
    add("--clip-low", type=flags.number(0, 1), default=0.2, help="ratios are at least 1 - this")
    add("--clip-high", type=flags.number(0), default=0.2, help="ratios are at most 1 + this")
    add("--kl-coef", type=flags.number(0), default=0.0, help="KL penalty to --model; 0: none")
    add("--epochs-per-batch", type=flags.integer(1), default=1, help="passes over the samples")
    add("--minibatches", type=flags.integer(1), default=1, help="updates per pass over samples")
    text = "DAPO: replace groups all correct or all incorrect, up to N times per step; 0: off"
    add("--dynamic-sampling", type=flags.integer(0), default=0, help=text)
    text = "DAPO: a penalty grows from 0 to 0.5 over the last N tokens of the budget; 0: off"
    add("--overlong-tokens", type=flags.integer(0), default=0, help=text)
    text = "one ratio per token, or per response (GSPO, with --loss-norm sequence)"
    add("--ratio", choices=["token", "sequence"], default="token", help=text)
    text = "ppo: tokens beyond the clip get no gradient; cispo: the clipped ratio is a weight"
    add("--clip", choices=["ppo", "cispo"], default="ppo", help=text)
    text = "weight tokens by pi_old / pi_sampler, at most this, such as 2 (TIS); 0: off"
    add("--tis-cap", type=flags.number(0), default=0.0, help=text)
    add("--demo-fraction", type=flags.number(0, 1), default=1.0, help="share of demonstrated questions")
    weights = ["luffy", "sft", "chord", "srft"]
    text = "weight of demonstration tokens; sft: an SFT loss; the others as in these papers"
    add("--demo-weight", choices=weights, default="luffy", help=text)
    add("--sft-coef", type=flags.number(0), default=0.05, help="factor of sft, chord and srft")
    add("--hybrids", type=flags.integer(1), default=1, help="demonstrated completions per group")
    text = "HPT: imitate where the on-policy accuracy is at most this; -1: off"
    add("--hpt-gate", type=flags.number(-1, 1), default=-1.0, help=text)
    text = "UFT: parts of demonstrations, ever shorter, for N steps; 0: whole ones"
    add("--uft-steps", type=flags.integer(0), default=0, help=text)
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
def draw_demonstration(tokenizer, row, step, args):
    """y*, the ids of the demonstration, or with --uft-steps a part of it; empty if there is none."""
    if not (row["demonstrated"] and row["solution"]):
        return []
    ids = tok.encode_response(tokenizer, row["solution"])  # y*, EOS included
    if not args.uft_steps:
        return ids
    if step > args.uft_steps:  # from here on UFT is plain RL
        return []
    # UFT: the first k fifths, without EOS; k ~ Binomial(5, p), and p falls from 0.95 to 0.05
    p = 0.05 + 0.5 * (1 + cos(pi * step / args.uft_steps)) * (0.95 - 0.05)
    fifths = (torch.rand(5) < p).sum().item()
    return ids[: int(fifths / 5 * (len(ids) - 1))]


def rollout(model, tokenizer, rows, step, args):
    """A list of groups: G completions of a question with their rewards; those with y* first."""
    rows = [row for row in rows for _ in range(args.group_size)]
    questions = [row["question"] for row in rows]
    golds = [row["gold"] for row in rows]
    prompts = tok.encode_prompts(tokenizer, questions, args.prompt_template)
    stops = tok.stop_ids(tokenizer, model.config)
    prefixes = [[] for _ in rows]  # the first --hybrids of each group get one
    for i in range(0, len(rows), args.group_size):
        prefix = draw_demonstration(tokenizer, rows[i], step, args)
        prefixes[i : i + args.hybrids] = [prefix] * args.hybrids
    # the policy continues from here; a whole y* has spent the budget, so nothing follows it
    inputs = [prompt + prefix for prompt, prefix in zip(prompts, prefixes)]
    whole = [any(token in stops for token in prefix) for prefix in prefixes]  # with EOS: all of y*
    spent = [args.max_new_tokens if done else len(p) for done, p in zip(whole, prefixes)]
    continuations, logp = sample(model, tokenizer, inputs, args.temperature, args, spent)
    responses = [prefix + rest for prefix, rest in zip(prefixes, continuations)]
    responses = [tok.truncate(ids, stops, args.max_new_tokens) for ids in responses]
    logp = [[0.0] * len(prefix) + rest for prefix, rest in zip(prefixes, logp)]
    logp = [row[: len(y)] for y, row in zip(responses, logp)]
    texts = tok.decode_responses(tokenizer, responses)
    correct = math_reward(texts, golds)  # truncated responses are judged like all others

    completions = []
    for i in range(len(rows)):
        penalty = 0.0
        if args.overlong_tokens:  # DAPO eq. 13, halved: its rewards are 1 and -1, ours 1 and 0
            start = args.max_new_tokens - args.overlong_tokens
            penalty = 0.5 * min(0, (start - len(responses[i])) / args.overlong_tokens)
        completion = {
            "prompt": prompts[i],
            "response": responses[i],
            "sampled_logp": logp[i],
            "question": questions[i],
            "text": texts[i],
            "gold": golds[i],
            "reward": correct[i] + penalty,
            "correct": correct[i],
            "truncated": responses[i][-1] not in stops,
            "prefix_len": min(len(prefixes[i]), len(responses[i])),
        }
        completions.append(completion)
    starts = range(0, len(completions), args.group_size)
    return [completions[i : i + args.group_size] for i in starts]


def zero_variance_groups(groups):
    """Numbers of the groups all correct or all incorrect: DAPO's dynamic sampling replaces them."""
    verdicts = [{c["correct"] for c in group} for group in groups]
    return [g for g, found in enumerate(verdicts) if len(found) == 1]


def advantages(rewards, how):
    """A_i of each completion from the rewards of its group, [Q, G]; equal rewards give A = 0."""
    centred = rewards - rewards.mean(1, keepdim=True)  # (G - 1) / G times leave-one-out
    if how == "dr_grpo":
        return centred
    if how == "maxrl":  # 2602.02710: estimates the gradient of log P(correct), not of P(correct)
        return centred / (rewards.mean(1, keepdim=True) + 1e-6)
    return centred / (rewards.std(1, keepdim=True) + 1e-6)  # std divides by G - 1


def demonstration_weight(advantage, logp, entropy, imitated, inv_z, n, args):
    """What multiplies r on each token, [B, T]: A, and on imitated tokens the method's weight.

    n is the number of imitated tokens in the update, of which this may be a micro-batch.
    """
    p = logp.exp()  # pi of the token
    lengths = imitated.sum(1, keepdim=True).clamp(min=1)  # [B, 1]
    mean_entropy = (entropy * imitated).sum(1, keepdim=True) / lengths  # of each demonstration, [B, 1]
    shaped = advantage * 0.1 * p / (p + 0.1) ** 2  # A f'(p) p
    sft = args.sft_coef / n / inv_z  # an SFT loss is a mean over the n tokens: this undoes 1/Z
    weight = {
        "luffy": shaped,
        "sft": sft,
        "chord": sft * p * (1 - p),  # little for what is certain or out of reach
        "srft": shaped + sft * 0.5 * (-mean_entropy).exp(),  # SRFT's 0.5 e^-H
    }[args.demo_weight]
    return torch.where(imitated == 1, weight, advantage)


def hpt_gate(advantage, prefix, correct, args):
    """Returns A with zeros where a token is left out, and a mask of the imitated tokens; [N, T] each.

    HPT imitates the demonstration of a question, or reinforces all that is not demonstrated. It
    imitates where the on-policy accuracy is at most the gate; correct is [Q, G], 1 or 0.
    """
    accuracy = correct[:, args.hybrids :].mean(1)  # y* does not count
    has_demonstration = prefix.view(len(correct), -1).any(1)  # [Q]
    imitates = (accuracy <= args.hpt_gate) & has_demonstration
    imitates = imitates.repeat_interleave(args.group_size)[:, None]  # [N, 1]
    kept = torch.where(prefix == 1, imitates, ~imitates)
    return advantage * kept, prefix * imitates


def inverse_z(response_mask, how, budget):
    """1/Z for each row of an optimizer step, [B, 1]: the same on all ranks and micro-batches."""
    lengths = response_mask.sum(1, keepdim=True).float()  # |y_i|, [B, 1]
    sequences = len(lengths)
    if how == "sequence":  # GRPO: the mean over sequences of the mean over tokens
        z = sequences * lengths
    elif how == "token":  # DAPO: every token of the batch weighs the same
        z = lengths.sum()
    else:  # Dr. GRPO: a constant, so a token's weight does not depend on any length
        z = sequences * budget
    return torch.ones_like(lengths) / z  # [B, 1] in all three cases


def policy_loss(logp, old_logp, ref_logp, advantage, response_mask, inv_z, args):
    """DeepSeekMath eq. 3; all [B, T], 1/Z may be [B, 1]. Ratio and k3 are returned for the log."""
    ratio = (logp - old_logp).exp()  # r: 1 at the first update, but its gradient is not 0
    if args.ratio == "sequence":  # GSPO: the geometric mean of a response's ratios, [B, 1]
        log_ratio = ((logp - old_logp) * response_mask).sum(1, keepdim=True)
        mean = (log_ratio / response_mask.sum(1, keepdim=True)).exp()
        ratio = mean.detach() * (logp - logp.detach()).exp()  # a factor of 1 with a gradient
    clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    # min: nothing is gained by moving the ratio out of the trust region
    surrogate = torch.min(ratio * advantage, clipped * advantage)
    if args.clip == "cispo":  # the weight is clipped, but no token loses its gradient
        surrogate = clipped.detach() * advantage * logp
    # >= 0, and an unbiased estimate of KL(pi || pi_ref) on on-policy samples
    k3 = (ref_logp - logp).exp() - (ref_logp - logp) - 1
    loss = -((surrogate - args.kl_coef * k3) * response_mask * inv_z).sum()
    return loss, ratio.detach(), k3.detach()


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
    train, test = data.load_splits(args)
    torch.manual_seed(args.seed)
    out, state, model, tokenizer = runs.open_run(args)
    reference = None
    if args.kl_coef:
        reference, _ = models.load_model(args.model)  # pi_ref, frozen
    order = data.shuffled_batches(len(train), args.steps, args.batch_size)  # of row numbers
    demonstrated = torch.rand(len(train)) < args.demo_fraction  # [rows]
    train = train.add_column("demonstrated", demonstrated.tolist())
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
    size = args.batch_size * args.group_size  # completions per step, N
    updates = args.epochs_per_batch * args.minibatches  # optimizer steps per step
    print(f"one step: {args.batch_size} x {args.group_size} completions, {updates} updates")

    for step in runs.steps(state, args.steps):
        began = time.time()
        torch.manual_seed(args.seed * 10**6 + step)  # a resumed run repeats its draws
        lr = runs.learning_rate(step, args)  # warm-up, then --schedule
        optimizer.param_groups[0]["lr"] = lr

        # sample and verify
        replaced = []  # completions of zero-variance groups
        with autocast:
            groups = rollout(model, tokenizer, train.select(order[step - 1]), step, args)
            for _ in range(args.dynamic_sampling):
                zero_variance = zero_variance_groups(groups)
                others = train.select(torch.randint(len(train), (len(zero_variance),)))
                for g, group in zip(zero_variance, rollout(model, tokenizer, others, step, args)):
                    replaced += groups[g]
                    groups[g] = group
        batch = [completion for group in groups for completion in group]
        prompts = [c["prompt"] for c in batch]
        responses = [c["response"] for c in batch]
        tokens, mask = tok.join(prompts, responses, model.device)  # [N, T]
        rewards = torch.tensor([c["reward"] for c in batch], device=model.device)
        rewards = rewards.view(-1, args.group_size)  # [Q, G]
        advantage = advantages(rewards, args.advantage)
        advantage = advantage.view(-1, 1) * mask  # A_i on each token, [N, T]
        sampled_logp = tok.align([c["sampled_logp"] for c in batch], mask.cpu())  # [N, T]
        sampled_logp = sampled_logp.to(model.device)
        prefix_len = torch.tensor([[c["prefix_len"]] for c in batch], device=model.device)
        prefix = mask * (mask.cumsum(1) <= prefix_len)  # 1 on demonstration tokens, [N, T]
        sampling_ended = time.time()

        # train
        minibatches = []
        for _ in range(args.epochs_per_batch):
            minibatches += torch.randperm(size).tensor_split(args.minibatches)
        old_logp = ref_logp = torch.zeros_like(advantage)  # if they are not needed
        with autocast:
            if updates > 1:
                old_logp, _ = score(model, tokens, mask, args)
            if reference:
                ref_logp, _ = score(reference, tokens, mask, args)
        imitated = prefix
        if args.hpt_gate >= 0:
            correct = torch.tensor([c["correct"] for c in batch], device=model.device)
            correct = correct.view(rewards.shape)  # the rewards without overlong penalties
            advantage, imitated = hpt_gate(advantage, prefix, correct, args)
        has_gradient = (advantage != 0).any(1, keepdim=True) | bool(args.kl_coef)  # [N, 1]
        if args.demo_weight != "luffy":  # an SFT loss needs no advantage
            has_gradient |= imitated.any(1, keepdim=True)
        useful = mask * has_gradient  # the others are skipped, but Z counts them
        inv_z = torch.zeros(mask.shape, device=model.device)  # 1/Z beside each A, [N, T]
        losses, norms, stats = [], [], []
        for minibatch in minibatches:
            inv_z[minibatch] = inverse_z(mask[minibatch], args.loss_norm, args.max_new_tokens)
            n = imitated[minibatch].sum().clamp(min=1)
            rows = minibatch.tolist()
            for micro in tok.micro_batches(useful, args.micro_batch_tokens, ranks.shard(), rows):
                y = tokens[micro]  # [B, width]
                m = mask[micro]
                with autocast:
                    logp, entropy = logprobs(model, y, m, args.temperature)
                # with a single update pi_old is pi, so r = 1; without a reference k3 = 0
                old = old_logp[micro] if updates > 1 else logp.detach()
                ref = ref_logp[micro] if reference else logp.detach()
                A, inv = advantage[micro], inv_z[micro]  # inv: 1/Z
                now = logp.detach()
                A = demonstration_weight(A, now, entropy.detach(), imitated[micro], inv, n, args)
                old = torch.where(prefix[micro] == 1, now, old)  # r = 1 on y*: A holds its weight
                gap = old - sampled_logp[micro]  # log(pi_old / pi_sampler), 0 but for rounding
                gap = gap * (1 - prefix[micro])  # nobody sampled the prefix
                if args.tis_cap:  # truncated importance weights
                    A = A * gap.exp().clamp(max=args.tis_cap)
                loss, ratio, k3 = policy_loss(logp, old, ref, A, m, inv, args)
                loss.backward()
                losses.append(loss.item() / updates)  # their sum is the mean over updates
                per_token = torch.stack([entropy.detach(), k3, ratio, gap.abs()])
                stats.append(per_token[:, m.bool()].cpu())  # [4, tokens]
            norm = ranks.clip_gradient(model, args.max_grad_norm)  # summed, as Z is global
            if runs.finite(norm, state):  # else the update is skipped
                optimizer.step()
            optimizer.zero_grad()
            norms.append(norm)
        losses, stats = ranks.gather(losses), ranks.gather(stats)
        tokens_trained = sum(x.shape[1] for x in stats)

        # log, evaluate, save
        nothing = torch.tensor([[0.0], [0.0], [1.0], [0.0]])  # no row had a gradient
        entropy, k3, ratio, gap = torch.cat(stats or [nothing], 1)
        clipped = (ratio < 1 - args.clip_low) | (ratio > 1 + args.clip_high)
        equal_rewards = (rewards == rewards[:, :1]).all(1)  # [Q]
        metrics = {
            "step": step,
            "reward": rewards.mean(),
            "loss": sum(losses),
            "entropy": entropy.mean(),
            "grad_norm": sum(norms) / updates,
            "response_len": mask.sum() / size,
            "clip_frac": clipped.float().mean(),
            "zero_variance_frac": equal_rewards.float().mean(),
            "adv_abs": advantage.abs().sum() / mask.sum(),
            "ratio_max": (ratio - 1).abs().max(),
            "truncated_frac": sum(c["truncated"] for c in batch) / size,
            "lr": lr,
            "skipped": state["skipped"],
            "kl": k3.mean(),
            "tokens_trained": tokens_trained,
            "tokens_generated": sum(len(c["response"]) - c["prefix_len"] for c in batch + replaced),
            "seconds_sample": sampling_ended - began,
            "seconds_train": time.time() - sampling_ended,
            "sampler_gap": gap.mean(),
            "reward_hybrid": rewards[:, : args.hybrids].mean(),  # the first --hybrids of each group
            "prefix_frac": prefix.sum() / mask.sum(),
        }
        if step == args.steps or (args.eval_every and step % args.eval_every == 0):
            with autocast:
                metrics |= evaluate(model, tokenizer, test, args)
        runs.log(out, metrics, batch[:2])
        if runs.due(state, args.save_every):
            runs.save_model(out / f"checkpoint-{step:06}", model, tokenizer, optimizer, state)
    runs.save_model(out / "final", model, tokenizer)
    runs.finish(out, args)


if __name__ == "__main__":
    main(parse_args())
