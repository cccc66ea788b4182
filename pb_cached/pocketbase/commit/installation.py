"""The log path's triggers in a PocketBase: installed, verified, repaired, removed through its SQL endpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import msgspec
from msgspec import Struct

from pb_cached.errors import RequestRejected, SchemaError
from pb_cached.pocketbase.client import Answer, PocketBaseClient
from pb_cached.pocketbase.commit import triggers
from pb_cached.pocketbase.commit.interface import records_path
from pb_cached.pocketbase.commit.triggers import CommitLayout, Found, Trigger
from pb_cached.pocketbase.schema import SchemaEditor, triggered_log_collection
from pb_cached.pocketbase.sql import MOST_CHARACTERS, Sql
from pb_cached.telemetry import Log

_ROWS = 1000
_ROUNDS = 5


class _Bar(Struct):
    layout: str | None = None


class Installation:
    """What the log path has put into PocketBase for one log.

    Mutable state: `_layouts`, those that this process commits by.
    """

    def __init__(self, client: PocketBaseClient, schema: SchemaEditor, name: str, sql: bool, log: Log) -> None:
        """
        Args:
            sql: may we use the SQL endpoint? Without it nothing can be verified or repaired.
        """
        self._client = client
        self._schema = schema
        self._barred, self._triggered = triggered_log_collection(name)
        self._name = name
        self._sql = Sql(client) if sql else None
        self._log = log
        self._layouts: dict[str, CommitLayout] = {}

    async def is_there(self) -> bool:
        """Do commits of this log go by triggers?"""
        answer = await self._client.send("GET", f"{records_path(self._name)}/{triggers.BAR}")
        return answer.ok and msgspec.json.decode(answer.content, type=_Bar).layout == ""

    async def prepare(self) -> None:
        """Make the log what triggers need. Its last column comes when they are there, so whoever finds that in
        what it has sent knows that it was not swallowed.

        Raises:
            SchemaError: it cannot be done.
        """
        if await self._schema.is_whole(self._triggered):
            return
        if self._sql is None:
            raise SchemaError(
                f"the log '{self._name}' is not as it must be, and the SQL endpoint, which it takes to mend it, "
                "is closed to us"
            )
        # Commits of the batch path have nothing in the new columns, and there may be many.
        await self._schema.ensure(msgspec.structs.replace(self._barred, indexes=()))
        await self._sql.run([triggers.passed(self._name)])
        await self._schema.ensure(self._barred)
        await self._repaired(self._sql)
        await self._schema.ensure(self._triggered)

    async def add(self, layout: CommitLayout) -> None:
        """See to it that commits of this layout can be made.

        Raises:
            SchemaError: it cannot be done.
        """
        if len(layout.trigger.creation) > MOST_CHARACTERS:
            raise SchemaError(
                f"collection '{layout.collection}' has {len(layout.slots)} columns, too many for PocketBase's SQL "
                'endpoint: set commit = "batch" under [pocketbase]'
            )
        self._layouts[layout.key] = layout
        await self.repair()

    async def leave(self, collection: str) -> None:
        """Apply no commits to a collection any more: it is about to be deleted."""
        self._layouts = {k: layout for k, layout in self._layouts.items() if layout.collection != collection}
        if self._sql is not None:
            found = await look(self._sql, self._name, [collection])
            await self._sql.run(triggers.departure(collection, found))

    async def applies(self, layout: CommitLayout) -> bool:
        """Is the layout's trigger there? Where nobody lets us look, it is taken to be."""
        if self._sql is None:
            return True
        query = f"SELECT name FROM sqlite_master WHERE type='trigger' AND name='{layout.trigger.name}'"
        return bool(await self._sql.select(query))

    async def repair(self) -> bool:
        """Make everything as it must be. Tells whether anything was not.

        Raises:
            SchemaError: PocketBase does not let us.
        """
        if self._sql is None:
            return False
        try:
            return await self._repaired(self._sql)
        except RequestRejected as error:
            self._log.warning(
                "the SQL endpoint is closed to us: the triggers that commits go by cannot be verified",
                log=self._name,
                reason=str(error),
            )
            return False

    async def _repaired(self, sql: Sql) -> bool:
        """Several servers may be at it: they all want the same. No turn is taken, as that takes a record in the
        log, and where a collection was deleted, its trigger lets none in."""
        layouts = tuple(self._layouts.values())
        collections = {layout.collection for layout in layouts}
        answer = Answer(200, b"")
        for round_ in range(_ROUNDS):
            found = await look(sql, self._name, collections)
            statements = triggers.repairs(self._name, layouts, found)
            if not statements:
                return round_ > 0
            answer = await sql.run(statements)
        reason = "they do not stay as they were made" if answer.ok else await self._client.rejection(answer, "SQL")
        raise SchemaError(f"the triggers of '{self._name}' could not be installed: {reason}")


async def look(sql: Sql, log: str, collections: Collection[str] | None = None) -> Found:
    """What of ours there is, as far as these collections and the log are concerned; None: all collections."""
    triggers_of = tables_of = "1"
    if collections is not None:
        applied = " OR ".join(map(triggers.applying, collections)) or "0"
        triggers_of = _short(f"(tbl_name IN ({_listed([log, *collections])}) OR {applied})")
        named = _listed([log, triggers.LOGS, triggers.EDITS, *collections])
        tables_of = _short(
            f"(name IN ({named}) OR name IN (SELECT c FROM ({triggers.APPLIED}) WHERE tbl='{log}'))"
        )
    found: dict[str, Trigger] = {}
    tables: dict[str, frozenset[str]] = {}
    last = ""
    while True:
        rows = await sql.select(
            "SELECT type, name, tbl_name, CASE type WHEN 'trigger' THEN sql "
            "ELSE (SELECT group_concat(c.name) FROM pragma_table_info(m.name) c) END FROM sqlite_master m "
            f"WHERE ((type='table' AND {tables_of}) OR "
            f"(type='trigger' AND name GLOB '{triggers.NAMES}*' AND {triggers_of})) AND name>'{last}' "
            f"ORDER BY name LIMIT {_ROWS}"
        )
        for type_, name, table, text in rows:
            if type_ == "table":
                tables[name] = frozenset(text.split(","))
            else:
                found[name] = Trigger(name, table, text.removeprefix(f"CREATE TRIGGER {name} "))
        if len(rows) < _ROWS:
            break
        last = rows[-1][1]
    kept: list[list[str]] = []
    if tables.keys() >= {triggers.LOGS, log}:
        kept = await sql.select(
            f"SELECT 'log', log FROM {triggers.LOGS} WHERE log='{log}' "
            f"UNION ALL SELECT 'bar', id FROM `{log}` WHERE id='{triggers.BAR}' AND layout='' "
            f"AND EXISTS (SELECT 1 FROM `{log}` WHERE guard='')"
        )
    return Found(
        triggers=found,
        tables=tables,
        logs=frozenset(value for kind, value in kept if kind == "log"),
        barred=frozenset(log for kind, _ in kept if kind == "bar"),
    )


def _short(condition: str) -> str:
    """A condition, unless it is too long for a call: then all is asked for."""
    return condition if len(condition) < (MOST_CHARACTERS - 500) // 2 else "1"


def _listed(names: Iterable[str]) -> str:
    return ",".join(f"'{name}'" for name in names)


async def drop_orphans(client: PocketBaseClient, log: Log) -> None:
    """Take away the triggers of collections that others have deleted, before anything else is changed."""
    sql = Sql(client)
    try:
        names = [name for (name,) in await sql.select(triggers.ORPHANED)]
        if names:
            log.warning("dropping the triggers of collections that were deleted", count=len(names))
            await sql.run([triggers.drop(name) for name in names])
    except RequestRejected as error:
        log.warning("the SQL endpoint is closed to us", reason=str(error))


async def uninstall(client: PocketBaseClient, logs: Iterable[str]) -> None:
    """Take all triggers away from these logs and their collections. The data stays.

    Raises:
        RequestRejected: PocketBase does not let us.
    """
    sql = Sql(client)
    found = await look(sql, "")
    for log in logs:
        await sql.change(*triggers.removal(log, found))
