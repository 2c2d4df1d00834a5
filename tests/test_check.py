"""`check`: every kind of bad record is counted and named in the readers' own words, good ones are
measured, and nothing of the data drives the terminal.
"""

import io
import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_min.data.image import ImageConfig, to_pixels
from llava_min.data.records import read_records
from llava_min.errors import UserError
from llava_min.tools import check, check_images, check_records, check_show
from llava_min.training.small_files import processor_of

ESC = "\x1b]0;owned\x07\x1b[2J"


def talk(*values) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]


def record(*values, **other) -> dict:
    return {"id": "r", "conversations": talk(*values), **other}


GOOD = record("<image>\nWhat is it?", "A cat.", image="a.png", id="good")
HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def messages(*turns, **other) -> dict:
    return {"id": "r", "messages": list(turns), **other}


# name -> (raw record, what is said of it)
BAD = {
    "not an object": (17, "is a number"),
    "no conversations": ({"id": "r"}, "conversations is missing|is missing"),
    "null conversations": ({"conversations": None}, "is null"),
    "empty conversations": ({"conversations": []}, "conversations is empty"),
    "conversations no list": ({"conversations": "hi"}, "conversations is text"),
    "turn no object": ({"conversations": ["hi", "ho"]}, "turn 0: is text"),
    "two formats": ({"conversations": talk("a", "b"), "messages": HI}, "one of them"),
    "id is a list": (record("a", "b", id=[1]), "id is a list"),
    "unknown speaker": ({"conversations": [{"from": "bot", "value": "x"}]}, "from is bot"),
    "value null": (record("a", None), "value is null"),
    "value a list": (record("a", ["b"]), "value is a list"),
    "two humans": ({"conversations": [*talk("a"), *talk("b")]}, "another human turn"),
    "no answer": (record("a"), "ends with a human turn"),
    "empty answer": (record("a", "  "), "the answer is empty"),
    "empty question": (record("", "a"), "the question is empty"),
    "image without mark": (record("a", "b", image="a.png"), "1 pictures|1 images"),
    "mark without image": (record("<image>\na", "b"), "0 pictures|0 images"),
    "two marks, one image": (record("<image><image>a", "b", image="a.png"), "mark 2"),
    "image a number": (record("<image>a", "b", image=3), "image is a number"),
    "image empty": (record("<image>a", "b", image=""), "image is empty"),
    "image a URL": (record("<image>a", "b", image="http://x/a.png"), "URL"),
    "image outside": (
        record("<image>a", "b", image="../../etc/passwd"),
        "outside the image folder",
    ),
    "image missing": (record("<image>a", "b", image="none.png"), "none.png"),
    "image and images": (record("<image>a", "b", image="a.png", images=["b.png"]), "one of them"),
    "NUL": (record("a\0", "b"), "NUL"),
    "half a surrogate": (record("a\ud800", "b"), "surrogate"),
    "very long text": (record("a " * 600_000, "b"), "more than 1000000"),
    "too long": (record("word " * 3000, "b"), "tokens, more than --max-length 2048"),
    "nothing learned": (
        {"conversations": [*talk("a"), {"from": "gpt", "value": "b", "loss": False}]},
        "not to be learned",
    ),
    "label no": (record("a", "b", label=False), "not to be learned"),
    "loss is text": (
        {"conversations": [*talk("a"), {"from": "gpt", "value": "b", "loss": "no"}]},
        "loss is text",
    ),
    "video unread": (record("<video>\nWhat?", "b", video="a.mp4"), "video"),
    "system a list": (record("a", "b", system=["x"]), "system is a list"),
    "message no object": (messages("hi"), "message 0 is text"),
    "content a number": (messages({"role": "user", "content": 3}), "content is a number"),
    "unknown part": (
        messages({"role": "user", "content": [{"type": "audio"}]}, HI[1]),
        "part|audio",
    ),
    "unknown role": (messages({"role": "tool", "content": "x"}, HI[1]), "expected role user"),
    "two users": (messages(HI[0], HI[0]), "expected role assistant"),
    "last not answered": (messages(*HI, HI[0]), "without an answer|ends"),
    "empty reply": (messages(HI[0], {"role": "assistant", "content": " "}), "answer is empty"),
    "image in the answer": (
        messages(HI[0], {"role": "assistant", "content": [{"type": "image"}]}, images=["a.png"]),
        "only user messages|holds a picture|holds an image",
    ),
    "index out of range": (
        messages(
            {"role": "user", "content": [{"type": "image", "index": 5}]}, HI[1], images=["a.png"]
        ),
        "index 5",
    ),
}


@pytest.fixture(scope="module")
def processor():
    return processor_of("tiny")


@pytest.fixture
def folder(tmp_path) -> Path:
    for i, name in enumerate(("a.png", "b.png")):
        Image.new("RGB", (9 + i, 7), (40 * i, 90, 10)).save(tmp_path / name)
    return tmp_path


def write(path: Path, data) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def run(*argv, capsys) -> tuple[int, str]:
    code = check.main(list(map(str, argv)))
    return code, capsys.readouterr().out


# ---- records


def test_there_are_thirty_kinds_and_more():
    assert len(BAD) >= 30


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_counted_and_named_among_good_ones(name, folder, capsys):
    raw, said = BAD[name]
    data = write(folder / "d.json", [GOOD, raw, GOOD | {"id": "other"}])
    code, out = run(data, "--no-images", capsys=capsys)
    assert code == 1 and "3 records, 1 of them bad" in out and "record 1" in out
    assert re.search(said, out), out
    assert "good: 2 records, 2 with an image" in out


def test_all_at_once_fall_apart_into_their_kinds(folder, processor):
    data = [raw for raw, _ in BAD.values()] * 2 + [GOOD]
    (file,) = check_records.read_files(write(folder / "d.json", data), None, processor, 2048, 1)
    kinds = file.bad.sorted()
    assert len(file.bad) == 2 * len(BAD) and len(file.seen) == 1
    assert all(len(where) % 2 == 0 for _, where in kinds)
    # a few are one fault to the readers: `value` null or a list, and the like
    assert len(kinds) >= 30


def test_many_records_by_several_processes_give_the_same(folder, processor, monkeypatch):
    data = ([GOOD, BAD["value null"][0], record("Hi", "Ho")] * 120)[:350]
    path = write(folder / "d.json", data)
    one, two = (
        check_records.read_files(path, None, processor, 2048, workers)[0] for workers in (1, 2)
    )
    assert one.seen == two.seen and one.bad.sorted() == two.bad.sorted()
    assert len(one.bad) == 117


def test_tokens_and_what_is_supervised_are_those_of_training(folder, processor):
    data = write(folder / "d.json", [GOOD])
    (file,) = check_records.read_files(data, None, processor, 2048, 1)
    (seen,) = file.seen
    row = processor.training(file.record(seen).messages, [Image.new("RGB", (9, 7))])
    assert seen.tokens == len(row["input_ids"])
    assert seen.supervised == sum(label != -100 for label in row["labels"]) > 0


@pytest.mark.parametrize(
    "data, said",
    [
        ("", "is empty"),
        ("[]", "holds no records"),
        ('[{"id": 1,}]', "line 1 column"),
        ('{"data": [{"id": 1}]}', "one JSON object"),
        ('[{"id": NaN}]', "NaN"),
        ('[{"id": 1, "id": 2}]', "given twice"),
        ("[" * 100_000, "nested"),
        ("no\x1b[31m\nJSON", "d.json:1: column 1"),
    ],
)
def test_a_file_that_is_wrong_as_a_whole_is_one_line(data, said, folder):
    with pytest.raises(UserError, match=said):
        check.main([str(write(folder / "d.json", data))])


def test_where_no_image_is_found_the_records_are_still_read(folder, capsys):
    """The folder is wrong, and the rest of what is to say does not wait for the right one."""
    lost = [record("<image>a", "a cat", image=f"x{i}.png", id=i) for i in range(9)]
    talks = [record("a", "b", id="t"), record("<image>a", "no " * 3000, image="x.png", id="long")]
    lines = [*map(json.dumps, [*lost, *talks]), '{"id": 1,}']
    (folder / "d.jsonl").write_text("\n".join(lines))
    code, out = run(folder / "d.jsonl", capsys=capsys)
    assert code == 1 and "d.jsonl: 12 records, 11 of them bad" in out and out.endswith("\n11 bad\n")
    assert re.search(r" 9 x 0 of 10 images found under .*x0.png\); check the image folder\n", out)
    assert "line 1 (id 0), line 2 (id 1)" in out and "and 4 more" in out
    assert re.search(r" 1 x \d+ tokens, more than --max-length 2048\n +line 11 \(id long\)", out)
    assert re.search(r" 1 x .*:12: column 10: .*\n +line 12\n", out)
    assert "good but for the images: 10 records, 9 with an image" in out
    assert re.search(r"\n  images +0 +1 +1 +1 +9\n", out) and "10 up to" in out
    page = folder / "p.html"
    code, out = run(folder / "d.jsonl", "--html", page, "--show", "3", capsys=capsys)
    assert code == 1 and page.exists() and out.count("\n-- line ") == 1
    (folder / "d.jsonl").write_text(lines[10])
    assert "note: 0 of 1 images found" in run(folder / "d.jsonl", capsys=capsys)[1]
    (folder / "d.jsonl").write_text("\n".join(lines[:3] + [json.dumps(GOOD)]))
    out = run(folder / "d.jsonl", capsys=capsys)[1]
    assert "3 x no image " in out and "  good: 1 records" in out  # the folder is the right one


def test_broken_lines_are_counted_by_kind_with_their_numbers(folder, capsys):
    good = json.dumps(GOOD)
    broken = [
        good[:40],
        good,
        '{"id": 1,}',
        good[:30] + f"{ESC}",
        "",
        good,
        '{"id": 2,}',
        '{"id": NaN}',
        '{"id": 1, "id": 2}',
        "[" * 100_000,
        good + good,
        '{"id": ' + "1" * 5000 + "}",
        "not JSON",
        json.dumps(record("a", "  ")),
    ]
    for text in ("\n".join(broken), "\r\n".join(broken), "\n".join(broken[1:] + broken[:1])):
        (folder / "d.jsonl").write_bytes(text.encode())
        code, out = run(folder / "d.jsonl", "--no-images", capsys=capsys)
        assert code == 1 and "13 records, 11 of them bad" in out and "good: 2 records" in out
        kinds = re.findall(r"^ +(\d+) x (.*)\n +(line .*)$", out, re.M)
        assert sum(int(n) for n, _, _ in kinds) == 11 and len(kinds) >= 8
        assert "\x1b" not in out and "the answer is empty" in out
        (twice,) = [where for _, said, where in kinds if "property name" in said]
        assert twice == ("line 2, line 6" if text.startswith(good) else "line 3, line 7")
    with pytest.raises(UserError, match=r"d.jsonl:\d: column"):  # training stops at the first
        read_records(folder / "d.jsonl")
    (folder / "d.jsonl").write_text(good[:20])
    with pytest.raises(UserError, match="column"):
        run(folder / "d.jsonl", capsys=capsys)


def test_what_is_legal_and_perhaps_not_meant_is_noted(folder, capsys):
    headless = {"conversations": [{"from": "gpt", "value": "b"}, *talk("c", "d")]}
    data = [GOOD, GOOD, headless]
    code, out = run(write(folder / "d.json", data), capsys=capsys)
    assert code == 0
    assert "1 ids stand on more than one record, such as good" in out
    assert "1 records say what another one says" in out
    assert "begin with an answer" in out


def test_what_evaluation_and_training_share_is_counted(folder, capsys):
    Image.open(folder / "a.png").save(folder / "copy.png")
    same = GOOD | {"id": "e", "conversations": talk("<image>\nWhat is it?", "A dog.")}
    other = record("<image>\nElse?", "No.", image="a.png")
    copied = record("<image>\nElse?", "No.", image="copy.png")
    data = write(folder / "d.json", [GOOD])
    held_out = write(folder / "e.json", [same, other, copied])
    code, out = run(data, "--eval-data", held_out, capsys=capsys)
    assert code == 0
    assert "1 of 3 evaluation records ask what a training record asks" in out
    assert "2 of 3 evaluation records show an image of the training" in out
    assert "byte for byte" not in out
    code, out = run(data, "--eval-data", held_out, "--decode", capsys=capsys)
    assert "1 image files of the evaluation are, byte for byte, in the training" in out


# ---- images


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(w: int, h: int) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def jpeg() -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(out, "JPEG")
    return out.getvalue()


def checksum_wrong() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 8, 7)).save(out, "PNG")
    data = bytearray(out.getvalue())
    data[data.index(b"IEND") - 5] ^= 1  # the last byte of the pixel data's checksum
    return bytes(data)


# bytes of the file, what is said; the last two need every pixel
BAD_IMAGES = {
    "empty": (b"", "0 bytes"),
    "html": (b"<!doctype html><p>404", "HTML"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
    "json": (b'{"error": 1}', "JSON"),
    "pdf": (b"%PDF-1.4", "PDF"),
    "noise": (b"\x01\x02\x03" * 50, "not an image"),
    "bomb": (huge_png(14000, 14000), "above the limit"),
    "large": (huge_png(10000, 10000), "above the limit"),
    "narrow": (huge_png(60000, 2), "crop it first"),
    "cut short": (jpeg()[:900], "damaged or cut short"),
    "bad checksum": (checksum_wrong(), "damaged or cut short"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_named_with_its_record(name, folder, capsys):
    data, said = BAD_IMAGES[name]
    (folder / "bad.png").write_bytes(data)
    records = [GOOD, record("<image>a", "b", image="bad.png", id="poor")]
    path = write(folder / "d.json", records)
    code, out = run(path, "--decode", capsys=capsys)
    assert code == 1 and "2 different, 1 of them bad" in out and "record 1 (id poor)" in out
    assert re.search(said, out), out
    quick = run(path, capsys=capsys)
    pixels = name in ("cut short", "bad checksum")
    assert quick[0] == (0 if pixels else 1) and (pixels or re.search(said, quick[1]))


def test_headers_give_the_sizes_that_decoding_gives(folder):
    images = [(folder / name, folder, "r") for name in ("a.png", "b.png", "a.png")]
    quick, whole = (check_images.look_at_all(images, False, d, 1) for d in (False, True))
    assert quick.sizes == whole.sizes == [(9, 7), (10, 7)]


def test_what_opening_warns_of_is_counted_by_kind(folder, capsys):
    for name in ("c.tif", "d.tif"):
        Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(folder / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 8)).save(folder / "e.jpg", exif=exif)
    names = ("c.tif", "d.tif", "e.jpg")
    records = [record("<image>a", "b", image=n, id=n) for n in names]
    path = write(folder / "d.json", records)
    code, out = run(path, "--decode", capsys=capsys)
    assert code == 0 and "1 images: EXIF orientation N is ignored" in out


# ---- shown


def test_supervised_text_is_coloured_on_a_terminal_alone(folder, capsys, monkeypatch):
    path = write(folder / "d.json", [GOOD])
    _, out = run(path, "--show", 1, capsys=capsys)
    assert "\x1b" not in out and "⟦ A cat.</s>⟧" in out and "[image 0: 64 tokens" in out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    _, out = run(path, "--show", 1, capsys=capsys)
    assert "\x1b[1;32m A cat.</s>\x1b[0m" in out and "\x1b[7m[image 0" in out


def test_the_data_cannot_drive_the_terminal(folder, capsys):
    hostile = record(f"<image>{ESC}", f"b{ESC}", image="a.png", id=ESC, **{f"bbox{ESC}": 1})
    bad = record("a", "b", id=ESC, image=f"{ESC}.png")
    path = write(folder / "d.json", [hostile, bad])
    _, out = run(path, "--show", 2, "--html", folder / "p.html", capsys=capsys)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out) and "\\x1b]0;owned" in out
    assert "\x1b" not in (folder / "p.html").read_text()


def test_the_page_shows_the_image_that_the_model_sees(folder, processor):
    image = Image.open(folder / "b.png").resize((40, 20))
    config = ImageConfig(28, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), "pad")
    from base64 import b64decode

    shown = Image.open(io.BytesIO(b64decode(check_show.as_seen(image, config).split(",")[1])))
    x = np.asarray(shown).astype(np.float32).transpose(2, 0, 1) / 255
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (config.mean, config.std))
    assert np.abs((x - mean) / std - to_pixels(image, config).numpy()).max() < 1e-5
    assert shown.getpixel((0, 0)) == (127, 102, 76)  # padded with the mean colour


def test_the_page_escapes_and_is_never_overwritten(folder, capsys):
    path = write(folder / "d.json", [record("<script>alert(1)</script>", "<b>x</b>")])
    run(path, "--html", folder / "p.html", capsys=capsys)
    page = (folder / "p.html").read_text()
    assert "&lt;script&gt;alert(1)" in page and "<script>alert" not in page
    with pytest.raises(UserError, match="exists"):
        check.main([str(path), "--html", str(folder / "p.html")])
    with pytest.raises(UserError, match="--html: .*/none: no such folder; make it"):
        check.main([str(path), "--html", str(folder / "none" / "p.html")])
    bad = write(folder / "bad.json", [{"id": "x"}])
    _, out = run(path, "--eval-data", bad, capsys=capsys)
    assert "were not compared" in out and "share nothing" not in out


def test_without_data_it_says_what_to_give():
    with pytest.raises(UserError, match="DATA: give a file"):
        check.main([])
