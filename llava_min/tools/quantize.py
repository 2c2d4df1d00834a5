"""`python -m llava_min quantize MODEL OUT`: write a quantized checkpoint, which loads at once.

The linear layers of the decoder's blocks are quantized as their weights are read, so the model
never exists whole in 16 bits. nf4, fp4 and int8 are written as bitsandbytes has them, int4 and awq4
in groups of 128 as compressed-tensors does, and transformers loads them; quant/folder.py says how
the others are.

awq4 is calibrated: `--data` are records, with images or without, that go through the processor,
tower and projector as in training, and then through the decoder block by block.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llava_min.checks.ranges import PositiveInt
from llava_min.errors import UserError, info, shorten
from llava_min.util.cli import PathArg, flags, parse

Method = Literal[
    "int8", "int4", "hqq8", "hqq4", "hqq3", "hqq2", "hqq1", "awq4", "nf4", "fp4", "w8a8"
]  # fmt: skip
SAMPLES = 128

Part = Literal["lm_head", "multi_modal_projector", "vision_tower"]


@dataclass
class Config:
    folders: list[str] = field(default_factory=list)  # MODEL: folder or hub id; OUT: to write
    method: Method = "nf4"  # how the numbers are chosen and stored
    group_size: PositiveInt | None = None  # weights that share a scale: int4, awq4 128, hqq 64
    include: tuple[Part, ...] = ()  # as well: lm_head, multi_modal_projector, vision_tower
    data: PathArg | None = None  # awq4: records to calibrate on, as train.py reads them
    image_folder: PathArg | None = None  # awq4: where image paths start; default: the data's folder
    samples: PositiveInt | None = None  # awq4: as many records, evenly spaced (128)
    max_length: PositiveInt | None = None  # awq4: most tokens of a record (2048)
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"  # of what is not quantized
    device: str = "auto"  # cpu, cuda, cuda:N
    image_aspect_ratio: Literal["pad", "crop"] | None = None  # default: what the checkpoint says
    template: str | None = None  # chat template to record; default: the checkpoint's


def main(argv: list[str]) -> None:
    about = "Write a checkpoint whose decoder is quantized."
    config = parse(Config, argv, about, positional="folders")
    if len(config.folders) != 2:
        raise UserError("MODEL OUT: give the checkpoint to read and the folder to write")
    with flags(config, quantize="method"):
        check(config)
        write(config, *config.folders)


def check(config: Config) -> None:
    """Data for the method that is calibrated, and for no other, or UserError."""
    if config.method == "awq4" and config.data is None:
        raise UserError(
            "awq4 is calibrated on records and none came; give a file, of images and text like "
            "those the model is for",
            "data",
        )
    if config.method == "awq4" and config.include:
        raise UserError("awq4 is of the decoder's blocks alone; leave it out", "include")
    for name in ("data", "image_folder", "samples", "max_length"):
        if config.method != "awq4" and getattr(config, name) is not None:
            raise UserError(
                f"{config.method} is chosen without data; leave it out, or give --method awq4", name
            )


def write(config: Config, source: str, target: str) -> None:
    from llava_min.checks.load import check_llava
    from llava_min.load import open_checkpoint, write_model
    from llava_min.parallel.ranks import pick_device
    from llava_min.util.files import check_apart, check_new_folder, new_folder
    from llava_min.weights import read_dtype

    out = Path(target)
    check_apart(out, source)
    check_new_folder(out)  # before minutes of work, and again once it is done
    checkpoint = open_checkpoint(
        source, image_aspect_ratio=config.image_aspect_ratio, template=config.template
    )
    check_llava(checkpoint.config, source)
    if checkpoint.config.quantization is not None:
        raise UserError(f"{shorten(source)}: is quantized already; give the 16-bit checkpoint")
    dtype, device = read_dtype(config.dtype, "bf16, fp16, fp32"), pick_device(config.device)
    if config.method == "awq4":
        calibrate(config, checkpoint, dtype, device)
    else:
        checkpoint.quantize(config.method, config.group_size, *config.include)
        checkpoint.load_weights(dtype, device)
    with new_folder(out) as folder:
        write_model(checkpoint.model, checkpoint.processor, folder, dtype)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    info(f"{out}: {config.method}, {size / 2**20:,.1f} MiB of weights")


def calibrate(config: Config, checkpoint, dtype, device) -> None:
    """awq4 of `checkpoint`, on records that are evenly spaced among those of the data."""
    from llava_min.data.dataset import Dataset, collate
    from llava_min.data.records import read_records
    from llava_min.export.awq import quantize_by_awq
    from llava_min.training.batch_size import row_length

    records = read_records(config.data, config.image_folder)
    n = min(config.samples or SAMPLES, len(records))
    chosen = [records[i * len(records) // n] for i in range(n)]
    max_length = row_length(config.max_length, checkpoint.config.text.context)
    dataset = Dataset(chosen, checkpoint.processor, max_length=max_length)
    batches = (collate([dataset[i]]) for i in range(n))
    quantize_by_awq(checkpoint, batches, dtype, device, config.group_size)
