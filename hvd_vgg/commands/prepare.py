"""The `prepare` command: converts a data set to TFRecords in ImageNet's layout, on any number of ranks; killed, it goes on.

What is written is a function of the source and the flags. Alone it needs neither TensorFlow nor Horovod.
"""

import contextlib
import errno
import functools
import itertools
import json
import os
import re
import shutil
import threading
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np

from hvd_vgg import __version__
from hvd_vgg.config import PrepareConfig
from hvd_vgg.data import manifest
from hvd_vgg.data.conversion import pictures, shard_writer
from hvd_vgg.data.conversion.pictures import Encoding
from hvd_vgg.data.conversion.shard_writer import FOLDER, Note, Stopped, Task, read_note, write_shard, write_text
from hvd_vgg.data.conversion.sources import Selection, Source, Split, count_classes, digest, find_source, select, spread_ids
from hvd_vgg.data.formats.layout import shorten
from hvd_vgg.data.formats.shard_file import Shard, data_failure
from hvd_vgg.data.index import Index, join, pack_shards, scan_for, unpack_shards
from hvd_vgg.data.manifest import Manifest, SplitEntry
from hvd_vgg.environment import runs_alone
from hvd_vgg.errors import CONFIGURATION, DATA, NOT_WRITTEN, STOPPED, Failure
from hvd_vgg.parallel.cores import share_of_cores
from hvd_vgg.reporting.console import Console
from hvd_vgg.run_dir import lock_run_dir, write_error
from hvd_vgg.text import difference_table, format_bytes, plural

_TURN_SECONDS = 1.0  # how often ranks meet, so that one that fails ends all of them, and none is considered lost
_SAMPLED = 64  # records that are converted beforehand where nothing else says how large the result will be
_AMPLE = 8  # so many times the source's bytes are enough, however images are encoded: nothing is converted beforehand
_FEATURES_BYTES = 400  # of a record, beside its image
_MARGIN_BYTES = 2**24  # of free space, for the notes and the manifest
_GOES_ON = "The same command goes on where this one ended"
CLASSES, REFUSED, CONVERTED = "classes.txt", "refused.jsonl", "converted.jsonl"
# Flags that decide nothing of what is written, beside the source, whose contents are compared instead.
_FREE_FLAGS = ("source", "out", "validation_labels", "bad_records_allowed", "input_threads", "console")


class Ranks(NamedTuple):
    """What the command needs of its ranks, be it one without Horovod or many; the functions are collective."""

    rank: int
    size: int
    threads: int  # of this rank
    together: Callable[[Callable[[], Any]], Any]  # `consensus.run_on_all_ranks`
    gather_json: Callable[[Any], List[Any]]
    gather_bytes: Callable[[bytes], List[bytes]]
    leave: Callable[[], None]

    def on_root(self, action: Callable[[], Any]) -> Any:
        """Returns on all ranks what `action` returned on rank 0, as JSON has it."""
        return self.gather_json(self.together(lambda: action() if self.rank == 0 else None))[0]


def prepare(config: PrepareConfig) -> None:
    """Writes the splits of --source as TFRecords into --out, with a manifest. Collective.

    Raises a collective Failure: DATA where the source is damaged or more records are refused than allowed, CONFIGURATION
    where --out holds something else or a library is missing, NOT_WRITTEN where the disk is full. In each case the same
    command, when the reason is gone, goes on with the shards that are whole.
    """
    ranks = _alone() if runs_alone() else _join()
    console, out = Console(config.console, ranks.rank == 0), Path(config.out)
    finished = ranks.on_root(lambda: _describe_finished(config, out))
    try:
        if finished:
            _require_same_source(config, out, finished["source"], ranks, console)
            console.say(finished["text"])
        else:
            ranks.together(pictures.library)
            with pictures.quiet():
                _prepare(config, out, ranks, console)
    except KeyboardInterrupt as error:
        raise Failure(STOPPED, f"interrupted. {_GOES_ON}") from error
    ranks.leave()


def _alone() -> Ranks:
    return Ranks(0, 1, share_of_cores(1), lambda action: action(), lambda value: [value], lambda data: [data], lambda: None)


def _join() -> Ranks:
    from hvd_vgg.parallel import comm  # here: they import TensorFlow
    from hvd_vgg.parallel.consensus import run_on_all_ranks
    from hvd_vgg.parallel.init import start_without_device

    threads = start_without_device()
    return Ranks(comm.rank(), comm.size(), threads, run_on_all_ranks, comm.gather_json, comm.gather_bytes, comm.shutdown)


def _prepare(config: PrepareConfig, out: Path, ranks: Ranks, console: Console) -> None:
    sources = _find_sources(config, ranks)
    ranks.together(lambda: _require_usable(out) if ranks.rank == 0 else None)
    selection = _select(sources, config, ranks, console)  # a wrong flag, or a damaged source, leaves nothing in --out
    with ranks.together(lambda: _lock(out) if ranks.rank == 0 else contextlib.nullcontext()):
        _prepare_selected(selection, config, out, ranks, console)


def _find_sources(config: PrepareConfig, ranks: Ranks) -> List[Tuple[str, Source]]:
    """Returns each split of --splits by name. Collective."""
    found: List[Source] = ranks.together(lambda: [find_source(config, split) for split in config.splits])
    return list(zip(config.splits, found))


def _select(sources: Sequence[Tuple[str, Source]], config: PrepareConfig, ranks: Ranks, console: Console) -> Selection:
    """Returns which records of the sources are written, the same on all ranks. Collective."""
    found = [(split, source, _scan(split, source, ranks, console)) for split, source in sources]
    selection: Selection = ranks.together(lambda: select(config, found))
    return selection


def _prepare_selected(selection: Selection, config: PrepareConfig, out: Path, ranks: Ranks, console: Console) -> None:
    shards = {"train": config.train_shards, "validation": config.validation_shards}
    of_splits = [shard_writer.tasks(split, min(shards[split.name], len(split.ids))) for split in selection.splits]
    tasks = list(itertools.chain(*of_splits))
    plan = ranks.together(lambda: _plan(config, selection, tasks))
    _require_equal(ranks, plan)
    ranks.together(lambda: _begin(out, plan, tasks) if ranks.rank == 0 else None)
    ranks.together(lambda: _require_shared(out, plan))
    _describe(selection, of_splits, console)

    encoding = Encoding(config.shorter_side, config.quality, config.rgb_jpeg)
    kept = ranks.on_root(lambda: [note and note.dump() for note in (read_note(out, task) for task in tasks)])
    notes = {task.name: Note.load(note) for task, note in zip(tasks, kept) if note}
    refused = {name for name, note in notes.items() if note.refused}
    if sum(len(notes[name].refused) for name in refused) > config.bad_records_allowed:
        for name in refused:  # the source may have been repaired
            del notes[name]
    left = [task for task in tasks if task.name not in notes]
    if notes:
        console.say(f"{len(notes)} of {plural(len(tasks), 'shard')} are whole: going on with the others")
    ranks.together(lambda: _require_space(out, left, encoding, selection.classes) if ranks.rank == 0 else None)
    threads = config.input_threads or ranks.threads
    for mine in ranks.gather_json(_write(out, left, encoding, selection.classes, threads, ranks, console)):
        notes.update({note["entry"]["name"]: Note.load(note) for note in mine})
    everything = [[notes[task.name] for task in each] for each in of_splits]
    console.say(ranks.on_root(lambda: _finish(config, out, plan, selection, everything)))


def _require_usable(out: Path) -> None:
    """Raises Failure(CONFIGURATION) where OUT cannot be used, has files of others, or another job uses it; makes nothing."""
    try:
        above = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(above, os.W_OK | os.X_OK):
            number = errno.EROFS if os.statvfs(above).f_flag & os.ST_RDONLY else errno.EACCES
            raise OSError(number, os.strerror(number))
        if (out / FOLDER).is_dir():
            with _lock(out):
                return
        if out.exists():
            _require_empty(out, {FOLDER})
    except OSError as error:
        raise Failure(CONFIGURATION, write_error(out, error)) from error


def _lock(out: Path) -> Any:
    """Returns the open lock of OUT/.prepare; raises Failure where OUT cannot be used, or another job uses it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / FOLDER / "plan.json").exists():
            _require_empty(out, {FOLDER})
        (out / FOLDER).mkdir(exist_ok=True)
    except OSError as error:
        raise Failure(CONFIGURATION, write_error(out, error)) from error
    return lock_run_dir(out / FOLDER, "--out", out)


def _require_empty(out: Path, known: Set[str]) -> None:
    theirs = re.compile(r"\.hvd_vgg_index_\w+\.npz|lost\+found")  # of training and inspect, and of a disk's root
    foreign = sorted(path.name for path in out.iterdir() if path.name not in known and not theirs.fullmatch(path.name))
    if foreign:
        names = ", ".join(map(ascii, foreign[:3])) + (", ..." if len(foreign) > 3 else "")
        raise Failure(CONFIGURATION, f"--out={out} has {names}, which prepare did not make. Choose an empty directory")


def _require_same_source(config: PrepareConfig, out: Path, sha256: str, ranks: Ranks, console: Console) -> None:
    """Raises a collective Failure(CONFIGURATION) where a finished --out was made of another source. Collective."""
    if not ranks.on_root(lambda: Path(config.source).exists()):
        console.say(f"{config.source} is not there any more, and not compared")
        return
    selection = _select(_find_sources(config, ranks), config, ranks, console)
    own = ranks.together(lambda: digest(selection.splits))
    ranks.together(lambda: _require_same(out, {"source": sha256}, {"source": own}, "records or labels"))


def _describe_finished(config: PrepareConfig, out: Path) -> Optional[Dict[str, str]]:
    """Returns what to say of an --out that is finished, and the digest of its source; None where it is not finished.

    Removes what a killed command left of its work. Raises Failure(CONFIGURATION) where it was made with other flags,
    Failure(DATA) where a shard is not as it was written.
    """
    made = manifest.read(out)
    if made is None:
        return None
    _require_same(out, made.flags, _flags(config), "flags")
    try:
        for name, split in made.splits.items():
            sizes = {shard.name: (out / shard.name).stat().st_size for shard in split.shards if (out / shard.name).exists()}
            manifest.check_shards(out, name, sizes)
        _remove_folder(out, {shard.name for split in made.splits.values() for shard in split.shards})
    except OSError as error:
        raise Failure(CONFIGURATION, write_error(out, error)) from error
    records = ", ".join(f"{plural(split.records, 'record', ',')} of {name}" for name, split in made.splits.items())
    text = f"{out} is finished: {records}. All shards have the sizes in {manifest.NAME}"
    return {"text": text, "source": made.source.get("sha256", "")}


def _require_same(out: Path, before: Any, now: Any, what: str) -> None:
    table = difference_table(before, now, ("in --out", "now"))
    if table:
        raise Failure(
            CONFIGURATION,
            f"--out={out} was begun with other {what}:\n{table}\nRepeat that command, or choose another --out",
        )


def _flags(config: PrepareConfig) -> Dict[str, Any]:
    """Returns the flags that decide what is written, as JSON has them."""
    flags = {name: value for name, value in vars(config).items() if name not in _FREE_FLAGS}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()}


def _scan(split: str, source: Source, ranks: Ranks, console: Console) -> Index:
    """Returns the index of a split, of whose parts each rank scans some; the same on all. Collective."""
    parts = len(source.paths)
    known: Dict[int, Shard] = {}
    progress = console.progress(f"looking through {split}", parts, "parts")
    while len(known) < parts:
        mine = [number for number in range(ranks.rank, parts, ranks.size) if number not in known]
        scanned = ranks.together(functools.partial(scan_for, _TURN_SECONDS, mine, source.scan))
        for data in ranks.gather_bytes(pack_shards(scanned)):
            known.update(unpack_shards(data))
        progress.update(len(known))
    return join(source.paths, [known[number] for number in range(parts)], source.layout)


def _plan(config: PrepareConfig, selection: Selection, tasks: Sequence[Task]) -> Dict[str, Any]:
    """Returns what decides each byte of the shards, as JSON has it."""
    encodes = config.shorter_side > 0 or config.rgb_jpeg
    return {
        "hvd_vgg": __version__,
        "source": digest(selection.splits),
        "images": pictures.library() if encodes else "as they are",
        "shards": len(tasks),
        **_flags(config),
    }


def _require_equal(ranks: Ranks, plan: Dict[str, Any]) -> None:
    """Raises a collective Failure(CONFIGURATION) unless all ranks have the same plan. Collective."""
    first, *others = ranks.gather_json(plan)
    differing = next((each for each in others if each != first), None)

    def check() -> None:
        if differing:
            table = difference_table(first, differing, ("rank 0", "another"))
            text = "Start all ranks with the same flags, software and data"
            raise Failure(CONFIGURATION, f"ranks disagree about what to prepare:\n{table}\n{text}")

    ranks.together(check)


def _begin(out: Path, plan: Dict[str, Any], tasks: Sequence[Task]) -> None:
    """Writes OUT/.prepare/plan.json, or compares it with that of an earlier start; removes shards that were half written."""
    path = out / FOLDER / "plan.json"
    try:
        if path.exists():
            _require_same(out, _parse_plan(path), plan, "flags, software or source")
            _require_empty(out, {FOLDER, CLASSES, REFUSED, CONVERTED, *(task.name for task in tasks)})
        for half in (out / FOLDER).iterdir():
            if shard_writer.is_half_written(half):
                half.unlink()
        if not path.exists():
            write_text(out, f"{FOLDER}/plan.json", json.dumps(plan))
    except OSError as error:
        raise Failure(NOT_WRITTEN, f"{write_error(path, error)}. {_GOES_ON}") from error


def _parse_plan(path: Path) -> Dict[str, Any]:
    try:
        plan = json.loads(path.read_bytes())
        if isinstance(plan, dict):
            return plan
    except (ValueError, RecursionError):
        pass
    raise Failure(CONFIGURATION, f"{path} is damaged. Choose another --out, or remove this one")


def _require_shared(out: Path, plan: Dict[str, Any]) -> None:
    try:
        if json.loads((out / FOLDER / "plan.json").read_bytes()) == plan:
            return
    except (OSError, ValueError):
        pass
    raise Failure(CONFIGURATION, f"--out={out} is not rank 0's: expected one directory that all hosts share")


def _describe(selection: Selection, of_splits: Sequence[Sequence[Task]], console: Console) -> None:
    for split, tasks in zip(selection.splits, of_splits):
        left_out = split.origin.records - len(split.ids)
        text = f"{split.name}: {plural(len(split.ids), 'record')} of {split.source.title} in {plural(len(tasks), 'shard')}"
        console.say(text + f", without {left_out} that --classes or --records_per_class leave out" * bool(left_out))
        if split.source.note:
            console.say(f"{split.name}: {split.source.note}")
        counts = np.array(count_classes(split.labels[split.ids], selection.num_classes))
        empty = [selection.class_name(number) for number in np.flatnonzero(counts == 0).tolist()]
        if empty:
            console.say(f"warning: {split.name} has no record of {plural(len(empty), 'class')}: {shorten(empty)}")
    base = selection.label_base
    console.say(f"{plural(selection.num_classes, 'class')}, labels from 1 (in the source from {base})")


def _require_space(out: Path, left: Sequence[Task], encoding: Encoding, classes: Sequence[str]) -> None:
    """Raises Failure(NOT_WRITTEN) where the file system of --out has less room than the shards to be written need."""
    free = shutil.disk_usage(out).free
    splits = {task.split.name: task.split for task in left}.values()
    lengths = [split.origin.lengths[split.ids].astype(np.int64) for split in splits]
    if all(each.all() for each in lengths) and free - _MARGIN_BYTES > _AMPLE * sum(int(each.sum()) for each in lengths):
        return
    needed = sum(
        _estimate_bytes(split, sum(len(task.ids) for task in left if task.split is split), encoding, classes)
        for split in splits
    )
    if left and needed + _MARGIN_BYTES > free:
        text = f"about {format_bytes(needed)} are to be written to {out}, where {format_bytes(free)} are free"
        raise Failure(NOT_WRITTEN, f"{text}: make room, or choose another --out. {_GOES_ON}")


def _estimate_bytes(split: Split, records: int, encoding: Encoding, classes: Sequence[str]) -> int:
    """Returns about how many bytes `records` of a split take: from their lengths, or from a sample of them."""
    lengths = split.origin.lengths[split.ids]
    if lengths.all() and not encoding.shorter_side:
        return int((lengths.mean(dtype=np.float64) + _FEATURES_BYTES) * records)
    sizes = []
    for record in spread_ids(split.ids, _SAMPLED):
        try:
            sizes.append(sum(map(len, shard_writer.encode_record(split, record, encoding, classes)[0])))
        except ValueError:  # it will be refused
            continue
    return int(np.mean(sizes or [0]) * records)


def _write(
    out: Path,
    left: Sequence[Task],
    encoding: Encoding,
    classes: Sequence[str],
    threads: int,
    ranks: Ranks,
    console: Console,
) -> List[Dict[str, Any]]:
    """Writes this rank's part of the shards that are left, a thread a shard; returns their notes. Collective."""
    mine = list(left[ranks.rank :: ranks.size])
    done, stop = [0] * len(mine), threading.Event()
    progress = console.progress("preparing", sum(len(task.ids) for task in left), "images")

    def write(number: int) -> Note:
        def count(records: int) -> None:
            done[number] = records  # each thread has a place of its own

        try:
            return write_shard(out, mine[number], encoding, classes, stop, count)
        except OSError as error:
            raise Failure(NOT_WRITTEN, f"{write_error(out / mine[number].name, error)}. {_GOES_ON}") from error

    with ThreadPoolExecutor(threads) as pool:
        writing = [pool.submit(write, number) for number in range(len(mine))]
        try:
            finished = False
            while not finished:
                wait(writing, _TURN_SECONDS, FIRST_EXCEPTION)
                ranks.together(lambda: _raise_first(writing))
                everyones = ranks.gather_json([sum(done), all(each.done() for each in writing)])
                progress.update(sum(count for count, _ in everyones))
                finished = all(ended for _, ended in everyones)
        finally:
            stop.set()
            for each in writing:
                each.cancel()
    return [each.result().dump() for each in writing]


def _raise_first(writing: Sequence["Future[Note]"]) -> None:
    for each in writing:
        if each.done() and each.exception() is not None and not isinstance(each.exception(), Stopped):
            each.result()


def _finish(
    config: PrepareConfig, out: Path, plan: Dict[str, Any], selection: Selection, notes: Sequence[Sequence[Note]]
) -> str:
    """Writes lists, names and manifest, and removes OUT/.prepare; returns what to say.

    Raises Failure(DATA) where more records were refused than may be, or a shard would be empty.
    """
    everything = [note for of_split in notes for note in of_split]
    refused, converted = (
        list(itertools.chain(*(getattr(note, kind) for note in everything))) for kind in ("refused", "converted")
    )
    try:
        for name, rows in ((REFUSED, refused), (CONVERTED, converted)):
            if rows:
                write_text(out, name, "".join(json.dumps(row) + "\n" for row in rows))
        if selection.classes:
            write_text(out, CLASSES, "".join(f"{name}\n" for name in selection.classes))
        _require_few_refused(config, out, everything, refused)
        write_text(out, manifest.NAME, manifest.dump(_manifest(config, plan, selection, notes)))
        _remove_folder(out, {note.entry.name for note in everything})
    except OSError as error:
        raise Failure(NOT_WRITTEN, f"{write_error(out, error)}. {_GOES_ON}") from error
    size, records = (sum(getattr(note.entry, name) for note in everything) for name in ("bytes", "records"))
    resized = sum(note.resized for note in everything)
    text = (
        f"{plural(records, 'record', ',')} in {plural(len(everything), 'shard')}, {format_bytes(size)}, in {out.resolve()}"
    )
    text += f"; {plural(resized, 'image')} encoded anew" * bool(resized)
    text += f"; {plural(len(converted), 'image')} made RGB JPEG, listed in {CONVERTED}" * bool(converted)
    return text + f"; {plural(len(refused), 'record')} refused, listed in {REFUSED}" * bool(refused)


def _require_few_refused(config: PrepareConfig, out: Path, notes: Sequence[Note], refused: Sequence[Dict[str, Any]]) -> None:
    if len(refused) > config.bad_records_allowed:
        first = refused[0]
        raise Failure(
            DATA,
            f"data: {first['record']}: {first['reason']}. {plural(len(refused), 'record')} of this kind, listed in "
            f"{out / REFUSED}, cannot be used; all others are written. Repair the source and begin anew, or end the work "
            f"without them: the same command with --bad_records_allowed={len(refused)}",
        )
    empty = [note.entry.name for note in notes if not note.entry.records]
    if empty:
        raise data_failure(f"all records of {out / empty[0]} are refused, and it would be empty. Choose fewer shards")


def _manifest(
    config: PrepareConfig, plan: Dict[str, Any], selection: Selection, notes: Sequence[Sequence[Note]]
) -> Manifest:
    splits = {}
    for split, of_split in zip(selection.splits, notes):
        lost = np.array([row["label"] for note in of_split for row in note.refused], np.int64)
        counts = np.array(count_classes(split.labels[split.ids], selection.num_classes))
        counts -= np.array(count_classes(lost, selection.num_classes))
        entries = tuple(note.entry for note in of_split)
        splits[split.name] = SplitEntry(
            sum(entry.records for entry in entries),
            tuple(counts.tolist()),
            entries,
            sum(len(note.converted) for note in of_split),
            sum(note.resized for note in of_split),
            len(lost),
        )
    source = {"path": config.source, "layout": selection.splits[0].source.title, "sha256": plan["source"]}
    source["images"] = plan["images"]
    return Manifest(__version__, source, _flags(config), selection.classes, splits)


def _remove_folder(out: Path, shards: Set[str]) -> None:
    """Removes OUT/.prepare: the files that this command made, and the directory if nothing else is in it."""
    folder = out / FOLDER
    if not folder.is_dir():
        return
    own = {"plan.json", "lock", *(f"{name}.json" for name in shards)}
    for path in folder.iterdir():
        if path.name in own or shard_writer.is_half_written(path):
            with contextlib.suppress(FileNotFoundError):  # another job ends in this moment
                path.unlink()
    with contextlib.suppress(OSError):  # somebody else's file
        folder.rmdir()
