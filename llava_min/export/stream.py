"""Safetensors written tensor by tensor.

safetensors' own writer wants every tensor of a file in memory at once. The format is eight bytes, a
JSON header that gives each tensor its place, and the bytes
(https://github.com/huggingface/safetensors#format).
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from llava_min.checks.weights import check_part
from llava_min.export import disk
from llava_min.export.memory import PAGE
from llava_min.fast.cpu_linear import unpacked
from llava_min.names import to_layout
from llava_min.util.files import write_json, writing

SHARD_BYTES = 5 << 30
CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"}
CODES |= {torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32"}
CODES |= {torch.int64: "I64", torch.float64: "F64", torch.float8_e4m3fn: "F8_E4M3"}
Read = Callable[[str, torch.dtype], Tensor]  # our name, dtype -> the whole tensor, on the CPU
Item = TypeVar("Item")
Sums = dict[str, int]  # our name -> checksum of the tensor's bytes


@dataclass(frozen=True)
class Row:
    """A tensor to be written."""

    name: str  # ours
    written: str  # in the file
    shape: torch.Size
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def checksum(x: Tensor) -> int:
    """Of a tensor's bytes: the sum of each page's words, times an odd number of that page's own.

    Every changed word changes it, and pages that change places do. It takes a tenth of crc32's
    time, which is longer than a disk's.
    """
    data = x.contiguous().view(-1).view(torch.uint8)
    end = len(data) - len(data) % PAGE
    pages = data[:end].view(torch.int64).view(-1, PAGE // 8).sum(1)
    rest = data[end:].long()
    total = sum((x * (2 * torch.arange(len(x)) + 1)).sum() for x in (pages, rest))
    return int(total)


def shards(rows: Iterable[Row]) -> list[list[Row]]:
    """In groups of at most SHARD_BYTES, in order; a larger tensor has one of its own."""
    groups, room = [[]], SHARD_BYTES
    for row in rows:
        if groups[-1] and row.size > room:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(row)
        room -= row.size
    return groups


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, torch has one thread here: two that wait for one another at the end of every piece
    are slower than the disk.
    """
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n)


@contextmanager
def reader_threads(count: int = 1) -> Iterator[ThreadPoolExecutor]:
    """Threads that read ahead, torch with one thread in each, and in this one."""
    threads = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    with one_thread(), threads as pool:
        yield pool


def ahead(make: Callable[[Item], Tensor], items: Iterable[Item]) -> Iterator[tuple[Item, Tensor]]:
    """Each item with what is made of it, two at a time in threads, while one before is used."""
    with reader_threads(2) as pool:
        coming = deque()
        for item in items:
            coming.append((item, pool.submit(make, item)))
            if len(coming) > 2:
                done, future = coming.popleft()
                yield done, future.result()
        for done, future in coming:
            yield done, future.result()


def write_file(path: Path, rows: list[Row], read: Read, sums: Sums | None = None) -> None:
    """Write a file of `rows`, each tensor when it is read; checksums go to `sums`.

    Raises UserError where the file cannot be written.
    """
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for row in rows:
        end = at + row.size
        place = {"dtype": CODES[row.dtype], "shape": list(row.shape), "data_offsets": [at, end]}
        header[row.written], at = place, end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # so that the tensors are aligned
    head = len(head).to_bytes(8, "little") + head
    with writing(path), disk.writer(path) as f:
        f.write(np.frombuffer(head, np.uint8))
        for row, x in ahead(lambda row: read(row.name, row.dtype), rows):
            assert x.shape == row.shape and x.dtype == row.dtype, row.name
            f.write(x.contiguous().view(-1).view(torch.uint8).numpy())
            if sums is not None:
                sums[row.name] = checksum(x)


def write_shards(folder: Path, rows: list[Row], read: Read, sums: Sums | None = None) -> None:
    """`write_file` in as many files as it takes, with the index that transformers reads."""
    groups, names = shards(rows), ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    for name, group in zip(names, groups):
        write_file(folder / name, group, read, sums)
    if len(groups) > 1:
        places = {row.written: file for file, group in zip(names, groups) for row in group}
        index = {"metadata": {"total_size": sum(r.size for r in rows)}, "weight_map": places}
        write_json(folder / "model.safetensors.index.json", index)


def save_weights(
    state: dict[str, Tensor], folder: Path, dtype: torch.dtype | None = None, layout: str = "hf"
) -> None:
    """Write tensors under our names to `folder`, in shards of at most SHARD_BYTES.

    layout: a column of names.py; every reader accepts "hf". Raises UserError where the layout has
    no place for a tensor, or the disk is full.
    """
    rows = []
    for name, x in state.items():
        written = to_layout(name, layout)
        check_part(name, written, layout)
        rows.append(Row(name, written, x.shape, dtype or x.dtype))
    write_shards(folder, rows, lambda name, dtype: unpacked(state[name].detach()).to("cpu", dtype))
