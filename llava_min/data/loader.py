"""Micro-batches along a plan of sampler.py, made here or ahead of time by other processes.

torch's `DataLoader` does the work. This page adds what a run needs around it: bad records travel as
values, signals reach the main process alone, and no process is left behind.
"""

import atexit
import multiprocessing
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from llava_min.checks.loader import check_alive, refuse_start
from llava_min.data.dataset import Dataset, collate, join
from llava_min.data.sampler import Row
from llava_min.errors import UserError

Made = tuple[dict[str, torch.Tensor], list[str]]  # a batch, and what is wrong with bad records


class Batches(torch.utils.data.Dataset):
    """Rows of record indices -> the batch of the good records, and a line for each bad one.

    An exception in another process would be a page of traceback here, so a line travels instead.
    """

    def __init__(self, dataset: Dataset, packing: bool):
        self.dataset, self.packing = dataset, packing

    def __getitem__(self, rows: list[Row]) -> Made:
        items, errors = [], []
        for row in rows:
            good = []
            for i in row:
                try:
                    good.append(self.dataset[i])
                except UserError as e:
                    errors.append(str(e))
            if good:
                items.append(join(good) if self.packing else good[0])
        return collate(items), errors


def loader(
    dataset: Dataset,
    micro_batches: Sequence[list[Row]],
    workers: int = 0,
    *,
    packing: bool = False,
    skip: bool = False,
    pin_memory: bool = False,
) -> Iterator[Made]:
    """(what `collate` gives, errors) of each micro-batch, in their order for any number of
    `workers`.

    workers: processes, each at most two batches ahead; with 0 the batches are made in this one.

    Raises UserError for a record whose image cannot be decoded. With `skip` it is left out of its
    batch, and `errors` has a line for it.
    """
    batches, stop = start(Batches(dataset, packing), micro_batches, workers, pin_memory)
    try:
        while (made := next(batches, None)) is not None:
            if made[1] and not skip:
                raise UserError(made[1][0])
            yield made
    except (RuntimeError, EOFError, OSError) as e:
        check_alive(e, workers)
        raise
    finally:
        stop()


def start(
    batches: Batches, micro_batches: Sequence[list[Row]], workers: int, pin_memory: bool
) -> tuple[Iterator[Made], Callable[[], None]]:
    """An iterator over the batches, and what ends its processes."""
    before = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
    in_processes = {
        "multiprocessing_context": multiprocessing.get_context("fork"),
        "prefetch_factor": 2,
        "worker_init_fn": ignore_signals,
    }
    try:
        iterator = iter(
            DataLoader(
                batches,
                sampler=micro_batches,
                batch_size=None,
                collate_fn=tuple,
                num_workers=workers,
                pin_memory=pin_memory,
                generator=torch.Generator(),  # its own: the global one is the training's
                **(in_processes if workers else {}),
            )
        )
    except OSError as e:
        # the half-made iterator can only end the processes that did start if it knows their states
        _MultiProcessingDataLoaderIter._workers_status = defaultdict(lambda: True)
        refuse_start(e, workers)
    if not workers:
        return iterator, lambda: None
    # torch's handler raises wherever the loop is, even while it saves
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    # at exit, torch joins workers that still wait for work: a deadlock
    end = iterator._shutdown_workers
    atexit.register(end)

    def stop() -> None:
        end()
        atexit.unregister(end)

    return iterator, stop


def ignore_signals(_: int) -> None:
    """Leave signals to the main process, which ends its workers once it has saved.

    Only a second SIGTERM ends a worker.
    """
    for s in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(s, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
