"""int8 weights on CPU by oneDNN's integer product, for inputs of 8 bits (w8a8) and of 16 and more.

The product is one of integers, exact, of uint8 inputs and int8 weights in oneDNN's order; with AMX
it takes 0.4 of bf16's time, without a sixth, and for few rows it reads the weights as fast as the
memory gives them (11 to 13 GB/s and core, `_weight_int8pack_mm` 7 to 10). Inputs of more bits are
written in digits of 8 bits, as fixed-point numbers with a scale a row, and each digit is a row of
its own: three digits are 23 bits; two are 15, within bf16's rounding of the result.

oneDNN's order takes the place of the portable one in memory and is never stored; `portable` gives
back what was there.

Shapes, as in quant/: R rows, N out_features, K in_features.
"""

import platform
from functools import cache

import torch
from torch import Tensor

from llava_min.quant.int8 import Int8Linear, per_token
from llava_min.quant.linear import QuantLinear

FEW = 32  # rows up to which a third digit costs next to nothing, as the weights are read once
ROWS = 512  # multiplied at one time: the products of the digits are fp32
# number of so many digits, each -128 to 127; of three less 127, for a quotient rounds up in fp32
LARGEST = {2: 0x7F7F, 3: 0x7F7F00}
ZERO = torch.zeros(1, dtype=torch.long)


def handles(layer: QuantLinear, dtype: torch.dtype) -> bool:
    """An int8 layer on an x86 CPU whose integer product does not saturate; with inputs of 16 bits,
    or w8a8."""
    if type(layer) is not Int8Linear or layer.SCB.device.type != "cpu":
        return False
    small = dtype.itemsize == 2 or layer.round_input and dtype == torch.float32
    return small and product_is_exact()


@cache
def product_is_exact() -> bool:
    """Without VNNI or AMX, sums of two products saturate at 16 bits."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    weight = torch.full((16, 64), 127, dtype=torch.int8)
    codes = torch.full((1, 64), 255, dtype=torch.uint8)
    y = multiply(codes, torch.ops.onednn.qlinear_prepack(weight, None), torch.ones(16))
    return bool((y == 64 * 127 * 127).all())


def multiply(codes: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """codes (R, K) uint8, of which 128 stands for 0, weight (K, N) as oneDNN has it, scale (N,) ->
    fp32 (R, N)."""
    return torch.ops.onednn.qlinear_pointwise.default(
        codes, 1.0, 128, weight, scale, ZERO, None, 1.0, 0, torch.float32, "none", [], ""
    )


def digits(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """x (R, K) -> its digits (n, R, K) uint8 to the base of 256, the least first, each 128 more
    than it is, and scale (R, 1) fp32: x is nearly sum_i 256^i (digit_i - 128) scale."""
    # few operations: for one row each costs as much as its work
    scale = x.abs().amax(-1, keepdim=True).float().mul_(1 / LARGEST[n]).clamp_(min=1e-37)
    middle = sum(128 << 8 * i for i in range(n)) + 0.5  # as the sum is cut off
    codes = (x / scale).add_(middle).to(torch.int32)
    # on x86 a number's bytes lie in the order of its digits
    parts = codes.view(torch.uint8).view(*x.shape, 4).permute(2, 0, 1)
    return parts[:n].contiguous(), scale


def some_rows(x: Tensor, weight: Tensor, scale: Tensor, round_input: bool) -> Tensor:
    """x (R, K), weight (K, N) as oneDNN has it, scale (N,) -> (R, N)."""
    if round_input:
        codes, size = per_token(x)
        y = multiply(codes.view(torch.uint8).bitwise_xor_(128), weight, scale)
    else:
        n = 2 if x.dtype == torch.bfloat16 and len(x) > FEW else 3
        codes, size = digits(x, n)
        parts = multiply(codes.flatten(0, 1), weight, scale).chunk(n)
        y = parts[0]
        for i in range(1, n):
            y = y.add_(parts[i], alpha=256**i)
    return y.mul_(size).to(x.dtype)


@cache
def hide_some_rows() -> None:
    """Make `some_rows` a black box to the compiler: it knows oneDNN's product with a constant
    weight alone, and fused into what comes before, x is not yet rounded to its dtype: it can be
    larger than its own maximum."""
    hidden = torch.library.custom_op("llava_min::int8_rows", some_rows, mutates_args=())
    hidden.register_fake(lambda x, weight, scale, _: x.new_empty(len(x), len(scale)))


class PackedInt8Linear(QuantLinear):
    """An Int8Linear in oneDNN's order."""

    def __init__(self, layer: Int8Linear):
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.bias, self.round_input = layer.bias, layer.round_input
        packed = torch.ops.onednn.qlinear_prepack(layer.weight_packed.detach(), None)
        self.store(weight_kernel=packed, SCB=layer.SCB.detach())
        self.scale = layer.scale()

    def portable(self) -> Int8Linear:
        """The layer that this one was made of."""
        layer = Int8Linear(
            self.in_features, self.out_features, round_input=self.round_input, device="meta"
        )
        layer.bias = self.bias
        codes = self.weight_kernel.to_dense().T.contiguous()
        layer.store(weight_packed=codes, SCB=self.SCB.detach())
        return layer

    def rows(self, first: int, end: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.portable().rows(first, end, dtype)

    def product(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            return super().product(x)
        flat, known = x.flatten(0, -2), (self.weight_kernel, self.scale, self.round_input)
        if torch.compiler.is_compiling():
            y = torch.ops.llava_min.int8_rows(flat, *known)
        elif len(flat) <= ROWS:
            y = some_rows(flat, *known)
        else:
            y = torch.cat([some_rows(part, *known) for part in flat.split(ROWS)])
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{', round_input' if self.round_input else ''}"
