"""Stores that know nothing of PocketBase, over our database: Parlant's own, and one that somebody wrote by its
pattern. They open, migrate and keep their documents as they do over Parlant's own databases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol, Self, TypedDict, cast

import httpx
import pytest
from parlant.adapters.db.transient import TransientDocumentDatabase
from parlant.core.agents import AgentDocumentStore, AgentId, CompositionMode, MessageOutputMode
from parlant.core.common import Criticality, IdGenerator, ItemNotFoundError, Version
from parlant.core.customers import CustomerDocumentStore
from parlant.core.evaluations import (
    EvaluationDocumentStore,
    EvaluationStatus,
    GuidelinePayload,
    InvoiceData,
    InvoiceGuidelineData,
    InvoiceJourneyData,
    JourneyPayload,
    PayloadDescriptor,
    PayloadKind,
    PayloadOperation,
)
from parlant.core.guideline_tool_associations import GuidelineToolAssociationDocumentStore
from parlant.core.guidelines import GuidelineContent, GuidelineDocumentStore, GuidelineId
from parlant.core.journeys import JourneyEdgeId, JourneyId, JourneyNodeId
from parlant.core.nlp.embedding import BasicEmbeddingCache, NullEmbedder
from parlant.core.persistence.common import MigrationRequired, ObjectId, ServerOutdated, SortDirection
from parlant.core.persistence.document_database import (
    BaseDocument,
    CollectionIndex,
    DocumentCollection,
    DocumentDatabase,
    identity_loader,
    identity_loader_for,
)
from parlant.core.persistence.document_database_helper import DocumentStoreMigrationHelper, MetadataDocument
from parlant.core.relationships import (
    RelationshipDocumentStore,
    RelationshipEntity,
    RelationshipEntityKind,
    RelationshipKind,
)
from parlant.core.sessions import SessionDocumentStore
from parlant.core.tags import TagDocumentStore, TagId
from parlant.core.tools import ToolId

from pb_cached import Config, PocketBaseServer
from pb_cached.collection import PocketBaseDocumentCollection
from pb_cached.pocketbase.schema import column_name
from tests.conftest import DatabaseMaker

pytestmark = pytest.mark.slow


# --- a store by Parlant's pattern -----------------------------------------------------------------------------


class UndatedRecipe(TypedDict, total=False):
    """As it was seeded by hand, or written before documents had a time."""

    id: ObjectId
    version: Version.String
    dish: str


class Recipe(TypedDict, total=False):
    id: ObjectId
    creation_utc: str
    version: Version.String
    dish: str
    servings: int


class UndatedMetadata(TypedDict, total=False):
    id: ObjectId
    version: Version.String


# Parlant's types demand a time of every document.
UNDATED: Any = UndatedRecipe
UNDATED_METADATA: Any = UndatedMetadata
LONG_AGO = "2020-01-01T00:00:00+00:00"


class RecipeStore:
    """Version 2 of a store that never heard of us; it keeps what it has migrated."""

    VERSION = Version.from_string("2.0.0")

    def __init__(self, database: DocumentDatabase, allow_migration: bool) -> None:
        self._database = database
        self._allow_migration = allow_migration
        self.loaded: list[str] = []
        self.recipes: DocumentCollection[Recipe]

    async def __aenter__(self) -> Self:
        async with DocumentStoreMigrationHelper(self, self._database, self._allow_migration):
            self.recipes = await self._database.get_or_create_collection("recipes", Recipe, self._load)
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def _load(self, document: BaseDocument) -> Recipe | None:
        self.loaded.append(document["id"])
        if document["version"] == "1.0.0":
            time = document.get("creation_utc") or LONG_AGO
            return cast(Recipe, {**document, "creation_utc": time, "version": "2.0.0", "servings": 4})
        return cast(Recipe, document) if document["version"] == "2.0.0" else None


async def seed(
    make_database: DatabaseMaker, version: str, *recipes: Mapping[str, Any], schema: Any = UNDATED
) -> None:
    """What an earlier version of the store left: its own version, and documents."""
    async with make_database() as database:
        metadata = await database.create_collection("metadata", UNDATED_METADATA)
        await metadata.insert_one({"id": ObjectId("the metadata"), "version": Version.String(version)})
        collection = await database.create_collection("recipes", schema)
        for recipe in recipes:
            await collection.insert_one(recipe)


async def metadata_of(make_database: DatabaseMaker) -> list[tuple[str, str]]:
    async with make_database() as database:
        metadata = await database.get_collection(
            "metadata", MetadataDocument, identity_loader_for(MetadataDocument)
        )
        return [(document["id"], document["version"]) for document in await metadata.find({})]


def undated(dish: str, version: str = "1.0.0") -> dict[str, Any]:
    return {"id": f"the {dish}", "version": version, "dish": dish}


def recipe(number: int, **fields: Any) -> Recipe:
    whole = {
        "id": f"r{number}",
        "creation_utc": f"2026-01-01T00:00:{number:02}+00:00",
        "version": "2.0.0",
        "dish": f"dish {number}",
        "servings": number,
    }
    return cast(Recipe, whole | fields)


async def test_opening_an_older_store_migrates_its_documents_and_then_tells_the_new_version(
    make_database: DatabaseMaker,
) -> None:
    await seed(make_database, "1.0.0", undated("soup"), undated("cake"), undated("stone", version="3.0"))
    async with make_database() as database, RecipeStore(database, allow_migration=True) as store:
        assert sorted(store.loaded) == ["the cake", "the soup", "the stone"]
        assert (await store.recipes.find({})).items == [
            recipe(0, id=f"the {dish}", creation_utc=LONG_AGO, dish=dish, servings=4) for dish in ("cake", "soup")
        ]
        failed = await database.get_collection("recipes_failed_migrations", BaseDocument, identity_loader)
        (set_aside,) = (await failed.find({})).items
        assert set_aside.items() >= undated("stone", version="3.0").items()
    assert await metadata_of(make_database) == [("the metadata", "2.0.0")]
    async with make_database() as database, RecipeStore(database, allow_migration=False) as store:
        assert store.loaded == []
        assert (await store.recipes.find({})).total_count == 2


async def test_a_new_store_needs_no_migration(make_database: DatabaseMaker) -> None:
    async with make_database() as database, RecipeStore(database, allow_migration=False) as store:
        assert (await store.recipes.find({})).items == []
    ((_, version),) = await metadata_of(make_database)
    assert version == "2.0.0"


async def test_a_store_of_the_same_version_opens_without_migration(make_database: DatabaseMaker) -> None:
    await seed(make_database, "2.0.0", recipe(1), schema=Recipe)
    async with make_database() as database, RecipeStore(database, allow_migration=False) as store:
        assert (await store.recipes.find({})).items == [recipe(1)]
        assert store.loaded == []
    assert await metadata_of(make_database) == [("the metadata", "2.0.0")]


@pytest.mark.parametrize("version", ["0.0.1", "1.5.0"])
async def test_an_older_store_is_refused_and_left_as_it_is_where_migration_is_off(
    make_database: DatabaseMaker, version: str
) -> None:
    await seed(make_database, version, undated("soup"))
    async with make_database() as database:
        with pytest.raises(MigrationRequired, match=r"Migration required for RecipeStore\."):
            await RecipeStore(database, allow_migration=False).__aenter__()
    async with make_database() as database:
        recipes = await database.get_collection("recipes", UNDATED, identity_loader)
        assert (await recipes.find({})).items == [undated("soup")]
    assert await metadata_of(make_database) == [("the metadata", version)]


@pytest.mark.parametrize("allow_migration", [True, False])
async def test_a_store_that_a_newer_server_wrote_is_refused_and_left_as_it_is(
    make_database: DatabaseMaker, allow_migration: bool
) -> None:
    await seed(make_database, "2.0.1", undated("soup"))
    async with make_database() as database:
        with pytest.raises(ServerOutdated):
            await RecipeStore(database, allow_migration).__aenter__()
    assert await metadata_of(make_database) == [("the metadata", "2.0.1")]


async def test_what_a_store_wrote_and_changed_is_there_when_it_is_opened_again(
    make_database: DatabaseMaker, cache: Mapping[str, Any]
) -> None:
    config = Config(**cache)
    async with make_database(config=config) as database, RecipeStore(database, allow_migration=True) as store:
        for number in range(5):
            await store.recipes.insert_one(recipe(number))
        updated = await store.recipes.update_one({"id": {"$eq": "r1"}}, cast(Recipe, {"dish": "new"}))
        assert updated.updated_document == recipe(1, dish="new")
        assert (await store.recipes.delete_one({"id": {"$eq": "r2"}})).deleted_count == 1
        assert (await store.recipes.delete_one({"id": {"$eq": "r2"}})).deleted_count == 0
        assert (await store.recipes.update_one({"id": {"$eq": "r2"}}, recipe(2))).updated_document is None
    expected = [recipe(0), recipe(1, dish="new"), recipe(3), recipe(4)]
    async with make_database(config=config) as database, RecipeStore(database, allow_migration=False) as store:
        assert (await store.recipes.find({})).items == expected
        assert (await store.recipes.find({}, sort_direction=SortDirection.DESC)).items == expected[::-1]
        first = await store.recipes.find({}, limit=3)
        second = await store.recipes.find({}, limit=3, cursor=first.next_cursor)
        assert [*first.items, *second.items] == expected
        assert (first.has_more, second.has_more) == (True, False)
        assert await store.recipes.find_one({"id": {"$eq": "r2"}}) is None
        for document in expected:
            await store.recipes.delete_one({"id": {"$eq": document["id"]}})
        assert (await store.recipes.find({})).total_count == 0


async def test_documents_without_a_time_come_first_and_are_paged_through_without_gap(
    make_database: DatabaseMaker, cache: Mapping[str, Any]
) -> None:
    """A store's loader never sees those of its own version, so they stay as they were seeded."""
    timeless = [undated(dish, version="2.0.0") for dish in "abcde"]
    timely = [recipe(1, id="a"), recipe(2, id="z")]
    make_database = partial(make_database, config=Config(**cache))
    await seed(make_database, "2.0.0", *timely, *timeless[::-1])
    async with make_database() as database:
        collection = await database.get_collection("recipes", UNDATED, identity_loader)
        seen: list[Any] = []
        page = await collection.find({}, limit=2)
        while True:
            seen += page.items
            if page.next_cursor is None:
                break
            page = await collection.find({}, limit=2, cursor=page.next_cursor)
        assert seen == [*timeless, *timely]


# --- the indexes that Parlant asks for ------------------------------------------------------------------------


async def real_indexes(server: PocketBaseServer, table: str) -> set[tuple[str, ...]]:
    """The columns of each index that PocketBase has on a collection."""
    headers = {"Authorization": server.connection_params["admin_token"]}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, trust_env=False) as http:
        found = (await http.get(f"/api/collections/{table}")).raise_for_status().json()["indexes"]
    columns = [sql.partition(" ON ")[2].partition("(")[2].partition(")")[0] for sql in found]
    return {tuple(column.strip(" `") for column in of.split(",")) for of in columns}


OF_SESSIONS = {
    "sessions": {
        ("doc_id",),
        ("creation_utc", "doc_id"),
        ("agent_id", "creation_utc", "doc_id"),
        ("customer_id", "creation_utc", "doc_id"),
    },
    "events": {("doc_id",), ("session_id", "offset"), ("session_id", "deleted", "offset")},
}
OF_CUSTOMERS = {
    "customers": {("doc_id",)},
    "customer_tag_associations": {("customer_id",), ("tag_id",), ("customer_id", "tag_id")},
}


def open_sessions(database: DocumentDatabase) -> SessionDocumentStore:
    return SessionDocumentStore(database)


def open_customers(database: DocumentDatabase) -> CustomerDocumentStore:
    return CustomerDocumentStore(IdGenerator(), database)


@pytest.mark.parametrize("times", [1, 2], ids=["a new collection", "a collection that was there"])
@pytest.mark.parametrize(
    ("open_store", "expected"), [(open_sessions, OF_SESSIONS), (open_customers, OF_CUSTOMERS)]
)
async def test_the_indexes_that_parlants_stores_ask_for_exist_in_pocketbase(
    make_database: DatabaseMaker,
    pocketbase: PocketBaseServer,
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    open_store: Callable[[DocumentDatabase], AbstractAsyncContextManager[Any]],
    expected: Mapping[str, set[tuple[str, ...]]],
    times: int,
) -> None:
    asked: dict[str, set[tuple[str, ...]]] = {}
    ensure = PocketBaseDocumentCollection.ensure_indexes

    async def heard(self: PocketBaseDocumentCollection[Any], indexes: Sequence[CollectionIndex]) -> None:
        columns = [["doc_id" if field == "id" else column_name(field) for field, _ in i.fields] for i in indexes]
        asked.setdefault(self.codec.collection, set()).update(map(tuple, columns))
        await ensure(self, indexes)

    monkeypatch.setattr(PocketBaseDocumentCollection, "ensure_indexes", heard)
    for _ in range(times):
        async with make_database() as database, open_store(database):
            pass
    for name, known in expected.items():
        table = f"{prefix}_{name}"
        assert asked[table] >= known
        assert await real_indexes(pocketbase, table) >= asked[table] | {("creation_utc", "doc_id")}


@pytest.mark.parametrize("how", ["create_collection", "get_collection", "get_or_create_collection"])
async def test_documents_can_be_read_in_their_order_through_an_index_however_a_collection_is_opened(
    make_database: DatabaseMaker, pocketbase: PocketBaseServer, prefix: str, how: str
) -> None:
    """Also where the collection had no such column before."""
    if how == "get_collection":
        async with make_database() as database:
            await database.create_collection("recipes", UNDATED)
        assert ("creation_utc", "doc_id") not in await real_indexes(pocketbase, f"{prefix}_recipes")
    async with make_database() as database:
        if how == "create_collection":
            await database.create_collection("recipes", Recipe)
        else:
            await getattr(database, how)("recipes", Recipe, identity_loader_for(Recipe))
    assert ("creation_utc", "doc_id") in await real_indexes(pocketbase, f"{prefix}_recipes")


# --- Parlant's other stores -----------------------------------------------------------------------------------


def at(second: int) -> datetime:
    return datetime(2026, 1, 1, 0, 0, second, 250_000, tzinfo=UTC)


async def refuses(call: Any, error: type[Exception] = ItemNotFoundError) -> None:
    with pytest.raises(error):
        await call


class Story(Protocol):
    """What happens in a store of Parlant's, before and after it was closed for the first time."""

    def open(self, database: DocumentDatabase) -> AbstractAsyncContextManager[Any]: ...
    async def begin(self, store: Any) -> None: ...
    async def go_on(self, store: Any) -> None: ...
    async def tell(self, store: Any) -> Any: ...


class OfAgents:
    def open(self, database: DocumentDatabase) -> AgentDocumentStore:
        return AgentDocumentStore(IdGenerator(), database)

    async def begin(self, store: AgentDocumentStore) -> None:
        plain = await store.create_agent("Plain", creation_utc=at(1))
        assert await store.read_agent(plain.id) == plain
        await store.create_agent(
            "Whole", "knows\x00everything \U0001f600", at(0), 7, CompositionMode.CANNED_STRICT,
            MessageOutputMode.STREAM, [TagId("one"), TagId("two")], AgentId("whole"),
        )  # fmt: skip
        gone = await store.create_agent("Gone", creation_utc=at(2), tags=[TagId("one")])
        await refuses(store.create_agent("Twin", id=AgentId("whole")), ValueError)
        updated = await store.update_agent(plain.id, {"name": "Plainer", "max_engine_iterations": 1})
        assert (updated.name, updated.description) == ("Plainer", None)
        assert await store.upsert_tag(plain.id, TagId("three"), at(3))
        assert not await store.upsert_tag(plain.id, TagId("three"), at(4))
        await store.remove_tag(AgentId("whole"), TagId("one"))
        await refuses(store.remove_tag(AgentId("whole"), TagId("one")))
        await store.delete_agent(gone.id)
        for call in (store.delete_agent(gone.id), store.read_agent(gone.id), store.update_agent(gone.id, {})):
            await refuses(call)

    async def go_on(self, store: AgentDocumentStore) -> None:
        await store.update_agent(AgentId("whole"), {"description": None, "name": "Half"})
        await store.create_agent("Third", creation_utc=at(9))

    async def tell(self, store: AgentDocumentStore) -> Any:
        return await store.list_agents()


class OfGuidelines:
    def open(self, database: DocumentDatabase) -> GuidelineDocumentStore:
        return GuidelineDocumentStore(IdGenerator(), database)

    async def begin(self, store: GuidelineDocumentStore) -> None:
        observation = await store.create_guideline("it rains", creation_utc=at(1))
        await store.create_guideline(
            "they ask", "answer", "in full", Criticality.HIGH, {"deep": {"n": [1.0, 2**60, None]}}, at(0), False,
            [TagId("one"), TagId("two")], GuidelineId("whole"), CompositionMode.CANNED_FLUID, False,
            {"red", "blue"}, -3,
        )  # fmt: skip
        gone = await store.create_guideline("they leave", "wave", creation_utc=at(2), tags=[TagId("one")])
        await store.update_guideline(observation.id, {"action": "mention it", "priority": 5})
        await store.update_guideline(GuidelineId("whole"), {"composition_mode": None, "enabled": True})
        await store.set_metadata(observation.id, "seen", {"by": ["us"]})
        await store.set_metadata(observation.id, "passing", 1)
        await store.unset_metadata(observation.id, "passing")
        await store.upsert_labels(observation.id, {"wet", "cold"})
        await store.remove_labels(observation.id, {"cold", "never"})
        assert await store.upsert_tag(observation.id, TagId("three"), at(3))
        await store.remove_tag(GuidelineId("whole"), TagId("two"))
        await store.delete_guideline(gone.id)
        for call in (store.delete_guideline(gone.id), store.read_guideline(gone.id)):
            await refuses(call)
        await refuses(store.find_guideline(GuidelineContent("they leave", "wave")))

    async def go_on(self, store: GuidelineDocumentStore) -> None:
        found = await store.find_guideline(GuidelineContent("it rains", "mention it"))
        await store.update_guideline(found.id, {"condition": "it pours"})
        await store.create_guideline("second", "more", creation_utc=at(9))

    async def tell(self, store: GuidelineDocumentStore) -> Any:
        tags: list[Any] = [None, [], [TagId("one")], [TagId("one"), TagId("three")], [TagId("never")]]
        return [
            *[await store.list_guidelines(tags=which) for which in tags],
            await store.list_guidelines(labels={"wet"}),
        ]


class OfToolAssociations:
    def open(self, database: DocumentDatabase) -> GuidelineToolAssociationDocumentStore:
        return GuidelineToolAssociationDocumentStore(IdGenerator(), database)

    async def begin(self, store: GuidelineToolAssociationDocumentStore) -> None:
        made = [
            await store.create_association(GuidelineId(f"g{n}"), ToolId("local", f"tool {n}"), at(3 - n))
            for n in range(3)
        ]
        assert await store.read_association(made[0].id) == made[0]
        await store.delete_association(made[1].id)
        await refuses(store.delete_association(made[1].id))
        await refuses(store.read_association(made[1].id))

    async def go_on(self, store: GuidelineToolAssociationDocumentStore) -> None:
        await store.create_association(GuidelineId("g9"), ToolId("remote", "tool"), at(9))

    async def tell(self, store: GuidelineToolAssociationDocumentStore) -> Any:
        return await store.list_associations()


class OfTags:
    def open(self, database: DocumentDatabase) -> TagDocumentStore:
        return TagDocumentStore(IdGenerator(), database)

    async def begin(self, store: TagDocumentStore) -> None:
        first, second, third = [await store.create_tag(name, at(n)) for n, name in enumerate("abc")]
        assert (await store.update_tag(second.id, {"name": "new"})).name == "new"
        await store.delete_tag(first.id)
        await refuses(store.read_tag(first.id))
        assert await store.read_tag(third.id) == third

    async def go_on(self, store: TagDocumentStore) -> None:
        (renamed,) = await store.list_tags(name="new")
        await store.update_tag(renamed.id, {"name": "newer"})
        await store.create_tag("z", at(9))

    async def tell(self, store: TagDocumentStore) -> Any:
        return [await store.list_tags(), await store.list_tags(name="c"), await store.list_tags(name="b")]


class OfEvaluations:
    guideline = GuidelinePayload(  # of the tools that it could name, Parlant reads lists back, not `ToolId`s
        GuidelineContent("they ask", None), [], PayloadOperation.UPDATE, True, False, True, GuidelineId("g")
    )
    journey = JourneyPayload(JourneyId("j"), PayloadOperation.ADD)

    def open(self, database: DocumentDatabase) -> EvaluationDocumentStore:
        return EvaluationDocumentStore(database)

    async def begin(self, store: EvaluationDocumentStore) -> None:
        descriptors = [
            PayloadDescriptor(PayloadKind.GUIDELINE, self.guideline),
            PayloadDescriptor(PayloadKind.JOURNEY, self.journey),
        ]
        whole = await store.create_evaluation(descriptors, at(1), tags=[TagId("one"), TagId("two")])
        await store.create_evaluation(descriptors[:1], at(0))
        assert (await store.read_evaluation(whole.id)).invoices == whole.invoices
        data: Sequence[InvoiceData] = [
            InvoiceGuidelineData({"continuous": True, "scores": [0.5, 1.0]}),
            InvoiceJourneyData({JourneyNodeId("n"): {"a": None}}, {JourneyEdgeId("e"): {}}),
        ]
        invoices = [
            replace(invoice, data=its, approved=True, checksum="sum", state_version="123")
            for invoice, its in zip(whole.invoices, data, strict=True)
        ]
        updated = await store.update_evaluation(whole.id, {"invoices": invoices, "progress": 0.5})
        assert (updated.invoices, updated.progress, updated.status) == (invoices, 0.5, EvaluationStatus.PENDING)
        assert await store.upsert_tag(whole.id, TagId("three"), at(2))
        await store.remove_tag(whole.id, TagId("one"))
        await refuses(store.remove_tag(whole.id, TagId("one")))

    async def go_on(self, store: EvaluationDocumentStore) -> None:
        for evaluation in await store.list_evaluations():
            await store.update_evaluation(
                evaluation.id, {"status": EvaluationStatus.FAILED, "error": "no way", "progress": 100.0}
            )

    async def tell(self, store: EvaluationDocumentStore) -> Any:
        """Without the ids, which are random; so is the order of tags of one time."""
        return [
            replace(found, id=cast(Any, ""), tags=sorted(found.tags)) for found in await store.list_evaluations()
        ]


class OfRelationships:
    def open(self, database: DocumentDatabase) -> RelationshipDocumentStore:
        return RelationshipDocumentStore(IdGenerator(), database)

    a, b, c = (RelationshipEntity(GuidelineId(name), RelationshipEntityKind.GUIDELINE) for name in "abc")
    tag = RelationshipEntity(TagId("t"), RelationshipEntityKind.TAG_ALL)
    tool = RelationshipEntity(ToolId("local", "tool"), RelationshipEntityKind.TOOL)

    async def begin(self, store: RelationshipDocumentStore) -> None:
        entails, depends = RelationshipKind.ENTAILMENT, RelationshipKind.DEPENDENCY
        made = await store.create_relationship(self.a, self.b, entails, creation_utc=at(1))
        await store.create_relationship(self.b, self.tag, entails, creation_utc=at(2))
        await store.create_relationship(self.c, self.tag, depends, "a group", at(3))
        await store.create_relationship(self.tool, self.tool, RelationshipKind.OVERLAP, creation_utc=at(4))
        gone = await store.create_relationship(self.a, self.c, RelationshipKind.PRIORITY, creation_utc=at(5))
        assert await store.read_relationship(made.id) == made
        await refuses(store.create_relationship(self.tag, self.a, entails), ValueError)  # a circle
        await store.delete_relationship(gone.id)
        for call in (store.delete_relationship(gone.id), store.read_relationship(gone.id)):
            await refuses(call)

    async def go_on(self, store: RelationshipDocumentStore) -> None:
        again = await store.create_relationship(
            self.c, self.tag, RelationshipKind.DEPENDENCY, "another group", at(8)
        )
        assert (await store.read_relationship(again.id)).group_id == "another group"
        await store.create_relationship(self.b, self.c, RelationshipKind.ENTAILMENT, creation_utc=at(9))

    async def tell(self, store: RelationshipDocumentStore) -> Any:
        async def listed(**which: Any) -> Any:
            found = await store.list_relationships(**which)
            return sorted(found, key=lambda relationship: (relationship.creation_utc, relationship.id))

        return [
            await listed(),
            await listed(kind=RelationshipKind.ENTAILMENT),
            await listed(kind=RelationshipKind.ENTAILMENT, source_id=self.a.id, indirect=True),
            await listed(source_id=self.a.id, indirect=False),
            await listed(target_id=self.tag.id, indirect=False),
            await listed(target_id=self.tool.id, indirect=False),
        ]


STORIES: Sequence[Story] = [
    OfAgents(), OfGuidelines(), OfToolAssociations(), OfTags(), OfEvaluations(), OfRelationships(),
]  # fmt: skip


async def told(
    story: Story, open_database: Callable[[], AbstractAsyncContextManager[DocumentDatabase]]
) -> list[Any]:
    """All that the store holds: when it is closed, opened again, changed, and opened again."""
    contents = []
    for happens in (story.begin, None, story.go_on, None):
        async with open_database() as database, story.open(database) as store:
            if happens is not None:
                await happens(store)
            contents.append(await story.tell(store))
    return contents


@pytest.mark.parametrize("story", STORIES, ids=lambda story: type(story).__name__)
async def test_parlants_other_stores_hold_what_they_hold_over_its_own_database(
    story: Story, make_database: DatabaseMaker, cache: Mapping[str, Any]
) -> None:
    parlants = TransientDocumentDatabase()  # forgets nothing while it lives
    expected = await told(story, lambda: nullcontext(parlants))
    assert expected[0] == expected[1] != expected[2] == expected[3]
    assert await told(story, lambda: make_database(config=Config(**cache))) == expected


async def test_parlants_embedding_cache_finds_its_vectors_after_a_restart(make_database: DatabaseMaker) -> None:
    texts, vectors = ["hello", "world"], [[0.1, 1.0, -2.5e-300], [0.3, 0.4, 0.0]]
    async with make_database() as database:
        await BasicEmbeddingCache(database).set(NullEmbedder, texts, vectors, hints={"scope": "this"})
    async with make_database() as database:
        embeddings = BasicEmbeddingCache(database)
        found = await embeddings.get(NullEmbedder, texts, hints={"scope": "this"})
        assert found is not None and found.vectors == vectors
        assert await embeddings.get(NullEmbedder, texts[:1], hints={"scope": "this"}) is None
