"""Padding of large images to a square without the square in memory.

Pillow resizes rows first and columns second, so each band of rows can be padded and narrowed by
itself, and rows of padding alone need no resizing. The pixels are those of `data.image.pad`.
"""

from PIL import Image

MAX_SIDE = 1024  # pixels; up to here the whole square costs next to nothing
BAND_PIXELS = 2**22  # of one padded band


def handles(im: Image.Image) -> bool:
    """Images with a side above MAX_SIDE."""
    return max(im.size) > MAX_SIDE


def pad(im: Image.Image, size: int, color: tuple[int, int, int]) -> Image.Image:
    """RGB of any size -> (size, size), padded to a square with `color` and resized."""
    w, h = im.size
    n = max(w, h)
    narrow = Image.new("RGB", (size, n), color)
    rows = max(1, BAND_PIXELS // n)
    for y in range(0, h, rows):
        band = im.crop((0, y, w, min(h, y + rows)))
        if w < n:
            wide = Image.new("RGB", (n, band.height), color)
            wide.paste(band, ((n - w) // 2, 0))
            band = wide
        band = band.resize((size, band.height), Image.Resampling.BICUBIC)
        narrow.paste(band, (0, (n - h) // 2 + y))
    return narrow.resize((size, size), Image.Resampling.BICUBIC)
