"""Bad records counted over ranks, on as many as there are."""

import json

import pytest
from support import write_data

from hvd_vgg.data.formats.layout import find_shards
from hvd_vgg.data.index import join, scan_shard
from hvd_vgg.data.loader import BadRow
from hvd_vgg.errors import DATA, Failure
from hvd_vgg.parallel import comm
from hvd_vgg.reporting.console import Console
from hvd_vgg.reporting.log import RunLog
from hvd_vgg.training.bad_records import count_bad_records
from hvd_vgg.training.reporter import Reporter


@pytest.fixture
def index(tmp_path):
    write_data(tmp_path / "data")
    paths = find_shards(str(tmp_path / "data"), "train")
    return join(paths, [scan_shard(path) for path in paths])


def met(*more):
    """A row of this rank's own, met at step 5, and more."""
    return [(5, BadRow(0, 10 + comm.rank(), 20, "torn")), *more]


def test_count_bad_records_reports_each_once_in_order(index, tmp_path, capsys):
    """On rank 0 alone, though every rank used some."""
    log = RunLog(tmp_path, False, None) if comm.is_root() else None
    reporter, size = Reporter(log, Console("lines", comm.is_root())), comm.size()
    found = count_bad_records(met((4, BadRow(3, 70, 21, "cut"))), [3], 2 + size, index, reporter)
    assert found == [3, 70, *range(10, 10 + size)]
    assert count_bad_records(met(), found, 2 + size, index, reporter) == found  # an epoch later
    assert count_bad_records([], found, 2 + size, index, reporter) == found
    if log:
        rows = [json.loads(line[5:]) for line in (tmp_path / "dllogger.json").read_text().splitlines()]
        told = [row["data"] for row in rows if row["type"] == "LOG" and row["step"] == "EVENT"]
        assert [(row["record"], row["step"], row["replaced_by"]) for row in told] == [
            (70, 4, 21),
            *((10 + rank, 5, 20) for rank in range(size)),
        ]
        assert told[0]["event"] == "bad_record" and told[0]["where"] == index.where(70) and told[0]["reason"] == "cut"
        assert (
            f"bad record 2 of {2 + size} allowed: {index.where(70)}: cut; {index.where(21)} takes" in capsys.readouterr().out
        )
    else:
        assert capsys.readouterr().out == ""


def test_count_bad_records_fails_with_a_list(index):
    """Where there are more than allowed: a collective failure."""
    with pytest.raises(Failure) as raised:
        count_bad_records(met(), [3], comm.size(), index, Reporter(None, Console("lines", False)))
    assert (raised.value.code, raised.value.collective) == (DATA, True)
    for record in (3, *range(10, 10 + comm.size())):
        assert index.where(record) in raised.value.message


def test_count_bad_records_exchanges_nothing_if_none_may_be(index):
    if comm.is_root():  # alone: it would wait for the others
        assert count_bad_records([], [3], 0, index, Reporter(None, Console("lines", False))) == [3]
    comm.barrier()
