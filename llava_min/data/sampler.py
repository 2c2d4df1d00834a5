"""Which records make which step: the whole plan of a run, before its first step.

Between the dataset and the loop of train.py. The plan is a function of its arguments alone, so a resumed run needs only
the number of its step; and which records a step holds depends on the rows of a step (batch size × accumulation × ranks)
alone, so a run may go on with another number of ranks. The loss is a sum over the whole step: how its rows are dealt to
ranks and micro-batches changes the time it takes and nothing else.

`group_by_length` follows LLaVA's group_by_modality_length (llava/train/llava_trainer.py): a step has either pictures in
all of its records or in none, but for the last one. There, rows are dealt so that the ranks' totals are even; here rows
of like length share a micro-batch, which pads less.
"""

import math
import random
from collections import defaultdict
from collections.abc import Sequence

from llava_min.cli import UserError

MOST = 100_000_000  # rows of a run: more is a slip, and its plan has no room in memory
Row = tuple[int, ...]  # the records of one row of a batch: one, or with packing several
Step = list[list[list[Row]]]  # [rank][micro-batch][row]


def order(n: int, seed: int, epoch: int) -> list[int]:
    """A permutation of 0 … n − 1."""
    ids = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(ids)
    return ids


def by_modality(lengths: Sequence[int], rows: int, seed: int, epoch: int) -> list[list[Row]]:
    """Steps of `rows` records, with pictures (length ≥ 0) or without; what is left of both comes last."""
    ids = order(len(lengths), seed, epoch)
    steps, rest = [], []
    for group in ([i for i in ids if lengths[i] >= 0], [i for i in ids if lengths[i] < 0]):
        whole = len(group) - len(group) % rows
        steps += [group[i : i + rows] for i in range(0, whole, rows)]
        rest += group[whole:]
    random.Random(f"{seed}/{epoch}/steps").shuffle(steps)
    over = max(len(rest) - rows, 0)  # fewer than either kind has left, so this step is of one kind
    steps += [step for step in (rest[:over], rest[over:]) if step]
    return [[(i,) for i in sorted(step, key=lambda i: -abs(lengths[i]))] for step in steps]


def pack(lengths: Sequence[int], room: int, seed: int, epoch: int) -> list[Row]:
    """Rows of at most `room` tokens: best fit, the longest records first; no record is cut."""
    ids = order(len(lengths), seed, epoch)
    rows, fitting = [], defaultdict(list)  # tokens left → the rows that have them
    left = 0  # the same as bits, so that the least that is enough is found at once
    for i in sorted(ids, key=lambda i: -abs(lengths[i])):
        n = abs(lengths[i])
        assert n <= room, "the dataset has no record above max_length"
        if enough := left >> n:
            free = n + (enough & -enough).bit_length() - 1
            row = fitting[free].pop()
            if not fitting[free]:
                left ^= 1 << free
        else:
            free, row = room, []
            rows.append(row)
        row.append(i)
        fitting[free - n].append(row)
        left |= 1 << free - n
    random.Random(f"{seed}/{epoch}/rows").shuffle(rows)
    return [tuple(row) for row in rows]


def deal(rows: list[Row], world: int, batch_size: int) -> Step:
    """The rows of a step as [rank][micro-batch][row]: every rank has as many micro-batches, of `batch_size` rows or, in
    an incomplete step, as even as can be; some are empty when there are fewer rows than micro-batches."""
    micros = math.ceil(len(rows) / (world * batch_size))
    cuts = [len(rows) * k // (micros * world) for k in range(micros * world + 1)]
    return [[rows[cuts[m * world + r] : cuts[m * world + r + 1]] for m in range(micros)] for r in range(world)]


def plan(lengths: Sequence[int], batch_size: int, grad_accum: int = 1, world: int = 1, epochs: float = 1.0,
         max_steps: int = 0, seed: int = 0, *, group_by_length: bool = False, packing: int = 0) -> list[Step]:
    """The steps of a run over `len(lengths)` records; steps[k][rank][micro-batch] is a list of rows.

    lengths: of each record, negative where it has no picture (`Dataset.lengths`). Read by `group_by_length`, as weights,
        and by `packing` as tokens, which must be exact; otherwise only their number counts.
    packing: tokens that fit into a row; 0 = a record a row.
    epochs: passes over the records; each holds every record once, and one of its steps may have fewer rows. `max_steps`
        wins over it.
    Raises UserError when there are fewer rows than a step takes, or more than MOST in the run.
    """
    if group_by_length and packing:
        raise UserError("--group-by-length: with --packing there is no padding to save; choose one of them")
    size, steps, epoch = batch_size * grad_accum * world, [], 0
    while len(steps) < max_steps if max_steps else epoch < epochs:
        if group_by_length:
            new = by_modality(lengths, size, seed, epoch)
        else:
            rows = pack(lengths, packing, seed, epoch) if packing else [(i,) for i in order(len(lengths), seed, epoch)]
            new = [rows[i : i + size] for i in range(0, len(rows), size)]
        if (n := sum(map(len, new))) < size:
            what = f"{len(lengths)} records" + (f", {n} rows when packed," if packing else "")
            raise UserError(f"--batch-size {batch_size}: {what} are fewer than the {size} rows of one step (batch size × "
                            f"accumulation {grad_accum} × ranks {world}); lower --batch-size or --grad-accum, or give more data")
        if (dealt := max_steps * size if max_steps else epochs * n) > MOST:
            flag = f"--max-steps {max_steps}" if max_steps else f"--epochs {epochs:g}"
            raise UserError(f"{flag}: the run would have {dealt:.3g} rows, more than {MOST}; lower it")
        share = min(epochs - epoch, 1) if not max_steps else 1
        steps += [deal(rows, world, batch_size) for rows in new[: math.ceil(round(share * len(new), 6))]]
        epoch += 1
    return steps[: max_steps or None]


def records_of(step: Step) -> list[int]:
    """All the records of a step, whichever rank has them."""
    return [i for rank in step for micro in rank for row in micro for i in row]
