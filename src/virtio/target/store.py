"""What a target's disks keep their data in: memory, or a file or block device.

Offsets and lengths are bytes; the device that calls has checked them against `size` and
`read_only`. A failure is an OSError.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import mmap
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, Self

from virtio.errors import RequestError

_IOV_MAX = 1024  # buffers in one preadv (limits.h)
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16  # modes of fallocate(2)
_ZEROS = bytes(1 << 20)
_libc = ctypes.CDLL(None, use_errno=True)


class Store(Protocol):
    """The bytes of one disk."""

    size: int
    block_size: int
    read_only: bool
    serial: str  # at most 20 ASCII characters

    def read(self, offset: int, into: Sequence[memoryview]) -> None:
        """Fill the buffers, one after another, from `offset` on."""

    def write(self, offset: int, data: Sequence[memoryview]) -> None:
        """Write the buffers, one after another, from `offset` on."""

    def flush(self) -> None:
        """Make durable whatever was written."""

    def zero(self, offset: int, nbytes: int, *, unmap: bool) -> None:
        """Let a range read as zeros; `unmap` gives its space back where that is possible."""

    def resize(self, size: int) -> None:
        """Be `size` bytes long; what is new reads as zeros. RequestError if that cannot be."""

    def close(self) -> None:
        """Let go of the file or the memory."""


class FileStore:
    """A regular file or a block device, in place."""

    kind = "file"
    _fd = -1

    def __init__(
        self, path: str, *, read_only: bool = False, block_size: int = 512, serial: str = ""
    ) -> None:
        self._fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        name = hashlib.blake2s(os.path.realpath(path).encode(), digest_size=8).hexdigest()
        try:
            kind = os.fstat(self._fd).st_mode
            if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
                raise RequestError(f"{path} is neither a regular file nor a block device")
            self._describe(os.lseek(self._fd, 0, os.SEEK_END), read_only, block_size, serial or name)
        except (OSError, RequestError):
            self.close()
            raise

    @classmethod
    def adopt(cls, fd: int, size: int, *, read_only: bool, block_size: int, serial: str) -> Self:
        """The same store in another process, which was sent its descriptor and owns that now."""
        store = cls.__new__(cls)
        store._fd = fd
        store._describe(size, read_only, block_size, serial)
        store._map(size)
        return store

    def fileno(self) -> int:
        """The descriptor, for `adopt` in another process."""
        return self._fd

    def _describe(self, size: int, read_only: bool, block_size: int, serial: str) -> None:
        if block_size not in (512, 1024, 2048, 4096):
            raise RequestError(f"block size {block_size}, want 512, 1024, 2048 or 4096")
        _check_size(size, block_size)
        if not serial.isascii() or not 0 < len(serial) <= 20:
            raise RequestError(f"serial number {serial!r}, want 1 to 20 ASCII characters")
        self.size, self.block_size = size, block_size
        self.read_only, self.serial = read_only, serial

    def read(self, offset: int, into: Sequence[memoryview]) -> None:
        for start in range(0, len(into), _IOV_MAX):
            part = into[start : start + _IOV_MAX]
            want = sum(map(len, part))
            if os.preadv(self._fd, part, offset) != want:
                raise OSError(errno.EIO, f"short read of {want} bytes at {offset}")
            offset += want

    def write(self, offset: int, data: Sequence[memoryview]) -> None:
        for start in range(0, len(data), _IOV_MAX):
            part = data[start : start + _IOV_MAX]
            want = sum(map(len, part))
            if os.pwritev(self._fd, part, offset) != want:
                raise OSError(errno.EIO, f"short write of {want} bytes at {offset}")
            offset += want

    def flush(self) -> None:
        os.fdatasync(self._fd)

    def zero(self, offset: int, nbytes: int, *, unmap: bool) -> None:
        mode = (_PUNCH_HOLE if unmap else _ZERO_RANGE) | _KEEP_SIZE
        start, length = ctypes.c_int64(offset), ctypes.c_int64(nbytes)
        if nbytes == 0 or _libc.fallocate(self._fd, mode, start, length) == 0:
            return
        if ctypes.get_errno() not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        for at in range(offset, offset + nbytes, len(_ZEROS)):  # the file system has no such call
            self.write(at, [memoryview(_ZEROS)[: offset + nbytes - at]])

    def resize(self, size: int) -> None:
        _check_size(size, self.block_size)
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            raise RequestError("a block device keeps its size")
        if self.read_only and self.kind == "file":
            raise RequestError("a file that is read-only keeps its size")
        if size < self.size:  # first the mapping, as what is mapped past the end of a file kills (SIGBUS)
            self._map(size)
        os.ftruncate(self._fd, size)
        if size > self.size:
            self._map(size)
        self.size = size

    def _map(self, size: int) -> None:
        pass

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


class MemoryStore(FileStore):
    """Shared memory: what one session writes, the next one reads, though each is a process."""

    kind = "ram"
    _view = memoryview(b"")

    def __init__(
        self, size: int, *, read_only: bool = False, block_size: int = 512, serial: str = ""
    ) -> None:
        self._describe(size, read_only, block_size, serial or os.urandom(8).hex())
        self._fd = os.memfd_create("virtio-target")
        os.ftruncate(self._fd, size)
        self._map(size)

    def _map(self, size: int) -> None:
        self._view = memoryview(mmap.mmap(self._fd, size))

    def read(self, offset: int, into: Sequence[memoryview]) -> None:
        for view in into:
            end = offset + len(view)
            view[:] = self._view[offset:end]
            offset = end

    def write(self, offset: int, data: Sequence[memoryview]) -> None:
        for view in data:
            end = offset + len(view)
            self._view[offset:end] = view
            offset = end

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._view = memoryview(b"")
        super().close()


@dataclass
class Faults:
    """What a disk does wrong on purpose: for tests of whoever uses it.

    `fail` names operations (read, write, zero, flush), each with the byte at which it fails with
    EIO; with `every`, each so-many-th command of data does. A command of data takes `delay`
    seconds. The next `busy` commands are answered so; while `hang`, none is answered at all.
    """

    fail: dict[str, int] = field(default_factory=dict)
    every: int = 0
    delay: float = 0.0
    busy: int = 0
    hang: bool = False
    count: int = 0  # commands of data so far
    failing: bool = False  # the one that is being done is the so-many-th

    @property
    def wait(self) -> bool:
        """Whether a command has to be looked at before it is done."""
        return bool(self.every or self.delay or self.busy or self.hang)

    def begin(self) -> None:
        """A command of data begins; set `failing` back when it has ended."""
        self.count += 1
        self.failing = bool(self.every) and self.count % self.every == 0


class FaultyStore:
    """A store in which operations fail as `faults` have it, whenever they change."""

    def __init__(self, store: Store, faults: Faults) -> None:
        self.store, self.faults = store, faults
        self.size, self.block_size = store.size, store.block_size
        self.read_only, self.serial = store.read_only, store.serial

    def _trip(self, operation: str, offset: int, nbytes: int) -> None:
        at = self.faults.fail.get(operation, -1)
        if offset <= at < offset + nbytes:
            raise OSError(errno.EIO, f"{operation} told to fail at {at}")
        if self.faults.failing:
            raise OSError(errno.EIO, f"command {self.faults.count} told to fail")

    def read(self, offset: int, into: Sequence[memoryview]) -> None:
        self._trip("read", offset, sum(map(len, into)))
        self.store.read(offset, into)

    def write(self, offset: int, data: Sequence[memoryview]) -> None:
        self._trip("write", offset, sum(map(len, data)))
        self.store.write(offset, data)

    def flush(self) -> None:
        self._trip("flush", 0, self.size)
        self.store.flush()

    def zero(self, offset: int, nbytes: int, *, unmap: bool) -> None:
        self._trip("zero", offset, nbytes)
        self.store.zero(offset, nbytes, unmap=unmap)

    def resize(self, size: int) -> None:
        self.store.resize(size)
        self.size = size

    def close(self) -> None:
        self.store.close()


def part(store: Store) -> tuple[Store, Faults]:
    """A store and its faults apart."""
    return (store.store, store.faults) if isinstance(store, FaultyStore) else (store, Faults())


def join(store: Store, faults: Faults) -> Store:
    """A store with its faults, which is no slower than without as long as none of it can fail."""
    return FaultyStore(store, faults) if faults.fail or faults.every else store


def describe(store: Store) -> tuple[int, dict[str, Any]]:
    """What `adopt` needs: the descriptor, and a description as JSON has it."""
    own, faults = part(store)
    assert isinstance(own, FileStore)
    return own.fileno(), {
        "kind": own.kind,
        "size": own.size,
        "read_only": own.read_only,
        "block_size": own.block_size,
        "serial": own.serial,
        "faults": asdict(faults),
    }


def adopt(fd: int, description: Mapping[str, Any]) -> Store:
    """The store that another process described; `fd` is its own from here on."""
    values = dict(description)
    faults = Faults(**values.pop("faults"))
    kind = MemoryStore if values.pop("kind") == MemoryStore.kind else FileStore
    return FaultyStore(kind.adopt(fd, **values), faults)


def _check_size(size: int, block_size: int) -> None:
    if not 0 < size < 1 << 63 or size % block_size:
        raise RequestError(f"a disk of {size} bytes, want a multiple of {block_size}")


def parse_size(text: str) -> int:
    """Bytes in "4096", "64M" or "64MiB"; every unit is a power of 1024."""
    match = re.fullmatch(r"(\d+)([kKMGT]?)(?:i?B)?", text)
    if match is None:
        raise RequestError(f"size {text!r}, want a number and perhaps k, M, G or T")
    return int(match[1]) << 10 * " KMGT".index(match[2].upper() or " ")


def parse_disk(spec: str) -> Store:
    """Open what "ram:SIZE" or "file:PATH" and options behind it, set off by commas, describe.

    The options: `ro`; `bs=SIZE` of a block; `id=SERIAL`; and for tests `delay=SECONDS`,
    `fail-read=OFFSET`, `fail-write=OFFSET`, `fail-zero=OFFSET` and `fail-flush`.
    """
    kind, _, rest = spec.partition(":")
    name, *options = rest.split(",")
    if kind not in ("ram", "file") or not name:
        raise RequestError(f"disk {spec!r}, want ram:SIZE or file:PATH")
    read_only, block_size, serial = False, 512, ""
    fail: dict[str, int] = {}
    delay = 0.0
    for option in options:
        key, _, value = option.partition("=")
        if option == "ro":
            read_only = True
        elif key == "bs":
            block_size = parse_size(value)
        elif key == "id":
            serial = value
        elif key in ("fail-read", "fail-write", "fail-zero"):
            fail[key.removeprefix("fail-")] = parse_size(value)
        elif option == "fail-flush":
            fail["flush"] = 0
        elif key == "delay" and re.fullmatch(r"\d*\.?\d+", value):
            delay = float(value)
        else:
            raise RequestError(f"option {option!r} of disk {spec!r}, want ro, bs=SIZE or id=SERIAL")
    store: FileStore
    try:
        if kind == "ram":
            size = parse_size(name)
            store = MemoryStore(size, read_only=read_only, block_size=block_size, serial=serial)
        else:
            store = FileStore(name, read_only=read_only, block_size=block_size, serial=serial)
    except RequestError as error:
        raise RequestError(f"disk {spec!r}: {error}") from None
    return FaultyStore(store, Faults(fail, delay=delay)) if fail or delay else store
