"""Faster frozen bf16 linears on CPU: weights prepacked in oneDNN's layout for decoding (few rows),
upcast to fp32 in chunks for prefill and training (many rows).

Swapped in from outside once the weights are loaded: by `prepack_linears` to answer, by
`upcast_linears` to train. A weight stays a parameter of its name, shape and dtype; `unpacked` gives
it in row-major order.

For one row oneDNN reorders a plain bf16 weight at every call and reads 13 to 16 GB/s of it;
prepacked it reads 19 to 22 GB/s. For many rows bf16 products need AMX to be fast; on a CPU without
it, upcasting first is 1.6 times as fast (two cores with AVX-512 bf16, torch 2.13).
"""

import ctypes
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_ROWS_TO_UPCAST = 48  # rows from which upcasting the weight pays
HAS_AMX = torch.cpu._is_amx_tile_supported()  # asked here: a compiler cannot look into it
CHUNK = 1 << 22  # elements of a weight that are upcast at one time
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h

no_autocast = torch.autocast("cpu", enabled=False)  # keeps the upcast tensors in fp32


def handles(weight: Tensor) -> bool:
    """A whole bf16 weight on the CPU that is not trained."""
    whole = not hasattr(weight, "device_mesh")  # of a DTensor this process has a part
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return whole and on_cpu and not weight.requires_grad


def bf16_is_slow(x: Tensor) -> bool:
    """Whether a large product of `x` is faster in fp32: bf16 on a CPU without AMX."""
    on_cpu = x.dtype == torch.bfloat16 and x.device.type == "cpu"
    return on_cpu and not HAS_AMX


def unpacked(weight: Tensor) -> Tensor:
    """The weight in row-major order, whatever its own."""
    return weight.to_dense() if weight.is_mkldnn else weight


def row_chunks(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, some rows in fp32) of a weight, in order."""
    weight = unpacked(weight)
    step = max(1, CHUNK // weight.shape[1])
    for i in range(0, len(weight), step):
        yield i, weight[i : i + step].float()


class ChunkedMatmul(torch.autograd.Function):
    """x (..., in) @ weight (out, in)^T + bias in fp32, chunk by chunk. The weight is frozen, so x
    is not saved.
    """

    @staticmethod
    @no_autocast
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        out, wide = x.new_empty(*x.shape[:-1], len(weight)), x.float()
        for i, chunk in row_chunks(weight):
            rows = slice(i, i + len(chunk))
            out[..., rows] = F.linear(wide, chunk, None if bias is None else bias[rows].float())
        return out

    @staticmethod
    @no_autocast
    def backward(ctx, grad: Tensor):
        total = 0
        for i, chunk in row_chunks(ctx.weight):
            total = total + grad[..., i : i + len(chunk)].float() @ chunk
        return total.to(grad.dtype), None, None


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) by a weight (out, in) in oneDNN's order -> (..., out)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@cache
def hide_product() -> None:
    """Make `product` a black box to the compiler, which would take oneDNN's order for plain memory.
    Not on import: this brings sympy, 70 MB."""
    hidden = torch.library.custom_op("llava_min::prepacked_linear", product, mutates_args=())
    hidden.register_fake(lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]))


class PrepackedLinear(nn.Module):
    """x (..., in_features) -> (..., out_features), in bf16."""

    def __init__(self, layer: nn.Linear, order: Callable[[Tensor], Tensor]):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = nn.Parameter(order(layer.weight.detach()), requires_grad=False)
        self.packed = self.weight.is_mkldnn  # asked here: a compiler's stand-in for it says no
        self.bias = layer.bias

    def full_weight(self) -> Tensor:
        """The weight (out, in) in row-major order; see `lora.full_weight`."""
        return unpacked(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.bfloat16)
        if x.numel() >= MIN_ROWS_TO_UPCAST * self.in_features and bf16_is_slow(x):
            return ChunkedMatmul.apply(x, self.weight, self.bias)
        if not self.packed or torch.is_grad_enabled() and x.requires_grad:
            return F.linear(x, unpacked(self.weight), self.bias)
        if torch.compiler.is_compiling():
            return torch.ops.llava_min.prepacked_linear(x, self.weight, self.bias)
        return product(x, self.weight, self.bias)


def prepack_linears(model: nn.Module) -> None:
    """For answering: frozen bf16 linears on an x86 CPU get their weights in oneDNN's order, one at
    a time.
    """
    x86 = platform.machine() in ("x86_64", "AMD64")
    if x86 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        swap_linears(model, lambda weight: torch.ops.mkldnn._reorder_linear_weight(weight, 1))


def upcast_linears(model: nn.Module) -> None:
    """For training: where large bf16 products are slow, the same layers with their weights in
    row-major order.
    """
    if any(bf16_is_slow(p) for p in model.parameters()):
        swap_linears(model, lambda weight: weight)


def swap_linears(model: nn.Module, order: Callable[[Tensor], Tensor]) -> None:
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    paths = [path for path, layer in model.named_modules() if type(layer) is nn.Linear]
    packed = None
    for path in paths:
        weight = model.get_submodule(path).weight
        if handles(weight) and uses[id(weight)] == 1:  # a tied head stays the embedding's
            parent, _, name = path.rpartition(".")
            del weight  # or it would be there until the next one
            packed = PrepackedLinear(model.get_submodule(path), order)
            setattr(model.get_submodule(parent), name, packed)
            return_freed_memory()
    if packed is not None:
        keep_freed_memory()


def return_freed_memory() -> None:
    """Have glibc give freed blocks back: blocks in the order of a kernel do not fit into the holes
    that the others leave, and half a model would stay behind as holes.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def keep_freed_memory(most: int = 1 << 28) -> None:
    """Have glibc keep freed blocks of up to `most` bytes: fresh pages cost as much as upcasting a
    weight.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, most)
        libc.mallopt(M_TRIM_THRESHOLD, most)
