"""RLHF: preferences, a reward model fitted to them, and PPO against it, for tasks that have no verifier.

Ziegler et al., arXiv 1909.08593; Stiennon et al., 2009.01325; Ouyang et al., InstructGPT, 2203.02155; PPO:
Schulman et al., 1707.06347; details: Huang et al., 2403.17031. Three steps, each with its file or folder:

    1 preferences.jsonl   two answers of the start model, and which of them an annotator prefers, y_w > y_l
    2 reward_model/       L = - mean log sigmoid( R(y_w) - R(y_l) ), R read at the last response token
    3 final/              PPO on r_t = - beta log(pi_old / pi_ref)_t, plus R at the last token; a critic V:
                          delta_t = r_t + V_t+1 - V_t        A_t = delta_t + lambda A_t+1

In the one equation, grad L = - 1/Z sum mask weight grad log pi; against grpo.py:
    data    the policy's own completions, G for each question
    weight  I_clip r A, with an advantage for each token: of the critic, not of a group; whitened
    mask    the response, EOS included
    Z       all tokens of the optimizer batch
The critic starts as the reward model and is fitted to the returns A + V. No verdict reaches the policy:
only the simulated annotator knows right answers; the log has its `utility`, which the score stands for.

    python rlhf_ppo.py                                   # tiny world, 2 cores, minutes: utility 1.5 -> 2.2
    python rlhf_ppo.py --annotator human --stop-after preferences        # you choose; --resume goes on
    python rlhf_ppo.py --reward-model runs/rlhf_ppo/reward_model --output-dir runs/ppo       # step 3 alone
"""

import argparse
import time
from math import cos, pi

import torch
import torch.nn.functional as F

import common.tokenization as tok
from common.logprob import token_logprobs
from common.verifier import check_gold, evaluation, extract_answer, math_reward


# ---- arguments -------------------------------------------------------------------------------------------
def parse_args(argv=None):
    add = (parser := argparse.ArgumentParser(description=__doc__.splitlines()[0])).add_argument
    # run
    add("--output-dir", default="runs/rlhf_ppo", help="metrics, samples, checkpoints, final model")
    add("--seed", type=int, default=0, help="every draw of step s comes from (seed, s)")
    add("--steps", type=int, default=100, help="batches to train on; 0 trains nothing")
    add("--save-every", type=int, default=50, help="steps between checkpoints; 0: none while training")
    add("--resume", action="store_true", help="continue from the newest checkpoint in --output-dir")
    # model
    add("--model", default="tiny/model", help="hub name or folder")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="of activations; weights stay fp32")
    add("--gradient-checkpointing", action="store_true", help="recompute activations in the backward pass")
    # data
    add("--data", default="tiny/data", help="hub name, folder, or .jsonl, .json, .csv, .parquet file")
    add("--split", default="train", help="rows to train on")
    add("--eval-data", help="where the held-out rows are, if not in --data")
    add("--eval-split", help="held-out rows; default: test, or else a tenth of --split, kept apart")
    add("--question-key", default="question", help="column of the question")
    add("--answer-key", default="answer", help="column of the gold; if absent, the solution's answer")
    add("--solution-key", default="solution", help="column of the demonstration")
    add("--prompt-template", default="{question}", help="what is said to the model")
    # optimisation
    add("--lr", type=float, default=2e-4, help="AdamW's, before warm-up and decay")
    add("--schedule", choices=["constant", "linear", "cosine"], default="linear", help="over all steps")
    add("--warmup-steps", type=int, default=5, help="steps from 0 to the peak learning rate")
    add("--max-grad-norm", type=float, default=1.0, help="longer gradients are scaled down to this norm")
    add("--batch-size", type=int, default=32, help="questions per step")
    add("--micro-batch-tokens", type=int, default=1024, help="padded tokens per backward pass")
    # sampling
    add("--temperature", type=float, default=1.0, help="divides the logits, in sampling and in scoring")
    add("--max-new-tokens", type=int, default=100, help="budget of a response")
    add("--sample-rows", type=int, default=512, help="responses sampled at once")
    # evaluation
    add("--eval-every", type=int, default=0, help="steps between evaluations; 0: at start and end only")
    add("--eval-questions", type=int, default=300, help="held-out questions to use")
    add("--eval-samples", type=int, default=4, help="samples per question for pass@k")
    # the method
    add("--group-size", type=int, default=2, help="G, completions per question")
    add("--advantage", choices=["grpo", "dr_grpo"], default="grpo", help="with or without 1 / std(R)")
    add("--loss-norm", choices=["sequence", "token", "constant"], default="token", help="Z")
    add("--clip-low", type=float, default=0.2, help="eps_low")
    add("--clip-high", type=float, default=0.2, help="eps_high; DAPO's clip-higher is 0.28")
    add("--kl-coef", type=float, default=0.2, help="beta of log pi / pi_ref in the reward of each token")
    add("--epochs-per-batch", type=int, default=2, help="passes over the completions of a step")
    add("--minibatches", type=int, default=1, help="optimizer steps per pass")
    add("--stop-after", choices=["preferences", "reward", "ppo"], default="ppo", help="--resume continues")
    add("--preferences", help="data set with prompt, chosen, rejected; default: own answers are ranked")
    add("--annotator", choices=["simulated", "human"], default="simulated", help="who ranks own answers")
    add("--preference-questions", type=int, default=3000, help="training questions to ask about")
    add("--slope", type=float, default=2.0, help="of the simulated annotator: at 0 it tosses a coin")
    add("--reward-model", help="folder or hub name of one that exists: step 3 alone")
    add("--reward-lr", type=float, default=3e-4, help="peak learning rate of the reward model, linear to 0")
    add("--reward-epochs", type=int, default=2, help="passes over the pairs")
    add("--no-eos-score", type=float, default=-2.0, help="reward of a response that the budget cut")
    add("--value-clip", type=float, default=0.2, help="how far V may move in a step")
    add("--lam", type=float, default=0.95, help="lambda of GAE: 0 trusts the critic, 1 the rewards")
    add("--kl-target", type=float, default=0.0, help="nats per response to steer beta to; 0: beta is fixed")
    return parser.parse_args(argv)


# ---- sampling --------------------------------------------------------------------------------------------
@torch.no_grad()
def sample(model, tokenizer, prompts, temperature, args, spent=None):
    """Complete each prompt: lists of response ids, EOS last unless the budget cut it, and their log-probs."""
    stops = torch.tensor(tok.stop_ids(tokenizer, model.config), device=model.device)
    ids = torch.full((len(prompts), args.max_new_tokens), -1)  # [N, budget], -1: not sampled
    logps, dice = torch.zeros(len(prompts), args.max_new_tokens), tok.dice(model.device)
    room = args.max_new_tokens - torch.tensor(spent or [0] * len(prompts))  # spent: response in the prompt
    order = sorted((room > 0).nonzero()[:, 0].tolist(), key=lambda i: len(prompts[i]))  # shortest first
    for rows in tok.share(order, args.sample_rows, list(map(len, prompts))):
        distinct = list(dict.fromkeys(tuple(prompts[i]) for i in rows))  # a group's prompt is prefilled once
        copies = [distinct.index(tuple(prompts[i])) for i in rows]
        token, mask = tok.pad(distinct, side="left", device=model.device)  # [distinct, P]
        position = (mask.cumsum(1) - 1).clamp(min=0)  # counts real tokens only: padding shifts nothing
        cache = tok.Cache(config=model.config)
        for t in range(args.max_new_tokens):
            inputs = dict(attention_mask=mask, position_ids=position, past_key_values=cache, logits_to_keep=1)
            logits = model(token, **inputs).logits[:, -1].float()  # [rows, V]; fp32 before the softmax
            if t == 0:  # from a row per distinct prompt to a row per response, all of them alive
                cache.batch_select_indices(keep := torch.tensor(copies, device=model.device))
                logits, mask, position, alive = logits[keep], mask[keep], position[keep, -1:], keep >= 0
            logp = (logits / (temperature or 1.0)).log_softmax(-1)  # no top-p: exactly what `logprobs` scores
            token = logp.exp().multinomial(1, generator=dice) if temperature else logp.argmax(-1, True)
            ids[rows, t], logps[rows, t] = token[:, 0].cpu(), logp.gather(1, token)[:, 0].cpu()
            alive = alive & ~torch.isin(token[:, 0], stops) & (room[rows] > t + 1).to(model.device)
            if not (left := alive.sum().item()):
                break
            if left < 0.8 * len(rows):  # finished rows leave, some at a time: each leave copies the cache
                cache.batch_select_indices(keep := alive.nonzero()[:, 0])
                rows, token, mask, position = rows[keep.cpu()], token[keep], mask[keep], position[keep]
                alive = alive[keep]
            mask, position = F.pad(mask, (0, 1), value=1), position + alive[:, None]  # finished rows stay
    ids, logps, stops = tok.reduce(ids, "MAX"), tok.reduce(logps), stops.tolist()  # every rank has all
    ids = [tok.cut(x[x >= 0].tolist(), stops, n) for x, n in zip(ids, room.tolist())]
    return ids, [lp[: len(x)].tolist() for x, lp in zip(ids, logps)]


def preferences(model, tokenizer, rows, out, args):
    """Step 1: pairs of --preferences, or of own answers as the annotator ranks them; by question."""
    if args.preferences:
        return tok.load_pairs(args.preferences, args.split, "--preferences")
    torch.manual_seed(args.seed)  # resumed, the same answers and the same noise
    rows, path = rows.select(range(min(args.preference_questions, len(rows)))), out / "preferences.jsonl"
    done = 1 + max([pair["row"] for pair in tok.read_jsonl(path)], default=-1)
    groups, person = rollout(model, tokenizer, rows, args), args.annotator == "human"
    noise = -(-torch.rand(len(groups), args.group_size).log()).log()  # Gumbel: to rank by utility + noise
    for row, (group, luck) in [*enumerate(zip(groups, noise.tolist()))][done:]:  # is Bradley-Terry in pairs
        said = {c["text"]: c | {"luck": x} for c, x in zip(group, luck) if not c["cut"]}.values()  # distinct
        best = sorted(said, key=lambda c: -args.slope * c["utility"] - c["luck"])
        tok.append_pairs(path, row, tok.ask([*said]) if person else best, ties=person)  # K (K - 1) / 2
    return tok.load_pairs(str(path), "train", "--annotator")


# ---- log-probabilities -----------------------------------------------------------------------------------
def logprobs(model, tokens, response_mask, temperature):
    """log pi(y_t | x, y_<t), entropy of pi(. | x, y_<t) on each response token, 0 elsewhere; all [B, T]."""
    # no attention mask: the padding is on the right, where causal attention never looks
    hidden = model.base_model(tokens, use_cache=False).last_hidden_state[:, :-1]  # position t-1 predicts y_t
    targets = tokens[:, 1:].masked_fill(response_mask[:, 1:] == 0, -100)  # prompt and padding cost nothing
    logp, entropy = token_logprobs(hidden, model.get_output_embeddings().weight, targets, temperature)
    return F.pad(logp, (1, 0)), F.pad(entropy, (1, 0))  # back on the grid of the tokens


@torch.no_grad()
def score(model, tokens, response_mask, args):
    """`logprobs` of a whole batch [N, T], micro-batch by micro-batch and without gradient."""
    both = torch.zeros(2, *tokens.shape, dtype=model.dtype, device=model.device)  # logp, entropy
    for rows, width in tok.split_by_tokens(response_mask, range(len(tokens)), args.micro_batch_tokens):
        micro = tokens[rows, :width], response_mask[rows, :width]
        both[:, rows, :width] = torch.stack(logprobs(model, *micro, args.temperature))
    return tok.reduce(both)


def values(scorer, tokens):
    """The scalar at each position, [B, T]: of all that is read up to and with that token."""
    # padding is on the right and no position is searched for: no attention mask, no pooling
    return tok.read_scores(scorer, scorer.base_model(tokens, use_cache=False).last_hidden_state)


@torch.no_grad()
def all_values(scorer, tokens, response_mask, args):
    """`values` of a whole batch [N, T], micro-batch by micro-batch and without gradient."""
    value = torch.zeros(tokens.shape, device=tokens.device)
    for rows, width in tok.split_by_tokens(response_mask, range(len(tokens)), args.micro_batch_tokens):
        value[rows, :width] = values(scorer, tokens[rows, :width])
    return tok.reduce(value)  # every rank has scored some rows


# ---- the method ------------------------------------------------------------------------------------------
def utility(tokenizer, text, gold):
    """What the simulated annotator likes (tiny/preferences/README.md): right, with working, boxed, short."""
    working = "".join(c if c.isdecimal() else " " for c in text.split("\\boxed")[0]).split()  # numbers
    extra = max(0, len(tokenizer.encode(text, add_special_tokens=False)) - 48)  # tokens
    return 2 * math_reward([text], [gold])[0] + (len(working) > 1) + ("\\boxed" in text) / 2 - extra / 50


def rollout(model, tokenizer, rows, args):
    """G completions of each question: a list of groups."""
    rows, stops = [row for row in rows for _ in range(args.group_size)], tok.stop_ids(tokenizer, model.config)
    questions, golds = [row[args.question_key] for row in rows], [row["gold"] for row in rows]
    prompts = tok.encode_prompts(tokenizer, questions, args.prompt_template)
    responses, _ = sample(model, tokenizer, prompts, args.temperature, args)
    texts = tok.decode_responses(tokenizer, responses)
    rewards = [utility(tokenizer, *said) for said in zip(texts, golds)]  # hidden: for annotator and log only
    done = {"prompt": prompts, "response": responses, "question": questions, "text": texts, "gold": golds}
    done |= {"utility": rewards, "cut": [ids[-1] not in stops for ids in responses]}  # cut: there is no EOS
    done = [dict(zip(done, values)) for values in zip(*done.values())]  # a dict per completion
    return [done[i : i + args.group_size] for i in range(0, len(done), args.group_size)]


def advantages(rewards, how):
    """A_i of every completion from the rewards of its group, [Q, G]. All right or all wrong gives A = 0."""
    centred = rewards - rewards.mean(1, keepdim=True)  # (G - 1) / G of the leave-one-out advantage
    return centred / (rewards.std(1, keepdim=True) + 1e-6) if how == "grpo" else centred  # std: n - 1


def inverse_z(response_mask, how, budget):
    """1/Z of each row of an optimizer batch, [B, 1]; a micro-batch takes its rows: GRPO, DAPO, Dr. GRPO."""
    lengths = response_mask.sum(1, keepdim=True).float()  # |y_i|
    z = {"sequence": len(lengths) * lengths, "token": lengths.sum(), "constant": len(lengths) * budget}[how]
    return 1 / (z + 0 * lengths)


def policy_loss(logp, old_logp, ref_logp, advantage, response_mask, inv_z, args):
    """DeepSeekMath eq. 3; everything [B, T], but 1/Z may be [B, 1]. Ratio and k3 are returned for the log."""
    ratio = (logp - old_logp).exp()  # r_t: exactly 1 at the first update, and its gradient is still there
    trusted = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)  # clip(r)
    surrogate = torch.min(ratio * advantage, trusted * advantage)  # min: leaving the region gains nothing
    k3 = (ref_logp - logp).exp() - (ref_logp - logp) - 1  # >= 0, unbiased for KL(pi | pi_ref) on own samples
    return -((surrogate - args.kl_coef * k3) * response_mask * inv_z).sum(), ratio.detach(), k3.detach()


def pair_loss(scores, z):
    """- 1/Z sum log sigmoid( R(y_w) - R(y_l) ), scores [B, 2]: Bradley and Terry's likelihood of a choice."""
    return -F.logsigmoid(scores[:, 0] - scores[:, 1]).sum() / z


def fit_reward_model(model, tokenizer, groups, test, out, args):
    """Step 2: the start model with a scalar head, fitted to the pairs of 9 questions in 10."""
    torch.manual_seed(args.seed)
    reward_model = tok.load_scorer(args.model, tokenizer, args, new_head=True)
    held_out, train = sum(groups[::10], []), [group for i, group in enumerate(groups) if i % 10]
    optimizer = tok.adamw(reward_model.parameters(), lr=args.reward_lr, weight_decay=0.0)
    order = sum([torch.randperm(len(train)).split(args.batch_size) for _ in range(args.reward_epochs)], ())
    for i in tok.steps(state := {"step": 0, "faults": 0, "stop": 0, "skipped": 0}, len(order)):
        optimizer.param_groups[0]["lr"] = args.reward_lr * (1 - (i - 1) / len(order))
        pairs = sum([train[question] for question in order[i - 1]], [])  # of a question: all in one batch
        tokens, mask = tok.join_pairs(tokenizer, pairs, args.prompt_template, model.device)  # [P, 2, T]
        for some, width in tok.split_by_tokens(mask.amax(1), range(len(pairs)), args.micro_batch_tokens // 2):
            y, m = (x[some, :, :width].flatten(0, 1) for x in (tokens, mask))  # whole pairs, [2B, T]
            pair_loss(tok.at_end(values(reward_model, y), m).view(-1, 2), len(pairs)).backward()
        norm = torch.nn.utils.clip_grad_norm_(tok.reduce_gradients(reward_model.parameters()), torch.inf)
        if tok.finite(norm, state):
            optimizer.step()
        torch.clear_autocast_cache()  # the bf16 copies of weights that are no more
        optimizer.zero_grad()
    y, m = (x.flatten(0, 1) for x in tok.join_pairs(tokenizer, held_out, args.prompt_template, model.device))
    scores = tok.at_end(all_values(reward_model, y, m, args), m).view(-1, 2)
    metrics = {"step": 0} | tok.agreement(scores, held_out, args.slope)
    metrics |= evaluate_reward(model, model, reward_model, tokenizer, test, args)
    tok.head(reward_model).bias.data -= metrics["eval_score"]  # the start model's mean is 0
    tok.log(out, metrics)
    tok.save_model(out / "reward_model", reward_model, tokenizer)


def gae(rewards, value, response_mask, lam):
    """Advantages A_t and returns A_t + V_t from the rewards and values of tokens; everything [N, T]."""
    advantage, later, after = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):  # gamma is 1: a response is worth what it is at its end
        # delta_t + lambda A_t+1; after the last token there is nothing
        later = advantage[:, t] = (rewards[:, t] + after - value[:, t] + lam * later) * response_mask[:, t]
        after = value[:, t] * response_mask[:, t]
    return advantage, advantage + value


def value_loss(value, old_value, returns, response_mask, inv_z, clip):
    """Half the squared error to the returns, of V or of V held near its old value, whichever is larger."""
    near = old_value + (value - old_value).clamp(-clip, clip)  # for V what clip(r) is for pi
    return 0.5 * (torch.max((value - returns) ** 2, (near - returns) ** 2) * response_mask * inv_z).sum()


# ---- evaluation ------------------------------------------------------------------------------------------
def evaluate(model, tokenizer, rows, args):
    """Held-out greedy accuracy and pass@k, overall and for each level where the rows have one."""
    torch.manual_seed(args.seed)  # the same draws at every evaluation
    prompts = tok.encode_prompts(tokenizer, rows[args.question_key], args.prompt_template)
    texts, golds = [], list(rows["gold"]) * (1 + args.eval_samples)
    for temperature, copies in ((0.0, 1), (1.0, args.eval_samples)):  # greedy hides reliability
        responses, _ = sample(model, tokenizer, prompts * copies, temperature, args)
        texts += tok.decode_responses(tokenizer, responses)
    levels = rows["level"] if "level" in rows.column_names else [None] * len(rows)
    return evaluation(texts, math_reward(texts, golds), levels)


def evaluate_reward(model, reference, reward_model, tokenizer, rows, args):
    """On held-out questions: the score, what it stands for, and how far the policy has gone for it."""
    torch.manual_seed(args.seed)  # the same draws at every evaluation
    batch = sum(rollout(model, tokenizer, rows, args), [])
    tokens, mask = tok.join([c["prompt"] for c in batch], [c["response"] for c in batch], model.device)
    logp, ref_logp = (score(m, tokens, mask, args)[0] for m in (model, reference))  # [N, T]
    scores = tok.at_end(all_values(reward_model, tokens, mask, args), mask)  # [N]
    kl, worth = (logp - ref_logp).sum() / len(batch), sum(c["utility"] for c in batch) / len(batch)
    return {"eval_score": scores.mean(), "eval_utility": worth, "eval_kl": kl}


def self_check(model, tokenizer, rows, args):
    """Sampling and scoring must be one distribution: ratio 1 on fresh samples, before training."""
    prompts = tok.encode_prompts(tokenizer, rows[args.question_key][:8], args.prompt_template)
    responses, sampled_logp = sample(model, tokenizer, prompts, args.temperature, args)
    tokens, mask = tok.join(prompts, responses, model.device)
    ratio = (score(model, tokens, mask, args)[0].cpu() - tok.align(sampled_logp, mask.cpu())).exp()
    gap, limit = (ratio - 1).abs(), 1e-4 if args.dtype == "fp32" else 0.1  # bf16 has 3 digits
    print(f"self-check: max |ratio - 1| = {gap.max():.0e} on {mask.sum()} sampled tokens; [trained] in one:")
    print(f"  {tokenizer.decode(prompts[0])}[{tokenizer.decode(responses[0])}]")
    # the mean: of many thousand tokens one may be far off by rounding alone
    tok.demand(gap.sum() < limit * mask.sum().cpu(), f"--model {args.model}: cannot be scored as it samples.")


# ---- training --------------------------------------------------------------------------------------------
def main(args):
    train, test = tok.load_splits(args, extract_answer, check_gold, no_gold=args.annotator == "human")
    torch.manual_seed(args.seed)
    out, state, model, tokenizer = tok.open_run(args)
    reference = tok.load_model(args.model)[0]  # pi_ref, frozen
    epochs = args.steps * args.batch_size // len(train) + 1  # each a fresh permutation of the rows
    order = torch.cat([torch.randperm(len(train)) for _ in range(epochs)]).split(args.batch_size)
    critic = tok.load_scorer(args.reward_model or args.model, tokenizer, args, new_head=True)
    both = [*model.parameters(), *critic.parameters()]  # two networks, one AdamW
    optimizer = tok.adamw(both, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)  # fp32 state
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=args.dtype == "bf16")  # not weights
    if args.resume:
        optimizer.load_state_dict(state.pop("optimizer"))
    else:
        with autocast:
            self_check(model, tokenizer, test, args)
            metrics = {"step": 0, "unparseable_gold": args.unparseable_gold}
            tok.log(out, metrics | evaluate(model, tokenizer, test, args))
        tok.save_model(out / f"checkpoint-{0:06}", model, tokenizer, optimizer, state)  # --resume goes on
    if not args.reward_model and "fitted" not in state:
        with autocast:
            groups = preferences(model, tokenizer, train, out, args)
            if args.stop_after != "preferences":
                fit_reward_model(model, tokenizer, groups, test, out, args)
                state["fitted"] = True
        tok.save_model(out / f"checkpoint-{0:06}", model, tokenizer, optimizer, state)  # with its log
    if args.stop_after != "ppo":
        return
    reward_model = tok.load_scorer(args.reward_model or out / "reward_model", tokenizer, args)
    critic.load_state_dict(state.get("critic", reward_model.state_dict()))  # its first values are scores
    state |= {"critic": critic.state_dict(), "kl_coef": state.get("kl_coef", args.kl_coef)}
    loss_args = argparse.Namespace(**vars(args) | {"kl_coef": 0.0})  # for PPO, KL is in the reward
    size, updates = args.batch_size * args.group_size, args.epochs_per_batch * args.minibatches
    print(f"a step: {args.batch_size} questions x {args.group_size} completions, {updates} updates")

    for step in tok.steps(state, args.steps):
        began = time.time()
        torch.manual_seed(args.seed * 10**6 + step)  # all draws of this step: a resumed run repeats them
        progress = (step - 1) / args.steps  # the learning rate depends on the step alone, too
        decay = {"constant": 1, "linear": 1 - progress, "cosine": (1 + cos(pi * progress)) / 2}[args.schedule]
        lr = optimizer.param_groups[0]["lr"] = args.lr * min(1, step / max(1, args.warmup_steps)) * decay

        # sample and score
        with autocast:
            groups = rollout(model, tokenizer, train.select(order[step - 1]), args)
        batch = [completion for group in groups for completion in group]  # N = questions x G
        tokens, mask = tok.join([c["prompt"] for c in batch], [c["response"] for c in batch], model.device)
        with autocast:
            old_logp, ref_logp = (score(m, tokens, mask, args)[0] for m in (model, reference))  # [N, T]
            rewards = tok.at_end(all_values(reward_model, tokens, mask, args), mask)  # R(x, y), [N]
            old_value = tok.before(all_values(critic, tokens, mask, args), mask)  # V_t, [N, T]
        rewards[[c["cut"] for c in batch]] = args.no_eos_score
        batch = [c | {"reward": r} for c, r in zip(batch, rewards.tolist())]  # for samples.jsonl
        per_token = tok.put_at_end(rewards, mask) - state["kl_coef"] * (old_logp - ref_logp)  # r_t, [N, T]
        (advantage, returns), on = gae(per_token, old_value, mask, args.lam), mask.bool()
        advantage[on] = advantages(advantage[on].view(1, -1), args.advantage)[0]  # whitened over the batch
        sampled = time.time()

        # train
        passes = [torch.randperm(size).tensor_split(args.minibatches) for _ in range(args.epochs_per_batch)]
        inv_z = torch.zeros(tokens.shape, device=tokens.device)
        losses, norms, seen = [], [], []
        for minibatch in sum(passes, ()):
            inv_z[minibatch] = inverse_z(mask[minibatch], args.loss_norm, args.max_new_tokens)
            for rows, width in tok.split_by_tokens(mask, minibatch.tolist(), args.micro_batch_tokens):
                whole = (tokens, mask, advantage, old_logp, ref_logp, inv_z)
                y, m, A, old, ref, z = (x[rows, :width] for x in whole)  # micro-batch, [B, T]
                old_v, ret = (x[rows, :width] for x in (old_value, returns))
                with autocast:
                    logp, entropy = logprobs(model, y, m, args.temperature)
                    value = tok.before(values(critic, y), m)
                old = old if updates > 1 else logp.detach()  # a single update: pi_old is pi, and r = 1
                loss, ratio, k3 = policy_loss(logp, old, ref, A, m, z, loss_args)
                loss = loss + value_loss(value, old_v, ret, m, z, args.value_clip)
                loss.backward()
                losses.append(loss.item() / updates)  # the sum over micro-batches, the mean over updates
                seen.append(torch.stack([entropy.detach(), k3, ratio])[:, m.bool()].cpu())  # [3, tokens]
            error = torch.nn.utils.clip_grad_norm_(tok.reduce_gradients(critic.parameters()), torch.inf)
            parameters = tok.reduce_gradients(model.parameters())  # their sum over ranks: Z is of all
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item())
            if tok.finite(norms[-1] + error, state):  # the critic's is not clipped, but is finite, too
                optimizer.step()
            optimizer.zero_grad()
        losses, seen = tok.gather(losses), tok.gather(seen)

        # log, evaluate, save
        entropy, k3, ratio = torch.cat(seen, 1) if seen else torch.tensor([[0.0], [0.0], [1.0]])
        trusted = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
        error, kl = (returns - old_value)[on], (old_logp - ref_logp).sum().item() / size  # kl may be below 0
        metrics = {"step": step, "reward": rewards.mean(), "loss": sum(losses), "entropy": entropy.mean()}
        metrics |= {"grad_norm": sum(norms) / updates, "response_len": mask.sum() / size}
        metrics |= {"clip_frac": (ratio != trusted).float().mean(), "value_loss": error.square().mean() / 2}
        metrics |= {"adv_abs": advantage.abs().sum() / mask.sum(), "ratio_max": (ratio - 1).abs().max()}
        metrics |= {"truncated_frac": sum(c["cut"] for c in batch) / size, "lr": lr}
        metrics |= {"skipped": state["skipped"]}
        metrics |= {"kl": k3.mean(), "tokens_trained": sum(x.shape[1] for x in seen)}
        metrics |= {"tokens_generated": sum(len(c["response"]) for c in batch)}
        metrics |= {"seconds_sample": sampled - began, "seconds_train": time.time() - sampled}
        metrics |= {"utility": sum(c["utility"] for c in batch) / size, "kl_response": kl}
        metrics |= {"explained_variance": 1 - error.var() / returns[on].var(), "kl_coef": state["kl_coef"]}
        if args.kl_target:  # Ziegler et al.: a proportional controller
            state["kl_coef"] *= 1 + 0.1 * max(-0.2, min(0.2, kl / args.kl_target - 1))
        if step == args.steps or (args.eval_every and step % args.eval_every == 0):
            with autocast:
                metrics |= evaluate(model, tokenizer, test, args)
                metrics |= evaluate_reward(model, reference, reward_model, tokenizer, test, args)
        tok.log(out, metrics, batch[:2])
        if tok.due(state, args.save_every):
            tok.save_model(out / f"checkpoint-{step:06}", model, tokenizer, optimizer, state)
    tok.save_model(out / "final", model, tokenizer)


if __name__ == "__main__":
    main(parse_args())
