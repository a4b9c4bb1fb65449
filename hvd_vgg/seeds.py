"""Named random streams: pure functions of the seed, on bit streams that NumPy promises never to change."""

import functools

import numpy as np

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(bits: np.ndarray) -> np.ndarray:
    """Returns SplitMix64's finalizer of each of `bits`, uint64."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


# What the numbers drawn are for: no two purposes share a random stream.
ORDER, AUGMENT, DROPOUT, WEIGHTS, BLOCKS, REPLACEMENT = range(6)


def raw_draws(count: int, *words: int) -> np.ndarray:
    """Returns `count` raw 64-bit draws that are a function of `words`."""
    return np.asarray(np.random.Philox(np.random.SeedSequence(list(words))).random_raw(count))


def dropout_keys(seed: int, step: int, layers: int) -> np.ndarray:
    """Returns the Philox keys of a step's dropout masks, uint64 [layers]; the position in the batch is the counter."""
    return np.array([seed_bits(seed, DROPOUT, step, layer) for layer in range(layers)], np.uint64)


def weights_seed(seed: int, layer: int) -> np.ndarray:
    """Returns the seed of a layer's initial weights, int64 [2], for TensorFlow's stateless operations."""
    return np.array([seed_bits(seed, WEIGHTS, layer), 0], np.uint64).astype(np.int64)


@functools.lru_cache(maxsize=64)  # the epoch's is asked for with every batch
def seed_bits(*words: int) -> np.uint64:
    """Returns 64 random bits that are a function of `words` (integers from 0 up)."""
    return np.uint64(np.random.SeedSequence(list(words)).generate_state(1, np.uint64)[0])
