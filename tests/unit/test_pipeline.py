import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from support import example, picture, write_data, write_shard

from hvd_vgg.config import TrainConfig
from hvd_vgg.data import index, reader, sampler, transforms
from hvd_vgg.data.index import find_shards, join, scan_shard
from hvd_vgg.data.loader import PADDING, READ_AHEAD, ROWS_PER_TASK, eval_batches, train_batches
from hvd_vgg.data.reader import BadRecord, parse_example, read_ahead, read_record
from hvd_vgg.data.sampler import positions, replacement_record, sample_seeds, slice_bounds, storage_order
from hvd_vgg.data.transforms import augmentation_params, train_image
from hvd_vgg.errors import DATA, Failure

CONFIG = TrainConfig(global_batch=32, device_batch=5, image_size=32, augment="crop", seed=3)


def index_of(folder, split):
    paths = find_shards(str(folder), split)
    return join(paths, [scan_shard(path) for path in paths])


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    write_data(folder / "data")
    return index_of(folder / "data", "train"), index_of(folder / "data", "validation")


def columns(batches):
    """Images, labels and ids of batches laid end to end."""
    return [np.concatenate(column) for column in zip(*([np.asarray(part) for part in batch[:3]] for batch in batches))]


@pytest.mark.parametrize("block", [1, 8])
def test_every_row_is_its_records_image_on_any_number_of_threads_and_ranks(train, block):
    index, config = train[0], replace(CONFIG, shuffle_block_records=block)
    steps = range(1, 5)  # 75 records: over the end of an epoch
    at = positions(32, 160, index.records, config.seed, block)
    wanted = np.empty([128, 32, 32, 3], np.uint8)
    for out, record, seed in zip(wanted, at.ids.tolist(), sample_seeds(config.seed, at)):
        encoded, _ = parse_example(index, record, read_record(index, record))
        train_image(encoded, augmentation_params(seed[None])[0], "crop", out)
    for size, threads in ((1, 1), (1, 7), (2, 2), (3, 3)):
        ranks = [list(train_batches(index, config, 1, steps, rank, size, threads)) for rank in range(size)]
        pictures, labels, ids = columns([part for parts in zip(*ranks) for part in parts])
        assert (ids == at.ids).all()
        assert (labels == index.labels[at.ids] - 1).all()
        assert (pictures == wanted).all()


@pytest.mark.parametrize("size", [1, 2, 9])
def test_evaluation_yields_each_record_once_and_fills_the_last_batch(train, size):
    index = train[1]
    rows = [columns([batch]) for rank in range(size) for batch in eval_batches(index, CONFIG, 1, rank, size, 2)]
    seen = []
    for pictures, labels, ids in rows:
        assert len(pictures) == len(labels) == len(ids) == CONFIG.device_batch
        count = int((labels != PADDING).sum())
        assert (labels[:count] == index.labels[ids[:count]] - 1).all()
        assert (labels[count:] == PADDING).all()
        assert (ids[count:] == ids[count - 1]).all()
        assert (pictures[count:] == pictures[count - 1]).all()
        seen += ids[:count].tolist()
    assert sorted(seen) == list(range(index.records))


def test_no_more_is_read_and_decoded_ahead_than_is_documented(train, monkeypatch):
    asked, decoded, lock = [], [], threading.Lock()

    def note(into, original):
        def noted(*arguments, **more):
            with lock:
                into.append(1)
            return original(*arguments, **more)

        return noted

    monkeypatch.setattr(index, "read_ahead", note(asked, read_ahead))
    monkeypatch.setattr(transforms, "train_image", note(decoded, train_image))
    threads, rows = 3, CONFIG.global_batch
    batches = train_batches(train[0], CONFIG, 1, range(1000), 0, 1, threads)
    ahead = 2 + -(-threads * ROWS_PER_TASK // rows)
    for taken in (1, 2, 3):
        next(batches)
        # What is beyond the batch that was handed out; it was one of the A when they were begun.
        wanted = taken + ahead - 1 + READ_AHEAD, (taken + ahead - 1) * rows
        deadline = time.monotonic() + 60
        while (len(asked) < wanted[0] or len(decoded) < wanted[1]) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)  # for what should not be done
        assert (len(asked), len(decoded)) == wanted
    batches.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("decode")]


@pytest.mark.parametrize("begin", [0, 5])
def test_with_blocks_storage_is_asked_for_all_of_a_window_before_it_begins(train, monkeypatch, begin):
    """Windows of 12 records, batches of 5 on the second of two ranks, for two epochs; nothing is asked for twice."""
    index, asked = train[0], []
    monkeypatch.setattr(sampler, "WINDOW_RECORDS", 12)
    monkeypatch.setattr(index, "read_ahead", lambda _, ids: asked.extend(ids.tolist()))
    config = replace(CONFIG, global_batch=5, shuffle_block_records=4)
    steps = range(begin, begin + 2 * index.records // 5)
    first = begin * 5 // 12 * 12
    for step, batch in zip(steps, train_batches(index, config, 1, steps, 1, 2, 1)):
        deadline = time.monotonic() + 60
        while len(asked) < step * 5 + 17 - first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert set(batch.ids.numpy().tolist()) <= set(asked)
    assert asked == storage_order(first, steps.stop * 5 + 12, index.records, CONFIG.seed, 4).tolist()


def test_a_bad_image_is_named_whoever_decodes_it_and_whatever_is_bad_behind_it(tmp_path):
    rows = [example(picture(0, n), 1) for n in range(40)]
    rows[17] = rows[29] = example(picture(0, 1)[:300], 1)
    write_shard(tmp_path / "train-00000-of-00001", rows)
    index = index_of(tmp_path, "train")
    for threads in (1, 5):
        batches = eval_batches(index, CONFIG, 1, 0, 1, threads)
        taken = [next(batches) for _ in range(3)]
        with pytest.raises(Failure, match=r"record 17, offset \d+: the image \(300 bytes\) cannot be decoded: \S") as raised:
            next(batches)
        assert raised.value.code == DATA
        assert len(taken) == 3


def test_the_end_of_the_stream_leaves_no_thread(train):
    assert len(list(train_batches(train[0], CONFIG, 1, range(2), 0, 1, 2))) == 2
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("decode")]


@pytest.fixture
def spoilt(tmp_path):
    """40 records of which 5, 17 and 18 are bad, and those that are not."""
    rows = [example(picture(n, n % 10 + 1), n % 10 + 1) for n in range(40)]
    rows[17] = example(picture(0, 1)[:300], 8)
    rows[18] = example(b"some text", 9)
    path = tmp_path / "train-00000-of-00001"
    write_shard(path, rows)
    index = index_of(tmp_path, "train")
    index.labels[5] = 9  # what it was when it was indexed
    return index, [n for n in range(40) if n not in (5, 17, 18)]


def test_bad_records_have_the_same_stand_ins_with_the_rows_own_draws_on_any_threads_and_ranks(spoilt):
    index, good = spoilt
    config, steps = replace(CONFIG, bad_records_allowed=1), range(5)  # 4 epochs of 40
    at = positions(0, 160, index.records, config.seed)
    wanted, ids = np.empty([160, 32, 32, 3], np.uint8), at.ids.copy()
    for row, (record, epoch, seed) in enumerate(zip(at.ids.tolist(), at.epochs.tolist(), sample_seeds(config.seed, at))):
        if record not in good:
            ids[row] = next(by for by in (replacement_record(40, 3, epoch, record, a) for a in range(8)) if by in good)
        encoded, _ = parse_example(index, int(ids[row]), read_record(index, int(ids[row])))
        train_image(encoded, augmentation_params(seed[None])[0], "crop", wanted[row])
    bad = [(row, record, int(ids[row])) for row, record in enumerate(at.ids.tolist()) if record not in good]
    assert len({by for _, _, by in bad}) > 3
    for size, threads in ((1, 1), (2, 3), (3, 2)):
        ranks = [list(train_batches(index, config, 1, steps, rank, size, threads)) for rank in range(size)]
        pictures, labels, found = columns([part for parts in zip(*ranks) for part in parts])
        assert (found == ids).all() and (pictures == wanted).all()
        assert (labels == index.labels[ids] - 1).all()
        told = []
        for rank, batches in enumerate(ranks):
            low, _ = slice_bounds(config.global_batch, rank, size)
            told += [(32 * step + low + b.row, b.record, b.by) for step, batch in enumerate(batches) for b in batch.bad]
            reasons = {b.record: b.reason for batch in batches for b in batch.bad}
            parts = {5: "its label is 6, but was 9", 17: "cannot be decoded", 18: "neither a JPEG nor a PNG"}
            assert all(parts[record] in reason for record, reason in reasons.items())
        assert sorted(told) == bad


def test_bad_records_are_left_out_of_evaluation_by_name(spoilt):
    index, good = spoilt
    batches = list(eval_batches(index, replace(CONFIG, bad_records_allowed=1), 1, 0, 1, 2))
    pictures, labels, ids = columns(batches)
    assert ids.tolist() == list(range(40))
    assert np.flatnonzero(labels != PADDING).tolist() == good
    assert not pictures[labels == PADDING].any()
    bad = [(CONFIG.device_batch * number + b.row, b.record, b.by) for number, batch in enumerate(batches) for b in batch.bad]
    assert bad == [(5, 5, None), (17, 17, None), (18, 18, None)]


def test_a_bad_record_of_which_all_stand_ins_are_bad_ends_the_run(tmp_path):
    write_shard(tmp_path / "train-00000-of-00001", [example(b"some text", 1) for _ in range(40)])
    index = index_of(tmp_path, "train")
    with pytest.raises(Failure, match=r"record \d+, offset \d+: .* \(8 others tried in its place are bad too\)"):
        next(train_batches(index, replace(CONFIG, bad_records_allowed=9), 1, range(1), 0, 1, 1))


def test_a_shard_that_is_gone_is_no_bad_record(tmp_path):
    write_shard(tmp_path / "train-00000-of-00001", [example(picture(0, 1), 1)])
    index = index_of(tmp_path, "train")
    reader._open_shard.cache_clear()
    index.paths[0].unlink()
    with pytest.raises(Failure, match="cannot be read: No such file") as raised:
        next(train_batches(index, replace(CONFIG, bad_records_allowed=9), 1, range(1), 0, 1, 1))
    assert not isinstance(raised.value, BadRecord)
