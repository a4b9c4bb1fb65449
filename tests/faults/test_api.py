"""Training from Python: `hvd_vgg.train(config)` is the command."""

import json
import sys
import textwrap

from support import TINY

PROGRAM = """
    import os
    import signal
    import sys
    import hvd_vgg
    from hvd_vgg.config import TrainConfig
    from hvd_vgg.errors import Failure

    try:
        hvd_vgg.train(TrainConfig(width=-1.0))
    except Failure as failure:
        assert failure.code == 64 and "--width=-1: expected more than 0" in failure.message
    config = dict(num_classes=10, image_size=32, model="vgg11", width=0.125, global_batch=32, lr=0.05, steps=3)
    config.update(device_batch=8, lr_schedule="constant", eval_every_epochs=0.0, save_every_steps=0, log_every_steps=1)
    for wrong in (dict(steps="10"), dict(lr_step_epochs=[30.0])):
        try:
            hvd_vgg.train(TrainConfig(**wrong))
        except Failure as failure:
            assert failure.code == 64 and "expected" in failure.message
    rows = []

    def tracker(row):
        rows.append(row)
        if row["kind"] == "end":
            raise ValueError("the tracker is away")

    numbers, rang = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM), []
    signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    handlers = [signal.getsignal(each) for each in numbers]
    try:
        hvd_vgg.train(TrainConfig(data_dir=sys.argv[1], run_dir="python", **config), on_log=tracker)
    except Failure as failure:
        sys.exit(failure.code)
    root = os.environ["OMPI_COMM_WORLD_RANK"] == "0"
    expected = [*[("train", step) for step in (1, 2, 3)], ("evaluation", 3), ("end", None)]
    assert [(row["kind"], row.get("step")) for row in rows] == root * expected
    assert all(isinstance(row["train.loss"], float) and row["epoch"] >= 0 for row in rows if row["kind"] == "train")
    assert not root or rows[-1]["eval.records"] == 37
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0  # nothing ends this process later
    assert handlers == [signal.getsignal(each) for each in numbers]
    os.kill(os.getpid(), signal.SIGALRM)  # whose handler is the watchdog's meanwhile, behind Python's back
    assert rang == [1]
"""


def test_train_from_python_equals_the_command(launch, data, tmp_path):
    """On 2 ranks, to the last bit; illegal fields are refused, and the process is its own again afterwards."""
    program = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(data)]
    ended = launch(2, program=program, code=0)
    assert ended.out.count("on_log=tracker raised ValueError: the tracker is away (at end): it is not called again") == 1
    assert launch(2, "train", f"--data_dir={data}", "--run_dir=command", "--steps=3", *TINY).code == 0
    found, expected = (
        (tmp_path / name / "checkpoints" / "step-00000003.safetensors").read_bytes() for name in ("python", "command")
    )
    start = 8 + int.from_bytes(expected[:8], "little")
    assert found[-len(expected) + start :] == expected[start:]
    assert json.loads((tmp_path / "python" / "result.json").read_text())["steps"] == 3


def test_train_from_python_raises_a_failure_with_its_code(launch, tmp_path):
    """Data that are missing: 65, one message, no traceback."""
    ended = launch(2, program=[sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path / "none")])
    assert ended.code == 65
    assert ended.err.count("none is not a directory") == 1
    assert "Traceback" not in ended.err
