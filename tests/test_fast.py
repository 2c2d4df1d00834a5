"""fast/ makes one device faster and changes no result: with every guard false the ids are the same."""

import importlib
import pkgutil

import pytest
import torch

import llava_min
from llava_min import fast

PAGES = [
    importlib.import_module(f"llava_min.fast.{page.name}")
    for page in pkgutil.iter_modules(fast.__path__)
]


def test_every_page_has_a_guard():
    assert PAGES and all(callable(getattr(page, "handles", None)) for page in PAGES)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("beams", [1, 3])
def test_without_fast_the_ids_are_the_same(dtype, beams, monkeypatch):
    from PIL import Image

    def answers() -> list[list[int]]:
        model, processor = llava_min.load("tiny", dtype=dtype, device="cpu")
        images = [Image.new("RGB", (64, 64), color) for color in ("red", "white", "navy")]
        prompts = ["USER: <image>\nWhat is in the picture? ASSISTANT:"] * 3
        batch = processor(prompts, images=[[image] for image in images])
        return llava_min.generate(model, batch, max_new_tokens=12, num_beams=beams)

    asked = []
    quick = answers()
    for page in PAGES:
        monkeypatch.setattr(page, "handles", lambda *_: asked.append(page) or False)
    assert answers() == quick and any(quick)
    assert asked  # the guards were looked at


def test_without_fast_the_gradients_are_the_same(monkeypatch):
    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)
        model, processor = llava_min.load("tiny", dtype="fp32", device="cpu")
        ids = processor("USER: one two three ASSISTANT: four")["input_ids"]
        model.requires_grad_(True).train().loss(ids, ids).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    quick = gradients()
    for page in PAGES:
        # an empty batch of images needs its plain form
        if page.__name__ != "llava_min.fast.attention":
            monkeypatch.setattr(page, "handles", lambda *_: False)
    for a, b in zip(quick, gradients(), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9
