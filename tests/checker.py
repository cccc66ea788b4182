"""Tells whether what several servers were told and answered is what rules 1 to 5 of the design's section 10 allow.

A history is what each process did: operations on keys, each with the moments of one clock between which it took
effect. Each write puts a value of its own, so a value tells its write; None is the value of what is not there. A
write is before another where it had ended when the other began; where they overlap, nothing is presumed. What is
compared:

1  What is acknowledged is there: at the end PocketBase holds no value that an acknowledged write comes after.
2  Nothing is half: an answer that shows a value shows no older one for another key of the same write. And nothing
   is shown that nobody wrote, or that was refused.
3  Each key has one order of values. A process that has seen a value, or has written it, is not shown one
   afterwards that comes before it, be it by the times of the writes, or as any process has seen them. And a
   numbered list that shows a number shows all before it, but those that somebody has removed.
4  No answer shows a value that an acknowledged write came after, which had ended `bound` before the question.
5  In the end every process shows what PocketBase holds.

An absence that a list implies counts as one that was read. The checker presumes nothing of a list in which whole
collections are searched, and takes operations of one process that overlap for what they are: of no order.

A pure function: `check`. It needs no margin of its own: to be descheduled only makes an operation longer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, Literal

import msgspec
from msgspec import Struct

POCKETBASE: Final = "PocketBase"
"""The process that tells the truth, when all others are done."""

NEVER: Final = 1e18
"""When a write ends of which it is unknown whether it was applied, or will be yet."""
ANYWHERE: Final = "?"
"""The key of a write of which nobody knows where it went: wherever its value is seen. What it wrote beside
that has keys such as `?.title`: the title of what shows the value."""

Value = str | None


class Op(Struct, frozen=True):
    """What a process did. Refused writes are no part of a history: they have no effect."""

    process: str
    kind: Literal["write", "read", "last read"]
    """The last reads of a process show what it ends with, when nobody writes any more and `bound` is over."""
    begin: float
    end: float
    """`NEVER` where it is unknown whether a write was applied, or will be yet."""
    values: Mapping[str, Value]
    lists: str = ""
    """All keys of this list were looked at: one that is not among the values is not there."""
    since: int = 0
    """Of the list, the keys from this number on."""

    def __str__(self) -> str:
        return f"{self.process}'s {self.kind} at {self.begin:.3f} to {self.end:.3f}"


def _placed(written: Mapping[str, Value], seen: Mapping[str, Value]) -> dict[str, Value]:
    """What a write wrote that went anywhere, by where its value was seen."""
    found = {key: value for key, value in seen.items() if not key.startswith(ANYWHERE)}
    beside = {key.removeprefix(ANYWHERE): value for key, value in written.items() if key != ANYWHERE}
    return found | {key.rpartition(".")[0] + field: value for key in found for field, value in beside.items()}


class _Version(Struct, frozen=True):
    """A value of a key, and when it was written."""

    value: Value
    begin: float
    end: float

    def is_before(self, other: _Version) -> bool:
        return self.end < other.begin


_NOTHING: Final = _Version(None, -math.inf, -math.inf)
"""What each key begins with."""


def key_of(name: str, number: int) -> str:
    """The key of a number in a list."""
    return f"{name}#{number}"


def number_of(key: str) -> int:
    """The number of such a key; -1 of any other."""
    return int(key.partition("#")[2] or -1)


def check(history: Sequence[Op], bound: float) -> list[str]:
    """All violations of the rules, each told by its number.

    Args:
        bound: seconds; the staleness that answers may have.
    """
    return list(_Checker(history).violations(bound))


class _Checker:
    def __init__(self, history: Sequence[Op]) -> None:
        places: dict[Value, dict[str, Value]] = defaultdict(dict)
        for op in history:
            for key, value in op.values.items():
                places[value][key] = value
        self.writes = [
            msgspec.structs.replace(op, values=_placed(op.values, places[op.values[ANYWHERE]]))
            if ANYWHERE in op.values
            else op
            for op in history
            if op.kind == "write"
        ]
        self.versions: dict[str, list[_Version]] = defaultdict(lambda: [_NOTHING])
        self.by_value: dict[str, list[Op]] = defaultdict(list)
        listed: dict[str, list[str]] = defaultdict(list)
        for write in self.writes:
            for key, value in write.values.items():
                if "#" in key and key not in self.versions:
                    listed[key.partition("#")[0]].append(key)
                self.versions[key].append(_Version(value, write.begin, write.end))
                if value is not None:
                    self.by_value[value].append(write)
        self.reads = [
            (op, {**{key: None for key in listed.get(op.lists, ()) if number_of(key) >= op.since}, **op.values})
            for op in sorted(history, key=lambda op: op.begin)
            if op.kind != "write"
        ]

    def violations(self, bound: float) -> Iterator[str]:
        for read, values in self.reads:
            yield from self._invented(read, values)
            yield from self._halves(read, values)
            if read.process == POCKETBASE:
                yield from self._older(read, values, read.begin, "1: an acknowledged write is lost")
            else:
                yield from self._older(read, values, read.begin - bound, "4: older than the bound")
            yield from self._left_out(read, values)
        yield from self._orders()
        yield from self._ends()

    def _candidates(self, read: Op, key: str, value: Value) -> list[_Version]:
        return [v for v in self.versions[key] if v.value == value and v.begin <= read.end]

    def _invented(self, read: Op, values: Mapping[str, Value]) -> Iterator[str]:
        for key, value in values.items():
            if not self._candidates(read, key, value):
                yield f"2: {read} shows {value} for {key}, which nobody had written"

    def _halves(self, read: Op, values: Mapping[str, Value]) -> Iterator[str]:
        for value in set(values.values()) - {None}:
            for write in self.by_value[value or ""]:
                both = [key for key in write.values if key in values]
                for key in both:
                    other = values[key]
                    if other == write.values[key] or all(values[k] != write.values[k] for k in both):
                        continue
                    older = [v for v in self._candidates(read, key, other) if v.end >= write.begin]
                    as_whole = [w for w in self.by_value[other or ""] if set(both) <= w.values.keys()]
                    if not older or as_whole:
                        yield f"2: {read} shows half of the write of {value}: {other} for {key}"

    def _older(self, read: Op, values: Mapping[str, Value], limit: float, rule: str) -> Iterator[str]:
        for key, value in values.items():
            candidates = self._candidates(read, key, value)
            newer = [v for v in self.versions[key] if v.end < limit and all(c.is_before(v) for c in candidates)]
            if candidates and newer:
                yield f"{rule}: {read} shows {value} for {key}, after {max(newer, key=lambda v: v.end)}"

    def _left_out(self, read: Op, values: Mapping[str, Value]) -> Iterator[str]:
        if not read.lists:
            return
        numbers = {number_of(key): key for key in values if "#" in key}
        highest = max((n for n, key in numbers.items() if values[key] is not None), default=-1)
        for number, key in numbers.items():
            if number > highest or values[key] is not None:
                continue
            of_key = [v for v in self.versions[key][1:] if v.begin < read.end]
            if any(v.end < NEVER for v in of_key) and all(v.value is not None for v in of_key):
                yield f"3: {read} shows number {highest} of {read.lists} without number {number}"

    def _orders(self) -> Iterator[str]:
        """Of each key, two values that were seen in either order, or in another one than they were written in."""
        seen: dict[str, dict[tuple[str, str], str]] = defaultdict(dict)
        for process, key, sights in self._sights():
            names = list(sights)
            for one in names:
                for other in names:
                    if one != other and sights[one][0] <= sights[other][1]:
                        seen[key][one, other] = process
        for key, pairs in seen.items():
            written = {v.value or "nothing": v for v in self.versions[key] if v.value is not None or v is _NOTHING}
            for (one, other), process in pairs.items():
                if (other, one) in pairs and one < other:
                    yield f"3: {key} was {one}, then {other} to {process}, the other way to {pairs[other, one]}"
                elif one in written and other in written and written[other].is_before(written[one]):
                    yield f"3: {process} was shown {other} for {key}, having known of {one}, which is newer"

    def _sights(self) -> Iterator[tuple[str, str, dict[str, tuple[float, float]]]]:
        """By process and key: when a value was first known, and when it was last looked for and found."""
        sights: dict[tuple[str, str], dict[str, tuple[float, float]]] = defaultdict(dict)
        for write in self.writes:
            for key, value in write.values.items():
                if value is not None and write.end < NEVER:
                    sights[write.process, key][value] = (write.end, -math.inf)
        for read, values in self.reads:
            for key, value in values.items():
                of_key = sights[read.process, key]
                name = value or self._absence(key, of_key, read)
                first, last = of_key.get(name, (math.inf, -math.inf))
                of_key[name] = min(first, read.end), max(last, read.begin)
        for (process, key), of_key in sights.items():
            yield process, key, of_key

    def _absence(self, key: str, of_key: Mapping[str, tuple[float, float]], read: Op) -> str:
        """Nothing, as a value: what was in the beginning, or what a deletion has left of the value known last."""
        known = [(first, name) for name, (first, _) in of_key.items() if first <= read.begin]
        last = max(known, default=(0.0, "nothing"))[1]
        of_last = [v for v in self.versions[key] if v.value == last]
        is_deleted = any(
            v.value is None and v.begin <= read.end and not any(v.is_before(other) for other in of_last)
            for v in self.versions[key][1:]
        )
        if of_last:
            return f"nothing after {last}" if is_deleted else "nothing"
        return last  # it was nothing before

    def _ends(self) -> Iterator[str]:
        truth = {k: v for read, values in self.reads if read.process == POCKETBASE for k, v in values.items()}
        for read, values in self.reads:
            if read.kind == "last read" and read.process != POCKETBASE:
                for key, value in values.items():
                    if value != truth.get(key):
                        yield f"5: {read} shows {value} for {key}, PocketBase {truth.get(key)}"


def rules(violations: Iterable[str]) -> set[str]:
    """The numbers of the rules that are violated."""
    return {violation[0] for violation in violations}
