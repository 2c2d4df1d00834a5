"""A picture file → a decoded PIL image, or one line that says why it is none.

Bottom of the data column: the scripts open pictures here, record.py those of its record; image.py makes pixels of them.
A picture file is untrusted input: what may be opened is a short list of formats; bytes, pixels and side ratio are capped
before anything is decoded; and a file is good only when all of it has been decoded.
"""

import base64
import binascii
import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageOps

from llava_min.cli import UserError, short, warn

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_BYTES = 2**26  # 64 MiB of file
MAX_PIXELS = 2**26  # 67 million, 256 MiB decoded
MAX_ASPECT = 500  # long side : short side; beyond it the square, or the strip that is cropped, explodes
TOO_MANY = f"above the limit of {MAX_PIXELS / 1e6:.0f} million pixels; scale it down first"
OTHERS = [  # how a file that is no picture of ours begins (a regular expression) → what to tell the user
    (rb"version https://git-lfs", "a git-lfs pointer, not the picture itself; run `git lfs pull`"),
    (rb"\s*(<!doctype html|<html|<head|<body)", "an HTML page, not an image; download the picture itself"),
    (rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?(<!doctype svg[^>]*>\s*)?<svg", "an SVG; export it as PNG"),
    (rb"\s*[{\[]", "JSON text, not an image; give the path of a picture"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript, which is never run; export it as PNG"),
    (rb"%PDF", "a PDF; export the page as PNG"),
    (rb"8BPS", "a Photoshop file; export it as PNG"),
    (rb"....ftyp(hei|hev|mif|msf|avi)", "a HEIC or AVIF picture; convert it to JPEG or PNG"),
    (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf", "an archive; unpack it first"),
]


lock = threading.Lock()


@contextmanager
def quiet() -> Iterator[None]:
    """Pillow reports oddities as Python warnings, and a bomb only as one. The filter list is the whole process's, hence the
    lock; decoding, the slow part, is done outside of it, but for TIFF, whose decoder warns too."""
    with lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def check_size(im: Image.Image, name: str) -> None:
    w, h = im.size
    if w < 1 or h < 1:
        raise UserError(f"{name}: the picture is {w}×{h} pixels; give one with both sides above 0")
    if w * h > MAX_PIXELS:
        raise UserError(f"{name}: {w}×{h} is {TOO_MANY}")
    if max(w, h) > MAX_ASPECT * min(w, h):
        raise UserError(f"{name}: {w}×{h} pixels, a side over {MAX_ASPECT} times the other; crop it first")


def oriented(im: Image.Image, label: str, exif: bool) -> Image.Image:
    try:
        with quiet():
            orientation = im.getexif().get(0x0112, 1)
            turned = ImageOps.exif_transpose(im) if exif else im
    except Exception as e:  # a damaged tree of offsets raises nearly every type; the pixels are good
        if exif:
            warn(f"{label}: its EXIF data is damaged ({type(e).__name__}), so the picture is not rotated")
        return im
    if not exif and orientation in range(2, 9):
        warn(f"{label}: EXIF orientation {orientation} is ignored, as the original does; --exif applies it")
    return turned


def decode_image(data: bytes, name: str, *, exif: bool = False) -> Image.Image:
    """`open_image` for the bytes of a file (parquet records embed them); `name` is for messages."""
    label = short(name, 400)
    if not data:
        raise UserError(f"{label}: is empty (0 bytes); fetch the picture again")
    if len(data) > MAX_BYTES:
        raise UserError(f"{label}: is larger than the limit of {MAX_BYTES >> 20} MiB; save it smaller")
    for start, what in OTHERS:
        if re.match(start, data[:4096], re.I | re.S):
            raise UserError(f"{label}: is {what}")
    try:
        with quiet():
            im = Image.open(io.BytesIO(data), formats=FORMATS)
            if im.format == "PNG":
                im.verify()  # the checksums of the pixel data, which load() leaves unread; it ends the image
                im = Image.open(io.BytesIO(data), formats=("PNG",))
        check_size(im, label)
        with quiet() if im.format == "TIFF" else nullcontext():
            im.load()
        if im.mode == "F" and not np.isfinite(np.asarray(im)).all():
            raise UserError(f"{label}: the picture holds NaN or infinite values; mend it first")
        if im.format != "MPO" and getattr(im, "is_animated", False):  # an MPO's others are previews
            warn(f"{label}: is {'a TIFF of several pages' if im.format == 'TIFF' else 'animated'}; only the first is used")
            im.seek(0)  # where it was before they were counted
            im.load()
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        raise UserError(f"{label}: is not an image that is read here ({', '.join(FORMATS)}), or its header is broken; "
                        "convert it or fetch it again") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"{label}: is {TOO_MANY}") from None
    except Exception as e:  # Pillow's plugins raise nearly every type on damaged data
        raise UserError(f"{label}: is damaged or cut short ({type(e).__name__}: {short(e, 200)}); fetch it again") from None
    im = oriented(im, label, exif)
    im.filename = name
    return im


def open_image(path: str | os.PathLike, *, root: str | os.PathLike | None = None, exif: bool = False) -> Image.Image:
    """Read and fully decode one picture file: JPEG, PNG, WebP, GIF, BMP or TIFF.

    root: a folder that relative paths start from and that no path may leave, by `..`, as an absolute path or through a
    symbolic link. exif: turn the picture as its orientation tag says; without it an ignored tag is a warning. Of an
    animation or a multi-page file the first frame is taken, with a warning. Every failure is a UserError.
    """
    path = os.fsdecode(path)
    name = short(path, 400)
    if not path:
        raise UserError("picture path: empty; give the path of a picture file")
    if re.match(r"[a-z][a-z0-9+.-]+://|data:", path, re.I):
        raise UserError(f"{name}: a URL, but pictures are read from disk only; download it first")
    try:
        if root is not None:
            real_root = os.path.realpath(os.fsdecode(root))
            path = os.path.join(real_root, path)
            if os.path.commonpath([real_root, os.path.realpath(path)]) != real_root:
                raise UserError(f"{name}: lies outside the image folder {short(real_root, 200)}; "
                                "move it inside, or name the folder that holds it as the image folder")
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # opening a FIFO would hang, /dev/zero would never end
            raise UserError(f"{name}: is a {'folder' if stat.S_ISDIR(mode) else 'pipe, socket or device'}; give a picture file")
        with open(path, "rb") as f:
            data = f.read(MAX_BYTES + 1)
    except UserError:
        raise
    except FileNotFoundError:
        tried = "; check the path" if root is None else f" (looked for {short(path, 400)}); check the path and the image folder"
        raise UserError(f"{name}: no such file{tried}") from None
    except (OSError, ValueError) as e:  # ValueError: a NUL byte or a lone surrogate in the name
        raise UserError(f"{name}: cannot be read ({short(getattr(e, 'strerror', None) or e, 200)}); check the path") from None
    return decode_image(data, path, exif=exif)


# ---- an image that stands in its record


@dataclass(frozen=True, slots=True)
class Encoded:
    """An image inside a record: the bytes of its file, out of a data URI (RFC 2397)."""

    data: bytes = field(repr=False)
    name: str  # for messages

    def open(self, exif: bool = False) -> Image.Image:
        return decode_image(self.data, self.name, exif=exif)

    @property
    def uri(self) -> str:
        return "data:;base64," + base64.b64encode(self.data).decode()


def is_data_uri(text: object) -> bool:
    return isinstance(text, str) and text[:5].lower() == "data:"


def from_data_uri(uri: str, name: str) -> Encoded:
    """`data:image/png;base64,iVBO…` -> the image, not yet decoded. Raises UserError: it is not base64, or is too large."""
    head, _, data = uri.partition(",")
    if not head.lower().endswith(";base64"):
        raise UserError(f"{name}: {short(uri)} is a data URI without base64; expected data:image/png;base64,…")
    if len(data) > MAX_BYTES * 4 / 3 + 4:
        raise UserError(f"{name}: is larger than the limit of {MAX_BYTES >> 20} MiB; save it smaller")
    try:
        found = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as e:  # ValueError: characters beyond ASCII
        raise UserError(f"{name}: {short(uri)} is not whole base64 ({short(e, 80)}); encode it again") from None
    if not found:
        raise UserError(f"{name}: is empty (0 bytes); encode it again")
    return Encoded(found, name)
