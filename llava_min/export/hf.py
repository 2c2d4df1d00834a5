"""A llava-hf folder, streamed: what transformers, vLLM and everybody else reads.

`AutoProcessor` and `LlavaForConditionalGeneration` work on the folder alone. The names are the
oldest of that layout's, which every reader accepts.
"""

from pathlib import Path

import torch

from llava_min.checks.weights import check_entries
from llava_min.data.processor import Processor
from llava_min.errors import UserError, label
from llava_min.export.jinja import JINJA
from llava_min.export.stream import check_sums, write_shards
from llava_min.export.tensors import Merge, Tensors
from llava_min.load import (
    load_model,
    on_meta,
    open_checkpoint,
    read_config,
    write_settings,
)
from llava_min.names import to_layout
from llava_min.tensors import read_entries
from llava_min.weights import SMALL

# of the logits' largest value, by which the written model may differ from its source: the weights
# are rounded to the dtype on disk, and an adapter is merged in another order than it is applied
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def write_hf(model: Tensors, folder: Path, dtype: torch.dtype) -> None:
    """Write `model` to `folder` and read it back: every tensor, the config and the tokenizer.

    Raises UserError where what is read back is not what was meant.
    """
    rows = [(name, to_layout(name, "hf"), model.shape(name)) for name in model.names]
    sums = write_shards(folder, rows, model.read, dtype)
    if isinstance(model.read, Merge):
        model.read.check_changed()
    write_settings(model.model.config, model.processor, folder, dtype)
    jinja = JINJA[model.processor.template_name]
    (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    config, _ = read_config(folder)
    entries = read_entries(folder)
    check_entries(entries, on_meta(config))
    check_sums(entries, sums, dtype)
    check_processor(model.processor, open_checkpoint(str(folder)).processor, folder)


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


def probe(model: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (1, T) with one image, and its pixels (1, 3, S, S), for logits to compare."""
    config = model.model.config
    g = torch.Generator().manual_seed(0)
    side = config.vision.image_size
    text = torch.randint(0, config.image_token_id, (1, 12), generator=g)
    ids = torch.cat([text, torch.full((1, config.tokens_per_image), config.image_token_id)], 1)
    ids = torch.cat([ids, text.flip(1)], 1)
    return ids, torch.randn(1, 3, side, side, generator=g)


@torch.no_grad()
def check_logits(model: Tensors, folder: Path, dtype: torch.dtype, rows: int) -> float | None:
    """The folder's logits of the first `rows` tokens against the source's: the largest difference.

    None for a model too large to be held: its tensors have been compared, which says as much.
    Raises UserError for a difference beyond TOLERANCE.
    """
    if sum(p.numel() for p in model.model.parameters()) > SMALL:
        return None
    ids, pixels = probe(model)
    source = on_meta(model.model.config)
    for name in model.names:
        path, _, leaf = name.rpartition(".")
        p = torch.nn.Parameter(model.read(name, torch.float32), requires_grad=False)
        setattr(source.get_submodule(path), leaf, p)
    source.tie_weights()
    right = source(ids, pixels)[..., :rows]
    del source
    found = load_model(folder, torch.float32, torch.device("cpu"))(ids, pixels)[..., :rows]
    worst = float((found - right).abs().max())
    if not worst <= TOLERANCE[dtype] * float(right.abs().max()):
        raise UserError(
            f"{folder}: its logits differ from the source's by {worst:.3g}, of "
            f"{float(right.abs().max()):.3g} at most; export it with {label('dtype')} fp32"
        )
    return worst


def export(model: Tensors, folder: Path, dtype: torch.dtype, type: str | None) -> str:
    write_hf(model, folder, dtype)
    return f"hf layout, {proved(model, folder, dtype, model.model.config.text.vocab_size)}"


def proved(model: Tensors, folder: Path, dtype: torch.dtype, rows: int) -> str:
    """What shows that the folder is the model: its tensors and, if it is small, its logits."""
    worst = check_logits(model, folder, dtype, rows)
    logits = "" if worst is None else f", logits within {worst:.2g} of the source's"
    return f"every tensor read back{logits}"
