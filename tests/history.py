"""Whether what callers were told can be true: a model of one document, and the search for an order of the calls.

Each call takes effect at one moment between its beginning and its end. If there is an order of such moments in
which a model that does one thing at a time gives every answer that was given, the history is explained (it is
linearizable); if there is none, a write was lost, or applied twice, or half, or somebody was told what was never
true. A call whose outcome is unknown may have taken effect at any moment since it began, or never. What was
refused takes no effect, so it is no part of a history.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Document = Mapping[str, Any]
State = Document | None
"""The document, where there is one."""
Effect = Callable[[State], Sequence[tuple[State, Any]]]
"""What a call may leave of a state, each with what its caller is told then."""


def insert(document: Document) -> Effect:
    return lambda state: [(document, "inserted")] if state is None else [(state, "taken")]


def update(params: Document, where: Document) -> Effect:
    """Told is the document that it leaves; None where none matches."""

    def effect(state: State) -> Sequence[tuple[State, Any]]:
        if state is None or any(state[field] != value for field, value in where.items()):
            return [(state, None)]
        left = {**state, **params}
        return [(left, left)]

    return effect


def upsert(document: Document) -> Effect:
    """Another may insert one between looking for it and inserting it."""

    def effect(state: State) -> Sequence[tuple[State, Any]]:
        if state is None:
            return [(document, document)]
        left = {**state, **document}
        return [(left, left), (state, "taken")]

    return effect


def delete(state: State) -> Sequence[tuple[State, Any]]:
    """Told is the document that was there."""
    return [(None, state)]


def find(state: State) -> Sequence[tuple[State, Any]]:
    return [(state, state)]


@dataclass
class Call:
    what: str
    effect: Effect
    began: int
    ended: float = math.inf
    told: Any = None
    known: bool = False
    """Was its caller told anything?"""

    def tell(self, told: Any, ended: int) -> None:
        self.told, self.ended, self.known = told, ended, True

    def __str__(self) -> str:
        told = f"{self.ended:g} {self.told}" if self.known else "never known"
        return f"{self.began} {self.what}; {told}"

    def states(self, state: State) -> list[State]:
        """What it may leave of this one, by what its caller was told."""
        return [left for left, told in self.effect(state) if not self.known or told == self.told]


def unexplained(calls: Sequence[Call]) -> Sequence[Call]:
    """Look for an order of these calls on one document, absent at first, that explains what their callers know.

    The search of Wing and Gong with Lowe's memory: no set of calls that leaves the same state is looked at twice.

    Returns:
        The calls that are left where the search got furthest: none with a known outcome where all is explained.
    """
    calls = sorted(calls, key=lambda call: call.began)
    known = sum(1 << n for n, call in enumerate(calls) if call.known)
    nothing: State = None
    paths: list[tuple[int, State]] = [(0, nothing)]
    seen: set[tuple[int, str]] = set()
    furthest = 0
    while paths and furthest & known != known:
        done, state = paths.pop()
        if (here := (done, json.dumps(state, sort_keys=True))) in seen:
            continue
        seen.add(here)
        furthest = max(furthest, done, key=lambda mask: (mask & known).bit_count())
        left = [n for n in range(len(calls)) if not done >> n & 1]
        first_end = min((calls[n].ended for n in left), default=0)
        for n in reversed(left):  # those that began early are tried first
            if calls[n].began < first_end:
                paths += [(done | 1 << n, after) for after in calls[n].states(state)]
    return [call for n, call in enumerate(calls) if call.known and not furthest >> n & 1]
