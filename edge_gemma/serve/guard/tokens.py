"""Bearer tokens with names, at rest as salted hashes.

In: a file, a token a line. Out: who stands behind an ``Authorization`` header. A line is
``NAME:sha256:SALT:HASH`` as :func:`add_token` writes it, or, as a warning says, the token itself.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from edge_gemma.errors import RuntimeFailure, UsageError
from edge_gemma.files import written_whole

log = logging.getLogger("edge_gemma.serve")
_SALT_BYTES = 16
_MIN_LENGTH = 8
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASHED = re.compile(rf"({NAME.pattern}):sha256:([0-9a-f]{{32}}):([0-9a-f]{{64}})")


@dataclass(frozen=True)
class KnownToken:
    """A token as it is kept. One pass of SHA-256 is enough for what has 192 random bits; a slow
    hash protects passwords that people think of.
    """

    name: str
    salt: bytes
    hash: bytes
    plain: bool = False  # its line in the file is the token itself

    @classmethod
    def of(cls, name: str, token: str, *, plain: bool = False) -> KnownToken:
        salt = secrets.token_bytes(_SALT_BYTES)
        return cls(name, salt, _hash(salt, token), plain)

    @property
    def line(self) -> str:
        return f"{self.name}:sha256:{self.salt.hex()}:{self.hash.hex()}"


def _hash(salt: bytes, token: str) -> bytes:
    return hashlib.sha256(salt + token.encode("utf-8", "surrogateescape")).digest()


class BearerTokens:
    """Who may come in. Plain tokens are called token-1, token-2 and so on.

    >>> tokens = BearerTokens(["secret"])
    >>> tokens.allow("Bearer secret"), tokens.allow("Bearer wrong"), tokens.allow("")
    (True, False, False)
    >>> tokens.name_of("Bearer secret")
    'token-1'
    """

    def __init__(self, tokens: Iterable[str | KnownToken] = (), path: Path | None = None):
        self._known = [
            token if isinstance(token, KnownToken) else KnownToken.of(f"token-{n}", token)
            for n, token in enumerate(tokens, 1)
        ]
        self._path = path

    @classmethod
    def read(cls, path: Path) -> BearerTokens:
        """A file with a token a line; blank lines and lines that begin with # are left out. Raises
        UsageError.
        """
        known = read_tokens(path)
        if not known:
            raise UsageError(
                f"the token file {path} holds no token; make one with: edge-gemma tokens add NAME "
                f"--token-file {path}"
            )
        plain = [token.name for token in known if token.plain]
        if plain:
            log.warning(
                "%s holds %d tokens as they are (%s); edge-gemma tokens add writes a hash instead",
                path,
                len(plain),
                ", ".join(plain[:5]),
            )
        return cls(known, path)

    @property
    def names(self) -> set[str]:
        return {known.name for known in self._known}

    def reload(self) -> None:
        """Read the file again. One that cannot be used leaves the tokens as they are, and is said
        in the log.
        """
        if self._path is None:
            return
        try:
            self._known = BearerTokens.read(self._path)._known
        except UsageError as error:
            log.error("the tokens stay as they were: %s", error)
            return
        log.info("%s: %d tokens", self._path, len(self._known))

    def name_of(self, authorization: str) -> str | None:
        """Whose token an ``Authorization`` header holds; None: nobody's. All are compared, each in
        constant time.
        """
        scheme, _, token = authorization.partition(" ")
        token = token.strip()
        matches = [
            known.name
            for known in self._known
            if hmac.compare_digest(known.hash, _hash(known.salt, token))
        ]
        return matches[0] if scheme.lower() == "bearer" and matches else None

    def allow(self, authorization: str) -> bool:
        return self.name_of(authorization) is not None


def read_tokens(path: Path) -> list[KnownToken]:
    """Every token of a file. Raises UsageError, which repeats nothing of a line."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the token file {path} cannot be read: {error}") from None
    known: list[KnownToken] = []
    n_short = 0
    for line in lines:
        if not line or line.startswith("#"):
            continue
        hashed = _HASHED.fullmatch(line)
        if hashed is not None:
            known.append(KnownToken(hashed[1], bytes.fromhex(hashed[2]), bytes.fromhex(hashed[3])))
            continue
        n_short += len(line) < _MIN_LENGTH
        known.append(KnownToken.of(f"token-{len(known) + 1}", line, plain=True))
    if n_short:
        raise UsageError(
            f"the token file {path} holds {len(known)} tokens, {n_short} of them shorter than "
            f"{_MIN_LENGTH} characters; make them with: edge-gemma tokens add NAME --token-file "
            f"{path}"
        )
    names = [token.name for token in known]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"the token file {path} has the names {', '.join(twice)} twice")
    return known


def add_token(path: Path, name: str) -> str:
    """Make a token, write its name and salted hash behind the others, and return it: it is kept
    nowhere. Raises UsageError (a name that is taken or cannot be one), RuntimeFailure.
    """
    if not NAME.fullmatch(name):
        raise UsageError(
            f"the name is {name[:80]!r}; expected at most 64 letters, digits, dots, dashes and "
            "underscores, the first of them a letter or digit"
        )
    known = read_tokens(path) if path.exists() else []
    if any(token.name == name for token in known):
        raise UsageError(f"{path} has a token called {name} already; remove it first")
    token = secrets.token_urlsafe(24)
    text = path.read_text("utf-8") if path.exists() else ""
    separator = "" if not text or text.endswith("\n") else "\n"
    _write(path, f"{text}{separator}{KnownToken.of(name, token).line}\n")
    return token


def remove_token(path: Path, name: str) -> None:
    """Take the token of that name out of the file. Raises UsageError, RuntimeFailure."""
    if not any(token.name == name and not token.plain for token in read_tokens(path)):
        raise UsageError(f"{path} has no token called {name}")
    lines = path.read_text("utf-8").splitlines(keepends=True)
    kept = [line for line in lines if not _is_of(line.strip(), name)]
    _write(path, "".join(kept))


def _is_of(line: str, name: str) -> bool:
    hashed = _HASHED.fullmatch(line)
    return hashed is not None and hashed[1] == name


def _write(path: Path, text: str) -> None:
    """The file as a whole, for its owner alone to read."""
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    with written_whole(path) as file:
        os.fchmod(file.fileno(), mode)
        file.write(text.encode())
    if not path.exists():
        raise RuntimeFailure(f"cannot write {path}")
