"""Weights in and out of a model, piece by piece.

layouts.py says where each tensor stands. A model is built on the meta device and its tensors are
read some rows at a time, so the peak is the model itself, whatever the dtype asked; of a model that
is split over processes, each reads the rows it keeps.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from llava_min.errors import UserError, escape_controls
from llava_min.fast.cpu_linear import unpacked
from llava_min.layouts import FLOATS, Entry, open_file
from llava_min.names import to_layout
from llava_min.parallel.dtensor import is_sharded, local_rows, local_shard
from llava_min.util.files import write_json

# elements read at once: they stay in a core's cache while they are checked and converted
PIECE = 1 << 19
# bytes read of a `.bin` through one mapping: its pages count as ours until it is closed
REOPEN = 32 << 20
SHARD_BYTES = 5 << 30
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def row_ranges(entry: Entry, first: int, end: int) -> Iterator[tuple[int, int]]:
    """(first, end) of runs of rows that hold about PIECE elements, or one row."""
    step = max(1, PIECE // math.prod(entry.shape[1:]))
    return ((row, min(row + step, end)) for row in range(first, end, step))


class Reader:
    """Rows of tensors out of their files, about PIECE elements at a time; one file is open at a
    time.
    """

    def __init__(self):
        self.path, self.file, self.mapped = None, None, 0
        self.buffers: dict[torch.dtype, Tensor] = {}

    def buffer(self, shape: torch.Size, dtype: torch.dtype, pinned: bool = False) -> Tensor:
        """Memory to use until the next call for the same dtype; new memory each time would take
        twice as long.
        """
        size = math.prod(shape)
        if dtype not in self.buffers or self.buffers[dtype].numel() < size:
            self.buffers[dtype] = torch.empty(max(size, PIECE), dtype=dtype, pin_memory=pinned)
        return self.buffers[dtype][:size].view(shape)

    def open(self, path: Path):
        if path != self.path or self.mapped > REOPEN:
            self.path, self.file, self.mapped = path, None, 0  # closed before it is opened again
            self.file = open_file(path) if path.suffix == ".bin" else open(path, "rb", buffering=0)
        return self.file

    def fill(self, out: Tensor, entry: Entry, first: int = 0) -> None:
        """Read into `out`, in its dtype and on its device, the rows of `entry` from `first` on, as
        many as `out` has.

        Raises UserError for a value that is not finite in that dtype.
        """
        for row, end in row_ranges(entry, first, first + len(out)):
            part = out[row - first : end - first]
            if entry.start is None:
                stored = self.open(entry.path)[entry.name][row:end]
                self.mapped += stored.nbytes
                part.copy_(stored)
                del stored
            else:
                self.read(part, entry, row)
            if not is_finite(part):
                raise UserError(
                    f"{entry} holds NaN, infinity or numbers too large for "
                    f"{str(out.dtype).removeprefix('torch.')}; "
                    "load it in another dtype, or download it again"
                )

    def read(self, part: Tensor, entry: Entry, row: int) -> None:
        """`part` <- the bytes of `entry` from `row` on: straight into its memory where nothing is
        to be converted.
        """
        dtype, on_cpu = FLOATS[entry.dtype], part.device.type == "cpu"
        straight = on_cpu and part.dtype == dtype
        x = part if straight else self.buffer(part.shape, dtype, pinned=not on_cpu)
        file = self.open(entry.path)
        file.seek(entry.start + row * x.nbytes // len(x))
        if file.readinto(x.view(-1).view(torch.uint8).numpy()) != x.nbytes:
            raise UserError(f"{entry} ends early; download the file again")
        if not straight:
            if on_cpu and x.itemsize == part.itemsize == 2:  # by way of fp32 is twice as fast
                x = self.buffer(part.shape, torch.float32).copy_(x)
            part.copy_(x.to(part.device))  # converted where it goes


def load_weights(
    model: nn.Module,
    entries: dict[str, Entry],
    dtype: torch.dtype,
    device: torch.device,
    offload: bool = False,
) -> None:
    """Fill `model`, on meta, with the tensors of `entries`, which `check_entries` has passed for
    the plain model.

    What is trained (`requires_grad`) becomes fp32, the rest `dtype`. Layers may be wrapped in
    others as `base`, and parameters that no tensor has are NaN until somebody gives them values. A
    DTensor gets the rows that this process keeps, and with `offload` on the CPU. Raises UserError
    for a value that is not finite in its dtype, and a tied head that is not the embedding.
    """
    reader = Reader()
    places = {name.replace(".base.", "."): name for name, _ in model.named_parameters()}
    for name, entry in sorted(
        entries.items(), key=lambda item: (str(item[1].path), item[1].start or 0)
    ):
        if name in places:
            new = make_parameter(model, places[name], dtype, device, offload)
            first, end = local_rows(model.get_parameter(places[name]))
            # of our rows, those that the file has
            there = max(first, min(end, entry.shape[0])) - first
            reader.fill(new[:there], entry, first)
            if there < len(new):  # rows for added tokens, about where the converter puts them
                new[there:] = mean_row(reader, entry)
    for name in places.keys() - entries.keys():
        make_parameter(model, places[name], dtype, device, offload).fill_(math.nan)
    model.tie_weights()
    for name in entries.keys() - places.keys():
        check_tied(reader, entries[name], model.get_parameter(name))


def check_tied(reader: Reader, entry: Entry, p: Tensor) -> None:
    """A head that is stored though it is tied equals the embedding `p`, in this process's rows, or
    UserError.
    """
    first, end = local_rows(p)
    for row, stop in row_ranges(entry, first, end):
        mine = local_shard(p)[row - first : stop - first]
        again = torch.empty_like(mine)
        reader.fill(again, entry, row)
        if not torch.equal(again, mine):
            raise UserError(
                f"{entry} differs from the embedding, but config.json says tie_word_embeddings; "
                "correct one of them"
            )


def mean_row(reader: Reader, entry: Entry) -> Tensor:
    """The mean of all rows, in fp64: the same, whatever part of them this process keeps."""
    total = torch.zeros(entry.shape[1:], dtype=torch.float64)
    for row, end in row_ranges(entry, 0, entry.shape[0]):
        rows = torch.empty(end - row, *entry.shape[1:])
        reader.fill(rows, entry, row)
        total += rows.sum(0, dtype=torch.float64)
    return total / entry.shape[0]


def make_parameter(
    model: nn.Module, name: str, dtype: torch.dtype, device: torch.device, offload: bool
) -> Tensor:
    """Give the parameter of that name memory; returns what this process keeps of it, to be filled."""
    old = model.get_parameter(name)
    first, end = local_rows(old)
    value = new = torch.empty(
        end - first,
        *old.shape[1:],
        dtype=torch.float32 if old.requires_grad else dtype,
        device="cpu" if is_sharded(old) and offload else device,
    )
    if is_sharded(old):
        from torch.distributed.tensor import DTensor

        value = DTensor.from_local(
            new,
            old.device_mesh,
            old.placements,
            run_check=False,
            shape=old.shape,
            stride=old.stride(),
        )
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(value, requires_grad=old.requires_grad))
    return new


def is_finite(x: Tensor) -> bool:
    """Neither NaN nor infinity in `x`. Its sum says so at once, unless that overflows."""
    if torch.isfinite(x.sum()):
        return True
    low, high = x.aminmax()
    return bool(torch.isfinite(high.float() - low.float()))


def save_weights(state: dict[str, Tensor], folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write tensors under our names to `folder` in layout A, in shards of at most SHARD_BYTES."""
    size = lambda t: t.numel() * (dtype or t.dtype).itemsize
    shards: list[dict[str, Tensor]] = [{}]
    room = SHARD_BYTES
    for name, tensor in state.items():
        if shards[-1] and size(tensor) > room:
            shards.append({})
            room = SHARD_BYTES
        room -= size(tensor)
        shards[-1][to_layout(name, "hf")] = tensor
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    for name, shard in zip(names, shards):
        save_tensors(
            {n: unpacked(t.detach()).to("cpu", dtype).contiguous() for n, t in shard.items()},
            folder / name,
        )
    if len(shards) > 1:
        total = sum(map(size, state.values()))
        places = {n: file for file, shard in zip(names, shards) for n in shard}
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": places},
        )


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as e:  # a full disk is told so, and not as OSError
        why = escape_controls(e)[:200]
        raise UserError(
            f"{path}: cannot be written ({why}); free space or give another path"
        ) from None
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)  # save_file leaves 0600, which a group cannot read
