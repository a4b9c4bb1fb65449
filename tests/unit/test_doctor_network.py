import pytest

from hvd_vgg.doctor.network import check_interfaces
from hvd_vgg.reporting.findings import FAILURE, OK, WARNING

INTERFACES = {"lo": "127.0.0.1", "eth0": "10.0.0.2", "docker0": "172.17.0.1"}
GLOO = "HOROVOD_GLOO_RENDEZVOUS_ADDR"
MPI, EXCLUDE = "OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_btl_tcp_if_exclude"


@pytest.mark.parametrize(
    ("environ", "hosts", "verdict", "text"),
    [
        ({MPI: "eth0"}, 2, OK, "eth0"),
        ({MPI: "10.0.0.0/24"}, 2, OK, "eth0"),
        ({"NCCL_SOCKET_IFNAME": "^docker,lo", MPI: "eth0"}, 2, OK, "eth0"),
        ({"NCCL_SOCKET_IFNAME": "=eth0", MPI: "eth0"}, 2, OK, "eth0"),
        ({MPI: "lo"}, 1, OK, "eth0"),
        ({MPI: "lo"}, 2, FAILURE, "never leaves this host"),
        ({MPI: "127.0.0.0/8"}, 2, FAILURE, "never leaves this host"),
        ({MPI: "ib0"}, 1, FAILURE, "no such interface with an address; this host has lo 127.0.0.1, eth0 10.0.0.2"),
        ({MPI: "192.168.0.0/16"}, 1, FAILURE, "no such interface"),
        ({MPI: "300.1.2.3/8"}, 1, FAILURE, "no such interface"),
        ({"HOROVOD_GLOO_IFACE": "eth7", GLOO: "10.0.0.1"}, 1, FAILURE, "HOROVOD_GLOO_IFACE=eth7"),
        ({"HOROVOD_GLOO_IFACE": "eth7"}, 1, WARNING, "HOROVOD_GLOO_IFACE=eth7"),
        ({}, 2, OK, "eth0; MPI leaves out docker0"),
        ({MPI: "docker0"}, 2, WARNING, "MPI is allowed to use docker0"),
        ({MPI: "docker0"}, 1, OK, "eth0, docker0"),
        ({EXCLUDE: "lo"}, 2, WARNING, "MPI is allowed to use docker0"),
        ({}, 1, OK, "eth0"),
        ({EXCLUDE: "docker0"}, 2, WARNING, "replaces the default"),
        ({EXCLUDE: "docker0,lo"}, 2, OK, "eth0"),
    ],
)
def test_check_interfaces_of_configured_variables(environ, hosts, verdict, text):
    """What MPI, Gloo and NCCL are configured to use, on one host and on several."""
    (found,) = check_interfaces(environ, INTERFACES, hosts > 1, True)
    assert found.verdict == verdict
    assert text in found.text


def test_check_interfaces_nccl_needs_devices():
    """NCCL carries nothing where there are no devices, so a wrong interface is a warning there."""
    for devices, verdict in ((True, FAILURE), (False, WARNING)):
        (found,) = check_interfaces({"NCCL_SOCKET_IFNAME": "ib0"}, INTERFACES, True, devices)[:1]
        assert found.verdict == verdict
