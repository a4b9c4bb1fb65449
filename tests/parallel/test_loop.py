"""What the training loop agrees on between log lines."""

from hvd_vgg.parallel import comm
from hvd_vgg.reporting.throughput import Throughput
from hvd_vgg.train import loop


def test_all_ranks_listen_as_often_by_the_slowest_and_without_the_first_update():
    throughput = Throughput()
    throughput.total_seconds = [9.0]
    assert loop._listen_every(throughput, 1, 1) == 0
    throughput.total_seconds += [0.5 - 0.1 * comm.rank()]
    assert loop._listen_every(throughput, 2, 2) == 10
    throughput.total_seconds += [0.05] * 10  # a later window says how fast it has become
    assert loop._listen_every(throughput, 12, 10) == 100
    throughput.total_seconds += [20.0]
    assert loop._listen_every(throughput, 13, 1) == 1
