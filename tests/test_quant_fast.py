"""fast/int_matmul.py: the fast products are the plain ones within rounding, gradients too; the
kernel's order gives back exactly what was stored, and takes its place."""

import copy
import os
import subprocess
import sys
import weakref

import pytest
import torch
from test_quant import linear
from torch import nn

from llava_min.fast import int_matmul
from llava_min.fast.int8_matmul import PackedInt8Linear, digits, product_is_exact
from llava_min.fast.int_matmul import (
    FEW,
    IN_KERNELS_ORDER,
    ByRows,
    Int4Linear,
    portable,
    speed_up,
)
from llava_min.quant.group import GroupLinear
from llava_min.quant.hqq import half_quadratic
from llava_min.quant.methods import METHODS, quantized

BF16 = torch.bfloat16


def fast(layer: nn.Module, dtype=BF16) -> nn.Module:
    model = nn.Sequential(copy.deepcopy(layer))
    speed_up(model, dtype)
    return model[0]


@pytest.fixture(params=[True, False], ids=["wide", "narrow"])
def many(request, monkeypatch):
    """Both ways to multiply many rows, whatever this CPU prefers; several pieces."""
    monkeypatch.setattr(int_matmul, "bf16_is_slow", lambda x: request.param and x.dtype == BF16)
    monkeypatch.setattr(int_matmul, "PIECE", 64 * 256)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [1, 2, 17, FEW, FEW + 1, 100])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_fast_is_plain(many, method, rows, dtype):
    plain = quantized(linear(208, 256, dtype=dtype), method)  # three tiles of 64 rows and one of 16
    layer = fast(plain, dtype)
    kernel = dtype == BF16 and method in ("int4", "awq4", "hqq4")
    assert isinstance(layer, (ByRows, *IN_KERNELS_ORDER))
    assert isinstance(layer, Int4Linear) == kernel
    packed = method == "w8a8" or method == "int8" and dtype == BF16
    packed = packed and product_is_exact()
    assert isinstance(layer, PackedInt8Linear) == packed
    x = torch.randn(1, rows, 256).to(dtype)
    y, target = layer(x), plain(x)
    assert y.shape == target.shape and y.dtype == dtype
    most = 1e-5 if dtype == torch.float32 else 8e-3
    assert (y - target).float().norm() <= most * target.float().norm()
    grads = []
    weights = torch.randn_like(y)
    for one in (layer, plain):
        z = x.clone().requires_grad_()
        one(z).backward(weights)
        grads.append(z.grad)
    assert grads[0].dtype == dtype
    most = 1e-6 if dtype == torch.float32 else 4e-3
    assert (grads[0] - grads[1]).float().norm() <= most * grads[1].float().norm()


@pytest.mark.parametrize("method", ["int4", "hqq4", "int8", "w8a8", "nf4", "hqq2"])
@pytest.mark.parametrize("rows", [1, 100])
def test_autocast_and_inference(many, method, rows):
    layer = fast(quantized(linear(dtype=BF16), method))
    x = torch.randn(rows, 256)
    with torch.autocast("cpu", BF16):
        y = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x.to(BF16)), y)
    assert y.dtype == BF16


def group_layers():
    """Layers of 4 bits of every kind that the kernel takes, and shapes with and without whole
    tiles."""
    for n in (16, 48, 64, 112, 208):
        for g in (32, 64, 128, 256):
            for choose, symmetric in ((half_quadratic, False), (None, False), (None, True)):
                layer = GroupLinear(
                    256, n, bits=4, group_size=g, symmetric=symmetric, choose=choose
                )
                layer.load(linear(n, 256, dtype=BF16, seed=n + g).weight)
                yield layer


def test_the_kernels_order_takes_the_place_of_ours_and_gives_it_back():
    for layer in group_layers():
        other = fast(layer)
        assert isinstance(other, Int4Linear)
        assert other.weight_kernel.nbytes == layer.weight_packed.nbytes
        assert {name for name, _ in other.named_parameters()} == {"weight_kernel", "scale_and_zero"}
        assert torch.equal(other.dequantize(), layer.dequantize())
        model = nn.Sequential(other)
        portable(model)
        assert type(model[0]) is GroupLinear and model[0].choose is layer.choose
        assert {k: v.tolist() for k, v in model[0].state_dict().items()} == {
            k: v.tolist() for k, v in layer.state_dict().items()
        }


def test_published_fp16_scales_stay():
    layer = quantized(linear(dtype=BF16, bias=False), "hqq4")
    layer.store(weight_scale=layer.weight_scale.half() * 1.001)  # not bf16 numbers
    other = fast(layer)
    assert torch.equal(other.dequantize(), layer.dequantize())
    assert torch.equal(other.portable().weight_scale, layer.weight_scale)
    x = torch.randn(3, 256, dtype=BF16)
    assert (other(x) - layer(x)).float().norm() <= 8e-3 * layer(x).float().norm()


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_other_cpus_order_is_found_too(capability):
    """The packed order depends on the CPU's instructions: asked to do without some, the kernel has
    another."""
    code = (
        "import torch; torch.manual_seed(0)\n"
        "from llava_min.fast.int_matmul import Int4Linear, cpu_block, kernel_pack\n"
        "from llava_min.quant.methods import empty_layer\n"
        "layer = empty_layer('hqq4', 128, 112)\n"
        "layer.load(torch.randn(112, 128))\n"
        "other, x = Int4Linear(layer), torch.randn(3, 128).bfloat16()\n"
        "assert torch.equal(other.dequantize(), layer.dequantize())\n"
        "assert (other(x) - layer(x)).float().norm() <= 8e-3 * layer(x).float().norm()\n"
        "print(cpu_block(), hash(tuple(other.weight_kernel.flatten().tolist())))"
    )
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_layers_without_a_kernel_are_left():
    for n, g in ((40, 64), (96, 16)):  # rows, or a group, that it does not know
        layer = GroupLinear(256, n, bits=4, group_size=g)
        layer.load(linear(n, 256, dtype=BF16).weight)
        other = fast(layer)
        assert type(other) is int_matmul.GroupByRows
        assert torch.equal(other.weight_packed, layer.weight_packed)


def test_speed_up_leaves_no_second_copy_and_portable_undoes_it():
    layers = [quantized(linear(dtype=BF16), method) for method in METHODS]
    model = nn.Sequential(*copy.deepcopy(layers))
    speed_up(model, BF16)
    speed_up(model, BF16)  # nothing more to do
    stored = [p for p in model.parameters() if not p.is_mkldnn]  # which has no address
    assert len({p.data_ptr() for p in stored}) == len(stored)
    for layer in model:
        kernel = isinstance(layer, IN_KERNELS_ORDER)
        assert hasattr(layer, "weight_kernel") == kernel != hasattr(layer, "weight_packed")
    portable(model)
    for ours, theirs in zip(model, layers):
        assert type(ours) is type(theirs) and set(ours.state_dict()) == set(theirs.state_dict())
        want = theirs.state_dict()
        assert all(torch.equal(x, want[name]) for name, x in ours.state_dict().items())


def test_w8a8_tells_its_error():
    """8-bit inputs: about a hundredth of the output; a token's scale is its own, so the others do
    not move it."""
    layer = linear(dtype=BF16, bias=False)
    plain, exact = quantized(layer, "w8a8"), quantized(layer, "int8")
    x = torch.randn(64, 256, dtype=BF16)
    error = (plain(x) - exact(x)).float().norm() / exact(x).float().norm()
    assert 1e-3 < error < 2e-2
    y = fast(plain)(x)
    far = x.clone()
    far[0] *= 1000
    assert torch.equal(fast(plain)(far)[1:], y[1:]) and torch.equal(fast(plain)(x[5:6]), y[5:6])


@pytest.mark.parametrize("n, bits", [(2, 15), (3, 22)])
def test_digits_are_the_input(n, bits):
    """Of each row to so many bits of its largest, an outlier's neighbours too; NaN stays NaN."""
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    x[3, 5], x[4], x[5, 0] = 1e4, 0, -3e38
    parts, scale = digits(x, n)
    assert parts.shape == (n, 40, 64) and parts.dtype == torch.uint8
    back = sum((part.double() - 128) * 256.0**i for i, part in enumerate(parts)) * scale.double()
    error = (back - x).abs().amax(1) / x.abs().amax(1).clamp(min=1e-30)
    assert error.max() <= 2.0**-bits


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
@pytest.mark.parametrize("rows", [1, 40])
def test_int8_keeps_16_bit_inputs(dtype, rows):
    """An outlier a thousand times the rest does not cost the rest its bits."""
    plain = quantized(linear(208, 256, dtype=dtype, bias=False), "int8")
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[:, 7] *= 1000
    exact = x.double() @ plain.dequantize().double().T
    error = (fast(plain, dtype)(x) - exact).norm() / exact.norm()
    assert error <= {torch.float16: 4e-4, BF16: 2.5e-3}[dtype]
    x[0, 0] = float("nan")
    assert fast(plain, dtype)(x)[0].isnan().all() and fast(plain, dtype)(x)[1:].isfinite().all()


@pytest.mark.parametrize("isa, exact", [("AVX2", False), ("AVX2_VNNI", True)])
def test_a_product_that_saturates_is_not_taken(isa, exact):
    """Asked to do without VNNI, oneDNN's product is another, and the plain one stands."""
    if not product_is_exact():
        pytest.skip("this CPU has no VNNI, or is no x86")
    code = (
        "import torch; from llava_min.fast.int8_matmul import product_is_exact\n"
        "from llava_min.fast.int_matmul import speed_up\n"
        "from llava_min.quant.methods import empty_layer\n"
        "layer = empty_layer('w8a8', 64, 64); layer.load(torch.ones(64, 64))\n"
        "model, x = torch.nn.Sequential(layer), torch.ones(2, 64)\n"
        "speed_up(model, torch.float32)\n"
        "print(product_is_exact(), type(model[0]).__name__, (model(x) - 64).abs().max() < 1e-3)"
    )
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    name = "PackedInt8Linear" if exact else "FastInt8Linear"
    assert run.stdout.split() == [str(exact), name, "tensor(True)"], run.stderr


def test_speed_up_holds_one_layer_twice_at_most(monkeypatch):
    """The layers before are gone when the next one is made."""
    gone = []
    model = nn.Sequential(*(quantized(linear(dtype=BF16, seed=i), "int4") for i in range(3)))
    for layer in model:
        weakref.finalize(layer.weight_packed, gone.append, 1)
    del layer
    counts = []
    make = int_matmul.Int4Linear

    def counting(layer):
        counts.append(len(gone))
        return make(layer)

    monkeypatch.setattr(int_matmul, "Int4Linear", counting)
    speed_up(model, BF16)
    assert counts == [0, 1, 2]
