"""The tensors of a checkpoint's files, each read whole: as they are stored, in another dtype, or
dequantized.
"""

import copy
import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from llava_min.checks.weights import not_finite
from llava_min.export import disk
from llava_min.export.handover import PassOn, alone
from llava_min.export.memory import Memory
from llava_min.load import Checkpoint
from llava_min.tensors import TensorInfo
from llava_min.weights import Reader, is_finite, layers_that_load, mean_row, row_ranges


class Stored:
    """Reads tensors from their files; vocabulary rows that a file lacks are the others' mean.

    pass_on: with what is read of each tensor, or how it comes from another who has read it.
    """

    def __init__(self, entries: dict[str, TensorInfo], model: nn.Module, pass_on: PassOn = alone):
        self.entries, self.model, self.memory = entries, model, Memory()
        self.pass_on, self.local = pass_on, threading.local()

    @property
    def reader(self) -> Reader:
        """This thread's own: it has one file open, and buffers."""
        if not hasattr(self.local, "reader"):
            self.local.reader = Reader()
        return self.local.reader

    def stored(self, name: str) -> Tensor | None:
        """The tensor as its file has it, to be left as it is; None of a file that is no
        safetensors."""
        if (entry := self.entries[name]).start is None:
            return None

        def read() -> Tensor:
            x = disk.read_tensor(entry, self.memory)
            check_finite(x, entry)
            return x

        return self.pass_on(name, entry, read)

    def __call__(self, name: str, dtype: torch.dtype) -> Tensor:
        x, shape = self.stored(name), self.model.get_parameter(name).shape
        if x is not None and x.shape == shape and x.dtype == dtype:
            return x
        out = self.memory.empty(shape, dtype)
        self.fill(out, name, 0, x)
        return out

    def fill(self, out: Tensor, name: str, first: int, x: Tensor | None) -> None:
        """Rows of `stored` into `out`, in its dtype: from `first` on, as many as it has."""
        entry = self.entries[name]
        stored = max(0, min(len(out), entry.shape[0] - first))
        if x is None:
            self.reader.fill(out[:stored], entry, first)
        else:
            convert(x[first : first + stored], out[:stored], entry)
        if stored < len(out):
            out[stored:] = mean_row(self.reader, entry)

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Runs of rows in fp32, each with the number of its first; the next takes its memory."""
        p, piece, x = self.model.get_parameter(name), None, self.stored(name)
        for first, end in row_ranges(p, 0, len(p)):
            piece = torch.empty(end - first, *p.shape[1:]) if piece is None else piece
            self.fill(piece[: end - first], name, first, x)
            yield first, piece[: end - first]


def convert(x: Tensor, out: Tensor, entry: TensorInfo) -> None:
    """Copy `x`, finite rows of the tensor of `entry`, to `out`, in its dtype, a piece at a time."""
    smaller = torch.finfo(out.dtype).max < torch.finfo(x.dtype).max
    for first, end in row_ranges(entry, 0, len(x)):
        part, y = out[first:end], x[first:end]
        # between two 16-bit dtypes by way of fp32 is twice as fast
        part.copy_(y.float() if y.dtype != part.dtype and y.itemsize == part.itemsize == 2 else y)
        if smaller:
            check_finite(part, entry)


def check_finite(x: Tensor, entry: TensorInfo) -> None:
    for first, end in row_ranges(entry, 0, len(x)):
        if not is_finite(x[first:end]):
            raise not_finite(entry, x.dtype)


class Dequantized(Stored):
    """Reads the weights of a checkpoint's quantized layers as those that they stand for, one after
    the other, and everything else as `Stored` does.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module, pass_on: PassOn = alone):
        super().__init__(checkpoint.entries, model, pass_on)
        self.parts, self.layers = checkpoint.parts, layers_that_load(checkpoint.model)

    def __call__(self, name: str, dtype: torch.dtype) -> Tensor:
        if name not in self.layers:
            return super().__call__(name, dtype)
        path, layer = self.layers[name]
        layer = copy.copy(layer)  # on meta; what it is given is forgotten with the copy
        layer._parameters = dict(layer._parameters)
        if path in self.parts.layers:
            self.parts.fill_layer(layer, path, self.reader, torch.device("cpu"))
        else:
            layer.load(super().__call__(name, self.entries[name].torch_dtype))
        return layer.dequantize(dtype)

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        if name not in self.layers:
            yield from super().pieces(name)
            return
        x = self(name, torch.float32)
        for first, end in row_ranges(x, 0, len(x)):
            yield first, x[first:end]
