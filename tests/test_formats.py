"""The formats of a record: every form is read alike from every kind of file, and nothing of a
record is passed over in silence.
"""

import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_dataset import processor  # noqa: F401  a fixture
from test_parquet import parquet, picture, red  # noqa: F401  parquet: a fixture
from test_records import GOOD, IMAGE, chat, images, messages, png, record, refused, talk, written  # noqa: F401

from llava_min.checks import image_file as picture_module
from llava_min.checks.unread import names_media, placeholder
from llava_min.data import formats
from llava_min.data.chat import TEMPLATES, render, text_of
from llava_min.data.data_uri import Encoded, from_data_uri, is_data_uri
from llava_min.data.dataset import Dataset
from llava_min.data.records import count_records, read_records
from llava_min.evaluation.predict import unanswered

TEXT = {"type": "text", "text": "What is it?"}
URI = "data:image/png;base64," + base64.b64encode(png((77, 0, 0))).decode()


def read(path: Path, data, folder=None):
    return read_records(written(path / "x.json", data), folder)


def part(kind: str, **said) -> dict:
    return chat([{"type": kind, **said}, TEXT], "A cat.")


# ---- the forms of an image


FORMS = {
    "LLaVA": GOOD,
    "LLaVA, a list": record("<image>\nWhat is it?", "A cat.", image=["a.png"]),
    "LLaVA, images": record("<image>\nWhat is it?", "A cat.", images=["a.png"]),
    "LLaVA, image and images": record("<image>\nWhat is it?", "A cat.", image="a.png", images=[]),
    "LLaVA, the same twice": record(
        "<image>\nWhat is it?", "A cat.", image="a.png", images=["a.png"]
    ),
    "LLaVA, images as objects": record(
        "<image>\nWhat is it?", "A cat.", images=[{"path": "a.png", "bytes": None}]
    ),
    "messages": chat("<image>\nWhat is it?", "A cat.", images=["a.png"]),
    "OpenAI": part("image_url", image_url={"url": "a.png", "detail": "auto"}),
    "OpenAI, without the object": part("image_url", image_url="a.png"),
    "Qwen": part("image", image="a.png"),
    "Qwen, as parquet gives it": part("image", image="a.png", text=None, index=None),
    "path": part("image", path="a.png"),
    "file://": part("image", image="file://{}/a.png"),
}


@pytest.mark.parametrize("raw", FORMS.values(), ids=FORMS.keys())
def test_each_form_is_the_same_record(tmp_path, images, raw):
    raw = json.loads(json.dumps(raw).replace("{}", str(images)))
    (r,), (want,) = read(tmp_path, [raw], images), read(tmp_path, [GOOD], images)
    assert r.images == [images / "a.png"] and r.messages[0]["content"] == [
        IMAGE,
        want.messages[0]["content"][1],
    ]
    assert text_of(r.messages[1]) == "A cat." and r.open_images()[0].size == (9, 7)
    assert read_records(written(tmp_path / "x.jsonl", json.dumps(raw)), images) == [r]


def test_an_image_inside_the_record(tmp_path, capsys):
    for raw in (
        part("image_url", image_url={"url": URI}),
        part("image", image=URI),
        chat("<image>", "x", images=[URI]),
        record("<image>", "x", image=URI),
        part("image", image=URI.replace("image/png", "image").replace("data", "DATA")),
    ):
        (r,) = read(tmp_path, [raw])
        assert isinstance(r.images[0], Encoded) and red(r) == [77] and len(repr(r)) < 1000
    assert from_data_uri(r.images[0].uri, "x").data == r.images[0].data == png(
        (77, 0, 0)
    ) and is_data_uri(r.images[0].uri)
    assert not capsys.readouterr().err
    (other,) = read(
        tmp_path,
        [
            chat(
                [
                    {"type": "image", "image": "data:;base64," + base64.b64encode(png(1)).decode()},
                    TEXT,
                ],
                "A cat.",
            )
        ],
    )
    (one,) = read(tmp_path, [part("image", image=URI)])
    # what an answer is kept by
    assert (
        one.messages == other.messages and unanswered(one)["record"] != unanswered(other)["record"]
    )


def test_parts_with_an_image_and_parts_with_a_place(tmp_path, images):
    own, place = {"type": "image", "image": "b.png"}, {"type": "image"}
    raw = chat([place, own, place], "x", [own, TEXT], "y", images=["a.png", "sub/c.png"])
    (r,) = read(tmp_path, [raw], images)
    assert [p.name for p in r.images] == ["a.png", "b.png", "c.png", "b.png"]
    (r,) = read(
        tmp_path,
        [
            chat(
                [place | {"index": 1}, own, place | {"index": 0}],
                "x",
                images=["a.png", "sub/c.png"],
            )
        ],
        images,
    )
    assert [p.name for p in r.images] == ["c.png", "b.png", "a.png"]


BAD_FORMS = {
    "a URL": (
        part("image_url", image_url={"url": "https://example.com/a.png"}),
        "message 0: image https://example.com/a.png is a URL",
    ),
    "outside": (part("image_url", image_url={"url": "../outside.png"}), "lies outside"),
    "file:// outside": (
        part("image", image="file:///etc/passwd"),
        "message 0: image /etc/passwd lies outside",
    ),
    "file:// alone": (part("image", image="file://"), "image is empty"),
    "missing": (part("image", image="gone.png"), "no image"),
    "not base64": (part("image", image="data:image/png;base64,@@"), "is not whole base64"),
    "base64 cut": (part("image", image=URI[:-1]), "is not whole base64"),
    "not ASCII": (part("image", image="data:image/png;base64,ä\ud800"), "is not whole base64"),
    "no base64": (part("image", image="data:image/svg+xml,<svg/>"), "data URI without base64"),
    "no bytes": (part("image", image="data:image/png;base64,"), "is empty (0 bytes)"),
    "an object": (part("image", image={"bytes": "x"}), "image is an object"),
    "image_url null": (part("image_url", image_url=None), "an image part has no image_url"),
    "url a number": (part("image_url", image_url={"url": 5}), "image is a number"),
    "an image and an index": (
        part("image", image="a.png", index=0),
        "an image part has image, index, expected one of",
    ),
    "another key": (part("image", image="a.png", cropped=True), "an image part has cropped"),
    "in a text part": (
        chat([{"type": "text", "text": "Hi", "image": "a.png"}], "x"),
        "message 0: a text part has image, expected it in a part",
    ),
    "in an answer": (
        chat("Hi", [{"type": "image_url", "image_url": {"url": URI}}, TEXT]),
        "holds an image",
    ),
    "one left over": (
        {**part("image", image="a.png"), "images": ["b.png"]},
        "1 images, but the messages have 0 places",
    ),
    "image and images": (
        record("<image>", "x", image="a.png", images=["b.png"]),
        "has image and images",
    ),
    "images text": (record("<image>", "x", images="a.png"), "images is text"),
    "image and messages": ({**chat("Hi", "x"), "image": URI}, "messages and image"),
    "another form": (
        {"id": "r1", "query": "Hi", "response": "Ho"},
        "messages or conversations is missing (its keys: id, query, response)",
    ),
    "both null": ({"id": "r1", "messages": None, "conversations": None}, "messages is null"),
}


@pytest.mark.parametrize("raw, words", BAD_FORMS.values(), ids=BAD_FORMS.keys())
def test_bad_forms(tmp_path, images, raw, words):
    refused(
        lambda: read(tmp_path, [GOOD, raw], images),
        "x.json: 1 of 2 records are bad: record 1 (id r1)",
        words,
    )


def test_an_image_inside_a_record_obeys_the_limits_of_a_file(tmp_path, monkeypatch):
    bomb, page = png(0, (60_000, 2)), b"<html></html>"
    for data, words in (
        (bomb, "60000×2 pixels, a side over"),
        (page, "an HTML page"),
        (png(0)[:-20], "is damaged or cut short"),
    ):
        (r,) = read(
            tmp_path,
            [part("image", image="data:image/png;base64," + base64.b64encode(data).decode())],
        )
        refused(r.open_images, "record r1: message 0: image: ", words)
    monkeypatch.setattr(picture_module, "MAX_BYTES", 30)
    refused(
        lambda: read(tmp_path, [part("image", image=URI)]),
        "message 0: image: is larger than the limit",
    )


def test_a_new_format_is_one_entry(tmp_path, images, parquet, monkeypatch):
    import pyarrow as pa

    def from_swift(raw, root):
        turns = messages(raw["query"], raw["response"])
        return formats.from_messages({"messages": turns, "images": raw.get("images")}, root)

    swift = formats.Format("ms-swift", ("query", "response", "images"), from_swift)
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, swift))
    raw = {"query": "<image>What?", "response": "Red.", "images": ["a.png"], "kind": "k"}
    for r in (
        *read(tmp_path, [raw], images),
        *read_records(written(tmp_path / "x.jsonl", json.dumps(raw)), images),
    ):
        assert (
            r.images == [images / "a.png"]
            and r.messages[1]["content"] == "Red."
            and r.extra == {"kind": "k"}
        )
    schema = pa.schema(
        {
            "query": pa.string(),
            "response": pa.string(),
            "images": pa.list_(pa.struct({"bytes": pa.binary()})),
        }
    )
    (r,) = read_records(
        parquet(tmp_path / "x.parquet", [raw | {"images": [{"bytes": png((5, 0, 0))}]}], schema)
    )
    assert red(r) == [5]


@pytest.mark.parametrize(
    "data",
    [
        [{"query": "Hi", "response": "Ho"}],
        {"query": "Hi", "response": "Ho"},
        [{}],
        [{"data": [GOOD]}],
    ],
)
def test_one_record_of_an_unknown_form_is_not_called_a_container(tmp_path, data):
    message = refused(
        lambda: read(tmp_path, data),
        "1 of 1 records are bad",
        "messages or conversations is missing (its keys: ",
    )
    assert "one JSON object" not in message


# ---- parquet


def test_parquet_by_structure(tmp_path, parquet, images):
    """Whatever the elements of a list are called, and in whichever of the usual ways the images are
    kept.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    conversations = pa.list_(pa.struct({"from": pa.string(), "value": pa.string()}))
    said = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    both = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    one, many = picture(7), [picture(7), picture(8)]
    ways = [  # type of the column, what a row holds
        ("images", pa.list_(both), many),
        ("images", pa.large_list(both), many),
        ("images", pa.list_(pa.field("array", both)), many),
        ("images", pa.list_(both, 2), many),
        ("image", pa.list_(both), many),
        ("image", both, one),
        ("images", pa.list_(pa.binary()), [x["bytes"] for x in many]),
        (
            "images",
            pa.list_(pa.struct({"bytes": pa.large_binary()})),
            [{"bytes": x["bytes"]} for x in many],
        ),
        ("image", pa.binary(), one["bytes"]),
        ("image", pa.struct({"path": pa.string(), "bytes": pa.binary()}), one),
    ]
    for name, kind, value in ways:
        n = len(value) if isinstance(value, list) else 1
        rows = [
            {"conversations": talk("<image>" * n + "What?", "x"), name: value},
            {"conversations": talk("Hi", "Ho"), name: None},
        ] * 3
        for compliant in (True, False):
            path = parquet(
                tmp_path / "x.parquet",
                rows,
                pa.schema({"conversations": conversations, name: kind}),
                4,
                use_compliant_nested_type=compliant,
            )
            if "[2]" not in str(kind):  # a list of two has no null to read back
                assert [red(r) for r in read_records(path)] == [[7, 8][:n], []] * 3, (name, kind)
        if name == "images":
            rows = [{"messages": messages("<image>" * n, "x"), name: value}]
            assert red(
                read_records(parquet(path, rows, pa.schema({"messages": said, name: kind})))[0]
            ) == [7, 8]
    for name, kind, value in (
        ("image", pa.string(), "a.png"),
        ("images", pa.list_(pa.string()), ["a.png"]),
        ("images", pa.list_(pa.struct({"path": pa.string()})), [{"path": "a.png"}]),
        ("image", both, {"bytes": None, "path": "a.png"}),
    ):
        path = parquet(
            tmp_path / "x.parquet",
            [{"conversations": talk("<image>", "x"), name: value}],
            pa.schema({"conversations": conversations, name: kind}),
        )
        assert read_records(path, images)[0].images == [images / "a.png"]
    rows = [{"conversations": talk("Hi", "Ho"), "image": {"bytes": None, "path": None}}]
    assert not read_records(
        parquet(path, rows, pa.schema({"conversations": conversations, "image": both}))
    )[0].images
    pq.write_table(pa.table({"image": pa.array([png(0)])}), path)  # the images alone
    refused(
        lambda: read_records(path), "row 0: messages or conversations is missing (its keys: image)"
    )


def test_parquet_reads_no_bytes_where_it_need_not(tmp_path, parquet, monkeypatch):
    import pyarrow as pa

    both = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema(
        {
            "conversations": pa.list_(pa.struct({"from": pa.string(), "value": pa.string()})),
            "image": both,
        }
    )
    path = parquet(
        tmp_path / "x.parquet",
        [{"conversations": talk("<image>", "x"), "image": picture(3)}] * 4,
        schema,
    )
    monkeypatch.setattr(
        "llava_min.data.parquet.group_bytes", lambda *_: pytest.fail("the bytes were read")
    )
    assert count_records(read_records(path)) == "4 records, 4 with an image"


# ---- what is not read


@pytest.mark.parametrize(
    "raw, words",
    [
        (chat("What?", "x", imgs=["a.png"]), "has imgs, which is not read, and no image"),
        (record("What?", "x", image_path="a.png"), "has image_path"),
        (record("What?", "x", video="a.mp4"), "has video"),
        (
            record("<image>\nWhat?", "x", img="a.png"),
            "0 images, but the human turns mark 1 with <image> (it has img, which is not read)",
        ),
        (chat("What?", "x", audios=["a.wav"], videos=["b.mp4"]), "has audios, videos, which"),
        (
            {
                "id": "r1",
                "messages": [
                    {"role": "user", "content": "What?", "images": ["a.png"]},
                    *messages("", "x")[1:],
                ],
            },
            "has images",
        ),
        (chat("What?", "x", metadata={"image": "a.png"}), "has metadata.image, which is not read"),
        (record("What?", "x", data={"images": [{"bytes": "x"}]}), "has data.images"),
        (record("What?", "x", source=[{"a": {"video": "a.mp4"}}]), "has source.a.video"),
        (chat([{**TEXT, "extra": {"audio": "a.wav"}}], "x"), "has extra.audio"),
        (record("<video>\nWhat?", "x"), "message 0: its <video> stands for a video"),
        (chat("What is said?<audio>", "x"), "its <audio> stands for an audio"),
        (
            record("<image>\nHi", "x", "Look.\n<video>", "y", image="a.png"),
            "message 2: its <video>",
        ),
        (chat("<image>\nWhat?", "x"), "its <image> stands for an image"),
    ],
)
def test_a_question_about_what_is_not_read_is_bad(tmp_path, images, raw, words):
    refused(
        lambda: read(tmp_path, [GOOD, raw], images),
        "1 of 2 records are bad: record 1 (id r1)",
        words,
    )


def test_media_beside_an_image_is_told_with_its_count(tmp_path, images, capsys):
    extra = {"audio": "a.wav", "image_path": "b.png"}
    data = [
        GOOD | extra,
        GOOD | extra | {"id": "2"},
        chat("Hi", "x", file_name="c.jpg", id="3"),
        chat("Use the <video> tag?", "x", id="4"),
        chat([{"type": "image", "image": "a.png", "max_pixels": 9}], "x", id="5"),
    ]
    read(tmp_path, data, images)
    fields, marks = capsys.readouterr().err.splitlines()
    assert (
        "fields that are not used: audio (2 times), image_path (2 times), file_name (1 times), "
        "max_pixels (1 times); nothing of them reaches the model" in fields
    )
    assert marks.endswith("are text: <video> (1 times)")


def test_what_stands_inside_other_fields_and_parts_is_counted(tmp_path, images, capsys):
    data = [
        GOOD | {"metadata": {"image": "b.png", "width": 3}},
        chat("Hi", "x", metadata={"origin": {"from": "c.jpg"}}, id="2"),
        part("image_url", image_url={"url": "a.png", "detail": "high"}) | {"id": "3"},
        chat([{**TEXT, "cache_control": {"type": "x"}}], "x", id="4"),
    ]
    read(tmp_path, data, images)
    (fields,) = capsys.readouterr().err.splitlines()
    assert (
        "not used: metadata.image (1 times), metadata.origin.from (1 times), detail (1 times), "
        "cache_control (1 times); nothing" in fields
    )


@pytest.mark.parametrize(
    "mark",
    "<Video> <video/> <IMAGE> <image_1> <image12> <|image_1|> <|image_pad|> <|video|> "
    "<ImageHere> <image_placeholder> <image_token> <audio_pad>".split()
    + ["<video />", "<image 1>"],
)
def test_marks_of_other_programs_are_told_with_their_count(tmp_path, capsys, mark):
    quiet = (
        "Is <b>, <img src='a.png'>, </video>, <video controls>, <image-set>, <ImageView>, "
        "<imagery>, < image >, <|im_start|>, <|image> or <image|> a mark?"
    )
    read(tmp_path, [record(quiet, "x", id="1"), record("Hi", f"{mark} x", id="2")])
    assert not capsys.readouterr().err
    read(tmp_path, [record(f"{mark}\nWhat?", "x", id="1"), chat(f"The {mark}{mark}?", "x", id="2")])
    assert capsys.readouterr().err.endswith(f"are text: {mark} (3 times)\n")


def test_system_text_and_turns_under_another_key_are_told_with_their_count(tmp_path, capsys):
    turns = messages("Hi", "No.")
    keys = {
        "systemprompt": "Be kind.",
        "system_message": "Be kind.",
        "instruction": "Answer.",
        "history": [["Hi", "Ho"]],
        "chosen": turns,
        "rejected": turns,
        "rejected_response": "No.",
        "System-Message": "Be kind.",
    }
    empty = {"instruction": "", "history": [], "chosen": True, "rejected": 0, "historyof": "x"}
    for key, value in keys.items():
        others = [record("Hi", "Ho", id="2"), chat("Hi", "Ho", id="3", **empty)]
        marked = [record("Hi", "Ho", id="4", **{key: value}), chat("Hi", "Ho", **{key: value})]
        read(tmp_path, others + marked)
        (line,) = capsys.readouterr().err.splitlines()
        assert f"fields that are not used: {key} (2 times); nothing of them reaches" in line


def test_what_harms_nobody_is_not_told(tmp_path, images, capsys):
    extra = {
        "source": "coco/a.jpg",
        "width": 3,
        "image_id": "000012",
        "num_images": 1,
        "videos": [],
        "audio": None,
        "image_size": [3, 4],
        "has_image": True,
        "url": "https://example.com",
        "tools": [],
        "weight": 1,
        "label": "cat",
        "train": True,
        "kind": "k",
        "loss": True,
        "metadata": {"source": "coco", "image_id": 7, "videos": [], "labels": ["cat", {"n": 1}]},
    }
    data = [
        GOOD | extra,
        record("Hi", "Ho", id="2", **(extra | {"source": "web", "label": 0})),
        chat("Hi", "Ho", id="3", **(extra | {"source": "web", "label": "0"})),
    ]
    assert len(read(tmp_path, data, images)) == 3 and not capsys.readouterr().err


def test_names_and_marks_of_media():
    for name in "imgs image_path imagePath imagepath img_url images0 image_1 IMG videoUrl video audios picture_file frames image_bytes".split():
        assert names_media(name), name
    for name in "source width image_id num_images video_length has_image url path file_name caption clip_score data name imagenet".split():
        assert not names_media(name), name
    assert not names_media("image" * 100_000 + "x")
    for text, kind in (
        ("<video>x", "video"),
        (" x?<audio>\n", "audio"),
        ("x\n<image>", "image"),
        ("x? <image>", "image"),
        ("What is <video>", None),
        ("the <video> tag?", None),
        ("<video></video>: what?", None),
        ("", None),
        ("<image>", "image"),
        ("\n" * 1_000_000 + "<b>", None),
    ):
        assert placeholder(text) == kind, text[:20]


# ---- the system text


def test_the_system_text_beside_a_conversation(tmp_path, processor):
    for key in ("system", "system_prompt"):
        for raw in (
            record("Hi", "Ho", **{key: "Be kind."}),
            chat("Hi", "Ho", **{key: "Be kind."}),
            {
                "id": "r1",
                "system": "Be kind.",
                "messages": [{"role": "system", "content": "Be kind."}, *messages("Hi", "Ho")],
            },
        ):
            (r,) = read(tmp_path, [raw])
            assert (
                [m["role"] for m in r.messages] == ["system", "user", "assistant"]
                and text_of(r.messages[0]) == "Be kind."
                and r.extra == {}
            )
            for name in set(TEMPLATES) - {"plain"}:
                assert "Be kind." in "".join(
                    p.text or "" for p in render(name, r.messages, answer=True)
                )
    (r,) = read(tmp_path, [record("Hi", "Ho", system="", system_prompt=None)])
    assert len(r.messages) == 2
    plain = type(processor)(
        processor.tokenizer, processor.image_config, "plain", processor.image_token_id, 4
    )
    (r,) = read(tmp_path, [chat([{"type": "image", "image": URI}], "x", system="Be kind.")])
    refused(lambda: Dataset([r], plain), "record r1: template: plain", "no system message")


@pytest.mark.parametrize(
    "raw, words",
    [
        (record("Hi", "Ho", system=["x"]), "system is a list"),
        (record("Hi", "Ho", system="a\0"), "system: holds a NUL"),
        (
            record("Hi", "Ho", system="a", system_prompt="b"),
            "several system texts (system, system_prompt)",
        ),
        (
            {
                "id": "r1",
                "system": "a",
                "messages": [{"role": "system", "content": "b"}, *messages("Hi", "Ho")],
            },
            "several system texts (system, a system message)",
        ),
    ],
)
def test_bad_system_texts(tmp_path, raw, words):
    refused(lambda: read(tmp_path, [raw]), words)


# ---- answers that are not to be learnt


@pytest.mark.parametrize(
    "mark",
    [{"label": False}, {"loss": False}, {"weight": 0}, {"loss_scale": 0.0}, {"train": False}],
)
@pytest.mark.parametrize(
    "template", sorted({*TEMPLATES} - {"plain", "chatml", "mistral", "llama3"})
)
def test_an_answer_marked_as_not_to_be_learnt_has_no_labels_and_the_same_ids(
    tmp_path, processor, template, mark
):
    p = type(processor)(
        processor.tokenizer, processor.image_config, template, processor.image_token_id, 4
    )
    turns = talk("Hi", "Ho you", "And there?", "A dog.")
    for at, learnt in ((1, "A dog."), (3, "Ho you")):
        marked = [turn | mark if i == at else turn for i, turn in enumerate(turns)]
        (r,), (whole,) = (
            read(tmp_path, [{"id": "r", "conversations": marked}]),
            read(tmp_path, [{"id": "r", "conversations": turns}]),
        )
        as_messages = [
            {"role": {"human": "user", "gpt": "assistant"}[t["from"]], "content": t["value"]}
            | (mark if i == at else {})
            for i, t in enumerate(turns)
        ]
        assert read(tmp_path, [{"id": "r", "messages": as_messages}])[0].messages == r.messages
        got, want = Dataset([r], p)[0], Dataset([whole], p)[0]
        assert (
            got["input_ids"] == want["input_ids"]
            and p.decode([x for x in got["labels"] if x != -100]).strip() == learnt
        )
        assert [x for x, y in zip(got["labels"], want["labels"]) if x != -100 and x != y] == []


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_keeps_a_masked_answer_apart(name):
    said = chat([IMAGE, TEXT], "A cat.", *(() if name == "plain" else ("Hi", "Ho")))["messages"]
    masked = [m | ({"loss": False} if i == 1 else {}) for i, m in enumerate(said)]
    whole, got = render(name, said, answer=True), render(name, masked, answer=True)
    assert [(p.text, p.token) for p in got] == [(p.text, p.token) for p in whole]
    assert [p.supervised for p in whole if p.supervised] == [True] * sum(
        p.supervised is not False for p in got
    )
    assert any(p.supervised is None for p in got) and any(p.supervised for p in got) == (
        name != "plain"
    )


@pytest.mark.parametrize(
    "raw, words",
    [
        (chat("Hi", "Ho", label=False), "label is false"),
        (record("Hi", "Ho", weight=0), "weight is 0"),
        (chat("Hi", "Ho", kto_tag=False), "kto_tag is false"),
        (chat("Hi", "Ho", kto_tag=0), "kto_tag is 0"),
        (record("Hi", "Ho", train=0), "train is 0: its answers are marked as not to be learned"),
        (chat("Hi", "Ho", train=0.0), "train is 0.0"),
        (record("Hi", "Ho", label="false"), "label is text (false), expected true or false"),
        (chat("Hi", "Ho", label="True"), "label is text (True)"),
        (chat("Hi", "Ho", train="0"), "train is text (0), expected true or false, 1 or 0"),
        (record("Hi", "Ho", loss="False"), "loss is text"),
        (record("Hi", "Ho", weight="1"), "weight is text"),
        (
            {
                "id": "r1",
                "conversations": [talk("Hi")[0], {"from": "gpt", "value": "Ho", "loss": False}],
            },
            "every answer is marked as not to be learned",
        ),
        (
            {
                "id": "r1",
                "conversations": [talk("Hi")[0], {"from": "gpt", "value": "Ho", "weight": "0"}],
            },
            "turn 1: weight is text, expected true or false",
        ),
        (
            {
                "id": "r1",
                "conversations": [talk("Hi")[0], {"from": "gpt", "value": "Ho", "weight": -1}],
            },
            "turn 1: weight is -1",
        ),
    ],
)
def test_records_of_which_nothing_is_to_be_learnt_are_bad(tmp_path, raw, words):
    refused(lambda: read(tmp_path, [record("Hi", "Ho"), raw]), "record 1 (id r1)", words)


def test_a_shortened_record_keeps_an_answer_to_learn(tmp_path, processor, capsys):
    turns = talk("Hi", "Ho", "Hi", "Ho " * 300)
    turns[1]["loss"] = False
    records = read(tmp_path, [{"id": "r", "conversations": turns}])
    assert (
        not Dataset(records, processor, max_length=50, too_long="shorten").records
        and "1 of 1 records are left out" in capsys.readouterr().err
    )
    whole = [
        replace(
            records[0],
            messages=[{k: v for k, v in m.items() if k != "loss"} for m in records[0].messages],
        )
    ]
    assert len(Dataset(whole, processor, max_length=50, too_long="shorten").records) == 1


# ---- the scripts


def test_the_scripts_count_the_images(tmp_path, images, capsys):
    import eval as script
    import train

    path = written(
        tmp_path / "x.json",
        [GOOD, record("Hi", "Ho", id="2"), part("image", image=URI) | {"id": "3"}],
    )
    flags = ["--data", str(path), "--image-folder", str(images), "--device", "cpu"]
    script.main([*flags, "--max-new-tokens", "2"])
    assert f"{path}: 3 records, 2 with an image\n" in capsys.readouterr().err
    train.main([*flags, "--dry-run", "--batch-size", "3"])
    assert "; 2 of the records have an image\n" in capsys.readouterr().out
    train.main(
        [
            *flags,
            "--out",
            str(tmp_path / "run"),
            "--batch-size",
            "3",
            "--lr",
            "1e-6",
            "--eval-data",
            str(path),
        ]
    )
    assert ": 3 records, 2 with an image, 1 steps of 3 rows, into" in capsys.readouterr().err
    # the image inside a record, too
    assert (tmp_path / "run" / "report.html").read_text().count("<img") == 2
    bad = written(tmp_path / "bad.json", [chat("What?", "x", imgs=["a.png"])])
    for call in (
        lambda: train.main(["--data", str(bad), "--out", str(tmp_path / "none")]),
        lambda: script.main(["--data", str(bad), "--out", str(tmp_path / "none")]),
    ):
        refused(call, "has imgs")
    assert not (tmp_path / "none").exists()
