"""The quantized layers of a checkpoint: found by the tensors that its files have, filled, written.

folder.py says how one layer is stored; here are all of a model, whatever model it is.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_min.checks.weights import check_parts
from llava_min.errors import UserError
from llava_min.fast.int_matmul import IN_KERNELS_ORDER, quant_layers, swap
from llava_min.names import path_in
from llava_min.quant.folder import GEMM, Stored, config_of, kind_of, names_of, tensors_of
from llava_min.quant.linear import QuantLinear
from llava_min.quant.methods import CALIBRATED, METHODS, empty_layer, quantize_layers
from llava_min.tensors import TensorInfo
from llava_min.weights import Reader, layers_that_load, store_whole

OPTIONAL = ("weight_format", "weight_shape")  # repeat what the config says


@dataclass
class Parts:
    """The tensors of quantized layers, not read yet: path -> suffix -> TensorInfo."""

    stored: Stored | None  # None: no layer is quantized
    layers: dict[str, dict[str, TensorInfo]]

    def fill(self, model: nn.Module, device: torch.device, offload: bool = False) -> None:
        """Give the layers of `model` their numbers as they are; wrapped ones are found as `base`.

        Raises UserError, which names file and layer, for what a layer cannot have.
        """
        reader, layers = Reader(), layers_that_load(model)
        in_order = lambda item: min((str(i.path), i.start or 0) for i in item[1].values())
        for path, _ in sorted(self.layers.items(), key=in_order):
            layer = layers[f"{path}.weight"][1]
            store_whole(layer, lambda: self.fill_layer(layer, path, reader, device), offload)

    def fill_layer(
        self, layer: QuantLinear, path: str, reader: Reader, device: torch.device
    ) -> None:
        """Give `layer` the numbers of the one at `path`."""
        infos = self.layers[path]
        tensors = {suffix: reader.whole(info, device) for suffix, info in infos.items()}
        try:
            self.stored.fill(layer, tensors)
        except UserError as e:
            file = next(iter(infos.values())).path
            raise UserError(f"{file}: {path}: {e}") from None


def take_parts(
    entries: dict[str, TensorInfo], model: nn.Module, stored: Stored | None, folder: Path
) -> Parts:
    """Move the tensors of quantized layers out of `entries`, and put such layers into `model`, on
    meta: a linear layer is one if it has another tensor than a weight and a bias.

    Raises UserError for a layer of which a tensor is missing.
    """
    if stored is None:
        return Parts(None, {})
    found: dict[str, list[str]] = {}
    for path in quantized_paths(entries, model):
        linear = model.get_submodule(path)
        try:
            layer = stored.layer(linear.in_features, linear.out_features)
        except UserError as e:  # of a group size, which no caller has named
            raise UserError(f"{folder / 'config.json'}: quantization_config: {path}: {e}") from None
        layer.bias = linear.bias
        swap(model, path, layer)
        found[path] = names_of(stored, layer)
    required = {path: set(names) - set(OPTIONAL) for path, names in found.items()}
    check_parts(entries, required, folder)
    parts = {
        path: {n: entries.pop(f"{path}.{n}") for n in names if f"{path}.{n}" in entries}
        for path, names in found.items()
    }
    return Parts(stored, parts)


def quantized_paths(entries: dict[str, TensorInfo], model: nn.Module) -> list[str]:
    """Linear layers that have another tensor in `entries` than a weight and a bias."""
    # a tied head has its weight from the embedding, which is never quantized
    owners = {name for name, _ in model.named_parameters()}
    linears = {p for p, m in model.named_modules() if type(m) is nn.Linear}
    marked = set()
    for name in entries.keys() - {f"{p}.{x}" for p in linears for x in ("weight", "bias")}:
        parts = name.split(".")
        marked |= {".".join(parts[:i]) for i in range(1, len(parts))} & linears
    return sorted(path for path in marked if f"{path}.weight" in owners)


def quantize_linears(
    model: nn.Module, inside: str | tuple[str, ...], method: str, group_size: int | None = None
) -> Stored:
    """Each linear layer whose path begins with `inside`, or one of them, becomes a quantized one.

    Raises UserError where the method does not fit the shape of one.
    """
    linears = {path: m for path, m in model.named_modules() if type(m) is nn.Linear}
    layers = {path: m for path, m in linears.items() if path.startswith(inside)}
    if group_size is None:
        is_llava = any(path.startswith("vision_tower.") for path in linears)
        check_method_fits(list(layers.values()), method, is_llava)
    quantize_layers(model, list(layers), method, group_size)
    return Stored(kind_of(method, group_size), method, group_size)


def check_method_fits(layers: list[nn.Linear], method: str, is_llava: bool) -> None:
    """`method`, in its usual groups, fits the shapes of all layers; UserError names what does.

    is_llava: the verb quantize, which has other groups, takes no language model alone.
    """
    if (found := misfit(layers, method)) is None:
        return
    layer, _ = found
    fitting = ", ".join(x for x in METHODS if x not in CALIBRATED and not misfit(layers, x))
    usual = METHODS[method][1]
    if usual is None:
        shape = (layer.out_features, layer.in_features)
        raise UserError(
            f"{method}: a layer of shape {shape} is not of whole blocks; give {fitting}", "quantize"
        )
    sizes = [size for size in (128, 64, 32, 16, 8) if not misfit(layers, method, size)]
    smaller = (
        f", or make a checkpoint in groups of {sizes[0]} by `python -m llava_min quantize MODEL "
        f"OUT --method {method} --group-size {sizes[0]}`"
        if sizes and is_llava
        else ""
    )
    raise UserError(
        f"{method}: its usual group of {usual} does not divide the width {layer.in_features} of a "
        f"layer; give {fitting}{smaller}",
        "quantize",
    )


def misfit(
    layers: list[nn.Linear], method: str, group_size: int | None = None
) -> tuple[nn.Linear, str] | None:
    """A layer whose shape `method` does not take, and why; None where all fit."""
    by_shape = {(layer.in_features, layer.out_features): layer for layer in layers}
    for shape, layer in by_shape.items():
        try:
            empty_layer(method, *shape, group_size=group_size, device="meta")
        except UserError as e:
            return layer, str(e)
    return None


def own_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters in which quantized layers keep their weights."""
    names = ((path, name) for path, m in quant_layers(model) for name, _ in m.named_parameters())
    return {f"{path}.{name}" for path, name in names if name != "bias"}


# ---- out


def written_state(model: nn.Module, stored: Stored, dtype: torch.dtype) -> dict[str, Tensor]:
    """Name -> tensor of a checkpoint that is stored so; what is not quantized in `dtype`.

    Raises UserError for a layout that is read only.
    """
    if stored.kind == GEMM:
        raise UserError(
            "a model read from an AWQ-GEMM checkpoint is not written; copy its folder, or quantize "
            "the 16-bit checkpoint"
        )
    kind, own = kind_of(stored.method, stored.group_size), own_parameters(model)
    state = {n: p.detach().to(dtype) for n, p in model.named_parameters() if n not in own}
    for path, layer in quant_layers(model):
        layer = layer.portable() if isinstance(layer, IN_KERNELS_ORDER) else layer
        state |= {f"{path}.{suffix}": x for suffix, x in tensors_of(layer, kind).items()}
    return state


def written_config(model: nn.Module, config: Any) -> dict:
    """The key `quantization_config` that goes with `written_state`; {} where nothing is
    quantized.
    """
    stored = config.quantization
    if stored is None:
        return {}
    skipped = [name for path in left_out(model) for name in their_names(path)]
    given = (stored.method, stored.group_size, skipped, config.dtype, stored.double_quant)
    return {"quantization_config": config_of(*given)}


def their_names(path: str) -> list[str]:
    """What a module is called in transformers before 4.52, from then on, and in 5."""
    if "." not in path:
        return list(dict.fromkeys([path, path_in(path, "hf_5_memory")]))
    layouts = ("hf", "hf_4_52", "hf_5_memory")
    return list(dict.fromkeys(path_in(path, layout) for layout in layouts))


def left_out(model: nn.Module) -> list[str]:
    """Modules without a quantized layer, by the shortest paths that tell them from the others."""
    quantized = [path for path, _ in quant_layers(model)]
    out: list[str] = []
    for path, module in model.named_modules():
        inside = f"{path}." if path else ""
        if any(q == path or q.startswith(inside) for q in quantized):
            continue
        linear = any(hasattr(m, "in_features") for m in module.modules())
        if linear and not path.startswith(tuple(f"{p}." for p in out)):
            out.append(path)
    return out
