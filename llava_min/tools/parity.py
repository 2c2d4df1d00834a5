"""`python -m llava_min parity FOLDER`: where a checkpoint differs here and in transformers.

Both read the whole folder, transformers through AutoProcessor and AutoModel as its users do, and
are compared stage by stage on the same input. The exit code is 0 where all stages are the same, 1
where one differs; the first of them is where to look.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llava_min.checks.ranges import PositiveInt
from llava_min.errors import UserError, escape_controls, info, shorten
from llava_min.util.cli import PathArg, flags, parse

PROMPTS = (
    "USER: <image>\nWhat is this? ASSISTANT:",
    "USER: What is this? ASSISTANT: A cat.</s>USER: Why? ASSISTANT:",
    "USER: <image> <image>\nCompare  them. ASSISTANT:",
    " begins with a space, ends with one ",
    "two\n\nlines\tand a tab, naïve 日本語 🙂 <b>",
    "<image>",
)
QUESTIONS = ("What is this?", "  Two  spaces, a\nline and 日本語 ")
SIZES = ((60, 40), (40, 60), (37, 37), (300, 90))  # of the drawn images
SMALL = 500_000_000  # parameters up to which both models are compared in fp64


@dataclass
class Config:
    folders: list[str] = field(default_factory=list)  # a checkpoint in transformers' layout
    image: PathArg | None = None  # an image file beside the drawn ones
    prompt: str | None = None  # a prompt beside ours; <image> marks the image
    dtype: Literal["auto", "fp64", "fp32", "bf16"] = "auto"  # auto: fp64, or fp32 for large models
    image_aspect_ratio: Literal["pad", "crop"] | None = None  # what the folder records if not given
    tokens: PositiveInt = 64  # of the greedy answers


def main(argv: list[str]) -> int:
    config = parse(
        Config,
        argv,
        "Compare a checkpoint with transformers, stage by stage.",
        positional="folders",
    )
    if len(config.folders) != 1:
        raise UserError("FOLDER: give the folder of one checkpoint")
    with flags(config), warnings.catch_warnings():
        sides, tolerance = load(config)
        stages = run_stages(sides, config, tolerance)
    print("\n".join(map(escape_controls, table(stages))))
    return 0 if all(stage.same for stage in stages) else 1


def load(config: Config):
    """Both sides in one dtype, and the difference that this dtype may make."""
    import torch

    import llava_min
    from llava_min.load import TINY, on_meta
    from llava_min.tools.parity_stages import Sides
    from llava_min.training.small_files import config_of

    try:
        import transformers
    except ImportError:
        raise UserError(
            "parity needs transformers; pip install 'llava_min[test]', or pip install transformers"
        ) from None
    folder = TINY if config.folders[0] == "tiny" else Path(config.folders[0]).expanduser()
    if not folder.is_dir():
        raise UserError(f"{shorten(folder, 400)}: no such folder; give a checkpoint's folder")
    shapes = config_of(str(folder))
    if shapes.vision_source:
        raise UserError(
            f"{folder}: the original's layout, which transformers does not read; convert it with "
            "`python -m llava_min export --to hf`"
        )
    parameters = sum(p.numel() for p in on_meta(shapes).parameters())
    if shapes.quantization and shapes.quantization.kind == "llava_min":
        raise UserError(
            f"{folder}: {shapes.quantization.method} is stored as llava_min has it, which "
            "transformers does not read; compare the 16-bit folder, or nf4, int8 or int4 of it"
        )
    bnb = in_bitsandbytes(shapes)
    if bnb and config.dtype == "fp64":
        raise UserError("bitsandbytes multiplies in fp32 at most; give fp32, or auto", "dtype")
    auto = "fp64" if parameters <= SMALL else "fp32"
    if bnb:  # transformers leaves what is not quantized as the files have it
        auto = "fp32" if shapes.dtype == "float32" else "bf16"
    name = auto if config.dtype == "auto" else config.dtype
    dtype = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}[name]
    tolerance = {"fp64": 1e-9, "fp32": 1e-4, "bf16": 5e-2}["bf16" if bnb else name]
    info(f"transformers {transformers.__version__}, both in {name}")
    if bnb:
        info(
            "bitsandbytes multiplies in 16 bit on the CPU and rounds int8's inputs, so as much is "
            "allowed as in bf16; its gradients are left out"
        )
    ratio = config.image_aspect_ratio
    model, processor = llava_min.load(
        str(folder), dtype=dtype, device="cpu", image_aspect_ratio=ratio
    )
    logging.disable(logging.WARNING)  # theirs, on what is no difference
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    try:
        theirs = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        # the PIL path is the original's; transformers' torchvision one is up to 0.03 off it
        reads = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    except Exception as e:  # whatever a version raises on a folder that it does not take
        raise UserError(
            f"{folder}: transformers does not read it ({type(e).__name__}: {shorten(e, 300)})"
        ) from None
    return Sides(model, processor, theirs.eval().requires_grad_(False), reads), tolerance


def in_bitsandbytes(shapes) -> bool:
    return shapes.quantization is not None and shapes.quantization.kind == "bitsandbytes"


def draw(sizes: Sequence[tuple[int, int]]) -> list:
    """Images of noise on a slope: no two pixels alike, so that a shift or another filter shows."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    images = []
    for w, h in sizes:
        slope = np.linspace(0, 200, w)[None, :, None] * np.array([1, 0.5, 0.25])
        noise = generator.integers(0, 55, (h, w, 3))
        images.append(Image.fromarray((slope + noise).astype(np.uint8)))
    return images


def run_stages(sides, config: Config, tolerance: float) -> list:
    """All stages, in the order in which data goes through them."""
    import torch

    from llava_min.checks.image_file import open_image
    from llava_min.tools import parity_stages as stages

    images = draw(SIZES) + ([open_image(config.image)] if config.image else [])
    prompts = PROMPTS + ((config.prompt,) if config.prompt else ())
    out = [stages.pixels(sides, images), stages.ids(sides, prompts, images[2])]
    out.append(stages.labels(sides, QUESTIONS, images[2], "A cat."))
    rows = [
        dict(sides.their_processor(text=PROMPTS[i], images=seen, return_tensors="pt"))
        for i, seen in ((0, images[:1]), (2, images[1:3]))
    ]
    out += stages.forward(sides, padded(rows), tolerance)
    if len(out) < 6:  # the features do not fit into the rows, so nothing after them can run
        return out
    row = training_row(rows[1], sides.model.dtype)
    out.append(stages.loss(sides, row, tolerance))
    out.append(stages.greedy(sides, padded(rows[:1]), config.tokens))
    if in_bitsandbytes(sides.model.config):
        return out
    try:
        import peft  # noqa: F401
    except ImportError:
        info("peft is not installed, so gradients are left out; pip install peft")
        return out
    torch.manual_seed(0)
    return [*out, stages.gradients(sides, row, tolerance)]


def padded(rows: Sequence[dict]) -> dict:
    """Rows of transformers' processor as one batch, padded on the left as for answering."""
    import torch

    length = max(row["input_ids"].shape[1] for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        own = row["input_ids"][0]
        ids[i, length - len(own) :], mask[i, length - len(own) :] = own, 1
    pixels = torch.cat([row["pixel_values"] for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def training_row(row: dict, dtype) -> dict:
    """One row with its last tokens supervised."""
    labels = row["input_ids"].clone()
    labels[:, :-8] = -100
    pixels = row["pixel_values"].to(dtype)
    return {"input_ids": row["input_ids"], "labels": labels, "pixel_values": pixels}


def table(stages: Sequence) -> Iterator[str]:
    yield f"{'stage':11}{'difference':>12}{'allowed':>10}"
    for s in stages:
        verdict = "same" if s.same else "DIFFERS"
        yield f"{s.name:11}{s.difference:>12.3g}{s.tolerance:>10.3g}  {verdict:8}{s.compared}"
    if wrong := next((s for s in stages if not s.same), None):
        where = f": {wrong.first}" if wrong.first else ""
        yield f"the first stage that differs is {wrong.name}{where}"
    else:
        yield f"all {len(stages)} stages are the same"
