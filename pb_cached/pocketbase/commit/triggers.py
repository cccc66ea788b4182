"""The SQL of the log path: what makes the records of a log true in the collections beside it.

All of it is named by a digest of what it says, so several schemas of one collection, as the versions of an
application at work beside each other have them, live side by side; and whatever has another text than its name
says was changed by others, and is made anew. Nothing depends on who does it, or how often.

Triggers are of three kinds (facts: pocketbase, section 13):

* of a *layout*, on the log: applies commits whose operations have their columns in a certain order. Without it
  they cannot be made: the log has a unique index over `guard` where that is empty, as it is in every new commit,
  and in the one before it until a layout's trigger moves that aside. So the last commit bars the way (the first
  time a record that stands for none), and where a trigger is lacking, be it after a backup was restored, commits
  are refused, and never swallowed;
* the *fence*, on the log: refuses commits of the batch path;
* the *watch*, on a collection: raises `rev` where others write, notes it, and refuses what they write over a state
  that they have not seen.

No I/O.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from msgspec import Struct

BAR: Final = "zguard000000000"
"""The record that bars a log before its first commit, and tells that commits go by triggers."""
REMOVED: Final = "removed"
"""The layout that it has where our triggers were taken away."""
LOGS: Final = "pb_cached_logs"
EDITS: Final = "pb_cached_edits"
"""Our tables beside PocketBase's collections: which logs apply a commit at this moment, and what others have
edited."""
NAMES: Final = "pb_cached_"
"""What the names of our triggers begin with."""
STALE: Final = "stale"
FENCED: Final = "layout"
BARRED: Final = "guard"
"""Fields that a log's refusals blame: a revision is another; a commit of the batch path; nothing applies this
layout."""

TABLES: Final = (
    f"CREATE TABLE IF NOT EXISTS {LOGS} (log TEXT PRIMARY KEY, applying INTEGER NOT NULL)",
    f"CREATE TABLE IF NOT EXISTS {EDITS} (n INTEGER PRIMARY KEY AUTOINCREMENT, collection TEXT, record TEXT, "
    "at TEXT DEFAULT (strftime('%Y-%m-%d %H:%M:%fZ')))",
)

_DELETION: Final = "\nDELETE FROM "
"""By this a layout's trigger is known, and its collection, which follows."""
APPLIED: Final = (
    "SELECT name, tbl, trim(substr(t,1,instr(t,' ')-1),'`\"') c FROM (SELECT name, tbl_name tbl, "
    f"substr(sql,instr(sql,char(10)||'{_DELETION.strip()} ')+{len(_DELETION)}) t FROM sqlite_master "
    f"WHERE type='trigger' AND name GLOB '{NAMES}*' AND instr(sql,char(10)||'{_DELETION.strip()} '))"
)
"""Asks for the layouts' triggers, the logs that they are on, and the collections that they are for."""
ORPHANED: Final = (
    f"SELECT name FROM ({APPLIED}) WHERE c NOT IN (SELECT name FROM sqlite_master WHERE type='table')"
)
"""Asks for the triggers of collections that were deleted."""

_NOW: Final = "strftime('%Y-%m-%d %H:%M:%fZ')"


class Slot(Struct, frozen=True):
    """A column, and what it holds where a commit says nothing."""

    column: str
    default: str
    """An SQL literal."""
    within: tuple[str, ...] | None = None
    """A column that numbers the records which have the same values in these columns. A commit may leave the number
    open, and say but how far it is behind the highest one: by a text."""


class Trigger(Struct, frozen=True):
    name: str
    table: str
    rest: str
    """All that follows the name."""

    @property
    def sql(self) -> str:
        """As SQLite keeps it."""
        return f"CREATE TRIGGER {self.name} {self.rest}"

    @property
    def creation(self) -> str:
        return f"CREATE TRIGGER IF NOT EXISTS {self.name} {self.rest}"


class CommitLayout(Struct, frozen=True):
    """A collection, and the order in which a commit's operations have its columns.

    An insert is `[id, column, ...]` (see `Slot.within`), an update `[id, rev, column, ...]` with null for what it
    does not name, a deletion `[id, rev]`.
    """

    log: str
    collection: str
    slots: tuple[Slot, ...]

    @property
    def key(self) -> str:
        """What a commit calls it by."""
        return _digest(self._body)

    @property
    def columns(self) -> frozenset[str]:
        """All that the trigger names."""
        return frozenset(self._inserted)

    @property
    def _inserted(self) -> tuple[str, ...]:
        """The columns of an insert, in the order of its values."""
        return ("id", *(slot.column for slot in self.slots), "rev", "updated")

    @property
    def _body(self) -> str:
        c, log = self.collection, self.log
        values = ["_v->>0", *map(self._inserted_value, self.slots), "1", _NOW]
        changes = [f"`{slot.column}`=ifnull(_v->>{n},`{slot.column}`)" for n, slot in enumerate(self.slots, 2)]
        stale = _refusal(log, STALE, "changes()<>")
        # The columns of json_each have names that fields have too; none of ours begins as `_v` does.
        return (
            # Inserting it is refused too, but after what it applies: this says why.
            f"{_refusal(log, 'id', f'EXISTS (SELECT 1 FROM `{log}` WHERE id=NEW.id)')};\n"
            f"{passed(log)};\n"
            f"UPDATE {LOGS} SET applying=1 WHERE log='{log}';\n"
            # Deletions first: what is inserted may have what was unique to them.
            f"DELETE FROM `{c}` WHERE (id,rev) IN "
            f"(SELECT value->>0,value->>1 FROM jsonb_each(jsonb(NEW.payload),'$.d'));\n"
            f"{stale}ifnull(json_array_length(NEW.payload,'$.d'),0);\n"
            f"UPDATE `{c}` SET {','.join(changes)},rev=rev+1,updated={_NOW} "
            f"FROM (SELECT value _v FROM jsonb_each(jsonb(NEW.payload),'$.u')) WHERE id=_v->>0 AND rev=_v->>1;\n"
            f"{stale}ifnull(json_array_length(NEW.payload,'$.u'),0);\n"
            f"INSERT INTO `{c}`({','.join(f'`{name}`' for name in self._inserted)}) SELECT {','.join(values)} "
            f"FROM (SELECT value _v FROM jsonb_each(jsonb(NEW.payload),'$.c'));\n"
            f"UPDATE {LOGS} SET applying=0 WHERE log='{log}';\n"
        )

    def _inserted_value(self, slot: Slot) -> str:
        at = {slot.column: f"_v->>{n}" for n, slot in enumerate(self.slots, 1)}
        said = {slot.column: f"ifnull({at[slot.column]},{slot.default})" for slot in self.slots}
        if slot.within is None:
            return said[slot.column]
        value = at[slot.column]
        same = " AND ".join(f"`{column}`={said[column]}" for column in slot.within) or "1"
        highest = f"SELECT ifnull(max(`{slot.column}`),-1) FROM `{self.collection}` WHERE {same}"
        return f"CASE typeof({value}) WHEN 'text' THEN ({highest})+({value}) ELSE {said[slot.column]} END"

    @property
    def trigger(self) -> Trigger:
        head = f"BEFORE INSERT ON `{self.log}` WHEN NEW.layout='{self.key}' BEGIN\n"
        return Trigger(f"{NAMES}{self.key}", self.log, f"{head}{self._body}END")


def fence(log: str) -> Trigger:
    """What keeps commits of the batch path out of a log."""
    return _named(
        log, f"BEFORE INSERT ON `{log}` WHEN NEW.layout='' AND NEW.n>0 BEGIN\n{_refusal(log, FENCED, '1')};\nEND"
    )


def watch(log: str, collection: str) -> list[Trigger]:
    """What looks after a collection when others than commits write to it."""
    c = collection
    foreign = f"ifnull((SELECT applying FROM {LOGS} WHERE log='{log}'),0)=0"
    note = f"INSERT INTO {EDITS}(collection,record) VALUES('{c}',"
    return [
        # PocketBase writes back the whole row that it has read: what was changed meanwhile shows by the rev.
        _named(
            c,
            f"BEFORE UPDATE OF doc_id ON `{c}` WHEN NEW.rev IS NOT OLD.rev AND {foreign} BEGIN\n"
            f"{_refusal(c, 'rev', '1')};\nEND",
        ),
        _named(
            c,
            f"AFTER UPDATE ON `{c}` WHEN NEW.rev IS OLD.rev AND {foreign} BEGIN\n"
            f"UPDATE `{c}` SET rev=rev+1 WHERE id=NEW.id;\n{note}NEW.id);\nEND",
        ),
        _named(
            c,
            f"AFTER INSERT ON `{c}` WHEN {foreign} BEGIN\n"
            f"UPDATE `{c}` SET rev=1 WHERE id=NEW.id AND rev<1;\n{note}NEW.id);\nEND",
        ),
        _named(c, f"AFTER DELETE ON `{c}` WHEN {foreign} BEGIN\n{note}OLD.id);\nEND"),
    ]


class Found(Struct, frozen=True):
    """What of ours there is in the database."""

    triggers: Mapping[str, Trigger]
    """By name."""
    tables: Mapping[str, frozenset[str]]
    """The columns of all tables, PocketBase's collections among them."""
    logs: frozenset[str]
    """Those that the table of logs has."""
    barred: frozenset[str]
    """Those that take no commit without its trigger."""


def orphans(found: Found) -> list[str]:
    """The statements that take away the triggers of collections that were deleted.

    While there is one, its log takes no commit, and no table of the whole database can be changed: PocketBase then
    believes that it has columns which are not there.
    """
    return [
        drop(trigger.name)
        for trigger in found.triggers.values()
        if (collection := applies_to(trigger)) and collection not in found.tables
    ]


def departure(collection: str, found: Found) -> list[str]:
    """The statements that take away what applies commits to a collection, so that it can be deleted."""
    return [drop(trigger.name) for trigger in found.triggers.values() if applies_to(trigger) == collection]


def repairs(log: str, layouts: Sequence[CommitLayout], found: Found) -> list[str]:
    """The statements after which commits of these layouts can be made; none where all is as it must be.

    Layouts of others stay, unless they are orphans, or commit to the same collection by another log: the watch
    would take each for a foreign hand to the other. One of ours whose columns are not all there is left as it
    is: where a person has renamed one, SQLite has written the new name into the trigger, and it works. One with
    the old name would stop every commit of the log, as each compiles all of its triggers.
    """
    statements = orphans(found)
    if not {LOGS, EDITS} <= found.tables.keys():
        statements += TABLES
    wanted = [fence(log)]
    for layout in layouts:
        if layout.columns <= found.tables.get(layout.collection, frozenset()):
            wanted += [layout.trigger, *watch(log, layout.collection)]
    statements += [drop(trigger.name) for trigger in _strays(log, layouts, found)]
    for trigger in wanted:
        there = found.triggers.get(trigger.name)
        if there is not None and there.sql != trigger.sql:
            statements.append(drop(trigger.name))
            there = None
        if there is None:
            statements.append(trigger.creation)
    if log not in found.logs:
        statements.append(f"INSERT OR IGNORE INTO {LOGS} VALUES('{log}',0)")
    if log not in found.barred:
        bar = f"INSERT INTO `{log}`(id,guard) VALUES('{BAR}','')"
        statements.append(passed(log))
        statements.append(f"{bar} ON CONFLICT(id) DO UPDATE SET guard='',layout=''")
    return statements


def _strays(log: str, layouts: Sequence[CommitLayout], found: Found) -> Iterator[Trigger]:
    collections = {layout.collection for layout in layouts}
    watches = [trigger for collection in collections for trigger in watch(log, collection)]
    names = {trigger.name for trigger in (fence(log), *watches)}
    for trigger in found.triggers.values():
        if collection := applies_to(trigger):
            is_stray = collection in collections and trigger.table != log
        else:
            is_stray = trigger.table in {log, *collections}
        if is_stray and trigger.name not in names:
            yield trigger


def faults(log: str, found: Found) -> list[str]:
    """What is not as it must be about the triggers of a log, whatever the layouts that commits go by. Empty where
    all is."""
    lost = orphans(found)
    said = ["those of deleted collections are still there"] if lost else []
    if len(repairs(log, (), found)) > len(lost):
        said.append("the log's own are not as they were made")
    for trigger in found.triggers.values():
        collection = applies_to(trigger)
        if trigger.table != log or collection not in found.tables:
            continue
        key = trigger.name.removeprefix(NAMES)
        head = f"BEFORE INSERT ON `{log}` WHEN NEW.layout='{key}' BEGIN\n"
        if _digest(trigger.rest.removeprefix(head).removesuffix("END")) != key:
            said.append(f"one that applies commits to '{collection}' was changed")
        if any(each.sql != getattr(found.triggers.get(each.name), "sql", "") for each in watch(log, collection)):
            said.append(f"those that look after '{collection}' are not as they were made")
    return list(dict.fromkeys(said))


def applied(log: str, found: Found) -> frozenset[str]:
    """The collections that the commits of a log are applied to."""
    of_log = (trigger for trigger in found.triggers.values() if trigger.table == log)
    return frozenset(filter(None, map(applies_to, of_log)))


def passed(log: str) -> str:
    """The statement after which no record bars the log."""
    return f"UPDATE `{log}` SET guard=id WHERE guard=''"


def removal(log: str, found: Found) -> list[str]:
    """The statements that take our triggers away from a log. The data stays, and so does the bar: a server that is
    still at work would else write where nothing applies it."""
    if not {LOGS, log} <= found.tables.keys():
        return []
    of_log = [trigger for trigger in found.triggers.values() if trigger.table == log]
    tables = {log, *map(applies_to, of_log)}
    return [
        *(drop(trigger.name) for trigger in found.triggers.values() if trigger.table in tables),
        f"DELETE FROM {LOGS} WHERE log='{log}'",
        f"UPDATE `{log}` SET layout='{REMOVED}' WHERE id='{BAR}'",
    ]


def drop(name: str) -> str:
    """The statement that takes a trigger away."""
    return f"DROP TRIGGER IF EXISTS {name}"


def applying(collection: str) -> str:
    """The SQL condition by which the layouts' triggers of a collection are found. Where that was renamed, SQLite
    has written its new name, in quotation marks of its own."""
    return " OR ".join(f"instr(sql,'{_DELETION.strip()} {quote}{collection}{quote}')" for quote in '`"')


def applies_to(trigger: Trigger) -> str:
    """The collection that a layout's trigger is for; empty for the other kinds."""
    _, found, rest = trigger.rest.partition(_DELETION)
    return rest.split(None, 1)[0].strip('`"') if found else ""


def _refusal(table: str, column: str, condition: str) -> str:
    """PocketBase reads the text of a unique index's failure, and tells the column."""
    return f"SELECT RAISE(ABORT,'UNIQUE constraint failed: {table}.{column}') WHERE {condition}"


def _named(table: str, body: str) -> Trigger:
    name = f"{NAMES}{_digest(body)}"
    return Trigger(name, table, body)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
