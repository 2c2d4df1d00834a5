"""The checkpoints of a run: which are kept and found, who may write, and when the next is due."""

import errno
import os
import shutil

import pytest
from test_snapshot import ALONE, trained, write
from training import child

from llava_min import checkpoint, snapshot
from llava_min.cli import UserError


def test_a_newer_format_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "FORMAT", 2)
    path = write(tmp_path)
    monkeypatch.undo()
    with pytest.raises(UserError, match="format 2, made by a newer version"):
        checkpoint.find(tmp_path)
    assert path.exists()


def test_pruning_keeps_the_newest_and_the_best(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "checkpoints"
    for step in range(1, 6):
        write(folder, step)
    checkpoint.settle(tmp_path, 2, 5, 2)
    assert [p.name for p in checkpoint.steps(folder)] == ["step-000005", "step-000004", "step-000002"]
    assert os.readlink(tmp_path / "last") == "checkpoints/step-000005" and os.readlink(tmp_path / "best") == "checkpoints/step-000002"
    checkpoint.Saver(tmp_path, ALONE, "0", 1, set(), 5, 2)  # a run that was killed before it had pruned
    assert [p.name for p in checkpoint.steps(folder)] == ["step-000005", "step-000002"]
    write(folder, 4)
    monkeypatch.setattr(os, "rename", lambda *a: (_ for _ in ()).throw(OSError(errno.EACCES, "Permission denied")))
    checkpoint.settle(tmp_path, 1, 5, 5)
    assert "cannot be removed" in capsys.readouterr().err and len(checkpoint.steps(folder)) == 3
    assert not list(folder.glob(".tmp-*")) and os.readlink(tmp_path / "best") == "checkpoints/step-000005"


def test_a_lock_for_two_runs_and_room_for_two_checkpoints(tmp_path, monkeypatch):
    with checkpoint.run_folder(tmp_path / "run", ALONE):
        def other():
            with checkpoint.run_folder(tmp_path / "run", ALONE):
                return 0

        for name in (".tmp-last", "checkpoints/.tmp-step-000003/rank-0.safetensors"):
            (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "run" / name).touch()
        assert child(other, tmp_path / "log") == 2 and "another run is writing into this folder" in (tmp_path / "log").read_text()
        (tmp_path / "run" / "config.json").write_text("{}")
    assert child(other) == 0 and not list((tmp_path / "run").rglob(".tmp-*"))  # what a kill left
    model, _ = trained()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(UserError, match="two checkpoints take"):
        checkpoint.check_space(tmp_path, model, only_model=False)


def test_a_run_that_did_not_begin_leaves_no_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with pytest.raises(UserError), checkpoint.run_folder(tmp_path / name, ALONE):
            (tmp_path / name / "data").mkdir()
            raise UserError("the data is wrong")
    assert not (tmp_path / "new").exists()


def test_links_change_at_once(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        checkpoint.point(tmp_path / "last", tmp_path / "checkpoints" / name)
        assert os.readlink(tmp_path / "last") == f"checkpoints/{name}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "last"]


def test_fingerprints_tell_files_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "BIG", 1 << 18)
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(bytes(1 << 23)), b.write_bytes(bytes(10))
    first = checkpoint.hash_files([a, b])
    assert first == checkpoint.hash_files([a, b]) != checkpoint.hash_files([b, a])
    a.write_bytes(bytes((1 << 23) - 1) + b"x")
    assert checkpoint.hash_files([a, b]) != first
    a.write_bytes(bytes(1 << 23)), b.write_bytes(bytes(9) + b"x")
    assert checkpoint.hash_files([a, b]) != first


def test_when_a_checkpoint_is_due(tmp_path, monkeypatch):
    steps = lambda every, saved=-1: [n for n in range(13) if checkpoint.Saver(tmp_path, ALONE, every, 1, {4, 8, 12}, saved, -1).due(n)]
    assert steps("5") == [5, 10] and steps("5", saved=5) == [10] and steps("epoch") == [4, 8, 12] and steps("0") == [] and steps("30m") == []
    now = checkpoint.time.perf_counter()
    saver = checkpoint.Saver(tmp_path, ALONE, "2m", 1, set(), -1, -1)
    for seconds, due in ((110, False), (125, True)):
        monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: now + seconds)
        assert saver.due(3) is due


def test_a_damaged_checkpoint_does_not_push_the_last_good_one_out(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path / "checkpoints", step)
    checkpoint.Saver(tmp_path, ALONE, "0", 1, set(), 2, -1)  # the third was passed over
    assert [p.name for p in checkpoint.steps(tmp_path / "checkpoints")] == ["step-000003", "step-000002"]
    assert os.readlink(tmp_path / "last") == "checkpoints/step-000002"
