"""What doctor concludes from SIMULATED hosts (tests/simulated.py): no vendor's device, driver or SDK is behind these."""

import pytest
import simulated

from hvd_vgg.doctor.driver import cards, check_devices, check_driver, listing
from hvd_vgg.doctor.packages import Host, check_python, check_tensorflow, vendor
from hvd_vgg.reporting.findings import FAILURE, OK, WARNING, worst


def findings(here, computed=False, cuda=""):
    """Returns the vendor and everything that host.py and accelerators.py find, as doctor asks for it."""
    whose, why = vendor(here)
    said = listing(here, whose)
    found = [
        *check_python(here),
        *check_tensorflow(here, whose),
        *check_devices(here, whose, said),
        *check_driver(here, whose, said, cuda, computed),
    ]
    return whose, why, found


def only(found, verdict):
    """Returns the one finding of a verdict."""
    (one,) = [finding for finding in found if finding.verdict == verdict]
    return one


def test_a_right_bi_v150_host_is_all_right_and_its_devices_are_two_a_card(tmp_path):
    whose, why, found = findings(simulated.iluvatar(tmp_path))
    assert whose == "Iluvatar"
    assert why == ["TensorFlow 2.16.2+corex.4.3.0", "/usr/local/corex", "16 /dev/iluvatar*", "ixsmi"]
    assert worst(found) == OK
    texts = [finding.text for finding in found]
    assert "16 Iluvatar BI-V150 of 32768 MiB: 8 cards if each shows as two devices, a rank each (16 in all)" in texts
    assert "Iluvatar 4.3.8, SDK 4.3.0, CUDA 10.2; the SDK's first two numbers are what it must have" in texts


def test_a_right_bi_v100_host_with_the_old_sdk_is_all_right_too(tmp_path):
    corex = {"sdk": "3.1.0", "driver": "3.1.0", "tensorflow": "2.6.5+corex.3.1.0", "horovod": "0.27.0+corex.3.1.0"}
    _, _, found = findings(simulated.iluvatar(tmp_path, ["Iluvatar BI-V100"] * 8, built_for="2.6.5", **corex))
    assert worst(found) == OK
    assert "8 Iluvatar BI-V100 of 32768 MiB" in [finding.text for finding in found]


def test_half_a_card_is_a_warning(tmp_path):
    """SIMULATED: 15 devices of eight cards, of which each shows as two."""
    here = simulated.iluvatar(tmp_path, names=("Iluvatar BI-V150",) * 15)
    (found,) = check_devices(here, "Iluvatar", listing(here, "Iluvatar"))
    assert found.verdict == WARNING
    assert "8 cards if each shows as two devices" in found.text
    assert found.text.endswith("an odd number: one device of a card is not there")


def test_cards_are_counted_by_name():
    assert cards(["Iluvatar BI-V150"] * 16) == 8
    assert cards(["Iluvatar BI-V150S"] * 8) == 8
    assert cards(["Iluvatar BI-V150 OAM"] * 3) == 2
    assert cards(["Iluvatar BI-V100", "Iluvatar BI-V150", "Iluvatar BI-V150"]) == 2


@pytest.mark.parametrize(
    ("driver", "sdk", "cuda", "told"),
    [
        ("3.2.3", "4.4.0", "10.2", "the driver is older than the SDK"),
        ("4.4.0", "4.5.0", "10.2", "the driver is older than the SDK"),
        ("4.4.0", "4.4.0", "N/A", "ixsmi does not know the CUDA version"),
    ],
)
def test_a_driver_that_does_not_fit_is_a_failure_unless_devices_computed_right(tmp_path, driver, sdk, cuda, told):
    here = simulated.iluvatar(
        tmp_path, driver=driver, sdk=sdk, cuda=cuda, tensorflow=f"2.16.2+corex.{sdk}", horovod=f"0.27.0+corex.{sdk}"
    )
    (tmp_path / "dev/itrctl").touch()
    bad = only(findings(here)[2], FAILURE)
    assert bad.about == "driver"
    assert told in bad.text
    assert f"the driver of SDK {sdk}" in bad.fix
    found = findings(here, computed=True)[2]
    assert worst(found) == WARNING
    assert only(found, WARNING).about == "driver"


def test_a_tensorflow_that_is_not_the_vendors_is_a_failure_that_tells_where_that_is(tmp_path):
    here = simulated.iluvatar(tmp_path)
    own = simulated.site(tmp_path / "venv", {"tensorflow": "2.16.2", "horovod": "0.28.1"}, built_for="2.16.2")
    whose, _, found = findings(here._replace(path=[own]))
    assert whose == "Iluvatar"
    bad = only(found, FAILURE)
    assert "TensorFlow 2.16.2 is not the vendor's" in bad.text
    assert "mpirun -x PYTHONPATH" in bad.fix


def test_missing_packages_are_failures_or_warnings_with_what_to_do(tmp_path):
    missing = ("cloudpickle", "mpi4py", "dllogger", "tensorflow")
    _, _, found = findings(simulated.iluvatar(tmp_path, missing=missing))
    bad = {finding.text: finding for finding in found if finding.verdict == FAILURE}
    assert "pip install --no-deps cloudpickle" in bad["cloudpickle is not installed"].fix
    assert "pip must install neither" in bad["is not installed, or not where this Python looks"].fix
    assert {f.text for f in found if f.verdict == WARNING} == {"mpi4py is not installed"}
    assert any(f.verdict == OK and f.text.startswith("DLLogger is not installed: the same log lines") for f in found)


def test_a_horovod_of_another_tensorflow_or_maker_is_told(tmp_path):
    _, _, found = findings(simulated.iluvatar(tmp_path, horovod="0.28.1", built_for="2.15.1"))
    told = [finding.text for finding in found if finding.verdict == WARNING]
    assert told[0].startswith("Horovod was built for TensorFlow 2.15.1; here is 2.16.2+corex.4.3.0: it warns of that")
    assert told[1] == "Horovod 0.28.1 is not the vendor's (+corex)"
    assert worst(found) == WARNING  # its import decides


def test_unknown_versions_are_warnings(tmp_path):
    corex = {"tensorflow": "2.19.0+corex.4.3.0", "horovod": "0.26.1+corex.4.3.0", "built_for": "2.19.0"}
    _, _, found = findings(simulated.iluvatar(tmp_path, **corex))
    assert [f.about for f in found if f.verdict == WARNING] == ["tensorflow", "horovod"]


def test_devices_that_are_not_in_the_container_are_a_failure(tmp_path):
    here = simulated.iluvatar(tmp_path, nodes=0)
    for number in range(8):
        place = tmp_path / f"sys/bus/pci/devices/0000:{number:02x}:00.0"
        place.mkdir(parents=True)
        (place / "vendor").write_text("0x1e3e\n")
        (place / "device").write_text("0x0003\n")
        (place / "class").write_text("0x120000\n")
    bad = only(findings(here)[2], FAILURE)
    assert "no device node of Iluvatar in /dev, though its PCI bus has 8 Iluvatar BI-V150" in bad.text
    assert "--device /dev/iluvatar0" in bad.fix


def test_fewer_nodes_than_the_tool_lists_are_a_warning(tmp_path):
    _, _, found = findings(simulated.iluvatar(tmp_path, nodes=8))
    assert "(16 in all); but 8 nodes in /dev" in only(found, WARNING).text


def test_a_prefix_that_leads_nowhere_is_a_failure(tmp_path):
    here = simulated.iluvatar(tmp_path)
    (tmp_path / "usr/local/corex").unlink()
    (tmp_path / "usr/local/corex").symlink_to("corex-9")
    whose, _, found = findings(here)
    assert whose == "Iluvatar"
    assert "leads nowhere" in only(found, FAILURE).text


def test_a_tool_that_is_missing_or_fails_leaves_the_nodes(tmp_path):
    here = simulated.iluvatar(tmp_path)
    script = tmp_path / "usr/local/corex/bin/ixsmi"
    script.write_text("#!/bin/sh\nexit 9\n")
    assert "16 nodes; ixsmi is missing or does not answer" in only(findings(here)[2], WARNING).text
    script.unlink()
    assert "16 nodes; ixsmi is missing or does not answer" in only(findings(here)[2], WARNING).text


def test_lost_libraries_mixed_sdks_and_a_missing_control_node_are_warnings(tmp_path):
    here = simulated.iluvatar(tmp_path, sdk="4.3.0", driver="4.4.0", tensorflow="2.16.2+corex.4.4.0", LD_LIBRARY_PATH="")
    told = {finding.text for finding in findings(here)[2] if finding.verdict == WARNING}
    assert told == {
        "LD_LIBRARY_PATH does not name /usr/local/corex/lib64",
        "TensorFlow is of SDK 4.4.0, /usr/local/corex of 4.3.0",
        "/dev/itrctl is missing, which drivers from 4.4.0 on have",
    }


def test_a_table_of_another_shape_leaves_what_the_list_says(tmp_path):
    here = simulated.iluvatar(tmp_path)
    simulated.tool(tmp_path / "usr/local/corex/bin/ixsmi", "a new table", L=simulated.listed(["Iluvatar BI-V150"] * 16))
    _, _, found = findings(here)
    assert "16 Iluvatar BI-V150: 8 cards if" in " ".join(finding.text for finding in found)
    assert only(found, WARNING).text.startswith("Iluvatar unknown, SDK 4.3.0, CUDA unknown: ixsmi's table is of a shape")


def test_what_tensorflow_itself_asks_for_and_is_not_there_is_a_warning(tmp_path):
    """The one public list of a vendor's packages lacks some of these."""
    asked = [
        "gast!=0.5.0,>=0.2.1",
        "h5py",
        "numpy<2",
        'tensorflow-intel; platform_system == "Windows"',
        "nvidia; extra == 'x'",
    ]
    told = only(findings(simulated.iluvatar(tmp_path, requires=asked))[2], WARNING)
    assert told.text == "tensorflow asks for gast, h5py: not installed"
    assert told.fix == "pip install --no-deps gast h5py, if its import (software) fails"


def test_an_nvidia_host_is_told_by_its_tool(tmp_path):
    whose, why, found = findings(simulated.nvidia(tmp_path), cuda="12.3")
    assert (whose, why) == ("NVIDIA", ["2 /dev/nvidia*", "nvidia-smi"])
    assert worst(found) == OK
    assert "2 NVIDIA H200 of 143771 MiB" in [finding.text for finding in found]
    assert "NVIDIA 570.124.06, for CUDA to 12.8; TensorFlow is built with 12.3" in [finding.text for finding in found]


@pytest.mark.parametrize(("driver", "built"), [("12.0", "12.5"), ("13.0", "12.5"), ("12.4", "")])
def test_an_nvidia_driver_runs_what_was_built_with_its_major_version_or_an_older_one(tmp_path, driver, built):
    assert worst(findings(simulated.nvidia(tmp_path, driver), cuda=built)[2]) == OK


def test_an_nvidia_driver_that_is_older_is_a_failure_unless_devices_computed_right(tmp_path):
    here = simulated.nvidia(tmp_path, cuda="11.4")
    bad = only(findings(here, cuda="12.3")[2], FAILURE)
    assert bad.text == "NVIDIA 570.124.06, for CUDA to 11.4; TensorFlow is built with 12.3: the driver is older"
    assert bad.fix == "a driver for CUDA 12 on the host, or a TensorFlow built with CUDA 11"
    assert worst(findings(here, computed=True, cuda="12.3")[2]) == WARNING


def test_memory_that_others_hold_is_a_warning(tmp_path):
    told = only(findings(simulated.nvidia(tmp_path, used=20_000), cuda="12.3")[2], WARNING)
    assert told.text == "memory is in use: device 1: 20000 of 143771 MiB"
    (tmp_path / "masked").mkdir()
    masked = simulated.nvidia(tmp_path / "masked", used=20_000)
    masked = masked._replace(environ={**masked.environ, "CUDA_VISIBLE_DEVICES": "0"})
    assert worst(findings(masked, cuda="12.3")[2]) == OK


def test_a_login_node_without_devices_can_still_train_on_its_processors(tmp_path):
    here = simulated.nvidia(tmp_path)
    for node in (tmp_path / "dev").iterdir():
        node.unlink()
    assert only(findings(here)[2], WARNING).text == "no device node of NVIDIA in /dev"


def test_a_host_of_no_vendor_is_a_cpu(tmp_path):
    packages = simulated.site(tmp_path, {"tensorflow": "2.16.2", "horovod": "0.28.1"})
    whose, _, found = findings(Host(tmp_path, {"PATH": ""}, [packages]))
    assert whose == "CPU"
    assert worst(found) == OK
