"""Opening a collection brings older documents up to date and leaves all others alone, at a cost that depends on
neither. What cannot be migrated is set aside, and nothing is ever lost."""

from __future__ import annotations

import asyncio
import sqlite3
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypedDict, cast

import httpx
import msgspec
import pytest
import pytest_asyncio
from parlant.core.common import Version
from parlant.core.customers import CustomerId
from parlant.core.persistence.common import MigrationRequired, ObjectId
from parlant.core.persistence.document_database import BaseDocument, identity_loader, identity_loader_for
from parlant.core.sessions import EventKind, EventSource, SessionId
from parlant.core.tags import TagId

from pb_cached import Config, PocketBaseDocumentDatabase, PocketBaseServer, open_stores
from pb_cached.errors import DocumentTooLarge, InvalidDocument, OutcomeUnknown, PocketBaseUnavailable
from pb_cached.pocketbase.ids import new_id
from pb_cached.stores import PocketBaseCustomerStore, Stores
from tests.conftest import DatabaseMaker

pytestmark = pytest.mark.slow


class OldNote(TypedDict, total=False):
    id: ObjectId
    creation_utc: str
    version: Version.String
    title: str


class LabelledNote(OldNote, total=False):
    labels: list[str]
    pinned: bool


class Note(TypedDict, total=False):
    id: ObjectId
    creation_utc: str
    version: Version.String
    text: str | None


class UnversionedNote(TypedDict, total=False):
    id: ObjectId
    creation_utc: str
    title: str


class OptionalVersion(TypedDict, total=False):
    id: ObjectId
    version: str | None


class TitledNote(Note, total=False):
    title: str


class Notes:
    """A store, as Parlant's: its loader is a method, and `VERSION` is what it writes. Keeps what it has loaded."""

    VERSION = Version.from_string("2.0.0")

    def __init__(self, on_load: Callable[[BaseDocument], Awaitable[None]] | None = None) -> None:
        self.loaded: list[str] = []
        self._on_load = on_load

    async def load(self, document: BaseDocument) -> Note | None:
        self.loaded.append(document["id"])
        if self._on_load is not None:
            await self._on_load(document)
        if document["version"] == "1.0.0":
            return cast(Note, migrated(document))
        return cast(Note, document) if document["version"] == "2.0.0" else None


def stamp(number: int) -> str:
    return f"2026-01-01T00:{number // 60:02}:{number % 60:02}+00:00"


def old_note(number: int, version: str = "1.0.0") -> Any:
    return {
        "id": ObjectId(f"n{number:04}"),
        "creation_utc": stamp(number),
        "version": version,
        "title": f"no. {number}",
    }


def migrated(old: Any) -> Any:
    return {"id": old["id"], "creation_utc": old["creation_utc"], "version": "2.0.0", "text": old["title"]}


async def older_server_wrote(
    make_database: DatabaseMaker, documents: Sequence[Any], schema: Any = OldNote
) -> None:
    async with make_database() as database:
        notes = await database.get_or_create_collection("notes", schema, identity_loader_for(schema))
        await asyncio.gather(*map(notes.insert_one, documents))


async def opened(
    database: PocketBaseDocumentDatabase,
    loader: Callable[[BaseDocument], Awaitable[Any]],
    schema: Any = Note,
) -> list[Any]:
    notes = await database.get_or_create_collection("notes", schema, loader)
    return list((await notes.find({})).items)


async def open_with(
    make_database: DatabaseMaker, loader: Callable[[BaseDocument], Awaitable[Any]], schema: Any = Note
) -> list[Any]:
    """The documents that a server finds which opens the collection with this loader."""
    async with make_database() as database:
        return await opened(database, loader, schema)


async def set_aside(make_database: DatabaseMaker) -> list[dict[str, Any]]:
    async with make_database() as database:
        failed = await database.get_or_create_collection("notes_failed_migrations", BaseDocument, identity_loader)
        return cast(list[dict[str, Any]], list((await failed.find({})).items))


@pytest_asyncio.fixture(params=["text", "JSON"])
async def version_column(request: pytest.FixtureRequest, make_database: DatabaseMaker) -> None:
    """Makes the collection first, with a column for the version that is of this kind from then on."""
    schema: Any = OldNote if request.param == "text" else OptionalVersion
    async with make_database() as database:
        await database.create_collection("notes", schema)


in_columns_of_each_kind = pytest.mark.usefixtures("version_column")


# --- which documents, and when --------------------------------------------------------------------------------


@in_columns_of_each_kind
async def test_only_older_documents_are_migrated(make_database: DatabaseMaker) -> None:
    await older_server_wrote(make_database, [old_note(n) for n in range(5)])
    await older_server_wrote(make_database, [{**migrated(old_note(n)), "text": "own"} for n in range(5, 8)], Note)
    newer = [
        {**migrated(old_note(n)), "version": "2.1.0", "surplus": {"of": "a newer server"}} for n in range(8, 10)
    ]
    await older_server_wrote(make_database, newer, Note)
    store = Notes()
    found = await open_with(make_database, store.load)
    assert sorted(store.loaded) == [old_note(n)["id"] for n in range(5)]
    assert found[:5] == [migrated(old_note(n)) for n in range(5)]
    assert [document["text"] for document in found[5:8]] == ["own"] * 3
    assert found[8:] == newer
    assert await set_aside(make_database) == []


@in_columns_of_each_kind
async def test_versions_are_compared_as_versions_not_as_text(make_database: DatabaseMaker) -> None:
    """As text, "10.0.0" comes before "2.0.0"."""
    newer = [
        {**migrated(old_note(n)), "version": version} for n, version in enumerate(["10.0.0", "2.0.10", "2.10.0"])
    ]
    await older_server_wrote(make_database, newer, Note)
    store = Notes()
    assert await open_with(make_database, store.load) == newer
    assert store.loaded == []


@in_columns_of_each_kind
async def test_a_second_opening_loads_nothing(make_database: DatabaseMaker) -> None:
    await older_server_wrote(make_database, [old_note(n) for n in range(5)])
    first, second = Notes(), Notes()
    assert await open_with(make_database, first.load) == await open_with(make_database, second.load)
    assert (len(first.loaded), second.loaded) == (5, [])


async def test_more_documents_than_a_page_are_migrated(make_database: DatabaseMaker) -> None:
    await older_server_wrote(make_database, [old_note(n) for n in range(250)])
    assert await open_with(make_database, Notes().load) == [migrated(old_note(n)) for n in range(250)]


async def test_fields_that_a_newer_schema_dropped_reach_the_loader(make_database: DatabaseMaker) -> None:
    old = {**old_note(1), "labels": ["a", "b"], "pinned": True, "undeclared": ["kept"]}
    await older_server_wrote(make_database, [old], LabelledNote)
    seen: list[dict[str, Any]] = []

    async def look(document: BaseDocument) -> None:
        seen.append(dict(document))

    await open_with(make_database, Notes(look).load)
    assert seen == [old]


@in_columns_of_each_kind
async def test_a_loader_without_a_store_settles_by_what_it_does(make_database: DatabaseMaker) -> None:
    """Its own version is the one that it brings documents to, and what is newer than that is left alone."""
    calls: list[str] = []

    async def load(document: BaseDocument) -> Note | None:
        calls.append(document["id"])
        return await Notes().load(document)

    newer = {**migrated(old_note(9)), "version": "3.0.0"}
    await older_server_wrote(make_database, [old_note(n) for n in range(150)])
    await older_server_wrote(make_database, [newer], Note)
    expected = [*(migrated(old_note(n)) for n in range(150)), newer]
    expected.sort(key=lambda document: (document["creation_utc"], document["id"]))
    for _ in range(2):
        calls.clear()
        found = await open_with(make_database, load)
        assert sorted(found, key=lambda d: (d["creation_utc"], d["id"], d["version"])) == sorted(
            expected, key=lambda d: (d["creation_utc"], d["id"], d["version"])
        )
    assert len(calls) == 2  # one sample of each version


@in_columns_of_each_kind
async def test_a_loader_that_makes_every_document_anew_settles(make_database: DatabaseMaker) -> None:
    """What it leaves out, a column that the schema no longer has, does not make its document an older one."""
    calls: list[str] = []

    async def load(document: BaseDocument) -> Note:
        calls.append(document["id"])
        old = cast(Any, document)
        return cast(Note, migrated({**old, "title": old.get("title") or old.get("text")}))

    await older_server_wrote(make_database, [old_note(n) for n in range(20)])
    await open_with(make_database, load)
    calls.clear()
    await open_with(make_database, load)
    assert len(calls) == 1


async def test_documents_that_are_older_than_the_column_for_their_version_go_by_it_all_the_same(
    make_database: DatabaseMaker,
) -> None:
    documents = [old_note(n, version=f"{n}.0.0") for n in range(4)]
    await older_server_wrote(make_database, documents, UnversionedNote)
    store, next_one = Notes(), Notes()
    expected = [migrated(documents[1]), *documents[2:]]
    assert await open_with(make_database, store.load, TitledNote) == expected
    assert store.loaded == ["n0000", "n0001"]
    assert await open_with(make_database, next_one.load, TitledNote) == expected
    assert next_one.loaded == []
    assert await set_aside(make_database) == documents[:1]


# --- what cannot be migrated --------------------------------------------------------------------------------


async def returns_none(_: BaseDocument) -> Any:
    return None


async def raises(_: BaseDocument) -> Any:
    raise LookupError("no way on from here")


async def spoils_and_raises(document: BaseDocument) -> Any:
    cast(Any, document)["undeclared"].clear()
    cast(Any, document).update(title="spoiled", version="9.9.9")
    raise LookupError("no way on from here")


async def returns_a_list(_: BaseDocument) -> Any:
    return ["not", "a", "document"]


async def returns_what_is_not_json(document: BaseDocument) -> Any:
    return {**document, "version": "2.0.0", "text": {1, 2}}


REFUSALS = [returns_none, raises, spoils_and_raises, returns_a_list, returns_what_is_not_json]


class Picky(Notes):
    """Migrates every second document, and refuses each of the others in its own way."""

    async def load(self, document: BaseDocument) -> Note | None:
        number = int(document["id"][1:])
        if number % 2 == 0:
            return cast(Note, await REFUSALS[number // 2 % len(REFUSALS)](document))
        return await super().load(document)


async def test_what_cannot_be_migrated_is_set_aside_whole_and_the_rest_is_migrated(
    make_database: DatabaseMaker,
) -> None:
    documents = [{**old_note(n), "undeclared": {"z": [n], "a": "\ud800"}} for n in range(30)]
    await older_server_wrote(make_database, documents)
    for _ in range(2):
        assert await open_with(make_database, Picky().load) == [migrated(old_note(n)) for n in range(1, 30, 2)]
        assert await set_aside(make_database) == documents[::2]


@in_columns_of_each_kind
async def test_documents_of_no_version_are_set_aside(make_database: DatabaseMaker) -> None:
    strange = ["", "3.0", "latest", "1.0.0\x00", "2.0.0\x00", None, 7]
    documents = [{**old_note(n), "version": version} for n, version in enumerate(strange)]
    await older_server_wrote(make_database, [*documents, old_note(8)])
    await older_server_wrote(make_database, [migrated(old_note(9))], Note)
    assert await open_with(make_database, Notes().load) == [migrated(old_note(8)), migrated(old_note(9))]
    assert await set_aside(make_database) == documents


async def test_setting_aside_is_no_reason_to_lose_what_was_set_aside_before(make_database: DatabaseMaker) -> None:
    for number in (1, 2):
        await older_server_wrote(make_database, [old_note(number, version="0.1.0")])
        assert await open_with(make_database, Notes().load) == []
    assert await set_aside(make_database) == [old_note(1, version="0.1.0"), old_note(2, version="0.1.0")]


class Stumbling(Notes):
    """Raises an error at some documents."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    async def load(self, document: BaseDocument) -> Note | None:
        if document["id"] in ("n0000", "n0010", "n0049"):
            raise self._error
        return await super().load(document)


@pytest.mark.parametrize(
    "error",
    [
        PocketBaseUnavailable("not there"),
        OutcomeUnknown("no answer"),
        TimeoutError(),
        ConnectionResetError(),
        httpx.ConnectError("no route"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("of_a_store", [True, False], ids=["a store's", "nobody's"])
async def test_an_error_that_no_document_is_to_blame_for_ends_the_opening_and_sets_nothing_aside(
    make_database: DatabaseMaker, error: Exception, of_a_store: bool
) -> None:
    await older_server_wrote(make_database, [old_note(n) for n in range(50)])
    stumbling = Stumbling(error)

    async def load(document: BaseDocument) -> Note | None:
        return await stumbling.load(document)

    with pytest.raises(type(error)) as raised:
        await open_with(make_database, stumbling.load if of_a_store else load)
    assert raised.value is error
    assert any("were being migrated" in note for note in raised.value.__notes__)
    assert await set_aside(make_database) == []
    assert await open_with(make_database, Notes().load) == [migrated(old_note(n)) for n in range(50)]
    assert await set_aside(make_database) == []


@pytest.mark.parametrize("error", [InvalidDocument("not JSON"), DocumentTooLarge("too large")], ids=repr)
async def test_an_error_of_ours_that_a_document_is_to_blame_for_sets_it_aside(
    make_database: DatabaseMaker, error: Exception
) -> None:
    documents = [old_note(n) for n in range(50)]
    await older_server_wrote(make_database, documents)
    found = await open_with(make_database, Stumbling(error).load)
    stumbled = [documents[n] for n in (0, 10, 49)]
    assert found == [migrated(document) for document in documents if document not in stumbled]
    assert await set_aside(make_database) == stumbled


# --- interrupted, and together ------------------------------------------------------------------------------


async def test_a_cancelled_migration_is_finished_by_the_next_opening(make_database: DatabaseMaker) -> None:
    reached = asyncio.Event()

    async def stop_at_the_second_page(document: BaseDocument) -> None:
        if len(store.loaded) == 150:
            reached.set()
            await asyncio.Event().wait()

    await older_server_wrote(make_database, [old_note(n) for n in range(250)])
    store = Notes(stop_at_the_second_page)
    opening = asyncio.create_task(open_with(make_database, store.load))
    await reached.wait()
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    rest = Notes()
    assert await open_with(make_database, rest.load) == [migrated(old_note(n)) for n in range(250)]
    assert len(rest.loaded) == 150
    assert await set_aside(make_database) == []


class Fatal(BaseException):
    """As a signal would interrupt it."""


async def test_a_fatal_error_sets_nothing_aside_and_leaves_the_database_usable(
    make_database: DatabaseMaker,
) -> None:
    async def die_at_the_second_page(_: BaseDocument) -> None:
        if len(dying.loaded) == 150:
            raise Fatal

    await older_server_wrote(make_database, [old_note(n) for n in range(250)])
    dying = Notes(die_at_the_second_page)
    async with make_database() as database:
        with pytest.raises(Fatal):
            await opened(database, dying.load)
        assert await opened(database, Notes().load) == [migrated(old_note(n)) for n in range(250)]
    assert await set_aside(make_database) == []


async def test_two_servers_migrate_at_once(make_database: DatabaseMaker) -> None:
    documents = [old_note(n, version="1.0.0" if n % 10 else "0.1.0") for n in range(220)]
    await older_server_wrote(make_database, documents)
    together = asyncio.Barrier(2)

    async def meet(document: BaseDocument) -> None:
        if document["id"] in ("n0001", "n0101"):
            await together.wait()

    async with httpx.AsyncClient() as http, make_database() as one, make_database(http_client=http) as other:
        await asyncio.gather(opened(one, Notes(meet).load), opened(other, Notes(meet).load))
    assert await open_with(make_database, Notes().load) == [migrated(old_note(n)) for n in range(220) if n % 10]
    assert await set_aside(make_database) == documents[::10]


# --- Parlant's stores -----------------------------------------------------------------------------------------


class Requests:
    """An HTTP client that counts what is sent through it."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.http = httpx.AsyncClient(event_hooks={"request": [self._count]}, trust_env=False)

    async def _count(self, request: httpx.Request) -> None:
        self.sent[request.method] += 1


def config_for(prefix: str, *, migrate: bool = True) -> Config:
    names = {f"{store}_prefix": f"{prefix}_{store}" for store in ("session", "customer", "variable")}
    settings = {"stores": {**names, "migrate": migrate}, "coherence": {"mode": "off"}}
    return msgspec.convert(settings, Config)


def event(version: str, number: int) -> dict[str, Any]:
    """An event as the Parlant of that version wrote it."""
    document: dict[str, Any] = {
        "id": f"event-{version}",
        "creation_utc": stamp(number),
        "version": version,
        "session_id": "session-0.1.0",
        "source": "customer",
        "kind": "message",
        "offset": number,
        "correlation_id": f"trace-{version}",
        "data": {"message": f"written by {version}", "participant": {"display_name": "Ada"}},
        "deleted": False,
    }
    if version >= "0.7.0":
        document["trace_id"] = document.pop("correlation_id")
    if version >= "0.8.0":
        document["metadata"] = {"kept": version}
    return document


def session(version: str) -> dict[str, Any]:
    document: dict[str, Any] = {
        "id": f"session-{version}",
        "creation_utc": stamp(0),
        "version": version,
        "customer_id": "c",
        "agent_id": "a",
        "mode": "auto",
        "title": None,
        "consumption_offsets": {"client": 3},
    }
    if version >= "0.6.0":
        trace = "correlation_id" if version == "0.6.0" else "trace_id"
        document["agent_states"] = [{trace: "t", "applied_guideline_ids": ["g"], "journey_paths": {}}]
    if version >= "0.7.0":
        document["metadata"] = {"kept": version}
    return document


def schema_of(document: dict[str, Any]) -> Any:
    """A schema whose columns hold what the document holds."""
    plain = {str: str, int: int, bool: bool}
    make_schema: Any = TypedDict
    return make_schema("Older", {field: plain.get(type(value), Any) for field, value in document.items()})


async def older_parlant_wrote(make_database: DatabaseMaker, prefix: str, **documents: dict[str, Any]) -> None:
    async with make_database(collection_prefix=prefix) as database:
        for name, document in documents.items():
            older = await database.get_or_create_collection(name, schema_of(document), identity_loader)
            await older.insert_one(cast(Any, document))


EVENT_VERSIONS = ["0.1.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0"]


@pytest.mark.slow
async def test_sessions_and_events_of_every_older_parlant_are_read(
    make_database: DatabaseMaker, pocketbase: PocketBaseServer, prefix: str
) -> None:
    of_sessions = f"{prefix}_session"
    metadata = {"id": "m", "creation_utc": stamp(0), "version": "0.8.0"}
    await older_parlant_wrote(make_database, of_sessions, metadata=metadata)
    for number, version in enumerate(EVENT_VERSIONS):
        await older_parlant_wrote(
            make_database, of_sessions, events=event(version, number), sessions=session(version)
        )
    params = pocketbase.connection_params
    with pytest.raises(MigrationRequired) as required:
        async with open_stores(config_for(prefix, migrate=False), connection_params=params):
            pass
    assert str(required.value).startswith("Migration required for PocketBaseSessionStore.")
    assert "`migrate = true` under [stores]" in str(required.value)
    for _ in range(2):
        async with open_stores(config_for(prefix), connection_params=params) as stores:
            events = await stores.session_store.list_events(
                SessionId("session-0.1.0"), source=EventSource.CUSTOMER
            )
            sessions = (await stores.session_store.list_sessions()).items
            new = await stores.session_store.create_event(
                SessionId("session-0.8.0"), EventSource.CUSTOMER, EventKind.MESSAGE, "t", {"message": "new"}
            )
            assert new.trace_id == "t"
        assert [event.trace_id for event in events] == [f"trace-{version}" for version in EVENT_VERSIONS]
        assert [cast(Any, event.data)["message"] for event in events] == [
            f"written by {version}" for version in EVENT_VERSIONS
        ]
        assert events[-1].metadata == {"kept": "0.8.0"}
        assert {one.id: one.metadata.get("kept") for one in sessions} == {
            f"session-{version}": version if version >= "0.7.0" else None for version in EVENT_VERSIONS
        }
        assert {one.consumption_offsets["client"] for one in sessions} == {3}


class CountingCustomers(PocketBaseCustomerStore):
    """Counts what its loaders are asked."""

    loaded = 0

    async def _document_loader(self, doc: BaseDocument) -> Any:
        self.loaded += 1
        return await super()._document_loader(doc)

    async def _association_document_loader(self, doc: BaseDocument) -> Any:
        self.loaded += 1
        return await super()._association_document_loader(doc)


async def test_a_loader_that_goes_beyond_what_its_store_writes_settles(make_database: DatabaseMaker) -> None:
    """Parlant's customer store writes tag associations of 0.1.0, and its loader brings them to 0.2.0."""
    for number in range(3):
        async with make_database() as database, CountingCustomers(database, allow_migration=True) as store:
            assert store.loaded == 0
            await store.create_customer("Ada", id=CustomerId(f"c{number}"), tags=[TagId("vip"), TagId("new")])
            for known in range(number + 1):
                assert set((await store.read_customer(CustomerId(f"c{known}"))).tags) == {"vip", "new"}


async def test_tag_associations_that_another_database_brought_further_stay(make_database: DatabaseMaker) -> None:
    association = {
        "id": "a", "version": "0.2.0", "creation_utc": stamp(0), "customer_id": "c", "tag_id": "vip",
    }  # fmt: skip
    async with make_database() as database:
        associations = await database.get_or_create_collection(
            "customer_tag_associations", schema_of(association), identity_loader
        )
        await associations.insert_one(cast(Any, association))
    async with make_database() as database, CountingCustomers(database, allow_migration=True) as store:
        await store.create_customer("Ada", id=CustomerId("c"))
        assert (await store.read_customer(CustomerId("c"))).tags == ["vip"]
        assert store.loaded == 0


# --- what opening costs ----------------------------------------------------------------------------------------


async def append_events(stores: Stores, session_id: SessionId, count: int) -> None:
    collection = stores.session_store._event_collection
    offset = (await collection.find({})).total_count
    documents: list[Any] = [
        {
            **event("0.8.0", 1),
            "id": f"e{n}",
            "version": "0.9.0",
            "session_id": session_id,
            "offset": n,
        }
        for n in range(offset, offset + count)
    ]
    await asyncio.gather(*map(collection.insert_one, documents))


async def test_opening_asks_the_same_whatever_the_number_of_documents(
    pocketbase: PocketBaseServer, prefix: str
) -> None:
    async def requests_to_open(then_append: int) -> Counter[str]:
        requests = Requests()
        async with (
            requests.http,
            open_stores(
                config_for(prefix), connection_params=pocketbase.connection_params, http_client=requests.http
            ) as stores,
        ):
            sent = requests.sent.copy()
            await append_events(stores, SessionId("s"), then_append)
        return sent

    await requests_to_open(then_append=10)
    with_ten = await requests_to_open(then_append=3000)
    assert await requests_to_open(then_append=0) == with_ten


EVENTS_IN_STORE = 100_000
OPENINGS = 15


def insert_directly(data: Path, table: str, count: int) -> None:
    """Copies of the first record, in sessions of their own, into the database file of a stopped PocketBase."""
    with closing(sqlite3.connect(data / "pb_data" / "data.db")) as connection, connection:
        connection.row_factory = sqlite3.Row
        first = dict(connection.execute(f"SELECT * FROM `{table}` ORDER BY id LIMIT 1").fetchone())
        names = list(first)
        rows = (
            {**first, "id": new_id(), "doc_id": f"d{n}", "session_id": f"s{n % 1000}", "offset": n // 1000}
            for n in range(count)
        )
        connection.executemany(
            f"INSERT INTO `{table}` ({', '.join(f'`{name}`' for name in names)}) "
            f"VALUES ({', '.join('?' * len(names))})",
            (tuple(row.values()) for row in rows),
        )


@pytest.mark.soak
async def test_opening_takes_as_long_with_a_hundred_thousand_events_as_with_ten(
    folder: Path, record_property: Callable[[str, object], None]
) -> None:
    config = config_for("parlant")

    async def opening_times(server: PocketBaseServer) -> list[float]:
        times = []
        for _ in range(OPENINGS):
            start = time.perf_counter()
            async with open_stores(config, connection_params=server.connection_params):
                times.append(time.perf_counter() - start)
        return times

    async with PocketBaseServer(folder) as server:
        async with open_stores(config, connection_params=server.connection_params) as stores:
            await append_events(stores, SessionId("s"), 10)
        with_ten = await opening_times(server)
    insert_directly(folder, "parlant_session_events", EVENTS_IN_STORE)
    async with PocketBaseServer(folder) as server:
        with_many = await opening_times(server)
        async with open_stores(config, connection_params=server.connection_params) as stores:
            held = await stores.session_store._event_collection.find({}, limit=1)
    assert held.total_count == EVENTS_IN_STORE + 10
    for name, times in (("with ten", with_ten), ("with many", with_many)):
        low, median, high = min(times), statistics.median(times), max(times)
        record_property(name, f"{median * 1000:.1f} ms ({low * 1000:.1f} to {high * 1000:.1f})")
        print(f"\nopening {name}: {median * 1000:.1f} ms ({low * 1000:.1f} to {high * 1000:.1f})")
    assert statistics.median(with_many) <= 3 * statistics.median(with_ten) + 0.05
