"""serve: the model for programs that are not Python."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_gemma.cli.common import BundleArg, LoadingLine, note, open_bundle, parse_scaled
from edge_gemma.cli.options import LOADING, LoadingOptions, grouped
from edge_gemma.cli.serve_unit import PrintUnitOption, show_unit
from edge_gemma.cli.serve_wyoming import (
    EndpointOption,
    SystemOption,
    ToNetworkOption,
    WyomingChoice,
    WyomingOption,
    ZeroconfOption,
)
from edge_gemma.units import format_bytes

if TYPE_CHECKING:
    from edge_gemma.model import Model

HostOption = Annotated[
    str,
    typer.Option(
        "--host",
        help="The address to listen on. Others than this machine's own loopback need --token-file.",
    ),
]
PortOption = Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")]
TokenFileOption = Annotated[
    Path | None,
    typer.Option("--token-file", help="A file with a token a line; requests need one of them."),
]
ParallelOption = Annotated[
    int, typer.Option("--parallel", min=1, max=64, help="Answers generated at the same time.")
]
QueueOption = Annotated[
    int, typer.Option("--queue", min=0, help="Requests that may wait; more are refused.")
]
StopOption = Annotated[
    float,
    typer.Option("--stop-seconds", min=0, help="How long answers may go on after SIGTERM."),
]


KeepAliveOption = Annotated[
    str,
    typer.Option(
        "--keep-alive",
        help="How long the model stays in memory after a request that does not say so: 5m, 1h30m, "
        "0: not at all, -1: always.",
    ),
]
GuardOption = Annotated[
    Path | None,
    typer.Option(
        "--guard",
        help="A TOML file: rates, limits, content rules, audit log, usage, CORS (docs/serve.md).",
    ),
]
WatchOption = Annotated[
    Path | None,
    typer.Option("--watch", help="A TOML file: alerts, samples of quality (docs/serve.md)."),
]
CertOption = Annotated[
    Path | None, typer.Option("--tls-cert", help="Speak TLS with this certificate (PEM).")
]
KeyOption = Annotated[Path | None, typer.Option("--tls-key", help="The certificate's key (PEM).")]
RootPathOption = Annotated[
    str, typer.Option("--root-path", help="The prefix under which a proxy has the server.")
]


AllowPullOption = Annotated[
    bool, typer.Option("--allow-pull", help="Let clients install models by /api/pull.")
]


def register(app: typer.Typer) -> None:
    app.command("serve")(grouped(serve))


def serve(
    bundle: BundleArg,
    host: HostOption = "127.0.0.1",
    port: PortOption = 11434,
    token_file: TokenFileOption = None,
    parallel: ParallelOption = 1,
    queue: QueueOption = 32,
    stop_s: StopOption = 10.0,
    keep_alive: KeepAliveOption = "-1",
    allow_pull: AllowPullOption = False,
    guard: GuardOption = None,
    watch: WatchOption = None,
    tls_cert: CertOption = None,
    tls_key: KeyOption = None,
    root_path: RootPathOption = "",
    wyoming: WyomingOption = None,
    wyoming_to_network: ToNetworkOption = False,
    wyoming_endpoint: EndpointOption = False,
    wyoming_system: SystemOption = None,
    zeroconf: ZeroconfOption = None,
    print_unit: PrintUnitOption = False,
    loading: LoadingOptions = LOADING,
) -> None:
    """Serve a bundle to OpenAI, Ollama and Wyoming clients.

    Until Ctrl-C. Nothing is opened before the plan says that it fits.
    """
    from edge_gemma.bundles.folder import Bundle
    from edge_gemma.engines.llama import library as llama
    from edge_gemma.errors import MissingExtra
    from edge_gemma.model import load, plan_bundle

    try:
        from edge_gemma.serve.guard import shield
        from edge_gemma.serve.guard.settings import GuardSettings
        from edge_gemma.serve.http import Address
        from edge_gemma.serve.http import serve as serve_model
        from edge_gemma.serve.residence import parse_keep_alive
        from edge_gemma.serve.watch.settings import Watch
    except ImportError:
        raise MissingExtra("Serving", "serve") from None

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    address = Address(host, port, token_file, tls_cert, tls_key, root_path)
    address.check()
    keep_alive_s = parse_keep_alive(keep_alive)
    settings = GuardSettings() if guard is None else GuardSettings.read(guard)
    llama.set_verbose(loading.verbose)
    found = open_bundle(bundle)
    voice = WyomingChoice.parse(
        wyoming, wyoming_to_network, zeroconf, wyoming_endpoint, wyoming_system
    )
    n_urgent = 1 if voice is not None and found.manifest.audio is not None else 0
    request = dataclasses.replace(loading.request(structured=True), n_seq_max=parallel + n_urgent)
    watching = Watch() if watch is None else Watch.read(watch)
    judges = shield.plan_shields(settings.models, loading.device, loading.threads)
    request = shield.beside(request, judges, loading.device)
    planned = plan_bundle(found, device=loading.device, request=request).require()
    if print_unit:
        to_network = wyoming_to_network or not address.is_local
        needed_bytes = planned.needed_bytes + shield.shield_bytes(judges)
        show_unit(bundle, found.folder, needed_bytes, to_network=to_network)
        return
    opened = address.open()  # before minutes of loading: the port may be taken
    with opened, ExitStack() as stack:
        doors = [] if voice is None else [voice.door(stack, n_urgent > 0)]
        guarding = settings.open()
        limits = dataclasses.replace(guarding.limits, allow_pull=allow_pull)
        guarding = dataclasses.replace(guarding, limits=limits)
        stack.callback(guarding.close)

        def opened_model(on_progress: Callable[[float], bool | None] | None = None) -> Model:
            return load(
                Bundle.open(found.folder),  # it may have gone since
                device=loading.device,
                request=request,
                lora=[parse_scaled(text, "--lora") for text in loading.lora or ()],
                on_progress=on_progress,
            )

        with LoadingLine() as line:
            model = opened_model(line.fraction)
        rules = shield.opened_shields(settings.models, loading.device, loading.threads)
        guarding = guarding.with_rules(stack.enter_context(rules))
        plan = model.plan
        for text in (*plan.concessions, *plan.notes):
            note(f"plan: {text}")
        memory = format_bytes(plan.total_bytes + shield.shield_bytes(judges))
        what = f"{found.manifest.name}, {parallel} at a time, {memory} planned"

        def ready(url: str) -> None:
            note(f"ready: {url} serves {what}; Ctrl-C ends")

        if serve_model(
            model,
            address,
            opened,
            max_waiting=queue,
            n_urgent=n_urgent,
            guarding=guarding,
            watch=watching,
            stop_s=stop_s,
            doors=doors,
            reopen=opened_model,
            keep_alive_s=keep_alive_s,
            on_ready=ready,
        ):
            model.close()
    note("stopped")
