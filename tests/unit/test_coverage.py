import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from test_seeds import splitmix64

from hvd_vgg.data import coverage
from hvd_vgg.data.coverage import Coverage, Update, digest_of_all, to_hex
from hvd_vgg.data.sampler import positions, slice_bounds
from hvd_vgg.errors import BUG, Failure

RECORDS, BATCH = 75, 32


def fmix64(k):
    """MurmurHash3's finaliser in Python's integers."""
    mask = 2**64 - 1
    k = ((k ^ (k >> 33)) * 0xFF51AFD7ED558CCD) & mask
    k = ((k ^ (k >> 33)) * 0xC4CEB9FE1A85EC53) & mask
    return k ^ (k >> 33)


def words(digest):
    return [int(word) for word in digest.view(np.uint64)]


def test_digest_sums_the_published_hashes():
    """Of SplitMix64 and MurmurHash3, in Python's integers."""
    for ids in ([0], [1], [2**31], [5, 5, 7], list(range(1000))):
        first, second = sum(map(splitmix64, ids)), sum(fmix64(i ^ 0x9E3779B97F4A7C15) for i in ids)
        assert words(coverage.digest(np.array(ids))) == [len(ids), first % 2**64, second % 2**64]
    assert words(coverage.digest(np.zeros(0, np.int64))) == [0, 0, 0]


def test_digest_notices_all_changes_but_of_order():
    """And of division: digests of parts add up."""
    ids = np.random.default_rng(1).permutation(5000)
    whole = digest_of_all(5000)
    assert (coverage.digest(ids) == whole).all()
    assert (sum((coverage.digest(part) for part in np.array_split(ids, 7)), np.zeros(3, np.int64)) == whole).all()
    for change in (0, 1, 2499, 4999):
        other = ids.copy()
        other[change] = other[change - 1]  # one twice, one missing
        assert (coverage.digest(other)[1:] != whole[1:]).all()
    swapped = np.where(np.isin(ids, [3, 9]), 6, ids)  # the sum and the count of ids stay the same
    assert swapped.sum() == ids.sum() and (coverage.digest(swapped)[1:] != whole[1:]).all()
    assert to_hex(whole) == [f"{word:016x}" for word in words(whole)[1:]]


def test_digest_of_all_is_summed_in_pieces():
    records = (1 << 20) + 3
    assert (digest_of_all(records) == coverage.digest(np.arange(records))).all()


def ranks(size, step, state, records=RECORDS):
    """Every rank's accumulator, each begun from the same checkpoint."""
    return [Coverage(records, BATCH, step, state) for _ in range(size)]


def train(each, steps, records=RECORDS):
    """Lets all ranks train on the order's own records."""
    for step in steps:
        for rank, one in enumerate(each):
            low, high = slice_bounds(BATCH, rank, len(each))
            at = positions(step * BATCH + low, step * BATCH + high, records, 1)
            one.add([Update(step * BATCH + low, at.ids)])


def settle(each, step):
    """Settles all ranks together, in threads that wait for each other; what they return must be the same."""
    told, barrier = [b""] * len(each), threading.Barrier(len(each), timeout=60)

    def of_rank(rank):
        def gather(data):
            told[rank] = data
            barrier.wait()
            return list(told)

        return each[rank].settle(step, gather)

    with ThreadPoolExecutor(len(each)) as pool:
        proved = list(pool.map(of_rank, range(len(each))))
    assert all([(p.epoch, p.step) for p in mine] == [(p.epoch, p.step) for p in proved[0]] for mine in proved)
    assert all(one.state() == each[0].state() for one in each)
    return proved[0]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_coverage_proves_epochs_at_their_last_update(size):
    """By the first settlement at or after it."""
    each, told = ranks(size, 0, []), []
    for step in range(12):
        train(each, [step])
        if each[0].ended(step + 1):
            told += [(p.epoch, p.step, step + 1, p.records.text(RECORDS)) for p in settle(each, step + 1)]
    text = "75 of 75 records, each once"
    assert told == [(0, 3, 3, text), (1, 5, 5, text), (2, 8, 8, text), (3, 10, 10, text), (4, 12, 12, text)]


def test_coverage_continues_an_epoch_on_other_ranks():
    """From what the checkpoint keeps, over several restarts."""
    state, at, told = [], 0, []
    for size, until in ((3, 2), (1, 4), (2, 4), (4, 7)):  # the third trains nothing
        each = ranks(size, at, state)
        train(each, range(at, until))
        told += settle(each, until)
        state, at = each[0].state(), until
    assert [(proved.epoch, proved.step) for proved in told] == [(0, 3), (1, 5)]
    assert state[0] == 7 * BATCH - 2 * RECORDS
    assert all(-(2**63) <= number < 2**63 for number in state)


def test_coverage_of_a_batch_larger_than_the_data_set():
    """One update completes several epochs."""
    each = ranks(2, 0, [], records=5)
    train(each, [0], records=5)
    assert [(proved.epoch, proved.step) for proved in settle(each, 1)] == [(e, -(-(e + 1) * 5 // BATCH)) for e in range(6)]
    assert each[0].state()[0] == 2


def test_coverage_of_several_updates_at_once():
    """Over the end of an epoch, with a bad record in what is skipped: it counts as skipped itself."""
    (one,) = ranks(1, 0, [])
    batches = [positions(step * BATCH, (step + 1) * BATCH, RECORDS, 1).ids for step in range(3)]
    bad = [(4, int(batches[1][4]))]
    batches[1][4] = 8
    one.add(Update(step * BATCH, ids, bad if step == 1 else (), step == 1) for step, ids in enumerate(batches))
    (proved,) = settle([one], 3)
    assert proved.records.text(RECORDS) == "43 of 75 records, each once; 32 skipped"
    assert one.state()[0] == 3 * BATCH - RECORDS


def test_coverage_tells_replaced_and_skipped_records_apart():
    each = ranks(2, 0, [])
    for step in range(3):
        for rank, one in enumerate(each):
            low, high = slice_bounds(BATCH, rank, 2)
            due = positions(step * BATCH + low, step * BATCH + high, RECORDS, 1).ids
            if step == 1:
                one.add([Update(step * BATCH + low, due, skipped=True)])
            else:
                rows = np.flatnonzero(np.isin(due, (2, 17))).tolist()
                bad = [(row, int(due[row])) for row in rows]
                due[rows] = 8
                one.add([Update(step * BATCH + low, due, bad)])
    (proved,) = settle(each, 3)
    assert proved.records.text(RECORDS) == "41 of 75 records, each once; 2 replaced (2, 17); 32 skipped"


@pytest.mark.parametrize("size", [1, 2])
def test_coverage_notices_a_record_in_anothers_place(size):
    """And ends the run on all ranks."""
    each = ranks(size, 0, [])
    train(each, range(2))
    ids = positions(2 * BATCH, 3 * BATCH, RECORDS, 1).ids
    ids[0] = ids[1]
    each[0].add([Update(2 * BATCH, ids)])
    with pytest.raises(Failure) as raised:
        settle(each, 3)
    assert (raised.value.code, raised.value.collective) == (BUG, True)
    assert "epoch 0, complete with update 3: 75 records were trained on, 0 replaced, 0 skipped" in raised.value.message


def test_coverage_does_not_prove_an_epoch_it_does_not_know():
    """Begun in another order, or before a checkpoint that says nothing of it; the next epoch is proved."""
    each = ranks(2, 1, [])  # in the middle of epoch 0, and nothing is known
    train(each, range(1, 2))
    assert settle(each, 2) == []
    assert each[0].state() == []
    each = ranks(1, 2, [])
    train(each, range(2, 5))
    unknown, proved = settle(each, 5)
    assert (unknown.epoch, unknown.step, unknown.records) == (0, 3, None)
    assert (proved.epoch, proved.step, proved.records.text(RECORDS)) == (1, 5, "75 of 75 records, each once")
