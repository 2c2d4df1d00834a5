"""Products of one row with quantized weights on CPU, written so that torch.compile makes one loop
of each.

The numbers are read as they are stored, in nobody's own order, and never dequantized in memory:
int8, and codes of 4, 2 and 1 bits, words of 32 bits at a time. Masked, code i of a word is
2^(b i) times its value; the input takes that factor back, so that no code is shifted but the last.

Four quarters of the rows are multiplied at once. One core then reads four streams: for int4 14 GB/s
where one stream gives 9 and torch's own kernel 12 (two cores with AVX-512, torch 2.13). Without a
compiler each operation would write its result to memory; int_matmul.py has what is fast then.

Shapes, as in quant/: N out_features, K in_features, G groups a row, b bits, n codes a word.
"""

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from llava_min.fast.cpu_linear import hide_product
from llava_min.fast.int8_matmul import hide_some_rows
from llava_min.fast.int_matmul import (
    IN_KERNELS_ORDER,
    FastInt8Linear,
    GroupByRows,
    fast,
    plain,
    replace_each,
)
from llava_min.quant.group import GroupLinear
from llava_min.quant.int8 import Int8Linear
from llava_min.quant.linear import QuantLinear

STREAMS = 4
WIDTHS = (4, 2, 1)  # bits of which whole codes fill a word
# of the compiler: what is summed over the codes of a word stays in registers, by fused multiply-add
OPTIONS = {
    "realize_opcount_threshold": 1 << 20,
    "realize_reads_threshold": 1 << 20,
    "cpp.enable_floating_point_contract_flag": "fast",
}


@cache
def compiled(function: Callable, device: str) -> Callable:
    """`function` as one program for each batch size and capacity of the cache, never per token.
    device: its type, `cpu` or `cuda`."""
    torch._dynamo.config.recompile_limit = 64  # beyond torch's own, 8, it stops compiling
    # of codebooks, which are made anew where they are traced
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
    hide_product(), hide_some_rows()
    options = OPTIONS if device == "cpu" else None
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


def in_memory(x: Tensor) -> Tensor:
    """`x`, computed once and kept: a compiler repeats what it can compute in the loops that read
    it, but not what is viewed by strides."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def in_streams(rows: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """rows(some rows of each tensor (N, …)) -> (N,), for a quarter of the rows at a time."""
    return torch.cat([rows(*part) for part in zip(*(x.chunk(STREAMS) for x in tensors))])


class FusedInt8(FastInt8Linear):
    def product(self, x: Tensor) -> Tensor:
        if not is_one_row(x):
            return super().product(x)
        wide = in_memory(x.flatten().float())
        y = in_streams(lambda codes: (codes.float() * wide).sum(-1), self.weight_packed)
        return (y * self.scale()).to(x.dtype).view(*x.shape[:-1], -1)


class FusedGroup(GroupByRows):
    def product(self, x: Tensor) -> Tensor:
        if not is_one_row(x) or self.bits not in WIDTHS:
            return super().product(x)
        b, n, groups = self.bits, 32 // self.bits, self.in_features // self.group_size
        factor = torch.tensor([2.0 ** (-b * i) for i in range(n - 1)] + [1.0])
        wide = x.float().view(groups, -1, n)
        parts = in_memory((wide * factor).permute(2, 0, 1))  # (n, G, words of a group)
        sums = in_memory(wide.sum(-1))  # (G, words of a group)

        def rows(words: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
            """words (N, K / n) int32, scale and zero-point (N, G) -> (N,)."""
            words, mask = words.view(-1, groups, words.shape[1] // groups), 2**b - 1
            y = (words >> 32 - b & mask).float() * parts[n - 1]
            for i in range(n - 1):
                y = y + (words & mask << b * i).float() * parts[i]
            zero = 2.0 ** (b - 1) if zero is None else zero.float()[..., None] * 2.0 ** (b - 8)
            return ((y - zero * sums) * scale.float()[..., None]).sum((1, 2))

        stored = [self.weight_packed.view(torch.int32), self.weight_scale]
        y = in_streams(rows, *stored, *([] if self.symmetric else [self.weight_zero]))
        return y.to(x.dtype).view(*x.shape[:-1], -1)


FUSED = {Int8Linear: FusedInt8, GroupLinear: FusedGroup}


def is_one_row(x: Tensor) -> bool:
    return torch.compiler.is_compiling() and x.numel() == x.shape[-1]


def handles(layer: QuantLinear) -> bool:
    """A layer on CPU that `speed_up` made fast, its input not rounded."""
    on_cpu = next(layer.parameters()).device.type == "cpu"
    sped_up = isinstance(layer, (FastInt8Linear, GroupByRows, *IN_KERNELS_ORDER))
    return on_cpu and sped_up and not getattr(layer, "round_input", False)


def arrange(model: nn.Module, one_row_compiled: bool, dtype: torch.dtype) -> None:
    """Have the quantized layers of `model` as a compiled step of one row reads them, or again as
    `speed_up` left them."""
    fused = tuple(FUSED.values())

    def arranged(layer: QuantLinear) -> QuantLinear:
        if isinstance(layer, fused) == one_row_compiled or not handles(layer):
            return layer
        layer = plain(layer)
        if not one_row_compiled:
            return fast(layer, dtype)
        layer.__class__ = FUSED.get(type(layer), type(layer))
        return layer

    replace_each(model, arranged)
