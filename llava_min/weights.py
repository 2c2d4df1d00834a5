"""Weights in and out: four published name layouts, safetensors or `.bin`, sharded or not, folder or hub.

Names cross in one table of prefixes, read in every layout and written in the one that every reader accepts
(llava-hf as transformers 4.36 wrote it). Every tensor is accounted for. A model is built on the meta device
and its tensors are read piece by piece, so the peak is the model itself, whatever the dtype asked; of a model
that is split over processes, each reads the rows it keeps.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llava_min.cli import UserError, printable
from llava_min.dist import local, own_rows, split
from llava_min.files import check_file, read_json, write_json
from llava_min.packed import dense

# Our prefix <- theirs, the first match wins.  A: llava-hf as published, B: transformers >= 4.52 in memory,
# C: as transformers 5 saves, O: the original, CLIP: OpenAI's own folder.
VISION = ("model.vision_tower.vision_tower.vision_model.",  # O
          "model.vision_tower.vision_model.",  # B
          "vision_tower.vision_model.",  # A
          "model.vision_tower.", "vision_tower.",  # C in memory, C
          "vision_model.")  # CLIP
READ = [
    *((f"{p}encoder.layers.", "vision_tower.layers.") for p in VISION),
    *((p, "vision_tower.") for p in VISION),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),  # O
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.multi_modal_projector.", "multi_modal_projector."),  # B
    ("multi_modal_projector.", "multi_modal_projector."),  # A, C
    ("language_model.model.", "language_model."),  # A, C
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "language_model."),  # B
    ("lm_head.", "lm_head."),  # B, O
    ("model.", "language_model."),  # O, and a language model by itself
]
WRITE = [  # A <- ours
    ("vision_tower.layers.", "vision_tower.vision_model.encoder.layers."),
    ("vision_tower.", "vision_tower.vision_model."),
    ("multi_modal_projector.", "multi_modal_projector."),
    ("language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
]
# Tables that code recomputes; and what a CLIP folder holds besides its tower.
TABLES = re.compile(r"(.*\.)?(inv_freq|position_ids)|model\.image_newline")
CLIP_REST = re.compile(r".*\.position_ids|text_model\..*|(visual|text)_projection\..*|logit_scale")
SHARD = re.compile(r"[\w.-]+\.(safetensors|bin)")
PIECE = 1 << 19  # elements read at once: they stay in a core's cache while they are checked and converted
REOPEN = 32 << 20  # bytes read of a `.bin` through one mapping: its pages count as ours until it is closed
SHARD_BYTES = 5 << 30
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
          "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOATS |= {str(dtype): dtype for dtype in FLOATS.values()}
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def translate(name: str, table: list[tuple[str, str]]) -> str | None:
    return next((ours + name[len(theirs):] for theirs, ours in table if name.startswith(theirs)), None)


@dataclass(frozen=True)
class Entry:
    """A tensor in a file, not read yet."""

    path: Path
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str  # as the file calls it
    start: int | None = None  # its first byte in the file; None in a `.bin`

    def __str__(self) -> str:
        return f"{self.path}: {printable(self.name)[:200]}"


def find_files(folder: Path) -> list[Path]:
    """The weight files of a folder, shards by their index; safetensors before `.bin`."""
    for stem, end in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = folder / f"{stem}.{end}.index.json", folder / f"{stem}.{end}"
        if single.exists():
            return [single]
        if index.exists():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise UserError(f"{index}: no weight_map; download the file again")
            names = sorted(set(map(str, shards.values())))
            if bad := [n for n in names if not SHARD.fullmatch(n)]:
                raise UserError(f"{index}: {printable(bad[0])!r} is not the name of a file beside it; "
                                "the index is damaged or hostile")
            if absent := [n for n in names if not (folder / n).is_file()]:
                raise UserError(f"{index}: {len(absent)} of {len(names)} shards are absent "
                                f"({', '.join(absent[:4])}); download them")
            return [folder / n for n in names]
    raise UserError(f"{folder}: no model.safetensors, pytorch_model.bin or index of shards; "
                    "give the folder of a checkpoint")


def open_file(path: Path):
    """A mapping of tensor names to tensors that reads a tensor when it is asked for."""
    check_file(path)
    try:
        if path.suffix != ".bin":
            return safe_open(path, framework="pt")
        # CLIP and Vicuna are published so; weights_only refuses anything but tensors
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # both readers raise many kinds for damaged files; none of them is our fault
        why = printable(e)[:200]
        raise UserError(f"{path}: damaged or not a weight file ({why}); download it again") from None
    plain = lambda x: isinstance(x, Tensor) and x.layout == torch.strided and not x.is_meta
    if not isinstance(tensors, dict) or not all(isinstance(k, str) and plain(x) for k, x in tensors.items()):
        raise UserError(f"{path}: not a table of named tensors; give the weights of a model")
    return tensors


def read_starts(path: Path) -> dict[str, int]:
    """The first byte of each tensor, from a header that safe_open has checked: lengths, order, no gap, no overlap."""
    with open(path, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(size))
    return {name: 8 + size + info["data_offsets"][0] for name, info in header.items() if name != "__metadata__"}


def read_entries(paths: Iterable[Path], ignored: re.Pattern = TABLES) -> dict[str, Entry]:
    """Our name -> the tensor's place, for every tensor of the files, without reading any.

    Raises UserError for a name that has no place in a LLaVA, or that stands twice.
    """
    entries, unknown = {}, []
    for path in paths:
        file = open_file(path)
        starts = {} if path.suffix == ".bin" else read_starts(path)
        for name in file.keys():
            if ignored.fullmatch(name):
                continue
            ours = translate(name, READ)
            if ours is None:
                unknown.append(name)
            elif ours in entries:
                raise UserError(f"{entries[ours]} is the same tensor as {printable(name)[:200]} in {path.name}; "
                                "keep one")
            elif path.suffix == ".bin":
                entries[ours] = Entry(path, name, tuple(file[name].shape), str(file[name].dtype))
            else:
                part = file.get_slice(name)
                entries[ours] = Entry(path, name, tuple(part.get_shape()), part.get_dtype(), starts[name])
    if unknown:
        raise UserError(f"{path.parent}: {_some(unknown)} have no place in a LLaVA-1.5; "
                        "is this another architecture?")
    return entries


def check_entries(entries: dict[str, Entry], model: nn.Module, rows: dict[str, int] = {}) -> None:
    """Every parameter of `model` has a tensor of its shape and kind, every tensor a parameter, or UserError.

    `rows` gives tensors that have fewer rows than the model: the vocabulary of the original layout.
    """
    want = {n: (rows.get(n, len(p)), *p.shape[1:]) for n, p in model.named_parameters(remove_duplicate=False)}
    needed = {n for n, _ in model.named_parameters()}  # a tied head may be left out
    both = [(e, want[n]) for n, e in entries.items() if n in want]
    faults = []
    if missing := sorted(needed - entries.keys()):
        faults.append(f"missing {_some(missing)}")
    if unknown := sorted(e.name for n, e in entries.items() if n not in want):
        faults.append(f"unknown {_some(unknown)}")
    faults += [f"shape {list(e.shape)} of {printable(e.name)[:200]}, expected {list(shape)}"
               for e, shape in both if e.shape != shape][:4]
    faults += [f"{printable(e.name)[:200]} holds {e.dtype}, expected floating point"
               for e, _ in both if e.dtype not in FLOATS][:4]
    if faults:
        where = next(iter(entries.values())).path.parent if entries else "checkpoint"
        raise UserError(f"{where}: {'; '.join(faults)}; the weights do not belong to config.json")


def _some(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} tensor(s) ({', '.join(printable(n)[:100] for n in names[:most])}{more})"


class Reader:
    """Rows of tensors out of their files, about PIECE elements at a time; one file is open at a time."""

    def __init__(self):
        self.path, self.file, self.mapped = None, None, 0
        self.buffers: dict[torch.dtype, Tensor] = {}

    def buffer(self, shape: torch.Size, dtype: torch.dtype, pinned: bool = False) -> Tensor:
        """Memory to use until the next call for the same dtype; new memory each time would take twice as long."""
        size = math.prod(shape)
        if dtype not in self.buffers or self.buffers[dtype].numel() < size:
            self.buffers[dtype] = torch.empty(max(size, PIECE), dtype=dtype, pin_memory=pinned)
        return self.buffers[dtype][:size].view(shape)

    def open(self, path: Path):
        if path != self.path or self.mapped > REOPEN:
            self.path, self.file, self.mapped = path, None, 0  # closed before it is opened again
            self.file = open_file(path) if path.suffix == ".bin" else open(path, "rb", buffering=0)
        return self.file

    def pieces(self, entry: Entry, first: int, end: int) -> Iterator[tuple[int, int]]:
        step = max(1, PIECE // math.prod(entry.shape[1:]))
        return ((row, min(row + step, end)) for row in range(first, end, step))

    def fill(self, out: Tensor, entry: Entry, first: int = 0) -> None:
        """Read into `out`, in its dtype and on its device, as many rows of `entry` from `first` on as it has.

        Raises UserError for a value that is not finite in that dtype.
        """
        for row, end in self.pieces(entry, first, first + len(out)):
            part = out[row - first : end - first]
            if entry.start is None:
                stored = self.open(entry.path)[entry.name][row:end]
                self.mapped += stored.nbytes
                part.copy_(stored)
                del stored
            else:
                self.read(part, entry, row)
            if not is_finite(part):
                raise UserError(f"{entry} holds NaN, infinity or numbers too large for {NAMES[out.dtype]}; "
                                "load it in another dtype, or download it again")

    def read(self, part: Tensor, entry: Entry, row: int) -> None:
        """`part` <- the bytes of `entry` from `row` on: straight into its memory where nothing is to be converted."""
        dtype, on_cpu = FLOATS[entry.dtype], part.device.type == "cpu"
        straight = on_cpu and part.dtype == dtype
        x = part if straight else self.buffer(part.shape, dtype, pinned=not on_cpu)
        file = self.open(entry.path)
        file.seek(entry.start + row * x.nbytes // len(x))
        if file.readinto(x.view(-1).view(torch.uint8).numpy()) != x.nbytes:
            raise UserError(f"{entry} ends early; download the file again")
        if not straight:
            if on_cpu and x.itemsize == part.itemsize == 2:  # by way of fp32 is twice as fast
                x = self.buffer(part.shape, torch.float32).copy_(x)
            part.copy_(x.to(part.device))  # converted where it goes


def load_weights(model: nn.Module, entries: dict[str, Entry], dtype: torch.dtype, device: torch.device,
                 offload: bool = False) -> None:
    """Fill `model`, on meta, with the tensors of `entries`, which `check_entries` has passed for the plain model.

    What is trained (`requires_grad`) becomes fp32, the rest `dtype`. Layers may be wrapped in others as `base`, and
    parameters that no tensor has are NaN until somebody gives them values. A DTensor gets the rows that this process
    keeps, and with `offload` on the CPU.
    Raises UserError for a value that is not finite in its dtype, and a tied head that is not the embedding.
    """
    reader = Reader()
    places = {name.replace(".base.", "."): name for name, _ in model.named_parameters()}
    for name, entry in sorted(entries.items(), key=lambda item: (str(item[1].path), item[1].start or 0)):
        if name in places:
            new = make_parameter(model, places[name], dtype, device, offload)
            first, end = own_rows(model.get_parameter(places[name]))
            stored = max(first, min(end, entry.shape[0]))
            reader.fill(new[: stored - first], entry, first)
            if stored < end:  # rows for added tokens, about where the converter puts them
                new[stored - first :] = mean_row(reader, entry)
    for name in places.keys() - entries.keys():
        make_parameter(model, places[name], dtype, device, offload).fill_(math.nan)
    model.tie_weights()
    for name in entries.keys() - places.keys():
        p = model.get_parameter(name).detach()
        first, end = own_rows(p)
        for row, stop in reader.pieces(entries[name], first, end):
            mine = local(p)[row - first : stop - first]
            reader.fill(again := torch.empty_like(mine), entries[name], row)
            if not torch.equal(again, mine):
                raise UserError(f"{entries[name]} differs from the embedding, but config.json says "
                                "tie_word_embeddings; correct one of them")


def mean_row(reader: Reader, entry: Entry) -> Tensor:
    """The mean of all rows, in fp64: the same, whatever part of them this process keeps."""
    total = torch.zeros(entry.shape[1:], dtype=torch.float64)
    for row, end in reader.pieces(entry, 0, entry.shape[0]):
        reader.fill(rows := torch.empty(end - row, *entry.shape[1:]), entry, row)
        total += rows.sum(0, dtype=torch.float64)
    return total / entry.shape[0]


def make_parameter(model: nn.Module, name: str, dtype: torch.dtype, device: torch.device, offload: bool) -> Tensor:
    """Give the parameter of that name memory; returns what this process keeps of it, to be filled."""
    old = model.get_parameter(name)
    first, end = own_rows(old)
    value = new = torch.empty(end - first, *old.shape[1:], dtype=torch.float32 if old.requires_grad else dtype,
                              device="cpu" if split(old) and offload else device)
    if split(old):
        from torch.distributed.tensor import DTensor

        value = DTensor.from_local(new, old.device_mesh, old.placements, run_check=False,
                                   shape=old.shape, stride=old.stride())
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(value, requires_grad=old.requires_grad))
    return new


def is_finite(x: Tensor) -> bool:
    """Neither NaN nor infinity in `x`. Its sum says so at once, unless that overflows."""
    if torch.isfinite(x.sum()):
        return True
    low, high = x.aminmax()
    return bool(torch.isfinite(high.float() - low.float()))


def save_weights(state: dict[str, Tensor], folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write tensors under our names to `folder` in layout A, in shards of at most SHARD_BYTES."""
    size = lambda t: t.numel() * (dtype or t.dtype).itemsize
    shards: list[dict[str, Tensor]] = [{}]
    room = SHARD_BYTES
    for name, tensor in state.items():
        if shards[-1] and size(tensor) > room:
            shards.append({})
            room = SHARD_BYTES
        room -= size(tensor)
        shards[-1][translate(name, WRITE)] = tensor
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards):
        save_tensors({n: dense(t.detach()).to("cpu", dtype).contiguous() for n, t in shard.items()}, folder / name)
    if len(shards) > 1:
        total = sum(map(size, state.values()))
        places = {n: file for file, shard in zip(names, shards) for n in shard}
        write_json(folder / "model.safetensors.index.json",
                   {"metadata": {"total_size": total}, "weight_map": places})


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as e:  # a full disk is told so, and not as OSError
        why = printable(e)[:200]
        raise UserError(f"{path}: cannot be written ({why}); free space or give another path") from None
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)  # save_file leaves 0600, which a group cannot read


def find_folder(source: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint: a path, or a hub id, which is downloaded (safetensors where they exist)."""
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return path
        if path.exists():
            raise UserError(f"{printable(source)}: a file, expected a checkpoint's folder; give that")
    except (OSError, RuntimeError) as e:  # a name too long, a ~user that is not there
        why = printable(e)[:200]
        raise UserError(f"{printable(source)[:400]}: cannot be looked up ({why}); check the path") from None
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise UserError(f"{printable(source)[:400]}: no such folder; give a checkpoint's folder, "
                        "a hub id such as llava-hf/llava-1.5-7b-hf, or tiny")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.jinja", "*.model", "*.safetensors"]
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=wanted))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(source, revision=revision, allow_patterns=["pytorch_model*.bin"])
    except Exception as e:  # the hub's client raises its own errors, its HTTP library's and the system's
        raise UserError(f"{source}: not a folder here, and the hub did not give it ({printable(e)[:200]}); "
                        "check the name and the network, or download it and give the folder") from None
    return folder
