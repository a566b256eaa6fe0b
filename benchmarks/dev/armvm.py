"""A 64-bit Arm board in a virtual machine: real memory figures, emulated speed.

    python -m edge_gemma.benchmarks.dev.armvm ACTION DIR

    build                  a Debian arm64 machine with everything edge-gemma needs (once, minutes)
    memory [MODEL…]        270M, E2B (with and without ears) and E4B under hard limits: planned
                           against measured
    test [PYTEST…]         the core of the test suite on arm64
    run DIR -- COMMAND…    anything else, as root, with this checkout on its Python path

In: this checkout and Debian's packages. Out: lines from the machine's console. A Cortex-A76 (the
Raspberry Pi 5's core) under QEMU with a real Linux, real cgroup v2 limits and a real OOM killer.
Memory is what a board of that kernel and page size takes; tokens per second here say nothing about
any board, so nothing in this file prints one.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from edge_gemma.benchmarks.sections import Row, in_mib, markdown_table, signed
from edge_gemma.errors import RuntimeFailure, UsageError
from edge_gemma.units import GiB, MiB, format_bytes, parse_bytes

RELEASE, PYTHON = "bookworm", "3.11"  # Debian 12 and its Python; Raspberry Pi OS is built on it
PACKAGES = (
    "python3,busybox-static,linux-image-cloud-arm64,libgomp1,libstdc++6,libportaudio2,libasound2,"
    "ca-certificates"
)
TOOLS = {
    "debootstrap": "debootstrap",
    "qemu-system-aarch64": "qemu-system-arm",
    "cpio": "cpio",
    "mke2fs": "e2fsprogs",
    "dpkg": "dpkg",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
}
# Cortex-A76: dot product and half floats, no i8mm
CROSS = (
    "-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 "
    "-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc "
    "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DGGML_NATIVE=OFF "
    "-DGGML_CPU_ARM_ARCH=armv8.2-a+dotprod+fp16"
)
RESULT = "RESULT "  # a console line that carries JSON

# First process of the initial RAM disk: waits for the disk that calls itself "root" and goes there.
_EARLY_INIT = """#!/bin/busybox sh
B=/bin/busybox
for m in virtio virtio_ring virtio_mmio virtio_blk; do $B insmod /modules/$m.ko; done
$B mount -t devtmpfs dev /dev; $B mount -t sysfs sys /sys
while :; do for d in /sys/block/vd*; do
  [ "$($B cat $d/serial 2>/dev/null)" = root ] || continue
  $B mount -t ext4 /dev/${d##*/} /new && $B umount /sys && exec $B switch_root /new /board-init
done; $B sleep 0.1; done
"""

# First process of the machine: mounts what Linux needs, unpacks the job, runs it, switches the
# machine off.
_INIT = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TMPDIR=/var/tmp LANG=C.UTF-8
export PYTHONDONTWRITEBYTECODE=1
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t devtmpfs dev /dev 2>/dev/null; mkdir -p /dev/shm
mount -t tmpfs -o size=75% tmp /tmp; mount -t tmpfs shm /dev/shm
mount -o remount,rw /; ip link set lo up 2>/dev/null || busybox ip link set lo up
for d in /sys/block/vd*; do
  case "$(cat $d/serial)" in
    models) mount -t ext4 /dev/${d##*/} /models ;;
    job) mkdir -p /tmp/job; tar -x -C /tmp/job -f /dev/${d##*/} ;;
  esac
done
cd /tmp/job; export PYTHONPATH=/tmp/job:/site; sh ./job.sh; echo "JOB_STATUS=$?"
sync; echo o > /proc/sysrq-trigger; sleep 60
"""


def build(folder: Path, *, say: Callable[[str], None] = print) -> None:
    """Make the machine in ``folder``. What is already there (wheels, the compiled llama.cpp) is
    used again.
    """
    if missing := [package for tool, package in TOOLS.items() if not shutil.which(tool)]:
        raise UsageError(
            "building the machine needs more tools. Type:  apt-get install "
            f"--no-install-recommends {' '.join(missing)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    site = folder / "site"
    wheels = folder / "wheels"
    wheels.mkdir(exist_ok=True)
    say("llama.cpp for aarch64 (compiled once, 4 to 10 minutes)")
    llama = _compile_llama(wheels)
    say("fetching aarch64 wheels")
    _fetch_wheels(wheels, _requirements(llama))
    shutil.rmtree(site, ignore_errors=True)
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    say("Debian arm64")
    _make_disk(folder, site)
    say(f"{folder / 'root.ext4'} is ready")


def _requirements(wheel: Path) -> list[str]:
    """What a wheel itself needs, its extras left out."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    return [
        line.removeprefix("Requires-Dist: ")
        for line in lines
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]


def _fetch_wheels(wheels: Path, more: Sequence[str]) -> None:
    """Everything the runtime and its tests import, but llama-cpp-python, which has no aarch64
    wheel.
    """
    project = _project()
    parts = project["project"]
    extras = parts["optional-dependencies"]
    wanted = [
        *parts["dependencies"],
        *extras["convert"],
        *extras["hear"],
        *extras["see"],
        *extras["sample"],
        "pytest",
        "hypothesis",
        "pytest-timeout",
    ]
    plain = [
        line
        for line in wanted
        if not line.startswith(("llama-cpp-python", "edge-gemma", "tomli", "sounddevice"))
    ]
    platforms = [
        f"--platform=manylinux_2_{minor}_aarch64" for minor in (36, 35, 34, 31, 28, 27, 26, 24, 17)
    ] + ["--platform=manylinux2014_aarch64"]
    _call(
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--only-binary=:all:",
        *platforms,
        f"--python-version={PYTHON}",
        "-d",
        str(wheels),
        *plain,
        "sounddevice",
        *more,
    )


def _compile_llama(wheels: Path) -> Path:
    if found := list(wheels.glob("llama_cpp_python-*.whl")):
        return found[0]
    wanted = next(
        line
        for line in _project()["project"]["dependencies"]
        if line.startswith("llama-cpp-python")
    )
    environment = {**os.environ, "CMAKE_ARGS": CROSS}
    with tempfile.TemporaryDirectory(dir=wheels) as fresh:
        # no cache: its tag would say the platform of this machine, and pip would take it for a
        # native build later on
        _call(
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-cache-dir",
            "--no-binary",
            "llama-cpp-python",
            "-w",
            fresh,
            wanted,
            env=environment,
        )
        (wheel,) = Path(fresh).glob("*.whl")
        return wheel.rename(wheels / wheel.name)


def _make_disk(folder: Path, site: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as work:
        root, ram = Path(work) / "root", Path(work) / "ram"
        mirror = sorted(
            {
                line
                for line in _call("apt-get", "indextargets", "--format", "$(REPO_URI)").split()
                if "security" not in line
            }
        )
        _call(
            "debootstrap",
            "--arch=arm64",
            "--variant=minbase",
            "--foreign",
            f"--include={PACKAGES}",
            RELEASE,
            str(root),
            *mirror[:1],
        )
        # --foreign only fetches; unpacking without running arm64 install scripts is enough for our
        # own init
        for package in sorted((root / "var/cache/apt/archives").glob("*.deb")):
            _call("dpkg", "-x", str(package), str(root))
            package.unlink()
        drivers = next((root / "lib/modules").iterdir()) / "kernel/drivers"
        for part in ("bin", "modules", "dev", "new", "sys"):
            (ram / part).mkdir(parents=True)
        shutil.copy(root / "bin/busybox", ram / "bin")
        for module in (
            "virtio/virtio",
            "virtio/virtio_ring",
            "virtio/virtio_mmio",
            "block/virtio_blk",
        ):
            shutil.copy(drivers / f"{module}.ko", ram / "modules")
        _script(ram / "init", _EARLY_INIT)
        names = "\n".join(str(path.relative_to(ram)) for path in [ram, *ram.rglob("*")])
        (folder / "ram.cpio").write_bytes(
            _call("cpio", "-o", "-H", "newc", "--quiet", cwd=ram, stdin=names.encode(), binary=True)
        )
        shutil.copy(next((root / "boot").glob("vmlinuz-*")), folder / "kernel")
        shutil.rmtree(root / "boot")
        shutil.rmtree(root / "lib/modules")
        (root / "models").mkdir()
        shutil.copytree(site, root / "site")
        _script(root / "board-init", _INIT)
        make_image(
            folder / "root.ext4", root, spare_bytes=8 * GiB
        )  # sparse: room for what tests write, which is discarded


def make_image(image: Path, folder: Path, *, spare_bytes: int = 64 * MiB) -> Path:
    """An ext4 disk image with the contents of ``folder``."""
    used = sum(path.lstat().st_size + 4096 for path in folder.rglob("*"))
    image.unlink(missing_ok=True)
    _call(
        "mke2fs",
        "-q",
        "-F",
        "-t",
        "ext4",
        "-m",
        "0",
        "-d",
        str(folder),
        str(image),
        f"{(used * 21 // 20 + spare_bytes) // MiB}M",
    )
    return image


def _script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def _project() -> dict:
    return tomllib.loads((_checkout() / "pyproject.toml").read_text())


def _checkout() -> Path:
    """The source tree this file belongs to; the machine gets a copy of it with every run."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / "pyproject.toml").is_file():
        raise UsageError(
            "the Arm machine is built from a source checkout; clone the repository and "
            "install it with pip install -e ."
        )
    return folder


def _call(*argv: str, env=None, cwd=None, stdin: bytes | None = None, binary: bool = False):
    done = subprocess.run(argv, env=env, cwd=cwd, input=stdin, capture_output=True)
    if done.returncode:
        tail = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()[-3:]
        raise RuntimeFailure(
            f"{Path(argv[0]).name} failed (status {done.returncode}): {' / '.join(tail)}"
        )
    return done.stdout if binary else done.stdout.decode(errors="replace")


# --- running ---


def _job(commands: str) -> bytes:
    """A tar of this checkout, laid out as it is installed, and the script to run."""
    source = _checkout()
    buffer = io.BytesIO()

    def clean(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if "__pycache__" in entry.name or entry.name.endswith(".onnx.data") else entry

    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(source / "edge_gemma", "edge_gemma", filter=clean)
        for room in ("benchmarks", "convert", "device_profiles"):
            archive.add(source / room, f"edge_gemma/{room}", filter=clean)
        for name in ("tests", "pyproject.toml"):
            if (source / name).exists():
                archive.add(source / name, name, filter=clean)
        script = commands.encode()
        entry = tarfile.TarInfo("job.sh")
        entry.size = len(script)
        archive.addfile(entry, io.BytesIO(script))
    return buffer.getvalue()


def boot(
    folder: Path,
    commands: str,
    *,
    memory_bytes: int = 4 * GiB,
    models: Path | None = None,
    cpus: int = 2,
    timeout_s: float = 3600,
) -> Iterator[str]:
    """Boot, run the shell script ``commands`` in a copy of this checkout, yield the console's
    lines; the machine is off at the end.

    ``models`` is an ext4 image mounted at /models. Writes to the disks are discarded. Raises
    RuntimeFailure unless the job ended with status 0.
    """
    if not (folder / "root.ext4").is_file():
        raise UsageError(
            f"no machine in {folder}; make one with: python -m edge_gemma.benchmarks.dev.armvm "
            f"build {folder}"
        )
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".tar") as job:
        job.write(_job(commands))
        job.flush()
        job.truncate(-(-job.tell() // 512) * 512)
        argv = [
            "qemu-system-aarch64",
            "-M",
            "virt",
            "-cpu",
            "cortex-a76",
            "-smp",
            str(cpus),
            "-m",
            f"{memory_bytes // MiB}M",
            "-accel",
            "tcg,thread=multi",
        ]
        argv += [
            "-kernel",
            str(folder / "kernel"),
            "-initrd",
            str(folder / "ram.cpio"),
            "-append",
            "console=ttyAMA0 quiet panic=-1 loglevel=4",
        ]
        for serial, image in ("root", folder / "root.ext4"), ("models", models), ("job", job.name):
            if image:
                argv += [
                    "-drive",
                    f"file={image},format=raw,if=none,id={serial},snapshot=on",
                    "-device",
                    f"virtio-blk-device,drive={serial},serial={serial}",
                ]
        argv += ["-nic", "none", "-nographic", "-no-reboot"]
        machine = subprocess.Popen(
            ["timeout", "--kill-after=5", str(timeout_s), *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        status, last = None, ""
        assert machine.stdout is not None
        try:
            for line in machine.stdout:
                line = line.rstrip("\r\n")
                if line.startswith("JOB_STATUS="):
                    status = int(line.removeprefix("JOB_STATUS="))
                else:
                    last = line or last
                    yield line
        finally:
            machine.terminate()
            machine.wait()
            machine.stdout.close()
    if status is None:
        raise RuntimeFailure(f"the machine stopped before its job ended; its last words: {last!r}")
    if status:
        raise RuntimeFailure(
            f"the job in the machine failed (status {status}); its last words: {last!r}"
        )


# The core: everything that needs no sound card, no long computation and no second program
CORE_TESTS = (
    "bundle",
    "caps",
    "decode",
    "device",
    "features",
    "gguf",
    "import",
    "memory",
    "plan",
    "session",
    "spans",
    "stream",
    "synthetic",
    "weights",
)


def test(folder: Path, arguments: Sequence[str]) -> Iterator[str]:
    """The core of the test suite on arm64."""
    chosen = list(arguments) or sorted(
        str(path.relative_to(_checkout()))
        for path in (_checkout() / "tests").glob("test_*.py")
        if any(word in path.stem for word in CORE_TESTS)
    )
    yield from boot(
        folder,
        "python3 -u -m pytest -vv --color=no --durations=15 -o cache_dir=/var/tmp/cache "
        f"--timeout=1200 {shlex.join(chosen)}\n",
        memory_bytes=6 * GiB,
        timeout_s=7200,
    )


# --- the memory benchmark ---

EARS, HEARD_S = "hear-e2b", 2.0  # E2B with ears hears so many seconds before the prompt
# (model of bundles.py, hard limit, n_ctx, prompt, tokens written); small, because every token is
# emulated
CASES = (
    ("270m", 420 * MiB, 512, 128, 16),
    ("270m", 1 * GiB, 2048, 256, 8),
    ("e2b", 2 * GiB, 1024, 48, 6),
    ("e2b", 2 * GiB, 2048, 48, 6),
    (EARS, 3 * GiB, 1024, 48, 4),
    ("e4b", 3 * GiB, 1024, 32, 4),
)


def memory(folder: Path, work: Path, names: Sequence[str], say: Callable[[str], None]) -> list[Row]:
    """Run :data:`CASES` on the board and return their rows: planned against measured, under a real
    limit.
    """
    from edge_gemma.benchmarks.presets import Runner

    runner, image = Runner(work=work, progress=say), folder / "models.ext4"
    work.mkdir(parents=True, exist_ok=True)
    rows = []
    # one at a time: the image of all would take 15 GB of disk
    for name in names or dict.fromkeys(case[0] for case in CASES):
        with tempfile.TemporaryDirectory(dir=work) as staging:
            shutil.copytree(runner.model(name), Path(staging) / name, copy_function=os.link)
            say(f"disk image of {name}")
            make_image(image, Path(staging))
        command = f"python3 -W ignore -m edge_gemma.benchmarks.dev.armvm guest {name}\n"
        lines = boot(folder, command, memory_bytes=6 * GiB, models=image, timeout_s=4 * 3600)
        try:
            for line in lines:
                if line.startswith(RESULT):
                    rows.append(json.loads(line.removeprefix(RESULT)))
                    say(row_text(rows[-1]))
                elif "Killed process" in line:
                    say(line)
        finally:
            image.unlink(missing_ok=True)
    return rows


def guest(names: Sequence[str]) -> None:
    """Inside the machine: one line of JSON for each case. Times are left out on purpose."""
    from edge_gemma.benchmarks.caps import Limits
    from edge_gemma.benchmarks.measure import measure
    from edge_gemma.benchmarks.memory import planned_row
    from edge_gemma.benchmarks.systems import Task

    for name, limit_bytes, n_ctx, n_prompt, n_predict in CASES:
        if name not in names:
            continue
        task = Task(
            "edge-gemma",
            f"/models/{name}",
            n_ctx=n_ctx,
            n_prompt=n_prompt,
            n_predict=n_predict,
            budget_bytes=limit_bytes,
            audio_s=HEARD_S if name == EARS else 0.0,
        )
        run = measure(task, Limits(limit_bytes), interval_s=0.2)
        outcome = run.outcome
        row: Row = {
            "model": name,
            "n_ctx": n_ctx,
            "limit_bytes": limit_bytes,
            "limit": outcome.kind,
            "outcome": outcome.describe(),
            "oom_kills": outcome.oom_kills,
            "max_usage_bytes": outcome.max_usage_bytes,
            "major_faults": outcome.major_faults,
        }
        if run.ok:
            row |= planned_row(name, n_ctx, run)
        else:
            row["error_tail"] = outcome.error_tail
        print(RESULT + json.dumps(row), flush=True)


def row_text(row: Row) -> str:
    head = (
        f"{row['model']}, n_ctx {row['n_ctx']}, under {format_bytes(row['limit_bytes'])} "
        f"({row['limit']}): {row['outcome']}"
    )
    if "peak_pss_bytes" not in row:
        return head
    return (
        f"{head}; planned {format_bytes(row['planned_peak_bytes'])}, measured PSS "
        f"{format_bytes(row['peak_pss_bytes'])} ({row['anon_bytes'] // MiB} MiB anonymous), off "
        f"by {row['error']:+.1%}"
    )


def memory_table(rows: Sequence[Row]) -> str:
    table = [
        [
            "model",
            "n_ctx",
            "hard limit MiB",
            "outcome",
            "OOM kills",
            "planned MiB",
            "measured PSS MiB",
            "anonymous MiB",
            "plan is off by",
        ]
    ]
    for row in rows:
        table.append(
            [
                row["model"],
                str(row["n_ctx"]),
                in_mib(row["limit_bytes"]),
                row["outcome"],
                str(row["oom_kills"]),
                in_mib(row.get("planned_peak_bytes")),
                in_mib(row.get("peak_pss_bytes")),
                in_mib(row.get("anon_bytes")),
                signed(row.get("error")),
            ]
        )
    title = "## On a Cortex-A76 in a virtual machine, Debian 12, 4 KiB pages, cgroup v2"
    return f"{title}\n\n{markdown_table(table)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["build", "memory", "test", "run", "guest"])
    parser.add_argument("folder", type=Path, nargs="?", default=Path())
    parser.add_argument(
        "rest",
        nargs="*",
        help="after --: the command (run), pytest's arguments (test), 270m e2b hear-e2b e4b "
        "(memory)",
    )
    parser.add_argument("--memory", default="4GiB", help="of the machine (run)")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "edge-gemma-bench",
        help="where the model files are made and kept (memory)",
    )
    parser.add_argument("--json", type=Path, help="write the rows here (memory)")
    options = parser.parse_intermixed_args()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # leave through boot's finally, so that no machine is left running
    if options.action == "build":
        build(options.folder, say=say)
    elif options.action == "test":
        for line in test(options.folder, options.rest):
            print(line, flush=True)
    elif options.action == "guest":
        guest([str(options.folder), *options.rest])
    elif options.action == "memory":
        rows = memory(options.folder, options.work, options.rest, say)
        print(memory_table(rows))
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
    elif options.action == "run":
        for line in boot(
            options.folder,
            shlex.join(options.rest) + "\n",
            memory_bytes=parse_bytes(options.memory),
        ):
            print(line, flush=True)


if __name__ == "__main__":
    try:
        main()
    except (UsageError, RuntimeFailure) as error:
        sys.exit(f"armvm: {error}")
