"""Blanks are noticed, the lines of the scripts are correct, others are incorrect; no mark is stale."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import exercise  # noqa: E402
from workshop import BUGS, run, workspace  # noqa: E402

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forks of one process")
MARKS = {
    f"{script} {i}": (script, mark)
    for script, marks in exercise.EXERCISES.items()
    for i, mark in enumerate(marks)
}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """{(which, mark): (exit status, what happened)} with every span blank, and in the scripts as they are."""
    texts = [
        (f"{script}.py", exercise.blanked(script, marks)) for script, marks in exercise.EXERCISES.items()
    ]
    blank = workspace(tmp_path_factory.mktemp("blank"), texts)
    whole = workspace(tmp_path_factory.mktemp("whole"))
    jobs = {f"blank {name}": (blank, mark["tests"]) for name, (_, mark) in MARKS.items()}
    for script, marks in exercise.EXERCISES.items():  # solved, while the siblings are still blank
        texts = [x for x in exercise.workshop_files(script, marks) if x[0] != f"{script}.py"]
        assert all("NotImplementedError" in text for _, text in texts)
        solved = workspace(tmp_path_factory.mktemp("solved"), texts)
        jobs[f"solved {script}"] = (solved, [test for mark in marks for test in mark["tests"]])
    every = sorted({test for _, mark in MARKS.values() for test in mark["tests"]})
    return run(jobs | {"whole": (whole, every)})


@pytest.mark.parametrize("name", MARKS)
def test_a_blank_is_open(name, verdicts):
    assert exercise.verdict(verdicts[f"blank {name}"][1]) == "open"


@pytest.mark.parametrize("script", exercise.EXERCISES)
def test_blank_siblings_do_not_matter(script, verdicts):
    assert exercise.verdict(verdicts[f"solved {script}"][1]) == "correct"


def test_no_sibling_gives_a_solution_away():
    files = dict(exercise.workshop_files("grpo", exercise.EXERCISES["grpo"]))
    assert files.keys() == {"grpo.py", "prefix_rft.py", "luffy.py", "opsd.py", "rlhf_ppo.py"}
    assert "surrogate = " not in files["prefix_rft.py"] and "def draw_prefix" in files["prefix_rft.py"]


def texts(folder):
    """{file: lines} of what could show a solution. Tests compare with formulas of their own."""
    found = {}
    for part in (".", "common", "common/plumbing", "experiments", "tools"):
        for path in (folder / part).glob("*"):
            if path.suffix in (".py", ".md", ".toml", ".ipynb"):
                found[f"{part}/{path.name}"] = path.read_text().split("\n")
    return found


@pytest.mark.parametrize("script", exercise.EXERCISES)
def test_no_workspace_of_an_exercise_holds_its_solutions(script, tmp_path):
    out = tmp_path / script
    marks = exercise.EXERCISES[script]
    exercise.write(out, exercise.workshop_files(script, marks))
    files = texts(out)
    assert {f"./{script}.py", "common/logprob.py", "experiments/weights.py"} <= files.keys()
    assert not (out / "docs").exists() and not list(out.rglob("bugs.toml"))
    whole = (ROOT / f"{script}.py").read_text().split("\n")
    blank = set(exercise.blanked(script, marks).split("\n"))
    solution = exercise.telling(line for line in whole if line not in blank) - exercise.known(script)
    assert solution
    shown = {name: solution & {line.strip() for line in lines} for name, lines in files.items()}
    assert not {name: lines for name, lines in shown.items() if lines}


@pytest.mark.parametrize("name", BUGS)
def test_no_script_beside_a_bug_holds_the_correct_line(name):
    bug = BUGS[name]
    lines = (ROOT / bug["file"]).read_text().split("\n")
    [correct] = [line for line in lines if bug["old"] in line]
    planted = dict(exercise.with_siblings(bug))
    assert bug["file"] in planted
    for path in ROOT.glob("*.py"):
        assert correct not in planted.get(path.name, path.read_text()).split("\n"), path.name


def test_the_script_itself_is_correct(verdicts):
    status, seen = verdicts["whole"]
    assert status == 0 and exercise.verdict(seen) == "correct"
    ran = {re.sub(r"\[.*", "", node) for node, *_ in seen}
    assert ran == {re.sub(r"\[.*", "", test) for _, mark in MARKS.values() for test in mark["tests"]}


def test_fill_in(tmp_path, capsys, monkeypatch):
    """Written once, never overwritten; correct spans are told from incorrect ones."""
    out = tmp_path / "dpo"
    unwritten = [["test", "call", "failed", "NotImplementedError"]]
    monkeypatch.setattr(exercise, "run", lambda jobs: {name: (1, unwritten) for name in jobs})
    assert not exercise.main(["dpo", "--out", str(out)])
    first = capsys.readouterr().out
    assert not (out / "docs").exists()  # the pages and the notebook show solutions
    assert "with 2 blanks" in first and first.count("\nopen      ") == 2 and "next: cd" in first
    text = (out / "dpo.py").read_text()
    assert text.count("NotImplementedError") == 2 and "def dpo_loss" in text
    whole = (ROOT / "dpo.py").read_text()
    wrong = whole.replace("log_ratio.exp() - log_ratio - 1", "log_ratio.exp() - log_ratio")
    assert wrong != whole
    (out / "dpo.py").write_text(wrong)
    monkeypatch.setattr(exercise, "run", run)
    assert not exercise.main(["dpo", "--out", str(out)])
    again = capsys.readouterr().out
    assert "written" not in again and "correct   dpo_loss" in again
    assert "incorrect kl_from_initial" in again


def test_find_the_bug(tmp_path, capsys, monkeypatch):
    """The line is not named. That its test fails on the bug is what test_zoo.py shows."""
    out, bug, whole = tmp_path / "bug", BUGS["k3-reversed"], (ROOT / "grpo.py").read_text()
    command = ["bug", "--seed", str(list(BUGS).index("k3-reversed")), "--out", str(out)]
    status = lambda: int((out / "grpo.py").read_text() != whole)  # noqa: E731
    monkeypatch.setattr(exercise, "run", lambda jobs: {"bug": (status(), [])})
    assert not exercise.main(command)
    said = capsys.readouterr().out
    assert "still there" in said and bug["symptom"] in said and bug["title"] not in said
    assert "with the same bug" in said
    assert (out / "grpo.py").read_text() == whole.replace(bug["old"], bug["new"])
    sibling = (ROOT / "prefix_rft.py").read_text()
    assert (out / "prefix_rft.py").read_text() == sibling.replace(bug["old"], bug["new"]) != sibling
    (out / "grpo.py").write_text(whole)
    assert exercise.main(command)
    assert bug["title"] in capsys.readouterr().out and not status()


@pytest.mark.parametrize(
    "mark", [{"function": "advantage"}, {"from": "import torch", "to": "def main(args)"}]
)
def test_a_mark_that_is_not_in_the_script_is_an_error(mark):
    with pytest.raises(ValueError, match="stale"):
        exercise.blanked("grpo", [mark | {"task": "x"}])


def test_what_is_not_installed_is_named():
    """Of the packages for development, which the quick start does not install."""
    code = "import runpy, sys; sys.modules['pytest'] = None; runpy.run_path('docs/exercise.py')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    sentence = "pytest is not installed; pip install -r requirements-dev.txt."
    assert done.returncode == 2 and done.stderr.strip() == sentence
