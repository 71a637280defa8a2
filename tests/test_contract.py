"""The shape of the scripts, as data: lines, differences, shared functions, banners, metrics."""

import ast
import difflib
import importlib
import io
import re
import shlex
import sys
import tokenize

import pytest
from conftest import ROOT, read_jsonl

# code lines, all lines; docstrings, comments and blank lines are no code
BUDGETS = {
    "sft": (260, 340),
    "rft_rejection": (260, 340),
    "idft_hinted": (320, 430),
    "dpo": (260, 340),
    "grpo": (260, 340),
    "prefix_rft": (260, 340),
    "rlhf_ppo": (320, 430),
}
# parent, child: changed lines in %, difflib ratio, hunks, longest hunk
FAMILY = {
    ("grpo", "prefix_rft"): (14, 0.88, 22, 22),
    ("sft", "idft_hinted"): (25, 0.78, 22, 45),
    ("sft", "rft_rejection"): (30, 0.74, 22, 40),
    ("sft", "dpo"): (25, 0.78, 22, 30),
    ("grpo", "rlhf_ppo"): (38, 0.68, 30, 60),
}
SHARED = {
    "sample": BUDGETS,
    "logprobs": BUDGETS,
    "score": BUDGETS,
    "evaluate": BUDGETS,
    "self_check": BUDGETS,
    "advantages": ["grpo", "prefix_rft", "rlhf_ppo"],
    "inverse_z": ["grpo", "prefix_rft", "rlhf_ppo"],
    "policy_loss": ["grpo", "prefix_rft", "rlhf_ppo"],
}
BANNERS = ["arguments", "sampling", "log-probabilities", "the method", "evaluation", "training"]
GROUPS = ["run", "model", "data", "optimisation", "sampling", "evaluation", "the method"]
COMMENTS = (25, 45)  # per 100 code lines
LONGEST_FUNCTION, LONGEST_MAIN, WIDTH = 60, 110, 110


def source(name):
    return (ROOT / f"{name}.py").read_text()


def comments(text):
    """{line number: column} of every comment."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {t.start[0]: t.start[1] for t in tokens if t.type == tokenize.COMMENT}


def code_lines(text):
    """Lines of code without their comments; docstrings, comments and blank lines are gone."""
    marks, prose = comments(text), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            prose |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    code = [line[: marks.get(i, len(line))].rstrip() for i, line in lines if i not in prose]
    return [line for line in code if line]


def functions(text):
    """{name: source, decorators included} of the functions of a module."""
    lines = text.splitlines()
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    first = {f.name: min([f.lineno, *(d.lineno for d in f.decorator_list)]) for f in nodes}
    return {f.name: "\n".join(lines[first[f.name] - 1 : f.end_lineno]) for f in nodes}


# ---- one script ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUDGETS)
def test_a_script_is_short_enough_to_read(name):
    text = source(name)
    code, (most_code, most_lines) = len(code_lines(text)), BUDGETS[name]
    assert code <= most_code and len(text.splitlines()) <= most_lines
    for function, body in functions(text).items():
        limit = LONGEST_MAIN if function == "main" else LONGEST_FUNCTION
        assert len(body.splitlines()) <= limit, f"{function} has {len(body.splitlines())} lines"
    density = 100 * len(comments(text)) / code
    assert COMMENTS[0] <= density <= COMMENTS[1], f"{density:.0f} comments per 100 code lines"
    assert max(map(len, text.splitlines())) <= WIDTH


@pytest.mark.parametrize("name", BUDGETS)
def test_every_script_tells_the_story_in_the_same_order(name):
    """One banner form, one order; a method adds no banner and moves none. Arguments are grouped alike."""
    text = source(name)
    assert re.findall(r"^# ---- (.+?) -+$", text, re.M) == BANNERS
    assert {len(line) for line in text.splitlines() if line.startswith("# ----")} == {108}
    groups = re.findall(r"^    # ([a-z ]+)$", functions(text)["parse_args"], re.M)
    assert groups == GROUPS


@pytest.mark.parametrize("name", BUDGETS)
def test_a_script_imports_torch_transformers_and_common_and_no_script(name):
    known = set("torch transformers datasets common".split()) | sys.stdlib_module_names
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= known
        if isinstance(node, ast.ImportFrom):
            assert node.module.split(".")[0] in known
    lines = [re.findall(r"^(?:import|from) .+", source(x), re.M) for x in (name, "sft")]
    assert [x for x in lines[0] if x != "import re"] == lines[1]


# ---- two scripts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parent, child", FAMILY)
def test_a_child_differs_from_its_parent_by_its_method(parent, child):
    a, b = code_lines(source(parent)), code_lines(source(child))
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    hunks = [(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in matcher.get_opcodes() if tag != "equal"]
    changed, longest = 100 * sum(map(sum, hunks)) / (len(a) + len(b)), max(map(max, hunks))
    seen = f"{changed:.1f} % changed, ratio {matcher.ratio():.3f}, {len(hunks)} hunks, the longest {longest}"
    most_changed, ratio, most_hunks, most_lines = FAMILY[parent, child]
    assert changed <= most_changed and matcher.ratio() >= ratio, seen
    assert len(hunks) <= most_hunks and longest <= most_lines, seen


@pytest.mark.parametrize("function", SHARED)
def test_a_shared_function_is_the_same_to_the_byte(function):
    """A copy that drifts from its twins is how one script keeps a bug that another has lost."""
    have = [name for name in SHARED[function] if (ROOT / f"{name}.py").exists()]
    bodies = {name: functions(source(name))[function] for name in have}
    first = bodies[have[0]]
    assert [name for name in have if bodies[name] != first] == []


def test_flags_that_scripts_share_mean_the_same():
    """Same kind and same words for a flag in every script that has it; a default may differ."""
    meanings = {}
    for name in BUDGETS:
        if (ROOT / f"{name}.py").exists():
            parse = ast.parse(functions(source(name))["parse_args"])
            for call in (n for n in ast.walk(parse) if isinstance(n, ast.Call)):
                if isinstance(call.func, ast.Name) and call.func.id == "add":
                    kind = {
                        k.arg: ast.unparse(k.value) for k in call.keywords if k.arg in ("type", "choices")
                    }
                    meanings.setdefault(call.args[0].value, {})[name] = kind
    for flag, kinds in meanings.items():
        assert len({str(kind) for kind in kinds.values()}) == 1, f"{flag}: {kinds}"


# ---- metrics ---------------------------------------------------------------------------------------------


def written_keys(text):
    """Keys of the dictionaries that a script collects in `metrics`; what an f-string fills in is a star."""
    keys = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Assign, ast.AugAssign)) and isinstance(node.value, ast.Dict):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id == "metrics":
                for key in node.value.keys:
                    parts = key.values if isinstance(key, ast.JoinedStr) else [key]
                    keys.add("".join(p.value if isinstance(p, ast.Constant) else "*" for p in parts))
    return keys


def glossary():
    """Names in the first column of README's table `| metric | meaning |`."""
    _, header, table = (ROOT / "README.md").read_text().partition("| metric | meaning |\n")
    assert header, "README.md has no table with the header | metric | meaning |"
    rows = re.match(r"(?:\|.*\n?)+", table)[0].splitlines()[1:]
    names = {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}
    return {re.sub(r"@\d+$", "@k", name) for name in names}


# of evaluate(), and of the first line, beside what a script collects
EVALUATION = set("accuracy pass@k right wrong no_answer levels unparseable_gold".split())
# of rlhf_ppo.py's reward model, and of what it says of held-out responses
JUDGED = set("pair_accuracy pair_accuracy_max eval_score eval_utility eval_kl".split())


def test_metrics_of_a_run_are_those_in_its_source(runs):
    """So that the glossary, which is held against the sources, is about the files that users read."""
    for name, (out, _) in runs.items():
        keys = {re.sub(r"@\d+$", "@k", key) for line in read_jsonl(out / "metrics.jsonl") for key in line}
        assert keys == written_keys(source(name)) | EVALUATION | {"step", "peak_memory"}


def test_glossary_explains_every_metric_and_nothing_else():
    written = set().union(*(written_keys(source(n)) for n in BUDGETS if (ROOT / f"{n}.py").exists()))
    written |= EVALUATION | JUDGED | {"step", "peak_memory"}
    explained = glossary()
    assert written - explained == set(), "not in README's glossary"
    assert explained - written == set(), "in README's glossary, but in no metrics.jsonl"


# ---- the README ------------------------------------------------------------------------------------------


def commands():
    """(file, arguments) of every command in the README that runs a file of this project."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    found = re.findall(r"(?:python|torchrun [^`\n]*?) ((?:\w+/)*\w+\.py)\b([^`\n|;&#]*)", text)
    return sorted({(name, rest.replace("…", " ").strip()) for name, rest in found if "--help" not in rest})


def test_the_readme_has_commands():
    assert {f"{name}.py" for name in BUDGETS} <= {name for name, _ in commands()} and len(commands()) > 30


@pytest.mark.parametrize("name, rest", commands())
def test_every_command_of_the_readme_can_be_given(name, rest):
    assert (ROOT / name).exists()
    if name.removesuffix(".py") in BUDGETS:
        importlib.import_module(name.removesuffix(".py")).parse_args(shlex.split(rest))


def test_the_diff_that_the_readme_shows_is_in_the_scripts():
    """Lines with - are of the parent alone, lines with + of the child alone, and in this order."""
    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"```diff\n\$ diff -u (\w+\.py) (\w+\.py).*?\n(.*?)```", readme, re.S)
    parent, child = ((ROOT / shown[i]).read_text().splitlines() for i in (1, 2))
    lines = shown[3].splitlines()
    for sign, own, other in (("-", parent, child), ("+", child, parent)):
        at = [own.index(line[1:]) for line in lines if line[0] == sign]
        assert at and at == sorted(at)
        assert not [line for line in lines if line[0] == sign and line[1:] in other]
