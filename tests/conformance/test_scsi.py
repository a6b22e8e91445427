"""virtio-scsi (virtio 5.6), as far as a driver over vhost-user shows it."""

import random
import struct
import threading
import time
from array import array

import pytest

from tests.conformance.driver import channel, connect, ended, exercise, fill
from tests.model import Backend, Scsi
from tests.model.options import PROTOCOL_FEATURES
from tests.model.scsi import Lun, ScsiFeature
from tests.model.wire import P
from virtio.device.events import BUFFERS
from virtio.errors import DeviceError, ProtocolError, RequestTimeout, TransportError
from virtio_bdev import Added, Removed, Resized

EVENTS = ScsiFeature.HOTPLUG | ScsiFeature.CHANGE
NO_EVENT, TRANSPORT_RESET, PARAM_CHANGE, MISSED = 0, 1, 3, 1 << 31
HARD, RESCAN, REMOVED = 0, 1, 2
CAPACITY_CHANGED = 0x2A | 0x09 << 8
ABORT_TASK, I_T_NEXUS_RESET, LOGICAL_UNIT_RESET = 0, 4, 5


def address(target, lun):
    """As the driver has to write it (5.6.6.1)."""
    return bytes([1, target, 0x40 | lun >> 8, lun & 0xFF, 0, 0, 0, 0])


def units(*places):
    return {place: Lun() for place in places}


def held(model):
    return [chain for ring in model.rings.values() for chain in ring.held]


def requests(chain):
    """For `hold`: all that come by the request queues."""
    return chain.ring.index >= 2


# Configuration and limits


def test_the_configuration_space_is_never_written():
    """SCS-1."""
    with Backend(Scsi()) as model:
        with channel(model) as opened:
            exercise(model, opened)
        assert "SET_CONFIG" not in model.names()


@pytest.mark.parametrize("most, queues", [(1, None), (3, 2), (9, 2)])
def test_a_unit_never_has_more_commands_than_cmd_per_lun(most, queues):
    """SCS-2: over all queues, the driver's own among them."""
    model = Backend(Scsi(cmd_per_lun=most, num_queues=4), queue_num=6)
    with model, connect(model, queues=queues) as controller:
        (bdev,) = controller.values()
        peak, failures = 0, []

        def work():
            try:
                with bdev.open(timeout=20) as opened:
                    opened.read_batch(array("Q", range(0, 64 * 512, 512)), 512, bytearray(64 * 512))
            except BaseException as error:
                failures.append(error)

        model.options.hold = requests
        threads = [threading.Thread(target=work) for _ in controller.device.leases]
        for thread in threads:
            thread.start()
        own = threading.Thread(target=controller.rescan)
        own.start()
        while any(thread.is_alive() for thread in [*threads, own]):
            time.sleep(0.002)
            unit = [chain for chain in held(model) if chain.read()[:8] == address(0, 0)]
            peak = max(peak, len(unit))
            model.release()
        model.options.hold = None
        assert not failures
        assert len(controller.device.leases) - 1 < peak <= most, f"SCS-2: {peak} at once"


def test_priorities_and_attributes_are_zero():
    """SCS-3: the model looks at every request."""
    with Backend(Scsi()) as model, channel(model) as opened:
        exercise(model, opened)
        assert len(model.device.requests) > 100


def test_what_a_disk_has_recovered_is_good_and_counted():
    """SPC-4, 4.5.6: the data is there, whichever way it was asked for."""
    with Backend(Scsi()) as model, channel(model) as opened:
        model.device.recovers = True
        for start in range(0, 1 << 20, 512):
            model.device.disk[start : start + 512] = start.to_bytes(4, "big") * 128
        disk = bytes(model.device.disk)
        assert opened.read(512, 4096) == disk[512:4608]
        apart = bytearray(4096)
        opened.readinto(512, apart)
        assert apart == disk[512:4608]
        many = bytearray(300 * 512)
        opened.read_batch(array("Q", range(0, 300 * 512, 512)), 512, many).raise_for_status()
        assert many == disk[: 300 * 512]
        with opened.bdev.controller.buffer(512) as buffer:
            assert opened.submit_read(1024, buffer, 7)
            done = []
            assert model.wait_for(lambda: done.extend(opened.poll()) or done)
            assert done == [(7, None)] and bytes(buffer.view()) == disk[1024:1536]
        opened.write(0, bytes(512))
        stats = opened.bdev.stats
        assert (stats.read.requests, stats.read.nbytes) == (303, 2 * 4096 + 301 * 512)
        assert (stats.write.requests, stats.failed) == (1, 0)


@pytest.mark.parametrize("max_sectors", [1, 8, 1000])
def test_transfers_keep_to_max_sectors_and_seg_max(max_sectors):
    """SCS-11: the model looks at every request."""
    with Backend(Scsi(max_sectors=max_sectors, seg_max=1)) as model, channel(model) as opened:
        exercise(model, opened)


def test_targets_and_units_beyond_the_limits_are_not_asked():
    """SCS-11: the model looks at every request, and lists a unit that it does not allow."""
    luns = units((0, 0), (3, 5), (3, 6), (4, 0))
    with Backend(Scsi(luns=luns, max_target=3, max_lun=5)) as model, connect(model) as controller:
        assert list(controller) == ["VirtioScsi0t0", "VirtioScsi0t3l5"]
        assert {request.target for request in model.device.requests} == {0, 1, 2, 3}


def test_a_device_with_other_sizes_after_a_reset_is_refused():
    """SCS-10: they are never changed, so the layout is that of a reset."""

    class Other(Scsi):
        @property
        def config(self):
            space = bytearray(super().config)
            space[20:24] = struct.pack("<I", 64)
            return bytes(space)

    with Backend(Other()) as model:
        with pytest.raises(ProtocolError, match="sense_size 64 and cdb_size 32"):
            connect(model)
        ended(model)


@pytest.mark.parametrize("lun", [0, 1, 255, 256, 16383])
def test_every_unit_is_addressed_in_the_flat_form(lun):
    """SCS-9: the model looks at every request; it lists its units in the peripheral one."""
    luns = units((0, lun), (7, lun))
    with Backend(Scsi(luns=luns, max_lun=16383)) as model, connect(model) as controller:
        assert len(controller) == 2
        for bdev, disk in zip(controller.values(), luns.values(), strict=True):
            with bdev.open(timeout=5) as opened:
                opened.write(512, b"in place" * 64)
            assert disk.disk[512:1024] == b"in place" * 64


# Events


@pytest.mark.parametrize("size", [16, 100, 4096])
@pytest.mark.parametrize("depth, buffers", [(None, BUFFERS), (1, 4)])
def test_event_buffers_are_as_large_as_events_and_never_run_out(size, depth, buffers):
    """SCS-5, SCS-6: the model looks at every buffer; more events than there are buffers."""
    disk = Scsi(features=EVENTS, event_info_size=size)
    with Backend(disk) as model, connect(model, depth=depth) as controller:
        device = model.device
        assert model.wait_for(lambda: len(device.events) == buffers)
        for _ in range(3 * buffers):
            assert model.wait_for(lambda: device.events), "SCS-5: no buffer left"
            model.do(lambda: device.post(NO_EVENT, bytes(8)))
        assert model.wait_for(lambda: len(device.events) == buffers), "SCS-5: buffers were not given back"
        assert len(controller) == 1


def test_an_endless_event_info_size_is_not_believed():
    """SCS-6, with a bound."""
    device = Scsi(features=EVENTS, event_info_size=0xFFFFFFFF)
    device.violate = lambda clause, text: None
    model = Backend(device)
    try:
        with connect(model):
            assert model.wait_for(lambda: len(device.events) == BUFFERS)
            assert {chain.writable_size for chain in device.events} == {4096}
    finally:
        model.close()


def test_missed_events_mean_that_everything_is_looked_for():
    """SCS-7."""
    with Backend(Scsi(features=EVENTS)) as model, connect(model) as controller:
        events = controller.events()
        model.device.luns |= units((5, 1))
        assert events.wait(0.05) is None
        model.do(lambda: model.device.post(NO_EVENT | MISSED, bytes(8)))
        assert events.wait(5) == Added(controller["VirtioScsi0t5l1"])


@pytest.mark.parametrize("reason", [HARD, RESCAN, REMOVED])
def test_an_event_of_lun_0_means_the_whole_target(reason):
    """SCS-8."""
    luns = units((0, 0), (2, 0), (2, 1))
    with Backend(Scsi(luns=luns, features=EVENTS)) as model, connect(model) as controller:
        events, gone = controller.events(), controller["VirtioScsi0t2l1"]
        with gone.open(timeout=5) as opened:
            del luns[2, 1]
            luns |= units((2, 9))
            model.do(lambda: model.device.post(TRANSPORT_RESET, address(2, 0), reason))
            assert events.wait(5) == Removed(gone)
            assert events.wait(5) == Added(controller["VirtioScsi0t2l9"])
            with pytest.raises(TransportError, match="was removed"):
                opened.read(0, 512)
        assert list(controller) == ["VirtioScsi0t0", "VirtioScsi0t2", "VirtioScsi0t2l9"]


@pytest.mark.parametrize("form", ["flat", "peripheral"])
def test_events_may_address_units_in_either_form(form):
    """SCS-9: as QEMU's do."""
    luns = units((0, 0), (7, 3))
    with Backend(Scsi(luns=luns, features=EVENTS)) as model, connect(model) as controller:
        events, bdev = controller.events(), controller["VirtioScsi0t7l3"]
        luns[7, 3].blocks *= 2
        luns[7, 3].disk.extend(bytes(len(luns[7, 3].disk)))
        lun = address(7, 3) if form == "flat" else bytes([1, 7, 0, 3, 0, 0, 0, 0])
        model.do(lambda: model.device.post(PARAM_CHANGE, lun, CAPACITY_CHANGED))
        assert events.wait(5) == Resized(bdev, 1 << 20)
        with bdev.open(timeout=5) as opened:
            opened.write((2 << 20) - 512, b"the  end" * 64)
        assert luns[7, 3].disk[-512:] == b"the  end" * 64


@pytest.mark.parametrize("lun", [bytes(8), b"\xff" * 8, address(200, 0)])
@pytest.mark.parametrize("event", [NO_EVENT, TRANSPORT_RESET, PARAM_CHANGE, 2, 77])
def test_senseless_events_do_no_harm(event, lun):
    with Backend(Scsi(features=EVENTS)) as model, channel(model) as opened:
        model.do(lambda: model.device.post(event, lun, 0xFFFFFFFF))
        exercise(model, opened)
        assert model.wait_for(lambda: len(model.device.events) == BUFFERS)


def test_a_broken_event_queue_ends_the_device():
    with Backend(Scsi(features=EVENTS)) as model, connect(model) as controller:
        model.options.skip_used = 200
        model.do(lambda: model.device.post(NO_EVENT, bytes(8)))
        assert model.wait_for(lambda: controller.device.life.error is not None)
        with pytest.raises(ProtocolError, match="broke its event queue: used index moved by"):
            next(iter(controller.values())).open().read(0, 512)


# What responses let us ask anew


@pytest.mark.parametrize("attention", [(6, 0x2A, 0x09), (6, 0x29, 0x00), (6, 0x3F, 0x03)])
def test_a_unit_attention_is_no_error_and_the_unit_is_asked_again(attention):
    luns = units((0, 0))
    with Backend(Scsi(luns=luns)) as model, connect(model) as controller:
        events, (bdev,) = controller.events(), controller.values()
        content = fill(model)
        luns[0, 0].blocks -= 8
        luns[0, 0].attention = attention
        with bdev.open(timeout=5) as opened:
            assert opened.read(0, 4096) == content[:4096]
        assert events.wait(5) == Resized(bdev, 1 << 20)


def test_another_list_of_units_is_looked_for_when_a_unit_says_so():
    luns = units((0, 0))
    with Backend(Scsi(luns=luns)) as model, connect(model) as controller:
        events = controller.events()
        luns |= units((0, 4))
        luns[0, 0].attention = (6, 0x3F, 0x0E)
        with controller["VirtioScsi0t0"].open(timeout=5) as opened:
            opened.read(0, 512)
        assert events.wait(5) == Added(controller["VirtioScsi0t0l4"])


def test_a_unit_that_is_gone_fails_its_requests_and_is_removed():
    luns = units((0, 0), (0, 1))
    with Backend(Scsi(luns=luns)) as model, connect(model) as controller:
        events, gone = controller.events(), controller["VirtioScsi0t0l1"]
        with gone.open(timeout=5) as opened:
            del luns[0, 1]
            with pytest.raises(DeviceError, match="logical unit not supported"):
                opened.read(0, 512)
            assert events.wait(5) == Removed(gone)
            with pytest.raises(TransportError, match="t0l1 was removed"):
                opened.read(0, 512)


def test_another_disk_behind_the_same_unit_is_another_bdev():
    luns = units((0, 0))
    with Backend(Scsi(luns=luns, features=EVENTS)) as model, connect(model) as controller:
        events, old = controller.events(), controller["VirtioScsi0t0"]
        luns[0, 0].name = 2
        model.do(lambda: model.device.post(TRANSPORT_RESET, address(0, 0), RESCAN))
        assert events.wait(5) == Removed(old)
        assert events.wait(5) == Added(controller["VirtioScsi0t0"])
        assert controller["VirtioScsi0t0"] is not old and old.state == "lost"
        assert controller["VirtioScsi0t0"].uuid != old.uuid


# Requests that do not come back


def aborting(model):
    """For `manage`: abort the one, or all, that are meant, and say so."""

    def manage(tmf):
        for chain in held(model):
            if tmf.subtype != ABORT_TASK or Scsi.tag(chain) == tmf.tag:
                model.device.abort(chain, 2 if tmf.subtype == ABORT_TASK else 4)
        return 0

    return manage


def late(model, opened, write=False):
    """A request that the device keeps until its caller has given up."""
    model.options.hold = requests
    with pytest.raises(RequestTimeout):
        opened.write(0, bytes(512)) if write else opened.read(0, 512)
    model.options.hold = None


@pytest.mark.parametrize("write", [False, True])
def test_a_late_request_is_aborted_by_its_tag_and_the_queue_goes_on(write):
    """CLN-1, CLN-2: its slot and memory are taken until it is back."""
    with Backend(Scsi()) as model, channel(model, timeout=0.2, queues=1) as opened:
        model.device.manage = aborting(model)
        queue = opened._lease.queue
        late(model, opened, write)
        assert model.wait_for(lambda: queue.orphans == 0 and queue.in_flight == 0)
        (tmf,) = model.device.tmfs
        assert (tmf.subtype, tmf.lun) == (ABORT_TASK, address(0, 0))
        opened.timeout = 5
        exercise(model, opened)


def test_what_an_abort_does_not_bring_back_a_reset_of_the_unit_does():
    with Backend(Scsi()) as model, channel(model, timeout=0.2, queues=1) as opened:
        abort = aborting(model)
        model.device.manage = lambda tmf: abort(tmf) if tmf.subtype == LOGICAL_UNIT_RESET else 11
        queue = opened._lease.queue
        opened._controller.device.transport.timeout = 0.2
        late(model, opened)
        assert model.wait_for(lambda: queue.orphans == 0)
        assert [tmf.subtype for tmf in model.device.tmfs] == [ABORT_TASK, LOGICAL_UNIT_RESET]
        opened.timeout = 5
        exercise(model, opened)


def test_a_control_queue_that_never_answers_is_survived():
    """CLN-2: the request keeps its memory, and comes back when it likes."""
    with Backend(Scsi()) as model, channel(model, timeout=0.2, queues=1) as opened:
        model.device.manage = lambda tmf: None
        opened._controller.device.transport.timeout = 0.1
        queue = opened._lease.queue
        late(model, opened)
        assert model.wait_for(lambda: len(model.device.tmfs) == 3)
        assert [tmf.subtype for tmf in model.device.tmfs] == [
            ABORT_TASK,
            LOGICAL_UNIT_RESET,
            I_T_NEXUS_RESET,
        ]
        assert queue.orphans == 1
        opened.timeout = 5
        content = fill(model)
        assert opened.read(0, 4096) == content[:4096]
        assert model.release() == 1
        opened.read(0, 512)
        assert queue.orphans == 0
        exercise(model, opened)


def test_a_reset_that_hits_others_requests_too_costs_them_a_retry_and_nothing_more():
    """Each completes to its caller exactly once."""
    with Backend(Scsi(), queue_num=6) as model, channel(model, timeout=5) as opened:
        content = fill(model)
        seen = []

        def hold(chain):
            if chain.ring.index < 2 or len(seen) >= 40:
                return False
            seen.append(chain)
            return True

        def disturb():
            for _ in range(20):
                time.sleep(0.01)
                model.do(lambda: [model.device.abort(chain, 4) for chain in held(model)])

        model.options.hold = hold
        other = threading.Thread(target=disturb)
        other.start()
        offsets = array("Q", random.Random(1).sample(range(0, 1 << 20, 512), 200))
        into = bytearray(200 * 512)
        opened.read_batch(offsets, 512, into).raise_for_status()
        other.join()
        assert len(seen) == 40
        for number, offset in enumerate(offsets):
            assert into[number * 512 : number * 512 + 512] == content[offset : offset + 512]


# The poorest target


def test_the_poorest_target_is_survived():
    """One queue, commands of ten bytes only, no pages, no list of units, no events, no configuration, and a
    control queue that never answers."""
    device = Scsi(known=frozenset([0x00, 0x03, 0x12, 0x25, 0x28, 0x2A]), num_queues=1, max_target=255)
    device.manage = lambda tmf: None
    device.luns = units((0, 0), (0, 1), (0, 2), (0, 9))
    poor = PROTOCOL_FEATURES & ~(P.CONFIG | P.MQ | P.BACKEND_REQ | P.STATUS | P.CONFIGURE_MEM_SLOTS)
    model = Backend(device, protocol_features=poor, queue_num=3)
    with model, connect(model) as controller:
        assert list(controller) == ["VirtioScsi0t0", "VirtioScsi0t0l1", "VirtioScsi0t0l2"]
        assert len(controller.device.leases) == 1 and controller.device.spare is None
        bdev = controller["VirtioScsi0t0"]
        assert bdev.limits.max_unmap == bdev.limits.max_write_zeroes == 0
        controller.device.transport.timeout = 0.2
        with bdev.open(timeout=5) as opened:
            exercise(model, opened)
            opened.write_zeroes(4096, 8192)
            assert model.device.disk[4096:12288] == bytes(8192)
            opened.timeout = 0.2
            late(model, opened)
            assert model.wait_for(lambda: len(device.tmfs) == 3)
            assert model.release() == 1
            opened.timeout = 5
            exercise(model, opened)


def test_a_unit_that_never_answers_does_not_stop_the_others():
    luns = units((0, 0), (1, 0), (1, 1), (2, 0))
    dead = address(1, 0)
    with Backend(Scsi(luns=luns)) as model:
        model.options.hold = lambda chain: requests(chain) and chain.read()[:8] == dead
        with connect(model, timeout=1.0) as controller:
            assert list(controller) == ["VirtioScsi0t0", "VirtioScsi0t2"]
            assert controller.device.units[1, 0].problem == "no answer to INQUIRY"
            with controller["VirtioScsi0t2"].open(timeout=5) as opened:
                opened.read(0, 512)
