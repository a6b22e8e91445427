"""What a device does once it is reached: virtio-blk and virtio-scsi, and the disks they hold."""
