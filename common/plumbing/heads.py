"""Output layers: what common/logprob.py supports, hidden states times weights, divided by one number."""

import torch

from common.plumbing.flags import demand

UNSUPPORTED = "which common/logprob.py does not support; use another model."


@torch.no_grad()
def logit_divisor(model, name):
    """What a model divides its logits by, 1 for most: to `token_logprobs` it is a temperature.

    Granite and Cohere do so. Families use the same name for a factor and for its inverse, so
    it is measured. A head that computes anything else is refused.
    """
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    demand(not softcap, f"{name}: its logits have a soft cap, {UNSUPPORTED}")
    head = model.get_output_embeddings()
    demand(getattr(head, "bias", None) is None, f"{name}: its output layer has a bias, {UNSUPPORTED}")

    scales = {}
    for key, value in vars(config).items():
        is_scale = ("logit" in key and "scal" in key) or key == "lm_head_multiplier"
        if is_scale and value not in (None, 1):
            scales[key] = value
    if not scales:
        return 1.0
    ids = torch.arange(min(8, config.vocab_size))[None]
    plain = model.base_model(ids).last_hidden_state @ head.weight.T  # [1, 8, V]
    logits = model(ids).logits
    factor = ((logits * plain).sum() / plain.square().sum()).item()
    off = (logits - factor * plain).abs().max()
    is_factor = factor > 0 and off < 1e-3 * logits.abs().max()
    sentence = f"its logits are scaled ({', '.join(scales)}) by more than a factor, {UNSUPPORTED}"
    demand(is_factor, f"{name}: {sentence}")
    for value in scales.values():
        if isinstance(value, (int, float)):
            for exact in (value, 1 / value):
                if abs(exact * factor - 1) < 1e-3:
                    return float(exact)
    return 1 / factor
