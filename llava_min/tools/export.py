"""`python -m llava_min export MODEL OUT --to hf|original|gguf`: write a model in another's format.

The model may be any that `load` reads, with adapters merged into it. It is read and written tensor
by tensor, and OUT gets its name only once all of it has been read back.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llava_min.errors import UserError, info
from llava_min.util.cli import PathArg, flags, parse

Format = Literal["hf", "original", "gguf"]


@dataclass
class Knobs:
    folders: list[str] = field(default_factory=list)  # the model (or a hub id, or tiny); OUT
    to: Format | None = None  # llava-hf, LLaVA's own layout, or llama.cpp's two files
    adapter: PathArg | None = None  # PEFT folders to merge, with commas between
    type: str | None = None  # of --to gguf: f32, f16, bf16, q8_0, q4_0, or q4_k_m and its like; f16
    dtype: Literal["fp32", "bf16", "fp16"] | None = None  # of the others; as stored, if not given
    image_aspect_ratio: Literal["pad", "crop"] | None = None  # to record; the model's, if not given
    template: str | None = None  # to record; the model's, if not given
    revision: str | None = None  # of a hub id
    overwrite: bool = False  # OUT may be a model's folder, which is replaced


def check(knobs: Knobs) -> tuple[str, Path]:
    if len(knobs.folders) != 2:
        raise UserError("FOLDER: give two, the model and the folder to write")
    if knobs.to is None:
        raise UserError("--to: is not given; choose hf, original or gguf")
    if knobs.type is not None and knobs.to != "gguf":
        raise UserError(f"--type: is of --to gguf, and this is --to {knobs.to}; give --dtype")
    if knobs.dtype is not None and knobs.to == "gguf":
        raise UserError("--dtype: is not of --to gguf; give --type")
    source, out = knobs.folders[0], Path(knobs.folders[1])
    if Path(source).exists() and out.resolve() == Path(source).resolve():
        raise UserError(f"{out}: is the model itself; give another folder to write")
    return source, out


def main(argv: list[str]) -> None:
    knobs = parse(Knobs, argv, "Write a model in another format.", positional="folders")
    with flags(knobs):
        run(knobs, *check(knobs))


def run(knobs: Knobs, source: str, out: Path) -> None:
    from llava_min.export.tensors import open_model
    from llava_min.util.files import check_free, new_folder
    from llava_min.weights import DTYPES

    check_free(out, knobs.overwrite)
    model = open_model(
        source,
        knobs.adapter.split(",") if knobs.adapter else [],
        image_aspect_ratio=knobs.image_aspect_ratio,
        template=knobs.template,
        revision=knobs.revision,
    )
    dtype = model.dtype if knobs.dtype is None else DTYPES[knobs.dtype]
    with new_folder(out, overwrite=knobs.overwrite) as aside:
        if knobs.to == "gguf":
            from llava_min.export.gguf import write_gguf

            told = write_gguf(model, aside, knobs.type or "f16")
        else:
            told = write_folder(model, aside, knobs.to, dtype)
    info(f"saved {out}: {told}")


def write_folder(model, folder: Path, to: str, dtype) -> str:
    """One of the two layouts of safetensors, proved by its tensors and, if small, its logits."""
    from llava_min.export.hf import check_logits, write_hf
    from llava_min.export.original import write_original

    if to == "hf":
        write_hf(model, folder, dtype)
        rows = model.model.config.text.vocab_size
    else:
        write_original(model, folder, dtype)
        rows = model.model.config.image_token_id
    worst = check_logits(model, folder, dtype, rows)
    proved = "every tensor read back"
    if worst is not None:
        proved += f", logits within {worst:.2g} of the source's"
    return f"{to} layout, {proved}"
