"""Profiles and the probe: what a machine has, read from trees of /proc and /sys built here file by
file.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_gemma.bundles.gguf import GGML_TYPES
from edge_gemma.engines.llama import library as llama
from edge_gemma.errors import UsageError
from edge_gemma.machine import probe as probing
from edge_gemma.machine.device import describe, load_profile, profile_names, profile_notes
from edge_gemma.machine.footprint import Footprint
from edge_gemma.machine.probe import find_device, machine_for, probe
from edge_gemma.machine.repack import repack_rules, repacked
from edge_gemma.units import GiB, MiB

BOARDS = {
    "pi-zero-2w-512mb",
    "pi-4-2gb",
    "pi-4-4gb",
    "pi-4-8gb",
    "pi-5-4gb",
    "pi-5-8gb",
    "pi-5-16gb",
    "jetson-orin-nano-8gb",
    "jetson-orin-nx-16gb",
    "laptop-8gb",
    "laptop-16gb",
}
MEMINFO = (
    "MemTotal:        4075520 kB\nMemFree:  1000000 kB\nMemAvailable:    3000000 kB\nBuffers: 10 "
    "kB\nCached: 2000000 kB\nShmem: 5 kB\n"
)
V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
    "32 31 0:29 {at} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {at} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)
A76 = (
    "processor\t: {n}\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm aes crc32 atomics fphp "
    "asimdhp asimdrdm asimddp\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n\n"
)
A55 = A76.replace("0xd0b", "0xd05")
X86 = "processor\t: 0\nmodel name\t: Some Laptop CPU\nflags\t\t: fpu sse sse2 avx f16c fma avx2\n\n"


def machine(root, files: dict[str, str], meminfo=MEMINFO):
    for path, text in {"proc/meminfo": meminfo, **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def cpus(root, capacities):
    return machine(
        root,
        {f"sys/devices/system/cpu/cpu{n}/cpu_capacity": f"{c}\n" for n, c in enumerate(capacities)},
    )


# ---- profiles


def test_every_board_of_the_promise_is_there_and_consistent():
    assert BOARDS <= set(profile_names())
    for name in profile_names():
        device = load_profile(name)
        assert 0 < device.usable_bytes < device.available_bytes <= device.total_bytes
        nominal = int(name.rsplit("-", 1)[1].removesuffix("mb").removesuffix("gb")) * (
            MiB if name.endswith("mb") else GiB
        )
        assert (
            0.8 * nominal < device.total_bytes < nominal
        )  # firmware and kernel keep some, never more than a fifth
        assert device.n_threads == len(device.big_cpus) <= len(device.cpus)
        assert profile_notes(name)[1], "a profile says where its figures come from"


def test_profiles_are_listed_smallest_first():
    sizes = [load_profile(name).total_bytes for name in profile_names()]
    assert sizes == sorted(sizes)


def test_cores_have_the_features_of_their_design():
    assert (
        load_profile("pi-zero-2w-512mb").cpu_features
        == load_profile("pi-4-2gb").cpu_features
        == ("neon",)
    )
    for name in ("pi-5-4gb", "jetson-orin-nano-8gb", "jetson-orin-nx-16gb"):
        assert load_profile(name).cpu_features == ("neon", "dotprod")
    assert (
        load_profile("pi-5-8gb").page_bytes == 16384 and load_profile("pi-4-8gb").page_bytes == 4096
    )


@pytest.mark.parametrize(
    "name", ["pi-6", "repack", "../pi-5-4gb", "/etc/passwd", "", "nowhere.toml"]
)
def test_an_unknown_profile_lists_the_known_ones(name):
    with pytest.raises(
        UsageError, match=r"no device profile .*there are: auto, pi-zero-2w-512mb, pi-4-2gb"
    ):
        find_device(name)


BOARD = (
    'board = "My board"\ncpu = "2 cores"\ntotal = "{total}"\navailable = "{available}"\npage = '
    '"{page}"\ncpus = 2\nfeatures = ["neon"]\nmemory_cgroup = true\n'
)


def board(tmp_path, text=BOARD, total="1 GiB", available="800 MiB", page="4 KiB"):
    path = tmp_path / "my-board.toml"
    path.write_text(text.format(total=total, available=available, page=page))
    return str(path)


def test_a_profile_of_ones_own(tmp_path):
    device = find_device(board(tmp_path))
    assert (device.name, device.total_bytes, device.cpus) == ("my-board", GiB, (0, 1))
    assert describe(device) == "my-board: My board, 768 MiB usable of 1.00 GiB, 2 threads, neon"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"total": "many"}, "cannot read 'many' as a size"),
        (
            {"available": "2 GiB"},
            "available is 2 GiB of a total of 1 GiB; expected 0 < available ≤ total",
        ),
        ({"page": "5000"}, "page is 5000; expected a power of two"),
        ({"text": BOARD + 'speed = "fast"\n'}, "unknown field `speed`"),
        ({"text": BOARD.replace("cpus = 2", 'cpus = "2"')}, "Expected `int`, got `str`"),
        ({"text": BOARD.replace("cpus = 2", "cpus = 0")}, "cpus is 0, expected 1 … 1024"),
        ({"text": BOARD + "big_cpus = [5]\n"}, r"big_cpus \[5\] are not among the cpus 0 … 1"),
        ({"text": "board = "}, "cannot be read"),
    ],
)
def test_a_broken_profile_says_what_is_wrong(tmp_path, change, message):
    with pytest.raises(UsageError, match=message):
        find_device(board(tmp_path, **change))


# ---- repacking


def test_repacking_follows_the_cpu():
    shape = (2048, 8192)
    packs = {
        features: {
            t
            for t in (
                "Q4_0",
                "Q4_K",
                "Q5_K",
                "Q6_K",
                "Q8_0",
                "IQ4_NL",
                "Q2_K",
                "Q4_1",
                "F16",
                "F32",
            )
            if repacked(t, shape, features)
        }
        for features in [
            ("neon",),
            ("neon", "dotprod"),
            ("neon", "dotprod", "i8mm"),
            ("avx2",),
            ("avx2", "avx512"),
            (),
        ]
    }
    arm = {"Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL"}
    assert packs == {
        ("neon",): set(),
        (): set(),
        ("neon", "dotprod"): arm,
        ("neon", "dotprod", "i8mm"): arm,
        ("avx2",): {"Q4_0", "Q4_K", "IQ4_NL"},
        ("avx2", "avx512"): {"Q4_0", "Q4_K", "IQ4_NL", "Q2_K"},
    }


def test_repacking_needs_two_dimensions_and_enough_rows():
    assert repacked("Q4_0", (64, 8, 1, 1), ("avx2",))
    assert not repacked("Q4_0", (64, 8, 2), ("avx2",))
    assert not repacked("Q4_0", (64,), ("avx2",)) and not repacked("Q4_0", (64, 1), ("avx2",))
    assert not repacked("Q4_0", (64, 12), ("avx2",)) and repacked(
        "Q4_0", (64, 12), ("neon", "dotprod")
    )
    assert not repacked("Q4_K", (256, 12), ("neon", "dotprod"))


def build_features():
    """The CPU features llama.cpp was built for, in repack.toml's words."""
    llama.supports_gpu()  # starts the backends
    from llama_cpp import llama_cpp as low

    words = {
        "AVX2": "avx2",
        "AVX512": "avx512",
        "NEON": "neon",
        "DOTPROD": "dotprod",
        "MATMUL_INT8": "i8mm",
    }
    return {
        words[name]
        for name in re.findall(r"(\w+) = 1", low.llama_print_system_info().decode())
        if name in words
    }


def test_the_repack_table_says_what_llama_does_on_this_cpu():
    features = build_features()
    assert features <= set(probe().cpu_features)  # else llama.cpp could not run here
    kinds = {
        name: id
        for id, (name, block, _) in GGML_TYPES.items()
        if 2048 % block == 0 and not name.startswith("I") or name.startswith("IQ4")
    }
    assert set(repack_rules()) - set(kinds) == {"Q1_0"}  # a type no reader here knows
    for name, kind in kinds.items():
        for rows in (8192, 12, 10, 9):
            assert llama.repacks(kind, 2048, rows) == repacked(name, (2048, rows), features), (
                name,
                rows,
            )


# ---- the probe


def test_this_machine_can_be_probed():
    device = probe()
    assert device.cpus == tuple(sorted(os.sched_getaffinity(0)))
    assert 0 < device.available_bytes <= device.total_bytes and device.page_bytes == os.sysconf(
        "SC_PAGE_SIZE"
    )
    assert 1 <= device.n_threads <= len(device.cpus) and set(device.big_cpus) <= set(device.cpus)


def test_a_tight_cgroup_is_not_charged_twice_for_python(monkeypatch):
    """The plan counts Python and the libraries; what they already hold must not also be missing
    from what is free.
    """
    tight = replace(probe(), limit_bytes=284 * MiB, headroom_bytes=260 * MiB)
    held = Footprint(40 * MiB, 40 * MiB, 24 * MiB, 16 * MiB)
    monkeypatch.setattr(probing, "probe", lambda: tight)
    monkeypatch.setattr(probing, "footprint", lambda exact: held)
    assert machine_for("auto").usable_bytes == 284 * MiB
    zero = load_profile("pi-zero-2w-512mb")
    assert abs(machine_for("pi-zero-2w-512mb").usable_bytes - zero.usable_bytes) <= MiB
    assert machine_for(zero) == machine_for("pi-zero-2w-512mb")


def test_memory_is_what_the_kernel_calls_available(tmp_path):
    device = probe(machine(tmp_path, {}), affinity=[0])
    assert (device.total_bytes, device.available_bytes) == (4075520 * 1024, 3000000 * 1024)
    assert (
        device.reserve_bytes == 4075520 * 1024 // 32
        and device.usable_bytes == device.available_bytes - device.reserve_bytes
    )
    old = machine(tmp_path, {}, meminfo=MEMINFO.replace("MemAvailable", "Other"))
    assert probe(old, affinity=[0]).available_bytes == (1000000 + 10 + 2000000 - 5) * 1024


def test_cgroup_v2_takes_the_smallest_ancestor(tmp_path):
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user.slice/app.scope\n",
            "proc/self/mountinfo": V2_MOUNT,
            "proc/cgroups": "memory 0 80 1\n",
            "sys/fs/cgroup/cgroup.controllers": "cpu memory\n",
            "sys/fs/cgroup/user.slice/memory.max": f"{GiB}\n",
            "sys/fs/cgroup/user.slice/memory.current": f"{700 * MiB}\n",
            "sys/fs/cgroup/user.slice/memory.stat": "anon 1\nactive_file "
            f"{100 * MiB}\ninactive_file "
            f"{200 * MiB}\nslab_reclaimable "
            "0\n",
            "sys/fs/cgroup/user.slice/app.scope/memory.max": f"{2 * GiB}\n",
            "sys/fs/cgroup/user.slice/app.scope/memory.current": "0\n",
        },
    )
    device = probe(root, affinity=[0])
    assert (device.limit_bytes, device.headroom_bytes) == (
        GiB,
        GiB - 400 * MiB,
    )  # file pages can go
    assert device.usable_bytes == device.headroom_bytes and device.memory_cgroup


def test_cgroup_v2_high_counts_and_max_does_not(tmp_path):
    files = {
        "proc/self/cgroup": "0::/a\n",
        "proc/self/mountinfo": V2_MOUNT,
        "sys/fs/cgroup/a/memory.max": "max\n",
        "sys/fs/cgroup/a/memory.current": "0\n",
    }
    device = probe(machine(tmp_path, files), affinity=[0])
    assert (
        device.limit_bytes is None
        and device.usable_bytes == device.available_bytes - device.reserve_bytes
    )
    device = probe(
        machine(tmp_path, {**files, "sys/fs/cgroup/a/memory.high": f"{512 * MiB}\n"}), affinity=[0]
    )
    assert device.limit_bytes == device.usable_bytes == 512 * MiB


def test_cgroup_v1_limit(tmp_path):
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/box/inner\n1:cpu,cpuacct:/box\n0::/\n",
            "proc/self/mountinfo": V1_MOUNTS.format(at="/"),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{2 * GiB}\n",
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{300 * MiB}\n",
            "sys/fs/cgroup/memory/box/memory.stat": "cache 5\nhierarchical_memory_limit "
            f"{2 * GiB}\ntotal_active_file "
            f"{30 * MiB}\ntotal_inactive_file {70 * MiB}\n",
            "sys/fs/cgroup/memory/box/inner/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
        },
    )
    device = probe(root, affinity=[0, 1, 2, 3])
    assert (device.limit_bytes, device.headroom_bytes) == (2 * GiB, 2 * GiB - 200 * MiB)
    assert device.n_threads == 1  # a quota of 1.5 CPUs


def test_a_container_sees_its_limit_at_the_mount(tmp_path):
    """Docker on version 1: the path in /proc/self/cgroup is the host's, the mount shows our part of
    the tree as its root.
    """
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/abc\n",
            "proc/self/mountinfo": V1_MOUNTS.format(at="/docker/abc"),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GiB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "0\n",
        },
    )
    assert probe(root, affinity=[0]).limit_bytes == GiB


def test_a_limit_above_the_memory_is_none(tmp_path):
    files = {
        "proc/self/cgroup": "0::/a\n",
        "proc/self/mountinfo": V2_MOUNT,
        "sys/fs/cgroup/a/memory.max": f"{64 * GiB}\n",
    }
    assert probe(machine(tmp_path, files), affinity=[0]).limit_bytes is None


@pytest.mark.parametrize(
    "quota, n_threads", [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1)]
)
def test_cgroup_v2_quota_bounds_the_threads(tmp_path, quota, n_threads):
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        "proc/self/mountinfo": V2_MOUNT,
        "sys/fs/cgroup/a/cpu.max": quota,
        "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
    }
    assert probe(machine(tmp_path, files), affinity=range(4)).n_threads == n_threads


def test_raspberry_pi_os_as_it_ships(tmp_path):
    """The memory controller is off, swap is zram, pages are 16 KiB: zram adds nothing to what may
    be used.
    """
    root = machine(
        tmp_path,
        {
            "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
            "proc/cpuinfo": "".join(A76.format(n=n) for n in range(4)),
            "proc/cmdline": "coherent_pool=1M cgroup_disable=memory console=tty1",
            "proc/cgroups": "#subsys_name\thierarchy\tnum_cgroups\tenabled\n"
            "cpu\t0\t70\t1\n"
            "memory\t0\t70\t0\n",
            "proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n"
            "/dev/zram0\tpartition\t2097136\t0\t100\n"
            "/var/swap file 102396 0 -2\n",
            "proc/self/cgroup": "0::/user.slice\n",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io pids\n",
        },
    )
    device = probe(root, affinity=range(4), page_bytes=16384)
    assert device.board == "Raspberry Pi 5 Model B Rev 1.0" and device.cpu == "4 × Cortex-A76"
    assert device.cpu_features == ("neon", "dotprod", "fp16") and device.page_bytes == 16384
    assert not device.memory_cgroup and device.limit_bytes is None
    assert (device.zram_bytes, device.swap_bytes) == (2097136 * 1024, 102396 * 1024)
    assert device.usable_bytes == device.available_bytes - device.reserve_bytes


def test_big_little(tmp_path):
    root = machine(
        cpus(tmp_path, [530, 530, 530, 530, 1024, 1024, 995, 995]),
        {"proc/cpuinfo": A55.format(n=0) * 4 + A76.format(n=4) * 4},
    )
    device = probe(root, affinity=range(8))
    assert (
        device.big_cpus == (4, 5, 6, 7)
        and device.n_threads == 4
        and device.cpu == "4 × Cortex-A55, 4 × Cortex-A76"
    )
    assert probe(root, affinity=[0, 1, 4]).big_cpus == (4,)
    assert probe(root, affinity=[0, 1]).big_cpus == (
        0,
        1,
    )  # only little ones allowed: they are the fast ones then


def test_hybrid_laptop_and_hyperthreads(tmp_path):
    siblings = {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3", 4: "4", 5: "5", 6: "6", 7: "7"}
    files = {
        f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{ids}\n"
        for cpu, ids in siblings.items()
    }
    root = machine(
        tmp_path,
        {
            **files,
            "proc/cpuinfo": X86,
            "sys/class/dmi/id/sys_vendor": "LENOVO\n",
            "sys/class/dmi/id/product_name": "21AH\n",
        },
    )
    device = probe(root, affinity=range(8))
    assert (
        device.n_threads == 6 and device.cpu == "Some Laptop CPU" and device.board == "LENOVO 21AH"
    )  # 2 cores with two threads, 4 with one
    assert device.cpu_features == ("avx2", "f16c", "fma")
    machine(root, {"sys/devices/cpu_core/cpus": "0-3\n", "sys/devices/cpu_atom/cpus": "4-7\n"})
    device = probe(root, affinity=range(8))
    assert device.big_cpus == (0, 1, 2, 3) and device.n_threads == 2


def test_features_are_those_of_every_core(tmp_path):
    root = machine(
        tmp_path, {"proc/cpuinfo": A76.format(n=0) + A76.format(n=1).replace(" asimddp", "")}
    )
    assert "dotprod" not in probe(root, affinity=[0, 1]).cpu_features


def test_gpus(tmp_path):
    assert probe(machine(tmp_path, {}), affinity=[0]).gpu is None
    root = machine(
        tmp_path,
        {
            "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA GeForce RTX "
            "4060\nIRQ: 1\n"
        },
    )
    assert probe(root, affinity=[0]).gpu == "NVIDIA GeForce RTX 4060"
    root = machine(
        tmp_path,
        {"proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0", "dev/nvhost-gpu": ""},
    )
    assert probe(root, affinity=[0]).gpu == "NVIDIA Jetson GPU (shares the memory)"


garbage = st.text(alphabet="0123456789 :/,-\n\tmaxcgroup.memory\0é", max_size=200)


@given(cgroup=garbage, mountinfo=garbage, cpuinfo=garbage, swaps=garbage, limit=garbage)
def test_no_kernel_file_breaks_the_probe(
    tmp_path_factory, cgroup, mountinfo, cpuinfo, swaps, limit
):
    root = machine(
        tmp_path_factory.mktemp("m"),
        {
            "proc/self/cgroup": cgroup,
            "proc/self/mountinfo": mountinfo + V2_MOUNT,
            "proc/cpuinfo": cpuinfo,
            "proc/swaps": swaps,
            "sys/fs/cgroup/memory.max": limit,
            "sys/fs/cgroup/cpu.max": limit,
            "sys/fs/cgroup/memory.stat": limit,
            "sys/devices/system/cpu/cpu0/topology/thread_siblings_list": limit,
        },
    )
    device = probe(root, affinity=[0, 1])
    assert 0 <= device.usable_bytes <= device.total_bytes and device.n_threads >= 1
