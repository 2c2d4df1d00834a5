"""The images of `check`: each one's header, or with `--decode` all of its pixels.

A header says size and kind in some microseconds. Where it looks wrong the image is opened as
training opens it, so the words, and the verdict, are those of checks/image_file.py.
"""

import contextlib
import hashlib
import io
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from llava_min.checks.image_file import (
    FORMATS,
    MAX_BYTES,
    check_bytes,
    check_size,
    inside,
    open_image,
    quiet_pillow,
)
from llava_min.data.formats import Stored
from llava_min.errors import UserError, shorten
from llava_min.tools.check_records import Kinds, in_parallel, raised_at


@dataclass(slots=True)
class Look:
    """At one image: its size in pixels, or what is wrong with it; and what was warned of."""

    size: tuple[int, int] | None = None
    key: str = ""
    text: str = ""
    warnings: list[str] = field(default_factory=list)
    digest: bytes = b""  # of the file's bytes, where it was decoded


def header_size(path: Path, root: Path) -> tuple[int, int]:
    """(W, H) by the header alone. Raises nearly anything where that is not enough."""
    name = inside(str(path), str(path), os.path.realpath(root))
    found = os.stat(name)
    if not stat.S_ISREG(found.st_mode) or not 0 < found.st_size <= MAX_BYTES:
        raise UserError(f"{name}: no file of a fitting size")
    with open(name, "rb") as f:
        check_bytes(f.read(4096), name)
        f.seek(0)
        with quiet_pillow():
            im = Image.open(f, formats=FORMATS)
        check_size(im, name)
        return im.size


def open_stored(image: Stored, root: Path, exif: bool) -> Image.Image:
    return open_image(image, root=root, exif=exif) if isinstance(image, Path) else image.open(exif)


def look(image: Stored, root: Path, exif: bool, decode: bool) -> Look:
    if isinstance(image, Path) and not decode:
        with contextlib.suppress(Exception):  # then it is opened below, and says what is wrong
            return Look(header_size(image, root))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            size = open_stored(image, root, exif).size
    except UserError as e:
        return Look(key=raised_at(e), text=str(e))
    # `warning: NAME: what` → what, its numbers left out, so that like is counted with like
    name = shorten(image, 400)
    warned = [line.replace(f"{name}: ", "", 1) for line in said.getvalue().splitlines()]
    warned = [re.sub(r"\d+", "N", line.removeprefix("warning: ")) for line in warned]
    return Look(size, warnings=warned, digest=file_digest(image))


def file_digest(image: Stored) -> bytes:
    if not isinstance(image, Path):
        return b""
    with open(image, "rb") as f:
        return hashlib.file_digest(f, "sha256").digest()


@dataclass
class Images:
    """What is found in all images of a file of records."""

    sizes: list[tuple[int, int]] = field(default_factory=list)
    bad: Kinds = field(default_factory=Kinds)
    warnings: Kinds = field(default_factory=Kinds)
    digests: set[bytes] = field(default_factory=set)

    @property
    def total(self) -> int:
        return len(self.sizes) + len(self.bad)


def look_at_all(
    images: Sequence[tuple[Stored, Path, str]], exif: bool, decode: bool, workers: int
) -> Images:
    """Each image once. `images`: (image, root, the record that has it first)."""
    first: dict[Stored, tuple[Path, str]] = {}
    for image, root, where in images:
        first.setdefault(image, (root, where))
    different = list(first)
    looks = in_parallel(lambda p: look(p, first[p][0], exif, decode), different, workers)
    out = Images()
    for image, seen in zip(different, looks, strict=True):
        where = first[image][1]
        if seen.size is None:
            out.bad.add(seen.key, where, seen.text)
            continue
        out.sizes.append(seen.size)
        out.digests.add(seen.digest)
        for text in seen.warnings:
            out.warnings.add(text, where, text)
    out.digests.discard(b"")
    return out
