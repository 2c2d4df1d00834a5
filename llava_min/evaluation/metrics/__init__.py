"""Metrics of generated text, and the confidence intervals of their overall scores.

A metric is a function `metric(predictions, references) -> scores`: N strings and N lists of strings
in, N numbers out; the overall score is their mean. If it has another rule (BLEU, POPE), the metric
is a `Corpus`. `text`, `vqa` and `yes_no` are implemented here, `library` wraps packages, and
`module:function` names your own. `blind` knows which examples a metric does not measure.
"""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llava_min.errors import UserError, escape_controls, shorten
from llava_min.evaluation.metrics import library
from llava_min.evaluation.metrics.text import (
    anls,
    exact_match,
    multiple_choice,
    relaxed_accuracy,
    token_f1,
)
from llava_min.evaluation.metrics.vqa import textvqa, vqa
from llava_min.evaluation.metrics.yes_no import pope_overall, pope_rows

Rule = Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Corpus:
    """A metric whose overall score is a rule on sums over the examples.

    rows: (predictions, references) -> one (score, statistic, statistic, …) per example.
    overall: the summed statistics (R, K) -> {suffix: (R,)}; the suffix "" is the metric itself, NaN
    a value that is not defined.
    """

    rows: Callable[[list[str], list[list[str]]], Sequence[Sequence[float]]]
    overall: Rule


Metric = Callable[[list[str], list[list[str]]], Sequence[float]] | Corpus

METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "vqa": vqa,
    "textvqa": textvqa,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
    "multiple_choice": multiple_choice,
    "pope": Corpus(pope_rows, pope_overall),
}
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
EXTRAS: dict[str, Callable[[], Metric]] = {
    "bleu": lambda: Corpus(*library.bleu()),
    "chrf": lambda: Corpus(*library.chrf()),
    **{name: functools.partial(library.rouge, name) for name in ROUGE},
    "bertscore": library.bertscore,
    "nli": library.nli,
}


def find(names: Sequence[str]) -> dict[str, Metric]:
    """The metrics by name, ready to use; `rouge` means its four.

    Raises UserError for an unknown name, a package that is not installed, a model that is not on
    disk.
    """
    names = [n for name in names for n in (ROUGE if name == "rouge" else (name,))]
    return {name: load(name) for name in names}


@functools.cache
def load(name: str) -> Metric:
    if name in METRICS:
        return METRICS[name]
    if name in EXTRAS:
        return EXTRAS[name]()
    module, colon, function = name.partition(":")
    if not colon:
        known = ", ".join([*METRICS, *EXTRAS, "rouge"])
        raise UserError(
            f"{shorten(name)!r} is not one of {known}; choose among them, or name your own as "
            "module:function",
            "metrics",
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        metric = getattr(importlib.import_module(module), function)
    except Exception as e:
        raise UserError(
            f"{shorten(name)} cannot be imported ({type(e).__name__}: {escape_controls(e)}); give "
            "module:function of a module that is in this folder or installed",
            "metrics",
        ) from None
    if not callable(metric) and not isinstance(metric, Corpus):
        raise UserError(
            f"{shorten(name)} is a {type(metric).__name__}, expected a function of predictions and "
            "references; name one",
            "metrics",
        )
    return metric


# ---- scores, sums, intervals


def mean(sums: np.ndarray) -> dict[str, np.ndarray]:
    return {"": sums[:, 0] / sums[:, 1]}


def measure(
    metric: Metric, predictions: list[str], references: list[list[str]]
) -> tuple[list[float], np.ndarray, Rule]:
    """Each example's score (N), the statistics (N, K) whose sums give the overall score, and the
    rule that gives it.

    Raises ValueError for too few or too many scores, and for scores that are not finite numbers.
    """
    rows = metric.rows if isinstance(metric, Corpus) else metric
    # copies: a metric that changes its arguments does not change those of the next
    found = rows(list(predictions), [list(r) for r in references])
    values = np.asarray(found, dtype=np.float64)
    if len(values) != len(predictions) or values.ndim != 1 + isinstance(metric, Corpus):
        raise ValueError(f"gave scores of shape {values.shape} for {len(predictions)} predictions")
    bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(1))
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(values)} scores are not finite, the first for the prediction "
            f"{escape_controls(predictions[bad[0]])[:80]!r}"
        )
    if isinstance(metric, Corpus):
        return values[:, 0].tolist(), values[:, 1:], metric.overall
    return values.tolist(), np.stack([values, np.ones(len(values))], 1), mean


def resampled(statistics: np.ndarray, seed: int = 0, rounds: int = 1000) -> np.ndarray:
    """Sums of the statistics (N, K) -> (1 + rounds, K): of all examples, then of each bootstrap
    sample of them (Efron 1979). The samples depend only on N and the seed, so two systems can be
    compared on the same ones.
    """
    n, rng = len(statistics), np.random.default_rng(seed)
    sums = np.empty((1 + rounds, statistics.shape[1]))
    sums[0] = statistics.sum(0)
    for row in sums[1:]:
        row[:] = np.bincount(rng.integers(0, n, n), minlength=n) @ statistics
    return sums


def interval(values: np.ndarray, n: int) -> dict:
    """{"score", "low", "high", "n"} of scores (1 + R,) from `resampled`: the first one, and the
    middle 95 % of the others.
    """
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return {"score": float(values[0]), "low": float(low), "high": float(high), "n": n}
