"""The numbers of TRL's GRPO loss that tests/test_losses.py pins.

TRL is no dependency of this project; in an environment of its own:

    pip install "torch==2.13.0" "trl==1.16.0" && python experiments/trl_values.py

calls the very method that TRL trains with, `GRPOTrainer._compute_loss`, on the tensors below instead of a
model's, and prints the loss and its gradient by the log-probabilities as a Python literal.
"""

from collections import defaultdict
from importlib.metadata import version
from unittest.mock import MagicMock

import torch


def tensors():
    """Three responses of 4, 2 and 5 tokens under three policies: inside and outside the trust region."""
    logp = torch.tensor([[-0.3, -1.2, -0.7, -2.0, 0], [-0.9, -0.1, 0, 0, 0], [-1.5, -0.4, -0.6, -3.0, -0.2]])
    old = torch.tensor([[-0.52, -0.9, -0.72, -2.6, 0], [-0.5, -0.3, 0, 0, 0], [-1.5, -0.9, -0.5, -2.5, -0.3]])
    ref = torch.tensor([[-0.5, -1.0, -0.6, -1.5, 0], [-1.2, -0.2, 0, 0, 0], [-1.1, -0.4, -0.9, -2.0, -0.3]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    return logp, old, ref, torch.tensor([0.75, -0.5, -0.25]), mask


def trl_loss(loss_type, epsilon_high, beta, budget=8):
    """Loss and gradient [3, 5] of TRL for these tensors as one optimizer batch on one device.

    "gspo" is not a loss type of TRL, but its type grpo with ratios of sequences.
    """
    from trl import GRPOConfig, GRPOTrainer  # pinned by version, see above

    logp, old, ref, advantage, mask = tensors()
    logp.requires_grad_()
    trainer = MagicMock()  # only what _compute_loss reads of a trainer
    plain_k3 = dict(use_bias_correction_kl=False)  # TRL's default is r k3, eq. 3 of DeepSeekMath has k3
    trainer.args = GRPOConfig("unused", use_cpu=True, bf16=False, report_to="none", **plain_k3)
    trainer.loss_type, trainer.beta, trainer.max_completion_length = loss_type, beta, budget
    trainer.epsilon_low, trainer.epsilon_high = 0.2, epsilon_high
    trainer.importance_sampling_level, trainer.off_policy_mask_threshold = "token", None
    if loss_type == "gspo":
        trainer.importance_sampling_level, trainer.loss_type = "sequence", "grpo"
    trainer.top_entropy_quantile, trainer.use_vllm, trainer.aux_loss_enabled = 1.0, False, False
    trainer._entropy_bonus_enabled, trainer.model.training = False, True
    trainer.current_gradient_accumulation_steps, trainer.accelerator.num_processes = 1, 1
    trainer.args.steps_per_generation = 1
    trainer.accelerator.gather = trainer.accelerator.reduce = lambda x, **_: x
    trainer._metrics = {"train": defaultdict(list)}
    trainer._get_per_token_logps_and_entropies.return_value = logp, torch.zeros_like(logp), None
    inputs = dict(prompt_ids=mask[:, :1], prompt_mask=mask[:, :1], completion_ids=mask, completion_mask=mask)
    inputs |= dict(advantages=advantage, old_per_token_logps=old, ref_per_token_logps=ref)
    inputs["num_items_in_batch"] = mask.sum()
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.item(), logp.grad.tolist()


if __name__ == "__main__":
    print(f"# TRL {version('trl')}, torch {version('torch')}")
    settings = {name: ((0.2, 0.0), (0.28, 0.1)) for name in ("grpo", "dr_grpo", "dapo")}
    settings["gspo"] = (0.2, 0.0), (0.1, 0.1)  # of three responses none is clipped, one
    settings["cispo"] = (1.2, 0.0), (1.5, 0.1)  # the largest ratio, not its distance from 1
    for loss_type, pairs in settings.items():
        for epsilon_high, beta in pairs:
            loss, gradient = trl_loss(loss_type, epsilon_high, beta)
            print(f'    ("{loss_type}", {epsilon_high}, {beta}, {loss:.7f}, [')
            for row in gradient:
                print("        [" + ", ".join(f"{x + 0:.7f}" for x in row) + "],")
            print("    ]),")
