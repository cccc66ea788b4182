"""PocketBase's SQL endpoint (0.39 and later, superusers only)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import msgspec
from msgspec import Struct

from pb_cached.pocketbase.client import Answer, PocketBaseClient

MOST_CHARACTERS: Final = 4900
"""Of one call; PocketBase allows 5000."""


class _Result(Struct):
    rows: list[list[str | None]] = []


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

    async def run(self, statements: Sequence[str]) -> Answer:
        """Run statements in their order. The last answer: that of the first call which was refused, if any was."""
        answer = Answer(200, b"")
        for call in _calls(statements):
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


def _calls(statements: Sequence[str]) -> Iterator[str]:
    call = ""
    for statement in statements:
        if call and len(call) + len(statement) + 1 > MOST_CHARACTERS:
            yield call
            call = ""
        call = f"{call};{statement}" if call else statement
    if call:
        yield call


def _body(query: str) -> bytes:
    return msgspec.json.encode({"query": query})
