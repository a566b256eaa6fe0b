r"""Regular expressions of JSON Schema, which are ECMAScript's, in the syntax of the regex engine
that enforces them.

Most is written alike. What is not, and would be understood otherwise without a word: ``\d``,
``\w`` and ``\s`` are ASCII there and Unicode here, ``.`` leaves out four line ends, and ``[``,
``&&``, ``--`` and ``~~`` inside a class are letters.
"""

from __future__ import annotations

from edge_gemma.errors import UsageError

_SPACES = (
    r"\t\n\x0B\x0C\r\x20\xA0\u{1680}\u{2000}-\u{200A}\u{2028}\u{2029}\u{202F}\u{205F}"
    r"\u{3000}\u{FEFF}"
)
_INSIDE = {"d": "0-9", "w": "A-Za-z0-9_", "s": _SPACES}
_ANY = r"[^\n\r\u{2028}\u{2029}]"
_LETTER_ESCAPES = {"t": r"\t", "n": r"\n", "r": r"\r", "v": r"\x0B", "f": r"\x0C", "0": r"\x00"}
_META = r"\.+*?()|[]{}^$#&-~"
_GROUPS = ("(?:", "(?<")  # of those that begin with "(?", the ones that both syntaxes share
_LOOK_BEHIND = ("(?<=", "(?<!")


def translated(pattern: str) -> str:
    r"""An ECMAScript pattern for the regex engine. Raises UsageError for what it cannot express.

    >>> translated(r"^\d+[^\d,;]\.\/$")
    '^[0-9]+[^0-9,;]\\./$'
    """
    return "".join(_Reader(pattern).read())


class _Reader:
    def __init__(self, pattern: str):
        self._pattern, self._at, self._in_class = pattern, 0, False

    def read(self) -> list[str]:
        written = []
        while self._at < len(self._pattern):
            letter = self._pattern[self._at]
            if letter == "\\":
                written.append(self._escape())
                continue
            written.append(self._class(letter) if self._in_class else self._plain(letter))
            self._at += 1
        return written

    def _plain(self, letter: str) -> str:
        if letter == ".":
            return _ANY
        if letter == "[":
            self._in_class = True
            if self._pattern.startswith("[]", self._at):
                raise UsageError("it holds the empty class []")
            if self._pattern.startswith("[^]", self._at):
                raise UsageError("it holds the class [^]; write [\\s\\S]")
        if self._pattern.startswith("(?", self._at):
            rest = self._pattern[self._at :]
            if not rest.startswith(_GROUPS) or rest.startswith(_LOOK_BEHIND):
                raise UsageError(f"it looks around or sets flags: {rest[:4]}")
        return letter

    def _class(self, letter: str) -> str:
        if letter == "]":
            self._in_class = False
        if letter in "[&~":
            return "\\" + letter
        doubled = self._pattern[self._at - 1 : self._at + 1] == "--"
        return "\\-" if doubled else letter

    def _escape(self) -> str:
        """What follows a backslash, which may be several letters."""
        letter = self._pattern[self._at + 1 : self._at + 2]
        if not letter:
            raise UsageError("it ends with a backslash")
        self._at += 2
        if letter.lower() in _INSIDE:
            return self._shorthand(letter)
        if letter == "u":
            return self._unicode()
        if letter == "x":
            return f"\\x{self._hex(2)}"
        if letter == "b" and self._in_class:
            return r"\x08"
        if letter in _LETTER_ESCAPES:
            return _LETTER_ESCAPES[letter]
        if letter.isalnum():
            raise UsageError(f"it uses \\{letter}")
        return "\\" + letter if letter in _META else letter

    def _shorthand(self, letter: str) -> str:
        inside = _INSIDE[letter.lower()]
        before = self._pattern[: self._at - 2]
        after = self._pattern[self._at : self._at + 2]
        opens_range = after[:1] == "-" and after != "-]"
        closes_range = before[-1:] == "-" and before[-2:] not in ("[-", "^-")
        if self._in_class and (opens_range or closes_range):
            raise UsageError(f"it holds a range with \\{letter} at its end")
        if letter.isupper():
            return f"[^{inside}]"
        return inside if self._in_class else f"[{inside}]"

    def _unicode(self) -> str:
        code = int(self._hex(4), 16)
        if 0xD800 <= code < 0xE000:
            raise UsageError("it holds half of a surrogate pair; write the character itself")
        return f"\\u{{{code:X}}}"

    def _hex(self, n_digits: int) -> str:
        digits = self._pattern[self._at : self._at + n_digits]
        try:
            int(digits, 16)
        except ValueError:
            digits = ""
        if len(digits) < n_digits:
            raise UsageError(f"\\{self._pattern[self._at - 1]} needs {n_digits} hex digits")
        self._at += n_digits
        return digits
