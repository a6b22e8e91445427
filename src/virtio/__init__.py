"""Drivers for virtio block storage in user space: wire formats, rings, transports, devices.

The parts are `virtio.wire`, `virtio.ring`, `virtio.transport`, `virtio.device` and, for the other
side of the wire, `virtio.target`. Importing this package imports none of them. Block devices with
names, and the program, are in `virtio_bdev`.
"""
