"""What `bench --quantize` is about: the 16-bit checkpoint, the methods that fit it, the questions.

Everything that can be wrong is found here, before a weight is read or written.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from llava_min.checks.question import check_fits, check_prompt
from llava_min.data.chat import text_of
from llava_min.errors import UserError, info, label, shorten
from llava_min.tools.quantize import Method
from llava_min.tools.speed.quantized import question_batch
from llava_min.tools.speed.setup import write_random
from llava_min.util.cli import guess
from llava_min.util.sizes import SIZES


@dataclass
class Source:
    """The checkpoint in 16 bit, not read yet; of a named size the one that is to be written."""

    name: str
    model: Any  # on meta
    processor: Any
    num_bytes: int  # of its weights as they are stored
    stored: Any  # the torch dtype of what is written unquantized
    random: bool = False


def open_source(args: Any) -> Source:
    """Raises UserError for what is no checkpoint, or quantized already."""
    from llava_min.export.tensors import stored_dtype
    from llava_min.load import open_checkpoint
    from llava_min.weights import DTYPES as BY_FLAG

    [name] = args.sizes
    if name in SIZES:
        return random_source(name, BY_FLAG["bf16" if args.dtype == "auto" else args.dtype])
    if name != "tiny" and "/" not in name and not Path(name).exists():
        fix = guess(name, [*SIZES, "tiny"], f"there are {', '.join(SIZES)} and tiny")
        raise UserError(f"{shorten(name)}: neither a size nor a checkpoint; {fix}")
    checkpoint = open_checkpoint(name)
    if checkpoint.config.quantization is not None:
        raise UserError(f"{shorten(name)}: is quantized already; give the 16-bit checkpoint")
    files = {Path(entry.path) for entry in checkpoint.entries.values()}
    num_bytes = sum(path.stat().st_size for path in files)
    stored = stored_dtype(checkpoint) if args.dtype == "auto" else BY_FLAG[args.dtype]
    return Source(name, checkpoint.model, checkpoint.processor, num_bytes, stored)


def random_source(name: str, dtype: Any) -> Source:
    """A named size with the tokenizer of the tiny model: a checkpoint needs one."""
    from llava_min.data.processor import Processor
    from llava_min.load import on_meta, open_checkpoint

    tiny = open_checkpoint("tiny").processor
    config = replace(SIZES[name], image_token_id=tiny.image_token_id)
    processor = Processor(
        tiny.tokenizer,
        replace(tiny.image_config, size=config.vision.image_size),
        tiny.template_name,
        config.image_token_id,
        config.tokens_per_image,
        config.text.eos_token_ids,
    )
    model = on_meta(config)
    num_bytes = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    return Source(name, model, processor, num_bytes, dtype, random=True)


def write_source(source: Source, folder: Path) -> None:
    """All files of a named size with random weights."""
    from llava_min.load import write_settings

    config = source.model.config
    folder.mkdir()
    write_random(source.model, config, folder, source.stored)
    write_settings(config, source.processor, folder, source.stored)


def pick_methods(args: Any, model: Any) -> list[str]:
    """The methods to measure. Those of `all` that cannot be made are left out with a line; one that
    was named and cannot is a UserError.
    """
    from llava_min.quant.methods import METHODS

    every = args.quantize == ("all",)
    picked = []
    for method in METHODS if every else dict.fromkeys(args.quantize):
        if method not in METHODS:
            fix = guess(method, METHODS, f"there are {', '.join(METHODS)}, and all alone")
            raise UserError(f"{shorten(method)} is no method; {fix}", "quantize")
        why = hindrance(method, args, model)
        if why and not every:
            raise UserError(f"{method}: {why}", "quantize")
        if why:
            info(f"{method}: left out: {why}")
        else:
            picked.append(method)
    if not every:
        check_used(args, picked)
    return picked


def check_used(args: Any, methods: list[str]) -> None:
    """Nothing was given that none of the named `methods` takes, or UserError."""
    from llava_min.quant.methods import CALIBRATED, METHODS

    names = ", ".join(methods)
    if args.group_size is not None and not any(METHODS[method][1] for method in methods):
        raise UserError(f"{names} has no groups; leave it out, or name int4 or hqq4", "group_size")
    if args.calibration_data != args.data and not set(CALIBRATED) & set(methods):
        raise UserError(
            f"{names} is chosen without data; leave it out, or name {CALIBRATED[0]}",
            "calibration_data",
        )


def hindrance(method: str, args: Any, model: Any) -> str | None:
    """Why this checkpoint cannot be quantized so, or None."""
    from torch import nn

    from llava_min.export.quantized import misfit
    from llava_min.quant.methods import CALIBRATED

    if method not in get_args(Method):
        return "the verb quantize does not make it"
    if method in CALIBRATED and args.calibration_data is None:
        return f"it is calibrated on records; give {label('calibration_data')}"
    layers = [m for m in model.language_model.layers.modules() if isinstance(m, nn.Linear)]
    found = misfit(layers, method, group_size(method, args))
    return found and found[1]


def group_size(method: str, args: Any) -> int | None:
    """--group-size, for the methods that have groups."""
    from llava_min.quant.methods import METHODS

    return args.group_size if METHODS[method][1] else None


def check_questions(args: Any, source: Source) -> dict:
    """How many records there are, and the one question. Raises UserError for what cannot be read or
    does not fit the context.
    """
    from llava_min.data.records import read_records

    given = next((n for n in ("data", "prompt") if getattr(args, n) is not None), None)
    if given and source.random:
        raise UserError("random weights know no answers; give a checkpoint, not a size", given)
    asked: dict = {}
    if args.calibration_data not in (None, args.data):
        read_records(args.calibration_data, args.image_folder)
    if args.data is not None:
        records = read_data(args, source)
        asked = {"records": len(records), "question": text_of(records[0].messages[-2])}
    if args.prompt is not None:
        text = check_prompt(os.fsencode(args.prompt), label("prompt"))
        batch = question_batch(source.processor, text, args.image)
        tokens = batch["input_ids"].shape[1]
        check_fits(args.max_new_tokens, tokens, source.model.config.text.context)
        asked["question"] = text
    return asked


def read_data(args: Any, source: Source) -> list:
    """The records, which fit the context with their answers, both the right one and a new one."""
    from llava_min.checks.dataset import refuse_beyond_context
    from llava_min.data.dataset import Dataset
    from llava_min.data.records import read_records
    from llava_min.evaluation.predict import check_room

    records = read_records(args.data, args.image_folder)
    context, dataset = source.model.config.text.context, Dataset([], source.processor)
    long = [shorten(r.id) for r in records if dataset.tokens(r, context) > context]
    if long:
        refuse_beyond_context(long, len(records), context)
    check_room(source.model, source.processor, records, args.max_new_tokens)
    return records
