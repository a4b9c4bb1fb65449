"""The numbers are of this machine's CPU; what a GPU that computes wrong would leave is made up here (no device is)."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from hvd_vgg.doctor.collectives import Exchanged, assess_exchange, assess_pairs, check_transports, expected_sum, pattern
from hvd_vgg.doctor.device_test import BOUNDS, assess_errors, check_devices, convolve
from hvd_vgg.parallel.init import cpu_convolves
from hvd_vgg.reporting.findings import FAILURE, OK, WARNING

RIGHT = {f"{dtype}{layout}": 1e-7 for dtype in BOUNDS for layout in ("", " NHWC", " NCHW")}


def verdicts(kind, found, failed, precision="float32"):
    return [finding.verdict for finding in assess_errors("it", kind, found, failed, precision)]


def test_this_cpu_is_right():
    *others, found = check_devices(tf.config.list_logical_devices("CPU")[:1], "float32", 0)
    assert found.verdict == OK
    assert "multiplies right in float32, float16, bfloat16, convolves right in" in found.text
    assert "in NHWC in float32" in found.text
    # What TensorFlow 2.6 cannot do on a CPU is told, and no failure for training in float32.
    assert [other.text.split(":")[1] for other in others] == [" bfloat16 NHWC"] * (not cpu_convolves("bfloat16"))
    assert all(other.verdict == WARNING for other in others)


def test_the_reference_is_the_convolution_that_tensorflow_defines():
    random = np.random.default_rng(2)
    image, kernel = random.standard_normal((2, 5, 7, 3)), random.standard_normal((3, 3, 3, 4))
    assert np.allclose(convolve(image, kernel), tf.nn.conv2d(image, kernel, 1, "SAME"), atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "change", "failed", "precision", "expected"),
    [
        ("GPU", {}, {}, "float32", [OK]),
        ("GPU", {"float32": 1.0}, {}, "float32", [FAILURE, OK]),  # all zeros
        ("GPU", {"float32 NCHW": float("nan")}, {}, "float32", [FAILURE, OK]),
        ("GPU", {"float32 NHWC": 0.5}, {}, "float32", [WARNING, OK]),
        ("GPU", {"float32": 4e-4}, {}, "float32", [WARNING, OK]),  # TF32
        ("GPU", {}, {"bfloat16": "not implemented"}, "float32", [WARNING, OK]),
        ("GPU", {}, {"bfloat16": "not implemented"}, "bfloat16", [FAILURE, OK]),
        ("GPU", {}, {"float32": "error 801"}, "float32", [FAILURE, OK]),
        ("CPU", {}, {"float32 NCHW": "only NHWC"}, "float32", [OK]),
        ("CPU", {"float32 NHWC": 1.0}, {}, "float32", [FAILURE, OK]),
    ],
)
def test_what_training_needs_decides(kind, change, failed, precision, expected):
    found = {name: error for name, error in {**RIGHT, **change}.items() if name not in failed}
    assert verdicts(kind, found, failed, precision) == expected


def test_a_device_on_which_everything_fails_has_nothing_right():
    assert set(verdicts("GPU", {}, dict.fromkeys(RIGHT, "error 801"))) == {FAILURE, WARNING}


def test_sixteen_devices_are_all_tried():
    """Logical devices of this CPU: what TensorFlow computes on each is real, that they are 16 is not."""
    program = (
        "import tensorflow as tf\n"
        "from hvd_vgg.run import devices\n"
        "cpu = tf.config.list_physical_devices('CPU')[0]\n"
        "tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 16)\n"
        "found = devices.check_devices(tf.config.list_logical_devices('CPU'), 'float32', 0)\n"
        "print(*(finding.text.split(' ', 2)[1] for finding in found if finding.verdict == 'ok'))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert ended.stdout.split() == [str(number) for number in range(16)], ended.stderr


def test_copies_through_the_host_are_told():
    (told,) = check_transports("/device:GPU:0", {"sums": "mpi", "gathers": "mpi"})
    assert (told.verdict, told.text.startswith("sums and gathers of a device are not exchanged by NCCL")) == (WARNING, True)
    (told,) = check_transports("/device:GPU:0", {"sums": "NCCL", "gathers": "mpi"})
    assert told.text.startswith("gathers of a device are not exchanged by NCCL")
    assert check_transports("/device:GPU:0", {"sums": "NCCL", "gathers": "NCCL"}) == []
    assert check_transports("/device:CPU:0", {"sums": "mpi", "gathers": "mpi"}) == []


@pytest.mark.parametrize(
    ("sent_mb", "seconds", "gbit", "device", "verdict", "told"),
    [
        (537.2, 0.7, 0.0, "/device:CPU:0", OK, "`plan` takes what stays inside a host for nothing"),
        (537.2, 0.7, 0.0, "/device:GPU:0", WARNING, "less than half of what four lanes of PCI Express 3.0 carry"),
        (968.0, 0.03, 0.0, "/device:GPU:0", OK, "for nothing"),
        (0.1, 0.0017, 10.0, "/device:CPU:0", OK, "assumes 8e-05 s, and its messages wait up to 0.01 s"),
        (0.1, 0.5, 10.0, "/device:CPU:0", WARNING, "assumes 8e-05 s"),
        (537.2, 0.45, 10.0, "/device:CPU:0", OK, "assumes 0.43 s"),
        (537.2, 2.0, 10.0, "/device:CPU:0", WARNING, "assumes 0.43 s"),
        (537.2, 2.0, None, "/device:CPU:0", OK, "for `plan`: --gbit=2.15"),
    ],
)
def test_the_time_of_an_exchange_is_judged(sent_mb, seconds, gbit, device, verdict, told):
    one = Exchanged("sums by mpi", sent_mb * 1e6, seconds, 0.01)
    found = assess_exchange(one, gbit, device)
    assert (found.verdict, told in found.text) == (verdict, True), found
    # Of messages that are too short nobody learns a link's rate.
    assert ("--gbit=" in found.fix) == (verdict == WARNING and bool(gbit) and sent_mb > 16)
    short = assess_exchange(one._replace(sent_bytes=1e5), None, device)
    assert "--gbit" not in short.text


def test_a_host_whose_link_is_slow_is_named():
    """Hosts in a ring: 2's link is slow, so that both its pairs are."""
    rates = {("1", "2"): 1.0, ("2", "3"): 1.1, ("3", "4"): 9.0, ("4", "1"): 8.0}
    (told,) = assess_pairs(rates, "mpi")
    assert told.verdict == WARNING
    assert told.text.startswith("between hosts by mpi, from memory of the CPU, each way 9 Gbit/s (3 and 4) to 1 (1 and 2); ")
    assert told.text.endswith("less than half of the fastest: 1 and 2, 2 and 3")
    assert told.fix.startswith("see the link of 2: ")
    (told,) = assess_pairs({**rates, ("1", "2"): 7.0}, "mpi")
    assert told.fix.startswith("see the link of these hosts: ")
    assert assess_pairs(dict.fromkeys(rates, 5.0), "mpi")[0].verdict == OK
    assert assess_pairs({("1", "2"): 5.0}, "mpi")[0].text.endswith("each way 5 Gbit/s")


def test_patterns_differ_by_rank_and_place_and_their_sums_are_exact():
    one, two = pattern(1000, 0), pattern(1000, 1)
    assert not np.array_equal(one, two)
    assert not np.array_equal(one[:-1], one[1:])
    assert np.array_equal(expected_sum(1000, 2), one + two)
    assert np.abs(expected_sum(1000, 400)).max() <= 2048
    assert np.array_equal(one, np.round(one))
