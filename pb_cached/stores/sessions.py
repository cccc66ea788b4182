"""Parlant's session store."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Final, Self, cast

import semver
from parlant.core.common import Version
from parlant.core.persistence.common import SortDirection
from parlant.core.persistence.document_database import BaseDocument, CollectionIndex
from parlant.core.sessions import SessionDocumentStore
from typing_extensions import override

from pb_cached.stores.held import HoldsItsWrites, held
from pb_cached.stores.versions import versions_told

_UNCHANGED_SINCE = "0.8.0"
"""Parlant 3.3 brings events up to this version and knows no way on to its own 0.9.0, though nothing about events
changed between them. Every event of an older Parlant would be refused."""

OFFSETS: Final = CollectionIndex(
    fields=(("session_id", SortDirection.ASC), ("offset", SortDirection.ASC)), unique=True
)
_of_session = held("session_id")


class PocketBaseSessionStore(HoldsItsWrites, SessionDocumentStore):
    """Sessions and their events. The writes of a session take turns, and among servers a unique index decides:
    each event has an offset of its own, and none is left out. A cancelled caller's write is still finished."""

    create_session = held()(SessionDocumentStore.create_session)
    delete_session = _of_session(SessionDocumentStore.delete_session)
    update_session = _of_session(SessionDocumentStore.update_session)
    set_metadata = _of_session(SessionDocumentStore.set_metadata)
    unset_metadata = _of_session(SessionDocumentStore.unset_metadata)
    upsert_labels = _of_session(SessionDocumentStore.upsert_labels)
    remove_labels = _of_session(SessionDocumentStore.remove_labels)
    create_event = _of_session(SessionDocumentStore.create_event)
    delete_event = held()(SessionDocumentStore.delete_event)  # changes one field of its own
    update_event = _of_session(SessionDocumentStore.update_event)

    @override
    async def __aenter__(self) -> Self:
        async with versions_told(self, self._database):
            await super().__aenter__()
        await self._event_collection.ensure_indexes([OFFSETS])
        return self

    @override
    async def _event_document_loader(self, doc: BaseDocument) -> Any:
        if semver.Version.parse(doc["version"]) <= semver.Version.parse(_UNCHANGED_SINCE):
            up_to = cast(SessionDocumentStore, SimpleNamespace(VERSION=Version.from_string(_UNCHANGED_SINCE)))
            migrated = await SessionDocumentStore._event_document_loader(up_to, doc)
            if migrated is None:
                return None
            doc = cast(BaseDocument, {**migrated, "version": Version.String("0.9.0")})
        return await super()._event_document_loader(doc)
