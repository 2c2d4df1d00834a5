"""`python -m llava_min quantize MODEL OUT`: write a quantized checkpoint, which loads at once.

The linear layers of the decoder's blocks are quantized as their weights are read, so the model
never exists whole in 16 bits. nf4, fp4 and int8 are written as bitsandbytes has them, int4 in
groups of 128 as compressed-tensors does, and transformers loads them; quant/folder.py says how the
others are.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llava_min.checks.ranges import PositiveInt
from llava_min.errors import UserError, info
from llava_min.util.cli import flags, parse

Method = Literal[
    "int8", "int4", "hqq8", "hqq4", "hqq3", "hqq2", "hqq1", "nf4", "fp4", "w8a8"
]  # fmt: skip

Part = Literal["lm_head", "multi_modal_projector", "vision_tower"]


@dataclass
class Config:
    folders: list[str] = field(default_factory=list)  # MODEL: folder or hub id; OUT: to write
    method: Method = "nf4"  # how the numbers are chosen and stored
    group_size: PositiveInt | None = None  # weights that share a scale: int4 128, hqq 64
    include: tuple[
        Part, ...
    ] = ()  # quantize these, too: lm_head, multi_modal_projector, vision_tower
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"  # of what is not quantized
    device: str = "auto"  # cpu, cuda, cuda:N
    image_aspect_ratio: Literal["pad", "crop"] | None = None  # default: what the checkpoint says
    template: str | None = None  # chat template to record; default: the checkpoint's


def main(argv: list[str]) -> None:
    about = "Write a checkpoint whose decoder is quantized."
    config = parse(Config, argv, about, positional="folders")
    if len(config.folders) != 2:
        raise UserError("MODEL OUT: give the checkpoint to read and the folder to write")
    with flags(config):
        write(config, *config.folders)


def write(config: Config, source: str, target: str) -> None:
    from llava_min.load import open_checkpoint, write_model
    from llava_min.parallel.ranks import pick_device
    from llava_min.util.files import check_free, new_folder
    from llava_min.weights import read_dtype

    out = Path(target)
    check_free(out)  # before minutes of work, and again once it is done
    checkpoint = open_checkpoint(
        source, image_aspect_ratio=config.image_aspect_ratio, template=config.template
    )
    checkpoint.quantize(config.method, config.group_size, *config.include)
    dtype = read_dtype(config.dtype, "bf16, fp16, fp32")
    checkpoint.load_weights(dtype, pick_device(config.device))
    with new_folder(out) as folder:
        write_model(checkpoint.model, checkpoint.processor, folder, dtype)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    info(f"{out}: {config.method}, {size / 2**20:,.1f} MiB of weights")
