from dataclasses import replace

import numpy as np
import pytest

from hvd_vgg.config import BITS, ROUNDING, TrainConfig
from hvd_vgg.data.sampler import (
    micro_batches,
    most_ranks,
    part_bounds,
    permutation,
    positions,
    replacement_record,
    sample_seeds,
    slice_bounds,
    storage_order,
    too_many_ranks,
    window_records,
)


def test_permutation_is_a_function_of_seed_and_epoch():
    first = permutation(1000, 1, 0)
    assert sorted(first.tolist()) == list(range(1000))
    assert (first == permutation(1000, 1, 0)).all()
    assert (first != permutation(1000, 1, 1)).any()
    assert (first != permutation(1000, 2, 0)).any()


def test_permutation_never_changes():
    """Literal orders: a change here means that no old run can be continued or repeated."""
    assert permutation(10, 1, 0).tolist() == [2, 0, 1, 4, 5, 6, 7, 8, 3, 9]
    assert positions(8, 14, 10, 1).ids.tolist()[:2] == [3, 9]


@pytest.mark.parametrize("records", [1, 7, 32, 33, 100])
@pytest.mark.parametrize("global_batch", [1, 8, 32])
def test_positions_have_each_record_once_an_epoch(records, global_batch):
    """Whatever the batch, which need not divide the epoch."""
    epochs = 5
    steps = -(-epochs * records // global_batch)
    parts = [positions(s * global_batch, (s + 1) * global_batch, records, 3) for s in range(steps)]
    ids = np.concatenate([part.ids for part in parts])
    assert all(len(part.ids) == global_batch for part in parts)
    for epoch in range(epochs):
        assert sorted(ids[epoch * records : (epoch + 1) * records].tolist()) == list(range(records))
    assert (np.concatenate([part.epochs for part in parts]) == np.arange(steps * global_batch) // records).all()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("global_batch", [8, 32, 33])
def test_slices_tile_the_batch_and_differ_by_one(global_batch, size):
    """By at most one record."""
    bounds = [slice_bounds(global_batch, rank, size) for rank in range(size)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == global_batch
    assert all(a[1] == b[0] for a, b in zip(bounds, bounds[1:]))
    assert max(b - a for a, b in bounds) - min(b - a for a, b in bounds) <= 1


def test_slices_of_three_ranks_are_11_11_10():
    assert [b - a for a, b in (slice_bounds(32, rank, 3) for rank in range(3))] == [11, 11, 10]


# (images, of a micro-batch): divided evenly, with a shorter last one, into single images, and into one.
CUTS = [(32, 8), (33, 8), (29, 4), (13, 1), (7, 9)]


@pytest.mark.parametrize(("global_batch", "device_batch"), CUTS)
def test_parts_under_bits_are_whole_micro_batches(global_batch, device_batch):
    """Each image is in one part, the last micro-batch may be shorter, and parts differ by one micro-batch at most."""
    config = TrainConfig(global_batch=global_batch, device_batch=device_batch, reproducible=BITS)
    count = micro_batches(config)
    assert most_ranks(config) == count == len(range(0, global_batch, device_batch))
    for size in range(1, count + 1):
        bounds = [part_bounds(config, rank, size) for rank in range(size)]
        assert [n for low, high in bounds for n in range(low, high)] == list(range(global_batch))
        assert all(low % device_batch == 0 and high > low for low, high in bounds)
        assert all(high % device_batch == 0 for _, high in bounds[:-1])
        computed = [-(-(high - low) // device_batch) for low, high in bounds]
        assert sum(computed) == count and max(computed) - min(computed) <= 1
    assert part_bounds(config, count, count + 1) == (global_batch, global_batch)  # as doctor would see it


@pytest.mark.parametrize(("global_batch", "device_batch"), CUTS)
def test_parts_under_rounding_differ_by_one_image(global_batch, device_batch):
    """Whatever the micro-batches."""
    config = TrainConfig(global_batch=global_batch, device_batch=device_batch, reproducible=ROUNDING)
    assert most_ranks(config) == global_batch
    for size in range(1, global_batch + 1):
        bounds = [part_bounds(config, rank, size) for rank in range(size)]
        assert bounds == [slice_bounds(global_batch, rank, size) for rank in range(size)]


@pytest.mark.parametrize(("global_batch", "device_batch"), CUTS)
def test_too_many_ranks_under_bits_advises_what_is_enough(global_batch, device_batch):
    """The largest --device_batch for as many ranks, unless there are fewer images; and the most ranks for this one."""
    config = TrainConfig(global_batch=global_batch, device_batch=device_batch, reproducible=BITS)
    most = most_ranks(config)
    assert [too_many_ranks(config, ranks) for ranks in range(1, most + 1)] == [""] * most
    for ranks in range(most + 1, global_batch + 1):
        text = too_many_ranks(config, ranks)
        assert f"start at most {most}, or begin a new run with --device_batch=" in text
        enough = replace(config, device_batch=int(text.rpartition("=")[2]))
        assert too_many_ranks(enough, ranks) == ""
        assert enough.device_batch == global_batch // ranks  # more might do, but some ranks would then have more than others
    text = too_many_ranks(config, global_batch + 1)
    assert f"fewer than the {global_batch + 1} ranks" in text or "has fewer images than the" in text
    assert f"start at most {most}" in text and "begin a new run" not in text


@pytest.mark.parametrize("reproducible", [BITS, ROUNDING])
def test_parts_with_batch_norm_are_whole_groups(reproducible):
    """And whole micro-batches under bits; what is advised for more ranks is whole groups too."""
    shape = dict(model="vgg16_bn", norm_batch=4, global_batch=44, device_batch=12, reproducible=reproducible)
    config, most = TrainConfig(**shape), 4 if reproducible == BITS else 11
    assert most_ranks(config) == most
    for size in range(1, most + 1):
        bounds = [part_bounds(config, rank, size) for rank in range(size)]
        assert [n for low, high in bounds for n in range(low, high)] == list(range(44))
        assert all(low % 4 == 0 and high > low for low, high in bounds) and too_many_ranks(config, size) == ""
    text = too_many_ranks(config, most + 1)
    if reproducible == BITS:
        assert text.endswith("start at most 4, or begin a new run with --device_batch=8")
        assert too_many_ranks(config, 12).endswith("start at most 4")  # there are 11 groups
    else:
        least = "fewer than the 12 ranks, each of which computes whole ones: start at most 11"
        assert text == f"--global_batch=44 has 11 groups of 4 images (--norm_batch, --mix_batch), {least}"


def test_too_many_ranks_under_rounding_is_more_than_images():
    config = TrainConfig(global_batch=13, device_batch=8, reproducible=ROUNDING)
    assert {too_many_ranks(config, ranks) for ranks in range(1, 14)} == {""}
    assert too_many_ranks(config, 14) == "--global_batch=13 has fewer images than the 14 ranks: start at most 13"


def test_positions_need_nothing_before_them():
    """Any part of the stream, and its seeds, is that part of the whole."""
    whole = positions(0, 300, 70, 1)
    part = positions(123, 250, 70, 1)
    assert (whole.ids[123:250] == part.ids).all()
    assert (sample_seeds(1, whole)[123:250] == sample_seeds(1, part)).all()


def test_sample_seeds_differ_by_record_epoch_and_seed():
    """Two epochs of 70 records."""
    at = positions(0, 140, 70, 1)
    seeds = sample_seeds(1, at)
    assert len({tuple(row) for row in seeds.tolist()}) == 140
    assert (sample_seeds(2, at)[:, 0] != seeds[:, 0]).all()


BLOCKS = [(1, 2), (7, 3), (1000, 7), (1000, 64), (1000, 1000), (1000, 5000), (50_000, 64), (50_000, 20_000)]


@pytest.mark.parametrize(("records", "block"), BLOCKS)
def test_permutation_by_blocks_is_a_function_of_seed_and_epoch(records, block):
    """And has each record once."""
    first = permutation(records, 1, 0, block)
    assert (np.sort(first) == np.arange(records)).all()
    permutation.cache_clear()
    assert (first == permutation(records, 1, 0, block)).all()
    if records > 7:
        assert (first != permutation(records, 1, 1, block)).any()
        assert (first != permutation(records, 2, 0, block)).any()


def test_permutation_by_blocks_never_changes():
    """A literal order: a change here means that no old run can be continued or repeated."""
    assert permutation(10, 1, 0, 3).tolist() == [5, 3, 4, 1, 2, 6, 7, 8, 0, 9]


@pytest.mark.parametrize("block", [64, 100, 4096, 20_000])
def test_permutation_by_blocks_mixes_few_blocks_per_window(block):
    """Whole blocks are near each other in the order of a window, and windows are not in the order of the files."""
    records = 100_001
    ids, window = permutation(records, 1, 0, block).astype(int), window_records(block)
    starts = range(0, records, window)
    for start in starts:
        part = ids[start : start + window]
        # The short last block shifts the ends of the windows behind it by less than a block.
        assert len(set(part // block)) <= window // block + 1
        if len(part) == window:
            assert np.abs(np.diff(part)).mean() > block / 4
    assert len(starts) < 3 or (np.diff([ids[start : start + window].mean() for start in starts]) < 0).any()


@pytest.mark.parametrize("block", [2, 100, 8192])
def test_storage_order_has_a_windows_records_by_blocks(block):
    """The records of each window of `positions`, in one stretch of the files for each block."""
    records, window = 40_000, window_records(block)
    for start in (0, window, records, records + window):
        stop = min(start + window, (start // records + 1) * records)
        asked = storage_order(start, stop, records, 1, block)
        assert sorted(asked.tolist()) == sorted(positions(start, stop, records, 1, block).ids.tolist())
        # One stretch of the files for each block, but where two happen to follow each other or one is short.
        assert np.count_nonzero(np.diff(asked) != 1) + 1 <= -(-(stop - start) // block) + 1


def test_block_of_the_data_sets_size_is_free_permutation():
    """Or larger: nothing of the order of the files is left."""
    for block in (1000, 5000):
        ids = permutation(1000, 1, 0, block).astype(int)
        assert abs(np.corrcoef(ids, np.arange(1000))[0, 1]) < 0.2


@pytest.mark.parametrize("block", [1, 8, 30, 1000])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_slices_of_ranks_make_the_stream_of_any_block(block, size):
    """Which has each record of an epoch once."""
    records, batch, steps = 75, 32, 12
    whole = positions(0, batch * steps, records, 1, block)
    parts = []
    for step in range(steps):
        for rank in range(size):
            low, high = slice_bounds(batch, rank, size)
            parts.append(positions(step * batch + low, step * batch + high, records, 1, block))
    assert (np.concatenate([part.ids for part in parts]) == whole.ids).all()
    assert (np.concatenate([part.epochs for part in parts]) == whole.epochs).all()
    for epoch in range(batch * steps // records):
        assert (np.sort(whole.ids[epoch * records : (epoch + 1) * records]) == np.arange(records)).all()


def test_block_of_one_record_is_the_free_permutation():
    assert (positions(0, 150, 75, 1, 1).ids == positions(0, 150, 75, 1).ids).all()
    assert (positions(0, 75, 75, 1).ids == permutation(75, 1, 0)).all()


def test_replacement_record_never_changes():
    """Literal numbers: a change here means that a run with bad records cannot be continued or repeated."""
    assert [replacement_record(75, 1, 0, 17, attempt) for attempt in range(5)] == [43, 40, 33, 12, 4]


def test_replacement_record_is_uniform_in_all_arguments():
    """And differs by epoch, record and attempt."""
    drawn = [replacement_record(10, 3, e, r, a) for e in range(10) for r in range(10) for a in range(10)]
    assert set(drawn) == set(range(10))
    counts = np.bincount(drawn)
    assert ((counts - 100) ** 2 / 100).sum() < 30  # chi-squared of 9 degrees: mean 9, deviation 4.2
    for axis in range(3):
        assert (np.diff(np.reshape(drawn, [10, 10, 10]), axis=axis) != 0).any()
