"""Safetensors written tensor by tensor, and read back to prove them.

safetensors' own writer wants every tensor of a file in memory at once. The format is eight bytes, a
JSON header that gives each tensor its place, and the bytes
(https://github.com/huggingface/safetensors#format).
"""

import json
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from llava_min.errors import UserError
from llava_min.export.tensors import Read
from llava_min.tensors import TensorInfo
from llava_min.util.files import write_json
from llava_min.weights import SHARD_BYTES, Reader

CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def as_bytes(x: Tensor) -> memoryview:
    return memoryview(x.contiguous().view(-1).view(torch.uint8).numpy())


def shards(sizes: dict[str, int], limit: int = SHARD_BYTES) -> list[list[str]]:
    """Names in groups of at most `limit` bytes, in order; a larger tensor has one of its own."""
    groups, room = [[]], limit
    for name, size in sizes.items():
        if groups[-1] and size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def write_file(
    path: Path, tensors: Iterable[tuple[str, str, torch.Size]], read: Read, dtype: torch.dtype
) -> dict[str, int]:
    """Write (our name, name in the file, shape) of `tensors`, each when it is read.

    Returns our name -> checksum of its bytes.
    """
    tensors, header, at, sums = list(tensors), {"__metadata__": {"format": "pt"}}, 0, {}
    for _, theirs, shape in tensors:
        end = at + shape.numel() * dtype.itemsize
        header[theirs] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # so that the tensors are aligned
    with open(path, "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for ours, _, shape in tensors:
            x = read(ours, dtype)
            assert x.shape == shape and x.dtype == dtype, ours
            data = as_bytes(x)
            f.write(data)
            sums[ours] = zlib.crc32(data)
    return sums


def write_shards(
    folder: Path,
    tensors: list[tuple[str, str, torch.Size]],
    read: Read,
    dtype: torch.dtype,
) -> dict[str, int]:
    """`write_file` in as many files as it takes, with the index that transformers reads."""
    sizes = {ours: shape.numel() * dtype.itemsize for ours, _, shape in tensors}
    rows, groups, sums = {t[0]: t for t in tensors}, shards(sizes), {}
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    for name, group in zip(names, groups):
        sums |= write_file(folder / name, [rows[ours] for ours in group], read, dtype)
    if len(groups) > 1:
        places = {rows[ours][1]: file for file, group in zip(names, groups) for ours in group}
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places},
        )
    return sums


def check_sums(entries: dict[str, TensorInfo], sums: dict[str, int], dtype: torch.dtype) -> None:
    """What our reader finds in the files just written is, tensor for tensor, what was meant."""
    reader = Reader()
    for name, right in sums.items():
        x = torch.empty(entries[name].shape, dtype=dtype)
        reader.fill(x, entries[name])
        if zlib.crc32(as_bytes(x)) != right:
            raise UserError(
                f"{entries[name]}: reads back otherwise than it was written; "
                "check the disk, and write it again"
            )
