"""`quantize --method awq4`: the scales come from the real forward of images and text, the model
computes the same before it is rounded, and what is written loads here and in transformers."""

import json
import re
import shutil

import pytest
import torch
from conftest import KINDS, TEXT, load_script, their_model, write_folder
from PIL import Image
from safetensors.torch import load_file, save_file
from test_quantize import WIDE, loaded, logits, their_load

from llava_min.data.dataset import Dataset, collate
from llava_min.data.records import read_records
from llava_min.errors import UserError
from llava_min.export import awq as export
from llava_min.fast.int_matmul import quant_layers
from llava_min.load import open_checkpoint, save
from llava_min.quant import calibrate as pages
from llava_min.quant.awq import Inputs
from llava_min.quant.calibrate import ATTENTION, MLP, scale
from llava_min.tools.quantize import main as quantize

CPU, GROUP = torch.device("cpu"), 16  # a group that divides the widths of conftest's models
WORDS = ["a red circle", "two blue squares left of it", "what is in it", "a square"]
BIASED = {**TEXT, **KINDS["qwen2"], "num_key_value_heads": 4}  # v has a bias and o's width


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """16 records of unlike lengths, every second one with an image."""
    folder, records = tmp_path_factory.mktemp("records"), []
    for i in range(16):
        Image.new("RGB", (28, 28), (16 * i, 255 - 16 * i, 90)).save(folder / f"{i}.png")
        question = ("<image>\n" if i % 2 else "") + WORDS[i % 4]
        answer = WORDS[(i + i // 4 + 1) % 4]
        talk = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        image = {"image": f"{i}.png"} if i % 2 else {}
        records.append({"id": str(i), "conversations": talk, **image})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


@pytest.fixture(scope="module")
def model_of(spm, tmp_path_factory):
    """A kind of decoder, "biased" or "wide" -> the folder of a tiny random model."""
    made, room = {}, tmp_path_factory.mktemp("models")

    def folder(kind: str):
        if kind not in made:
            more = {"biased": {"text_config": BIASED}, "wide": WIDE}.get(kind, {})
            theirs = their_model(kind if kind in KINDS else "llama", **more)
            made[kind] = write_folder(room / kind, spm, theirs)
        return made[kind]

    return folder


def batches(checkpoint, data) -> list[dict]:
    dataset = Dataset(read_records(data), checkpoint.processor)
    return [collate([dataset[i]]) for i in range(len(dataset))]


def by_awq(folder, data, dtype=torch.float32, group_size=GROUP):
    checkpoint = open_checkpoint(str(folder))
    export.quantize_by_awq(checkpoint, batches(checkpoint, data), dtype, CPU, group_size)
    return checkpoint.model


@pytest.fixture(scope="module")
def written(model_of, data, tmp_path_factory):
    """The folder that the verb writes of the wide model, in groups of 128."""
    out = tmp_path_factory.mktemp("written") / "awq4"
    source = str(model_of("wide"))
    quantize([source, str(out), "--method", "awq4", "--data", str(data), "--dtype", "fp32"])
    return out


# ---- the scales


def inputs_of(model, half, block, given) -> list[Inputs]:
    """What the first and the last layers of a half read in the forward of `model`."""
    places = [getattr(getattr(block, half.module), name) for name in (half.before, half.last)]
    first, last = map(Inputs.of, places)
    with first.watching(places[0]), last.watching(places[1]), torch.no_grad():
        for batch in given:
            model(batch["input_ids"], batch.get("pixel_values"))
    return [first, last]


@pytest.mark.parametrize("kind", [*KINDS, "biased"])
def test_the_model_computes_the_same_before_it_is_rounded(kind, model_of, data, monkeypatch):
    monkeypatch.setattr(pages, "search_scales", lambda w, x, r: torch.rand(len(x.h)) + 0.5)
    model, given = loaded(model_of(kind)), batches(open_checkpoint(str(model_of(kind))), data)
    before, plain = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    for block in model.language_model.layers:
        for half in (ATTENTION, MLP):
            found = inputs_of(model, half, block, given)
            scale(half, getattr(block, half.norm), getattr(block, half.module), *found, GROUP)
            # the clips are searched on what the layers read from here on
            for inputs, again in zip(found, inputs_of(model, half, block, given)):
                assert torch.allclose(inputs.h, again.h, atol=1e-5 * again.h.abs().max())
                assert torch.allclose(inputs.size, again.size, rtol=1e-4)
    assert (logits(model) - before).abs().max() < 1e-5 * before.abs().max()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, plain[n])}
    shared = model.config.text.num_key_value_heads < model.config.text.num_attention_heads
    attention = {"q_proj.weight", "k_proj.weight", "v_proj.weight"}
    attention |= set() if shared else {"o_proj.weight"}
    attention |= {"v_proj.bias"} if kind == "biased" else set()
    leaves = {f"self_attn.{leaf}" for leaf in attention}
    leaves |= {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    leaves |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert changed == {f"language_model.layers.{i}.{leaf}" for i in range(2) for leaf in leaves}


def test_the_first_norm_is_divided_by_a_power_of_the_mean_input(model_of, data):
    """Over every token of every record, those of images too, and no padding."""
    checkpoint, plain = open_checkpoint(str(model_of("wide"))), loaded(model_of("wide"))
    seen = []
    attention = plain.language_model.layers[0].self_attn
    attention.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    for batch in batches(checkpoint, data):
        with torch.no_grad():
            plain(batch["input_ids"], batch.get("pixel_values"))
    assert sum(map(len, seen)) > 256
    size = torch.cat(seen).abs().mean(0)
    norms = [loaded(model_of("wide")), by_awq(model_of("wide"), data, group_size=128)]
    before, after = (m.language_model.layers[0].input_layernorm.weight.detach() for m in norms)
    scales = [size ** (step / 20) for step in range(20)]
    scales = [s / (s.max() * s.min()).sqrt() for s in scales]
    found = [step for step, s in enumerate(scales) if torch.allclose(before / s, after, rtol=1e-4)]
    assert len(found) == 1 and found[0] > 0


def test_the_rows_are_those_of_the_model_before_it_is_rounded(model_of, data, monkeypatch):
    folder, original = model_of("llama"), export.calibrate
    keep = lambda blocks, rows, *more: setattr(pages, "kept", rows) or original(blocks, rows, *more)
    monkeypatch.setattr(export, "calibrate", keep)
    monkeypatch.setattr(pages, "kept", None, raising=False)
    by_awq(folder, data)
    plain, last = loaded(folder), []
    plain.language_model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    for batch, x in zip(batches(open_checkpoint(str(folder)), data), pages.kept, strict=True):
        with torch.no_grad():
            plain(batch["input_ids"], batch.get("pixel_values"))
        assert torch.allclose(last[-1], x, atol=1e-5 * x.abs().max())


def test_half_a_block_is_in_16_bits_at_a_time(model_of, data, monkeypatch):
    most, original = [], pages.scale
    checkpoint = open_checkpoint(str(model_of("wide")))

    def count(*given):
        blocks = checkpoint.model.language_model.layers.named_parameters()
        read = [n for n, p in blocks if n.endswith("_proj.weight") and not p.is_meta]
        most.append(len(read))
        return original(*given)

    monkeypatch.setattr(pages, "scale", count)
    export.quantize_by_awq(checkpoint, batches(checkpoint, data), torch.bfloat16, CPU)
    assert most == [4, 3, 4, 3]
    dtypes = {p.dtype for p in checkpoint.model.language_model.layers.parameters()}
    assert dtypes == {torch.bfloat16, torch.uint8}


# ---- the folder


@pytest.mark.parametrize("kind", [*KINDS, "biased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_decoder_is_written_and_read(kind, dtype, model_of, data, tmp_path):
    folder = model_of(kind)
    model, plain = by_awq(folder, data, dtype), logits(loaded(folder))
    save(model, open_checkpoint(str(folder)).processor, tmp_path / "q")
    again = loaded(tmp_path / "q")
    assert again.config.quantization.method == "awq4"
    assert [layer.group_size for _, layer in quant_layers(again)] == [GROUP] * 14
    within = 2e-5 if dtype == torch.float32 else 0.05
    assert (logits(again) - logits(model.float())).abs().max() < within * plain.abs().max()
    assert (logits(again) - plain).norm() < 0.35 * plain.norm()


def test_transformers_loads_it_with_compressed_tensors(written):
    pytest.importorskip("compressed_tensors", reason="the oracle; pip install compressed-tensors")
    config = json.loads((written / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and config["format"] == "pack-quantized"
    theirs, ours = their_load(written), loaded(written)
    assert len(quant_layers(ours)) == 14
    assert (logits(theirs) - logits(ours)).abs().max() < 2e-5


def test_sample_and_eval_take_what_is_written(written, data, tmp_path, capsys):
    image = str(data.parent / "1.png")
    arguments = [image, "--model", str(written), "--max-new-tokens", "4", "--device", "cpu"]
    load_script("sample").main(arguments)
    assert "float32, int4" in capsys.readouterr().err
    arguments = ["--model", str(written), "--data", str(data), "--out", str(tmp_path / "out")]
    load_script("eval").main([*arguments, "--device", "cpu", "--max-new-tokens", "4"])
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["quantization"] == "int4"


# ---- what does not do


def refused(arguments: list[str], tmp_path) -> str:
    with pytest.raises(UserError) as e:
        quantize([*arguments[:1], str(tmp_path / "q"), *arguments[1:]])
    assert not (tmp_path / "q").exists() and "\n" not in str(e.value)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith((".", "q"))]
    return str(e.value)


def test_records_are_evenly_spaced(model_of, data, tmp_path, monkeypatch):
    seen, original = [], export.hidden_states
    keep = lambda model, batch: seen.append(batch["input_ids"].tolist()) or original(model, batch)
    monkeypatch.setattr(export, "hidden_states", keep)
    model = str(model_of("wide"))
    more = ["--method", "awq4", "--data", str(data), "--samples", "4"]
    assert "at least 256 are needed" in refused([model, *more], tmp_path)
    every = batches(open_checkpoint(model), data)
    assert seen == [every[i]["input_ids"].tolist() for i in (0, 4, 8, 12)]


def test_data_belongs_to_awq4_alone(model_of, data, tmp_path):
    model = str(model_of("wide"))
    assert refused([model, "--method", "awq4"], tmp_path).startswith("--data: awq4 is calibrated")
    flags = {"--data": str(data), "--image-folder": str(data.parent), "--samples": "3"}
    for flag, value in {**flags, "--max-length": "99"}.items():
        text = refused([model, "--method", "int4", flag, value], tmp_path)
        assert text.startswith(f"{flag}: int4 is chosen without data")


@pytest.mark.parametrize(
    "more, says",
    [
        (["--samples", "1"], "--data: .* tokens came to calibrate on, at least 256"),
        (["--group-size", "96"], "--group-size: 96 does not divide the width 128"),
        (["--max-length", "9"], "--max-length: .* records have more than 9 tokens"),
        (["--max-length", "999"], "--max-length: 999 tokens were asked for, and the model's"),
        (["--image-folder", "/nowhere"], "/nowhere"),
    ],
)
def test_settings_that_do_not_do(more, says, model_of, data, tmp_path):
    text = refused(
        [str(model_of("wide")), "--method", "awq4", "--data", str(data), *more], tmp_path
    )
    assert re.search(says, text), text


def test_a_group_size_is_refused_before_minutes_of_work(model_of, data, monkeypatch):
    monkeypatch.setattr(export, "read_around", None)
    with pytest.raises(UserError, match="96 does not divide"):
        by_awq(model_of("wide"), data, group_size=96)


def test_an_image_that_cannot_be_read_is_the_readers_line(model_of, data, tmp_path):
    folder = shutil.copytree(data.parent, tmp_path / "data")
    (folder / "5.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    model, spoiled = str(model_of("wide")), str(folder / "data.json")
    text = refused([model, "--method", "awq4", "--data", spoiled], tmp_path)
    assert "5.png" in text
    with pytest.raises(UserError) as e:
        Dataset(read_records(spoiled), open_checkpoint(model).processor)[5]
    assert str(e.value) == text


def test_checkpoints_that_do_not_do(model_of, written, data, tmp_path):
    more = ["--method", "awq4", "--data", str(data)]
    text = refused([str(written), *more], tmp_path)
    assert "is quantized already; give the 16-bit checkpoint" in text
    broken = shutil.copytree(model_of("wide"), tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.1.mlp.down_proj.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert "layers.1.mlp.down_proj.weight" in refused([str(broken), *more], tmp_path)


def test_awq4_is_not_chosen_while_a_checkpoint_is_read(model_of, tmp_path):
    with pytest.raises(UserError, match="^quantize: awq4 needs .* --method awq4 --data FILE"):
        loaded(model_of("wide"), quantize="awq4")
    run = ["--model", "tiny", "--data", "toy:questions", "--quantize", "awq4"]
    run += ["--out", str(tmp_path / "run"), "--device", "cpu"]
    with pytest.raises(UserError, match="^--quantize: awq4 needs calibration data"):
        load_script("train").main(run)
