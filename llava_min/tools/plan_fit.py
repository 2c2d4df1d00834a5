"""What fits on which GPUs: the settings that are tried, the memory beside PyTorch's tensors, and
the time a step takes.
"""

import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from llava_min.config import LINEARS, LlavaConfig
from llava_min.errors import UserError, info, label, shorten
from llava_min.load import on_meta
from llava_min.training.fake_step import (
    Allocations,
    Step,
    fake_tensors,
    planned_model,
    stored_dtypes,
    without_values,
)
from llava_min.training.memory import fixed_memory, shallow, step_memory
from llava_min.util.cli import flag_of
from llava_min.util.sizes import SIZES

GIB = 2**30
# GPU -> (GiB, dense 16-bit TFLOP/s with fp32 sums), from the makers' data sheets
GPUS = {
    "T4": (16, 65),
    "L4": (24, 121),
    "A10": (24, 125),
    "RTX3090": (24, 71),
    "RTX4090": (24, 165),
    "A6000": (48, 155),
    "L40S": (48, 362),
    "A100-40": (40, 312),
    "A100-80": (80, 312),
    "H100": (80, 989),
    "H200": (141, 989),
}
CONTEXT, NCCL = GIB // 2, GIB // 2  # CUDA with cuBLAS's workspace; buffers of the collectives
FRAGMENTS = 0.04  # of a card, that the caching allocator cannot use
UTILISATION = 0.4  # of the peak, usual for full rows; LoRA and small batches reach less


@dataclass(frozen=True)
class Cards:
    """`--gpus 2x24`, `4xL4`: how many, GiB of one, and its TFLOP/s where a name told."""

    count: int
    memory: float
    tflops: int | None = None
    name: str = ""


def read_cards(text: str) -> Cards:
    m = re.fullmatch(r"(\d{1,4})x(.+)", text)
    if m and m[2].upper() in GPUS and int(m[1]):
        return Cards(int(m[1]), *GPUS[m[2].upper()], m[2].upper())
    if m and re.fullmatch(r"\d{1,4}(\.\d)?", m[2]) and int(m[1]) and float(m[2]):
        return Cards(int(m[1]), float(m[2]))
    raise UserError(
        f"{shorten(text)}: expected how many and what, such as 2x24 (GiB) or 8xA100-80; named are "
        f"{', '.join(GPUS)}",
        "gpus",
    )


def reserve(ranks: int, card: float) -> int:
    """Bytes of a card of `card` GiB that no tensor can have."""
    return CONTEXT + (NCCL if ranks > 1 else 0) + int(FRAGMENTS * card * GIB)


def cache_bytes(config: LlavaConfig, precision: torch.dtype, rows: int, length: int) -> int:
    """The KV cache of `rows` answers, each `length` tokens with its prompt."""
    text = config.text
    numbers = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    return rows * length * numbers * precision.itemsize


def prefill_bytes(
    config: LlavaConfig, precision: torch.dtype, rows: int, length: int, quantize: str | None
) -> int:
    """What the decoder's blocks need beside weights and cache to read the prompts: the step is run
    on tensors without values, as a training step is."""
    memory, model = Allocations(), planned_model(shallow(config, 1), quantize)
    with fake_tensors("cuda"), torch.no_grad():
        without_values(model, stored_dtypes(model, precision))
        for p in model.parameters():
            memory.add(p)
        start = memory.live
        with memory:
            x = torch.zeros(rows, length, config.text.hidden_size, dtype=precision)
            model.language_model(x, torch.zeros(rows, length, dtype=torch.long))
    return max(memory.peaks.values()) - start


# ---- what fits


def largest_batch(config: LlavaConfig, step: Step, cards: Cards, most: int) -> int:
    """Rows of a micro-batch that fit, a power of two up to `most`; 0 if not even one does."""
    room = cards.memory * GIB - reserve(cards.count, cards.memory)
    total = lambda n: step_memory(config, replace(step, batch_size=n), ranks=cards.count).total
    fixed = fixed_memory(config, step, ranks=cards.count)
    if fixed.weights + fixed.optimizer > room:  # gradients may come as activations go
        return 0
    if (one := total(1)) > room:
        return 0
    grows = max(1, total(2) - one)
    n = 1
    while 2 * n <= most and one + (2 * n - 1) * grows <= room:
        n *= 2
    while n > 1 and total(n) > room:  # what grows need not grow evenly
        n //= 2
    return n


@dataclass(frozen=True)
class Fit:
    step: Step
    rows: int  # of an optimizer step on all GPUs


class Way(NamedTuple):
    """One to try: what is trained, the rank, and how the decoder is stored."""

    train: str
    lora_r: int
    quantize: str | None


def ways(config: LlavaConfig, lora_r: int | None) -> list[Way]:
    """The most that is trained first, as LLaVA does: language model and projector, LoRA of rank
    128, 64 and 16, the same on 4 bits (QLoRA), the projector alone; without checkpointing where
    four rows fit."""
    ranks = [min(r, config.text.hidden_size) for r in ((lora_r,) if lora_r else (128, 64, 16))]
    if config.quantization:  # only adapters learn on it
        return [Way("lora", r, None) for r in ranks]
    lora = [Way("lora", r, method) for method in (None, "nf4") for r in ranks]
    return [Way("freeze_vision", ranks[0], None), *lora, Way("projector", ranks[0], None)]


def best_fit(
    config: LlavaConfig, step: Step, cards: Cards, rows: int, tried: list[Way]
) -> Fit | None:
    """The first way that fits, with `rows` rows in an optimizer step, as near as can be."""
    most = max(1, rows // cards.count)
    for way in tried:
        stored = f" in {way.quantize}" if way.quantize else ""
        rank = f" of rank {way.lora_r}" if way.train == "lora" else ""
        for checkpointed, enough in ((False, 4), (True, 1)):
            info(f"trying {way.train}{stored}{rank}" + ", with checkpointing" * checkpointed)
            # with accumulation the gradients of the last micro-batch are there in the forward
            new = replace(
                step,
                train=way.train,
                lora_r=way.lora_r,
                quantize=way.quantize,
                gradient_checkpointing=checkpointed,
                grad_accum=2,
            )
            batch = largest_batch(config, new, cards, most)
            if batch >= min(enough, most):
                accum = max(1, rows // (batch * cards.count))
                step = replace(new, batch_size=batch, grad_accum=accum)
                return Fit(step, batch * accum * cards.count)
    return None


def check_fit(fit: Fit | None, settings: Any) -> None:
    if fit is None:
        least = f"{settings.train} does not fit" if settings.train else "nothing can be trained"
        raise UserError(
            f"{settings.gpus}: {least} with rows of {settings.max_length} tokens; lower "
            f"{label('max_length')}, or give more memory",
            "gpus",
        )


# what train.py loads for a size that is planned
HUB = {"7b": "llava-hf/llava-1.5-7b-hf", "13b": "llava-hf/llava-1.5-13b-hf"}
RATES = {"lora": "2e-4", "projector": "1e-3"}
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
KEPT = (  # of a plan's flags, beside a recipe
    "model precision max_length lora_r lora_targets lora_dropout dora quantize"
).split()


def written(**settings: Any) -> list[str]:
    """Settings as flags with their values; None is left out."""

    def flag(name: str, value: Any) -> str:
        if isinstance(value, bool):
            return flag_of(name if value else f"no_{name}")
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        return f"{flag_of(name)} {shlex.quote(text)}"

    return [flag(name, v) for name, v in settings.items() if v is not None]


def train_line(fit: Fit, cards: Cards, settings: Any, typed: Collection[str] = ()) -> list[str]:
    """train.py's command for a fit: its start, then each flag. typed: what of `settings` was."""
    step, lora = fit.step, fit.step.train == "lora"
    launcher = f"torchrun --nproc_per_node={cards.count}" if cards.count > 1 else "python"
    start = f"{launcher} train.py"
    data = written(data="DATA.json", image_folder="IMAGES")
    batch = written(batch_size=step.batch_size, grad_accum=step.grad_accum)
    parts = {"train_projector": step.train_projector, "train_vision": step.train_vision}
    if settings.recipe:
        beside = {name: getattr(settings, name) for name in KEPT if name in typed} | parts
        how = written(**beside, gradient_checkpointing=step.gradient_checkpointing)
        return [start, *written(recipe=settings.recipe), *data, *batch, *how]
    model = HUB.get(settings.model, "MODEL" if settings.model in SIZES else settings.model)
    how = {"train": step.train, **parts}
    if lora:
        how |= {"lora_r": step.lora_r, "lora_alpha": 2 * step.lora_r, "dora": step.dora or None}
        how |= {"lora_dropout": step.lora_dropout or None, "quantize": step.quantize}
        how |= {"lora_targets": None if step.lora_targets == LINEARS else step.lora_targets}
    own = lora and step.train_projector is not False
    how |= {"lr": RATES.get(step.train, "2e-5"), "projector_lr": "2e-5" if own else None}
    row = {"max_length": step.max_length, "precision": PRECISIONS[step.precision]}
    row["gradient_checkpointing"] = step.gradient_checkpointing or None
    return [start, *written(model=model), *data, *written(**how), *batch, *written(**row)]


# ---- time


def step_flops(config: LlavaConfig, step: Step, rows: int) -> float:
    """Floating-point operations of an optimizer step: two for a weight and token forward, two
    backward for the gradient of the input and two for that of a trained weight; attention beside.
    """
    text, vision, tokens = config.text, config.vision, rows * step.max_length
    model = on_meta(config)
    count = lambda module: sum(p.numel() for p in module.parameters())
    decoder = count(model.language_model.layers) + count(model.lm_head)
    attention = 2 * text.num_hidden_layers * text.num_attention_heads * text.head_dim
    forward = 2 * decoder + attention * step.max_length
    times = 3.0 if step.train in ("full", "freeze_vision") else 2.0
    tower = 2 * count(model.vision_tower) * (vision.num_patches + 1) * step.images * rows
    tower *= 3 if step.train == "full" else 1
    return forward * tokens * (times + step.gradient_checkpointing) + tower
