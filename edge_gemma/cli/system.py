"""doctor and profiles: what this machine is, and which boards can be planned for."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

JSON = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def profile_names(incomplete: str) -> list[str]:
    """Shell completion: auto and the shipped profiles."""
    from edge_gemma.machine.device import profile_names as shipped

    return [name for name in ("auto", *shipped()) if name.startswith(incomplete)]


def register(app: typer.Typer) -> None:
    app.command()(doctor)
    app.command()(profiles)


def doctor(as_json: JSON = False) -> None:
    """What this machine has, what is installed, and what would make it serve better. Changes
    nothing.
    """
    from edge_gemma.cli.columns import columns
    from edge_gemma.doctor import examine, expected_repacks
    from edge_gemma.units import format_bytes

    report = examine()
    device = report.device
    if as_json:
        data = dataclasses.asdict(report) | {"store": str(report.store)}
        data["device"] |= {
            "usable_bytes": device.usable_bytes,
            "reserve_bytes": device.reserve_bytes,
            "expected_repacks": expected_repacks(device),
        }
        print(json.dumps(data))
        return
    limit = (
        "none"
        if device.limit_bytes is None
        else f"{format_bytes(device.limit_bytes)}, {format_bytes(device.headroom_bytes or 0)} of "
        "it left"
    )
    cpus = f"{device.cpu or 'unknown'}; {len(device.cpus)} to run on ({_ids(device.cpus)})"
    if device.big_cpus != device.cpus:
        cpus += f", the fast ones {_ids(device.big_cpus)}"
    swap = ", ".join(
        text
        for text in (
            f"{format_bytes(device.zram_bytes)} zram" * bool(device.zram_bytes),
            f"{format_bytes(device.swap_bytes)} on disk" * bool(device.swap_bytes),
        )
        if text
    )
    llama = report.llama
    rows = [
        ("machine", device.board),
        (
            "system",
            f"{report.system}, Python {report.python}, pages of {format_bytes(device.page_bytes)}",
        ),
        ("CPU", cpus),
        ("", f"features that matter: {' '.join(device.cpu_features) or 'none'}"),
        ("threads", str(device.n_threads)),
        (
            "memory",
            f"{format_bytes(device.total_bytes)}, available "
            f"{format_bytes(device.available_bytes)}, kept for the system "
            f"{format_bytes(device.reserve_bytes)}",
        ),
        ("cgroup limit", limit + ("" if device.memory_cgroup else " (memory cgroup off)")),
        ("swap", f"{swap} (not counted as memory)" if swap else "none"),
        (
            "for a model",
            f"{format_bytes(device.usable_bytes)}"
            + ("" if device.can_release else "; cold pages cannot be given back here"),
        ),
        (
            "llama.cpp",
            f"llama-cpp-python {llama.version}, {'with' if llama.gpu else 'without'} GPU"
            if llama
            else report.llama_problem,
        ),
    ]
    if llama:
        rows.append(
            ("", f"copied into repacked buffers: {' '.join(llama.repacks) or 'no weight type'}")
        )
    rows.append(("GPU", device.gpu or "no NVIDIA GPU"))
    for extra in report.extras:
        missing = (*extra.missing_packages, *extra.missing_libraries)
        rows.append(
            (
                extra.purpose,
                f"not installed: pip install 'edge-gemma[{extra.name}]' "
                f"({', '.join(missing)} missing)"
                if missing
                else "ready",
            )
        )
    rows.append(("microphones", ", ".join(report.microphones) or "none"))
    rows.append(
        (
            "store",
            f"{report.store}, {format_bytes(report.store_free_bytes)} "
            f"free{', on an SD card' * report.store_on_sd}",
        )
    )
    print(columns(rows))
    if report.advice:
        print("\nadvice")
        for line in report.advice:
            print(f"- {line}")


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
    as_json: JSON = False,
) -> None:
    """List the boards that `plan --device` knows, or show one."""
    from edge_gemma.doctor import expected_repacks
    from edge_gemma.machine.device import load_profile, profile_notes
    from edge_gemma.machine.device import profile_names as shipped
    from edge_gemma.machine.probe import find_device
    from edge_gemma.units import format_bytes

    def data(device):
        return dataclasses.asdict(device) | {
            "usable_bytes": device.usable_bytes,
            "reserve_bytes": device.reserve_bytes,
            "repacks": expected_repacks(device),
        }

    if name is not None:
        device = find_device(name)
        notes, sources = ((), ()) if name == "auto" else profile_notes(name)
        if as_json:
            print(json.dumps(data(device) | {"notes": notes, "sources": sources}))
            return
        print(f"{device.name}: {device.board}, {device.cpu}")
        print(
            f"memory    {format_bytes(device.usable_bytes)} for a model: "
            f"{format_bytes(device.available_bytes)} available of "
            f"{format_bytes(device.total_bytes)}, "
            f"{format_bytes(device.reserve_bytes)} kept for the system"
        )
        print(
            f"threads   {device.n_threads}; pages of {format_bytes(device.page_bytes)}; "
            f"{' '.join(device.cpu_features) or 'no CPU features that matter'}"
        )
        print(f"repacked  {' '.join(expected_repacks(device)) or 'nothing'}")
        if device.gpu:
            print(f"GPU       {device.gpu}")
        for label, lines in (("note", notes), ("source", sources)):
            for line in lines:
                print(f"{label:<9} {line}")
        return
    devices = [load_profile(name) for name in shipped()]
    if as_json:
        print(json.dumps({"profiles": [data(device) for device in devices]}))
        return
    from edge_gemma.cli.columns import columns

    rows = [("profile", "memory", "for a model", "threads", "pages", "llama.cpp repacks")]
    for device in devices:
        packs = " ".join(
            kind for kind in expected_repacks(device) if kind not in ("MXFP4", "Q1_0")
        )  # types no Gemma comes in
        rows.append(
            (
                device.name,
                format_bytes(device.total_bytes),
                format_bytes(device.usable_bytes),
                str(device.n_threads),
                format_bytes(device.page_bytes),
                packs or "nothing",
            )
        )
    print(columns(rows))
