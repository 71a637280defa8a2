"""No script mixes devices: each runs on a pretended GPU, where a mixture is the error that it would be.

On a CPU any two tensors can be combined, so a forgotten `.to(device)` would first be seen on a GPU.
Here a tensor has a label: the device that it was created for, moved to or computed on. What combines
two labels raises, with the exceptions that CUDA makes. What autograd creates has no label and can be
combined with both.
"""

import importlib
from contextlib import contextmanager

import pytest
import torch
from conftest import same_metrics
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from common.plumbing import decoding, memory, models, ranks, runs

FEW = "--steps 1 --eval-questions 2 --eval-samples 1 --max-new-tokens 20"
GROUP = "--batch-size 8 --group-size 4 --kl-coef 0.1 --epochs-per-batch 2 --minibatches 2"
RUNS = [  # a script and flags that reach its branches
    ("sft", ""),
    ("rft_rejection", "--questions 16 --k 2 --add-gold --rationalize --rounds 2"),
    ("idft_hinted", ""),
    ("dpo", "--k 4 --pair-questions 24"),
    ("dpo", "--loss simpo --k 4 --pair-questions 24"),
    ("grpo", f"{GROUP} --dynamic-sampling 1 --overlong-tokens 20 --advantage grpo --loss-norm token"),
    ("prefix_rft", GROUP),
    ("prefix_rft", "--prefix-loss random --loss-norm sequence"),
    ("luffy", GROUP),
    ("luffy", "--demo-weight sft --hpt-gate 0 --loss-norm sequence"),
    ("opsd", GROUP),
    ("opsd", "--teacher current"),
    ("rlhf_ppo", "--batch-size 28 --preference-questions 6 --reward-epochs 1 --minibatches 2"),
]


def is_tensor(x):
    return isinstance(x, torch.Tensor)


def places(*values):
    """The labels of the tensors in some arguments."""
    return {x.place for x in tree_leaves(values) if is_tensor(x) and hasattr(x, "place")}


def label(value, place):
    for x in tree_leaves(value):
        if is_tensor(x):
            x.place = place
    return value


class Pretend(TorchFunctionMode):
    """Labels what a torch function returns, after checking the labels of its arguments."""

    on = True

    @contextmanager
    def off(self):
        self.on, was = False, self.on
        yield
        self.on = was

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, args, kwargs = getattr(function, "__name__", ""), list(args), dict(kwargs or {})
        if not self.on:
            return function(*args, **kwargs)
        if function == torch.Tensor.device.__get__:
            return torch.device(getattr(args[0], "place", "cpu"))
        asked = "cpu" if name == "cpu" else None
        if kwargs.get("device") is not None:
            asked, kwargs["device"] = torch.device(kwargs["device"]).type, "cpu"
        for i, x in enumerate(args[1:] if name == "to" else [], 1):
            if isinstance(x, str | torch.device):
                asked, args[i] = torch.device(x).type, "cpu"
        place = asked or self.meet(name, args, kwargs)
        out = function(*args, **kwargs)
        if asked and args and out is args[0] and places(out) != {asked}:
            out = out.clone()  # a tensor elsewhere is another tensor
        return label(out, place) if place else out

    def meet(self, name, args, kwargs):
        """Where the result of a function is, or None if that is not known."""
        found, tensors = places(args, kwargs), [x for x in tree_leaves((args, kwargs)) if is_tensor(x)]
        assert name not in ("numpy", "__array__") or found != {"cuda"}, "numpy() of a GPU's tensor"
        if name == "copy_":  # from anywhere
            found = places(args[0])
        if len(found) < 2:
            return min(found, default=None if tensors else "cpu")
        if name in ("__getitem__", "__setitem__"):  # indices may be on the CPU
            mine, index, value = places(args[0]), tree_leaves(args[1]), tree_leaves(args[2:])
            if places(index) <= mine | {"cpu"}:  # a value is copied into a slice, but scattered by indices
                if not any(map(is_tensor, index)) or places(value) <= mine:
                    return mine.pop()
        elif name not in ("cat", "stack") and all(x.dim() == 0 for x in tensors if places(x) == {"cpu"}):
            return "cuda"  # a number on the CPU goes with everything
        raise AssertionError(f"{name}: {[(tuple(x.shape), getattr(x, 'place', None)) for x in tensors]}")


@contextmanager
def gpu(script):
    """A GPU on which weights are placed; files are read and written as before."""
    mode, place = Pretend(), models.placed
    generator, kernel = ranks.generator, script.token_logprobs

    def placed(model, recompute):
        model = place(model, recompute)
        label([*model.parameters(), *model.buffers()], "cuda")
        return model

    def without_labels(function):
        def wrapped(*args, **kwargs):
            with mode.off():
                return function(*args, **kwargs)

        return wrapped

    def logprobs(hidden, weight, targets, temperature):
        assert places(hidden) == places(weight) == places(targets) == {"cuda"}  # Triton's, here torch's
        with mode.off():
            return label(kernel(hidden, weight, targets, temperature), "cuda")

    def generator_for(device):
        assert device.type == "cuda"  # where the probabilities are
        return generator("cpu")

    with pytest.MonkeyPatch.context() as patch, mode:
        patch.setattr(models, "placed", placed)
        patch.setattr(ranks, "generator", generator_for)
        patch.setattr(script, "token_logprobs", logprobs)
        files = [(models, "load_model"), (models, "load_scorer"), (runs, "save_model")]
        for room, name in [*files, (memory, "check_training")]:  # the last one builds a model on meta
            patch.setattr(room, name, without_labels(getattr(room, name)))
        for pace in (decoding.LOOK, decoding.COLUMNS, decoding.LEAVE):
            patch.setitem(pace, "cuda", pace["cpu"])  # rows leave at the same step: the same draws
        patch.setitem(decoding.RECORD, "cuda", False)  # there is nothing to record
        yield


@pytest.mark.parametrize("name, flags", RUNS, ids=[" ".join(x).strip() for x in RUNS])
def test_a_script_never_mixes_devices(name, flags, small, tmp_path):
    """From loading to saving no operation mixes labels, and the metrics are those of the CPU."""
    script = importlib.import_module(name)

    def run(out):
        script.main(script.parse_args(small(name, out, *f"{FEW} {flags}".split())))

    run(tmp_path / "cpu")
    with gpu(script):
        run(tmp_path / "gpu")
    same_metrics(tmp_path / "cpu", tmp_path / "gpu")
