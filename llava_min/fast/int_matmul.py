"""Quantized linear layers on the kernels that torch has, chosen by device, dtype and number of
rows.

    bf16, few rows    4 bits: _weight_int4pack_mm_for_cpu, on CUDA (sm80 and up) _weight_int4pack_mm
    int8 and w8a8     on CPU: int8_matmul.py, where it is exact; w8a8 on CUDA: _int_mm
    otherwise         some rows of the weight are dequantized, multiplied while they are in the
                      cache, and forgotten

Swapped in from outside by `speed_up`, once the numbers are there; the results are those of quant/
within rounding, and so are the gradients. The 4-bit kernels want the codes in an order of their
own, which depends on the CPU: it takes the place of the portable one in memory, byte for byte, and
is never stored; `Int4Linear.portable` gives back exactly what was there. The order is not written
down here but found: a tile whose codes are the digits of 0, 1, 2 … is packed, and where they went
is read off.

Scale and zero-point take 4 bytes a group in the kernels, 3 (symmetric 2) in the portable form: of
int4 group 128 4.25 bits a weight instead of 4.125.

Shapes, as in quant/: R rows of input, N out_features, K in_features, g weights a group.
"""

from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_min.fast import int8_matmul
from llava_min.fast.cpu_linear import bf16_is_slow, return_freed_memory
from llava_min.fast.int8_matmul import PackedInt8Linear
from llava_min.quant.bits import pack, unpack
from llava_min.quant.codebook import CodebookLinear
from llava_min.quant.group import GroupLinear
from llava_min.quant.int8 import Int8Linear, per_token
from llava_min.quant.linear import QuantLinear
from llava_min.quant.rounding import decode

FEW = 64  # rows up to which the kernels win
PIECE = 1 << 19  # weights dequantized at one time on CPU
GROUPS = (32, 64, 128, 256)  # that the 4-bit kernels know
INNER = 8  # tiles of 16 columns that one CUDA thread block reads at once


class ByRows(QuantLinear):
    """Products piece by piece on CPU, in fp32 where that is faster than bf16; a GPU has room for a
    whole weight."""

    def pieces(self, x: Tensor) -> list[tuple[int, int]]:
        n, count = self.out_features, self.out_features
        if x.device.type == "cpu":
            count = 64 * max(1, PIECE // (64 * self.in_features))
        return [(i, min(i + count, n)) for i in range(0, n, count)]

    def product(self, x: Tensor) -> Tensor:
        out = x.new_empty(*x.shape[:-1], self.out_features)
        with torch.autocast(x.device.type, enabled=False):
            wide = x.float() if bf16_is_slow(x) else x
            for i, j in self.pieces(x):
                out[..., i:j] = F.linear(wide, self.rows(i, j, wide.dtype))
        return out

    def input_gradient(self, grad: Tensor) -> Tensor:
        wide, total = grad.float() if bf16_is_slow(grad) else grad, 0
        for i, j in self.pieces(grad):
            total = total + (wide[..., i:j] @ self.rows(i, j, wide.dtype)).float()
        return total.to(grad.dtype)


class GroupByRows(ByRows, GroupLinear):
    pass


class CodebookByRows(ByRows, CodebookLinear):
    pass


class FastInt8Linear(ByRows, Int8Linear):
    """Where int8_matmul.py has no product. On CPU `_int_mm` is not taken: without VNNI its sums
    saturate."""

    def product(self, x: Tensor) -> Tensor:
        if not self.round_input:
            return super().product(x)
        if x.device.type != "cuda" or self.in_features % 8 or self.out_features % 8:
            return Int8Linear.product(self, x)
        codes, scale = per_token(x.flatten(0, -2))
        padded = F.pad(codes, (0, 0, 0, max(0, 17 - len(codes))))  # CUDA takes no 16 rows
        y = torch._int_mm(padded, self.weight_packed.T)[: len(codes)]
        y = y.float().mul_(self.scale()).mul_(scale).to(x.dtype)
        return y.unflatten(0, x.shape[:-1])


def nibbles(packed: Tensor) -> Tensor:
    """bytes (..., n) uint8 -> codes (..., 2 n): all lower ones, then all upper ones."""
    return torch.cat((packed & 15, packed >> 4), -1)


def kernel_pack(codes: Tensor) -> Tensor:
    """codes (N, K) uint8 -> as the kernel of their device wants them."""
    if codes.device.type == "cpu":
        return torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], INNER)


@cache
def order(device: str, rows: int, columns: int) -> Tensor:
    """Where code i of a tile (rows, columns), flat, stands among the `nibbles` of the tile packed
    by the kernel."""
    even = columns + columns % 2  # the CPU's tiles are one column wide, and no single one is packed
    index = torch.arange(rows * columns).view(rows, columns).repeat(1, even // columns)
    found = 0
    for shift in (0, 4, 8):
        packed = kernel_pack((index >> shift & 15).to(device, torch.uint8))
        tile = packed.view(torch.uint8).flatten()[: rows * columns // 2]
        found = found + (nibbles(tile.cpu()).int() << shift)
    return found.argsort()


@cache
def cpu_block() -> int:
    """Rows of the CPU kernel's tiles: the fewest whose codes fill as many bytes of two columns."""
    index = torch.arange(64).unsqueeze(1).expand(64, 2)
    low, high = (kernel_pack((index >> s & 15).to(torch.uint8)).flatten() for s in (0, 4))
    found = nibbles(low).view(2, -1) + 16 * nibbles(high).view(2, -1)
    return next(n for n in (16, 32, 64) if found[:, :n].max() < n)


def unpack_tiles(packed: Tensor, n: int, rows: int, columns: int) -> Tensor:
    """packed, contiguous, n rows of it in tiles (rows, columns) -> codes (n, K) uint8."""
    if not n:
        return packed.new_empty(0, 0, dtype=torch.uint8)
    tiles = nibbles(packed.view(torch.uint8).view(n // rows, -1, rows * columns // 2))
    place = order(packed.device.type, rows, columns)
    if not torch.equal(place, torch.arange(len(place))):
        tiles = tiles[..., place.to(tiles.device)]
    return tiles.unflatten(-1, (rows, columns)).transpose(1, 2).reshape(n, -1)


class Int4Linear(ByRows):
    """A GroupLinear of 4 bits in the order of its device's kernel, for bf16 inputs."""

    def __init__(self, layer: GroupLinear):
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.bias, self.group_size = layer.bias, layer.group_size
        self.symmetric, self.choose = layer.symmetric, layer.choose
        codes = unpack(layer.weight_packed, 4)
        scale = layer.weight_scale.bfloat16()
        zero = (8 - layer.zero(0, self.out_features)) * scale.float().unsqueeze(-1)
        both = torch.cat((scale.unsqueeze(-1), zero.bfloat16()), -1)  # w = (code - 8) scale + zero
        self.store(
            weight_kernel=kernel_pack(codes), scale_and_zero=both.transpose(0, 1).contiguous()
        )  # (K / g, N, 2)
        # fp16 scales, of published AWQ checkpoints, are not all bf16 numbers: they stay as well
        same = layer.weight_scale.dtype == torch.bfloat16
        self.register_parameter("weight_scale", None if same else layer.weight_scale)
        assert torch.equal(self.codes(0, self.out_features), codes), "an order not understood"

    def codes(self, first: int, end: int) -> Tensor:
        """Codes (n, K) uint8 of some rows; first a multiple of 64, end too or the last."""
        if self.weight_kernel.device.type != "cpu":
            assert (first, end) == (0, self.out_features)
            return unpack_tiles(self.weight_kernel, end, 8, 16 * INNER)
        block = cpu_block()
        whole = end // block * block
        tiles, rest = self.weight_kernel[first:whole], self.weight_kernel[whole:end]
        parts = [unpack_tiles(tiles, whole - first, block, 1)] if whole > first else []
        parts += [unpack_tiles(rest, end - whole, end - whole, 1)] if end > whole else []
        return torch.cat(parts)

    def scale_zero(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """(n, K / g) as they were: the zero-point, off by less than 1 / 32 in bf16, is a multiple
        of 1 / 16."""
        scale, zero = self.scale_and_zero[:, first:end].transpose(0, 1).unbind(-1)
        zero = (8 - zero.float() / scale.float()).mul_(16).round_().div_(16)
        return scale if self.weight_scale is None else self.weight_scale[first:end], zero

    def rows(self, first: int, end: int, dtype: torch.dtype = torch.float32) -> Tensor:
        scale, zero = self.scale_zero(first, end)
        codes = self.codes(first, end).unflatten(1, (-1, self.group_size))
        return decode(codes, scale.unsqueeze(-1), zero.unsqueeze(-1), dtype).flatten(1)

    def weight_pieces(self) -> Iterator[Tensor]:
        on_cpu = self.weight_kernel.device.type == "cpu"  # CUDA's tiles are undone all at once
        yield from super().weight_pieces() if on_cpu else [self.dequantize()]

    def product(self, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16 or x.numel() > FEW * self.in_features:
            return super().product(x)
        cpu = x.device.type == "cpu"
        aten = torch.ops.aten
        kernel = aten._weight_int4pack_mm_for_cpu if cpu else aten._weight_int4pack_mm
        flat = x.flatten(0, -2).contiguous()
        y = kernel(flat, self.weight_kernel, self.group_size, self.scale_and_zero)
        return y.unflatten(0, x.shape[:-1])

    def portable(self) -> GroupLinear:
        """The layer that this one was made of."""
        layer = GroupLinear(
            self.in_features,
            self.out_features,
            bits=4,
            group_size=self.group_size,
            symmetric=self.symmetric,
            choose=self.choose,
            device="meta",
        )
        layer.bias = self.bias
        n = self.out_features
        scale, zero = self.scale_zero(0, n)
        layer.store(weight_packed=pack(self.codes(0, n), 4), weight_scale=scale.contiguous())
        if not self.symmetric:
            layer.store(weight_zero=layer.fixed(zero))
        return layer


IN_KERNELS_ORDER = (Int4Linear, PackedInt8Linear)  # with `portable`
BY_ROWS = {GroupLinear: GroupByRows, CodebookLinear: CodebookByRows, Int8Linear: FastInt8Linear}


def has_int4_kernel(layer: nn.Module) -> bool:
    """Whether the device of a layer has a kernel for its bits, group and shape."""
    if type(layer) not in (GroupLinear, GroupByRows):
        return False
    if layer.bits != 4 or layer.group_size not in GROUPS:
        return False
    device = layer.weight_packed.device
    if device.type == "cuda":
        shape = layer.out_features % 8 == 0 and layer.in_features % (16 * INNER) == 0
        nvidia = torch.version.cuda is not None
        return shape and nvidia and torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and layer.out_features % 16 == 0


def handles(layer: nn.Module) -> bool:
    """A quantized layer for which there is a faster product than dequantize-then-matmul."""
    return type(layer) in BY_ROWS


def quant_layers(model: nn.Module) -> list[tuple[str, QuantLinear]]:
    return [(path, m) for path, m in model.named_modules() if isinstance(m, QuantLinear)]


def swap(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


def replace_each(model: nn.Module, new: Callable[[QuantLinear], QuantLinear]) -> None:
    """Put new(layer) in the place of each quantized layer, one after the other: once it is swapped,
    nothing holds the old one, and its memory is given back."""
    for path in [path for path, _ in quant_layers(model)]:
        old = model.get_submodule(path)
        layer = new(old)
        if layer is not old:
            del old
            swap(model, path, layer)
            return_freed_memory()


def fast(layer: QuantLinear, dtype: torch.dtype) -> QuantLinear:
    """`layer`, or one in its place, with the fast products for inputs in `dtype`."""
    if not handles(layer):
        return layer
    if dtype == torch.bfloat16 and has_int4_kernel(layer):
        return Int4Linear(layer)
    if int8_matmul.handles(layer, dtype):
        return PackedInt8Linear(layer)
    layer.__class__ = BY_ROWS[type(layer)]  # only the product is another
    return layer


def plain(layer: QuantLinear) -> QuantLinear:
    """Undo `fast`."""
    if isinstance(layer, IN_KERNELS_ORDER):
        return layer.portable()
    if isinstance(layer, ByRows):
        layer.__class__ = next(kind for kind in type(layer).__mro__ if kind in BY_ROWS)
    return layer


def speed_up(model: nn.Module, dtype: torch.dtype) -> None:
    """Make each quantized layer, whole on its device, `fast`; one layer at most is there twice."""
    replace_each(model, lambda layer: fast(layer, dtype))


def portable(model: nn.Module) -> None:
    """Undo `speed_up`, to save or to move the model to another device."""
    replace_each(model, plain)
