"""The KV cache: keys and values of what was read, kept for a step, for beams, or for a whole chat.

    prefix   [ the prompt, padded on the left .............. ]  B rows, L slots each
    suffix                                  [ beam 1's tokens ]  after `fork(n)`: B*A rows
                                            [ beam 2's tokens ]

The caller owns the cache and passes it down. All of it is allocated once.

Shapes: B batch, T tokens, H heads, K key/value heads, G = H / K, D head dim, L slots, A answers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_min.config import TextConfig
from llava_min.fast import step_attention

MIN_CAPACITY = 256  # the fewest slots of a chat's cache, or of one that a step is compiled for


def causal_mask(valid: Tensor) -> Tensor:
    """valid (B, T) bool, False at padding -> what each token may see (B, 1, T, T) bool.

    Padding sees itself: a softmax over no key is NaN, and 0 * NaN is NaN in the rows that look at
    it.
    """
    t = valid.shape[1]
    past = torch.ones(t, t, dtype=torch.bool, device=valid.device).tril()
    itself = torch.eye(t, dtype=torch.bool, device=valid.device)
    return (past & valid[:, None, :] | itself)[:, None]


def attention_scores(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """q (…, Q, D), k (…, L, D) -> scaled scores (…, Q, L) of groups of Q queries.

    mask: what is added to them, (…, Q, L) with Q in two dimensions.
    """
    scale = q.shape[-1] ** -0.5
    if mask is None:
        return torch.baddbmm(q.new_zeros(1), q, k.mT, beta=0, alpha=scale)
    return torch.baddbmm(mask.flatten(1, 2), q, k.mT, alpha=scale)


class KVCache:
    """Keys and values of what was read so far.

    `prefix` has L slots for each of the B rows. After `fork(n, slots)` each row is n beams that
    share the prefix, so a prompt is prefilled once, and append to a `suffix` of their own.

    A forward is `advance` (counts, on the host), `place_tokens` (on the device), and in each
    block's LayerCache `update`, then `attend` unless this is the prefill, whose tokens need only
    each other.

    `static_shapes`: attend to all slots under a mask, so that every step has the same shapes, as
    CUDA graphs want.
    """

    def __init__(
        self,
        config: TextConfig,
        batch: int,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
        static_shapes: bool = False,
    ):
        self.config, self.dtype, self.device = config, dtype, device
        self.static_shapes = static_shapes
        self.suffix, self.suffix_length, self.forks = None, 0, 1
        self.prefix = self._allocate(batch, slots)
        self.valid = torch.zeros(batch, slots, dtype=torch.bool, device=device)  # a real token
        self.positions = torch.zeros(batch, dtype=torch.long, device=device)  # of the next token
        self.next_slot = torch.zeros(1, dtype=torch.long, device=device)  # `length`, on the device
        self.new_slots: Tensor | None = None  # of the tokens that `place_tokens` placed last
        self.length = 0  # slots in use, the same for every row: prompts are padded on the left
        self.is_prefill = True  # the cache was empty before the forward that `advance` counted
        self.padded = False  # a prompt has padding, which later tokens must not see

    def _allocate(self, rows: int, slots: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (rows, K, L, D) of each layer."""
        kv, d = self.config.num_key_value_heads, self.config.head_dim
        new = lambda: torch.zeros(rows, kv, slots, d, dtype=self.dtype, device=self.device)
        return [(self._ordered(new()), new()) for _ in range(self.config.num_hidden_layers)]

    def _ordered(self, k: Tensor) -> Tensor:
        """Keys as they shall lie in memory: (D, L), for on CPU a product wants its second factor in
        memory order, or it takes three times as long; (L, D) for the kernel that fast/ may take.
        """
        fused = self.forks == 1 and step_attention.handles(k)
        return k.contiguous() if fused else k.mT.contiguous().mT

    def layers(self) -> list["LayerCache"]:
        """Each block's part, none of which knows its number: one compiled program serves all."""
        return [LayerCache(self, i) for i in range(len(self.prefix))]

    @property
    def capacity(self) -> int:
        return self.valid.shape[1]

    def fork(self, n: int, slots: int) -> None:
        """Each row becomes n rows that share its prefix, with `slots` for tokens of their own."""
        self.forks = n
        self.suffix, self.suffix_length = self._allocate(len(self.valid) * n, slots), 0
        self._reorder_keys()
        self.positions = self.positions.repeat_interleave(n)

    def reorder(self, rows: Tensor) -> None:
        """Row i continues as a copy of rows[i], which has the same prefix: only suffixes move."""
        for pair in self.suffix:
            for x in pair:
                x[:, :, : self.suffix_length] = x[rows, :, : self.suffix_length]

    def _reorder_keys(self) -> None:
        for i, (k, v) in enumerate(self.prefix):
            self.prefix[i] = self._ordered(k), v

    def crop(self, length: int) -> None:
        """Forget everything after the first `length` slots, and the forks."""
        self.suffix, self.suffix_length, self.forks = None, 0, 1
        self._reorder_keys()
        self.valid[:, length:] = False
        self.positions = self.valid.sum(-1)
        self.next_slot.fill_(length)
        self.length = length

    def advance(self, tokens: int) -> None:
        """Count `tokens` more for every row."""
        self.is_prefill = self.length == 0
        if self.suffix is None:
            self.length += tokens
            assert self.length <= self.capacity, f"{self.length} tokens, {self.capacity} slots"
        else:
            self.suffix_length += tokens
            slots = self.suffix[0][0].shape[2]
            assert tokens == 1 and self.suffix_length <= slots, (
                "a fork grows by one token at a time"
            )

    def place_tokens(
        self, tokens: int, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Give the tokens just counted their slots and positions; this changes the cache.

        Returns positions (B, T), and the mask under which the tokens attend. valid (B, T) bool is
        False at padding; None when nothing is. The mask is (B, 1, T, T) bool for the prefill,
        additive over the prefix (B*K, A*G, T, L) later, and None where a token may see all that
        came before it.
        """
        if valid is None:
            shape = len(self.positions), tokens
            valid = torch.ones(shape, dtype=torch.bool, device=self.device)
        # a position counts real tokens alone
        positions = (self.positions[:, None] + valid.cumsum(-1) - 1).clamp(min=0)
        self.positions += valid.sum(-1)
        if self.suffix is not None:  # a fork sees all of its suffix, and the prefix but for padding
            visible = self.valid[:, None, : self.length]
            return positions, self._additive_mask(visible) if self.padded else None

        # `update` writes to these slots
        self.new_slots = self.next_slot + torch.arange(tokens, device=self.device)
        self.valid.index_copy_(1, self.new_slots, valid)
        self.next_slot += tokens
        if self.is_prefill:
            self.padded = not valid.all()
            return positions, causal_mask(valid) if self.padded else None
        if tokens == 1 and not self.static_shapes and not self.padded:
            return positions, None
        # a token sees the valid slots up to its own, and its own
        slots = torch.arange(
            self.capacity if self.static_shapes else self.length, device=self.device
        )
        own = self.new_slots[:, None]
        visible = self.valid[:, None, : len(slots)] & (slots <= own) | (slots == own)
        return positions, self._additive_mask(visible)

    def _additive_mask(self, visible: Tensor) -> Tensor:
        """visible (B, T, L) bool -> what every block's `attend` adds to scores (B*K, A*G, T, L)."""
        kv, heads = self.config.num_key_value_heads, self.config.num_attention_heads
        zeros = torch.zeros(visible.shape, dtype=self.dtype, device=self.device)
        mask = zeros.masked_fill_(~visible, float("-inf")).repeat_interleave(kv, dim=0)
        return mask[:, None].repeat(1, self.forks * heads // kv, 1, 1)


class LayerCache:
    """The part of a KVCache that one block writes and reads."""

    def __init__(self, cache: KVCache, layer: int):
        self.cache, self.is_prefill, self.prefix = cache, cache.is_prefill, cache.prefix[layer]
        self.suffix = None if cache.suffix is None else cache.suffix[layer]

    def update(self, k: Tensor, v: Tensor) -> None:
        """Store k, v (rows, K, T, D) of the tokens just counted."""
        c, forked = self.cache, self.suffix is not None
        end = c.suffix_length if forked else c.length
        for store, x in zip(self.suffix if forked else self.prefix, (k, v)):
            # by indices held on the device, so that a compiled program does not know the length
            if c.static_shapes and not forked:
                store.index_copy_(2, c.new_slots, x.to(c.dtype))
            else:
                store[:, :, end - x.shape[2] : end] = x

    def attend(self, q: Tensor, mask: Tensor | None) -> Tensor:
        """q (B*A, H, T, D) against the prefix, and each fork's own suffix -> (B*A, H, T, D).

        Plain products instead of `scaled_dot_product_attention`, which cannot read one prefix for
        A rows.
        """
        c, (k, v) = self.cache, self.prefix
        b, kv, n = len(k), k.shape[1], c.forks
        _, h, t, d = q.shape
        seen = c.capacity if c.static_shapes and self.suffix is None else c.length
        k, v = k[:, :, :seen], v[:, :, :seen]
        q = q.to(c.dtype)
        if self.suffix is None and step_attention.handles(k):
            return step_attention.attention(q, k, v, mask)
        k, v = k.flatten(0, 1), v.flatten(0, 1)  # (B*K, L, D)
        if self.suffix is None:
            scores = attention_scores(q.reshape(b * kv, -1, d), k, mask)  # (B*K, G*T, L)
            return scores.softmax(-1).bmm(v).view(b, h, t, d)

        # All forks of a row share the prefix, so their rows are regrouped from (B*A*K, G*T, .) to
        # (B*K, A*G*T, .) and multiplied with it once: queries, scores and weights alike.
        def by_prefix(x: Tensor) -> Tensor:
            x = x.view(b, n, kv, -1, x.shape[-1]).transpose(1, 2)
            return x.reshape(b * kv, -1, x.shape[-1])

        def by_fork(x: Tensor) -> Tensor:
            x = x.view(b, kv, n, -1, x.shape[-1]).transpose(1, 2)
            return x.reshape(b * n * kv, -1, x.shape[-1])

        q = q.reshape(b * n * kv, -1, d)  # (B*A*K, G*T, D)
        own = [x[:, :, : c.suffix_length].flatten(0, 1) for x in self.suffix]
        scores = [
            attention_scores(by_prefix(q), k, mask),
            by_prefix(attention_scores(q, own[0])),
        ]
        # one softmax over both parts (B*K, A*G*T, L + suffix)
        weights = torch.cat(scores, dim=-1).softmax(-1)
        y = by_fork(weights[..., :seen] @ v) + by_fork(weights[..., seen:]) @ own[1]
        return y.view(b * n, h, t, d)


def round_up(slots: int) -> int:
    """The next power of two: few capacities to grow through, and to compile for."""
    return max(MIN_CAPACITY, 1 << (slots - 1).bit_length())


class ChatCache(KVCache):
    """A KV cache kept across turns: only tokens after the longest common prefix are prefilled.

    Give it to `generate` or `stream` at every turn; it grows as it must. It remembers the ids and
    images it has read (`ids`, `pixels`). It knows nothing of weights: when those change, make a new
    one.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model.config.text, 1, 0, model.dtype, model.device)
        self.image_token_id = model.config.image_token_id
        self.tokens_per_image = model.config.tokens_per_image if model.config.vision else 1
        self.ids, self.pixels = [], None

    def common_prefix(self, ids: list[int], pixels: Tensor | None) -> tuple[int, int]:
        """How many tokens, and images among them, were read exactly as this prompt has them."""
        n = min(len(self.ids), len(ids) - 1)  # one token at least is fed: its logits are wanted
        n = next((i for i in range(n) if self.ids[i] != ids[i]), n)
        slots = [i for i in range(n) if ids[i] == self.image_token_id]
        # images whose tokens are all among the first n, until one has other pixels
        both = [] if pixels is None or self.pixels is None else list(zip(self.pixels, pixels))
        whole = min(len(both), len(slots) // self.tokens_per_image)
        same = (torch.equal(old, new.cpu()) for old, new in both[:whole])
        images = next((i for i, equal in enumerate(same) if not equal), whole)
        read = images * self.tokens_per_image
        return (n if read == len(slots) else slots[read]), images

    def reuse_prefix(
        self, ids: list[int], pixels: Tensor | None, slots: int
    ) -> tuple[int, Tensor | None]:
        """Crop to what the prompt shares, and make room for `slots` in all.

        Returns how many tokens of the prompt stay, and the pixels of the images among the others.
        """
        start, images = self.common_prefix(ids, pixels)
        self.crop(start)
        self.ids = ids[:start]
        self.pixels = None if pixels is None else pixels.cpu().clone()  # the caller may reuse his
        if slots > self.capacity:
            more = round_up(slots) - self.capacity
            for i, (k, v) in enumerate(self.prefix):  # one layer at a time: never the cache twice
                k, v = (F.pad(x, (0, 0, 0, more)) for x in (k, v))
                self.prefix[i] = self._ordered(k), v
            self.valid = F.pad(self.valid, (0, more))
        return start, None if pixels is None or images == len(pixels) else pixels[images:]

    def commit(self, decoded: list[Tensor]) -> None:
        """Remember the answer's tokens, each (1,), that were fed; forks are forgotten."""
        if self.suffix is None and decoded:
            self.ids = self.ids + torch.cat(decoded).tolist()
        self.crop(len(self.ids))
