"""What both interfaces of a virtio PCI device have in common: memory, interrupts, status, and the end.

Registers are accessed by one thread at a time, the control thread's look at status and interrupt
registers excepted.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

from virtio import control
from virtio.errors import ProtocolError, RequestTimeout, TransportError, VirtioError
from virtio.ring.lease import Life
from virtio.ring.region import Mapping, Region
from virtio.transport.windows import Line, Windows
from virtio.wire.pci import Function
from virtio.wire.virtio import ConfigField, Status

log = logging.getLogger("virtio.pci")

GONE = 0xFF  # what every register of a device reads that is not there any more
MOST_READS = 100  # of a configuration that changes while it is read
_PATIENCE_S = 0.0005  # between two looks at a register that is waited for
_LOOK_S = 0.25  # between two looks at whether the device is there, and as it was
_MOST_QUEUES = 256  # that ask for an interrupt vector of their own
_QUEUE_INTERRUPT, _CONFIG_INTERRUPT = 1, 2  # of the ISR status (4.1.4.5)


class PciBase(ABC):
    """A virtio PCI device; owns its windows, and eventfds of its own.

    A queue has an interrupt vector to itself where there are enough, else it shares vector 0 with
    the configuration, or all share INTx where there is no MSI-X. Where there is no interrupt, or the
    device refuses, its completion descriptor is always readable: who would sleep on it spins.
    """

    allowed: int
    required: int
    has_config: bool
    has_isr: bool  # a register that says why INTx is up, and lowers it
    legacy: bool
    max_queues: int | None

    def __init__(self, windows: Windows, timeout: float) -> None:
        """Find the registers of the device; each wait is bounded by `timeout` seconds.

        TransportError or ProtocolError if it is no device for us; the windows are closed then.
        """
        self.address = f"pci:{windows.name}"
        self.windows = windows
        self.timeout = timeout
        self.life = Life(self.address)
        self.on_config_change: Callable[[], None] = lambda: None
        self.resets = True
        self._pid = os.getpid()
        self._closed = False
        self._gone = False
        self._status = Status(0)
        self._mappings: dict[int, Mapping] = {}  # by the region's address
        self._vectors: Sequence[int] | None = None  # eventfds; None until the first queue
        self._line: Line | None = None
        self._completions: dict[int, int] = {}  # by queue: its eventfd, where it is not a vector's
        self._sharers: list[int] = []  # of those, the ones that a shared interrupt is passed on to
        self._watch: control.Timer | None = None
        self._watching_removal = False
        try:
            function = read_function(windows)
            if function.device_type is None:
                raise TransportError(
                    errno.ENODEV,
                    f"{self.address} is {function.vendor:04x}:{function.device:04x}, no virtio device",
                )
            self.device_type = function.device_type
            self._table = function.msix.vectors if function.msix else 0
            self._find(function)
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _find(self, function: Function) -> None:
        """Find the registers; sets the attributes declared here."""

    @abstractmethod
    def _read_status(self) -> int: ...

    @abstractmethod
    def _write_status(self, status: int) -> None: ...

    @abstractmethod
    def _read_isr(self) -> int:
        """The ISR status, which reading clears; where there is one."""

    @abstractmethod
    def _config_changed(self) -> bool:
        """Whether the configuration may be another one than was read."""

    @abstractmethod
    def _name_vector(self, vector: int, *, of_queue: bool) -> bool:
        """Whether the device takes a vector for the queue that is selected, or for its configuration."""

    @abstractmethod
    def read_config(self, nbytes: int, fields: Sequence[ConfigField]) -> bytes:
        """The first `nbytes` of the configuration space, with these fields read, all of one moment.

        TransportError if there is none; ProtocolError if it is shorter, or never holds still.
        """

    # Status (3.1.1).

    def reset(self) -> None:
        """Status 0, and wait until it reads so: until then the device may be using memory (4.1.4.3.2)."""
        self.set_status(Status(0))
        self._wait(lambda: self.status() == 0, "read status 0 after a reset")

    def status(self) -> Status:
        """The device status field; TransportError(ENODEV) if there is no device any more."""
        value = self._read_status()
        if value == GONE:
            self._gone = True
            error = TransportError(errno.ENODEV, f"{self.address} is gone: its status reads ff")
            self.life.end(error)
            raise error
        return Status(value)

    def set_status(self, status: Status) -> None:
        """Write the device status field."""
        self._status &= status  # what has to be there, for who looks meanwhile
        self._write_status(status)
        self._status = status

    # Memory.

    def region(self, nbytes: int) -> Region:
        """Memory that the device can reach once it is mapped."""
        return self.windows.region(nbytes)

    def map(self, region: Region) -> Mapping:
        """Let the device reach a region, until the windows are closed."""
        mapping = self._mappings[region.address] = self.windows.map(region)
        return mapping

    def _iova(self, region: Region, offset: int, nbytes: int) -> int:
        """Where the device finds bytes of a region, which must be in one piece for it."""
        mapping = self._mappings[region.address]
        first, last = offset >> mapping.shift, offset + nbytes - 1 >> mapping.shift
        step = 1 << mapping.shift
        for page in range(first, last):
            if mapping.table[page + 1] != mapping.table[page] + step:
                raise TransportError(errno.ENOMEM, f"a ring of {nbytes} bytes is in pieces for the device")
        return mapping.table[first] + (offset & (step - 1))

    # The device's life.

    def start(self) -> None:
        """DRIVER_OK: from now on the device looks at its queues, and we look after it.

        Its removal raises no interrupt, and a change of its configuration none where it has none.
        """
        if self._vectors:
            self._name_vector(0, of_queue=False)
        self.set_status(self._status | Status.DRIVER_OK)
        self._watch = control.Timer(_LOOK_S, self._look)
        if self.windows.removal is not None and not self._watching_removal:
            self._watching_removal = True
            control.watch(self.windows.removal, select.EPOLLIN, self._wanted_back)

    def stop(self) -> None:
        """Reset the device: afterwards it uses no memory."""
        self._cancel_watch()
        self.reset()

    def renew(self) -> None:
        """The same: a reset device is as new."""
        self.stop()

    def close(self) -> None:
        """Reset the device if that can still be done, and let go of everything; idempotent."""
        if self._closed:
            return
        self._closed = True
        if os.getpid() == self._pid:
            self._cancel_watch()
            if self._vectors:
                control.unwatch(self._vectors[0])
            if self._line is not None:
                control.unwatch(self._line.fd)
            if self._watching_removal and self.windows.removal is not None:
                control.unwatch(self.windows.removal)
            if self._status and not self._gone:
                with contextlib.suppress(VirtioError):
                    self.stop()
        self.life.close()
        self.windows.close()
        for fd in self._completions.values():
            os.close(fd)
        self._completions, self._sharers = {}, []

    def _look(self) -> None:
        """Whether it is still there, and as it was."""
        try:
            self._look_at_config()
        except VirtioError as error:
            self._cancel_watch()
            self.life.end(error)

    def _wanted_back(self, events: int) -> None:
        """The kernel waits until the controller is closed, so its owner is told."""
        assert self.windows.removal is not None
        control.unwatch(self.windows.removal)
        self._watching_removal = False
        words = f"the kernel wants {self.address} back: it is being removed, or given to another driver"
        self.life.end(TransportError(errno.ENODEV, words))

    def _cancel_watch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    # Interrupts.

    def _interrupt(self, index: int) -> tuple[int, bool]:
        """Choose an interrupt for the queue that is selected: the descriptor of its completions, and
        whether it says nothing."""
        vectors = self._open_vectors()
        own = 1 + index
        if own < len(vectors) and self._name_vector(own, of_queue=True):
            return vectors[own], False
        if vectors:
            shared = self._name_vector(0, of_queue=True)
        else:
            shared = self._line is not None
        if index not in self._completions:
            self._completions[index] = _eventfd() if shared else _always_readable()
            how = "shares an interrupt" if shared else "is polled"
            log.debug("%s: queue %d %s", self.address, index, how)
        if shared and self._completions[index] not in self._sharers:
            self._sharers.append(self._completions[index])
        return self._completions[index], not shared

    def _open_vectors(self) -> Sequence[int]:
        if self._vectors is None:
            queues = _MOST_QUEUES if self.max_queues is None else min(self.max_queues, _MOST_QUEUES)
            useful = min(1 + queues, self._table)
            self._vectors = self.windows.interrupts(useful)[:useful] if useful else ()
            if self._vectors:
                control.watch(self._vectors[0], select.EPOLLIN, self._interrupted)
            elif self.has_isr and (line := self.windows.line()) is not None:
                self._line = line
                control.watch(line.fd, select.EPOLLIN, self._line_is_up)
        return self._vectors

    def _interrupted(self, events: int) -> None:
        """Vector 0: maybe the configuration, maybe queues (4.1.5.4)."""
        assert self._vectors
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._vectors[0])
        self._pass_on()
        with self._complaining():
            self._look_at_config()

    def _line_is_up(self, events: int) -> None:
        """INTx: the ISR status says why, or that it was somebody else's (4.1.4.5, 4.1.5.4)."""
        assert self._line is not None
        with self._complaining():
            reasons = self._read_isr()
            if reasons & _QUEUE_INTERRUPT:
                self._pass_on()
            if reasons & _CONFIG_INTERRUPT:
                self._look_at_config()
        if self._gone:
            control.unwatch(self._line.fd)  # nobody is there who would lower it
        else:
            with self._complaining():
                self._line.rearm()

    def _pass_on(self) -> None:
        for fd in self._sharers:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(fd, 1)

    def _look_at_config(self) -> None:
        status = self.status()
        if self._status & Status.DRIVER_OK and not status & Status.DRIVER_OK:
            words = f"{self.address} is gone, or was reset by somebody else: its status reads {status:02x}"
            self.life.end(TransportError(errno.ENODEV, words))
        elif status & Status.DEVICE_NEEDS_RESET:
            self.life.end(TransportError(errno.EIO, f"{self.address} has failed, and needs a reset"))
        elif self._config_changed():
            self.on_config_change()

    @contextlib.contextmanager
    def _complaining(self) -> Iterator[None]:
        try:
            yield
        except VirtioError as error:
            log.warning("%s", error)

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self.timeout
        while not done():
            if time.monotonic() > deadline:
                raise RequestTimeout(f"{self.address} did not {what} in {self.timeout:g} s")
            time.sleep(_PATIENCE_S)


def read_function(windows: Windows) -> Function:
    """What the configuration space says; ProtocolError if nobody is there, or it is a bridge."""
    words = (windows.read_config(offset, 4) for offset in range(0, 256, 4))
    return Function.decode(b"".join(word.to_bytes(4, "little") for word in words))


def read_fields(nbytes: int, fields: Sequence[ConfigField], read: Callable[[int, int], int]) -> bytes:
    """A configuration space of so many bytes, in which these fields were read (2.5, 4.1.3.1)."""
    space = bytearray(nbytes)
    for offset, width in fields:
        for at in range(offset, offset + width, 4):
            part = min(4, offset + width - at)
            space[at : at + part] = read(at, part).to_bytes(part, "little")
    return bytes(space)


def never_still(address: str) -> ProtocolError:
    """The error of a configuration that changes each time that it is read."""
    return ProtocolError(f"{address} changed its configuration {MOST_READS} times while it was read")


def _eventfd(flags: int = 0) -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK | flags)


def _always_readable() -> int:
    """An eventfd with more in it than is ever taken out: who waits for it does not wait."""
    fd = _eventfd(os.EFD_SEMAPHORE)
    os.eventfd_write(fd, 1 << 63)
    return fd
