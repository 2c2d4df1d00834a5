"""Words as ROUGE counts them, in every script.

rouge-score's own tokenizer keeps a-z and 0-9 alone (google-research/rouge, tokenize.py), so that a
Chinese or an Arabic answer has no word and scores 0 whatever it says. Here a word is a run of
letters and digits with their marks, and in scripts that put no space between words each character
is one, as is customary for ROUGE on Chinese (LCSTS, Hu et al. 2015,
https://arxiv.org/abs/1506.05865). On ASCII text both tokenizers give the same words.
"""

import re
import unicodedata
from functools import lru_cache

# Thai, Lao, Burmese, Khmer, Han, kana, bopomofo: no space between words.
SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029"
    "\u3031-\u303c\u3041-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
)
JOINERS = re.compile("[\u00ad\u200b-\u200d\u2060]")  # they stand in words unseen


def ascii_words(text: str) -> list[str]:
    """rouge-score's own words."""
    return re.findall("[a-z0-9]+", text.lower())


@lru_cache(100_000)
def words(text: str) -> tuple[str, ...]:
    """In lower case; full-width forms and ligatures as the plain characters (Unicode's NFKC)."""
    if text.isascii():
        return tuple(ascii_words(text))
    found, last = [], ""  # "word" or "character": what a mark that follows belongs to
    for c in unicodedata.normalize("NFKC", JOINERS.sub("", text)).lower():
        kind = unicodedata.category(c)[0]
        alone = bool(SPACELESS.match(c))
        if kind == "M" and last or kind in "LN" and last == "word" and not alone:
            found[-1] += c
        elif kind in "LN":
            found.append(c)
            last = "character" if alone else "word"
        else:
            last = ""
    return tuple(found)
