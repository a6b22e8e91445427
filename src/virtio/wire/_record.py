"""What the fixed-size records of a wire protocol share."""

from __future__ import annotations

import struct
from typing import ClassVar, Self

from virtio.errors import ProtocolError


class Record:
    """A frozen slotted dataclass of numbers whose fields are packed in their order."""

    __slots__: tuple[str, ...] = ()
    FORMAT: ClassVar[struct.Struct]

    def encode(self) -> bytes:
        """The bytes of the record, `FORMAT.size` of them."""
        return self.FORMAT.pack(*(getattr(self, name) for name in self.__slots__))

    @classmethod
    def decode(cls, payload: bytes) -> Self:
        """The record in exactly these bytes; ProtocolError when there are more or fewer."""
        if len(payload) != cls.FORMAT.size:
            raise ProtocolError(f"{cls.__name__} of {len(payload)} bytes, want {cls.FORMAT.size}")
        return cls(*cls.FORMAT.unpack(payload))

    def describe(self) -> str:
        """The fields on one line, large numbers in hexadecimal, for a trace."""
        values = ((name, getattr(self, name)) for name in self.__slots__)
        return " ".join(f"{name}={v if v <= 0xFFFF else hex(v)}" for name, v in values)
