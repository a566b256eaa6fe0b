"""A chat template in a sandbox: template source and messages → text, in bounded space.

In: jinja source from a bundle, messages as plain dicts. Out: text. The template may read the
messages and write text; it reaches no attribute, file or module, and what could make something huge
of something small is taken away. This module knows no tokens.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from functools import lru_cache

from edge_gemma.errors import BundleError, UsageError

MAX_TEMPLATE_CHARS = 1 << 18
MAX_OVERHEAD_CHARS = 1 << 20  # what a template may add to the messages' own text

# Gemma's turns, for instruct weights whose bundle carries no template
# (ai.google.dev/gemma/docs/core/prompt-structure)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\\n' }}"
    "{% if message.content is string %}{{ message.content | trim }}"
    "{% else %}{% for item in message.content %}{{ item.text | trim }}{% endfor %}{% endif %}"
    "{{ '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _range(*bounds: int) -> range:
    found = range(*bounds)
    if len(found) > 10_000:
        _raise_exception(f"range of {len(found)}; at most 10000")
    return found


@lru_cache(maxsize=8)
def _compile(source: str):
    """A template with what transformers offers to one (chat_template_utils): loop controls, tojson,
    raise_exception, strftime_now.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(
            ["*", "**", "%"]
        )  # the operators that make something huge of something small

        def call_binop(self, context, operator, left, right):
            if (
                operator == "**"
                or isinstance(left, str | list | tuple)
                or isinstance(right, str | list | tuple)
            ):
                _raise_exception(
                    f"the operator {operator!r} on text or as a power is not allowed in a "
                    "chat template"
                )
            return super().call_binop(context, operator, left, right)

        def wrap_str_format(self, value):
            return None  # str.format is refused below like any other unsafe attribute

        def is_safe_attribute(self, obj, attr, value):
            return attr not in (
                "format",
                "format_map",
                "ljust",
                "rjust",
                "center",
                "zfill",
                "expandtabs",
            ) and super().is_safe_attribute(obj, attr, value)

    if len(source) > MAX_TEMPLATE_CHARS:
        raise BundleError(
            f"the bundle's chat template has {len(source)} characters; at most {MAX_TEMPLATE_CHARS}"
        )
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    for name in (
        "center",
        "format",
        "indent",
        "wordwrap",
        "pprint",
        "filesizeformat",
        "random",
        "xmlattr",
        "urlize",
    ):
        sandbox.filters.pop(name, None)
    sandbox.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=min(indent, 8) if indent else None
    )
    keep = {name: sandbox.globals[name] for name in ("namespace", "dict")}
    sandbox.globals.clear()
    sandbox.globals |= {
        **keep,
        "range": _range,
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form[:200]),
    }
    try:
        return sandbox.from_string(_plain(source))
    except (TemplateError, RecursionError) as error:
        raise BundleError(f"the bundle's chat template cannot be read: {error}") from None


def reads_tools(source: str) -> bool:
    """Whether a template reads the variable ``tools``. A template that cannot be read does not.

    >>> reads_tools("{% for tool in tools %}{{ tool }}{% endfor %}"), reads_tools("{{ 'tools' }}")
    (True, False)
    """
    from jinja2 import TemplateError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if "tools" not in source or len(source) > MAX_TEMPLATE_CHARS:
        return False
    reader = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return "tools" in meta.find_undeclared_variables(reader.parse(_plain(source)))
    except (TemplateError, RecursionError):
        return False


def _plain(source: str) -> str:
    """{% generation %} marks training targets; when prompting it only stands around text."""
    return re.sub(
        r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})",
        lambda m: m[1] + ("endif" if m[2] else "if true") + m[3],
        source,
    )


def render(
    source: str, messages: list[dict], generate: bool, tools: list[dict] | None = None
) -> str:
    """The text of ``messages``; ``generate`` opens the model's turn. ``tools`` is what a template
    that writes functions itself is given.

    UsageError when the template objects, BundleError when it is at fault.

    >>> render(GEMMA_TEMPLATE, [{"role": "user", "content": "Hi"}], True)
    '<bos><start_of_turn>user\\nHi<end_of_turn>\\n<start_of_turn>model\\n'
    """
    from jinja2 import TemplateError
    from jinja2.exceptions import SecurityError

    given = sum(map(_length, messages)) + len(str(tools))
    limit, length, pieces = given + MAX_OVERHEAD_CHARS, 0, []
    try:
        for piece in _compile(source).generate(
            messages=messages,
            add_generation_prompt=generate,
            bos_token="<bos>",
            eos_token="<eos>",
            tools=tools,
        ):
            pieces.append(piece)
            length += len(piece)
            if length > limit:
                raise BundleError(
                    f"the bundle's chat template writes more than {limit} characters; it is "
                    "broken or hostile"
                )
    except SecurityError as error:
        raise BundleError(
            f"the bundle's chat template does what a template may not: {error}"
        ) from None
    except TemplateError as error:
        raise UsageError(f"the bundle's chat template refuses these messages: {error}") from None
    except (
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        MemoryError,
    ) as error:
        raise UsageError(
            f"the bundle's chat template fails on these messages: {type(error).__name__}: {error}"
        ) from None
    return "".join(pieces)


def _length(message: dict) -> int:
    content, calls = message["content"], str(message.get("tool_calls", ""))
    n_text = len(content) if isinstance(content, str) else len(str(content))
    return n_text + len(calls)
