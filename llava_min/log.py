"""What a run says while it works: a progress line for the person, a line of JSON for every number worth keeping."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from llava_min.cli import note


SHORT = {"grad_norm": "grad", "tokens_per_s": "tok/s", "rows_per_s": "rows/s"}  # the line fits 80 columns


class Log:
    """Progress on stderr and `metrics.jsonl` in the run folder."""

    def __init__(self, folder: Path, total: int):
        self.file = open(folder / "metrics.jsonl", "a", encoding="utf-8")
        self.total, self.start, self.tty = total, time.perf_counter(), sys.stderr.isatty()

    def write(self, **values: Any) -> None:
        json.dump(values, self.file, ensure_ascii=False)
        self.file.write("\n")
        self.file.flush()

    def step(self, step: int, **values: float) -> None:
        """Record the numbers of an optimizer step and show them: one line that is drawn over on a terminal."""
        seconds = time.perf_counter() - self.start
        self.write(step=step, seconds=round(seconds, 3), **values)
        shown = " · ".join(f"{SHORT.get(name, name)} {brief(value)}" for name, value in values.items())
        left = clock(seconds / step * (self.total - step))
        line = f"step {step}/{self.total} · {shown} · {left} left"
        print(f"\r{line}\033[K" if self.tty else line, end="" if self.tty else "\n", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.tty:
            print("\r\033[K", end="", file=sys.stderr)
        note(text)


def brief(value: float) -> str:
    return f"{value:.2g}" if abs(value) < 0.01 else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def clock(seconds: float) -> str:
    m, s = divmod(round(seconds), 60)
    return f"{m // 60}:{m % 60:02}:{s:02}" if m >= 60 else f"{m}:{s:02}"
