"""Files of a checkpoint that must agree with its config.json."""

from pathlib import Path
from typing import Any

from llava_min.checks.formats import kind
from llava_min.config import LlavaConfig
from llava_min.errors import UserError, escape_controls, label, shorten


def check_aspect(aspect: Any, known: dict) -> None:
    if aspect is not None and (not isinstance(aspect, str) or aspect not in known):
        raise UserError(
            f"{escape_controls(aspect)!r} is not pad or crop; choose one", "image_aspect_ratio"
        )


def check_image_size(size: int, config: LlavaConfig, path: Path) -> None:
    if size != config.vision.image_size:
        raise UserError(
            f"{path}: images are resized to {size} pixels but image_size in config.json "
            f"is {config.vision.image_size}; correct one of them"
        )


def check_tokenizer(known: int | None, tokens: int, config: LlavaConfig, folder: Path) -> None:
    """`known`: the id of <image> in the tokenizer; `tokens`: how many it has."""
    if known not in (None, config.image_token_id):
        raise UserError(
            f"{folder}: image_token_index is {config.image_token_id} in config.json but <image> "
            f"is {known} in the tokenizer; correct one of them"
        )
    if tokens > config.text.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer knows {tokens} tokens but vocab_size is "
            f"{config.text.vocab_size}; the tokenizer belongs to another model"
        )


def check_processor_config(found: dict, config: LlavaConfig, path: Path, original: str) -> None:
    """`original`: the key that must be true or false."""
    size, patch = config.vision.image_size, config.vision.patch_size
    # the second makes as many patches, and is what we write
    for key, *good in (
        ("patch_size", patch, size // (size // patch)),
        ("vision_feature_select_strategy", config.vision_feature_select_strategy),
    ):
        if found.get(key) not in (None, *good):
            raise UserError(
                f"{path}: {key} is {shorten(found[key])} but {good[0]} in config.json; "
                "correct one of them"
            )
    if not isinstance(found.get(original, False), bool):
        raise UserError(
            f"{path}: {original} is {shorten(found[original])}, expected true or false; correct it"
        )


def check_jinja(found: Any, path: Path) -> None:
    """The `chat_template` of the file `path` is text, or absent."""
    if not isinstance(found, (str, type(None))):
        raise UserError(
            f"{path}: chat_template is {kind(found)}, expected text; correct or remove it, or say "
            f"which template with {label('template')}"
        )


def check_named_jinja(found: list, path: Path) -> None:
    """Each has a name, and one is the default."""
    names = [x.get("name") if isinstance(x, dict) and "template" in x else None for x in found]
    if None in names or "default" not in names:
        raise UserError(
            f"{path}: chat_template is {shorten(found, 100)}, expected a list of objects with name "
            "and template, one of them default; correct or remove it, or say which template with "
            f"{label('template')}"
        )
