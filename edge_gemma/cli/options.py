"""Groups of options that several commands take: how a bundle is loaded, how an answer is sampled.

A command names a group as one parameter, ``loading: Loading = Loading()``; :func:`grouped` shows
typer its fields as options of their own and hands the command the group again. The default instance
gives the options' defaults, so a command may have its own: ``Sampling(max_tokens=1024)``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, get_type_hints

import typer

from edge_gemma.cli.common import DeviceOption, VerboseOption

if TYPE_CHECKING:
    from edge_gemma.bundles.manifest import Sense
    from edge_gemma.plan.records import PlanRequest


@dataclass(frozen=True)
class Planning:
    """What a plan is asked for."""

    device: DeviceOption = "auto"
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            help="Memory to stay inside, like 2GiB or 420MiB. Default: what the device has to "
            "give.",
        ),
    ] = None
    ctx: Annotated[
        int | None,
        typer.Option(
            "--ctx", help="Context in tokens. Default: up to 4096, less if that is what fits."
        ),
    ] = None
    ubatch: Annotated[
        int | None,
        typer.Option(
            "--ubatch", help="Tokens per prefill step. Default: 256, less if that is what fits."
        ),
    ] = None
    kv: Annotated[
        str | None, typer.Option("--kv", help="Type of the KV cache: f16, q8_0 or q4_0.")
    ] = None
    threads: Annotated[
        int | None,
        typer.Option("--threads", "-t", help="Threads. Default: the fast cores we may use."),
    ] = None
    repack: Annotated[
        bool | None,
        typer.Option(
            "--repack/--no-repack",
            help="Copy weights into the CPU's fast layout. Default: if that fits.",
        ),
    ] = None
    gpu_layers: Annotated[
        int | None,
        typer.Option(
            "--gpu-layers", help="Layers on the GPU, −1 for all; needs a llama.cpp built for it."
        ),
    ] = None

    def request(self, senses: tuple[Sense, ...] | None = None) -> PlanRequest:
        """``senses``: those the command will use; None: all the bundle has."""
        from edge_gemma.plan.records import PlanRequest
        from edge_gemma.units import parse_bytes

        budget_bytes = None if self.budget is None else parse_bytes(self.budget)
        return PlanRequest(
            budget_bytes=budget_bytes,
            n_ctx=self.ctx,
            n_ubatch=self.ubatch,
            kv_type=self.kv,
            n_threads=self.threads,
            repack=self.repack,
            n_gpu_layers=self.gpu_layers,
            senses=senses,
        )


@dataclass(frozen=True)
class Loading(Planning):
    """A plan, and what is loaded by it."""

    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", help="A LoRA adapter as GGUF, FILE or FILE:SCALE. Repeatable."),
    ] = None
    verbose: VerboseOption = False


@dataclass(frozen=True)
class Sampling:
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", help="Stop after this many tokens.")
    ] = 256
    temperature: Annotated[float, typer.Option("--temperature", "--temp", help="0 is greedy.")] = (
        1.0
    )
    top_k: Annotated[int, typer.Option("--top-k", help="0 turns it off.")] = 64
    top_p: Annotated[float, typer.Option("--top-p")] = 0.95
    min_p: Annotated[float, typer.Option("--min-p")] = 0.0
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", help="The same seed, prompt, settings and build give the same text."
        ),
    ] = None

    def options(self, **more):
        from edge_gemma.options import Sampling

        return Sampling(**vars(self), **more)


GROUPS = (Planning, Loading, Sampling)


def grouped(command: Callable) -> Callable:
    """``command`` for typer: each parameter whose type is a group stands for the group's fields."""
    hints = get_type_hints(command, include_extras=True)
    shown, groups = [], {}
    for name, parameter in inspect.signature(command).parameters.items():
        if hints[name] not in GROUPS:
            shown.append(parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY))
            continue
        groups[name] = parameter.default
        field_hints = get_type_hints(hints[name], include_extras=True)
        shown += [
            inspect.Parameter(
                f.name,
                parameter.KEYWORD_ONLY,
                default=getattr(parameter.default, f.name),
                annotation=field_hints[f.name],
            )
            for f in fields(hints[name])
        ]

    @functools.wraps(command)
    def call(**given):
        for name, default in groups.items():
            given[name] = replace(default, **{f.name: given.pop(f.name) for f in fields(default)})
        return command(**given)

    call.__signature__ = inspect.Signature(shown)
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return call
