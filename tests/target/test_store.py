"""Disks in memory and files, and how they are named."""

import errno
import json
import os

import pytest

from virtio.errors import RequestError
from virtio.target.store import (
    Faults,
    FaultyStore,
    FileStore,
    MemoryStore,
    adopt,
    describe,
    parse_disk,
    parse_size,
)

MIB = 1 << 20


def views(*sizes: int) -> list[memoryview]:
    return [memoryview(bytearray(size)) for size in sizes]


@pytest.fixture(params=["ram", "file"])
def store(request, tmp_path):
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    opened = parse_disk("ram:1M" if request.param == "ram" else f"file:{tmp_path}/disk")
    yield opened
    opened.close()


def test_buffers_follow_each_other(store):
    store.write(100, [memoryview(b"abc"), memoryview(b"defg")])
    into = views(2, 4, 3)
    store.read(99, into)
    assert [bytes(view) for view in into] == [b"\0a", b"bcde", b"fg\0"]
    store.flush()


def test_more_buffers_than_one_system_call_takes(store):
    data = os.urandom(3000)
    store.write(512, [memoryview(data)[at : at + 1] for at in range(3000)])
    into = views(*[1] * 3000)
    store.read(512, into)
    assert b"".join(into) == data


@pytest.mark.parametrize("unmap", [False, True])
def test_zeroed_ranges_begin_and_end_at_any_byte(store, unmap):
    store.write(0, [memoryview(b"x" * (1 << 20))])
    store.zero(5000, 100_000, unmap=unmap)
    store.zero(0, 0, unmap=unmap)
    into = views(4999, 1, 100_000, 1)
    store.read(0, into)
    assert [set(view) for view in into] == [{120}, {120}, {0}, {120}]


def test_files_end_where_they_end(tmp_path):
    (tmp_path / "disk").write_bytes(bytes(1024))
    store = FileStore(str(tmp_path / "disk"))
    with pytest.raises(OSError, match="short read") as caught:
        store.read(512, views(1024))
    assert caught.value.errno == errno.EIO
    store.close()


def test_a_read_only_file_is_opened_so(tmp_path):
    (tmp_path / "disk").write_bytes(bytes(512))
    (tmp_path / "disk").chmod(0o400)
    store = parse_disk(f"file:{tmp_path}/disk,ro")
    assert store.read_only
    with pytest.raises(OSError):
        store.write(0, [memoryview(b"x")])
    store.close()


def test_serial_numbers_tell_disks_apart_and_files_keep_theirs(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(512))
    paths = [f"file:{tmp_path}/a", f"file:{tmp_path}/b", f"file:{tmp_path}/../{tmp_path.name}/a"]
    a, b, again = (parse_disk(path).serial for path in paths)
    assert a == again != b
    assert parse_disk("ram:1M").serial != parse_disk("ram:1M").serial
    assert parse_disk("ram:1M,id=mine").serial == "mine"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512", 512),
        ("4k", 4096),
        ("4K", 4096),
        ("64M", 64 << 20),
        ("1GiB", 1 << 30),
        ("2T", 2 << 40),
        ("8B", 8),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("64M", "want ram:SIZE or file:PATH"),
        ("ram:", "want ram:SIZE or file:PATH"),
        ("disk:x", "want ram:SIZE or file:PATH"),
        ("ram:lots", "want a number"),
        ("ram:-1", "want a number"),
        ("ram:0", "want a multiple of 512"),
        ("ram:8388608T", "want a multiple of 512"),  # 2**63
        ("ram:1000", "1000 bytes, want a multiple of 512"),
        ("ram:1M,bs=513", "block size 513, want 512"),
        ("ram:1537k,bs=4k", "want a multiple of 4096"),
        ("ram:1M,rw", "option 'rw'"),
        ("ram:1M,delay=x", "option 'delay=x'"),
        ("ram:1M,id=" + "x" * 21, "want 1 to 20 ASCII"),
        ("file:/dev/null", "neither a regular file nor a block device"),
    ],
)
def test_a_disk_that_cannot_be_says_what_was_expected(spec, complaint):
    with pytest.raises(RequestError, match=complaint):
        parse_disk(spec)


def test_options_of_a_disk():
    store = parse_disk("ram:1M,ro,bs=4096")
    assert (store.size, store.block_size, store.read_only) == (1 << 20, 4096, True)


def test_a_faulty_disk_fails_where_it_is_told_to():
    store = parse_disk("ram:1M,fail-read=4k,fail-write=0,fail-zero=512,fail-flush,delay=0.001")
    store.read(0, views(4096))
    with pytest.raises(OSError, match="read told to fail at 4096"):
        store.read(4095, views(2))
    with pytest.raises(OSError, match="write told to fail at 0"):
        store.write(0, views(1))
    with pytest.raises(OSError, match="zero told to fail at 512"):
        store.zero(0, 1024, unmap=True)
    with pytest.raises(OSError, match="flush told to fail"):
        store.flush()


@pytest.mark.parametrize("kind", ["ram", "file", "faulty"])
def test_a_disk_grows_with_zeros_and_shrinks_and_forgets(tmp_path, kind):
    (tmp_path / "disk").write_bytes(bytes(MIB))
    store = parse_disk(
        {"ram": "ram:1M", "file": f"file:{tmp_path}/disk", "faulty": "ram:1M,fail-flush"}[kind]
    )
    store.write(MIB - 512, [memoryview(b"end!" * 128)])
    store.resize(2 * MIB)
    assert store.size == 2 * MIB
    into = views(1024)
    store.read(MIB - 512, into)
    assert into[0] == b"end!" * 128 + bytes(512)
    store.write(2 * MIB - 512, [memoryview(b"x" * 512)])
    store.resize(512)
    assert store.size == 512
    store.resize(MIB)
    store.read(MIB - 1024, into)
    assert into[0] == bytes(1024)
    store.close()


def test_memory_that_was_given_back_is_not_touched():
    store = parse_disk("ram:1M")
    store.resize(4096)
    child = os.fork()
    if not child:  # whom SIGBUS kills if it is
        try:
            store.read(8192, views(512))
        except ValueError:
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    store.close()


def test_a_disk_is_not_resized_to_what_it_cannot_be(tmp_path):
    (tmp_path / "disk").write_bytes(bytes(MIB))
    for spec, size, complaint in (
        ("ram:1M", 1000, "want a multiple of 512"),
        ("ram:1M", 0, "want a multiple of 512"),
        (f"file:{tmp_path}/disk,ro", 512, "read-only keeps its size"),
    ):
        store = parse_disk(spec)
        with pytest.raises(RequestError, match=complaint):
            store.resize(size)
        assert store.size == MIB
        store.close()
    assert (tmp_path / "disk").stat().st_size == MIB


def test_another_process_adopts_the_same_disk(tmp_path):
    (tmp_path / "disk").write_bytes(bytes(MIB))
    for spec in ("ram:1M,id=one", f"file:{tmp_path}/disk,bs=4096", "ram:1M,ro,fail-read=0"):
        store = parse_disk(spec)
        fd, description = describe(store)
        twin = adopt(os.dup(fd), json.loads(json.dumps(description)))
        for name in ("size", "block_size", "read_only", "serial"):
            assert getattr(twin, name) == getattr(store, name)
        if "fail" in spec:
            with pytest.raises(OSError, match="read told to fail at 0"):
                twin.read(0, views(1))
        else:
            store.write(512, [memoryview(b"seen")])
            into = views(4)
            twin.read(512, into)
            assert into[0] == b"seen"
        twin.close()
        store.close()


def test_each_so_many_th_command_of_data_fails():
    faults = Faults(every=3)
    store = FaultyStore(MemoryStore(MIB), faults)
    failed = []
    for number in range(1, 8):
        faults.begin()
        try:
            store.read(0, views(1))
            store.write(0, views(1))
        except OSError:
            failed.append(number)
    assert failed == [3, 6]
