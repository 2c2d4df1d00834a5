"""A parquet file that is damaged, too large to read by the row group, or has other columns."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_min.checks.image_file import MAX_BYTES
from llava_min.errors import UserError, shorten

MAX_GROUP = 2**30  # bytes of text in a row group, unpacked
# pyarrow's own exceptions are kinds of these
DAMAGED = (OSError, ValueError, TypeError, LookupError, RuntimeError, MemoryError)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within, what pyarrow raises is a UserError."""
    try:
        yield
    except UserError:
        raise
    except OverflowError as e:
        raise UserError(
            f"{path}: a date or number is out of range ({shorten(e, 200)}); leave its column out, "
            "or correct it"
        ) from None
    except DAMAGED as e:
        raise UserError(
            f"{path}: is not whole or not parquet ({shorten(e, 200)}); fetch it again"
        ) from None


def refuse_columns(path: Path, columns: dict[str, Any]) -> None:
    """`columns`: image or images or both -> its type, as arrow has it."""
    found = " and ".join(f"{name}, {type}" for name, type in columns.items())
    raise UserError(
        f"{path}: has {shorten(found, 300)}; expected image or images, not both, as struct<bytes: "
        "binary, path: string>, as binary, or as a list of them; write the column so"
    ) from None


def check_group(path: Path, group: Any, g: int, column: str | None) -> None:
    """Row group `g` does not unpack to too much: its text is read at once, the images of `column`
    by the row.
    """
    text = images = 0
    for i in range(group.num_columns):
        chunk = group.column(i)
        if column is not None and chunk.path_in_schema.split(".")[0] == column:
            images += chunk.total_uncompressed_size
        else:
            text += chunk.total_uncompressed_size
    if text > MAX_GROUP or images > MAX_BYTES * max(group.num_rows, 1):
        raise UserError(
            f"{path}: row group {g} unpacks to {(text + images) >> 20} MiB, too much for "
            f"{group.num_rows} rows; write the file with smaller row groups"
        )
