"""`python -m llava_min plan`: the memory and time of training and answering, before the download.

From the shapes in a config and the settings alone; no weight is read. What a step needs is counted
by running it on tensors without values (training/fake_step.py), so a plan takes some seconds.

    plan                     every way to train and to answer, on 1, 2, 4 and 8 GPUs
    plan --recipe two-24gb   a recipe of train.py, or --train lora, by part
    plan --gpus 2x24         the most that fits on these GPUs, and its train.py line
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from llava_min.checks.load import check_llava
from llava_min.checks.lora_targets import check_rank
from llava_min.checks.ranges import Fraction, NonNegativeInt, PositiveInt
from llava_min.checks.settings import typed_settings
from llava_min.config import LINEARS, LlavaConfig
from llava_min.errors import UserError, escape_controls, label
from llava_min.util.cli import PathArg, flags, parse
from llava_min.util.train_script import read_command

FOUND = ("batch_size", "grad_accum", "gradient_checkpointing")  # what --gpus chooses
FOR_GPUS = ("rows", "records")
FOR_TRAIN = ("quantize", "train_projector", "train_vision", "lora_dropout")
FOR_LORA = ("lora_r", "lora_targets", "lora_dropout", "dora")


@dataclass
class Config:
    model: PathArg = "7b"  # a size (300m, 1b, 7b, 13b, mistral-7b, qwen1.5-4b), a folder, a hub id
    recipe: PathArg | None = None  # of train.py: that alone; its model unless one is given
    train: str | None = None  # lora, full, freeze_vision, projector, last:N: that alone
    gpus: str | None = None  # 2x24 (GiB), 8xA100-80: the best that fits, and its train.py line
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"  # of the computation
    batch_size: PositiveInt = 1  # rows of a micro-batch on each GPU
    grad_accum: PositiveInt = 1  # micro-batches in an optimizer step
    max_length: PositiveInt | None = None  # tokens in a row; 2048 or the model's context by default
    images: NonNegativeInt = 1  # in a row
    lora_r: PositiveInt | None = None  # rank; 128, or with --gpus the largest that fits up to it
    lora_targets: tuple[str, ...] = LINEARS  # leaf names in the language model
    lora_dropout: Fraction = 0.0  # with --train lora
    dora: bool = False  # weight-decomposed LoRA
    quantize: str | None = None  # with --train lora: how the decoder is stored
    train_projector: bool | None = None  # with --train
    train_vision: bool | None = None  # with --train
    gradient_checkpointing: bool = True  # compute blocks twice and keep little of them
    rows: PositiveInt = 128  # of an optimizer step on all GPUs, which --gpus keeps to
    records: NonNegativeInt = 0  # of the data, to tell how long an epoch takes


def main(argv: list[str]) -> None:
    config = parse(Config, argv, "Memory and time, before anything is downloaded.")
    with flags(config):
        lines = plan(config, argv)
        print("\n".join(map(escape_controls, lines)))


def plan(config: Config, argv: Sequence[str]) -> list[str]:
    typed = {name.removeprefix("no_") for name in typed_settings(argv)}
    check_used(config, typed)
    from llava_min.tools import plan_tables as tables
    from llava_min.tools.plan_fit import read_cards
    from llava_min.training.batch_size import row_length
    from llava_min.training.small_files import config_of, named_config
    from llava_min.util.sizes import SIZES

    cards = read_cards(config.gpus) if config.gpus else None
    if config.recipe:
        take_recipe(config, typed)
        shapes = named_config(config.model)  # nothing is fetched for a recipe's hub id
    else:
        shapes = config_of(config.model)
    config.max_length = row_length(config.max_length, shapes.text.context)
    check_llava(shapes, config.model)
    check_fits(config, shapes)
    lines = [*tables.parameters(shapes, config.model), ""]
    if cards:
        return [*lines, *tables.best(config, shapes, cards, typed)]
    if config.train:
        return [*lines, *tables.by_part(shapes, tables.step(config))]
    lines += [*tables.training(config, shapes), "", *tables.answering(config, shapes)]
    return [*lines, "", *tables.notes()] if shapes == SIZES["7b"] else lines


def check_used(config: Config, typed: Collection[str]) -> None:
    """Raises UserError for what was typed and would be ignored."""
    if config.recipe and "train" in typed:
        raise UserError(f"{label('recipe')} says what is trained; give one of them", "train")
    one = f"{label('train')} or {label('recipe')}"
    for names, used, why in (
        (FOUND, not config.gpus, f"has no effect with {label('gpus')}, which finds it"),
        (FOR_GPUS, config.gpus, f"has no effect without {label('gpus')}"),
        (FOR_TRAIN, config.train or config.recipe, f"has no effect without {one}"),
        (FOR_LORA, config.train in (None, "lora"), f"has no effect without {label('train')} lora"),
    ):
        for name in names:
            if name in typed and not used:
                raise UserError(f"{why}; leave it out", name)


def check_fits(config: Config, shapes: LlavaConfig) -> None:
    """Raises UserError for images that no row holds, and for LoRA that this model cannot have."""
    on_images = config.images * shapes.tokens_per_image
    if on_images > config.max_length:
        raise UserError(
            f"{config.images} of them take {on_images} tokens, and a row has {config.max_length}; "
            f"give fewer, or a larger {label('max_length')}",
            "images",
        )
    if config.train in (None, "lora"):
        from llava_min.load import on_meta
        from llava_min.training.targets import lora_targets

        check_rank(config.lora_r or 1, shapes.text.hidden_size)
        lora_targets(on_meta(shapes), config.lora_targets)


def take_recipe(config: Config, typed: Collection[str]) -> None:
    """What train.py would take from a recipe into `config`, but where a flag says otherwise."""
    theirs = vars(read_command(["--recipe", config.recipe]))
    for name in (theirs.keys() & vars(config).keys()) - {"recipe", *typed}:
        setattr(config, name, theirs[name])
