"""What stands in a log: commits, and beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

BEAT: Final = "beat"
"""The `layout` of a record that commits nothing: by it a server tells that it is there, and its last numbers."""


class Entry(Struct, frozen=True):
    """A record of a log."""

    id: str
    server: str = ""
    n: int = 0
    """The number of the commit, in the server's row of them; 0 where the record is none."""
    layout: str = ""
    payload: str = ""
    created: str = ""
    """By PocketBase's clock."""


class Payload(Struct, frozen=True):
    """What a commit has changed: see `CommitLayout`."""

    c: Sequence[Sequence[Any]] = ()
    u: Sequence[Sequence[Any]] = ()
    d: Sequence[Sequence[Any]] = ()


class Beat(Struct, frozen=True):
    """What a beat says."""

    last: Mapping[str, Sequence[int]] = {}
    """By the logs of its database: for each lane, the last number that the server has taken by it."""
    after: Mapping[str, Sequence[str]] = {}
    """Likewise: a time by PocketBase's clock, before which no later number can have been taken."""


class Gap(Struct, frozen=True):
    """Numbers of a server that have not come: from the first to the last."""

    server: str
    first: int
    last: int


class Message(Struct, frozen=True):
    """What the realtime stream brings."""

    action: str
    record: msgspec.Raw = msgspec.Raw(b"{}")


message: Final = msgspec.json.Decoder(Message)
entry: Final = msgspec.json.Decoder(Entry)
payload: Final = msgspec.json.Decoder(Payload)
beat: Final = msgspec.json.Decoder(Beat)
