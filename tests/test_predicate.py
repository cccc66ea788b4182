"""The predicate answers as Parlant's in-memory database does (design: rule 8)."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import given
from parlant.core.persistence.common import Where, matches_filters

from pb_cached.cache.predicate import compile_where
from pb_cached.errors import InvalidFilter
from tests.strategies import plain_documents, wheres


@given(plain_documents, wheres)
def test_the_predicate_agrees_with_parlants_own(document: dict[str, Any], where: dict[str, Any]) -> None:
    try:
        expected = matches_filters(cast(Where, where), document)
    except (KeyError, TypeError):  # a missing field, or values that cannot be compared: Parlant's crashes
        compile_where(where)(document)
    else:
        assert compile_where(where)(document) == expected


@pytest.mark.parametrize(
    ("where", "matches"),
    [
        ({}, True),
        ({"a": {"$eq": 1}}, True),
        ({"a": {"$eq": True}}, True),
        ({"a": {"$eq": 1.0}}, True),
        ({"a": {"$eq": "1"}}, False),
        ({"a": {"$gt": "x"}}, False),
        ({"none": {"$gt": 0}}, False),
        ({"none": {"$eq": None}}, True),
        ({"missing": {"$eq": None}}, False),
        ({"missing": {"$ne": 1}}, True),
        ({"missing": {"$nin": [1]}}, True),
        ({"missing": {"$in": [1]}}, False),
        ({"a": {"$in": []}}, False),
        ({"a": {"$nin": []}}, True),
        ({"$and": []}, True),
        ({"$or": []}, False),
        ({"$or": [{"a": {"$eq": 1}}], "none": {"$ne": None}}, False),
        ({"none": {"$ne": None}, "$or": [{"a": {"$eq": 1}}]}, False),
        ({"a": {"$gte": 1, "$lt": 1}}, False),
    ],
)
def test_semantics_beyond_parlants_own(where: dict[str, Any], matches: bool) -> None:
    assert compile_where(where)({"a": 1, "none": None}) is matches


@pytest.mark.parametrize(
    ("where", "complaint"),
    [
        ({"a": {"$regex": "x"}}, r"field 'a'.*'\$regex'.*\$gte"),
        ({"a": 1}, "field 'a': expected an operator"),
        ({"$nor": []}, r"'\$nor'"),
        ({"$and": {"a": {"$eq": 1}}}, r"\$and must be a list"),
        ({"a": {"$in": "abc"}}, r"\$in needs a list"),
        ([], "must be a mapping"),
        ({1: {"$eq": 1}}, "name must be a string, not 1"),
        ({"$or": [{("a",): {"$eq": 1}}]}, "name must be a string"),
    ],
)
def test_a_malformed_filter_is_named(where: Any, complaint: str) -> None:
    with pytest.raises(InvalidFilter, match=complaint):
        compile_where(where)
