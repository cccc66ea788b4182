"""The checker finds every kind of error that is planted in a history, and none in a right one."""

from __future__ import annotations

import pytest

from tests.checker import ANYWHERE, NEVER, POCKETBASE, Op, Value, check, key_of, rules

BOUND = 2.0


def wrote(process: str, begin: float, end: float, **values: Value) -> Op:
    return Op(process, "write", begin, end, values)


def read(process: str, at: float, took: float = 0.1, **values: Value) -> Op:
    return Op(process, "read", at, at + took, values)


def ends(process: str, at: float, **values: Value) -> Op:
    return Op(process, "last read", at, at + 0.1, values)


def appended(process: str, at: float, number: int, value: Value) -> Op:
    return Op(process, "write", at, at + 0.1, {key_of("s", number): value})


def listed(process: str, at: float, *values: Value) -> Op:
    shown = {key_of("s", number): value for number, value in enumerate(values) if value is not None}
    return Op(process, "read", at, at + 0.1, shown, lists="s")


RIGHT = {
    "one after the other": [
        wrote("p", 0, 1, title="a", note="a"),
        read("q", 2, title="a", note="a"),
        wrote("q", 3, 4, title="b", note="b"),
        read("p", 4.5, title="a", note="a"),  # stale, within the bound
        read("q", 5, title="b", note="b"),
        ends("p", 9, title="b", note="b"),
        ends(POCKETBASE, 9, title="b", note="b"),
    ],
    "two at once, in the one order or the other": [
        wrote("p", 0, 2, title="a"),
        wrote("q", 1, 3, title="b"),
        read("p", 4, title="b"),
        read("q", 4, title="b"),
        ends(POCKETBASE, 9, title="b"),
    ],
    "a write of which nobody knows, which is applied late": [
        wrote("p", 0, NEVER, title="a"),
        read("q", 1, title=None),
        wrote("q", 2, 3, title="b"),
        read("q", 4, title="b"),
        read("q", 5, title="a"),
        ends(POCKETBASE, 9, title="a"),
    ],
    "a write of which nobody knows, which was never applied": [
        wrote("p", 0, NEVER, title="a"),
        ends("q", 9, title=None),
        ends(POCKETBASE, 9, title=None),
    ],
    "an event of which nobody knows what became, which is seen": [
        Op("p", "write", 0, NEVER, {ANYWHERE: "a"}),
        listed("q", 1, "a"),
    ],
    "a session of which nobody knows what became, which is seen with all that it began with": [
        Op("p", "write", 0, NEVER, {ANYWHERE: "a", "?.title": "a", "?.customer": "ida"}),
        Op("q", "read", 5, 5.1, {"s.title": "a", "s.customer": "ida"}),
    ],
    "what was removed is not missed, and its number is free again": [
        appended("p", 0, 0, "a"),
        appended("p", 1, 1, "b"),
        Op("hand", "write", 2, 3, {key_of("s", 0): None}),
        listed("q", 2.5, "a", "b"),
        listed("q", 4, None, "b"),
        appended("p", 5, 0, "c"),
        listed("q", 6, "c", "b"),
    ],
    "a list that does not show the last yet": [
        appended("p", 0, 0, "a"),
        appended("p", 1, 1, "b"),
        listed("q", 1.5, "a"),
        listed("q", 3, "a", "b"),
    ],
    "reads that overlap": [
        wrote("p", 0, 1, title="a"),
        wrote("p", 2, 3, title="b"),
        read("q", 3.2, took=1, title="b"),
        read("q", 3.5, title="a"),
    ],
    "two that exist one after the other": [
        wrote("p", 0, 1, title="a"),
        read("q", 1.5, title="a"),
        wrote("p", 2, 3, title=None),
        read("q", 4, title=None),
        wrote("p", 5, 6, title="b"),
        read("q", 7, title="b"),
        wrote("p", 8, 9, title=None),
        read("q", 10, title=None),
    ],
}


@pytest.mark.parametrize("history", RIGHT.values(), ids=RIGHT)
def test_nothing_is_found_in_a_right_history(history: list[Op]) -> None:
    assert check(history, BOUND) == []


PLANTED = {
    "a lost write": ("1", [wrote("p", 0, 1, title="a"), ends(POCKETBASE, 2, title=None)]),
    "a write that an older one replaces": (
        "1",
        [wrote("p", 0, 1, title="a"), wrote("p", 2, 3, title="b"), ends(POCKETBASE, 9, title="a")],
    ),
    "a deletion that did not happen": (
        "1",
        [wrote("p", 0, 1, title="a"), wrote("p", 2, 3, title=None), ends(POCKETBASE, 9, title="a")],
    ),
    "half a write, and half of what was before": (
        "2",
        [wrote("p", 0, 1, title="a", note="a"), wrote("p", 2, 3, title="b", note="b"),
         read("q", 2.5, title="b", note="a")],
    ),
    "half a write of which nobody knows": (
        "2", [wrote("p", 0, NEVER, title="a", note="a"), ends(POCKETBASE, 9, title="a", note=None)],
    ),
    "the halves of two at once": (
        "2",
        [wrote("p", 0, 2, title="a", note="a"), wrote("q", 0, 2, title="b", note="b"),
         read("q", 3, title="a", note="b")],
    ),
    "what nobody wrote": ("2", [read("p", 0, title="a")]),
    "what nobody wrote beside what went anywhere": (
        "2",
        [Op("p", "write", 0, NEVER, {ANYWHERE: "a", "?.title": "a", "?.customer": "ida"}),
         Op("q", "read", 5, 5.1, {"s.title": "a", "s.customer": "tom"})],
    ),
    "what is written later": ("2", [read("p", 0, title="a"), wrote("p", 1, 2, title="a")]),
    "a step back": (
        "3",
        [wrote("p", 0, 1, title="a"), wrote("p", 2, 3, title="b"),
         read("q", 3.1, title="b"), read("q", 3.3, title="a")],
    ),
    "a step back between two that were written at once": (
        "3",
        [wrote("p", 0, 2, title="a"), wrote("r", 0, 2, title="b"),
         read("q", 3.1, title="a"), read("q", 3.3, title="b"), read("q", 3.5, title="a")],
    ),
    "two processes that see two orders": (
        "3",
        [wrote("p", 0, 2, title="a"), wrote("r", 0, 2, title="b"),
         read("q", 3.1, title="a"), read("q", 3.3, title="b"),
         read("s", 3.1, title="b"), read("s", 3.3, title="a")],
    ),
    "a write that its own process does not see": ("3", [wrote("p", 0, 1, title="a"), read("p", 1.1, title=None)]),
    "a write in the place of what was deleted that its own process does not see": (
        "3",
        [appended("p", 0, 0, "a"), Op("hand", "write", 1, 2, {key_of("s", 0): None}), appended("p", 3, 0, "b"),
         listed("p", 3.2)],
    ),
    "a deletion that is undone": (
        "3",
        [wrote("p", 0, 1, title="a"), read("q", 1.1, title="a"), wrote("p", 1.2, 1.4, title=None),
         read("q", 1.5, title=None), read("q", 1.7, title="a")],
    ),
    "a later event without an earlier one": (
        "3", [appended("p", 0, 0, "a"), appended("r", 1, 1, "b"), listed("q", 1.2, None, "b")],
    ),
    "a stale answer": (
        "4", [wrote("p", 0, 1, title="a"), wrote("p", 2, 3, title="b"), read("q", 3 + BOUND + 0.1, title="a")],
    ),
    "a list that never shows the last": (
        "4", [appended("p", 0, 0, "a"), appended("p", 1, 1, "b"), listed("q", 1.2 + BOUND, "a")],
    ),
    "a deletion that is not heard of": (
        "4", [wrote("p", 0, 1, title="a"), wrote("p", 2, 3, title=None), read("q", 3 + BOUND + 0.1, title="a")],
    ),
    "a dropped change": (
        "5",
        [wrote("p", 0, 2, title="a"), wrote("q", 1, 3, title="b"),
         ends("p", 9, title="a"), ends("q", 9, title="b"), ends(POCKETBASE, 9, title="b")],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("rule", "history"), PLANTED.values(), ids=PLANTED)
def test_a_planted_error_is_found(rule: str, history: list[Op]) -> None:
    assert rule in rules(check(history, BOUND))
