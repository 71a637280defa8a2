"""Does phi = log p + H tell on-policy samples from off-policy text better than log p does?

    python experiments/phi.py                        # this question
    python experiments/phi.py --decoders --write     # and what raises phi in hinted decoding: see `decoders`

Towards On-Policy SFT (arXiv 2602.12222) says so and gives no number. Here: responses of the tiny base model
at T = 1 against demonstrations, noisy demonstrations and its own samples at T = 0.3, on 300
held-out questions: one demonstration, ten samples of each. A response's score is the mean over the tokens of
a window; shorter responses are left out. AUROC is the probability that a random on-policy response scores
above a random off-policy one; intervals are the middle 95 % of 1,000 bootstrap draws over questions. `texts`:
distinct windows of the off-policy responses. All demonstrations begin in one of a few ways, so a result about
their first tokens is about a few texts.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import idft_hinted as idft  # noqa: E402
from common import tokenization as tok  # noqa: E402
from common.plumbing import data, models  # noqa: E402
from experiments.intervals import student, welch  # noqa: E402
from experiments.tables import insert, table  # noqa: E402

WINDOWS = ((0, 1), (0, 8), (8, 16), (0, 32))  # tokens of a response, from and to
TIMES = 1000


def auroc(own, foreign):
    """P(own > foreign) + P(own = foreign) / 2 over all pairs."""
    own = own.sort().values.contiguous()
    below, not_above = (torch.searchsorted(own, foreign, right=right) for right in (False, True))
    return 1 - (below + not_above).double().mean().item() / 2 / len(own)


def compared(own, foreign):
    """AUROC of log p, of phi, and their difference, each with an interval; of {question, log p, phi}."""
    generator, draws = torch.Generator().manual_seed(0), []
    for n in range(TIMES + 1):
        some = torch.randint(300, (300,), generator=generator) if n else torch.arange(300)
        often = some.bincount(minlength=300)  # of each question; the first draw is the sample itself
        both = [
            [x[k].repeat_interleave(often[x["question"]]) for x in (own, foreign)] for k in ("logp", "phi")
        ]
        draws.append([auroc(*pair) for pair in both])
    draws = torch.tensor(draws)
    draws = torch.cat([draws, draws[:, 1:] - draws[:, :1]], 1).T
    ends = [x[1:].quantile(torch.tensor([0.025, 0.975], dtype=x.dtype)).tolist() for x in draws]
    return [f"{x[0]:.3f} [{low:.3f}, {high:.3f}]" for x, (low, high) in zip(draws, ends)]


# ---- what raises phi in hinted decoding ------------------------------------------------------------------


def decoders():
    """phi of correct responses by how they are decoded: does it take the demonstration that is shown?

    Hinted decoding draws at T = 0.3 from a nucleus of 0.95. "Without the demonstration" is that decoder on
    the prompt alone. 300 held-out questions, five seeds; intervals are Student's and Welch's over the seeds.
    """
    settings = {
        "samples at T = 1": None,
        "without the demonstration": 0.0,
        "hinted, β = 0": 0.0,
        "hinted, β = 1": 1.0,
        "hinted, β = 3": 3.0,
    }
    model, tokenizer, rows, prompts, args = tiny()
    questions, golds = list(rows["question"]), list(rows["answer"])
    hints = [args.hint_template.replace("{solution}", y) for y in rows["solution"]]
    hints = [hint.replace("{question}", x) for hint, x in zip(hints, questions)]
    hints = tok.encode_prompts(tokenizer, hints)
    phi, share = {name: [] for name in settings}, {name: [] for name in settings}
    for seed in range(5):
        for name, beta in settings.items():
            torch.manual_seed(seed)
            if beta is None:
                responses, _ = idft.sample(model, tokenizer, prompts, 1.0, args)
            else:
                args.beta = beta
                contexts = hints if name.startswith("hinted") else prompts
                responses = idft.rewrite(model, tokenizer, contexts, prompts, args)
            found, _ = idft.judged(model, tokenizer, "x", questions, golds, prompts, responses, args)
            phi[name].append(float(found["phi_x"]))
            share[name].append(float(found["verified_x"]))
    lines = []
    for name in settings:
        low, high = student(phi[name]).interval()
        line = [name, f"{mean(share[name]):.2f}", f"{mean(phi[name]):+.3f} [{low:+.3f}, {high:+.3f}]", ""]
        if name != "without the demonstration":
            gain = welch(phi[name], phi["without the demonstration"])
            low, high = gain.interval()
            line[-1] = f"{gain.mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append(line)
    return table(["decoding", "correct", "φ of correct ones", "over the decoder alone"], lines)


# ---- what is run -----------------------------------------------------------------------------------------


def tiny():
    """Model, tokenizer, 300 held-out rows, their prompts, and the default arguments."""
    args = idft.parse_args([])
    model, tokenizer = models.load_model(str(ROOT / "tiny/model"))
    rows = data.load_split(str(ROOT / "tiny/data"), "test", {}).select(range(300))
    return model, tokenizer, rows, tok.encode_prompts(tokenizer, rows["question"]), args


def compare_kinds():
    """The table of the question above, printed line by line."""
    torch.manual_seed(0)
    model, tokenizer, rows, prompts, args = tiny()
    kinds = {"own, T = 1": idft.sample(model, tokenizer, prompts * 10, 1.0, args)[0]}
    for name, key in (("demonstrations", "solution"), ("noisy demonstrations", "noisy_solution")):
        kinds[name] = [tok.encode_response(tokenizer, text) for text in rows[key]]
    kinds["own, T = 0.3"] = idft.sample(model, tokenizer, prompts * 10, 0.3, args)[0]
    print("| own, T = 1, against | tokens | responses | texts | AUROC of log p | of phi | difference |")
    print("|---" * 7 + "|")
    seen = {}
    for name, responses in kinds.items():
        tokens, mask = tok.join(prompts * (len(responses) // len(prompts)), responses)
        logp, entropy = idft.score(model, tokens, mask, args)
        rows = [(lp[m], h[m]) for lp, h, m in zip(logp, entropy, mask.bool())]
        for first, last in WINDOWS:
            long = [i for i, y in enumerate(responses) if len(y) >= last]
            window = [[x[first:last].mean() for x in rows[i]] for i in long]
            found = {"logp": torch.tensor([x[0] for x in window])}
            found |= {"phi": torch.tensor([x[0] + x[1] for x in window])}
            found |= {
                "question": torch.tensor(long, dtype=torch.long) % 300,
                "texts": {tuple(responses[i][first:last]) for i in long},
            }
            seen[name, first, last] = found
    for name in list(kinds)[1:]:
        for first, last in WINDOWS:
            own, foreign = seen["own, T = 1", first, last], seen[name, first, last]
            if not foreign["texts"]:  # all are shorter
                continue
            counts = f"{len(own['phi'])}, {len(foreign['phi'])} | {len(foreign['texts'])}"
            text = " | ".join(compared(own, foreign))
            print(f"| {name} | {first + 1}–{last} | {counts} | {text} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--decoders", action="store_true", help="phi by how responses are decoded")
    parser.add_argument("--write", action="store_true", help="with --decoders: into the page of IDFT")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.decoders:
        return compare_kinds()
    lines = decoders()
    print("\n".join(lines))
    if args.write:
        insert("phi decoders", lines)


if __name__ == "__main__":
    main()
