"""What the demo shows: phases with their timings, the conversation, the comparison, the cache, the verdict.

Output that cannot show every character gets another mark, or a question mark, in place of what it cannot show.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Column, Table

from pb_cached.cli.demo.visit import Visit
from pb_cached.stats import Stats
from pb_cached.stores import StoresStats


class Phase:
    def __init__(self) -> None:
        self.text = ""

    def note(self, text: str) -> None:
        self.text = f"  [dim]{escape(text)}[/]"


class Show:
    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        self._console = Console(highlight=False, emoji=False)
        plain = self._console.options.ascii_only
        self._good, self._bad = ("+", "x") if plain else ("\u2713", "\u2717")
        self._spinner = "line" if plain else "dots"

    def title(self, folder: Path) -> None:
        title = f"A Parlant server on PocketBase, stopped and resumed\n[dim]{escape(str(folder))}[/]"
        self._console.print(Panel(title, expand=False))

    @contextmanager
    def phase(self, what: str) -> Iterator[Phase]:
        phase = Phase()
        started = time.perf_counter()
        with self._console.status(f"{what} ...", spinner=self._spinner):
            yield phase
        seconds = time.perf_counter() - started
        self._console.print(f"[green]{self._good}[/] {what:<44}[cyan]{seconds * 1000:8,.0f} ms[/]{phase.text}")

    def turn(self, said: str, reply: str, seconds: float) -> None:
        lines = Table.grid(padding=(0, 2), expand=True)
        lines.add_column(width=10, justify="right")
        lines.add_column(ratio=1)
        lines.add_column(width=10, justify="right")
        lines.add_row("[bold]customer[/]", escape(said), "")
        lines.add_row("[bold magenta]agent[/]", escape(reply), f"[cyan]{seconds * 1000:,.0f} ms[/]")
        self._console.print(lines)

    def comparison(
        self, before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]], different: list[str]
    ) -> None:
        table = Table("stored", "before", "after", "identical", title="Before and after the restart")
        for kind in before:
            same = not any(line.startswith(f"{kind}:") for line in different)
            table.add_row(
                kind,
                str(len(before[kind])),
                str(len(after.get(kind, {}))),
                "[green]yes[/]" if same else "[red]no[/]",
            )
        self._console.print(table)
        for line in different:
            self._console.print(f"[red]{self._bad}[/] {escape(line)}", soft_wrap=True)

    def cache(self, report: StoresStats) -> None:
        """What was read since the second start, and how much of it from memory."""
        table = Table(
            "reads of",
            *(Column(heading, justify="right") for heading in ("hits", "negative hits", "misses", "through")),
            title="What the cache did after the restart",
            caption="hit, negative hit: answered from memory; miss: loaded from PocketBase first; "
            "through: not for the cache",
        )
        for name, stats in (
            ("sessions, events", report.sessions),
            ("customers, tags", report.customers),
            ("variables, values", report.variables),
        ):
            table.add_row(name, *map(str, _reads(stats)))
        self._console.print(table)

    def verdict(self, same: bool, events: int) -> None:
        if same:
            self._console.print(
                f"[bold green]The conversation went on: {events} events, none lost, none changed.[/]"
            )
        else:
            self._console.print("[bold red]Not everything is as it was before the restart.[/]")

    def kept(self, folder: Path, visit: Visit) -> None:
        self._console.print(
            f"\nThe data is in {escape(str(folder))}. To look at it, make an account and start PocketBase:",
            soft_wrap=True,
        )
        for command in visit.commands:
            self._console.print(f"  {escape(command)}", soft_wrap=True)
        self._console.print(
            f"Then sign in at {visit.dashboard} as {visit.email} with the password {visit.password}",
            soft_wrap=True,
        )

    def failure(self, why: str, details: str = "") -> None:
        self._console.print(f"[bold red]{self._bad} {escape(why)}[/]", soft_wrap=True)
        if details:
            self._console.print(escape(details), style="dim", soft_wrap=True)


def _reads(stats: Stats) -> tuple[int, int, int, int]:
    """Hits, negative hits, misses and reads through, of all collections together."""
    of = stats.collections.values()
    return (
        sum(one.hits for one in of),
        sum(one.negative_hits for one in of),
        sum(one.misses for one in of),
        sum(one.through for one in of),
    )
