"""Softmax attention over a whole sequence, for the vision tower and for the language model while no cache is read.

Shapes: B batch, T tokens, H heads, K key/value heads, D head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llava_min.packed import fp32, slow

SHORT = 256  # tokens up to which plain products train faster on CPU than PyTorch's fused kernel


def repeat(x: Tensor, heads: int) -> Tensor:
    """Keys or values (B, K, T, D) -> (B, H, T, D), each once for every query head that reads it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask of what is seen as what is added to the scores: 0, or -inf."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """q, k, v (B, H, T, D) -> (B, H, T, D), by its definition (Vaswani et al. 2017)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, T, T)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores + additive(mask, scores.dtype)
    return scores.softmax(-1) @ v


class WideAttention(torch.autograd.Function):
    """The fused kernel in fp32 on bf16 q, k, v (B, H, T, D), which alone are kept, with the output, for the backward."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        mask = None if mask is None else additive(mask, torch.float32)
        out, ctx.lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.float(), k.float(), v.float(), 0.0, causal, attn_mask=mask)
        ctx.mask, ctx.causal = mask, causal
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, out = (x.float() for x in ctx.saved_tensors)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad.float(), q, k, v, out, ctx.lse, 0.0, ctx.causal, attn_mask=ctx.mask)
        return *(g.to(grad.dtype) for g in grads), None, None


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """q (B, H, T, D), k and v (B, K, T, D) with K a divisor of H -> (B, H, T, D).

    mask (B, 1, T, T) bool says who sees whom. PyTorch's fused kernel, but on CPU its backward in bf16 takes two to ten
    times as long as in fp32, and on short sequences longer than plain products (torch 2.13).
    """
    on_cpu, h = q.device.type == "cpu", q.shape[1]
    training = torch.is_grad_enabled() and q.requires_grad
    if not len(q) or training and on_cpu and q.shape[-2] <= SHORT:  # not len(q): a batch of no pictures
        return plain_attention(q, repeat(k, h), repeat(v, h), mask, causal)
    if training and on_cpu and q.dtype == torch.bfloat16:
        return WideAttention.apply(q, repeat(k, h), repeat(v, h), mask, causal)
    if slow(q):
        with fp32:
            return attention(q.float(), k.float(), v.float(), mask, causal).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
