"""Does phi = log p + H tell own samples from foreign ones better than log p does?

    python experiments/phi.py

Towards On-Policy SFT (arXiv 2602.12222) says so and gives no number. Here: responses of the tiny base model
at T = 1 against demonstrations, against noisy demonstrations and against its own samples at T = 0.3, on 300
held-out questions: one demonstration, ten samples of each. A response's score is the mean over its first n
tokens; responses that are shorter are left out. AUROC is the chance that a random own response scores above
a random foreign one; intervals are the middle 95 % of 500 bootstrap draws over responses.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import idft_hinted as idft  # noqa: E402
from common import tokenization as tok  # noqa: E402


def auroc(own, foreign):
    """P(own > foreign) + P(own = foreign) / 2 over all pairs."""
    pairs = own[:, None] - foreign[None]
    return ((pairs > 0).float() + (pairs == 0).float() / 2).mean().item()


def interval(own, foreign, times=500):
    dice = torch.Generator().manual_seed(0)
    pick = lambda x: x[torch.randint(len(x), (len(x),), generator=dice)]  # noqa: E731
    draws = torch.tensor([auroc(pick(own), pick(foreign)) for _ in range(times)])
    low, high = draws.quantile(torch.tensor([0.025, 0.975])).tolist()
    return f"{auroc(own, foreign):.3f} [{low:.3f}, {high:.3f}]"


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    args = idft.parse_args([])
    model, tokenizer = tok.load_model(str(ROOT / "tiny/model"))
    rows = tok.load_split(str(ROOT / "tiny/data"), "test", {}).select(range(300))
    prompts = tok.encode_prompts(tokenizer, rows["question"])
    kinds = {"own, T = 1": idft.sample(model, tokenizer, prompts * 10, 1.0, args)[0]}
    for name, key in (("demonstrations", "solution"), ("noisy demonstrations", "noisy_solution")):
        kinds[name] = [tok.encode_response(tokenizer, text) for text in rows[key]]
    kinds["own, T = 0.3"] = idft.sample(model, tokenizer, prompts * 10, 0.3, args)[0]
    scores = {}
    for name, responses in kinds.items():
        tokens, mask = tok.join(prompts * (len(responses) // len(prompts)), responses)
        logp, entropy = idft.score(model, tokens, mask, args)
        rows = [(lp[m], (lp + h)[m]) for lp, h, m in zip(logp, entropy, mask.bool())]
        for n in (1, 8, 32):
            for i, what in enumerate(("log p", "phi")):
                scores[name, n, what] = torch.stack(
                    [r[i][:n].mean() for r in rows if len(r[i]) >= n] or [logp[0, 0]]
                )
    print(
        "| own, T = 1, against | tokens | responses | AUROC of log p | AUROC of phi |\n|---|---|---|---|---|"
    )
    for name in list(kinds)[1:]:
        for n in (1, 8, 32):
            own, other = ([scores[k, n, what] for what in ("log p", "phi")] for k in ("own, T = 1", name))
            counts = f"{len(own[0])}, {len(other[0])}"
            print(
                f"| {name} | {n} | {counts} | {interval(own[0], other[0])} | {interval(own[1], other[1])} |"
            )


if __name__ == "__main__":
    main()
