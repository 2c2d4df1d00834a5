"""compressed-tensors' `pack-quantized` tensors of one layer: int4 symmetric, in groups of 128.

    weight_packed  (N, K / 8) int32  code i of a word at bits 4 i: the value plus 8
    weight_scale   (N, K / g) bf16   (the dtype of the model that was quantized)
    weight_shape   (2,)       int64  N, K

Four bytes of group.py's `weight_packed` are one such word on a little-endian machine, so only the
dtype changes.
"""

import torch
from torch import Tensor

from llava_min.errors import UserError
from llava_min.quant.group import GroupLinear


def tensors_of(layer: GroupLinear) -> dict[str, Tensor]:
    """Suffix -> tensor, without the bias, of a symmetric 4-bit layer."""
    assert layer.bits == 4 and layer.symmetric
    return {
        "weight_packed": layer.weight_packed.detach().view(torch.int32),
        "weight_scale": layer.weight_scale.detach(),
        "weight_shape": torch.tensor([layer.out_features, layer.in_features]),
    }


def fill(layer: GroupLinear, tensors: dict[str, Tensor]) -> None:
    """Give a symmetric 4-bit `layer` the numbers of `tensors` as they are.

    Raises UserError for tensors that are missing or of another shape than the layer's.
    """
    packed, scale, shape = (tensors.get(f"weight_{name}") for name in ("packed", "scale", "shape"))
    if shape is not None and shape.tolist() != [layer.out_features, layer.in_features]:
        raise UserError(
            f"weight_shape is {shape.tolist()}, [{layer.out_features}, "
            f"{layer.in_features}] was expected; the checkpoint does not belong to its "
            "config"
        )
    if packed is not None and packed.dtype == torch.int32:
        packed = packed.contiguous().view(torch.uint8)
    layer.store_read({"weight_packed": packed, "weight_scale": scale})
