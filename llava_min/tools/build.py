"""`python -m llava_min build --vision CLIP --text LM OUT`: a LLaVA of two models, to be trained.

What stage 1 starts from: CLIP's tower, any Llama, Mistral or Qwen2 (a folder, a hub id or a GGUF
file), and a projector that knows nothing or --projector's. <image> and, where there is none, <pad>
are added to the tokenizer. OUT is a llava-hf folder with everything in it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llava_min.errors import UserError, info
from llava_min.util.cli import PathArg, Seed, flags, parse


@dataclass
class Knobs:
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
    knobs = parse(Knobs, argv, what, positional="out")
    if len(knobs.out) != 1:
        raise UserError("OUT: give the one folder to write")
    if knobs.text is None:
        raise UserError("--text: is not given; give a language model, such as lmsys/vicuna-7b-v1.5")
    out = Path(knobs.out[0])
    for place in (knobs.vision, knobs.text):
        if Path(place).exists() and out.resolve() == Path(place).resolve():
            raise UserError(f"{out}: is to be read; give another folder to write")
    with flags(knobs):
        run(knobs, out)


def run(knobs: Knobs, out: Path) -> None:
    from llava_min.export.build import build
    from llava_min.export.hf import check_logits, write_hf
    from llava_min.util.files import check_free, new_folder
    from llava_min.weights import DTYPES

    check_free(out, knobs.overwrite)
    model = build(
        knobs.vision,
        knobs.text,
        knobs.projector,
        template=knobs.template,
        aspect=knobs.image_aspect_ratio,
        seed=knobs.seed,
    )
    dtype = model.dtype if knobs.dtype is None else DTYPES[knobs.dtype]
    config = model.model.config
    with new_folder(out, overwrite=knobs.overwrite) as aside:
        write_hf(model, aside, dtype)
        check_logits(model, aside, dtype, config.text.vocab_size)
    info(
        f"saved {out}: {config.text.model_type} with {config.tokens_per_image} tokens an image, "
        f"<image> is {config.image_token_id} of {config.text.vocab_size}, template "
        f"{model.processor.template_name}"
    )
