"""One record: a conversation that ends in an answer, in either of two formats, checked.

Below records.py, which reads the files that records stand in. docs/data.md shows both formats:
    LLaVA     haotian-liu/LLaVA, docs/Finetune_Custom_Data.md
              {"id": "7", "image": "cat.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, …]}
              `image` may be absent or a list; every `<image>` in a human turn is one picture, in an answer it is text.
              As in LLaVA the marks are taken out, the rest is stripped and follows the pictures.
    messages  {"messages": [{"role": "user", "content": [{"type": "text", "text": …}, {"type": "image", "index": 0}]}, …],
               "images": ["cat.jpg"]}
              A content may be a plain string; where no message has an image part, `<image>` in the users' marks them.

A record keeps where its pictures are and opens them when asked: nothing of a picture is in memory before.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from llava_min.cli import UserError, short
from llava_min.data.chat import exchanges
from llava_min.data.parquet import Embedded
from llava_min.checks.image_file import open_image
from llava_min.data.processor import MARK

ROLES = {"human": "user", "gpt": "assistant"}
MAX_TEXT = 1_000_000  # characters in a turn; more is a broken export


class Bad(Exception):
    """What is wrong with one record."""


@dataclass(slots=True)
class Record:
    id: str
    messages: list[dict]  # role/content, a picture being a part {"type": "image"}
    images: list[Path | Embedded | Image.Image] = field(default_factory=list)  # in reading order
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


def earlier(record: "Record") -> str:
    """What was said before the last question, a line each."""
    return "\n".join(f"{message['role']}: {text_of(message)}" for message in record.messages[:-2])


def from_raw(raw: object, number: str, root: Path) -> Record:
    """`number`: its id if it says none. Raises Bad."""
    if not isinstance(raw, dict):
        raise Bad(f"is {kind(raw)}, expected an object with id, image and conversations")
    rest = dict(raw)
    id = rest.pop("id", number)
    if isinstance(id, bool) or not isinstance(id, (str, int)):
        raise Bad(f"id is {kind(id)}, expected text or a whole number")
    check_text(str(id), "id")
    for one, other in (("messages", "conversations"), ("messages", "image"), ("conversations", "images")):
        if raw.get(one) is not None and raw.get(other) is not None:
            raise Bad(f"has {one} and {other}, expected conversations with image, or messages with images")
    if "messages" in raw:
        messages, images = from_messages(rest.pop("messages"), rest.pop("images", None), root)
    else:
        messages, images = from_llava(rest.pop("conversations", None), rest.pop("image", None), root)
    return Record(str(id), messages, images, root, rest)


def unused(raw: dict) -> list[str]:
    """What a good record says that would be expected to change what is learnt, and does not."""
    names = [name for name in ("system", "tools", "weight", "loss") if raw.get(name) is not None]
    for turn in raw.get("conversations") or raw["messages"]:
        names += [name for name, value in turn.items() if name not in ("from", "value", "role", "content") and value is not None]
    return names


# ---- LLaVA's format


def from_llava(turns: object, image: object, root: Path) -> tuple[list[dict], list[Path]]:
    if not isinstance(image, list):
        image = [] if image is None else [image]
    images = [in_folder(p, root, "image") for p in image]
    if not isinstance(turns, list) or not turns:
        raise Bad(f"conversations is {'missing' if turns is None else kind(turns)}, expected a list of turns")
    messages, marks = [], 0
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") not in tuple(ROLES):
            came = f"from is {short(turn.get('from'))}" if isinstance(turn, dict) else f"is {kind(turn)}"
            raise Bad(f"turn {i}: {came}, expected from human or gpt")
        role, text = ROLES[turn["from"]], turn.get("value")
        if not isinstance(text, str):
            raise Bad(f"turn {i}: value is {kind(text)}, expected text")
        check_text(text, f"turn {i}")
        if i == 0 and role == "assistant" and len(turns) > 1:
            continue  # ShareGPT conversations in LLaVA's own mixture begin so, and LLaVA leaves it out
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
    return messages, images


def marked(text: str) -> tuple[str | list[dict], int]:
    """What LLaVA's preprocess_multimodal makes of a message, and how many marks it had."""
    if not (n := text.count(MARK)):
        return text, 0
    text = text.replace(MARK, "").strip()
    return [{"type": "image"}] * n + ([{"type": "text", "text": text}] if text else []), n


# ---- messages


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


def picture(p: object, i: int, root: Path) -> Path | Embedded:
    if isinstance(p, Embedded):
        return p
    if isinstance(p, dict) and p.get("bytes") is None and set(p) <= {"bytes", "path"}:
        p = p.get("path")
    return in_folder(p, root, f"picture {i}")


# ---- what both say


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
    names = {type(None): "null", dict: "an object", list: "a list", str: "text", int: "a number", float: "a number",
             bool: "true or false"}
    return "empty" if x in ("", []) else names.get(type(x), type(x).__name__)


def check_text(text: str, what: str) -> None:
    if len(text) > MAX_TEXT:
        raise Bad(f"{what}: {len(text)} characters, more than {MAX_TEXT}")
    if "\0" in text:
        raise Bad(f"{what}: holds a NUL character")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise Bad(f"{what}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
