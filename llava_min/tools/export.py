"""`python -m llava_min export MODEL OUT --to hf|original|gguf`: write a model in another's format.

The model may be any that `load` reads, with adapters merged into it. It is read and written tensor
by tensor, and OUT gets its name only once all of it has been read back.
"""

from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Literal

from llava_min.errors import UserError, info
from llava_min.export import FORMATS
from llava_min.util.cli import PathArg, flags, parse
from llava_min.util.files import check_apart

Format = Literal[tuple(FORMATS)]


@dataclass
class ExportConfig:
    folders: list[str] = field(default_factory=list)  # the model (or a hub id, or tiny); OUT
    to: Format | None = None  # llava-hf, LLaVA's own layout, or llama.cpp's two files
    adapter: PathArg | None = None  # PEFT folders to merge, with commas between
    type: str | None = None  # of --to gguf: f32, f16, bf16, q8_0, q4_0, or q4_k_m and its like; f16
    dtype: Literal["fp32", "bf16", "fp16"] | None = None  # of the others; as stored, if not given
    image_aspect_ratio: Literal["pad", "crop"] | None = None  # to record; the model's, if not given
    template: str | None = None  # to record; the model's, if not given
    revision: str | None = None  # of a hub id
    overwrite: bool = False  # OUT may be a model's folder, which is replaced


def check(config: ExportConfig) -> tuple[str, Path]:
    if len(config.folders) != 2:
        raise UserError("FOLDER: give two, the model and the folder to write")
    if config.to is None:
        raise UserError("is not given; choose hf, original or gguf", "to")
    if config.type is not None and config.to != "gguf":
        raise UserError(f"is of --to gguf, and this is --to {config.to}; give --dtype", "type")
    if config.dtype is not None and config.to == "gguf":
        raise UserError("is not of --to gguf; give --type", "dtype")
    source, out = config.folders[0], Path(config.folders[1])
    check_apart(out, source, *(config.adapter or "").split(","))
    return source, out


def main(argv: list[str]) -> None:
    config = parse(ExportConfig, argv, "Write a model in another format.", positional="folders")
    with flags(config):
        run(config, *check(config))


def run(config: ExportConfig, source: str, out: Path) -> None:
    from llava_min.export.tensors import open_model
    from llava_min.util.files import check_new_folder, new_folder
    from llava_min.weights import DTYPES

    check_new_folder(out, config.overwrite)
    model = open_model(
        source,
        config.adapter.split(",") if config.adapter else [],
        image_aspect_ratio=config.image_aspect_ratio,
        template=config.template,
        revision=config.revision,
    )
    dtype = model.dtype if config.dtype is None else DTYPES[config.dtype]
    with new_folder(out, overwrite=config.overwrite) as aside:
        page = import_module(FORMATS[config.to])
        what = page.export(model, aside, dtype, config.type)
    info(f"saved {out}: {what}")
