"""What differs between two runs.

A change counts only if it is larger than what the rounds of a run differ by: if the ranges of both runs do not
overlap. Where a run has one value alone nobody knows what another would have been, and nothing is judged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Final, Literal, TypeVar

from rich.console import Console

from bench.report.groups import groups
from bench.report.palette import is_ours
from bench.report.tables import Column, Entry, Line, Mark, Table, facts, measured, verdict
from bench.report.terminal import print_table
from bench.report.words import NOTHING, change, number
from bench.results import Cell, Machine, Results, Row

Verdict = Literal["better", "worse", "within noise", "cannot tell"]

BAND: Final = (0.98, 0.995)
"""A p99 is of all rounds together; how sure it is, its neighbours tell. With fewer than fifty operations they are
one and the same, and tell nothing."""

_MARKS: Final[dict[Verdict, Mark]] = {
    "better": "good",
    "worse": "bad",
    "within noise": "quiet",
    "cannot tell": "quiet",
}

_Found = TypeVar("_Found", Cell, Row)


def judged(before: Sequence[float], after: Sequence[float], *, more_is_better: bool) -> Verdict:
    """Of what the rounds of two runs have shown."""
    if len(before) < 2 or len(after) < 2:
        return "cannot tell"
    if min(after) > max(before):
        return "better" if more_is_better else "worse"
    if max(after) < min(before):
        return "worse" if more_is_better else "better"
    return "within noise"


def judged_tail(before: Cell, after: Cell) -> Verdict:
    """Of the p99 of two cells."""
    if not before.waits or not after.waits:
        return "cannot tell"
    bands = [[cell.wait(share) for share in BAND] for cell in (before, after)]
    if any(low == high for low, high in bands):
        return "cannot tell"
    return judged(*bands, more_is_better=False)


def show(before: Results, after: Results, console: Console) -> None:
    """Print what differs."""
    for warning in _warnings(before, after):
        console.print(warning, style="yellow", markup=False, highlight=False)
    counted: Counter[Verdict] = Counter()
    alone: list[str] = []
    if differing := _machines(before.machine, after.machine):
        print_table(differing, console)
    rows, lonely = _paired(before.rows, after.rows, lambda row: row.key)
    alone += [f"target {row.what} ({row.key}): only {run}" for row, run in lonely]
    if rows:
        print_table(_targets(rows, counted), console)
    cells, lonely_cells = _paired(
        before.cells, after.cells, lambda cell: (cell.workload, cell.of, cell.unit, cell.peer, cell.size)
    )
    alone += [f"{cell.workload}, {cell.peer}, {cell.size:,} {cell.of}: only {run}" for cell, run in lonely_cells]
    was = {id(new): old for old, new in cells}
    for group in groups([new for _, new in cells]):
        pairs = [(was[id(new)], new) for new in group.cells if was[id(new)].rates]
        title = f"{group.workload} (operation: {group.unit}; sizes: {group.of})"
        print_table(_cells(title, pairs, counted), console)
    for said in alone:
        console.print(said, style="dim", markup=False, highlight=False)
    console.print()
    console.print(_sum(counted), markup=False, highlight=False)


def _warnings(before: Results, after: Results) -> Iterable[str]:
    if before.is_quick or after.is_quick:
        yield "A quick run is too short to compare by: take two full ones."
    if before.is_quick != after.is_quick:
        yield "One run is quick and the other is not: their operations and sizes are not the same."
    ours, theirs = before.machine, after.machine
    if (ours.processor, ours.cores, ours.system) != (theirs.processor, theirs.cores, theirs.system):
        yield "The runs are from different machines: only ratios can be compared."


def _machines(before: Machine, after: Machine) -> Table | None:
    """The facts that are not the same."""
    old, new = facts(before), facts(after)
    lines = [
        Line(entries=(Entry(name), Entry(old.get(name, NOTHING)), Entry(new.get(name, NOTHING))))
        for name in old | new
        if old.get(name) != new.get(name)
    ]
    columns = (Column("what"), Column("before"), Column("after"))
    return Table(title="Machines and versions that differ", columns=columns, lines=lines) if lines else None


def _paired(
    before: Sequence[_Found], after: Sequence[_Found], key: Callable[[_Found], Hashable]
) -> tuple[list[tuple[_Found, _Found]], list[tuple[_Found, str]]]:
    """What is in both runs, and what is in one of them, with its name."""
    old, new = {key(found): found for found in before}, {key(found): found for found in after}
    alone = [(old[name], "before") for name in old if name not in new]
    alone += [(new[name], "after") for name in new if name not in old]
    return [(old[name], new[name]) for name in old if name in new], alone


def _targets(rows: Sequence[tuple[Row, Row]], counted: Counter[Verdict]) -> Table:
    columns = (
        Column("target"),
        Column("wanted"),
        Column("before", is_number=True),
        Column("after", is_number=True),
        Column("change", is_number=True),
        Column("found"),
        Column("verdict"),
    )
    lines = []
    for old, new in rows:
        found = judged(old.values, new.values, more_is_better=new.wanted.startswith("at least"))
        counted[found] += 1
        was, is_ = verdict(old), verdict(new)
        entries = (
            Entry(new.what),
            Entry(new.wanted),
            Entry(measured(old, old.measured)),
            Entry(measured(new, new.measured)),
            Entry(change(old.measured, new.measured)),
            _entry(found),
            is_ if was == is_ else Entry(f"{was.text}, now {is_.text}", is_.mark),
        )
        lines.append(Line(entries=entries))
    return Table(title="Targets", columns=columns, lines=lines)


def _cells(title: str, cells: Sequence[tuple[Cell, Cell]], counted: Counter[Verdict]) -> Table:
    columns = (
        Column("peer"),
        Column("size", is_number=True),
        Column("a second", is_number=True),
        Column("after", is_number=True),
        Column("change", is_number=True),
        Column("found"),
        Column("p99 ms", is_number=True),
        Column("after", is_number=True),
        Column("change", is_number=True),
        Column("found"),
    )
    lines = []
    for old, new in cells:
        found = judged(old.rates, new.rates, more_is_better=True)
        counted[found] += 1
        entries = (
            Entry(new.peer),
            Entry(f"{new.size:,}"),
            Entry(number(old.rate)),
            Entry(number(new.rate)),
            Entry(change(old.rate, new.rate)),
            _entry(found),
            *_tail(old, new, counted),
        )
        lines.append(Line(entries=entries, is_strong=is_ours(new.peer)))
    return Table(title=title, columns=columns, lines=lines).filled()


def _tail(old: Cell, new: Cell, counted: Counter[Verdict]) -> tuple[Entry, ...]:
    if not old.waits or not new.waits:
        return (Entry(NOTHING),) * 4
    found = judged_tail(old, new)
    counted[found] += 1
    before, after = old.wait(0.99), new.wait(0.99)
    return Entry(number(before)), Entry(number(after)), Entry(change(before, after)), _entry(found)


def _entry(found: Verdict) -> Entry:
    return Entry(found, _MARKS[found])


def _sum(counted: Counter[Verdict]) -> str:
    verdicts: tuple[Verdict, ...] = ("better", "worse", "within noise", "cannot tell")
    said = ", ".join(f"{counted[found]} {found}" for found in verdicts if counted[found])
    return f"Of what is in both runs: {said}." if said else "Nothing is in both runs."
