"""Errors a user can act on, warnings, text that is safe to print. Imports no other page."""

import difflib
import functools
import os
import sys
from collections.abc import Iterable

MAX_LINE = 2000  # characters of one line on the terminal

_flags: dict[str, str] = {}  # field of the library -> flag of the script that runs, see `label`


class UserError(ValueError):
    """A mistake of the caller: one line that says what came, what was expected and what to do.

    `field` is the argument that the line is about. A caller of the library reads `device: …`; the
    user of a script reads the flag he typed, `--device: …`.
    """

    def __init__(self, text: str, field: str | None = None):
        text = text.replace(aside_ending(), "")
        super().__init__(f"{label(field)}: {text}" if field else text)
        self.field = field


class Interrupted(BaseException):
    """A signal asked the run to stop, at a point where it may stop at once."""


def label(field: str) -> str:
    """What the person who runs this calls the argument `field`: its flag in a script."""
    return _flags.get(field, field)


def set_labels(flags: dict[str, str]) -> dict[str, str]:
    """From here on `label` gives these flags for their fields; returns those that it gave."""
    before = dict(_flags)
    _flags.clear()
    _flags.update(flags)
    return before


def aside_ending() -> str:
    """What stands behind a folder's name while it is being written, and in no message."""
    return f".tmp-{os.getpid()}"


def escape_controls(text: object) -> str:
    """Control and bidirectional-override characters escaped: data cannot drive the terminal."""
    escape = lambda c: c.encode("unicode_escape").decode()
    return "".join(c if c.isprintable() or c == " " else escape(c) for c in str(text))


def shorten(x: object, n: int = 60) -> str:
    """`x` as text that a message can quote: printable, and at most `n` characters."""
    text = escape_controls(x)
    return text if len(text) <= n else text[:n] + "…"


def preview(lines: Iterable[str], between: str = " | ", most: int = 5) -> str:
    """The first few of many lines or names, for a message, and how many more there are."""
    lines = list(lines)
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return between.join([shorten(line, 280) for line in lines[:most]] + more)


def guess(name: str, known: Iterable[str], otherwise: str, cutoff: float = 0.6) -> str:
    """What to do about an unknown name: the nearest of the `known` ones, or `otherwise`."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"did you mean {near[0]}?" if near else otherwise


def info(text: str) -> None:
    """One line for the person, on stderr; in one piece, whatever other processes write."""
    text = escape_controls(text.replace(aside_ending(), ""))
    print(text[:MAX_LINE] + "\n", end="", file=sys.stderr, flush=True)


def warn(text: str, field: str | None = None) -> None:
    info(f"warning: {label(field)}: {text}" if field else f"warning: {text}")


@functools.cache
def warn_once(text: str, field: str | None = None) -> None:
    """A warning, once in a process, however often its cause returns."""
    warn(text, field)
