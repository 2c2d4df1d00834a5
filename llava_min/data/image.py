"""A decoded PIL image -> the (3, S, S) float32 tensor that the vision tower reads.

checks/image_file.py opens the files, processor.py calls `to_pixels`. Pixels equal, bit for bit,
those of transformers' `CLIPImageProcessorPil` (aspect "crop") and of `LlavaImageProcessorPil` with
`do_pad=True` (aspect "pad", LLaVA's `expand2square`). To compare:
https://github.com/huggingface/transformers/blob/3833a10/src/transformers/models/llava/image_processing_pil_llava.py

Transparency is laid on white, as transformers does since version 5; the original LLaVA dropped the
alpha channel and showed whatever colors lay under it.

Shapes: S pixels a side, W width, H height.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from llava_min.checks.image import check_decoded, check_image_config, converting, read_side
from llava_min.checks.image_file import check_finite, check_size
from llava_min.errors import shorten, warn
from llava_min.fast import padding

BICUBIC = Image.Resampling.BICUBIC
# of CLIP's training images, RGB
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# "square" is the original's name for CLIP's crop
ASPECTS = {"pad": "pad", "crop": "crop", "square": "crop"}


@dataclass(frozen=True)
class ImageConfig:
    """How a checkpoint wants its images.

    `size` is the side S in pixels. `mean` and `std` are per RGB channel, of values in 0..1.
    `aspect` is "pad" (to a square with the mean color), "crop" (centre square), or None when the
    checkpoint records neither.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    aspect: str | None

    @classmethod
    def from_hf(cls, d: dict, where: str = "preprocessor_config.json") -> "ImageConfig":
        """Read `preprocessor_config.json`, or the `image_processor` part of a
        `processor_config.json`.

        Raises UserError for a setting that gives other pixels than ours; `where` names the file.
        """
        # transformers 5 nests the settings in processor_config.json
        if isinstance(d, dict) and isinstance(d.get("image_processor"), dict):
            d = d["image_processor"]
        check_image_config(d, where)
        # transformers records the aspect as do_pad, the original as image_aspect_ratio
        aspect = {True: "pad", False: "crop", None: None}[d.get("do_pad")]
        return cls(
            size=read_side(d["size"], "shortest_edge"),
            mean=tuple(map(float, d["image_mean"])),
            std=tuple(map(float, d["image_std"])),
            aspect=ASPECTS.get(d.get("image_aspect_ratio"), aspect),
        )

    def to_hf(self) -> dict:
        """The dict for `preprocessor_config.json`; transformers makes equal pixels from it."""
        assert self.aspect in ("pad", "crop"), "the loader decides the aspect before it saves"
        pads = self.aspect == "pad"
        return {
            "image_processor_type": "LlavaImageProcessor" if pads else "CLIPImageProcessor",
            "image_aspect_ratio": self.aspect,
            "do_pad": pads,
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


def is_deep(im: Image.Image) -> bool:
    """More than 8 bits a channel: modes I, I;16 and F."""
    return im.mode in ("I", "F") or im.mode.startswith("I;16")


def to_8bit(im: Image.Image, name: str) -> Image.Image:
    """A deep image -> L. Pillow, and so the reference, clips: a 16-bit scan comes out white."""
    check_finite(im, name)
    a = np.asarray(im).astype(np.float64)
    low, high = a.min(), a.max()
    if im.mode.startswith("I;16"):
        low, high = 0, 65535
    elif low >= 0:
        # no file says what white is: take the smallest usual scale that holds every value
        scales = ([1.0] if im.mode == "F" else []) + [255.0, 65535.0]
        low, high = 0, next((s for s in scales if high <= s), high)
    warn(f"{name}: mode {im.mode} is scaled from {low:g}..{high:g} to 8 bit")
    a = (a - low) * (255 / max(high - low, 1e-300))
    return Image.fromarray(np.rint(a).astype(np.uint8))


def to_rgb(im: Image.Image, name: str) -> Image.Image:
    """An image of any mode -> RGB; `name` is for messages. Raises UserError if it is damaged."""
    check_decoded(im, name)
    with converting(im, name):
        if is_deep(im):
            im = to_8bit(im, name)
        if "A" in im.getbands() or im.info.get("transparency") is not None:
            im = im.convert("RGBA")
            white = Image.new("RGBA", im.size, (255, 255, 255, 255))
            im = Image.alpha_composite(white, im)
        return im.convert("RGB")


def pad(im: Image.Image, size: int, color: tuple[int, int, int]) -> Image.Image:
    """Put it into the middle of a square of side max(W, H), then resize to (size, size)."""
    if padding.handles(im):
        return padding.pad(im, size, color)
    w, h = im.size
    n = max(w, h)
    square = Image.new("RGB", (n, n), color)
    square.paste(im, ((n - w) // 2, (n - h) // 2))
    return square.resize((size, size), BICUBIC)


def crop(im: Image.Image, size: int) -> Image.Image:
    """Resize the short side to `size`, then take the centre square."""
    w, h = im.size
    w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    im = im.resize((w, h), BICUBIC)
    left, top = (w - size) // 2, (h - size) // 2
    return im.crop((left, top, left + size, top + size))


@lru_cache
def normalized(config: ImageConfig) -> np.ndarray:
    """(3, 256) float32: what each 8-bit value of a channel becomes, by the reference's own
    arithmetic.
    """
    x = (np.arange(256).astype(np.float64) * (1 / 255)).astype(np.float32)
    mean = np.array(config.mean, np.float32)[:, None]
    std = np.array(config.std, np.float32)[:, None]
    return (x - mean) / std


def to_pixels(image: Image.Image, config: ImageConfig) -> torch.Tensor:
    """One PIL image of any mode and size -> (3, S, S) float32, normalized. It is never rotated.

    Equal to transformers' `CLIPImageProcessorPil` or `LlavaImageProcessorPil(do_pad=True)`, except
    that modes I, I;16 and F are scaled to 8 bit with a warning. Raises UserError for an image that
    is empty, too large, too narrow or damaged.
    """
    assert config.aspect in ("pad", "crop"), "the loader decides the aspect"
    name = shorten(getattr(image, "filename", "") or "image", 400)
    check_size(image, name)
    im = to_rgb(image, name)
    if config.aspect == "pad":
        im = pad(im, config.size, tuple(int(x * 255) for x in config.mean))
    else:
        im = crop(im, config.size)
    # with 256 values a channel, normalizing is a look-up
    x, values = np.asarray(im), normalized(config)  # (S, S, 3), (3, 256)
    out = np.empty((3, config.size, config.size), np.float32)
    for c in range(3):
        np.take(values[c], x[..., c], out=out[c], mode="clip")  # "raise" would go through a buffer
    return torch.from_numpy(out)
