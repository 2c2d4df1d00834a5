"""Scores of answers: metrics over rows, 95 % intervals by bootstrap, paired differences.

    rows -> measure_all -> Measured -> table -> {"exact_match": {"score", "low", "high", "n"}, …}

`rows` are those of predict.py. A row with an `error`, or without references, is never scored.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llava_min.errors import UserError, escape_controls, label, preview, shorten, warn
from llava_min.evaluation.metrics import Rule, blind, find, interval, measure, resampled

MAX_ERRORS = 5  # unreadable records whose error is quoted in full


class Measured(NamedTuple):
    """What every metric found on the rows that are scored.

    rows: (N,) their indices. statistics: per metric the numbers (N, K) whose sums give the overall
    scores, and the rule that gives them. unmeasured: per metric the examples it does not measure.
    """

    rows: np.ndarray
    statistics: dict[str, tuple[np.ndarray, Rule]]
    unmeasured: dict[str, blind.Found]


def score(rows: list[dict], metrics: Sequence[str], seed: int = 0) -> dict[str, dict]:
    """{name: {"score", "low", "high", "n"}} with 95 % intervals, and `remarks`, a list of lines,
    where a metric does not measure some of the examples. Every row gets its own `scores`.

    A metric that fails is named in a warning and has no entry. Raises UserError where no row can be
    scored.
    """
    return table(measure_all(rows, metrics), seed)


def measure_all(rows: list[dict], metrics: Sequence[str]) -> Measured:
    """Run every metric once on the rows that can be scored; errors and effects as in `score`."""
    scored = [i for i, row in enumerate(rows) if row["references"] and "error" not in row]
    if not scored:
        raise UserError(
            f"none of {len(rows)} records has both an answer to score and one to compare it with; "
            f"give {label('data')} with right answers, and images that can be read"
        )
    for row in rows:
        row["scores"] = {}
    predictions = [rows[i]["prediction"] for i in scored]
    references = [rows[i]["references"] for i in scored]

    statistics, unmeasured = {}, {}
    for name, metric in find(metrics).items():
        try:
            scores, sums, rule = measure(metric, predictions, references)
        except Exception as e:  # whatever one metric raises, the others are worth having
            kind = "" if isinstance(e, UserError) else f"{type(e).__name__}: "
            warn(f"metric {name} failed and is left out: {kind}{escape_controls(e)}")
            continue
        statistics[name] = sums, rule
        unmeasured[name] = blind.unmeasured(name, predictions, references)
        for i, value in zip(scored, scores):
            rows[i]["scores"][name] = value
    return Measured(np.array(scored), statistics, unmeasured)


def table(measured: Measured, seed: int = 0, among: Sequence[int] | None = None) -> dict[str, dict]:
    """Overall scores of all scored rows, or of those `among` them; the form is that of `score`."""
    keep = np.isin(measured.rows, among) if among is not None else slice(None)
    kept = {name: (sums[keep], rule) for name, (sums, rule) in measured.statistics.items()}
    out = {}
    for name, (values, n) in overall(kept, seed).items():
        out[name] = interval(values, n)
        if lines := blind.remarks(measured.unmeasured.get(name, ()), keep):
            out[name]["remarks"] = lines
    return out


def overall(
    statistics: dict[str, tuple[np.ndarray, Rule]], seed: int
) -> dict[str, tuple[np.ndarray, int]]:
    """{name: (scores (1 + R,), N)}: the score of the N rows, then of R bootstrap samples of them.

    Every metric sees the same samples, so the columns of all are summed together.
    """
    if not statistics or not all(len(columns) for columns, _ in statistics.values()):
        return {}
    sums = resampled(np.concatenate([columns for columns, _ in statistics.values()], 1), seed)
    start, out = 0, {}
    for name, (columns, rule) in statistics.items():
        n, width = columns.shape
        for suffix, values in rule(sums[:, start : start + width]).items():
            if np.isfinite(values[0]):
                out[name + suffix] = values, n
            else:
                warn(f"metric {name}{suffix} is not defined on these {n} answers and is left out")
        start += width
    return out


def difference(
    base: Measured, tuned: Measured, seed: int = 0, among: Sequence[int] | None = None
) -> dict[str, dict]:
    """How much more `tuned` scores than `base`, with the interval of a paired bootstrap.

    Only rows that both were scored on count, or those `among` them. Returns {name: {"base",
    "tuned", "score", "low", "high", "n"}}, where `score` is the difference.
    """
    rows, i, j = np.intersect1d(base.rows, tuned.rows, return_indices=True)
    if among is not None:
        keep = np.isin(rows, among)
        i, j = i[keep], j[keep]
    if not len(i):
        return {}

    # one seed: both sides are resampled alike, which is what makes the bootstrap paired
    both = [name for name in base.statistics if name in tuned.statistics]
    before, after = (
        overall({m: (side.statistics[m][0][at], side.statistics[m][1]) for m in both}, seed)
        for side, at in ((base, i), (tuned, j))
    )
    return {
        name: {
            "base": float(before[name][0][0]),
            "tuned": float(after[name][0][0]),
            **interval(after[name][0] - before[name][0], len(i)),
        }
        for name in before
        if name in after
    }


# ---- what the scores do not show


def cut_answers(rows: Sequence[dict], max_new_tokens: int) -> list[str]:
    """A line about the answers that stopped at the token limit, if there are any."""
    cut = [row["id"] for row in rows if row.get("stopped") == "limit"]
    if not cut:
        return []
    return [
        f"{len(cut)} of {len(rows)} answers were cut at {label('max_new_tokens')} {max_new_tokens},"
        f" before their end: {preview(map(shorten, cut), ', ')}; raise it"
    ]


def remarks(rows: Sequence[dict]) -> list[str]:
    """Lines that count and name the records that have no readable image, reference or answer."""
    unreadable = [row["id"] for row in rows if "error" in row]
    bare = [row["id"] for row in rows if not row["references"]]
    empty = [row["id"] for row in rows if not row["prediction"] and "error" not in row]
    out = [
        f"{len(ids)} of {len(rows)} records {what}: {preview(map(shorten, ids), ', ')}"
        for what, ids in (
            ("could not be read and are not scored", unreadable),
            ("have no reference and are not scored", bare),
            ("have an empty prediction", empty),
        )
        if ids
    ]
    return out + [row["error"] for row in rows if "error" in row][:MAX_ERRORS]
