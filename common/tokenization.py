"""Text, token ids and masks: prompts and responses as ids, padding, micro-batches. Tokens and nothing else.

Four rules, each of which prevents a bug that keeps coming back in this field:

1. Prompt and response are encoded separately and joined as ids. No token straddles the
   boundary, and masks are exact.
2. EOS is part of the response: it is sampled, scored and trained on. A model that never has
   EOS as a target never learns to stop.
3. Masks come from lengths, never from comparing ids with the pad id. For many models pad *is*
   EOS.
4. Scoring pads on the right, where causal attention does not look. Only sampling pads on the
   left.
"""

import torch

# ---- text -> ids -----------------------------------------------------------------------------------------


def encode_prompts(tokenizer, questions, template="{question}"):
    """For each question, the ids of everything before the first response token.

    `template` wraps the question ("{question} Box the answer."). It is filled in by
    replacement and not by str.format, because LaTeX is full of braces. A model without a chat
    template gets a plain prompt that ends in a newline: then a response is tokenised as in
    running text without a leading space.
    """
    texts = [template.replace("{question}", question) for question in questions]
    if tokenizer.chat_template is None:
        encoded = [tokenizer.encode(f"Question: {text}\nAnswer:\n") for text in texts]
        return [without_end(tokenizer, ids) for ids in encoded]
    prompts = []
    for text in texts:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_dict=False,
        )
        prompts.append(ids)
    return prompts


def without_end(tokenizer, ids):
    """The ids without special ones at their end. Some tokenizers append EOS, which ends no prompt."""
    special = set(tokenizer.all_special_ids)
    while ids and ids[-1] in special:
        ids = ids[:-1]
    return ids


def encode_response(tokenizer, text):
    """The ids of a demonstration, EOS included."""
    return tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]


def decode_responses(tokenizer, responses):
    """The texts of responses without EOS, exactly as the verifier and `samples.jsonl` see them."""
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]


def stop_ids(tokenizer, config):
    """Every id that ends a response: the tokenizer's EOS and the model config's (Llama 3 has three)."""
    candidates = [tokenizer.eos_token_id, *as_list(config.get_text_config().eos_token_id)]
    return sorted({token for token in candidates if token is not None})


def as_list(ids):
    """EOS ids in a config are None, a number or a list."""
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]


# ---- ids -> tensors --------------------------------------------------------------------------------------


def truncate(ids, stops, budget):
    """A response ends with its first EOS or at the budget, whichever comes first."""
    for i, token in enumerate(ids[:budget]):
        if token in stops:
            return ids[: i + 1]
    return ids[:budget]


def pad(rows, side="right", device=None):
    """Ragged lists of ids -> tokens [B, T] int64 and attention_mask [B, T], which is 1 on real tokens.

    Nothing ever reads the pad id (rule 3), so any valid id will do. Every vocabulary has a 0.
    """
    width = max(map(len, rows), default=0)
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    attention_mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        start = 0 if side == "right" else width - len(row)
        tokens[i, start : start + len(row)] = torch.tensor(row, dtype=torch.int64)
        attention_mask[i, start : start + len(row)] = 1
    return tokens.to(device), attention_mask.to(device)


def join(prompts, responses, device=None):
    """Prompt + response, right-padded: tokens [B, T] and response_mask [B, T], 1 on response and EOS."""
    rows = [list(prompt) + list(response) for prompt, response in zip(prompts, responses)]
    tokens, response_mask = pad(rows)
    for i, prompt in enumerate(prompts):
        response_mask[i, : len(prompt)] = 0  # what remains of the attention mask is the response
    return tokens.to(device), response_mask.to(device)


def align(values, response_mask):
    """Ragged lists with one number per response token -> [B, T], each at the position of its token."""
    grid = torch.zeros(response_mask.shape)
    grid[response_mask.bool()] = torch.tensor([value for row in values for value in row])
    return grid


def micro_batches(response_mask, max_tokens, shard=(0, 1), rows=None):
    """Split a batch into micro-batches of at most `max_tokens` padded tokens.

    Returns indices (rows, columns): `tokens[micro]` of a batch [N, T] is [B, width]. Rows of similar length
    go together, so there is little padding, and `width` ends at the last response token of the longest row.
    A row longer than `max_tokens` is a micro-batch of its own; a row without response tokens is left out.
    `rows` are the row numbers to split, by default all. `shard` is (rank, world size): each rank takes every
    n-th row, so that all ranks have the same mix of lengths. All get equally many micro-batches, because a
    forward pass is one of all ranks together; the last ones of a rank may be empty. Every script divides by
    a normaliser of the global batch, so how the batch is split never changes a gradient.
    """
    rank, world_size = shard
    index = torch.arange(1, response_mask.shape[1] + 1, device=response_mask.device)
    end = (response_mask * index).amax(1).tolist()  # of each row: its last response token + 1
    rows = range(len(end)) if rows is None else rows
    longest_first = sorted((i for i in rows if end[i]), key=lambda i: -end[i])
    dealt = []  # to each rank
    for first in range(world_size):
        batch, batches = [], []
        for i in longest_first[first::world_size]:
            width = end[batch[0]] if batch else end[i]  # the first row is the longest
            if not batch or width * (len(batch) + 1) > max_tokens:
                batch = []
                batches.append(batch)
            batch.append(i)
        dealt.append(batches)
    mine = [(batch, slice(end[batch[0]])) for batch in dealt[rank]]
    missing = max(map(len, dealt)) - len(mine)
    return mine + [([], slice(1))] * missing


# ---- ids -> text, inside of a recorded step --------------------------------------------------------------


def spelling(tokenizer, vocabulary, text):
    """A table that tells whether a response contains `text`, without decoding it: [len(text) + 1, V].

    From n, the number of characters of `text` that a response ends with, and its next token: table[n, token]
    is the new n. Once all of the text has occurred, n stays at len(text). A step that a GPU replays cannot
    stop to decode tokens; it can look up a table.
    """
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    pieces += [""] * (vocabulary - len(pieces))  # a model may have more rows than its tokenizer has ids
    table = []
    for n in range(len(text)):
        row = []
        for piece in pieces:
            end = text[:n] + (piece or "")  # a tokenizer may have ids without a token
            matched = [k for k in range(len(text)) if end.endswith(text[:k])]
            row.append(len(text) if text in end else max(matched))
        table.append(row)
    table.append([len(text)] * len(pieces))
    return torch.tensor(table)
