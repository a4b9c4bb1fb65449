"""What is kept of a step that was not finite, without ranks; the rest is in tests/faults/test_nonfinite.py."""

import numpy as np
from support import TINY, order_of_writes

from hvd_vgg.config import TrainConfig
from hvd_vgg.data.formats.layout import find_shards
from hvd_vgg.data.index import join, scan_shard
from hvd_vgg.flags import parse_flags
from hvd_vgg.run_dir import RunDir
from hvd_vgg.training.dataset import Splits
from hvd_vgg.training.kept_step import save_step
from hvd_vgg.training.state import initial_state


def test_kept_step_report_is_on_disk_last(tmp_path, data, monkeypatch):
    """What a power cut leaves is either no report or one whose records, state and flags are there."""
    config = parse_flags(TrainConfig, [f"--data_dir={data}", f"--run_dir={tmp_path}", *TINY])
    paths = find_shards(str(data), "train")
    index = join(paths, [scan_shard(path) for path in paths])
    events = order_of_writes(monkeypatch)
    folder = RunDir(tmp_path).nonfinite_step(5)
    told = save_step(folder, {"step": 5}, initial_state(config), Splits(index, index, 1), np.arange(4), config)
    assert told == ""
    assert [name for what, name in events if what == "rename"] == ["state.safetensors", "flags.txt", "report.json"]
    assert ("fsync", "records-00000-of-00001") in events
    assert events[-2:] == [("fsync", "report.json.tmp"), ("rename", "report.json")]
