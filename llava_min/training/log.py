"""The log of a run: a progress line on stderr, and every number as a line of JSON.

Rank 0 writes it; the other ranks have a Log that is silent.
"""

import importlib.util
import json
import math
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llava_min.data.data_uri import Encoded
from llava_min.data.formats import Record
from llava_min.errors import UserError, escape_controls, info, label
from llava_min.util.files import replace

WIDTH = 79  # columns of a progress line


class Log:
    """Progress on stderr, `metrics.jsonl` and `samples.jsonl` in the run folder, and copies for
    TensorBoard or W&B.

    folder: None for a silent rank. total: steps of the run. start: the step a resumed run continues
    from, -1 for a new run; what the interrupted run logged after it is removed. copies: names of
    COPIES, which get the numbers too, with the run's `settings`.
    """

    def __init__(
        self,
        folder: Path | None,
        total: int,
        start: int = -1,
        copies: Sequence[str] = (),
        settings: dict[str, Any] = {},
    ):
        self.folder, self.total, self.first = folder, total, max(start, 0)
        self.started, self.tty = time.perf_counter(), sys.stderr.isatty()
        self.copies = (
            [] if folder is None else [COPIES[name](folder, settings, start) for name in copies]
        )
        if folder is not None:
            for name in ("metrics.jsonl", "samples.jsonl"):
                rewind(folder / name, start)

    def write(self, *, step: int, **values: Any) -> None:
        """Add a line to metrics.jsonl."""
        if self.folder is None:
            return
        # JSON has no NaN
        values = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        self.append("metrics.jsonl", {"step": step, **values})
        for copy in self.copies:
            copy(step, {k: v for k, v in values.items() if isinstance(v, int | float)})

    def samples(self, step: int, rows: Sequence[dict], records: Sequence[Record]) -> None:
        """Add answers of an evaluation to samples.jsonl: `rows` of predict.py, and where the images
        of their records are.
        """
        if self.folder is None:
            return
        for row, record in zip(rows, records):
            self.append(
                "samples.jsonl",
                {
                    "step": step,
                    "id": row["id"],
                    "earlier": record.history(),
                    "prompt": row["prompt"],
                    "prediction": row["prediction"],
                    "reference": next(iter(row["references"]), ""),
                    "images": [image_source(image) for image in record.images],
                },
            )

    def append(self, name: str, values: dict[str, Any]) -> None:
        path = self.folder / name
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values, ensure_ascii=False) + "\n")
        except OSError as e:
            raise UserError(
                f"{path}: cannot be written ({e.strerror}); free space, then continue with "
                f"{label('resume')} auto"
            ) from None

    def step(self, step: int, **values: float) -> None:
        """Log the numbers of an optimizer step, and show them: a terminal keeps only the last line.

        The time left is that of the steps since the start of this process.
        """
        seconds = time.perf_counter() - self.started
        self.write(step=step, seconds=round(seconds, 3), **values)
        if self.folder is None:
            return
        left = seconds / max(step - self.first, 1) * (self.total - step)
        line = progress(step, self.total, left, values)
        line = f"\r{line}\033[K" if self.tty else f"{line}\n"
        print(line, end="", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Show a line that stays."""
        if self.folder is None:
            return
        if self.tty:
            print("\r\033[K", end="", file=sys.stderr)
        info(text)


def image_source(image: Any) -> str | list[Any]:
    """Where an image of a record is: a path, a data URI, or a row of a parquet file."""
    if isinstance(image, Path):
        return str(image)
    if isinstance(image, Encoded):
        return image.uri
    return [str(image.path.absolute()), image.group, image.row, image.index]


# The parts of the progress line; where they do not fit, the last are dropped first.
SHOWN = {
    "loss": "loss {:.3g}",
    "lr": "lr {:.1e}",
    "grad_norm": "grad {:.2g}",
    "tokens_per_s": "{:g} tok/s",
    "pictures_per_s": "{:g} img/s",
    "peak_gb": "{:.1f} GB",
}


def progress(step: int, total: int, left: float, values: dict[str, float]) -> str:
    """One line of at most WIDTH columns; `left`: seconds to the end of the run."""
    parts = [f"{step}/{total}"]
    for name, text in SHOWN.items():
        if name in values:
            value = values[name]
            if name.endswith("_per_s"):
                value = round(value, 1 if value < 10 else None)
            parts.append(text.format(value).replace("e-0", "e-"))
    end = f"{clock(left)} left"
    while len(" ".join(parts)) + len(end) + 1 > WIDTH:
        parts.pop()
    return " ".join([*parts, end])


def clock(seconds: float) -> str:
    """M:SS, or H:MM:SS."""
    m, s = divmod(round(seconds), 60)
    return f"{m // 60}:{m % 60:02}:{s:02}" if m >= 60 else f"{m}:{s:02}"


def rewind(path: Path, step: int) -> None:
    """Remove the lines after `step`, and a half-written one."""
    if not path.exists():
        return
    kept = []
    # not splitlines, which would also split at U+2028
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    replace(path, "".join(kept))


def show_samples(folder: Path, last: int) -> None:
    """Print each question with the answers before the first step and after step `last`."""
    path = folder / "samples.jsonl"
    rows = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        if path.exists()
        else []
    )
    before, after = ({row["id"]: row for row in rows if row["step"] == step} for step in (0, last))
    for name, row in after.items():
        print(f"\n{escape_controls(name)}: {escape_controls(row['prompt'])}")
        texts = {
            "before": before.get(name, row)["prediction"],
            "after": row["prediction"],
            "expected": row["reference"],
        }
        for when, text in texts.items():
            print(f"  {when:<9} {escape_controls(text) or '(empty)'}")


def check_packages(copies: Sequence[str]) -> None:
    """Raises UserError unless the packages of the copies, of the same names, are installed."""
    for name in copies:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"{name}: the package is not installed; pip install 'llava_min[log]'", "log"
            )


def to_tensorboard(folder: Path, settings: dict[str, Any], start: int):
    from torch.utils.tensorboard import SummaryWriter

    # TensorBoard hides the values that an interrupted run wrote from purge_step on
    writer = SummaryWriter(folder / "tensorboard", purge_step=start + 1)

    def copy(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return copy


def to_wandb(folder: Path, settings: dict[str, Any], start: int):
    import wandb

    run = wandb.init(dir=folder, name=folder.name, id=folder.name, resume="allow", config=settings)
    return lambda step, values: run.log(values, step=step)


COPIES = {"tensorboard": to_tensorboard, "wandb": to_wandb}


def peak_memory(device: torch.device) -> float:
    """The most memory this process has had, in GB: of the GPU, or of the whole process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
