"""What a record of a dataset may say; one table of words for what was found instead.

Raises UserError without the place of the record, which data/records.py adds.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_min.errors import UserError, shorten

MAX_TEXT = 1_000_000  # characters in a turn; more is a broken export
KINDS = {
    type(None): "null",
    dict: "an object",
    list: "a list",
    str: "text",
    int: "a number",
    float: "a number",
    bool: "true or false",
}


def kind(x: object) -> str:
    """What a message calls a value of JSON."""
    return "empty" if x in ("", []) else KINDS.get(type(x), type(x).__name__)


# ---- one record


def check_text(text: str, what: str) -> None:
    if len(text) > MAX_TEXT:
        raise UserError(f"{what}: {len(text)} characters, more than {MAX_TEXT}")
    if "\0" in text:
        raise UserError(f"{what}: holds a NUL character")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise UserError(
            f"{what}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no character"
        )


def check_path(path: object, root: Path, what: str) -> None:
    """The path of an image that does not leave the folder `root`."""
    if not isinstance(path, str) or not path:
        raise UserError(f"{what} is {kind(path)}, expected the path of an image")
    check_text(path, what)
    if "://" in path:
        raise UserError(f"{what} {shorten(path, 200)} is a URL, but images are read from disk only")
    top = os.path.abspath(root)
    if os.path.commonpath([top, os.path.abspath(os.path.join(top, path))]) != top:
        raise UserError(f"{what} {shorten(path, 200)} lies outside the image folder")


def check_record(raw: Any, id: Any) -> None:
    """An object; `id`: its own, or the number that it gets."""
    if not isinstance(raw, dict):
        raise UserError(f"is {kind(raw)}, expected an object with id, image and conversations")
    if isinstance(id, bool) or not isinstance(id, (str, int)):
        raise UserError(f"id is {kind(id)}, expected text or a whole number")
    check_text(str(id), "id")


def check_format(found: list, formats: Sequence, raw: dict) -> None:
    """A record is of exactly one of the formats."""
    if len(found) > 1:
        raise UserError(f"has {' and '.join(f.keys[0] for f in found)}, expected one of them")
    names = [f.keys[0] for f in formats]
    if not found and (null := [name for name in names if name in raw]):
        raise UserError(f"{null[0]} is null, expected a list of turns")
    if not found:
        keys = shorten(", ".join(raw) or "none", 200)
        raise UserError(
            f"{' or '.join(names)} is missing (its keys: {keys}); the formats that are read "
            f"are {' and '.join(f.name for f in formats)}"
        )


def check_system(texts: dict[str, Any]) -> None:
    """`texts`: where a system text is -> the text. They are one."""
    for name, text in texts.items():
        if not isinstance(text, str):
            raise UserError(f"{name} is {kind(text)}, expected text")
        check_text(text, name)
    if len(set(texts.values())) > 1:
        raise UserError(f"has several system texts ({', '.join(texts)}), expected one")


def check_image_list(images: Any) -> None:
    if not isinstance(images, (list, type(None))):
        raise UserError(f"images is {kind(images)}, expected a list of images")


# ---- LLaVA's conversations


def check_one_key(image: list, images: list) -> None:
    if image and images and image != images:
        raise UserError("has image and images, expected one of them")


def check_turns(turns: Any) -> None:
    """human and gpt alternate, human first, and each says something. A gpt turn may come before."""
    if not isinstance(turns, list) or not turns:
        raise UserError(f"conversations is {kind(turns)}, expected a list of turns")
    speaker = "human"  # who is next
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") not in ("human", "gpt"):
            said = isinstance(turn, dict)
            came = f"from is {shorten(turn.get('from'))}" if said else f"is {kind(turn)}"
            raise UserError(f"turn {i}: {came}, expected from human or gpt")
        text = turn.get("value")
        if not isinstance(text, str):
            raise UserError(f"turn {i}: value is {kind(text)}, expected text")
        check_text(text, f"turn {i}")
        if i == 0 and turn["from"] == "gpt" and len(turns) > 1:
            continue  # it is left out
        if turn["from"] != speaker:
            raise UserError(
                f"turn {i}: another {turn['from']} turn, but human and gpt must alternate, "
                "human first"
            )
        if not text.strip():
            what = "answer" if speaker == "gpt" else "question"
            raise UserError(f"turn {i}: the {what} is empty")
        speaker = "gpt" if speaker == "human" else "human"
    if speaker == "gpt":
        raise UserError(
            "ends with a human turn, but there must be an answer to learn from or to compare with"
        )


def check_marks(marks: int, images: int) -> None:
    if marks != images:
        raise UserError(f"{images} images, but the human turns mark {marks} with <image>")


# ---- messages


def check_message_list(raw: dict) -> None:
    turns = raw["messages"]
    if raw.get("image") is not None:
        raise UserError("has messages and image, expected messages with images, a list")
    if not isinstance(turns, list) or not turns:
        raise UserError(f"messages is {kind(turns)}, expected a list of messages")


def check_message(turn: Any, where: str, sources: Sequence[str], hints: Sequence[str]) -> None:
    """Text, or parts of text and image. `sources`: where an image part may hold its image; `hints`:
    what it may say beside that.
    """
    if not isinstance(turn, dict):
        raise UserError(f"{where} is {kind(turn)}, expected an object with role and content")
    content = turn.get("content")
    if isinstance(content, str):
        return check_text(content, where)
    if not isinstance(content, list):
        raise UserError(f"{where}: content is {kind(content)}, expected text or a list of parts")
    for part in content:
        type = part.get("type") if isinstance(part, dict) else None
        if type in ("image", "image_url"):
            check_image_part(part, where, sources, hints)
        elif type != "text" or not isinstance(part.get("text"), str):
            raise UserError(
                f'{where}: unknown part {shorten(part)}, expected {{"type": "text", "text": "…"}} '
                'or {"type": "image", "index": 0}'
            )
        elif lost := [key for key in sources if part.get(key) not in (None, "")]:
            raise UserError(
                f'{where}: a text part has {lost[0]}, expected it in a part {{"type": "image", …}}'
            )
    texts = [part["text"] for part in content if part["type"] == "text"]
    check_text("".join(texts), where)


def check_image_part(part: dict, where: str, sources: Sequence[str], hints: Sequence[str]) -> None:
    said = [key for key, x in part.items() if key not in ("type", *hints) and x is not None]
    if other := [key for key in said if key not in ("index", *sources)]:
        raise UserError(
            f"{where}: an image part has {shorten(other[0])}, expected an index into images, or "
            "an image"
        )
    if len(said) > 1 or part["type"] == "image_url" and not said:
        raise UserError(
            f"{where}: an image part has {', '.join(said) or 'no image_url'}, expected one of "
            "index and image"
        )


def check_indices(indices: list[tuple[int, Any]], images: int) -> None:
    """`indices`: (message, index) of the image parts that hold no image; none has an index, or each
    has one of the images', and no image is left over.
    """
    if all(index is None for _, index in indices):
        if len(indices) != images:
            places = f"{len(indices)} places for them"
            raise UserError(f"{images} images, but the messages have {places}")
        return
    for i, index in indices:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < images:
            raise UserError(
                f"message {i}: image index {shorten(index)}, expected one of the {images} "
                "images, from 0"
            )
    if missing := set(range(images)) - {index for _, index in indices}:
        raise UserError(f"image {min(missing)} is named by no message")
