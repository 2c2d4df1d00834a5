"""`plan`: the notes' figures are reproduced, what is proposed fits and is a command that train.py
takes, and mistakes are one line.
"""

import re
import shlex
from dataclasses import replace

import pytest
import torch
from conftest import load_script

from llava_min.errors import UserError
from llava_min.tools import plan, plan_fit
from llava_min.training.memory import Step, step_memory
from llava_min.util.sizes import SIZES

SMALL = replace(
    SIZES["300m"], text=replace(SIZES["300m"].text, num_hidden_layers=2, vocab_size=32064)
)


def run(*argv, capsys) -> str:
    plan.main(list(argv))
    return capsys.readouterr().out


def test_the_notes_figures_are_reproduced_and_explained():
    text = "\n".join([*plan.parameters(SIZES["7b"], "7b"), *plan.notes()])
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


def test_quantized_bases_take_the_bytes_they_are_stored_in():
    step = Step("lora", max_length=1024, gradient_checkpointing=True)
    plain, nf4 = step_memory(SMALL, step), plan_fit.quantized_step(SMALL, step, "nf4", 1)
    text = SMALL.text
    linear = 2 * (4 * text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size)
    less = plain.weights - nf4.weights
    assert abs(less / (linear * (2 - 4.127 / 8)) - 1) < 0.001


def test_what_several_ranks_share_is_split_among_them():
    step = Step("full", max_length=1024)
    one, two, eight = (step_memory(SMALL, step, ranks=n) for n in (1, 2, 8))
    assert two.optimizer == one.optimizer // 2 and eight.weights < two.weights < one.weights
    assert one.gathered == 0 < two.gathered == eight.gathered
    # frozen, the tower stays whole on each
    frozen = [step_memory(SMALL, replace(step, train="lora"), ranks=n) for n in (1, 8)]
    assert frozen[1].weights > frozen[0].weights // 8 + 3e8


@pytest.mark.parametrize("gpus", ["1x16", "2x8", "4xL4", "1x3"])
def test_what_is_proposed_fits_and_train_py_takes_it(gpus, monkeypatch):
    cards = plan_fit.read_cards(gpus)
    step = Step(max_length=1024, gradient_checkpointing=True)
    fit = plan_fit.best_fit(SMALL, step, cards, 64)
    total = step_memory(SMALL, fit.step, ranks=cards.count).total
    assert total + plan_fit.reserve(cards.count, cards.memory) <= cards.memory * 2**30
    assert fit.rows == 64 == fit.step.batch_size * fit.step.grad_accum * cards.count
    words = shlex.split(" ".join(plan_fit.train_line(fit, cards, "7b")))
    assert ("torchrun" in words) == (cards.count > 1)
    train = load_script("train")
    seen = []

    def stop(config, argv):  # the flags are read, and there is no DATA.json to go on with
        seen.append(config)
        raise InterruptedError

    monkeypatch.setattr(train.settings, "check_settings", stop)
    with pytest.raises(InterruptedError):
        train.main(words[words.index("train.py") + 1 :])
    assert seen[0].batch_size == fit.step.batch_size and seen[0].train == fit.step.train


def test_more_memory_trains_more():
    step = Step(max_length=1024, gradient_checkpointing=True)
    order = ["projector", "lora", "freeze_vision"]
    fits = [plan_fit.best_fit(SMALL, step, plan_fit.Cards(1, g), 64) for g in (2, 4, 24)]
    found = [order.index(fit.step.train) for fit in fits if fit]
    assert found == sorted(found) and found[-1] == 2


def test_a_recipe_is_planned_by_its_own_settings(capsys, monkeypatch):
    monkeypatch.setattr(plan, "size_of", lambda name: "300m")
    out = run("--recipe", "pretrain-7b", "--batch-size", "1", capsys=capsys)
    assert "Training (projector)" in out and "batch size 1" in out and "with checkpointing" in out


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--gpus", "2x"], "--gpus: 2x: expected how many and what"),
        (["--gpus", "0x24"], "expected how many"),
        (["--gpus", "1xB9000"], "named are T4"),
        (
            ["--gpus", "1x0.5", "--model", "tiny", "--max-length", "512"],
            "not even the projector",
        ),
        (["--max-length", "9999"], "context is 4096"),
        (["--recipe", "lora-8b"], "did you mean lora-7b"),
        (["--model", "./none"], "no such folder"),
        (["--precision", "fp8"], "--precision"),
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
