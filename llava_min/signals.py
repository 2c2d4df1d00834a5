"""Signals that stop a run: it saves what there is, and ends. Ctrl-C, SIGTERM and SIGUSR1, by which a cluster takes a machine
back, and SIGHUP of a lost terminal.

The first signal is noted and the loop of train.py asks for it, because a step or a save that is torn in the middle is
worth nothing. Where nothing can be torn (at the start, while pictures are loaded, in an evaluation) it raises at once.
The second ends the process on the spot; checkpoints are whole even then. A Ctrl-C comes twice under torchrun, from the terminal
and from the launcher, and counts once.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
ECHO = 2.0  # seconds in which a second Ctrl-C is the first one again


class Interrupted(BaseException):
    """A signal asked the run to stop, in a place that may be left at once."""


class Signals:
    """Within the block of `with Signals() as signals`, `signals.asked` is the number of the signal that came, or 0."""

    def __init__(self):
        self.asked, self.since, self.urgent = 0, 0.0, True

    def __enter__(self) -> "Signals":
        heard = [s for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN]  # nohup ignores SIGHUP, and so does its job
        self.before = {s: signal.signal(s, self.handle) for s in heard}
        return self

    def __exit__(self, *error) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def handle(self, number: int, frame) -> None:
        now = time.monotonic()
        if number == self.asked == signal.SIGINT and now - self.since < ECHO:
            return
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.asked, self.since = number, now
        self.check()

    @property
    def code(self) -> int:
        """The exit status of a run that was asked to stop: what a shell reports for Ctrl-C, or for SIGTERM."""
        return 130 if self.asked == signal.SIGINT else 143

    def check(self) -> None:
        if self.asked and self.urgent:
            raise Interrupted

    @contextmanager
    def at_once(self, allowed: bool = True) -> Iterator[None]:
        """A stretch of work that a signal may break off, if `allowed`; outside of it, signals wait to be asked for."""
        before, self.urgent = self.urgent, allowed
        try:
            self.check()
            yield
        finally:
            self.urgent = before
