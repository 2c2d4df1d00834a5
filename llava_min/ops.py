"""Attention, RMSNorm and SwiGLU: the plain line of each, and one guard that hands over to fast/.

Shapes: B batch, T tokens, H heads, K key/value heads, D head dim, C width.
"""

import torch.nn.functional as F
from torch import Tensor

from llava_min.fast import attention as fast_attention
from llava_min.fast import recompute


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Softmax attention (Vaswani et al. 2017): q (B, H, T, D), k and v (B, K, T, D) -> (B, H, T,
    D).

    K divides H: each key/value head serves H / K query heads. mask (B, 1, T, T) bool is True where
    a query may see a key.
    """
    if fast_attention.handles(q):
        return fast_attention.attention(q, k, v, mask, causal)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., C), weight (C,) -> x / rms(x) * weight (Zhang and Sennrich 2019), norm in fp32."""
    if recompute.handles():
        return recompute.RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up (..., M) -> silu(gate) * up (Shazeer 2020)."""
    if recompute.handles():
        return recompute.SwiGLU.apply(gate, up)
    return F.silu(gate) * up
