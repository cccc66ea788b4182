"""`python -m bench`: run the benchmarks, compare two runs, profile a workload."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click
from click.core import ParameterSource
from rich.console import Console

from bench.results import Results
from bench.run import Options, Workload, empty, run

QUICK_ROUNDS = 2


def workloads() -> dict[str, Workload]:
    """All of them, in the order in which they run. Imported here, as Parlant takes seconds to be."""
    from bench.workloads import (
        coherence,
        cold,
        listing,
        memory,
        mixed,
        opening,
        reads,
        servers,
        streaming,
        turns,
        waits,
        writes,
    )

    modules = (reads, writes, turns, listing, streaming, waits, coherence, servers, mixed, cold, opening, memory)
    return {module.__name__.rpartition(".")[2]: module.measure for module in modules}


@click.group(invoke_without_command=True, context_settings={"show_default": True})
@click.option("--quick", is_flag=True, help="A minute, at small sizes: to see that all of it works.")
@click.option("--rounds", default=5, type=click.IntRange(1, 50), help="In which all take turns; 2 if quick.")
@click.option("--only", multiple=True, help="A workload; may be given several times.")
@click.option("--largest", default=1_000_000, type=click.IntRange(10), help="Events that a store is filled with.")
@click.option("--mongodb", metavar="URL", help="Of a MongoDB that may be filled and emptied; else it is left out.")
@click.option("--out", default="bench-results", type=click.Path(path_type=Path), help="Folder for what is found.")
@click.pass_context
def main(
    context: click.Context,
    quick: bool,
    rounds: int,
    only: tuple[str, ...],
    largest: int,
    mongodb: str | None,
    out: Path,
) -> None:
    """Measure this library beside its peers, and write what is found as a page, pictures, and JSON."""
    if context.invoked_subcommand is not None:
        return
    if quick and context.get_parameter_source("rounds") is ParameterSource.DEFAULT:
        rounds = QUICK_ROUNDS
    console = Console()
    known = workloads()
    for name in only:
        if name not in known:
            raise click.BadParameter(f"there is no workload '{name}'; expected some of {', '.join(known)}")
    some = {name: known[name] for name in only or known}
    options = Options(is_quick=quick, rounds=rounds, mongodb=mongodb, largest=largest)
    from bench.report import show, write

    results = empty(options)
    try:
        asyncio.run(run(some, options, console, results))
    finally:  # minutes of measuring are not lost to the last workload, or to an impatient hand
        if results.cells or results.rows:
            show(results, console)
            console.print(f"written: {write(results, out)}")


@main.command()
@click.argument("before", type=click.Path(exists=True, path_type=Path))
@click.argument("after", type=click.Path(exists=True, path_type=Path))
def compare(before: Path, after: Path) -> None:
    """Show what differs between two runs: files, or folders with a `results.json`."""
    from bench.compare import show

    show(read(before), read(after), Console())


@main.command()
@click.argument("workload")
@click.option("--seconds", default=5.0, type=click.FloatRange(0.1, 600.0), help="For which it is repeated.")
@click.option("--html", type=click.Path(path_type=Path), help="Write the profile as a page, too.")
def profile(workload: str, seconds: float, html: Path | None) -> None:
    """Show where the time goes in a workload (pyinstrument)."""
    from bench.profile import WORKLOADS, profiled

    if workload not in WORKLOADS:
        raise click.BadParameter(f"there is no '{workload}'; expected one of {', '.join(WORKLOADS)}")
    profiled(workload, seconds, html, Console())


def read(path: Path) -> Results:
    """The results in a file or folder."""
    file = path / "results.json" if path.is_dir() else path
    try:
        return Results.read(file)
    except (OSError, ValueError) as error:
        raise click.ClickException(f"{file}: not the results of a run: {error}") from error
