"""What the optimizer is told: which parameters learn how fast, and how the rate moves over the run."""

import math

from torch import nn


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, projector_lr: float | None = None) -> list[dict]:
    """Trainable parameters by learning rate and decay; norms and biases (one dimension) do not decay."""
    groups: dict[tuple[float, float], list] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            rate = projector_lr if projector_lr is not None and name.startswith("multi_modal_projector.") else lr
            groups.setdefault((rate, weight_decay if p.dim() > 1 else 0.0), []).append(p)
    return [{"params": ps, "lr": rate, "base_lr": rate, "weight_decay": decay} for (rate, decay), ps in groups.items()]


def rate_factor(step: int, total: int, warmup: int, schedule: str) -> float:
    """The learning rate at `step` (from 0) as a share of its peak: linear warmup, then the schedule down to 0.

    Equal to transformers' get_{cosine,linear,constant}_schedule_with_warmup.
    """
    if step < warmup:
        return step / max(1, warmup)
    done = (step - warmup) / max(1, total - warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]
