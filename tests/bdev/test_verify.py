"""`virtio_bdev.verify`: it believes a disk that keeps its bytes, and no other."""

import pytest

import virtio_bdev
from virtio.errors import ReadOnlyError, RequestError
from virtio.target import serve
from virtio_bdev.verify import VerifyError, verify


@pytest.mark.parametrize("how", ["pattern", "crc"])
@pytest.mark.parametrize("bs", [512, 4096, 65536, 1 << 20])
def test_a_disk_that_keeps_its_bytes_is_verified(channel, how, bs):
    told = []
    found = verify(channel, how=how, bs=bs, offset=1 << 20, size=8 << 20, progress=told.append)
    assert (found.blocks, found.nbytes) == ((8 << 20) // bs, 8 << 20)
    assert sum(told) == 16 << 20
    assert channel.read(0, 1 << 20) == bytes(1 << 20)


def test_another_pass_is_not_satisfied_with_what_the_last_one_wrote(channel):
    verify(channel, size=64 << 10, seed=1)
    verify(channel, size=64 << 10, seed=2)


class Mean:
    """A channel that does something to what has been written, before it is read back."""

    def __init__(self, channel, harm):
        self._channel, self._harm = channel, harm

    def __getattr__(self, name):
        return getattr(self._channel, name)

    def flush(self):
        self._channel.flush()
        self._harm(self._channel)


def lose(channel):
    channel.write(8192, bytes(4096))


def misplace(channel):
    channel.write(8192, channel.read(4096, 4096))


def tear(channel):
    channel.write(8192 + 2048, bytes(512))


def flip(channel):
    block = bytearray(channel.read(8192, 4096))
    block[-1] ^= 1
    channel.write(8192, block)


@pytest.mark.parametrize(
    "harm, words",
    [
        (lose, "the block at 8192 is as it was before, or not ours: the write was lost"),
        (misplace, "the block at 8192 is the one that was written to 4096"),
        (tear, "the block at 8192 is right up to byte 20[0-9]{2}, and wrong there: torn, or altered"),
        (flip, "the block at 8192 is right up to byte 4095, and wrong there"),
    ],
)
def test_each_harm_is_told_by_its_name_and_place(channel, harm, words):
    with pytest.raises(VerifyError, match=words):
        verify(Mean(channel, harm), size=64 << 10)


@pytest.mark.parametrize(
    "harm, words",
    [
        (lose, "the block at 8192 is as it was before, or not ours: the write was lost"),
        (misplace, "the block at 8192 is the one that was written to 4096"),
        (tear, "the block at 8192 has the checksum of another one: torn, or altered"),
        (flip, "the block at 8192 has the checksum of another one: torn, or altered"),
    ],
)
def test_a_checksum_tells_each_harm_too(channel, harm, words):
    with pytest.raises(VerifyError, match=words):
        verify(Mean(channel, harm), how="crc", size=64 << 10)


@pytest.mark.parametrize("how", ["pattern", "crc"])
def test_what_was_written_once_is_looked_for_later(channel, how):
    verify(channel, how=how, size=64 << 10, seed=3)
    before = channel.read(0, 64 << 10)
    assert verify(channel, how=how, size=64 << 10, seed=3, write=False).blocks == 16
    assert channel.read(0, 64 << 10) == before
    with pytest.raises(VerifyError, match="at 0 is as it was before, of a pass with seed 3"):
        verify(channel, how=how, size=64 << 10, seed=4, write=False)
    with pytest.raises(RequestError, match="is known by its seed"):
        verify(channel, how=how, size=64 << 10, write=False)


@pytest.mark.parametrize("how", ["pattern", "crc"])
@pytest.mark.parametrize(
    "seed, words", [(2, "with seed 1: the"), (1, "of another pass with the same seed: the")]
)
def test_a_lost_write_is_seen_over_an_older_pass(channel, how, seed, words):
    verify(channel, how=how, size=64 << 10, seed=1)
    old = channel.read(8192, 4096)
    with pytest.raises(VerifyError, match=f"at 8192 is .*{words} write was lost"):
        verify(Mean(channel, lambda one: one.write(8192, old)), how=how, size=64 << 10, seed=seed)
    with pytest.raises(VerifyError, match=f"at 8192 is .*{words} write was lost"):
        verify(channel, how=how, size=64 << 10, seed=seed, write=False)


def test_what_was_written_in_another_way_is_no_corruption(channel):
    verify(channel, bs=8192, size=64 << 10, seed=1)
    for how, bs, ours in (("crc", 8192, "crc, 8192"), ("pattern", 4096, "pattern, 4096")):
        with pytest.raises(VerifyError, match=f"at 0 was written as pattern, 8192 bytes, not {ours} bytes"):
            verify(channel, how=how, bs=bs, size=64 << 10, seed=1, write=False)


def test_what_cannot_be_verified_is_refused(channel, bdev):
    for how in (dict(bs=100), dict(offset=bdev.size), dict(size=1 << 40), dict(size=100)):
        with pytest.raises(RequestError):
            verify(channel, **how)
    with serve("blk", "ram:1M,ro") as target:
        with virtio_bdev.attach(target.address, dev_type="blk") as controller:
            (disk,) = controller.values()
            with disk.open() as read_only, pytest.raises(ReadOnlyError):
                verify(read_only)
