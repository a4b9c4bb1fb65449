"""The same images in the same order are the same run, to the bit, whatever layout they lie in."""

import json
import shutil

import pytest
from oracles import losses
from support import TINY, Started, command_line, full

KINDS = {
    "tfds": "TFRecords of tensorflow-datasets",
    "webdataset": "tar shards of WebDataset",
    "folders": "a directory of images for each class",
}
# 18 records in batches of 8; the last evaluation is of all 9.
FLAGS = [*TINY, "--num_classes=3", "--width=0.0625", "--steps=5", "--global_batch=8", "--device_batch=4", "--augment=crop"]


def train(folder, data, ranks):
    """Returns what must be equal of a run from `data`, and what it printed."""
    folder.mkdir(exist_ok=True)
    flags = [f"--data_dir={data}", f"--run_dir={folder / 'run'}", *FLAGS]
    ended = Started(command_line(ranks, ["train", *flags]), folder).wait(code=0)
    result = json.loads((folder / "run" / "result.json").read_text())
    kept = [result[name] for name in ("state_sha256", "top1_hits", "top5_hits", "records_evaluated", "steps")]
    return [*kept, losses(folder / "run")], ended.out


@pytest.fixture(scope="module")
def from_tfrecords(tmp_path_factory, layouts):
    """The run from ImageNet's layout, without a launcher."""
    folder = tmp_path_factory.mktemp("tfrecords")
    found, printed = train(folder, layouts / "imagenet", 0)
    assert "TFRecords in ImageNet's layout (--data_format=imagenet); labels from 1" in printed
    assert (folder / "run" / "classes.txt").read_text().splitlines()[2] == "great white shark"
    first, *_, last = found[-1].values()
    assert found[3] == 9 and abs(first - last) > 1e-3  # else equal runs would show little
    return found


@pytest.mark.parametrize(
    ("ranks", "kind"),
    [  # tests/parallel has all of them on 3 ranks, in less time
        *full(
            (2, "folders"),
            (2, "tfds"),
            (2, "webdataset"),
            (2, "imagenet"),
            *((ranks, kind) for ranks in (1, 3) for kind in KINDS),
        ),
    ],
)
def test_every_layout_trains_to_the_same_bits(tmp_path, layouts, from_tfrecords, ranks, kind):
    found, printed = train(tmp_path, layouts / kind, ranks)
    assert found == from_tfrecords
    if kind in KINDS:
        assert f"{KINDS[kind]} (--data_format={kind}); labels from 0" in printed
    assert (tmp_path / "run" / "classes.txt").exists() == (kind != "webdataset")


@pytest.mark.fault(tier=3)
def test_evaluate_takes_no_other_classes_for_the_runs(launch, tmp_path, layouts):
    """A label is a place in the order of class directories, or counts from 0 or 1 by the layout: neither is guessed."""
    run = ["evaluate", f"--run_dir={tmp_path / 'run'}", "--checkpoint=newest"]
    train(tmp_path, layouts / "folders", 0)
    assert "great white shark" not in launch(0, *run, code=0).err  # as it was trained
    alone = tmp_path / "alone" / "val"
    shutil.copytree(layouts / "folders" / "val", alone)
    shutil.rmtree(min(alone.iterdir()))
    told = launch(0, *run, f"--data_dir={alone.parent}", code=65).err
    assert "val has 2 class directories, the run had 3" in told and "Put the run's train directory beside it" in told
    told = launch(0, *run, f"--data_dir={layouts / 'imagenet'}", code=65).err
    assert "the run was trained on a directory of images for each class" in told and "--label_base=1" in told
    launch(0, *run, f"--data_dir={layouts / 'imagenet'}", "--label_base=1", code=0)
