"""In which order slots and cells are used: a processor fetches what is next to what it has just had."""

import random

from tests.ring.test_load import loaded
from tests.ring.test_requests import READ, Bench
from virtio.ring import codes
from virtio.ring.load import Load


def sent(bench, count):
    """Submit so many more requests: their heads, which are the numbers of their slots."""
    for token in range(count):
        assert bench.queue.submit(READ, 0, 512, 0, token)
    bench.queue.kick()
    return bench.arrivals()


def answered(bench, heads):
    for head in heads:
        bench.answer(head, b"\0")
    assert len(bench.queue.poll()) == len(heads)


def test_slots_are_used_in_the_order_in_which_they_came_back_and_then_new_ones():
    bench = Bench(8)
    assert sent(bench, 5) == [0, 1, 2, 3, 4]
    answered(bench, [3, 1])
    answered(bench, [4])
    assert sent(bench, 2) == [3, 1]
    answered(bench, [0, 1])
    assert sent(bench, 5) == [4, 0, 1, 5, 6]


def test_where_none_is_in_flight_it_begins_with_the_first_one():
    bench = Bench(8)
    for _ in range(3):
        heads = sent(bench, 8)
        assert heads == list(range(8))
        answered(bench, heads[::-1])
    for _ in range(10):
        assert sent(bench, 1) == [0]
        answered(bench, [0])


def test_no_more_slots_are_used_than_were_ever_in_flight_at_once():
    bench, chance = Bench(32), random.Random(1)
    flying = sent(bench, 5)
    for _ in range(300):
        chance.shuffle(flying)
        count = chance.randint(1, 4)
        answered(bench, flying[:count])
        flying = flying[count:] + sent(bench, count)
        assert set(flying) == {0, 1, 2, 3, 4}


def test_a_slot_of_a_load_has_the_same_cell_all_the_time():
    bench, chance = Bench(16), random.Random(1)
    load = Load(512, 1 << 20, random=True, requests=500)
    task = loaded(bench, load, 7)
    cells, flying = {}, []
    while bench.queue.run(task, 0, 0) != codes.DONE:
        flying += bench.arrivals()
        for head in flying:
            _, (address, _, _), _ = bench.chain(head)
            assert cells.setdefault(head, address) == address
        chance.shuffle(flying)
        count = chance.randint(1, len(flying))
        for head in flying[:count]:
            bench.answer(head, b"\0")
        flying = flying[count:]
    assert len(cells) == len(set(cells.values())) == 7


def test_a_look_takes_what_was_there_when_it_began():
    bench = Bench(8)
    heads = sent(bench, 4)
    for head in heads[:2]:
        bench.answer(head, b"\0")
    assert bench.queue.ring.ready() == 2
    bench.answer(heads[2], b"\0")
    assert [f.token for f in bench.queue.poll()] == [0, 1]
    assert [f.token for f in bench.queue.poll()] == [2]
    assert bench.queue.ring.ready() == 0
