"""Groups of options that several commands take: how a bundle is planned and loaded, how an answer
is sampled.

A command names a group as one parameter, ``loading: LoadingOptions = LOADING``;
:func:`grouped` shows typer its fields as options of their own and hands the command the group
again. The default instance
gives the options' defaults, so a command may have its own: ``SamplingOptions(max_tokens=1024)``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args, get_type_hints

import typer

from edge_gemma.cli.common import (
    INTERRUPTED,
    BudgetOption,
    ContextOption,
    DeviceOption,
    LevelOption,
    ThreadsOption,
    VerboseOption,
    note,
    open_bundle,
)
from edge_gemma.cli.personas import TellingOptions
from edge_gemma.sources import typed

if TYPE_CHECKING:
    from edge_gemma.bundles.manifest import Sense
    from edge_gemma.options import Sampling
    from edge_gemma.plan.records import Encoders, EngineChoice, Level, PlanRequest


@dataclass(frozen=True)
class PlanningOptions:
    """What a plan is asked for."""

    device: DeviceOption = "auto"
    budget: BudgetOption = None
    ctx: ContextOption = None
    level: LevelOption = "balanced"
    ubatch: Annotated[
        int | None,
        typer.Option(
            "--ubatch", help="Tokens per prefill step. Default: 256, less if that is what fits."
        ),
    ] = None
    kv: Annotated[
        str | None, typer.Option("--kv", help="Type of the KV cache: f16, q8_0 or q4_0.")
    ] = None
    threads: ThreadsOption = None
    repack: Annotated[
        bool | None,
        typer.Option(
            "--repack/--no-repack",
            help="Copy weights into the CPU's fast layout. Default: if that fits.",
        ),
    ] = None
    rescore: Annotated[
        bool | None,
        typer.Option(
            "--rescore/--no-rescore",
            help="Score the best candidates of a coarse output head again with the finer token "
            "embedding. Default: where the bundle has both.",
        ),
    ] = None
    encoders: Annotated[
        str | None,
        typer.Option(
            "--encoders",
            help="When the audio and vision encoders are in memory: resident, one-at-a-time, or "
            "hear-first, each before the decoder's weights are read again. Default: what fits, in "
            "that order.",
        ),
    ] = None
    gpu_layers: Annotated[
        int | None,
        typer.Option(
            "--gpu-layers", help="Layers on the GPU, −1 for all; needs a llama.cpp built for it."
        ),
    ] = None
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            help="llama (llama.cpp runs the GGUF), or onnx (onnxruntime runs decoder.onnx, where "
            "the bundle holds one). auto: what `edge-gemma tune` found faster here, else llama.",
        ),
    ] = "auto"
    prompt_cache: Annotated[
        bool,
        typer.Option(
            "--prompt-cache/--no-prompt-cache",
            help="Keep prefilled prompts, in memory and in ~/.cache/edge-gemma/prompts, so that "
            "what begins alike starts at once.",
        ),
    ] = True
    drafts: Annotated[
        bool,
        typer.Option(
            "--drafts/--no-drafts",
            help="Propose what stands in the text already and verify it in one pass, where that "
            "pays.",
        ),
    ] = True

    def request(
        self, senses: tuple[Sense, ...] | None = None, *, structured: bool = False
    ) -> PlanRequest:
        """``senses``: those the command will use; None: all the bundle has. ``structured``: answers
        will be held to a schema.
        """
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
            rescore=self.rescore,
            senses=senses,
            encoders=_encoders(self.encoders),
            prompt_cache_bytes=None if self.prompt_cache else 0,
            n_draft=None if self.drafts else 0,
            structured=structured,
            level=cast("Level", self.level),  # the plan checks it
            engine=cast("EngineChoice", self.engine),
        )


def _encoders(name: str | None) -> Encoders | None:
    """As the plan calls it. Raises UsageError."""
    from edge_gemma.errors import UsageError
    from edge_gemma.plan.records import Encoders

    names = {value.replace(" ", "-"): value for value in get_args(Encoders)}
    if name is not None and name not in names:
        raise UsageError(f"--encoders {name} is unknown; expected one of {', '.join(names)}")
    return None if name is None else names[name]


@dataclass(frozen=True)
class LoadingOptions(PlanningOptions):
    """A plan, and what is loaded by it."""

    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", help="A LoRA adapter as GGUF, FILE or FILE:SCALE. Repeatable."),
    ] = None
    verbose: VerboseOption = False


AUTHORS = "Default: as the model's authors say, else"


@dataclass(frozen=True)
class SamplingOptions:
    """How an answer is sampled."""

    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", help="Stop after this many tokens.")
    ] = 256
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", "--temp", help=f"0 is greedy. {AUTHORS} 1."),
    ] = None
    top_k: Annotated[int | None, typer.Option("--top-k", help=f"0 turns it off. {AUTHORS} 64.")] = (
        None
    )
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            help=f"Sample from the likeliest tokens that hold this share; 1: all. {AUTHORS} 0.95.",
        ),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            "--min-p",
            help=f"Leave out tokens less likely than this share of the best; 0: none. {AUTHORS} 0.",
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", help="The same seed, prompt, settings and build give the same text."
        ),
    ] = None

    def sampling(self, bundle: str) -> Sampling:
        """As asked; the rest is as the authors of the bundle sample it. Raises BundleError,
        UsageError.
        """
        from edge_gemma.model import bundle_sampling

        given = {name: value for name, value in vars(self).items() if value is not None}
        return bundle_sampling(open_bundle(bundle).manifest, **given)


PLANNING = PlanningOptions()
LOADING = LoadingOptions()
SAMPLING = SamplingOptions()
GROUPS = (PlanningOptions, LoadingOptions, SamplingOptions, TellingOptions)


def shown_as(call: Callable[..., None], parameters: list[inspect.Parameter]) -> Callable[..., None]:
    """``call`` with the signature that typer is to see."""
    setattr(call, "__signature__", inspect.Signature(parameters))  # noqa: B010  (no such attribute in Callable)
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` for typer: each parameter whose type is a group stands for the group's fields."""
    hints = get_type_hints(command, include_extras=True)
    shown: list[inspect.Parameter] = []
    groups: dict[str, PlanningOptions | SamplingOptions | TellingOptions] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        if hints[name] in GROUPS:
            groups[name] = parameter.default
            shown += _field_parameters(parameter.default)
        else:
            shown.append(parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def call(**given: Any) -> None:
        for name, default in groups.items():
            values = {field.name: given.pop(field.name) for field in fields(default)}
            given[name] = replace(default, **values)
        command(**given)

    return shown_as(call, shown)


def _field_parameters(
    group: PlanningOptions | SamplingOptions | TellingOptions,
) -> list[inspect.Parameter]:
    hints = get_type_hints(type(group), include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=getattr(group, field.name),
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]


# parameters that are text because they may be something else than a path: a bundle's name, a data
# URI, a recipe
_MAYBE_PATHS = frozenset(
    """audio base bundle bundles checkpoint dataset device file image other quant reference slice
    voice""".split()
)


def with_typed_paths(name: str, value: Any) -> Any:
    """A parameter's value with its paths read as a person types them: ``~``, quotes and escapes
    (:func:`edge_gemma.sources.typed`).
    """
    if isinstance(value, list | tuple):
        return [with_typed_paths(name, item) for item in value]
    if isinstance(value, Path):
        return Path(typed(str(value)))
    if isinstance(value, str) and name in _MAYBE_PATHS:
        return typed(value)
    return value


def complete(command: Callable[..., None], debug_option: object) -> Callable[..., None]:
    """``command`` with what every command has: ``--debug``, whose callback has used it by the time
    the command runs, and a quiet end after Ctrl-C.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters = [
        parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(command).parameters.items()
    ]
    debug = inspect.Parameter(
        "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=debug_option
    )

    @functools.wraps(command)
    def call(debug: bool, **given: Any) -> None:
        meant = {name: with_typed_paths(name, value) for name, value in given.items()}
        try:
            command(**meant)
        except KeyboardInterrupt:
            note("\nstopped")
            raise typer.Exit(INTERRUPTED) from None

    return shown_as(call, [*parameters, debug])
