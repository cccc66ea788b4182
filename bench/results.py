"""What a run of the benchmarks has found, and its file.

Everything that a report shows or two runs are compared by is in here. No I/O but reading and writing that file.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec
from msgspec import Struct

from bench.quantiles import quantile

SHARES: Final = (0.0, *(number / 100 for number in range(1, 100)), 0.995, 0.999, 1.0)
"""Those of all waits at which a cell tells how long they were."""


class Machine(Struct, frozen=True, kw_only=True):
    """Where it ran, and with what."""

    system: str
    processor: str
    cores: int
    memory_bytes: int
    versions: dict[str, str]
    """Of Python, PocketBase, and the packages that matter."""


class Cell(Struct, frozen=True, kw_only=True):
    """One peer at one size of one workload: what each round has shown."""

    workload: str
    peer: str
    of: str
    """What the size counts, such as `events stored`."""
    size: int
    unit: str
    """An operation, such as `turn`."""
    rates: list[float]
    """Operations a second, in each round."""
    waits: list[float]
    """Milliseconds that an operation took, of all rounds, at each of `SHARES`; empty where that was not taken."""
    client_cpu: list[float]
    """Microseconds of this process's CPU for an operation, in each round."""
    server_cpu: list[float]
    """The same of the database's own processes; empty where it has none."""
    client_bytes: int
    """Resident, when the last round had ended."""
    server_bytes: int

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def milliseconds(self) -> float:
        """For one operation, one after the other or many at once, as the workload has it."""
        return 1000 / self.rate

    def wait(self, share: float) -> float:
        """The milliseconds that this share of the operations took at most; the nearest of `SHARES` counts."""
        nearest = min(range(len(SHARES)), key=lambda index: abs(SHARES[index] - share))
        return self.waits[nearest]


def at_shares(waits: Sequence[float]) -> list[float]:
    """Of all waits those at `SHARES`."""
    ordered = sorted(waits)
    return [quantile(ordered, share) for share in SHARES] if ordered else []


Verdict = Literal["pass", "short"]


class Row(Struct, frozen=True, kw_only=True):
    """A target, and what was measured."""

    key: str
    what: str
    wanted: str
    aim: str
    unit: str
    values: list[float]
    """One of each round, or one in all."""
    verdict: Verdict
    reaches_aim: bool
    why: str
    """Where it falls short: the reason, and what would change it."""

    @property
    def measured(self) -> float:
        return statistics.median(self.values)


Law = Literal["flat", "logarithmic", "linear"]


class Growth(Struct, frozen=True, kw_only=True):
    """How the cost of an operation grows with size."""

    workload: str
    peer: str
    of: str
    unit: str
    law: Law
    factor: float
    """What the largest size costs of what the smallest does."""
    misfit: float
    """Root mean square of the relative distance between the law and what was measured."""


class Series(Struct, frozen=True, kw_only=True):
    """Something that was watched over time."""

    workload: str
    name: str
    x: str
    y: str
    points: list[tuple[float, float]]


class Results(Struct, kw_only=True):
    """One run."""

    began: str
    """UTC, as `2026-11-25 20:00:00`."""
    seconds: float = 0.0
    is_quick: bool
    rounds: int
    machine: Machine
    cells: list[Cell] = []
    rows: list[Row] = []
    growths: list[Growth] = []
    series: list[Series] = []
    notes: list[str] = []
    """What was left out, and why."""

    @classmethod
    def read(cls, path: Path) -> Results:
        """Raises:
        msgspec.DecodeError, OSError: it is not the file of a run.
        """
        return msgspec.json.decode(path.read_bytes(), type=cls)

    def write(self, path: Path) -> None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))
