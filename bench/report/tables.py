"""What is said in tables, before anybody decides how they look: the terminal and the page show the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from bench.report.groups import Group
from bench.report.palette import is_ours
from bench.report.words import NOTHING, median, megabytes, number, several, spread
from bench.results import Cell, Growth, Machine, Results, Row

Mark = Literal["", "best", "good", "bad", "quiet"]
"""How an entry is to be taken."""


class Entry(Struct, frozen=True):
    text: str
    mark: Mark = ""


class Column(Struct, frozen=True):
    name: str
    is_number: bool = False
    is_wide: bool = False
    """May be left out where there is little room."""


class Line(Struct, frozen=True, kw_only=True):
    entries: tuple[Entry, ...]
    below: str = ""
    """Said under the line."""
    anchor: str = ""
    is_strong: bool = False


class Table(Struct, frozen=True, kw_only=True):
    title: str
    columns: tuple[Column, ...]
    lines: list[Line]

    def without(self, dropped: Sequence[int]) -> Table:
        """The same without some columns, given by their places."""
        kept = [place for place in range(len(self.columns)) if place not in dropped]
        lines = [
            Line(
                entries=tuple(line.entries[place] for place in kept),
                below=line.below,
                anchor=line.anchor,
                is_strong=line.is_strong,
            )
            for line in self.lines
        ]
        return Table(title=self.title, columns=tuple(self.columns[place] for place in kept), lines=lines)

    def filled(self) -> Table:
        """The same without the columns in which nothing was measured."""
        places = range(len(self.columns))
        return self.without(
            [place for place in places if all(line.entries[place].text == NOTHING for line in self.lines)]
        )


def targets(rows: Sequence[Row]) -> Table:
    columns = (
        Column("target"),
        Column("wanted"),
        Column("aim"),
        Column("measured", is_number=True),
        Column("rounds, lowest to highest", is_number=True),
        Column("verdict"),
    )
    return Table(title="Targets", columns=columns, lines=[_target(row) for row in rows])


def verdict(row: Row) -> Entry:
    if row.verdict == "short":
        return Entry("short", "bad")
    return Entry("aim reached", "best") if row.reaches_aim else Entry("pass", "good")


def measured(row: Row, value: float) -> str:
    """A value with its unit."""
    return f"{number(value)}{row.unit if row.unit in ('x', '%') else f' {row.unit}'}"


def _target(row: Row) -> Line:
    low, high = min(row.values), max(row.values)
    entries = (
        Entry(row.what),
        Entry(row.wanted),
        Entry(row.aim),
        Entry(measured(row, row.measured)),
        Entry(f"{number(low)} to {number(high)}" if len(row.values) > 1 else NOTHING),
        verdict(row),
    )
    return Line(entries=entries, below=row.why, anchor=row.key)


def tally(rows: Sequence[Row]) -> str:
    """How many targets hold, in a sentence."""
    held = sum(row.verdict == "pass" for row in rows)
    aims = sum(row.reaches_aim for row in rows)
    return f"{held} of {several(len(rows), 'target')} hold, {aims} of them reach the aim." if rows else ""


def workload(group: Group) -> Table:
    """What its peers have shown, the fastest of each size first."""
    columns = (
        Column("peer"),
        Column(group.of, is_number=True),
        Column("a second (lowest to highest)", is_number=True),
        Column("p50 ms", is_number=True),
        Column("p99 ms", is_number=True),
        Column("client CPU µs", is_number=True),
        Column("server CPU µs", is_number=True),
        Column("client memory", is_number=True, is_wide=True),
        Column("server memory", is_number=True, is_wide=True),
    )
    cells = sorted(group.cells, key=lambda cell: (cell.size, -cell.rate))
    title = f"{group.workload} (operation: {group.unit})"
    return Table(title=title, columns=columns, lines=[_cell(cell) for cell in cells]).filled()


def _cell(cell: Cell) -> Line:
    texts = (
        cell.peer,
        f"{cell.size:,}",
        spread(cell.rates),
        number(cell.wait(0.5)) if cell.waits else NOTHING,
        number(cell.wait(0.99)) if cell.waits else NOTHING,
        median(cell.client_cpu),
        median(cell.server_cpu),
        megabytes(cell.client_bytes) if cell.client_bytes else NOTHING,
        megabytes(cell.server_bytes) if cell.server_bytes else NOTHING,
    )
    return Line(entries=tuple(map(Entry, texts)), is_strong=is_ours(cell.peer))


def laws(growths: Sequence[Growth]) -> Table:
    columns = (
        Column("workload"),
        Column("peer"),
        Column("with more"),
        Column("grows"),
        Column("largest against smallest", is_number=True),
        Column("misfit", is_number=True),
    )
    return Table(title="How costs grow", columns=columns, lines=[_law(growth) for growth in growths])


def _law(growth: Growth) -> Line:
    texts = (
        growth.workload,
        growth.peer,
        growth.of,
        growth.law,
        f"{number(growth.factor)}x",
        f"{100 * growth.misfit:.0f} %",
    )
    return Line(entries=tuple(map(Entry, texts)), is_strong=is_ours(growth.peer))


def facts(where: Machine) -> dict[str, str]:
    """Of a machine, by name."""
    return {
        "system": where.system,
        "processor": where.processor,
        "cores": str(where.cores),
        "memory": f"{where.memory_bytes / 2**30:.1f} GiB",
        **where.versions,
    }


def machine(where: Machine) -> Table:
    lines = [Line(entries=(Entry(name), Entry(value))) for name, value in facts(where).items()]
    return Table(title="Machine", columns=(Column("what"), Column("which")), lines=lines)


def about(results: Results) -> str:
    """When and how it ran, in a sentence."""
    kind = "A quick run, too short to judge by," if results.is_quick else "A full run"
    rounds = several(results.rounds, "round")
    minutes, seconds = divmod(round(results.seconds), 60)
    took = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    return f"{kind} of {rounds} in {took}, begun {results.began} UTC on {several(results.machine.cores, 'core')}."
