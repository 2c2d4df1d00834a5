"""One storage for 8, 4, 3, 2 and 1 bits: a scale, and unless symmetric a zero-point, for each group
of a row.

w = (code - zero) scale. In the state dict stand

    weight_packed  (N, K b / 8) uint8   the codes, bits.py
    weight_scale   (N, K / g)   bf16    (fp16 or fp32 where a published checkpoint has it)
    weight_zero    (N, K / g)   uint8   the zero-point times 2^(8 - b); absent if symmetric, where
                                        it is 2^(b - 1)

A zero-point lies within the codes, so 8 bits hold it to a fraction of 8 - b bits, and a whole one
exactly. Finer would buy nothing, for the codes are chosen after it; two bytes instead of one would
make 7B in 2 bits, group 64, 0.09 GiB larger, 2.98 GiB where 2.9 are the aim.

Bits per weight, scales included: b + 24 / g, symmetric b + 16 / g. So int4 group 128: 4.125; hqq4
group 64: 4.375, hqq3 3.375, hqq2 2.375, hqq1 1.375, hqq8 8.375.

Shapes: N out_features, K in_features, G groups a row, g weights a group.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from llava_min.errors import UserError
from llava_min.quant.bits import WIDTHS, pack, unpack
from llava_min.quant.linear import QuantLinear
from llava_min.quant.rounding import Choose, asymmetric, decode, encode, symmetric

# weights quantized at one time: they stay in a core's cache, or fill a GPU
PIECE = {"cpu": 1 << 17, "cuda": 1 << 24}


class GroupLinear(QuantLinear):
    """choose: scale and zero-point of what is loaded (None: round to nearest).

    Raises UserError for a width of bits there is none of, or a group that does not divide the
    width.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        bits: int,
        group_size: int,
        symmetric: bool = False,
        choose: Choose | None = None,
        device=None,
    ):
        super().__init__(in_features, out_features, bias, device)
        if bits not in WIDTHS or symmetric and bits == 1:
            least = "8, 4, 3 or 2 bits" if symmetric else "8, 4, 3, 2 or 1 bits"
            raise UserError(f"{bits} came, a weight is stored in {least}; name one of them", "bits")
        if group_size < 8 or group_size % 8 or in_features % group_size:
            raise UserError(
                f"{group_size} does not divide the width {in_features} of a layer into groups of a "
                "multiple of 8; choose one that does",
                "group_size",
            )
        self.bits, self.group_size = bits, group_size
        self.symmetric, self.choose = symmetric, choose
        groups = (out_features, in_features // group_size)
        empty = lambda *shape, dtype=torch.uint8: torch.empty(*shape, dtype=dtype, device=device)
        self.store(
            weight_packed=empty(out_features, in_features * bits // 8),
            weight_scale=empty(*groups, dtype=torch.bfloat16),
        )
        self.register_parameter("weight_zero", None)
        if not symmetric:
            self.store(weight_zero=empty(*groups))

    def dtypes_of(self, name: str) -> tuple[torch.dtype, ...]:
        floats = (torch.bfloat16, torch.float16, torch.float32)  # as others' model was
        return floats if name == "weight_scale" else super().dtypes_of(name)

    def stored(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero-point (fp32) as they are read again; a group of zeros alone keeps a scale
        to divide by."""
        scale = scale.to(torch.bfloat16).float().clamp_(min=torch.finfo(torch.bfloat16).tiny)
        return scale, self.fixed(zero).float().div_(2 ** (8 - self.bits))

    def pieces(self, weight: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(codes (n, G, g), scale, zero (n, G, 1)) of some rows of `weight` (N, K) after the
        other."""
        choose = self.choose or (symmetric if self.symmetric else asymmetric)
        rows = max(1, PIECE.get(weight.device.type, 1 << 24) // self.in_features)
        for piece in weight.split(rows):
            w = piece.float().unflatten(1, (-1, self.group_size))
            scale, zero = choose(w, self.bits, self.stored)
            yield encode(w, scale, zero, self.bits), scale, zero

    def rounded(self, weight: Tensor) -> Tensor:
        """What `weight` (N, K) would be after `load` and `dequantize`, in its own dtype; nothing is
        stored."""
        return torch.cat([decode(*piece, weight.dtype).flatten(1) for piece in self.pieces(weight)])

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        parts = [
            (pack(codes.flatten(1), self.bits), scale.bfloat16(), self.fixed(zero))
            for codes, scale, zero in self.pieces(weight)
        ]
        packed, scale, zero = (torch.cat(x) for x in zip(*parts))
        scale, zero = scale.squeeze(-1), zero.squeeze(-1)
        tensors = {"weight_packed": packed, "weight_scale": scale}
        return tensors if self.symmetric else {**tensors, "weight_zero": zero}

    def fixed(self, zero: Tensor) -> Tensor:
        """Zero-points as `weight_zero` has them: times 2^(8 - b), nearest, 0 to 255."""
        return (zero * 2 ** (8 - self.bits)).round_().clamp_(0, 255).to(torch.uint8)

    def zero(self, first: int, end: int) -> Tensor | float:
        """Zero-points (n, K / g, 1) fp32 of some rows, or the one of all."""
        if self.symmetric:
            return float(2 ** (self.bits - 1))
        return self.weight_zero[first:end].float().div_(2 ** (8 - self.bits)).unsqueeze(-1)

    def rows(self, first: int, end: int, dtype: torch.dtype = torch.float32) -> Tensor:
        codes = unpack(self.weight_packed[first:end], self.bits).unflatten(1, (-1, self.group_size))
        scale, zero = self.weight_scale[first:end].unsqueeze(-1), self.zero(first, end)
        return decode(codes, scale, zero, dtype).flatten(1)

    def extra_repr(self) -> str:
        kind = ", symmetric" if self.symmetric else ""
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}{kind}"
