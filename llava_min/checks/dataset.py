"""Records that are too long for a row: refused, or reported when they are shortened."""

from collections.abc import Sequence

from llava_min.errors import UserError, preview, warn


def refuse_long(long: Sequence[str], records: int, max_length: int) -> None:
    """UserError that names those `long` of the `records`."""
    raise UserError(
        f"{len(long)} of {records} records have more than {max_length} tokens: "
        f"{preview(long, ', ')}; raise it, or shorten or remove them",
        "max_length",
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
