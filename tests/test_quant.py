"""quant/: packed = unpacked; a quantized layer is the dequantized one, gradients included; its size
is that of the shapes; HQQ against its definition; one line for what cannot be quantized."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llava_min.config import LlavaConfig
from llava_min.errors import UserError
from llava_min.llava import Llava
from llava_min.lora import full_weight
from llava_min.quant.bits import WIDTHS, pack, unpack
from llava_min.quant.group import GroupLinear
from llava_min.quant.hqq import half_quadratic, shrink
from llava_min.quant.methods import METHODS, bytes_of, empty_layer, quantize_layers, quantized
from llava_min.quant.rounding import asymmetric, decode, encode


def weight(n: int = 96, k: int = 256, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=g) * 0.02 * torch.rand(n, 1, generator=g).add(0.5)


def linear(
    n: int = 96, k: int = 256, bias: bool = True, dtype=torch.float32, seed: int = 0
) -> nn.Linear:
    layer = nn.Linear(k, n, bias=bias, dtype=dtype).requires_grad_(False)
    layer.weight.copy_(weight(n, k, seed))
    return layer


def identity(scale, zero):
    return scale, zero


@pytest.mark.parametrize("bits", WIDTHS)
def test_packed_is_unpacked_and_dense(bits):
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (5, 48), dtype=torch.uint8, generator=g)
    packed = pack(codes, bits)
    assert packed.shape == (5, 48 * bits // 8) and torch.equal(unpack(packed, bits), codes)
    # the documented order, by other means
    stream = sum(int(c) << bits * i for i, c in enumerate(codes[0]))
    assert int.from_bytes(bytes(packed[0].tolist()), "little") == stream


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_quantized_layer_is_the_dequantized_one(method, dtype):
    layer = quantized(linear(dtype=dtype), method)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 256, generator=g).to(dtype).requires_grad_()
    plain, z = layer.dequantize(dtype), x.detach().clone().requires_grad_()
    y, target = layer(x), F.linear(z, plain, layer.bias)
    assert y.dtype == dtype
    if method == "w8a8":  # its input is rounded: nearly equal only
        assert (y - target).norm() <= 0.02 * target.norm()
    else:
        most = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
        assert (y - target).norm() <= most * target.norm()
    grad = torch.randn_like(y)
    y.backward(grad)
    target.backward(grad)
    assert x.grad.dtype == dtype and torch.equal(x.grad, z.grad)
    assert all(p.grad is None and not p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_under_autocast_the_product_has_its_dtype(method):
    layer = quantized(linear(), method)
    x = torch.randn(4, 256, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        target = F.linear(x.detach(), layer.dequantize(), layer.bias)
    assert y.dtype == torch.bfloat16 and (y - target).float().norm() <= 0.02 * target.float().norm()
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.norm() > 0


@pytest.mark.parametrize("method", METHODS)
def test_the_backward_keeps_no_weight(method):
    layer, kept = quantized(linear(bias=False), method), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        layer(torch.randn(3, 256, requires_grad=True))
    assert (96, 256) not in kept and (256, 96) not in kept


@pytest.mark.parametrize("method", METHODS)
def test_saved_is_loaded(method):
    layer = quantized(linear(), method)
    names = {
        "int8": "SCB",
        "w8a8": "SCB",
        "nf4": "absmax nested_absmax nested_offset",
        "int4": "weight_scale",
    }
    names |= {"awq4": names["int4"], "fp4": names["nf4"]}
    expected = {"bias", "weight_packed", *names.get(method, "weight_scale weight_zero").split()}
    assert set(layer.state_dict()) == expected
    empty = empty_layer(method, 256, 96, bias=True, device="meta")
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty.dequantize(), layer.dequantize())
    assert torch.equal(copy.deepcopy(layer).dequantize(), layer.dequantize())


@pytest.mark.parametrize("method", METHODS)
def test_more_bits_are_nearer_and_all_dtypes_of_a_weight_will_do(method):
    w = weight()
    most = {
        "hqq1": 2.0,
        "hqq2": 0.5,
        "hqq3": 0.2,
        "hqq4": 0.1,
        "hqq8": 0.008,
        "int8": 0.008,
        "w8a8": 0.008,
        "nf4": 0.1,
        "fp4": 0.13,
        "int4": 0.13,
        "awq4": 0.13,
    }[method]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = empty_layer(method, 256, 96)
        layer.load(w.to(dtype))
        assert (layer.dequantize() - w).norm() <= most * w.norm()
        assert torch.equal(layer.rows(64, 96), layer.dequantize()[64:])


def test_bf16_is_the_fp32_weight_rounded_once():
    for method in METHODS:
        layer = quantized(linear(), method)
        assert torch.equal(layer.dequantize(torch.bfloat16), layer.dequantize().bfloat16()), method


@pytest.mark.parametrize("method", ["int4", "hqq3"])
def test_pieces_do_not_show(method, monkeypatch):
    from llava_min.quant import group

    if method == "hqq3":  # its stop is that of a piece
        monkeypatch.setattr("llava_min.quant.hqq.ITERATIONS", 3)
    whole = quantized(linear(), method).dequantize()
    monkeypatch.setitem(group.PIECE, "cpu", 1000)
    parts = quantized(linear(), method).dequantize()
    assert (parts - whole).norm() <= 1e-3 * whole.norm()


def test_what_is_rounded_is_what_is_loaded():
    layer = empty_layer("hqq2", 256, 96)
    layer.load(weight())
    assert torch.equal(layer.rounded(weight()), layer.dequantize())


def test_groups_without_both_signs_and_of_zeros():
    up = torch.linspace(1, 1.1, 64)
    w = torch.stack([torch.zeros(64), torch.full((64,), 0.3), up, -up])
    for method in ("hqq8", "hqq4", "hqq3", "hqq2", "int4", "int8", "nf4"):
        layer = empty_layer(method, 64, 4, **({"group_size": 64} if method == "int4" else {}))
        layer.load(w)
        back = layer.dequantize()
        assert torch.isfinite(back).all() and torch.equal(back[0], w[0]), method
        assert (back - w).abs().max() <= 0.2, method


def reference_hqq(w, bits, rounds=20):
    """As hqq does it, w (G, g), from its start; scale, the best zero-points of each group, that of
    rounding to nearest among them but in one bit, and the mean error of each round."""
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    s = ((2**bits - 1) / (high - low)).clamp(max=2e4)
    start, means, tried = -low * s, [], []

    def back(zero):
        codes = (w * s + zero).round().clamp(0, 2**bits - 1)
        return codes, (codes - zero) / s

    if bits > 1:
        zero = start.round()
        tried.append((zero, (w - back(zero)[1]).abs().mean(1, keepdim=True)))
    zero = start.round() if bits == 4 else start
    for _ in range(rounds):
        codes, again = back(zero)
        e = w - again
        tried.append((zero, e.abs().mean(1, keepdim=True)))
        means.append(e.abs().mean().item())
        if len(means) > 1 and means[-1] >= means[-2]:
            break
        e = e.sign() * F.relu(e.abs() - e.abs().pow(-0.3) / 10)
        zero = (codes - (w - e) * s).mean(1, keepdim=True)
    zeros, errors = (torch.cat(x, dim=1) for x in zip(*tried))
    return 1 / s, zeros.gather(1, errors.argmin(1, keepdim=True)), means


@pytest.mark.parametrize("bits", WIDTHS)
# large: what is shrunk does not vanish
@pytest.mark.parametrize("size", [1, 50], ids=["small", "large"])
def test_hqq_is_its_definition(bits, size):
    w = weight(32, 64) * size
    scale, zero = half_quadratic(w.unsqueeze(1), bits, identity)
    theirs = reference_hqq(w, bits)
    assert torch.allclose(scale.squeeze(1), theirs[0], rtol=1e-6)
    same = (zero.squeeze(1) - theirs[1]).abs() <= 1e-3
    error = lambda z: ((w / theirs[0] + z).round().clamp(0, 2**bits - 1) - z - w / theirs[0]).abs()
    a, b = (error(z).mean(1, keepdim=True) for z in (zero.squeeze(1), theirs[1]))
    assert (same | ((a - b).abs() <= 1e-5)).all() and same.float().mean() > 0.8  # or as good
    assert len(theirs[2]) > 2 or bits in (8, 1)


def test_shrink():
    x = torch.tensor([-2.0, -0.1, 0.0, 0.05, 1.0])
    assert torch.allclose(shrink(x), torch.tensor([-2 + 2**-0.3 / 10, 0, 0, 0, 0.9]))
    assert not shrink(x / 100).any()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("seed", range(4))
def test_hqq_never_rises_and_beats_rounding(bits, seed):
    w = weight(64, 256, seed)
    w[seed, seed] = 0.5  # a weight far from the rest
    error = {}
    for name, choose in (("rtn", asymmetric), ("hqq", half_quadratic)):
        layer = GroupLinear(256, 64, bits=bits, group_size=64, choose=choose)
        layer.load(w)
        error[name] = (layer.dequantize() - w).abs().mean().item()
    grouped, layer = w.unflatten(1, (-1, 64)), GroupLinear(256, 64, bits=bits, group_size=64)
    previous = float("inf")
    for rounds in (1, 2, 5, 20):  # by the numbers that are stored
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("llava_min.quant.hqq.ITERATIONS", rounds)
            scale, zero = half_quadratic(grouped, bits, layer.stored)
        back = decode(encode(grouped, scale, zero, bits), scale, zero)
        now = (back - grouped).abs().mean().item()
        assert now <= previous
        previous = now
    if bits > 1:  # of two values, rounding makes nearly all 0, with less error
        assert error["hqq"] <= error["rtn"] * {8: 1, 4: 0.98, 3: 0.96, 2: 0.95}[bits]


@pytest.mark.parametrize("seed", range(4))
def test_one_bit_keeps_the_signs(seed):
    w = weight(64, 256, seed)
    layer = GroupLinear(256, 64, bits=1, group_size=16, choose=half_quadratic)
    layer.load(w)
    # to nearest with a whole zero-point 0.92 are 0
    assert (layer.dequantize().sign() == w.sign()).float().mean() > 0.75


CONFIG_7B = {
    "model_type": "llava",
    "image_token_index": 32000,
    "image_seq_length": 576,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vision_config": dict(
        model_type="clip_vision_model",
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    ),
    "text_config": dict(
        model_type="llama",
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    ),
}


@pytest.mark.parametrize(
    "method, gib",
    [
        ("nf4", 4.21),
        ("int4", 4.20),
        ("awq4", 4.20),
        ("hqq2", 2.88),
        ("hqq4", 4.39),
        ("hqq3", 3.64),
        ("hqq1", 2.13),
        ("int8", 7.13),
        ("hqq8", 7.41),
    ],
)
def test_7b_by_its_shapes(method, gib):
    """GiB of weights to two places, all but the blocks' linear layers in 16 bit. int4 is 4.204, and
    4.180 without the tower's last block, which is never run."""
    with torch.device("meta"):
        model = Llava(LlavaConfig.from_hf(CONFIG_7B))
    parts = {name: p.shape for name, p in model.named_parameters()}
    inner = [
        shape
        for name, shape in parts.items()
        if name.startswith("language_model.layers.") and len(shape) == 2
    ]
    total = sum(shape.numel() for shape in parts.values())
    assert sum(shape.numel() for shape in inner) == 6_476_005_376
    rest = 2 * (total - 6_476_005_376)
    held = rest + sum(bytes_of(method, tuple(shape)) for shape in inner)
    assert round(held / 2**30, 2) == gib


@pytest.mark.parametrize("method", METHODS)
def test_bytes_of_a_layer_are_those_it_has(method):
    layer = quantized(linear(bias=False), method)
    held = sum(p.untyped_storage().nbytes() for p in layer.parameters())
    assert held == bytes_of(method, (96, 256))
    per_weight = 8 * held / (96 * 256)
    expected = {
        "int4": 4.125,
        "awq4": 4.125,
        "int8": 8.125,
        "w8a8": 8.125,
        "nf4": 4.129,
        "fp4": 4.129,
    }.get(method, float(method[-1]) + 24 / 64)
    assert per_weight == pytest.approx(expected, abs=1e-3)


def test_full_weight_of_any_linear_layer():
    layer = linear()
    assert full_weight(layer) is layer.weight
    assert full_weight(layer, torch.bfloat16).dtype == torch.bfloat16
    new = quantized(layer, "hqq4")
    assert torch.equal(full_weight(new), new.dequantize())
    assert full_weight(new, torch.float16).dtype == torch.float16


def test_layers_are_replaced_by_path():
    model = nn.Sequential(linear(64, 128), nn.Sequential(linear(128, 64)))
    x, before = torch.randn(3, 128), model[0].weight.clone()
    quantize_layers(model, ["0", "1.0"], "hqq8")
    assert [type(m) for m in (model[0], model[1][0])] == [GroupLinear] * 2
    assert (model[0].dequantize() - before).abs().max() < 1e-3 and model(x).shape == (3, 128)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(128, 64))
    quantize_layers(empty, ["0"], "nf4")
    assert empty[0].weight_packed.is_meta
    empty[0].load(before)  # as it arrives
    assert empty[0].weight_packed.shape == (64 * 128 // 2, 1)


def test_what_cannot_be_quantized_is_one_line():
    nan, far = weight(), weight()
    nan[3, 5], far[3, 5] = float("nan"), float("inf")
    cases = [
        (lambda: empty_layer("int5", 256, 96), "no method; there are int8"),
        (lambda: empty_layer("int4", 100, 96), "size: 128 does not divide the width 100"),
        (lambda: empty_layer("hqq4", 256, 96, group_size=60), "group_size: 60"),
        (lambda: empty_layer("nf4", 256, 96, group_size=64), "nf4 has none"),
        (lambda: empty_layer("nf4", 10, 3), "whole blocks of 64"),
        (lambda: GroupLinear(256, 96, bits=5, group_size=64), "bits: 5"),
        (lambda: GroupLinear(256, 96, bits=1, group_size=64, symmetric=True), "bits: 1"),
        (lambda: quantized(quantized(linear(), "int8"), "nf4"), "quantized already"),
    ]
    cases += [
        (lambda m=m, w=w: empty_layer(m, 256, 96).load(w), "NaN or infinity")
        for m in METHODS
        for w in (nan, far)
    ]
    cases += [(lambda: empty_layer("nf4", 128, 96).load(weight()), "(96, 256) came")]
    for call, words in cases:
        with pytest.raises(UserError) as e:
            call()
        assert words in str(e.value) and "\n" not in str(e.value)


def test_a_layer_that_could_not_be_loaded_keeps_what_it_had():
    layer = quantized(linear(), "hqq4")
    before = layer.dequantize()
    with pytest.raises(UserError):
        layer.load(torch.full((96, 256), float("nan")))
    assert torch.equal(layer.dequantize(), before)


@pytest.mark.parametrize("method", ["int8", "w8a8"])
def test_int8_refuses_what_fp16_cannot_hold(method):
    w = torch.ones(96, 256)
    w[3, 5] = 1e5
    with pytest.raises(UserError, match="beyond 65504"):
        empty_layer(method, 256, 96).load(w)
