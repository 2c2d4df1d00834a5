"""train.py: what is trained, that it learns, what it writes; and the one-line errors before any
weight is read.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
import training
from test_faults import at_call, ranks
from training import lines, make_home, train

from llava_min.data.dataset import Dataset, collate
from llava_min.data.from_folder import read_settings
from llava_min.data.records import read_records
from llava_min.data.sampler import pack
from llava_min.errors import UserError
from llava_min.evaluation import predict
from llava_min.llama import Block, Llama
from llava_min.llava import Llava
from llava_min.load import load
from llava_min.toy import draw as toy
from llava_min.training.batch_size import row_length
from llava_min.training.log import Log
from llava_min.training.small_files import config_of, named_config
from llava_min.training.wrap import add_neftune, compile_blocks, enable_gradient_checkpointing
from llava_min.util.cli import comments, parse
from llava_min.util.sizes import SIZES


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "data"
    toy.write(folder, "captions", train=24, val=6)
    return folder


def run(
    data: Path, out: Path, *argv: str, batch_size: int = 4, precision: str = "fp32"
) -> list[dict]:
    train.main(
        [
            "--data",
            str(data / "train.json"),
            "--out",
            str(out),
            "--device",
            "cpu",
            "--precision",
            precision,
            "--log-every",
            "1",
            "--batch-size",
            str(batch_size),
            "--lr",
            "1e-3",
            *argv,
        ]
    )
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def tensors(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_it_learns_and_what_it_writes_loads(data, tmp_path, mode, capsys):
    lines = run(
        data,
        tmp_path / "run",
        "--train",
        mode,
        "--epochs",
        "4",
        "--eval-data",
        str(data / "val.json"),
    )
    losses = [x["loss"] for x in lines if "loss" in x]
    assert len(losses) == 24 and losses[-1] < 0.7 * losses[0]
    assert [x["step"] for x in lines if "eval_exact_match" in x] == [0, 24]
    printed = capsys.readouterr()
    assert printed.out.count("before") == 5 and printed.out.count("expected") == 5
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"] == mode
    base = tensors(load("tiny", dtype="fp32")[0])
    if mode == "lora":
        model, _ = load("tiny", dtype="fp32", adapter=str(tmp_path / "run" / "adapter"))
        changed = {
            n for n, p in tensors(model).items() if n in base and not torch.equal(p, base[n])
        }
        assert changed == {n for n in base if n.startswith("multi_modal_projector.")}
        assert sum(".lora_" in n for n in tensors(model)) == 2 * 7 * 4
    else:
        model, _ = load(str(tmp_path / "run" / "model"), dtype="fp32")
        same = {n for n, p in tensors(model).items() if torch.equal(p, base[n])}
        # the parts of the tower that are never run
        assert all("layers.4." in n or "post_layernorm" in n for n in same)


def test_a_step_is_the_same_in_one_micro_batch_or_four(data, tmp_path):
    first = run(
        data,
        tmp_path / "a",
        "--max-steps",
        "3",
        "--max-grad-norm",
        "0",
        "--grad-accum",
        "4",
        batch_size=2,
    )
    second = run(data, tmp_path / "b", "--max-steps", "3", "--max-grad-norm", "0", batch_size=8)
    for a, b in zip(first, second, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-4
        )


def test_the_loss_is_on_answers_and_their_end_alone(data):
    model, processor = load("tiny", dtype="fp32")
    records = read_records(data / "train.json")
    batch = collate([Dataset(records, processor)[i] for i in range(4)])
    for ids, labels, record in zip(batch["input_ids"], batch["labels"], records):
        learned = ids[labels != -100]
        assert (
            processor.tokenizer.decode(learned.tolist()).strip() == record.messages[-1]["content"]
        )
        assert learned[-1] == processor.tokenizer.eos_id


def test_bf16_keeps_what_is_trained_in_fp32(data, tmp_path):
    run(data, tmp_path / "run", "--max-steps", "2", "--workers", "1", precision="bf16")
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32} and any(
        t.abs().sum() > 0 for n, t in saved.items() if "lora_B" in n
    )


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--data", "absent.json"], "absent.json"),
        (["--data", "toy:poems"], "toy:poems"),
        (["--recipe", "nothing"], "nothing"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--model", "/etc"], "/etc: holds no config.json"),
        (["--betas", "0.9"], "--betas"),
        (["--lora-targets", "c_proj"], "--lora-targets: 'c_proj'"),
        (["--max-length", "70"], "--max-length: 24 of 24 records have more than 70"),
        (
            ["--max-length", "1025"],
            "--max-length: 1025 tokens were asked for, and the model's context is 1024",
        ),
        (["--device", "cuda:9"], "--device: cuda"),
        (["--device", "tpu"], "--device: 'tpu'"),
        (["--template", "poem"], "--template: poem"),
        (["--template", "chatml"], "--template: chatml needs"),
        (["--train", "all"], "--train: .all. is not one of"),
        (["--train", "last:9"], "last:9"),
        (["--warmup-steps", "50"], "--warmup-steps: 50"),
        (["--batch-size", "25"], "--batch-size: 24 records"),
        (["--save-every", "5s"], "--save-every"),
        (["--eval-metrics", "beauty", "--eval-data", "VAL"], "--eval-metrics: 'beauty'"),
        (["--optimizer", "torch.optim:Adamw"], "--optimizer: torch.optim:Adamw"),
        (["--optimizer", "torch.optim:LBFGS"], "--optimizer: torch.optim:LBFGS"),
        (["--log", "paper"], "--log"),
        (["--resume", "no/checkpoint"], "--resume: no/checkpoint"),
        (["--lr", "0"], "--lr"),
        (["--timeout", "1e30"], "--timeout"),
        (["--image-folder", ""], "--image-folder: is empty"),
        (["--lora-dropout", "1"], "--lora-dropout: 1"),
        (
            ["--eval-data", "VAL", "--max-new-tokens", "1020"],
            "--max-new-tokens: 1020 and the .* tokens of record captions-val-000000 .* context of "
            "1024",
        ),
        (["--device", "meta"], "--device: meta is not"),
        (["--device", "xpu"], "--device: xpu is not"),
        (["--lora-alpha", "2e6"], "--lora-alpha: 2000000.0 was given"),
        (["--lora-r", "2000000000"], "--lora-r: 2000000000 is above the model's width"),
        (["--epochs", "1e9"], "--epochs: 1e.09"),
        (["--max-steps", "2000000000"], "--max-steps: 2000000000 steps would be 1.6e.10 rows"),
        *(
            (["--lora-targets", regex], "--lora-targets: .* at most two repetitions")
            for regex in ("(.*)*x", "(a|a)+x", ".*.*.*x", "(", "a{99999999999}")
        ),
        (["--betas", "0.9,1"], "--betas: .* two numbers below 1"),
        (["--save-every", "0m"], "--save-every: 0m"),
        # what would be ignored
        (
            ["--train", "full", "--lora-alpha", "8"],
            "--lora-alpha: has no effect without --train lora",
        ),
        (["--train", "full", "--lora-r", "8"], "--lora-r: has no effect without --train lora"),
        (["--train", "projector", "--dora"], "--dora: has no effect"),
        (["--no-train-projector", "--train", "projector"], "nothing is left to"),
        (
            ["--train", "last:1", "--projector-lr", "1"],
            "--projector-lr: has no effect without --train-projector",
        ),
        (["--vision-lr", "1"], "--vision-lr: has no effect without --train-vision"),
        (["--packing", "--group-by-length"], "--group-by-length: with --packing"),
        (
            ["--optimizer", "torch.optim:SGD", "--betas", "0.5,0.9"],
            "--betas: torch.optim:SGD does not take it",
        ),
        (
            ["--optimizer", "torch.optim:Rprop", "--weight-decay", "0.1"],
            "--weight-decay: torch.optim:Rprop does not",
        ),
        (["--toy-train", "9"], "--toy-train: has no effect"),
        (["--data", "toy:captions", "--image-folder", "x"], "--image-folder: has no effect"),
        (["--eval-every", "2"], "--eval-every: has no effect without --eval-data"),
        (["--samples", "2"], "--samples: has no effect"),
        (
            ["--best-metric", "loss", "--eval-data", "VAL"],
            "--best-metric: has no effect without --eval-every",
        ),
        (
            ["--early-stopping", "2", "--eval-every", "2", "--eval-data", "VAL"],
            "--early-stopping: has no effect without --best-metric",
        ),
        (
            ["--best-metric", "bleu", "--eval-every", "2", "--eval-data", "VAL"],
            "--best-metric: bleu is not evaluated",
        ),
        (["--cpu-offload", "--device", "cpu"], "--cpu-offload: "),
        (["--keep", "3", "--save-every", "0"], "--keep: has no effect"),
        (
            ["--save-every", "0", "--best-metric", "loss", "--eval-every", "2"],
            "--best-metric: keeps",
        ),
    ],
)
def test_mistakes_are_one_line_before_weights_are_read_and_leave_nothing(
    data, tmp_path, monkeypatch, argv, named
):
    monkeypatch.setattr(
        sys.modules["llava_min.load"], "load_weights", lambda *a: pytest.fail("weights were read")
    )
    argv = [str(data / "val.json") if a == "VAL" else a for a in argv] + (
        [] if argv[0] == "--data" else ["--data", str(data / "train.json")]
    )
    with pytest.raises(UserError, match=named) as e:
        train.main([*argv, "--out", str(tmp_path / "run")])
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_what_decides_the_weights_of_the_end_is_no_idle_line_of_a_recipe(tmp_path):
    path, check = (
        tmp_path / "mine.toml",
        lambda *argv: train.settings.check_settings(
            parse(train.TrainConfig, [*argv], "A test.", recipes=train.RECIPES), argv
        ),
    )
    path.write_text('data = "x"\ntrain = "full"\nlora_r = 8\n')
    check("--recipe", str(path))
    path.write_text('data = "x"\nbest_metric = "loss"\n')
    with pytest.raises(UserError, match="best_metric: has no effect without eval_data"):
        check("--recipe", str(path))
    # a regex may name layers of the tower
    check("--data", "x", "--lora-targets", "vision_tower.*q_proj", "--vision-lr", "1")


def test_every_setting_has_its_help():
    names = [f.name for f in dataclasses.fields(train.TrainConfig)]
    assert list(comments(train.TrainConfig)) == names


def test_the_tables_of_settings_name_settings():
    """And each message can be made, whatever the values are."""
    config = train.TrainConfig()
    labels = {name: f"--{name}" for name in vars(config)}
    for field, _, message in train.settings.RULES:
        assert hasattr(config, field) and message.format(value="x", tasks="y", **labels)
    for fields, _, what in train.settings.NEEDS:
        assert all(hasattr(config, field) for field in fields.split()) and what.format(**labels)


def test_a_damaged_picture_of_the_first_step_is_found_before_weights_are_read(
    data, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        sys.modules["llava_min.load"], "load_weights", lambda *a: pytest.fail("weights were read")
    )
    folder = shutil.copytree(data, tmp_path / "data")
    for path in (folder / "images").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="record captions-train-.*: is damaged or cut short"):
        run(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_number_refuses_what_is_none():
    kinds, asked = typing.get_type_hints(train.TrainConfig), 0
    for name in (
        n
        for n, kind in kinds.items()
        if kind in (int, float, int | None, float | None, tuple[float, ...])
    ):
        flag = "--" + name.replace("_", "-")
        for value in ("-1", "nan", "inf", "1e400", "some", ""):
            with pytest.raises(
                UserError, match=rf"{flag}: .*(is not a|was given, expected a)"
            ) as e:
                parse(train.TrainConfig, [f"{flag}={value}"], "A test.")
            assert "\n" not in str(e.value)
            asked += 1
    assert asked >= 30 * 6


def test_an_existing_run_is_not_written_over(data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="exists already"):
        run(data, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_runs_are_numbered(tmp_path):
    from llava_min.training.run_folder import choose_folder

    for n in (1, 2, 10):
        (tmp_path / f"toy-{n}").mkdir()
    (tmp_path / "toy-x").mkdir()
    names = [
        Path(choose_folder(None, resume, tmp_path, name)[0]).name
        for resume in ("never", "auto")
        for name in ("toy", "other")
    ]
    assert names == ["toy-11", "other-1", "toy-10", "other-1"]


# ---- on a model so small that a run takes half a second


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return make_home(tmp_path_factory.mktemp("train"))


def losses(log: list[dict]) -> list[float]:
    return [x["loss"] for x in log if "loss" in x]


@pytest.mark.parametrize(
    "mode, trained",
    [
        (["--train", "lora"], {"lora", "projector"}),
        (["--train", "lora", "--dora", "--rslora"], {"lora", "projector"}),
        (["--train", "full"], {"tower", "projector", "language"}),
        (["--train", "freeze_vision"], {"projector", "language"}),
        (["--train", "projector"], {"projector"}),
        (["--train", "last:1"], {"language"}),
        (["--train", "lora", "--no-train-projector"], {"lora"}),
        (["--train", "projector", "--train-vision"], {"projector", "tower"}),
    ],
)
def test_what_is_chosen_moves_and_nothing_else(home, tmp_path, mode, trained):
    out = tmp_path / "run"
    training.run(
        home, out, *mode[:2], "--batch-size", "6", "--max-steps", "3", switches=tuple(mode[2:])
    )
    base = tensors(load(str(home / "model"), dtype="fp32")[0])
    if mode[1] == "lora":
        model = load(str(home / "model"), dtype="fp32", adapter=str(out / "adapter"))[0]
    else:
        model = load(str(out / "model"), dtype="fp32")[0]
    kinds = {
        "multi_modal_projector": "projector",
        "vision_tower": "tower",
        "language_model": "language",
        "lm_head": "language",
    }
    now = {n.replace(".base.", "."): p for n, p in tensors(model).items()}
    moved = {
        "lora" if ".lora_" in n else kinds[n.split(".")[0]]
        for n, p in now.items()
        if n not in base or not torch.equal(p, base[n])
    }
    assert moved == trained


@pytest.mark.parametrize(
    "change", [["--gradient-checkpointing"], ["--group-by-length"], ["--deterministic"], ["--exif"]]
)
def test_switches_that_change_no_number(home, tmp_path, change):
    # one step has all records, so their order is all one
    shape = ("--batch-size", "24", "--max-steps", "4", "--train", "full")
    want = training.run(home, tmp_path / "a", *shape)
    found = training.run(home, tmp_path / "b", *shape, switches=tuple(change))
    assert torch.are_deterministic_algorithms_enabled() == (change == ["--deterministic"])
    torch.use_deterministic_algorithms(False)
    assert losses(found) == pytest.approx(losses(want), rel=1e-5)


def test_packed_rows_teach_the_same(home, tmp_path):
    want = training.run(
        home, tmp_path / "a", "--batch-size", "24", "--max-steps", "3", "--train", "full"
    )
    dataset = Dataset(read_records(home / "data" / "train.json"), load(str(home / "model"))[1])
    # of a step that has all records
    rows = len(pack(dataset.lengths(exact=True), 256, seed=0, epoch=0))
    found = training.run(
        home,
        tmp_path / "b",
        "--batch-size",
        str(rows),
        "--max-steps",
        "3",
        "--train",
        "full",
        "--max-length",
        "256",
        switches=("--packing",),
    )
    assert rows < 24 and losses(found) == pytest.approx(losses(want), rel=1e-5)


def test_blocks_are_recomputed_with_the_same_dropout(home, tmp_path):
    shape = ("--batch-size", "6", "--max-steps", "3", "--lora-dropout", "0.5")
    want = training.run(home, tmp_path / "a", *shape)
    assert losses(
        training.run(home, tmp_path / "b", *shape, switches=("--gradient-checkpointing",))
    ) == losses(want)


def test_recomputing_keeps_less(home):
    model = load(str(home / "model"), dtype="fp32")[0].requires_grad_(True).train()
    ids = torch.randint(3, 300, (2, 30))

    def kept() -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.append(x.nbytes) or x, lambda x: x
        ):
            model.loss(ids, ids)
        return sum(sizes)

    before = kept()
    enable_gradient_checkpointing(model, dropout=False)
    assert kept() < 0.8 * before


def test_compiled_blocks_are_the_same(home, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: calls.append(f) or f)
    model = load(str(home / "model"), dtype="fp32")[0]
    compile_blocks(model)
    assert len(calls) == 2 + 3 and sum(isinstance(f.__self__, Block) for f in calls) == 2


def test_noise_is_uniform_on_words_alone_and_only_in_training(home):
    model = load(str(home / "model"), dtype="fp32")[0]
    embed, ids = model.language_model.embed_tokens, torch.randint(3, 300, (4, 50))
    clean = embed(ids)
    add_neftune(model, 5.0)
    assert torch.equal(embed(ids), clean)
    model.train()
    noise, bound = embed(ids) - clean, 5 / (50 * 16) ** 0.5
    assert (
        noise.abs().max() <= bound * 1.001
        and abs(noise.std().item() / (bound / 3**0.5) - 1) < 0.05
        and abs(noise.mean()) < bound / 20
    )
    x = torch.full((1, 10), 5)
    x[0, 2:6] = model.config.image_token_id
    pixels = torch.randn(1, 3, 28, 28)
    assert torch.equal(model.embed(x, pixels)[:, 2:6], model.encode_images(pixels))


def test_an_optimizer_of_ones_own_is_saved_and_resumed(home, tmp_path):
    shape = (
        "--optimizer",
        "torch.optim:NAdam",
        "--batch-size",
        "6",
        "--max-steps",
        "4",
        "--save-every",
        "2",
        "--keep",
        "9",
    )
    training.run(home, tmp_path / "a", *shape)
    training.run(
        home,
        tmp_path / "b",
        *shape,
        "--resume",
        str(tmp_path / "a" / "checkpoints" / "step-000002"),
    )
    assert training.final(tmp_path / "a") == training.final(tmp_path / "b")


def test_evaluation_in_the_loop_keeps_the_best_and_stops_early(home, tmp_path, capsys):
    """With a learning rate that ruins the model after the first steps, the best loss comes early."""
    out = tmp_path / "run"
    log = training.run(
        home,
        out,
        "--batch-size",
        "6",
        "--max-steps",
        "20",
        "--lr",
        "0.5",
        "--eval-data",
        home / "data" / "val.json",
        "--eval-every",
        "2",
        "--max-new-tokens",
        "2",
        "--best-metric",
        "loss",
        "--early-stopping",
        "2",
        "--save-every",
        "100",
        "--train",
        "full",
        "--keep",
        "1",
    )
    found = {x["step"]: x["eval_loss"] for x in log if "eval_loss" in x}
    best = min(found, key=found.get)
    assert max(found) == best + 4 < 20
    assert (out / "best").resolve().name == f"step-{best:06}" and (
        out / "last"
    ).resolve().name == f"step-{max(found):06}"
    assert f"was best at step {best}" in capsys.readouterr().err
    model, processor = load(str(out / "model"), dtype="fp32")
    batch = collate(
        [Dataset(read_records(home / "data" / "val.json"), processor)[i] for i in range(6)]
    )
    with torch.no_grad():
        nll = model.loss(batch["input_ids"], batch["labels"], batch["pixel_values"])
    assert float(nll / (batch["labels"][:, 1:] != -100).sum()) == pytest.approx(
        found[best], rel=1e-4
    )
    samples = lines(out, "samples.jsonl")
    assert {row["step"] for row in samples} == set(found) and set(samples[0]) == {
        "step",
        "id",
        "earlier",
        "prompt",
        "prediction",
        "reference",
        "images",
    }
    assert (out / "report.html").exists()


def test_the_optimizer_has_the_rates_the_decay_and_the_betas_that_were_asked_for(
    home, tmp_path, monkeypatch
):
    seen, sizes, step = [], [], torch.optim.AdamW.step

    def look(self):
        seen.append({(g["lr"], g["weight_decay"], g["betas"]) for g in self.param_groups})
        sizes.append(
            {
                rate: sum(
                    p.numel() for g in self.param_groups if g["lr"] == rate for p in g["params"]
                )
                for rate, _, _ in seen[-1]
            }
        )
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    log = training.run(
        home,
        tmp_path / "run",
        "--train",
        "full",
        "--batch-size",
        "6",
        "--max-steps",
        "6",
        "--warmup-steps",
        "2",
        "--schedule",
        "linear",
        "--lr",
        "0.0625",
        "--projector-lr",
        "0.03125",
        "--vision-lr",
        "0.125",
        "--weight-decay",
        "0.75",
        "--betas",
        "0.5,0.875",
    )
    factors = (0, 0.5, 1, 0.75, 0.5, 0.25)
    # the first is a trial
    assert seen[1:] == [
        {
            (rate * f, decay, (0.5, 0.875))
            for rate in (0.0625, 0.03125, 0.125)
            for decay in (0.75, 0.0)
        }
        for f in factors
    ]
    assert [x["lr"] for x in log if "lr" in x] == [0.0625 * f for f in factors]
    assert sizes[3][0.03125] == sum(
        p.numel() for p in load(str(home / "model"))[0].multi_modal_projector.parameters()
    )


def test_gradients_are_clipped_to_the_norm_that_was_asked_for(home, tmp_path):
    sgd = (
        "--train",
        "full",
        "--optimizer",
        "torch.optim:SGD",
        "--lr",
        "1",
        "--warmup-steps",
        "0",
        "--warmup-ratio",
        "0",
        "--batch-size",
        "24",
        "--max-steps",
        "1",
    )
    (x,) = training.run(home, tmp_path / "run", *sgd, "--max-grad-norm", "0.03125")
    was, now = (
        tensors(load(str(folder / "model"), dtype="fp32")[0]) for folder in (home, tmp_path / "run")
    )
    assert x["grad_norm"] > 0.1 and sum(
        (now[n] - was[n]).square().sum() for n in was
    ).sqrt() == pytest.approx(0.03125, rel=1e-2)


def test_settings_that_change_a_number(home, tmp_path):
    """One step of all records at a rate of 0: what differs is what the setting does."""
    from safetensors.torch import load_file

    one = lambda name, *more: (
        losses(
            training.run(home, tmp_path / name, "--batch-size", "24", "--warmup-steps", "1", *more)
        ),
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"),
    )
    (plain, first), (noisy, _), (_, other) = (
        one("a"),
        one("b", "--neftune-alpha", "50"),
        one("c", "--seed", "1"),
    )
    assert len(plain) == 1 and plain != noisy
    assert all(torch.equal(x, other[name]) == ("lora_A" not in name) for name, x in first.items())


def test_rows_of_one_kind_share_a_step(home, tmp_path, monkeypatch):
    seen, loss = [], Llava.loss
    monkeypatch.setattr(
        Llava,
        "loss",
        lambda self, **batch: (
            seen.append(len(batch.get("pixel_values", ()))) or loss(self, **batch)
        ),
    )
    both = f"{home / 'data' / 'train.json'},{home / 'data' / 'text.json'}"
    training.run(
        home, tmp_path / "run", "--data", both, "--batch-size", "6", switches=("--group-by-length",)
    )
    assert sorted(seen) == [0] * 4 + [6] * 4


def test_the_evaluation_asks_as_the_flags_say(home, tmp_path, monkeypatch):
    from llava_min.data.formats import Record

    turned, beams, open_images, generate = [], [], Record.open_images, predict.generate
    monkeypatch.setattr(
        Record,
        "open_images",
        lambda self, exif=False: (
            turned.append(exif or not isinstance(self.images[0], Path)) or open_images(self, exif)
        ),
    )
    monkeypatch.setattr(
        predict,
        "generate",
        lambda *a, **k: beams.append((k["num_beams"], k["max_new_tokens"])) or generate(*a, **k),
    )
    training.run(
        home,
        tmp_path / "run",
        "--eval-data",
        home / "data" / "val.json",
        "--batch-size",
        "24",
        "--warmup-steps",
        "1",
        "--num-beams",
        "2",
        "--max-new-tokens",
        "3",
        switches=("--exif",),
    )
    assert set(turned) == {True} and set(beams) == {(2, 3)}


def test_what_the_scores_of_an_evaluation_do_not_tell(home, tmp_path, capsys):
    pytest.importorskip(
        "sacrebleu", reason="what computes this metric; pip install -e '.[metrics]'"
    )
    log = training.run(
        home,
        tmp_path / "run",
        "--eval-data",
        home / "data" / "val.json",
        "--batch-size",
        "24",
        "--max-steps",
        "1",
        "--warmup-steps",
        "1",
        "--max-new-tokens",
        "3",
        "--eval-metrics",
        "bleu",
    )
    said, found = capsys.readouterr().err, [x for x in log if "eval_bleu" in x]
    cut = "6 of 6 answers were cut at --max-new-tokens 3, before their end: questions-val-000000, "
    assert (
        [x["eval_cut_answers"] for x in found] == [6, 6]
        and f"step 1: {cut}" in said
        and "raise it" in said
    )
    assert all(
        x["remarks"][0].startswith("bleu: 6 of 6 examples have fewer than 4 words") for x in found
    )
    assert f"step 0: {found[0]['remarks'][0]}\n" in said
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f"Last evaluation: {cut}" in page and ">eval_cut_answers<" in page
    log = training.run(
        home,
        tmp_path / "all",
        "--eval-data",
        home / "data" / "val.json",
        "--batch-size",
        "24",
        "--max-steps",
        "1",
        "--warmup-steps",
        "1",
        "--max-new-tokens",
        "3",
    )
    assert (
        "bleu" not in capsys.readouterr().err
        and len([x for x in log if "eval_loss" in x][0]["remarks"]) == 1
    )


def test_early_stopping_counts_evaluations_since_the_last_gain(home, tmp_path, monkeypatch):
    """As good as before is no gain; the answers that are shown at the end are those of the best."""
    scores, shown = iter((0.1, 0.0, 0.2, 0.2, 0.1, 0.9)), []
    monkeypatch.setattr(
        predict, "score", lambda rows, names: {"exact_match": {"score": next(scores)}}
    )
    monkeypatch.setattr(
        "llava_min.training.run.show_samples", lambda folder, last: shown.append(last)
    )
    log = training.run(
        home,
        tmp_path / "run",
        "--eval-data",
        home / "data" / "val.json",
        "--batch-size",
        "6",
        "--max-steps",
        "9",
        "--eval-every",
        "1",
        "--max-new-tokens",
        "1",
        "--best-metric",
        "exact_match",
        "--early-stopping",
        "2",
        "--save-every",
        "100",
    )
    assert [x["step"] for x in log if "eval_loss" in x] == [0, 1, 2, 3, 4] and shown == [2]


def test_a_longer_record_is_shortened_where_that_was_asked_for(home, tmp_path, capsys):
    turns = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "It."}]
    (tmp_path / "long.json").write_text(
        json.dumps(
            [{"id": str(i), "conversations": turns * (40 if i == 3 else 1)} for i in range(6)]
        )
    )
    training.run(
        home,
        tmp_path / "run",
        "--data",
        str(tmp_path / "long.json"),
        "--batch-size",
        "6",
        "--warmup-steps",
        "1",
        "--max-length",
        "100",
        "--too-long",
        "shorten",
    )
    assert "1 of 6 records lost their last turns: 3 (" in capsys.readouterr().err


def test_bad_pictures_on_the_way_are_listed(home, tmp_path, monkeypatch):
    from llava_min.data import records

    shutil.copytree(home / "data", tmp_path / "data")
    picture = next((tmp_path / "data" / "images").glob("*train*"))
    picture.write_bytes(picture.read_bytes()[:60])
    monkeypatch.setattr(
        records.SkippedRecords.__init__, "__defaults__", (None, 0.1)
    )  # of 24 records
    training.run(
        home,
        tmp_path / "run",
        "--data",
        str(tmp_path / "data" / "train.json"),
        "--batch-size",
        "24",
        "--warmup-steps",
        "1",
        switches=("--skip-bad",),
    )
    assert picture.name in (tmp_path / "run" / "skipped.txt").read_text()


def test_checkpoints_are_written_at_the_ends_of_epochs_and_only_where_they_fit(
    home, tmp_path, monkeypatch
):
    shape = ("--batch-size", "6", "--epochs", "3", "--lora-r", "2", "--keep", "9", "--save-every")
    training.run(home, tmp_path / "a", *shape, "epoch")
    assert sorted(p.name for p in (tmp_path / "a" / "checkpoints").iterdir()) == [
        f"step-{n:06}" for n in (4, 8, 12)
    ]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(UserError, match="two checkpoints take"):
        training.run(home, tmp_path / "b", *shape, "epoch")


def test_an_adapter_says_how_it_was_asked(home, tmp_path):
    training.run(
        home,
        tmp_path / "run",
        "--batch-size",
        "24",
        "--warmup-steps",
        "1",
        "--template",
        "vicuna_v1",
        "--image-aspect-ratio",
        "crop",
    )
    assert read_settings(tmp_path / "run" / "adapter") == ("crop", "vicuna_v1")
    training.run(home, tmp_path / "plain", "--batch-size", "24", "--warmup-steps", "1")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert (
        (config["image_aspect_ratio"], config["template"])
        == read_settings(tmp_path / "plain" / "adapter")
        == ("pad", "llava_hf")
    )


def test_the_rows_of_a_step_are_at_most_what_the_model_holds():
    assert [
        row_length(None, 4096),
        row_length(None, 512),
        row_length(512, 512),
        row_length(9, 512),
    ] == [2048, 512, 512, 9]
    with pytest.raises(
        UserError, match="513 tokens were asked for, and the model's context is 512"
    ):
        row_length(513, 512)


@pytest.mark.parametrize(
    "mode, place",
    [("lora", (Llava, "hidden_states", 2)), ("full", (predict, "generate", 1))],
    ids=["loss", "answers"],
)
def test_a_signal_in_an_evaluation_of_two_ranks_is_not_waited_for(home, tmp_path, mode, place):
    """One of them gets it, in the evaluation at step 2; the run then goes on as if nothing had
    been.
    """
    shape = (
        "--train",
        mode,
        "--max-steps",
        "4",
        "--eval-data",
        home / "data" / "val.json",
        "--eval-every",
        "2",
        "--eval-batch-size",
        "1",
        "--max-new-tokens",
        "20",
        "--save-every",
        "9",
    )

    def work(rank: int):
        patch, since = pytest.MonkeyPatch(), []
        if rank:
            act = lambda: (since.append(0), os.kill(os.getpid(), signal.SIGTERM))
            at_call(patch, Log, "step", 2, lambda: at_call(patch, *place, act))
        run = Llama.forward
        patch.setattr(
            Llama,
            "forward",
            lambda *a, **k: (
                since and since.append(0),
                (tmp_path / f"after-{rank}").write_text(str(len(since))),
                run(*a, **k),
            )[2],
        )
        return train.main(training.argv(home, tmp_path / "2", "--batch-size", "3", *shape))

    assert ranks(2, work, tmp_path) == [143, 143], (tmp_path / "log-0").read_text()
    assert "saved step 2, resume with" in (tmp_path / "log-0").read_text().splitlines()[-1]
    # runs of the decoder after the signal, of some 60
    assert int((tmp_path / "after-1").read_text()) <= 4
    training.run(home, tmp_path / "2", "--batch-size", "6", *shape, "--resume", "auto")
    training.run(home, tmp_path / "1", "--batch-size", "6", *shape)
    one, two = (losses(lines(tmp_path / n)) for n in "12")
    assert len(one) == 4 and two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("hangup", [False, True])
def test_who_loses_the_terminal_loses_no_training(home, tmp_path, hangup):
    """Its progress has no reader any more; with SIGHUP it saves and stops, without it goes on to
    the end.
    """
    command = [
        sys.executable,
        train.__file__,
        *training.argv(
            home, tmp_path / "run", "--batch-size", "1", "--epochs", "3" if not hangup else "999"
        ),
    ]
    run = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    while not (line := run.stderr.readline()).startswith(b"3/"):
        assert line
    run.stderr.close()
    if hangup:
        run.send_signal(signal.SIGHUP)
    assert run.wait(60) == (143 if hangup else 0)
    assert (tmp_path / "run" / ("last" if hangup else "adapter")).is_dir()


def test_a_bad_picture_on_the_way(home, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(home / "data", data)
    picture = next((data / "images").glob("*train*"))
    picture.write_bytes(picture.read_bytes()[:60])
    with pytest.raises(UserError, match=picture.name) as e:
        training.run(home, tmp_path / "a", "--data", str(data / "train.json"), "--workers", "1")
    assert "\n" not in str(e.value)


# ---- the plan


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--lora-r", "16"], "39,976,960"),
        (["--lora-r", "128"], "319,815,680"),
        (["--train", "projector"], "20,979,712"),
        (
            ["--lora-targets", "q_proj,k_proj,v_proj,o_proj,up_proj,down_proj", "--lora-r", "8"],
            "16,121,856",
        ),
    ],
)
def test_a_dry_run_needs_no_weights_and_no_data(tmp_path, capsys, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--model", "7b", "--recipe", "lora-7b", "--dry-run", *argv]) is None
    text = capsys.readouterr().out
    assert said in text and "gradients" in text and "counted for full rows of 2048 tokens" in text
    assert not list(tmp_path.iterdir())


def parts(text: str) -> dict[str, str]:
    """What a dry run prints of the memory: part -> GiB."""
    lines = [line.removesuffix(" GiB") for line in text.splitlines() if line.endswith(" GiB")]
    return dict(line.strip().rsplit(maxsplit=1) for line in lines)


@pytest.mark.parametrize(
    "flags",
    [
        "--lora-r 8 --rslora --dora --lora-dropout 0.1",
        "--quantize nf4",
        "--train last:2",
        "--train full --no-train-vision --gradient-checkpointing",
        "--train-vision --no-train-projector",
        "--precision fp32 --batch-size 4 --grad-accum 2",
    ],
)
def test_a_dry_run_and_plan_count_the_same(flags, capsys):
    from llava_min.load import TINY, read_config
    from llava_min.training.fake_step import step_of
    from llava_min.training.memory import gib, step_memory
    from llava_min.util.cli import parse

    argv = ["--data", "toy:captions", *flags.split()]
    train.main([*argv, "--dry-run"])
    said = parts(capsys.readouterr().out)
    config = parse(train.TrainConfig, argv, "A test.")
    config.max_length = 1024
    memory = step_memory(read_config(TINY)[0], step_of(config, 1))
    assert said["in all"] == gib(memory.total) and said["weights"] == gib(memory.weights)


def test_a_dry_run_of_a_quantized_model_counts_its_weights_one_by_one(capsys):
    train.main(["--model", "7b", "--data", "toy:captions", "--dry-run", "--quantize", "nf4"])
    text = capsys.readouterr().out
    assert "6,607,605,760" in text and float(parts(text)["weights"]) < 4.5
    for flags, message in (("nf5", "expected one of int8"), ("awq4", "calibration")):
        with pytest.raises(UserError, match=message):
            train.main(
                ["--model", "7b", "--data", "toy:captions", "--dry-run", "--quantize", flags]
            )


def test_a_dry_run_counts_steps_and_bytes(home, tmp_path, capsys):
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "config.json").write_text((home / "model" / "config.json").read_text())
    train.main(
        [
            "--model",
            str(folder),
            "--data",
            str(home / "data" / "train.json"),
            "--dry-run",
            "--batch-size",
            "5",
            "--epochs",
            "2",
            "--train",
            "full",
        ]
    )
    text = capsys.readouterr().out
    assert "24 records, 10 steps" in text and "a step is 5 rows" in text
    # 39,976,960 of 7,103,404,032 are trained
    train.main(
        [
            "--model",
            "7b",
            "--data",
            str(home / "data" / "train.json"),
            "--dry-run",
            "--no-train-projector",
        ]
    )
    said = parts(capsys.readouterr().out)
    assert (said["weights"], said["gradients"], said["optimizer"]) == ("13.31", "0.15", "0.30")
    assert (
        named_config("llava-hf/llava-1.5-13b-hf") == SIZES["13b"]
        and named_config("mistral-7b") == SIZES["mistral-7b"]
    )
    with pytest.raises(UserError, match="its name tells no size"):
        named_config("someone/model")
    # the user's own have to be there; a recipe's, only to train
    for flag in ("--data", "--eval-data"):
        files = {
            "--data": home / "data" / "train.json",
            "--eval-data": home / "data" / "val.json",
            flag: "absent.json",
        }
        with pytest.raises(UserError, match="absent.json: no such file"):
            train.main(
                [
                    "--model",
                    str(folder),
                    "--dry-run",
                    *(str(x) for pair in files.items() for x in pair),
                ]
            )


def test_shapes_are_of_what_is_here_and_else_of_a_size(tmp_path, monkeypatch):
    """A folder of a size's name is read, as training reads it; a hub id is only guessed at."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("fetched"))
    assert named_config("7b") == config_of("7b") == SIZES["7b"]
    tiny = Path(train.__file__).parent / "llava_min" / "tiny"
    (tmp_path / "7b").mkdir()
    (tmp_path / "7b" / "config.json").write_bytes((tiny / "config.json").read_bytes())
    assert named_config("7b") == config_of("7b") == named_config("tiny") != SIZES["7b"]
    assert named_config("me/llava-7b") == SIZES["7b"] and named_config("me/tiny") != SIZES["7b"]
    with pytest.raises(UserError, match="a file, expected a checkpoint's folder"):
        named_config(str(tmp_path / "7b" / "config.json"))


@pytest.mark.parametrize("name", sorted(p.stem for p in train.RECIPES.glob("*.toml")))
def test_every_recipe_is_planned_without_weights(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["--model", "1b"] if name == "qwen-clip" else []
    assert train.main(["--recipe", name, "--dry-run", *given]) is None
    assert "memory of a rank" in capsys.readouterr().out and not list(tmp_path.iterdir())
