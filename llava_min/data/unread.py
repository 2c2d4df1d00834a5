"""What a raw record says that does not reach the model: told, or a reason to refuse the record.

Beside formats.py, which asks here. Three things: media under a key or a mark that is not read,
answers that are marked as not to be learnt, and fields that mean something elsewhere.
"""

import re
from functools import lru_cache

from llava_min.data.record import Bad, Record, kind, text_of
from llava_min.errors import shorten

MEDIA = "image|img|picture|pic|photo|frame|media|video|film|clip|audio|sound|speech"
PLACES = "path|file|name|url|uri|list|data|bytes|base64|b64|local|input"
NAME = re.compile(rf"(?:({MEDIA})s?|(?:{PLACES})s?|[\W\d_])+", re.I)
ENDINGS = "jpe?g|png|webp|gif|bmp|tiff?|mp4|avi|mov|mkv|webm|wav|mp3|flac|ogg|m4a"
FILE = re.compile(rf"data:(image|video|audio)/|.{{1,1000}}\.({ENDINGS})$", re.I)
# ms-swift and XTuner; LLaMA-Factory's and TRL's preference data; OpenAI; Axolotl; ms-swift
MARKERS = ("loss", "label", "weight", "train", "loss_scale")
FIELDS = ("tools", "weight", "loss", "loss_scale")  # of a record
# of an image part: sizes, which the vision tower fixes
HINTS = ("detail", "min_pixels", "max_pixels", "resized_height", "resized_width")
TURN = ("from", "value", "role", "content")
MARK = "<(image|video|audio)>"


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


def media_keys(raw: dict, read: tuple[str, ...]) -> list[str]:
    """The keys of a record and of its turns that name media, but those that are `read`."""
    said = [(key, value) for key, value in raw.items() if key not in read]
    for turn in turns_of(raw, read):
        if len(turn) > 2:  # than who speaks and what
            said += [(key, value) for key, value in turn.items() if key not in TURN]
    return [key for key, value in said if is_media(key, value)]


def placeholder(question: str) -> str | None:
    """The kind of media that a mark in a question stands for, where LLaVA, LLaMA-Factory and
    ms-swift put them: at its beginning, or at its end behind a line or a sentence. Elsewhere
    (`the <video> tag`) it is text."""
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


def check_media(record: Record, media: list[str]) -> None:
    """A question about what the model would not see teaches it to guess. Raises Bad."""
    if media and not record.images:
        raise Bad(
            f"has {shorten(', '.join(dict.fromkeys(media)), 200)}, which is not read, and no "
            "image; expected images under image or images, or in the messages"
        )
    for i, message in enumerate(record.messages):
        mark = placeholder(text_of(message)) if message["role"] == "user" else None
        if mark and (mark != "image" or not record.images):
            what = "a video" if mark == "video" else f"an {mark}"
            raise Bad(f"message {i}: its <{mark}> stands for {what}, and none is read")


# ---- answers that are not to be learnt


def is_learnt(turn: dict, where: str) -> bool:
    """Whether none of its MARKERS says no. Raises Bad."""
    said = [name for name in MARKERS if name in turn]
    for name in said:
        value = turn[name]
        number = isinstance(value, (bool, int, float))
        if value is not None and not (number and value >= 0):
            came = shorten(value) if number else kind(value)
            raise Bad(f"{where}: {name} is {came}, expected true or false, 1 or 0")
    return all(turn[name] != 0 for name in said)


def check_learnt(raw: dict, record: Record) -> None:
    """Raises Bad: no answer of a record is to be learnt. (Its `label` may also be a class, 0.)"""
    for name in (*MARKERS, "kto_tag"):
        value = raw.get(name)
        if value is False or name in FIELDS and isinstance(value, (int, float)) and value <= 0:
            raise Bad(f"{name} is {str(value).lower()}: its answers are marked as not to be learnt")
    if all(m.get("loss") is False for m in record.messages if m["role"] == "assistant"):
        raise Bad("every answer is marked as not to be learnt")


# ---- what is told of a good record


def unused(raw: dict, read: tuple[str, ...], record: Record) -> list[str]:
    """The fields that would be expected to change what the model sees or learns, and do not."""
    names = [name for name in FIELDS if raw.get(name) not in (None, 1, "", [])]
    names += media_keys(raw, read)
    if not record.images:
        names += [key for key in raw if key not in (*read, "id") and looks_like_a_file(raw[key])]
    for turn in turns_of(raw, read):
        answer = turn.get("from", turn.get("role")) in ("gpt", "assistant")
        for name, value in turn.items() if len(turn) > 2 else ():
            if name in MARKERS:
                names += [name] * (value not in ((None, 0, 1) if answer else (None, 0)))
            elif name not in TURN and value is not None and not is_media(name, value):
                names.append(name)
        content = turn.get("content")
        for part in content if isinstance(content, list) else ():
            names += [name for name in HINTS if part.get(name)] if isinstance(part, dict) else []
    return names


def marks_as_text(record: Record) -> list[str]:
    """The marks that stay text in the questions of a good record."""
    questions = (text_of(m) for m in record.messages if m["role"] == "user")
    return [found[0] for q in questions if "<" in q for found in re.finditer(MARK, q)]
