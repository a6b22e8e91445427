"""JSON-RPC 2.0 on a Unix socket: requests one by one, pipelined, or in batches."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import msgspec

from virtio.target.listener import Listener
from virtio_bdev.rpc.errors import INTERNAL_ERROR, INVALID_REQUEST, RpcError
from virtio_bdev.rpc.framing import Frames, FramingError

log = logging.getLogger("virtio.rpc")

Call: TypeAlias = Callable[[str, Any], Awaitable[object]]

_MAX_CLIENTS = 64
_MAX_PENDING = 8  # messages of one client; it must read answers before more are read
_MAX_BATCH = 256
_READ_BYTES = 1 << 16
_LEAVE_S = 1.0  # that a client has to read its last answers


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """One request; without an `id` it is a notification, and gets no answer."""

    method: str
    jsonrpc: str = ""
    params: Any = None
    id: int | str | None | msgspec.UnsetType = msgspec.UNSET


class RpcServer:
    """Serves `call(method, params)` at `path`; to be used in one event loop.

    Each client has a bound on what it may have under way and a task of its own, so none stops another.
    """

    def __init__(self, path: str, call: Call) -> None:
        """TransportError if the path is taken; but the socket of a dead process gives way."""
        self.path = path
        self._call = call
        self._listener = Listener(path, 0o600)
        self._server: asyncio.Server | None = None  # until `start`
        self._clients: dict[asyncio.Task[None], _Client] = {}  # who came first comes first

    async def start(self) -> None:
        """Serve from now on, until `close`."""
        sock = self._listener.sock.dup()  # the server closes its own
        self._server = await asyncio.start_unix_server(self._accept, sock=sock)

    async def close(self) -> None:
        """Let the clients go, and take the socket away; it need not have been served."""
        if self._server is not None:
            self._server.close()
        clients = list(self._clients)
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        self._listener.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._clients) < _MAX_CLIENTS or self._drop_one():
            client = self._clients[task] = _Client(reader, writer, self._call)
            try:
                await client.serve()
            except (OSError, asyncio.CancelledError):
                pass  # it has left, or we do
            finally:
                self._clients.pop(task, None)
        writer.close()

    def _drop_one(self) -> bool:
        """Make room for another client: the oldest that has nothing under way has to go, if there is one."""
        for task, client in self._clients.items():
            if not client.busy:
                task.cancel()
                del self._clients[task]
                return True
        return False


class _Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, call: Call) -> None:
        self._reader, self._writer, self._call = reader, writer, call
        self._room = asyncio.Semaphore(_MAX_PENDING)
        self._pending: set[asyncio.Task[None]] = set()

    @property
    def busy(self) -> bool:
        """Whether it waits for an answer, or lets us wait to send one."""
        return bool(self._pending)

    async def serve(self) -> None:
        """Until it leaves, or sends what can't be read: as SPDK, that is answered by closing."""
        frames = Frames()
        try:
            while data := await self._reader.read(_READ_BYTES):
                for frame in frames.feed(data):
                    message = msgspec.json.decode(frame)
                    await self._room.acquire()
                    task = asyncio.create_task(self._handle(message))
                    self._pending.add(task)
                    task.add_done_callback(self._done)
            if self._pending:  # it has said all, and may still read
                await asyncio.wait(self._pending)
        except (FramingError, msgspec.DecodeError, RecursionError) as error:
            log.info("a client is sent away: %s", error)
            if self._pending:
                await asyncio.wait(self._pending, timeout=_LEAVE_S)
        finally:
            for task in self._pending:
                task.cancel()
            if not self._writer.is_closing():
                self._writer.close()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._pending.discard(task)
        self._room.release()

    async def _handle(self, message: object) -> None:
        if isinstance(message, list) and 0 < len(message) <= _MAX_BATCH:
            answers = await asyncio.gather(*map(self._answer, message))
            answer: object = [answer for answer in answers if answer is not None] or None
        else:
            answer = await self._answer(message)
        if answer is not None:
            self._writer.write(msgspec.json.encode(answer) + b"\n")
            try:
                await self._writer.drain()
            except OSError:
                pass  # it does not want the answer any more

    async def _answer(self, message: object) -> dict[str, object] | None:
        """The answer to one request; None to a notification."""
        try:
            request = msgspec.convert(message, Request)
            if request.jsonrpc not in ("2.0", ""):
                raise msgspec.ValidationError(f"jsonrpc {request.jsonrpc!r}, want 2.0")
        except msgspec.ValidationError as error:
            known = message.get("id") if isinstance(message, dict) else None
            number = known if isinstance(known, int | str) else None
            return _failure(number, RpcError(INVALID_REQUEST, f"Invalid request: {error}"))
        try:
            result = await self._call(request.method, request.params)
        except RpcError as error:
            outcome = _failure(request.id, error)
        except Exception:  # one mistake of ours must not end the daemon
            log.exception("%s failed", request.method)
            outcome = _failure(request.id, RpcError(INTERNAL_ERROR, "Internal error"))
        else:
            outcome = {"jsonrpc": "2.0", "id": request.id, "result": result}
        return None if request.id is msgspec.UNSET else outcome


def _failure(number: object, error: RpcError) -> dict[str, object]:
    return {"jsonrpc": "2.0", "id": number, "error": {"code": error.code, "message": error.message}}
