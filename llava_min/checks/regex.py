"""Whether a regex that a stranger wrote is one, and safe from catastrophic backtracking."""

import re


def is_regex(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def is_quick(text: str, repetitions: int, length: int = 200) -> bool:
    """At most `length` characters and so many repetitions, none of them of a group."""
    # the ? of *? and of (?: repeats nothing
    found = len(re.findall(r"[*+{]|(?<![*+}(])\?", text))
    repeats_group = re.search(r"\)[*+?{]", text)
    return len(text) <= length and found <= repetitions and not repeats_group
