"""`python -m virtio.target`: see `virtio.target.server.main`."""

from virtio.target.server import main

main()
