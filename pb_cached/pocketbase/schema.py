"""Collections of ours: which columns and indexes hold a TypedDict's documents, and making sure that they exist.

A column remembers what it is in its PocketBase field id (`json_metadata`, `text_session_id`): so a renamed
column is recognised and given its name back with its data, and a column whose field another TypedDict does
not declare is still read and written as what it is. Nothing is ever dropped, and a collection without our
columns is somebody else's.

A column that is added later is of kind JSON, whatever its field's type: the documents that are there already do
not have the field, and only in such a column an empty text says so.

Changing a collection is read-modify-write in PocketBase, and concurrent changes lose each other's fields
(facts: pocketbase, section 2). So servers take turns, by a record in the database's log that only one of them can
create; and every change is read back, and made again until all of it is there.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
import secrets
import time
import types
import typing
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Annotated, Any, Final, Literal, NewType, get_args, get_origin

import msgspec
import typing_extensions
from msgspec import Struct

from pb_cached.errors import ForeignCollection, RequestRejected, SchemaError, named
from pb_cached.pocketbase.client import Answer, PocketBaseClient, missing_collection
from pb_cached.pocketbase.dialect import Dialect
from pb_cached.telemetry import Log

TEXT_MAX: Final = 2**53 - 1
"""PocketBase's default for a text column is 5000 characters; this is the most that it accepts."""

TURN_SECONDS = 60.0
"""A server that holds its turn for longer has died: changing a collection takes milliseconds, but an index over
millions of records takes seconds."""

NAME_MAX: Final = 100
"""Characters of a column's name, and of its field id, from 0.23 on. Before it was 255, but a PocketBase may be
brought up to date."""

_ROUNDS: Final = 12
_HIDDEN: Final = "f_x"
"""Before the hexadecimal bytes of a field's name that is no column's."""
_MARK: Final = "pbc_owner__"
_LOG: Final = "log"
_RULES: Final = ("listRule", "viewRule", "createRule", "updateRule", "deleteRule")
_PLAIN_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]*\Z")
_RESERVED: Final = frozenset(
    [
        "id",
        "doc_id",
        "rev",
        "extra",
        "updated",
        "created",
        "expand",
        "collectionid",
        "collectionname",
        "null",
        "true",
        "false",
        "_rowid_",
        "rowid",
    ]
)


class Kind(StrEnum):
    """How a column holds a field."""

    TEXT = "text"
    NUMBER = "number"
    BOOL = "bool"
    JSON = "json"
    """A text column that holds the exact JSON of the value; empty where the key is missing."""

    @property
    def default(self) -> str | int | bool:
        """What PocketBase stores where nothing is given. Columns never hold NULL."""
        return {Kind.NUMBER: 0, Kind.BOOL: False}.get(self, "")

    @property
    def pocketbase_type(self) -> str:
        return "text" if self is Kind.JSON else str(self)


class Column(Struct, frozen=True):
    """One field of a document, and the column that holds it."""

    field: str
    name: str
    kind: Kind

    @property
    def field_id(self) -> str:
        id_ = f"{self.kind}_{self.name}"
        if len(id_) <= NAME_MAX:
            return id_
        return f"{self.kind}_{hashlib.blake2b(self.name.encode(), digest_size=16).hexdigest()}"


class IndexSpec(Struct, frozen=True):
    """An index over columns: pairs of column name and "is it descending"."""

    columns: tuple[tuple[str, bool], ...]
    unique: bool = False
    where: str = ""
    """SQL that tells which records it covers; empty for all of them."""

    def name(self, collection: str) -> str:
        parts = "_".join(name + ("_desc" if descending else "") for name, descending in self.columns)
        return f"{'uidx' if self.unique else 'idx'}_{collection}__{parts}"

    def is_among(self, names: Collection[str], collection: str) -> bool:
        """Is there such an index, or one that is unique over the same columns, which serves as well?"""
        stricter = msgspec.structs.replace(self, unique=True)
        return self.name(collection) in names or stricter.name(collection) in names

    def sql(self, collection: str) -> str:
        parts = ", ".join(f"`{name}`" + (" DESC" if descending else "") for name, descending in self.columns)
        index = f"{'UNIQUE ' if self.unique else ''}INDEX `{self.name(collection)}`"
        return f"CREATE {index} ON `{collection}` ({parts})" + (f" WHERE {self.where}" if self.where else "")


class CollectionSpec(Struct, frozen=True):
    """A PocketBase collection of ours, as it must be."""

    name: str
    columns: tuple[Column, ...]
    indexes: tuple[IndexSpec, ...]
    system: tuple[tuple[str, str], ...]
    """Columns of ours beside the document's: pairs of name and PocketBase type."""
    owner: str
    """The length of the prefix, which tells `a` + `b_c` from `a_b` + `c`; `log` for a log."""

    def indexed_by(self, fields: Sequence[str]) -> CollectionSpec:
        """The same, with an index over these fields."""
        names = {column.field: column.name for column in self.columns} | {"id": "doc_id"}
        index = IndexSpec(tuple((names[field], False) for field in fields))
        return msgspec.structs.replace(self, indexes=(*self.indexes, index))

    @property
    def mark(self) -> str:
        """The name of an index that tells whose collection this is. PocketBase's index names are global, so the
        collection's own name is part of it."""
        return f"{_MARK}{self.owner}__{self.name}"

    @property
    def turns(self) -> str | None:
        """The log by which servers take turns at changing the collection: that which all quiet collections of
        its database share. None for a log itself."""
        return None if self.owner == _LOG else f"{self.name[: int(self.owner)]}_log"

    @property
    def mark_sql(self) -> str:
        """The mark costs nothing: it covers no record."""
        counter = next(name for name, type_ in self.system if type_ == "number")
        return f"CREATE INDEX `{self.mark}` ON `{self.name}` (`{counter}`) WHERE `{counter}` < 0"


IS_EXCEPTIONAL: Final = "extra > ''"
"""Tells the records whose columns do not hold all of the document, in SQL and in filters. They have an index of
their own, as they are few, and every page asks for them."""
DOCUMENT_SYSTEM: Final = (("doc_id", "text"), ("extra", "text"), ("rev", "number"), ("updated", "autodate"))
LOG_SYSTEM: Final = (
    ("server", "text"), ("n", "number"), ("created", "autodate"), ("layout", "text"), ("payload", "text"),
)  # fmt: skip
BARRED_LOG_SYSTEM: Final = (*LOG_SYSTEM, ("guard", "text"))
TRIGGERED_LOG_SYSTEM: Final = (*BARRED_LOG_SYSTEM, ("stale", "text"))
"""What the columns are for that a log has for triggers: see `commit.triggers`."""


class Layout(Struct, frozen=True):
    """What a collection really looks like: the declared columns with the kind that each really has, and the
    columns of fields that are no longer (or not yet) declared."""

    declared: tuple[Column, ...]
    undeclared: tuple[Column, ...]


def document_collection(prefix: str, name: str, schema: type[Mapping[str, Any]]) -> CollectionSpec:
    """The collection that holds documents of `schema`.

    Raises:
        SchemaError: the name cannot be a PocketBase collection's, or a field's cannot be a column's.
    """
    table = _checked_name(f"{prefix}_{name}")
    columns = columns_of(schema)
    by_field = {column.field: column.name for column in columns}
    exceptional = IndexSpec((("extra", False),), where=IS_EXCEPTIONAL)
    indexes = [IndexSpec((("doc_id", False),)), IndexSpec((("updated", False),)), exceptional]
    if "creation_utc" in by_field:
        indexes.append(IndexSpec(((by_field["creation_utc"], False), ("doc_id", False))))
    if "version" in by_field:
        indexes.append(IndexSpec(((by_field["version"], False),)))
    return CollectionSpec(table, columns, tuple(indexes), DOCUMENT_SYSTEM, owner=str(len(prefix)))


def log_collection(name: str) -> CollectionSpec:
    """A log: one record per commit, whose id is the receipt."""
    by_time = IndexSpec((("created", False),))  # by which it is read back after a gap
    return CollectionSpec(_checked_name(name), (), (by_time,), LOG_SYSTEM, owner=_LOG)


def triggered_log_collection(name: str) -> tuple[CollectionSpec, CollectionSpec]:
    """The same for the log path: as it is until its triggers are there, and as it is then."""
    bar = IndexSpec((("guard", False),), unique=True, where="guard = ''")
    log = log_collection(name)
    barred = msgspec.structs.replace(log, indexes=(*log.indexes, bar), system=BARRED_LOG_SYSTEM)
    return barred, msgspec.structs.replace(barred, system=TRIGGERED_LOG_SYSTEM)


def columns_of(schema: type[Mapping[str, Any]]) -> tuple[Column, ...]:
    """A column for each field of the TypedDict but `id`, which `doc_id` holds.

    Raises:
        SchemaError: a field's name is too long for a column.
    """
    columns: list[Column] = []
    taken: set[str] = set()
    for field, annotation in typing_extensions.get_type_hints(schema).items():
        if field == "id":
            continue
        name = column_name(field)
        if name.casefold() in taken:  # SQLite's columns do not tell case
            name = _hidden_name(field)
        if len(name) > NAME_MAX:
            raise SchemaError(
                f"field '{field:.120}' cannot have a column: its name would take {len(name)} characters, and "
                f"PocketBase allows {NAME_MAX}. That is {NAME_MAX} letters, digits and underscores, or "
                f"{(NAME_MAX - len(_HIDDEN)) // 2} bytes of a name that is not its column's and is written as hex"
            )
        taken.add(name.casefold())
        columns.append(Column(field, name, kind_of(annotation)))
    return tuple(columns)


def column_name(field: str) -> str:
    """The column of a field: its own name where that is free, else one from which it can be told."""
    if not _PLAIN_NAME.match(field) or "_via_" in field.casefold() or field.startswith(_HIDDEN):
        return _hidden_name(field)
    if field.casefold() in _RESERVED or field.startswith("f_"):
        return f"f_{field}"
    return field


def field_name(column: str) -> str:
    """The field that a column holds: `column_name` the other way round."""
    if column.startswith(_HIDDEN):
        try:
            return bytes.fromhex(column.removeprefix(_HIDDEN)).decode()
        except ValueError:
            return column
    return column.removeprefix("f_")


def _hidden_name(field: str) -> str:
    return _HIDDEN + field.encode("utf-8", "surrogatepass").hex()


def kind_of(annotation: Any) -> Kind:
    """The kind of column for a type: what is not plainly text, number or bool is kept as JSON."""
    while True:
        if isinstance(annotation, NewType):
            annotation = annotation.__supertype__
        elif get_origin(annotation) in (
            Annotated, typing.Required, typing.NotRequired, typing_extensions.ReadOnly,
        ):  # fmt: skip
            annotation = get_args(annotation)[0]
        else:
            break
    if get_origin(annotation) is Literal:
        return Kind.TEXT if all(isinstance(value, str) for value in get_args(annotation)) else Kind.JSON
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return Kind.JSON
    return {str: Kind.TEXT, bool: Kind.BOOL, int: Kind.NUMBER, float: Kind.NUMBER}.get(annotation, Kind.JSON)


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z]\w{0,239}", name, re.ASCII) or name.startswith("sqlite_") or "_via_" in name:
        raise SchemaError(
            f"'{name}' cannot be a PocketBase collection: expected a letter, then letters, digits and "
            "underscores; at most 240 of them, and no '_via_'"
        )
    return name


# --- what PocketBase says ---------------------------------------------------------------------------------


class _Field(Struct):
    name: str
    type: str
    id: str = ""


class Listed(Struct, frozen=True, kw_only=True):
    """A collection as PocketBase lists it, whoever's it is."""

    name: str
    indexes: list[str] = []
    listRule: str | None = None
    viewRule: str | None = None
    createRule: str | None = None
    updateRule: str | None = None
    deleteRule: str | None = None

    @property
    def is_open(self) -> bool:
        """May others than superusers do anything with it?"""
        return any(getattr(self, rule) is not None for rule in _RULES)


class _Collection(Listed, frozen=True, kw_only=True):
    id: str
    type: str = "base"
    fields: list[_Field] = []
    schema: list[_Field] = []  # 0.22

    @property
    def columns(self) -> list[_Field]:
        return self.fields or self.schema


_INDEX_NAME: Final = re.compile(
    r"CREATE\s+(?:UNIQUE\s+)?INDEX\s+(?:IF\s+NOT\s+EXISTS\s+)?[`\"\[]?(\w+)", re.IGNORECASE
)


def _index_name(sql: str) -> str:
    match = _INDEX_NAME.match(sql.strip())
    return match[1] if match else ""


def _index_names(collection: _Collection) -> set[str]:
    return {_index_name(sql) for sql in collection.indexes}


def owner_of(indexes: Sequence[str]) -> str | None:
    """Whose collection it is, by the SQL of its indexes: see `CollectionSpec.owner`. None: not one of ours."""
    marks = [name for name in map(_index_name, indexes) if name.startswith(_MARK)]
    return marks[0].removeprefix(_MARK).partition("__")[0] if marks else None


def has_index(indexes: Sequence[str], index: IndexSpec, collection: str) -> bool:
    """Is there just this index?"""
    return index.name(collection) in map(_index_name, indexes)


def _missing_indexes(found: _Collection, spec: CollectionSpec) -> list[str]:
    present = _index_names(found)
    wanted = [index.sql(spec.name) for index in spec.indexes if not index.is_among(present, spec.name)]
    return wanted if spec.mark in present else [*wanted, spec.mark_sql]


class _Lock(Struct):
    server: str = ""


class SchemaEditor:
    """Makes collections what they must be. One per connection; holds no state of its own."""

    def __init__(self, client: PocketBaseClient, dialect: Dialect, log: Log) -> None:
        self._client = client
        self._dialect = dialect
        self._log = log

    async def require(self, spec: CollectionSpec) -> None:
        """Is the collection as it was?

        Raises:
            CollectionNotFound: it is not there.
            SchemaError: somebody has taken columns away.
        """
        found = await self._read(spec.name)
        if found is None:
            raise missing_collection(f"look at '{spec.name}'")
        lacking = [field["name"] for field in self._missing(found, spec)]
        if lacking:
            raise SchemaError(
                f"collection '{spec.name}' lacks the columns {named(lacking)}: were they removed or renamed? "
                "The next insert, or opening the database again, brings them back"
            )

    async def is_whole(self, spec: CollectionSpec) -> bool:
        """Is the collection there, with all that it needs?"""
        found = await self._read(spec.name)
        return found is not None and self._is_in_shape(found, spec)

    async def exists(self, spec: CollectionSpec) -> bool:
        """Is the collection there?

        Raises:
            ForeignCollection: one of its name is, which is not ours.
        """
        found = await self._read(spec.name)
        if found is not None:
            self._refuse_foreign(found, spec)
        return found is not None

    async def drop(self, spec: CollectionSpec) -> None:
        """Delete a collection of ours and all that it holds.

        Raises:
            ForeignCollection: it is not ours.
        """
        found = await self._read(spec.name)
        if found is None:
            return
        self._refuse_foreign(found, spec)
        await self._client.call("DELETE", f"/api/collections/{spec.name}", repeatable=False)

    async def ensure(self, spec: CollectionSpec, *, as_it_was: bool = False) -> Layout:
        """Create the collection, or add what it lacks. Safe when several servers do it at once.

        Args:
            as_it_was: the collection had all of these columns, and somebody has taken some away: they come back
                with the kinds that `spec` says.

        Raises:
            ForeignCollection: the name belongs to a collection that is not ours.
            SchemaError: PocketBase did not accept, or did not keep, what the collection needs.
        """
        trouble = "its changes were lost again and again to those of other writers"
        refused = False
        before: _Collection | None = None
        for round_ in range(_ROUNDS):
            if round_:
                await asyncio.sleep(random.uniform(0.01, 0.05) * round_)
            found = await self._read(spec.name)
            if refused and found == before:  # nobody else's change was the reason, so nobody else's will help
                break
            if found is None:
                answer = await self._create(spec)
            else:
                self._refuse_foreign(found, spec)
                if self._is_in_shape(found, spec):
                    return _layout(found, spec)
                answer = await self._mend(spec, as_it_was, announce=round_ == 0)
            refused, before = False, found
            if not answer.ok:
                rejection = await self._client.rejection(answer, "last answer")
                trouble = str(rejection)
                refused = isinstance(rejection, RequestRejected) and answer.status == 400 and bool(rejection.codes)
        raise SchemaError(f"collection '{spec.name}' could not be brought into shape: {trouble}")

    def _is_in_shape(self, found: _Collection, spec: CollectionSpec) -> bool:
        return not (self._missing(found, spec) or _missing_indexes(found, spec) or found.is_open)

    async def _mend(self, spec: CollectionSpec, as_it_was: bool, *, announce: bool) -> Answer:
        async with self.turn(spec.turns, spec.name):
            found = await self._read(spec.name)
            if found is None or self._is_in_shape(found, spec):
                return Answer(200, b"")
            missing = self._missing(found, spec, as_it_was)
            if announce and missing and spec.owner != _LOG:
                self._log.warning(
                    "collection lacks columns; adding them",
                    collection=spec.name,
                    columns=", ".join(field["name"] for field in missing),
                )
            if announce and found.is_open:
                self._log.warning("collection was opened to others; closing it", collection=spec.name)
            return await self._amend(found, missing, _missing_indexes(found, spec), spec)

    async def ensure_indexes(self, spec: CollectionSpec, indexes: Sequence[IndexSpec]) -> None:
        """Create the indexes whose names are missing. What PocketBase refuses, as it does a unique one over
        duplicates, is reported and left out."""
        found = await self._read(spec.name)
        present = _index_names(found) if found else ()
        for index in indexes:
            if not index.is_among(present, spec.name):
                await self._ensure_index(spec, index)

    async def _ensure_index(self, spec: CollectionSpec, index: IndexSpec) -> None:
        answer: Answer | None = None
        for round_ in range(_ROUNDS):
            if round_:
                await asyncio.sleep(random.uniform(0.01, 0.05) * round_)
            async with self.turn(spec.turns, spec.name):
                found = await self._read(spec.name)
                if found is None or index.is_among(_index_names(found), spec.name):
                    return
                # A unique one takes the place of the plain one over the same columns.
                plain = msgspec.structs.replace(index, unique=False).name(spec.name)
                kept = [sql for sql in found.indexes if _index_name(sql) != plain]
                found = msgspec.structs.replace(found, indexes=kept)
                answer = await self._amend(found, [], [index.sql(spec.name)], spec)
            if answer.status == 400 and b"indexes" in answer.content:
                break
        reason = str(await self._client.rejection(answer, "create index")) if answer else "no answer"
        facts = {"index": index.name(spec.name), "reason": reason}
        if index.unique:
            facts["advice"] = "`pb-cached doctor` lists what stands against those of Parlant's stores"
        self._log.warning("index refused; going on without it", **facts)

    @asynccontextmanager
    async def turn(self, log: str | None, what: str) -> AsyncIterator[None]:
        """One server at a time: it holds a record in the log whose id nobody else can create.

        Args:
            what: is changed: the name of a collection.
        """
        if log is None or self._dialect.family == "0.22":  # before 0.23 there is one server only, and no log
            yield
            return
        records = f"/api/collections/{log}/records"
        lock = "z" + hashlib.blake2b(what.encode(), digest_size=7).hexdigest()  # sorts behind all commits
        held = await self._take_turn(records, lock)
        try:
            yield
        finally:
            if held:
                await asyncio.shield(self._client.send("DELETE", f"{records}/{lock}", repeatable=True))

    async def _take_turn(self, records: str, lock: str) -> bool:
        """Wait for our turn. False where there is no log: then nobody can wait for anybody."""
        me = secrets.token_hex(8)
        body = msgspec.json.encode({"id": lock, "server": me, "n": 0, "guard": lock})
        holder, since = "", time.monotonic()
        while True:
            answer = await self._client.send("POST", records, body=body, repeatable=True)
            if answer.ok or answer.status != 400:
                return answer.ok
            found = await self._client.send("GET", f"{records}/{lock}")
            server = msgspec.json.decode(found.content, type=_Lock).server if found.ok else ""
            if server == me:  # created by an attempt whose answer was lost
                return True
            if server != holder:
                holder, since = server, time.monotonic()
            elif server and time.monotonic() - since > TURN_SECONDS:
                self._log.warning("a server has died while it changed a collection; going on", lock=lock)
                await self._client.send("DELETE", f"{records}/{lock}", repeatable=True)
            await asyncio.sleep(random.uniform(0.01, 0.05))

    async def _read(self, name: str) -> _Collection | None:
        answer = await self._client.send("GET", f"/api/collections/{name}")
        if answer.status == 404:
            return None
        if not answer.ok:
            raise await self._client.rejection(answer, f"read collection '{name}'")
        return msgspec.json.decode(answer.content, type=_Collection)

    def _refuse_foreign(self, found: _Collection, spec: CollectionSpec) -> None:
        if spec.mark in _index_names(found):  # ours, even where somebody took a column away
            return
        if (owner := owner_of(found.indexes)) is not None:
            raise ForeignCollection(
                f"the PocketBase collection '{found.name}' is {_owned(found.name, owner)}, and not "
                f"{_owned(spec.name, spec.owner)}; choose another prefix or name"
            )
        present = {(field.name, field.type) for field in found.columns}
        lacking = [name for name, type_ in self._system(spec) if (name, type_) not in present]
        if found.type != "base" or lacking:
            raise ForeignCollection(
                f"the PocketBase collection '{found.name}' was not made by pb_cached (it has no columns "
                f"{named(lacking)}); choose another prefix, or rename that collection"
            )

    def _system(self, spec: CollectionSpec) -> list[tuple[str, str]]:
        """Before 0.23 every collection has `created` and `updated`, and does not list them."""
        older = self._dialect.family == "0.22"
        return [(name, type_) for name, type_ in spec.system if not (older and type_ == "autodate")]

    def _missing(self, found: _Collection, spec: CollectionSpec, as_it_was: bool = False) -> list[dict[str, Any]]:
        """The fields that the collection lacks. One that was renamed keeps its kind, by which it is known."""
        names = {field.name for field in found.columns}
        ids = {field.id for field in found.columns}
        columns = [
            column
            if as_it_was or column.name in names
            else next((kin for kin in _of_every_kind(column) if kin.field_id in ids), _added(column))
            for column in spec.columns
        ]
        wanted = self._fields(msgspec.structs.replace(spec, columns=tuple(columns)))
        return [field for field in wanted if field["name"] not in names]

    def _fields(self, spec: CollectionSpec) -> list[dict[str, Any]]:
        older = self._dialect.family == "0.22"
        system = [_field(name, f"{type_}_{name}", type_, older) for name, type_ in self._system(spec)]
        return system + [_field(c.name, c.field_id, c.kind.pocketbase_type, older) for c in spec.columns]

    async def _create(self, spec: CollectionSpec) -> Answer:
        fields = "schema" if self._dialect.family == "0.22" else "fields"
        body = {
            "name": spec.name,
            "type": "base",
            fields: self._fields(spec),
            "indexes": [*(index.sql(spec.name) for index in spec.indexes), spec.mark_sql],
            **dict.fromkeys(_RULES),
        }
        answer = await self._client.send(
            "POST", "/api/collections", body=msgspec.json.encode(body), repeatable=True
        )
        if answer.ok:
            self._log.info("collection created", collection=spec.name)
        return answer

    async def _amend(
        self, found: _Collection, missing: list[dict[str, Any]], indexes: Sequence[str], spec: CollectionSpec
    ) -> Answer:
        change: dict[str, Any] = {"indexes": [*found.indexes, *indexes]}
        change |= dict.fromkeys(_RULES)
        if self._dialect.family == "0.22":
            # A full list with ids keeps the data of all that it names.
            raw = msgspec.json.decode(await self._client.call("GET", f"/api/collections/{spec.name}"))
            returning = {field["id"] for field in missing}  # renamed columns get their names back
            change["schema"] = [field for field in raw["schema"] if field["id"] not in returning] + missing
            path, method = f"/api/collections/{spec.name}", "PATCH"
        else:
            # An import keeps the fields that it does not name: the only change that cannot drop a column.
            change = {
                "collections": [{"id": found.id, "name": spec.name, "type": "base", "fields": missing} | change],
                "deleteMissing": False,
            }
            path, method = "/api/collections/import", "PUT"
        return await self._client.send(method, path, body=msgspec.json.encode(change), repeatable=True)


def _added(column: Column) -> Column:
    """The column for a field whose collection has been without it."""
    return msgspec.structs.replace(column, kind=Kind.JSON)


def _of_every_kind(column: Column) -> list[Column]:
    return [msgspec.structs.replace(column, kind=kind) for kind in Kind]


def _owned(collection: str, owner: str) -> str:
    if not owner.isdigit():
        return "the log of a database's commits"
    length = int(owner)
    return f"that of prefix '{collection[:length]}' and name '{collection[length + 1 :]}'"


def _field(name: str, id_: str, type_: str, older: bool) -> dict[str, Any]:
    field: dict[str, Any] = {"name": name, "id": id_, "type": type_}
    if older:
        field["options"] = {}
    elif type_ == "text":
        field["max"] = TEXT_MAX
    elif type_ == "autodate":
        field |= {"onCreate": True, "onUpdate": name == "updated"}
    return field


def _layout(found: _Collection, spec: CollectionSpec) -> Layout:
    declared = {column.name: column for column in spec.columns}
    kinds: dict[str, Kind] = {}
    others: list[Column] = []
    for field in found.columns:
        marked = field.id.split("_", 1)[0]
        kind = Kind(marked) if marked in Kind.__members__.values() else None
        if field.name in declared:
            if field.type not in ("text", "number", "bool"):
                raise SchemaError(
                    f"column '{field.name}' of collection '{found.name}' is of PocketBase type '{field.type}', "
                    "which changes what it stores; rename it in the dashboard, and a proper one is added"
                )
            kinds[field.name] = kind or Kind(field.type)
        elif kind is not None and field.id not in _system_ids(spec):  # what others have added is none of ours
            others.append(Column(field_name(field.name), field.name, kind))
    columns = tuple(msgspec.structs.replace(c, kind=kinds.get(c.name, c.kind)) for c in spec.columns)
    return Layout(columns, tuple(others))


def _system_ids(spec: CollectionSpec) -> set[str]:
    return {f"{type_}_{name}" for name, type_ in spec.system}
