"""What a run says while it works: a progress line for the person, a line of JSON for every number
worth keeping.

On several ranks the first one speaks; the others have a Log that is silent.
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
from llava_min.errors import UserError, escape_controls, info
from llava_min.util.files import replace

WIDTH = 79  # columns of a progress line


class Log:
    """Progress on stderr, `metrics.jsonl` and `samples.jsonl` in the run folder, and copies for
    TensorBoard or W&B.

    start: the step a resumed run goes on from, -1 for one that begins; what an interrupted run
    logged after it is taken out.
    folder: None on ranks that are silent.
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
        self.begun, self.tty = time.perf_counter(), sys.stderr.isatty()
        self.copies = (
            [] if folder is None else [COPIES[name](folder, settings, start) for name in copies]
        )
        if folder is not None:
            for name in ("metrics.jsonl", "samples.jsonl"):
                rewind(folder / name, start)

    def write(self, *, step: int, **values: Any) -> None:
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
        """Answers of the model on the way, each a row of evaluate.py, with where the pictures of
        its record are.
        """
        place = lambda p: (
            str(p)
            if isinstance(p, Path)
            else p.uri
            if isinstance(p, Encoded)
            else [str(p.path.absolute()), p.group, p.row, p.index]
        )
        for row, record in zip(rows, records) if self.folder else ():
            self.append(
                "samples.jsonl",
                {
                    "step": step,
                    "id": row["id"],
                    "earlier": record.history(),
                    "prompt": row["prompt"],
                    "prediction": row["prediction"],
                    "reference": next(iter(row["references"]), ""),
                    "images": [place(p) for p in record.images],
                },
            )

    def append(self, name: str, values: dict[str, Any]) -> None:
        path = self.folder / name
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values, ensure_ascii=False) + "\n")
        except OSError as e:
            raise UserError(
                f"{path}: cannot be written ({e.strerror}); free space, then go on with --resume "
                "auto"
            ) from None

    def step(self, step: int, **values: float) -> None:
        """Record the numbers of an optimizer step and show them: one line that is drawn over on a
        terminal.
        """
        seconds = time.perf_counter() - self.begun
        self.write(step=step, seconds=round(seconds, 3), **values)
        if self.folder is not None:
            line = progress(
                step, self.total, seconds / max(step - self.first, 1) * (self.total - step), values
            )
            print(
                f"\r{line}\033[K" if self.tty else line,
                end="" if self.tty else "\n",
                file=sys.stderr,
                flush=True,
            )

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.folder is None:
            return
        if self.tty:
            print("\r\033[K", end="", file=sys.stderr)
        info(text)


# The progress line, from what is left out last to what is left out first when it does not fit.
SHOWN = {
    "loss": "loss {:.3g}",
    "lr": "lr {:.1e}",
    "grad_norm": "grad {:.2g}",
    "tokens_per_s": "{:g} tok/s",
    "pictures_per_s": "{:g} pic/s",
    "peak_gb": "{:.1f} GB",
}


def progress(step: int, total: int, left: float, values: dict[str, float]) -> str:
    """One line of at most WIDTH columns."""
    values = {
        k: round(v, 1 if v < 10 else None) if k.endswith("_per_s") else v for k, v in values.items()
    }
    shown = (
        text.format(values[name]).replace("e-0", "e-")
        for name, text in SHOWN.items()
        if name in values
    )
    parts = [f"{step}/{total}", *shown]
    end = f"{clock(left)} left"
    while len(" ".join(parts)) + len(end) + 1 > WIDTH:
        parts.pop()
    return " ".join([*parts, end])


def clock(seconds: float) -> str:
    m, s = divmod(round(seconds), 60)
    return f"{m // 60}:{m % 60:02}:{s:02}" if m >= 60 else f"{m}:{s:02}"


def rewind(path: Path, step: int) -> None:
    """Take out the lines after `step`, and one that a kill tore."""
    if not path.exists():
        return
    kept = []
    # splitlines would cut at U+2028, too
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    replace(path, "".join(kept))


def show_samples(folder: Path, last: int) -> None:
    """Print the answers before the first step and after step `last`, one above the other."""
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
        for label, text in texts.items():
            print(f"  {label:<9} {escape_controls(text) or '(empty)'}")


def check_packages(copies: Sequence[str]) -> None:
    """What the copies are made with is installed (the packages have their names), or UserError."""
    for name in copies:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"--log {name}: the package is not installed; pip install 'llava_min[log]'"
            )


def to_tensorboard(folder: Path, settings: dict[str, Any], start: int):
    from torch.utils.tensorboard import SummaryWriter

    # of an older file no value is shown from purge_step on
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
