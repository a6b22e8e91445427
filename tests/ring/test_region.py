"""Regions, the pool, and buffers in a user's hands."""

import fcntl
import gc
import mmap
import os
import random
import resource
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from tests.conftest import INTERPRETED
from tests.leaks import open_fds
from virtio.errors import ClosedError, TransportError
from virtio.ring.region import HUGE_PAGE, Mapping, Pool, Region

viewable = pytest.mark.skipif(
    INTERPRETED and sys.version_info < (3, 12),
    reason="interpreted classes have the buffer protocol from Python 3.12 on",
)


@pytest.fixture
def region():
    region = Region(1 << 20)
    yield region
    region.close()


@pytest.fixture
def pool(region):
    return Pool(region)


def test_a_region_is_whole_huge_pages_and_zero(region):
    assert region.size == HUGE_PAGE
    assert bytes(region.view) == bytes(HUGE_PAGE)


def test_a_region_cannot_shrink_or_grow_under_its_mappings(region):
    for size in (0, region.size + HUGE_PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(region.fd, size)


def test_a_regions_descriptor_is_closed_in_programs_that_are_run(region):
    assert fcntl.fcntl(region.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_the_descriptor_and_the_view_are_the_same_bytes(region):
    with mmap.mmap(region.fd, region.size) as other:
        region.view[5000:5004] = b"here"
        assert other[5000:5004] == b"here"


def test_a_closed_region_has_no_descriptor_and_no_mapping_left():
    before = open_fds()
    region = Region(1 << 20)
    region.close()
    region.close()
    gc.collect()
    assert open_fds() == before
    assert "virtio-bdev" not in Path("/proc/self/maps").read_text()


def test_no_descriptors_left_is_said_and_nothing_leaks():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = open_fds()
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(TransportError, match="cannot map 2 MiB of shared memory: Too many open"):
            Region(1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert open_fds() == before


def test_no_address_space_left_is_said_and_nothing_leaks():
    before = open_fds()
    with pytest.raises(TransportError, match="cannot map .* MiB of shared memory"):
        Region(1 << 60)
    assert open_fds() == before


def test_buffers_do_not_overlap_and_come_back(pool):
    buffers = [pool.take(nbytes) for nbytes in (1, 64, 4096, 5000, 100)]
    places = sorted((b.offset, b.offset + b.nbytes) for b in buffers)
    assert all(end <= begin for (_, end), (begin, _) in zip(places, places[1:], strict=False))
    assert all(b.offset % 4096 == 0 for b in buffers)
    for buffer in buffers:
        buffer.close()
    assert pool.free_bytes == pool.region.size
    pool.take(pool.region.size).close()  # in one piece again


@given(st.lists(st.tuples(st.integers(1, 200_000), st.booleans()), max_size=60))
def test_the_pool_gives_every_byte_to_one_at_a_time(steps):
    region = Region(1)
    pool = Pool(region)
    held = []
    for nbytes, give_back in steps:
        if give_back and held:
            held.pop(nbytes % len(held)).close()
        else:
            try:
                held.append(pool.take(nbytes, align=64))
            except TransportError:
                assert nbytes > 64
        places = sorted((b.offset, b.offset + -(-b.nbytes // 64) * 64) for b in held)
        assert all(end <= begin for (_, end), (begin, _) in zip(places, places[1:], strict=False))
        assert pool.free_bytes == region.size - sum(end - begin for begin, end in places)
    for buffer in held:
        buffer.close()
    assert pool.free_bytes == region.size
    region.close()


@pytest.mark.parametrize("page", [4096, 2 << 20])
def test_what_fits_in_a_page_straddles_none(page):
    region = Region(8 << 20)
    pool = Pool(region, page)
    chance = random.Random(page)
    held = []
    for _ in range(2000):
        if held and chance.random() < 0.4:
            held.pop(chance.randrange(len(held))).close()
            continue
        nbytes = chance.choice([20, 100, 4096, 65536, page - 64, page, page + 1])
        try:
            held.append(pool.take(nbytes, align=chance.choice([64, 4096])))
        except TransportError:
            continue
        first, last = held[-1].offset // page, (held[-1].offset + nbytes - 1) // page
        assert first == last if nbytes <= page else held[-1].offset % page == 0
    for buffer in held:
        buffer.close()
    assert pool.free_bytes == region.size
    region.close()


def test_an_empty_pool_says_what_to_do(pool):
    with pytest.raises(TransportError, match="close buffers that are not needed"):
        pool.take(pool.region.size + 1)
    with pytest.raises(ValueError, match="a buffer of 0 bytes"):
        pool.take(0)


def test_a_closed_pool_lends_nothing():
    region = Region(1)
    pool = Pool(region)
    region.close()
    with pytest.raises(ClosedError):
        pool.take(64)


@viewable
def test_a_buffer_counts_its_views_and_cannot_be_closed_under_them(pool):
    buffer = pool.take(4096)
    view = memoryview(buffer)
    part = view[10:20]
    assert buffer.exports >= 1
    with pytest.raises(BufferError, match="still alive"):
        buffer.close()
    part[:4] = b"data"
    assert bytes(pool.region.view[buffer.offset + 10 : buffer.offset + 14]) == b"data"
    part.release()
    view.release()
    assert buffer.exports == 0
    buffer.close()
    with pytest.raises(ClosedError):
        memoryview(buffer)


@viewable
def test_a_view_outlives_the_region():
    region = Region(1)
    buffer = Pool(region).take(4096)
    view = memoryview(buffer)
    view[:5] = b"alive"
    region.close()
    gc.collect()
    assert bytes(view[:5]) == b"alive"
    view.release()


def test_a_busy_buffer_is_given_back_when_the_device_lets_go(pool):
    buffer = pool.take(4096)
    buffer.hold()
    buffer.hold()
    buffer.close()
    buffer.close()
    assert pool.free_bytes == pool.region.size - 4096
    buffer.let_go()
    assert pool.free_bytes == pool.region.size - 4096
    buffer.let_go()
    assert pool.free_bytes == pool.region.size


def test_a_closed_buffer_cannot_be_put_in_flight(pool):
    buffer = pool.take(64)
    buffer.close()
    with pytest.raises(ClosedError):
        buffer.hold()
    assert "closed" in repr(buffer)


def test_a_contiguous_mapping_is_one_page():
    mapping = Mapping.contiguous(1 << 32)
    assert list(mapping.table) == [1 << 32] and 1 << mapping.shift > 1 << 48


@viewable
def test_an_exception_in_its_block_closes_a_viewed_buffer_and_is_not_hidden(pool):
    buffer = pool.take(4096)
    with pytest.raises(KeyError), buffer:
        view = memoryview(buffer)
        raise KeyError
    assert buffer.closed and pool.free_bytes == pool.region.size - 4096
    view.release()
    assert pool.free_bytes == pool.region.size
