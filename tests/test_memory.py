"""The memory that is counted without values is what the CPU's allocator hands out for the same step
with values.
"""

from dataclasses import replace

import pytest
import torch

from llava_min.config import LlavaConfig, TextConfig, VisionConfig
from llava_min.export.quantized import own_parameters, quantize_linears
from llava_min.fast.cpu_linear import upcast_linears
from llava_min.load import BLOCKS, random_model
from llava_min.lora import LoRAConfig
from llava_min.training import fake_step, memory
from llava_min.training.fake_step import Step
from llava_min.training.memory import step_memory
from llava_min.training.optim import make_optimizer, parameter_groups
from llava_min.training.targets import add_lora
from llava_min.training.trainable import set_trainable
from llava_min.training.wrap import enable_gradient_checkpointing
from llava_min.util.sizes import SIZES

VISION = VisionConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=56,
    patch_size=14,
    projection_dim=16,
)
TEXT = TextConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=1024,
)
CONFIG = LlavaConfig(VISION, TEXT, image_token_id=511)
FP32, BF16 = torch.float32, torch.bfloat16
SETTINGS = {
    "full": Step("full", FP32, 2, 320),
    "full, bf16": Step("full", BF16, 2, 320),
    "full, checkpointed": Step("full", FP32, 2, 320, gradient_checkpointing=True),
    "full, accumulated": Step("full", FP32, 2, 320, grad_accum=2),
    "freeze_vision, short rows": Step("freeze_vision", FP32, 4, 128),
    "projector": Step("projector", FP32, 2, 320),
    "LoRA": Step("lora", FP32, 2, 320, lora_r=8),
    "LoRA, bf16": Step("lora", BF16, 3, 320, lora_r=8),
    "LoRA, bf16, checkpointed": Step("lora", BF16, 3, 320, gradient_checkpointing=True),
    "DoRA on attention": Step("lora", FP32, 2, 320, dora=True, lora_targets=("q_proj", "v_proj")),
    "LoRA, three images a row": Step("lora", FP32, 1, 320, images=3),
    "full, text alone": Step("full", FP32, 2, 320, images=0),
    "LoRA with dropout": Step("lora", FP32, 2, 320, lora_dropout=0.1),
    "LoRA with dropout, checkpointed": Step(
        "lora", BF16, 2, 320, lora_dropout=0.1, gradient_checkpointing=True
    ),
    "LoRA alone": Step("lora", BF16, 2, 320, train_projector=False),
    "LoRA and the tower": Step("lora", FP32, 2, 320, train_vision=True),
    "the last two blocks": Step("last:2", FP32, 2, 320),
    "QLoRA, nf4": Step("lora", BF16, 2, 320, quantize="nf4"),
    "QLoRA, nf4, checkpointed": Step(
        "lora", BF16, 2, 320, quantize="nf4", gradient_checkpointing=True
    ),
    "QLoRA, int4, accumulated": Step("lora", BF16, 2, 320, quantize="int4", grad_accum=2),
    "QLoRA, int8, fp32": Step("lora", FP32, 2, 320, quantize="int8"),
    "QLoRA, hqq2, DoRA": Step("lora", BF16, 1, 320, quantize="hqq2", dora=True),
}


def measured(step: Step) -> int:
    """Bytes at the peak of the second optimizer step, by the allocator's own events."""
    model = random_model(CONFIG).requires_grad_(False)
    if step.quantize:
        quantize_linears(model, BLOCKS, step.quantize)
    if step.train == "lora":
        scaling = (16.0, step.lora_dropout)
        add_lora(model, LoRAConfig(step.lora_r, *scaling, step.lora_targets, step.dora, False))
    set_trainable(model, step.train, step.train_projector, step.train_vision)
    own = own_parameters(model)
    for name, p in model.named_parameters():
        if not p.requires_grad and name not in own:
            p.data = p.data.to(step.precision)
    upcast_linears(model)
    if step.gradient_checkpointing:
        enable_gradient_checkpointing(model, dropout=step.lora_dropout > 0)
    model.train()
    optimizer = make_optimizer("adamw", parameter_groups(model, 1e-4, 0.0), (0.9, 0.999))

    def micro_batch() -> torch.Tensor:
        b, t, n = step.batch_size, step.max_length, step.images
        ids = torch.randint(0, 500, (b, t))
        ids[:, : n * CONFIG.tokens_per_image] = CONFIG.image_token_id
        labels = ids.clone()
        labels[:, : n * CONFIG.tokens_per_image] = -100
        pixels = torch.randn(b * n, 3, VISION.image_size, VISION.image_size) if n else None
        with torch.autocast("cpu", step.precision, enabled=step.precision != FP32):
            return model.loss(ids, labels, pixels)

    def whole_step() -> None:
        for _ in range(step.grad_accum):
            micro_batch().backward()
        optimizer.step()

    whole_step()
    optimizer.zero_grad(set_to_none=True)
    moments = [x for s in optimizer.state.values() for x in s.values() if x.dim()]
    held = sum(x.untyped_storage().nbytes() for x in [*model.parameters(), *moments])
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        whole_step()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = peak = 0
    for _, n in changes:
        live += n
        peak = max(peak, live)
    return held + peak


@pytest.mark.parametrize("name", SETTINGS)
def test_the_peak_is_within_five_percent_of_the_allocators(name):
    step = SETTINGS[name]
    planned, peak = step_memory(CONFIG, step, device="cpu").total, measured(step)
    print(
        f"{name:28}{planned / 1e6:9.2f} MB planned {peak / 1e6:9.2f} MB measured "
        f"{planned / peak - 1:+.1%}"
    )
    assert abs(planned / peak - 1) < 0.05


@pytest.mark.parametrize("train", ["full", "lora", "projector"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("accum", [1, 2])
def test_many_blocks_are_counted_from_few(train, checkpointed, accum, monkeypatch):
    step = Step(train, BF16, 2, 320, gradient_checkpointing=checkpointed, grad_accum=accum)
    deep = replace(CONFIG, text=replace(TEXT, num_hidden_layers=11))
    check_few(deep, step, monkeypatch)


def test_many_quantized_blocks_are_counted_from_few(monkeypatch):
    step = Step("lora", BF16, 2, 320, quantize="nf4", gradient_checkpointing=True)
    deep = replace(CONFIG, text=replace(TEXT, num_hidden_layers=11))
    check_few(deep, step, monkeypatch)


def check_few(deep: LlavaConfig, step: Step, monkeypatch) -> None:
    few = step_memory(deep, step)
    memory.peak_above_weights.cache_clear()
    monkeypatch.setattr(memory, "SHALLOW", (2, 11))  # all of it is run
    assert abs(few.total / step_memory(deep, step).total - 1) < 0.02


def test_nothing_is_loaded_and_nothing_of_it_stays():
    handles = fake_step.fast_attention.handles
    total = step_memory(SIZES["1b"], Step()).total
    assert 3e9 < total < 2e10 and fake_step.fast_attention.handles is handles
