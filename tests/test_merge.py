"""merge: merged = unmerged, and what peft merges; adapters of every kind, and bad ones."""

import json
import shutil
from dataclasses import fields

import pytest
import torch
from conftest import TEXT, VISION, pixels, rows, their_model, write_folder
from safetensors.torch import load_file, save_file

from llava_min import load
from llava_min.adapter import save_adapter
from llava_min.errors import UserError
from llava_min.lora import LoRAConfig
from llava_min.tools import merge
from llava_min.training.targets import add_lora
from llava_min.util.cli import comments


@pytest.fixture
def source(tmp_path, spm):
    return write_folder(tmp_path / "source", spm, their_model())


def make_adapter(source, folder, seed=1, projector=True, **config):
    """An adapter with values of its own, as train.py saves it."""
    model, processor = load(source, dtype="fp32")
    config = LoRAConfig(r=4, alpha=8, **config)
    add_lora(model, config)
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if ".lora_" in name or projector and name.startswith("multi_modal_projector."):
            p.requires_grad_(True)
            p.data += 0.1 * torch.randn(p.shape, generator=g)
    folder.mkdir()
    save_adapter(model, config, folder, str(source))
    processor.save_settings(folder)
    return folder


def logits(model):
    return model(rows(1, 2), pixels(3))


def run(source, *rest, **flags):
    args = [f"--{name}={value}" for name, value in flags.items()]
    merge.main([str(source), *map(str, rest), *args])


@pytest.mark.parametrize("config", [{}, {"dora": True}, {"rslora": True}])
def test_merged_is_unmerged(tmp_path, source, config):
    folder, out = make_adapter(source, tmp_path / "adapter", **config), tmp_path / "out"
    run(source, folder, out, dtype="fp32")
    merged = logits(load(out, dtype="fp32")[0])
    unmerged = logits(load(source, dtype="fp32", adapter=folder)[0])
    scale = unmerged.abs().max()
    assert (merged - unmerged).abs().max() <= 1e-5 * scale
    assert (logits(load(source, dtype="fp32")[0]) - unmerged).abs().max() > 0.01 * scale


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
def test_as_peft_merges(tmp_path, spm, kind):
    peft = pytest.importorskip("peft", reason="the oracle of merging")
    theirs = their_model()
    source = write_folder(tmp_path / "source", spm, theirs)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)",
        modules_to_save=["multi_modal_projector"],
        use_dora=kind == "dora",
        use_rslora=kind == "rslora",
    )
    wrapped = peft.get_peft_model(theirs, config)
    g = torch.Generator().manual_seed(3)
    for name, p in wrapped.named_parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=g)
    wrapped.save_pretrained(tmp_path / "adapter")
    run(source, tmp_path / "adapter", tmp_path / "out", dtype="fp32")
    right = wrapped.merge_and_unload()(input_ids=rows(1, 2), pixel_values=pixels(3)).logits
    found = logits(load(tmp_path / "out", dtype="fp32")[0])
    assert (found - right).abs().max() <= 1e-5 * right.abs().max()


def test_several_with_weights(tmp_path, source):
    a = make_adapter(source, tmp_path / "a", seed=1)
    b = make_adapter(source, tmp_path / "b", seed=2, projector=False)
    for adapters, name in (((a,), "only_a"), ((b,), "only_b")):
        run(source, *adapters, tmp_path / name, dtype="fp32")
    run(source, a, b, tmp_path / "out", dtype="fp32", weights="0.5,-0.25")
    tensors = {
        name: load_file(tmp_path / name / "model.safetensors")
        for name in ("only_a", "only_b", "out")
    }
    base = dict(load(source, dtype="fp32")[0].named_parameters())
    from llava_min.names import to_ours

    for name, x in tensors["out"].items():
        w = base[to_ours(name)]
        right = w + 0.5 * (tensors["only_a"][name] - w) - 0.25 * (tensors["only_b"][name] - w)
        torch.testing.assert_close(x, right, atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match="--weights: 1 for 2 adapters; give one for each"):
        run(source, a, b, tmp_path / "no", weights="0.5")
    with pytest.raises(UserError, match="--weights: 0 leaves an adapter out"):
        run(source, a, b, tmp_path / "no", weights="0.5,0")


def test_into_16_bits(tmp_path, source):
    """The update is added in fp32 and rounded once."""
    half = tmp_path / "half"
    from llava_min.load import save

    save(*load(source, dtype="bf16"), half)
    folder = make_adapter(half, tmp_path / "adapter")
    run(half, folder, tmp_path / "out")
    state = dict(load(half, dtype="fp32")[0].named_parameters())
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_"
    update = 2 * tensors[f"{prefix}B.weight"] @ tensors[f"{prefix}A.weight"]
    right = (state["language_model.layers.0.self_attn.q_proj.weight"] + update).bfloat16()
    found = load_file(tmp_path / "out" / "model.safetensors")
    x = found["language_model.model.layers.0.self_attn.q_proj.weight"]
    assert x.dtype == torch.bfloat16 and torch.equal(x, right)


def test_original_lora_folder(tmp_path, spm, source):
    """LLaVA's own: LoRA under the decoder's names, the projector in non_lora_trainables.bin."""
    folder = make_adapter(source, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    lora, rest = {}, {}
    for name, x in tensors.items():
        if ".lora_" in name:
            lora[name.replace("model.model.language_model.", "model.model.")] = x
        else:
            i = 0 if "linear_1" in name else 2
            rest[f"base_model.model.model.mm_projector.{i}.{name.rpartition('.')[2]}"] = x
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    save_file(lora, theirs / "adapter_model.safetensors")
    torch.save(rest, theirs / "non_lora_trainables.bin")
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"target_modules": list(TARGETS), "modules_to_save": None}
    (theirs / "adapter_config.json").write_text(json.dumps(config))
    (theirs / "config.json").write_text(json.dumps({"mm_projector_type": "mlp2x_gelu"}))
    run(source, folder, tmp_path / "a", dtype="fp32")
    run(source, theirs, tmp_path / "b", dtype="fp32")
    a, b = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def projector_file(path, **change):
    width, wide = VISION["hidden_size"], TEXT["hidden_size"]
    g = torch.Generator().manual_seed(5)
    tensors = {
        "model.mm_projector.0.weight": torch.randn(wide, width, generator=g),
        "model.mm_projector.0.bias": torch.randn(wide, generator=g),
        "model.mm_projector.2.weight": torch.randn(wide, wide, generator=g),
        "model.mm_projector.2.bias": torch.randn(wide, generator=g),
    } | change
    torch.save({name: x for name, x in tensors.items() if x is not None}, path)
    return tensors


def test_projector_file(tmp_path, source):
    tensors = projector_file(tmp_path / "mm_projector.bin")
    run(source, tmp_path / "mm_projector.bin", tmp_path / "out", dtype="fp32")
    found = load_file(tmp_path / "out" / "model.safetensors")
    right = tensors["model.mm_projector.2.weight"]
    assert torch.equal(found["multi_modal_projector.linear_2.weight"], right)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model.mm_projector.2.bias": None}, "lacks multi_modal_projector.linear_2.bias"),
        ({"model.mm_projector.2.bias": torch.zeros(7)}, r"\[7\] torch.float32, expected \[32\]"),
        (
            {"model.norm.weight": torch.zeros(32)},
            "model.norm.weight: is no tensor of the projector",
        ),
        ({"model.mm_projector.2.bias": torch.full((32,), torch.nan)}, "holds NaN"),
    ],
)
def test_bad_projector_file(tmp_path, source, change, message):
    projector_file(tmp_path / "mm_projector.bin", **change)
    with pytest.raises(UserError, match=message):
        run(source, tmp_path / "mm_projector.bin", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def change_adapter(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_bad_adapters(tmp_path, source):
    folder = make_adapter(source, tmp_path / "adapter", projector=False)
    bad = tmp_path / "bad"

    def fails(change, message):
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(folder, bad)
        change_adapter(bad, change)
        with pytest.raises(UserError, match=message):
            run(source, bad, tmp_path / "out")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "bad", "source"]

    def stray(tensors):
        name = next(iter(tensors))
        tensors[name.replace("layers.0", "layers.9").replace("layers.1", "layers.9")] = tensors[
            name
        ].clone()

    def zero(tensors):
        for name in tensors:
            if "lora_B" in name:
                tensors[name].zero_()

    def tiny(tensors):
        for name in tensors:
            tensors[name] *= 1e-12

    fails(stray, "has no place in this model")
    fails(zero, "changes no weight of this model")
    fails(tiny, "changes no weight of this model.*--dtype fp32")


def test_every_flag_is_explained():
    explained = comments(merge.MergeConfig)
    assert [f.name for f in fields(merge.MergeConfig) if not explained.get(f.name)] == []


def test_arguments(tmp_path, source):
    with pytest.raises(UserError, match="give three or more"):
        run(source, tmp_path / "out")
    folder = make_adapter(source, tmp_path / "adapter")
    with pytest.raises(UserError, match="is to be read"):
        merge.main([str(source), str(folder), str(folder), "--overwrite"])
