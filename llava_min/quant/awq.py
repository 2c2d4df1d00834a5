"""AWQ, activation-aware weight quantization (Lin et al. 2023, https://arxiv.org/abs/2306.00978;
llm-awq's search).

A channel whose inputs are large matters more. Multiplied by s > 1 before it is rounded and divided
by s after it, its relative error is 1 / s of what it was; the division goes into what comes before
the layer, a norm or a linear layer, so the model computes the same and nothing is added to it. s =
mean|x|^r, the exponent r by search. Then each group's range is cut by up to half if that brings its
output nearer.

Everything here takes inputs that the caller captured in the real forward, of images and text alike;
it knows neither model nor data. The layers that read one input share one s: q, k and v; gate and
up; o alone; down alone.

Shapes: N out_features, K in_features, R rows of input, G groups a row, g weights a group.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llava_min.errors import UserError
from llava_min.quant.group import GroupLinear

RATIOS = 20  # exponents 0, 1/20 … 19/20
CUTS = 20  # ranges 20/20, 19/20 … 11/20 of a group's
CLIP_ROWS, LEAST_ROWS = 512, 64
PIECE = 1 << 22  # weights whose cuts are tried at one time


def checked(x: Tensor, width: int) -> Tensor:
    """Captured inputs (…, K) as (R, K) fp32. Raises UserError for too few rows, NaN, infinity."""
    x = x.detach().flatten(0, -2).float()
    assert x.shape[1] == width
    if len(x) < LEAST_ROWS:
        raise UserError(
            f"calibration: {len(x)} rows of input came, at least {LEAST_ROWS} are "
            "needed; give more records"
        )
    if not torch.isfinite(x).all():
        raise UserError(
            "calibration: the inputs of a layer hold NaN or infinity; calibrate in another dtype"
        )
    return x


def search_scales(
    weights: list[Tensor],
    x: Tensor,
    rounded: Callable[[Tensor], Tensor],
    outputs: Callable[[list[Tensor]], Tensor] | None = None,
) -> Tensor:
    """s (K,) of the linear layers `weights` (N_i, K) that read `x` (…, K): the exponent whose
    rounded weights give the least mean square error of `outputs(weights)`, by default of the
    layers' own outputs.

    rounded: a weight quantized and read back, `GroupLinear.rounded`. Exponent 0, plain rounding, is
    the first tried.
    """
    x = checked(x, weights[0].shape[1])
    size = x.abs().mean(0)
    outputs = outputs or (lambda ws: torch.cat([x @ w.float().T for w in ws], dim=1))
    target, best, kept = outputs(weights), float("inf"), torch.ones_like(size)
    for step in range(RATIOS):
        s = size.pow(step / RATIOS).clamp_(min=1e-4)
        s /= (s.max() * s.min()).sqrt()
        new = outputs([rounded(w * s) / s for w in weights])
        error = (new - target).float().square_().mean().item()
        if error < best:
            best, kept = error, s
    return kept


@torch.no_grad()
def fold(before: nn.Module, layers: list[nn.Linear], s: Tensor) -> None:
    """Divide what `before` gives, a norm's or a linear layer's output (…, K), by s (K,), and
    multiply the columns of the `layers` that read it: together they compute what they did."""
    divide = s if before.weight.dim() == 1 else s.unsqueeze(1)
    before.weight.div_(divide.to(before.weight.device))
    if getattr(before, "bias", None) is not None:
        before.bias.div_(s.to(before.bias.device))
    for layer in layers:
        layer.weight.mul_(s.to(layer.weight.device))


def search_clips(weight: Tensor, x: Tensor, layer: GroupLinear) -> Tensor:
    """Largest size (N, G, 1) of the weights of each group of `weight` (N, K), by search: the cut
    whose rounded weights give the least mean square error of the group's part of the output.
    llm-awq leaves q and k out.

    The error of rows x and a difference d is mean (x d)^2 = d H d with H = x^T x / R of the group's
    g columns.
    """
    x = checked(x, weight.shape[1])
    x = x[:: max(1, len(x) // CLIP_ROWS)][:CLIP_ROWS]
    x = x.unflatten(1, (-1, layer.group_size))  # (R, G, g)
    h = torch.einsum("rgi,rgj->gij", x, x) / len(x)
    pieces = weight.split(max(1, PIECE // weight.shape[1]))
    return torch.cat([_clips(piece.float(), h, layer) for piece in pieces])


def _clips(weight: Tensor, h: Tensor, layer: GroupLinear) -> Tensor:
    w = weight.unflatten(1, (-1, layer.group_size))  # (N, G, g)
    largest = w.abs().amax(-1, keepdim=True)
    best, kept = torch.full_like(largest, float("inf")), largest
    for step in range(CUTS // 2):
        size = largest * (1 - step / CUTS)
        d = layer.rounded(w.clamp(-size, size).flatten(1)).view_as(w) - w
        error = (torch.einsum("ngi,gij->ngj", d, h) * d).sum(-1, keepdim=True)
        kept, best = torch.where(error < best, size, kept), torch.minimum(error, best)
    return kept


def clip(weight: Tensor, clips: Tensor) -> Tensor:
    """`weight` (N, K) with each group within ± its clip (N, G, 1)."""
    clips = clips.to(weight)
    return weight.unflatten(1, (clips.shape[1], -1)).clamp(-clips, clips).flatten(1)
