"""The reports: what they hold, that data cannot become code, what they weigh, and how a browser
shows them.
"""

import base64
import json
import math
import os
import re
import shutil
import socket
import struct
import subprocess
import time
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_min.data.formats import Record
from llava_min.data.parquet import Embedded
from llava_min.errors import UserError
from llava_min.report import curves, evaluation, write_eval_report, write_run_report
from llava_min.report.page import escape, shown
from llava_min.report.run import read_lines, stored_images
from llava_min.report.thumbnails import MAX_BYTES, Thumbnails
from llava_min.training.log import Log

EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">'\"&\u2028\u2029\x1b]0;x\x07\u202e<!--<script </script "
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Page(HTMLParser):
    """Tags with their attributes, and the text inside the scripts and styles."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.tags, self.raw, self.text = [], [], ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.data = json.loads(self.raw[1][1])

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self.raw.append([tag, ""])

    def handle_data(self, text):
        if self.cdata_elem:
            self.raw[-1][1] += text
        else:
            self.text += text


def draw(path, colour, size=(64, 48)):
    Image.new("RGB", size, colour).save(path)
    return path


def rows_of(n, pictures=()):
    rows = []
    for i in range(n):
        right = f"answer {i}"
        rows.append(
            {
                "id": f"row-{i}",
                "prompt": f"question {i}?",
                "prediction": right if i % 3 else "answer wrong",
                "references": [right],
                "scores": {"exact_match": float(i % 3 > 0), "f1": [0.5, 1.0, 1.0][i % 3]},
                "logprob": -i / n,
            }
        )
        if pictures:
            rows[-1]["images"] = [pictures[i % len(pictures)]]
    return rows


TABLE = {
    "exact_match": {"score": 0.66, "low": 0.6, "high": 0.71, "n": 12},
    "exact_match odd": {"score": 0.5, "low": 0.2, "high": 0.8, "n": 6},
    "f1": {"score": 0.83, "low": 0.8, "high": 0.9, "n": 12},
}


def with_base(rows):
    for i, r in enumerate(rows):
        r["base_prediction"], score = [
            (r["prediction"], r["scores"]["exact_match"]),
            ("other", 0.0),
            (r["references"][0], 1.0),
        ][i % 4 % 3]
        r["base_scores"] = {"exact_match": score, "f1": score}
    return rows


def write_run(folder, image="cat.png"):
    with open(folder / "metrics.jsonl", "w") as f:
        for step in range(1, 61):
            f.write(
                json.dumps(
                    {
                        "step": step,
                        "loss": math.nan if step == 30 else 2 / step + 0.01 * (step % 3),
                        "lr": 1e-4,
                        "grad_norm": 1.0,
                    }
                )
                + "\n"
            )
        f.write('{"step": 60, "eval_exact_match": 0.75}\n{"step": 61, "lo')
    (folder / "config.json").write_text(
        json.dumps({"model": "tiny", "lora": {"r": 16}, "lr": 1e-4})
    )
    (folder / "samples.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "step": s,
                    "id": "a",
                    "prompt": "What?",
                    "reference": "a cat",
                    "prediction": p,
                    "images": [image],
                }
            )
            + "\n"
            for s, p in ((0, "a dog"), (60, "a cat"))
        )
    )
    draw(folder / "cat.png", "orange")


# ---- what the pages hold


def test_eval_page(tmp_path):
    picture = draw(tmp_path / "a.png", "red")
    rows = rows_of(12, [picture])
    write_eval_report(
        tmp_path / "r.html",
        rows,
        TABLE,
        {"model": "tiny", "data": "val.json", "prompt": "USER: <image>\nWhat?", "lora": {"r": 16}},
    )
    page = Page(tmp_path / "r.html")
    for text in ("tiny", "0.660", "0.600 – 0.710", "USER: <image>\nWhat?", "lora.r", "12 examples"):
        assert text in page.text, text
    assert [r["id"] for r in page.data["rows"]] == [r["id"] for r in rows]
    assert page.data["rows"][3] == {
        "id": "row-3",
        "q": "question 3?",
        "a": "answer wrong",
        "r": [["answer 3", 1]],
        "s": [0.0, 0.5],
        "p": [0],
        "l": -0.25,
    }
    assert len(page.data["images"]) == 1, "the same picture travels once"
    assert page.data["metrics"] == [
        {"name": "exact_match", "low": 0.0, "high": 1.0},
        {"name": "f1", "low": 0.0, "high": 1.0},
    ]
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []


def test_groups_stand_under_their_metric_and_remarks_under_the_scores(tmp_path):
    m = {"score": 0.5, "low": 0.2, "high": 0.8, "n": 6}
    names = [
        "exact_match",
        "pope",
        "pope_f1",
        "exact_match top left",
        "pope top left",
        "pope_f1 top left",
        "exact_match red",
        "pope red",
    ]
    row = {
        "id": 1,
        "prompt": "p",
        "prediction": "a",
        "references": ["a"],
        "scores": {"exact_match": 1.0, "pope": 1.0},
    }
    write_eval_report(
        tmp_path / "r.html",
        [row],
        dict.fromkeys(names, m),
        {"remarks": ["1 of 2 records lost"], "adapter": None, "n": []},
    )
    source = Page(tmp_path / "r.html").source
    assert re.findall('<th scope="row"><bdi>(.*?)</bdi>', source) == [
        "exact_match",
        "top left",
        "red",
        "pope",
        "top left",
        "red",
        "pope_f1",
        "top left",
    ]
    assert (
        source.count("<tr class=group>") == 5
        and '<ul class="notes"><li>1 of 2 records lost</li></ul></section>' in source
    )
    assert "adapter" not in source.split("<section>")[2] and "remarks" not in source, (
        "what is not set is left out"
    )
    write_eval_report(tmp_path / "r.html", [], {}, {})
    assert "There is no score." in Page(tmp_path / "r.html").text


def test_cut_answers_are_marked(tmp_path):
    rows = with_base(rows_of(4))
    rows[1]["stopped"] = rows[2]["base_stopped"] = "limit"
    write_eval_report(tmp_path / "r.html", rows, TABLE, {}, {"name": "base"})
    assert [(r.get("x"), r.get("y")) for r in Page(tmp_path / "r.html").data["rows"]] == [
        (None, None),
        (True, None),
        (None, True),
        (None, None),
    ]


def test_what_metrics_do_not_measure_stands_once_under_the_scores(tmp_path):
    remark, other = "3 of 12 examples see <nothing>; use eyes", "1 of 12 examples are odd; use even"
    table = {name: m | {"remarks": [remark]} for name, m in TABLE.items()}
    base = {name: m | {"remarks": [remark] + [other] * (name == "f1")} for name, m in TABLE.items()}
    write_eval_report(
        tmp_path / "r.html",
        with_base(rows_of(12)),
        table,
        {"remarks": ["lost"]},
        {"name": "the base", "table": base},
    )
    assert (
        '<ul class="notes"><li>exact_match, f1: 3 of 12 examples see &lt;nothing&gt;; use eyes</li>'
        "<li>the base: f1: 1 of 12 examples are odd; use even</li><li>lost</li></ul></section>"
    ) in Page(tmp_path / "r.html").source


def test_references_scales_and_lost_scores(tmp_path):
    rows = [
        {
            "id": 1,
            "prompt": "p",
            "prediction": "red",
            "references": ["red"] * 7 + ["blue"] * 3,
            "scores": {"vqa": 100.0},
        },
        {
            "id": 2,
            "prompt": "p",
            "prediction": "",
            "references": ["x"],
            "scores": {"vqa": math.nan},
            "logprob": math.nan,
        },
    ]
    write_eval_report(
        tmp_path / "r.html", rows, {"vqa": {"score": math.nan, "low": 0, "high": 0, "n": 2}}, {}
    )
    page = Page(tmp_path / "r.html")
    assert page.data["rows"][0]["r"] == [["red", 7], ["blue", 3]]
    assert page.data["metrics"][0]["high"] == 100
    assert page.data["rows"][1]["s"] == [None] and "l" not in page.data["rows"][1]
    assert "1 examples have no vqa." in page.text


def test_compare(tmp_path):
    compare = {
        "name": "the base",
        "table": {"exact_match": {"score": 0.4, "low": 0.3, "high": 0.5, "n": 12}},
        "difference": {"exact_match": {"score": 0.26, "low": 0.1, "high": 0.4}},
    }
    write_eval_report(
        tmp_path / "r.html", with_base(rows_of(12)), TABLE, {"model": "tiny"}, compare
    )
    page = Page(tmp_path / "r.html")
    assert "against the base" in page.text and "+0.260 (+0.100 to +0.400)" in page.text
    row = page.data["rows"][1]
    assert (row["b"], row["t"], row["d"]) == ("other", [0.0, 0.0], True)


def test_run_page(tmp_path):
    write_run(tmp_path)
    write_run_report(tmp_path)
    page = Page(tmp_path / "report.html")
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    assert "1 value not finite, the first at step 30." in page.text and "lora.r" in page.text
    assert "could not be read" not in page.text, "a torn last line is no fault"
    loss = page.data[0]
    assert len(loss["x"]) == len(loss["t"]) == 59 and loss["t"][0].startswith("step 1: 2.01")
    assert sum(tag == "img" for tag, _ in page.tags) == 1 and "a dog" in page.text
    # after a resume a step is done again, and the torn line is inside
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('\n{"step": 60, "loss": 9.0}\n[1]\n')
    write_run_report(tmp_path)
    page = Page(tmp_path / "report.html")
    assert (
        page.data[0]["t"][-1].startswith("step 60: 9")
        and "2 lines of metrics.jsonl could not be read." in page.text
    )


def test_pages_show_all_pictures_and_what_was_said_before(tmp_path):
    files = [str(draw(tmp_path / f"{c}.png", c)) for c in ("red", "green", "blue")]
    turns = [
        ("user", "Three.\n"),
        ("assistant", "Yes <b>."),
        ("user", "How many?"),
        ("assistant", "3"),
    ]
    record = Record(
        "r",
        [{"role": role, "content": text} for role, text in turns],
        [Path(f) for f in files],
        tmp_path,
    )
    said = "user: Three.\n\nassistant: Yes <b>."
    Log(tmp_path, total=1).samples(
        0, [{"id": "r", "prompt": "How many?", "prediction": "", "references": ["3"]}], [record]
    )
    assert json.loads((tmp_path / "samples.jsonl").read_text())["earlier"] == said
    write_run_report(tmp_path)
    page = Page(tmp_path / "report.html")
    assert (
        sum(tag == "img" for tag, _ in page.tags) == 3
        and said in page.text
        and "empty" in page.text
    )
    row = rows_of(1)[0] | {"earlier": said, "images": files}
    write_eval_report(tmp_path / "r.html", [row], TABLE, {})
    assert Page(tmp_path / "r.html").data["rows"][0]["e"] == said


def test_where_pictures_are_comes_back(tmp_path):
    record = Record(
        "r",
        [{"role": role, "content": "x"} for role in ("user", "assistant")],
        [tmp_path / "a.png", Embedded(tmp_path / "b.parquet", 1, 2, 3)],
    )
    Log(tmp_path, total=1).samples(
        0, [{"id": "r", "prompt": "x", "prediction": "", "references": []}], [record]
    )
    (row,) = read_lines(tmp_path / "samples.jsonl", [])
    assert (
        stored_images(tmp_path, row["images"])
        == stored_images(tmp_path, ["a.png", ["b.parquet", 1, 2, 3], ["b.parquet", "1", 2, 3]])
        == record.images
    )


def test_the_worst_of_a_comparison_are_what_became_worse(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_ROWS", 2)
    rows = [
        {
            "id": name,
            "prompt": "p",
            "prediction": "x",
            "references": ["x"],
            "scores": {"f1": now},
            "base_prediction": "y",
            "base_scores": {"f1": was},
        }
        for name, was, now in (("both wrong", 0.0, 0.0), ("worse", 1.0, 0.0), ("better", 0.0, 1.0))
    ]
    write_eval_report(tmp_path / "r.html", rows, {}, {}, {"name": "base"})
    assert [r["id"] for r in Page(tmp_path / "r.html").data["rows"]] == ["worse", "better"]


def test_a_change_is_coloured_only_when_its_interval_leaves_zero_out():
    kind = lambda score, low, high: (
        evaluation.change({"score": score, "low": low, "high": high}, 3).split('"')[1].split()[1]
    )
    assert [
        kind(0.2, 0.1, 0.3),
        kind(0.2, -0.1, 0.5),
        kind(0.2, 0.0, 0.5),
        kind(-0.2, -0.5, 0.1),
        kind(-0.2, -0.3, -0.1),
    ] == ["better", "muted", "muted", "muted", "worse"]


def test_tiles_tell_the_best_and_the_last(tmp_path):
    values = {
        "loss": (3, 1, 2),
        "eval_loss": (2, 1.5, 1.75),
        "eval_bleu": (10, 90, 50),
        "eval_cut_answers": (3, 1, 2),
        "eval_small_loss": (3e-4, 1e-4, 2.5e-4),
    }
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": step, **{name: v[i] for name, v in values.items()}}) + "\n"
            for i, step in enumerate((1, 5, 10))
        )
    )
    write_run_report(tmp_path)
    tiles = re.findall(
        "<dt>(.*?)</dt><dd>(.*?)</dd><dd class=.muted.>(.*?)</dd>",
        (tmp_path / "report.html").read_text(encoding="utf-8"),
    )
    assert tiles == [
        ("steps", "10", ""),
        ("loss", "2.000", "best 1.000 at step 5"),
        ("eval loss", "1.750", "best 1.500 at step 5"),
        ("bleu", "50.0", "best 90.0 at step 5"),
        ("cut_answers", "2", "best 1 at step 5"),
        ("small_loss", "2.500e-04", "best 1.000e-04 at step 5"),
    ]


def test_what_is_not_finite_breaks_the_line():
    line = lambda *values: re.search(
        '<path class="line" d="(.*?)"', curves.curve("x", dict(enumerate(values))).svg
    )[1]
    assert line(1.0, 2.0, 3.0).count("M") == 1 and line(1.0, math.nan, 3.0, 4.0).count("M") == 2


def test_run_page_of_nearly_nothing(tmp_path):
    write_run_report(tmp_path)
    assert "No step has been logged yet." in Page(tmp_path / "report.html").text
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": NaN}\n{"step": 0, "eval_x": 0}\n{"step": "?"}\n\xff\n',
        encoding="latin1",
    )
    (tmp_path / "config.json").write_text("[")
    (tmp_path / "samples.jsonl").write_text(
        '{"step": 1}\n{"step": 2, "id": 3, "images": ["none.png"]}\n'
    )
    write_run_report(tmp_path)
    text = Page(tmp_path / "report.html").text
    assert (
        "1 lines of metrics.jsonl" in text
        and "config.json could not be read." in text
        and "1 images could not be opened." in text
    )


@pytest.mark.parametrize(
    "values",
    [
        [],
        [0.0],
        [1.0, 1.0],
        [1e-9, 1e9, 1.0, 1.0],
        [math.inf, 1.0],
        [-5.0, 5.0],
        list(np.linspace(0, 1, 30000)),
    ],
)
def test_curve_places(values):
    c = curves.curve("x", dict(enumerate(values)))
    assert len(c.points["x"]) <= curves.MAX_POINTS and "nan" not in c.svg and "inf" not in c.svg
    assert all(0 <= x <= curves.WIDTH for x in c.points["x"]) and all(
        0 <= y <= curves.HEIGHT for y in c.points["y"]
    )


def test_ticks_and_thinning():
    assert curves.ticks(0.0, 1.0, 4) == pytest.approx([0, 0.5, 1.0]) or curves.ticks(
        0.0, 1.0, 4
    ) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    values = [0.0] * 50000
    values[31234] = 7.0
    kept = curves.thinned(values)
    assert 31234 in kept and len(kept) <= curves.MAX_POINTS and kept[-1] == 49999


# ---- hostile data


def safe(path):
    """A page that holds no tag but ours, no handler, and a policy that allows our own style and
    script alone.
    """
    page = Page(path)
    assert [tag for tag, _ in page.raw] == ["style", "script", "script"]
    assert not [
        a for _, attributes in page.tags for a in attributes if a.startswith("on") or a == "style"
    ]
    assert all(
        a.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
        for _, a in page.tags
    )
    assert not re.search("[<>&]", page.raw[1][1])
    assert not re.search("[\u2028\u2029\x1b\x07\u202e]", page.source)
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not {t for t, _ in page.tags} & {"link", "iframe", "object", "base", "a"}
    return page


def test_hostile_evaluation(tmp_path):
    row = {
        "id": EVIL,
        "prompt": EVIL,
        "prediction": EVIL + "\udc80",
        "references": [EVIL],
        "scores": {EVIL: 0.5},
        "images": [EVIL],
        "base_prediction": EVIL,
        "base_scores": {EVIL: 1.0},
    }
    m = {"score": 0.5, "low": 0.1, "high": 0.9, "n": 1}
    write_eval_report(
        tmp_path / "r.html",
        [row],
        {EVIL: m, f"{EVIL} {EVIL}": m},
        {EVIL: EVIL, "model": EVIL, "data": EVIL, "list": [EVIL]},
        {"name": EVIL, "table": {EVIL: m}, "difference": {EVIL: m}},
    )
    page = safe(tmp_path / "r.html")
    assert page.data["rows"][0]["a"].startswith("</script><script>") and page.data["rows"][0][
        "p"
    ] == [None]
    assert "\\x1b" in page.data["rows"][0]["a"] and "<img src=x" in page.text


def test_hostile_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"step": 1, EVIL: 1.0, "eval_" + EVIL: 0.5}) + "\n"
    )
    (tmp_path / "config.json").write_text(
        json.dumps({EVIL: EVIL, "out": EVIL, "model": EVIL, "recipe": EVIL})
    )
    (tmp_path / "samples.jsonl").write_text(
        json.dumps(
            dict.fromkeys(("id", "earlier", "prompt", "reference", "prediction"), EVIL)
            | {"images": [EVIL, [EVIL, 0, 0, 0], 3]}
            | {"step": 1}
        )
    )
    write_run_report(tmp_path)
    safe(tmp_path / "report.html")


def test_text_in_an_attribute_cannot_leave_it():
    assert escape("\"'<>&") == "&quot;&#x27;&lt;&gt;&amp;"


def test_joined_emoji_and_lines_stay():
    assert shown("👩\u200d🚀\n\tx\r\u202e") == "👩\u200d🚀\n\tx\\r\\u202e"


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("old")
    with open(tmp_path / "report.html") as reader:
        write_run_report(tmp_path)
        assert reader.read() == "old", "who reads the old page has all of it"
    (tmp_path / "report.html").write_text("old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_run_report(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"] and (
        tmp_path / "report.html"
    ).read_text() == "old"


# ---- what a page weighs


def test_pictures_share_the_budget(tmp_path):
    noise = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(12)]
    for p in paths:
        Image.fromarray(noise.integers(0, 255, (200, 260, 3), dtype=np.uint8)).save(p)
    large = Thumbnails(paths)
    assert len(large.urls) == 12 and not large.notes()
    small = Thumbnails(paths, 60_000)
    assert (
        sum(map(len, small.urls)) <= 60_000
        and small.shrunk
        and "smaller than 192" in small.notes()[0]
    )
    none = Thumbnails([*paths, tmp_path / "absent.png"], 9_000)
    assert (
        sum(map(len, none.urls)) <= 9_000
        and none.left_out
        and none.broken == 1
        and none.place(paths[-1]) is None
    )


def test_every_kind_of_picture(tmp_path):
    pictures = []
    for i, mode in enumerate(("1", "L", "LA", "P", "RGB", "RGBA", "I;16")):
        Image.new(mode, (500, 20 + i)).save(tmp_path / f"{i}.png")
        pictures.append(tmp_path / f"{i}.png")
    pictures.append(Image.new("CMYK", (30, 30)))
    t = Thumbnails(pictures)
    assert not t.broken and not t.left_out and None not in t.index.values()


def test_texts_and_rows_have_a_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_ROWS", 10)
    rows = rows_of(30)
    rows[0]["prediction"] = "x" * 9000
    write_eval_report(tmp_path / "r.html", rows, TABLE, {})
    page = Page(tmp_path / "r.html")
    assert [r["id"] for r in page.data["rows"]] == [
        f"row-{i}" for i in (0, 3, 6, 9, 12, 23, 25, 26, 28, 29)
    ]
    assert "The 5 worst and 5 best of 30 examples are here" in page.text
    assert page.data["rows"][0]["a"].endswith("… (5,000 characters more)")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A page of 5,000 examples with a picture each, and how long it took to write."""
    folder = tmp_path_factory.mktemp("large")
    noise = np.random.default_rng(0).integers(0, 255, (5000, 6, 6, 3), dtype=np.uint8)
    paths = [folder / f"{i}.bmp" for i in range(5000)]
    for a, p in zip(noise, paths):
        Image.fromarray(a).resize((96, 96)).save(p)
    start = time.perf_counter()
    write_eval_report(folder / "r.html", rows_of(5000, paths), TABLE, {"model": "tiny"})
    return folder / "r.html", time.perf_counter() - start


def test_5000_examples(large):
    path, seconds = large
    page = Page(path)
    assert len(page.data["rows"]) == 5000 and len(page.data["images"]) > 4900
    assert path.stat().st_size < MAX_BYTES + 2**22
    assert seconds < 30


# ---- in a browser


class Browser:
    """Chromium without a window, driven over the DevTools protocol; just enough of RFC 6455 for one
    socket.
    """

    def __init__(self, folder):
        log = open(folder / "log", "w+")
        self.process = subprocess.Popen(
            [
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--no-first-run",
                "--remote-debugging-port=0",
                f"--user-data-dir={folder}",
                "about:blank",
            ],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        end = time.monotonic() + 30
        while (
            not (folder / "DevToolsActivePort").is_file()
            or not (folder / "DevToolsActivePort").read_text().strip()
        ):
            assert time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.05)
        port = int((folder / "DevToolsActivePort").read_text().split()[0])
        tabs = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=20))
        target = next(t for t in tabs if t["type"] == "page")["webSocketDebuggerUrl"]
        self.socket, self.count, self.faults = (
            socket.create_connection(("127.0.0.1", port), timeout=60),
            0,
            [],
        )
        self.socket.sendall(
            f"GET {target.split(str(port), 1)[1]} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: "
            "websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Key: "
            f"{base64.b64encode(bytes(16)).decode()}\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self.file = self.socket.makefile("rb")
        while self.file.readline().strip():
            pass
        for domain in ("Page", "Runtime", "Log"):
            self.call(domain + ".enable")

    def receive(self):
        whole = b""
        while True:
            first, length = self.file.read(2)
            length = {
                126: lambda: struct.unpack(">H", self.file.read(2))[0],
                127: lambda: struct.unpack(">Q", self.file.read(8))[0],
            }.get(length, lambda: length)()
            whole += self.file.read(length)
            if first & 0x80:
                return json.loads(whole)

    def call(self, method, **params):
        self.count += 1
        body = json.dumps({"id": self.count, "method": method, "params": params}).encode()
        self.socket.sendall(
            struct.pack(
                ">BBH" if len(body) < 65536 else ">BBQ",
                0x81,
                0x80 | (126 if len(body) < 65536 else 127),
                len(body),
            )
            + bytes(4)
            + body
        )  # masked with zeros
        while (answer := self.receive()).get("id") != self.count:
            kind, p = answer.get("method"), answer.get("params", {})
            if (
                kind == "Runtime.exceptionThrown"
                or kind == "Log.entryAdded"
                and p["entry"]["level"] == "error"
                or kind == "Runtime.consoleAPICalled"
                and p["type"] in ("error", "warning")
            ):
                self.faults.append(p)
        assert "error" not in answer, answer
        return answer["result"]

    def run(self, code):
        result = self.call(
            "Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, code, seconds=20):
        end = time.monotonic() + seconds
        while not (value := self.run(code)):
            assert time.monotonic() < end, f"never: {code}"
            time.sleep(0.03)
        return value

    def open(self, path, width=1440, height=900, dark=False):
        """Load the file and wait until its script is through; gives the seconds that took."""
        self.faults.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self.call("Page.navigate", url="about:blank")
        start = time.perf_counter()
        self.call("Page.navigate", url=path.as_uri())
        self.until(
            f"location.href === {path.as_uri()!r} && document.documentElement?.dataset.ready === "
            "'yes'"
        )
        if self.run("!!document.getElementById('list') && data.rows && data.rows.length > 0"):
            self.until(
                "document.querySelector('.example') && [...document.images].slice(0, 5).every((i) "
                "=> i.complete)"
            )
        return time.perf_counter() - start

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("Chromium is not installed")
    b = Browser(tmp_path_factory.mktemp("chromium"))
    yield b
    b.close()


def shown_ids(browser):
    return browser.run("[...document.querySelectorAll('.example .id')].map((e) => e.textContent)")


def test_browser_eval_page(browser, tmp_path):
    rows = rows_of(60, [draw(tmp_path / f"{c}.png", c) for c in ("red", "blue")])
    rows[3]["prediction"] = "<script>document.title = 'owned'</script><b>bold</b>"
    rows[4]["id"] = rows[4]["prompt"] = EVIL
    write_eval_report(tmp_path / "r.html", rows, TABLE, {"model": "tiny", "prompt": EVIL})
    browser.open(tmp_path / "r.html")
    assert "<script>document.title = 'owned'</script><b>bold</b>" in browser.run(
        "document.getElementById('list').textContent"
    )
    assert (
        browser.run("document.title") == "tiny – evaluation"
        and browser.run(
            "document.querySelectorAll('#list b, #list script').length - "
            "document.querySelectorAll('.chip b').length"
        )
        == 0
    )
    assert browser.run(
        "[...document.images].length > 0 && [...document.images].every((i) => i.naturalWidth === "
        "64)"
    )
    assert browser.run("document.getElementById('count').textContent") == "60 of 60"

    browser.run("document.querySelector('#show [value=wrong]').click()")
    assert browser.until("document.getElementById('count').textContent === '20 of 60'")
    assert set(
        browser.until("[...document.querySelectorAll('.example .id')].map((e) => e.textContent)")
    ) == {f"row-{i}" for i in range(0, 60, 3)}
    assert browser.run(
        "[...document.querySelectorAll('mark.extra')].some((m) => m.textContent === 'wrong')"
    )
    browser.run("document.querySelector('#show [value=all]').click()")
    browser.run(
        "(() => { const s = document.getElementById('search'); s.value = 'ANSWER 17'; s.dispatchEvent(new Event('input')); })()"
    )
    browser.until("document.getElementById('count').textContent === '1 of 60'")
    browser.until("document.querySelector('.example .id')?.textContent === 'row-17'")
    browser.run(
        "(() => { for (const [id, v] of [['search', ''], ['low', '0.5'], ['high', '0.9']]) document.getElementById(id).value = v;"
        "const m = document.getElementById('metric'); "
        "document.getElementById('low').dispatchEvent(new Event('input')); })()"
    )
    browser.until("document.getElementById('count').textContent === '0 of 60'")
    browser.run(
        "(() => { const m = document.getElementById('metric'); m.value = 1; m.dispatchEvent(new Event('change'));"
        "document.getElementById('low').value = '0.5'; "
        "document.getElementById('high').value = '0.9';"
        "document.getElementById('low').dispatchEvent(new Event('input')); })()"
    )
    browser.until("document.getElementById('count').textContent === '20 of 60'")
    assert not browser.faults


def test_browser_runs_no_script_but_ours(browser, tmp_path):
    write_eval_report(tmp_path / "r.html", rows_of(3), TABLE, {})
    browser.open(tmp_path / "r.html")
    browser.run(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.owned = true'; document.body.append(s);"
        "const i = document.createElement('img'); i.setAttribute('onerror', 'window.owned "
        "= true'); i.src = 'file:///none.png'; document.body.append(i); })()"
    )
    time.sleep(0.2)
    assert browser.run("window.owned === undefined") and browser.faults


def test_browser_compare(browser, tmp_path):
    rows = with_base(rows_of(24))
    rows[1]["stopped"] = rows[2]["base_stopped"] = "limit"
    write_eval_report(
        tmp_path / "r.html",
        rows,
        TABLE,
        {"model": "tiny"},
        {"name": "base", "table": TABLE, "difference": TABLE},
    )
    browser.open(tmp_path / "r.html")
    change = [r["scores"]["exact_match"] - r["base_scores"]["exact_match"] for r in rows]
    for name, n in (
        ("better", sum(c > 0 for c in change)),
        ("worse", sum(c < 0 for c in change)),
        ("same", sum(c == 0 for c in change)),
        ("changed", sum(r["prediction"] != r["base_prediction"] for r in rows)),
        ("cut", 2),
    ):
        assert n and browser.run(
            f"document.querySelector('#show [value={name}] span').textContent"
        ) == str(n), name
    assert browser.run(
        "[...document.querySelectorAll('.texts')].every((t) => t.textContent.includes('Base') && "
        "t.textContent.includes('Tuned'))"
    )
    assert not browser.faults


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width, height", [(390, 844), (1440, 900)])
def test_browser_widths_and_schemes(browser, tmp_path, width, height, dark):
    rows = with_base(rows_of(24, [draw(tmp_path / "a.png", "red", (400, 90))]))
    rows[0]["prediction"], rows[0]["id"], rows[0]["images"] = (
        "w" * 500,
        "i" * 300,
        [tmp_path / "a.png"] * 5,
    )
    write_eval_report(
        tmp_path / "r.html",
        rows,
        TABLE,
        {"model": "m" * 200, "prompt": "p" * 400},
        {"table": TABLE, "difference": TABLE},
    )
    write_run(tmp_path)
    write_run_report(tmp_path)
    for name in ("r.html", "report.html"):
        browser.open(tmp_path / name, width, height, dark)
        assert browser.run("document.documentElement.scrollWidth <= innerWidth"), name
        light = [
            int(x)
            for x in re.findall(
                r"\d+", browser.run("getComputedStyle(document.body).backgroundColor")
            )
        ]
        assert (max(light) < 60) if dark else (min(light) > 200)
        assert not browser.faults


def test_browser_run_page(browser, tmp_path):
    write_run(tmp_path)
    write_run_report(tmp_path)
    browser.open(tmp_path / "report.html")
    assert browser.run("document.querySelector('.chart output').textContent").startswith("step 60")
    box = browser.run(
        "(({x, y, width, height}) => ({x, y, width, height}))(document.querySelector('.chart "
        "svg').getBoundingClientRect())"
    )
    browser.call(
        "Input.dispatchMouseEvent",
        type="mouseMoved",
        x=box["x"] + box["width"] * curves.LEFT / curves.WIDTH + 1,
        y=box["y"] + box["height"] / 2,
    )
    browser.until("document.querySelector('.chart output').textContent.startsWith('step 1:')")
    assert browser.run("document.images.length === 1 && document.images[0].naturalWidth === 64")
    assert not browser.faults


def test_browser_5000_examples(browser, large):
    seconds = browser.open(large[0])
    drawn = browser.run("document.querySelectorAll('.example').length")
    assert 10 <= drawn <= 200, drawn
    browser.run("scrollTo(0, document.documentElement.scrollHeight)")
    last = "[...document.querySelectorAll('.example .id')].at(-1)?.textContent"
    browser.until(f"{last} === 'row-4999'")
    assert browser.run("document.querySelectorAll('.example').length") <= 200
    browser.run(
        "(() => { const s = document.getElementById('search'); s.value = 'row-4321'; s.dispatchEvent(new Event('input')); })()"
    )
    browser.until("document.getElementById('count').textContent === '1 of 5,000'", 3)
    print(
        f"5,000 examples, {large[0].stat().st_size / 2**20:.1f} MiB: shown in {seconds:.2f} s, "
        f"written in {large[1]:.1f} s"
    )
    assert seconds < 3 and not browser.faults
