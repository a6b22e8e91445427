"""Loads, stores, fences and copies on raw memory; `_mem.pxd` is the compiled twin.

A `Mem` is a window of bytes, and every access names a byte offset in it. This twin is for tests,
debugging and reading. A store through a cast view is one aligned move of its width on x86-64;
`struct.pack_into` is not (it zeroes the field first, and the peer can see that). On other machines
only the compiled twin orders memory.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from typing_extensions import Buffer

Mem: TypeAlias = "memoryview[Any]"

_lock = threading.Lock()


def window(owner: Buffer) -> Mem:
    """All bytes of `owner`, which the caller keeps alive and unmoved as long as the window."""
    return memoryview(owner).cast("B")


def null() -> Mem:
    """A window of nothing."""
    return memoryview(b"")


def load_u8(mem: Mem, offset: int) -> int:
    return int(mem[offset])


def load_u16(mem: Mem, offset: int) -> int:
    return int(mem[offset : offset + 2].cast("H")[0])


def load_u32(mem: Mem, offset: int) -> int:
    return int(mem[offset : offset + 4].cast("I")[0])


def load_i32(mem: Mem, offset: int) -> int:
    return int(mem[offset : offset + 4].cast("i")[0])


def load_u64(mem: Mem, offset: int) -> int:
    return int(mem[offset : offset + 8].cast("Q")[0])


def store_u8(mem: Mem, offset: int, value: int) -> None:
    mem[offset] = value


def store_u16(mem: Mem, offset: int, value: int) -> None:
    mem[offset : offset + 2].cast("H")[0] = value


def store_u32(mem: Mem, offset: int, value: int) -> None:
    mem[offset : offset + 4].cast("I")[0] = value


def store_i32(mem: Mem, offset: int, value: int) -> None:
    mem[offset : offset + 4].cast("i")[0] = value


def store_u64(mem: Mem, offset: int, value: int) -> None:
    mem[offset : offset + 8].cast("Q")[0] = value


def store_field(mem: Mem, offset: int, value: int, width: int, big_endian: bool) -> None:
    """Store the low `width` bytes of `value`, in either byte order, at any alignment."""
    low = value & ((1 << 8 * width) - 1)
    mem[offset : offset + width] = low.to_bytes(width, "big" if big_endian else "little")


def load_acquire_u16(mem: Mem, offset: int) -> int:
    return load_u16(mem, offset)


def load_acquire_u32(mem: Mem, offset: int) -> int:
    return load_u32(mem, offset)


def store_release_u16(mem: Mem, offset: int, value: int) -> None:
    store_u16(mem, offset, value)


def store_release_u32(mem: Mem, offset: int, value: int) -> None:
    store_u32(mem, offset, value)


def swap_u32(mem: Mem, offset: int, value: int) -> int:
    """Store `value` and return what was there, as one step for all threads."""
    with _lock:
        old = load_u32(mem, offset)
        store_u32(mem, offset, value)
        return old


def full_fence() -> None:
    with _lock:  # a locked read-modify-write is a full barrier on x86-64
        pass


def device_fence() -> None:
    """What was stored before is there for a device too, before it sees what is stored after."""
    full_fence()


def copy(to: Mem, to_offset: int, source: Mem, offset: int, nbytes: int) -> None:
    to[to_offset : to_offset + nbytes] = source[offset : offset + nbytes]


def fill(mem: Mem, offset: int, value: int, nbytes: int) -> None:
    mem[offset : offset + nbytes] = bytes([value]) * nbytes


def address(mem: Mem) -> int:
    """Where the window begins in this process."""
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(mem))


class Py_buffer:
    """The C structure's name, for annotations."""


def expose(view: Py_buffer, owner: object, mem: Mem, flags: int) -> None:
    """Fill a C `Py_buffer`; interpreted classes have `__buffer__` instead, and never come here."""
    raise BufferError("the C buffer protocol needs the compiled module")
