"""A report as a person reads it."""

from __future__ import annotations

import io
import sys

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pb_cached.cli.doctor.report import Report


def show(report: Report) -> None:
    """Output that cannot show every character gets others in their place."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    console = Console(highlight=False, emoji=False)
    plain = console.options.ascii_only
    marks = {
        "good": f"[green]{'+' if plain else chr(0x2713)}[/]",
        "weak": "[yellow]![/]",
        "bad": f"[bold red]{'x' if plain else chr(0x2717)}[/]",
    }
    if report.url:
        console.print(f"\n [bold]PocketBase at {escape(report.url)}[/]")
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(width=1)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for finding in report.findings:
        told = escape(finding.found)
        if finding.advice:
            told += f"\n[cyan]{'->' if plain else chr(0x2192)} {escape(finding.advice)}[/]"
        table.add_row(marks[finding.state], finding.about, told)
    console.print()
    console.print(table)
    if report.collections:
        console.print()
        console.print(_collections(report, plain))
    if report.duplicates:
        console.print()
        console.print(_duplicates(report, plain))
    console.print()
    console.print(f" {_verdict(report)}")


def _collections(report: Report, plain: bool) -> Table:
    table = Table(box=box.ASCII2 if plain else box.SIMPLE_HEAD, title="Our collections", title_justify="left")
    table.add_column("collection", overflow="fold")
    table.add_column("records", justify="right")
    for count in report.collections:
        table.add_row(escape(count.collection), f"{'> ' if count.more else ''}{count.records:,}")
    return table


def _duplicates(report: Report, plain: bool) -> Table:
    table = Table(box=box.ASCII2 if plain else box.SIMPLE_HEAD, title="Duplicates", title_justify="left")
    for heading in ("collection", "key", "records, the first inserted first"):
        table.add_column(heading, overflow="fold")
    for each in report.duplicates:
        key = "\n".join(f"{column} = {value}" for column, value in each.key.items())
        table.add_row(escape(each.collection), escape(key), escape("\n".join(each.records)))
    return table


def _verdict(report: Report) -> str:
    if not report.usable:
        return "[bold red]It cannot be used as it is.[/]"
    weak = sum(finding.state == "weak" for finding in report.findings)
    if weak:
        better = "one thing could be better" if weak == 1 else f"{weak} things could be better"
        return f"[bold yellow]It can be used; {better}.[/]"
    return "[bold green]It can be used.[/]"
