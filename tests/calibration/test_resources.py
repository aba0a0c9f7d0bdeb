"""Memory and CPUs are those of the container: files of control groups, version 1 and 2, laid out as the kernel does it."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from biascorr import correct, equalize
from biascorr.calibration.resources import available_cpus, checked_threads, free_memory, is_in_memory
from biascorr.calibration.storage import bytes_from_text, checked_budget
from networks import samples, two_layers

GB = 1 << 30
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.fixture
def root(tmp_path):
    """Of a host with 64 GB free."""
    write(tmp_path, "proc/meminfo", f"MemTotal: {128 * GB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {64 * GB // 1024} kB\n")
    return tmp_path


def write(root, path, text):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text, encoding="ascii")


def test_a_host_without_groups(root):
    assert free_memory(root) == 64 * GB
    assert available_cpus(root) == CPUS


def test_no_files_at_all(tmp_path):
    assert free_memory(tmp_path) > 0
    assert available_cpus(tmp_path) == CPUS


def test_half_of_what_is_installed_on_windows(tmp_path, monkeypatch):
    def installed(kilobytes):
        ctypes.cast(kilobytes, ctypes.POINTER(ctypes.c_ulonglong))[0] = 16 * GB // 1024
        return 1

    kernel32 = SimpleNamespace(GetPhysicallyInstalledSystemMemory=installed)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel32), raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(os, "sysconf")
    assert free_memory(tmp_path) == 8 * GB


@pytest.mark.parametrize(
    ("folder", "expected"),
    [("/tmp", True), ("/tmp/a/b", True), ("/tmp/disk/a", False), ("/home", False), ("/a b/c", True), ("/tmpfs", False)],
)
def test_a_folder_in_memory(folder, expected, root):
    mounts = [
        "/dev/sda / ext4 rw 0 0",
        "tmpfs /tmp tmpfs rw,size=1g 0 0",
        "/dev/sdb /tmp/disk xfs rw 0 0",
        "none /a\\040b ramfs rw 0 0",
    ]
    write(root, "proc/self/mounts", "\n".join(mounts))
    assert is_in_memory(Path(folder), root) is expected
    assert not is_in_memory(Path(folder), root / "nothing")


def version_2(root, group="/", *, at="", limit=None, used=0, inactive=0, active=0, cpus=None):
    write(root, "proc/self/cgroup", f"0::{group}\n")
    folder = f"sys/fs/cgroup/{at}"
    write(root, f"{folder}/memory.max", f"{limit or 'max'}\n")
    write(root, f"{folder}/memory.current", f"{used}\n")
    write(root, f"{folder}/memory.stat", f"anon 5\ninactive_file {inactive}\nactive_file {active}\n")
    write(root, f"{folder}/cpu.max", f"{cpus or 'max 100000'}\n")


def version_1(root, group="/", *, at="", limit=2**63 - 4096, used=0, inactive=0, active=0, quota=-1, period=100000):
    write(root, "proc/self/cgroup", f"11:memory:{group}\n4:cpu,cpuacct:{group}\n1:name=systemd:/x\n")
    write(root, f"sys/fs/cgroup/memory/{at}/memory.limit_in_bytes", f"{limit}\n")
    write(root, f"sys/fs/cgroup/memory/{at}/memory.usage_in_bytes", f"{used}\n")
    write(
        root, f"sys/fs/cgroup/memory/{at}/memory.stat", f"cache 7\ntotal_inactive_file {inactive}\ntotal_active_file {active}\n"
    )
    write(root, f"sys/fs/cgroup/cpu/{at}/cpu.cfs_quota_us", f"{quota}\n")
    write(root, f"sys/fs/cgroup/cpu/{at}/cpu.cfs_period_us", f"{period}\n")


both_versions = pytest.mark.parametrize("version", [version_1, version_2])


@both_versions
def test_without_limits_memory_is_that_of_the_host(version, root):
    version(root)
    assert free_memory(root) == 64 * GB
    assert available_cpus(root) == CPUS


@both_versions
def test_a_limit_counts_less_what_is_used_and_cannot_be_dropped(version, root):
    version(root, limit=4 * GB, used=3 * GB, inactive=GB // 2)
    assert free_memory(root) == 3 * GB // 2
    version(root, limit=4 * GB, used=3 * GB, inactive=GB // 2, active=GB)  # read twice, or mapped
    assert free_memory(root) == 5 * GB // 2


@both_versions
def test_a_limit_above_what_the_host_has_changes_nothing(version, root):
    version(root, limit=100 * GB)
    assert free_memory(root) == 64 * GB


@both_versions
def test_more_used_than_allowed_leaves_nothing(version, root):
    version(root, limit=GB, used=2 * GB)
    assert free_memory(root) == 0


@both_versions
def test_the_tightest_group_on_the_path_counts(version, root):
    version(root, "/pod/container", at="pod/container", limit=8 * GB, used=GB)
    assert free_memory(root) == 7 * GB
    version(root, "/pod/container", at="pod", limit=2 * GB, used=GB)
    assert free_memory(root) == GB


@both_versions
def test_groups_beside_the_path_do_not_count(version, root):
    version(root, "/pod/other", at="pod/container", limit=GB)
    assert free_memory(root) == 64 * GB


@both_versions
def test_a_group_that_is_mounted_as_the_root_is_found_there(version, root):
    """As in a container without a namespace of its own: the path is that of the host."""
    version(root, "/docker/0123abc", limit=2 * GB)
    assert free_memory(root) == 2 * GB


def test_shares_of_cpus_are_rounded_up(root):
    version_2(root, cpus="50000 100000")
    assert available_cpus(root) == 1
    version_2(root, cpus="150000 100000")
    assert available_cpus(root) == min(2, CPUS)
    version_1(root, quota=1, period=100000)
    assert available_cpus(root) == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="there is no affinity to set")
def test_cpus_are_those_of_the_affinity_mask():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from biascorr.calibration.resources import available_cpus; print(available_cpus())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


def test_arguments():
    assert checked_threads(3) == 3
    assert checked_threads(np.int64(2)) == 2
    assert checked_threads(None) == available_cpus()
    assert checked_budget(0) == 0
    assert checked_budget("1.5GB") == 1_500_000_000
    assert 0 < checked_budget(None) <= free_memory() + GB


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
@pytest.mark.parametrize("function", [correct, equalize])
def test_wrong_numbers_of_threads(function, threads):
    with pytest.raises(ValueError, match=r"^threads: .*, expected an integer of at least 1, or None$"):
        function(two_layers(), samples(4, 3, 6, 6), threads=threads)


@pytest.mark.parametrize("budget", [-1, 1.5, True, "2 X", "2 iB", "two GB", "-1"])
@pytest.mark.parametrize("function", [correct, equalize])
def test_wrong_budgets(function, budget):
    with pytest.raises(ValueError, match=r"^memory_budget: .*, expected (an integer of at least 0, or None|bytes: .*)$"):
        function(two_layers(), samples(4, 3, 6, 6), memory_budget=budget)


@pytest.mark.parametrize(
    ("text", "expected"),
    {
        "0": 0, "500000000": 500_000_000, "2GB": 2 * 10**9, "2 GB": 2 * 10**9, "2gb": 2 * 10**9, "1.5g": 15 * 10**8,
        "512MiB": 512 << 20, "1 KiB": 1024, "3k": 3000, "1TB": 10**12, " 7 B ": 7,
    }.items(),
)  # fmt: skip
def test_budgets_as_texts(text, expected):
    assert bytes_from_text(text) == expected
