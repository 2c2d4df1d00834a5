"""Files of conversations → records, each checked before any weight is read.

First station of training and evaluation: formats.py says what a record may be, dataset.py makes
batches of them. A file is known by what it holds, not by its name: JSON (a list, or one object), an
object a line, or parquet (parquet.py).
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

from llava_min.checks.sampler import MAX_ROWS
from llava_min.data.formats import from_raw, is_container, told_of
from llava_min.data.parquet import parquet_records
from llava_min.data.record import Bad, Record
from llava_min.errors import UserError, shorten, warn
from llava_min.util.files import check_file

SAMPLE = 256  # pictures that stand for all
NAMED = 5  # how many bad records a message tells of
ARCHIVES = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstd",
}


# ---- JSON


def raw_records(path: Path) -> Iterator[tuple[str, object]]:
    """(where, parsed record) of each in a file, in its order."""
    try:
        check_file(path)
        with open(path, "rb") as f:
            if f.read(4) == b"PAR1":
                yield from parquet_records(path)
                return
        data = path.read_bytes()
    except OSError as e:
        raise UserError(
            f"{path}: cannot be read ({e.strerror}); check its name and permissions"
        ) from None
    if what := next((name for magic, name in ARCHIVES.items() if data.startswith(magic)), None):
        raise UserError(f"{path}: is a {what} archive; unpack it first")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}: is UTF-16; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(
            f"{path}: byte {e.start} is not UTF-8, and it does not begin as parquet does; save it "
            "as JSON in "
            "UTF-8, or fetch it again"
        ) from None
    del data
    if not text or text.isspace():
        raise UserError(f"{path}: is empty; give a file with at least one conversation")
    # a list, or an object that does not end on its line
    if re.match(r"\s*(\[|\{(?!.*\}\s*$))", text, re.M):
        whole = parse(text, path)
        if not isinstance(whole, list):
            yield "line 1", whole
            return
        for i, raw in enumerate(whole):
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
        many = (
            " (lists or objects one after the other: join them into one list)"
            if e.msg == "Extra data"
            else ""
        )
        raise UserError(
            f"{where}: {at}: {e.msg}{many}; expected a JSON list of records, or a record a line"
        ) from None
    except RecursionError:
        raise UserError(
            f"{where}: is nested too deeply for conversations; is it the right file?"
        ) from None
    except ValueError as e:  # an integer of thousands of digits
        raise UserError(f"{where}: {shorten(e, 200)}; correct it") from None


# ---- a file


class Files:
    """Which pictures are there. Each folder is listed once, as a stat of every file can take
    minutes.
    """

    def __init__(self, root: Path):
        self.root, self.names = root, {}
        self.asked, self.found, self.first = 0, 0, None
        self.folded: dict[str, Path] = {}
        # the first two whose names differ in upper and lower case alone
        self.alike: tuple[Path, Path] | None = None

    def have(self, path: Path) -> bool:
        folder, name = os.path.split(path)
        if folder not in self.names:
            try:
                self.names[folder] = set(os.listdir(folder))
            except OSError:
                self.names[folder] = set()
        self.asked += 1
        if (other := self.folded.setdefault(str(path).casefold(), path)) != path:
            self.alike = self.alike or (other, path)
        self.first = self.first or path
        self.found += name in self.names[folder]
        return name in self.names[folder]

    def check(self, path: Path) -> None:
        """Where none is there it is the folder that is wrong, not the records."""
        if self.asked and not self.found:
            raise UserError(
                f"{path}: 0 of {self.asked} pictures found under {shorten(self.root, 400)} (the "
                "first: "
                f"{shorten(self.first, 200)}); check the image folder"
            )


class Skips:
    """Bad records that are left out instead of ending the run: counted, listed in `path`, never
    more than `cap` of all.

    On several ranks each rank adds the same lines, so that all stop at the same point; one of them
    has a `path`.
    """

    def __init__(self, path: Path | None = None, cap: float = 0.01):
        self.path, self.cap, self.total = path, cap, 0
        # a picture that is damaged in every epoch is one bad record
        self.lines: dict[str, None] = {}

    def add(self, lines: Iterable[str]) -> None:
        """Raises UserError when they are too many."""
        self.lines |= dict.fromkeys(lines)
        if len(self.lines) > self.cap * self.total:
            raise UserError(
                f"{len(self.lines)} of {self.total} records are bad, more than the {self.cap:.2%} "
                "that may be "
                f"skipped: {told(self.lines)}; mend or remove them"
            )

    def write(self) -> None:
        """List them, a line each; once the folder of `path` is there, and after every change."""
        if self.path and self.lines:
            self.path.write_text("".join(line + "\n" for line in self.lines), encoding="utf-8")


def told(lines: Iterable[str], between: str = " | ") -> str:
    lines = [line[:280] for line in lines]
    return between.join(lines[:NAMED] + ["…"] * (len(lines) > NAMED))


def times(names: Counter) -> str:
    return told((f"{shorten(name)} ({n} times)" for name, n in names.most_common()), ", ")


def with_images(records: Sequence[Record]) -> str:
    """How many there are, for the line at a run's start: a dataset whose images are not read shows
    here.
    """
    return f"{len(records):,} records, {sum(bool(r.images) for r in records):,} with a picture"


def read_file(
    path: Path, image_folder: str | os.PathLike | None, skips: Skips | None, prefix: str
) -> list[Record]:
    root = Path(os.path.abspath(path.parent if image_folder is None else image_folder))
    if image_folder is not None and not root.is_dir():
        raise UserError(f"{shorten(root, 400)}: no such folder; give the folder of the pictures")
    files, records, bad, headless, fields, marks = Files(root), [], [], 0, Counter(), Counter()
    for where, raw in raw_records(path):
        if isinstance(raw, dict) and isinstance(raw.get("id"), (str, int)):
            where += f" (id {shorten(raw['id'])})"
        try:
            record = from_raw(raw, f"{prefix}{len(records) + len(bad)}", root)
            missing = [p for p in record.images if isinstance(p, Path) and not files.have(p)]
            if missing:
                raise Bad(f"no picture {shorten(missing[0], 200)}")
            records.append(record)
            headless += (raw.get("conversations") or [{}])[0].get("from") == "gpt"
            for seen, names in zip((fields, marks), told_of(raw, record)):
                seen.update(names)
        except Bad as e:
            bad.append(f"{where}: {e}")
    n = len(records) + len(bad)
    if not n:
        raise UserError(f"{path}: holds no records; give a file with at least one conversation")
    if n == len(bad) == 1 and where.startswith("line") and is_container(raw):
        raise UserError(
            f"{path}: is one JSON object (its keys: {shorten(', '.join(raw) or 'none', 200)}), "
            "expected records, but "
            "conversations is missing; put the records into a list [ … ] with nothing "
            "around it"
        )
    files.check(path)
    if bad and skips is None:
        raise UserError(
            f"{path}: {len(bad)} of {n} records are bad: {told(bad)}; mend or remove them"
        )
    if skips is not None:
        skips.total += n
        skips.lines |= dict.fromkeys(f"{path}: {line}" for line in bad)
        if bad:
            warn(f"{path}: {len(bad)} of {n} records are bad and left out: {told(bad)}")
    if files.alike:
        warn(
            f"{path}: the pictures {' and '.join(shorten(p, 200) for p in files.alike)} are told "
            "apart by upper and lower case alone; "
            "some disks do not keep them apart"
        )
    if headless:
        warn(f"{path}: {headless} records begin with an answer, which is left out, as LLaVA does")
    if fields:
        warn(
            f"{path}: fields that are not used: {times(fields)}; nothing of them reaches the "
            "model: rename, mend or remove them"
        )
    if marks:
        warn(
            f"{path}: marks that stand within a question, or beside its image, are text: "
            f"{times(marks)}"
        )
    return records


# ---- a mixture


def read_records(
    data: str | os.PathLike,
    image_folder: str | os.PathLike | None = None,
    skips: Skips | None = None,
) -> list[Record]:
    """Every record of `data`, checked; pictures are looked for under `image_folder`, or beside each
    file if None, but not yet opened.

    data: a file, or several with commas between. A name may hold `*`, and may end in `@WEIGHT`:
    `@3` takes each record
        three times, `@0.5` every second one.
    Raises UserError: a file cannot be read, or records are bad; all bad ones of a file are counted and the first named.
        With `skips` they are left out, as long as they are few.
    """
    files, records, seen = sources(os.fspath(data)), [], Counter()
    for path, weight in files:
        read = read_file(path, image_folder, skips, f"{path.name}:" if len(files) > 1 else "")
        seen.update(r.id for r in read)
        if len(records) + len(read) * weight > MAX_ROWS:
            raise UserError(
                f"{shorten(data, 200)}: {path.name} {float(weight):g} times is more than "
                f"{MAX_ROWS} records; lower the weight"
            )
        records += [
            r for i, r in enumerate(read) for _ in range(int((i + 1) * weight) - int(i * weight))
        ]
    if skips is not None:
        skips.add([])
    if not records:
        raise UserError(f"{shorten(data, 200)}: no record is left; raise the weight")
    if twice := [id for id, n in seen.items() if n > 1]:
        warn(
            f"{shorten(data, 400)}: {len(twice)} ids stand on more than one record, for example "
            f"{shorten(twice[0])}"
        )
    return records


def hash_records(records: Sequence[Record]) -> str:
    """sha256 over what the data files alone do not tell: which records are there, in which order,
    and the names of their pictures. The folder of the pictures may be another.
    """
    digest = hashlib.sha256()
    for r in records:
        digest.update(
            repr(
                (r.id, [str(p).removeprefix(str(r.root)) for p in r.images if isinstance(p, Path)])
            ).encode()
        )
    return digest.hexdigest()


def hash_pictures(records: Sequence[Record]) -> str:
    """sha256 over the sizes and beginnings of some pictures: a look into each would take minutes."""
    digest, files = hashlib.sha256(), [p for r in records for p in r.images if isinstance(p, Path)]
    for p in files[:: -(-len(files) // SAMPLE) or 1]:
        if p.is_file() and os.access(p, os.R_OK):
            with open(p, "rb") as f:
                digest.update(f" {p.stat().st_size} ".encode() + f.read(1 << 16))
    return digest.hexdigest()


def sources(data: str) -> list[tuple[Path, Fraction]]:
    """The files that are named, each with its weight."""
    if os.path.exists(data):  # whatever is in its name
        return [(Path(data), Fraction(1))]
    out = []
    for name in data.split(","):
        name, weight = name.strip(), Fraction(1)
        if not os.path.exists(name) and (m := re.fullmatch(r"(.+)@(\d+(?:\.\d+)?)", name)):
            if len(m[2]) > 20:
                raise UserError(
                    f"{shorten(data, 200)}: a weight of {len(m[2])} digits; write at most 20"
                )
            name, weight = m[1], Fraction(m[2])
        if not name or not weight:
            raise UserError(
                f"{shorten(data, 200)}: {'a weight of 0' if name else 'a name is empty'}; expected "
                "files with commas between, each with @WEIGHT after it or not"
            )
        path = Path(name)
        found = (
            sorted(path.parent.glob(path.name))
            if "*" in path.name and not path.exists()
            else [path]
        )
        if not found:
            raise UserError(f"{shorten(path, 400)}: no such files; check the path")
        out += [(p, weight) for p in found]
    return out
