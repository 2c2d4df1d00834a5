"""`python -m llava_min toy OUT`: write the toy data, drawn images with questions or captions, as
LLaVA JSON.
"""

from dataclasses import dataclass, field
from typing import Literal

from llava_min.checks.ranges import Fraction, NonNegativeInt, Seed
from llava_min.errors import UserError, info
from llava_min.util.cli import parse

Task = Literal["questions", "captions", "captions-text"]


@dataclass
class Config:
    out: list[str] = field(default_factory=list)  # folder to write: train.json, val.json, images/
    task: Task = "questions"  # captions-text: captions quote a printed string
    train: NonNegativeInt = 2000  # training images
    val: NonNegativeInt = 200  # validation images, of scenes that are never trained on
    text: Fraction | None = None  # share of `questions` with a printed string; 0.4 if not given
    seed: Seed = 0  # the same seed draws the same files


def main(argv: list[str]) -> None:
    about = "Draw images, with questions or captions, in LLaVA's format."
    config = parse(Config, argv, about, positional="out")
    task, text = config.task, config.text
    if len(config.out) != 1:
        raise UserError("OUT: give the one folder to write")
    if text is not None and task != "questions":
        raise UserError(
            f"--text: images of task {task} all have a string or none; leave it out, or give "
            "--task questions"
        )

    from llava_min.toy import draw

    given = {} if text is None else {"text": text}
    draw.write(config.out[0], task, config.train, config.val, config.seed, **given)
    counts = f"{config.train} training and {config.val} validation images"
    info(f"{config.out[0]}: {counts}, task {task}")
