"""Softmax attention over a whole sequence, for the vision tower and for the language model without a cache."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """q (B, H, T, D), k and v (B, K, T, D) with K a divisor of H -> (B, H, T, D).

    mask (B, 1, T, T) bool says who sees whom. PyTorch's fused kernels, except to train on CPU: there the fused
    backward takes three to ten times as long as that of the plain products (bf16, torch 2.13).
    """
    if q.device.type != "cpu" or not torch.is_grad_enabled() or not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores + torch.zeros(mask.shape, dtype=scores.dtype).masked_fill_(~mask, float("-inf"))
    return scores.softmax(-1) @ v
