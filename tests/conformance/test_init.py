"""Initialization, status, feature bits and configuration space (virtio 2.1 to 2.5, 3.1, 6)."""

import random

import pytest

from tests.conformance.driver import (
    KINDS,
    TIMEOUT,
    backend,
    channel,
    connect,
    device,
    ended,
    exercise,
    refused,
)
from tests.model import Backend, Blk, Scsi
from tests.model.blk import BlkFeature
from tests.model.options import PROTOCOL_FEATURES, RING_FEATURES
from tests.model.wire import F, P, Status
from virtio.errors import TransportError

RING_SETUP = ("SET_VRING_NUM", "SET_VRING_BASE", "SET_VRING_ADDR", "SET_VRING_CALL", "SET_VRING_KICK")
ALL = (1 << 64) - 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_eight_steps_are_done_in_order(kind):
    """INI-1, STA-1."""
    with backend(kind) as model, channel(model) as opened:
        opened.read(0, 512)
        log = list(model.log)
    steps = [
        (record.name, record.value) if record.name == "SET_STATUS" else record.name
        for record in log
        if record.name in ("SET_STATUS", "SET_FEATURES", "GET_STATUS", "start", *RING_SETUP)
    ]
    assert steps[:7] == [
        ("SET_STATUS", 0),
        "GET_STATUS",
        ("SET_STATUS", 1),
        ("SET_STATUS", 3),
        "SET_FEATURES",
        ("SET_STATUS", 11),
        "GET_STATUS",
    ], f"INI-1: steps 1 to 6 were {steps[:6]}"
    ready = steps.index(("SET_STATUS", 15))
    last_setup = max(at for at, step in enumerate(steps) if step in RING_SETUP)
    assert last_setup < ready, "INI-1: a queue was set up after DRIVER_OK"
    assert ready < steps.index("start"), "INI-5: a ring was started before DRIVER_OK"


@pytest.mark.parametrize("kind", KINDS)
def test_each_status_written_has_all_bits_of_the_one_before(kind):
    """STA-1."""
    with backend(kind) as model, channel(model):
        written = model.values("SET_STATUS")
    for old, new in zip(written, written[1:], strict=False):
        assert new & old == old or new == 0, f"STA-1: status went from {old:#x} to {new:#x}"
    assert written[-1] == 15, f"STA-1: it ended at {written[-1]:#x}"


@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_space_is_never_written_while_features_are_negotiated(kind):
    """INI-2, SCS-1."""
    with backend(kind) as model, channel(model):
        pass
    assert "SET_CONFIG" not in model.names(), "INI-2: SET_CONFIG"


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_accepted_once(kind):
    """INI-3."""
    with backend(kind) as model, channel(model) as opened:
        exercise(model, opened)
        names = model.names()
        assert names.count("SET_FEATURES") == 1, "INI-3: a second SET_FEATURES"
        assert names.count("SET_PROTOCOL_FEATURES") == 1, "INI-3: a second SET_PROTOCOL_FEATURES"


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_that_takes_features_ok_back_is_given_up_as_failed(kind):
    """INI-4, STA-2."""
    with backend(kind, refuse_status=Status.FEATURES_OK) as model:
        error = refused(model, "INI-4")
        assert isinstance(error, TransportError), f"INI-4: {error!r}"
        written = model.values("SET_STATUS")
        failed = [status for status in written if status]
        assert failed[-1] & Status.FAILED, f"INI-4: the last status was {failed[-1]:#x}"
        assert not any(status & Status.DRIVER_OK for status in written), "INI-4: DRIVER_OK"
        assert not set(RING_SETUP) & set(model.names()), "INI-4: a queue was set up"


@pytest.mark.parametrize("kind", KINDS)
def test_no_ring_is_kicked_before_driver_ok(kind):
    """INI-5: each message before DRIVER_OK is acknowledged, and no kick may precede its ack."""
    with backend(kind) as model, channel(model) as opened:
        opened.read(0, 512)
        names = model.names()
    assert "start" in names, "INI-5: no ring was ever kicked"


@pytest.mark.parametrize("kind", KINDS)
def test_without_status_rings_are_kicked_after_all_are_enabled(kind):
    """INI-5, VHU-23."""
    with backend(kind, protocol_features=PROTOCOL_FEATURES & ~P.STATUS) as model:
        with channel(model) as opened:
            exercise(model, opened)
        names = model.names()
        assert not {"SET_STATUS", "GET_STATUS"} & set(names), "VHU-23: status without its feature"
        enabled = max(at for at, name in enumerate(names) if name == "SET_VRING_ENABLE")
        assert names.index("start") > enabled, "INI-5: started before all were enabled"


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_failure_the_device_is_reset_before_it_is_initialized_again(kind):
    """STA-2."""
    with backend(kind, refuse_status=Status.FEATURES_OK) as model:
        refused(model, "STA-2")
        model.options.refuse_status = 0
        before = len(model.log)
        with connect(model):
            pass
        ended(model, 2)
        again = [r.value for r in model.log[before:] if r.name == "SET_STATUS"]
        assert again[0] == 0, f"STA-2: the first status after FAILED was {again[0]:#x}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(12))
def test_no_feature_is_accepted_that_was_not_offered(kind, seed):
    """FEA-1, FEA-3, VHU-5: random offers of virtio and protocol features, and I/O goes on."""
    chance = random.Random(seed)
    disk = device(kind)
    disk.features = chance.getrandbits(24)
    if isinstance(disk, Blk):
        disk.features &= ~BlkFeature.RO
        disk.size_max, disk.seg_max, disk.span = 65536, 2, 96
    else:
        disk.features &= 7
    must = F.VERSION_1 | (F.PROTOCOL_FEATURES if isinstance(disk, Blk) else 0)  # for its capacity
    with Backend(
        disk,
        features=chance.getrandbits(64) & ~((1 << 24) - 1) | must,
        protocol_features=chance.getrandbits(20) | P.CONFIG,
    ) as model:
        with channel(model) as opened:
            opened.write(0, bytes(range(256)) * 256)
            assert opened.read(0, 1 << 16) == bytes(range(256)) * 256
        offered = model.options.features | disk.features
        (accepted,) = model.values("SET_FEATURES")
        assert not accepted & ~offered, f"FEA-1: {accepted & ~offered:#x} was not offered"


@pytest.mark.parametrize("kind", KINDS)
def test_of_all_bits_only_those_that_make_sense_here_are_accepted(kind):
    """FEA-2, FEA-3, FEA-5, RFB-1, RFB-2, RFB-5, BLK-4, SPL-5, SPL-9."""
    disk = device(kind)
    disk.features = (1 << 24) - 1
    if isinstance(disk, Blk):
        disk.features &= ~BlkFeature.RO
        disk.size_max, disk.span = 65536, 96
    with Backend(disk, features=ALL & ~((1 << 24) - 1)) as model:
        with channel(model) as opened:
            opened.write(0, bytes(4096))
            assert opened.read(0, 512) == bytes(512)
        (accepted,) = model.values("SET_FEATURES")
    never = {
        F.NOTIFY_ON_EMPTY: "FEA-3",
        F.LOG_ALL: "FEA-3",
        F.ANY_LAYOUT: "FEA-3",
        F.ACCESS_PLATFORM: "RFB-2",
        F.IN_ORDER: "SPL-5",
        F.SR_IOV: "RFB-5",
        F.NOTIFICATION_DATA: "FEA-3",
        F.NOTIF_CONFIG_DATA: "FEA-3",
        F.RING_RESET: "FEA-3",
        F.ADMIN_VQ: "FEA-3",
        F.DEVICE_SUSPEND: "SUS-1",
    }
    for bit, clause in never.items():
        assert not accepted & bit, f"{clause}: {bit.name} was accepted"
    assert not accepted >> 43, f"FEA-3: unknown bits accepted: {accepted:#x}"
    assert accepted & F.VERSION_1, "RFB-1: VERSION_1 was not accepted"
    own = accepted & (1 << 24) - 1
    if kind == "blk":
        known = sum(BlkFeature) & ~(BlkFeature.ZONED | BlkFeature.SECURE_ERASE | BlkFeature.LIFETIME)
        assert not own & ~known, f"FEA-3: device bits {own:#x} accepted"
    else:
        assert not own & ~7, f"FEA-3: device bits {own:#x} accepted"


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_without_version_1_is_given_up_as_failed(kind):
    """FEA-4, STA-2."""
    with backend(kind, features=RING_FEATURES & ~F.VERSION_1) as model:
        error = refused(model, "FEA-4")
        assert "VERSION_1" in str(error), f"FEA-4: the message does not say why: {error}"
        written = model.values("SET_STATUS")
        failed = [status for status in written if status]
        assert failed[-1] & Status.FAILED, f"FEA-4: the last status was {failed[-1]:#x}"
        assert not any(status & Status.FEATURES_OK for status in written), "FEA-4: FEATURES_OK"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bit", [18, 23, 27, 44, 57, 63])
def test_an_unknown_bit_is_no_reason_to_fail(kind, bit):
    """FEA-5."""
    disk = device(kind)
    disk.features |= (1 << bit) & (1 << 24) - 1
    with Backend(disk, features=RING_FEATURES | 1 << bit) as model:
        with channel(model) as opened:
            opened.read(0, 512)
        assert not model.values("SET_FEATURES")[0] >> bit & 1, f"FEA-3: bit {bit} was accepted"


@pytest.mark.parametrize("kind", KINDS)
def test_order_platform_is_accepted(kind):
    """RFB-3."""
    with backend(kind, features=RING_FEATURES | F.ORDER_PLATFORM) as model:
        with channel(model):
            pass
        assert model.values("SET_FEATURES")[0] & F.ORDER_PLATFORM, "RFB-3: ORDER_PLATFORM"


@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_is_read_in_one_message(kind):
    """CFG-1: there is no generation, so a second message could see another configuration."""
    with backend(kind) as model:
        with connect(model):
            pass
        ended(model)
        spans = model.values("GET_CONFIG")
        assert len(spans) == 1, f"CFG-1: read in {len(spans)} messages"
        assert spans[0][0] == 0, f"CFG-1: read from byte {spans[0][0]}"


@pytest.mark.parametrize("garbage", [0x00, 0xFF])
def test_fields_of_features_that_are_not_offered_are_not_believed(garbage):
    """CFG-2, BLK-3."""
    disk = Blk(features=0, garbage=garbage, span=96)
    with Backend(disk, features=F.VERSION_1 | F.PROTOCOL_FEATURES) as model:
        with channel(model) as opened:
            data = bytes(range(256)) * 1024
            opened.write(4096, data)
            assert opened.read(4096, len(data)) == data
        assert disk.disk[4096 : 4096 + len(data)] == data, "CFG-2: the data"


def test_no_more_of_the_configuration_is_read_than_the_features_define():
    """CFG-2: a device with no optional feature may have 24 bytes and no more."""
    with Backend(Blk(features=0, span=24)) as model:
        with channel(model) as opened:
            opened.read(0, 512)
        ((_, size, _),) = model.values("GET_CONFIG")
        assert size <= 24, f"CFG-2: {size} bytes were read"


@pytest.mark.parametrize("kind", KINDS)
def test_a_longer_configuration_space_is_accepted(kind):
    """CFG-3."""
    disk = device(kind)
    disk.tail = bytes(range(200))
    with Backend(disk) as model, channel(model) as opened:
        exercise(model, opened)


@pytest.mark.parametrize("kind", KINDS)
def test_every_attach_is_a_new_start(kind):
    """INI-1, STA-2, VHU-6: three in a row, each from reset to DRIVER_OK."""
    with backend(kind) as model:
        for turn in range(1, 4):
            with connect(model, timeout=TIMEOUT) as controller:
                assert len(controller) == 1
            ended(model, turn)
        assert model.names().count("SET_OWNER") == 3, "VHU-6: SET_OWNER once a connection"
        assert isinstance(model.device, Blk | Scsi)
