"""Records → the two views of a record: one to train on, one to evaluate with.

Between records.py, which reads the files, and the model. `Dataset` and `collate` make training batches (the answers are in
the ids and the labels), `join` puts several records into one row, `loader` does it all in other processes along a plan of
sampler.py; `evaluation_batch` makes prompts that stop where the last answer begins, from the same records.
"""

import atexit
import multiprocessing
import signal
import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch

from llava_min.cli import UserError, short, warn
from llava_min.config import IGNORE
from llava_min.data.chat import Piece, parts, render
from llava_min.data.processor import Processor
from llava_min.data.record import Record, text_of
from llava_min.data.records import told
from llava_min.data.sampler import Row

# ---- the training view


class Dataset(torch.utils.data.Dataset):
    """Records as {input_ids, labels: lists of one length, pixel_values (N, 3, S, S) if there are pictures}.

    What to do with a record of more than `max_length` tokens, pictures included, is `too_long`:
        error    a UserError when the dataset is made: cut, it would lose its end token, and at times all that it teaches
        shorten  its last turns are dropped whole until it fits; if its first is too long by itself, the record is. A warning
                 counts both.
    """

    def __init__(self, records: Sequence[Record], processor: Processor, *, max_length: int = 2048, exif: bool = False,
                 too_long: Literal["error", "shorten"] = "error"):
        self.records, self.processor, self.exif = [], processor, exif
        long, shortened, dropped = [], [], []
        for r in records:
            if (n := self.tokens(r, max_length)) > max_length:
                long.append(f"{short(r.id)} ({n})")
                if too_long == "error":
                    continue
                if (r := self.shortened(r, max_length)) is None:
                    dropped.append(long[-1])
                    continue
                shortened.append(long[-1])
            self.records.append(r)
        if long and too_long == "error":
            raise UserError(f"--max-length {max_length}: {len(long)} of {len(records)} records have more tokens: "
                            f"{told(long, ', ')}; raise it, or shorten or remove them")
        if shortened:
            warn(f"--max-length {max_length}: {len(shortened)} of {len(records)} records lost their last turns: "
                 f"{told(shortened, ', ')}")
        if dropped:
            warn(f"--max-length {max_length}: {len(dropped)} of {len(records)} records are left out, as a single turn of "
                 f"theirs is longer: {told(dropped, ', ')}")

    def pieces(self, r: Record) -> list[Piece]:
        try:
            return render(self.processor.template_name, r.messages, answer=True)
        except UserError as e:
            raise UserError(f"record {short(r.id)}: {e}") from None

    def tokens(self, r: Record, enough: int = 0) -> int:
        """The tokens of a record; an upper bound where that is at most `enough`, so that most records need no count: a token
        is at least a byte, and NFC (Unicode TR15) makes at most three bytes of one."""
        p, pieces, most = self.processor, self.pieces(r), 1
        for x in pieces:
            if x.text is not None:
                most += 2 + len(x.text.encode()) * (1 if x.text.isascii() else 3)
            else:
                most += p.tokens_per_image if x.token == "image" else 1
        return most if most <= enough else len(p.encode(pieces)[0])

    def shortened(self, r: Record, max_length: int) -> Record | None:
        """As many of its first exchanges as fit; None if not even one does."""

        def first(n: int) -> Record:
            messages = r.messages[: len(r.messages) % 2 + 2 * n]  # a system message may stand before them
            return replace(r, messages=messages, images=r.images[: sum(parts(m)[0] for m in messages)])

        n = bisect_right(range(1, len(r.messages) // 2), max_length, key=lambda n: self.tokens(first(n), max_length))
        return first(n) if n and any(m["role"] == "assistant" and m.get("loss") is not False for m in first(n).messages) else None

    def lengths(self, exact: bool = False) -> list[int]:
        """What `sampler.plan` reads, negative where there is no picture: the words and 256 a picture, or the tokens."""
        return [(1 if r.images else -1) * (self.tokens(r) if exact else r.length) for r in self.records]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict:
        r = self.records[i]
        return self.processor.training(r.messages, [r.pictures(self.exif)] if r.images else None)


def join(items: list[dict]) -> dict:
    """Several records as one row; `segments` says of each token which of them it belongs to."""
    out = {"input_ids": [], "labels": [], "segments": []}
    for n, x in enumerate(items):
        out["input_ids"] += x["input_ids"]
        out["labels"] += [IGNORE, *x["labels"][1:]]  # nothing is learnt from what stands before a record
        out["segments"] += [n] * len(x["input_ids"])
    pixels = [x["pixel_values"] for x in items if "pixel_values" in x]
    return out | {"pixel_values": torch.cat(pixels)} if pixels else out


def collate(items: list[dict]) -> dict[str, torch.Tensor]:
    """input_ids, labels (B, T) int64, padded on the right; pixel_values (N, 3, S, S), in reading order; of joined records,
    segments (B, T), −1 at padding.

    Of no items it makes a row that teaches nothing, for a rank that has to run a step along with the others.
    """
    items = items or [{"input_ids": [0, 0], "labels": [IGNORE, IGNORE]}]
    T = max(len(x["input_ids"]) for x in items)

    def padded(key: str, value: int) -> torch.Tensor:
        out = torch.full((len(items), T), value)
        for row, x in zip(out, items):
            row[: len(x[key])] = torch.tensor(x[key])
        return out

    out = {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORE)}
    if "segments" in items[0]:
        out["segments"] = padded("segments", -1)
    pixels = [x["pixel_values"] for x in items if "pixel_values" in x]
    return out | {"pixel_values": torch.cat(pixels)} if pixels else out


class Batches(torch.utils.data.Dataset):
    """Micro-batches of a plan: rows of record indices → (batch, what is wrong with the records that are not in it).

    A worker that raises is a page of traceback in the main process; so what is wrong travels as a value.
    """

    def __init__(self, dataset: Dataset, packing: bool):
        self.dataset, self.packing = dataset, packing

    def __getitem__(self, rows: list[Row]) -> tuple[dict[str, torch.Tensor], list[str]]:
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


def deafen(_: int) -> None:
    """Signals go to the main process, which stops its workers once it has saved; only a second SIGTERM ends one."""
    for s in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(s, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def loader(dataset: Dataset, micro_batches: Sequence[list[Row]], workers: int = 0, *, packing: bool = False,
           skip: bool = False, pin_memory: bool = False) -> Iterator[tuple[dict[str, torch.Tensor], list[str]]]:
    """(what `collate` gives, errors) of each of the micro-batches, in their order, whatever the number of `workers`; each
    worker is at most two ahead.

    A record whose picture cannot be decoded is a UserError here, in the main process; with `skip` it is left out of its
    batch and `errors` says so, a line each.
    """
    more = {"multiprocessing_context": multiprocessing.get_context("fork"), "prefetch_factor": 2, "worker_init_fn": deafen}
    before = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
    try:
        batches = iter(torch.utils.data.DataLoader(
            Batches(dataset, packing), sampler=micro_batches, batch_size=None, collate_fn=tuple, num_workers=workers,
            pin_memory=pin_memory, generator=torch.Generator(),  # its own: the global one is the training's
            **(more if workers else {})))
    except OSError as e:
        multiple = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
        multiple._workers_status = defaultdict(lambda: True)  # or it cannot end those that it did start
        raise UserError(f"--workers {workers}: the system starts no more processes ({e.strerror}); lower --workers, or raise the limit "
                        "(ulimit -u)") from None
    if workers:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)  # torch's handler raises wherever the loop is, even while it saves
        stop = batches._shutdown_workers
        atexit.register(stop)  # when all is torn down, torch and multiprocessing wait for workers that wait for work
    try:
        while (made := next(batches, None)) is not None:
            if made[1] and not skip:
                raise UserError(made[1][0])
            yield made
    except (RuntimeError, EOFError, OSError) as e:
        if not workers or str(e).startswith("Caught ") or isinstance(e, RuntimeError) and "DataLoader worker" not in str(e):
            raise  # a fault, in the worker or here
        raise UserError(f"--workers {workers}: a process that loads pictures was killed, by the system if memory ran "
                        f"out ({type(e).__name__}: {short(e, 200)}); lower --workers, or free memory or /dev/shm") from None
    finally:
        if workers:
            stop()
            atexit.unregister(stop)


# ---- the evaluation view


def evaluation_batch(records: list[Record], processor: Processor, exif: bool = False,
                     ) -> tuple[dict[str, torch.Tensor], list[str], list[list[str]]]:
    """(batch padded on the left, last questions, references): what stands before each record's last answer,
    and that answer. Earlier turns are given as the record has them."""
    pictures = [r.pictures(exif) for r in records]
    batch = processor.chat([r.messages[:-1] for r in records], pictures if any(pictures) else None)
    return batch, [text_of(r.messages[-2]) for r in records], [[text_of(r.messages[-1])] for r in records]
