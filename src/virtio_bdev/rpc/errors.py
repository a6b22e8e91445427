"""What a request can come to beside a result: JSON-RPC's codes, and negative errnos as SPDK sends them."""

from __future__ import annotations

import errno
import os

PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND = -32700, -32600, -32601
INVALID_PARAMS, INTERNAL_ERROR = -32602, -32603


class RpcError(Exception):
    """An error for the client: a code, and words that begin as SPDK's do."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def no_device(name: str) -> RpcError:
    """Nothing has that name."""
    return RpcError(-errno.ENODEV, f"{os.strerror(errno.ENODEV)}: {name!r}")
