"""Parquet files with images inside -> raw records; an image is read when it is asked for.

For data/records.py, beside json_file.py. A column `image` or `images` holds images: {bytes, path},
as `datasets` writes it, or bytes alone; one or a list of them. The types tell which, as every
writer names the elements of a list differently. The other columns are the raw record. pyarrow is
imported when there is a file to read.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

from PIL import Image

from llava_min.checks.image_file import decode_image
from llava_min.checks.parquet import DAMAGED, check_group, reading, refuse_columns
from llava_min.errors import UserError, shorten

NAMES = ("images", "image")
BINARY = ("binary", "large_binary", "binary_view")
TEXT = ("string", "large_string", "string_view")
NULL = ("null",)  # of a field that has no value in the whole file
ODD = ("fixed_size_binary", "uint8", "int8")  # as which bytes are not read
LISTS = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")


@dataclass(frozen=True, slots=True)
class Embedded:
    """Image `index` of a row of a parquet file."""

    path: Path
    group: int
    row: int  # in the group
    index: int

    def open(self, exif: bool) -> Image.Image:
        name = f"{self.path}: row group {self.group} row {self.row} image {self.index}"
        try:
            data = row_images(open_parquet(self.path), self.group, self.row)[self.index]
        except DAMAGED as e:
            raise UserError(
                f"{name}: cannot be read ({shorten(e, 200)}); fetch the file again"
            ) from None
        return decode_image(data or b"", name, exif=exif)


def open_parquet(path: Path):
    stat = os.stat(path)
    # a worker opens the file for itself
    return _open_parquet(path, os.getpid(), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=32)
def _open_parquet(path: Path, *_: int):
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(
            f"{path}: reading parquet needs pyarrow; pip install 'llava_min[parquet]'"
        ) from None
    # buffered: a group is read page by page, not whole
    return pq.ParquetFile(path, buffer_size=1 << 20)


# ---- where the images are


@dataclass(frozen=True, slots=True)
class Column:
    """The column of the images. `bytes`, `path`: its leaves, as the file names them
    (`images.list.element.bytes`).
    """

    name: str
    many: bool  # a list in every row
    bytes: str
    path: str | None

    def images(self, value: object) -> list:
        """The leaf (bytes or path) of each image in a row's value, or None."""
        values = value if self.many else [] if value is None else [value]
        return [next(iter(v.values()), None) if isinstance(v, dict) else v for v in values or []]


@lru_cache(maxsize=32)
def image_column(f) -> Column | None:
    """None if no column holds the bytes of images. Raises LookupError if two do, or one does in an
    unknown way.
    """
    found = [name for name in NAMES if name in f.schema_arrow.names]
    columns = [c for name in found if (c := column_of(f, name, f.schema_arrow.field(name).type))]
    if len(columns) > 1:
        raise LookupError("both image and images")
    return columns[0] if columns else None


def column_of(f, name: str, type) -> Column | None:
    kind = lambda type: str(type).split("<")[0].split("[")[0]
    many = kind(type) in LISTS
    type = type.value_type if many else type
    paths = [f.schema.column(i).path for i in range(len(f.schema))]
    leaves = [p for p in paths if p == name or p.startswith(name + ".")]
    # the shortest, as a field beside it may have fields of that name
    leaf = lambda key: min((p for p in leaves if p.endswith("." + key)), key=len)
    if kind(type) in BINARY:
        return Column(name, many, leaves[0], None)
    inner = type.value_type if kind(type) in (*LISTS, "dictionary") else type
    if kind(inner) in (ODD if inner is type else ODD + BINARY):
        raise LookupError(name)
    if kind(type) != "struct":
        return None  # paths, or what no record may have
    fields = {field.name: kind(field.type) for field in type}
    if "bytes" not in fields and fields.get("path") in TEXT:
        return None
    if fields.get("bytes") not in BINARY + NULL or fields.get("path", TEXT[0]) not in TEXT + NULL:
        raise LookupError(name)
    return Column(name, many, leaf("bytes"), leaf("path") if "path" in fields else None)


# ---- what is in them


@lru_cache(maxsize=4)
def row_images(f, group: int, row: int) -> list[bytes | None]:
    """The image files of one row. A row group is read from its start, so small ones (100 rows, as
    `datasets` writes) are quick.
    """
    for found in islice(group_bytes(f, group), row, None):
        return found
    raise LookupError("the row is gone")


def group_bytes(f, group: int) -> Iterator[list[bytes | None]]:
    """The image files of every row of a group; a few rows are in memory at a time."""
    column = image_column(f)
    for batch in f.iter_batches(8, row_groups=[group], columns=[column.bytes], use_threads=False):
        for value in batch.column(0):
            yield column.images(value.as_py())


def parquet_records(path: Path) -> Iterator[tuple[str, dict]]:
    """(where, row) with the images as `Embedded`, as the path of an image whose bytes are null, or
    as None.
    """
    with reading(path):
        f = open_parquet(path)
        try:
            column = image_column(f)
        except LookupError:
            refuse_columns(path, {x.name: x.type for x in f.schema_arrow if x.name in NAMES})
        names = f.schema_arrow.names
        n, others = 0, [name for name in names if column is None or name != column.name]
        for g in range(f.num_row_groups):
            check_group(path, f.metadata.row_group(g), g, column and column.name)
            rows = f.read_row_group(g, columns=others, use_threads=False).to_pylist()
            images = group_images(f, path, g, column) if column else [None] * len(rows)
            for row, found in zip(rows or [{}] * len(images), images, strict=True):
                if column:
                    row = {**row, column.name: found if column.many else next(iter(found), None)}
                yield f"row {n}", row
                n += 1


def group_images(f, path: Path, g: int, column: Column) -> list[list]:
    """The images of each row of a group.

    Where images have paths, the bytes are read only if some are null by the file's statistics, or
    if there are none.
    """
    rows = f.metadata.row_group(g).num_rows
    paths, nulls = [None] * rows, math.inf
    if column.path:
        values = f.read_row_group(g, columns=[column.path], use_threads=False).column(0).to_pylist()
        paths = [column.images(value) for value in values]
        nulls = bytes_that_are_null(f, g, column)
        if nulls <= sum(not found for found in paths):  # a row without images counts as a null
            return [
                [Embedded(path, g, row, i) for i in range(len(found))]
                for row, found in enumerate(paths)
            ]
    return [
        [
            Embedded(path, g, row, i) if data is not None else names and names[i]
            for i, data in enumerate(found)
        ]
        for row, (found, names) in enumerate(zip(group_bytes(f, g), paths, strict=True))
    ]


def bytes_that_are_null(f, g: int, column: Column) -> float:
    group = f.metadata.row_group(g)
    chunks = map(group.column, range(group.num_columns))
    counts = next(c for c in chunks if c.path_in_schema == column.bytes).statistics
    return counts.null_count if counts is not None and counts.has_null_count else math.inf
