"""Where one JSON text ends and the next begins, in a stream that has nothing between them.

SPDK's server and clients send objects one after another, with line ends or without.
"""

from __future__ import annotations

import re

MAX_BYTES = 1 << 20  # of one message
_MAX_DEPTH = 64  # of arrays and objects within each other
_SPACE = b" \t\r\n"
_OUTSIDE = re.compile(rb'["{}\[\]]')
_INSIDE = re.compile(rb'["\\]')


class FramingError(ValueError):
    """What came can be no JSON object or array, or is too long to be one for us."""


class Frames:
    """Cuts what is fed into messages; looks at each byte once."""

    def __init__(self, most: int = MAX_BYTES) -> None:
        """`most` is how long one message may be, in bytes."""
        self._most = most
        self._bytes = bytearray()
        self._seen = 0
        self._depth = 0
        self._quoted = False

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that are complete now; FramingError if there can be none any more."""
        self._bytes += data
        frames = []
        while self._advance():
            frames.append(bytes(self._bytes[: self._seen]))
            del self._bytes[: self._seen]
            self._seen = 0
        if len(self._bytes) > self._most:
            raise FramingError(f"a message of more than {self._most} bytes")
        return frames

    def _advance(self) -> bool:
        """Look at what is new; whether a message ends at `_seen`."""
        if self._depth == 0:
            del self._bytes[: len(self._bytes) - len(self._bytes.lstrip(_SPACE))]
            if self._bytes and self._bytes[0] not in b"{[":
                raise FramingError(f"{bytes(self._bytes[:1])!r}, want an object or an array")
        while match := (_INSIDE if self._quoted else _OUTSIDE).search(self._bytes, self._seen):
            token = match[0]
            self._seen = match.end()
            if token == b"\\":
                if self._seen == len(self._bytes):
                    self._seen -= 1  # what it escapes has not come yet
                    return False
                self._seen += 1
            elif token == b'"':
                self._quoted = not self._quoted
            else:
                self._depth += 1 if token in b"{[" else -1
                if self._depth > _MAX_DEPTH:
                    raise FramingError(f"more than {_MAX_DEPTH} arrays and objects within each other")
                if self._depth == 0:
                    return True
        self._seen = len(self._bytes)
        return False
