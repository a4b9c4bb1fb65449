"""What doctor concludes from the packages of SIMULATED hosts (tests/simulated.py): there is no vendor's software on them."""

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
    missing = ("cloudpickle", "mpi4py", "dllogger", "tensorflow")
    _, found = findings(iluvatar(tmp_path, missing=missing))
    bad = {finding.text: finding for finding in found if finding.verdict == FAILURE}
    assert "pip install --no-deps cloudpickle" in bad["cloudpickle is not installed"].fix
    assert "pip must install neither" in bad["not installed, or not on this Python's search path"].fix
    assert {finding.text for finding in found if finding.verdict == WARNING} == {"mpi4py is not installed"}
    assert "DLLogger is not installed: the same log lines are written without it" in [finding.text for finding in found]


def test_packages_horovod_built_for_another_tensorflow(tmp_path):
    """Whether it works is decided when it is imported."""
    _, found = findings(iluvatar(tmp_path, horovod="0.28.1", built_for="2.15.1"))
    texts = [finding.text for finding in found if finding.verdict == WARNING]
    assert texts[0].startswith("Horovod was built for TensorFlow 2.15.1, but 2.16.2+corex.4.3.0 is installed: it warns")
    assert texts[1] == "Horovod 0.28.1 is not the vendor's (+corex)"
    assert worst(found) == WARNING


def test_packages_of_unknown_versions(tmp_path):
    corex = {"tensorflow": "2.19.0+corex.4.3.0", "horovod": "0.26.1+corex.4.3.0", "built_for": "2.19.0"}
    _, found = findings(iluvatar(tmp_path, **corex))
    assert [finding.about for finding in found if finding.verdict == WARNING] == ["tensorflow", "horovod"]


def test_packages_that_tensorflow_requires(tmp_path):
    """The one public list of a vendor's packages lacks some of these."""
    requires = ["gast!=0.5.0,>=0.2.1", "h5py", "numpy<2", 'tensorflow-intel; platform_system == "Windows"']
    found = only(findings(iluvatar(tmp_path, requires=[*requires, "nvidia; extra == 'x'"]))[1], WARNING)
    assert found.text == "tensorflow requires gast, h5py: not installed"
    assert found.fix.startswith("pip install --no-deps gast h5py, if")


def test_packages_sdk_that_is_a_dangling_link(tmp_path):
    host = iluvatar(tmp_path)
    (tmp_path / "usr/local/corex").unlink()
    (tmp_path / "usr/local/corex").symlink_to("corex-9")
    accelerators, found = findings(host)
    assert accelerators.vendor == "Iluvatar"
    assert "a dangling link" in only(found, FAILURE).text


def test_packages_of_mixed_sdks_and_lost_variables(tmp_path):
    host = iluvatar(tmp_path, sdk="4.3.0", driver="4.4.0", tensorflow="2.16.2+corex.4.4.0", LD_LIBRARY_PATH="")
    assert {finding.text for finding in findings(host)[1] if finding.verdict == WARNING} == {
        "LD_LIBRARY_PATH does not contain /usr/local/corex/lib64",
        "TensorFlow was built for SDK 4.4.0, but /usr/local/corex is SDK 4.3.0",
        "/dev/itrctl is missing, which drivers since 4.4.0 have",
    }
