"""Numbers are from this machine's CPU; what a GPU that computes wrong would give is made up (no device is)."""

import numpy as np
import pytest
import tensorflow as tf

from hvd_vgg.doctor.collectives import Exchange, assess_exchange, assess_pairs, assess_transports, expected_sum, pattern
from hvd_vgg.doctor.device_test import BOUNDS, assess_errors, check_computation, convolve
from hvd_vgg.parallel.init import cpu_convolves
from hvd_vgg.reporting.findings import FAILURE, OK, WARNING

EXACT = {f"{dtype} {name}": 1e-7 for dtype in BOUNDS for name in ("matmul", "conv2d NHWC", "conv2d NCHW")}


def test_computation_on_this_cpu_is_correct():
    """A process without a launcher tries all devices, and numbers them: here one twice."""
    (cpu,) = tf.config.list_logical_devices("CPU")[:1]
    *others, first, second = sorted(check_computation([cpu, cpu], "float32", 0), key=lambda finding: finding.verdict == OK)
    assert first == second
    assert first.verdict == OK
    assert first.text.startswith("CPU 0 allocates; correct: float32 matmul, float32 conv2d NHWC, ")  # NCHW: not by all
    # What TensorFlow 2.6 cannot do on a CPU is a warning, as training in float32 does not need it.
    assert [other.text.split(":")[1] for other in others] == [" bfloat16 conv2d NHWC"] * 2 * (not cpu_convolves("bfloat16"))
    assert all(other.verdict == WARNING for other in others)


def test_convolve_equals_tensorflow():
    random = np.random.default_rng(2)
    image, kernel = random.standard_normal((2, 5, 7, 3)), random.standard_normal((3, 3, 3, 4))
    assert np.allclose(convolve(image, kernel), tf.nn.conv2d(image, kernel, 1, "SAME"), atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "change", "failed", "precision", "expected"),
    [
        ("GPU", {}, {}, "float32", [OK]),
        ("GPU", {"float32 matmul": 1.0}, {}, "float32", [FAILURE, OK]),  # all zeros
        ("GPU", {"float32 conv2d NCHW": float("nan")}, {}, "float32", [FAILURE, OK]),
        ("GPU", {"float32 conv2d NHWC": 0.5}, {}, "float32", [WARNING, OK]),
        ("GPU", {"float32 matmul": 4e-4}, {}, "float32", [WARNING, OK]),  # TF32
        ("GPU", {}, {"bfloat16 matmul": "not implemented"}, "float32", [WARNING, OK]),
        ("GPU", {}, {"bfloat16 matmul": "not implemented"}, "bfloat16", [FAILURE, OK]),
        ("CPU", {}, {"float32 conv2d NCHW": "only NHWC"}, "float32", [OK]),
        ("CPU", {"float32 conv2d NHWC": 1.0}, {}, "float32", [FAILURE, OK]),
    ],
)
def test_errors_matter_where_training_needs_it(kind, change, failed, precision, expected):
    errors = {name: error for name, error in {**EXACT, **change}.items() if name not in failed}
    assert [finding.verdict for finding in assess_errors("it", kind, errors, failed, precision)] == expected


def test_errors_of_a_device_on_which_all_fails():
    found = assess_errors("it", "GPU", {}, dict.fromkeys(EXACT, "error 801"), "float32")
    assert {finding.verdict for finding in found} == {FAILURE, WARNING}


def test_transports_through_the_host_are_a_warning():
    (found,) = assess_transports({"sums": "mpi", "gathers": "mpi"}, "/device:GPU:0")
    assert found.verdict == WARNING
    assert found.text.startswith("sums and gathers of device tensors are not exchanged by NCCL")
    (found,) = assess_transports({"sums": "NCCL", "gathers": "mpi"}, "/device:GPU:0")
    assert found.text.startswith("gathers of device tensors are not exchanged by NCCL")
    assert assess_transports({"sums": "NCCL", "gathers": "NCCL"}, "/device:GPU:0") == []
    assert assess_transports({"sums": "mpi", "gathers": "mpi"}, "/device:CPU:0") == []


@pytest.mark.parametrize(
    ("sent_mb", "seconds", "gbit", "device", "verdict", "text"),
    [
        (537.2, 0.7, None, "/device:CPU:0", OK, "`plan` neglects traffic inside a host"),
        (537.2, 0.7, None, "/device:GPU:0", WARNING, "less than half of what four lanes of PCI Express 3.0 carry"),
        (968.0, 0.03, None, "/device:GPU:0", OK, "inside a host"),
        (0.1, 0.0017, 10.0, "/device:CPU:0", OK, "assumes 8e-05 s; latencies add up to 0.01 s"),
        (0.1, 0.5, 10.0, "/device:CPU:0", WARNING, "assumes 8e-05 s"),
        (537.2, 0.45, 10.0, "/device:CPU:0", OK, "assumes 0.43 s"),
        (537.2, 2.0, 10.0, "/device:CPU:0", WARNING, "assumes 0.43 s"),
        (537.2, 2.0, 0.0, "/device:CPU:0", OK, "for `plan`: --gbit=2.15"),
    ],
)
def test_exchange_time_is_compared_with_plan(sent_mb, seconds, gbit, device, verdict, text):
    one = Exchange("sums by mpi", sent_mb * 1e6, 10, seconds, [])
    found = assess_exchange("link", one, 0.001, gbit, device)
    assert (found.verdict, text in found.text) == (verdict, True), found
    # Messages that are too short show no rate.
    assert ("for `plan`: --gbit=" in found.text) == (gbit is not None and sent_mb > 16)
    assert "--gbit" not in assess_exchange("link", one._replace(sent_bytes=1e5), 0.001, 0.0, device).text


def test_pairs_name_the_host_with_a_slow_link():
    """In a ring of hosts 2's link is slow, and so both of its pairs."""
    rates = {("1", "2"): 1.0, ("2", "3"): 1.1, ("3", "4"): 9.0, ("4", "1"): 8.0}
    found = assess_pairs(rates, "mpi")
    assert found.verdict == WARNING
    assert found.text.startswith("between hosts by mpi, from CPU memory, each way 9 Gbit/s (3 and 4) to 1 (1 and 2); ")
    assert found.text.endswith("less than half of the fastest: 1 and 2, 2 and 3")
    assert found.fix.startswith("check the link of 2: ")
    assert assess_pairs({**rates, ("1", "2"): 7.0}, "mpi").fix.startswith("check the link of these hosts: ")
    assert assess_pairs(dict.fromkeys(rates, 5.0), "mpi").verdict == OK
    assert assess_pairs({("1", "2"): 5.0}, "mpi").text.endswith("each way 5 Gbit/s")


def test_pattern_differs_by_rank_and_place():
    """Its sums over 400 ranks are exact in float16, which holds whole numbers to 2048."""
    one, two = pattern(1000, 0), pattern(1000, 1)
    assert not np.array_equal(one, two)
    assert not np.array_equal(one[:-1], one[1:])
    assert np.array_equal(expected_sum(1000, 2), one + two)
    assert np.abs(expected_sum(1000, 400)).max() <= 2048
    assert np.array_equal(one, np.round(one))
