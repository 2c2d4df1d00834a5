"""eval.py and the path it shares with train.py: answers in the records' order, whatever the batch; scores; files."""

import json
from pathlib import Path

import pytest
from conftest import load_script

from llava_min.cli import UserError
from llava_min.data import toy
from llava_min.data.dataset import read_records
from llava_min.evaluate import predict, score
from llava_min.load import load
from llava_min.metrics import summary
from llava_min.metrics.text import exact_match

script = load_script("eval")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "data"
    toy.write(folder, "questions", train=1, val=18)
    return folder / "val.json"


def test_the_answers_are_the_same_whatever_the_batch_and_the_order_that_of_the_records(data):
    model, processor = load("tiny", dtype="fp32")
    records = read_records(data)
    rows = {n: predict(model, processor, records, batch_size=n, max_new_tokens=24) for n in (1, 3, 8)}
    assert rows[1] == rows[3] == rows[8]
    assert [r["id"] for r in rows[1]] == [r.id for r in records]
    assert all(r["prompt"] and r["references"] == [rec.messages[-1]["content"]] for r, rec in zip(rows[1], records))


def test_the_script_writes_predictions_and_metrics(data, tmp_path, capsys):
    script.main(["--data", str(data), "--out", str(tmp_path / "out"), "--max-new-tokens", "8", "--device", "cpu", "--by", "kind"])
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    table = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert len(rows) == 18 and set(rows[0]) == {"id", "prompt", "prediction", "references", "scores"}
    assert set(table) == {"exact_match", *(f"exact_match {kind}" for kind in toy.KINDS)}
    assert table["exact_match colour"]["n"] == 3
    found = table["exact_match"]
    assert found["n"] == 18 and found["score"] == pytest.approx(sum(r["scores"]["exact_match"] for r in rows) / 18)
    assert found["low"] <= found["score"] <= found["high"]
    assert "exact_match" in capsys.readouterr().out


def test_exact_match_and_its_interval():
    assert exact_match([" red ", "Red", "", "two"], [["red"], ["red"], ["x"], ["2", "two"]]) == [1, 0, 0, 1]
    s = summary([1.0] * 30 + [0.0] * 70)
    assert s["score"] == 0.3 and 0.18 < s["low"] < 0.27 < 0.33 < s["high"] < 0.42 and s == summary([1.0] * 30 + [0.0] * 70)
    rows = [{"prediction": "a", "references": ["a"]}, {"prediction": "b", "references": ["a"]}]
    assert score(rows, ["exact_match"])["exact_match"]["score"] == 0.5 and rows[1]["scores"] == {"exact_match": 0.0}


@pytest.mark.parametrize("argv, named", [([], "--data"), (["--data", "absent.json"], "absent.json"), (["--metrics", "blue"], "blue"),
                                         (["--batch-size", "0"], "--batch-size")])
def test_mistakes_are_one_line(data, argv, named):
    with pytest.raises(UserError, match=named) as e:
        script.main(argv if not argv or argv[0] == "--data" else ["--data", str(data), *argv])
    assert "\n" not in str(e.value)
