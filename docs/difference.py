"""Parent and child: which lines of one became which lines of the other, and the HTML of both.

Functions are matched by name before lines are compared, so a function never stands beside another one.
"""

import difflib
import re

from listing import docstring_end, functions, line, place, source

FEW = 9  # equal lines; of more only the first and the last three are open


# ---- hunks -----------------------------------------------------------------------------------------------


def matched_functions(parent, child):
    """[(function of the parent, function of the child)], in the order of both files.

    First those of the same name. Between two of them, one whose name is similar: sft_loss and dpo_loss.
    """
    old, new = list(functions(parent)), list(functions(child))
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    pairs = []
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if tag == "equal":
            pairs += zip(old[i1:i2], new[j1:j2])
        left = [name for name in old[i1:i2] if name not in new]
        added = [name for name in new[j1:j2] if name not in old]
        for name in left:
            similar = difflib.get_close_matches(name, added, n=1, cutoff=0.6)
            if similar:
                pairs.append((name, similar[0]))
                added = added[added.index(similar[0]) + 1 :]
    return pairs


def parts(parent, child):
    """[(i1, i2, j1, j2)]: lines i1:i2 and j1:j2 are compared with each other, from 0.

    In turn: what is between two matched functions, and the next matched function.
    """
    at = docstring_end(parent), docstring_end(child)
    out = []
    for old, new in matched_functions(parent, child):
        first, last = functions(parent)[old]
        begin, end = functions(child)[new]
        out.append((at[0], first - 1, at[1], begin - 1))
        out.append((first - 1, last, begin - 1, end))
        at = last, end
    out.append((at[0], len(source(parent)), at[1], len(source(child))))
    return out


def changes(a, b, part):
    """[(i1, i2, j1, j2)] where the lines of one part differ."""
    i0, i_end, j0, j_end = part
    matcher = difflib.SequenceMatcher(None, a[i0:i_end], b[j0:j_end], autojunk=False)
    found = []
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if tag != "equal":
            found.append((i1 + i0, i2 + i0, j1 + j0, j2 + j0))
    return found


def hunks(parent, child):
    """[(i1, i2, j1, j2), ...]: lines i1:i2 of the parent became j1:j2 of the child, from 0; in order.

    The docstrings are one hunk, and functions that were inserted together are one each.
    """
    a, b = source(parent), source(child)
    starts = {first for first, _ in functions(child).values()}  # from 1
    out = [(0, docstring_end(parent), 0, docstring_end(child))]
    for part in parts(parent, child):
        for i1, i2, j1, j2 in changes(a, b, part):
            while i1 == i2 and not b[j1] and j2 < len(b) and b[j1] == b[j2]:
                # blank lines close a function rather than open the next one
                i1, i2, j1, j2 = i1 + 1, i2 + 1, j1 + 1, j2 + 1
            cuts = [j for j in range(j1 + 1, j2) if j + 1 in starts]
            for first, last in zip([j1, *cuts], [*cuts, j2]):
                out.append((i1 if first == j1 else i2, i2, first, last))
    return out


def where(parent, child, hunk):
    """The function that a hunk is in."""
    i1, _, j1, j2 = hunk
    return place(child, j1 + 1) if j1 < j2 else place(parent, i1 + 1)


def sentences(parent, child, entries):
    """The entry of docs/hunks.toml for each hunk. A hunk without one is an error, and vice versa."""
    own = entries.get(f"{parent}→{child}", [])
    taken = [entries["docstring"]]
    for i1, i2, j1, j2 in hunks(parent, child)[1:]:
        text = "\n".join(source(child)[j1:j2] or source(parent)[i1:i2])
        key = "at" if j1 < j2 else "was"
        found = [x for x in own if key in x and x[key] in text]
        if not found:
            found = [x for x in entries["any"] if key in x and x[key] in text]
        if len(found) != 1:
            near = text.strip().split("\n")[0]
            raise ValueError(
                f"{parent}→{child}: {len(found)} sentences for the hunk at {near!r}, line {j1 + 1}"
            )
        if found[0] in taken:
            raise ValueError(f"{parent}→{child}: {found[0]} matches two hunks")
        taken += found
    lost = [x for x in own if x not in taken]
    if lost:
        raise ValueError(f"{parent}→{child}: no hunk has {lost}")
    return taken


# ---- lines beside each other -----------------------------------------------------------------------------


def aligned(a, b):
    """Rows (i or None, j or None) that put similar lines of two short lists beside each other, in order."""
    like = [[difflib.SequenceMatcher(None, x, y).ratio() for y in b] for x in a]
    best = [[0.0] * (len(b) + 1) for _ in range(len(a) + 1)]

    def together(i, j):
        return like[i][j] + best[i + 1][j + 1] if like[i][j] > 0.5 else 0.0

    for i in reversed(range(len(a))):
        for j in reversed(range(len(b))):
            best[i][j] = max(together(i, j), best[i + 1][j], best[i][j + 1])
    rows = []
    i = j = 0
    while i < len(a) and j < len(b):
        if like[i][j] > 0.5 and best[i][j] == together(i, j):
            rows.append((i, j))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            rows.append((i, None))
            i += 1
        else:
            rows.append((None, j))
            j += 1
    rows += [(k, None) for k in range(i, len(a))]
    rows += [(None, k) for k in range(j, len(b))]
    return rows


def differing(x, y):
    """Numbers of the characters of x, and of y, that are in words which the other line does not have."""
    xs, ys = (re.findall(r"\w+|\s+|.", text) for text in (x, y))
    matcher = difflib.SequenceMatcher(None, xs, ys, autojunk=False)
    marks = set(), set()
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if tag == "equal":
            continue
        for mark, words, first, last in ((marks[0], xs, i1, i2), (marks[1], ys, j1, j2)):
            start, text = len("".join(words[:first])), "".join(words[first:last])
            if text.strip():
                mark |= set(range(start, start + len(text)))
    return marks


# ---- HTML ------------------------------------------------------------------------------------------------


def block(old, new):
    """Lines of both scripts. Wide pages put them into rows; others show the old ones first."""
    return f'<pre class="both">{"".join(old)}{"".join(new)}</pre>'


def changed(parent, child, hunk):
    """The lines of a hunk, similar ones in one row with their differing words marked."""
    i1, i2, j1, j2 = hunk
    a, b = source(parent), source(child)
    old, new = [], []
    left = right = 1  # the next free rows
    for i, j in aligned(a[i1:i2], b[j1:j2]):
        marks = set(), set()
        if i is not None and j is not None:
            marks = differing(a[i1 + i], b[j1 + j])
            left = right = max(left, right)
        if i is not None:
            old.append(line(parent, i1 + i + 1, "a", "old", left, marks[0]))
            left += 1
        if j is not None:
            new.append(line(child, j1 + j + 1, "b", "new", right, marks[1]))
            right += 1
    return block(old, new)


def same(parent, child, i1, j1, count):
    """Lines that both scripts have. Only wide pages show them twice."""
    old = [line(parent, i1 + k, "a", "twin", k) for k in range(1, count + 1)]
    new = [line(child, j1 + k, "b", "same", k) for k in range(1, count + 1)]
    return block(old, new)


def equal(parent, child, i1, j1, count):
    """Equal lines; of many only the first and the last few are open."""
    if count == 0:
        return ""
    if count <= FEW:
        return same(parent, child, i1, j1, count)
    inner = same(parent, child, i1 + 3, j1 + 3, count - 6)
    return (
        same(parent, child, i1, j1, 3)
        + f"<details><summary>{count - 6} equal lines</summary>{inner}</details>"
        + same(parent, child, i1 + count - 3, j1 + count - 3, 3)
    )
