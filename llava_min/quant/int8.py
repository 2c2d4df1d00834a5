"""int8 with one scale a row, as LLM.int8() stores it (Dettmers et al. 2022,
https://arxiv.org/abs/2208.07339), and w8a8, where the input is rounded to int8 as well, with a
scale a token, so that the product is one of integers.

The outliers that LLM.int8() multiplies apart in 16 bit are not kept apart here. In the state dict
stand

    weight_packed  (N, K) int8  round(w 127 / SCB)
    SCB            (N,)   fp32  largest size of each row

Bits per weight: 8 + 32 / K.

Shapes: N out_features, K in_features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_min.errors import UserError
from llava_min.quant.linear import QuantLinear

PIECE = 1 << 20  # weights quantized at one time


def per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., K) -> int8 (..., K) and scale (..., 1) fp32: x is nearly their product."""
    scale = x.abs().amax(-1, keepdim=True).float().div_(127).clamp_(min=1e-30)
    return (x / scale).round_().clamp_(-127, 127).to(torch.int8), scale


class Int8Linear(QuantLinear):
    """round_input: w8a8. Its gradient is that of the dequantized layer, the rounding of the input
    passed over."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        round_input: bool = False,
        device=None,
    ):
        super().__init__(in_features, out_features, bias, device)
        self.round_input = round_input
        codes = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        self.store(weight_packed=codes, SCB=torch.empty(out_features, device=device))

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        codes, sizes = [], []
        for piece in weight.split(max(1, PIECE // self.in_features)):
            w = piece.half().float()  # bitsandbytes casts to fp16 first, so ours are its numbers
            size = w.abs().amax(1)
            codes.append((w * (127 / size.clamp(min=1e-30)).unsqueeze(1)).round_().to(torch.int8))
            sizes.append(size)
        largest = torch.cat(sizes)
        if not largest.isfinite().all():
            raise UserError(
                "a weight is beyond 65504, the most that fp16, and so int8, has a number for; "
                "quantize with another method, such as hqq8"
            )
        return {"weight_packed": torch.cat(codes), "SCB": largest}

    def scale(self) -> Tensor:
        """(N,) fp32; 1 / 127 is multiplied with, as in bitsandbytes."""
        return self.SCB * (1 / 127)

    def rows(self, first: int, end: int, dtype: torch.dtype = torch.float32) -> Tensor:
        sizes = self.SCB[first:end].unsqueeze(1)
        return (self.weight_packed[first:end] * sizes * (1 / 127)).to(dtype)

    def product(self, x: Tensor) -> Tensor:
        if not self.round_input:
            return super().product(x)
        codes, scale = per_token(x)
        with torch.autocast(x.device.type, enabled=False):
            y = F.linear(codes.float(), self.weight_packed.float())
            return (y * self.scale() * scale).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{', round_input' if self.round_input else ''}"
