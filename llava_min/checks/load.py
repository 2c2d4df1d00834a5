"""What may be given to `load` and `save`, each refused by the argument's name."""

import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch

from llava_min.checks.adapter import find_adapter
from llava_min.errors import UserError, escape_controls, shorten, warn

QUANTIZABLE = ("lm_head", "multi_modal_projector", "vision_tower")


def check_source(source: Any) -> None:
    if not isinstance(source, (str, os.PathLike)):
        kind = type(source).__name__
        raise UserError(f"{kind}, expected a checkpoint's folder, a hub id, or tiny", "source")


def check_adapter(adapter: Any) -> None:
    """A folder with an adapter that PEFT wrote, or UserError."""
    if not isinstance(adapter, (str, os.PathLike)) or not str(adapter):
        raise UserError(f"{adapter!r:.100}, expected the folder of a PEFT adapter", "adapter")
    find_adapter(Path(adapter))


def check_quantize(method: Any, methods: Collection[str], quantized: bool) -> None:
    """One of `methods` that needs no data, for a checkpoint that is in 16 bit, or UserError."""
    if not isinstance(method, str) or method not in methods:
        given = escape_controls(method)[:100]
        raise UserError(f"{given!r}, expected one of {', '.join(methods)}", "quantize")
    if method == "awq4":
        raise UserError(
            "awq4 needs calibration data; write it with `python -m llava_min quantize MODEL OUT "
            "--method awq4 --data FILE` and load OUT, or give int4 or hqq4",
            "quantize",
        )
    check_unquantized(method, quantized)


def check_unquantized(method: str, quantized: bool) -> None:
    """The checkpoint that `method` is for is in 16 bit, or UserError."""
    if quantized:
        raise UserError(
            f"{method} for a checkpoint that is quantized already; leave it out, or give the "
            "16-bit checkpoint",
            "quantize",
        )


def warn_quantized_twice(source: object, entries: Iterable[Any]) -> None:
    """A warning where weights that are to be quantized were so before, as in GGUF's Q8_0."""
    if kinds := sorted({entry.quantized for entry in entries} - {""}):
        warn(
            f"{shorten(source, 400)}: its weights were of few bits before ({', '.join(kinds)}) and "
            "are rounded a second time; a 16-bit checkpoint gives better ones"
        )


def check_include(include: Collection[str], tied: bool) -> None:
    """Parts of a model that can be quantized beside the decoder's blocks, or UserError."""
    if other := [part for part in include if part not in QUANTIZABLE]:
        raise UserError(
            f"{shorten(other[0])!r} is not one of {', '.join(QUANTIZABLE)}; choose one", "include"
        )
    if tied and "lm_head" in include:
        raise UserError(
            "lm_head is tied to the embeddings here, which stay in 16 bit; leave it out", "include"
        )


def check_dtype(dtype: Any, given: Any, allowed: Collection[torch.dtype], names: str) -> None:
    """`dtype`, which `given` stands for, is one of `allowed`, or UserError that lists `names`."""
    if not isinstance(dtype, torch.dtype) or dtype not in allowed:
        raise UserError(
            f"{escape_controls(given)[:100]!r} is not one of {names}; choose one", "dtype"
        )


def check_llava(config: Any, source: Any) -> None:
    """`config` has a vision tower, or UserError: texts can be asked of a language model alone."""
    if config.vision is None:
        raise UserError(
            f"{source}: a language model without a vision tower, which only answers texts; "
            "`python -m llava_min build` makes a LLaVA of it and a CLIP"
        )


def check_written(config: Any, names: Collection[str], folder: Path) -> None:
    """A whole LLaVA, and no tensor of it is an adapter's, or UserError."""
    check_llava(config, folder)
    if any(".lora_" in name for name in names):
        raise UserError(
            f"{folder}: the model has an adapter that is not merged; "
            "save the adapter, or load the base without it"
        )


def check_model_folder(folder: Path) -> None:
    """The folder has a model's config.json and is not a run's, or UserError that says what it has
    instead and what to give.
    """
    if (folder / "config.json").exists() and not (folder / ".lock").exists():  # of a run
        return
    adapters = (p for p in (folder, folder / "adapter") if (p / "adapter_config.json").exists())
    adapter = next(adapters, None)
    what = "holds no config.json of a model, expected the folder of a checkpoint"
    finish = f"`python -m llava_min finish {folder} OUT` makes its adapter or model"
    if (folder / "state.json").exists():
        what, fix = "a checkpoint of a run, expected a model", finish
    elif adapter:
        fix = f"give the base model, and {adapter} as adapter"
    elif (folder / "model").is_dir():
        fix = f"give {folder / 'model'}"
    elif (folder / "checkpoints").is_dir():
        fix = f"it is a run that has not ended, and {finish}"
    else:
        fix = "give one, a hub id, or tiny"
    raise UserError(f"{folder}: {what}; {fix}")


def check_tower_folder(folder: Path, where: str, fix: str) -> None:
    """`where`: the file, the key and the value that name the folder of a CLIP."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{where}: a folder without config.json, expected that of a CLIP; {fix}")
