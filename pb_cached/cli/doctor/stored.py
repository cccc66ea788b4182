"""Looking at what is stored in PocketBase: our collections, their triggers, and what stands in their way.

Nothing here takes longer for millions of records than for thousands: counts stop at a bound, and duplicates are
looked for along an index, up to a bound.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final, NamedTuple

import msgspec
from msgspec import Struct
from parlant.core.common import Version
from parlant.core.context_variables import ContextVariableDocumentStore
from parlant.core.customers import CustomerDocumentStore
from parlant.core.persistence.document_database import BaseDocument, CollectionIndex
from parlant.core.sessions import SessionDocumentStore

from pb_cached.cli.doctor.report import Count, Duplicate, Finding
from pb_cached.config import StoreSettings
from pb_cached.errors import ForeignCollection
from pb_cached.pocketbase.client import PocketBaseClient
from pb_cached.pocketbase.commit import triggers
from pb_cached.pocketbase.commit.installation import Installation, look
from pb_cached.pocketbase.commit.interface import records_path
from pb_cached.pocketbase.dialect import Dialect
from pb_cached.pocketbase.schema import (
    TURN_SECONDS,
    IndexSpec,
    Listed,
    SchemaEditor,
    column_name,
    document_collection,
    has_index,
    log_collection,
    owner_of,
)
from pb_cached.pocketbase.sql import Sql
from pb_cached.stores.sessions import OFFSETS
from pb_cached.stores.variables import TAGS, VALUES
from pb_cached.stores.versions import IDS, METADATA
from pb_cached.telemetry import Log
from pb_cached.writes import shared_log
from pb_cached.writes.logs import FAILURES

COUNTED: Final = 100_000
"""Nobody counts further."""
SEARCHED: Final = 2_000_000
"""Records among which duplicates are looked for by SQL: along an index, one or two seconds."""
SEARCHED_BY_PAGE: Final = 20_000
"""The same where there is no SQL for us."""
LISTED: Final = 20
"""Keys with duplicates that are listed, for each index, and records for each key."""


class Store(NamedTuple):
    """One of Parlant's stores: its prefix, what it must be of, and its collections."""

    prefix: str
    version: Version
    collections: tuple[str, ...]


class _Listing(Struct):
    items: list[Listed]


class _Record(Struct):
    id: str
    version: str = ""
    created: str = ""


class _Page(Struct, rename="camel"):
    items: list[_Record]
    total_items: int = -1


class _Rows(Struct):
    items: list[dict[str, str | int | float | bool | None]]


def stores(settings: StoreSettings) -> tuple[Store, ...]:
    return (
        Store(settings.session_prefix, SessionDocumentStore.VERSION, ("sessions", "events", METADATA)),
        Store(
            settings.customer_prefix,
            CustomerDocumentStore.VERSION,
            ("customers", "customer_tag_associations", METADATA),
        ),
        Store(
            settings.variable_prefix,
            ContextVariableDocumentStore.VERSION,
            ("variables", "variable_tag_associations", "values", METADATA),
        ),
    )


class Stored:
    """What the three stores have in a PocketBase. Reads, and nothing else."""

    def __init__(self, client: PocketBaseClient, dialect: Dialect, settings: StoreSettings, log: Log) -> None:
        self._client = client
        self._dialect = dialect
        self._log = log
        self._sql = Sql(client) if dialect.sql else None
        self._schema = SchemaEditor(client, dialect, log)
        self._settings = settings
        self._stores = stores(settings)
        self._listed: dict[str, Listed] = {}

    async def look(self) -> None:
        """Learn which of PocketBase's collections are ours."""
        size = self._dialect.per_page
        for page in itertools.count(1):
            params: dict[str, str | int] = {"perPage": size, "page": page, "skipTotal": 1}
            content = await self._client.call("GET", "/api/collections", params=params)
            listed = msgspec.json.decode(content, type=_Listing).items
            self._listed |= {each.name: each for each in listed if self._is_ours(each)}
            if len(listed) < size:
                return

    def _is_ours(self, listed: Listed) -> bool:
        owner = owner_of(listed.indexes)
        return any(
            listed.name.startswith(f"{store.prefix}_") and owner in ("log", str(len(store.prefix)))
            for store in self._stores
        )

    @property
    def logs(self) -> list[str]:
        return [name for name, listed in self._listed.items() if owner_of(listed.indexes) == "log"]

    @property
    def _documents(self) -> list[str]:
        return [name for name in self._listed if name not in self.logs]

    async def with_triggers(self) -> frozenset[str]:
        """The logs whose commits go by triggers."""
        found = []
        for log in self.logs:
            installation = Installation(self._client, self._schema, log, False, self._log)
            if await installation.is_there():
                found.append(log)
        return frozenset(found)

    # collections

    async def collections(self) -> tuple[list[Finding], list[Count]]:
        findings = []
        for store in self._stores:
            for spec in (
                log_collection(shared_log(store.prefix)),
                *(
                    document_collection(store.prefix, name, BaseDocument)
                    for name in (*store.collections, METADATA)
                ),
            ):
                try:
                    await self._schema.exists(spec)
                except ForeignCollection as error:
                    advice = "Choose other prefixes under [stores], or rename that collection"
                    findings.append(Finding("collections", "bad", str(error), advice))
        for name in (name for name, listed in self._listed.items() if listed.is_open):
            advice = "The next start closes it; find out who opened it"
            findings.append(Finding("collections", "weak", f"'{name}' is open to others than superusers", advice))
        counts = [await self._count(name) for name in sorted(self._listed)]
        if not findings:
            told = f"{len(counts)} of ours" if counts else "none of ours yet; the first start makes them"
            findings.append(Finding("collections", "good", told))
        return findings, counts

    async def _count(self, collection: str) -> Count:
        if self._sql is not None:
            rows = await self._sql.select(
                f"SELECT count(*) FROM (SELECT 1 FROM `{collection}` LIMIT {COUNTED + 1})"
            )
            records = int(rows[0][0])
            return Count(collection, min(records, COUNTED), records > COUNTED)
        # A total is counted to its end, so it is asked for only where the end is near.
        beyond = await self._page(collection, perPage=1, page=COUNTED + 1, skipTotal=1)
        if beyond.items:
            return Count(collection, COUNTED, True)
        return Count(collection, (await self._page(collection, perPage=1)).total_items, False)

    async def _page(self, collection: str, **params: str | int) -> _Page:
        known: dict[str, str | int] = {"sort": "id", "fields": "id,version,created"}
        content = await self._client.call("GET", records_path(collection), params=known | params)
        return msgspec.json.decode(content, type=_Page)

    # triggers

    async def triggers(self, with_triggers: Iterable[str]) -> Finding:
        logs = sorted(with_triggers)
        if not logs:
            return Finding("triggers", "good", "none")
        if self._sql is None:
            advice = "Open the SQL endpoint to us"
            return Finding(
                "triggers", "weak", "are there, and cannot be verified without the SQL endpoint", advice
            )
        faults: list[str] = []
        applied: set[str] = set()
        for log in logs:
            found = await look(self._sql, log)
            faults += [f"{log}: {fault}" for fault in triggers.faults(log, found)]
            applied |= triggers.applied(log, found)
        faults += [f"nothing applies commits to '{name}'" for name in self._documents if name not in applied]
        if faults:
            advice = "Commits that need them are refused. `pb-cached init`, like every start, mends them"
            return Finding("triggers", "weak", "; ".join(dict.fromkeys(faults)), advice)
        return Finding("triggers", "good", f"complete, for {len(applied)} collections")

    # versions

    async def versions(self, migrate: bool) -> list[Finding]:
        """Can the installed Parlant read the data?"""
        findings = []
        for store in self._stores:
            name = f"{store.prefix}_{METADATA}"
            if name not in self._listed:
                continue
            records = (await self._page(name, perPage=1, skipTotal=1)).items
            version = records[0].version if records else ""
            own = str(store.version.to_string())
            if not version or version == own:
                continue
            if Version.from_string(Version.String(version)) > store.version:
                advice = "Install a Parlant as new as that one, or choose other prefixes under [stores]"
                told = f"the data of '{store.prefix}' is of version {version}, newer than this Parlant's {own}"
                findings.append(Finding("data", "bad", told, advice))
            else:
                told = f"the data of '{store.prefix}' is of version {version}, older than this Parlant's {own}"
                advice = "Set migrate = true under [stores] to have it brought up to date"
                if migrate:
                    findings.append(Finding("data", "good", f"{told}; the next start brings it up to date"))
                else:
                    findings.append(Finding("data", "bad", told, advice))
        return findings or [Finding("data", "good", "of this Parlant's versions, or none yet")]

    # unfinished things

    async def unfinished(self, counts: Sequence[Count], now: datetime) -> list[Finding]:
        findings = []
        for log in self.logs:
            locks = await self._page(log, perPage=10, skipTotal=1, filter=f"id >= 'z' && id != '{triggers.BAR}'")
            for lock in locks.items:
                seconds = _age(lock.created, now)
                if seconds > TURN_SECONDS:
                    told = f"a server died {seconds:.0f} s ago while it changed a collection ({log}, {lock.id})"
                    advice = f"The next one that changes it waits for {TURN_SECONDS:g} s, and goes on"
                    findings.append(Finding("unfinished", "weak", told, advice))
                else:
                    told = f"a server is changing a collection at this moment ({log})"
                    findings.append(Finding("unfinished", "good", told))
        for count in counts:
            if count.collection.endswith(FAILURES) and count.records:
                told = f"{_number(count)} documents that could not be migrated are in '{count.collection}'"
                findings.append(Finding("unfinished", "weak", told, "Look at them there; no store reads them"))
        return findings or [Finding("unfinished", "good", "nothing")]

    # duplicates

    async def duplicates(self) -> tuple[list[Finding], list[Duplicate]]:
        """Records that stand against the unique indexes of our stores, where those are not there."""
        findings: list[Finding] = []
        found: list[Duplicate] = []
        of = self._settings
        for collection, index in (
            (f"{of.session_prefix}_events", OFFSETS),
            (f"{of.variable_prefix}_values", VALUES),
            (f"{of.variable_prefix}_variables", IDS),
            (f"{of.variable_prefix}_variable_tag_associations", TAGS),
        ):
            listed = self._listed.get(collection)
            spec = _spec(index)
            if listed is None or has_index(listed.indexes, spec, collection):
                continue
            columns = [name for name, _ in spec.columns]
            plain = msgspec.structs.replace(spec, unique=False)
            if not has_index(listed.indexes, plain, collection):
                told = f"not looked for in '{collection}': there is no index over {', '.join(columns)} yet"
                findings.append(Finding("duplicates", "weak", told, "The next start makes it"))
                continue
            some, all_of_it = await self._same(collection, columns)
            found += some
            searched = "" if all_of_it else f" among the first {self._searched:,} records"
            if some:
                more = " or more" if len(some) == LISTED else ""
                told = f"{len(some)}{more} keys twice in '{collection}'{searched}: its unique index is refused"
                advice = "Of each key, delete or change all records but one; the next start makes the index"
                findings.append(Finding("duplicates", "weak", told, advice))
            elif not all_of_it:
                findings.append(Finding("duplicates", "good", f"none in '{collection}'{searched}"))
        for store in self._stores:
            name = f"{store.prefix}_{METADATA}"
            if name in self._listed and len(records := (await self._page(name, perPage=LISTED)).items) > 1:
                found.append(Duplicate(name, {}, tuple(record.id for record in records)))
                told = f"{len(records)} records in '{name}', which should have one"
                findings.append(Finding("duplicates", "weak", told, "Delete all but the first in the dashboard"))
        return findings or [Finding("duplicates", "good", "none")], found

    @property
    def _searched(self) -> int:
        return SEARCHED_BY_PAGE if self._sql is None else SEARCHED

    async def _same(self, collection: str, columns: Sequence[str]) -> tuple[list[Duplicate], bool]:
        """Keys that several records have, and whether all records were looked at."""
        if self._sql is None:
            return await self._same_by_page(collection, columns)
        names = ",".join(f"`{column}`" for column in columns)
        first = f"`{columns[0]}`"
        # The bound is a key and not a number, so that records are grouped as they come out of the index.
        ordered = f"`{collection}` ORDER BY {names} LIMIT 1 OFFSET {SEARCHED}"
        end = await self._sql.select(f"SELECT {first} FROM {ordered}")
        within = f" WHERE {first}<={_literal(end[0][0])}" if end else ""
        keys = await self._sql.select(
            f"SELECT {names} FROM `{collection}`{within} GROUP BY {names} HAVING count(*)>1 "
            f"ORDER BY {names} LIMIT {LISTED}"
        )
        found = []
        for values in keys:
            key = dict(zip(columns, values, strict=True))
            same = " AND ".join(f"`{column}`={_literal(value)}" for column, value in key.items())
            records = await self._sql.select(
                f"SELECT id FROM `{collection}` WHERE {same} ORDER BY id LIMIT {LISTED}"
            )
            found.append(Duplicate(collection, key, tuple(id_ for (id_,) in records)))
        return found, not end

    async def _same_by_page(self, collection: str, columns: Sequence[str]) -> tuple[list[Duplicate], bool]:
        found: dict[tuple[str, ...], list[str]] = {}
        last: Mapping[str, object] = {}
        size = self._dialect.per_page
        for page in range(1, SEARCHED_BY_PAGE // size + 1):
            params: dict[str, str | int] = {
                "perPage": size, "page": page, "skipTotal": 1,
                "sort": ",".join([*columns, "id"]), "fields": ",".join([*columns, "id"]),
            }  # fmt: skip
            content = await self._client.call("GET", records_path(collection), params=params)
            rows = msgspec.json.decode(content, type=_Rows).items
            for row in rows:
                if last and all(row.get(column) == last.get(column) for column in columns):
                    key = tuple(str(row.get(column)) for column in columns)
                    found.setdefault(key, [str(last["id"])]).append(str(row["id"]))
                last = row
            if len(rows) < size:
                break
        else:
            return _listed(collection, columns, found), False
        return _listed(collection, columns, found), True


def _listed(
    collection: str, columns: Sequence[str], found: Mapping[tuple[str, ...], Sequence[str]]
) -> list[Duplicate]:
    return [
        Duplicate(collection, dict(zip(columns, key, strict=True)), tuple(ids[:LISTED]))
        for key, ids in itertools.islice(found.items(), LISTED)
    ]


def _spec(index: CollectionIndex) -> IndexSpec:
    columns = ("doc_id" if field == "id" else column_name(field) for field, _ in index.fields)
    return IndexSpec(tuple((column, False) for column in columns), unique=True)


def _literal(value: str) -> str:
    """SQL ends a statement at a NUL, so one is put together around it."""
    quoted = value.replace("'", "''").replace("\0", "'||char(0)||'")
    return f"('{quoted}')"


def _age(created: str, now: datetime) -> float:
    try:
        return (now - datetime.fromisoformat(created).astimezone(UTC)).total_seconds()
    except ValueError:
        return 0.0


def _number(count: Count) -> str:
    return f"more than {count.records:,}" if count.more else f"{count.records:,}"
