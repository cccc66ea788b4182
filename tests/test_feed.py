"""What a feed makes of commits that come in any order, repeatedly, late, or never (design: section 8)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pb_cached.coherence import feed as feed_module
from pb_cached.coherence.entries import Entry, Gap
from pb_cached.coherence.feed import PATIENCE, Feed

MAX_STALENESS = 5.0


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(feed_module, "now", clock)
    return clock


def stamp() -> str:
    """What PocketBase's clock shows now: not the time of ours."""
    return f"{feed_module.now() + 1e9:020.6f}"


def commit(n: int, server: str = "s") -> Entry:
    return Entry(f"{server}{n}", server, n, created=stamp())


def beat(coming: Feed, last: int, server: str = "s", after: str | None = None) -> bool:
    return coming.beat(server, stamp(), last, stamp() if after is None else after)


def numbers(entries: Sequence[Entry]) -> list[int]:
    return [entry.n for entry in entries]


def feed() -> Feed:
    feed = Feed("log", MAX_STALENESS)
    feed.arrived(commit(1))
    return feed


@given(st.permutations(range(2, 9)), st.lists(st.integers(2, 8), max_size=5))
def test_commits_of_a_server_are_handed_on_in_its_order_whatever_order_they_come_in(
    order: list[int], repeated: list[int]
) -> None:
    coming = feed()
    handed = [n for number in order for n in numbers(coming.arrived(commit(number)))]
    assert handed == list(range(2, 9))
    assert not coming.is_waiting
    for number in repeated:  # to what it changed, that is all the same
        assert numbers(coming.arrived(commit(number))) == [number]


@given(st.sets(st.integers(2, 12)), st.sets(st.integers(2, 12)), st.randoms())
def test_what_was_lost_is_handed_on_in_order_when_it_is_looked_up(
    exist: set[int], lost: set[int], random: object
) -> None:
    coming = feed()
    order = sorted(exist - lost)
    random.shuffle(order)  # type: ignore[attr-defined]
    handed = [n for number in order for n in numbers(coming.arrived(commit(number)))]
    beat(coming, 12)
    for gap in itertools.takewhile(bool, (next(iter(_overdue(coming)), None) for _ in range(20))):
        assert gap is not None
        for number in sorted(exist & lost):
            if gap.first <= number <= gap.last:
                handed += numbers(coming.arrived(commit(number)))
        handed += numbers(coming.settle(gap))
    assert handed == sorted(exist)


@given(st.sets(st.integers(2, 12)), st.randoms())
def test_what_never_comes_holds_up_the_rest_until_it_is_looked_up(exist: set[int], random: object) -> None:
    coming = feed()
    order = sorted(exist)
    random.shuffle(order)  # type: ignore[attr-defined]
    handed = [n for number in order for n in numbers(coming.arrived(commit(number)))]
    beat(coming, 12)
    while coming.is_waiting:
        (gap,) = _overdue(coming)
        assert not exist & set(range(gap.first, gap.last + 1)), "what has come is not looked up"
        handed += numbers(coming.settle(gap))
    assert handed == sorted(exist)


def _overdue(coming: Feed) -> list[Gap]:
    now = feed_module.now
    try:
        feed_module.now = lambda: now() + 10 * PATIENCE
        return list(coming.overdue())
    finally:
        feed_module.now = now


def test_servers_do_not_wait_for_each_other() -> None:
    coming = feed()
    assert coming.arrived(commit(3)) == []
    assert numbers(coming.arrived(commit(1, "other"))) == [1]
    assert numbers(coming.arrived(commit(2, "other"))) == [2]


def test_a_missing_number_is_waited_for_and_then_overdue(clock: Clock) -> None:
    coming = feed()
    coming.arrived(commit(4))
    assert list(coming.overdue()) == []
    clock.time += 2 * PATIENCE
    assert list(coming.overdue()) == [Gap("s", 2, 3)]
    coming.arrived(commit(2))  # a step on is a reason to wait for the next one
    assert list(coming.overdue()) == []
    clock.time += 2 * PATIENCE
    assert list(coming.overdue()) == [Gap("s", 3, 3)]


def test_a_beat_tells_what_nobody_has_heard_of(clock: Clock) -> None:
    coming = feed()
    assert not beat(coming, 1)
    assert beat(coming, 3)
    clock.time += 2 * PATIENCE
    assert list(coming.overdue()) == [Gap("s", 2, 3)]


def test_of_a_server_that_was_never_heard_of_all_before_its_first_commit_is_missing(clock: Clock) -> None:
    coming = feed()
    coming.proven(100.0, stamp())
    clock.time += 4
    coming.proven(clock.time, stamp())
    assert coming.arrived(commit(3, "new")) == []
    assert beat(coming, 2, "another")
    assert not beat(coming, 0, "a third")
    assert coming.good_until == 100.0 + MAX_STALENESS, "they may be as old as our knowledge of the log"
    clock.time += 2 * PATIENCE
    assert coming.overdue() == [Gap("new", 1, 2), Gap("another", 1, 2)]
    assert numbers(coming.settle(Gap("new", 1, 2))) == [3]
    coming.settle(Gap("another", 1, 2))
    assert coming.good_until == 104.0 + MAX_STALENESS


def test_it_is_known_when_the_log_began_to_be_followed(clock: Clock) -> None:
    coming = Feed("log", MAX_STALENESS)
    clock.time += 50
    coming.subscribed()
    clock.time += 3
    first = stamp()
    coming.arrived(commit(1))
    clock.time += 20
    coming.subscribed()
    coming.arrived(commit(2))
    assert coming.began == (first, 3.0)


def test_answers_are_good_for_as_long_as_the_proof_says(clock: Clock) -> None:
    coming = feed()
    assert coming.good_until == 0.0
    coming.proven(90.0, stamp())
    assert coming.good_until == 90.0 + MAX_STALENESS
    coming.proven(80.0, stamp())
    assert coming.good_until == 90.0 + MAX_STALENESS, "an older beat that comes late proves nothing new"
    coming.lost()
    assert coming.good_until == 0.0


def test_a_missing_number_ends_answers_though_the_stream_lives(clock: Clock) -> None:
    coming = feed()
    coming.proven(100.0, stamp())
    coming.arrived(commit(3))
    for _ in range(20):
        clock.time += 1
        coming.proven(clock.time, stamp())
    assert coming.good_until == 100.0 + MAX_STALENESS
    coming.arrived(commit(2))
    assert coming.good_until == clock.time + MAX_STALENESS


def test_what_has_come_and_cannot_be_applied_ends_answers_too(clock: Clock) -> None:
    coming = feed()
    coming.proven(100.0, stamp())
    coming.doubt(clock.time)
    clock.time += 3
    coming.proven(clock.time, stamp())
    assert coming.good_until == 100.0 + MAX_STALENESS
    coming.doubt(None)
    assert coming.good_until == clock.time + MAX_STALENESS


def test_a_log_that_was_made_anew_begins_anew() -> None:
    coming = feed()
    coming.caught_up()
    coming.arrived(Entry("a", "s", 5, created="2026"))
    assert coming.newest == "2026"
    coming.proven(100.0, stamp())
    coming.forget()
    assert (coming.newest, coming.good_until, coming.is_waiting) == ("", 0.0, False)
    assert numbers(coming.arrived(commit(1))) == [1]


def test_answers_are_no_older_than_what_a_missing_commit_may_be(clock: Clock) -> None:
    coming = feed()  # at 100, and was heard of last then
    clock.time += 4
    coming.proven(clock.time, stamp())
    coming.arrived(commit(3))  # the second may have been committed at 100
    assert coming.good_until == 100.0 + MAX_STALENESS


def test_numbers_that_are_always_late_do_not_end_answers_while_they_come(clock: Clock) -> None:
    coming = feed()
    for number in range(2, 200):  # each comes after the one that follows it
        clock.time += 0.1
        coming.proven(clock.time, stamp())
        coming.arrived(commit(number + 1 if number % 2 == 0 else number - 1))
        assert coming.good_until > clock.time + MAX_STALENESS - 0.5


def test_a_beat_that_comes_late_does_not_make_younger_what_is_missing(clock: Clock) -> None:
    coming = feed()
    coming.arrived(commit(3))
    clock.time += 4
    coming.proven(clock.time, stamp())
    assert beat(coming, 3)
    assert coming.good_until == 100.0 + MAX_STALENESS


def test_what_is_missing_is_no_older_than_what_its_server_had_heard_of_when_it_told_its_numbers(
    clock: Clock,
) -> None:
    coming = feed()
    for _ in range(4):
        clock.time += 1
        coming.proven(clock.time, stamp())
    after = stamp()
    clock.time += 0.5
    coming.proven(clock.time, stamp())
    assert not beat(coming, 1, after=after)  # which was long on its way
    assert beat(coming, 2)
    assert coming.good_until == 104.0 + MAX_STALENESS


def test_what_is_missing_is_no_older_than_the_commit_before_it(clock: Clock) -> None:
    coming = feed()
    for _ in range(4):
        clock.time += 1
        coming.proven(clock.time, stamp())
    second = commit(2)
    clock.time += 1
    coming.proven(clock.time, stamp())
    coming.arrived(second)  # as late as our own beats say
    coming.arrived(commit(4))
    assert coming.good_until == 104.0 + MAX_STALENESS


def test_what_comes_before_a_gap_was_read_back_does_not_hide_it() -> None:
    coming = feed()
    coming.caught_up()
    coming.arrived(Entry("a", "s", 2, created="12:00"))
    coming.lost()
    coming.arrived(Entry("b", "s", 9, created="13:00"))  # by the next stream
    coming.lost()  # and that too, before the log was read
    assert coming.newest == "12:00"
    coming.caught_up()
    assert coming.newest == "13:00"


def test_a_gap_lasts_from_the_last_proof_until_it_is_read_back(clock: Clock) -> None:
    coming = feed()
    coming.caught_up()
    coming.proven(99.0, stamp())
    coming.lost()
    clock.time += 50
    coming.lost()
    assert coming.behind_since == 99.0
    coming.caught_up()
    assert coming.behind_since is None


def test_too_many_that_wait_for_one_begin_the_log_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "MOST_EARLY", 3)
    coming = feed()
    coming.caught_up()
    coming.proven(100.0, stamp())
    for number in range(3, 7):
        assert coming.arrived(commit(number)) == []
    assert not coming.is_proven and coming.behind_since is not None
    assert not coming.is_waiting


def test_what_is_looked_up_while_the_log_is_made_anew_is_nobodys(clock: Clock) -> None:
    coming = feed()
    coming.arrived(commit(3))
    clock.time += 2 * PATIENCE
    (gap,) = coming.overdue()
    coming.forget()
    assert coming.settle(gap) == []
