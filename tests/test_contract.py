"""The shape of the scripts, measured: line budgets, differences, shared functions, flags, metrics."""

import argparse
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

from common.plumbing import flags

LINES = {  # at most, all lines
    "sft": 300,
    "rft_rejection": 440,
    "idft_hinted": 480,
    "dpo": 440,
    "grpo": 440,
    "prefix_rft": 470,  # grpo.py has 420
    "luffy": 490,  # five related methods are flags of it
    "opsd": 440,
    "rlhf_ppo": 610,  # three stages; the four terms of the utility have names
}
MEAN_WIDTH = 56  # characters of a code line, on average and without its indentation
WIDE, WIDE_PERCENT, WIDTH = 96, 10, 110  # few lines are wider than WIDE, none is wider than WIDTH
COMMENTS = (20, 40)  # per 100 code lines
LONGEST_FUNCTION, LONGEST_MAIN = 60, 130  # lines
LONGER = {
    ("rlhf_ppo", "main"): 145,  # three stages, each may be the last; two networks, and the scores before them
    ("prefix_rft", "main"): 140,  # a second mask
    ("luffy", "main"): 145,  # and the gate of HPT
    ("grpo", "parse_args"): 65,  # a help text that says what a value does is a line of its own
    ("rlhf_ppo", "parse_args"): 65,  # the flags of three stages
    ("prefix_rft", "parse_args"): 75,  # the flags of grpo.py, and five of its own
    ("luffy", "parse_args"): 75,  # and six of its own
}

# parent, child: changed lines in %, difflib ratio, hunks. What scripts share became shorter when the draw of
# a token moved to plumbing, so what differs is a larger share
FAMILY = {
    ("grpo", "prefix_rft"): (12, 0.88, 18),
    ("grpo", "luffy"): (14, 0.86, 22),  # with CHORD, SRFT, HPT and UFT as flags
    ("grpo", "opsd"): (20, 0.80, 22),
    ("sft", "idft_hinted"): (30, 0.72, 24),  # rewriting: one list a line, no splatted arguments
    ("sft", "rft_rejection"): (30, 0.73, 22),  # what it asks is checked before an earlier run is moved
    ("sft", "dpo"): (30, 0.74, 24),
    ("grpo", "rlhf_ppo"): (42, 0.59, 44),  # grpo.py has flags that PPO has no use for
}
# grpo.py has relatives that PPO has no use for: its copies are those of grpo.py with lines left out
SHORTER = {("rlhf_ppo", "advantages"), ("rlhf_ppo", "policy_loss")}
IN_EVERY_SCRIPT = {"sample", "logprobs", "score", "evaluate", "self_check"}
# each script has its own, under the same name
OWN = {"parse_args", "main", "rollout", "load_pairs"}

BANNERS = ["arguments", "sampling", "log-probabilities", "the method", "evaluation", "training"]
BANNER_WIDTH = 90
GROUPS = ["run", "model", "data", "optimisation", "sampling", "evaluation", "the method"]


def source(name):
    return (ROOT / f"{name}.py").read_text()


def comments(text):
    """{line number: column} of every comment."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {t.start[0]: t.start[1] for t in tokens if t.type == tokenize.COMMENT}


def code_lines(text):
    """The lines of code without their comments; docstrings and blank lines are left out, too."""
    starts = comments(text)
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    code = []
    for i, line in enumerate(text.splitlines(), 1):
        line = line[: starts.get(i, len(line))].rstrip()
        if line and i not in docstrings:
            code.append(line)
    return code


def functions(text):
    """{name: source, decorators included} of the functions of a module."""
    lines = text.splitlines()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


# ---- one script ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LINES)
def test_line_budget(name):
    lines = len(source(name).splitlines())
    assert lines <= LINES[name], f"{lines} lines"


@pytest.mark.parametrize("name", LINES)
def test_lines_are_short(name):
    """Lines that are packed until they are few are hard to read."""
    text = source(name)
    code = code_lines(text)
    mean = sum(len(line.strip()) for line in code) / len(code)
    assert mean <= MEAN_WIDTH, f"{mean:.1f} characters per code line"
    widths = [len(line) for line in text.splitlines()]
    wide = 100 * sum(width > WIDE for width in widths) / len(widths)
    assert wide <= WIDE_PERCENT, f"{wide:.1f} % of lines are wider than {WIDE}"
    assert max(widths) <= WIDTH


@pytest.mark.parametrize("name", LINES)
def test_functions_are_short(name):
    for function, body in functions(source(name)).items():
        lines = len(body.splitlines())
        limit = LONGEST_MAIN if function == "main" else LONGEST_FUNCTION
        limit = LONGER.get((name, function), limit)
        assert lines <= limit, f"{function} has {lines} lines"


@pytest.mark.parametrize("name", LINES)
def test_comment_density(name):
    text = source(name)
    density = 100 * len(comments(text)) / len(code_lines(text))
    assert COMMENTS[0] <= density <= COMMENTS[1], f"{density:.1f} comments per 100 code lines"


def cleverness(text):
    """Line numbers of what saves a line and costs a reader: `:=`, sum(lists, []), packed dicts."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.NamedExpr):
            found.append((node.lineno, "assignment expression"))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "sum":
            starts = node.args[1:] + [k.value for k in node.keywords if k.arg == "start"]
            if any(isinstance(start, (ast.List, ast.Tuple, ast.Call)) for start in starts):
                found.append((node.lineno, "sum of lists"))
        if isinstance(node, ast.Dict) and node.end_lineno > node.lineno:
            keys = [key for key in node.keys if key is not None]
            if len({key.lineno for key in keys}) < len(keys):
                found.append((node.lineno, "several keys on a line of a dict"))
    return found


@pytest.mark.parametrize("name", LINES)
def test_no_cleverness_that_saves_a_line(name):
    assert cleverness(source(name)) == []


def test_cleverness_is_found():
    assert cleverness("if (n := len(x)) > 1: pass") == [(1, "assignment expression")]
    assert cleverness("x = sum(lists, [])") == cleverness("x = sum(x, start=())") == [(1, "sum of lists")]
    assert cleverness('x = {\n"a": 1, "b": 2}') == [(1, "several keys on a line of a dict")]
    assert cleverness('x = {\n"a": sum(x),\n"b": 2,\n}\ny = {"a": 1, "b": 2}') == []


@pytest.mark.parametrize("name", LINES)
def test_banners(name):
    """One form and one order; a method neither adds a banner nor moves one."""
    text = source(name)
    assert re.findall(r"^# ---- (.+?) -+$", text, re.M) == BANNERS
    assert {len(line) for line in text.splitlines() if line.startswith("# ----")} == {BANNER_WIDTH}


def imports(text):
    """The names that a script imports, such as `time`, `torch.nn.functional` and `common.plumbing.runs`."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("name", LINES)
def test_imports(name):
    """What sft.py imports, the standard library and plumbing; never another script."""
    parent, child = imports(source("sft")), imports(source(name))
    assert parent - child == set()
    for imported in child - parent:
        is_standard = imported.split(".")[0] in sys.stdlib_module_names
        assert is_standard or imported.startswith("common.plumbing."), imported


# ---- flags -----------------------------------------------------------------------------------------------


def parser_of(name):
    """The parser that a script's parse_args builds."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags.Parser, "parse_args", lambda self, argv=None: seen.append(self))
        importlib.import_module(name).parse_args([])
    [parser] = seen
    return parser


def grouped(name):
    """{title of a group: its arguments}; groups of argparse itself are there if they have arguments."""
    groups = {group.title: group._group_actions for group in parser_of(name)._action_groups}
    return {title: actions for title, actions in groups.items() if actions}


def arguments(name):
    """{flag: its argument}, without --help."""
    found = {}
    for actions in grouped(name).values():
        found |= {action.option_strings[0]: action for action in actions}
    found.pop("-h")
    return found


@pytest.mark.parametrize("name", LINES)
def test_groups_of_flags(name):
    """Beside --help every flag is in one of our groups."""
    groups = grouped(name)
    [help_flag] = groups.pop("options")
    assert help_flag.dest == "help"
    assert list(groups) == GROUPS


@pytest.mark.parametrize("name", LINES)
def test_help_explains_every_flag_and_shows_its_default(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    text = " ".join(parser_of(name).format_help().split())
    for flag, action in arguments(name).items():
        assert action.help and action.help == action.help.strip(), flag
        expected = " ".join((action.help % vars(action)).split())
        if action.default is not None and action.default is not False:
            expected += " (default: " + " ".join(f"{action.default})".split())
        assert expected in text, f"{flag}: {expected}"


@pytest.mark.parametrize("name", LINES)
def test_every_number_has_bounds(name):
    """Its type refuses what no flag can mean, NaN included, and accepts the default."""
    numbers = 0
    for flag, action in arguments(name).items():
        is_number = isinstance(action.default, (int, float)) and not isinstance(action.default, bool)
        if not is_number:
            assert action.type is None, f"{flag}: a number without a default"
            continue
        numbers += 1
        assert action.type(repr(action.default)) == action.default, flag
        for text in ("nan", "inf", "-inf", str(10**31), str(-(10**31)), "many"):
            with pytest.raises(argparse.ArgumentTypeError, match="must be"):
                action.type(text)
                pytest.fail(f"{flag} accepts {text}")
    assert numbers >= 14


def test_flags_that_scripts_share_mean_the_same():
    """A flag has the same kind of value in every script that has it; default and bounds may differ."""
    meanings = {}
    for name in LINES:
        for call in ast.walk(ast.parse(functions(source(name))["parse_args"])):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "add":
                given = {k.arg: ast.unparse(k.value) for k in call.keywords}
                kind = given.get("type", "").split("(")[0]  # flags.integer, without its bounds
                meaning = (kind, given.get("choices"), given.get("action"))
                meanings.setdefault(call.args[0].value, {})[name] = meaning
    assert set(meanings) == {flag for name in LINES for flag in arguments(name)}
    for flag, found in meanings.items():
        assert len(set(found.values())) == 1, f"{flag}: {found}"


def test_flags_that_scripts_share_have_one_help():
    """But for those that count other things: steps of a round, pairs, questions."""
    helps = {}
    for name in LINES:
        for flag, action in arguments(name).items():
            helps.setdefault(flag, set()).add(action.help)
    several = {flag for flag, texts in helps.items() if len(texts) > 1}
    assert several == {"--steps", "--temperature", "--batch-size", "--k", "--beta"}


# ---- two scripts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parent, child", FAMILY)
def test_a_child_differs_from_its_parent_by_its_method(parent, child):
    a, b = code_lines(source(parent)), code_lines(source(child))
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    hunks = [(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in matcher.get_opcodes() if tag != "equal"]
    changed = 100 * sum(removed + added for removed, added in hunks) / (len(a) + len(b))
    seen = f"{changed:.1f} % changed, ratio {matcher.ratio():.3f}, {len(hunks)} hunks"
    most_changed, least_ratio, most_hunks = FAMILY[parent, child]
    assert changed <= most_changed and matcher.ratio() >= least_ratio and len(hunks) <= most_hunks, seen


def new_ones_last(parent, child):
    """Whether the parent's names that the child keeps come first, in the parent's order."""
    kept = [name for name in parent if name in child]
    return list(child)[: len(kept)] == kept


@pytest.mark.parametrize("parent, child", FAMILY)
def test_new_flags_come_last_in_their_group(parent, child):
    a, b = grouped(parent), grouped(child)
    for title in GROUPS:
        names = [[action.option_strings[0] for action in groups[title]] for groups in (a, b)]
        assert new_ones_last(*names), f"{title}: {names}"


@pytest.mark.parametrize("parent, child", FAMILY)
def test_new_metrics_come_last(parent, child):
    names = [list(step_metrics(source(name))) for name in (parent, child)]
    assert new_ones_last(*names), names


def test_a_function_of_several_scripts_is_the_same_to_the_byte():
    """A copy that drifts from the others is how one script keeps a bug that another has lost."""
    bodies = {}
    for name in LINES:
        for function, body in functions(source(name)).items():
            if (name, function) not in SHORTER:
                bodies.setdefault(function, {})[name] = body
    for function in IN_EVERY_SCRIPT:
        assert bodies[function].keys() == LINES.keys(), function
    different = {f: sorted(found) for f, found in bodies.items() if len(set(found.values())) > 1}
    assert different.keys() - OWN == set(), different


@pytest.mark.parametrize("name, function", sorted(SHORTER))
def test_a_shorter_copy_has_no_line_of_its_own(name, function):
    lines = functions(source("grpo"))[function].splitlines()
    for line in functions(source(name))[function].splitlines():
        assert line in lines, line
        lines = lines[lines.index(line) + 1 :]  # the next one comes later


# ---- metrics ---------------------------------------------------------------------------------------------


def key_name(key):
    """A key as text; what an f-string fills in is a star."""
    if isinstance(key, ast.Constant):
        return key.value
    parts = [part.value if isinstance(part, ast.Constant) else "*" for part in key.values]
    return "".join(parts)


def keys_of(node):
    """The keys of the dict literals that are merged in an expression such as {"step": 0} | more."""
    if isinstance(node, ast.Dict):
        return {key_name(key) for key in node.keys if key is not None}
    if isinstance(node, ast.BinOp):
        return keys_of(node.left) | keys_of(node.right)
    return set()


def logged_names(tree):
    """`metrics`, and what else is part of the second argument of runs.log."""
    names = {"metrics"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "runs.log" and len(node.args) > 1:
            names |= {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)}
    return names


def written_keys(text):
    """The keys of everything that a script collects for metrics.jsonl."""
    tree = ast.parse(text)
    names = logged_names(tree)
    keys = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Return):  # a function may return a dict of metrics
            keys |= keys_of(node.value)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "runs.log" and len(node.args) > 1:
            keys |= keys_of(node.args[1])
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id in names:
                keys |= keys_of(node.value)
            if isinstance(target, ast.Subscript) and ast.unparse(target.value) in names:
                keys.add(key_name(target.slice))
    return keys


def step_metrics(text):
    """The metrics of a training step, {key: line number}: they are one dict literal in main."""
    [main] = [node for node in ast.parse(text).body if getattr(node, "name", "") == "main"]
    found = []
    for node in ast.walk(main):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            if ast.unparse(node.targets[0]) == "metrics":
                keys = {key_name(key): key.lineno for key in node.value.keys}
                found += [keys] if "loss" in keys else []
    [keys] = found
    return keys


@pytest.mark.parametrize("name", LINES)
def test_metrics_of_a_step_are_one_dict_with_one_key_a_line(name):
    keys = step_metrics(source(name))
    lines = list(keys.values())
    assert len(keys) >= 10 and len(set(lines)) == len(lines)
    assert list(keys)[0] == "step"


def glossary():
    """The names in the first column of the table `| metric | meaning |` of docs/metrics.md."""
    _, header, table = (ROOT / "docs/metrics.md").read_text().partition("| metric | meaning |\n")
    assert header, "docs/metrics.md has no table with the header | metric | meaning |"
    rows = re.match(r"(?:\|.*\n?)+", table)[0].splitlines()[1:]
    names = {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}
    return {re.sub(r"@\d+$", "@k", name) for name in names}


# added by evaluation.verdict_counts and by runs.log
ADDED = {"accuracy", "pass@k", "correct", "incorrect", "no_answer", "levels", "peak_memory"}


def test_metrics_of_a_run_are_those_in_its_source(runs):
    """The glossary is compared with the sources, so the sources must agree with the files."""
    for name, (out, _) in runs.items():
        lines = read_jsonl(out / "metrics.jsonl")
        keys = {re.sub(r"@\d+$", "@k", key) for line in lines for key in line}
        assert keys == written_keys(source(name)) | ADDED


def test_glossary_explains_every_metric_and_nothing_else():
    written = ADDED.union(*(written_keys(source(name)) for name in LINES))
    explained = glossary()
    assert written - explained == set(), "not in docs/metrics.md"
    assert explained - written == set(), "in docs/metrics.md, but in no metrics.jsonl"


# ---- README and pages ------------------------------------------------------------------------------------

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands():
    """(file, arguments) of every command of README and pages that runs a file of this project."""
    text = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")
    found = re.findall(r"(?:python|torchrun [^`\n]*?) ((?:\w+/)*\w+\.py)\b([^`\n|;&#]*)", text)
    return sorted({(name, rest.replace("…", " ").strip()) for name, rest in found if "--help" not in rest})


def test_the_pages_have_commands():
    assert {f"{name}.py" for name in LINES} <= {name for name, _ in commands()} and len(commands()) > 30


@pytest.mark.parametrize("name, rest", commands())
def test_every_command_of_the_pages_parses(name, rest):
    assert (ROOT / name).exists()
    if name.removesuffix(".py") in LINES:
        importlib.import_module(name.removesuffix(".py")).parse_args(shlex.split(rest))


def test_the_diff_that_the_readme_shows_is_in_the_scripts():
    """Lines with - are in the parent alone, lines with + in the child alone, and both in order."""
    readme = (ROOT / "README.md").read_text()
    assert max(map(len, readme.split("```diff\n")[1].split("```")[0].splitlines())) <= 90
    shown = re.search(r"```diff\n\$ diff -u (\w+\.py) (\w+\.py).*?\n(.*?)```", readme, re.S)
    parent, child = ((ROOT / shown[i]).read_text().splitlines() for i in (1, 2))
    lines = shown[3].splitlines()
    for sign, own, other in (("-", parent, child), ("+", child, parent)):
        at = [own.index(line[1:]) for line in lines if line[0] == sign]
        assert at and at == sorted(at)
        assert not [line for line in lines if line[0] == sign and line[1:] in other]
