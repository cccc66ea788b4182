"""Parlant's context variable store, in which a variable that is defined again is the same variable."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final, Self

from parlant.core.common import IdGenerator, md5_checksum
from parlant.core.context_variables import (
    ContextVariable,
    ContextVariableDocumentStore,
    ContextVariableId,
)
from parlant.core.persistence.common import SortDirection
from parlant.core.persistence.document_database import CollectionIndex, DocumentDatabase
from parlant.core.tags import TagId
from parlant.core.tools import ToolId
from typing_extensions import override

from pb_cached.stores.held import HoldsItsWrites, held
from pb_cached.stores.ids import UniqueIds
from pb_cached.stores.versions import IDS, versions_told

VALUES: Final = CollectionIndex(
    fields=(("variable_id", SortDirection.ASC), ("key", SortDirection.ASC)), unique=True
)
TAGS: Final = CollectionIndex(
    fields=(("variable_id", SortDirection.ASC), ("tag_id", SortDirection.ASC)), unique=True
)
_of_variable = held("variable_id")
_of_value = held("variable_id", "key")


class PocketBaseContextVariableStore(HoldsItsWrites, ContextVariableDocumentStore):
    """Context variables, their tags and their values.

    A script that defines its variables at each start gets the stored ones back, with their values: Parlant's ids
    follow from the definition. Servers that define the same at once define it once. Two equal definitions in one
    run are still two variables, in the same order after a restart.

    Mutable state: `_defined`, the ids of the variables that were defined since the store was made.
    """

    def __init__(self, database: DocumentDatabase, allow_migration: bool = False) -> None:
        super().__init__(UniqueIds(), database, allow_migration)
        self._defined: set[ContextVariableId] = set()

    update_variable = _of_variable(ContextVariableDocumentStore.update_variable)
    delete_variable = _of_variable(ContextVariableDocumentStore.delete_variable)
    update_value = _of_value(ContextVariableDocumentStore.update_value)
    delete_value = _of_value(ContextVariableDocumentStore.delete_value)
    add_variable_tag = _of_variable(ContextVariableDocumentStore.add_variable_tag)
    remove_variable_tag = _of_variable(ContextVariableDocumentStore.remove_variable_tag)

    @override
    async def __aenter__(self) -> Self:
        async with versions_told(self, self._database):
            await super().__aenter__()
        await self._value_collection.ensure_indexes([VALUES])
        await self._variable_collection.ensure_indexes([IDS])
        await self._variable_tag_association_collection.ensure_indexes([TAGS])
        self._belong_to(self._database)
        return self

    @held()
    async def create_variable(
        self,
        name: str,
        description: str | None = None,
        creation_utc: datetime | None = None,
        tool_id: ToolId | None = None,
        freshness_rules: str | None = None,
        tags: Sequence[TagId] | None = None,
    ) -> ContextVariable:
        """Create a variable, or return the one that was created by the same definition before.

        What was changed about it since, its description say, stays changed. Tags that it lacks are added.
        """
        checksum = md5_checksum(f"{name}{description}{tool_id}{freshness_rules}{tags}")
        async with self._turns.of(("definitions",)):
            ids = IdGenerator()  # a new one begins with the first id of this definition
            while True:
                id_ = ContextVariableId(ids.generate(checksum))
                if id_ in self._defined:
                    continue
                document = await self._variable_collection.find_one({"id": {"$eq": id_}})
                # The id does not tell name "ab" with description "c" from "a" with "bc": the name does.
                if document is None or document["name"] == name:
                    break
            if document is None:
                variable = ContextVariable(
                    id=id_,
                    name=name,
                    description=description,
                    creation_utc=creation_utc or datetime.now(UTC),
                    tool_id=tool_id,
                    freshness_rules=freshness_rules,
                    tags=[],
                )
                await self._variable_collection.insert_one(self._serialize_context_variable(variable))
            for tag in tags or ():
                await self.add_variable_tag(id_, tag)
            self._defined.add(id_)
            return await self.read_variable(id_)
