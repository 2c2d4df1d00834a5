"""What is put on the model from outside while it trains, how large a step may be, and what `--dry-run` says of it.

No model file hears of any of it.
"""

import gc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llava_min.cli import UserError, note, printable
from llava_min.config import IGNORE, SIZES, LlavaConfig
from llava_min.data.records import read_records
from llava_min.data.sampler import plan
from llava_min.dist import World
from llava_min.llava import LOGIT_ROWS
from llava_min.load import TINY, on_meta, read_config
from llava_min.trainable import choose, table
from llava_min.weights import DTYPES


def neftune(model: nn.Module, alpha: float) -> None:
    """Noise on the embedded words in training: uniform, ±alpha / sqrt(L d) with L the padded length (Jain et al. 2023,
    https://arxiv.org/abs/2310.05914). Picture features are put over the embeddings afterwards, so they get none."""

    def add(module: nn.Module, inputs: tuple, x: Tensor) -> Tensor | None:
        if module.training:
            bound = alpha / (x.shape[1] * x.shape[2]) ** 0.5
            return x + torch.empty_like(x).uniform_(-bound, bound)

    model.language_model.embed_tokens.register_forward_hook(add)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The decoder's blocks, and the tower's when it is trained."""
    yield from model.language_model.layers
    if any(p.requires_grad for p in model.vision_tower.parameters()):
        yield from model.vision_tower.layers


def compile_blocks(model: nn.Module) -> None:
    """Compile each block; equal blocks share one program, so this takes as long as compiling one."""
    for block in (*model.language_model.layers, *model.vision_tower.layers):
        block.forward = torch.compile(block.forward, dynamic=True)


def recompute_blocks(model: nn.Module, dropout: bool) -> None:
    """Keep only what goes into a block, and compute it again in the backward pass (Chen et al. 2016)."""
    for block in blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=dropout)


def row_length(asked: int | None, context: int) -> int:
    """The most tokens of a row: what was asked for, else 2048 as in LLaVA, within the model's context."""
    if asked and asked > context:
        raise UserError(f"max_length: {asked} tokens were asked for, and the model's context is {context}; lower it")
    return asked or min(2048, context)


def supervised_in(batch: dict[str, Tensor]) -> int:
    """The number of tokens that a batch has a loss for."""
    return int((batch["labels"][:, 1:] != IGNORE).sum())


def largest_batch(rows: int, fits: Callable[[int], bool]) -> int:
    """The largest divisor of `rows` for which `fits`: the step keeps its rows, in more micro-batches.

    fits(n) runs forward and backward on n rows. Raises UserError when not even one row fits.
    """
    for n in (n for n in range(rows, 0, -1) if rows % n == 0):
        if fits(n):
            return n
    raise UserError("--auto-batch-size: not even one row fits into the memory; give --gradient-checkpointing, a smaller "
                    "--max-length, --train lora, or --cpu-offload")


def no_memory(step: int, batch_size: int, rows: int) -> UserError:
    """The line for an optimizer step of `rows` rows a rank that ran out of memory."""
    half = batch_size // 2
    same = f"--auto-batch-size, or --batch-size {half} --grad-accum {rows // half} (the same steps), " if half else ""
    return UserError(f"step {step}: out of memory with --batch-size {batch_size}; give {same}--gradient-checkpointing, a smaller "
                     "--max-length, or --cpu-offload")


def try_step(work: Callable[[], Tensor], model: nn.Module) -> bool:
    """Whether forward and backward of `work`'s loss fit into memory, with what Adam keeps beside them."""
    adam: list[Tensor] = []
    try:
        adam += [torch.empty_like(p) for p in model.parameters() if p.requires_grad for _ in (1, 2)]
        work().backward()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        adam.clear()
        model.zero_grad(set_to_none=True)
        gc.collect()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


def named_config(name: str) -> LlavaConfig:
    """The shapes of a model without its weights: a size by name, a folder that has its config, or the size that the name
    of an absent folder or hub id tells. Raises UserError when it tells none."""
    shapes = lambda size: SIZES[size] if size in SIZES else read_config(TINY)[0]
    sizes = ["tiny", *sorted(SIZES, key=len, reverse=True)]
    if Path(name).is_dir():
        return read_config(Path(name))[0]
    if name in sizes:
        return shapes(name)
    size = next((s for s in sizes if s in name.lower()), None)
    if size is None:
        raise UserError(f"--model {printable(name)}: no such folder, and its name tells no size; give a folder with a "
                        f"config.json, or one of {', '.join(SIZES)}")
    note(f"{name}: not here; planned by the shapes of size {size}, which its name tells")
    return shapes(size)


def dry_run(knobs: Any, world: World, typed: bool) -> None:
    """What `--dry-run` says: what learns, the steps, and the memory of each rank. No weights are read, no picture is drawn.

    typed: the data is the user's and not a recipe's, so it has to be there.
    """
    model = on_meta(named_config(knobs.model))
    choose(model, knobs, world.device)
    knobs.max_length = row_length(knobs.max_length, model.config.text.context)
    lengths = []
    try:
        if (knobs.data or "").startswith("toy:"):
            lengths = [1] * knobs.toy_train
        elif knobs.data:
            lengths = [r.length if r.images else -r.length for r in read_records(knobs.data, knobs.image_folder)]
            if knobs.eval_data:
                read_records(knobs.eval_data, knobs.image_folder)
    except UserError as e:
        if typed:
            raise
        note(f"no records to count the steps by: {e}")
    if world.rank == 0:
        print(table(model))
        show_plan(model, lengths, knobs, world.size)


def show_plan(model: nn.Module, lengths: list[int], knobs: Any, ranks: int) -> None:
    """The steps over records of these `lengths` (`sampler.plan`), and the memory of each rank by part. `model` is on meta."""
    rows = knobs.batch_size * knobs.grad_accum * ranks
    said = [f"a step is {rows} rows: batch size {knobs.batch_size} x accumulation {knobs.grad_accum} x ranks {ranks}"]
    if lengths:
        steps = len(plan(lengths, knobs.batch_size, knobs.grad_accum, ranks, knobs.epochs, knobs.max_steps, knobs.seed,
                         group_by_length=knobs.group_by_length))
        said.append(f"{len(lengths)} records, {'at most ' if knobs.packing else ''}{steps} steps; "
                    f"{sum(n > 0 for n in lengths):,} of the records have a picture")
    text, item = model.config.text, DTYPES[knobs.precision].itemsize
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    # per token and block the backward reads about 8 vectors of the width and 4 of the MLP's
    values = knobs.batch_size * knobs.max_length * (8 * text.hidden_size + 4 * text.intermediate_size)
    if knobs.gradient_checkpointing:
        values += knobs.batch_size * knobs.max_length * text.hidden_size * text.num_hidden_layers
    else:
        values *= text.num_hidden_layers
    parts = {"weights": (4 * trained + item * frozen) / ranks, "gradients": 4 * trained / ranks,
             "optimizer": 8 * trained / ranks, "activations": item * values + 8 * LOGIT_ROWS * text.vocab_size}
    parts["memory of a rank"] = sum(parts.values())
    said += [f"{name:<30}{size / 1e9:>13.2f} GB" for name, size in parts.items()]
    said.append("weights, gradients and AdamW's moments are counted; activations are estimated, for rows of "
                f"{knobs.max_length} tokens")
    if ranks > 1:
        said.append("a block is gathered whole when it runs, and a frozen tower is whole on every rank: some more than that")
    print("\n".join(said))
