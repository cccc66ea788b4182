"""Bringing documents of older versions up to date, at a cost that does not grow with the documents that need
nothing.

Which versions a collection holds is learned by looking for the next one above the last, through the index on
`version`: as many requests as there are versions. Then, by the version that the store writes:

* **its own and newer** ones stay untouched: an older server in a rolling upgrade must not file a newer server's
  documents as failed, and a loader that rewrites its own version each time settles;
* **older** ones, and those that are no version at all, go through the loader, page by page. Each document is
  replaced whole, so an interrupted migration goes on where it stopped. What the loader refuses moves to
  `{name}_failed_migrations`, in the same commit that removes it from its place.

A loader that belongs to no store tells no version. Then the versions that it leaves as they are, or brings
documents to, are its own; what is newer than all of those and refused is left alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, cast

import semver
from msgspec import Struct
from parlant.core.common import Version
from parlant.core.persistence.document_database import BaseDocument

from pb_cached.errors import RecordNotFound
from pb_cached.exact import Json
from pb_cached.pocketbase.codec import RecordCodec, Row, snapshot
from pb_cached.pocketbase.commit import Operation
from pb_cached.pocketbase.filters import FilterWriter
from pb_cached.pocketbase.ids import new_id
from pb_cached.pocketbase.records import RecordReader
from pb_cached.telemetry import Log
from pb_cached.writes import Committer

Loader = Callable[[BaseDocument], Awaitable[Any]]

PAGE: Final = 100
"""Documents read, migrated and committed together."""


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
            for version in await self._outdated(versions):
                await self._migrate(version)

    async def _versions(self) -> list[str]:
        """The different versions that the documents have, by skipping from one to the next in the index. Of those
        that no filter can say, one stands for its neighbours."""
        column = self._codec.columns["version"]
        versions: list[str] = []
        filter_ = ""
        while True:
            page = await self._reader.page(filter_, column.name, 1)
            if not page.rows:
                return versions
            versions.append(version := str(self._codec.held(page.rows[0], "version")))
            filter_ = self._filters.beyond(column, version)

    async def _outdated(self, versions: Sequence[str]) -> list[str]:
        own = getattr(getattr(self._loader, "__self__", None), "VERSION", None)
        if isinstance(own, Version):
            return [version for version in versions if _is_older(version, str(own.to_string()))]
        return await self._outdated_by_trial(versions)

    async def _outdated_by_trial(self, versions: Sequence[str]) -> list[str]:
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
                if brought_to != version:
                    changed.append(version)
        newest = max(filter(_is_version, written), key=semver.Version.parse, default=None)
        return changed + [v for v in refused if newest is None or _is_older(v, newest)]

    async def _sample(self, version: str) -> Row | None:
        page = await self._reader.page(self._having(version), "id", 1)
        return page.rows[0] if page.rows else None

    def _having(self, version: str) -> str:
        return self._filters.holding(self._codec.columns["version"], version)

    def _is_of(self, version: str, row: Row) -> bool:
        """Not of it are the neighbours that a filter lets through where it cannot say the version."""
        held = self._codec.held(row, "version")
        return held == version or self._filters.quoted(held) is None

    async def _migrate(self, version: str) -> None:
        """Read on from the last record seen: one that stays as it is must not be read for ever."""
        total = (await self._reader.page(self._having(version), "id", 1, total=True)).total
        done, after = 0, ""
        while True:
            filter_ = self._having(version) + (f" && id > '{after}'" if after else "")
            rows = (await self._reader.page(filter_, "id", PAGE)).rows
            if not rows:
                break
            await self._migrate_page([row for row in rows if self._is_of(version, row)])
            done, after = done + len(rows), rows[-1].id
            self._log.info(
                "migrating documents",
                collection=self._codec.collection,
                version=version,
                done=done,
                total=max(total, done),
            )

    async def _migrate_page(self, rows: Sequence[Row]) -> None:
        writes: list[Sequence[Operation]] = []
        for row in rows:
            loaded = await self._load(row)
            if loaded is None:
                writes.append(await self._set_aside(row))
            elif loaded != self._codec.document(row):
                body = self._codec.encode_replacement(loaded)
                writes.append([Operation("PATCH", self._codec.collection, row.id, body)])
        outcomes = await asyncio.gather(
            *(self._committer.write(*operations) for operations in writes), return_exceptions=True
        )
        for outcome in outcomes:  # another server, migrating too, may have moved a document first
            if isinstance(outcome, BaseException) and not isinstance(outcome, RecordNotFound):
                raise outcome

    async def _load(self, row: Row) -> dict[str, Json] | None:
        document = self._codec.document(row)  # the loader's own, which it may change
        try:
            loaded = await self._loader(cast(BaseDocument, document))
            return None if loaded is None else snapshot(dict(loaded))
        except Exception as error:
            self._log.warning(
                "document cannot be migrated",
                collection=self._codec.collection,
                version=self._codec.held(row, "version"),
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
        record_id = new_id()
        body, _ = self._failures.codec.encode(self._codec.document(row), record_id)
        return [
            Operation("POST", self._failures.collection, record_id, body),
            Operation("DELETE", self._codec.collection, row.id),
        ]


def _is_version(text: str) -> bool:
    return semver.Version.is_valid(text)


def _is_older(version: str, than: str) -> bool:
    """What is no version at all was not written by a newer server, and counts as older."""
    return not _is_version(version) or semver.Version.parse(version) < semver.Version.parse(than)
