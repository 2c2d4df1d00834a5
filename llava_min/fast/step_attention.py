"""Attention of a few new tokens to a KV cache on CPU in bf16, by the fused kernel.

For one query it reads keys and values once, without a copy in fp32: 32 heads of 64 against 640 keys
take 0.35 to 0.55 ms of one core, plain products 1.1 ms (AVX-512 bf16, with and without AMX). It
wants keys in the order (L, D); in the other one it takes 12 ms. In fp32 products are no slower.

Shapes: B batch, T tokens, H heads, K key/value heads, D head dim, L slots, A answers of a prompt.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_min.fast.cpu_linear import bf16_is_slow, no_autocast

FEW = 16  # queries up to which reading the keys takes longest


def handles(k: Tensor) -> bool:
    """Keys (B, K, L, D) in bf16 on the CPU."""
    return k.device.type == "cpu" and k.dtype == torch.bfloat16


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q (B, H, T, D) against k and v (B, K, L, D) -> (B, H, T, D). mask: what is added to the
    scores, (B*K, G*A, T, L).
    """
    mask = None if mask is None else mask.view(len(q), -1, *mask.shape[-2:])
    grouped, dtype = q.shape[1] != k.shape[1], q.dtype
    if q.shape[-2] > FEW and bf16_is_slow(q):
        q, k, v, mask = (None if x is None else x.float() for x in (q, k, v, mask))
    with no_autocast:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return y.to(dtype)
