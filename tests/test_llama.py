"""llama.py: transformers' hidden states for every decoder; the same whatever the cache, padding and
branches.
"""

import itertools

import pytest
import torch
from conftest import KINDS, TEXT, their_model

from llava_min.cache import KVCache, causal_mask
from llava_min.config import TextConfig
from llava_min.llama import Llama, rotary

T = 20  # tokens in a row


def config_of(kind: str, **change) -> TextConfig:
    return TextConfig.from_hf({**TEXT, **KINDS[kind], **change})


@pytest.fixture(scope="module", params=KINDS)
def decoder(request):
    """Ours alone, so that the cache is tested without transformers too."""
    torch.manual_seed(1)
    model = Llama(config_of(request.param)).eval().requires_grad_(False)
    for p in model.parameters():
        p.copy_(
            torch.randn_like(p) * p[0].numel() ** -0.5
            if p.dim() > 1
            else 1 + 0.3 * torch.randn_like(p)
        )
    return model


def batch(b: int = 2, t: int = T, pads: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedded tokens (B, T, C) and which of them are real, row i padded on the left by pads[i]."""
    x = torch.randn(b, t, TEXT["hidden_size"], generator=torch.Generator().manual_seed(2))
    real = torch.ones(b, t, dtype=torch.bool)
    for row, n in zip(real, pads):
        row[:n] = False
    return x, real


def uncached(model: Llama, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    return model(x, (real.cumsum(-1) - 1).clamp(min=0), None if real.all() else causal_mask(real))


def step(
    model: Llama, cache: KVCache, x: torch.Tensor, real: torch.Tensor | None = None
) -> torch.Tensor:
    cache.advance(x.shape[1])
    positions, mask = cache.place_tokens(x.shape[1], real)
    return model(x, positions, mask, cache)


def new_cache(model: Llama, b: int = 2, static_shapes: bool = False) -> KVCache:
    return KVCache(
        model.config, b, T + 3, torch.float32, torch.device("cpu"), static_shapes=static_shapes
    )


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_equal_transformers(kind):
    theirs = their_model(kind).model.language_model
    ours = Llama(config_of(kind)).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    x, real = batch(pads=(0, 7))
    for real in (torch.ones_like(real), real):
        positions = (real.cumsum(-1) - 1).clamp(min=0)
        expected = theirs(
            inputs_embeds=x, attention_mask=real.long(), position_ids=positions
        ).last_hidden_state
        assert ((uncached(ours, x, real) - expected)[real]).abs().max() <= 1e-5
    blocks = []  # and before the last norm, whose weights could hide a scale
    for layers in (ours.layers, theirs.layers):
        layers[-1].register_forward_hook(lambda m, i, out: blocks.append(out))
    uncached(ours, x, torch.ones_like(real)), theirs(inputs_embeds=x)
    assert (blocks[0] - blocks[1]).abs().max() <= 1e-5


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
def test_rotary_angles_far_out(theta):
    rope = pytest.importorskip(
        "transformers.models.llama.modeling_llama", reason="the oracle of this test"
    )
    from transformers import LlamaConfig

    config = config_of("llama", rope_theta=theta, head_dim=64, max_position_embeddings=1 << 17)
    positions = torch.tensor([[0, 1, 577, 4095, 131071]])
    theirs = rope.LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=256,
            num_attention_heads=4,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
        )
    )
    minus = torch.tensor([-1.0] * 32 + [1.0] * 32)  # ours has the sign of rotate_half in its sines
    for got, expected, sign in zip(
        rotary(positions, config, torch.float32), theirs(torch.zeros(1), positions), (1, minus)
    ):
        expected = expected * sign
        # angles of 1e5 are known to 0.01 in fp32; both sides round alike but for the frequencies'
        # last bits
        assert (got[:, 0, :4] - expected[:, :4]).abs().max() <= 2e-3 and (
            got[:, 0] - expected
        ).abs().max() <= 0.05


def test_angles_are_made_in_fp32_and_then_rounded():
    positions, config = torch.tensor([[0, 1, 577, 4095]]), config_of("llama")
    for got, exact in zip(
        rotary(positions, config, torch.bfloat16), rotary(positions, config, torch.float32)
    ):
        assert torch.equal(got, exact.bfloat16())


@pytest.mark.parametrize("cuts", [(), (1,), (10, 14, 15, 16), (1, 2, 3), (5, 19)], ids=str)
@pytest.mark.parametrize("pads", [(), (3, 0), (0, 9)], ids=str)
@pytest.mark.parametrize("static", [False, True])
def test_cached_is_uncached(decoder, cuts, pads, static):
    """The row in pieces of every kind: one prompt, a prompt and steps, two prompts as in a chat."""
    x, real = batch(pads=pads)
    # padding is at the start of the first piece only
    cuts = tuple(c for c in cuts if c > max((0, *pads)))
    expected, cache = uncached(decoder, x, real), new_cache(decoder, static_shapes=static)
    pieces = [
        step(decoder, cache, x[:, a:b], real[:, a:b] if a == 0 else None)
        for a, b in itertools.pairwise((0, *cuts, T))
    ]
    assert (torch.cat(pieces, 1) - expected)[real].abs().max() <= 1e-5
    assert cache.length == T and torch.equal(cache.positions, real.sum(-1))


@pytest.mark.parametrize("pads", [(), (3, 0)], ids=str)
@pytest.mark.parametrize("n", [1, 3])
def test_branches_go_on_from_one_prompt(decoder, pads, n):
    """Every branch is the prompt and its own tokens; a branch that is reordered is a copy of the
    other.
    """
    x, real = batch(t=12, pads=pads)
    own = torch.randn(2 * n, 4, TEXT["hidden_size"], generator=torch.Generator().manual_seed(3))
    cache = new_cache(decoder)
    step(decoder, cache, x, real)
    cache.fork(n, 6)
    got = torch.cat([step(decoder, cache, own[:, i : i + 1]) for i in range(4)], 1)
    whole = torch.cat([x.repeat_interleave(n, 0), own], 1)
    seen = torch.cat([real.repeat_interleave(n, 0), torch.ones(2 * n, 4, dtype=torch.bool)], 1)
    assert (got - uncached(decoder, whole, seen)[:, 12:]).abs().max() <= 1e-5
    # within each prompt, from the last to the first
    rows = torch.arange(2 * n).view(2, n).flip(1).flatten()
    rows[0] = rows[n - 1]
    cache.reorder(rows)
    last = torch.randn(2 * n, 1, TEXT["hidden_size"])
    expected = uncached(
        decoder, torch.cat([whole[rows], last], 1), torch.cat([seen, seen[:, :1] | True], 1)
    )[:, -1:]
    assert (step(decoder, cache, last) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("static", [False, True])
def test_a_cropped_cache_has_forgotten(decoder, static):
    x, real = batch(pads=(2, 0))
    cache = new_cache(decoder, static_shapes=static)
    step(decoder, cache, x[:, :8], real[:, :8])
    step(decoder, cache, x[:, 8:11] * 5)
    cache.fork(2, 3)
    step(decoder, cache, torch.randn(4, 1, TEXT["hidden_size"]))
    cache.crop(8)
    got = torch.cat([step(decoder, cache, x[:, 8:15]), step(decoder, cache, x[:, 15:16])], 1)
    assert (got - uncached(decoder, x[:, :16], real[:, :16])[:, 8:]).abs().max() <= 1e-5


def test_the_cache_does_not_overflow(decoder):
    x, _ = batch()
    cache = new_cache(decoder)
    step(decoder, cache, x)
    with pytest.raises(AssertionError, match="24 tokens, 23 slots"):
        cache.advance(4)
    cache.crop(T)
    cache.fork(2, 1)
    cache.advance(1)
    with pytest.raises(AssertionError, match="one token at a time"):
        cache.advance(1)


def test_padding_sees_only_itself():
    mask = causal_mask(torch.tensor([[False, True, True]]))[0, 0]
    assert mask.tolist() == [[True, False, False], [False, True, False], [False, True, True]]


def test_bf16_is_near(decoder):
    x, real = batch()
    exact = uncached(decoder, x, real)
    half = Llama(decoder.config).eval().requires_grad_(False)
    half.load_state_dict(decoder.state_dict())
    half.bfloat16()
    assert (uncached(half, x.bfloat16(), real).float() - exact).norm() < 0.03 * exact.norm()
    cache = KVCache(half.config, 2, T, torch.bfloat16, torch.device("cpu"))
    got = torch.cat(
        [step(half, cache, x[:, :15].bfloat16()), step(half, cache, x[:, 15:].bfloat16())], 1
    )
    assert got.dtype == torch.bfloat16 and (got.float() - exact).norm() < 0.03 * exact.norm()
