from __future__ import annotations

import os

import pytest

from turbolm.ops import hardware

X86 = "model name\t: Fast CPU @ 3GHz\nflags\t\t: fpu avx avx2 f16c fma avx512f avx512_vnni\n\nprocessor\t: 1\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n"
GIB = 1 << 30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine's /proc and /sys: 8 CPUs on 4 cores, 64 GiB of which 48 are free."""

    def write(path, text):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    write("proc/cpuinfo", X86)
    write("proc/meminfo", f"MemTotal: {64 << 20} kB\nMemFree: 1 kB\nMemAvailable: {48 << 20} kB\n")
    for cpu in range(8):
        write(f"sys/devices/system/cpu/cpu{cpu}/topology/core_id", f"{cpu % 4}\n")
        write(f"sys/devices/system/cpu/cpu{cpu}/topology/physical_package_id", "0\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    return write


def test_bare_machine(machine, tmp_path):
    found = hardware.probe(tmp_path)
    assert found.cpu == "Fast CPU @ 3GHz"
    assert found.isa == ("avx", "f16c", "fma", "avx2", "avx512f", "avx512_vnni")
    assert found.physical_cores == 4
    assert (found.total_memory, found.free_memory) == (64 * GIB, 48 * GIB)


def test_arm(machine, tmp_path):
    machine("proc/cpuinfo", ARM)
    found = hardware.probe(tmp_path)
    assert found.isa == ("asimd", "asimddp", "i8mm")
    assert "0xd0c" in found.cpu


def test_affinity_counts_cores_not_hyperthreads(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 4, 1})  # 0 and 4 share a core
    assert hardware.probe(tmp_path).physical_cores == 2


def test_cgroup_v2_limits_of_an_ancestor(machine, tmp_path):
    machine("proc/self/cgroup", "0::/pod/app\n")
    machine("sys/fs/cgroup/pod/cpu.max", "250000 100000\n")
    machine("sys/fs/cgroup/pod/app/cpu.max", "max 100000\n")
    machine("sys/fs/cgroup/pod/memory.max", f"{8 * GIB}\n")
    machine("sys/fs/cgroup/pod/memory.current", f"{6 * GIB}\n")
    machine("sys/fs/cgroup/pod/memory.stat", f"anon 1\ninactive_file {GIB}\n")
    machine("sys/fs/cgroup/pod/app/memory.max", "max\n")
    found = hardware.probe(tmp_path)
    assert found.physical_cores == 2
    assert (found.total_memory, found.free_memory) == (8 * GIB, 3 * GIB)


def test_cgroup_v1_with_the_hosts_path(machine, tmp_path):
    machine("proc/self/cgroup", "4:memory:/host/abc\n3:cpu,cpuacct:/host/abc\n1:name=systemd:/\n0::/\n")
    machine("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "50000\n")
    machine("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    machine("sys/fs/cgroup/memory/memory.limit_in_bytes", f"{4 * GIB}\n")
    machine("sys/fs/cgroup/memory/memory.usage_in_bytes", f"{GIB}\n")
    found = hardware.probe(tmp_path)
    assert found.physical_cores == 1  # half a CPU is still one thread
    assert (found.total_memory, found.free_memory) == (4 * GIB, 3 * GIB)


def test_cgroup_v1_without_limits(machine, tmp_path):
    machine("proc/self/cgroup", "4:memory:/\n3:cpu,cpuacct:/\n")
    machine("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
    machine("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    machine("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    found = hardware.probe(tmp_path)
    assert (found.physical_cores, found.total_memory) == (4, 64 * GIB)


def test_nothing_readable_is_not_fatal(tmp_path):
    found = hardware.probe(tmp_path)
    assert found.physical_cores >= 1
    assert found.isa == ()


def test_this_machine():
    found = hardware.probe()
    assert 1 <= found.physical_cores <= len(os.sched_getaffinity(0))
    assert 0 < found.free_memory <= found.total_memory
