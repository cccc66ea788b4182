"""Who waits for changes of which partition of a collection.

Whoever waits leaves a function, which is called whenever answers from the partition may be different now. It is to
note that and no more: what is different, its owner looks up. Does no I/O and never awaits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pb_cached.cache.partition import Key

Wake = Callable[[], None]


class Watches:
    """Mutable state: `_wakes`, by partition, and under None those for whom every partition counts. It is empty
    while nobody waits, and then a change costs one look at it."""

    __slots__ = ("_wakes",)

    def __init__(self) -> None:
        self._wakes: dict[Key | None, set[Wake]] = {}

    def __bool__(self) -> bool:
        """Does anybody wait?"""
        return bool(self._wakes)

    def add(self, keys: Iterable[Key] | None, wake: Wake) -> Callable[[], None]:
        """From now on, call `wake` when one of these partitions changes; None: when any does. Until what is
        returned is called."""
        watched: list[Key | None] = [None] if keys is None else list(keys)
        for key in watched:
            self._wakes.setdefault(key, set()).add(wake)

        def leave() -> None:
            for key in watched:
                wakes = self._wakes.get(key, set())
                wakes.discard(wake)
                if not wakes:
                    self._wakes.pop(key, None)

        return leave

    def changed(self, *keys: Key | None) -> None:
        """These partitions have changed, or may have. None: something that is in none that can be kept."""
        if self._wakes:
            self._call({None, *keys})

    def all_changed(self) -> None:
        """Whatever anybody waits for may have changed."""
        self._call(set(self._wakes))

    def _call(self, keys: set[Key | None]) -> None:
        for key in keys:
            for wake in tuple(self._wakes.get(key, ())):
                wake()
