"""The virtio block device of the target: requests as bytes (virtio 5.2.6)."""

import struct

import pytest
from hypothesis import given, strategies as st

from tests.space import allocated, gave_back
from tests.target.perform import Queue, perform
from virtio.errors import ProtocolError
from virtio.target.blk import BlkDevice
from virtio.target.store import Faults, FaultyStore, FileStore, MemoryStore

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, SECURE_ERASE = 0, 1, 4, 8, 11, 13, 14
OK, IOERR, UNSUPP = b"\0", b"\1", b"\2"
MIB = 1 << 20


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)  # type, reserved, sector


def sectors(first: int, count: int, flags: int = 0) -> bytes:
    return struct.pack("<QII", first, count, flags)  # sector, num_sectors, flags


@pytest.fixture
def device():
    return BlkDevice(MemoryStore(MIB, serial="serial"), queues=3)


def test_what_is_written_is_read(device):
    request = device.handlers[2]
    # type 1: OUT     reserved      sector 2, little-endian
    out = b"\1\0\0\0\0\0\0\0\2\0\0\0\0\0\0\0"
    assert perform(request, [out, b"a" * 512, b"b" * 512], [1]) == (1, [OK])
    assert perform(request, [header(IN, 1)], [512, 1024, 512, 1]) == (
        2049,  # data and status
        [bytes(512), b"a" * 512 + b"b" * 512, bytes(512), OK],
    )


def test_the_layout_of_descriptors_does_not_matter(device):
    assert perform(device.handle, [header(OUT)[:3], header(OUT)[3:] + b"c" * 500, b"c" * 12], [1])[1] == [OK]
    assert perform(device.handle, [header(IN)], [100, 413]) == (513, [b"c" * 100, b"c" * 412 + OK])


@pytest.mark.parametrize(
    ("kind", "sector", "nbytes"),
    [
        (IN, 2048, 512),  # the first that there is not
        (IN, 2047, 1024),
        (IN, 2**64 - 1, 512),
        (IN, 0, 511),  # not whole sectors
        (OUT, 2048, 512),
        (OUT, 2**55, 512),
        (OUT, 0, 513),
    ],
)
def test_what_is_not_on_the_disk_is_an_error(device, kind, sector, nbytes):
    if kind == IN:
        # what is not read is zeros, as the length says that it was set
        expected = (nbytes + 1, [bytes(nbytes), IOERR])
        assert perform(device.handle, [header(IN, sector)], [nbytes, 1]) == expected
    else:
        assert perform(device.handle, [header(OUT, sector), bytes(nbytes)], [1]) == (1, [IOERR])


def test_unknown_requests_are_unsupported(device):
    assert perform(device.handle, [header(99)], [1]) == (1, [UNSUPP])
    assert perform(device.handle, [header(SECURE_ERASE), sectors(0, 8)], [1]) == (1, [UNSUPP])


def test_flush_and_id(device):
    assert perform(device.handle, [header(FLUSH)], [1]) == (1, [OK])
    assert perform(device.handle, [header(GET_ID)], [20, 1]) == (21, [b"serial".ljust(20, b"\0"), OK])


@pytest.mark.parametrize(("readable", "writable"), [([b"x" * 15], [1]), ([header(IN)], [])])
def test_a_request_without_header_or_status_ends_the_session(device, readable, writable):
    with pytest.raises(ProtocolError, match="want at least 16 and 1"):
        perform(device.handle, readable, writable)


def test_discard_and_write_zeroes_take_several_ranges(device):
    perform(device.handle, [header(OUT), b"x" * 4096], [1])
    ranges = sectors(0, 1) + sectors(3, 2)
    assert perform(device.handle, [header(WRITE_ZEROES), ranges], [1]) == (1, [OK])
    assert perform(device.handle, [header(DISCARD), sectors(6, 1)], [1]) == (1, [OK])
    _, (data, _) = perform(device.handle, [header(IN)], [4096, 1])
    assert [data[at] for at in range(0, 4096, 512)] == [0, 120, 120, 0, 0, 120, 0, 120]


@pytest.mark.parametrize(
    ("kind", "ranges", "status"),
    [
        (DISCARD, sectors(0, 1, 1), UNSUPP),  # unmap is for WRITE_ZEROES
        (WRITE_ZEROES, sectors(0, 1, 1), OK),
        (WRITE_ZEROES, sectors(0, 1, 2), UNSUPP),  # a reserved flag
        (WRITE_ZEROES, sectors(0, 1) + sectors(2048, 1), IOERR),
        (DISCARD, sectors(2**64 - 1, 1), IOERR),
        (DISCARD, sectors(0, 2**32 - 1), IOERR),
        (DISCARD, sectors(0, 1)[:15], IOERR),
        (DISCARD, b"", IOERR),
        (DISCARD, sectors(0, 1) * 33, IOERR),  # max_discard_seg is 32
    ],
)
def test_ranges_are_checked_before_any_is_touched(device, kind, ranges, status):
    perform(device.handle, [header(OUT), b"x" * 512], [1])
    readable = [header(kind), ranges] if ranges else [header(kind)]
    assert perform(device.handle, readable, [1]) == (1, [status])
    assert (perform(device.handle, [header(IN)], [512, 1])[1][0] == bytes(512)) == (status == OK)


@given(
    kind=st.sampled_from([*range(16), 2**32 - 1]),
    sector=st.sampled_from([0, 1, 2047, 2048, 2**55, 2**64 - 1]),
    data=st.binary(max_size=64) | st.sampled_from([bytes(512), sectors(0, 1), sectors(2**63, 2**32 - 1, 3)]),
    writable=st.lists(st.sampled_from([1, 20, 512]), min_size=1, max_size=3),
)
def test_any_request_at_all_gets_a_status(kind, sector, data, writable):
    device = BlkDevice(MemoryStore(MIB), queues=1)
    length, parts = perform(device.handle, [header(kind, sector), data] if data else [header(kind)], writable)
    assert length == sum(writable) and parts[-1][-1:] in (OK, IOERR, UNSUPP)


def test_a_read_only_disk_is_not_written():
    device = BlkDevice(MemoryStore(MIB, read_only=True), queues=1)
    assert device.features & 1 << 5 and not device.features & (1 << 13 | 1 << 14)  # RO; DISCARD, ZEROES
    assert perform(device.handle, [header(OUT), bytes(512)], [1]) == (1, [IOERR])
    assert perform(device.handle, [header(WRITE_ZEROES), sectors(0, 1)], [1]) == (1, [IOERR])
    assert perform(device.handle, [header(IN)], [512, 1])[1][1] == OK


def test_failures_of_the_store_are_errors_of_the_request():
    store = FaultyStore(MemoryStore(MIB), Faults({"read": 4096, "write": 0, "flush": 0, "zero": 512}))
    device = BlkDevice(store, queues=1)
    status = lambda *request: perform(device.handle, *request)[1][-1]  # noqa: E731
    assert status([header(IN, 7)], [512, 1]) == OK
    assert status([header(IN, 7)], [1024, 1]) == IOERR
    assert status([header(OUT)], [1]) == OK  # no bytes, so none that fails
    assert status([header(OUT), bytes(512)], [1]) == IOERR
    assert status([header(OUT, 1), bytes(512)], [1]) == OK
    assert status([header(FLUSH)], [1]) == IOERR
    assert status([header(DISCARD), sectors(0, 1)], [1]) == OK
    assert status([header(DISCARD), sectors(0, 2)], [1]) == IOERR


def test_the_configuration_says_what_the_device_takes():
    device = BlkDevice(MemoryStore(8 * MIB, block_size=4096), queues=5)
    config = device.config
    assert struct.unpack_from("<QII", config) == (16384, MIB, 126)  # capacity, size_max, seg_max
    assert struct.unpack_from("<I", config, 20) == (4096,)  # blk_size
    assert struct.unpack_from("<H", config, 34) == (5,)  # num_queues
    assert struct.unpack_from("<III", config, 36) == (1 << 22, 32, 8)  # discard: sectors, ranges, alignment
    assert struct.unpack_from("<IIB", config, 48) == (1 << 22, 32, 1)  # write zeroes; may unmap
    assert not device.set_config(32, b"\0")


def test_discard_gives_the_blocks_of_a_file_back(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(b"x" * MIB)
    device = BlkDevice(FileStore(str(path)), queues=1)
    before = allocated(path)
    assert perform(device.handle, [header(DISCARD), sectors(512, 1024)], [1]) == (1, [OK])
    assert gave_back(512 * 1024, before, path)
    assert path.stat().st_size == MIB
    assert path.read_bytes()[256 * 1024 : 768 * 1024] == bytes(512 * 1024)


def test_a_disk_of_another_size_says_so_in_its_configuration():
    device = BlkDevice(MemoryStore(MIB), queues=1)
    before = device.config
    device.resize(2 * MIB)
    assert device.config == struct.pack("<Q", 4096) + before[8:]
    assert perform(device.handle, [header(IN, 4095)], [512, 1])[1][1] == OK
    device.resize(MIB)
    assert device.config == before
    assert perform(device.handle, [header(IN, 4095)], [512, 1])[1][1] == IOERR


def test_without_faults_no_request_is_looked_at_twice():
    device = BlkDevice(MemoryStore(MIB), queues=2)
    assert device.handlers == [device.handle] * 2
    device.faults.hang = True
    device.refault()
    assert device.handlers[0] != device.handle
    device.faults.hang = False
    device.refault()
    assert device.handlers == [device.handle] * 2


def test_each_so_many_th_request_for_data_fails():
    device = BlkDevice(MemoryStore(MIB), queues=1)
    device.faults.every = 2
    device.refault()
    said = []
    for readable, writable in (
        ([header(IN)], [512, 1]),
        ([header(FLUSH)], [1]),
        ([header(OUT), bytes(512)], [1]),
        ([header(FLUSH)], [1]),
        ([header(DISCARD), sectors(0, 1)], [1]),
        ([header(WRITE_ZEROES), sectors(0, 1)], [1]),
    ):
        said.append(perform(device.handlers[0], readable, writable)[1][-1])
    assert said == [OK, OK, IOERR, OK, OK, IOERR]


def test_a_hung_disk_answers_when_it_no_longer_hangs():
    device = BlkDevice(MemoryStore(MIB), queues=1)
    device.faults.hang = True
    device.refault()
    queue = Queue()
    queue.put(0, header(IN), 513)
    queue.put(1, header(FLUSH), 1)
    queue.serve(device.handlers[0])
    device.tend()
    assert queue.take(16) == {}
    device.faults.hang = False
    device.refault()
    device.resume()
    assert list(queue.take(16).items()) == [(0, bytes(513)), (1, OK)]


def test_a_slow_disk_takes_its_time_for_data_and_for_nothing_else(monkeypatch):
    now = [5.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    device = BlkDevice(FaultyStore(MemoryStore(MIB), Faults(delay=2.0)), queues=1)
    queue = Queue()
    queue.put(0, header(IN), 513)
    queue.put(1, header(GET_ID), 21)
    queue.serve(device.handlers[0])
    assert device.tend() == 2.0
    assert list(queue.take(16)) == [1]
    now[0] += 2
    assert device.tend() == -1
    assert queue.take(16) == {0: bytes(513)}


def test_what_is_held_of_a_ring_that_stops_is_forgotten():
    device = BlkDevice(MemoryStore(MIB), queues=1)
    device.faults.hang = True
    device.refault()
    queue = Queue()
    queue.put(0, header(IN), 513)
    queue.serve(device.handlers[0])
    device.drop(queue.ring)
    device.resume()
    assert queue.take(16) == {}
