"""What a caller gives to the model: ids, attention mask and pixels of the right kind, shape and
range.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llava_min.checks.processor import check_sees
from llava_min.config import LlavaConfig
from llava_min.errors import UserError


def check_inputs(
    config: LlavaConfig,
    input_ids: Any,
    pixel_values: Any = None,
    attention_mask: Any = None,
) -> None:
    """input_ids and attention_mask (B, T), pixel_values (N, 3, S, S), or UserError."""
    ids, mask, pixels = input_ids, attention_mask, pixel_values
    integers = (torch.int64, torch.int32)
    if not (is_tensor(ids, 2) and ids.dtype in integers and ids.numel()):
        raise UserError(
            f"{describe(ids)}, expected an int64 tensor (rows, tokens), as the processor makes it",
            "input_ids",
        )
    if mask is not None and not (is_tensor(mask, 2) and mask.shape == ids.shape):
        raise UserError(
            f"{describe(mask)} with input_ids {tuple(ids.shape)}, expected (rows, tokens) for "
            "both; "
            "give what the processor made",
            "attention_mask",
        )
    if pixels is not None:
        check_sees(config.vision, "pixel_values")
        image = (3, config.vision.image_size, config.vision.image_size)
        if not (is_tensor(pixels, 4) and pixels.is_floating_point() and pixels.shape[1:] == image):
            raise UserError(
                f"{describe(pixels)}, expected a float tensor (images, "
                f"{', '.join(map(str, image))}), "
                "as the processor makes it",
                "pixel_values",
            )
    vocabulary = config.text.vocab_size
    low, high = ids.aminmax()
    if low < 0 or high >= vocabulary:
        raise UserError(
            f"{int(low)} to {int(high)}, expected ids from 0 to {vocabulary - 1}; "
            "the processor belongs to another model",
            "input_ids",
        )


def is_tensor(x: Any, ndim: int) -> bool:
    return isinstance(x, Tensor) and x.ndim == ndim


def describe(x: Any) -> str:
    return f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__


def check_length(config: LlavaConfig, tokens: int) -> None:
    """A sequence of `tokens` fits the context and the sliding window, or UserError."""
    text = config.text
    if tokens > text.max_position_embeddings:
        raise UserError(
            f"the sequence is {tokens} tokens long and the model's context is "
            f"{text.max_position_embeddings}; shorten the prompt, use fewer images or lower "
            "max_new_tokens"
        )
    if text.sliding_window is not None and tokens > text.sliding_window:
        raise UserError(
            f"the sequence is {tokens} tokens long, more than sliding_window "
            f"{text.sliding_window}, "
            "which is not implemented; shorten the prompt or lower max_new_tokens"
        )


def check_image_tokens(config: LlavaConfig, found: int, images: int | None) -> None:
    """The image tokens `found` are those of so many images (None: no pixels), or UserError."""
    if images is None:
        if found:
            raise UserError(
                "the prompt has image tokens and no images came; give the processor images=",
                "pixel_values",
            )
    elif found != images * config.tokens_per_image:
        raise UserError(
            f"{found} image tokens for {images} images of {config.tokens_per_image} each; "
            "let the processor make both",
            "input_ids",
        )


def check_batch(batch: Any, config: LlavaConfig) -> None:
    """`batch` is the processor's dict, with a real token in every row, or UserError."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise UserError(
            f"{type(batch).__name__} without input_ids, expected the dict that the processor makes",
            "batch",
        )
    mask = batch.get("attention_mask")
    check_inputs(config, batch["input_ids"], batch.get("pixel_values"), mask)
    if mask is not None and not mask.bool().any(-1).all():
        raise UserError("a row without a token; give every row a prompt", "input_ids")
