"""Parlant's `DocumentDatabase` and `DocumentCollection`, method by method, on a real PocketBase."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any, TypedDict, cast

import httpx
import pytest
import pytest_asyncio
from parlant.core.common import Version
from parlant.core.persistence.common import Cursor, ObjectId, SortDirection, Where
from parlant.core.persistence.document_database import (
    CollectionIndex,
    DocumentCollection,
    FindResult,
    identity_loader_for,
)

from pb_cached import Config, PocketBaseDocumentDatabase, PocketBaseServer
from pb_cached.collection import PocketBaseDocumentCollection
from pb_cached.config import CollectionSettings
from pb_cached.errors import (
    AuthenticationFailed,
    CollectionExists,
    CollectionNotFound,
    ConfigError,
    InvalidDocument,
    InvalidFilter,
    PBCachedError,
    RequestRejected,
    UniqueViolation,
)
from pb_cached.pocketbase.records import Page
from pb_cached.reading.order import position
from tests.conftest import DatabaseMaker
from tests.faults import FaultProxy, Withheld, answer

pytestmark = pytest.mark.slow


class Item(TypedDict, total=False):
    id: ObjectId
    creation_utc: str
    version: Version.String
    name: str
    rank: int
    open: bool
    notes: dict[str, Any]


Items = DocumentCollection[Item]
ASC, DESC = SortDirection.ASC, SortDirection.DESC
LOADER = identity_loader_for(Item)


def item(number: int, **fields: Any) -> Item:
    whole = {
        "id": f"i{number:05}",
        "creation_utc": f"2026-01-01T{number // 3600:02}:{number // 60 % 60:02}:{number % 60:02}+00:00",
        "version": "1.0.0",
        "name": f"item {number}",
        "rank": number,
        "open": number % 2 == 0,
        "notes": {"number": number},
    }
    return cast(Item, whole | fields)


def change(**fields: Any) -> Item:
    return cast(Item, fields)


def ids(found: FindResult[Item]) -> list[str]:
    return [document["id"] for document in found]


async def items_of(database: PocketBaseDocumentDatabase) -> Items:
    return await database.get_or_create_collection("items", Item, LOADER)


@pytest_asyncio.fixture
async def items(database: PocketBaseDocumentDatabase) -> Items:
    return await items_of(database)


@pytest_asyncio.fixture
async def two_servers(make_database: DatabaseMaker) -> AsyncIterator[tuple[Items, Items]]:
    """The same collection, through two databases that share neither connection nor queue."""
    async with httpx.AsyncClient() as http, make_database() as one, make_database(http_client=http) as other:
        yield await items_of(one), await items_of(other)


async def fill(items: Items, *numbers: int, **fields: Any) -> None:
    """Inserts one after the other: the order of insertion is that of the numbers."""
    for number in numbers:
        await items.insert_one(item(number, **fields))


# --- the database --------------------------------------------------------------------------------------------


async def test_collections_are_created_opened_and_deleted(database: PocketBaseDocumentDatabase) -> None:
    with pytest.raises(CollectionNotFound, match="'items'"):
        await database.get_collection("items", Item, LOADER)
    created = await database.create_collection("items", Item)
    await fill(created, 1)
    with pytest.raises(CollectionExists, match="'items'"):
        await database.create_collection("items", Item)
    assert await database.get_collection("items", Item, LOADER) is created
    await database.delete_collection("items")
    for gone in (database.get_collection("items", Item, LOADER), database.delete_collection("items")):
        with pytest.raises(CollectionNotFound):
            await gone
    again = await database.create_collection("items", Item)
    assert (await again.find({})).total_count == 0


async def test_the_errors_are_also_those_that_parlants_own_databases_raise(
    database: PocketBaseDocumentDatabase,
) -> None:
    with pytest.raises(ValueError):
        await database.get_collection("items", Item, LOADER)
    with pytest.raises(ValueError):
        await database.delete_collection("items")
    await items_of(database)
    with pytest.raises(ValueError):
        await database.create_collection("items", Item)


async def test_a_collection_of_another_opening_exists(make_database: DatabaseMaker) -> None:
    async with make_database() as database:
        await fill(await items_of(database), 1)
    async with make_database() as database:
        with pytest.raises(CollectionExists):
            await database.create_collection("items", Item)
        items = await database.get_collection("items", Item, LOADER)
        assert (await items.find({})).items == [item(1)]


async def test_opening_a_collection_twice_gives_one_object_and_runs_no_loader(
    database: PocketBaseDocumentDatabase,
) -> None:
    async def never(_: Any) -> Item | None:
        raise AssertionError("there is nothing to load")

    first, second = await asyncio.gather(items_of(database), items_of(database))
    await fill(first, 1)
    assert first is second is await database.get_or_create_collection("items", Item, never)


@pytest.mark.parametrize("entered_before", [False, True])
async def test_a_database_must_be_entered(make_database: DatabaseMaker, entered_before: bool) -> None:
    database = make_database()
    if entered_before:
        async with database:
            await items_of(database)
    for call in (
        items_of(database),
        database.create_collection("items", Item),
        database.get_collection("items", Item, LOADER),
        database.delete_collection("items"),
        database.flush(),
    ):
        with pytest.raises(PBCachedError, match="use it inside `async with`"):
            await call


async def test_a_collection_of_a_closed_database_says_so(make_database: DatabaseMaker) -> None:
    async with make_database() as database:
        items = await items_of(database)
    for call in (
        items.find({}),
        items.find_one({}),
        items.insert_one(item(1)),
        items.update_one({}, change(rank=1)),
        items.delete_one({}),
        items.ensure_indexes([]),
    ):
        with pytest.raises(PBCachedError, match="closed"):
            await call


async def test_a_database_can_be_entered_again(make_database: DatabaseMaker) -> None:
    database = make_database()
    for number in (1, 2):
        async with database:
            items = await items_of(database)
            await fill(items, number)
            assert (await items.find({})).total_count == number


async def test_a_database_is_entered_once_at_a_time(make_database: DatabaseMaker) -> None:
    database = make_database()
    outcomes = await asyncio.gather(database.__aenter__(), database.__aenter__(), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [PocketBaseDocumentDatabase, PBCachedError]
    with pytest.raises(PBCachedError, match="open already"):
        async with database:
            pass
    await fill(await items_of(database), 1)
    await database.__aexit__(None, None, None)
    async with database:
        assert (await (await items_of(database)).find({})).total_count == 1


async def test_a_database_that_could_not_be_entered_can_be_entered_later(
    make_database: DatabaseMaker, pocketbase: PocketBaseServer
) -> None:
    async with FaultProxy(pocketbase.url) as proxy:
        proxy.plan("GET", "/api/collections", answer(400))
        database = make_database(connection_params={**pocketbase.connection_params, "url": proxy.url})
        with pytest.raises(RequestRejected):
            await database.__aenter__()
        async with database:
            await fill(await items_of(database), 1)


# --- the caller's HTTP client --------------------------------------------------------------------------------


@pytest.mark.parametrize("http", [httpx.Client, str, httpx.AsyncHTTPTransport, lambda: httpx.AsyncClient])
def test_what_is_no_asynchronous_http_client_is_refused(make_database: DatabaseMaker, http: Any) -> None:
    with pytest.raises(ConfigError, match=r"http_client: expected an httpx\.AsyncClient, not \w+"):
        make_database(http_client=http())


async def test_a_closed_http_client_is_said_to_be_closed(make_database: DatabaseMaker) -> None:
    http = httpx.AsyncClient()
    await http.aclose()
    with pytest.raises(PBCachedError, match=r"http_client .* is closed"):
        await make_database(http_client=http).__aenter__()


@pytest.mark.parametrize("hooks", [False, True])
async def test_an_http_client_closed_too_early_is_said_to_be_closed(
    make_database: DatabaseMaker, hooks: bool
) -> None:
    http = httpx.AsyncClient(event_hooks={"response": [raise_for_status] if hooks else []})
    async with make_database(http_client=http) as database:
        items = await items_of(database)
        await http.aclose()
        for call in (items.insert_one(item(1)), items.find({}), items.update_one({}, change(rank=1))):
            with pytest.raises(PBCachedError, match=r"http_client .* is closed"):
                await call


async def raise_for_status(response: httpx.Response) -> None:
    response.raise_for_status()


async def raise_for_status_with_body(response: httpx.Response) -> None:
    await response.aread()
    response.raise_for_status()


@pytest.mark.parametrize("hook", [raise_for_status, raise_for_status_with_body])
async def test_an_http_client_whose_hook_raises_for_a_status_changes_no_answer(
    make_database: DatabaseMaker, hook: Any
) -> None:
    hooks = {"response": [hook]}
    async with httpx.AsyncClient(event_hooks=hooks) as http, make_database(http_client=http) as database:
        with pytest.raises(CollectionNotFound):
            await database.get_collection("items", Item, LOADER)
        items = await items_of(database)
        await items.ensure_indexes([CollectionIndex(fields=(("name", ASC),), unique=True)])
        outcomes = await asyncio.gather(
            *(items.insert_one(item(number, name=str(number % 2))) for number in range(4)), return_exceptions=True
        )
        assert [isinstance(outcome, UniqueViolation) for outcome in outcomes] == [False, False, True, True]
        assert (await items.find({})).total_count == 2
        assert http.event_hooks["response"] == [hook]


async def test_a_sign_in_that_such_a_hook_raises_for_is_refused_with_its_reason(
    make_database: DatabaseMaker, pocketbase: PocketBaseServer
) -> None:
    params = {"url": pocketbase.url, "admin_email": "nobody@example.com", "admin_password": "wrong"}
    async with httpx.AsyncClient(event_hooks={"response": [raise_for_status]}) as http:
        with pytest.raises(AuthenticationFailed, match="status 400: Failed to authenticate"):
            await make_database(connection_params=params, http_client=http).__aenter__()


# --- find ---------------------------------------------------------------------------------------------------


async def test_find_orders_by_creation_and_id_whatever_the_order_of_insertion(items: Items) -> None:
    same_time = {"creation_utc": "2026-01-01T00:00:05+00:00"}
    for document in (item(9), item(1), item(7, **same_time), item(6, **same_time), item(3)):
        await items.insert_one(document)
    expected = ["i00001", "i00003", "i00006", "i00007", "i00009"]
    assert ids(await items.find({})) == expected
    assert ids(await items.find({}, sort_direction=ASC)) == expected
    assert ids(await items.find({}, sort_direction=DESC)) == expected[::-1]


@pytest.mark.parametrize("direction", [ASC, DESC])
@pytest.mark.parametrize("where", [{}, {"$or": [{"open": {"$eq": True}}, {"rank": {"$lt": 3}}]}])
async def test_pages_follow_each_other_without_gap_or_repetition(
    items: Items, direction: SortDirection, where: Where
) -> None:
    await asyncio.gather(
        *(items.insert_one(item(n // 3, id=f"{n:02}", rank=n, open=n % 2 == 0)) for n in range(20))
    )
    everything = await items.find(where, sort_direction=direction)
    assert (everything.has_more, everything.next_cursor) == (False, None)
    seen: list[str] = []
    cursor: Cursor | None = None
    while True:
        page = await items.find(where, limit=3, cursor=cursor, sort_direction=direction)
        assert page.total_count == everything.total_count - len(seen)
        seen += ids(page)
        assert page.has_more is (len(seen) < everything.total_count)
        if not page.has_more:
            assert page.next_cursor is None
            break
        last = page.items[-1]
        assert page.next_cursor == Cursor(creation_utc=last["creation_utc"], id=last["id"])
        cursor = page.next_cursor
    assert seen == ids(everything)


async def test_a_limit_that_is_just_enough_leaves_no_more(items: Items) -> None:
    await fill(items, 1, 2)
    found = await items.find({}, limit=2)
    assert (found.total_count, found.has_more, found.next_cursor) == (2, False, None)


@pytest.mark.parametrize(("inserted", "has_more"), [(0, False), (2, True)])
async def test_a_limit_of_nothing_counts(items: Items, inserted: int, has_more: bool) -> None:
    await fill(items, *range(inserted))
    for where in cast(list[Where], [{}, {"notes": {"$ne": 0}}]):
        found = await items.find(where, limit=0)
        assert (found.items, found.total_count, found.has_more, found.next_cursor) == (
            [], inserted, has_more, None,
        )  # fmt: skip


async def test_a_negative_limit_is_an_error(items: Items) -> None:
    with pytest.raises(InvalidFilter, match="-1"):
        await items.find({}, limit=-1)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"limit": "3"}, "limit must be a whole number or None, not '3'"),
        ({"limit": True}, "limit must be a whole number or None, not True"),
        ({"limit": 2.0}, "limit must be a whole number or None, not 2.0"),
        ({"cursor": "i00001"}, "cursor must be a Cursor, such as the next_cursor of the page before, or None"),
        ({"cursor": ("2026-01-01", "i00001")}, "cursor must be a Cursor"),
        ({"sort_direction": "DESC"}, "sort_direction must be SortDirection.ASC or SortDirection.DESC, not 'DESC'"),
    ],
)
async def test_arguments_that_make_no_page_are_an_error_that_says_what_would(
    items: Items, arguments: dict[str, Any], complaint: str
) -> None:
    await fill(items, 1)
    with pytest.raises(InvalidFilter, match=re.escape(complaint)):
        await items.find({}, **arguments)


@pytest.mark.parametrize("sort", ["rank", 1, ["rank"], [("rank",)], [("rank", "ASC")], [(1, ASC)], {"rank": ASC}])
async def test_what_is_no_order_is_an_error(items: Items, sort: Any) -> None:
    await fill(items, 1)
    with pytest.raises(InvalidFilter, match="SortDirection"):
        await items.find_one({}, sort)


def test_a_prefix_that_is_no_text_is_an_error(make_database: DatabaseMaker) -> None:
    with pytest.raises(ConfigError, match="collection_prefix: expected a string, not int"):
        make_database(collection_prefix=5)


async def test_more_documents_than_pocketbase_pages_hold_are_all_found(items: Items) -> None:
    count = 1200
    await asyncio.gather(*(items.insert_one(item(n)) for n in range(count)))
    expected = [f"i{n:05}" for n in range(count)]
    assert ids(await items.find({})) == expected
    assert ids(await items.find({}, sort_direction=DESC)) == expected[::-1]
    odd = await items.find({"open": {"$eq": False}})
    assert (ids(odd), odd.total_count) == (expected[1::2], 600)
    for limit in (10, 1000, 1150):
        page = await items.find({"rank": {"$gte": 1}}, limit=limit)
        assert (ids(page), page.total_count, page.has_more) == (expected[1 : limit + 1], 1199, True)
        rest = await items.find({"rank": {"$gte": 1}}, cursor=page.next_cursor)
        assert ids(rest) == expected[limit + 1 :]


@pytest.mark.parametrize("absent", [15, pytest.param(120, marks=pytest.mark.slow)])
async def test_a_filter_longer_than_pocketbase_takes_finds_the_same(items: Items, absent: int) -> None:
    await asyncio.gather(*(items.insert_one(item(n)) for n in range(60)))
    expected = [f"i{n:05}" for n in range(0, 60, 3)]
    # The last comes first, and each is followed by some that do not exist.
    asked = [id_ for found in reversed(expected) for id_ in (found, *(f"{found}-{n}" for n in range(absent)))]
    alternatives: Any = [{"id": {"$eq": id_}} for id_ in asked]
    long_filters: list[Any] = [
        {"id": {"$in": asked}},
        {"$or": alternatives},
        {"$and": [{"version": {"$eq": "1.0.0"}}, {"$or": alternatives}]},
        {"$and": [{"name": {"$ne": "x" * 5000}}, {"id": {"$in": asked}}]},
        {"$or": [{"id": {"$eq": "x" * 5000}}, {"id": {"$in": asked}}]},
    ]
    for where in long_filters:
        assert ids(await items.find(where)) == expected
        page = await items.find(where, limit=7)
        assert (ids(page), page.total_count, page.has_more) == (expected[:7], 20, True)
        assert await items.find_one(where) == item(0)
    excluded = await items.find(cast(Where, {"id": {"$nin": asked}}))
    assert excluded.total_count == 40


async def test_totals_agree_with_the_documents_while_others_insert(items: Items) -> None:
    """Whatever moment an answer is of, its parts are of the same one."""

    async def insert() -> None:
        for start in range(0, 300, 3):
            await asyncio.gather(*(items.insert_one(item(n)) for n in range(start, start + 3)))

    inserting = asyncio.create_task(insert())
    before = 0
    while not inserting.done():
        for limit in (5, 500, 1000):
            found = await items.find({"version": {"$eq": "1.0.0"}}, limit=limit)
            assert len(found.items) == min(limit, found.total_count)
            assert found.has_more is (found.total_count > limit)
            assert found.total_count >= before
            before = found.total_count
    await inserting
    assert (await items.find({}, limit=5)).total_count == 300


async def test_a_count_made_a_moment_after_the_page_does_not_contradict_it(
    items: Items, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PocketBase counts beside its reading: what is inserted between the two is counted and not read."""
    reader = cast(PocketBaseDocumentCollection[Item], items).reader
    read = reader.page

    async def counted_late(*args: Any, **kwargs: Any) -> Page:
        page = await read(*args, **kwargs)
        await items.insert_one(item(99))
        return Page(page.rows, page.total + 1)

    await fill(items, 1, 2)
    monkeypatch.setattr(reader, "page", counted_late)
    found = await items.find({}, limit=5)
    assert (ids(found), found.total_count, found.has_more) == (["i00001", "i00002"], 2, False)


class Traffic:
    """Counts the requests that read records, and the records that answer them."""

    def __init__(self) -> None:
        self.requests = self.records = 0

    async def note(self, response: httpx.Response) -> None:
        if response.request.method == "GET" and response.request.url.path.endswith("/records"):
            await response.aread()
            self.requests += 1
            self.records += len(response.json()["items"])


@pytest.mark.parametrize("direction", [ASC, DESC])
@pytest.mark.parametrize("exceptional", [0, 4])
async def test_what_a_page_costs_does_not_depend_on_how_many_there_are(
    make_database: DatabaseMaker, direction: SortDirection, exceptional: int
) -> None:
    traffic = Traffic()
    count, limit = 2100, 20
    # Four of them are on the second page, whichever way it is read.
    odd = [30, 31, count - 31, count - 30][:exceptional]
    wheres: list[Any] = [
        {},
        {"rank": {"$gte": 0}},
        {"rank": {"$gt": -1}, "name": {"$ne": ""}},
        {"$or": [{"open": {"$eq": False}}, {"open": {"$eq": True}}]},
    ]
    async with (
        httpx.AsyncClient(event_hooks={"response": [traffic.note]}) as http,
        make_database(http_client=http) as database,
    ):
        items = await items_of(database)
        await asyncio.gather(
            *(items.insert_one(item(n, **({"rank": 2**60 + n} if n in odd else {}))) for n in range(count))
        )
        expected = [f"i{n:05}" for n in range(count)][:: -1 if direction == DESC else 1]
        for where in wheres:
            cursor = None
            for page in range(3):
                traffic.requests = traffic.records = 0
                found = await items.find(where, limit, cursor, direction)
                start, cursor = page * limit, found.next_cursor
                assert (ids(found), found.total_count) == (expected[start : start + limit], count - start)
                assert traffic.requests <= 3
                assert traffic.records <= 2 * (limit + 1 + 2 * exceptional)
        # One page cannot hold as many, and as many exceptional ones besides.
        found = await items.find({"rank": {"$gte": 0}}, 999, sort_direction=direction)
        assert (ids(found), found.total_count) == (expected[:999], count)


@pytest.mark.parametrize("direction", [ASC, DESC])
@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8])
async def test_documents_that_columns_cannot_hold_take_their_places_on_a_page(
    items: Items, direction: SortDirection, limit: int
) -> None:
    """Some match and some do not; some stand where their columns tell, and some do not."""
    documents = [item(n, rank=n % 4) for n in range(8)]
    documents += [item(n, rank=0.0) for n in (0, 1, 5)]  # no match, as no filter can tell
    documents += [item(n, rank=2.0) for n in (2, 6)]
    documents += [item(3, rank=3.0, name=number) for number in (1, 2)]  # as old as another, and of the same id
    documents += [item(4, rank=True, creation_utc=time) for time in (None, 5, "2026\ud800")]
    for document in documents:
        await items.insert_one(document)
    expected = [document for document in documents if document["rank"] != 0]
    expected.sort(key=position, reverse=direction == DESC)
    found = await items.find({"rank": {"$ne": 0}}, limit, sort_direction=direction)
    assert list(found) == expected[:limit]
    assert (found.total_count, found.has_more) == (len(expected), True)


@pytest.mark.parametrize("turns", ["plain", "exceptional"])
async def test_a_document_that_changes_between_the_requests_for_a_page_is_on_it_once(
    two_servers: tuple[Items, Items], monkeypatch: pytest.MonkeyPatch, turns: str
) -> None:
    """A document that can only now be held by its columns, or no longer, is there all the time."""
    items, other = two_servers
    plain, exceptional = "plain", 1
    before, after = (exceptional, plain) if turns == "plain" else (plain, exceptional)
    for number in range(4):
        await items.insert_one(item(number, name=before if number == 1 else "plain"))
    reader = cast(PocketBaseDocumentCollection[Item], items).reader
    page, each = reader.page, reader.all
    changed = asyncio.Event()

    async def page_before(*args: Any, **kwargs: Any) -> Page:
        read = await page(*args, **kwargs)
        if not changed.is_set():
            await other.update_one({"id": {"$eq": "i00001"}}, change(name=after))
            changed.set()
        return read

    async def all_after(filters: Any) -> AsyncIterator[Any]:
        await changed.wait()
        async for row in each(filters):
            yield row

    monkeypatch.setattr(reader, "page", page_before)
    monkeypatch.setattr(reader, "all", all_after)
    async with asyncio.timeout(20):
        found = await items.find({"rank": {"$gte": 1}}, limit=2)
    assert (ids(found), found.total_count) == (["i00001", "i00002"], 3)
    assert found.items[0]["name"] == after


async def test_a_page_is_judged_also_where_a_foreign_hand_has_written(make_database: DatabaseMaker) -> None:
    """JSON has other texts than ours, of which no filter can tell what they say."""
    async with make_database() as database:
        items = cast(PocketBaseDocumentCollection[Item], await items_of(database))
        await fill(items, *range(4))
        row = (await items.reader.page("", "id", 1)).rows[0]
        await database._opened().client.call(
            "PATCH",
            f"/api/collections/{items.codec.collection}/records/{row.id}",
            body=b'{"notes": "\\"\\\\u0078\\""}',
            repeatable=True,
        )
        assert await items.find_one({"id": {"$eq": "i00000"}}) == item(0, notes="x")
        found = await items.find(cast(Where, {"notes": {"$ne": "x"}}), limit=2)
        assert (ids(found), found.total_count) == (["i00001", "i00002"], 3)


class TitledItem(Item, total=False):
    title: str | None


async def test_documents_that_are_older_than_a_column_are_found_by_its_field(
    make_database: DatabaseMaker, cache: Mapping[str, Any]
) -> None:
    """They have its value where undeclared keys are kept."""
    config = Config(collections={"items": CollectionSettings(partition_by="title")}, **cache)
    async with make_database(config=Config(**cache)) as database:
        items = await items_of(database)
        for number, title in enumerate(["a", "it's", None, ""]):
            await items.insert_one(item(number, title=title))
        await items.insert_one(item(4))
    async with make_database(config=config) as database:
        titled = await database.get_or_create_collection("items", TitledItem, identity_loader_for(TitledItem))
        for number, title in enumerate(["a", None], start=5):
            await titled.insert_one(cast(TitledItem, item(number, title=title)))

        async def found(condition: Any) -> str:
            matches = await titled.find(cast(Where, {"title": condition}))
            page = await titled.find(cast(Where, {"title": condition}), limit=1)
            first = await titled.find_one(cast(Where, {"title": condition}))
            assert page.total_count == matches.total_count
            assert [*page] == [*matches][:1] == ([first] if first else [])
            return "".join(document["id"][-1] for document in matches)

        assert await found({"$eq": "a"}) == "05"
        assert await found({"$eq": "it's"}) == "1"
        assert await found({"$eq": None}) == "26"
        assert await found({"$in": ["", "a", "x"]}) == "035"
        assert await found({"$nin": ["", None]}) == "0145"
        assert await found({"$ne": "a"}) == "12346"
        assert await found({"$gte": "a"}) == "015"
        assert await found({"$lt": "b"}) == "035"
        assert await found({"$eq": "x"}) == ""


# --- find_one ------------------------------------------------------------------------------------------------


async def test_find_one_gives_the_first_inserted(items: Items) -> None:
    await fill(items, 5, 3, 4)
    assert await items.find_one({}) == item(5)
    assert await items.find_one({"rank": {"$lt": 5}}) == item(3)
    assert await items.find_one(cast(Where, {"notes": {"$eq": {"number": 4}}})) == item(4)
    assert await items.find_one({"rank": {"$gt": 5}}) is None


async def test_of_documents_with_one_id_the_first_inserted_is_meant(items: Items) -> None:
    await items.insert_one(item(1, name="first"))
    await items.insert_one(item(1, name="second"))
    assert (await items.update_one({"id": {"$eq": "i00001"}}, change(rank=9))).updated_document == item(
        1, name="first", rank=9
    )
    assert (await items.delete_one({"id": {"$eq": "i00001"}})).deleted_document == item(1, name="first", rank=9)
    assert (await items.find({})).items == [item(1, name="second")]


async def test_find_one_sorts_and_breaks_ties_by_insertion(items: Items) -> None:
    await items.insert_one(item(1, rank=2, name="b"))
    await items.insert_one(item(2, rank=5, name="a"))
    await items.insert_one(item(3, rank=5, name="a"))
    await items.insert_one(item(4, rank=2, name="c"))

    async def first(*sort: tuple[str, SortDirection]) -> str:
        found = await items.find_one({}, sort)
        assert found is not None
        return found["id"][-1]

    assert await first(("rank", DESC)) == "2"
    assert await first(("rank", ASC)) == "1"
    assert await first(("rank", ASC), ("name", DESC)) == "4"
    assert await first(("name", ASC), ("id", DESC)) == "3"
    assert await items.find_one({"rank": {"$gt": 5}}, [("rank", ASC)]) is None


@pytest.mark.parametrize("value", [None, "\ud800"], ids=["None", "surrogate"])
async def test_find_one_sorts_by_the_value_also_where_a_column_cannot_hold_it(items: Items, value: Any) -> None:
    """Both share their image with the strings that were inserted before them, and both are smaller."""
    twin = "" if value is None else "\ue000"
    for number in (1, 2):
        await items.insert_one(item(number, name=twin))
    await items.insert_one(item(3, name=value))
    found = await items.find_one({}, [("name", ASC)])
    assert found is not None and found["id"] == "i00003"


async def test_find_one_sorts_by_fields_that_no_column_orders(items: Items) -> None:
    await items.insert_one(item(1, undeclared=2))
    await items.insert_one(item(2, undeclared=1))
    await items.insert_one(item(3))
    for direction, expected in ((ASC, "i00003"), (DESC, "i00001")):
        found = await items.find_one({}, [("undeclared", direction)])
        assert found is not None and found["id"] == expected


# --- update_one, delete_one ----------------------------------------------------------------------------------


async def test_an_update_merges_at_the_top_only(items: Items) -> None:
    await fill(items, 1, 2)
    result = await items.update_one({"rank": {"$eq": 2}}, change(name="new", notes={"other": 1}))
    assert (result.acknowledged, result.matched_count, result.modified_count) == (True, 1, 1)
    assert result.updated_document == item(2, name="new", notes={"other": 1})
    assert (await items.find({})).items == [item(1), item(2, name="new", notes={"other": 1})]


async def test_an_update_that_changes_nothing_has_still_matched(items: Items) -> None:
    await fill(items, 1)
    result = await items.update_one({}, change(rank=1))
    assert (result.matched_count, result.modified_count, result.updated_document) == (1, 1, item(1))


async def test_an_update_returns_the_document_also_where_it_no_longer_matches(items: Items) -> None:
    await fill(items, 1)
    result = await items.update_one({"open": {"$eq": False}}, change(open=True))
    assert result.updated_document == item(1, open=True)


async def test_an_update_without_a_match_writes_nothing(items: Items) -> None:
    await fill(items, 1)
    for where in cast(list[Where], [{"rank": {"$eq": 7}}, {"rank": {"$in": []}}]):
        result = await items.update_one(where, change(rank=2))
        assert (result.matched_count, result.modified_count, result.updated_document) == (0, 0, None)
    assert (await items.find({})).items == [item(1)]


async def test_an_upsert_inserts_a_whole_document(items: Items) -> None:
    where: Where = {"rank": {"$eq": 1}}
    result = await items.update_one(where, item(1), upsert=True)
    assert (result.matched_count, result.modified_count, result.updated_document) == (0, 0, item(1))
    result = await items.update_one(where, item(1, name="second"), upsert=True)
    assert (result.matched_count, result.updated_document) == (1, item(1, name="second"))
    with pytest.raises(InvalidDocument, match="misses the keys"):
        await items.update_one({"rank": {"$eq": 2}}, change(rank=2), upsert=True)
    assert (await items.find({})).items == [item(1, name="second")]


async def test_an_update_may_change_id_and_time_and_the_document_moves(items: Items) -> None:
    await fill(items, 1, 2)
    moved = item(9, rank=1)
    result = await items.update_one({"rank": {"$eq": 1}}, moved)
    assert result.updated_document == moved
    assert ids(await items.find({})) == ["i00002", "i00009"]
    assert await items.find_one({"id": {"$eq": "i00001"}}) is None
    assert await items.find_one({}) == moved  # it is still the one that was inserted first


async def test_two_servers_that_update_different_fields_both_win(two_servers: tuple[Items, Items]) -> None:
    one, other = two_servers
    await one.insert_one(item(0))
    where: Where = {"id": {"$eq": "i00000"}}
    for number in range(1, 31):
        changes = [
            (one, change(name=f"one {number}")),
            (other, change(rank=number)),
            (one, change(notes={"n": number})),
        ]
        await asyncio.gather(*(items.update_one(where, params) for items, params in changes))
        expected = item(0, name=f"one {number}", rank=number, notes={"n": number})
        assert await one.find_one(where) == await other.find_one(where) == expected


async def test_updates_at_once_whose_values_have_no_column_of_their_own_both_win(items: Items) -> None:
    """None in a plain field and a lone surrogate share the column `extra`."""
    await items.insert_one(item(0))
    for number in range(20):
        exceptional = "\ud800" * (number + 1)
        await asyncio.gather(
            items.update_one({}, change(name=None)),
            items.update_one({}, change(rank=2**60 + number)),
            items.update_one({}, change(creation_utc=exceptional)),
        )
        assert await items.find_one({}) == item(0, name=None, rank=2**60 + number, creation_utc=exceptional)
        await items.update_one({}, change(name="back"))


async def test_many_updates_of_one_document_are_all_counted(two_servers: tuple[Items, Items]) -> None:
    await two_servers[0].insert_one(item(0))
    updates = [two_servers[n % 2].update_one({}, change(rank=n)) for n in range(100)]
    results = await asyncio.gather(*updates)
    assert all(result.matched_count == 1 and result.updated_document is not None for result in results)


async def test_an_update_whose_match_is_deleted_takes_the_next_or_none(two_servers: tuple[Items, Items]) -> None:
    one, other = two_servers
    for number in range(10):
        await fill(one, number)
        result, _ = await asyncio.gather(one.update_one({}, change(rank=77)), other.delete_one({}))
        assert result.matched_count in (0, 1)
        assert (await other.find({})).total_count == 0


async def test_delete_one_deletes_the_first_inserted_match_and_returns_it(items: Items) -> None:
    await fill(items, 3, 1, 2)
    result = await items.delete_one({"rank": {"$lt": 3}})
    assert (result.acknowledged, result.deleted_count, result.deleted_document) == (True, 1, item(1))
    result = await items.delete_one({"rank": {"$eq": 1}})
    assert (result.acknowledged, result.deleted_count, result.deleted_document) == (True, 0, None)
    assert ids(await items.find({})) == ["i00002", "i00003"]


async def test_many_who_delete_share_the_documents(two_servers: tuple[Items, Items]) -> None:
    await fill(two_servers[0], *range(10))
    results = await asyncio.gather(*(two_servers[n % 2].delete_one({}) for n in range(14)))
    deleted = [result.deleted_document["id"] for result in results if result.deleted_document]
    assert sorted(deleted) == [f"i{n:05}" for n in range(10)]


async def test_a_malformed_filter_is_an_error_everywhere_and_writes_nothing(items: Items) -> None:
    await fill(items, 1)
    malformed: list[Any] = [
        {"name": {"$regex": "x"}},
        {"name": "x"},
        {"$nor": []},
        {"name": {"$in": "x"}},
        {1: {"$eq": 1}},
        {"$and": [{"id": {"$eq": "x"}}, {None: {"$eq": 1}}]},
        None,
    ]
    for where in malformed:
        for call in (
            items.find(where),
            items.find(where, limit=1),
            items.find_one(where),
            items.update_one(where, change(rank=2)),
            items.update_one(where, item(2), upsert=True),
            items.delete_one(where),
        ):
            with pytest.raises(InvalidFilter):
                await call
    assert (await items.find({})).items == [item(1)]


@pytest.mark.parametrize("document", [None, 5, "text", [("id", "i00001")]])
async def test_what_is_no_document_is_refused_and_writes_nothing(items: Items, document: Any) -> None:
    await fill(items, 1)
    for call in (
        items.insert_one(document),
        items.update_one({}, document),
        items.update_one({"rank": {"$eq": 7}}, document, upsert=True),
    ):
        with pytest.raises(InvalidDocument, match=f"not {type(document).__name__}"):
            await call
    assert (await items.find({})).items == [item(1)]


# --- delete_many ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where",
    [
        {},
        {"rank": {"$gte": 120}},
        {"$or": [{"rank": {"$lt": 3}}, {"name": {"$eq": "item 7"}}, {"rank": {"$lt": 2}}]},
        {"notes": {"$eq": {"number": 5}}},  # no filter of PocketBase's can say that
        {"id": {"$in": []}},
    ],
)
async def test_delete_many_deletes_all_matches_and_nothing_else(items: Items, where: Any) -> None:
    assert isinstance(items, PocketBaseDocumentCollection)
    await asyncio.gather(*(items.insert_one(item(number)) for number in range(250)))
    await items.find({})  # what is cached must be gone too
    matches = ids(await items.find(where))
    everything = ids(await items.find({}))
    assert await items.delete_many(where) == len(matches)
    assert ids(await items.find({})) == [id_ for id_ in everything if id_ not in matches]
    assert await items.delete_many(where) == 0


async def test_delete_many_leaves_what_does_not_match_any_more_and_takes_what_does_by_then(
    two_servers: tuple[Items, Items],
) -> None:
    one, other = two_servers
    assert isinstance(one, PocketBaseDocumentCollection)
    await fill(one, *range(20), open=True)
    closes = [other.update_one({"rank": {"$eq": n}}, change(open=False)) for n in range(0, 20, 2)]
    renames = [one.update_one({"rank": {"$eq": n}}, change(name="renamed")) for n in range(20)]
    deleted, *_ = await asyncio.gather(one.delete_many({"open": {"$eq": True}}), *closes, *renames)
    left = (await other.find({})).items
    assert deleted + len(left) == 20
    assert all(not document["open"] for document in left)


async def test_delete_many_takes_what_was_changed_while_it_was_read(
    make_database: DatabaseMaker, pocketbase: PocketBaseServer, prefix: str
) -> None:
    async with (
        FaultProxy(pocketbase.url) as proxy,
        make_database(connection_params={**pocketbase.connection_params, "url": proxy.url}) as database,
    ):
        items = await items_of(database)
        assert isinstance(items, PocketBaseDocumentCollection)
        await fill(items, 1, 2, 3)
        withheld = Withheld()
        proxy.plan("GET", f"/api/collections/{prefix}_items/records", withheld)
        deletion = asyncio.create_task(items.delete_many({"rank": {"$lt": 9}}))
        await withheld.reached.wait()
        await items.update_one({"rank": {"$eq": 1}}, change(name="renamed"))
        await items.update_one({"rank": {"$eq": 2}}, change(rank=10))
        withheld.open()
        assert await deletion == 2
        assert ids(await items.find({})) == ["i00002"]


async def test_many_who_delete_many_share_the_documents(two_servers: tuple[Items, Items]) -> None:
    one, other = two_servers
    assert isinstance(one, PocketBaseDocumentCollection) and isinstance(other, PocketBaseDocumentCollection)
    await asyncio.gather(*(one.insert_one(item(number)) for number in range(300)))
    counts = await asyncio.gather(*(items.delete_many({}) for items in (one, other, one, other)))
    assert sum(counts) == 300
    assert (await other.find({})).total_count == 0
