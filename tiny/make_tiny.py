"""Make the tiny world that every script runs in by default: its data and a model of 0.9 M parameters.

Post-training needs a pre-trained model. This file makes one, in these stages:

    data         train / test / harder / side as jsonl, with reliable and unreliable demonstrations, and
                 few_16 / few_64, parts of train with few of them (world.py)
    tokenizer    byte-level BPE over a sample of the pre-training documents, one token per digit
    pretrain     stage 1 teaches skills, stage 2 the (bad) habits that post-training is meant to change; then
                 the export as an ordinary Hugging Face model folder, which is read back and compared
    preferences  pairs sampled from the model, labelled by a simulated annotator
    datasheet    what the model can do before any post-training, measured and written into README.md

    python tiny/make_tiny.py                       # everything; an interrupted pre-training continues
    python tiny/make_tiny.py --stages data         # only some of it
"""

import argparse
import math
import random
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # so that `python tiny/make_tiny.py` finds common/
from common.verifier import verify  # noqa: E402
from tiny.world import HINT, STAGES, document, held_out, make_data, read_jsonl, write_jsonl  # noqa: E402

EOS, PAD = "<|endoftext|>", "<|pad|>"
BATCH, CHUNK = 16, 8  # documents per batch; batches that are drawn, sorted by length and split together
WARMUP, PROMPT_WEIGHT = 50, 0.05

# -- tokenizer --------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ 'Question: ' + m['content'] + '\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'Answer:' + m['content'] + eos_token + '\n' }}"
    "{% else %}{{ m['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)


def render(message):
    return f"Question: {message}\nAnswer:"  # what the chat template makes of one user message


def make_tokenizer(folder, taken):
    tok = Tokenizer(models.BPE())
    # A digit is one token (two forms: with and without its space), so every number is spelled the same way.
    split = pre_tokenizers.Split(Regex(r" ?\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s"), behavior="isolated")
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes: any text can be encoded
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        min_frequency=2,
        special_tokens=[EOS, PAD],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    rng = random.Random("tokenizer")
    docs = [document(rng, STAGES[0], taken) for _ in range(4000)]
    tok.train_from_iterator([render(message) + response for message, response in docs], trainer)
    fast = FastTokenizer(tokenizer_object=tok, eos_token=EOS, pad_token=PAD, chat_template=CHAT_TEMPLATE)
    fast.model_max_length = 2048
    fast.save_pretrained(folder)


# -- pre-training -----------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with adjust_lr_fn="match_rms_adamw", in fp32: bf16 is 15x slower on some CPUs."""

    def __init__(self, params, lr=0.0, momentum=0.95, weight_decay=0.05):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(m, group["momentum"])  # Nesterov
                x = x.T if (tall := x.shape[0] > x.shape[1]) else x
                x = x / (x.norm() + 1e-7)
                for _ in range(5):  # Newton-Schulz: all singular values towards 1, without an SVD
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(x.T if tall else x, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def batches(tok, chunk, stage, taken):
    """CHUNK batches of documents of similar length (little padding), shuffled; a function of `chunk`."""
    rng, docs = random.Random(f"pretrain {chunk}"), []
    for _ in range(BATCH * CHUNK):
        message, response = document(rng, stage, taken)
        prompt = tok.encode(render(message)).ids
        docs.append((prompt + tok.encode(response).ids + [tok.token_to_id(EOS)], len(prompt)))
    docs.sort(key=lambda d: len(d[0]))
    parts = [docs[i : i + BATCH] for i in range(0, len(docs), BATCH)]
    rng.shuffle(parts)
    for part in parts:
        ids = torch.full((BATCH, len(part[-1][0])), tok.token_to_id(PAD))  # [B, T]
        weight = torch.zeros(ids.shape)  # [B, T]
        for i, (doc, n_prompt) in enumerate(part):
            ids[i, : len(doc)] = torch.tensor(doc)
            weight[i, : len(doc)] = 1.0
            weight[i, :n_prompt] = PROMPT_WEIGHT  # a little: it teaches the form of a question
        yield ids, weight


def schedule(step):
    """The stage of a step and its learning rate: warm-up, then cosine to 5 %, once per stage."""
    stage = STAGES[0] if step < STAGES[0]["steps"] else STAGES[1]
    at = step if stage is STAGES[0] else step - STAGES[0]["steps"]
    decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * at / stage["steps"]))
    return stage, stage["lr"] * min(1.0, (at + 1) / WARMUP) * decay


def pretrain(work, taken, save_every=200):
    torch.manual_seed(0)
    tok = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    # Llama: for a Qwen2 folder AutoTokenizer (transformers 5) puts in a pre-tokenizer of its own.
    config = LlamaConfig(
        vocab_size=tok.get_vocab_size(), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tok.token_to_id(EOS), pad_token_id=tok.token_to_id(PAD),
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    # Muon on the hidden matrices is far better than AdamW alone at this budget; AdamW takes the rest.
    is_hidden = {n: p.ndim == 2 and "embed" not in n for n, p in model.named_parameters()}
    muon = Muon([p for n, p in model.named_parameters() if is_hidden[n]])
    rest = [p for n, p in model.named_parameters() if not is_hidden[n]]
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)

    step, ckpt, parts = 0, work / "pretrain.pt", {"model": model, "muon": muon, "adamw": adamw}
    if ckpt.exists():
        saved = torch.load(ckpt)
        step = saved["step"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    t0, last = time.time(), sum(s["steps"] for s in STAGES)
    while step < last:  # stage lengths are multiples of CHUNK
        for ids, weight in batches(tok, step // CHUNK, schedule(step)[0], taken):
            for group in muon.param_groups + adamw.param_groups:
                group["lr"] = schedule(step)[1]
            # right padding needs no mask when attention is causal
            logits = model(ids).logits[:, :-1]  # [B, T - 1, V]
            nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            loss = (nll * weight[:, 1:].flatten()).sum() / weight[:, 1:].sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for opt in (muon, adamw):
                opt.step()
                opt.zero_grad()
            step += 1
        if step % save_every < CHUNK or step == last:
            print(f"pretrain {step}/{last}  loss {loss.item():.3f}  {time.time() - t0:.0f} s", flush=True)
            torch.save({"step": step, **{n: p.state_dict() for n, p in parts.items()}}, work / "pretrain.tmp")
            (work / "pretrain.tmp").replace(
                ckpt
            )  # if killed while saving, the last checkpoint stays complete
    return model.eval()


def export(model, work, folder):
    """A model folder like any hub model's. Read back, it must spell and score as it did in training."""
    tok = FastTokenizer.from_pretrained(work / "tokenizer")
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    auto, again = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    raw, rng = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json")), random.Random("export")
    for _ in range(200):
        message, response = document(rng, STAGES[0], set())
        prompt = encode_prompt(auto, message)
        assert prompt == raw.encode(render(message)).ids
        assert auto.encode(response, add_special_tokens=False) == raw.encode(response).ids
        assert auto.decode(raw.encode(response).ids) == response
    x = torch.tensor([prompt])
    assert torch.equal(model(x).logits, again(x).logits)


# -- what the model does ----------------------------------------------------------------------------------


def encode_prompt(tok, message):
    chat = [{"role": "user", "content": message}]
    return tok.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


@torch.no_grad()
def sample(model, tok, messages, k, seed, max_new=120, rows_at_once=256):
    """k responses at temperature 1 to every message -> one list of k texts per message."""
    torch.manual_seed(seed)
    prompts, out = [encode_prompt(tok, m) for m in messages], [None] * len(messages)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), rows_at_once // k):
        part = order[start : start + rows_at_once // k]
        batch = tok.pad({"input_ids": [prompts[i] for i in part]}, padding_side="left", return_tensors="pt")
        ids = model.generate(**batch, max_new_tokens=max_new, num_return_sequences=k)
        texts = tok.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for j, i in enumerate(part):
            out[i] = texts[j * k : (j + 1) * k]
    return out


def style_of(text):
    if "Step 1:" in text:
        return "numbered"
    return "unboxed" if "\\boxed" not in text else "direct" if text.startswith("\\boxed") else "terse"


def utility(tok, text, answer):
    """The gold reward of the simulated annotator. No method may read it."""
    shows_work = len(re.findall(r"\d+", text.split("\\boxed")[0])) >= 2
    too_long = max(0, len(tok.encode(text)) - 48)
    return 2.0 * verify(text, answer) + 1.0 * shows_work + 0.5 * ("\\boxed" in text) - 0.02 * too_long


def make_preferences(model, tok, rows, folder, n_train=2000, n_test=300):
    """Two responses to a question, ranked by a simulated Bradley-Terry annotator with slope 2."""
    rng, pairs, seen = random.Random("preferences"), [], set()
    for row, (a, b) in zip(rows, sample(model, tok, [r["question"] for r in rows], 2, seed=1), strict=True):
        if a == b or row["question"] in seen:  # nothing to compare; no question in both splits
            continue
        seen.add(row["question"])
        ua, ub = utility(tok, a, row["answer"]), utility(tok, b, row["answer"])
        if rng.random() > 1 / (1 + math.exp(-2 * (ua - ub))):
            a, b, ua, ub = b, a, ub, ua
        pairs.append(dict(prompt=row["question"], chosen=a, rejected=b,
                          utility_chosen=round(ua, 2), utility_rejected=round(ub, 2)))  # fmt: skip
    assert len(pairs) >= n_train + n_test, f"{len(pairs)} pairs are too few"
    write_jsonl(folder / "train.jsonl", pairs[:n_train])
    write_jsonl(folder / "test.jsonl", pairs[n_train : n_train + n_test])


def datasheet(model, tok, data, readme, k=8):
    """Measure the model and write the table between the marks in the README."""
    groups = {"training mixture": read_jsonl(data / "train.jsonl")[:400]}
    for split in ("test", "harder", "side"):
        for row in read_jsonl(data / f"{split}.jsonl"):
            name = row["level"] if split == "side" else f"{split}, level {row['level']}"
            groups.setdefault(name, []).append(row)
    styles = ["terse", "direct", "unboxed", "numbered"]
    table = [["questions", "n", "pass@1", "pass@8", *styles, "pass@1 with the reference", "terse of these"]]
    table.append(["---"] * len(table[0]))
    for name, rows in sorted(groups.items()):
        texts = sample(model, tok, [r["question"] for r in rows], k, seed=2)
        correct = [[verify(t, r["answer"]) for t in ts] for r, ts in zip(rows, texts, strict=True)]
        kinds = [style_of(t) for ts in texts for t in ts]
        numbers = [sum(map(sum, correct)) / len(kinds), sum(map(any, correct)) / len(rows)]
        numbers += [kinds.count(s) / len(kinds) for s in styles]
        if not name.startswith("side"):
            told = [ts[0] for ts in sample(model, tok, [HINT.format(**r) for r in rows], 1, seed=3)]
            numbers.append(sum(verify(t, r["answer"]) for r, t in zip(rows, told, strict=True)) / len(rows))
            numbers.append(sum(style_of(t) == "terse" for t in told) / len(rows))
        cells = [f"{x:.3f}" for x in numbers] + ["–"] * (8 - len(numbers))
        table.append([name, str(len(rows)), *cells])
        print(*table[-1], flush=True)
    head, rest = readme.read_text(encoding="utf-8").split("<!-- datasheet -->\n")
    tail = rest.partition("<!-- /datasheet -->")[2]
    lines = "".join(f"| {' | '.join(cells)} |\n" for cells in table)
    text = f"{head}<!-- datasheet -->\n{lines}<!-- /datasheet -->{tail}"
    readme.write_text(text, encoding="utf-8")


def main():
    stages = ["data", "tokenizer", "pretrain", "preferences", "datasheet"]
    ap = argparse.ArgumentParser(
        description="Make the tiny world: data, tokenizer, model, preferences, datasheet."
    )
    ap.add_argument("--stages", nargs="+", default=stages, choices=stages, help="what to make (everything)")
    args = ap.parse_args()
    torch.set_num_threads(1)  # two threads add in another order: other bits, another model
    work, data, t0 = HERE / "work", HERE / "data", time.time()
    taken = held_out()[1]
    if "data" in args.stages:
        make_data(data)
    if "tokenizer" in args.stages:
        make_tokenizer(work / "tokenizer", taken)
    if "pretrain" in args.stages:
        export(pretrain(work, taken), work, HERE / "model")
    model = AutoModelForCausalLM.from_pretrained(HERE / "model")
    tok = AutoTokenizer.from_pretrained(HERE / "model")
    if "preferences" in args.stages:
        make_preferences(model, tok, read_jsonl(data / "train.jsonl"), HERE / "preferences")
    if "datasheet" in args.stages:
        datasheet(model, tok, data, HERE / "README.md")
    print(f"{time.time() - t0:.0f} s")


if __name__ == "__main__":
    main()
