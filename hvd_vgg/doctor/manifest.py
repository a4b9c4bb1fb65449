"""The manifest of a prepared data set: whether its shards have the digests that they were written with."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import List, Mapping

from hvd_vgg.config import DataConfig
from hvd_vgg.data import manifest
from hvd_vgg.errors import Failure
from hvd_vgg.parallel import comm
from hvd_vgg.reporting.console import Console
from hvd_vgg.reporting.findings import Finding, failure, ok

_MOST_NAMED = 20  # shards that are named; the others are only counted


def check_digests(config: DataConfig, paths: Mapping[str, List[Path]], threads: int, console: Console) -> List[Finding]:
    """Returns what is found by reading every shard of both splits once and comparing its SHA-256. Collective.

    paths: the shards of each split, the same on all ranks. Nothing without a manifest.
    """
    folder = Path(config.data_dir)
    try:
        splits, damaged = (manifest.read(folder) or manifest.NONE).splits, ""
    except Failure as error:
        splits, damaged = manifest.NONE.splits, error.message
    if any(comm.gather_json(damaged)):  # ranks may have copies of their own
        return [failure("data", damaged, "restore or remove it")] if damaged else []
    shards = [(splits[split], path) for split in paths for path in paths[split] if split in splits]
    if not all(count == len(shards) for count in comm.gather_json(len(shards))):
        return [failure("data", f"{folder / manifest.NAME} is not the same on all ranks", "copy it to every host")]
    bad: List[str] = []
    block = int(comm.gather_numbers([threads]).min()) * comm.size()  # the same on all ranks, which meet after each
    progress = console.progress("comparing digests", len(shards), "shards")
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(shards), block):
            mine = shards[start + comm.rank() : start + block : comm.size()]
            bad += filter(None, pool.map(lambda shard: _wrong(*shard), mine))
            progress.update(min(start + block, len(shards)))
            comm.barrier()  # Horovod would consider a rank lost that waits until a slow one is done with all
    if not shards:
        return []
    found = [failure("data", text, "copy the shard again") for text in bad[:_MOST_NAMED]]
    if len(bad) > _MOST_NAMED:
        found.append(failure("data", f"and {len(bad) - _MOST_NAMED} more shards", "as above"))
    return found or [ok("data", f"all shards have the SHA-256 in {manifest.NAME}")]


def _wrong(entry: manifest.SplitEntry, path: Path) -> str:
    """Returns what is wrong with a shard; "" if nothing."""
    try:
        return next(iter(manifest.wrong_digests(entry, [path])), "").rpartition(". ")[0]
    except Failure as error:
        return error.message
