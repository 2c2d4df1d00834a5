"""Memory for tensors that come one after the other: each is given that of one that is gone.

New memory costs more than what is read into it: the system clears every page first. A 7B model that
is read three times and written once would ask for 56 GB of it.
"""

import math
import weakref
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE = 4096  # bytes; where a file's pages are read past the cache, they go to whole ones


class Memory:
    """Gives memory to tensors, from the start of a page on; it comes back when the last that shares
    it is gone.
    """

    def __init__(self):
        self.free: dict[int, list[Tensor]] = defaultdict(list)  # by their bytes

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """As torch.empty, on the CPU."""
        size = math.prod(shape) * dtype.itemsize
        try:
            room = self.free[size].pop()
        except IndexError:
            room = torch.empty(size + PAGE, dtype=torch.uint8)
            room = room[-room.data_ptr() % PAGE :][:size]
        # a tensor made from an array keeps it for as long as any view of it or a parameter is there
        array = room.numpy()
        weakref.finalize(array, self.free[size].append, room).atexit = False
        return torch.from_numpy(array).view(dtype).view(shape)
