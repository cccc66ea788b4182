"""Rounds in which contenders take turns, so that a drift of the machine meets all of them alike."""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import psutil

from bench.machine import Meter, Used, resident_bytes
from bench.results import Cell, at_shares

Work = Callable[[int], Awaitable[Sequence[float]]]
"""Does so many operations, and returns the seconds that each of them took; nothing where that is too short to be
taken one by one."""


async def nothing() -> None:
    """What most contenders have to do before a turn."""


@dataclass(frozen=True)
class Contender:
    """Who takes part."""

    peer: str
    work: Work
    operations: int
    """In a round."""
    servers: Sequence[psutil.Process] = ()
    """The database's own processes."""
    prepare: Callable[[], Awaitable[None]] = nothing
    """Awaited before each turn, and not measured."""
    size: int | None = None
    """Where contenders are the same peer at different sizes: its own."""

    @property
    def name(self) -> str:
        """What tells it from the others."""
        return self.peer if self.size is None else f"{self.peer}, {self.size}"


@dataclass
class _Taken:
    used: list[Used] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)


class Turns:
    """What the rounds have shown, by the contenders' names."""

    def __init__(self, cells: Mapping[str, Cell]) -> None:
        self.cells = cells

    def faster(self, one: str, other: str) -> list[float]:
        """How many times as fast one is as the other, in each round."""
        return [mine / theirs for mine, theirs in zip(self.cells[one].rates, self.cells[other].rates, strict=True)]

    def slower(self, one: str, other: str, share: float) -> float:
        """How many times as long as the other's an operation of one takes, at this share of all."""
        return self.cells[one].wait(share) / self.cells[other].wait(share)


async def take_turns(
    contenders: Sequence[Contender],
    rounds: int,
    *,
    workload: str,
    of: str,
    size: int,
    unit: str,
    done: Callable[[], None] = lambda: None,
) -> Turns:
    """Let contenders work in turn, in each round beginning with another one. A round before the first, of a
    quarter of the operations, warms up and does not count.

    Args:
        done: called after each turn.
    """
    taken = {contender.name: _Taken() for contender in contenders}
    assert len(taken) == len(contenders), "each has a name of its own"
    for round_ in range(rounds + 1):
        first = round_ % len(contenders)
        for contender in (*contenders[first:], *contenders[:first]):
            operations = contender.operations if round_ else max(1, contender.operations // 4)
            await contender.prepare()
            gc.collect()
            meter = Meter(contender.servers)
            waits = await contender.work(operations)
            used = meter.used()
            if round_:
                taken[contender.name].used.append(used)
                taken[contender.name].waits += waits
            done()
    client = resident_bytes([psutil.Process()])
    return Turns(
        {
            contender.name: _cell(contender, taken[contender.name], client, workload, of, size, unit)
            for contender in contenders
        }
    )


def _cell(
    contender: Contender, taken: _Taken, client_bytes: int, workload: str, of: str, size: int, unit: str
) -> Cell:
    operations = contender.operations
    return Cell(
        workload=workload,
        peer=contender.peer,
        of=of,
        size=size if contender.size is None else contender.size,
        unit=unit,
        rates=[operations / used.wall for used in taken.used],
        waits=at_shares([1000 * wait for wait in taken.waits]),
        client_cpu=[used.client / operations * 1e6 for used in taken.used],
        server_cpu=[used.server / operations * 1e6 for used in taken.used] if contender.servers else [],
        client_bytes=client_bytes,
        server_bytes=resident_bytes(contender.servers),
    )
