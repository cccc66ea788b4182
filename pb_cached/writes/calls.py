"""Calls that are under way, and those who wait until all that began before is over."""

from __future__ import annotations

import asyncio


class Generation:
    """The calls that began between two who wait."""

    __slots__ = ("calls", "over")

    def __init__(self) -> None:
        self.calls = 0
        self.over: asyncio.Future[None] | None = None


class Calls:
    """The calls of something.

    Mutable state, changed between awaits only: `_latest`, the generation of those that begin now; `_earlier`,
    those before it of which some are under way.
    """

    def __init__(self) -> None:
        self._latest = Generation()
        self._earlier: list[Generation] = []

    def begin(self) -> Generation:
        """A call begins. Gives what it is to end with."""
        self._latest.calls += 1
        return self._latest

    def end(self, generation: Generation) -> None:
        """A call is over."""
        generation.calls -= 1
        if not generation.calls and generation.over is not None:
            generation.over.set_result(None)
            self._earlier.remove(generation)

    @property
    def under_way(self) -> int:
        return sum(generation.calls for generation in (self._latest, *self._earlier))

    async def over(self) -> None:
        """Return when all that have begun so far are over."""
        if self._latest.calls:
            self._latest.over = asyncio.get_running_loop().create_future()
            self._earlier.append(self._latest)
            self._latest = Generation()
        if self._earlier:
            await asyncio.wait([generation.over for generation in self._earlier if generation.over])
