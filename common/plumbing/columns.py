"""Columns: those of a data file that are in use, read as text, whatever types the file mixes.

A reader that guesses types fails where a column changes its type after 10 MB, and rounds
large integers. Here a cell is text, None, or a list or object of cells, and numbers keep the
digits that the file has.
"""

import csv
import json
import os
from math import isnan

import datasets
import pyarrow.parquet as parquet
from datasets import get_dataset_config_names, get_dataset_split_names, load_dataset, load_dataset_builder

from common.plumbing.flags import BadInput, demand, one_line

datasets.disable_progress_bars()  # there is one bar, the script's
datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # BadInput reports an error, once

FILES = (".jsonl", ".json", ".csv", ".parquet")
Number = type("Number", (str,), {})  # text that is a number in the file
MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}  # of a file's first bytes

# ---- splits ----------------------------------------------------------------------------------------------


def split_names(path, flag):
    """The names of the splits of a data set. A single file is one split, "train"."""
    if os.path.isfile(path):
        endings = ", ".join(FILES)
        demand(path.endswith(FILES), f"{flag} {path}: the name of a data file must end in {endings}.")
        return ["train"]
    try:
        return get_dataset_split_names(*configured(path))
    except Exception as error:  # one of a dozen types, and every one of them is about the user's path
        several_configurations(path, flag)
        raise BadInput(f"{flag} {path}: no data file, folder or hub name ({one_line(error)}).") from None


def configured(path):
    """A hub name or folder and its configuration, if one is given: openai/gsm8k:main."""
    if ":" in path and not os.path.exists(path):
        return path.rsplit(":", 1)
    return [path]


def several_configurations(path, flag):
    """Raise BadInput if what cannot be read only lacks the name of a configuration, or has a wrong one."""
    name, *given = configured(path)
    try:
        names = get_dataset_config_names(name)
    except Exception:  # then there is no such data set
        return
    listed, example = ", ".join(names), f"{flag} {name}:{names[0]}"
    if given:
        demand(given[0] in names, f"{flag} {path}: no such configuration, only {listed}.")
    else:
        sentence = f"several configurations, {listed}; choose one, as in {example}."
        demand(len(names) < 2, f"{flag} {path}: {sentence}")


def read_split(path, split, flag, wanted=None):
    """The columns `wanted` (None: all) of a split, {name: a cell for each row}, and all names."""
    try:
        parts = [read_file(file, wanted) for file in files_of(path, split)]
        if not parts:
            rows = load_dataset(**source(path), split=split)
            names = rows.column_names
            kept = [name for name in names if wanted is None or name in wanted]
            return {name: [plain(cell) for cell in rows.with_format(None)[name]] for name in kept}, names
    except Exception as error:
        reason = one_line(error.__cause__ or error)
        raise BadInput(f"{flag} {path}: {split} cannot be read ({reason}).") from None
    names = list(dict.fromkeys(name for _, some, _ in parts for name in some))
    cells = {name: [] for name in names if wanted is None or name in wanted}
    for found, _, rows in parts:
        for name, column in cells.items():
            column += found.get(name) or [None] * rows  # a file may lack a column
    return cells, names


def source(path):
    """What datasets calls a path and the name of a configuration."""
    return dict(zip(("path", "name"), configured(path)))


def files_of(path, split):
    """The files of a split, if they are on this machine and of the kinds that are read here; else none."""
    if os.path.isfile(path):
        return [path]
    if not os.path.exists(configured(path)[0]):
        return []  # a hub name
    files = list((load_dataset_builder(**source(path)).config.data_files or {}).get(split, []))
    readable = all(os.path.isfile(file) and file.endswith(FILES) for file in files)
    return files if readable else []


# ---- files -----------------------------------------------------------------------------------------------


def expect(condition, reason):
    """Raise ValueError unless the condition holds; `read_split` names the flag."""
    if not condition:
        raise ValueError(reason)


def read_file(path, wanted):
    """Of one file: {name: cells} of the wanted columns, the names of all columns, the number of rows."""
    if not os.path.getsize(path):
        return {}, [], 0
    kinds = {"json": read_json, "jsonl": read_json, "csv": read_csv, "parquet": read_parquet}
    return kinds[path.rsplit(".", 1)[-1]](path, wanted)


def encoding(path):
    """UTF-8, with or without a mark at the start, unless the mark is that of UTF-16."""
    with open(path, "rb") as file:
        return MARKS.get(file.read(2), "utf-8-sig")


def read_csv(path, wanted):
    """All cells are text; an empty one is None."""
    csv.field_size_limit(2**31 - 1)
    with open(path, newline="", encoding=encoding(path)) as file:
        reader = csv.reader(file, strict=True)
        try:
            lines = [line for line in reader if line]
        except csv.Error as error:
            where = f"{os.path.basename(path)}, line {reader.line_num}"
            raise ValueError(f"{where}: not a row of a csv file, {error}") from None
    names, *rows = lines
    for i, row in enumerate(rows):
        sentence = f"{len(row)} cells, but the header has {len(names)}; quote cells that hold a comma"
        expect(len(row) <= len(names), f"{os.path.basename(path)}, row {i}: {sentence}")
        row += [""] * (len(names) - len(row))  # the last cells may be left out
    kept = {name: k for k, name in enumerate(names) if wanted is None or name in wanted}
    found = {name: [row[k] or None for row in rows] for name, k in kept.items()}
    return found, names, len(rows)


def read_parquet(path, wanted):
    names = parquet.read_schema(path).names
    kept = [name for name in names if wanted is None or name in wanted]
    table = parquet.read_table(path, columns=kept)
    found = {name: [plain(cell) for cell in table[name].to_pylist()] for name in kept}
    return found, names, parquet.read_metadata(path).num_rows


def read_json(path, wanted):
    """JSON lines, or an array of objects, or an object with one array in it."""
    found, names, rows = {}, {}, 0
    for where, row in json_rows(path, wanted):
        expect(isinstance(row, dict), f"{os.path.basename(path)}, {where}: not an object with columns")
        names |= dict.fromkeys(row)
        for name in row if wanted is None else wanted:
            if name in row:
                cells = found.setdefault(name, [])
                cells += [None] * (rows - len(cells))
                cells.append(plain(row[name]))
        rows += 1
    for cells in found.values():
        cells += [None] * (rows - len(cells))
    return found, list(names), rows


def json_rows(path, wanted):
    """(where it is, object) for each row."""
    decoder = json.JSONDecoder(parse_int=Number, parse_float=Number, parse_constant=Number)
    with open(path, encoding=encoding(path), errors="replace") as file:
        first = next((line for line in file if line.strip()), "")
        try:
            decoder.decode(first)
            is_lines = not first.lstrip().startswith("[")
        except ValueError:
            rest = next(file, "")
            # one object over several lines, or a first line that is damaged?
            is_lines = first.rstrip().endswith("}") and rest.lstrip().startswith("{")
    if is_lines:
        is_utf8 = encoding(path) == "utf-8-sig"  # read as bytes: an error can name its line
        with open(path, "rb") if is_utf8 else open(path, encoding="utf-16") as file:
            for number, line in enumerate(file, 1):
                try:
                    line = line.decode("utf-8-sig") if is_utf8 else line
                    if line.strip():
                        yield f"line {number}", decoder.decode(line)
                except ValueError as error:
                    kind = "UTF-8" if isinstance(error, UnicodeError) else "JSON"
                    where = f"{os.path.basename(path)}, line {number}"
                    raise ValueError(f"{where}: not {kind}, {one_line(error)}") from None
        return
    with open(path, encoding=encoding(path)) as file:
        text = file.read()
    try:
        whole = decoder.decode(text)
    except ValueError as error:
        raise ValueError(f"{os.path.basename(path)}: not JSON, {one_line(error)}") from None
    if isinstance(whole, dict) and not any(name in whole for name in wanted or []):
        arrays = [value for value in whole.values() if isinstance(value, list)]
        whole = arrays[0] if len(arrays) == 1 else [whole]
    yield from ((f"row {i}", row) for i, row in enumerate(whole if isinstance(whole, list) else [whole]))


def plain(cell):
    """A cell as text, None, or a list or object of such; numbers with all their digits."""
    if cell is None or isinstance(cell, str):
        return cell
    if isinstance(cell, dict):
        return {key: plain(value) for key, value in cell.items()}
    if isinstance(cell, (list, tuple)):
        return [plain(value) for value in cell]
    if isinstance(cell, float) and isnan(cell):
        return None
    return Number(cell)


# ---- cells -----------------------------------------------------------------------------------------------


def text(cell, role="user"):
    """A cell as text: a list of one is what is in it, of messages it is the one with this role.

    ValueError says what cannot be read.
    """
    if isinstance(cell, dict) and (cell.get("role") or cell.get("from")):
        cell = [cell]
    if isinstance(cell, dict):
        raise ValueError(f"is an object with {', '.join(cell) or 'nothing in it'}, not text")
    if not isinstance(cell, list):
        if cell and not cell.isascii() and any("\ud800" <= c <= "\udfff" for c in cell):
            raise ValueError("holds half a character (a lone surrogate)")
        return cell
    if cell and all(isinstance(item, dict) and (item.get("role") or item.get("from")) for item in cell):
        return message(cell, role)
    if len(cell) > 1:
        raise ValueError(f"is a list of {len(cell)}, not one text")
    return text(cell[0], role) if cell else None


ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}


def message(messages, role):
    """The text of the one message of a role. There may be a question and an answer, and nothing else."""
    roles = [item.get("role") or item.get("from") for item in messages]
    roles = [ROLES.get(name, name) for name in roles]
    if roles not in (["user"], ["assistant"], ["user", "assistant"]):
        listed = ", ".join(map(str, roles[:4])) + (", ..." if len(roles) > 4 else "")
        raise ValueError(f"has the messages {listed}; only a user's and an assistant's can be read")
    if role not in roles:
        raise ValueError(f"has no message of the {role}")
    item = messages[roles.index(role)]
    content = item.get("content", item.get("value"))
    if isinstance(content, list):  # parts
        kinds = {part.get("type", "text") if isinstance(part, dict) else "text" for part in content}
        if kinds - {"text"}:
            raise ValueError(f"has a message with {', '.join(sorted(kinds - {'text'}))}; only text is read")
        content = "".join((part.get("text") or "") if isinstance(part, dict) else part for part in content)
    return text(content, role)
