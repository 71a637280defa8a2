"""Prefix-RFT: one rollout of each group starts inside a demonstration and the policy writes the rest.

Huang et al., Blending Supervised and Reinforcement Fine-Tuning with Prefix Sampling, arXiv 2507.01679.
The hybrid, y*_<L + own continuation, is judged like any rollout and shares its group's baseline: the policy
imitates a demonstration as far as that earns more reward than it gets alone. Against grpo.py:

    data    G - 1 own completions and one hybrid, L = int(l |y*|), l ~ U[low(s), high]; low decays by cosine
    weight  I_clip r A on both parts of the hybrid, old_logp of the prefix is the current policy's
    mask    of the batch's prefix tokens only the 20 % of highest entropy keep their A, the others get A = 0
    Z       unchanged: it counts the tokens whose A was zeroed too

Flags make the neighbours: --prefix-schedule none is grpo.py, bit by bit; --prefix-loss none is plain hinting;
--prefix-schedule full --prefix-loss all --prefix-weight luffy is LUFFY (2504.14945), with sft RL + SFT loss.

    python prefix_rft.py                                 # tiny world, 2 cores, minutes: pass@1 0.26 -> 0.94
    python prefix_rft.py --model Qwen/Qwen2.5-1.5B --data DIR --dtype bf16 --lr 1e-6 --max-new-tokens 4096
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
    add("--output-dir", default="runs/prefix_rft", help="metrics, samples, checkpoints, final model")
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
    add("--batch-size", type=int, default=16, help="questions per step")
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
    add("--group-size", type=int, default=8, help="G, completions per question")
    add("--advantage", choices=["grpo", "dr_grpo"], default="dr_grpo", help="with or without 1 / std(R)")
    add("--loss-norm", choices=["sequence", "token", "constant"], default="constant", help="Z")
    add("--clip-low", type=float, default=0.2, help="eps_low")
    add("--clip-high", type=float, default=0.2, help="eps_high; DAPO's clip-higher is 0.28")
    add("--kl-coef", type=float, default=0.0, help="beta of k3 to the start model; 0 loads no reference")
    add("--epochs-per-batch", type=int, default=1, help="passes over the completions of a step")
    add("--minibatches", type=int, default=1, help="optimizer steps per pass")
    add("--skip-dead-groups", type=int, default=0, help="DAPO: N rounds of resampling groups with A = 0")
    add("--overlong-tokens", type=int, default=0, help="DAPO: soft penalty on the budget's last N tokens")
    add("--prefix-schedule", choices=["cosine", "uniform", "full", "none"], default="cosine", help="of l")
    add("--prefix-decay-steps", type=int, default=100, help="steps in which the lower end of l falls")
    add("--prefix-loss", choices=["keep", "all", "none", "random", "bottom"], default="keep", help="of its A")
    add("--prefix-entropy-keep", type=float, default=0.2, help="share of the prefix tokens that keep it")
    add("--prefix-weight", choices=["ratio", "luffy", "sft"], default="ratio", help="r A, LUFFY's or SFT's")
    add("--demo-fraction", type=float, default=1.0, help="share of questions that have a demonstration")
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


# ---- the method ------------------------------------------------------------------------------------------
def draw_prefix(tokenizer, row, step, args):
    """y*_<L, the ids of a random beginning of the demonstration y*; empty where there is none."""
    if args.prefix_schedule == "none" or not row["demonstrated"] or not row[args.solution_key]:
        return []
    ids = tok.encode_response(tokenizer, row[args.solution_key])  # y*, EOS included
    progress = min(1, step / args.prefix_decay_steps) if args.prefix_schedule == "cosine" else 1
    low = 0.05 + 0.5 * (1 + cos(pi * progress)) * (0.95 - 0.05)  # only the lower end of l decays
    ratio = 1 if args.prefix_schedule == "full" else low + torch.rand(1).item() * (0.95 - low)  # l
    return ids[: int(ratio * len(ids))]


def rollout(model, tokenizer, rows, step, args):
    """G judged completions of each question, the first one a hybrid: a list of groups."""
    rows, stops = [row for row in rows for _ in range(args.group_size)], tok.stop_ids(tokenizer, model.config)
    questions, golds = [row[args.question_key] for row in rows], [row["gold"] for row in rows]
    prompts = tok.encode_prompts(tokenizer, questions, args.prompt_template)
    prefixes, first = [[] for _ in rows], slice(0, None, args.group_size)  # one of each group is a hybrid
    prefixes[first] = [draw_prefix(tokenizer, row, step, args) for row in rows[first]]
    starts = [x + prefix for x, prefix in zip(prompts, prefixes)]
    spent = [args.max_new_tokens if set(p) & set(stops) else len(p) for p in prefixes]  # EOS: it is whole
    responses, _ = sample(model, tokenizer, starts, args.temperature, args, spent)
    responses = [tok.cut(p + y, stops, args.max_new_tokens) for p, y in zip(prefixes, responses)]
    texts = tok.decode_responses(tokenizer, responses)
    rewards = right = math_reward(texts, golds)  # a cut response is judged, and trained, like any other
    if args.overlong_tokens:  # 0 up to the last tokens of the budget, then down to -1 (DAPO eq. 13)
        start = args.max_new_tokens - args.overlong_tokens
        rewards = [r + min(0, (start - len(y)) / args.overlong_tokens) for r, y in zip(rewards, responses)]
    done = {"prompt": prompts, "response": responses, "question": questions, "text": texts, "gold": golds}
    done |= {"reward": rewards, "right": right, "cut": [ids[-1] not in stops for ids in responses]}  # no EOS
    done["prefix_len"] = [min(len(prefix), len(ids)) for prefix, ids in zip(prefixes, responses)]
    done = [dict(zip(done, values)) for values in zip(*done.values())]  # a dict per completion
    return [done[i : i + args.group_size] for i in range(0, len(done), args.group_size)]


def advantages(rewards, how):
    """A_i of every completion from the rewards of its group, [Q, G]. All right or all wrong gives A = 0."""
    centred = rewards - rewards.mean(1, keepdim=True)  # (G - 1) / G of the leave-one-out advantage
    return centred / (rewards.std(1, keepdim=True) + 1e-6) if how == "grpo" else centred  # std: n - 1


def prefix_weight(A, logp, entropy, prefix, mask, args):
    """What multiplies r on each token, [N, T]: A, of the prefix tokens only the most uncertain keep it."""
    p, n = logp.exp(), int(prefix.sum())
    mean = 1 / inverse_z(mask, args.loss_norm, args.max_new_tokens) / max(1, n)  # an SFT loss: its Z is n
    weights = {"ratio": A, "luffy": A * 0.1 * p / (p + 0.1) ** 2, "sft": mean}
    kept = {"all": n, "none": 0}.get(args.prefix_loss, n - int((1 - args.prefix_entropy_keep) * n))
    rank = {"random": torch.rand_like(entropy), "bottom": -entropy}.get(args.prefix_loss, entropy)
    rank = rank.masked_fill(prefix == 0, -torch.inf)
    keep = torch.zeros_like(rank).view(-1).index_fill(0, rank.flatten().topk(kept).indices, 1).view_as(rank)
    return torch.where(prefix == 1, weights[args.prefix_weight] * keep, A)  # Z counts weight 0, too


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
    train, test = tok.load_splits(args, extract_answer, check_gold)
    torch.manual_seed(args.seed)
    known = args.prefix_schedule == "none" or args.solution_key in train.column_names
    tok.demand(known, f"--solution-key {args.solution_key}: no such column of {args.data}.")
    out, state, model, tokenizer = tok.open_run(args)
    reference = tok.load_model(args.model)[0] if args.kl_coef else None  # pi_ref, frozen
    epochs = args.steps * args.batch_size // len(train) + 1  # each a fresh permutation of the rows
    order = torch.cat([torch.randperm(len(train)) for _ in range(epochs)]).split(args.batch_size)
    train = train.add_column("demonstrated", (torch.rand(len(train)) < args.demo_fraction).tolist())
    optimizer = tok.adamw(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)  # fp32 state
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=args.dtype == "bf16")  # not weights
    if args.resume:
        optimizer.load_state_dict(state.pop("optimizer"))
    else:
        with autocast:
            self_check(model, tokenizer, test, args)
            metrics = {"step": 0, "unparseable_gold": args.unparseable_gold}
            tok.log(out, metrics | evaluate(model, tokenizer, test, args))
    size, updates = args.batch_size * args.group_size, args.epochs_per_batch * args.minibatches
    print(f"a step: {args.batch_size} questions x {args.group_size} completions, {updates} updates")

    for step in tok.steps(state, args.steps):
        began = time.time()
        torch.manual_seed(args.seed * 10**6 + step)  # all draws of this step: a resumed run repeats them
        progress = (step - 1) / args.steps  # the learning rate depends on the step alone, too
        decay = {"constant": 1, "linear": 1 - progress, "cosine": (1 + cos(pi * progress)) / 2}[args.schedule]
        lr = optimizer.param_groups[0]["lr"] = args.lr * min(1, step / max(1, args.warmup_steps)) * decay

        # sample and verify
        with autocast:
            groups, spare = rollout(model, tokenizer, train.select(order[step - 1]), step, args), []
            for _ in range(args.skip_dead_groups):  # dynamic sampling: for groups all right or wrong
                dead = [g for g, group in enumerate(groups) if len({c["right"] for c in group}) == 1]
                others = train.select(torch.randint(len(train), (len(dead),)))
                for g, group in zip(dead, rollout(model, tokenizer, others, step, args)):
                    groups[g], spare = group, spare + groups[g]
        batch = [completion for group in groups for completion in group]  # N = questions x G
        tokens, mask = tok.join([c["prompt"] for c in batch], [c["response"] for c in batch], model.device)
        rewards = torch.tensor([c["reward"] for c in batch], device=model.device).view(-1, args.group_size)
        advantage = advantages(rewards, args.advantage).view(-1, 1) * mask  # A_i on each token, [N, T]
        prefix_len = torch.tensor([[c["prefix_len"]] for c in batch], device=model.device)
        prefix = mask * (mask.cumsum(1) <= prefix_len)  # 1 on demonstration tokens, [N, T]
        sampled = time.time()

        # train
        passes = [torch.randperm(size).tensor_split(args.minibatches) for _ in range(args.epochs_per_batch)]
        zero, inv_z = torch.zeros_like(advantage), torch.zeros_like(advantage)
        with autocast:
            old_logp = score(model, tokens, mask, args)[0] if updates > 1 else zero
            ref_logp = score(reference, tokens, mask, args)[0] if reference else zero
            prefix_logp, entropy = score(model, tokens, prefix, args)
        advantage = prefix_weight(advantage, prefix_logp, entropy, prefix, mask, args)
        useful = mask * ((advantage != 0).any(1, keepdim=True) | bool(args.kl_coef))  # rows with a gradient
        losses, norms, seen = [], [], []
        for minibatch in sum(passes, ()):
            inv_z[minibatch] = inverse_z(mask[minibatch], args.loss_norm, args.max_new_tokens)
            for rows, width in tok.split_by_tokens(useful, minibatch.tolist(), args.micro_batch_tokens):
                whole = (tokens, mask, advantage, old_logp, ref_logp, inv_z)
                y, m, A, old, ref, z = (x[rows, :width] for x in whole)  # micro-batch, [B, T]
                with autocast:
                    logp, entropy = logprobs(model, y, m, args.temperature)
                old = old if updates > 1 else logp.detach()  # a single update: pi_old is pi, and r = 1
                ref = ref if reference else logp.detach()  # no reference: k3 = 0
                loss, ratio, k3 = policy_loss(logp, old, ref, A, m, z, args)
                loss.backward()
                losses.append(loss.item() / updates)  # the sum over micro-batches, the mean over updates
                seen.append(torch.stack([entropy.detach(), k3, ratio])[:, m.bool()].cpu())  # [3, tokens]
            parameters = tok.reduce_gradients(model.parameters())  # their sum over ranks: Z is of all
            norms.append(torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item())
            if tok.finite(norms[-1], state):
                optimizer.step()
            optimizer.zero_grad()
        losses, seen = tok.gather(losses), tok.gather(seen)

        # log, evaluate, save
        entropy, k3, ratio = torch.cat(seen, 1) if seen else torch.tensor([[0.0], [0.0], [1.0]])
        trusted, dead = ratio.clamp(1 - args.clip_low, 1 + args.clip_high), (rewards == rewards[:, :1]).all(1)
        metrics = {"step": step, "reward": rewards.mean(), "loss": sum(losses), "entropy": entropy.mean()}
        metrics |= {"grad_norm": sum(norms) / updates, "response_len": mask.sum() / size}
        metrics |= {"clip_frac": (ratio != trusted).float().mean(), "frac_zero_groups": dead.float().mean()}
        metrics |= {"adv_abs": advantage.abs().sum() / mask.sum(), "ratio_max": (ratio - 1).abs().max()}
        metrics |= {"truncated_frac": sum(c["cut"] for c in batch) / size, "lr": lr}
        metrics |= {"skipped": state["skipped"]}
        metrics |= {"kl": k3.mean(), "tokens_trained": sum(x.shape[1] for x in seen)}
        metrics |= {"tokens_generated": sum(len(c["response"]) - c["prefix_len"] for c in batch + spare)}
        metrics |= {"seconds_sample": sampled - began, "seconds_train": time.time() - sampled}
        metrics |= {"reward_hybrid": rewards[:, 0].mean(), "prefix_frac": prefix.sum() / mask.sum()}
        if step == args.steps or (args.eval_every and step % args.eval_every == 0):
            with autocast:
                metrics |= evaluate(model, tokenizer, test, args)
        tok.log(out, metrics, batch[:2])
        if tok.due(state, args.save_every):
            tok.save_model(out / f"checkpoint-{step:06}", model, tokenizer, optimizer, state)
    tok.save_model(out / "final", model, tokenizer)


if __name__ == "__main__":
    main(parse_args())
