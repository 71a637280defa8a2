"""Configurations: what a model's folder says before its weights are read, and where it says it."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from common.plumbing.flags import BadInput, demand, one_line
from common.tokenization import as_list, stop_ids

MODEL_FOLDER = "it must be a folder or hub name with config.json, a tokenizer and weights in .safetensors"
GGUF = (
    "it is in the GGUF format, which is for inference; load it once with"
    " from_pretrained(FOLDER, gguf_file=NAME) of transformers and use what save_pretrained writes"
)

# ---- folders ---------------------------------------------------------------------------------------------


def read_folder(kind, source, flag):
    """A configuration or a tokenizer (`kind`: AutoConfig or AutoTokenizer) of a folder or hub name."""
    try:
        return kind.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise cannot_load(flag, source, error) from None


def cannot_load(flag, source, error):
    """The error may be of a dozen types; every one of them is about the user's folder."""
    path = Path(source)
    only_gguf = path.is_dir() and any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))
    if path.suffix == ".gguf" or only_gguf:
        return BadInput(f"{flag} {source} cannot be loaded: {GGUF}.")
    return BadInput(f"{flag} {source} cannot be loaded ({one_line(error)}); {MODEL_FOLDER}.")


def load_tokenizer(args):
    """The tokenizer of --model, without its chat template under --chat-template off."""
    source, flag = origin(args)
    tokenizer = set_template(read_folder(AutoTokenizer, source, flag), args)
    demand_eos(tokenizer, f"{flag} {source}")
    return tokenizer


def load_config(args):
    """The configuration of --model."""
    return read_folder(AutoConfig, *origin(args))


def origin(args):
    """The folder or hub name of the model, and its flag. A run that is continued has a copy of its own."""
    checkpoints = sorted(Path(args.output_dir).glob("checkpoint-" + "[0-9]" * 6)) if args.resume else []
    return (checkpoints[-1], "--resume") if checkpoints else (args.model, "--model")


def demand_eos(tokenizer, name):
    """Demand that a tokenizer has an EOS: what never ends cannot be sampled."""
    has_eos = tokenizer.eos_token_id is not None
    demand(has_eos, f"{name}: its tokenizer has no EOS; set eos_token in tokenizer_config.json.")


def set_template(tokenizer, args):
    """The tokenizer, in place, as --chat-template wants it."""
    if getattr(args, "chat_template", "on") == "off":
        tokenizer.chat_template = None
    return tokenizer


def is_small(config):
    """Whether a model is of the size of the tiny world's, for which learning rates are chosen by default."""
    return (getattr(config.get_text_config(), "hidden_size", None) or 10**9) <= 256


# ---- what ends a response --------------------------------------------------------------------------------


def all_stop_ids(tokenizer, config, args):
    """Every id that ends a response, by the tokenizer, the configuration or the generation configuration."""
    try:
        generation = GenerationConfig.from_pretrained(origin(args)[0], trust_remote_code=False)
    except Exception:  # there need not be one
        generation = GenerationConfig()
    return {*stop_ids(tokenizer, config), *as_list(generation.eos_token_id)}


def write_stop_ids(model, tokenizer):
    """Every id that ends a response, in each place that is saved: generate() then stops where a script does.

    A tokenizer has one EOS and may differ from the configurations; Qwen's further ids are in
    the generation configuration only.
    """
    config = model.config.get_text_config()
    stops = sorted({*stop_ids(tokenizer, config), *as_list(model.generation_config.eos_token_id)})
    for place in (config, model.config, model.generation_config):
        if sorted(as_list(getattr(place, "eos_token_id", None))) != stops:
            place.eos_token_id = stops if len(stops) > 1 else stops[0]
            if place is model.generation_config and not place.do_sample:
                for name in OF_SAMPLING:  # once changed, it is not saved with values that it ignores
                    setattr(place, name, None)


OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


# ---- positions -------------------------------------------------------------------------------------------


def max_positions(config):
    """How many positions a model has, extended ones too; without a limit, more than anybody needs.

    A RoPE that is scaled by a factor has that many times its original positions. Some folders
    say so in max_position_embeddings, some do not.
    """
    config = config.get_text_config()
    stated = getattr(config, "max_position_embeddings", None) or 10**9
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    most = stated
    for part in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if isinstance(part.get("factor"), (int, float)):  # of all kinds: linear, dynamic, yarn, llama3, ...
            original = part.get("original_max_position_embeddings") or stated
            most = max(most, int(part["factor"] * original))
    return most


# ---- precision -------------------------------------------------------------------------------------------


def check_dtype(args):
    """Say where --dtype bf16 is slow: on a CPU without instructions for it."""
    if args.dtype == "bf16" and not torch.cuda.is_available() and not computes_bf16():
        sentence = "this CPU has no instructions for it and is many times faster in fp32; use --dtype fp32"
        print(f"--dtype bf16: {sentence}")


def computes_bf16():
    """Whether this CPU has instructions for bf16: AVX-512's, AMX, or Arm's."""
    for name in ("avx512_bf16", "amx_tile", "arm_bf16"):
        is_supported = getattr(torch.cpu, f"_is_{name}_supported", None)  # not every torch has all
        if is_supported and is_supported():
            return True
    return False


# ---- reward models ---------------------------------------------------------------------------------------


def demand_labels(config, name):
    """A reward model has one label; a classifier of several has no score."""
    is_classifier = any("Classification" in name for name in config.architectures or [])
    sentence = f"it has {config.num_labels} labels, and a reward model has one; use a model that scores."
    demand(not is_classifier or config.num_labels == 1, f"{name}: {sentence}")
