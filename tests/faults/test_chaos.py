"""A run that is disturbed until it ends (F15)."""

import sys

import pytest
from support import ROOT, Started


@pytest.mark.fault("F15", tier=3)
@pytest.mark.timeout(2400)
def test_chaos_of_twenty_random_faults_changes_nothing(tmp_path, data):
    """benchmarks/chaos.py fails unless the final weights are those of the undisturbed run, and says its seed."""
    program = [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), f"--data_dir={data}", "--faults=20"]
    ended = Started(program, tmp_path, PYTHONPATH=str(ROOT)).wait(2300)
    assert ended.code == 0, ended.out + ended.err
    assert "| faults | 20 |" in ended.out
