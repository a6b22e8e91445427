"""virtio-blk (virtio 5.2), as far as a driver over vhost-user shows it."""

import random

import pytest

from tests.conformance.driver import backend, channel, connect, ended, exercise, fill
from tests.model import Backend, Blk
from tests.model.blk import IOERR, UNSUPP, BlkFeature, BlkRequest, Type
from tests.model.options import RING_FEATURES
from tests.model.wire import BackendRequest, F, Status
from virtio.errors import DeviceError, ReadOnlyError, RequestError, VirtioError
from virtio_bdev import Resized

B = BlkFeature
CONFIG_CHANGE = BackendRequest.CONFIG_CHANGE_MSG
BASIC = B.SEG_MAX | B.BLK_SIZE
RINGS = [
    pytest.param(RING_FEATURES, id="indirect"),
    pytest.param(RING_FEATURES & ~F.INDIRECT_DESC, id="direct"),
]


def kinds(model: Backend) -> set[int]:
    """The types of the requests that came."""
    assert isinstance(model.device, Blk)
    return {request.type for request in model.device.requests}


def ranges(model: Backend, kind: Type) -> list[tuple[int, int, int]]:
    """All segments of requests of one type: sector, number of sectors, flags."""
    assert isinstance(model.device, Blk)
    found = [request for request in model.device.requests if request.type == kind]
    return [segment for request in found for segment in request.segments]


def covers(segments: list[tuple[int, int, int]], offset: int, nbytes: int) -> bool:
    """Whether segments cover a range of bytes exactly, and none of it twice."""
    sectors = sorted(s for start, count, _ in segments for s in range(start, start + count))
    return sectors == list(range(offset // 512, (offset + nbytes) // 512))


def test_a_flush_is_sent_only_if_it_was_negotiated():
    """BLK-1, BLK-2: without FLUSH there is no cache to flush, or none that can be."""
    with Backend(Blk(features=BASIC)) as model, channel(model) as opened:
        opened.write(0, bytes(512))
        try:
            opened.flush()
        except RequestError:
            pass
        assert Type.FLUSH not in kinds(model), "BLK-1: a flush that was not negotiated"


def test_with_flush_and_no_config_wce_the_cache_is_taken_as_write_back():
    """BLK-2: a flush reaches the device."""
    with Backend(Blk(features=BASIC | B.FLUSH)) as model, channel(model) as opened:
        opened.write(0, bytes(512))
        opened.flush()
        assert Type.FLUSH in kinds(model), "BLK-2: no flush"


def test_a_disk_that_changes_its_size_has_it_at_once():
    """BLK-5, VHU-17: told over the channel back, while requests go on."""
    with Backend(Blk()) as model, channel(model) as opened:
        bdev = opened.bdev
        events = opened._controller.events()
        for blocks in (4096, 100, 10000):
            before = bdev.size
            model.do(lambda blocks=blocks: model.device.resize(blocks))
            assert model.request(CONFIG_CHANGE) == 0
            opened.read(0, 512)
            assert events.wait(5) == Resized(bdev, before)
            assert bdev.size == 512 * blocks
            opened.write(512 * (blocks - 1), b"the last" * 64)
            with pytest.raises(RequestError):
                opened.read(512 * blocks, 512)
        assert bytes(model.device.disk[-512:]) == b"the last" * 64


def test_writeback_is_not_read_before_features_ok():
    """BLK-3: no configuration message that spans it comes earlier."""
    with Backend(Blk(features=BASIC | B.FLUSH | B.CONFIG_WCE | B.MQ)) as model:
        with channel(model):
            pass
        agreed = next(
            at
            for at, record in enumerate(model.log)
            if record.name == "SET_STATUS" and record.value & Status.FEATURES_OK
        )
        early = [
            record.value
            for record in model.log[:agreed]
            if record.name == "GET_CONFIG" and record.value[0] <= 32 < sum(record.value[:2])
        ]
        assert not early, f"BLK-3: read {early} before FEATURES_OK"


def test_zoned_is_not_accepted():
    """BLK-4: nor is anything of it used."""
    with Backend(Blk(features=BASIC | B.ZONED, span=96)) as model, channel(model) as opened:
        exercise_reads(model, opened)
        assert not model.values("SET_FEATURES")[0] & B.ZONED, "BLK-4: ZONED was accepted"


def exercise_reads(model: Backend, opened) -> None:
    content = fill(model)
    assert opened.read(0, len(content)) == content


@pytest.mark.parametrize("call", ["read", "write", "unmap", "write_zeroes"])
def test_nothing_beyond_the_capacity_is_asked_for(call):
    """BLK-6: at the edge, across it, past it, and where byte counts overflow."""
    size = 2048 * 512
    with backend("blk") as model, channel(model) as opened:
        for offset, nbytes in [
            (size - 512, 512),
            (size - 512, 1024),
            (size, 512),
            (size + 512, 512),
            (0, size + 512),
            ((1 << 64) - 512, 512),
            ((1 << 64) - 512, 1024),
            ((1 << 63), 512),
        ]:
            argument = bytes(nbytes) if call == "write" else nbytes
            if offset + nbytes <= size:
                getattr(opened, call)(offset, argument)
            else:
                with pytest.raises((VirtioError, OverflowError)):
                    getattr(opened, call)(offset, argument)


@pytest.mark.parametrize("call", ["read", "write", "unmap", "write_zeroes"])
@pytest.mark.parametrize("seed", range(3))
def test_random_ranges_never_leave_the_disk_or_the_grid(call, seed):
    """BLK-6, BLK-9."""
    chance = random.Random(seed)
    with backend("blk") as model, channel(model) as opened:
        for _ in range(60):
            offset = chance.choice([512, 1, 256]) * chance.randrange(2100)
            nbytes = chance.choice([512, 512, 1, 511]) * chance.randrange(1, 40)
            good = not offset % 512 and not nbytes % 512 and offset + nbytes <= 2048 * 512
            argument = bytes(nbytes) if call == "write" else nbytes
            if good:
                getattr(opened, call)(offset, argument)
            else:
                with pytest.raises(RequestError):
                    getattr(opened, call)(offset, argument)


def test_a_read_only_disk_gets_no_writes():
    """BLK-7."""
    features = BASIC | B.RO | B.FLUSH | B.DISCARD | B.WRITE_ZEROES
    with Backend(Blk(features=features)) as model, channel(model) as opened:
        assert model.values("SET_FEATURES")[0] & B.RO, "BLK-7: RO was not accepted"
        exercise_reads(model, opened)
        for call, argument in [("write", bytes(512)), ("unmap", 512), ("write_zeroes", 512)]:
            with pytest.raises(ReadOnlyError):
                getattr(opened, call)(0, argument)
        wrong = kinds(model) & {Type.OUT, Type.DISCARD, Type.WRITE_ZEROES}
        assert not wrong, f"BLK-7: requests {wrong}"


@pytest.mark.parametrize("features", RINGS)
def test_a_flush_has_sector_0_and_no_data(features):
    """BLK-8."""
    with backend("blk", features=features) as model, channel(model) as opened:
        opened.write(512 * 77, bytes(4096))
        opened.flush()
        opened.read(512 * 99, 512)
        opened.flush()
        flushes = [request for request in model.device.requests if request.type == Type.FLUSH]
        assert len(flushes) == 2, f"BLK-8: {len(flushes)} flushes"
        assert all(request == BlkRequest(Type.FLUSH, 0, 0) for request in flushes), f"BLK-8: {flushes}"


@pytest.mark.parametrize("features", RINGS)
@pytest.mark.parametrize("block", [512, 4096])
def test_data_is_a_multiple_of_512_and_sectors_are_512_bytes(features, block):
    """BLK-9: whatever the size of a block."""
    with Backend(Blk(blk_size=block), features=features) as model, channel(model) as opened:
        exercise_with(model, opened, block)
        for request in model.device.requests:
            if request.type in (Type.IN, Type.OUT):
                assert request.nbytes % block == 0, f"BLK-9: {request}"
                assert request.sector * 512 % block == 0, f"BLK-9: {request}"


def exercise_with(model: Backend, opened, block: int) -> None:
    content = fill(model)
    for at in (0, 3, 7):
        assert opened.read(at * block, block) == content[at * block :][:block]
    data = random.Random(9).randbytes(5 * block)
    opened.write(11 * block, data)
    assert model.device.disk[11 * block : 16 * block] == data
    with pytest.raises(RequestError):
        opened.read(block // 2, block)


@pytest.mark.parametrize("features", RINGS)
def test_discard_and_write_zeroes_carry_whole_segments_within_their_limits(features):
    """BLK-10, BLK-12, BLK-14, BLK-17: more than one request's worth, on an odd limit."""
    disk = Blk(discard=(96, 1, 8), write_zeroes=(33, 1, 1))
    with Backend(disk, features=features) as model, channel(model) as opened:
        fill(model)
        opened.unmap(8 * 512, 480 * 512)
        opened.write_zeroes(1000 * 512, 500 * 512)
        discards, zeroes = ranges(model, Type.DISCARD), ranges(model, Type.WRITE_ZEROES)
        assert covers(discards, 8 * 512, 480 * 512), f"BLK-17: {discards}"
        assert covers(zeroes, 1000 * 512, 500 * 512), f"BLK-17: {zeroes}"
        assert not any(flags for _, _, flags in discards), f"BLK-14: {discards}"
        assert disk.disk[1000 * 512 : 1500 * 512] == bytes(500 * 512)


@pytest.mark.parametrize("may", [0, 1])
@pytest.mark.parametrize("unmap", [False, True])
def test_the_unmap_flag_of_write_zeroes_is_what_was_asked_for(may, unmap):
    """BLK-14."""
    disk = Blk(write_zeroes=(2048, 1, may))
    with Backend(disk) as model, channel(model) as opened:
        opened.write_zeroes(0, 4096, unmap=unmap)
        flags = {flags for _, _, flags in ranges(model, Type.WRITE_ZEROES)}
        assert flags == {int(unmap and may)}, f"BLK-14: flags {flags}"


def test_what_was_not_negotiated_is_not_sent():
    """BLK-10, BLK-12."""
    with Backend(Blk(features=BASIC)) as model, channel(model) as opened:
        fill(model)
        for call in (opened.unmap, opened.write_zeroes):
            try:
                call(0, 4096)
            except RequestError:
                continue
        wrong = kinds(model) & {Type.DISCARD, Type.WRITE_ZEROES, Type.SECURE_ERASE}
        assert not wrong, f"BLK-10: requests {wrong}"


def test_the_identity_is_read_into_20_bytes():
    """BLK-11."""
    with backend("blk") as model:
        with connect(model):
            pass
        ended(model)
        asked = [request for request in model.device.requests if request.type == Type.GET_ID]
        assert asked, "BLK-11: GET_ID was not sent"
        assert all(request.nbytes == 20 for request in asked), f"BLK-11: {asked}"


@pytest.mark.parametrize("status", [IOERR, UNSUPP])
def test_a_device_without_an_identity_is_no_less_a_disk(status):
    """BLK-11."""
    disk = Blk(status=lambda request: status if request.type == Type.GET_ID else 0)
    with Backend(disk) as model, channel(model) as opened:
        exercise(model, opened)


@pytest.mark.parametrize("features", RINGS)
@pytest.mark.parametrize(("seg_max", "size_max"), [(1, 512), (2, 4096), (1, 65536), (126, 1024)])
def test_seg_max_and_size_max_are_kept_to(features, seg_max, size_max):
    """BLK-17: the model measures every segment."""
    disk = Blk(features=BASIC | B.SIZE_MAX | B.FLUSH | B.MQ, seg_max=seg_max, size_max=size_max)
    with Backend(disk, features=features) as model, channel(model) as opened:
        exercise(model, opened)


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("blk_size 0", {"blk_size": 0}),
        ("blk_size 513", {"blk_size": 513}),
        ("blk_size 3 GiB", {"blk_size": 3 << 30}),
        ("size_max 0", {"size_max": 0, "features": BASIC | B.SIZE_MAX}),
        ("size_max 1", {"size_max": 1, "features": BASIC | B.SIZE_MAX}),
        ("seg_max 0", {"seg_max": 0}),
    ],
)
def test_limits_that_make_no_sense_are_refused_or_survived(what, changes):
    """BLK-17, CFG-2: an error of ours, or working I/O; nothing else."""
    with Backend(Blk(**changes)) as model:
        try:
            with channel(model) as opened:
                content = fill(model)
                assert opened.read(0, 4096) == content[:4096], what
        except VirtioError:
            pass


def test_an_error_of_the_device_is_reported_with_its_place():
    """BLK-15: and the next request is not touched by it."""
    with backend("blk") as model, channel(model) as opened:
        model.device.status = lambda request: IOERR if request.sector == 64 else 0
        content = fill(model)
        assert opened.read(0, 512) == content[:512]
        with pytest.raises(DeviceError) as caught:
            opened.read(64 * 512, 512)
        assert caught.value.offset == 64 * 512
        assert opened.read(65 * 512, 512) == content[65 * 512 :][:512]
