"""quant/'s files: bit for bit bitsandbytes' tensors, both ways; compressed-tensors' and AWQ's
packing by their own means."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_quant import linear, weight

from llava_min.errors import UserError
from llava_min.quant import awq_gemm, bitsandbytes, compressed_tensors
from llava_min.quant.codebook import CodebookLinear, codebook, quantize_sizes
from llava_min.quant.folder import Stored, tensors_of
from llava_min.quant.group import GroupLinear
from llava_min.quant.methods import empty_layer, quantized

KINDS = ("nf4", "fp4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def bnb():
    pytest.importorskip("bitsandbytes", reason="the oracle of this test; pip install bitsandbytes")
    import bitsandbytes.functional as functional

    return functional


def raw(n: int = 192, k: int = 448, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    """A weight with whole blocks of zeros, values on the edge of two codes, and one far from the
    rest."""
    w = weight(n, k, seed)
    w[0, :64], w[1, 0], w[2] = 0, 1.0, torch.linspace(-0.02, 0.02, k)
    return w.to(dtype)


def theirs(bnb, w, kind: str, double: bool = True) -> dict[str, torch.Tensor]:
    packed, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=double, quant_type=kind)
    stats = state.as_dict(packed=True)
    return {"weight": packed, **{f"weight.{name}": x for name, x in stats.items()}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_four_bits_are_bitsandbytes_both_ways(bnb, kind, dtype, double, tmp_path):
    w = raw(dtype=dtype)
    layer = CodebookLinear(448, 192, kind=kind, double_quant=double)
    layer.load(w)
    ours, want = bitsandbytes.tensors_of(layer), theirs(bnb, w, kind, double)
    assert set(ours) == set(want)
    for name, x in want.items():
        assert ours[name].dtype == x.dtype and torch.equal(ours[name], x), name
    stats = {name: x.clone() for name, x in ours.items() if name != "weight"}
    state = bnb.QuantState.from_dict(stats, torch.device("cpu"))
    back = bnb.dequantize_4bit(ours["weight"], state)
    assert back.dtype == dtype and torch.equal(back, layer.dequantize(dtype))

    save_file({name: x.contiguous() for name, x in want.items()}, tmp_path / "theirs.safetensors")
    read = CodebookLinear(448, 192, kind=kind, double_quant=double, device="meta")
    bitsandbytes.fill(read, load_file(tmp_path / "theirs.safetensors"))
    assert read.dtype == dtype and torch.equal(read.dequantize(dtype), back)
    again = bitsandbytes.tensors_of(read)
    assert all(torch.equal(again[name], x) for name, x in want.items())


def test_many_sizes_are_rounded_as_bitsandbytes_does(bnb):
    """Millions, so that those beside the middle of two codes are among them."""
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        sizes = torch.rand(400_000 + seed, generator=g) ** (1 + 3 * seed)
        codes, nested, offset = quantize_sizes(sizes)
        want, state = bnb.quantize_blockwise(sizes - sizes.mean(), blocksize=256)
        assert torch.equal(codes, want) and torch.equal(nested, state.absmax)
        assert offset == sizes.mean()
    assert torch.equal(codebook("dynamic", torch.device("cpu")), bnb.create_dynamic_map())


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_bitsandbytes_both_ways(bnb, dtype):
    w = raw(dtype=dtype)
    w[5] = 0
    layer = empty_layer("int8", 448, 192)
    layer.load(w)
    codes, sizes, _ = bnb.int8_vectorwise_quant(w.half())
    rows = torch.arange(192) != 5  # theirs divides by zero there
    ours = bitsandbytes.tensors_of(layer)
    assert torch.equal(ours["weight"][rows], codes[rows]) and torch.equal(ours["SCB"], sizes)
    assert not ours["weight"][5].any()
    assert ours["weight_format"].dtype == torch.uint8 and ours["weight_format"].dim() == 0
    assert torch.equal(layer.dequantize(), bnb.int8_vectorwise_dequant(ours["weight"], sizes))
    read = empty_layer("int8", 448, 192, device="meta")
    bitsandbytes.fill(read, {"weight": codes, "SCB": sizes, "weight_format": ours["weight_format"]})
    assert torch.equal(read.dequantize()[rows], layer.dequantize()[rows])


@pytest.mark.parametrize("kind", KINDS)
def test_a_bitsandbytes_layer_loads_ours(bnb, kind):
    import bitsandbytes as package

    layer = quantized(linear(128, 256, dtype=torch.bfloat16), kind)
    tensors = bitsandbytes.tensors_of(layer)
    module = package.nn.Linear4bit(256, 128, compute_dtype=torch.bfloat16, quant_type=kind)
    stats = {name.removeprefix("weight."): x for name, x in tensors.items() if name != "weight"}
    module.weight = package.nn.Params4bit.from_prequantized(tensors["weight"], stats, device="cpu")
    module.bias = layer.bias
    x = torch.randn(70, 256, dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        back = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(layer.dequantize(torch.bfloat16), back)
    assert (module(x) - layer(x)).float().norm() <= 0.01 * layer(x).float().norm()


def test_compressed_tensors_reads_ours_and_we_theirs():
    pytest.importorskip("compressed_tensors", reason="the oracle; pip install compressed-tensors")
    from compressed_tensors.compressors.pack_quantized import helpers

    layer = quantized(linear(96, 256, dtype=torch.bfloat16), "int4")
    tensors = compressed_tensors.tensors_of(layer)
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    assert packed.dtype == torch.int32 and packed.shape == (96, 32)
    assert scale.dtype == torch.bfloat16 and tensors["weight_shape"].tolist() == [96, 256]
    values = helpers.unpack_from_int32(tensors["weight_packed"], 4, torch.Size([96, 256]))
    back = values.view(96, 2, 128).float() * tensors["weight_scale"].float().unsqueeze(-1)
    assert torch.equal(back.flatten(1), layer.dequantize())
    read = empty_layer("int4", 256, 96, device="meta")
    packed = helpers.pack_to_int32(values.to(torch.int8), 4)
    compressed_tensors.fill(read, {**tensors, "weight_packed": packed})
    assert torch.equal(read.dequantize(), layer.dequantize())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_scales_of_others_are_not_rounded(dtype):
    layer = quantized(linear(96, 256, dtype=torch.bfloat16), "int4")
    tensors = compressed_tensors.tensors_of(layer)
    theirs = (tensors["weight_scale"].float() * 1.001).to(dtype)  # not bf16 numbers
    read = empty_layer("int4", 256, 96, device="meta")
    compressed_tensors.fill(read, {**tensors, "weight_scale": theirs})
    codes = layer.dequantize().unflatten(1, (2, 128)) / layer.weight_scale.float().unsqueeze(-1)
    want = codes.round() * theirs.float().unsqueeze(-1)
    assert torch.equal(read.dequantize(), want.flatten(1))
    again = empty_layer("int4", 256, 96, device="meta")
    for kind in ("compressed-tensors", "llava_min"):
        Stored(kind, "int4", 128).fill(again, tensors_of(read, kind))  # written and read again
        assert torch.equal(again.dequantize(), read.dequantize())
    with pytest.raises(UserError, match="weight_scale of a quantized layer is int32"):
        compressed_tensors.fill(read, {**tensors, "weight_scale": theirs.int()})


def gemm_words(codes: torch.Tensor) -> torch.Tensor:
    """(rows, N) -> int32 (rows, N / 8), one by one as AutoAWQ's packing loop is described."""
    words = torch.zeros(len(codes), codes.shape[1] // 8, dtype=torch.int64)
    for j in range(words.shape[1]):
        for i, place in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            words[:, j] |= codes[:, 8 * j + place].long() << 4 * i
    return words.to(torch.int32)


def test_awq_gemm_is_read_exactly():
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (256, 96), generator=g)
    zeros = torch.randint(0, 16, (2, 96), generator=g)
    scales = (torch.rand(2, 96, generator=g) * 0.01 + 0.001).half()
    layer = GroupLinear(256, 96, bits=4, group_size=128, device="meta")
    tensors = {"qweight": gemm_words(codes), "qzeros": gemm_words(zeros), "scales": scales}
    awq_gemm.fill(layer, tensors)
    want = (codes - zeros.repeat_interleave(128, 0)) * scales.float().repeat_interleave(128, 0)
    assert torch.equal(layer.dequantize(), want.T)
    with pytest.raises(UserError, match="qzeros of an AWQ layer"):
        other = GroupLinear(256, 96, bits=4, group_size=64, device="meta")
        awq_gemm.fill(other, tensors)
    for name, dtype in [("qweight", torch.int64), ("qzeros", torch.float), ("scales", torch.int)]:
        with pytest.raises(UserError, match=f"{name} of an AWQ layer is .* was expected"):
            awq_gemm.fill(layer, tensors | {name: tensors[name].to(dtype)})
    awq_gemm.fill(layer, tensors | {"scales": scales.bfloat16()})
    want = (codes - zeros.repeat_interleave(128, 0)) * scales.bfloat16().repeat_interleave(128, 0)
    assert torch.allclose(layer.dequantize(), want.T.float(), rtol=1 / 256)


def test_tensors_that_do_not_fit_are_one_line():
    nf4 = bitsandbytes.tensors_of(quantized(linear(), "nf4"))
    key = bitsandbytes.STATE + "nf4"

    bytes_ = lambda x: torch.tensor(x, dtype=torch.uint8)

    def state(**changes):
        found = {**json.loads(bytes(nf4[key].tolist())), **changes}
        return {**nf4, key: bytes_(list(json.dumps(found).encode()))}

    bitsandbytes.fill(quantized(linear(), "nf4"), state(dtype=["float32"]))  # only recorded
    int8 = bitsandbytes.tensors_of(quantized(linear(), "int8"))
    int4 = compressed_tensors.tensors_of(quantized(linear(), "int4"))
    without = lambda tensors, name: {k: x for k, x in tensors.items() if k != name}
    cases = [
        ("nf4", bitsandbytes, state(blocksize=128), "blocksize is '128'"),
        ("nf4", bitsandbytes, state(shape=[4, 4]), "shape is"),
        ("nf4", bitsandbytes, state(nested_blocksize=64), "nested_blocksize"),
        ("nf4", bitsandbytes, state(nested_offset=None), "nested_offset of a quantized layer"),
        ("nf4", bitsandbytes, state(nested_offset=float("nan")), "nested_offset of a quantized"),
        ("nf4", bitsandbytes, without(nf4, key), "quant_state"),
        ("nf4", bitsandbytes, {**nf4, key: bytes_([255])}, "quant_state"),
        ("nf4", bitsandbytes, {**nf4, key: bytes_([49])}, "quant_state"),
        ("fp4", bitsandbytes, nf4, "quant_type is 'nf4'"),
        ("nf4", bitsandbytes, {**nf4, "weight.quant_map": torch.zeros(16)}, "other numbers"),
        ("nf4", bitsandbytes, {**nf4, "weight.nested_quant_map": torch.zeros(5)}, "other numbers"),
        (
            "nf4",
            bitsandbytes,
            without(nf4, "weight.absmax"),
            "absmax of a quantized layer is missing",
        ),
        ("nf4", bitsandbytes, {**nf4, "weight": nf4["weight"][:5]}, "uint8 (5, 1)"),
        ("int8", bitsandbytes, {**int8, "weight_format": torch.tensor(1)}, "weight_format"),
        ("int8", bitsandbytes, {**int8, "weight_format": torch.zeros(2)}, "weight_format"),
        ("nf4", bitsandbytes, {**nf4, key: bytes_([91] * 100_000)}, "quant_state"),
        ("int8", bitsandbytes, without(int8, "SCB"), "SCB of a quantized layer is missing"),
        (
            "int4",
            compressed_tensors,
            {**int4, "weight_shape": torch.tensor([96, 128])},
            "weight_shape",
        ),
        ("int4", compressed_tensors, without(int4, "weight_scale"), "missing"),
        (
            "int4",
            compressed_tensors,
            {**int4, "weight_scale": int4["weight_scale"][:, :1]},
            "(96, 1)",
        ),
    ]
    for method, page, tensors, words in cases:
        layer = quantized(linear(), method)
        before = layer.dequantize()
        with pytest.raises(UserError) as e:
            page.fill(layer, tensors)
        assert words in str(e.value) and "\n" not in str(e.value), str(e.value)
        assert torch.equal(layer.dequantize(), before)  # nothing was stored by half
