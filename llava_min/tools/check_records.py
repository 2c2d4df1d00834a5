"""The records of `check`: what the readers refuse, by kind, and what the others hold in tokens.

Every verdict is that of the readers (data/formats.py, data/chat.py); here they are only asked about
all records instead of up to the first few bad ones. Faults are of one kind when one `raise` makes
them, so there is no second list of what can be wrong.
"""

import gc
import hashlib
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_min.checks.records import check_image_folder, check_not_empty, none_found
from llava_min.config import IGNORE
from llava_min.data.chat import text_of
from llava_min.data.dataset import Dataset
from llava_min.data.formats import Record, Stored, from_raw, ignored, is_container
from llava_min.data.processor import Processor
from llava_min.data.records import ImageFiles, raw_records, sources
from llava_min.errors import UserError, label, shorten

SMALL = 256  # items that are not worth other processes


# ---- many at a time

_work: Callable[[Any], Any] | None = None  # what the forked processes do, inherited


def _call(item: Any) -> Any:
    return _work(item)


def in_parallel(work: Callable[[Any], Any], items: Sequence, workers: int) -> list:
    """`work(item)` of each, in their order, by processes that inherit what `work` knows."""
    global _work
    if workers < 2 or len(items) < SMALL:
        return list(map(work, items))
    _work = work
    gc.freeze()  # or the children's collector would copy every page that it marks
    chunk = min(512, -(-len(items) // (4 * workers)))
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        return pool.map(_call, items, chunksize=chunk)


# ---- faults by kind


class Kinds:
    """Faults by what raised them: the first one's text, and where all of them are."""

    def __init__(self):
        self.first: dict[object, str] = {}
        self.where: dict[object, list[str]] = {}

    def add(self, key: object, where: str, text: str) -> None:
        self.first.setdefault(key, text)
        self.where.setdefault(key, []).append(where)

    def __len__(self) -> int:
        return sum(map(len, self.where.values()))

    def sorted(self) -> list[tuple[str, list[str]]]:
        """(text of the first, where) of each kind, the most frequent first."""
        order = sorted(self.first, key=lambda key: -len(self.where[key]))
        return [(self.first[key], self.where[key]) for key in order]


def raised_at(e: BaseException) -> str:
    """The line that found the fault, under those that only passed it on."""
    while isinstance(e.__context__, UserError):
        e = e.__context__
    frame = e.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    return f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}"


# ---- one record


@dataclass(slots=True)
class Seen:
    """What is kept of a good record: numbers, and digests to compare it by."""

    number: int  # of the file's raw records
    id: str
    tokens: int
    supervised: int
    images: list[Stored]
    whole: bytes  # digest of its messages and images
    asked: bytes  # the same of its questions and images


@dataclass(slots=True)
class Verdict:
    """On one raw record: `seen` where it is good, else the fault, as key and text."""

    seen: Seen | None = None
    key: str = ""
    text: str = ""
    fields: list[str] = field(default_factory=list)  # that are not used
    marks: list[str] = field(default_factory=list)  # that stay text
    headless: bool = False  # begins with an answer, which is left out


def digest(parts: list[str]) -> bytes:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).digest()


def look(raw: object, number: int, prefix: str, root: Path, dataset: Dataset) -> Verdict:
    """What the readers and the template say of one raw record, and its tokens."""
    if isinstance(raw, UserError):  # a line that is no JSON
        what = getattr(raw.__context__, "msg", "")
        return Verdict(key=f"{raised_at(raw)} {what}", text=str(raw))
    try:
        record = from_raw(raw, f"{prefix}{number}", root)
        ids, labels = dataset.processor.encode(dataset.pieces(record))
    except UserError as e:
        return Verdict(key=raised_at(e), text=str(e))
    names = [str(p).removeprefix(str(root)) for p in record.images]
    questions = [text_of(m) for m in record.messages if m["role"] == "user"]
    seen = Seen(
        number,
        record.id,
        len(ids),
        len(labels) - labels.count(IGNORE),
        record.images,
        digest(names + [text_of(m) for m in record.messages]),
        digest(names + questions),
    )
    answers, fields, marks = ignored(raw, record)
    return Verdict(seen, fields=fields, marks=marks, headless=bool(answers))


# ---- a file


@dataclass
class File:
    """What is found in one file of records."""

    path: Path
    weight: float
    root: Path
    total: int
    raw: list[tuple[str, object]]  # (where, parsed record, or why its line is none)
    seen: list[Seen] = field(default_factory=list)
    # where no image at all is there: those that lack nothing else
    imageless: list[Seen] = field(default_factory=list)
    bad: Kinds = field(default_factory=Kinds)
    remarks: list[str] = field(default_factory=list)
    prefix: str = ""

    @property
    def measured(self) -> list[Seen]:
        return self.seen + self.imageless

    def where(self, number: int) -> str:
        """As the readers name a record."""
        where, raw = self.raw[number]
        named = isinstance(raw, dict) and isinstance(raw.get("id"), (str, int))
        return where + (f" (id {shorten(raw['id'])})" if named else "")

    def record(self, seen: Seen) -> Record:
        return from_raw(self.raw[seen.number][1], f"{self.prefix}{seen.number}", self.root)


def read_files(
    data: str, image_folder: str | None, processor: Processor, max_length: int, workers: int
) -> list[File]:
    """Every file that `data` names, each of its records looked at.

    Raises UserError as the readers do: a file cannot be read as a whole, or holds no record.
    """
    named = sources(data)
    dataset = Dataset([], processor)
    out = []
    for path, weight in named:
        root = Path(os.path.abspath(path.parent if image_folder is None else image_folder))
        check_image_folder(root, image_folder is not None)
        raw = list(raw_records(path, keep_broken=True))
        if raw and all(isinstance(record, UserError) for _, record in raw):  # no data at all
            raise raw[0][1]
        alone = len(raw) == 1 and raw[0][0].startswith("line")
        check_not_empty(path, len(raw), raw[0][1] if alone and is_container(raw[0][1]) else None)
        prefix = f"{path.name}:" if len(named) > 1 else ""
        file = File(path, float(weight), root, len(raw), raw, prefix=prefix)
        judge = lambda i: look(raw[i][1], i, prefix, root, dataset)
        sort_out(file, in_parallel(judge, range(len(raw)), workers), max_length)
        out.append(file)
    return out


def sort_out(file: File, verdicts: list[Verdict], max_length: int) -> None:
    """The good from the bad, what is missing on disk and what is too long among them."""
    there, fields, marks = ImageFiles(file.root), Counter(), Counter()
    for number, v in enumerate(verdicts):
        if v.seen is None:
            file.bad.add(v.key, file.where(number), v.text)
            continue
        fields.update(v.fields)
        marks.update(v.marks)
        missing = [p for p in v.seen.images if isinstance(p, Path) and not there.has(p)]
        if v.seen.tokens > max_length:
            text = f"{v.seen.tokens} tokens, more than {label('max_length')} {max_length}"
            file.bad.add("too long", file.where(number), text)
        elif not v.seen.supervised:
            file.bad.add("nothing supervised", file.where(number), "no token to learn from")
        elif missing:
            text = f"no image {shorten(missing[0], 200)}"
            file.bad.add("missing image", file.where(number), text)
            file.imageless.append(v.seen)
        else:
            file.seen.append(v.seen)
    nowhere = none_found(there.found, there.asked, file.root)
    if not nowhere:
        file.imageless.clear()
    elif file.imageless:
        file.bad.first["missing image"] = nowhere
    file.remarks = remarks(file, sum(v.headless for v in verdicts), fields, marks, there.alike)
    if nowhere and not file.imageless:  # each of the records has another fault
        file.remarks.append(nowhere)


def remarks(
    file: File,
    headless: int,
    fields: Counter,
    marks: Counter,
    alike: tuple[Path, Path] | None,
) -> list[str]:
    """What is legal and perhaps not meant."""
    listed = lambda names: ", ".join(f"{shorten(x)} ({n} times)" for x, n in names.most_common(5))
    ids = Counter(s.id for s in file.measured)
    twice = [id for id, n in ids.items() if n > 1]
    repeated = len(file.measured) - len({s.whole for s in file.measured})
    out = []
    if headless:
        out.append(f"{headless} records begin with an answer, which is left out, as LLaVA does")
    if fields:
        out.append(f"fields that are not used: {listed(fields)}")
    if marks:
        out.append(f"marks that are text, not images: {listed(marks)}")
    if twice:
        out.append(f"{len(twice)} ids stand on more than one record, such as {shorten(twice[0])}")
    if repeated:
        out.append(f"{repeated} records say what another one says, on the same images")
    if alike:
        some = " and ".join(shorten(p, 200) for p in alike)
        out.append(f"{some} differ in upper and lower case alone, which some disks do not keep")
    return out


def shared(train: Sequence[Seen], held_out: Sequence[Seen]) -> list[str]:
    """What the evaluation has in common with the training."""
    asked, images = {s.asked for s in train}, {str(p) for s in train for p in s.images}
    same = [s for s in held_out if s.asked in asked]
    seen = [s for s in held_out if any(str(p) in images for p in s.images)]
    out = []
    if same:
        out.append(
            f"{len(same)} of {len(held_out)} evaluation records ask what a training record asks "
            f"of the same images, such as {shorten(same[0].id)}"
        )
    if seen:
        out.append(
            f"{len(seen)} of {len(held_out)} evaluation records show an image of the training, "
            f"such as {shorten(seen[0].id)}"
        )
    return out
