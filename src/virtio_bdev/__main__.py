"""`python -m virtio_bdev`."""

from virtio_bdev.cli import main

main()
