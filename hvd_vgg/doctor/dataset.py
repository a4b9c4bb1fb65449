"""The data set as `hvd-vgg doctor` sees it: files, records, labels, and whether images decode. All ranks call together."""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from hvd_vgg.config import TrainConfig
from hvd_vgg.data.index import Index, find_label_base, find_shards, join, scan_shard, shard_bytes
from hvd_vgg.data.reader import parse_example, read_record
from hvd_vgg.data.transforms import eval_image
from hvd_vgg.errors import Failure
from hvd_vgg.parallel import comm
from hvd_vgg.reporting.console import Console
from hvd_vgg.reporting.findings import Finding, failure, ok, warning
from hvd_vgg.text import plural
from hvd_vgg.train.dataset import TURN_SECONDS, cache_places, cached_shards, open_split

_BLOCK = 1024  # records that are handed to the threads at once, and between which ranks wait for each other
_NAMED = 20  # bad records that are named; the others are counted


class SplitSurvey(NamedTuple):
    """What this rank knows of a split: paths of the shards that it looked at, and their records."""

    held: Optional[Index]
    shards: int
    shards_looked_at: int  # by all ranks, as what follows
    shards_unreadable: int
    records: int
    labels: np.ndarray  # int64, each that any rank has seen once, rising

    @property
    def whole(self) -> bool:
        """Whether the counts are those of the split."""
        return self.shards_looked_at == self.shards


def survey(config: TrainConfig, full: bool, threads: int, console: Console) -> Tuple[List[Finding], int]:
    """Returns what this rank found of both splits, and about how many records there are to train on; all ranks call.

    Without `full` shards that are not indexed yet are looked at for seconds only. With it every record's data is read,
    checked and decoded by `threads` threads of each rank, bad ones are collected, and the index is kept.
    """
    found: List[Finding] = []
    seen: Dict[str, SplitSurvey] = {}
    for split in ("train", "validation"):
        paths = _same_everywhere(config.data_dir, split, found)
        if paths:
            seen[split] = _index(config, split, paths, full, console, found)
    if len(seen) == 2:
        found += _labels(config, seen)
    for split, one in seen.items():
        found += _decode(config, split, one, full and one.whole, threads, console)
    train = seen.get("train")
    return found, train.records * train.shards // max(1, train.shards_looked_at) if train else 0


def _same_everywhere(data_dir: str, split: str, found: List[Finding]) -> List[Path]:
    """Returns the split's shards where all ranks have the same ones; nothing where any rank has not."""
    mine: Dict[str, Any] = {"error": "", "sizes": {}}
    paths: List[Path] = []
    try:
        paths = find_shards(data_dir, split)
        mine["sizes"] = shard_bytes(paths)
    except Failure as error:
        mine["error"] = error.message
        found.append(_as_finding(error))
    told = comm.gather_json(mine)
    if not mine["error"] and not told[0]["error"] and mine["sizes"] != told[0]["sizes"]:
        differing = sorted(
            name for name in shard_names(mine, told[0]) if mine["sizes"].get(name) != told[0]["sizes"].get(name)
        )
        text = (
            f"{data_dir}: {split} shards are not those of rank 0: {', '.join(differing[:3])}{', ...' * (len(differing) > 3)}"
        )
        found.append(failure("data", text, "copy the same files to every host"))
    return [] if any(each["error"] or each["sizes"] != told[0]["sizes"] for each in told) else paths


def _as_finding(error: Failure) -> Finding:
    """Returns a failure of the data as a finding: the last sentence of these says what to do."""
    text, _, fix = error.message.rpartition(". ")
    return failure("data", text, fix) if text else failure("data", fix, "as it says")


def shard_names(mine: Dict[str, Any], theirs: Dict[str, Any]) -> List[str]:
    """Returns the names of shards that either has."""
    return sorted({*mine["sizes"], *theirs["sizes"]})


def _index(
    config: TrainConfig, split: str, paths: List[Path], full: bool, console: Console, found: List[Finding]
) -> SplitSurvey:
    """Returns what is known of a split: all of it with `full` or from the cache, else what seconds show.

    A shard that cannot be read is a finding; with `full` all that cannot are.
    """
    if not full:
        return _scan_briefly(config, split, paths, TURN_SECONDS, found)
    try:
        whole = open_split(config.data_dir, split, Path(config.run_dir), console)
    except Failure as error:
        one = _scan_briefly(config, split, paths, math.inf, found)
        if not one.shards_unreadable:  # else they are why
            found.append(_as_finding(error))
        return one
    return SplitSurvey(whole, len(paths), len(paths), 0, whole.records, np.unique(whole.labels))


def _scan_briefly(config: TrainConfig, split: str, paths: List[Path], seconds: float, found: List[Finding]) -> SplitSurvey:
    """Returns what the cache knows of a split's shards, and what can be indexed of the others in `seconds`."""
    cached = cached_shards(cache_places(config.data_dir, split, Path(config.run_dir)), paths)
    known = {number: each.shard for number, each in cached.items() if each.unchanged}
    left = [number for number in range(comm.rank(), len(paths), comm.size()) if number not in known]
    # A cache that all ranks have is told of once: by who would have scanned it.
    mine = {n: shard for n, shard in known.items() if n % comm.size() == comm.rank()}
    began, unreadable = time.monotonic(), 0
    for number in left:
        try:
            mine[number] = scan_shard(paths[number])
        except Failure as error:
            unreadable += 1
            if unreadable <= _NAMED:
                found.append(_as_finding(error))
        if time.monotonic() - began > seconds:
            break
    numbers = sorted(mine)
    index = join([paths[n] for n in numbers], [mine[n] for n in numbers]) if numbers else None
    labels = np.unique(index.labels).astype(np.int64) if index else np.zeros(0, np.int64)
    everyones = np.unique(np.concatenate([np.frombuffer(text, np.int64) for text in comm.gather_bytes(labels.tobytes())]))
    totals = comm.gather_numbers([len(numbers), unreadable, index.records if index else 0]).sum(axis=0)
    return SplitSurvey(index, len(paths), int(totals[0]), int(totals[1]), int(totals[2]), everyones)


def _labels(config: TrainConfig, seen: Dict[str, SplitSurvey]) -> List[Finding]:
    """Judges counts and labels of both splits; the same on all ranks."""
    found = []
    for split, one in seen.items():
        text = f"{split}: {one.records:,} records in {plural(one.shards, 'shard')}"
        left = one.shards - one.shards_looked_at - one.shards_unreadable
        if left:
            text += f" at least: {one.shards_looked_at} were looked at; training indexes the others once, or --full"
        if one.shards_unreadable:
            text += f", without {one.shards_unreadable} that cannot be read (see the failures)"
        if not one.records:
            if not one.shards_unreadable:
                found.append(failure("data", f"{split}: no record in {plural(one.shards, 'shard')}", "copy the files again"))
            return found
        found.append(ok("data", text))
    labels = np.union1d(seen["train"].labels, seen["validation"].labels)
    whole = all(one.whole for one in seen.values())
    base = find_label_base(labels, config.num_classes) if config.label_base == "auto" else int(config.label_base)
    text = f"labels {labels.min()}..{labels.max()}, {len(labels)} different; the first class is {base}"
    beyond = labels[(labels < base) | (labels >= base + config.num_classes)]
    if len(beyond):
        fix = "correct --num_classes or --label_base"
        found.append(failure("data", f"{text}; {beyond[0]} is none of --num_classes={config.num_classes}", fix))
    elif whole and len(seen["train"].labels) < config.num_classes:
        said = f"{text}: {len(seen['train'].labels)} of --num_classes={config.num_classes} occur in train"
        found.append(warning("data", said, "right for a part of a data set; else correct --num_classes"))
    else:
        found.append(ok("data", text))
    if whole and config.global_batch > seen["train"].records:
        said = f"--global_batch={config.global_batch} is more than the {seen['train'].records} records to train on"
        found.append(warning("data", said, "a smaller --global_batch"))
    return found


def _decode(config: TrainConfig, split: str, one: SplitSurvey, full: bool, threads: int, console: Console) -> List[Finding]:
    """Reads and decodes this rank's part of all records with `full`, else one record; bad ones are findings."""
    if one.held is None or not one.held.records:
        return []
    index = one.held
    if full:
        bounds = [index.records * part // comm.size() for part in (comm.rank(), comm.rank() + 1)]
        ids, most = range(*bounds), -(-index.records // comm.size())  # as many blocks on all ranks
    else:
        ids, most = range(1), 1
    progress = console.progress(f"reading {split}", len(ids), "records")
    bad: List[str] = []
    with ThreadPoolExecutor(threads) as pool:
        for done in range(0, most, _BLOCK):
            told = pool.map(lambda record: _decodes(index, record, config), ids[done : done + _BLOCK])
            bad += [wrong for wrong in told if wrong]
            progress.update(min(done + _BLOCK, len(ids)))
            if full:  # a slow rank is waited for block by block: all at once Horovod would take it for hung
                comm.barrier()
    found = [failure("data", text, "copy the shard again, or leave the record out of it") for text in bad[:_NAMED]]
    if len(bad) > _NAMED:
        found.append(failure("data", f"and {len(bad) - _NAMED} more records of {split}", "as above"))
    if not bad:
        what = f"every record of {split}" if full else f"a record of {split} on each rank that looked"
        found.append(ok("data", f"{what} is read and decoded"))
    return found


def _decodes(index: Index, record: int, config: TrainConfig) -> str:
    """Returns what is wrong with a record; nothing where it decodes."""
    try:
        encoded, _ = parse_example(index, record, read_record(index, record))
        eval_image(encoded, config.augment, np.empty([config.image_size, config.image_size, 3], np.uint8))
    except Failure as error:
        return error.message
    except ValueError as error:
        return f"data: {index.where(record)}: {error}"
    return ""
