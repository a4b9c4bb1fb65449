import os
from pathlib import Path

import numpy as np
import pytest
from support import example, picture, write_data, write_shard

from hvd_vgg.config import DataConfig
from hvd_vgg.data.formats.layout import find_shards
from hvd_vgg.data.index import join, scan_shard
from hvd_vgg.errors import DATA, Failure
from hvd_vgg.parallel import comm
from hvd_vgg.reporting.console import Console
from hvd_vgg.training.dataset import open_split

QUIET = Console("lines", False)


@pytest.fixture
def shared(tmp_path_factory):
    """One directory that all ranks see, with data written by rank 0."""
    mine = tmp_path_factory.mktemp("shared")
    folder = Path(comm.broadcast_bytes(os.fsencode(mine)).decode())
    if comm.is_root():
        write_data(folder / "data", shards=5)
        (folder / "run").mkdir()
    comm.barrier()
    return folder


def open_train(folder, console=QUIET):
    found = open_split(DataConfig(data_dir=str(folder / "data")), "train", folder / "run", console)
    comm.barrier()  # rank 0 keeps the index while others go on
    return found


def expected(folder):
    paths = find_shards(str(folder / "data"), "train")
    return join(paths, [scan_shard(path) for path in paths])


def assert_equal(found, wanted):
    assert found.paths == wanted.paths
    for a, b in zip(found[1:6], wanted[1:6]):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_open_split_gives_all_ranks_the_whole_index(shared):
    """Made by all together, then read from the cache."""
    assert_equal(open_train(shared), expected(shared))
    assert (shared / "data" / ".hvd_vgg_index_train.npz").is_file()
    assert_equal(open_train(shared), expected(shared))


def test_open_split_scans_a_changed_shard_again(shared, capsys):
    """And says how many records it held and holds."""
    first = open_train(shared)
    comm.barrier()
    if comm.is_root():
        write_shard(first.paths[3], [example(picture(i, 2), 2) for i in range(4)])
    comm.barrier()
    found = open_train(shared, Console("lines", comm.is_root()))
    assert_equal(found, expected(shared))
    told = "train: the changed shards held 14 records when they were indexed and hold 4 now"
    assert (told in capsys.readouterr().out) == comm.is_root()
    assert first.records - found.records == 14 - 4


def test_open_split_refuses_a_shard_cut_between_records(shared):
    """Each time, until the index is removed."""
    first = open_train(shared)
    if comm.is_root():
        with open(first.paths[3], "rb+") as file:
            file.truncate(int(first.offsets[first.starts[3] + 9]) - 12)
    comm.barrier()
    for _ in range(2):
        with pytest.raises(Failure) as raised:
            open_train(shared)
        assert (raised.value.code, raised.value.collective) == (DATA, True)
        assert f"{first.paths[3]}: expected 14 records in " in raised.value.message
        assert "found the first 9 of them in " in raised.value.message
    comm.barrier()
    if comm.is_root():
        (shared / "data" / ".hvd_vgg_index_train.npz").unlink()
    comm.barrier()
    assert open_train(shared).records == first.records - 5


def test_open_split_fails_on_all_ranks_for_a_bad_shard(shared):
    """Whichever rank scanned it."""
    path = shared / "data" / "train-00004-of-00005"
    if comm.is_root():
        path.write_bytes(path.read_bytes()[:-5])
    comm.barrier()
    with pytest.raises(Failure) as raised:
        open_train(shared)
    assert (raised.value.code, raised.value.collective) == (DATA, True)
    assert str(path) in raised.value.message


def test_open_split_caches_under_the_run_if_it_must(shared):
    """A directory of the cache's name stands in for a read-only file system: root may write anywhere else."""
    if comm.is_root():
        (shared / "data" / ".hvd_vgg_index_train.npz").mkdir()
    comm.barrier()
    assert_equal(open_train(shared), expected(shared))
    assert (shared / "run" / ".hvd_vgg_index_train.npz").is_file()
    assert_equal(open_train(shared), expected(shared))
