"""Bringing documents of older versions up to date, at a cost that does not grow with the documents that need
nothing.

Which versions a collection holds is learned by looking for the next one above the last, through the index on
`version`: as many requests as there are versions. They are handled as the column holds them, as text or as JSON;
`_told` is the version itself. Then, by the version that the store writes:

* **its own and newer** ones stay untouched: an older server in a rolling upgrade must not file a newer server's
  documents as failed, and a loader that rewrites its own version each time settles;
* **older** ones, and those that are no version at all, go through the loader, page by page. Each document is
  replaced whole, so an interrupted migration goes on where it stopped. What the loader refuses moves to
  `{name}_failed_migrations`, in the same commit that removes it from its place. What no document is to blame for
  (a database or a network that fails the loader) ends the opening instead: the next one goes on.

A loader that belongs to no store tells no version. Then the versions that it leaves as they are, or brings
documents to, are its own; what is newer than all of those and refused is left alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, cast

import httpx
import semver
from msgspec import Struct
from parlant.core.common import Version
from parlant.core.persistence.document_database import BaseDocument

from pb_cached.errors import DocumentTooLarge, InvalidDocument, PBCachedError, RecordNotFound, StaleRevision
from pb_cached.exact import Json, loads
from pb_cached.pocketbase.codec import RecordCodec, Row, snapshot
from pb_cached.pocketbase.commit import Operation
from pb_cached.pocketbase.filters import FilterWriter
from pb_cached.pocketbase.records import RecordReader
from pb_cached.pocketbase.schema import Column, Kind
from pb_cached.telemetry import Log
from pb_cached.writes import Committer

Loader = Callable[[BaseDocument], Awaitable[Any]]

PAGE: Final = 100
"""Documents read, migrated and committed together."""

_PASSING: Final = (PBCachedError, OSError, httpx.HTTPError)
"""Errors that tell nothing about the document. A TimeoutError is an OSError."""
_OF_THE_DOCUMENT: Final = (InvalidDocument, DocumentTooLarge)
"""Those among them that it would meet again at every opening."""


class Failures(Struct, frozen=True):
    """Where documents go that cannot be migrated."""

    collection: str
    codec: RecordCodec


class Migration:
    """The migration of one collection, at the time it is opened."""

    def __init__(
        self,
        loader: Loader,
        reader: RecordReader,
        codec: RecordCodec,
        filters: FilterWriter,
        committer: Committer,
        failures: Callable[[], Awaitable[Failures]],
        log: Log,
    ) -> None:
        self._loader = loader
        self._reader = reader
        self._codec = codec
        self._filters = filters
        self._committer = committer
        self._open_failures = failures
        self._failures: Failures | None = None
        self._log = log

    async def run(self) -> None:
        """Migrate what has to be. Safe to interrupt, and to run on several servers at once."""
        if "version" not in self._codec.columns:
            return
        if versions := await self._versions():
            outdated, up_to = await self._outdated(versions)
            for version in outdated:
                await self._migrate(version, up_to)

    @property
    def _column(self) -> Column:
        return self._codec.columns["version"]

    def _told(self, held: str) -> str:
        """The version that the column tells by what it holds: empty where it tells none."""
        if self._column.kind is not Kind.JSON:
            return held
        try:
            version = loads(held)
        except ValueError:  # the key is missing, or in `extra` since before there was a column for it
            return ""
        return version if isinstance(version, str) else ""

    async def _versions(self) -> list[str]:
        """The different versions that the documents have, as the column holds them, by skipping from one to the
        next in the index. Of those that no filter can say, one stands for its neighbours."""
        versions: list[str] = []
        filter_ = ""
        while True:
            page = await self._reader.page(filter_, self._column.name, 1)
            if not page.rows:
                return versions
            versions.append(version := str(self._codec.held(page.rows[0], "version")))
            filter_ = self._filters.beyond(self._column, version)

    async def _outdated(self, versions: Sequence[str]) -> tuple[list[str], str | None]:
        """Those to be migrated, and the version from which on documents are left alone, where it is known."""
        own = getattr(getattr(self._loader, "__self__", None), "VERSION", None)
        if isinstance(own, Version):
            up_to = str(own.to_string())
            return [version for version in versions if _is_older(self._told(version), up_to)], up_to
        return await self._outdated_by_trial(versions)

    async def _outdated_by_trial(self, versions: Sequence[str]) -> tuple[list[str], str | None]:
        written: set[str] = set()
        refused: list[str] = []
        changed: list[str] = []
        for version in versions:
            if self._filters.quoted(version) is None:  # no version of any loader
                refused.append(version)
                continue
            sample = await self._sample(version)
            if sample is None:
                continue
            loaded = await self._load(sample)
            if loaded is None:
                refused.append(version)
            else:
                written.add(brought_to := str(loaded.get("version", "")))
                if brought_to != self._told(version):
                    changed.append(version)
        newest = max(filter(_is_version, written), key=semver.Version.parse, default=None)
        return changed + [v for v in refused if _is_older(self._told(v), newest)], newest

    async def _sample(self, version: str) -> Row | None:
        page = await self._reader.page(self._having(version), "id", 1)
        return page.rows[0] if page.rows else None

    def _having(self, version: str) -> str:
        return self._filters.holding(self._column, version)

    def _is_of(self, version: str, row: Row) -> bool:
        """Not of it are the neighbours that a filter lets through where it cannot say the version."""
        held = self._codec.held(row, "version")
        return held == version or self._filters.quoted(held) is None

    async def _migrate(self, version: str, up_to: str | None) -> None:
        """Read on from the last record seen: one that stays as it is must not be read for ever."""
        total = (await self._reader.page(self._having(version), "id", 1, total=True)).total
        done, after = 0, ""
        while True:
            filter_ = self._having(version) + (f" && id > '{after}'" if after else "")
            rows = (await self._reader.page(filter_, "id", PAGE)).rows
            if not rows:
                break
            await self._migrate_page([row for row in rows if self._is_of(version, row)], up_to)
            done, after = done + len(rows), rows[-1].id
            self._log.info(
                "migrating documents",
                collection=self._codec.collection,
                version=self._told(version),
                done=done,
                total=max(total, done),
            )

    async def _migrate_page(self, rows: Sequence[Row], up_to: str | None) -> None:
        writes: list[Sequence[Operation]] = []
        for row in rows:
            document = self._codec.document(row)
            if self._is_untold(row, document) and not _is_older(document["version"], up_to):
                writes.append([self._replacement(row, document)])  # now the column tells it
                continue
            loaded = await self._load(row)
            if loaded is None:
                writes.append(await self._set_aside(row))
            elif loaded != document:
                writes.append([self._replacement(row, loaded)])
        outcomes = await asyncio.gather(
            *(self._committer.write(*operations) for operations in writes), return_exceptions=True
        )
        for outcome in outcomes:  # another server, migrating too, may have moved or changed a document first
            if isinstance(outcome, BaseException) and not isinstance(outcome, RecordNotFound | StaleRevision):
                raise outcome

    def _is_untold(self, row: Row, document: Mapping[str, Json]) -> bool:
        """Has the document a version that its column does not tell? So it is where the document is older than the
        column."""
        version = document.get("version")
        return isinstance(version, str) and version != self._told(str(self._codec.held(row, "version")))

    def _replacement(self, row: Row, document: Mapping[str, Json]) -> Operation:
        return self._codec.replacement(row, document)

    async def _load(self, row: Row) -> dict[str, Json] | None:
        """What the loader makes of a document; None where it cannot be migrated.

        Raises:
            PBCachedError, OSError, httpx.HTTPError: the loader failed for a reason that will pass.
        """
        document = self._codec.document(row)  # the loader's own, which it may change
        try:
            loaded = await self._loader(cast(BaseDocument, document))
            return None if loaded is None else snapshot(dict(loaded))
        except Exception as error:
            if isinstance(error, _PASSING) and not isinstance(error, _OF_THE_DOCUMENT):
                error.add_note(
                    f"Met while documents of '{self._codec.collection}' were being migrated. None of them was "
                    "lost; open the collection again to go on."
                )
                raise
            self._log.warning(
                "document cannot be migrated",
                collection=self._codec.collection,
                version=self._told(str(self._codec.held(row, "version"))),
                error=f"{type(error).__name__}: {error}",
            )
            return None

    async def _set_aside(self, row: Row) -> list[Operation]:
        if self._failures is None:
            self._failures = await self._open_failures()
            self._log.warning(
                "documents that cannot be migrated are set aside",
                collection=self._codec.collection,
                into=self._failures.collection,
            )
        return [
            self._failures.codec.insert(self._codec.document(row)),
            self._codec.deletion(row.id, row.rev),
        ]


def _is_version(text: str) -> bool:
    return semver.Version.is_valid(text)


def _is_older(version: str, than: str | None) -> bool:
    """What is no version at all was not written by a newer server, and counts as older; so does everything where
    it is not known what is new."""
    return than is None or not _is_version(version) or semver.Version.parse(version) < semver.Version.parse(than)
