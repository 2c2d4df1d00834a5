"""The progress line, metrics.jsonl and its copies."""

import importlib.util
import json
import shutil
import sys

import pytest
import torch
from training import make_home, run

from llava_min.errors import UserError
from llava_min.training.log import (
    WIDTH,
    Log,
    check_packages,
    clock,
    peak_memory,
    progress,
    show_samples,
)

VALUES = dict(
    loss=0.123456,
    lr=0.00014567,
    grad_norm=12.3456,
    tokens_per_s=9760.1,
    pictures_per_s=31.42,
    peak_gb=22.13,
)


def test_every_number_is_kept_and_the_line_fits_the_terminal(tmp_path, capsys):
    log = Log(tmp_path, total=9000)
    log.write(step=0, eval_exact_match=0.5)
    log.step(8000, **VALUES)
    log.write(step=8001, loss=float("nan"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (
        lines[0] == {"step": 0, "eval_exact_match": 0.5}
        and lines[1]["loss"] == 0.123456
        and lines[1]["step"] == 8000
    )
    assert lines[2] == {"step": 8001, "loss": None}
    line = capsys.readouterr().err.strip()
    assert (
        line.startswith("8000/9000 loss 0.123 lr 1.5e-4 grad 12 9760 tok/s 31 img/s 22.1 GB 0:")
        and len(line) <= WIDTH
    )


def test_a_line_that_is_too_long_loses_its_end_first():
    line = progress(1_000_000, 2_000_000, 1e6, VALUES | {"tokens_per_s": 123456789.0})
    assert (
        len(line) <= WIDTH
        and "loss 0.123" in line
        and line.endswith("277:46:40 left")
        and "GB" not in line
    )


def test_a_silent_rank_writes_nothing(tmp_path, capsys):
    log = Log(None, total=10)
    log.write(step=1, loss=1.0), log.step(1, loss=1.0), log.say("x"), log.samples(1, [], [])
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_a_resumed_run_takes_back_what_came_after_its_step(tmp_path):
    torn = '{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 1}\n{"step": 2, "lo'
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).write_text(torn)
    log = Log(tmp_path, total=5, start=2)
    log.write(step=3, loss=0.5)
    assert (
        tmp_path / "metrics.jsonl"
    ).read_text() == '{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 0.5}\n'
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 2


def test_marks_that_unicode_calls_line_ends_end_no_line(tmp_path, capsys):
    text = "One.\u2028Two.\u2029Three.\x85"
    row = {"step": 0, "id": "a", "prompt": "Say.", "prediction": text, "reference": text}
    (tmp_path / "samples.jsonl").write_text(
        json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    Log(tmp_path, total=5, start=2)
    show_samples(tmp_path, 0)
    assert capsys.readouterr().out.count("Three.") == 3


def test_times_are_short():
    assert [clock(x) for x in (5, 65, 3661)] == ["0:05", "1:05", "1:01:01"]


def test_answers_are_shown_before_and_after(tmp_path, capsys):
    rows = [
        dict(step=s, id="7", prompt="What?", prediction=a, reference="a cat")
        for s, a in ((0, "x"), (3, "a dog"), (6, "a cat\x1b[2J"))
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    show_samples(tmp_path, 6)
    assert (
        capsys.readouterr().out
        == "\n7: What?\n  before    x\n  after     a cat\\x1b[2J\n  expected  a cat\n"
    )


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_an_absent_extra_is_one_line(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"log: {name}: the package is not installed; pip install"):
        check_packages([name])


def test_numbers_are_copied_to_tensorboard(tmp_path, monkeypatch):
    import types

    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, *values):
            written.append(values)

        def flush(self):
            pass

    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter)
    )
    Log(tmp_path, 1, copies=["tensorboard"]).write(step=3, loss=0.5, skipped=["a"])
    assert written == [(tmp_path / "tensorboard", 0), ("loss", 0.5, 3)]


def shown(folder) -> list[tuple[int, float]]:
    """(step, loss) as TensorBoard shows them."""
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="the real package reads its files; pip install -e '.[log]'",
    )
    events = reader.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars("loss")]


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard", reason="writes the files; pip install -e '.[log]'")
    for start, first, last in ((-1, 0, 5), (3, 4, 6), (0, 1, 2)):
        log = Log(tmp_path, 6, start, ["tensorboard"])
        for step in range(first, last + 1):
            log.write(step=step, loss=float(10 * start + step))
        want = [
            (x["step"], x["loss"])
            for x in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        ]
        assert shown(tmp_path) == want and [step for step, _ in want] == list(range(last + 1))
    # killed before its first checkpoint, so it begins anew
    Log(tmp_path, 6, copies=["tensorboard"]).write(step=0, loss=7.0)
    assert (
        shown(tmp_path) == [(0, 7.0)]
        and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    )


def test_a_run_of_train_is_shown_once(tmp_path):
    pytest.importorskip("tensorboard", reason="writes the files; pip install -e '.[log]'")
    home, out = make_home(tmp_path), tmp_path / "run"
    shape = (
        "--batch-size",
        "6",
        "--max-steps",
        "4",
        "--save-every",
        "2",
        "--log",
        "tensorboard",
        "--eval-data",
        home / "data" / "val.json",
        "--max-new-tokens",
        "1",
    )
    want = [x["step"] for x in run(home, out, *shape)]
    # as if it had been killed after its first checkpoint, and before
    for left in (["step-000002"], []):
        shutil.rmtree(out / "adapter")
        for path in (out / "checkpoints").iterdir():
            if path.name not in left:
                shutil.rmtree(path)
        assert (
            [x["step"] for x in run(home, out, *shape, "--resume", "auto")]
            == want
            == [0, 1, 2, 3, 4, 4]
        )
        assert [step for step, _ in shown(out)] == [1, 2, 3, 4]


def test_a_log_that_cannot_be_written_is_one_line(tmp_path):
    log = Log(tmp_path, 1)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written \(Is a directory\)"):
        log.write(step=1)


def test_the_time_left_is_that_of_the_steps_since_the_resume(tmp_path, capsys, monkeypatch):
    log = Log(tmp_path, total=1000, start=900)
    monkeypatch.setattr("llava_min.training.log.time.perf_counter", lambda: log.started + 50)
    log.step(950, loss=1.0)
    assert capsys.readouterr().err.endswith(" 0:50 left\n")


def test_memory_is_in_gb():
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # from KiB, in GiB
    assert peak_memory(torch.device("cpu")) == pytest.approx(most * 1.073741824, rel=0.1)
