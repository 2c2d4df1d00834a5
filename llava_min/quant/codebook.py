"""NF4 and FP4 with double quantization (QLoRA, Dettmers et al. 2023,
https://arxiv.org/abs/2305.14314).

The weight, flat, in blocks of 64: each weight is its block's largest size times one of 16 numbers.
NF4's are quantiles of a normal distribution, FP4's a sign, two bits of exponent and one of
mantissa. The sizes themselves are stored in 8 bits: less their mean, in blocks of 256, as one of
256 numbers that are dense near 0.

Bit for bit the tensors of bitsandbytes 0.50 on CPU (its CUDA kernels may round a size on the edge
of two codes the other way). In the state dict stand

    weight_packed  (N K / 2, 1)      uint8  two codes a byte, the first in the upper half
    absmax         (N K / 64,)       uint8  sizes of the blocks
    nested_absmax  (⌈N K / 16384⌉,)  fp32   sizes of the blocks of sizes
    nested_offset  (1,)              fp32   the mean size

and without double quantization `absmax` in fp32 alone. Bits per weight: 4 + 8/64 + 32/16384 =
4.127, without 4.5.

Shapes: N out_features, K in_features.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_min.errors import UserError
from llava_min.quant.linear import QuantLinear

BLOCK, NESTED = 64, 256
# weights quantized at one time, a multiple of BLOCK: they stay in a core's cache, or fill a GPU
PIECE = {"cpu": 1 << 17, "cuda": 1 << 24}
VALUES = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    # sign, exponent, mantissa 000 to 111, of which 12 is the largest
    "fp4": tuple(sign * v / 12 for sign in (1, -1) for v in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}


def dynamic_map() -> tuple[float, ...]:
    """256 numbers, ascending: of each power of ten 10^-6 to 1, of either sign, the middles of 1, 2,
    4 … 64 even parts of [0.1, 1]; and 0 and 1 (Dettmers 2015,
    https://arxiv.org/abs/1511.04561)."""
    parts = [torch.zeros(1), torch.ones(1)]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        parts += [middles, -middles]
    return tuple(torch.cat(parts).sort().values.tolist())


VALUES["dynamic"] = dynamic_map()


@cache
def codebook(kind: str, device: torch.device) -> Tensor:
    """The numbers of VALUES, fp32, by code."""
    return torch.tensor(VALUES[kind], device=device)


@cache
def codebook_pairs(kind: str, device: torch.device) -> Tensor:
    """The two numbers that a byte stands for, fp32, as one int64: looked up three times as fast as
    rows of two."""
    numbers = codebook(kind, device)
    return torch.cartesian_prod(numbers, numbers).view(torch.int64).flatten()


@cache
def dynamic_codes(device: torch.device) -> Tensor:
    """The code nearest to each of 65536 even steps from -1 to 1. bitsandbytes looks codes up there,
    which beside the middle of two numbers is not the nearest to the number itself."""
    numbers = codebook("dynamic", device)
    steps = torch.arange(1 << 16, device=device).float() * 2 / 65535 - 1
    return torch.bucketize(steps, (numbers[:-1] + numbers[1:]) / 2).to(torch.uint8)


def quantize_sizes(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sizes (n,) fp32 -> codes (n,) uint8, nested sizes (⌈n / 256⌉,), offset (1,)."""
    offset = absmax.mean()
    x = F.pad(absmax - offset, (0, -len(absmax) % NESTED)).view(-1, NESTED)
    nested = x.abs().amax(1)
    x = (x / nested.clamp(min=1e-38).unsqueeze(1)).clamp_(-1, 1)
    steps = ((x + 1) * 0.5 * 65535 + 0.5).int()
    codes = dynamic_codes(absmax.device)[steps].flatten()[: len(absmax)]
    return codes.clone(), nested, offset.view(1)  # without the padding


def quantize_blocks(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """weight (n,), n a multiple of 64 -> packed codes (n / 2, 1) uint8, sizes (n / 64,) fp32."""
    numbers, order = codebook(kind, weight.device).sort(stable=True)
    middles, order = ((numbers[:-1] + numbers[1:]) / 2).tolist(), order.tolist()
    # a code is the first of the order, and what each middle below the weight adds to it, modulo 256
    steps = [(b - a) % 256 for a, b in zip(order, order[1:])]
    packed, sizes = [], []
    for piece in weight.split(PIECE.get(weight.device.type, 1 << 24)):
        x = piece.float().view(-1, BLOCK)
        absmax = x.abs().amax(1)
        x = (x * (1 / absmax.clamp(min=1e-38)).unsqueeze(1)).clamp_(-1, 1)
        codes = torch.full_like(x, order[0], dtype=torch.uint8)
        above = torch.empty_like(x, dtype=torch.bool)
        for middle, step in zip(middles, steps):  # three times as fast as torch.bucketize
            codes.add_(torch.gt(x, middle, out=above).view(torch.uint8), alpha=step)
        pairs = codes.flatten().view(torch.int16)  # the first code in the lower byte
        packed.append((pairs << 4 | pairs >> 8).to(torch.uint8))
        sizes.append(absmax)
    return torch.cat(packed).unsqueeze(1), torch.cat(sizes)


class CodebookLinear(QuantLinear):
    """kind: "nf4" or "fp4". Raises UserError for another, or a weight that is not of whole
    blocks."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        kind: str,
        double_quant: bool = True,
        device=None,
    ):
        super().__init__(in_features, out_features, bias, device)
        count = in_features * out_features
        if kind not in ("nf4", "fp4"):
            raise UserError(f"kind: {kind!r} came; there are nf4 and fp4")
        if count % BLOCK:
            raise UserError(
                f"{kind}: a layer of shape ({out_features}, {in_features}) is not of "
                f"whole blocks of {BLOCK} weights; choose another method"
            )
        self.kind, self.double_quant = kind, double_quant
        self.dtype = torch.float32  # of the weight that came, which bitsandbytes records
        empty = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device=device)
        size_dtype = torch.uint8 if double_quant else torch.float32
        self.store(
            weight_packed=empty(count // 2, 1, dtype=torch.uint8),
            absmax=empty(count // BLOCK, dtype=size_dtype),
        )
        if double_quant:
            self.store(nested_absmax=empty(-(-count // (BLOCK * NESTED))), nested_offset=empty(1))

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        self.dtype = weight.dtype
        packed, absmax = quantize_blocks(weight.flatten(), self.kind)
        if not self.double_quant:
            return {"weight_packed": packed, "absmax": absmax}
        codes, nested, offset = quantize_sizes(absmax)
        return {
            "weight_packed": packed,
            "absmax": codes,
            "nested_absmax": nested,
            "nested_offset": offset,
        }

    def sizes(self, first: int, end: int) -> Tensor:
        """Of the blocks first to end (n, 1), fp32."""
        size = self.absmax[first:end]
        if self.double_quant:
            block = torch.arange(first, end, device=size.device)
            nested = self.nested_absmax.index_select(0, block // NESTED)
            numbers = codebook("dynamic", size.device).index_select(0, size.int())
            size = numbers * nested + self.nested_offset
        return size.unsqueeze(1)

    def rows(self, first: int, end: int, dtype: torch.dtype = torch.float32) -> Tensor:
        first, end = first * self.in_features, end * self.in_features
        pairs = codebook_pairs(self.kind, self.weight_packed.device)
        x = pairs.index_select(0, self.weight_packed[first // 2 : end // 2].flatten().int())
        x = x.view(torch.float32).view(-1, BLOCK).mul_(self.sizes(first // BLOCK, end // BLOCK))
        return x.to(dtype).view(-1, self.in_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}"
