"""What `--dry-run` prints: what is trained, the steps, and the memory of each rank; nothing is
loaded.
"""

from pathlib import Path
from typing import Any

from torch import nn

from llava_min.config import LlavaConfig
from llava_min.data.records import read_records
from llava_min.data.sampler import plan
from llava_min.errors import UserError, escape_controls, info
from llava_min.llava import LOGIT_ROWS
from llava_min.load import TINY, on_meta, read_config
from llava_min.parallel.ranks import World
from llava_min.training.batch_size import row_length
from llava_min.training.trainable import parameter_table, setup_lora
from llava_min.util.sizes import SIZES
from llava_min.weights import DTYPES


def dry_run(config: Any, world: World, typed: bool) -> None:
    """Print the plan of train.py's `config` on rank 0; no weights are read, no image is drawn.

    typed: the data is the user's and not a recipe's, so it has to be there.
    """
    model = on_meta(named_config(config.model))
    setup_lora(model, config, world.device)
    config.max_length = row_length(config.max_length, model.config.text.context)
    lengths = record_lengths(config, typed)
    if world.rank == 0:
        print(parameter_table(model))
        show_plan(model, lengths, config, world.size)


def named_config(name: str) -> LlavaConfig:
    """The shapes of a model without its weights.

    name: a size, a folder with a config.json, or an absent folder or hub id whose name contains a
    size. Raises UserError when it contains none.
    """
    shapes = lambda size: SIZES[size] if size in SIZES else read_config(TINY)[0]
    sizes = ["tiny", *sorted(SIZES, key=len, reverse=True)]
    if Path(name).is_dir():
        return read_config(Path(name))[0]
    if name in sizes:
        return shapes(name)
    size = next((s for s in sizes if s in name.lower()), None)
    if size is None:
        raise UserError(
            f"{escape_controls(name)}: no such folder, and its name tells no size; give a folder "
            "with "
            f"a config.json, or one of {', '.join(SIZES)}",
            "model",
        )
    info(f"{name}: not here; planned by the shapes of size {size}, which its name contains")
    return shapes(size)


def record_lengths(config: Any, typed: bool) -> list[int]:
    """Estimated lengths of the records, negative for text alone; empty when a recipe's data is
    absent.
    """
    data = config.data or ""
    if data.startswith("toy:"):
        return [1] * config.toy_train
    try:
        records = read_records(data, config.image_folder) if data else []
        if data and config.eval_data:
            read_records(config.eval_data, config.image_folder)
    except UserError as e:
        if typed:
            raise
        info(f"no records to count the steps by: {e}")
        return []
    return [r.length if r.images else -r.length for r in records]


def show_plan(model: nn.Module, lengths: list[int], config: Any, ranks: int) -> None:
    """Print the steps over records of these lengths, and the memory of each rank by part.

    `model` is on the meta device; `lengths` as `sampler.plan` takes them.
    """
    batch, accum = config.batch_size, config.grad_accum
    rows = batch * accum * ranks
    lines = [f"a step is {rows} rows: batch size {batch} x accumulation {accum} x ranks {ranks}"]
    if lengths:
        order = (ranks, config.epochs, config.max_steps, config.seed)
        steps = len(plan(lengths, batch, accum, *order, group_by_length=config.group_by_length))
        at_most = "at most " if config.packing else ""
        images = sum(n > 0 for n in lengths)
        lines.append(
            f"{len(lengths)} records, {at_most}{steps} steps; {images:,} of the records have an "
            "image"
        )
    parts = memory(model, config, ranks)
    parts["memory of a rank"] = sum(parts.values())
    lines += [f"{name:<30}{size / 1e9:>13.2f} GB" for name, size in parts.items()]
    lines.append(
        "weights, gradients and AdamW's moments are counted; activations are estimated, for rows "
        "of "
        f"{config.max_length} tokens"
    )
    if ranks > 1:
        lines.append(
            "each rank also holds the block it runs whole, and a frozen tower whole: "
            "some more than that"
        )
    print("\n".join(lines))


def memory(model: nn.Module, config: Any, ranks: int) -> dict[str, float]:
    """Bytes of each rank by part: what is trained is fp32, the rest in the precision asked for."""
    text, item = model.config.text, DTYPES[config.precision].itemsize
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    # per token and block, the backward reads about 8 vectors of the width and 4 of the MLP's
    tokens = config.batch_size * config.max_length
    values = tokens * (8 * text.hidden_size + 4 * text.intermediate_size)
    if config.gradient_checkpointing:  # one block's, and the inputs of all
        values += tokens * text.hidden_size * text.num_hidden_layers
    else:
        values *= text.num_hidden_layers
    return {
        "weights": (4 * trained + item * frozen) / ranks,
        "gradients": 4 * trained / ranks,
        "optimizer": 8 * trained / ranks,
        "activations": item * values + 8 * LOGIT_ROWS * text.vocab_size,
    }
