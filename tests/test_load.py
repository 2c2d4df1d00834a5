"""load.py and the package: one call gives a ready model; what is wrong with a small file is found
before weights are read.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import IMAGE, PAD, PIECES, hf_config, pixels, rows, their_model, write_processor
from PIL import Image

import llava_min
from llava_min.config import LlavaConfig
from llava_min.data.image import to_pixels
from llava_min.errors import UserError
from llava_min.export.stream import save_weights
from llava_min.fast.cpu_linear import unpacked
from llava_min.load import (
    TINY,
    load_model,
    on_meta,
    open_checkpoint,
    pick_device,
    pick_dtype,
    random_model,
    save,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(spm, tmp_path_factory) -> Path:
    """A sound folder of a fresh model."""
    folder = tmp_path_factory.mktemp("load") / "base"
    folder.mkdir()
    write_processor(folder, spm)
    (folder / "config.json").write_text(json.dumps(hf_config()))
    save_weights(dict(random_model(LlavaConfig.from_hf(hf_config())).named_parameters()), folder)
    return folder


@pytest.fixture
def folder(base, tmp_path) -> Path:
    return shutil.copytree(base, tmp_path / "m")


def change(path: Path, **keys) -> None:
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in {**data, **keys}.items() if v is not ...}))


# ---- the package

ORDERS = [
    "import llava_min",
    "from llava_min.load import save",
    "import llava_min.load",
    "import llava_min.generate, llava_min.load",
    "from llava_min.generate import generate, stream; from llava_min import load",
    "from llava_min import generate; import llava_min.generate",
    "import importlib, llava_min.load; importlib.reload(sys.modules['llava_min.load'])",
    "from llava_min import *; from llava_min.load import *",
    "import llava_min.load as f; assert f is llava_min.load",
]


def test_the_functions_stand_whatever_is_imported_first():
    """The modules load.py and generate.py share their names with the functions."""
    code = """
import os, sys, torch
for order in sys.argv[1:]:
    if os.fork() == 0:
        import llava_min
        exec(order)
        import llava_min
        from llava_min import generate, load, stream
        for f, name in ((llava_min.load, "load"), (llava_min.generate, "generate"), (llava_min.stream, "stream"),
                        (load, "load"), (generate, "generate"), (stream, "stream")):
            assert callable(f) and not isinstance(f, type(sys)) and f.__name__ == name, (order, f)
        assert llava_min.UserError is sys.modules["llava_min.errors"].UserError
        assert all(hasattr(llava_min, name) for name in llava_min.__all__) and not hasattr(llava_min, "nonsense")
        os._exit(0)
    assert os.wait()[1] == 0, order
"""
    subprocess.run([sys.executable, "-c", code, *ORDERS], check=True)


def test_the_package_and_its_flags_come_without_torch():
    code = "import sys, llava_min, llava_min.util.cli; assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- the model


def test_the_page_of_the_interface(folder):
    model, processor = llava_min.load(folder, dtype="bf16", device="cpu")
    batch = processor(
        "USER: <image>\nwhat is in the picture? ASSISTANT:",
        images=Image.new("RGB", (40, 30), "red"),
    )
    assert (
        model(**batch).shape == (1, batch["input_ids"].shape[1], 384)
        and model.dtype == torch.bfloat16
    )
    ids = llava_min.generate(model, batch, max_new_tokens=4, min_new_tokens=4)
    assert len(ids) == 1 and len(ids[0]) == 4 and isinstance(processor.decode(ids[0]), str)


def test_the_model_alone_and_in_two_steps(folder):
    """`load` is `open_checkpoint` and `load_weights`; without the processor it is `load_model`.
    What is trained is in fp32.
    """
    model, _ = llava_min.load(folder, dtype="bf16", device="cpu")
    alone, ready = load_model(folder, torch.bfloat16, CPU), open_checkpoint(folder)
    assert (
        not alone.training
        and not model.training
        and {p.device.type for p in ready.model.parameters()} == {"meta"}
    )
    ready.model.multi_modal_projector.requires_grad_(True)
    ready.load_weights(torch.bfloat16, CPU)
    for name, p in model.named_parameters():
        learns = name.startswith("multi_modal_projector.")
        other = ready.model.get_parameter(name)
        assert torch.equal(alone.get_parameter(name), unpacked(p)) and torch.equal(
            other.to(p.dtype), unpacked(p)
        )
        assert other.requires_grad == learns and other.dtype == (
            torch.float32 if learns else torch.bfloat16
        )


def test_the_bundled_tiny_model():
    if not (TINY / "config.json").exists():
        pytest.skip("the tiny checkpoint is not there yet")
    model, processor = llava_min.load("tiny", device="cpu")
    assert sum(p.numel() for p in model.parameters()) <= 4_000_000
    assert sum(f.stat().st_size for f in TINY.iterdir()) <= 8 << 20


def test_the_revision_is_asked_of_the_hub(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(
        sys.modules["llava_min.load"], "find_folder", lambda *given: asked.append(given) or folder
    )
    llava_min.load("a/b", device="cpu", revision="v1")
    assert asked == [("a/b", "v1")]


def test_a_folder_of_train_is_no_model_though_it_has_a_config(folder):
    (folder / ".lock").touch()
    (folder / "model").mkdir()
    with pytest.raises(
        UserError, match=f"holds no config.json of a model.*give {folder / 'model'}"
    ):
        llava_min.load(folder, device="cpu")


def test_what_is_trained_is_read_in_fp32(folder):
    model = (ready := open_checkpoint(str(folder))).model
    model.multi_modal_projector.requires_grad_(True)
    ready.load_weights(torch.bfloat16, torch.device("cpu"))
    for name, p in model.named_parameters():
        assert p.requires_grad == name.startswith("multi_modal_projector.") and p.dtype == (
            torch.float32 if p.requires_grad else torch.bfloat16
        )


def test_dtypes(folder):
    for name, dtype in (
        ("fp32", torch.float32),
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
        (torch.float16, torch.float16),
        ("auto", torch.float32),
    ):
        model, _ = llava_min.load(folder, dtype=name, device="cpu")
        assert {p.dtype for p in model.parameters()} == {dtype} and {
            p.device for p in model.parameters()
        } == {CPU}
    small, big = (torch.nn.Linear(1000, n, bias=False, device="meta") for n in (500_000, 500_001))
    assert (
        pick_dtype("auto", small, CPU) == torch.float32
        and pick_dtype("auto", big, CPU) == torch.bfloat16
    )
    on_gpu = [
        pick_dtype("auto", on_meta(LlavaConfig.from_hf(hf_config(dtype=d))), torch.device("cuda"))
        for d in ("float32", "bfloat16", None)
    ]
    assert on_gpu == [torch.float32, torch.bfloat16, torch.float16]  # as stored
    exact, processor = llava_min.load(folder, dtype=torch.float64, device="cpu")
    batch = processor("USER: <image>\nwhat? ASSISTANT:", Image.new("RGB", (30, 20), "red"))
    with torch.no_grad():
        a, b = exact(**batch), llava_min.load(folder, dtype="fp32", device="cpu")[0](**batch)
    assert a.dtype == torch.float64 and 0 < (a - b).abs().max() < 1e-4
    assert llava_min.generate(exact, batch, max_new_tokens=5)
    with pytest.raises(UserError, match="dtype: 'torch.float64' is not one of fp32, bf16, fp16"):
        save(exact, processor, folder / "saved")
    for bad in ("fp8", "int8", "", None, 16, torch.int8, torch.complex64, ["fp32"]):
        with pytest.raises(UserError, match="dtype: .*auto, fp32, bf16, fp16"):
            llava_min.load(folder, dtype=bad, device="cpu")


def test_an_unknown_method_of_quantizing_is_refused(folder):
    llava_min.load(folder, quantize=None)
    with pytest.raises(UserError, match="quantize: 'nf5', expected one of int8, int4, hqq8"):
        llava_min.load(folder, quantize="nf5")


def test_an_answer_ends_with_any_end_token_streamed_or_not(folder):
    plain, _ = llava_min.load(folder)
    batch = llava_min.load(folder)[1](
        "USER: <image>\nwhat is in the picture? ASSISTANT:", Image.new("RGB", (30, 20), "red")
    )
    ids = llava_min.generate(plain, batch, max_new_tokens=8, eos_token_id=[])[0]
    end = next(i for i in ids if i != ids[0])
    # where chat models name their end of turn
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    model, processor = llava_min.load(folder)
    assert {2, end} <= set(processor.stop_ids)
    want, seen = ids[: ids.index(end)], []
    assert llava_min.generate(model, batch, max_new_tokens=8)[0] == want
    # its own processor writes it
    assert "".join(llava_min.stream(model, batch, max_new_tokens=8, ids=seen)) == processor.decode(
        want
    )
    assert seen == want


def test_an_adapter_is_asked_as_it_was_trained(folder, tmp_path):
    from llava_min.adapter import save_adapter
    from llava_min.lora import LoRAConfig
    from llava_min.training.targets import add_lora

    model, trained = llava_min.load(folder, template="vicuna_v1", image_aspect_ratio="pad")
    add_lora(model, lora := LoRAConfig(4, 8))
    (tmp_path / "adapter").mkdir()
    save_adapter(model, lora, tmp_path / "adapter", str(folder))

    def ways(**more):
        processor = open_checkpoint(
            str(folder), adapter=str(tmp_path / "adapter"), **more
        ).processor
        return processor.template_name, processor.image_config.aspect

    assert ways() == ("llava_hf", "crop")  # as other tools write them: what the base says
    trained.save_settings(tmp_path / "adapter")
    assert ways() == ("vicuna_v1", "pad") and ways(template="plain", image_aspect_ratio="crop") == (
        "plain",
        "crop",
    )
    for empty in ({"template": ""}, {"image_aspect_ratio": ""}):  # a mistake, and not the record
        with pytest.raises(UserError, match="template|image_aspect_ratio"):
            ways(**empty)
    processor = llava_min.load(folder, adapter=str(tmp_path / "adapter"))[1]
    assert (processor.template_name, processor.image_config.aspect) == ("vicuna_v1", "pad")
    change(tmp_path / "adapter" / "processor_config.json", llava_min_template="poem")
    with pytest.raises(UserError, match="poem"):
        ways()


def test_what_is_no_source_and_no_dtype_to_save_in(folder, tmp_path):
    for bad, says in (("", "source: is empty"), (None, "source: NoneType"), (5, "source: int")):
        with pytest.raises(UserError, match=says):
            llava_min.load(bad, device="cpu")
    ready = llava_min.load(folder, device="cpu")
    for bad in ("foo", "auto", torch.int8, 5):
        with pytest.raises(UserError, match="dtype: .*fp32, bf16, fp16"):
            save(*ready, tmp_path / "new", dtype=bad)
    assert not (tmp_path / "new").exists()


def test_devices(monkeypatch):
    assert pick_device("cpu") == pick_device(CPU) == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == CPU
    for bad in ("cuda", "cuda:0", torch.device("cuda")):
        with pytest.raises(UserError, match="torch finds no CUDA GPU"):
            pick_device(bad)
    for bad in ("gpu", "", "cuda:x", None, "cpu "):
        with pytest.raises(UserError, match="is not a device"):
            pick_device(bad)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == torch.device("cuda") and pick_device("cuda:1").index == 1
    with pytest.raises(UserError, match="cuda:2 was asked for and there are 2 GPUs"):
        pick_device("cuda:2")


def test_fresh_is_seeded_and_ready():
    a, b, c = (
        random_model(LlavaConfig.from_hf(hf_config(kind)), seed=seed)
        for kind, seed in (("qwen2", 1), ("qwen2", 1), ("qwen2", 2))
    )
    assert all(
        torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters())
    ) and not torch.equal(a.lm_head.weight, c.lm_head.weight)
    assert a.lm_head.weight is a.language_model.embed_tokens.weight and not a.training
    flat = {n: p for n, p in a.named_parameters() if p.dim() == 1}
    assert all(
        (p == (0 if n.endswith("bias") else 1)).all()
        for n, p in flat.items()
        if "class_embedding" not in n
    )
    assert (
        abs(a.lm_head.weight.std() * 32**0.5 - 1) < 0.03 and a(rows(1), pixels(1)).isfinite().all()
    )
    state = torch.get_rng_state()
    on_meta(a.config)
    assert torch.equal(state, torch.get_rng_state())


def test_saved_in_another_dtype(folder, tmp_path):
    model, processor = llava_min.load(folder, device="cpu")
    save(model, processor, tmp_path / "half", "bf16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    half, _ = llava_min.load(tmp_path / "half", device="cpu")
    assert all(
        torch.equal(a.bfloat16().float(), b) for a, b in zip(model.parameters(), half.parameters())
    )


# ---- how pictures are prepared


def aspect_of(folder: Path, capsys, **options) -> tuple[str, int]:
    """The aspect that is taken, and how often stderr says that none is recorded."""
    capsys.readouterr()
    _, processor = llava_min.load(folder, device="cpu", **options)
    return processor.image_config.aspect, capsys.readouterr().err.count(
        "does not record image_aspect_ratio"
    )


@pytest.mark.parametrize(
    "recorded, taken, said",
    [
        ({"do_pad": ..., "image_aspect_ratio": ...}, "pad", 1),
        ({"do_pad": True}, "pad", 0),
        ({"do_pad": False}, "crop", 0),
        ({"do_pad": None}, "pad", 1),
        ({"do_pad": ..., "image_aspect_ratio": "pad"}, "pad", 0),
        ({"do_pad": ..., "image_aspect_ratio": "crop"}, "crop", 0),
        ({"do_pad": ..., "image_aspect_ratio": "square"}, "crop", 0),
    ],
)
def test_the_aspect_is_what_is_recorded_and_else_pad(folder, capsys, recorded, taken, said):
    change(folder / "preprocessor_config.json", **recorded)
    assert aspect_of(folder, capsys) == (taken, said)
    for asked in ("pad", "crop"):
        assert aspect_of(folder, capsys, image_aspect_ratio=asked) == (asked, 0)


def test_a_saved_folder_records_the_aspect(folder, tmp_path, capsys):
    for asked in ("pad", "crop"):
        save(*llava_min.load(folder, device="cpu", image_aspect_ratio=asked), tmp_path / asked)
        assert aspect_of(tmp_path / asked, capsys) == (asked, 0)


def test_transformers_of_today_saves_the_settings_elsewhere(folder, tmp_path, capsys):
    transformers = pytest.importorskip("transformers", reason="writes the folder that is read here")
    tokenizer = transformers.LlamaTokenizer.from_pretrained(folder)
    for pad in (True, False):
        images = transformers.LlavaImageProcessorPil(
            do_pad=pad, size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        )
        saved = shutil.copytree(
            folder,
            tmp_path / f"{pad}",
            ignore=shutil.ignore_patterns("tokenizer*", "preprocessor*"),
        )
        transformers.LlavaProcessor(
            images,
            tokenizer,
            patch_size=14,
            num_additional_image_tokens=1,
            vision_feature_select_strategy="default",
        ).save_pretrained(saved)
        assert not (saved / "preprocessor_config.json").exists()
        assert aspect_of(saved, capsys) == ("pad" if pad else "crop", 0)
        _, processor = llava_min.load(saved, device="cpu")
        picture = Image.linear_gradient("L").resize((50, 30))
        assert torch.equal(
            to_pixels(picture, processor.image_config),
            images(picture, return_tensors="pt").pixel_values[0],
        )


@pytest.mark.parametrize(
    "key, taken", [(..., "crop"), (None, "crop"), ("square", "crop"), ("pad", "pad")]
)
@pytest.mark.parametrize("clip_settings", [True, False])
def test_the_original_records_the_aspect_in_config_json(
    spm, tmp_path, capsys, key, taken, clip_settings
):
    from test_weights import write_original

    folder = write_original(tmp_path / "llava", spm, their_model(), "bin")
    change(folder / "config.json", image_aspect_ratio=key)
    if clip_settings:
        (tmp_path / "clip" / "preprocessor_config.json").write_text(
            json.dumps(
                {
                    "size": 28,
                    "crop_size": 28,
                    "image_mean": [0.5, 0.4, 0.3],
                    "image_std": [0.2, 0.2, 0.2],
                }
            )
        )
    assert aspect_of(folder, capsys) == (taken, 0)
    _, processor = llava_min.load(
        folder, device="cpu", image_aspect_ratio="crop" if taken == "pad" else "pad"
    )
    assert processor.image_config.aspect != taken
    assert (
        processor.image_config.mean[0] == (0.5 if clip_settings else 0.48145466)
        and processor.image_config.size == 28
    )


def test_a_tower_that_is_not_there(spm, tmp_path):
    from test_weights import write_original

    folder = write_original(tmp_path / "llava", spm, their_model(), "bin")
    for tower in ("nobody/no-such-clip", "openai/clip-vit-large-patch14-336"):
        change(folder / "config.json", mm_vision_tower=tower)
        with pytest.raises(
            UserError, match=f"{tower}: not a folder here, and the hub did not give it"
        ):
            llava_min.load(folder, device="cpu")


# ---- a folder that is no checkpoint

NO_CHECKPOINTS = {
    "empty": (
        {},
        "{}: holds no config.json of a model, expected the folder of a checkpoint; give one, a hub "
        "id, or tiny",
    ),
    "text": ({"passwd": "root"}, "{}: holds no config.json of a model"),
    "weights alone": ({"model.safetensors": ""}, "{}: holds no config.json of a model"),
    "config alone": (
        {"config.json": json.dumps(hf_config())},
        "{}: no tokenizer.json and no tokenizer.model here; give a checkpoint folder",
    ),
    "another model": (
        {"config.json": '{"model_type": "bert"}'},
        "{}/config.json: model_type is 'bert', expected 'llava'",
    ),
    "config a list": ({"config.json": "[]"}, "{}/config.json: a JSON list, expected an object"),
}


@pytest.mark.parametrize("files, says", NO_CHECKPOINTS.values(), ids=NO_CHECKPOINTS.keys())
def test_a_folder_that_is_no_checkpoint(tmp_path, files, says):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as told:
        llava_min.load(tmp_path, device="cpu")
    assert says.format(tmp_path) in str(told.value) and "\n" not in str(told.value)


# ---- which template


@pytest.mark.parametrize(
    "files, template",
    [
        ({}, "llava_hf"),
        ({"chat_template.jinja": "{{ '<|im_start|>' }}"}, "chatml"),
        ({"chat_template.jinja": "USER: ASSISTANT:"}, "llava_hf"),
        ({"chat_template.json": json.dumps({"chat_template": "x <|im_start|>"})}, "chatml"),
        ({"processor_config.json": '{"llava_min_template": "plain"}'}, "plain"),
        ({"processor_config.json": '{"chat_template": "x <|im_start|>"}'}, "chatml"),
    ],
)
def test_the_template_of_the_checkpoint(folder, tmp_path, files, template):
    for name, text in files.items():
        (folder / name).write_text(text)
    model, processor = llava_min.load(folder, device="cpu")
    assert processor.template_name == template
    save(model, processor, tmp_path / "saved")
    assert llava_min.load(tmp_path / "saved", device="cpu")[1].template_name == template
    assert (
        llava_min.load(folder, device="cpu", template="vicuna_v1")[1].template_name == "vicuna_v1"
    )


def test_the_template_in_tokenizer_config(folder):
    change(folder / "tokenizer_config.json", chat_template="<|im_start|>")
    assert llava_min.load(folder, device="cpu")[1].template_name == "chatml"


# ---- which tokens end an answer


def test_the_end_tokens_of_generation_config(folder, tmp_path):
    stops = lambda f: llava_min.load(f, device="cpu")[0].config.text.eos_token_ids
    assert stops(folder) == (2,)
    for said, taken in (
        ({}, (2,)),
        ({"eos_token_id": None}, (2,)),
        ({"eos_token_id": 5}, (5,)),
        ({"eos_token_id": [2, 7]}, (2, 7)),
    ):
        (folder / "generation_config.json").write_text(json.dumps(said))
        assert stops(folder) == taken
    save(*llava_min.load(folder, device="cpu"), tmp_path / "saved")
    assert stops(tmp_path / "saved") == (2, 7)
    said = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert said == {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": PAD}
    for bad in ("2", [384], [-1], True):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": bad}))
        with pytest.raises(UserError, match="generation_config.json: eos_token_id is"):
            stops(folder)


# ---- before weights are read

EARLY = {
    "config": (lambda f: change(f / "config.json", model_type="llava_next"), {}, "llava_next"),
    "preprocessor": (
        lambda f: change(f / "preprocessor_config.json", image_std=[1, 1]),
        {},
        "image_std",
    ),
    "tokenizer": (lambda f: (f / "tokenizer.model").write_bytes(b"x"), {}, "tokenizer.model"),
    "template": (lambda f: None, {"template": "vicuna_v9"}, "vicuna_v9"),
    "aspect": (
        lambda f: None,
        {"image_aspect_ratio": "anyres"},
        "image_aspect_ratio: 'anyres' is not pad or crop",
    ),
    "aspect of another kind": (lambda f: None, {"image_aspect_ratio": True}, "image_aspect_ratio"),
    "aspect of a list": (lambda f: None, {"image_aspect_ratio": []}, "image_aspect_ratio"),
    "no template": (lambda f: None, {"template": ""}, "template:  is not known"),
    "adapter of another kind": (lambda f: None, {"adapter": 5}, "adapter: 5"),
    "no adapter": (lambda f: None, {"adapter": ""}, "adapter: ''"),
    "patches": (
        lambda f: (f / "processor_config.json").write_text('{"patch_size": 7}'),
        {},
        "processor_config.json: patch_size is 7 but 14 in config.json",
    ),
    "strategy": (
        lambda f: (f / "processor_config.json").write_text(
            '{"vision_feature_select_strategy": "full"}'
        ),
        {},
        "processor_config.json: vision_feature_select_strategy is full but default in config.json",
    ),
    "size of pictures": (
        lambda f: change(
            f / "preprocessor_config.json",
            size={"shortest_edge": 56},
            crop_size={"height": 56, "width": 56},
        ),
        {},
        "images are resized to 56 pixels but image_size in config.json is",
    ),
    "a larger tokenizer": (
        lambda f: change(
            f / "tokenizer_config.json",
            added_tokens_decoder={"9999": {"content": "<x>", "special": True}},
        ),
        {},
        "tokens but vocab_size is 384; the tokenizer belongs to another model",
    ),
    "another image token": (
        lambda f: change(
            f / "tokenizer_config.json",
            added_tokens_decoder={"380": {"content": "<image>", "special": True}},
        ),
        {},
        "in config.json but <image> is 380 in the tokenizer; correct one of them",
    ),
    "dtype": (lambda f: None, {"dtype": "int3"}, "dtype"),
    "device": (lambda f: None, {"device": "tpu9"}, "device"),
    "adapter": (
        lambda f: None,
        {"adapter": "/no/such/adapter"},
        "/no/such/adapter/adapter_config.json: no such file",
    ),
    "a missing tensor": (
        lambda f: change(
            f / "config.json", text_config={**hf_config()["text_config"], "num_hidden_layers": 3}
        ),
        {},
        "missing 9 tensor(s)",
    ),
}


@pytest.mark.parametrize("name", EARLY)
def test_found_before_weights_are_read(name, folder, monkeypatch):
    case, options, says = EARLY[name]
    monkeypatch.setattr(
        sys.modules["llava_min.load"], "load_weights", lambda *_: pytest.fail("weights are read")
    )
    case(folder)
    with pytest.raises(UserError) as e:
        llava_min.load(folder, **{"device": "cpu"} | options)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_the_tokenizer_gets_an_image_token_where_it_has_none(folder):
    change(folder / "tokenizer_config.json", added_tokens_decoder={}, pad_token="<unk>")
    _, processor = llava_min.load(folder, device="cpu")
    assert processor("<image>", images=Image.new("RGB", (28, 28)))["input_ids"].tolist() == [
        [1] + [IMAGE] * 4
    ]
    assert PIECES == IMAGE


# ---- what a foreign folder says is obeyed or told


def err_of(capsys, source, **options) -> str:
    capsys.readouterr()
    open_checkpoint(str(source), **options)
    return "".join(
        line + "\n"
        for line in capsys.readouterr().err.splitlines()
        if "image_aspect_ratio" not in line
    )


def test_a_key_that_no_class_knows_is_told_once(folder, capsys):
    assert err_of(capsys, folder) == ""
    change(folder / "config.json", grouping="avgpool1d", stride=2, plain=None, off=False)
    err = err_of(capsys, folder)
    assert err.startswith(
        f"warning: {folder}/config.json: grouping = 'avgpool1d', stride = 2: no published config"
    )
    assert err.count("\n") == 1 and "off" not in err and err_of(capsys, folder) == ""


def test_a_tower_at_a_path_of_another_machine(spm, tmp_path):
    from test_weights import write_original

    folder, beside = (
        write_original(tmp_path / "llava", spm, their_model(), "bin"),
        tmp_path / "clip-vit-large-patch14-336",
    )
    for tower in (
        "/data/LLaVA-Med/clip-vit-large-patch14-336",
        "./no/such/clip-vit-large-patch14-336",
        "pre/clip-vit-large-patch14-336/",
    ):
        change(folder / "config.json", mm_vision_tower=tower)
        with pytest.raises(UserError) as told:
            llava_min.load(folder, device="cpu")
        assert str(told.value).startswith(
            f"{folder}/config.json: mm_vision_tower: {tower}: no"
        ) and str(told.value).endswith(
            f"; put the folder of that CLIP at {beside}, or write "
            "openai/clip-vit-large-patch14-336 there"
        )
    shutil.copytree(tmp_path / "clip", beside)  # as told
    llava_min.load(folder, device="cpu")
    for tower in (str(tmp_path), ".", ".."):  # folders, and none of them is a CLIP's
        change(folder / "config.json", mm_vision_tower=tower)
        with pytest.raises(UserError) as told:
            llava_min.load(folder, device="cpu")
        said = str(told.value)
        assert (
            f"{folder}/config.json" in said and "mm_vision_tower" in said and "CLIP" in said.upper()
        )
    change(folder / "config.json", mm_vision_tower="x" * 5000)
    with pytest.raises(UserError, match="mm_vision_tower: x+…: cannot be looked up"):
        llava_min.load(folder, device="cpu")
    change(folder / "config.json", mm_vision_tower="/data/my-clip")
    with pytest.raises(
        UserError,
        match="at .*/my-clip, or write its hub id, such as openai/clip-vit-large-patch14-336 there",
    ):
        llava_min.load(folder, device="cpu")


def test_a_foreign_template_in_the_models_folder_and_beside_an_adapter(folder, adapter, capsys):
    from test_chat import FACTORY

    for place, options in ((folder, {}), (adapter, {"adapter": str(adapter)})):
        path = place / "chat_template.jinja"
        path.write_text(FACTORY)
        err = err_of(capsys, folder, **options)
        assert (
            err == f"{path}: taken as vicuna_v1, from which it differs in spaces alone; "
            "template takes another\n"
        )
        assert open_checkpoint(str(folder), **options).processor.template_name == "vicuna_v1"
        path.write_text(FACTORY.replace("USER", "HUMAN"))
        err = err_of(capsys, folder, **options)
        assert err.startswith(f"warning: {path}: ") and "template" in err and err.count("\n") == 1
        assert err_of(capsys, folder, template="plain", **options) == ""
        path.unlink()
    for place in (folder, adapter):  # the base's own, copied: nothing new
        (place / "chat_template.jinja").write_text("USER: ASSISTANT:")
    (folder / "processor_config.json").write_text('{"llava_min_template": "plain"}')
    assert err_of(capsys, folder, adapter=str(adapter)) == ""
    assert open_checkpoint(str(folder), adapter=str(adapter)).processor.template_name == "plain"


def test_templates_by_name(folder):
    from test_chat import QWEN_JINJA

    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": QWEN_JINJA}]
    change(folder / "tokenizer_config.json", chat_template=named)
    assert open_checkpoint(str(folder)).processor.template_name == "chatml"


@pytest.mark.parametrize(
    "value, says",
    [
        (5, "is a number, expected text"),
        ({"default": "x"}, "is an object, expected text"),
        (True, "is true or false, expected text"),
        ([], "is [], expected a list of objects with name and template, one of them default"),
        (["x"], "is ['x'], expected a list of objects"),
        ([{"name": "tool_use", "template": "x"}], "expected a list of objects"),
        ([{"name": "default"}], "expected a list of objects"),
        ([{"name": "default", "template": 5}], "is a number, expected text"),
    ],
)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.json"])
def test_a_template_of_an_odd_type_is_refused(folder, adapter, name, value, says):
    for place, options in ((folder, {}), (adapter, {"adapter": str(adapter)})):
        path = place / name
        before = path.read_text() if path.exists() else "{}"
        path.write_text(json.dumps(json.loads(before) | {"chat_template": value}))
        with pytest.raises(UserError) as told:
            open_checkpoint(str(folder), **options)
        assert str(told.value).startswith(f"{path}: chat_template is ") and says in str(told.value)
        assert "template" in str(told.value).rpartition("; ")[2]
        assert open_checkpoint(str(folder), template="plain", **options)
        path.write_text(before)


@pytest.fixture
def adapter(folder, tmp_path) -> Path:
    from llava_min.adapter import save_adapter
    from llava_min.lora import LoRAConfig
    from llava_min.training.targets import add_lora

    model, _ = llava_min.load(folder)
    add_lora(model, lora := LoRAConfig(4, 8))
    (tmp_path / "adapter").mkdir()
    save_adapter(model, lora, tmp_path / "adapter", str(folder))
    return tmp_path / "adapter"


def with_tokens(folder: Path, target: Path, *more: str, **keys) -> None:
    shutil.copy(folder / "tokenizer.model", target)
    added = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    added |= {
        str(PIECES + 4 + i): {"content": token, "special": True, "normalized": False}
        for i, token in enumerate(more)
    }
    shutil.copy(folder / "tokenizer_config.json", target)
    change(target / "tokenizer_config.json", added_tokens_decoder=added, **keys)


def test_the_tokenizer_beside_an_adapter(folder, adapter, capsys):
    ask = lambda: open_checkpoint(str(folder), adapter=str(adapter)).processor
    with_tokens(folder, adapter)
    assert err_of(capsys, folder, adapter=str(adapter)) == "" and len(ask().tokenizer) == PIECES + 4
    with_tokens(folder, adapter, pad_token="</s>")  # masked: any will do
    assert err_of(capsys, folder, adapter=str(adapter)) == ""
    with_tokens(folder, adapter, "<box>", "<point>")
    assert err_of(capsys, folder, adapter=str(adapter)) == ""
    tokenizer = ask().tokenizer
    assert [tokenizer.token_id(t) for t in ("<box>", "<point>")] == [PIECES + 4, PIECES + 5]
    assert tokenizer.decode(
        [PIECES + 4], skip_special=False
    ) == "<box>" and PIECES + 4 not in tokenizer.encode("<box>")
    model, processor = llava_min.load(folder, adapter=str(adapter))
    assert processor.tokenizer.token_id("<point>") == PIECES + 5
    for keys, more, says in (
        (
            {},
            [f"<{i}>" for i in range(70)],
            "adds '<60>' as token 384, and the model has rows for 384 tokens",
        ),
        ({"eos_token": "<pad>"}, [], f"has eos_id {PAD} where the base's has 2"),
        ({"legacy": True}, [], "says legacy true where the base's says false"),
    ):
        with_tokens(folder, adapter, *more, **keys)
        with pytest.raises(UserError) as told:
            ask()
        assert str(told.value).startswith(
            f"{adapter}: the tokenizer beside the adapter {says}"
        ) and "; " in str(told.value)
    with_tokens(folder, adapter)
    change(
        adapter / "tokenizer_config.json",
        added_tokens_decoder={str(PIECES): {"content": "<img>", "special": True}},
    )
    with pytest.raises(
        UserError, match=f"has '<img>' as token {PIECES} where the base's has '<image>'"
    ):
        ask()


def swapped(model: dict) -> None:
    a, b = list(model["vocab"])[-2:]
    model["vocab"][a], model["vocab"][b] = model["vocab"][b], model["vocab"][a]


def test_words_and_merges_of_another_tokenizer_beside_an_adapter(folder, adapter, capsys):
    transformers = pytest.importorskip(
        "transformers", reason="writes the tokenizer that is read here"
    )
    change(folder / "tokenizer_config.json", add_bos_token=True)
    transformers.LlamaTokenizer.from_pretrained(folder).save_pretrained(
        adapter
    )  # a tokenizer.json: another kind of file
    assert (adapter / "tokenizer.json").exists() and err_of(
        capsys, folder, adapter=str(adapter)
    ) == ""
    good = json.loads((adapter / "tokenizer.json").read_text())
    for says, spoil in (
        ("tokenizes .* differently from the base's", lambda m: m["merges"].pop()),
        ("has '.*' as token .* where the base's has", swapped),
        (
            "1 more words in its vocabulary, the first is 'zzz'",
            lambda m: m["vocab"].update(zzz=350),
        ),
    ):
        spec = json.loads(json.dumps(good))
        spoil(spec["model"])
        (adapter / "tokenizer.json").write_text(json.dumps(spec))
        with pytest.raises(UserError, match=says):
            open_checkpoint(str(folder), adapter=str(adapter))
    (adapter / "tokenizer.json").write_text(json.dumps(good))
    change(
        folder / "tokenizer_config.json", add_bos_token=...
    )  # transformers 5 then drops BOS when it saves
    change(adapter / "tokenizer_config.json", add_bos_token=...)
    (adapter / "tokenizer.json").write_text(json.dumps(good | {"post_processor": None}))
    assert "other rules for BOS or the space" in err_of(capsys, folder, adapter=str(adapter))


def test_no_adapter_is_told_what_to_give(folder, adapter, tmp_path):
    (run := tmp_path / "run").mkdir()
    (run / "config.json").write_text('{"lr": 1}')
    (run / ".lock").touch()
    whole, half = shutil.copytree(run, tmp_path / "whole"), shutil.copytree(run, tmp_path / "half")
    shutil.copytree(adapter, run / "adapter")
    shutil.copytree(folder, whole / "model")
    for place, mend in (
        (run, f"give {run}/adapter"),
        (folder, "it is a whole model: give it as model and no adapter"),
        (whole, f"give {whole}/model, a whole model, as model and no adapter"),
    ):
        with pytest.raises(UserError) as told:
            open_checkpoint(str(folder), adapter=str(place))
        assert (
            str(told.value)
            == f"{place}: holds no adapter_config.json, expected the folder of a PEFT "
            f"adapter; {mend}"
        )
    for place in (half, tmp_path / "nothing"):
        with pytest.raises(UserError, match="adapter_config.json: no such file"):
            open_checkpoint(str(folder), adapter=str(place))
