"""Whether a run is on track: the curve's value at an evaluation, and the one warning."""

import pytest

from hvd_vgg.config import TrainConfig
from hvd_vgg.reporting.console import Console
from hvd_vgg.reporting.log import RunLog
from hvd_vgg.reporting.receipt import read_log
from hvd_vgg.run_dir import RunDir
from hvd_vgg.training.evaluate import Evaluation, report_evaluation
from hvd_vgg.training.reference_curve import warn_if_far_below, with_reference
from hvd_vgg.training.reporter import Reporter

CURVE = "10:0.3,20:0.5,50:0.6"


def evaluation(top1):
    return Evaluation(top1=top1, top5=90, records=100, loss_sum=1.0, bad=0)


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(9.9, None), (10.0, 0.3), (12.5, 0.35), (20.02, 0.50007), (50.0, 0.6), (50.015, 0.6), (50.03, None), (80.0, None)],
)
def test_reference_is_on_the_lines_between_points(epoch, expected):
    """Nothing outside them; with 50 updates an epoch, the evaluation of epoch 50 may come at 50.015."""
    result = with_reference(evaluation(40), TrainConfig(reference_curve=CURVE), round(epoch * 50), epoch)
    assert result.reference == (expected and pytest.approx(expected, abs=1e-5))
    difference = result.metrics().get("eval.reference_difference")
    assert difference == (expected and pytest.approx(0.4 - expected, abs=1e-5))


def test_reference_without_a_curve_changes_nothing():
    result = evaluation(40)
    assert with_reference(result, TrainConfig(), 100, 2.0) is result
    assert "eval.reference_difference" not in result.metrics()


def test_reference_far_above_a_run_is_warned_of_once(tmp_path, capsys):
    """Not before a tenth of the curve, not for less than 0.05, and once over all starts of a run."""
    config = TrainConfig(reference_curve="2:0.4,30:0.5,50:0.6", run_dir=str(tmp_path))

    def start():
        return Reporter(RunLog(tmp_path, False, None), Console("lines", True))

    def judge(reporter, top1, epoch):
        result = with_reference(evaluation(top1), config, int(epoch * 50), epoch)
        report_evaluation(result, int(epoch * 50), epoch, reporter)
        warn_if_far_below(result, config, int(epoch * 50), epoch, reporter)
        return capsys.readouterr().out

    first = start()
    assert "reference 0.4071 (-0.4071)" in judge(first, 0, 4.0)
    assert "reference 0.5000 (-0.0400)" in judge(first, 46, 30.0)
    assert not [line for line in read_log(RunDir(tmp_path).log) if line.kind == "below_reference"]
    assert "warning: acc@1 is 0.0600 below --reference_curve at epoch 30.0" in judge(first, 44, 30.0)
    for reporter in (first, start()):
        assert "warning" not in judge(reporter, 10, 40.0)
    (line,) = [line for line in read_log(RunDir(tmp_path).log) if line.kind == "below_reference"]
    assert (line.step, line.data["acc@1"], line.data["reference"]) == (1500, 0.44, 0.5)
