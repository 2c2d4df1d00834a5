"""Which tensors a checkpoint has: four published layouts, safetensors or `.bin`, sharded or not, a
folder or the hub.

Names cross in one table of prefixes, read in every layout and written in the one that every reader
accepts (llava-hf as transformers 4.36 wrote it). Every tensor is accounted for before weights.py
reads the first.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from llava_min.errors import UserError, escape_controls, warn_once
from llava_min.names import LAYOUTS, to_layout, to_ours
from llava_min.util.files import check_file, read_json

# Tables that code recomputes; and what a CLIP folder holds besides its tower.
TABLES = re.compile(r"(.*\.)?(inv_freq|position_ids)|model\.image_newline")
CLIP_REST = re.compile(r".*\.position_ids|text_model\..*|(visual|text)_projection\..*|logit_scale")
SHARD = re.compile(r"[\w.-]+\.(safetensors|bin)")
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOATS |= {str(dtype): dtype for dtype in FLOATS.values()}  # as safetensors and `.bin` call them


# ---- files


def find_folder(
    source: str, revision: str | None = None, key: str = "", mend: str | None = None
) -> Path:
    """The folder of a checkpoint: a path, or a hub id, which is downloaded (safetensors first).

    Where a file names it, `key` says which key of which file, and `mend` what to do without it.
    """
    if not source:
        raise UserError("source: is empty; give a checkpoint's folder, a hub id, or tiny")
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return path
        if path.exists():
            raise UserError(
                f"{key}{escape_controls(source)}: a file, expected a checkpoint's folder; give that"
            )
    except (OSError, RuntimeError) as e:  # a name too long, a ~user that is not there
        why = escape_controls(e)[:200]
        raise UserError(
            f"{key}{escape_controls(source)[:400]}: cannot be looked up ({why}); check the path"
        ) from None
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        advice = mend or (
            "give a checkpoint's folder, a hub id such as llava-hf/llava-1.5-7b-hf, or tiny"
        )
        raise UserError(f"{key}{escape_controls(source)[:400]}: no such folder; {advice}")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.jinja", "*.model", "*.safetensors"]
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=wanted))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(source, revision=revision, allow_patterns=["pytorch_model*.bin"])
    except (
        Exception
    ) as e:  # the hub's client raises its own errors, its HTTP library's and the system's
        advice = mend or "check the name and the network, or download it and give the folder"
        raise UserError(
            f"{key}{source}: not a folder here, and the hub did not give it "
            f"({escape_controls(e)[:200]}); {advice}"
        ) from None
    return folder


def find_files(folder: Path) -> tuple[list[Path], Path | None, dict[str, str]]:
    """The weight files of a folder, safetensors before `.bin`; of shards, the index and its map."""
    for stem, end in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = folder / f"{stem}.{end}.index.json", folder / f"{stem}.{end}"
        if single.exists():
            if index.exists():
                warn_once(
                    f"{single}: is read, and the shards of {index.name} beside it are not; "
                    "remove what is not wanted"
                )
            return [single], None, {}
        if index.exists():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise UserError(f"{index}: no weight_map; download the file again")
            names = sorted(set(map(str, shards.values())))
            if bad := [n for n in names if not SHARD.fullmatch(n)]:
                raise UserError(
                    f"{index}: {escape_controls(bad[0])!r} is not the name of a file beside it; "
                    "the index is damaged or hostile"
                )
            if absent := [n for n in names if not (folder / n).is_file()]:
                raise UserError(
                    f"{index}: {len(absent)} of {len(names)} shards are absent "
                    f"({', '.join(absent[:4])}); download them"
                )
            return [folder / n for n in names], index, shards
    raise UserError(
        f"{folder}: no model.safetensors, pytorch_model.bin or index of shards; "
        "give the folder of a checkpoint"
    )


def open_file(path: Path):
    """A mapping of tensor names to tensors that reads a tensor when it is asked for."""
    check_file(path)
    try:
        if path.suffix != ".bin":
            return safe_open(path, framework="pt")
        # CLIP and Vicuna are published so; weights_only refuses anything but tensors
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (
        Exception
    ) as e:  # both readers raise many kinds for damaged files; none of them is our fault
        why = (
            "not a table of tensors as torch saves it"
            if path.suffix == ".bin"
            else escape_controls(e)[:200]
        )
        if "allocate memory" in str(e):
            raise UserError(f"{path}: there is not the memory to open it; free some") from None
        raise UserError(
            f"{path}: damaged or not a weight file ({why}); download it again"
        ) from None
    plain = lambda x: (
        isinstance(x, Tensor) and x.layout == torch.strided and not x.is_nested and not x.is_meta
    )
    if not isinstance(tensors, dict) or not all(
        isinstance(k, str) and plain(x) for k, x in tensors.items()
    ):
        raise UserError(f"{path}: not a table of named tensors; give the weights of a model")
    return tensors


# ---- tensors


@dataclass(frozen=True)
class Entry:
    """A tensor in a file, not read yet."""

    path: Path
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str  # as the file calls it
    start: int | None = None  # its first byte in the file; None in a `.bin`

    def __str__(self) -> str:
        return f"{self.path}: {escape_controls(self.name)[:200]}"


def stored(path: Path) -> Iterator[Entry]:
    """The tensors of a file; none is read."""
    file = open_file(path)
    if path.suffix == ".bin":
        yield from (Entry(path, name, tuple(x.shape), str(x.dtype)) for name, x in file.items())
        return
    # safe_open has checked this header: lengths, order, no gap, no overlap
    with open(path, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
    for name, info in header.items():
        if name != "__metadata__":
            yield Entry(
                path, name, tuple(info["shape"]), info["dtype"], 8 + size + info["data_offsets"][0]
            )


def read_entries(folder: Path, ignored: re.Pattern = TABLES) -> dict[str, Entry]:
    """Our name -> the tensor's place, for every tensor of the folder's weight files.

    Raises UserError for a name that has no place in a LLaVA or stands twice, and for shards that
    are not as their index says.
    """
    entries, unknown, found = {}, [], {}
    paths, index, said = find_files(folder)
    for path in paths:
        for entry in stored(path):
            if ignored.fullmatch(entry.name):
                continue
            found[entry.name] = path.name
            if (ours := to_ours(entry.name)) is None:
                unknown.append(entry.name)
            elif ours in entries:
                raise UserError(
                    f"{entries[ours]} is the same tensor as {escape_controls(entry.name)[:200]} in "
                    f"{path.name}; keep one"
                )
            else:
                entries[ours] = entry
    if unknown:
        raise UserError(
            f"{folder}: {some(unknown)} have no place in a LLaVA-1.5; is this another architecture?"
        )
    if index:
        said = {name: file for name, file in said.items() if not ignored.fullmatch(name)}
        check_index(index, said, found)
    return entries


def check_index(index: Path, said: dict[str, str], found: dict[str, str]) -> None:
    """Each tensor that the index lists (name -> shard) is there; one that it lacks is named."""
    again = "download the index and the shards again, from one revision"
    if absent := sorted(said.keys() - found.keys()):
        raise UserError(
            f"{index}: missing {some(absent)}, which it lists and no shard has; {again}"
        )
    if moved := next((name for name in said if said[name] != found[name]), None):
        raise UserError(
            f"{index}: says that {escape_controls(moved)[:200]} is in {said[moved]}, and it "
            f"is in {found[moved]}; {again}"
        )
    if extra := sorted(found.keys() - said.keys()):
        warn_once(
            f"{index}: does not list {some(extra)}, which the shards have; they are read "
            "all the same"
        )


def names_in(entries: dict[str, Entry], ours: Iterable[str]) -> list[str]:
    """Our names as the checkpoint of `entries` has them: in the layout that fits the most."""
    fits = lambda layout: sum(to_layout(n, layout) == e.name for n, e in entries.items())
    layout = max(LAYOUTS, key=fits)
    return sorted(to_layout(name, layout) or name for name in ours)


def check_entries(entries: dict[str, Entry], model: nn.Module, rows: dict[str, int] = {}) -> None:
    """Every parameter of `model` has a tensor of its shape and kind, every tensor a parameter, or
    UserError.

    `rows` gives tensors that have fewer rows than the model: the vocabulary of the original layout.
    """
    want = {
        n: (rows.get(n, len(p)), *p.shape[1:])
        for n, p in model.named_parameters(remove_duplicate=False)
    }
    needed = {n for n, _ in model.named_parameters()}  # a tied head may be left out
    both = [(e, want[n]) for n, e in entries.items() if n in want]
    faults = []
    if missing := names_in(entries, needed - entries.keys()):
        faults.append(f"missing {some(missing)}")
    if unknown := sorted(e.name for n, e in entries.items() if n not in want):
        faults.append(f"unknown {some(unknown)}")
    faults += [
        f"shape {list(e.shape)} of {escape_controls(e.name)[:200]}, expected {list(shape)}"
        for e, shape in both
        if e.shape != shape
    ][:4]
    faults += [
        f"{escape_controls(e.name)[:200]} holds {e.dtype}, expected floating point"
        for e, _ in both
        if e.dtype not in FLOATS
    ][:4]
    if faults:
        where = next(iter(entries.values())).path.parent if entries else "checkpoint"
        raise UserError(f"{where}: {'; '.join(faults)}; the weights do not belong to config.json")


def some(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} tensor(s) ({', '.join(escape_controls(n)[:100] for n in names[:most])}{more})"
