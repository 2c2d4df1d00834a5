"""cpu_linear.py: packed weights give the plain layer's products and gradients, by either path, and
stay themselves.
"""

import platform

import pytest
import torch
import torch.nn.functional as F
from conftest import our_model, pixels, rows, their_model
from torch import nn

import llava_min
from llava_min.fast import cpu_linear
from llava_min.fast.cpu_linear import PrepackedLinear, unpacked
from llava_min.lora import LoRAConfig
from llava_min.training.targets import add_lora

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64")
    or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="oneDNN has no bf16 here",
)


@pytest.fixture(params=[True, False], ids=["wide", "narrow"])
def path(request, monkeypatch):
    """Both paths of a large product, whatever this CPU prefers."""
    monkeypatch.setattr(cpu_linear, "bf16_is_slow", lambda x: request.param)
    monkeypatch.setattr(
        cpu_linear,
        "upcast_linears",
        lambda model: cpu_linear.swap_linears(model, lambda weight: weight),
    )


def near(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (
        a.dtype == b.dtype == torch.bfloat16 and (a - b).float().norm() <= 0.01 * b.float().norm()
    )


@pytest.mark.parametrize("swap", ["prepack_linears", "upcast_linears"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [1, 4, 47, 48, 200])
def test_packed_is_plain(path, swap, bias, count, monkeypatch):
    monkeypatch.setattr(cpu_linear, "CHUNK", 1000)  # several pieces, the last one smaller
    torch.manual_seed(0)
    layer = nn.Linear(48, 72, bias=bias).bfloat16().requires_grad_(False)
    x = torch.randn(2, count, 48).bfloat16()
    model = nn.Sequential(layer)
    getattr(cpu_linear, swap)(model)
    near(model(x), layer(x))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = torch.randn(2, count, 72).bfloat16()
    for y, f in ((ours, model), (theirs, layer)):
        (f(y) * weights).sum().backward()
    near(ours.grad, theirs.grad)


def test_autocast_does_not_narrow_what_was_widened(monkeypatch):
    monkeypatch.setattr(cpu_linear, "bf16_is_slow", lambda x: True)
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False).bfloat16().requires_grad_(False)
    x, seen = torch.randn(100, 64), []
    monkeypatch.setattr(
        F, "linear", lambda *a, real=F.linear: seen.append(real(*a).dtype) or real(*a)
    )
    with torch.autocast("cpu", torch.bfloat16):
        y = PrepackedLinear(layer, lambda weight: weight)(x)
    assert y.dtype == torch.bfloat16 and seen == [torch.float32]


def test_a_packed_model_answers_alike_and_keeps_its_tensors(path):
    model = our_model(their_model()).bfloat16()
    want = {n: p.clone() for n, p in model.named_parameters()}
    ids, pictures = rows(1, 2, length=60), pixels(3)
    with torch.no_grad():
        logits = model(ids, pictures)
        cpu_linear.prepack_linears(model)
        near(model(ids, pictures), logits)
    assert sum(isinstance(m, PrepackedLinear) for m in model.modules()) == 6 * 3 + 2 + 7 * 2 + 1
    got = dict(model.named_parameters())
    assert got.keys() == want.keys() and all(
        torch.equal(unpacked(got[n]), p) and got[n].shape == p.shape for n, p in want.items()
    )


def test_what_is_trained_is_left_alone():
    model = our_model(their_model()).bfloat16()
    model.multi_modal_projector.requires_grad_()
    model.lm_head.float()
    cpu_linear.prepack_linears(model)
    assert isinstance(model.multi_modal_projector.linear_1, nn.Linear) and isinstance(
        model.lm_head, nn.Linear
    )


def test_lora_learns_over_packed_layers(path):
    torch.manual_seed(0)
    ids, pictures = rows(1, length=60), pixels(1)
    grads = []
    for swap in (lambda model: None, cpu_linear.prepack_linears, cpu_linear.upcast_linears):
        model = our_model(their_model()).bfloat16()
        swap(model)
        torch.manual_seed(0)
        add_lora(model, LoRAConfig(4))
        for name, p in model.named_parameters():
            if ".lora_" in name:
                p.requires_grad_()
                p.data = p.data.float().uniform_(-0.1, 0.1)
        with torch.autocast("cpu", torch.bfloat16):
            model.loss(ids, ids, pictures).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for other in grads[1:]:
        assert grads[0].keys() == other.keys() and len(other) == 2 * 7 * 2
        for name, g in grads[0].items():
            assert (other[name] - g).norm() <= 0.05 * g.norm(), name


def test_load_packs_in_bf16():
    model, _ = llava_min.load("tiny", dtype="bf16", device="cpu")
    assert isinstance(model.language_model.layers[0].mlp.up_proj, PrepackedLinear)


def test_a_tied_head_stays_tied():
    model = our_model(their_model("qwen2")).bfloat16()
    cpu_linear.prepack_linears(model)
    assert (
        model.lm_head.weight is model.language_model.embed_tokens.weight
        and not model.lm_head.weight.is_mkldnn
    )


def test_a_packed_model_is_saved_as_it_was_read(tmp_path):
    from safetensors.torch import load_file

    from llava_min.export.stream import save_weights

    model = our_model(their_model()).bfloat16()
    save_weights(dict(model.named_parameters()), tmp_path)
    plain = load_file(tmp_path / "model.safetensors")
    cpu_linear.prepack_linears(model)
    save_weights(dict(model.named_parameters()), tmp_path)
    again = load_file(tmp_path / "model.safetensors")
    assert plain.keys() == again.keys() and all(torch.equal(again[n], x) for n, x in plain.items())
