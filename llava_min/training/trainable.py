"""Which parameters are trained: selected by name, shown as a table, checked after the first
backward.

LLaVA trains the projector alone first, then projector and language model, or LoRA and projector
(Liu et al. 2023, https://arxiv.org/abs/2310.03744). Parts of the vision tower that are never run
get no gradient, so they are never trained.
"""

from typing import Any

import torch
from torch import nn

from llava_min.checks.load import check_llava
from llava_min.checks.lora_targets import check_rank
from llava_min.errors import UserError, label, preview, shorten
from llava_min.export.quantized import own_parameters
from llava_min.fast.int_matmul import quant_layers
from llava_min.lora import LoRAConfig
from llava_min.parallel.dtensor import local_shard
from llava_min.training.optim import check_optimizer, config_groups
from llava_min.training.targets import add_lora

VISION, PROJECTOR = "vision_tower", "multi_modal_projector"
LANGUAGE, HEAD = "language_model", "lm_head"
PARTS = {
    "lora": {PROJECTOR},
    "full": {VISION, PROJECTOR, LANGUAGE, HEAD},
    "freeze_vision": {PROJECTOR, LANGUAGE, HEAD},
    "projector": {PROJECTOR},
}


def setup_lora(model: nn.Module, config: Any, device: torch.device) -> LoRAConfig:
    """Add LoRA and set requires_grad as train.py's `config` says, on a model on meta.

    Raises UserError for settings that do not fit the model or the optimizer.
    """
    check_llava(model.config, config.model)
    c = config
    lora = LoRAConfig(c.lora_r, c.lora_alpha, c.lora_dropout, c.lora_targets, c.dora, c.rslora)
    if c.train == "lora":
        check_rank(c.lora_r, model.config.text.hidden_size)
        add_lora(model, lora)
    set_trainable(model, c.train, c.train_projector, c.train_vision)
    check_optimizer(c.optimizer, config_groups(model, config), c.betas, device)
    return lora


def set_trainable(
    model: nn.Module,
    train: str,
    train_projector: bool | None = None,
    train_vision: bool | None = None,
) -> None:
    """Set requires_grad of every parameter of a Llava by what `train` names; LoRA layers are in
    place.

    lora           the LoRA layers, wherever they are, and the projector
    full           everything
    freeze_vision  projector and language model
    projector      the projector, LLaVA's first stage
    last:N         the last N decoder blocks and the head; a tied head is the embedding too

    train_projector, train_vision: True or False overrides that for its part, None leaves it. Raises
    UserError for another word, more blocks than there are, a part trained whole that has LoRA
    layers, and when nothing is left to train.
    """
    trained = trained_modules(train, len(model.language_model.layers))
    for part, switch in ((PROJECTOR, train_projector), (VISION, train_vision)):
        if switch is not None:
            trained = trained | {part} if switch else trained - {part}

    unused, quantized = unused_modules(model), own_parameters(model)
    parts = sorted({top_module(name) for name in quantized if is_inside(name, trained)})
    if quantized and (train != "lora" or parts):
        part = f", and not {' and '.join(parts)} whole" if parts else ""
        raise UserError(
            f"{train} of a quantized model, which only adapters learn on; give lora{part}, or the "
            "16-bit checkpoint",
            "train",
        )
    # a tied weight is visited twice; its `lm_head` name decides
    for name, p in model.named_parameters(remove_duplicate=False):
        whole, is_lora = is_inside(name, trained), ".lora_" in name
        if whole and is_lora:
            layer = name.partition(".lora_")[0]
            raise UserError(
                f"{top_module(name)} is trained whole and has LoRA layers ({layer}); "
                "leave it "
                f"out of {label('lora_targets')}, or do not train it whole",
                "train",
            )
        is_trained = whole or is_lora and train == "lora"
        p.requires_grad_(is_trained and not is_inside(name, unused))
    check_trained(train, [name for name, p in model.named_parameters() if p.requires_grad])


def trained_modules(train: str, blocks: int) -> set[str]:
    """The modules that `train` names, of a decoder with `blocks` blocks."""
    if train in PARTS:
        return PARTS[train]
    last = train.removeprefix("last:")
    if last != train and last.isascii() and last.isdigit() and str(int(last)) == last:
        if 1 <= int(last) <= blocks:
            first = blocks - int(last)
            return {HEAD, *(f"{LANGUAGE}.layers.{i}" for i in range(first, blocks))}
    raise UserError(
        f"'{shorten(train, 200)}' is not one of {', '.join(PARTS)} and last:1 to "
        f"last:{blocks}; "
        "choose one",
        "train",
    )


def check_trained(train: str, names: list[str]) -> None:
    if not names or train == "lora" and not any(".lora_" in name for name in names):
        raise UserError(
            f"{'no LoRA layer' if names else 'nothing'} is left to train; switch a part "
            "on, "
            "or choose another",
            "train",
        )


def is_inside(name: str, modules: set[str]) -> bool:
    return any(name.startswith(m + ".") for m in modules)


def top_module(name: str) -> str:
    return name.partition(".")[0]


def unused_modules(model: nn.Module) -> set[str]:
    """Modules of the tower that never run: blocks after the one LLaVA reads, and the last norm."""
    return {f"{VISION}.{name}" for name in model.vision_tower.unused_modules()}


def parameter_table(model: nn.Module) -> str:
    """Parameters of each part, how many are trained, and their share; LoRA's are counted apart,
    and a quantized layer's weights one by one."""
    counts, own = {name: [0, 0] for name, _ in model.named_children()}, own_parameters(model)
    sizes = [
        (name, p.numel(), p.requires_grad)
        for name, p in model.named_parameters()
        if name not in own
    ]
    sizes += [(path, m.in_features * m.out_features, False) for path, m in quant_layers(model)]
    for name, size, trained in sizes:
        part = top_module(name)
        row = counts.setdefault(f"LoRA in {part}" if ".lora_" in name else part, [0, 0])
        row[0] += size
        row[1] += size * trained
    lora = [row for name, row in counts.items() if name.startswith("LoRA")]
    total = [sum(column) for column in zip(*counts.values())]
    if len(lora) > 1:
        counts["LoRA"] = [sum(column) for column in zip(*lora)]
    counts["all"] = total
    lines = [f"{'part':<30}{'parameters':>16}{'trained':>16}{'share':>9}"]
    for name, (n, trained) in counts.items():
        lines.append(f"{name:<30}{n:>16,}{trained:>16,}{trained / max(n, 1):>9.2%}")
    if unused := sum(row[0] - row[1] for row in lora):
        lines.append(
            f"{unused:,} of LoRA's parameters are in layers that are not run or not trained"
        )
    return "\n".join(lines)


def check_gradients(model: nn.Module) -> None:
    """After a backward: every trained tensor has a finite gradient and no other has one, or
    UserError.

    A gradient of zeros passes: LoRA's A has no other while B is zero, nor has the projector in a
    batch without images. Of a sharded tensor this rank looks at its own rows.
    """
    faults: dict[str, list[str]] = {}
    for name, p in model.named_parameters():
        fault = None
        if p.grad is None:
            if p.requires_grad:
                fault = "no gradient though it is trained"
        elif not p.requires_grad:
            fault = "a gradient though it is frozen"
        elif not torch.isfinite(local_shard(p.grad)).all():
            fault = "NaN or infinity in its gradient"
        if fault:
            faults.setdefault(fault, []).append(name)
    if faults:
        found = "; ".join(
            f"{preview(names, ', ', 4)} has {fault}" for fault, names in faults.items()
        )
        raise UserError(
            f"the first backward: {found}; look at {label('train')}, {label('precision')} and the "
            "model"
        )
