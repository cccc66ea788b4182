"""The command line, `pb-cached`. Commands import what they need when they run, so that `--help` is quick."""

from __future__ import annotations

from pathlib import Path

import click

from pb_cached.cli.interruption import at_once


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pb_cached")
def main() -> None:
    """Parlant's conversations in PocketBase."""


@main.command()
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    help="Leave the data in this folder, which must be empty or new.",
)
@click.option(
    "--turns", type=click.IntRange(1, 100), default=3, show_default=True, help="Turns before the restart."
)
def demo(keep: Path | None, turns: int) -> None:
    """Hold a conversation, stop everything, start again, and continue it.

    Starts a real PocketBase and a real Parlant server, whose language model is replaced by a deterministic one: it
    needs no key and no network. Ends with 0 if everything was the same after the restart, with 1 if not, and
    with 130 if it was interrupted.
    """
    with at_once():
        from pb_cached.cli.demo.run import run

        raise SystemExit(run(keep, turns))


@main.command()
@click.option(
    "--config",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    help="A TOML file; else PB_CACHED_CONFIG.",
)
@click.option(
    "--uninstall",
    is_flag=True,
    help="Take our triggers away from PocketBase, so that commits can go by its batch API. The data stays.",
)
def init(config: Path | None, uninstall: bool) -> None:
    """Create all collections of Parlant's stores, with what commits go by, as the first start would.

    With --uninstall, take the triggers away again, when no server is at work.
    """
    from pb_cached.cli.init import run

    raise SystemExit(run(config, uninstall))


@main.command()
@click.option(
    "--config",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    help="A TOML file; else PB_CACHED_CONFIG.",
)
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def doctor(config: Path | None, as_json: bool) -> None:
    """Look at a PocketBase as the stores would use it, and say what is well and what could be better.

    Changes nothing. Lists records that stand against unique indexes. Ends with 0 if the PocketBase can be used,
    with 1 if not.
    """
    from pb_cached.cli.doctor.run import run

    raise SystemExit(run(config, as_json))
