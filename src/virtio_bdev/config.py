"""What to attach: one `BdevSpec` for the command line, the configuration file and programs.

The file is that of the original module: a section `[Virtio]` with lines `Dev User PATH` and
`Dev Pci`, for all PCI devices, or one. More words on a line name the controller and its type, and
set the fields of `BdevSpec`. A file that begins with `{` is of the other form, see `saved`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, NoReturn, get_args

from virtio.errors import RequestError
from virtio.transport import sysfs
from virtio_bdev.qos import RateLimits
from virtio_bdev.registry import Controller, DevType, Rings, attach

DEV_TYPES: tuple[str, ...] = get_args(DevType)

_MAX_FILE = 1 << 20  # bytes: ten thousand devices and their comments
_MAX_LINE = 4096
_WORD = re.compile(r'(?:[^\s"]|"[^"]*")+|"')


class ConfigError(RequestError):
    """A configuration file, or a line of it, cannot be used; says which, and what was expected."""


def _dev_type(text: str) -> str:
    if text not in DEV_TYPES:
        raise ValueError
    return text


def _rings(text: str) -> str:
    if text not in get_args(Rings):
        raise ValueError
    return text


def _name(text: str) -> str:
    if not re.fullmatch(r"[\w.+:@-]{1,64}", text, re.ASCII):
        raise ValueError
    return text


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,4}", text):
        raise ValueError
    return int(text)


def _power_of_two(text: str) -> int:
    size = _count(text)
    if size & (size - 1) or not 2 <= size <= 32768:
        raise ValueError
    return size


def _seconds_or_none(text: str) -> float:
    if not re.fullmatch(r"[0-9]{0,6}\.?[0-9]{1,9}", text):
        raise ValueError
    return float(text)


def _seconds(text: str) -> float:
    seconds = _seconds_or_none(text)
    if not seconds:
        raise ValueError
    return seconds


class Option(NamedTuple):
    """How people write a field of `BdevSpec`: `parse` raises ValueError for what is not `want`."""

    words: str  # what it means
    want: str
    metavar: str
    parse: Callable[[str], Any]


def _option(default: Any, words: str, want: str, metavar: str, parse: Callable[[str], Any]) -> Any:
    return field(default=default, metadata={"option": Option(words, want, metavar, parse)})


@dataclass(frozen=True, slots=True, kw_only=True)
class BdevSpec:
    """What `virtio_bdev.attach` takes."""

    address: str
    dev_type: DevType | None = _option(
        None,
        "Kind of device: of a socket scsi unless given; a PCI device says it.",
        "scsi or blk",
        "TYPE",
        _dev_type,
    )
    name: str | None = _option(
        None,
        "Name of the controller, and the beginning of its disks' names; VirtioScsi0, VirtioBlk0 and "
        "so on unless given.",
        "1 to 64 letters, digits or any of _.+:@-",
        "NAME",
        _name,
    )
    queues: int | None = _option(
        None,
        "Request queues; as many as the process has cores, up to what the device has, unless given.",
        "a number from 1 to 99999",
        "N",
        _count,
    )
    at_least: int | None = _option(
        None,
        "Be content with so many request queues where the device has fewer.",
        "a number from 1 to 99999",
        "N",
        _count,
    )
    queue_size: int | None = _option(
        None,
        "Descriptors of a queue; 256 unless given, or 128 where that is refused.",
        "a power of two from 2 to 32768",
        "N",
        _power_of_two,
    )
    timeout: float = _option(
        5.0, "Seconds to wait for any answer.", "a number of seconds above 0", "SECONDS", _seconds
    )
    reconnect: float = _option(
        0.0,
        "Seconds to try to connect again to a back end that has ended; what was under way is sent again.",
        "a number of seconds, 0 for not at all",
        "SECONDS",
        _seconds_or_none,
    )

    rings: Rings = _option(
        "any",
        "Layout of the virtqueues: packed where that is offered (any), or split.",
        "any or split",
        "LAYOUT",
        _rings,
    )

    def arguments(self) -> dict[str, Any]:
        """The arguments of `attach`."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def attach(self, depth: int | None = None) -> Controller:
        """Attach it, for so many requests at once if given; raises what `virtio_bdev.attach` raises."""
        return attach(**self.arguments(), depth=depth)


OPTIONS: dict[str, Option] = {
    each.name: each.metadata["option"] for each in fields(BdevSpec) if "option" in each.metadata
}
"""The fields of a `BdevSpec` beside its address, in order."""


def registered(**values: Any) -> BdevSpec:
    """A BdevSpec of values that a program sent; ConfigError for what no person could have written."""
    for name, value in values.items():
        if name in OPTIONS and value is not None:
            try:
                OPTIONS[name].parse(f"{value:f}" if isinstance(value, float) else str(value))
            except ValueError:
                raise ConfigError(f"{name} {value!r}: want {OPTIONS[name].want}") from None
    return BdevSpec(**values)


class Line(NamedTuple):
    """A device that a configuration file asks for, and where: for errors to say."""

    where: str
    spec: BdevSpec


class Config(NamedTuple):
    """A configuration file: its devices, and the names of the sections or calls that are not for us."""

    path: str
    lines: list[Line]
    ignored: list[str]
    limits: Mapping[str, RateLimits] = {}  # by disk


def load(path: str) -> Config:
    """Read a configuration file; ConfigError names the line that cannot be, OSError the file."""
    with open(path, "rb") as file:
        data = file.read(_MAX_FILE + 1)
    if len(data) > _MAX_FILE:
        raise ConfigError(f"{path}: more than {_MAX_FILE} bytes, want a configuration file")
    if data.lstrip()[:1] == b"{":
        from virtio_bdev import saved  # which needs a library that the other form does not

        return saved.read(path, data)
    return _Parser(path).parse(data)


class _Parser:
    """Reads one file; knows where it is, for errors to say."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._number = 0
        self._lines: list[Line] = []
        self._names: dict[str, int] = {}  # line numbers
        self._addresses: dict[str, int] = {}
        self._all: tuple[int, int, dict[str, Any]] | None = None  # `Dev Pci` alone: line, place, options

    def parse(self, data: bytes) -> Config:
        section = None
        sections: dict[str, None] = {}  # in order
        for raw in data.split(b"\n"):
            self._number += 1
            words = self._words(raw)
            if not words:
                continue
            if words[0].startswith("["):
                section = self._section(" ".join(words))
                sections[section] = None
            elif section is None:
                self._fail(words[0], "a section first, such as [Virtio]")
            elif _same(section, "Virtio"):
                self._entry(words)
        self._expand()
        ignored = [f"[{name}]" for name in sections if not _same(name, "Virtio")]
        if not self._lines:
            found = f"; it has {', '.join(ignored)}" if ignored else ""
            raise ConfigError(f"{self._path}: no device, want a [Virtio] section with Dev lines{found}")
        return Config(self._path, self._lines, ignored)

    def _words(self, raw: bytes) -> list[str]:
        if len(raw) > _MAX_LINE:
            self._fail(None, f"at most {_MAX_LINE} bytes in a line, not {len(raw)}")
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            self._fail(raw[error.start : error.start + 1], "UTF-8")
        if bad := next((c for c in text if not c.isprintable() and c not in "\t\r"), None):
            self._fail(bad, "printable text")
        words: list[str] = []
        for match in _WORD.finditer(text):
            if match[0].startswith("#"):
                break
            if match[0] == '"':
                self._fail(text[match.start() :].strip(), 'a closing "')
            words.append(match[0].replace('"', ""))
        return words

    def _section(self, text: str) -> str:
        if not text.endswith("]") or not text[1:-1].strip():
            self._fail(text, "a section such as [Virtio]")
        return text[1:-1].strip()

    def _entry(self, words: list[str]) -> None:
        if not _same(words[0], "Dev"):
            self._fail(words[0], "Dev User PATH")
        kind = words[1] if len(words) > 1 else ""
        if _same(kind, "Pci"):
            self._pci(words[2:])
            return
        if not _same(kind, "User"):
            self._fail(kind or None, "User PATH or Pci after Dev")
        if len(words) < 3 or not words[2]:
            self._fail(None, "the path of a vhost-user socket after Dev User")
        self._add(f"user:{words[2]}", words[2], self._options(words[3:]))

    def _pci(self, words: list[str]) -> None:
        """`Dev Pci ADDRESS`, one device; `Dev Pci` alone, all that are ours to take and in no other line."""
        if words and "=" not in words[0] and words[0] not in DEV_TYPES:
            if not sysfs.ADDRESS.fullmatch(words[0]):
                self._fail(words[0], "a PCI address such as 0000:00:04.0")
            self._add(f"pci:{sysfs.normal(words[0])}", words[0], self._options(words[1:]))
            return
        values = self._options(words)
        if "name" in values:
            self._fail(f"name={values['name']}", "the address of one device after Dev Pci, if it has a name")
        if self._all is not None:
            self._fail("Pci", f"Dev Pci for all devices only once: it is in line {self._all[0]} already")
        self._all = self._number, len(self._lines), values

    def _expand(self) -> None:
        """Put the devices that `Dev Pci` alone stands for where it was."""
        if self._all is None:
            return
        number, at, values = self._all
        found = [
            BdevSpec(address=f"pci:{function.address}", **values)
            for function in sysfs.functions()
            if function.driver in sysfs.USER_DRIVERS
            and f"pci:{function.address}" not in self._addresses
            and values.get("dev_type") in (None, function.kind)
        ]
        if not found and not self._lines:
            self._number = number
            self._fail(
                "Pci",
                "a virtio device that is bound to vfio-pci or uio_pci_generic, and there is none: see "
                "`virtio-bdev pci list`",
            )
        self._lines[at:at] = [Line(f"{self._path}:{number}", spec) for spec in found]

    def _add(self, address: str, word: str, values: dict[str, Any]) -> None:
        spec = BdevSpec(address=address, **values)
        self._once(spec.address, self._addresses, word)
        if spec.name is not None:
            self._once(spec.name, self._names, f"name={spec.name}")
        self._lines.append(Line(f"{self._path}:{self._number}", spec))

    def _options(self, words: list[str]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for word in words:
            name, equals, text = word.partition("=")
            if not equals and word in DEV_TYPES:
                name, text = "dev_type", word
            if name not in OPTIONS or not (equals or name == "dev_type"):
                self._fail(word, f"scsi, blk, or one of {', '.join(f'{name}=' for name in OPTIONS)}")
            if name in values:
                self._fail(word, f"{name} only once")
            try:
                values[name] = OPTIONS[name].parse(text)
            except ValueError:
                self._fail(word, OPTIONS[name].want)
        return values

    def _once(self, value: str, seen: dict[str, int], word: str) -> None:
        if value in seen:
            self._fail(word, f"each only once: it is in line {seen[value]} already")
        seen[value] = self._number

    def _fail(self, word: object, want: str) -> NoReturn:
        found = "" if word is None else f"{word!r}: "
        raise ConfigError(f"{self._path}:{self._number}: {found}want {want}")


def _same(word: str, keyword: str) -> bool:
    return word.lower() == keyword.lower()


def options_table() -> str:
    """The options of a Dev line, as a Markdown table for docs/config.md."""
    rows = ["| word | what it is | what may be written |", "| --- | --- | --- |"]
    for name, option in OPTIONS.items():
        words = option.words.removesuffix(".")
        rows.append(f"| `{name}={option.metavar}` | {words} | {option.want} |")
    return "\n".join(rows) + "\n"
