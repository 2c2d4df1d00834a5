"""A llava-hf folder, streamed: what transformers, vLLM and everybody else reads.

`AutoProcessor` and `LlavaForConditionalGeneration` work on the folder alone. The names are the
oldest of that layout's, which every reader accepts.
"""

from pathlib import Path

import torch

from llava_min.data.processor import Processor
from llava_min.errors import UserError
from llava_min.export.jinja import JINJA
from llava_min.export.proof import prove, running
from llava_min.export.stream import Row, Sums, write_shards
from llava_min.export.tensors import Merge, Tensors
from llava_min.load import open_checkpoint, write_settings
from llava_min.names import to_layout


def write_hf(model: Tensors, folder: Path, dtype: torch.dtype) -> float:
    """Write `model` to `folder` and read it back: tensors, config, tokenizer, logits; returns the
    largest difference of the last.

    Raises UserError where what is read back is not what was meant.
    """
    rows = [Row(name, to_layout(name, "hf"), model.shape(name), dtype) for name in model.names]
    sums: Sums = {}
    vocabulary = model.model.config.text.vocab_size
    with running(model, dtype, vocabulary) as expected:
        write_shards(folder, rows, model.read, sums)
    if isinstance(model.read, Merge):
        model.read.check_changed()
    write_settings(model.model.config, model.processor, folder, dtype)
    jinja = JINJA[model.processor.template_name]
    (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    check_processor(model.processor, open_checkpoint(str(folder)).processor, folder)
    return prove(model, folder, dtype, vocabulary, sums, expected.result())


PROBES = (
    "USER: What is in the image?\nASSISTANT: Two cats, 1234.5 % of them asleep.",
    "  double  spaces, Ünïcode 猫🙂\t(a_b)",
)


def check_processor(meant: Processor, found: Processor, folder: Path) -> None:
    """The processor read back cuts texts as the one that was written does, or UserError."""
    same = all(
        meant.tokenizer.encode(text, at=at) == found.tokenizer.encode(text, at=at)
        for text in PROBES
        for at in ("start", "special")
    )
    if not same or meant.template_name != found.template_name:
        raise UserError(
            f"{folder}: the tokenizer reads back otherwise than the source's; export it from a "
            "folder with the tokenizer files that the model was published with"
        )


def export(model: Tensors, folder: Path, dtype: torch.dtype, type: str | None) -> str:
    worst = write_hf(model, folder, dtype)
    return f"hf layout, every tensor read back, logits within {worst:.2g} of the source's"
