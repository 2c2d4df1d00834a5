"""Which records make which step: the whole plan of a run, before its first step.

Between the dataset and the loop of train.py. The plan depends on its arguments alone, so a resumed
run needs only the number of its step. Which records a step holds depends on the rows of a step
(batch size × accumulation × ranks) alone, so a run may resume on another number of ranks. The loss
is a sum over the whole step: how its rows are split over ranks and micro-batches changes the time
it takes and nothing else.

`group_by_length` follows LLaVA's `group_by_modality_length`: every record of a step has images, or
none has, except in the last step. There, rows are split so that the ranks' totals are even; here
rows of similar length share a micro-batch, which pads less. To compare:
https://github.com/haotian-liu/LLaVA/blob/c121f04/llava/train/llava_trainer.py
"""

import math
import random
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence

from llava_min.checks.sampler import check_grouping, check_run, check_step

Row = tuple[int, ...]  # the records of one row of a batch: one, or with packing several
Step = list[list[list[Row]]]  # [rank][micro-batch][row]


def shuffled(n: int, seed: int, epoch: int) -> list[int]:
    """A permutation of 0 … n − 1."""
    ids = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(ids)
    return ids


def by_modality(lengths: Sequence[int], rows: int, seed: int, epoch: int) -> list[list[Row]]:
    """Steps of `rows` records, with images (length ≥ 0) or without; the rest of both comes last."""
    ids = shuffled(len(lengths), seed, epoch)
    with_images = [i for i in ids if lengths[i] >= 0]
    without = [i for i in ids if lengths[i] < 0]
    steps, rest = [], []
    for group in (with_images, without):
        whole = len(group) - len(group) % rows
        steps += [group[i : i + rows] for i in range(0, whole, rows)]
        rest += group[whole:]
    random.Random(f"{seed}/{epoch}/steps").shuffle(steps)
    # at most one whole step is in the rest; the records left over make a small step before it,
    # fewer than either kind has left, so they are of one kind
    over = max(len(rest) - rows, 0)
    steps += [step for step in (rest[:over], rest[over:]) if step]
    # longest first, so that neighbours are of similar length
    return [[(i,) for i in sorted(step, key=lambda i: -abs(lengths[i]))] for step in steps]


def pack(lengths: Sequence[int], max_length: int, seed: int, epoch: int) -> list[Row]:
    """Rows of at most `max_length` tokens: best fit, longest record first; no record is cut."""
    ids = shuffled(len(lengths), seed, epoch)
    rows: list[list[int]] = []
    rows_with = defaultdict(list)  # tokens left in a row -> the rows that have so much room
    rooms: list[int] = []  # the keys of `rows_with` that have rows, ascending
    for i in sorted(ids, key=lambda i: -abs(lengths[i])):
        n = abs(lengths[i])
        assert n <= max_length, "the dataset has no record above max_length"
        # best fit: of the rows that have room for it, the fullest
        k = bisect_left(rooms, n)
        if k == len(rooms):
            room, row = max_length, []
            rows.append(row)
        else:
            room = rooms[k]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rooms[k]
        row.append(i)
        room -= n
        if not rows_with[room]:
            insort(rooms, room)
        rows_with[room].append(row)
    random.Random(f"{seed}/{epoch}/rows").shuffle(rows)
    return [tuple(row) for row in rows]


def split_over_ranks(rows: list[Row], world: int, batch_size: int) -> Step:
    """The rows of a step as [rank][micro-batch][row].

    Every rank has the same number of micro-batches, of `batch_size` rows each. In an incomplete
    step they are as even as can be, and some are empty if there are fewer rows than micro-batches.
    """
    micros = math.ceil(len(rows) / (world * batch_size))
    cuts = [len(rows) * k // (micros * world) for k in range(micros * world + 1)]
    # a micro-batch of all ranks is a run of neighbours: rows of similar length at one time
    slice_of = lambda m, rank: rows[cuts[m * world + rank] : cuts[m * world + rank + 1]]
    return [[slice_of(m, rank) for m in range(micros)] for rank in range(world)]


def plan(
    lengths: Sequence[int],
    batch_size: int,
    grad_accum: int = 1,
    world: int = 1,
    epochs: float = 1.0,
    max_steps: int = 0,
    seed: int = 0,
    *,
    group_by_length: bool = False,
    packing: int = 0,
) -> list[Step]:
    """The steps of a run over `len(lengths)` records; steps[k][rank][micro-batch] is a list of
    rows.

    lengths: of each record, negative if it has no image (`Dataset.lengths`). `group_by_length`
        reads them as weights, and `packing` as tokens, which must be exact; otherwise only their
        number counts.
    packing: tokens that fit into a row; 0 = one record a row.
    epochs: passes over the records. Each holds every record once, and one of its steps may have
        fewer rows. `max_steps` wins over it.

    Raises UserError for fewer rows than a step takes, or more than MAX_ROWS in the run.
    """
    check_grouping(group_by_length, packing)
    size, steps, epoch = batch_size * grad_accum * world, [], 0
    while len(steps) < max_steps if max_steps else epoch < epochs:
        # one pass over the records, as steps of `size` rows
        if group_by_length:
            new = by_modality(lengths, size, seed, epoch)
        else:
            if packing:
                rows = pack(lengths, packing, seed, epoch)
            else:
                rows = [(i,) for i in shuffled(len(lengths), seed, epoch)]
            new = [rows[i : i + size] for i in range(0, len(rows), size)]
        n = sum(map(len, new))
        check_step(len(lengths), n, batch_size, grad_accum, world, packing)
        check_run(epochs, max_steps, n, size)
        # the last epoch may be a fraction of one; 0.07 * 100 is 7.000000000000001
        share = min(epochs - epoch, 1) if not max_steps else 1
        new = new[: math.ceil(round(share * len(new), 6))]
        steps += [split_over_ranks(rows, world, batch_size) for rows in new]
        epoch += 1
    return steps[: max_steps or None]


def records_of(step: Step) -> list[int]:
    """All the records of a step, whichever rank has them."""
    return [i for rank in step for micro in rank for row in micro for i in row]
