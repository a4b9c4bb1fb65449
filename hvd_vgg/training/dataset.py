"""Opens the data of a run: all ranks index a split together, once; the index is kept beside the data."""

import functools
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

import numpy as np

from hvd_vgg.config import BatchConfig, DataConfig
from hvd_vgg.data import manifest
from hvd_vgg.data.formats.layout import FOLDERS, TITLES, WEBDATASET, Layout, find_split, shard_bytes, shorten
from hvd_vgg.data.formats.shard_file import Shard, data_failure
from hvd_vgg.data.formats.tfrecord import FOOTER_BYTES
from hvd_vgg.data.index import (
    Index,
    cache_places,
    cached_shards,
    check_labels,
    find_label_base,
    join,
    pack_shards,
    save_cache,
    scan_for,
    scan_shard,
    take_stamps,
    unpack_shards,
    unseen_labels,
)
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.consensus import require_equal, run_on_all_ranks, run_on_root
from hvd_vgg.reporting.console import Console
from hvd_vgg.text import plural
from hvd_vgg.watchdog import watchdog

# Ranks exchange the shards that they have scanned this often, so that a bad shard soon ends all of them.
TURN_SECONDS = 3.0


class Splits(NamedTuple):
    """The splits of a run and the label of their first class."""

    train: Index
    validation: Index
    label_base: int


def open_data(config: BatchConfig, run_dir: Path, console: Console) -> Splits:
    """Returns both splits, their labels checked, the same on all ranks. Collective; failures are those of `open_split`."""
    train, validation = (open_split(config, split, run_dir, console) for split in ("train", "validation"))
    run_on_all_ranks(lambda: require_one_layout(train.layout, validation.layout))
    found = find_label_base(np.concatenate([train.labels, validation.labels]), config.num_classes)
    label_base = choose_label_base(config, found, train)
    for index in (train, validation):
        run_on_all_ranks(functools.partial(check_labels, index, label_base, config.num_classes))
    unseen = unseen_labels(train, validation)
    if unseen:
        console.say(f"warning: {unseen}. They count as misses: were the splits converted with the same labels?")
    both = set(train.paths).intersection(validation.paths)
    if both and config.train_pattern != config.validation_pattern:
        names = shorten(sorted(train.layout.key(path) for path in both))
        console.say(f"warning: {plural(len(both), 'shard')} of train is in validation too: {names}. Correct the patterns")
    return Splits(train, validation, label_base)


def require_one_layout(train: Layout, validation: Layout) -> None:
    """Raises Failure(DATA) where the splits have different layouts or class directories, and so may differ in labels."""
    if train.kind == FOLDERS and train.classes != validation.classes:
        raise data_failure(
            f"{validation.root} has other class directories than {train.root}: the order of their names decides the labels. "
            f"Name both by --train_pattern and --validation_pattern"
        )
    if train.kind != validation.kind:
        raise data_failure(
            f"{train.root}: train is {TITLES[train.kind]}, validation is {TITLES[validation.kind]}; expected both alike. "
            f"Choose with --data_format={train.kind} or --data_format={validation.kind}"
        )


def choose_label_base(config: DataConfig, found: int, split: Index) -> int:
    """Returns the label of the first class: that of --label_base, else of the layout, else the one found from labels."""
    if config.label_base != "auto":
        return int(config.label_base)
    return found if split.layout.label_base is None else split.layout.label_base


def open_split(config: DataConfig, split: str, fallback_dir: Path, console: Console) -> Index:
    """Returns the index of a split, the same on all ranks. Collective.

    It is cached as `.hvd_vgg_index_SPLIT.npz` in the data directory, or in `fallback_dir` where that cannot be written.
    Shards that have changed since are scanned again, and refused where they were cut between two records. Raises a
    collective Failure(DATA), or Failure(CONFIGURATION) where ranks see different files.
    """
    layout, paths = run_on_all_ranks(lambda: find_split(config, split))
    sizes = run_on_all_ranks(lambda: shard_bytes(paths, layout))
    labels = {f"class {label}": name for label, name in enumerate(layout.classes)} if layout.kind == FOLDERS else {}
    found = {"--data_format": layout.kind, "features": repr(layout.features[:2]), **labels, **sizes}
    require_equal(f"the {split} shards in {config.data_dir} (bytes of each)", found)

    places = cache_places(config.data_dir, split, fallback_dir)
    cached = run_on_root(lambda: cached_shards(places, paths, layout)) or {}  # other ranks may have no such file
    unchanged = {number: each.shard for number, each in cached.items() if each.unchanged}
    known = unpack_shards(comm.broadcast_bytes(pack_shards(unchanged)))
    stale = [number for number in range(len(paths)) if number not in known]
    if stale and known:
        console.say(f"{split}: {len(stale)} of {len(paths)} shards are new or have changed since they were indexed")
    stamps = run_on_root(lambda: take_stamps(paths, layout)) if stale else None
    _scan_together(split, paths, layout, known, console)

    changed = {number: each.shard for number, each in cached.items() if not each.unchanged}
    if layout.kind not in (FOLDERS, WEBDATASET):  # the end of a tar archive is marked
        run_on_all_ranks(lambda: _check_not_cut(changed, known, paths))
    if changed:
        before, after = (sum(len(shards[number].offsets) for number in changed) for shards in (changed, known))
        console.say(f"{split}: the changed shards held {before} records when they were indexed and hold {after} now")
    index = join(paths, [known[number] for number in range(len(paths))], layout)
    run_on_all_ranks(functools.partial(_check_manifest, config, split, index, sizes))
    if stale and comm.is_root():
        _save_index(places, index, stamps, console)
    return index


def _scan_together(split: str, paths: List[Path], layout: Layout, known: Dict[int, Shard], console: Console) -> None:
    """Adds the shards that are missing in `known`, each scanned by one rank, on all ranks. Collective."""
    mine = [number for number in range(len(paths)) if number not in known][comm.rank() :: comm.size()]
    progress = console.progress(f"indexing {split}", len(paths), "shards", len(known))

    def scan_some() -> Dict[int, Shard]:
        left = [number for number in mine if number not in known]
        return scan_for(TURN_SECONDS, left, lambda number: scan_shard(paths[number], layout))

    while len(known) < len(paths):
        scanned = run_on_all_ranks(scan_some)
        for data in comm.gather_bytes(pack_shards(scanned)):
            known.update(unpack_shards(data))
        progress.update(len(known))
        watchdog.heartbeat(phase="start")


def _check_not_cut(before: Dict[int, Shard], now: Dict[int, Shard], paths: List[Path]) -> None:
    """Raises Failure(DATA) for a shard that now ends after one of its former records: it reads like an intact file."""
    for number, old in before.items():
        new = now[number]
        count = len(new.offsets)
        if count < len(old.offsets) and all((a == b[:count]).all() for a, b in zip(new, old)):
            sizes = [int(each.offsets[-1]) + int(each.lengths[-1]) + FOOTER_BYTES for each in (old, new)]
            raise data_failure(
                f"{paths[number]}: expected {len(old.offsets)} records in {sizes[0]} bytes, as when it was indexed; found "
                f"the first {count} of them in {sizes[1]} bytes (cut off while copying?). Copy the shard again; if it is "
                f"meant to be so, remove the .hvd_vgg_index_* beside it or in the run directory"
            )


def _check_manifest(config: DataConfig, split: str, index: Index, sizes: Dict[str, int]) -> None:
    """Raises Failure(DATA) for a shard that is not as `prepare` wrote it, by its size and records, if it wrote them."""
    whole = not (config.train_pattern if split == "train" else config.validation_pattern)
    manifest.check_index(Path(config.data_dir), split, index, sizes, whole)


def _save_index(places: List[Path], index: Index, stamps: Optional[List[List[int]]], console: Console) -> None:
    for place in places:
        try:
            save_cache(place, index, stamps)
            return
        except OSError as error:
            console.say(f"the index cannot be cached in {place.parent} ({error.strerror})")
