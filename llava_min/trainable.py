"""What of a model learns: chosen by name before training, shown as a table, and proved by the first backward.

LLaVA trains the projector alone first, then projector and language model, or LoRA and projector (Liu et al. 2023,
https://arxiv.org/abs/2310.03744). The parts of the vision tower that are never run have no gradient; they never learn.
"""

from typing import Any

import torch
from torch import nn

from llava_min.cli import UserError, printable
from llava_min.lora import LoRAConfig, add_lora
from llava_min.optim import check_optimizer, parameter_groups
from llava_min.shard import local

VISION, PROJECTOR, LANGUAGE, HEAD = "vision_tower", "multi_modal_projector", "language_model", "lm_head"


def select(model: nn.Module, train: str, *, train_projector: bool | None = None,
           train_vision: bool | None = None) -> None:
    """Set requires_grad of every parameter of a Llava by what `train` names, its LoRA layers being in:

    lora           the LoRA layers, wherever they are, and the projector
    full           everything
    freeze_vision  projector and language model
    projector      the projector, LLaVA's first stage
    last:N         the last N decoder blocks and the head, without the norm between; a tied head is the embedding too

    train_projector, train_vision: True or False wins over that for its part, None leaves it.
    Raises UserError for another word, more blocks than there are, a part trained whole that has LoRA layers, and when
    nothing is left to learn.
    """
    layers = [f"{LANGUAGE}.layers.{i}" for i in range(len(model.language_model.layers))]
    chosen = {"lora": {PROJECTOR}, "full": {VISION, PROJECTOR, LANGUAGE, HEAD}, "projector": {PROJECTOR},
              "freeze_vision": {PROJECTOR, LANGUAGE, HEAD},
              **{f"last:{n}": {*layers[-n:], HEAD} for n in range(1, len(layers) + 1)}}.get(train)
    if chosen is None:
        raise UserError(f"--train {printable(train)[:200]}: not one of lora, full, freeze_vision, projector and "
                        f"last:1 to last:{len(layers)}; choose one")
    for part, switch in ((PROJECTOR, train_projector), (VISION, train_vision)):
        if switch is not None:
            chosen = chosen | {part} if switch else chosen - {part}

    never = idle(model)
    for name, p in model.named_parameters(remove_duplicate=False):  # a tied head has its last say by its own name
        whole, lora = inside(name, chosen), ".lora_" in name
        if whole and lora:
            raise UserError(f"--train {train}: {part_of(name)} learns whole and has LoRA layers "
                            f"({name.partition('.lora_')[0]}); leave it out of --lora-targets, or do not train it so")
        p.requires_grad_((whole or lora and train == "lora") and not inside(name, never))
    learns = [name for name, p in model.named_parameters() if p.requires_grad]
    if not learns or train == "lora" and not any(".lora_" in name for name in learns):
        raise UserError(f"--train {train}: {'no LoRA layer' if learns else 'nothing'} is left to learn; switch a part on, "
                        "or choose another")


def choose(model: nn.Module, knobs: Any, device: torch.device) -> LoRAConfig:
    """LoRA layers and requires_grad as train.py's `knobs` say, on `model`, which is on meta; the optimizer can be had."""
    k = knobs
    lora = LoRAConfig(k.lora_r, k.lora_alpha, k.lora_dropout, k.lora_targets, k.dora, k.rslora)
    if k.train == "lora":
        if k.lora_r > (width := model.config.text.hidden_size):
            raise UserError(f"--lora-r: {k.lora_r} is above the model's width of {width}, where an update is no longer of low rank; "
                            "lower it")
        add_lora(model, lora)
    select(model, k.train, train_projector=k.train_projector, train_vision=k.train_vision)
    check_optimizer(k.optimizer, parameter_groups(model, k.lr, k.weight_decay, k.projector_lr, k.vision_lr), k.betas, device)
    return lora


def inside(name: str, modules: set[str]) -> bool:
    return any(name.startswith(m + ".") for m in modules)


def part_of(name: str) -> str:
    return name.partition(".")[0]


def idle(model: nn.Module) -> set[str]:
    """Modules of the tower that are never run: the blocks after the one that LLaVA reads, and the last norm."""
    return {f"{VISION}.{name}" for name in model.vision_tower.unused_modules()}


def table(model: nn.Module) -> str:
    """Parameters of each part, how many are trained, and their share; LoRA's are counted apart, by part."""
    counts = {name: [0, 0] for name, _ in model.named_children()}
    for name, p in model.named_parameters():
        row = counts.setdefault(f"LoRA in {part_of(name)}" if ".lora_" in name else part_of(name), [0, 0])
        row[0] += p.numel()
        row[1] += p.numel() * p.requires_grad
    lora = [row for name, row in counts.items() if name.startswith("LoRA")]
    everything = [sum(column) for column in zip(*counts.values())]
    if len(lora) > 1:
        counts["LoRA"] = [sum(column) for column in zip(*lora)]
    counts["all"] = everything
    lines = [f"{'part':<30}{'parameters':>16}{'trained':>16}{'share':>9}"]
    lines += [f"{name:<30}{n:>16,}{trained:>16,}{trained / max(n, 1):>9.2%}" for name, (n, trained) in counts.items()]
    if still := sum(row[0] - row[1] for row in lora):
        lines.append(f"{still:,} of LoRA's parameters lie where nothing is run or learned")
    return "\n".join(lines)


def check_gradients(model: nn.Module) -> None:
    """After a backward: every trained tensor has a finite gradient and no other has one, or UserError with names.

    A gradient of zeros passes: LoRA's A has no other while B is zero, nor has the projector in a batch without pictures.
    Of a sharded tensor this rank's rows are looked at.
    """
    faults: dict[str, list[str]] = {}
    for name, p in model.named_parameters():
        fault = None
        if p.grad is None:
            if p.requires_grad:
                fault = "no gradient though it is trained"
        elif not p.requires_grad:
            fault = "a gradient though it is frozen"
        elif not torch.isfinite(local(p.grad)).all():
            fault = "NaN or infinity in its gradient"
        if fault:
            faults.setdefault(fault, []).append(name)
    if faults:
        some = lambda names: ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
        said = "; ".join(f"{some(names)} has {fault}" for fault, names in faults.items())
        raise UserError(f"the first backward: {said}; look at --train, --precision and the model")
