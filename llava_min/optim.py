"""What the optimizer is told: which parameters learn how fast, how the rate moves, how fp16 gradients are kept in range."""

import importlib
import inspect
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llava_min.cli import UserError, printable
from llava_min.shard import split

ADAM = (0.9, 0.999)  # the betas where none are asked for


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, projector_lr: float | None = None,
                     vision_lr: float | None = None) -> list[dict]:
    """Trainable parameters by learning rate and decay; norms and biases (one dimension) do not decay."""
    own = {"multi_modal_projector.": projector_lr, "vision_tower.": vision_lr}
    groups: dict[tuple[float, float], list] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            rate = next((r for part, r in own.items() if r is not None and name.startswith(part)), lr)
            groups.setdefault((rate, weight_decay if p.dim() > 1 else 0.0), []).append(p)
    return [{"params": ps, "lr": rate, "base_lr": rate, "weight_decay": decay} for (rate, decay), ps in groups.items()]


def make_optimizer(name: str, groups: list[dict], betas: tuple[float, float]) -> torch.optim.Optimizer:
    """adamw, or MODULE:CLASS: anything that is called with parameter groups, and with `betas` where it takes them."""
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=betas, fused=True)
    module, _, attribute = name.partition(":")
    make = getattr(importlib.import_module(module), attribute)
    return make(groups, **({"betas": betas} if "betas" in inspect.signature(make).parameters else {}))


def check_optimizer(name: str, groups: list[dict], betas: tuple[float, float], device: torch.device | str = "cpu") -> None:
    """One step of it on stand-ins of one number for the parameters of `groups`, which may be on meta.

    Raises UserError when there is no such module or class, it does not take the groups, or has no use for a setting.
    """
    groups = [{**g, "params": [nn.Parameter(torch.zeros([1] * p.dim(), device=device)) for p in g["params"]]} for g in groups]
    try:
        optimizer = make_optimizer(name, groups, betas)
        for p in (p for g in optimizer.param_groups for p in g["params"]):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.state, optimizer.defaults  # what checkpoints and the lines below use
    except Exception as e:  # whatever a stranger's class raises
        raise UserError(f"optimizer {printable(name)}: {printable(e)[:300]}; give adamw, or MODULE:CLASS of an optimizer that is "
                        "installed and steps without a closure") from None
    for keyword, given in (("betas", betas != ADAM), ("weight_decay", any(g["weight_decay"] for g in groups))):
        if given and keyword not in optimizer.defaults:
            raise UserError(f"{keyword}: {printable(name)} does not know it; leave it out, or give another --optimizer")


def rate_factor(step: int, total: int, warmup: int, schedule: str) -> float:
    """The learning rate at `step` (from 0) as a share of its peak: linear warmup, then the schedule down to 0.

    Equal to transformers' get_{cosine,linear,constant}_schedule_with_warmup.
    """
    if step < warmup:
        return step / max(1, warmup)
    done = (step - warmup) / max(1, total - warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]


class LossScale:
    """Dynamic scaling of an fp16 loss (Micikevicius et al. 2018), with the constants of `torch.amp.GradScaler`.

    That class looks for overflow in what one rank holds; here the norm over all ranks decides, so they stay alike.
    """

    def __init__(self, enabled: bool):
        self.enabled, self.scale, self.good = enabled, 65536.0 if enabled else 1.0, 0

    def update(self, finite: bool) -> None:
        if not self.enabled:
            return
        self.good = self.good + 1 if finite else 0
        if not finite or self.good == 2000:
            self.scale, self.good = self.scale * (2.0 if finite else 0.5), 0

    @property
    def searching(self) -> bool:
        """An overflow may be the scale's fault and not the data's."""
        return self.enabled and self.scale > 1


def clip(params: Sequence[Tensor], scale: float, most: float) -> Tensor:
    """Divide the gradients by `scale`, then scale them down to a norm of `most` over all ranks (0: leave them).

    -> their norm before, which is not finite if any of them is not.
    """
    grads = [p.grad for p in params if p.grad is not None]
    if scale != 1:
        torch._foreach_mul_(grads, 1 / scale)
    norm = torch.nn.utils.get_total_norm(grads)
    if most:
        torch.nn.utils.clip_grads_with_norm_(params, most, norm)
    return norm.full_tensor() if split(norm) else norm
