"""quant/awq.py: the search against its definition, what is folded computes the same, and rounding
is beaten on every layer."""

import pytest
import torch
from test_quant import linear, weight
from torch import nn

from llava_min.errors import UserError
from llava_min.quant.awq import Inputs, clip, fold, search_clips, search_scales
from llava_min.quant.group import GroupLinear


def inputs(rows: int = 300, k: int = 256, seed: int = 0) -> torch.Tensor:
    """Some channels are much larger than the others, as in a language model."""
    g = torch.Generator().manual_seed(seed + 100)
    return torch.randn(3, rows // 3, k, generator=g) * torch.randn(k, generator=g).mul(1.5).exp()


def summed(x: torch.Tensor) -> Inputs:
    """The same, as the searches read them: in several parts, as they come in a forward."""
    out = Inputs(x.shape[-1])
    for part in x:
        out.add(part)
    return out


def storage(symmetric: bool = True, bits: int = 4) -> GroupLinear:
    return GroupLinear(256, 96, bits=bits, group_size=64, symmetric=symmetric, device="meta")


def error(w, new, x) -> float:
    return ((new - w) @ x.flatten(0, 1).T).square().mean().item()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("exponent", [None, 0, 13])
def test_scales_are_their_definition(symmetric, exponent):
    """exponent: the one that is made to be best, None for whichever is."""
    rounded, ws, x = storage(symmetric).rounded, [weight(seed=1), weight(48, seed=2)], inputs()
    size, errors, all_scales = x.flatten(0, 1).abs().mean(0), [], []
    for step in range(20):
        s = (size ** (step / 20)).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        new = [rounded(w * s) / s for w in ws]
        errors.append(sum(error(w, n, x) * len(w) for w, n in zip(ws, new)) / 144)
        all_scales.append(s)
    best = min(range(20), key=errors.__getitem__)
    assert 0 < best
    if exponent is not None:
        calls, exact, best = iter(range(20)), rounded, exponent
        rounded = lambda w: w if next(calls) == exponent else exact(w)
    assert torch.allclose(search_scales(ws, summed(x), rounded), all_scales[best], rtol=1e-5)


def test_the_outputs_that_compare_exponents_are_of_every_layer(monkeypatch):
    """Of many outputs evenly spaced ones are taken, and a small layer has its share."""
    monkeypatch.setattr("llava_min.quant.awq.OUTPUTS", 48)
    w = weight(144)
    seen = []
    rounded = lambda v: seen.append(v) or v
    search_scales([w[:96], w[96:]], summed(inputs()), rounded)
    assert torch.allclose(seen[0], w[::3]) and len(seen) == 20


def test_no_row_is_kept_and_all_count():
    x = inputs()
    found, rows = summed(x), x.flatten(0, 1)
    assert found.rows == 300 and torch.allclose(found.h, rows.T @ rows, rtol=1e-4, atol=1e-2)
    assert torch.allclose(found.size, rows.abs().sum(0))
    s = torch.rand(256) + 0.1
    found.divide(s)
    again = summed(x / s)
    assert torch.allclose(found.h, again.h, rtol=1e-4, atol=1e-2)
    assert torch.allclose(found.size, again.size)


def test_clips_are_their_definition():
    w, x, layer = weight(), inputs(512 * 3), storage()
    clips = search_clips(w, summed(x), layer)
    rows = x.flatten(0, 1)
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
    found = summed(x)
    s = search_scales([w], found, layer.rounded)
    scaled = error(w, layer.rounded(w * s) / s, x)
    found.divide(s)
    clips = search_clips(w * s, found, layer)
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
    few, bad = Inputs(256), inputs()
    few.add(inputs()[0, :63])
    with pytest.raises(UserError, match="^data: 63 tokens came to calibrate on, at least 256"):
        search_scales([weight()], few, storage().rounded)
    bad[0, 0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        search_clips(weight(), summed(bad), storage())
