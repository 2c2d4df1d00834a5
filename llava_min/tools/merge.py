"""`python -m llava_min merge MODEL ADAPTER … OUT`: put adapters into their base, as one model.

An adapter is a PEFT folder (LoRA, DoRA, rsLoRA, with whole modules), a LoRA folder of the original
LLaVA, or a file such as mm_projector.bin. All is read and written tensor by tensor, and OUT is a
llava-hf folder.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llava_min.errors import UserError, info
from llava_min.util.cli import flags, parse


@dataclass
class MergeConfig:
    folders: list[str] = field(default_factory=list)  # the base (or hub id, or tiny); adapters; OUT
    weights: tuple[float, ...] | None = None  # of each adapter, with commas between; 1 each
    dtype: Literal["fp32", "bf16", "fp16"] | None = None  # as the base is stored, if not given
    image_aspect_ratio: Literal["pad", "crop"] | None = None  # to record; the adapter's or base's
    template: str | None = None  # to record; the adapter's or base's, if not given
    revision: str | None = None  # of a hub id
    overwrite: bool = False  # OUT may be a model's folder, which is replaced


def main(argv: list[str]) -> None:
    config = parse(MergeConfig, argv, "Put adapters into their base.", positional="folders")
    with flags(config):
        run(config, *check(config))


def check(config: MergeConfig) -> tuple[str, list[str], Path]:
    if len(config.folders) < 3:
        raise UserError(
            "FOLDER: give three or more, the base, its adapters, and the folder to write"
        )
    if config.weights and 0 in config.weights:
        raise UserError("0 leaves an adapter out; leave it out of the command", "weights")
    source, *adapters, out = config.folders
    for place in (source, *adapters):
        if Path(place).exists() and Path(out).resolve() == Path(place).resolve():
            raise UserError(f"{out}: is to be read; give another folder to write")
    return source, adapters, Path(out)


def run(config: MergeConfig, source: str, adapters: list[str], out: Path) -> None:
    from llava_min.export.hf import write_hf
    from llava_min.export.tensors import open_model
    from llava_min.util.files import check_free, new_folder
    from llava_min.weights import DTYPES

    check_free(out, config.overwrite)
    model = open_model(
        source,
        adapters,
        config.weights and list(config.weights),
        image_aspect_ratio=config.image_aspect_ratio,
        template=config.template,
        revision=config.revision,
    )
    dtype = model.dtype if config.dtype is None else DTYPES[config.dtype]
    with new_folder(out, overwrite=config.overwrite) as aside:
        write_hf(model, aside, dtype)
    changed = len({name for a in model.read.adapters for name in a.targets})
    info(f"saved {out}: {len(adapters)} adapter(s) merged into {changed} tensors, all read back")
