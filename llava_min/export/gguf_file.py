"""A GGUF file's header, and its tensors a run of rows at a time.

Magic, version, counts, then keys with values and the tensors' names, shapes, types and places
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Nothing that the file says of a length
is believed before it is held against what is left of it, so a damaged one is one line and not all
of the memory; and a vocabulary of 150,000 words is read in a tenth of a second.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from llava_min.errors import UserError, shorten
from llava_min.export.gguf_names import import_gguf, split_halves
from llava_min.tensors import FLOATS, TensorInfo
from llava_min.util.files import check_file

MOST_HEADER = 64 << 20  # bytes; those of the largest vocabularies have 16 MiB
# a value's type in the file -> struct's letter
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class Damaged(Exception):
    """What is wrong with a file, for a message that names it."""


@dataclass(frozen=True)
class GGUFTensor(TensorInfo):
    """A tensor of a GGUF file. One of whole numbers and scales is read as fp32; `start` is None for
    it, as for one whose rows are not in our order.
    """

    kind: str = "F32"  # ggml's name of its type
    place: int = 0  # its first byte in the file
    row_bytes: int = 0
    head: int = 0  # rows of a head whose rotary pairs neighbours, 0: the rows are in our order

    @property
    def quantized(self) -> str:
        return "" if self.kind in FLOATS else self.kind

    def open(self) -> BinaryIO:
        return open(self.path, "rb")

    def rows(self, file: BinaryIO, first: int, end: int) -> Tensor:
        if len(self.shape) == 1:
            return self._stored(file, 0, 1)[0, first:end]
        if not self.head:
            return self._stored(file, first, end)
        low, high = first // self.head, -(-end // self.head)  # whole heads
        x = self._stored(file, low * self.head, high * self.head)
        return split_halves(x, high - low)[first - low * self.head :][: end - first]

    def _stored(self, file: BinaryIO, first: int, end: int) -> Tensor:
        gguf = import_gguf()
        file.seek(self.place + first * self.row_bytes)
        data = np.frombuffer(file.read((end - first) * self.row_bytes), np.uint8)
        if data.nbytes != (end - first) * self.row_bytes:
            raise UserError(f"{self} ends early; download the file again")
        x = gguf.dequantize(data.reshape(end - first, -1), gguf.GGMLQuantizationType[self.kind])
        return torch.from_numpy(np.array(x)).view(end - first, *(self.shape[1:] or self.shape))


class Cursor:
    """Reads a header; Damaged where the file has less than is asked for."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size, self.position = file, size, 0

    def take(self, n: int, what: str) -> bytes:
        if n > self.size - self.position:
            raise Damaged(f"it ends in {what}")
        if n > MOST_HEADER - self.position:
            raise Damaged(f"{what} ends beyond {MOST_HEADER >> 20} MiB")
        self.position += n
        return self.file.read(n)

    def number(self, letter: str, what: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(letter), what))[0]

    def text(self, what: str) -> str:
        try:
            return self.take(self.number("Q", what), what).decode()
        except UnicodeDecodeError:
            raise Damaged(f"{what} is not UTF-8") from None

    def value(self, key: str) -> Any:
        kind = self.number("I", key)
        if kind == STRING:
            return self.text(key)
        if kind != ARRAY:
            return self.number(self.letter(kind, key), key)
        kind, n = self.number("I", key), self.number("Q", key)
        if kind == STRING:
            self.check_left(8 * n, key)
            return [self.text(key) for _ in range(n)]
        letter = self.letter(kind, key)
        data = self.take(n * struct.calcsize(letter), key)
        return np.frombuffer(data, np.dtype(letter).newbyteorder("<")).tolist()

    def letter(self, kind: int, key: str) -> str:
        if kind not in SCALARS:
            raise Damaged(f"{key} has a value of type {kind}")
        return SCALARS[kind]

    def check_left(self, n: int, what: str) -> None:
        if n > min(self.size, MOST_HEADER) - self.position:
            raise Damaged(f"it ends in {what}")


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Metadata and tensors, by the file's names. Raises UserError, which says what is damaged."""
    import_gguf()
    check_file(path)
    size = path.stat().st_size
    try:
        with open(path, "rb") as f:
            return parse(Cursor(f, size), path, size)
    except Damaged as e:
        raise UserError(
            f"{path}: damaged or not a GGUF file ({shorten(e, 200)}); download it again"
        ) from None


def parse(c: Cursor, path: Path, size: int) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    if c.take(4, "the magic number") != b"GGUF":
        raise Damaged("it does not begin with GGUF")
    version = c.number("I", "the version")
    if version not in (2, 3):
        raise Damaged(f"version {version}, expected 2 or 3, little-endian")
    tensors, keys = c.number("Q", "the counts"), c.number("Q", "the counts")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = c.text("the metadata")
        if key in metadata:
            raise Damaged(f"{key} stands twice")
        metadata[key] = c.value(key)
    infos = [tensor_info(c) for _ in range(tensors)] if fits(c, tensors) else []
    step = metadata.get("general.alignment", 32)
    if not isinstance(step, int) or step < 1 or step & (step - 1):
        raise Damaged(f"general.alignment is {step}, expected a power of two")
    start, found = -(-c.position // step) * step, {}
    for name, shape, type, offset in infos:
        if name in found:
            raise Damaged(f"tensor {name} stands twice")
        found[name] = placed(path, name, shape, type, start + offset, size)
    return metadata, found


def fits(c: Cursor, tensors: int) -> bool:
    c.check_left(24 * tensors, f"the list of {tensors} tensors")
    return True


def tensor_info(c: Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = c.text("a tensor's name")
    n = c.number("I", name)
    if not 1 <= n <= 4:
        raise Damaged(f"tensor {name} has {n} dimensions")
    shape = tuple(reversed([c.number("Q", name) for _ in range(n)]))
    return name, shape, c.number("I", name), c.number("Q", name)


def placed(
    path: Path, name: str, shape: tuple[int, ...], type: int, place: int, size: int
) -> GGUFTensor:
    gguf = import_gguf()
    try:
        type = gguf.GGMLQuantizationType(type)
        block, block_bytes = gguf.GGML_QUANT_SIZES[type]
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), type)
    except (ValueError, NotImplementedError):
        raise UserError(
            f"{path}: {shorten(name)} is of type {shorten(type)}, which the package gguf cannot "
            "undo; update it, or give the model in another type"
        ) from None
    if shape[-1] % block or not math.prod(shape):
        raise Damaged(f"tensor {name} of {type.name} has the shape {list(shape)}")
    stored = math.prod(shape) // block * block_bytes
    if place + stored > size:
        raise Damaged(f"tensor {name} ends at byte {place + stored}, the file at {size}")
    is_float = type.name in FLOATS
    return GGUFTensor(
        path, name, shape, type.name if is_float else "F32", place if is_float else None,
        kind=type.name, place=place, row_bytes=stored // (shape[0] if len(shape) > 1 else 1),
    )  # fmt: skip
