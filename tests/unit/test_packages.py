"""What doctor concludes from the packages of SIMULATED hosts (tests/simulated.py): no vendor's software is on them."""

import sys

import pytest
from simulated import findings, iluvatar, only, write_packages

from hvd_vgg.doctor.packages import HostView
from hvd_vgg.reporting.findings import FAILURE, OK, WARNING, worst


def test_packages_of_a_host_without_a_vendor(tmp_path):
    packages = write_packages(tmp_path, {"tensorflow": "2.16.2", "horovod": "0.28.1"})
    accelerators, found = findings(HostView(tmp_path, {"PATH": ""}, [packages]))
    assert accelerators.vendor == "CPU"
    assert worst(found) == OK


def test_packages_tensorflow_is_not_the_vendors(tmp_path):
    """The finding says where the vendor's is."""
    own = write_packages(tmp_path / "venv", {"tensorflow": "2.16.2", "horovod": "0.28.1"}, built_for="2.16.2")
    accelerators, found = findings(iluvatar(tmp_path)._replace(path=[own]))
    assert accelerators.vendor == "Iluvatar"
    bad = only(found, FAILURE)
    assert "TensorFlow 2.16.2 is not the vendor's" in bad.text
    assert "mpirun -x PYTHONPATH" in bad.fix


def test_packages_missing(tmp_path):
    _, found = findings(iluvatar(tmp_path, missing=("cloudpickle", "mpi4py", "dllogger", "tensorflow")))
    bad = {finding.text: finding for finding in found if finding.verdict == FAILURE}
    assert "pip install --no-deps cloudpickle" in bad["cloudpickle is not installed"].fix
    fix = bad["not installed, or not on this Python's search path"].fix
    assert "pip must install neither" in fix and "--build-arg=COREX_WHEELS" in fix
    assert "ask the vendor for the wheel tensorflow-...+corex.4.3.0-cp{}{} ".format(*sys.version_info) in fix
    assert {finding.text for finding in found if finding.verdict == WARNING} == {"mpi4py is not installed"}


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        (
            {"horovod": "0.28.1", "built_for": "2.15.1"},  # whether it works is decided when it is imported
            [
                "Horovod was built for TensorFlow 2.15.1, but 2.16.2+corex.4.3.0 is installed: it warns, and may not load",
                "Horovod 0.28.1 is not the vendor's (+corex)",
            ],
        ),
        (
            {"tensorflow": "2.22.0+corex.4.3.0", "horovod": "0.26.1+corex.4.3.0", "built_for": "2.22.0"},
            ["2.22.0+corex.4.3.0 is not known to work", "0.26.1+corex.4.3.0 is not known to work"],
        ),
        (
            {"sdk": "4.3.0", "driver": "4.4.0", "tensorflow": "2.16.2+corex.4.4.0", "LD_LIBRARY_PATH": ""},
            [
                "LD_LIBRARY_PATH does not contain /usr/local/corex/lib64",
                "TensorFlow was built for SDK 4.4.0, but /usr/local/corex is SDK 4.3.0",
                "/dev/itrctl is missing, which drivers since 4.4.0 have",
            ],
        ),
    ],
)
def test_packages_that_hardly_fit(tmp_path, host, expected):
    found = findings(iluvatar(tmp_path, **host))[1]
    assert worst(found) == WARNING
    assert [finding.text for finding in found if finding.verdict == WARNING] == expected


def test_packages_sdk_that_is_a_dangling_link(tmp_path):
    host = iluvatar(tmp_path)
    (tmp_path / "usr/local/corex").unlink()
    (tmp_path / "usr/local/corex").symlink_to("corex-9")
    accelerators, found = findings(host)
    assert accelerators.vendor == "Iluvatar"
    assert "a dangling link" in only(found, FAILURE).text


def test_packages_tensorflow_of_user_before_the_vendors(tmp_path):
    """As in ~/.local: doctor says which is imported, by its version and folder, and which is not."""
    own = write_packages(tmp_path / "local", {"tensorflow": "2.18.0", "horovod": "0.28.1"})
    host = iluvatar(tmp_path)
    texts = [finding.text for finding in findings(host._replace(path=[own, own, *host.path]))[1]]
    assert f"2.18.0, in {own}" in texts
    assert f"{own} is where it is imported from; {host.path[0]} has one too" in texts
    assert not [text for text in (finding.text for finding in findings(host)[1]) if "has one too" in text]


@pytest.mark.parametrize("libraries", [("libnccl.so.2",), ("libixccl.so",), ("libixccl.so.1", "libnccl.so.2.24.3")])
def test_packages_collective_library_by_either_name(tmp_path, libraries):
    found = findings(iluvatar(tmp_path, libraries=libraries))[1]
    assert worst(found) == OK
    assert f"collective library: {', '.join(sorted(libraries))}" in [finding.text for finding in found]


def test_packages_without_collective_library(tmp_path):
    bad = only(findings(iluvatar(tmp_path, libraries=()))[1], WARNING)
    assert bad.text == "no collective library: /usr/local/corex/lib64 has neither libnccl.so.2 nor libixccl.so"


@pytest.mark.parametrize("sdk", ["4.4.0", "4.5.0", "4.5.0.20260419", "4.5.0rc11"])
def test_packages_of_newer_sdks(tmp_path, sdk):
    """Of dated builds and candidates too, with the variable that their containers have."""
    versions = {"tensorflow": f"2.16.2+corex.{sdk}", "horovod": f"0.27.0+corex.{sdk}"}
    host = iluvatar(tmp_path, sdk=sdk[:5], driver=sdk[:5], COREX_VISIBLE_DEVICES="all", **versions)
    (tmp_path / "dev/itrctl").touch()
    found = findings(host)[1]
    assert worst(found) == OK
    assert "COREX_VISIBLE_DEVICES=all" in [finding.text for finding in found]
