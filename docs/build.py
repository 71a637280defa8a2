"""Static pages: parent beside child with a sentence for each hunk, equations beside lines, lessons, the zoo.

    python docs/build.py                     # writes docs/site/; open docs/site/index.html

Plain HTML and one style sheet, no JavaScript, nothing from the network. The text is in docs/*.toml, the code
is read from the scripts. A note about a line that no longer exists is an error, and so is a broken reference.
"""

import ast
import difflib
import functools
import re
import shutil
import sys
import tomllib
from html import escape
from pathlib import Path

from pygments.lexers import PythonLexer
from pygments.token import Token

ROOT = Path(__file__).resolve().parent.parent
PAIRS = [("sft", "rft_rejection"), ("sft", "idft_hinted"), ("sft", "dpo"), ("grpo", "prefix_rft")]
PAIRS += [("grpo", "opsd"), ("grpo", "rlhf_ppo")]
SCRIPTS = ["sft", "rft_rejection", "idft_hinted", "dpo", "grpo", "prefix_rft", "opsd", "rlhf_ppo"]
COMMON = ["common/tokenization", "common/logprob", "common/verifier"]
ROOMS = "flags configs data tables columns examples models heads storage memory ranks".split()
ROOMS += "cuda_graph decoding runs folders screen evaluation annotator".split()
COMMON += [f"common/plumbing/{room}" for room in ROOMS]
COLOURS = [
    (Token.Comment, "c"),
    (Token.Literal.String, "s"),
    (Token.Keyword, "k"),
    (Token.Operator.Word, "k"),
]
COLOURS += [(Token.Literal.Number, "d"), (Token.Name.Function, "f")]


# Commands of the README's equation, as text.
TEX = {r"\frac{1}{Z}": "1/Z", r"\nabla ": "∇", r"\sum": "Σ", r"\cdot": "·", r"\log ": " log "}
TEX |= {r"\pi": "π", r"\mid": "|", r"\lt ": "<"}


# ---- text ------------------------------------------------------------------------------------------------


@functools.cache
def words(name):
    return tomllib.loads((ROOT / name).read_text())


def math(text):
    """An equation: _x, _{xy}, ^x and ^{xy} become subscripts and superscripts; there is no other mark-up."""
    text, before = escape(text), None
    while text != before:  # one level of nesting a turn
        before = text
        for mark, tag in (("_", "sub"), ("^", "sup")):
            text = re.sub(rf"{re.escape(mark)}(?:\{{([^{{}}]*)\}}|(\w))", rf"<{tag}>\1\2</{tag}>", text)
    return f'<span class="eq">{text}</span>'


def prose(text):
    """A sentence: `code`, and [[references]] which must exist."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))
    return re.sub(r"\[\[(.+?)\]\]", lambda m: reference(m[1]), text)


def reference(name):
    """A link to a script, script.function, script~fragment of a line, parent→child, zoo, zoo.bug, a file."""
    name = name.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    if "→" in name:
        if tuple(name.split("→")) not in PAIRS:
            raise ValueError(f"[[{name}]]: no such pair")
        return f'<a href="{name.replace("→", "-")}.html">{name}</a>'
    if name.split(".")[0] == "zoo":
        bug = name.partition(".")[2]
        if bug and bug not in words("tests/zoo/bugs.toml"):
            raise ValueError(f"[[{name}]]: no such bug")
        return f'<a href="zoo.html{"#" * bool(bug)}{bug}">{bug or "the bug zoo"}</a>'
    if name in SCRIPTS + COMMON:
        return f'<a href="{page_of(name)}">{name}.py</a>'
    path, mark, rest = re.fullmatch(r"([\w/]+)([.~])(.+)", name).groups()
    if path in SCRIPTS + COMMON:
        first, last = line_of(path, rest) if mark == "~" else function(path, rest)
        said = f"line {first}" if mark == "~" else f"{rest}, lines {first}–{last}"
        return f'<a href="{page_of(path)}#L{first}">{path}.py, {said}</a>'
    if not (ROOT / name).exists():
        raise ValueError(f"[[{name}]]: no such file")
    return f'<a href="../../{name}">{name}</a>'


# ---- code ------------------------------------------------------------------------------------------------


@functools.cache
def source(name):
    return (ROOT / f"{name}.py").read_text().rstrip("\n").split("\n")


def page_of(name):
    return name.replace("/", "-") + ".html"


def line_of(name, fragment):
    """(n, n): the number of the only line that has the fragment."""
    at = [n for n, line in enumerate(source(name), 1) if fragment in line]
    if len(at) != 1:
        raise ValueError(f"{name}.py: {fragment!r} is on {len(at)} lines, not on one")
    return at[0], at[0]


@functools.cache
def functions(name):
    """{function: (first line, last line)}, decorators included."""
    nodes = [
        n for n in ast.parse("\n".join(source(name))).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))
    ]
    return {n.name: (min([n.lineno, *(d.lineno for d in n.decorator_list)]), n.end_lineno) for n in nodes}


def function(name, wanted):
    if wanted not in functions(name):
        raise ValueError(f"{name}.py has no function {wanted}")
    return functions(name)[wanted]


def place(name, n):
    """What is at line n: a function, "docstring", or the lines between."""
    inside = [f for f, (first, last) in functions(name).items() if first <= n <= last]
    return inside[0] if inside else "docstring" if n <= docstring_end(name) else "top level"


@functools.cache
def docstring_end(name):
    return ast.parse("\n".join(source(name))).body[0].end_lineno


@functools.cache
def coloured(name):
    """For every line its pieces [(css class or None, text), ...]; joined they are the line."""
    lines = [[]]
    for kind, value in PythonLexer(stripnl=False, ensurenl=False).get_tokens("\n".join(source(name))):
        css = next((css for token, css in COLOURS if kind in token), None)
        for i, part in enumerate(value.split("\n")):
            if i:
                lines.append([])
            if part and lines[-1] and lines[-1][-1][0] == css:
                lines[-1][-1] = css, lines[-1][-1][1] + part
            elif part:
                lines[-1].append((css, part))
    return lines


def paint(pieces, marked=frozenset()):
    """HTML of a line; the characters whose numbers are `marked` stand out."""
    html, at = "", 0
    for css, text in pieces:
        cuts = [i for i in range(1, len(text)) if (at + i in marked) != (at + i - 1 in marked)]
        for first, last in zip([0, *cuts], [*cuts, len(text)]):
            part = escape(text[first:last], quote=False)
            part = f'<span class="{css}">{part}</span>' if css else part
            html += f"<mark>{part}</mark>" if at + first in marked else part
        at += len(text)
    return html.replace("</mark><mark>", "")


# ---- the difference of two scripts -----------------------------------------------------------------------


def hunks(parent, child):
    """[(i1, i2, j1, j2), ...]: lines i1:i2 of the parent became j1:j2 of the child, from 0; in order.

    The docstrings are one hunk, and functions that were inserted together are one each.
    """
    a, b, i0, j0 = source(parent), source(child), docstring_end(parent), docstring_end(child)
    out = [(0, i0, 0, j0)]
    for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(None, a[i0:], b[j0:], autojunk=False).get_opcodes():
        i1, i2, j1, j2 = i1 + i0, i2 + i0, j1 + j0, j2 + j0
        if tag == "equal":
            continue
        while tag == "insert" and not b[j1] and j2 < len(b) and b[j1] == b[j2]:  # blank lines: they close it
            i1, i2, j1, j2 = i1 + 1, i2 + 1, j1 + 1, j2 + 1
        starts = {f for f, _ in functions(child).values()}  # from 1
        cuts = [j for j in range(j1 + 1, j2) if j + 1 in starts]
        for first, last in zip([j1, *cuts], [*cuts, j2]):
            out.append((i1 if first == j1 else i2, i2, first, last))
    return out


def said(parent, child):
    """The entry of docs/hunks.toml of each hunk; a hunk without an entry is an error, and vice versa."""
    everything = words("docs/hunks.toml")
    own, entries = everything.get(f"{parent}→{child}", []), [everything["docstring"]]
    for i1, i2, j1, j2 in hunks(parent, child)[1:]:
        text = "\n".join(source(child)[j1:j2] or source(parent)[i1:i2])
        key = "at" if j1 < j2 else "was"
        found = [[x for x in some if key in x and x[key] in text] for some in (own, everything["any"])]
        found = found[0] or found[1]
        if len(found) != 1:
            near = text.strip().split("\n")[0]
            raise ValueError(
                f"{parent}→{child}: {len(found)} sentences for the hunk at {near!r}, line {j1 + 1}"
            )
        if found[0] in entries:
            raise ValueError(f"{parent}→{child}: {found[0]} matches two hunks")
        entries += found
    if lost := [x for x in own if x not in entries]:
        raise ValueError(f"{parent}→{child}: no hunk has {lost}")
    return entries


def aligned(a, b):
    """Rows (i or None, j or None) that put similar lines of two short lists beside each other, in order."""
    like = [[difflib.SequenceMatcher(None, x, y).ratio() for y in b] for x in a]
    best = [[0.0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in reversed(range(len(a))):
        for j in reversed(range(len(b))):
            both = like[i][j] + best[i + 1][j + 1] if like[i][j] > 0.5 else 0
            best[i][j] = max(both, best[i + 1][j], best[i][j + 1])
    rows, i, j = [], 0, 0
    while i < len(a) or j < len(b):
        if i < len(a) and j < len(b) and like[i][j] > 0.5 and best[i][j] == like[i][j] + best[i + 1][j + 1]:
            rows, i, j = [*rows, (i, j)], i + 1, j + 1
        elif j == len(b) or (i < len(a) and best[i][j] == best[i + 1][j]):
            rows, i = [*rows, (i, None)], i + 1
        else:
            rows, j = [*rows, (None, j)], j + 1
    return rows


def differing(x, y):
    """Numbers of the characters of x, and of y, that are in words which the other line does not have."""
    xs, ys = (re.findall(r"\w+|\s+|.", line) for line in (x, y))
    marks = set(), set()
    for tag, *ends in difflib.SequenceMatcher(None, xs, ys, autojunk=False).get_opcodes():
        for mark, parts, (first, last) in zip(marks, (xs, ys), (ends[:2], ends[2:])):
            if tag != "equal":
                start = len("".join(parts[:first]))
                mark |= set(range(start, start + len("".join(parts[first:last]))))
    return marks


# ---- pages -----------------------------------------------------------------------------------------------


def line(name, n, side="L", css="", marked=frozenset()):
    """Line n (from 1) of a script in a <pre>, with its number as a link to itself."""
    number = f'<a class="n" href="#{side}{n}" data-n="{n}" tabindex="-1" aria-hidden="true"></a>'
    css = f' class="{css}"' if css else ""
    return f'<span id="{side}{n}"{css}>{number}{paint(coloured(name)[n - 1], marked)}</span>'


def beside(left, right, css="twin", focus=""):
    """Two blocks of lines; narrow screens leave out a left one that is a twin of the right one, or void."""
    left, right = (
        f"<pre{focus}{x}>{''.join(lines)}</pre>" for x, lines in ((f' class="{css}"', left), ("", right))
    )
    return f'<div class="pair">{left}{right}</div>'


def equal_part(parent, child, i1, j1, n):
    """n lines that both scripts have; of many only the first and the last few are open."""
    rows = [(line(parent, i1 + k + 1, "a"), line(child, j1 + k + 1, "b")) for k in range(n)]
    if n <= 9:
        return beside(*zip(*rows)) if n else ""
    inner = beside(*zip(*rows[3:-3]))
    inner = f"<details><summary>{n - 6} equal lines</summary>{inner}</details>"
    return beside(*zip(*rows[:3])) + inner + beside(*zip(*rows[-3:]))


def changed_part(parent, child, i1, i2, j1, j2):
    """The lines of a hunk, similar ones beside each other with their differing words marked."""
    left, right, gap = [], [], '<span class="gap"></span>'
    for i, j in aligned(source(parent)[i1:i2], source(child)[j1:j2]):
        marks = set(), set()
        if i is not None and j is not None:
            marks = differing(source(parent)[i1 + i], source(child)[j1 + j])
        left.append(gap if i is None else line(parent, i1 + i + 1, "a", "old", marks[0]))
        right.append(gap if j is None else line(child, j1 + j + 1, "b", "new", marks[1]))
    return beside(
        left, right, css="" if i1 < i2 else "twin", focus=' tabindex="0"'
    )  # long lines are scrolled


def pair_page(parent, child):
    parts, at, cut = [], (0, 0), hunks(parent, child)
    entries = said(parent, child)
    for k, ((i1, i2, j1, j2), entry) in enumerate(zip(cut, entries), 1):
        parts.append(equal_part(parent, child, *at, i1 - at[0]))
        where = place(child, j1 + 1) if j1 < j2 else place(parent, i1 + 1)
        near = [
            f'<a href="#h{n}">{text}</a>'
            for n, text in ((k - 1, "previous"), (k + 1, "next"))
            if 0 < n <= len(cut)
        ]
        head = f'<h2><a href="#h{k}">{k}</a> · {where} <small class="soft">{" · ".join(near)}</small></h2>'
        head += f"<p>{prose(entry['say'])}{math(entry['equation']) if 'equation' in entry else ''}</p>"
        body = changed_part(parent, child, i1, i2, j1, j2)
        parts.append(f'<section class="hunk" id="h{k}">{head}{body}</section>')
        at = i2, j2
    parts.append(equal_part(parent, child, *at, len(source(parent)) - at[0]))
    contents = [f'<li><a href="#h{k}">{prose(entry["say"])}</a></li>' for k, entry in enumerate(entries, 1)]
    intro = (
        f"<p>Left {reference(parent)}, right {reference(child)}. {len(cut)} hunks; everything else is equal, "
    )
    intro += f"line by line.</p><details><summary>All hunks</summary><ol>{''.join(contents)}</ol></details>"
    return page(f"{parent}.py → {child}.py", f'<div class="prose">{intro}</div>{"".join(parts)}')


def notes(name):
    """{line: (HTML of equation and sentence)} of a script."""
    beside_lines = {}
    for note in words("docs/notes.toml")["note"]:
        at = [n for n, text in enumerate(source(name), 1) if note["at"] in text]
        if len(at) > 1:
            raise ValueError(f"{name}.py: the note at {note['at']!r} is on lines {at}")
        if at:
            html = (math(note["equation"]) if "equation" in note else "") + prose(note.get("text", ""))
            beside_lines[at[0]] = beside_lines.get(at[0], "") + f"<p>{html}</p>"
    return beside_lines


def bugs(name):
    """{line: links} of the zoo's bugs that are a change of this line."""
    found = {}
    for bug, entry in words("tests/zoo/bugs.toml").items():
        if entry["file"] == f"{name}.py":
            found.setdefault(line_of(name, entry["old"])[0], []).append(f'<a href="zoo.html#{bug}">{bug}</a>')
    return {n: f'<p class="bugs soft">in the zoo: {", ".join(links)}</p>' for n, links in found.items()}


def script_page(name):
    """Code on the left; an equation, a sentence or a bug beside the line that they are about."""
    asides, zoo, n = notes(name), bugs(name), len(source(name))
    starts = sorted({1, *asides, *zoo})
    rows = []
    for first, last in zip(starts, [*(s - 1 for s in starts[1:]), n]):
        code = "".join(line(name, k) for k in range(first, last + 1))
        aside = f"<aside>{asides.get(first, '')}{zoo.get(first, '')}</aside>"
        rows.append(f'<div class="row"><pre>{code}</pre>{aside}</div>')
    links = [
        f'<a href="#L{first}">{f}</a>' for f, (first, _) in functions(name).items() if not f.startswith("_")
    ]
    links += [f"beside {reference(f'{a}→{b}')}" for a, b in PAIRS if name in (a, b)]
    return page(f"{name}.py", f'<p class="soft">{" · ".join(links)}</p>{"".join(rows)}')


def source_link(where):
    """A link to owner/repository#number or owner/repository@commit:path."""
    if "#" in where:
        repository, _, number = where.partition("#")
        return f'<a href="https://github.com/{repository}/issues/{number}">{escape(where)}</a>'
    repository, commit, path = re.fullmatch(r"([^@]+)@(\w+):(.+)", where).groups()
    shown = f"{repository}, {path} at {commit[:7]}"
    return f'<a href="https://github.com/{repository}/blob/{commit}/{path}">{escape(shown)}</a>'


def zoo_page():
    all_bugs, parts = words("tests/zoo/bugs.toml"), []
    for seed, (name, bug) in enumerate(all_bugs.items()):
        n = line_of(path := bug["file"].removesuffix(".py"), bug["old"])[0]
        was = source(path)[n - 1].strip()
        now = was.replace(bug["old"], bug["new"])
        marks = differing(was, now)
        both = zip(("old", "new"), (was, now), marks)
        code = "".join(f'<span class="{c}">{paint([(None, text)], mark)}</span>' for c, text, mark in both)
        link = f'<a href="{page_of(path)}#L{n}">{bug["file"]}, line {n}</a>'
        text = f"<p>{escape(bug['symptom'])}</p><p class=soft>{link}. Reported in "
        text += "; ".join(map(source_link, bug["source"]))
        text += f". The test that fails: <code>{escape(bug['killed_by'])}</code>. "
        if "run" in bug:
            text += f"It shows only with <code>{bug['run']}</code>. "
        text += f"To search for it: <code>python docs/exercise.py bug --seed {seed}</code></p>"
        head = f'<h2 id="{name}">{escape(bug["title"])}</h2>'
        code = f'<pre tabindex="0">{code}</pre><div class="prose">{text}</div>'
        parts.append(f'<section class="small">{head}{code}</section>')
    intro = f"{len(all_bugs)} real bugs of the field, each as a change of one line of these scripts: "
    intro += "the correct line, then the line with the bug. "
    intro += "<code>pytest tests/test_zoo.py</code> shows that a test fails on each."
    return page("The bug zoo", f'<p class="prose">{intro}</p>{"".join(parts)}')


def one_equation():
    """The equation of the README and its table, a row a script."""
    section = (ROOT / "README.md").read_text().split("## The one equation\n")[1].split("\n## ")[0]
    equation = re.search(r"^\$\$(.+?)\$\$", section, re.M | re.S)[1]
    for command, text in TEX.items():
        equation = equation.replace(command, text)
    equation = re.sub(r"\\mathrm\{(\w+)\}", r"\1", equation)
    if "\\" in equation:
        raise ValueError(f"README.md: the pages do not know a command of the equation: {equation}")
    rows = [row[1:-1].split("|") for row in section.split("\n") if row.startswith("| ")]
    cells = ["".join(f"<td>{prose(cell.strip())}</td>" for cell in row) for row in rows]
    table = "".join(f"<tr>{row}</tr>" for row in cells)
    return f'{math(equation)}<div class="wide" tabindex="0"><table>{table}</table></div>'


def index_page():
    lessons = words("docs/lessons.toml")
    out = [f"<p>One readable file for each algorithm of LLM post-training: {reference('README.md')}.</p>"]
    out.append(f"<h2>The one equation</h2>{one_equation()}")
    out.append("<h2>Reading path</h2>")
    for walk in lessons["walk"]:
        steps = "".join(f"<li>{prose(step)}</li>" for step in walk["steps"])
        out.append(f"<h3>{walk['time']}</h3><ol>{steps}</ol>")
    out.append("<h3>A course of six lectures</h3>")
    for k, x in enumerate(lessons["lecture"], 1):
        commands = "".join(f"<li><code>{escape(c)}</code></li>" for c in x["commands"])
        out.append(f'<h4 id="lecture{k}">{k}. {escape(x["title"])}</h4><p>{prose(x["idea"])}</p><ul>')
        out.append(f"<li>Read {', '.join(map(prose, x['read']))}.</li>")
        out.append(f"<li>Experiment: {prose(x['experiment'])}<ul>{commands}</ul></li>")
        out.append(f"<li>Exercise: {prose(x['exercise'])} <code>{escape(x['practice'])}</code></li></ul>")
    out.append("<h2>Parent beside child</h2><ul>")
    out += [f"<li>{reference(f'{a}→{b}')}: {len(hunks(a, b))} hunks</li>" for a, b in PAIRS]
    out.append("</ul><h2>Scripts, with the equation beside the line</h2><ul>")
    first = {name: source(name)[0].strip('"') for name in SCRIPTS + COMMON}
    out += [f"<li>{reference(name)}: {escape(first[name])}</li>" for name in first]
    out.append(
        f"</ul><h2>Mistakes</h2><p>{reference('zoo')}: {len(words('tests/zoo/bugs.toml'))} of them.</p>"
    )
    return page("Post-training, line by line", f'<div class="prose">{"".join(out)}</div>')


def page(title, body):
    links = [
        ("index.html", "reading path"),
        *((page_of(n), f"{n}.py") for n in SCRIPTS),
        ("zoo.html", "bug zoo"),
    ]
    nav = "".join(f'<a href="{href}">{text}</a>' for href, text in links)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><link rel="stylesheet" href="style.css"></head>
<body><a class="skip" href="#content">to the content</a>
<header class="top"><nav aria-label="pages">{nav}</nav></header>
<main id="content"><h1>{escape(title)}</h1>
{body}
</main></body></html>
"""


def build(out):
    """Write all pages into a folder; returns {file name: HTML}."""
    pages = {"index.html": index_page(), "zoo.html": zoo_page()}
    pages |= {f"{a}-{b}.html": pair_page(a, b) for a, b in PAIRS}
    pages |= {page_of(name): script_page(name) for name in SCRIPTS + COMMON}
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "docs/style.css", out)
    for name, html in pages.items():
        (out / name).write_text(html)
    return pages


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/site"
    print(f"{len(build(where))} pages: {where / 'index.html'}")
