"""RMSNorm and SwiGLU that save only their inputs and recompute the rest in the backward pass.

PyTorch's own save the fp32 copy that RMSNorm works on and the activated gate: a third of what a
decoder block keeps for its backward pass. Values and gradients are the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def handles() -> bool:
    """Only a forward that will have a backward keeps anything."""
    return torch.is_grad_enabled()


class RMSNorm(torch.autograd.Function):
    """y = x / rms(x) * weight; x (..., C), weight (C,)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        g, n = grad.to(wide), x.to(wide)
        scale = (n.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        n = n * scale  # the normalized input
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (g * n).flatten(0, -2).sum(0).to(weight.dtype)
        # d(x / rms): the part of the gradient along n changes only the length, which is divided out
        g = g * weight
        return ((g - n * (g * n).mean(-1, keepdim=True)) * scale).to(x.dtype), d_weight, None


class SwiGLU(torch.autograd.Function):
    """y = silu(gate) * up, elementwise."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)
