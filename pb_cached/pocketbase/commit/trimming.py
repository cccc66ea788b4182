"""Forgetting old commits, step by step: each step is one short transaction, as PocketBase has one writer at a
time.

What a log's record says is forgotten in two stages. Beyond so many bytes it loses its content, the oldest first;
it is still the receipt by which a commit is not made twice, and its number is still there. So no server that was
away takes the log for whole: it finds a commit that cannot be read any more, and drops what it has cached. When
it is old enough, the record goes.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Final

from pb_cached.pocketbase.sql import Sql

SHORT: Final = 0.05
"""Seconds that a step may take. Records are of any size, up to several megabytes, so only the clock tells."""
FIRST: Final = 16
MOST: Final = 200
"""Records of a step: at first, and at most, as their ids must fit into a call."""


class Step:
    """How many records the next step may be about: half as many where one has taken too long, twice as many where
    it was far from that.

    Mutable state: `records`.
    """

    def __init__(self) -> None:
        self.records = FIRST

    def took(self, seconds: float) -> None:
        if seconds > SHORT:
            self.records = max(1, self.records // 2)
        elif seconds < SHORT / 4:
            self.records = min(MOST, 2 * self.records)


async def delete(sql: Sql, table: str, condition: str, key: str = "id") -> AsyncGenerator[None]:
    """Delete the rows of which that holds, in the order of their keys."""
    step = Step()
    while True:
        begun, records = time.monotonic(), step.records
        deleted = await sql.count(
            f"DELETE FROM `{table}` WHERE {key} IN "
            f"(SELECT {key} FROM `{table}` WHERE {condition} ORDER BY {key} LIMIT {records})"
        )
        step.took(time.monotonic() - begun)
        if deleted < records:
            return
        yield


async def empty(sql: Sql, log: str, most_bytes: int) -> AsyncGenerator[None]:
    """Take its content from every commit but the newest ones, which hold so many bytes together.

    It is looked for them without a transaction, so that nobody waits for that (0.1 s for 400,000 commits).
    """
    held = f"SELECT id, sum(octet_length(payload)) OVER (ORDER BY id DESC) held FROM `{log}` WHERE n>0"
    ((last,),) = await sql.select(f"SELECT max(id) FROM ({held}) WHERE held>{most_bytes}")
    step, after = Step(), ""
    while last:
        rows = await sql.select(
            f"SELECT id FROM `{log}` WHERE id>'{after}' AND id<='{last}' AND n>0 AND payload<>'' "
            f"AND guard<>'' ORDER BY id LIMIT {step.records}"
        )
        if not rows:
            return
        listed = ",".join(f"'{id_}'" for (id_,) in rows)
        begun = time.monotonic()
        await sql.change(f"UPDATE `{log}` SET payload='' WHERE guard<>'' AND id IN ({listed})")
        step.took(time.monotonic() - begun)
        after = rows[-1][0]
        yield
