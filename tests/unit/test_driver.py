"""What doctor concludes from the devices of SIMULATED hosts (tests/simulated.py): no device or driver is behind them."""

import pytest
import simulated
from simulated import findings, only

from hvd_vgg.doctor.driver import Listing, assess_listing
from hvd_vgg.reporting.findings import FAILURE, OK, WARNING, worst


def test_devices_of_bi_v150_are_two_per_card(tmp_path):
    accelerators, found = findings(simulated.iluvatar(tmp_path))
    assert accelerators.vendor == "Iluvatar"
    assert accelerators.evidence == ["TensorFlow 2.16.2+corex.4.3.0", "/usr/local/corex", "16 /dev/iluvatar*", "ixsmi"]
    assert worst(found) == OK
    texts = [finding.text for finding in found]
    cards = "8 cards, if each shows up as two devices; one rank per device, 16 in all"
    assert f"16 Iluvatar BI-V150 with 32768 MiB: {cards}" in texts
    assert "Iluvatar 4.3.8, SDK 4.3.0, CUDA 10.2; at least 4.3 is needed" in texts


def test_devices_of_bi_v100_with_the_old_sdk(tmp_path):
    corex = {"sdk": "3.1.0", "driver": "3.1.0", "tensorflow": "2.6.5+corex.3.1.0", "horovod": "0.27.0+corex.3.1.0"}
    _, found = findings(simulated.iluvatar(tmp_path, ["Iluvatar BI-V100"] * 8, built_for="2.6.5", **corex))
    assert worst(found) == OK
    assert "8 Iluvatar BI-V100 with 32768 MiB" in [finding.text for finding in found]


def test_devices_half_a_card_is_missing(tmp_path):
    found = only(findings(simulated.iluvatar(tmp_path, names=("Iluvatar BI-V150",) * 15))[1], WARNING)
    assert "8 cards, if each shows up as two devices" in found.text
    assert found.text.endswith("an odd number: one device of a card is missing")


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["Iluvatar BI-V150"] * 16, ": 8 cards, if each shows up as two devices; one rank per device, 16 in all"),
        (["Iluvatar BI-V150S"] * 8, ""),
        (["Iluvatar BI-V100", "Iluvatar BI-V150", "Iluvatar BI-V150"], ": 2 cards, if each"),
    ],
)
def test_cards_are_counted_by_name(names, text):
    found = assess_listing(Listing("4.3.8", "10.2", names, []), len(names))
    assert found.verdict == OK
    assert text in found.text and ("cards" in found.text) == bool(text)


@pytest.mark.parametrize(
    ("driver", "sdk", "cuda", "text"),
    [
        ("3.2.3", "4.4.0", "10.2", "the driver is older than the SDK"),
        ("4.4.0", "4.5.0", "10.2", "the driver is older than the SDK"),
        ("4.4.0", "4.4.0", "N/A", "ixsmi does not know the CUDA version"),
    ],
)
def test_driver_that_does_not_fit(tmp_path, driver, sdk, cuda, text):
    """It is a failure, but a warning where the devices computed correctly."""
    corex = {"tensorflow": f"2.16.2+corex.{sdk}", "horovod": f"0.27.0+corex.{sdk}"}
    host = simulated.iluvatar(tmp_path, driver=driver, sdk=sdk, cuda=cuda, **corex)
    (tmp_path / "dev/itrctl").touch()
    bad = only(findings(host)[1], FAILURE)
    assert bad.about == "driver"
    assert text in bad.text
    assert f"the driver of SDK {sdk}" in bad.fix
    found = findings(host, computed=True)[1]
    assert worst(found) == WARNING
    assert only(found, WARNING).about == "driver"


def test_devices_on_the_bus_that_are_not_in_the_container(tmp_path):
    host = simulated.iluvatar(tmp_path, nodes=0)
    for number, kind in enumerate(["0x120000"] * 8 + ["0x060400"]):
        device = tmp_path / f"sys/bus/pci/devices/0000:{number:02x}:00.0"
        device.mkdir(parents=True)
        (device / "vendor").write_text("0x1e3e\n")
        (device / "class").write_text(f"{kind}\n")
    bad = only(findings(host)[1], FAILURE)
    assert bad.text == "no Iluvatar device node in /dev, although the PCI bus has 8 devices"
    assert "--device /dev/iluvatar0" in bad.fix


def test_devices_fewer_nodes_than_listed(tmp_path):
    _, found = findings(simulated.iluvatar(tmp_path, nodes=8))
    assert "16 in all; but 8 nodes in /dev" in only(found, WARNING).text


@pytest.mark.parametrize("script", ["#!/bin/sh\nexit 9\n", "#!/bin/sh\necho a new table\n", ""])
def test_tool_that_fails_or_is_unknown_or_missing(tmp_path, script):
    host = simulated.iluvatar(tmp_path)
    tool = tmp_path / "usr/local/corex/bin/ixsmi"
    if script:
        tool.write_text(script)
    else:
        tool.unlink()
    assert only(findings(host)[1], WARNING).text.startswith("16 nodes; ixsmi is missing, fails or prints something unknown")


def test_devices_of_an_nvidia_host(tmp_path):
    accelerators, found = findings(simulated.nvidia(tmp_path), cuda="12.3")
    assert accelerators[1:3] == ("NVIDIA", ["2 /dev/nvidia*", "nvidia-smi"])
    assert worst(found) == OK
    texts = [finding.text for finding in found]
    assert "2 NVIDIA H200 with 143771 MiB" in texts
    assert "NVIDIA 570.124.06, supports CUDA up to 12.8; TensorFlow was built with 12.3" in texts


@pytest.mark.parametrize(("supported", "built"), [("12.0", "12.5"), ("13.0", "12.5"), ("12.4", "")])
def test_driver_of_nvidia_fits_by_major_version(tmp_path, supported, built):
    assert worst(findings(simulated.nvidia(tmp_path, supported), cuda=built)[1]) == OK


def test_driver_of_nvidia_is_too_old(tmp_path):
    """It is a failure, but a warning where the devices computed correctly."""
    host = simulated.nvidia(tmp_path, cuda="11.4")
    bad = only(findings(host, cuda="12.3")[1], FAILURE)
    assert bad.text.endswith("supports CUDA up to 11.4; TensorFlow was built with 12.3: the driver is too old")
    assert bad.fix == "a driver for CUDA 12 on the host, or a TensorFlow built with CUDA 11"
    assert worst(findings(host, computed=True, cuda="12.3")[1]) == WARNING


def test_devices_whose_memory_is_in_use(tmp_path):
    host = simulated.nvidia(tmp_path, used=20_000)
    assert only(findings(host, cuda="12.3")[1], WARNING).text == "memory is in use: device 1: 20000 of 143771 MiB"
    masked = host._replace(environ={**host.environ, "CUDA_VISIBLE_DEVICES": "0"})
    assert worst(findings(masked, cuda="12.3")[1]) == OK


@pytest.mark.parametrize(
    ("masks", "devices"),
    [
        ({"COREX_VISIBLE_DEVICES": "3"}, []),
        ({"COREX_VISIBLE_DEVICES": "all"}, [0, 1]),
        ({"COREX_VISIBLE_DEVICES": "1,2"}, [1]),
        ({"CUDA_VISIBLE_DEVICES": "0", "COREX_VISIBLE_DEVICES": "all"}, [0]),
    ],
)
def test_devices_in_use_that_a_mask_of_iluvatar_hides(tmp_path, masks, devices):
    host = simulated.iluvatar(tmp_path, **masks)
    tool = tmp_path / "usr/local/corex/bin/ixsmi"
    tool.write_text(tool.read_text().replace(" 64MiB / 32768MiB", " 9000MiB / 32768MiB", 2))
    texts = [finding.text for finding in findings(host)[1] if finding.verdict == WARNING]
    busy = ", ".join(f"device {number}: 9000 of 32768 MiB" for number in devices)
    assert texts == ([f"memory is in use: {busy}"] if busy else [])


def test_devices_of_a_login_node(tmp_path):
    """Without devices it can still train on its CPU."""
    host = simulated.nvidia(tmp_path)
    for node in (tmp_path / "dev").iterdir():
        node.unlink()
    assert only(findings(host)[1], WARNING).text == "no NVIDIA device node in /dev"
