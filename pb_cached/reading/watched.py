"""Watching a collection: by its cache; or, where nothing of it is cached, by our own commits alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pb_cached.cache.collection import CollectionCache, Rule
from pb_cached.cache.memory import Memory
from pb_cached.cache.query import keys_of
from pb_cached.cache.watches import Wake
from pb_cached.exact import loads
from pb_cached.pocketbase.commit import Operation, Reply


class Watched:
    """What has a cache that hears of changes, and so can be watched."""

    def __init__(self, cache: CollectionCache) -> None:
        self.cache = cache

    def watch(self, where: Mapping[str, Any], wake: Wake) -> Callable[[], None]:
        """Call `wake` whenever the answer may be different now. Until what is returned is called."""
        return self.cache.watches.add(keys_of(where, self.cache), wake)

    def wake(self, where: Mapping[str, Any]) -> None:
        """Have everybody look again who watches what these matches are among."""
        self.cache.watches.changed(*(keys_of(where, self.cache) or ()))

    def wake_all(self) -> None:
        """Have everybody look again who watches."""
        self.cache.watches.all_changed()


class WatchedCommits(Watched):
    """Follows the commits of one collection while somebody watches it, and only then: through a cache that keeps
    nothing, so that they are told as any other change is."""

    def __init__(
        self,
        rule: Rule,
        follow: Callable[[WatchedCommits], None],
        unfollow: Callable[[WatchedCommits], None],
    ) -> None:
        """
        Args:
            follow, unfollow: begin and end to tell us what becomes of the collection's operations.
        """
        super().__init__(CollectionCache(rule, Memory(0)))
        self._follow = follow
        self._unfollow = unfollow

    def watch(self, where: Mapping[str, Any], wake: Wake) -> Callable[[], None]:
        if not self.cache.watches:
            self._follow(self)
        leave = super().watch(where, wake)

        def leave_and_rest() -> None:
            leave()
            if not self.cache.watches:
                self._unfollow(self)

        return leave_and_rest

    # what became of our own operations

    def committed(self, operation: Operation, reply: Reply) -> None:
        """PocketBase has committed it. Which partition a deletion concerns, the operation does not tell."""
        if operation.document:
            document = loads(operation.document)
            rev = operation.rev + 1
            self.cache.apply(self.cache.state(operation.record_id, rev, document, operation.document))

    def gone(self, operation: Operation) -> None:
        pass

    def clashed(self, operation: Operation) -> None:
        pass

    def uncertain(self, operation: Operation) -> None:
        pass
