"""Signals that stop a run, which saves a checkpoint and ends: Ctrl-C, SIGTERM, SIGUSR1 (a cluster
takes the machine back) and SIGHUP (a lost terminal).

The first signal is only noted, and train.py's loop asks for it: a half-finished step or save is
useless. Where nothing can be torn (start-up, image loading, evaluation) it raises Interrupted at
once. The second signal ends the process on the spot; checkpoints are whole even then. Under
torchrun a Ctrl-C arrives twice, from the terminal and from the launcher, and counts once.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from llava_min.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
ECHO = 2.0  # seconds within which a second Ctrl-C is the first one again


class Signals:
    """In `with Signals() as signals:`, `signals.requested` is the signal that came, or 0."""

    def __init__(self):
        self.requested, self.since, self.raises_now = 0, 0.0, True

    def __enter__(self) -> "Signals":
        # nohup ignores SIGHUP, and so must its job
        caught = [s for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN]
        self.before = {s: signal.signal(s, self.handle) for s in caught}
        return self

    def __exit__(self, *error) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def handle(self, number: int, frame) -> None:
        now = time.monotonic()
        if number == self.requested == signal.SIGINT and now - self.since < ECHO:
            return
        if self.requested:  # the second one ends the process, as if nobody had caught it
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested, self.since = number, now
        self.check()

    @property
    def code(self) -> int:
        """The exit status a shell reports for Ctrl-C, or for SIGTERM."""
        return 130 if self.requested == signal.SIGINT else 143

    def check(self) -> None:
        if self.requested and self.raises_now:
            raise Interrupted

    @contextmanager
    def interruptible(self, allowed: bool = True) -> Iterator[None]:
        """Work that a signal may break off, if `allowed`; elsewhere a signal is only noted."""
        before, self.raises_now = self.raises_now, allowed
        try:
            self.check()
            yield
        finally:
            self.raises_now = before
