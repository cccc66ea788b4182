"""The logs as PocketBase has them: read back after a gap, and written to by beats."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final

import msgspec
from msgspec import Struct

from pb_cached.coherence.entries import BEAT, Beat, Entry, Gap
from pb_cached.pocketbase.client import PocketBaseClient
from pb_cached.pocketbase.commit import triggers
from pb_cached.pocketbase.commit.interface import records_path
from pb_cached.pocketbase.sql import MOST_CHARACTERS, Sql, joined

OVERLAP: Final = 10.0
"""Seconds of the log that are read once more. An entry has its time from before its transaction, which may have to
wait for others."""
PAGE: Final = 200
"""Entries read by one request."""
_EDITS: Final = 1000
_TIME: Final = "%Y-%m-%d %H:%M:%S.%fZ"


class _Entries(Struct):
    items: list[Entry]


class Seen(Struct, frozen=True):
    """A collection, as it was seen."""

    identity: str = ""
    """What no other collection has, though it has the same name; empty where there is none."""
    triggers: int = 0
    """How many of ours it has."""


class Sight(Struct, frozen=True):
    """What was seen of a PocketBase beside its logs."""

    edits: Sequence[tuple[str, str]]
    """What foreign hands have changed: collections and records."""
    last_edit: int
    collections: Mapping[str, Seen]
    """Of those that were asked for, those that there are, by name."""


class Logs:
    """Reads and writes them. Holds no state."""

    def __init__(self, client: PocketBaseClient, server: str) -> None:
        self._client = client
        self._server = server
        self._sql = Sql(client)

    def since(self, log: str, newest: str) -> AsyncIterator[Entry]:
        """The commits from a little before that time on."""
        return self._each(log, _earlier(newest), "n > 0")

    def numbered(self, log: str, gap: Gap, began: tuple[str, float]) -> AsyncIterator[Entry]:
        """The commits with these numbers, those that exist, in their order.

        Args:
            began: a time, and how many seconds before it those began that matter. What is older may be left out.
        """
        numbers = f"server = '{gap.server}' && n >= {gap.first} && n <= {gap.last}"
        return self._each(log, _earlier(*began), numbers)

    async def _each(self, log: str, since: str, where: str) -> AsyncIterator[Entry]:
        """In the order of their times, and of nothing else: of that there is an index, and by any other order
        SQLite looks at all of the log. What has the time of a page's last entry may be on the next one too."""
        seen: set[str] = set()
        while True:
            count = PAGE + len(seen)
            entries = await self._page(log, f"created >= '{since}' && {where}", count)
            for entry in entries:
                if entry.id not in seen:
                    yield entry
            if len(entries) < count:
                return
            since = entries[-1].created
            seen = {entry.id for entry in entries if entry.created == since}

    async def _page(self, log: str, where: str, count: int) -> list[Entry]:
        params: dict[str, str | int] = {"filter": where, "sort": "created", "perPage": count, "skipTotal": 1}
        content = await self._client.call("GET", records_path(log), params=params)
        return msgspec.json.decode(content, type=_Entries).items

    async def has(self, log: str, id_: str) -> bool:
        """Is this entry there?"""
        return (await self._client.send("GET", f"{records_path(log)}/{id_}")).ok

    async def beat(self, log: str, id_: str, beat: Beat) -> bool:
        """Tell everybody that we are there, and our last numbers. False where the log took none."""
        content = {
            "id": id_,
            "server": self._server,
            "n": 0,
            "layout": BEAT,
            "guard": id_,
            "payload": msgspec.json.encode(beat).decode(),
        }
        body = msgspec.json.encode(content)
        return (await self._client.send("POST", records_path(log), body=body, repeatable=True)).ok

    async def look(self, names: Sequence[str], after: int | None) -> Sight:
        """See what foreign hands have changed, and which collections there are.

        Args:
            after: the number of the edit that was seen last; None for the first look, which asks where they are.
                Of a database that was restored from a backup the numbers are lower: then it is a first look too.
        """
        edits: list[tuple[str, str]] = []
        found: dict[str, Seen] = {}
        last = 0
        # Its id PocketBase makes of its name, so one that is made anew has the same.
        head = (
            "SELECT name, id || ' ' || created, ifnull(t,0) FROM _collections LEFT JOIN "
            "(SELECT tbl_name, count(*) t "
            f"FROM sqlite_master WHERE type='trigger' AND name GLOB '{triggers.NAMES}*' GROUP BY 1) "
            "ON tbl_name=name WHERE name IN ("
        )
        tail = f") UNION ALL SELECT '', '', seq FROM sqlite_sequence WHERE name='{triggers.EDITS}'"
        for some in joined((f"'{name}'" for name in names), ",", MOST_CHARACTERS - len(head) - len(tail)):
            for name, identity, count in await self._sql.select(head + some + tail):
                if name:
                    found[name] = Seen(identity, int(count))
                else:
                    last = int(count)
        if after is None or last < after:  # of another database, out of a backup, whose edits we do not know
            return Sight(edits, last, found)
        while after < last:
            rows = await self._sql.select(
                f"SELECT n, collection, record FROM {triggers.EDITS} WHERE n>{after} ORDER BY n LIMIT {_EDITS}"
            )
            edits += [(collection, record) for _, collection, record in rows]
            after = int(rows[-1][0]) if rows else last
        return Sight(edits, after, found)

    async def collection_of(self, layout: str) -> str:
        """The collection that commits of this layout are for; empty where that cannot be told."""
        rows = await self._sql.select(
            f"SELECT tbl_name, sql FROM sqlite_master WHERE type='trigger' AND name='{triggers.NAMES}{layout}'"
        )
        if not rows:
            return ""
        table, text = rows[0]
        return triggers.applies_to(triggers.Trigger(f"{triggers.NAMES}{layout}", table, text))


def _earlier(time: str, seconds: float = 0.0) -> str:
    return (datetime.strptime(time, _TIME) - timedelta(seconds=seconds + OVERLAP)).strftime(_TIME)[:-4] + "Z"
