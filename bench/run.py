"""A run: the workloads one after the other, with their progress shown, and what they find."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.growth import growths
from bench.machine import describe
from bench.results import Results, Series
from bench.rounds import Contender, Turns, take_turns
from bench.targets import TARGETS

Workload = Callable[["Run"], Awaitable[None]]


@dataclass(frozen=True)
class Options:
    is_quick: bool = False
    rounds: int = 5
    mongodb: str | None = None
    """Where a MongoDB is that may be filled and emptied."""
    largest: int = 1_000_000
    """No store is filled with more events."""


class Run:
    """What a workload is given: the options, and where its findings go."""

    def __init__(self, options: Options, progress: Progress, results: Results) -> None:
        self.options = options
        self.results = results
        self._progress = progress

    def scaled(self, full: int, quick: int) -> int:
        """A number of things to do, in a full or in a quick run."""
        return quick if self.options.is_quick else full

    def sizes(self, full: Sequence[int], quick: Sequence[int]) -> list[int]:
        """Those of a full or of a quick run that are not too large."""
        return [size for size in (quick if self.options.is_quick else full) if size <= self.options.largest]

    @contextmanager
    def step(self, what: str, total: int = 1) -> Iterator[Callable[[], None]]:
        """Show that something is under way. What is yielded tells that one of `total` is done."""
        task = self._progress.add_task(what, total=total)
        self._progress.refresh()

        def done() -> None:
            self._progress.advance(task)
            self._progress.refresh()

        try:
            yield done
        finally:
            self._progress.remove_task(task)

    async def take_turns(
        self, workload: str, contenders: Sequence[Contender], *, of: str, size: int, unit: str
    ) -> Turns:
        """See `rounds.take_turns`; the cells are kept."""
        rounds = self.options.rounds
        with self.step(f"{workload}, {size:,} {of}", (rounds + 1) * len(contenders)) as done:
            turns = await take_turns(contenders, rounds, workload=workload, of=of, size=size, unit=unit, done=done)
        self.results.cells += turns.cells.values()
        return turns

    def judge(self, key: str, values: Sequence[float]) -> None:
        """Hold what was measured, one value a round or one in all, against a target."""
        self.results.rows.append(TARGETS[key].row(values))

    def add_series(self, series: Series) -> None:
        self.results.series.append(series)

    def note(self, what: str) -> None:
        """Something that a reader of the results must know, such as what was left out."""
        self.results.notes.append(what)
        self._progress.console.print(what, style="yellow")


async def run(workloads: Mapping[str, Workload], options: Options, console: Console, results: Results) -> None:
    """Run these workloads. What each finds is in the results at once, whatever happens to the next."""
    began = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn when something is done, not by a thread of its own, whose CPU would be counted as the client's.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        whole = progress.add_task("all workloads", total=len(workloads))
        for name, workload in workloads.items():
            started = time.monotonic()
            progress.update(whole, description=f"all workloads: {name}")
            try:
                await workload(Run(options, progress, results))
            finally:
                order = list(TARGETS)
                results.rows.sort(key=lambda row: order.index(row.key))
                results.growths = growths(results.cells)
                results.seconds = time.monotonic() - began
            progress.advance(whole)
            progress.console.print(f"{name}: {time.monotonic() - started:.0f} s", style="dim")


def empty(options: Options) -> Results:
    """Those of a run that begins now, on this machine."""
    return Results(
        began=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S"),
        is_quick=options.is_quick,
        rounds=options.rounds,
        machine=describe(),
    )
