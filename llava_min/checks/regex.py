"""Regexes from untrusted files and from flags: valid, and safe from catastrophic backtracking."""

import re


def is_regex(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def is_quick(text: str, repetitions: int, length: int = 200) -> bool:
    """Whether a regex matches in reasonable time: at most `length` characters and so many
    repetitions, none of them of a group.
    """
    many = len(re.findall(r"[*+{]|(?<![*+}(])\?", text))  # the ? of *? and of (?: repeats nothing
    return len(text) <= length and many <= repetitions and not re.search(r"\)[*+?{]", text)
