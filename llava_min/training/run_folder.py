"""The checkpoints of a run: when one is due, which are kept, and where a run that was killed goes
on.

    checkpoints/step-000060/   snapshot.py says what is in it
    last, best                 links to two of them
    .lock                      held by the one run that writes here

Older checkpoints are removed only once a newer one is known to be whole, and a damaged one is
passed over for the next older.
"""

import errno
import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from llava_min.checks.settings import FREE
from llava_min.data.formats import Record
from llava_min.data.records import hash_images, hash_records, sources
from llava_min.errors import UserError, escape_controls, info, warn
from llava_min.load import Checkpoint
from llava_min.parallel.ranks import World
from llava_min.training.checkpoint import CorruptCheckpoint, restore, save, verify
from llava_min.util.files import check_free

LOCK = ".lock"  # in a run folder
# what a folder may suffer from
DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EFBIG,
    errno.ESTALE,
    errno.ENOLCK,
)
# bytes of a file, bytes of a block, blocks that stand for the file
BIG, BLOCK, BLOCKS = 1 << 30, 1 << 16, 64
PICTURES = "contents of pictures"  # in a run's identity
NAME = re.compile(r"step-(\d{6,})")


# ---- those there are


def steps(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    found = [p for p in folder.glob("step-*") if NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[1])


def find(folder: Path) -> Path | None:
    """The newest whole checkpoint of `folder`, None when there is none at all.

    Says which ones are passed over. Raises UserError when all are damaged: that is no reason to
    begin anew.
    """
    faults = []
    for path in steps(folder):
        try:
            verify(path)
            return path
        except CorruptCheckpoint as e:
            warn(f"{e}; falling back to the next older checkpoint")
            faults.append(str(e))
    if faults:
        raise UserError(
            f"{folder}: no whole checkpoint among {len(faults)} ({faults[0]}); restore one, or "
            "begin anew in "
            "another --out"
        )
    return None


# ---- when one is due, and which are kept


def point(link: Path, target: Path) -> None:
    """`link` is a symbolic link to `target`, and at every moment to something."""
    aside = link.with_name(f".tmp-{link.name}")
    aside.unlink(missing_ok=True)
    aside.symlink_to(os.path.relpath(target, link.parent))
    os.replace(aside, link)


def settle(out: Path, keep: int, newest: int, best_step: int) -> None:
    """Once the checkpoint of step `newest` is known to be whole: links `last` and `best`; older
    ones are removed but for `keep` in all and the best. Those after it were passed over as damaged
    and count for nothing.

    One that cannot be removed is no reason to stop.
    """
    found = [p for p in steps(out / "checkpoints") if step_of(p) <= newest]
    best = next((p for p in found if p.name == f"step-{best_step:06}"), None)
    for name, target in (("last", found[0] if found else None), ("best", best)):
        if target:
            point(out / name, target)
    for old in found[keep:]:
        if old != best:
            aside = old.with_name(f".tmp-{old.name}")
            try:
                os.rename(old, aside)  # never half a checkpoint under a checkpoint's name
                shutil.rmtree(aside)
            except OSError as e:
                warn(f"{old}: an old checkpoint cannot be removed ({e.strerror})")


class Saver:
    """The checkpoints of one run: when the next is due, and that they are written and settled.

    every: a number of steps ("500"; "0" for none), minutes ("30m"), or "epoch", the ends of which
    are the steps `epochs`. saved: the step of the newest checkpoint, -1 without one. best_step:
    that of the best.
    """

    def __init__(
        self,
        out: Path,
        world: World,
        every: str,
        keep: int,
        epochs: set[int],
        saved: int,
        best_step: int,
    ):
        self.out, self.world, self.every, self.keep, self.epochs, self.saved = (
            out,
            world,
            every,
            keep,
            epochs,
            saved,
        )
        self.clock = time.perf_counter()
        if world.rank == 0:
            settle(out, keep, saved, best_step)  # a kill may have come before

    def lacks(self, step: int) -> bool:
        """Whether `step` has no checkpoint, and the run writes any."""
        return self.every != "0" and step != self.saved

    def due(self, step: int) -> bool:
        if self.every.endswith("m"):
            return time.perf_counter() - self.clock >= 60 * int(self.every[:-1])
        if not self.lacks(step):
            return False
        return (
            step in self.epochs
            if self.every == "epoch"
            else step > 0 and step % int(self.every) == 0
        )

    def save(
        self,
        step: int,
        best_step: int,
        model: nn.Module | None,
        optimizer: torch.optim.Optimizer | None,
        run: dict[str, Any],
        more: dict[str, Callable[[Path], None]],
    ) -> None:
        save(self.out / "checkpoints", step, model, optimizer, self.world, run, more)
        if self.world.rank == 0:
            settle(self.out, self.keep, step, best_step)
        self.saved, self.clock = step, time.perf_counter()


# ---- going on


def resume(
    folder: Path,
    identity: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    seed: int,
) -> dict[str, Any]:
    """Everything back as it was when the checkpoint `folder` was written; -> what `save` was given
    as `run`.

    Raises UserError when `identity`, all that decides what a run computes, is not that of the
    checkpoint.
    """
    state = json.loads((folder / "state.json").read_bytes())
    then, now = state["run"]["identity"], json.loads(json.dumps(identity))
    differing = differences(then, now)
    if list(differing) == [PICTURES]:  # one may have been mended
        warn(
            f"{folder}: some pictures are not what they were when the run was started; it goes on "
            "with what they are"
        )
    elif differing:
        raise UserError(
            f"{folder}: the run was started with other settings: "
            f"{', '.join(list(differing.values())[:8])}; give the "
            "old ones, or begin anew in another --out"
        )
    if not restore(folder, state, model, optimizer, world):
        reseed(seed, state["step"], world.rank)
    return state["run"]


def differences(then: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Of two identities: each name whose values differ -> how."""
    show = lambda x: (
        x[:12] if re.fullmatch("[0-9a-f]{64}", str(x)) else escape_controls(json.dumps(x))[:60]
    )
    return {
        name: f"{escape_controls(name)} (was {show(then.get(name))}, is {show(now.get(name))})"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    }


def base_identity(ready: Checkpoint) -> dict[str, Any]:
    """What of the model that a run begins with decides what it computes; not where it lies."""
    config, image = ready.model.config, ready.processor.image_config
    weights = {entry.path for entry in ready.entries.values()}
    folder = ready.entries["language_model.norm.weight"].path.parent
    tokenizer = {
        *folder.glob("token*"),
        *folder.glob("added_tokens.json"),
        *folder.glob("special_tokens_map.json"),
    }
    parts = {
        "config": config,
        "text_config": config.text,
        "vision_config": config.vision,
        "image_processor": image,
    }
    return {
        "base model": hash_files(sorted(weights)),
        "tokenizer": hash_files(sorted(tokenizer)),
        "chat template": ready.processor.template_name,
        **{
            f"{part}.{name}": value
            for part, values in parts.items()
            for name, value in vars(values).items()
            # two are told by themselves, one is a place
            if name not in ("text", "vision", "vision_source")
        },
    }


def identity_of(
    ready: Checkpoint, data: str, records: Sequence[Record], knobs: Any, rows: int, steps: int
) -> dict[str, Any]:
    """All that decides what a run computes: every rank has it alike, and a run that goes on has it
    as it was.

    ready: the checkpoint it begins with. records: those of `data`, files with weights. rows: of a
    step, over all ranks.
    """
    mixture = sources(data)
    return {
        "training data": hash_files(path for path, _ in mixture),
        "weights of the data": [str(w) for _, w in mixture],
        "records": len(records),
        "ids and names of pictures": hash_records(records),
        PICTURES: hash_images(records),
        **base_identity(ready),
        "rows of a step": rows,
        "steps": steps,
        **{name: value for name, value in vars(knobs).items() if name not in FREE},
    }


def reseed(seed: int, step: int, rank: int) -> None:
    """All random streams, as a function of the arguments alone."""
    number = int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:7])
    random.seed(number)
    np.random.seed(number % (1 << 32))
    torch.manual_seed(number)


def hash_files(paths: Iterable[Path]) -> str:
    """sha256 over files in their order; of one larger than BIG its size and some blocks: all would
    take minutes.
    """
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            if size <= BIG:
                digest.update(hashlib.file_digest(file, "sha256").digest())
                continue
            for k in range(BLOCKS):
                file.seek(k * (size - BLOCK) // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()


# ---- the run folder


def place(out: str | None, resume: str, runs: Path, name: str) -> tuple[str, str | None]:
    """The run folder, and the checkpoint to go on from if there is one.

    out: the folder the user gave; else `runs`/`name`-N, with the next free N, or the last one for
    `resume` auto. resume: never, auto, or the folder of a checkpoint or of a run. Raises UserError
    when the folder is not to be written into, or what is to be resumed is not there or damaged.
    """
    if resume in ("never", "auto"):
        taken = [
            int(m[1])
            for p in runs.glob("*")
            if (m := re.fullmatch(re.escape(name) + r"-(\d+)", p.name))
        ]
        number = max(taken) if taken and resume == "auto" else max(taken, default=0) + 1
        folder = Path(out) if out else runs / f"{name}-{number}"
        if resume == "never" and (folder / LOCK).exists():
            raise UserError(
                f"{folder}: holds a run; go on with the same command and --resume auto, or give "
                "another --out"
            )
        if not (folder / LOCK).exists():
            check_free(folder)
        for link in (folder / "last", folder / "best"):
            if link.is_dir() and not link.is_symlink():
                raise UserError(
                    f"{link}: a folder, expected a link into checkpoints, as when a run is copied "
                    "without its links; "
                    "remove it: the checkpoints have all"
                )
        found = find(folder / "checkpoints") if resume == "auto" else None
        if resume == "auto" and found is None:
            info(f"{folder}: no checkpoint to go on from; starting fresh")
        return str(folder), str(found.resolve()) if found else None
    path = Path(resume).expanduser()
    if (path / "checkpoints").is_dir():
        path = find(path / "checkpoints") or path
    path = path.resolve()  # `last` and `best` are links
    if not (path / "manifest.json").exists():
        raise UserError(
            f"--resume {escape_controls(resume)}: no checkpoint there; give a folder "
            "checkpoints/step-…, a run's folder, "
            "or auto"
        )
    verify(path)
    if not out and not (path.parent.name == "checkpoints" and (path.parent.parent / LOCK).exists()):
        raise UserError(
            f"--resume {escape_controls(resume)}: lies in no run's folder; give --out, too"
        )
    folder = Path(out) if out else path.parent.parent
    if folder.resolve() != path.parent.parent:
        check_free(folder)
    elif (newest := steps(path.parent)[0]) != path:
        raise UserError(
            f"--resume {escape_controls(resume)}: {newest.name} is newer; give another --out to go "
            "on from the older "
            "one, or remove the newer ones"
        )
    return str(folder), str(path)


@contextmanager
def run_folder(out: Path, world: World) -> Iterator[None]:
    """`out` is there, and no other run writes into it. A new one is taken away again if no step was
    planned in it.
    """
    if world.rank:
        yield
        return
    new = not out.exists() or not any(out.iterdir())
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / LOCK, "a")
    except OSError as e:
        raise UserError(f"{out}: cannot be written ({e.strerror}); give another --out") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{out}: another run is writing into this folder; wait for it, or give another "
                "--out"
            ) from None
        # what a killed run left half written
        for rest in (*out.glob(".tmp-*"), *(out / "checkpoints").glob(".tmp-*")):
            shutil.rmtree(rest) if rest.is_dir() and not rest.is_symlink() else rest.unlink()
        try:
            yield
        except OSError as e:
            if e.errno not in DISK:
                raise
            raise UserError(
                f"{e.filename or out}: {e.strerror}; free space or mend the folder, then go on "
                "with "
                "--resume auto"
            ) from None
        finally:
            if new and not (out / "config.json").exists():
                shutil.rmtree(out)


def check_space(out: Path, model: nn.Module, only_model: bool) -> None:
    """Two checkpoints fit on the disk, or UserError: the older is removed only once the newer is
    whole.
    """
    values = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    # Adam keeps two values beside each
    need, free = 2 * values * (1 if only_model else 3), shutil.disk_usage(out).free
    if free < need:
        raise UserError(
            f"{out}: {free / 1e9:.1f} GB are free and two checkpoints take {need / 1e9:.1f} GB; "
            "free space, give "
            "another --out, --save-only-model, or --save-every 0"
        )
