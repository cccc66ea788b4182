"""PocketBase's SQL endpoint (0.39 and later, superusers only)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import msgspec
from msgspec import Struct

from pb_cached.pocketbase.client import Answer, PocketBaseClient

MOST_CHARACTERS: Final = 4900
"""Of one call; PocketBase allows 5000."""


class _Result(Struct, rename="camel"):
    rows: list[list[str | None]] = []
    affected_rows: int = 0


class Sql:
    """Queries and statements, as many of these in one call, and so in one transaction, as fit into it."""

    def __init__(self, client: PocketBaseClient) -> None:
        self._client = client

    async def select(self, query: str) -> list[list[str]]:
        """The rows, every value as text; None as an empty one.

        Raises:
            RequestRejected: PocketBase does not let us, or the query is wrong.
        """
        content = await self._client.call("POST", "/api/sql", body=_body(query), repeatable=True)
        return [[value or "" for value in row] for row in msgspec.json.decode(content, type=_Result).rows]

    async def count(self, statement: str) -> int:
        """Run one statement, and tell how many rows it has changed or deleted.

        Raises:
            RequestRejected: PocketBase does not let us, or the statement is wrong.
        """
        content = await self._client.call("POST", "/api/sql", body=_body(statement), repeatable=True)
        return msgspec.json.decode(content, type=_Result).affected_rows

    async def run(self, statements: Sequence[str]) -> Answer:
        """Run statements in their order. The last answer: that of the first call which was refused, if any was."""
        answer = Answer(200, b"")
        for call in joined(statements, ";", MOST_CHARACTERS):
            answer = await self._client.send("POST", "/api/sql", body=_body(call), repeatable=True)
            if not answer.ok:
                break
        return answer

    async def change(self, *statements: str) -> None:
        """`run`, but only success returns.

        Raises:
            RequestRejected: PocketBase does not let us, or a statement is wrong.
        """
        answer = await self.run(statements)
        if not answer.ok:
            raise await self._client.rejection(answer, "SQL")


def joined(parts: Iterable[str], separator: str, most: int) -> Iterator[str]:
    """The parts in their order, as many together as fit into that many characters; a longer one stands alone."""
    together = ""
    for part in parts:
        if together and len(together) + len(separator) + len(part) > most:
            yield together
            together = ""
        together = f"{together}{separator}{part}" if together else part
    if together:
        yield together


def _body(query: str) -> bytes:
    return msgspec.json.encode({"query": query})
