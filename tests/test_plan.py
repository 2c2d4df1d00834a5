"""`plan`: the notes' figures are reproduced, what is proposed fits and is a command that train.py
takes, and mistakes are one line.
"""

import json
import re
import shlex
from dataclasses import fields, replace

import pytest
import torch
from conftest import load_script

from llava_min.errors import UserError
from llava_min.quant.folder import Stored
from llava_min.quant.methods import bytes_of
from llava_min.tools import plan, plan_fit
from llava_min.tools import plan_tables as tables
from llava_min.tools.quantize import main as quantize
from llava_min.training import dry_run as dry_run_page
from llava_min.training.fake_step import Step, step_of
from llava_min.training.memory import Memory, step_memory
from llava_min.util.cli import parse
from llava_min.util.sizes import SIZES

train = load_script("train")
SMALL = replace(
    SIZES["300m"], text=replace(SIZES["300m"].text, num_hidden_layers=2, vocab_size=32064)
)


def run(*argv, capsys) -> str:
    plan.main(list(argv))
    return capsys.readouterr().out


def test_the_notes_figures_are_reproduced_and_explained():
    lines = [*tables.parameters(SIZES["7b"], "7b"), *tables.notes()]
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 80
    assert "7,063,427,072 parameters" in text and "105.25 GiB" in text and "52.63" in text
    assert "24.74 / 12.37 / 6.18 / 3.09 GiB" in text
    assert "776.03 MiB" in text and "98.96 GiB" in text


def test_every_way_of_training_and_answering_is_in_the_tables(capsys):
    out = run("--model", "tiny", "--max-length", "256", capsys=capsys)
    rows = [line for line in out.splitlines() if re.match(r"  (full|freeze|lora|QLoRA)", line)]
    assert len(rows) == 8 and all(len(re.findall(r"\d+\.\d\d| -", row)) == 4 for row in rows)
    assert rows[-1].split()[-1] == "-"  # int4's groups do not fit into the tiny model
    for method in ("int8", "int4", "hqq1", "nf4", "w8a8"):
        assert f"\n  {method:26}" in out


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--batch-size", "16"], ["training, 1 of 8: full, fp32", "answering, 12 of 12: w8a8"]),
        (["--train", "freeze_vision"], ["training, 4 of 4: 8 GPUs"]),
        (
            ["--gpus", "8xRTX4090", "--records", "12345678"],
            ["trying freeze_vision", "trying freeze_vision, with checkpointing"],
        ),
        (["--gpus", "8x3", "--recipe", "toy", "--lora-r", "8"], ["trying lora of rank 8"]),
    ],
)
def test_it_fits_80_columns_and_shows_signs_of_life(argv, said, capsys, monkeypatch):
    if "--gpus" in argv:
        monkeypatch.setattr(plan_fit, "largest_batch", lambda *a: 2)
    plan.main(["--model", "tiny", "--max-length", "512", *argv])
    captured = capsys.readouterr()
    assert max(map(len, captured.out.splitlines())) <= 80
    assert set(said) <= set(captured.err.splitlines())
    if "--gpus" in argv:
        line = re.search(r"^torchrun (.*\\\n)+.*$", captured.out, re.M)[0]
        words = shlex.split(line.replace("\\\n", ""))
        config = parse(train.TrainConfig, words[3:], "A test.", recipes=train.RECIPES)
        assert (config.batch_size, config.grad_accum) == (2, 8)


@pytest.mark.parametrize("method", ["nf4", "int4", "int8", "hqq2"])
def test_quantized_bases_take_the_bytes_they_are_stored_in(method):
    step = Step("lora", max_length=1024, gradient_checkpointing=True)
    plain, small = step_memory(SMALL, step), step_memory(SMALL, replace(step, quantize=method))
    wide, mlp = SMALL.text.hidden_size, SMALL.text.intermediate_size
    shapes = [(wide, wide)] * 4 + [(mlp, wide)] * 2 + [(wide, mlp)]
    stored = 2 * sum(bytes_of(method, shape) for shape in shapes)
    in_16_bit = 2 * sum(2 * n * k for n, k in shapes)
    assert plain.weights - small.weights == in_16_bit - stored
    # beside what 16 bit need a weight is dequantized: whole in 16 bit, in four times fp32 at most
    assert 0 <= small.activations - plain.activations < 4 * 4 * mlp * wide
    read = [plan_fit.prefill_bytes(SMALL, torch.bfloat16, 1, 64, m) for m in (None, method)]
    assert 2 * mlp * wide <= read[1] - read[0] < 4 * 4 * mlp * wide


def test_a_quantized_checkpoint_is_planned_as_it_is_stored(capsys, tmp_path):
    stored = replace(SMALL, quantization=Stored("bitsandbytes", "nf4"))
    step = Step("lora", max_length=1024, gradient_checkpointing=True)
    assert step_memory(stored, step) == step_memory(SMALL, replace(step, quantize="nf4"))
    assert [name for name, _ in tables.ways(stored, step)] == ["QLoRA, nf4, bf16"]
    with pytest.raises(UserError, match="quantized already"):
        step_memory(stored, replace(step, quantize="int4"))
    with pytest.raises(UserError, match="only adapters learn on"):
        step_memory(stored, replace(step, train="full"))
    quantize(["tiny", str(tmp_path / "nf4")])
    out = run("--model", str(tmp_path / "nf4"), "--max-length", "256", capsys=capsys)
    assert len(re.findall("^  QLoRA, nf4", out, re.M)) == 1 and "full" not in out
    assert len(re.findall("^  nf4 ", out, re.M)) == 1 and "bf16 or fp16" not in out


def test_what_several_ranks_share_is_split_among_them():
    step = Step("full", max_length=1024)
    one, two, eight = (step_memory(SMALL, step, ranks=n) for n in (1, 2, 8))
    assert two.optimizer == one.optimizer // 2 and eight.weights < two.weights < one.weights
    assert one.gathered == 0 < two.gathered == eight.gathered
    # frozen, the tower stays whole on each
    frozen = [step_memory(SMALL, replace(step, train="lora"), ranks=n) for n in (1, 8)]
    assert frozen[1].weights > frozen[0].weights // 8 + 3e8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """--data and --image-folder for a line of train.py."""
    folder = tmp_path_factory.mktemp("data")
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    (folder / "d.json").write_text(
        json.dumps([{"id": str(i), "conversations": turns} for i in range(64)])
    )
    return folder


def dry_run(line: str, data, monkeypatch) -> None:
    """train.py --dry-run on a line that plan proposes, `\\` and all."""
    words = shlex.split(
        line.replace("DATA.json", str(data / "d.json")).replace("IMAGES", str(data))
    )
    monkeypatch.setattr(dry_run_page, "step_memory", lambda *a, **k: Memory(0, 0, 0, 0))
    train.main([*words[words.index("train.py") + 1 :], "--dry-run"])


def proposed(settings: plan.Config, fit, cards) -> str:
    return " ".join(plan_fit.train_line(fit, cards, settings))


@pytest.mark.parametrize("gpus", ["1x16", "2x8", "4xL4", "1x3"])
def test_what_is_proposed_fits_and_train_py_takes_it(gpus, data, monkeypatch, capsys):
    cards = plan_fit.read_cards(gpus)
    step = Step(max_length=1024, gradient_checkpointing=True)
    fit = plan_fit.best_fit(SMALL, step, cards, 64, plan_fit.ways(SMALL, None))
    total = step_memory(SMALL, fit.step, ranks=cards.count).total
    assert total + plan_fit.reserve(cards.count, cards.memory) <= cards.memory * 2**30
    assert fit.rows == 64 == fit.step.batch_size * fit.step.grad_accum * cards.count
    line = proposed(plan.Config(), fit, cards)
    assert line.startswith("torchrun" if cards.count > 1 else "python")
    dry_run(line, data, monkeypatch)
    out = capsys.readouterr().out
    assert f"a step is {fit.step.batch_size * fit.step.grad_accum} rows" in out  # of one process
    assert ("LoRA in language_model" in out) == (fit.step.train == "lora")


@pytest.mark.parametrize(
    "flags",
    [
        {"train": "lora", "quantize": "nf4", "dora": True, "lora_targets": ("q_proj", "v_proj")},
        {"train": "lora", "train_projector": False, "lora_dropout": 0.05, "lora_r": 4},
        {"train": "full", "train_vision": False, "precision": "fp32"},
        {"train": "last:2", "max_length": 512},
        {"recipe": "two-24gb"},
        {"recipe": "pretrain-7b", "precision": "fp16"},
    ],
)
def test_what_was_asked_for_stands_in_the_line(flags, data, monkeypatch, capsys):
    config = plan.Config(**flags, rows=32, gpus="1x500")
    if config.recipe:
        plan.take_recipe(config, flags.keys())
    config.max_length = config.max_length or 2048
    step = tables.step(config)
    way = plan_fit.Way(step.train, step.lora_r, step.quantize)
    cards = plan_fit.read_cards(config.gpus)
    monkeypatch.setattr(plan_fit, "largest_batch", lambda *a: 4)
    fit = plan_fit.best_fit(SMALL, step, cards, 32, [way])
    seen = []
    monkeypatch.setattr(dry_run_page, "step_of", lambda c, images: seen.append(c) or Step())
    dry_run(" ".join(plan_fit.train_line(fit, cards, config, flags.keys())), data, monkeypatch)
    kept = replace(step_of(seen[0], step.images), grad_accum=step.grad_accum)
    wanted = replace(step, batch_size=4, gradient_checkpointing=False)
    names = {f.name for f in fields(Step)} - ({"lora_r"} if step.train != "lora" else set())
    assert {n: getattr(kept, n) for n in names} == {n: getattr(wanted, n) for n in names}
    assert seen[0].grad_accum == 8


def test_less_memory_trains_less_and_4_bits_come_before_the_projector_alone():
    step = Step(max_length=1024, gradient_checkpointing=True)
    tried = plan_fit.ways(SMALL, None)
    order = [(way.train, way.quantize) for way in tried]
    least = step_memory(SMALL, replace(step, lora_r=16, grad_accum=2)).total - (1 << 20)
    below = (least + plan_fit.CONTEXT) / (1 - plan_fit.FRAGMENTS) / 2**30
    cards = [plan_fit.Cards(1, g) for g in (below, 4, 24)]
    fits = [plan_fit.best_fit(SMALL, step, c, 64, tried) for c in cards]
    found = [order.index((fit.step.train, fit.step.quantize)) for fit in fits]
    assert found == sorted(found, reverse=True) and found[-1] == 0
    assert order[found[0]] == ("lora", "nf4")


def test_the_7b_learns_on_12_gib_by_qlora_alone():
    step = Step("lora", gradient_checkpointing=True, grad_accum=2, lora_r=128)
    fits = lambda step, g: step_memory(SIZES["7b"], step).total + plan_fit.reserve(1, g) < g * 2**30
    assert fits(replace(step, quantize="nf4"), 12)
    assert not fits(replace(step, lora_r=16), 14) and not fits(replace(step, train="projector"), 12)


def test_a_recipe_is_planned_by_its_own_settings(capsys, monkeypatch):
    out = run("--recipe", "pretrain-7b", "--model", "300m", "--batch-size", "1", capsys=capsys)
    assert "Training (projector)" in out and "batch size 1" in out and "with checkpointing" in out
    out = run("--recipe", "toy", capsys=capsys)  # whose context is shorter than 2048
    assert "Training (lora)" in out and "batch size 16" in out and "without checkpointing" in out
    out = run("--train", "last:1", "--model", "tiny", capsys=capsys)
    assert "Training (last:1)" in out
    out = run("--train", "lora", "--quantize", "nf4", "--model", "tiny", capsys=capsys)
    assert "Training (lora, nf4)" in out


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--gpus", "2x"], "--gpus: 2x: expected how many and what"),
        (["--gpus", "0x24"], "expected how many"),
        (["--gpus", "1xB9000"], "named are T4"),
        (
            ["--gpus", "1x0.5", "--model", "tiny", "--max-length", "512"],
            "nothing can be trained",
        ),
        (["--max-length", "9999"], "context is 4096"),
        (["--recipe", "lora-8b"], "did you mean lora-7b"),
        (["--model", "./none"], "no such folder"),
        (["--precision", "fp8"], "--precision"),
        (["--train", "lorra"], "'lorra' is not one of lora, full"),
        (["--train", "full", "--quantize", "nf4"], "--train: full of a quantized model"),
        (["--train", "lora", "--quantize", "nf5"], "--quantize: 'nf5', expected one of int8"),
        (["--quantize", "nf4"], "no effect without --train or --recipe"),
        (["--gpus", "1x24", "--batch-size", "4"], "--batch-size: has no effect with --gpus"),
        (["--gpus", "1x24", "--no-gradient-checkpointing"], "has no effect with --gpus"),
        (["--images", "8"], "--images: 8 of them take 4608 tokens, and a row has 2048; give fewer"),
        (["--max-length", "10"], "--images: 1 of them take 576 tokens, and a row has 10"),
        (["--max-length", "9999999999"], "an integer of at least 1 and at most 2147483648"),
        (["--lora-r", "5000"], "--lora-r: 5000 is above the model's width of 4096"),
        (["--lora-targets", "foo"], "--lora-targets: 'foo' names no linear layer"),
        (["--train", "full", "--dora"], "--dora: has no effect without --train lora"),
        (["--train", "last:1", "--lora-r", "4"], "--lora-r: has no effect without --train lora"),
        (["--rows", "64"], "--rows: has no effect without --gpus"),
        (["--recipe", "lora-7b", "--train", "full"], "give one of them"),
        (["--train", "full", "--gpus", "1x24", "--model", "1b"], "full does not fit"),
        (["--model", "\x1b[31m"], r"\\x1b\[31m"),
    ],
)
def test_mistakes_are_one_line(argv, said):
    with pytest.raises(UserError, match=said) as e:
        plan.main(argv)
    assert "\n" not in str(e.value)


def test_checkpointing_and_more_cards_never_take_more_flops_away():
    step = Step("lora", torch.bfloat16, max_length=1024)
    plain = plan_fit.step_flops(SMALL, step, 8)
    more = plan_fit.step_flops(SMALL, replace(step, gradient_checkpointing=True), 8)
    full = plan_fit.step_flops(SMALL, replace(step, train="full"), 8)
    assert 1.2 < more / plain < 1.6 and full > plain
