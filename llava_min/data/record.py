"""One record: a conversation that ends in an answer, checked, and where its images are.

formats.py makes records of what files say; below it, here, is what every format shares. A record
keeps where its images are and opens them when asked: nothing of an image file is in memory before.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from llava_min.checks.image_file import open_image
from llava_min.data.data_uri import Encoded
from llava_min.data.parquet import Embedded
from llava_min.errors import UserError, shorten

MAX_TEXT = 1_000_000  # characters in a turn; more is a broken export


class Bad(Exception):
    """What is wrong with one record."""


@dataclass(slots=True)
class Record:
    id: str
    # role/content, an image being a part {"type": "image"}; "loss": False in an answer not to be
    # learnt
    messages: list[dict]
    images: list[Path | Embedded | Encoded | Image.Image] = field(
        default_factory=list
    )  # in reading order
    root: Path | None = None  # the folder that no picture's path may leave
    extra: dict = field(default_factory=dict)  # what else the record said

    @property
    def length(self) -> int:
        """Roughly how many tokens, to put like with like: the words, and 256 a picture."""
        return sum(len(text_of(m).split()) for m in self.messages) + 256 * len(self.images)

    def pictures(self, exif: bool = False) -> list[Image.Image]:
        try:
            return [
                p
                if isinstance(p, Image.Image)
                else open_image(p, root=self.root, exif=exif)
                if isinstance(p, Path)
                else p.open(exif)
                for p in self.images
            ]
        except UserError as e:
            raise UserError(f"record {shorten(self.id)}: {e}") from None


def text_of(message: dict) -> str:
    content = message["content"]
    return (
        content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    )


def earlier(record: "Record") -> str:
    """What was said before the last question, a line each."""
    return "\n".join(f"{message['role']}: {text_of(message)}" for message in record.messages[:-2])


# ---- what all formats say


def in_folder(p: object, root: Path, what: str) -> Path:
    if not isinstance(p, str) or not p:
        raise Bad(f"{what} is {kind(p)}, expected the path of a picture")
    check_text(p, what)
    if "://" in p:
        raise Bad(f"{what} {shorten(p, 200)} is a URL, but pictures are read from disk only")
    top = os.path.abspath(root)
    if os.path.commonpath([top, os.path.abspath(os.path.join(top, p))]) != top:
        raise Bad(f"{what} {shorten(p, 200)} lies outside the image folder")
    return root / p


def kind(x: object) -> str:
    names = {
        type(None): "null",
        dict: "an object",
        list: "a list",
        str: "text",
        int: "a number",
        float: "a number",
        bool: "true or false",
    }
    return "empty" if x in ("", []) else names.get(type(x), type(x).__name__)


def check_text(text: str, what: str) -> None:
    if len(text) > MAX_TEXT:
        raise Bad(f"{what}: {len(text)} characters, more than {MAX_TEXT}")
    if "\0" in text:
        raise Bad(f"{what}: holds a NUL character")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise Bad(
            f"{what}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no character"
        )
