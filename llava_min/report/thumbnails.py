"""Images as thumbnails inside the page: small JPEGs as data URLs, within a budget of bytes."""

import base64
import contextlib
import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from llava_min.checks.image_file import open_image
from llava_min.data.image import to_rgb
from llava_min.errors import UserError

# bytes of all thumbnails as base64; beyond it they shrink, then are left out, and the page says so
MAX_BYTES = 24 * 2**20
SIDES = (192, 144, 96, 64)  # pixels of a thumbnail's longer side
MIN_SHARE = 1500  # bytes; a thumbnail of fewer would show nothing


class Thumbnails:
    """Images as JPEG data URLs that together stay within `budget` bytes.

    `place(image)` is its index in `urls`, or None where it could not be opened (counted in
    `broken`) or the budget is spent (`left_out`).
    """

    def __init__(self, images: Iterable, budget: int = MAX_BYTES):
        self.urls: list[str] = []
        self.index: dict[object, int | None] = {}
        self.broken = self.left_out = self.shrunk = 0
        places: dict[bytes, int] = {}
        by_key = {key(image): image for image in images}
        # silent: the run has warned about these files already
        with ThreadPoolExecutor() as pool, contextlib.redirect_stderr(io.StringIO()):
            jpegs = pool.map(thumbnail, by_key.values())
            for i, (k, full) in enumerate(zip(by_key, jpegs, strict=True)):
                # an equal share of what is left, so small images leave more to the others
                share = max(MIN_SHARE, budget // (len(by_key) - i)) * 3 // 4
                data, self.index[k] = full, None
                for side in SIDES[1:]:
                    if data and len(data) > share:
                        data = jpeg(Image.open(io.BytesIO(full)), side)
                if not data or len(data) > share or len(data) * 4 / 3 + 32 > budget:
                    self.broken += not data
                    self.left_out += bool(data)
                    continue
                self.shrunk += data is not full
                if data not in places:  # else it is a copy under another name
                    places[data] = len(self.urls)
                    self.urls.append("data:image/jpeg;base64," + base64.b64encode(data).decode())
                    budget -= len(self.urls[-1]) + 3
                self.index[k] = places[data]

    def place(self, image: object) -> int | None:
        return self.index.get(key(image))

    def notes(self) -> list[str]:
        small = f"{{:,}} images are smaller than {SIDES[0]} pixels, to keep this file small."
        lines = (
            (self.shrunk, small),
            (self.left_out, "{:,} images are left out, to keep this file small."),
            (self.broken, "{:,} images could not be opened."),
        )
        return [text.format(n) for n, text in lines if n]


def key(image: object) -> object:
    """What identifies an image: its path, its place in a parquet file, or the PIL image itself."""
    return id(image) if isinstance(image, Image.Image) else image


def thumbnail(image: object) -> bytes | None:
    """The image as a JPEG of at most SIDES[0] pixels, or None if it cannot be opened."""
    try:
        if isinstance(image, (str, Path)):
            image = open_image(image)
        elif not isinstance(image, Image.Image):
            image = image.open(False)
        return jpeg(to_rgb(image, "image"), SIDES[0])
    except UserError:
        return None


def jpeg(im: Image.Image, side: int) -> bytes:
    scale = min(1, side / max(im.size))
    size = max(1, round(im.width * scale)), max(1, round(im.height * scale))
    if size != im.size:
        im = im.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    out = io.BytesIO()
    im.save(out, "JPEG", quality=76, optimize=True)
    return out.getvalue()
