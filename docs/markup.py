"""Markdown, formulas and references as HTML.

Links of a Markdown file lead to its repository; here they lead to the pages of the site, and files that
have no page to the repository. What leads nowhere is an error.
"""

import functools
import os
import posixpath
import re
import tomllib
from html import escape
from pathlib import PurePosixPath

from latex2mathml.converter import convert
from listing import PAIRS, ROOT, SOURCES, coloured, function, line_of, page_of, paint
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.front_matter import front_matter_plugin


@functools.cache
def words(name):
    return tomllib.loads((ROOT / name).read_text())


# ---- formulas --------------------------------------------------------------------------------------------

# The plain notation of docs/*.toml: _x, _{xy}, ^x and ^{xy} are subscripts and superscripts, braces that
# follow neither _ nor ^ are braces, and two letters or more are a word.
PLAIN = re.compile(
    r"""
    (?P<group>[_^]\{)
  | (?P<open>\{)
  | (?P<close>\})
  | (?P<flag>--[\w-]+)
  | (?P<words>\ ?[A-Za-z][A-Za-z'-]+\.?(?:(?:\ a)?\ [A-Za-z][A-Za-z'-]+)*\ ?)
  | (?P<root>√\w)
  | (?P<gap>(?<=[\w)\]}])\ (?=[\w(\[∇]))
  | (?P<other>.)
    """,
    re.X,
)
COMMANDS = {"Σ": r"\sum ", "~": r"\sim ", "<": r"\lt ", "*": "^{*}", "%": r"\%", " ": ""}


def latex(plain):
    """LaTeX of a formula in the plain notation."""
    if "\\" in plain:
        raise ValueError(f"the formula {plain!r} has a backslash; its notation has no commands")
    out = ""
    braces = []
    for match in PLAIN.finditer(plain):
        kind, text = match.lastgroup, match[0]
        if kind == "group":
            out += text
            braces.append("}")
        elif kind == "open":
            out += r"\{"
            braces.append(r"\}")
        elif kind == "close":
            if not braces:
                raise ValueError(f"a brace too many in the formula {plain!r}")
            out += braces.pop()
        elif kind in ("flag", "words"):
            out += rf"\text{{{text}}}"
        elif kind == "root":
            out += rf"\sqrt{{{text[1]}}}"
        elif kind == "gap":
            out += r"\,"
        else:
            out += COMMANDS.get(text, text)
    if braces:
        raise ValueError(f"a brace is missing in the formula {plain!r}")
    return out


def mathml(tex, display="inline"):
    """MathML of a LaTeX formula."""
    tex = re.sub(r"\\mathrm\{(\w+)\}", r"\\text{\1}", tex)  # a word, not a product of letters
    try:
        html = convert(tex, display=display)
    except Exception as error:
        raise ValueError(f"this formula cannot be read: {tex}") from error
    if re.search(r"\\[A-Za-z]", html):
        raise ValueError(f"this formula has an unknown command: {tex}")
    html = re.sub(r"&#x0*([0-9A-F]+);", lambda m: escape(chr(int(m[1], 16)), quote=False), html)
    # Signs that the converter takes for identifiers are operators: they need space around them.
    return re.sub(r"<mi>([^\w<&])</mi>", r"<mo>\1</mo>", html).replace("~", "∼")


def pieces(plain):
    """A formula cut where its line may break: at wide gaps, and before relations outside of brackets."""
    out = [""]
    depth = 0
    for part in re.split(r"(  +| (?=[=·⇒⇔←≤∈~+−] ))", plain):
        if part.isspace() and depth == 0:
            out += [part, ""]
            continue
        out[-1] += part
        depth += sum(map(part.count, "([{⌊")) - sum(map(part.count, ")]}⌋"))
    return out


@functools.cache
def formula(plain):
    """A formula on a line of its own, which may break on a narrow page."""
    html = ""
    for piece in pieces(plain):
        if piece.isspace():
            html += "\N{EM SPACE} " if len(piece) > 1 else " "
        elif piece:  # its first sign is no sign of a number
            html += mathml(latex(piece)).replace("<mrow><mo>", '<mrow><mo form="infix">', 1)
    return f'<span class="eq">{html}</span>'


# A symbol with a subscript or superscript in the text of a page, such as π_old, p^γ or e^(−H).
SYMBOL = re.compile(
    r"""
    (?<![\w^.\\]) ([A-Za-zΑ-Ωα-ω])                       # one letter
    ((?: [_^] (?: \{[^}]*\} | \([^()]*\) | [−-]?[^\W_]+ ))+)  # the whole word after _ or ^
    (?! [\w(]*\.\w )                                    # no name of a file
    """,
    re.X,
)


def symbol(match):
    """MathML of a symbol of the text."""
    scripts = re.sub(r"([_^])(?:\(([^()]*)\)|([−-]?[^\W_]+))", r"\1{\2\3}", match[2])
    return mathml(latex(match[1] + scripts))


def text_with_symbols(text):
    """Escaped text in which symbols are MathML."""
    out = ""
    at = 0
    for match in SYMBOL.finditer(text):
        out += escape(text[at : match.start()], quote=False) + symbol(match)
        at = match.end()
    return out + escape(text[at:], quote=False)


# ---- references of docs/*.toml ---------------------------------------------------------------------------


def reference(name):
    """(text, link) of a script, script.function, script~fragment, parent→child, zoo, zoo.bug or page.md."""
    if "→" in name:
        parent, child = name.split("→")
        if (parent, child) not in PAIRS:
            raise ValueError(f"[[{name}]]: no such pair")
        return f"{parent}.py → {child}.py", f"{parent}-{child}.html"
    if name == "zoo":
        return "the bug zoo", "zoo.html"
    if name.startswith("zoo."):
        bugs = list(words("tests/zoo/bugs.toml"))
        bug = name.removeprefix("zoo.")
        if bug not in bugs:
            raise ValueError(f"[[{name}]]: no such bug")
        return f"bug {bugs.index(bug)}", f"zoo.html#{bug}"
    if name in SOURCES:
        return f"{name}.py", page_of(name)
    if name.endswith(".md"):
        return name, page_of_markdown(name)
    match = re.fullmatch(r"([\w/]+)([.~])(.+)", name)
    if not match or match[1] not in SOURCES:
        raise ValueError(f"[[{name}]]: no such file")
    path, mark, rest = match.groups()
    if mark == "~":
        n = line_of(path, rest)
        return f"{path}.py, line {n}", f"{page_of(path)}#L{n}"
    first, last = function(path, rest)
    return f"{path}.py, {rest}, lines {first}–{last}", f"{page_of(path)}#L{first}"


def prose(text):
    """A sentence of docs/*.toml: inline Markdown, and [[references]] which must exist."""

    def link(match):
        label, href = reference(match[1])
        return f"[{label}]({href})"

    return PROSE.renderInline(re.sub(r"\[\[(.+?)\]\]", link, text))


# ---- Markdown --------------------------------------------------------------------------------------------


def page_of_markdown(path):
    """The page of a Markdown file: docs/methods/sft.md is on methods-sft.html."""
    if not (ROOT / path).exists():
        raise ValueError(f"{path}: no such file")
    if path == "README.md":
        return "index.html"
    name = path.removeprefix("docs/").removesuffix(".md").removesuffix("/README")
    return name.replace("/", "-").lower() + ".html"


def repository():
    """Where files are that have no page: on the site that builds the pages, or beside them."""
    if "GITHUB_REPOSITORY" in os.environ:
        server, name, commit = (os.environ[f"GITHUB_{x}"] for x in ("SERVER_URL", "REPOSITORY", "SHA"))
        return f"{server}/{name}/blob/{commit}"
    return "../.."


def target(href, path):
    """The link of the site for a link of a Markdown file; `path` is that file."""
    if re.match(r"https?:|mailto:|#", href):
        return href
    link, mark, anchor = href.partition("#")
    file = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    if not (ROOT / file).exists():
        raise ValueError(f"{path}: the link {href} leads nowhere")
    if file.endswith(".md"):
        return page_of_markdown(file) + mark + anchor
    if file.removesuffix(".py") in SOURCES:
        return page_of(file.removesuffix(".py")) + mark + anchor
    if file == "common/plumbing":
        return "modules.html"
    if file == "docs/quickstart.ipynb":
        return "quickstart.html"
    return f"{repository()}/{file}{mark}{anchor}"


def slug(heading):
    """The id that the hosting site gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def highlighted(code, language, _):
    """A block of code: Python in colours, a diff with its added and removed lines marked."""
    code = code.rstrip("\n")
    if language == "diff":
        signs = {"+": "new", "-": "old"}
        lines = [(signs.get(text[:1], ""), escape(text, quote=False)) for text in code.split("\n")]
        return "\n".join(f'<span class="{css}">{text}</span>' if css else text for css, text in lines)
    if language == "python":
        return "\n".join(map(paint, coloured(code)))
    return escape(code, quote=False)


def fence(self, tokens, idx, options, env):
    """A block of code; it scrolls, so the keyboard must be able to reach it."""
    code = highlighted(tokens[idx].content, tokens[idx].info.strip(), None)
    return f'<pre class="block" tabindex="0"><code>{code}</code></pre>\n'


def code_inline(self, tokens, idx, options, env):
    """Short code does not break at its hyphens."""
    code = tokens[idx].content
    css = ' class="short"' if len(code) <= 26 else ""
    return f"<code{css}>{escape(code, quote=False)}</code>"


def is_number(text):
    """Whether a cell of a table is a number, with or without an interval or unit."""
    return len(text) <= 32 and re.match(r"[+−-]?[≤.\d]", text.strip()) is not None


def table_open(self, tokens, idx, options, env):
    env["tables"] = env.get("tables", 0) + 1
    columns = sum(token.type == "th_open" for token in tokens[idx : idx + 200])
    css = "scroll many" if columns > 4 else "scroll"
    return f'<div class="{css}" role="group" aria-label="Table {env["tables"]}" tabindex="0"><table>\n'


def table_close(self, tokens, idx, options, env):
    return "</table></div>\n"


def cell_open(self, tokens, idx, options, env):
    """A header without a text is an ordinary cell; numbers do not break."""
    tag = tokens[idx].tag
    text = plain_text(tokens[idx + 1])
    if tag == "th":
        return '<th scope="col">' if text.strip() else "<td>"
    if is_number(tokens[idx + 1].content):
        return '<td class="number">'
    return '<td class="long">' if len(text) > 40 else "<td>"


def th_close(self, tokens, idx, options, env):
    return "</th>" if tokens[idx - 1].content.strip() else "</td>"


def html(self, tokens, idx, options, env):
    """HTML of a page as it is, without comments."""
    return re.sub(r"<!--.*?-->\s*", "", tokens[idx].content, flags=re.S)


def image(self, tokens, idx, options, env):
    """A figure leads to its file; where the page is narrow it scrolls, as its labels would be too small."""
    source, text = tokens[idx].attrGet("src"), escape(plain_text(tokens[idx]))
    return f'<a class="figure scroll" href="{source}"><img src="{source}" alt="{text}"></a>'


def math_block(self, tokens, idx, options, env):
    inner = mathml(tokens[idx].content, "block")
    return f'<div class="scroll display" role="group" aria-label="Formula" tabindex="0">{inner}</div>\n'


def math_inline(self, tokens, idx, options, env):
    return mathml(tokens[idx].content)


def parser():
    md = MarkdownIt("commonmark", {"html": True, "xhtmlOut": False}).enable(["table", "strikethrough"])
    md.use(front_matter_plugin)  # of data sets; it is not shown
    md.use(dollarmath_plugin, double_inline=True)
    md.add_render_rule("text", lambda self, tokens, idx, *_: text_with_symbols(tokens[idx].content))
    md.add_render_rule("code_inline", code_inline)
    md.add_render_rule("fence", fence)
    md.add_render_rule("code_block", fence)
    md.add_render_rule("html_block", html)
    md.add_render_rule("html_inline", html)
    md.add_render_rule("table_open", table_open)
    md.add_render_rule("table_close", table_close)
    md.add_render_rule("th_open", cell_open)
    md.add_render_rule("th_close", th_close)
    md.add_render_rule("td_open", cell_open)
    md.add_render_rule("image", image)
    md.add_render_rule("math_block", math_block)
    md.add_render_rule("math_inline_double", math_block)
    md.add_render_rule("math_inline", math_inline)
    return md


PROSE = parser()


def plain_text(token):
    """The text of an inline token, without marks."""
    return "".join(child.content for child in token.children if child.type in ("text", "code_inline"))


def markdown(text, path, images):
    """(HTML, [(level, id, text)]) of a Markdown text; `images` gets {name on the site: file}.

    `path` is the file of the text, from which its links start.
    """
    md = parser()
    tokens = md.parse(text)
    headings = []
    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            heading = plain_text(tokens[i + 1])
            token.attrSet("id", slug(heading))
            headings.append((int(token.tag[1]), slug(heading), heading))
        for child in token.children or []:
            if child.type == "link_open":
                child.attrSet("href", target(child.attrGet("href"), path))
            if child.type == "image":
                place_image(child, path, images)
    return md.renderer.render(tokens, md.options, {}), headings


def place_image(token, path, images):
    """Copy an image to the site. One from the network is replaced by its text: pages work offline."""
    source = token.attrGet("src")
    if source.startswith("https:"):
        token.type, token.content = "text", plain_text(token)
        return
    file = posixpath.normpath(posixpath.join(posixpath.dirname(path), source))
    if not (ROOT / file).exists():
        raise ValueError(f"{path}: there is no image {source}")
    name = PurePosixPath(file).name
    if images.setdefault(name, file) != file:
        raise ValueError(f"two images have the name {name}: {images[name]} and {file}")
    token.attrSet("src", name)
