"""Any mix of good and bad writes in one commit: the good ones are committed, and each caller of a bad one gets the
answer to its own (design: section 6, rule 11)."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Literal, TypedDict

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from parlant.core.common import Version
from parlant.core.persistence.common import ObjectId, SortDirection
from parlant.core.persistence.document_database import CollectionIndex, DocumentCollection, identity_loader_for

from pb_cached import Config, PocketBaseDocumentDatabase, PocketBaseServer
from pb_cached.config import CoherenceSettings, PocketBaseSettings, WriteSettings
from pb_cached.errors import CollectionNotFound, DocumentTooLarge, SchemaError, UniqueViolation
from tests.conftest import EXCLUSIVE
from tests.faults import EVERY, Exchange, FaultProxy

pytestmark = pytest.mark.slow

MOST_BYTES = 100_000
"""Of one request; what PocketBase says to a larger one is said by the proxy."""
MOST_OF_A_DOCUMENT = 200_000
"""By our own settings."""

Path = Literal["log", "batch"]
Notes = DocumentCollection[Any]


class Note(TypedDict, total=False):
    id: ObjectId
    creation_utc: str
    version: Version.String
    text: str
    code: str
    mood: str
    shelf: str
    place: str


def note(id_: str, **fields: str) -> dict[str, Any]:
    """Its text and its code are its own, as both must be unique, and so is its place on its shelf."""
    made = {"id": id_, "creation_utc": "2026", "version": "1.0.0", "text": id_, "code": id_, "mood": "calm"}
    return {**made, "shelf": id_, "place": "1", **fields}


def by_id(id_: str) -> Any:
    return {"id": {"$eq": id_}}


class Commits:
    """Holds commits while it is closed, and lets none of more than `MOST_BYTES` through."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.reached = asyncio.Event()

    async def __call__(self, exchange: Exchange) -> None:
        if exchange.path.startswith("/api/batch") or "_log/records" in exchange.path:
            if len(exchange.body) > MOST_BYTES:
                await exchange.reply(413, b'{"data":{},"message":"Request entity too large.","status":413}')
                return
            self.reached.set()
            await self.open.wait()
        await exchange.forward()


class Bench:
    """One server whose commits can be held, and another beside it: so what the first writes may rest on what is
    not true any more."""

    def __init__(self, ours: PocketBaseDocumentDatabase, others: PocketBaseDocumentDatabase) -> None:
        self.ours = ours
        self.others = others
        self.expected: dict[str, dict[str, Any]] = {}
        """What there is to be in the end, by id."""
        self.notes: Notes
        self.their_notes: Notes


async def open_notes(database: PocketBaseDocumentDatabase, name: str) -> Notes:
    notes: Notes = await database.get_or_create_collection(name, Note, identity_loader_for(Note))
    await notes.ensure_indexes(
        [
            CollectionIndex(tuple((field, SortDirection.ASC) for field in fields), unique=True)
            for fields in (("text",), ("code",), ("shelf", "place"))
        ]
    )
    return notes


Write = Callable[[], Awaitable[Any]]
Answer = Any
"""What a write is to return, or the type of what it is to raise."""
Kind = Callable[["Bench", httpx.AsyncClient, str], Coroutine[Any, Any, list[tuple[Write, Answer]]]]
"""Prepares for writes of one kind, and tells them with the answers to them. Its ids begin with the text."""


async def stored(bench: Bench, id_: str, **fields: str) -> None:
    """A note that our server has in its cache."""
    bench.expected[id_] = note(id_, **fields)
    await bench.notes.insert_one(note(id_, **fields))
    assert await bench.notes.find_one(by_id(id_)) == bench.expected[id_]


def inserting(bench: Bench, document: dict[str, Any]) -> Write:
    async def write() -> None:
        assert (await bench.notes.insert_one(document)).acknowledged

    return write


def updating(bench: Bench, id_: str, params: Any) -> Write:
    async def write() -> Any:
        return (await bench.notes.update_one(by_id(id_), params)).updated_document

    return write


def deleting(bench: Bench, id_: str) -> Write:
    async def write() -> Any:
        return (await bench.notes.delete_one(by_id(id_))).deleted_count

    return write


async def good_insert(bench: Bench, http: httpx.AsyncClient, id_: str) -> list[tuple[Write, Answer]]:
    bench.expected[id_] = note(id_)
    return [(inserting(bench, note(id_)), None)]


async def good_update(bench: Bench, http: httpx.AsyncClient, id_: str) -> list[tuple[Write, Answer]]:
    await stored(bench, id_)
    bench.expected[id_] = note(id_, mood="new")
    return [(updating(bench, id_, {"mood": "new"}), bench.expected[id_])]


async def good_deletion(bench: Bench, http: httpx.AsyncClient, id_: str) -> list[tuple[Write, Answer]]:
    await stored(bench, id_)
    del bench.expected[id_]
    return [(deleting(bench, id_), 1)]


async def taken(bench: Bench, http: httpx.AsyncClient, id_: str) -> list[tuple[Write, Answer]]:
    await stored(bench, id_)
    return [(inserting(bench, note(f"{id_}-second", code=id_)), UniqueViolation)]


async def taken_by_others(bench: Bench, http: httpx.AsyncClient, id_: str) -> list[tuple[Write, Answer]]:
    await stored(bench, id_)
    bench.expected[f"{id_}-theirs"] = note(f"{id_}-theirs", text=f"{id_}-wanted")
    await bench.their_notes.insert_one(bench.expected[f"{id_}-theirs"])
    return [(updating(bench, id_, {"text": f"{id_}-wanted"}), UniqueViolation)]


async def twins(bench: Bench, http: httpx.AsyncClient, id_: str) -> list[tuple[Write, Answer]]:
    bench.expected[id_] = note(id_)
    return [
        (inserting(bench, note(id_)), None),
        (inserting(bench, note(f"{id_}-second", text=id_)), UniqueViolation),
    ]


async def taken_in_part(bench: Bench, http: httpx.AsyncClient, id_: str) -> list[tuple[Write, Answer]]:
    """Each names one half of what must be unique; the other half is in its record."""
    await stored(bench, id_)
    await stored(bench, f"{id_}-second", shelf=id_, place="2")
    await stored(bench, f"{id_}-third", place="1")
    return [
        (updating(bench, f"{id_}-second", {"place": "1"}), UniqueViolation),
        (updating(bench, f"{id_}-third", {"shelf": id_}), UniqueViolation),
    ]


async def twins_in_part(bench: Bench, http: httpx.AsyncClient, id_: str) -> list[tuple[Write, Answer]]:
    await stored(bench, id_)
    await stored(bench, f"{id_}-second", place="9")
    bench.expected[id_] = note(id_, place="9")
    return [
        (updating(bench, id_, {"place": "9"}), bench.expected[id_]),
        (updating(bench, f"{id_}-second", {"shelf": id_}), UniqueViolation),
    ]


async def beaten_by_the_refused(bench: Bench, http: httpx.AsyncClient, id_: str) -> list[tuple[Write, Answer]]:
    """The second can be there, as the first, which has its text, cannot: its code is taken."""
    await stored(bench, id_)
    bench.expected[f"{id_}-second"] = note(f"{id_}-second", text=f"{id_}-wanted")
    first = note(f"{id_}-first", text=f"{id_}-wanted", code=id_)
    return [
        (inserting(bench, first), UniqueViolation),
        (inserting(bench, bench.expected[f"{id_}-second"]), None),
    ]


async def stale(bench: Bench, http: httpx.AsyncClient, id_: str) -> list[tuple[Write, Answer]]:
    await stored(bench, id_)
    await bench.their_notes.update_one(by_id(id_), {"code": f"{id_}-theirs"})
    bench.expected[id_] = note(id_, mood="new", code=f"{id_}-theirs")
    return [(updating(bench, id_, {"mood": "new"}), bench.expected[id_])]


async def missing(bench: Bench, http: httpx.AsyncClient, id_: str) -> list[tuple[Write, Answer]]:
    for each in (id_, f"{id_}-second"):
        await stored(bench, each)
        await bench.their_notes.delete_one(by_id(each))
        del bench.expected[each]
    return [(updating(bench, id_, {"mood": "new"}), None), (deleting(bench, f"{id_}-second"), 0)]


async def too_large(bench: Bench, http: httpx.AsyncClient, id_: str) -> list[tuple[Write, Answer]]:
    await stored(bench, id_)
    return [
        (inserting(bench, note(f"{id_}-second", mood="x" * MOST_BYTES)), DocumentTooLarge),
        (updating(bench, id_, {"mood": "x" * MOST_OF_A_DOCUMENT}), DocumentTooLarge),
    ]


async def gone(bench: Bench, http: httpx.AsyncClient, id_: str) -> list[tuple[Write, Answer]]:
    """Its collection is."""
    doomed = await open_notes(bench.ours, f"gone_{id_}")
    await doomed.insert_one(note(id_))
    assert await doomed.find_one(by_id(id_))
    await delete_collection(http, f"{bench.ours._prefix}_gone_{id_}")

    async def update() -> Any:
        return await doomed.update_one(by_id(id_), {"mood": "new"})

    async def write() -> Any:
        return await doomed.insert_one(note(f"{id_}-second"))

    return [(update, CollectionNotFound), (write, CollectionNotFound)]


async def delete_collection(http: httpx.AsyncClient, name: str) -> None:
    (await http.delete(f"/api/collections/{name}")).raise_for_status()


async def without_a_column(bench: Bench, http: httpx.AsyncClient, id_: str) -> list[tuple[Write, Answer]]:
    """Somebody takes it away, or tries to: the log path's triggers do not let them."""
    return await altered(bench, http, id_, lambda fields: [field for field in fields if field["name"] != "mood"])


async def with_an_unknown_column(bench: Bench, http: httpx.AsyncClient, id_: str) -> list[tuple[Write, Answer]]:
    return await altered(
        bench,
        http,
        id_,
        lambda fields: [{**field, "name": "temper"} if field["name"] == "mood" else field for field in fields],
    )


async def without_a_column_and_its_triggers(
    bench: Bench, http: httpx.AsyncClient, id_: str
) -> list[tuple[Write, Answer]]:
    """The batch path, which has no triggers, gives it back; the log path must not take its trigger for whole."""
    table = f"{bench.ours._prefix}_altered_{id_}"
    await open_notes(bench.ours, f"altered_{id_}")
    query = f"SELECT name FROM sqlite_master WHERE type='trigger' AND sql LIKE '%`{table}`%'"
    for (name,) in (await http.post("/api/sql", json={"query": query})).json()["rows"]:
        dropped = await http.post("/api/sql", json={"query": f"DROP TRIGGER {name}"})
        dropped.raise_for_status()
    ((write, _),) = await without_a_column(bench, http, id_)
    return [(write, SchemaError if bench.ours.stats().writes.path == "log" else None)]


async def altered(
    bench: Bench, http: httpx.AsyncClient, id_: str, change: Callable[[list[dict[str, Any]]], Any]
) -> list[tuple[Write, Answer]]:
    name = f"altered_{id_}"
    notes = await open_notes(bench.ours, name)
    path = f"/api/collections/{bench.ours._prefix}_{name}"
    found = (await http.get(path)).json()
    await http.patch(path, json={"fields": change(found["fields"])})

    async def write() -> None:
        await notes.insert_one(note(id_))
        again = await open_notes(bench.others, name)
        assert await again.find_one(by_id(id_)) == note(id_)

    return [(write, None)]


KINDS: list[Kind] = [
    good_insert, good_update, good_deletion, taken, taken_by_others, taken_in_part, twins, twins_in_part,
    beaten_by_the_refused, stale, missing, too_large, gone, without_a_column, with_an_unknown_column,
    without_a_column_and_its_triggers,
]  # fmt: skip


async def mixed(bench: Bench, http: httpx.AsyncClient, commits: Commits, kinds: list[Kind], number: int) -> None:
    bench.expected = {}
    commits.open.set()
    writes = [
        write
        for position, kind in enumerate(kinds)
        for write in await kind(bench, http, f"d{number}-{position}".replace("-", "_"))
    ]
    commits.open.clear()
    commits.reached.clear()
    first = asyncio.create_task(bench.notes.insert_one(note(f"d{number}_first")))
    bench.expected[f"d{number}_first"] = note(f"d{number}_first")
    await commits.reached.wait()
    tasks = [asyncio.ensure_future(write()) for write, _ in writes]
    queued = 1 + len(writes) - kinds.count(too_large)  # one of its writes never gets so far
    async with asyncio.timeout(20):
        while bench.ours.stats().writes.queued < queued:
            await asyncio.wait(tasks, timeout=0.001)
    commits.open.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    await first
    answers = [type(outcome) if isinstance(outcome, BaseException) else outcome for outcome in outcomes]
    assert answers == [answer for _, answer in writes], outcomes
    found = [document for document in (await bench.their_notes.find({})).items if is_of(document, number)]
    assert {document["id"]: document for document in found} == bench.expected
    assert len(found) == len(bench.expected)
    ours = [document for document in (await bench.notes.find({})).items if is_of(document, number)]
    assert {document["id"]: document for document in ours if document["id"] in bench.expected} == bench.expected


def is_of(document: dict[str, Any], number: int) -> bool:
    return str(document["id"]).startswith(f"d{number}_")


def config(path: Path, coherence: CoherenceSettings) -> Config:
    return Config(
        pocketbase=PocketBaseSettings(commit=path),
        coherence=coherence,
        writes=WriteSettings(max_document_bytes=MOST_OF_A_DOCUMENT),
    )


@asynccontextmanager
async def bench_of(
    pocketbase: PocketBaseServer, prefix: str, path: Path
) -> AsyncIterator[tuple[Bench, httpx.AsyncClient, Commits]]:
    params = pocketbase.connection_params
    commits = Commits()
    async with (
        FaultProxy(pocketbase.url) as proxy,
        httpx.AsyncClient(
            base_url=pocketbase.url, headers={"Authorization": params["admin_token"]}, timeout=30
        ) as http,
        PocketBaseDocumentDatabase(
            None, {**params, "url": proxy.url}, collection_prefix=prefix, config=config(path, EXCLUSIVE)
        ) as ours,
        PocketBaseDocumentDatabase(
            None, params, collection_prefix=prefix, config=config(path, CoherenceSettings(mode="off"))
        ) as others,
    ):
        proxy.plan("POST", "/api/", commits, at=EVERY)
        commits.open.set()
        bench = Bench(ours, others)
        bench.notes = await open_notes(ours, "notes")
        bench.their_notes = await open_notes(others, "notes")
        yield bench, http, commits


Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture
def runner() -> Any:
    with asyncio.Runner() as made:
        yield made


@pytest.mark.soak
@pytest.mark.parametrize("path", ["log", "batch"])
def test_any_mix_of_writes_commits_the_good_ones_and_answers_each_caller(
    pocketbase: PocketBaseServer, prefix: str, runner: asyncio.Runner, path: Path
) -> None:
    run: Run = runner.run
    opening = bench_of(pocketbase, prefix, path)
    bench, http, commits = run(opening.__aenter__())
    numbers = itertools.count()

    @settings(
        max_examples=10,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=8))
    @example(KINDS)
    @example(KINDS[::-1])
    def any_mix(kinds: list[Kind]) -> None:
        run(mixed(bench, http, commits, kinds, next(numbers)))

    try:
        any_mix()
    finally:
        run(opening.__aexit__(None, None, None))
