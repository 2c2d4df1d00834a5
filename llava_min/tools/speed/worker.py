"""A measured program in a process of its own, so that its peak memory is its own.

A program is a class: the constructor loads the weights that its `spec` names, the methods are jobs.
`Worker` is the parent's end of it.
"""

import contextlib
import multiprocessing
import os
import signal
import statistics
import time
import traceback
from pathlib import Path
from typing import Any

from llava_min.config import LlavaConfig
from llava_min.errors import UserError
from llava_min.util.files import read_json

MIB = 1 << 20


# ---- in the program's process


def now(device: Any) -> float:
    """Seconds, once the device has finished."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def prompt(config: LlavaConfig, rows: int, text: int) -> tuple[Any, Any]:
    """Ids (rows, P + text) with an image in each row, pixels (rows, 3, S, S)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    words = torch.randint(config.text.vocab_size, (rows, text), generator=generator)
    words[words == config.image_token_id] = 0
    image = torch.full((rows, config.tokens_per_image), config.image_token_id)
    pixels = torch.randn(
        rows, 3, config.vision.image_size, config.vision.image_size, generator=generator
    )
    return torch.cat([words[:, :5], image, words[:, 5:]], dim=1), pixels


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
    """For the peer's process, before it imports torch: no network, and no setting of ours."""
    os.environ.pop("THP_MEM_ALLOC_ENABLE", None)
    os.environ["HF_HUB_OFFLINE"] = "1"


def quiet() -> None:
    """No messages and no progress bars of transformers, which is imported."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def config_of(folder: str) -> LlavaConfig:
    path = Path(folder, "config.json")
    return LlavaConfig.from_hf(read_json(path), str(path))


def serve(pipe: Any, program: type, spec: dict) -> None:
    """Load, then do the jobs (name, arguments) from `pipe`; a dict answers each."""
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
            peak_memory(worker.device)  # resets the peak
            pipe.send({**getattr(worker, job)(*arguments), "peak": peak_memory(worker.device)})
    except EOFError:  # the parent is gone
        pass
    except UserError as e:
        pipe.send({"mistake": str(e)})
    except Exception:
        pipe.send({"fault": traceback.format_exc()})


# ---- in the parent


class Ended(UserError):
    """A program's process is gone."""


class Worker:
    """The parent's end of a program; `records` keeps what each kind of job answered."""

    def __init__(self, program: type, spec: dict):
        # a fork would start with its parent's memory
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
            raise Ended(
                f"{self.name}: its process ended with code {self.process.exitcode}, most likely "
                "for lack of memory; take a smaller size or --no-peer"
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
