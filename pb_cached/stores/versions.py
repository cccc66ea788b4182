"""The version of a store's data: told once, however many servers open a fresh store at once; and what is said
where it is newer than the installed Parlant, which itself says nothing.

Parlant looks whether there is a metadata document, and writes one of an id of its own making if there is none: of
two servers that look before either has written, both do. So ours is written first, under an id that all servers
share and a unique index lets in once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version as installed
from typing import Final

from parlant.core.persistence.common import ObjectId, ServerOutdated, SortDirection, VersionedStore
from parlant.core.persistence.document_database import CollectionIndex, DocumentDatabase
from parlant.core.persistence.document_database_helper import MetadataDocument, load_metadata_document

from pb_cached.database import PocketBaseDocumentDatabase
from pb_cached.errors import UniqueViolation

METADATA: Final = "metadata"
"""The collection in which each store keeps the version of its data."""
IDS: Final = CollectionIndex(fields=(("id", SortDirection.ASC),), unique=True)
"""Where ids are chosen so that servers that mean the same choose the same."""
_ID: Final = ObjectId("metadata")


@asynccontextmanager
async def versions_told(store: VersionedStore, database: DocumentDatabase) -> AsyncIterator[None]:
    """While a store opens: there is one metadata document, and the error of a newer Parlant's data tells the
    store, the versions, and what to do.

    Raises:
        ServerOutdated: (Parlant's) the data is newer.
    """
    if isinstance(database, PocketBaseDocumentDatabase):
        await _tell_version_once(store, database)
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


async def _tell_version_once(store: VersionedStore, database: PocketBaseDocumentDatabase) -> None:
    collection = await database.get_or_create_collection(METADATA, MetadataDocument, load_metadata_document)
    found = await collection.find({}, limit=2)
    if found.total_count == 0:
        await collection.ensure_indexes([IDS])
        document = MetadataDocument(
            id=_ID, creation_utc=datetime.now(UTC).isoformat(), version=store.VERSION.to_string()
        )
        with suppress(UniqueViolation):  # another server was faster, and its document is read from now on
            await collection.insert_one(document)
    elif found.total_count > 1:
        database.log.warning(
            "a store has several metadata documents, of which the first counts",
            store=type(store).__name__,
            documents=found.total_count,
            advice="`pb-cached doctor` lists them; delete all but the first in the dashboard",
        )
