"""OPSD: on-policy samples, scored token by token by the same model with the solution in its prompt.

Zhao et al., Self-Distilled Reasoner: On-Policy Self-Distillation, arXiv 2601.18734; the policy
gradient is that of Lu et al., On-Policy Distillation (Thinking Machines Lab, 2025). The student
sees the question x alone and samples y. The teacher is the same language model, reads the
reference solution s beside x, and says how likely it finds each token of y:

    A_it = sg[ log pi_T(y_it | x, s, y_i<t) - log pi_old(y_it | x, y_i<t) ]
    L    = - 1/Z sum_i sum_t min( r_it A_it, clip(r_it, 1 - eps_low, 1 + eps_high) A_it )

With one update a step its gradient is, in expectation, that of KL(pi || pi_T) at each position of
the samples: a later token's divergence is not credited to an earlier one. No reward enters it, and
correct and incorrect samples are trained alike; the verifier only makes metrics. Against grpo.py:
    data    on-policy completions, one for each question; a solution s for the teacher to read
    weight  I_clip r A_t; the teacher pi_T is the initial policy, or the current one without gradient
    mask    the response, EOS included
    Z       sequences x own length (the paper's eq. 9)
The paper's main objective is another one: the divergence of whole distributions over the vocabulary.

    python opsd.py                     # tiny world, minutes on 2 CPU cores: pass@1 0.26 -> 0.46
    python opsd.py --model Qwen/Qwen3-1.7B --data DIR --dtype bf16 --lr 1e-6
    # set the lengths for your data, for example --max-new-tokens 1024
"""

import time

import torch
import torch.nn.functional as F

import common.tokenization as tok
from common.logprob import token_logprobs
from common.plumbing import data, decoding, draws, evaluation, flags, memory, models, ranks, runs
from common.verifier import math_reward

# a prompt format that the tiny model knows
HINT = "{question}\nReference solution: {solution}\nIn your own words:"


# ---- arguments -------------------------------------------------------------------------
def parse_args(argv=None):
    parser = flags.Parser(__doc__)
    add = parser.add_argument_group("run").add_argument
    add("--output-dir", default="runs/opsd", help="folder for logs, checkpoints and final/")
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
    add("--batch-size", type=flags.integer(1), default=32, help="questions per step")
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
    add("--group-size", type=flags.integer(1), default=1, help="completions per question, G")
    text = "sequence: mean of means; token: mean of tokens; constant: sum / responses / budget"
    add("--loss-norm", choices=["sequence", "token", "constant"], default="sequence", help=text)
    add("--clip-low", type=flags.number(0, 1), default=0.2, help="ratios are at least 1 - this")
    add("--clip-high", type=flags.number(0), default=0.2, help="ratios are at most 1 + this")
    add("--kl-coef", type=flags.number(0), default=0.0, help="KL penalty to --model; 0: none")
    add("--epochs-per-batch", type=flags.integer(1), default=1, help="passes over the samples")
    add("--minibatches", type=flags.integer(1), default=1, help="updates per pass over samples")
    text = "one ratio per token, or per response (GSPO, with --loss-norm sequence)"
    add("--ratio", choices=["token", "sequence"], default="token", help=text)
    text = "ppo: tokens beyond the clip get no gradient; cispo: the clipped ratio is a weight"
    add("--clip", choices=["ppo", "cispo"], default="ppo", help=text)
    text = "weight tokens by pi_old / pi_sampler, at most this, such as 2 (TIS); 0: off"
    add("--tis-cap", type=flags.number(0), default=0.0, help=text)
    add("--teacher", choices=["initial", "current"], default="initial", help="teacher weights")
    add("--hint-template", default=HINT, help="prompt that shows {solution} beside {question}")
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
def with_hints(model, tokenizer, rows, args):
    """The rows with a column `hinted`, what the teacher reads: the question and its solution, as ids."""
    questions, solutions = list(rows["question"]), list(rows["solution"])
    hints = [args.hint_template.replace("{solution}", y) for y in solutions]
    hints = [hint.replace("{question}", x) for hint, x in zip(hints, questions)]
    hinted = tok.encode_prompts(tokenizer, hints, args.prompt_template)
    # refuse before sampling, not after it
    models.demand_positions(model, max(map(len, hinted)) + args.max_new_tokens)
    return rows.add_column("hinted", hinted)


def rollout(model, tokenizer, rows, args):
    """G completions of each question with their verdicts: a list of groups."""
    rows = [row for row in rows for _ in range(args.group_size)]
    questions = [row["question"] for row in rows]
    golds = [row["gold"] for row in rows]
    prompts = tok.encode_prompts(tokenizer, questions, args.prompt_template)
    stops = tok.stop_ids(tokenizer, model.config)
    responses, logp = sample(model, tokenizer, prompts, args.temperature, args)
    texts = tok.decode_responses(tokenizer, responses)
    correct = math_reward(texts, golds)  # truncated responses are judged like all others

    completions = []
    for i in range(len(rows)):
        completion = {
            "prompt": prompts[i],
            "response": responses[i],
            "sampled_logp": logp[i],
            "question": questions[i],
            "text": texts[i],
            "gold": golds[i],
            "hinted": rows[i]["hinted"],
            "correct": correct[i],
            "truncated": responses[i][-1] not in stops,
        }
        completions.append(completion)
    starts = range(0, len(completions), args.group_size)
    return [completions[i : i + args.group_size] for i in starts]


def token_advantages(teacher_logp, hinted_mask, logp, response_mask):
    """A_t = log pi_T(y_t | x, s, y_<t) - log pi(y_t | x, y_<t), [N, T], where the student has y_t."""
    advantage = torch.zeros_like(logp)
    # the teacher's prompt is longer, so its scores of the same tokens are further to the right
    on_teacher, on_student = hinted_mask.bool(), response_mask.bool()
    advantage[on_student] = teacher_logp[on_teacher] - logp[on_student]
    return advantage


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
    train, test = data.load_splits(args, demonstrations=True)
    train = data.with_gold(train, args)  # for metrics only; rows without a gold answer are left out
    torch.manual_seed(args.seed)
    out, state, model, tokenizer = runs.open_run(args)
    reference = None
    if args.kl_coef or args.teacher == "initial":
        reference, _ = models.load_model(args.model)  # pi_ref, frozen
    teacher = reference if args.teacher == "initial" else model
    if args.steps:  # else nothing is trained
        train = with_hints(model, tokenizer, train, args)
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
    size = args.batch_size * args.group_size  # completions per step, N
    updates = args.epochs_per_batch * args.minibatches  # optimizer steps per step
    print(f"one step: {args.batch_size} x {args.group_size} completions, {updates} updates")

    for step in runs.steps(state, args.steps):
        began = time.time()
        torch.manual_seed(args.seed * 10**6 + step)  # a resumed run repeats its draws
        lr = runs.learning_rate(step, args)  # warm-up, then --schedule
        optimizer.param_groups[0]["lr"] = lr

        # sample, and let the teacher score
        with autocast:
            groups = rollout(model, tokenizer, train.select(order[step - 1]), args)
        batch = [completion for group in groups for completion in group]
        prompts = [c["prompt"] for c in batch]
        responses = [c["response"] for c in batch]
        tokens, mask = tok.join(prompts, responses, model.device)  # [N, T]
        rewards = torch.tensor([c["correct"] for c in batch], device=model.device)  # [N], for the log
        hinted = [c["hinted"] for c in batch]
        hinted_tokens, hinted_mask = tok.join(hinted, responses, model.device)  # [N, T + hint]
        with autocast:  # neither has a gradient
            teacher_logp, _ = score(teacher, hinted_tokens, hinted_mask, args)
            student_logp, _ = score(model, tokens, mask, args)  # [N, T]
        advantage = token_advantages(teacher_logp, hinted_mask, student_logp, mask)
        sampled_logp = tok.align([c["sampled_logp"] for c in batch], mask.cpu())  # [N, T]
        sampled_logp = sampled_logp.to(model.device)
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
        has_gradient = (advantage != 0).any(1, keepdim=True) | bool(args.kl_coef)  # [N, 1]
        useful = mask * has_gradient  # the others are skipped, but Z counts them
        inv_z = torch.zeros(mask.shape, device=model.device)  # 1/Z beside each A, [N, T]
        losses, norms, stats = [], [], []
        for minibatch in minibatches:
            inv_z[minibatch] = inverse_z(mask[minibatch], args.loss_norm, args.max_new_tokens)
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
                gap = old - sampled_logp[micro]  # log(pi_old / pi_sampler), 0 but for rounding
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
        correct = mask * rewards[:, None]  # [N, T]
        incorrect = mask - correct
        metrics = {
            "step": step,
            "reward": rewards.mean(),
            "loss": sum(losses),
            "entropy": entropy.mean(),
            "grad_norm": sum(norms) / updates,
            "response_len": mask.sum() / size,
            "clip_frac": clipped.float().mean(),
            "adv_abs": advantage.abs().sum() / mask.sum(),
            "ratio_max": (ratio - 1).abs().max(),
            "truncated_frac": sum(c["truncated"] for c in batch) / size,
            "lr": lr,
            "skipped": state["skipped"],
            "kl": k3.mean(),
            "tokens_trained": tokens_trained,
            "tokens_generated": sum(len(c["response"]) for c in batch),
            "seconds_sample": sampling_ended - began,
            "seconds_train": time.time() - sampling_ended,
            "sampler_gap": gap.mean(),
            "kl_teacher": -advantage.sum() / mask.sum(),
            "adv_correct": (advantage * correct).sum() / correct.sum(),
            "adv_incorrect": (advantage * incorrect).sum() / incorrect.sum(),
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
