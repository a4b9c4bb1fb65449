"""The data set: shards, records, labels, and whether images decode. `check_dataset` is collective."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

import numpy as np

from hvd_vgg.config import DoctorConfig
from hvd_vgg.data.formats.layout import IMAGENET, TITLES, Found, Layout, find_split, shard_bytes
from hvd_vgg.data.formats.shard_file import Shard
from hvd_vgg.data.index import (
    Index,
    cache_places,
    cached_shards,
    find_label_base,
    join,
    pack_shards,
    scan_shard,
    unpack_shards,
    unseen_labels,
)
from hvd_vgg.data.sampler import slice_bounds
from hvd_vgg.data.survey import check_block, check_record
from hvd_vgg.doctor.manifest import check_digests
from hvd_vgg.doctor.report import Report
from hvd_vgg.doctor.settings import check_schedule
from hvd_vgg.errors import Failure
from hvd_vgg.parallel import comm
from hvd_vgg.reporting.console import Console
from hvd_vgg.reporting.findings import Finding, failure, ok, warning
from hvd_vgg.text import plural
from hvd_vgg.training.dataset import TURN_SECONDS, choose_label_base, open_split, require_one_layout

_BLOCK = 1024  # records that are given to the threads at once; ranks wait for each other after each block
_MAX_NAMED = 20  # bad records and shards that are named; the others are only counted


def check_dataset(report: Report, config: DoctorConfig, threads: int) -> None:
    """Adds to the report what is found in both splits, and with their size whether the learning rate decays. Collective.

    Shards that are not indexed yet are scanned for a few seconds. With --full all are, and the index is kept; each record is
    read, checked and decoded once, by `threads` threads per rank.
    """
    console, found = Console(config.console, comm.is_root()), report.findings
    limit = report.time_limit("data", f"{config.data_dir} was not scanned")
    train_records = 0  # about
    with contextlib.nullcontext() if config.full else limit:
        shards = {split: _find_same_shards(config, split, found) for split in ("train", "validation")}
        paths = {split: found_split[1] for split, found_split in shards.items() if found_split}
        indexes = {split: _scan(config, split, *each, console, found) for split, each in shards.items() if each}
        train, validation = indexes.get("train"), indexes.get("validation")
        if train:
            train_records = train.records * len(paths["train"]) // len(train.paths)
        if train and validation:
            complete = all(len(index.paths) == len(paths[split]) for split, index in indexes.items() if index)
            found += _check_layouts(train, validation) or assess_labels(config, train, validation, complete)
            if complete and config.global_batch > train.records:
                text = f"--global_batch={config.global_batch} exceeds the {train.records} records to train on"
                found.append(warning("data", text, "use a smaller --global_batch"))
        for split, index in indexes.items():
            found += _check_records(config, split, index, threads, console) if index else []
        if config.full:
            found += check_digests(config, paths, threads, console)
    found += check_schedule(config, train_records)


def _check_layouts(train: Index, validation: Index) -> List[Finding]:
    try:
        require_one_layout(train.layout, validation.layout)
    except Failure as error:
        return [_to_finding(error)]
    return []


def _find_same_shards(config: DoctorConfig, split: str, found: List[Finding]) -> Optional[Found]:
    """Returns the split's layout and shards if all ranks have the same; else None, and adds what is wrong on this rank."""
    split_files: Optional[Found] = None
    sizes: Dict[str, int] = {}
    try:
        split_files = find_split(config, split)
        sizes = shard_bytes(split_files[1], split_files[0])
    except Failure as error:
        found.append(_to_finding(error))
    everyones = comm.gather_json(sizes)  # empty on a rank that failed
    differing = sorted({name for name, _ in sizes.items() ^ everyones[0].items()})
    if sizes and everyones[0] and differing:
        names = ", ".join(differing[:3]) + (", ..." if len(differing) > 3 else "")
        text = f"{config.data_dir}: {split} shards differ from those of rank 0: {names}"
        found.append(failure("data", text, "copy the same files to every host"))
    return split_files if all(each and each == sizes for each in everyones) else None


def _to_finding(error: Failure) -> Finding:
    """Returns a Failure of the data as a finding: its last sentence says what to do."""
    text, _, fix = error.message.rpartition(". ")
    return failure("data", text or fix, fix if text else "follow the message")


def _scan(
    config: DoctorConfig, split: str, layout: Layout, paths: List[Path], console: Console, found: List[Finding]
) -> Optional[Index]:
    """Returns the index of the split with --full, else of shards that are cached or scanned in a few seconds.

    It is equal on all ranks, and None if no shard can be read. Adds bad shards and the number of records.
    """
    index: Optional[Index] = None
    refused: List[Finding] = []
    bad: List[Finding] = []
    if config.full:
        try:
            index = open_split(config, split, Path(config.run_dir), console)
        except Failure as error:
            refused = [_to_finding(error)]
    if index is None:
        mine, bad = _scan_shards(config, split, layout, paths)
        shards: Dict[int, Shard] = {}
        for data in comm.gather_bytes(pack_shards(mine)):  # in the same order on all ranks
            shards.update(unpack_shards(data))
        index = join([paths[number] for number in shards], list(shards.values()), layout) if shards else None
    unreadable = int(comm.gather_numbers([len(bad)]).sum())
    found += bad[:_MAX_NAMED] if unreadable else refused  # bad shards are the reason why all of it was refused
    if index is not None:
        text = f"{split}: {index.records:,} records in {plural(len(paths), 'shard')}"
        text += f", {TITLES[layout.kind]}" if layout.kind != IMAGENET else ""
        if len(index.paths) + unreadable < len(paths):
            text += f" at least: {len(index.paths)} were scanned; training indexes the others once, as --full does"
        if unreadable:
            text += f", without {unreadable} that cannot be read (see the failures)"
        found.append(ok("data", text))
    return index


def _scan_shards(
    config: DoctorConfig, split: str, layout: Layout, paths: List[Path]
) -> Tuple[Dict[int, Shard], List[Finding]]:
    """Returns this rank's part of the shards, by number, and those that cannot be read; without --full for some seconds."""
    cached = cached_shards(cache_places(config.data_dir, split, Path(config.run_dir)), paths, layout)
    started, shards, bad = time.monotonic(), {}, []
    for number in range(comm.rank(), len(paths), comm.size()):
        if number in cached and cached[number].unchanged:
            shards[number] = cached[number].shard
        elif config.full or time.monotonic() - started <= TURN_SECONDS:
            try:
                shards[number] = scan_shard(paths[number], layout)
            except Failure as error:
                bad.append(_to_finding(error))
    return shards, bad


def assess_labels(config: DoctorConfig, train: Index, validation: Index, complete: bool) -> Iterator[Finding]:
    """Yields what the labels of both splits mean; complete: all shards are in their indexes."""
    labels, classes = np.union1d(train.labels, validation.labels), config.num_classes
    base = choose_label_base(config, find_label_base(labels, classes), train)
    unseen = unseen_labels(train, validation) if complete else ""
    if unseen:
        yield warning("data", unseen, "they count as misses: convert both splits with the same labels")
    text = f"labels {labels.min()}..{labels.max()}, {len(labels)} distinct; the first class is {base}"
    outside = labels[(labels < base) | (labels >= base + classes)]
    in_train = len(np.unique(train.labels))
    if len(outside):
        text += f"; {outside[0]} is outside the --num_classes={classes} classes"
        yield failure("data", text, "correct --num_classes or --label_base")
    elif complete and in_train < classes:
        text += f"; {in_train} of --num_classes={classes} occur in train"
        yield warning("data", text, "expected for part of a data set; otherwise correct --num_classes")
    else:
        yield ok("data", text)


def _check_records(config: DoctorConfig, split: str, index: Index, threads: int, console: Console) -> List[Finding]:
    """Reads and decodes this rank's part of all records with --full, else one record. Collective."""
    low, high = slice_bounds(index.records, comm.rank(), comm.size())
    records = range(low, high) if config.full else [index.records * comm.rank() // comm.size()]
    longest = -(-index.records // comm.size()) if config.full else 1  # so that all ranks have the same number of blocks
    progress = console.progress(f"reading {split}", len(records), "records")
    bad: List[str] = []
    mended: List[str] = []
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, longest, _BLOCK):
            block = records[start : start + _BLOCK]
            errors, mends = check_block(index, block, lambda record: _check_record(index, record, config), pool)
            bad += errors.values()
            mended += mends.values()
            progress.update(min(start + _BLOCK, len(records)))
            comm.barrier()  # Horovod would consider a rank lost that waits until a slow one is done with all
    found: List[Finding] = []
    for texts, finding, fix in (
        (bad, failure, "copy the shard again, or remove the record from it"),
        (mended, warning, "replace the image; training goes on with it as it is"),
    ):
        found += [finding("data", text, fix) for text in texts[:_MAX_NAMED]]
        if len(texts) > _MAX_NAMED:
            found.append(finding("data", f"and {len(texts) - _MAX_NAMED} more records of {split}", "as above"))
    what = "every record" if config.full else "for each rank a record"
    return found or [ok("data", f"{what} of {split} is read and decoded")]


def _check_record(index: Index, record: int, config: DoctorConfig) -> Tuple[str, bool]:
    """Returns what is wrong with a record, "" if it decodes; and whether the decoder may have printed a message about it."""
    try:
        return check_record(index, record, config)[1:]
    except Failure as failed:  # storage is gone: a finding as any other
        return failed.message, False
