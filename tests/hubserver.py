"""A stand-in for the Hugging Face hub on loopback: model_info, and files by HEAD and GET with
ranges. It can misbehave on request.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """``files``: repository → path → bytes. ``requests`` records (method, path, range). The other
    fields make it misbehave.
    """

    def __init__(self, url: str):
        self.url = url
        self.files: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.sent_bytes = 0
        self.gated: set[str] = set()
        self.status: int | None = None  # answer everything with this
        self.cut_after: int | None = None  # end each GET after so many bytes
        self.ignore_range = False
        self.commit = COMMIT  # what it says the revision is
        self.damage = False  # flip a byte on the way

    def downloads(self) -> list[tuple[str, str | None]]:
        return [
            (path.rsplit("/", 1)[1], range)
            for method, path, range in self.requests
            if method == "GET" and "/resolve/" in path
        ]

    def add(self, repository: str, folder: Path, inside: str = "") -> None:
        files = self.files.setdefault(repository, {})
        base = folder if folder.is_dir() else folder.parent
        for path in folder.rglob("*") if folder.is_dir() else [folder]:
            if path.is_file():
                name = f"{inside}/{path.relative_to(base)}".lstrip("/")
                files[name] = path.read_bytes()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _json(self, status: int, body: dict, **headers: str) -> None:
        self._send(
            status,
            json.dumps(body).encode(),
            {
                "Content-Type": "application/json",
                **{k.replace("_", "-"): v for k, v in headers.items()},
            },
        )

    def _send(
        self, status: int, data: bytes, headers: dict[str, str], cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:cut])
            self.hub.sent_bytes += len(data[:cut])
        if cut is not None and cut < len(data):
            self.close_connection = True

    def _answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path, self.headers.get("Range")))
        if hub.status:
            return self._json(hub.status, {"error": "no"})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            repository, revision = match[1], match[2] or "main"
            if repository not in hub.files:
                return self._json(
                    401, {"error": "Repository Not Found"}, X_Error_Code="RepoNotFound"
                )
            if revision not in ("main", "v1", COMMIT):
                return self._json(
                    404, {"error": "Revision Not Found"}, X_Error_Code="RevisionNotFound"
                )
            siblings = [
                {"rfilename": name, "size": len(data), "blobId": "0" * 40}
                | (
                    {
                        "lfs": {
                            "sha256": hashlib.sha256(data).hexdigest(),
                            "size": len(data),
                            "pointerSize": 134,
                        }
                    }
                    if name.endswith((".gguf", ".onnx"))
                    else {}
                )
                for name, data in hub.files[repository].items()
            ]
            return self._json(200, {"id": repository, "sha": hub.commit, "siblings": siblings})
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        data = hub.files.get(match[1], {}).get(match[3]) if match else None
        if match and match[1] in hub.gated:
            return self._json(403, {"error": "gated"}, X_Error_Code="GatedRepo")
        if data is None:
            return self._json(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        if hub.damage:
            data = data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(len(data)),
            "Accept-Ranges": "bytes",
        }
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start and not hub.ignore_range:
            first = int(start[1])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            return self._send(206, data[first:], headers, hub.cut_after)
        self._send(200, data, headers, hub.cut_after)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        pass  # a client that hangs up is part of the tests


@contextmanager
def serve():
    handler = type("Handler", (_Handler,), {})
    server = _Server(("127.0.0.1", 0), handler)
    handler.hub = hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
