"""The checkpoints of a run: which are kept and found, who may write, and when the next is due."""

import errno
import os
import shutil
import time

import pytest
import torch
from test_checkpoint import ALONE, trained, write
from training import child

from llava_min.errors import UserError
from llava_min.training import checkpoint, run_folder
from llava_min.training.identity import IMAGES, hash_files
from llava_min.training.random_state import reseed
from llava_min.training.saver import (
    Saver,
    check_space,
    list_checkpoints,
    prune,
    update_symlink,
)
from llava_min.training.state import TrainState


def test_a_newer_format_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    path = write(tmp_path)
    monkeypatch.undo()
    with pytest.raises(UserError, match="format 2, made by a newer version"):
        run_folder.newest_checkpoint(tmp_path)
    assert path.exists()


def test_pruning_keeps_the_newest_and_the_best(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "checkpoints"
    for step in range(1, 6):
        write(folder, step)
    prune(tmp_path, 2, 5, 2)
    assert [p.name for p in list_checkpoints(folder)] == [
        "step-000005",
        "step-000004",
        "step-000002",
    ]
    assert (
        os.readlink(tmp_path / "last") == "checkpoints/step-000005"
        and os.readlink(tmp_path / "best") == "checkpoints/step-000002"
    )
    # a run that was killed before it had pruned
    Saver(tmp_path, ALONE, "0", 1, set(), 5, 2)
    assert [p.name for p in list_checkpoints(folder)] == ["step-000005", "step-000002"]
    write(folder, 4)
    monkeypatch.setattr(
        os, "rename", lambda *a: (_ for _ in ()).throw(OSError(errno.EACCES, "Permission denied"))
    )
    prune(tmp_path, 1, 5, 5)
    assert "cannot be removed" in capsys.readouterr().err and len(list_checkpoints(folder)) == 3
    assert (
        not list(folder.glob(".tmp-*"))
        and os.readlink(tmp_path / "best") == "checkpoints/step-000005"
    )


def test_a_lock_for_two_runs_and_room_for_two_checkpoints(tmp_path, monkeypatch):
    with run_folder.open_run_folder(tmp_path / "run", ALONE):

        def other():
            with run_folder.open_run_folder(tmp_path / "run", ALONE):
                return 0

        for name in (".tmp-last", "checkpoints/.tmp-step-000003/rank-0.safetensors"):
            (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "run" / name).touch()
        assert (
            child(other, tmp_path / "log") == 2
            and "another run is writing into this folder" in (tmp_path / "log").read_text()
        )
        (tmp_path / "run" / "config.json").write_text("{}")
    assert child(other) == 0 and not list((tmp_path / "run").rglob(".tmp-*"))  # what a kill left
    model, _ = trained()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(UserError, match="two checkpoints take"):
        check_space(tmp_path, model, only_model=False)


def test_a_run_that_did_not_begin_leaves_no_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with pytest.raises(UserError), run_folder.open_run_folder(tmp_path / name, ALONE):
            (tmp_path / name / "data").mkdir()
            raise UserError("the data is wrong")
    assert not (tmp_path / "new").exists()


def test_links_change_at_once(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        update_symlink(tmp_path / "last", tmp_path / "checkpoints" / name)
        assert os.readlink(tmp_path / "last") == f"checkpoints/{name}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "last"]


def test_fingerprints_tell_files_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("llava_min.training.identity.MAX_HASHED", 1 << 18)
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(bytes(1 << 23)), b.write_bytes(bytes(10))
    first = hash_files([a, b])
    assert first == hash_files([a, b]) != hash_files([b, a])
    a.write_bytes(bytes((1 << 23) - 1) + b"x")
    assert hash_files([a, b]) != first
    a.write_bytes(bytes((1 << 23) + 1))
    assert hash_files([a, b]) != first
    a.write_bytes(bytes(1 << 23)), b.write_bytes(bytes(9) + b"x")
    assert hash_files([a, b]) != first


def test_when_a_checkpoint_is_due(tmp_path, monkeypatch):
    steps = lambda every, saved=-1: [
        n for n in range(13) if Saver(tmp_path, ALONE, every, 1, {4, 8, 12}, saved, -1).is_due(n)
    ]
    assert (
        steps("5") == [5, 10]
        and steps("5", saved=5) == [10]
        and steps("epoch") == [4, 8, 12]
        and steps("0") == []
        and steps("30m") == []
    )
    now = time.perf_counter()
    saver = Saver(tmp_path, ALONE, "2m", 1, set(), -1, -1)
    for seconds, due in ((110, False), (125, True)):
        monkeypatch.setattr(time, "perf_counter", lambda: now + seconds)
        assert saver.is_due(3) is due


def test_a_damaged_checkpoint_does_not_push_the_last_good_one_out(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path / "checkpoints", step)
    Saver(tmp_path, ALONE, "0", 1, set(), 2, -1)  # the third was passed over
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == [
        "step-000003",
        "step-000002",
    ]
    assert os.readlink(tmp_path / "last") == "checkpoints/step-000002"


def test_a_checkpoint_sets_the_clock_back(tmp_path, monkeypatch):
    now, saver = (
        time.perf_counter(),
        Saver(tmp_path, ALONE, "2m", 1, set(), -1, -1),
    )
    monkeypatch.setattr(time, "perf_counter", lambda: now + 125)
    assert saver.is_due(3)
    saver.save(3, -1, *trained(), {"identity": {}}, {})
    assert not saver.is_due(4)


def test_a_link_is_there_at_every_moment(tmp_path, monkeypatch):
    link, first, second, gone = (
        tmp_path / "last",
        tmp_path / "checkpoints" / "a",
        tmp_path / "checkpoints" / "b",
        [],
    )
    first.mkdir(parents=True), second.mkdir()
    update_symlink(link, first)
    for name in ("unlink", "rename", "replace", "symlink"):
        call = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, call=call, **k: (call(*a, **k), gone.append(not link.is_symlink()))
        )
    update_symlink(link, second)
    assert link.resolve() == second and gone and not any(gone)


def test_a_setting_that_one_of_them_does_not_know_is_named(tmp_path):
    path = write(tmp_path)
    for identity, said in (
        ({"lr": 0.1, "new": 1}, r"new \(was null, is 1\)"),
        ({}, r"lr \(was 0.1, is null\)"),
    ):
        with pytest.raises(UserError, match=said):
            run_folder.resume(path, identity, *trained(steps=0), ALONE, 0)


def test_other_pictures_are_a_warning_and_the_same_are_none(tmp_path, capsys):
    path = write(tmp_path, identity={"lr": 0.1, IMAGES: "a"})
    for now, lines in (("a", 0), ("b", 1)):
        run_folder.resume(path, {"lr": 0.1, IMAGES: now}, *trained(steps=0), ALONE, 0)
        assert capsys.readouterr().err.count("some images have changed") == lines


def test_on_other_ranks_the_random_streams_are_those_of_seed_step_and_rank(tmp_path, monkeypatch):
    path, drawn = write(tmp_path), []
    monkeypatch.setattr(run_folder, "restore", lambda *a: False)
    for seed in (3, 3, 4):
        torch.manual_seed(len(drawn))
        run_folder.resume(path, {"lr": 0.1}, *trained(steps=0), ALONE, seed)
        drawn.append(torch.rand(3).tolist())
    for step in (7, 8):
        reseed(3, step, 0)
        drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[1] == drawn[3] and drawn[2] != drawn[0] != drawn[4]


def test_only_what_a_disk_does_is_told_as_that(tmp_path):
    for number, kind in ((errno.ENOSPC, UserError), (errno.ENOENT, FileNotFoundError)):
        with pytest.raises(kind), run_folder.open_run_folder(tmp_path / "run", ALONE):
            raise OSError(number, os.strerror(number), "x")


def test_a_folder_that_held_something_is_never_taken_away(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError), run_folder.open_run_folder(tmp_path, ALONE):
        raise UserError("the data is wrong")
    assert (tmp_path / "data").is_dir()


# 38 values are trained; Adam has two more of each
@pytest.mark.parametrize("only_model, need", [(False, 2 * 3 * 4 * 38), (True, 2 * 4 * 38)])
def test_two_checkpoints_fit(tmp_path, monkeypatch, only_model, need):
    (model, _), usage, free = trained(), shutil.disk_usage(tmp_path), [need]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free[0]))
    check_space(tmp_path, model, only_model)
    free[0] -= 1
    with pytest.raises(UserError, match="two checkpoints take"):
        check_space(tmp_path, model, only_model)


def test_the_state_in_a_checkpoint_keeps_its_names():
    """Those of checkpoints that users have."""
    stored = {
        "step": 7,
        "evaluated": 4,
        "best": 0.5,
        "best_step": 4,
        "waited": 1,
        "skipped": 3,
        "lost": 2,
    }
    state = TrainState.from_stored(stored)
    assert (state.last_evaluation, state.evals_without_improvement) == (4, 1)
    assert state.consecutive_skips == 2 and list(state.as_stored().items()) == list(stored.items())


def test_the_best_evaluation():
    state = TrainState(step=2)
    assert state.improves("loss", {"loss": 2.0}) and (state.best, state.best_step) == (-2.0, 2)
    state.step = 4
    for value in (2.0, 3.0, float("nan")):
        assert not state.improves("loss", {"loss": value})
    assert (state.best_step, state.evals_without_improvement) == (2, 3)
    assert state.improves("loss", {"loss": 1.0}) and state.evals_without_improvement == 0
    state.forget_best()
    assert state.improves("bleu", {"loss": 9.0, "bleu": 0.0})
    with pytest.raises(UserError, match="^best_metric: rouge is not among loss, bleu"):
        state.improves("rouge", {"loss": 9.0, "bleu": 0.0})
