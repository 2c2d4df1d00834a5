"""Pictures as thumbnails that travel in the page: JPEGs made here, as data URLs, small enough that
all have room.
"""

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

# bytes of all thumbnails as base64; beyond it they shrink and then stop, and the page says so
PICTURES = 24 * 2**20
SIDES = (192, 144, 96, 64)  # pixels of a thumbnail's longer side
SMALLEST = 1500  # bytes; a thumbnail of a share below it would be a smudge


class Thumbnails:
    """Pictures → JPEG data URLs that together stay within `budget` bytes. `place` of a picture is
    where in `urls` it is, or None where it could not be opened (`broken`) or had no room left
    (`left_out`).
    """

    def __init__(self, pictures: Iterable, budget: int = PICTURES):
        self.urls: list[str] = []
        self.index: dict[object, int | None] = {}
        self.broken = self.left_out = self.shrunk = 0
        places: dict[bytes, int] = {}
        keys = {key(p): p for p in pictures}
        # the run has warned already
        with ThreadPoolExecutor() as pool, contextlib.redirect_stderr(io.StringIO()):
            for i, (k, data) in enumerate(
                zip(keys, pool.map(thumbnail, keys.values()), strict=True)
            ):
                # what one leaves, the others may use
                share = max(SMALLEST, budget // (len(keys) - i)) * 3 // 4
                full, self.index[k] = data, None
                for side in SIDES[1:]:
                    if data and len(data) > share:
                        data = jpeg(Image.open(io.BytesIO(full)), side)
                if not data or len(data) > share or len(data) * 4 / 3 + 32 > budget:
                    self.broken += not data
                    self.left_out += bool(data)
                    continue
                self.shrunk += data is not full
                if data not in places:  # the same picture under another name
                    places[data] = len(self.urls)
                    self.urls.append("data:image/jpeg;base64," + base64.b64encode(data).decode())
                    budget -= len(self.urls[-1]) + 3
                self.index[k] = places[data]

    def place(self, picture: object) -> int | None:
        return self.index.get(key(picture))

    def notes(self) -> list[str]:
        return [
            text.format(n)
            for n, text in (
                (
                    self.shrunk,
                    f"{{:,}} pictures are smaller than {SIDES[0]} pixels, to keep this file small.",
                ),
                (self.left_out, "{:,} pictures are left out, to keep this file small."),
                (self.broken, "{:,} pictures could not be opened."),
            )
            if n
        ]


def key(picture: object) -> object:
    """What names a picture: its path, its place in a parquet file, or the decoded image itself."""
    return id(picture) if isinstance(picture, Image.Image) else picture


def thumbnail(picture: object) -> bytes | None:
    try:
        if isinstance(picture, (str, Path)):
            picture = open_image(picture)
        elif not isinstance(picture, Image.Image):
            picture = picture.open(False)
        return jpeg(to_rgb(picture, "picture"), SIDES[0])
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
