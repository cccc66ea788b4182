"""No commit blocks other writers for long, and none is small for nothing (design: section 6)."""

from __future__ import annotations

import asyncio
from typing import Any, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from parlant.core.common import Version
from parlant.core.persistence.common import ObjectId
from parlant.core.persistence.document_database import identity_loader_for

from pb_cached import Config, PocketBaseServer
from pb_cached.config import PocketBaseSettings, WriteSettings
from pb_cached.writes.pace import Pace
from tests.conftest import EXCLUSIVE, DatabaseMaker
from tests.faults import EVERY, Exchange, FaultProxy

MOST = 200
SECONDS = 0.25


def sizes(pace: Pace, way: float, a_record: float, commits: int, queued: int = 10_000) -> list[int]:
    """How many records each of these commits holds."""
    held = []
    for _ in range(commits):
        records = min(queued, pace.records)
        pace.took(records, way + a_record * records)
        held.append(records)
    return held


def test_fast_commits_hold_as_many_as_they_may() -> None:
    assert sizes(Pace(MOST, SECONDS), 0.001, 0.000_1, 10) == [MOST] * 10


def test_slow_records_make_commits_smaller_and_fast_ones_larger_again() -> None:
    pace = Pace(MOST, SECONDS)
    assert sizes(pace, 0.001, 0.01, 6) == [200, 100, 50, 25, 25, 25]
    assert sizes(pace, 0.001, 0.000_1, 5) == [25, 50, 100, 200, 200]


def test_a_slow_way_makes_one_commit_small_and_no_more() -> None:
    assert sizes(Pace(MOST, SECONDS), 0.5, 0.000_1, 6, queued=100) == [100, 50, 100, 100, 100, 100]


def test_a_lone_writer_far_away_makes_no_commit_small() -> None:
    pace = Pace(MOST, SECONDS)
    sizes(pace, 1.0, 0.000_1, 20, queued=1)
    assert sizes(pace, 1.0, 0.000_1, 3) == [MOST] * 3


def test_records_that_are_slow_on_a_slow_way_are_told_from_it() -> None:
    assert sizes(Pace(MOST, SECONDS), 0.3, 0.005, 8)[-1] == 50


@given(
    st.integers(1, 5000),
    st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 60)), max_size=50),
)
def test_whatever_happened_a_commit_may_hold_something_and_no_more_than_is_set(
    most: int, commits: list[tuple[int, float]]
) -> None:
    pace = Pace(most, SECONDS)
    for records, seconds in commits:
        pace.took(records, seconds)
        assert 1 <= pace.records <= most


@given(st.floats(0, 2), st.floats(0.000_001, 1))
def test_whatever_way_and_records_take_others_wait_no_longer_in_the_end(way: float, a_record: float) -> None:
    """Than for one record, which cannot be less, and the time that is set; and no commit is smaller than a quarter
    of what there is time for. Where a record takes longer than that by itself, now and then there are two."""
    held = sizes(Pace(MOST, SECONDS), way, a_record, 40)[20:]
    longest = max(held)
    assert longest <= 2 or (longest - 1) * a_record <= SECONDS * 1.01
    assert min(held) >= min(MOST, SECONDS / a_record) // 4


class Note(TypedDict, total=False):
    id: ObjectId
    creation_utc: str
    version: Version.String


@pytest.mark.slow
@pytest.mark.parametrize("path", ["log", "batch"])
async def test_where_pocketbase_takes_long_for_many_records_commits_hold_fewer(
    make_database: DatabaseMaker, pocketbase: PocketBaseServer, proxy: FaultProxy, path: Any
) -> None:
    held: list[int] = []

    async def slowly(exchange: Exchange) -> None:
        if records := exchange.body.count(b"creation "):
            held.append(records)
            await asyncio.sleep(0.004 * records)
        await exchange.forward()

    proxy.plan("POST", "/api/", slowly, at=EVERY)
    config = Config(
        pocketbase=PocketBaseSettings(commit=path),
        coherence=EXCLUSIVE,
        writes=WriteSettings(max_commit_seconds=0.2),
    )
    params = {**pocketbase.connection_params, "url": proxy.url}
    async with make_database(config=config, connection_params=params) as database:
        notes = await database.get_or_create_collection("notes", Note, identity_loader_for(Note))
        await asyncio.gather(
            *(
                notes.insert_one(
                    Note(id=ObjectId(str(n)), creation_utc=f"creation {n}", version=Version.String("1"))
                )
                for n in range(500)
            )
        )
        assert held[:3] == [200, 100, 50]
        assert (await notes.find({})).total_count == 500
