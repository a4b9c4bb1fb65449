import numpy as np
import pytest

from hvd_vgg.data import order


def test_an_epoch_is_a_permutation_and_a_function_of_seed_and_epoch():
    first = order.permutation(1000, 1, 0)
    assert sorted(first.tolist()) == list(range(1000))
    assert (first == order.permutation(1000, 1, 0)).all()
    assert (first != order.permutation(1000, 1, 1)).any()
    assert (first != order.permutation(1000, 2, 0)).any()


def test_the_order_never_changes_between_versions():
    """Literal orders: a change here means that no old run can be continued or repeated."""
    assert order.permutation(10, 1, 0).tolist() == [2, 0, 1, 4, 5, 6, 7, 8, 3, 9]
    assert order.positions(8, 14, 10, 1).ids.tolist()[:2] == [3, 9]


@pytest.mark.parametrize("records", [1, 7, 32, 33, 100])
@pytest.mark.parametrize("global_batch", [1, 8, 32])
def test_every_record_of_every_epoch_is_read_exactly_once(records, global_batch):
    epochs = 5
    steps = -(-epochs * records // global_batch)
    parts = [order.positions(s * global_batch, (s + 1) * global_batch, records, 3) for s in range(steps)]
    ids = np.concatenate([part.ids for part in parts])
    assert all(len(part.ids) == global_batch for part in parts)
    for epoch in range(epochs):
        assert sorted(ids[epoch * records : (epoch + 1) * records].tolist()) == list(range(records))
    assert (np.concatenate([part.epochs for part in parts]) == np.arange(steps * global_batch) // records).all()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("global_batch", [8, 32, 33])
def test_slices_tile_the_batch_and_differ_by_one_at_most(global_batch, size):
    bounds = [order.slice_bounds(global_batch, rank, size) for rank in range(size)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == global_batch
    assert all(a[1] == b[0] for a, b in zip(bounds, bounds[1:]))
    assert max(b - a for a, b in bounds) - min(b - a for a, b in bounds) <= 1


def test_three_ranks_take_11_11_10():
    assert [b - a for a, b in (order.slice_bounds(32, rank, 3) for rank in range(3))] == [11, 11, 10]


def test_any_part_of_the_stream_can_be_had_without_what_is_before_it():
    whole = order.positions(0, 300, 70, 1)
    part = order.positions(123, 250, 70, 1)
    assert (whole.ids[123:250] == part.ids).all()
    assert (order.sample_seeds(1, whole)[123:250] == order.sample_seeds(1, part)).all()


def test_seeds_differ_by_record_epoch_and_seed_and_not_by_place():
    at = order.positions(0, 140, 70, 1)
    seeds = order.sample_seeds(1, at)
    assert len({tuple(row) for row in seeds.tolist()}) == 140
    assert (order.sample_seeds(2, at)[:, 0] != seeds[:, 0]).all()


def test_dropout_keys_differ_by_step_layer_and_seed():
    keys = [key for seed in (1, 2) for step in (0, 1) for key in order.dropout_keys(seed, step, 2).tolist()]
    assert len(set(keys)) == 8
