"""Dataset files -> `Record`s, all checked before any weight is read.

Training and evaluation start here. parquet.py and json_file.py read the files, which are known by
their content and not by their name; formats.py makes the records; dataset.py makes batches of them.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

from llava_min.checks.records import (
    check_bad,
    check_found,
    check_image_folder,
    check_matched,
    check_mixture,
    check_not_empty,
    check_share,
    check_some_found,
    check_weight,
    check_weighted,
    report_ignored,
)
from llava_min.checks.sampler import MAX_ROWS
from llava_min.data.formats import Record, from_raw, ignored, is_container
from llava_min.data.json_file import json_records, read_bytes
from llava_min.data.parquet import parquet_records
from llava_min.errors import UserError, shorten

SAMPLE = 256  # images whose content `hash_images` reads


def raw_records(path: Path, keep_broken: bool = False) -> Iterator[tuple[str, object]]:
    """(where, raw record) of each record in a file, in its order; see `json_records`."""
    is_parquet = read_bytes(path, 4) == b"PAR1"
    return parquet_records(path) if is_parquet else json_records(path, keep_broken)


# ---- a file


class ImageFiles:
    """Which images are there. Each folder is listed once: a stat of every file can take minutes."""

    def __init__(self, root: Path):
        self.root = root
        # folder -> name -> whether it is seen to be a regular file without a stat, as a link is not
        self.listed: dict[str, dict[str, bool]] = {}
        self.asked: list[Path] = []
        self.found = 0
        self.folded: dict[str, Path] = {}
        self.alike: tuple[Path, Path] | None = None  # the first two that differ in case alone

    def has(self, path: Path) -> bool:
        """Whether `path` is a regular file, or a link to one."""
        folder, name = os.path.split(path)
        if folder not in self.listed:
            self.listed[folder] = list_folder(folder)
        if (other := self.folded.setdefault(str(path).casefold(), path)) != path:
            self.alike = self.alike or (other, path)
        self.asked.append(path)
        is_file = self.listed[folder].get(name)  # None: there is no such name
        found = is_file or is_file is not None and os.path.isfile(path)
        self.found += found
        return found


def list_folder(folder: str) -> dict[str, bool]:
    """Name -> whether it is a regular file and no link; empty for what cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return {e.name: e.is_file(follow_symlinks=False) for e in entries}
    except OSError:
        return {}


class SkippedRecords:
    """Bad records that are left out instead of ending the run: counted, listed in the file `path`,
    at most the share `cap` of all.

    Each rank adds the same lines, so all stop at the same point; one of them has a `path`.
    """

    def __init__(self, path: Path | None = None, cap: float = 0.01):
        self.path, self.cap, self.total = path, cap, 0
        # a dict: an image that is damaged in every epoch is one bad record
        self.lines: dict[str, None] = {}

    def add(self, lines: Iterable[str]) -> None:
        """Raises UserError if there are too many."""
        self.lines |= dict.fromkeys(lines)
        check_share(self.lines, self.total, self.cap)

    def write(self) -> None:
        """List them, a line each; once the folder of `path` is there, and after every change."""
        if self.path and self.lines:
            self.path.write_text("".join(line + "\n" for line in self.lines), encoding="utf-8")


def read_file(
    path: Path, image_folder: str | os.PathLike | None, skips: SkippedRecords | None, prefix: str
) -> list[Record]:
    """`prefix`: of the id of a record that has none of its own."""
    root = Path(os.path.abspath(path.parent if image_folder is None else image_folder))
    check_image_folder(root, image_folder is not None)
    files, records, bad = ImageFiles(root), [], []
    answers, fields, marks = Counter(), Counter(), Counter()
    for where, raw in raw_records(path):
        if isinstance(raw, dict) and isinstance(raw.get("id"), (str, int)):
            where += f" (id {shorten(raw['id'])})"
        try:
            record = from_raw(raw, f"{prefix}{len(records) + len(bad)}", root)
            on_disk = [image for image in record.images if isinstance(image, Path)]
            check_found(on_disk, map(files.has, on_disk))
        except UserError as e:
            bad.append(f"{where}: {e}")
            continue
        records.append(record)
        for seen, names in zip((answers, fields, marks), ignored(raw, record)):
            seen.update(names)

    n = len(records) + len(bad)
    alone = n == len(bad) == 1 and where.startswith("line")
    check_not_empty(path, n, raw if alone and is_container(raw) else None)
    check_some_found(path, files.found, files.asked, root)
    check_bad(path, bad, n, skipped=skips is not None)
    if skips is not None:
        skips.total += n
        skips.lines |= dict.fromkeys(f"{path}: {line}" for line in bad)
    report_ignored(path, files.alike, answers, fields, marks)
    return records


# ---- a mixture of files


def read_records(
    data: str | os.PathLike,
    image_folder: str | os.PathLike | None = None,
    skips: SkippedRecords | None = None,
) -> list[Record]:
    """Every record of `data`, checked. Images are there, but not opened.

    data: a file, or several with commas between. A name may hold `*`, and may end in `@WEIGHT`:
        `@3` takes each record three times, `@0.5` every second one.
    image_folder: where image paths start; None: at the folder of each file.

    Raises UserError if a file cannot be read or has bad records: it says how many, and names the
    first. With `skips` they are left out, as long as they are few.
    """
    data = os.fspath(data)
    files, records, seen = sources(data), [], Counter()
    for path, weight in files:
        read = read_file(path, image_folder, skips, f"{path.name}:" if len(files) > 1 else "")
        seen.update(r.id for r in read)
        check_weighted(data, path, float(weight), len(records) + len(read) * weight, MAX_ROWS)
        # how often a record is taken: its share of the rows so far, rounded down
        times = lambda i: int((i + 1) * weight) - int(i * weight)
        records += [r for i, r in enumerate(read) for _ in range(times(i))]
    if skips is not None:
        skips.add([])
    check_mixture(data, len(records), [id for id, n in seen.items() if n > 1])
    return records


def sources(data: str) -> list[tuple[Path, Fraction]]:
    """The files that `data` names, each with its weight."""
    if os.path.exists(data):  # even if its name has a comma, * or @
        return [(Path(data), Fraction(1))]
    out = []
    for name in data.split(","):
        name, digits = name.strip(), ""
        if not os.path.exists(name) and (m := re.fullmatch(r"(.+)@(\d+(?:\.\d+)?)", name)):
            name, digits = m[1], m[2]
        check_weight(data, name, digits)
        path = Path(name)
        is_pattern = "*" in path.name and not path.exists()
        found = sorted(path.parent.glob(path.name)) if is_pattern else [path]
        check_matched(found, path)
        out += [(p, Fraction(digits or 1)) for p in found]
    return out


# ---- what there is, in a line and as hashes


def count_records(records: Sequence[Record]) -> str:
    """For the line at a run's start, which shows a dataset whose images are not read."""
    return f"{len(records):,} records, {sum(bool(r.images) for r in records):,} with an image"


def hash_records(records: Sequence[Record]) -> str:
    """sha256 of what the data files alone do not say: which records there are, in which order, and
    the names of their images. Their folder may change.
    """
    digest = hashlib.sha256()
    for r in records:
        names = [str(p).removeprefix(str(r.root)) for p in r.images if isinstance(p, Path)]
        digest.update(repr((r.id, names)).encode())
    return digest.hexdigest()


def hash_images(records: Sequence[Record]) -> str:
    """sha256 of the sizes and beginnings of some images: opening each would take minutes."""
    digest, files = hashlib.sha256(), [p for r in records for p in r.images if isinstance(p, Path)]
    for p in files[:: -(-len(files) // SAMPLE) or 1]:
        if p.is_file() and os.access(p, os.R_OK):
            with open(p, "rb") as f:
                digest.update(f" {p.stat().st_size} ".encode() + f.read(1 << 16))
    return digest.hexdigest()
