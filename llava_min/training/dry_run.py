"""What `--dry-run` prints: what is trained, the steps, and the memory of each rank; nothing is
loaded.
"""

from collections.abc import Iterator
from typing import Any

from llava_min.config import LlavaConfig
from llava_min.data.records import read_records
from llava_min.data.sampler import plan
from llava_min.errors import UserError, info
from llava_min.parallel.ranks import World
from llava_min.training.batch_size import row_length
from llava_min.training.fake_step import planned_model, step_of
from llava_min.training.memory import step_memory, table
from llava_min.training.small_files import named_config
from llava_min.training.trainable import parameter_table, setup_lora


def dry_run(config: Any, world: World, typed: bool) -> None:
    """Print the plan of train.py's `config` on rank 0; no weights are read, no image is drawn.

    typed: the data is the user's and not a recipe's, so it has to be there.
    """
    shapes = named_config(config.model)
    model = planned_model(shapes, config.quantize)
    setup_lora(model, config, world.device)
    config.max_length = row_length(config.max_length, shapes.text.context)
    records = planned_records(config, typed)
    if world.rank == 0:
        print(parameter_table(model))
        lines = [*steps(records, config, world.size)]
        lines += memory(shapes, records, config, world.size)
        print("\n".join(lines))


def planned_records(config: Any, typed: bool) -> list[tuple[int, int]]:
    """(estimated tokens, images) of each record; empty when a recipe's data is absent."""
    data = config.data or ""
    if data.startswith("toy:"):
        return [(1, 1)] * config.toy_train
    try:
        records = read_records(data, config.image_folder) if data else []
        if data and config.eval_data:
            read_records(config.eval_data, config.image_folder)
    except UserError as e:
        if typed:
            raise
        info(f"no records to count the steps by: {e}")
        return []
    return [(r.length, len(r.images)) for r in records]


def steps(records: list[tuple[int, int]], config: Any, ranks: int) -> Iterator[str]:
    """How many rows make a step, and how many steps these records make."""
    batch, accum = config.batch_size, config.grad_accum
    rows = batch * accum * ranks
    yield f"a step is {rows} rows: batch size {batch} x accumulation {accum} x ranks {ranks}"
    if records:
        lengths = [length if images else -length for length, images in records]
        order = (ranks, config.epochs, config.max_steps, config.seed)
        steps = len(plan(lengths, batch, accum, *order, group_by_length=config.group_by_length))
        at_most = "at most " if config.packing else ""
        images = sum(n > 0 for n in lengths)
        yield (
            f"{len(lengths)} records, {at_most}{steps} steps; {images:,} of the records have an "
            "image"
        )


def memory(
    shapes: LlavaConfig, records: list[tuple[int, int]], config: Any, ranks: int
) -> Iterator[str]:
    """The memory of each rank by part, of full rows with as many images as a record has at most."""
    most = max((images for _, images in records), default=1)
    device = "cpu" if config.device == "cpu" else "cuda"
    found = step_memory(shapes, step_of(config, most), ranks=ranks, device=device)
    yield f"memory of a rank, counted for full rows of {config.max_length} tokens:"
    yield from table(found)
    if device == "cuda":
        yield "CUDA, NCCL and fragments take 1 to 2 GiB of a card beside it"
    if config.optimizer != "adamw":
        yield "the optimizer is counted as AdamW; another may hold more or less"
    if config.cpu_offload:
        yield "of it, weights, gradients and optimizer are in the CPU's memory"
