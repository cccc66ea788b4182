"""Results in a terminal, by rich."""

from __future__ import annotations

from typing import Final

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from bench.report import tables
from bench.report.groups import groups
from bench.report.tables import Entry, Mark, Table
from bench.results import Results

ROOM: Final = 130
"""Characters from which on all columns are shown."""

_STYLES: Final[dict[Mark, str]] = {
    "": "",
    "best": "bold green",
    "good": "green",
    "bad": "bold red",
    "quiet": "dim",
}


def show(results: Results, console: Console) -> None:
    """Print what was found."""
    console.print(tables.about(results), markup=False, highlight=False)
    if results.rows:
        print_table(tables.targets(results.rows), console)
        console.print(tables.tally(results.rows), markup=False, highlight=False)
    for group in groups(results.cells):
        print_table(tables.workload(group), console)
    if results.growths:
        print_table(tables.laws(results.growths), console)
    for note in results.notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False)
    print_table(tables.machine(results.machine), console)


def print_table(table: Table, console: Console) -> None:
    """Print one table, without its wide columns where there is no room."""
    if console.width < ROOM:
        table = table.without([place for place, column in enumerate(table.columns) if column.is_wide])
    shown = RichTable(show_edge=False)
    for column in table.columns:
        shown.add_column(Text(column.name), justify="right" if column.is_number else "left")
    for line in table.lines:
        first, *rest = line.entries
        opening = _text(first)
        if line.below:
            opening.append(f"\n{line.below}", style="italic dim")
        shown.add_row(opening, *map(_text, rest), style="bold" if line.is_strong else "")
    console.print(Text(f"\n{table.title}", style="bold"))
    console.print(shown)


def _text(entry: Entry) -> Text:
    return Text(entry.text, style=_STYLES[entry.mark])
