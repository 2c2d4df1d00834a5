"""The tensors in a checkpoint's files, safetensors or `.bin`: listed under our names, and written.

`names.py` translates the names of every published layout; `checks/weights.py` accounts for every
tensor before the first is read. Format: https://huggingface.co/docs/safetensors
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llava_min.checks.weights import check_index, check_is_table, check_known, check_once
from llava_min.config import LlavaConfig
from llava_min.errors import UserError, escape_controls
from llava_min.hub import find_files, find_tower
from llava_min.names import to_ours
from llava_min.util.files import check_file

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOATS |= {str(dtype): dtype for dtype in FLOATS.values()}  # as safetensors and `.bin` call them
# tensors that are not weights: tables that code recomputes, and what a CLIP has beside its tower
RECOMPUTED = re.compile(r"(.*\.)?(inv_freq|position_ids)|model\.image_newline")
CLIP_REST = re.compile(r".*\.position_ids|text_model\..*|(visual|text)_projection\..*|logit_scale")


def open_file(path: Path) -> Any:
    """The tensors of a weight file by name, not read yet. Raises UserError if it is damaged."""
    check_file(path)
    try:
        if path.suffix != ".bin":
            return safe_open(path, framework="pt")
        # CLIP and Vicuna are published as `.bin`; weights_only refuses anything but tensors
        table = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # both readers raise many kinds for damaged files
        if "allocate memory" in str(e):
            raise UserError(f"{path}: there is not enough memory to open it; free some") from None
        pickled = path.suffix == ".bin"
        why = "not a table of tensors as torch saves it" if pickled else escape_controls(e)[:200]
        raise UserError(
            f"{path}: damaged or not a weight file ({why}); download it again"
        ) from None
    check_is_table(table, path)
    return table


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file, not read yet."""

    path: Path
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str  # as the file calls it
    start: int | None = None  # its first byte in the file; None in a `.bin`

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None for what is not a float of 16 bits or more."""
        return FLOATS.get(self.dtype)

    @property
    def quantized(self) -> str:
        """The file's name of a storage in few bits that is undone as it is read, or ""."""
        return ""

    def open(self) -> Any:
        return open_file(self.path)

    def rows(self, file: Any, first: int, end: int) -> Tensor:
        """Rows first to end as they are stored, from what `open` gives."""
        return (file[self.name] if self.start is None else file.get_slice(self.name))[first:end]

    def __str__(self) -> str:
        return f"{self.path}: {escape_controls(self.name)[:200]}"


def list_tensors(path: Path) -> Iterator[TensorInfo]:
    """The tensors of a file; none is read."""
    file = open_file(path)
    if path.suffix == ".bin":
        for name, x in file.items():
            yield TensorInfo(path, name, tuple(x.shape), str(x.dtype))
        return
    # safe_open has checked this header: lengths, order, no gap, no overlap
    with open(path, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
    header.pop("__metadata__", None)
    for name, info in header.items():
        start = 8 + size + info["data_offsets"][0]
        yield TensorInfo(path, name, tuple(info["shape"]), info["dtype"], start)


def read_entries(folder: Path, ignored: re.Pattern = RECOMPUTED) -> dict[str, TensorInfo]:
    """Our name -> TensorInfo, for every tensor of a folder's weight files, but those `ignored`.

    Raises UserError for a name that is no part of a LLaVA, a tensor that is there twice, and shards
    that are not as their index says.
    """
    entries, unknown, file_of = {}, [], {}
    paths, index, shards = find_files(folder)
    for path in paths:
        for info in list_tensors(path):
            if ignored.fullmatch(info.name):
                continue
            file_of[info.name] = path.name
            ours = to_ours(info.name)
            if ours is None:
                unknown.append(info.name)
                continue
            check_once(info, entries.get(ours))
            entries[ours] = info
    check_known(unknown, folder)
    if index:
        listed = {name: file for name, file in shards.items() if not ignored.fullmatch(name)}
        check_index(index, listed, file_of)
    return entries


def collect_entries(
    folder: Path, config: LlavaConfig, clip_folder: Path | None
) -> dict[str, TensorInfo]:
    """Our name -> TensorInfo; a tower that is not in the folder's files is its CLIP folder's."""
    entries = read_entries(folder)
    if config.vision_source and not any(name.startswith("vision_tower.") for name in entries):
        entries |= read_entries(clip_folder or find_tower(folder, config.vision_source), CLIP_REST)
    return entries


def stored_rows(config: LlavaConfig) -> dict[str, int]:
    """The original's vocabulary lacks the rows that LlavaConfig adds for <image> and <pad>."""
    if not config.vision_source:
        return {}
    vocabulary = ("language_model.embed_tokens.weight", "lm_head.weight")
    return dict.fromkeys(vocabulary, config.image_token_id)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one safetensors file. Raises UserError where it cannot be written."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as e:  # safetensors reports a full disk so, and not as OSError
        why = escape_controls(e)[:200]
        raise UserError(
            f"{path}: cannot be written ({why}); free space or give another path"
        ) from None
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)  # save_file leaves 0600, which a group cannot read
