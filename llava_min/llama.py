"""The language model: Llama 2 and its family (Vicuna, Mistral, Qwen1.5/2, Llama 3), which differ only by config.

Follows Touvron et al. 2023 (https://arxiv.org/abs/2307.09288) with the weight names and the half-split rotary of the
Hugging Face checkpoints, so weights load without arithmetic.

Shapes: B batch, T tokens, H heads, K key/value heads, G = H / K, D head dim, C width, S cache slots, N branches.
"""

import torch
from torch import Tensor, nn

from llava_min import lean
from llava_min.attention import additive, attention
from llava_min.config import TextConfig

ALL, LAST = slice(None), slice(-1, None)  # of a row's tokens, those whose hidden states are asked for


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the norm itself in fp32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return lean.rms_norm(x, self.weight, self.eps)


def rotary(positions: Tensor, config: TextConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions (B, T) -> cos, sin (B, 1, T, D) for `rotate`, the angles in fp32 (Su et al. 2021)."""
    d = config.head_dim
    freq = config.rope_theta ** -(torch.arange(0, d, 2, device=positions.device, dtype=torch.float32) / d)
    angle = positions[:, None, :, None].float() * freq
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) by its angle: the half-split form of the Hugging Face checkpoints. Their rotate_half
    is a roll by D/2 here, its minus being in `sin`."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def causal_mask(real: Tensor) -> Tensor:
    """real (B, T) bool, False at padding -> what each token may see (B, 1, T, T) bool.

    Padding sees itself, because a softmax over nothing is NaN and NaN spreads even with weight zero.
    """
    t = real.shape[1]
    past = torch.ones(t, t, dtype=torch.bool, device=real.device).tril()
    return (past & real[:, None, :] | torch.eye(t, dtype=torch.bool, device=real.device))[:, None]


def dot(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """q (R, M, D) with k (R, S, D) -> scaled scores (R, M, S), masked by what `KVCache.mask_of` made."""
    scale = q.shape[-1] ** -0.5
    if mask is None:
        return torch.baddbmm(q.new_zeros(1), q, k.mT, beta=0, alpha=scale)
    return torch.baddbmm(mask.flatten(1, 2), q, k.mT, alpha=scale)


class KVCache:
    """Keys and values of what was read so far. The caller owns it; it is allocated once.

    `trunk` has S slots for each of the B rows. After `branch(n, slots)` every row goes on in n ways that share its
    trunk and write to a `tail` of their own, which is how beams and several answers read the prompt only once.

    `static` attends to all slots under a mask: every step then has the same shapes, as CUDA graphs want, and no
    product is over a part of a cache, which bf16 on CPU would copy first. Otherwise only the slots in use are seen.

    A forward is `grow` (counts, on the host), `place` (positions and masks, on the device), and per block `write`,
    then `attend` unless the cache was empty: then the tokens need only each other.
    """

    def __init__(self, config: TextConfig, batch: int, slots: int, dtype: torch.dtype, device: torch.device, static: bool = False):
        self.config, self.static = config, static or device.type == "cpu" and dtype == torch.bfloat16
        self.dtype, self.device = dtype, device
        self.trunk = self._allocate(batch, slots)
        self.filled = torch.zeros(batch, slots, dtype=torch.bool, device=device)  # slots that hold a real token
        self.positions = torch.zeros(batch, dtype=torch.long, device=device)  # of each row's next token
        self.next_slot = torch.zeros(1, dtype=torch.long, device=device)  # `length`, on the device
        self.length = 0  # slots in use, the same for every row: prompts are padded on the left
        self.fresh = True  # nothing stood in it before the tokens just counted
        self.padded = False  # some row of the prompt has padding, which a step must not see
        self.tail, self.tail_length, self.branches = None, 0, 1

    def _allocate(self, rows: int, slots: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (rows, K, S, D) per layer; of the keys a slot's numbers lie S apart, see `attend`."""
        kv, d = self.config.num_key_value_heads, self.config.head_dim
        new = lambda *shape: torch.zeros(rows, kv, *shape, dtype=self.dtype, device=self.device)
        return [(new(d, slots).mT, new(slots, d)) for _ in range(self.config.num_hidden_layers)]

    @property
    def slots(self) -> int:
        return self.filled.shape[1]

    def branch(self, n: int, slots: int) -> None:
        """From here on every row goes on in n ways, up to `slots` tokens each; rows become B*N."""
        self.tail, self.tail_length, self.branches = self._allocate(len(self.filled) * n, slots), 0, n
        self.positions = self.positions.repeat_interleave(n)

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on as a copy of rows[i], which has the same trunk: only the tails move."""
        for pair in self.tail:
            for x in pair:
                x[:, :, : self.tail_length] = x[rows, :, : self.tail_length]

    def crop(self, length: int) -> None:
        """Forget everything after the first `length` slots, and the branches."""
        self.tail, self.tail_length, self.branches = None, 0, 1
        self.filled[:, length:] = False
        self.positions = self.filled.sum(-1)
        self.next_slot.fill_(length)
        self.length = length

    def grow(self, tokens: int) -> None:
        """Count `tokens` more for every row."""
        self.fresh = self.length == 0
        if self.tail is None:
            self.length += tokens
            assert self.length <= self.slots, f"{self.length} tokens in a cache of {self.slots}"
        else:
            self.tail_length += tokens
            assert tokens == 1 and self.tail_length <= self.tail[0][0].shape[2], "a branch grows by one token, within its slots"

    def place(self, tokens: int, real: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Positions (B, T) of the tokens just counted, and the mask under which their queries attend.

        `real` (B, T) bool marks those that are not padding, None when all are. The mask is additive over the trunk
        (B*K, N*G, T, S), or for a fresh prompt (B, 1, T, T) bool; None where every earlier token may be seen.
        """
        if real is None:
            real = torch.ones(len(self.positions), tokens, dtype=torch.bool, device=self.device)
        positions = (self.positions[:, None] + real.cumsum(-1) - 1).clamp(min=0)
        self.positions += real.sum(-1)
        if self.tail is not None:
            return positions, self.mask_of(self.filled[:, None, : self.length]) if self.padded else None
        self.new = self.next_slot + torch.arange(tokens, device=self.device)  # their slots, for `write`
        self.filled.index_copy_(1, self.new, real)
        self.next_slot += tokens
        if self.fresh:
            self.padded = not real.all()
            return positions, causal_mask(real) if self.padded else None
        if tokens == 1 and not self.static and not self.padded:
            return positions, None
        slots = torch.arange(self.slots if self.static else self.length, device=self.device)
        visible = self.filled[:, None, : len(slots)] & (slots <= self.new[:, None]) | (slots == self.new[:, None])
        return positions, self.mask_of(visible)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v (rows, K, T, D) of the tokens just counted."""
        end = self.length if self.tail is None else self.tail_length
        for store, x in zip(self.trunk[layer] if self.tail is None else self.tail[layer], (k, v)):
            if self.static and self.tail is None:  # no length of the host's in the program
                store.index_copy_(2, self.new, x.to(self.dtype))
            else:
                store[:, :, end - x.shape[2] : end] = x

    def mask_of(self, visible: Tensor) -> Tensor:
        """visible (B, T, S) bool -> additive mask (B*K, N*G, T, S), once a step what `attend` adds in every block."""
        kv, heads = self.config.num_key_value_heads, self.config.num_attention_heads
        return additive(visible, self.dtype).repeat_interleave(kv, dim=0)[:, None].repeat(1, self.branches * heads // kv, 1, 1)

    def attend(self, layer: int, q: Tensor, mask: Tensor | None) -> Tensor:
        """q (B*N, H, T, D) against the trunk and, after `branch`, each row's own tail -> (B*N, H, T, D).

        Two plain products instead of `scaled_dot_product_attention`: for one bf16 query on CPU that is ten times
        slower, and it cannot read one trunk for N rows. In bf16 on CPU their second factor has to lie in memory
        order, or a product takes three times as long: hence the order of the keys.
        """
        k, v = self.trunk[layer]
        b, kv, n = len(k), k.shape[1], self.branches
        _, h, t, d = q.shape
        seen = self.slots if self.static and self.tail is None else self.length
        k, v, q = k[:, :, :seen].flatten(0, 1), v[:, :, :seen].flatten(0, 1), q.to(self.dtype)  # k, v (B*K, S, D)
        if self.tail is None:
            return dot(q.reshape(b * kv, -1, d), k, mask).softmax(-1).bmm(v).view(b, h, t, d)
        # (B*N*K, G*T, …) -> (B*K, N*G*T, …), and back
        trunk = lambda x: x.view(b, n, kv, -1, x.shape[-1]).transpose(1, 2).reshape(b * kv, -1, x.shape[-1])
        rows = lambda x: x.view(b, kv, n, -1, x.shape[-1]).transpose(1, 2).reshape(b * n * kv, -1, x.shape[-1])
        q = q.reshape(b * n * kv, -1, d)
        own_k, own_v = (x[:, :, : self.tail_length].flatten(0, 1) for x in self.tail[layer])  # (B*N*K, tail, D)
        weights = torch.cat([dot(trunk(q), k, mask), trunk(dot(q, own_k))], dim=-1).softmax(-1)
        return (rows(weights[..., :seen] @ v) + rows(weights[..., seen:]) @ own_v).view(b * n, h, t, d)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023); K = H is the ordinary kind."""

    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        c, d = config.hidden_size, config.head_dim
        self.layer, self.head_dim = layer, d
        self.q_proj = nn.Linear(c, config.num_attention_heads * d, bias=config.qkv_bias)
        self.k_proj = nn.Linear(c, config.num_key_value_heads * d, bias=config.qkv_bias)
        self.v_proj = nn.Linear(c, config.num_key_value_heads * d, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * d, c, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None, asking: slice) -> Tensor:
        heads = lambda y: y.view(*y.shape[:2], -1, self.head_dim).transpose(1, 2)
        q, k, v = heads(self.q_proj(x[:, asking])), heads(self.k_proj(x)), heads(self.v_proj(x))
        q, k = rotate(q, cos[:, :, asking], sin[:, :, asking]), rotate(k, cos, sin)  # (B, H, T, D), (B, K, T, D)
        if mask is not None:
            mask = mask[..., asking, :]
        if cache is not None:
            cache.write(self.layer, k, v)
        if cache is not None and not cache.fresh:
            y = cache.attend(self.layer, q, mask).to(x.dtype)
        else:
            y = attention(q, k, v, mask, causal=mask is None and asking == ALL)  # the last token alone sees all
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(lean.swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None = None,
                asking: slice = ALL) -> Tensor:
        """x (B, T, C) -> (B, T, C), or only for the tokens `asking`; the others then give keys and values alone."""
        x = x[:, asking] + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, asking)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Embeddings, blocks and the last norm; the head belongs to the whole model."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None = None, cache: KVCache | None = None,
                asking: slice = ALL) -> Tensor:
        """Embedded tokens x (B, T, C) at positions (B, T) -> hidden states (B, T, C) of the tokens `asking`, after the last norm.

        Without `cache`, mask (B, 1, T, T) bool says who sees whom, None being causal; with it, `KVCache.place`'s.
        """
        cos, sin = rotary(positions, self.config, x.dtype)
        for block in self.layers[:-1]:
            x = block(x, cos, sin, mask, cache)
        return self.norm(self.layers[-1](x, cos, sin, mask, cache, asking))
