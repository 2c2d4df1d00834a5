"""Metrics that compare short answers: exact match, token F1, ANLS, relaxed accuracy, multiple
choice.

Each gives a prediction its best score against any of its references.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable

PUNCTUATION = str.maketrans("", "", string.punctuation)


def best(
    one: Callable[[str, str], float], predictions: list[str], references: list[list[str]]
) -> list[float]:
    return [
        float(max(one(p, r) for r in rs)) for p, rs in zip(predictions, references, strict=True)
    ]


def exact_match(predictions: list[str], references: list[list[str]]) -> list[float]:
    """1 if the prediction equals one of its references, ignoring white space at the ends."""
    return best(lambda p, r: p.strip() == r.strip(), predictions, references)


def token_f1(predictions: list[str], references: list[list[str]]) -> list[float]:
    """0 to 100: the harmonic mean of precision and recall of words (SQuAD's evaluate-v2.0.py), in
    lower case, without punctuation and articles.
    """
    return best(lambda p, r: 100 * f1(words(p), words(r)), predictions, references)


def words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split()


def f1(predicted: list[str], right: list[str]) -> float:
    if not predicted or not right:
        return float(predicted == right)
    same = (Counter(predicted) & Counter(right)).total()
    return 2 * same / (len(predicted) + len(right))


def anls(predictions: list[str], references: list[list[str]]) -> list[float]:
    """0 to 1: similarity by edit distance, 0 below one half (Biten et al. 2019,
    https://arxiv.org/abs/1905.13648), in lower case with single spaces; exactly one half counts, as
    in the DocVQA challenge's script.
    """
    return best(similarity, predictions, references)


def similarity(predicted: str, right: str) -> float:
    a, b = (" ".join(text.lower().split()) for text in (predicted, right))
    longest = max(len(a), len(b))
    if a == b:
        return 1.0
    if 2 * min(len(a), len(b)) < longest:  # the lengths alone put it below one half
        return 0.0
    s = 1 - edit_distance(a, b) / longest
    return s if s >= 0.5 else 0.0


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance, one column of the table at a time in the bits of two integers (Myers
    1999, in the form of Hyyrö 2003): `up` and `down` mark the cells that are one more, one less
    than the cell above.
    """
    if not a:
        return len(b)
    at: dict[str, int] = {}
    for i, c in enumerate(a):
        at[c] = at.get(c, 0) | 1 << i
    every, last = (1 << len(a)) - 1, 1 << len(a) - 1
    up, down, distance = every, 0, len(a)
    for c in b:
        match = at.get(c, 0)
        diagonal = ((match & up) + up ^ up) | match | down
        # one more, one less than the cell to the left
        right, left = down | ~(diagonal | up) & every, up & diagonal
        distance += bool(right & last) - bool(left & last)
        right, left = right << 1 | 1, left << 1
        up, down = (left | ~(diagonal | right)) & every, right & diagonal & every
    return distance


def relaxed_accuracy(predictions: list[str], references: list[list[str]]) -> list[float]:
    """1 if a number is within 5 % of the right one, or another answer is equal ignoring case
    (ChartQA, Masry et al. 2022, https://arxiv.org/abs/2203.10244, in Pix2Struct's form: a right
    answer of 0 is compared as text).
    """
    return best(close, predictions, references)


def close(predicted: str, right: str) -> bool:
    a, b = number(predicted), number(right)
    if a is not None and b:
        return abs(a - b) <= 0.05 * abs(b)
    return predicted.strip().lower() == right.strip().lower()


def number(text: str) -> float | None:
    found = re.fullmatch(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(%?)\s*", text)
    return found and float(found[1]) / (100 if found[2] else 1)


def multiple_choice(predictions: list[str], references: list[list[str]]) -> list[float]:
    """1 if the chosen letter, or else the whole text, is the right one.

    A letter is chosen by "B", "b", "(B)", "B.", "B) two dogs", "B" alone on the first line,
    "Answer: B", "The answer is (B).", "The best of them is B." and the like, also in full width; "A
    dog", "A or B" and a letter alone on a later line choose none, and neither do two such sentences
    that differ. LLaVA's rule for ScienceQA is a subset: capitals, "B. …" and "The answer is B."
    VLMEvalKit (can_infer_option) takes the only option letter among the last four words, so that
    "It shows A dog." chooses A. Here a letter must be followed by a mark or the end of the line,
    and inside a text preceded by "is" or "answer".
    """
    return best(chosen, predictions, references)


def chosen(predicted: str, right: str) -> bool:
    a, b = letter(predicted), letter(right)
    return a == b if a and b else words(predicted) == words(right) != []


NOUN = r"(?:answer|option|choice)"
END = r"(?=[.):,;、。]|[^\S\n]*(?:\n|$))"  # after a letter: a mark, or the end of the line
AND = r"\s*(?:[,/&]|or\b|and\b)\s*"
MORE = rf"(?!{AND}(?:\([A-Za-z]\)|(?-i:[A-Z])(?={AND}|[.\s]*$)))"  # "(A) or (B)" chooses none
BEGIN = re.compile(
    rf"\s*(?:the\s+)?(?:(?:correct\s+)?{NOUN}(?:\s+is)?\s*:?\s+)?"
    rf"(?:\(([a-z])\)|([a-z]){END}){MORE}",
    re.IGNORECASE,
)
CONCLUSION = re.compile(
    rf"\b(?i:{NOUN})\b[^.\n]*?(?:\bis|:)\s*:?\s*(?:\(([A-Za-z])\)|([A-Z]){END}){MORE}"
    rf"|\bis:?\s+(?:\(([A-Za-z])\)|([A-Z]))[.!]?[^\S\n]*(?:\n|$)"
)


def letter(text: str) -> str | None:
    text = unicodedata.normalize("NFKC", text).replace("*", "")  # full width; bold in Markdown
    if found := BEGIN.match(text):
        return (found[1] or found[2]).upper()
    letters = {next(filter(None, m.groups())).upper() for m in CONCLUSION.finditer(text)}
    return letters.pop() if len(letters) == 1 else None
