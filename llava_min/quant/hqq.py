"""HQQ, half-quadratic quantization (Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog/;
defaults of `hqq`).

Few weights far from the rest should not decide where the grid lies, so the error is measured by
|e|^p with p < 1. That is not smooth; a second variable e takes up what is far off, and in turn

    e    = shrink(w - w_q)            sign(x) max(0, |x| - |x|^(p - 1) / beta)
    zero = mean(code - (w - e) / scale)

until the mean error stops falling. Only the zero-point moves, and no data is needed. Two things are
ours: each group keeps the best of its zero-points, the whole one of rounding to nearest among them,
so that no group ends worse than by that (not in one bit: there it makes nearly all weights 0, which
errs less on the mean and says nothing); and the stop is that of the piece of rows at hand, which
stays in the cache.

Shapes as in rounding.py.
"""

import torch
from torch import Tensor

from llava_min.quant.rounding import Stored, limits

P, BETA, ITERATIONS = 0.7, 10.0, 20
LARGEST = 2e4  # of 1 / scale
# 0.17: up to this size all is shrunk to 0, and the errors of real weights stay below
VANISHES = BETA ** (1 / (P - 2))


def shrink(x: Tensor) -> Tensor:
    """sign(x) max(0, |x| - |x|^(p - 1) / beta)."""
    size = x.abs()
    return x.sign() * (size - size.pow(P - 1) / BETA).relu_()


def half_quadratic(w: Tensor, bits: int, stored: Stored) -> tuple[Tensor, Tensor]:
    """w (N, G, g) -> scale, zero (N, G, 1)."""
    low, high = limits(w)
    scale, _ = stored(((high - low) / (2**bits - 1)).clamp_(min=1 / LARGEST), low)
    start, scaled = -low / scale, w / scale
    up, size = torch.empty_like(scaled), torch.empty_like(scaled)

    def errors(zero: Tensor) -> Tensor:
        """Mean |w_q - w| (N, G, 1); `up` is code - w / scale then, `size` |w_q - w| / scale."""
        torch.add(scaled, zero, out=up).round_().clamp_(0, 2**bits - 1).sub_(scaled)
        torch.sub(up, zero, out=size).abs_()
        return size.mean(-1, keepdim=True) * scale

    _, kept = stored(scale, start.round() if bits > 1 else start)
    best, last = errors(kept), float("inf")
    _, zero = stored(scale, start.round() if bits == 4 else start)
    for _ in range(ITERATIONS):
        error = errors(zero)
        kept, best = torch.where(error < best, zero, kept), torch.minimum(error, best)
        mean = error.mean().item()
        if mean >= last:
            break
        last, following = mean, up.mean(-1, keepdim=True)
        if (size.amax(-1, keepdim=True) * scale).amax() > VANISHES:
            e = shrink(up.sub_(zero).mul_(-scale))  # w - w_q is what is shrunk
            following = following + (e / scale).mean(-1, keepdim=True)
        _, zero = stored(scale, following)
    return scale, kept
