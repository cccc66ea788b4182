"""What the demo shows: phases with their timings, the conversation, the comparison, the verdict."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table


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
