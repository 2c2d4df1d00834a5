"""Files of conversations → records → the two views of a record: one to train on, one to evaluate with.

Between the files and the model: `read_records` checks every record before any weight is read; `Dataset` and
`collate` make training batches (the answers are in the ids and the labels); `evaluation_batch` makes prompts
that stop where the last answer begins, from the same records. `batches` says which records make which step.

The format is LLaVA's (haotian-liu/LLaVA, docs/Finetune_Custom_Data.md): a JSON list, or one record a line, of
    {"id": "7", "image": "cat.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                      {"from": "gpt", "value": "A cat."}]}
`image` may be absent or a list. Every `<image>` in a human turn is one picture, and there must be as many as
pictures; in an answer it is text. As in LLaVA the marks are taken out, the rest is stripped and follows the
pictures.
"""

import json
import math
import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from llava_min.cli import UserError, printable, warn
from llava_min.data.chat import render
from llava_min.data.image import open_image
from llava_min.data.processor import IGNORE, MARK, Processor
from llava_min.files import check_file

ROLES = {"human": "user", "gpt": "assistant"}
MAX_TEXT = 1_000_000                        # characters in a turn; more is a broken export
NAMED = 5                                   # how many bad records a message tells of


@dataclass(slots=True)
class Record:
    """A conversation that ends in an answer, and its pictures in reading order."""

    id: str
    messages: list[dict]                    # role/content, a picture being a part {"type": "image"}
    images: list[Path | Image.Image] = field(default_factory=list)
    root: Path | None = None                # the folder that no picture's path may leave
    extra: dict = field(default_factory=dict)  # what else the record said

    @property
    def length(self) -> int:
        """Roughly how many tokens, to put like with like: the words, and 256 a picture."""
        return sum(len(text_of(m).split()) for m in self.messages) + 256 * len(self.images)

    def pictures(self, exif: bool = False) -> list[Image.Image]:
        try:
            return [p if isinstance(p, Image.Image) else open_image(p, root=self.root, exif=exif)
                    for p in self.images]
        except UserError as e:
            raise UserError(f"record {short(self.id)}: {e}") from None


# ---- reading -----------------------------------------------------------------------------------------------


class Bad(Exception):
    """What is wrong with one record."""


def short(x: object, n: int = 60) -> str:
    text = printable(x)
    return text if len(text) <= n else text[:n] + "…"


def read_records(path: str | os.PathLike, image_folder: str | os.PathLike | None = None) -> list[Record]:
    """Every record of a LLaVA JSON or JSONL file, checked; pictures are looked for under `image_folder` (the
    file's own folder if None) but not yet opened.

    Raises UserError: the file cannot be read, or records are bad; all are counted and the first ones named.
    """
    path = Path(path)
    root = Path(os.path.abspath(path.parent if image_folder is None else image_folder))
    if image_folder is not None and not root.is_dir():
        raise UserError(f"{short(root, 400)}: no such folder; give the folder of the pictures")
    files, records, bad, headless = Files(root), [], [], 0
    for where, raw in raw_records(path):
        if isinstance(raw, dict) and isinstance(raw.get("id"), (str, int)):
            where += f" (id {short(raw['id'])})"
        try:
            record, beheaded = from_llava(raw, str(len(records) + len(bad)), root)
            missing = [p for p in record.images if not files.have(p)]
            if missing:
                raise Bad(f"no picture {short(missing[0], 200)}")
            records.append(record)
            headless += beheaded
        except Bad as e:
            bad.append(f"{where}: {e}")
    if not records and not bad:
        raise UserError(f"{path}: holds no records; give a file with at least one conversation")
    if files.asked and not files.found:
        raise UserError(f"{path}: 0 of {files.asked} pictures found under {short(root, 400)} (the first: "
                        f"{short(files.first, 200)}); check the image folder")
    if bad:
        told = " | ".join(b[:280] for b in bad[:NAMED]) + (" | …" if len(bad) > NAMED else "")
        n = len(records) + len(bad)
        raise UserError(f"{path}: {len(bad)} of {n} records are bad: {told}; mend or remove them")
    if headless:
        warn(f"{path}: {headless} records begin with an answer, which is left out, as LLaVA does")
    twice = [id for id, n in Counter(r.id for r in records).items() if n > 1]
    if twice:
        warn(f"{path}: {len(twice)} ids stand on more than one record, for example {short(twice[0])}")
    return records


def raw_records(path: Path) -> Iterator[tuple[str, object]]:
    """(where, parsed record). A file that begins with `[` is one JSON list, any other has a record a line."""
    check_file(path)
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); check its permissions") from None
    for magic, what in ((b"\x1f\x8b", "gzip"), (b"PK\x03\x04", "zip"), (b"\xfd7zXZ", "xz"), (b"BZh", "bzip2"),
                        (b"\x28\xb5\x2f\xfd", "zstd")):
        if data.startswith(magic):
            raise UserError(f"{path}: is a {what} archive; unpack it first")
    if data.startswith(b"PAR1"):
        raise UserError(f"{path}: is a parquet file; convert it to LLaVA JSON")
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
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply for conversations; is it the right file?") from None
    except ValueError as e:                 # an integer of thousands of digits
        raise UserError(f"{where}: {short(e, 200)}; correct it") from None


def from_llava(raw: object, number: str, root: Path) -> tuple[Record, bool]:
    """The record, and whether an answer before the first question was left out. Raises Bad."""
    if not isinstance(raw, dict):
        raise Bad(f"is {kind(raw)}, expected an object with id, image and conversations")
    raw = dict(raw)
    id, images, turns = raw.pop("id", number), raw.pop("image", None), raw.pop("conversations", None)
    if isinstance(id, bool) or not isinstance(id, (str, int)):
        raise Bad(f"id is {kind(id)}, expected text or a whole number")
    check_text(str(id), "id")
    images = [] if images is None else images if isinstance(images, list) else [images]
    for p in images:
        if not isinstance(p, str) or not p:
            raise Bad(f"image is {kind(p)}, expected the path of a picture, or a list of paths")
        check_text(p, "image")
        if "://" in p:
            raise Bad(f"image {short(p, 200)} is a URL, but pictures are read from disk only")
        top = os.path.abspath(root)
        if os.path.commonpath([top, os.path.abspath(os.path.join(top, p))]) != top:
            raise Bad(f"image {short(p, 200)} lies outside the image folder")
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
            beheaded = True                 # ShareGPT conversations in LLaVA's own mixture begin so
            continue
        if role != ("assistant" if len(messages) % 2 else "user"):
            raise Bad(f"turn {i}: another {turn['from']} turn, but human and gpt must alternate, human first")
        n = text.count(MARK) if role == "user" else 0
        if not text.strip():
            raise Bad(f"turn {i}: the {'answer' if role == 'assistant' else 'question'} is empty")
        if n:
            marks += n
            text = text.replace(MARK, "").strip()
            content = [{"type": "image"}] * n + ([{"type": "text", "text": text}] if text else [])
            messages.append({"role": role, "content": content})
        else:
            messages.append({"role": role, "content": text})
    if len(messages) % 2:
        raise Bad("ends with a human turn, but there must be an answer to learn from or to compare with")
    if marks != len(images):
        raise Bad(f"{len(images)} pictures, but the human turns mark {marks} with {MARK}")
    return Record(id := str(id), messages, [root / p for p in images], root, raw), beheaded


def kind(x: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number",
             bool: "true or false"}
    return "null" if x is None else "empty" if x in ("", []) else names[type(x)]


def check_text(text: str, what: str) -> None:
    if len(text) > MAX_TEXT:
        raise Bad(f"{what}: {len(text)} characters, more than {MAX_TEXT}")
    if "\0" in text:
        raise Bad(f"{what}: holds a NUL character")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise Bad(f"{what}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")


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


# ---- which records make which step -------------------------------------------------------------------------


def order(n: int, seed: int, epoch: int) -> list[int]:
    """A permutation of 0 … n − 1, a function of its arguments alone, so that runs can be resumed."""
    rows = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(rows)
    return rows


def batches(n: int, batch_size: int, grad_accum: int = 1, epochs: float = 1.0, max_steps: int = 0,
            seed: int = 0) -> list[list[list[int]]]:
    """Steps of micro-batches of indices of `n` records.

    Each epoch holds every record once: its last step, and that step's last micro-batch, may be smaller.
    `max_steps` wins over `epochs`.
    """
    rows = batch_size * grad_accum
    total = max_steps or math.ceil(epochs * math.ceil(n / rows))
    steps, epoch = [], 0
    while len(steps) < total:
        ids = order(n, seed, epoch)
        for i in range(0, n, rows):
            step = ids[i:i + rows]
            steps.append([step[j:j + batch_size] for j in range(0, len(step), batch_size)])
        epoch += 1
    return steps[:total]


# ---- the training view -------------------------------------------------------------------------------------


class Dataset(torch.utils.data.Dataset):
    """Records as {input_ids, labels: lists of one length, pixel_values (N, 3, S, S) if there are pictures}.

    A record of more than `max_length` tokens, pictures included, is a UserError when the dataset is made:
    cut, it would lose its end token, and at times all that it teaches.
    """

    def __init__(self, records: list[Record], processor: Processor, *, max_length: int = 2048,
                 exif: bool = False):
        self.records, self.processor, self.exif = records, processor, exif
        long = [f"{short(r.id)} ({n})" for r in records if (n := self.tokens(r, max_length)) > max_length]
        if long:
            told = ", ".join(long[:NAMED]) + (", …" if len(long) > NAMED else "")
            raise UserError(f"--max-length {max_length}: {len(long)} of {len(records)} records have more tokens: "
                            f"{told}; raise it, or shorten or remove them")

    def tokens(self, r: Record, enough: int) -> int:
        """Exact if it is more than `enough`. A token is at least a byte, so most records need no count: the
        bound allows for every template's system text (Vicuna's, 158 bytes, is the longest) and role names."""
        p = self.processor
        most = 256 + len(r.images) * (p.tokens_per_image + 2)
        for m in r.messages:
            most += 32 + len(text_of(m).encode())
        if most <= enough:
            return most
        return len(p.encode(render(p.template_name, r.messages, answer=True))[0])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict:
        r = self.records[i]
        return self.processor.training(r.messages, [r.pictures(self.exif)] if r.images else None)


def collate(items: list[dict]) -> dict[str, torch.Tensor]:
    """input_ids, labels, attention_mask (B, T), padded on the right; pixel_values (N, 3, S, S), in order."""
    T = max(len(x["input_ids"]) for x in items)
    pad = lambda key, value: torch.tensor([[*x[key], *[value] * (T - len(x[key]))] for x in items])
    mask = torch.tensor([[i < len(x["input_ids"]) for i in range(T)] for x in items], dtype=torch.int64)
    out = {"input_ids": pad("input_ids", 0), "labels": pad("labels", IGNORE), "attention_mask": mask}
    pixels = [x["pixel_values"] for x in items if "pixel_values" in x]
    return out | {"pixel_values": torch.cat(pixels)} if pixels else out


# ---- the evaluation view -----------------------------------------------------------------------------------


def evaluation_batch(records: list[Record], processor: Processor, exif: bool = False,
                     ) -> tuple[dict[str, torch.Tensor], list[str], list[list[str]]]:
    """(batch padded on the left, last questions, references): what stands before each record's last answer,
    and that answer. Earlier turns are given as the record has them."""
    pictures = [r.pictures(exif) for r in records]
    batch = processor.chat([r.messages[:-1] for r in records], pictures if any(pictures) else None)
    return batch, [text_of(r.messages[-2]) for r in records], [[text_of(r.messages[-1])] for r in records]


def text_of(message: dict) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
