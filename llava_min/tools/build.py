"""`python -m llava_min build --vision CLIP --text LM OUT`: a LLaVA of two models, to be trained.

What stage 1 starts from: CLIP's tower, any Llama, Mistral or Qwen2 (a folder, a hub id or a GGUF
file), and a projector that knows nothing or --projector's. <image> and, where there is none, <pad>
are added to the tokenizer. OUT is a llava-hf folder with everything in it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llava_min.checks.ranges import Seed
from llava_min.errors import UserError, info
from llava_min.util.cli import PathArg, flags, parse
from llava_min.util.files import check_apart


@dataclass
class BuildConfig:
    out: list[str] = field(default_factory=list)  # the folder to write
    vision: PathArg = "openai/clip-vit-large-patch14-336"  # CLIP: a folder or hub id
    text: PathArg | None = None  # the language model: a folder, a hub id or a .gguf file
    projector: PathArg | None = None  # a file such as mm_projector.bin; random, if not given
    template: str | None = None  # how it will be asked; by the language model, if not given
    image_aspect_ratio: Literal["pad", "crop"] = "pad"  # how images are made square
    dtype: Literal["fp32", "bf16", "fp16"] | None = None  # as the language model is stored
    seed: Seed = 0  # of the random projector
    overwrite: bool = False  # OUT may be a model's folder, which is replaced


def main(argv: list[str]) -> None:
    what = "Build a LLaVA of a CLIP and a language model, ready for training."
    config = parse(BuildConfig, argv, what, positional="out")
    with flags(config):
        run(config, check(config))


def check(config: BuildConfig) -> Path:
    if len(config.out) != 1:
        raise UserError("OUT: give the one folder to write")
    if config.text is None:
        raise UserError("is not given; give a language model, such as lmsys/vicuna-7b-v1.5", "text")
    out = Path(config.out[0])
    check_apart(out, config.vision, config.text, config.projector)
    return out


def run(config: BuildConfig, out: Path) -> None:
    from llava_min.export.build import build
    from llava_min.export.hf import write_hf
    from llava_min.util.files import check_new_folder, new_folder
    from llava_min.weights import DTYPES

    check_new_folder(out, config.overwrite)
    model = build(
        config.vision,
        config.text,
        config.projector,
        template=config.template,
        aspect=config.image_aspect_ratio,
        seed=config.seed,
    )
    dtype = model.dtype if config.dtype is None else DTYPES[config.dtype]
    shapes = model.model.config
    with new_folder(out, overwrite=config.overwrite) as aside:
        write_hf(model, aside, dtype)
    info(
        f"saved {out}: {shapes.text.model_type} with {shapes.tokens_per_image} tokens an image, "
        f"<image> is {shapes.image_token_id} of {shapes.text.vocab_size}, template "
        f"{model.processor.template_name}"
    )
