"""For every bug of the zoo, the test that it names fails with the bug and passes without it."""

import importlib
import os
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "zoo"))
from workshop import BUGS, patched, run, workspace  # noqa: E402

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forks of one process")
SOURCE = re.compile(r"[\w.-]+/[\w.-]+(#\d+|@[0-9a-f]{40}:[\w./-]+)")
REFUSALS = {"AssertionError", "BadInput", "Failed"}  # verdicts of a test or a script; others are accidents


@pytest.fixture(scope="module")
def verdicts(request, tmp_path_factory):
    """{name: (exit status, results)} of the selected bugs; "clean" has the results without a bug."""
    items = [item for item in request.session.items if hasattr(item, "callspec")]
    selected = {item.callspec.params.get("name") for item in items}
    names = [name for name in BUGS if name in selected]
    clean, stale = workspace(tmp_path_factory.mktemp("clean")), {}
    jobs = {"clean": (clean, sorted({BUGS[name]["killed_by"] for name in names}))}
    for name in names:
        try:
            changed = [patched(BUGS[name])]
        except ValueError as error:  # its line has changed: only this bug fails
            stale[name] = None, str(error)
        else:
            jobs[name] = workspace(tmp_path_factory.mktemp(name), changed), [BUGS[name]["killed_by"]]
    return run(jobs) | stale


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_killed(name, verdicts):
    """Exit status 1 and one test that failed in its body: no syntax error, no missing test."""
    status, seen = verdicts[name]
    assert status == 1, f"the bug survives: exit status {status}, {seen}"
    [[node, phase, outcome, exception]] = seen
    assert (node, phase, outcome) == (BUGS[name]["killed_by"], "call", "failed")
    assert exception in REFUSALS, f"not a verdict: {exception}"


@pytest.mark.parametrize("name", BUGS)
def test_its_killer_passes_without_it(name, verdicts):
    status, seen = verdicts["clean"]
    killer = BUGS[name]["killed_by"]
    results = [result for result in seen if result[0] == killer]
    assert results == [[killer, "call", "passed", None]], f"exit status {status} of all tests"


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_one_line_with_a_source(name):
    bug = BUGS[name]
    assert set(bug) - {"run"} == {"title", "file", "old", "new", "source", "symptom", "killed_by"}
    if "run" in bug:  # the script must have these flags
        importlib.import_module(bug["file"].removesuffix(".py")).parse_args(bug["run"].split())
    assert "\n" not in bug["old"] + bug["new"] and bug["old"] != bug["new"]
    compile(patched(bug)[1], bug["file"], "exec")
    assert bug["source"] and all(SOURCE.fullmatch(x) for x in bug["source"])
    assert bug["symptom"].endswith(".") and not bug["title"].endswith(".")


def test_there_are_enough():
    assert len(BUGS) >= 20
    assert len({(bug["file"], bug["old"], bug["new"]) for bug in BUGS.values()}) == len(BUGS)
