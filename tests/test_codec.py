"""Documents survive exactly, and columns hold images that filters can rely on (design: rules 6 and 8)."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pb_cached.errors import DocumentTooLarge, InvalidDocument, SchemaError
from pb_cached.exact import loads
from pb_cached.pocketbase.codec import RecordCodec, all_columns, image, snapshot
from pb_cached.pocketbase.forms import ArrayForm, RecordForm, commit_layout
from pb_cached.pocketbase.ids import first_id_at, new_id
from pb_cached.pocketbase.schema import Kind, Layout, column_name, columns_of, field_name
from tests.strategies import (
    Sample,
    json_values,
    numbers,
    plain_documents,
    scalars,
    strings,
    wild_documents,
)

CODEC = RecordCodec("samples", Layout(columns_of(Sample), ()), 1_000_000, RecordForm())


def through_pocketbase(body: bytes) -> bytes:
    """What PocketBase makes of a body: numbers become float64 and are written as Go writes them, and columns that
    are not named get their default."""
    columns: dict[str, Any] = {c.name: c.kind.default for c in CODEC.columns.values()}
    columns |= {"extra": "", "rev": 0} | msgspec.json.decode(body)
    for column in CODEC.columns.values():
        if column.kind is Kind.NUMBER:
            number = float(columns[column.name])
            columns[column.name] = int(number) if number.is_integer() and abs(number) < 1e21 else number
    return msgspec.json.encode(columns)


def same(one: Any, other: Any) -> bool:
    """Equal, types, signs of zero and the order of nested keys included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return one == other and math.copysign(1, one) == math.copysign(1, other)
    return bool(one == other)


def same_document(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)


@given(plain_documents | wild_documents)
def test_a_document_comes_back_as_it_was(document: dict[str, Any]) -> None:
    operation = CODEC.insert(document)
    decoded = CODEC.document(CODEC.row(through_pocketbase(operation.body)))
    assert same_document(decoded, document)
    assert same_document(loads(operation.document), document)


@given(wild_documents, st.sets(st.sampled_from(["name", "offset", "deleted", "title", "data", "score"])))
def test_a_missing_key_stays_missing(document: dict[str, Any], lacking: set[str]) -> None:
    partial = {key: value for key, value in document.items() if key not in lacking}
    body = CODEC.insert(partial).body
    assert same_document(CODEC.document(CODEC.row(through_pocketbase(body))), partial)


@given(wild_documents, st.dictionaries(st.sampled_from(["name", "offset", "data", "undeclared"]), json_values))
def test_an_update_changes_the_fields_that_it_names_and_no_others(
    document: dict[str, Any], params: dict[str, Any]
) -> None:
    stored = msgspec.json.decode(through_pocketbase(CODEC.insert(document).body))
    row = CODEC.row(msgspec.json.encode(stored))
    operation = CODEC.update(row.id, row.rev, document, params, row)
    assert operation is not None
    change = msgspec.json.decode(operation.body)
    assert (CODEC.update(row.id, row.rev, document, params) is None) == ("extra" in change)
    assert same_document(loads(operation.document), document | params)
    stored["rev"] += change.pop("rev+")
    named = {column_name(field) for field in params} | {"extra"}
    assert set(change) <= named
    row = CODEC.row(through_pocketbase(msgspec.json.encode(stored | change)))
    assert same_document(CODEC.document(row), document | params)
    assert row.rev == 2


@given(wild_documents, plain_documents)
def test_a_replacement_leaves_nothing_of_the_document_before(
    before: dict[str, Any], after: dict[str, Any]
) -> None:
    stored = msgspec.json.decode(through_pocketbase(CODEC.insert(before).body))
    change = msgspec.json.decode(CODEC.replacement(CODEC.row(msgspec.json.encode(stored)), after).body)
    change.pop("rev+")
    row = CODEC.row(through_pocketbase(msgspec.json.encode(stored | change)))
    assert same_document(CODEC.document(row), after)


# --- what others' commits say ----------------------------------------------------------------------------------

COMMITTED = RecordCodec(
    "samples", CODEC.layout, 1_000_000, ArrayForm(commit_layout("log", "samples", all_columns(CODEC.layout)))
)


@given(plain_documents | wild_documents, st.sets(st.sampled_from(["name", "offset", "title", "data"])))
def test_a_commit_tells_the_document_that_it_inserts(document: dict[str, Any], lacking: set[str]) -> None:
    document = {key: value for key, value in document.items() if key not in lacking}
    values = loads(COMMITTED.insert(document).body)
    assert same_document(COMMITTED.inserted(values), document)
    for field in COMMITTED.columns:
        is_told, value = COMMITTED.told(values, field)
        assert not is_told or same(value, document[field])


@given(
    plain_documents | wild_documents,
    st.dictionaries(st.sampled_from(["name", "offset", "title", "data", "deleted", "undeclared"]), json_values),
)
def test_a_commit_tells_what_it_makes_of_a_document_or_that_it_does_not(
    document: dict[str, Any], params: dict[str, Any]
) -> None:
    row = CODEC.row(through_pocketbase(CODEC.insert(document).body))
    operation = COMMITTED.update(row.id, row.rev, document, params, row)
    assert operation is not None
    values = loads(operation.body)
    left = COMMITTED.updated(document, values)
    assert left is None or same_document(left, document | params)
    for field in params:
        is_named, value = COMMITTED.named(values, field) if field in COMMITTED.columns else (False, None)
        assert not is_named or value is None or left is None or same(value, params[field])


NUMBERED = RecordCodec(
    "samples",
    CODEC.layout,
    1_000_000,
    ArrayForm(commit_layout("log", "samples", all_columns(CODEC.layout), "offset", ("name", "mode"))),
)


@given(plain_documents | wild_documents, st.integers(1, 1000))
def test_a_number_that_is_left_open_is_told_from_any_that_is_not(document: dict[str, Any], place: int) -> None:
    appended, inserted = (
        loads(operation.body)
        for operation in (NUMBERED.append(document, "offset", place), NUMBERED.insert(document))
    )
    assert NUMBERED.is_open(appended, "offset")
    assert not NUMBERED.is_open(inserted, "offset")
    at = list(NUMBERED.columns).index("offset") + 1
    assert appended[at] == str(place)
    rest = slice(1, at), slice(at + 1, None)
    assert [appended[part] for part in rest] == [inserted[part] for part in rest]


def test_only_what_columns_hold_exactly_is_counted_by() -> None:
    columns = all_columns(CODEC.layout)
    for sequence, within in (("offset", ("score",)), ("name", ("mode",)), ("offset", ("data",)), (None, ())):
        layout = commit_layout("log", "samples", columns, sequence, within)
        assert all(slot.within is None for slot in layout.slots)
        assert not ArrayForm(layout).may_leave_open("offset")
    assert not CODEC.may_leave_open("offset"), "by the batch path nobody can number"


def test_a_commit_of_plain_values_tells_all_of_it() -> None:
    document = {
        "id": "a", "creation_utc": "2026", "version": "1.0.0", "name": "n", "mode": "auto", "offset": 1,
        "score": 0.5, "deleted": False, "title": None, "data": {"a": [1]}, "rev": 1, "extra": {}, "f_x": "",
    }  # fmt: skip
    params = {"name": "new", "offset": 2, "title": "t", "data": None, "deleted": True}
    operation = COMMITTED.update("r", 1, document, params)
    assert operation is not None
    assert COMMITTED.updated(document, loads(operation.body)) == document | params


@given(scalars, scalars, st.sampled_from([Kind.TEXT, Kind.NUMBER, Kind.BOOL, Kind.JSON]))
def test_equal_values_have_equal_images(one: Any, other: Any, kind: Kind) -> None:
    if kind is Kind.JSON and not isinstance(one, str):
        return  # 1, 1.0 and True are equal and have different JSON: filters do not rely on it
    if one == other:
        assert image(one, kind)[0] == image(other, kind)[0]


@given(strings, strings)
def test_images_keep_the_order_of_strings(one: str, other: str) -> None:
    low, high = sorted([one, other])
    assert image(low, Kind.TEXT)[0] <= image(high, Kind.TEXT)[0]


@given(numbers, numbers)
def test_images_keep_the_order_of_numbers(one: float, other: float) -> None:
    low, high = sorted([one, other])
    assert image(low, Kind.NUMBER)[0] <= image(high, Kind.NUMBER)[0]


@given(json_values)
def test_a_snapshot_shares_nothing_with_the_original(value: Any) -> None:
    original = {"value": value, "list": [1, {"deep": [2]}]}
    copy = snapshot(original)
    original["list"][1]["deep"].append(3)
    assert copy["list"] == [1, {"deep": [2]}]


def test_tuples_become_lists() -> None:
    assert snapshot({"pair": ("a", 1)}) == {"pair": ["a", 1]}


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (float("nan"), "$.data"),
        ([float("inf")], "$.data[0]"),
        ({"blob": b"bytes"}, "$.data.blob"),
        ({1, 2}, "$.data"),
        ({"deep": [{"key": {3: 4}}]}, "$.data.deep[0].key"),
        (datetime(2026, 1, 1), "$.data"),
        (object(), "$.data"),
        (10**5000, "$.data"),
    ],
    ids=["nan", "inf", "bytes", "set", "int key", "datetime", "object", "5000 digits"],
)
def test_what_is_not_json_is_named_with_its_path(value: Any, path: str) -> None:
    with pytest.raises(InvalidDocument) as caught:
        snapshot({"id": "x", "data": value})
    assert caught.value.path == path
    assert path in str(caught.value)


def test_endless_nesting_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(InvalidDocument, match="nested too deeply"):
        snapshot({"data": value})


def test_missing_keys_are_named_on_insert() -> None:
    with pytest.raises(InvalidDocument, match=r"misses the keys 'creation_utc'.*'f_x'"):
        CODEC.require({"id": "x"})
    with pytest.raises(TypeError):  # as Parlant's own databases
        CODEC.require({"id": "x"})


def test_a_document_beyond_the_limit_is_refused_with_its_largest_field() -> None:
    with pytest.raises(DocumentTooLarge, match=r"'data'.*1,000,000"):
        CODEC.insert({"id": "x", "name": "y", "data": "z" * 1_000_001})


def test_a_removed_column_is_an_error_not_a_default() -> None:
    body = msgspec.json.decode(through_pocketbase(CODEC.insert({"id": "x"}).body))
    del body["offset"]
    with pytest.raises(SchemaError, match="offset"):
        CODEC.row(msgspec.json.encode(body))


@given(st.text(max_size=30))
def test_a_column_tells_its_field(field: str) -> None:
    assert field_name(column_name(field)) == field


def test_ids_rise_and_tell_their_time() -> None:
    made = [new_id() for _ in range(10_000)]
    assert made == sorted(set(made))
    assert all(len(id_) == 15 and id_.isalnum() and id_ == id_.lower() for id_ in made)
    assert first_id_at(0) < made[0]
