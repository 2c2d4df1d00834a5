"""Published AWQ checkpoints of version `gemm`, read into group.py's storage with nothing lost.

    qweight  (K, N / 8)     int32  code i of a word at bits 4 i is that of output 8 j + ORDER[i]
    qzeros   (K / g, N / 8) int32  zero-points, in the same order
    scales   (K / g, N)     fp16 (or bf16)

A word holds outputs, not inputs, in the order in which a CUDA kernel wants them.
"""

import torch
from torch import Tensor

from llava_min.errors import UserError
from llava_min.quant.bits import pack, unpack
from llava_min.quant.group import GroupLinear
from llava_min.quant.linear import described

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def codes_of(words: Tensor) -> Tensor:
    """int32 (rows, N / 8) -> codes (rows, N) uint8."""
    codes = unpack(words.contiguous().view(torch.uint8), 4).unflatten(1, (-1, 8))
    return codes[..., [ORDER.index(i) for i in range(8)]].flatten(1)


def fill(layer: GroupLinear, tensors: dict[str, Tensor]) -> None:
    """Give an asymmetric 4-bit `layer` the numbers of `tensors` as they are.

    Raises UserError for tensors that are missing or of another shape or dtype than the layer's.
    """
    assert layer.bits == 4 and not layer.symmetric
    n, k, g = layer.out_features, layer.in_features, layer.group_size
    want = {
        "qweight": ("int32", (k, n // 8)),
        "qzeros": ("int32", (k // g, n // 8)),
        "scales": ("float16 or bfloat16", (k // g, n)),
    }
    for name, (dtypes, shape) in want.items():
        came = described(tensors[name]) if name in tensors else "missing"
        if came not in [f"{dtype} {shape}" for dtype in dtypes.split(" or ")]:
            raise UserError(
                f"{name} of an AWQ layer is {came}, {dtypes} {shape} was expected for group "
                f"size {g}; the checkpoint does not belong to its config"
            )
    layer.store(
        weight_packed=pack(codes_of(tensors["qweight"]).T.contiguous(), 4),
        weight_scale=tensors["scales"].T.contiguous(),
        weight_zero=(codes_of(tensors["qzeros"]) << 4).T.contiguous(),
    )
