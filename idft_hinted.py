"""IDFT and hinted decoding: weight and rewrite demonstrations by how on-policy they are.

Zhang et al., Towards On-Policy SFT, arXiv 2602.12222; DFT: Wu et al., 2508.05629. The centered
log-likelihood of a token, phi = log p + H, is its log-probability plus the entropy of the
distribution it came from. On on-policy samples its mean is 0 in every context; on most text of
another style it is below 0. It has two uses here:

    L = - 1/Z sum_i sum_t m_it sg(p_it ^ gamma_it) log p_it       gamma = clamp(exp(-phi), 0.1, 2)
    log m = (1 - lam) log p_hinted + lam log q_student + const    lam = clamp(beta H(p) / log V, 0, 1)

In the one equation, grad L = - 1/Z sum mask weight grad log pi; against sft.py:
    data    --hinted on: the model's own solution where it is correct, else a rewrite of the
            demonstration if that is correct: sampled from m, one model in two contexts, with the
            demonstration (hinted) and without it (student)
    weight  p ^ gamma; gamma = 0 is SFT, 1 is DFT; EAFT is H / log V, as in the IDFT authors' code
    mask    the response, EOS included
    Z       response tokens of the global batch (the official code takes means of micro-batches)
With --hinted off --weight sft it is sft.py, bit by bit.

    python idft_hinted.py              # tiny world, minutes on 2 CPU cores: pass@1 0.26 -> 0.72
    python idft_hinted.py --hinted off --weight dft       # DFT on the demonstrations as they are
    python idft_hinted.py --model Qwen/Qwen2.5-1.5B-Instruct --data DIR --dtype bf16 --lr 6e-5
    # set the lengths for your data, for example --max-demo-tokens 2048 --max-new-tokens 2048
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
    add("--output-dir", default="runs/idft_hinted", help="folder for logs, checkpoints and final/")
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
    add("--lr", type=flags.number(0, 1), default=flags.Rate(9e-4, 6e-5), help="learning rate")
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
    weights = ["sft", "dft", "eaft", "idft"]
    add("--weight", choices=weights, default="idft", help="weight of tokens; sft: 1; dft: p")
    add("--hinted", choices=["on", "off"], default="on", help="rewrite demonstrations first")
    add("--beta", type=flags.number(0), default=1.0, help="higher: more like the model's own")
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


def mixture(log_p, log_q, beta):
    """Unnormalised log m, [rows, V]: the hinted p leads where it is certain, the student q elsewhere."""
    entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)  # H(p), [rows, 1]
    log_v = torch.tensor(log_p.shape[-1]).log()
    lam = (beta * entropy / log_v).clamp(0, 1)  # [rows, 1]
    return (1 - lam) * log_p + lam * log_q


@torch.no_grad()
def rewrite(model, tokenizer, hinted, student, args):
    """Hinted decoding: one response per pair of prompts; both contexts advance by the same token."""
    model = models.sampler(model)  # under bf16 a copy, refreshed from the weights
    stops = torch.tensor(tok.stop_ids(tokenizer, model.config), device=model.device)
    generator = ranks.generator(model.device)
    vocabulary = model.config.get_text_config().vocab_size
    boxed = tok.spelling(tokenizer, vocabulary, "\\boxed{").to(model.device)

    def draw(logits):
        """As in `sample`, but from m; logits [2B, V] of hinted and student contexts in turn.

        `batch` and `spelled` are set for each batch by the loop below.
        """
        both = logits.float().log_softmax(-1).view(-1, 2, vocabulary)
        log_p, log_q = both.unbind(1)  # hinted and student, [B, V]
        log_m = mixture(log_p, log_q, args.beta)
        log_m = torch.where(batch.t == 0, log_p, log_m)  # the hinted stream begins
        # the student alone writes the answer: it must follow from the text, not from the hint
        answers = spelled[batch.slot] == len(boxed) - 1  # [B]
        log_m = torch.where(answers[:, None], log_q, log_m)
        m, index = log_m.softmax(-1).sort(-1, descending=True)
        # as in the authors' code: first the nucleus, 0.95, then the temperature, 0.3
        m = m.masked_fill(m.cumsum(-1) - m >= 0.95, 0)
        m = m ** (1 / 0.3)
        noise = torch.empty_like(m).exponential_(generator=generator)
        token = index.gather(1, (m / noise).argmax(-1, keepdim=True))  # [B, 1]
        spelled[batch.slot] = boxed[spelled[batch.slot], token[:, 0]]
        logp = log_m.gather(1, token)  # not normalised; the caller ignores it
        ended = (token == stops).any(1)
        return token[:, 0], logp[:, 0], ended

    ids = torch.full((len(hinted), args.max_new_tokens), -1)  # [N, budget], -1: not sampled
    lengths = [len(prompt) for prompt in hinted]
    at_once = memory.rows(model, lengths, args, contexts=2)
    for rows in decoding.batches(range(len(hinted)), at_once, lengths):
        pairs = [prompts[i] for i in rows for prompts in (hinted, student)]
        budgets = [args.max_new_tokens] * len(rows)
        # how many characters of \boxed{ each response ends with; all of them: it has been written
        spelled = torch.zeros(len(rows), dtype=torch.int64, device=model.device)
        batch = decoding.Batch(model, pairs, budgets, contexts=2)
        drawn, _ = batch.decode(draw, generator)
        ids[rows, : drawn.shape[1]] = drawn
    return [row[row >= 0].tolist() for row in ranks.reduce(ids, "MAX")]


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


def centered(model, prompts, responses, args):
    """The sum of phi = log p + H over each response, [N]; its mean is 0 on on-policy samples."""
    logp, entropy = score(model, *tok.join(prompts, responses, model.device), args)
    return (logp + entropy).sum(1).cpu()


# ---- the method ------------------------------------------------------------------------
def judged(model, tokenizer, kind, questions, golds, prompts, responses, args):
    """Responses of one kind as rows for samples.jsonl, with their verified share and mean phi."""
    texts = tok.decode_responses(tokenizer, responses)
    correct = torch.tensor(math_reward(texts, golds)) > 0  # [N]
    lengths = torch.tensor([len(ids) for ids in responses])
    phi = centered(model, prompts, responses, args) / lengths  # mean over tokens, [N]
    metrics = {f"verified_{kind}": correct.float().mean()}
    metrics[f"phi_{kind}"] = phi[correct].mean()
    stops = tok.stop_ids(tokenizer, model.config)
    ended = torch.tensor([ids[-1] in stops for ids in responses])  # truncated ones are left out
    kept = correct & ended & (kind != "demo")  # demonstrations are only measured
    rows = []
    for question, text, keep in zip(questions, texts, kept.tolist()):
        rows.append({"kind": kind, "question": question, "solution": text, "kept": keep})
    return metrics, rows


def on_policy_demonstrations(model, tokenizer, rows, args):
    """The model's own solutions and, where these are incorrect, rewrites; `kept` says what to train."""
    questions, golds = list(rows["question"]), list(rows["gold"])
    solutions = list(rows["solution"])
    hints = [args.hint_template.replace("{solution}", y) for y in solutions]
    hints = [hint.replace("{question}", x) for hint, x in zip(hints, questions)]
    prompts = tok.encode_prompts(tokenizer, questions, args.prompt_template)
    hints = tok.encode_prompts(tokenizer, hints, args.prompt_template)
    # refuse before sampling, not after it
    models.demand_positions(model, max(map(len, hints)) + args.max_new_tokens)

    demos = [tok.encode_response(tokenizer, y)[: args.max_demo_tokens] for y in solutions]
    own, _ = sample(model, tokenizer, prompts, args.temperature, args)
    correct = math_reward(tok.decode_responses(tokenizer, own), golds)
    stops = tok.stop_ids(tokenizer, model.config)
    ended = [ids[-1] in stops for ids in own]
    failed = [i for i in range(len(own)) if not (correct[i] and ended[i])]
    hinted = [hints[i] for i in failed]
    student = [prompts[i] for i in failed]
    rewrites = rewrite(model, tokenizer, hinted, student, args)
    every = range(len(questions))
    kinds = [("demo", every, demos), ("own", every, own)]
    if failed:
        kinds.append(("hinted", failed, rewrites))
    metrics = {"step": 0, "tokens_generated": sum(len(ids) for ids in own + rewrites)}
    found = []
    for kind, which, responses in kinds:
        asked = [questions[i] for i in which]
        answers = [golds[i] for i in which]
        contexts = [prompts[i] for i in which]
        numbers, judgements = judged(model, tokenizer, kind, asked, answers, contexts, responses, args)
        metrics |= numbers
        found += judgements
    return metrics, found


def idft_loss(logp, entropy, response_mask, z, vocabulary, args):
    """- 1/Z sum m sg(w) log p; logp, H and mask [B, T] of a micro-batch, Z of the global batch."""
    log_p, h = logp.detach(), entropy.detach()  # the weight is detached
    phi = log_p + h  # > 0: likelier than the model's samples are here on average; < 0: off-policy
    if args.weight == "eaft":
        weight = h / torch.tensor(vocabulary).log()
    else:
        gamma = {"sft": 0.0, "dft": 1.0, "idft": (-phi).exp().clamp(0.1, 2.0)}[args.weight]
        weight = (gamma * log_p).exp()  # p^gamma
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
    if args.hinted == "on":
        train = data.with_gold(train, args)
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
            prompts = tok.encode_prompts(tokenizer, test["question"], args.prompt_template)
            own, _ = sample(model, tokenizer, prompts, args.temperature, args)
            phi = centered(model, prompts, own, args)  # [N]
            # mean 0 for any model; beyond 3 standard errors log p or H is wrong
            errors = phi.mean() / phi.std() * len(phi) ** 0.5
            print(f"self-check: phi of on-policy samples is {errors:.1f} standard errors from 0")
            if args.hinted == "on":
                rows = data.subset(train, args.steps * args.batch_size, args.seed)
                runs.log(out, *on_policy_demonstrations(model, tokenizer, rows, args))
        if args.steps:  # the samples are kept
            runs.save_model(out / "checkpoint-000000", model, tokenizer, optimizer, state)
    if args.hinted == "on":  # train what samples.jsonl says
        train = data.load_samples(out)
        train = train.filter(bool, input_columns="kept")
        sentence = "no own solution or rewrite is correct and ended by EOS; raise --max-new-tokens."
        flags.demand(len(train), f"--hinted on: {sentence}")
    torch.manual_seed(args.seed)
    order = data.shuffled_batches(len(train), args.steps, args.batch_size)  # of row numbers
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
        phi = []
        for micro in tok.micro_batches(mask, args.micro_batch_tokens, ranks.shard()):
            y = tokens[micro]  # [B, width]
            m = mask[micro]
            with autocast:
                logp, entropy = logprobs(model, y, m, args.temperature)
            vocabulary = model.config.get_text_config().vocab_size
            loss = idft_loss(logp, entropy, m, z, vocabulary, args)
            loss.backward()
            losses.append(loss.item())
            entropies.append(entropy.detach()[m.bool()].cpu())  # [tokens]
            phi.append((logp + entropy).detach()[m.bool()].cpu())
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
            "phi": torch.cat(ranks.gather(phi)).mean(),
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
