"""VQA accuracy (Antol et al. 2015, https://arxiv.org/abs/1505.00468): an answer is right when three
of ten people gave it.

The score is averaged over the ten ways to leave one of ten references out, as in the authors'
script (GT-Vision-Lab/VQA, vqaEval.py). Unlike there, both sides are always normalised: the script
skips questions whose ten answers are one string, so "Yes" for "yes" would be wrong.
"""

import re
from functools import lru_cache

from llava_min.errors import UserError, escape_controls

NUMBERS = {
    "none": "0",
    **{
        word: str(i)
        for i, word in enumerate("zero one two three four five six seven eight nine ten".split())
    },
}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't
    mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
    we've weren't what'll what're what's what've when's where'd where's where've who'd
    who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
# A contraction without one of its apostrophes -> with it; and one pair that the script has in the
# wrong order.
APOSTROPHES = {
    word[:i] + word[i + 1 :]: word for word in CONTRACTIONS for i, c in enumerate(word) if c == "'"
}
APOSTROPHES |= {"somebody'd": "somebodyd"}


@lru_cache(100_000)
def normalize(text: str) -> str:
    """The script's processPunctuation and processDigitArticle. A mark beside a space is removed,
    and so is every mark if a comma is between digits; any other becomes a space. A period stays
    only before a digit.
    """
    text = out = text.replace("\n", " ").replace("\t", " ").strip()
    thousands = re.search(r"\d,\d", text)
    for mark in PUNCTUATION:
        if mark in text:
            out = out.replace(
                mark, "" if thousands or mark + " " in text or " " + mark in text else " "
            )
    out = re.sub(r"\.(?!\d)", "", out)
    words = [NUMBERS.get(word, word) for word in out.lower().split()]
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(100_000)
def normalize_textvqa(text: str) -> str:
    """TextVQA's normaliser (facebookresearch/mmf, EvalAIAnswerProcessor, which LLaVA uses): one
    more step, then VQA's.
    """
    return normalize(text.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def vqa(predictions: list[str], references: list[list[str]]) -> list[float]:
    """0 to 100. Raises UserError unless every question has ten references."""
    return accuracy(predictions, references, normalize)


def textvqa(predictions: list[str], references: list[list[str]]) -> list[float]:
    """`vqa` with TextVQA's normaliser."""
    return accuracy(predictions, references, normalize_textvqa)


def accuracy(predictions: list[str], references: list[list[str]], normalize) -> list[float]:
    scores = []
    for p, rs in zip(predictions, references, strict=True):
        if len(rs) != 10:
            raise UserError(
                f"{len(rs)} references, the first {escape_controls(rs[0])[:40]!r}, where VQA "
                "accuracy takes 10 for each question; with fewer use exact_match, token_f1 or anls"
            )
        same = sum(normalize(r) == normalize(p) for r in rs)
        # leaving out one of the `same` people who agree leaves same - 1; leaving out another
        # changes nothing
        scores.append(100 * (same * min(1, (same - 1) / 3) + (10 - same) * min(1, same / 3)) / 10)
    return scores
