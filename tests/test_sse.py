"""The parser of event streams gives the same messages however the bytes were cut, and keeps a bound."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pb_cached.errors import PBCachedError
from pb_cached.pocketbase.sse import EventParser, Message, OversizedMessage

STREAM_PARTS = [
    *(b"data", b"event", b"id", b"retry", b":", b" ", b"\n", b"\r", b"\r\n", b"\n\n", b"x", b"\0"),
    *("é".encode(), b"\xef\xbb\xbf", b"\xff", b"data:", b"data: a\n", b"event:e\n", b"data:b\r\rdata: c"),
]

streams = st.lists(st.sampled_from(STREAM_PARTS), max_size=40).map(b"".join)


def parsed(*pieces: bytes, max_bytes: int = 1000) -> list[Message]:
    parser = EventParser(max_bytes)
    return [message for piece in pieces for message in parser.feed(piece)]


def by_the_standard(stream: bytes) -> list[Message]:
    """Its algorithm, to the letter and line by line, for a stream that is there as a whole."""
    lines = re.split(b"\r\n|\r|\n", stream.removeprefix(b"\xef\xbb\xbf"))[:-1]  # the last one has no end
    messages, event, data = [], b"", b""
    for line in lines:
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if line == b"":
            if data != b"":
                name = (event or b"message").decode("utf-8", "replace")
                messages.append(Message(name, data.removesuffix(b"\n")))
            event, data = b"", b""
        elif field == b"event":
            event = value
        elif field == b"data":
            data += value + b"\n"
    return messages


@given(streams)
@example(b"\xef\xbb\xbfdata: a\n\n\xef\xbb\xbfdata: b\n\n")
@example(b"\n\xef\xbb\xbfdata: a\n\n")
@example(b"data: a\r\n\rdata: b\n\r\n\n")
def test_any_stream_is_understood_as_the_standard_says(stream: bytes) -> None:
    assert parsed(stream) == by_the_standard(stream)


@given(streams, st.data())
def test_any_cuts_give_the_same_messages(stream: bytes, draw: st.DataObject) -> None:
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(stream)))))
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert parsed(*pieces) == by_the_standard(stream)


@given(streams)
def test_bytes_one_by_one_give_the_same_messages(stream: bytes) -> None:
    assert parsed(*(bytes([byte]) for byte in stream)) == by_the_standard(stream)


@given(streams, st.integers(1, 30), st.integers(1, 7))
def test_any_cuts_meet_the_bound_at_the_same_message(stream: bytes, max_bytes: int, size: int) -> None:
    def until_the_bound(pieces: list[bytes]) -> tuple[list[Message], bool]:
        parser, messages = EventParser(max_bytes), []
        try:
            for piece in pieces:
                for message in parser.feed(piece):
                    messages.append(message)
        except OversizedMessage:
            return messages, True
        return messages, False

    whole = until_the_bound([stream + b"\n\n"])
    stream += b"\n\n"
    assert until_the_bound([stream[at : at + size] for at in range(0, len(stream), size)]) == whole


def test_what_pocketbase_sends_is_understood() -> None:
    greeting = b'id:Q7\nevent:PB_CONNECT\ndata:{"clientId":"Q7"}\n\n'
    assert parsed(greeting + b'id:Q7\nevent:rt/*\ndata:{"record":{"t":"a: b"}}\n\n') == [
        Message("PB_CONNECT", b'{"clientId":"Q7"}'),
        Message("rt/*", b'{"record":{"t":"a: b"}}'),
    ]


def test_a_message_is_not_given_out_before_it_is_complete() -> None:
    assert parsed(b"event:e\ndata:1\n") == []
    assert parsed(b"event:e\ndata:1\n", b"\n") == [Message("e", b"1")]


def test_a_message_that_never_ends_is_refused_and_not_kept() -> None:
    parser = EventParser(10_000)
    assert list(parser.feed(b"data:1\n\ndata:")) == [Message("message", b"1")]
    with pytest.raises(OversizedMessage, match="more than 10,000 bytes") as refusal:
        for _ in range(100):
            assert list(parser.feed(b"x" * 1_000)) == []
    assert isinstance(refusal.value, PBCachedError)


def test_a_message_may_be_as_large_as_the_bound_and_no_larger() -> None:
    assert parsed(b"data:" + b"x" * 95 + b"\n\n", max_bytes=100) == [Message("message", b"x" * 95)]
    pieces = (b"data:1\n\n", b"\ndata:" + b"x" * 95 + b"\n", b"\n")
    assert parsed(*pieces, max_bytes=100)[1:] == [Message("message", b"x" * 95)]
    with pytest.raises(OversizedMessage):
        parsed(b"data:" + b"x" * 96 + b"\n\n", max_bytes=100)
    with pytest.raises(OversizedMessage):
        parsed(b"data:" + b"x" * 96, b"\n\n", max_bytes=100)


def test_messages_before_one_that_is_too_large_are_given_out() -> None:
    messages = EventParser(20).feed(b"data:1\n\ndata:2\n\ndata:" + b"x" * 50 + b"\n\n")
    assert [next(messages).data, next(messages).data] == [b"1", b"2"]
    with pytest.raises(OversizedMessage):
        next(messages)
