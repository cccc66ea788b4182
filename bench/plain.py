"""A plain PocketBase adapter, as one would write it straight away: a request per call, and three for an event."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from bench.samples import event


class PlainSessions:
    """Parlant's stock session store over one request per call: under one lock, an event takes the session, the
    last offset, and the insert."""

    def __init__(self, http: httpx.AsyncClient, sessions: str, events: str) -> None:
        self._http = http
        self._sessions = f"/api/collections/{sessions}/records"
        self._events = f"/api/collections/{events}/records"
        self._lock = asyncio.Lock()

    async def create_session(self, id_: str) -> None:
        (await self._http.post(self._sessions, json={"doc_id": id_})).raise_for_status()

    async def create_event(self, session_id: str) -> None:
        async with self._lock:
            await self._first(self._sessions, f"doc_id='{session_id}'", "id")
            last = await self._first(self._events, f"session_id='{session_id}'", "-offset")
            document: dict[str, Any] = {**event(0), "session_id": session_id}
            document["offset"] = last["offset"] + 1 if last else 0
            (await self._http.post(self._events, json=record(document))).raise_for_status()

    async def _first(self, path: str, filter_: str, sort: str) -> Any:
        params: dict[str, str | int] = {"filter": filter_, "sort": sort, "perPage": 1, "skipTotal": 1}
        found = (await self._http.get(path, params=params)).raise_for_status().json()["items"]
        return found[0] if found else None


def record(document: dict[str, Any]) -> dict[str, Any]:
    """A document as a record with a column for each field."""
    fields = {name: value for name, value in document.items() if name != "id"}
    return {**fields, "doc_id": document["id"], "rev": 1}
