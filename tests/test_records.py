"""Readers: good files are read as LLaVA and transformers do, every bad record is refused, counted
and named.
"""

import codecs
import gzip
import io
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from PIL import Image

from llava_min.data.chat import split_content, text_of
from llava_min.data.records import SkippedRecords, hash_images, hash_records, read_records
from llava_min.errors import UserError

IMAGE = {"type": "image"}


@pytest.fixture
def images(tmp_path) -> Path:
    root = tmp_path / "pictures"
    (root / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "sub/c.png", "ü x.png")):
        Image.new("RGB", (9 + i, 7), (40 * i, 90, 10)).save(root / name)
    Image.new("RGB", (3, 3)).save(tmp_path / "outside.png")
    return root


def talk(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]


def record(*values: str, **other) -> dict:
    return {"id": "r1", "conversations": talk(*values), **other}


def written(path: Path, data) -> Path:
    path.write_bytes(
        data
        if isinstance(data, bytes)
        else data.encode()
        if isinstance(data, str)
        else json.dumps(data).encode()
    )
    return path


def png(colour, size=(6, 4)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


GOOD = record("<image>\nWhat is it?", "A cat.", image="a.png")


# ---- what is read


def test_json_and_jsonl_by_what_they_hold_not_by_their_name(tmp_path, images):
    many = [record("Hi", f"Ho {i}", id=i) for i in range(3)]
    lines = "\n\n".join(json.dumps(r) for r in many) + "\n"
    read = [
        read_records(written(tmp_path / name, data), images)
        for name, data in (
            ("a.json", many),
            ("b.jsonl", many),
            ("a.jsonl", lines),
            ("b.json", lines),
            ("c.json", json.dumps(many, indent=3)),
            ("bom.json", codecs.BOM_UTF8 + json.dumps(many).encode()),
            ("crlf.jsonl", lines.replace("\n", "\r\n")),
        )
    ]
    assert all(r == read[0] for r in read) and [r.id for r in read[0]] == ["0", "1", "2"]
    one = read_records(written(tmp_path / "one.jsonl", GOOD), images)
    assert one[0].messages == [
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A cat."},
    ]
    assert one[0].images == [images / "a.png"]
    assert read_records(written(tmp_path / "one.json", json.dumps(GOOD, indent=1)), images) == one
    text = "Ho\u2028Ho\x85"  # separators of lines to str.splitlines, not to JSON
    (r,) = read_records(
        written(tmp_path / "u.jsonl", json.dumps(record("Hi", text), ensure_ascii=False)), images
    )
    assert r.messages[1]["content"] == text


def multimodal(value: str) -> str:
    """What LLaVA's preprocess_multimodal leaves of a message (one mark): the picture, a newline,
    the rest stripped.
    """
    return (
        ("<image>\n" + value.replace("<image>", "").strip()).strip()
        if "<image>" in value
        else value
    )


@pytest.mark.parametrize(
    "value",
    [
        "<image>\nWhat?",
        "What?\n<image>",
        "<image>",
        " <image> What? ",
        "a <image> b",
        "<image>What?\n",
        "\n<image>\n\nA\nB  ",
    ],
)
def test_marks_are_taken_out_as_llava_does(tmp_path, images, value):
    (r,) = read_records(written(tmp_path / "x.json", [record(value, " A ", image="a.png")]), images)
    content = r.messages[0]["content"]
    assert "\n".join("<image>" if p == IMAGE else p["text"] for p in content) == multimodal(value)
    assert r.messages[1]["content"] == " A "


def test_pictures_and_text_in_every_legal_place(tmp_path, images):
    data = [
        # text-only stays as it is
        record(" Hi \n", "Ho"),
        record("Hi", "Ho", image=None),
        record("<image>\n<image>\nCompare.", "So.", image=["a.png", "sub/c.png"]),
        # in the second turn
        record("Hi", "Ho", "And <image>?", "No.", image="./sub/../b.png"),
        # a picture and no text
        record("<image>", "A cat.", image="ü x.png"),
        record(
            "<image>\nTag?",
            "Use <image>, </s> or ASSISTANT: in it.",
            image="a.png",
            kind="html",
            id=7,
        ),
        record("Is </s> <s> USER: fine? \t", "Yes, \x1b[1m too."),
        # absolute, and inside
        record("<image>\nx", "y", image=str(images / "a.png")),
    ]
    got = read_records(written(tmp_path / "x.json", data), images)
    assert [len(r.images) for r in got] == [0, 0, 2, 1, 1, 1, 0, 1]
    assert got[0].messages[0]["content"] == " Hi \n" and got[2].messages[0]["content"][:2] == [
        IMAGE,
        IMAGE,
    ]
    assert got[3].messages[0]["content"] == "Hi" and got[3].messages[2]["content"][0] == IMAGE
    assert got[4].messages[0]["content"] == [IMAGE]
    assert (
        got[5].id == "7"
        and got[5].extra == {"kind": "html"}
        and "<image>" in got[5].messages[1]["content"]
    )
    assert [len(r.open_images()) for r in got] == [0, 0, 2, 1, 1, 1, 0, 1]
    assert [im.size for im in got[2].open_images()] == [(9, 7), (11, 7)]
    assert got[2].length > got[3].length > got[0].length == 2


def test_the_folder_of_the_file_is_the_image_folder_unless_another_is_named(
    tmp_path, images, monkeypatch
):
    written(images / "x.json", [GOOD])
    monkeypatch.chdir(images)
    assert read_records("x.json")[0].open_images()[0].size == (9, 7)
    monkeypatch.chdir(tmp_path)
    assert read_records("pictures/x.json", "pictures")[0].open_images()[0].size == (9, 7)
    assert read_records(written(images / "x.json", [GOOD]))[0].images == [images / "a.png"]
    with pytest.raises(UserError, match="0 of 1 images found"):
        read_records(written(tmp_path / "x.json", [GOOD]))
    with pytest.raises(UserError, match="no such folder"):
        read_records(tmp_path / "x.json", tmp_path / "nowhere")


def test_warnings(tmp_path, images, capsys):
    headless = {"id": "h", "conversations": [{"from": "gpt", "value": "I am."}, *talk("Hi", "Ho")]}
    records = read_records(written(tmp_path / "x.json", [GOOD, GOOD, headless]), images)
    assert records[2].messages == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
    ]
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and "1 records begin with an answer" in err[0] and "r1" in err[1]


def test_fields_that_are_not_used_are_counted_in_one_line(tmp_path, capsys):
    weighed = [
        *talk("Hi"),
        {"from": "gpt", "value": "Ho", "weight": 0, "loss": None},
        *talk("Hi"),
        {"from": "gpt", "value": "Ho", "weight": 0.5},
    ]
    called = [
        {"role": "user", "content": "Hi", "loss": True},
        {"role": "assistant", "content": "Ho", "tool_calls": [{}], "weight": 1},
    ]
    data = [
        record("Hi", "Ho", system="Be kind.", source="web"),
        {"id": "r2", "system": "Be kind.", "tools": [{}], "conversations": weighed},
        {"id": "r3", "weight": 2, "train": 0.5, "messages": called},
    ]
    read_records(written(tmp_path / "x.json", data))
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "x.json: fields that are not used: weight (2 times), tools (1 times), train (1 times), "
        "loss (1 times), tool_calls (1 times); " in line
    )
    assert line.endswith("nothing of them reaches the model: rename, fix or remove them")


def test_the_length_of_a_record_is_its_words_and_256_a_picture(tmp_path, images):
    (r,) = read_records(
        written(
            tmp_path / "x.json",
            [record("<image>\n<image>\nTwo words?", "Yes.", image=["a.png", "sub/c.png"])],
        ),
        images,
    )
    assert r.length == 3 + 2 * 256


def test_what_a_mixture_is_told_by(tmp_path, images):
    """Not by where it lies; by its records in their order, the names of the pictures, and what
    these are.
    """

    def found(folder=images, n=4, skips=None):
        names = ["a.png", "b.png", "sub/c.png", "ü x.png"]
        data = [record("<image>", "x", image=name, id=i) for i, name in enumerate(names[:n])]
        return read_records(written(tmp_path / "x.json", data), folder, skips)

    told_by = lambda records: (hash_records(records), hash_images(records))
    want, moved = told_by(found()), tmp_path / "moved"
    shutil.copytree(images, moved)
    assert told_by(found(moved)) == want == told_by(found())
    assert (
        len({want, told_by(found(n=3)), told_by(found()[::-1]), told_by(found() * 2), told_by([])})
        == 5
    )
    (
        (moved / "a.png").rename(moved / "t"),
        (moved / "b.png").rename(moved / "a.png"),
        (moved / "t").rename(moved / "b.png"),
    )
    assert told_by(found(moved))[0] == want[0] and told_by(found(moved))[1] != want[1]
    shutil.rmtree(moved), shutil.copytree(images, moved)
    with open(moved / "a.png", "ab") as f:
        f.write(bytes(1 << 16))
    longer = told_by(found(moved))
    with open(moved / "a.png", "ab") as f:
        f.write(b"x")  # behind what is looked into
    assert len({want, longer, told_by(found(moved))}) == 3
    shutil.rmtree(moved), shutil.copytree(images, moved)
    read = found(moved)
    (moved / "ü x.png").unlink()
    assert told_by(found(moved, skips=SkippedRecords(cap=0.5))) != want
    (moved / "ü x.png").symlink_to(moved / "gone.png")
    assert told_by(found(moved, skips=SkippedRecords(cap=0.5))) != want
    assert told_by(read) != want  # the image went after it was seen


def test_names_that_some_disks_hold_for_one_are_told(tmp_path, images, capsys):
    shutil.copy(images / "a.png", images / "A.png")
    rows = [
        record("<image>", "x", image=name, id=i)
        for i, name in enumerate(("a.png", "b.png", "a.png", "A.png"))
    ]
    read_records(written(tmp_path / "x.json", rows[:3]), images)
    assert "warning" not in capsys.readouterr().err
    read_records(written(tmp_path / "x.json", rows), images)
    assert (
        "a.png and " in (said := capsys.readouterr().err)
        and "A.png differ in upper and lower case alone" in said
    )


# ---- what is refused: (file content, words the message must hold)

DEEP = '{"id": "r1", "conversations": ' + "[" * 100_000 + "]" * 100_000 + "}"
FILES = {
    "empty": (b"", "is empty"),
    "blank": (b" \n\n", "is empty"),
    "no records": (b"[]", "no records"),
    "bad json": (b'[{"id": 1},\n  {"id": 2,}]', "line 2 column 12"),
    "bad line": (json.dumps(GOOD) + '\n{"id": ', ":2: column 8"),
    "two lists": (b"[]\n[]", "one after the other"),
    **{
        f"top level object, {how}": (
            json.dumps({"data": [GOOD], "version": 1}, indent=n),
            "one JSON object (its keys: data, version), expected records, "
            "but conversations is missing; put "
            "the records into a list",
        )
        for how, n in (("many lines", 1), ("one line", None))
    },
    "empty object": (b"{}", "its keys: none"),
    "records by id": (json.dumps({"r1": GOOD, "r2": GOOD}, indent=1), "its keys: r1, r2"),
    "objects over many lines": (
        json.dumps(GOOD, indent=1) * 2,
        "one after the other: join them into one list",
    ),
    "object cut": (json.dumps(GOOD, indent=1)[:60], "line 6 column"),
    "utf-16": (json.dumps([GOOD]).encode("utf-16"), "UTF-16"),
    "invalid utf-8": (json.dumps([GOOD]).encode() + b"\xff", "byte 139"),
    "gzip": (gzip.compress(b"[]"), "gzip"),
    "zip": (b"PK\x03\x04....", "zip"),
    "parquet": (b"PAR1....", "parquet"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "key twice": (
        '[{"id": "r1", "image": "a.png", "image": "b.png", "conversations": []}]',
        "key image of record r1",
    ),
    "NaN": ('[{"id": "r1", "score": NaN, "conversations": []}]', "NaN is not JSON"),
    "Infinity": ('{"score": -Infinity}', "-Infinity is not JSON"),
    "deep": (DEEP, "nested too deeply"),
    "long number": ("[" + "9" * 5000 + "]", "4300 digits; correct it, or quote it"),
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
    "two humans": (
        {"id": "r1", "conversations": [*talk("Hi"), *talk("Ho", "Hu")]},
        "turn 1: another human turn",
    ),
    "two answers": (
        {"id": "r1", "conversations": [*talk("Hi", "Ho"), {"from": "gpt", "value": "x"}]},
        "another gpt turn",
    ),
    "only gpt": (
        {"id": "r1", "conversations": [{"from": "gpt", "value": "x"}]},
        "turn 0: another gpt turn",
    ),
    "unknown from": (
        {"id": "r1", "conversations": [{"from": "system", "value": "x"}]},
        "from is system",
    ),
    "from a list": (
        {"id": "r1", "conversations": [{"from": ["human"], "value": "x"}]},
        "expected from human or gpt",
    ),
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
    "image without mark": (
        record("Hi", "Ho", image="a.png"),
        "1 images, but the human turns mark 0",
    ),
    "mark without image": (record("<image>\nHi", "Ho"), "0 images, but the human turns mark 1"),
    "mark in html": (
        record("Use the `<image>` tag?", "Ho"),
        "0 images, but the human turns mark 1",
    ),
    "empty list of images": (record("<image>\nHi", "Ho", image=[]), "mark 1"),
    "two marks one image": (
        record("<image>\n<image>", "Ho", image="a.png"),
        "1 images, but the human turns mark 2",
    ),
    "one mark two images": (
        record("<image>", "Ho", image=["a.png", "b.png"]),
        "2 images, but the human turns mark 1",
    ),
    "mark in the answer": (
        record("Hi", "<image>", image="a.png"),
        "1 images, but the human turns mark 0",
    ),
    "missing picture": (record("<image>", "Ho", image="gone.png"), "no image"),
    "other case": (record("<image>", "Ho", image="A.png"), "no image"),
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
    refused(
        lambda: read_records(path, images),
        f"{path}: 1 of 3 records are bad: record 2" + " (id r1)" * named,
        words,
    )
    written(path, "\n".join(map(json.dumps, [GOOD, raw, GOOD])))
    refused(lambda: read_records(path, images), "line 2" + " (id r1)" * named, words)


def test_all_bad_records_are_counted_and_the_first_named(tmp_path, images):
    data = [GOOD, *(record("Hi", "", id=f"bad {i} \x1b[31m") for i in range(300)), GOOD]
    message = refused(
        lambda: read_records(written(tmp_path / "x.json", data), images),
        "300 of 302",
        "record 1 ",
        "record 5 ",
    )
    assert "record 6" not in message
    all_missing = [record("<image>", "x", image=f"{i}.png") for i in range(200)]
    refused(
        lambda: read_records(written(tmp_path / "x.json", all_missing), images),
        "0 of 200 images found under",
    )


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
        (r,) = read_records(
            written(tmp_path / "x.json", [record("<image>", "x", image=name)]), images
        )
        refused(r.open_images, "record r1: ", words)


@pytest.mark.parametrize("name", ["sub", ".", "to_folder", "to_nothing", "to_itself", "pipe.png"])
def test_an_image_path_that_is_no_file_is_a_bad_record(tmp_path, images, name):
    for link, target in (
        ("to_file", "a.png"),
        ("to_folder", "sub"),
        ("to_nothing", "gone.png"),
        ("to_itself", "to_itself"),
    ):
        os.symlink(target, images / link)
    os.mkfifo(images / "pipe.png")
    good = record("<image>", "x", image="to_file", id="good")
    assert len(read_records(written(tmp_path / "x.json", [GOOD, good]), images)) == 2
    written(tmp_path / "x.json", [GOOD, good, record("<image>", "x", image=name)])
    refused(
        lambda: read_records(tmp_path / "x.json", images),
        "1 of 3 records are bad: record 2 (id r1): no image ",
    )


def test_no_bytes_of_a_file_escape_as_another_error(tmp_path, images):
    rng, path, outcomes = random.Random(0), tmp_path / "x.json", {"read": 0, "refused": 0}
    for whole in (
        json.dumps([GOOD, record("Hi", "Ho")]),
        json.dumps(GOOD) + "\n" + json.dumps(record("Hi", "Ho")),
    ):
        for _ in range(400):
            data = bytearray(whole.encode())
            for _ in range(rng.randint(1, 4)):
                i = rng.randrange(len(data))
                data[i : i + rng.randint(0, 3)] = rng.choice(
                    [b"", b"[", b"{", b'"', b"\\", b"null", rng.randbytes(2), data[:9]]
                )
            try:
                assert 1 <= len(read_records(written(path, bytes(data)), images)) <= 2
                outcomes["read"] += 1
            except UserError as e:
                assert str(path) in str(e) and "\n" not in str(e) and len(str(e)) <= 2000
                outcomes["refused"] += 1
    assert outcomes["read"] >= 20 and outcomes["refused"] >= 400, outcomes


# ---- messages


def said(text: str, *indices: int | None, text_first: bool = True) -> list[dict]:
    """A content with image parts, as parquet gives it: every part has every field."""
    parts = [{"type": "image", "index": index, "text": None} for index in indices]
    return (
        [{"type": "text", "text": text, "index": None}, *parts]
        if text_first
        else [*parts, {"type": "text", "text": text, "index": None}]
    )


def messages(*contents, roles=("user", "assistant")) -> list[dict]:
    return [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]


def chat(*contents, images=(), id="r1", **other) -> dict:
    return {"id": id, "messages": messages(*contents), "images": list(images), **other}


def test_messages_are_what_the_llava_form_of_them_is(tmp_path, images):
    """The same conversations in either format are the same records, wherever the image part stands."""
    llava = [
        record("<image>\nWhat is it?", "A cat.", "Sure?", "Yes.", image="a.png"),
        record("Hi", "Ho"),
        record(
            "<image>\n<image>\nSame?",
            "No.",
            "And <image>?",
            "So.",
            image=["a.png", "b.png", "sub/c.png"],
        ),
    ]
    want = read_records(written(tmp_path / "x.json", llava), images)
    for text_first in (True, False):
        for index in (True, False):
            ix = lambda *i: i if index else [None] * len(i)
            data = [
                chat(
                    said("What is it?", *ix(0), text_first=text_first),
                    said("A cat."),
                    said("Sure?"),
                    "Yes.",
                    images=["a.png"],
                ),
                chat("Hi", said("Ho")),
                chat(
                    said("Same?", *ix(0, 1), text_first=text_first),
                    "No.",
                    said("And ?", *ix(2), text_first=text_first),
                    "So.",
                    images=["a.png", {"path": "b.png", "bytes": None}, "sub/c.png"],
                ),
            ]
            got = read_records(
                written(tmp_path / "m.jsonl", "\n".join(map(json.dumps, data))), images
            )
            assert [r.images for r in got] == [r.images for r in want]
            for a, b in zip(got, want):
                assert [m["role"] for m in a.messages] == [m["role"] for m in b.messages]
                assert [text_of(m) for m in a.messages] == [text_of(m) for m in b.messages]
                assert [split_content(m)[0] for m in a.messages] == [
                    split_content(m)[0] for m in b.messages
                ]
            assert got == read_records(written(tmp_path / "m.json", data), images)


def test_messages_name_their_pictures(tmp_path, images):
    system = {"role": "system", "content": said("Be short.")}
    data = [
        # in any order, one shown twice
        chat(said("Which?", 1, 0, 1), "The first.", images=["a.png", "b.png"]),
        # marks in plain strings
        chat(
            "<image>\nWhat? <image>", "That.", "<image>", "It.", images=["a.png", "b.png", "a.png"]
        ),
        # text where there are parts
        chat(said("The <image> tag?", 0), "Use <image>.", images=["a.png"]),
        # and where there are no pictures
        chat("What is <image>?", "A tag."),
        {"messages": [system, *chat("Hi", "Ho")["messages"]], "images": None, "source": "s"},
    ]
    got = read_records(written(tmp_path / "x.json", data), images)
    names = [[p.name for p in r.images] for r in got]
    assert names == [["b.png", "a.png", "b.png"], ["a.png", "b.png", "a.png"], ["a.png"], [], []]
    assert got[1].messages[0]["content"] == [
        IMAGE,
        IMAGE,
        {"type": "text", "text": "What?"},
    ] and got[1].messages[2]["content"] == [IMAGE]
    assert (
        text_of(got[2].messages[0]) == "The <image> tag?"
        and got[3].messages[0]["content"] == "What is <image>?"
    )
    assert got[4].messages[0] == {
        "role": "system",
        "content": [{"type": "text", "text": "Be short."}],
    }
    assert got[4].id == "4" and got[4].extra == {"source": "s"}


BAD_MESSAGES = {
    "no messages": ({"id": "r1", "messages": []}, "messages is empty"),
    "messages object": ({"id": "r1", "messages": {}}, "messages is an object"),
    "message text": ({"id": "r1", "messages": ["Hi"]}, "message 0 is text"),
    "content null": (chat("Hi", None), "message 1: content is null"),
    "content number": (chat(5, "x"), "message 0: content is a number"),
    "unknown part": (chat([{"type": "video"}], "x"), "message 0: unknown part"),
    "part text": (chat(["Hi"], "x"), "message 0: unknown part"),
    "part null": (chat([None], "x"), "message 0: unknown part"),
    "text null": (chat([{"type": "text", "text": None}], "x"), "message 0: unknown part"),
    "video in a part": (
        chat([{"type": "image", "video": "a.mp4"}], "x"),
        "an image part has video",
    ),
    "unknown role": (
        {"id": "r1", "messages": messages("Hi", "Ho", roles=("user", "tool"))},
        "expected role assistant",
    ),
    "starts with the assistant": (
        {"id": "r1", "messages": messages("Hi", "Ho", roles=("assistant", "user"))},
        "expected role user",
    ),
    "system later": (
        {"id": "r1", "messages": messages("Hi", "Ho") + [{"role": "system", "content": "x"}]},
        "message 2",
    ),
    "no answer": (chat("Hi"), "end without an answer"),
    "ends with a question": (chat("Hi", "Ho", "Hi"), "end without an answer"),
    "empty answer": (chat("Hi", " "), "the answer is empty"),
    "empty question": (chat([], "x"), "is empty"),
    "picture in the answer": (chat("Hi", said("x", 0), images=["a.png"]), "holds an image"),
    "index out of range": (chat(said("Hi", 1), "x", images=["a.png"]), "image index 1"),
    "index negative": (chat(said("Hi", -1), "x", images=["a.png"]), "image index -1"),
    "index text": (chat(said("Hi", "0"), "x", images=["a.png"]), "image index 0"),
    "index true": (chat(said("Hi", True), "x", images=["a.png", "b.png"]), "image index True"),
    "index without pictures": (chat(said("Hi", 0), "x"), "image index 0"),
    "some have an index": (
        chat(said("Hi", 0, None), "x", images=["a.png", "b.png"]),
        "image index None",
    ),
    "never named": (
        chat(said("Hi", 0, 0), "x", images=["a.png", "b.png"]),
        "image 1 is named by no message",
    ),
    "no place": (chat("Hi", "x", images=["a.png"]), "1 images, but the messages have 0 places"),
    "more marks than pictures": (
        chat("<image> <image>", "x", images=["a.png"]),
        "1 images, but the messages have 2 places",
    ),
    "images text": ({**chat("Hi", "x"), "images": "a.png"}, "images is text"),
    "picture null": (chat(said("Hi", 0), "x", images=[None]), "image 0 is null"),
    "picture empty": (
        chat(said("Hi", 0), "x", images=[{"path": None, "bytes": None}]),
        "image 0 is null",
    ),
    "bytes in JSON": (
        chat(said("Hi", 0), "x", images=[{"path": "a.png", "bytes": "iVBO"}]),
        "image 0 is an object",
    ),
    "url": (
        chat(said("Hi", 0), "x", images=["https://example.com/a.png"]),
        "image 0 https://example.com/a.png is a URL",
    ),
    "outside": (
        chat(said("Hi", 0), "x", images=["../outside.png"]),
        "image 0 ../outside.png lies outside",
    ),
    "missing picture": (chat(said("Hi", 0), "x", images=["gone.png"]), "no image"),
    "surrogate": (chat("Hi", said("\ud800")), "message 1: holds half of a surrogate"),
    "long": (chat("x" * 1_000_001, "y"), "1000001 characters"),
    "both kinds": (
        {**chat("Hi", "x"), "conversations": talk("Hi", "x")},
        "messages and conversations",
    ),
    "image beside messages": ({**chat("Hi", "x"), "image": "a.png"}, "messages and image"),
    "images beside conversations": (
        record("Hi", "x", images=["a.png"]),
        "1 images, but the human turns mark 0",
    ),
}


@pytest.mark.parametrize("raw, words", BAD_MESSAGES.values(), ids=BAD_MESSAGES.keys())
def test_bad_messages(tmp_path, images, raw, words):
    path = written(tmp_path / "x.json", [GOOD, raw])
    refused(
        lambda: read_records(path, images),
        f"{path}: 1 of 2 records are bad: record 1 (id r1)",
        words,
    )


# ---- mixtures


def test_mixtures(tmp_path, images, monkeypatch, capsys):
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (5, 5)).save(other / "a.png")
    written(
        images / "a.json", [record("<image>", f"A{i}", image="a.png", id=f"a{i}") for i in range(5)]
    )
    written(
        other / "b,@2.jsonl",
        "\n".join(
            json.dumps(chat(said("Hi", 0), f"B{i}", images=["a.png"], id=f"b{i}")) for i in range(4)
        ),
    )
    written(other / "c.json", [{"conversations": talk("Hi", "C")}])
    monkeypatch.chdir(tmp_path)

    def ids(data, *folder):
        return [r.id for r in read_records(data, *folder)]

    assert ids("pictures/a.json, other/c.json") == ["a0", "a1", "a2", "a3", "a4", "c.json:0"]
    got = read_records("pictures/a.json,other/c.json")
    assert got[0].images == [images / "a.png"] and got[0].root == images and got[-1].root == other
    assert ids("other/b,@2.jsonl") == ["b0", "b1", "b2", "b3"]  # a file of that name
    assert ids("pictures/a.json@2") == [f"a{i}" for i in range(5) for _ in range(2)]
    assert ids("pictures/a.json@0.4,other/c.json@3") == ["a2", "a4", *["c.json:0"] * 3]
    assert ids("pictures/a.json@1.4") == ["a0", "a1", "a2", "a2", "a3", "a4", "a4"]
    assert len(ids("pictures/a.json@0.1,other/c.json")) == 1
    assert not capsys.readouterr().err  # repeats are no doubles
    assert (
        ids("other/*.json") == ["0"]
        and ids("other/*n") == ["0"]
        and ids("other/*.json@2,pictures/*.json")[:3] == ["c.json:0", "c.json:0", "a0"]
    )
    written(other / "a.json", [{"conversations": talk("Hi", "A")}])
    # in whichever order the system lists them
    for names in (["a.json", "c.json"], ["c.json", "a.json"]):
        with monkeypatch.context() as m:
            m.setattr(Path, "glob", lambda *_: iter([other / name for name in names]))
            assert ids("other/*.json") == ["a.json:0", "c.json:0"]
    written(tmp_path / "d.json", [record("Hi", "Ho", id="a1")])
    ids("pictures/a.json,d.json")
    assert "1 ids are on more than one record, for example a1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "data, words",
    [
        ("a.json,", "a name is empty"),
        ("a.json@0", "a weight of 0"),
        ("a.json@0.1", "no record is left"),
        ("no*.json", "no such files"),
        ("a.json,gone.json", "gone.json: no such file"),
        ("a.json@x", "a.json@x: no such file"),
        ("a.json@-1", "no such file"),
        ("a.json@100000000", "a.json 1e+08 times is more than 100000000 records; lower the weight"),
        ("a.json@9" + "9" * 400, "a weight of 401 digits"),
        ("a.json,a.json@0." + "3" * 5000, "a weight of 5002 digits; write at most 20"),
        (",".join(["a.json"] * 100 + ["b" * 300]), "File name too long"),
    ],
)
def test_bad_mixtures(tmp_path, monkeypatch, data, words):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "a.json", [record("Hi", "Ho", id=i) for i in range(3)])
    refused(lambda: read_records(data), words)


# ---- bad records that are skipped


def test_bad_records_are_skipped_up_to_a_share_counted_and_listed(tmp_path, images, capsys):
    good = [record("Hi", "Ho", id=i) for i in range(198)]
    data = [
        *good[:50],
        record("Hi", "", id="bad \x1b"),
        *good[50:],
        record("<image>", "x", image="gone.png", id="b"),
    ]
    path, skips = written(tmp_path / "x.json", data), SkippedRecords(tmp_path / "skipped.txt")
    # the wrong folder is nothing to skip
    with pytest.raises(UserError, match="0 of 1 images found"):
        read_records(path, images, skips)
    path = written(
        tmp_path / "x.json", [*data[:-1], record("<image> <image>", "x", image="a.png", id="b")]
    )
    refused(lambda: read_records(path, images), "2 of 200")
    assert [r.id for r in read_records(path, images, skips)] == [str(i) for i in range(198)]
    assert "2 of 200 records are bad and left out: record 50" in capsys.readouterr().err
    skips.write()
    lines = (tmp_path / "skipped.txt").read_text().splitlines()
    assert (
        len(lines) == 2
        and lines[0].startswith(f"{path}: record 50 (id bad \\x1b): turn 1")
        and "(id b)" in lines[1]
    )
    skips.add(lines)  # known already
    refused(
        lambda: skips.add(["record 7: a.png: is damaged"]),
        "3 of 200 records are bad, more than the 1.00%",
    )
    refused(
        lambda: read_records(written(tmp_path / "y.json", data[:60]), images, SkippedRecords()),
        "1 of 60 records are bad, more than",
    )
    exact = SkippedRecords(cap=0.5)
    exact.total = 3
    exact.add(["one"])
    refused(lambda: exact.add(["two"]), "2 of 3 records are bad, more than the 50.00%")
    skips = SkippedRecords()  # the share is of all files together
    assert (
        len(
            read_records(
                f"{written(tmp_path / 'w.json', [GOOD] + data[50:51])},{written(tmp_path / 'z.json', good)}",
                images,
                skips,
            )
        )
        == 199
    )
    assert skips.total == 200 and len(skips.lines) == 1


@pytest.mark.parametrize("text", ['[{"id": 1, "id": 2}]', '[{"id": NaN}]'])
def test_a_fault_within_json_names_its_file_once(tmp_path, text):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(UserError) as told:
        read_records(path, tmp_path)
    assert str(told.value).count(str(path)) == 1
