"""Random traffic on a request queue; prints a digest of every result and of all shared memory.

Run by test_twins.py, once compiled and once interpreted.
"""

import hashlib
import random
import sys
from array import array

from tests.ring.peer import Peer
from virtio.ring import layout as layouts, requests
from virtio.ring.codes import FROM_DEVICE, NO_DATA, OFFSET, TAG, TO_DEVICE
from virtio.ring.doorbell import Doorbell
from virtio.ring.region import Mapping, Pool, Region
from virtio.ring.task import Task
from virtio.ring.template import Patch, Template


def traffic(seed: int, digest) -> None:
    rng = random.Random(seed)
    region = Region(1)
    pool = Pool(region)
    indirect, event_idx = rng.random() < 0.5, rng.random() < 0.5
    size, segments = rng.choice([8, 16, 64]), rng.choice([1, 2, 3])
    scsi = rng.random() < 0.5
    layout = layouts.Layout(
        *((51, 0, 108, 4, 0xFFFF0000FFFFFFFF, True) if scsi else (16, 16, 1, 0, 0xFF, False))
    )
    memory = pool.take(layouts.queue_bytes(size, layout, segments, indirect))
    queue = requests.RequestQueue(
        memory,
        region.view,
        Mapping.contiguous(rng.getrandbits(40)),
        size,
        layout,
        segments=segments,
        segment_bytes=1024,
        indirect=indirect,
        event_idx=event_idx,
    )
    kicks = []
    queue.connect(Doorbell(call=lambda: kicks.append(1)))
    patches = [Patch(TAG, 0, 8), Patch(OFFSET, 8, 8, True, 9)]
    templates = [
        Template(rng.randbytes(layout.request), direction=direction, patches=patches)
        for direction in (FROM_DEVICE, TO_DEVICE, NO_DATA)
    ]
    data = pool.take(segments * 1024)
    peer, seen, known = Peer(memory.view(), size), 0, []
    for step in range(3000):
        action = rng.randrange(5)
        result: object
        if action == 0:
            nbytes = rng.randrange(1, segments * 1024 + 1)
            template = rng.choice(templates)
            result = queue.submit(template, rng.getrandbits(50), nbytes, data.offset, step)
        elif action == 1:
            queue.kick()
            result = len(kicks)
        elif action == 2:
            peer.set_used_flags(rng.randrange(2))
            peer.set_avail_event(rng.getrandbits(16))
            while seen != peer.avail_idx:
                known.append(peer.head(seen))
                seen = seen + 1 & 0xFFFF
            rng.shuffle(known)
            if known:
                peer.use(known.pop(), rng.getrandbits(32))
            result = len(known)
        elif action == 3:
            result = [tuple(finished)[:3] for finished in queue.poll(rng.randrange(4))]
        else:
            result = queue.arm()
            queue.disarm()
        digest.update(repr(result).encode())
    task = Task(templates[0], memoryview(array("Q", range(0, 99 * 512, 512))), 512, 512)
    digest.update(repr((queue.run(task, 1, 0), task.started, task.active)).encode())
    digest.update(region.view)
    region.close()


total = hashlib.sha256()
for seed in range(int(sys.argv[1])):
    traffic(seed, total)
print(requests.__file__.rpartition(".")[2], total.hexdigest())
