"""DPO: direct preference optimisation, a chosen response against a rejected one, without a reward model.

Rafailov et al., Direct Preference Optimization, arXiv 2305.18290; SimPO: Meng, Xia, Chen, 2405.14734.
If a policy pi were optimal for a reward under a KL penalty to the start model pi_0, that reward would be, up
to a term of x alone, beta log pi(y|x) / pi_0(y|x). So read it off pi, and fit it to preferences y_w > y_l:

    L = - 1/Z sum_pairs log sigmoid(h)         h = r(y_w) - r(y_l)         s = sigmoid(-h)
    DPO    r(y) = beta ( log pi(y|x) - log pi_0(y|x) ), sums over the tokens
    SimPO  r(y) = beta log pi(y|x) / |y|, the mean, without pi_0; and h is reduced by a margin

In the one equation, grad L = - 1/Z sum mask weight grad log pi; against sft.py:
    data    pairs: of --pairs, or a right and a wrong one of k samples of the start model for a question
    weight  + beta s on y_w, - beta s on y_l (SimPO: each divided by |y|); at DPO's first step s = 1/2
    mask    the response, EOS included, of both; as in sft.py
    Z       pairs of the whole optimizer batch
log pi_0 is computed once, before training, and stored with the pairs: only one model is in memory.

    python dpo.py                                        # tiny world, 2 cores, minutes: pass@1 0.26 -> 0.40
    python dpo.py --pairs tiny/preferences --loss simpo  # labels of a noisy annotator instead of a verifier
    python dpo.py --model Qwen/Qwen2.5-Math-1.5B-Instruct --data DIR --dtype bf16 --lr 1e-6 --k 16
    # and the lengths of your data, such as --max-new-tokens 2048 --max-demo-tokens 2048
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
    add("--output-dir", default="runs/dpo", help="metrics, samples, checkpoints, final model")
    add("--seed", type=int, default=0, help="every draw of step s comes from (seed, s)")
    add("--steps", type=int, default=200, help="batches to train on; 0 trains nothing")
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
    add("--lr", type=float, default=3e-5, help="AdamW's, before warm-up and decay")
    add("--schedule", choices=["constant", "linear", "cosine"], default="linear", help="over all steps")
    add("--warmup-steps", type=int, default=5, help="steps from 0 to the peak learning rate")
    add("--max-grad-norm", type=float, default=1.0, help="longer gradients are scaled down to this norm")
    add("--batch-size", type=int, default=16, help="rows per step")
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
    add("--max-demo-tokens", type=int, default=512, help="a longer demonstration loses its end, EOS too")
    add("--loss", choices=["dpo", "simpo"], default="dpo", help="rewards from log pi / pi_0, or mean log pi")
    add("--beta", type=float, default=0.1, help="DPO: a small one allows pi to go far from the start")
    add("--simpo-beta", type=float, default=2.0, help="SimPO: scale of the mean log-probabilities")
    add("--simpo-margin", type=float, default=1.0, help="SimPO: gamma, what the rewards shall differ by")
    add("--pairs", help="data set with prompt, chosen, rejected; default: pairs sampled from the start model")
    add("--k", type=int, default=8, help="without --pairs: samples per question")
    add("--pair-questions", type=int, default=1000, help="without --pairs: training questions to sample")
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


def make_pairs(model, tokenizer, rows, args):
    """(question, chosen, rejected) of --pairs or of own samples, right against wrong; what they cost."""
    if args.pairs:
        columns = {f"column {key}:": key for key in ("prompt", "chosen", "rejected")}
        rows = tok.load_split(args.pairs, args.split, columns, "--pairs")
        return list(zip(*(rows[key] for key in columns.values()))), 0
    rows = rows.select(range(min(args.pair_questions, len(rows))))
    prompts = tok.encode_prompts(tokenizer, rows[args.question_key], args.prompt_template)
    responses, _ = sample(model, tokenizer, prompts * args.k, args.temperature, args)
    texts, stops = tok.decode_responses(tokenizer, responses), tok.stop_ids(tokenizer, model.config)
    right, pairs = math_reward(texts, list(rows["gold"]) * args.k), []
    for i, question in enumerate(rows[args.question_key]):
        ended = [j for j in range(i, len(texts), len(rows)) if responses[j][-1] in stops]  # of its k samples
        wrong, good = ({texts[j]: 0 for j in ended if right[j] == verdict} for verdict in (0, 1))  # distinct
        pairs += [(question, *both) for both in zip(good, wrong)]
    tok.demand(pairs, "--k: no question has both a right and a wrong sample; raise it, or take other --data.")
    return pairs, sum(map(len, responses))


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


def with_start(model, tokenizer, pairs, args):
    """Rows 2j and 2j + 1, the chosen and the rejected response of pair j, each with its log pi_0(y | x)."""
    rows = [{args.question_key: x, args.solution_key: y} for x, *both in pairs for y in both]
    for part in (rows[i : i + args.sample_rows] for i in range(0, len(rows), args.sample_rows)):
        prompts = tok.encode_prompts(tokenizer, [r[args.question_key] for r in part], args.prompt_template)
        texts = [tok.encode_response(tokenizer, r[args.solution_key])[: args.max_demo_tokens] for r in part]
        logp, _ = score(model, *tok.join(prompts, texts, model.device), args)  # [N, T], prompt 0
        for row, start in zip(part, logp.sum(1).tolist()):
            row["start_logp"] = start
    return rows


# ---- the method ------------------------------------------------------------------------------------------
def dpo_loss(logp, start_logp, response_mask, z, args):
    """- 1/Z sum log sigmoid(h); logp, mask [B, T], pairs adjacent; start_logp log pi_0(y | x), [B]."""
    total = (logp * response_mask).sum(1)  # log pi(y | x), [B]
    dpo, simpo = args.beta * (total - start_logp), args.simpo_beta * total / response_mask.sum(1)  # [B]
    reward, margin = (dpo, 0.0) if args.loss == "dpo" else (simpo, args.simpo_margin)  # r(y), [B]
    h = reward[0::2] - reward[1::2] - margin  # r(y_w) - r(y_l), [B/2]
    return -F.logsigmoid(h).sum() / z, reward.detach()  # slope -sigmoid(-h): a settled pair rests


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


def kl_from_start(model, prompts, responses, start_logp, args):
    """KL(pi_0 | pi) per token on held-out responses that pi_0 gave before training, with its log-probs."""
    tokens, mask = tok.join(prompts, responses, model.device)
    delta = score(model, tokens, mask, args)[0] - start_logp.to(model.device)  # log pi / pi_0, [N, T]
    return (delta.exp() - delta - 1).sum() / mask.sum()  # k3 >= 0, unbiased as y ~ pi_0


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
    out, state, model, tokenizer = tok.open_run(args)
    optimizer = tok.adamw(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)  # fp32 state
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=args.dtype == "bf16")  # not weights
    if args.resume:
        optimizer.load_state_dict(state.pop("optimizer"))
    else:
        with autocast:
            self_check(model, tokenizer, test, args)
            metrics = {"step": 0, "unparseable_gold": args.unparseable_gold}
            tok.log(out, metrics | evaluate(model, tokenizer, test, args))
            began = time.time()
            pairs, cost = make_pairs(model, tokenizer, train, args)
            rows = with_start(model, tokenizer, pairs, args)
            tok.log(out, {"step": 0, "tokens_generated": cost, "seconds_sample": time.time() - began}, rows)
            x = tok.encode_prompts(tokenizer, test[args.question_key], args.prompt_template)
            y, _ = sample(model, tokenizer, x, args.temperature, args)  # scored as it will be again: kl is 0
            state["start"] = (x, y, score(model, *tok.join(x, y, model.device), args)[0].cpu())
        tok.save_model(out / f"checkpoint-{0:06}", model, tokenizer, optimizer, state)  # samples are kept
    train = tok.load_split(str(out / "samples.jsonl"), "train", {})  # what the file says is what is trained
    epochs = 2 * args.steps * args.batch_size // len(train) + 1  # each a fresh permutation of the pairs
    torch.manual_seed(args.seed)
    order = torch.cat([torch.randperm(len(train) // 2) for _ in range(epochs)]).split(args.batch_size)
    print(f"a step: {args.batch_size} of {len(train) // 2:,} pairs")

    for step in tok.steps(state, args.steps):
        began = time.time()
        torch.manual_seed(args.seed * 10**6 + step)  # all draws of this step: a resumed run repeats them
        progress = (step - 1) / args.steps  # the learning rate depends on the step alone, too
        decay = {"constant": 1, "linear": 1 - progress, "cosine": (1 + cos(pi * progress)) / 2}[args.schedule]
        lr = optimizer.param_groups[0]["lr"] = args.lr * min(1, step / max(1, args.warmup_steps)) * decay

        # pairs
        batch = train[[2 * j + side for j in order[step - 1].tolist() for side in (0, 1)]]  # column -> list
        prompts = tok.encode_prompts(tokenizer, batch[args.question_key], args.prompt_template)
        responses = [tok.encode_response(tokenizer, text) for text in batch[args.solution_key]]
        cut = sum(len(ids) > args.max_demo_tokens for ids in responses)
        responses = [ids[: args.max_demo_tokens] for ids in responses]
        tokens, mask = tok.join(prompts, responses, model.device)  # [N, T]
        start_logp = torch.tensor(batch["start_logp"], device=model.device)  # [N]

        # train
        losses, seen = [], []
        rewards = torch.zeros(len(tokens), dtype=model.dtype)
        longer = mask.view(-1, 2, mask.shape[1]).amax(1)  # a micro-batch holds whole pairs, [N/2, T]
        for pair, width in tok.split_by_tokens(longer, range(len(longer)), args.micro_batch_tokens // 2):
            rows = [row for j in pair for row in (2 * j, 2 * j + 1)]
            y, m = (x[rows, :width] for x in (tokens, mask))  # micro-batch, [B, T]
            with autocast:
                logp, entropy = logprobs(model, y, m, args.temperature)
            loss, reward = dpo_loss(logp, start_logp[rows], m, len(longer), args)
            loss.backward()
            losses.append(loss.item())
            seen.append(entropy.detach()[m.bool()].cpu())  # [tokens]
            rewards[rows] = reward.cpu()
        parameters = tok.reduce_gradients(model.parameters())  # their sum over ranks: Z is of all
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item()
        if tok.finite(norm, state):
            optimizer.step()
        optimizer.zero_grad()
        losses, seen = tok.gather(losses), tok.gather(seen)

        # log, evaluate, save
        metrics = {"step": step, "loss": sum(losses), "entropy": torch.cat(seen).mean(), "grad_norm": norm}
        metrics |= {"response_len": mask.sum(1).float().mean(), "truncated_frac": cut / len(tokens)}
        metrics |= {"lr": lr, "skipped": state["skipped"], "tokens_trained": mask.sum()}
        metrics |= {"seconds_train": time.time() - began}
        rewards = tok.reduce(rewards)
        chosen, rejected, margin = rewards[0::2], rewards[1::2], rewards[0::2] - rewards[1::2]
        metrics |= {"reward_chosen": chosen.mean(), "reward_rejected": rejected.mean()}  # often both fall
        metrics |= {"reward_margin": margin.mean(), "reward_accuracy": (margin > 0).float().mean()}
        if step == args.steps or (args.eval_every and step % args.eval_every == 0):
            with autocast:
                metrics |= evaluate(model, tokenizer, test, args)
                metrics |= {"kl": kl_from_start(model, *state["start"], args)}
        tok.log(out, metrics)
        if tok.due(state, args.save_every):
            tok.save_model(out / f"checkpoint-{step:06}", model, tokenizer, optimizer, state)
    tok.save_model(out / "final", model, tokenizer)


if __name__ == "__main__":
    main(parse_args())
