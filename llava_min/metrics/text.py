"""Metrics that compare strings as they are."""


def exact_match(predictions: list[str], references: list[list[str]]) -> list[float]:
    """1 where the prediction is one of its references, white space at the ends aside."""
    return [float(p.strip() in {r.strip() for r in rs}) for p, rs in zip(predictions, references, strict=True)]
