"""The folder of a run: which one it is, the checkpoint a run continues from, and the lock.

checkpoints/step-000060/   checkpoint.py says what is in it
last, best                 links to two of them
.lock                      held by the one run that writes here
"""

import errno
import fcntl
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_min.errors import UserError, info, label, shorten, warn
from llava_min.parallel.ranks import World
from llava_min.training.checkpoint import CorruptCheckpoint, restore, verify
from llava_min.training.identity import check_identity
from llava_min.training.random_state import reseed
from llava_min.training.saver import list_checkpoints
from llava_min.util.files import check_free

LOCK = ".lock"
# errors of a disk or its folder, for which the user needs no traceback
DISK_ERRORS = {
    getattr(errno, name)
    for name in "ENOSPC EDQUOT EIO EROFS EACCES EPERM EFBIG ESTALE ENOLCK".split()
}


# ---- which folder, which checkpoint


def choose_folder(out: str | None, resume: str, runs: Path, name: str) -> tuple[str, str | None]:
    """The run folder, and the checkpoint to continue from if there is one.

    out: the folder the user gave; None for `runs`/`name`-N, with the next free N, or with the last
    N if `resume` is auto. resume: never, auto, or the folder of a checkpoint or of a run. Raises
    UserError when the folder must not be written to, or what to resume is absent or corrupt.
    """
    if resume not in ("never", "auto"):
        return choose_checkpoint(out, resume)
    folder = Path(out) if out else numbered_folder(runs, name, last=resume == "auto")
    if not (folder / LOCK).exists():
        check_free(folder)
    elif resume == "never":
        raise UserError(
            f"{folder}: holds a run; continue it with the same command and {label('resume')} auto, "
            f"or give another {label('out')}"
        )
    for link in (folder / "last", folder / "best"):
        if link.is_dir() and not link.is_symlink():
            raise UserError(
                f"{link}: a folder, expected a link into checkpoints, as when a run is copied "
                "without its links; remove it: the checkpoints have all"
            )
    if resume == "never":
        return str(folder), None
    found = newest_checkpoint(folder / "checkpoints")
    if found is None:
        info(f"{folder}: no checkpoint to continue from; starting fresh")
    return str(folder), str(found.resolve()) if found else None


def numbered_folder(runs: Path, name: str, last: bool) -> Path:
    """`runs`/`name`-N: the last one there is, or the next."""
    pattern = re.compile(re.escape(name) + r"-(\d+)")
    taken = [int(m[1]) for p in runs.glob("*") if (m := pattern.fullmatch(p.name))]
    number = max(taken) if taken and last else max(taken, default=0) + 1
    return runs / f"{name}-{number}"


def choose_checkpoint(out: str | None, resume: str) -> tuple[str, str]:
    """`choose_folder` where `resume` is the folder of a checkpoint or of a run."""
    given, path = shorten(resume, 400), Path(resume).expanduser()
    if (path / "checkpoints").is_dir():
        path = newest_checkpoint(path / "checkpoints") or path
    path = path.resolve()  # `last` and `best` are links
    if not (path / "manifest.json").exists():
        raise UserError(
            f"{given}: no checkpoint there; give a folder checkpoints/step-…, a run's folder, or "
            "auto",
            "resume",
        )
    verify(path)
    run = path.parent.parent
    if not out and not (path.parent.name == "checkpoints" and (run / LOCK).exists()):
        raise UserError(f"{given}: is in no run's folder; give {label('out')} too", "resume")
    folder = Path(out) if out else run
    if folder.resolve() != run:
        check_free(folder)
    elif (newest := list_checkpoints(path.parent)[0]) != path:
        raise UserError(
            f"{given}: {newest.name} is newer; give another {label('out')} to continue from the "
            "older one, or remove the newer ones",
            "resume",
        )
    return str(folder), str(path)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`; None if there is no checkpoint at all.

    Warns about corrupt ones. Raises UserError when all are corrupt, as starting anew would hide it.
    """
    errors = []
    for path in list_checkpoints(folder):
        try:
            verify(path)
            return path
        except CorruptCheckpoint as e:
            warn(f"{e}; falling back to the next older checkpoint")
            errors.append(str(e))
    if errors:
        raise UserError(
            f"{folder}: no whole checkpoint among {len(errors)} ({errors[0]}); restore one, or "
            f"start a new run in another {label('out')}"
        )
    return None


# ---- the lock


@contextmanager
def open_run_folder(out: Path, world: World) -> Iterator[None]:
    """Make and lock `out`: no other run writes into it meanwhile.

    A new folder is removed if training never started. Disk errors within become a UserError.
    """
    if world.rank:
        yield
        return
    is_new = not out.exists() or not any(out.iterdir())
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / LOCK, "a")
    except OSError as e:
        raise UserError(
            f"{out}: cannot be written ({e.strerror}); give another {label('out')}"
        ) from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{out}: another run is writing into this folder; wait for it, or give another "
                f"{label('out')}"
            ) from None
        # what a killed run left half written
        for rest in (*out.glob(".tmp-*"), *(out / "checkpoints").glob(".tmp-*")):
            shutil.rmtree(rest) if rest.is_dir() and not rest.is_symlink() else rest.unlink()
        try:
            yield
        except OSError as e:
            if e.errno not in DISK_ERRORS:
                raise
            raise UserError(
                f"{e.filename or out}: {e.strerror}; free space or fix the folder, then continue "
                f"with {label('resume')} auto"
            ) from None
        finally:
            if is_new and not (out / "config.json").exists():
                shutil.rmtree(out)


# ---- resume


def resume(
    checkpoint: Path,
    identity: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    seed: int,
) -> dict[str, Any]:
    """Restore everything from a verified checkpoint; returns what `save` was given as `run`.

    On another number of ranks the random streams are seeded anew. Raises UserError when `identity`
    is not that of the checkpoint.
    """
    state = json.loads((checkpoint / "state.json").read_bytes())
    check_identity(checkpoint, state["run"]["identity"], identity)
    if not restore(checkpoint, state, model, optimizer, world):
        reseed(seed, state["step"], world.rank)
    return state["run"]
