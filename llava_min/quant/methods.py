"""The methods by name: which storage each fills, and how its numbers are chosen.

`int8 int4 hqq8 hqq4 hqq3 hqq2 hqq1 awq4 nf4 fp4 w8a8`. awq4 is stored as int4 is; what makes it AWQ
happens to the 16-bit weights before, in awq.py.

LLaVA-1.5-7B has 6,476,005,376 weights in the linear layers of its decoder's blocks; the rest, tower
and projector, embeddings, norms and head, takes 1.094 GiB in 16 bit. `bytes_of` summed over the
shapes, in GiB:

    int8, w8a8  6.04 + 1.09 = 7.13    int4, awq4  3.11 + 1.09 = 4.20    nf4, fp4  3.11 + 1.09 = 4.21
    hqq8        6.31 + 1.09 = 7.41    hqq4        3.30 + 1.09 = 4.39    hqq3      2.54 + 1.09 = 3.64
    hqq2        1.79 + 1.09 = 2.88    hqq1        1.04 + 1.09 = 2.13
"""

from collections.abc import Callable
from functools import partial

from torch import nn

from llava_min.errors import UserError
from llava_min.quant.codebook import CodebookLinear
from llava_min.quant.group import GroupLinear
from llava_min.quant.hqq import half_quadratic
from llava_min.quant.int8 import Int8Linear
from llava_min.quant.linear import QuantLinear

INT4 = partial(GroupLinear, bits=4, symmetric=True)
HQQ = {
    f"hqq{bits}": (partial(GroupLinear, bits=bits, choose=half_quadratic), 64)
    for bits in (8, 4, 3, 2, 1)
}
# name -> what builds a layer, its group size
METHODS: dict[str, tuple[Callable[..., QuantLinear], int | None]] = {
    "int8": (Int8Linear, None),
    "int4": (INT4, 128),
    **HQQ,
    "awq4": (INT4, 128),
    "nf4": (partial(CodebookLinear, kind="nf4"), None),
    "fp4": (partial(CodebookLinear, kind="fp4"), None),
    "w8a8": (partial(Int8Linear, round_input=True), None),
}
CALIBRATED = ("awq4",)  # by records, so by the verb `quantize` alone


def empty_layer(
    method: str,
    in_features: int,
    out_features: int,
    bias: bool = False,
    *,
    group_size: int | None = None,
    device=None,
) -> QuantLinear:
    """A layer of that method without values; `load` gives them. group_size: of int4, awq4 and hqq,
    else refused.

    Raises UserError for an unknown method, or a group size that the method or the layer cannot
    have.
    """
    if method not in METHODS:
        raise UserError(
            f"{str(method)[:40]!r} is no method; there are {', '.join(METHODS)}", "quantize"
        )
    build, usual = METHODS[method]
    if usual is None and group_size is not None:
        raise UserError(
            f"{method} has none; leave it out, or quantize with int4 or hqq4", "group_size"
        )
    groups = {} if usual is None else {"group_size": group_size or usual}
    return build(in_features, out_features, bias, device=device, **groups)


def quantized(layer: nn.Linear, method: str, group_size: int | None = None) -> QuantLinear:
    """The layer that takes the place of `layer`, its weight quantized; on meta, without values.

    Raises UserError as `empty_layer` and `load` do, and for a layer that is quantized already.
    """
    if isinstance(layer, QuantLinear):
        raise UserError(
            f"the layer is quantized already ({type(layer).__name__}); give the 16-bit checkpoint",
            "quantize",
        )
    new = empty_layer(
        method, layer.in_features, layer.out_features, group_size=group_size, device="meta"
    )
    new.bias = layer.bias
    if not layer.weight.is_meta:
        new.load(layer.weight)
    return new


def quantize_layers(
    model: nn.Module, paths: list[str], method: str, group_size: int | None = None
) -> None:
    """Put a quantized layer in the place of each linear layer of `paths`, one after the other."""
    for path in paths:
        parent, _, name = path.rpartition(".")
        layer = quantized(model.get_submodule(path), method, group_size)
        setattr(model.get_submodule(parent), name, layer)


def bytes_of(method: str, shape: tuple[int, int], group_size: int | None = None) -> int:
    """Bytes in memory of a weight (N, K) stored by `method`, scales included."""
    layer = empty_layer(method, shape[1], shape[0], group_size=group_size, device="meta")
    return sum(p.numel() * p.element_size() for p in layer.parameters())
