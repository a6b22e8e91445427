"""Sense data: what a SCSI device says went wrong (SPC-4, 4.5)."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class SenseKey(enum.IntEnum):
    """The kind of trouble (SPC-4, 4.5.6)."""

    NO_SENSE = 0x0
    RECOVERED_ERROR = 0x1
    NOT_READY = 0x2
    MEDIUM_ERROR = 0x3
    HARDWARE_ERROR = 0x4
    ILLEGAL_REQUEST = 0x5
    UNIT_ATTENTION = 0x6
    DATA_PROTECT = 0x7
    BLANK_CHECK = 0x8
    VENDOR_SPECIFIC = 0x9
    COPY_ABORTED = 0xA
    ABORTED_COMMAND = 0xB
    RESERVED = 0xC
    VOLUME_OVERFLOW = 0xD
    MISCOMPARE = 0xE
    COMPLETED = 0xF


@dataclass(frozen=True, slots=True)
class Sense:
    """One report; `asc` and `ascq` are the additional sense code and its qualifier.

    `information` is the device's own number, for a medium error the first bad block; None when it
    gave none. `deferred`: it is about an earlier command. `problem` says why nothing could be made
    of the bytes, and is empty when they were sense data.
    """

    key: SenseKey
    asc: int = 0
    ascq: int = 0
    information: int | None = None
    deferred: bool = False
    problem: str = ""

    @classmethod
    def decode(cls, data: bytes) -> Sense:
        """Descriptor or fixed format (4.5.2, 4.5.3). Never raises: see `problem`."""
        code = data[0] & 0x7F if data else 0
        if code in _FIXED:
            return cls._decode_fixed(data, code)
        if code in _DESCRIPTOR:
            return cls._decode_descriptor(data, code)
        what = f"{len(data)} bytes, response code {code:#04x}" if data else "none came"
        return cls(SenseKey.NO_SENSE, problem=f"no usable sense data ({what})")

    @classmethod
    def _decode_fixed(cls, data: bytes, code: int) -> Sense:
        if len(data) < 3:
            return cls(SenseKey.NO_SENSE, problem=f"fixed sense data cut off at {len(data)} bytes")
        end = min(len(data), 8 + data[7]) if len(data) > 7 else 0
        return cls(
            SenseKey(data[2] & 0xF),
            data[12] if end > 12 else 0,
            data[13] if end > 13 else 0,
            int.from_bytes(data[3:7], "big") if data[0] & 0x80 and len(data) >= 7 else None,
            code == _FIXED[1],
        )

    @classmethod
    def _decode_descriptor(cls, data: bytes, code: int) -> Sense:
        if len(data) < 4:
            problem = f"descriptor sense data cut off at {len(data)} bytes"
            return cls(SenseKey.NO_SENSE, problem=problem)
        information = None
        rest = data[8 : 8 + data[7]] if len(data) > 7 else b""
        while len(rest) >= 2:
            descriptor, rest = rest[: 2 + rest[1]], rest[2 + rest[1] :]
            if descriptor[0] == 0 and len(descriptor) == 12 and descriptor[2] & 0x80:
                information = int.from_bytes(descriptor[4:], "big")
        return cls(SenseKey(data[1] & 0xF), data[2], data[3], information, code == _DESCRIPTOR[1])

    def encode_fixed(self) -> bytes:
        """18 bytes in fixed format; an `information` above 32 bits does not fit and is left out."""
        data = bytearray(18)
        data[0] = _FIXED[self.deferred]
        data[2] = self.key
        if self.information is not None and self.information < 1 << 32:
            data[0] |= 0x80
            data[3:7] = self.information.to_bytes(4, "big")
        data[7] = len(data) - 8
        data[12:14] = self.asc, self.ascq
        return bytes(data)

    def describe(self) -> str:
        """For a person: "ILLEGAL REQUEST: logical block address out of range (asc 21/00)"."""
        if self.problem:
            return self.problem
        code = f"asc {self.asc:02x}/{self.ascq:02x}"
        text = _TEXTS.get(self.asc << 8 | self.ascq)
        words = self.key.name.replace("_", " ")
        words += f": {text.lower()} ({code})" if text else f" ({code})"
        if self.information is not None:
            words += f", information {self.information}"
        return f"deferred, {words}" if self.deferred else words

    __str__ = describe


_FIXED = (0x70, 0x71)  # response codes: current, deferred
_DESCRIPTOR = (0x72, 0x73)

# What block devices say (SPC-4, annex F), keyed by asc << 8 | ascq.
_TEXTS = {
    0x0000: "NO ADDITIONAL SENSE INFORMATION",
    0x0016: "OPERATION IN PROGRESS",
    0x0300: "PERIPHERAL DEVICE WRITE FAULT",
    0x0400: "LOGICAL UNIT NOT READY, CAUSE NOT REPORTABLE",
    0x0401: "LOGICAL UNIT IS IN PROCESS OF BECOMING READY",
    0x0402: "LOGICAL UNIT NOT READY, INITIALIZING COMMAND REQUIRED",
    0x0403: "LOGICAL UNIT NOT READY, MANUAL INTERVENTION REQUIRED",
    0x0404: "LOGICAL UNIT NOT READY, FORMAT IN PROGRESS",
    0x0405: "LOGICAL UNIT NOT READY, REBUILD IN PROGRESS",
    0x0407: "LOGICAL UNIT NOT READY, OPERATION IN PROGRESS",
    0x0409: "LOGICAL UNIT NOT READY, SELF-TEST IN PROGRESS",
    0x040A: "LOGICAL UNIT NOT ACCESSIBLE, ASYMMETRIC ACCESS STATE TRANSITION",
    0x040B: "LOGICAL UNIT NOT ACCESSIBLE, TARGET PORT IN STANDBY STATE",
    0x040C: "LOGICAL UNIT NOT ACCESSIBLE, TARGET PORT IN UNAVAILABLE STATE",
    0x041B: "LOGICAL UNIT NOT READY, SANITIZE IN PROGRESS",
    0x0500: "LOGICAL UNIT DOES NOT RESPOND TO SELECTION",
    0x0800: "LOGICAL UNIT COMMUNICATION FAILURE",
    0x0801: "LOGICAL UNIT COMMUNICATION TIME-OUT",
    0x0B00: "WARNING",
    0x0B01: "WARNING - SPECIFIED TEMPERATURE EXCEEDED",
    0x0C00: "WRITE ERROR",
    0x0C02: "WRITE ERROR - AUTO REALLOCATION FAILED",
    0x0C03: "WRITE ERROR - RECOMMEND REASSIGNMENT",
    0x0E00: "INVALID INFORMATION UNIT",
    0x1000: "ID CRC OR ECC ERROR",
    0x1001: "LOGICAL BLOCK GUARD CHECK FAILED",
    0x1002: "LOGICAL BLOCK APPLICATION TAG CHECK FAILED",
    0x1003: "LOGICAL BLOCK REFERENCE TAG CHECK FAILED",
    0x1100: "UNRECOVERED READ ERROR",
    0x1101: "READ RETRIES EXHAUSTED",
    0x1104: "UNRECOVERED READ ERROR - AUTO REALLOCATE FAILED",
    0x1500: "RANDOM POSITIONING ERROR",
    0x1700: "RECOVERED DATA WITH NO ERROR CORRECTION APPLIED",
    0x1800: "RECOVERED DATA WITH ERROR CORRECTION APPLIED",
    0x1A00: "PARAMETER LIST LENGTH ERROR",
    0x1B00: "SYNCHRONOUS DATA TRANSFER ERROR",
    0x1D00: "MISCOMPARE DURING VERIFY OPERATION",
    0x2000: "INVALID COMMAND OPERATION CODE",
    0x2100: "LOGICAL BLOCK ADDRESS OUT OF RANGE",
    0x2400: "INVALID FIELD IN CDB",
    0x2500: "LOGICAL UNIT NOT SUPPORTED",
    0x2600: "INVALID FIELD IN PARAMETER LIST",
    0x2601: "PARAMETER NOT SUPPORTED",
    0x2602: "PARAMETER VALUE INVALID",
    0x2700: "WRITE PROTECTED",
    0x2701: "HARDWARE WRITE PROTECTED",
    0x2702: "LOGICAL UNIT SOFTWARE WRITE PROTECTED",
    0x2707: "SPACE ALLOCATION FAILED WRITE PROTECT",
    0x2800: "NOT READY TO READY CHANGE, MEDIUM MAY HAVE CHANGED",
    0x2900: "POWER ON, RESET, OR BUS DEVICE RESET OCCURRED",
    0x2901: "POWER ON OCCURRED",
    0x2902: "SCSI BUS RESET OCCURRED",
    0x2903: "BUS DEVICE RESET FUNCTION OCCURRED",
    0x2904: "DEVICE INTERNAL RESET",
    0x2907: "I_T NEXUS LOSS OCCURRED",
    0x2A00: "PARAMETERS CHANGED",
    0x2A01: "MODE PARAMETERS CHANGED",
    0x2A03: "RESERVATIONS PREEMPTED",
    0x2A04: "RESERVATIONS RELEASED",
    0x2A05: "REGISTRATIONS PREEMPTED",
    0x2A06: "ASYMMETRIC ACCESS STATE CHANGED",
    0x2A09: "CAPACITY DATA HAS CHANGED",
    0x2C00: "COMMAND SEQUENCE ERROR",
    0x2F00: "COMMANDS CLEARED BY ANOTHER INITIATOR",
    0x3000: "INCOMPATIBLE MEDIUM INSTALLED",
    0x3100: "MEDIUM FORMAT CORRUPTED",
    0x3200: "NO DEFECT SPARE LOCATION AVAILABLE",
    0x3807: "THIN PROVISIONING SOFT THRESHOLD REACHED",
    0x3900: "SAVING PARAMETERS NOT SUPPORTED",
    0x3A00: "MEDIUM NOT PRESENT",
    0x3D00: "INVALID BITS IN IDENTIFY MESSAGE",
    0x3E00: "LOGICAL UNIT HAS NOT SELF-CONFIGURED YET",
    0x3E01: "LOGICAL UNIT FAILURE",
    0x3E02: "TIMEOUT ON LOGICAL UNIT",
    0x3F00: "TARGET OPERATING CONDITIONS HAVE CHANGED",
    0x3F01: "MICROCODE HAS BEEN CHANGED",
    0x3F03: "INQUIRY DATA HAS CHANGED",
    0x3F0E: "REPORTED LUNS DATA HAS CHANGED",
    0x4400: "INTERNAL TARGET FAILURE",
    0x4500: "SELECT OR RESELECT FAILURE",
    0x4700: "SCSI PARITY ERROR",
    0x4800: "INITIATOR DETECTED ERROR MESSAGE RECEIVED",
    0x4900: "INVALID MESSAGE ERROR",
    0x4B00: "DATA PHASE ERROR",
    0x4C00: "LOGICAL UNIT FAILED SELF-CONFIGURATION",
    0x4E00: "OVERLAPPED COMMANDS ATTEMPTED",
    0x5300: "MEDIA LOAD OR EJECT FAILED",
    0x5302: "MEDIUM REMOVAL PREVENTED",
    0x5500: "SYSTEM RESOURCE FAILURE",
    0x5503: "INSUFFICIENT RESOURCES",
    0x5D00: "FAILURE PREDICTION THRESHOLD EXCEEDED",
    0x5E00: "LOW POWER CONDITION ON",
    0x6500: "VOLTAGE FAULT",
}
