"""One reading of a model for two who want it: who writes it, and who proves what was written.

The writer leaves each large tensor that it has read, and the proof, which comes right behind, takes
it from there: a model larger than the system's cache leaves the disk once. Both only read them.
"""

import math
import threading
from collections.abc import Callable

from torch import Tensor

from llava_min.tensors import TensorInfo

SMALLEST = 1 << 20  # bytes; smaller tensors are read by both, in whatever order they like
ROOM = 1 << 29  # bytes that the writer may be ahead


PassOn = Callable[[str, TensorInfo, Callable[[], Tensor]], Tensor]


def alone(name: str, info: TensorInfo, read: Callable[[], Tensor]) -> Tensor:
    """Nobody else wants it."""
    return read()


class Stopped(Exception):
    """The writer has failed."""


class Handover:
    """Between one who gives, in as many threads as he likes, and one who takes."""

    def __init__(self):
        self.changed = threading.Condition()
        self.is_open, self.failed = False, False
        self.left: dict[str, Tensor | None] = {}  # None: given when there was no room
        self.waiting = 0  # that want what is not there yet

    @property
    def is_full(self) -> bool:
        return sum(x.nbytes for x in self.left.values() if x is not None) >= ROOM

    def open(self) -> None:
        self.left, self.is_open, self.failed = {}, True, False

    def end(self, failed: bool = False) -> None:
        """Nothing more is given."""
        with self.changed:
            self.is_open, self.failed = False, failed
            self.changed.notify_all()

    def close(self) -> None:
        """Nothing more is taken."""
        with self.changed:
            self.is_open = False
            self.left.clear()
            self.changed.notify_all()

    def give(self, name: str, info: TensorInfo, read: Callable[[], Tensor]) -> Tensor:
        x = read()
        with self.changed:
            if self.is_open and x.nbytes >= SMALLEST:
                # who waits for a tensor that comes later would wait for ever
                self.changed.wait_for(lambda: not self.is_open or self.waiting or not self.is_full)
                if self.is_open:
                    self.left[name] = None if self.is_full else x
                    self.changed.notify_all()
        return x

    def take(self, name: str, info: TensorInfo, read: Callable[[], Tensor]) -> Tensor:
        size = math.prod(info.shape) * info.torch_dtype.itemsize
        with self.changed:
            if self.is_open and size >= SMALLEST:
                self.waiting += 1
                self.changed.notify_all()
                self.changed.wait_for(lambda: not self.is_open or name in self.left)
                self.waiting -= 1
            if self.failed:
                raise Stopped
            x = self.left.pop(name, None)
            self.changed.notify_all()
        return read() if x is None else x
