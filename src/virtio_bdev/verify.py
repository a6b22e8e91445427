"""Whether a disk keeps what it is given: blocks that each say where they belong, written and read back."""

from __future__ import annotations

import random
import struct
import time
import zlib
from abc import ABC, abstractmethod
from array import array
from operator import itemgetter
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

from virtio.errors import RequestError, VirtioError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from virtio_bdev.channel import Channel

How: TypeAlias = Literal["pattern", "crc"]
_HOWS: tuple[How, ...] = get_args(How)

_WORD = struct.Struct("<Q")  # at the end of each sector
_SECTOR = 512
# Magic, where it belongs, the seed and the number of its pass, its size, how it was made, its checksum.
_HEADER = struct.Struct("<8sQQQIII")
_CRC, _CRC_AT = struct.Struct("<I"), _HEADER.size - 4
_MAGIC = b"vb-check"
_CHUNK = 4 << 20  # bytes that are written, or read, by one call
_MOST_TOLD = 3
_LAST = (1 << 64) - 1
_MIX = 0x9E3779B97F4A7C15  # which spreads places over 64 bits


class VerifyError(VirtioError):
    """The disk has something else than what was written to it; says what, and where."""


class Verified(NamedTuple):
    """What was written, read back and found as it should be: so many blocks, and the seconds it took."""

    blocks: int
    nbytes: int
    write_seconds: float
    read_seconds: float


def verify(
    channel: Channel,
    *,
    bs: int = 4096,
    offset: int = 0,
    size: int | None = None,
    seed: int | None = None,
    how: How = "pattern",
    write: bool = True,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> Verified:
    """Write every block of `bs` bytes from `offset` on, flush, and read all of it back.

    Each block has its own place, the `seed`, a number that no other pass has, and bytes: of a "pattern" that
    follows from these, or, for "crc", any bytes and their checksum. A write that was lost, also over an older
    pass with the same seed, went elsewhere, or is there only in part is told from another, by a VerifyError.
    Without `write` it only reads back what another pass with the same options has written, whose `seed` has
    to be given; all blocks are to be of one pass. As many requests are in flight as the queue holds, in no
    order. It overwrites `size` bytes, to the disk's end unless given. `progress` is told of bytes written,
    and of bytes read.
    """
    bdev = channel.bdev
    bdev.check(offset, bs, write=write)
    if seed is None and not write:
        raise RequestError("what another pass has written is known by its seed: give that")
    size = (bdev.size - offset if size is None else size) // bs * bs
    if bs < _HEADER.size or not 0 < size <= bdev.size - offset:
        raise RequestError(
            f"blocks of {bs} bytes on {size} from {offset} on: want {_HEADER.size} or more, and at most "
            f"{bdev.size - offset}"
        )
    seed = random.getrandbits(64) if seed is None else seed & _LAST
    blocks = (_Pattern if how == "pattern" else _Crc)(bs, seed, random.getrandbits(64) if write else None)
    took = {"write": 0.0, "read": 0.0}
    for what in took if write else ["read"]:
        begun = time.monotonic()
        for places in _chunks(offset, size, bs, random.Random(seed)):
            if what == "write":
                data = b"".join(map(blocks.at, places))
                channel.write_batch(places, bs, data).raise_for_status()
            else:
                into = bytearray(len(places) * bs)
                channel.read_batch(places, bs, into).raise_for_status()
                blocks.check(places, memoryview(into), bdev.name)
            progress(len(places) * bs)
        if what == "write":
            channel.flush()
        took[what] = time.monotonic() - begun
    return Verified(size // bs, size, took["write"], took["read"])


def _chunks(offset: int, size: int, bs: int, chance: random.Random) -> Iterator[array[int]]:
    """All places, those near each other in no order."""
    step = max(1, _CHUNK // bs) * bs
    for begin in range(offset, offset + size, step):
        places = list(range(begin, min(begin + step, offset + size), bs))
        chance.shuffle(places)
        yield array("Q", places)


class _Blocks(ABC):
    """What each block is to be: a header, and bytes that nothing else on the disk is likely to have."""

    how: How

    def __init__(self, bs: int, seed: int, number: int | None) -> None:
        """`number` is that of the pass: None if the first block that is found says it."""
        self._bs, self._seed, self._number = bs, seed, number
        self._noise = random.Random(seed).randbytes(2 * bs)

    @abstractmethod
    def at(self, place: int) -> bytes:
        """The block that is to be written there."""

    @abstractmethod
    def plight(self, place: int, block: bytes) -> str:
        """What is wrong with a block that was read there; nothing if it is right."""

    def check(self, places: array[int], found: memoryview, name: str) -> None:
        wrong = []
        for number, place in sorted(enumerate(places), key=itemgetter(1)):
            said = self.plight(place, bytes(found[number * self._bs : (number + 1) * self._bs]))
            if said:
                wrong.append(said)
        if wrong:
            more = f"; and {len(wrong) - _MOST_TOLD} more near there" if len(wrong) > _MOST_TOLD else ""
            raise VerifyError(f"{name}: {'; '.join(wrong[:_MOST_TOLD])}{more}")

    def _made(self, place: int, mixed: int) -> bytearray:
        """A header, noise from where `mixed` says on, and `mixed` itself in each sector."""
        shift = (mixed >> 20) % self._bs
        noise = self._noise[shift : shift + self._bs - _HEADER.size]
        number = self._number or 0
        kind = _HOWS.index(self.how)
        block = bytearray(_HEADER.pack(_MAGIC, place, self._seed, number, self._bs, kind, 0) + noise)
        # So that no two are alike, wherever they are cut.
        for sector in range(_SECTOR - 8, self._bs, _SECTOR):
            _WORD.pack_into(block, sector, mixed)
        return block

    def _misplaced(self, place: int, block: bytes) -> str:
        """What the header of a block says that it should not."""
        magic, claimed, seed, number, bs, kind, _ = _HEADER.unpack_from(block)
        if magic != _MAGIC:
            return f"the block at {place} is as it was before, or not ours: the write was lost"
        if seed != self._seed:
            return f"the block at {place} is as it was before, of a pass with seed {seed}: the write was lost"
        if (bs, kind) != (self._bs, _HOWS.index(self.how)):
            made = _HOWS[kind] if kind < len(_HOWS) else f"kind {kind}"
            return f"the block at {place} was written as {made}, {bs} bytes, not {self.how}, {self._bs} bytes"
        if self._number is None:
            self._number = number
        if number != self._number:
            return f"the block at {place} is of another pass with the same seed: the write was lost"
        if claimed != place:
            return f"the block at {place} is the one that was written to {claimed}"
        return ""


class _Pattern(_Blocks):
    """All bytes follow from the place and the pass."""

    how = "pattern"

    def at(self, place: int) -> bytes:
        return bytes(self._made(place, (place * _MIX & _LAST) ^ self._seed ^ (self._number or 0)))

    def plight(self, place: int, block: bytes) -> str:
        said = self._misplaced(place, block)
        wanted = self.at(place)
        if said or block == wanted:
            return said
        first = next(i for i in range(self._bs) if block[i] != wanted[i])
        return f"the block at {place} is right up to byte {first}, and wrong there: torn, or altered"


class _Crc(_Blocks):
    """Bytes that nobody can foresee, and their checksum."""

    how = "crc"

    def at(self, place: int) -> bytes:
        block = self._made(place, random.getrandbits(64))
        _CRC.pack_into(block, _CRC_AT, zlib.crc32(block))
        return bytes(block)

    def plight(self, place: int, block: bytes) -> str:
        sound = bytearray(block)
        (crc,) = _CRC.unpack_from(block, _CRC_AT)
        _CRC.pack_into(sound, _CRC_AT, 0)
        torn = f"the block at {place} has the checksum of another one: torn, or altered"
        return self._misplaced(place, block) or ("" if zlib.crc32(sound) == crc else torn)
