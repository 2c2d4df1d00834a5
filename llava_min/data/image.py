"""A decoded PIL image → the (3, S, S) float32 tensor that the vision tower reads.

Between picture.py, which opens the files, and processor.py. The pixels are bit for bit those of transformers'
`CLIPImageProcessorPil` (aspect "crop") and `LlavaImageProcessorPil` with `do_pad=True` (aspect "pad", LLaVA's
`expand2square`). Transparency is laid on white, as those do since transformers 5; the original LLaVA dropped the alpha
channel and showed whatever colours lay under it.
"""

import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from llava_min.cli import UserError, short, warn
from llava_min.data.picture import check_size

ASPECTS = {"pad": "pad", "crop": "crop", "square": "crop"}  # "square": the original's name for CLIP's crop
FAMILIES = {"CLIPImageProcessor", "LlavaImageProcessor", "CLIPFeatureExtractor"}
BICUBIC = Image.Resampling.BICUBIC
FIXED = {  # a key → what it may be, if it stands in the file at all
    **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), ((True,), "true")),
    "resample": ((BICUBIC, "bicubic"), "3 (bicubic)"),
    "rescale_factor": ((1 / 255,), "1/255"),
    "do_pad": ((True, False), "true or false"),
}


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
            raise UserError(f"{where}: {key} is {short(d.get(key), 200)}, expected {expected}; {mend}")

        if not isinstance(d, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(d).__name__}; fetch it again")
        d = d["image_processor"] if isinstance(d.get("image_processor"), dict) else d
        for key in ("image_processor_type", "feature_extractor_type"):
            if d.get(key) is not None and re.sub("(Fast|Pil)$", "", str(d[key])) not in FAMILIES:
                refuse(key, "CLIPImageProcessor or LlavaImageProcessor", "other pipelines are not supported")
        for key, (values, expected) in FIXED.items():
            if d.get(key) not in (None, *values):
                refuse(key, expected)
        size = side(d.get("size"), "shortest_edge")
        if size is None:
            refuse("size", "a side of 1 to 4096 pixels, as {'shortest_edge': 336}")
        if side(d.get("crop_size"), "height", "width") != size:
            refuse("crop_size", f"the side of size, as {{'height': {size}, 'width': {size}}}")
        if not three(d.get("image_mean"), lambda x: 0 <= x <= 1):
            refuse("image_mean", "three numbers between 0 and 1, one per RGB channel")
        if not three(d.get("image_std"), lambda x: x > 0):
            refuse("image_std", "three numbers above 0, one per RGB channel")
        recorded = d.get("image_aspect_ratio")
        if recorded not in (None, *ASPECTS):
            refuse("image_aspect_ratio", "pad or crop", "pass image_aspect_ratio= to choose one")
        aspects = {ASPECTS.get(recorded), {True: "pad", False: "crop"}.get(d.get("do_pad"))} - {None}
        if len(aspects) > 1:
            refuse("do_pad", f"one that agrees with image_aspect_ratio={recorded}", "mend one of them")
        return cls(size, tuple(map(float, d["image_mean"])), tuple(map(float, d["image_std"])), next(iter(aspects), None))

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
            "resample": int(BICUBIC),
            "do_center_crop": True,
            "crop_size": {"height": self.size, "width": self.size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }


def side(value: object, *keys: str) -> int | None:
    """The side of a size written as 336 (old CLIP files) or as a dict with exactly `keys`, else None."""
    if isinstance(value, dict):
        value = {k: v for k, v in value.items() if v is not None}
        value = value[keys[0]] if set(value) == set(keys) and len(set(map(str, value.values()))) == 1 else None
    return value if type(value) is int and 1 <= value <= 4096 else None


def three(value: object, good: Callable[[float], bool]) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 3 and all(
        type(x) in (int, float) and math.isfinite(x) and good(x) for x in value)


# ---- pixels


def to_8bit(im: Image.Image, name: str) -> Image.Image:
    """Modes I, I;16 and F to L. Pillow (and so the reference) clips them: a 16-bit scan comes out white."""
    a = np.asarray(im).astype(np.float64)
    if not np.isfinite(a).all():  # one that was not opened by picture.py
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
    except (OSError, ValueError, SyntaxError, struct.error) as e:
        raise UserError(f"{name}: is damaged or cut short ({short(e, 200)}); fetch it again") from e
    try:
        if im.mode in ("I", "F") or im.mode.startswith("I;16"):
            im = to_8bit(im, name)
        if "A" in im.getbands() or im.info.get("transparency") is not None:
            im = im.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", im.size, (255, 255, 255, 255)), im).convert("RGB")
        return im.convert("RGB")
    except UserError:
        raise
    except (OSError, ValueError, SyntaxError, struct.error) as e:
        raise UserError(f"{name}: mode {im.mode} does not convert to RGB ({short(e, 200)}); save it as an RGB PNG") from e


def pad(im: Image.Image, size: int, colour: tuple[int, int, int]) -> Image.Image:
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
        narrow.paste(band.resize((size, band.height), BICUBIC), (0, (n - h) // 2 + y))
    return narrow.resize((size, size), BICUBIC)


def crop(im: Image.Image, size: int) -> Image.Image:
    w, h = im.size
    w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    im = im.resize((w, h), BICUBIC)
    left, top = (w - size) // 2, (h - size) // 2
    return im.crop((left, top, left + size, top + size))


@lru_cache
def table(config: ImageConfig) -> np.ndarray:
    """(3, 256) float32: the value each 8-bit channel value becomes, by the reference's own arithmetic."""
    a = (np.arange(256).astype(np.float64) * (1 / 255)).astype(np.float32)
    mean, std = np.array(config.mean, np.float32)[:, None], np.array(config.std, np.float32)[:, None]
    return (a - mean) / std


def to_pixels(image: Image.Image, config: ImageConfig) -> torch.Tensor:
    """One PIL image of any mode and size → (3, S, S) float32, normalised. The image is never rotated.

    Equal to transformers' `CLIPImageProcessorPil` / `LlavaImageProcessorPil(do_pad=True)`, except that modes
    I, I;16 and F are scaled to 8 bit with a warning. `UserError` for a picture that cannot be used.
    """
    assert config.aspect in ("pad", "crop"), "the loader decides the aspect"
    name = short(getattr(image, "filename", "") or "picture", 400)
    check_size(image, name)
    im = to_rgb(image, name)
    if config.aspect == "pad":
        im = pad(im, config.size, tuple(int(x * 255) for x in config.mean))
    else:
        im = crop(im, config.size)
    a, values = np.asarray(im), table(config)  # (S, S, 3), (3, 256)
    out = np.empty((3, config.size, config.size), np.float32)
    for c in range(3):
        np.take(values[c], a[..., c], out=out[c], mode="clip")  # "raise" would go through a buffer
    return torch.from_numpy(out)
