"""What is said where a store's data is newer than the installed Parlant, which itself says nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version as installed
from typing import Final

from parlant.core.persistence.common import ServerOutdated, VersionedStore
from parlant.core.persistence.document_database import DocumentDatabase
from parlant.core.persistence.document_database_helper import MetadataDocument, load_metadata_document

METADATA: Final = "metadata"
"""The collection in which each store keeps the version of its data."""


@asynccontextmanager
async def versions_told(store: VersionedStore, database: DocumentDatabase) -> AsyncIterator[None]:
    """While a store opens: the error of a newer Parlant's data tells the store, the versions, and what to do.

    Raises:
        ServerOutdated: (Parlant's) the data is newer.
    """
    try:
        yield
    except ServerOutdated as error:
        collection = await database.get_or_create_collection(METADATA, MetadataDocument, load_metadata_document)
        found = await collection.find_one({})
        written = found["version"] if found else "unknown"
        raise ServerOutdated(
            f"{type(store).__name__}: a newer Parlant has written its data, of version {written}; the installed "
            f"Parlant {installed('parlant')} knows them up to {store.VERSION.to_string()}. Nothing was changed. "
            "Install a Parlant as new as that one, or give this one a prefix of its own under [stores]"
        ) from error
