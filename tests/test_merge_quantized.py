"""merge after QLoRA: into the dequantized base it is the trained model, into the 16-bit base it is
near it, and how near is said.
"""

import gc
import json
from dataclasses import replace

import pytest
import torch
from conftest import their_model, write_folder
from safetensors.torch import load_file
from test_merge import logits, make_adapter, run
from test_quantize import WIDE, write_awq_gemm

from llava_min import load
from llava_min import weights as weights_page
from llava_min.config import IGNORE
from llava_min.data.dataset import Dataset
from llava_min.data.records import read_records
from llava_min.errors import UserError
from llava_min.export.tensors import open_model
from llava_min.names import to_ours
from llava_min.quant.linear import QuantLinear
from llava_min.tools import export
from llava_min.tools.quantize import main as quantize
from llava_min.toy import draw as toy


@pytest.fixture(scope="module")
def base(spm, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("merge") / "base", spm, their_model(**WIDE))


def is_merged(out, source, adapter, **options):
    """The logits of `out` are those of the adapter over `source`, unmerged."""
    model, _ = load(out, dtype="fp32", device="cpu")
    assert not any(isinstance(m, QuantLinear) for m in model.modules())
    right = logits(load(source, dtype="fp32", device="cpu", adapter=adapter, **options)[0])
    assert (logits(model) - right).abs().max() <= 1e-5 * right.abs().max()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("method", ["nf4", "int4", "hqq4"])
def test_into_the_dequantized_base_it_is_the_trained_model(base, tmp_path, method, dora):
    adapter = make_adapter(base, tmp_path / "adapter", dora=dora)
    run(base, adapter, tmp_path / "out", dtype="fp32", quantize=method)
    is_merged(tmp_path / "out", base, adapter, quantize=method)
    run(base, adapter, tmp_path / "plain", dtype="fp32")
    one, two = (logits(load(tmp_path / x, dtype="fp32")[0]) for x in ("out", "plain"))
    assert (one - two).abs().max() > 0.01 * one.abs().max()  # they are two models


@pytest.mark.parametrize("method", ["nf4", "int8", "int4", "hqq3", "awq"])
def test_a_quantized_checkpoint_is_a_base(base, tmp_path, method):
    """bitsandbytes', compressed-tensors', our own and AWQ-GEMM folders."""
    source = tmp_path / "quantized"
    if method == "awq":
        write_awq_gemm(base, source)
    else:
        quantize([str(base), str(source), "--method", method, "--dtype", "fp32"])
    adapter = make_adapter(source, tmp_path / "adapter")
    run(source, adapter, tmp_path / "out", dtype="fp32")
    is_merged(tmp_path / "out", source, adapter)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_a_quantized_checkpoint_is_exported_dequantized(base, tmp_path, capsys):
    quantize([str(base), str(tmp_path / "q"), "--method", "nf4", "--dtype", "fp32"])
    export.main([str(tmp_path / "q"), str(tmp_path / "out"), "--to", "hf", "--dtype", "fp32"])
    assert "q: weights in nf4 become those that they stand for\n" in capsys.readouterr().err
    model, _ = load(tmp_path / "q", dtype="fp32", device="cpu")
    out = load_file(tmp_path / "out" / "model.safetensors")
    for name, x in out.items():
        path, _, leaf = to_ours(name).rpartition(".")
        layer = model.get_submodule(path)
        quantized = isinstance(layer, QuantLinear) and leaf == "weight"
        assert torch.equal(x, layer.dequantize() if quantized else getattr(layer, leaf))


def test_one_layer_at_a_time_is_in_memory(base):
    """What a layer was read into is forgotten with its weight."""

    def in_memory() -> set[int]:
        layers = [m for m in gc.get_objects() if isinstance(m, QuantLinear)]
        return {id(m) for m in layers if any(not p.is_meta for p in m.parameters())}

    before, model = in_memory(), open_model(str(base), quantize="nf4")
    for name in model.names:
        model.read(name, torch.float32)
    gc.collect()
    assert in_memory() <= before


@pytest.mark.parametrize("quantize", [None, "hqq4"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_piece_at_a_time(base, tmp_path, monkeypatch, dora, quantize):
    """Merged a few rows at a time, tensors are what they are in one piece; the original layout's
    vocabulary has fewer rows than the model's.
    """
    a = make_adapter(base, tmp_path / "a", seed=1, dora=dora)
    b = make_adapter(base, tmp_path / "b", seed=2, projector=False)
    g = torch.Generator().manual_seed(4)
    table = "language_model.embed_tokens.weight"
    for adapters, weights in (([a], None), ([a, b], [0.5, -0.25])):
        read = open_model(str(base), [str(x) for x in adapters], weights, quantize).read
        table_of = read.base.entries[table]
        new = 0.1 * torch.randn(*read.base.model.get_parameter(table).shape, generator=g)
        read.adapters[0].tensors[table] = new  # as an adapter with a trained vocabulary has it
        read.base.entries[table] = replace(table_of, shape=(table_of.shape[0] - 3, new.shape[1]))
        names = [name for name, _ in read.base.model.named_parameters()]
        whole = {name: read(name, torch.float32) for name in names}
        with monkeypatch.context() as m:
            m.setattr(weights_page, "PIECE", 1000)
            assert len(list(read.base.pieces(table))) > 2
            for name in names:
                x = read(name, torch.float32)
                torch.testing.assert_close(x, whole[name], atol=1e-6, rtol=1e-6)


# ---- how far it is from the trained model


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """(an adapter of the bundled model, rows with answers)"""
    room = tmp_path_factory.mktemp("tuned")
    toy.write(room / "data", "questions", train=1, val=6)
    return make_adapter("tiny", room / "adapter"), room / "data" / "val.json"


def table(text: str) -> dict[str, tuple[float, float]]:
    lines = [line.rsplit(maxsplit=2) for line in text.splitlines()[1:]]
    return {name: (float(kl), float(same.rstrip("%")) / 100) for name, kl, same in lines}


def by_definition(trained, other, data) -> tuple[float, float]:
    kl, same = [], []
    for item in Dataset(read_records(str(data)), trained.processor):
        ids, labels = (torch.tensor([item[name]]) for name in ("input_ids", "labels"))
        at = (labels != IGNORE)[0, 1:]
        p, q = (m(ids, item["pixel_values"])[0, :-1][at].softmax(-1) for m in (trained, other))
        kl += ((p * (p / q).log()).sum(-1)).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).tolist()
    return sum(kl) / len(kl), sum(same) / len(same)


def test_both_merges_are_compared(tuned, tmp_path, capsys):
    adapter, data = tuned
    run("tiny", adapter, tmp_path / "out", dtype="fp32", quantize="nf4", data=data)
    printed = capsys.readouterr()
    found = table(printed.out)
    assert list(found) == ["dequantized nf4 (written)", "the 16-bit weights"]
    assert "tiny in nf4, on " in printed.err
    trained, _ = load("tiny", dtype="fp32", device="cpu", adapter=adapter, quantize="nf4")
    run("tiny", adapter, tmp_path / "plain", dtype="fp32")
    for (kl, same), folder in zip(found.values(), ("out", "plain")):
        right = by_definition(trained, load(tmp_path / folder, dtype="fp32")[0], data)
        assert kl == pytest.approx(right[0], rel=0.01, abs=1e-6)
        assert same == pytest.approx(right[1], abs=1e-4)
    written, other = found.values()
    assert abs(written[0]) < 1e-6 and written[1] == 1 and other[0] > 1e-3


def test_the_dtype_written_is_what_is_compared(tuned, tmp_path, capsys):
    adapter, data = tuned
    run("tiny", adapter, tmp_path / "out", dtype="bf16", data=data)
    ((name, (kl, _)),) = table(capsys.readouterr().out).items()
    assert name == "the weights as they are (written)"
    trained, _ = load("tiny", dtype="fp32", device="cpu", adapter=adapter)
    right = by_definition(trained, load(tmp_path / "out", dtype="fp32")[0], data)
    assert kl == pytest.approx(right[0], rel=0.05) and kl > 1e-6


@pytest.mark.parametrize(
    "adapters, flags, says",
    [
        (1, dict(image_folder="."), "--image-folder: is of no use alone"),
        (2, dict(data="x.json"), "--data: compares with the one model that was trained"),
        (1, dict(data="x.json", weights="0.5"), "--data: compares with the one model"),
        (1, dict(data="x.json"), "x.json: "),
        (1, dict(quantize="nf5"), "--quantize: 'nf5', expected one of int8"),
    ],
)
def test_bad_input_writes_nothing(tuned, tmp_path, adapters, flags, says):
    flags = {name.replace("_", "-"): value for name, value in flags.items()}
    with pytest.raises(UserError, match=f"^{says}") as e:
        run("tiny", *[tuned[0]] * adapters, tmp_path / "out", **flags)
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_a_record_beyond_the_context_is_no_matter_of_max_length(tuned, tmp_path):
    turns = [{"from": "human", "value": "why " * 1200}, {"from": "gpt", "value": "because"}]
    (tmp_path / "long.json").write_text(json.dumps([{"id": "a", "conversations": turns}]))
    with pytest.raises(UserError, match="^--data: 1 of 1 records .* context of 1024: a; shorten"):
        run("tiny", tuned[0], tmp_path / "out", quantize="nf4", data=tmp_path / "long.json")
    assert not (tmp_path / "out").exists()
