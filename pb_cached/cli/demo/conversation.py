"""The customer's side, over Parlant's HTTP API; and everything that is stored, to be compared."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import httpx

from pb_cached.cli.demo.records import RECORDS, records
from pb_cached.cli.demo.terms import AGENT, TAG, VARIABLE

TURN_SECONDS: Final = 30.0
SETTLE_SECONDS: Final = 0.1

MESSAGES: Final = (
    "I lost my umbrella on the 8:15 to Lindau.",
    "It is green, with a wooden handle.",
    "The name \u201eIda\u201c is carved into it; 9007199254740993 times, it seems.",
    "Did somebody find it?",
)

Snapshot = dict[str, dict[str, Any]]
"""By kind ("sessions", "events", ...), then by name, what is stored."""


class Conversation:
    """One session, and how to go on with it."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._session = ""
        self._next = 0
        self.first_message = MESSAGES[0]

    @classmethod
    @asynccontextmanager
    async def begin(cls, url: str) -> AsyncIterator[Conversation]:
        async with _http(url) as http:
            yield cls(http)

    @asynccontextmanager
    async def resumed(self, url: str) -> AsyncIterator[Conversation]:
        """The same session on a server that knows nothing but what is stored."""
        async with _http(url) as http:
            conversation = Conversation(http)
            conversation._session, conversation._next = self._session, self._next
            yield conversation

    async def prepare(self) -> None:
        """A customer with a tag, a value of the variable for that customer and one for all, and a session."""
        agent = _named(await self._get("/agents"), AGENT)
        tag = _named(await self._get("/tags"), TAG)
        variable = _named(await self._get("/context-variables"), VARIABLE)
        customer = await self._send(
            "POST", "/customers", {"name": "Ida", "metadata": {"city": "Lindau"}, "tags": [tag["id"]]}
        )
        values = f"/context-variables/{variable['id']}"
        await self._send(
            "PUT", f"{values}/{customer['id']}", {"data": {"seat": 61, "price": 19.0, "big": 2**53 + 1}}
        )
        await self._send("PUT", f"{values}/DEFAULT", {"data": "none"})
        session = await self._send(
            "POST",
            "/sessions",
            {"agent_id": agent["id"], "customer_id": customer["id"], "title": "A lost umbrella"},
        )
        self._session = session["id"]
        await self._send(
            "PATCH",
            f"/sessions/{self._session}",
            {"metadata": {"set": {"channel": "web"}}, "labels": {"upsert": ["lost", "train"]}},
        )

    async def turn(self, number: int) -> tuple[str, str]:
        """Say something, and return it with the reply, when the agent has finished its turn.

        A `completed` before the reply is the end of the turn before, whose last steps this message may cut short.
        """
        said = MESSAGES[(number - 1) % len(MESSAGES)]
        event = await self._send(
            "POST",
            f"/sessions/{self._session}/events",
            {"kind": "message", "source": "customer", "message": said},
        )
        reply = ""
        end = time.monotonic() + TURN_SECONDS
        after = event["offset"] + 1
        while time.monotonic() < end:
            for found in await self._events(min_offset=after, wait_for_data=5):
                after = found["offset"] + 1
                if found["kind"] == "message" and found["source"] == "ai_agent":
                    reply = found["data"]["message"]
                if reply and _completes_a_turn(found):
                    return said, reply
        raise TimeoutError(f"the agent did not finish its turn within {TURN_SECONDS:g} s")

    async def offsets(self) -> list[int]:
        return [event["offset"] for event in await self._events()]

    async def settled(self, pocketbase: Mapping[str, str]) -> Snapshot:
        """The snapshot once it stays the same: the agent writes down its state after its turn is completed."""
        end = time.monotonic() + TURN_SECONDS
        last = await self.snapshot(pocketbase)
        while time.monotonic() < end:
            await asyncio.sleep(SETTLE_SECONDS)
            now = await self.snapshot(pocketbase)
            if now == last:
                return now
            last = now
        raise TimeoutError(f"what is stored went on changing for {TURN_SECONDS:g} s after the last turn")

    async def snapshot(self, pocketbase: Mapping[str, str]) -> Snapshot:
        """Everything that is stored, as the API tells it, and as PocketBase has it, record by record."""
        stored: Snapshot = {
            "sessions": _by_id(await self._get("/sessions")),
            "events": {f"offset {e['offset']}": e for e in await self._events()},
            "customers": _by_id(await self._get("/customers")),
            "variables": {},
            "values": {},
        }
        stored["customers"].pop("guest", None)  # made up by Parlant at each call
        for session in stored["sessions"].values():
            session["labels"].sort()  # a set to Parlant, whose order changes with each process
        stored["tags of customers"] = {id_: c.get("tags") for id_, c in stored["customers"].items()}
        for variable in await self._get("/context-variables"):
            whole = await self._get(f"/context-variables/{variable['id']}", include_values="true")
            stored["variables"][variable["id"]] = whole["context_variable"]
            stored["values"] |= {f"{variable['name']} of {key}": v for key, v in whole["key_value_pairs"].items()}
        stored[RECORDS] = await records(pocketbase)
        return stored

    async def _events(self, **params: Any) -> list[Any]:
        answer = await self._http.get(f"/sessions/{self._session}/events", params={"wait_for_data": 0, **params})
        if answer.status_code == httpx.codes.GATEWAY_TIMEOUT:  # nothing new yet
            return []
        return list(answer.raise_for_status().json())

    async def _get(self, path: str, **params: Any) -> Any:
        return (await self._http.get(path, params=params)).raise_for_status().json()

    async def _send(self, method: str, path: str, body: Any) -> Any:
        answer = await self._http.request(method, path, json=body)
        return answer.raise_for_status().json()


def differences(before: Snapshot, after: Snapshot) -> list[str]:
    """Whatever is not the same, one line each."""
    found = []
    for kind in before.keys() | after.keys():
        one, other = before.get(kind, {}), after.get(kind, {})
        for name in one.keys() | other.keys():
            if name not in other:
                found.append(f"{kind}: {name} is gone")
            elif name not in one:
                found.append(f"{kind}: {name} is new: {other[name]!r}")
            elif one[name] != other[name] or repr(one[name]) != repr(other[name]):
                found.append(f"{kind}: {name} was {one[name]!r}, is {other[name]!r}")
    return sorted(found)


@asynccontextmanager
async def _http(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=TURN_SECONDS, trust_env=False) as http:
        yield http


def _completes_a_turn(event: Mapping[str, Any]) -> bool:
    return event["kind"] == "status" and (event["data"].get("data") or {}).get("stage") == "completed"


def _named(items: list[Any], name: str) -> Any:
    return next(item for item in items if item["name"] == name)


def _by_id(items: Any) -> dict[str, Any]:
    listed = items if isinstance(items, list) else items["items"]
    return {item["id"]: item for item in listed}
