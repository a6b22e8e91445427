"""Numbers and layouts of vhost-user and of virtio's common part, typed from their documents."""

from __future__ import annotations

import enum
import struct
from typing import Final


class Request(enum.IntEnum):
    """Front-end message types."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class BackendRequest(enum.IntEnum):
    """Back-end message types."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8


class P(enum.IntFlag):
    """Protocol features, VHOST_USER_PROTOCOL_F_*."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19


class F(enum.IntFlag):
    """Feature bits that belong to no device type (virtio 6; bit 30 is vhost-user's)."""

    NOTIFY_ON_EMPTY = 1 << 24
    LOG_ALL = 1 << 26
    ANY_LAYOUT = 1 << 27
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    SR_IOV = 1 << 37
    NOTIFICATION_DATA = 1 << 38
    NOTIF_CONFIG_DATA = 1 << 39
    RING_RESET = 1 << 40
    ADMIN_VQ = 1 << 41
    DEVICE_SUSPEND = 1 << 42


class Status(enum.IntFlag):
    """The device status field (2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    SUSPEND = 16
    DEVICE_NEEDS_RESET = 64
    FAILED = 128


# Header flags.
VERSION: Final = 1
VERSION_MASK: Final = 3
REPLY: Final = 4
NEED_REPLY: Final = 8

# Bit 8 of the payload of SET_VRING_KICK, CALL and ERR.
NO_FD: Final = 0x100

HEADER: Final = struct.Struct("=III")  # request, flags, size
U64: Final = struct.Struct("=Q")
VRING_STATE: Final = struct.Struct("=II")  # index, num
VRING_ADDR: Final = struct.Struct("=IIQQQQ")  # index, flags, descriptor, used, available, log
REGION: Final = struct.Struct("=QQQQ")  # guest address, size, user address, mmap offset
MEM_TABLE: Final = struct.Struct("=II")  # number of regions, padding; then the regions
ONE_REGION: Final = struct.Struct("=Q")  # padding; then the region
CONFIG: Final = struct.Struct("=III")  # offset, size, flags; then `size` bytes
INFLIGHT: Final = struct.Struct("=QQHH")  # mmap size, mmap offset, queues, queue size

# Split ring.
DESCRIPTOR: Final = struct.Struct("<QIHH")  # address, length, flags, next (2.7.5)
NEXT, WRITE, INDIRECT = 1, 2, 4

# Requests that only a protocol feature makes legal.
GATE: Final[dict[Request, P]] = {
    Request.SET_LOG_FD: P.LOG_SHMFD,
    Request.GET_QUEUE_NUM: P.MQ,
    Request.SEND_RARP: P.RARP,
    Request.NET_SET_MTU: P.MTU,
    Request.SET_BACKEND_REQ_FD: P.BACKEND_REQ,
    Request.SET_VRING_ENDIAN: P.CROSS_ENDIAN,
    Request.GET_CONFIG: P.CONFIG,
    Request.SET_CONFIG: P.CONFIG,
    Request.CREATE_CRYPTO_SESSION: P.CRYPTO_SESSION,
    Request.CLOSE_CRYPTO_SESSION: P.CRYPTO_SESSION,
    Request.POSTCOPY_ADVISE: P.PAGEFAULT,
    Request.POSTCOPY_LISTEN: P.PAGEFAULT,
    Request.POSTCOPY_END: P.PAGEFAULT,
    Request.GET_INFLIGHT_FD: P.INFLIGHT_SHMFD,
    Request.SET_INFLIGHT_FD: P.INFLIGHT_SHMFD,
    Request.RESET_DEVICE: P.RESET_DEVICE,
    Request.VRING_KICK: P.INBAND_NOTIFICATIONS,
    Request.GET_MAX_MEM_SLOTS: P.CONFIGURE_MEM_SLOTS,
    Request.ADD_MEM_REG: P.CONFIGURE_MEM_SLOTS,
    Request.REM_MEM_REG: P.CONFIGURE_MEM_SLOTS,
    Request.SET_STATUS: P.STATUS,
    Request.GET_STATUS: P.STATUS,
    Request.GET_SHARED_OBJECT: P.SHARED_OBJECT,
    Request.SET_DEVICE_STATE_FD: P.DEVICE_STATE,
    Request.CHECK_DEVICE_STATE: P.DEVICE_STATE,
}

# The clause that the conformance list keeps for a gate; the general one is VHU-5.
GATE_CLAUSE: Final[dict[Request, str]] = {
    Request.GET_QUEUE_NUM: "VHU-11",
    Request.GET_MAX_MEM_SLOTS: "VHU-14",
    Request.ADD_MEM_REG: "VHU-14",
    Request.REM_MEM_REG: "VHU-14",
    Request.GET_CONFIG: "VHU-16",
    Request.SET_CONFIG: "VHU-16",
    Request.SET_BACKEND_REQ_FD: "VHU-17",
    Request.GET_INFLIGHT_FD: "VHU-20",
    Request.SET_INFLIGHT_FD: "VHU-20",
    Request.VRING_KICK: "VHU-21",
    Request.RESET_DEVICE: "VHU-22",
    Request.SET_STATUS: "VHU-23",
    Request.GET_STATUS: "VHU-23",
    Request.SET_DEVICE_STATE_FD: "VHU-26",
    Request.CHECK_DEVICE_STATE: "VHU-26",
}

# Payload bytes; -1 where the payload itself says.
SIZE: Final[dict[Request, int]] = {
    Request.GET_FEATURES: 0,
    Request.SET_FEATURES: 8,
    Request.SET_OWNER: 0,
    Request.RESET_OWNER: 0,
    Request.SET_MEM_TABLE: -1,
    Request.SET_VRING_NUM: VRING_STATE.size,
    Request.SET_VRING_ADDR: VRING_ADDR.size,
    Request.SET_VRING_BASE: VRING_STATE.size,
    Request.GET_VRING_BASE: VRING_STATE.size,
    Request.SET_VRING_KICK: 8,
    Request.SET_VRING_CALL: 8,
    Request.SET_VRING_ERR: 8,
    Request.GET_PROTOCOL_FEATURES: 0,
    Request.SET_PROTOCOL_FEATURES: 8,
    Request.GET_QUEUE_NUM: 0,
    Request.SET_VRING_ENABLE: VRING_STATE.size,
    Request.SET_BACKEND_REQ_FD: 0,
    Request.GET_CONFIG: -1,
    Request.SET_CONFIG: -1,
    Request.GET_INFLIGHT_FD: -1,  # 20 bytes, or 24 as some compilers lay it out
    Request.SET_INFLIGHT_FD: -1,
    Request.RESET_DEVICE: 0,
    Request.VRING_KICK: VRING_STATE.size,
    Request.GET_MAX_MEM_SLOTS: 0,
    Request.ADD_MEM_REG: ONE_REGION.size + REGION.size,
    Request.REM_MEM_REG: ONE_REGION.size + REGION.size,
    Request.SET_STATUS: 8,
    Request.GET_STATUS: 0,
}


def bits(value: int) -> str:
    """The numbers of the bits that are set, for messages."""
    return ", ".join(str(bit) for bit in range(value.bit_length()) if value >> bit & 1) or "none"
