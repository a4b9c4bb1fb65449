"""The named random streams of a run: pure functions of its seed.

Only bit streams that NumPy promises never to change (SeedSequence, Philox, the raw draws) are used, so that a seed means
the same run under every NumPy; `Generator.permutation` has no such promise.
"""

import functools

import numpy as np

# The purpose of a stream, the word after the seed: no two purposes share random numbers.
ORDER, AUGMENT, DROPOUT, WEIGHTS, BLOCKS, REPLACEMENT, MIXING, PREPARING = range(8)
# The increment of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


@functools.lru_cache(maxsize=64)  # an epoch's bits are asked for with every batch
def seed_bits(*words: int) -> np.uint64:
    """Returns 64 random bits, a function of `words` (integers from 0 up)."""
    return np.uint64(np.random.SeedSequence(list(words)).generate_state(1, np.uint64)[0])


def raw_draws(count: int, *words: int) -> np.ndarray:
    """Returns `count` random numbers, uint64 [count], a function of `words` (integers from 0 up)."""
    return np.asarray(np.random.Philox(np.random.SeedSequence(list(words))).random_raw(count))


def dropout_keys(seed: int, step: int, layers: int) -> np.ndarray:
    """Returns the Philox keys of a step's dropout masks, uint64 [layers]; the counter is the position in the batch."""
    return np.array([seed_bits(seed, DROPOUT, step, layer) for layer in range(layers)], np.uint64)


def mixing_key(seed: int, step: int) -> np.uint64:
    """Returns the Philox key of how a step's images are mixed; the counter is the group in the batch."""
    return seed_bits(seed, MIXING, step)


def weights_seed(seed: int, layer: int) -> np.ndarray:
    """Returns the seed of a layer's initial weights, int64 [2], for TensorFlow's stateless operations."""
    return np.array([seed_bits(seed, WEIGHTS, layer), 0], np.uint64).astype(np.int64)


def splitmix64(state: np.ndarray) -> np.ndarray:
    """Returns SplitMix64's output for each state, uint64 of any shape (the constants of Vigna's splitmix64.c)."""
    bits = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def uniform_draws(seeds: np.ndarray, count: int) -> np.ndarray:
    """Returns numbers uniform in [0, 1), float64 [n, count], each row a function of a row of `seeds`, int64 [n, 2].

    A row holds the first draws of the SplitMix64 generator that starts at a hash of the two seeds. All rows are computed at
    once: creating a NumPy generator for each would cost more than its numbers.
    """
    first, second = seeds.astype(np.uint64).T
    start = splitmix64(first + splitmix64(second + GOLDEN_GAMMA))
    bits = splitmix64(start[:, None] + GOLDEN_GAMMA * np.arange(1, count + 1, dtype=np.uint64))
    return (bits >> np.uint64(11)) * 2.0**-53  # the upper 53 bits: all that a float64 holds
