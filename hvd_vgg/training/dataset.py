"""Opens the data of a run: the index of a split is made by all ranks together once, then kept beside the data."""

import io
import time
from pathlib import Path
from typing import Dict, List, NamedTuple

import numpy as np

from hvd_vgg.config import BatchConfig
from hvd_vgg.data.index import (
    Cached,
    Index,
    Shard,
    check_labels,
    find_label_base,
    find_shards,
    join,
    load_cache,
    save_cache,
    scan_shard,
    shard_bytes,
)
from hvd_vgg.data.tfrecord import FOOTER_BYTES
from hvd_vgg.errors import DATA, Failure
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.consensus import require_equal, run_on_all_ranks
from hvd_vgg.reporting.console import Console
from hvd_vgg.watchdog import watchdog

TURN_SECONDS = 3.0


class Splits(NamedTuple):
    """The splits of a run and the label of their first class."""

    train: Index
    validation: Index
    label_base: int


def open_data(config: BatchConfig, run_dir: Path, console: Console) -> Splits:
    """Returns both splits with labels checked; all ranks call. Raises a collective Failure(DATA)."""
    train_index = open_split(config.data_dir, "train", run_dir, console)
    validation = open_split(config.data_dir, "validation", run_dir, console)
    found = find_label_base(np.concatenate([train_index.labels, validation.labels]), config.num_classes)
    label_base = found if config.label_base == "auto" else int(config.label_base)
    for index in (train_index, validation):
        run_on_all_ranks(lambda index=index: check_labels(index, label_base, config.num_classes))  # type: ignore[misc]
    return Splits(train_index, validation, label_base)


def open_split(data_dir: str, split: str, fallback_dir: Path, console: Console) -> Index:
    """Returns the index of a split, the same on all ranks; all ranks must call.

    Kept as `.hvd_vgg_index_SPLIT.npz` in the data directory, or in `fallback_dir` where that cannot be written; shards
    that changed since are read again, and refused where they were cut between two records. Raises a collective
    Failure(DATA), or Failure(CONFIGURATION) when ranks see other files.
    """
    paths = run_on_all_ranks(lambda: find_shards(data_dir, split))
    sizes = run_on_all_ranks(lambda: shard_bytes(paths))
    require_equal(f"the {split} shards in {data_dir} (bytes of each)", sizes)

    places = cache_places(data_dir, split, fallback_dir)
    # Rank 0 alone reads the cache: the others hear from it what is in there.
    cached = run_on_all_ranks(lambda: cached_shards(places, paths) if comm.is_root() else {})
    known = _unpack_shards(
        comm.broadcast_bytes(_pack_shards({number: each.shard for number, each in cached.items() if each.unchanged}))
    )
    stale = [number for number in range(len(paths)) if number not in known]
    if stale and known:
        console.say(f"{split}: {len(stale)} of {len(paths)} shards are new or changed since they were indexed")

    progress = console.progress(f"indexing {split}", len(paths), "shards", len(known))
    mine = stale[comm.rank() :: comm.size()]
    # In turns of seconds: all ranks hear of a bad shard soon after one has met it, and of how far they are together.
    while len(known) < len(paths):
        scanned = run_on_all_ranks(lambda: scan_shards_for(TURN_SECONDS, paths, [n for n in mine if n not in known]))
        for text in comm.gather_bytes(_pack_shards(scanned)):
            known.update(_unpack_shards(text))
        progress.update(len(known))
        watchdog.heartbeat(phase="start")
    changed = {number: each.shard for number, each in cached.items() if number in stale}
    run_on_all_ranks(lambda: _check_not_cut(changed, known, paths))
    if changed:
        before, after = (sum(len(shards[number].offsets) for number in changed) for shards in (changed, known))
        console.say(f"{split}: the shards that changed held {before} records when they were indexed and hold {after} now")
    index = join(paths, [known[number] for number in range(len(paths))])
    if stale and comm.is_root():
        _save_index(places, index, console)
    return index


def cache_places(data_dir: str, split: str, fallback_dir: Path) -> List[Path]:
    """Returns where the index of a split may be kept, the first choice first."""
    name = f".hvd_vgg_index_{split}.npz"
    return [Path(data_dir) / name, fallback_dir / name]


def cached_shards(places: List[Path], paths: List[Path]) -> Dict[int, Cached]:
    """Returns by number the shards that have been indexed, from whichever place knows them as they are now."""
    found: Dict[int, Cached] = {}
    for place in places:
        cache = load_cache(place, paths)
        for number, path in enumerate(paths):
            if path in cache and not (number in found and found[number].unchanged):
                found[number] = cache[path]
    return found


def _check_not_cut(before: Dict[int, Shard], now: Dict[int, Shard], paths: List[Path]) -> None:
    """Raises Failure(DATA) for a shard that ends where one of its records did: a reader takes that for its end."""
    for number, old in before.items():
        count = len(now[number].offsets)
        if count < len(old.offsets) and all((a == b[:count]).all() for a, b in zip(now[number], old)):
            sizes = [int(each.offsets[-1]) + int(each.lengths[-1]) + FOOTER_BYTES for each in (old, now[number])]
            raise Failure(
                DATA,
                f"data: {paths[number]}: expected {len(old.offsets)} records in {sizes[0]} bytes, as when it was indexed; "
                f"found the first {count} of them in {sizes[1]} bytes (cut off while copying?). Copy the shard again; if "
                f"it is meant to be so, remove the .hvd_vgg_index_* beside it or in the run directory",
            )


def scan_shards_for(seconds: float, paths: List[Path], left: List[int]) -> Dict[int, Shard]:
    """Indexes shards of `left` in order until `seconds` have passed, at least one."""
    began, found = time.monotonic(), {}
    for number in left:
        found[number] = scan_shard(paths[number])
        if time.monotonic() - began > seconds:
            break
    return found


def _save_index(places: List[Path], index: Index, console: Console) -> None:
    for place in places:
        try:
            save_cache(place, index)
            return
        except OSError as error:
            console.say(f"the index cannot be kept in {place.parent} ({error.strerror})")


def _pack_shards(shards: Dict[int, Shard]) -> bytes:
    if not shards:
        return b""
    file = io.BytesIO()
    np.savez(file, **{f"{column}_{n}": getattr(shard, column) for n, shard in shards.items() for column in shard._fields})
    return file.getvalue()


def _unpack_shards(data: bytes) -> Dict[int, Shard]:
    if not data:
        return {}
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        numbers = sorted({int(name.rsplit("_", 1)[1]) for name in arrays.files})
        return {n: Shard(*(arrays[f"{column}_{n}"] for column in Shard._fields)) for n in numbers}
