import numpy as np

from hvd_vgg.seeds import GOLDEN_GAMMA, dropout_keys, raw_draws, seed_bits, uniform_draws, weights_seed
from hvd_vgg.seeds import splitmix64 as finalize


def splitmix64(state):
    """Vigna's splitmix64.c in Python's integers: the output for the state before the call."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_splitmix64_is_the_published_one():
    assert splitmix64(1234567) == 6457827717110365317  # the first output in the tests of splitmix64.c's ports
    states = np.array([0, 1, 1234567, 2**63, 2**64 - 1], np.uint64)
    assert finalize(states + GOLDEN_GAMMA).tolist() == [splitmix64(int(state)) for state in states]


def test_uniform_draws_are_those_of_splitmix64():
    """From the hash of both seeds on, a row for each."""
    rows = [[5, 6], [-1, 0], [2**62, 3]]
    for row, found in zip(rows, uniform_draws(np.array(rows), 4)):
        state = splitmix64((row[0] + splitmix64(row[1]) - 0x9E3779B97F4A7C15) % 2**64)
        states = [state + n * 0x9E3779B97F4A7C15 for n in range(4)]
        assert found.tolist() == [(splitmix64(each % 2**64) >> 11) / 2**53 for each in states]


def test_streams_never_change():
    """Literal numbers: a change here means that no old run can be continued or repeated."""
    assert dropout_keys(1, 7, 2).tolist() == [8315765655103277654, 12958849671159046497]
    assert weights_seed(1, 3).tolist() == [-1774761179749575242, 0]
    assert raw_draws(2, 1, 0, 0).tolist() == [1232279569898196538, 1457532264001425278]
    assert seed_bits(1, 1, 2) == 9155961368508526270


def test_dropout_keys_differ_by_step_layer_and_seed():
    keys = [key for seed in (1, 2) for step in (0, 1) for key in dropout_keys(seed, step, 2).tolist()]
    assert len(set(keys)) == 8
