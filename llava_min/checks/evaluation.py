"""What eval.py refuses: questions without answers, a folder of another kind, failed metrics."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from llava_min.errors import UserError, label, shorten


def check_questions(
    references: Sequence[Sequence[str]], fields: Iterable[dict], by: str | None
) -> None:
    """Some record has a right answer, and some record has the field `by` that groups the scores."""
    if not any(references):
        raise UserError(
            f"none of its {len(references)} records has a right answer to compare with; give one "
            "that has",
            "data",
        )
    if by and not any(by in extra for extra in fields):
        raise UserError(
            f"no record has a field {shorten(by)}; give one that stands beside the conversation",
            "by",
        )


def check_no_comparison(out: Path | None, compare: str | None) -> None:
    """An earlier comparison does not end up beside the scores of another run."""
    if out is None or compare or not (out / "settings.json").exists():
        return
    if found := [name for name in ("compare", "compare.json") if (out / name).exists()]:
        raise UserError(
            f"{out} holds a comparison ({', '.join(found)}), which would end up beside other "
            "scores; compare as before, or give another folder, or remove it",
            "out",
        )


def check_all_scored(
    metrics: Iterable[str], scored: Sequence[Iterable[str]], out: Path | None
) -> None:
    """Every metric was computed for every model; called last, when all else is written."""
    if failed := [name for name in metrics if any(name not in names for names in scored)]:
        again = f" and start again with the same {label('out')}, which keeps the answers"
        raise UserError(
            f"{', '.join(failed)} failed, as the warnings above say; correct "
            f"it{again if out else ''}",
            "metrics",
        )
