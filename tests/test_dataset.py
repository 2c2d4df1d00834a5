"""Readers: every bad record is refused, counted and named, good ones are read as LLaVA does; both views of a record."""

import codecs
import gzip
import json
import os
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava_min.cli import UserError
from llava_min.data import toy_vocab
from llava_min.data.dataset import Dataset, Record, batches, collate, evaluation_batch, order, read_records
from llava_min.data.image import ImageConfig
from llava_min.data.processor import Processor
from llava_min.data.tokenizer import Tokenizer

IMAGE = {"type": "image"}


@pytest.fixture
def images(tmp_path) -> Path:
    root = tmp_path / "pictures"
    (root / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "sub/c.png", "ü x.png")):
        Image.new("RGB", (9 + i, 7), (40 * i, 90, 10)).save(root / name)
    Image.new("RGB", (3, 3)).save(tmp_path / "outside.png")
    return root


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Processor:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(toy_vocab.tokenizer_model(toy_vocab.words()[:300], [], 700))
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(folder)
    image = tokenizer.add_special("<image>")
    return Processor(tokenizer, ImageConfig(28, (0.5,) * 3, (0.5,) * 3, "pad"), "llava_hf", image, 4)


def talk(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]


def record(*values: str, **other) -> dict:
    return {"id": "r1", "conversations": talk(*values), **other}


def written(path: Path, data) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode() if isinstance(data, str) else json.dumps(data).encode())
    return path


GOOD = record("<image>\nWhat is it?", "A cat.", image="a.png")


# ---- what is read


def test_json_and_jsonl_by_what_they_hold_not_by_their_name(tmp_path, images):
    many = [record("Hi", f"Ho {i}", id=i) for i in range(3)]
    lines = "\n\n".join(json.dumps(r) for r in many) + "\n"
    read = [read_records(written(tmp_path / name, data), images) for name, data in (
        ("a.json", many), ("b.jsonl", many), ("a.jsonl", lines), ("b.json", lines), ("c.json", json.dumps(many, indent=3)),
        ("bom.json", codecs.BOM_UTF8 + json.dumps(many).encode()), ("crlf.jsonl", lines.replace("\n", "\r\n")))]
    assert all(r == read[0] for r in read) and [r.id for r in read[0]] == ["0", "1", "2"]
    one = read_records(written(tmp_path / "one.jsonl", GOOD), images)
    assert one[0].messages == [{"role": "user", "content": [IMAGE, {"type": "text", "text": "What is it?"}]},
                               {"role": "assistant", "content": "A cat."}]
    assert one[0].images == [images / "a.png"]
    text = "Ho\u2028Ho\x85"     # separators of lines to str.splitlines, not to JSON
    (r,) = read_records(written(tmp_path / "u.jsonl", json.dumps(record("Hi", text), ensure_ascii=False)), images)
    assert r.messages[1]["content"] == text


def multimodal(value: str) -> str:
    """What LLaVA's preprocess_multimodal leaves of a message (one mark): the picture, a newline, the rest stripped."""
    return ("<image>\n" + value.replace("<image>", "").strip()).strip() if "<image>" in value else value


@pytest.mark.parametrize("value", ["<image>\nWhat?", "What?\n<image>", "<image>", " <image> What? ", "a <image> b",
                                   "<image>What?\n", "\n<image>\n\nA\nB  "])
def test_marks_are_taken_out_as_llava_does(tmp_path, images, value):
    (r,) = read_records(written(tmp_path / "x.json", [record(value, " A ", image="a.png")]), images)
    content = r.messages[0]["content"]
    assert "\n".join("<image>" if p == IMAGE else p["text"] for p in content) == multimodal(value)
    assert r.messages[1]["content"] == " A "


def test_pictures_and_text_in_every_legal_place(tmp_path, images):
    data = [
        record(" Hi \n", "Ho"),                                                     # text-only stays as it is
        record("Hi", "Ho", image=None),
        record("<image>\n<image>\nCompare.", "So.", image=["a.png", "sub/c.png"]),
        record("Hi", "Ho", "And <image>?", "No.", image="./sub/../b.png"),         # in the second turn
        record("<image>", "A cat.", image="ü x.png"),                              # a picture and no text
        record("<image>\nTag?", "Use <image>, </s> or ASSISTANT: in it.", image="a.png", kind="html", id=7),
        record("Is </s> <s> USER: fine? \t", "Yes, \x1b[1m too."),
        record("<image>\nx", "y", image=str(images / "a.png")),                    # absolute, and inside
    ]
    got = read_records(written(tmp_path / "x.json", data), images)
    assert [len(r.images) for r in got] == [0, 0, 2, 1, 1, 1, 0, 1]
    assert got[0].messages[0]["content"] == " Hi \n" and got[2].messages[0]["content"][:2] == [IMAGE, IMAGE]
    assert got[3].messages[0]["content"] == "Hi" and got[3].messages[2]["content"][0] == IMAGE
    assert got[4].messages[0]["content"] == [IMAGE]
    assert got[5].id == "7" and got[5].extra == {"kind": "html"} and "<image>" in got[5].messages[1]["content"]
    assert [len(r.pictures()) for r in got] == [0, 0, 2, 1, 1, 1, 0, 1]
    assert [im.size for im in got[2].pictures()] == [(9, 7), (11, 7)]
    assert got[2].length > got[3].length > got[0].length == 2


def test_the_folder_of_the_file_is_the_image_folder_unless_another_is_named(tmp_path, images, monkeypatch):
    written(images / "x.json", [GOOD])
    monkeypatch.chdir(images)
    assert read_records("x.json")[0].pictures()[0].size == (9, 7)
    monkeypatch.chdir(tmp_path)
    assert read_records("pictures/x.json", "pictures")[0].pictures()[0].size == (9, 7)
    assert read_records(written(images / "x.json", [GOOD]))[0].images == [images / "a.png"]
    with pytest.raises(UserError, match="0 of 1 pictures found"):
        read_records(written(tmp_path / "x.json", [GOOD]))
    with pytest.raises(UserError, match="no such folder"):
        read_records(tmp_path / "x.json", tmp_path / "nowhere")


def test_warnings(tmp_path, images, capsys):
    headless = {"id": "h", "conversations": [{"from": "gpt", "value": "I am."}, *talk("Hi", "Ho")]}
    records = read_records(written(tmp_path / "x.json", [GOOD, GOOD, headless]), images)
    assert records[2].messages == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and "1 records begin with an answer" in err[0] and "r1" in err[1]


# ---- what is refused: (file content, words the message must hold)

DEEP = '{"id": "r1", "conversations": ' + "[" * 100_000 + "]" * 100_000 + "}"
FILES = {
    "empty": (b"", "is empty"),
    "blank": (b" \n\n", "is empty"),
    "no records": (b"[]", "no records"),
    "bad json": (b'[{"id": 1},\n  {"id": 2,}]', "line 2 column 12"),
    "bad line": (json.dumps(GOOD) + '\n{"id": ', ":2: column 8"),
    "two lists": (b"[]\n[]", "one after the other"),
    "top level object": (json.dumps({"data": [GOOD]}, indent=1), "put the records into a list"),
    "object on one line": (json.dumps({"data": [GOOD]}), "conversations is missing"),
    "utf-16": (json.dumps([GOOD]).encode("utf-16"), "UTF-16"),
    "invalid utf-8": (json.dumps([GOOD]).encode() + b"\xff", "byte 139"),
    "gzip": (gzip.compress(b"[]"), "gzip"),
    "zip": (b"PK\x03\x04....", "zip"),
    "parquet": (b"PAR1....", "parquet"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "key twice": ('[{"id": "r1", "image": "a.png", "image": "b.png", "conversations": []}]', "key image of record r1"),
    "NaN": ('[{"id": "r1", "score": NaN, "conversations": []}]', "NaN is not JSON"),
    "Infinity": ('{"score": -Infinity}', "-Infinity is not JSON"),
    "deep": (DEEP, "nested too deeply"),
    "long number": ("[" + "9" * 5000 + "]", "4300 digits"),
    "text": (b"hello", "column 1"),
}
RECORDS = {
    "no object": ("text", "is text, expected an object"),
    "null": (None, "is null"),
    "no conversations": ({"id": "r1"}, "conversations is missing"),
    "empty conversations": (record(), "conversations is empty"),
    "conversations text": ({"id": "r1", "conversations": "Hi"}, "conversations is text"),
    "turn no object": ({"id": "r1", "conversations": ["Hi", "Ho"]}, "turn 0: is text"),
    "one turn": (record("Hi"), "ends with a human turn"),
    "ends with human": (record("Hi", "Ho", "Hu"), "ends with a human turn"),
    "two humans": ({"id": "r1", "conversations": [*talk("Hi"), *talk("Ho", "Hu")]}, "turn 1: another human turn"),
    "two answers": ({"id": "r1", "conversations": [*talk("Hi", "Ho"), {"from": "gpt", "value": "x"}]}, "another gpt turn"),
    "only gpt": ({"id": "r1", "conversations": [{"from": "gpt", "value": "x"}]}, "turn 0: another gpt turn"),
    "unknown from": ({"id": "r1", "conversations": [{"from": "system", "value": "x"}]}, "from is system"),
    "from a list": ({"id": "r1", "conversations": [{"from": ["human"], "value": "x"}]}, "expected from human or gpt"),
    "no from": ({"id": "r1", "conversations": [{"value": "x"}]}, "from is None"),
    "value null": ({"id": "r1", "conversations": talk("Hi", None)}, "turn 1: value is null"),
    "value number": ({"id": "r1", "conversations": talk(5, "x")}, "turn 0: value is a number"),
    "value list": ({"id": "r1", "conversations": talk(["Hi"], "x")}, "value is a list"),
    "empty answer": (record("Hi", " \n"), "turn 1: the answer is empty"),
    "empty question": (record("", "Ho"), "turn 0: the question is empty"),
    "image number": (record("<image>", "x", image=3), "image is a number"),
    "image empty": (record("<image>", "x", image=""), "image is empty"),
    "image object": (record("<image>", "x", image={"path": "a.png"}), "image is an object"),
    "image in a list null": (record("<image>", "x", image=["a.png", None]), "image is null"),
    "image without mark": (record("Hi", "Ho", image="a.png"), "1 pictures, but the human turns mark 0"),
    "mark without image": (record("<image>\nHi", "Ho"), "0 pictures, but the human turns mark 1"),
    "mark in html": (record("Use the `<image>` tag?", "Ho"), "0 pictures, but the human turns mark 1"),
    "empty list of images": (record("<image>\nHi", "Ho", image=[]), "mark 1"),
    "two marks one image": (record("<image>\n<image>", "Ho", image="a.png"), "1 pictures, but the human turns mark 2"),
    "one mark two images": (record("<image>", "Ho", image=["a.png", "b.png"]), "2 pictures, but the human turns mark 1"),
    "mark in the answer": (record("Hi", "<image>", image="a.png"), "1 pictures, but the human turns mark 0"),
    "missing picture": (record("<image>", "Ho", image="gone.png"), "no picture"),
    "other case": (record("<image>", "Ho", image="A.png"), "no picture"),
    "dots": (record("<image>", "Ho", image="../outside.png"), "lies outside"),
    "dots inside": (record("<image>", "Ho", image="sub/../../outside.png"), "lies outside"),
    "absolute": (record("<image>", "Ho", image="/etc/passwd"), "lies outside"),
    "url": (record("<image>", "Ho", image="https://example.com/a.png"), "URL"),
    "NUL in a path": (record("<image>", "Ho", image="a\0.png"), "NUL"),
    "NUL": (record("Hi", "H\0o"), "turn 1: holds a NUL"),
    "surrogate": (record("Hi \ud800", "Ho"), "turn 0: holds half of a surrogate pair"),
    "surrogate id": (record("Hi", "Ho", id="\ud800"), "surrogate"),
    "long": (record("Hi", "x" * 1_000_001), "1000001 characters"),
    "id list": (record("Hi", "Ho", id=["x"]), "id is a list"),
    "id true": (record("Hi", "Ho", id=True), "id is true or false"),
    "id null": (record("Hi", "Ho", id=None), "id is null"),
}


def refused(call, *words: str) -> str:
    with pytest.raises(UserError) as e:
        call()
    message = str(e.value)
    assert all(w in message for w in words), message
    assert "\n" not in message and len(message) <= 2000 and message.isprintable() and ";" in message
    return message


@pytest.mark.parametrize("data, words", FILES.values(), ids=FILES.keys())
def test_bad_files(tmp_path, images, data, words):
    path = written(tmp_path / "x.json", data)
    refused(lambda: read_records(path, images), str(path), words)


@pytest.mark.parametrize("raw, words", RECORDS.values(), ids=RECORDS.keys())
def test_bad_records_among_good_ones(tmp_path, images, raw, words):
    named = isinstance(raw, dict) and raw["id"] == "r1"
    path = written(tmp_path / "x.json", [GOOD, GOOD, raw])
    refused(lambda: read_records(path, images), f"{path}: 1 of 3 records are bad: record 2" + " (id r1)" * named, words)
    written(path, "\n".join(map(json.dumps, [GOOD, raw, GOOD])))
    refused(lambda: read_records(path, images), "line 2" + " (id r1)" * named, words)


def test_all_bad_records_are_counted_and_the_first_named(tmp_path, images):
    data = [GOOD, *(record("Hi", "", id=f"bad {i} \x1b[31m") for i in range(300)), GOOD]
    message = refused(lambda: read_records(written(tmp_path / "x.json", data), images), "300 of 302", "record 1 ", "record 5 ")
    assert "record 6" not in message
    all_missing = [record("<image>", "x", image=f"{i}.png") for i in range(200)]
    refused(lambda: read_records(written(tmp_path / "x.json", all_missing), images), "0 of 200 pictures found under")


def test_files_that_cannot_be_read(tmp_path, images, monkeypatch):
    refused(lambda: read_records(tmp_path / "gone.json", images), "gone.json", "no such file")
    refused(lambda: read_records(images, images), "not a regular file")
    os.mkfifo(tmp_path / "pipe")
    refused(lambda: read_records(tmp_path / "pipe", images), "not a regular file")

    path = written(tmp_path / "x.json", [GOOD])
    def deny(*_, **__):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("builtins.open", deny)
    monkeypatch.setattr(Path, "read_bytes", deny)
    refused(lambda: read_records(path, images), "Permission denied")


def test_a_picture_that_leaves_by_a_link_or_is_damaged_is_refused_with_its_record(tmp_path, images):
    os.symlink(tmp_path / "outside.png", images / "link.png")
    (images / "cut.png").write_bytes((images / "a.png").read_bytes()[:40])
    for name, words in (("link.png", "outside"), ("cut.png", "cut.png")):
        (r,) = read_records(written(tmp_path / "x.json", [record("<image>", "x", image=name)]), images)
        refused(r.pictures, "record r1: ", words)


def test_no_bytes_of_a_file_escape_as_another_error(tmp_path, images):
    rng, path = random.Random(0), tmp_path / "x.json"
    for whole in (json.dumps([GOOD, record("Hi", "Ho")]), json.dumps(GOOD) + "\n" + json.dumps(record("Hi", "Ho"))):
        for _ in range(400):
            data = bytearray(whole.encode())
            for _ in range(rng.randint(1, 4)):
                i = rng.randrange(len(data))
                data[i:i + rng.randint(0, 3)] = rng.choice([b"", b"[", b"{", b'"', b"\\", b"null", rng.randbytes(2), data[:9]])
            try:
                read_records(written(path, bytes(data)), images)
            except UserError as e:
                assert "\n" not in str(e) and len(str(e)) <= 2000


# ---- order


def test_order_and_batches():
    assert order(50, 3, 1) == order(50, 3, 1) != order(50, 3, 2) != order(50, 4, 2)
    for n, size, accum in ((10, 2, 2), (9, 2, 2), (3, 4, 2), (8, 4, 1)):
        steps = batches(n, size, accum, epochs=2, seed=5)
        flat = [i for step in steps for micro in step for i in micro]
        assert flat == order(n, 5, 0) + order(n, 5, 1)
        assert all(len(m) <= size for s in steps for m in s) and all(1 <= len(s) <= accum for s in steps)
        assert len(steps) == 2 * -(-n // (size * accum))
    assert len(batches(10, 2, epochs=0.5)) == 3 and len(batches(10, 2, max_steps=23, epochs=1)) == 23
    assert batches(10, 2, max_steps=7) == batches(10, 2, epochs=2)[:7]


# ---- the two views


def records_of(images: Path) -> list[Record]:
    data = [GOOD, record("Hi there you", "Ho", "And this <image>?", "A dog, and two cats.", image="b.png", id="r2"),
            record("Only text", "Yes.", id="r3"), record("<image>\n<image>\nSame?", "No.", image=["a.png", "sub/c.png"], id="r4")]
    return read_records(written(images / "x.json", data))


def test_training_view(images, processor):
    records = records_of(images)
    items = [Dataset(records, processor)[i] for i in range(4)]
    batch = collate(items)
    B, T = batch["input_ids"].shape
    assert (B, T) == (4, max(len(x["input_ids"]) for x in items)) and batch["pixel_values"].shape == (4, 3, 28, 28)
    for row, x in enumerate(items):
        n = len(x["input_ids"])
        assert batch["input_ids"][row, :n].tolist() == x["input_ids"] and batch["labels"][row, :n].tolist() == x["labels"]
        assert batch["attention_mask"][row].tolist() == [1] * n + [0] * (T - n)
        assert (batch["labels"][row, n:] == -100).all() and (batch["input_ids"][row, n:] != processor.image_token_id).all()
        learnt = processor.tokenizer.decode([t for t in x["labels"] if t != -100], skip_special=False)
        said = [m["content"] for m in records[row].messages[1::2]]
        assert learnt.replace("</s>", "|").replace(" ", "") == "".join(s + "|" for s in said).replace(" ", "")
    pictures = [p for r in records for p in r.pictures()]
    for got, im in zip(batch["pixel_values"], pictures, strict=True):
        assert torch.equal(got, processor("<image>", im)["pixel_values"][0])
    assert "pixel_values" not in collate([items[2]])


def test_evaluation_view_is_the_start_of_the_training_view(images, processor):
    records = records_of(images)
    batch, prompts, references = evaluation_batch(records, processor)
    assert prompts == ["What is it?", "And this ?", "Only text", "Same?"]
    assert references == [["A cat."], ["A dog, and two cats."], ["Yes."], ["No."]]
    for row, r in enumerate(records):
        ids = batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist()
        whole = processor.training(r.messages, [r.pictures()] if r.images else None)
        n = len(ids)
        assert whole["input_ids"][:n] == ids
        last = [t for t in whole["labels"][n:] if t != -100]
        assert last == whole["input_ids"][n:] and batch["attention_mask"][row, -n:].all()
        one = evaluation_batch([r], processor)[0]
        assert one["input_ids"][0].tolist() == ids and ("pixel_values" in one) == bool(r.images)
    assert len(batch["pixel_values"]) == 4


def test_too_long_is_refused_before_training_and_nothing_is_cut(images, processor):
    records = records_of(images)
    lengths = [len(Dataset(records, processor)[i]["input_ids"]) for i in range(4)]
    longest = max(lengths)
    assert [len(Dataset(records, processor, max_length=longest)[i]["input_ids"]) for i in range(4)] == lengths
    message = refused(lambda: Dataset(records, processor, max_length=longest - 1), f"--max-length {longest - 1}: 1 of 4", f"({longest})")
    assert records[lengths.index(longest)].id in message


@pytest.mark.parametrize("template", ["llava_hf", "vicuna_v1"])
def test_the_bound_that_spares_counting_tokens_is_one(processor, template):
    p = Processor(processor.tokenizer, processor.image_config, template, processor.image_token_id, 4)
    for text in ("a", "  ", "\n\n\n", "猫🙂", "\x01\x02", "Z" * 50):
        for turns in (1, 20):
            messages = [{"role": "user", "content": text + "?"}, {"role": "assistant", "content": text + "!"}] * turns
            d = Dataset([Record("x", messages)], p, max_length=10**6)
            assert d.tokens(d.records[0], 0) == len(p.training(messages)["input_ids"]) <= d.tokens(d.records[0], 10**6)


def test_pictures_in_memory(processor):
    r = Record("x", [{"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}]}, {"role": "assistant", "content": "It."}],
               [Image.new("RGB", (5, 5), "red")])
    assert Dataset([r], processor)[0]["pixel_values"].shape == (1, 3, 28, 28)
    assert evaluation_batch([r], processor)[0]["pixel_values"].shape == (1, 3, 28, 28)
