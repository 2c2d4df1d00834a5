"""Frozen bf16 linear layers on CPU: the order of their weights, and the product chosen by the number of rows.

Swapped in from outside, once weights are loaded: by `pack` to answer, by `widen` to train. No model file hears of it. A
weight stays a parameter of its name, shape and dtype; `dense` gives it in the usual order, whatever its own.

For one row oneDNN re-orders a plain bf16 weight at every call and reads 13 to 16 GB/s of it; packed in its own order it
reads 19 to 22 GB/s. For many rows bf16 products need AMX to be fast; on a CPU without it, widening to fp32 first is 1.6
times as fast (two cores with AVX-512 bf16, torch 2.13).
"""

import ctypes
import platform
from collections import Counter
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MANY = 48  # rows from which widening the weight pays
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
PIECE = 1 << 22  # elements of a weight that are widened at one time


def slow(x: Tensor) -> bool:
    """Whether a large product of `x` is faster in fp32: bf16 on a CPU without AMX."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.cpu._is_amx_tile_supported()


def dense(weight: Tensor) -> Tensor:
    """The weight in the usual order, whoever holds it."""
    return weight.to_dense() if weight.is_mkldnn else weight


fp32 = torch.autocast("cpu", enabled=False)  # what is widened stays so


def pieces(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, some rows in fp32) of a weight."""
    weight = dense(weight)
    step = max(1, PIECE // weight.shape[1])
    for i in range(0, len(weight), step):
        yield i, weight[i : i + step].float()


class Product(torch.autograd.Function):
    """x (..., in) @ weight (out, in)^T + bias, in fp32 piece by piece. The weight is frozen, so x is not kept."""

    @staticmethod
    @fp32
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        out, wide = x.new_empty(*x.shape[:-1], len(weight)), x.float()
        for i, piece in pieces(weight):
            part = bias[i : i + len(piece)].float() if bias is not None else None
            out[..., i : i + len(piece)] = F.linear(wide, piece, part)
        return out

    @staticmethod
    @fp32
    def backward(ctx, grad: Tensor):
        total = 0
        for i, piece in pieces(ctx.weight):
            total = total + grad[..., i : i + len(piece)].float() @ piece
        return total.to(grad.dtype), None, None


class FrozenLinear(nn.Module):
    """x (..., in_features) -> (..., out_features), in bf16."""

    def __init__(self, layer: nn.Linear, order: Callable[[Tensor], Tensor]):
        super().__init__()
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self.weight = nn.Parameter(order(layer.weight.detach()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.bfloat16)
        if x.numel() >= MANY * self.in_features and slow(x):
            return Product.apply(x, self.weight, self.bias)
        if not self.weight.is_mkldnn or torch.is_grad_enabled() and x.requires_grad:
            return F.linear(x, dense(self.weight), self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def frozen_bf16(weight: Tensor) -> bool:
    """A whole bf16 weight on the CPU that is not trained."""
    whole = not hasattr(weight, "device_mesh")
    return whole and weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and not weight.requires_grad


def keep_freed_memory(most: int = 1 << 28) -> None:
    """Have glibc keep what is freed for the next block of that size: fresh pages cost as much as widening a weight."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, most)
        libc.mallopt(M_TRIM_THRESHOLD, most)


def swap(model: nn.Module, order: Callable[[Tensor], Tensor]) -> None:
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for path in [path for path, layer in model.named_modules() if type(layer) is nn.Linear]:
        layer = model.get_submodule(path)
        if frozen_bf16(layer.weight) and uses[id(layer.weight)] == 1:  # a tied head stays the embedding's
            keep_freed_memory()
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, FrozenLinear(layer, order))


def pack(model: nn.Module) -> None:
    """Frozen bf16 linear layers on an x86 CPU become FrozenLinear, one after the other, their weights in oneDNN's order."""
    if platform.machine() in ("x86_64", "AMD64") and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        swap(model, lambda weight: torch.ops.mkldnn._reorder_linear_weight(weight, 1))


def widen(model: nn.Module) -> None:
    """For training: where large bf16 products are slow, the same layers with their weights as they are."""
    if any(slow(p) for p in model.parameters()):
        swap(model, lambda weight: weight)
