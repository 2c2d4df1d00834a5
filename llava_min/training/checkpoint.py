"""One checkpoint of a training run: written whole or not at all, verified byte by byte, readable by
any number of ranks.

    step-000060/rank-0.safetensors …   rank K's rows of every trainable tensor and of its optimizer
                                       state, and the rank's random streams
                adapter/               in a LoRA run: what is trained so far, as a PEFT folder
                state.json             shapes, who holds which rows, and all that is no tensor
                manifest.json          size and sha256 of every other file, written last

With `save_only_model` the weights are in it once and nothing else: the adapter of a LoRA run, whose
rank files are then empty, or the trained tensors of another run; frozen weights come from the base
(`python -m llava_min finish`).

It is written to `.tmp-…`, each file synced and read back, then renamed. saver.py decides when one
is due and which are kept. Nothing is pickled, so a hostile folder can be wrong but not run code;
torch's own distributed checkpoint is not used because its metadata is a pickle.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_min.errors import UserError, escape_controls, label
from llava_min.parallel.dtensor import is_sharded, local_rows, local_shard
from llava_min.parallel.ranks import World, all_gather
from llava_min.training.durable import as_json, sha256, write, write_tensors
from llava_min.training.random_state import get_rng_state, set_rng_state
from llava_min.training.stored import OF, RNG, StoredTensors, split_slot_name, trained_state
from llava_min.util.files import sync

FORMAT = 1
STATE_KEYS = set("format step ranks optimizer run scalars shapes rows rng".split())


class CorruptCheckpoint(UserError):
    """A checkpoint that is not what was written."""


# ---- writing


def on_all_ranks(world: World, target: Path, work: Callable[[], Any] | None) -> list[Any]:
    """The results of each rank's `work` (None: nothing to do); if it fails on one rank, UserError
    on all.
    """
    result, error = None, None
    try:
        result = work() if work else None
    except OSError as e:
        where = f": {e.filename}" if e.filename else ""
        reason = e.strerror or escape_controls(e)
        error = f"{target}: cannot be written ({reason}{where})"
    results = all_gather(world, [result, error])
    if error := next((e for _, e in results if e), None):
        raise UserError(
            f"{error}; free space or fix the folder, then continue with {label('resume')} auto: "
            "older checkpoints are whole"
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
    """Write `folder`/step-… and return it once it is durable and verified. All ranks call this;
    they share `folder`.

    model: None if `more` has the weights already. optimizer: None to leave out its state and the
    random streams. run: what else has to come back, as JSON. more: folders within the checkpoint,
    each with what fills it (on rank 0). Raises UserError on every rank when a file cannot be
    written; earlier checkpoints are untouched.
    """
    target, aside = folder / f"step-{step:06}", folder / f".tmp-step-{step:06}"
    first = world.rank == 0
    try:
        on_all_ranks(world, target, partial(start_aside, aside, more) if first else None)
        parts = on_all_ranks(world, target, partial(write_rank, aside, model, optimizer, world))
        state = {
            "format": FORMAT,
            "step": step,
            "ranks": len(parts),
            "optimizer": optimizer is not None,
            "run": run,
            "scalars": parts[0]["scalars"],
            "shapes": {n: shape for part in parts for n, shape in part["shapes"].items()},
            "rows": [part["rows"] for part in parts],
            "rng": [part["rng"] for part in parts],
        }
        hashes = {f"rank-{k}.safetensors": part["sha256"] for k, part in enumerate(parts)}
        commit = partial(commit_aside, aside, target, state, hashes, list(more))
        on_all_ranks(world, target, commit if first else None)
    finally:
        if first:
            shutil.rmtree(aside, ignore_errors=True)
    return target


def start_aside(aside: Path, more: dict[str, Callable[[Path], None]]) -> None:
    """A fresh `aside` with the folders of `more` filled."""
    aside.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for name, fill in more.items():
        (aside / name).mkdir()
        fill(aside / name)


def write_rank(
    aside: Path, model: nn.Module | None, optimizer: torch.optim.Optimizer | None, world: World
) -> dict[str, Any]:
    """Write this rank's file; returns what state.json and the manifest say about it."""
    tensors, scalars = trained_state(model, optimizer) if model else ({}, {})
    # rank 0 also has what is not sharded
    mine = {n: local_shard(x) for n, x in tensors.items() if is_sharded(x) or world.rank == 0}
    numbers, streams = get_rng_state(world.device) if optimizer else ({}, {})
    named_streams = {RNG + name: x for name, x in streams.items()}
    return {
        "sha256": write_tensors(aside / f"rank-{world.rank}.safetensors", mine | named_streams),
        "rng": numbers,
        "scalars": scalars,
        "rows": {name: local_rows(tensors[name]) for name, x in mine.items() if x.dim()},
        "shapes": {name: list(tensors[name].shape) for name in mine},
    }


def commit_aside(
    aside: Path, target: Path, state: dict[str, Any], hashes: dict[str, str], folders: list[str]
) -> None:
    """Add state.json and the manifest, sync everything, and give `aside` its name."""
    hashes = hashes | {"state.json": write(aside / "state.json", as_json(state))}
    for path in sorted(p for name in folders for p in (aside / name).rglob("*") if p.is_file()):
        sync(path)
        hashes[str(path.relative_to(aside))] = sha256(path)
    size = lambda name: (aside / name).stat().st_size
    manifest = {name: {"bytes": size(name), "sha256": h} for name, h in hashes.items()}
    write(aside / "manifest.json", as_json(manifest))

    # folders before the rename, and the folder of the rename after it
    for inner in (*(p for p in aside.rglob("*") if p.is_dir()), aside):
        sync(inner)
    replaced = target.with_name(f".tmp-old-{state['step']:06}")
    if target.exists():  # a corrupt one, which this run passed over
        os.rename(target, replaced)
    os.rename(aside, target)
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


# ---- reading


def verify(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint once all its bytes agree with the manifest.

    Raises CorruptCheckpoint, naming the file.
    """
    path = folder / "manifest.json"
    try:
        text = path.read_bytes()
        manifest = json.loads(text)
        present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        if as_json(manifest) != text or (odd := (present - {path.name}) ^ set(manifest)):
            name = escape_controls(min(odd)) if as_json(manifest) == text else path.name
            raise CorruptCheckpoint(f"{folder / name}: does not agree with manifest.json")
        for name, want in manifest.items():
            if want != {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}:
                raise CorruptCheckpoint(
                    f"{folder / name}: is not what was written (another size or sha256)"
                )
        state = json.loads((folder / "state.json").read_bytes())
    except OSError as e:
        raise CorruptCheckpoint(f"{e.filename or folder}: cannot be read ({e.strerror})") from None
    except CorruptCheckpoint:
        raise
    except (ValueError, TypeError, AttributeError, KeyError) as e:
        raise CorruptCheckpoint(f"{path}: is corrupt ({type(e).__name__})") from None
    check_state(folder, state, manifest)
    return state


def check_state(folder: Path, state: Any, manifest: dict[str, Any]) -> None:
    """`state` has all its keys and a file for each rank, and is of a known format."""
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise CorruptCheckpoint(f"{folder / 'state.json'}: is not the state of a run")
    if state["format"] > FORMAT:
        raise UserError(
            f"{folder}: a checkpoint of format {state['format']}, made by a newer version; update "
            "llava_min"
        )
    ranks = {name for name in manifest if re.fullmatch(r"rank-\d+\.safetensors", name)}
    expected = {f"rank-{k}.safetensors" for k in range(len(ranks))}
    if not STATE_KEYS <= state.keys() or ranks != expected or len(ranks) != state["ranks"]:
        raise CorruptCheckpoint(f"{folder}: lacks parts of a run's state")


def restore(
    folder: Path,
    state: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    world: World,
) -> bool:
    """Load a verified checkpoint into `model` and `optimizer` (None: into the model alone).

    Returns whether the random streams are restored too, which needs the same number of ranks.
    Raises UserError when the trainable tensors are not those that were saved.
    """
    if optimizer is not None and not state["optimizer"]:
        raise UserError(
            f"{folder}: made with {label('save_only_model')}, so no run can continue from it; "
            "start a new one from its adapter or model, which `python -m llava_min finish "
            f"{folder} OUT` makes"
        )
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: tuple(shape) for name, shape in state["shapes"].items()}
    check_trainable(folder, params, {n: shape for n, shape in shapes.items() if OF not in n})
    stored = StoredTensors(folder, state)
    with torch.no_grad():
        for name, p in params.items():
            stored.read_into(name, p.detach())
        if optimizer is None:
            return False
        for name in (name for name in shapes if OF in name):
            slot, parameter = split_slot_name(name)
            p = params[parameter]
            # a moment is sharded like its parameter; a tensor of another shape is whole
            like = p if shapes[name] == tuple(p.shape) else torch.empty(shapes[name])
            value = torch.zeros_like(like, dtype=stored.dtype(name))
            stored.read_into(name, value)
            optimizer.state[p][slot] = value
        for name, value in state["scalars"].items():
            slot, parameter = split_slot_name(name)
            optimizer.state[params[parameter]][slot] = value
    if state["ranks"] != world.size:
        return False
    set_rng_state(state["rng"][world.rank], stored.rng_streams(world.rank), world.device)
    return True


def check_trainable(
    folder: Path, params: dict[str, nn.Parameter], saved: dict[str, tuple[int, ...]]
) -> None:
    """The trainable parameters have the names and shapes that were saved."""
    if odd := sorted({name: tuple(p.shape) for name, p in params.items()}.items() ^ saved.items()):
        raise UserError(
            f"{folder}: {len(odd)} trainable tensors are not those of this run, first "
            f"{escape_controls(odd[0][0])}; give the settings the checkpoint was made with"
        )
