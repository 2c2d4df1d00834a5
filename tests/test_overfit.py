"""`overfit`: a sound pipeline learns its records by heart, and a seeded fault is named as that of
the stage it sits in.
"""

import json
import sys

import pytest
import torch
from PIL import Image

from llava_min.data.processor import Processor
from llava_min.errors import UserError
from llava_min.tools import overfit

ANSWERS = ("a blue star", "two rings", "top left", "a red ring and two stars")


@pytest.fixture
def data(tmp_path):
    records = []
    for i, answer in enumerate(ANSWERS):
        Image.new("RGB", (32, 20 + i), (60 * i, 200 - 40 * i, 90)).save(tmp_path / f"{i}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": answer},
        ]
        records.append({"id": f"r{i}", "image": f"{i}.png", "conversations": turns})
    path = tmp_path / "d.json"
    path.write_text(json.dumps(records))
    return path


def run(data, *more, capsys) -> tuple[int, str]:
    code = overfit.main([str(data), "-n", "4", *more])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("train", ["lora", "full", "freeze_vision"])
def test_answers_that_only_the_images_tell_apart_are_learned_by_heart(train, data, capsys):
    code, out = run(data, "--train", train, capsys=capsys)
    assert code == 0, out
    assert "4 of 4 answers come back word for word" in out


def test_two_answers_to_one_question_are_the_datas_fault(data, capsys):
    records = json.loads(data.read_text())
    records[1]["image"] = records[0]["image"]
    data.write_text(json.dumps(records))
    code, out = run(data, capsys=capsys)
    assert code == 1 and out.startswith("data: records r0 and r1 ask the same")


def shifted(encode):
    def other(self, pieces):
        ids, labels = encode(self, pieces)
        return ids, [labels[-1], *labels[:-1]]

    return other


def without_end(encode):
    def other(self, pieces):
        ids, labels = encode(self, pieces)
        return ids, [-100 if x == self.tokenizer.eos_id else x for x in labels]

    return other


@pytest.mark.parametrize(
    "fault, said", [(shifted, "labels are not shifted"), (without_end, "never learn")]
)
def test_labels_that_are_not_the_answers_are_named(fault, said, data, capsys, monkeypatch):
    monkeypatch.setattr(Processor, "encode", fault(Processor.encode))
    code, out = run(data, capsys=capsys)
    assert code == 1 and out.startswith("labels: record r0") and said in out


def test_another_prompt_than_trainings_is_named(data, capsys, monkeypatch):
    chat = Processor.chat

    def other(self, *args, **kwargs):
        out = chat(self, *args, **kwargs)
        return out | {"input_ids": torch.cat([out["input_ids"], out["input_ids"][:, -1:]], 1)}

    monkeypatch.setattr(Processor, "chat", other)
    code, out = run(data, capsys=capsys)
    assert code == 1 and out.startswith("prompt: record r0")


def test_gradients_that_are_missing_are_named(data, capsys, monkeypatch):
    from llava_min.llava import Llava

    loss = Llava.loss

    def cut_off(self, **batch):
        with torch.no_grad():
            value = loss(self, **batch)
        return value + 0 * sum(p.sum() for p in self.parameters() if p.requires_grad)

    monkeypatch.setattr(Llava, "loss", cut_off)
    code, out = run(data, capsys=capsys)
    assert code == 1 and "gradients: every gradient is 0" in out


def test_learning_that_goes_nowhere_is_named(data, capsys):
    code, out = run(data, "--lr", "1e-9", "--steps", "3", capsys=capsys)
    assert code == 1 and "learning: the loss of a token has hardly fallen" in out
    assert "after 3 steps" in out


def test_generation_that_differs_from_training_is_named(data, capsys, monkeypatch):
    module = sys.modules["llava_min.generate"]  # the package's own name is the function
    real = module.generate
    monkeypatch.setattr(module, "generate", lambda *a, **k: [ids[1:] for ids in real(*a, **k)])
    code, out = run(data, "--train", "full", capsys=capsys)
    assert code == 1 and "generation: 4 of 4 answers do not come back" in out


@pytest.mark.parametrize(
    "argv, said",
    [([], "DATA: give one"), (["none.json"], "none.json"), (["x", "-n", "0"], "--n")],
)
def test_mistakes_are_one_line(argv, said):
    with pytest.raises(UserError, match=said):
        overfit.main(argv)
