"""Raw records -> `Record`s: one door for every dataset format, whether it came as JSON or parquet.

records.py reads the files; what a record must not say is in checks/. A format is known by one key,
and FORMATS lists them all: another format is one function and one line. docs/data.md has more
examples.
    messages  {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is it?"},
                                                         {"type": "image", "index": 0}]}, …],
               "images": ["cat.jpg"]}
              A content may be a string; if no message has an image part, each `<image>` in the
              users' strings is one. A part may hold its image, as for Qwen2-VL
              ({"type": "image", "image": "cat.jpg"}), and as in OpenAI's API
              ({"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,…"}}).
    LLaVA     haotian-liu/LLaVA, docs/Finetune_Custom_Data.md
              {"id": "7", "image": "cat.jpg",
               "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, …]}
              `image` may be absent or a list, or be called `images`, as in LLaMA-Factory. Each
              `<image>` in a human turn is an image; in an answer it is text. As in LLaVA the marks
              are removed, and the stripped text follows the images.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from llava_min.checks.chat import check_conversation
from llava_min.checks.formats import (
    check_format,
    check_image_list,
    check_indices,
    check_marks,
    check_message,
    check_message_list,
    check_one_key,
    check_path,
    check_record,
    check_system,
    check_turns,
)
from llava_min.checks.image_file import open_image
from llava_min.checks.unread import (
    HINTS,
    MARKERS,
    SOURCES,
    check_markers,
    check_media,
    check_supervised,
    marks_as_text,
    media_keys,
    unused_fields,
)
from llava_min.data.chat import count_images, marks_to_parts, text_of
from llava_min.data.data_uri import Encoded, from_data_uri, is_data_uri
from llava_min.data.parquet import Embedded
from llava_min.errors import UserError, shorten

Stored = Path | Embedded | Encoded  # an image that is not opened yet
Talk = tuple[list[dict], list[Stored]]  # messages as templates take them; images in reading order

ROLES = {"human": "user", "gpt": "assistant"}
SYSTEM = ("system", "system_prompt")


@dataclass(slots=True)
class Record:
    """One conversation that ends in an answer, and where its images are."""

    id: str
    # role/content; an image is a part {"type": "image"}; "loss": False if an answer is not learned
    messages: list[dict]
    images: list[Stored | Image.Image] = field(default_factory=list)  # in reading order
    root: Path | None = None  # the folder that no image path may leave
    extra: dict = field(default_factory=dict)  # all other fields

    @property
    def length(self) -> int:
        """About how many tokens, to sort by: the words, and 256 for each image."""
        return sum(len(text_of(m).split()) for m in self.messages) + 256 * len(self.images)

    def open_images(self, exif: bool = False) -> list[Image.Image]:
        try:
            return [self._open(image, exif) for image in self.images]
        except UserError as e:
            raise UserError(f"record {shorten(self.id)}: {e}") from None

    def _open(self, image: Stored | Image.Image, exif: bool) -> Image.Image:
        if isinstance(image, Path):
            return open_image(image, root=self.root, exif=exif)
        return image if isinstance(image, Image.Image) else image.open(exif)

    def history(self) -> str:
        """All messages before the last question, one a line."""
        return "\n".join(f"{m['role']}: {text_of(m)}" for m in self.messages[:-2])


@dataclass(frozen=True)
class Format:
    """One way to write a record."""

    name: str
    keys: tuple[str, ...]  # what it reads; the first, the list of turns, is how it is known
    read: Callable[[dict, Path], Talk]  # (raw record, image folder); raises UserError

    def matches(self, raw: dict) -> bool:
        return raw.get(self.keys[0]) is not None

    def to_record(self, raw: dict, id: str, root: Path) -> Record:
        read = (*self.keys, "id", *SYSTEM)
        media = media_keys(raw, read)
        try:
            messages, images = self.read(raw, root)
        except UserError as e:
            unread = f" (it has {shorten(', '.join(media))}, which is not read)" if media else ""
            raise UserError(f"{e}{unread}") from None
        extra = {key: value for key, value in raw.items() if key not in read}
        record = Record(id, with_system(messages, raw), images, root, extra)
        check_media(media, questions_of(record), bool(images))
        check_supervised(raw, messages)
        return record


def from_raw(raw: object, number: str, root: Path) -> Record:
    """A record of any format. `number`: its id if it has none. Raises UserError."""
    id = raw.get("id", number) if isinstance(raw, dict) else number
    check_record(raw, id)
    return format_of(raw).to_record(raw, str(id), root)


def format_of(raw: dict) -> Format:
    found = [f for f in FORMATS if f.matches(raw)]
    check_format(found, FORMATS, raw)
    return found[0]


def is_container(raw: object) -> bool:
    """Whether an object that is a whole file is no record, but holds some."""
    if not isinstance(raw, dict) or any(f.keys[0] in raw for f in FORMATS):
        return False
    inside = [x for value in raw.values() for x in (value if isinstance(value, list) else [value])]
    return not raw or any(isinstance(x, dict) for x in inside)


def with_system(messages: list[dict], raw: dict) -> list[dict]:
    """The messages, after the system text beside them if there is one."""
    texts = {name: raw[name] for name in SYSTEM if raw.get(name) not in (None, "")}
    has_own = messages[0]["role"] == "system"
    check_system(texts | ({"a system message": text_of(messages[0])} if has_own else {}))
    if has_own or not texts:
        return messages
    return [{"role": "system", "content": next(iter(texts.values()))}, *messages]


def questions_of(record: Record) -> dict[int, str]:
    return {i: text_of(m) for i, m in enumerate(record.messages) if m["role"] == "user"}


def ignored(raw: dict, record: Record) -> tuple[list[str], list[str], list[str]]:
    """What a good record says and the model does not see: a first answer, the fields that are not
    used, the marks that are text.
    """
    first = (raw.get("conversations") or [{}])[0].get("from")
    fields = unused_fields(raw, (*format_of(raw).keys, *SYSTEM), bool(record.images))
    return ["gpt"] * (first == "gpt"), fields, marks_as_text(questions_of(record))


# ---- LLaVA's format


def from_llava(raw: dict, root: Path) -> Talk:
    turns, image, images = raw["conversations"], raw.get("image"), raw.get("images")
    check_image_list(images)
    image = image if isinstance(image, list) else [] if image is None else [image]
    check_one_key(image, images or [])
    found = [stored(p, "image", root) for p in image] or stored_all(images, root)
    check_turns(turns)
    # ShareGPT conversations in LLaVA's own mixture begin with an answer; LLaVA leaves it out
    first = int(turns[0]["from"] == "gpt")
    messages = [
        message(ROLES[turn["from"]], turn["value"], turn, f"turn {i}")
        for i, turn in enumerate(turns[first:], first)
    ]
    messages = marks_to_parts(messages)
    check_marks(count_images(messages), len(found))
    return messages, found


# ---- messages


def from_messages(raw: dict, root: Path) -> Talk:
    check_message_list(raw)
    check_image_list(raw.get("images"))
    found = stored_all(raw.get("images"), root)

    messages, named = [], []  # named: (message, index or image) of each image part, in their order
    for i, turn in enumerate(raw["messages"]):
        check_message(turn, f"message {i}", SOURCES, HINTS)
        content = turn["content"]
        if isinstance(content, list):
            images = [part for part in content if part["type"] != "text"]
            named += [(i, image_of(part, f"message {i}", root)) for part in images]
            # templates put the images first
            texts = [{"type": "text", "text": p["text"]} for p in content if p["type"] == "text"]
            content = [{"type": "image"}] * len(images) + texts
        messages.append(message(turn.get("role"), content, turn, f"message {i}"))
    if found and not named:
        messages = marks_to_parts(messages)
        named = [(i, None) for i, m in enumerate(messages) for _ in range(count_images([m]))]
    check_conversation(messages, answer=True)
    return messages, in_order(found, named)


def image_of(part: dict, where: str, root: Path) -> Stored | int | None:
    """The image that a part holds, or its index."""
    source = next((part[key] for key in SOURCES if part.get(key) is not None), None)
    if source is None:
        return part.get("index")
    # OpenAI's image_url; some leave the object out
    if isinstance(source, dict) and "url" in source:
        source = source["url"]
    return stored(source, f"{where}: image", root)


def in_order(images: list[Stored], named: list[tuple[int, Stored | int | None]]) -> list[Stored]:
    """The images in reading order. `named`: (message, index or image) of each image part; without
    indices, `images` follow one another.
    """
    check_indices([(i, x) for i, x in named if not isinstance(x, Stored)], len(images))
    rest = iter(images)
    take = lambda index: next(rest) if index is None else images[index]
    return [x if isinstance(x, Stored) else take(x) for _, x in named]


# ---- what both read


def message(role: object, content: str | list[dict], turn: dict, where: str) -> dict:
    """`"loss": False` marks an answer that one of MARKERS says not to learn."""
    out = {"role": role, "content": content}
    if role == "assistant":
        check_markers(turn, where)
        if any(turn.get(name) == 0 for name in MARKERS):
            out["loss"] = False
    return out


def stored_all(images: list | None, root: Path) -> list[Stored]:
    return [stored(p, f"image {i}", root, True) for i, p in enumerate(images or [])]


def stored(p: object, what: str, root: Path, as_object: bool = False) -> Stored:
    """An image by its path, or inside the record. as_object: it may be {"path": …}, as `datasets`
    writes it.
    """
    if isinstance(p, Embedded):
        return p
    if as_object and isinstance(p, dict) and p.get("bytes") is None and set(p) <= {"bytes", "path"}:
        p = p.get("path")
    if is_data_uri(p):
        return from_data_uri(p, what)
    p = p.removeprefix("file://") if isinstance(p, str) else p
    check_path(p, root, what)
    return root / p


FORMATS = (
    Format("messages", ("messages", "images"), from_messages),
    Format("LLaVA's conversations", ("conversations", "image", "images"), from_llava),
)
