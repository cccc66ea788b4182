"""Parlant's customer store, with ids that do not repeat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Literal, Self

from parlant.core.common import IdGenerator, md5_checksum
from parlant.core.customers import Customer, CustomerDocumentStore, CustomerId
from parlant.core.persistence.document_database import DocumentDatabase
from parlant.core.tags import TagId
from typing_extensions import override

from pb_cached.stores.held import HoldsItsWrites, held
from pb_cached.stores.ids import UniqueIds
from pb_cached.stores.versions import versions_told

_of_customer = held("customer_id")


class PocketBaseCustomerStore(HoldsItsWrites, CustomerDocumentStore):
    """Customers and their tags.

    Args:
        ids: `unique`: a new customer is a new person, whoever shares the name. `stable`: Parlant's ids, derived
            from name, extra and tags; a customer that is created again with the same content after a restart is
            the same customer.
    """

    def __init__(
        self,
        database: DocumentDatabase,
        allow_migration: bool = False,
        *,
        ids: Literal["unique", "stable"] = "unique",
    ) -> None:
        super().__init__(UniqueIds(), database, allow_migration)
        self._stable_ids = IdGenerator() if ids == "stable" else None

    update_customer = _of_customer(CustomerDocumentStore.update_customer)
    delete_customer = _of_customer(CustomerDocumentStore.delete_customer)
    upsert_tag = _of_customer(CustomerDocumentStore.upsert_tag)
    remove_tag = _of_customer(CustomerDocumentStore.remove_tag)
    upsert_extra = _of_customer(CustomerDocumentStore.upsert_extra)
    remove_extra = _of_customer(CustomerDocumentStore.remove_extra)

    @override
    async def __aenter__(self) -> Self:
        async with versions_told(self, self._database):
            await super().__aenter__()
        self._belong_to(self._database)
        return self

    @held("id")
    async def create_customer(
        self,
        name: str,
        extra: Mapping[str, str] = {},
        creation_utc: datetime | None = None,
        tags: Sequence[TagId] | None = None,
        id: CustomerId | None = None,
    ) -> Customer:
        """Create a customer.

        Raises:
            ValueError: a customer with this explicit `id` exists.
        """
        if id is not None or self._stable_ids is None:
            return await super().create_customer(name, extra, creation_utc, tags, id)
        async with self._turns.of(("stable ids",)):  # what is looked for must not appear meanwhile
            id, known = await self._stable_id(self._stable_ids, name, extra, tags)
            if not known:
                return await super().create_customer(name, extra, creation_utc, tags, id)
            for tag in tags or ():
                await self.upsert_tag(id, tag)
            return await self.read_customer(id)

    async def _stable_id(
        self, ids: IdGenerator, name: str, extra: Mapping[str, str], tags: Sequence[TagId] | None
    ) -> tuple[CustomerId, bool]:
        """The next id of this content that is free or this customer's already, and which of the two."""
        checksum = md5_checksum(f"{name}{extra}{tags}")
        while True:
            id_ = CustomerId(ids.generate(checksum))
            document = await self._customers_collection.find_one({"id": {"$eq": id_}})
            if document is None or document["name"] == name:
                return id_, document is not None
