"""Benchmarks by name: the published layouts become records, the settings files say all that makes a
number.
"""

import json
from html import unescape
from pathlib import Path

import pytest
from conftest import load_script
from PIL import Image

from llava_min.data.chat import text_of
from llava_min.errors import UserError
from llava_min.evaluation.benchmarks import FOLDER, benchmark_records, read_benchmark
from llava_min.evaluation.metrics import find

SHORT = "\nAnswer the question using a single word or phrase."


@pytest.fixture
def files(tmp_path) -> Path:
    """The published files in small, twelve questions each, with pictures."""
    write = lambda name, data: (tmp_path / name).write_text(json.dumps(data))
    ids = [(image, image * 1000 + k) for image in (42, 43, 44) for k in range(4)]
    write(
        "questions.json",
        {
            "info": {},
            "task_type": "Open-Ended",
            "data_type": "mscoco",
            "license": {},
            "data_subtype": "val2014",
            "questions": [
                {
                    "image_id": i,
                    "question": "What colour is it?" if n % 2 else "How many?",
                    "question_id": n,
                }
                for i, n in ids
            ],
        },
    )
    write(
        "annotations.json",
        {
            "info": {},
            "license": {},
            "data_subtype": "val2014",
            "data_type": "mscoco",
            "annotations": [
                {
                    "question_type": "what",
                    "multiple_choice_answer": "x",
                    "image_id": i,
                    "answer_type": "other",
                    "question_id": n,
                    "answers": [
                        {"answer": f"{n}-{k}", "answer_confidence": "yes", "answer_id": k}
                        for k in range(1, 11)
                    ],
                }
                for i, n in reversed(ids)
            ],
        },
    )
    write(
        "textvqa.json",
        {
            "dataset_type": "val",
            "dataset_name": "textvqa",
            "dataset_version": "0.5.1",
            "data": [
                {
                    "question": "what brand is denny's?",
                    "image_id": f"ab{n // 2}",
                    "image_classes": ["Sign"],
                    "image_width": 40,
                    "image_height": 30,
                    "answers": ["nokia"] * 10,
                    "question_tokens": ["what"],
                    "question_id": n,
                    "set_name": "val",
                }
                for n in range(12)
            ],
        },
    )
    write(
        "ocr.json",
        {
            "data": [
                {"image_id": f"ab{i}", "ocr_tokens": ["NOKIA", "3310"] if i else [], "ocr_info": []}
                for i in range(6)
            ]
        },
    )
    (tmp_path / "pope.json").write_text(
        "".join(
            json.dumps(
                {
                    "question_id": n,
                    "image": f"COCO_val2014_{42 + n % 3:012}.jpg",
                    "text": f"Is there a {'dog' if n % 2 else 'cat'} in the image?",
                    "label": "yes" if n % 2 else "no",
                }
            )
            + "\n"
            for n in range(1, 13)
        )
    )
    for i, name in enumerate(
        [*(f"COCO_val2014_{i:012}.jpg" for i in (42, 43, 44)), *(f"ab{i}.jpg" for i in range(6))]
    ):
        Image.new("RGB", (40, 30), ("red", "green", "blue")[i % 3]).save(tmp_path / name)
    return tmp_path


def records(files: Path, name: str, *data: str):
    return benchmark_records(read_benchmark(name), ",".join(str(files / d) for d in data), None)


def test_every_settings_file_is_whole():
    names = {p.stem for p in FOLDER.glob("*.toml")}
    assert names == {"vqav2", "textvqa", "textvqa-ocr", "pope"}
    for name in names:
        b = read_benchmark(name)
        assert (
            b.metrics == [{"vqav2": "vqa", "pope": "pope"}.get(name, "textvqa")]
            and b.max_new_tokens == 128
        )
        assert (
            find(b.metrics)
            and b.template == "vicuna_v1"
            and b.image_aspect_ratio == "pad"
            and b.prompt.endswith(SHORT)
        )


def test_vqav2_joins_questions_and_annotations(files):
    one, two = records(files, "vqav2", "questions.json", "annotations.json")[:2]
    assert one.id == "42000" and text_of(one.messages[0]) == "How many?" + SHORT
    assert (
        one.extra["references"] == [f"42000-{i}" for i in range(1, 11)]
        and two.extra["references"][0] == "42001-1"
    )
    assert one.images == [files / "COCO_val2014_000000000042.jpg"] and one.open_images()[
        0
    ].size == (
        40,
        30,
    )


def test_textvqa_with_and_without_ocr(files):
    """LLaVA's questions begin with a capital, the published ones do not."""
    plain, ocr = (
        records(files, "textvqa", "textvqa.json"),
        records(files, "textvqa-ocr", "textvqa.json", "ocr.json"),
    )
    assert text_of(plain[0].messages[0]) == "What brand is denny's?" + SHORT
    assert text_of(ocr[0].messages[0]) == "What brand is denny's?\nReference OCR token: " + SHORT
    assert (
        text_of(ocr[2].messages[0])
        == "What brand is denny's?\nReference OCR token: NOKIA, 3310" + SHORT
    )
    assert (
        ocr[7].extra["references"] == ["nokia"] * 10
        and ocr[7].id == "7"
        and len(plain) == len(ocr) == 12
    )
    data = json.loads((files / "textvqa.json").read_text())
    data["data"] = [r | {"ocr_tokens": ["A", "B"]} for r in data["data"]]  # the older file has them
    (files / "old.json").write_text(json.dumps(data))
    assert "token: A, B\n" in text_of(records(files, "textvqa-ocr", "old.json")[0].messages[0])


def test_what_two_files_say_is_that_of_the_first(files):
    annotations = json.loads((files / "annotations.json").read_text())
    annotations["annotations"] = [
        a | {"question": "of the annotation"} for a in annotations["annotations"]
    ]
    (files / "both.json").write_text(json.dumps(annotations))
    assert (
        text_of(records(files, "vqav2", "questions.json", "both.json")[0].messages[0])
        == "How many?" + SHORT
    )


def test_pope_is_a_record_a_line(files):
    one, two = records(files, "pope", "pope.json")[:2]
    assert one.extra["references"] == ["yes"] and two.extra["references"] == ["no"]
    assert text_of(two.messages[0]) == "Is there a cat in the image?" + SHORT


def test_what_belongs_to_no_question_is_said(files, capsys):
    questions = json.loads((files / "questions.json").read_text())
    questions["questions"] = questions["questions"][2:]
    (files / "few.json").write_text(json.dumps(questions))
    assert len(records(files, "vqav2", "few.json", "annotations.json")) == 10
    said = "annotations.json: 2 of 12 records belong to no question and are left out, for example question_id 42001"
    assert said in capsys.readouterr().err
    records(files, "textvqa-ocr", "textvqa.json", "ocr.json")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "name, data, named",
    [
        (
            "vqav2",
            ["questions.json"],
            "12 of 12 records are bad: record 0: has no field answers.*takes data v2_OpenEnded",
        ),
        ("vqav2", ["annotations.json", "questions.json"], "under 'questions'"),
        ("textvqa-ocr", ["textvqa.json"], "no field ocr_tokens"),
        ("textvqa", ["textvqa.json", "ocr.json"], "2 files"),
        ("pope", ["textvqa.json"], "has no field text"),
        (
            "textvqa-ocr",
            ["ocr.json", "textvqa.json"],
            "textvqa.json: record 1: another record has the same image_id ab0.*is it the right "
            "file",
        ),
        ("vqav2", ["questions.json", "other.json"], "other.json has none of its question_id 42001"),
        ("vqav2", ["questions.json", "listed.json"], "listed.json: record 0: question_id: a list"),
        (
            "vqav2",
            ["questions.json", "without.json"],
            "without.json: record 0: has no field question_id",
        ),
        ("pope", ["lost.json"], "no image"),
        ("pope", ["outside.json"], "outside the image folder"),
        ("pope", ["number.json"], "label: a number"),
        ("pope", ["empty.json"], "label: is empty, expected the right answers"),
        ("pope", ["absent.json"], "absent.json"),
        ("pope", ["pope.json@2"], "omit @WEIGHT"),
        ("textvqa", ["counted.json"], "question: 5, expected text"),
    ],
)
def test_wrong_files_are_one_line(files, name, data, named):
    write = lambda n, d: (files / n).write_text(json.dumps(d))
    write("other.json", {"annotations": [{"question_id": 42000, "answers": ["x"]}]})
    write("listed.json", {"annotations": [{"question_id": [42000]}]})
    write("without.json", {"annotations": [{"answers": ["x"]}]})
    write("counted.json", {"data": [{"question": 5, "answers": ["x"]}]})
    row = {"question_id": 1, "image": "ab1.jpg", "text": "Is it?", "label": "yes"}
    write("lost.json", row | {"image": "lost.jpg"})
    write("outside.json", row | {"image": "../x.jpg"})
    write("number.json", row | {"label": 1})
    write("empty.json", row | {"label": []})
    with pytest.raises(UserError, match=named) as e:
        records(files, name, *data)
    assert "\n" not in str(e.value) and len(str(e.value)) < 2000


def test_a_folder_of_pictures_that_is_not_there_is_one_line(files):
    with pytest.raises(UserError, match="/none: no such folder"):
        benchmark_records(read_benchmark("pope"), str(files / "pope.json"), str(files / "none"))


@pytest.mark.parametrize(
    "change, named",
    [
        (("metrics", "metricks"), "did you mean metrics"),
        (("max_new_tokens = 128", 'max_new_tokens = "x"'), "max_new_tokens is x"),
        (('id = "{question_id}"', ""), "id is missing"),
        (("title", "[title"), "correct the file"),
        (('["pope"]', "[1]"), "metrics is"),
        (("{text}", "{text:title}"), "prompt: {text:title} is not known"),
        (('name = "coco_pope_random.json"', ""), "files 0: name"),
        (("[[files]]", "[[files]]\nname = 'x'\n[[files]]"), "files 1: join"),
    ],
)
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
    one = records(files, str(files / "mine.toml"), "pope.json")[0]
    assert text_of(one.messages[0]) == "Is there a dog in the image? (0001, { })" + SHORT


@pytest.mark.parametrize(
    "name, data, first",
    [
        ("vqav2", "questions.json,annotations.json", "How many?"),
        ("textvqa", "textvqa.json", "What brand is denny's?"),
        ("textvqa-ocr", "textvqa.json,ocr.json", "What brand is denny's?\nReference OCR token: "),
        ("pope", "pope.json", "Is there a dog in the image?"),
    ],
)
def test_the_script_answers_a_benchmark(files, name, data, first, capsys):
    """From the published files to scores and a page, in which stands what made them."""
    out = files / "out"
    load_script("eval").main(
        [
            "--benchmark",
            name,
            "--data",
            ",".join(str(files / d) for d in data.split(",")),
            "--out",
            str(out),
            "--device",
            "cpu",
            "--max-new-tokens",
            "4",
        ]
    )
    table, settings = (
        json.loads((out / f"{part}.json").read_text()) for part in ("metrics", "settings")
    )
    (metric,) = read_benchmark(name).metrics
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    scores = find([metric])[metric]
    scores = scores.rows if metric == "pope" else scores
    theirs = [
        s[0] if metric == "pope" else s
        for s in scores([r["prediction"] for r in rows], [r["references"] for r in rows])
    ]
    assert (
        len(rows) == 12
        and table[metric]["score"] == pytest.approx(sum(theirs) / 12)
        and table[metric]["n"] == 12
    )
    assert (
        settings["template"] == "vicuna_v1"
        and settings["image_aspect_ratio"] == "pad"
        and settings["max_new_tokens"] == 4
    )
    assert settings["num_beams"] == 1 and settings["data_sha256"][0].startswith(
        data.split(",")[0] + " "
    )
    assert settings["prompt"].endswith(f"USER: <image>\n{first}{SHORT} ASSISTANT:") and settings[
        "prompt"
    ].startswith("A chat between")
    page = unescape((out / "report.html").read_text(encoding="utf-8"))
    assert (
        all(
            f"<dd><bdi>{x}</bdi></dd>" in page
            for x in (settings["prompt"], "vicuna_v1", "pad", "4")
        )
        and "data:image/jpeg" in page
    )
