"""Look at the built site in a headless Chromium: is every page whole, readable and accessible?

    python docs/build.py && python docs/check.py             # all pages, three widths, light and dark
    python docs/check.py zoo grpo --screenshots /tmp/shots   # some pages, and pictures to look at

A page must not be wider than its window, nothing in it may be cut off, no table may lose a column, code has
12 px or more, and no rule of axe may fail: contrast, headings, names, landmarks, keyboard. Diffs have one
column below 1,600 px and two above. Needs a Chromium (CHROMIUM=path, or one on the path) and

    pip install -r docs/requirements-check.txt
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

SITE = Path(__file__).resolve().parent / "site"
WIDTHS = {390: 844, 1280: 900, 1920: 1080}
SCHEMES = ["light", "dark"]
UNIFIED = 1600  # below this width a diff has one column
NAVIGATION = 1088  # from this width on the navigation is always open
CHROMIUM = ["chromium", "chromium-browser", "google-chrome", "chrome"]

# What the page looks like from inside: everything that an assertion below is about.
MEASURE = """() => {
  const shown = element => element.checkVisibility({contentVisibilityAuto: true, visibilityProperty: true});
  const inside = element => element.closest('.scroll, pre.block, .menu, .skip');
  const tooWide = [...document.querySelectorAll('main *')].filter(element =>
    shown(element) && !inside(element) && element.getBoundingClientRect().right > innerWidth + 1);
  const cut = [...document.querySelectorAll('.scroll, pre.block')].filter(element =>
    shown(element) && element.scrollWidth > element.clientWidth + 1 &&
    getComputedStyle(element).overflowX !== 'auto');
  const cells = [...document.querySelectorAll('th, td')].filter(element =>
    !element.closest('details:not([open])') && element.getBoundingClientRect().width < 8);
  const sizes = [...document.querySelectorAll('pre')].filter(shown).map(element =>
    parseFloat(getComputedStyle(element).fontSize));
  const lines = [...document.querySelectorAll('.hunk .both .new')].filter(shown);
  return {
    width: document.documentElement.scrollWidth,
    window: document.documentElement.clientWidth,
    tooWide: tooWide.map(element => element.outerHTML.slice(0, 80)),
    cut: cut.map(element => element.outerHTML.slice(0, 80)),
    lostCells: cells.length,
    smallest: Math.min(...sizes, 99),
    columns: lines.length ? (lines[0].getBoundingClientRect().left > innerWidth / 2 ? 2 : 1) : 0,
    twins: [...document.querySelectorAll('.both .twin')].filter(shown).length,
    current: document.querySelectorAll('.menu [aria-current]').length,
    background: getComputedStyle(document.body).backgroundColor,
    images: [...document.images].filter(image => !image.naturalWidth).map(image => image.src),
  };
}"""


def chromium():
    """The path of a Chromium, or None."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM)), None)


def faults(seen, width):
    """Sentences about what is wrong with the measures of a page."""
    if seen["width"] > seen["window"]:
        yield f"is {seen['width']} px wide in a window of {seen['window']} px"
    for html in seen["tooWide"][:3]:
        yield f"reaches beyond the window: {html}"
    for html in seen["cut"]:
        yield f"is cut off: {html}"
    if seen["lostCells"]:
        yield f"has {seen['lostCells']} cells of tables without a width"
    if seen["current"] != 1:
        yield f"has {seen['current']} current pages in the navigation, not one"
    if seen["smallest"] < 12:
        yield f"has code of {seen['smallest']} px"
    for source in seen["images"]:
        yield f"lacks the image {source}"
    if seen["columns"] and seen["columns"] != (1 if width < UNIFIED else 2):
        yield f"shows a diff in {seen['columns']} columns"
    if width < UNIFIED and seen["twins"]:
        yield f"shows {seen['twins']} equal lines twice"


def keyboard(browser):
    """The tab key leads to the content, to the home page, and into the navigation or to its button."""
    for width, height in WIDTHS.items():
        page = browser.new_page(viewport={"width": width, "height": height})
        page.goto((SITE / "index.html").as_uri())
        stops = []
        for _ in range(3):
            page.keyboard.press("Tab")
            stops.append(page.evaluate("document.activeElement.outerHTML"))
        page.close()
        wanted = "<a href" if width >= NAVIGATION else "<summary>Menu"
        if 'href="#content"' not in stops[0] or wanted not in stops[2]:
            yield f"index, {width} px: the keyboard leads to {stops}"


def violations(axe, page):
    """Sentences about rules of axe that the page breaks."""
    for found in axe.run(page).response["violations"]:
        nodes = [node["target"][0] for node in found["nodes"]]
        yield f"axe, {found['id']}: {found['help']}: {len(nodes)} × {nodes[:3]}"


def settle(page, width, scheme, is_open):
    """Give the page a width and a scheme, with everything that can be opened open or closed."""
    page.set_viewport_size({"width": width, "height": WIDTHS[width]})
    page.emulate_media(color_scheme=scheme)
    page.evaluate("is => document.querySelectorAll('details').forEach(x => x.open = is)", is_open)


def look(browser, name, axe, screenshots):
    """Sentences about everything that is wrong with one page."""
    page = browser.new_page()
    errors = []
    page.on("console", lambda message: errors.append(message.text))
    page.on("requestfailed", lambda request: errors.append(f"lacks {request.url}"))
    page.goto((SITE / f"{name}.html").as_uri())
    found = [f"{name}: {error}" for error in errors]
    backgrounds = {}
    for width in WIDTHS:
        for scheme in SCHEMES:
            if screenshots:
                settle(page, width, scheme, False)
                page.screenshot(path=screenshots / f"{name}-{width}-{scheme}.png", full_page=True)
            settle(page, width, scheme, True)
            seen = page.evaluate(MEASURE)
            backgrounds[scheme] = seen["background"]
            wrong = list(faults(seen, width))
            if axe:
                wrong += violations(axe, page)
            found += [f"{name}, {width} px, {scheme}: {sentence}" for sentence in wrong]
    page.close()
    if backgrounds["light"] == backgrounds["dark"]:
        found.append(f"{name} has one background in light and dark: {backgrounds['light']}")
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", help="names of pages, without .html (default: all)")
    parser.add_argument("--screenshots", type=Path, help="folder for a picture of each page")
    parser.add_argument("--no-axe", action="store_true", help="only measure: much faster")
    args = parser.parse_args(argv)
    path = chromium()
    if not path:
        print("Skipped: there is no Chromium on the path. Install one, or set CHROMIUM to its path.")
        return 0
    try:
        from axe_playwright_python.sync_playwright import Axe
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        print(f"Skipped: {error.name} is missing. Run: pip install -r docs/requirements-check.txt")
        return 0
    names = args.pages or sorted(path.stem for path in SITE.glob("*.html"))
    missing = [name for name in names if not (SITE / f"{name}.html").exists()]
    if missing or not names:
        print(f"There is no page {', '.join(missing)} in {SITE}. Run python docs/build.py first.")
        return 2
    if args.screenshots:
        args.screenshots.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        found = list(keyboard(browser))
        axe = None if args.no_axe else Axe()
        for name in names:
            wrong = look(browser, name, axe, args.screenshots)
            print(f"{name}: {len(wrong)} faults", *wrong, sep="\n  ", flush=True)
            found += wrong
        browser.close()
    print(f"{len(names)} pages, {len(found)} faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
