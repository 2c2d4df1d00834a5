"""Records that are too long for a row: refused, or reported when they are shortened."""

from collections.abc import Sequence

from llava_min.errors import UserError, preview, warn


def refuse_long(long: Sequence[str], records: int, max_length: int) -> None:
    """UserError that names those `long` of the `records`."""
    raise UserError(
        f"{len(long)} of {records} records have more than {max_length} tokens: "
        f"{preview(long, ', ')}; raise it, to the model's context at most, or shorten or remove "
        "them",
        "max_length",
    )


def refuse_beyond_context(long: Sequence[str], records: int, context: int) -> None:
    """UserError that names those `long` of the `records`, where there is no max_length to raise."""
    raise UserError(
        f"{len(long)} of {records} records have more tokens than the context of {context}: "
        f"{preview(long, ', ')}; shorten or remove them",
        "data",
    )


def report_shortened(
    cut: Sequence[str], dropped: Sequence[str], records: int, max_length: int
) -> None:
    """Warn of the records that lost turns and of those that are left out."""
    if cut:
        warn(
            f"{len(cut)} of {records} records lost their last turns: {preview(cut, ', ')}; "
            f"a row holds {max_length} tokens",
            "max_length",
        )
    if dropped:
        warn(
            f"{len(dropped)} of {records} records are left out, as a single turn of theirs is "
            f"longer: {preview(dropped, ', ')}; a row holds {max_length} tokens",
            "max_length",
        )
