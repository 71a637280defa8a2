"""README and pages: size, links, measured numbers, and no phrase that only its author understands."""

import ast
import json
import re
from functools import cache

import pytest
from conftest import ROOT

from experiments import real_cells, real_report, records, report, retention
from experiments.rows import ROWS

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = ["sft", "rft_rejection", "idft_hinted", "dpo", "grpo", "prefix_rft", "luffy", "opsd", "rlhf_ppo"]
RESULTS = ROOT / "experiments/results"


def title(path):
    return str(path.relative_to(ROOT))


# ---- size ------------------------------------------------------------------------------------------------


def test_the_readme_is_short_and_its_code_narrow():
    text = README.read_text()
    assert len(text.encode()) <= 15_000
    for block in re.findall(r"```.*?\n(.*?)```", text, re.S):  # about 97 characters fit on the hosting site
        assert max(map(len, block.splitlines())) <= 104


# ---- links -----------------------------------------------------------------------------------------------


def anchors(text):
    """Ids that the hosting site gives to headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_local_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_every_page_can_be_reached_from_the_readme():
    seen, todo = set(), [README]
    while todo:
        page = todo.pop()
        seen.add(page)
        links = re.findall(r"\]\(([^)#\s]+\.md)", page.read_text())
        linked = {(page.parent / link).resolve() for link in links if not link.startswith("https:")}
        todo += [path for path in linked if path in PAGES and path not in seen]
    assert seen == set(PAGES)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_page_of_a_method_has_the_sections_of_the_template(name):
    text = (ROOT / f"docs/methods/{name}.md").read_text()
    headings = "Equation, What it changes, Usage, Metrics, Deviations, Results, Exercises"
    assert re.findall(r"^## (.+)$", text, re.M) == headings.split(", ")
    assert f"python {name}.py --help" in text and f"python docs/exercise.py {name}" in text


# ---- numbers ---------------------------------------------------------------------------------------------


INTERVAL = r"[+-]?[\d.]+ \[[+-]?[\d.]+, [+-]?[\d.]+\]"


@cache
def measured():
    """Means with intervals of the records, as "+0.294 [+0.264, +0.324]", signs included."""
    tables = [*report.tables(records.read()).values()]
    tables.append(real_report.report_lines(real_cells.read(real_cells.RECORDS)))
    tables.append(retention.compared(records.read(), records.read(retention.RECORDS)))
    text = "\n".join(line for lines in tables for line in lines)
    found = set(re.findall(INTERVAL, text + (RESULTS / "ppo_sweep.md").read_text()))
    falls = [re.findall(r"[\d.]+", gain) for gain in found]  # a gain, or how far something falls
    found |= {f"{mean} [{low}, {high}]" for mean, low, high in falls}
    return found | {f"{mean} [{high}, {low}]" for mean, low, high in falls}


@pytest.mark.parametrize(("page", "least"), [("README.md", 2), ("docs/results.md", 0), ("docs/rlhf.md", 20)])
def test_intervals_of_a_page_are_measured(page, least):
    intervals = re.findall(INTERVAL, (ROOT / page).read_text().replace("−", "-"))
    assert len(intervals) >= least and not [x for x in intervals if x not in measured()]


def test_numbers_of_the_scope_are_measured():
    text = README.read_text()
    records = json.loads((RESULTS / "decoding.json").read_text())
    new, old = (records[f"speed 0.5B {name}"]["tokens/s"] for name in ("recorded", "old"))
    assert f"{round(new, -2):,.0f} tokens/s, {new / old:.1f} × the loop" in text
    assert "H100" in records["speed 0.5B recorded"]["device"]
    bench = json.loads((RESULTS / "kernel_h100.json").read_text())["rows"]
    rows = [x for x in bench if x["shape"][:2] == [4096, 896] and x["dtype"] == "bf16"]
    ours, naive = (next(x for x in rows if x["name"] == n and not x["entropy"]) for n in ("ours", "naive"))
    time, memory = (ours[key] / naive[key] for key in ("seconds", "extra_bytes"))
    assert f"{time:.2f} × the time and {memory:.3f} × the memory" in text


def test_numbers_of_the_findings_are_measured():
    """Those without an interval."""
    text = " ".join(README.read_text().split())
    found = records.read()

    def of(key, name, regime="answers"):
        values = records.numbers(found, key, name, regime)
        return f"{sum(values) / len(values):.3f}"

    easy = of("base", "primary", "easy")
    assert f"the base has {of('base', 'primary')}, and {easy} on levels 4 to 6" in text
    gains = [f"{of('base', name)} to {of('answers: grpo', name)}" for name in ("greedy", "pass@8")]
    assert f"greedy accuracy from {gains[0]} and pass@8 from {gains[1]}." in text
    none, whole = (
        of(f"easy: prefix_rft, {x}", "primary", "easy") for x in ("prefix not trained", "whole prefix")
    )
    assert f"Without it pass@1 is {none} on these levels" in text
    assert f"with all prefix tokens trained it is {whole}, too." in text
    assert not any(records.lacking(found, row.key) for row in ROWS)
    assert f"The study has {len(ROWS)} rows, each a method in a regime; all have been run." in text


def test_no_other_number_of_the_readme_is_a_measurement():
    """What is left when code, links, tables of tested numbers and the tested phrases are gone."""
    text = re.sub(r"```.*?```|\$\$.*?\$\$", "", README.read_text(), flags=re.S)
    text = re.sub(r"^\| \[?`.*$", "", text, flags=re.M)  # test_table.py, test_experiments.py
    text = re.sub(r"`[^`]+`|\]\([^)]*\)", "", text)
    text = re.sub(r"[+−]?[\d.]+ \[[^\]]+, [^\]]+\]", "", text)  # test_intervals_of_a_page_are_measured
    text = re.sub(r"0\.\d{3}|The study has \d+ rows", "", text)  # test_numbers_of_the_findings_are_measured
    text = re.sub(
        r"^\| measured on an H100.*$", "", text, flags=re.M
    )  # test_numbers_of_the_scope_are_measured
    allowed = {
        "0.9",  # million parameters of the tiny model: tests/test_tiny.py
        "95",  # percent of an interval
        "1",  # A = 1 in the figure; 1 GB of memory
        "0",  # I_clip
        "0.2",
        "0.1",  # two values of β
        "46",  # bugs of the zoo: tests/test_zoo.py
        "135",
        "7",  # names of models
        "1.5",
        "80",  # GB of a card, and what fits: the first sentence of docs/gpu.md
        "0.6",  # a temperature
        "8",  # of pass@8
        "4",
        "6",  # levels
        "3",  # the last demonstrated level
        "20",  # percent of a prefix that are trained
        "320",  # questions of experiments/real.py
        "160",
        "32",
        "16",  # bits
    }  # fmt: skip
    assert set(re.findall(r"(?<![\w.])\d[\d.,]*(?<![.,])", text)) <= allowed


def test_the_zoo_has_as_many_bugs_as_the_readme_says():
    bugs = re.findall(r"^\[[\w-]+\]$", (ROOT / "tests/zoo/bugs.toml").read_text(), re.M)
    assert f"a zoo of {len(bugs)} real bugs" in README.read_text()


# ---- words -----------------------------------------------------------------------------------------------

BANNED = r"""
same story in|a line a step|carries no gradient|each path once|how small the evidence|every flag has a line
hints without imitation|your own judgement|wants a high|\bshall\b|please the reward model|poorly known
what it says, and|sharper than own|adopts the demonstrated style|what is solved at all|became narrower
what came of it|own words forget|what it stands for|a judge who|what is unproven|holds this against
fore(seen|sees)
missing is right|what it buys|did better than its group|what is said to the model
one of each group is a hybrid|cannot be scored as it samples
holds no text|\bmend\b|what it steers|updates running
a third and three times|own samples|foreign|start model|dead group|optimizer batch|side skills|hidden utility
\bdice\b|\bharvest|right (and|or) wrong|all (right|wrong)
above and below a progress bar|(?<!learning )(?<!sampling )\brates?\b
""".strip().replace("\n", "|")

# Phrases of files that have not been rewritten yet, and names of rows in records.
KNOWN = {
    ("common/verifier.py", "foreign"),  # a kind of token
    ("common/plumbing/flags.py", "rate"),
    ("common/plumbing/flags.py", "rates"),
}


def texts():
    """(where, text) of everything that users read."""
    for page in [*PAGES, *sorted((ROOT / "docs").glob("*.toml")), ROOT / "tests/zoo/bugs.toml"]:
        yield title(page), page.read_text()
    for cell in json.loads((ROOT / "docs/quickstart.ipynb").read_text())["cells"]:
        yield "docs/quickstart.ipynb", "".join(cell["source"])
    sources = [ROOT / f"{name}.py" for name in SCRIPTS]
    for path in [*sources, *sorted((ROOT / "common").rglob("*.py")), *sorted((ROOT / "tools").glob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):  # help texts, errors, docstrings
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield title(path), node.value


def banned(text):
    return {match[0].lower() for match in re.finditer(BANNED, " ".join(text.split()), re.I)}


def test_no_banned_phrase():
    found = {(where, phrase) for where, text in texts() for phrase in banned(text)}
    assert found - KNOWN == set()


def test_banned_phrases_are_found():
    assert banned("its own\nsamples, at a high rate") == {"own samples", "rate"}
    assert banned("on-policy samples at a high learning rate") == set()
