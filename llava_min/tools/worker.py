"""What the two halves of the bench share: programs in processes of their own, measured in turn, and
their table.

A program is a class whose constructor loads the weights that its `spec` names and whose methods are
the jobs. The weights are random, of a named size (llava_min/config.py), in a temporary folder that
all programs load; or they are those of a llava-hf folder.
"""

import contextlib
import difflib
import importlib.util
import multiprocessing
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_min.config import SIZES, LlavaConfig
from llava_min.errors import UserError, escape_controls, info, warn
from llava_min.util.files import check_free, read_json, write_json

SHARD = 1 << 30  # bytes of random weights that stand in memory at one time
GIB, MIB = 1 << 30, 1 << 20
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# Rows of a table: key, label, unit, decimals, the better way. The ratio says how many times better
# ours is; where
# that is "share", how much of theirs ours takes.
Rows = list[tuple[str, str, str, int, str]]


# In a program's process


def now(device: Any) -> float:
    """The time, once the device has done what it was given."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def prompt(config: LlavaConfig, rows: int, text: int) -> tuple[Any, Any]:
    """Ids (rows, P + text) with a picture in each row, pixels (rows, 3, S, S)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    words = torch.randint(config.text.vocab_size, (rows, text), generator=generator)
    words[words == config.image_token_id] = 0
    picture = torch.full((rows, config.tokens_per_image), config.image_token_id)
    pixels = torch.randn(
        rows, 3, config.vision.image_size, config.vision.image_size, generator=generator
    )
    return torch.cat([words[:, :5], picture, words[:, 5:]], dim=1), pixels


def peak_memory(device: Any) -> int:
    """Peak bytes since the last call: of the process, or on a GPU of the tensors there."""
    if device.type == "cuda":
        import torch

        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    status = Path("/proc/self/status")
    if not status.exists():
        import resource

        # macOS: bytes, and since the start
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = next(
        line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")
    )
    with contextlib.suppress(OSError):  # where this may not be written, the peak is since the start
        Path("/proc/self/clear_refs").write_text("5")
    return int(peak) * 1024


def as_users_have_it() -> None:
    """The peer's process, before it imports torch: no network, and nothing that our package may
    have set.
    """
    os.environ.pop("THP_MEM_ALLOC_ENABLE", None)
    os.environ["HF_HUB_OFFLINE"] = "1"


def quiet() -> None:
    """transformers, which is imported, says and draws nothing."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def config_of(folder: str) -> LlavaConfig:
    path = Path(folder, "config.json")
    return LlavaConfig.from_hf(read_json(path), str(path))


def serve(pipe: Any, program: type, spec: dict) -> None:
    """Load, then do the jobs (name, arguments) that come through `pipe`; each is answered by a
    dict.
    """
    # Ctrl-C is for the parent, which ends this process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        worker = program(spec)
        pipe.send(
            {
                "import": worker.imported,
                "load": worker.loaded,
                "version": worker.version,
                "peak": peak_memory(worker.device),
            }
        )
        while True:
            job, arguments = pipe.recv()
            peak_memory(worker.device)  # forgets what was before
            pipe.send({**getattr(worker, job)(*arguments), "peak": peak_memory(worker.device)})
    except EOFError:  # the parent is gone
        pass
    except UserError as e:
        pipe.send({"mistake": str(e)})
    except Exception:
        pipe.send({"fault": traceback.format_exc()})


# In the parent


class Worker:
    """The parent's end of a program; `records` keeps what each kind of job answered."""

    def __init__(self, program: type, spec: dict):
        # a fork would begin with its parent's memory
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.name, self.records = program.__name__.lower(), {}
        self.process = context.Process(target=serve, args=(other, program, spec), daemon=True)
        self.process.start()
        other.close()
        self.records["start"] = [self.receive()]

    def receive(self) -> dict:
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise UserError(
                f"{self.name}: its process ended with code {self.process.exitcode}, most likely "
                "for want of memory; take a smaller size or --no-peer"
            ) from None
        if "mistake" in answer:
            raise UserError(answer["mistake"])
        if "fault" in answer:
            raise RuntimeError(f"{self.name} failed:\n{answer['fault']}")
        return answer

    def do(self, job: str, *arguments: int, record: str | None = None) -> None:
        self.pipe.send((job, arguments))
        self.records.setdefault(record or job, []).append(self.receive())

    def median(self, job: str, key: str) -> float:
        return statistics.median(r[key] for r in self.records[job])

    def peak(self, job: str) -> float:
        """MiB at the most, while loading or doing this kind of job."""
        return max(r["peak"] for kind in ("start", job) for r in self.records[kind]) / MIB

    def start(self) -> dict:
        """Seconds until it could begin."""
        return {f"{key}_s": self.records["start"][0][key] for key in ("import", "load")}

    def close(self) -> None:
        self.process.terminate()
        self.process.join()


def read_size(size: str, text: int, flag: str) -> LlavaConfig:
    """The config of a named size or of a folder, in whose context a picture and `text` tokens fit,
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
        near = difflib.get_close_matches(size, SIZES, n=1)
        mend = f"did you mean {near[0]}?" if near else f"there are {', '.join(SIZES)}"
        raise UserError(f"{escape_controls(size)}: neither a size nor a folder; {mend}")
    tokens, most = config.tokens_per_image + text, config.text.max_position_embeddings
    if tokens > most:
        raise UserError(
            f"{flag}: a picture and {text} tokens are {tokens} and the context of {size} is "
            f"{most}; "
            "ask for fewer"
        )
    return config


def prepare(knobs: Any, packages: tuple[str, ...]) -> tuple[str, bool]:
    """The device, and whether the peer, which is made of `packages`, takes part."""
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    if knobs.peer and absent:
        raise UserError(
            f"--peer: {absent[0]} is not installed; pip install {' '.join(absent)}, or leave it out"
        )
    if knobs.json:
        check_free(Path(knobs.json))
    from llava_min.load import pick_device

    device = str(pick_device(knobs.device))
    if device == "cpu" and (load := os.getloadavg()[0]) > 0.5:
        warn(
            f"other programs keep the machine busy (load {load:.1f}); absolute figures will be too "
            "low"
        )
    return device, not absent if knobs.peer is None else knobs.peer


@contextlib.contextmanager
def running(
    size: str, config: LlavaConfig, programs: tuple[type, ...], spec: dict
) -> Iterator[list[Worker]]:
    """A Worker for each program, with `spec` and the folder of the weights; at the end all is gone
    again.
    """
    import torch

    from llava_min.load import on_meta

    model, dtype = on_meta(config), getattr(torch, spec["dtype"])
    total = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    need_memory(total, spec["device"], len(programs) > 1)
    with contextlib.ExitStack() as stack:
        # gigabytes stay behind otherwise
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        stack.callback(signal.signal, signal.SIGTERM, before)
        folder = Path(size)
        if size in SIZES:
            folder = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="llava_min-bench-"))
            )
            if (free := shutil.disk_usage(folder).free) < total + 64 * MIB:
                raise UserError(
                    f"{folder.parent}: {size} takes {total / GIB:.1f} GiB there and "
                    f"{free / GIB:.1f} are free; make room, or set TMPDIR to a larger "
                    "disk"
                )
            info(f"{size}: writing {total / GIB:.1f} GiB of random weights to {folder}")
            write_random(model, config, folder, dtype)
        workers = []
        for program in programs:
            info(f"{size}: loading, {program.__name__.lower()}")
            workers.append(Worker(program, {**spec, "folder": str(folder)}))
            stack.callback(workers[-1].close)
        yield workers


def need_memory(total: int, device: str, peer: bool) -> None:
    """Refuse what the machine's memory cannot hold, before the system ends some process for it."""
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
    """A llava-hf folder for `model` on meta, a shard at a time: normal matrices, zero biases, unit
    norms.
    """
    import torch

    from llava_min.names import to_layout
    from llava_min.tensors import save_tensors

    generator = torch.Generator().manual_seed(0)
    files, shard, left = {}, {}, len(list(model.parameters()))
    for name, p in model.named_parameters():
        new = torch.empty(p.shape, dtype=dtype)
        if p.dim() == 1 and name.endswith((".bias", ".weight")):
            new.fill_(name.endswith(".weight"))
        else:
            new.normal_(std=0.02, generator=generator)
        shard[to_layout(name, "hf")] = new
        left -= 1
        if not left or sum(x.nbytes for x in shard.values()) > SHARD:
            file = f"model-{len(set(files.values())) + 1:05}.safetensors"
            save_tensors(shard, folder / file)
            files |= dict.fromkeys(shard, file)
            shard = {}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})
    write_json(
        folder / "config.json", replace(config, dtype=str(dtype).removeprefix("torch.")).to_hf()
    )


# What comes out


def machine(device: str) -> dict:
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    words = cpuinfo.read_text().split() if cpuinfo.exists() else []
    isa = next(
        (f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in words),
        platform.machine(),
    )
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": isa,
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
    }


def surroundings(device: str, workers: list[Worker]) -> dict:
    """Where it was measured, and with which releases."""
    names = ["torch", *(worker.name for worker in workers[1:])]
    versions = (worker.records["start"][0]["version"] for worker in workers)
    return {"device": device, "machine": machine(device), "versions": dict(zip(names, versions))}


def place(r: dict) -> list[str]:
    """The machine of `surroundings`, and the releases, a line each."""
    m = r["machine"]
    return [
        m["gpu"] or f"{m['cores']} CPU cores ({m['isa']}), {m['threads']} threads",
        ", ".join(f"{name} {version}" for name, version in r["versions"].items()),
    ]


def ratios(rows: Rows, a: dict, b: dict) -> dict:
    """Figure by figure, ours `a` beside theirs `b`."""
    return {
        key: b[key] / a[key] if better == "less" else a[key] / b[key]
        for key, _, _, _, better in rows
        if key in a
    }


def lines(rows: Rows, r: dict) -> list[str]:
    """The figures of one size, a line of at most 80 columns each under a heading."""
    names = [name for name in ("ours", "transformers") if name in r]
    out = [
        f"{'':36}" + "".join(f"{name:>14}" for name in names) + f"{'ratio':>12}" * ("ratio" in r)
    ]
    for key, label, unit, decimals, better in rows:
        if key in r["ours"]:
            cells = "".join(f"{r[name][key]:14,.{decimals}f}" for name in names)
            ratio = (
                f"{r['ratio'][key]:12.2f}{'' if better == 'share' else 'x'}" if "ratio" in r else ""
            )
            out.append(f"{label.format(**r):26}{unit:>10}{cells}{ratio}")
    return out
