"""serve --wyoming …: the options, and the door they open."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from edge_gemma.cli.common import note

if TYPE_CHECKING:
    from edge_gemma.serve.bodies import Server
    from edge_gemma.serve.http import Door
    from edge_gemma.serve.wyoming_door import WyomingAddress

WyomingOption = Annotated[
    str | None,
    typer.Option(
        "--wyoming",
        help="Speak Wyoming (Home Assistant's voice) here, too: tcp://127.0.0.1:10300 or "
        "unix:///PATH.",
    ),
]
ToNetworkOption = Annotated[
    bool,
    typer.Option(
        "--wyoming-to-network",
        help="Let other machines in by Wyoming, which has neither tokens nor encryption.",
    ),
]
EndpointOption = Annotated[
    bool,
    typer.Option(
        "--wyoming-endpoint",
        help="Send a transcript when the first utterance ends; else when the client stops.",
    ),
]
SystemOption = Annotated[
    str | None,
    typer.Option("--wyoming-system", help="What Wyoming's conversations are told first."),
]
ZeroconfOption = Annotated[
    str | None,
    typer.Option("--zeroconf", help="The name by which Home Assistant finds --wyoming."),
]


@dataclasses.dataclass(frozen=True)
class WyomingChoice:
    """What --wyoming and its companions ask for."""

    address: WyomingAddress
    endpoint: bool
    system: str | None

    @classmethod
    def parse(
        cls,
        uri: str | None,
        to_network: bool,
        zeroconf: str | None,
        endpoint: bool,
        system: str | None,
    ) -> WyomingChoice | None:
        from edge_gemma.errors import MissingExtra, UsageError

        if uri is None:
            if to_network or zeroconf or endpoint or system:
                raise UsageError(
                    "--zeroconf and --wyoming-… need --wyoming, for instance tcp://127.0.0.1:10300"
                )
            return None
        try:
            from edge_gemma.serve.wyoming_door import WyomingAddress
        except ImportError:
            raise MissingExtra("Wyoming", "serve") from None
        address = WyomingAddress.parse(uri, to_network=to_network, discoverable=zeroconf)
        return cls(address, endpoint, system)

    def door(self, sockets: contextlib.ExitStack, hears: bool) -> Door:
        """The socket, bound now, and what answers on it."""
        from edge_gemma.serve.wyoming import Wyoming
        from edge_gemma.serve.wyoming_door import serving
        from edge_gemma.serve.wyoming_info import Senses, installed_voices, installed_wake_words

        opened = sockets.enter_context(self.address.open())
        senses = Senses(hears, self.endpoint, installed_voices(), installed_wake_words())
        note(f"wyoming: {self.address.bound(opened)} (no tokens, no encryption): {senses.told()}")
        if not hears:
            note("wyoming: this bundle has no audio encoder, so it does not hear")

        def door(server: Server) -> contextlib.AbstractAsyncContextManager[None]:
            return serving(Wyoming(server, senses, system=self.system), self.address, opened)

        return door
