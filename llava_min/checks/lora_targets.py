"""Targets of LoRA that name no layer, or one that cannot have it; a rank that is none."""

import re
from collections.abc import Collection

from llava_min.config import LINEARS
from llava_min.errors import UserError, shorten


def check_leaf_names(targets: Collection[str], leaves: Collection[str]) -> None:
    """Each of `targets` is among `leaves`, the language model's."""
    if absent := [name for name in targets if name not in leaves]:
        raise UserError(
            f"{absent[0]!r} names no linear layer of the language model; there are "
            f"{', '.join(LINEARS)}, all-linear, or one regex on whole module paths",
            "lora_targets",
        )


def check_one_regex(targets: tuple[str, ...]) -> str:
    """The one regex that `targets` has."""
    if len(targets) > 1:
        raise UserError(
            f"{shorten(', '.join(targets), 400)} is neither names alone nor one regex; put | "
            "between the parts of a regex, and no comma",
            "lora_targets",
        )
    try:
        re.compile(targets[0])
    except re.error as e:
        raise UserError(
            f"{shorten(targets[0], 400)!r} is not a regex ({e}); correct it", "lora_targets"
        ) from None
    return targets[0]


def check_matched(
    regex: str, paths: Collection[str], is_tied: bool, examples: tuple[str, str]
) -> None:
    """`regex` matches some `paths`, and no head that is tied to the embedding."""
    if "lm_head" in paths and is_tied:
        raise UserError(
            "lm_head is tied to the embedding in this model and cannot be adapted by itself; "
            "leave it out",
            "lora_targets",
        )
    if not paths:
        raise UserError(
            f"{shorten(regex, 400)!r} matches no linear layer in full; the path of one is "
            f"{examples[0]} or {examples[1]}",
            "lora_targets",
        )


def check_rank(rank: int, width: int) -> None:
    """`rank` is not above the language model's width."""
    if rank > width:
        raise UserError(
            f"{rank} is above the model's width of {width}, where an update is no longer of low "
            "rank; lower it",
            "lora_r",
        )
