"""Functions of the decoder whose backward pass keeps only what went in, and computes the rest again.

PyTorch's own would keep the fp32 copy that RMSNorm works on and the gate's activation: a third of what a decoder block
leaves behind for the backward pass. What they give is the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class RMSNorm(torch.autograd.Function):
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
        n = n * scale
        d_weight = (g * n).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        g = g * weight
        return ((g - n * (g * n).mean(-1, keepdim=True)) * scale).to(x.dtype), d_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., C), weight (C,) -> x / rms(x) * weight (Zhang and Sennrich 2019), the norm itself in fp32."""
    return RMSNorm.apply(x, weight, eps) if torch.is_grad_enabled() else F.rms_norm(x, weight.shape, weight, eps)


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up -> silu(gate) * up (Shazeer 2020)."""
    return SwiGLU.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate) * up
