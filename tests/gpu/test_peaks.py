"""The peak that `plan` and `train.py --dry-run` tell is what a GPU's allocator hands out.

pytest tests/gpu        # on a machine with CUDA; elsewhere every test here is skipped
"""

from dataclasses import replace

import pytest
import torch

from llava_min.export.quantized import own_parameters, quantize_linears
from llava_min.load import BLOCKS, random_model
from llava_min.lora import LoRAConfig, init_lora
from llava_min.training.fake_step import Step
from llava_min.training.memory import step_memory
from llava_min.training.optim import make_optimizer, parameter_groups
from llava_min.training.targets import add_lora
from llava_min.training.trainable import set_trainable
from llava_min.training.wrap import enable_gradient_checkpointing
from llava_min.util.sizes import SIZES

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="needs a GPU with CUDA: pytest tests/gpu on a machine with one",
)
CONFIG = replace(SIZES["300m"], text=replace(SIZES["300m"].text, num_hidden_layers=6))
BF16 = torch.bfloat16
SETTINGS = {
    "full, bf16": Step("full", BF16, 2, 1024),
    "full, fp32, checkpointed": Step("full", torch.float32, 1, 1024, gradient_checkpointing=True),
    "freeze_vision, accumulated": Step("freeze_vision", BF16, 2, 1024, grad_accum=2),
    "LoRA, bf16": Step("lora", BF16, 4, 1024, lora_r=64),
    "LoRA, bf16, checkpointed": Step("lora", BF16, 8, 1024, gradient_checkpointing=True),
    "LoRA with dropout": Step("lora", BF16, 4, 1024, lora_dropout=0.05),
    "DoRA": Step("lora", BF16, 2, 1024, dora=True),
    "QLoRA, nf4, checkpointed": Step(
        "lora", BF16, 4, 1024, quantize="nf4", gradient_checkpointing=True
    ),
    "QLoRA, int4": Step("lora", BF16, 4, 1024, quantize="int4"),
}


def built(step: Step) -> torch.nn.Module:
    """As train.py has it on a GPU: frozen weights in the step's precision, trained ones in fp32."""
    model = random_model(CONFIG).requires_grad_(False).cuda()
    if step.quantize:
        quantize_linears(model, BLOCKS, step.quantize)
    if step.train == "lora":
        scaling = (16.0, step.lora_dropout)
        add_lora(model, LoRAConfig(step.lora_r, *scaling, step.lora_targets, step.dora))
        init_lora(model, 0)
    set_trainable(model, step.train, step.train_projector, step.train_vision)
    own = own_parameters(model)
    for name, p in model.named_parameters():
        if not p.requires_grad and name not in own:
            p.data = p.data.to(step.precision)
    if step.gradient_checkpointing:
        enable_gradient_checkpointing(model, dropout=step.lora_dropout > 0)
    return model.train()


def measured(step: Step) -> int:
    """Bytes at the peak of the second optimizer step."""
    before = torch.cuda.memory_allocated()
    model = built(step)
    optimizer = make_optimizer("adamw", parameter_groups(model, 1e-4, 0.0), (0.9, 0.999))
    patches, side = CONFIG.tokens_per_image, CONFIG.vision.image_size
    for _ in range(2):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(step.grad_accum):
            ids = torch.randint(0, 500, (step.batch_size, step.max_length), device="cuda")
            ids[:, :patches] = CONFIG.image_token_id
            labels = ids.clone()
            labels[:, :patches] = -100
            pixels = torch.randn(step.batch_size, 3, side, side, device="cuda")
            low = step.precision != torch.float32
            with torch.autocast("cuda", step.precision, enabled=low):
                loss = model.loss(ids, labels, pixels)
            loss.backward()
            del ids, labels, pixels, loss
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("name", SETTINGS)
def test_the_planned_peak_is_within_five_percent_of_the_gpus(name):
    step = SETTINGS[name]
    planned, peak = step_memory(CONFIG, step).total, measured(step)
    print(
        f"{name:28}{planned / 2**20:9.1f} MiB planned {peak / 2**20:9.1f} MiB measured "
        f"{planned / peak - 1:+.1%}"
    )
    assert abs(planned / peak - 1) < 0.05
