"""What goes wrong on the way: signals, numbers that are not finite, memory that is not there, data
that teaches nothing, ranks that die.
"""

import importlib
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import argv, child, final, lines, make_home, run, train

from llava_min.data.dataset import Dataset
from llava_min.errors import Interrupted, UserError
from llava_min.evaluation import predict
from llava_min.llava import Llava
from llava_min.training import checkpoint, run_folder, saver
from llava_min.training.signals import Signals

SHAPE = (
    "--batch-size",
    "3",
    "--grad-accum",
    "2",
    "--epochs",
    "2",
    "--save-every",
    "3",
    "--lora-r",
    "4",
    "--lora-dropout",
    "0.1",
    "--lora-alpha",
    "8",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("faults"))


def at_call(patch, owner, name: str, n: int, act) -> None:
    """Do `act` within the n-th call of `owner`.`name`."""
    original, calls = getattr(owner, name), [0]

    def wrapper(*args, **options):
        calls[0] += 1
        if calls[0] == n:
            act()
        return original(*args, **options)

    patch.setattr(owner, name, wrapper)


# ---- signals

PLACES = {
    "start-up": (importlib.import_module("llava_min.load"), "open_checkpoint", 1),
    "loading": (Dataset, "__getitem__", 23),
    "step": (Llava, "loss", 9),
    "evaluation": (predict, "predict", 2),
    "save": (checkpoint, "write_tensors", 1),
}


@pytest.fixture(scope="module")
def never(home, tmp_path_factory):
    """A run without any signal."""
    out = tmp_path_factory.mktemp("never") / "run"
    run(
        home,
        out,
        *SHAPE,
        "--eval-data",
        home / "data" / "val.json",
        "--eval-every",
        "4",
        "--max-new-tokens",
        "2",
    )
    return out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_saves_and_stops(home, never, tmp_path, monkeypatch, place, group, number):
    command = argv(
        home,
        tmp_path / "run",
        *SHAPE,
        "--eval-data",
        home / "data" / "val.json",
        "--eval-every",
        "4",
        "--max-new-tokens",
        "2",
        "--workers",
        "1" if group and place != "loading" else "0",
    )
    before = signal.getsignal(number)

    def work():
        os.setsid()

        def act():
            os.killpg(0, number) if group else os.kill(os.getpid(), number)
            if place == "loading":
                time.sleep(30)  # a disk that does not answer is not waited for

        at_call(monkeypatch, *PLACES[place], act)
        return train.main(command)

    begun = time.perf_counter()
    assert child(work, tmp_path / "log") == (130 if number == signal.SIGINT else 143), (
        tmp_path / "log"
    ).read_text()
    assert time.perf_counter() - begun < 20
    said = (tmp_path / "log").read_text().splitlines()
    if place == "start-up":
        assert (
            said[-1] == "stopped before the first step; there is nothing to save"
            and not (tmp_path / "run").exists()
        )
    else:
        step = {"loading": 2, "step": 4, "evaluation": 4, "save": 4}[place]
        assert said[-1].startswith(f"saved step {step}, resume with "), said[-3:]
        assert [p.name for p in saver.list_checkpoints(tmp_path / "run" / "checkpoints")][
            0
        ] == f"step-{step:06}"
    assert train.main([*command, "--resume", "auto"]) is None
    assert final(tmp_path / "run") == final(never) and signal.getsignal(number) == before
    strip = lambda out: [
        {
            k: v
            for k, v in line.items()
            if k not in ("seconds", "tokens_per_s", "pictures_per_s", "peak_gb")
        }
        for line in lines(out)
    ]
    assert strip(tmp_path / "run") == strip(never)


def test_a_second_signal_stops_at_once_and_damages_nothing(home, never, tmp_path, monkeypatch):
    command = argv(
        home,
        tmp_path / "run",
        *SHAPE,
        "--eval-data",
        home / "data" / "val.json",
        "--eval-every",
        "4",
        "--max-new-tokens",
        "2",
    )

    def work():
        at_call(
            monkeypatch,
            checkpoint,
            "write_tensors",
            2,
            lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in (1, 2)],
        )
        return train.main(command)

    assert child(work) == -signal.SIGTERM
    assert run_folder.newest_checkpoint(tmp_path / "run" / "checkpoints").name == "step-000003"
    assert train.main([*command, "--resume", "auto"]) is None and final(tmp_path / "run") == final(
        never
    )


def test_ctrl_c_in_a_save(home, tmp_path, monkeypatch):
    def work():
        at_call(
            monkeypatch, checkpoint, "write_tensors", 2, lambda: os.kill(os.getpid(), signal.SIGINT)
        )
        return train.main(argv(home, tmp_path / "run", *SHAPE))

    assert child(work) == 130  # the save comes to its end, then the step
    assert run_folder.newest_checkpoint(tmp_path / "run" / "checkpoints").name == "step-000007"
    assert train.main([*argv(home, tmp_path / "run", *SHAPE), "--resume", "auto"]) is None


def test_a_ctrl_c_that_comes_twice_counts_once_and_nohup_is_heeded():
    def work():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with Signals() as signals:
            signals.raises_now = False
            os.kill(os.getpid(), signal.SIGHUP)
            if signals.requested:
                return 1
            os.kill(os.getpid(), signal.SIGINT), os.kill(os.getpid(), signal.SIGINT)
            return signals.code

    assert child(work) == 130


def test_what_a_signal_may_break_off_does_not_begin_after_one():
    with Signals() as signals:
        signals.raises_now = False
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted), signals.interruptible():
            pytest.fail("it began")
        assert not signals.raises_now and signals.code == 143


# ---- numbers that are not finite


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    stored = load_file(out / "checkpoints" / f"step-{step:06}" / "rank-0.safetensors")
    return {n: x.clone() for n, x in stored.items() if " of " not in n and not n.startswith("rng")}


@pytest.mark.parametrize("poison", ["loss", "gradient", "pixel"])
def test_a_number_that_is_not_finite_touches_no_weight(home, tmp_path, monkeypatch, capsys, poison):
    loss, calls = Llava.loss, [0]

    def poisoned(self, input_ids, labels, pixel_values=None):
        calls[0] += 1
        if calls[0] == 5 and poison == "pixel":  # the first half of the third step
            pixel_values = pixel_values.clone()
            pixel_values[0, 0, 0, 0] = float("nan")
        value = loss(self, input_ids, labels, pixel_values)
        if calls[0] == 5 and poison == "loss":
            value = value + float("inf")
        if calls[0] == 5 and poison == "gradient":
            value.register_hook(lambda g: g * float("nan"))
        return value

    monkeypatch.setattr(Llava, "loss", poisoned)
    out = tmp_path / "run"
    log = run(home, out, *SHAPE, "--max-steps", "5", "--save-every", "1", "--keep", "9")
    (line,) = [x for x in log if "skipped" in x]
    said = next(s for s in capsys.readouterr().err.splitlines() if "no weight was changed" in s)
    assert (
        line["step"] == 3
        and len(line["skipped"]) == 6
        and all(id in said for id in line["skipped"])
    )
    a, b, c = (weights(out, step) for step in (2, 3, 4))
    assert all(torch.equal(a[n], b[n]) for n in a) and any(not torch.equal(b[n], c[n]) for n in b)
    assert all(x.isfinite().all() for x in weights(out, 5).values())


def test_too_many_of_them_stop_the_run(home, tmp_path, monkeypatch):
    loss = Llava.loss
    monkeypatch.setattr(Llava, "loss", lambda self, **batch: loss(self, **batch) * float("nan"))
    with pytest.raises(
        UserError, match="step 2: 2 steps had a loss or gradient that is not finite.*lower --lr"
    ) as e:
        run(home, tmp_path / "run", *SHAPE, "--max-skips", "2", "--save-every", "1")
    assert "\n" not in str(e.value) and str(tmp_path / "run" / "last") in str(e.value)


def test_a_run_that_ends_with_them_has_no_result(home, tmp_path, monkeypatch):
    """By its learning rate, or by one poisoned step at the end: the checkpoint stays, and the same
    end is reached from it.
    """
    with pytest.raises(
        UserError,
        match=r"step 6: the last \d steps had a loss or gradient that is not finite, so no adapter is written; .*lower --lr",
    ) as e:
        run(
            home,
            tmp_path / "a",
            *SHAPE,
            "--lr",
            "1e30",
            "--max-steps",
            "6",
            "--eval-data",
            home / "data" / "val.json",
            "--max-new-tokens",
            "2",
        )
    assert (
        "\n" not in str(e.value)
        and str(tmp_path / "a" / "last") in str(e.value)
        and not (tmp_path / "a" / "adapter").exists()
    )
    loss, calls = Llava.loss, [0]
    monkeypatch.setattr(
        Llava,
        "loss",
        lambda self, **batch: (
            loss(self, **batch)
            * (calls.append(0) or float("nan") if len(calls) > 6 else calls.append(0) or 1)
        ),
    )
    for again in ((), ("--resume", "auto")):
        with pytest.raises(UserError, match="step 4: the last 1 steps had"):
            run(home, tmp_path / "b", *SHAPE, "--max-steps", "4", "--save-every", "2", *again)
    assert (
        not (tmp_path / "b" / "adapter").exists() and (tmp_path / "b" / "last" / "adapter").is_dir()
    )


def test_fp16_looks_for_its_scale_and_counts_no_skip_for_that(home, tmp_path, monkeypatch):
    loss, calls = Llava.loss, [0]

    def overflow(self, **batch):
        calls[0] += 1
        value = loss(self, **batch)
        if calls[0] <= 2:
            value.register_hook(lambda g: g * float("inf"))
        return value

    monkeypatch.setattr(Llava, "loss", overflow)
    out = tmp_path / "run"
    run(
        home,
        out,
        *SHAPE,
        "--precision",
        "fp16",
        "--max-skips",
        "1",
        "--max-steps",
        "4",
        "--save-every",
        "4",
    )
    state = json.loads((out / "last" / "state.json").read_bytes())["run"]
    assert (
        state["scale"] == {"enabled": True, "scale": 32768.0, "good": 3}
        and state["at"]["skipped"] == 0
    )


def test_fp16_counts_a_loss_that_is_not_finite_and_goes_on_with_its_scale(
    home, tmp_path, monkeypatch
):
    loss, calls = Llava.loss, [0]

    def poisoned(self, **batch):
        calls[0] += 1
        return loss(self, **batch) * (float("nan") if calls[0] == 1 else 1.0)

    monkeypatch.setattr(Llava, "loss", poisoned)
    shape = (*SHAPE, "--precision", "fp16", "--max-steps", "4", "--save-every", "2", "--keep", "9")
    run(home, tmp_path / "a", *shape)
    state = json.loads((tmp_path / "a" / "last" / "state.json").read_bytes())["run"]
    assert state["at"]["skipped"] == 1 and state["scale"]["scale"] < 65536
    run(
        home,
        tmp_path / "b",
        *shape,
        "--resume",
        str(tmp_path / "a" / "checkpoints" / "step-000002"),
    )
    assert final(tmp_path / "b") == final(tmp_path / "a")


def test_gradients_of_fp16_are_those_of_fp32(home, tmp_path):
    norms = [
        next(
            x["grad_norm"]
            for x in run(
                home, tmp_path / kind, "--batch-size", "24", "--epochs", "2", "--precision", kind
            )
            if x.get("grad_norm")
        )
        for kind in ("fp32", "fp16")
    ]  # at a rate of 0, and at the weights that it left
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


# ---- memory, and data that teaches nothing


def out_of_memory(limit: int, loss):
    def limited(self, **batch):
        if len(batch["input_ids"]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore lines")
        return loss(self, **batch)

    return limited


def test_out_of_memory_is_one_line_that_mends_it(home, tmp_path, monkeypatch):
    monkeypatch.setattr(Llava, "loss", out_of_memory(2, Llava.loss))
    with pytest.raises(
        UserError,
        match="step 1: out of memory with --batch-size 4; give --auto-batch-size, or --batch-size 2 --grad-accum 4 ",
    ) as e:
        run(home, tmp_path / "run", "--batch-size", "4", "--grad-accum", "2")
    assert "\n" not in str(e.value)


def test_the_batch_size_is_found_and_the_steps_stay(home, tmp_path, monkeypatch):
    want = run(
        home, tmp_path / "a", "--batch-size", "2", "--grad-accum", "3", "--lora-dropout", "0.1"
    )
    monkeypatch.setattr(Llava, "loss", out_of_memory(2, Llava.loss))
    found = run(
        home,
        tmp_path / "b",
        "--batch-size",
        "6",
        "--lora-dropout",
        "0.1",
        switches=("--auto-batch-size",),
    )
    assert [x["loss"] for x in found] == [x["loss"] for x in want]
    monkeypatch.setattr(Llava, "loss", out_of_memory(0, Llava.loss))
    with pytest.raises(UserError, match="not even one row fits"):
        run(home, tmp_path / "c", switches=("--auto-batch-size",))


def test_a_step_without_a_supervised_token_is_an_error(home, tmp_path, monkeypatch):
    item = Dataset.__getitem__
    monkeypatch.setattr(
        Dataset,
        "__getitem__",
        lambda self, i: item(self, i) | {"labels": [-100] * len(item(self, i)["labels"])},
    )
    with pytest.raises(UserError, match="step 1: no token to learn from in records .*train"):
        run(home, tmp_path / "run", *SHAPE)


# ---- several ranks, each a fork of this process


def ranks(n: int, work, logs: Path) -> list[int]:
    """Exit codes of n processes that call `work(rank)` as torchrun would start them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pids = []
    for rank in range(n):
        pid = os.fork()
        if not pid:
            os.environ.update(
                RANK=str(rank),
                WORLD_SIZE=str(n),
                LOCAL_RANK=str(rank),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
            code = child(lambda: work(rank), logs / f"log-{rank}")
            os._exit(code if code >= 0 else 128 - code)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def test_one_rank_then_two_then_one(home, tmp_path):
    shape = (
        "--epochs",
        "3",
        "--max-steps",
        "0",
        "--keep",
        "9",
        "--save-every",
        "2",
        "--train",
        "lora",
        "--lora-r",
        "4",
    )
    command = lambda out, batch, *more: argv(home, out, *shape, "--batch-size", str(batch), *more)
    alone = tmp_path / "alone"
    assert train.main(command(alone, 6)) is None
    want = {x["step"]: x["loss"] for x in lines(alone)}
    first, second, third = tmp_path / "1", tmp_path / "2", tmp_path / "3"
    run_until(command(first, 6), first, 4)
    codes = ranks(
        2,
        lambda rank: run_until(
            [*command(second, 3), "--resume", str(first / "checkpoints" / "step-000004")], second, 8
        ),
        tmp_path,
    )
    assert codes == [143, 143], (tmp_path / "log-0").read_text()
    assert len(list((second / "checkpoints" / "step-000008").glob("rank-*.safetensors"))) == 2
    assert (
        train.main([*command(third, 6), "--resume", str(second / "checkpoints" / "step-000008")])
        is None
    )
    found = {x["step"]: x["loss"] for out in (first, second, third) for x in lines(out)}
    assert found.keys() == want.keys() and all(
        found[k] == pytest.approx(want[k], rel=1e-5) for k in want
    )
    a, b = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (alone, third))
    assert all((a[n] - b[n]).norm() <= 1e-4 * a[n].norm() + 1e-7 for n in a)


def run_until(command: list[str], out: Path, step: int) -> int:
    """A run that gets a signal once `step` steps are done."""
    patch = pytest.MonkeyPatch()
    from llava_min.training.log import Log

    original = Log.step

    def stop(self, n, **values):
        original(self, n, **values)
        if n == step:
            os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(Log, "step", stop)
    try:
        return train.main(command)
    except SystemExit as e:
        return e.code
    finally:
        patch.undo()


@pytest.mark.parametrize("world", [1, 2])
def test_a_picture_that_is_damaged_on_the_way_loses_nothing(home, tmp_path, world):
    """What was learnt is saved, and the run goes on once the picture is mended."""
    command = lambda out: argv(
        home,
        tmp_path / out,
        "--batch-size",
        str(6 // world),
        "--max-steps",
        "4",
        "--save-every",
        "9",
    )

    def work(rank: int):
        def damaged():
            raise UserError("record 7: a.png: is damaged")

        if rank == world - 1:
            at_call(pytest.MonkeyPatch(), Dataset, "__getitem__", 6 // world * 3 + 2, damaged)
        return train.main(command("run"))

    codes = ranks(2, work, tmp_path) if world == 2 else [child(lambda: work(0), tmp_path / "log-0")]
    assert (
        codes == [2] * world
        and "record 7: a.png: is damaged" in (tmp_path / "log-0").read_text().splitlines()[-1]
    )
    assert [p.name for p in saver.list_checkpoints(tmp_path / "run" / "checkpoints")] == [
        "step-000002"
    ]
    for out in ("run", "never"):
        again = [*command(out), "--resume", "auto"]
        assert (
            ranks(2, lambda rank: train.main(again), tmp_path) == [0, 0]
            if world == 2
            else train.main(again) is None
        )
    assert final(tmp_path / "run") == final(tmp_path / "never")


@pytest.mark.parametrize(
    "call, every", [(8, "9"), (14, "0")], ids=["before the first step", "without checkpoints"]
)
def test_a_damaged_picture_saves_nothing_where_nothing_is_to_be_saved(
    home, tmp_path, monkeypatch, call, every
):
    def damaged():
        raise UserError("record 7: a.png: is damaged")

    at_call(monkeypatch, Dataset, "__getitem__", call, damaged)  # 6 of them are the early look
    with pytest.raises(UserError, match="record 7"):
        run(
            home,
            tmp_path / "run",
            "--batch-size",
            "6",
            "--max-steps",
            "4",
            "--lora-r",
            "2",
            "--save-every",
            every,
        )
    assert not saver.list_checkpoints(tmp_path / "run" / "checkpoints")


def test_when_a_rank_dies_the_job_ends(home, tmp_path):
    def work(rank):
        if rank:
            at_call(
                pytest.MonkeyPatch(), Llava, "loss", 3, lambda: os.kill(os.getpid(), signal.SIGKILL)
            )
        return train.main(argv(home, tmp_path / "run", "--batch-size", "2", "--timeout", "5"))

    begun = time.perf_counter()
    codes = ranks(2, work, tmp_path)
    assert time.perf_counter() - begun < 10 and codes[1] == 128 + signal.SIGKILL and codes[0] == 1
    said = (tmp_path / "log-0").read_text().splitlines()
    assert "another rank ended or does not answer" in said[-1] and "Traceback" not in "".join(said)


def test_ranks_with_other_settings_are_told_apart(home, tmp_path):
    codes = ranks(
        2, lambda rank: train.main(argv(home, tmp_path / "run", "--seed", str(rank))), tmp_path
    )
    assert (
        codes == [2, 2]
        and "settings" in (tmp_path / "log-0").read_text().splitlines()[-1]
        and not (tmp_path / "run").exists()
    )


@pytest.mark.parametrize("mode", [("full", "fp32"), ("lora", "fp16")])
def test_two_ranks_evaluate_and_keep_the_best_like_one(home, tmp_path, mode):
    shape = (
        "--train",
        mode[0],
        "--precision",
        mode[1],
        "--max-steps",
        "4",
        "--eval-data",
        home / "data" / "val.json",
        "--eval-every",
        "2",
        "--max-new-tokens",
        "3",
        "--best-metric",
        "loss",
        "--save-every",
        "2",
    )
    run(home, tmp_path / "1", "--batch-size", "6", *shape)
    codes = ranks(
        2,
        lambda rank: train.main(argv(home, tmp_path / "2", "--batch-size", "3", *shape)),
        tmp_path,
    )
    assert codes == [0, 0], (tmp_path / "log-0").read_text()
    one, two = (
        [{k: x[k] for k in ("step", "loss", "eval_loss") if k in x} for x in lines(tmp_path / n)]
        for n in "12"
    )
    assert [x.keys() for x in one] == [x.keys() for x in two] and (
        tmp_path / "1" / "best"
    ).readlink() == (tmp_path / "2" / "best").readlink()
    assert all(
        a[k] == pytest.approx(b[k], rel=1e-5 if mode[1] == "fp32" else 1e-2)
        for a, b in zip(one, two)
        for k in a
    )
    assert lines(tmp_path / "2", "samples.jsonl")[0] == lines(tmp_path / "1", "samples.jsonl")[0]
