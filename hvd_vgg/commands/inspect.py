"""The `inspect` command: what a data set holds, record by record, and a sheet of what the network will see of it."""

import dataclasses
import functools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence

import numpy as np

from hvd_vgg.commands.inspect_report import format_summary
from hvd_vgg.config import InspectConfig
from hvd_vgg.data.classes import class_names
from hvd_vgg.data.formats.shard_file import data_failure
from hvd_vgg.data.index import Index, find_label_base
from hvd_vgg.data.sampler import slice_bounds
from hvd_vgg.data.sheet import draw_sheet, sheet_datasets, sheet_rows
from hvd_vgg.data.summary import MOST_NAMED, summarize
from hvd_vgg.data.survey import ROW, Survey, require_pillow, survey_block
from hvd_vgg.data.transforms import image_library
from hvd_vgg.errors import DATA, NOT_WRITTEN, Failure
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.consensus import require_equal, run_on_all_ranks, run_on_root
from hvd_vgg.parallel.init import describe_software, start_without_device
from hvd_vgg.reporting.console import Console
from hvd_vgg.run_dir import atomic_write_text, check_out, writing
from hvd_vgg.text import plural
from hvd_vgg.training.dataset import choose_label_base, open_split, require_one_layout
from hvd_vgg.training.startup import OWN_FLAGS

_BLOCK = 1024  # records that are given to the threads at once; ranks wait for each other after each block


def inspect(config: InspectConfig) -> None:
    """Looks at every record of both splits, prints what is found, and writes --json and --out. Collective.

    Raises a collective Failure(DATA) if records are bad or have labels outside the classes, after all is written; or where
    a split or a shard cannot be read.
    """
    threads = _start(config)
    console = Console(config.console, comm.is_root())
    train, validation = (open_split(config, split, Path(config.run_dir), console) for split in ("train", "validation"))
    run_on_all_ranks(lambda: require_one_layout(train.layout, validation.layout))
    labels = np.concatenate([train.labels, validation.labels])
    label_base = choose_label_base(config, find_label_base(labels, config.num_classes), train)
    surveyed = survey_split(config, "train", train, threads, console)
    of_validation = survey_split(config, "validation", validation, threads, console)

    def report() -> str:
        names = _known_names(train, label_base, config.num_classes)
        summary = summarize(surveyed, of_validation, config.num_classes, label_base, names)
        console.say(format_summary(summary))
        _write(config, summary, train, label_base, names)
        return " and ".join(_faults(summary))

    faults = comm.broadcast_json(run_on_root(report))
    if config.out:
        console.say(f"drawn: {config.out}")
    if faults:
        raise Failure(DATA, f"inspect: {faults}, see above", collective=True)
    comm.shutdown()


def _known_names(train: Index, label_base: int, num_classes: int) -> List[str]:
    """Returns the names of the classes, none where they are unknown or a shard cannot be read, which is reported as such."""
    try:
        return class_names(train, label_base, num_classes)
    except Failure as failure:
        if failure.code != DATA:
            raise
        return []


def _faults(summary: Dict[str, Any]) -> Iterator[str]:
    """Yields what training would refuse."""
    splits = summary["splits"].values()
    bad = sum(split["bad"]["records"] for split in splits)
    outside = sum(split["classes"]["outside"]["records"] for split in splits)
    if bad:
        yield plural(bad, "bad record")
    if outside:
        yield f"{plural(outside, 'record')} with labels outside --num_classes={summary['num_classes']}"


def _start(config: InspectConfig) -> int:
    """Joins the ranks and returns the threads of this one that read; fails before the work where something is missing."""
    threads = start_without_device()
    flags = {name: value for name, value in dataclasses.asdict(config).items() if name not in OWN_FLAGS}
    require_equal("the flags", flags)
    run_on_all_ranks(require_pillow)
    require_equal("the software", describe_software(image_library(config.resize)))
    for flag, path in (("--out", config.out), ("--json", config.json)):
        if path:
            run_on_root(functools.partial(check_out, path, NOT_WRITTEN, flag))
    return config.input_threads or threads


def survey_split(config: InspectConfig, split: str, index: Index, threads: int, console: Console) -> Survey:
    """Returns, on rank 0, the split with all its records looked at, each by one of the ranks. Collective.

    Other ranks get no rows: of ImageNet they are 54 MB.
    """
    low, high = slice_bounds(index.records, comm.rank(), comm.size())
    rows = np.zeros(high - low, ROW)
    bad: List[str] = []
    mended: List[str] = []
    progress = console.progress(f"reading {split}", len(rows), "records" + " on rank 0" * (comm.size() > 1))
    with ThreadPoolExecutor(threads) as pool:
        # All ranks have as many blocks: one that waits long for the others would be considered lost.
        for start in range(0, -(-index.records // comm.size()), _BLOCK):
            texts = survey_block(index, low + start, config, rows[start : start + _BLOCK], pool)
            for named, found in zip((bad, mended), texts):
                named += found[: MOST_NAMED - len(named)]
            progress.update(min(start + _BLOCK, len(rows)))
            comm.barrier()
    everyones = np.frombuffer(b"".join(comm.gather_bytes_on_root(rows.tobytes())), ROW)
    named_by_ranks = comm.gather_json([bad, mended])
    bad, mended = ([text for texts in named_by_ranks for text in texts[kind]][:MOST_NAMED] for kind in (0, 1))
    return Survey(index, everyones, bad, mended)


def _write(config: InspectConfig, summary: Dict[str, Any], train: Index, label_base: int, names: Sequence[str]) -> None:
    """Writes --json and --out, where they are given. Raises Failure(NOT_WRITTEN)."""
    if config.json:
        path = Path(config.json).absolute()
        with writing(path):
            atomic_write_text(path, json.dumps({"data_dir": config.data_dir, **summary}, indent=1) + "\n")
    if config.out:
        datasets = sheet_datasets(config, train, label_base, config.seed)
        rows = sheet_rows(*datasets, config.sheet_records, config.sheet_epochs, names)
        if not rows:
            raise data_failure(f"{config.data_dir}: train has no sound record, and --out={config.out} would be empty")
        with writing(Path(config.out)):
            Path(config.out).write_bytes(draw_sheet(rows))
