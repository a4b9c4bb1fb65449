"""The `predict` command: the likeliest classes of images, by any weights."""

import dataclasses
import itertools
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Sequence

import numpy as np

from hvd_vgg.config import PredictConfig
from hvd_vgg.data.image_files import ImageFiles, find_images, index_images
from hvd_vgg.data.loader import scoring_batches
from hvd_vgg.errors import DATA, NOT_WRITTEN, Failure
from hvd_vgg.models.vgg import Weights
from hvd_vgg.parallel import comm
from hvd_vgg.parallel.consensus import run_on_root
from hvd_vgg.parallel.init import Device
from hvd_vgg.reporting.table import Row, rounded, table_lines
from hvd_vgg.run_dir import atomic_write_lines, check_out, writing
from hvd_vgg.text import plural
from hvd_vgg.training.evaluate import gather_rows, make_eval_step, ranked_rows, score_batches
from hvd_vgg.training.names import known_names
from hvd_vgg.training.network import load_network
from hvd_vgg.training.startup import join_ranks
from hvd_vgg.watchdog import watchdog

_ROUND = 8  # batches of each rank after which what all have is gathered, and printed
_COLUMNS = ("path", "rank", "class", "name", "probability")  # of --out


class Round(NamedTuple):
    """Consecutive images: the rows of `ranked_rows` in order, and what is wrong with those that are none, by number."""

    rows: np.ndarray
    bad: Dict[int, str]


def predict(config: PredictConfig) -> None:
    """Prints the likeliest classes of each image, or writes --out, in the order in which they are given. Collective.

    Raises a collective Failure(DATA) at the end if files are no images; Failure(USAGE) where one is missing.
    """
    device, console, _ = join_ranks(config)
    weights = config.weights or config.run_dir
    if config.out:
        run_on_root(lambda: check_out(config.out, NOT_WRITTEN))
    names = run_on_root(lambda: known_names(Path(weights), config.num_classes, config.names_file)) or []
    files = ImageFiles(*comm.broadcast_json(run_on_root(lambda: find_images(config.images))))
    network, source = load_network(config, weights, config.average)
    console.say(source.text)
    for text in files.passed_over:
        console.say(f"passed over: {text}")

    kept: List[np.ndarray] = []
    passed_over, count = len(files.passed_over), len(files.paths)
    progress = console.progress("predicting", count, "images")
    for rows, bad in _predict_in_rounds(config, network, files, device):
        passed_over += len(bad)
        if config.out:
            kept.append(rows)
            progress.update(min(count, passed_over - len(files.passed_over) + sum(map(len, kept))))
            texts = [f"passed over: {_escaped(files.paths[image])}: {bad[image]}" for image in sorted(bad)]
        else:
            texts = list(_texts(rows, bad, files, names))
        for text in texts:
            console.say(text)

    def write() -> None:
        path = Path(config.out)
        with writing(path):
            table = (row for rows in kept for row in _table_rows(rows, files, names))
            lines = table_lines(path.suffix, table, _COLUMNS)
            atomic_write_lines(path, lines)

    if config.out:
        run_on_root(write)
        console.say(f"written: {config.out}, {plural(sum(map(len, kept)), 'image')}")
    if passed_over:
        every = plural(count + len(files.passed_over), "file")
        raise Failure(DATA, f"predict: {passed_over} of {every} passed over, see above: no images", collective=True)
    comm.shutdown()


def _predict_in_rounds(config: PredictConfig, network: Weights, files: ImageFiles, device: Device) -> Iterator[Round]:
    """Yields what all ranks predict, in order, a round of their batches at a time. Collective."""
    count, size = len(files.paths), comm.size()
    if not count:
        return
    # Of few images the batch has no more rows than there are; the same on any ranks, and so is what a batch computes.
    config = dataclasses.replace(config, device_batch=min(config.device_batch, count))
    eval_step = make_eval_step(network, config, device.data_format, config.top)
    batches = scoring_batches(index_images(files), config, 0, comm.rank(), size, device.input_threads, bad_allowed=count)
    scored = score_batches(eval_step, batches, device.micro_batches)
    for _ in range(-(-count // (config.device_batch * size * _ROUND))):
        mine, bad = [], []
        for batch, scores in itertools.islice(scored, _ROUND):
            mine.append(ranked_rows(batch, scores))
            bad += [(row.record, row.reason) for row in batch.bad]
            watchdog.heartbeat(phase="evaluation")
        rows = gather_rows(mine, min(config.top, config.num_classes))
        yield Round(rows, {image: reason for rank in comm.gather_json(bad) for image, reason in rank})


def _texts(rows: np.ndarray, bad: Dict[int, str], files: ImageFiles, names: Sequence[str]) -> Iterator[str]:
    """Yields lines for people about each image of a round, in order."""
    row_of = {int(row["record"]): row for row in rows}
    for image in sorted([*row_of, *bad]):
        yield _escaped(files.paths[image])
        if image in bad:
            yield f"  passed over: {bad[image]}"
            continue
        for number, probability in zip(row_of[image]["classes"].tolist(), row_of[image]["probabilities"].tolist()):
            yield f"  {probability:.4f}  class {number}  {names[number] if names else ''}".rstrip()


def _table_rows(rows: np.ndarray, files: ImageFiles, names: Sequence[str]) -> Iterator[Row]:
    """Yields the rows of --out of a round: path, rank from 1, class, its name, "" if unknown, probability."""
    for row in rows:
        path = _escaped(files.paths[int(row["record"])])
        best = zip(row["classes"].tolist(), row["probabilities"].tolist())
        for rank, (number, probability) in enumerate(best, start=1):
            name = names[number] if names else ""
            yield {"path": path, "rank": rank, "class": number, "name": name, "probability": rounded(probability)}


def _escaped(path: str) -> str:
    """Returns a path as text that stands for it alone: what is not printable, bytes that are no text, and \\ as escapes."""
    return "".join(each if each.isprintable() and each != "\\" else _escape(each) for each in path)


def _escape(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # as Python has a byte that is no text
        return f"\\x{number - 0xDC00:02x}"
    if 0x80 <= number <= 0xFF:  # \x would be a byte
        return f"\\u{number:04x}"
    return character.encode("unicode_escape").decode()
