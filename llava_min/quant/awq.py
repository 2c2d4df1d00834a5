"""AWQ, activation-aware weight quantization (Lin et al. 2023, https://arxiv.org/abs/2306.00978;
llm-awq's search).

A channel whose inputs are large matters more. Multiplied by s > 1 before it is rounded and divided
by s after it, its relative error is 1 / s of what it was; the division goes into what comes before
the layer, a norm or a linear layer, so the model computes the same and nothing is added to it. s =
mean|x|^r, the exponent r by search. Then each group's range is cut by up to half if that brings its
output nearer.

Both searches want the square error of a layer's output when its weight is off by d. Over rows x
that is sum |x d|^2 = tr(d H d^T) with H = sum x^T x, so `Inputs` sums H while the caller runs the
real forward, of images and text alike, and no row is kept. The layers that read one input share one
s: q, k and v; gate and up; o alone; down alone. calibrate.py does this over a decoder.

Shapes: N out_features, K in_features, R rows of input, G groups a row, g weights a group.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llava_min.errors import UserError
from llava_min.quant.group import GroupLinear

RATIOS = 20  # exponents 0, 1/20 … 19/20
CUTS = 20  # ranges 20/20, 19/20 … 11/20 of a group's
OUTPUTS = 512  # evenly spaced, by whose error exponents are compared
LEAST_ROWS = 256
PIECE = 1 << 22  # weights whose cuts are tried at one time


class Inputs:
    """What layers read, summed over rows: h = x^T x (K, K) and size = |x| (K,), in fp32."""

    def __init__(self, width: int, device: torch.device | None = None):
        self.rows = 0
        self.h = torch.zeros(width, width, device=device)
        self.size = torch.zeros(width, device=device)

    @classmethod
    def of(cls, layer: nn.Linear) -> "Inputs":
        return cls(layer.in_features, layer.weight.device)

    @contextmanager
    def watching(self, layer: nn.Linear) -> Iterator[None]:
        """Within, what `layer` reads is added."""
        hook = layer.register_forward_pre_hook(lambda _, args: self.add(args[0]))
        try:
            yield
        finally:
            hook.remove()

    def add(self, x: Tensor) -> None:
        """Rows x (…, K), every one of which counts."""
        x = x.detach().flatten(0, -2).float()
        self.h.addmm_(x.T, x)
        self.size += x.abs().sum(0)
        self.rows += len(x)

    def divide(self, s: Tensor) -> None:
        """The rows are divided by s (K,) from here on, as `fold` does."""
        self.h.div_(s).div_(s.unsqueeze(1))
        self.size.div_(s)

    def check(self) -> None:
        """Raises UserError for too few rows, NaN, infinity."""
        if self.rows < LEAST_ROWS:
            raise UserError(
                f"{self.rows} tokens came to calibrate on, at least {LEAST_ROWS} are needed; give "
                "more records",
                "data",
            )
        if not torch.isfinite(self.h.sum()):
            raise UserError(
                "the inputs of a layer hold NaN or infinity; the checkpoint is broken, download it "
                "again"
            )


def output_error(d: Tensor, h: Tensor) -> float:
    """Square error of the outputs, summed over rows, of weights that are off by d (N, K)."""
    return ((d @ h) * d).sum().item()


def search_scales(
    weights: list[Tensor], inputs: Inputs, rounded: Callable[[Tensor], Tensor]
) -> Tensor:
    """s (K,) of the linear layers `weights` (N_i, K) that read one input: the exponent whose
    rounded weights give the least square error of the layers' outputs.

    rounded: a weight quantized and read back, `GroupLinear.rounded`. Exponent 0, plain rounding, is
    the first tried. Raises UserError as `Inputs.check`.
    """
    inputs.check()
    outputs = sum(map(len, weights))
    step = -(-outputs // OUTPUTS)
    w = torch.cat([w[::step] for w in weights]).float()
    size, best, kept = inputs.size / inputs.rows, float("inf"), torch.ones_like(inputs.size)
    for step in range(RATIOS):
        s = size.pow(step / RATIOS).clamp_(min=1e-4)
        s /= (s.max() * s.min()).sqrt()
        error = output_error(rounded(w * s) / s - w, inputs.h)
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


def search_clips(weight: Tensor, inputs: Inputs, layer: GroupLinear) -> Tensor:
    """Largest size (N, G, 1) of the weights of each group of `weight` (N, K), by search: the cut
    whose rounded weights give the least square error of the group's part of the output. llm-awq
    leaves q and k out.

    Of H a group sees the block (g, g) of its columns.
    """
    inputs.check()
    h = inputs.h.unflatten(1, (-1, layer.group_size)).unflatten(0, (-1, layer.group_size))
    h = h.diagonal(dim1=0, dim2=2).movedim(-1, 0)  # (G, g, g)
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
