"""IDFT and hinted decoding: demonstrations weighted, and rewritten, by how much they are the model's own.

Zhang et al., Towards On-Policy SFT, arXiv 2602.12222; DFT: Wu et al., 2508.05629. The centered log-likelihood
of a token, phi = log p + H, log-probability plus entropy of the distribution it is from, has mean 0 on the
model's own samples in every context; most text of another style lies below. It has two uses here:

    L = - 1/Z sum_i sum_t m_it sg(p_it ^ gamma_it) log p_it        gamma = clamp(exp(-phi), 0.1, 2)
    log m = (1 - lam) log p_hinted + lam log q_student + const     lam = clamp(beta H(p_hinted) / log V, 0, 1)

In the one equation, grad L = - 1/Z sum mask weight grad log pi; against sft.py:
    data    --hinted on: the model's own solution where it is right, else a rewrite of the demonstration, if
            that is right: drawn from m, one model in two contexts, with the demonstration and without it
    weight  p ^ gamma; with gamma = 0 that is SFT, with 1 DFT; EAFT's is H / log V
    mask    the response, EOS included
    Z       response tokens of the whole optimizer batch (the official code takes means of micro-batches)
With --hinted off --weight sft it is sft.py, bit by bit.

    python idft_hinted.py                                # tiny world, 2 cores, minutes: pass@1 0.26 -> 0.73
    python idft_hinted.py --hinted off --weight dft      # DFT on the demonstrations as they are
    python idft_hinted.py --model Qwen/Qwen2.5-1.5B-Instruct --data DIR --dtype bf16 --lr 6e-5 --beta 3
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

HINT = "{question}\nReference solution: {solution}\nIn your own words:"  # a form that the tiny model knows


# ---- arguments -------------------------------------------------------------------------------------------
def parse_args(argv=None):
    add = (parser := argparse.ArgumentParser(description=__doc__.splitlines()[0])).add_argument
    # run
    add("--output-dir", default="runs/idft_hinted", help="metrics, samples, checkpoints, final model")
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
    add("--lr", type=float, default=9e-4, help="AdamW's, before warm-up and decay")
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
    add("--weight", choices=["sft", "dft", "eaft", "idft"], default="idft", help="1, p, H / log V or p^gamma")
    add("--hinted", choices=["on", "off"], default="on", help="rewrite the demonstrations before training")
    add("--beta", type=float, default=1.0, help="how soon the student leads; 0: the hinted stream alone")
    add("--hint-template", default=HINT, help="what is said to the model in the hinted context")
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


def mixture(log_p, log_q, beta):
    """Unnormalised log m, [rows, V]: the hinted stream p leads where it is sure, the student q elsewhere."""
    entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)  # H(p), [rows, 1]
    lam = (beta * entropy / torch.tensor(log_p.shape[-1]).log()).clamp(0, 1)  # beta H(p) / log V, [rows, 1]
    return (1 - lam) * log_p + lam * log_q


@torch.no_grad()
def rewrite(model, tokenizer, hinted, student, args):
    """Hinted decoding, a response per pair of prompts; both contexts advance by the same token."""
    stops = torch.tensor(tok.stop_ids(tokenizer, model.config), device=model.device)
    ids = torch.full((len(hinted), args.max_new_tokens), -1)  # [N, budget], -1: not sampled
    dice = tok.dice(model.device)
    for rows in tok.share(range(len(hinted)), args.sample_rows, list(map(len, hinted))):
        token, mask = tok.pad([x[i] for x in (hinted, student) for i in rows], "left", model.device)
        position, cache = (mask.cumsum(1) - 1).clamp(min=0), tok.Cache(config=model.config)
        boxed = torch.zeros(len(rows), 1, dtype=torch.bool, device=model.device)  # has the answer begun?
        for t in range(args.max_new_tokens):
            inputs = dict(attention_mask=mask, position_ids=position, past_key_values=cache, logits_to_keep=1)
            log_p, log_q = model(token, **inputs).logits[:, -1].float().log_softmax(-1).chunk(2)  # [rows, V]
            log_m = mixture(log_p, log_q, args.beta) if t else log_p  # the hinted stream begins
            # the student alone gives the answer: it has to follow from what is written, not from the hint
            m, index = torch.where(boxed, log_q, log_m).softmax(-1).sort(-1, descending=True)
            m = m.masked_fill(m.cumsum(-1) - m >= 0.95, 0) ** (1 / 0.3)  # nucleus, then temperature
            token = index.gather(1, torch.multinomial(m, 1, generator=dice))  # [rows, 1]
            ids[rows, t] = token[:, 0].cpu()
            tails = tokenizer.batch_decode(ids[rows, max(0, t - 7) : t + 1])  # 7 characters, at most 7 tokens
            boxed |= torch.tensor([["\\boxed{" in tail] for tail in tails], device=model.device)
            alive = (~torch.isin(token[:, 0], stops)).nonzero()[:, 0]
            if len(alive) == 0:
                break
            two = torch.cat([alive, alive + len(rows)])  # finished rows leave both halves
            if len(alive) < len(rows):
                cache.batch_select_indices(two)
            rows, token, boxed = rows[alive.cpu()], token[alive].repeat(2, 1), boxed[alive]
            mask, position = F.pad(mask[two], (0, 1), value=1), position[two, -1:] + 1
    return [x[x >= 0].tolist() for x in tok.reduce(ids, "MAX")]


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


def centered(model, prompts, responses, args):
    """The sum of phi = log p + H over each response, [N]: 0 in the mean if the model has drawn it itself."""
    return sum(score(model, *tok.join(prompts, responses, model.device), args)).sum(1).cpu()


# ---- the method ------------------------------------------------------------------------------------------
def own_words(model, tokenizer, rows, args):
    """Demonstrations, own solutions and, where these are wrong, rewrites; `kept` is what to train on."""
    xs, ys, golds = (list(rows[key]) for key in (args.question_key, args.solution_key, "gold"))
    hints = [args.hint_template.replace("{solution}", y).replace("{question}", x) for x, y in zip(xs, ys)]
    prompts, hints = (tok.encode_prompts(tokenizer, x, args.prompt_template) for x in (xs, hints))
    tok.fits(model, max(map(len, hints)) + args.max_new_tokens)  # said now, not after all has been sampled
    demos = [tok.encode_response(tokenizer, y)[: args.max_demo_tokens] for y in ys]
    own, _ = sample(model, tokenizer, prompts, args.temperature, args)
    lost = [i for i, r in enumerate(math_reward(tok.decode_responses(tokenizer, own), golds)) if not r]
    new = rewrite(model, tokenizer, [hints[i] for i in lost], [prompts[i] for i in lost], args)
    metrics, found, each = {"step": 0, "tokens_generated": sum(map(len, own + new))}, [], range(len(ys))
    # nothing is rewritten where every own answer is right
    for kind, of, ids in (("demo", each, demos), ("own", each, own), ("hinted", lost, new))[: 2 + bool(lost)]:
        texts = tok.decode_responses(tokenizer, ids)
        right = torch.tensor(math_reward(texts, [golds[i] for i in of])) > 0  # [N]
        phi = centered(model, [prompts[i] for i in of], ids, args) / torch.tensor([len(y) for y in ids])
        metrics |= {f"verified_{kind}": right.float().mean(), f"phi_{kind}": phi[right].mean()}  # per token
        right &= torch.tensor([kind != "demo" and len(y) < args.max_new_tokens for y in ids])  # cut: no EOS
        lines = zip([xs[i] for i in of], texts, right.tolist())
        found += [{"kind": kind, args.question_key: x, args.solution_key: y, "kept": k} for x, y, k in lines]
    return metrics, found


def idft_loss(logp, entropy, response_mask, z, vocabulary, args):
    """- 1/Z sum m sg(w) log p; logp, H and mask [B, T] of a micro-batch, Z of the whole optimizer batch."""
    log_p, h = logp.detach(), entropy.detach()  # of the model as it is: no gradient through the weight
    phi = log_p + h  # > 0: likelier than what the model says here on average; < 0: foreign
    gamma = {"sft": 0.0, "dft": 1.0}.get(args.weight, (-phi).exp().clamp(0.1, 2.0))
    weight = h / torch.tensor(vocabulary).log() if args.weight == "eaft" else (gamma * log_p).exp()  # p^gamma
    return -(weight * logp * response_mask).sum() / z


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
    train, test = tok.load_splits(args, extract_answer, check_gold, demonstrations=True)
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
            prompts = tok.encode_prompts(tokenizer, test[args.question_key], args.prompt_template)
            own, _ = sample(model, tokenizer, prompts, args.temperature, args)
            phi = centered(model, prompts, own, args)  # [N]
            # own samples of any model have mean 0: beyond 3 standard errors log p or H is wrong
            print(f"self-check: own phi is {phi.mean() / phi.std() * len(phi) ** 0.5:.1f} SE from 0")
            if args.hinted == "on":
                train = tok.with_gold(train, args, extract_answer, check_gold)
                # as many questions as the steps have rows
                tok.log(out, *own_words(model, tokenizer, train[: args.steps * args.batch_size], args))
        tok.save_model(out / f"checkpoint-{0:06}", model, tokenizer, optimizer, state)  # samples are kept
    if args.hinted == "on":  # what the file says is what is trained
        train = tok.load_split(str(out / "samples.jsonl"), "train", {}).filter(bool, input_columns="kept")
        tok.demand(len(train), "--hinted: no own answer or rewrite is right and ended; see --max-new-tokens.")
    epochs = args.steps * args.batch_size // len(train) + 1  # each a fresh permutation of the rows
    torch.manual_seed(args.seed)
    order = torch.cat([torch.randperm(len(train)) for _ in range(epochs)]).split(args.batch_size)
    print(f"a step: {args.batch_size} of {len(train):,} demonstrations")

    for step in tok.steps(state, args.steps):
        began = time.time()
        torch.manual_seed(args.seed * 10**6 + step)  # all draws of this step: a resumed run repeats them
        progress = (step - 1) / args.steps  # the learning rate depends on the step alone, too
        decay = {"constant": 1, "linear": 1 - progress, "cosine": (1 + cos(pi * progress)) / 2}[args.schedule]
        lr = optimizer.param_groups[0]["lr"] = args.lr * min(1, step / max(1, args.warmup_steps)) * decay

        # demonstrations
        batch = train[order[step - 1].tolist()]  # column -> list
        prompts = tok.encode_prompts(tokenizer, batch[args.question_key], args.prompt_template)
        responses = [tok.encode_response(tokenizer, text) for text in batch[args.solution_key]]
        cut = sum(len(ids) > args.max_demo_tokens for ids in responses)
        responses = [ids[: args.max_demo_tokens] for ids in responses]
        tokens, mask = tok.join(prompts, responses, model.device)  # [N, T]

        # train
        losses, seen = [], []
        phi = []
        for rows, width in tok.split_by_tokens(mask, range(len(tokens)), args.micro_batch_tokens):
            y, m = (x[rows, :width] for x in (tokens, mask))  # micro-batch, [B, T]
            with autocast:
                logp, entropy = logprobs(model, y, m, args.temperature)
            loss = idft_loss(logp, entropy, m, mask.sum(), model.config.get_text_config().vocab_size, args)
            loss.backward()
            losses.append(loss.item())
            seen.append(entropy.detach()[m.bool()].cpu())  # [tokens]
            phi.append((logp + entropy).detach()[m.bool()].cpu())
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
        metrics |= {"phi": torch.cat(tok.gather(phi)).mean()}
        if step == args.steps or (args.eval_every and step % args.eval_every == 0):
            with autocast:
                metrics |= evaluate(model, tokenizer, test, args)
        tok.log(out, metrics)
        if tok.due(state, args.save_every):
            tok.save_model(out / f"checkpoint-{step:06}", model, tokenizer, optimizer, state)
    tok.save_model(out / "final", model, tokenizer)


if __name__ == "__main__":
    main(parse_args())
