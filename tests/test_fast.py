"""fast/ makes one device faster and changes no result: with every guard false the ids are the same."""

import importlib
import pkgutil
from types import SimpleNamespace

import pytest
import torch

import llava_min
from llava_min import fast
from llava_min.cache import ChatCache, KVCache
from llava_min.fast import step_attention

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


def filled_cache(kv: int, padded: bool, slots: int = 40) -> KVCache:
    """30 tokens of 2 rows in bf16, the second row's first 7 padding."""
    sizes = dict(num_attention_heads=4, num_key_value_heads=kv, head_dim=16, num_hidden_layers=1)
    cpu, g = torch.device("cpu"), torch.Generator().manual_seed(kv)
    cache = KVCache(SimpleNamespace(**sizes), 2, slots, torch.bfloat16, cpu)
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[1, :7] = not padded
    cache.advance(30)
    cache.place_tokens(30, valid)
    cache.layers()[0].update(
        *(torch.randn(2, kv, 30, 16, generator=g).bfloat16() for _ in range(2))
    )
    return cache


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("kv, tokens", [(4, 1), (2, 1), (4, 5), (2, 20), (4, 20)])
def test_the_fused_step_is_the_plain_one(kv, tokens, padded, slow, monkeypatch):
    """Attention to a cache in bf16 on CPU, few tokens and many, with bf16 products fast or slow."""
    monkeypatch.setattr(step_attention, "bf16_is_slow", lambda x: slow)
    g = torch.Generator().manual_seed(tokens)
    k, v = (torch.randn(2, kv, tokens, 16, generator=g).bfloat16() for _ in range(2))
    q = torch.randn(2, 4, tokens, 16, generator=g).bfloat16()
    out, orders = [], []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(step_attention, "handles", lambda k: False)
        cache = filled_cache(kv, padded, 60)
        cache.advance(tokens)
        _, mask = cache.place_tokens(tokens)
        cache.layers()[0].update(k, v)
        out.append(cache.layers()[0].attend(q, mask))
        orders.append(cache.prefix[0][0].is_contiguous())
    assert orders == [True, False] and out[0].dtype == out[1].dtype
    assert (out[0] - out[1]).float().norm() <= 8e-3 * out[1].float().norm()


def test_keys_lie_as_beams_want_them_and_back():
    cache = filled_cache(2, padded=False)
    before = [x.clone() for x in cache.prefix[0]]
    cache.fork(3, 5)
    keys = (cache.prefix[0][0], cache.suffix[0][0])
    assert all(k.mT.is_contiguous() and not k.is_contiguous() for k in keys)
    cache.crop(30)
    assert cache.prefix[0][0].is_contiguous()
    assert all(map(torch.equal, cache.prefix[0], before))


def test_a_chat_in_bf16_grows_in_order():
    model, processor = llava_min.load("tiny", dtype="bf16", device="cpu")
    cache = ChatCache(model)
    for text, beams in (("USER: one two ASSISTANT:", 1), ("USER: one two three ASSISTANT:", 2)):
        batch = processor([text])
        want = llava_min.generate(model, batch, max_new_tokens=300, num_beams=beams)
        got = llava_min.generate(model, batch, max_new_tokens=300, num_beams=beams, cache=cache)
        assert got == want and all(k.is_contiguous() for k, _ in cache.prefix)
