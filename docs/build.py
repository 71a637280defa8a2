"""The site: README and docs/ as pages, the scripts with notes, each parent beside its child, the zoo.

    python docs/build.py                     # writes docs/site/; open docs/site/index.html

Plain HTML and one style sheet, no JavaScript, nothing from the network. Markdown pages are those that the
README leads to. Notes and sentences are in docs/*.toml, code is read from the scripts. A note about a line
that no longer exists is an error, and so is a link that leads nowhere.

    pip install -r docs/requirements.txt     # what it needs; the development packages include it
    python docs/check.py                     # looks at the pages in a browser
"""

import base64
import functools
import json
import posixpath
import re
import shutil
import sys
import textwrap
from pathlib import Path

try:
    import difference
    import listing
    import markup
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from listing import PAIRS, PARENTS, ROOT, SCRIPTS, SOURCES, page_of
    from markupsafe import Markup
except ImportError as error:
    print(f"{error.name} is missing. Run: pip install -r docs/requirements.txt", file=sys.stderr)
    sys.exit(2)

# Pages of the navigation. Markdown that the README leads to and that is in no group is in the last one.
GROUPS = {
    "Start": ["README.md", "course", "quickstart", "docs/choosing.md"],
    "Evidence": [
        "docs/results.md",
        "experiments/protocol.md",
        "docs/protocol.md",
        "docs/rlhf.md",
        "docs/benchmarks.md",
    ],
    "Use": ["docs/gpu.md", "docs/metrics.md", "docs/verifier.md", "docs/kernel.md", "docs/faq.md"],
    "Teach": ["docs/teaching.md", "zoo"],
    "Tiny world": ["tiny/README.md", "tiny/data/README.md", "tiny/preferences/README.md"],
    "Code": ["modules", "CONTRIBUTING.md", "CHANGELOG.md"],
    "Records": [],
}
TITLES = {
    "README.md": "Overview",
    "docs/protocol.md": "Protocol and audit",
    "experiments/protocol.md": "Protocol of the study",
    "docs/benchmarks.md": "Speed beside TRL",
    "docs/gpu.md": "Data, models, GPUs, memory",
    "docs/verifier.md": "The verifier",
    "docs/teaching.md": "Teaching",
    "tiny/data/README.md": "Its questions",
    "tiny/preferences/README.md": "Its preference pairs",
    "course": "Reading path and course",
    "quickstart": "A first hour by hand",
    "zoo": "The bug zoo",
    "modules": "Shared modules",
}
NOTEBOOK = "docs/quickstart.ipynb"
SITE = ROOT / "docs/site"

TEMPLATES = Environment(
    loader=FileSystemLoader(ROOT / "docs/templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
)


def filled(template, **values):
    return Markup(TEMPLATES.get_template(f"{template}.html").render(values))


def prose(text):
    return Markup(markup.prose(text))


# ---- what there is ---------------------------------------------------------------------------------------


@functools.cache
def markdown_files():
    """The README and every Markdown file that can be reached from it, in the order in which they are met."""
    files = ["README.md"]
    for file in files:
        text = re.sub(r"```.*?```", "", (ROOT / file).read_text(), flags=re.S)
        for link in re.findall(r"\]\(([^)#\s]+\.md)", text):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(file), link))
            if not link.startswith("https:") and path not in files:
                files.append(path)
    return files


def method_page(name):
    return f"docs/methods/{name}.md"


def title_of(file):
    """The title of a page in the navigation: for Markdown its first heading."""
    if file in TITLES:
        return TITLES[file]
    heading = re.search(r"^# (.+)$", (ROOT / file).read_text(), re.M)
    return heading[1].replace("`", "") if heading else f"Records: {Path(file).stem}"


@functools.cache
def groups():
    """{group: [(page, title)]} of the navigation."""
    listed = [file for files in GROUPS.values() for file in files]
    methods = [method_page(name) for name in SCRIPTS]
    rest = [file for file in markdown_files() if file not in listed + methods]
    out = {}
    for group, files in GROUPS.items():
        entries = []
        for file in files + (rest if group == "Records" else []):
            page = markup.page_of_markdown(file) if file.endswith(".md") else f"{file}.html"
            entries.append((page, title_of(file)))
        if entries:
            out[group] = entries
    return out


@functools.cache
def family():
    """The scripts of the navigation: method, code, and the diff to the parent."""
    rows = []
    for name, parent in PARENTS.items():
        row = {
            "name": name,
            "parent": parent,
            "method": markup.page_of_markdown(method_page(name)),
            "code": page_of(name),
            "diff": f"{parent}-{name}.html",
        }
        rows.append(row)
    return rows


def tabs(name):
    """Links from one page of a script to the others."""
    out = []
    if name in SCRIPTS:
        out.append((markup.page_of_markdown(method_page(name)), f"{name}.py: method"))
        out.append((page_of(name), f"{name}.py: code"))
    for parent, child in PAIRS:
        if name in (parent, child):
            out.append((f"{parent}-{child}.html", f"{parent}.py → {child}.py"))
    return out


def page(file, title, body, source, kind="text", headings=(), current=None):
    """A whole page. `headings` are the entries of "On this page", as (level, id, text).

    `current` is the marked page of the navigation, where that is not the page itself.
    """
    html = filled(
        "frame",
        file=file,
        current=current or file,
        title=title,
        body=body,
        kind=kind,
        headings=headings,
        family=family(),
        groups=groups(),
        source=source,
        source_href=f"{markup.repository()}/{source}",
    )
    return str(html)


# ---- Markdown --------------------------------------------------------------------------------------------


def markdown_page(path, images):
    text = (ROOT / path).read_text()
    body, headings = markup.markdown(text, path, images)
    if not headings or headings[0][0] != 1:  # tables of records
        body, headings = markup.markdown(f"# {title_of(path)}\n\n{text}", path, images)
    title = headings[0][2]
    script = Path(path).stem
    if path == method_page(script):
        links = str(filled("tabs", tabs=tabs(script)))
        body = body.replace("</h1>", f"</h1>{links}", 1)
    contents = [entry for entry in headings if entry[0] in (2, 3)]
    if len(contents) < 2:
        contents = []
    file = markup.page_of_markdown(path)
    return page(file, title, Markup(body), path, headings=contents)


def notebook_page(images):
    """The cells of the notebook with what they printed and drew; `images` gets {name: bytes}."""
    cells = []
    headings = []
    for cell in json.loads((ROOT / NOTEBOOK).read_text())["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            html, found = markup.markdown(text, NOTEBOOK, images)
            headings += found
            cells.append({"kind": "markdown", "html": Markup(html)})
            continue
        shown = {
            "kind": "code",
            "html": Markup(markup.highlighted(text, "python", None)),
            "printed": [],
            "images": [],
        }
        for output in cell["outputs"]:
            if "text" in output:
                shown["printed"].append("".join(output["text"]).rstrip("\n"))
            if "image/png" in output.get("data", {}):
                name = f"quickstart-{len([x for x in images if x.startswith('quickstart-')]) + 1}.png"
                images[name] = base64.b64decode(output["data"]["image/png"])
                shown["images"].append((name, "The figure that this cell draws"))
        cells.append(shown)
    contents = [entry for entry in headings if entry[0] == 2]
    body = filled("notebook", cells=cells)
    return page("quickstart.html", headings[0][2], body, NOTEBOOK, headings=contents)


# ---- code ------------------------------------------------------------------------------------------------


def notes(name):
    """{line: HTML of the notes about it} of a script."""
    beside = {}
    for note in markup.words("docs/notes.toml")["note"]:
        at = [n for n, text in enumerate(listing.source(name), 1) if note["at"] in text]
        if len(at) > 1:
            raise ValueError(f"{name}.py: the note at {note['at']!r} is on lines {at}")
        if at:
            equation = markup.formula(note["equation"]) if "equation" in note else ""
            text = markup.prose(note.get("text", ""))
            beside[at[0]] = beside.get(at[0], "") + f"{equation}{text} "
    return beside


def code_page(name):
    """Code on the left; an equation or a sentence beside the line that they are about."""
    sentences = notes(name)
    count = len(listing.source(name))
    starts = sorted({1, *sentences})
    rows = []
    for first, end in zip(starts, [*starts[1:], count + 1]):
        row = {
            "first": first,
            "code": Markup("".join(listing.line(name, n) for n in range(first, end))),
            "notes": Markup(sentences.get(first, "")),
        }
        rows.append(row)
    functions = [(f, first) for f, (first, _) in listing.functions(name).items()]
    body = filled(
        "code",
        name=name,
        first_line=prose(listing.first_line(name)),
        tabs=tabs(name),
        functions=functions,
        rows=rows,
    )
    current = page_of(name) if name in SCRIPTS else "modules.html"
    return page(page_of(name), f"{name}.py", body, f"{name}.py", kind="code", current=current)


def modules_page():
    shared = [(name, page_of(name), prose(listing.first_line(name))) for name in listing.SHARED]
    rooms = [(name, page_of(name), prose(listing.first_line(name))) for name in listing.ROOMS]
    body = filled("modules", shared=shared, rooms=rooms)
    return page("modules.html", "Shared modules", body, "common")


# ---- diffs -----------------------------------------------------------------------------------------------


def diff_page(parent, child):
    hunks = []
    at = 0, 0
    cut = difference.hunks(parent, child)
    entries = difference.sentences(parent, child, markup.words("docs/hunks.toml"))
    for number, (hunk, entry) in enumerate(zip(cut, entries), 1):
        i1, i2, j1, j2 = hunk
        shown = {
            "number": number,
            "where": difference.where(parent, child, hunk),
            "sentence": prose(entry["say"]),
            "equation": Markup(markup.formula(entry["equation"])) if "equation" in entry else "",
            "before": Markup(difference.equal(parent, child, *at, i1 - at[0])),
            "changed": Markup(difference.changed(parent, child, hunk)),
        }
        hunks.append(shown)
        at = i2, j2
    body = filled(
        "diff",
        parent=parent,
        child=child,
        first_line=prose(listing.first_line(child)),
        tabs=tabs(child),
        hunks=hunks,
        removed=sum(i2 - i1 for i1, i2, _, _ in cut),
        added=sum(j2 - j1 for _, _, j1, j2 in cut),
        after=Markup(difference.equal(parent, child, *at, len(listing.source(parent)) - at[0])),
    )
    return page(f"{parent}-{child}.html", f"{parent}.py → {child}.py", body, f"{child}.py", kind="code")


# ---- the zoo and the course ------------------------------------------------------------------------------


def source_link(where):
    """(text, link) of owner/repository#number or owner/repository@commit:path."""
    if "#" in where:
        repository, _, number = where.partition("#")
        return where, f"https://github.com/{repository}/issues/{number}"
    repository, commit, path = re.fullmatch(r"([^@]+)@(\w+):(.+)", where).groups()
    return f"{repository}, {path} at {commit[:7]}", f"https://github.com/{repository}/blob/{commit}/{path}"


def painted(text, marked):
    return Markup(listing.paint([(None, text)], marked))


def zoo_page():
    bugs = []
    files = {}
    for number, (name, entry) in enumerate(markup.words("tests/zoo/bugs.toml").items()):
        path = entry["file"].removesuffix(".py")
        n = listing.line_of(path, entry["old"])
        correct = listing.source(path)[n - 1]
        wrong = correct.replace(entry["old"], entry["new"])
        correct, wrong = textwrap.dedent(f"{correct}\n{wrong}").split("\n")
        marks = difference.differing(wrong, correct)
        bug = {
            "name": name,
            "number": number,
            "file": entry["file"],
            "line": n,
            "href": f"{page_of(path)}#L{n}",
            "title": entry["title"],
            "symptom": entry["symptom"],
            "run": entry.get("run", ""),
            "killed_by": entry["killed_by"],
            "sources": [source_link(where) for where in entry["source"]],
            "wrong": painted(wrong, marks[0]),
            "correct": painted(correct, marks[1]),
        }
        bugs.append(bug)
        files.setdefault(entry["file"], []).append(bug)
    body = filled("zoo", bugs=bugs, files=files)
    headings = [(2, "index", "Index"), (2, "bugs", "Bugs")]
    return page("zoo.html", "The bug zoo", body, "tests/zoo/bugs.toml", headings=headings)


def course_page():
    lessons = markup.words("docs/lessons.toml")
    walks = [{"time": walk["time"], "steps": list(map(prose, walk["steps"]))} for walk in lessons["walk"]]
    lectures = []
    headings = [(2, "reading-path", "Reading path"), (2, "course", "Six lectures")]
    for k, lecture in enumerate(lessons["lecture"], 1):
        shown = dict(lecture)
        for key in ("idea", "experiment", "exercise"):
            shown[key] = prose(lecture[key])
        shown["read"] = list(map(prose, lecture["read"]))
        lectures.append(shown)
        headings.append((3, f"lecture{k}", f"{k}. {lecture['title']}"))
    body = filled("course", walks=walks, lectures=lectures)
    return page("course.html", "Reading path and course", body, "docs/lessons.toml", headings=headings)


# ---- the site --------------------------------------------------------------------------------------------


def build(out):
    """Write all pages into a folder; returns {file name: HTML}."""
    images = {}
    pages = {markup.page_of_markdown(path): markdown_page(path, images) for path in markdown_files()}
    made = {
        "course.html": course_page(),
        "modules.html": modules_page(),
        "quickstart.html": notebook_page(images),
        "zoo.html": zoo_page(),
    }
    made |= {f"{parent}-{child}.html": diff_page(parent, child) for parent, child in PAIRS}
    made |= {page_of(name): code_page(name) for name in SOURCES}
    if twice := pages.keys() & made.keys():
        raise ValueError(f"two pages would be {sorted(twice)}")
    pages |= made
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "docs/style.css", out)
    for name, image in images.items():
        content = image if isinstance(image, bytes) else (ROOT / image).read_bytes()
        (out / name).write_bytes(content)
    for name, html in pages.items():
        (out / name).write_text(html)
    return pages


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else SITE
    if where == SITE:  # pages of earlier builds
        shutil.rmtree(SITE, ignore_errors=True)
    print(f"{len(build(where))} pages: {where / 'index.html'}")
