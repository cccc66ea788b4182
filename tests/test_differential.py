"""Any sequence of operations, any filter: answers are those of Parlant's in-memory database (design: rule 8)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, TypedDict, cast

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from parlant.adapters.db.transient import TransientDocumentDatabase
from parlant.core.common import Version
from parlant.core.persistence.common import Cursor, ObjectId, SortDirection, Where
from parlant.core.persistence.document_database import DocumentCollection, identity_loader_for

from pb_cached import Config, PocketBaseDocumentDatabase
from pb_cached.cache.predicate import compile_where
from pb_cached.config import CollectionSettings
from pb_cached.reading.order import position
from tests.conftest import DatabaseMaker
from tests.strategies import (
    FIELDS,
    STRINGS,
    SURROGATES,
    Sample,
    json_values,
    operands,
    plain_documents,
    wheres,
    wild_documents,
)
from tests.test_codec import same_document

Run = Callable[[Coroutine[Any, Any, Any]], Any]

BOUNDED = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def runner() -> Any:
    with asyncio.Runner() as made:
        yield made


class TotalOracle:
    """Parlant's in-memory collection with its crashes mended as the predicate mends them.

    It raises where a document lacks the field of a filter, or holds a value of another type; everything else,
    the order of results, cursors, totals and merging, is Parlant's own code.
    """

    def __init__(self, collection: DocumentCollection[Sample]) -> None:
        self.collection: Any = collection

    def __enter__(self) -> DocumentCollection[Sample]:
        import parlant.adapters.db.transient as transient

        self._original = getattr(transient, "matches_filters")  # noqa: B009 - Parlant does not export it
        transient.matches_filters = lambda where, document: compile_where(where)(document)  # type: ignore
        return self.collection  # type: ignore[no-any-return]

    def __exit__(self, *_: object) -> None:
        import parlant.adapters.db.transient as transient

        transient.matches_filters = self._original  # type: ignore[attr-defined]


SHAPES = [
    CollectionSettings(),
    CollectionSettings(partition_by=""),
    CollectionSettings(partition_by="name", sequence="offset", max_partition_documents=6),
    CollectionSettings(partition_by=("mode", "title"), sequence="rev"),
]
"""How collections are cached, in turn."""


class Databases(RuleBasedStateMachine):
    """The same operations on both; every answer and every document must be the same."""

    run: Run
    make: Callable[[], PocketBaseDocumentDatabase]

    @initialize()
    def open(self) -> None:
        self.database = self.run(self.make().__aenter__())
        name = f"c{self.run(self._count())}"
        loader = identity_loader_for(Sample)
        self.ours = self.run(self.database.get_or_create_collection(name, Sample, loader))
        self.oracle = TotalOracle(
            self.run(TransientDocumentDatabase().get_or_create_collection(name, Sample, loader))
        )

    _collections = 0

    async def _count(self) -> int:
        Databases._collections += 1
        return Databases._collections

    def both(self, call: Callable[[DocumentCollection[Sample]], Coroutine[Any, Any, Any]]) -> tuple[Any, Any]:
        ours = self.run(call(self.ours))
        with self.oracle as collection:
            return ours, self.run(call(collection))

    @rule(document=plain_documents | wild_documents)
    def insert(self, document: Any) -> None:
        self.both(lambda collection: collection.insert_one(dict(document)))  # type: ignore[arg-type]

    @rule(where=wheres, params=st.dictionaries(st.sampled_from([*FIELDS, "new"]), json_values, max_size=3))
    def update(self, where: Where, params: Any) -> None:
        params = {k: v for k, v in params.items() if k not in ("id", "creation_utc", "version")}
        ours, theirs = self.both(lambda collection: collection.update_one(where, cast(Sample, dict(params))))
        assert ours.matched_count == theirs.matched_count
        self.same_optional(ours.updated_document, theirs.updated_document)

    @rule(where=wheres, document=plain_documents)
    def upsert(self, where: Where, document: Any) -> None:
        ours, theirs = self.both(
            lambda collection: collection.update_one(where, cast(Sample, dict(document)), upsert=True)
        )
        assert ours.matched_count == theirs.matched_count
        self.same_optional(ours.updated_document, theirs.updated_document)

    @rule(where=wheres)
    def delete(self, where: Where) -> None:
        ours, theirs = self.both(lambda collection: collection.delete_one(where))
        assert ours.deleted_count == theirs.deleted_count
        self.same_optional(ours.deleted_document, theirs.deleted_document)

    @rule(where=wheres, direction=st.sampled_from([None, SortDirection.ASC, SortDirection.DESC]))
    def find(self, where: Where, direction: SortDirection | None) -> None:
        ours, theirs = self.both(lambda collection: collection.find(where, sort_direction=direction))
        self.same_result(ours, theirs)

    @rule(
        where=wheres | st.just({}),
        limit=st.integers(0, 4),
        direction=st.sampled_from([SortDirection.ASC, SortDirection.DESC]),
    )
    def page_through(self, where: Where, limit: int, direction: SortDirection) -> None:
        cursor = None
        for _ in range(4):
            ours, theirs = self.both(
                lambda collection, at=cursor: collection.find(where, limit, at, direction)  # type: ignore[misc]
            )
            self.same_result(ours, theirs)
            cursor = ours.next_cursor
            if cursor is None:
                break

    @rule(where=wheres)
    def find_one(self, where: Where) -> None:
        ours, theirs = self.both(lambda collection: collection.find_one(where))
        self.same_optional(ours, theirs)

    @rule(
        where=st.dictionaries(st.sampled_from(["name", "deleted"]), st.fixed_dictionaries({"$ne": operands})),
        directions=st.lists(
            st.tuples(
                st.sampled_from(["creation_utc", "id", "version"]),
                st.sampled_from([SortDirection.ASC, SortDirection.DESC]),
            ),
            min_size=1,
            max_size=3,
        ),
    )
    def find_one_sorted(self, where: Where, directions: Any) -> None:
        ours, theirs = self.both(lambda collection: collection.find_one(where, directions))
        self.same_optional(ours, theirs)

    def same_result(self, ours: Any, theirs: Any) -> None:
        assert len(ours.items) == len(theirs.items)
        for one, other in zip(ours.items, theirs.items, strict=True):
            assert same_document(one, other)
        assert (ours.total_count, ours.has_more, ours.next_cursor) == (
            theirs.total_count, theirs.has_more, theirs.next_cursor,
        )  # fmt: skip

    @staticmethod
    def same_optional(ours: Any, theirs: Any) -> None:
        assert (ours is None) == (theirs is None)
        assert ours is None or same_document(ours, theirs)

    def teardown(self) -> None:
        if hasattr(self, "database"):
            self.run(self.database.delete_collection(self.ours.codec.collection.rpartition("_")[2]))
            self.run(self.database.__aexit__(None, None, None))


@pytest.mark.slow
def test_any_sequence_of_operations_answers_as_parlants_own(
    make_database: DatabaseMaker, runner: Any, cache: Mapping[str, Any]
) -> None:
    shapes = {f"c{number}": SHAPES[number % len(SHAPES)] for number in range(1, 200)}

    class Machine(Databases):
        run = staticmethod(runner.run)
        make = staticmethod(partial(make_database, config=Config(collections=shapes, **cache)))

    run_state_machine_as_test(Machine, settings=settings(BOUNDED, max_examples=40, stateful_step_count=25))


class Timeless(TypedDict, total=False):
    id: ObjectId
    version: Version.String
    kind: str


class Timed(Timeless, total=False):
    creation_utc: str


@pytest.mark.parametrize("direction", [SortDirection.ASC, SortDirection.DESC])
@pytest.mark.parametrize("schemas", [(Timeless,), (Timeless, Timed), (Timed,)], ids=["never", "later", "always"])
async def test_documents_without_a_time_are_on_some_page_whenever_the_time_was_declared(
    make_database: DatabaseMaker, cache: Mapping[str, Any], schemas: tuple[Any, ...], direction: SortDirection
) -> None:
    config = Config(collections={"papers": CollectionSettings(partition_by="kind")}, **cache)
    oracle: Any = await TransientDocumentDatabase().create_collection("papers", Timeless)
    where = cast(Where, {"kind": {"$eq": "a"}})

    def paper(number: int, **fields: Any) -> Any:
        return {"id": f"p{number:02}", "version": "1.0.0", "kind": "a"} | fields

    for round_, schema in enumerate(schemas):
        async with make_database(config=config) as database:
            ours = await database.get_or_create_collection("papers", schema, identity_loader_for(schema))
            for number in range(20 * round_, 20 * round_ + 9):
                # A document of a schema that declares the time has one, but it may be None.
                times: list[dict[str, Any]] = [
                    {"creation_utc": f"2026-01-0{number % 2 + 1}"},
                    {"creation_utc": ""},
                ]
                nothing: dict[str, Any] = {"creation_utc": None} if schema is Timed else {}
                fields = [*times, nothing][number % 3]
                await ours.insert_one(paper(number, **fields))
                told = {k: v for k, v in fields.items() if v is not None}  # Parlant takes None for the text "None"
                await oracle.insert_one(paper(number, **told))
            for filters in (where, cast(Where, {})):
                for limit in (1, 2, 5):
                    cursor: Cursor | None = None
                    while True:
                        page = await ours.find(filters, limit, cursor, direction)
                        theirs = await oracle.find(filters, limit, cursor, direction)
                        assert [document["id"] for document in page] == [document["id"] for document in theirs]
                        assert (page.total_count, page.has_more, page.next_cursor) == (
                            theirs.total_count, theirs.has_more, theirs.next_cursor,
                        )  # fmt: skip
                        cursor = page.next_cursor
                        if cursor is None:
                            break


displaced_documents = st.tuples(wild_documents, st.none() | st.integers() | st.sampled_from(SURROGATES)).map(
    lambda drawn: {**drawn[0], "creation_utc": drawn[1]}
)
"""Documents whose place no column tells."""

exact_texts = st.sampled_from([text for text in STRINGS if text not in SURROGATES])
exact_documents = st.tuples(
    plain_documents,
    st.fixed_dictionaries(
        {
            "name": exact_texts,
            "offset": st.integers(-3, 3) | st.sampled_from([2**53, -(2**53), 2**53 - 1]),
            "score": st.sampled_from([0, 1, -1, 2, 0.1, -2.5, 5e-324, 2**53, 2**52 + 0.5]),
            "f_x": exact_texts,
        }
    ),
).map(lambda drawn: drawn[0] | drawn[1])
"""Documents that columns can hold as they are."""


def filled(run: Run, collection: Any) -> list[dict[str, Any]]:
    """Hostile documents, in the order of their insertion."""
    documents: list[dict[str, Any]] = []

    @settings(BOUNDED, max_examples=120)
    @given(exact_documents | plain_documents | wild_documents | displaced_documents)
    def fill(document: dict[str, Any]) -> None:
        run(collection.insert_one(document))
        documents.append(document)

    fill()
    return documents


def asking(where: dict[str, Any], documents: list[dict[str, Any]], data: Any) -> dict[str, Any]:
    """The filter, half of the time for what is really there."""
    if data.draw(st.booleans()):
        field = data.draw(st.sampled_from(FIELDS))
        held = data.draw(st.sampled_from(documents)).get(field)
        if not isinstance(held, dict | list):
            name = data.draw(st.sampled_from(["$eq", "$ne", "$gt", "$gte", "$lt", "$lte"]))
            return {"$and": [{field: {name: held}}, where]}
    return where


@pytest.mark.slow
def test_any_filter_finds_what_the_predicate_finds(
    make_database: DatabaseMaker, runner: Any, cache: Mapping[str, Any]
) -> None:
    """Over one hostile set of documents: filters narrow, and never too far."""
    config = Config(collections={"samples": CollectionSettings(partition_by="deleted")}, **cache)
    database = runner.run(make_database(config=config).__aenter__())
    collection = runner.run(database.get_or_create_collection("samples", Sample, identity_loader_for(Sample)))
    documents = filled(runner.run, collection)

    @settings(BOUNDED, max_examples=400)
    @given(wheres, st.integers(0, 5), st.sampled_from([SortDirection.ASC, SortDirection.DESC]), st.data())
    def check(where: dict[str, Any], limit: int, direction: SortDirection, data: Any) -> None:
        where = asking(where, documents, data)
        matches = compile_where(where)
        expected = [document for document in documents if matches(document)]
        note(f"filters: {collection.filters.narrow(where)}")
        found = runner.run(collection.find(where))
        assert found.total_count == len(expected)
        assert all(map(same_document, found.items, sorted(expected, key=position)))
        first = runner.run(collection.find_one(where))
        assert first is None if not expected else same_document(first, expected[0])

        descending = direction == SortDirection.DESC
        cursor = None
        for _ in range(3):
            page = runner.run(collection.find(where, limit, cursor, direction))
            rest = sorted(expected, key=position, reverse=descending)
            if cursor is not None:
                at = (cursor.creation_utc, cursor.id)
                rest = [d for d in rest if (position(d) < at if descending else position(d) > at)]
            assert (page.total_count, page.has_more) == (len(rest), len(rest) > limit)
            assert len(page.items) == min(limit, len(rest))
            assert all(map(same_document, page.items, rest))
            cursor = page.next_cursor
            if cursor is None:
                break

    check()
    runner.run(database.__aexit__(None, None, None))


@pytest.mark.slow
def test_of_plain_records_an_exact_filter_lets_through_just_the_matches(
    make_database: DatabaseMaker, runner: Any
) -> None:
    database = runner.run(make_database().__aenter__())
    collection = runner.run(database.get_or_create_collection("samples", Sample, identity_loader_for(Sample)))
    documents = filled(runner.run, collection)

    async def rows(filters: tuple[str, ...]) -> list[Any]:
        return [row async for row in collection.reader.all(filters)]

    everything = runner.run(rows(("",)))
    while len(plain := [row for row in everything if not row.extra]) <= 20:  # chance may have sent few
        documents += filled(runner.run, collection)
        everything = runner.run(rows(("",)))
    assert len(plain) < len(everything)

    @settings(BOUNDED, max_examples=400)
    @given(wheres, st.data())
    def check(where: dict[str, Any], data: Any) -> None:
        where = asking(where, documents, data)
        if not collection.filters.is_exact(where):
            return
        filters = collection.filters.narrow(where)
        note(f"filters: {filters}")
        through = {row.id for row in runner.run(rows(filters or ())) if not row.extra}
        matches = compile_where(where)
        assert through == {row.id for row in plain if matches(collection.codec.document(row))}

    check()
    runner.run(database.__aexit__(None, None, None))
