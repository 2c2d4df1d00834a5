"""POPE (Li et al. 2023, https://arxiv.org/abs/2305.10355): does the model say yes to things that
are not there?
"""

import numpy as np

from llava_min.errors import UserError, escape_controls


def says_yes(text: str) -> bool:
    """The authors' rule (RUCAIBox/POPE, evaluate.py): "no" or "not" in the first sentence means no,
    everything else yes.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def pope_rows(predictions: list[str], references: list[list[str]]) -> list[tuple[float, ...]]:
    """(right, true positive, false positive, true negative, false negative) of each answer; yes is
    positive.
    """
    rows = []
    for p, rs in zip(predictions, references, strict=True):
        label = rs[0].strip().lower()
        if label not in ("yes", "no"):
            raise UserError(
                f"a reference is {escape_controls(rs[0])[:40]!r}, where pope takes yes or no; "
                "choose another metric"
            )
        said, is_so = says_yes(p), label == "yes"
        counts = said and is_so, said and not is_so, not said and not is_so, not said and is_so
        rows.append((said == is_so, *counts))
    return rows


def pope_overall(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Fractions; the metric itself is accuracy. Precision is not defined if no answer is yes,
    recall if no label is.
    """
    tp, fp, tn, fn = sums.T
    n = tp + fp + tn + fn
    with np.errstate(invalid="ignore"):
        return {
            "": (tp + tn) / n,
            "_precision": tp / (tp + fp),
            "_recall": tp / (tp + fn),
            "_f1": 2 * tp / (2 * tp + fp + fn),
            "_yes_ratio": (tp + fp) / n,
        }
