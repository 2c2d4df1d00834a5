"""An image file -> a decoded PIL image, or one line that says why it cannot be used.

The scripts open images here, data/ the images of a record; data/image.py makes pixels of them. An
image file is untrusted input: a short list of formats may be opened; bytes, pixels and side ratio
are capped before anything is decoded; and a file is good only when all of it has been decoded.
"""

import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
from PIL import Image, ImageOps

from llava_min.errors import UserError, label, shorten, warn

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_BYTES = 2**26  # 64 MiB of file
MAX_PIXELS = 2**26  # 67 million, 256 MiB decoded
# long side : short side; beyond it the padded square or the cropped strip explodes
MAX_ASPECT = 500
TOO_LARGE = f"above the limit of {MAX_PIXELS / 1e6:.0f} million pixels; scale it down first"
ORIENTATION = 0x0112  # the EXIF tag

# How a file that is none of FORMATS begins (a regular expression) -> what it is, and what to do
SIGNATURES = [
    (rb"version https://git-lfs", "a git-lfs pointer, not the image itself; run `git lfs pull`"),
    (
        rb"\s*(<!doctype html|<html|<head|<body)",
        "an HTML page, not an image; download the image itself",
    ),
    (
        rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?(<!doctype svg[^>]*>\s*)?<svg",
        "an SVG; export it as PNG",
    ),
    (rb"\s*[{\[]", "JSON text, not an image; give the path of an image"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript, which is never run; export it as PNG"),
    (rb"%PDF", "a PDF; export the page as PNG"),
    (rb"8BPS", "a Photoshop file; export it as PNG"),
    (rb"....ftyp(hei|hev|mif|msf|avi)", "a HEIC or AVIF image; convert it to JPEG or PNG"),
    (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf", "an archive; unpack it first"),
]

lock = threading.Lock()


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Without Pillow's warnings, and with a decompression bomb as an error.

    The filters of `warnings` are the whole process's, hence the lock. Decoding, the slow part, is
    done outside of it, except for TIFF, whose decoder warns too.
    """
    with lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def check_size(im: Image.Image, name: str) -> None:
    w, h = im.size
    if w < 1 or h < 1:
        raise UserError(f"{name}: the image is {w}×{h} pixels; give one with both sides above 0")
    if w * h > MAX_PIXELS:
        raise UserError(f"{name}: {w}×{h} is {TOO_LARGE}")
    if max(w, h) > MAX_ASPECT * min(w, h):
        raise UserError(
            f"{name}: {w}×{h} pixels, a side over {MAX_ASPECT} times the other; crop it first"
        )


def check_finite(im: Image.Image, name: str) -> None:
    if im.mode == "F" and not np.isfinite(np.asarray(im)).all():
        raise UserError(f"{name}: the image holds NaN or infinite values; replace them first")


def check_file_size(n: float, name: str) -> None:
    """An image file of `n` bytes is not too large."""
    if n > MAX_BYTES:
        raise UserError(
            f"{name}: is larger than the limit of {MAX_BYTES >> 20} MiB; save it smaller"
        )


def check_bytes(data: bytes, name: str) -> None:
    """The bytes are not too many, and do not begin as a file of another kind."""
    if not data:
        raise UserError(f"{name}: is empty (0 bytes); fetch the image again")
    check_file_size(len(data), name)
    for start, what in SIGNATURES:
        if re.match(start, data[:4096], re.I | re.S):
            raise UserError(f"{name}: is {what}")


def apply_orientation(im: Image.Image, name: str, exif: bool) -> Image.Image:
    """Rotate the image as its EXIF tag says, or warn of an ignored tag if not `exif`."""
    try:
        with quiet_pillow():
            orientation = im.getexif().get(ORIENTATION, 1)
            rotated = ImageOps.exif_transpose(im) if exif else im
    except Exception as e:  # damaged offsets raise nearly every type; the pixels are good
        if exif:
            warn(f"{name}: its EXIF data is damaged ({type(e).__name__}), so it is not rotated")
        return im
    if not exif and orientation in range(2, 9):
        warn(
            f"{name}: EXIF orientation {orientation} is ignored, as the original does; "
            f"{label('exif')} applies it"
        )
    return rotated


def decode_all(data: bytes, name: str) -> Image.Image:
    """The first frame, decoded to its end. Pillow's own errors on damaged data pass through."""
    with quiet_pillow():
        im = Image.open(io.BytesIO(data), formats=FORMATS)
        if im.format == "PNG":
            # load() leaves the checksums of the pixel data unread; verify() ends the image
            im.verify()
            im = Image.open(io.BytesIO(data), formats=("PNG",))
    check_size(im, name)
    with quiet_pillow() if im.format == "TIFF" else nullcontext():
        im.load()
    check_finite(im, name)
    # an MPO's other frames are previews
    if im.format != "MPO" and getattr(im, "is_animated", False):
        what = "a TIFF of several pages" if im.format == "TIFF" else "animated"
        warn(f"{name}: is {what}; only the first is used")
        im.seek(0)  # counting the frames moved it
        im.load()
    return im


def decode_image(data: bytes, name: str, *, exif: bool = False) -> Image.Image:
    """`open_image` for the bytes of a file (parquet records embed them); `name` is for messages."""
    shown = shorten(name, 400)
    check_bytes(data, shown)
    try:
        im = decode_all(data, shown)
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        raise UserError(
            f"{shown}: is not an image that is read here ({', '.join(FORMATS)}), or its header is "
            "broken; convert it or fetch it again"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"{shown}: is {TOO_LARGE}") from None
    except Exception as e:  # Pillow's plugins raise nearly every type on damaged data
        reason = f"{type(e).__name__}: {shorten(e, 200)}"
        raise UserError(f"{shown}: is damaged or cut short ({reason}); fetch it again") from None
    im = apply_orientation(im, shown, exif)
    im.filename = name
    return im


def open_image(
    path: str | os.PathLike, *, root: str | os.PathLike | None = None, exif: bool = False
) -> Image.Image:
    """Read and fully decode one image file: JPEG, PNG, WebP, GIF, BMP or TIFF.

    root: a folder that relative paths start from and that no path may leave, by `..`, as an
        absolute path or through a symbolic link.
    exif: rotate the image as its orientation tag says; without it an ignored tag is a warning.

    Of an animation or a multi-page file the first frame is taken, with a warning. Every failure is
    a UserError.
    """
    path = os.fsdecode(path)
    name = shorten(path, 400)
    if not path:
        raise UserError("image path: empty; give the path of an image file")
    if re.match(r"[a-z][a-z0-9+.-]+://|data:", path, re.I):
        raise UserError(f"{name}: a URL, but images are read from disk only; download it first")
    try:
        if root is not None:
            path = inside(path, name, os.path.realpath(os.fsdecode(root)))
        data = read_bytes(path, name)
    except UserError:
        raise
    except FileNotFoundError:
        searched = f" (looked for {shorten(path, 400)})" if root is not None else ""
        fix = "check the path" + (" and the image folder" if root is not None else "")
        raise UserError(f"{name}: no such file{searched}; {fix}") from None
    except (OSError, ValueError) as e:  # ValueError: a NUL byte or a lone surrogate in the name
        reason = shorten(getattr(e, "strerror", None) or e, 200)
        raise UserError(f"{name}: cannot be read ({reason}); check the path") from None
    return decode_image(data, path, exif=exif)


def inside(path: str, name: str, root: str) -> str:
    """`path` under `root`, or UserError if it leaves it."""
    path = os.path.join(root, path)
    if os.path.commonpath([root, os.path.realpath(path)]) != root:
        raise UserError(
            f"{name}: lies outside the image folder {shorten(root, 200)}; "
            "move it inside, or name the folder that holds it as the image folder"
        )
    return path


def read_bytes(path: str, name: str) -> bytes:
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):  # opening a FIFO would hang, /dev/zero would never end
        what = "folder" if stat.S_ISDIR(mode) else "pipe, socket or device"
        raise UserError(f"{name}: is a {what}; give an image file")
    with open(path, "rb") as f:
        return f.read(MAX_BYTES + 1)
