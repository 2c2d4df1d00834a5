"""Quantized checkpoints, whole: quantized as they are read, written, read again; transformers with
bitsandbytes or compressed-tensors loads ours, and we read what it saves.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import KINDS, TEXT, VISION, load_script, pixels, rows, their_model, write_folder
from safetensors.torch import load_file, save_file
from test_merge import make_adapter

import llava_min
from llava_min.errors import UserError
from llava_min.evaluation.settings import hash_weights
from llava_min.fast.int_matmul import Int4Linear, portable, quant_layers
from llava_min.load import load_model, open_checkpoint, save
from llava_min.lora import LoRAConfig
from llava_min.names import to_layout, to_ours
from llava_min.quant.linear import QuantLinear
from llava_min.quant.methods import METHODS, quantize_layers, quantized
from llava_min.tools.quantize import main as quantize
from llava_min.training.targets import add_lora
from llava_min.training.trainable import parameter_table, set_trainable

# rows of whole groups of 128, and of whole blocks of 64: bitsandbytes 0.50 dequantizes others
# wrongly on CPU
WIDE = {
    "text_config": {**TEXT, "hidden_size": 128, "intermediate_size": 256},
    "vision_config": {**VISION, "hidden_size": 64, "intermediate_size": 128},
}
ON_THE_FLY = [method for method in METHODS if method != "awq4"]
PARTS = ["vision_tower", "multi_modal_projector", "lm_head"]  # that stay in 16 bit
IDS, PIXELS = rows(1, 1), pixels(2)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        out = model(input_ids=IDS, pixel_values=PIXELS)
    return getattr(out, "logits", out)


def loaded(folder, dtype="fp32", **more):
    return llava_min.load(str(folder), dtype=dtype, device="cpu", **more)[0]


@pytest.fixture(scope="module")
def base(spm, tmp_path_factory) -> Path:
    theirs = their_model(**WIDE)
    return write_folder(tmp_path_factory.mktemp("quantize") / "base", spm, theirs)


@pytest.fixture(scope="module")
def written(base, tmp_path_factory):
    """method -> the folder that the verb writes for it, the rest in fp32."""
    made, room = {}, tmp_path_factory.mktemp("written")

    def write(method: str) -> Path:
        if method not in made:
            made[method] = room / method
            quantize([str(base), str(made[method]), "--method", method, "--dtype", "fp32"])
        return made[method]

    return write


@pytest.fixture
def folder(written, tmp_path):
    """A copy, to be spoiled, of what the verb wrote."""
    return lambda method: shutil.copytree(written(method), tmp_path / method)


# ---- as it is read


@pytest.mark.parametrize("method", ON_THE_FLY)
def test_the_blocks_of_the_decoder_are_quantized_as_they_are_read(method, base):
    model, plain = loaded(base, quantize=method), loaded(base)
    paths = [path for path, _ in quant_layers(model)]
    assert len(paths) == 14 and all(p.startswith("language_model.layers.") for p in paths)
    for path, layer in quant_layers(model):
        again = quantized(plain.get_submodule(path), method)
        assert torch.equal(layer.dequantize(), again.dequantize())
    others = {n: p for n, p in plain.named_parameters() if n.rpartition(".")[0] not in paths}
    state = dict(model.named_parameters())
    assert all(torch.equal(state[n], p) for n, p in others.items())
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", ["int4", "int8", "nf4"])
def test_the_fast_products_are_used_in_bf16(method, base):
    model = loaded(base, "bf16", quantize=method)
    kinds = {type(layer) for _, layer in quant_layers(model)}
    assert len(kinds) == 1 and (kinds == {Int4Linear}) == (method == "int4")
    close = logits(loaded(base, quantize=method))
    assert (logits(model) - close).abs().max() < 0.1 * close.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_every_decoder_is_quantized_with_its_biases(kind, spm, tmp_path):
    folder = write_folder(tmp_path / "m", spm, their_model(kind))
    model, plain = loaded(folder, quantize="int8"), logits(loaded(folder))
    assert (logits(model) - plain).abs().max() < 0.1 * plain.abs().max()


def test_the_adapter_of_the_plain_model_fits(base, tmp_path):
    peft = pytest.importorskip("peft", reason="writes the adapter of this test; pip install peft")
    theirs = their_model(**WIDE)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(theirs, config)
    tuned.save_pretrained(tmp_path / "adapter")
    adapter = str(tmp_path / "adapter")
    with_it = logits(loaded(base, adapter=adapter))
    assert (with_it - logits(loaded(base))).abs().max() > 1
    model = loaded(base, adapter=adapter, quantize="hqq8")
    assert (logits(model) - with_it).abs().max() < 0.2


@pytest.mark.parametrize(
    "method, says",
    [
        ("nf5", "'nf5', expected one of int8, int4, hqq8"),
        (4, "'4', expected one of"),
        ("awq4", "awq4 needs calibration data"),
    ],
)
def test_what_is_no_method_is_one_line(method, says, base):
    with pytest.raises(UserError, match=f"^quantize: {says}") as e:
        loaded(base, quantize=method)
    assert "\n" not in str(e.value)


def test_a_group_that_does_not_divide_the_width(spm, tmp_path):
    folder = write_folder(tmp_path / "m", spm, their_model())
    with pytest.raises(UserError, match="128 does not divide the width 32"):
        loaded(folder, quantize="int4")


def test_the_way_out_of_such_a_group_works(tmp_path):
    """The bundled model is 160 and 432 wide: the line names what fits it, and that does."""
    says = "^quantize: int4: .* width 160 of a layer; give int8, nf4, fp4, w8a8, or make .* of 16 "
    with pytest.raises(UserError, match=says):
        loaded("tiny", quantize="int4")
    data = tmp_path / "data.json"
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    data.write_text(json.dumps([{"id": "1", "conversations": turns}]))
    for more in (["--method=int4"], ["--method=awq4", f"--data={data}"]):
        with pytest.raises(
            UserError, match="^--method: .* by `.*quantize MODEL OUT --method .*4 --group-size 16`"
        ):
            quantize(["tiny", str(tmp_path / "q"), *more])
    quantize(["tiny", str(tmp_path / "q"), "--method", "int4", "--group-size", "16"])
    for model in (loaded(tmp_path / "q"), loaded("tiny", quantize="fp4")):
        assert len(quant_layers(model)) == 28


# ---- written and read again


@pytest.mark.parametrize("method", ON_THE_FLY)
def test_what_is_written_is_what_is_read(method, written, base):
    model, again = loaded(base, quantize=method), loaded(written(method))
    layers = dict(quant_layers(model))
    assert layers.keys() == dict(quant_layers(again)).keys()
    for path, layer in quant_layers(again):
        assert torch.equal(layer.dequantize(), layers[path].dequantize())
    assert torch.equal(logits(model), logits(again))
    assert torch.equal(
        logits(load_model(written(method), torch.float32, again.device)), logits(again)
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["int4", "hqq3", "nf4", "int8", "w8a8"])
def test_a_loaded_model_is_saved_as_it_is(method, dtype, base, tmp_path):
    """Also what the kernels have in an order of their own, and prepacked layers."""
    model, processor = llava_min.load(base, dtype=dtype, device="cpu", quantize=method)
    before = logits(model)
    save(model, processor, tmp_path / "one")
    assert torch.equal(logits(model), before)
    again, processor = llava_min.load(tmp_path / "one", dtype=dtype, device="cpu")
    assert torch.equal(logits(again), before)
    save(again, processor, tmp_path / "two")
    config = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    skipped = config.get("llm_int8_skip_modules") or config.get("modules_to_not_convert")
    skipped = skipped or config["ignore"]
    assert [name for name in PARTS if any(name in s for s in skipped)] == PARTS
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_another_group_size_is_recorded(base, tmp_path):
    quantize([str(base), str(tmp_path / "q"), "--method", "int4", "--group-size", "32"])
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "llava_min" and config["group_size"] == 32
    layers = [layer for _, layer in quant_layers(loaded(tmp_path / "q"))]
    assert layers and all(layer.group_size == 32 for layer in layers)


def test_the_verb_never_overwrites_and_leaves_nothing_half_written(base, written, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    with pytest.raises(UserError, match="there: exists already"):
        quantize([str(base), str(tmp_path / "there")])
    with pytest.raises(UserError, match="MODEL OUT: give"):
        quantize([str(base)])
    with pytest.raises(UserError, match="--group-size: nf4 has none"):
        quantize([str(base), str(tmp_path / "q"), "--group-size", "64"])
    with pytest.raises(UserError, match="nf4: is quantized already; give the 16-bit"):
        quantize([str(written("nf4")), str(tmp_path / "q")])
    assert sorted(tmp_path.iterdir()) == [tmp_path / "there"]


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(hidden_size=64, intermediate_size=64), r"is \[4, 64\], expected \[4, 256\]; the ad"),
        (dict(num_hidden_layers=3), "has no place in this model; the adapter belongs to another"),
    ],
)
@pytest.mark.parametrize("method", ["nf4", "int4"])
def test_the_adapter_of_another_base(method, change, says, written, spm, tmp_path):
    text = {**WIDE["text_config"], **change}
    other = write_folder(tmp_path / "other", spm, their_model(**{**WIDE, "text_config": text}))
    adapter = str(make_adapter(other, tmp_path / "adapter", projector=False))
    with pytest.raises(UserError, match=says):
        loaded(written(method), adapter=adapter)


def test_a_whole_layer_of_an_adapter_that_is_quantized_here(base, tmp_path):
    """PEFT's modules_to_save: such an adapter is for 16-bit weights."""
    peft = pytest.importorskip("peft", reason="writes the adapter of this test; pip install peft")
    whole = [f"layers.1.mlp.{name}" for name in ("down_proj", "up_proj")]
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=whole, init_lora_weights=False
    )
    adapter = str(tmp_path / "adapter")
    peft.get_peft_model(their_model(**WIDE), config).save_pretrained(adapter)
    loaded(base, adapter=adapter)
    with pytest.raises(UserError, match="_proj.weight is the whole weight of a layer that is qu"):
        loaded(base, adapter=adapter, quantize="nf4")


def test_what_is_quantized_is_not_quantized_again(written):
    with pytest.raises(UserError, match="^quantize: int8 for a checkpoint that is quantized alr"):
        loaded(written("nf4"), quantize="int8")


def spoil(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


Q_PROJ = to_layout("language_model.layers.0.self_attn.q_proj.", "hf")
NAN = torch.full((512,), float("nan"))


@pytest.mark.parametrize(
    "method, change, says",
    [
        ("nf4", lambda t: t.pop(f"{Q_PROJ}weight.absmax"), "missing 1 .*q_proj.weight.absmax"),
        ("nf4", lambda t: t.pop(f"{Q_PROJ}weight"), r"missing 1 .*q_proj.weight\)"),
        ("int8", lambda t: t.pop(f"{Q_PROJ}SCB"), "missing 1 .*q_proj.SCB"),
        ("int4", lambda t: t.pop(f"{Q_PROJ}weight_scale"), "missing 1 .*q_proj.weight_scale"),
        ("hqq4", lambda t: t.pop(f"{Q_PROJ}weight_zero"), "missing 1 .*q_proj.weight_zero"),
        ("int4", lambda t: t.update({f"{Q_PROJ}weight_g_idx": NAN}), "unknown 1 .*weight_g_idx"),
        ("int8", lambda t: t.update({f"{Q_PROJ}SCB": NAN[:128]}), "q_proj.SCB holds NaN"),
        ("int8", lambda t: t.update({f"{Q_PROJ}SCB": torch.ones(64)}), "q_proj: SCB of a quant"),
        (
            "int4",
            lambda t: t.update({f"{Q_PROJ}weight_scale": torch.ones(128, 2).bfloat16()}),
            "q_proj: weight_scale of a quantized layer is bfloat16 .128, 2.",
        ),
    ],
)
def test_a_broken_checkpoint_is_one_line(method, change, says, folder):
    broken = folder(method)
    spoil(broken, change)
    with pytest.raises(UserError, match=says) as e:
        loaded(broken)
    assert "\n" not in str(e.value) and str(broken) in str(e.value)


def test_a_config_that_is_not_of_its_weights(folder, base, tmp_path):
    broken = folder("nf4")
    config = json.loads((broken / "config.json").read_text())
    plain = shutil.copytree(base, tmp_path / "plain")
    (plain / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no layer is quantized, though"):
        loaded(plain)
    ours = {"quant_method": "llava_min", "format": 1, "method": "int4", "group_size": 24}
    config["quantization_config"] = ours
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match="config.json: quantization_config: .*_proj: group_size: 24"
    ):
        loaded(broken)
    config["quantization_config"]["quant_method"] = "gptq"
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="of kind 'gptq', expected bitsandbytes"):
        loaded(broken)
    del config["quantization_config"]
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="unknown"):
        loaded(broken)


def test_the_hash_of_an_evaluation_does_not_depend_on_a_kernels_order(base, written):
    """An evaluation in int4 is continued on a CPU with other instructions."""
    model = loaded(base, "bf16", quantize="int4")
    assert isinstance(quant_layers(model)[0][1], Int4Linear)
    before = hash_weights(model)
    portable(model)
    assert hash_weights(model) == before == hash_weights(loaded(written("int4"), "bf16"))
    other = model.language_model.layers[1].mlp.down_proj
    other.load(other.dequantize() * 1.5)
    assert hash_weights(model) != before


# ---- other tools


def their_load(folder: Path, **more):
    transformers = pytest.importorskip("transformers", reason="the oracle; pip install '.[test]'")
    model, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", output_loading_info=True, **more
    )
    assert not any(report.values()), report
    return model.eval()


def plain_products(model):
    """bitsandbytes computes in bf16 on a CPU that has it, whatever it is asked for: not here."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize("method", ["nf4", "fp4"])
def test_transformers_loads_our_four_bits_with_bitsandbytes(method, written):
    pytest.importorskip("bitsandbytes", reason="the oracle of this test; pip install bitsandbytes")
    theirs, ours = plain_products(their_load(written(method))), loaded(written(method))
    assert count(theirs, "Linear4bit") == 14
    assert (logits(theirs) - logits(ours)).abs().max() < 2e-5  # fp32, another order of sums


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_over_nf4_are_those_of_peft(dora, written, tmp_path):
    """Over bitsandbytes' layers: the same logits, and gradients for the same matrices."""
    pytest.importorskip("bitsandbytes", reason="the oracle of this test; pip install bitsandbytes")
    peft = pytest.importorskip("peft", reason="the oracle of this test; pip install peft")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)",
        modules_to_save=["multi_modal_projector"],
        use_dora=dora,
    )
    theirs = peft.get_peft_model(plain_products(their_load(written("nf4"))), config)
    g = torch.Generator().manual_seed(3)
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=g)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = loaded(written("nf4"), adapter=str(tmp_path / "adapter"))
    mine = {n: p for n, p in ours.named_parameters() if ".lora_" in n}
    short = lambda n: n.removeprefix("base_model.model.").replace(".default", "")
    ours_of = lambda n: to_ours(short(n)).replace("vector.weight", "vector")
    given = {ours_of(n): p for n, p in theirs.named_parameters() if ".lora_" in n}
    assert mine.keys() == given.keys() and len(mine) == (18 if dora else 12)
    found, right = ours(IDS, PIXELS), theirs(input_ids=IDS, pixel_values=PIXELS).logits
    assert (found - right).abs().max() < 2e-5 * right.abs().max()
    assert (found - logits(loaded(written("nf4")))).abs().max() > 0.1 * right.abs().max()
    for p in mine.values():
        p.requires_grad_(True)
    ours(IDS, PIXELS).square().mean().backward()
    right.square().mean().backward()
    for name, p in given.items():
        assert (mine[name].grad - p.grad).norm() < 1e-4 * p.grad.norm(), name


def test_transformers_loads_our_int8_with_bitsandbytes(written):
    """The numbers are the same; LLM.int8() rounds the inputs as well, so logits are only near."""
    pytest.importorskip("bitsandbytes", reason="the oracle of this test; pip install bitsandbytes")
    theirs, ours = their_load(written("int8")), loaded(written("int8"))
    assert count(theirs, "Linear8bitLt") == 14
    for path, layer in quant_layers(ours):
        weight = theirs.get_submodule(to_layout(f"{path}.", "hf_5_memory").rstrip(".")).weight
        assert torch.equal(weight.data, layer.weight_packed)
        assert torch.equal(weight.SCB, layer.SCB)
    near = logits(ours)
    assert (logits(theirs) - near).abs().max() < 0.1 * near.abs().max()


def test_transformers_loads_our_int4_with_compressed_tensors(written):
    pytest.importorskip("compressed_tensors", reason="the oracle; pip install compressed-tensors")
    theirs, ours = their_load(written("int4")), loaded(written("int4"))
    near = logits(ours)
    assert (logits(theirs) - near).abs().max() < 2e-5
    assert (near - logits(loaded(written("nf4")))).abs().max() > 0.1  # quantized they are


ALL = "lm_head,multi_modal_projector,vision_tower"


@pytest.mark.parametrize("include, layers", [(ALL, 35), ("lm_head", 15), ("vision_tower", 32)])
@pytest.mark.parametrize("method", ["nf4", "int8", "int4", "hqq4"])
def test_other_parts_are_quantized_if_asked(method, include, layers, spm, tmp_path):
    """And transformers is told so: what it reads computes the same."""
    wide = {**WIDE, "vision_config": {**WIDE["vision_config"], "hidden_size": 128}}
    base = write_folder(tmp_path / "base", spm, their_model(**wide))
    out = tmp_path / "out"
    quantize([str(base), str(out), "--method", method, "--include", include, "--dtype", "fp32"])
    ours = loaded(out)
    assert len(quant_layers(ours)) == layers
    save(ours, ours.processor, tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again")), logits(ours))
    loaded(out, "bf16")
    if method == "hqq4":
        return
    package = "compressed_tensors" if method == "int4" else "bitsandbytes"
    pytest.importorskip(package, reason="the oracle of this test; pip install '.[test]'")
    theirs = plain_products(their_load(out))
    within = (
        0.1 * logits(ours).abs().max() if method == "int8" else 2e-5
    )  # LLM.int8() rounds the inputs as well
    assert (logits(theirs) - logits(ours)).abs().max() < within


def test_a_part_that_is_not_quantized(base, spm, tmp_path):
    tied = write_folder(tmp_path / "tied", spm, their_model("qwen2"))
    for source, part, says in (
        (tied, "lm_head", "--include: lm_head is tied to the embeddings here, which stay"),
        (base, "embed_tokens", "--include: 'embed_tokens' is not one of lm_head, multi_modal_pro"),
    ):
        with pytest.raises(UserError, match=f"^{says}"):
            quantize([str(source), str(tmp_path / "q"), "--include", part])
    assert not (tmp_path / "q").exists()


def count(model, kind: str) -> int:
    return sum(type(module).__name__ == kind for module in model.modules())


SKIPPED = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


@pytest.mark.parametrize(
    "options, layers",
    [
        (dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True), 14),
        (dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 14),
        (dict(load_in_4bit=True, bnb_4bit_quant_type="fp4"), 14),
        (dict(load_in_8bit=True), 14),
        # left alone, transformers quantizes tower and projector, too
        (dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head"]), 34),
    ],
)
def test_what_transformers_saves_is_read(options, layers, base, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the oracle of this test; pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    given = {"llm_int8_skip_modules": SKIPPED, "bnb_4bit_compute_dtype": torch.float32} | options
    theirs = their_load(base, quantization_config=BitsAndBytesConfig(**given))
    theirs.save_pretrained(tmp_path / "q")
    for path in base.iterdir():
        if not (tmp_path / "q" / path.name).exists():
            shutil.copy(path, tmp_path / "q")
    ours = loaded(tmp_path / "q")
    assert len(quant_layers(ours)) == layers
    within = 0.5 if "load_in_8bit" in options else 2e-5  # LLM.int8() rounds the inputs as well
    assert (logits(plain_products(theirs)) - logits(ours)).abs().max() < within
    again = tmp_path / "again"
    save(ours, ours.processor, again)
    assert torch.equal(logits(loaded(again)), logits(ours))
    assert (logits(plain_products(their_load(again))) - logits(ours)).abs().max() < within


def write_awq_gemm(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """A copy of `base` as AutoAWQ writes it; path -> the weight that each layer stands for."""
    from llava_min.quant.awq_gemm import ORDER
    from llava_min.quant.group import GroupLinear

    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    kind = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}
    config["quantization_config"] = kind | {"zero_point": True}
    (folder / "config.json").write_text(json.dumps(config))
    expected, plain = {}, loaded(base)

    def words(codes: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
        for i, place in enumerate(ORDER):
            out |= codes[:, place::8].long() << 4 * i
        return torch.where(out >= 1 << 31, out - (1 << 32), out).int()

    tensors = load_file(folder / "model.safetensors")
    for path, m in plain.named_modules():
        if not (path.startswith("language_model.layers.") and type(m) is torch.nn.Linear):
            continue
        layer = GroupLinear(m.in_features, m.out_features, bits=4, group_size=64)
        codes, scale, zero = map(torch.cat, zip(*layer.pieces(m.weight.detach())))
        name = next(
            n for n in tensors if n.endswith(f"{path.removeprefix('language_model.')}.weight")
        )
        del tensors[name]
        name = name.removesuffix("weight")
        scale, zero = scale.squeeze(-1).half(), zero.squeeze(-1)
        tensors[f"{name}qweight"] = words(codes.flatten(1).T)
        tensors[f"{name}qzeros"] = words(zero.T.to(torch.uint8))
        tensors[f"{name}scales"] = scale.T.contiguous()
        expected[path] = ((codes - zero.unsqueeze(-1)) * scale.float().unsqueeze(-1)).flatten(1)
    save_file(tensors, folder / "model.safetensors")
    return expected


def test_awq_gemm_is_read(base, tmp_path):
    """Written here as AutoAWQ does, from numbers that are known."""
    folder = tmp_path / "awq"
    expected = write_awq_gemm(base, folder)
    ours = loaded(folder)
    layers = dict(quant_layers(ours))
    assert layers.keys() == expected.keys()
    assert all(torch.equal(layers[path].dequantize(), w) for path, w in expected.items())
    with pytest.raises(UserError, match="AWQ-GEMM checkpoint is not written"):
        save(ours, ours.processor, tmp_path / "again")


# ---- the scripts


def test_sample_and_eval_take_the_flag(tmp_path, capsys):
    from PIL import Image

    image = tmp_path / "red.png"
    Image.new("RGB", (64, 64), "red").save(image)
    load_script("sample").main([str(image), "--quantize", "nf4", "--max-new-tokens", "4"])
    assert "float32, nf4" in capsys.readouterr().err
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a"}]
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"id": "1", "image": "red.png", "conversations": talk}]))
    out = tmp_path / "out"
    arguments = ["--data", str(data), "--out", str(out), "--device", "cpu", "--quantize"]
    load_script("eval").main([*arguments, "int8"])
    assert json.loads((out / "settings.json").read_text())["quantization"] == "int8"
    with pytest.raises(UserError, match="^--quantize: awq4 needs calibration data"):
        load_script("eval").main([*arguments, "awq4"])


def test_qlora_trains_an_adapter_that_fits_the_same_base(tmp_path, capsys):
    run = ["--data", "toy:questions", "--toy-train", "16", "--toy-val", "4", "--max-steps", "3"]
    run += ["--device", "cpu", "--batch-size", "4", "--model", "tiny"]
    run += ["--precision", "fp32", "--lr", "1e-2"]
    out = tmp_path / "run"
    load_script("train").main([*run, "--out", str(out), "--quantize", "nf4"])
    assert json.loads((out / "config.json").read_text())["quantize"] == "nf4"
    adapter = str(out / "adapter")
    model, processor = llava_min.load("tiny", device="cpu", quantize="nf4", adapter=adapter)
    assert len(quant_layers(model)) == 28

    quantize(["tiny", str(tmp_path / "q"), "--dtype", "fp32"])
    run[run.index("tiny")] = str(tmp_path / "q")
    load_script("train").main([*run, "--out", str(tmp_path / "again")])
    one, two = (
        load_file(p / "adapter/adapter_model.safetensors") for p in (out, tmp_path / "again")
    )
    assert one.keys() == two.keys() and all(torch.equal(x, two[n]) for n, x in one.items())

    with pytest.raises(
        UserError, match="--train: full of a quantized model, which only adapters learn on"
    ):
        load_script("train").main([*run, "--out", str(tmp_path / "full"), "--train", "full"])
    with pytest.raises(
        UserError, match="--quantize: has no effect without --train lora; give that"
    ):
        more = ["--quantize", "nf4", "--train", "full"]
        load_script("train").main([*run, "--out", str(tmp_path / "16"), *more])
    with pytest.raises(UserError, match="--train: projector of a quantized model"):
        load_script("train").main([*run, "--out", str(tmp_path / "p"), "--train", "projector"])
    with pytest.raises(UserError, match="--quantize: nf4 for a checkpoint that is quantized alr"):
        load_script("train").main([*run, "--out", str(tmp_path / "b"), "--quantize", "nf4"])


def test_qlora_learns_what_lora_learns(tmp_path):
    """The toy run cut to 40 steps; whole, exact_match is 0.995 with LoRA and 1.000 over nf4."""
    run = ["--recipe", "toy", "--toy-train", "640", "--toy-val", "40", "--max-steps", "40"]
    run += ["--eval-metrics", "token_f1", "--max-new-tokens", "64", "--save-every", "0"]
    found = {}
    for name, more in (("lora", []), ("qlora", ["--quantize", "nf4"])):
        load_script("train").main([*run, *more, "--out", str(tmp_path / name)])
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        found[name] = [row for row in map(json.loads, rows) if "eval_token_f1" in row]
    before, after = found["qlora"]
    assert before["eval_token_f1"] < 10
    assert after["eval_token_f1"] > found["lora"][1]["eval_token_f1"] - 5 > 80


def test_the_weights_of_quantized_layers_are_counted(base):
    tables = []
    for method in (None, "nf4", "int8"):
        checkpoint = open_checkpoint(str(base))
        if method:
            checkpoint.quantize(method)
        add_lora(checkpoint.model, LoRAConfig(r=4))
        set_trainable(checkpoint.model, "lora")
        tables.append(parameter_table(checkpoint.model))
    assert tables[0] == tables[1] == tables[2]


def test_a_quantized_projector_is_not_trained_whole(base):
    model = open_checkpoint(str(base)).model
    quantize_layers(model, ["multi_modal_projector.linear_1"], "nf4")
    with pytest.raises(UserError, match="give lora, and not multi_modal_projector whole, or"):
        set_trainable(model, "lora")


def test_a_tied_head_is_not_quantized(spm, tmp_path):
    folder = write_folder(tmp_path / "m", spm, their_model("qwen2"))
    quantize([str(folder), str(tmp_path / "q"), "--dtype", "fp32"])
    loaded(tmp_path / "q")
    head = to_layout("lm_head.weight.absmax", "hf")
    spoil(tmp_path / "q", lambda t: t.update({head: torch.ones(2)}))
    with pytest.raises(UserError, match="unknown 1 .*lm_head.weight.absmax"):
        loaded(tmp_path / "q")


def test_the_model_in_16_bits_never_exists_whole(base, monkeypatch):
    """When a layer gets its numbers, no other layer has a weight that is not quantized."""
    checkpoint, most = open_checkpoint(str(base)), []
    original = QuantLinear.load

    def load(self, weight):
        blocks = checkpoint.model.language_model.layers
        wide = [p for p in blocks.parameters() if p.dim() == 2 and p.is_floating_point()]
        most.append(sum(p.shape[1] == 128 and not p.is_meta for p in wide))
        return original(self, weight)

    monkeypatch.setattr(QuantLinear, "load", load)
    checkpoint.load("fp32", "cpu", "int8")
    assert len(most) == 14 and max(most) == 0
