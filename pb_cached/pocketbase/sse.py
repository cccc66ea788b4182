"""Server-sent events out of bytes, however they were cut on their way (the HTML standard, section 9.2.6).

No I/O, and nothing of PocketBase. What a reader of ours has no use for is dropped: comments, `id` and `retry`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from msgspec import Struct

from pb_cached.errors import PBCachedError

MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024
"""Twice what PocketBase takes as a request: text that is quoted into JSON may grow to that."""

_BOM: Final = b"\xef\xbb\xbf"


class Message(Struct, frozen=True):
    event: str
    data: bytes


class OversizedMessage(PBCachedError):
    """A message, or what passes for one, exceeds what is read into memory."""


class EventParser:
    """Parses one stream, from its beginning.

    Mutable state: `_rest`, what has come of the message that is not complete, its line ends all LF; `_after_cr`,
    an LF that comes next belongs to the CR that ended the last piece; `_begun`, no BOM can come any more. It is
    changed before the first message of a piece is given out.
    """

    def __init__(self, max_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._rest = bytearray()
        self._after_cr = False
        self._begun = False

    def feed(self, piece: bytes) -> Iterator[Message]:
        """The messages that are complete with this piece.

        Raises:
            OversizedMessage: the messages before it have been given out. The parser is of no use afterwards.
        """
        blocks = self._blocks(piece)
        for block in blocks:
            if len(block) > self._max_bytes:
                raise self._oversized()
            if (message := _message(block)) is not None:
                yield message
        if len(self._rest) > self._max_bytes + 1:  # its last LF may be the first half of its end
            raise self._oversized()

    def _blocks(self, piece: bytes) -> list[bytes]:
        """What stands between empty lines. A message of megabytes comes in many pieces: each is looked at once."""
        rest = self._rest
        seen = max(len(rest) - 1, 0)
        rest += self._with_lf(piece)
        if not self._begun:
            if len(rest) < len(_BOM) and _BOM.startswith(rest):
                return []
            self._begun, seen = True, 0
            rest[:] = rest.removeprefix(_BOM)
        if rest.startswith(b"\n"):  # then all of it came just now
            rest[:] = rest.lstrip(b"\n")
        end = rest.rfind(b"\n\n", seen)
        if end < 0:
            return []
        blocks = bytes(memoryview(rest)[:end]).split(b"\n\n")
        del rest[: end + 2]
        return [block.strip(b"\n") for block in blocks]

    def _with_lf(self, piece: bytes) -> bytes:
        if self._after_cr and piece:
            piece = piece.removeprefix(b"\n")
            self._after_cr = False
        if b"\r" in piece:
            self._after_cr = piece.endswith(b"\r")
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return piece

    def _oversized(self) -> OversizedMessage:
        return OversizedMessage(f"a message of the event stream has more than {self._max_bytes:,} bytes")


def _message(block: bytes) -> Message | None:
    """None where it holds no data: then nobody is told, whatever else it holds."""
    event, parts = b"", []
    for line in block.split(b"\n"):
        field, _, value = line.partition(b":")
        if field == b"data":
            parts.append(value.removeprefix(b" "))
        elif field == b"event":
            event = value.removeprefix(b" ")
    if not parts:
        return None
    return Message(str(event or b"message", "utf-8", "replace"), b"\n".join(parts))
