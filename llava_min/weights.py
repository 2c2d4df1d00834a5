"""The weights of a model, read from a checkpoint's files; export/stream.py writes them.

A model is built on the meta device and its tensors are read some rows at a time, so the peak is the
model itself, whatever dtype is asked for. A process that holds only some rows of a sharded model
reads only those.
"""

import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llava_min.checks.load import check_dtype
from llava_min.checks.weights import check_tied, not_finite
from llava_min.fast import reader as fast_reader
from llava_min.parallel.dtensor import is_sharded, local_rows, local_shard
from llava_min.tensors import TensorInfo

# elements read at once: they stay in a core's cache while they are checked and converted
PIECE = 1 << 19
# reopen a file after this many bytes: mapped pages count towards this process's memory
REOPEN = 32 << 20
# parameters: up to here `dtype="auto"` is fp32 on CPU, where exactness costs little
SMALL = 500_000_000
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES |= {name: dtype for dtype, name in NAMES.items()}


# ---- dtypes


def read_dtype(
    dtype: str | torch.dtype, names: str, allowed: Collection[torch.dtype] = NAMES
) -> torch.dtype:
    found = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    check_dtype(found, dtype, allowed, names)
    return found


def pick_dtype(dtype: str | torch.dtype, model: nn.Module, device: torch.device) -> torch.dtype:
    """The dtype that `load` was asked for; "auto" depends on the model and the device."""
    if not isinstance(dtype, str) or dtype != "auto":
        return read_dtype(dtype, "auto, fp32, bf16, fp16 or torch.float64", {*NAMES, torch.float64})
    if device.type == "cpu":
        return torch.float32 if count_weights(model) <= SMALL else torch.bfloat16
    return DTYPES[model.config.dtype or "float16"]


def count_weights(model: nn.Module) -> int:
    """Parameters of `model`, a quantized layer's weights counted one by one."""
    layers = [m for _, m in layers_that_load(model).values()]
    own = sum(p.numel() for m in layers for n, p in m.named_parameters() if n != "bias")
    weights = sum(m.in_features * m.out_features for m in layers)
    return sum(p.numel() for p in model.parameters()) - own + weights


# ---- read


def row_ranges(info: TensorInfo, first: int, end: int) -> Iterator[tuple[int, int]]:
    """(first, end) of runs of rows that hold about PIECE elements, or one row."""
    step = max(1, PIECE // math.prod(info.shape[1:]))
    return ((row, min(row + step, end)) for row in range(first, end, step))


class Reader:
    """Reads rows of tensors, about PIECE elements at a time; one file is open at a time."""

    def __init__(self):
        self.path, self.file, self.mapped = None, None, 0
        self.fast = fast_reader.FastReader()

    def rows(self, info: TensorInfo, first: int, end: int) -> Tensor:
        """Rows first to end, as they are stored."""
        x = info.rows(self.opened(info), first, end)
        self.mapped += x.nbytes
        return x

    def opened(self, info: TensorInfo) -> Any:
        if info.path != self.path or self.mapped > REOPEN:
            self.path, self.file, self.mapped = info.path, None, 0  # closed before it is reopened
            self.file = info.open()
        return self.file

    def whole(self, info: TensorInfo, device: torch.device) -> Tensor:
        """A tensor of any dtype as it is stored. Raises UserError for NaN or infinity."""
        file, pickled = self.opened(info), info.path.suffix == ".bin"
        x = file[info.name] if pickled else file.get_tensor(info.name)
        self.mapped += x.nbytes
        if x.is_floating_point() and not is_finite(x):
            raise not_finite(info, x.dtype)
        return x.to(device, copy=True)

    def fill(self, out: Tensor, info: TensorInfo, first: int = 0) -> None:
        """Read rows into `out`, in its dtype and on its device: from `first` on, as many as it has.

        Raises UserError for a value that is not finite in that dtype.
        """
        for row, end in row_ranges(info, first, first + len(out)):
            part = out[row - first : end - first]
            if fast_reader.handles(info):
                self.fast.read(part, info, row)
            else:
                part.copy_(self.rows(info, row, end))
            if not is_finite(part):
                raise not_finite(info, out.dtype)


def is_finite(x: Tensor) -> bool:
    """Neither NaN nor infinity in `x`. Its sum says so at once, unless that overflows."""
    if torch.isfinite(x.sum()):
        return True
    low, high = x.aminmax()
    return bool(torch.isfinite(high.float() - low.float()))


def load_weights(
    model: nn.Module,
    entries: dict[str, TensorInfo],
    dtype: torch.dtype,
    device: torch.device,
    offload: bool = False,
) -> None:
    """Fill `model`, on meta, with the tensors of `entries`, which `check_entries` has passed for
    the plain model.

    Trained parameters (`requires_grad`) become fp32, the others `dtype`. Layers may be wrapped in
    others as `base`. A layer with a method `load` gets its weight whole, in the dtype in which it
    is stored: quantized layers choose their numbers then. Parameters without a tensor are NaN until
    they are initialised. A DTensor gets the rows of this process, on the CPU with `offload`. Raises
    UserError for a value that is not finite in its dtype, and a tied head that is not the
    embedding.
    """
    reader = Reader()
    own_load = layers_that_load(model)
    inside = tuple(f"{path}." for path, _ in own_load.values())
    stored_inside = lambda name: name.startswith(inside) and not name.endswith(".bias")
    names = [name for name, _ in model.named_parameters() if not stored_inside(name)]
    params = {name.replace(".base.", "."): name for name in names}

    # in the order of the files, so that each is read once and forwards
    in_order = lambda item: (str(item[1].path), item[1].start or 0)
    for name, info in sorted(entries.items(), key=in_order):
        if name in own_load:
            load_layer(own_load[name][1], reader, info, device, offload)
        elif name in params:
            old = model.get_parameter(params[name])
            new = make_parameter(model, params[name], dtype, device, offload)
            first, end = local_rows(old)
            stored = max(first, min(end, info.shape[0])) - first  # of our rows
            reader.fill(new[:stored], info, first)
            if stored < len(new):
                # rows of added tokens (<image>, <pad>): the mean row, as the converter sets them
                new[stored:] = mean_row(reader, info)
    for name in params.keys() - entries.keys():
        make_parameter(model, params[name], dtype, device, offload).fill_(math.nan)
    model.tie_weights()
    # what is left is the head of a model that ties it
    for name in entries.keys() - params.keys() - own_load.keys():
        p = model.get_parameter(name)
        first, end = local_rows(p)
        for row, stop in row_ranges(entries[name], first, end):
            mine = local_shard(p)[row - first : stop - first]
            again = torch.empty_like(mine)
            reader.fill(again, entries[name], row)
            check_tied(again, mine, entries[name])


def mean_row(reader: Reader, info: TensorInfo) -> Tensor:
    """The mean of all rows, in fp64: the same, whatever part of them this process holds."""
    total = torch.zeros(info.shape[1:], dtype=torch.float64)
    for row, end in row_ranges(info, 0, info.shape[0]):
        rows = torch.empty(end - row, *info.shape[1:])
        reader.fill(rows, info, row)
        total += rows.sum(0, dtype=torch.float64)
    return total / info.shape[0]


def layers_that_load(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Our name of a weight -> path and layer, for layers that store it in a form of their own."""
    return {
        f"{path}.weight".replace(".base.", "."): (path, layer)
        for path, layer in model.named_modules()
        if hasattr(layer, "load") and "weight" not in layer._parameters
    }


def load_layer(
    layer: nn.Module, reader: Reader, info: TensorInfo, device: torch.device, offload: bool
) -> None:
    """Give a layer its weight whole, in the dtype in which it is stored."""
    weight = torch.empty(info.shape, dtype=info.torch_dtype, device=device)
    reader.fill(weight, info)
    store_whole(layer, lambda: layer.load(weight), offload)


def store_whole(layer: nn.Module, store: Callable[[], None], offload: bool) -> None:
    """Call `store`, which gives a layer all its numbers; a sharded one keeps this rank's rows."""
    old = {name: p for name, p in layer.named_parameters(recurse=False) if name != "bias"}
    store()
    for name, p in old.items():
        if is_sharded(p):
            first, end = local_rows(p)
            mine = getattr(layer, name).detach()[first:end].clone()
            setattr(layer, name, as_parameter(p, mine.cpu() if offload else mine))


def make_parameter(
    model: nn.Module, name: str, dtype: torch.dtype, device: torch.device, offload: bool
) -> Tensor:
    """Give the parameter of that name memory; returns this process's rows, to be filled."""
    old = model.get_parameter(name)
    first, end = local_rows(old)
    new = torch.empty(
        end - first,
        *old.shape[1:],
        dtype=torch.float32 if old.requires_grad else dtype,
        device="cpu" if is_sharded(old) and offload else device,
    )
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, as_parameter(old, new))
    return new


def as_parameter(old: Tensor, local: Tensor) -> nn.Parameter:
    """A parameter like `old`, sharded if it is, of which this process holds `local`."""
    if is_sharded(old):
        from torch.distributed.tensor import DTensor

        layout = dict(shape=old.shape, stride=old.stride(), run_check=False)
        local = DTensor.from_local(local, old.device_mesh, old.placements, **layout)
    return nn.Parameter(local, requires_grad=old.requires_grad)
