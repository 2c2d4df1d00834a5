"""Files that are on the disk, as they were meant, when the call returns: synced and read back.

What a checkpoint consists of: JSON, and safetensors written one tensor at a time.
"""

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPE_NAMES = {  # as safetensors spells them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
DTYPES_BY_NAME = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def raw_bytes(x: Tensor) -> memoryview:
    return memoryview(x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def write(path: Path, *parts: bytes | Tensor) -> str:
    """Write the parts one after the other, sync, and read back; returns their sha256.

    Only one tensor at a time is on the CPU.
    """
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in parts:
            data = raw_bytes(part) if isinstance(part, Tensor) else part
            file.write(data)
            digest.update(data)
        file.flush()
        os.fsync(file.fileno())
    if sha256(path) != digest.hexdigest():
        raise OSError(0, "what was read back is not what was written", str(path))
    return digest.hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a safetensors file; returns its sha256."""
    header, end = {}, 0
    for name, x in tensors.items():
        offsets = [end, end + x.nbytes]
        dtype = DTYPE_NAMES[x.dtype]
        header[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": offsets}
        end += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return write(path, struct.pack("<Q", len(text)), text, *tensors.values())


def as_json(data: Any) -> bytes:
    return json.dumps(data, indent=1).encode() + b"\n"


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
