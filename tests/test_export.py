"""export to hf and original: read back, logits and texts are the source's."""

import json
from pathlib import Path

import pytest
import torch
from conftest import IMAGE, PIECES, pixels, rows, their_model, write_folder
from PIL import Image
from torch import nn

from llava_min import load
from llava_min.adapter import save_adapter
from llava_min.errors import UserError
from llava_min.export import hf, original, proof, stream
from llava_min.export.hf import write_hf
from llava_min.export.jinja import JINJA
from llava_min.export.memory import Memory
from llava_min.export.tensors import open_model
from llava_min.load import open_checkpoint
from llava_min.lora import LoRAConfig
from llava_min.tensors import list_tensors
from llava_min.tools import build, export, quantize
from llava_min.training.targets import add_lora
from llava_min.util.files import new_folder

TALK = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it ?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a red circle"}]},
    {"role": "user", "content": [{"type": "text", "text": "left of two squares ?"}]},
]


@pytest.fixture
def source(tmp_path, spm):
    return write_folder(tmp_path / "source", spm, their_model())


def adapter_of(source, folder, *, dora=False, seed=1):
    model, processor = load(source, dtype="fp32")
    config = LoRAConfig(r=4, alpha=8, dora=dora)
    add_lora(model, config)
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if ".lora_" in name or name.startswith("multi_modal_projector."):
            p.requires_grad_(True)
            p.data += 0.1 * torch.randn(p.shape, generator=g)
    folder.mkdir()
    save_adapter(model, config, folder, str(source))
    processor.save_settings(folder)
    return folder, model


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_hf_in_transformers(tmp_path, spm, kind):
    transformers = pytest.importorskip("transformers", reason="the reader of this layout")
    theirs = their_model(kind)
    source = write_folder(tmp_path / "source", spm, theirs)
    export.main([str(source), str(tmp_path / "out"), "--to", "hf", "--dtype", "fp32"])
    found = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    )
    ids, x = rows(1, 2), pixels(3)
    right = theirs(input_ids=ids, pixel_values=x).logits
    assert torch.equal(found(input_ids=ids, pixel_values=x).logits, right)


@pytest.mark.parametrize("template", ["llava_hf", "chatml", "vicuna_v1", "mistral"])
def test_chat_through_auto_processor(tmp_path, source, template):
    """The jinja text writes what `chat` writes: the same ids where the template takes the
    tokenizer's own rule, else the same text."""
    transformers = pytest.importorskip("transformers", reason="the reader of this layout")
    export.main(
        [str(source), str(tmp_path / "out"), "--to", "hf", "--template", template]
        + ["--image-aspect-ratio", "pad"]
    )
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    _, ours = load(tmp_path / "out")
    assert ours.template_name == template
    image = Image.new("RGB", (40, 28), (200, 30, 60))
    text = theirs.apply_chat_template(TALK, add_generation_prompt=True)
    batch = ours.chat(TALK, images=[image])
    own = theirs(text=text, images=image, return_tensors="pt")
    assert torch.equal(own["pixel_values"], batch["pixel_values"])
    if ours.rule == "hf" and template != "mistral":
        # llava_hf: an answer of ours ends in </s>, theirs in a space
        if template == "chatml":
            ids = theirs.tokenizer(text, add_special_tokens=False).input_ids
            mine = [i for i in batch["input_ids"][0].tolist() if i != IMAGE]
            assert [i for i in ids if i != IMAGE] == mine[ours.tokenizer.add_bos :]
        else:
            first = TALK[:1]
            text = theirs.apply_chat_template(first, add_generation_prompt=True)
            own = theirs(text=text, images=image, return_tensors="pt")["input_ids"]
            assert torch.equal(own, ours.chat(first, images=[image])["input_ids"])


def test_templates_all_have_a_jinja_text():
    from llava_min.data.chat import TEMPLATES

    assert JINJA.keys() == TEMPLATES.keys()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_original_round_trip(tmp_path, spm, kind):
    source = write_folder(tmp_path / "source", spm, their_model(kind))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    for id in (IMAGE + 2, IMAGE + 3):  # what the original has no place for
        del settings["added_tokens_decoder"][str(id)]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    args = [str(source), str(tmp_path / "out"), "--to", "original", "--dtype", "fp32"]
    export.main([*args, "--template", "vicuna_v1"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == IMAGE and config["mm_vision_tower"] == "clip"
    a, b = (
        load(folder, dtype="fp32", template="vicuna_v1")[0] for folder in (source, tmp_path / "out")
    )
    ids, x = rows(1, 2), pixels(3)
    assert torch.equal(a(ids, x)[..., :PIECES], b(ids, x)[..., :PIECES])


def test_original_is_asked_as_the_source(tmp_path):
    export.main(["tiny", str(tmp_path / "out"), "--to", "original"])
    (_, a), (_, b) = load("tiny"), load(tmp_path / "out")
    assert b.template_name == a.template_name == "llava_hf" and b.original == a.original
    text = "USER: <image>\nWhat is written? ASSISTANT:"
    image = Image.new("RGB", (64, 64))
    one, two = (x(text, images=image)["input_ids"] for x in (a, b))
    assert torch.equal(one, two)


def test_original_elsewhere(tmp_path, source, monkeypatch):
    """The tower is found in the folder, wherever that lies and whatever lies about; without it the
    message says where it belongs."""
    settings = json.loads((source / "tokenizer_config.json").read_text())
    for id in (IMAGE + 2, IMAGE + 3):
        del settings["added_tokens_decoder"][str(id)]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    export.main([str(source), str(tmp_path / "out"), "--to", "original", "--template", "vicuna_v1"])
    (tmp_path / "elsewhere").mkdir()
    there = (tmp_path / "out").rename(tmp_path / "elsewhere" / "out")
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text("{}")  # another, where the program is started
    monkeypatch.chdir(tmp_path)
    load(there)
    (there / "clip").rename(tmp_path / "gone")
    (tmp_path / "clip").rename(tmp_path / "gone, too")
    with pytest.raises(
        UserError, match=f"mm_vision_tower: clip.*put the folder .* at {there}/clip"
    ):
        load(there)


def test_adapter_is_merged(tmp_path, source):
    folder, model = adapter_of(source, tmp_path / "adapter")
    args = [str(source), str(tmp_path / "out"), "--to", "hf", "--dtype", "fp32"]
    export.main([*args, "--adapter", str(folder)])
    merged = load(tmp_path / "out", dtype="fp32")[0]
    ids, x = rows(1, 2), pixels(3)
    base = load(source, dtype="fp32")[0]
    assert not torch.allclose(merged(ids, x), base(ids, x), atol=1e-2)
    torch.testing.assert_close(merged(ids, x), model.eval()(ids, x), atol=1e-4, rtol=1e-5)


def test_shards(tmp_path, source, monkeypatch):
    monkeypatch.setattr(stream, "SHARD_BYTES", 20_000)
    export.main([str(source), str(tmp_path / "out"), "--to", "hf", "--dtype", "fp32"])
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    a, b = load(source, dtype="fp32")[0], load(tmp_path / "out", dtype="fp32")[0]
    assert torch.equal(a(rows(1), pixels(1)), b(rows(1), pixels(1)))


def test_messages_name_the_folder_that_was_given(tmp_path, capsys, monkeypatch):
    """The folder that is written aside has another name, which nobody typed."""
    out = tmp_path / "out"
    export.main(["tiny", str(out), "--to", "original"])
    err = capsys.readouterr().err
    assert f"warning: {out}: some ids" in err and ".tmp-" not in err
    monkeypatch.setattr(hf, "PROBES", ())
    monkeypatch.setattr(hf, "open_checkpoint", load_other_template)
    with pytest.raises(UserError) as e:
        export.main(["tiny", str(tmp_path / "other"), "--to", "hf"])
    assert str(e.value).startswith(f"{tmp_path / 'other'}: the tokenizer reads back otherwise")


def load_other_template(folder):
    checkpoint = open_checkpoint(folder)
    checkpoint.processor.template_name = "plain"
    return checkpoint


def test_what_is_there_is_kept(tmp_path, source):
    out = tmp_path / "out"
    args = [str(source), str(out), "--to", "hf"]
    export.main(args)
    with pytest.raises(UserError, match="exists already; give another path or --overwrite"):
        export.main(args)
    before = (out / "config.json").read_text()
    export.main([*args, "--overwrite", "--dtype", "bf16"])
    assert (out / "config.json").read_text() != before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a folder with a model"):
        export.main([str(source), str(other), "--to", "hf", "--overwrite"])
    with pytest.raises(UserError, match="is to be read"):
        export.main([str(source), str(source), "--to", "original", "--overwrite"])
    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to(out)
    file.touch()
    for path, said in (
        (link, "link: a link, not a folder with a model"),
        (file, "file: not a folder"),
    ):
        with pytest.raises(UserError, match=f"{said}.*remove it"):
            export.main([str(source), str(path), "--to", "hf", "--overwrite"])
    assert link.is_symlink() and (out / "config.json").is_file() and file.is_file()


def test_what_is_read_is_not_written_into(tmp_path, source):
    """Neither into a folder that is read nor over one that holds it, by whatever name."""
    outer, link = tmp_path / "outer", tmp_path / "link"
    export.main([str(source), str(outer), "--to", "hf"])
    source = source.rename(outer / "source")
    link.symlink_to(source)
    before = sorted(p for p in tmp_path.rglob("*"))
    for out, said in (
        (source, "is to be read"),
        (source / "sub", f"lies in {source}, which is to be read"),
        (link / "sub" / "sub", f"lies in {source}, which is to be read"),
        (outer, f"holds {source}, which is to be read"),
    ):
        for main, argv in (
            (export.main, [str(source), str(out), "--to", "hf", "--overwrite"]),
            (export.main, ["tiny", str(out), "--to", "hf", "--adapter", f"x,{source}"]),
            (quantize.main, [str(source), str(out)]),
            (build.main, [str(out), "--text", str(source), "--overwrite"]),
            (build.main, [str(out), "--vision", str(source), "--text", "x"]),
        ):
            with pytest.raises(UserError, match=f"^{out}: {said}; give another folder to write$"):
                main(argv)
    assert sorted(p for p in tmp_path.rglob("*")) == before
    export.main([str(link), str(outer / "beside"), "--to", "hf"])  # and that is allowed


def test_only_files_of_a_model_are_overwritten(tmp_path, source):
    out = tmp_path / "out"
    args = [str(source), str(out), "--to", "hf"]
    export.main(args)
    args.append("--overwrite")
    cached, tower = ".cache/huggingface/x.lock", "clip/model.safetensors"
    for name in ("README.md", "pytorch_model.bin", "old.gguf", cached, tower):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()
    for name in ("thesis.doc", "notes.txt", "clip/cat.jpg", "runs.json/", "clip/x/"):
        path = out / name
        path.mkdir() if name.endswith("/") else path.touch()
        said = f"out: holds {name.rstrip('/')}, which is no file of a model"
        with pytest.raises(UserError, match=said):
            export.main(args)
        path.rmdir() if path.is_dir() else path.unlink()
    export.main(args)
    assert (out / "config.json").is_file() and not (out / "clip").exists()


def test_where_no_folder_can_be_put_is_said_before_the_work(tmp_path, source, monkeypatch):
    empty, link, loop = (tmp_path / name for name in ("empty", "link", "loop"))
    empty.mkdir()
    link.symlink_to(empty)
    loop.symlink_to("loop")
    monkeypatch.chdir(empty)
    before = sorted(tmp_path.rglob("*"))
    for out, said in (
        ("", "^FOLDER: is empty; give a value"),
        (".", r"^\.: the folder you are in, .*give a new folder's path$"),
        (str(empty), "/empty: the folder you are in"),
        (str(link), "/link: a link, .*give the folder it leads to$"),
        (str(loop), "/loop: exists already; give another path or --overwrite$"),
    ):
        with pytest.raises(UserError, match=said):
            export.main([str(source), out, "--to", "hf"])
        with pytest.raises(UserError, match=said.replace("FOLDER", "OUT")):
            build.main([out, "--text", str(source)])
    for out in (".", str(link), str(loop)):
        with pytest.raises(UserError, match="a link|the folder you are in"):
            export.main([str(source), out, "--to", "hf", "--overwrite"])
    for out in (".", str(link)):
        with pytest.raises(UserError, match="a link|the folder you are in"):
            quantize.main([str(source), out])
        with pytest.raises(UserError, match="a link|the folder you are in"):
            with new_folder(Path(out)):
                raise AssertionError("the work has begun")
    assert sorted(tmp_path.rglob("*")) == before and link.is_symlink()


def test_a_wrong_tensor_is_found(tmp_path, source):
    """A write that goes wrong leaves no folder, and what was there before stays."""
    model = open_model(str(source))
    right = model.read

    def wrong(name, dtype):
        x = right(name, dtype)
        calls[name] = calls.get(name, 0) + 1
        return x + 1 if name == "lm_head.weight" and calls[name] == 1 else x

    calls = {}
    model.read = wrong
    with pytest.raises(UserError, match="logits differ from the source's"):
        with new_folder(tmp_path / "out") as aside:
            write_hf(model, aside, torch.float32)
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("to", ["hf", "original"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_large_model_is_compared_too(tmp_path, spm, kind, to, monkeypatch):
    """As one that does not fit: block by block, the image's features and the logits of a text. A
    block of the source that reads otherwise the second time is found."""
    monkeypatch.setattr(proof, "SMALL", 0)
    source = write_folder(tmp_path / "source", spm, their_model(kind))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    for id in (IMAGE + 2, IMAGE + 3):
        del settings["added_tokens_decoder"][str(id)]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    for dtype in ("fp32", "bf16"):
        args = [str(source), str(tmp_path / dtype), "--to", to, "--dtype", dtype]
        export.main([*args, "--template", "vicuna_v1"])
    for part in (
        "vision_tower.layers.1.mlp.fc1.weight",
        "language_model.layers.1.mlp.up_proj.weight",
    ):
        model = open_model(str(source), template="vicuna_v1")
        right, calls = model.read, []

        def wrong(name, dtype, part=part, right=right, calls=calls):
            calls += [name] * (name == part)
            x = right(name, dtype)
            return x + 1 if name == part and len(calls) == 1 else x

        model.read = wrong
        page = {"hf": hf, "original": original}[to]
        with pytest.raises(UserError, match="logits differ from the source's"):
            with new_folder(tmp_path / "out") as aside:
                page.export(model, aside, torch.float32, None)


def test_memory_comes_back_when_nothing_holds_it():
    memory, shape = Memory(), (4, 8)
    x = memory.empty(shape, torch.bfloat16)
    assert x.shape == shape and x.dtype == torch.bfloat16
    at, kept = x.data_ptr(), nn.Parameter(x, requires_grad=False)[1:2]
    del x
    other = memory.empty(shape, torch.bfloat16)  # a view of a parameter of it is left
    assert other.data_ptr() != at
    del kept
    assert memory.empty((2, 8), torch.float32).data_ptr() == at
    assert memory.empty((2, 8), torch.bfloat16).data_ptr() != at  # another size


def test_checksum_tells_bytes_apart():
    """One bit anywhere, also in the last bytes that fill no page; two pages that changed places."""
    data = torch.randint(0, 256, (3 * stream.PAGE + 77,), dtype=torch.uint8)
    right = stream.checksum(data)
    assert stream.checksum(data.clone()) == right
    for at in (0, stream.PAGE - 1, 2 * stream.PAGE + 100, 3 * stream.PAGE, len(data) - 1):
        for bit in range(8):
            other = data.clone()
            other[at] ^= 1 << bit
            assert stream.checksum(other) != right, (at, bit)
    pages = data[: 3 * stream.PAGE].view(3, -1)
    assert stream.checksum(torch.cat([pages[[1, 0, 2]].view(-1), data[-77:]])) != right


def test_bytes_are_read_back(tmp_path, source):
    model, path = open_model(str(source)), tmp_path / "x.safetensors"
    rows, sums = [stream.Row(n, n, model.shape(n), torch.float32) for n in model.names], {}
    stream.write_file(path, rows, model.read, sums)
    entries = {e.name: e for e in list_tensors(path)}
    proof.Checked(model.model, entries, sums, torch.float32).rest()
    with open(path, "r+b") as f:
        f.seek(-4, 2)
        f.write(b"\0\0\0\x40")
    with pytest.raises(UserError, match="reads back otherwise"):
        proof.Checked(model.model, entries, sums, torch.float32).rest()


def test_a_layout_without_a_place_is_refused(tmp_path, source):
    with pytest.raises(UserError, match="<|im_start|>.* behind <image>"):
        export.main([str(source), str(tmp_path / "out"), "--to", "original"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        (["tiny"], "give two"),
        (["tiny", "out"], "--to: is not given"),
        (["tiny", "out", "--to", "hf", "--type", "f16"], "--type: is of --to gguf"),
        (["tiny", "out", "--to", "gguf", "--dtype", "bf16"], "--dtype: is not of --to gguf"),
    ],
)
def test_arguments(args, message):
    with pytest.raises(UserError, match=message):
        export.main(args)
