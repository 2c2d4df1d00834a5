"""Which checkpoints a run writes and keeps: when the next is due, the links `last` and `best`, and
the removal of older ones.

Older checkpoints are removed only once a newer one is known to be whole.
"""

import os
import re
import shutil
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_min.data.sampler import Step, records_of
from llava_min.errors import UserError, label, warn
from llava_min.parallel.ranks import World
from llava_min.training.checkpoint import save

CHECKPOINT_NAME = re.compile(r"step-(\d{6,})")


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.glob("step-*") if CHECKPOINT_NAME.fullmatch(p.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(CHECKPOINT_NAME.fullmatch(checkpoint.name)[1])


class Saver:
    """The checkpoints of one run in `out`/checkpoints.

    every: a number of steps ("500"; "0" for none), minutes ("30m"), or "epoch", whose ends are the
    steps `epoch_ends`. keep: the number of newest ones to keep, beside the best. saved_step: that
    of the newest checkpoint, -1 without one. best_step: that of the best, -1 without one.
    """

    def __init__(
        self,
        out: Path,
        world: World,
        every: str,
        keep: int,
        epoch_ends: set[int],
        saved_step: int,
        best_step: int,
    ):
        self.out, self.world, self.every, self.keep = out, world, every, keep
        self.epoch_ends, self.saved_step = epoch_ends, saved_step
        self.last_save = time.perf_counter()
        if world.rank == 0:
            prune(out, keep, saved_step, best_step)  # a run may have been killed before it did

    def needs_save(self, step: int) -> bool:
        """Whether `step` has no checkpoint, in a run that writes any."""
        return self.every != "0" and step != self.saved_step

    def is_due(self, step: int) -> bool:
        if self.every.endswith("m"):
            return time.perf_counter() - self.last_save >= 60 * int(self.every[:-1])
        if not self.needs_save(step):
            return False
        if self.every == "epoch":
            return step in self.epoch_ends
        return step > 0 and step % int(self.every) == 0

    def save(
        self,
        step: int,
        best_step: int,
        model: nn.Module | None,
        optimizer: torch.optim.Optimizer | None,
        run: dict[str, Any],
        more: dict[str, Callable[[Path], None]],
    ) -> None:
        """Write the checkpoint of `step`, then prune; arguments as in `checkpoint.save`."""
        save(self.out / "checkpoints", step, model, optimizer, self.world, run, more)
        if self.world.rank == 0:
            prune(self.out, self.keep, step, best_step)
        self.saved_step, self.last_save = step, time.perf_counter()


def epoch_ends(plan: list[Step], num_records: int) -> set[int]:
    """The steps, counted from 1, that end a pass over the records."""
    seen = accumulate(len(records_of(step)) for step in plan)
    return {k for k, n in enumerate(seen, 1) if n % num_records == 0}


def prune(out: Path, keep: int, newest: int, best_step: int) -> None:
    """Point `last` and `best` at their checkpoints and remove all but the `keep` newest and the
    best, once the checkpoint of step `newest` is known to be whole.

    Newer ones are corrupt and ignored. Failing to remove an old one is only a warning.
    """
    found = [p for p in list_checkpoints(out / "checkpoints") if step_of(p) <= newest]
    best = next((p for p in found if step_of(p) == best_step), None)
    if found:
        update_symlink(out / "last", found[0])
    if best:
        update_symlink(out / "best", best)
    for old in found[keep:]:
        if old == best:
            continue
        aside = old.with_name(f".tmp-{old.name}")
        try:
            os.rename(old, aside)  # never half a checkpoint under a checkpoint's name
            shutil.rmtree(aside)
        except OSError as e:
            warn(f"{old}: an old checkpoint cannot be removed ({e.strerror})")


def update_symlink(link: Path, target: Path) -> None:
    """Point `link` at `target`, in one step: it exists at every moment."""
    aside = link.with_name(f".tmp-{link.name}")
    aside.unlink(missing_ok=True)
    aside.symlink_to(os.path.relpath(target, link.parent))
    os.replace(aside, link)


def check_space(out: Path, model: nn.Module, only_model: bool) -> None:
    """Raises UserError unless two checkpoints fit on the disk: the older one is removed only once
    the newer is whole.
    """
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    one = trained if only_model else 3 * trained  # Adam keeps two values beside each
    need, free = 2 * one, shutil.disk_usage(out).free
    if free < need:
        raise UserError(
            f"{out}: {free / 1e9:.1f} GB are free and two checkpoints take {need / 1e9:.1f} GB; "
            f"free space, or give another {label('out')}, {label('save_only_model')} or "
            f"{label('save_every')} 0"
        )
