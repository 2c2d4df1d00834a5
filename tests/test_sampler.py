"""Plans: every record once an epoch, the same steps on any number of ranks, one modality a step,
full rows when packed.
"""

import random
from collections import Counter

import pytest

from llava_min.checks import sampler
from llava_min.data.sampler import pack, plan, records_of, shuffled, split_over_ranks
from llava_min.errors import UserError


def lengths_of(n: int, seed: int = 0, text_only: float = 0.3, most: int = 900) -> list[int]:
    rng = random.Random(seed)
    return [
        rng.choice((-1, 1)) * rng.randint(5, 80)
        if rng.random() < text_only
        else rng.randint(5, most)
        for _ in range(n)
    ]


def rows_of(step) -> list[tuple[int, ...]]:
    return [row for rank in step for micro in rank for row in micro]


KINDS = {"plain": {}, "grouped": {"group_by_length": True}, "packed": {"packing": 1000}}


def test_order_is_a_permutation_made_of_seed_and_epoch():
    assert shuffled(50, 3, 1) == shuffled(50, 3, 1) != shuffled(50, 3, 2) != shuffled(50, 4, 2)
    assert sorted(shuffled(50, 3, 1)) == list(range(50))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "n, size, accum, world, epochs",
    [(64, 2, 2, 2, 2), (61, 2, 2, 2, 3), (50, 3, 1, 1, 1), (70, 1, 3, 2, 2)],
)
def test_every_epoch_holds_every_record_once(kind, n, size, accum, world, epochs):
    lengths = lengths_of(n)
    steps = plan(lengths, size, accum, world, epochs, seed=5, **KINDS[kind])
    flat = [i for step in steps for i in records_of(step)]
    assert (
        all(sorted(flat[e * n : (e + 1) * n]) == list(range(n)) for e in range(epochs))
        and len(flat) == epochs * n
    )
    for step in steps:
        assert (
            len(step) == world
            and len({len(rank) for rank in step}) == 1
            and 1 <= len(step[0]) <= accum
        )
        assert all(len(micro) <= size for rank in step for micro in rank)
    small = [step for step in steps if len(rows_of(step)) < size * accum * world]
    assert len(small) <= epochs
    firsts = [flat[e * n : e * n + 5] for e in range(epochs)]
    assert len(set(map(tuple, firsts))) == epochs  # shuffled anew


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_holds_the_same_rows_on_any_number_of_ranks(kind):
    lengths = lengths_of(101)
    shapes = [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4), (1, 8, 1), (1, 1, 8)]
    plans = [plan(lengths, *shape, epochs=2, seed=3, **KINDS[kind]) for shape in shapes]
    for steps in zip(*plans, strict=True):
        assert len({tuple(sorted(rows_of(step))) for step in steps}) == 1
    assert plan(lengths, 2, 2, 2, 2, seed=3, **KINDS[kind]) == plans[3]
    assert plan(lengths, 2, 2, 2, 2, seed=4, **KINDS[kind]) != plans[3]
    assert plan(lengths, 2, 2, 2, max_steps=9, seed=3, **KINDS[kind]) == plans[3][:9]


def test_plain_order_is_that_of_the_epoch_and_is_dealt_slice_by_slice():
    steps = plan(range(8), 1, 2, 2)
    ids = shuffled(8, 0, 0)
    assert steps == [
        [[[(ids[k],)], [(ids[k + 2],)]], [[(ids[k + 1],)], [(ids[k + 3],)]]] for k in (0, 4)
    ]


def test_part_of_an_epoch_and_a_given_number_of_steps():
    assert len(plan(range(10), 2, epochs=0.5)) == 3 and len(plan(range(10), 2, epochs=1.1)) == 6
    assert len(plan(range(1000), 10, epochs=0.07)) == 7  # 0.07 × 100 is 7.000000000000001
    assert (
        len(plan(range(10), 2, max_steps=23)) == 23
        and len(plan(range(10), 2, epochs=3, max_steps=2)) == 2
    )
    assert plan(range(10), 2, max_steps=7) == plan(range(10), 2, epochs=2)[:7]


@pytest.mark.parametrize(
    "rows, world, size",
    [(5, 2, 2), (3, 4, 2), (1, 2, 1), (7, 2, 4), (16, 2, 4), (3, 2, 1), (9, 4, 1)],
)
def test_ranks_keep_step_with_one_another_when_rows_are_few(rows, world, size):
    step = split_over_ranks([(i,) for i in range(rows)], world, size)
    micros = [len(micro) for rank in step for micro in rank]
    assert {len(rank) for rank in step} == {-(-rows // (world * size))}
    assert sum(micros) == rows and max(micros) <= size and max(micros) - min(micros) <= 1
    assert sorted(rows_of(step)) == [(i,) for i in range(rows)]


@pytest.mark.parametrize("text_only", [0.0, 0.02, 0.3, 0.5, 1.0])
def test_grouped_steps_have_one_modality_but_for_the_last(text_only):
    for n in (64, 83, 110, 127):
        lengths = lengths_of(n, n, text_only)
        steps = plan(lengths, 4, 2, 2, seed=n, group_by_length=True)
        kinds = [{lengths[i] < 0 for i in records_of(step)} for step in steps]
        assert all(len(k) == 1 for k in kinds[:-1])
        assert sum(len(rows_of(s)) < 16 for s in steps) <= 1
    mixed = plan(lengths_of(2000), 4, 2, 2, group_by_length=True)
    modalities = "".join("t" if lengths_of(2000)[records_of(s)[0]] < 0 else "p" for s in mixed)
    # the steps are shuffled
    assert "tp" in modalities and "pt" in modalities and "t" * 12 not in modalities


def test_grouped_rows_of_like_length_share_a_micro_batch():
    lengths = lengths_of(1600)

    def padded(steps):
        return sum(
            len(m) * max(abs(lengths[i]) for (i,) in m) for s in steps for rank in s for m in rank
        )

    grouped, plain = (plan(lengths, 4, 4, 2, group_by_length=g) for g in (True, False))
    real = sum(map(abs, lengths))
    assert padded(grouped) < 1.2 * real and padded(plain) > 1.5 * real
    for step in grouped:
        for a, b in zip(step[0], step[1]):  # the ranks' micro-batches of one moment
            assert min(abs(lengths[i]) for (i,) in a) >= max(abs(lengths[i]) for (i,) in b)


def first_fit(lengths: list[int], room: int) -> int:
    """How many rows first fit, longest first, would take."""
    free = []
    for n in sorted(map(abs, lengths), reverse=True):
        k = next((k for k, f in enumerate(free) if f >= n), None)
        if k is None:
            free.append(room - n)
        else:
            free[k] -= n
    return len(free)


def test_packed_rows_are_full_and_no_record_is_cut():
    for seed in range(20):
        rng = random.Random(seed)
        room = rng.choice((50, 1000, 2048))
        lengths = [rng.choice((-1, 1)) * rng.randint(1, room) for _ in range(rng.randint(1, 300))]
        rows = pack(lengths, room, seed, 0)
        used = [sum(abs(lengths[i]) for i in row) for row in rows]
        assert max(used) <= room and Counter(i for row in rows for i in row) == Counter(
            range(len(lengths))
        )
        assert len(rows) <= first_fit(lengths, room) + 1
        assert sum(sorted(used)[:2]) > room or len(rows) == 1  # no two rows would fit into one
        assert rows == pack(lengths, room, seed, 0)
    lengths = [600] * 50 + [400] * 50
    assert len(pack(lengths, 1000, 0, 0)) == 50
    assert pack(lengths, 1000, 0, 0) != pack(lengths, 1000, 0, 1)


def test_packing_takes_the_row_that_is_left_fullest():
    assert {frozenset(row) for row in pack([90, 80, 10], 100, 0, 0)} == {
        frozenset({0, 2}),
        frozenset({1}),
    }


def test_packed_rows_come_in_an_order_of_seed_and_epoch():
    # of different lengths the rows themselves are always the same
    lengths = [100 - i for i in range(40)]
    orders = [pack(lengths, 100, *which) for which in ((0, 0), (1, 0), (0, 1))]
    assert (
        orders[0] != orders[1]
        and orders[0] != orders[2]
        and len({frozenset(rows) for rows in orders}) == 1
    )


def test_records_for_one_step_are_enough():
    assert [sorted(records_of(step)) for step in plan(range(8), 2, 2, 2)] == [list(range(8))]
    assert (
        len(plan([60] * 8, 2, 2, 2, packing=100))
        == len(plan(range(8), 2, 2, 2, group_by_length=True))
        == 1
    )


def test_packing_many_records_is_quick():
    import time

    lengths = lengths_of(100_000, most=2000)
    start = time.perf_counter()
    rows = pack(lengths, 2048, 0, 0)
    assert time.perf_counter() - start < 5
    assert sum(map(abs, lengths)) > 0.95 * 2048 * len(rows)


def test_the_most_rows_of_a_run(monkeypatch):
    monkeypatch.setattr(sampler, "MAX_ROWS", 10)
    assert len(plan(range(9), 2, max_steps=5)) == 5
    with pytest.raises(UserError, match="12 rows, more than 10"):
        plan(range(9), 2, max_steps=6)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: plan(range(7), 2, 2, 2), ("7 records", "8 rows")),
        (lambda: plan([], 1), ("0 records", "1 rows")),
        (
            lambda: plan([10] * 20, 4, packing=100),
            ("20 records", "2 rows when packed", "4 rows of one step"),
        ),
        (
            lambda: plan(range(9), 2, group_by_length=True, packing=5),
            ("group_by_length: ", "packing"),
        ),
        (
            lambda: plan(range(9), 2, epochs=1e9),
            ("epochs: 1e+09 epochs would be 9e+09 rows, more than 100000000",),
        ),
        (
            lambda: plan(range(9), 2, 2, max_steps=2_000_000_000),
            ("max_steps: 2000000000 steps would be 8e+09 rows, more than 100000000",),
        ),
        (
            lambda: plan([10] * 20, 1, packing=100, epochs=1e9),
            ("epochs: 1e+09 epochs would be 2e+09 rows",),
        ),
        (
            lambda: plan(range(9), 10**9, max_steps=1),
            ("9 records are fewer than the 1000000000 rows of one step",),
        ),
    ],
)
def test_plans_that_cannot_be(call, words):
    with pytest.raises(UserError) as e:
        call()
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value)
