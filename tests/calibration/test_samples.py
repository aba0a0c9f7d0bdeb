"""Which samples are scored, and which are fitted."""

import numpy as np
import pytest

from biascorr.calibration.samples import Samples, scored_parts
from biascorr.calibration.storage import Storage
from biascorr.graph.network import ModelInput

INPUTS = [ModelInput("x", np.dtype(np.float32), (None, 2))]


def rows(count, start=0):
    return np.arange(start, start + 2 * count, dtype=np.float32).reshape(count, 2)


def batches(x, size):
    return [x[start : start + size] for start in range(0, len(x), size)]


def read(storage, data, *, validation=None, inputs=INPUTS, most=None, **options):
    held = Samples(storage, **options)
    held.read(data, inputs, lambda *_: None, max_samples=most)
    if validation is not None:
        held.read(validation, INPUTS, lambda *_: None, validation=True)
    held.choose_scored()
    return held


def values(held, numbers):
    return {float(row[0]) for feeds in held.feeds(numbers) for row in feeds["x"]}


@pytest.mark.parametrize(
    ("count", "scored"), [(1, 1), (3, 3), (4, 2), (5, 2), (15, 7), (16, 8), (31, 8), (32, 8), (35, 8), (36, 9), (400, 100)]
)
def test_a_quarter_is_scored_and_enough_of_few(count, scored):
    found, others = scored_parts([1] * count, 0)
    assert len(found) == scored
    assert sorted(found + others) == list(range(count))


@pytest.mark.parametrize(
    ("sizes", "scored"), [([4] * 8, 2), ([32] * 3, 1), ([32], 1), ([3, 1], 1), ([1, 1, 1], 3), ([8, 8], 1), ([2] * 5, 3)]
)
def test_parts_are_held_out_whole_and_one_is_left(sizes, scored):
    found, others = scored_parts(sizes, 0)
    assert (len(found), len(found) + len(others)) == (scored, len(sizes))


def test_the_seed_chooses():
    chosen = {tuple(sorted(scored_parts([1] * 64, seed)[0])) for seed in (0, 0, 1, 2)}
    assert len(chosen) == 3


def test_samples_in_order_are_scored_from_all_of_it():
    """One kind after another: every fourth would be of one kind alone."""
    assert {number % 4 for number in scored_parts([1] * 64, 0)[0]} == {0, 1, 2, 3}


@pytest.mark.parametrize("hold_out", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 8, 24])
def test_the_same_samples_are_scored_for_any_batching(size, hold_out):
    x = rows(24)
    with Storage(0 if size == 3 else 1 << 30) as storage:
        held = read(storage, batches(x, size), hold_out=hold_out, seed=3)
        expected = set(x[scored_parts([1] * 24, 3)[0], 0].tolist())
        assert values(held, held.scored_batches) == expected
        assert values(held, held.held_out_batches) == (expected if hold_out else set())
        assert values(held, held.fitted_batches) == set(x[:, 0].tolist()) - (expected if hold_out else set())
        assert (held.count, held.batches_read, held.scored, held.holds_out) == (24, 24 // size, 8, hold_out)


def test_the_first_fitted_batches_are_like_all():
    with Storage(1 << 30) as storage:
        held = read(storage, rows(64), hold_out=True)
        first = held.fitted_batches[:24]
    assert {batch // 16 for batch in first} == {0, 1, 2, 3}
    assert first != sorted(first)


@pytest.mark.parametrize("hold_out", [False, True])
@pytest.mark.parametrize("size", [1, 4, 10])
def test_validation_data_is_scored_alone(size, hold_out):
    x, other = rows(20), rows(10, start=1000)
    with Storage(1 << 30) as storage:
        held = read(storage, batches(x, size), validation=other, hold_out=hold_out)
        assert values(held, held.scored_batches) == set(other[:, 0].tolist())
        assert values(held, held.fitted_batches) == values(held, None) == set(x[:, 0].tolist())
        assert held.held_out_batches == []
        assert (held.count, held.batches_read, held.scored, held.holds_out) == (20, 20 // size, 10, True)


def test_errors_in_validation_data_name_it():
    with Storage(1 << 30) as storage:
        with pytest.raises(ValueError, match=r"^validation\[0\]: input x: shape \(1, 3\), the model takes"):
            read(storage, rows(4), validation=np.ones((4, 3), np.float32))
        with pytest.raises(ValueError, match=r"^validation: no samples"):
            read(storage, rows(4), validation=[])


@pytest.mark.parametrize("hold_out", [False, True])
def test_batches_of_fixed_size_are_scored_whole(hold_out):
    x, inputs = rows(40), [ModelInput("x", np.dtype(np.float32), (4, 2))]
    with Storage(1 << 30) as storage:
        held = read(storage, x, inputs=inputs, hold_out=hold_out)
        scored, others = scored_parts([4] * 10, 0)
        assert (held.scored_batches, held.scored, held.count) == (sorted(scored), 12, 40)
        assert held.fitted_batches == (others if hold_out else [*range(10)])


DATA = {
    "array": rows,
    "list": lambda count: batches(rows(count), 1),
    "generator": lambda count: iter(batches(rows(count), 1)),
    "batches": lambda count: batches(rows(count), 4),
}


@pytest.mark.parametrize(
    ("form", "count", "left"),
    [
        ("array", 12, []),
        ("array", 13, ["data"]),
        ("list", 12, []),
        ("list", 13, ["data"]),
        ("generator", 11, []),
        ("generator", 13, ["data"]),
        ("batches", 12, []),
        ("batches", 16, ["data"]),
    ],
)
def test_what_is_left_unread_is_known(form, count, left):
    with Storage(1 << 30) as storage:
        held = read(storage, DATA[form](count), most=12)
    assert (held.count, held.left_out) == (min(count, 12), left)


def test_a_batch_that_is_cut_leaves_samples_unread():
    with Storage(1 << 30) as storage:
        held = read(storage, batches(rows(12), 4), most=11)
    assert (held.sizes[:3], held.left_out) != ([4, 4, 4], [])
    assert (held.count, held.left_out) == (11, ["data"])
