"""Added tokens: words found in a text before BPE, such as `</s>`, `<image>` and `<|im_end|>`.

Their flags, and which of two overlapping ones is taken, follow HF `tokenizers`:
https://github.com/huggingface/tokenizers/blob/v0.22.0/tokenizers/src/tokenizer/added_vocabulary.rs
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

JOINERS_AND_CIRCLED = re.compile(
    "[\u200c\u200d\u24b6-\u24e9\U0001f130-\U0001f149\U0001f150-\U0001f169\U0001f170-\U0001f189]"
)


@dataclass
class AddedToken:
    content: str
    id: int
    special: bool = True
    lstrip: bool = False  # takes the whitespace on its left with it
    rstrip: bool = False  # and on its right
    single_word: bool = False  # matches whole words only
    normalized: bool = False  # is sought in the normalized text


def is_space(char: str) -> bool:
    # White_Space of Unicode; Python has four more
    return char.isspace() and not "\x1c" <= char <= "\x1f"


def is_word(char: str) -> bool:
    r"""\w of Unicode (UTS 18), which `single_word` looks for."""
    kind = unicodedata.category(char)
    by_kind = kind[0] in "LM" or kind in ("Nd", "Nl", "Pc")
    return by_kind or JOINERS_AND_CIRCLED.match(char) is not None


class Matcher:
    """Added tokens by their spelling: leftmost first, then longest."""

    def __init__(self, tokens: dict[str, AddedToken]):
        self.tokens = tokens
        spellings = sorted(tokens, key=len, reverse=True)
        pattern = "|".join(map(re.escape, spellings)) or r"(?!)"  # no tokens: matches nowhere
        self.find = re.compile(pattern).finditer

    def cut(self, text: str, parse_special: bool) -> Iterator[str | int]:
        """`text` in parts: ids for its added tokens, strings between them. Without `parse_special`
        the special ones are text like any other.
        """
        done = 0
        for match in self.find(text):
            token, (start, stop) = self.tokens[match[0]], match.span()
            if token.special and not parse_special:
                continue
            joined = start and is_word(text[start - 1]) or stop < len(text) and is_word(text[stop])
            if token.single_word and joined:
                continue
            while token.lstrip and start > done and is_space(text[start - 1]):
                start -= 1
            while token.rstrip and stop < len(text) and is_space(text[stop]):
                stop += 1
            if start > done:
                yield text[done:start]
            yield token.id
            done = stop
        if done < len(text):
            yield text[done:]
