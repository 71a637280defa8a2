"""RLHF: preferences, a reward model fitted to them, and PPO against it. No verifier is needed.

Ziegler et al., arXiv 1909.08593; Stiennon et al., 2009.01325; InstructGPT, 2203.02155;
PPO: Schulman et al., 1707.06347; its details: Huang et al., 2403.17031. Three stages:

    1 preferences.jsonl   completions of the initial policy; which one an annotator prefers, y_w > y_l
    2 reward_model/       L = - mean log sigmoid( R(y_w) - R(y_l) ), R read at the last token
    3 final/              PPO on R_t = - beta log(pi_old / pi_ref)_t, plus R at the last token, with
                          a critic V:
                          delta_t = R_t + V_t+1 - V_t        A_t = delta_t + lambda A_t+1

In the one equation, grad L = - 1/Z sum mask weight grad log pi; against grpo.py:
    data    on-policy completions, G for each question
    weight  I_clip r A, where each token has an advantage, from the critic; whitened
    mask    the response, EOS included
    Z       all tokens of the global batch
The critic starts as the reward model and is fitted to the returns A + V. The policy sees no
verdict: only the simulated annotator knows the answers. Its `utility` is the gold reward.

    python rlhf_ppo.py                 # tiny world, minutes on 2 CPU cores: utility 1.5 -> 2.2
    python rlhf_ppo.py --annotator human --stop-after preferences   # you rank; --resume continues
    python rlhf_ppo.py --reward-model runs/rlhf_ppo/reward_model --output-dir runs/ppo
"""

import argparse
import time
from math import exp

import torch
import torch.nn.functional as F

import common.tokenization as tok
from common.logprob import token_logprobs
from common.plumbing import annotator, data, decoding, draws, evaluation, flags, memory, models, ranks, runs
from common.verifier import math_reward


# ---- arguments -------------------------------------------------------------------------
def parse_args(argv=None):
    parser = flags.Parser(__doc__)
    add = parser.add_argument_group("run").add_argument
    add("--output-dir", default="runs/rlhf_ppo", help="folder for logs, checkpoints and final/")
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
    add("--group-size", type=flags.integer(2), default=2, help="completions per question, G")
    text = "sequence: mean of means; token: mean of tokens; constant: sum / responses / budget"
    add("--loss-norm", choices=["sequence", "token", "constant"], default="token", help=text)
    add("--clip-low", type=flags.number(0, 1), default=0.2, help="ratios are at least 1 - this")
    add("--clip-high", type=flags.number(0), default=0.2, help="ratios are at most 1 + this")
    add("--kl-coef", type=flags.number(0), default=0.2, help="KL penalty to --model; 0: none")
    add("--epochs-per-batch", type=flags.integer(1), default=2, help="passes over the samples")
    add("--minibatches", type=flags.integer(1), default=1, help="updates per pass over samples")
    add("--stop-after", choices=["preferences", "reward", "ppo"], default="ppo", help="last stage")
    add("--preferences", help="data set with prompt, chosen, rejected; default: ranked samples")
    add("--preferences-split", default="train", help="split of --preferences")
    add("--annotator", choices=["simulated", "human"], default="simulated", help="who ranks samples")
    add("--preference-questions", type=flags.integer(1), default=3000, help="questions ranked")
    add("--slope", type=flags.number(0), default=2.0, help="annotator's precision; 0: random")
    add("--reward-model", help="folder or hub name of a reward model; runs stage 3 only")
    add("--reward-lr", type=flags.number(0, 1), default=flags.Rate(3e-4, 1e-5), help="lr of stage 2")
    add("--reward-epochs", type=flags.integer(1), default=2, help="passes over the pairs")
    add("--no-eos-score", type=flags.finite(-1e9), default=-2.0, help="of truncated responses")
    add("--value-clip", type=flags.number(0), default=0.2, help="clip to the old value +- this")
    add("--lam", type=flags.number(0, 1), default=0.95, help="GAE lambda; 0: trust the critic")
    add("--kl-target", type=flags.number(0), default=0.0, help="adapt --kl-coef to it; 0: off")
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


def preferences(model, tokenizer, rows, out, args):
    """Stage 1: pairs from --preferences or from ranked on-policy samples, a list per question."""
    if args.preferences:
        held_out = data.held_out(args)
        return load_pairs(args.preferences, args.preferences_split, "--preferences", args, held_out)
    torch.manual_seed(args.seed)  # a resumed run samples the same and draws the same noise
    rows = data.subset(rows, args.preference_questions, args.seed)
    path = out / "preferences.jsonl"
    ranked = [pair["row"] for pair in runs.read_jsonl(path)]
    first = 1 + max(ranked, default=-1)  # where a human stopped, ranking continues
    groups = rollout(model, tokenizer, rows, args)
    # ranking by slope x utility + Gumbel noise is Bradley-Terry for each pair
    noise = -(-torch.rand(len(groups), args.group_size).log()).log()
    for row in range(first, len(groups)):
        distinct = {}  # text -> completion
        for completion, luck in zip(groups[row], noise[row].tolist()):
            if not completion["truncated"]:
                distinct[completion["text"]] = completion | {"luck": luck}
        choices = list(distinct.values())
        ranking = sorted(choices, key=lambda c: -args.slope * c["utility"] - c["luck"])
        if args.annotator == "human":
            ranking = annotator.ask(choices)
        write_pairs(path, row, ranking, human=args.annotator == "human")
    return load_pairs(str(path), "train", "--annotator", args)


def write_pairs(path, row, ranking, human):
    """Save what a ranking of K completions of question `row` says at once: K (K - 1) / 2 pairs.

    The simulated annotator's utilities are saved, too. Where they are equal it would only toss
    a coin, so such pairs are left out.
    """
    pairs = []
    for i, chosen in enumerate(ranking):
        for rejected in ranking[i + 1 :]:
            has_text = chosen["text"].strip() and rejected["text"].strip()
            if has_text and (human or chosen["utility"] != rejected["utility"]):
                pair = {
                    "row": row,
                    "prompt": chosen["question"],
                    "chosen": chosen["text"],
                    "rejected": rejected["text"],
                }
                if not human:
                    pair["utility_chosen"] = chosen["utility"]
                    pair["utility_rejected"] = rejected["utility"]
                pairs.append(pair)
    runs.append(path, pairs)


def load_pairs(path, split, flag, args=None, test=()):
    """Pairs of a data set with columns prompt, chosen, rejected: a list for each prompt."""
    ranks.barrier()  # the first rank has written
    groups = {}
    for row in data.load_pairs(path, split, flag, args, test):
        groups.setdefault(row["prompt"], []).append(row)  # in the order of the file
    flags.demand(len(groups) > 1, f"{flag}: {path} has one prompt; none is left to hold out.")
    return list(groups.values())


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


@ranks.forward
def values(scorer, tokens):
    """The scalar at each position, [B, T]: a score of the tokens up to and including it."""
    # padding is on the right and no position is searched for: no attention mask, no pooling
    return models.read_scores(scorer, scorer.base_model(tokens, use_cache=False).last_hidden_state)


@torch.no_grad()
def all_values(scorer, tokens, response_mask, args):
    """`values` of a whole batch [N, T], in micro-batches and without gradient."""
    value = torch.zeros(tokens.shape, device=tokens.device)
    for rows, width in tok.micro_batches(response_mask, args.micro_batch_tokens, ranks.shard()):
        value[rows, width] = values(scorer, tokens[rows, width])
    return ranks.reduce(value)


def last_token(response_mask):
    """[B, T]: 1 at the last response token, EOS or not; from the mask, not from token ids."""
    count = response_mask.cumsum(1)
    return response_mask * (count == response_mask.sum(1, keepdim=True))


def at_end(value, response_mask):
    """The value at the last response token, [B]; value [B, T]."""
    return (value * last_token(response_mask)).sum(1)


def before(value, response_mask):
    """V_t, [B, T]: the value one position earlier, of the state in which y_t is chosen."""
    return F.pad(value[:, :-1], (1, 0)) * response_mask


# ---- the method ------------------------------------------------------------------------
def utility(tokenizer, text, gold):
    """What the simulated annotator likes: correct, with working, boxed, short."""
    working, boxed, _ = text.partition("\\boxed")
    digits = "".join(c if c.isdecimal() else " " for c in working)
    has_working = len(digits.split()) > 1  # two numbers before the answer
    length = len(tokenizer.encode(text, add_special_tokens=False))
    too_long = max(0, length - 48)
    correct = math_reward([text], [gold])[0]
    return 2 * correct + has_working + bool(boxed) / 2 - too_long / 50


def rollout(model, tokenizer, rows, args):
    """G completions of each question: a list of groups."""
    rows = [row for row in rows for _ in range(args.group_size)]
    questions = [row["question"] for row in rows]
    golds = [row["gold"] for row in rows]
    prompts = tok.encode_prompts(tokenizer, questions, args.prompt_template)
    stops = tok.stop_ids(tokenizer, model.config)
    responses, _ = sample(model, tokenizer, prompts, args.temperature, args)
    texts = tok.decode_responses(tokenizer, responses)

    completions = []
    for i in range(len(rows)):
        completion = {
            "prompt": prompts[i],
            "response": responses[i],
            "question": questions[i],
            "text": texts[i],
            "gold": golds[i],
            "utility": utility(tokenizer, texts[i], golds[i]),  # for annotator and log only
            "truncated": responses[i][-1] not in stops,
        }
        completions.append(completion)
    starts = range(0, len(completions), args.group_size)
    return [completions[i : i + args.group_size] for i in starts]


def advantages(rewards, how):
    """A_i of each completion from the rewards of its group, [Q, G]; equal rewards give A = 0."""
    centred = rewards - rewards.mean(1, keepdim=True)  # (G - 1) / G times leave-one-out
    if how == "dr_grpo":
        return centred
    return centred / (rewards.std(1, keepdim=True) + 1e-6)  # std divides by G - 1


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
    clipped = ratio.clamp(1 - args.clip_low, 1 + args.clip_high)
    # min: nothing is gained by moving the ratio out of the trust region
    surrogate = torch.min(ratio * advantage, clipped * advantage)
    # >= 0, and an unbiased estimate of KL(pi || pi_ref) on on-policy samples
    k3 = (ref_logp - logp).exp() - (ref_logp - logp) - 1
    loss = -((surrogate - args.kl_coef * k3) * response_mask * inv_z).sum()
    return loss, ratio.detach(), k3.detach()


def pair_loss(scores, z):
    """- 1/Z sum log sigmoid( R(y_w) - R(y_l) ), scores [B, 2]: Bradley-Terry's likelihood."""
    return -F.logsigmoid(scores[:, 0] - scores[:, 1]).sum() / z


def join_pairs(tokenizer, pairs, args, device):
    """tokens and response_mask [P, 2, T] of pairs: chosen and rejected response to a prompt."""
    prompts = tok.encode_prompts(tokenizer, [p["prompt"] for p in pairs], args.prompt_template)
    prompts = [prompt for prompt in prompts for _ in range(2)]
    texts = [pair[key] for pair in pairs for key in ("chosen", "rejected")]
    responses = [tok.encode_response(tokenizer, text) for text in texts]
    tokens, mask = tok.join(prompts, responses, device)
    return tokens.view(len(pairs), 2, -1), mask.view(len(pairs), 2, -1)


def fit_reward_model(model, tokenizer, groups, test, out, args):
    """Stage 2: the initial policy with a scalar head, fitted to pairs of 9 prompts in 10."""
    torch.manual_seed(args.seed)
    reward_model = models.load_scorer(args.model, tokenizer, args, new_head=True)
    held_out = [pair for group in groups[::10] for pair in group]  # by prompt, not by pair
    train = [group for i, group in enumerate(groups) if i % 10]
    optimizer = torch.optim.AdamW(reward_model.parameters(), lr=args.reward_lr, weight_decay=0.0)
    order = []  # of prompts, a batch for each step
    for _ in range(args.reward_epochs):
        order += torch.randperm(len(train)).split(args.batch_size)
    state = {"step": 0, "faults": 0, "stop": 0, "skipped": 0}
    for step in runs.steps(state, len(order)):
        optimizer.param_groups[0]["lr"] = args.reward_lr * (1 - (step - 1) / len(order))
        # all pairs of a prompt are in one batch, because they share completions
        pairs = [pair for i in order[step - 1] for pair in train[i]]
        tokens, mask = join_pairs(tokenizer, pairs, args, model.device)  # [P, 2, T]
        # a micro-batch holds whole pairs
        for rows, width in tok.micro_batches(mask.amax(1), args.micro_batch_tokens // 2, ranks.shard()):
            y = tokens[rows, :, width].flatten(0, 1)  # [2B, width]
            m = mask[rows, :, width].flatten(0, 1)
            scores = at_end(values(reward_model, y), m).view(-1, 2)  # [B, 2]
            pair_loss(scores, len(pairs)).backward()
        norm = ranks.clip_gradient(reward_model, torch.inf)  # not clipped
        if runs.finite(norm, state):
            optimizer.step()
        torch.clear_autocast_cache()  # bf16 copies of the weights before the update
        optimizer.zero_grad()

    tokens, mask = join_pairs(tokenizer, held_out, args, model.device)
    tokens, mask = tokens.flatten(0, 1), mask.flatten(0, 1)
    scores = at_end(all_values(reward_model, tokens, mask, args), mask).view(-1, 2)
    metrics = {"step": 0} | agreement(scores, held_out, args.slope)
    metrics |= evaluate_reward(model, model, reward_model, tokenizer, test, args)
    # the mean score of the initial policy becomes 0
    models.scalar_head(reward_model).bias.data -= metrics["eval_score"]
    runs.log(out, metrics)
    runs.save_model(out / "reward_model", reward_model, tokenizer)


def gae(rewards, value, response_mask, lam):
    """Advantages A_t and returns A_t + V_t from rewards and values of tokens; all [N, T]."""
    advantage = torch.zeros_like(rewards)
    next_advantage, next_value = 0.0, 0.0  # nothing follows the last token
    for t in reversed(range(rewards.shape[1])):  # gamma is 1
        delta = rewards[:, t] + next_value - value[:, t]  # [N]
        next_advantage = (delta + lam * next_advantage) * response_mask[:, t]
        next_value = value[:, t] * response_mask[:, t]
        advantage[:, t] = next_advantage
    return advantage, advantage + value


def value_loss(value, old_value, returns, response_mask, inv_z, clip):
    """Half the squared error to the returns: of V or of V clipped near its old value, the larger."""
    near = old_value + (value - old_value).clamp(-clip, clip)  # as clip(r) for the policy
    error = torch.max((value - returns) ** 2, (near - returns) ** 2)  # [B, T]
    return 0.5 * (error * response_mask * inv_z).sum()


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


def evaluate_reward(model, reference, reward_model, tokenizer, rows, args):
    """On held-out questions: proxy reward, gold reward, and KL from the reference."""
    torch.manual_seed(args.seed)  # the same draws at every evaluation
    batch = [c for group in rollout(model, tokenizer, rows, args) for c in group]
    tokens, mask = tok.join([c["prompt"] for c in batch], [c["response"] for c in batch], model.device)
    logp, _ = score(model, tokens, mask, args)  # [N, T]
    ref_logp, _ = score(reference, tokens, mask, args)
    scores = at_end(all_values(reward_model, tokens, mask, args), mask)  # [N]
    return {
        "eval_score": scores.mean(),
        "eval_utility": sum(c["utility"] for c in batch) / len(batch),
        "eval_kl": (logp - ref_logp).sum() / len(batch),  # per response
    }


def agreement(scores, pairs, slope):
    """Accuracy of scores [P, 2] on held-out pairs, its upper bound, and accuracy by confidence.

    The bound is E[sigmoid(slope |gap|)]: what a judge reaches who knows the utilities, because the
    labels are noisy. Confidence is sigmoid(|score difference|).
    """
    margins = scores[:, 0] - scores[:, 1]  # [P]
    agree = margins > 0  # with the label
    metrics = {"pair_accuracy": agree.sum().item() / len(agree)}
    utilities = [(pair.get("utility_chosen"), pair.get("utility_rejected")) for pair in pairs]
    if not any(None in both for both in utilities):
        bounds = [1 / (1 + exp(-slope * abs(u - v))) for u, v in utilities]
        metrics["pair_accuracy_max"] = sum(bounds) / len(bounds)
    confidence = margins.abs().sigmoid()
    tenths = (10 * confidence).int().clamp(max=9)  # [P]
    for n in tenths.unique().tolist():
        part = agree[tenths == n]
        print(f"  {len(part):4} pairs with confidence 0.{n}: accuracy {part.float().mean():.2f}")
    return metrics


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
    train, test = data.load_splits(args, no_gold=args.annotator == "human")
    data.check_sources(args)  # refuse what cannot be read before sampling, not after it
    torch.manual_seed(args.seed)
    out, state, model, tokenizer = runs.open_run(args)
    reference, _ = models.load_model(args.model)  # pi_ref, frozen
    order = data.shuffled_batches(len(train), args.steps, args.batch_size)  # of row numbers
    new_head = not args.reward_model  # its weights come below, from the reward model of stage 2
    critic = models.load_scorer(args.reward_model or args.model, tokenizer, args, new_head)
    both = [*model.parameters(), *critic.parameters()]  # two networks, one AdamW
    optimizer = torch.optim.AdamW(both, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    # bf16 for activations only: weights and Adam's moments stay fp32
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=args.dtype == "bf16")
    if args.resume:
        optimizer.load_state_dict(state.pop("optimizer"))
    else:
        with autocast:
            self_check(model, tokenizer, test, args)
            first = evaluate(model, tokenizer, test, args) if args.eval_first == "on" else {}
            runs.log(out, {"step": 0, "unparseable_gold": args.unparseable_gold} | first)
            if args.reward_model and args.eval_first == "on":  # as stage 2 does; R is still the critic
                first = evaluate_reward(model, reference, critic, tokenizer, test, args)
                runs.log(out, {"step": 0} | first)
                flags.check_mean_score(first["eval_score"], args)
        runs.save_model(out / "checkpoint-000000", model, tokenizer, optimizer, state)
    if not args.reward_model and "fitted" not in state:
        with autocast:
            groups = preferences(model, tokenizer, train, out, args)
            if args.stop_after != "preferences":
                fit_reward_model(model, tokenizer, groups, test, out, args)
                state["fitted"] = True
        runs.save_model(out / "checkpoint-000000", model, tokenizer, optimizer, state)  # with its log
    if args.stop_after != "ppo":
        return runs.finish(out, args)
    reward_model = models.load_scorer(args.reward_model or out / "reward_model", tokenizer, args)
    critic.load_state_dict(state.get("critic", reward_model.state_dict()))  # starts as R
    state |= {"critic": critic.state_dict(), "kl_coef": state.get("kl_coef", args.kl_coef)}
    # in PPO the KL penalty is in the reward, not in the loss
    loss_args = argparse.Namespace(**(vars(args) | {"kl_coef": 0.0}))
    size = args.batch_size * args.group_size  # completions per step, N
    updates = args.epochs_per_batch * args.minibatches  # optimizer steps per step
    print(f"one step: {args.batch_size} x {args.group_size} completions, {updates} updates")

    for step in runs.steps(state, args.steps):
        began = time.time()
        torch.manual_seed(args.seed * 10**6 + step)  # a resumed run repeats its draws
        lr = runs.learning_rate(step, args)  # warm-up, then --schedule
        optimizer.param_groups[0]["lr"] = lr

        # sample and score
        with autocast:
            groups = rollout(model, tokenizer, train.select(order[step - 1]), args)
        batch = [completion for group in groups for completion in group]
        prompts = [c["prompt"] for c in batch]
        responses = [c["response"] for c in batch]
        tokens, mask = tok.join(prompts, responses, model.device)  # [N, T]
        with autocast:
            old_logp, _ = score(model, tokens, mask, args)  # [N, T]
            ref_logp, _ = score(reference, tokens, mask, args)
            rewards = at_end(all_values(reward_model, tokens, mask, args), mask)  # R(x, y), [N]
            old_value = before(all_values(critic, tokens, mask, args), mask)  # V_t, [N, T]
        rewards[[c["truncated"] for c in batch]] = args.no_eos_score
        batch = [c | {"reward": r} for c, r in zip(batch, rewards.tolist())]  # for samples.jsonl
        log_ratio = old_logp - ref_logp
        reward_t = rewards[:, None] * last_token(mask) - state["kl_coef"] * log_ratio  # [N, T]
        advantage, returns = gae(reward_t, old_value, mask, args.lam)
        on = mask.bool()
        # whitened over the whole batch: one group of all its tokens
        advantage[on] = advantages(advantage[on].view(1, -1), "grpo")[0]
        sampling_ended = time.time()

        # train
        minibatches = []
        for _ in range(args.epochs_per_batch):
            minibatches += torch.randperm(size).tensor_split(args.minibatches)
        inv_z = torch.zeros(mask.shape, device=model.device)  # 1/Z beside each A, [N, T]
        losses, norms, stats = [], [], []
        for minibatch in minibatches:
            inv_z[minibatch] = inverse_z(mask[minibatch], args.loss_norm, args.max_new_tokens)
            rows = minibatch.tolist()
            for micro in tok.micro_batches(mask, args.micro_batch_tokens, ranks.shard(), rows):
                y = tokens[micro]  # [B, width]
                m = mask[micro]
                with autocast:
                    logp, entropy = logprobs(model, y, m, args.temperature)
                    value = before(values(critic, y), m)
                # with a single update pi_old is pi, so r = 1
                old = old_logp[micro] if updates > 1 else logp.detach()
                A, inv = advantage[micro], inv_z[micro]  # inv: 1/Z
                loss, ratio, k3 = policy_loss(logp, old, ref_logp[micro], A, m, inv, loss_args)
                loss += value_loss(value, old_value[micro], returns[micro], m, inv, args.value_clip)
                loss.backward()
                losses.append(loss.item() / updates)  # their sum is the mean over updates
                per_token = torch.stack([entropy.detach(), k3, ratio])
                stats.append(per_token[:, m.bool()].cpu())  # [3, tokens]
            critic_norm = ranks.clip_gradient(critic, torch.inf)  # not clipped
            norm = ranks.clip_gradient(model, args.max_grad_norm)  # summed, as Z is global
            if runs.finite(norm + critic_norm, state):  # else the update is skipped
                optimizer.step()
            optimizer.zero_grad()
            norms.append(norm)
        losses, stats = ranks.gather(losses), ranks.gather(stats)
        tokens_trained = sum(x.shape[1] for x in stats)

        # log, evaluate, save
        nothing = torch.tensor([[0.0], [0.0], [1.0]])  # no row had a gradient
        entropy, k3, ratio = torch.cat(stats or [nothing], 1)
        clipped = (ratio < 1 - args.clip_low) | (ratio > 1 + args.clip_high)
        kl = log_ratio.sum().item() / size  # per response; may be below 0
        error = (returns - old_value)[on]  # of the critic, [tokens]
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
            "value_loss": error.square().mean() / 2,
            "utility": sum(c["utility"] for c in batch) / size,
            "kl_response": kl,
            "explained_variance": 1 - error.var() / returns[on].var(),
            "kl_coef": state["kl_coef"],
        }
        if args.kl_target:  # Ziegler et al.: a proportional controller
            state["kl_coef"] *= 1 + 0.1 * max(-0.2, min(0.2, kl / args.kl_target - 1))
        if step == args.steps or (args.eval_every and step % args.eval_every == 0):
            with autocast:
                metrics |= evaluate(model, tokenizer, test, args)
                metrics |= evaluate_reward(model, reference, reward_model, tokenizer, test, args)
        runs.log(out, metrics, batch[:2])
        if runs.due(state, args.save_every):
            runs.save_model(out / f"checkpoint-{step:06}", model, tokenizer, optimizer, state)
    runs.save_model(out / "final", model, tokenizer)
    runs.finish(out, args)


if __name__ == "__main__":
    main(parse_args())
