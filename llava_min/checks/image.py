"""What a checkpoint may say of its images, and what an image may be: whatever would give other
pixels than `data.image` makes is refused by name.
"""

import math
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from PIL import Image

from llava_min.errors import UserError, shorten

MAX_SIDE = 4096  # pixels of the square that the tower reads
BICUBIC = Image.Resampling.BICUBIC
PROCESSORS = {"CLIPImageProcessor", "LlavaImageProcessor", "CLIPFeatureExtractor"}
PILLOW_ERRORS = (OSError, ValueError, SyntaxError, struct.error)


class Rule(NamedTuple):
    fits: Callable[[Any], bool]
    expected: str
    fix: str = "use the file of a CLIP or LLaVA-1.5 checkpoint"


def only(*allowed: Any) -> Callable[[Any], bool]:
    """A key that may be left out or null; `allowed` if it is there."""
    return lambda value: value in (None, *allowed)


def is_processor(value: Any) -> bool:
    return value is None or re.sub("(Fast|Pil)$", "", str(value)) in PROCESSORS


def three_numbers(fits: Callable[[float], bool]) -> Callable[[Any], bool]:
    is_number = lambda x: type(x) in (int, float) and math.isfinite(x) and fits(x)
    return lambda v: isinstance(v, (list, tuple)) and len(v) == 3 and all(map(is_number, v))


PROCESSOR = Rule(
    is_processor,
    "CLIPImageProcessor or LlavaImageProcessor",
    "other pipelines are not supported",
)
ON = Rule(only(True), "true")
RULES = {
    "image_processor_type": PROCESSOR,
    "feature_extractor_type": PROCESSOR,
    "do_resize": ON,
    "do_center_crop": ON,
    "do_rescale": ON,
    "do_normalize": ON,
    "do_convert_rgb": ON,
    "resample": Rule(only(BICUBIC, "bicubic"), "3 (bicubic)"),
    "rescale_factor": Rule(only(1 / 255), "1/255"),
    "do_pad": Rule(only(True, False), "true or false"),
    "size": Rule(
        lambda value: read_side(value, "shortest_edge") is not None,
        f"a side of 1 to {MAX_SIDE} pixels, as {{'shortest_edge': 336}}",
    ),
    "image_mean": Rule(
        three_numbers(lambda x: 0 <= x <= 1),
        "three numbers between 0 and 1, one per RGB channel",
    ),
    "image_std": Rule(three_numbers(lambda x: x > 0), "three numbers above 0, one per RGB channel"),
    "image_aspect_ratio": Rule(
        only("pad", "crop", "square"),
        "pad or crop",
        "pass image_aspect_ratio= to choose one",
    ),
}


def check_image_config(d: Any, where: str) -> None:
    """A `preprocessor_config.json`, or the `image_processor` part of a `processor_config.json`,
    that `ImageConfig` can follow; UserError names the key otherwise.
    """
    if not isinstance(d, dict):
        raise UserError(
            f"{where}: expected a JSON object, found {type(d).__name__}; fetch it again"
        )
    for key, rule in RULES.items():
        check(d, key, rule, where)
    size = read_side(d["size"], "shortest_edge")
    # transformers crops to crop_size after it has resized to size
    is_size = lambda value: read_side(value, "height", "width") == size
    expected = f"the side of size, as {{'height': {size}, 'width': {size}}}"
    check(d, "crop_size", Rule(is_size, expected), where)
    # two keys may name the aspect: transformers' and the original's
    recorded = d.get("image_aspect_ratio")
    agrees = only(*[True, False] if recorded is None else [recorded == "pad"])
    expected = f"one that agrees with image_aspect_ratio={recorded}"
    check(d, "do_pad", Rule(agrees, expected, "correct one of them"), where)


def check(d: dict, key: str, rule: Rule, where: str) -> None:
    value = d.get(key)
    if not rule.fits(value):
        raise UserError(
            f"{where}: {key} is {shorten(value, 200)}, expected {rule.expected}; {rule.fix}"
        )


def read_side(value: Any, *keys: str) -> int | None:
    """The side of a square written as 336 (old CLIP files) or as a dict with exactly `keys`, or
    None if it is neither.
    """
    if isinstance(value, dict):
        value = {key: side for key, side in value.items() if side is not None}
        is_square = set(value) == set(keys) and len(set(map(str, value.values()))) == 1
        value = value[keys[0]] if is_square else None
    return value if type(value) is int and 1 <= value <= MAX_SIDE else None


def check_decoded(im: Image.Image, name: str) -> None:
    """Decode an image that the caller opened, or UserError if its file is damaged."""
    try:
        im.load()
    except PILLOW_ERRORS as e:
        raise UserError(
            f"{name}: is damaged or cut short ({shorten(e, 200)}); fetch it again"
        ) from e


@contextmanager
def converting(im: Image.Image, name: str) -> Iterator[None]:
    """Within, what Pillow cannot convert to RGB is a UserError."""
    try:
        yield
    except UserError:
        raise
    except PILLOW_ERRORS as e:
        raise UserError(
            f"{name}: mode {im.mode} does not convert to RGB ({shorten(e, 200)}); "
            "save it as an RGB PNG"
        ) from e
