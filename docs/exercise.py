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
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "tests/zoo")]
try:
    from listing import PARENTS
    from workshop import BUGS, patched, run, tomllib, workspace
except ModuleNotFoundError as error:
    print(f"{error.name} is not installed; pip install -r requirements-dev.txt.", file=sys.stderr)
    sys.exit(2)

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


def telling(lines):
    """Lines that say something: of a solution those that may be in no other file."""
    return {line.strip() for line in lines if len(line.strip()) > 24}


def known(script):
    """Lines of the parent, which a student reads beside the script: they are no solution."""
    parent = PARENTS[script]
    return telling((ROOT / f"{parent}.py").read_text().split("\n")) if parent else set()


def blank_too(script, marks, others):
    """Marks for a sibling: the same spans, and functions that have a line of the solution."""
    lines = (ROOT / f"{script}.py").read_text().split("\n")
    same = []
    solution = set()
    for mark in marks:
        first, last, _ = span(lines, mark)
        solution |= telling(lines[first : last + 1])
        with suppress(ValueError):  # there is no such span in this sibling
            begin, end, _ = span(others, mark)
            if lines[first : last + 1] == others[begin : end + 1]:
                same.append(mark)
    solution -= known(script)
    done = {mark.get("function") for mark in same} | {"main"}
    for node in ast.parse("\n".join(others)).body:
        if isinstance(node, ast.FunctionDef) and node.name not in done:
            if solution & telling(others[node.lineno : node.end_lineno]):
                same.append({"function": node.name, "task": "blank, because a line of the solution is in it"})
    return same


def workshop_files(script, marks):
    """The script with its blanks; and its siblings, blank where their lines would be the solution."""
    files = [(f"{script}.py", blanked(script, marks))]
    for path in sorted(ROOT.glob("*.py")):
        if path.stem == script:
            continue
        same = blank_too(script, marks, path.read_text().split("\n"))
        if same:
            files.append((path.name, blanked(path.stem, same)))
    return files


def write(out, texts):
    """A workspace without docs/ and the zoo, which show the lines that are blank or have the bug."""
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


def with_siblings(bug):
    """The file with the bug; and its siblings with the same bug, whose line would be the solution."""
    files = [patched(bug)]
    line = next(text for text in (ROOT / bug["file"]).read_text().split("\n") if bug["old"] in text)
    wrong = line.replace(bug["old"], bug["new"])
    for path in sorted(ROOT.glob("*.py")):
        lines = path.read_text().split("\n")
        if path.name != bug["file"] and line in lines:
            files.append((path.name, "\n".join(wrong if text == line else text for text in lines)))
    return files


def find_bug(seed, out):
    """Plant one of the zoo's bugs unless that has been done, and say whether it is still there."""
    bug = list(BUGS.values())[seed % len(BUGS)]
    if not out.exists():
        files = with_siblings(bug)
        write(out, files)
        print(f"written: {out}, where one line of {bug['file']} has a bug. Symptom: {bug['symptom']}")
        if len(files) > 1:
            print(f"Other scripts have the same line, with the same bug. Only {bug['file']} is tested.")
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
