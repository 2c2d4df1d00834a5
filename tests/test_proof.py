"""How an export reads, writes and proves: past the cache, each tensor once, a merge's faults."""

import errno
import os
from collections import Counter

import pytest
import torch
from conftest import their_model, write_folder
from safetensors.torch import load_file, save_file
from test_export import adapter_of
from test_merge import run

from llava_min.errors import UserError
from llava_min.export import disk, handover, proof, tensors
from llava_min.export.handover import Handover
from llava_min.export.memory import PAGE, Memory
from llava_min.names import to_ours
from llava_min.tensors import list_tensors


@pytest.fixture
def source(tmp_path, spm):
    return write_folder(tmp_path / "source", spm, their_model())


@pytest.fixture(params=["small", "large"])
def size(request, monkeypatch):
    """Both ways to run what is compared: whole, and as a model beyond the machine's memory."""
    if request.param == "large":
        monkeypatch.setattr(proof, "SMALL", 0)


# ---- files


def refuse_direct(monkeypatch, at):
    """A file system without direct access, that says so when it is opened or when it is used."""
    opened, calls = set(), Counter()

    def refusing(name):
        real = getattr(os, name)

        def call(*args):
            is_open = name == "open"
            direct = args[1] & disk.DIRECT if is_open else args[0] in opened
            if direct and name in at:
                calls[name] += 1
                opened.discard(args[0])
                raise OSError(errno.EINVAL, "Invalid argument")
            out = real(*args)
            if is_open and direct:
                opened.add(out)
            return out

        return call

    for name in ("open", *at):
        monkeypatch.setattr(disk.os, name, refusing(name))
    return calls


@pytest.mark.skipif(not disk.DIRECT, reason="this system has no direct access to files")
@pytest.mark.parametrize("at", [(), ("open",), ("preadv", "pwritev")])
def test_written_is_read(tmp_path, monkeypatch, at):
    """Sizes about a page and a step, starts at any byte; with and without direct access."""
    monkeypatch.setattr(disk, "STEP", 4 * PAGE)
    calls = refuse_direct(monkeypatch, at)
    for size in (1, PAGE - 1, PAGE, 4 * PAGE, 4 * PAGE + 1, 9 * PAGE + 77):
        data = torch.randint(0, 256, (size,), dtype=torch.uint8).numpy()
        with disk.writer(tmp_path / "x") as f:
            f.write(data[: size // 3])
            f.write(data[size // 3 :])
        assert (tmp_path / "x").read_bytes() == data.tobytes()
    g = torch.Generator().manual_seed(0)
    right = {f"{n}": torch.randn(n, generator=g).to(d) for n in (1, 3, 2048, 9001) for d in HALVES}
    save_file(right, tmp_path / "x.safetensors")
    for info in list_tensors(tmp_path / "x.safetensors"):
        assert torch.equal(disk.read_tensor(info, Memory()), right[info.name])
    assert calls.keys() == set(at)


HALVES = (torch.float32, torch.bfloat16)


def test_a_file_cut_short(tmp_path):
    save_file({"x": torch.ones(3000)}, tmp_path / "x.safetensors")
    (info,) = list_tensors(tmp_path / "x.safetensors")
    os.truncate(info.path, info.start + 11_999)
    with pytest.raises(UserError, match="ends early; download the file again"):
        disk.read_tensor(info, Memory())


# ---- one reading for two


@pytest.mark.parametrize("room", [handover.ROOM, 0])
@pytest.mark.parametrize("to", ["small", "large"])
def test_the_source_is_read_once(tmp_path, source, monkeypatch, room, to):
    """Each tensor leaves the disk once for writer and proof; without room for what one is ahead it
    is read by both, and nobody waits for ever."""
    folder, _ = adapter_of(source, tmp_path / "adapter")
    monkeypatch.setattr(handover, "SMALLEST", 1)
    monkeypatch.setattr(handover, "ROOM", room)
    monkeypatch.setattr(proof, "SMALL", 0 if to == "large" else 1 << 30)
    count, real = Counter(), disk.read_tensor

    def counted(info, memory):
        if info.path.parent == source:
            count[info.name] += 1
        return real(info, memory)

    monkeypatch.setattr(disk, "read_tensor", counted)
    run(source, folder, tmp_path / "out")
    assert set(count.values()) == {1} if room else max(count.values()) == 2


def test_a_writer_that_fails_ends_the_proof(tmp_path, source, monkeypatch):
    """The error is the writer's, and comes at once."""
    folder, _ = adapter_of(source, tmp_path / "adapter")
    monkeypatch.setattr(handover, "SMALLEST", 1)

    def full(self, data):
        if self.used > 20_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    write = disk.Writer.write
    monkeypatch.setattr(disk.Writer, "write", full)
    with pytest.raises(UserError, match="cannot be written .No space left on device"):
        run(source, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_who_takes_fails_and_the_writer_goes_on():
    between, entry = Handover(), type("Info", (), {"shape": (1 << 20,), "torch_dtype": torch.half})
    between.open()
    between.close()
    x = torch.zeros(1 << 20)
    assert between.give("x", entry, lambda: x) is x and not between.left


# ---- faults that the proof finds

DTYPES = ("fp32", "bf16", "fp16")
Q = "language_model.layers.1.self_attn.q_proj"


def fails(source, folder, out, dtype, message):
    with pytest.raises(UserError, match=message):
        run(source, folder, out, dtype=dtype)
    assert not out.exists()


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_merges_pass(tmp_path, source, size, dtype):
    a, _ = adapter_of(source, tmp_path / "a")
    b, _ = adapter_of(source, tmp_path / "b", seed=2)
    c, _ = adapter_of(source, tmp_path / "c", dora=True, seed=3)
    run(source, a, tmp_path / "one", dtype=dtype)
    run(source, a, b, tmp_path / "two", dtype=dtype, weights="0.5,-0.25")
    run(source, a, c, tmp_path / "both", dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_that_the_merge_forgets(tmp_path, source, size, dtype, monkeypatch):
    folder, _ = adapter_of(source, tmp_path / "adapter")
    call = tensors.Merge.__call__

    def forgets(self, name, dtype):
        plain = name == f"{Q}.weight" and type(self) is tensors.Merge
        return self.base(name, dtype) if plain else call(self, name, dtype)

    monkeypatch.setattr(tensors.Merge, "__call__", forgets)
    fails(source, folder, tmp_path / "out", dtype, f"{Q}: merged, its outputs differ by")


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_of_the_wrong_size(tmp_path, source, size, dtype, monkeypatch):
    """A tenth too large, in one layer."""
    folder, _ = adapter_of(source, tmp_path / "adapter")
    apply = tensors.Adapter.apply

    def wrong(self, name, w, first):
        before = w.clone()
        new = apply(self, name, w, first)
        return new.add_(new - before, alpha=0.1) if name == f"{Q}.weight" else new

    monkeypatch.setattr(tensors.Adapter, "apply", wrong)
    fails(source, folder, tmp_path / "out", dtype, f"{Q}: merged, its outputs differ by")


def test_a_wrong_byte_of_a_copied_tensor(tmp_path, source, size, monkeypatch):
    folder, _ = adapter_of(source, tmp_path / "adapter")
    stored = {to_ours(name): x for name, x in load_file(source / "model.safetensors").items()}
    bits = stored["vision_tower.layers.0.mlp.fc1.weight"].numpy().tobytes()
    write = disk.Writer.write

    def wrong(self, data):
        data = data.copy()
        if data.tobytes() == bits:
            data[7] ^= 1
        write(self, data)

    monkeypatch.setattr(disk.Writer, "write", wrong)
    fails(source, folder, tmp_path / "out", "fp32", "fc1.weight: reads back otherwise")


def test_a_layer_of_zeros_is_no_fault():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 3, bias=False)}).requires_grad_(False)
    model["a"].weight.zero_()
    proof.compare_layers(model, {"a": torch.zeros(2, 3)}, 0.01)
    model["a"](torch.ones(2, 4))
    model["a"].weight[0, 0] = 1e-9
    with pytest.raises(UserError, match="a: merged, its outputs differ"):
        model["a"](torch.ones(2, 4))
