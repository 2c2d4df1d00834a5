"""clip.py: every hidden state of transformers' CLIP, and no block run in vain."""

import pytest
import torch
from conftest import VISION

from llava_min.clip import VisionTower
from llava_min.config import VisionConfig

transformers = pytest.importorskip(
    "transformers", reason="the oracle of these tests; pip install -e '.[test]'"
)


def towers(layers_used: int, **change):
    config = {**VISION, **change}
    theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**config))
    theirs.eval().requires_grad_(False)
    torch.manual_seed(0)
    for name, p in theirs.named_parameters():
        p.copy_(
            torch.randn_like(p) * (p[0].numel() ** -0.5 if p.dim() > 1 else 0.3)
            + ("norm" in name and "weight" in name and p.dim() == 1)
        )
    ours = VisionTower(VisionConfig.from_hf(config), layers_used).eval().requires_grad_(False)
    ours.load_state_dict(
        {
            n.removeprefix("vision_model.").replace("encoder.", ""): x
            for n, x in theirs.state_dict().items()
        }
    )
    return theirs, ours


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"hidden_act": "gelu"},
        {"layer_norm_eps": 1e-2},
        {"image_size": 42, "patch_size": 7},
        {"image_size": 33, "patch_size": 8},
        {"num_attention_heads": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("layer", range(4))
def test_every_hidden_state(change, layer):
    theirs, ours = towers(layer, **change)
    size = change.get("image_size", 28)
    pixels = torch.randn(3, 3, size, size)
    expected = theirs(pixels, output_hidden_states=True).hidden_states
    got = ours(pixels)
    assert got.shape == (3, ours.embeddings.position_embedding.num_embeddings, 32)
    assert (got - expected[layer]).abs().max() <= 1e-5
    others = [h for i, h in enumerate(expected) if i != layer]
    assert min((got - h).abs().max() for h in others) > 0.1  # and of no other layer


@pytest.mark.parametrize("layers_used", range(4))
def test_only_the_blocks_that_are_read_are_run(layers_used):
    _, ours = towers(layers_used)
    run = []
    for name, module in ours.named_modules():
        module.register_forward_hook(lambda *_, name=name: run.append(name))
    ours(torch.randn(1, 3, 28, 28))
    assert [f"layers.{i}" for i in range(3) if f"layers.{i}" in run] == [
        f"layers.{i}" for i in range(layers_used)
    ]
    assert "post_layernorm" not in run
    parts = {"pre_layrnorm", "post_layernorm", *(f"layers.{i}" for i in range(3))}
    assert ours.unused_modules() == parts - set(run)
    # kept for the round trip
    assert {"post_layernorm.weight", "layers.2.mlp.fc1.weight"} <= ours.state_dict().keys()


def test_a_picture_does_not_see_its_neighbours():
    _, ours = towers(2)
    pixels = torch.randn(4, 3, 28, 28)
    assert (ours(pixels)[2:3] - ours(pixels[2:3])).abs().max() <= 1e-5


def test_half_precision_is_near():
    _, ours = towers(2)
    pixels = torch.randn(2, 3, 28, 28)
    exact = ours(pixels)
    for dtype in (torch.bfloat16, torch.float16):
        near = ours.to(dtype)(pixels.to(dtype))
        assert near.dtype == dtype and (near.float() - exact).norm() < 0.03 * exact.norm()
        ours.float()
