"""`pb-cached doctor` tells what is, on a real PocketBase, and changes nothing there."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import pytest_asyncio
from click.testing import CliRunner
from parlant.core.common import Version
from parlant.core.persistence.document_database_helper import MetadataDocument, load_metadata_document

from pb_cached import Config, PocketBaseServer, open_stores
from pb_cached.cli import main
from pb_cached.cli.doctor import server
from pb_cached.config import PocketBaseSettings, StoreSettings
from pb_cached.pocketbase.commit import triggers
from tests.conftest import DatabaseMaker
from tests.faults import EVERY, Exchange, Fault, FaultProxy, Gate, answer, at_most

TOO_LARGE = b"<html>413 Request Entity Too Large</html>"

pytestmark = pytest.mark.slow


class Told(NamedTuple):
    """What the doctor has said with `--json`."""

    status: int
    report: dict[str, Any]

    def about(self, what: str) -> list[tuple[str, str, str]]:
        """State, finding and advice."""
        findings = self.report["findings"]
        return [(each["state"], each["found"], each["advice"]) for each in findings if each["about"] == what]

    def the(self, what: str) -> tuple[str, str, str]:
        (finding,) = self.about(what)
        return finding


class Doctor:
    """Asks it about one test's stores."""

    def __init__(self, folder: Path, prefix: str, params: dict[str, str]) -> None:
        self.stores = StoreSettings(f"{prefix}_s", f"{prefix}_c", f"{prefix}_v")
        self.params = params
        self._file = folder / "doctor.toml"

    async def run(self, *arguments: str, sections: str = "", stores: str = "", **params: str) -> Any:
        prefixes = ("session_prefix", "customer_prefix", "variable_prefix")
        lines = [f'{name} = "{getattr(self.stores, name)}"' for name in prefixes]
        self._file.write_text("\n".join(["[stores]", *lines, stores, sections]), "utf-8")
        params = {**self.params, **params}
        env = {f"POCKETBASE_{name.upper()}": value for name, value in params.items()}
        command = ["doctor", "--config", str(self._file), *arguments]
        return await asyncio.to_thread(CliRunner().invoke, main, command, env=env)

    async def __call__(self, **options: str) -> Told:
        result = await self.run("--json", **options)
        return Told(result.exit_code, json.loads(result.stdout))

    async def open_stores(self, **options: Any) -> None:
        async with open_stores(Config(stores=self.stores, **options), connection_params=self.params):
            pass


@pytest.fixture
def doctor(folder: Path, prefix: str, pocketbase: PocketBaseServer) -> Doctor:
    return Doctor(folder, prefix, pocketbase.connection_params)


class Hands:
    """PocketBase itself, past us."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    async def sql(self, query: str) -> list[list[str]]:
        answer_ = await self.http.post("/api/sql", json={"query": query})
        return list(answer_.raise_for_status().json()["rows"])

    async def insert(self, collection: str, **record: Any) -> None:
        (await self.http.post(f"/api/collections/{collection}/records", json=record)).raise_for_status()

    async def delete(self, collection: str, record: str) -> None:
        (await self.http.delete(f"/api/collections/{collection}/records/{record}")).raise_for_status()

    async def indexes(self, collection: str, change: Callable[[list[str]], list[str]]) -> None:
        path = f"/api/collections/{collection}"
        before = (await self.http.get(path)).raise_for_status().json()["indexes"]
        (await self.http.patch(path, json={"indexes": change(before)})).raise_for_status()

    async def make_plain(self, collection: str, *columns: str) -> None:
        """Make a unique index one that lets duplicates in, as it was before there were unique ones."""
        name = f"idx_{collection}__{'_'.join(columns)}"
        plain = f"CREATE INDEX `{name}` ON `{collection}` ({', '.join(f'`{each}`' for each in columns)})"
        await self.indexes(collection, lambda before: [plain, *(sql for sql in before if f"{name}`" not in sql)])

    async def everything(self) -> Any:
        """The schema, the settings, and all records of tables that are not PocketBase's own."""
        schema = await self.sql("SELECT type, name, sql FROM sqlite_master ORDER BY name")
        ours = "type='table' AND name NOT GLOB '[_]*' AND name NOT GLOB 'sqlite*'"
        tables = [name for (name,) in await self.sql(f"SELECT name FROM sqlite_master WHERE {ours}")]
        records = {table: await self.sql(f"SELECT * FROM `{table}` ORDER BY 1") for table in tables}
        return schema, records, (await self.http.get("/api/settings")).json()


def hands_of(params: dict[str, str]) -> httpx.AsyncClient:
    headers = {"Authorization": params["admin_token"]}
    return httpx.AsyncClient(base_url=params["url"], headers=headers, trust_env=False, timeout=30)


@pytest_asyncio.fixture
async def hands(pocketbase: PocketBaseServer) -> AsyncIterator[Hands]:
    async with hands_of(pocketbase.connection_params) as http:
        yield Hands(http)


# what is well


async def test_a_new_pocketbase_can_be_used_and_is_left_as_it_was(folder: Path, prefix: str) -> None:
    async with (
        PocketBaseServer(folder / "new") as fresh,
        hands_of(fresh.connection_params) as http,
    ):
        doctor, hands = Doctor(folder, prefix, fresh.connection_params), Hands(http)
        before = await hands.everything()
        told = await doctor()
        assert await hands.everything() == before
    assert told.status == 0 and told.report["usable"]
    assert all(each["state"] == "good" for each in told.report["findings"])
    assert told.the("commits")[1] == 'log: by triggers; they are made at the first start, commit = "auto"'
    assert told.the("batch API")[1] == "off; the first start sets it to 202 requests"
    assert told.the("collections")[1] == "none of ours yet; the first start makes them"


async def test_stores_that_were_opened_are_well_and_left_as_they_were(doctor: Doctor, hands: Hands) -> None:
    await doctor.open_stores()
    before = await hands.everything()
    told = await doctor(sections='[coherence]\nmode = "exclusive"')
    assert await hands.everything() == before
    assert told.status == 0
    assert [each for each in told.report["findings"] if each["state"] != "good"] == []
    assert told.the("triggers")[1] == "complete, for 11 collections"
    counts = {each["collection"]: each["records"] for each in told.report["collections"]}
    of = doctor.stores
    assert counts[f"{of.session_prefix}_metadata"] == counts[f"{of.customer_prefix}_metadata"] == 1
    assert counts[f"{of.session_prefix}_events"] == 0


async def test_a_person_gets_a_table_without_any_secret(doctor: Doctor) -> None:
    await doctor.open_stores()
    for options in ((), ("--json",)):
        result = await doctor.run(*options)
        assert result.exit_code == 0
        assert doctor.params["url"] in result.output
        assert doctor.params["admin_token"] not in result.output
        assert "superuser, by a token that ends on 20" in result.output
        assert f"{doctor.stores.session_prefix}_events" in result.output
    assert "It can be used" in (await doctor.run()).output


# what cannot be used


@pytest.mark.parametrize(
    ("params", "about", "reason"),
    [
        ({"url": "http://127.0.0.1:9"}, "URL", "no answer (ConnectError: connection refused)"),
        ({"admin_token": "s3cr3t-beyond-guessing"}, "account", "does not accept the token as a superuser's"),
        ({"url": "http://127.0.0.1:99999"}, "configuration", "expected a URL such as"),
        ({"admin_token": ""}, "configuration", "no credentials for PocketBase at http://"),
    ],
)
async def test_what_cannot_be_used_is_told_with_the_reason_and_no_secret(
    doctor: Doctor, params: dict[str, str], about: str, reason: str
) -> None:
    told = await doctor(**params)
    assert told.status == 1 and not told.report["usable"]
    (state, found, _) = told.the(about)
    assert state == "bad" and reason in found
    result = await doctor.run(**params)
    assert result.exit_code == 1
    assert "It cannot be used as it is." in result.output
    assert "s3cr3t" not in result.output + json.dumps(told.report)


async def test_something_else_at_the_url_is_no_pocketbase(doctor: Doctor, proxy: FaultProxy) -> None:
    proxy.plan("GET", "/api/health", answer(200, b"<html>It works!</html>"), at=EVERY)
    told = await doctor(url=proxy.url)
    assert told.status == 1
    assert "does not answer like PocketBase" in told.the("URL")[1]


async def test_a_collection_of_somebody_else_in_our_place_is_told(doctor: Doctor, hands: Hands) -> None:
    name = f"{doctor.stores.session_prefix}_events"
    body = {"name": name, "type": "base", "fields": [{"name": "mine", "type": "text"}]}
    (await hands.http.post("/api/collections", json=body)).raise_for_status()
    told = await doctor()
    assert told.status == 1
    assert f"'{name}' was not made by pb_cached" in told.the("collections")[1]


@pytest.mark.parametrize(
    ("version", "stores", "status", "said"),
    [
        ("99.0.0", "", 1, "of version 99.0.0, newer than this Parlant's 0.9.0"),
        ("0.1.0", "", 1, "of version 0.1.0, older than this Parlant's 0.9.0"),
        ("0.1.0", "migrate = true", 0, "the next start brings it up to date"),
    ],
)
async def test_data_that_the_installed_parlant_cannot_read_is_told(
    doctor: Doctor, make_database: DatabaseMaker, version: str, stores: str, status: int, said: str
) -> None:
    async with make_database(collection_prefix=doctor.stores.session_prefix) as database:
        metadata = await database.get_or_create_collection("metadata", MetadataDocument, load_metadata_document)
        await metadata.insert_one({"id": "m", "creation_utc": "", "version": Version.String(version)})  # type: ignore[typeddict-item]
    told = await doctor(stores=stores)
    assert told.status == status
    assert said in told.the("data")[1]


# commits


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"commit": "log"},
        {"commit": "batch"},
        {"native_events": True},
        {"closed": "/api/sql"},
        {"closed": "/api/sql", "commit": "batch"},
        {"closed": "/api/sql", "commit": "log"},
        {"installed": True},
        {"installed": True, "commit": "batch"},
        {"installed": True, "native_events": True},
        {"installed": True, "closed": "/api/sql"},
    ],
)
async def test_the_path_that_is_told_is_the_one_that_a_database_takes(
    doctor: Doctor, proxy: FaultProxy, make_database: DatabaseMaker, settings: dict[str, Any]
) -> None:
    of = dict(settings)
    if of.pop("installed", False):
        await doctor.open_stores()
    if closed := of.pop("closed", ""):
        proxy.plan("POST", closed, answer(403), at=EVERY)
    toml = "[pocketbase]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in of.items())
    told = await doctor(url=proxy.url, sections=toml)
    params = {**doctor.params, "url": proxy.url}
    config = Config(pocketbase=PocketBaseSettings(**of))
    try:
        async with make_database(
            connection_params=params, config=config, collection_prefix=doctor.stores.session_prefix
        ) as database:
            assert told.the("commits")[1].partition(":")[0] == database.stats().writes.path
            assert told.status == 0
    except Exception as error:
        assert "commit" in str(error), error
        assert told.status == 1
        assert told.the("commits")[0] == "bad"


async def test_a_batch_api_that_nobody_may_switch_on_is_told(doctor: Doctor, proxy: FaultProxy) -> None:
    off = b'{"batch":{"enabled":false,"maxRequests":50,"timeout":3,"maxBodySize":0}}'
    proxy.plan("GET", "/api/settings", answer(200, off), at=EVERY)
    told = await doctor(url=proxy.url, sections='[pocketbase]\nmanage_settings = false\ncommit = "batch"')
    assert told.status == 0
    assert told.the("batch API")[:2] == ("weak", "off, and manage_settings = false")
    assert "allow 202 requests" in told.the("batch API")[2]
    assert told.the("commits")[1].startswith("one request for each write")


# what stands in between


@pytest.mark.parametrize(
    ("most", "found"),
    [
        (5 << 20, "4 MiB are taken, 16 MiB are refused"),
        (2 << 20, "1 MiB are taken, 4 MiB are refused"),
        (1 << 19, "less than 1 MiB are taken, 1 MiB are refused"),
    ],
)
async def test_how_much_a_proxy_lets_through_is_tried_out(
    doctor: Doctor, proxy: FaultProxy, most: int, found: str
) -> None:
    proxy.plan("POST", "/api/realtime", at_most(most, TOO_LARGE), at=EVERY)
    told = await doctor(url=proxy.url)
    assert told.the("requests")[:2] == ("weak", found)
    assert told.status == 0


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (Gate(), "the stream said nothing"),
        (answer(404), "the stream ends at once (status 404)"),
    ],
)
async def test_a_stream_that_does_not_come_through_is_told(
    doctor: Doctor, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, fault: Fault, found: str
) -> None:
    monkeypatch.setattr(server, "STREAM_SECONDS", 0.5)
    proxy.plan("GET", "/api/realtime", fault, at=EVERY)
    told = await doctor(url=proxy.url)
    assert told.the("realtime")[:2] == ("weak", found)


async def test_a_subscription_that_is_refused_is_told(doctor: Doctor, proxy: FaultProxy) -> None:
    async def refuse(exchange: Exchange) -> None:
        if b'"filling"' in exchange.body:
            await exchange.forward()
        else:
            await exchange.reply(400, b'{"data":{},"message":"Invalid realtime client.","status":400}')

    proxy.plan("POST", "/api/realtime", refuse, at=EVERY)
    told = await doctor(url=proxy.url)
    assert told.the("realtime")[:2] == ("weak", "a subscription is refused (status 400)")


@pytest.mark.parametrize(
    ("ahead", "state", "found"),
    [
        (0, "good", "as ours, to the second"),
        (90, "weak", "90 s ahead of ours"),
        (-3600, "weak", "3600 s behind ours"),
    ],
)
async def test_the_clocks_are_compared(
    monkeypatch: pytest.MonkeyPatch, ahead: int, state: str, found: str
) -> None:
    monkeypatch.setattr("pb_cached.cli.doctor.server.time.time", lambda: 1_800_000_000.5)

    def reply(_: httpx.Request) -> httpx.Response:
        headers = {"Date": formatdate(1_800_000_000 + ahead, usegmt=True)}
        return httpx.Response(200, headers=headers, json={"message": "API is healthy."})

    async with httpx.AsyncClient(transport=httpx.MockTransport(reply)) as http:
        seconds = (await server.health(http, "http://127.0.0.1:8090")).clock
    finding = server.clock(seconds)
    assert (finding.state, finding.found) == (state, found)


# triggers


@pytest.mark.parametrize(
    ("of", "said"),
    [
        ("log", "the log's own are not as they were made"),
        ("collection", "those that look after"),
        ("layout", "nothing applies commits to"),
        ("changed", "was changed"),
    ],
)
async def test_triggers_that_are_not_as_they_must_be_are_told_until_init_has_mended_them(
    doctor: Doctor, hands: Hands, of: str, said: str
) -> None:
    await doctor.open_stores()
    log, table = (f"{doctor.stores.session_prefix}_{name}" for name in ("events_log", "events"))
    of_table = f"FROM sqlite_master WHERE type='trigger' AND sql LIKE '%{table}%'"
    rows = await hands.sql(f"SELECT name, tbl_name, sql {of_table}")
    layout = next((name, sql) for name, on, sql in rows if on == log and "DELETE FROM" in sql)
    if of == "log":
        name = triggers.fence(log).name
        await hands.sql(f"DROP TRIGGER {name}")
    elif of == "collection":
        await hands.sql(f"DROP TRIGGER {next(name for name, on, _ in rows if on == table)}")
    else:
        await hands.sql(f"DROP TRIGGER {layout[0]}")
        if of == "changed":
            await hands.sql(layout[1].replace(",rev=rev+1", ",rev=rev+2"))
    told = await doctor()
    assert told.status == 0
    assert told.the("triggers")[0] == "weak"
    assert said in told.the("triggers")[1]
    await doctor.open_stores()
    assert (await doctor()).the("triggers")[0] == "good"


async def test_a_server_that_died_while_it_changed_a_collection_is_told(
    doctor: Doctor, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    await doctor.open_stores()
    log = f"{doctor.stores.session_prefix}_log"
    await hands.insert(log, id="z00000000000001", server="dead", n=0, guard="z00000000000001")
    assert (await doctor()).the("unfinished")[:2] == (
        "good", f"a server is changing a collection at this moment ({log})",
    )  # fmt: skip
    monkeypatch.setattr("pb_cached.cli.doctor.stored.TURN_SECONDS", -1.0)
    told = await doctor()
    assert told.status == 0
    assert told.the("unfinished")[0] == "weak"
    assert f"while it changed a collection ({log}, z00000000000001)" in told.the("unfinished")[1]


# records


WAYS = pytest.mark.parametrize("sql", [True, False], ids=["sql", "pages"])


@WAYS
async def test_counting_stops_at_a_bound(
    doctor: Doctor, hands: Hands, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, sql: bool
) -> None:
    monkeypatch.setattr("pb_cached.cli.doctor.stored.COUNTED", 3)
    await doctor.open_stores()
    names = [f"{doctor.stores.session_prefix}_{name}" for name in ("sessions", "events")]
    for name, count in zip(names, (3, 4), strict=True):
        for number in range(count):
            await hands.insert(name, id=f"a{number:014}", rev=1, session_id="s", offset=number)
    if not sql:
        proxy.plan("POST", "/api/sql", answer(403), at=EVERY)
    told = await doctor(url=proxy.url)
    counts = {each["collection"]: (each["records"], each["more"]) for each in told.report["collections"]}
    assert [counts[name] for name in names] == [(3, False), (3, True)]


@WAYS
async def test_duplicates_that_stand_against_unique_indexes_are_listed(
    doctor: Doctor, hands: Hands, proxy: FaultProxy, caplog: pytest.LogCaptureFixture, sql: bool
) -> None:
    await doctor.open_stores()
    of = doctor.stores
    events, values = f"{of.session_prefix}_events", f"{of.variable_prefix}_values"
    metadata = f"{of.customer_prefix}_metadata"
    await hands.make_plain(events, "session_id", "offset")
    await hands.make_plain(values, "variable_id", "key")
    keys = [("s1", 0), ("s1", 1), ("s2", 0), ("s1", 1), ("it's", 7), ("it's", 7), ("s1", 1)]
    for number, (session, offset) in enumerate(keys):
        record = {"session_id": session, "offset": offset, "version": "0.9.0"}
        await hands.insert(events, id=f"e{number:014}", rev=1, **record)
    for number, key in enumerate(["k", "a\0b", "a\0b", "K"]):
        await hands.insert(values, id=f"v{number:014}", rev=1, variable_id="v", key=key, version="0.3.0")
    await hands.insert(metadata, id="m00000000000002", rev=1, doc_id="m", version="0.1.0")
    if not sql:
        proxy.plan("POST", "/api/sql", answer(403), at=EVERY)
    told = await doctor(url=proxy.url)
    assert told.status == 0
    listed = {(each["collection"], *each["key"].values()): each["records"] for each in told.report["duplicates"]}
    first = listed.pop((metadata,))
    assert len(first) == 2 and first[1] == "m00000000000002"
    assert listed == {
        (events, "it's", "7"): ["e00000000000004", "e00000000000005"],
        (events, "s1", "1"): ["e00000000000001", "e00000000000003", "e00000000000006"],
        (values, "v", "a\0b"): ["v00000000000001", "v00000000000002"],
    }
    assert [state for state, _, _ in told.about("duplicates")] == ["weak"] * 3
    assert "e00000000000004" in (await doctor.run(url=proxy.url)).output

    config, logger = Config(stores=of), logging.getLogger("test")
    async with open_stores(config, logger=logger, connection_params=doctor.params):
        pass
    refused = [record.getMessage() for record in caplog.records if "index refused" in record.getMessage()]
    assert len(refused) == 2
    assert all("advice=`pb-cached doctor` lists what stands against" in message for message in refused)

    # as it is told to be done
    for number in (3, 5, 6):
        await hands.delete(events, f"e{number:014}")
    await hands.delete(values, "v00000000000002")
    await hands.delete(metadata, "m00000000000002")
    await doctor.open_stores()
    assert (await doctor()).the("duplicates")[:2] == ("good", "none")


@WAYS
async def test_duplicates_are_looked_for_among_so_many_records_and_no_more(
    doctor: Doctor, hands: Hands, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, sql: bool
) -> None:
    await doctor.open_stores()
    events = f"{doctor.stores.session_prefix}_events"
    await hands.indexes(events, lambda before: [sql for sql in before if "__session_id_offset`" not in sql])
    told = await doctor()
    assert told.the("duplicates")[:2] == (
        "weak", f"not looked for in '{events}': there is no index over session_id, offset yet",
    )  # fmt: skip
    await hands.make_plain(events, "session_id", "offset")
    for number in range(6):
        await hands.insert(events, id=f"e{number:014}", rev=1, session_id=f"s{number // 2}", offset=number % 2)
    await hands.insert(events, id="e00000000000009", rev=1, session_id="s2", offset=1)
    monkeypatch.setattr("pb_cached.cli.doctor.stored.SEARCHED", 2)
    monkeypatch.setattr("pb_cached.cli.doctor.stored.SEARCHED_BY_PAGE", 2)
    monkeypatch.setattr("pb_cached.pocketbase.dialect.Dialect.per_page", 2)
    if not sql:
        proxy.plan("POST", "/api/sql", answer(403), at=EVERY)
    told = await doctor(url=proxy.url)
    assert told.report["duplicates"] == []
    assert told.the("duplicates")[:2] == ("good", f"none in '{events}' among the first 2 records")


async def test_a_collection_that_is_open_to_others_is_told(doctor: Doctor, hands: Hands) -> None:
    await doctor.open_stores()
    name = f"{doctor.stores.customer_prefix}_customers"
    await hands.http.patch(f"/api/collections/{name}", json={"listRule": ""})
    told = await doctor()
    assert told.the("collections")[:2] == ("weak", f"'{name}' is open to others than superusers")


# without a URL


async def test_without_a_url_the_embedded_pocketbase_is_looked_at(folder: Path, prefix: str) -> None:
    doctor = Doctor(folder, prefix, {})
    sections = '[pocketbase]\ndata_dir = "data"'
    told = await doctor(sections=sections)
    assert told.status == 0
    assert "the first start makes a PocketBase of its own" in told.the("URL")[1]
    assert not (folder / "data").exists()
    async with PocketBaseServer(folder / "data") as started:
        await Doctor(folder, prefix, started.connection_params).open_stores()
        busy = await doctor(sections=sections)
    assert busy.status == 1
    assert "data" in busy.the("configuration")[1]
    told = await doctor(sections=sections)
    assert told.status == 0
    assert told.the("cache")[0] == "good"
    assert told.the("triggers")[1] == "complete, for 11 collections"
