"""Benchmarks by name: the published layouts become records, the settings files say all that makes a number."""

import json
from pathlib import Path

import pytest
from conftest import load_script
from PIL import Image

from llava_min.benchmarks import FOLDER, benchmark_records, read_benchmark
from llava_min.cli import UserError
from llava_min.data.records import text_of
from llava_min.metrics import find

SHORT = "\nAnswer the question using a single word or phrase."


@pytest.fixture
def files(tmp_path) -> Path:
    """The published files in small, with pictures."""
    write = lambda name, data: (tmp_path / name).write_text(json.dumps(data))
    write("questions.json", {"info": {}, "data_subtype": "val2014", "questions": [
        {"image_id": 42, "question": "What colour is it?", "question_id": 42000},
        {"image_id": 42, "question": "How many?", "question_id": 42001}]})
    write("annotations.json", {"annotations": [
        {"question_id": n, "image_id": 42, "multiple_choice_answer": "x", "answers": [
            {"answer": f"{n}-{i}", "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)]} for n in (42001, 42000)]})
    write("textvqa.json", {"data": [
        {"question": "what brand?", "image_id": "ab12", "question_id": 7, "answers": ["nokia"] * 10, "set_name": "val"}]})
    write("ocr.json", {"data": [{"image_id": "ab12", "ocr_tokens": ["NOKIA", "3310"], "ocr_info": []}]})
    (tmp_path / "pope.json").write_text("".join(json.dumps(r) + "\n" for r in [
        {"question_id": 1, "image": "COCO_val2014_000000000042.jpg", "text": "Is there a dog in the image?", "label": "yes"},
        {"question_id": 2, "image": "COCO_val2014_000000000042.jpg", "text": "Is there a cat in the image?", "label": "no"}]))
    for name in ("COCO_val2014_000000000042.jpg", "ab12.jpg"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / name)
    return tmp_path


def records(files: Path, name: str, *data: str):
    return benchmark_records(read_benchmark(name), ",".join(str(files / d) for d in data), None)


def test_every_settings_file_is_whole():
    names = {p.stem for p in FOLDER.glob("*.toml")}
    assert names == {"vqav2", "textvqa", "textvqa-ocr", "pope"}
    for name in names:
        b = read_benchmark(name)
        assert find(b.metrics) and b.template == "vicuna_v1" and b.image_aspect_ratio == "pad" and b.prompt.endswith(SHORT)


def test_vqav2_joins_questions_and_annotations(files):
    one, two = records(files, "vqav2", "questions.json", "annotations.json")
    assert one.id == "42000" and text_of(one.messages[0]) == "What colour is it?" + SHORT
    assert one.extra["references"] == [f"42000-{i}" for i in range(1, 11)] and two.extra["references"][0] == "42001-1"
    assert one.images == [files / "COCO_val2014_000000000042.jpg"] and one.pictures()[0].size == (40, 30)


def test_textvqa_with_and_without_ocr(files):
    (plain,), (ocr,) = records(files, "textvqa", "textvqa.json"), records(files, "textvqa-ocr", "textvqa.json", "ocr.json")
    assert text_of(plain.messages[0]) == "what brand?" + SHORT
    assert text_of(ocr.messages[0]) == "what brand?\nReference OCR token: NOKIA, 3310" + SHORT
    assert ocr.extra["references"] == ["nokia"] * 10 and ocr.id == "7"
    data = json.loads((files / "textvqa.json").read_text())
    data["data"][0]["ocr_tokens"] = ["A", "B"]  # the older file has them
    (files / "old.json").write_text(json.dumps(data))
    assert "token: A, B\n" in text_of(records(files, "textvqa-ocr", "old.json")[0].messages[0])


def test_pope_is_a_record_a_line(files):
    one, two = records(files, "pope", "pope.json")
    assert one.extra["references"] == ["yes"] and two.extra["references"] == ["no"]
    assert text_of(two.messages[0]) == "Is there a cat in the image?" + SHORT


@pytest.mark.parametrize("name, data, named", [
    ("vqav2", ["questions.json"], "2 of 2 records are bad: record 0: has no field answers.*takes --data v2_OpenEnded"),
    ("vqav2", ["annotations.json", "questions.json"], "under 'questions'"), ("textvqa-ocr", ["textvqa.json"], "no field ocr_tokens"),
    ("textvqa", ["textvqa.json", "ocr.json"], "2 files"), ("pope", ["textvqa.json"], "has no field text"),
    ("vqav2", ["questions.json", "other.json"], "other.json has none of its question_id 42001"),
    ("pope", ["lost.json"], "no picture"), ("pope", ["outside.json"], "outside the image folder"),
    ("pope", ["number.json"], "label: a number"), ("pope", ["absent.json"], "absent.json")])
def test_wrong_files_are_one_line(files, name, data, named):
    write = lambda n, d: (files / n).write_text(json.dumps(d))
    write("other.json", {"annotations": [{"question_id": 42000, "answers": []}]})
    row = {"question_id": 1, "image": "ab12.jpg", "text": "Is it?", "label": "yes"}
    write("lost.json", row | {"image": "lost.jpg"})
    write("outside.json", row | {"image": "../x.jpg"})
    write("number.json", row | {"label": 1})
    with pytest.raises(UserError, match=named) as e:
        records(files, name, *data)
    assert "\n" not in str(e.value) and len(str(e.value)) < 2000


@pytest.mark.parametrize("change, named", [
    (("metrics", "metricks"), "did you mean metrics"), (("max_new_tokens = 128", 'max_new_tokens = "x"'), "max_new_tokens is x"),
    (('id = "{question_id}"', ""), "id is missing"), (("title", "[title"), "correct the file"), (('["pope"]', "[1]"), "metrics is"),
    (('name = "coco_pope_random.json"', ""), "files 0: name"), (("[[files]]", "[[files]]\nname = 'x'\n[[files]]"), "files 1: join")])
def test_a_settings_file_that_is_wrong_is_one_line(tmp_path, change, named):
    text = (FOLDER / "pope.toml").read_text()
    assert change[0] in text
    (tmp_path / "mine.toml").write_text(text.replace(*change, 1))
    with pytest.raises(UserError, match=named) as e:
        read_benchmark(str(tmp_path / "mine.toml"))
    assert "\n" not in str(e.value)


def test_another_benchmark_is_a_file(files):
    text = (FOLDER / "pope.toml").read_text().replace("{text}", "{text} ({question_id:04}, { })")
    (files / "mine.toml").write_text(text.replace('["pope"]', '["exact_match"]'))
    (one, _) = records(files, str(files / "mine.toml"), "pope.json")
    assert text_of(one.messages[0]) == "Is there a dog in the image? (0001, { })" + SHORT


def test_the_script_answers_a_benchmark(files, capsys):
    script = load_script("eval")
    script.main(["--benchmark", "pope", "--data", str(files / "pope.json"), "--out", str(files / "out"), "--device", "cpu",
                 "--max-new-tokens", "4"])
    table, settings = (json.loads((files / "out" / f"{name}.json").read_text()) for name in ("metrics", "settings"))
    assert {"pope", "pope_yes_ratio"} <= set(table) <= {"pope", "pope_precision", "pope_recall", "pope_f1", "pope_yes_ratio"}
    assert settings["template"] == "vicuna_v1" and settings["image_aspect_ratio"] == "pad" and settings["max_new_tokens"] == 4
    assert settings["prompt"].endswith(f"USER: <image>\nIs there a dog in the image?{SHORT} ASSISTANT:")
    assert settings["data_sha256"][0].startswith("pope.json ")
