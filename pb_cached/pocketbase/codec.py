"""Documents to records and back: `decode(encode(document)) == document`, for every JSON document.

Each column holds an *image* of its field's value, chosen so that filters on columns never miss a document:

* equal values have equal images, and a smaller value never has a larger image (within strings, within numbers);
* a value that the column's type cannot hold has the column's default as its image.

Where the image is not the value itself (an int beyond 2**53, 1.0 in a number column, None in a text column, a
lone surrogate), the value stands in `extra`, exactly, as do keys that no column has. `decode` prefers `extra`.

Everything is encoded at the call, so the caller may change the document afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol, cast

import msgspec
from msgspec import Struct

from pb_cached.errors import DocumentTooLarge, InvalidDocument, SchemaError, named
from pb_cached.exact import Json, copied, dumps, loads
from pb_cached.pocketbase.commit.interface import Operation
from pb_cached.pocketbase.forms import Form
from pb_cached.pocketbase.ids import new_id
from pb_cached.pocketbase.schema import Column, Kind, Layout

SAFE_INTEGER: Final = 2**53
"""Up to here, and including, every integer is a float64 of its own."""
_LARGEST_FLOAT: Final = 1.7976931348623157e308
_TEXT: Final = Kind.TEXT  # to look one up in an enumeration takes longer than all else here
_JSON: Final = Kind.JSON

_encode = msgspec.json.Encoder().encode


class Row(Protocol):
    """A record as PocketBase gave it. Its columns are attributes `c0`, `c1`, ... in the order of the layout."""

    @property
    def id(self) -> str: ...
    @property
    def rev(self) -> int: ...
    @property
    def extra(self) -> str: ...


class Extra(Struct, omit_defaults=True):
    """What the columns cannot hold: exact values by field, and fields that have a column but no value."""

    values: dict[str, Json] = {}
    missing: list[str] = []


def snapshot(value: Any, path: str = "$") -> Json:
    """A document's own copy, or a part's: nothing in it is shared with the caller, and all of it is JSON.

    Tuples and other sequences become lists, other mappings dicts.

    Args:
        path: where in the document the value stands.

    Raises:
        InvalidDocument: a value is not JSON; names its path.
    """
    if value.__class__ is str and value.isascii():
        return value
    try:
        return copied(value)
    except ValueError:
        return _named(value, path)


def _named(value: Any, path: str) -> Json:
    """The same, of what has no copy as it is: converted, or named where that cannot be done."""
    try:
        return _as_json(value, path)
    except RecursionError:
        raise InvalidDocument("the document is nested too deeply to be stored") from None


def _as_json(value: Any, path: str) -> Json:
    """Convert what has a JSON form; name what has none."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value) if type(value) is not str else value
    if isinstance(value, int):
        number = int(value)
        try:
            str(number)
        except ValueError:
            raise InvalidDocument(f"{path}: an integer of this many digits cannot be stored", path=path) from None
        return number
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidDocument(f"{path}: {value} is not JSON; expected a finite number", path=path)
        return float(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InvalidDocument(
                    f"{path}: the key {key!r:.40} is of type {type(key).__name__}; JSON keys are strings",
                    path=path,
                )
        return {str(key): _as_json(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [_as_json(item, f"{path}[{i}]") for i, item in enumerate(value)]
    raise InvalidDocument(f"{path}: a {type(value).__name__} is not JSON and cannot be stored", path=path)


# --- images ------------------------------------------------------------------------------------------------


def text_image(value: str) -> str:
    """The string itself; from a lone surrogate on, the least string above all that begin so."""
    if value.isascii():
        return value
    for position, character in enumerate(value):
        if "\ud800" <= character <= "\udfff":
            return value[:position] + "\ue000"
    return value


def number_image(value: float) -> float:
    """The nearest float64, which never reverses the order of two numbers; at the ends the largest finite one."""
    if isinstance(value, int) and -SAFE_INTEGER <= value <= SAFE_INTEGER:
        return int(value)
    try:
        return float(value)
    except OverflowError:
        return _LARGEST_FLOAT if value > 0 else -_LARGEST_FLOAT


def image(value: Json, kind: Kind) -> tuple[Json, bool]:
    """What a column of this kind holds for a value, and whether the value can be had back from it."""
    if kind is Kind.JSON:
        return dumps(value).decode(), True
    if kind is Kind.TEXT and isinstance(value, str):
        held = text_image(value)
        return held, held == value
    if kind is Kind.BOOL:
        # 1 and 1.0 equal True, and a filter for True must find them.
        return isinstance(value, int | float) and value == 1, isinstance(value, bool)
    if kind is Kind.NUMBER and isinstance(value, int | float):
        number = number_image(value)
        # An integral float comes back as an int; True comes back as 1.
        exact = type(value) is int and number == value and -SAFE_INTEGER <= value <= SAFE_INTEGER
        return number, exact or (type(value) is float and not value.is_integer())
    return kind.default, False


# --- records -----------------------------------------------------------------------------------------------


def all_columns(layout: Layout) -> tuple[Column, ...]:
    """The columns that hold fields, that of the `id` first."""
    return (Column("id", "doc_id", Kind.TEXT), *layout.declared, *layout.undeclared)


class RecordCodec:
    """Encodes and decodes the documents of one collection. Immutable."""

    def __init__(self, collection: str, layout: Layout, max_document_bytes: int, form: Form) -> None:
        self.collection = collection
        self.layout = layout
        self._form = form
        self._all = all_columns(layout)
        self._demanded = ("id", *(column.field for column in layout.declared))
        self.columns: Mapping[str, Column] = {column.field: column for column in self._all}
        self._max_bytes = max_document_bytes
        self._positions = {column.field: position for position, column in enumerate(self._all)}
        row = _row_type(self._all)
        self._row = msgspec.json.Decoder(row)
        self._rows = msgspec.json.Decoder(list[row])  # type: ignore[valid-type]

    # encoding

    def require(self, document: Mapping[str, Any]) -> None:
        """Parlant's databases demand every declared key on insert.

        Raises:
            InvalidDocument: names the keys that are missing.
        """
        missing = [field for field in self._demanded if field not in document]
        if missing:
            raise InvalidDocument(
                f"collection '{self.collection}': the document misses the keys {named(missing)}; "
                f"expected {named(self._demanded, 30)}"
            )

    def insert(self, document: Mapping[str, Any]) -> Operation:
        """The operation that creates a record for a document.

        Args:
            document: a `snapshot`.

        Raises:
            DocumentTooLarge: it exceeds `max_document_bytes`.
        """
        return self._insertion(self._columns_of(document), document)

    def may_leave_open(self, field: str) -> bool:
        """May PocketBase be left to number the documents in this field?"""
        return self._form.may_leave_open(self.columns[field].name)

    def append(self, document: Mapping[str, Any], field: str, place: int) -> Operation:
        """`insert`, with a number that PocketBase gives: the one that is so many after the highest there is.

        Args:
            field: of the number, one that may be left open.
            place: from 1 on.
        """
        columns = self._columns_of(document)
        columns[self.columns[field].name] = str(place)
        return self._insertion(columns, document, is_open=True)

    def _insertion(
        self, columns: Mapping[str, Json], document: Mapping[str, Any], *, is_open: bool = False
    ) -> Operation:
        record_id = new_id()
        body = self._sized(self._form.insert(record_id, columns), document)
        return Operation("POST", self.collection, record_id, body, 0, dumps(document), self._form.layout, is_open)

    def update(
        self,
        record_id: str,
        rev: int,
        document: Mapping[str, Json],
        params: Mapping[str, Json],
        row: Row | None = None,
    ) -> Operation | None:
        """The operation that changes the named fields of a record that holds `document`, and no others.

        `extra` is written only where it changes: it is one column, and belongs to all fields. Such an update must
        be encoded for the record's row as it is now, as only that tells what `extra` really holds.

        Args:
            params: a `snapshot`.

        Returns:
            None where `extra` changes, and no row is given.

        Raises:
            DocumentTooLarge: as `insert`.
        """
        columns, new = self._images(params)
        old = self._whole(document)[1] if row is None else self._extra_of(row)
        merged = Extra(
            values={k: v for k, v in old.values.items() if k not in params} | new.values,
            missing=[field for field in old.missing if field not in params],
        )
        if (text := _extra_text(merged)) != _extra_text(old):
            if row is None:
                return None
            columns["extra"] = text
        body = self._sized(self._form.update(record_id, rev, columns), params)
        return self._change(record_id, rev, body, {**document, **params})

    def replacement(self, row: Row, document: Mapping[str, Json]) -> Operation:
        """The operation that makes a record hold this document and nothing else. Raises as `insert`.

        Args:
            document: a `snapshot`.
        """
        defaults = {column.name: column.kind.default for column in self._all}
        body = self._sized(self._form.update(row.id, row.rev, defaults | self._columns_of(document)), document)
        return self._change(row.id, row.rev, body, document)

    def deletion(self, record_id: str, rev: int) -> Operation:
        """The operation that deletes a record."""
        body = self._form.delete(record_id, rev)
        return Operation(
            "DELETE",
            self.collection,
            record_id,
            b"" if body is None else _encode(body),
            rev,
            layout=self._form.layout,
        )

    def _change(self, record_id: str, rev: int, body: bytes, document: Mapping[str, Json]) -> Operation:
        return Operation("PATCH", self.collection, record_id, body, rev, dumps(document), self._form.layout)

    def _columns_of(self, copy: Mapping[str, Json]) -> dict[str, Json]:
        """The columns, `extra` among them, of a whole document."""
        columns, extra = self._whole(copy)
        columns["extra"] = _extra_text(extra)
        return columns

    def _whole(self, copy: Mapping[str, Json]) -> tuple[dict[str, Json], Extra]:
        columns, extra = self._images(copy)
        if len(columns) < len(self._all):
            extra.missing = [
                column.field for column in self._all if column.field not in copy and column.kind is not Kind.JSON
            ]
        return columns, extra

    def _images(self, copy: Mapping[str, Json]) -> tuple[dict[str, Json], Extra]:
        columns: dict[str, Json] = {}
        extra = Extra(values={})
        for field, value in copy.items():
            column = self.columns.get(field)
            if column is None:
                extra.values[field] = value
                continue
            name, kind = column.name, column.kind
            if kind is _TEXT and value.__class__ is str and value.isascii():  # most are
                columns[name] = value
            elif kind is _JSON:
                columns[name] = dumps(value).decode()
            else:
                columns[name], exact = image(value, kind)
                if not exact:
                    extra.values[field] = value
        return columns, extra

    def _sized(self, body: Json, copy: Mapping[str, Json]) -> bytes:
        content = _encode(body)
        if len(content) > self._max_bytes:
            largest = max(copy, key=lambda field: len(dumps(copy[field])), default="")
            raise DocumentTooLarge(
                f"collection '{self.collection}': the document takes {len(content):,} bytes, most of them in "
                f"'{largest}'; at most {self._max_bytes:,} are allowed (max_document_bytes under [writes], or "
                "what PocketBase's batch API takes). "
                "Nothing was written"
            )
        return content

    # decoding

    def rows(self, items: msgspec.Raw | bytes) -> list[Row]:
        """Rows out of a JSON list of records. Raises as `row`."""
        try:
            return cast(list[Row], self._rows.decode(items))
        except msgspec.DecodeError as error:
            raise self._misshapen(error) from error

    def row(self, item: msgspec.Raw | bytes) -> Row:
        """A row out of a record's JSON.

        Raises:
            SchemaError: a column is missing: somebody removed or renamed it.
        """
        try:
            return cast(Row, self._row.decode(item))
        except msgspec.DecodeError as error:
            raise self._misshapen(error) from error

    def _misshapen(self, error: msgspec.DecodeError) -> SchemaError:
        return SchemaError(
            f"collection '{self.collection}': a record does not have the columns that it must have ({error}). Was "
            "a column removed or renamed in PocketBase? Open the database again to have it added"
        )

    def document(self, row: Row) -> dict[str, Json]:
        """The document that a row holds, fields that this schema does not declare included: new objects at each
        call.

        Raises:
            SchemaError: a hand has put into a column what we would not have; names record and column.
        """
        _, _, extra, *held = msgspec.structs.astuple(cast(Struct, row))
        return self._document(row.id, held, extra)

    def _document(self, record_id: str, held: Sequence[Json], extra_text: str) -> dict[str, Json]:
        document: dict[str, Json] = {}
        for column, value in zip(self._all, held, strict=True):
            if column.kind is not Kind.JSON:
                document[column.field] = value
            elif value:
                document[column.field] = self._read(record_id, column.name, value)
        if extra_text:
            extra = self._extra(record_id, extra_text)
            for field in extra.missing:
                document.pop(field, None)
            # A column of kind JSON holds every value exactly: what `extra` has beside it is older than the column.
            overtaken = {c.field for c in self._all if c.kind is Kind.JSON and c.field in document}
            document.update({field: value for field, value in extra.values.items() if field not in overtaken})
        return document

    # what others' commits say: see `CommitLayout`

    @property
    def commit_layout(self) -> str:
        """What commits call the order of the columns by; empty where they go by their names."""
        return self._form.layout

    def inserted(self, values: Sequence[Json]) -> dict[str, Json]:
        """The document that a commit has inserted.

        Raises:
            SchemaError: it is not what we would have written.
        """
        record_id, *held, extra = values
        whole = [column.kind.default if v is None else v for column, v in zip(self._all, held, strict=True)]
        return self._document(str(record_id), whole, extra or "")

    def updated(self, document: Mapping[str, Json], values: Sequence[Json]) -> dict[str, Json] | None:
        """The document that a commit has left of this one. None where the commit alone does not tell: its columns
        do not hold all of it exactly.

        Raises:
            SchemaError: it is not what we would have written.
        """
        record_id, _, *held = values
        if len(held) > len(self._all):  # `extra` has changed
            return None
        left = dict(document)
        for column, value in zip(self._all, held, strict=False):
            if value is None:
                continue
            if column.kind is Kind.JSON:
                left[column.field] = self._read(str(record_id), column.name, value)
            elif column.field in document and image(document[column.field], column.kind)[1]:
                left[column.field] = value
            else:
                return None
        return left

    def named(self, values: Sequence[Json], field: str) -> tuple[bool, Json]:
        """Does an update name a field, and does it tell its value exactly? `values` are those of a commit; None
        where it does not tell."""
        position = self._positions[field]
        value = values[position + 2] if position + 2 < len(values) else None
        extra_changes = len(values) > len(self._all) + 2
        plain = self._all[position].kind is not Kind.JSON and not extra_changes
        return value is not None, value if plain else None

    def told(self, values: Sequence[Json], field: str) -> tuple[bool, Json]:
        """Does a commit tell a field's value exactly, and which? `values` are those of an insert."""
        position = self._positions[field]
        column = self._all[position]
        if column.kind is Kind.JSON or values[-1]:
            return False, None
        return True, values[position + 1]

    def is_open(self, values: Sequence[Json], field: str) -> bool:
        """Has an insert left it to PocketBase to number the document in this field? `values` are those of a
        commit."""
        return self.may_leave_open(field) and isinstance(values[self._positions[field] + 1], str)

    def held(self, row: Row, field: str) -> Json:
        """What the column of a declared field holds: the value's image."""
        return getattr(row, f"c{self._positions[field]}")

    def _extra_of(self, row: Row) -> Extra:
        return self._extra(row.id, row.extra) if row.extra else Extra(values={})

    def _extra(self, record_id: str, text: str) -> Extra:
        found = self._read(record_id, "extra", text)
        try:
            return msgspec.convert(found, Extra)
        except msgspec.ValidationError:
            raise self._misread(record_id, "extra") from None

    def _read(self, record_id: str, column: str, text: str) -> Json:
        try:
            return loads(text)
        except (ValueError, RecursionError):
            raise self._misread(record_id, column) from None

    def _misread(self, record_id: str, column: str) -> SchemaError:
        return SchemaError(
            f"collection '{self.collection}': the column '{column}' of the record '{record_id}' does not hold "
            "what we write there; it was changed by hand. In PocketBase's dashboard, put JSON there, or empty it"
        )


def _row_type(columns: Sequence[Column]) -> type[Struct]:
    types: dict[Kind, Any] = {Kind.NUMBER: int | float, Kind.BOOL: bool}
    fields: list[tuple[str, Any]] = [("id", str), ("rev", int), ("extra", str)]
    names = {name: name for name, _ in fields}
    for position, column in enumerate(columns):  # a column's name need not be a Python identifier
        fields.append((f"c{position}", types.get(column.kind, str)))
        names[f"c{position}"] = column.name
    return msgspec.defstruct("Row", fields, rename=names, frozen=True)


def _extra_text(extra: Extra) -> str:
    if not extra.values and not extra.missing:
        return ""
    return dumps(msgspec.structs.asdict(extra)).decode()
