"""The asyncio front, against the embedded target."""

import asyncio
import contextlib
import functools
import gc
import os
import random
import socket
import threading
import time

import pytest

import virtio_bdev
from tests.leaks import open_fds
from virtio.errors import (
    ClosedError,
    DeviceError,
    QueueFullError,
    ReadOnlyError,
    RequestError,
    RequestTimeout,
    TransportError,
    VirtioError,
)
from virtio.target import serve
from virtio_bdev import aio
from virtio_bdev.aio.reactor import Reactor

BLOCK = 4096


def asynchronous(test):
    """Run a test in a loop of its own; slow callbacks and forgotten tasks are errors."""

    @functools.wraps(test)
    def wrapper(*args, **kwargs):
        async def main():
            async with asyncio.timeout(30):
                await test(*args, **kwargs)

        asyncio.run(main())

    return wrapper


@pytest.fixture(params=["blk", "scsi"])
def disk(request, tmp_path):
    """A target with one disk of 16 MiB of random bytes: its kind, address, file."""
    path = tmp_path / "image"
    path.write_bytes(random.Random(1).randbytes(16 << 20))
    with serve(request.param, f"file:{path}", queues=4) as target:
        yield request.param, target.address, path


def first(controller):
    return controller[next(iter(controller))]


@asynchronous
async def test_what_is_written_is_in_the_file_and_is_read_back(disk):
    kind, address, path = disk
    content = bytearray(path.read_bytes())
    async with await aio.attach(address, dev_type=kind) as controller, first(controller).open() as channel:
        for nbytes in (512, BLOCK, 1 << 20, (3 << 20) + 512):
            assert await channel.read(512, nbytes) == content[512 : 512 + nbytes]
            data = os.urandom(nbytes)
            await channel.write(1024, data, fua=nbytes == BLOCK)
            content[1024 : 1024 + nbytes] = data
            into = bytearray(nbytes)
            await channel.readinto(1024, into)
            assert into == data
        with controller.buffer(1 << 20) as buffer:
            await channel.readinto(0, buffer)
            assert buffer.view() == content[: 1 << 20]
            buffer.view()[:] = bytes(1 << 20)
            await channel.write(4 << 20, buffer)
            content[4 << 20 : 5 << 20] = bytes(1 << 20)
        parts = [b"a" * 100, b"b" * 412]
        await channel.writev(0, parts)
        content[:512] = b"".join(parts)
        into = [bytearray(100), bytearray(412)]
        await channel.readv(0, into)
        assert into == parts
        await channel.write_zeroes(6 << 20, 1 << 20)
        content[6 << 20 : 7 << 20] = bytes(1 << 20)
        await channel.unmap(8 << 20, 1 << 20)
        await channel.flush()
        assert await channel.read(0, 0) == b""
        assert path.read_bytes()[: 8 << 20] == content[: 8 << 20]


@asynchronous
async def test_a_buffer_of_more_than_one_request(disk):
    kind, address, path = disk
    content = path.read_bytes()
    async with await aio.attach(address, dev_type=kind) as controller, first(controller).open() as channel:
        nbytes = 2 * channel.bdev.limits.max_transfer + 512
        assert nbytes < len(content) // 2
        with controller.buffer(nbytes) as buffer:
            await channel.readinto(512, buffer)
            assert buffer.view() == content[512 : 512 + nbytes]
            await channel.write(8 << 20, buffer, fua=True)
        assert path.read_bytes()[8 << 20 : (8 << 20) + nbytes] == content[512 : 512 + nbytes]
        with controller.buffer(512) as buffer:
            with pytest.raises(RequestError, match="do not lie within"):
                await channel.readinto(len(content), buffer)
            with pytest.raises(RequestError, match="do not lie within"):
                await channel.write(1 << 64, buffer)
        with pytest.raises(VirtioError, match="closed"):
            await channel.readinto(0, buffer)


class Anything:
    """No number, and yet where one is asked for."""

    def __ge__(self, other):
        return True

    def __le__(self, other):
        return True


@asynchronous
async def test_a_call_that_makes_no_sense_holds_up_nobody_behind_it(disk):
    kind, address, _ = disk
    async with await aio.attach(address, dev_type=kind, queue_size=128) as controller:
        async with first(controller).open() as channel:
            buffers = [controller.buffer(BLOCK) for _ in range(300)]
            offsets = [number * BLOCK for number in range(300)]
            offsets[250] = Anything()  # has to wait, and is looked at in its turn
            calls = (channel.readinto(at, into) for at, into in zip(offsets, buffers, strict=True))
            results = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(results.pop(250), TypeError)
    assert results == [None] * 299


@asynchronous
async def test_the_loop_gives_the_queue_one_turn_in_each_of_its_own(disk, monkeypatch):
    kind, address, _ = disk
    turns = 0

    def counted(self, turn=Reactor._turn):
        nonlocal turns
        turns += 1
        turn(self)

    monkeypatch.setattr(Reactor, "_turn", counted)
    async with await aio.attach(address, dev_type=kind) as controller, first(controller).open() as channel:

        async def reads(buffer):
            for number in range(200):
                await channel.readinto(number * BLOCK, buffer)

        working = asyncio.gather(*(reads(controller.buffer(BLOCK)) for _ in range(32)))
        loops = 0
        while not working.done():
            await asyncio.sleep(0)
            loops += 1
        await working
    assert 6400 / 32 <= turns <= loops + 10


@asynchronous
async def test_ten_thousand_reads_at_once_through_a_queue_of_128(disk):
    kind, address, path = disk
    content = path.read_bytes()
    async with await aio.attach(address, dev_type=kind, queue_size=128) as controller:
        async with first(controller).open() as channel:
            free = controller.blocking.device.pool.free_bytes
            least = free

            async def one(number):
                nonlocal least
                at = number * 7 % 4096 * BLOCK
                assert await channel.read(at, BLOCK) == content[at : at + BLOCK]
                least = min(least, controller.blocking.device.pool.free_bytes)

            await asyncio.gather(*map(one, range(10_000)))
            assert free - least <= 4096 * BLOCK  # in flight, on their way to their callers, and kept


@asynchronous
async def test_cancelled_at_random_nothing_is_lost_and_no_buffer_used_again(disk):
    """CLN-1, CLN-2: a thousand times, beside others that go on."""
    kind, address, path = disk
    content = bytearray(path.read_bytes())
    chance = random.Random(3)
    async with await aio.attach(address, dev_type=kind, queues=1) as controller:
        async with first(controller).open() as channel:

            async def read(block):
                data = await channel.read(block * BLOCK, BLOCK)
                assert data == content[block * BLOCK : (block + 1) * BLOCK], block

            for turn in range(1000):
                tasks = [asyncio.create_task(read(chance.randrange(4096))) for _ in range(6)]
                for _ in range(chance.randrange(3)):
                    await asyncio.sleep(0)
                victim = chance.choice(tasks)
                victim.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
                for task, result in zip(tasks, results, strict=True):
                    assert result is None or (task is victim and isinstance(result, asyncio.CancelledError))
                if turn % 50 == 0:
                    await asyncio.gather(*(cancelled_write(channel, content, chance) for _ in range(4)))
            await channel.flush()
            assert await channel.read(0, 16 << 20) == path.read_bytes()
        assert controller.blocking.device.leases[0].queue.in_flight == 0


async def cancelled_write(channel, content, chance):
    """Cancel a write; the next one to the same place is what counts."""
    at = chance.randrange(4096) * BLOCK
    task = asyncio.create_task(channel.write(at, os.urandom(BLOCK)))
    await asyncio.sleep(0)
    task.cancel()
    data = os.urandom(BLOCK)
    await channel.write(at, data)
    content[at : at + BLOCK] = data
    assert await channel.read(at, BLOCK) == data


@asynchronous
async def test_a_call_whose_time_is_up_ends_and_the_late_answer_does_no_harm():
    with serve("blk", "ram:1M,delay=0.3") as target:
        async with await aio.attach(target.address, dev_type="blk", queues=1) as controller:
            async with first(controller).open(timeout=0.1) as channel:
                begun = time.monotonic()
                results = await asyncio.gather(
                    *(channel.read(at * BLOCK, BLOCK) for at in range(3)), return_exceptions=True
                )
                assert [type(result) for result in results] == [RequestTimeout] * 3
                assert time.monotonic() - begun < 0.3
                channel.timeout = 10
                assert await channel.read(0, BLOCK) == bytes(BLOCK)
                assert channel.inner.queue.orphans == 0


@asynchronous
async def test_more_calls_than_may_wait_is_an_error_of_those_alone():
    with serve("blk", ram="1M") as target:
        async with await aio.attach(target.address, dev_type="blk", queues=1, queue_size=16) as controller:
            async with first(controller).open(max_waiting=10) as channel:
                slots = channel.inner.queue.slots
                calls = [channel.read(0, BLOCK) for _ in range(slots + 15)]
                results = await asyncio.gather(*calls, return_exceptions=True)
                refused = [result for result in results if isinstance(result, QueueFullError)]
                assert len(refused) == 5 and results.count(bytes(BLOCK)) == slots + 10


@pytest.mark.parametrize("at_once", [1, 256])
@asynchronous
async def test_waiters_are_served_in_order_and_channels_in_turns(at_once, monkeypatch):
    monkeypatch.setattr("virtio_bdev.aio.channel._POLL_AT_ONCE", at_once)  # of 1: a slot is free at a time
    with serve("scsi", "ram:1M", "ram:1M") as target:
        async with await aio.attach(target.address, queues=1, queue_size=16) as controller:
            order = []

            async def call(channel, number):
                await channel.read(0, BLOCK)
                order.append((channel, number))

            names = list(controller)
            async with controller[names[0]].open() as one, controller[names[1]].open() as two:
                slots = one.inner.queue.slots
                await asyncio.gather(
                    *(call(one, number) for number in range(slots + 40)),
                    *(call(two, number) for number in range(40)),
                )
                for channel in (one, two):
                    mine = [number for who, number in order if who is channel]
                    assert mine == sorted(mine)
                waited = [who for who, _ in order[slots:]]
                half = waited[: len(waited) // 2]
                assert abs(half.count(one) - half.count(two)) <= slots


@asynchronous
async def test_channels_with_nothing_that_waits_are_not_asked(disk, monkeypatch):
    kind, address, _ = disk
    asked = set()

    def noted(self, begin_next=aio.Channel.begin_next):
        asked.add(self)
        return begin_next(self)

    monkeypatch.setattr(aio.Channel, "begin_next", noted)
    async with await aio.attach(address, dev_type=kind, queues=1, queue_size=128) as controller:
        async with contextlib.AsyncExitStack() as stack:
            bdev = first(controller)
            channels = [await stack.enter_async_context(bdev.open()) for _ in range(10)]
            busy = channels[5]
            await asyncio.gather(*(busy.read(0, BLOCK) for _ in range(500)))
            assert asked == {busy}


@asynchronous
async def test_a_flush_that_needs_no_device_ends_on_any_channel():
    with serve("blk", "ram:1M,ro") as target:
        async with await aio.attach(target.address, dev_type="blk", queues=1) as controller:
            bdev = first(controller)
            async with bdev.open(timeout=5), bdev.open(timeout=5) as second:
                await second.flush()


@asynchronous
async def test_a_request_is_sent_again_on_any_channel():
    with serve("scsi", "0:0=ram:1M", "1:0=ram:1M", control=True) as target:
        async with await aio.attach(target.address, queues=1) as controller:
            one, two = controller.values()
            async with one.open(timeout=5), two.open(timeout=5) as second:
                await asyncio.to_thread(target.control, "set_fault", target=1, lun=0, busy=3)
                assert await second.read(0, BLOCK) == bytes(BLOCK)


@asynchronous
async def test_a_disk_that_is_removed_ends_its_own_channels_alone():
    with serve("scsi", "0:0=ram:1M", "1:0=ram:1M", control=True) as target:
        async with await aio.attach(target.address, queues=1) as controller:
            one, two = controller.values()
            async with one.open() as removed, two.open() as other:
                events = controller.events()
                happened = asyncio.create_task(anext(events))
                await asyncio.sleep(0)
                await asyncio.to_thread(target.control, "remove_disk", target=0, lun=0)
                await happened
                for _ in range(3):
                    assert await other.read(0, BLOCK) == bytes(BLOCK)
                    with pytest.raises(TransportError, match="was removed"):
                        await removed.read(0, BLOCK)
                with pytest.raises(TransportError, match="was removed"):
                    await removed.flush()
        await events.aclose()


@asynchronous
async def test_a_call_that_waits_behind_requests_given_up_ends_in_time_and_leaves_no_timer():
    with serve("blk", "ram:1M", control=True) as target:
        async with await aio.attach(target.address, dev_type="blk", queues=1, queue_size=16) as controller:
            async with first(controller).open(timeout=0.1) as channel:
                await asyncio.to_thread(target.control, "set_fault", hang=True)
                calls = (channel.read(0, BLOCK) for _ in range(channel.inner.queue.slots))
                late = await asyncio.gather(*calls, return_exceptions=True)
                assert {type(error) for error in late} == {RequestTimeout}
                with pytest.raises(RequestTimeout):
                    await channel.read(0, BLOCK)
                assert not channel.waiting and channel._timer is None
                await asyncio.to_thread(target.control, "set_fault", hang=False)


@asynchronous
async def test_while_somebody_has_the_queue_the_loop_goes_on():
    with serve("blk", "ram:1M,delay=0.05") as target:
        async with await aio.attach(target.address, dev_type="blk", queues=1) as controller:
            async with first(controller).open() as channel:
                reads = [asyncio.create_task(channel.read(0, BLOCK))]
                await asyncio.sleep(0)
                with channel.inner._lease.borrow(None):
                    reads += [asyncio.create_task(channel.read(at * BLOCK, BLOCK)) for at in range(3)]
                    with pytest.raises(TimeoutError):
                        async with asyncio.timeout(0.05):
                            await channel.read(0, BLOCK)
                    assert not any(read.done() for read in reads)
                assert await asyncio.gather(*reads) == [bytes(BLOCK)] * 4


@asynchronous
async def test_a_device_that_goes_while_somebody_has_the_queue_ends_all_calls():
    with serve("blk", "ram:1M", control=True) as target:
        async with await aio.attach(target.address, dev_type="blk", queues=1) as controller:
            async with first(controller).open(timeout=0.1) as channel:
                await asyncio.to_thread(target.control, "set_fault", hang=True)
                late = [asyncio.create_task(channel.read(0, BLOCK)) for _ in range(3)]
                await asyncio.sleep(0)
                lease = channel.inner._lease
                with lease.borrow(None):
                    results = await asyncio.gather(*late, return_exceptions=True)
                    assert [type(result) for result in results] == [RequestTimeout] * 3
                    channel.timeout = None
                    reads = [asyncio.create_task(channel.read(0, BLOCK)) for _ in range(3)]
                    await asyncio.sleep(0)
                    lease.life.end(TransportError(5, "it has gone"))
                    results = await asyncio.gather(*reads, return_exceptions=True)
                    assert [type(result) for result in results] == [TransportError] * 3


@asynchronous
async def test_a_write_cancelled_while_somebody_has_the_queue_is_not_overtaken():
    """CLN-2"""
    with serve("blk", "ram:1M", control=True) as target:
        async with await aio.attach(target.address, dev_type="blk", queues=1) as controller:
            bdev = first(controller)
            async with bdev.open() as channel, bdev.open() as other:
                await asyncio.to_thread(target.control, "set_fault", hang=True)
                old = asyncio.create_task(channel.write(0, b"o" * BLOCK))
                await asyncio.sleep(0)
                with channel.inner._lease.borrow(None):
                    old.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await old
                new = asyncio.create_task(other.write(0, b"n" * BLOCK))
                while not channel.inner.queue.orphan_changes:
                    await asyncio.sleep(0)
                assert len(other.waiting) == 1
                await asyncio.to_thread(target.control, "set_fault", hang=False)
                await new
                assert await other.read(0, BLOCK) == b"n" * BLOCK


def fill(controller, stack, nbytes):
    """Take all that is left of the pool in pieces of this size."""
    with contextlib.suppress(TransportError):
        while True:
            stack.enter_context(controller.buffer(nbytes))


@asynchronous
async def test_memory_that_idle_channels_keep_is_there_for_others(disk):
    kind, address, _ = disk
    nbytes = 1 << 20
    async with await aio.attach(address, dev_type=kind, queues=1) as controller:
        bdev = first(controller)
        async with bdev.open() as one, bdev.open() as two:
            await one.read(0, nbytes)  # and keeps its bounce buffer
            with contextlib.ExitStack() as stack:
                fill(controller, stack, nbytes)
                await two.read(0, nbytes)
                parts = await asyncio.gather(one.read(0, nbytes), two.read(nbytes, nbytes))
                assert [len(part) for part in parts] == [nbytes] * 2
                two.drop_rooms()
                one.drop_rooms()
                fill(controller, stack, nbytes)
                with pytest.raises(TransportError, match="one piece"):
                    await two.read(0, nbytes)


@asynchronous
async def test_small_bounce_buffers_count_as_what_they_take_of_the_pool(disk):
    kind, address, _ = disk
    async with await aio.attach(address, dev_type=kind, queue_size=1024) as controller:
        async with first(controller).open() as channel:
            free = controller.blocking.device.pool.free_bytes
            await asyncio.gather(*(channel.read(0, 512) for _ in range(1000)))
            kept = sum(map(len, channel._rooms.values()))
            assert 0 < kept * BLOCK <= 1 << 20
            assert free - controller.blocking.device.pool.free_bytes <= kept * BLOCK


@asynchronous
async def test_what_is_wrong_is_told_at_once(disk):
    kind, address, _ = disk
    async with await aio.attach(address, dev_type=kind) as controller:
        async with first(controller).open() as channel:
            with pytest.raises(RequestError, match="grid"):
                await channel.read(1, 512)
            with pytest.raises(RequestError, match="do not lie within"):
                await channel.write(16 << 20, bytes(512))
        with pytest.raises(ClosedError):
            await channel.read(0, 512)


@asynchronous
async def test_errors_of_the_device_reach_the_call_that_they_are_of():
    with serve("scsi", "ram:4M,fail-read=2097152", "ram:1M,ro") as target:
        async with await aio.attach(target.address) as controller:
            async with controller["VirtioScsi0t0"].open() as channel:
                results = await asyncio.gather(
                    *(channel.read(at << 20, 1 << 20) for at in range(4)), return_exceptions=True
                )
                assert [isinstance(result, DeviceError) for result in results] == [False, False, True, False]
                with pytest.raises(DeviceError, match="at byte 2097152"):
                    await channel.read(0, 4 << 20)
            async with controller["VirtioScsi0t1"].open() as channel:
                with pytest.raises(ReadOnlyError):
                    await channel.write(0, bytes(512))


@asynchronous
async def test_a_device_that_goes_ends_all_calls_and_closing_is_quick():
    with serve("blk", "ram:1M,delay=5") as target:
        controller = await aio.attach(target.address, dev_type="blk")
        channel = first(controller).open()
        tasks = [asyncio.create_task(channel.read(0, BLOCK)) for _ in range(5)]
        await asyncio.sleep(0.05)
        os.kill(target.pid, 9)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [TransportError] * 5
        with pytest.raises(TransportError):
            await channel.read(0, BLOCK)
        await channel.close()
        await controller.close()


@asynchronous
async def test_closing_ends_what_is_under_way_and_leaves_nothing():
    before = open_fds()
    with serve("blk", "ram:1M,delay=0.05") as target:
        async with await aio.attach(target.address, dev_type="blk") as controller:
            channel = first(controller).open()
            tasks = [asyncio.create_task(channel.read(0, BLOCK)) for _ in range(5)]
            await asyncio.sleep(0.01)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(result) for result in results} <= {ClosedError, bytes}
        assert ClosedError in map(type, results)
    del controller, channel, tasks, results
    await asyncio.sleep(0)  # the loop itself holds on to what woke us
    gc.collect()
    left = {fd: name for fd, name in open_fds().items() if before.get(fd) != name}
    assert not any("virtio" in name for name in left.values()), left


@asynchronous
async def test_ten_controllers_are_attached_in_the_time_of_the_slowest():
    with contextlib.ExitStack() as stack:
        targets = [stack.enter_context(serve("blk", "ram:1M,delay=0.3")) for _ in range(10)]
        begun = time.monotonic()
        controllers = await asyncio.gather(
            *(aio.attach(target.address, dev_type="blk", queues=1) for target in targets)
        )
        seconds = time.monotonic() - begun
        assert len({controller.name for controller in controllers}) == 10
        assert seconds < 10 * 0.3  # each reads its disk's identity, which takes 0.3 s
        await asyncio.gather(*(controller.close() for controller in controllers))


@asynchronous
async def test_a_cancelled_attach_is_detached():
    with serve("blk", ram="1M") as target:
        task = asyncio.create_task(aio.attach(target.address, dev_type="blk", name="Cancelled0"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(5):
            while True:  # until the name, and the back end, are free
                try:
                    async with await aio.attach(target.address, dev_type="blk", name="Cancelled0"):
                        break
                except RequestError:
                    await asyncio.sleep(0.01)


def test_several_loops_in_several_threads_use_one_controller(disk):
    kind, address, path = disk
    content = path.read_bytes()
    failures = []

    async def work(controller, seed):
        chance = random.Random(seed)
        async with first(controller).open() as channel:
            for _ in range(20):
                blocks = [chance.randrange(4096) for _ in range(50)]
                for block, data in zip(
                    blocks,
                    await asyncio.gather(*(channel.read(block * BLOCK, BLOCK) for block in blocks)),
                    strict=True,
                ):
                    assert data == content[block * BLOCK : (block + 1) * BLOCK]

    def thread(controller, seed):
        try:
            asyncio.run(work(controller, seed))
        except BaseException as error:
            failures.append(error)

    with virtio_bdev.attach(address, dev_type=kind, queues=3) as inner:
        controller = aio.Controller(inner)
        threads = [threading.Thread(target=thread, args=(controller, seed)) for seed in range(3)]
        for one in threads:
            one.start()
        for one in threads:
            one.join(30)
        assert failures == []


def test_closing_ends_calls_in_the_loops_of_other_threads():
    with serve("blk", "ram:1M", queues=2, control=True) as target:
        controller = aio.Controller(virtio_bdev.attach(target.address, dev_type="blk", queues=2))
        target.control("set_fault", hang=True)
        begun, ended = threading.Event(), []

        async def read():
            channel = first(controller).open(timeout=None)
            asyncio.get_running_loop().call_soon(begun.set)
            try:
                await channel.read(0, BLOCK)
            except VirtioError as error:
                ended.append(type(error))
            assert channel.inner.closed

        thread = threading.Thread(target=asyncio.run, args=(read(),), daemon=True)
        thread.start()
        assert begun.wait(10)
        asyncio.run(controller.close())
        thread.join(10)
        assert ended == [ClosedError]


@asynchronous
async def test_a_reset_under_way_costs_nobody_anything(disk):
    kind, address, path = disk
    content = path.read_bytes()
    async with await aio.attach(address, dev_type=kind) as controller:
        bdev = first(controller)
        async with bdev.open() as channel:

            async def read(number):
                at = number % 4096 * BLOCK
                assert await channel.read(at, BLOCK) == content[at : at + BLOCK]

            for turn in range(20):
                reads = [asyncio.create_task(read(turn * 100 + number)) for number in range(100)]
                await asyncio.sleep(0)
                await bdev.reset()
                await asyncio.gather(*reads)


@asynchronous
async def test_events_are_awaited_and_end_with_the_controller():
    with serve("scsi", "0:0=ram:1M", control=True) as target:
        async with await aio.attach(target.address) as controller:
            seen = []

            async def watch():
                async for event in controller.events():
                    seen.append(type(event).__name__)

            watcher = asyncio.create_task(watch())
            forgotten = asyncio.create_task(anext(controller.events()))
            await asyncio.sleep(0)
            threads, count = threading.active_count(), 0
            for call in (
                {"method": "add_disk", "disk": "ram:1M"},
                {"method": "resize_disk", "size": 2 << 20},
                {"method": "remove_disk"},
            ):
                method = call.pop("method")
                await asyncio.to_thread(target.control, method, target=0, lun=5, **call)
                count += 1
                while len(seen) < count:
                    await asyncio.sleep(0.01)
            assert seen == ["Added", "Resized", "Removed"]
            assert type(await forgotten).__name__ == "Added"
            assert threading.active_count() <= threads + 1  # of the executor that the test itself uses
        await watcher


def test_ten_that_never_answer_take_as_long_as_one(tmp_path):
    """Attaching is under way for all of them at the same time."""

    async def main():
        with contextlib.ExitStack() as stack:
            paths = [str(tmp_path / str(number)) for number in range(10)]
            for path in paths:
                silent = stack.enter_context(socket.socket(socket.AF_UNIX))
                silent.bind(path)
                silent.listen()
            begun = time.monotonic()
            attaching = (aio.attach(f"user:{path}", timeout=1.0) for path in paths)
            failures = await asyncio.gather(*attaching, return_exceptions=True)
            assert all(isinstance(failure, RequestTimeout) for failure in failures)
            assert time.monotonic() - begun < 5

    asyncio.run(main())
