"""`python -m llava_min toy OUT`: write the toy data, drawn pictures with questions or captions, as
LLaVA JSON.
"""

from dataclasses import dataclass, field
from typing import Literal

from llava_min.checks.ranges import Fraction, NonNegativeInt, Seed
from llava_min.errors import UserError, info
from llava_min.util.cli import parse


@dataclass
class Knobs:
    out: list[str] = field(
        default_factory=list
    )  # the folder to write: train.json, val.json, images/*.png
    task: Literal["questions", "captions", "captions-text"] = (
        "questions"  # -text: captions quote a printed string
    )
    train: NonNegativeInt = 2000  # training pictures
    val: NonNegativeInt = 200  # validation pictures, of scenes that are never trained on
    text: Fraction | None = (
        # share of the training pictures of `questions` with a printed string; 0.4 if not given
        None
    )
    seed: Seed = 0  # the same seed draws the same files


def main(argv: list[str]) -> None:
    knobs = parse(
        Knobs,
        argv,
        "Draw pictures, with questions or captions, in LLaVA's format.",
        positional="out",
    )
    if len(knobs.out) != 1:
        raise UserError("OUT: give the one folder to write")

    if knobs.text is not None and knobs.task != "questions":
        raise UserError(
            f"--text: pictures of task {knobs.task} all have a string or none; leave it out, or "
            "give --task questions"
        )

    from llava_min.toy import draw as toy

    toy.write(
        knobs.out[0],
        knobs.task,
        knobs.train,
        knobs.val,
        knobs.seed,
        **({} if knobs.text is None else {"text": knobs.text}),
    )
    info(
        f"{knobs.out[0]}: {knobs.train} training and {knobs.val} validation pictures, task "
        f"{knobs.task}"
    )
