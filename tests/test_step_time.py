"""The computed minutes of the recipes, and the counted operations: formulas, and that the page has them."""

import json
import re

import pytest
import torch
from conftest import ROOT
from torch.distributed.run import get_args_parser
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2ForCausalLM

from experiments import decode_ops, gpu, memory, step_time

PAGE = (ROOT / "docs/gpu.md").read_text()
RECORD = json.loads(step_time.RECORD.read_text())
LOW, HIGH = step_time.cases()
SMALL, BIG = memory.SHAPES["Qwen2.5-1.5B"], memory.SHAPES["Qwen2.5-7B"]


def between(mark):
    return PAGE.partition(f"<!-- {mark} -->\n")[2].partition(f"\n<!-- /{mark} -->")[0].split("\n")


# ---- the page --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", step_time.TABLES)
def test_the_page_has_what_is_computed(mark):
    assert between(mark) == step_time.TABLES[mark]()


def test_the_page_has_what_was_counted():
    record = json.loads(decode_ops.RECORD.read_text())
    assert between("decode operations") == decode_ops.operations_table(record)
    assert between("decode time") == decode_ops.time_table(RECORD)


def test_every_command_of_the_page_is_understood():
    """By torchrun's own parser, and by the parser of the script."""
    text = "\n".join(between("recipe commands")).replace("\\\n", " ")
    commands = [line.split() for line in text.split("\n") if line[0] not in "#`"]
    assert len(commands) == len(step_time.RECIPES) * len(step_time.MACHINES)
    for words in commands:
        args = step_time.parsed(" ".join(words))
        assert args.dtype == "bf16" and args.gradient_checkpointing
        assert args.batch_size * args.group_size == 1024  # completions per step in all three papers
        if words[0] == "torchrun":
            launch = get_args_parser().parse_args(words[1:])
            assert launch.nproc_per_node == "8" and launch.training_script.endswith(".py")
        else:
            assert words[0] == "python"


def test_every_recipe_fits():
    """Weights, gradients, moments, activations and the longest row, with 2 GiB to spare."""
    lines = between("recipe steps")
    names = [name.strip() for name in lines[0].split("|")]
    for line in lines[2:]:
        cells = dict(zip(names, map(str.strip, line.split("|"))))
        assert float(cells["GiB training"]) <= memory.CARDS[80] - memory.SPARE
        assert int(cells["rows at once"]) >= 16


# ---- what was measured -----------------------------------------------------------------------------------


def test_the_high_case_gives_the_measured_times():
    """Both decode steps, and the training step."""
    for size in ("0.5B", "1.5B"):
        measured = RECORD[f"speed {size} recorded"]
        got = step_time.step_seconds(memory.SHAPES[f"Qwen2.5-{size}"], 512, 33 + 128, HIGH)
        assert 1e3 * got == pytest.approx(measured["ms a step"], rel=1e-6)
    run = RECORD["train 1.5B recomputed"]
    done = step_time.flops(SMALL, 512, run["tokens"] / 512, 4)
    assert done / step_time.PEAK / HIGH.utilisation == pytest.approx(run["seconds_train"])
    # the record counts 6 FLOPs per weight and token, here it is 8, and attention
    assert HIGH.utilisation == pytest.approx(run["MFU"] * 8 / 6, rel=0.03)


def test_the_low_case_is_faster_in_everything():
    for name in ("kernel", "length", "useful"):
        assert getattr(LOW, name) < getattr(HIGH, name)
    for name in ("bandwidth", "utilisation", "nvlink", "network"):
        assert getattr(LOW, name) > getattr(HIGH, name)
    assert max(LOW.bandwidth, LOW.utilisation) < 1


# ---- formulas --------------------------------------------------------------------------------------------


def test_flops_are_those_that_torch_counts():
    """Torch counts the whole square of attention, of which causal attention computes half."""
    shape = (2, 64, 160, 500, 4, 2, 16, True)
    model = Qwen2ForCausalLM(gpu.config_of(shape, attn_implementation="eager")).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(3, 10, dtype=torch.int64), use_cache=False)
    counts = counter.get_flop_counts()["Global"]
    attention = sum(n for name, n in counts.items() if "bmm" in str(name))
    assert attention > 0
    want = sum(counts.values()) - attention / 2
    assert step_time.flops(shape, 3, 10, 1) == want


def test_a_batch_is_its_steps():
    """Four rows, three of which leave at the look after step 32; the buffers have 256 columns."""
    seconds = step_time.batch_seconds(SMALL, [100, 50], [100, 20, 20, 20], HIGH)
    reading = sum(step_time.flops(SMALL, 1, n, 1) for n in (100, 50)) / step_time.PEAK / HIGH.utilisation
    four, one = (step_time.step_seconds(SMALL, rows, 256, HIGH) for rows in (4, 1))
    assert seconds == pytest.approx(reading + 32 * four + 67 * one)


def test_rows_of_a_recipe():
    """The mean length, the longest, and hybrids: one for each question, with 0.725 of a demonstration."""
    args = step_time.parsed(step_time.command("Prefix-RFT", "8 × 80 GB"))
    for case in (LOW, HIGH):
        rows = step_time.rows_of(args, case)
        plain = [response for prefix, response in rows if not prefix]
        assert len(rows) == 1024 and len(plain) == 896 and max(plain) == 8192
        assert sum(plain) / len(plain) == pytest.approx(case.length * 8192, rel=0.05)
        prefixes = [prefix for prefix, _ in rows[::8]]
        assert sum(prefixes) / 128 == pytest.approx(0.725 * case.length * 8192, rel=0.01)
        assert all(prefix < response for prefix, response in rows)


def test_communication():
    """fp32, 7/8 of the weights; three times as many bytes with a gradient; the slower link counts."""
    once = 4 * memory.parameters(BIG)[0] * 7 / 8
    assert step_time.gathered(BIG, 8, 1, HIGH) == pytest.approx(once / 225e9)
    assert step_time.gathered(BIG, 8, 2, HIGH) == pytest.approx(once / 25e9)
    assert step_time.gathered(BIG, 8, 2, LOW) == pytest.approx(once / 320e9)
    assert step_time.gathered(SMALL, 1, 1, HIGH) == 0
    args = step_time.parsed(step_time.command("Dr. GRPO", "8 × 80 GB"))
    ends = [1000] * 256  # 32 on each GPU, in one micro-batch
    forward = step_time.passes(BIG, ends, args, 8, 1, 1, HIGH)
    both = step_time.passes(BIG, ends, args, 8, 1, 4, HIGH)
    assert forward[1] == pytest.approx(once / 225e9)
    assert both == pytest.approx((4 * forward[0], 3 * forward[1]))
    assert step_time.together([(2, 1), (3, 5)], HIGH) == 11
    assert step_time.together([(2, 1), (3, 5)], LOW) == 7


def test_what_is_scored_and_trained():
    """Prefixes; everything for several updates; everything for pi_ref. Updates divide the rows."""
    kinds = {}
    for recipe in step_time.RECIPES:
        args = step_time.parsed(step_time.command(recipe, "1 × 80 GB"))
        rows = step_time.rows_of(args, HIGH)
        scored = step_time.scoring(SMALL, rows, args, 1, 1, HIGH)
        trained = step_time.training(SMALL, rows, args, 1, 1, HIGH)
        share = sum(x for x, _ in scored) / sum(x for x, _ in trained)
        kinds[recipe] = len(scored), len(trained), share
    assert {recipe: kind[:2] for recipe, kind in kinds.items()} == {
        "Prefix-RFT": (1, 1),
        "Dr. GRPO": (1, 8),
        "GRPO, DeepSeekMath": (1, 1),
    }
    assert kinds["Dr. GRPO"][2] == kinds["GRPO, DeepSeekMath"][2] == pytest.approx(1 / 4)
    assert 0.05 / 4 < kinds["Prefix-RFT"][2] < 0.125 / 4  # an eighth of the rows, not all of each


# ---- operations of a decode step -------------------------------------------------------------------------


def test_the_operations_of_a_step_are_those_of_the_record():
    """Counted again, and the variant with fewer casts gives the same bits. torch.compile takes minutes."""
    record = json.loads(decode_ops.RECORD.read_text())
    plain, tokens = decode_ops.counted("as it is")
    assert plain == record["by name"] and sum(plain.values()) == record["as it is"]
    shared, same = decode_ops.counted("one cast")
    assert sum(shared.values()) == record["one cast"] == record["as it is"] - 3 * 24
    assert same == tokens and record["one cast: the same tokens and log-probabilities"]


def test_the_count_stands_for_kernels():
    """Of the recorded step, on a GPU: as many matrix products and casts, and kernels within 5 %."""
    record, profiled = json.loads(decode_ops.RECORD.read_text()), RECORD["profile 0.5B"]
    products = record["by name"]["aten.mm.default"] + record["by name"]["aten.addmm.default"]
    assert products == sum(n for name, (_, n) in profiled["longest"].items() if name.startswith("nvjet"))
    assert record["as it is"] == pytest.approx(profiled["kernels a step"], rel=0.05)


def test_the_sentences_about_a_step():
    """Products, attention and draw beside the minimum; what the casts that could be shared take."""
    lines = between("decode time")
    times = {cells[1].strip(): float(cells[2]) for cells in (line.split("|") for line in lines[2:])}
    *three, _, _, least = times.values()
    assert 4.9 < sum(three) / least < 5.4 and "five times the minimum" in " ".join(PAGE.split())
    casts = RECORD["profile 0.5B"]["longest"]
    ms, launches = next(x for name, x in casts.items() if "bfloat16_copy" in name)
    share = ms * 72 / launches / RECORD["profile 0.5B"]["ms of kernels a step"]
    assert share < 0.02 and "less than 2 % of the time" in " ".join(PAGE.split())
    assert not re.search(r"repeat", " ".join(json.loads(decode_ops.RECORD.read_text())["by name"]))
