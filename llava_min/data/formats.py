"""What dataset files say → records: the door through which JSON, JSONL and parquet all pass.

Between records.py, which reads files, and record.py. A format is known by one key and makes
messages and images of a raw record. FORMATS lists them: another dataset format is one function and
one line there. docs/data.md shows them all:
    messages  {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"},
                                                         {"type": "image", "index": 0}]}, …],
               "images": ["cat.jpg"]}
              A content may be a plain string; where no message has an image part, `<image>` in the
              users' marks them. A part may hold its image itself, as for Qwen2-VL
              ({"type": "image", "image": "cat.jpg"}), and as in OpenAI's API
              ({"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,…"}}).
    LLaVA     haotian-liu/LLaVA, docs/Finetune_Custom_Data.md
              {"id": "7", "image": "cat.jpg",
               "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, …]}
              `image` may be absent or a list, or be called `images`, as in LLaMA-Factory. Every
              `<image>` in a human turn is one image, in an answer it is text. As in LLaVA the marks
              are taken out, the rest is stripped and follows the images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llava_min.data.chat import exchanges
from llava_min.data.data_uri import Encoded, from_data_uri, is_data_uri
from llava_min.data.parquet import Embedded
from llava_min.data.processor import MARK
from llava_min.data.record import Bad, Record, check_text, in_folder, kind, text_of
from llava_min.data.unread import (
    HINTS,
    check_learnt,
    check_media,
    is_learnt,
    marks_as_text,
    media_keys,
    unused,
)
from llava_min.errors import UserError, shorten

Stored = Path | Embedded | Encoded  # an image that is not opened yet
Talk = tuple[list[dict], list[Stored]]  # messages as templates take them; images in reading order

ROLES = {"human": "user", "gpt": "assistant"}
SYSTEM = ("system", "system_prompt")
SOURCES = ("image", "image_url", "path", "url")  # where a part may hold its image


@dataclass(frozen=True)
class Format:
    """One way to write a record."""

    name: str
    keys: tuple[str, ...]  # what it reads; a record is known by the first, the list of its turns
    read: Callable[[dict, Path], Talk]  # (raw record, image folder); raises Bad

    def matches(self, raw: dict) -> bool:
        return raw.get(self.keys[0]) is not None

    def to_record(self, raw: dict, id: str, root: Path) -> Record:
        """Raises Bad."""
        read = (*self.keys, "id", *SYSTEM)
        media = media_keys(raw, read)
        try:
            messages, images = self.read(raw, root)
        except Bad as e:
            unread = f" (it has {shorten(', '.join(media))}, which is not read)" if media else ""
            raise Bad(f"{e}{unread}") from None
        extra = {key: value for key, value in raw.items() if key not in read}
        record = Record(id, with_system(messages, raw), images, root, extra)
        check_media(record, media)
        check_learnt(raw, record)
        return record


def from_raw(raw: object, number: str, root: Path) -> Record:
    """`number`: its id if it says none. Raises Bad."""
    if not isinstance(raw, dict):
        raise Bad(f"is {kind(raw)}, expected an object with id, image and conversations")
    id = raw.get("id", number)
    if isinstance(id, bool) or not isinstance(id, (str, int)):
        raise Bad(f"id is {kind(id)}, expected text or a whole number")
    check_text(str(id), "id")
    return format_of(raw).to_record(raw, str(id), root)


def format_of(raw: dict) -> Format:
    """Raises Bad: it is of no format, or of several."""
    found = [f for f in FORMATS if f.matches(raw)]
    if len(found) > 1:
        raise Bad(f"has {' and '.join(f.keys[0] for f in found)}, expected one of them")
    if not found:
        names = [f.keys[0] for f in FORMATS]
        if null := [name for name in names if name in raw]:
            raise Bad(f"{null[0]} is null, expected a list of turns")
        keys = shorten(", ".join(raw) or "none", 200)
        raise Bad(
            f"{' or '.join(names)} is missing (its keys: {keys}); the formats that are read "
            f"are {' and '.join(f.name for f in FORMATS)}"
        )
    return found[0]


def is_container(raw: object) -> bool:
    """Whether an object that is a whole file is no record, but holds some."""
    if not isinstance(raw, dict) or any(f.keys[0] in raw for f in FORMATS):
        return False
    inside = [x for value in raw.values() for x in (value if isinstance(value, list) else [value])]
    return not raw or any(isinstance(x, dict) for x in inside)


def with_system(messages: list[dict], raw: dict) -> list[dict]:
    """The messages after the system text that stands beside them, if one does."""
    said = {name: raw[name] for name in SYSTEM if raw.get(name) not in (None, "")}
    for name, text in said.items():
        if not isinstance(text, str):
            raise Bad(f"{name} is {kind(text)}, expected text")
        check_text(text, name)
    own = {"a system message": text_of(messages[0])} if messages[0]["role"] == "system" else {}
    if len(texts := {*said.values(), *own.values()}) > 1:
        raise Bad(f"has several system texts ({', '.join(said | own)}), expected one")
    return messages if own or not texts else [{"role": "system", "content": texts.pop()}, *messages]


def told_of(raw: dict, record: Record) -> tuple[list[str], list[str]]:
    """Of a good record: the fields that are not used, and the marks that are text."""
    return unused(raw, (*format_of(raw).keys, *SYSTEM), record), marks_as_text(record)


# ---- LLaVA's format


def from_llava(raw: dict, root: Path) -> Talk:
    turns, image, images = raw["conversations"], raw.get("image"), listed(raw.get("images"))
    image = image if isinstance(image, list) else [] if image is None else [image]
    if image and images and image != images:
        raise Bad("has image and images, expected one of them")
    found = [stored(p, "image", root) for p in image] or stored_all(images, root)
    if not isinstance(turns, list) or not turns:
        raise Bad(f"conversations is {kind(turns)}, expected a list of turns")
    messages, marks = [], 0
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") not in tuple(ROLES):
            known = isinstance(turn, dict)
            came = f"from is {shorten(turn.get('from'))}" if known else f"is {kind(turn)}"
            raise Bad(f"turn {i}: {came}, expected from human or gpt")
        role, text = ROLES[turn["from"]], turn.get("value")
        if not isinstance(text, str):
            raise Bad(f"turn {i}: value is {kind(text)}, expected text")
        check_text(text, f"turn {i}")
        if i == 0 and role == "assistant" and len(turns) > 1:
            continue  # ShareGPT conversations in LLaVA's own mixture begin so; LLaVA leaves it out
        if role != ("assistant" if len(messages) % 2 else "user"):
            raise Bad(
                f"turn {i}: another {turn['from']} turn, but human and gpt must alternate, "
                "human first"
            )
        if not text.strip():
            raise Bad(f"turn {i}: the {'answer' if role == 'assistant' else 'question'} is empty")
        content, n = marked(text) if role == "user" else (text, 0)
        marks += n
        messages.append(message(role, content, turn, f"turn {i}"))
    if len(messages) % 2:
        raise Bad(
            "ends with a human turn, but there must be an answer to learn from or to compare with"
        )
    if marks != len(found):
        raise Bad(f"{len(found)} pictures, but the human turns mark {marks} with {MARK}")
    return messages, found


def marked(text: str) -> tuple[str | list[dict], int]:
    """What LLaVA's preprocess_multimodal makes of a message, and how many marks it had."""
    if not (n := text.count(MARK)):
        return text, 0
    text = text.replace(MARK, "").strip()
    return [{"type": "image"}] * n + ([{"type": "text", "text": text}] if text else []), n


# ---- messages


def from_messages(raw: dict, root: Path) -> Talk:
    turns = raw["messages"]
    if raw.get("image") is not None:
        raise Bad("has messages and image, expected messages with images, a list")
    if not isinstance(turns, list) or not turns:
        raise Bad(f"messages is {kind(turns)}, expected a list of messages")
    found = stored_all(listed(raw.get("images")), root)

    messages, named = [], []  # named: (message, index or image) of each image part, in their order
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise Bad(f"message {i} is {kind(turn)}, expected an object with role and content")
        content = turn.get("content")
        if isinstance(content, list):
            content, which = split_parts(content, f"message {i}", root)
            named += [(i, x) for x in which]
        elif not isinstance(content, str):
            raise Bad(f"message {i}: content is {kind(content)}, expected text or a list of parts")
        messages.append(message(turn.get("role"), content, turn, f"message {i}"))
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
    return messages, in_order(found, named)


def split_parts(
    parts: list, where: str, root: Path
) -> tuple[list[dict], list[Stored | int | None]]:
    """The parts of a message as the templates take them, and of each image part its index, or the
    image it holds."""
    texts, which = [], []
    for part in parts:
        name = part.get("type") if isinstance(part, dict) else None
        if name in ("image", "image_url"):
            which.append(image_of(part, where, root))
        elif name == "text" and isinstance(part.get("text"), str):
            texts.append({"type": "text", "text": part["text"]})
        else:
            raise Bad(
                f'{where}: unknown part {shorten(part)}, expected {{"type": "text", "text": "…"}} '
                'or {"type": "image", "index": 0}'
            )
    return [{"type": "image"} for _ in which] + texts, which


def image_of(part: dict, where: str, root: Path) -> Stored | int | None:
    said = {k: v for k, v in part.items() if k not in ("type", *HINTS) and v is not None}
    if other := [key for key in said if key not in ("index", *SOURCES)]:
        raise Bad(
            f"{where}: an image part has {shorten(other[0])}, expected an index into images, or "
            "an image"
        )
    if len(said) > 1 or part["type"] == "image_url" and not said:
        raise Bad(
            f"{where}: an image part has {', '.join(said) or 'no image_url'}, expected one of "
            "index and image"
        )
    if said.keys() <= {"index"}:
        return said.get("index")
    (source,) = said.values()
    # OpenAI's image_url; some leave the object out
    if isinstance(source, dict) and "url" in source:
        source = source["url"]
    return stored(source, f"{where}: image", root)


def in_order(images: list[Stored], named: list[tuple[int, Stored | int | None]]) -> list[Stored]:
    """The images in reading order. `named`: (message, index or image) of each image part, an index
    being None where the images simply follow one another."""
    indices = [(i, x) for i, x in named if not isinstance(x, Stored)]
    if all(index is None for _, index in indices):
        if len(indices) != len(images):
            raise Bad(
                f"{len(images)} pictures, but the messages have {len(indices)} places for them"
            )
        rest = iter(images)
        return [x if isinstance(x, Stored) else next(rest) for _, x in named]
    for i, index in indices:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(images):
            raise Bad(
                f"message {i}: image index {shorten(index)}, expected one of the {len(images)} "
                "pictures, from 0"
            )
    if missing := set(range(len(images))) - {index for _, index in indices}:
        raise Bad(f"picture {min(missing)} is named by no message")
    return [x if isinstance(x, Stored) else images[x] for _, x in named]


# ---- what both read


def message(role: object, content: str | list[dict], turn: dict, where: str) -> dict:
    learnt = role != "assistant" or is_learnt(turn, where)
    return {"role": role, "content": content} | ({} if learnt else {"loss": False})


def listed(images: object) -> list:
    if not isinstance(images, (list, type(None))):
        raise Bad(f"images is {kind(images)}, expected a list of pictures")
    return images or []


def stored_all(images: list, root: Path) -> list[Stored]:
    return [stored(p, f"picture {i}", root, True) for i, p in enumerate(images)]


def stored(p: object, what: str, root: Path, as_object: bool = False) -> Stored:
    """An image by its path, or inside the record. as_object: {"path": …} is one, too, as `datasets`
    writes it."""
    if isinstance(p, Embedded):
        return p
    if as_object and isinstance(p, dict) and p.get("bytes") is None and set(p) <= {"bytes", "path"}:
        p = p.get("path")
    if is_data_uri(p):
        try:
            return from_data_uri(p, what)
        except UserError as e:
            raise Bad(str(e)) from None
    return in_folder(p.removeprefix("file://") if isinstance(p, str) else p, root, what)


FORMATS = (
    Format("messages", ("messages", "images"), from_messages),
    Format("LLaVA's conversations", ("conversations", "image", "images"), from_llava),
)
