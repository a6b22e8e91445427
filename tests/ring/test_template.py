"""Templates: what is refused."""

import pytest

from virtio.ring.codes import OFFSET
from virtio.ring.template import Patch, Template


def test_a_patch_outside_the_header_is_refused():
    with pytest.raises(ValueError, match="outside of 16 bytes"):
        Template(bytes(16), patches=[Patch(OFFSET, 9, 8)])
