"""What goes into PocketBase comes out the same, whatever JSON it is; what is not JSON, or too much of it, never
gets there. A returned document belongs to whoever asked for it."""

from __future__ import annotations

import asyncio
import math
from typing import Any, TypedDict, cast

import httpx
import msgspec
import pytest
import pytest_asyncio
from parlant.core.common import Version
from parlant.core.persistence.common import ObjectId, Where
from parlant.core.persistence.document_database import DocumentCollection, identity_loader_for

from pb_cached import Config, PocketBaseDocumentDatabase
from pb_cached.errors import DocumentTooLarge, InvalidDocument
from tests.conftest import DatabaseMaker
from tests.strategies import NUMBERS, STRINGS
from tests.test_codec import same_document


class Event(TypedDict, total=False):
    id: ObjectId
    creation_utc: str
    version: Version.String
    kind: str
    offset: int
    score: float
    deleted: bool
    title: str | None
    data: Any


Events = DocumentCollection[Event]


def event(number: int = 1, **fields: Any) -> Event:
    whole = {
        "id": f"e{number}",
        "creation_utc": "2026-01-01T00:00:00+00:00",
        "version": "0.9.0",
        "kind": "message",
        "offset": number,
        "score": 0.5,
        "deleted": False,
        "title": None,
        "data": {"message": "hello"},
    }
    return cast(Event, whole | fields)


async def events_of(database: PocketBaseDocumentDatabase) -> Events:
    return await database.get_or_create_collection("events", Event, identity_loader_for(Event))


@pytest_asyncio.fixture
async def events(database: PocketBaseDocumentDatabase) -> Events:
    return await events_of(database)


async def read(events: Events, number: int = 1) -> dict[str, Any]:
    found = await events.find_one({"id": {"$eq": f"e{number}"}})
    assert found is not None
    return cast(dict[str, Any], found)


def assert_same(found: Any, document: Any) -> None:
    """Equal, types, signs of zero and the order of nested keys included."""
    assert same_document(found, document), f"{found!r:.500} is not {document!r:.500}"


SURROGATES = [text for text in STRINGS if any("\ud800" <= character <= "\udfff" for character in text)]
HOSTILE: list[dict[str, Any]] = [
    {"kind": "a\x00b", "title": "\x00", "data": {"\x00": "\x00"}},
    {"kind": "back\\", "title": "\\", "data": ["\\", {"\\": "\\\\"}]},
    {"kind": 'it\'s "so"', "title": "'", "data": {"'": '"'}},
    {"kind": "\u2028\u2029", "title": "\r\n\t", "data": "\u2028"},
    {"kind": "😀 ä ﷽", "title": "😀", "data": {"😀": "👩‍👩‍👧"}},
    {"kind": " kept ", "title": "", "data": ""},
    {"kind": "null", "title": "null", "data": "null"},
    {"kind": "123", "title": "123", "data": '{"a": [1]}'},
    *({"kind": text, "title": text, "data": {text: text}} for text in SURROGATES),
    {"offset": 2**53 + 1, "score": 2**53 + 1, "data": [2**53 + 1, 2**63, 2**64]},
    {"offset": 10**400, "score": -(10**400), "data": {"n": 10**400}},
    {"offset": -0.0, "score": -0.0, "data": [-0.0, 0.0]},
    {"offset": 1.0, "score": 1.0, "data": [1.0, 1, True]},
    {"offset": 1e308, "score": 1e308, "data": 1e308},
    {"offset": 5e-324, "score": 5e-324, "data": 5e-324},
    {"kind": None, "offset": None, "score": None, "deleted": None, "data": None},
    {"kind": 1, "offset": "1", "score": [1], "deleted": "no", "title": {"t": 1}},
    {"offset": True, "score": False, "deleted": 1},
    {"data": {"z": 1, "a": {"y": 1, "b": [{"x": 1, "c": 2}]}}, "title": "order"},
    {"data": [[[[]]], {}, [{}], ""]},
    {"undeclared": {"b": 1, "a": 2}, "": "empty key", "rev": 7, "extra": "mine", "doc_id": "mine", "a b": None},
]


async def test_documents_survive_insert_update_and_another_servers_reading(make_database: DatabaseMaker) -> None:
    inserted = [event(2 * n, **fields) for n, fields in enumerate(HOSTILE)]
    updated = [event(2 * n + 1, **fields) for n, fields in enumerate(HOSTILE)]
    async with make_database() as database:
        events = await events_of(database)
        await asyncio.gather(*map(events.insert_one, inserted))
        await asyncio.gather(*(events.insert_one(event(2 * n + 1)) for n in range(len(HOSTILE))))
        for n, fields in enumerate(HOSTILE):
            result = await events.update_one({"id": {"$eq": f"e{2 * n + 1}"}}, cast(Event, fields))
            assert_same(result.updated_document, updated[n])
    async with make_database() as database:
        found = {document["id"]: document for document in await (await events_of(database)).find({})}
    assert len(found) == 2 * len(HOSTILE)
    for document in [*inserted, *updated]:
        assert_same(found[document["id"]], document)


async def test_every_hostile_value_can_be_asked_for(events: Events) -> None:
    values = [*STRINGS, *NUMBERS]
    documents = [event(n, kind=v, score=v, title=v) for n, v in enumerate(values)]
    await asyncio.gather(*map(events.insert_one, documents))
    for value in values:
        for field in ("kind", "score", "title"):
            found = await events.find(cast(Where, {field: {"$eq": value}}))
            assert {e["id"] for e in found} == {f"e{n}" for n, other in enumerate(values) if other == value}


async def test_a_value_that_no_longer_needs_exactness_leaves_nothing_behind(events: Events) -> None:
    await events.insert_one(event(kind="\ud800", offset=10**30, undeclared=1))
    for params in ({"kind": "plain"}, {"offset": 3}, {"undeclared": 2}):
        await events.update_one({}, cast(Event, params))
    assert_same(await read(events), event(kind="plain", offset=3, undeclared=2))


async def test_an_update_keeps_what_it_does_not_name(events: Events) -> None:
    await events.insert_one(event(kind="\udfff", score=1.0, undeclared=[1], data={"b": 1, "a": 2}))
    await events.update_one({}, cast(Event, {"title": "\ud800", "other": 2**70}))
    assert_same(
        await read(events),
        event(kind="\udfff", score=1.0, undeclared=[1], data={"b": 1, "a": 2}, title="\ud800", other=2**70),
    )


async def test_an_event_of_five_megabytes_survives(events: Events) -> None:
    large = event(data={"text": "ä😀\x00\\" * 360_000, "list": list(range(10_000))})
    assert len(msgspec.json.encode(large)) > 5_000_000
    await events.insert_one(large)
    assert_same(await read(events), large)
    await events.update_one({}, cast(Event, {"title": "x" * 5_000_000}))
    assert_same(await read(events), {**large, "title": "x" * 5_000_000})


@pytest.mark.slow
async def test_many_large_events_share_commits_and_pages(events: Events) -> None:
    documents = [event(n, data="x" * 1_500_000) for n in range(12)]
    await asyncio.gather(*map(events.insert_one, documents))
    found = await events.find({})
    assert sorted(e["offset"] for e in found) == list(range(12))
    assert all(len(e["data"]) == 1_500_000 for e in found)


# --- what is refused ---------------------------------------------------------------------------------------


class Sent:
    """An HTTP client that counts the requests which go out."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.client = httpx.AsyncClient(event_hooks={"request": [self._count]}, trust_env=False)

    async def _count(self, request: httpx.Request) -> None:
        self.requests.append(f"{request.method} {request.url.path}")


async def test_a_document_over_the_limit_is_refused_before_anything_is_sent(make_database: DatabaseMaker) -> None:
    sent = Sent()
    config = msgspec.convert({"writes": {"max_document_bytes": 100_000}}, Config)
    async with sent.client, make_database(config=config, http_client=sent.client) as database:
        events = await events_of(database)
        before = len(sent.requests)
        with pytest.raises(DocumentTooLarge, match=r"'data'.*100,000.*max_document_bytes.*Nothing was written"):
            await events.insert_one(event(data="x" * 100_000))
        assert len(sent.requests) == before
        await events.insert_one(event())
        with pytest.raises(DocumentTooLarge, match="'title'"):
            await events.update_one({}, cast(Event, {"title": "x" * 100_000}))
        assert (await events.find({})).items == [event()]


@pytest.mark.slow
async def test_the_default_limit_is_below_what_pocketbase_takes(events: Events) -> None:
    with pytest.raises(DocumentTooLarge, match="16,777,216"):
        await events.insert_one(event(data="x" * 17_000_000))
    nearly = event(data="x" * 16_700_000)
    await events.insert_one(nearly)
    assert (await events.find({})).items == [nearly]


BAD = [
    ("data", math.nan, r"\$\.data.*nan"),
    ("score", math.inf, r"\$\.score.*inf"),
    ("data", {"list": [1, b"x"]}, r"\$\.data\.list\[1\].*bytes"),
    ("data", {"tags": {"a"}}, r"\$\.data\.tags.*set"),
    ("data", {"by": {1: "one"}}, r"\$\.data\.by.*key 1.*int"),
    ("title", object(), r"\$\.title.*object"),
]


async def test_what_is_not_json_is_named_and_nothing_is_written(events: Events) -> None:
    for field, value, complaint in BAD:
        with pytest.raises(InvalidDocument, match=complaint):
            await events.insert_one(event(1, **{field: value}))
        with pytest.raises(InvalidDocument, match=complaint):
            await events.update_one({}, event(1, **{field: value}), upsert=True)
    assert (await events.find({})).total_count == 0
    await events.insert_one(event())
    for field, value, complaint in BAD:
        with pytest.raises(InvalidDocument, match=complaint):
            await events.update_one({}, cast(Event, {"kind": "changed", field: value}))
    assert (await events.find({})).items == [event()]


async def test_a_missing_key_is_named_and_nothing_is_written(events: Events) -> None:
    lacking = event()
    del lacking["offset"], lacking["title"]
    for write in (events.insert_one(lacking), events.update_one({}, lacking, upsert=True)):
        with pytest.raises(InvalidDocument, match="misses the keys 'offset', 'title'"):
            await write
    assert (await events.find({})).total_count == 0


async def test_a_bad_document_among_good_ones_fails_alone(events: Events) -> None:
    documents = [event(n, **({"data": math.nan} if n == 7 else {})) for n in range(20)]
    outcomes = await asyncio.gather(*map(events.insert_one, documents), return_exceptions=True)
    assert [n for n, outcome in enumerate(outcomes) if isinstance(outcome, InvalidDocument)] == [7]
    assert {e["offset"] for e in await events.find({})} == set(range(20)) - {7}


# --- whose document is it? -----------------------------------------------------------------------------------


def spoil(document: Any) -> None:
    document["data"]["list"].append("spoiled")
    document["kind"] = "spoiled"
    document["data"]["spoiled"] = True


async def test_a_returned_document_belongs_to_the_caller(events: Events) -> None:
    original = event(data={"list": [1, {"deep": []}]})
    await events.insert_one(original)
    everything: list[Any] = [
        await events.find_one({}),
        (await events.find({})).items[0],
        (await events.find({}, limit=1)).items[0],
        (await events.update_one({}, cast(Event, {"data": original["data"]}))).updated_document,
        (await events.update_one({"id": {"$eq": "none"}}, original, upsert=True)).updated_document,
    ]
    for document in everything:
        assert document == original
        spoil(document)
    assert original == event(data={"list": [1, {"deep": []}]})
    assert (await events.find({})).items == [original, original]


async def test_changing_a_document_after_its_write_began_changes_nothing(events: Events) -> None:
    document = event(data={"list": [1]})
    writing = asyncio.create_task(events.insert_one(document))
    await asyncio.sleep(0)  # one step: the write is queued and not yet sent
    spoil(document)
    await writing
    assert await read(events) == event(data={"list": [1]})


async def test_changing_the_parameters_of_an_update_while_it_is_sent_changes_nothing(
    make_database: DatabaseMaker,
) -> None:
    params: dict[str, Any] = {"data": {"list": [1]}}

    async def spoil_in_flight(request: httpx.Request) -> None:
        if request.url.path.endswith("_log/records") and b'\\"u\\":' in request.content:
            params["data"]["list"].append("spoiled")

    http = httpx.AsyncClient(event_hooks={"request": [spoil_in_flight]}, trust_env=False)
    async with http, make_database(http_client=http) as database:
        events = await events_of(database)
        await events.insert_one(event())
        updated = await events.update_one({}, cast(Event, params))
        assert params["data"]["list"] == [1, "spoiled"]
        assert updated.updated_document == event(data={"list": [1]})
        assert await read(events) == event(data={"list": [1]})


async def test_the_callers_own_document_is_left_alone(events: Events) -> None:
    document, params = event(data={"pair": (1, 2)}), {"data": {"pair": (3, 4)}}
    await events.insert_one(document)
    await events.update_one({}, cast(Event, params))
    assert document == event(data={"pair": (1, 2)})
    assert params == {"data": {"pair": (3, 4)}}
    assert await read(events) == event(data={"pair": [3, 4]})
