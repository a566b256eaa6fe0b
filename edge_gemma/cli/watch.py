"""stats: what a running server tells about its last requests."""

from __future__ import annotations

from typing import Annotated

import typer

from edge_gemma.cli.common import JsonOption, print_json, table
from edge_gemma.units import format_bytes

_TIMES = {
    "queue_s": "waited",
    "ttft_s": "first token",
    "time_per_token_s": "per token",
    "duration_s": "whole answer",
    "real_time_factor": "real-time factor",
}


def register(app: typer.Typer) -> None:
    app.command()(stats)


def stats(
    url: Annotated[
        str, typer.Argument(metavar="[URL]", help="The server's address.")
    ] = "http://127.0.0.1:11434",
    token: Annotated[
        str | None,
        typer.Option("--token", envvar="EDGE_GEMMA_TOKEN", help="Where the server wants one."),
    ] = None,
    answers: Annotated[
        bool, typer.Option("--answers", help="With --json: every answer that is kept, too.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show percentiles and the success rate of a server's requests."""
    found = _fetched(f"{url.rstrip('/')}/stats{'?answers' if answers else ''}", token)
    if as_json:
        print_json(found)
        return
    rate = found["success_rate"]
    counts = ", ".join(f"{found[name]} {name}" for name in ("ok", "busy", "failed", "left"))
    shown = "unknown" if rate is None else f"{100 * rate:.1f} %"
    print(f"success {shown}: {counts}, {found['client_error']} refused for what they were")
    speed = found["median_tok_s"]
    tokens = f"{found['prompt_tokens']} tokens in, {found['completion_tokens']} out"
    print(f"{found['answers']} answers, {tokens}" + (f", {speed:.1f} tok/s" if speed else ""))
    rows = [
        (name, *(f"{found[key][p]:.3f}" for p in ("p50", "p90", "p95", "p99")))
        for key, name in _TIMES.items()
        if found[key]
    ]
    if rows:
        print(table([("seconds", "p50", "p90", "p95", "p99"), *rows], right=(1, 2, 3, 4)))
    memory = found["memory"]
    planned = format_bytes(memory["planned_bytes"])
    print(f"memory {format_bytes(memory['pss_bytes'])} of {planned} planned")
    for name in found["alerts"]:
        print(f"alert {name}")
    for name, value in (found["quality"] or {}).items():
        print(f"quality {name} {'unknown' if value is None else f'{value:.4g}'}")


def _fetched(address: str, token: str | None) -> dict:
    """Raises RuntimeFailure, UsageError."""
    import http.client
    import json
    import urllib.error
    import urllib.request

    from edge_gemma.errors import RuntimeFailure, UsageError

    if not address.startswith(("http://", "https://")):
        raise UsageError(f"{address!r} is no address; expected one like http://127.0.0.1:11434")
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    try:
        request = urllib.request.Request(address, headers=headers)
        with urllib.request.urlopen(request, timeout=10) as response:
            found = json.loads(response.read())
    except urllib.error.HTTPError as error:
        error.close()
        hint = "; give --token" if error.code == 401 else ""
        raise RuntimeFailure(f"{address} answered {error.code}{hint}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise RuntimeFailure(f"{address} cannot be asked: {error}") from None
    if not isinstance(found, dict) or "success_rate" not in found:
        raise RuntimeFailure(f"{address} is no edge-gemma server's")
    return found
