"""Parquet with the pictures inside: what is read and when, and every damage in one line."""

import sys
from pathlib import Path

import pytest
from test_records import IMAGE, chat, images, messages, png, record, refused, said, written  # noqa: F401  images: a fixture

from llava_min.data import parquet as parquet_module
from llava_min.data.parquet import Embedded
from llava_min.data.records import SkippedRecords, read_records


@pytest.fixture
def parquet():
    """A function that writes rows in the layout of HuggingFaceH4/llava-instruct-mix-vsft."""
    pa = pytest.importorskip(
        "pyarrow", reason="the extra that reads parquet; pip install -e '.[parquet]'"
    )
    import pyarrow.parquet as pq

    part = pa.struct({"type": pa.string(), "text": pa.string(), "index": pa.int64()})
    schema = pa.schema(
        {
            "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.list_(part)})),
            "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        }
    )

    def write(path: Path, rows: list[dict], schema=schema, group: int = 3, **other) -> Path:
        rows = (
            [{k: v for k, v in row.items() if k != "id"} for row in rows]
            if "id" not in schema.names
            else rows
        )
        pq.write_table(
            pa.Table.from_pylist(rows, schema=schema), path, row_group_size=group, **other
        )
        return path

    write.schema = schema
    return write


def picture(n: int) -> dict:
    return {"bytes": png((n, 10, 200)), "path": f"{n}.png"}


def parquet_rows(n: int = 8) -> list[dict]:
    rows = [
        chat(
            said(f"What is {i}?\n", 0),
            said("It."),
            said("Sure?"),
            said("Yes."),
            images=[picture(i)],
        )
        for i in range(n)
    ]
    rows[1] = chat(said("Text only"), said("So."))
    rows[4] = chat(said("Two?", 1, 0), said("Two."), images=[picture(41), picture(42)])
    return rows


def red(r) -> list[int]:
    return [im.getpixel((0, 0))[0] for im in r.open_images()]


def test_parquet(tmp_path, parquet):
    rows = parquet_rows()
    got = read_records(parquet(tmp_path / "x.bin", rows))
    assert [red(r) for r in got] == [[0], [], [2], [3], [42, 41], [5], [6], [7]] and [
        red(r) for r in reversed(got)
    ][0] == [7]
    assert [r.id for r in got] == list("01234567") and all(
        isinstance(p, Embedded) for r in got for p in r.images
    )
    assert got[0].messages == [
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "What is 0?\n"}]},
        *(
            {"role": role, "content": [{"type": "text", "text": t}]}
            for role, t in (("assistant", "It."), ("user", "Sure?"), ("assistant", "Yes."))
        ),
    ]
    mixed = read_records(
        f"{tmp_path / 'x.bin'}@0.5,{written(tmp_path / 'y.json', [record('Hi', 'Ho')])}"
    )
    assert [r.id for r in mixed] == ["x.bin:1", "x.bin:3", "x.bin:5", "x.bin:7", "r1"]


def test_parquet_pictures_are_read_when_they_are_asked_for(tmp_path, parquet, monkeypatch):
    path = parquet(tmp_path / "x.parquet", parquet_rows())
    reads = []
    monkeypatch.setattr(
        parquet_module,
        "row_images",
        lambda *a, real=parquet_module.row_images: reads.append(a) or real(*a),
    )
    got = read_records(path)
    assert not reads and all(len(repr(r)) < 2000 for r in got)
    red(got[4])
    assert {a[1:] for a in reads} == {(1, 1)}  # its row group, its row


def test_parquet_in_a_forked_process(tmp_path, parquet):
    import multiprocessing

    got = read_records(parquet(tmp_path / "x.parquet", parquet_rows()))
    red(got[0])  # the parent has the file open
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(red, got, chunksize=1) == [red(r) for r in got]


def test_each_process_and_each_state_of_the_file_is_opened_anew(tmp_path, parquet, monkeypatch):
    path = parquet(tmp_path / "x.parquet", parquet_rows())
    first = parquet_module.open_parquet(path)
    assert parquet_module.open_parquet(path) is first
    with monkeypatch.context() as m:
        m.setattr(parquet_module.os, "getpid", lambda: -1)
        assert parquet_module.open_parquet(path) is not first
    parquet(path, parquet_rows(5))
    assert parquet_module.open_parquet(path) is not first


def test_parquet_with_paths_instead_of_bytes(tmp_path, parquet, images):
    rows = parquet_rows()
    rows[3]["images"] = [{"bytes": None, "path": "b.png"}]
    rows[4]["images"] = [{"bytes": None, "path": "sub/c.png"}, picture(9)]
    for statistics in (True, False):
        got = read_records(
            parquet(tmp_path / "x.parquet", rows, write_statistics=statistics), images
        )
        assert (
            got[3].images == [images / "b.png"]
            and red(got[4]) == [9, 80]
            and red(got[5]) == [5]
            and red(got[7]) == [7]
            and not got[1].images
        )


def test_parquet_where_no_image_has_a_path_or_none_has_bytes(tmp_path, parquet, images):
    """What pyarrow and pandas write for {"bytes": …, "path": None}: a column of kind null."""
    import pyarrow as pa

    file, path = tmp_path / "x.parquet", {"bytes": None, "path": "b.png"}
    for image in ({"bytes": png((5, 10, 200)), "path": None}, path):
        row = {"messages": messages("<image>", "x"), "images": [image]}
        columns = {name: pa.array([row[name]]) for name in ("messages", "images")}
        parquet(file, [row], schema=pa.table(columns).schema)
        (got,) = read_records(file, images)
        assert got.images == [images / "b.png"] if image is path else red(got) == [5]


BAD_ROWS = {
    "bytes null": (
        chat(said("Hi", 0), said("x"), images=[{"bytes": None, "path": None}]),
        "image 0 is null",
    ),
    "picture null": (
        chat(said("Hi", 1, 0), said("x"), images=[picture(1), None]),
        "image 1 is null",
    ),
    "path absent": (
        chat(said("Hi", 0), said("x"), images=[{"bytes": None, "path": "gone.png"}]),
        "no image",
    ),
    "path outside": (
        chat(said("Hi", 0), said("x"), images=[{"bytes": None, "path": "/etc/passwd"}]),
        "lies outside",
    ),
    "images null": (
        {"messages": chat(said("Hi", 0), said("x"))["messages"], "images": None},
        "image index 0",
    ),
    "messages null": ({"messages": None, "images": []}, "messages is null"),
    "content null": (chat(None, said("x")), "content is null"),
}


@pytest.mark.parametrize("row, words", BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_rows(tmp_path, parquet, images, row, words):
    rows = parquet_rows() + [
        chat(said("Hi", 0), said("x"), images=[{"bytes": None, "path": "a.png"}])
    ]
    path = parquet(tmp_path / "x.parquet", [*rows[:5], row, *rows[5:]])
    refused(lambda: read_records(path, images), f"{path}: 1 of 10 records are bad: row 5:", words)
    assert len(read_records(path, images, SkippedRecords(cap=0.2))) == 9


DAMAGES = {  # what happens to a whole file's bytes, and words of the line it deserves
    "cut by a byte": (lambda x: x[:-1], "not whole or not parquet"),
    "cut within its footer": (lambda x: x[:-5], "not whole or not parquet"),
    "half": (lambda x: x[: len(x) // 2], "not whole or not parquet"),
    "its first bytes alone": (lambda x: x[:4], "not whole or not parquet"),
    "nothing between its ends": (
        lambda x: b"PAR1" + bytes(100) + b"PAR1",
        "not whole or not parquet",
    ),
    "length of the footer": (lambda x: x[:-8] + b"\xff" * 4 + b"PAR1", "not whole or not parquet"),
    "last bytes": (lambda x: x[:-4] + b"PAR2", "not whole or not parquet"),
    "first bytes": (
        lambda x: b"PAR2" + x[4:],
        "is not UTF-8, and it does not begin as parquet does",
    ),
}


@pytest.mark.parametrize("damage, words", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_parquet_file_is_one_line(tmp_path, parquet, damage, words):
    path = tmp_path / "x.parquet"
    whole = parquet(path, parquet_rows()).read_bytes()
    refused(lambda: read_records(written(path, damage(whole))), str(path), words)


def test_other_columns(tmp_path, parquet):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, text = (
        tmp_path / "x.parquet",
        pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
    )
    both = pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    for fields in (
        {
            "messages": text,
            "images": pa.list_(pa.struct({"bytes": pa.string(), "path": pa.string()})),
        },
        {
            "messages": text,
            "images": pa.list_(pa.struct({"bytes": pa.int64(), "path": pa.string()})),
        },
        {
            "messages": text,
            "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.int64()})),
        },
        {"messages": text, "images": pa.list_(pa.struct({"data": pa.binary()}))},
        {"messages": text, "images": both, "image": pa.binary()},
        # bytes in the ways that numpy, polars and pandas may write them
        {"messages": text, "images": pa.list_(pa.list_(pa.uint8()))},
        {"messages": text, "images": pa.list_(pa.binary(9))},
        {"messages": text, "image": pa.list_(pa.int8())},
        {"messages": text, "image": pa.binary(9)},
        {"messages": text, "image": pa.dictionary(pa.int32(), pa.binary())},
    ):
        message = refused(
            lambda: read_records(parquet(path, [], schema=pa.schema(fields))),
            "expected image or images, not both",
        )
        name = next(name for name in fields if name != "messages")
        written_as = (
            pq.read_schema(path).field(name).type
        )  # parquet has no name for each of arrow's
        assert f"{path}: has {name}, {written_as}" in message
    for fields, row, words in (
        (
            {"text": pa.string()},
            {"text": "x"},
            "messages or conversations is missing (its keys: text)",
        ),
        (
            {"conversations": text},
            {"conversations": messages("Hi", "Ho")},
            "from is None, expected from human or gpt",
        ),
        ({"images": both}, {"images": []}, "is missing (its keys: images)"),
        (
            {"messages": text, "images": pa.string()},
            {"messages": messages("Hi", "Ho"), "images": "a.png"},
            "images is text",
        ),
    ):
        refused(
            lambda: read_records(parquet(path, [row], schema=pa.schema(fields))),
            "1 of 1 records are bad: row 0: ",
            words,
        )
    refused(lambda: read_records(parquet(path, [])), "holds no records")
    (r,) = read_records(
        parquet(
            path,
            [{"id": "z", "messages": messages("Hi", "Ho"), "kind": "k"}],
            schema=pa.schema({"id": pa.string(), "messages": text, "kind": pa.string()}),
        )
    )
    assert r.id == "z" and r.extra == {"kind": "k"} and r.messages == messages("Hi", "Ho")


def test_a_date_that_python_does_not_know(tmp_path, parquet):
    import pyarrow as pa

    schema = pa.schema([*parquet.schema, pa.field("made", pa.timestamp("s"))])
    path = parquet(
        tmp_path / "x.parquet", [row | {"made": 10**12} for row in parquet_rows()], schema=schema
    )
    refused(
        lambda: read_records(path),
        str(path),
        "a date or number is out of range",
        "leave its column out",
    )


def test_row_groups_that_unpack_to_too_much(tmp_path, parquet, monkeypatch):
    path, rows = tmp_path / "x.parquet", parquet_rows()
    monkeypatch.setattr("llava_min.checks.parquet.MAX_BYTES", 20)
    refused(
        lambda: read_records(parquet(path, rows)), "row group 0 unpacks to", "smaller row groups"
    )
    monkeypatch.undo()
    monkeypatch.setattr("llava_min.checks.parquet.MAX_GROUP", 20)
    refused(lambda: read_records(parquet(path, [rows[1]])), "row group 0 unpacks to")


def test_a_parquet_file_that_is_cut_anywhere_is_refused(tmp_path, parquet):
    whole = parquet(tmp_path / "x.parquet", parquet_rows()).read_bytes()
    for n in range(4, len(whole), 97):
        refused(
            lambda: read_records(written(tmp_path / "x.parquet", whole[:n])),
            "x.parquet",
            "not whole or not parquet",
        )


def test_a_damaged_picture_in_parquet_names_its_record(tmp_path, parquet):
    rows = parquet_rows()
    rows[5]["images"][0]["bytes"] = rows[5]["images"][0]["bytes"][:40]
    rows[6]["images"][0]["bytes"] = b""
    got = read_records(parquet(tmp_path / "x.parquet", rows))
    refused(got[5].open_images, "record 5: ", "x.parquet: row group 1 row 2 image 0", "damaged")
    refused(got[6].open_images, "record 6: ", "is empty (0 bytes)")


def test_parquet_without_pyarrow_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    path = written(tmp_path / "y.parquet", b"PAR1 and so on")
    refused(lambda: read_records(path), str(path), "pip install 'llava_min[parquet]'")
