"""`pb-cached demo`: the order of events, from the first start to the verdict."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import shutil
import tempfile
import time
from pathlib import Path

import httpx

from pb_cached.cli.demo.conversation import Conversation, differences
from pb_cached.cli.demo.processes import ParlantProcess, ParlantStopped
from pb_cached.cli.demo.records import unaccounted
from pb_cached.cli.demo.show import Show
from pb_cached.cli.demo.visit import visit
from pb_cached.cli.interruption import EXIT_CODE, Unwinding, unwinding
from pb_cached.config import LoggingSettings
from pb_cached.errors import PBCachedError
from pb_cached.pocketbase.server import PocketBaseServer
from pb_cached.telemetry import log_through

_EXTRAS = ("fastapi", "filelock")


def run(keep: Path | None, turns: int) -> int:
    """The exit code: 0 if all is as it should be, 1 if not, 130 if it was interrupted."""
    show = Show()
    if missing := [name for name in _EXTRAS if importlib.util.find_spec(name) is None]:
        show.failure(f"the demo needs {', '.join(missing)}: pip install 'pb_cached[embedded,demo]'")
        return 1
    if keep is not None and keep.exists() and any(keep.iterdir()):
        show.failure(f"{keep} is not empty; name a folder that is, or a new one")
        return 1
    with unwinding() as early:
        folder = keep.absolute() if keep is not None else Path(tempfile.mkdtemp(prefix="pb-cached-demo-"))
        try:
            return asyncio.run(_run(folder, turns, keep is not None, show, early))
        except (asyncio.CancelledError, OSError):  # a terminal that has hung up takes no more output
            if not early.began:
                raise
        finally:
            if keep is None:
                shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            show.failure("interrupted")
        return EXIT_CODE


async def _run(folder: Path, turns: int, kept: bool, show: Show, early: Unwinding) -> int:
    try:
        with early.cancels_this_task():
            return await _demonstrate(folder, turns, kept, show)
    except ParlantStopped as error:
        show.failure(str(error), error.last_lines)
    except PBCachedError as error:
        show.failure(str(error))
    except (httpx.HTTPError, AssertionError, TimeoutError) as error:
        show.failure(f"{type(error).__name__}: {error}")
    return 1


async def _demonstrate(folder: Path, turns: int, kept: bool, show: Show) -> int:
    show.title(folder)
    quiet = log_through(None, LoggingSettings(level="warning"))
    data = folder / "pocketbase"
    async with contextlib.AsyncExitStack() as first:
        with show.phase("start PocketBase") as phase:
            pocketbase = await first.enter_async_context(PocketBaseServer(data, log=quiet))
            phase.note(httpx.URL(pocketbase.url).netloc.decode())
        with show.phase("start Parlant, its stores in PocketBase") as phase:
            parlant = await first.enter_async_context(ParlantProcess(folder, pocketbase.connection_params))
            phase.note(httpx.URL(parlant.url).netloc.decode())
        conversation = await first.enter_async_context(Conversation.begin(parlant.url))
        with show.phase("a tagged customer, two values, a session"):
            await conversation.prepare()
        for number in range(1, turns + 1):
            await _turn(conversation, number, show)
        with show.phase("remember everything that is stored"):
            before = await conversation.settled(pocketbase.connection_params)
        with show.phase("stop Parlant, then PocketBase"):
            await first.aclose()
    async with contextlib.AsyncExitStack() as second:
        with show.phase("start both again, on the same data"):
            pocketbase = await second.enter_async_context(PocketBaseServer(data, log=quiet))
            parlant = await second.enter_async_context(ParlantProcess(folder, pocketbase.connection_params))
        conversation = await second.enter_async_context(conversation.resumed(parlant.url))
        with show.phase("compare everything with what it was"):
            after = await conversation.snapshot(pocketbase.connection_params)
            told = [*unaccounted(before), *differences(before, after), *unaccounted(after)]
            different = list(dict.fromkeys(told))  # what is missing both times is told once
        await _turn(conversation, turns + 1, show)
        offsets = await conversation.offsets()
    if offsets != list(range(len(offsets))):
        different.append(f"event offsets are not dense after the restart: {offsets}")
    show.comparison(before, after, different)
    if report := parlant.cache_report():
        show.cache(report)
    show.verdict(not different, len(offsets))
    if kept:
        show.kept(folder, visit(data))
    return 1 if different else 0


async def _turn(conversation: Conversation, number: int, show: Show) -> None:
    started = time.perf_counter()
    said, reply = await conversation.turn(number)
    show.turn(said, reply, time.perf_counter() - started)
    first = conversation.first_message
    assert f"Turn {number}." in reply, f"the agent does not remember: turn {number} was answered with '{reply}'"
    assert number == 1 or first in reply, f"the agent does not remember how it began: '{reply}'"
