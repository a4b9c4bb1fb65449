"""The data set: shards, records, labels, and whether images decode. `check_dataset` is collective."""

import contextlib
import dataclasses
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, Iterator, List, Optional

import numpy as np

from hvd_vgg.config import DoctorConfig
from hvd_vgg.data.index import (
    Index,
    cache_places,
    cached_shards,
    find_label_base,
    find_shards,
    join,
    scan_shard,
    shard_bytes,
)
from hvd_vgg.data.reader import parse_example, read_record
from hvd_vgg.data.transforms import eval_image
from hvd_vgg.doctor.report import Report
from hvd_vgg.doctor.settings import check_schedule
from hvd_vgg.errors import Failure
from hvd_vgg.parallel import comm
from hvd_vgg.reporting.console import Console
from hvd_vgg.reporting.findings import Finding, failure, ok, warning
from hvd_vgg.text import plural
from hvd_vgg.training.dataset import TURN_SECONDS, open_split

_BLOCK = 1024  # records that are given to the threads at once; ranks wait for each other after each block
_MAX_NAMED = 20  # bad records and shards that are named; the others are only counted


@dataclasses.dataclass(frozen=True)
class SplitScan:
    """What is known of a split. `index` is of the shards that this rank scanned; all else is equal on all ranks."""

    index: Optional[Index]
    shards: int
    scanned: int
    unreadable: int
    records: int  # in the shards that were scanned
    labels: np.ndarray  # int64, sorted, each distinct one once

    @property
    def complete(self) -> bool:
        """Whether all shards were scanned."""
        return self.scanned == self.shards


def check_dataset(report: Report, config: DoctorConfig, threads: int) -> None:
    """Adds to the report what is found in both splits, and with their size whether the learning rate decays. Collective.

    Shards that are not indexed yet are scanned for a few seconds. With --full all are, and the index is kept; each record is
    read, checked and decoded once, by `threads` threads per rank.
    """
    console, found = Console(config.console, comm.is_root()), report.findings
    scans: Dict[str, SplitScan] = {}
    limit = report.time_limit("data", f"{config.data_dir} was not scanned")
    with contextlib.nullcontext() if config.full else limit:
        for split in ("train", "validation"):
            paths = _find_same_shards(config.data_dir, split, found)
            if paths:
                scans[split] = _scan(config, split, paths, console, found)
        if len(scans) == 2:
            found += assess_splits(config, scans["train"], scans["validation"])
        for split, scan in scans.items():
            if scan.index is not None and scan.index.records:
                found += _check_records(config, split, scan.index, config.full and scan.complete, threads, console)
    train = scans.get("train")
    found += check_schedule(config, train.records * train.shards // max(1, train.scanned) if train else 0)


def _find_same_shards(data_dir: str, split: str, found: List[Finding]) -> List[Path]:
    """Returns the split's shards if all ranks have the same; else nothing, and adds what is wrong on this rank."""
    paths: List[Path] = []
    sizes: Dict[str, int] = {}
    try:
        paths = find_shards(data_dir, split)
        sizes = shard_bytes(paths)
    except Failure as error:
        found.append(_to_finding(error))
    everyones = comm.gather_json(sizes)  # empty on a rank that failed
    theirs = everyones[0]
    if sizes and theirs and sizes != theirs:
        differing = sorted(name for name in {*sizes, *theirs} if sizes.get(name) != theirs.get(name))
        names = ", ".join(differing[:3]) + (", ..." if len(differing) > 3 else "")
        text = f"{data_dir}: {split} shards differ from those of rank 0: {names}"
        found.append(failure("data", text, "copy the same files to every host"))
    return paths if sizes and all(each == sizes for each in everyones) else []


def _to_finding(error: Failure) -> Finding:
    """Returns a Failure of the data as a finding: its last sentence says what to do."""
    text, _, fix = error.message.rpartition(". ")
    return failure("data", text or fix, fix if text else "follow the message")


def _scan(config: DoctorConfig, split: str, paths: List[Path], console: Console, found: List[Finding]) -> SplitScan:
    """Returns a scan of the whole split with --full, else of what is cached and a few seconds' worth; adds bad shards."""
    if config.full:
        try:
            index = open_split(config.data_dir, split, Path(config.run_dir), console)
            return SplitScan(index, len(paths), len(paths), 0, index.records, np.unique(index.labels))
        except Failure as error:
            scan = _scan_shards(config, split, paths, math.inf, found)
            if not scan.unreadable:  # otherwise those are the reason
                found.append(_to_finding(error))
            return scan
    return _scan_shards(config, split, paths, TURN_SECONDS, found)


def _scan_shards(config: DoctorConfig, split: str, paths: List[Path], seconds: float, found: List[Finding]) -> SplitScan:
    """Scans this rank's part of the shards that are not in the cache, for `seconds`; adds those that cannot be read."""
    cached = cached_shards(cache_places(config.data_dir, split, Path(config.run_dir)), paths)
    started, shards, unreadable = time.monotonic(), {}, 0
    for number in range(comm.rank(), len(paths), comm.size()):
        if number in cached and cached[number].unchanged:
            shards[number] = cached[number].shard
        elif time.monotonic() - started <= seconds:
            try:
                shards[number] = scan_shard(paths[number])
            except Failure as error:
                unreadable += 1
                found += [_to_finding(error)] if unreadable <= _MAX_NAMED else []
    index = join([paths[number] for number in shards], list(shards.values())) if shards else None
    labels = np.unique(index.labels).tolist() if index else []
    everyones = comm.gather_json([len(shards), unreadable, index.records if index else 0, labels])
    scanned, failed, records = (sum(each[column] for each in everyones) for column in range(3))
    distinct = np.array(sorted({label for each in everyones for label in each[3]}), np.int64)
    return SplitScan(index, len(paths), scanned, failed, records, distinct)


def assess_splits(config: DoctorConfig, train: SplitScan, validation: SplitScan) -> Iterator[Finding]:
    """Yields what the counts and labels of both splits mean; the same on all ranks."""
    for split, scan in (("train", train), ("validation", validation)):
        text = f"{split}: {scan.records:,} records in {plural(scan.shards, 'shard')}"
        if scan.scanned + scan.unreadable < scan.shards:
            text += f" at least: {scan.scanned} were scanned; training indexes the others once, as --full does"
        if scan.unreadable:
            text += f", without {scan.unreadable} that cannot be read (see the failures)"
        if scan.records:
            yield ok("data", text)
        elif not scan.unreadable:
            yield failure("data", f"{split}: no record in {plural(scan.shards, 'shard')}", "copy the files again")
    if not (train.records and validation.records):
        return
    labels, classes = np.union1d(train.labels, validation.labels), config.num_classes
    base = find_label_base(labels, classes) if config.label_base == "auto" else int(config.label_base)
    text = f"labels {labels.min()}..{labels.max()}, {len(labels)} distinct; the first class is {base}"
    outside = labels[(labels < base) | (labels >= base + classes)]
    if len(outside):
        text += f"; {outside[0]} is outside the --num_classes={classes} classes"
        yield failure("data", text, "correct --num_classes or --label_base")
    elif train.complete and validation.complete and len(train.labels) < classes:
        text += f"; {len(train.labels)} of --num_classes={classes} occur in train"
        yield warning("data", text, "expected for part of a data set; otherwise correct --num_classes")
    else:
        yield ok("data", text)
    if train.complete and config.global_batch > train.records:
        text = f"--global_batch={config.global_batch} exceeds the {train.records} records to train on"
        yield warning("data", text, "use a smaller --global_batch")


def _check_records(
    config: DoctorConfig, split: str, index: Index, full: bool, threads: int, console: Console
) -> List[Finding]:
    """Reads and decodes this rank's part of all records with `full` (collective), else one record of the index."""
    bounds = [index.records * part // comm.size() for part in (comm.rank(), comm.rank() + 1)] if full else [0, 1]
    records = range(*bounds)
    longest = -(-index.records // comm.size()) if full else 1  # so that all ranks have the same number of blocks
    progress = console.progress(f"reading {split}", len(records), "records")
    bad: List[str] = []
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, longest, _BLOCK):
            bad += filter(
                None, pool.map(lambda record: _record_error(index, record, config), records[start : start + _BLOCK])
            )
            progress.update(min(start + _BLOCK, len(records)))
            if full:  # Horovod would consider a rank lost that waits until a slow one is done with all
                comm.barrier()
    found = [failure("data", text, "copy the shard again, or remove the record from it") for text in bad[:_MAX_NAMED]]
    if len(bad) > _MAX_NAMED:
        found.append(failure("data", f"and {len(bad) - _MAX_NAMED} more records of {split}", "as above"))
    what = f"every record of {split} is read and decoded"
    return found or [ok("data", what if full else f"a record of {split} is read and decoded on each rank that scanned any")]


def _record_error(index: Index, record: int, config: DoctorConfig) -> str:
    """Returns what is wrong with a record; "" if it decodes."""
    try:
        encoded, _ = parse_example(index, record, read_record(index, record))
        eval_image(encoded, config.augment, np.empty([config.image_size, config.image_size, 3], np.uint8))
    except Failure as error:
        return error.message
    except ValueError as error:
        return f"data: {index.where(record)}: {error}"
    return ""
