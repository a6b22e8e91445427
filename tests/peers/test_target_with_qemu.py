"""QEMU as the front end, its firmware as the driver: a guest boots from our target, reads and writes it."""

import subprocess

import pytest

import virtio.target
from tests.needs import program

QEMU = program("qemu-system-x86_64")

SECTORS = 64
BOOT_SECTOR = bytes.fromhex(
    "31c0"  # 7c00   xor  ax, ax
    "8ed8"  # 7c02   mov  ds, ax
    "be407c"  # 7c04   mov  si, 7c40      the packet below; dl is the disk that we came from
    "b442"  # 7c07   mov  ah, 42
    "cd13"  # 7c09   int  13            read
    "7214"  # 7c0b   jc   7c21
    "c606487c80"  # 7c0d   mov  byte [7c48], 128
    "be407c"  # 7c12   mov  si, 7c40
    "b80043"  # 7c15   mov  ax, 4300
    "cd13"  # 7c18   int  13            write
    "7205"  # 7c1a   jc   7c21
    "b010"  # 7c1c   mov  al, 10
    "e6f4"  # 7c1e   out  f4, al        QEMU exits with status 2 * 16 + 1
    "90"  # 7c20   nop
    "b011"  # 7c21   mov  al, 11
    "e6f4"  # 7c23   out  f4, al
).ljust(0x40, b"\0") + bytes.fromhex(
    "10 00 4000 0000 0010 4000000000000000"  # its size, 64 sectors, to 1000:0000, from sector 64
)  # fmt: skip


def boot_disk() -> bytes:
    """The boot sector, what it copies, and where it copies that to."""
    disk = bytearray(1 << 20)
    disk[:512] = BOOT_SECTOR.ljust(510, b"\0") + b"\x55\xaa"
    disk[64 * 512 : 128 * 512] = bytes(number * 7 % 251 for number in range(SECTORS * 512))
    return bytes(disk)


@pytest.mark.parametrize("queue_size", [64, 128, 1024])
@pytest.mark.parametrize("device", ["vhost-user-blk-pci", "vhost-user-scsi-pci"])
def test_a_guest_boots_reads_and_writes(tmp_path, device, queue_size):
    (tmp_path / "disk").write_bytes(boot_disk())
    size = f"queue-size={queue_size}" if "blk" in device else f"virtqueue_size={queue_size}"
    dev_type = "blk" if "blk" in device else "scsi"
    with virtio.target.serve(dev_type, f"file:{tmp_path}/disk") as target:
        for _ in range(2):  # one front end after another
            ended = subprocess.run(
                [QEMU, "-machine", "q35,memory-backend=memory", "-accel", "tcg", "-m", "64M"]
                + ["-nodefaults", "-display", "none", "-no-reboot"]
                + ["-object", "memory-backend-memfd,id=memory,size=64M,share=on"]
                + ["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
                + ["-chardev", f"socket,id=target,path={target.path}"]
                + ["-device", f"{device},chardev=target,bootindex=0,{size}"],
                timeout=60,
            )
            assert ended.returncode == 33
    disk = (tmp_path / "disk").read_bytes()
    assert disk[128 * 512 : 192 * 512] == boot_disk()[64 * 512 : 128 * 512]
    assert disk[: 128 * 512] + disk[192 * 512 :] == boot_disk()[: 128 * 512] + boot_disk()[192 * 512 :]
