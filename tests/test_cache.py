"""The cache alone, against a model of PocketBase: whatever arrives, in whatever order, it ends up right."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from pb_cached.cache.collection import DELETED, CollectionCache, Reading, Rule, State
from pb_cached.cache.memory import Memory
from pb_cached.cache.partition import Entry, FactReader, Partition, decoded, drop, partition_of, put, since
from pb_cached.exact import dumps

EVENTS = Rule(("session_id",), sequence="offset", unique_ids=True, max_documents=6)
SESSIONS = ("s1", "s2")


def cache_of(rule: Rule = EVENTS, max_bytes: int = 1_000_000) -> CollectionCache:
    return CollectionCache(rule, Memory(max_bytes))


def state(cache: CollectionCache, record: str, rev: int = 1, session: str = "s1", **fields: Any) -> State:
    document = {"id": f"id-{record}", "session_id": session, "creation_utc": record} | fields
    return cache.state(record, rev, document, dumps(document))


def documents(cache: CollectionCache, session: str = "s1") -> list[Any] | None:
    key = cache.key(session)
    assert key is not None
    partition = cache.get(key)
    return None if partition is None else decoded(partition.entries)


def load(cache: CollectionCache, session: str, *rows: State) -> None:
    key = cache.key(session)
    assert key is not None
    cache.load(cache.begin(key), rows)


def records(cache: CollectionCache, session: str = "s1") -> list[str] | None:
    found = documents(cache, session)
    return None if found is None else [document["creation_utc"] for document in found]


# --- one rule at a time ----------------------------------------------------------------------------------------


def test_what_was_not_loaded_is_not_known() -> None:
    cache = cache_of()
    cache.apply(state(cache, "a"))
    assert documents(cache) is None


def test_a_loaded_partition_is_complete_also_when_it_is_empty() -> None:
    cache = cache_of()
    load(cache, "s1")
    assert documents(cache) == []


def test_a_change_that_follows_replaces() -> None:
    cache = cache_of()
    load(cache, "s1", state(cache, "a"))
    cache.apply(state(cache, "a", 2, text="new"))
    assert [d["text"] for d in documents(cache) or ()] == ["new"]


def test_a_change_that_is_known_is_dropped() -> None:
    cache = cache_of()
    load(cache, "s1", state(cache, "a", 5, text="now"))
    cache.apply(state(cache, "a", 4, text="before"))
    cache.apply(state(cache, "a", 5, text="now"))
    assert [d["text"] for d in documents(cache) or ()] == ["now"]


@pytest.mark.parametrize("rev", [3, 1], ids=["a change is missing", "two claim one revision"])
def test_everything_else_is_doubt_until_it_is_read_again(rev: int) -> None:
    cache = cache_of()
    load(cache, "s1", state(cache, "a", 1, text="old"))
    cache.apply(state(cache, "a", rev, text="other"))
    assert documents(cache) is None
    key = cache.key("s1")
    assert key is not None
    assert cache.is_doubtful(key)
    reading = cache.begin_again()
    assert reading.records == {"a"}
    cache.settle(reading, {"a": state(cache, "a", 3, text="true")})
    assert [d["text"] for d in documents(cache) or ()] == ["true"]


def test_a_deleted_record_does_not_come_back() -> None:
    cache = cache_of()
    load(cache, "s1", state(cache, "a"))
    cache.apply(State("a", DELETED))
    cache.apply(state(cache, "a", 2))
    cache.apply(state(cache, "b"))
    assert records(cache) == ["b"]


def test_a_deletion_that_overtakes_its_creation_holds() -> None:
    cache = cache_of()
    load(cache, "s1")
    cache.apply(State("a", DELETED))
    cache.apply(state(cache, "a"))
    assert records(cache) == []


def test_a_load_does_not_bring_back_what_changed_while_it_ran() -> None:
    cache = cache_of()
    key = cache.key("s1")
    assert key is not None
    reading = cache.begin(key)
    old = [state(cache, name) for name in "abc"]
    cache.apply(State("a", DELETED))
    cache.apply(state(cache, "b", 2, text="new"))
    cache.apply(state(cache, "c", 2, session="s2"))
    cache.apply(state(cache, "d"))
    cache.load(reading, old)
    assert records(cache) == ["b", "d"]
    assert (documents(cache) or [{}])[0]["text"] == "new"


def test_a_record_that_moves_leaves_its_partition_for_the_other() -> None:
    cache = cache_of()
    load(cache, "s1", state(cache, "a"))
    load(cache, "s2")
    cache.apply(state(cache, "a", 2, session="s2"))
    assert (records(cache, "s1"), records(cache, "s2")) == ([], ["a"])
    cache.apply(state(cache, "a", 1))
    assert (records(cache, "s1"), records(cache, "s2")) == ([], ["a"])


def test_a_record_that_moves_out_of_sight_does_not_come_back() -> None:
    cache = cache_of()
    load(cache, "s1", state(cache, "a"))
    cache.apply(state(cache, "a", 2, session="s2"))
    cache.apply(state(cache, "a", 1))
    assert records(cache, "s1") == []
    load(cache, "s2", state(cache, "a", 2, session="s2"))
    assert records(cache, "s2") == ["a"]


def test_a_creation_that_an_update_has_overtaken_is_read_again() -> None:
    cache = cache_of()
    load(cache, "s1")
    cache.altered("a", 2)  # another server's, which does not say what it has left
    cache.apply(state(cache, "a", 1, text="old"))
    assert documents(cache) is None
    cache.settle(cache.begin_again(), {"a": state(cache, "a", 2, text="new")})
    assert [d["text"] for d in documents(cache) or ()] == ["new"]


def test_a_creation_that_an_update_has_overtaken_during_a_load_is_read_again() -> None:
    cache = cache_of()
    key = cache.key("s1")
    assert key is not None
    reading = cache.begin(key)
    cache.altered("a", 2)
    cache.apply(state(cache, "a", 1))
    cache.load(reading, [])
    assert documents(cache) is None


def test_what_is_in_doubt_leaves_a_hole_before_it_as_what_is_not() -> None:
    cache = cache_of()
    load(cache, "s1", state(cache, "a", offset=0))
    cache.altered("c", 2)
    cache.apply(state(cache, "c", offset=2))
    cache.settle(cache.begin_again(), {"c": state(cache, "c", 2, offset=2)})
    assert documents(cache) is None
    cache.apply(state(cache, "b", offset=1))
    assert records(cache) == ["a", "b", "c"]


def test_what_a_hand_has_added_leaves_a_hole_before_it_too() -> None:
    cache = cache_of()
    load(cache, "s1", state(cache, "a", offset=0))
    cache.edited(state(cache, "c", offset=2))
    cache.settle(cache.begin_again(), {"c": state(cache, "c", offset=2)})
    assert documents(cache) is None
    load(cache, "s1", state(cache, "a", offset=0), state(cache, "c", offset=2))
    assert records(cache) == ["a", "c"]


def test_what_is_cleared_is_not_even_known_to_be_empty() -> None:
    memory = Memory(1_000_000)
    cache, other = CollectionCache(EVENTS, memory), CollectionCache(EVENTS, memory)
    for each in (cache, other):
        load(each, "s1")
        load(each, "s2", state(each, "a", session="s2"))
    cache.clear()
    assert documents(cache, "s1") is None and documents(cache, "s2") is None
    assert documents(other, "s1") == [] and records(other, "s2") == ["a"]


def test_after_a_backup_was_restored_what_was_deleted_may_be_there_again() -> None:
    cache = cache_of()
    load(cache, "s1", state(cache, "a"))
    cache.apply(State("a", DELETED))
    cache.restart()
    assert documents(cache) is None
    load(cache, "s1", state(cache, "a"))
    cache.apply(state(cache, "a", 2, text="new"))
    assert [d.get("text") for d in documents(cache) or ()] == ["new"]


def test_an_id_tells_its_partition_and_record() -> None:
    cache = cache_of()
    load(cache, "s1", state(cache, "a"))
    assert cache.place("id-a") == (cache.key("s1"), "a")
    cache.apply(state(cache, "a", 2, id="another"))
    assert cache.place("id-a") is None
    assert cache.place("another") == (cache.key("s1"), "a")
    cache.apply(State("a", DELETED))
    assert cache.place("another") is None


def test_a_number_that_leaves_a_hole_hides_its_partition_until_the_hole_is_filled() -> None:
    cache = cache_of()
    load(cache, "s1", state(cache, "a", offset=0))
    cache.apply(state(cache, "d", offset=3))
    assert documents(cache) is None
    cache.apply(state(cache, "c", offset=2))
    assert documents(cache) is None
    cache.apply(state(cache, "b", offset=1))
    assert records(cache) == ["a", "b", "c", "d"]


def test_a_hole_that_a_load_confirms_hides_nothing() -> None:
    cache = cache_of()
    load(cache, "s1", state(cache, "a", offset=0))
    cache.apply(state(cache, "d", offset=3))
    load(cache, "s1", state(cache, "a", offset=0), state(cache, "d", offset=3))
    assert records(cache) == ["a", "d"]
    cache.apply(state(cache, "e", offset=4))
    assert records(cache) == ["a", "d", "e"]


def test_a_partition_that_outgrows_its_bound_is_no_longer_kept() -> None:
    cache = cache_of()
    load(cache, "s1", *(state(cache, name) for name in "abcdef"))
    cache.apply(state(cache, "g"))
    key = cache.key("s1")
    assert key is not None
    assert documents(cache) is None
    assert not cache.may_keep(key)
    assert len(cache) == 0


def test_what_an_unfinished_write_may_still_change_is_not_kept() -> None:
    cache = cache_of()
    key = cache.key("s1")
    assert key is not None
    reading = cache.begin(key)
    cache.avoid(key)
    cache.load(reading, [state(cache, "a")])
    assert documents(cache) is None
    assert not cache.may_keep(key)


# --- memory ----------------------------------------------------------------------------------------------------


def test_the_least_recently_used_partition_goes_first() -> None:
    memory = Memory(7_000)
    cache = CollectionCache(Rule(("session_id",)), memory)
    for session in ("s1", "s2"):
        load(cache, session, state(cache, f"{session}-a", session=session, text="x" * 2_000))
    assert records(cache, "s1") == ["s1-a"]
    load(cache, "s3", state(cache, "s3-a", session="s3", text="x" * 2_000))
    assert records(cache, "s2") is None
    assert records(cache, "s1") == ["s1-a"]
    assert cache.stats.evictions == 1
    assert memory.bytes == cache.stats.bytes <= 7_000


def test_a_partition_larger_than_the_memory_evicts_no_other() -> None:
    cache = cache_of(max_bytes=5_000)
    load(cache, "s1", state(cache, "a"))
    load(cache, "s2", state(cache, "b", session="s2", text="x" * 10_000))
    assert records(cache, "s1") == ["a"]
    assert records(cache, "s2") is None


def test_partitions_give_the_garbage_collector_nothing_to_do() -> None:
    cache = CollectionCache(Rule(("session_id",)), Memory(10**9))
    before = len(gc.get_objects())
    for number in range(1_000):
        session = f"s{number}"
        load(cache, session, *(state(cache, f"{session}-{n}", session=session) for n in range(5)))
    gc.collect()
    assert len(gc.get_objects()) - before < 100


# --- order -----------------------------------------------------------------------------------------------------

numbers = st.lists(st.integers(0, 50), max_size=30)


@given(numbers, st.integers(-1, 55))
def test_what_is_new_is_found_by_bisection(offsets: list[int], least: int) -> None:
    facts = FactReader("offset")
    partition: Partition = partition_of("key", (), facts)
    for position, offset in enumerate(sorted(set(offsets))):
        partition = put(partition, Entry(f"{position:03}", 1, dumps({"offset": offset})), facts)
    found = [document["offset"] for document in decoded(since(partition, least, facts))]
    assert found == [offset for offset in sorted(set(offsets)) if offset >= least or len(set(offsets)) == 1]


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["a", "b", "c"]), st.booleans()), max_size=12))
def test_a_partition_knows_its_order_and_size(steps: list[tuple[int, str, bool]]) -> None:
    facts = FactReader("offset")
    partition: Partition = partition_of("key", (), facts)
    for offset, at, comes in steps:
        before = partition
        if comes:
            document = dumps({"creation_utc": at, "id": at, "offset": offset})
            partition = put(partition, Entry(f"r{offset}", 1, document), facts)
        else:
            partition = drop(partition, f"r{offset}", facts)
        anew = partition_of("key", partition.entries, facts)
        assert (partition.size, type(partition)) == (anew.size, type(anew))
        # What was dropped may have been what stood out of order; it is never the other way round.
        assert anew.ordered or not partition.ordered
        assert anew.rising or not partition.rising
        records = {entry.record for entry in before.entries} - {f"r{offset}"} | (
            {f"r{offset}"} if comes else set()
        )
        assert [entry.record for entry in partition.entries] == sorted(records)


# --- who waits is told -----------------------------------------------------------------------------------------


def woken(cache: CollectionCache, session: str = "s1") -> list[str]:
    """Grows by one whenever the partition's watchers are woken."""
    calls: list[str] = []
    key = cache.key(session)
    assert key is not None
    cache.watches.add([key], lambda: calls.append(session))
    return calls


def test_a_change_wakes_who_watches_its_partition_cached_or_not() -> None:
    cache = cache_of()
    one, other = woken(cache, "s1"), woken(cache, "s2")
    cache.apply(state(cache, "a"))
    load(cache, "s1", state(cache, "a"))
    assert (one, other) == (["s1"], []), "that it is cached from now on is no change"
    cache.apply(state(cache, "a", 2))
    cache.apply(State("a", DELETED))
    assert (one, other) == (["s1"] * 3, [])


def test_a_record_that_moves_wakes_who_watches_either_partition() -> None:
    cache = cache_of()
    load(cache, "s1", state(cache, "a"))
    one, other = woken(cache, "s1"), woken(cache, "s2")
    cache.apply(state(cache, "a", 2, session="s2"))
    assert (one, other) == (["s1"], ["s2"])


def test_a_change_that_a_load_was_faster_with_wakes_all_the_same() -> None:
    """Whoever looked before the partition was evicted does not know of it."""
    cache = cache_of()
    load(cache, "s1", state(cache, "a"))
    key = cache.key("s1")
    assert key is not None
    calls = woken(cache)
    cache.forget(key)
    load(cache, "s1", state(cache, "a"), state(cache, "b"))
    cache.apply(state(cache, "b"))
    assert calls == ["s1"]


def test_doubt_and_its_end_wake() -> None:
    cache = cache_of()
    load(cache, "s1", state(cache, "a"))
    calls = woken(cache)
    cache.edited(state(cache, "a", text="by hand"))
    assert calls == ["s1"]
    cache.settle(cache.begin_again(), {"a": state(cache, "a", text="by hand")})
    assert calls == ["s1"] * 2


def test_distrust_and_an_unknown_outcome_wake_and_eviction_does_not() -> None:
    cache = cache_of()
    load(cache, "s1", state(cache, "a"))
    one, other = woken(cache, "s1"), woken(cache, "s2")
    key = cache.key("s1")
    assert key is not None
    cache.forget(key)
    assert one == []
    cache.distrust(key)
    cache.avoid(key)
    assert (one, other) == (["s1"] * 2, [])
    cache.avoid(None)
    assert (one, other) == (["s1"] * 3, ["s2"])


def test_who_leaves_is_not_woken_and_not_remembered() -> None:
    cache = cache_of()
    calls: list[str] = []
    key = cache.key("s1")
    assert key is not None
    leave = cache.watches.add([key], lambda: calls.append("one"))
    leave_all = cache.watches.add(None, lambda: calls.append("all"))
    cache.apply(state(cache, "a"))
    assert sorted(calls) == ["all", "one"]
    leave()
    cache.apply(state(cache, "b"))
    assert sorted(calls) == ["all", "all", "one"]
    leave_all()
    assert not cache.watches


# --- any order -------------------------------------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """PocketBase is a dict of the latest states. Changes are told late, twice, or in any order; reads take their
    rows at some moment between their beginning and their end; a foreign hand writes and leaves the revision.
    Somebody watches every partition, and looks at it when he is woken."""

    told = Bundle("told")
    edited = Bundle("edited")
    begun = Bundle("begun")
    read = Bundle("read")

    def __init__(self) -> None:
        super().__init__()
        self.cache = cache_of(max_bytes=4_000)
        self.stored: dict[str, State] = {}
        self.made = 0
        self.untold: list[State] = []
        self.untold_edits: list[State] = []
        self.woken: set[str] = set()
        self.seen: dict[str, dict[str, Any]] = {session: {} for session in SESSIONS}
        for session in SESSIONS:
            self.cache.watches.add([f"0:{session}"], partial(self.woken.add, session))

    def store(self, new: State) -> State:
        if new.document is None:
            del self.stored[new.record]
        else:
            self.stored[new.record] = new
        self.untold.append(new)
        return new

    def rows(self, reading: Reading) -> list[State]:
        if reading.key is None:
            return [self.stored[record] for record in reading.records if record in self.stored]
        return [stored for stored in self.stored.values() if stored.key == reading.key]

    @rule(target=told, session=st.sampled_from(SESSIONS), offset=st.integers(0, 4))
    def create(self, session: str, offset: int) -> State:
        self.made += 1
        return self.store(state(self.cache, f"r{self.made:03}", session=session, offset=offset))

    @rule(target=told, data=st.data(), session=st.none() | st.sampled_from(SESSIONS))
    def update(self, data: st.DataObject, session: str | None) -> Any:
        """The fields of a record change, and perhaps its partition."""
        if not self.stored:
            return multiple()
        old = self.stored[data.draw(st.sampled_from(sorted(self.stored)))]
        assert isinstance(old.key, str)
        where = session or old.key.partition(":")[2]
        return self.store(state(self.cache, old.record, old.rev + 1, session=where, text=str(old.rev)))

    @rule(target=told, data=st.data())
    def delete(self, data: st.DataObject) -> Any:
        if not self.stored:
            return multiple()
        return self.store(State(data.draw(st.sampled_from(sorted(self.stored))), DELETED))

    @rule(target=edited, data=st.data(), session=st.sampled_from(SESSIONS))
    def edit(self, data: st.DataObject, session: str) -> Any:
        """A foreign hand writes, and leaves the revision as it is."""
        if not self.stored:
            return multiple()
        old = self.stored[data.draw(st.sampled_from(sorted(self.stored)))]
        self.made += 1
        edit = state(self.cache, old.record, old.rev, session=session, text=f"edit {self.made}")
        self.stored[old.record] = edit
        self.untold_edits.append(edit)
        return edit

    @rule(change=told)
    def tell(self, change: State) -> None:
        if change in self.untold:
            self.untold.remove(change)
        self.cache.apply(change)

    @rule(edit=edited)
    def tell_of_edit(self, edit: State) -> None:
        if edit in self.untold_edits:
            self.untold_edits.remove(edit)
        self.cache.edited(edit)

    @rule(target=begun, session=st.sampled_from(SESSIONS))
    def begin(self, session: str) -> Reading:
        key = self.cache.key(session)
        assert key is not None
        return self.cache.begin(key)

    @rule(target=begun)
    def begin_again(self) -> Reading:
        return self.cache.begin_again()

    @rule(target=read, reading=consumes(begun))
    def take_rows(self, reading: Reading) -> tuple[Reading, list[State]]:
        return reading, self.rows(reading)

    @rule(ended=consumes(read))
    def end(self, ended: tuple[Reading, list[State]]) -> None:
        self.finish(*ended)

    @rule(reading=consumes(begun))
    def fail(self, reading: Reading) -> None:
        self.cache.abandon(reading)

    @rule(session=st.sampled_from(SESSIONS))
    def forget(self, session: str) -> None:
        key = self.cache.key(session)
        assert key is not None
        self.cache.forget(key)

    @invariant()
    def who_was_woken_looks(self) -> None:
        """As a reader does: at what is cached, else at PocketBase."""
        while self.woken:
            session = self.woken.pop()
            key = self.cache.key(session)
            assert key is not None
            shown = self.cache.get(key)
            if shown is not None:
                self.seen[session] = {entry.record: entry.document for entry in shown.entries}
            else:
                self.seen[session] = {s.record: s.document for s in self.stored.values() if s.key == key}

    def finish(self, reading: Reading, rows: list[State]) -> None:
        if reading.key is None:
            self.cache.settle(reading, {row.record: row for row in rows})
        else:
            self.cache.load(reading, rows)

    @invariant()
    def the_books_balance(self) -> None:
        memory = self.cache._memory
        partitions = list(memory._partitions.values())
        assert memory.bytes == self.cache.stats.bytes == sum(partition.size for partition in partitions)
        assert memory.bytes <= memory.max_bytes
        held = {entry.record: partition.key for partition in partitions for entry in partition.entries}
        assert self.cache._records == held
        assert set(self.cache._ids.values()) <= set(held)

    def teardown(self) -> None:
        """Everything is told at last, and whoever is in doubt reads again: then the cache is right, and who looked
        whenever he was woken has missed nothing that is there."""
        for change in self.untold:
            self.cache.apply(change)
        for edit in self.untold_edits:
            self.cache.edited(edit)
        self.who_was_woken_looks()
        for session in SESSIONS:
            there = {s.record: s.document for s in self.stored.values() if s.key == f"0:{session}"}
            assert there.items() <= self.seen[session].items()
        for session in SESSIONS:
            key = self.cache.key(session)
            assert key is not None
            if self.cache.is_doubtful(key):
                again = self.cache.begin_again()
                self.finish(again, self.rows(again))
            shown = self.cache.get(key)
            if shown is None:
                continue
            held = {entry.record: (entry.rev, entry.document) for entry in shown.entries}
            stored = {s.record: (s.rev, s.document) for s in self.stored.values() if s.key == key}
            assert held == stored


AnyOrder.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
