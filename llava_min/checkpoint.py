"""Checkpoints of a training run: complete or absent, checked bit by bit, readable by any number of ranks.

    checkpoints/step-000060/rank-0.safetensors …   rank K's rows of every trainable tensor and of its optimizer state
                            adapter/               what was learned so far, as others read it
                            state.json             whole shapes, who holds which rows, and all that is not a tensor
                            manifest.json          size and sha256 of every other file, written last

A checkpoint is written aside (`.tmp-…`), each file synced and read back, then renamed; only then are older ones removed.
Nothing is pickled, so a hostile folder can be wrong but not run code. Torch's own distributed checkpoint is not used,
because its metadata is a pickle.
"""

import errno
import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from llava_min.cli import UserError, note, printable, warn
from llava_min.dist import World, gather, local, own_rows, split
from llava_min.files import check_free, sync

FORMAT = 1
LOCK = ".lock"  # in a run folder
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EFBIG)  # what a folder may suffer from
BIG, BLOCK, BLOCKS = 1 << 30, 1 << 16, 64
NAME = re.compile(r"step-(\d{6,})")
KINDS = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
         torch.int32: "I32", torch.uint8: "U8"}  # safetensors' names


class Damaged(UserError):
    """A checkpoint that is not what was written."""


# ---- tensors and their rows


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All trainable tensors and the optimizer's, by name, and what the optimizer keeps beside tensors."""
    tensors, scalars = {}, {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            tensors[name] = p.detach()
            for key, value in (optimizer.state.get(p, {}) if optimizer else {}).items():
                if split(p) and isinstance(value, Tensor) and value.dim() and not split(value):
                    raise UserError(f"--optimizer: its {key} is not split over the ranks as the parameters are; run on one process")
                (tensors if isinstance(value, Tensor) else scalars)[f"{key} of {name}"] = value
    return tensors, scalars


def rng_state(device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The random streams of this process, as JSON and as tensors."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    numbers = {"python": [version, list(words), gauss], "numpy": [kind, keys.tolist(), *rest]}
    tensors = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return numbers, tensors


def set_rng_state(numbers: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
    version, words, gauss = numbers["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(numbers["numpy"]))
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)


# ---- writing


def write_tensors(tensors: dict[str, Tensor], path: Path) -> str:
    """A safetensors file, one tensor on the CPU at a time, synced; -> sha256 of what should now be in it."""
    header, end = {}, 0
    for name, x in tensors.items():
        header[name] = {"dtype": KINDS[x.dtype], "shape": list(x.shape), "data_offsets": [end, end + x.nbytes]}
        end += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return write(path, struct.pack("<Q", len(text)), text, *tensors.values())


def raw(x: Tensor) -> memoryview:
    return memoryview(x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def write_text(path: Path, data: Any) -> str:
    return write(path, json.dumps(data, indent=1).encode() + b"\n")


def write(path: Path, *parts: bytes | Tensor) -> str:
    """The parts one after the other, synced; -> their sha256."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in parts:
            data = raw(part) if isinstance(part, Tensor) else part
            file.write(data)
            digest.update(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: Path, digest: str) -> None:
    if sha256(path) != digest:
        raise OSError(0, "what was read back is not what was written", str(path))


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None, world: World,
         run: dict[str, Any], more: dict[str, Callable[[Path], None]] = {}) -> Path:
    """Write `folder`/step-… and return it, once it is durable and verified. All ranks call; `folder` is shared by them.

    optimizer: None leaves its state and the random streams out. run: whatever else is to come back, as JSON.
    more: folders within the checkpoint, each with what fills it (on rank 0).
    Raises UserError, on every rank, when a file cannot be written; what was there before is untouched.
    """
    target, aside = folder / f"step-{step:06}", folder / f".tmp-step-{step:06}"
    path = aside / f"rank-{world.rank}.safetensors"

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for name, fill in more.items():
            (aside / name).mkdir()
            fill(aside / name)

    def write_rank() -> dict[str, Any]:
        tensors, scalars = tensors_of(model, optimizer)
        kept = {name: local(x) for name, x in tensors.items() if split(x) or world.rank == 0}
        numbers, streams = rng_state(world.device) if optimizer else ({}, {})
        digest = write_tensors({**kept, **{f"rng {name}": x for name, x in streams.items()}}, path)
        check(path, digest)
        return {"sha256": digest, "rng": numbers, "scalars": scalars,
                "rows": {name: own_rows(tensors[name]) for name, x in kept.items() if x.dim()},
                "shapes": {name: list(tensors[name].shape) for name in kept}}

    def finish() -> None:
        files = {f"rank-{k}.safetensors": part["sha256"] for k, part in enumerate(parts)}
        state = {"format": FORMAT, "step": step, "ranks": len(parts), "optimizer": optimizer is not None, "run": run,
                 "scalars": parts[0]["scalars"], "shapes": {n: s for part in parts for n, s in part["shapes"].items()},
                 "rows": [part["rows"] for part in parts], "rng": [part["rng"] for part in parts]}
        files["state.json"] = write_text(aside / "state.json", state)
        for path in sorted(p for name in more for p in (aside / name).rglob("*") if p.is_file()):
            sync(path)
            files[str(path.relative_to(aside))] = sha256(path)
        check(aside / "state.json", files["state.json"])
        write_text(aside / "manifest.json", {n: {"bytes": (aside / n).stat().st_size, "sha256": d} for n, d in files.items()})
        for inner in (*(p for p in aside.rglob("*") if p.is_dir()), aside):
            sync(inner)
        if target.exists():  # a damaged one, from which this run fell back
            os.rename(target, folder / f".tmp-old-{step:06}")
        os.rename(aside, target)
        sync(folder)
        shutil.rmtree(folder / f".tmp-old-{step:06}", ignore_errors=True)

    try:
        together(world, target, begin, world.rank == 0)
        parts = together(world, target, write_rank)
        together(world, target, finish, world.rank == 0)
    finally:
        if world.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
    return target


def together(world: World, target: Path, work: Callable[[], Any], mine: bool = True) -> list[Any]:
    """Each rank's result of `work`; when it fails on one rank, UserError on all."""
    result, fault = None, None
    try:
        result = work() if mine else None
    except OSError as e:
        fault = f"{target}: cannot be written ({e.strerror or printable(e)}{f': {e.filename}' if e.filename else ''})"
    results = gather(world, [result, fault])
    if fault := next((f for _, f in results if f), None):
        raise UserError(f"{fault}; free space or mend the folder, then go on with --resume auto: older checkpoints are whole")
    return [r for r, _ in results]


class Saver:
    """The checkpoints of one run: when the next is due, and that they are written and settled.

    every: a number of steps ("500"; "0" for none), minutes ("30m"), or "epoch", the ends of which are the steps `epochs`.
    saved: the step of the newest checkpoint, -1 without one. best_step: that of the best.
    """

    def __init__(self, out: Path, world: World, every: str, keep: int, epochs: set[int], saved: int, best_step: int):
        self.out, self.world, self.every, self.keep, self.epochs, self.saved = out, world, every, keep, epochs, saved
        self.clock = time.perf_counter()
        if world.rank == 0:
            settle(out, keep, saved, best_step)  # a kill may have come before

    def due(self, step: int) -> bool:
        if self.every.endswith("m"):
            return time.perf_counter() - self.clock >= 60 * int(self.every[:-1])
        if step == self.saved or self.every == "0":
            return False
        return step in self.epochs if self.every == "epoch" else step > 0 and step % int(self.every) == 0

    def save(self, step: int, best_step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None, run: dict[str, Any],
             more: dict[str, Callable[[Path], None]]) -> None:
        save(self.out / "checkpoints", step, model, optimizer, self.world, run, more)
        if self.world.rank == 0:
            settle(self.out, self.keep, step, best_step)
        self.saved, self.clock = step, time.perf_counter()


def settle(out: Path, keep: int, newest: int, best_step: int) -> None:
    """Once the checkpoint of step `newest` is known to be whole: links `last` and `best`; older ones are removed but for
    `keep` in all and the best. Those after it were passed over as damaged and count for nothing.

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


def point(link: Path, target: Path) -> None:
    """`link` is a symbolic link to `target`, and at every moment to something."""
    aside = link.with_name(f".tmp-{link.name}")
    aside.unlink(missing_ok=True)
    aside.symlink_to(os.path.relpath(target, link.parent))
    os.replace(aside, link)


# ---- finding and reading


def steps(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    found = [p for p in folder.glob("step-*") if NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[1])


def verify(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint, every bit of it compared with the manifest. Raises Damaged, naming the file."""
    path = folder / "manifest.json"
    try:
        text = path.read_bytes()
        listed = json.loads(text)
        there = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p != path)
        if json.dumps(listed, indent=1).encode() + b"\n" != text or sorted(listed) != there:
            odd = set(there) ^ set(listed) or {path.name}
            raise Damaged(f"{folder / printable(min(odd))}: does not agree with manifest.json")
        for name, want in listed.items():
            if want != {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}:
                raise Damaged(f"{folder / name}: is not what was written (another size or sha256)")
        state = json.loads((folder / "state.json").read_bytes())
    except OSError as e:
        raise Damaged(f"{e.filename or folder}: cannot be read ({e.strerror})") from None
    except (ValueError, TypeError, AttributeError, KeyError) as e:
        if isinstance(e, Damaged):
            raise
        raise Damaged(f"{path}: is damaged ({type(e).__name__})") from None
    if state["format"] > FORMAT:
        raise UserError(f"{folder}: a checkpoint of format {state['format']}, made by a newer version; update llava_min")
    return state


def find(folder: Path) -> Path | None:
    """The newest whole checkpoint of `folder`, None when there is none at all.

    Says which ones are passed over. Raises UserError when all are damaged: that is no reason to begin anew.
    """
    faults = []
    for path in steps(folder):
        try:
            verify(path)
            return path
        except Damaged as e:
            warn(f"{e}; falling back to the next older checkpoint")
            faults.append(str(e))
    if faults:
        raise UserError(f"{folder}: no whole checkpoint among {len(faults)} ({faults[0]}); restore one, or begin anew in "
                        "another --out")
    return None


def restore(folder: Path, state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer | None,
            world: World) -> bool:
    """Put a verified checkpoint into `model` and `optimizer`, each rank reading only the rows it holds.

    -> whether the random streams came back too, which needs as many ranks as there were.
    optimizer: None for the weights alone.
    Raises UserError when the trainable tensors are not those that were saved.
    """
    files = [safe_open(folder / f"rank-{k}.safetensors", framework="pt") for k in range(state["ranks"])]
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved = {name: tuple(shape) for name, shape in state["shapes"].items()}
    want = {name: tuple(p.shape) for name, p in params.items()}
    have = {name: shape for name, shape in saved.items() if " of " not in name}
    if odd := sorted(want.items() ^ have.items()):
        raise UserError(f"{folder}: {len(odd)} trainable tensors are not those of this run, first {printable(odd[0][0])}; "
                        "give the settings the checkpoint was made with")

    def read(name: str, into: Tensor) -> None:
        mine = local(into)
        if not into.dim():
            mine.copy_(files[0].get_tensor(name))
            return
        first, end = own_rows(into)
        for file, rows in zip(files, state["rows"]):
            low, high = rows.get(name, (0, 0))
            a, b = max(low, first), min(high, end)
            if a < b:
                mine[a - first : b - first].copy_(file.get_slice(name)[a - low : b - low])

    with torch.no_grad():
        for name, p in params.items():
            read(name, p.detach())
        if optimizer is None:
            return False
        if not state["optimizer"]:
            raise UserError(f"{folder}: made with --save-only-model, so the run cannot go on from it; begin anew from its "
                            "adapter or model")
        for full, shape in saved.items():
            key, _, name = full.partition(" of ")
            if name:
                p = params[name]
                kind = next(file.get_slice(full).get_dtype() for file in files if full in file.keys())
                dtype = next(d for d, k in KINDS.items() if k == kind)
                x = torch.zeros_like(p, dtype=dtype) if shape == tuple(p.shape) else torch.zeros(shape, dtype=dtype)
                read(full, x)
                optimizer.state[p][key] = x
        for full, value in state["scalars"].items():
            key, _, name = full.partition(" of ")
            optimizer.state[params[name]][key] = value
    if state["ranks"] != world.size:
        return False
    mine = files[world.rank]
    streams = {n.removeprefix("rng "): mine.get_tensor(n) for n in mine.keys() if n.startswith("rng ")}
    set_rng_state(state["rng"][world.rank], streams, world.device)
    return True


def resume(folder: Path, identity: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, world: World,
           seed: int) -> dict[str, Any]:
    """Everything back as it was when the checkpoint `folder` was written; -> what `save` was given as `run`.

    Raises UserError when `identity`, all that decides what a run computes, is not that of the checkpoint.
    """
    state = json.loads((folder / "state.json").read_bytes())
    then, now = state["run"]["identity"], json.loads(json.dumps(identity))
    if differing := sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name)):
        show = lambda x: printable(json.dumps(x))[:60]
        told = ", ".join(f"{name} (was {show(then.get(name))}, is {show(now.get(name))})" for name in differing[:8])
        raise UserError(f"{folder}: the run was started with other settings: {told}; give the old ones, or begin anew in "
                        "another --out")
    if not restore(folder, state, model, optimizer, world):
        reseed(seed, state["step"], world.rank)
    return state["run"]


def reseed(seed: int, step: int, rank: int) -> None:
    """All random streams, as a function of the arguments alone."""
    number = int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:7])
    random.seed(number)
    np.random.seed(number % (1 << 32))
    torch.manual_seed(number)


def fingerprint(paths: Iterable[Path]) -> str:
    """sha256 over files in the order of their names; of one larger than BIG its size and some blocks: all would take minutes."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            if size <= BIG:
                digest.update(hashlib.file_digest(file, "sha256").digest())
            for k in range(BLOCKS) if size > BIG else ():
                file.seek(k * (size - BLOCK) // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()


# ---- the run folder


def place(out: str | None, resume: str, runs: Path, name: str) -> tuple[str, str | None]:
    """The run folder, and the checkpoint to go on from if there is one.

    out: the folder the user gave; else `runs`/`name`-N, with the next free N, or the last one for `resume` auto.
    resume: never, auto, or the folder of a checkpoint or of a run.
    Raises UserError when the folder is not to be written into, or what is to be resumed is not there or damaged.
    """
    if resume in ("never", "auto"):
        taken = [int(n) for p in runs.glob(f"{name}-*") if (n := p.name.rpartition("-")[2]).isdigit()]
        folder = Path(out) if out else runs / f"{name}-{max(taken, default=0) + (resume == 'never' or not taken)}"
        if resume == "never" or not (folder / LOCK).exists():
            check_free(folder)
        found = find(folder / "checkpoints") if resume == "auto" else None
        if resume == "auto" and found is None:
            note(f"{folder}: no checkpoint to go on from; starting fresh")
        return str(folder), str(found.resolve()) if found else None
    path = Path(resume).expanduser()
    if (path / "checkpoints").is_dir():
        path = find(path / "checkpoints") or path
    path = path.resolve()  # `last` and `best` are links
    if not (path / "manifest.json").exists():
        raise UserError(f"--resume {printable(resume)}: no checkpoint there; give a folder checkpoints/step-…, a run's folder, "
                        "or auto")
    verify(path)
    folder = Path(out) if out else path.parent.parent
    if folder.resolve() != path.parent.parent:
        check_free(folder)
    elif (newest := steps(path.parent)[0]) != path:
        raise UserError(f"--resume {printable(resume)}: {newest.name} is newer; give another --out to go on from the older "
                        "one, or remove the newer ones")
    return str(folder), str(path)


@contextmanager
def run_folder(out: Path, world: World) -> Iterator[None]:
    """`out` is there, and no other run writes into it. A new one is taken away again if no step was planned in it."""
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
            raise UserError(f"{out}: another run is writing into this folder; wait for it, or give another --out") from None
        for rest in (*out.glob(".tmp-*"), *(out / "checkpoints").glob(".tmp-*")):  # what a killed run left half written
            shutil.rmtree(rest) if rest.is_dir() and not rest.is_symlink() else rest.unlink()
        try:
            yield
        except OSError as e:
            if e.errno not in DISK:
                raise
            raise UserError(f"{e.filename or out}: {e.strerror}; free space or mend the folder, then go on with "
                            "--resume auto") from None
        finally:
            if new and not (out / "config.json").exists():
                shutil.rmtree(out)


def check_space(out: Path, model: nn.Module, only_model: bool) -> None:
    """Two checkpoints fit on the disk, or UserError: the older is removed only once the newer is whole."""
    values = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    need, free = 2 * values * (1 if only_model else 3), shutil.disk_usage(out).free  # Adam keeps two values beside each
    if free < need:
        raise UserError(f"{out}: {free / 1e9:.1f} GB are free and two checkpoints take {need / 1e9:.1f} GB; free space, give "
                        "another --out, --save-only-model, or --save-every 0")
