"""A model as names, shapes and a way to read one tensor: what every writer here asks for.

Nothing is held but the tensor at hand, so a model of any size is merged or written in the memory of
its largest tensor. Adapters are merged as their tensors' layers pass by.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from llava_min.adapter import lora_paths, read_adapter
from llava_min.checks.load import check_llava
from llava_min.data.processor import Processor
from llava_min.errors import UserError, escape_controls, info, label
from llava_min.export import disk
from llava_min.export.handover import Handover
from llava_min.export.stored import Dequantized, Stored
from llava_min.export.stream import Read, one_thread
from llava_min.llava import Llava
from llava_min.load import Checkpoint, on_meta, open_checkpoint
from llava_min.lora import LoRAConfig, row_norms
from llava_min.names import to_ours
from llava_min.tensors import TensorInfo, list_tensors
from llava_min.weights import DTYPES, NAMES, Reader

PROJECTOR = "multi_modal_projector."
Update = tuple[Tensor, Tensor, float]  # A (r, in), B (out, r), s: s B A is added to a weight


@dataclass
class Tensors:
    """A model on meta, the processor that goes with it, and how its tensors are read.

    `read` gives what is to be written, `again` the same to the proof: what came from the disk for
    one, the other gets, too. Where LoRA's update is not in what `again` gives, it is in `updates`.
    """

    model: Llava
    processor: Processor
    read: Read
    again: Read
    handover: Handover  # from `read` to `again`
    dtype: torch.dtype  # that the weights are stored in
    updates: dict[str, list[Update]] = field(default_factory=dict)  # path of a layer ->

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
    for path in (path for a in adapters for path in Path(a).glob("adapter_model.*")):
        if path.is_file():
            disk.read_ahead(path)
    first = next((a for a in adapters if Path(a).is_dir()), None)
    checkpoint = open_checkpoint(source, adapter=first, **settings)
    check_llava(checkpoint.config, source)
    if quantize is not None:
        checkpoint.quantize(quantize)
    if (stored := checkpoint.config.quantization) is not None:
        info(f"{source}: weights in {stored.method} become those that they stand for")
    model = on_meta(replace(checkpoint.config, quantization=None))
    between = Handover()
    read, again = (Dequantized(checkpoint, model, x) for x in (between.give, between.take))
    updates = {}
    if adapters:
        weights = [1.0] * len(adapters) if weights is None else weights
        if len(weights) != len(adapters):
            raise UserError(
                f"{len(weights)} for {len(adapters)} adapters; give one for each", "weights"
            )
        with one_thread():
            opened = [open_adapter(model, Path(a), source) for a in adapters]
        read, again = Merge(read, opened, weights), Unmerged(again, opened, weights)
        updates = again.updates
    dtype = stored_dtype(checkpoint)
    return Tensors(model, checkpoint.processor, read, again, between, dtype, updates)


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

    def update(self, name: str) -> Update | None:
        """What it adds to the tensor of that name, if that is all that it does to it."""
        path = name.removesuffix(".weight")
        if f"{path}.lora_A.weight" not in self.tensors or self.config.dora:
            return None
        a, b = (self.tensors[f"{path}.lora_{x}.weight"] for x in "AB")
        return a, b, self.config.rank_and_scaling(path)[1]

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


class Unmerged(Merge):
    """The base's tensors without what adapters add to them as products of low rank, which are
    `updates`; where adapters do more (DoRA, whole tensors), merged.
    """

    def __init__(self, base: Stored, adapters: list[Adapter], weights: list[float]):
        super().__init__(base, adapters, weights)
        self.updates: dict[str, list[Update]] = {}
        for name in {name for a in adapters for name in a.targets}:
            mine = [(a.update(name), x) for a, x in zip(adapters, weights) if name in a.targets]
            if all(update for update, _ in mine):
                path = name.removesuffix(".weight")
                self.updates[path] = [(a, b, s * x) for (a, b, s), x in mine]

    def __call__(self, name: str, dtype: torch.dtype) -> Tensor:
        apart = name.removesuffix(".weight") in self.updates
        return self.base(name, dtype) if apart else super().__call__(name, dtype)


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
