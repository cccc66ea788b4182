"""Parlant's session store."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import semver
from parlant.core.common import Version
from parlant.core.persistence.document_database import BaseDocument
from parlant.core.sessions import SessionDocumentStore
from typing_extensions import override

from pb_cached.stores.held import HoldsItsWrites, held

_UNCHANGED_SINCE = "0.8.0"
"""Parlant 3.3 brings events up to this version and knows no way on to its own 0.9.0, though nothing about events
changed between them. Every event of an older Parlant would be refused."""


class PocketBaseSessionStore(HoldsItsWrites, SessionDocumentStore):
    """Sessions and their events. A cancelled caller's write is still finished, and never shares its offset."""

    create_session = held(SessionDocumentStore.create_session)
    delete_session = held(SessionDocumentStore.delete_session)
    update_session = held(SessionDocumentStore.update_session)
    set_metadata = held(SessionDocumentStore.set_metadata)
    unset_metadata = held(SessionDocumentStore.unset_metadata)
    upsert_labels = held(SessionDocumentStore.upsert_labels)
    remove_labels = held(SessionDocumentStore.remove_labels)
    create_event = held(SessionDocumentStore.create_event)
    delete_event = held(SessionDocumentStore.delete_event)
    update_event = held(SessionDocumentStore.update_event)

    @override
    async def _event_document_loader(self, doc: BaseDocument) -> Any:
        if semver.Version.parse(doc["version"]) <= semver.Version.parse(_UNCHANGED_SINCE):
            up_to = cast(SessionDocumentStore, SimpleNamespace(VERSION=Version.from_string(_UNCHANGED_SINCE)))
            migrated = await SessionDocumentStore._event_document_loader(up_to, doc)
            if migrated is None:
                return None
            doc = cast(BaseDocument, {**migrated, "version": Version.String("0.9.0")})
        return await super()._event_document_loader(doc)
