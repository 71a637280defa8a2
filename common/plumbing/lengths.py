"""Lengths: what must fit into the positions of the model, and what a budget truncates."""

from common.plumbing import configs, examples
from common.plumbing.flags import demand
from common.tokenization import encode_prompts, encode_response

# ---- positions -------------------------------------------------------------------------------------------


def check_rows(rows, name, args, demonstrations=False):
    """Each question fits with the budget of new tokens, and with its demonstration if that is trained."""
    solutions = rows["solution"] if demonstrations else [None] * len(rows)
    check(rows["question"], solutions, name, args, args.max_new_tokens)


def check_pairs(rows, name, args):
    """Each prompt fits with either of its responses."""
    for column in ("chosen", "rejected"):
        check(rows["prompt"], rows[column], name, args, 0)


def check(questions, responses, name, args, budget):
    """Each question, `budget` new tokens and a response (or None) must fit into the model's positions.

    A row is encoded only where that is in question: a token stands for at least one byte.
    """
    config = configs.load_config(args)
    tokenizer = configs.load_tokenizer(args)
    positions = configs.max_positions(config)
    frame = examples.frame(tokenizer, args)
    longest = getattr(args, "max_demo_tokens", None)  # responses to train on are truncated to it
    for i, (question, response) in enumerate(zip(questions, responses)):
        most = budget
        if response:
            most = max(budget, len(response.encode()) + 1)  # + 1: EOS
        if len(frame) + len(question.encode()) + most <= positions:
            continue
        [prompt] = encode_prompts(tokenizer, [question], args.prompt_template)
        most = budget
        lower = ["--max-new-tokens"] if budget else []
        if response:
            most = max(budget, len(encode_response(tokenizer, response)[:longest]))
            lower += ["--max-demo-tokens"] if longest else []
        need = f"{len(prompt)} tokens of prompt and {most} of response"
        remedy = f"lower {' or '.join(lower)}, or remove the row" if lower else "remove the row"
        demand(
            len(prompt) + most <= positions,
            f"{name}, row {i}: {need} exceed the model's {positions} positions; {remedy}.",
        )


# ---- budgets ---------------------------------------------------------------------------------------------


def check_budget(rows, args):
    """Say how many demonstrations are longer than the budget, and what becomes of them."""
    hybrid = examples.has_hybrids(args)
    if not hybrid and "max_demo_tokens" not in args:
        return rows  # nothing is trained on them: a teacher reads them
    most = args.max_new_tokens if hybrid else args.max_demo_tokens
    flag = "--max-new-tokens" if hybrid else "--max-demo-tokens"
    tokenizer = configs.load_tokenizer(args)
    solutions = list(rows["solution"])
    long = [i for i, text in enumerate(solutions) if text and examples.is_longer(tokenizer, text, most)]
    if not long:
        return rows
    count = sum(text is not None for text in solutions)
    share = f"{len(long):,} of {count:,} demonstrations ({len(long) / count:.0%})"
    if not hybrid:
        print(f"{share} exceed {flag} {most}: they are trained up to there, without EOS")
        return rows
    # a hybrid that cannot reach its end is never correct: it would be unlearnt
    print(f"{share} exceed {flag} {most}: their questions have on-policy completions only")
    for i in long:
        solutions[i] = None
    return rows.remove_columns("solution").add_column("solution", solutions)
