"""Parquet files with the pictures inside → raw records whose pictures are read when they are asked for.

Below record.py and records.py. The layout is that of HuggingFaceH4/llava-instruct-mix-vsft: a column `messages`, and
`images`, a list of {bytes, path}. pyarrow is imported when there is a file to read.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

from PIL import Image

from llava_min.cli import UserError, short
from llava_min.checks.image_file import MAX_BYTES, decode_image

BYTES, PATH = "images.list.element.bytes", "images.list.element.path"
MAX_GROUP = 2**30  # bytes of text in a row group, unpacked
DAMAGED = (OSError, ValueError, TypeError, LookupError, RuntimeError, MemoryError)  # pyarrow's own exceptions are kinds of these


@dataclass(frozen=True, slots=True)
class Embedded:
    """Picture `index` of a row of a parquet file."""

    path: Path
    group: int
    row: int  # in the group
    index: int

    def open(self, exif: bool) -> Image.Image:
        name = f"{self.path}: row group {self.group} row {self.row} picture {self.index}"
        try:
            data = row_pictures(open_parquet(self.path), self.group, self.row)[self.index]["bytes"]
        except DAMAGED as e:
            raise UserError(f"{name}: cannot be read ({short(e, 200)}); fetch the file again") from None
        return decode_image(data or b"", name, exif=exif)


def open_parquet(path: Path):
    stat = os.stat(path)
    return _open_parquet(path, os.getpid(), stat.st_mtime_ns, stat.st_size)  # a worker opens the file for itself


@lru_cache(maxsize=32)
def _open_parquet(path: Path, *_: int):
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow; pip install 'llava_min[parquet]'") from None
    return pq.ParquetFile(path, buffer_size=1 << 20)  # buffered: a group is read page by page, not whole


@lru_cache(maxsize=4)
def row_pictures(f, group: int, row: int) -> list[dict]:
    """[{"bytes"}] of one row. A row group is read from its start: small ones (100 rows, as datasets writes) are quick."""
    for found in islice(group_bytes(f, group), row, None):
        return found.as_py()
    raise LookupError("the row is gone")


def group_bytes(f, group: int) -> Iterator:
    """[{"bytes"}] of every row of a group, in pyarrow's form; a few rows are in memory at a time."""
    for batch in f.iter_batches(8, row_groups=[group], columns=[BYTES], use_threads=False):
        yield from batch.column(0)


def parquet_records(path: Path) -> Iterator[tuple[str, dict]]:
    """(where, row) with the pictures as `Embedded`, as the path of a picture whose bytes are null, or as None."""
    try:
        f = open_parquet(path)
        leaves = [f.schema.column(i).path for i in range(len(f.schema))]
        names = f.schema_arrow.names
        binary = lambda column: (column.physical_type, column.logical_type.type) == ("BYTE_ARRAY", "NONE")
        if "messages" not in names or "images" in names and not (
                {BYTES, PATH} <= set(leaves) and binary(f.schema.column(leaves.index(BYTES)))):
            raise UserError(f"{path}: has the columns {short(', '.join(leaves), 300)}; expected messages, and images as a "
                            "list of {bytes (binary), path (text)}, as HuggingFaceH4/llava-instruct-mix-vsft has them")
        n, others = 0, [name for name in names if name != "images"]
        for g in range(f.num_row_groups):
            check_group(path, f.metadata.row_group(g), g)
            rows = f.read_row_group(g, columns=others, use_threads=False).to_pylist()
            images = group_pictures(f, path, g, leaves) if "images" in names else [[]] * len(rows)
            for row, found in zip(rows, images, strict=True):
                yield f"row {n}", {**row, "images": found}
                n += 1
    except UserError:
        raise
    except OverflowError as e:
        raise UserError(f"{path}: a date or number is out of range ({short(e, 200)}); leave its column out, or correct it") from None
    except DAMAGED as e:
        raise UserError(f"{path}: is not whole or not parquet ({short(e, 200)}); fetch it again") from None


def check_group(path: Path, group, g: int) -> None:
    """What a row group says it unpacks to is bounded: text at once, pictures by the row."""
    text = pictures = 0
    for i in range(group.num_columns):
        column = group.column(i)
        if column.path_in_schema.startswith("images."):
            pictures += column.total_uncompressed_size
        else:
            text += column.total_uncompressed_size
    if text > MAX_GROUP or pictures > MAX_BYTES * max(group.num_rows, 1):
        raise UserError(f"{path}: row group {g} unpacks to {(text + pictures) >> 20} MiB, too much for {group.num_rows} "
                        "rows; write the file with smaller row groups")


def group_pictures(f, path: Path, g: int, leaves: list[str]) -> list[list]:
    """Per row of a group what its pictures are. Their bytes are not read, unless the file's own statistics say that some
    picture has none, or there are no statistics."""
    paths = f.read_row_group(g, columns=[PATH], use_threads=False).column(0).to_pylist()
    out = [[Embedded(path, g, row, i) for i in range(len(found or []))] for row, found in enumerate(paths)]
    counts = f.metadata.row_group(g).column(leaves.index(BYTES)).statistics
    nulls = counts.null_count if counts is not None and counts.has_null_count else math.inf
    if nulls > sum(not found for found in out):  # a row without pictures counts as a null
        for row, pictures in enumerate(group_bytes(f, g)):
            for i, picture in enumerate(pictures.as_py() or []):
                if picture is None or picture["bytes"] is None:
                    out[row][i] = paths[row][i] and paths[row][i]["path"]
    return out
