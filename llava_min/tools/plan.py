"""`python -m llava_min plan`: the memory and time of training and answering, before the download.

From the shapes in a config and the settings alone; no weight is read. What a training step needs is
counted by running it on tensors without values (training/memory.py), so a plan takes some seconds.
"""

import multiprocessing
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from llava_min.checks.ranges import NonNegativeInt, PositiveInt
from llava_min.config import LINEARS
from llava_min.errors import UserError, escape_controls, label
from llava_min.util.cli import PathArg, flags, parse, read_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
RANKS = (1, 2, 4, 8)
VICUNA_TABLES = 32 * 2 * 4096 * 128  # numbers in the rotary tables that transformers once kept


@dataclass
class Config:
    model: PathArg = "7b"  # a size (300m, 1b, 7b, 13b, mistral-7b, qwen1.5-4b), a folder, a hub id
    recipe: PathArg | None = None  # of train.py: only that, by part; its model unless it is given
    gpus: str | None = None  # 2x24 (GiB), 8xA100-80: the best that fits, and its train.py line
    train: Literal["lora", "full", "freeze_vision", "projector"] = "lora"  # of --recipe alone
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"  # of the computation
    batch_size: PositiveInt = 1  # rows of a micro-batch on each GPU
    grad_accum: PositiveInt = 1  # micro-batches in an optimizer step
    max_length: PositiveInt = 2048  # tokens in a row, images included; all rows are full
    images: NonNegativeInt = 1  # in a row
    lora_r: PositiveInt = 128  # rank
    lora_targets: tuple[str, ...] = LINEARS  # leaf names in the language model
    dora: bool = False  # weight-decomposed LoRA
    gradient_checkpointing: bool = True  # compute blocks twice and keep little of them
    rows: PositiveInt = 128  # of an optimizer step on all GPUs, which --gpus keeps to
    records: NonNegativeInt = 0  # of the data, to tell how long an epoch takes


def main(argv: list[str]) -> None:
    config = parse(Config, argv, "Memory and time, before anything is downloaded.")
    with flags(config):
        lines = plan(config, argv)
        print("\n".join(map(escape_controls, lines)))


def plan(config: Config, argv: list[str]) -> list[str]:
    from llava_min.tools.plan_fit import read_cards
    from llava_min.tools.small_files import config_of
    from llava_min.util.sizes import SIZES

    cards = read_cards(config.gpus) if config.gpus else None
    recipe = from_recipe(config, argv) if config.recipe else False
    model = size_of(config.model) if recipe else config.model
    shapes = config_of(model)
    step = step_of(config)
    if config.max_length > shapes.text.context:
        raise UserError(
            f"{config.max_length} tokens, and the model's context is {shapes.text.context}; lower "
            "it",
            "max_length",
        )
    lines = [*parameters(shapes, model), ""]
    if cards:
        return [*lines, *best(config, shapes, step, cards)]
    if recipe:
        return [*lines, *by_part(shapes, step)]
    lines += [*training_table(config, shapes, step), "", *answer_table(config, shapes)]
    return [*lines, "", *notes()] if shapes == SIZES["7b"] else lines


def from_recipe(config: Config, argv: list[str]) -> bool:
    """Settings of a recipe into `config`, but where a flag says otherwise."""
    path = Path(config.recipe) if config.recipe.endswith(".toml") else None
    path = path or RECIPES / f"{config.recipe}.toml"
    if not path.is_file():
        read_recipe(config.recipe, RECIPES, {})  # says what there is
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as e:
        raise UserError(f"{path}: {escape_controls(e)}; correct the file") from None
    typed = {a.split("=")[0].removeprefix("--").removeprefix("no-") for a in argv}
    for name in vars(config).keys() & data.keys() - {"recipe", "gpus", "records", "rows"}:
        if name.replace("_", "-") not in typed:
            setattr(config, name, tuple(data[name]) if isinstance(data[name], list) else data[name])
    config.gradient_checkpointing = data.get("gradient_checkpointing", False)
    return True


def size_of(name: str) -> str:
    """A recipe's hub id is planned by the size that its name contains, so nothing is fetched."""
    from llava_min.util.sizes import SIZES

    if Path(name).is_dir() or name == "tiny":
        return name
    return next((s for s in sorted(SIZES, key=len, reverse=True) if s in name.lower()), name)


def step_of(config: Config):
    from llava_min.training.memory import Step
    from llava_min.weights import DTYPES

    return Step(
        config.train,
        DTYPES[config.precision],
        config.batch_size,
        config.max_length,
        min(config.images, 1_000),
        config.gradient_checkpointing,
        config.lora_r,
        config.lora_targets,
        config.dora,
        config.grad_accum,
    )


# ---- what is printed


def gib(n: float) -> str:
    return f"{n / 2**30:.2f}"


def parameters(shapes, name: str) -> Iterator[str]:
    from llava_min.load import on_meta

    model = on_meta(shapes)
    count = lambda module: sum(p.numel() for p in module.parameters())
    total = count(model)
    yield f"{name}: {total:,} parameters"
    for part, module in model.named_children():
        n = count(module)
        yield f"  {part:24}{n:>16,}{gib(2 * n):>9} GiB in 16 bit"


def rows_of_table(step) -> list[tuple[str, object, str | None]]:
    """(name, step, how the base is stored) of each row."""
    import torch

    half, full = torch.bfloat16, torch.float32
    as_ = lambda train, dtype: replace(step, train=train, precision=dtype)
    rows = [
        (f"{train}, {name}", as_(train, dtype), None)
        for train in ("full", "freeze_vision", "lora")
        for name, dtype in (("fp32", full), ("bf16 or fp16", half))
    ]
    return rows + [(f"QLoRA, {m}, bf16", as_("lora", half), m) for m in ("nf4", "int4")]


def cells(job: tuple) -> list[int] | None:
    """One row of the table; None where a method does not take the widths of the layers."""
    from llava_min.tools.plan_fit import quantized_step
    from llava_min.training.memory import step_memory

    shapes, step, method = job
    if method:
        try:
            return [quantized_step(shapes, step, method, n).total for n in RANKS]
        except UserError:
            return None
    return [step_memory(shapes, step, ranks=n).total for n in RANKS]


def training_table(config: Config, shapes, step) -> Iterator[str]:
    rows = rows_of_table(step)
    jobs = [(shapes, step, method) for _, step, method in rows]
    with multiprocessing.get_context("fork").Pool(min(4, len(os.sched_getaffinity(0)))) as pool:
        values = pool.map(cells, jobs, chunksize=1)
    checkpointed = "with" if config.gradient_checkpointing else "without"
    yield (
        f"Training, GiB on each GPU: batch size {config.batch_size}, rows of {config.max_length} "
        f"tokens, {checkpointed} checkpointing, LoRA of rank {config.lora_r}"
    )
    yield f"  {'':26}" + "".join(f"{n} GPU{'s' * (n > 1)}".rjust(9) for n in RANKS)
    for (name, _, _), totals in zip(rows, values, strict=True):
        values = map(gib, totals) if totals else ["-"] * len(RANKS)
        yield f"  {name:26}" + "".join(value.rjust(9) for value in values)
    yield "  tensors alone; CUDA, NCCL and fragments take 1 to 2 GiB of a card beside them"


def answer_table(config: Config, shapes) -> Iterator[str]:
    import torch
    from torch import nn

    from llava_min.load import on_meta
    from llava_min.quant.methods import METHODS, bytes_of
    from llava_min.tools.plan_fit import answer_memory, dequantized_bytes

    model = on_meta(shapes)
    layers = [m.weight.shape for m in model.language_model.modules() if isinstance(m, nn.Linear)]
    linear = sum(s.numel() for s in layers)
    rest = sum(p.numel() for p in model.parameters()) - linear
    length = config.max_length
    cache, work = answer_memory(shapes, torch.bfloat16, config.batch_size, length)
    yield (
        f"Answering, GiB: batch size {config.batch_size}, {length} tokens each, "
        f"KV cache {gib(cache)} and prefill {gib(work)} in 16 bit"
    )
    yield f"  {'':26}{'weights':>9}{'in all':>9}"
    whole = {"fp32": 4 * (linear + rest), "bf16 or fp16": 2 * (linear + rest)}
    for name, size in whole.items():
        wide = 2 if name == "fp32" else 1
        yield f"  {name:26}{gib(size):>9}{gib(size + wide * (cache + work)):>9}"
    extra = cache + work + dequantized_bytes(model, torch.bfloat16)
    for method in METHODS:
        try:
            sizes = {shape: bytes_of(method, tuple(shape)) for shape in {*layers}}
        except UserError:  # the widths are not whole groups
            yield f"  {method:26}{'-':>9}{'-':>9}"
            continue
        size = sum(sizes[shape] for shape in layers) + 2 * rest
        yield f"  {method:26}{gib(size):>9}{gib(size + extra):>9}"


def by_part(shapes, step) -> Iterator[str]:
    from llava_min.training.memory import step_memory

    memories = [step_memory(shapes, step, ranks=n) for n in RANKS]
    yield (
        f"Training ({step.train}), GiB on each GPU: batch size {step.batch_size}, rows of "
        f"{step.max_length} tokens, "
        f"{'with' if step.gradient_checkpointing else 'without'} checkpointing"
    )
    yield f"  {'':26}" + "".join(f"{n} GPU{'s' * (n > 1)}".rjust(9) for n in RANKS)
    for part in vars(memories[0]):
        yield f"  {part:26}" + "".join(gib(getattr(m, part)).rjust(9) for m in memories)
    yield f"  {'in all':26}" + "".join(gib(m.total).rjust(9) for m in memories)


def best(config: Config, shapes, step, cards) -> Iterator[str]:
    from llava_min.tools import plan_fit
    from llava_min.training.memory import step_memory

    fit = plan_fit.best_fit(shapes, step, cards, config.rows)
    if fit is None:
        raise UserError(
            f"{config.gpus}: not even the projector can be trained with rows of "
            f"{config.max_length} tokens; lower {label('max_length')}, or give more memory",
            "gpus",
        )
    memory = step_memory(shapes, fit.step, ranks=cards.count)
    beside = plan_fit.reserve(cards.count, cards.memory)
    yield f"On {cards.count} x {cards.memory:g} GiB the most that fits is {fit.step.train}:"
    for part, size in (*vars(memory).items(), ("CUDA, NCCL, fragments", beside)):
        if size:
            yield f"  {part:26}{gib(size):>9} GiB"
    yield f"  {'on each GPU':26}{gib(memory.total + beside):>9} GiB of {cards.memory:g}"
    yield ""
    yield from (" \\\n    ".join(plan_fit.train_line(fit, cards, config.model))).split("\n")
    yield ""
    yield from times(config, shapes, fit, cards)


def times(config: Config, shapes, fit, cards) -> Iterator[str]:
    from llava_min.tools import plan_fit

    work = plan_fit.step_flops(shapes, fit.step, fit.rows)
    yield f"An optimizer step of {fit.rows} full rows is {work / 1e15:.1f} PFLOP."
    if cards.tflops:
        rate = plan_fit.UTILISATION * cards.tflops * 1e12 * cards.count
        yield (
            f"At {plan_fit.UTILISATION:.0%} of {cards.count} x {cards.tflops} TFLOP/s it takes "
            f"{work / rate:.1f} s"
            + (
                f", {config.records:,} records {work / rate * config.records / fit.rows / 3600:.1f}"
                " h; shorter rows take less."
                if config.records
                else "; shorter rows take less."
            )
        )


def notes() -> Iterator[str]:
    """Where figures that go around come from, beside ours."""
    from llava_min.load import on_meta
    from llava_min.util.sizes import SIZES

    model = on_meta(SIZES["7b"])
    n = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.language_model.layers[0].parameters())
    head = 32000 * 4096  # of Vicuna's 32,000 words
    base = sum(p.numel() for p in model.language_model.layers.parameters()) + head + 4096
    stored = base + VICUNA_TABLES
    yield "Figures that go around, and what is in them:"
    yield f"  {gib(16 * n)} GiB: {n:,} parameters x 16 bytes: weight, gradient and Adam's two"
    yield "    moments in fp32, for every parameter, without activations. Half of it for 16 bit"
    yield f"    ({gib(8 * n)}) would have Adam's moments in 16 bit, too, which is not done here."
    yield (
        f"  {gib(4 * stored)} / {gib(2 * stored)} / {gib(stored)} / {gib(stored / 2)} GiB "
        "(accelerate estimate-memory, Vicuna-7B, fp32 / fp16 / int8 / int4):"
    )
    yield f"    {base:,} parameters without the head, which AutoModel does not make, and"
    yield f"    {VICUNA_TABLES:,} numbers of rotary tables in the blocks; int4 without scales."
    largest = (block + VICUNA_TABLES // 32) * 4 / 2**20
    yield f"    Its largest layer, {largest:.2f} MiB in fp32: a block and its table. Its training"
    yield f"    with Adam, {gib(16 * stored)} GiB: four times the weights."
