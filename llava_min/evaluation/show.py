"""Scores as tables for the terminal, at most 80 columns wide."""

import textwrap
from collections.abc import Sequence
from typing import Any

from llava_min.errors import escape_controls, info
from llava_min.evaluation.metrics.blind import remark_lines


def show_all(sides: Sequence[Any], base: Any, tuned: Any, change: dict | None) -> None:
    """Scores and remarks of one model, or of two and their `change` from `base` to `tuned`; each is
    an Answers of eval.py.
    """
    first, others = sides[0], sides[1:]
    if others:
        print(escape_controls(first.name))
    show_scores(first.scores)
    if others:
        show_change(change, base.name, tuned.name)
    for other in others:
        show_new_remarks(other.name, other.scores, first.scores)
    for side in sides:
        for line in side.settings["remarks"]:
            info(f"{side.name}: {line}")


def show_scores(scores: dict[str, dict]) -> None:
    """The table of `score.table`, and under it what its metrics do not measure."""
    print(f"{'metric':<28}{'score':>8}{'95 % interval':>20}{'n':>8}")
    for name, m in scores.items():
        interval = f"{m['low']:.3f} to {m['high']:.3f}"
        print(f"{escape_controls(name):<28.28}{m['score']:>8.3f}{interval:>20}{m['n']:>8}")
    for line in remark_lines(scores):
        show_remark(line)


def show_change(change: dict[str, dict], base: str, tuned: str) -> None:
    """The table of `score.difference` between two models of these names."""
    print(f"\nbase  {escape_controls(base)[-70:]}\ntuned {escape_controls(tuned)[-70:]}")
    print(f"{'metric':<26}{'base':>9}{'tuned':>9}{'change':>9}{'95 % interval':>22}")
    for name, m in change.items():
        interval = f"{m['low']:+.3f} to {m['high']:+.3f}"
        values = f"{m['base']:>9.3f}{m['tuned']:>9.3f}{m['score']:>+9.3f}"
        print(f"{escape_controls(name):<26.26}{values}{interval:>22}")


def show_new_remarks(name: str, scores: dict[str, dict], shown: dict[str, dict]) -> None:
    """What else the metrics do not measure of a second model, under its name."""
    before = remark_lines(shown)
    for line in remark_lines(scores):
        if line not in before:
            show_remark(f"{name}: {line}")


def show_remark(line: str) -> None:
    print(textwrap.fill(escape_controls(line), 79, subsequent_indent="  ", break_on_hyphens=False))
