"""Functions with type hints and docstrings → tools: JSON schema and checked arguments by msgspec.

Hints may be whatever JSON can give: str, int, float, bool, lists, dicts, Literal, enums,
dataclasses, ``X | None``. ``Annotated[int, "how long, in minutes"]`` describes a parameter. What a
model writes is converted to that (``"5"`` to 5) or refused before the function is called.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, get_args, get_origin

import msgspec

from edge_gemma.assistant.tool import TIMEOUT_S, Tool, ToolError
from edge_gemma.errors import UsageError, first_line

_PLAIN = (str, int, float, bool, type(None))


def tool_of(function: Callable[..., Any]) -> Tool:
    """One function as a tool; its attributes ``dangerous`` and ``timeout_s`` count. Raises
    UsageError for a function without a docstring or hints, or with hints that no JSON fits.

    >>> def ring(minutes: Annotated[int, "from now"], label: str = "") -> None:
    ...     "Ring later."
    >>> tool_of(ring).parameters["properties"]["minutes"]
    {'description': 'from now', 'type': 'integer'}
    """
    name = getattr(function, "__name__", type(function).__name__)
    where = _where(function, name)
    description = inspect.getdoc(function) if inspect.isroutine(function) else None
    if not description:
        raise UsageError(
            f"{where} has no docstring, so a model cannot know what it does; write one, or begin "
            "its name with _ if it is no tool"
        )
    record, defaults = _record(function, name, where)
    is_async = inspect.iscoroutinefunction(function)

    def run(parameters: Mapping[str, Any]) -> Any:
        try:
            given = msgspec.convert(parameters, record, strict=False)
        except msgspec.ValidationError as error:
            raise ToolError(f"{name} was not called: {error}") from None
        values = {field: getattr(given, field) for field in record.__struct_fields__}
        arguments = {key: value for key, value in values.items() if value is not msgspec.UNSET}
        result = function(**arguments)
        return asyncio.run(result) if is_async else result

    return Tool(
        name,
        description,
        _schema(record, defaults, where),
        run,
        dangerous=_dangerous(function, where),
        timeout_s=_timeout_s(function, where),
    )


def functions_of(path: Path) -> list[Callable[..., Any]]:
    """Run a Python file and return its public functions: those of ``__all__``, or those defined
    there whose names do not begin with ``_``. Raises UsageError.
    """
    module = module_of(path)
    names = getattr(module, "__all__", None)
    found: list[Any]
    if names is None:
        found = [
            value
            for name, value in vars(module).items()
            if not name.startswith("_")
            and inspect.isfunction(value)
            and value.__module__ == module.__name__
        ]
    else:
        found = [getattr(module, str(name), None) for name in names]
    functions: list[Callable[..., Any]] = [value for value in found if callable(value)]
    if not functions:
        raise UsageError(f"{path} defines no public function; each one would be a tool")
    return functions


def module_of(path: Path) -> ModuleType:
    """Run a Python file, the program of the user's that it is. Raises UsageError."""
    name = f"edge_gemma_tools_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        line = _line_in(path, error)
        raise UsageError(
            f"{path}{line} could not be run: {type(error).__name__}: {first_line(error)}"
        ) from error
    return module


def _line_in(path: Path, error: BaseException) -> str:
    """Where in the file it happened: ``, line 3,``."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == str(path):
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return f", line {line}," if line else ""


def _where(function: Callable[..., Any], name: str) -> str:
    code = getattr(function, "__code__", None)
    return f"{code.co_filename}, line {code.co_firstlineno}: {name}" if code else name


def _record(
    function: Callable[..., Any], name: str, where: str
) -> tuple[type[msgspec.Struct], dict[str, Any]]:
    """A struct with a field for each parameter, and the defaults that JSON can say."""
    try:
        hints = typing.get_type_hints(function, include_extras=True)
        signature = inspect.signature(function)
    except Exception as error:  # a hint is an expression of somebody else's
        raise UsageError(f"{where} has hints that cannot be read: {first_line(error)}") from None
    fields: list[Any] = []
    defaults: dict[str, Any] = {}
    for parameter in signature.parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UsageError(
                f"{where} takes {parameter}; a tool's parameters have names (no *, ** or /)"
            )
        if parameter.name not in hints:
            raise UsageError(
                f"{where}: its parameter {parameter.name!r} has no type hint; write "
                f"{parameter.name}: str, say"
            )
        hint = _described(hints[parameter.name])
        if parameter.default is parameter.empty:
            fields.append((parameter.name, hint))
            continue
        if isinstance(parameter.default, _PLAIN):
            defaults[parameter.name] = parameter.default
        fields.append((parameter.name, hint | msgspec.UnsetType, msgspec.UNSET))
    try:
        return (
            msgspec.defstruct(name, fields, kw_only=True, forbid_unknown_fields=True),
            defaults,
        )
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where} cannot be a tool: {first_line(error)}") from None


def _described(hint: Any) -> Any:
    """``Annotated[int, "text"]`` with the text as the description that msgspec knows."""
    if get_origin(hint) is not Annotated:
        return hint
    kind, *notes = get_args(hint)
    notes = [msgspec.Meta(description=note) if isinstance(note, str) else note for note in notes]
    return Annotated[kind, *notes]


def _schema(record: type[msgspec.Struct], defaults: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        (top,), components = msgspec.json.schema_components([record], ref_template="{name}")
        schema = _inlined(top, components, ())
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{where} has a parameter that no JSON fits: {first_line(error)}. Use str, int, float, "
            "bool, lists and dicts of them, Literal, enums or dataclasses"
        ) from None
    for name, value in defaults.items():
        if value not in (None, ""):  # every prompt holds this: what says nothing is left out
            schema["properties"][name]["default"] = value
    required = {"required": schema["required"]} if schema.get("required") else {}
    return {"type": "object", "properties": schema["properties"], **required}


def _inlined(schema: Any, components: Mapping[str, Any], inside: tuple[str, ...]) -> Any:
    """Without references: a tool's schema is put into others."""
    if isinstance(schema, list):
        return [_inlined(item, components, inside) for item in schema]
    if not isinstance(schema, dict):
        return schema
    reference = schema.get("$ref")
    if isinstance(reference, str):
        if reference in inside:
            raise ValueError(f"{reference} holds itself")
        target = _inlined(components[reference], components, (*inside, reference))
        rest = {key: value for key, value in schema.items() if key != "$ref"}
        return {**target, **rest}
    return {key: _inlined(value, components, inside) for key, value in schema.items()}


def _dangerous(function: Callable[..., Any], where: str) -> bool | str:
    value = getattr(function, "dangerous", False)
    if not isinstance(value, bool | str):
        raise UsageError(f"{where}: its attribute dangerous is {value!r}; expected True or text")
    return value


def _timeout_s(function: Callable[..., Any], where: str) -> float:
    value = getattr(function, "timeout_s", TIMEOUT_S)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 600:
        raise UsageError(f"{where}: its attribute timeout_s is {value!r}; expected up to 600")
    return float(value)
