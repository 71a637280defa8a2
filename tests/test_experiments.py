"""The tables of README and docs: intervals and best-of-n, and that they hold what was measured."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from experiments import (
    defaults,
    figures,
    gpu,
    hardware,
    intervals,
    picture,
    ppo_sweep,
    retention,
    speed,
    tables,
)
from experiments import records as rec

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


def test_retention_is_read_where_pass_at_1_last_rises_through_the_target():
    points = [(0.4, 0.9), (0.2, 1.0), (0.6, 0.8), (0.5, 0.7), (0.9, 0.5)]
    assert retention.at(points, 0.6) == pytest.approx(0.65)  # a quarter of the way from .7 to .5
    assert retention.at(points, 0.3) == pytest.approx(0.95)
    with pytest.raises(ValueError, match="around 0.950"):
        retention.at(points, 0.95)


def test_the_table_and_the_figure_of_retention_are_those_of_the_records(tmp_path):
    records = rec.read(), rec.read(retention.RECORDS)
    assert has("docs/methods/idft_hinted.md", "retention", retention.compared(*records))
    figures.save(retention.draw(*records), tmp_path / "again.svg")
    committed = ROOT / "experiments/results/retention.svg"
    assert (tmp_path / "again.svg").read_text() == committed.read_text(), "run experiments/retention.py"


def test_an_interval_of_the_sweep_is_over_seeds():
    """Questions are averaged first: seeds that differ are not averaged away, and a constant gain is exact."""
    seeds = torch.tensor([[1.0, 3.0], [2.0, 4.0], [3.0, 5.0]])
    mean, low, high = ppo_sweep.interval(seeds)
    half = 4.302653 / 3**0.5  # the 97.5 % quantile of Student's t with two degrees of freedom
    assert (mean, low, high) == pytest.approx((3.0, 3.0 - half, 3.0 + half), abs=1e-3)
    assert ppo_sweep.interval((seeds + 0.25) - seeds) == [0.25] * 3


@pytest.mark.parametrize("script", defaults.SCRIPTS)
def test_a_script_and_the_readme_promise_what_was_measured(script):
    """pass@1 before and after a run with no argument."""
    before, after, seeds = defaults.means(script)
    assert seeds == 3 and "over three seeds" in README
    promised(f"{script}.py", "pass@1", [f"{before:.2f}", f"{after:.2f}"])


@pytest.mark.parametrize("script", defaults.SCRIPTS)
def test_a_learning_curve_is_that_of_todays_default_run(script):
    """Its ends are what the README promises; six evaluations, equally far apart."""
    last = defaults.defaults(script).steps
    for seed, record in defaults.read()[script].items():
        assert defaults.is_recorded(script, seed)
        steps, sampled, greedy = zip(*record["curve"])
        assert steps == tuple(range(0, last + 1, last // 5))
        assert (sampled[0], sampled[-1]) == (record["before"], record["after"])
        assert all(0 < value <= 1 for value in (*sampled, *greedy))


@pytest.mark.parametrize("script", defaults.SCRIPTS)
def test_a_page_has_the_learning_curve_of_the_records(script, tmp_path):
    figures.save(defaults.draw(script), tmp_path / "again.svg")
    committed = defaults.figure_of(script)
    assert (tmp_path / "again.svg").read_text() == committed.read_text(), "run experiments/defaults.py"
    page = PAGES[Path(f"docs/methods/{script}.md")]
    results = page[page.index("<!-- /rows") : page.index("## Exercises")]
    assert f"](../../experiments/results/{committed.name})" in results


def test_a_record_has_what_a_run_reported(tmp_path, monkeypatch):
    """Two lines of step 0, as in rft_rejection.py, and steps without an evaluation."""
    ran = []

    def train(words, **more):
        ran.extend(words[1:-2])
        folder = Path(words[-1])
        folder.mkdir()
        lines = [{"step": 0, "pass@1": 0.25, "accuracy": 0.5}, {"step": 0, "kept": 7}, {"step": 1}]
        lines.append({"step": 2, "pass@1": 0.666666, "accuracy": 0.75})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "args.json").write_text(json.dumps({"commit": "c", "versions": {}}))

    monkeypatch.setattr(defaults.subprocess, "run", train)
    monkeypatch.setattr(defaults, "RECORDS", tmp_path / "defaults.json")
    record = defaults.run("rft_rejection", 3)
    assert record["curve"] == [[0, 0.25, 0.5], [2, 0.6667, 0.75]]
    assert (record["before"], record["after"]) == (0.25, 0.6667)
    assert ran == record["command"].split()[1:]
    assert record["command"] == "python rft_rejection.py --seed 3 --eval-every 40"
    defaults.RECORDS.write_text(json.dumps({"rft_rejection": {"3": record, "4": {"before": 0.25}}}))
    assert [defaults.is_recorded("rft_rejection", seed) for seed in (3, 4, 5)] == [True, False, False]


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


@pytest.mark.parametrize("name", ["memory", "speed"])
def test_the_figures_of_hardware_are_those_of_the_records(name, tmp_path):
    figures.save(getattr(hardware, f"draw_{name}")(), tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == (ROOT / f"docs/{name}.svg").read_text()


def test_the_first_picture_is_that_of_the_records(tmp_path):
    figures.save(picture.draw(rec.read()), tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == (ROOT / "docs/family.svg").read_text()
