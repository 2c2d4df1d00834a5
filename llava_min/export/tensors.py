"""A model as names, shapes and a way to read one tensor: what every writer here asks for.

Nothing is held but the tensor at hand, so a model of any size is merged or written in the memory of
its largest tensor. Adapters are merged as their tensors' layers pass by.
"""

import copy
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from llava_min.adapter import lora_paths, read_adapter
from llava_min.checks.load import check_llava
from llava_min.data.processor import Processor
from llava_min.errors import UserError, escape_controls, info, label
from llava_min.export.memory import Memory
from llava_min.export.stream import Read
from llava_min.llava import Llava
from llava_min.load import Checkpoint, on_meta, open_checkpoint
from llava_min.lora import LoRAConfig, row_norms
from llava_min.names import to_ours
from llava_min.tensors import TensorInfo, list_tensors
from llava_min.weights import DTYPES, NAMES, Reader, layers_that_load, mean_row, row_ranges

PROJECTOR = "multi_modal_projector."


@dataclass
class Tensors:
    """A model on meta, the processor that goes with it, and how its tensors are read."""

    model: Llava
    processor: Processor
    read: Read
    dtype: torch.dtype  # that the weights are stored in

    @property
    def names(self) -> list[str]:
        """Our names, in the model's order; a tied head is the embedding and not listed."""
        return [name for name, _ in self.model.named_parameters()]

    def shape(self, name: str) -> torch.Size:
        return self.model.get_parameter(name).shape

    def load(self, dtype: torch.dtype, compute: torch.dtype, device: torch.device) -> Llava:
        """The whole model in memory, as it would be written in `dtype`, to run in `compute`."""
        out = on_meta(self.model.config)
        for name in self.names:
            path, _, leaf = name.rpartition(".")
            x = self.read(name, dtype).to(device, compute)
            setattr(out.get_submodule(path), leaf, nn.Parameter(x, requires_grad=False))
        out.tie_weights()
        return out.eval()


class Stored:
    """Reads tensors from their files; vocabulary rows that a file lacks are the others' mean."""

    def __init__(self, entries: dict[str, TensorInfo], model: nn.Module):
        self.entries, self.model, self.memory = entries, model, Memory()
        self.local = threading.local()

    @property
    def reader(self) -> Reader:
        """This thread's own: it has one file open, and buffers."""
        if not hasattr(self.local, "reader"):
            self.local.reader = Reader()
        return self.local.reader

    def __call__(self, name: str, dtype: torch.dtype) -> Tensor:
        x = self.memory.empty(self.model.get_parameter(name).shape, dtype)
        self.fill(x, name, 0)
        return x

    def fill(self, out: Tensor, name: str, first: int) -> None:
        """Read rows into `out`, in its dtype: from `first` on, as many as it has."""
        entry = self.entries[name]
        stored = max(0, min(len(out), entry.shape[0] - first))
        self.reader.fill(out[:stored], entry, first)
        if stored < len(out):
            out[stored:] = mean_row(self.reader, entry)

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Runs of rows in fp32, each with the number of its first; the next takes its memory."""
        p, piece = self.model.get_parameter(name), None
        for first, end in row_ranges(p, 0, len(p)):
            piece = torch.empty(end - first, *p.shape[1:]) if piece is None else piece
            self.fill(piece[: end - first], name, first)
            yield first, piece[: end - first]


class Dequantized(Stored):
    """Reads the weights of a checkpoint's quantized layers as those that they stand for, one after
    the other, and everything else as `Stored` does.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module):
        super().__init__(checkpoint.entries, model)
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


def written_dtype(info: TensorInfo) -> torch.dtype:
    """The dtype of a stored tensor; fp32 for one that no checkpoint is written in, such as fp64."""
    return info.torch_dtype if info.torch_dtype in NAMES else torch.float32


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What config.json says, else what the decoder's last norm is stored in."""
    if checkpoint.config.dtype:
        return DTYPES[checkpoint.config.dtype]
    return written_dtype(checkpoint.entries["language_model.norm.weight"])


def open_model(
    source: str,
    adapters: list[str] = [],
    weights: list[float] | None = None,
    quantize: str | None = None,
    **settings: str | None,
) -> Tensors:
    """The model of a folder, hub id or "tiny", with `adapters` merged, weighted by `weights`.

    quantize: the method by whose numbers the decoder's weights are replaced first; those of a
    quantized checkpoint are dequantized in any case. settings: image_aspect_ratio, template and
    revision, as `load` has them. Raises UserError as `load` does, and for weights that are not one
    for each adapter.
    """
    first = next((a for a in adapters if Path(a).is_dir()), None)
    checkpoint = open_checkpoint(source, adapter=first, **settings)
    check_llava(checkpoint.config, source)
    if quantize is not None:
        checkpoint.quantize(quantize)
    if (stored := checkpoint.config.quantization) is not None:
        info(f"{source}: weights in {stored.method} become those that they stand for")
    model = on_meta(replace(checkpoint.config, quantization=None))
    read = Dequantized(checkpoint, model)
    if adapters:
        weights = [1.0] * len(adapters) if weights is None else weights
        if len(weights) != len(adapters):
            raise UserError(
                f"{len(weights)} for {len(adapters)} adapters; give one for each", "weights"
            )
        opened = [open_adapter(model, Path(a), source) for a in adapters]
        read = Merge(read, opened, weights)
    return Tensors(model, checkpoint.processor, read, stored_dtype(checkpoint))


# ---- adapters


@dataclass
class Adapter:
    """The tensors of an adapter by our names, and what it does to one of the base."""

    path: Path
    config: LoRAConfig | None  # None: whole tensors alone, such as a projector
    tensors: dict[str, Tensor]  # fp32
    changes: bool = field(default=False, init=False)  # whether any tensor so far became another

    @property
    def targets(self) -> set[str]:
        """The base's tensors that it changes."""
        whole = {name for name in self.tensors if ".lora_" not in name}
        return whole | {f"{path}.weight" for path in lora_paths(self.tensors)}

    def apply(self, name: str, w: Tensor, first: int) -> Tensor:
        """Rows of the tensor of that name, from `first` on, as the adapter makes them from the
        base's, `w` (fp32), whose memory they take.
        """
        path, rows = name.removesuffix(".weight"), slice(first, first + len(w))
        if (a := self.tensors.get(f"{path}.lora_A.weight")) is None:
            return w.copy_(self.tensors[name][rows])
        b = self.tensors[f"{path}.lora_B.weight"][rows]
        w.addmm_(b, a, alpha=self.config.rank_and_scaling(path)[1])
        magnitude = self.tensors.get(f"{path}.lora_magnitude_vector")
        if magnitude is not None:
            w *= (magnitude[rows] / row_norms(w, torch.float32))[:, None]
        return w


class Merge:
    """Reads the base's tensors with adapters in them: W + the sum of weight × (adapted W - W).

    A piece at a time, which stays in a core's cache from W to what is written of it.
    """

    def __init__(self, base: Stored, adapters: list[Adapter], weights: list[float]):
        self.base, self.adapters, self.weights = base, adapters, weights

    def __call__(self, name: str, dtype: torch.dtype) -> Tensor:
        mine = [(a, x) for a, x in zip(self.adapters, self.weights) if name in a.targets]
        if not mine:
            return self.base(name, dtype)
        out = self.base.memory.empty(self.base.model.get_parameter(name).shape, dtype)
        for first, w in self.base.pieces(name):
            out[first : first + len(w)] = merged(name, w, first, mine, dtype)
        return out

    def check_changed(self) -> None:
        """UserError for an adapter that, all tensors read, has changed none."""
        if idle := [a for a in self.adapters if not a.changes]:
            raise UserError(
                f"{idle[0].path}: changes no weight of this model (its update is zero, or too "
                f"small for the dtype); give a trained adapter, or {label('dtype')} fp32"
            )


def merged(
    name: str, w: Tensor, first: int, mine: list[tuple[Adapter, float]], dtype: torch.dtype
) -> Tensor:
    """Rows `w` of a tensor, from `first` on, with the adapters that change it in them, maybe in
    their memory; notes whether one makes a difference in `dtype`.
    """
    total, alone = None, len(mine) == 1 and mine[0][1] == 1
    for adapter, weight in mine:
        before = None if adapter.changes else w.to(dtype, copy=True)
        new = adapter.apply(name, w if alone else w.clone(), first)
        if before is not None and not torch.equal(new.to(dtype), before):
            adapter.changes = True
        if alone:
            return new
        part = new.sub_(w).mul_(weight)
        total = part if total is None else total.add_(part)
    return total.add_(w)


def open_adapter(model: nn.Module, path: Path, source: str) -> Adapter:
    """A PEFT folder, an original LLaVA LoRA folder, or a file such as mm_projector.bin."""
    if path.is_file():
        return Adapter(path, None, read_projector(path, model))
    config, tensors = read_adapter(model, path, source)
    return Adapter(path, config, {name: x.float() for name, x in tensors.items()})


def read_projector(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """The projector in `path`, a `.bin` or safetensors file in any layout: our name -> tensor.

    Raises UserError for a tensor that is no part of the projector, one of another shape, and one
    that is missing.
    """
    want = {n: p.shape for n, p in model.named_parameters() if n.startswith(PROJECTOR)}
    reader, tensors = Reader(), {}
    for entry in list_tensors(path):
        # saved under PEFT the names have its prefix, as in non_lora_trainables.bin
        name = to_ours(entry.name.removeprefix("base_model.model."))
        if name not in want or name in tensors:
            what = "stands twice" if name in tensors else "is no tensor of the projector"
            raise UserError(f"{entry}: {what}; give a file with the projector alone")
        if entry.shape != tuple(want[name]) or entry.torch_dtype is None:
            raise UserError(
                f"{entry}: {list(entry.shape)} {entry.dtype}, expected {list(want[name])} floating "
                "point; the projector belongs to another model"
            )
        tensors[name] = torch.empty(entry.shape, dtype=torch.float32)
        reader.fill(tensors[name], entry)
    if missing := sorted(want.keys() - tensors.keys()):
        raise UserError(
            f"{path}: lacks {escape_controls(missing[0])}; give the file with the whole projector"
        )
    return tensors
