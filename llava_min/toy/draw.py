"""Scenes of the toy world: small images of colored shapes, with questions and captions.

`python -m llava_min toy` writes them as LLaVA JSON and images; the bundled model `tiny` is trained
on `questions`, and `python train.py` LoRA-tunes it on `captions`. As in CLEVR (Johnson et al. 2017,
https://arxiv.org/abs/1612.06890) a scene is drawn at random, and every question and answer follows
from the scene, so the answers are exact.

An image depends on (task, split, seed, index) alone. A digest of what it shows, not of how it is
drawn, decides whether it is for training or for validation: no scene is ever in both, whatever the
task, the seed or the number of images.
"""

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from llava_min.util.files import new_folder, write_json

TASKS = ("questions", "captions", "captions-text")
KINDS = ("colour", "shape", "count", "position", "reading", "open")
SIZE = 64  # pixels a side
CELL = SIZE / 2  # a shape fills most of one cell of a 2 x 2 grid
HELD_OUT = 8  # one scene in eight is for validation

# fmt: off
SHAPES = {
    "circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars",
    "cross": "crosses", "ring": "rings",
}
COLORS = {
    "red": (220, 30, 35), "orange": (250, 135, 20), "yellow": (240, 210, 0),
    "green": (30, 165, 60), "blue": (40, 90, 235), "purple": (145, 50, 190),
}
PLACES = ("top left", "top right", "bottom left", "bottom right")
ROWS = ("top", "bottom")  # where a printed string may be

# Seven rows a glyph, a byte a row, of which the low five bits are dots. Characters that look alike
# at 64 pixels (0/O, 1/I, 2/Z, 5/S, 8/B, Q) are left out.
GLYPHS = {
    "A": "0e11111f111111", "B": "1e11111e11111e", "C": "0e11101010110e", "D": "1e11111111111e",
    "E": "1f10101e10101f", "F": "1f10101e101010", "G": "0e11101713110f", "H": "1111111f111111",
    "J": "0702020202120c", "K": "11121418141211", "L": "1010101010101f", "M": "111b1515111111",
    "N": "11191513111111", "P": "1e11111e101010", "R": "1e11111e141211", "T": "1f040404040404",
    "U": "1111111111110e", "V": "1111110a0a0a04", "W": "1111111515150a", "X": "11110a040a1111",
    "Y": "11110a04040404", "2": "0e11010204081f", "3": "1f02040201110e", "4": "02060a121f0202",
    "6": "0608101e11110e", "7": "1f010204080808", "9": "0e11110f01020c",
}
# fmt: on
LETTERS = [c for c in GLYPHS if c.isalpha()]
READ = ("What is written?", "What does the text say?", "Read the text.")


@dataclass(frozen=True)
class Shape:
    color: str
    name: str
    cell: int  # 0..3 in reading order

    def __str__(self) -> str:
        return f"{'an' if self.color[0] in 'aeiou' else 'a'} {self.color} {self.name}"


@dataclass(frozen=True)
class Scene:
    shapes: tuple[Shape, ...]  # in reading order; no two share both color and shape
    text: str = ""  # the printed string
    row: int = 0  # the row of cells that the string fills
    look: int = 0  # seed of shades, sizes and small offsets

    @property
    def held_out(self) -> bool:
        """Whether it is for validation."""
        shown = repr((self.shapes, self.text, self.text and self.row))
        return int(hashlib.sha256(shown.encode()).hexdigest(), 16) % HELD_OUT == 0


def scene(rng: random.Random, max_shapes: int = 4, text: float = 0.4) -> Scene:
    """One to `max_shapes` shapes at random, and a printed string with probability `text`."""
    string, row = "", 0
    if rng.random() < text:
        string = rng.choice(LETTERS) + "".join(rng.choices(list(GLYPHS), k=rng.choice((1, 2))))
        row = rng.randrange(2)
    free = [c for c in range(4) if not string or c // 2 != row]
    n = min(max_shapes, len(free))
    count = rng.choices(range(1, n + 1), weights=(2, 4, 4, 2)[:n])[0]
    pairs = []
    while len(pairs) < count:
        pair = rng.choice(list(COLORS)), rng.choice(list(SHAPES))
        # the same color or shape twice makes counting worth asking about
        if pairs and rng.random() < 0.3:
            pair = (pairs[-1][0], pair[1]) if rng.random() < 0.5 else (pair[0], pairs[-1][1])
        if pair not in pairs:
            pairs.append(pair)
    cells = sorted(rng.sample(free, count))
    return Scene(
        tuple(Shape(*p, c) for p, c in zip(pairs, cells)), string, row, rng.getrandbits(32)
    )


def star(points: int, inner: float) -> list[tuple[float, float]]:
    """Corners of radius 1 and `inner` in turn."""
    angles = [math.pi * i / points for i in range(2 * points)]
    radii = [(1, inner)[i % 2] for i in range(2 * points)]
    return [(r * math.sin(t), -r * math.cos(t)) for r, t in zip(radii, angles)]


# Corners about (0, 0), y downwards, at a distance of about 1
# fmt: off
OUTLINES = {
    "square": [(-.88, -.88), (.88, -.88), (.88, .88), (-.88, .88)],
    "triangle": [(0, -1), (1, .85), (-1, .85)],
    "star": [(1.08 * u, 1.08 * v + .06) for u, v in star(5, 0.42)],
    "cross": [(.34, -1), (.34, -.34), (1, -.34), (1, .34), (.34, .34), (.34, 1),
              (-.34, 1), (-.34, .34), (-1, .34), (-1, -.34), (-.34, -.34), (-.34, -1)],
}
# fmt: on


def draw(scene: Scene, size: int = SIZE) -> Image.Image:
    """The scene as an RGB image of `size` x `size`, drawn four times as large and averaged down."""
    rng = random.Random(scene.look)
    k = 4 * size / SIZE  # canvas units per pixel of the 64-pixel image
    base = rng.choice((28, 240))
    background = tuple(base + rng.randint(-14, 14) for _ in range(3))
    image = Image.new("RGB", (4 * size, 4 * size), background)
    pen = ImageDraw.Draw(image)
    for s in scene.shapes:
        x = (s.cell % 2 + 0.5) * CELL + rng.uniform(-1.5, 1.5)
        y = (s.cell // 2 + 0.5) * CELL + rng.uniform(-1.5, 1.5)
        r = rng.uniform(11.0, 13.5)
        fill = tuple(min(255, max(0, v + rng.randint(-12, 12))) for v in COLORS[s.color])
        if s.name in ("circle", "ring"):
            pen.ellipse([k * (x - r), k * (y - r), k * (x + r), k * (y + r)], fill=fill)
        if s.name == "ring":
            h = 0.5 * r
            pen.ellipse([k * (x - h), k * (y - h), k * (x + h), k * (y + h)], fill=background)
        if s.name in OUTLINES:
            pen.polygon(
                [(k * (x + r * u), k * (y + r * v)) for u, v in OUTLINES[s.name]], fill=fill
            )
    if scene.text:
        draw_text(pen, scene, k, rng)
    return image.reduce(4)


def draw_text(pen: ImageDraw.ImageDraw, scene: Scene, k: float, rng: random.Random) -> None:
    """The printed string on a plate, black on white or white on black."""
    ink, plate = rng.choice(((10, 245), (245, 10)))
    dot = 2.9  # pixels of one dot of a glyph; a glyph is 5 x 7 dots, one dot from the next
    w, h = dot * (6 * len(scene.text) - 1), dot * 7
    x = (SIZE - w) / 2 + rng.uniform(-3, 3)
    y = (scene.row + 0.5) * CELL - h / 2 + rng.uniform(-0.5, 0.5)
    box = [k * (x - 1.7), k * (y - 1.4), k * (x + w + 1.7), k * (y + h + 1.4)]
    pen.rectangle(box, fill=(plate,) * 3)
    for i, c in enumerate(scene.text):
        for j, bits in enumerate(bytes.fromhex(GLYPHS[c])):
            for b in range(5):
                if bits >> (4 - b) & 1:
                    u, v = x + dot * (6 * i + b), y + dot * j
                    box = [k * u, k * v, k * (u + dot) - 1, k * (v + dot) - 1]
                    pen.rectangle(box, fill=(ink,) * 3)


def phrase(scene: Scene) -> str:
    """The answer to the open question: a red circle, a blue square and an orange ring."""
    *head, last = map(str, scene.shapes)
    return f"{', '.join(head)} and {last}" if head else last


def caption(scene: Scene) -> str:
    """Every shape with color and place in reading order, then the printed string, as sentences."""
    sentences = [f"There is {s} at the {PLACES[s.cell]}." for s in scene.shapes]
    if scene.text:
        sentences.append(f'The text "{scene.text}" is at the {ROWS[scene.row]}.')
    return " ".join(sentences)


def questions(scene: Scene, rng: random.Random) -> list[tuple[str, str, str]]:
    """All questions about the scene that have one answer: (kind, question, answer), shuffled."""
    asked = []
    color = rng.choice(("color", "color", "colour"))
    add = lambda kind, question, answer: asked.append((kind, question, str(answer)))
    colors, names = [s.color for s in scene.shapes], [s.name for s in scene.shapes]
    for s in scene.shapes:
        place = PLACES[s.cell]
        add("colour", f"What {color} is the shape at the {place}?", s.color)
        add("shape", f"What shape is at the {place}?", s.name)
        add("position", f"Where is the {s.color} {s.name}?", place)
        add("position", f"What is at the {place}?", s)
        if names.count(s.name) == 1:
            add("colour", f"What {color} is the {s.name}?", s.color)
            add("position", f"Where is the {s.name}?", place)
        if colors.count(s.color) == 1:
            add("shape", f"What shape is {s.color}?", s.name)
            add("shape", f"What is the {s.color} shape?", s.name)
            add("position", f"Where is the {s.color} shape?", place)
    # one at random, too, which may well be absent: the answer is 0
    for name in {*names, rng.choice(list(SHAPES))}:
        add("count", f"How many {SHAPES[name]} are there?", names.count(name))
    for c in {*colors, rng.choice(list(COLORS))}:
        add("count", f"How many {c} shapes are there?", colors.count(c))
    add("count", "How many shapes are there?", len(names))
    if scene.text:
        add("reading", rng.choice(READ), scene.text)
        add("position", "Where is the text?", ROWS[scene.row])
    add("open", "What is in the picture?", phrase(scene))
    asked.sort()  # the order of the sets above differs between processes
    rng.shuffle(asked)
    return asked


def conversation(scene: Scene, rng: random.Random, turns: int) -> list[tuple[str, str]]:
    """`turns` (question, answer): the open and the reading question always, the other kinds in
    turn.
    """
    asked = questions(scene, rng)
    pool = {kind: [q for q in asked if q[0] == kind] for kind in KINDS}
    chosen = pool.pop("reading") + pool.pop("open")
    if not scene.text and rng.random() < 0.15:
        chosen.append(("reading", "What is written?", "nothing"))
    while len(chosen) < turns and any(pool.values()):
        for kind in rng.sample(list(pool), len(pool)):
            if pool[kind] and len(chosen) < turns:
                chosen.append(pool[kind].pop())
    rng.shuffle(chosen)
    return [(question, answer) for _, question, answer in chosen[:turns]]


def generate(
    task: str, n: int, seed: int = 0, split: str = "train", turns: int = 8, text: float = 0.4
) -> Iterator[tuple[dict, Image.Image]]:
    """`n` images with their LLaVA records, made one at a time.

    For `questions`, an image of `train` has up to `turns` questions, and a share `text` of the
    images a printed string; an image of `val` has one question, of each of KINDS in turn. Within
    `val` no scene comes twice; `train` is drawn with replacement, as there are few one-shape
    scenes.
    """
    if task not in TASKS or split not in ("train", "val"):
        raise ValueError(f"task {task!r}, split {split!r}; there are {TASKS} and train, val")
    seen = set()
    for index in range(n):
        rng = random.Random(f"{task}/{split}/{seed}/{index}")
        kind = KINDS[index % len(KINDS)] if task == "questions" and split == "val" else None
        # draw until the scene belongs to the split
        while True:
            if task == "questions":
                share = 1.0 if kind == "reading" else text if split == "train" else 0.4
                s = scene(rng, text=share)
            else:
                s = scene(rng, max_shapes=3, text=float(task == "captions-text"))
            content = s.shapes, s.text, s.row
            if s.held_out == (split == "val") and content not in seen:
                break
        if split == "val":
            seen.add(content)
        record = {"id": f"{task}-{split}-{index:06d}", "image": f"images/{split}-{index:06d}.png"}
        if task != "questions":
            pairs = [("Describe this image in detail.", caption(s))]
        elif kind:
            pairs = [next(q for q in questions(s, rng) if q[0] == kind)[1:]]
            record["kind"] = kind
        else:
            pairs = conversation(s, rng, turns)
        values = [
            {"from": who, "value": value}
            for pair in pairs
            for who, value in zip(("human", "gpt"), pair)
        ]
        values[0]["value"] = "<image>\n" + values[0]["value"]
        record["conversations"] = values
        yield record, draw(s)


def write(
    out: str | Path,
    task: str = "questions",
    train: int = 2000,
    val: int = 200,
    seed: int = 0,
    text: float = 0.4,
) -> None:
    """Write `out`/train.json, `out`/val.json and `out`/images/*.png: all or nothing.

    Raises UserError if `out` exists and is not empty.
    """
    with new_folder(Path(out), durable=False) as folder:
        (folder / "images").mkdir()
        for split, n in (("train", train), ("val", val)):
            records = []
            for record, image in generate(task, n, seed, split, text=text):
                image.save(folder / record["image"])
                records.append(record)
            write_json(folder / f"{split}.json", records)
