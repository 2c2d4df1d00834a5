"""What a raw record says that does not reach the model: a reason to refuse it, or a warning.

For data/formats.py. Three things: images, video and sound under a key or a mark that is not read;
answers that are marked as not to be learned; fields that mean something in other programs.
"""

import re
from collections.abc import Iterator
from functools import lru_cache

from llava_min.checks.formats import kind
from llava_min.errors import UserError, shorten

MEDIA = "image|img|picture|pic|photo|frame|media|video|film|clip|audio|sound|speech"
PLACES = "path|file|name|url|uri|list|data|bytes|base64|b64|local|input"
NAME = re.compile(rf"(?:({MEDIA})s?|(?:{PLACES})s?|[\W\d_])+", re.I)
ENDINGS = "jpe?g|png|webp|gif|bmp|tiff?|mp4|avi|mov|mkv|webm|wav|mp3|flac|ogg|m4a"
FILE = re.compile(rf"data:(image|video|audio)/|.{{1,1000}}\.({ENDINGS})$", re.I)
# of a turn: whether its answer is learned, in ms-swift and XTuner; preference data of LLaMA-Factory
# and TRL; OpenAI; Axolotl; ms-swift
MARKERS = ("loss", "label", "weight", "train", "loss_scale")
FIELDS = ("tools", "weight", "loss", "loss_scale", "train")  # of a record
YES_OR_NO = ("true", "false", "1", "0")
# of a record: system text, turns and answers of Alpaca, ms-swift, DPO; without their _ and -
TEXTS = "systemprompt systemmessage instruction history chosen rejected rejectedresponse".split()
# where an image part may hold its image
SOURCES = ("image", "image_url", "path", "url")
# of an image part: sizes, which the vision tower fixes
HINTS = ("detail", "min_pixels", "max_pixels", "resized_height", "resized_width")
TURN = ("from", "value", "role", "content")
PART = ("type", "text", "index", *SOURCES)
NOTHING = (None, "", "auto", [], {})  # auto: OpenAI's `detail` where nothing is asked for
MARK = "<(image|video|audio)>"
# and as others write it: <Video>, <video/>, <ImageHere>, Phi-3 <|image_1|>, Qwen2-VL <|image_pad|>
MARKS = re.compile(
    r"<(\|?)(image|video|audio)(?:[_ ]?(?:pad|token|here|placeholder|patch))?(?:[_ ]?\d{1,3})?"
    r" ?/?\1>",
    re.I,
)


# ---- media


@lru_cache(maxsize=1024)
def names_media(key: str) -> bool:
    """`imgs`, `image_path`, `videoUrl`; not `image_id`, `num_images`, `video_length`."""
    found = NAME.fullmatch(key)
    return bool(found and found[1])


def is_media(key: str, value: object) -> bool:
    something = not isinstance(value, (int, float)) and value not in (None, "", [], {}, b"")
    return something and names_media(key)


def looks_like_a_file(value: object) -> bool:
    value = value[0] if isinstance(value, list) and value else value
    value = value.get("path") or value.get("bytes") if isinstance(value, dict) else value
    return isinstance(value, bytes) or isinstance(value, str) and bool(FILE.match(value[:1010]))


def turns_of(raw: dict, read: tuple[str, ...]) -> list[dict]:
    turns = raw.get(read[0])
    return [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []


def parts_of(turn: dict) -> list[dict]:
    content = turn.get("content")
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def said_in(raw: dict, read: tuple[str, ...], depth: int) -> Iterator[tuple[str, str, object]]:
    """(name, key, value) of what `raw` says under keys not among `read`, and of the objects inside
    down to `depth` levels, whose keys are named `metadata.image`.
    """
    for key, value in raw.items():
        if key in read:
            continue
        yield key, key, value
        if depth and isinstance(value, (dict, list)) and not is_media(key, value):
            for inner in value if isinstance(value, list) else [value]:
                if isinstance(inner, dict):
                    for name, last, x in said_in(inner, (), depth - 1):
                        yield f"{key}.{name}", last, x


def media_keys(raw: dict, read: tuple[str, ...]) -> list[str]:
    """The keys of a record, its turns and their parts that name media and are not among `read`."""
    said = [*said_in(raw, read, 2)]
    for turn in turns_of(raw, read):
        if len(turn) > 2:  # more than who speaks and what
            said += said_in(turn, TURN, 1)
        for part in parts_of(turn):
            said += said_in(part, PART, 1)
    return [name for name, key, value in said if is_media(key, value)]


def placeholder(question: str) -> str | None:
    """The kind of media that a mark in a question stands for.

    LLaVA, LLaMA-Factory and ms-swift put it at the beginning, or at the end after a line or a
    sentence; elsewhere (`the <video> tag`) it is text.
    """
    if "<" not in question:
        return None
    question = question.strip()
    if (found := re.match(MARK, question)) and f"</{found[1]}>" not in question:
        return found[1]
    if found := re.search(MARK + r"\Z", question[-8:]):
        before = question[: -len(found[0])]
        words = before.rstrip()
        return None if words[-1:].isalnum() and "\n" not in before[len(words) :] else found[1]
    return None


def check_media(media: list[str], questions: dict[int, str], has_image: bool) -> None:
    """A question about what the model does not see would teach it to guess.

    media: keys that name media and are not read. questions: the text of each user message, by the
    message's index. has_image: whether some image is read.
    """
    if media and not has_image:
        raise UserError(
            f"has {shorten(', '.join(dict.fromkeys(media)), 200)}, which is not read, and no "
            "image; expected images under image or images, or in the messages"
        )
    for i, question in questions.items():
        mark = placeholder(question)
        if mark and (mark != "image" or not has_image):
            what = "a video" if mark == "video" else f"an {mark}"
            raise UserError(f"message {i}: its <{mark}> stands for {what}, and none is read")


# ---- answers that are not to be learned


def check_markers(turn: dict, where: str) -> None:
    """The markers of an answer are booleans or numbers of at least 0."""
    for name in MARKERS:
        value = turn.get(name)
        is_number = isinstance(value, (bool, int, float))
        if value is not None and not (is_number and value >= 0):
            came = shorten(value) if is_number else kind(value)
            raise UserError(f"{where}: {name} is {came}, expected true or false, 1 or 0")


def check_supervised(raw: dict, messages: list[dict]) -> None:
    """Some answer is to be learned. (The `label` of a record may also be a class, 0 or "cat".)"""
    for name in (*MARKERS, "kto_tag"):
        value, is_class = raw.get(name), name == "label"
        if isinstance(value, str) and value.strip().lower() in YES_OR_NO[: 2 if is_class else 4]:
            said = f"{name} is text ({shorten(value)})"
            raise UserError(f"{said}, expected true or false, 1 or 0, without quotes")
        if value is False or not is_class and isinstance(value, (int, float)) and value <= 0:
            said = f"{name} is {str(value).lower()}"
            raise UserError(f"{said}: its answers are marked as not to be learned")
    if all(m.get("loss") is False for m in messages if m["role"] == "assistant"):
        raise UserError("every answer is marked as not to be learned")


# ---- warnings


def is_unread_text(key: str, value: object) -> bool:
    """`systemPrompt` with a text in it, `history` with turns; not `chosen` with a number."""
    plain = key.lower().replace("_", "").replace("-", "")
    return plain in TEXTS and isinstance(value, (str, list, dict)) and bool(value)


def unused_fields(raw: dict, read: tuple[str, ...], has_image: bool) -> list[str]:
    """The fields that one would expect to change what the model sees or learns."""
    names = [name for name in FIELDS if raw.get(name) not in (None, 1, "", [])]
    names += media_keys(raw, read)
    names += [key for key in raw if key not in read and is_unread_text(key, raw[key])]
    if not has_image:
        said = said_in(raw, (*read, "id"), 2)
        names += [name for name, key, x in said if looks_like_a_file(x) and not is_media(key, x)]
    for turn in turns_of(raw, read):
        answer = turn.get("from", turn.get("role")) in ("gpt", "assistant")
        for name, value in turn.items() if len(turn) > 2 else ():
            if name in MARKERS:
                names += [name] * (value not in ((None, 0, 1) if answer else (None, 0)))
            elif name not in TURN and value is not None and not is_media(name, value):
                names.append(name)
        for part in parts_of(turn):
            names += unused_of_part(part)
    return names


def unused_of_part(part: dict) -> list[str]:
    """What a part says beside its text or image: `detail` stands in it, or as in OpenAI's API
    beside the `url`.
    """
    said = [(key, value) for key, value in part.items() if key not in PART]
    for source in map(part.get, SOURCES):
        if isinstance(source, dict):
            said += [(key, value) for key, value in source.items() if key != "url"]
    return [key for key, value in said if value not in NOTHING and not is_media(key, value)]


def marks_as_text(questions: dict[int, str]) -> list[str]:
    """The marks that stay text in the questions of a good record."""
    return [found[0] for q in questions.values() for found in MARKS.finditer(q)]
