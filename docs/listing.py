"""The scripts as text and as HTML: their family, their lines, their functions, their colours."""

import ast
import functools
from html import escape
from pathlib import Path

from pygments.lexers import PythonLexer
from pygments.token import Token

ROOT = Path(__file__).resolve().parent.parent

# The one list of scripts: each with its parent, in the order of the navigation.
PARENTS = {
    "sft": None,
    "rft_rejection": "sft",
    "idft_hinted": "sft",
    "dpo": "sft",
    "grpo": None,
    "prefix_rft": "grpo",
    "luffy": "grpo",
    "opsd": "grpo",
    "rlhf_ppo": "grpo",
}
SCRIPTS = list(PARENTS)
PAIRS = [(parent, child) for child, parent in PARENTS.items() if parent]


def modules(folder):
    """Names of the modules in a folder, such as "common/verifier"."""
    paths = sorted((ROOT / folder).glob("*.py"))
    return [f"{folder}/{path.stem}" for path in paths if path.stem != "__init__"]


SHARED = modules("common")
ROOMS = modules("common/plumbing")
SOURCES = SCRIPTS + SHARED + ROOMS

# Colours, as the CSS classes of docs/style.css. Other tokens have the colour of the text.
COLOURS = [
    (Token.Comment, "c"),
    (Token.Literal.String, "s"),
    (Token.Keyword, "k"),
    (Token.Operator.Word, "k"),
    (Token.Literal.Number, "d"),
    (Token.Name.Function, "f"),
    (Token.Name.Class, "f"),
]


# ---- text ------------------------------------------------------------------------------------------------


@functools.cache
def source(name):
    """The lines of a script or module; the first has index 0."""
    return (ROOT / f"{name}.py").read_text().rstrip("\n").split("\n")


@functools.cache
def tree(name):
    return ast.parse("\n".join(source(name)))


def first_line(name):
    """What the script or module is, in its own words."""
    return ast.get_docstring(tree(name)).split("\n")[0]


@functools.cache
def docstring_end(name):
    return tree(name).body[0].end_lineno


@functools.cache
def functions(name):
    """{function or class: (first line, last line)}, from 1, decorators included."""
    found = {}
    for node in tree(name).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            decorators = [decorator.lineno for decorator in node.decorator_list]
            found[node.name] = min([node.lineno, *decorators]), node.end_lineno
    return found


def function(name, wanted):
    if wanted not in functions(name):
        raise ValueError(f"{name}.py has no function {wanted}")
    return functions(name)[wanted]


def place(name, n):
    """What is at line n: a function, "docstring", or "top level"."""
    for function_name, (first, last) in functions(name).items():
        if first <= n <= last:
            return function_name
    return "docstring" if n <= docstring_end(name) else "top level"


def line_of(name, fragment):
    """The number of the only line that has the fragment."""
    at = [n for n, line in enumerate(source(name), 1) if fragment in line]
    if len(at) != 1:
        raise ValueError(f"{name}.py: {fragment!r} is on {len(at)} lines, not on one")
    return at[0]


# ---- HTML ------------------------------------------------------------------------------------------------


def page_of(name):
    """The page that shows a script or module."""
    return name.replace("/", "-") + ".html"


def coloured(text, lexer=None):
    """For every line its pieces [(CSS class or None, text), ...]; joined they are the line."""
    lexer = lexer or PythonLexer(stripnl=False, ensurenl=False)
    lines = [[]]
    for kind, value in lexer.get_tokens(text):
        css = next((css for token, css in COLOURS if kind in token), None)
        for i, part in enumerate(value.split("\n")):
            if i:
                lines.append([])
            if part:
                lines[-1].append((css, part))
    return lines


@functools.cache
def coloured_source(name):
    return coloured("\n".join(source(name)))


def paint(pieces, marked=frozenset()):
    """HTML of a line; the characters whose numbers are `marked` stand out."""
    html = ""
    at = 0
    for css, text in pieces:
        inside = [at + i in marked for i in range(len(text))]
        borders = [i for i in range(1, len(text)) if inside[i] != inside[i - 1]]
        for first, last in zip([0, *borders], [*borders, len(text)]):
            part = escape(text[first:last], quote=False)
            if css:
                part = f'<span class="{css}">{part}</span>'
            html += f"<mark>{part}</mark>" if inside[first] else part
        at += len(text)
    return html.replace("</mark><mark>", "")


def line(name, n, side="L", css="", row=None, marked=frozenset()):
    """Line n of a script in a <pre>, with its number as a link to itself.

    The class i2 says that the line is indented by 8; what is wrapped is indented further.
    """
    text = source(name)[n - 1]
    indent = (len(text) - len(text.lstrip())) // 4
    classes = f"line i{min(indent, 8)} {css}".strip()
    style = f' style="--row:{row}"' if row else ""
    number = f'<a class="n" href="#{side}{n}" data-n="{n}" tabindex="-1" aria-hidden="true"></a>'
    code = paint(coloured_source(name)[n - 1], marked)
    return f'<span id="{side}{n}" class="{classes}"{style}>{number}{code}</span>'
