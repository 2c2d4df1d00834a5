"""What a metric does not measure: examples whose score comes from its rules, not from the answer.

A score is always what its paper or package says, even if that is 0 for right answers. Remarks say
how many examples it does not measure, why, and which metric does.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from llava_min.evaluation.metrics.text import letter
from llava_min.evaluation.metrics.text import words as squad_words
from llava_min.evaluation.metrics.vqa import normalize, normalize_textvqa
from llava_min.evaluation.metrics.words import SPACELESS, ascii_words, words
from llava_min.evaluation.metrics.yes_no import says_yes

Unmeasured = Callable[[str, list[str]], bool]


@dataclass(frozen=True)
class Check:
    """unmeasured: (prediction, references) -> True if the metric does not measure this example.
    text: what follows "3 of 18 examples".
    min_share: remark on it only if it concerns this share of the examples; 0 is any of them.
    """

    unmeasured: Unmeasured
    text: str
    min_share: float = 0.0


def lost(sees: Callable[[str], object]) -> Unmeasured:
    """The metric `sees` nothing of the prediction, or of any reference, though it is not empty."""
    hidden = lambda text: bool(text.strip()) and not sees(text)
    return lambda p, rs: hidden(p) or all(map(hidden, rs))


def any_text(has: Callable[[str], object]) -> Unmeasured:
    return lambda p, rs: any(map(has, (p, *rs)))


@lru_cache(100_000)
def bleu_words(text: str) -> int:
    """How many words sacrebleu's default tokenizer finds."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return len(Tokenizer13a()(text.rstrip()).split())


def foreign(text: str) -> bool:
    """The text has letters, but none of a to z."""
    return any(map(str.isalpha, text)) and not re.search("[a-z]", text, re.IGNORECASE | re.ASCII)


def no_letter(prediction: str, references: list[str]) -> bool:
    return bool(prediction.strip()) and not letter(prediction) and all(map(letter, references))


def neither(prediction: str, references: list[str]) -> bool:
    return bool(prediction.strip()) and says_yes(prediction) and "yes" not in words(prediction)


SIDE = "in the prediction or in all references"
NO_WORD = Check(lost(words), f"have no letter or digit {SIDE} and score 0; use exact_match or chrf")
OTHER = Check(
    any_text(lambda text: words(text) != tuple(ascii_words(text))),
    "have letters beyond a to z, which rouge-score's own tokenizer drops and this one keeps as "
    "words (in Chinese, Japanese and Thai as characters); say so beside the score, or use chrf, "
    "which needs no words",
)
ENGLISH = Check(
    any_text(foreign),
    "have a text without Latin letters, and the metric's model is English; use chrf",
)
NORMALISED = (
    f"have nothing but articles and marks {SIDE}, which the normaliser drops; use exact_match"
)

CHECKS: dict[str, tuple[Check, ...]] = {
    "token_f1": (
        Check(
            lost(squad_words),
            f"have nothing but articles and punctuation {SIDE}, which token_f1 drops, so that "
            "two such texts count as equal whatever they say; use exact_match",
        ),
        Check(
            any_text(SPACELESS.search),
            "are in a script without spaces, where token_f1 takes all text between two spaces "
            "for one word; use chrf or rouge1",
        ),
    ),
    "vqa": (Check(lost(normalize), NORMALISED),),
    "textvqa": (Check(lost(normalize_textvqa), NORMALISED),),
    "multiple_choice": (
        Check(no_letter, "choose no letter and count as wrong; ask for the letter alone"),
        Check(
            lambda p, rs: not any(letter(r) or squad_words(r) for r in rs),
            "have no letter and no word in any reference and score 0; use exact_match",
        ),
    ),
    "pope": (
        Check(neither, "say neither yes nor no and count as yes, as in POPE; ask for yes or no"),
    ),
    "bleu": (
        Check(
            lost(lambda text: bleu_words(text) >= 4),
            f"have fewer than 4 words {SIDE} and so no 4-gram that can be right; BLEU is 0 if no "
            "example has one; use chrf, exact_match or token_f1",
            min_share=0.5,
        ),
        Check(
            any_text(foreign),
            "have a text without Latin letters, and sacrebleu's default tokenizer (13a) splits "
            "words at spaces and ASCII punctuation alone; use chrf or rougeL",
        ),
    ),
    "rouge1": (NO_WORD, OTHER),
    "rougeL": (NO_WORD, OTHER),
    "rougeLsum": (NO_WORD, OTHER),
    "rouge2": (
        Check(
            lost(lambda text: len(words(text)) >= 2),
            f"have fewer than 2 words {SIDE} and score 0; use rouge1, rougeL or chrf",
        ),
        OTHER,
    ),
    "bertscore": (ENGLISH,),
    "nli": (ENGLISH,),
}


Found = list[tuple[Check, np.ndarray]]


def unmeasured(metric: str, predictions: list[str], references: list[list[str]]) -> Found:
    """The metric's checks, each with the examples (N,) bool that it concerns."""
    pairs = list(zip(predictions, references, strict=True))
    return [
        (check, np.array([check.unmeasured(p, rs) for p, rs in pairs]))
        for check in CHECKS.get(metric, ())
    ]


def remarks(found: Found, keep: np.ndarray | slice = slice(None)) -> list[str]:
    """A line for each check that concerns some of the examples, and at least its `min_share`."""
    out = []
    for check, which in found:
        n, total = int(which[keep].sum()), len(which[keep])
        if n and n >= check.min_share * total:
            out.append(f"{n} of {total} examples {check.text}")
    return out


def remark_lines(table: Mapping[str, dict]) -> list[str]:
    """The remarks in a table of scores, each once, after the names of the metrics it concerns.

    One of a group (`metric group`) is left out if there is one of the same kind on all examples.
    """
    kind = lambda line: line.partition(" examples ")[2]
    lines: dict[str, list[str]] = {}
    for name, m in table.items():
        whole = table.get(name.partition(" ")[0], {}) if " " in name else {}
        for line in m.get("remarks", ()):
            if kind(line) not in map(kind, whole.get("remarks", ())):
                lines.setdefault(line, []).append(name)
    return [f"{', '.join(names)}: {line}" for line, names in lines.items()]
