"""What `doctor` finds out about a machine: on folders that look like one, and on this one."""

import contextlib
import os
import resource
import socket
import threading

import pytest

from tests.transport.fake_bus import FakeBus
from virtio.target import serve
from virtio_bdev import doctor
from virtio_bdev.doctor import examine


def found(root, *addresses):
    return {finding.subject: finding for finding in examine(addresses, root)}


@pytest.fixture
def machine(tmp_path):
    """One with everything, and a device ready to attach."""
    bus = FakeBus(tmp_path)
    bus.add("0000:00:04.0", 0x1042, "vfio-pci", group=3)
    (bus.root / "drivers/uio_pci_generic").mkdir()
    pages = tmp_path / "sys/kernel/mm/hugepages/hugepages-2048kB"
    pages.mkdir(parents=True)
    (pages / "nr_hugepages").write_text("64\n")
    (pages / "free_hugepages").write_text("60\n")
    (tmp_path / "dev/vfio").mkdir(parents=True)
    for name in ("vfio", "3"):
        (tmp_path / "dev/vfio" / name).touch()
    return tmp_path


def test_a_machine_with_everything_is_all_right(machine):
    states = {subject: finding.state for subject, finding in found(machine).items()}
    assert set(states.values()) == {"ok"}
    assert list(states)[-1] == "pci:0000:00:04.0"


def test_a_bare_machine_is_told_what_helps(tmp_path):
    FakeBus(tmp_path)
    now = found(tmp_path)
    assert now["IOMMU"].state == "no" and "intel_iommu=on" in now["IOMMU"].mend
    assert now["vfio-pci"].state == "no" and os.uname().release in now["vfio-pci"].words
    assert now["huge pages"].state == "could"
    assert now["PCI devices"].state == "could"


def test_a_module_that_is_not_loaded_is(machine):
    (machine / "sys/bus/pci/drivers/uio_pci_generic").rmdir()
    modules = machine / "lib/modules" / os.uname().release
    modules.mkdir(parents=True)
    (modules / "modules.dep").write_text(
        "kernel/drivers/uio/uio_pci_generic.ko.xz: kernel/drivers/uio/uio.ko.xz\n"
    )
    assert found(machine)["uio_pci_generic"][1:] == (
        "could",
        "is not loaded",
        "modprobe uio_pci_generic   (as root)",
    )


def test_few_huge_pages_are_told_with_how_many_there_should_be(machine):
    (machine / "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").write_text("3\n")
    finding = found(machine)["huge pages"]
    assert finding.state == "could" and finding.mend.startswith("sysctl vm.nr_hugepages=125")
    assert "takes up to 32 of them, and ordinary pages where there are none" in finding.words


def test_a_small_memlock_limit_is_told(machine, monkeypatch):
    monkeypatch.setattr(doctor, "may_lock", lambda: False)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1 << 20, 1 << 20))
    finding = found(machine)["ulimit -l"]
    assert (
        finding.state == "no" and "a PCI device needs 6144" in finding.words and "ulimit -l" in finding.mend
    )


def test_a_device_that_could_be_bound_or_is_missing(machine):
    bus = FakeBus.__new__(FakeBus)
    bus.root = machine / "sys/bus/pci"
    bus.add("0000:00:05.0", 0x1048, "virtio-pci", group=4)
    bus.add("0000:00:06.0", 0x1048)
    now = found(machine, "pci:0000:00:05.0", "pci:0000:00:09.0", "pci:0000:00:06.0")
    assert now["pci:0000:00:05.0"].mend == "virtio-bdev pci bind 0000:00:05.0"
    assert now["pci:0000:00:06.0"].mend == "virtio-bdev pci bind 0000:00:06.0 --driver uio_pci_generic"
    assert now["pci:0000:00:09.0"].state == "no"
    assert "pci:0000:00:04.0" not in now


@pytest.mark.parametrize("kind", ["blk", "scsi"])
def test_a_back_end_is_told_with_its_kind(tmp_path, kind):
    with serve(kind, ram="1M") as target:
        finding = found(tmp_path, target.address)[target.address]
    assert finding.state == "ok" and f"virtio-{kind} by what it offers" in finding.words


@pytest.mark.parametrize(
    "answer, words",
    [
        (b'{"jsonrpc": "2.0"}', "GET_FEATURES badly"),
        (b"", "closed the conn"),
        (None, "did not answer GET_FEATURES"),
    ],
)
def test_a_socket_of_something_else_cannot_be_attached(tmp_path, monkeypatch, answer, words):
    monkeypatch.setattr(doctor, "_ANSWER_S", 0.1 if answer is None else 10.0)
    path = tmp_path / "other"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def reply():
            with listener.accept()[0] as connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=(lambda: None) if answer is None else reply)
        thread.start()
        finding = found(tmp_path, f"user:{path}")[f"user:{path}"]
        thread.join()
    assert finding.state == "no" and finding.words.startswith("does not answer as a vhost-user back end: ")
    assert words in finding.words


def test_a_socket_that_takes_no_more_connections(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_ANSWER_S", 0.1)
    path = str(tmp_path / "full")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                waiting.connect(path)
        finding = found(tmp_path, f"user:{path}")[f"user:{path}"]
    assert finding[1:3] == ("no", "takes no connection")


def test_sockets(tmp_path):
    dead = tmp_path / "dead"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(dead))
    plain = tmp_path / "plain"
    plain.touch()
    for path, words in ((dead, "refused"), (plain, "is no socket"), (tmp_path / "none", "No such file")):
        finding = found(tmp_path, f"user:{path}")[f"user:{path}"]
        assert finding.state == "no" and words in finding.words


def test_this_machine_is_looked_at_without_harm():
    assert {finding.subject for finding in examine()} >= {"huge pages", "ulimit -l", "IOMMU", "vfio-pci"}
