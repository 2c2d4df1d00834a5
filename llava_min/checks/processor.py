"""What a caller gives to the processor: prompts, images and ids that fit each other."""

import json
import re
from typing import Any

from PIL import Image

from llava_min.errors import UserError, shorten, warn

# ---- text


def check_prompts(prompts: Any, spaced: bool) -> None:
    """A non-empty list of prompts, none of them empty, or UserError. `spaced`: warn where USER: and
    ASSISTANT: have other spaces than LLaVA's templates.
    """
    is_list = isinstance(prompts, (list, tuple)) and all(isinstance(p, str) for p in prompts)
    if not is_list or not prompts:
        raise UserError("expected a string or a non-empty list of strings; fix the call", "prompts")
    for prompt in prompts:
        if not prompt.strip():
            raise UserError("is empty; write a question", "prompt")
        if spaced:
            warn_of_spacing(prompt)


def warn_of_spacing(prompt: str) -> None:
    """Other spacing gives other ids than the model was trained with."""
    right = re.sub(r"\bUSER:(?=\S)", "USER: ", prompt)
    right = re.sub(r"(?<=\S)(?<!</s>)\n?(?=ASSISTANT:)", " ", right)
    right = re.sub(r"ASSISTANT:\s+\Z", "ASSISTANT:", right)
    if right != prompt:
        show = json.dumps(right, ensure_ascii=False)
        warn(
            f"its spacing differs from what the model was trained with; right is {show[:1000]}",
            "prompt",
        )


def check_padding_side(side: Any) -> None:
    if side not in ("left", "right"):
        raise UserError(
            f"{shorten(side, 50)} was given, expected left or right; fix the call", "padding_side"
        )


def refuse_ids(ids: Any) -> None:
    """UserError for `ids` that are not one row of integers."""
    came = f"{tuple(ids.shape)}" if hasattr(ids, "shape") else type(ids).__name__
    raise UserError(f"{came}, expected one row of token ids; decode row by row", "ids") from None


# ---- the tokenizer


def check_image_token(known: int | None, image_token_id: int) -> None:
    """The tokenizer has `<image>` where the config says, or not at all."""
    if known not in (None, image_token_id):
        raise UserError(
            f"image_token_index: the config says {image_token_id}, the tokenizer has <image> "
            f"at {known}; correct the wrong one"
        )


def check_template_token(id: int | None, token: str, template: str) -> None:
    if id is None:
        raise UserError(
            f"{template} needs the token {token}, which this tokenizer does not have; choose "
            "another",
            "template",
        )


# ---- images


def check_sees(vision: Any, field: str) -> None:
    """The model takes images, or UserError. `vision`: its settings for them, or None."""
    if vision is None:
        raise UserError(
            "this is a language model without a vision tower; ask it without an image, or give "
            "a LLaVA",
            field,
        )


def check_image_list(images: Any) -> None:
    if not isinstance(images, (list, tuple)):
        raise UserError(
            f"{type(images).__name__}, expected a PIL image, a list, or a list of lists; "
            "open it first",
            "images",
        )


def check_one_place(held: list, images: Any) -> None:
    """Images are in the messages or beside them, not both."""
    if held and images is not None:
        raise UserError("came beside messages that hold images; give them in one place", "images")


def check_images(images: list, counts: list[int | None]) -> None:
    """PIL images, flat or a list per row, as many as the rows mark, or UserError.

    `counts`: how many images each row marks; None where it takes what it is given.
    """
    per_row = [isinstance(row, (list, tuple)) for row in images]
    if any(per_row):
        if len(images) != len(counts) or not all(per_row):
            raise UserError(
                f"{len(images)} lists for {len(counts)} prompts; give one per prompt", "images"
            )
        for i, (row, n) in enumerate(zip(images, counts)):
            check_pil(row)
            if n is not None:
                check_number(f"prompt {i} marks", n, len(row))
        return
    if any(n is not None for n in counts):
        who = "the prompts mark" if len(counts) > 1 else "the prompt marks"
        check_number(who, sum(n or 0 for n in counts), len(images))
    elif len(counts) > 1 and len(images) != len(counts):
        raise UserError(
            f"{len(images)} for {len(counts)} conversations that mark none; "
            "give a list per conversation",
            "images",
        )
    check_pil(images)


def check_pil(images: list) -> None:
    for image in images:
        if not isinstance(image, Image.Image):
            raise UserError(
                f"{type(image).__name__} among them, expected PIL images; open it first", "images"
            )


def check_number(who: str, marks: int, given: int) -> None:
    if marks != given:
        raise UserError(
            f"{given} given, but {who} {marks} with <image>; give one image for each mark",
            "images",
        )
