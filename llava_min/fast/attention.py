"""Softmax attention on CPU where PyTorch's fused kernel is slow: in bf16, and in short training
sequences.

The kernel's backward takes two to ten times as long in bf16 as in fp32, and on short sequences
longer than plain products (torch 2.13).

Shapes: B batch, T tokens, H heads, K key/value heads, D head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llava_min.fast.cpu_linear import bf16_is_slow, no_autocast

MAX_TOKENS_FOR_PRODUCTS = 256  # up to so many, plain products train faster than the fused kernel


def handles(q: Tensor) -> bool:
    """Short or bf16 training on a CPU, slow bf16 there, and a batch of none, which SDPA refuses."""
    if not len(q) or q.device.type != "cpu":
        return not len(q)
    short = q.shape[-2] <= MAX_TOKENS_FOR_PRODUCTS
    return bf16_is_slow(q) or is_trained(q) and (short or q.dtype == torch.bfloat16)


def is_trained(q: Tensor) -> bool:
    return torch.is_grad_enabled() and q.requires_grad


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """q (B, H, T, D), k and v (B, K, T, D), mask (B, 1, T, T) bool -> (B, H, T, D)."""
    if not len(q) or is_trained(q):
        k, v = repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1])
        if not len(q) or q.shape[-2] <= MAX_TOKENS_FOR_PRODUCTS:
            return plain_attention(q, k, v, mask, causal)
        return Fp32Attention.apply(q, k, v, mask, causal)
    with no_autocast:
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), mask, is_causal=causal, enable_gqa=grouped
        )
    return out.to(q.dtype)


def repeat_kv(x: Tensor, heads: int) -> Tensor:
    """Keys or values (B, K, T, D) -> (B, H, T, D), each once for every query head that reads it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def to_additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """bool, True where a token may be seen -> what is added to the scores: 0 or -inf."""
    zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return zeros.masked_fill_(~visible, float("-inf"))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """q, k, v (B, H, T, D) -> (B, H, T, D), by its definition (Vaswani et al. 2017)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, T, T)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores + to_additive_mask(mask, scores.dtype)
    return scores.softmax(-1) @ v


class Fp32Attention(torch.autograd.Function):
    """Flash attention in fp32; saves only the bf16 q, k, v and output (B, H, T, D) for the
    backward.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        mask = None if mask is None else to_additive_mask(mask, torch.float32)
        out, ctx.lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.float(), k.float(), v.float(), 0.0, causal, attn_mask=mask
        )
        ctx.mask, ctx.causal = mask, causal
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, out = (x.float() for x in ctx.saved_tensors)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad.float(), q, k, v, out, ctx.lse, 0.0, ctx.causal, attn_mask=ctx.mask
        )
        return *(g.to(grad.dtype) for g in grads), None, None
