"""The configuration file: what is taken from it, and what is said of a bad one."""

import functools
import inspect
import json
from dataclasses import FrozenInstanceError, fields

import pytest
from hypothesis import example, given, strategies as st

import virtio_bdev
from tests.transport.fake_bus import FakeBus
from virtio.target import serve
from virtio.transport import sysfs
from virtio_bdev.config import OPTIONS, BdevSpec, ConfigError, load


@pytest.fixture
def parse(tmp_path):
    """Load a text or bytes; errors have the path taken out."""
    path = tmp_path / "bdev.conf"

    def parse(text):
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        try:
            return load(str(path))
        except ConfigError as error:
            assert str(error).startswith(f"{path}:") and "\n" not in str(error)
            raise ConfigError(str(error).removeprefix(f"{path}:").strip()) from error

    return parse


def specs(config):
    return [line.spec for line in config.lines]


def test_a_spec_has_what_attach_takes_with_the_same_defaults():
    """But for the depth, which is not of the disk but of those who use it."""
    parameters = dict(inspect.signature(virtio_bdev.attach).parameters)
    assert parameters.pop("depth").default is None
    assert [each.name for each in fields(BdevSpec)] == list(parameters)
    spec = BdevSpec(address="user:x")
    assert all(p.default in (p.empty, getattr(spec, name)) for name, p in parameters.items())
    with pytest.raises(FrozenInstanceError):
        spec.queues = 2


def test_a_spec_attaches():
    with serve("blk", ram="1M") as target:
        spec = BdevSpec(address=target.address, dev_type="blk", name="Fast0", queues=2, queue_size=16)
        with spec.attach() as controller:
            assert list(controller) == ["Fast0"]
            assert (len(controller.device.leases), controller.device.queue_size) == (2, 16)
        with BdevSpec(address=target.address, dev_type="blk").attach(depth=5) as controller:
            assert controller.device.queue_size == 8


def test_the_file_of_the_original_module_is_read_as_it_stands(parse):
    assert specs(parse("[Virtio]\nDev User /tmp/vhost.0\n")) == [BdevSpec(address="user:/tmp/vhost.0")]


def test_more_words_name_the_device_its_type_and_its_queues(parse):
    text = """
# comments, blank lines, tabs, the spelling of keywords and sections that are not ours
[Global]
  Comment "what others write [here] is theirs"
[virtio]
\tdev USER /run/blk.0 blk name=Fast0 queues=4   # the fast one
Dev User "/run/with space#1" timeout=.5 at_least=1 queue_size=128 dev_type=scsi\r
Dev User /run/a#b
Dev pci 00:1F.0 name=Slow0 queues=1
[Nvme]
Dev User /not/ours
[Virtio]
Dev User relative"-"path
"""
    config = parse(text)
    assert specs(config) == [
        BdevSpec(address="user:/run/blk.0", dev_type="blk", name="Fast0", queues=4),
        BdevSpec(address="user:/run/with space#1", dev_type="scsi", timeout=0.5, at_least=1, queue_size=128),
        BdevSpec(address="user:/run/a#b"),
        BdevSpec(address="pci:0000:00:1f.0", name="Slow0", queues=1),
        BdevSpec(address="user:relative-path"),
    ]
    assert [line.where.rpartition(":")[2] for line in config.lines] == ["6", "7", "8", "9", "13"]
    assert config.ignored == ["[Global]", "[Nvme]"]


@pytest.mark.parametrize(
    "line, words",
    [
        ("Dev", "2: want User PATH or Pci after Dev"),
        ("Dev Usr /x", "2: 'Usr': want User PATH or Pci after Dev"),
        ("Dev User", "2: want the path of a vhost-user socket after Dev User"),
        ('Dev User ""', "2: want the path of a vhost-user socket after Dev User"),
        ("Device User /x", "2: 'Device': want Dev User PATH"),
        ("Dev User /x blq", "2: 'blq': want scsi, blk, or one of dev_type=, name=, queues=, "),
        ("Dev User /x queue=4", "2: 'queue=4': want scsi, blk, or one of "),
        ("Dev User /x name", "2: 'name': want scsi, blk, or one of "),
        ("Dev User /x dev_type=disk", "2: 'dev_type=disk': want scsi or blk"),
        ("Dev User /x blk scsi", "2: 'scsi': want dev_type only once"),
        ("Dev User /x queues=2 queues=3", "2: 'queues=3': want queues only once"),
        ("Dev User /x queues=0", "2: 'queues=0': want a number from 1 to 99999"),
        ("Dev User /x queues=four", "2: 'queues=four': want a number from 1 to 99999"),
        ("Dev User /x queues=\u0664", "2: 'queues=\u0664': want a number from 1 to 99999"),
        ("Dev User /x queues=100000", "2: 'queues=100000': want a number from 1 to 99999"),
        ("Dev User /x queue_size=100", "2: 'queue_size=100': want a power of two from 2 to 32768"),
        ("Dev User /x queue_size=65536", "2: 'queue_size=65536': want a power of two from 2 to 32768"),
        ("Dev User /x timeout=0", "2: 'timeout=0': want a number of seconds above 0"),
        ("Dev User /x timeout=nan", "2: 'timeout=nan': want a number of seconds above 0"),
        ("Dev User /x timeout=1e9", "2: 'timeout=1e9': want a number of seconds above 0"),
        ("Dev User /x name=", "2: 'name=': want 1 to 64 letters, digits or any of _.+:@-"),
        ("Dev User /x name=a/b", "2: 'name=a/b': want 1 to 64 letters"),
        ("Dev User /x name=" + 65 * "a", "want 1 to 64 letters"),
        ('Dev User "/x', "2: '\"/x': want a closing \""),
        ("[Virtio", "2: '[Virtio': want a section such as [Virtio]"),
        ("[ ]", "2: '[ ]': want a section such as [Virtio]"),
        ("Dev User /x\0y", "2: '\\x00': want printable text"),
        ("Dev User /x\x1b[2J", "2: '\\x1b': want printable text"),
        ("Dev User /" + 5000 * "x", "2: want at most 4096 bytes in a line, not 5010"),
        (b"Dev User /\xff", "2: b'\\xff': want UTF-8"),
        ("Dev Pci name=x", "2: 'name=x': want the address of one device after Dev Pci, if it has a name"),
        ("Dev Pci\nDev Pci blk", "3: 'Pci': want Dev Pci for all devices only once: it is in line 2 already"),
        ("Dev Pci 00:04.0\nDev Pci 0000:00:04.0", "3: '0000:00:04.0': want each only once: it is in line 2"),
        ("Dev Pci 00:24.0", "2: '00:24.0': want a PCI address such as 0000:00:04.0"),
        ("Dev Pci 00:04.0 queues=x", "2: 'queues=x': want a number from 1 to 99999"),
        ("Dev User /a\nDev User /a blk", "3: '/a': want each only once: it is in line 2 already"),
        ("Dev User /a name=x\nDev User /b name=x", "3: 'name=x': want each only once: it is in line 2"),
        ("", "no device, want a [Virtio] section with Dev lines"),
        ("[Virtoi]\nDev User /x", "no device, want a [Virtio] section with Dev lines; it has [Virtoi]"),
    ],
)
def test_a_bad_line_is_named_with_the_word_and_what_was_expected(parse, line, words):
    head = b"[Virtio]\n"
    with pytest.raises(ConfigError) as caught:
        parse(head + (line if isinstance(line, bytes) else line.encode()))
    assert words in str(caught.value)
    assert len(str(caught.value)) < 300


def test_dev_pci_alone_is_all_devices_that_are_left_to_programs(parse, monkeypatch, tmp_path):
    bus = FakeBus(tmp_path)
    bus.add("0000:00:05.0", 0x1042, "vfio-pci", group=3)
    bus.add("0000:00:04.0", 0x1048, "uio_pci_generic")
    bus.add("0000:00:06.0", 0x1001, "vfio-pci", group=4)
    bus.add("0000:00:07.0", 0x1042, "virtio-pci", group=5)
    bus.add("0000:00:08.0", 0x1041, "vfio-pci", group=6)  # a network device
    monkeypatch.setattr(sysfs, "functions", functools.partial(sysfs.functions, bus.root))
    text = "[Virtio]\nDev Pci queues=2\nDev User /x\nDev Pci 00:06.0 name=Own"
    config = parse(text)
    assert specs(config) == [
        BdevSpec(address="pci:0000:00:04.0", queues=2),
        BdevSpec(address="pci:0000:00:05.0", queues=2),
        BdevSpec(address="user:/x"),
        BdevSpec(address="pci:0000:00:06.0", name="Own"),
    ]
    assert [line.where.rpartition(":")[2] for line in config.lines] == ["2", "2", "3", "4"]
    assert [spec.address for spec in specs(parse("[Virtio]\nDev Pci scsi"))] == ["pci:0000:00:04.0"]
    monkeypatch.setattr(sysfs, "functions", list)
    with pytest.raises(ConfigError, match="2: 'Pci': want a virtio device that is bound to vfio-pci or"):
        parse("[Virtio]\nDev Pci")
    assert len(specs(parse("[Virtio]\nDev Pci\nDev User /x"))) == 1


def test_a_line_before_any_section_is_refused(parse):
    with pytest.raises(ConfigError, match="1: 'Dev': want a section first, such as"):
        parse("Dev User /x\n[Virtio]\n")


def test_a_rate_limit_below_0_in_spdks_form_is_refused(parse):
    call = {"method": "bdev_set_qos_limit", "params": {"name": "Fast0", "rw_ios_per_sec": -5}}
    with pytest.raises(ConfigError, match="^bdev_set_qos_limit: rw_ios_per_sec -5, want a number from 0 to "):
        parse(json.dumps({"subsystems": [{"subsystem": "bdev", "config": [call]}]}))


def test_a_file_of_another_kind_is_not_read_to_its_end():
    with pytest.raises(ConfigError, match="/dev/zero: more than 1048576 bytes"):
        load("/dev/zero")


def test_what_every_option_gives_as_an_example_is_in_the_help(parse):
    assert list(OPTIONS) == [each.name for each in fields(BdevSpec)][1:]


@given(st.binary(max_size=200) | st.text(alphabet='Dev User[]Virtio#"=\n\t /.:blkqs04', max_size=200))
@example(b"[Virtio]\nDev User /x name=y\n")
def test_anything_else_is_a_config_error_and_nothing_else(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.conf"
    path.write_bytes(b"[Virtio]\n" + (text.encode() if isinstance(text, str) else text))
    try:
        assert load(str(path)).lines
    except ConfigError:
        pass
