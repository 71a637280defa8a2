"""The pages: every line of every script, every difference with its sentence, no reference to nowhere."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import build  # noqa: E402
import exercise  # noqa: E402

VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Ids, links, tags, and text and class of every element that has an id; an open tag is an error."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.links, self.tags, self.text = [], Counter(), [], Counter(), {}
        self.css, self.attributes = {}, []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags[tag] += 1
        self.attributes.append((tag, attrs))
        self.links += [attrs[k] for k in ("href", "src") if k in attrs]
        if "id" in attrs:
            self.ids[attrs["id"]] += 1
            self.css[attrs["id"]] = attrs.get("class", "")
        if tag not in VOID:
            self.open.append((tag, attrs.get("id")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, name in self.open:
            if name:
                self.text[name] = self.text.get(name, "") + data

    def lines(self, side):
        """[(text, class)] of the lines of one side, in order."""
        names = [name for name in self.ids if re.fullmatch(rf"{side}\d+", name)]
        assert names == [f"{side}{n + 1}" for n in range(len(names))]
        return [(self.text.get(name, ""), self.css[name]) for name in names]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """(folder, {file: Page})"""
    folder = tmp_path_factory.mktemp("site") / "docs/site"
    return folder, {name: Page(html) for name, html in build.build(folder).items()}


# ---- the code is all there -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", build.SCRIPTS + build.COMMON)
def test_a_script_page_has_every_line(name, site):
    page = site[1][build.page_of(name)]
    assert [text for text, _ in page.lines("L")] == (ROOT / f"{name}.py").read_text().splitlines()


@pytest.mark.parametrize("parent, child", build.PAIRS)
def test_a_pair_page_has_both_scripts_and_their_difference(parent, child, site):
    """All lines of both, in order; and those that are not marked as changed are the same on both sides."""
    page = site[1][f"{parent}-{child}.html"]
    left, right = page.lines("a"), page.lines("b")
    for name, side in ((parent, left), (child, right)):
        assert [text for text, _ in side] == (ROOT / f"{name}.py").read_text().splitlines()
    assert [t for t, css in left if css != "old"] == [t for t, css in right if css != "new"]
    assert len(page.css) and sum(css == "hunk" for css in page.css.values()) == len(
        build.hunks(parent, child)
    )


def test_similar_lines_stand_beside_each_other():
    rows = build.aligned(["a = f(x)", "same", "old"], ["new line", "a = f(x, y)", "same"])
    assert rows == [(None, 0), (0, 1), (1, 2), (2, None)]
    assert build.differing("f(x, args)", "f(x, step, args)") == (set(), {5, 6, 7, 8, 9, 10})
    assert build.paint([("k", "for"), (None, " x<")], {2, 3}) == (
        '<span class="k">fo</span><mark><span class="k">r</span> </mark>x&lt;'
    )


# ---- and so are the words --------------------------------------------------------------------------------


@pytest.mark.parametrize("parent, child", build.PAIRS)
def test_every_hunk_has_a_sentence_and_every_sentence_a_hunk(parent, child, monkeypatch):
    assert len(build.said(parent, child)) == len(build.hunks(parent, child))
    every, key = build.words("docs/hunks.toml"), f"{parent}→{child}"
    for changed in (
        every[key][1:],
        [*every[key], {"at": "nowhere", "say": "."}],
        [*every[key], every[key][0] | {"say": "."}],
    ):
        monkeypatch.setattr(build, "words", lambda name, own=changed: every | {key: own})
        with pytest.raises(ValueError, match=key):
            build.said(parent, child)


def test_every_note_is_beside_a_line_of_some_script():
    for note in build.words("docs/notes.toml")["note"]:
        on = [sum(note["at"] in line for line in build.source(name)) for name in build.SCRIPTS]
        assert 1 in on and max(on) == 1, note["at"]
        assert "equation" in note or "text" in note


@pytest.mark.parametrize("name", build.SCRIPTS)
def test_equations_stand_beside_the_lines_of_every_script(name, site):
    page = site[1][build.page_of(name)]
    assert sum(attrs.get("class") == "eq" for _, attrs in page.attributes) >= 8


def test_mark_up_of_equations():
    assert (
        build.math("π_{old}^2 < x_t")
        == '<span class="eq">π<sub>old</sub><sup>2</sup> &lt; x<sub>t</sub></span>'
    )
    assert build.math("z_{y_t}") == '<span class="eq">z<sub>y<sub>t</sub></sub></span>'


def test_the_index_has_the_one_equation_and_a_row_for_every_script(site):
    html = (site[0] / "index.html").read_text()
    assert "weight<sub>i,t</sub>" in html and all(
        f"<td><code>{name}.py</code></td>" in html for name in build.SCRIPTS
    )


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
        build.prose(f"See [[{name}]].")


def test_reading_path():
    """Three lengths; six lectures with things to read, one experiment and one exercise that can start."""
    lessons = build.words("docs/lessons.toml")
    assert [walk["time"] for walk in lessons["walk"]] == ["20 minutes", "1 hour"] and len(
        lessons["lecture"]
    ) == 6
    for lecture in lessons["lecture"]:
        assert set(lecture) == {"title", "idea", "read", "experiment", "commands", "exercise", "practice"}
        for command in lecture["commands"]:
            python, script, *flags = shlex.split(command)
            module = __import__(script.removesuffix(".py"))
            assert python == "python" and module.parse_args(flags).output_dir.startswith("runs/")
        python, script, what, *more = shlex.split(lecture["practice"])
        assert (python, script) == ("python", "docs/exercise.py") and what in [*exercise.EXERCISES, "bug"]


# ---- the pages as pages ----------------------------------------------------------------------------------


def test_links_lead_somewhere_and_nothing_comes_from_the_network(site):
    """Relative links to files and ids that exist; https only to what is cited; no scripts, images, fonts."""
    folder, pages = site
    for name, page in pages.items():
        assert not {"script", "img", "iframe", "object", "video"} & set(page.tags)
        for link in page.links:
            if link.startswith("https://"):
                assert name == "zoo.html" and link.startswith("https://github.com/")
                continue
            path, _, target = link.partition("#")
            if path.startswith("../../"):
                assert (ROOT / path[6:]).exists(), link
            else:
                assert path in ("", "style.css", *pages), link
                assert not target or target in pages[path or name].ids, f"{name}: {link}"
    assert not re.search(r"url\(|@import|http", (folder / "style.css").read_text())


def test_pages_are_whole_and_accessible(site):
    for name, page in site[1].items():
        assert max(page.ids.values()) == 1, name
        assert page.tags["h1"] == page.tags["title"] == page.tags["main"] == 1
        attributes = dict(page.attributes[:12])
        assert attributes["html"]["lang"] == "en" and attributes["meta"]["name"] == "viewport"
        focus = [a for t, a in page.attributes if (t == "a" and a.get("tabindex") != "-1") or "tabindex" in a]
        assert focus[0]["href"] == "#content" and "content" in page.ids  # the first stop of the tab key
        stops = sum(t == "summary" or (t == "a" and a.get("tabindex") != "-1") for t, a in page.attributes)
        assert stops < 350, name  # line numbers are no stops


# ---- the notebook ----------------------------------------------------------------------------------------


def test_the_notebook_shows_what_its_cells_gave():
    """`jupyter execute` runs it anew in CI; here: it was run from top to bottom, without an error."""
    cells = json.loads((ROOT / "docs/quickstart.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = sum([cell["outputs"] for cell in code], [])
    assert not [x for x in outputs if x["output_type"] == "error" or x.get("name") == "stderr"]
    assert sum("image/png" in x.get("data", {}) for x in outputs) == 2


# ---- in a browser ----------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = """<script>document.documentElement.dataset.measured =
 [innerWidth, document.documentElement.scrollWidth, getComputedStyle(document.body).backgroundColor];
</script></body>"""


def browse(folder, *flags):
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
        *flags,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")
@pytest.mark.parametrize("theme, page", [("light", (253, 253, 251)), ("dark", (21, 23, 26))])
@pytest.mark.parametrize("size", ["390,844", "1600,1000"])
def test_in_chromium(theme, page, size, site, tmp_path):
    """No page is wider than its window; the background is the theme's, and text stands on it."""
    from matplotlib.image import imread

    folder = shutil.copytree(site[0], tmp_path / "site")
    style = (folder / "style.css").read_text()
    dark = "@media (min-width: 0)" if theme == "dark" else "@media (max-width: 0)"
    (folder / "style.css").write_text(style.replace("@media (prefers-color-scheme: dark)", dark))
    for name in ("index.html", "zoo.html", "grpo.html", "grpo-prefix_rft.html"):
        html = (folder / name).read_text()
        (folder / name).write_text(html.replace("</body>", MEASURE))
        url, window = (folder / name).as_uri(), f"--window-size={size}"
        measured = re.search(
            r'data-measured="(\d+),(\d+),([^"]+)"', browse(tmp_path, window, "--dump-dom", url)
        )
        assert int(measured[2]) <= int(measured[1]), f"{name} is wider than a window of {size}"
        assert measured[3].replace(" ", "") == f"rgb({','.join(map(str, page))})"
        picture = tmp_path / "picture.png"
        browse(tmp_path, window, "--hide-scrollbars", f"--screenshot={picture}", url)
        pixels = (imread(picture)[..., :3] * 255).round()
        away = (abs(pixels - page).max(-1) > 40).mean()
        assert 0.005 < away < 0.6, f"{name}, {size}, {theme}: {away:.3f} of the pixels are not background"
