"""The pages: every line of every script, every difference with its sentence, no reference to nowhere."""

import json
import os
import re
import shlex
import sys
from collections import Counter
from html.parser import HTMLParser

import pytest
import yaml
from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import build  # noqa: E402
import check  # noqa: E402
import difference  # noqa: E402
import exercise  # noqa: E402
import listing  # noqa: E402
import markup  # noqa: E402

VOID = {"meta", "link", "br", "hr", "img"}


class Page(HTMLParser):
    """Ids, links, tags, and text and classes of elements that have an id; an open tag is an error."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.links, self.tags, self.text = [], Counter(), [], Counter(), {}
        self.css, self.attributes, self.headings, self.current = {}, [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags[tag] += 1
        self.attributes.append((tag, attrs))
        self.links += [attrs[k] for k in ("href", "src") if k in attrs]
        if "aria-current" in attrs:
            self.current.append(attrs["href"])
        if "id" in attrs:
            self.ids[attrs["id"]] += 1
            self.css[attrs["id"]] = attrs.get("class", "").split()
        if re.fullmatch("h[1-6]", tag) and any(outer == "main" for outer, _ in self.open):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append((tag, attrs.get("id")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        name = next((name for _, name in reversed(self.open) if name), None)
        self.text.setdefault(name, []).append(data)

    def lines(self, side):
        """[(text, classes)] of the lines of one side, in order."""
        names = [name for name in self.ids if re.fullmatch(rf"{side}\d+", name)]
        assert names == [f"{side}{n + 1}" for n in range(len(names))]
        return [("".join(self.text.get(name, [])), self.css[name]) for name in names]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """(folder, {file: Page})"""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GITHUB_REPOSITORY", raising=False)
        folder = tmp_path_factory.mktemp("site") / "docs/site"
        return folder, {name: Page(html) for name, html in build.build(folder).items()}


# ---- the code is all there -------------------------------------------------------------------------------


def test_the_family_has_every_script_and_is_that_of_the_readme():
    assert set(listing.PARENTS) == {path.stem for path in ROOT.glob("*.py")}
    rows = re.findall(r"^\| \[`(\w+)\.py`\].*?\|.*?\| (.*?) \|", (ROOT / "README.md").read_text(), re.M)
    said = {}
    for name, text in rows:
        child = re.match(r"child of `(\w+)\.py`", text)
        said[name] = child[1] if child else None
    assert said == listing.PARENTS


def test_the_shared_modules_are_all_there():
    paths = [path.relative_to(ROOT) for path in (ROOT / "common").rglob("*.py")]
    shared = {str(path.with_suffix("")) for path in paths if path.stem != "__init__"}
    assert set(listing.SHARED + listing.ROOMS) == shared


@pytest.mark.parametrize("name", listing.SOURCES)
def test_a_script_page_has_every_line(name, site):
    page = site[1][listing.page_of(name)]
    assert [text for text, _ in page.lines("L")] == (ROOT / f"{name}.py").read_text().splitlines()


@pytest.mark.parametrize("parent, child", listing.PAIRS)
def test_a_pair_page_has_both_scripts_and_their_difference(parent, child, site):
    """All lines of both, in order; and those that are not marked as changed are the same on both sides."""
    page = site[1][f"{parent}-{child}.html"]
    left, right = page.lines("a"), page.lines("b")
    for name, side in ((parent, left), (child, right)):
        assert [text for text, _ in side] == (ROOT / f"{name}.py").read_text().splitlines()
    kept = [text for text, css in left if "old" not in css]
    assert kept == [text for text, css in right if "new" not in css]
    assert all(set(css) & {"old", "twin"} for _, css in left)  # one of each pair is shown below 1,600 px
    assert all(set(css) & {"new", "same"} for _, css in right)
    hunks = sum("hunk" in css for css in page.css.values())
    assert hunks == len(difference.hunks(parent, child)) > 5


@pytest.mark.parametrize("parent, child", listing.PAIRS)
def test_a_function_stands_beside_the_one_of_its_name(parent, child):
    a, b = listing.source(parent), listing.source(child)
    matched = dict(difference.matched_functions(parent, child))
    shared = set(listing.functions(parent)) & set(listing.functions(child))
    assert {name: name for name in shared}.items() <= matched.items()
    for i1, i2, j1, j2 in difference.hunks(parent, child)[1:]:
        for i, j in difference.aligned(a[i1:i2], b[j1:j2]):
            if i is None or j is None or not a[i1 + i].strip():
                continue
            old = listing.place(parent, i1 + i + 1)
            assert matched.get(old, "top level") == listing.place(child, j1 + j + 1), a[i1 + i]


def test_a_new_function_before_a_changed_one_is_a_hunk_of_its_own(monkeypatch):
    """Line by line, `def first` would have become `def added`, whose end is the same."""
    old = ['"""."""', "def first(x):", "    y = f(x)", "    return y"]
    new = ['"""."""', "def added(x):", "    y = f(x)", "    return y", "def first(x):", "    return g(x)"]
    texts = {"old": old, "new": new}
    monkeypatch.setattr(listing, "source", texts.get)
    monkeypatch.setattr(difference, "source", texts.get)
    for cached in (listing.tree, listing.functions, listing.docstring_end):
        cached.cache_clear()
    try:
        assert difference.hunks("old", "new") == [(0, 1, 0, 1), (1, 1, 1, 4), (2, 4, 5, 6)]
    finally:
        for cached in (listing.tree, listing.functions, listing.docstring_end):
            cached.cache_clear()


def test_similar_lines_stand_beside_each_other():
    rows = difference.aligned(["a = f(x)", "same", "old"], ["new line", "a = f(x, y)", "same"])
    assert rows == [(None, 0), (0, 1), (1, 2), (2, None)]
    inserted = {5, 6, 7, 8, 9, 10}
    assert difference.differing("f(x, args)", "f(x, step, args)") == (set(), inserted)
    assert difference.differing("a = 1  # why", "a = 1 # why") == (set(), set())  # only a space
    painted = listing.paint([("k", "for"), (None, " x<")], {2, 3})
    assert painted == '<span class="k">fo</span><mark><span class="k">r</span> </mark>x&lt;'


# ---- and so are the words --------------------------------------------------------------------------------


@pytest.mark.parametrize("parent, child", listing.PAIRS)
def test_every_hunk_has_a_sentence_and_every_sentence_a_hunk(parent, child):
    entries = markup.words("docs/hunks.toml")
    assert len(difference.sentences(parent, child, entries)) == len(difference.hunks(parent, child))
    key = f"{parent}→{child}"
    own = entries[key]
    missing = own[1:]
    too_many = [*own, {"at": "nowhere", "say": "."}]
    twice = [*own, own[0] | {"say": "."}]
    for changed in (missing, too_many, twice):
        with pytest.raises(ValueError, match=key):
            difference.sentences(parent, child, entries | {key: changed})


def test_every_note_is_beside_a_line_of_some_script():
    for note in markup.words("docs/notes.toml")["note"]:
        on = [sum(note["at"] in line for line in listing.source(name)) for name in listing.SCRIPTS]
        assert 1 in on and max(on) == 1, note["at"]
        assert "equation" in note or "text" in note


@pytest.mark.parametrize("name", listing.SCRIPTS)
def test_equations_stand_beside_the_lines_of_every_script(name, site):
    page = site[1][listing.page_of(name)]
    assert sum(attrs.get("class") == "eq" for _, attrs in page.attributes) >= 8
    assert page.tags["math"] >= 8


@pytest.mark.parametrize(
    "name",
    [
        "grpo.policy_los",
        "grpo~no such line",
        "grpo~import",
        "sft→grpo",
        "zoo.k4",
        "NOTHING.md",
        "common/nothing.py",
    ],
)
def test_a_reference_that_leads_nowhere_is_an_error(name):
    with pytest.raises(ValueError):
        markup.prose(f"See [[{name}]].")


def test_reading_path():
    """Three lengths; six lectures with things to read, one experiment and one exercise that can start."""
    lessons = markup.words("docs/lessons.toml")
    assert [walk["time"] for walk in lessons["walk"]] == ["20 minutes", "1 hour"]
    assert len(lessons["lecture"]) == 6
    for lecture in lessons["lecture"]:
        assert set(lecture) == {"title", "idea", "read", "experiment", "commands", "exercise", "practice"}
        for command in lecture["commands"]:
            python, script, *flags = shlex.split(command)
            module = __import__(script.removesuffix(".py"))
            assert python == "python" and module.parse_args(flags).output_dir.startswith("runs/")
        python, script, what, *more = shlex.split(lecture["practice"])
        assert (python, script) == ("python", "docs/exercise.py") and what in [*exercise.EXERCISES, "bug"]


# ---- formulas --------------------------------------------------------------------------------------------


def bare(mathml):
    """MathML without attributes and groups."""
    return re.sub(r"</?math>|</?mrow>", "", re.sub(r"<(\w+) [^>]*>", r"<\1>", mathml))


@pytest.mark.parametrize(
    ("plain", "tex"),
    [
        ("π_{old}^2 < x_t", r"π_{\text{old}}^2\lt x_t"),
        ("y*_{<L}", r"y^{*}_{\lt L}"),
        ("D = {y ~ π}", r"D=\{y\sim π\}"),
        ("min(r A, B)", r"\text{min}(r\,A,B)"),
        ("β log π", r"β\text{ log }π"),
        ("Σ_j R_j", r"\sum _j\,R_j"),
        ("t of --pairs", r"t\text{ of }\text{--pairs}"),
    ],
)
def test_latex_of_the_plain_notation(plain, tex):
    assert markup.latex(plain).replace(r"\,\sum", r"\sum") == tex


@pytest.mark.parametrize("plain", ["π_{old", "x}", r"\nonsense{x}"])
def test_a_formula_that_cannot_be_read_is_an_error(plain):
    with pytest.raises(ValueError, match="formula"):
        markup.formula(plain)


def test_mathml():
    assert bare(markup.mathml(r"\frac{1}{Z}")) == "<mfrac><mn>1</mn><mi>Z</mi></mfrac>"
    assert bare(markup.mathml("A ← x")) == "<mi>A</mi><mo>←</mo><mi>x</mi>"  # an operator
    assert bare(markup.mathml(r"\mathrm{clip}")) == "<mtext>clip</mtext>"  # a word


def test_a_long_formula_may_break_outside_of_brackets():
    pieces = [piece for piece in markup.pieces("L = −1/Z Σ max(a, b = c),   r = β") if piece.strip()]
    assert pieces == ["L", "= −1/Z Σ max(a, b = c),", "r", "= β"]


def test_symbols_of_the_text_are_formulas():
    html = markup.text_with_symbols("I_clip, e^−φ, e^(−H), π_old/π_ref < 1; not a_file.py or prefix_rft")
    assert html.count("<math") == 5 and "_" not in html.replace("a_file.py or prefix_rft", "")
    assert "&lt; 1; not a_file.py or prefix_rft" in html
    assert "<math" not in markup.PROSE.renderInline("`π_old`")  # code stays code


def test_no_formula_is_left_as_text(site):
    """No TeX, and no _ or ^ behind a single letter, outside of code."""
    for name in site[1]:
        html = (site[0] / name).read_text()
        html = re.sub(r"<(math|pre|code|title|samp)\b.*?</\1>", "", html, flags=re.S)
        text = re.sub(r"<[^>]*>", " ", html)
        assert not re.findall(r"\$\$|\\[a-z]+|(?<!\w)[A-Za-zα-ωπ][_^][\w{(−]+", text), name


# ---- Markdown --------------------------------------------------------------------------------------------


def rendered(text, path="docs/page.md"):
    return markup.markdown(text, path, {})[0]


def test_tables_have_headers_and_a_place_to_scroll():
    html = rendered("| | pass@1 |\n|---|---|\n| sft | 0.9 [0.8, 1] |\n")
    assert '<div class="scroll" role="group" aria-label="Table 1" tabindex="0"><table>' in html
    assert "<td></td>" in html  # a header without a text is none
    assert '<th scope="col">pass@1</th>' in html and '<td class="number">0.9 [0.8, 1]</td>' in html


@pytest.mark.parametrize(
    ("link", "href"),
    [
        ("results.md#passk-at-large-k", "results.html#passk-at-large-k"),
        ("methods/sft.md", "methods-sft.html"),
        ("../README.md", "index.html"),
        ("../tiny/README.md", "tiny.html"),
        ("../grpo.py", "grpo.html"),
        ("../common/verifier.py", "common-verifier.html"),
        ("../common/plumbing", "modules.html"),
        ("quickstart.ipynb", "quickstart.html"),
        ("../experiments/weights.py", "../../experiments/weights.py"),
        ("https://arxiv.org", "https://arxiv.org"),
    ],
)
def test_links_of_markdown_lead_to_pages(link, href, monkeypatch):
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    assert f'<a href="{href}">' in rendered(f"[x]({link})")


def test_files_without_a_page_are_linked_where_the_pages_are_built(monkeypatch):
    for name, value in {"SERVER_URL": "https://host", "REPOSITORY": "a/b", "SHA": "0123"}.items():
        monkeypatch.setenv(f"GITHUB_{name}", value)
    assert 'href="https://host/a/b/blob/0123/tools/plot.py"' in rendered("[x](../tools/plot.py)")


@pytest.mark.parametrize("text", ["[x](nothing.md)", "[x](../nothing.py)", "![x](nothing.png)"])
def test_a_link_that_leads_nowhere_is_an_error(text):
    with pytest.raises(ValueError, match="nothing"):
        rendered(text)


def test_images_are_copied_and_those_of_the_network_are_not_loaded():
    images = {}
    html, _ = markup.markdown("![curve](weights.svg) ![badge](https://x/y.svg)", "docs/page.md", images)
    assert images == {"weights.svg": "docs/weights.svg"}
    assert '<a class="figure scroll" href="weights.svg"><img src="weights.svg" alt="curve"></a>' in html
    assert "y.svg" not in html and "badge" in html


def test_the_front_page_has_the_equation_and_a_row_for_every_script(site):
    html = (site[0] / "index.html").read_text()
    assert "<mtext>weight</mtext>" in html
    table = html.split('id="the-one-equation"')[1].split("</table>")[0]
    first = re.findall(r'<tr>\s*<td><code class="short">(\w+)\.py</code></td>', table)
    assert first == listing.SCRIPTS


# ---- the zoo ---------------------------------------------------------------------------------------------


def test_the_zoo_shows_symptoms_and_hides_answers(site):
    html = (site[0] / "zoo.html").read_text()
    index, cards = html.split('<h2 id="bugs">')
    for number, (name, bug) in enumerate(markup.words("tests/zoo/bugs.toml").items()):
        card = cards.split(f'id="{name}"')[1].split("</section>")[0]
        hunt, answer = card.split("<details><summary>Answer</summary>")
        text = {"hunt": hunt, "answer": answer}
        for part, content in text.items():
            text[part] = " ".join(re.sub(r"<[^>]*>", "", content).split())
        escaped = listing.escape(bug["symptom"], quote=False)
        assert f"Bug {number}" in text["hunt"] and escaped in text["hunt"].replace("&#39;", "'")
        assert answer.endswith("</details>\n") and bug["killed_by"] in text["answer"].replace("&#39;", "'")
        wrong, correct = re.findall(r'<span class="(?:old|new)">(.*?)</span>(?=<span|</pre>)', answer)
        lines = [re.sub(r"</?mark>", "", line) for line in (wrong, correct)]
        assert listing.escape(bug["new"].strip(), quote=False) in lines[0]
        assert listing.escape(bug["old"].strip(), quote=False) in lines[1]
        assert lines[0] != lines[1]
        assert 'class="old"' not in hunt and lines[1] not in hunt
        assert f'<a href="#{name}">{number}</a>' in index


def test_no_page_but_the_zoo_says_where_a_bug_is(site):
    """Students look for the line of a bug; a link to a bug gives its number alone."""
    name = "k3-reversed"
    number = list(markup.words("tests/zoo/bugs.toml")).index(name)
    assert markup.prose(f"[[zoo.{name}]]") == f'<a href="zoo.html#{name}">bug {number}</a>'
    for script in listing.SCRIPTS:
        assert "zoo.html#" not in (site[0] / f"{script}.html").read_text()


# ---- the pages as pages ----------------------------------------------------------------------------------


def test_links_lead_somewhere_and_nothing_comes_from_the_network(site):
    """Relative links lead to files and ids that exist; nothing is loaded but the style and images."""
    folder, pages = site
    for name, page in pages.items():
        assert not {"script", "iframe", "object", "video", "form"} & set(page.tags)
        for tag, attrs in page.attributes:
            loaded = attrs.get("src") or (attrs["href"] if tag == "link" else None)
            if loaded:
                assert "/" not in loaded and (folder / loaded).exists(), f"{name}: {loaded}"
        for link in page.links:
            if link.startswith("https://"):
                continue
            path, _, target = link.partition("#")
            if path.startswith("../../"):
                assert (ROOT / path[6:]).exists(), f"{name}: {link}"
            elif path not in pages:
                assert not path or (folder / path).exists(), f"{name}: {link}"
            if target and not path.startswith("../../"):
                assert target in pages[path or name].ids, f"{name}: {link}"
    assert not re.search(r"url\(|@import|http", (folder / "style.css").read_text())


def test_the_navigation_leads_to_every_page_and_marks_the_present_one(site):
    """Modules are in the navigation through the page that lists them."""
    pages = site[1]
    modules = {listing.page_of(name) for name in listing.SHARED + listing.ROOMS}
    for name, page in pages.items():
        linked = {link for link in page.links if link in pages}
        assert linked >= pages.keys() - modules, name
        assert page.current == ["modules.html" if name in modules else name]
    assert modules <= set(pages["modules.html"].links)
    for parent, child in listing.PAIRS:
        assert f"{parent}-{child}.html" in pages
    for group in ("results", "metrics", "protocol", "zoo", "course"):
        assert f"{group}.html" in pages["index.html"].links


def test_pages_are_whole_and_accessible(site):
    for name, page in site[1].items():
        assert max(page.ids.values()) == 1, name
        assert page.tags["h1"] == page.tags["title"] == page.tags["main"] == 1, name
        assert page.headings[0] == 1, name
        for above, below in zip(page.headings, page.headings[1:]):
            assert below <= above + 1, f"{name}: a heading of level {below} below one of level {above}"
        attributes = dict(page.attributes[:12])
        assert attributes["html"]["lang"] == "en" and attributes["meta"]["name"] == "color-scheme"
        images = [attrs for tag, attrs in page.attributes if tag == "img"]
        assert all(image["alt"] for image in images), name
        stops = [(t, a) for t, a in page.attributes if t in ("a", "summary") or "tabindex" in a]
        stops = [attrs for _, attrs in stops if attrs.get("tabindex") != "-1"]
        assert stops[0]["href"] == "#content" and "content" in page.ids  # the first stop of the tab key
        assert len(stops) < 400, name  # line numbers are no stops


def luminance(colour):
    """Relative luminance of "#rrggbb", as WCAG defines it."""
    total = 0
    for at, weight in ((1, 0.2126), (3, 0.7152), (5, 0.0722)):
        x = int(colour[at : at + 2], 16) / 255
        total += weight * (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4)
    return total


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read_on_every_background(scheme):
    """4.5 is the least contrast of WCAG's level AA. docs/check.py looks at what is really drawn."""
    assert round(contrast("#000000", "#ffffff"), 6) == 21
    parts = (ROOT / "docs/style.css").read_text().split("@media (prefers-color-scheme: dark)")
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", parts[0]))
    if scheme == "dark":
        own = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", parts[1]))
        assert own.keys() == colours.keys()
        colours = own
    plain = ["page", "box", "here", "old", "new"]
    on = {name: plain for name in ("soft", "link")}
    on |= {name: [*plain, "oldmark", "newmark"] for name in ("text", "c", "s", "k", "d", "f")}
    weak = {(name, back) for name in on for back in on[name] if contrast(colours[name], colours[back]) < 4.5}
    assert not weak


def test_one_command_builds_and_a_workflow_publishes(monkeypatch):
    workflow = yaml.safe_load((ROOT / ".github/workflows/pages.yml").read_text())
    steps = workflow["jobs"]["build"]["steps"]
    assert [step["run"] for step in steps if "run" in step][-1] == "python docs/build.py"
    [upload] = [step for step in steps if "upload-pages-artifact" in step.get("uses", "")]
    assert ROOT / upload["with"]["path"] == build.SITE
    every = steps + workflow["jobs"]["deploy"]["steps"]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in every if "uses" in step)
    assert "secrets" not in json.dumps(workflow)


def test_the_check_skips_without_a_browser(monkeypatch, capsys):
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.delenv("CHROMIUM", raising=False)
    assert check.main([]) == 0
    assert capsys.readouterr().out.startswith("Skipped: there is no Chromium")


# ---- the notebook ----------------------------------------------------------------------------------------


def test_the_notebook_shows_what_its_cells_gave():
    """`jupyter execute` runs it anew in CI; here: it was run from top to bottom, without an error."""
    cells = json.loads((ROOT / "docs/quickstart.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = sum([cell["outputs"] for cell in code], [])
    assert not [x for x in outputs if x["output_type"] == "error" or x.get("name") == "stderr"]
    assert sum("image/png" in x.get("data", {}) for x in outputs) == 2


def test_the_notebook_says_how_many_blanks_its_exercise_has():
    text = (ROOT / "docs/quickstart.ipynb").read_text()
    names = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
    assert f"leaves {names[len(exercise.EXERCISES['grpo'])]}" in text
