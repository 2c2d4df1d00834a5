"""What fits on which GPUs: the settings that are tried, the memory beside PyTorch's tensors, and
the time a step takes.
"""

import re
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llava_min.config import LlavaConfig
from llava_min.errors import UserError, shorten
from llava_min.load import on_meta
from llava_min.quant.methods import bytes_of
from llava_min.training.memory import (
    Allocations,
    Memory,
    Step,
    attention_of,
    shallow,
    step_memory,
    trained_model,
    without_values,
)
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


def quantized_step(config: LlavaConfig, step: Step, method: str, ranks: int) -> Memory:
    """QLoRA: `step_memory` with the decoder's linear layers stored by `method`."""
    memory = step_memory(config, step, ranks=ranks)
    model = on_meta(config)
    layers = [m for m in model.language_model.modules() if isinstance(m, nn.Linear)]
    shapes = [tuple(m.weight.shape) for m in layers]
    size = {shape: bytes_of(method, shape) for shape in {*shapes}}
    plain = sum(m.weight.numel() for m in layers) * step.precision.itemsize
    less = plain - sum(size[shape] for shape in shapes)
    return replace(
        memory,
        weights=memory.weights - less // ranks,
        activations=memory.activations + dequantized_bytes(model, step.precision),
    )


def answer_memory(
    config: LlavaConfig, precision: torch.dtype, rows: int, length: int
) -> tuple[int, int]:
    """(bytes of the KV cache, of the prefill's activations) of `rows` answers, each `length` tokens
    with its prompt."""
    text = config.text
    head = 2 * text.num_key_value_heads * text.head_dim * precision.itemsize
    memory, small = Allocations(), shallow(config, 1)
    model = trained_model(small, Step(train="full")).requires_grad_(False)
    with FakeTensorMode(), attention_of("cuda"), torch.no_grad():
        without_values(model, precision, precision)
        with memory:
            x = torch.zeros(rows, length, text.hidden_size, dtype=precision)
            model.language_model(x, torch.zeros(rows, length, dtype=torch.long))
    return rows * length * text.num_hidden_layers * head, max(memory.peaks.values())


def dequantized_bytes(model: nn.Module, precision: torch.dtype) -> int:
    """A quantized layer's weight is made whole for its product: the largest of a block."""
    layers = [m for m in model.language_model.layers[0].modules() if isinstance(m, nn.Linear)]
    return max(m.weight.numel() for m in layers) * precision.itemsize


# ---- what fits


def largest_batch(config: LlavaConfig, step: Step, cards: Cards, most: int) -> int:
    """Rows of a micro-batch that fit, a power of two up to `most`; 0 if not even one does."""
    room = cards.memory * GIB - reserve(cards.count, cards.memory)
    total = lambda n: step_memory(config, replace(step, batch_size=n), ranks=cards.count).total
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


def best_fit(config: LlavaConfig, step: Step, cards: Cards, rows: int) -> Fit | None:
    """The most that is trained first, as LLaVA does: language model and projector, then LoRA of
    rank 128, 64 and 16, then the projector alone; without checkpointing where four rows fit."""
    most = max(1, rows // cards.count)
    tried = [("freeze_vision", step.lora_r), ("lora", 128), ("lora", 64), ("lora", 16)]
    for train, r in [*tried, ("projector", step.lora_r)]:
        r = min(r, config.text.hidden_size)
        for checkpointed, enough in ((False, min(4, most)), (True, 1)):
            # with accumulation the gradients of the last micro-batch are there in the forward
            new = replace(
                step, train=train, lora_r=r, gradient_checkpointing=checkpointed, grad_accum=2
            )
            batch = largest_batch(config, new, cards, most)
            if batch >= enough:
                accum = max(1, rows // (batch * cards.count))
                return Fit(
                    replace(new, batch_size=batch, grad_accum=accum), batch * accum * cards.count
                )
    return None


# what train.py loads for a size that is planned
HUB = {"7b": "llava-hf/llava-1.5-7b-hf", "13b": "llava-hf/llava-1.5-13b-hf"}


def train_line(fit: Fit, cards: Cards, model: str) -> list[str]:
    """train.py's command for a fit, in pieces of a line each."""
    step, name = fit.step, HUB.get(model, "MODEL" if model in SIZES else model)
    start = f"torchrun --nproc_per_node={cards.count}" if cards.count > 1 else "python"
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    lora = step.train == "lora"
    rate = {"freeze_vision": "2e-5", "lora": "2e-4 --projector-lr 2e-5", "projector": "1e-3"}
    return [
        f"{start} train.py --model {name} --data DATA.json --image-folder IMAGES",
        f"--train {step.train}"
        + (f" --lora-r {step.lora_r} --lora-alpha {2 * step.lora_r}" if lora else "")
        + f" --lr {rate[step.train]}",
        f"--batch-size {step.batch_size} --grad-accum {step.grad_accum} "
        f"--max-length {step.max_length} --precision {precision[step.precision]}"
        + (" --gradient-checkpointing" if step.gradient_checkpointing else ""),
    ]


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
