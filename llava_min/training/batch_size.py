"""How much a step holds: tokens in a row, supervised tokens in a batch, and the rows that fit in
memory.
"""

import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llava_min.config import IGNORE
from llava_min.data.dataset import Dataset
from llava_min.data.loader import loader
from llava_min.data.sampler import plan
from llava_min.errors import UserError, label
from llava_min.parallel.ranks import World, any_rank
from llava_min.training.loss import summed_loss

DEFAULT_MAX_LENGTH = 2048  # LLaVA's model_max_length


def row_length(asked: int | None, context: int) -> int:
    """The maximum tokens of a row: what was asked for, or LLaVA's default within the context."""
    if asked and asked > context:
        raise UserError(
            f"{asked} tokens were asked for, and the model's context is {context}; lower it",
            "max_length",
        )
    return asked or min(DEFAULT_MAX_LENGTH, context)


def make_plan(config: Any, lengths: list[int], ranks: int) -> list:
    """The records of every step, by rank and micro-batch, as train.py's `config` says."""
    return plan(
        lengths,
        config.batch_size,
        config.grad_accum,
        ranks,
        config.epochs,
        config.max_steps,
        config.seed,
        group_by_length=config.group_by_length,
        packing=config.max_length if config.packing else 0,
    )


def count_supervised(batch: dict[str, Tensor]) -> int:
    """The number of tokens that a batch has a loss for."""
    return int((batch["labels"][:, 1:] != IGNORE).sum())


def largest_batch(rows: int, fits: Callable[[int], bool]) -> int:
    """The largest divisor of `rows` for which `fits`: the step keeps its rows, in more
    micro-batches.

    fits(n) runs forward and backward on n rows. Raises UserError when not even one row fits.
    """
    for n in range(rows, 0, -1):
        if rows % n == 0 and fits(n):
            return n
    raise UserError(f"not even one row fits into memory; give {savings()}", "auto_batch_size")


def savings() -> str:
    """What takes less memory, in the words of whoever runs this."""
    return (
        f"{label('gradient_checkpointing')}, a smaller {label('max_length')}, "
        f"{label('train')} lora, or {label('cpu_offload')}"
    )


def out_of_memory(step: int, batch_size: int, rows: int) -> UserError:
    """The error of an optimizer step of `rows` rows a rank that ran out of memory."""
    half, same = batch_size // 2, ""
    if half:
        smaller = f"{label('batch_size')} {half} {label('grad_accum')} {rows // half}"
        same = f"{label('auto_batch_size')}, or {smaller} (the same steps), "
    return UserError(
        f"step {step}: out of memory with {label('batch_size')} {batch_size}; give "
        f"{same}{savings()}"
    )


def find_batch_size(
    config: Any,
    world: World,
    dataset: Dataset,
    lengths: Sequence[int],
    model: nn.Module,
    dtype: torch.dtype,
) -> int:
    """`largest_batch` by trying the longest records, for which every rank must have the memory."""
    longest = sorted(range(len(lengths)), key=lambda i: -abs(lengths[i]))

    def loss_of_longest(n: int) -> Tensor:
        batch, _ = next(loader(dataset, [[(i,) for i in longest[:n]]]))
        return summed_loss(model, dtype, world.device, batch)

    def fits(n: int) -> bool:
        too_large = not try_step(partial(loss_of_longest, n), model)
        return not any_rank(world, too_large)

    return largest_batch(config.batch_size * config.grad_accum, fits)


def try_step(loss: Callable[[], Tensor], model: nn.Module) -> bool:
    """Whether forward and backward of `loss` fit into memory, beside the moments Adam keeps."""
    moments: list[Tensor] = []
    try:
        moments += [
            torch.empty_like(p) for p in model.parameters() if p.requires_grad for _ in (1, 2)
        ]
        loss().backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        moments.clear()
        model.zero_grad(set_to_none=True)
        gc.collect()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
