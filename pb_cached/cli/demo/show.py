"""What the demo shows: phases with their timings, the conversation, the comparison, the cache, the verdict."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Column, Table

from pb_cached.cache.stats import Stats
from pb_cached.stores import StoresStats


class Phase:
    def __init__(self) -> None:
        self.text = ""

    def note(self, text: str) -> None:
        self.text = f"  [dim]{escape(text)}[/]"


class Show:
    def __init__(self) -> None:
        self._console = Console(highlight=False)

    def title(self, folder: Path) -> None:
        title = f"A Parlant server on PocketBase, stopped and resumed\n[dim]{escape(str(folder))}[/]"
        self._console.print(Panel(title, expand=False))

    @contextmanager
    def phase(self, what: str) -> Iterator[Phase]:
        phase = Phase()
        started = time.perf_counter()
        with self._console.status(f"{what} ..."):
            yield phase
        seconds = time.perf_counter() - started
        self._console.print(f"[green]✓[/] {what:<44}[cyan]{seconds * 1000:8,.0f} ms[/]{phase.text}")

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
            self._console.print(f"[red]✗[/] {escape(line)}", soft_wrap=True)

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

    def verdict(self, same: bool, events: int, kept: Path | None) -> None:
        if same:
            self._console.print(
                f"[bold green]The conversation went on: {events} events, none lost, none changed.[/]"
            )
        else:
            self._console.print("[bold red]Not everything is as it was before the restart.[/]")
        if kept is not None:
            self._console.print(
                f"The data is in {escape(str(kept))}. To look at it: pocketbase serve "
                f"--dir={escape(str(kept / 'pocketbase' / 'pb_data'))}",
                soft_wrap=True,
            )

    def failure(self, why: str, details: str = "") -> None:
        self._console.print(f"[bold red]✗ {escape(why)}[/]", soft_wrap=True)
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
