"""Files of conversations → records, each checked before any weight is read.

First station of training and evaluation: dataset.py makes batches of the records. The formats, told apart by what a file
holds and not by its name (docs/data.md shows them):
    LLaVA     JSON, or a record a line (haotian-liu/LLaVA, docs/Finetune_Custom_Data.md):
              {"id": "7", "image": "cat.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, …]}
              `image` may be absent or a list; every `<image>` in a human turn is one picture, in an answer it is text.
              As in LLaVA the marks are taken out, the rest is stripped and follows the pictures.
    messages  the same ways, or parquet with the pictures inside (the layout of HuggingFaceH4/llava-instruct-mix-vsft):
              {"messages": [{"role": "user", "content": [{"type": "text", "text": …}, {"type": "image", "index": 0}]}, …],
               "images": ["cat.jpg"]}
              A content may be a plain string; where no message has an image part, `<image>` in the users' marks them.

A record keeps where its pictures are and opens them when asked: nothing of a picture is in memory before.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

from PIL import Image

from llava_min.cli import UserError, printable, warn
from llava_min.data.chat import exchanges
from llava_min.data.image import MAX_BYTES, decode_image, open_image
from llava_min.data.processor import MARK
from llava_min.files import check_file

ROLES = {"human": "user", "gpt": "assistant"}
MAX_TEXT = 1_000_000  # characters in a turn; more is a broken export
MAX_GROUP = 2**30  # bytes of text in a row group of a parquet file, unpacked
NAMED = 5  # how many bad records a message tells of


@dataclass(frozen=True, slots=True)
class Embedded:
    """Picture `index` of a row of a parquet file."""

    path: Path
    group: int
    row: int  # in the group
    index: int

    def open(self, exif: bool) -> Image.Image:
        name = f"{self.path}: row group {self.group} row {self.row} picture {self.index}"
        try:
            data = row_pictures(open_parquet(self.path), self.group, self.row)[self.index]["bytes"]
        except DAMAGED as e:
            raise UserError(f"{name}: cannot be read ({short(e, 200)}); fetch the file again") from None
        return decode_image(data or b"", name, exif=exif)


@dataclass(slots=True)
class Record:
    """A conversation that ends in an answer, and its pictures in reading order."""

    id: str
    messages: list[dict]  # role/content, a picture being a part {"type": "image"}
    images: list[Path | Embedded | Image.Image] = field(default_factory=list)
    root: Path | None = None  # the folder that no picture's path may leave
    extra: dict = field(default_factory=dict)  # what else the record said

    @property
    def length(self) -> int:
        """Roughly how many tokens, to put like with like: the words, and 256 a picture."""
        return sum(len(text_of(m).split()) for m in self.messages) + 256 * len(self.images)

    def pictures(self, exif: bool = False) -> list[Image.Image]:
        try:
            return [p if isinstance(p, Image.Image) else p.open(exif) if isinstance(p, Embedded)
                    else open_image(p, root=self.root, exif=exif) for p in self.images]
        except UserError as e:
            raise UserError(f"record {short(self.id)}: {e}") from None


def text_of(message: dict) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


class Bad(Exception):
    """What is wrong with one record."""


class Skips:
    """Bad records that are left out instead of ending the run: counted, listed in `path`, never more than `cap` of all.

    On several ranks each rank adds the same lines, so that all stop at the same point; one of them has a `path`.
    """

    def __init__(self, path: Path | None = None, cap: float = 0.01):
        self.path, self.cap, self.total = path, cap, 0
        self.lines: dict[str, None] = {}  # a picture that is damaged in every epoch is one bad record

    def add(self, lines: Iterable[str]) -> None:
        """Raises UserError when they are too many."""
        self.lines |= dict.fromkeys(lines)
        if len(self.lines) > self.cap * self.total:
            raise UserError(f"{len(self.lines)} of {self.total} records are bad, more than the {self.cap:.2%} that may be "
                            f"skipped: {told(self.lines)}; mend or remove them")

    def write(self) -> None:
        """List them, a line each; once the folder of `path` is there, and after every change."""
        if self.path and self.lines:
            self.path.write_text("".join(line + "\n" for line in self.lines), encoding="utf-8")


def short(x: object, n: int = 60) -> str:
    text = printable(x)
    return text if len(text) <= n else text[:n] + "…"


def told(lines: Iterable[str]) -> str:
    lines = list(lines)
    return " | ".join(line[:280] for line in lines[:NAMED]) + (" | …" if len(lines) > NAMED else "")


# ---- the files of a mixture --------------------------------------------------------------------------------


def read_records(data: str | os.PathLike, image_folder: str | os.PathLike | None = None,
                 skips: Skips | None = None) -> list[Record]:
    """Every record of `data`, checked; pictures are looked for under `image_folder`, or beside each file if None, but not
    yet opened.

    data: a file, or several with commas between. A name may hold `*`, and may end in `@WEIGHT`: `@3` takes each record
        three times, `@0.5` every second one.
    Raises UserError: a file cannot be read, or records are bad; all bad ones of a file are counted and the first named.
        With `skips` they are left out, as long as they are few.
    """
    files, records, seen = sources(os.fspath(data)), [], Counter()
    for path, weight in files:
        read = read_file(path, image_folder, skips, f"{path.name}:" if len(files) > 1 else "")
        seen.update(r.id for r in read)
        records += [r for i, r in enumerate(read) for _ in range(int((i + 1) * weight) - int(i * weight))]
    if skips is not None:
        skips.add([])
    if not records:
        raise UserError(f"--data {short(data, 200)}: no record is left; raise the weight")
    if twice := [id for id, n in seen.items() if n > 1]:
        warn(f"{short(data, 400)}: {len(twice)} ids stand on more than one record, for example {short(twice[0])}")
    return records


def sources(data: str) -> list[tuple[Path, Fraction]]:
    """The files that are named, each with its weight."""
    if os.path.exists(data):  # whatever is in its name
        return [(Path(data), Fraction(1))]
    out = []
    for name in data.split(","):
        name, weight = name.strip(), Fraction(1)
        if not os.path.exists(name) and (m := re.fullmatch(r"(.+)@(\d+(?:\.\d+)?)", name)):
            name, weight = m[1], Fraction(m[2])
        if not name or not weight:
            raise UserError(f"--data {short(data, 200)}: {'a weight of 0' if name else 'a name is empty'}; expected "
                            "files with commas between, each with @WEIGHT after it or not")
        path = Path(name)
        found = sorted(path.parent.glob(path.name)) if "*" in path.name and not path.exists() else [path]
        if not found:
            raise UserError(f"{short(path, 400)}: no such files; check the path")
        out += [(p, weight) for p in found]
    return out


def read_file(path: Path, image_folder: str | os.PathLike | None, skips: Skips | None, prefix: str) -> list[Record]:
    root = Path(os.path.abspath(path.parent if image_folder is None else image_folder))
    if image_folder is not None and not root.is_dir():
        raise UserError(f"{short(root, 400)}: no such folder; give the folder of the pictures")
    files, records, bad, headless = Files(root), [], [], 0
    for where, raw in raw_records(path):
        if isinstance(raw, dict) and isinstance(raw.get("id"), (str, int)):
            where += f" (id {short(raw['id'])})"
        try:
            record, beheaded = from_raw(raw, f"{prefix}{len(records) + len(bad)}", root)
            missing = [p for p in record.images if isinstance(p, Path) and not files.have(p)]
            if missing:
                raise Bad(f"no picture {short(missing[0], 200)}")
            records.append(record)
            headless += beheaded
        except Bad as e:
            bad.append(f"{where}: {e}")
    n = len(records) + len(bad)
    if not n:
        raise UserError(f"{path}: holds no records; give a file with at least one conversation")
    if files.asked and not files.found:
        raise UserError(f"{path}: 0 of {files.asked} pictures found under {short(root, 400)} (the first: "
                        f"{short(files.first, 200)}); check the image folder")
    if bad and skips is None:
        raise UserError(f"{path}: {len(bad)} of {n} records are bad: {told(bad)}; mend or remove them")
    if skips is not None:
        skips.total += n
        skips.lines |= dict.fromkeys(f"{path}: {line}" for line in bad)
        if bad:
            warn(f"{path}: {len(bad)} of {n} records are bad and left out: {told(bad)}")
    if headless:
        warn(f"{path}: {headless} records begin with an answer, which is left out, as LLaVA does")
    return records


class Files:
    """Which pictures are there. Each folder is listed once, as a stat of every file can take minutes."""

    def __init__(self, root: Path):
        self.root, self.names = root, {}
        self.asked, self.found, self.first = 0, 0, None

    def have(self, path: Path) -> bool:
        folder, name = os.path.split(path)
        if folder not in self.names:
            try:
                self.names[folder] = set(os.listdir(folder or "."))
            except OSError:
                self.names[folder] = set()
        self.asked += 1
        self.first = self.first or path
        self.found += name in self.names[folder]
        return name in self.names[folder]


# ---- JSON --------------------------------------------------------------------------------------------------


def raw_records(path: Path) -> Iterator[tuple[str, object]]:
    """(where, parsed record). A file that begins with `[` is one JSON list, any other has a record a line."""
    try:
        check_file(path)
        with open(path, "rb") as f:
            if f.read(4) == b"PAR1":
                yield from parquet_records(path)
                return
        data = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); check its name and permissions") from None
    for magic, what in ((b"\x1f\x8b", "gzip"), (b"PK\x03\x04", "zip"), (b"\xfd7zXZ", "xz"), (b"BZh", "bzip2"),
                        (b"\x28\xb5\x2f\xfd", "zstd")):
        if data.startswith(magic):
            raise UserError(f"{path}: is a {what} archive; unpack it first")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}: is UTF-16; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: byte {e.start} is not UTF-8; save the file as UTF-8") from None
    del data
    if not text.strip():
        raise UserError(f"{path}: is empty; give a file with at least one conversation")
    if text.lstrip()[0] == "[":
        for i, raw in enumerate(parse(text, path)):
            yield f"record {i}", raw
    else:
        for n, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"line {n}", parse(line, path, n)


def parse(text: str, path: Path, line: int | None = None) -> object:
    """JSON, without what JSON readers differ on: keys given twice, NaN and Infinity."""
    where = path if line is None else f"{path}:{line}"

    def pairs(items: list[tuple[str, object]]) -> dict:
        d = dict(items)
        if len(d) < len(items):
            key = next(k for k, n in Counter(k for k, _ in items).items() if n > 1)
            of = f" of record {short(d['id'])}" if "id" in d else ""
            raise UserError(f"{where}: key {short(key)}{of} is given twice; keep one")
        return d

    def constant(name: str):
        raise UserError(f"{where}: {name} is not JSON; write a number or null")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as e:
        at = f"line {e.lineno} column {e.colno}" if line is None else f"column {e.colno}"
        looks = ""
        if line is not None and text.strip() == "{":
            looks = " (it looks like one JSON object over many lines: put the records into a list [ … ])"
        if line is None and e.msg == "Extra data":
            looks = " (lists one after the other: join them into one)"
        raise UserError(f"{where}: {at}: {e.msg}{looks}; "
                        "expected a JSON list of records, or a record a line") from None
    except UserError:  # of the two above, and a ValueError itself
        raise
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply for conversations; is it the right file?") from None
    except ValueError as e:  # an integer of thousands of digits
        raise UserError(f"{where}: {short(e, 200)}; correct it") from None


# ---- parquet -----------------------------------------------------------------------------------------------


BYTES, PATH = "images.list.element.bytes", "images.list.element.path"
DAMAGED = (OSError, ValueError, TypeError, LookupError, RuntimeError, MemoryError)  # pyarrow's own exceptions are kinds of these


def open_parquet(path: Path):
    stat = os.stat(path)
    return _open_parquet(path, os.getpid(), stat.st_mtime_ns, stat.st_size)  # a worker opens the file for itself


@lru_cache(maxsize=32)
def _open_parquet(path: Path, *_: int):
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow; pip install 'llava_min[parquet]'") from None
    return pq.ParquetFile(path, buffer_size=1 << 20)  # buffered: a group is read page by page, not whole


@lru_cache(maxsize=4)
def row_pictures(f, group: int, row: int) -> list[dict]:
    """[{"bytes"}] of one row. A row group is read from its start: small ones (100 rows, as datasets writes) are quick."""
    at = 0
    for batch in f.iter_batches(8, row_groups=[group], columns=[BYTES], use_threads=False):
        if row < at + len(batch):
            return batch.column(0)[row - at].as_py()
        at += len(batch)
    raise LookupError("the row is gone")


def parquet_records(path: Path) -> Iterator[tuple[str, dict]]:
    """(where, row) with the pictures as `Embedded`, as the path of a picture whose bytes are null, or as None."""
    try:
        f = open_parquet(path)
        leaves = [f.schema.column(i).path for i in range(len(f.schema))]
        names = f.schema_arrow.names
        if "messages" not in names or "images" in names and not {BYTES, PATH} <= set(leaves):
            raise UserError(f"{path}: has the columns {short(', '.join(leaves), 300)}; expected messages, and images as a "
                            "list of {bytes, path}, as HuggingFaceH4/llava-instruct-mix-vsft has them")
        n, others = 0, [name for name in names if name != "images"]
        for g in range(f.num_row_groups):
            check_group(path, f.metadata.row_group(g), g)
            rows = f.read_row_group(g, columns=others, use_threads=False).to_pylist()
            images = group_pictures(f, path, g, leaves) if "images" in names else [[]] * len(rows)
            for row, found in zip(rows, images, strict=True):
                yield f"row {n}", {**row, "images": found}
                n += 1
    except UserError:
        raise
    except DAMAGED as e:
        raise UserError(f"{path}: is not whole or not parquet ({short(e, 200)}); fetch it again") from None


def check_group(path: Path, group, g: int) -> None:
    """What a row group says it unpacks to is bounded: text at once, pictures by the row."""
    size = Counter()
    for i in range(group.num_columns):
        column = group.column(i)
        size[column.path_in_schema.split(".")[0] == "images"] += column.total_uncompressed_size
    if size[False] > MAX_GROUP or size[True] > MAX_BYTES * max(group.num_rows, 1):
        raise UserError(f"{path}: row group {g} unpacks to {sum(size.values()) >> 20} MiB, too much for {group.num_rows} "
                        "rows; write the file with smaller row groups")


def group_pictures(f, path: Path, g: int, leaves: list[str]) -> list[list]:
    """Per row of a group what its pictures are. Their bytes are not read, unless the file's own statistics say that some
    picture has none."""
    paths = f.read_row_group(g, columns=[PATH], use_threads=False).column(0).to_pylist()
    out = [[Embedded(path, g, row, i) for i in range(len(found or []))] for row, found in enumerate(paths)]
    counts = f.metadata.row_group(g).column(leaves.index(BYTES)).statistics
    nulls = counts.null_count if counts is not None and counts.has_null_count else 0
    if nulls > sum(not found for found in out):  # a row without pictures counts as a null
        for row, found in enumerate(out):
            for i, picture in enumerate(found and row_pictures(f, g, row)):
                if picture is None or picture["bytes"] is None:
                    found[i] = paths[row][i] and paths[row][i]["path"]
    return out


# ---- a record ----------------------------------------------------------------------------------------------


def from_raw(raw: object, number: str, root: Path) -> tuple[Record, bool]:
    """The record, and whether an answer before the first question was left out. Raises Bad."""
    if not isinstance(raw, dict):
        raise Bad(f"is {kind(raw)}, expected an object with id, image and conversations")
    raw = dict(raw)
    id = raw.pop("id", number)
    if isinstance(id, bool) or not isinstance(id, (str, int)):
        raise Bad(f"id is {kind(id)}, expected text or a whole number")
    check_text(str(id), "id")
    for one, other in (("messages", "conversations"), ("messages", "image"), ("conversations", "images")):
        if raw.get(one) is not None and raw.get(other) is not None:
            raise Bad(f"has {one} and {other}, expected conversations with image, or messages with images")
    if "messages" in raw:
        messages, images = from_messages(raw.pop("messages"), raw.pop("images", None), root)
        return Record(str(id), messages, images, root, raw), False
    messages, images, beheaded = from_llava(raw.pop("conversations", None), raw.pop("image", None), root)
    return Record(str(id), messages, images, root, raw), beheaded


def from_llava(turns: object, image: object, root: Path) -> tuple[list[dict], list[Path], bool]:
    images = [] if image is None else image if isinstance(image, list) else [image]
    images = [in_folder(p, root, "image") for p in images]
    if not isinstance(turns, list) or not turns:
        raise Bad(f"conversations is {'missing' if turns is None else kind(turns)}, expected a list of turns")

    messages, marks, beheaded = [], 0, False
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") not in tuple(ROLES):
            came = f"from is {short(turn.get('from'))}" if isinstance(turn, dict) else f"is {kind(turn)}"
            raise Bad(f"turn {i}: {came}, expected from human or gpt")
        text = turn.get("value")
        if not isinstance(text, str):
            raise Bad(f"turn {i}: value is {kind(text)}, expected text")
        check_text(text, f"turn {i}")
        role = ROLES[turn["from"]]
        if i == 0 and role == "assistant" and len(turns) > 1:
            beheaded = True  # ShareGPT conversations in LLaVA's own mixture begin so
            continue
        if role != ("assistant" if len(messages) % 2 else "user"):
            raise Bad(f"turn {i}: another {turn['from']} turn, but human and gpt must alternate, human first")
        if not text.strip():
            raise Bad(f"turn {i}: the {'answer' if role == 'assistant' else 'question'} is empty")
        content, n = marked(text) if role == "user" else (text, 0)
        marks += n
        messages.append({"role": role, "content": content})
    if len(messages) % 2:
        raise Bad("ends with a human turn, but there must be an answer to learn from or to compare with")
    if marks != len(images):
        raise Bad(f"{len(images)} pictures, but the human turns mark {marks} with {MARK}")
    return messages, images, beheaded


def from_messages(turns: object, images: object, root: Path) -> tuple[list[dict], list[Path | Embedded]]:
    if not isinstance(turns, list) or not turns:
        raise Bad(f"messages is {kind(turns)}, expected a list of messages")
    if not isinstance(images, (list, type(None))):
        raise Bad(f"images is {kind(images)}, expected a list of pictures")
    found = [picture(p, i, root) for i, p in enumerate(images or [])]

    messages, named = [], []  # named: (message, index) of each image part, in reading order
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise Bad(f"message {i} is {kind(turn)}, expected an object with role and content")
        content = turn.get("content")
        if isinstance(content, list):
            content, indices = split_parts(content, f"message {i}")
            named += [(i, index) for index in indices]
        elif not isinstance(content, str):
            raise Bad(f"message {i}: content is {kind(content)}, expected text or a list of parts")
        messages.append({"role": turn.get("role"), "content": content})
        check_text(text_of(messages[-1]), f"message {i}")
    if found and not named:
        for i, m in enumerate(messages):
            if m["role"] == "user" and isinstance(m["content"], str):
                m["content"], n = marked(m["content"])
                named += [(i, None)] * n
    try:
        exchanges(messages, answer=True)
    except UserError as e:
        raise Bad(str(e)) from None
    return messages, by_index(found, named)


def split_parts(parts: list, where: str) -> tuple[list[dict], list]:
    """The parts of a message as the templates take them, and the index of each image part."""
    texts, indices = [], []
    for part in parts:
        name = part.get("type") if isinstance(part, dict) else None
        if name == "image":
            if other := [key for key, value in part.items() if key not in ("type", "index") and value is not None]:
                raise Bad(f"{where}: an image part has {short(other[0])}, expected an index into images alone")
            indices.append(part.get("index"))
        elif name == "text" and isinstance(part.get("text"), str):
            texts.append({"type": "text", "text": part["text"]})
        else:
            raise Bad(f'{where}: unknown part {short(part)}, expected {{"type": "text", "text": "…"}} '
                      'or {"type": "image", "index": 0}')
    return [{"type": "image"} for _ in indices] + texts, indices


def by_index(images: list, named: list[tuple[int, int | None]]) -> list:
    """The pictures in reading order. `named`: (message, index) of each image part, an index being None where the pictures
    simply follow one another."""
    if all(index is None for _, index in named):
        if len(named) != len(images):
            raise Bad(f"{len(images)} pictures, but the messages have {len(named)} places for them")
        return images
    for i, index in named:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(images):
            raise Bad(f"message {i}: image index {short(index)}, expected one of the {len(images)} pictures, from 0")
    if missing := set(range(len(images))) - {index for _, index in named}:
        raise Bad(f"picture {min(missing)} is named by no message")
    return [images[index] for _, index in named]


def marked(text: str) -> tuple[str | list[dict], int]:
    """What LLaVA's preprocess_multimodal makes of a message, and how many marks it had."""
    if not (n := text.count(MARK)):
        return text, 0
    text = text.replace(MARK, "").strip()
    return [{"type": "image"}] * n + ([{"type": "text", "text": text}] if text else []), n


def picture(p: object, i: int, root: Path) -> Path | Embedded:
    if isinstance(p, Embedded):
        return p
    if isinstance(p, dict) and p.get("bytes") is None and set(p) <= {"bytes", "path"}:
        p = p.get("path")
    return in_folder(p, root, f"picture {i}")


def in_folder(p: object, root: Path, what: str) -> Path:
    if not isinstance(p, str) or not p:
        raise Bad(f"{what} is {kind(p)}, expected the path of a picture")
    check_text(p, what)
    if "://" in p:
        raise Bad(f"{what} {short(p, 200)} is a URL, but pictures are read from disk only")
    top = os.path.abspath(root)
    if os.path.commonpath([top, os.path.abspath(os.path.join(top, p))]) != top:
        raise Bad(f"{what} {short(p, 200)} lies outside the image folder")
    return root / p


def kind(x: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number",
             bool: "true or false"}
    return "null" if x is None else "empty" if x in ("", []) else names.get(type(x), type(x).__name__)


def check_text(text: str, what: str) -> None:
    if len(text) > MAX_TEXT:
        raise Bad(f"{what}: {len(text)} characters, more than {MAX_TEXT}")
    if "\0" in text:
        raise Bad(f"{what}: holds a NUL character")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise Bad(f"{what}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
