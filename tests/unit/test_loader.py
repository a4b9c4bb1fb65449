import threading
from dataclasses import replace

import numpy as np
import pytest
from support import example, picture, wait_for, write_data, write_shard

from hvd_vgg.config import TrainConfig
from hvd_vgg.data import loader, reader, sampler
from hvd_vgg.data.index import scan_split
from hvd_vgg.data.loader import PADDING, READ_AHEAD, ROWS_PER_TASK, eval_batches, load_records, train_batches
from hvd_vgg.data.reader import BadRecord, read_image
from hvd_vgg.data.sampler import part_bounds, positions, replacement_record, sample_seeds, storage_order
from hvd_vgg.data.transforms import augmentation_params, train_image
from hvd_vgg.errors import DATA, Failure

CONFIG = TrainConfig(global_batch=32, device_batch=5, image_size=32, augment="crop", seed=3)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """The indexes of 75 records to train on and 37 to evaluate."""
    folder = write_data(tmp_path_factory.mktemp("loader") / "data")
    return scan_split(str(folder), "train"), scan_split(str(folder), "validation")


def columns(batches):
    """Images, labels and ids of batches laid end to end."""
    return [np.concatenate(column) for column in zip(*([np.asarray(part) for part in batch[:3]] for batch in batches))]


def on_ranks(index, config, steps, size, threads):
    """The batches of each rank."""
    return [list(train_batches(index, config, 1, steps, rank, size, threads)) for rank in range(size)]


def expected_images(index, ids, seeds):
    """The training images of records, one by one."""
    images = np.empty([len(ids), 32, 32, 3], np.uint8)
    for out, record, params in zip(images, ids.tolist(), augmentation_params(seeds, CONFIG)):
        encoded, _ = read_image(index, record)
        train_image(encoded, params, CONFIG, out)
    return images


def assert_no_thread_is_left():
    """A Loader's threads end with its batches."""
    prefixes = ("decode", "finish", "read_ahead")
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(prefixes)]


@pytest.mark.parametrize("block", [1, 8])
def test_train_batches_are_the_stream_on_any_ranks_and_threads(splits, block):
    """Each row is its record's image, beyond the end of an epoch of 75 records too."""
    index, config = splits[0], replace(CONFIG, shuffle_block_records=block)
    at = positions(32, 160, index.records, config.seed, block)
    expected = expected_images(index, at.ids, sample_seeds(config.seed, at))
    for size, threads in ((1, 1), (1, 7), (2, 2), (3, 3)):
        ranks = on_ranks(index, config, range(1, 5), size, threads)
        images, labels, ids = columns([part for parts in zip(*ranks) for part in parts])
        assert (ids == at.ids).all()
        assert (labels == index.labels[at.ids] - 1).all()
        assert (images == expected).all()


@pytest.mark.parametrize("size", [1, 2, 9])
def test_eval_batches_have_each_record_once(splits, size):
    """The last batch is filled up."""
    index = splits[1]
    rows = [columns([batch]) for rank in range(size) for batch in eval_batches(index, CONFIG, 1, rank, size, 2)]
    seen = []
    for images, labels, ids in rows:
        assert len(images) == len(labels) == len(ids) == CONFIG.device_batch
        count = int((labels != PADDING).sum())
        assert (labels[:count] == index.labels[ids[:count]] - 1).all()
        assert (labels[count:] == PADDING).all()
        assert (ids[count:] == ids[count - 1]).all()
        assert (images[count:] == images[count - 1]).all()
        seen += ids[:count].tolist()
    assert sorted(seen) == list(range(index.records))


def test_load_records_sees_records_as_training_does(splits):
    """Under seeds that need not be those of the ids, and in any order."""
    ids, seeds = np.array([70, 3, 3, 40]), np.array([[5, 1], [5, 2], [6, 3], [7, 70]])
    batch = load_records(splits[0], CONFIG, 1, ids, seeds, 2)
    assert (batch.images.numpy() == expected_images(splits[0], ids, seeds)).all()
    assert batch.ids.numpy().tolist() == ids.tolist() and batch.bad == []
    assert (batch.labels.numpy() == splits[0].labels[ids] - 1).all()


def test_augmented_rows_do_not_depend_on_their_batch(splits):
    """With every augmentation: alone, among others, and on any number of threads the same bytes, which others are not."""
    many = {"auto_augment": "trivial", "color_jitter": 0.4, "pca_lighting": 0.1, "random_erasing": 0.5, "resize": "pillow"}
    config = replace(CONFIG, **many)
    ids = np.arange(60)
    seeds = np.stack([ids // 7, ids], 1)
    whole = load_records(splits[0], config, 1, ids, seeds, 3).images.numpy()
    for part in (ids[:1], ids[20:31], ids[::-1]):
        assert (load_records(splits[0], config, 1, part, seeds[part], 1).images.numpy() == whole[part]).all()
    bare = load_records(splits[0], CONFIG, 1, ids, seeds, 3).images.numpy()
    assert (whole != bare).any((1, 2, 3)).mean() > 0.95


def test_loader_works_ahead_as_far_as_documented(splits, monkeypatch):
    """Decoding and read-ahead reach their bounds, and no more batches than these are planned or allocated."""
    threads, rows = 3, CONFIG.global_batch
    calls = {name: [] for name in ("positions", "read_ahead", "_allocate", "train_image")}

    def counted(name, original):
        def count(*arguments):
            result = original(*arguments)
            calls[name].append(threading.current_thread().name)
            return result

        return count

    for name in calls:
        monkeypatch.setattr(loader, name, counted(name, getattr(loader, name)))
    batches = train_batches(splits[0], CONFIG, 1, range(1000), 0, 1, threads)
    ahead = 2 + -(-threads * ROWS_PER_TASK // rows)
    for taken in (1, 2, 3):
        next(batches)
        # Beyond the batch that was handed out, which was one of the A when they were begun.
        begun = taken + ahead - 1
        assert (len(calls["positions"]), len(calls["_allocate"])) == (begun + READ_AHEAD, begun)
        wait_for(lambda n=begun: (len(calls["read_ahead"]), len(calls["train_image"])) == (n + READ_AHEAD, n * rows))
    assert len(set(calls["train_image"])) <= threads
    batches.close()
    assert_no_thread_is_left()


@pytest.mark.parametrize("begin", [0, 5])
def test_loader_asks_for_whole_blocks_a_window_ahead(splits, monkeypatch, begin):
    """Windows of 12 records, batches of 5 on the second of two ranks, for two epochs; nothing is asked for twice."""
    index, asked = splits[0], []
    monkeypatch.setattr(sampler, "WINDOW_RECORDS", 12)
    monkeypatch.setattr(loader, "read_ahead", lambda _, ids: asked.extend(ids.tolist()))
    config = replace(CONFIG, global_batch=5, device_batch=3, shuffle_block_records=4)
    steps = range(begin, begin + 2 * index.records // 5)
    first = begin * 5 // 12 * 12
    for step, batch in zip(steps, train_batches(index, config, 1, steps, 1, 2, 1)):
        wait_for(lambda step=step: len(asked) >= step * 5 + 17 - first)
        assert set(batch.ids.numpy().tolist()) <= set(asked)
    assert asked == storage_order(first, steps.stop * 5 + 12, index.records, CONFIG.seed, 4).tolist()


def test_loader_names_the_first_bad_image(tmp_path):
    """Whichever thread decodes it, and whatever is bad behind it."""
    rows = [example(picture(0, n), 1) for n in range(40)]
    rows[17] = rows[29] = example(picture(0, 1)[:300], 1)
    write_shard(tmp_path / "train-00000-of-00001", rows)
    index = scan_split(str(tmp_path), "train")
    for threads in (1, 5):
        batches = eval_batches(index, CONFIG, 1, 0, 1, threads)
        taken = [next(batches) for _ in range(3)]
        with pytest.raises(Failure, match=r"record 17, offset \d+: the image \(300 bytes\) cannot be decoded: \S") as raised:
            next(batches)
        assert raised.value.code == DATA
        assert raised.value.message.endswith("replace the record, or go on without: --bad_records_allowed=1 (or more)")
        assert len(taken) == 3
        assert_no_thread_is_left()


def test_loader_names_the_record_of_an_error_of_the_program(splits, monkeypatch):
    def broken(*arguments):
        raise KeyError("a fault of the test")

    monkeypatch.setattr(loader, "train_image", broken)
    with pytest.raises(RuntimeError, match=r"train-0000\d-of-00003, record \d+, offset \d+: the image .* broke the program"):
        next(train_batches(splits[0], CONFIG, 1, range(1), 0, 1, 1))


def test_loader_leaves_no_thread_at_the_end_of_its_steps(splits):
    assert len(list(train_batches(splits[0], CONFIG, 1, range(2), 0, 1, 2))) == 2
    assert_no_thread_is_left()


@pytest.fixture
def damaged(tmp_path):
    """The index of 40 records of which 5, 17 and 18 are bad, and the ids of the others."""
    rows = [example(picture(n, n % 10 + 1), n % 10 + 1) for n in range(40)]
    rows[17] = example(picture(0, 1)[:300], 8)
    rows[18] = example(b"some text", 9)
    write_shard(tmp_path / "train-00000-of-00001", rows)
    index = scan_split(str(tmp_path), "train")
    index.labels[5] = 9  # as if it had been so when it was indexed
    return index, [n for n in range(40) if n not in (5, 17, 18)]


def test_bad_records_are_replaced_alike_on_any_ranks(damaged):
    """And threads; the other record is seen with the row's own crop and flip."""
    index, good = damaged
    config, steps = replace(CONFIG, bad_records_allowed=1), range(5)  # 4 epochs of 40
    at = positions(0, 160, index.records, config.seed)
    due = zip(at.ids.tolist(), at.epochs.tolist())
    ids = np.array(
        [
            record
            if record in good
            else next(by for by in (replacement_record(40, 3, epoch, record, a) for a in range(8)) if by in good)
            for record, epoch in due
        ]
    )
    expected = expected_images(index, ids, sample_seeds(config.seed, at))
    bad = [(row, record, int(ids[row])) for row, record in enumerate(at.ids.tolist()) if record not in good]
    assert len({by for _, _, by in bad}) > 3
    for size, threads in ((1, 1), (2, 3), (3, 2)):
        ranks = on_ranks(index, config, steps, size, threads)
        images, labels, found = columns([part for parts in zip(*ranks) for part in parts])
        assert (found == ids).all() and (images == expected).all()
        assert (labels == index.labels[ids] - 1).all()
        reported = []
        for rank, batches in enumerate(ranks):
            low, _ = part_bounds(config, rank, size)
            reported += [(32 * step + low + b.row, b.record, b.by) for step, batch in enumerate(batches) for b in batch.bad]
            reasons = {b.record: b.reason for batch in batches for b in batch.bad}
            parts = {5: "its label is 6, but was 9", 17: "cannot be decoded", 18: "neither a JPEG nor a PNG"}
            assert all(parts[record] in reason for record, reason in reasons.items())
        assert sorted(reported) == bad


def test_threads_end_when_a_loop_leaves_its_batches(splits):
    """By a break or an exception: the trainer closes no iterator, its last reference does."""
    for _ in zip(range(9), train_batches(splits[0], CONFIG, 1, range(9), 0, 1, 2)):
        break
    assert_no_thread_is_left()
    with pytest.raises(KeyError):
        for _ in zip(range(9), train_batches(splits[0], CONFIG, 1, range(9), 0, 1, 2)):
            raise KeyError
    assert_no_thread_is_left()


def test_bad_records_are_black_rows_of_an_evaluation(damaged):
    index, good = damaged
    batches = list(eval_batches(index, replace(CONFIG, bad_records_allowed=1), 1, 0, 1, 2))
    images, labels, ids = columns(batches)
    assert ids.tolist() == list(range(40))
    assert np.flatnonzero(labels != PADDING).tolist() == good
    assert not images[labels == PADDING].any()
    bad = [(CONFIG.device_batch * number + b.row, b.record, b.by) for number, batch in enumerate(batches) for b in batch.bad]
    assert bad == [(5, 5, None), (17, 17, None), (18, 18, None)]


def test_bad_records_alone_end_the_run(tmp_path):
    """Those tried in place of one are bad as well."""
    write_shard(tmp_path / "train-00000-of-00001", [example(b"some text", 1) for _ in range(40)])
    index = scan_split(str(tmp_path), "train")
    with pytest.raises(Failure, match=r"record \d+, offset \d+: .* \(8 others tried in its place are bad too\)"):
        next(train_batches(index, replace(CONFIG, bad_records_allowed=9), 1, range(1), 0, 1, 1))


def test_a_missing_shard_is_no_bad_record(tmp_path):
    write_shard(tmp_path / "train-00000-of-00001", [example(picture(0, 1), 1)])
    index = scan_split(str(tmp_path), "train")
    reader._open_shard.cache_clear()
    index.paths[0].unlink()
    with pytest.raises(Failure, match="cannot be read: No such file") as raised:
        next(train_batches(index, replace(CONFIG, bad_records_allowed=9), 1, range(1), 0, 1, 1))
    assert not isinstance(raised.value, BadRecord)
