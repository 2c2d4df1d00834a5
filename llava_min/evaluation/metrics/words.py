"""Words as ROUGE counts them, in every script.

rouge-score's own tokenizer keeps only a-z and 0-9 (google-research/rouge, tokenize.py), so a
Chinese or Arabic answer has no words and always scores 0. Here a word is a run of letters and
digits with their marks; in scripts without spaces between words each character is a word, as is
usual for ROUGE on Chinese (LCSTS, Hu et al. 2015, https://arxiv.org/abs/1506.05865). On ASCII text
both tokenizers give the same words.
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
JOINERS = re.compile("[\u00ad\u200b-\u200d\u2060]")  # invisible characters inside words


def ascii_words(text: str) -> list[str]:
    """rouge-score's own words."""
    return re.findall("[a-z0-9]+", text.lower())


@lru_cache(100_000)
def words(text: str) -> tuple[str, ...]:
    """In lower case; full-width forms and ligatures as the plain characters (Unicode's NFKC)."""
    if text.isascii():
        return tuple(ascii_words(text))
    found, last = [], ""  # "word" or "character": what a following mark belongs to
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
