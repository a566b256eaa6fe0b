"""Which model, recipe and context for a machine: a ranked list out of real plans.

In: candidates (the catalogue's models in their recipes, installed bundles), a device, what the
model is for. Out: :class:`Choice` for each that fits, best first, and why the others do not. Pure:
no I/O, no clock; the machine's memory bandwidth is measured elsewhere.

Ranked by level:

- ``efficiency``: the least memory first;
- ``balanced``: what may be fast enough to follow first, the most capable of those before the
  others; what is slower comes after, by its speed;
- ``performance``: the most capable first, whatever its speed.

Capable: a context of at least USEFUL_N_CTX, then no wait for weights that are read again in every
turn (a plan that hears first), then billions of parameters at work for a token, then the recipe's
measured distance from the whole weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from edge_gemma.bundles.manifest import Manifest, Sense, Tensor
from edge_gemma.errors import UsageError
from edge_gemma.machine.device import Device
from edge_gemma.plan.catalogue import catalogue, encoder_bytes, manifest_of
from edge_gemma.plan.ladder import make_plan
from edge_gemma.plan.records import Level, Plan, PlanRequest

Purpose = Literal["text", "voice", "pictures"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
SENSE: dict[Purpose, tuple[Sense, ...]] = {
    "text": (),
    "voice": ("audio",),
    "pictures": ("vision",),
}
USEFUL_N_CTX = 1024  # with less, a few turns or half a minute of sound fill the context
READING_TOK_S = 5.0  # about what a person reads, and a voice speaks
CLASSES = ((1.0, "for patient work"), (READING_TOK_S, "slower than reading"), (20.0, "reading"))


@dataclass(frozen=True)
class Candidate:
    """``parameters``: billions at work for a token; ``kld``: the recipe's distance, None where it
    was not measured; ``installed``: the name under which it lies here.
    """

    title: str
    recipe: str
    manifest: Manifest
    parameters: float
    kld: float | None
    repository: str = ""
    installed: str | None = None
    languages: tuple[str, ...] = ()  # that its vocabulary is cut to


@dataclass(frozen=True)
class Choice:
    """A candidate with its plan. ``tok_s``: the decode speed to expect, by what a token reads; None
    where the board's speed is not known.
    """

    candidate: Candidate
    plan: Plan
    tok_s: float | None

    @property
    def disk_bytes(self) -> int:
        manifest = self.candidate.manifest
        return sum(file.size for file in manifest.files.values()) + (
            0 if self.candidate.installed else encoder_bytes(manifest)
        )

    @property
    def speed_class(self) -> str:
        """How the speed would feel, in words."""
        if self.tok_s is None:
            return "unknown"
        speed = self.tok_s
        return next((word for limit, word in CLASSES if speed < limit), "faster than reading")


def candidates(purpose: Purpose, languages: Sequence[str] = ()) -> Iterator[Candidate]:
    """The published models that can do it, in each recipe, their vocabularies cut to ``languages``
    where there are any. Raises UsageError.
    """
    senses = _senses(purpose)
    shipped = catalogue()
    for model in shipped.models.values():
        if set(senses) <= set(model.senses):
            for recipe in model.types:
                yield Candidate(
                    title=model.title,
                    recipe=recipe,
                    manifest=manifest_of(model, recipe, senses, languages),
                    parameters=model.parameters,
                    kld=shipped.kld.get(recipe),
                    repository=model.repository,
                    languages=tuple(languages),
                )


def installed(name: str, manifest: Manifest, purpose: Purpose) -> Candidate | None:
    """A bundle that lies here, or None where it cannot do it."""
    parts = {"audio": manifest.audio, "vision": manifest.vision}
    if manifest.embedding or not all(parts[sense] for sense in _senses(purpose)):
        return None
    recipe = manifest.recipe.get("name", "")
    return Candidate(
        title=manifest.name,
        recipe=recipe or "as it is",
        manifest=manifest,
        parameters=_parameters(manifest),
        kld=catalogue().kld.get(recipe),
        installed=name,
        languages=manifest.vocabulary.languages if manifest.vocabulary else (),
    )


def recommend(
    found: Iterable[Candidate],
    device: Device,
    repacks: Callable[[Tensor], bool],
    *,
    purpose: Purpose = "text",
    level: Level = "balanced",
    request: PlanRequest = PlanRequest(),
    bytes_per_second: float | None = None,
) -> tuple[list[Choice], list[Choice]]:
    """(what fits, best first; what does not, the smallest first). Raises UsageError.

    ``bytes_per_second``: at which the device's decoder reads weights, if that is known.
    """
    request = replace(request, level=level, senses=_senses(purpose))
    choices = []
    for candidate in found:
        made = make_plan(candidate.manifest, device, request, repacks)
        speed = None
        if bytes_per_second is not None:
            speed = bytes_per_second / _bytes_per_token(made)
        choices.append(Choice(candidate, made, speed))
    fitting = sorted((c for c in choices if c.plan.fits), key=lambda c: _rank(c, level))
    others = sorted((c for c in choices if not c.plan.fits), key=lambda c: c.plan.needed_bytes)
    return fitting, others


def _senses(purpose: Purpose) -> tuple[Sense, ...]:
    if purpose not in PURPOSES:
        raise UsageError(f"purpose {purpose!r} is unknown; expected one of {', '.join(PURPOSES)}")
    return SENSE[purpose]


def _rank(choice: Choice, level: Level) -> tuple[float, ...]:
    candidate = choice.candidate
    kld = 1.0 if candidate.kld is None else candidate.kld
    is_cramped = float(choice.plan.settings.n_ctx < USEFUL_N_CTX)
    waits = float(choice.plan.settings.encoders == "hear first")
    capable = (is_cramped, waits, -candidate.parameters, kld)
    if level == "efficiency":
        return (choice.plan.needed_bytes, *capable)
    speed = choice.tok_s
    if level == "performance" or speed is None or speed >= READING_TOK_S:
        return (0.0, *capable, choice.plan.needed_bytes)
    return (1.0, -speed, *capable)


def _bytes_per_token(made: Plan) -> int:
    """Weights that every token reads; at half its length the context adds half its cache."""
    weights = sum(item.bytes for item in made.items if item.name.startswith("weights,"))
    cache = sum(item.bytes for item in made.items if item.name.startswith("KV cache"))
    return weights + cache // 2


def _parameters(manifest: Manifest) -> float:
    """Billions of values that every token is multiplied by."""
    values = 0
    for tensor in manifest.decoder.tensors:
        if tensor.use == "matmul":
            size = 1
            for length in tensor.shape:
                size *= length
            values += size
    return values / 1e9
