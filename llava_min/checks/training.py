"""Why a training run stops by itself, in words: each function makes the UserError to raise."""

from collections.abc import Iterable
from pathlib import Path

from llava_min.errors import UserError, label


def best_metric_absent(name: str, scores: Iterable[str]) -> UserError:
    return UserError(
        f"{name} is not among {', '.join(scores)}, which the evaluation gave; give one",
        "best_metric",
    )


def no_supervised_token(step: int, records: str) -> UserError:
    return UserError(
        f"step {step}: no token to learn from in records {records}; fix or remove them"
    )


def too_many_skips(
    step: int, skipped: int, records: str, precision: str, last: Path | None
) -> UserError:
    """`precision`: one that may do better. `last`: the last checkpoint."""
    return UserError(
        f"step {step}: {skipped} steps had a loss or gradient that is not finite, the last with "
        f"records {records}; lower {label('lr')}, fix the records, or try {label('precision')} "
        f"{precision}{last_checkpoint(last)}"
    )


def ended_with_skips(step: int, skips: int, kind: str, last: Path | None) -> UserError:
    return UserError(
        f"step {step}: the last {skips} steps had a loss or gradient that is not finite, so no "
        f"{kind} is written; start a new run with a lower {label('lr')}, or fix the records that "
        f"metrics.jsonl names{last_checkpoint(last)}"
    )


def last_checkpoint(path: Path | None) -> str:
    return f"; the last checkpoint is {path}" if path else ""


def check_warmup(warmup: int, steps: int) -> None:
    if warmup > steps:
        raise UserError(
            f"{warmup} steps of warmup, and the run has only {steps}; lower it, or raise "
            f"{label('epochs')}",
            "warmup_steps",
        )
