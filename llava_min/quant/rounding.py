"""Scale and zero-point of a group of weights, and the codes that follow: w = (code - zero) scale.

Round to nearest (rtn): the range of the group is divided evenly. Symmetric, the zero-point is the
middle code, as in compressed-tensors (scale = max|w| / (2^b - 1) * 2); asymmetric, the range runs
from the least to the greatest weight.

Every way to choose them has one signature, choose(w, bits, stored) -> (scale, zero): `stored`
rounds both to what the storage keeps, so the codes are the best for the numbers that will be read
again, not for those before rounding.

Shapes: w (N, G, g), scale and zero (N, G, 1), all fp32: N out_features (rows), G groups a row,
g weights a group.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Stored = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Choose = Callable[[Tensor, int, Stored], tuple[Tensor, Tensor]]


def encode(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest codes, 0 to 2^bits - 1, uint8."""
    return (w / scale).add_(zero).round_().clamp_(0, 2**bits - 1).to(torch.uint8)


def decode(
    codes: Tensor, scale: Tensor, zero: Tensor | float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """codes (N, G, g) -> weights, the exact product rounded once to `dtype`.

    A stored zero-point has 8 bits, so code - zero has 8 and is exact in bf16 too: with a bf16
    scale, bf16 throughout gives the same as fp32, in half the bytes.
    """
    work = torch.bfloat16 if dtype == scale.dtype == torch.bfloat16 else torch.float32
    zero = zero.to(work) if isinstance(zero, Tensor) else zero
    return codes.to(work).sub_(zero).mul_(scale.to(work)).to(dtype)


def limits(w: Tensor) -> tuple[Tensor, Tensor]:
    """(least, greatest) weight of each group, or 0 beyond them: then the zero-point is one of the
    codes' range, which is what 8 bits can hold. A group of real weights has both signs."""
    return w.amin(-1, keepdim=True).clamp_(max=0), w.amax(-1, keepdim=True).clamp_(min=0)


def symmetric(w: Tensor, bits: int, stored: Stored) -> tuple[Tensor, Tensor]:
    scale = w.abs().amax(-1, keepdim=True) * (2 / (2**bits - 1))
    return stored(scale, torch.full_like(scale, 2 ** (bits - 1)))


def asymmetric(w: Tensor, bits: int, stored: Stored) -> tuple[Tensor, Tensor]:
    """As AWQ and GPTQ have it, the zero-point a whole number."""
    low, high = limits(w)
    scale, _ = stored((high - low) / (2**bits - 1), low)
    return stored(scale, (-low / scale).round())
