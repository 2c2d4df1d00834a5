"""The language model: Llama 2 and its family (Vicuna, Mistral, Qwen1.5/2, Llama 3), by config
alone.

Follows Touvron et al. 2023 (https://arxiv.org/abs/2307.09288) with the weight names and the
half-split rotary of the Hugging Face checkpoints, so weights load without arithmetic. To compare:
https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/llama/modeling_llama.py

Shapes: B batch, T tokens, H heads, K key/value heads, D head dim, C width.
"""

import torch
from torch import Tensor, nn

from llava_min import ops
from llava_min.cache import KVCache, LayerCache
from llava_min.config import TextConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight, without a mean or a bias (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


def rotary(positions: Tensor, config: TextConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions (B, T) -> cos, sin (B, 1, T, D), the angles in fp32 (Su et al. 2021).

    Both are doubled to D, and the first half of sin is negated, as `rotate` wants.
    """
    d = config.head_dim
    exponent = torch.arange(0, d, 2, device=positions.device, dtype=torch.float32) / d
    angle = positions[:, None, :, None].float() * config.rope_theta**-exponent  # (B, 1, T, D/2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) by its angle: the half-split form of the published files.

    transformers' `rotate_half` is a roll by D/2 here, since `sin` already holds its minus.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023); K = H is the ordinary kind."""

    def __init__(self, config: TextConfig):
        super().__init__()
        c, d = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = d
        self.q_proj = nn.Linear(c, heads * d, bias=config.qkv_bias)
        self.k_proj = nn.Linear(c, kv_heads * d, bias=config.qkv_bias)
        self.v_proj = nn.Linear(c, kv_heads * d, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * d, c, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: LayerCache | None,
        last_only: bool,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C), or (B, 1, C) for the last token alone."""
        queries = slice(-1, None) if last_only else slice(None)
        heads = lambda y: y.view(*y.shape[:2], -1, self.head_dim).transpose(1, 2)
        q = heads(self.q_proj(x[:, queries]))  # (B, H, T, D)
        k, v = heads(self.k_proj(x)), heads(self.v_proj(x))  # (B, K, T, D)
        q = rotate(q, cos[:, :, queries], sin[:, :, queries])
        k = rotate(k, cos, sin)
        mask = None if mask is None else mask[..., queries, :]
        if cache is not None:
            cache.update(k, v)
        if cache is None or cache.is_prefill:
            # a prefill's keys and values are all there is in the cache: attend to them directly
            # the last token alone sees every other, so it needs no mask
            y = ops.attention(q, k, v, mask, causal=mask is None and not last_only)
        else:
            y = cache.attend(q, mask).to(x.dtype)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, H * D) -> (B, T, C)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """A pre-norm decoder block."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: LayerCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C); with `last_only` (B, 1, C): the others give keys alone."""
        residual = x[:, -1:] if last_only else x
        x = residual + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, last_only)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Embeddings, blocks and the last norm; the head belongs to the whole model."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Embedded tokens x (B, T, C) at positions (B, T) -> hidden states (B, T, C), normalized.

        Without a cache, mask (B, 1, T, T) bool says which keys each token sees, and None is causal;
        with one, it is what `KVCache.place_tokens` gave. `last_only` gives (B, 1, C).
        """
        cos, sin = rotary(positions, self.config, x.dtype)
        stores = [None] * len(self.layers) if cache is None else cache.layers()
        for block, store in zip(self.layers[:-1], stores):
            x = block(x, cos, sin, mask, store)
        # prefill needs the last token's output alone, so the last block skips the others
        return self.norm(self.layers[-1](x, cos, sin, mask, stores[-1], last_only))
