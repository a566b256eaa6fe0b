"""Nonsense for every route of a server: strategies, and what must be true of each answer."""

from __future__ import annotations

import base64
import io
import json
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import hypothesis.strategies as st

# no path of this machine, no line of a program
LEAKS = re.compile(r"Traceback|site-packages|/tmp/|\.py\b|object at 0x|edge-gemma-\w{8}")


@dataclass
class Asked:
    """A request as it is sent."""

    method: str
    path: str
    body: bytes = b""
    headers: list[tuple[str, str]] = field(default_factory=list)


def routes_of(app) -> list[tuple[str, str]]:
    """Every method and path that the application behind a guard answers."""
    while not hasattr(app, "routes"):
        app = app.app
    found = []
    for route in app.routes:
        for method in sorted((route.methods or set()) - {"HEAD"}):
            found.append((method, re.sub(r"\{name:path\}", "NAME", route.path)))
    return found


# --- things ---


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A picture that says it is so large, with that for its pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def wav(n_bytes: int, rate_hz: int = 16000, channels: int = 1, data: bytes = b"\0" * 64) -> bytes:
    """A sound that says it is so long."""
    header = struct.pack("<HHIIHH", 1, channels, rate_hz, rate_hz * 2 % 2**32, 2, 16)
    body = (
        b"WAVEfmt " + struct.pack("<I", 16) + header + b"data" + struct.pack("<I", n_bytes) + data
    )
    return b"RIFF" + struct.pack("<I", min(n_bytes + 36, 2**32 - 1)) + body


def real_png() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (20, 10), (200, 30, 30)).save(file, "PNG")
    return file.getvalue()


BOMBS = [
    png(60000, 60000, b"\0" * (1 << 20)),  # 10 GiB of pixels in a kilobyte
    png(2**31 - 1, 1),
    png(0, 0),
    png(10, 10, b"\0" * (64 << 20)),  # more pixels than it says, packed a thousand times
    b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x80\0\0" + b"\0" * 20,
    b"BM"
    + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, *[0] * 6),
    b"RIFF\xff\xff\xff\xffWEBPVP8 ",
    b"\xff\xd8\xff\xe0\0\x10JFIF",
    b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    wav(2**32 - 1),
    wav(64, rate_hz=2**32 - 1),
    wav(64, rate_hz=0),
    wav(64, channels=65535),
    wav(0, data=b""),
    b"fLaC\0\0\0\x22" + b"\xff" * 34,
    b"OggS" + b"\0" * 30,
    b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + b"\xff\xfb\x90\0" * 20,
    b"#EXTM3U\nfile:///etc/passwd\n",  # a playlist, which a decoder might follow
    zlib.compress(b"\0" * 1000),
    b"",
]
NAMES = [
    "../../etc/passwd",
    "..\\..\\windows\\system32",
    "/etc/passwd",
    "file:///etc/passwd",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "a\0b",
    "a\r\nx-evil: 1",
    "{{7*7}}",
    "$(id)",
    "model:latest:latest",
    ":latest",
    "",
    "x" * 5000,
    "\u202emodel",
    "\ud800",
]
NUMBERS = st.sampled_from(
    [0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 10**400, 1e308, -1e-320, 0.5, 3, 1e999, float("nan")]
)
SCALARS = (
    st.none()
    | st.booleans()
    | NUMBERS
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([*NAMES, "x" * 20000])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
MEDIA = (
    st.sampled_from(BOMBS).map(lambda data: base64.b64encode(data).decode())
    | st.binary(max_size=40).map(lambda data: base64.b64encode(data).decode())
    | st.text(max_size=40)
    | st.sampled_from(["====", "A", "AAA", "/etc/passwd", "data:image/png;base64,", "\n", "é"])
)
ADDRESSES = MEDIA.map(lambda text: f"data:image/png;base64,{text}") | st.sampled_from(
    ["http://127.0.0.1:1/", "file:///etc/passwd", "/etc/passwd", "data:,", "data:image/png,x", ""]
)
PARTS = (
    st.builds(lambda text: {"type": "text", "text": text}, SCALARS)
    | st.builds(lambda url: {"type": "image_url", "image_url": {"url": url}}, ADDRESSES)
    | st.builds(
        lambda data: {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}, MEDIA
    )
    | st.builds(lambda data: {"type": "input_image", "image_url": data}, ADDRESSES)
    | VALUES
)
ROLES = st.sampled_from(["user", "assistant", "system", "developer", "tool", "evil", ""])
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": ROLES, "content": SCALARS | st.lists(PARTS, max_size=3)},
        optional={
            "images": st.lists(MEDIA, max_size=2) | VALUES,
            "tool_calls": VALUES,
            "tool_call_id": VALUES,
            "tool_name": VALUES,
        },
    ),
    max_size=3,
)
SCHEMAS = VALUES | st.sampled_from(
    [
        {"$ref": "#"},
        {"$ref": "file:///etc/passwd"},
        {"type": "string", "pattern": "(a+)+$"},
        {"type": "array", "minItems": 10**9},
        {"type": "object", "properties": {str(n): {"type": "string"} for n in range(300)}},
    ]
)
FIELDS = {
    "messages": MESSAGES | VALUES,
    "prompt": SCALARS | VALUES,
    "input": SCALARS | VALUES | MESSAGES,
    "images": st.lists(MEDIA, max_size=2) | VALUES,
    "tools": st.lists(st.builds(lambda s: {"function": {"name": "f", "parameters": s}}, SCHEMAS))
    | VALUES,
    "tool_choice": VALUES,
    "response_format": st.builds(
        lambda s: {"type": "json_schema", "json_schema": {"name": "a", "schema": s}}, SCHEMAS
    )
    | VALUES,
    "format": SCHEMAS,
    "options": st.dictionaries(
        st.sampled_from("temperature num_predict top_k top_p seed stop num_ctx min_p".split()),
        SCALARS,
    )
    | VALUES,
    "stop": st.lists(st.text(max_size=4), max_size=3) | SCALARS,
    "system": SCALARS,
    "stream": st.booleans() | SCALARS,
    **dict.fromkeys(
        """max_tokens max_completion_tokens max_output_tokens temperature top_p top_k min_p seed n
        logprobs top_logprobs frequency_penalty keep_alive think raw truncate suffix stream_options
        instructions voice dimensions encoding_format name verbose""".split(),
        SCALARS,
    ),
}


# --- requests ---


def bodies(model: str) -> st.SearchStrategy[bytes]:
    """JSON that is nearly right, JSON that is broken, and what is no JSON."""
    right = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "prompt": "a"}
    right |= {"input": "a", "max_tokens": 1, "stream": False}
    chosen = st.lists(st.sampled_from(sorted(FIELDS)), max_size=3, unique=True)
    given = chosen.flatmap(lambda some: st.fixed_dictionaries({n: FIELDS[n] for n in some}))
    mostly = given.map(lambda given: dumped(right | given))
    named = st.sampled_from(NAMES).map(lambda name: dumped(right | {"model": name}))
    broken = st.builds(
        lambda data, at: data[: max(1, at % max(1, len(data)))], mostly, st.integers(0)
    )
    nested = st.sampled_from([b'{"messages":' * 9000, b"[" * 100000, b'{"a":[' * 50000 + b"1"])
    other = st.binary(max_size=80) | VALUES.map(dumped)
    huge = st.sampled_from([b"9" * 100000, b'{"model":' + b"1" * 5000 + b"}", b'"\\ud800"', b"NaN"])
    return mostly | mostly | named | broken | nested | other | huge


def dumped(value: object) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def forms(model: str) -> st.SearchStrategy[tuple[bytes, str]]:
    """Multipart uploads that are nearly right, with their content type."""
    texts = {
        "model": st.just(model) | st.sampled_from([n for n in NAMES if n.isprintable()]),
        "language": st.text("abc -/é", max_size=8),
        "response_format": st.sampled_from(["json", "srt", "verbose_json", "../x", ""]),
        "temperature": st.sampled_from(["0", "-1", "1e999", "nan", "x", ""]),
        "stream": st.sampled_from(["true", "false", "maybe"]),
        "timestamp_granularities[]": st.sampled_from(["word", "segment", "x"]),
        "prompt": st.text(max_size=10),
        "file": st.text(max_size=10),
    }
    file = st.sampled_from(BOMBS) | st.binary(max_size=80)
    names = st.sampled_from(["a.wav", "../../etc/passwd", "a\\b", "x" * 300, ""])

    def form(given: dict[str, str], data: bytes, name: str, end: bytes) -> tuple[bytes, str]:
        lines = b""
        for key, value in given.items():
            head = f'--B\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'
            lines += head.encode("utf-8", "replace")
        head = f'--B\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
        return lines + head.encode() + data + end, "multipart/form-data; boundary=B"

    ends = st.sampled_from([b"\r\n--B--\r\n", b"\r\n--B--\r\n", b"\r\n--B\r\n", b""])
    right = {"model": st.just(model)}
    others = {key: value for key, value in texts.items() if key != "model"}
    given = st.fixed_dictionaries(right, optional=others) | st.fixed_dictionaries(
        {}, optional=texts
    )
    return st.builds(form, given, file, names, ends)


HEADERS = st.lists(
    st.sampled_from(
        [
            ("content-type", "text/plain"),
            ("content-type", "application/json; charset=utf-16"),
            ("content-type", "multipart/form-data"),
            ("content-encoding", "gzip"),
            ("content-length", "-1"),
            ("content-length", "1e3"),
            ("content-length", "9" * 400),
            ("transfer-encoding", "chunked"),
            ("expect", "100-continue"),
            ("accept", "text/event-stream"),
            ("x-forwarded-host", "evil.example"),
            ("x-http-method-override", "DELETE"),
            ("origin", "http://127.0.0.1:11434"),
            ("origin", "http://[evil"),
            ("range", "bytes=0-"),
            ("upgrade", "websocket"),
            ("x-long", "a" * 3000),
        ]
    ),
    max_size=2,
)


def requests(routes: list[tuple[str, str]], model: str) -> st.SearchStrategy[Asked]:
    """Any of these routes, asked for nonsense."""
    posts = [path for method, path in routes if method == "POST"]
    spoken = [path for path in posts if "/audio/t" in path]
    json_posts = [path for path in posts if path not in spoken]
    tricks = st.sampled_from(["..%2f..%2fetc%2fpasswd", "%00", "a" * 3000, "%c3%28", "%2e", "a//b"])
    anywhere = st.sampled_from([path for _, path in routes])
    methods = st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "X"])
    named = st.builds(
        lambda path, trick: path.replace("NAME", trick),
        st.sampled_from([path for _, path in routes if "NAME" in path]),
        tricks,
    )
    asked = st.builds(
        lambda path, body, headers: Asked("POST", path, body, headers),
        st.sampled_from(json_posts),
        bodies(model),
        HEADERS,
    )
    uploads = st.builds(
        lambda path, form, headers: Asked(
            "POST", path, form[0], headers or [("content-type", form[1])]
        ),
        st.sampled_from(spoken),
        forms(model),
        HEADERS,
    )
    others = st.builds(
        lambda method, path, body, headers: Asked(method, path, body, headers),
        methods,
        anywhere | named | tricks.map(lambda trick: f"/{trick}"),
        st.binary(max_size=20),
        HEADERS,
    )
    return st.one_of(asked, asked, asked, uploads, others)


# --- answers ---


def check(asked: Asked, status: int, headers: dict[str, str], text: str) -> None:
    """A good answer, or a refusal in the shape of the protocol. Never ours to blame, and nothing
    of the machine in it.
    """
    context = (
        f"{asked.method} {asked.path} {asked.body[:300]!r} {asked.headers} → {status} {text[:500]}"
    )
    assert status < 500, context
    assert not LEAKS.search(text.replace(asked.path, "")), context
    assert headers.get("x-request-id") or status == 400, context
    if status >= 400 and asked.method != "HEAD":
        error = json.loads(text)["error"]
        if asked.path == "/" or asked.path.startswith("/api"):
            assert isinstance(error, str) and error, context
        else:
            assert isinstance(error, dict) and error["message"] and error["type"], context
    for piece in streamed(text, headers.get("content-type", "")):
        assert isinstance(piece, dict), context


def streamed(text: str, content_type: str) -> Iterator[object]:
    """The objects of a stream, each of which must be one."""
    if content_type.startswith("application/x-ndjson"):
        yield from map(json.loads, text.splitlines())
    if content_type.startswith("text/event-stream"):
        for line in text.splitlines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line[6:])
