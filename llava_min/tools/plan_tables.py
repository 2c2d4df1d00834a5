"""What `plan` prints: parameters, the tables, what fits, and where well-known figures come from."""

import multiprocessing
import os
import textwrap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from llava_min.config import LlavaConfig
from llava_min.errors import UserError, info
from llava_min.load import on_meta
from llava_min.quant.methods import CALIBRATED, METHODS
from llava_min.tools import plan_fit
from llava_min.training.fake_step import Step, planned_model, step_of, stored_dtypes
from llava_min.training.memory import Memory, gib, step_memory, table
from llava_min.util.cli import break_command
from llava_min.util.sizes import SIZES

WIDTH = 80  # columns
NAME = 28  # of them for the name of a row
RANKS = (1, 2, 4, 8)
VICUNA_TABLES = 32 * 2 * 4096 * 128  # numbers in the rotary tables that transformers once kept


def step(config: Any) -> Step:
    """Of plan's settings, whose rank is LLaVA's unless it was given."""
    found = step_of(config, min(config.images, 1_000))
    return replace(found, train=config.train or "lora", lora_r=config.lora_r or 128)


def wrapped(text: str, indent: str = "") -> list[str]:
    more = indent + "  "
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=more, break_on_hyphens=False
    )


def announced(what: str, rows: Sequence[tuple]) -> Iterator[tuple]:
    """The rows, which begin with a name, a line on stderr before each: one takes seconds."""
    for i, row in enumerate(rows, 1):
        info(f"{what}, {i} of {len(rows)}: {row[0]}")
        yield row


def parameters(shapes: LlavaConfig, name: str) -> Iterator[str]:
    model = on_meta(shapes)
    count = lambda module: sum(p.numel() for p in module.parameters())
    total = count(model)
    yield f"{name}: {total:,} parameters"
    for part, module in model.named_children():
        n = count(module)
        yield f"  {part:24}{n:>16,}{gib(2 * n):>9} GiB in 16 bit"


# ---- training


def ways(shapes: LlavaConfig, plain: Step) -> list[tuple[str, Step]]:
    """(name, step) of each row of the table; a quantized checkpoint trains adapters alone."""
    half, full = torch.bfloat16, torch.float32
    as_ = lambda train, dtype, method=None: replace(
        plain, train=train, precision=dtype, quantize=method
    )
    if shapes.quantization:
        return [(f"QLoRA, {shapes.quantization.method}, bf16", as_("lora", half))]
    rows = [
        (f"{train}, {name}", as_(train, dtype))
        for train in ("full", "freeze_vision", "lora")
        for name, dtype in (("fp32", full), ("bf16 or fp16", half))
    ]
    return rows + [(f"QLoRA, {m}, bf16", as_("lora", half, m)) for m in ("nf4", "int4")]


def cells(job: tuple[LlavaConfig, Step]) -> list[int] | None:
    """One row of the table; None where a method does not take the widths of the layers."""
    try:
        return [step_memory(*job, ranks=n).total for n in RANKS]
    except UserError:
        return None


def training(config: Any, shapes: LlavaConfig) -> Iterator[str]:
    rows = ways(shapes, step(config))
    with multiprocessing.get_context("fork").Pool(min(4, len(os.sched_getaffinity(0)))) as pool:
        counted = pool.imap(cells, [(shapes, way) for _, way in rows])
        found = list(zip(announced("training", rows), counted, strict=True))
    yield from heading("Training", step(config), f", LoRA of rank {step(config).lora_r}")
    for (name, _), totals in found:
        values = map(gib, totals) if totals else ["-"] * len(RANKS)
        yield f"  {name:{NAME}}" + "".join(value.rjust(9) for value in values)
    yield "  tensors alone; CUDA, NCCL and fragments take 1 to 2 GiB of a card beside them"


def heading(what: str, way: Step, more: str = "") -> Iterator[str]:
    yield f"{what}, GiB on each GPU:"
    checkpointing = "with" if way.gradient_checkpointing else "without"
    yield (
        f"  batch size {way.batch_size}, rows of {way.max_length} tokens, "
        f"{checkpointing} checkpointing{more}"
    )
    yield f"  {'':{NAME}}" + "".join(gpus(n).rjust(9) for n in RANKS)


def gpus(n: int) -> str:
    return f"{n} GPU{'s' * (n > 1)}"


def by_part(shapes: LlavaConfig, way: Step) -> Iterator[str]:
    cards = announced("training", [(gpus(n), n) for n in RANKS])
    memories = [step_memory(shapes, way, ranks=n) for _, n in cards]
    stored = f", {way.quantize}" if way.quantize else ""
    yield from heading(f"Training ({way.train}{stored})", way)
    for part in vars(memories[0]):
        yield f"  {part:{NAME}}" + "".join(gib(getattr(m, part)).rjust(9) for m in memories)
    yield f"  {'in all':{NAME}}" + "".join(gib(m.total).rjust(9) for m in memories)


# ---- answering


def answering(config: Any, shapes: LlavaConfig) -> Iterator[str]:
    half, length = torch.bfloat16, config.max_length
    cache = plan_fit.cache_bytes(shapes, half, config.batch_size, length)
    yield from wrapped(
        f"Answering, GiB: batch size {config.batch_size}, {length} tokens each, "
        f"KV cache {gib(cache)} in 16 bit"
    )
    yield f"  {'':{NAME}}{'weights':>9}{'in all':>9}"
    rows: list[tuple[str, torch.dtype, str | None]] = [
        ("fp32", torch.float32, None),
        ("bf16 or fp16", half, None),
        *((m, half, m) for m in METHODS if m not in CALIBRATED),
    ]
    if shapes.quantization:
        rows = [(shapes.quantization.method, half, None)]
    for name, dtype, method in announced("answering", rows):
        try:
            model = planned_model(shapes, method)
            prefill = plan_fit.prefill_bytes(shapes, dtype, config.batch_size, length, method)
        except UserError:  # the widths are not whole groups
            yield f"  {name:{NAME}}{'-':>9}{'-':>9}"
            continue
        size = sum(p.numel() * d.itemsize for p, d in stored_dtypes(model, dtype).items())
        whole = size + cache * dtype.itemsize // half.itemsize + prefill
        yield f"  {name:{NAME}}{gib(size):>9}{gib(whole):>9}"


# ---- what fits


def best(
    config: Any, shapes: LlavaConfig, cards: plan_fit.Cards, typed: Collection[str]
) -> Iterator[str]:
    plain = step(config)
    alone = plan_fit.Way(plain.train, plain.lora_r, plain.quantize)
    tried = [alone] if config.train else plan_fit.ways(shapes, config.lora_r)
    fit = plan_fit.best_fit(shapes, plain, cards, config.rows, tried)
    plan_fit.check_fit(fit, config)
    memory: Memory = step_memory(shapes, fit.step, ranks=cards.count)
    beside = plan_fit.reserve(cards.count, cards.memory)
    stored = f" with the decoder in {fit.step.quantize} (QLoRA)" if fit.step.quantize else ""
    what = "it takes" if config.train else f"the most that fits is {fit.step.train}{stored}"
    yield f"On {cards.count} x {cards.memory:g} GiB {what}:"
    yield from table(memory, **{"CUDA, NCCL, fragments": beside})
    yield ""
    start, *flags = plan_fit.train_line(fit, cards, config, typed)
    yield from break_command(start, flags, WIDTH)
    yield ""
    yield from times(config, shapes, fit, cards)


def times(
    config: Any, shapes: LlavaConfig, fit: plan_fit.Fit, cards: plan_fit.Cards
) -> Iterator[str]:
    work = plan_fit.step_flops(shapes, fit.step, fit.rows)
    yield f"An optimizer step of {fit.rows} full rows is {work / 1e15:.1f} PFLOP."
    if not cards.tflops:
        return
    seconds = work / (plan_fit.UTILISATION * cards.tflops * 1e12 * cards.count)
    hours = seconds * config.records / fit.rows / 3600
    epoch = f", {config.records:,} records {hours:.1f} h" if config.records else ""
    yield from wrapped(
        f"At {plan_fit.UTILISATION:.0%} of {cards.count} x {cards.tflops} TFLOP/s it takes "
        f"{seconds:.1f} s{epoch}; shorter rows take less."
    )


# ---- figures that are quoted


def notes() -> Iterator[str]:
    """Where figures that go around come from, beside ours."""
    model = on_meta(SIZES["7b"])
    n = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.language_model.layers[0].parameters())
    head = 32000 * 4096  # of Vicuna's 32,000 words
    base = sum(p.numel() for p in model.language_model.layers.parameters()) + head + 4096
    stored = base + VICUNA_TABLES
    yield "Figures that go around, and what is in them:"
    largest = (block + VICUNA_TABLES // 32) * 4 / 2**20
    yield from wrapped(
        f"{gib(16 * n)} GiB: {n:,} parameters x 16 bytes: weight, gradient and Adam's two moments "
        "in fp32, for every parameter, without activations. Half of it for 16 bit "
        f"({gib(8 * n)}) would have Adam's moments in 16 bit, too, which is not done here.",
        "  ",
    )
    yield from wrapped(
        f"{gib(4 * stored)} / {gib(2 * stored)} / {gib(stored)} / {gib(stored / 2)} GiB "
        f"(accelerate estimate-memory, Vicuna-7B, fp32 / fp16 / int8 / int4): {base:,} parameters "
        f"without the head, which AutoModel does not make, and {VICUNA_TABLES:,} numbers of rotary "
        f"tables in the blocks; int4 without scales. Its largest layer, {largest:.2f} MiB in fp32: "
        f"a block and its table. Its training with Adam, {gib(16 * stored)} GiB: four times the "
        "weights.",
        "  ",
    )
