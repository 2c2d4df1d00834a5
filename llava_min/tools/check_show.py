"""What `check` shows of single records: the ids that the model is trained on, as text, with what is
supervised marked, and each image as one block. On the terminal, or as a page with the images as the
model sees them.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from llava_min.config import IGNORE
from llava_min.data.dataset import Dataset
from llava_min.data.formats import Record
from llava_min.data.image import ImageConfig, to_pixels
from llava_min.data.processor import Processor
from llava_min.errors import UserError, escape_controls, shorten
from llava_min.report.page import MAX_TEXT, cut, escape, heading, page, settings_list, shown, write

SUPERVISED, BLOCK, PLAIN = "\x1b[1;32m", "\x1b[7m", "\x1b[0m"


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one kind: text, or the placeholders of one image (its number)."""

    text: str
    tokens: int
    supervised: bool
    image: int | None = None


def runs(record: Record, processor: Processor) -> list[Run]:
    """A training row as text, special tokens written out."""
    ids, labels = processor.encode(Dataset([], processor).pieces(record))
    stream = processor.tokenizer.stream(skip_special=False)
    out, images = [], 0

    def add(text: str, supervised: bool) -> None:
        last = out[-1] if out else None
        if last and last.image is None and last.supervised == supervised:
            out[-1] = Run(last.text + text, last.tokens + 1, supervised)
        else:
            out.append(Run(text, 1, supervised))

    i = 0
    while i < len(ids):
        if ids[i] == processor.image_token_id:
            out.append(Run("", processor.tokens_per_image, False, images))
            images += 1
            i += processor.tokens_per_image
        else:
            add(stream.push(ids[i]), labels[i] != IGNORE)
            i += 1
    return out


def image_name(image: object) -> str:
    return shorten(image if isinstance(image, Path) else type(image).__name__.lower() + " image")


# ---- on the terminal


def in_terminal(record: Record, processor: Processor, where: str, colour: bool) -> str:
    """A record as lines; supervised text is green, or stands in ⟦ ⟧ where there is no colour."""
    parts = runs(record, processor)
    tokens = sum(p.tokens for p in parts)
    learned = sum(p.tokens for p in parts if p.supervised)
    begin, end = (SUPERVISED, PLAIN) if colour else ("⟦", "⟧")
    text = ""
    for p in parts:
        if p.image is not None:
            block = f"[image {p.image}: {p.tokens} tokens, {image_name(record.images[p.image])}]"
            text += f"{BLOCK}{block}{PLAIN}" if colour else block
        else:
            # lines stay lines; nothing else of the data may drive the terminal
            lines = "\n".join(map(escape_controls, p.text.split("\n")))
            text += f"{begin}{lines}{end}" if p.supervised else lines
    share = learned / max(tokens, 1)
    head = f"-- {where}: {tokens} tokens, {learned} of them supervised ({share:.1%})"
    return f"{head}\n{text}\n"


# ---- as a page


def as_seen(image: Image.Image, config: ImageConfig) -> str:
    """The pixels that reach the tower, as a PNG data URL."""
    x = to_pixels(image, config).numpy()
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (config.mean, config.std))
    rgb = np.rint((x * std + mean) * 255).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    out = io.BytesIO()
    Image.fromarray(rgb).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def example(record: Record, processor: Processor, where: str, exif: bool) -> Iterator[str]:
    parts = runs(record, processor)
    learned = sum(p.tokens for p in parts if p.supervised)
    yield '<article class="example"><div class="images">'
    try:
        for image in record.open_images(exif):
            yield f'<img alt="" src="{as_seen(image, processor.image_config)}">'
    except UserError as e:
        yield f'<div class="noimage">{escape(shorten(e, 200))}</div>'
    if not record.images:
        yield '<div class="noimage">no image</div>'
    yield f'</div><div class="words"><div class="top"><span class="id">{escape(where)}</span>'
    yield f'<span class="chips"><span class="chip">{sum(p.tokens for p in parts)} tokens</span>'
    yield f'<span class="chip good"><b>{learned}</b> supervised</span></span></div>'
    yield '<div class="earlier">'
    for p in parts:
        if p.image is not None:
            yield f'<span class="chip">image {p.image}: {p.tokens} tokens</span>'
        elif p.supervised:
            yield f'<mark class="missing">{escape(cut(p.text, MAX_TEXT))}</mark>'
        else:
            yield escape(cut(p.text, MAX_TEXT))
    yield "</div></div></article>"


def write_page(
    path: Path,
    title: str,
    settings: dict,
    found: Sequence[str],
    records: Sequence[tuple[Record, str]],
    processor: Processor,
    exif: bool,
) -> None:
    """`path`: what was found, and the records with the images as the model sees them."""
    size = processor.image_config.size
    body = heading("Data", title, [f"{len(records)} records, images as the model sees them"])
    body += settings_list(settings, "Settings")
    body += '<section class="card"><dl class="settings"><div class="wide"><dd>'
    body += "\n".join(escape(shown(line)) for line in found) + "</dd></div></dl></section>"
    body += f"<section><h2>Records, {size} × {size} pixels an image; supervised text is marked</h2>"
    body += "".join(part for r, where in records for part in example(r, processor, where, exif))
    write(path, page(title, body + "</section>", [], "run.js"))
