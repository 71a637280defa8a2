"""Exercises for a course: a script with blanks, or with a bug of the zoo in it, and tests that check it.

python docs/exercise.py grpo             # writes exercises/grpo/: docs/exercises.toml says what is blank
python docs/exercise.py grpo             # after editing exercises/grpo/grpo.py: what is correct so far?
python docs/exercise.py bug --seed 19    # one of tests/zoo/bugs.toml: find the line, fix it, run this again

Find a bug by reading, not by a diff with the repository: explain first what the line does to a gradient.
"""

import argparse
import ast
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests/zoo"))
from workshop import BUGS, patched, run, tomllib, workspace  # noqa: E402

EXERCISES = tomllib.loads((ROOT / "docs/exercises.toml").read_text())


def span(lines, mark):
    """First and last line (from 0, inclusive) of a mark in the lines of a script, and its name."""
    if "function" not in mark:
        ends = [[i for i, line in enumerate(lines) if mark[end] in line] for end in ("from", "to")]
        if [len(x) for x in ends] != [1, 1] or ends[0] > ends[1]:
            raise ValueError(
                f"stale: {mark['from']!r} ... {mark['to']!r} are not each on one line, in this order"
            )
        return ends[0][0], ends[1][0], f"line {ends[0][0] + 1}"
    nodes = [n for n in ast.parse("\n".join(lines)).body if getattr(n, "name", None) == mark["function"]]
    if not nodes:
        raise ValueError(f"stale: there is no function {mark['function']}")
    body = nodes[0].body[bool(ast.get_docstring(nodes[0])) :]
    return body[0].lineno - 1, body[-1].end_lineno - 1, mark["function"]


def blanked(script, marks):
    """The text of a script with the spans of these marks replaced by a sentence that says what to write."""
    lines = (ROOT / f"{script}.py").read_text().split("\n")
    spans = [(*span(lines, mark), mark["task"]) for mark in marks]
    for first, last, _, task in sorted(spans, reverse=True):  # from below: line numbers above stay right
        indent = lines[first][: len(lines[first]) - len(lines[first].lstrip())]
        lines[first : last + 1] = [
            f"{indent}raise NotImplementedError(",
            f"{indent}    {task!r}",
            f"{indent})",
        ]
    return "\n".join(lines)


def workshop_files(script, marks):
    """The script with its blanks; and its siblings, blank where the same lines would be the solution."""
    lines, files = (ROOT / f"{script}.py").read_text().split("\n"), []
    for path in sorted(ROOT.glob("*.py")):
        others, same = path.read_text().split("\n"), []
        for mark in marks:
            with suppress(ValueError):  # there is no such span in this sibling
                (a, b, _), (c, d, _) = span(lines, mark), span(others, mark)
                same += [mark] * (lines[a : b + 1] == others[c : d + 1])
        if same:
            files.append((path.name, blanked(path.stem, same)))
    return files


def write(out, texts):
    """A workspace without docs/, whose pages and notebook show the lines that are blank or have the bug."""
    workspace(out, texts)
    (out / "docs").unlink(missing_ok=True)


def verdict(seen):
    """open, incorrect or correct, from the results of a span's tests."""
    if any(exception == "NotImplementedError" for *_, exception in seen):
        return "open"
    passed = seen and all(outcome == "passed" for *_, outcome, _ in seen)
    return "correct" if passed else "incorrect"


def fill_in(script, out):
    """Blank the script unless that has been done, and print which blanks are solved."""
    marks = EXERCISES[script]
    if not out.exists():
        write(out, workshop_files(script, marks))
        print(f"written: {out}/{script}.py with {len(marks)} blanks; fill them and run this command again")
    names = [span((ROOT / f"{script}.py").read_text().split("\n"), mark)[2] for mark in marks]
    results = run({name: (out.resolve(), mark["tests"]) for name, mark in zip(names, marks)})
    for name, mark in zip(names, marks):
        print(f"{verdict(results[name][1]):9} {name:14} {mark['task']}")
    left = [mark for name, mark in zip(names, marks) if verdict(results[name][1]) != "correct"]
    if left:
        print(f"next: cd {out} && python -m pytest --tb=short {' '.join(left[0]['tests'])}")
    return not left


def find_bug(seed, out):
    """Plant one of the zoo's bugs unless that has been done, and say whether it is still there."""
    bug = list(BUGS.values())[seed % len(BUGS)]
    if not out.exists():
        write(out, [patched(bug)])
        print(f"written: {out}, where one line of {bug['file']} has a bug. Symptom: {bug['symptom']}")
        if "run" in bug:
            print(f"It shows with {bug['run']}, not with the default flags.")
    [(status, _)] = run({"bug": (out.resolve(), [bug["killed_by"]])}).values()
    if status:
        print("The bug is still there.")
    else:
        print(f"The bug is fixed. It was: {bug['title']} ({', '.join(bug['source'])})")
    return status == 0


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", choices=[*EXERCISES, "bug"], help="a script with blanks, or a copy with a bug"
    )
    parser.add_argument("--seed", type=int, default=0, help="which bug")
    parser.add_argument("--out", type=Path, help="default: exercises/WHAT; it is never overwritten")
    args = parser.parse_args(argv)
    name = f"bug-{args.seed}" if args.what == "bug" else args.what
    out = args.out or ROOT / "exercises" / name
    return find_bug(args.seed, out) if args.what == "bug" else fill_in(args.what, out)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
