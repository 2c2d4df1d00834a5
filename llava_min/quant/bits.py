"""Codes of 8, 4, 3, 2 or 1 bits, packed without a gap.

A row is one little-endian stream of bits: code i stands at bits [i b, (i + 1) b). So 8 codes fill
exactly b bytes, also for 3 bits, where ten codes in a 32-bit word would waste a sixteenth; for 4
bits the lower nibble comes first, and four bytes read as an int32 are compressed-tensors'
`weight_packed`.

Shapes: N out_features (rows), K in_features (codes a row), b bits.
"""

import torch
from torch import Tensor

WIDTHS = (8, 4, 3, 2, 1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes (N, K) uint8 below 2^bits, K a multiple of 8 -> (N, K bits / 8) uint8."""
    n, k = codes.shape
    octets = codes.view(n, k // 8, 8)
    words = octets[..., 0].long()
    for i in range(1, 8):
        words |= octets[..., i].long() << bits * i
    return words.view(torch.uint8).view(n, k // 8, 8)[..., :bits].reshape(n, -1)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse: (N, K bits / 8) uint8 -> codes (N, K) uint8."""
    if bits == 8:
        return packed
    if bits == 3:
        a, b, c = packed.view(len(packed), -1, 3).int().unbind(-1)
        words = a | b << 8 | c << 16
        codes = [(words >> bits * i & 2**bits - 1).to(torch.uint8) for i in range(8)]
        return torch.stack(codes, -1).view(len(packed), -1)
    # a byte becomes a word of as many bytes as it has codes: code i moves from bit i b to bit 8 i
    words = packed.to({4: torch.int16, 2: torch.int32, 1: torch.int64}[bits])
    spread = words.clone()
    for i in range(1, 8 // bits):
        spread |= words << (8 - bits) * i
    mask = (2**bits - 1) * sum(1 << 8 * i for i in range(8 // bits))
    return spread.bitwise_and_(mask).view(torch.uint8)
