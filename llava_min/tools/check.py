"""`python -m llava_min check DATA`: what is wrong with the records, and what is learned from them.

Reads every record as training does and opens every image, so that nothing is left to find in the
middle of a run. The exit code is 1 when a record or an image is bad, 2 when a file cannot be read
at all.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llava_min.checks.ranges import NonNegativeInt, PositiveInt
from llava_min.errors import UserError, escape_controls, info, shorten
from llava_min.util.cli import PathArg, flags, parse

NAMED = 5  # records that are named of each kind of fault
NOT_COMPARED = "evaluation and training were not compared: one of them has no good record"


@dataclass
class Config:
    data: list[str] = field(default_factory=list)  # files of records, as train.py --data takes them
    image_folder: PathArg | None = None  # where the images lie; the data file's own if not given
    eval_data: PathArg | None = None  # held-out records: checked, and compared with the others
    model: PathArg = "tiny"  # whose tokenizer, template and image settings; nothing else is loaded
    max_length: PositiveInt = 2048  # tokens in a row; a longer record is a fault
    template: str | None = None  # chat template; the model's if not given
    image_aspect_ratio: Literal["pad", "crop"] | None = None  # the model's if not given
    exif: bool = False  # turn images as their orientation tag says
    images: bool = True  # open the images; without it only their names are looked up
    decode: bool = False  # decode every pixel instead of reading the headers
    show: NonNegativeInt = 0  # print so many records, with what is supervised in colour
    html: PathArg | None = None  # write them as a page, with the images as the model sees them
    workers: NonNegativeInt = 0  # processes; one per core if 0


def main(argv: list[str]) -> int:
    config = parse(Config, argv, "Check records before training on them.", positional="data")
    if not config.data:
        raise UserError("DATA: give a file of records, as train.py --data takes it")
    if config.model == "tiny":
        info(
            "tokens are counted with the bundled tiny model's tokenizer, which is not Llama's; "
            "--model FOLDER or hub id takes a model's own"
        )
    with flags(config):
        if config.html and Path(config.html).exists():
            raise UserError(f"{shorten(config.html, 400)} exists; give another path", "html")
        if config.html and not Path(config.html).parent.is_dir():
            folder = shorten(Path(config.html).parent, 400)
            raise UserError(f"{folder}: no such folder; make it, or give another path", "html")
        return check(config)


def check(config: Config) -> int:
    from llava_min.tools.check_records import read_files, shared
    from llava_min.training.small_files import processor_of

    processor = processor_of(config.model, config.image_aspect_ratio, config.template)
    workers = config.workers or len(os.sched_getaffinity(0))
    read = lambda data: read_files(data, config.image_folder, processor, config.max_length, workers)
    training = [file for data in config.data for file in read(os.path.expanduser(data))]
    held_out = read(config.eval_data) if config.eval_data else []
    looked, lines, bad = [], [], 0
    for file in (*training, *held_out):
        images = look_at(file, config, workers) if config.images else None
        lines += [*report(file, images, config.max_length), ""]
        bad += len(file.bad) + (len(images.bad) if images else 0)
        looked.append(images)
    if held_out:
        every = lambda files: [s for file in files for s in file.measured]
        mine, theirs = every(training), every(held_out)
        both = "evaluation and training share nothing" if mine and theirs else NOT_COMPARED
        lines += shared(mine, theirs) or [both]
        lines += same_images(looked[: len(training)], looked[len(training) :])
    lines.append(f"{bad} bad" if bad else "nothing is wrong")
    print("\n".join(map(escape_controls, lines)))
    show(config, processor, training, lines)
    return 1 if bad else 0


def look_at(file, config: Config, workers: int):
    from llava_min.tools.check_images import look_at_all

    images = [(p, file.root, file.where(s.number)) for s in file.seen for p in s.images]
    return look_at_all(images, config.exif, config.decode, workers)


def same_images(training: Sequence, held_out: Sequence) -> Iterator[str]:
    """By what is in the files, which only --decode reads whole."""
    digests = lambda looked: set().union(*(images.digests for images in looked if images))
    if same := digests(training) & digests(held_out):
        yield f"{len(same)} image files of the evaluation are, byte for byte, in the training"


# ---- the report


def report(file, images, max_length: int) -> Iterator[str]:
    with_image = sum(bool(s.images) for s in file.measured)
    times = "" if file.weight == 1 else f", taken {file.weight:g} times"
    yield f"{file.path}: {file.total:,} records{times}, {len(file.bad):,} of them bad"
    yield from faults(file.bad)
    if file.measured:
        good = "good but for the images" if file.imageless else "good"
        yield f"  {good}: {len(file.measured):,} records, {with_image:,} with an image"
        yield from numbers(file, images, max_length)
    if images and images.total:
        yield f"  images: {images.total:,} different, {len(images.bad):,} of them bad"
        yield from faults(images.bad)
        for text, where in images.warnings.sorted():
            yield f"  note: {len(where):,} images: {text}"
    for remark in file.remarks:
        yield f"  note: {remark}"


def faults(kinds) -> Iterator[str]:
    """Each kind of fault: how often, the first one's words, and which records."""
    for text, where in kinds.sorted():
        yield f"  {len(where):>6,} x {shorten(text, 300)}"
        more = f" and {len(where) - NAMED:,} more" if len(where) > NAMED else ""
        yield f"           {', '.join(where[:NAMED])}{more}"


def numbers(file, images, max_length: int) -> Iterator[str]:
    """Token counts, what is supervised of them, lengths and image sizes."""
    import numpy as np

    tokens = np.array([s.tokens for s in file.measured])
    learned = np.array([s.supervised for s in file.measured])
    columns = [("tokens", tokens), ("supervised", learned)]
    columns += [("images", np.array([len(s.images) for s in file.measured]))]
    if images and images.sizes:
        sizes = np.array(images.sizes)
        columns += [("image width", sizes[:, 0]), ("image height", sizes[:, 1])]
    yield f"  {'':14}{'least':>8}{'median':>8}{'95 %':>8}{'most':>8}{'all':>16}"
    for name, x in columns:
        low, middle, high = (int(np.percentile(x, q, method="lower")) for q in (0, 50, 95))
        total = f"{x.sum():>16,}" if name in ("tokens", "supervised", "images") else ""
        yield f"  {name:14}{low:>8,}{middle:>8,}{high:>8,}{x.max():>8,}{total}"
    share = learned.sum() / tokens.sum()
    yield f"  {share:.1%} of the tokens are supervised; lengths: {lengths(tokens, max_length)}"


def lengths(tokens, max_length: int) -> str:
    """How many records are how long, in doubling steps up to the row."""
    ends = [max_length]
    while len(ends) < 5 and ends[0] // 2 > tokens.min():
        ends.insert(0, ends[0] // 2)
    counts = [int(((tokens > low) & (tokens <= high)).sum()) for low, high in zip([0, *ends], ends)]
    return ", ".join(f"{n:,} up to {end:,}" for n, end in zip(counts, ends) if n)


def show(config: Config, processor, files: Sequence, lines: list[str]) -> None:
    """The first good records, on the terminal and as a page."""
    from llava_min.tools.check_show import in_terminal, write_page

    wanted = config.show or (10 if config.html else 0)
    good = [(file, s) for file in files for s in file.seen][:wanted]
    chosen = [(file.record(s), file.where(s.number)) for file, s in good]
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for record, where in chosen[: config.show]:
        print(f"\n{in_terminal(record, processor, where, colour)}", end="")
    if config.html:
        settings = {"data": config.data, "model": config.model, "template": processor.template_name}
        settings["image_aspect_ratio"] = processor.image_config.aspect
        title = ", ".join(Path(data).name for data in config.data)
        write_page(Path(config.html), title, settings, lines, chosen, processor, config.exif)
        info(f"wrote {config.html}")
