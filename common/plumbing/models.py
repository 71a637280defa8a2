"""Models: load and check model folders; the copy that samples; reward models and critics."""

from copy import deepcopy
from functools import partial
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DynamicCache,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from common.plumbing import ranks
from common.plumbing.configs import (
    cannot_load,
    demand_eos,
    demand_labels,
    max_positions,
    read_folder,
    write_stop_ids,
)
from common.plumbing.flags import demand
from common.plumbing.heads import logit_divisor

transformers.utils.logging.disable_progress_bar()  # there is one bar, the script's
transformers.utils.logging.set_verbosity_error()  # the warnings that matter are errors below

# ---- language models -------------------------------------------------------------------------------------


def load_model(source, recompute=False, flag="--model"):
    """Model and tokenizer of a folder or hub name, on the GPU if there is one, without dropout.

    Weights are fp32, whatever the file has: an update at the learning rates of RL is below
    the resolution of bf16, where Adam at 1e-6 leaves 98 % of the weights unchanged. `--dtype
    bf16` is autocast over these fp32 weights. With `recompute` layers keep only their inputs,
    for --gradient-checkpointing. Nothing in a folder is executed: its Python files are not
    imported, pickled weights are not read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except Exception as error:
        raise cannot_load(flag, source, error) from None
    check_model(model, tokenizer, sorted(info["missing_keys"]), f"{flag} {source}")
    return placed(model, recompute), tokenizer


def check_model(model, tokenizer, missing, name):
    """What the scripts rely on: all weights, finite; a head that is a plain product; attention; an EOS."""
    names = ", ".join(missing[:3])
    demand(not missing, f"{name} lacks weights ({names}); use a complete language model.")
    for key, p in model.named_parameters():
        demand(p.isfinite().all(), f"{name}: {key} contains NaN or inf; use an earlier checkpoint.")

    model.logit_divisor = logit_divisor(model, name)
    layers = DynamicCache(config=model.config).layers
    can_drop_rows = all(hasattr(layer, "batch_select_indices") for layer in layers)
    demand(can_drop_rows, f"{name}: sampling needs attention in all its layers; use another model.")

    demand_eos(tokenizer, name)
    write_stop_ids(model, tokenizer)


def logit_temperature(model, temperature):
    """The divisor of hidden states times weights: --temperature times that of the model's own logits."""
    return temperature * getattr(model, "logit_divisor", 1.0)


def check_same_shapes(model, base):
    """--base, if it is given, must have the architecture of --model; both are folders or hub names."""
    if not base:
        return
    shapes = []
    for flag, source in (("--model", model), ("--base", base)):
        config = read_folder(AutoConfig, source, flag)
        with torch.device("meta"):  # shapes without weights
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        shapes.append({name: p.shape for name, p in skeleton.named_parameters()})
    sentence = "its weights have other shapes than those of --model; use the same architecture."
    demand(shapes[0] == shapes[1], f"--base {base}: {sentence}")


# ---- placement, activation checkpointing, positions ------------------------------------------------------


def placed(model, recompute):
    """The model on the GPU if there is one, divided among several, in eval(): without dropout."""
    model.base_model.register_forward_pre_hook(check_positions, with_kwargs=True)
    if recompute:
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.forward = partial(recomputed, layer.forward)
    model = model.eval()
    if ranks.world_size() > 1:
        empty = {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in model.parameters()}
        COPIES[model] = deepcopy(model, empty)  # for `sampler`, while layers have no hooks yet
        model = ranks.sharded(model)  # layer after layer: a GPU need not hold the whole
        model.register_forward_pre_hook(release, prepend=True)  # before the root's weights are gathered
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device)


def recomputed(forward, *args, **kwargs):
    """A layer under activation checkpointing, unless there is no gradient, as in sampling.

    transformers' own switch works in train() only, which would bring dropout with it.
    """
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def check_positions(model, tokens, inputs):
    """Before each forward pass: lengths that are unknown before a run, such as that of a hint."""
    if getattr(inputs.get("past_key_values"), "checked", False):
        return  # `decoding.Batch` has checked it for all of its steps
    position = inputs.get("position_ids")
    if position is not None:
        need = 1 + int(position.max())
    else:
        ids = tokens[0] if tokens else inputs["input_ids"]
        need = ids.shape[1]
    demand_positions(model, need)


def demand_positions(model, need):
    """Demand that the model has positions for so many tokens."""
    most = max_positions(model.config)
    name = model.config.name_or_path
    sentence = f"{need} tokens of prompt and response exceed its {most} positions"
    remedy = "lower --max-new-tokens or remove long rows"
    demand(need <= most, f"--model {name}: {sentence}; {remedy}.")


# ---- the copy that samples -------------------------------------------------------------------------------

COPIES = WeakKeyDictionary()  # model -> its copy
CAST = (nn.Linear, Conv1D)  # autocast runs these in bf16, weights and biases


@torch.no_grad()
def sampler(model):
    """What samples in the place of `model`: a copy under autocast or of a sharded model, else the model.

    Autocast casts the weights of linear layers whenever they are used. The copy has them cast, at addresses
    that a recorded step can rely on; everything else it shares with the model. Its logits are those of
    autocast, bit for bit. Of a sharded model each rank fills a whole copy: sampling has a pass for every
    token, and ranks sample unequally long. Refreshed here, in place, it is never behind an optimizer step.
    """
    device = model.device
    casts, low = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    if not casts and not ranks.is_sharded(model):
        return model
    if model not in COPIES:
        COPIES[model] = deepcopy(model, {id(p): p for p in model.parameters()})
    copy = COPIES[model]
    for layer, source in zip(copy.modules(), model.modules()):
        for name, buffer in source.named_buffers(recurse=False):
            setattr(layer, name, buffer)
        for name, original in source.named_parameters(recurse=False):
            dtype = low if casts and isinstance(layer, CAST) else original.dtype
            weight = getattr(layer, name)
            if weight.is_meta or weight.dtype != dtype:
                # a tied head parts from the embedding, which stays fp32
                weight = torch.empty(original.shape, dtype=dtype, device=device)
                setattr(layer, name, nn.Parameter(weight, requires_grad=False))
            if weight is not original:
                weight.copy_(ranks.whole(original))
    return copy


def release(model, inputs):
    """Before a sharded model computes, its copy gives back its memory. `sampler` fills it anew."""
    for layer in COPIES[model].modules():
        for name, weight in list(layer.named_parameters(recurse=False)):
            if not weight.is_meta:
                setattr(layer, name, nn.Parameter(weight.to("meta"), requires_grad=False))


# ---- reward models and critics ---------------------------------------------------------------------------


def load_scorer(source, tokenizer, args, new_head=False):
    """A reward model or critic: one number for each position instead of logits.

    It is read as a token classifier with one label, because that class selects no position by
    itself. A sequence classifier of the same architecture has the same weights. With
    `new_head` the folder may be that of a language model, and the head is drawn at random.
    """
    given = getattr(args, "reward_model", None)
    flag = "--model" if new_head and not given else "--reward-model"
    name = f"{flag} {source}"
    config = read_folder(AutoConfig, source, flag)
    if not new_head or given:
        demand_labels(config, name)
    has_classifier = type(config) in AutoModelForTokenClassification._model_mapping
    sentence = "has no token classifier in transformers, which reward models and critics are"
    demand(has_classifier, f"{name}: {config.model_type} {sentence}; use another model.")
    try:
        scorer, info = AutoModelForTokenClassification.from_pretrained(
            source,
            num_labels=1,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except Exception as error:
        raise cannot_load(flag, source, error) from None
    known = read_folder(AutoTokenizer, source, flag).get_vocab()
    same_ids = tokenizer.get_vocab().items() <= known.items()
    sentence = f"its tokenizer assigns other ids than that of --model {args.model}; use one that shares it."
    demand(same_ids, f"{name}: {sentence}")
    if new_head:
        head = scalar_head(scorer)
        # as in Stiennon et al.: scores of the order of 1
        torch.nn.init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
        torch.nn.init.zeros_(head.bias)
    missing = [key for key in info["missing_keys"] if key.endswith("weight")]
    sentence = f"it has no scalar head ({', '.join(missing)}); use a reward model, such as rlhf_ppo.py saves."
    demand(new_head or not missing, f"{name}: {sentence}")
    return placed(scorer, args.gradient_checkpointing)


def scalar_head(scorer):
    """The linear layer from a hidden state to a number. It comes last, whatever an architecture calls it."""
    return list(scorer.children())[-1]


def read_scores(scorer, hidden):
    """The number at each position, [B, T], of hidden states [B, T, D]; fp32, also under autocast.

    In bf16, values between 2 and 4 are 1/64 apart. The differences of neighbours, which GAE
    adds up, would be rounding errors.
    """
    head = scalar_head(scorer)
    with torch.autocast(hidden.device.type, enabled=False):
        scores = head(hidden.to(head.weight.dtype))  # [B, T, 1]
    return scores[..., 0].float()
