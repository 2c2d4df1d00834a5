"""quant/awq.py: the search against its definition, what is folded computes the same, and rounding
is beaten on every layer."""

import pytest
import torch
from test_quant import linear, weight
from torch import nn

from llava_min.errors import UserError
from llava_min.quant.awq import clip, fold, search_clips, search_scales
from llava_min.quant.group import GroupLinear


def inputs(rows: int = 300, k: int = 256, seed: int = 0) -> torch.Tensor:
    """Some channels are much larger than the others, as in a language model."""
    g = torch.Generator().manual_seed(seed + 100)
    return torch.randn(3, rows // 3, k, generator=g) * torch.randn(k, generator=g).mul(1.5).exp()


def storage(symmetric: bool = True, bits: int = 4) -> GroupLinear:
    return GroupLinear(256, 96, bits=bits, group_size=64, symmetric=symmetric, device="meta")


def error(w, new, x) -> float:
    return ((new - w) @ x.flatten(0, 1).T).square().mean().item()


@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_their_definition(symmetric):
    rounded, ws, x = storage(symmetric).rounded, [weight(seed=1), weight(48, seed=2)], inputs()
    size, errors, all_scales = x.flatten(0, 1).abs().mean(0), [], []
    for step in range(20):
        s = (size ** (step / 20)).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        new = [rounded(w * s) / s for w in ws]
        errors.append(sum(error(w, n, x) * len(w) for w, n in zip(ws, new)) / 144)
        all_scales.append(s)
    best = min(range(20), key=errors.__getitem__)
    assert 0 < best and torch.allclose(search_scales(ws, x, rounded), all_scales[best])


def test_the_callers_output_decides():
    rounded, w, x = storage().rounded, weight(), inputs()
    seen = []
    s = search_scales([w], x, rounded, lambda ws: seen.append(len(ws)) or torch.zeros(1))
    # nothing is better than plain rounding, the first
    assert seen == [1] * 21 and torch.equal(s, torch.ones(256))


def test_clips_are_their_definition():
    w, x, layer = weight(), inputs(512 * 3), storage()
    clips = search_clips(w, x, layer)
    rows = x.flatten(0, 1)[::3][:512]
    best = torch.full((96, 4), float("inf"))
    want = torch.zeros(96, 4)
    for step in range(10):
        size = w.unflatten(1, (4, 64)).abs().amax(-1, keepdim=True) * (1 - step / 20)
        d = layer.rounded(w.unflatten(1, (4, 64)).clamp(-size, size).flatten(1)) - w
        d, x = d.unflatten(1, (4, 64)), rows.unflatten(1, (4, 64))
        e = torch.einsum("ngi,rgi->rng", d, x).square().mean(0)
        want, best = torch.where(e < best, size.squeeze(-1), want), torch.minimum(e, best)
    same = torch.isclose(clips.squeeze(-1), want, rtol=1e-5)
    cut = want < w.unflatten(1, (4, 64)).abs().amax(-1)
    assert same.float().mean() > 0.99 and cut.float().mean() > 0.3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("symmetric, bits", [(True, 4), (False, 4), (False, 3)])
def test_awq_beats_rounding_on_every_layer(seed, symmetric, bits):
    w, x, layer = weight(seed=seed), inputs(seed=seed), storage(symmetric, bits)
    plain = error(w, layer.rounded(w), x)
    s = search_scales([w], x, layer.rounded)
    scaled = error(w, layer.rounded(w * s) / s, x)
    clips = search_clips(w * s, x / s, layer)
    clipped = error(w, layer.rounded(clip(w * s, clips)) / s, x)
    assert scaled < 0.8 * plain and clipped < scaled


@pytest.mark.parametrize(
    "before",
    [nn.LayerNorm(256), nn.RMSNorm(256), nn.Linear(40, 256), nn.Linear(40, 256, bias=False)],
    ids=["layer norm", "rms norm", "linear", "no bias"],
)
def test_what_is_folded_computes_the_same(before):
    layers = [linear(), linear(48, bias=False)]
    x = torch.randn(7, 256 if before.weight.dim() == 1 else 40)
    outputs = [layer(before(x)) for layer in layers]
    s, inner = torch.rand(256).add(0.1), before(x)
    fold(before, layers, s)
    assert torch.allclose(before(x) * s, inner, atol=1e-5)
    assert all(torch.allclose(layer(before(x)), y, atol=1e-5) for layer, y in zip(layers, outputs))


def test_calibration_that_does_not_do_is_one_line():
    with pytest.raises(UserError, match="63 rows of input came, at least 64"):
        search_scales([weight()], inputs()[0, :63], storage().rounded)
    bad = inputs()
    bad[0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        search_clips(weight(), bad, storage())
