"""--metrics_file: the text format as Prometheus defines it, and files that cannot be written."""

import errno
import os
import re
import stat
from pathlib import Path

import pytest
from prometheus_text import parse

from hvd_vgg.reporting.goodput import Goodput
from hvd_vgg.reporting.prometheus import FAMILIES, MetricsFile
from hvd_vgg.reporting.receipt import LogLine


def line(kind, step, **data):
    return LogLine(0, kind, {}, 0, step, data, 1e9 + step, 1e9)


def updates(step, loss):
    row = {"train.loss": loss, "train.lr": 0.01, "train.fps": 812.5, "train.update_seconds": [0.5, 0.5]}
    return line("train", step, **row, **{"train.input_shares": [0.25, 0.5], "train.exchange_shares": [0.5, 0.0]})


@pytest.mark.parametrize(("loss", "run"), [(2.5, "/runs/a"), (float("nan"), 'a "b"\\c\nd'), (float("inf"), "é")])
def test_metrics_file_is_in_prometheus_format(tmp_path, loss, run):
    path, said = tmp_path / "a.prom", []
    metrics = MetricsFile(path, run, Goodput(), said.append)
    for each in (line("start", 0, process_seconds=2.0), updates(2, 9.0), line("start", 2), updates(4, loss)):
        metrics.add(each)
    metrics.add(line("checkpoint", 4))
    metrics.add(line("evaluation", 4, **{"eval.acc@1": 0.5}))
    samples = parse(path.read_text())
    escaped = run.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    whole = {name[len("hvd_vgg_") :]: value for (name, labels), value in samples.items() if len(labels) == 1}
    assert {labels for _, labels in samples if len(labels) == 1} == {(("run", escaped),)}
    assert whole.pop("loss") == pytest.approx(loss, nan_ok=True)
    assert 0 <= whole.pop("checkpoint_age_seconds") < 60
    assert whole == {
        "step": 4,
        "learning_rate": 0.01,
        "accuracy_ratio": 0.5,
        "images_per_second": 812.5,
        "checkpoint_step": 4,
        "goodput_ratio": pytest.approx(2 / 6),
        "restarts_total": 1,
    }
    ranks = {(name, labels[1]): value for (name, labels), value in samples.items() if len(labels) == 2}
    expected = {"input": (0.25, 0.5), "compute": (0.25, 0.5), "exchange": (0.5, 0.0)}
    for part, shares in expected.items():
        assert [ranks.pop((f"hvd_vgg_{part}_ratio", ("rank", str(rank)))) for rank in (0, 1)] == list(shares)
    assert not ranks and not said
    assert [each.name for each in tmp_path.iterdir()] == ["a.prom"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644  # the exporter is another user


def test_metrics_file_knows_the_checkpoint_of_an_earlier_start(tmp_path):
    metrics = MetricsFile(tmp_path / "a.prom", "a", Goodput(), print, saved=(40, 500.0))
    metrics.add(updates(42, 1.0))
    samples = {name: value for (name, _), value in parse((tmp_path / "a.prom").read_text()).items()}
    assert samples["hvd_vgg_checkpoint_step"] == 40
    assert 500 <= samples["hvd_vgg_checkpoint_age_seconds"] < 560


def test_metrics_names_end_in_their_units():
    """Prometheus' conventions: base units, _ratio for shares, _total for counters and for these alone."""
    for name, (kind, text) in FAMILIES.items():
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", name) and text.endswith(".")
        assert name.endswith("_total") == (kind == "counter")
        assert not re.search("minutes|percent|milli|_share", name)


def test_metrics_file_that_cannot_be_written_is_reported_once(tmp_path):
    """The directory is missing, and there later."""
    path, said = tmp_path / "none" / "a.prom", []
    metrics = MetricsFile(path, "a", Goodput(), said.append)
    for step in (2, 4):
        metrics.add(updates(step, 1.0))
    (message,) = said
    assert message.startswith(f"--metrics_file: {path} cannot be written: No such file or directory")
    path.parent.mkdir()
    metrics.add(updates(6, 1.0))
    assert len(parse(path.read_text())) > 6 and len(said) == 1


def test_metrics_file_where_there_are_no_modes(tmp_path, monkeypatch):
    """CIFS and vfat refuse chmod, and some file systems to rename over a file that somebody has open."""
    path, said = tmp_path / "a.prom", []

    def refused(number):
        def call(*arguments):
            raise OSError(number, os.strerror(number))

        return call

    monkeypatch.setattr(os, "fchmod", refused(errno.EPERM))
    metrics = MetricsFile(path, "a", Goodput(), said.append)
    metrics.add(updates(2, 1.0))
    assert len(parse(path.read_text())) > 6
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda old, new: (refused(errno.EBUSY) if new.exists() else replace)(old, new))
    metrics.add(updates(4, 1.0))
    (step,) = [value for (name, _), value in parse(path.read_text()).items() if name == "hvd_vgg_step"]
    assert step == 4 and not said and [each.name for each in tmp_path.iterdir()] == ["a.prom"]
