"""Hypothesis strategies: JSON as hostile as it gets, and the documents and filters made of it."""

from __future__ import annotations

from typing import Any, Literal, TypedDict

from hypothesis import strategies as st
from parlant.core.common import Version
from parlant.core.persistence.common import ObjectId

SURROGATES = [chr(0xD800), chr(0xDFFF), "a" + chr(0xDBFF) + "b"]
STRINGS = [
    "", "a", "A", "abc", "'", '"', "\\", "a\\", "\\'", "it's", "a\\'b", "%", "_", "null", "true", "123", "1e5",
    "@now", "{:x}", "//", " lead", "trail ", "\x00", "a\x00b", "\n\r\t", "\u2028", "ä", "😀", "\ue000", "\ud7ff",
    "x" * 300, "<&>", '{"a":1}', "[1]", *SURROGATES,
]  # fmt: skip
NUMBERS: list[int | float] = [
    0, 1, -1, 2, -0.0, 0.0, 1.0, 0.1, -2.5, 2**53, 2**53 + 1, 2**53 - 1, -(2**53) - 1, 2**60, 2**60 + 1, 2**70,
    10**400, -(10**400), 1e15, 1e16, 1e21, 1e22, 1e308, 5e-324, 1.7976931348623157e308,
]  # fmt: skip

any_text = st.characters(codec=None)
strings = st.sampled_from(STRINGS) | st.text(any_text, max_size=12)
numbers = st.sampled_from(NUMBERS) | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | strings
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(strings, inner, max_size=4),
    max_leaves=12,
)


class Sample(TypedDict, total=False):
    """A document with a column of every kind, and names that PocketBase keeps for itself."""

    id: ObjectId
    creation_utc: str
    version: Version.String
    name: str
    mode: Literal["auto", "manual"]
    offset: int
    score: float
    deleted: bool
    title: str | None
    data: Any
    rev: int
    extra: dict[str, str]
    f_x: str


FIELDS = tuple(Sample.__annotations__)

times = st.sampled_from(["", "2026-01-01", "2026-01-02", "2026-01-03T00:00:00+00:00", "z"])
ids = st.sampled_from(["", "a", "b", "A", "it's", "back\\", "n\x00l", "😀", "same"])

plain_documents = st.fixed_dictionaries(
    {
        "id": ids,
        "creation_utc": times,
        "version": st.sampled_from(["1.0.0", "2.0.0"]),
        "name": strings,
        "mode": st.sampled_from(["auto", "manual"]),
        "offset": st.integers(-3, 3) | st.sampled_from([2**53, 2**53 + 1, 2**60 + 1]),
        "score": numbers,
        "deleted": st.booleans(),
        "title": st.none() | strings,
        "data": json_values,
        "rev": st.integers(-2, 2),
        "extra": st.dictionaries(strings, strings, max_size=2),
        "f_x": strings,
    }
)
"""Documents of the declared types."""

wild_documents = st.fixed_dictionaries(
    {"id": ids, "creation_utc": times, "version": st.sampled_from(["1.0.0", "2.0.0"])},
).flatmap(
    lambda base: st.fixed_dictionaries(
        {field: json_values for field in FIELDS if field not in base},
        optional={"undeclared": json_values, "": json_values},
    ).map(lambda rest: {**base, **rest})
)
"""Documents whose values are of any type, with keys that nobody declared."""

operands = scalars
conditions = st.one_of(
    st.fixed_dictionaries({"$eq": operands}),
    st.fixed_dictionaries({"$ne": operands}),
    *(st.fixed_dictionaries({name: operands}) for name in ("$gt", "$gte", "$lt", "$lte")),
    st.fixed_dictionaries({"$in": st.lists(operands, max_size=3)}),
    st.fixed_dictionaries({"$nin": st.lists(operands, max_size=3)}),
)
fields = st.sampled_from([*FIELDS, "undeclared"])
wheres = st.recursive(
    st.dictionaries(fields, conditions, max_size=2),
    lambda inner: st.one_of(
        st.fixed_dictionaries({"$and": st.lists(inner, max_size=3)}),
        st.fixed_dictionaries({"$or": st.lists(inner, max_size=3)}),
    ),
    max_leaves=5,
)
