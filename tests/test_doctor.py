"""What doctor sees and advises, on machines built file by file."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json

import pytest
from test_device import A76, V2_MOUNT, X86, build_features, machine
from typer.testing import CliRunner

from edge_gemma.cli import app as cli
from edge_gemma.doctor import (
    PURPOSES,
    Llama,
    ask_llama,
    examine,
    expected_repacks,
    required_packages,
)
from edge_gemma.errors import MissingExtra, UsageError
from edge_gemma.machine.device import load_profile
from edge_gemma.machine.probe import probe
from edge_gemma.units import GiB

runner = CliRunner()


def report(
    root,
    *,
    affinity=range(4),
    page_bytes=4096,
    repacks=None,
    gpu=False,
    have=lambda name: True,
    **changes,
):
    device = dataclasses.replace(probe(root, affinity=affinity, page_bytes=page_bytes), **changes)
    return examine(
        root,
        device=device,
        llama=lambda: Llama(
            "0.3.36", gpu, expected_repacks(device) if repacks is None else repacks
        ),
        have=have,
    )


def said(found, *words):
    return [line for line in found.advice if all(word in line for word in words)]


PI_OS = {
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    "proc/cpuinfo": "".join(A76.format(n=n) for n in range(4)),
    "proc/cmdline": "cgroup_disable=memory",
    "proc/cgroups": "memory\t0\t70\t0\n",
    "proc/self/cgroup": "0::/\n",
    "proc/self/mountinfo": V2_MOUNT,
    "proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n/dev/zram0\tpartition\t2097136\t0\t100\n",
    "boot/firmware/cmdline.txt": "root=/dev/mmcblk0p2\n",
    "proc/mounts": "/dev/mmcblk0p2 / ext4 rw 0 0\nproc /proc proc rw 0 0\n",
    "proc/asound/pcm": "00-00: USB Audio : USB Audio : playback 1\n01-00: USB Mic : USB Mic : "
    "capture 1\n",
    "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
}


def test_raspberry_pi_os_as_it_ships(tmp_path):
    found = report(machine(tmp_path, PI_OS), page_bytes=16384)
    assert said(
        found,
        "memory cgroup off",
        "sudo sed -i '1s/$/ cgroup_enable=memory/' /boot/firmware/cmdline.txt && sudo reboot",
    )
    assert said(found, "2.00 GiB of the swap is zram", "not counted as memory")
    assert said(
        found,
        "under-voltage now, throttled now, under-voltage since boot, throttled since boot",
        "power supply",
    )
    assert found.microphones == ("USB Mic",) and found.store_on_sd and said(found, "SD card")
    assert not said(found, "lesser CPU") and not said(found, "GPU (")


def test_an_sd_card_and_the_right_to_lock_memory(tmp_path):
    without = {
        **PI_OS,
        "proc/self/limits": "Max locked memory         8388608              8388608            "
        "  bytes\n",
        "proc/self/status": "CapEff:\t0000000000000000\n",
    }
    assert said(report(machine(tmp_path / "a", without)), "SD card", "whole file") and said(
        report(machine(tmp_path / "a", without)), "memlock unlimited"
    )
    raised = {
        **without,
        "proc/self/limits": "Max locked memory         unlimited            unlimited          "
        "  bytes\n",
    }
    root = {**without, "proc/self/status": "CapEff:\t000001ffffffffff\n"}
    for name, files in ("b", raised), ("c", root):
        found = report(machine(tmp_path / name, files))
        assert (
            found.may_lock_memory
            and said(found, "SD card", "a third")
            and not said(found, "memlock")
        )


def test_the_line_to_add_where_cmdline_txt_is_elsewhere(tmp_path):
    files = {k: v for k, v in PI_OS.items() if not k.startswith("boot")}
    assert said(
        report(machine(tmp_path / "a", files)),
        "append cgroup_enable=memory to the one line of /boot/firmware/cmdline.txt",
    )
    assert said(
        report(machine(tmp_path / "b", {**files, "boot/cmdline.txt": "x"})),
        "' /boot/cmdline.txt && sudo reboot",
    )
    assert said(
        report(machine(tmp_path / "c", {**files, "proc/device-tree/model": "Some Board\0"})),
        "kernel's command line",
    )


def test_a_healthy_laptop_gets_no_advice(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 100 * GiB}))
    assert (
        report(machine(tmp_path, {"proc/cpuinfo": X86, "proc/cgroups": "memory 0 80 1\n"})).advice
        == ()
    )


def test_a_build_for_a_lesser_cpu_is_seen(tmp_path):
    found = report(machine(tmp_path, {**PI_OS}), repacks=("Q4_0",))
    assert said(
        found,
        "built for a lesser CPU",
        "IQ4_NL",
        "Q8_0",
        "pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python",
    )


def test_a_gpu_without_a_build_for_it(tmp_path):
    root = machine(
        tmp_path,
        {
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
            "dev/nvhost-gpu": "",
            "proc/cgroups": "memory 0 80 1\n",
        },
    )
    assert said(
        report(root), "There is a GPU (NVIDIA Jetson GPU", "CMAKE_ARGS=-DGGML_CUDA=on pip install"
    )
    assert not said(report(root, gpu=True), "There is a GPU")


def test_limits_quota_governor_and_disk(tmp_path, monkeypatch):
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a\n",
            "proc/self/mountinfo": V2_MOUNT,
            "sys/fs/cgroup/a/memory.max": f"{GiB}",
            "sys/fs/cgroup/a/cpu.max": "200000 100000",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_driver": "cpufreq-dt\n",
            "proc/cgroups": "memory 0 80 1\n",
        },
    )
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": GiB}))
    found = report(root)
    assert (
        said(found, "at most 1.00 GiB (a cgroup limit)")
        and said(found, "2 of 4 CPUs")
        and said(found, "governor powersave", "tee")
    )
    assert said(found, "1.00 GiB are free for models", "EDGE_GEMMA_HOME")
    assert said(report(root, can_release=False), "cannot give cold pages back")
    (root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_driver").write_text("intel_pstate\n")
    assert not said(report(root), "governor")


def test_what_is_not_installed(tmp_path):
    found = report(
        machine(tmp_path, {}), have=lambda name: name not in ("sounddevice", "lib:portaudio", "av")
    )
    extras = {extra.name: extra for extra in found.extras}
    assert (
        extras["hear"].missing_packages == ("sounddevice", "av")
        and extras["video"].missing_packages == ("av",)
        and not extras["see"].missing_packages
    )
    assert not said(found, "apt-get")
    assert said(
        report(machine(tmp_path, {}), have=lambda name: name != "lib:portaudio"),
        "For audio input: sudo apt-get install libportaudio2",
    )


def test_the_packages_of_an_extra_are_those_of_the_metadata(monkeypatch):
    lines = [
        "numpy>=2.0",
        "psutil>=6; sys_platform != 'no such system'",
        'onnx>=1.17; extra == "convert"',
        "pywin32; sys_platform == 'no such system' and extra == 'convert'",
        'av>=14; extra == "video"',
    ]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: lines)
    assert required_packages("convert") == ("onnx",)
    assert required_packages("video") == ("av",) and required_packages("see") == ()
    found = examine(have=lambda name: name != "onnx")
    assert {e.name: e.missing_packages for e in found.extras} == {"video": (), "convert": ("onnx",)}


def test_every_extra_that_the_package_offers_has_a_purpose():
    offered = importlib.metadata.metadata("edge-gemma").get_all("Provides-Extra")
    assert set(offered) <= set(PURPOSES) | {"all", "dev"}


def test_without_llama(tmp_path):
    def absent():
        raise MissingExtra("Decoding", "all")

    found = examine(machine(tmp_path, {}), llama=absent)
    assert found.llama is None and said(
        found, "llama.cpp cannot be used: Decoding needs a package", "pip install llama-cpp-python"
    )


def test_llama_is_asked():
    found = ask_llama()
    assert found.version and set(found.repacks) == set(
        expected_repacks(dataclasses.replace(probe(), cpu_features=tuple(build_features())))
    ) - {"Q1_0"}


# ---- on the command line


def test_doctor_on_the_command_line():
    shown = runner.invoke(cli.app, ["doctor"])
    assert (
        shown.exit_code == 0
        and "for a model" in shown.stdout
        and "copied into repacked buffers" in shown.stdout
    )
    data = json.loads(runner.invoke(cli.app, ["doctor", "--json"]).stdout)
    assert data["device"]["usable_bytes"] <= data["device"]["total_bytes"] and isinstance(
        data["advice"], list
    )


def test_profiles_on_the_command_line():
    shown = runner.invoke(cli.app, ["profiles"]).stdout.splitlines()
    assert (
        shown[1].startswith("pi-zero-2w-512mb ")
        and shown[1].endswith("nothing")
        and max(map(len, shown)) < 100
    )
    data = json.loads(runner.invoke(cli.app, ["profiles", "--json"]).stdout)["profiles"]
    assert {d["name"]: d["usable_bytes"] for d in data}["pi-5-4gb"] == load_profile(
        "pi-5-4gb"
    ).usable_bytes
    one = runner.invoke(cli.app, ["profiles", "jetson-orin-nano-8gb"]).stdout
    assert "CMAKE_ARGS=-DGGML_CUDA=on" in one and "source" in one
    assert (
        json.loads(runner.invoke(cli.app, ["profiles", "auto", "--json"]).stdout)["name"] == "auto"
    )
    with pytest.raises(UsageError, match="no device profile 'pi-6'"):
        runner.invoke(cli.app, ["profiles", "pi-6"], catch_exceptions=False)
