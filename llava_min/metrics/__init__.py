"""Metrics of generated text: `metric(predictions, references)` gives one score per example; `summary` the overall."""

import numpy as np

from llava_min.metrics.text import exact_match

METRICS = {"exact_match": exact_match}


def summary(scores: list[float], seed: int = 0, rounds: int = 1000) -> dict:
    """The mean with its 95 % interval by bootstrap over examples (Efron 1979)."""
    values = np.asarray(scores, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(rounds)]
    low, high = np.percentile(means, [2.5, 97.5])
    return {"score": float(values.mean()), "low": float(low), "high": float(high), "n": len(values)}
