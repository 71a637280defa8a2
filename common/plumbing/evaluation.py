"""Evaluation: accuracy, pass@k and verdict counts of held-out questions; the check before training."""

from math import comb

from common.plumbing import flags
from common.tokenization import decode_responses, stop_ids
from common.verifier import extract_answer

HIGH = 0.2  # a share of truncated responses above which more tokens are worth a hint


def pass_at_k(correct, n, k):
    """The mean of 1 - C(n - c, k) / C(n, k) over questions with c correct of n samples.

    It is the unbiased estimate of the share of questions that k samples solve (Chen et al.,
    2107.03374).
    """
    missed = [comb(n - c, k) / comb(n, k) for c in correct]
    return 1 - sum(missed) / len(missed)


def report(model, tokenizer, rows, responses, judge, args):
    """What an evaluation logs: `verdict_counts`, and as `completions` its texts, for samples.jsonl.

    responses: the greedy ones to all questions first, then rounds of samples; `judge` is
    math_reward.
    """
    rounds = len(responses) // len(rows)
    texts = decode_responses(tokenizer, responses)
    questions, golds = list(rows["question"]) * rounds, list(rows["gold"]) * rounds
    verdicts = judge(texts, golds)
    levels = rows["level"] if "level" in rows.column_names else [None] * len(rows)
    metrics = verdict_counts(texts, verdicts, levels)

    stops = stop_ids(tokenizer, model.config)
    metrics["completions"] = []
    for i, text in enumerate(texts):
        completion = {
            "kind": "evaluation",
            "question": questions[i],
            "text": text,
            "gold": golds[i],
            "correct": verdicts[i],
            "truncated": responses[i][-1] not in stops,
            "temperature": 0.0 if i < len(rows) else args.eval_temperature,
        }
        metrics["completions"].append(completion)
    share = sum(c["truncated"] for c in metrics["completions"]) / len(texts)
    if share:
        hint = "; raise it, an answer that is cut off is rarely correct" if share > HIGH else ""
        print(f"{share:.0%} of the responses were truncated at --max-new-tokens {args.max_new_tokens}{hint}")
    return metrics


def verdict_counts(texts, verdicts, levels):
    """Greedy accuracy and pass@k of held-out questions, overall and for each level, and counts of verdicts.

    texts, verdicts: the greedy responses to all Q questions first, then n rounds of samples,
    (1 + n) Q in all. levels: Q, None where a question has none.
    """
    levels = [None if level is None else str(level) for level in levels]
    metrics = scores(verdicts, len(levels), range(len(levels)))
    no_answer = sum(extract_answer(text) is None for text in texts)
    metrics["correct"] = int(sum(verdicts))
    metrics["incorrect"] = len(verdicts) - metrics["correct"] - no_answer
    metrics["no_answer"] = no_answer
    metrics["levels"] = {}
    for level in sorted(set(levels) - {None}):
        rows = [i for i, other in enumerate(levels) if other == level]
        metrics["levels"][level] = scores(verdicts, len(levels), rows)
    return metrics


def scores(verdicts, questions, rows):
    """Accuracy and pass@k, k = 1, 2, 4, ..., of the questions numbered `rows`, out of so many `questions`."""
    n = len(verdicts) // questions - 1  # samples of a question, the greedy response aside
    metrics = {"accuracy": sum(verdicts[i] for i in rows) / len(rows)}
    correct = [int(sum(verdicts[i + questions :: questions])) for i in rows]
    for k in (2**j for j in range(n.bit_length())):
        metrics[f"pass@{k}"] = pass_at_k(correct, n, k)
    return metrics


def check_ratio(ratio, mask, args):
    """Demand that sampling and scoring are one distribution: pi / pi_sampled [B, T] is 1 on samples."""
    gap = (ratio - 1).abs()
    tokens = int(mask.sum())
    print(f"self-check: max |ratio - 1| = {gap.max():.0e} on {tokens} sampled tokens")
    # the mean, because one token of many thousand may be far off by rounding alone
    limit = 1e-4 if args.dtype == "fp32" else 0.1  # bf16 has 3 digits
    sentence = "its log-probabilities in sampling and in scoring disagree: its logits are not hidden states"
    sentence += " times the weights of its head, or depend on padding; use another model."
    flags.demand(gap.sum() < limit * tokens, f"--model {args.model}: {sentence}")


def show(tokenizer, prompt, response):
    """Print one example as it is trained, the trained part in brackets."""
    text = f"{tokenizer.decode(prompt)}[{tokenizer.decode(response)}]"
    print(f"one sample, the trained part in brackets:\n{text}")
