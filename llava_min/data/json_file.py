"""JSON files of records: one list, one object, or a record a line.

For data/records.py, beside parquet.py. JSON is read strictly: a repeated key, NaN or Infinity is an
error, as JSON readers differ on them.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from llava_min.errors import UserError, shorten
from llava_min.util.files import check_file

ARCHIVES = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstd",
}


def json_records(path: Path, keep_broken: bool = False) -> Iterator[tuple[str, object]]:
    """(where, raw record) of each record in a file, in its order.

    keep_broken: a line that is no JSON is its UserError among the records, instead of the end.
    """
    text = read_text(path)
    # a list, or an object that does not end on its line
    is_whole = re.match(r"\s*(\[|\{(?!.*\}\s*$))", text, re.M)
    if keep_broken and re.match(r"\s*\{.*\n\s*\{.*\}\s*$", text, re.M):
        is_whole = False  # a record a line, of which the first is cut short
    if is_whole:
        whole = parse(text, path)
        if not isinstance(whole, list):
            yield "line 1", whole
            return
        for i, raw in enumerate(whole):
            yield f"record {i}", raw
    else:
        for n, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"line {n}", parse_line(line, path, n, keep_broken)


def read_bytes(path: Path, most: int = -1) -> bytes:
    """The file, or its first `most` bytes."""
    try:
        check_file(path)
        with open(path, "rb") as f:
            return f.read(most)
    except OSError as e:
        raise UserError(
            f"{path}: cannot be read ({e.strerror}); check its name and permissions"
        ) from None


def read_text(path: Path) -> str:
    """A whole file as UTF-8, or UserError that says what else it is."""
    data = read_bytes(path)
    if what := next((name for magic, name in ARCHIVES.items() if data.startswith(magic)), None):
        raise UserError(f"{path}: is a {what} archive; unpack it first")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}: is UTF-16; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(
            f"{path}: byte {e.start} is not UTF-8, and it does not begin as parquet does; save it "
            "as JSON in UTF-8, or fetch it again"
        ) from None
    if not text or text.isspace():
        raise UserError(f"{path}: is empty; give a file with at least one conversation")
    return text


def parse_line(text: str, path: Path, line: int, keep_broken: bool) -> object:
    try:
        return parse(text, path, line)
    except UserError as e:
        if keep_broken:
            return e
        raise


def parse(text: str, path: Path, line: int | None = None) -> object:
    """JSON without what JSON readers differ on: repeated keys, NaN and Infinity."""
    where = path if line is None else f"{path}:{line}"

    def pairs(items: list[tuple[str, object]]) -> dict:
        d = dict(items)
        if len(d) < len(items):
            key = next(k for k, n in Counter(k for k, _ in items).items() if n > 1)
            of = f" of record {shorten(d['id'])}" if "id" in d else ""
            raise UserError(f"{where}: key {shorten(key)}{of} is given twice; keep one")
        return d

    def constant(name: str):
        raise UserError(f"{where}: {name} is not JSON; write a number or null")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except UserError:
        raise
    except json.JSONDecodeError as e:
        at = f"line {e.lineno} column {e.colno}" if line is None else f"column {e.colno}"
        fix = " (lists or objects one after the other: join them into one list)"
        several = fix if e.msg == "Extra data" else ""
        raise UserError(
            f"{where}: {at}: {e.msg}{several}; expected a JSON list of records, or a record a line"
        ) from None
    except RecursionError:
        raise UserError(
            f"{where}: is nested too deeply for conversations; is it the right file?"
        ) from None
    except ValueError:  # that of int(), which tells Python's own setting
        raise UserError(
            f"{where}: has an integer of more than 4300 digits; correct it, or quote it"
        ) from None
