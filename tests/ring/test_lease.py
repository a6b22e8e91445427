"""How long a compiled loop goes on before it comes back to the interpreter."""

import threading
import time

from virtio.ring import lease


def test_slices_are_short_in_the_main_thread_and_elsewhere_a_share_of_the_time_that_is_left():
    moment = time.monotonic_ns()

    def longest():
        return [lease._slice(deadline, None, False) for deadline in (None, moment + 10**12, moment - 1)]

    short, found = 50_000_000, []
    assert longest() == [short] * 3
    thread = threading.Thread(
        target=lambda: found.extend(
            [
                *longest(),
                lease._slice(time.monotonic_ns() + 8 * 10**9, None, False),
                lease._slice(None, None, True),
                lease._slice(None, moment, False),
            ]
        )
    )
    thread.start()
    thread.join()
    assert found[:3] == [10**9, 10**9, short]
    assert 300_000_000 < found[3] <= 500_000_000  # a sixteenth
    assert found[4:] == [short, 1_000_000]  # with orphans; and at a moment that is past
