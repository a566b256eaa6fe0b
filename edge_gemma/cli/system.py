"""doctor and profiles: what this machine is, and which boards can be planned for."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from edge_gemma.cli.common import JsonOption, print_json, profile_names, table
from edge_gemma.units import format_bytes

if TYPE_CHECKING:
    from edge_gemma.doctor import Report
    from edge_gemma.machine.device import Device

NO_GEMMA_TYPES = ("MXFP4", "Q1_0")  # weight types that no Gemma comes in


def register(app: typer.Typer) -> None:
    app.command()(doctor)
    app.command()(profiles)


def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine has, and what would help it. Changes nothing."""
    from edge_gemma.doctor import examine

    report = examine()
    if as_json:
        print_json(dataclasses.asdict(report) | {"device": _record(report.device)})
        return
    print(table([*_machine_rows(report), *_memory_rows(report.device), *_software_rows(report)]))
    if report.advice:
        print("\nadvice")
        for line in report.advice:
            print(f"- {line}")


def _record(device: Device) -> dict[str, object]:
    from edge_gemma.doctor import expected_repacks

    return dataclasses.asdict(device) | {
        "usable_bytes": device.usable_bytes,
        "reserve_bytes": device.reserve_bytes,
        "expected_repacks": expected_repacks(device),
    }


def _machine_rows(report: Report) -> list[tuple[str, str]]:
    device = report.device
    cpus = f"{device.cpu or 'unknown'}; {len(device.cpus)} to run on ({_ids(device.cpus)})"
    if device.big_cpus != device.cpus:
        cpus += f", the fast ones {_ids(device.big_cpus)}"
    pages = f"pages of {format_bytes(device.page_bytes)}"
    return [
        ("machine", device.board),
        ("system", f"{report.system}, Python {report.python}, {pages}"),
        ("CPU", cpus),
        ("", f"features that matter: {' '.join(device.cpu_features) or 'none'}"),
        ("threads", str(device.n_threads)),
    ]


def _memory_rows(device: Device) -> list[tuple[str, str]]:
    limit = "none"
    if device.limit_bytes is not None:
        left = format_bytes(device.headroom_bytes or 0)
        limit = f"{format_bytes(device.limit_bytes)}, {left} of it left"
    if not device.memory_cgroup:
        limit += " (memory cgroup off)"
    swaps = [(device.zram_bytes, "zram"), (device.swap_bytes, "on disk")]
    swap = ", ".join(f"{format_bytes(size)} {kind}" for size, kind in swaps if size)
    usable = format_bytes(device.usable_bytes)
    if not device.can_release:
        usable += "; pages of the file cannot be given back here"
    return [
        (
            "memory",
            f"{format_bytes(device.total_bytes)}, "
            f"available {format_bytes(device.available_bytes)}, "
            f"kept for the system {format_bytes(device.reserve_bytes)}",
        ),
        ("cgroup limit", limit),
        ("swap", f"{swap} (not counted as memory)" if swap else "none"),
        ("for a model", usable),
    ]


def _software_rows(report: Report) -> list[tuple[str, str]]:
    llama = report.llama
    rows = [("llama.cpp", report.llama_problem)]
    if llama:
        gpu = "with" if llama.gpu else "without"
        repacks = " ".join(llama.repacks) or "no weight type"
        rows = [
            ("llama.cpp", f"llama-cpp-python {llama.version}, {gpu} GPU"),
            ("", f"copied into repacked buffers: {repacks}"),
        ]
    rows.append(("GPU", report.device.gpu or "no NVIDIA GPU"))
    for extra in report.extras:
        missing = ", ".join((*extra.missing_packages, *extra.missing_libraries))
        state = "ready"
        if missing:
            line = f"pip install 'edge-gemma[{extra.name}]'"
            state = f"not installed: {line} ({missing} missing)"
        rows.append((extra.purpose, state))
    card = ", on an SD card" if report.store_on_sd else ""
    free = format_bytes(report.store_free_bytes)
    rows.append(("microphones", ", ".join(report.microphones) or "none"))
    if report.sound_server:
        server = report.sound_server
        pair = server.echo_cancelled
        echo = "its echo canceller is not loaded (listen brings its own)"
        if pair:
            echo = f"takes the echo out of {pair.source} and {pair.sink}"
        rows.append(("sound server", f"{server.name}; {echo}"))
    rows.append(("store", f"{report.store}, {free} free{card}"))
    return rows


def _ids(cpus: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) → "0-2,5"."""
    runs: list[list[int]] = []
    for cpu in cpus:
        if runs and runs[-1][1] == cpu - 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def profiles(
    name: Annotated[
        str | None,
        typer.Argument(
            help="One profile (or FILE.toml, or auto) in detail.", autocompletion=profile_names
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the boards that `plan --device` knows, or show one."""
    if name is not None:
        _show_profile(name, as_json)
        return
    from edge_gemma.machine.device import load_profile
    from edge_gemma.machine.device import profile_names as shipped

    devices = [load_profile(name) for name in shipped()]
    if as_json:
        print_json({"profiles": [_profile_record(device) for device in devices]})
        return
    head = ("profile", "memory", "for a model", "threads", "pages", "llama.cpp repacks")
    print(table([head, *map(_profile_row, devices)], right=(1, 2, 3, 4)))


def _profile_record(device: Device) -> dict[str, object]:
    record = _record(device)
    return record | {"repacks": record["expected_repacks"]}


def _profile_row(device: Device) -> tuple[str, ...]:
    from edge_gemma.doctor import expected_repacks

    repacks = [kind for kind in expected_repacks(device) if kind not in NO_GEMMA_TYPES]
    return (
        device.name,
        format_bytes(device.total_bytes),
        format_bytes(device.usable_bytes),
        str(device.n_threads),
        format_bytes(device.page_bytes),
        " ".join(repacks) or "nothing",
    )


def _show_profile(name: str, as_json: bool) -> None:
    from edge_gemma.doctor import expected_repacks
    from edge_gemma.machine.device import profile_notes
    from edge_gemma.machine.probe import find_device

    device = find_device(name)
    notes, sources = ((), ()) if name == "auto" else profile_notes(name)
    if as_json:
        print_json(_profile_record(device) | {"notes": notes, "sources": sources})
        return
    usable, available, total, reserve = map(
        format_bytes,
        (device.usable_bytes, device.available_bytes, device.total_bytes, device.reserve_bytes),
    )
    features = " ".join(device.cpu_features) or "no CPU features that matter"
    pages = format_bytes(device.page_bytes)
    rows = [
        (
            "memory",
            f"{usable} for a model: {available} available of {total}, "
            f"{reserve} kept for the system",
        ),
        ("threads", f"{device.n_threads}; pages of {pages}; {features}"),
        ("repacked", " ".join(expected_repacks(device)) or "nothing"),
    ]
    if device.gpu:
        rows.append(("GPU", device.gpu))
    rows += [("note", line) for line in notes]
    rows += [("source", line) for line in sources]
    print(f"{device.name}: {device.board}, {device.cpu}")
    print(table(rows))
