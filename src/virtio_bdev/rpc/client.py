"""One call to a daemon, for people."""

from __future__ import annotations

import contextlib
import time

import msgspec

from virtio.errors import ProtocolError, RequestTimeout
from virtio.transport.session import connect
from virtio_bdev.rpc.errors import RpcError
from virtio_bdev.rpc.framing import Frames, FramingError

_PEER = "daemon (`virtio-bdev run --rpc-socket PATH`)"
_READ_BYTES = 1 << 16
_MAX_ANSWER = 1 << 28  # bytes: a million disks


class _Failure(msgspec.Struct):
    code: int
    message: str


class _Answer(msgspec.Struct):
    result: msgspec.Raw = msgspec.Raw(b"null")
    error: _Failure | None = None


def call(path: str, method: str, params: object, timeout: float) -> bytes:
    """The result of a method, as JSON text; `timeout` in seconds bounds all of it.

    RpcError is what the daemon says; TransportError, RequestTimeout or ProtocolError without it.
    """
    request = {"jsonrpc": "2.0", "id": 1, "method": method} | ({} if params is None else {"params": params})
    end = time.monotonic() + timeout
    with contextlib.closing(connect(path, timeout, _PEER)) as sock:
        try:
            sock.settimeout(timeout)
            sock.sendall(msgspec.json.encode(request))
            frames = Frames(_MAX_ANSWER)
            found: list[bytes] = []
            while not found:
                sock.settimeout(max(0.001, end - time.monotonic()))
                data = sock.recv(_READ_BYTES)
                if not data:
                    raise ProtocolError(f"the daemon at {path} closed the connection without an answer")
                found = frames.feed(data)
            answer = msgspec.json.decode(found[0], type=_Answer)
        except TimeoutError as error:
            raise RequestTimeout(f"the daemon at {path} did not answer {method} in {timeout:g} s") from error
        except (FramingError, msgspec.DecodeError) as error:
            raise ProtocolError(f"the daemon at {path} answered {method} badly: {error}") from error
        except OSError as error:
            raise ProtocolError(f"the daemon at {path} closed the connection: {error.strerror}") from error
    if answer.error is not None:
        raise RpcError(answer.error.code, answer.error.message)
    return bytes(answer.result)
