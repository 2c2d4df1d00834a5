"""One checkpoint of a training run: written whole or not at all, checked bit by bit, readable by
any number of ranks.

    step-000060/rank-0.safetensors …   rank K's rows of every trainable tensor and of its optimizer state
                adapter/               of a LoRA run: what was learned so far, as others read it
                state.json             whole shapes, who holds which rows, and all that is not a tensor
                manifest.json          size and sha256 of every other file, written last

With `--save-only-model` the weights are in it once and nothing else: the adapter of a LoRA run,
whose rank files are then empty, or the trained tensors of another; what is frozen comes from the
base (`python -m llava_min finish`).

It is written aside (`.tmp-…`), each file synced and read back, then renamed; checkpoint.py says
when one is due and which are kept. Nothing is pickled, so a hostile folder can be wrong but not run
code. Torch's own distributed checkpoint is not used, because its metadata is a pickle.
"""

import hashlib
import json
import os
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from llava_min.errors import UserError, escape_controls
from llava_min.parallel.dtensor import is_sharded, local_rows, local_shard
from llava_min.parallel.ranks import World, all_gather
from llava_min.util.files import sync

FORMAT = 1
# of state.json
PARTS = {"format", "step", "ranks", "optimizer", "run", "scalars", "shapes", "rows", "rng"}
KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}  # safetensors' names


class CorruptCheckpoint(UserError):
    """A checkpoint that is not what was written."""


# ---- what is kept


def tensors_of(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All trainable tensors and the optimizer's, by name, and what the optimizer keeps beside
    tensors.
    """
    tensors, scalars = {}, {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            tensors[name] = p.detach()
            for key, value in (optimizer.state.get(p, {}) if optimizer else {}).items():
                if (
                    is_sharded(p)
                    and isinstance(value, Tensor)
                    and value.dim()
                    and not is_sharded(value)
                ):
                    raise UserError(
                        f"--optimizer: its {key} is not split over the ranks as the parameters "
                        "are; run on one process"
                    )
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


def set_rng_state(
    numbers: dict[str, Any], tensors: dict[str, Tensor], device: torch.device
) -> None:
    version, words, gauss = numbers["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(numbers["numpy"]))
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)


# ---- writing


def raw(x: Tensor) -> memoryview:
    return memoryview(x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def write(path: Path, *parts: bytes | Tensor) -> str:
    """The parts one after the other, one tensor on the CPU at a time, synced and read back; ->
    their sha256.
    """
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in parts:
            data = raw(part) if isinstance(part, Tensor) else part
            file.write(data)
            digest.update(data)
        file.flush()
        os.fsync(file.fileno())
    if sha256(path) != digest.hexdigest():
        raise OSError(0, "what was read back is not what was written", str(path))
    return digest.hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """A safetensors file."""
    header, end = {}, 0
    for name, x in tensors.items():
        header[name] = {
            "dtype": KINDS[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [end, end + x.nbytes],
        }
        end += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return write(path, struct.pack("<Q", len(text)), text, *tensors.values())


def as_json(data: Any) -> bytes:
    return json.dumps(data, indent=1).encode() + b"\n"


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def together(world: World, target: Path, work: Callable[[], Any], mine: bool = True) -> list[Any]:
    """Each rank's result of `work`; when it fails on one rank, UserError on all."""
    result, fault = None, None
    try:
        result = work() if mine else None
    except OSError as e:
        fault = f"{target}: cannot be written ({e.strerror or escape_controls(e)}{f': {e.filename}' if e.filename else ''})"
    results = all_gather(world, [result, fault])
    if fault := next((f for _, f in results if f), None):
        raise UserError(
            f"{fault}; free space or mend the folder, then go on with --resume auto: older "
            "checkpoints are whole"
        )
    return [r for r, _ in results]


def save(
    folder: Path,
    step: int,
    model: nn.Module | None,
    optimizer: torch.optim.Optimizer | None,
    world: World,
    run: dict[str, Any],
    more: dict[str, Callable[[Path], None]] = {},
) -> Path:
    """Write `folder`/step-… and return it, once it is durable and verified. All ranks call;
    `folder` is shared by them.

    model: None where `more` has the weights already. optimizer: None leaves its state and the
    random streams out. run: whatever else is to come back, as JSON. more: folders within the
    checkpoint, each with what fills it (on rank 0). Raises UserError, on every rank, when a file
    cannot be written; what was there before is untouched.
    """
    target, aside = folder / f"step-{step:06}", folder / f".tmp-step-{step:06}"

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for name, fill in more.items():
            (aside / name).mkdir()
            fill(aside / name)

    def write_rank() -> dict[str, Any]:
        tensors, scalars = tensors_of(model, optimizer) if model else ({}, {})
        kept = {
            name: local_shard(x) for name, x in tensors.items() if is_sharded(x) or world.rank == 0
        }
        numbers, streams = rng_state(world.device) if optimizer else ({}, {})
        digest = write_tensors(
            aside / f"rank-{world.rank}.safetensors",
            kept | {f"rng {n}": x for n, x in streams.items()},
        )
        return {
            "sha256": digest,
            "rng": numbers,
            "scalars": scalars,
            "rows": {name: local_rows(tensors[name]) for name, x in kept.items() if x.dim()},
            "shapes": {name: list(tensors[name].shape) for name in kept},
        }

    def finish() -> None:
        files = {f"rank-{k}.safetensors": part["sha256"] for k, part in enumerate(parts)}
        state = {
            "format": FORMAT,
            "step": step,
            "ranks": len(parts),
            "optimizer": optimizer is not None,
            "run": run,
            "scalars": parts[0]["scalars"],
            "shapes": {n: s for part in parts for n, s in part["shapes"].items()},
            "rows": [part["rows"] for part in parts],
            "rng": [part["rng"] for part in parts],
        }
        files["state.json"] = write(aside / "state.json", as_json(state))
        for path in sorted(p for name in more for p in (aside / name).rglob("*") if p.is_file()):
            sync(path)
            files[str(path.relative_to(aside))] = sha256(path)
        listed = {
            name: {"bytes": (aside / name).stat().st_size, "sha256": digest}
            for name, digest in files.items()
        }
        write(aside / "manifest.json", as_json(listed))
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


# ---- reading


def verify(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint, every bit of it compared with the manifest. Raises Damaged, naming
    the file.
    """
    path = folder / "manifest.json"
    try:
        text = path.read_bytes()
        listed = json.loads(text)
        there = sorted(
            str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p != path
        )
        if as_json(listed) != text or sorted(listed) != there:
            odd = set(there) ^ set(listed) or {path.name}
            raise CorruptCheckpoint(
                f"{folder / escape_controls(min(odd))}: does not agree with manifest.json"
            )
        for name, want in listed.items():
            if want != {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}:
                raise CorruptCheckpoint(
                    f"{folder / name}: is not what was written (another size or sha256)"
                )
        state = json.loads((folder / "state.json").read_bytes())
    except OSError as e:
        raise CorruptCheckpoint(f"{e.filename or folder}: cannot be read ({e.strerror})") from None
    except (ValueError, TypeError, AttributeError, KeyError) as e:
        if isinstance(e, CorruptCheckpoint):
            raise
        raise CorruptCheckpoint(f"{path}: is damaged ({type(e).__name__})") from None
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise CorruptCheckpoint(f"{folder / 'state.json'}: is not the state of a run")
    if state["format"] > FORMAT:
        raise UserError(
            f"{folder}: a checkpoint of format {state['format']}, made by a newer version; update "
            "llava_min"
        )
    ranks = {name for name in listed if re.fullmatch(r"rank-\d+\.safetensors", name)}
    if (
        not PARTS <= state.keys()
        or ranks != {f"rank-{k}.safetensors" for k in range(len(ranks))}
        or len(ranks) != state["ranks"]
    ):
        raise CorruptCheckpoint(f"{folder}: lacks parts of a run's state")
    return state


def restore(
    folder: Path,
    state: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    world: World,
) -> bool:
    """Put a verified checkpoint into `model` and `optimizer`, each rank reading only the rows it
    holds.

    -> whether the random streams came back too, which needs as many ranks as there were.
    optimizer: None for the weights alone.
    Raises UserError when the trainable tensors are not those that were saved.
    """
    if optimizer is not None and not state["optimizer"]:
        raise UserError(
            f"{folder}: made with --save-only-model, so the run cannot go on from it; begin anew "
            "from its "
            f"adapter or model, which `python -m llava_min finish {folder} OUT` makes"
        )
    files = [
        safe_open(folder / f"rank-{k}.safetensors", framework="pt") for k in range(state["ranks"])
    ]
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved = {name: tuple(shape) for name, shape in state["shapes"].items()}
    want = {name: tuple(p.shape) for name, p in params.items()}
    have = {name: shape for name, shape in saved.items() if " of " not in name}
    if odd := sorted(want.items() ^ have.items()):
        raise UserError(
            f"{folder}: {len(odd)} trainable tensors are not those of this run, first "
            f"{escape_controls(odd[0][0])}; "
            "give the settings the checkpoint was made with"
        )

    def read(name: str, into: Tensor) -> None:
        mine = local_shard(into)
        if not into.dim():
            mine.copy_(files[0].get_tensor(name))
            return
        first, end = local_rows(into)
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
        dtypes = {kind: dtype for dtype, kind in KINDS.items()}
        for full in (name for name in saved if name not in have):
            key, name = full.split(" of ", 1)
            p, kind = (
                params[name],
                next(file.get_slice(full).get_dtype() for file in files if full in file.keys()),
            )
            # as p is split, the values beside it are
            like = p if saved[full] == want[name] else torch.empty(saved[full])
            x = torch.zeros_like(like, dtype=dtypes[kind])
            read(full, x)
            optimizer.state[p][key] = x
        for full, value in state["scalars"].items():
            key, name = full.split(" of ", 1)
            optimizer.state[params[name]][key] = value
    if state["ranks"] != world.size:
        return False
    mine = files[world.rank]
    streams = {
        n.removeprefix("rng "): mine.get_tensor(n) for n in mine.keys() if n.startswith("rng ")
    }
    set_rng_state(state["rng"][world.rank], streams, world.device)
    return True
