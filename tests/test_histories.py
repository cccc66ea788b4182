"""Thousands of random writes through a network that fails in all ways, to a PocketBase that is killed: what
callers are told is true, and each acknowledged write happened once (design: section 6, rules 1, 2 and 11)."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Literal, TypedDict

import httpx
import pytest
from parlant.core.common import Version
from parlant.core.persistence.common import ObjectId, SortDirection
from parlant.core.persistence.document_database import CollectionIndex, DocumentCollection, identity_loader_for

from pb_cached import Config, PocketBaseDocumentDatabase, PocketBaseServer
from pb_cached.config import CoherenceSettings, PocketBaseSettings, WriteSettings
from pb_cached.errors import (
    OutcomeUnknown,
    PocketBaseUnavailable,
    QueueFull,
    RequestRejected,
    UniqueViolation,
)
from tests.audit import require_whole_commits
from tests.faults import (
    EVERY,
    Exchange,
    Fault,
    FaultProxy,
    again_later,
    answer,
    cut_after,
    cut_before,
    cut_in_request,
    cut_in_response,
    delay,
    lost_by_gateway,
    twice,
)
from tests.history import Call, Effect, delete, find, insert, unexplained, update, upsert

pytestmark = pytest.mark.slow

COLLECTIONS = ("left", "right")
COLUMNS = ("one", "two", "three")
KEYS = 12
"""Documents that there may be in a collection."""
CALLERS = 24
TROUBLES: dict[Fault, float] = {
    cut_before: 3, cut_in_request: 3, cut_after: 4, cut_in_response: 4, lost_by_gateway: 2,
    twice: 4, again_later(0.03): 4, delay(0.02): 4, delay(0.4): 0.3,
    answer(429): 2, answer(500): 1, answer(502): 2,
}  # fmt: skip
"""And how often, in proportion. The longest delay outlasts the patience of the HTTP client."""


class Counted(TypedDict, total=False):
    id: ObjectId
    creation_utc: str
    version: Version.String
    count: int
    one: str
    two: str
    three: str


Notes = DocumentCollection[Counted]


def settings(path: Literal["log", "batch"], mode: Literal["exclusive", "off"]) -> Config:
    """Impatient ones: some outcomes are to stay unknown."""
    return Config(
        pocketbase=PocketBaseSettings(commit=path, request_timeout=0.3, retry_for=1.5),
        writes=WriteSettings(deadline=1.5, close_timeout=20.0),
        coherence=CoherenceSettings(mode=mode),
    )


class Mortal:
    """A PocketBase behind a proxy, which outlives it."""

    def __init__(self, folder: Path, proxy: FaultProxy) -> None:
        self._folder = folder
        self._proxy = proxy
        self._life = AsyncExitStack()
        self.server = PocketBaseServer(folder)

    async def live(self) -> None:
        await self._life.enter_async_context(self.server)
        self._proxy.server = self.server.url

    async def die_and_live(self) -> None:
        os.kill(self.server.pid, signal.SIGKILL)
        await self.end()
        await self.live()

    async def end(self) -> None:
        await self._life.aclose()


@asynccontextmanager
async def mortal_behind_proxy(folder: Path) -> AsyncIterator[tuple[Mortal, FaultProxy]]:
    async with FaultProxy("") as proxy:
        mortal = Mortal(folder, proxy)
        await mortal.live()
        try:
            yield mortal, proxy
        finally:
            await mortal.end()


async def open_all(database: PocketBaseDocumentDatabase) -> dict[str, Notes]:
    loader = identity_loader_for(Counted)
    opened = {name: await database.get_or_create_collection(name, Counted, loader) for name in COLLECTIONS}
    for notes in opened.values():
        await notes.ensure_indexes([CollectionIndex((("id", SortDirection.ASC),), unique=True)])
    return opened


class Histories:
    """What was asked for each document, when, and what was told."""

    def __init__(self) -> None:
        self.calls: defaultdict[tuple[str, str], list[Call]] = defaultdict(list)
        self.outcomes: Counter[str] = Counter()
        self._clock = itertools.count()

    @property
    def now(self) -> int:
        return next(self._clock)

    async def of(self, document: tuple[str, str], what: str, effect: Effect, work: Awaitable[Any]) -> Any:
        call = Call(what, effect, self.now)
        try:
            told = await work
        except UniqueViolation:
            told = "taken"
        except OutcomeUnknown:
            self.outcomes["unknown"] += 1
            self.calls[document].append(call)
            return None
        except (PocketBaseUnavailable, QueueFull, RequestRejected):
            self.outcomes["refused"] += 1
            return None
        call.tell(told, self.now)
        self.outcomes["taken" if told == "taken" else what.split()[0]] += 1
        self.calls[document].append(call)
        return told


class Caller:
    """Does one thing after the other, as its seed has it."""

    def __init__(self, name: str, seed: str, collections: dict[str, Notes], histories: Histories) -> None:
        self._name = name
        self._chance = random.Random(seed)
        self._collections = collections
        self._histories = histories
        self._tokens = (f"{name}-{number}" for number in itertools.count())
        self._does: dict[Callable[[tuple[str, str]], Awaitable[None]], float] = {
            self._insert: 4, self._update: 8, self._count: 3, self._upsert: 3, self._delete: 2, self._find: 1,
        }  # fmt: skip

    async def act(self) -> None:
        (does,) = self._chance.choices(list(self._does), list(self._does.values()))
        key = int(KEYS * self._chance.random() ** 2)  # some are asked for more than others
        await does((self._chance.choice(COLLECTIONS), f"document{key}"))

    def _whole(self, document: tuple[str, str]) -> dict[str, Any]:
        token = next(self._tokens)
        return {
            "id": document[1], "creation_utc": "2026", "version": "1.0.0", "count": 0,
            **dict.fromkeys(COLUMNS, token),
        }  # fmt: skip

    async def _insert(self, document: tuple[str, str]) -> None:
        whole: Any = self._whole(document)

        async def work() -> str:
            await self._collections[document[0]].insert_one(whole)
            return "inserted"

        await self._histories.of(document, f"insert {whole}", insert(whole), work())

    async def _update(self, document: tuple[str, str]) -> None:
        await self._change(document, {self._chance.choice(COLUMNS): next(self._tokens)}, {})

    async def _count(self, document: tuple[str, str]) -> None:
        """No two may count from the same number."""
        found = await self._find(document)
        if found:
            await self._change(document, {"count": found["count"] + 1}, {"count": found["count"]})

    async def _change(self, document: tuple[str, str], params: Any, where: dict[str, Any]) -> None:
        async def work() -> Any:
            conditions: Any = {"id": {"$eq": document[1]}, **{name: {"$eq": v} for name, v in where.items()}}
            result = await self._collections[document[0]].update_one(conditions, params)
            assert result.matched_count == (result.updated_document is not None)
            return result.updated_document

        await self._histories.of(document, f"update {params} where {where}", update(params, where), work())

    async def _upsert(self, document: tuple[str, str]) -> None:
        whole: Any = self._whole(document)

        async def work() -> Any:
            conditions: Any = {"id": {"$eq": document[1]}}
            return (
                await self._collections[document[0]].update_one(conditions, whole, upsert=True)
            ).updated_document

        await self._histories.of(document, f"upsert {whole}", upsert(whole), work())

    async def _delete(self, document: tuple[str, str]) -> None:
        async def work() -> Any:
            result = await self._collections[document[0]].delete_one({"id": {"$eq": document[1]}})
            assert result.deleted_count == (result.deleted_document is not None)
            return result.deleted_document

        await self._histories.of(document, "delete", delete, work())

    async def _find(self, document: tuple[str, str]) -> Any:
        work = self._collections[document[0]].find_one({"id": {"$eq": document[1]}})
        return await self._histories.of(document, "find", find, work)


async def run(folder: Path, config: Config, seed: int, calls: int, deaths: int) -> None:
    """Fails, with the seed and the history, where no order of the calls explains what callers were told."""
    chance = random.Random(seed)
    troubles = list(TROUBLES)

    async def bad_weather(exchange: Exchange) -> None:
        (trouble,) = chance.choices(troubles, list(TROUBLES.values()))
        await (trouble if chance.random() < 0.25 else Exchange.forward)(exchange)

    async with mortal_behind_proxy(folder) as (mortal, proxy):
        params = {**mortal.server.connection_params, "url": proxy.url}
        histories = Histories()
        begun = itertools.count(1)
        deadly = {calls * number // (deaths + 1) for number in range(1, deaths + 1)}

        async def work(caller: Caller) -> None:
            while (number := next(begun)) <= calls:
                if number in deadly:
                    await mortal.die_and_live()
                await caller.act()

        async with PocketBaseDocumentDatabase(None, params, collection_prefix="t", config=config) as database:
            collections = await open_all(database)
            for method in ("GET", "POST"):
                proxy.plan(method, "/api/", bad_weather, at=EVERY)
            callers = [Caller(f"{n}", f"{seed}-{n}", collections, histories) for n in range(CALLERS)]
            await asyncio.gather(*map(work, callers))
            proxy.forget_plans()
            await asyncio.gather(*(exchange.finished.wait() for exchange in proxy.exchanges))
            seen = {name: (await notes.find({})).items for name, notes in collections.items()}
        async with (
            httpx.AsyncClient(
                base_url=mortal.server.url,
                headers={"Authorization": mortal.server.connection_params["admin_token"]},
            ) as http,
            PocketBaseDocumentDatabase(None, params, collection_prefix="t", config=config) as database,
        ):
            found = {name: (await notes.find({})).items for name, notes in (await open_all(database)).items()}
            if database.stats().writes.path == "log":
                await require_whole_commits(http, "t")
    assert seen == found, f"seed {seed}: what was open and what is there differ"
    for (name, id_), history in histories.calls.items():
        last = [document for document in found[name] if document["id"] == id_]
        assert len(last) <= 1, f"seed {seed}: {name}/{id_} is there twice"
        final = Call("at last", find, histories.now)
        final.tell(last[0] if last else None, histories.now)
        if left := unexplained([*history, final]):
            told = "\n".join(map(str, [*sorted(history, key=lambda call: call.began), "left:", *left]))
            pytest.fail(f"seed {seed}: {name}/{id_} cannot be explained by\n{told}")
    assert sum(histories.outcomes.values()) >= calls
    print(seed, dict(histories.outcomes))


@pytest.mark.parametrize(("path", "mode"), [("log", "exclusive"), ("batch", "off")])
async def test_what_callers_are_told_is_true_whatever_becomes_of_their_requests(
    folder: Path, path: Literal["log", "batch"], mode: Literal["exclusive", "off"]
) -> None:
    await run(folder, settings(path, mode), seed=1, calls=500, deaths=1)


@pytest.mark.soak
@pytest.mark.parametrize("seed", [2])
@pytest.mark.parametrize(("path", "mode"), [("log", "off"), ("batch", "exclusive")])
async def test_what_callers_are_told_is_true_all_day_long(
    folder: Path, path: Literal["log", "batch"], mode: Literal["exclusive", "off"], seed: int
) -> None:
    await run(folder, settings(path, mode), seed, calls=1000, deaths=2)
