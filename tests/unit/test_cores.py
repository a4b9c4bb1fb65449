import pytest

from hvd_vgg.parallel.cores import cpu_quota, divide_cores


@pytest.mark.parametrize(
    ("own", "launchers", "quota", "ranks", "share"),
    [
        (64, None, None, 8, 8),  # no launcher, or an unknown one
        (64, 64, None, 8, 8),  # not bound
        (8, 64, None, 8, 8),  # bound to cores of its own
        (32, 64, None, 8, 8),  # bound to one of two sockets, as three others are
        (8, 8, None, 8, 1),  # taskset 0-7 mpirun
        (64, 64, 16.0, 8, 2),  # docker run --cpus=16
        (8, 64, 16.0, 8, 2),
        (64, 64, None, 1, 64),
        (2, 2, 0.5, 4, 1),
        (7, 7, None, 2, 3),
    ],
)
def test_divide_cores_only_once(own, launchers, quota, ranks, share):
    assert divide_cores(own, launchers, quota, ranks) == share


def test_cpu_quota_of_control_groups_1_and_2(tmp_path):
    assert cpu_quota(tmp_path) is None
    first = tmp_path / "sys/fs/cgroup/cpu"
    first.mkdir(parents=True)
    (first / "cpu.cfs_quota_us").write_text("-1\n")
    (first / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(tmp_path) is None
    (first / "cpu.cfs_quota_us").write_text("250000\n")
    assert cpu_quota(tmp_path) == 2.5
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/pod/container\n")
    pod = tmp_path / "sys/fs/cgroup/pod"
    (pod / "container").mkdir(parents=True)
    (pod / "container/cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path) is None
    (pod / "cpu.max").write_text("400000 100000\n")
    assert cpu_quota(tmp_path) == 4.0
