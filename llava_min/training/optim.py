"""Parameter groups, learning-rate schedules, loss scaling, clipping."""

import importlib
import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llava_min.checks.training import check_warmup
from llava_min.errors import UserError, escape_controls, label
from llava_min.parallel.dtensor import is_sharded

ADAM_BETAS = (0.9, 0.999)  # the betas where none are asked for


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    projector_lr: float | None = None,
    vision_lr: float | None = None,
) -> list[dict]:
    """Trainable parameters by learning rate and decay; norms and biases (one dimension) do not
    decay.
    """
    part_lr = {"multi_modal_projector.": projector_lr, "vision_tower.": vision_lr}
    groups: dict[tuple[float, float], list] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            own = (r for part, r in part_lr.items() if r is not None and name.startswith(part))
            decay = weight_decay if p.dim() > 1 else 0.0
            groups.setdefault((next(own, lr), decay), []).append(p)
    return [
        {"params": params, "lr": rate, "base_lr": rate, "weight_decay": decay}
        for (rate, decay), params in groups.items()
    ]


def config_groups(model: nn.Module, config: Any) -> list[dict]:
    """`parameter_groups` as train.py's `config` asks for them."""
    rates = (config.projector_lr, config.vision_lr)
    return parameter_groups(model, config.lr, config.weight_decay, *rates)


def make_optimizer(
    name: str, groups: list[dict], betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """adamw, or MODULE:CLASS: anything called with parameter groups, and `betas` where it takes
    them.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=betas, fused=True)
    module, _, attribute = name.partition(":")
    make = getattr(importlib.import_module(module), attribute)
    takes_betas = "betas" in inspect.signature(make).parameters
    return make(groups, **({"betas": betas} if takes_betas else {}))


def check_optimizer(
    name: str,
    groups: list[dict],
    betas: tuple[float, float],
    device: torch.device | str = "cpu",
) -> None:
    """One step of the optimizer on stand-ins for the parameters of `groups`, which may be on meta.

    Raises UserError when there is no such module or class, when it does not take the groups, and
    when it ignores a setting.
    """
    stand_in = lambda p: nn.Parameter(torch.zeros([1] * p.dim(), device=device))
    groups = [{**g, "params": [stand_in(p) for p in g["params"]]} for g in groups]
    try:
        optimizer = make_optimizer(name, groups, betas)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.state, optimizer.defaults  # what checkpoints and the lines below use
    except Exception as e:  # whatever a foreign class raises
        raise UserError(
            f"{escape_controls(name)}: {escape_controls(e)[:300]}; give adamw, or MODULE:CLASS of "
            "an "
            "installed optimizer that steps without a closure",
            "optimizer",
        ) from None
    decays = any(g["weight_decay"] for g in groups)
    for keyword, given in (("betas", betas != ADAM_BETAS), ("weight_decay", decays)):
        if given and keyword not in optimizer.defaults:
            raise UserError(
                f"{escape_controls(name)} does not take it; leave it out, or give another "
                f"{label('optimizer')}",
                keyword,
            )


def warmup_steps(config: Any, steps: int) -> int:
    """The steps of warmup in a run of `steps`; UserError if that is longer than the run."""
    warmup = config.warmup_steps or round(config.warmup_ratio * steps)
    check_warmup(warmup, steps)
    return warmup


def lr_factor(step: int, total: int, warmup: int, schedule: str) -> float:
    """The learning rate at `step` (from 0) as a share of its peak: linear warmup, then down to 0.

    Equal to transformers' get_{cosine,linear,constant}_schedule_with_warmup.
    """
    if step < warmup:
        return step / max(1, warmup)
    done = (step - warmup) / max(1, total - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return {"constant": 1.0, "linear": 1 - done, "cosine": cosine}[schedule]


class LossScale:
    """Dynamic scaling of an fp16 loss (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740).

    The constants are those of `torch.amp.GradScaler`. That class looks for overflow in what one
    rank holds; here the norm over all ranks decides, so their scales stay equal.
    """

    def __init__(self, enabled: bool):
        self.enabled, self.scale, self.good = enabled, 65536.0 if enabled else 1.0, 0

    def update(self, finite: bool) -> None:
        """Halve after an overflow; double after 2,000 steps without one."""
        if not self.enabled:
            return
        self.good = self.good + 1 if finite else 0
        if not finite or self.good == 2000:
            self.scale, self.good = self.scale * (2.0 if finite else 0.5), 0

    @property
    def searching(self) -> bool:
        """An overflow may be the scale's fault and not the data's."""
        return self.enabled and self.scale > 1


def clip_gradients(params: Sequence[Tensor], scale: float, max_norm: float) -> Tensor:
    """Divide the gradients by `scale`, then scale them down to `max_norm` over all ranks (0: leave
    them).

    Returns their norm before clipping, which is not finite if any gradient is not.
    """
    grads = [p.grad for p in params if p.grad is not None]
    if scale != 1:
        torch._foreach_mul_(grads, 1 / scale)
    norm = torch.nn.utils.get_total_norm(grads)
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    return norm.full_tensor() if is_sharded(norm) else norm
