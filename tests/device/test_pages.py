"""Data in memory that the device has in pages."""

from types import SimpleNamespace

from hypothesis import example, given, strategies as st

from virtio.device.base import Device
from virtio.ring.layout import ONE_PAGE

pages = st.sampled_from([4096, 65536, 2 << 20, ONE_PAGE])


def pieces(place, nbytes, most, page):
    """How many descriptors it takes: none goes past the end of a page."""
    count = 0
    while nbytes:
        size = min(nbytes, most, page - place % page)
        place, nbytes, count = place + size, nbytes - size, count + 1
    return count


@given(st.integers(2, 300), st.integers(512, 1 << 20), pages, st.integers(0, 4 << 20))
@example(2, 1 << 20, 2 << 20, (2 << 20) - 1)
@example(17, 65536, 2 << 20, (2 << 20) - 1)
@example(257, 1 << 20, 4096, 1)
def test_a_request_of_the_largest_size_fits_wherever_its_data_is(segments, segment_bytes, page, place):
    limits = SimpleNamespace(segments=segments, segment_bytes=segment_bytes, _page=page)
    most = Device.most_bytes.fget(limits)
    assert most >= min(segment_bytes, page)
    assert pieces(place, most, segment_bytes, page) <= segments


@given(st.integers(512, 1 << 20), pages, st.integers(0, 1000))
def test_with_one_segment_aligned_data_of_a_small_page_fits(segment_bytes, page, number):
    limits = SimpleNamespace(segments=1, segment_bytes=segment_bytes, _page=page)
    most = Device.most_bytes.fget(limits)
    assert pieces(4096 * number, most, segment_bytes, page) == 1
