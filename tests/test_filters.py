"""What a filter can say of plain records it says exactly, so that PocketBase's order and count can be used."""

from __future__ import annotations

import math
from typing import Any

import pytest
from parlant.core.persistence.common import Where

from pb_cached.pocketbase.codec import RecordCodec
from pb_cached.pocketbase.dialect import BatchLimits, Dialect
from pb_cached.pocketbase.filters import FilterWriter
from pb_cached.pocketbase.forms import RecordForm
from pb_cached.pocketbase.schema import Layout, columns_of
from pb_cached.reading.order import beyond
from tests.strategies import Sample

COLUMNS = RecordCodec("samples", Layout(columns_of(Sample), ()), 1_000_000, RecordForm()).columns
NEWEST = FilterWriter(COLUMNS, Dialect("0.23", BatchLimits(), sql=True, escapes=True))
OLDEST = FilterWriter(COLUMNS, Dialect("0.22", None, sql=False, escapes=False))

EXACT: list[tuple[Where, tuple[str, ...] | None]] = [
    ({}, ("",)),
    ({"name": {"$eq": ""}}, ("name = ''",)),
    ({"name": {"$eq": "\ue000"}}, ("name = '\ue000'",)),
    ({"name": {"$ne": "x"}}, ("name != 'x'",)),
    ({"name": {"$ne": ""}}, ("(name != '' || extra > '')",)),
    ({"name": {"$gt": "it's"}}, (r"name > 'it\'s'",)),
    ({"name": {"$lt": ""}}, ("name < ''",)),
    ({"name": {"$gt": "\ue000"}}, ("(name > '\ue000' || (name >= '\ue000' && extra > ''))",)),
    ({"name": {"$eq": 5}}, ("(name = '' && extra > '')",)),
    ({"name": {"$ne": 5}}, ("",)),
    ({"name": {"$gte": 5}}, ("(name = '' && extra > '')",)),
    ({"offset": {"$gte": 0}}, ("offset >= 0",)),
    ({"offset": {"$gt": True}}, ("offset > 1",)),
    ({"offset": {"$lt": 1e15}}, ("offset < 1000000000000000.0",)),
    ({"offset": {"$gt": 2**53}}, (f"(offset > {2**53} || (offset >= {2**53} && extra > ''))",)),
    ({"offset": {"$eq": 0}}, ("offset = 0",)),
    ({"offset": {"$eq": 2**53 + 1}}, (f"(offset = {2**53}.0 && extra > '')",)),
    ({"offset": {"$eq": "x"}}, ("(offset = 0 && extra > '')",)),
    ({"offset": {"$eq": math.inf}}, ("(offset = 0 && extra > '')",)),
    ({"offset": {"$ne": 0}}, ("(offset != 0 || extra > '')",)),
    ({"offset": {"$ne": 2**53 + 1}}, ("",)),
    ({"deleted": {"$eq": False}}, ("deleted = false",)),
    ({"deleted": {"$eq": 1.0}}, ("deleted = true",)),
    ({"deleted": {"$eq": 2}}, ("(deleted = false && extra > '')",)),
    ({"deleted": {"$ne": False}}, ("(deleted != false || extra > '')",)),
    ({"deleted": {"$ne": True}}, ("deleted != true",)),
    ({"deleted": {"$ne": "x"}}, ("",)),
    ({"title": {"$eq": "x"}}, ("""(title = '"x"' || (title = '' && extra > ''))""",)),
    ({"title": {"$ne": "x"}}, ("""title != '"x"'""",)),
    ({"title": {"$in": ["x", "y"]}}, ("""(title = '"x"' || (title = '' && extra > '') || title = '"y"')""",)),
    ({"nowhere": {"$eq": 1}}, ("extra > ''",)),
    ({"nowhere": {"$gt": 1}}, ("extra > ''",)),
    ({"nowhere": {"$nin": [1]}}, ("",)),
    ({"name": {"$in": []}}, None),
    ({"name": {"$nin": []}}, ("",)),
    ({"$or": [{"score": {"$in": []}}, {"offset": {"$lt": 3}}]}, ("offset < 3",)),
]  # fmt: skip


@pytest.mark.parametrize(("where", "filters"), EXACT, ids=lambda part: str(part).encode("unicode_escape").decode())
def test_what_can_be_said_is_said_exactly(where: Where, filters: tuple[str, ...] | None) -> None:
    assert NEWEST.narrow(where) == filters
    assert NEWEST.is_exact(where)


@pytest.mark.parametrize(
    "where",
    [
        {"name": {"$eq": "a\x00b"}},
        {"name": {"$ne": "a\x00b"}},
        {"name": {"$gt": "\ud800"}},
        {"offset": {"$gt": 2**53 + 1}},
        {"offset": {"$lt": 10**400}},
        {"offset": {"$lt": math.inf}},
        {"deleted": {"$gt": False}},
        {"title": {"$eq": 1}},
        {"title": {"$ne": {}}},
        {"title": {"$gte": "x"}},
        {"name": {"$eq": "x" * 5000}},
        {"name": {"$in": [str(number) for number in range(300)]}},
        {"$or": [{"$or": [{"mode": {"$eq": "auto"}}, {"offset": {"$eq": 1}}], "data": {"$eq": 1}}]},
    ],
    ids=lambda where: str(where)[:60].encode("unicode_escape").decode(),
)
def test_what_cannot_be_said_is_not_taken_for_exact(where: Any) -> None:
    assert not NEWEST.is_exact(where)


def test_a_last_backslash_cannot_be_said_where_backslashes_are_not_escaped() -> None:
    where: Where = {"name": {"$eq": "a\\"}}
    assert (NEWEST.is_exact(where), OLDEST.is_exact(where)) == (True, False)


@pytest.mark.parametrize("writer", [NEWEST, OLDEST])
@pytest.mark.parametrize("descending", [False, True])
def test_a_cursor_can_be_said(writer: FilterWriter, descending: bool) -> None:
    at = ("2026-01-01T00:00:00.000000+00:00", "it's")
    where = beyond({"name": {"$eq": "x"}, "title": {"$ne": "it's"}}, at, descending)
    assert writer.is_exact(where)


def test_what_several_alternatives_have_in_common_takes_its_room_once() -> None:
    many = NEWEST.narrow({"title": {"$in": [str(number) for number in range(100)]}})
    assert many is not None and len(many) == 1
    assert many[0].count("extra") == 1
