"""Examples: prompts and demonstrations as ids, looked at once before training.

What is wrong with them is silent later: a prompt without its question, an EOS in the middle
of a demonstration, a tag that is opened twice, a pair that is equal where it is cut off.
"""

import re

from common.plumbing import configs
from common.plumbing.flags import BadInput, demand, one_line
from common.tokenization import encode_prompts, encode_response

ENDS = "ends a response"  # of the reasons in `special_texts`, that of a text of EOS

# ---- what no text may hold -------------------------------------------------------------------------------


def cleaned(rows, name, args):
    """Rows of questions and solutions without what ids would make of them: see `clean`."""
    tokenizer, config = configs.load_tokenizer(args), configs.load_config(args)
    marks = special_texts(tokenizer, config, args)
    check_texts(rows["question"], f"--question-key {args.question_key}", name, tokenizer, marks)
    if "solution" in rows.column_names:
        column = f"--solution-key {args.solution_key}"
        solutions = clean(rows["solution"], column, name, tokenizer, marks, args)
        tell_annotations(solutions, column, name)
        solutions = [text if text and text.strip() else None for text in solutions]  # None: not demonstrated
        rows = rows.remove_columns("solution").add_column("solution", solutions)
    return rows


def special_texts(tokenizer, config, args):
    """Texts that the tokenizer reads as one id: {text: why it may not be inside a prompt or a response}."""
    rows = config.get_text_config().vocab_size  # of the embedding
    size = f"--model {args.model}: its tokenizer has ids beyond its embedding of {rows:,} rows"
    remedy = "resize the embedding with resize_token_embeddings and save the model again"
    outside = {token for token, i in tokenizer.get_vocab().items() if i >= rows}
    demand(outside <= {*tokenizer.get_added_vocab()}, f"{size}; {remedy}.")
    texts = {token: f"is an id beyond the embedding of {rows:,} rows; {remedy}" for token in outside}
    for i in configs.all_stop_ids(tokenizer, config, args):
        demand(i < rows, f"{size}, among them {i}, which ends a response; {remedy}.")
        texts[tokenizer.decode([i])] = ENDS
    return texts


def check_texts(texts, column, name, tokenizer, marks):
    """Demand that no text holds one of the marks, as an id."""
    for i, text in enumerate(texts):
        for mark, reason in marks.items():
            if mark and text and mark in text:
                ids = tokenizer.encode(text, add_special_tokens=False)
                is_read = tokenizer.convert_tokens_to_ids(mark) in ids
                remedy = "; remove it from the text" if reason == ENDS else ""
                demand(not is_read, f"{name}, row {i}: {column} holds {mark}, which {reason}{remedy}.")


def clean(texts, column, name, tokenizer, marks, args):
    """Responses without an EOS at their end, which is added anyway, and without the tag that opens them.

    Some chat templates open <think> in the prompt. An EOS anywhere else is refused.
    """
    stops = [mark for mark, reason in marks.items() if mark.strip() and reason == ENDS]
    tag, space = opened_tag(tokenizer, args)
    found, ended, twice = [], 0, 0
    for text in texts:
        bare = text
        while bare and bare.rstrip().endswith(tuple(stops)):
            bare = bare.rstrip()
            bare = next(bare.removesuffix(mark) for mark in stops if bare.endswith(mark))
        ended += bare != text
        if tag and bare and bare.lstrip().startswith(tag):
            bare = bare.lstrip().removeprefix(tag)
            bare = bare.removeprefix(space)
            twice += 1
        found.append(bare)
    if ended:
        print(f"{name}: {ended:,} rows of {column} end in the text of EOS, which is added anyway: left out")
    if twice:
        print(f"{name}: {twice:,} rows of {column} begin with {tag}, which the prompt has opened: left out")
    check_texts(found, column, name, tokenizer, marks)
    return found


def tell_annotations(texts, column, name):
    """Say that texts hold a calculator's annotations, as GSM8K's do: <<48/2=24>>."""
    found = [match[0] for text in texts if text and (match := re.search(r"<<[^<>\s]*=[^<>\s]*>>", text))]
    if found:
        sentence = f"hold annotations of a calculator, such as {found[0]}, and are trained with them"
        print(f"{name}: {len(found):,} rows of {column} {sentence}")


def opened_tag(tokenizer, args):
    """The tag that ends every prompt, such as <think>, and the space after it; "" without one."""
    text = tokenizer.decode(frame(tokenizer, args))
    tag = re.search(r"(<[A-Za-z|][^<>\s]*>|\[[A-Z_]+\])(\s*)$", text)
    return tag.groups() if tag else ("", "")


def frame(tokenizer, args):
    """The ids of a prompt without a question."""
    try:
        [ids] = encode_prompts(tokenizer, [""], args.prompt_template)
    except Exception as error:
        reason = f"its chat template does not accept a question ({one_line(error)})"
        remedy = "use another one, or --chat-template off"
        raise BadInput(f"--model {args.model}: {reason}; {remedy}.") from None
    return ids


# ---- one look --------------------------------------------------------------------------------------------


def look(rows, name, args, show=True):
    """Check the ids of one prompt: the first, or with `show` the first demonstrated one, which is printed."""
    tokenizer, config = configs.load_tokenizer(args), configs.load_config(args)
    frame(tokenizer, args)
    row = 0
    if show and "solution" in rows.column_names:
        row = next((i for i, text in enumerate(rows["solution"]) if text), 0)
    question = rows[row]["question"]
    [prompt] = encode_prompts(tokenizer, [question], args.prompt_template)
    shown = tokenizer.decode(prompt)
    asked = [question, tokenizer.decode(tokenizer.encode(question, add_special_tokens=False))]
    has_question = any(letters(text) in letters(shown) for text in asked)
    remedy = "use another one, or --chat-template off"
    sentence = f"its chat template leaves the question out (a prompt is {shown[:200]!r}); {remedy}."
    demand(has_question, f"--model {args.model}: {sentence}")
    rows_of_embedding = config.get_text_config().vocab_size
    outside = [i for i in prompt if i >= rows_of_embedding]
    sentence = f"a prompt has {tokenizer.decode(outside[:1])}, an id beyond the embedding; resize it."
    demand(not outside, f"--model {args.model}: {sentence}")
    sentence = f"its prompts end in {tokenizer.decode(prompt[-1:])}, which ends a response; {remedy}."
    demand(not ends(tokenizer, config, prompt, question, args), f"--model {args.model}: {sentence}")
    if show and "solution" in rows.column_names and rows[row]["solution"]:
        response = tokenizer.decode(encode_response(tokenizer, rows[row]["solution"]))
        print(f"{name}, row {row}, the demonstration in brackets:\n{shortened(shown)}[{shortened(response)}]")


def ends(tokenizer, config, prompt, question, args):
    """Whether a prompt ends as a response does, with nothing that begins one.

    Phi-3 lists <|assistant|>, with which its prompts end, among the ids that end a response.
    """
    if prompt[-1] == tokenizer.eos_token_id:
        return True
    if prompt[-1] not in configs.all_stop_ids(tokenizer, config, args) or not tokenizer.chat_template:
        return False
    text = args.prompt_template.replace("{question}", question)
    return prompt == tokenizer.apply_chat_template([{"role": "user", "content": text}], return_dict=False)


def shortened(text, most=1500):
    """The beginning and the end of a text for the screen."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def letters(text):
    """The letters and digits of a text: whatever else a tokenizer or template changes."""
    return "".join(c for c in text.casefold() if c.isalnum())


# ---- demonstrations --------------------------------------------------------------------------------------


def demonstrated(rows, args, required):
    """The training rows with a demonstration; all of them, if a row may do without one."""
    kept = [i for i, text in enumerate(rows["solution"]) if text]
    name = f"--solution-key {args.solution_key}"
    demand(kept, f"{name}: not one training row has a demonstration; name another column.")
    if len(kept) == len(rows):
        return rows
    share = f"{len(rows) - len(kept):,} of {len(rows):,} training rows have no demonstration ({name})"
    if not required:
        print(f"{share}: all their completions are on-policy")
        return rows
    print(f"{share}: they are left out")
    return rows.select(kept)


def has_hybrids(args):
    """Whether completions begin with demonstrations: those of prefix_rft.py and luffy.py."""
    return "demo_fraction" in args and getattr(args, "prefix_schedule", "") != "none"


def is_longer(tokenizer, text, most):
    """Whether a response has more ids than `most`; a token stands for at least one byte."""
    return len(text.encode()) + 1 > most and len(encode_response(tokenizer, text)) > most


def distinct_pairs(rows, flag, name, args):
    """Cleaned pairs without those whose responses are equal, also where --max-demo-tokens ends them."""
    tokenizer, config = configs.load_tokenizer(args), configs.load_config(args)
    marks = special_texts(tokenizer, config, args)
    check_texts(rows["prompt"], "column prompt", name, tokenizer, marks)
    both = {}
    for column in ("chosen", "rejected"):
        both[column] = clean(rows[column], f"column {column}", name, tokenizer, marks, args)
        rows = rows.remove_columns(column).add_column(column, both[column])
    most = getattr(args, "max_demo_tokens", None)
    kept, long = [], 0
    for i, (chosen, rejected) in enumerate(zip(both["chosen"], both["rejected"])):
        equal = chosen == rejected
        if most:
            longer = [is_longer(tokenizer, text, most) for text in (chosen, rejected)]
            long += sum(longer)
            if all(longer):
                ids = [encode_response(tokenizer, text)[:most] for text in (chosen, rejected)]
                equal = ids[0] == ids[1]
        if not equal:
            kept.append(i)
    where = f" within --max-demo-tokens {most}" if most else ""
    if long:
        share = f"{long:,} of {2 * len(rows):,} responses ({long / len(rows) / 2:.0%})"
        print(f"{name}: {share} exceed --max-demo-tokens {most}: they are trained up to there, without EOS")
    demand(kept, f"{flag}: {name} has no pair whose responses differ{where}.")
    if len(kept) < len(rows):
        dropped = len(rows) - len(kept)
        print(f"{name}: {dropped:,} of {len(rows):,} pairs do not differ{where}: they are left out")
    return rows.select(kept)
