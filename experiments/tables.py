"""Markdown tables, and their places between two marks of a page."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def table(head, rows):
    """The lines of a table; `head` and every row are lists of cells."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def pages():
    """Where a table may stand: the README and all pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def insert(name, lines):
    """Put lines between <!-- name --> and <!-- /name -->, which are on one page."""
    first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    found = [page for page in pages() if first in page.read_text()]
    assert len(found) == 1, f"the mark {first.strip()} is on {len(found)} pages, not on one"
    before, _, rest = found[0].read_text().partition(first)
    _, end, after = rest.partition(last)
    assert end, f"{found[0].name} has no mark {last}"
    found[0].write_text(before + first + "\n".join(lines) + "\n" + end + after)
