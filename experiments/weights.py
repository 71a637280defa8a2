"""The weight of a token in each method as a function of its probability, read from the scripts by autograd.

    python experiments/weights.py            # prints a few values and draws docs/weights.svg

The model has two words. Its logits are all it has, so the gradient of a loss by the logits of a token is a
multiple of grad log pi = [y] - pi, and the multiple is - mask weight / Z of the one equation.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dpo  # noqa: E402
import grpo  # noqa: E402
import idft_hinted  # noqa: E402
import luffy  # noqa: E402
import sft  # noqa: E402
from experiments.figures import COLORS, canvas, save, styled  # noqa: E402

NAMES = {"SFT": "sft", "DFT": "dft", "EAFT": "eaft", "IDFT": "idft", "LUFFY": "luffy"}  # of the colours
NAMES |= {"GRPO, clipped": "grpo", "DPO, chosen": "dpo"}


def read(loss_of, logits, words):
    """- mask weight / Z of each token of loss_of(logp, entropy), and logp: logits [B, T, 2], words [B, T]."""
    logits = logits.detach().requires_grad_()
    log_p = logits.log_softmax(-1)
    logp = log_p.gather(-1, words[..., None])[..., 0]
    loss_of(logp, -(log_p.exp() * log_p).sum(-1)).backward()
    direction = torch.nn.functional.one_hot(words, 2) - logits.detach().softmax(-1)  # d logp / d logits
    factor = logits.grad / direction
    assert torch.allclose(factor[..., 0], factor[..., 1], atol=1e-9)  # nothing but a multiple of grad log pi
    return factor[..., 0], logp.detach()


def curves(p):
    """{method: weight at each probability}, for a good token: A = 1, and responses of one token."""
    p = p.double()
    logits, words = torch.stack([p, 1 - p], -1).log()[:, None], torch.zeros(len(p), 1, dtype=torch.long)
    mask, half = torch.ones(len(p), 1), torch.full((len(p), 1), 0.5).double().log()

    def idft(weight):
        args = idft_hinted.parse_args(["--weight", weight])
        return lambda logp, entropy: idft_hinted.idft_loss(logp, entropy, mask, 1, 2, args)

    def shaped(logp, entropy):
        args, now = luffy.parse_args([]), logp.detach()
        A = luffy.demonstration_weight(mask.double(), now, entropy.detach(), mask, mask, 1, args)
        return luffy.policy_loss(logp, now, now, A, mask, 1, args)[0]

    def clipped(logp, entropy):
        return grpo.policy_loss(logp, half, half, mask.double(), mask, 1, grpo.parse_args([]))[0]

    def chosen(logp, entropy):  # beside a rejected response that has not moved; beta = 1 for the scale
        pairs = torch.stack([logp, half], 1).flatten(0, 1)  # adjacent
        initial_logp = torch.stack([half, half], 1).flatten()
        args = dpo.parse_args(["--beta", "1"])
        return dpo.dpo_loss(pairs, initial_logp, torch.ones_like(pairs), 1, args)[0]

    losses = {"SFT": lambda logp, entropy: sft.sft_loss(logp, mask, 1), "DFT": idft("dft")}
    losses |= {"EAFT": idft("eaft"), "IDFT": idft("idft"), "LUFFY": shaped}
    losses |= {"GRPO, clipped": clipped, "DPO, chosen": chosen}
    return {name: -read(loss, logits, words)[0][:, 0] for name, loss in losses.items()}


def main():
    few = torch.tensor([0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
    print("| p | " + " | ".join(f"{x:g}" for x in few.tolist()) + " |\n" + "|---" * 8 + "|")
    for name, weight in curves(few).items():
        print(f"| {name} | " + " | ".join(f"{w:.3f}" for w in weight.tolist()) + " |")
    save(draw(), ROOT / "docs/weights.svg")


@styled
def draw():
    figure, [[axis]] = canvas(1, 1, 3.6)
    p = torch.linspace(0.002, 0.998, 250)
    for name, weight in curves(p).items():
        axis.plot(p, weight, color=COLORS[NAMES[name]], label=name, linewidth=2)
    axis.set(xlabel="probability of the token", ylabel="weight, with A = 1", ylim=(0, 1.3), xlim=(0, 1))
    axis.set(title="weight of a token, by method")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


if __name__ == "__main__":
    main()
