"""What a checkpoint's weight files may hold: float tensors, each part of a LLaVA once, with the
shapes that config.json gives, in shards that are as their index says.

Messages name tensors as the file does.
"""

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_min.errors import UserError, escape_controls, preview, warn_once
from llava_min.names import LAYOUTS, to_layout

SHARD = re.compile(r"[\w.-]+\.(safetensors|bin)")


def counted(names: list[str]) -> str:
    """How many there are, and the first names."""
    return f"{len(names)} tensor(s) ({preview(names, ', ')})"


# ---- files


def check_shards(shards: Any, index: Path) -> None:
    """The `weight_map` of an index names files that are beside it, or UserError.

    A shard beside it that it does not name is a warning.
    """
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index}: no weight_map; download the file again")
    names = sorted(set(map(str, shards.values())))
    if bad := [name for name in names if not SHARD.fullmatch(name)]:
        raise UserError(
            f"{index}: {escape_controls(bad[0])!r} is not the name of a file beside it; "
            "the index is damaged or hostile"
        )
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise UserError(
            f"{index}: {len(absent)} of {len(names)} shards are absent "
            f"({preview(absent, ', ')}); download them"
        )
    stem, end = index.name.split(".")[:2]
    if extra := sorted({p.name for p in index.parent.glob(f"{stem}-*-of-*.{end}")} - {*names}):
        warn_once(
            f"{index}: does not name {len(extra)} shard(s) beside it ({preview(extra, ', ')}), "
            "which are not read; remove them, or download the index and the shards again, from one "
            "revision"
        )


def check_is_table(table: Any, path: Path) -> None:
    """What a `.bin` holds are plain tensors with names, or UserError."""
    plain = lambda x: (
        isinstance(x, Tensor) and x.layout == torch.strided and not x.is_nested and not x.is_meta
    )
    if not isinstance(table, dict) or not all(
        isinstance(name, str) and plain(x) for name, x in table.items()
    ):
        raise UserError(f"{path}: not a table of named tensors; give the weights of a model")


def check_once(info: Any, other: Any) -> None:
    """No `other` tensor has the same name of ours, or UserError."""
    if other is not None:
        name = escape_controls(info.name)[:200]
        raise UserError(f"{other} is the same tensor as {name} in {info.path.name}; keep one")


def check_known(unknown: list[str], folder: Path) -> None:
    if unknown:
        raise UserError(
            f"{folder}: {counted(unknown)} have no place in a LLaVA-1.5; is this another "
            "architecture?"
        )


def check_index(index: Path, listed: dict[str, str], file_of: dict[str, str]) -> None:
    """Each tensor that the index lists (name -> shard) is where it says, or UserError.

    A tensor that it does not list is a warning.
    """
    again = "download the index and the shards again, from one revision"
    if absent := sorted(listed.keys() - file_of.keys()):
        raise UserError(
            f"{index}: missing {counted(absent)}, which it lists and no shard has; {again}"
        )
    if moved := next((name for name in listed if listed[name] != file_of[name]), None):
        raise UserError(
            f"{index}: says that {escape_controls(moved)[:200]} is in {listed[moved]}, and it "
            f"is in {file_of[moved]}; {again}"
        )
    if extra := sorted(file_of.keys() - listed.keys()):
        warn_once(
            f"{index}: does not list {counted(extra)}, which the shards have; they are read "
            "all the same"
        )


# ---- tensors


def names_in_layout(entries: dict[str, Any], ours: Iterable[str]) -> list[str]:
    """Our names as the checkpoint of `entries` has them: in the layout that fits the most."""
    fits = lambda layout: sum(to_layout(n, layout) == info.name for n, info in entries.items())
    layout = max(LAYOUTS, key=fits)
    return sorted(to_layout(name, layout) or name for name in ours)


def check_parts(entries: dict[str, Any], needed: dict[str, Collection[str]], folder: Path) -> None:
    """Every quantized layer (path -> suffixes) has all of its tensors, or UserError."""
    if not needed:
        raise UserError(
            f"{folder}: no layer is quantized, though config.json has a quantization_config; "
            "the weights do not belong to config.json"
        )
    names = {f"{path}.{suffix}" for path, suffixes in needed.items() for suffix in suffixes}
    if missing := names_in_layout(entries, names - entries.keys()):
        raise UserError(
            f"{folder}: missing {counted(missing)} of quantized layers; the weights do not belong "
            "to config.json, download them again"
        )


def check_entries(
    entries: dict[str, Any],
    model: nn.Module,
    rows: dict[str, int] = {},
    elsewhere: Collection[str] = (),
) -> None:
    """Every parameter of `model` has a tensor of its shape and kind, every tensor a parameter, or
    UserError.

    entries: our name -> TensorInfo. rows: of tensors that have fewer rows than the model, such as
    the vocabulary of the original layout. elsewhere: parameters that are accounted for already,
    those of quantized layers.
    """
    parameters = model.named_parameters(remove_duplicate=False)
    parameters = [(n, p) for n, p in parameters if n not in elsewhere]
    expected = {n: (rows.get(n, len(p)), *p.shape[1:]) for n, p in parameters}
    # a tied head may be left out
    needed = {n for n, _ in model.named_parameters()} - set(elsewhere)
    both = [(info, expected[n]) for n, info in entries.items() if n in expected]
    shown = lambda info: escape_controls(info.name)[:200]
    faults = []
    if missing := names_in_layout(entries, needed - entries.keys()):
        faults.append(f"missing {counted(missing)}")
    if unknown := sorted(info.name for n, info in entries.items() if n not in expected):
        faults.append(f"unknown {counted(unknown)}")
    faults += [
        f"shape {list(info.shape)} of {shown(info)}, expected {list(shape)}"
        for info, shape in both
        if info.shape != shape
    ][:4]
    faults += [
        f"{shown(info)} holds {info.dtype}, expected floating point"
        for info, _ in both
        if info.torch_dtype is None
    ][:4]
    if faults:
        where = next(iter(entries.values())).path.parent if entries else "checkpoint"
        raise UserError(f"{where}: {'; '.join(faults)}; the weights do not belong to config.json")


def check_tied(head: Tensor, embedding: Tensor, info: Any) -> None:
    """Rows of a head that is stored though it is tied equal the embedding's, or UserError."""
    if not torch.equal(head, embedding):
        raise UserError(
            f"{info} differs from the embedding, but config.json says tie_word_embeddings; "
            "correct one of them"
        )


def not_finite(info: Any, dtype: torch.dtype) -> UserError:
    kind = str(dtype).removeprefix("torch.")
    return UserError(
        f"{info} holds NaN, infinity or numbers too large for {kind}; load it in another dtype, "
        "or download it again"
    )


def check_part(name: str, written: str | None, layout: str) -> None:
    """The layout has a name for our tensor `name`, or UserError."""
    if written is None:
        raise UserError(f"{layout} has no place for {name}; save in another layout", "layout")
