"""eval.py and the path it shares with train.py: answers in the records' order whatever the batch,
the ranks and the interruptions; scores; the files; what is wrong with the data, counted and named.
"""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from conftest import load_script
from test_checkpoint import ALONE

from llava_min.data.records import read_records
from llava_min.decoding import beam_search, decode
from llava_min.errors import UserError
from llava_min.evaluation import answers as answering
from llava_min.evaluation import predict as predicting
from llava_min.evaluation import score as scoring
from llava_min.evaluation import settings as describing
from llava_min.evaluation import show as showing
from llava_min.evaluation.answers import read_answers
from llava_min.evaluation.predict import predict
from llava_min.evaluation.score import difference, measure_all
from llava_min.load import TINY, load
from llava_min.options import read_options
from llava_min.toy import draw as toy

script = load_script("eval")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "data"
    toy.write(folder, "questions", train=1, val=18)
    return folder / "val.json"


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", dtype="fp32", device="cpu")


@pytest.fixture
def changed(data, tmp_path):
    """A copy of the data whose records are `change`d."""

    def copy(change) -> Path:
        records = json.loads(data.read_text(encoding="utf-8"))
        change(records)
        path = tmp_path / "changed" / "val.json"
        shutil.copytree(data.parent, path.parent, dirs_exist_ok=True)
        path.write_text(json.dumps(records), encoding="utf-8")
        return path

    return copy


@pytest.fixture
def answered(data, tmp_path) -> Path:
    """A folder of answers to the data."""
    run(data, "--out", str(tmp_path / "answered"))
    return tmp_path / "answered"


def run(data: Path, *flags: str) -> None:
    script.main(["--data", str(data), "--max-new-tokens", "8", "--device", "cpu", *flags])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_answers_are_the_same_whatever_the_batch_and_the_order_that_of_the_records(data, tiny):
    records = read_records(data)
    rows = {n: predict(*tiny, records, batch_size=n, max_new_tokens=24) for n in (1, 3, 8)}
    assert rows[1] == rows[3] == rows[8]
    assert [r["id"] for r in rows[1]] == [r.id for r in records]
    assert all(
        r["prompt"] and r["references"] == [rec.messages[-1]["content"]]
        for r, rec in zip(rows[1], records)
    )


def test_the_model_is_left_as_it_was(data, tiny):
    model, processor = tiny
    for training in (True, False):
        model.train(training)
        predict(model, processor, read_records(data)[:1], max_new_tokens=2)
        assert model.training == training


def test_pictures_are_turned_as_they_were_asked_for(data, tiny, monkeypatch):
    seen, open_images = [], predicting.Record.open_images
    monkeypatch.setattr(
        predicting.Record,
        "open_images",
        lambda self, exif=False: (
            seen.append((type(self.images[0]), exif)) or open_images(self, exif)
        ),
    )
    predict(*tiny, read_records(data)[:2], exif=True, max_new_tokens=2)
    # the others are decoded
    assert [exif for kind, exif in seen if issubclass(kind, Path)] == [True, True]


def test_an_answer_is_text_and_nothing_around_it(data, tiny, monkeypatch):
    (model, processor), asked, generate = tiny, {}, predicting.generate
    monkeypatch.setattr(
        predicting,
        "generate",
        lambda *a, **options: asked.update(options) or generate(*a, **options),
    )
    monkeypatch.setattr(type(processor), "decode", lambda self, ids: " red\n")
    assert (
        predict(model, processor, read_records(data)[:1], max_new_tokens=2)[0]["prediction"]
        == "red"
    )
    assert (
        processor.image_token_id in asked["suppress_tokens"]
        and processor.tokenizer.eos_id in asked["eos_token_id"]
    )


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "length_penalty": 3.0}])
def test_an_answer_is_cut_where_no_end_token_came(data, tiny, options):
    """Of any batch; an answer whose end token is the last one that there was room for is whole."""
    (model, processor), records = tiny, read_records(data)[:9]
    ends, silent = processor.stop_ids, processor.suppressed_ids(model.config.text.vocab_size)
    seen = set()
    for most in range(1, 6):
        rows = predict(model, processor, records, batch_size=4, max_new_tokens=most, **options)
        o = read_options(
            {"max_new_tokens": most, "eos_token_id": ends, "suppress_tokens": silent, **options}
        )
        for record, row in zip(records, rows, strict=True):
            batch, _, _ = predicting.evaluation_batch([record], processor)
            raw = (
                beam_search(model, batch, o)[0].tolist()
                if options
                else list(map(int, decode(model, batch, o)))
            )
            ended = [i for i, id in enumerate(raw) if id in ends]
            assert row.get("stopped") == (None if ended else "limit"), (most, raw)
            seen.add(ended[0] == most - 1 if ended else None)
    assert seen == {None, True, False}  # cut, ended at the limit itself, ended before


def test_cut_answers_are_counted_and_named_with_the_mend(data, tmp_path, capsys):
    cut = ["--data", str(data), "--device", "cpu", "--max-new-tokens", "1"]
    script.main(cut)
    said = capsys.readouterr().err
    assert (
        "18 of 18 answers were cut at --max-new-tokens 1, before their end: questions-val-000000, "
        in said
        and said.endswith("; raise it\n")
    )
    script.main([*cut, "--out", str(tmp_path / "one"), "--compare", "tiny"])
    assert capsys.readouterr().err.count("18 of 18 answers were cut at --max-new-tokens 1") == 2
    for folder in (tmp_path / "one", tmp_path / "one" / "compare"):
        assert all(row["stopped"] == "limit" for row in lines(folder / "predictions.jsonl"))
        remarks = json.loads((folder / "settings.json").read_text())["remarks"]
        assert "18 of 18 answers were cut" in remarks[-1] and remarks[-1].endswith(
            "; raise it, with another --out"
        )
    page = (tmp_path / "one" / "report.html").read_text(encoding="utf-8")
    assert (
        page.count('"x":true') == page.count('"y":true') == 18
        and "18 of 18 answers were cut" in page
    )
    # answers that are kept keep their mark
    script.main([*cut, "--out", str(tmp_path / "one"), "--compare", "tiny"])
    assert "18 of 18 answers were cut" in capsys.readouterr().err


def test_what_a_metric_does_not_measure_stands_beside_its_score(data, tmp_path, capsys):
    pytest.importorskip(
        "sacrebleu", reason="what computes this metric; pip install -e '.[metrics]'"
    )
    records = [
        r for r in json.loads(data.read_text()) if len(r["conversations"][-1]["value"].split()) < 3
    ]
    (data.parent / "short.json").write_text(json.dumps(records))
    n, out = len(records), tmp_path / "out"
    run(
        data.parent / "short.json",
        "--metrics",
        "exact_match,bleu",
        "--by",
        "kind",
        "--out",
        str(out),
    )
    said, table = capsys.readouterr(), json.loads((out / "metrics.json").read_text())
    line = f"bleu: {n} of {n} examples have fewer than 4 words"
    assert (
        said.out.count("fewer than 4 words") == 1
        and line in said.out
        and max(map(len, said.out.splitlines())) < 80
    )
    # folded, and none of it lost
    assert "use chrf, exact_match or token_f1" in " ".join(said.out.split())
    assert table["bleu"]["score"] == 0 and set(table["exact_match"]) == {
        "score",
        "low",
        "high",
        "n",
    }
    assert f"bleu: {table['bleu']['remarks'][0]}".startswith(line)
    assert (out / "report.html").read_text(encoding="utf-8").count("fewer than 4 words") == 1
    run(
        data.parent / "short.json",
        "--metrics",
        "bleu",
        "--compare",
        "tiny",
        "--out",
        str(tmp_path / "two"),
    )
    assert capsys.readouterr().out.count("fewer than 4 words") == 1
    assert (tmp_path / "two" / "report.html").read_text(encoding="utf-8").count(
        "fewer than 4 words"
    ) == 1


def test_logprob_is_that_of_the_answer_token_by_token(data, tiny):
    model, processor = tiny
    records = read_records(data)[:5]
    rows = predict(model, processor, records, batch_size=5, max_new_tokens=24, logprob=True)
    for record, row in zip(records, rows):
        batch, _, _ = predicting.evaluation_batch([record], processor)
        ids = predicting.generate(model, batch, max_new_tokens=24, eos_token_id=processor.stop_ids)[
            0
        ]
        total = 0.0
        for i in range(len(ids)):
            fed = torch.cat([batch["input_ids"], torch.tensor([ids[:i]], dtype=torch.long)], 1)
            total += float(model(fed, batch["pixel_values"])[0, -1].log_softmax(-1)[ids[i]])
        assert row["logprob"] == pytest.approx(total / len(ids), abs=1e-4) and row["logprob"] < 0


def test_the_script_writes_predictions_and_metrics(data, tmp_path, capsys):
    out = tmp_path / "out"
    run(data, "--out", str(out), "--by", "kind")
    rows, table = lines(out / "predictions.jsonl"), json.loads((out / "metrics.json").read_text())
    assert {p.name for p in out.iterdir()} == {
        "predictions.jsonl",
        "metrics.json",
        "settings.json",
        "report.html",
    }
    assert len(rows) == 18 and set(rows[0]) == {
        "id",
        "prompt",
        "prediction",
        "references",
        "record",
        "scores",
    }
    assert set(table) == {"exact_match", *(f"exact_match {kind}" for kind in toy.KINDS)}
    assert table["exact_match colour"]["n"] == 3
    found = table["exact_match"]
    assert found["n"] == 18 and found["score"] == pytest.approx(
        sum(r["scores"]["exact_match"] for r in rows) / 18
    )
    assert found["low"] <= found["score"] <= found["high"]
    said = capsys.readouterr()
    assert "exact_match" in said.out and max(map(len, said.out.splitlines())) <= 80
    assert "18 of 18" in said.err and "left" in said.err
    settings = json.loads((out / "settings.json").read_text())
    assert (
        settings["prompt"].endswith("ASSISTANT:")
        and "<image>" in settings["prompt"]
        and "fp32" in settings["checked"]
    )
    assert (
        settings["image_aspect_ratio"] in ("pad", "crop")
        and settings["num_beams"] == 1
        and settings["versions"]["torch"]
    )
    run(data, "--out", str(tmp_path / "beams"), "--num-beams", "2")
    assert (
        json.loads((tmp_path / "beams" / "settings.json").read_text())["decoding"]
        == "beam search with 2 beams"
    )
    assert settings["decoding"] == "greedy" and "greedy" in (out / "report.html").read_text(
        encoding="utf-8"
    )


def interrupt(monkeypatch, after: int) -> None:
    """generate raises in the batch that comes after so many."""
    real, left = predicting.generate, [after]

    def generate(*args, **options):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*args, **options)

    monkeypatch.setattr(predicting, "generate", generate)


def test_an_interrupted_run_goes_on_and_ends_as_an_uninterrupted_one(
    data, tmp_path, monkeypatch, capsys
):
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(data, "--out", str(whole), "--batch-size", "4")
    for after in (2, 1):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt(patch, after)
            run(data, "--out", str(out), "--batch-size", "4")
        with open(out / "predictions.jsonl", "a", encoding="utf-8") as f:
            f.write('{"id": "questions-va')  # killed in the middle of a line
        assert not (out / "metrics.json").exists()
    first = (out / "predictions.jsonl").read_text().splitlines()[0]
    # what another rank left, one answer twice
    (out / "predictions-1.jsonl").write_text(first + "\n")
    capsys.readouterr()
    run(data, "--out", str(out), "--batch-size", "3")  # of which the answers do not depend
    said = capsys.readouterr().err
    assert (
        "continues after 12 of 18" in said
        and "cut short" in said
        and "1 of its 13 answers are there twice" in said
    )
    for name in ("predictions.jsonl", "metrics.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert not (out / "predictions-1.jsonl").exists()

    # all is answered: other metrics of the same answers
    monkeypatch.setattr(predicting, "generate", None)
    run(data, "--out", str(out), "--metrics", "exact_match,token_f1")
    assert set(json.loads((out / "metrics.json").read_text())) == {"exact_match", "token_f1"}


def test_answers_made_otherwise_are_not_mixed(data, tmp_path, changed):
    out = tmp_path / "out"
    run(data, "--out", str(out))
    before = {p: p.read_bytes() for p in out.iterdir()}
    other = changed(lambda records: records[0]["conversations"][1].update(value="x"))
    for flags, named in (
        (["--num-beams", "2"], "num_beams"),
        (["--image-aspect-ratio", "crop"], "image_aspect_ratio"),
        (["--dtype", "bf16"], "dtype"),
        (["--exif"], "exif"),
        (["--logprob"], "logprob"),
        (["--template", "vicuna_v1"], "template"),
        (["--max-new-tokens", "9"], "max_new_tokens"),
    ):
        with pytest.raises(UserError, match=f"other settings.*{named}") as e:
            script.main(
                [
                    "--data",
                    str(data),
                    "--device",
                    "cpu",
                    "--out",
                    str(out),
                    *([] if "--max-new-tokens" in flags else ["--max-new-tokens", "8"]),
                    *flags,
                ]
            )
        assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="other settings: data_sha256"):
        run(other, "--out", str(out))
    assert before == {p: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(
        UserError, match="1 of its 18 answers are to questions.*questions-val-000000"
    ):
        read_answers(out, read_records(data)[1:])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="exists already"):
        run(data, "--out", str(tmp_path / "full"))


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda row: {}, "predictions.jsonl:2: is not an answer"),
        (lambda row: [row], "predictions.jsonl:2: is not an answer"),
        (lambda row: row | {"prediction": 5}, "predictions.jsonl:2: is not an answer"),
        (lambda row: row | {"prediction": "\ud800"}, "predictions.jsonl:2: is not an answer"),
        (
            lambda row: {k: v for k, v in row.items() if k != "record"},
            "predictions.jsonl:2: is not an answer",
        ),
        (lambda row: row | {"id": []}, "1 of its 18 answers are to questions"),
        (lambda row: row | {"references": [{}]}, "1 of its 18 answers are to questions"),
        (None, "predictions.jsonl:2: is not an answer"),
    ],
)
def test_a_damaged_line_is_one_line(answered, data, change, named):
    folder, records = answered, read_records(data)
    whole = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    whole[1] = json.dumps(change(json.loads(whole[1]))) if change else "[" * 100_000
    (folder / "predictions.jsonl").write_text("\n".join(whole) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=named) as e:
        read_answers(folder, records)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "name, change",
    [
        ("config.json", lambda c: c["text_config"].update(rms_norm_eps=0.1)),
        ("generation_config.json", lambda c: c.update(max_length=77)),
        ("tokenizer_config.json", lambda c: c.update(note="x")),
    ],
)
def test_a_model_whose_small_files_changed_does_not_go_on(
    data, tmp_path, name, change, monkeypatch
):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(TINY, model)
    run(data, "--model", str(model), "--out", str(out))
    monkeypatch.setattr(
        sys.modules["llava_min.load"], "load_weights", lambda *a: pytest.fail("weights were read")
    )
    config = json.loads((model / name).read_text())
    change(config)
    (model / name).write_text(json.dumps(config))
    with pytest.raises(UserError, match="other settings: model_files"):
        run(data, "--model", str(model), "--out", str(out))


def test_a_model_whose_weights_changed_does_not_go_on(answered, data, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(TINY, tmp_path / "model")
    weights = load_file(TINY / "model.safetensors")
    save_file(
        {name: x * 1.01 for name, x in weights.items()}, tmp_path / "model" / "model.safetensors"
    )
    with pytest.raises(UserError, match="other settings: weights"):
        run(data, "--model", str(tmp_path / "model"), "--out", str(answered))


def test_every_small_file_that_makes_an_answer_is_looked_at(tmp_path, monkeypatch):
    """Those that data/tokenizer_files.py, data/processor_files.py and config.py read, and an
    adapter's.
    """
    shutil.copytree(TINY, tmp_path / "model")
    names = [p.name for p in TINY.iterdir() if p.suffix != ".safetensors"] + [
        "chat_template.json",
        "special_tokens_map.json",
        "added_tokens.json",
    ]
    seen = [describing.hash_small_files(str(tmp_path / "model"), None)]
    for name in names:
        with open(tmp_path / "model" / name, "a") as f:
            f.write("\n")
        monkeypatch.setattr(describing, "read_config", lambda folder: (None, None))
        seen.append(describing.hash_small_files(str(tmp_path / "model"), None))
    assert len(set(seen)) == 1 + len(names)


def test_the_weight_of_a_file_is_part_of_the_data(data):
    assert describing.hash_data(f"{data}@2")[0] == describing.hash_data(str(data))[0] + " @2"


def test_the_intervals_are_those_of_the_seed(data, tmp_path, monkeypatch):
    seeds, resampled = [], scoring.resampled
    monkeypatch.setattr(
        scoring,
        "resampled",
        lambda statistics, seed: seeds.append(seed) or resampled(statistics, seed),
    )
    run(data, "--compare", "tiny", "--seed", "7")
    assert seeds == [7] * 4  # a table of each side, and both sides of the difference


def test_a_metric_that_fails_leaves_the_others_written_and_is_an_error(data, tmp_path):
    with pytest.raises(UserError, match="--metrics: vqa failed, as the warnings above say"):
        run(data, "--metrics", "exact_match,vqa", "--out", str(tmp_path / "out"))
    assert (
        set(json.loads((tmp_path / "out" / "metrics.json").read_text())) == {"exact_match"}
        and (tmp_path / "out" / "report.html").exists()
    )


def test_answers_about_other_pictures_of_the_same_names_are_not_taken(answered, data, tmp_path):
    records, other = read_records(data), tmp_path / "other"
    shutil.copytree(data.parent, other)
    path = other / os.path.relpath(records[4].images[0], data.parent)
    path.write_bytes(path.read_bytes() + b"\0")
    before = {p: p.read_bytes() for p in answered.iterdir() if p.name != "settings.json"}
    with pytest.raises(
        UserError,
        match="1 of its 18 answers are to questions .* or about other images .questions-val-000004",
    ):
        run(data, "--image-folder", str(other), "--out", str(answered))
    assert before == {p: p.read_bytes() for p in answered.iterdir() if p.name != "settings.json"}


def test_two_runs_do_not_write_to_one_folder(data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 0)
        run(data, "--out", str(out))
    before = (out / "settings.json").read_bytes()
    with open(out / "predictions.jsonl", "a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run writes into"):
            run(data, "--out", str(out), "--batch-size", "3")
    assert before == (out / "settings.json").read_bytes()


def test_a_folder_is_locked_until_all_of_it_is_written(data, tmp_path, monkeypatch):
    out, real = tmp_path / "out", answering.write_answers

    def finish(folder, rows, settings):
        with open(out / "predictions.jsonl", "a") as f, pytest.raises(BlockingIOError):
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        real(folder, rows, settings)

    monkeypatch.setattr(answering, "write_answers", finish)
    run(data, "--out", str(out))


def test_a_folder_that_nothing_could_be_written_into_does_not_stay(data, tmp_path, monkeypatch):
    def put(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(answering, "write_json_lines", put)
    (tmp_path / "mine").mkdir()
    for name in ("out", "mine"):
        with pytest.raises(UserError, match="cannot be written .No space left"):
            run(data, "--out", str(tmp_path / name))
    assert not (tmp_path / "out").exists() and not any((tmp_path / "mine").iterdir())


def test_what_cannot_be_scored_is_counted_and_named(changed, tmp_path, capsys):
    def change(records):
        records[1]["references"] = []
        records[2]["references"] = ["x", records[2]["conversations"][1]["value"]]

    path, out = changed(change), tmp_path / "out"
    records = read_records(path)
    (path.parent / records[0].images[0]).write_bytes(b"not a picture")
    run(path, "--out", str(out), "--by", "kind")
    said, rows = capsys.readouterr().err, lines(out / "predictions.jsonl")
    assert "1 of 18 records could not be read and are not scored: questions-val-000000" in said
    assert "1 of 18 records have no reference and are not scored: questions-val-000001" in said
    assert (
        rows[0]["error"]
        and rows[0]["scores"] == rows[1]["scores"] == {}
        and rows[2]["references"][0] == "x"
    )
    assert json.loads((out / "metrics.json").read_text())["exact_match"]["n"] == 16
    assert len(json.loads((out / "settings.json").read_text())["remarks"]) == 3
    # mended: it is asked again, alone
    shutil.copy(path.parent / records[3].images[0], path.parent / records[0].images[0])
    run(path, "--out", str(out), "--by", "kind")
    assert (
        "continues after 17 of 18" in capsys.readouterr().err
        and "error" not in lines(out / "predictions.jsonl")[0]
    )
    assert json.loads((out / "metrics.json").read_text())["exact_match"]["n"] == 17


def test_empty_predictions_are_counted(capsys):
    rows = [
        {"id": "a", "prediction": "", "references": ["x"]},
        {"id": "b", "prediction": "x", "references": ["x"]},
    ]
    assert scoring.remarks(rows) == ["1 of 2 records have an empty prediction: a"]


def test_records_of_one_id_keep_their_own_answers(changed, tmp_path, capsys):
    def change(records):
        for record in records:
            record["id"] = "same"

    path = changed(change)
    run(path, "--out", str(tmp_path / "out"))
    assert "1 ids are on more than one record" in capsys.readouterr().err
    first = lines(tmp_path / "out" / "predictions.jsonl")
    run(path, "--out", str(tmp_path / "out"))
    assert lines(tmp_path / "out" / "predictions.jsonl") == first and len(first) == 18


def test_records_that_differ_by_picture_or_earlier_turns_alone_keep_their_own_answers(
    changed, tmp_path
):
    def change(records):
        for i, record in enumerate(records):
            record.update(
                id="same", conversations=[dict(turn) for turn in records[0]["conversations"]]
            )
            if i % 2:  # another turn before the last
                record["conversations"] += [
                    {"from": "human", "value": "And what else?"},
                    {"from": "gpt", "value": "x"},
                ]
                record["conversations"][1]["value"] = f"answer {i}"
        for record in records[1::4]:
            record["image"] = records[1]["image"]

    path, out = changed(change), tmp_path / "out"
    run(path, "--out", str(out))
    first = lines(out / "predictions.jsonl")
    assert (
        len({row["record"] for row in first}) == 18
        and len({row["prediction"] for row in first[::2]}) > 1
    )
    text = (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    # interrupted: half, in any order
    (out / "predictions.jsonl").write_text("\n".join(reversed(text[9:])) + "\n", encoding="utf-8")
    run(path, "--out", str(out))
    assert lines(out / "predictions.jsonl") == first


def test_what_cannot_be_printed_is_written_all_the_same(data, tmp_path, monkeypatch):
    monkeypatch.setattr(
        showing,
        "show_scores",
        lambda scores: (_ for _ in ()).throw(BrokenPipeError(32, "Broken pipe")),
    )
    with pytest.raises(BrokenPipeError):
        run(data, "--out", str(tmp_path / "out"))
    assert {"predictions.jsonl", "settings.json", "metrics.json", "report.html"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }


def test_a_model_and_an_adapter_of_it_are_compared(data, tmp_path, capsys):
    from llava_min.adapter import save_adapter
    from llava_min.lora import LoRAConfig
    from llava_min.training.targets import add_lora

    model, _ = load("tiny", dtype="fp32", device="cpu")
    config = LoRAConfig(r=4, alpha=8.0, targets=("q_proj", "v_proj"))
    add_lora(model, config)
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.data.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    (tmp_path / "adapter").mkdir()
    save_adapter(model, config, tmp_path / "adapter", "tiny")
    out = tmp_path / "out"
    run(data, "--compare", str(tmp_path / "adapter"), "--out", str(out))
    said = capsys.readouterr().out
    base, tuned = lines(out / "predictions.jsonl"), lines(out / "compare" / "predictions.jsonl")
    assert [r["id"] for r in base] == [r["id"] for r in tuned] and base != tuned
    m = json.loads((out / "compare.json").read_text())["exact_match"]
    mean = lambda rows: sum(r["scores"]["exact_match"] for r in rows) / 18
    assert (m["base"], m["tuned"], m["score"]) == pytest.approx(
        (mean(base), mean(tuned), mean(tuned) - mean(base))
    )
    assert (
        m["low"] <= m["score"] <= m["high"]
        and "change" in said
        and max(map(len, said.splitlines())) <= 80
    )
    run(data, "--compare", str(tmp_path / "adapter"), "--by", "kind", "--out", str(out))
    found = json.loads((out / "compare.json").read_text())
    kinds = {name.removeprefix("exact_match "): x for name, x in found.items() if " " in name}
    assert (
        found["exact_match"] == m and sum(x["n"] for x in kinds.values()) == 18 and len(kinds) > 2
    )
    assert sum(x["n"] * x["score"] for x in kinds.values()) == pytest.approx(18 * m["score"])
    base, tuned = lines(out / "predictions.jsonl"), lines(out / "compare" / "predictions.jsonl")
    before = {p: p.read_bytes() for p in out.rglob("*.*")}
    with pytest.raises(UserError, match="holds a comparison"):
        run(data, "--out", str(out))
    assert before == {p: p.read_bytes() for p in out.rglob("*.*")}
    run(data, "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "alone"))
    assert lines(tmp_path / "alone" / "predictions.jsonl") == tuned
    run(
        data,
        "--adapter",
        str(tmp_path / "adapter"),
        "--compare",
        "tiny",
        "--out",
        str(tmp_path / "other"),
    )
    assert json.loads((tmp_path / "other" / "compare.json").read_text())["exact_match"] == m
    assert "Comparison" in (tmp_path / "other" / "report.html").read_text(encoding="utf-8")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8.0', '"lora_alpha": 80.0'))
    with pytest.raises(UserError, match="other settings: model_files"):
        run(data, "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "alone"))


def test_the_interval_of_a_difference_is_paired():
    def measured(answers, skip=None):
        rows = [
            {"prediction": a, "references": ["1"], **({"error": "x"} if i == skip else {})}
            for i, a in enumerate(answers)
        ]
        return measure_all(rows, ["exact_match"])

    one = measured("10" * 50)
    m = difference(one, measured("10" * 45 + "1" * 10))["exact_match"]
    # unpaired: from -0.09 to 0.19
    assert m["score"] == pytest.approx(0.05) and m["low"] >= 0 and m["high"] < 0.12
    same = difference(one, one)["exact_match"]
    assert same["score"] == same["low"] == same["high"] == 0
    m = difference(one, measured("0" + "10" * 49 + "1", skip=0))["exact_match"]
    assert m["n"] == 99 and m["base"] == pytest.approx(49 / 99)


def test_half_precision_says_what_was_checked(data, tmp_path):
    run(data, "--dtype", "bf16", "--out", str(tmp_path / "out"), "--batch-size", "8")
    assert (
        "of 8 answers are the same one at a time"
        in json.loads((tmp_path / "out" / "settings.json").read_text())["checked"]
    )


def test_two_ranks_answer_as_one(data, tmp_path):
    run(data, "--out", str(tmp_path / "one"))
    (tmp_path / "begun").mkdir()  # by one rank, which had answered some of them
    shutil.copy(tmp_path / "one" / "settings.json", tmp_path / "begun")
    (tmp_path / "begun" / "predictions.jsonl").write_bytes(
        b"".join((tmp_path / "one" / "predictions.jsonl").read_bytes().splitlines(True)[2:9])
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(ROOT / "eval.py"),
        "--data",
        str(data),
        "--max-new-tokens",
        "8",
        "--device",
        "cpu",
        "--batch-size",
        "4",
        "--out",
    ]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    for out in (tmp_path / "two", tmp_path / "begun"):
        done = subprocess.run(
            [*command, str(out)], capture_output=True, text=True, env=one_thread, timeout=200
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("exact_match") == 1 and (
            "continues after 7 of 18 answers" in done.stderr
        ) == (out.name == "begun")
        assert {p.name for p in out.iterdir()} == {
            "predictions.jsonl",
            "metrics.json",
            "settings.json",
            "report.html",
        }
        for name in ("predictions.jsonl", "metrics.json"):
            assert (tmp_path / "one" / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.parametrize(
    "argv, named",
    [
        ([], "--data"),
        (["--data", "absent.json"], "absent.json"),
        (["--metrics", "blue"], "blue"),
        (["--batch-size", "0"], "--batch-size"),
        (["--benchmark", "vqa"], "did you mean vqav2"),
        (["--compare", "absent"], "absent"),
        (["--by", "sort"], "--by: no record has a field sort"),
        (["--device", "tpu"], "--device: 'tpu'"),
        (["--template", "poem"], "--template: poem"),
        (["--logprob"], "--logprob: is written"),
        (["--model", "/etc"], "/etc: holds no config.json"),
        (
            ["--max-new-tokens", "1020"],
            "--max-new-tokens: 1020 and the .* tokens of record questions-val-000000 .* context of "
            "1024",
        ),
        (["--out", "/proc/x"], "--out: /proc/x cannot be written"),
    ],
)
def test_mistakes_are_one_line_before_weights_are_read(data, argv, named, monkeypatch):
    monkeypatch.setattr(
        sys.modules["llava_min.load"], "load_weights", lambda *a: pytest.fail("weights were read")
    )
    with pytest.raises(UserError, match=named) as e:
        script.main(argv if not argv or argv[0] == "--data" else ["--data", str(data), *argv])
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda rs: rs[3]["conversations"].pop(), "must be an answer"),
        (lambda rs: rs[3]["conversations"][1].update(value=5), "a number"),
        (lambda rs: rs[3].update(references=["x", 5]), "questions-val-000003: references"),
        (
            lambda rs: [r.update(references=[]) for r in rs],
            "none of its 18 records has a right answer",
        ),
    ],
)
def test_data_without_answers_or_with_answers_of_two_kinds_is_one_line(changed, change, named):
    with pytest.raises(UserError, match=named) as e:
        run(changed(change))
    assert "\n" not in str(e.value)


def test_references_are_looked_at_before_weights_are_read(changed, monkeypatch):
    monkeypatch.setattr(
        sys.modules["llava_min.load"], "load_weights", lambda *a: pytest.fail("weights were read")
    )
    with pytest.raises(UserError, match="questions-val-000003: references"):
        run(changed(lambda records: records[3].update(references=["x", 5])))


@pytest.mark.parametrize(
    "flag, value, names",
    [
        ("--compare", "/none", "/none: no such folder"),
        ("--compare", "", "--compare: is empty"),
        ("--out", "", "--out: is empty"),
        ("--adapter", "", "--adapter: is empty"),
    ],
)
def test_mistakes_are_found_before_anything_is_answered(data, flag, value, names, monkeypatch):
    monkeypatch.setattr(predicting, "predict", lambda *a, **k: pytest.fail("a model answered"))
    with pytest.raises(UserError, match=names):
        run(data, flag, value)


def test_how_an_adapter_is_asked_is_looked_at_before_anything_is_answered(
    data, tmp_path, monkeypatch
):
    monkeypatch.setattr(predicting, "predict", lambda *a, **k: pytest.fail("a model answered"))
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "processor_config.json").write_text('{"llava_min_template": "poem"}')
    with pytest.raises(UserError, match="template: poem"):
        run(data, "--compare", str(tmp_path))


def test_a_folder_whose_answers_cannot_be_read_stays_as_it_was(data, tmp_path):
    (tmp_path / "settings.json").write_text('{"seed": 0}')
    (tmp_path / "predictions.jsonl").write_text("[]\n{}\n")
    with (
        pytest.raises(UserError, match="predictions.jsonl:1: is not an answer"),
        ExitStack() as held,
    ):
        answering.open_answers(
            tmp_path, {"seed": 0, "batch_size": 3}, read_records(data), ALONE, held
        )
    assert (tmp_path / "settings.json").read_text() == '{"seed": 0}' and (
        tmp_path / "predictions.jsonl"
    ).read_text() == "[]\n{}\n"


def test_a_path_that_is_not_utf8_is_kept_in_the_settings(data, tmp_path):
    folder = tmp_path / "toy\udcff"
    shutil.copytree(data.parent, folder)
    run(folder / data.name, "--out", str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["data"] == str(
        folder / data.name
    )
