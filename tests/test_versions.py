"""Versions of PocketBase differ in how one signs in, defines collections, writes filters and sends batches.
Documents are the same on all of them, from 0.22 on."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypedDict, cast

import pytest
import pytest_asyncio
from click.testing import CliRunner
from parlant.adapters.db.transient import TransientDocumentDatabase
from parlant.core.agents import AgentId
from parlant.core.common import Version
from parlant.core.persistence.common import Cursor, ObjectId, SortDirection, Where
from parlant.core.persistence.document_database import (
    CollectionIndex,
    DocumentCollection,
    DocumentDatabase,
    identity_loader_for,
)
from parlant.core.sessions import EventKind, EventSource

from pb_cached import Config, PocketBaseDocumentDatabase, PocketBaseServer, open_stores
from pb_cached.cli import main
from pb_cached.config import StoreSettings, find_address
from pb_cached.connection import connection_to
from pb_cached.errors import EmbeddedServerError, UniqueViolation
from pb_cached.pocketbase.server import find_binary
from pb_cached.telemetry import log_through
from tests.binaries import pocketbase_binary
from tests.strategies import NUMBERS, STRINGS, SURROGATES, Sample
from tests.test_codec import same_document

pytestmark = pytest.mark.slow

ACCOUNT: dict[str, Any] = {"admin_email": "admin@example.com", "admin_password": "correct-horse-battery"}
INSTALLED = "installed"
OLDER = ("0.22.27", "0.23.12", "0.38.2", "0.39.0")

_numbers = itertools.count(1)


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="session",
    params=[INSTALLED, *OLDER],
)
async def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[PocketBaseServer]:
    """A server of each version in turn."""
    version = request.param
    binary = find_binary() if version == INSTALLED else pocketbase_binary(version, request.config)
    async with PocketBaseServer(tmp_path_factory.mktemp(f"v{version}"), binary=binary, **ACCOUNT) as running:
        yield running


@pytest.fixture
def version(server: PocketBaseServer, request: pytest.FixtureRequest) -> str:
    return cast(str, request.node.callspec.params["server"])


Opener = Callable[[], PocketBaseDocumentDatabase]


@pytest.fixture
def opener(server: PocketBaseServer) -> Opener:
    """Makes databases of one prefix, one after another or at the same time."""
    prefix = f"versions{next(_numbers)}"

    def make() -> PocketBaseDocumentDatabase:
        return PocketBaseDocumentDatabase(
            None, server.connection_params, collection_prefix=prefix, config=Config()
        )

    return make


@pytest_asyncio.fixture
async def database(opener: Opener) -> AsyncIterator[PocketBaseDocumentDatabase]:
    async with opener() as opened:
        yield opened


async def samples_of(database: DocumentDatabase) -> DocumentCollection[Sample]:
    return await database.get_or_create_collection("samples", Sample, identity_loader_for(Sample))


def sample(number: int, **fields: Any) -> Sample:
    return cast(
        Sample,
        {
            "id": f"s{number:04}",
            "creation_utc": f"2026-01-01T00:{number // 60:02}:{number % 60:02}",
            "version": "1.0.0",
            "name": f"sample {number}",
            "mode": "auto",
            "offset": number,
            "score": 0.5,
            "deleted": False,
            "title": None,
            "data": {},
            "rev": 0,
            "extra": {},
            "f_x": "",
        }
        | fields,
    )


HOSTILE = [
    *(sample(n, name=text, title=text, data=text) for n, text in enumerate(STRINGS)),
    *(sample(500 + n, offset=number, score=number, data={"z": [number]}) for n, number in enumerate(NUMBERS)),
]  # fmt: skip
FILTERS: list[Where] = [
    *cast(list[Where], [{"name": {"$eq": text}} for text in STRINGS if text not in SURROGATES]),
    *cast(list[Where], [{"name": {"$ne": text}} for text in ("", "a\\", "it's", "\\'")]),
    *cast(list[Where], [{"offset": {"$gte": 2**53}}, {"offset": {"$eq": 2**53 + 1}}, {"score": {"$lt": 0}}]),
    {"$or": [{"name": {"$eq": "a\\'b"}}, {"$and": [{"offset": {"$gt": 2}}, {"offset": {"$lte": 5}}]}]},
    {"deleted": {"$eq": False}, "mode": {"$in": ["auto", "manual"]}, "offset": {"$nin": [1, 2]}},
    {"name": {"$in": [*STRINGS[:12]]}},
]  # fmt: skip


async def test_what_it_can_do_is_found_out(server: PocketBaseServer, version: str) -> None:
    config = Config()
    address = find_address(config, server.connection_params)
    async with connection_to(address, config, None, log_through(None)) as connection:
        found = connection.dialect
    assert (found.family, found.batch is not None, found.sql, found.escapes) == {
        "0.22.27": ("0.22", False, False, False),
        "0.23.12": ("0.23", True, False, False),
        "0.38.2": ("0.23", True, False, False),
        "0.39.0": ("0.23", True, True, False),
        INSTALLED: ("0.23", True, True, True),
    }[version]
    if found.batch is not None:
        assert found.batch.enabled
        assert found.batch.max_requests > config.writes.max_commit_records


async def test_hostile_documents_come_back_and_are_found_as_parlants_own_database_finds_them(
    database: PocketBaseDocumentDatabase,
) -> None:
    ours, oracle = await samples_of(database), await samples_of(TransientDocumentDatabase())
    for collection in (ours, oracle):
        await asyncio.gather(*(collection.insert_one(document) for document in HOSTILE))
    for where in FILTERS:
        found, expected = await ours.find(where), await oracle.find(where)
        assert found.total_count == expected.total_count, where
        for one, other in zip(found, expected, strict=True):
            assert same_document(cast(Any, one), cast(Any, other)), where
        page = await ours.find(where, limit=3)
        assert (list(page), page.total_count) == (list(found)[:3], found.total_count), where


async def test_updates_merge_and_deletions_delete(database: PocketBaseDocumentDatabase) -> None:
    samples = await samples_of(database)
    await asyncio.gather(*(samples.insert_one(sample(number)) for number in range(3)))
    fields = cast(Sample, {"title": "it's \\", "data": {"big": 2**60 + 1}, "offset": 2**53 + 1})
    updated = await samples.update_one({"id": {"$eq": "s0001"}}, fields)
    assert updated.updated_document == {**sample(1), **fields}
    assert await samples.find_one({"offset": {"$eq": 2**53 + 1}}) == {**sample(1), **fields}
    added = await samples.update_one({"id": {"$eq": "s0009"}}, sample(9), upsert=True)
    assert added.updated_document == sample(9)
    assert (await samples.delete_one({"title": {"$eq": "it's \\"}})).deleted_count == 1
    assert [document["id"] for document in await samples.find({})] == ["s0000", "s0002", "s0009"]


async def test_many_documents_are_found_page_by_page(database: PocketBaseDocumentDatabase) -> None:
    samples = await samples_of(database)
    await asyncio.gather(*(samples.insert_one(sample(number)) for number in range(1200)))
    assert [document["offset"] for document in await samples.find({})] == list(range(1200))
    page = await samples.find(
        {"deleted": {"$eq": False}},
        limit=5,
        cursor=Cursor(creation_utc=sample(700)["creation_utc"], id=ObjectId("s0700")),
        sort_direction=SortDirection.DESC,
    )
    assert [document["offset"] for document in page] == [699, 698, 697, 696, 695]
    assert (page.total_count, page.has_more) == (700, True)


async def test_filters_longer_than_it_takes_are_answered_too(database: PocketBaseDocumentDatabase) -> None:
    samples = await samples_of(database)
    long = "'😀" * 1500
    await asyncio.gather(*(samples.insert_one(sample(number)) for number in range(300)))
    await samples.insert_one(sample(300, name=long))
    names = [f"sample {number}" for number in range(0, 600, 2)]
    assert [document["offset"] for document in await samples.find({"name": {"$eq": long}})] == [300]
    assert (await samples.find({"name": {"$in": [*names, long]}})).total_count == 151
    assert (await samples.find({"$or": [{"name": {"$eq": name}} for name in names]})).total_count == 150
    assert (await samples.find({"name": {"$nin": [*names]}})).total_count == 151
    assert (await samples.find({"offset": {"$in": [*range(250)]}})).total_count == 250


async def test_a_unique_index_is_kept(database: PocketBaseDocumentDatabase) -> None:
    samples = await samples_of(database)
    index = CollectionIndex((("name", SortDirection.ASC), ("offset", SortDirection.DESC)), unique=True)
    for _ in range(2):
        await samples.ensure_indexes([index])
    await samples.insert_one(sample(1))
    with pytest.raises(UniqueViolation):
        await samples.insert_one(sample(2, name="sample 1", offset=1))
    await samples.insert_one(sample(2))
    with pytest.raises(UniqueViolation):
        await samples.update_one({"id": {"$eq": "s0002"}}, cast(Sample, {"name": "sample 1", "offset": 1}))
    assert [document["name"] for document in await samples.find({})] == ["sample 1", "sample 2"]


class Thing(TypedDict, total=False):
    id: ObjectId
    creation_utc: str
    version: Version.String
    name: str


class LongerThing(Thing, total=False):
    amount: int
    tags: list[str]


async def test_a_field_that_is_added_takes_nothing_away(opener: Opener) -> None:
    old: Any = {"id": "1", "creation_utc": "1", "version": "1.0.0", "name": "a\\"}
    new: Any = {**old, "id": "2", "amount": 3, "tags": ["x"]}
    async with opener() as database:
        things = await database.get_or_create_collection("things", Thing, identity_loader_for(Thing))
        await things.insert_one(old)
    for _ in range(2):
        async with opener() as database:
            longer = await database.get_or_create_collection(
                "things", LongerThing, identity_loader_for(LongerThing)
            )
            await longer.update_one({"id": {"$eq": "2"}}, new, upsert=True)
            assert list(await longer.find({})) == [old, new]
            assert list(await longer.find({"amount": {"$eq": 3}})) == [new]
        async with opener() as database:
            things = await database.get_or_create_collection("things", Thing, identity_loader_for(Thing))
            assert [thing["name"] for thing in await things.find({})] == ["a\\", "a\\"]


async def test_several_writers_do_not_disturb_each_other(opener: Opener, version: str) -> None:
    """Before 0.23 an update is not atomic, so there may be only one server."""
    async with AsyncExitStack() as stack:
        servers = 1 if version.startswith("0.22") else 3
        databases = [await stack.enter_async_context(opener()) for _ in range(servers)]
        collections = await asyncio.gather(*map(samples_of, databases))
        await collections[0].insert_one(sample(0))

        async def write(number: int) -> None:
            samples = collections[number % servers]
            await samples.insert_one(sample(number))
            field = ("name", "title", "f_x")[number % 3]
            await samples.update_one({"id": {"$eq": "s0000"}}, cast(Sample, {field: str(number)}))

        await asyncio.gather(*map(write, range(1, 61)))
        final = await collections[0].find_one({"id": {"$eq": "s0000"}})
        assert final is not None
        assert [int(str(text)) % 3 for text in (final["name"], final["title"], final["f_x"])] == [0, 1, 2]
        assert (await collections[-1].find({})).total_count == 61


async def test_collections_can_be_deleted(database: PocketBaseDocumentDatabase) -> None:
    await (await samples_of(database)).insert_one(sample(1))
    await database.delete_collection("samples")
    assert (await (await samples_of(database)).find({})).total_count == 0


async def test_conversations_are_resumed(server: PocketBaseServer) -> None:
    prefix = f"versions{next(_numbers)}"
    config = Config(
        stores=StoreSettings(
            session_prefix=f"{prefix}s", customer_prefix=f"{prefix}c", variable_prefix=f"{prefix}v"
        )
    )
    async with open_stores(config, connection_params=server.connection_params) as stores:
        customer = await stores.customer_store.create_customer("Ada")
        session = await stores.session_store.create_session(customer.id, AgentId("agent"))
        for number in range(5):
            await stores.session_store.create_event(
                session.id, EventSource.CUSTOMER, EventKind.MESSAGE, f"trace {number}", {"message": "it's \\"}
            )
        said = await stores.session_store.list_events(session.id)
    async with open_stores(config, connection_params=server.connection_params) as stores:
        assert await stores.customer_store.read_customer(customer.id) == customer
        assert await stores.session_store.read_session(session.id) == session
        assert await stores.session_store.list_events(session.id) == said
        assert [event.offset for event in said] == list(range(5))


async def test_the_doctor_tells_what_it_is_and_what_it_holds(
    server: PocketBaseServer, version: str, folder: Path
) -> None:
    prefix = f"versions{next(_numbers)}"
    prefixes: dict[str, Any] = {
        "session_prefix": f"{prefix}s",
        "customer_prefix": f"{prefix}c",
        "variable_prefix": f"{prefix}v",
    }
    async with open_stores(
        Config(stores=StoreSettings(**prefixes)), connection_params=server.connection_params
    ) as stores:
        await stores.customer_store.create_customer("Ada")
        path = stores.stats().customers.writes.path
    file = folder / "doctor.toml"
    file.write_text("[stores]\n" + "".join(f'{key} = "{name}"\n' for key, name in prefixes.items()), "utf-8")
    env = {f"POCKETBASE_{key.upper()}": value for key, value in server.connection_params.items()}
    command = ["doctor", "--json", "--config", str(file)]
    result = await asyncio.to_thread(CliRunner().invoke, main, command, env=env)
    assert result.exit_code == 0, result.output
    assert ACCOUNT["admin_password"] not in result.output
    report = json.loads(result.stdout)
    told = {finding["about"]: finding["found"] for finding in report["findings"]}
    assert (
        told["version"]
        == {
            "0.22.27": "before 0.23",
            "0.23.12": "0.23 to 0.38, or the SQL endpoint is closed to us",
            "0.38.2": "0.23 to 0.38, or the SQL endpoint is closed to us",
            "0.39.0": "0.39.0 to 0.39.8",
            INSTALLED: "0.40 or later",
        }[version]
    )
    assert told["account"] == f"superuser {ACCOUNT['admin_email']}, by password"
    ways = {"log": "log: by triggers", "batch": "batch: by /api/batch", "single": "one request for each write"}
    assert told["commits"].startswith(ways[path])
    assert told["realtime"] == "a stream opens, and a subscription is taken"
    assert told["requests"] == "16 MiB and more are taken"
    assert told["duplicates"] == "none"
    counts = {each["collection"]: each["records"] for each in report["collections"]}
    assert counts[f"{prefix}c_customers"] == counts[f"{prefix}c_metadata"] == 1


async def test_before_0_23_an_embedded_server_needs_a_password(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("old")
    binary = pocketbase_binary(OLDER[0], request.config)
    with pytest.raises(EmbeddedServerError, match="needs a password: pass admin_email and admin_password"):
        async with PocketBaseServer(folder, binary=binary):
            pass
    async with PocketBaseServer(folder, binary=binary, **ACCOUNT):
        pass
    async with PocketBaseServer(folder, binary=binary, **ACCOUNT):
        pass
