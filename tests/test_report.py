"""The study's report, of records that are made up: numbers, verdicts, tables, figures; the real records."""

import itertools
import json
import re
import shutil
import subprocess

import made_up
import pytest
import torch
from conftest import ROOT
from matplotlib.text import Text

import prefix_rft
import sft
from common.plumbing import data as rows_of_data
from experiments import charts, defaults, figures, report, rows, study, tables, weights
from experiments import records as rec
from experiments.intervals import Estimate
from experiments.rows import BY_KEY, CLAIMS, REGIMES, ROWS

REAL = rec.read()
PROTOCOL = "experiments/protocol.md"


@pytest.fixture(scope="module")
def full():
    return made_up.everything()


@pytest.fixture(scope="module")
def half():
    """Two rows are complete, one has three of ten seeds, one is tuned in part; the others have not begun."""
    found = list(made_up.study_of("answers: grpo", "easy: sft"))
    some = made_up.study_of("easy: prefix_rft", seeds=3)
    found += [x for x in some if x["row"] != "base"]
    tuning = [
        x for x in made_up.study_of("easy: luffy") if x["row"] == "easy: luffy" and x["phase"] == "tune"
    ]
    return found + tuning[:3]


# ---- numbers ---------------------------------------------------------------------------------------------


def test_a_number_is_the_mean_over_the_levels_of_the_regime():
    record = made_up.base() | {"test@0.6": [0.9, 0.8, 0.7, 0.6, 0.4, 0.2], "test@0": [1, 1, 1, 1, 0.5, 0.3]}
    assert rec.number(record, "primary", "456") == pytest.approx(0.4)
    assert rec.number(record, "primary") == pytest.approx(0.6)
    assert rec.number(record, "greedy", "56") == pytest.approx(0.4)
    assert rec.number(record, "side") == record["side@0.6"]
    assert rec.numbers([record], "base", "primary", "easy") == [pytest.approx(0.4)]


def test_a_row_is_complete_with_all_of_its_seeds(half):
    assert rec.lacking(half, "answers: grpo") == rec.lacking(half, "base") == ""
    assert rec.lacking(half, "easy: prefix_rft") == "easy: prefix_rft (3 of 10 seeds)"
    assert rec.lacking(half, "easy: luffy") == "easy: luffy"
    seeds = [x["seed"] for x in rec.finals(half[::-1], "answers: grpo")]
    assert seeds == list(range(11, 21))


def test_a_seed_adopts_at_the_first_step_with_responses_of_30_tokens():
    points = [[5, 0.3, 0.4, 15.0, None], [10, 0.5, 0.4, 29.99, None], [15, 0.6, 0.3, 30.0, None]]
    points.append([20, 0.6, 0.3, 20.0, None])
    assert rec.adoption({"curve": points}) == 15
    assert rec.adoption({"curve": points[:2]}) is None


def test_adoption_counts_the_seeds_with_a_curve(full):
    steps, runs = rec.adoptions(full, "easy: prefix_rft")
    assert runs == len(steps) == 10 and set(steps) <= {25, 30, 40}
    assert rec.adoptions(full, "answers: grpo") == ([], 10)
    assert rec.adoptions(full, "easy: sft") == ([], 0)
    assert report.adopts(full, "answers: grpo") == "0 of 10" and report.adopts(full, "easy: sft") == ""
    assert re.fullmatch(r"10 of 10, step (25|27.5|30|35|40)", report.adopts(full, "easy: prefix_rft"))


def test_on_policy_reward_leaves_the_hybrids_out():
    """Of eight completions the hybrid has 1 and the seven others .2: their mean is .3."""
    record = {"curve": [[5, 0.3, 0.4, 15.0, 1.0], [10, 0.3, 0.4, 15.0, None]]}
    [(_, hybrid), (_, plain)] = rec.on_policy_reward(record, 8)
    assert hybrid == pytest.approx(0.2) and plain == 0.3


# ---- costs -----------------------------------------------------------------------------------------------


def commands_of(row):
    flags = REGIMES[row.regime][0]
    if row.after_sft:
        return (f"sft.py {flags} --steps 100", f"{row.command} --steps 60")
    return (f"{row.command} {flags}",)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_distinct_demonstrations_of_a_row(row):
    """min(steps x batch, demonstrated questions) of supervised rows; none without demonstrations."""
    got = rec.demonstrations(commands_of(row))
    first = commands_of(row)[0].split()[0]
    if first in ("sft.py", "idft_hinted.py"):
        most = {"easy": 1649, "few 64": 64, "few 16": 16}.get(row.regime, 4000)
        steps = 100 if row.after_sft or "--steps 100" in row.command else 200
        assert got == pytest.approx(min(16 * steps, most), rel=0.002)  # a few questions of train occur twice
    elif first == "opsd.py":
        most = {"easy": 1649}.get(row.regime, 4000)
        assert got == pytest.approx(min(32 * 100, most), rel=0.002)
    elif first not in ("prefix_rft.py", "luffy.py"):
        assert got == 0
    else:
        shares = {"prefix_rft, 10 % demonstrated": 0.1, "prefix_rft, 1 % demonstrated": 0.01}
        of_regime = {"easy": 1600 * 1649 / 4000, "few 64": 64, "few 16": 16}
        assert got == pytest.approx(of_regime.get(row.regime, 1600 * shares.get(row.name, 1)), rel=0.002)


def test_distinct_demonstrations_of_a_supervised_run(tmp_path, monkeypatch):
    """Three steps of four rows: what it encodes, counted."""
    seen = []
    encode = sft.tok.encode_response
    monkeypatch.setattr(sft.tok, "encode_response", lambda t, text: seen.append(text) or encode(t, text))
    flags = f"--steps 3 --batch-size 4 --solution-key easy_solution --output-dir {tmp_path / 'run'}"
    sft.main(sft.parse_args(f"{flags} --eval-questions 1 --eval-samples 0 --eval-first off".split()))
    assert len(seen) == len(set(seen)) == 12
    want = rec.demonstrations(("sft.py --steps 3 --batch-size 4 --solution-key easy_solution",))
    assert want == pytest.approx(12, rel=0.002)


def test_distinct_demonstrations_of_a_hybrid_run(tmp_path, monkeypatch):
    """Three steps of four rows: the questions whose demonstration was used, as the data order has them."""
    drawn = []

    def watched(tokenizer, row, step, args):
        if row["demonstrated"] and row["solution"]:
            drawn.append(row["question"])
        return []

    orders = []
    shuffle = rows_of_data.shuffled_batches
    monkeypatch.setattr(rows_of_data, "shuffled_batches", lambda *x: orders.append(shuffle(*x)) or orders[0])
    monkeypatch.setattr(prefix_rft, "draw_prefix", watched)
    flags = "--steps 3 --batch-size 4 --split few_64 --group-size 2 --max-new-tokens 100"
    flags += f" --eval-questions 1 --eval-samples 0 --eval-first off --output-dir {tmp_path / 'run'}"
    prefix_rft.main(prefix_rft.parse_args(flags.split()))
    train = rows_of("few_64")
    order = torch.cat(orders[0][:3]).tolist()
    assert len(order) == 12 and drawn == [train[i]["question"] for i in order if train[i]["solution"]]
    assert 2 <= len(set(drawn)) <= 10  # about 5.6 are expected
    assert rec.demonstrations((f"prefix_rft.py {flags}",)) == pytest.approx(5.6, abs=0.2)


def rows_of(split):
    return [json.loads(line) for line in open(ROOT / f"tiny/data/{split}.jsonl")]


@pytest.mark.parametrize(
    ("split", "steps", "fraction"), [("few_64", 20, 1.0), ("few_16", 3, 0.3), ("train", 40, 0.1)]
)
def test_expected_demonstrations_are_a_mean_over_data_orders(split, steps, fraction):
    """Counted in 200 orders, by the script's own shuffle and its own draw of --demo-fraction."""
    rows_of_split = rows_of(split)
    solved = [bool(row["solution"]) for row in rows_of_split]
    counts = []
    for seed in range(200):
        torch.manual_seed(seed)
        order = torch.cat(rows_of_data.shuffled_batches(len(rows_of_split), steps, 16)[:steps]).tolist()
        shown = (torch.rand(len(rows_of_split)) < fraction).tolist()
        counts.append(len({rows_of_split[i]["question"] for i in order if solved[i] and shown[i]}))
    counts = torch.tensor(counts, dtype=torch.float)
    flags = f"--split {split} --steps {steps} --demo-fraction {fraction}"
    want = rec.demonstrations((f"prefix_rft.py {flags}",))
    assert want == pytest.approx(counts.mean().item(), abs=4 * counts.std().item() / 200**0.5)
    assert counts.std() > 0


def test_cpu_seconds_of_interrupted_runs_are_left_out(half):
    known = rec.costs(half, "easy: sft")
    some = [x | {"cpu": None} if x["seed"] == 11 else x | {"cpu": 50.0} for x in half]
    assert known["cpu"] == 60.5 and rec.costs(some, "easy: sft")["cpu"] == 50
    none = [x | {"cpu": None} for x in half if x["row"] != "base"]
    assert rec.costs(none, "easy: sft")["cpu"] is None
    assert "| easy: sft | 1,647 | 0k | 200k | unknown |" in "\n".join(report.costs(none))


# ---- verdicts --------------------------------------------------------------------------------------------


def test_claims_compare_rows_on_questions_that_both_were_asked():
    """A row of another regime has no demonstrations, so the regime of the first row says what is asked."""
    for claim in CLAIMS:
        for better, worse, name in claim.comparisons:
            assert worse == "base" or worse in BY_KEY
            others = {BY_KEY[key].regime for key in (better, worse) if key != "base"}
            assert others <= {BY_KEY[better].regime, "answers"} and name in ("primary", "side")


def test_a_comparison_reads_both_rows_in_the_regime_of_the_first(full):
    got = rec.compare(full, "easy: prefix_rft", "answers: grpo", "primary")
    means = []
    for key in ("easy: prefix_rft", "answers: grpo"):
        shares = [x["test@0.6"][3:] for x in full if x["row"] == key and x["phase"] == "final"]
        means.append(sum(map(sum, shares)) / 3 / len(shares))
    assert got.estimate.mean == pytest.approx(means[0] - means[1])


def test_the_base_has_no_variance(full):
    got = rec.compare(full, "answers: grpo", "base", "primary")
    assert got.estimate.freedom == 9
    base = rec.number(full[0], "primary")
    assert got.estimate.mean == pytest.approx(
        sum(rec.numbers(full, "answers: grpo", "primary", "answers")) / 10 - base
    )


def compared(mean, p):
    return rec.Comparison("easy: sft", "easy: dft", "primary", estimate=Estimate(mean, 0.01, 8), p=p)


@pytest.mark.parametrize(
    ("found", "word", "details"),
    [
        ([(0.1, 0.01), (0.2, 0.049)], "supported", "2 of 2 hold"),
        ([(0.1, 0.01), (0.2, 0.05)], "not distinguishable", "1 of 2 holds"),
        ([(0.1, 0.01), (-0.2, 0.051)], "not distinguishable", "1 of 2 holds"),
        ([(0.1, 0.01), (-0.2, 0.001)], "contradicted", "1 of 2 holds, 1 the reverse"),
        ([(-0.1, 0.9)], "not distinguishable", "0 of 1 hold"),
    ],
)
def test_verdicts(found, word, details):
    assert rec.verdict([compared(*x) for x in found]) == (word, details)


def test_a_claim_with_a_missing_row_has_no_verdict_and_says_which(half):
    claim = next(x for x in CLAIMS if x.comparisons[0][:2] == ("easy: prefix_rft", "easy: sft"))
    found = rec.comparisons(half, claim)
    word, details = rec.verdict(found)
    assert word == "no verdict" and "easy: prefix_rft (3 of 10 seeds), easy: sft, then grpo" in details
    assert all(x.p is None and x.direction == 0 for x in found)


def test_p_values_are_corrected_within_a_claim(full):
    claim = max(CLAIMS, key=lambda x: len(x.comparisons))
    found = rec.comparisons(full, claim)
    raw = sorted(x.estimate.p for x in found)
    assert sorted(x.p for x in found)[0] == pytest.approx(min(1, len(raw) * raw[0]))
    assert all(x.p >= x.estimate.p for x in found)


# ---- tables ----------------------------------------------------------------------------------------------


def test_the_report_of_a_finished_study_lacks_nothing(full):
    text = "\n".join(itertools.chain(*report.tables(full).values()))
    assert not re.search("not run|not tuned|no verdict", text, re.I)
    for row in ROWS:
        assert f"| {row.key} |" in text and f"| {row.name} |" in text


def test_the_report_of_a_half_done_study_says_what_is_missing(half):
    found = report.tables(half)
    easy = "\n".join(found["regime easy"])
    assert "Not run yet: 17 of 20 rows." in easy
    few = "\n".join(found["regime few 16"])
    assert "Not run yet: few 16: sft; few 16: sft, then grpo; few 16: luffy; few 16: prefix_rft." in few
    assert "| 3 of 10 |" in easy and "| sft |" in easy and "| luffy |" not in easy
    assert "| grpo (no demonstrations) |" in easy
    assert "| easy: luffy |" in "\n".join(found["learning rates"])
    assert "| sft, then grpo | not run | not run |" in "\n".join(found["contrasts"])
    nothing = report.tables([])
    assert nothing.keys() == found.keys() and "Not run yet: base; " in "\n".join(nothing["regime few 16"])


def test_the_table_of_a_regime_by_hand():
    """Two seeds of .5 and .7: t(1) is 12.706, so the interval is .6 -+ 1.271."""
    some = [x for x in made_up.study_of("answers: grpo", seeds=2)]
    finals = [x for x in some if x["phase"] == "final" and x["row"] != "base"]
    for x, middle in zip(finals, (0.5, 0.7)):
        x |= {"test@0.6": [middle + 0.1] * 3 + [middle - 0.1] * 3, "test@0": [0.8] * 6, "test@1": [0.4] * 6}
        x |= {"harder@0.6": 0.05, "side@0.6": 0.9, "kl": 0.1, "entropy": 0.2, "length": 15.0, "pass@8": 0.75}
        x["curve"] = []
    line = report.results(some, "answers")[3]
    numbers = "0.600 [-0.671, 1.871] | 0.800 | 0.400 | 0.750 | 0.700 | 0.500 | 0.050 | 0.900 | 0.100 | 0.200"
    assert line == f"| grpo | {numbers} | 15.0 |  | 2 of 10 |"


def test_an_end_of_the_grid_is_said(full):
    row = BY_KEY["easy: sft"]
    middle = report.taken(full, row)
    assert middle == "4e-4"
    at_end = [x | {"lr": row.rates[-1]} if x["row"] == row.key else x for x in full]
    assert report.taken(at_end, row) == "2e-3, end of the grid"
    assert re.fullmatch(
        r"\de-4(, end of the grid)?; after \d+ steps of SFT",
        report.taken(full, BY_KEY["easy: sft, then grpo"]),
    )


def test_the_tuning_table_has_the_mean_of_both_seeds(full):
    line = next(x for x in report.tuning(full) if x.startswith("| easy: sft |"))
    both = [
        x["primary"] for x in full if x["row"] == "easy: sft" and x["phase"] == "tune" and x["lr"] == 4e-4
    ]
    assert len(both) == 2 and f"| {sum(both) / 2:.3f} |" in line and line.endswith("| 4e-4 |")


def test_equivalent_rows_are_called_so():
    near = rec.Comparison("easy: sft", "easy: dft", "side", estimate=Estimate(0.001, 0.004, 8), p=0.81)
    assert report.said(near) == "easy: sft − dft (side): +0.001 [-0.008, +0.010], p = .810, equivalent"
    far = rec.Comparison(
        "easy: prefix_rft", "answers: grpo", "primary", estimate=Estimate(0.4, 0.01, 8), p=1e-9
    )
    assert report.said(far) == "easy: prefix_rft − answers: grpo: +0.400 [+0.377, +0.423], p < .001"


# ---- figures ---------------------------------------------------------------------------------------------


def texts(figure, monkeypatch):
    """What is written where, as it is drawn: [(text, extent)]."""
    found = []
    draw = Text.draw

    def watched(text, renderer, *more, **rest):
        draw(text, renderer, *more, **rest)
        if text.get_text().strip() and text.get_visible():
            found.append((text.get_text(), Text.get_window_extent(text, renderer)))

    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", watched)
        figure.canvas.draw()
    return found


def collisions(found):
    def shared(a, b):
        width = min(a.x1, b.x1) - max(a.x0, b.x0)
        height = min(a.y1, b.y1) - max(a.y0, b.y0)
        return max(0, width) * max(0, height)

    return [(s, t) for (s, a), (t, b) in itertools.combinations(found, 2) if shared(a, b) > 4]


NAMES = [function.__name__ for function in charts.FIGURES]
DRAWN = [("full", name) for name in NAMES] + [("half", name) for name in ("results", "claims", "costs")]
DRAWN += [("nothing", name) for name in ("contrasts", "curves")]


def check_layout(figure, monkeypatch):
    """No two texts collide, and none is cut off."""
    found = texts(figure, monkeypatch)
    assert len(found) > 10 and collisions(found) == []
    edges = figure.bbox
    for text, box in found:
        assert box.x0 >= -1 and box.x1 <= edges.width + 1 and box.y0 >= -1 and box.y1 <= edges.height + 1, (
            text
        )


@pytest.mark.parametrize(("records", "name"), DRAWN)
def test_no_two_texts_of_a_figure_collide(records, name, request, monkeypatch):
    some = [] if records == "nothing" else request.getfixturevalue(records)
    figure = figures.styled(getattr(charts, name))(some)
    check_layout(figure, monkeypatch)


@pytest.mark.parametrize("script", defaults.SCRIPTS)
def test_no_two_texts_of_a_learning_curve_collide(script, monkeypatch):
    figure = defaults.draw(script)
    assert figure.get_figheight() <= figures.WIDTH / 2
    check_layout(figure, monkeypatch)


def test_a_collision_is_found(monkeypatch):
    figure, [[axis]] = figures.canvas(1, 1, 2)
    axis.text(0.5, 0.5, "one")
    axis.text(0.51, 0.5, "another")
    assert ("one", "another") in collisions(texts(figure, monkeypatch))


@pytest.mark.parametrize("name", ["contrasts", "costs"])
def test_figures_fit_a_page_and_are_the_same_again(name, half, tmp_path):
    for file in ("one.svg", "two.svg"):
        figures.save(figures.styled(getattr(charts, name))(half), tmp_path / file)
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "two.svg").read_text()
    width = float(re.search(r'<svg [^>]*width="([\d.]+)pt"', text)[1]) * 96 / 72
    assert 700 < width <= 830
    assert "<date" not in text.lower() and "opacity: 0" in text  # no background


def test_every_method_has_a_colour_of_its_own():
    assert set(rec.METHODS) <= figures.COLORS.keys()
    assert len(set(figures.COLORS.values())) == len(figures.COLORS)
    assert {rec.method(row) for row in ROWS} == set(rec.METHODS)
    assert set(weights.NAMES.values()) <= figures.COLORS.keys()


@pytest.mark.parametrize("color", [*figures.COLORS.values(), figures.GREY])
def test_colours_can_be_seen_on_light_and_dark_pages(color):
    """Contrast of at least 2.4 : 1 with white and with GitHub's dark background."""

    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return sum(x * y for x, y in zip((0.2126, 0.7152, 0.0722), linear))

    for page in ("#ffffff", "#0d1117"):
        high, low = sorted((luminance(color), luminance(page)), reverse=True)
        assert (high + 0.05) / (low + 0.05) > (4.2 if color == figures.GREY else 2.4)


# ---- the pages, the protocol and the real records --------------------------------------------------------


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A copy of README and pages, for a report to write into."""
    for page in tables.pages():
        copy = tmp_path / page.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(page, copy)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    return tmp_path


def test_tables_of_the_pages_are_those_of_the_records(pages):
    before = {page: page.read_text() for page in tables.pages()}
    for mark, lines in report.tables(REAL).items():
        tables.insert(mark, lines)
    changed = [page.name for page, text in before.items() if page.read_text() != text]
    assert changed == [], "run python experiments/report.py --write"


def test_a_report_writes_pages_and_figures(pages, half, tmp_path, monkeypatch, capsys):
    records = tmp_path / "records.jsonl"
    records.write_text("".join(json.dumps(x) + "\n" for x in half))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(charts, "FIGURES", (charts.contrasts,))  # the others are drawn above
    report.main(["--records", str(records), "--write"])
    assert "## regime easy" in capsys.readouterr().out
    assert "| 3 of 10 |" in (pages / "docs/results.md").read_text()
    assert "few 64" in (tmp_path / "contrasts.svg").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_those_of_the_records(name, tmp_path):
    figures.save(figures.styled(getattr(charts, name))(REAL), tmp_path / "drawn.svg")
    committed = (report.RESULTS / f"{name}.svg").read_text()
    assert committed == (tmp_path / "drawn.svg").read_text(), "run python experiments/report.py --write"


def test_the_figure_of_weights_is_that_of_the_scripts(tmp_path):
    figures.save(weights.draw(), tmp_path / "weights.svg")
    assert (tmp_path / "weights.svg").read_text() == (ROOT / "docs/weights.svg").read_text()


def wrong(records, record):
    """What is wrong with a record: it must be what today's row and scripts would run."""
    if record["row"] == "base":
        return "" if record["phase"] == "final" else "the base is not tuned"
    row = BY_KEY.get(record["row"])
    if row is None:
        return "no such row"
    share = tuple(record["share"]) if record["share"] else None
    option = (share, record["lr"])
    if [rec.renamed(x) for x in record["commands"]] != study.stages(records, row, option):
        return "other commands"
    for command in record["commands"]:
        rec.parsed(command)  # or it exits
    if record["phase"] == "tune":
        asked = [(share, rate) for share, rate in study.options(row)]
        asked += [(share, rate) for share in (rows.SHARES if row.after_sft else [None]) for rate in row.rates]
        return "" if record["seed"] in rows.TUNING_SEEDS and option in asked else "not in the grid"
    if record["seed"] not in rows.SEEDS[: row.seeds]:
        return "another seed"
    return "" if option == study.best(records, row) else "not the best option"


def test_made_up_records_are_what_the_study_would_run(full):
    assert [x for x in full if wrong(full, x)] == []
    commands = {x["row"]: x.get("commands") for x in full if x["phase"] == "final"}
    assert commands["answers: grpo"] == ["grpo.py --lr 0.0002"]
    assert commands["few 64: sft, then grpo, same data"] == [
        "sft.py --split few_64 --lr 0.0004 --steps 150",
        "grpo.py --split few_64 --lr 0.0002 --steps 40",
    ]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"row": "easy: ppo"}, "no such row"),
        ({"commands": ["sft.py --lr 0.0004"]}, "other commands"),
        ({"seed": 101}, "another seed"),
        ({"lr": 2e-3, "commands": ["sft.py --solution-key easy_solution --lr 0.002"]}, "not the best option"),
        ({"phase": "tune", "seed": 11}, "not in the grid"),
    ],
)
def test_a_record_of_another_method_is_found(full, change, sentence):
    record = next(x for x in full if x["row"] == "easy: sft" and x["phase"] == "final")
    assert wrong(full, record | change) == sentence


@pytest.mark.skipif(not REAL, reason="no records yet")
def test_records_are_what_the_study_would_run():
    assert [(x["row"], x["phase"], x["seed"], problem) for x in REAL if (problem := wrong(REAL, x))] == []
    runs = [(x["row"], x["phase"], str(x["share"]), x["lr"], x["seed"]) for x in REAL]
    assert len(set(runs)) == len(runs)


def cells(text, head):
    """The rows of the Markdown table below a head, as lists of cells."""
    lines = text.split(head)[1].splitlines()[2:]
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in itertools.takewhile(bool, lines)
    ]


def test_the_protocol_s_learning_rates_are_those_of_the_rows():
    said = cells((ROOT / PROTOCOL).read_text(), "| rows | rates |")
    groups = {
        "SFT, DFT, EAFT, IDFT, rewrites": ("sft", "dft", "eaft", "idft", "hinted"),
        "RL and hybrids": ("grpo", "sft, then grpo", "luffy", "prefix_rft"),
        "rejection sampling, DPO, SimPO": ("rft", "dpo", "simpo"),
    }
    assert [name for name, _ in said] == list(groups)
    for name, values in said:
        of_group = [row for row in ROWS if rec.method(row) in groups[name] and row.rates != rows.LOWER]
        assert of_group and {row.rates for row in of_group} == {tuple(map(float, values.split(",")))}
    assert [row.name for row in ROWS if row.rates == rows.LOWER] == ["sft, lower learning rates"]


def test_the_protocol_s_regimes_and_seeds_are_those_of_the_rows():
    text = (ROOT / PROTOCOL).read_text()
    levels = {"all levels": "123456", "levels 4 to 6": "456"}
    for name, _, number in cells(text, "| regime | demonstrations | primary number |"):
        assert REGIMES[re.sub(r" \([AB]\)$", "", name)][1] == levels[number]
    assert f"({rows.TUNING_SEEDS[0]} and\n{rows.TUNING_SEEDS[1]})" in text
    assert "11 to 15" in text and "11 to 20" in text and rows.SEEDS == tuple(range(11, 21))
    ten = {row.key for row in ROWS if row.seeds == 10}
    regimes = ("easy", "few 64")
    assert ten == {"answers: grpo", *(f"{r}: {name}" for r in regimes for name in rec.CONTRASTS)}
    assert {row.seeds for row in ROWS} == {5, 10}
    assert "44 × 8 tuning runs" in text
    later = re.findall(r"\*\*(\d+) rows?,", text.partition("## Changes after the first run")[2])
    assert sum(map(int, later)) == len(ROWS) - 44  # each is said where the protocol lists its changes


def git(*command):
    done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.strip()


def committed_at():
    """The commit that brought the protocol."""
    if not shutil.which("git") or git("rev-parse", "--is-shallow-repository") != (0, "false"):
        pytest.skip("no git history here")
    _, commits = git("log", "--diff-filter=A", "--format=%H", "--", PROTOCOL)
    return commits.splitlines()[-1]


def test_the_rules_are_those_that_were_committed_first():
    """What has changed since is listed below them."""
    first = git("show", f"{committed_at()}:{PROTOCOL}")[1]
    mark = "## Changes after the first run"
    assert (ROOT / PROTOCOL).read_text().split(mark)[0] == first.split(mark)[0]


@pytest.mark.skipif(not REAL, reason="no records yet")
def test_the_protocol_was_committed_before_every_run():
    first = committed_at()
    for commit in {x["commit"] for x in REAL if x["row"] != "base"}:
        assert git("merge-base", "--is-ancestor", first, commit)[0] == 0, commit
        # A clone has only the history: a commit amended after its runs is not there.
        assert git("merge-base", "--is-ancestor", commit, "HEAD")[0] == 0, commit
