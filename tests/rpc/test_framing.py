"""Where messages end."""

import json

import pytest
from hypothesis import given, strategies as st

from virtio_bdev.rpc.framing import MAX_BYTES, Frames, FramingError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(
    st.lists(st.lists(values) | st.dictionaries(st.text(), values)),
    st.sampled_from(["", "\n", " \r\n\t"]),
    st.integers(1, 9),
    st.sampled_from([None, 2]),
)
def test_messages_come_out_as_they_went_in_however_they_are_cut(messages, between, step, indent):
    stream = between.join(json.dumps(one, indent=indent) for one in messages).encode() + b" "
    frames, found = Frames(), []
    for at in range(0, len(stream), step):
        found += frames.feed(stream[at : at + step])
    assert [json.loads(one) for one in found] == messages


@given(st.binary())
def test_any_bytes_are_messages_or_an_error(data):
    frames = Frames()
    try:
        for found in frames.feed(data):
            assert found[:1] in (b"{", b"[")
    except FramingError:
        pass


@pytest.mark.parametrize(
    "data, words",
    [
        (b"x", "want an object"),
        (b'{}"', "want an object"),
        (b"[" * 65, "more than 64"),
        (b'{"' + b"a" * MAX_BYTES, "more than 1048576 bytes"),
    ],
)
def test_what_can_be_no_message_is_refused(data, words):
    with pytest.raises(FramingError, match=words):
        Frames().feed(data)
