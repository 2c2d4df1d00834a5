"""What a metric does not see: examples whose score comes from its rules and not from the answer.

A score stays what its paper or package says, even a 0 for answers that are all right. What is said
beside it is how many examples it does not measure, why, and which metric does.
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

Unseen = Callable[[str, list[str]], bool]


@dataclass(frozen=True)
class Check:
    """unseen: (prediction, references) -> the metric does not measure this example
    says: what stands behind "3 of 18 examples"
    least: the share of the examples from which on it is said; 0 is any of them
    """

    unseen: Unseen
    says: str
    least: float = 0.0


def lost(sees: Callable[[str], object]) -> Unseen:
    """The metric sees nothing of the prediction, or of any reference, though each is a text."""
    hidden = lambda text: bool(text.strip()) and not sees(text)
    return lambda p, rs: hidden(p) or all(map(hidden, rs))


def any_text(has: Callable[[str], object]) -> Unseen:
    return lambda p, rs: any(map(has, (p, *rs)))


@lru_cache(100_000)
def bleu_words(text: str) -> int:
    """How many sacrebleu's default tokenizer finds."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return len(Tokenizer13a()(text.rstrip()).split())


def foreign(text: str) -> bool:
    """It has letters, and none of a to z."""
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
    "words (of Chinese, Japanese, Thai as characters); say so beside the score, or use chrf, which "
    "needs no words",
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
            "are in a script without spaces, where token_f1 takes what stands between two spaces "
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
        Check(
            neither, "say neither yes nor no and count as yes, as POPE has it; ask for yes or no"
        ),
    ),
    "bleu": (
        Check(
            lost(lambda text: bleu_words(text) >= 4),
            f"have fewer than 4 words {SIDE} and so no 4-gram that can be right; BLEU is 0 where "
            "none has one; use chrf, exact_match or token_f1",
            least=0.5,
        ),
        Check(
            any_text(foreign),
            "have a text without Latin letters, and sacrebleu's default tokenizer (13a) parts "
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


def unseen(metric: str, predictions: list[str], references: list[list[str]]) -> Found:
    """The metric's checks, each with the examples (N,) bool that it is about."""
    pairs = list(zip(predictions, references, strict=True))
    return [
        (check, np.array([check.unseen(p, rs) for p, rs in pairs]))
        for check in CHECKS.get(metric, ())
    ]


def remarks(found: Found, keep: np.ndarray | slice = slice(None)) -> list[str]:
    """A line for each check that is about some of the examples, or about as many as it asks for."""
    out = []
    for check, which in found:
        n, total = int(which[keep].sum()), len(which[keep])
        if n and n >= check.least * total:
            out.append(f"{n} of {total} examples {check.says}")
    return out


def told(table: Mapping[str, dict]) -> list[str]:
    """The remarks in a table of scores, each once, behind the names of the metrics it is about.

    That of a group (`metric group`) is left out where all examples together have one of its kind.
    """
    kind = lambda line: line.partition(" examples ")[2]
    lines: dict[str, list[str]] = {}
    for name, m in table.items():
        whole = table.get(name.partition(" ")[0], {}) if " " in name else {}
        for line in m.get("remarks", ()):
            if kind(line) not in map(kind, whole.get("remarks", ())):
                lines.setdefault(line, []).append(name)
    return [f"{', '.join(names)}: {line}" for line, names in lines.items()]
