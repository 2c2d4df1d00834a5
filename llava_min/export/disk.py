"""Large files read and written past the system's page cache.

Through the cache the processor copies every byte, and finds and clears a page for it: 0.6 s a GB
and more where memory is full, 0.05 s past it (ext4 on a virtual disk, two cores). And what is read
back past it comes from the disk, and is not the copy in memory of what was written.

Past the cache a file's positions, lengths and addresses are whole pages. A file system that does
not have this is read and written as usual.
"""

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llava_min.errors import UserError
from llava_min.export.memory import PAGE, Memory
from llava_min.tensors import TensorInfo

STEP = 4 << 20  # bytes that are asked for at once
DIRECT = getattr(os, "O_DIRECT", 0)


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """The file's descriptor, past the cache where its file system can."""
    try:
        fd = os.open(path, flags | DIRECT, 0o666)
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
        fd = os.open(path, flags, 0o666)
    try:
        yield fd
    finally:
        os.close(fd)


def use_cache(fd: int) -> None:
    import fcntl

    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~DIRECT)


def transfer(call, fd: int, data: memoryview, at: int) -> int:
    """`call`, os.preadv or os.pwritev; a system that refuses whole pages gets them by the cache."""
    try:
        return call(fd, [data], at)
    except OSError as e:
        if e.errno != errno.EINVAL or not DIRECT:
            raise
        use_cache(fd)
        return call(fd, [data], at)


def read_tensor(info: TensorInfo, memory: Memory) -> Tensor:
    """A tensor of a safetensors file, whole and as it is stored.

    Raises UserError where the file ends early.
    """
    dtype = info.torch_dtype
    size = torch.Size(info.shape).numel() * dtype.itemsize
    first = info.start % PAGE  # of the tensor's bytes in those that are read
    pages = memory.empty((-(-(first + size) // PAGE) * PAGE,), torch.uint8)
    view, done = memoryview(pages.numpy()), 0
    with opened(info.path, os.O_RDONLY) as fd:
        while done < first + size:
            part = view[done : done + STEP]
            got = transfer(os.preadv, fd, part, info.start - first + done)
            done += got
            if got < len(part):  # the file's last page
                break
    if done < first + size:
        raise UserError(f"{info} ends early; download the file again")
    data = pages[first : first + size]
    if first % 8:  # no place for a word
        data = memory.empty((size,), torch.uint8).copy_(data)
    return data.view(dtype).view(info.shape)


def read_ahead(path: Path) -> None:
    """Have the system read a file into its cache; returns at once."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


class Writer:
    """Writes a file from its start to its end, in steps."""

    def __init__(self, fd: int):
        self.fd, self.room = fd, np.frombuffer(mmap.mmap(-1, STEP), np.uint8)
        self.used, self.at = 0, 0

    def write(self, data: np.ndarray) -> None:
        while len(data):
            some = data[: STEP - self.used]
            self.room[self.used : self.used + len(some)] = some
            self.used, data = self.used + len(some), data[len(some) :]
            if self.used == STEP:
                self.flush(STEP)

    def flush(self, size: int) -> None:
        view = memoryview(self.room)[:size]
        while view:
            done = transfer(os.pwritev, self.fd, view, self.at)
            view, self.at = view[done:], self.at + done
        self.room[: self.used - size] = self.room[size : self.used]
        self.used -= size

    def finish(self) -> None:
        """What is left: whole pages, and the rest by the cache."""
        self.flush(self.used // PAGE * PAGE)
        if self.used:
            use_cache(self.fd)
            self.flush(self.used)


@contextmanager
def writer(path: Path) -> Iterator[Writer]:
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
        w = Writer(fd)
        yield w
        w.finish()
