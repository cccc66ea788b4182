"""The audit: the cache is measured, and not believed.

Again and again one partition is compared with what PocketBase holds. What differs may be a change that is still
on its way, so it is looked at a second time; what differs then, though nothing has come for it meanwhile, is
counted and dropped.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Final, Protocol

from pb_cached.cache.partition import Key
from pb_cached.coherence.stats import CoherenceCounters
from pb_cached.errors import PBCachedError
from pb_cached.telemetry import Log

ON_ITS_WAY: Final = 2.0
"""Seconds that a change may need to come."""


class Audited(Protocol):
    """A collection's cache that can be compared with PocketBase."""

    @property
    def name(self) -> str: ...

    def sample(self) -> Key | None:
        """A partition that is cached, any; None where there is none."""
        ...

    async def compare(self, key: Key) -> bool | None:
        """Does PocketBase hold what is cached? None where nobody can tell: it has changed, or gone, meanwhile."""
        ...

    def distrust(self, key: Key) -> None:
        """Have it loaded anew."""
        ...


class Audit:
    """Mutable state: `_audited`, the caches that are compared."""

    def __init__(
        self, interval: float, is_current: Callable[[], bool], counters: CoherenceCounters, log: Log
    ) -> None:
        """
        Args:
            interval: seconds between two comparisons, on the average.
            is_current: are answers given from the caches? While they are not, they may hold anything.
        """
        self._is_current = is_current
        self._interval = interval
        self._counters = counters
        self._log = log
        self._audited: list[Audited] = []

    def add(self, audited: Audited) -> None:
        self._audited.append(audited)

    async def run(self) -> None:
        """Compare, until cancelled."""
        while True:
            await asyncio.sleep(self._interval * random.uniform(0.5, 1.5))
            samples = [(audited, key) for audited in self._audited if (key := audited.sample()) is not None]
            if samples:
                await self.look_at(*random.choice(samples))

    async def look_at(self, audited: Audited, key: Key) -> None:
        """Compare one partition."""
        try:
            same = await audited.compare(key)
            if same is False:
                await asyncio.sleep(ON_ITS_WAY)
                same = await audited.compare(key)
        except PBCachedError as error:
            self._log.debug("no audit", collection=audited.name, reason=str(error))
            return
        if same is None or not self._is_current():
            return
        self._counters.audits += 1
        if not same:
            self._counters.mismatches += 1
            self._log.error(
                "what is cached is not what PocketBase holds; it is dropped. Please report this",
                collection=audited.name,
                partition=str(key),
            )
            audited.distrust(key)
