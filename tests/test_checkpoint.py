"""One checkpoint: what is in it, that every bit is looked at, that it appears whole or not at all,
on any number of ranks.
"""

import errno
import json
import os
import random
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training import child

from llava_min.errors import UserError
from llava_min.parallel.ranks import World
from llava_min.training import checkpoint, durable, run_folder

MORE = {"more": lambda folder: (folder / "text.txt").write_text("text")}
ALONE = World(0, 1, 0, torch.device("cpu"))


def trained(seed: int = 0, steps: int = 2):
    """A model with a frozen layer, and its optimizer after some steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(3, 2))
    model[1].requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def write(folder, step=7, seed=0, **run):
    return checkpoint.save(folder, step, *trained(seed), ALONE, {"identity": {"lr": 0.1}, **run})


def test_what_is_saved_comes_back(tmp_path):
    model, optimizer = trained()
    path = checkpoint.save(tmp_path, 7, model, optimizer, ALONE, {"identity": {"lr": 0.1}, "at": 3})
    drawn = torch.rand(4)
    assert path == tmp_path / "step-000007" and sorted(p.name for p in path.iterdir()) == [
        "manifest.json",
        "rank-0.safetensors",
        "state.json",
    ]
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    stored = load_file(path / "rank-0.safetensors")
    assert stored.keys() == names | {
        f"{key} of {n}" for n in names for key in ("exp_avg", "exp_avg_sq", "step")
    } | {"rng torch"}
    assert oct(path.stat().st_mode & 0o777) == oct(0o777 & ~umask())

    other, fresh = trained(seed=1, steps=0)
    run = run_folder.resume(path, {"lr": 0.1}, other, fresh, ALONE, seed=0)
    assert run["at"] == 3 and torch.equal(torch.rand(4), drawn)
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters()):
        assert torch.equal(a, b) == a.requires_grad
    for a, b in zip(optimizer.param_groups[0]["params"], fresh.param_groups[0]["params"]):
        assert all(
            torch.equal(optimizer.state[a][key], fresh.state[b][key]) for key in optimizer.state[a]
        )


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_two_hundred_flipped_bits(tmp_path):
    path = checkpoint.save(tmp_path, 7, *trained(), ALONE, {"identity": {}}, MORE)
    assert checkpoint.verify(path)["step"] == 7
    files, rng = sorted(p for p in path.rglob("*") if p.is_file()), random.Random(0)
    for n in range(200):
        file = files[n % len(files)]
        data = file.read_bytes()
        flipped = bytearray(data)
        bit = rng.randrange(8 * len(data))
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        with pytest.raises(UserError, match=path.name) as e:
            checkpoint.verify(path)
        assert file.name in str(e.value) or file.name == "manifest.json"
        file.write_bytes(data)
    for change in (
        lambda: (path / "more" / "text.txt").unlink(),
        lambda: (path / "new").write_text("x"),
        lambda: (path / "manifest.json").unlink(),
    ):
        change()
        with pytest.raises(checkpoint.CorruptCheckpoint):
            checkpoint.verify(path)
        shutil.rmtree(path)
        path = checkpoint.save(tmp_path, 7, *trained(), ALONE, {"identity": {}}, MORE)
    checkpoint.verify(path)


@pytest.mark.parametrize(
    "state", [{}, [], {"format": "x"}, {"step": 7}, ("rng",), ("run",), {"ranks": 2}], ids=str
)
def test_a_state_that_lacks_parts_is_damaged_whatever_the_manifest_says(tmp_path, state):
    """A tuple names what is taken out; a dict of some keys changes them; {} and [] are the whole
    file.
    """
    path = checkpoint.save(tmp_path, 7, *trained(), ALONE, {"identity": {}})
    whole, listed = (
        json.loads((path / "state.json").read_bytes()),
        json.loads((path / "manifest.json").read_bytes()),
    )
    if isinstance(state, tuple):
        state = {k: v for k, v in whole.items() if k not in state}
    elif state and "step" not in state:
        state = whole | state
    data = checkpoint.as_json(state)
    (path / "state.json").write_bytes(data)
    listed["state.json"] = {"bytes": len(data), "sha256": checkpoint.sha256(path / "state.json")}
    (path / "manifest.json").write_bytes(checkpoint.as_json(listed))
    with pytest.raises(checkpoint.CorruptCheckpoint):
        checkpoint.verify(path)


def test_other_trainable_tensors_are_an_error(tmp_path):
    path = write(tmp_path)
    model, optimizer = trained(steps=0)
    model[0].bias.requires_grad_(False)
    with pytest.raises(UserError, match="0.bias"):
        run_folder.resume(path, {"lr": 0.1}, model, optimizer, ALONE, 0)
    with pytest.raises(UserError, match=r"lr \(was 0.1, is 0.2\)"):
        run_folder.resume(path, {"lr": 0.2}, *trained(steps=0), ALONE, 0)


def test_a_full_disk_at_twenty_sizes(tmp_path):
    """RLIMIT_FSIZE: a write beyond it fails with EFBIG, as one on a full disk does with ENOSPC."""
    write(tmp_path, 1)
    largest = max(p.stat().st_size for p in (tmp_path / "step-000001").iterdir())
    codes = []
    for k in range(20):
        limit = largest * k // 18

        def work():
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            write(tmp_path, 2, seed=1)

        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        log.touch()
        codes.append(child(lambda: work_said(work, tmp_path / "said"), None))
        if codes[-1]:
            assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["step-000001"]
        else:
            shutil.rmtree(tmp_path / "step-000002")
        checkpoint.verify(tmp_path / "step-000001")
    assert set(codes[:17]) == {3} and codes[-1] == 0


def work_said(work, said) -> int:
    """3 when `work` ended in the one line that a full disk deserves."""
    try:
        work()
    except UserError as e:
        return (
            3
            if "File too large" in str(e) and "step-000002" in str(e) and "\n" not in str(e)
            else 4
        )
    return 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT])
def test_a_failure_at_every_call(tmp_path, monkeypatch, number):
    write(tmp_path, 1)
    before = (tmp_path / "step-000001" / "manifest.json").read_bytes()
    n, failed = 0, 0
    while True:
        n += 1
        left = [n]

        def failing(original):
            def call(*args, **options):
                left[0] -= 1
                if left[0] == 0:
                    raise OSError(number, os.strerror(number), str(args[0]))
                return original(*args, **options)

            return call

        class File:
            def __init__(self, path, mode):
                self.file = open(path, mode)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                self.file.close()

            def __getattr__(self, name):
                return failing(self.file.write) if name == "write" else getattr(self.file, name)

        with monkeypatch.context() as patch:
            for name in ("fsync", "rename", "mkdir"):
                patch.setattr(os, name, failing(getattr(os, name)))
            patch.setattr(
                durable,
                "open",
                lambda path, mode: File(path, mode) if "w" in mode else open(path, mode),
                raising=False,
            )
            try:
                write(tmp_path, 2, seed=1)
            except UserError as e:
                failed += 1
                assert (
                    os.strerror(number) in str(e)
                    and "step-000002" in str(e)
                    and "resume auto" in str(e)
                )
        checkpoint.verify(tmp_path / "step-000001")
        assert (tmp_path / "step-000001" / "manifest.json").read_bytes() == before and not list(
            tmp_path.glob(".tmp-*")
        )
        if left[0] > 0:  # there was no n-th call
            break
        assert run_folder.newest_checkpoint(tmp_path).name == (
            "step-000002" if (tmp_path / "step-000002").exists() else "step-000001"
        )
        shutil.rmtree(tmp_path / "step-000002", ignore_errors=True)
    assert failed >= 25 and n == failed + 2  # the first mkdir finds its folder there, and passes


def test_rows_of_another_number_of_ranks(tmp_path):
    """What three ranks wrote, one reads: each tensor from the parts that have its rows."""
    path = write(tmp_path)
    state, tensors = (
        json.loads((path / "state.json").read_bytes()),
        load_file(path / "rank-0.safetensors"),
    )
    # they are mapped, and the file is written anew
    tensors, rows = {name: x.clone() for name, x in tensors.items()}, []
    for rank in range(3):
        part, here = {}, {}
        for name, x in tensors.items():
            if name.startswith("rng"):
                continue
            if not x.dim():
                if rank == 0:
                    part[name] = x
                continue
            size = -(-len(x) // 3)
            a, b = min(rank * size, len(x)), min((rank + 1) * size, len(x))
            part[name], here[name] = x[a:b], [a, b]
        checkpoint.write_tensors(path / f"rank-{rank}.safetensors", part)
        rows.append(here)
    state |= {"ranks": 3, "rows": rows, "rng": [{}, {}, {}]}
    model, optimizer = trained(seed=2, steps=0)
    # the random streams are other ranks'
    assert checkpoint.restore(path, state, model, optimizer, ALONE) is False
    want, reference = trained()
    for a, b in zip(want.parameters(), model.parameters()):
        if a.requires_grad:
            assert torch.equal(a, b) and torch.equal(
                reference.state[a]["exp_avg_sq"], optimizer.state[b]["exp_avg_sq"]
            )


def test_everything_is_on_disk_before_it_has_its_name_and_after(tmp_path, monkeypatch):
    """The order that a power cut asks for: files, their folders, the rename, the folder of that."""
    events, sync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: events.append(os.readlink(f"/proc/self/fd/{fd}")) or sync(fd)
    )
    monkeypatch.setattr(os, "rename", lambda a, b: events.append("renamed") or rename(a, b))
    path = checkpoint.save(tmp_path, 7, *trained(), ALONE, {}, MORE)
    aside = tmp_path / ".tmp-step-000007"
    there = {str(aside / p.relative_to(path)) for p in path.rglob("*")} | {str(aside)}
    cut = events.index("renamed")
    assert (
        set(events[:cut]) == there
        and events.index(str(aside / "manifest.json")) == cut - 1 - 2
        and events[cut + 1 :] == [str(tmp_path)]
    )


@pytest.mark.parametrize("name", ["rank-0.safetensors", "state.json", "manifest.json"])
def test_a_checkpoint_that_reads_back_otherwise_is_none(tmp_path, monkeypatch, name):
    write(tmp_path, 1)
    sync = os.fsync

    def bad_disk(fd):
        sync(fd)
        path = os.readlink(f"/proc/self/fd/{fd}")
        if path.endswith(name):
            with open(path, "r+b") as file:
                file.seek(-3, os.SEEK_END)
                file.write(b"\x7f")

    monkeypatch.setattr(os, "fsync", bad_disk)
    with pytest.raises(UserError, match=f"read back is not what was written.*{name}"):
        write(tmp_path, 2)
    assert (
        run_folder.newest_checkpoint(tmp_path).name == "step-000001"
        and len(list(tmp_path.iterdir())) == 1
    )


def test_an_optimizer_of_ones_own_comes_back_with_its_kinds(tmp_path):
    """Tensors of other kinds than the parameters', and what is no tensor."""
    model, optimizer = trained()
    for p in optimizer.param_groups[0]["params"]:
        optimizer.state[p] |= {
            "seen": (torch.arange(p.numel()) * 3 + (1 << 40)).view_as(p),
            "half": p.detach().bfloat16(),
            "mu": 0.1,
            "times": 3,
        }
    path = checkpoint.save(tmp_path, 7, model, optimizer, ALONE, {"identity": {}})
    other, fresh = trained(seed=1, steps=0)
    assert checkpoint.restore(path, checkpoint.verify(path), other, fresh, ALONE)
    for a, b in zip(optimizer.param_groups[0]["params"], fresh.param_groups[0]["params"]):
        was, now = optimizer.state[a], fresh.state[b]
        assert (was.keys(), now["mu"], now["times"]) == (now.keys(), 0.1, 3)
        assert all(
            was[key].dtype == now[key].dtype and torch.equal(was[key], now[key])
            for key in ("seen", "half", "exp_avg", "step")
        )
