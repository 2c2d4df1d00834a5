"""tensors.py, weights.py and files.py: every published layout gives one model, what is saved is
what was loaded, and a malformed folder gives one line.
"""

import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    KINDS,
    PIECES,
    VOCAB,
    hf_config,
    our_model,
    pixels,
    rows,
    their_model,
    write_folder,
)
from safetensors.torch import load_file, save_file

import llava_min
from llava_min import names, weights
from llava_min.checks.weights import check_entries
from llava_min.config import LINEARS, LlavaConfig
from llava_min.errors import UserError
from llava_min.export import stream
from llava_min.export.stream import save_weights
from llava_min.fast.cpu_linear import unpacked
from llava_min.llava import Llava
from llava_min.load import collect_entries, on_meta, read_config, save, stored_rows
from llava_min.names import to_layout, to_ours
from llava_min.quant.methods import quantize_layers, quantized
from llava_min.tensors import read_entries
from llava_min.util.files import new_folder, replace, write_json
from llava_min.weights import load_weights


@pytest.fixture(scope="module")
def theirs():
    return their_model()


@pytest.fixture(scope="module")
def base(theirs, spm, tmp_path_factory) -> Path:
    """A sound llava-hf folder; tests change copies of it."""
    return write_folder(tmp_path_factory.mktemp("base") / "base", spm, theirs, hf_saved)


@pytest.fixture
def folder(base, tmp_path) -> Path:
    return shutil.copytree(base, tmp_path / "m")


def bare(folder: Path, dtype: torch.dtype = torch.float32) -> Llava:
    """The model of a folder without its processor."""
    config, clip = read_config(folder)
    entries = collect_entries(folder, config, clip)
    model = on_meta(config)
    check_entries(entries, model, stored_rows(config))
    load_weights(model, entries, dtype, torch.device("cpu"))
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    out = model(input_ids=rows(1, 0, 2), pixel_values=pixels(3))
    return getattr(out, "logits", out)


# ---- the four layouts


def replaced(*pairs: tuple[str, str]):
    return lambda name: next(
        (new + name[len(old) :] for old, new in pairs if name.startswith(old)), name
    )


memory = replaced()  # as transformers >= 5 has it in memory
# 4.52 and later, B
hf_memory = replaced(("model.vision_tower.", "model.vision_tower.vision_model."))
hf_saved = replaced(
    ("model.vision_tower.", "vision_tower."),
    ("model.language_model.", "language_model.model."),  # transformers 5, C
    ("lm_head.", "language_model.lm_head."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
# after hf_saved: as published, A
llava_hf = replaced(("vision_tower.", "vision_tower.vision_model."))
original = replaced(
    ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    ("model.language_model.", "model."),
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
)
LAYOUTS = {
    "A": lambda n: llava_hf(hf_saved(n)),
    "B": hf_memory,
    "C": hf_saved,
    "C in memory": memory,
}


def test_transformers_of_today_saves_layout_c(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    assert {hf_saved(n) for n, _ in theirs.named_parameters()} == load_file(
        tmp_path / "model.safetensors"
    ).keys()


def shard(folder: Path, parts: int, end: str = "safetensors") -> None:
    """Put the tensors of model.safetensors into shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, write = ("model", save_file) if end == "safetensors" else ("pytorch_model", torch.save)
    files = {
        f"{stem}-{i + 1:05}-of-{parts:05}.{end}": sorted(tensors)[i::parts] for i in range(parts)
    }
    for file, inside in files.items():
        write({n: tensors[n] for n in inside}, folder / file)
    places = {n: file for file, inside in files.items() for n in inside}
    (folder / f"{stem}.{end}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )


@pytest.mark.parametrize("store", ["single", "shards", "bin", "bin shards"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_llava_hf_layout(theirs, spm, tmp_path, layout, store):
    folder = write_folder(tmp_path / "m", spm, theirs, LAYOUTS[layout])
    if "shards" in store:
        shard(folder, 3, "bin" if "bin" in store else "safetensors")
    elif store == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    ours, expected = bare(folder).state_dict(), our_model(theirs).state_dict()
    assert ours.keys() == expected.keys() and all(
        torch.equal(ours[n], x) for n, x in expected.items()
    )


def test_safetensors_are_read_where_there_are_both(theirs, spm, tmp_path):
    folder = write_folder(tmp_path / "m", spm, theirs)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    bare(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_every_decoder_loads(kind, spm, tmp_path):
    theirs = their_model(kind)
    ours, _ = llava_min.load(write_folder(tmp_path / "m", spm, theirs, hf_saved), device="cpu")
    assert (logits(ours) - logits(theirs)).abs().max() <= 1e-4
    assert ours.dtype == torch.float32  # small, so auto is fp32
    assert not any(p.requires_grad for p in ours.parameters()) and not ours.training


def write_original(folder: Path, spm: bytes, theirs, tower: str) -> Path:
    """The original's folder: its config, PIECES rows of vocabulary, the tower inside, or beside it
    as `tower`.
    """
    folder.mkdir()
    text = {k: v for k, v in hf_config()["text_config"].items() if k != "pad_token_id"}
    (folder / "config.json").write_text(
        json.dumps(
            {
                **text,
                "model_type": "llava_llama",
                "vocab_size": PIECES,
                "mm_projector_type": "mlp2x_gelu",
                "mm_vision_select_layer": -2,
                "mm_vision_select_feature": "patch",
                "mm_vision_tower": "clip",
                "mm_use_im_start_end": False,
                "image_aspect_ratio": "pad",
            }
        )
    )
    (folder / "tokenizer.model").write_bytes(spm)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "legacy": False,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "pad_token": "<unk>",
            }
        )
    )
    clip, tensors = folder.parent / "clip", {}
    clip.mkdir()
    for n, p in theirs.named_parameters():
        tensors[original(n)] = p[:PIECES].clone() if p.shape[0] == VOCAB else p.clone()
    inside = "model.vision_tower.vision_tower.vision_model."
    of_clip = {
        n.removeprefix("model.vision_tower.vision_tower."): tensors.pop(n)
        for n in list(tensors)
        if n.startswith(inside)
    }
    vision = hf_config()["vision_config"]
    if tower == "inside":
        tensors |= {"model.vision_tower.vision_tower." + n: x for n, x in of_clip.items()}
        tensors |= {
            "model.image_newline": torch.zeros(32),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        }
        (clip / "config.json").write_text(json.dumps(vision))
    else:  # OpenAI's folder holds the text half too
        of_clip |= {
            "text_model.final_layer_norm.weight": torch.ones(8),
            "visual_projection.weight": torch.ones(16, 32),
            "text_projection.weight": torch.ones(16, 8),
            "logit_scale": torch.tensor(2.0),
            "vision_model.embeddings.position_ids": torch.arange(5),
        }
        (clip / "config.json").write_text(
            json.dumps({"model_type": "clip", "vision_config": vision, "text_config": {}})
        )
        write, name = {
            "safetensors": (save_file, "model.safetensors"),
            "bin": (torch.save, "pytorch_model.bin"),
        }[tower]
        write(of_clip, clip / name)
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("tower", ["inside", "bin", "safetensors"])
def test_the_original_layout(theirs, spm, tmp_path, tower):
    folder = write_original(tmp_path / "llava", spm, theirs, tower)
    ours, processor = llava_min.load(folder, device="cpu")
    assert (logits(ours) - logits(theirs))[..., :PIECES].abs().max() <= 1e-4
    # rows for <image>, <pad> …
    for table in (ours.language_model.embed_tokens.weight, ours.lm_head.weight):
        assert (
            table.shape[0] == VOCAB
            and (table[PIECES:] - table[:PIECES].mean(0)).abs().max() <= 1e-6
        )
    assert (processor.template_name, processor.image_config.aspect, processor.image_token_id) == (
        "vicuna_v1",
        "pad",
        PIECES,
    )
    save(ours, processor, tmp_path / "saved")  # written as llava-hf, every reader's layout
    again, _ = llava_min.load(tmp_path / "saved", device="cpu")
    assert torch.equal(logits(again), logits(ours))
    hf = type(theirs).from_pretrained(tmp_path / "saved")
    assert (logits(hf) - logits(ours)).abs().max() <= 1e-4


def test_an_original_vocabulary_of_another_size(theirs, spm, tmp_path):
    folder = write_original(tmp_path / "llava", spm, theirs, "bin")
    tensors = torch.load(folder / "pytorch_model.bin")
    torch.save(
        {n: x[:300] if x.shape[0] == PIECES else x for n, x in tensors.items()},
        folder / "pytorch_model.bin",
    )
    with pytest.raises(
        UserError, match=r"shape \[300, 32\] of model.embed_tokens.weight, expected \[320, 32\]"
    ):
        llava_min.load(folder, device="cpu")


def test_clip_leftovers_are_no_part_of_a_llava(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"logit_scale": torch.tensor(1.0)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="logit_scale"):
        bare(folder)


# ---- saved is loaded


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_saved_is_loaded(kind, dtype, spm, tmp_path):
    theirs = their_model(kind)
    first, processor = llava_min.load(
        write_folder(tmp_path / "m", spm, theirs, hf_saved), device="cpu", dtype=dtype
    )
    save(first, processor, tmp_path / "saved")
    second, _ = llava_min.load(tmp_path / "saved", device="cpu", dtype=dtype)
    assert (
        second.dtype == weights.DTYPES[dtype]
        and first.state_dict().keys() == second.state_dict().keys()
    )
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values()):
        assert torch.equal(unpacked(a), unpacked(b)) and a.dtype == b.dtype, name
    # none is lost, the tower's last block and norm among them
    source = {llava_hf(n): x for n, x in load_file(tmp_path / "m" / "model.safetensors").items()}
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == source.keys()
    assert all(torch.equal(saved[n], x.to(saved[n].dtype)) for n, x in source.items())
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == weights.NAMES[second.dtype]
    save(second, processor, tmp_path / "again")  # and byte for byte from then on
    for name in sorted(os.listdir(tmp_path / "saved")):
        assert (tmp_path / "saved" / name).read_bytes() == (
            tmp_path / "again" / name
        ).read_bytes(), name


@pytest.mark.parametrize("shards", [False, True])
def test_transformers_loads_what_we_save(kind_pair, shards, tmp_path, monkeypatch):
    theirs, ours, processor = kind_pair
    if shards:
        monkeypatch.setattr(stream, "SHARD_BYTES", 80_000)
    save(ours, processor, tmp_path / "saved")
    files = sorted(p.name for p in (tmp_path / "saved").glob("model*"))
    if shards:
        assert len(files) > 3 and files[-1] == "model.safetensors.index.json"
        assert max(os.path.getsize(tmp_path / "saved" / f) for f in files) < 90_000
        index = json.loads((tmp_path / "saved" / files[-1]).read_text())
        total = sum(
            t.nbytes for f in files[:-1] for t in load_file(tmp_path / "saved" / f).values()
        )
        assert index["metadata"]["total_size"] == total
        assert set(index["weight_map"].values()) == set(files[:-1])
    model, info = type(theirs).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert (logits(model) - logits(theirs)).abs().max() <= 1e-4
    assert torch.equal(logits(llava_min.load(tmp_path / "saved", device="cpu")[0]), logits(ours))


@pytest.fixture(scope="module", params=KINDS)
def kind_pair(request, spm, tmp_path_factory):
    theirs = their_model(request.param)
    return theirs, *llava_min.load(
        write_folder(tmp_path_factory.mktemp("k") / "m", spm, theirs, hf_saved), device="cpu"
    )


@pytest.mark.parametrize("source", ["tokenizer.model", "tokenizer.json"])
def test_transformers_processor_loads_what_we_save(theirs, folder, source, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the oracle of this test")
    from PIL import Image

    if source == "tokenizer.json":
        transformers.LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)
        (folder / "tokenizer.model").unlink()
    ours, processor = llava_min.load(folder, device="cpu")
    save(ours, processor, tmp_path / "saved")
    hf = transformers.AutoProcessor.from_pretrained(tmp_path / "saved", backend="pil")
    prompt = "USER: <image>\nwhat is in the picture? ASSISTANT:"
    picture = Image.linear_gradient("L").resize((50, 30)).convert("RGB")
    a, b = processor(prompt, images=picture), hf(text=prompt, images=picture, return_tensors="pt")
    assert a["input_ids"].tolist() == b["input_ids"].tolist()
    assert torch.equal(a["pixel_values"], b["pixel_values"])
    assert (theirs(**b).logits - ours(**a)).abs().max() <= 1e-4


def test_files_follow_the_umask(kind_pair, tmp_path):
    old = os.umask(0o027)
    try:
        save(*kind_pair[1:], tmp_path / "saved")
    finally:
        os.umask(old)
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "saved").iterdir()} == {0o640}


def test_an_existing_target_is_never_overwritten(kind_pair, tmp_path):
    (tmp_path / "empty").mkdir()
    save(*kind_pair[1:], tmp_path / "empty")  # the control: an empty folder is free
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "file", "link"):
        with pytest.raises(UserError, match=f"{name}: exists already"):
            save(*kind_pair[1:], tmp_path / name)
    with pytest.raises(UserError, match="cannot be written"):
        save(*kind_pair[1:], tmp_path / "file" / "under")
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "link"]


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), new_folder(tmp_path / "a" / "b") as aside:
            (aside / "x").write_text("half")
            assert not (tmp_path / "a" / "b").exists()
            raise error
        assert list((tmp_path / "a").iterdir()) == []
    with new_folder(tmp_path / "a" / "b") as aside:
        (aside / "x").write_text("whole")
    assert [p.name for p in (tmp_path / "a").rglob("*")] == ["b", "x"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminated_write_leaves_nothing(tmp_path, number):
    page = tmp_path / "page.py"
    page.write_text(
        "import os, signal, sys, time\nfrom pathlib import Path\n"
        "from llava_min.util.files import new_folder\n"
        f"signal.signal({int(number)}, signal.SIG_DFL)\n"  # nohup ignores SIGHUP
        "with new_folder(Path(sys.argv[1]), overwrite=True) as aside:\n"
        "    (aside / 'x').write_text('half')\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    time.sleep(60)\n"
    )
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert subprocess.run([sys.executable, page, out], timeout=60).returncode == 128 + number
    assert sorted(tmp_path.rglob("*")) == [out, out / "config.json", page]


def test_signals_that_another_catches_stay_his(tmp_path):
    got = []
    before = signal.signal(signal.SIGTERM, lambda *_: got.append(1))
    try:
        with new_folder(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == [1] and (tmp_path / "out").is_dir()


@pytest.fixture
def events(monkeypatch):
    """What is synced and renamed, in its order."""
    told, sync, rename, swap = [], os.fsync, os.rename, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: told.append(os.readlink(f"/proc/self/fd/{fd}")) or sync(fd)
    )
    monkeypatch.setattr(os, "rename", lambda a, b: told.append("renamed") or rename(a, b))
    monkeypatch.setattr(os, "replace", lambda a, b: told.append("renamed") or swap(a, b))
    return told


@pytest.mark.parametrize("durable", [True, False])
def test_a_folder_is_on_disk_before_it_has_its_name_and_after(tmp_path, events, durable):
    with new_folder(tmp_path / "new" / "parent" / "b", durable) as aside:
        (aside / "sub").mkdir()
        (aside / "sub" / "x").write_text("whole")
    cut = events.index("renamed")
    assert set(events[:cut]) == (
        {str(p) for p in (aside, aside / "sub", aside / "sub" / "x")} if durable else set()
    )
    assert events[cut + 1 :] == [str(aside.parent)]


def test_a_file_is_replaced_by_a_whole_one_or_stays(tmp_path, events):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        replace(path, "half\ud800")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path] and events == []
    replace(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UnicodeEncodeError):
        write_json(path, "half\ud800")
    assert path.read_text() == "new"
    assert events == [str(tmp_path / ".tmp-x.json"), "renamed"]


@pytest.mark.parametrize("room", [0, 500, 20_000])
def test_a_full_disk_is_one_line_and_leaves_nothing(kind_pair, room, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(
            UserError, match="cannot be written .*(File too large|os error 27).*; free space"
        ):
            save(*kind_pair[1:], tmp_path / "saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_read_in_pieces(folder, monkeypatch):
    whole = bare(folder)
    monkeypatch.setattr(weights, "PIECE", 40)  # 1 row of 32 or 48 at a time
    monkeypatch.setattr(weights, "REOPEN", 1000)
    pieces = bare(folder)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), pieces.parameters()))


def test_a_file_cut_short_after_it_was_looked_at(folder):
    config, _ = read_config(folder)
    entries, model = collect_entries(folder, config, None), on_meta(config)
    os.truncate(single(folder), single(folder).stat().st_size - 1)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(
            UserError, match="model.safetensors: .* ends early; download the file again"
        ):
            load_weights(model, entries, dtype, torch.device("cpu"))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_becomes_every_other(stored, fast, folder, base, monkeypatch):
    if not fast:
        monkeypatch.setattr("llava_min.fast.reader.handles", lambda info: False)
        monkeypatch.setattr(weights, "PIECE", 999)
    tensors(lambda table: table.update({name: x.to(stored) for name, x in table.items()}))(folder)
    table = {to_ours(name): x for name, x in load_file(single(folder)).items()}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = bare(folder, dtype)
        assert all(torch.equal(p, table[name].to(dtype)) for name, p in model.named_parameters())


@pytest.mark.parametrize("layout", names.LAYOUTS)
def test_every_layout_is_written_and_read_back(layout, folder, tmp_path):
    state = dict(bare(folder).named_parameters())
    (tmp_path / "out").mkdir()
    if any(to_layout(name, layout) is None for name in state):
        with pytest.raises(UserError, match=f"layout: {layout} has no place for vision_tower"):
            save_weights(state, tmp_path / "out", layout=layout)
        assert not any((tmp_path / "out").iterdir())
        return
    save_weights(state, tmp_path / "out", layout=layout)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == {to_layout(name, layout) for name in state}
    entries = read_entries(tmp_path / "out")
    assert entries.keys() == state.keys()
    assert all(torch.equal(written[entries[name].name], p) for name, p in state.items())


@pytest.mark.parametrize("method", ["int8", "nf4", "w8a8"])
def test_a_quantized_layer_gets_its_weight_as_it_arrives(method, spm, tmp_path):
    """The same as quantizing the loaded model, biases included; no 16-bit copy is left."""
    folder = write_folder(tmp_path / "m", spm, their_model("qwen2"), hf_saved)
    config, _ = read_config(folder)
    model, expected = on_meta(config), bare(folder, torch.bfloat16)
    stored = load_file(single(folder))
    paths = [path for path, _ in model.language_model.named_modules() if path.endswith("_proj")]
    paths = [f"language_model.{path}" for path in paths]
    quantize_layers(model, paths, method)
    load_weights(model, collect_entries(folder, config, None), torch.bfloat16, torch.device("cpu"))
    assert {path.rpartition(".")[2] for path in paths} == set(LINEARS)
    for path in paths:
        layer, plain = model.get_submodule(path), expected.get_submodule(path)
        plain.weight = torch.nn.Parameter(stored[to_layout(f"{path}.weight", "hf")])
        again = quantized(plain, method)  # from the stored dtype, not from bf16
        assert layer.state_dict().keys() == again.state_dict().keys()
        for name, x in again.state_dict().items():
            assert torch.equal(layer.state_dict()[name], x), (path, name)
    for name, p in model.named_parameters():
        assert not p.is_meta and (not p.is_floating_point() or p.isfinite().all()), name
        if name in dict(expected.named_parameters()):
            assert torch.equal(p, expected.get_parameter(name)), name


# ---- peak memory

MEASURE = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
def memory(key):
    return 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(key)))
for folder, dtype in zip(sys.argv[1::2], sys.argv[2::2]):
    if os.fork():
        assert os.wait()[1] == 0
        continue
    before = memory("VmRSS")
    from llava_min.load import collect_entries, on_meta, read_config
    from llava_min.checks.weights import check_entries
    from llava_min.weights import DTYPES, load_weights
    config, _ = read_config(Path(folder))
    entries, model = collect_entries(Path(folder), config, None), on_meta(config)
    check_entries(entries, model)
    load_weights(model, entries, DTYPES[dtype], torch.device("cpu"))
    asked = sum(p.nbytes for p in model.parameters())
    assert asked >= 1 << 30 and memory("VmRSS") - before > 0.95 * asked
    assert all(p.flatten()[-1] == torch.tensor(0.01, dtype=p.dtype) for p in model.parameters())
    assert "sympy" not in sys.modules  # random numbers on meta import it: 70 MB
    print(folder, dtype, (memory("VmHWM") - before) / asked, flush=True)
    os._exit(0)
"""


def write_big(folder: Path, dtype: torch.dtype) -> Path:
    """A checkpoint of 587 M parameters in one file. Some tensors are big, a tenth of all: the
    harder case.
    """
    config = hf_config(
        text_config={
            "model_type": "llama",
            "vocab_size": 16384,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 2,
            "num_attention_heads": 32,
        }
    )
    header, at, kind = {}, 0, {2: "F16", 4: "F32"}[dtype.itemsize]
    for name, p in on_meta(LlavaConfig.from_hf(config)).named_parameters():
        end = at + p.numel() * dtype.itemsize
        info = {"dtype": kind, "shape": list(p.shape), "data_offsets": [at, end]}
        header[to_layout(name, "hf")] = info
        at = end
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    text, block = (
        json.dumps(header).encode(),
        torch.full((1 << 22,), 0.01, dtype=dtype).numpy().tobytes(),
    )
    with open(folder / "model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, at, len(block)):
            f.write(block[: at - start])
    return folder


def test_peak_memory_is_the_model(tmp_path):
    """At 1 GB, as stored and converted: at most 1.10 × the bytes in the dtype asked, above torch's
    own.
    """
    free = [
        int(line.split()[1]) >> 20
        for line in open("/proc/meminfo")
        if line.startswith("MemAvailable")
    ]
    if free[0] < 6 or shutil.disk_usage(tmp_path).free >> 30 < 6:
        pytest.skip("needs 6 GB of free memory and disk")
    half, full = (
        write_big(tmp_path / "fp16", torch.float16),
        write_big(tmp_path / "fp32", torch.float32),
    )
    cases = [half, "fp16", half, "bf16", full, "bf16"]
    run = subprocess.run([sys.executable, "-c", MEASURE, *cases], capture_output=True, text=True)
    shutil.rmtree(half), shutil.rmtree(full)
    assert run.returncode == 0, run.stderr
    peaks = [float(line.split()[-1]) for line in run.stdout.splitlines()]
    assert len(peaks) == 3 and max(peaks) <= 1.10, run.stdout


# ---- malformed folders

NORM, EMBED = "language_model.model.norm.weight", "language_model.model.embed_tokens.weight"
DOWN, HEAD = "language_model.model.layers.1.mlp.down_proj.weight", "language_model.lm_head.weight"
INPUT = "language_model.model.layers.0.input_layernorm.weight"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
EVIL = "\x1b]0;owned\x07\x1b[2J\u202e\r\n"
LOADS = object()  # in the place of what the message says: the folder is sound


def loading(folder: Path, **options) -> str | Llava:
    """The model, or the one line of the refusal; anything else fails, a hang too."""

    def hang(*_):
        raise AssertionError("loading hangs")

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(60)
    try:
        return llava_min.load(folder, **{"device": "cpu", "dtype": "fp32"} | options)[0]
    except UserError as e:
        assert str(e).isprintable() and len(str(e)) <= 2000, str(e)
        return str(e)
    finally:
        signal.alarm(0)


def check_case(folder: Path, base: Path, says, **options) -> None:
    outcome = loading(folder, **options)
    if says is LOADS:
        assert isinstance(outcome, Llava), outcome
        expected = loading(base)
        assert all(torch.equal(a, b) for a, b in zip(outcome.parameters(), expected.parameters()))
    else:
        assert isinstance(outcome, str), "loaded"
        assert says in outcome and "; " in outcome, outcome


def single(folder: Path) -> Path:
    return folder / "model.safetensors"


def raw(change):
    """A case that changes the bytes of the file."""
    return lambda folder: single(folder).write_bytes(change(single(folder).read_bytes()))


def header(change):
    """A case that changes the header before unchanged data; bytes are written as they are."""

    def case(folder):
        data = single(folder).read_bytes()
        n = int.from_bytes(data[:8], "little")
        table = json.loads(data[8 : 8 + n])
        text = change(table)
        text = text if isinstance(text, bytes) else json.dumps(table).encode()
        single(folder).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n :])

    return case


def info(name: str, key: str, value):
    return header(lambda table: table[name].__setitem__(key, value))


def tensors(change):
    """A case that writes a well-formed file of other tensors."""

    def case(folder):
        table = load_file(single(folder))
        table = change(table) or table
        save_file(
            {n: x.clone(memory_format=torch.contiguous_format) for n, x in table.items()},
            single(folder),
        )

    return case


def put(name: str, change):
    return tensors(lambda table: table.__setitem__(name, change(table[name])))


def renamed(new: str, old: str = NORM):
    return tensors(lambda table: table.__setitem__(new, table.pop(old)))


def index(change, end: str = "safetensors"):
    """A case that puts the folder in three shards and changes the index."""

    def case(folder):
        shard(folder, 3, end)
        path = next(folder.glob("*.index.json"))
        text = change(data := json.loads(path.read_text()))
        path.write_bytes(text if isinstance(text, bytes) else json.dumps(data).encode())

    return case


def shards(change):
    def case(folder):
        shard(folder, 3)
        change(folder, *sorted(folder.glob("*.safetensors")))

    return case


def binary(write):
    """A case that puts a .bin file in the place of the safetensors."""

    def case(folder):
        table = load_file(single(folder))
        single(folder).unlink()
        write(table, folder / "pytorch_model.bin")

    return case


def small(name: str, change):
    """A case that changes a small file: its bytes, or an object's keys."""

    def case(folder):
        path = folder / name
        if isinstance(change, dict):
            path.write_text(
                json.dumps((json.loads(path.read_text()) if path.exists() else {}) | change)
            )
        elif change is None:
            path.unlink()
        else:
            path.write_bytes(change)

    return case


def text_config(**keys):
    return small("config.json", {"text_config": hf_config()["text_config"] | keys})


class Canary:
    def __reduce__(self):
        return os.mkdir, ("canary",)


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def language_model(table):
    return {
        n.removeprefix("language_model."): x
        for n, x in table.items()
        if n.startswith("language_model.")
    }


def shard_without_its_first(folder, a, *_):
    table = load_file(a)
    table.pop(min(table))
    save_file(table, a)


def half_zip(table, path):
    torch.save(table, path)
    path.write_bytes(path.read_bytes()[:-2000])


def bad_index(value) -> tuple:
    return index(
        lambda d: d["weight_map"].__setitem__(NORM, value)
    ), "is not the name of a file beside it"


CASES = {
    # the file as bytes
    **{
        f"cut at {n}": (raw(lambda b, n=n: b[:n]), "model.safetensors: ")
        for n in (0, 1, 7, 8, 9, 500, 5000, -1, -128, -4096)
    },
    **{
        f"followed by {n} bytes": (raw(lambda b, n=n: b + b"\0" * n), "damaged")
        for n in (1, 8, 4096)
    },
    **{
        f"header length {n}": (raw(lambda b, n=n: struct.pack("<Q", n % 2**64) + b[8:]), "damaged")
        for n in (0, 1, 2, 10**8 + 1, 2**31, 2**63, -1)
    },
    **{
        f"header length off by {n}": (raw(lambda b, n=n: bytes([b[0] + n]) + b[1:]), "damaged")
        for n in (-1, 1, 9)
    },
    **{
        f"file of {x[:8]!r}": (raw(lambda b, x=x: x), says)
        for x, says in (
            (LFS.encode(), "git lfs pull"),
            (b"<html>404</html>", "damaged"),
            (b"\0" * 4096, "damaged"),
            (b"PK\3\4" + b"\0" * 100, "damaged"),
            (b"\x80\4\x95" + b"\0" * 100, "damaged"),
            (b"GGUF\3\0\0\0" + b"\0" * 99, "damaged"),
            (b"\xff" * 99, "damaged"),
        )
    },
    # the header
    **{
        f"header {x[:9]!r}": (header(lambda t, x=x: x), "damaged")
        for x in (
            b"",
            b"{",
            b"[]",
            b"null",
            b"5",
            b'"x"',
            b"{}}",
            b"\xff\xfe",
            b'{"a": 1}',
            b"[" * 10**5,
            b'{"a":' * 10**5,
            b'{"__metadata__": 5}',
            b'{"__metadata__": {"a": 1}}',
            b'{"a": {"dtype": "F32"}}',
            b"{" + b" " * 99,
        )
    },
    **{
        f"dtype {x!r}": (info(NORM, "dtype", x), "")
        for x in ("F99", "", None, 5, "f32", "F64", "F16", "I8", "I64", ["F32"])
    },
    **{
        f"dtype {x!r} in place": (info(NORM, "dtype", x), f"holds {x}, expected floating point")
        for x in ("I32", "U32")
    },
    **{
        f"shape {x!r}": (info(NORM, "shape", x), "")
        for x in (
            None,
            [],
            [31],
            [33],
            [0],
            [-32],
            ["32"],
            [32.5],
            [2**63],
            [2**64 + 32],
            "32",
            {},
            32,
            [2**62, 4],
            [2**32, 2**32],
        )
    },
    **{
        f"shape {x!r} in place": (info(NORM, "shape", x), f"shape {x} of {NORM}, expected [32]")
        for x in ([32, 1], [1, 32], [4, 8], [2, 4, 4])
    },
    **{
        f"offsets {x!r}": (info(NORM, "data_offsets", x), "damaged")
        for x in (
            None,
            [],
            [0],
            [0, 64, 128],
            [128, 0],
            [-128, 0],
            ["0", "128"],
            [0.5, 128],
            [0, 2**62],
            [2**63, 2**63 + 128],
            "0",
            {},
            [0, 128],
        )
    },
    **{
        f"no {key}": (header(lambda t, key=key: t[NORM].pop(key) and None), "damaged")
        for key in ("dtype", "shape", "data_offsets")
    },
    "two tensors on one range": (header(lambda t: t[NORM].update(t[INPUT])), "damaged"),
    "a hole": (header(lambda t: t.pop(NORM) and None), "damaged"),
    # names
    **{
        f"name {x[:9]!r}": (renamed(x), "unknown 1 tensor(s)")
        for x in (
            "language_model.model.norm2.weight",
            "language_model.model.norm.bias",
            "model.norm.weight.weight",
            f"model.{EVIL}",
            "model." + "x" * 10**5,
            "model.\u202enorm",
            "model.layers.99.mlp.up_proj.weight",
            "lm_head.bias",
            "multi_modal_projector.linear_3.weight",
            "vision_tower.norm",
        )
    },
    **{
        f"place of {x[:9]!r}": (renamed(x), "have no place in a LLaVA-1.5")
        for x in (
            "x",
            "norm.weight",
            EVIL,
            "../../etc/passwd",
            "Model.norm.weight",
            "transformer.h.0",
            "language_model",
            "x" * 10**5,
        )
    },
    "name empty": (renamed(""), "no place"),
    "long name twice": (
        tensors(
            lambda t: t.update(
                {p + "x" * 10**5: t[NORM].clone() for p in ("model.", "language_model.model.")}
            )
        ),
        "is the same tensor as",
    ),
    **{
        f"named twice as {x}": (
            tensors(lambda t, x=x: t.__setitem__(x, t[NORM].clone())),
            "is the same tensor as",
        )
        for x in ("model.norm.weight", "model.language_model.norm.weight")
    },
    **{
        f"without {n}": (tensors(lambda t, n=n: t.pop(n) is None), "missing 1 tensor(s)")
        for n in (
            NORM,
            EMBED,
            HEAD,
            DOWN,
            "multi_modal_projector.linear_2.bias",
            "vision_tower.post_layernorm.weight",
            "vision_tower.embeddings.class_embedding",
            "vision_tower.encoder.layers.2.self_attn.k_proj.bias",
        )
    },
    "without the tower": (
        tensors(lambda t: {n: x for n, x in t.items() if "vision" not in n}),
        "missing 55 tensor(s)",
    ),
    "without any tensor": (raw(lambda b: struct.pack("<Q", 2) + b"{}"), "missing 80 tensor(s)"),
    "a language model alone": (tensors(language_model), "missing 59 tensor(s)"),
    "one tensor more": (
        tensors(lambda t: t.__setitem__(DOWN.replace("1", "2"), t[DOWN].clone())),
        "unknown 1 tensor(s)",
    ),
    "a bomb of names": (
        header(lambda t: t.update({f"model.{i}": EMPTY for i in range(10**5)})),
        "",
    ),
    "tables that code recomputes": (
        tensors(
            lambda t: t.update(
                {
                    "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
                    "vision_tower.embeddings.position_ids": torch.arange(5),
                }
            )
        ),
        LOADS,
    ),
    # shapes
    **{
        f"{what} {n}": (put(n, f), f"of {n}, expected")
        for what, n, f in (
            ("transposed", DOWN, lambda x: x.T),
            ("one row", NORM, lambda x: x[:1]),
            ("a number for", NORM, lambda x: x[0].clone()),
            ("one dimension more in", DOWN, lambda x: x[None]),
            ("a row less in", EMBED, lambda x: x[:-1]),
            ("a row more in", HEAD, lambda x: torch.cat([x, x[:1]])),
            ("no row in", EMBED, lambda x: x[:0]),
            ("flat", "vision_tower.embeddings.patch_embedding.weight", lambda x: x.flatten(1)),
            (
                "a patch less in",
                "vision_tower.embeddings.position_embedding.weight",
                lambda x: x[:-1],
            ),
            ("broadcast", DOWN, lambda x: x[:1]),
        )
    },
    # dtypes and values
    **{
        f"{dtype} for float": (put(NORM, lambda x, d=dtype: x.to(d)), "expected floating point")
        for dtype in (
            torch.int8,
            torch.uint8,
            torch.int16,
            torch.int32,
            torch.int64,
            torch.bool,
            torch.float8_e4m3fn,
            torch.float8_e5m2,
        )
    },
    "fp64": (tensors(lambda t: {n: x.double() for n, x in t.items()}), LOADS),
    "fp64 and fp32": (put(NORM, torch.Tensor.double), LOADS),
    **{
        f"{x} in {n}": (
            put(n, lambda t, x=x: t.index_fill(0, torch.tensor([1]), x)),
            f"{n} holds NaN, infinity or numbers too large",
        )
        for n in (NORM, DOWN)
        for x in (float("nan"), float("inf"), -float("inf"))
    },
    "1e300 in fp64": (put(NORM, lambda t: t.double().fill_(1e300)), "too large for float32"),
    # the index and its shards
    "shards": (shard_ok := shards(lambda *_: None), LOADS),
    "a symlink as a shard": (
        shards(lambda folder, a, *_: a.rename(folder / "blob") and a.symlink_to("blob")),
        LOADS,
    ),
    "an index beside one file": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{"),
        LOADS,
    ),
    **{
        f"shard {x!r}": bad_index(x)
        for x in (
            "../model.safetensors",
            "../../x.safetensors",
            "/etc/passwd",
            "/x.safetensors",
            "sub/x.safetensors",
            "sub/../../x.safetensors",
            "..",
            ".",
            "",
            "x.txt",
            "x",
            "C:\\x.safetensors",
            "x.safetensors\0",
            f"{EVIL}.safetensors",
            "x.safetensors ",
            "http://x/y.safetensors",
            "~/x.safetensors",
            5,
            None,
            [],
            {},
        )
    },
    "shards absent": (
        index(lambda d: d["weight_map"].update({NORM: "a.safetensors", EMBED: "b.safetensors"})),
        "2 of 5 shards are absent (a.safetensors, b.safetensors)",
    ),
    **{
        f"index {x[:9]!r}": (index(lambda d, x=x: x), says)
        for x, says in (
            (b"", "line 1"),
            (b"[]", "a JSON list"),
            (b"{}", "no weight_map"),
            (b'{"weight_map": {}}', "no weight_map"),
            (b'{"weight_map": []}', "no weight_map"),
            (b'{"weight_map": "model.safetensors"}', "no weight_map"),
            (b"{" * 10**5, "line 1"),
            (b"[" * 10**5, "not readable"),
            (b"\xff", "not UTF-8"),
            (LFS.encode(), "git lfs pull"),
        )
    },
    "index names too few shards": (
        index(lambda d: d.update(weight_map={NORM: d["weight_map"][NORM]})),
        "missing",
    ),
    "a shard is a pointer": (
        shards(lambda f, a, b, c: b.write_text(LFS)),
        "00002-of-00003.safetensors: a git-lfs pointer",
    ),
    "a shard is empty": (shards(lambda f, a, b, c: b.write_bytes(b"")), "damaged"),
    "a shard is cut": (shards(lambda f, a, b, c: b.write_bytes(b.read_bytes()[:-1])), "damaged"),
    "a shard twice": (shards(lambda f, a, b, c: shutil.copy(a, b)), "is the same tensor as"),
    "a shard is gone": (shards(lambda f, a, b, c: b.unlink()), "1 of 3 shards are absent"),
    "a shard is a folder": (shards(lambda f, a, b, c: b.unlink() or b.mkdir()), "absent"),
    "a shard is a pipe": (shards(lambda f, a, b, c: b.unlink() or os.mkfifo(b)), "absent"),
    "a shard is a dangling link": (
        shards(lambda f, a, b, c: b.unlink() or b.symlink_to("nowhere")),
        "absent",
    ),
    "a tensor is in no shard": (shards(shard_without_its_first), "missing 1 tensor(s)"),
    "the file is a folder": (
        lambda f: single(f).unlink() or single(f).mkdir(),
        "not a regular file",
    ),
    "the file is a pipe": (
        lambda f: single(f).unlink() or os.mkfifo(single(f)),
        "not a regular file",
    ),
    "no weights": (lambda f: single(f).unlink(), "no model.safetensors, pytorch_model.bin"),
    # .bin files
    "bin": (binary(torch.save), LOADS),
    "bin of parameters": (
        binary(lambda t, p: torch.save({n: torch.nn.Parameter(x) for n, x in t.items()}, p)),
        LOADS,
    ),
    "bin of views": (
        binary(lambda t, p: torch.save({n: torch.cat([x, x])[: len(x)] for n, x in t.items()}, p)),
        LOADS,
    ),
    "bin with code": (
        binary(lambda t, p: torch.save({**t, "x": Canary()}, p)),
        "damaged or not a weight file",
    ),
    "bin of code": (
        binary(lambda t, p: p.write_bytes(pickle.dumps(Canary()))),
        "damaged or not a weight file",
    ),
    "bin of a module": (
        binary(lambda t, p: torch.save(torch.nn.Linear(2, 2), p)),
        "damaged or not a weight file",
    ),
    "bin of old torch": (
        binary(lambda t, p: torch.save(t, p, _use_new_zipfile_serialization=False)),
        "damaged or not a weight file",
    ),
    "bin cut": (binary(half_zip), "damaged"),
    **{
        f"bin of {type(x).__name__} {str(x)[:9]}": (
            binary(lambda t, p, x=x: torch.save(x, p)),
            "not a table of named tensors",
        )
        for x in (
            [torch.ones(2)],
            torch.ones(2),
            5,
            None,
            "x",
            {5: torch.ones(2)},
            {"x": 5},
            {"state_dict": {"x": torch.ones(2)}},
            {"x": [torch.ones(2)]},
        )
    },
    **{
        f"bin of {x[:9]!r}": (
            binary(lambda t, p, x=x: p.write_bytes(x)),
            "(not a table of tensors as torch saves it)",
        )
        for x in (b"", b"x", b"PK\3\4", b"\x80\2.", b"\0" * 999, b"<html>", b"\x80\4N.")
    },
    "bin with a sparse tensor": (
        binary(lambda t, p: torch.save({**t, NORM: t[NORM].to_sparse()}, p)),
        "not a table",
    ),
    "bin with a nested tensor": (
        binary(
            lambda t, p: torch.save(
                {**t, NORM: torch.nested.nested_tensor([t[NORM], t[NORM][:1]])}, p
            )
        ),
        "not a table",
    ),
    "bin with integers": (
        binary(lambda t, p: torch.save({**t, NORM: t[NORM].int()}, p)),
        "holds torch.int32, expected floating point",
    ),
    "bin with complex numbers": (
        binary(lambda t, p: torch.save({**t, NORM: t[NORM].cfloat()}, p)),
        "holds torch.complex64",
    ),
    "bin with a meta tensor": (
        binary(lambda t, p: torch.save({**t, NORM: t[NORM].to("meta")}, p)),
        "not a table",
    ),
    "bin with a broadcast": (
        binary(lambda t, p: torch.save({**t, NORM: t[NORM][:1]}, p)),
        "shape [1]",
    ),
    "bin without": (
        binary(lambda t, p: torch.save({n: x for n, x in t.items() if n != NORM}, p)),
        "missing 1 tensor(s)",
    ),
    "bin shards": (index(lambda d: None, "bin"), LOADS),
    "bin shards, hostile index": (
        index(lambda d: d["weight_map"].__setitem__(NORM, "../pytorch_model.bin"), "bin"),
        "is not the name of a file",
    ),
    # the small files
    **{
        f"config.json {str(x)[:9]}": (small("config.json", x), "config.json")
        for x in (None, b"", b"[]", b"{}", b"{", b"null", b"[" * 10**5)
    },
    "another architecture": (
        small("config.json", {"model_type": "llava_next"}),
        "model_type is 'llava_next'",
    ),
    "remote code": (small("config.json", {"auto_map": {"AutoModel": "evil.py"}}), "auto_map"),
    "quantized": (
        small("config.json", {"quantization_config": {"bits": 4}}),
        "quantization_config",
    ),
    "wider": (text_config(hidden_size=64), f"of {EMBED}, expected [384, 64]"),
    "deeper": (text_config(num_hidden_layers=1024), "missing"),
    "giant": (
        text_config(hidden_size=1 << 20, intermediate_size=1 << 20),
        "expected [384, 1048576]",
    ),
    "head tied": (
        small("config.json", {"tie_word_embeddings": True}),
        "lm_head.weight differs from the embedding",
    ),
    "another <image>": (
        small("config.json", {"image_token_index": 5}),
        "image_token_index is 5 in config.json but <image> is 320 in the tokenizer",
    ),
    "too few rows for the tokenizer": (
        text_config(vocab_size=322),
        "the tokenizer knows 324 tokens",
    ),
    "another picture size": (
        small("preprocessor_config.json", {"size": 42, "crop_size": 42}),
        "42 pixels",
    ),
    "no preprocessor": (
        small("preprocessor_config.json", None),
        "preprocessor_config.json: no such file",
    ),
    "no tokenizer": (small("tokenizer.model", None), "no tokenizer.json and no tokenizer.model"),
    **{
        f"{name} {x[:9]!r}": (small(name, x), name)
        for name in ("preprocessor_config.json", "tokenizer_config.json", "processor_config.json")
        for x in (b"", b"[]", b"5", b"{", b"\xff", b"[" * 10**5)
    },
    **{
        f"{name} {x}": (small(name, x), next(iter(x)))
        for name, x in (
            ("preprocessor_config.json", {"image_mean": [0, 0]}),
            ("preprocessor_config.json", {"image_std": [1, 0, 1]}),
            ("preprocessor_config.json", {"size": "28"}),
            ("preprocessor_config.json", {"resample": 2}),
            ("preprocessor_config.json", {"image_processor_type": "SiglipImageProcessor"}),
            ("preprocessor_config.json", {"image_aspect_ratio": "anyres"}),
        )
    },
    "template unknown": (
        small("processor_config.json", {"llava_min_template": "vicuna_v9"}),
        "vicuna_v9",
    ),
    "template no string": (
        small("processor_config.json", {"llava_min_template": ["x"]}),
        "template",
    ),
    "image settings no object": (
        small("processor_config.json", {"image_processor": [1]}),
        "processor_config.json",
    ),
    "a hostile template is not run": (
        small("chat_template.jinja", b"{% for x in range(10**9) %}{{ x }}{% endfor %}\xff"),
        LOADS,
    ),
    "an empty template": (small("chat_template.json", {"chat_template": None}), LOADS),
    "garbage in chat_template.json": (small("chat_template.json", b"["), "chat_template.json"),
    "tokenizer.model is a pointer": (small("tokenizer.model", LFS.encode()), "git"),
    "tokenizer.model is garbage": (small("tokenizer.model", b"\xff" * 99), "tokenizer.model"),
    "config.json is a pointer": (small("config.json", LFS.encode()), "git lfs pull"),
}


def test_there_are_many_cases_and_controls():
    assert len(CASES) >= 200 and sum(says is LOADS for _, says in CASES.values()) >= 10


@pytest.mark.parametrize("name", CASES)
def test_malformed(name, folder, base, monkeypatch):
    monkeypatch.chdir(folder.parent)
    case, says = CASES[name]
    case(folder)
    check_case(folder, base, says)
    assert os.listdir(folder.parent) == ["m"]  # no canary


def test_values_too_large_for_the_dtype(folder, base):
    put(NORM, lambda x: x.fill_(65504.0))(folder)
    assert isinstance(loading(folder, dtype="fp16"), Llava)
    put(NORM, lambda x: x.fill_(65536.0))(folder)
    message = loading(folder, dtype="fp16")
    assert (
        "holds NaN, infinity or numbers too large for float16; load it in another dtype" in message
    )
    for dtype in ("bf16", "fp32"):
        assert isinstance(loading(folder, dtype=dtype), Llava)


def test_a_tied_head_may_stand_in_the_file_if_it_is_the_embedding(spm, tmp_path):
    folder = write_folder(tmp_path / "m", spm, their_model("qwen2"), hf_saved)
    assert HEAD not in load_file(single(folder))
    for change, says in (
        (lambda t: t[EMBED].clone(), LOADS),
        (lambda t: t[EMBED] + 1, "differs from the embedding"),
        (lambda t: t[EMBED][:-1], "shape [383, 32]"),
        (lambda t: torch.tensor(1.0), "shape []"),
        (lambda t: t[EMBED].int(), "expected floating point"),
    ):
        for name in (HEAD, "lm_head.weight"):
            copy = shutil.copytree(folder, tmp_path / "copy")
            tensors(lambda t: t.__setitem__(name, change(t)))(copy)
            check_case(copy, folder, says)
            shutil.rmtree(copy)


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bytes(seed, folder, base):
    """Any byte of any file: refused in one line, or loaded."""
    rng, outcomes = random.Random(seed), []
    names = sorted(os.listdir(folder))
    for _ in range(60):
        path = folder / rng.choice(names)
        good = path.read_bytes()
        at = rng.randrange(min(len(good), 8 << 10))  # of the weights, the header above all
        path.write_bytes(good[:at] + bytes([good[at] ^ rng.randrange(1, 256)]) + good[at + 1 :])
        outcomes.append(loading(folder))
        path.write_bytes(good)
    refused = sum(isinstance(o, str) for o in outcomes)
    assert 15 <= refused <= 55  # both happen


def test_pickles_are_read_in_one_place_and_nothing_runs():
    root = Path(llava_min.__file__).parent  # two rooms may have a page of one name
    source = {str(p.relative_to(root)): p.read_text() for p in root.rglob("*.py")}
    calls = {
        name: text.count("torch.load(") for name, text in source.items() if "torch.load(" in text
    }
    assert calls == {"tensors.py": 1} and "weights_only=True, mmap=True" in source["tensors.py"]
    for word in ("import pickle", "trust_remote_code", "shell=True", "os.system", "eval(", "exec("):
        assert not [
            name
            for name, text in source.items()
            if re.search(rf"(?<![\w.]){re.escape(word)}", text)
        ], word


# ---- what is missing, in the file's own words; and an index that is not as its shards


@pytest.mark.parametrize("layout", [*LAYOUTS, "original", "original, tower beside"])
def test_a_missing_tensor_is_named_as_the_layout_has_it(theirs, spm, tmp_path, layout):
    if layout in LAYOUTS:
        folder, rename = write_folder(tmp_path / "m", spm, theirs, LAYOUTS[layout]), LAYOUTS[layout]
        files = [folder / "model.safetensors"]
    else:
        folder = write_original(
            tmp_path / "m", spm, theirs, "inside" if layout == "original" else "bin"
        )
        files = [folder / "pytorch_model.bin", *(tmp_path / "clip").glob("*.bin")]
        rename = (
            original
            if layout == "original"
            else lambda n: original(n).removeprefix("model.vision_tower.vision_tower.")
        )
    for name in (
        "model.vision_tower.encoder.layers.1.mlp.fc1.bias",
        "model.vision_tower.post_layernorm.weight",
        "model.multi_modal_projector.linear_2.bias",
        "model.language_model.layers.1.mlp.up_proj.weight",
        "model.language_model.norm.weight",
        "lm_head.weight",
    ):
        for file in files:
            read, write = (
                (torch.load, torch.save) if file.suffix == ".bin" else (load_file, save_file)
            )
            if rename(name) in (table := read(file)):
                write({n: x for n, x in table.items() if n != rename(name)}, file)
                with pytest.raises(
                    UserError, match=re.escape(f"missing 1 tensor(s) ({rename(name)});")
                ):
                    bare(folder)
                write(table, file)
                break
        else:
            pytest.fail(name)


def two_in_each_others_place(d):
    a, b = sorted(d["weight_map"])[:2]
    d["weight_map"][a], d["weight_map"][b] = d["weight_map"][b], d["weight_map"][a]


@pytest.mark.parametrize("end", ["safetensors", "bin"])
def test_an_index_and_its_shards_agree(folder, base, end, capsys):
    stem = "model" if end == "safetensors" else "pytorch_model"
    shard(folder, 3, end)
    path = folder / f"{stem}.{end}.index.json"
    good, first = path.read_text(), min(load_file(single(base)))

    def ask(change) -> str:
        change(data := json.loads(good))
        path.write_text(json.dumps(data))
        capsys.readouterr()
        try:
            bare(folder)
        except UserError as e:
            return str(e)
        return capsys.readouterr().err

    assert ask(lambda d: None) == ""
    assert ask(two_in_each_others_place).startswith(
        f"{path}: says that {first} is in {stem}-00002-of-00003.{end}, "
        f"and it is in {stem}-00001-of-00003.{end}; download"
    )
    for name in ("lm_head.more", "anything"):
        told = ask(lambda d: d["weight_map"].update({name: d["weight_map"][NORM]}))
        assert told.startswith(
            f"{path}: missing 1 tensor(s) ({name}), which it lists and no shard has; download"
        )
    assert (
        ask(lambda d: d["weight_map"].update({"model.rotary_emb.inv_freq": d["weight_map"][NORM]}))
        == ""
    )
    told = ask(lambda d: d["weight_map"].pop(NORM))
    assert (
        told == f"warning: {path}: does not list 1 tensor(s) ({NORM}), which the shards "
        "have; they are read all the same\n"
    )


@pytest.mark.parametrize("end", ["safetensors", "bin"])
def test_a_shard_that_the_index_does_not_name_is_told_once(folder, end, capsys):
    stem = "model" if end == "safetensors" else "pytorch_model"
    shard(folder, 3, end)
    (folder / f"other.{end}").write_bytes(b"no shard")
    bare(folder), capsys.readouterr()
    for name in (f"{stem}-00004-of-00004.{end}", f"{stem}-1-of-\x1b2.{end}"):
        (folder / name).write_bytes(b"left over")
    bare(folder), bare(folder)
    assert capsys.readouterr().err == (
        f"warning: {folder / stem}.{end}.index.json: does not name 2 shard(s) beside it "
        f"({stem}-00004-of-00004.{end}, {stem}-1-of-\\x1b2.{end}), which are not read; remove "
        "them, or download the index and the shards again, from one revision\n"
    )


def test_of_one_file_and_an_index_beside_it_is_said_which_is_read(folder, base, capsys):
    shard(folder, 2)
    assert bare(folder) and capsys.readouterr().err == ""
    shutil.copy(single(base), folder)
    bare(folder)
    assert capsys.readouterr().err == (
        f"warning: {single(folder)}: is read, and the shards of model.safetensors.index.json "
        "beside it are not; remove what is not wanted\n"
    )
