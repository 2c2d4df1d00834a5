"""What is measured, and on what: the size, the device, and a folder of weights for all programs.

The weights are random, of a named size (llava_min/config.py), in a temporary folder; or they are
those of a llava-hf folder.
"""

import contextlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_min.config import LlavaConfig
from llava_min.errors import UserError, escape_controls, guess, info, shorten, warn
from llava_min.tools.speed.worker import Worker, config_of
from llava_min.util.files import check_free, write_json
from llava_min.util.script import tidy_when_terminated
from llava_min.util.sizes import SIZES

GIB, MIB = 1 << 30, 1 << 20
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def read_size(size: str, text: int, flag: str) -> LlavaConfig:
    """The config of a named size or of a folder, in whose context an image and `text` tokens fit,
    or UserError.
    """
    if size in SIZES:
        config = SIZES[size]
    elif Path(size).is_dir():
        config = config_of(size)
        if config.vision_source:
            raise UserError(
                f"{size}: a checkpoint in the original layout, which transformers does not load; "
                "give one in the llava-hf layout"
            )
    else:
        fix = guess(size, SIZES, f"there are {', '.join(SIZES)}")
        raise UserError(f"{escape_controls(size)}: neither a size nor a folder; {fix}")
    check_context(size, config, text, flag)
    return config


def check_context(size: str, config: LlavaConfig, text: int, flag: str) -> None:
    """An image and `text` tokens fit the context, or UserError."""
    tokens, most = config.tokens_per_image + text, config.text.max_position_embeddings
    if tokens > most:
        raise UserError(
            f"{flag}: an image and {text} tokens are {tokens} and the context of {size} is "
            f"{most}; ask for fewer"
        )


def prepare(args: Any, packages: tuple[str, ...], install: str | None = None) -> tuple[str, bool]:
    """The device, and whether the peer, which is made of `packages`, takes part.

    install: what pip is given for them, where that is not their names.
    """
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    if args.peer and absent:
        raise UserError(
            f"--peer: {absent[0]} is not installed; pip install {install or ' '.join(absent)}, or "
            "leave it out"
        )
    if args.json:
        check_free(Path(args.json))
        if not (folder := Path(args.json).parent).is_dir():  # not after minutes of work
            raise UserError(f"--json: {shorten(folder, 400)}: no such folder; make it first")
    from llava_min.load import pick_device

    device = str(pick_device(args.device))
    if device == "cpu" and (load := os.getloadavg()[0]) > 0.5:
        warn(
            f"other programs keep the machine busy (load {load:.1f}); absolute figures will be too "
            "low"
        )
    return device, not absent if args.peer is None else args.peer


@contextlib.contextmanager
def running(
    size: str, config: LlavaConfig, programs: tuple[type, ...], spec: dict
) -> Iterator[list[Worker]]:
    """A Worker for each program, with `spec` and the folder of the weights; both are removed at the
    end.
    """
    import torch

    from llava_min.load import on_meta

    model, dtype = on_meta(config), getattr(torch, spec["dtype"])
    total = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    need_memory(total, spec["device"], len(programs) > 1)
    with contextlib.ExitStack() as stack:
        stack.enter_context(tidy_when_terminated())
        folder = Path(size)
        if size in SIZES:
            folder = stack.enter_context(scratch(total, size))
            info(f"{size}: writing {total / GIB:.1f} GiB of random weights to {folder}")
            write_random(model, config, folder, dtype)
        workers = []
        for program in programs:
            info(f"{size}: loading, {program.__name__.lower()}")
            workers.append(Worker(program, {**spec, "folder": str(folder)}))
            stack.callback(workers[-1].close)
        yield workers


@contextlib.contextmanager
def scratch(need: int, what: str) -> Iterator[Path]:
    """A temporary folder with room for `need` bytes, which is removed at the end.

    what: is put there, for the message. Raises UserError where there is less room.
    """
    with tempfile.TemporaryDirectory(prefix="llava_min-bench-") as name:
        folder = Path(name)
        if (free := shutil.disk_usage(folder).free) < need + 64 * MIB:
            raise UserError(
                f"{folder.parent}: {what} takes {need / GIB:.1f} GiB there and "
                f"{free / GIB:.1f} are free; make room, or set TMPDIR to a larger disk"
            )
        yield folder


def need_memory(total: int, device: str, peer: bool) -> None:
    """Refuse what does not fit into the machine's memory, before the OOM killer ends a process."""
    meminfo = Path("/proc/meminfo")
    if device != "cpu" or not meminfo.exists():
        return
    free = meminfo.read_text().partition("MemAvailable:")[2].split()[0]
    need, free = total * (1 + peer) / GIB, int(free) * 1024 / GIB
    if need > free:
        raise UserError(
            f"the weights take {need:.1f} GiB of memory{' in two programs' * peer} and {free:.1f} "
            f"are free; take a smaller size{' or --no-peer' * peer}"
        )


def write_random(model: Any, config: LlavaConfig, folder: Path, dtype: Any) -> None:
    """A llava-hf folder for `model` on meta, tensor by tensor: normal matrices, zero biases, unit
    norms.
    """
    import torch

    from llava_min.export.stream import Row, write_shards
    from llava_min.names import to_layout

    shapes = {name: p.shape for name, p in model.named_parameters()}
    seeds = {name: i for i, name in enumerate(shapes)}  # tensors are made in threads, in any order

    def draw(name: str, dtype: torch.dtype) -> torch.Tensor:
        new = torch.empty(shapes[name], dtype=dtype)
        if new.dim() == 1 and name.endswith((".bias", ".weight")):
            return new.fill_(name.endswith(".weight"))
        generator = torch.Generator().manual_seed(seeds[name])
        return new.normal_(std=0.02, generator=generator)

    rows = [Row(name, to_layout(name, "hf"), shape, dtype) for name, shape in shapes.items()]
    write_shards(folder, rows, draw)
    write_json(
        folder / "config.json", replace(config, dtype=str(dtype).removeprefix("torch.")).to_hf()
    )
