"""Resumed = uninterrupted, bit for bit: weights, optimizer, random streams, order of the data; and
killed at any moment.
"""

import json
import os
import random
import shutil
import signal
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from training import argv, child, final, lines, make_home, run, train

from llava_min.checks import settings
from llava_min.errors import UserError
from llava_min.training import checkpoint, durable, random_state, saver
from llava_min.util.cli import parse

STEPS = 12  # of 6 rows: three epochs of 24 records
LORA = ("--train", "lora", "--lora-dropout", "0.2", "--lora-r", "4")
FULL = ("--train", "full", "--neftune-alpha", "5")
SHAPE = (
    "--batch-size",
    "3",
    "--grad-accum",
    "2",
    "--epochs",
    "3",
    "--save-every",
    "1",
    "--keep",
    "100",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module", params=[LORA, FULL], ids=["lora", "full"])
def whole(request, home, tmp_path_factory):
    """A run that was never interrupted, with a checkpoint at every step."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(home, out, *request.param, *SHAPE)
    return request.param, out


def losses(out):
    return [(x["step"], x["loss"], x["grad_norm"], x["lr"]) for x in lines(out) if "loss" in x]


def test_resumed_from_every_step(home, whole, tmp_path):
    mode, out = whole
    assert len(losses(out)) == STEPS
    for k in range(1, STEPS + 1):
        again = tmp_path / f"from-{k}"
        run(home, again, *mode, *SHAPE, "--resume", str(out / "checkpoints" / f"step-{k:06}"))
        if k < STEPS:
            assert final(again) == final(out), f"resumed from step {k}"
            assert losses(again) == losses(out)[k:]
        result = "adapter/adapter_model.safetensors" if mode is LORA else "model/model.safetensors"
        assert (again / result).read_bytes() == (out / result).read_bytes()


def test_resumed_twice_in_one_epoch_and_with_workers(home, whole, tmp_path):
    mode, out = whole
    again = tmp_path / "run"
    shutil.copytree(out, again, symlinks=True)
    for start in (5, 7):  # both in the second epoch
        for path in saver.list_checkpoints(again / "checkpoints"):
            if int(path.name[-6:]) > start:
                shutil.rmtree(path)
        (
            shutil.rmtree(again / "adapter", ignore_errors=True),
            shutil.rmtree(again / "model", ignore_errors=True),
        )
        run(home, again, *mode, *SHAPE, "--resume", "auto", "--workers", "1")
        assert final(again) == final(out) and losses(again) == losses(out)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_epoch_holds_every_record_once_and_goes_on_where_it_was(
    home, tmp_path, monkeypatch, workers
):
    from llava_min.llava import Llava

    seen, loss = [], Llava.loss
    monkeypatch.setattr(
        Llava,
        "loss",
        lambda self, **batch: (
            seen.extend(map(str, batch["labels"].tolist())) or loss(self, **batch)
        ),
    )
    shape = (
        "--batch-size",
        "1",
        "--grad-accum",
        "4",
        "--epochs",
        "2",
        "--save-every",
        "3",
        "--keep",
        "9",
        "--workers",
        workers,
    )
    run(home, tmp_path / "a", *shape)
    rows, seen[:] = list(seen), []
    strip = lambda row: str([x for x in json.loads(row) if x != -100])
    assert (
        len(rows) == 48
        and Counter(map(strip, rows[:24])) == Counter(map(strip, rows[24:]))
        and rows[:24] != rows[24:]
    )
    run(
        home,
        tmp_path / "b",
        *shape,
        "--resume",
        str(tmp_path / "a" / "checkpoints" / "step-000003"),
    )
    assert seen == rows[12:]


# ---- killed at any moment

MOMENTS = ("mkdir", "fsync", "rename", "replace", "symlink")
KILLED = (
    "--batch-size",
    "1",
    "--max-steps",
    "60",
    "--save-every",
    "5",
    "--keep",
    "1",
    "--lora-r",
    "2",
    "--lora-dropout",
    "0.1",
    "--log-every",
    "60",
    "--lora-targets",
    "q_proj",
)


def count_down(n: int) -> dict[str, int]:
    """Every call of the system that a save makes ends the process before the `n`-th of them, and
    after it for odd n.
    """
    calls = {"n": 0}

    def watch(module, name):
        original = getattr(module, name)

        def wrapper(*args, **options):
            calls["n"] += 1
            now = calls["n"] == n
            if now and n % 2 == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **options)
            if now:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(module, name, wrapper)

    for name in MOMENTS:
        watch(os, name)
    watch(shutil, "rmtree")
    (
        watch(checkpoint, "write_tensors"),
        watch(checkpoint, "write"),
        watch(durable, "write"),
        watch(checkpoint, "sha256"),
        watch(durable, "sha256"),
        watch(durable, "raw_bytes"),
    )
    return calls


def test_fifty_kills(home, tmp_path):
    never, command = (
        tmp_path / "never",
        lambda out: [
            *argv(home, out, *KILLED, "--data", str(home / "data" / "text.json")),
            "--no-train-projector",
        ],
    )
    seconds, calls = 0.0, tmp_path / "calls"

    def counted():
        import time

        begun, counter = time.perf_counter(), count_down(-1)
        train.main(command(never))
        calls.write_text(f"{counter['n']} {time.perf_counter() - begun}")

    assert child(counted) == 0
    number, seconds = int(calls.read_text().split()[0]), float(calls.read_text().split()[1])
    assert number > 200
    rng = random.Random(0)
    kills = [("call", n) for n in sorted(rng.sample(range(1, number), 30))] + [
        ("time", rng.uniform(0.05, 0.95) * seconds) for _ in range(20)
    ]
    in_a_save = 0
    for kind, moment in kills:
        out = tmp_path / "run"

        def work():
            if kind == "call":
                count_down(moment)
            else:
                signal.setitimer(signal.ITIMER_REAL, moment)  # SIGALRM ends the process where it is
            train.main(command(out))

        code = child(work, tmp_path / "killed")
        expected = code in (-signal.SIGKILL, -signal.SIGALRM) or code == 0 and kind == "time"
        assert expected, (code, kind, moment, (tmp_path / "killed").read_text())
        in_a_save += any((out / "checkpoints").glob(".tmp-*")) or kind == "call"
        if code:
            assert (
                child(lambda: train.main([*command(out), "--resume", "auto"]), tmp_path / "log")
                == 0
            ), (kind, moment, (tmp_path / "log").read_text())
        assert final(out) == final(never), (kind, moment)
        assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-000060"] and not list(
            out.glob(".tmp-*")
        )
        assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == (
            never / "adapter" / "adapter_model.safetensors"
        ).read_bytes()
        shutil.rmtree(out)
    assert in_a_save >= 20


# ---- what is not resumed


def test_other_settings_are_named(home, tmp_path):
    out = tmp_path / "run"
    base = ("--batch-size", "6", "--max-steps", "3", "--save-every", "2", "--keep", "9")
    run(home, out, *base)
    shutil.rmtree(out / "adapter")
    data = home / "data" / "train.json"
    other = data.with_name("other.json")
    records = json.loads(data.read_text())
    records[3]["conversations"][1]["value"] += " indeed"
    other.write_text(json.dumps(records))
    model = tmp_path / "model"
    shutil.copytree(home / "model", model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"note": 1}))
    tuned = tmp_path / "tuned"
    shutil.copytree(home / "model", tuned)
    damage(tuned / "model.safetensors")
    spoken = tmp_path / "spoken"
    shutil.copytree(home / "model", spoken)
    (spoken / "processor_config.json").write_text(
        (spoken / "processor_config.json").read_text().replace('"llava_hf"', '"vicuna_v1"')
    )
    changes = {
        "training data": ("--data", str(other)),
        "schedule": ("--schedule", "linear"),
        "lora_r": ("--lora-r", "8"),
        "rows of a step": ("--batch-size", "4"),
        "tokenizer": ("--model", str(model)),
        "base model": ("--model", str(tuned)),
        "chat template": ("--model", str(spoken)),
        "seed": ("--seed", "1"),
        "lr": ("--lr", "1e-3"),
        "steps": ("--max-steps", "5"),
    }
    for name, change in changes.items():
        with pytest.raises(UserError, match=name) as e:
            run(home, out, *base, *change, "--resume", str(out / "checkpoints" / "step-000003"))
        assert "\n" not in str(e.value)
    # the same rows, dealt otherwise
    run(home, out, *base, "--batch-size", "3", "--grad-accum", "2", "--resume", "auto")


def test_what_a_resumed_run_may_not_change():
    """Whatever else decides what a run computes belongs here, and not into MAY_CHANGE."""
    names = set(train.TrainConfig.__dataclass_fields__)
    assert settings.MAY_CHANGE <= names and names - settings.MAY_CHANGE == set(
        """skip_bad train train_projector train_vision lora_r lora_alpha lora_dropout lora_targets
        dora rslora quantize lr projector_lr vision_lr optimizer weight_decay betas warmup_ratio
        warmup_steps schedule max_grad_norm epochs max_steps max_length too_long group_by_length
        packing precision neftune_alpha image_aspect_ratio template exif seed eval_metrics
        best_metric""".split()
    )


def test_what_a_finished_run_may_be_asked_for_again(tmp_path):
    """With 16 rows a step, on two ranks."""
    config = lambda argv: parse(train.TrainConfig, ["--data", "a.json", *argv], "A test.")
    (tmp_path / "config.json").write_text(
        json.dumps(vars(config([])) | {"out": "runs/a", "ranks": 2})
    )
    ask = lambda ranks, *typed: settings.check_finished(tmp_path, config(typed), typed, ranks)
    for ranks, *typed in (
        (2,),
        (1,),
        (1, "--batch-size", "16"),
        (2, "--batch-size", "4", "--grad-accum", "2"),
        (2, "--out", "runs/a/"),
        (2, "--resume", "auto"),
        (2, "--eval-metrics", "exact_match"),
        (2, "--log-every", "3"),
    ):
        ask(ranks, *typed)
    for ranks, rows in ((1, 8), (4, 32)):
        with pytest.raises(UserError, match=f"with 16 rows a step and not {rows};"):
            ask(ranks, "--grad-accum", "1")


def test_a_run_goes_on_with_toy_data_or_without(tmp_path):
    def ask(was, now, resume="auto"):
        (tmp_path / "config.json").write_text(json.dumps({"data": was}))
        settings.check_same_kind_of_data(tmp_path, SimpleNamespace(data=now, resume=resume))

    (
        ask("a.json", "moved/a.json"),
        ask("toy:captions", "toy:captions"),
        ask("a.json", "toy:captions", "never"),
    )
    for was, now in (("a.json", "toy:captions"), ("toy:captions", "a.json")):
        with pytest.raises(UserError, match=f"was started with data {was} and not {now}"):
            ask(was, now)


def test_the_best_of_another_folder_stays_there(home, tmp_path, monkeypatch):
    from llava_min.evaluation import predict

    shape = (
        "--batch-size",
        "6",
        "--max-steps",
        "4",
        "--save-every",
        "1",
        "--keep",
        "9",
        "--eval-data",
        home / "data" / "val.json",
        "--eval-every",
        "1",
        "--max-new-tokens",
        "1",
        "--best-metric",
        "exact_match",
    )
    scores = iter((0.5, 0.9, 0.1, 0.1, 0.1, 0.1, 0.2, 0.3, 0.1))
    monkeypatch.setattr(
        predict, "score", lambda rows, names: {"exact_match": {"score": next(scores)}}
    )
    run(home, tmp_path / "a", *shape)
    run(
        home,
        tmp_path / "b",
        *shape,
        "--resume",
        str(tmp_path / "a" / "checkpoints" / "step-000002"),
    )
    # nothing is left to do but to end well
    run(
        home,
        tmp_path / "c",
        *shape,
        "--resume",
        str(tmp_path / "a" / "checkpoints" / "step-000004"),
    )
    assert [(tmp_path / name / "best").resolve().name for name in "abc"] == [
        "step-000001",
        "step-000004",
        "step-000004",
    ]


def test_other_mixtures_and_pictures_are_named(home, tmp_path, capsys):
    base, folder = ("--batch-size", "6", "--max-steps", "2", "--save-every", "1"), tmp_path / "data"
    shutil.copytree(home / "data", folder)
    first, second = home / "data" / "train.json", home / "data" / "text.json"
    run(home, tmp_path / "run", *base, "--data", f"{first}@2,{second}")
    go_on = lambda data, name: run(
        home, tmp_path / name, *base, "--data", data, "--resume", str(tmp_path / "run" / "last")
    )
    for name, data in {
        "training data": f"{second},{first}@2",
        "weights of the data": f"{first},{second}@2",
        "records": f"{first}@3,{second}",
    }.items():
        with pytest.raises(UserError, match=f"{name} \\(was "):
            go_on(data, "other")
    go_on(f"{folder / 'train.json'}@2,{folder / 'text.json'}", "moved")
    a, b = sorted((folder / "images").glob("*train*"), key=lambda p: p.stat().st_size)[::23]
    a.rename(folder / "t"), b.rename(a), (folder / "t").rename(b)
    capsys.readouterr()
    go_on(f"{folder / 'train.json'}@2,{folder / 'text.json'}", "swapped")
    assert "warning" in (said := capsys.readouterr().err) and "some images have changed" in said
    with pytest.raises(
        UserError, match=r"contents of pictures \(was \w{12}, is \w{12}\), lora_r \(was"
    ):
        run(
            home,
            tmp_path / "other",
            *base,
            "--data",
            f"{folder / 'train.json'}@2,{folder / 'text.json'}",
            "--lora-r",
            "3",
            "--resume",
            str(tmp_path / "run" / "last"),
        )


def test_other_configs_of_the_model_are_named(home, tmp_path):
    base, out = ("--batch-size", "6", "--max-steps", "2", "--save-every", "1"), tmp_path / "run"
    run(home, out, *base)
    changes = {
        "text_config.rope_theta": (
            "config.json",
            '"rope_theta": 10000.0',
            '"rope_theta": 500000.0',
        ),
        "text_config.rms_norm_eps": (
            "config.json",
            '"rms_norm_eps": 1e-05',
            '"rms_norm_eps": 1e-06',
        ),
        "text_config.eos_token_ids": (
            "generation_config.json",
            '"eos_token_id": [',
            '"eos_token_id": [5,',
        ),
        "image_processor.mean": (
            "preprocessor_config.json",
            '"image_mean": [',
            '"image_mean": [0.5, 0.5, 0.5], "was": [',
        ),
    }
    for name, (file, old, new) in changes.items():
        model = tmp_path / name / "model"
        shutil.copytree(home / "model", model)
        text = (model / file).read_text()
        assert old in text
        (model / file).write_text(text.replace(old, new))
        with pytest.raises(UserError, match=f"other settings: {name} \\(was "):
            run(
                home,
                tmp_path / "other",
                *base,
                "--model",
                str(model),
                "--resume",
                str(out / "last"),
            )


def test_where_there_is_nothing_to_resume(home, tmp_path, capsys):
    base = ("--batch-size", "6", "--max-steps", "3", "--save-every", "1", "--keep", "9")
    with pytest.raises(UserError, match="no checkpoint there"):
        run(home, tmp_path / "a", *base, "--resume", str(tmp_path / "absent"))
    assert not (tmp_path / "a").exists()
    run(home, tmp_path / "a", *base, "--resume", "auto")
    assert "starting fresh" in capsys.readouterr().err
    assert train.main([*argv(home, tmp_path / "a", *base), "--resume", "auto"]) is None
    assert "already finished" in capsys.readouterr().err
    for other in (
        ("--max-steps", "4"),
        ("--data", str(home / "data" / "text.json")),
        ("--train", "full"),
    ):
        with pytest.raises(UserError, match=f"is finished, with {other[0]} "):
            train.main([*argv(home, tmp_path / "a", *base, *other), "--resume", "auto"])
    for same in (("--workers", "2"), ("--batch-size", "3", "--grad-accum", "2")):  # how, not what
        assert train.main([*argv(home, tmp_path / "a", *base, *same), "--resume", "auto"]) is None
    with pytest.raises(UserError, match="with 6 rows a step and not 3"):
        train.main([*argv(home, tmp_path / "a", *base, "--batch-size", "3"), "--resume", "auto"])
    with pytest.raises(UserError, match="holds a run; .* --resume auto"):
        run(home, tmp_path / "a", *base)
    shutil.rmtree(tmp_path / "a" / "adapter")
    with pytest.raises(UserError, match="step-000003 is newer"):
        run(
            home,
            tmp_path / "a",
            *base,
            "--resume",
            str(tmp_path / "a" / "checkpoints" / "step-000001"),
        )
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        UserError, match="was started with --data .*train.json and not toy:captions"
    ):
        # no other flag is recipe toy
        train.main(["--resume", "auto", "--out", str(tmp_path / "a")])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_checkpoint_is_passed_over_and_only_damaged_ones_are_an_error(
    home, tmp_path, capsys
):
    out, base = (
        tmp_path / "run",
        ("--batch-size", "6", "--max-steps", "4", "--save-every", "1", "--keep", "2"),
    )
    run(home, out, *base)
    whole = final(out)
    shutil.rmtree(out / "adapter")
    for path in saver.list_checkpoints(out / "checkpoints"):
        with pytest.raises(UserError, match="state.json"):
            damage(path / "state.json")
            run(home, tmp_path / "other", *base, "--resume", str(path))
        if path.name == "step-000004":
            run(home, out, *base, "--resume", "auto")
            assert (
                "falling back" in (said := capsys.readouterr().err)
                and "step-000004/state.json" in said
            )
            assert final(out) == whole
            shutil.rmtree(out / "adapter")
            damage(path / "state.json")
    with pytest.raises(UserError, match="no whole checkpoint among 2"):
        run(home, out, *base, "--resume", "auto")


def test_a_checkpoint_that_was_copied(home, tmp_path):
    """Out of its run it needs an --out; with its links followed, the links are told."""
    base = ("--batch-size", "6", "--max-steps", "2", "--save-every", "1")
    run(home, tmp_path / "run", *base)
    mine = tmp_path / "mine"
    (mine / "sub").mkdir(parents=True)
    shutil.copytree(tmp_path / "run" / "last", mine / "sub" / "step-000002")
    shutil.copytree(tmp_path / "run" / "last", mine / "ckpt")
    for folder in ("sub/step-000002", "ckpt"):
        flags = argv(home, "", *base, "--resume", str(mine / folder))
        del flags[flags.index("--out") : flags.index("--out") + 2]
        with pytest.raises(UserError, match="is in no run's folder; give --out too"):
            train.main(flags)
    assert sorted(p.name for p in mine.iterdir()) == ["ckpt", "sub"] and [
        p.name for p in (mine / "sub").iterdir()
    ] == ["step-000002"]
    followed = tmp_path / "followed"
    shutil.copytree(tmp_path / "run", followed)
    shutil.rmtree(followed / "adapter")
    with pytest.raises(UserError, match="followed/last: a folder, expected a link"):
        run(home, followed, *base, "--resume", "auto")
    shutil.rmtree(followed / "last")
    run(home, followed, *base, "--resume", "auto")
    assert final(followed) == final(tmp_path / "run")


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_only_the_model(home, tmp_path):
    out, base = tmp_path / "run", ("--batch-size", "6", "--max-steps", "3", "--save-every", "2")
    run(home, out, *base, switches=("--save-only-model",))
    assert (out / "last" / "adapter" / "adapter_model.safetensors").read_bytes() == (
        out / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    with pytest.raises(UserError, match="save-only-model"):
        run(home, tmp_path / "b", *base, "--resume", str(out / "checkpoints" / "step-000002"))


def test_random_streams_come_back():
    random_state.reseed(3, 5, 0)
    numbers, tensors = random_state.get_rng_state(torch.device("cpu"))
    numbers = json.loads(json.dumps(numbers))
    draw = lambda: (
        random.random(),
        torch.rand(3).tolist(),
        random_state.np.random.rand(2).tolist(),
    )
    first = draw()
    assert draw() != first
    random_state.set_rng_state(numbers, tensors, torch.device("cpu"))
    assert draw() == first
    random_state.reseed(3, 5, 0)
    assert draw() == first
    random_state.reseed(3, 5, 1)
    assert draw() != first
