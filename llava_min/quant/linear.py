"""What every quantized linear layer is: frozen numbers of few bits, and the product with the weight
they stand for.

The storages (group.py, codebook.py, int8.py) say how a weight becomes those numbers (`quantize`)
and back (`rows`); here is the rest. The plain product dequantizes, multiplies and forgets; the
backward dequantizes once more instead of keeping the 16-bit weight, and gives a gradient to the
input alone (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314). The stored tensors are
parameters without gradient, so that they move, shard and are saved as any weight.

Shapes: N out_features, K in_features.
"""

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_min.errors import UserError
from llava_min.parallel.dtensor import gather, is_sharded

PIECE = 1 << 22  # weights in one of `weight_pieces`


class FrozenProduct(torch.autograd.Function):
    """x (..., K) -> layer.product(x) (..., N); the gradient of x is that of the dequantized linear
    layer."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: "QuantLinear") -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.layer.input_gradient(grad), None


def described(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"


class QuantLinear(nn.Module):
    """A linear layer whose weight (N, K) is stored in few bits; the bias, if there is one, stays as
    it is."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, device=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", None)
        if bias:
            self.store(bias=torch.zeros(out_features, device=device))

    def store(self, **tensors: Tensor) -> None:
        for name, x in tensors.items():
            setattr(self, name, nn.Parameter(x, requires_grad=False))

    def load(self, weight: Tensor) -> None:
        """Quantize `weight` (N, K), of any float dtype, on its own device; what was stored before
        is replaced.

        Raises UserError for another shape, NaN or infinity.
        """
        shape = (self.out_features, self.in_features)
        if weight.shape != shape:
            raise UserError(
                f"a weight of shape {tuple(weight.shape)} came for a linear layer of "
                f"shape {shape}; quantize the checkpoint that this config belongs to"
            )
        # by the limits, where NaN shows too: isfinite of every weight takes their size twice
        if not all(torch.isfinite(limit) for limit in weight.aminmax()):
            raise UserError(
                f"a weight of shape {shape} holds NaN or infinity and cannot be "
                "quantized; load it in another dtype, or download it again"
            )
        self.store(**self.quantize(weight.detach()))

    def store_read(self, tensors: dict[str, Tensor | None]) -> None:
        """Store what was read from a file. Raises UserError for a tensor that is missing or not as
        the layer has it."""
        for name, x in tensors.items():
            there = getattr(self, name)
            if x is None or x.shape != there.shape or x.dtype not in self.dtypes_of(name):
                came = "is missing" if x is None else f"is {described(x)}"
                raise UserError(
                    f"{name} of a quantized layer {came}, {described(there)} was "
                    "expected; the checkpoint is broken or does not belong to its "
                    "config, download it again"
                )
        self.store(**tensors)

    def dtypes_of(self, name: str) -> tuple[torch.dtype, ...]:
        """Those in which the tensor `name` of a file is read as it is."""
        return (getattr(self, name).dtype,)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The stored tensors, by name, for a finite weight (N, K)."""
        raise NotImplementedError

    def rows(self, first: int, end: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows first to end of the weight that is stored, rounded once to `dtype`; first a multiple
        of 64."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (N, K) that is stored, rounded once to `dtype`."""
        return self.rows(0, self.out_features, dtype)

    def full_weight(self) -> Tensor:
        """The weight (N, K) in fp32, made anew; see `lora.full_weight`. Outside of a forward pass
        under FSDP it is gathered, so every rank calls this at the same time."""
        if not any(is_sharded(p) for p in self.parameters()):
            return self.dequantize()
        whole = copy.copy(self)
        whole._parameters = {
            n: None if p is None else gather(p) for n, p in self._parameters.items()
        }
        return whole.dequantize()

    def weight_pieces(self) -> Iterator[Tensor]:
        """The weight (N, K) in fp32, some rows at a time, as DoRA reads it."""
        step = 64 * max(1, PIECE // (64 * self.in_features))
        for first in range(0, self.out_features, step):
            yield self.rows(first, min(first + step, self.out_features))

    def product(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N), without the bias."""
        return F.linear(x, self.dequantize(x.dtype))

    def input_gradient(self, grad: Tensor) -> Tensor:
        """grad (..., N) of the product -> (..., K) of its input."""
        return grad @ self.dequantize(grad.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        learns = torch.is_grad_enabled() and x.requires_grad
        y = FrozenProduct.apply(x, self) if learns else self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
