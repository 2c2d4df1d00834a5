"""Pictures: a file → a decoded PIL image → the (3, S, S) float32 tensor that the vision tower reads.

First station of the data flow (`data/processor.py` calls `to_pixels`, the readers and scripts call
`open_image`). The pixels are bit for bit those of transformers' `CLIPImageProcessorPil` (aspect "crop") and
`LlavaImageProcessorPil` with `do_pad=True` (aspect "pad", LLaVA's `expand2square`). Transparency is laid on
white, as those do since transformers 5; the original LLaVA dropped the alpha channel and showed whatever
colours lay under it.

A picture file is untrusted input: what may be opened is a short list of formats, bytes, pixels and side ratio
are capped before anything is decoded, and a file is good only when all of it has been decoded.
"""

import io
import math
import os
import re
import stat
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageOps

from llava_min.cli import UserError, printable, warn

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_BYTES = 2**26  # 64 MiB of file
MAX_PIXELS = 2**26  # 67 million, 256 MiB decoded
MAX_ASPECT = 500  # long side : short side; beyond it the square, or the strip that is cropped, explodes

ASPECTS = {"pad": "pad", "crop": "crop", "square": "crop"}  # "square": the original's name for CLIP's crop
FAMILIES = {"CLIPImageProcessor", "LlavaImageProcessor", "CLIPFeatureExtractor"}


@dataclass(frozen=True)
class ImageConfig:
    """How a checkpoint wants its pictures.

    `size` is the side S in pixels; `mean` and `std` are per RGB channel of values in 0..1; `aspect` is "pad"
    (to a square with the mean colour), "crop" (centre square), or None when the checkpoint records neither.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    aspect: str | None

    @classmethod
    def from_hf(cls, d: dict, where: str = "preprocessor_config.json") -> "ImageConfig":
        """Read `preprocessor_config.json` (or the `image_processor` part of a `processor_config.json`).

        Whatever would give other pixels than ours is a `UserError` that names the key, never ignored.
        """

        def refuse(key: str, expected: str, mend: str = "use the file of a CLIP or LLaVA-1.5 checkpoint"):
            raise UserError(f"{where}: {key} is {_short(d.get(key))}, expected {expected}; {mend}")

        if not isinstance(d, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(d).__name__}; fetch it again")
        d = d.get("image_processor", d) if isinstance(d.get("image_processor", d), dict) else d
        for key in ("image_processor_type", "feature_extractor_type"):
            if d.get(key) is not None and re.sub("(Fast|Pil)$", "", str(d[key])) not in FAMILIES:
                refuse(key, "CLIPImageProcessor or LlavaImageProcessor", "other pipelines are not supported")
        for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"):
            if d.get(key) not in (None, True):
                refuse(key, "true")
        if d.get("resample") not in (None, Image.Resampling.BICUBIC, "bicubic"):
            refuse("resample", "3 (bicubic)")
        if d.get("rescale_factor") not in (None, 1 / 255):
            refuse("rescale_factor", "1/255")

        size, crop = _side(d.get("size"), "shortest_edge"), _side(d.get("crop_size"), "height", "width")
        if size is None:
            refuse("size", "a side of 1 to 4096 pixels, as {'shortest_edge': 336}")
        if crop is None:
            refuse("crop_size", "a square of 1 to 4096 pixels, as {'height': 336, 'width': 336}")
        if size != crop:
            refuse("crop_size", f"the same side as size ({size})")
        for key in ("image_mean", "image_std"):
            v = d.get(key)
            if not (isinstance(v, (list, tuple)) and len(v) == 3 and all(map(_is_number, v))):
                refuse(key, "three numbers, one per RGB channel")
        if min(d["image_std"]) <= 0:
            refuse("image_std", "three numbers above 0")
        if not all(0 <= x <= 1 for x in d["image_mean"]):
            refuse("image_mean", "three numbers between 0 and 1")

        aspect = d.get("image_aspect_ratio")
        if aspect is not None and (not isinstance(aspect, str) or aspect not in ASPECTS):
            refuse("image_aspect_ratio", "pad or crop", "pass image_aspect_ratio= to choose one")
        if d.get("do_pad") not in (None, True, False):
            refuse("do_pad", "true or false")
        aspect = ASPECTS.get(aspect)
        if d.get("do_pad") is not None:
            pad = "pad" if d["do_pad"] else "crop"
            if aspect not in (None, pad):
                refuse("do_pad", f"one that agrees with image_aspect_ratio={aspect}", "mend one of them")
            aspect = pad
        return cls(size, tuple(map(float, d["image_mean"])), tuple(map(float, d["image_std"])), aspect)

    def to_hf(self) -> dict:
        """The dict for `preprocessor_config.json`; transformers makes equal pixels from it."""
        assert self.aspect in ("pad", "crop"), "the loader decides the aspect before anything is saved"
        return {
            "image_processor_type": "LlavaImageProcessor" if self.aspect == "pad" else "CLIPImageProcessor",
            "image_aspect_ratio": self.aspect,
            "do_pad": self.aspect == "pad",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": self.size},
            "resample": int(Image.Resampling.BICUBIC),
            "do_center_crop": True,
            "crop_size": {"height": self.size, "width": self.size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _side(value: object, *keys: str) -> int | None:
    """The side of a size written as 336 (old CLIP files) or as a dict with exactly `keys`, else None."""
    if isinstance(value, dict):
        value = {k: v for k, v in value.items() if v is not None}
        sides = set(map(str, value.values()))
        value = value[keys[0]] if set(value) == set(keys) and len(sides) == 1 else None
    return value if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 4096 else None


def _short(x: object, n: int = 200) -> str:
    s = printable(x)
    return s if len(s) <= n else f"{s[:n - 20]}…{s[-15:]}"


# ---- pixels ------------------------------------------------------------------------------------------------


@lru_cache
def _table(config: ImageConfig) -> np.ndarray:
    """(3, 256) float32: the value each 8-bit channel value becomes, by the reference's own arithmetic."""
    a = (np.arange(256).astype(np.float64) * (1 / 255)).astype(np.float32)
    mean, std = np.array(config.mean, np.float32)[:, None], np.array(config.std, np.float32)[:, None]
    return (a - mean) / std


def _check_size(im: Image.Image, name: str) -> None:
    w, h = im.size
    if w < 1 or h < 1:
        raise UserError(f"{name}: the picture is {w}×{h} pixels; give one with both sides above 0")
    if w * h > MAX_PIXELS:
        limit = f"{MAX_PIXELS / 1e6:.0f} million"
        raise UserError(f"{name}: {w}×{h} pixels is above the limit of {limit}; scale it down first")
    if max(w, h) > MAX_ASPECT * min(w, h):
        raise UserError(f"{name}: {w}×{h} pixels, a side over {MAX_ASPECT} times the other; crop it first")


def _to_8bit(im: Image.Image, name: str) -> Image.Image:
    """Modes I, I;16 and F to L. Pillow (and so the reference) clips them: a 16-bit scan comes out white."""
    a = np.asarray(im).astype(np.float64)
    if not np.isfinite(a).all():
        raise UserError(f"{name}: the picture holds NaN or infinite values; mend it first")
    low, high = a.min(), a.max()
    if im.mode.startswith("I;16"):
        low, high = 0, 65535
    elif low >= 0:  # no file says what white is: take the smallest usual scale that holds every value
        scales = ([1.0] if im.mode == "F" else []) + [255.0, 65535.0]
        low, high = 0, next((s for s in scales if high <= s), high)
    warn(f"{name}: mode {im.mode} is scaled from {low:g}..{high:g} to 8 bit")
    a = (a - low) * (255 / max(high - low, 1e-300))
    return Image.fromarray(np.rint(a).astype(np.uint8))


def to_rgb(im: Image.Image, name: str) -> Image.Image:
    try:
        im.load()  # the caller may have opened a damaged file
        if im.mode in ("I", "F") or im.mode.startswith("I;16"):
            im = _to_8bit(im, name)
        if "A" in im.getbands() or im.info.get("transparency") is not None:
            im = im.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", im.size, (255, 255, 255, 255)), im).convert("RGB")
        return im.convert("RGB")
    except UserError:
        raise
    except (OSError, ValueError, SyntaxError, struct.error) as e:
        why = f"mode {im.mode} does not convert to RGB ({_short(e)})"
        raise UserError(f"{name}: {why}; save it as an RGB PNG") from e


def _pad(im: Image.Image, size: int, colour: tuple[int, int, int]) -> Image.Image:
    """Pad to a square of side max(w, h), then resize to `size`: bit for bit, but the square is never built.

    Pillow resizes rows first and columns second, so each band of rows can be padded and narrowed by itself.
    """
    w, h = im.size
    n = max(w, h)
    narrow = Image.new("RGB", (size, n), colour)
    rows = max(1, 2**22 // n)
    for y in range(0, h, rows):
        band = im.crop((0, y, w, min(h, y + rows)))
        if w < n:
            wide = Image.new("RGB", (n, band.height), colour)
            wide.paste(band, ((n - w) // 2, 0))
            band = wide
        narrow.paste(band.resize((size, band.height), Image.Resampling.BICUBIC), (0, (n - h) // 2 + y))
    return narrow.resize((size, size), Image.Resampling.BICUBIC)


def _crop(im: Image.Image, size: int) -> Image.Image:
    w, h = im.size
    w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    im = im.resize((w, h), Image.Resampling.BICUBIC)
    left, top = (w - size) // 2, (h - size) // 2
    return im.crop((left, top, left + size, top + size))


def to_pixels(image: Image.Image, config: ImageConfig) -> torch.Tensor:
    """One PIL image of any mode and size → (3, S, S) float32, normalised. The image is never rotated.

    Equal to transformers' `CLIPImageProcessorPil` / `LlavaImageProcessorPil(do_pad=True)`, except that modes
    I, I;16 and F are scaled to 8 bit with a warning. `UserError` for a picture that cannot be used.
    """
    assert config.aspect in ("pad", "crop"), "the loader decides the aspect"
    name = _short(getattr(image, "filename", "") or "picture")
    _check_size(image, name)
    im = to_rgb(image, name)
    if config.aspect == "pad":
        im = _pad(im, config.size, tuple(int(x * 255) for x in config.mean))
    else:
        im = _crop(im, config.size)
    a, table = np.asarray(im), _table(config)
    out = np.empty((3, config.size, config.size), np.float32)
    for c in range(3):
        np.take(table[c], a[..., c], out=out[c], mode="clip")  # "raise" would go through a buffer
    return torch.from_numpy(out)


# ---- files -------------------------------------------------------------------------------------------------

_lock = threading.Lock()


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow reports oddities as Python warnings, and a bomb only as one. The filter list is the whole
    process's, hence the lock; decoding, the slow part, is done outside of it, but for TIFF, whose decoder
    warns too."""
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


_OTHERS = [  # how a file that is no picture of ours begins (a regular expression) → what to tell the user
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


def open_image(path: str | os.PathLike, *, root: str | os.PathLike | None = None,
               exif: bool = False) -> Image.Image:
    """Read and fully decode one picture file: JPEG, PNG, WebP, GIF, BMP or TIFF.

    `root`: a folder that relative paths start from and that no path may leave, by `..`, as an absolute path
    or through a symbolic link. `exif`: turn the picture as its orientation tag says; without it an ignored
    tag is a warning. Of an animation or a multi-page file the first frame is taken, with a warning. Every
    failure is a `UserError`.
    """
    path = os.fsdecode(path)
    name = _short(path, 400)
    if re.match(r"[a-z][a-z0-9+.-]+://|data:", path, re.I):
        raise UserError(f"{name}: a URL, but pictures are read from disk only; download it first")
    if not path:
        raise UserError("picture path: empty; give the path of a picture file")
    try:
        if root is not None:
            real_root = os.path.realpath(os.fsdecode(root))
            path = os.path.join(real_root, path)
            if os.path.commonpath([real_root, os.path.realpath(path)]) != real_root:
                raise UserError(f"{name}: lies outside the image folder {_short(real_root)}; "
                                "move it inside, or name the folder that holds it as the image folder")
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise UserError(f"{name}: is a folder; give a picture file")
        if not stat.S_ISREG(mode):  # opening a FIFO would hang, /dev/zero would never end
            raise UserError(f"{name}: is a pipe, socket or device, not a file; give a picture file")
        with open(path, "rb") as f:
            data = f.read(MAX_BYTES + 1)
    except FileNotFoundError as e:
        tried = "" if root is None else f" (looked for {_short(path, 400)})"
        raise UserError(f"{name}: no such file{tried}; check the path and the image folder") from e
    except UserError:
        raise
    except (OSError, ValueError) as e:  # ValueError: a NUL byte or a lone surrogate in the name
        why = _short(getattr(e, "strerror", None) or e)
        raise UserError(f"{name}: cannot be read ({why}); check the path") from e
    return decode_image(data, path, exif=exif)


def decode_image(data: bytes, name: str, *, exif: bool = False) -> Image.Image:
    """`open_image` for the bytes of a file (parquet records embed them); `name` is for messages."""
    label = _short(name, 400)
    if not data:
        raise UserError(f"{label}: is empty (0 bytes); fetch the picture again")
    if len(data) > MAX_BYTES:
        raise UserError(f"{label}: is larger than the limit of {MAX_BYTES >> 20} MiB; save it smaller")
    for start, what in _OTHERS:
        if re.match(start, data[:4096], re.I | re.S):
            raise UserError(f"{label}: is {what}")
    allowed = ", ".join(FORMATS)
    try:
        with _quiet():
            im = Image.open(io.BytesIO(data), formats=FORMATS)
            if im.format == "PNG":
                im.verify()  # the checksums of the pixel data, which load() leaves unread; it ends the image
                im = Image.open(io.BytesIO(data), formats=("PNG",))
        _check_size(im, label)
        with _quiet() if im.format == "TIFF" else nullcontext():
            im.load()
        if im.format != "MPO" and getattr(im, "is_animated", False):  # an MPO's others are previews
            kind = "a TIFF of several pages" if im.format == "TIFF" else "animated"
            warn(f"{label}: is {kind}; only the first is used")
            im.seek(0)
            im.load()
        _check_size(im, label)
    except UserError:
        raise
    except Image.UnidentifiedImageError as e:
        raise UserError(f"{label}: is not an image that is read here ({allowed}), or its header is broken; "
                        "convert it or fetch it again") from e
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        limit = f"{MAX_PIXELS / 1e6:.0f} million"
        raise UserError(f"{label}: more pixels than the limit of {limit}; scale it down first") from e
    except Exception as e:  # Pillow's plugins raise nearly every type on damaged data
        why = f"{type(e).__name__}: {_short(e)}"
        raise UserError(f"{label}: is damaged or cut short ({why}); fetch it again") from e
    im = _oriented(im, label, exif)
    im.filename = name
    return im


def _oriented(im: Image.Image, label: str, exif: bool) -> Image.Image:
    try:
        with _quiet():
            orientation = im.getexif().get(0x0112, 1)
            turned = ImageOps.exif_transpose(im) if exif else im
    except Exception as e:  # a damaged tree of offsets raises nearly every type; the pixels are good
        if exif:
            warn(f"{label}: its EXIF data is damaged ({type(e).__name__}), so the picture is not rotated")
        return im
    if not exif and orientation in range(2, 9):
        warn(f"{label}: EXIF orientation {orientation} is ignored, as the original does; --exif applies it")
    return turned
