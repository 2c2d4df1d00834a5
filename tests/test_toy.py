"""The toy world: what is asked and told is what is drawn, and nothing is on both sides of the
split.
"""

import json
import os
import random
import re
import subprocess
import sys
from itertools import combinations

import pytest
import sentencepiece
from PIL import Image, ImageChops

from llava_min.data.records import read_records
from llava_min.errors import UserError
from llava_min.toy import draw as toy
from llava_min.toy import vocab as toy_vocab

# Written without looking at words.txt: what a person may type about a picture or a day.
EVERYDAY = """
    hello morning coffee kitchen table window garden mother brother teacher student doctor school office street traffic
    bicycle airplane holiday vacation suitcase passport hotel restaurant breakfast sandwich vegetable strawberry
    chocolate refrigerator microwave dishwasher television computer keyboard telephone battery umbrella raincoat
    sweater jacket trousers shoes slippers necklace bracelet glasses mirror blanket pillow mattress bedroom bathroom
    toothbrush shampoo towel curtain carpet ceiling staircase elevator neighbor neighborhood village mountain river
    ocean beach island forest desert weather thunder lightning rainbow snowflake temperature summer winter spring
    autumn january february wednesday saturday birthday wedding present candle balloon picture photograph camera
    painting museum library newspaper magazine dictionary language english spanish question answer homework
    mathematics science history geography music guitar piano violin trumpet concert dancing singing football
    basketball tennis swimming running climbing fishing hunting camping elephant giraffe monkey kangaroo penguin
    butterfly spider mosquito chicken turkey rabbit squirrel dolphin octopus crocodile dinosaur tomato potato onion
    carrot cucumber mushroom pumpkin banana orange pineapple watermelon coconut peanut cookie pancake hamburger
    spaghetti sausage cheese yogurt butter sugar pepper vinegar water juice lemonade bottle glass plate spoon knife
    hammer screwdriver ladder bucket shovel scissors pencil eraser notebook envelope package basket ticket station
    airport highway bridge tunnel corner sidewalk parking garage driver passenger police firefighter soldier engineer
    carpenter plumber electrician farmer fisherman hospital medicine bandage headache shoulder finger stomach elbow
    knee ankle tongue happy angry hungry thirsty tired excited nervous beautiful dangerous expensive comfortable
    important interesting different difficult possible impossible careful friendly quickly slowly carefully suddenly
    usually sometimes always never yesterday tomorrow tonight afternoon evening minute hour between behind beneath
    above without through because although however remember forget understand explain describe believe imagine
    decide discover practice remind borrow promise apologize celebrate decorate disappear recommend arrive leave
    standing sitting holding wearing looking walking talking laughing crying sleeping eating drinking cooking reading
    writing driving riding flying jumping throwing catching playing working waiting smiling pointing carrying pushing
    pulling opening closing cutting washing crowded colorful striped wooden metallic transparent background
    foreground nearby several everyone nothing something anybody themselves yourself aluminum backpack binoculars
    blackboard cardboard chimney cupboard earthquake encyclopedia escalator flashlight grandmother handkerchief
    hummingbird kindergarten lighthouse marshmallow motorcycle parachute playground porcupine rectangle rhinoceros
    sandcastle skateboard skyscraper submarine sunflower supermarket telescope thermometer toothpaste trampoline
    typewriter volcano waterfall wheelbarrow windmill xylophone""".split()


def shown(caption: str) -> tuple[list[tuple[str, str, str]], tuple[str, str] | None]:
    """([(color, shape, place)], (string, place) or None), read from a caption."""
    place = r"(?:at|in|on) the ([a-z ]+)\."
    text = re.search(rf'The text "(\w+)" is {place}', caption)
    return re.findall(rf"There is an? (\w+) (\w+) {place}", caption), text and text.groups()


def answer(question: str, things: list, text) -> str:
    """What a person would answer who has only read the caption; KeyError or AssertionError if that
    is not one thing.
    """
    place = re.sub(r".* (?:at|in|on) the ([a-z ]+)\?$", r"\1", question)
    shapes = {
        "circles": "circle",
        "squares": "square",
        "triangles": "triangle",
        "stars": "star",
        "crosses": "cross",
        "rings": "ring",
    }
    one = lambda found: (len(found) == 1 or pytest.fail(f"{question}: {found}")) and found[0]
    the = lambda words: one([t for t in things if set(words) <= {*t[:2], "shape"}])
    if question == "What is in the picture?":
        told = [f"{'an' if c == 'orange' else 'a'} {c} {s}" for c, s, _ in things]
        return " and ".join(filter(None, [", ".join(told[:-1]), told[-1]]))
    if question in ("What is written?", "What does the text say?", "Read the text."):
        return text[0] if text else "nothing"
    if question == "Where is the text?":
        return text[1]
    if m := re.fullmatch(r"Where is the (\w+)(?: (\w+))?\?", question):
        return the([w for w in m.groups() if w])[2]
    if m := re.fullmatch(r"How many (\w+)( shapes)? are there\?", question):
        word = shapes.get(m[1], m[1])
        return str(len(things) if word == "shapes" else sum(word in t[:2] for t in things))
    if m := re.fullmatch(r"What colou?r is the (\w+)\?", question):
        return the([m[1]])[0]
    if m := re.fullmatch(r"What shape is (\w+)\?|What is the (\w+) shape\?", question):
        return the([m[1] or m[2]])[1]
    c, s, _ = one([t for t in things if t[2] == place])
    if re.match("What colou?r is the shape ", question):
        return c
    if question.startswith("What shape is "):
        return s
    assert question.startswith("What is ")
    return f"{'an' if c == 'orange' else 'a'} {c} {s}"


def test_every_question_has_the_answer_that_the_caption_gives():
    kinds = set()
    for i in range(300):
        rng = random.Random(i)
        s = toy.scene(rng)
        things, text = shown(toy.caption(s))
        assert len(things) == len(s.shapes) and bool(text) == bool(s.text)
        for kind, question, expected in toy.questions(s, rng):
            assert answer(question, things, text) == expected, (toy.caption(s), question)
            kinds.add(kind)
    assert kinds == set(toy.KINDS)


@pytest.mark.parametrize("size", [64, 192])
def test_the_caption_tells_what_is_drawn(size):
    for i in range(200):
        s = toy.scene(random.Random(i))
        image = toy.draw(s, size)
        assert image.mode == "RGB" and image.size == (size, size)
        pixels = image.resize((64, 64), Image.Resampling.BICUBIC).load()
        things, text = shown(toy.caption(s))
        filled = {place for *_, place in things}
        for color, shape, place in things:
            x, y = middle(place)
            got = pixels[x + (9 if shape == "ring" else 0), y]
            assert min(toy.COLORS, key=lambda c: distance(toy.COLORS[c], got)) == color, (
                i,
                place,
                got,
            )
        corner = [
            p for p in toy.PLACES if p not in filled and not (text and row(p) == row(text[1]))
        ]
        for place in corner:  # nothing where nothing is told
            x, y = middle(place)
            assert distance(pixels[x, y], pixels[x + 4, y + 4]) < 10, (i, place)


def row(place: str) -> int:
    return toy.ROWS.index(place.split()[0])


def middle(place: str) -> tuple[int, int]:
    i = toy.PLACES.index(place)
    return 16 + 32 * (i % 2), 16 + 32 * (i // 2)


def distance(a, b) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b)) ** 0.5


def test_shapes_colors_and_glyphs_are_distinct_at_64_pixels():
    masks = {}
    for name in toy.SHAPES:
        s = toy.Scene((toy.Shape("red", name, 0),), look=5)
        bare = toy.Scene((), look=5)
        masks[name] = (
            ImageChops.difference(toy.draw(s), toy.draw(bare))
            .convert("L")
            .point(lambda v: 255 * (v > 20))
        )
    for a, b in combinations(masks, 2):
        assert ImageChops.difference(masks[a], masks[b]).histogram()[255] >= 30, (a, b)
    for a, b in combinations(toy.COLORS.values(), 2):
        assert distance(a, b) > 70
    for (a, x), (b, y) in combinations(toy.GLYPHS.items(), 2):
        assert (int(x, 16) ^ int(y, 16)).bit_count() >= 3, (a, b)
    assert all(
        len(bytes.fromhex(g)) == 7 and max(bytes.fromhex(g)) < 32 for g in toy.GLYPHS.values()
    )


def scenes(task, split, seed, n):
    seen = []
    draw = toy.draw
    toy.draw = lambda s, size=64: seen.append((s.shapes, s.text, s.text and s.row))
    try:
        list(toy.generate(task, n, seed, split))
    finally:
        toy.draw = draw
    return seen


def test_no_scene_is_on_both_sides_whatever_task_and_seed():
    train = {x for task in toy.TASKS for seed in (0, 1) for x in scenes(task, "train", seed, 400)}
    for task in toy.TASKS:
        for seed in (0, 7):
            val = scenes(task, "val", seed, 150)
            assert len(set(val)) == 150  # and within validation none comes twice
            assert not train & set(val)
    assert any(len(s) == 1 for s, *_ in train)


def test_records():
    val = [r for r, _ in toy.generate("questions", 60, 0, "val")]
    assert [r["kind"] for r in val] == list(toy.KINDS) * 10
    assert all(len(r["conversations"]) == 2 for r in val)
    for task in toy.TASKS:
        for r, image in toy.generate(task, 40):
            turns = r["conversations"]
            assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert (
                turns[0]["value"].startswith("<image>\n")
                and json.dumps(turns).count("<image>") == 1
            )
            if task == "questions":
                assert "What is in the picture?" in "".join(t["value"] for t in turns)
            else:
                things, text = shown(turns[1]["value"])
                assert 1 <= len(things) <= 3 and bool(text) == (task == "captions-text")
    with pytest.raises(ValueError, match="captoins"):
        next(toy.generate("captoins", 1))


def test_same_seed_same_pictures_in_any_process():
    code = (
        "import hashlib; from llava_min.toy import draw as toy; h = hashlib.sha256()\n"
        "for t in toy.TASKS:\n for r, im in toy.generate(t, 30, 3): h.update(repr(r).encode() "
        "+ im.tobytes())\n"
        "print(h.hexdigest())"
    )
    run = lambda salt: (
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    assert run("1") == run("2")
    a, b = ([r for r, _ in toy.generate("questions", 5, seed)] for seed in (0, 1))
    assert a != b
    # a longer run begins as a shorter one
    assert a[:3] == [r for r, _ in toy.generate("questions", 3, 0)]


def test_write(tmp_path, monkeypatch):
    out = tmp_path / "toy"
    toy.write(out, "captions", train=12, val=4, seed=2)
    assert sorted(p.name for p in out.iterdir()) == ["images", "train.json", "val.json"]
    records = read_records(out / "train.json")
    assert len(records) == 12 and len(read_records(out / "val.json")) == 4
    for record, (_, image) in zip(records, toy.generate("captions", 12, 2), strict=True):
        assert record.open_images()[0].tobytes() == image.tobytes()
    before = (out / "train.json").read_bytes()
    with pytest.raises(UserError, match="exists"):
        toy.write(out)
    assert (out / "train.json").read_bytes() == before
    with pytest.raises(UserError, match="cannot be written"):
        toy.write(out / "train.json" / "x")

    (tmp_path / "empty").mkdir()
    toy.write(tmp_path / "empty", train=1, val=0)
    assert (tmp_path / "empty/train.json").exists()

    draw, drawn = toy.draw, []
    monkeypatch.setattr(
        toy, "draw", lambda s: drawn.append(s) or (draw(s) if len(drawn) < 4 else 1 / 0)
    )
    with pytest.raises(ZeroDivisionError):
        toy.write(tmp_path / "half", train=9, val=9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "toy"]


def test_command_line(tmp_path, capsys):
    from llava_min.tools.toy import main

    main(
        [
            str(tmp_path / "a"),
            "--task",
            "captions-text",
            "--train",
            "3",
            "--val",
            "2",
            "--seed",
            "5",
        ]
    )
    assert "3 training and 2 validation" in capsys.readouterr().err
    assert len(list((tmp_path / "a/images").iterdir())) == 5
    main([str(tmp_path / "c"), "--text", "0.8", "--train", "200", "--val", "6"])
    records = [
        [t["value"] for t in r["conversations"]]
        for r in json.loads((tmp_path / "c/train.json").read_text())
    ]
    share = sum(
        any(v.endswith(toy.READ) for v in values) and "nothing" not in values for values in records
    ) / len(records)
    assert 0.7 < share < 0.9
    for wrong in (
        ["--text", "0.8", "--task", "captions"],
        ["--text", "1.5"],
        ["--train", "-1"],
        ["--task", "poems"],
        ["--seed", "x"],
        ["--sede", "1"],
        [],
    ):
        argv = wrong + [str(tmp_path / "b")] if wrong else []
        with pytest.raises(UserError) as e:
            main(argv)
        assert "\n" not in str(e.value) and not (tmp_path / "b").exists()


# ---- the vocabulary
# -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pieces():
    return sentencepiece.SentencePieceProcessor(
        model_proto=toy_vocab.tokenizer_model(toy_vocab.words(), toy_vocab.toy_words())
    )


def test_everyday_words_are_at_most_three_pieces(pieces):
    words = toy_vocab.words()
    assert len(words) > 3000 and len(set(words)) == len(words)
    assert max(len(pieces.encode(w)) for w in words) <= 3
    counts = [len(pieces.encode(w)) for w in EVERYDAY]
    assert len(counts) > 300 and max(counts) <= 5
    assert sum(n <= 3 for n in counts) >= 0.99 * len(counts)
    assert sum(counts) < 2.5 * len(counts)


def test_the_toy_world_is_spelled_in_single_pieces_and_strings_by_letter(pieces):
    assert (len(pieces), pieces.unk_id(), pieces.bos_id(), pieces.eos_id(), pieces.pad_id()) == (
        3072,
        0,
        1,
        2,
        -1,
    )
    for word in toy_vocab.toy_words():
        assert len(pieces.encode(word)) == 1, word
    for a in toy.GLYPHS:
        for b in toy.GLYPHS:
            for c in "AKT7":
                got = pieces.encode(f'The text "{a}{b}{c}" is {a}{b}{c}', out_type=str)
                assert got[-3:] == ["▁" + a, b, c] if a.isalpha() else got[-4:] == ["▁", a, b, c]
                assert got[-8:-5] == [a, b, c] if a.isalpha() else got[-9:-6] == [a, b, c], got
    assert len(pieces.encode("USER: ASSISTANT:")) == 4
    for text in ("naïve café 東京 🙂", "two  spaces ", "12,345.60", "tab\tand\nnewline"):
        assert pieces.decode(pieces.encode(text)) == text
    assert pieces.encode("1234", out_type=str) == ["▁", "1", "2", "3", "4"]


def test_vocabulary_is_the_same_bytes_again():
    a, b = (toy_vocab.tokenizer_model(toy_vocab.words()[:300], ["red"], 700) for _ in range(2))
    assert a == b
