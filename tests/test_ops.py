"""ops.py, fast/recompute.py and fast/attention.py: the same values and gradients as PyTorch's own
functions, and less kept for the backward.
"""

import pytest
import torch
import torch.nn.functional as F

from llava_min.fast import attention as fast_attention
from llava_min.ops import attention, rms_norm, swiglu


def gradients(f, *inputs: torch.Tensor) -> list[torch.Tensor]:
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = f(*inputs)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    (y * weights).sum().backward()
    return [y.detach(), *(x.grad for x in inputs)]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and (a - b).double().norm() <= tolerance * b.double().norm()


def normal(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_rms_norm_and_swiglu(dtype, tolerance):
    x, w, gate, up = (
        normal(2, 7, 64, dtype=dtype),
        normal(64, dtype=dtype),
        normal(2, 7, 48, dtype=dtype),
        normal(2, 7, 48, dtype=dtype, seed=1),
    )
    same(
        gradients(lambda x, w: rms_norm(x, w, 1e-5), x, w),
        gradients(lambda x, w: F.rms_norm(x, w.shape, w, 1e-5), x, w),
        tolerance,
    )
    same(
        gradients(swiglu, gate, up),
        gradients(lambda gate, up: F.silu(gate) * up, gate, up),
        tolerance,
    )


def test_a_frozen_norm_gets_no_gradient():
    x, w = normal(3, 8).requires_grad_(), normal(8)
    rms_norm(x, w, 1e-5).sum().backward()
    assert x.grad is not None and w.grad is None


@pytest.mark.parametrize("kv", [4, 2])
@pytest.mark.parametrize("kind", ["causal", "mask", "all"])
@pytest.mark.parametrize("length", [9, 300])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("slow", [True, False])
def test_attention_is_pytorchs(kv, kind, length, dtype, tolerance, slow, monkeypatch):
    monkeypatch.setattr(
        fast_attention, "bf16_is_slow", lambda x: slow and x.dtype == torch.bfloat16
    )
    q, k, v = (
        normal(2, 4, length, 16, dtype=dtype),
        normal(2, kv, length, 16, dtype=dtype, seed=1),
        normal(2, kv, length, 16, dtype=dtype, seed=2),
    )
    mask = torch.rand(2, 1, length, length, generator=torch.Generator().manual_seed(3)) < 0.5
    mask = mask | torch.eye(length, dtype=torch.bool) if kind == "mask" else None
    ours = gradients(lambda *x: attention(*x, mask, kind == "causal"), q, k, v)
    plain = lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=kind == "causal", enable_gqa=kv != 4
    )
    theirs = [x.to(dtype) for x in gradients(plain, q.float(), k.float(), v.float())]
    same(ours, theirs, tolerance)
    with torch.no_grad():
        same([attention(q, k, v, mask, kind == "causal")], theirs[:1], tolerance)


def test_autocast_does_not_narrow_what_was_widened(monkeypatch):
    monkeypatch.setattr(fast_attention, "bf16_is_slow", lambda x: x.dtype == torch.bfloat16)
    real, made = F.scaled_dot_product_attention, []
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **kw: made.append(real(*a, **kw)) or made[-1]
    )
    q = normal(1, 2, 9, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(q, q, q)
    assert y.dtype == torch.bfloat16 and [x.dtype for x in made] == [torch.float32]


def test_attention_of_no_rows_has_gradients():
    q, k, v = (normal(0, 4, 300, 16).requires_grad_() for _ in range(3))
    attention(q, k, v, causal=True).sum().backward()
    assert all(x.grad is not None for x in (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_less_is_kept(dtype):
    """What a block keeps are its inputs: no fp32 copy of bf16 numbers, no activation."""
    kept = []
    x, w = normal(2, 300, 64, dtype=dtype).requires_grad_(), normal(64, dtype=dtype)
    q = normal(2, 4, 300, 16, dtype=dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, w, 1e-5)
        swiglu(x, x)
        if dtype == torch.bfloat16:
            attention(q, q, q, causal=True)
    assert {t.dtype for t in kept} == {dtype} and len(kept) == (4 if dtype == torch.float32 else 8)
