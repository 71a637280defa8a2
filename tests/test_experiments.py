"""The tables of README and docs: bootstrap and best-of-n, and that they hold what was measured."""

import importlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from experiments import gpu, intervals, ppo_sweep, real_cells, real_report, reproduce, speed, tables, tune

README = (ROOT / "README.md").read_text()
PAGES = {page.relative_to(ROOT): page.read_text() for page in tables.pages()}


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A copy of README and pages, for a report to write into."""
    for name, text in PAGES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(tables, "ROOT", tmp_path)


def written():
    return {page.relative_to(tables.ROOT): page.read_text() for page in tables.pages()}


def has(page, mark, lines):
    return f"<!-- {mark} -->\n" + "\n".join(lines) + f"\n<!-- /{mark} -->" in PAGES[Path(page)]


def test_best_of_n_is_the_mean_over_all_choices():
    torch.manual_seed(0)
    score, utility = torch.randn(2, 3, 6)
    for n in (1, 2, 4, 6):
        got = ppo_sweep.best_of(n, score, utility)
        for q in range(3):
            choices = [max(some, key=lambda i: score[q, i]) for some in itertools.combinations(range(6), n)]
            for name, what in (("score", score), ("utility", utility)):
                want = sum(what[q, i].item() for i in choices) / len(choices)
                assert got[name][q].item() == pytest.approx(want, abs=1e-5)
    assert ppo_sweep.best_of(1, score, utility)["kl"].tolist() == [0, 0, 0]
    assert ppo_sweep.best_of(4, score, utility)["kl"][0].item() == pytest.approx(0.6363, abs=1e-4)


def test_the_bootstrap_resamples_seeds_and_questions():
    """Its standard deviation is that of a mean over both: seeds that differ are not averaged away."""
    torch.manual_seed(0)
    seeds, questions = torch.randn(5, 1), torch.randn(1, 200)
    apart = ppo_sweep.draws(seeds.expand(5, 200), 4000).std().item()
    assert apart == pytest.approx((seeds.var() / 5).sqrt().item(), rel=0.05)
    apart = ppo_sweep.draws(questions.expand(5, 200), 4000).std().item()
    assert apart == pytest.approx((questions.var(correction=0) / 200).sqrt().item(), rel=0.05)


def test_the_draws_of_two_methods_are_the_same():
    """Paired: a method that is better by the same on every question is better by that in every draw."""
    correct = torch.rand(3, 50)
    assert (ppo_sweep.draws(correct + 0.25) - ppo_sweep.draws(correct)).sub(0.25).abs().max() < 1e-6
    mean, low, high = ppo_sweep.interval(correct)
    assert low < mean < high


def test_one_number_per_run_has_students_interval():
    """Of 1, 2, 3, 4, 5 the mean is 3, the standard error sqrt(2.5 / 5), t(4) = 2.776."""
    got = reproduce.interval(torch.arange(1.0, 6)[:, None])
    assert got == pytest.approx([3, 3 - 1.963, 3 + 1.963], abs=1e-3)


def test_many_samples_are_compared_on_the_seeds_that_were_asked():
    """4 of 64 are a correct answer, and fewer than 8."""
    every = {"base": [run_of(0, 0)], "sft": [run_of(seed, 4) for seed in range(5)]}
    del every["sft"][0]["many_harder"]
    for number, gain in (("pass@64", 0.5), ("pass@64, harder", 0.5), ("8 of 64, harder", 0)):
        got = reproduce.versus(every, "sft", "base", number)
        assert got["seeds"] == 5 - ("harder" in number) and got["gain"][0] == gain


def test_the_claims_are_about_cells():
    numbers = {"pass@1", *reproduce.SPLITS, *reproduce.OF_RUN, *reproduce.OF_MANY}
    for _, _, pairs in reproduce.CLAIMS:
        for better, worse, number in pairs:
            assert {better, worse} <= {"base", None, *reproduce.CELLS} and number in numbers


def run_of(seed, correct, **more):
    levels = [1 + i % 6 for i in range(300)]
    asked = {split: [correct] * n for split, (n, _) in reproduce.SPLITS.items()} | {"test_greedy": [1] * 300}
    many = {name: [0] * 50 + [correct] * 50 for name, _ in reproduce.OF_MANY.values()}
    return {"seed": seed, "levels": levels} | many | asked | more


def test_a_claim_needs_three_seeds_and_every_comparison():
    every = {
        "base": [run_of(0, 2)],
        "grpo": [run_of(seed, 4) for seed in (0, 1, 2, 3)],
        "sft": [run_of(seed, 1) for seed in (1, 2, 3)],
        "dpo": [run_of(seed, 8) for seed in (1, 2)],
    }
    up, down = (reproduce.versus(every, "grpo", cell, "pass@1") for cell in ("sft", "base"))
    assert up["seeds"] == 3 and up["gain"] == [0.375] * 3  # (4 - 1) / 8 samples, on the seeds of both
    assert down["seeds"] == 4 and down["gain"] == [0.25] * 3  # the base has every seed
    other, few = (
        reproduce.versus(every, "sft", "grpo", "pass@1"),
        reproduce.versus(every, "grpo", "dpo", "side"),
    )
    none = reproduce.versus(every, "grpo", "luffy", "pass@1")
    level = reproduce.versus(every, "grpo", "base", "pass@64")
    assert few["seeds"] == 2 and few["gain"] == [-1.0] * 3  # 4 samples of side skills
    assert none["seeds"] == 0 and "not run" in reproduce.gain_of(none)
    verdicts = [[up, down], [up, other], [other], [level], [up, few], [up, none]]
    assert [reproduce.verdict(some) for some in verdicts] == [
        "reproduced",
        "not reproduced: 1 of 2 holds, 1 of 2 the reverse",
        "not reproduced: the reverse",
        "not reproduced",
        "too few seeds",
        "too few seeds",
    ]


def test_the_lead_of_a_prefix_is_over_the_completions_without_one():
    """Groups of 4: the mean of all is 0.5 where the hybrid has 0.8 and the three others 0.4."""
    curve = [[0.5, 0.0, 0.0, 0.8]] * 10 + [[0.6, 0.0, 0.0, 0.6]] * 10
    assert reproduce.lead_lost({"curve": curve, "args": [{"group_size": 4}]}) == pytest.approx(0.4)


def test_pass_at_k_is_the_probability_of_a_correct_one_among_k():
    every = {"base": [run_of(0, 32)], "sft": [run_of(seed, 64) for seed in (0, 1)]}
    every["sft"][0]["many_harder"] = [64] * 25 + [4] * 25 + [64] * 50
    *_, base, sft = reproduce.covered(every)
    assert base.startswith("| base, harder | 0.25 | 0.38 | ") and base.endswith(" | 0.50 | 0.50 | 1 |")
    assert sft.startswith("| sft, harder | 0.63 | 0.64 | ") and sft.endswith(" | 0.75 | 0.62 | 2 |")


def test_a_record_is_read_with_the_names_of_today(tmp_path):
    """Records up to 0.1.0 are not rewritten; who reads one finds today's flags and keys."""
    (tmp_path / "x.json").write_text('{"command": "--skip-dead-groups 3", "skip_dead_groups": 3, "cut": 0}')
    today = {"command": "--dynamic-sampling 3", "dynamic_sampling": 3, "truncated": 0}
    assert reproduce.record_of(tmp_path / "x.json") == today


@pytest.mark.parametrize(
    "file", sorted((ROOT / "experiments/results/cells").glob("*.json")), ids=lambda p: p.stem
)
def test_a_cell_is_what_the_command_of_today_would_run(file):
    """A changed command or default makes its records those of another method."""
    record = reproduce.record_of(file)
    assert file.stem == reproduce.name_of(record["cell"], record["seed"])
    assert record["cell"] == "base" or record["command"] == reproduce.CELLS[record["cell"]]
    for part, args in zip(record.get("command", "").split(" && "), record.get("args", [])):
        script, *flags = part.split()
        today = importlib.import_module(script.removesuffix(".py")).parse_args(flags)
        assert reproduce.settings(vars(today)) == args
    for name, _ in reproduce.OF_MANY.values():  # records that are older than this column lack it
        many = record.get(name, [0] * reproduce.MANY_QUESTIONS)
        assert len(many) == reproduce.MANY_QUESTIONS and 0 <= min(many) <= max(many) <= reproduce.MANY_SAMPLES
    assert record["cell"] == "base" or len(record["args"]) == len(record["command"].split(" && "))
    for split, (questions, n) in reproduce.SPLITS.items():
        assert len(record[split]) == questions and 0 <= min(record[split]) <= max(record[split]) <= n


def test_the_results_are_those_of_the_cells(tmp_path, monkeypatch, pages):
    """results.md and .json and the tables of the pages, made again from the records."""
    files = ("results.md", "results.json")
    before = [(reproduce.RESULTS / name).read_text() for name in files]
    (tmp_path / "cells").symlink_to(reproduce.RESULTS / "cells")
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path)
    reproduce.report(list(reproduce.CELLS), [0, 1, 2, 3, 4], write=True)
    assert [(tmp_path / name).read_text() for name in files] == before
    assert written() == PAGES


@pytest.mark.parametrize("cell", ["sft", "hinted + idft", "dpo", "grpo", "prefix_rft"])
def test_a_script_and_the_readme_promise_what_was_measured(cell):
    """pass@1 of the base and of the cell that the script runs with no argument."""
    rows = json.loads((reproduce.RESULTS / "results.json").read_text())["rows"]
    promised(
        reproduce.CELLS[cell].split()[0], "pass@1", [f"{rows[x]['pass@1'][0]:.2f}" for x in ("base", cell)]
    )


def test_ppo_and_the_readme_promise_what_was_measured():
    rows = json.loads((ppo_sweep.RESULTS / "ppo_sweep.json").read_text())
    gain = [f"{rows[x]['utility'][0]:.1f}" for x in ("best of 1", "ppo, 0.2")]
    promised("rlhf_ppo.py", "utility", gain)


def promised(file, number, gain):
    assert f" on 2 CPU cores: {number} {' -> '.join(gain)}\n" in (ROOT / file).read_text()
    row = next(line for line in README.splitlines() if line.startswith(f"| [`{file}`]"))
    assert " → ".join(gain) in row


def test_the_sweep_is_that_of_its_records(tmp_path, monkeypatch, pages):
    before = [(ppo_sweep.RESULTS / name).read_text() for name in ("ppo_sweep.md", "ppo_sweep.json")]
    (tmp_path / "ppo").symlink_to(ppo_sweep.RESULTS / "ppo")
    monkeypatch.setattr(ppo_sweep, "RESULTS", tmp_path)
    ppo_sweep.report([0, 1, 2, 3, 4], write=True)
    assert [(tmp_path / name).read_text() for name in ("ppo_sweep.md", "ppo_sweep.json")] == before
    assert written() == PAGES
    drawn = (tmp_path / "ppo_sweep.svg").read_text()
    assert drawn == (ROOT / "experiments/results/ppo_sweep.svg").read_text()


def test_students_intervals_of_the_sweep_exclude_zero_where_its_own_do():
    """The page says so; seeds are paired, because each has a reward model of its own."""
    every = {cell: ppo_sweep.read(cell, range(5)) for cell in ppo_sweep.CELLS}
    points = {
        cell: {seed: x["final"] for seed, x in every[cell].items()} for cell in every if "best" not in cell
    }
    for n in ppo_sweep.TIMES:
        points[f"best of {n}"] = {seed: x[str(n)] for seed, x in every["best of n"].items()}
    compared = [(a, b, number) for a, b in ppo_sweep.COMPARED for number in ("score", "utility")]
    for a, b, number in compared:
        gain = ppo_sweep.stack(points[a], number) - ppo_sweep.stack(points[b], number)  # [5, 300]
        both = [intervals.student(gain.mean(1).tolist()).interval(), ppo_sweep.interval(gain)[1:]]
        signs = [(low > 0) - (high < 0) for low, high in both]
        assert signs[0] == signs[1], (a, b, number)
    assert len(compared) == 20


def test_the_pages_have_what_was_measured_on_a_gpu():
    records = json.loads((ROOT / "experiments/results/gpu.json").read_text())
    assert has("docs/gpu.md", "gpu", gpu.table(records))
    bench = json.loads((ROOT / "experiments/results/kernel_cuda.json").read_text())["rows"]
    for name, title in (
        ("ours", "ours, log p and entropy"),
        ("naive", "naive"),
        ("CCE", "Cut cross-entropy"),
    ):
        row = next(x for x in bench if x["name"] == name and not x["entropy"])
        numbers = f"{1000 * row['seconds']:.1f} ms | {row['tflops']:.0f} | {row['extra_bytes'] / 1e6:,.0f} MB"
        assert (
            f"| {title} | {numbers} | {row['errors'][0]:.0e} |".replace("e-0", "e-")
            in PAGES[Path("docs/kernel.md")]
        )


def test_the_page_has_the_speeds_that_were_measured():
    records = json.loads((ROOT / "experiments/results/speed.json").read_text())
    assert has("docs/benchmarks.md", "speed", speed.table(records))


def test_the_page_has_the_runs_of_a_pretrained_model():
    records = real_cells.read(real_cells.RECORDS)
    assert has("docs/results.md", "real", real_report.report_lines(records))
    assert real_report.FIGURE.exists() == bool(real_report.places(records))


@pytest.mark.parametrize("at_3x, taken", [(0.515, 2e-4), (0.53, 6e-4)])
def test_a_learning_rate_changes_only_for_a_clearly_better_one(at_3x, taken):
    assert tune.best({"grpo": {"x / 3": 0.4, "x": 0.5, "3 x": at_3x}}, "grpo") == taken


def test_a_method_runs_at_the_best_learning_rate():
    records = json.loads(tune.RECORDS.read_text())
    assert has("docs/protocol.md", "tuning", tune.table(records))
    for cell in records:
        script, *flags = reproduce.CELLS[cell].split(" && ")[-1].split()
        runs_at = importlib.import_module(script.removesuffix(".py")).parse_args(flags).lr
        assert runs_at == tune.best(records, cell)
