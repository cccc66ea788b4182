"""`pb-cached demo` as a user runs it: it passes, it notices a difference, and it leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from parlant.core.common import Version
from parlant.core.persistence.common import ObjectId
from parlant.core.persistence.document_database import BaseDocument

from pb_cached import PocketBaseDocumentDatabase, PocketBaseServer
from pb_cached.cli import main
from pb_cached.cli.demo import records
from pb_cached.cli.demo.conversation import MESSAGES, Conversation, Snapshot, differences
from pb_cached.cli.demo.records import RECORDS, unaccounted
from pb_cached.cli.demo.show import Show
from pb_cached.cli.demo.visit import ADDRESS, visit
from pb_cached.cli.interruption import unwinding
from pb_cached.pocketbase import superuser
from pb_cached.stats import Stats
from pb_cached.stores import StoresStats
from pb_cached.writes.stats import summary

SECONDS = 60.0


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the demo in a process of its own, with its temporary folders below `tmp_path`."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "pb_cached.cli", "demo", "--turns", "1", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "TMPDIR": str(tmp_path),
                "PYTHONIOENCODING": "utf-8",
                "PYTHONUNBUFFERED": "1",
                **variables,
            },
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def processes_of(folder: Path) -> list[str]:
    """Command lines and environments that speak of the folder: what the demo started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            told = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            state = (process / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if str(folder).encode() in told and state != "Z":
            found.append(process.name)
    return found


def wait_until_gone(folder: Path) -> None:
    end = time.monotonic() + SECONDS
    while (left := processes_of(folder)) and time.monotonic() < end:
        time.sleep(0.05)
    assert left == []


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"the demo ended before it said '{text}'")


def cells(output: str, row: str) -> list[str]:
    """What a row of a table says after its name."""
    line = next(line for line in output.splitlines() if row in line)
    return re.findall(r"[\w?]+", line.split(row, 1)[1])


@pytest.mark.slow
def test_the_demo_resumes_its_conversation(demo: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = demo()
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output
    assert "Turn 2." in output
    assert "none lost, none changed" in output
    hits, _, misses, _ = cells(output, "sessions, events")
    assert int(hits) > int(misses) > 0
    wait_until_gone(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.soak
@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_it_leaves_nothing_behind(
    demo: Callable[..., subprocess.Popen[str]], tmp_path: Path, signal_: signal.Signals
) -> None:
    process = demo()
    read_until(process, "Turn 1.")
    assert processes_of(tmp_path)
    process.send_signal(signal_)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, output
    assert "interrupted" in output
    wait_until_gone(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.soak
def test_killed_it_takes_its_processes_with_it(demo: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = demo()
    read_until(process, "Turn 1.")
    process.kill()
    process.wait()
    wait_until_gone(tmp_path)


@pytest.mark.slow
async def test_what_is_kept_can_be_opened_again(
    demo: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    process = demo("--keep", str(kept))
    output, _ = await asyncio.to_thread(process.communicate, timeout=SECONDS)
    assert process.returncode == 0, output
    async with PocketBaseServer(kept / "pocketbase") as server, httpx.AsyncClient(base_url=server.url) as http:
        answer = await http.get(
            "/api/collections/parlant_sessions_events/records",
            headers={"Authorization": server.connection_params["admin_token"]},
        )
    assert answer.json()["totalItems"] == 14


@pytest.mark.slow
def test_a_difference_is_found_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody changes an event in PocketBase after the conversation was remembered."""
    settled = Conversation.settled

    async def remembered_then_changed(self: Conversation, pocketbase: Mapping[str, str]) -> Snapshot:
        snapshot = await settled(self, pocketbase)
        headers = {"Authorization": pocketbase["admin_token"]}
        async with httpx.AsyncClient(base_url=pocketbase["url"], headers=headers) as http:
            path = "/api/collections/parlant_sessions_events/records"
            first = (await http.get(path, params={"sort": "offset", "perPage": 1})).json()["items"][0]
            changed = await http.patch(f"{path}/{first['id']}", json={"trace_id": "another"})
            assert changed.is_success
        return snapshot

    monkeypatch.setattr(Conversation, "settled", remembered_then_changed)
    result = CliRunner().invoke(main, ["demo", "--turns", "1"])
    assert result.exit_code == 1, result.output
    assert "events: offset 0 was" in result.output
    assert "Not everything is as it was" in result.output


@pytest.mark.slow
def test_records_that_are_not_looked_at_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing to compare is not the same as nothing different."""

    async def none(pocketbase: Mapping[str, str]) -> dict[str, Any]:
        return {}

    monkeypatch.setattr("pb_cached.cli.demo.conversation.records", none)
    result = CliRunner().invoke(main, ["demo", "--turns", "1"])
    assert result.exit_code == 1, result.output
    assert "parlant_sessions_events holds 0, for 7 that the API shows" in result.output
    assert cells(result.output, RECORDS) == ["0", "0", "no"]


@pytest.mark.slow
def test_what_the_environment_says_about_pocketbase_is_none_of_the_demos_business(
    demo: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    configuration = tmp_path / "configuration.toml"
    configuration.write_text('[stores]\nsession_prefix = "another"\n[coherence]\nmode = "off"\n')
    process = demo(
        PB_CACHED_CONFIG=str(configuration),
        POCKETBASE_URL="http://127.0.0.1:1",
        POCKETBASE_ADMIN_TOKEN="nobody's",
    )
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output
    assert cells(output, RECORDS) == ["14", "14", "yes"]


async def test_records_are_read_page_after_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = records.PER_PAGE + 1

    async def keep(document: BaseDocument) -> BaseDocument:
        return document

    async with PocketBaseServer(tmp_path) as server:
        async with PocketBaseDocumentDatabase(None, server.connection_params) as database:
            collection = await database.get_or_create_collection("things", BaseDocument, keep)
            now = datetime.now(UTC).isoformat()
            await asyncio.gather(
                *(
                    collection.insert_one(
                        BaseDocument(
                            id=ObjectId(f"thing {number}"), creation_utc=now, version=Version.String("0.1.0")
                        )
                    )
                    for number in range(count)
                )
            )
        found = await records.records(server.connection_params)
        assert len(found) == count
        monkeypatch.setattr(records, "PER_PAGE", 3)  # collections are listed in pages, too
        assert await records.records(server.connection_params) == found


STORED: Snapshot = {
    "sessions": {"s": {}},
    "events": {"offset 0": {}, "offset 1": {}},
    "customers": {"c": {"tags": ["vip"]}},
    "variables": {"v": {"tags": []}},
    "values": {"plan of c": {}},
}
HELD = {
    "parlant_sessions_sessions": 1,
    "parlant_sessions_events": 2,
    "parlant_customers_customers": 1,
    "parlant_customers_customer_tag_associations": 1,
    "parlant_context_variables_variables": 1,
    "parlant_context_variables_values": 1,
}


@pytest.mark.parametrize("collection", [*HELD, "parlant_context_variables_variable_tag_associations", "parlant_x"])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_a_collection_holds_as_many_records_as_the_api_shows(collection: str, more: int) -> None:
    shown = HELD.get(collection, 0)
    held = HELD | {collection: max(shown + more, 0)}
    found: dict[str, Any] = {f"{name}/{number}": {} for name, count in held.items() for number in range(count)}
    told = [f"{RECORDS}: {collection} holds {held[collection]}, for {shown} that the API shows"]
    assert unaccounted(STORED | {RECORDS: found}) == (told if held[collection] != shown else [])


def test_ctrl_c_is_obeyed_without_a_word_while_modules_are_imported(
    demo: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "httpx.py").write_text("import signal\nprint('importing')\nsignal.pause()\n")
    process = demo(PYTHONPATH=os.pathsep.join([str(modules), os.environ.get("PYTHONPATH", "")]))
    read_until(process, "importing")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, output
    assert output == ""
    assert list(tmp_path.iterdir()) == [modules]


def test_a_second_signal_does_not_cut_the_undoing_short() -> None:
    undone = False

    async def work() -> None:
        nonlocal undone
        with early.cancels_this_task():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.Event().wait()
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(0)
                undone = True

    with unwinding() as early:
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(work())
        os.kill(os.getpid(), signal.SIGTERM)  # the folder is being removed
    assert undone
    assert early.began


def test_a_signal_that_comes_before_the_work_begins_is_not_lost() -> None:
    async def work() -> None:
        with early.cancels_this_task():
            await asyncio.Event().wait()

    with unwinding() as early:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(asyncio.wait_for(work(), SECONDS))


def test_under_nohup_a_hangup_stays_without_effect() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with unwinding() as early:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not early.began
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_output_of_any_encoding_is_good_enough(
    encoding: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, write_through=True))
    show = Show()
    show.title(tmp_path / "\u00dcberlingen \u20ac")
    with show.phase("something"):
        pass
    show.turn(MESSAGES[2], MESSAGES[2], 1.0)
    show.comparison({"events": {}}, {"events": {}}, ["events: \u201e1\u201c is gone"])
    writes = summary("log", 0, 0, [])
    empty = Stats(cache_bytes=0, cache_max_bytes=0, collections={}, writes=writes)
    show.cache(StoresStats(sessions=empty, customers=empty, variables=empty))
    show.verdict(True, 1)
    show.failure("something", "\u2026")
    told = written.getvalue().decode(encoding)
    assert "1 events, none lost" in told
    assert "? something" not in told


async def test_what_is_said_about_a_kept_folder_works_when_it_is_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "it's [red]mine[/red] :smile: and long enough to be wrapped wherever a terminal is narrow"
    async with PocketBaseServer(folder / "pocketbase"):
        token = superuser.signed_token(folder / "pocketbase" / "pb_data" / "data.db")
    Show().kept(folder, visit(folder / "pocketbase"))
    told = capsys.readouterr().out
    make_account, serve = (line.strip() for line in told.splitlines() if line.startswith("  "))
    said = re.search(r"as (\S+) with the password (\S+)", told)
    assert said is not None

    await asyncio.to_thread(subprocess.run, make_account, shell=True, check=True, timeout=SECONDS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    assert ADDRESS in serve
    server = subprocess.Popen(shlex.split(serve.replace(ADDRESS, address)), stdout=subprocess.DEVNULL)
    try:
        async with httpx.AsyncClient(base_url=f"http://{address}", trust_env=False) as http:
            async with asyncio.timeout(SECONDS):
                while server.poll() is None:
                    with contextlib.suppress(httpx.TransportError):
                        await http.get("/api/health")
                        break
                    await asyncio.sleep(0.02)
            answer = await http.post(
                "/api/collections/_superusers/auth-with-password",
                json={"identity": said[1], "password": said[2]},
            )
            assert answer.status_code == 200, answer.text
            visitor = answer.json()["token"]
            for one in (visitor, token):  # nobody else was locked out
                listed = await http.get("/api/collections", headers={"Authorization": one})
                assert listed.status_code == 200, listed.text
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
def test_a_server_that_cannot_start_says_why_and_nothing_else(tmp_path: Path) -> None:
    """Its input stays open, and so a thread of its goes on reading while it ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pb_cached.cli.demo.server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "POCKETBASE_URL": "nonsense", "PARLANT_HOME": str(tmp_path)},
    )
    assert process.stdout is not None and process.stdin is not None
    with process:
        output = process.stdout.read()
        assert process.wait(SECONDS) == 1
    assert output.startswith("Traceback"), output
    assert "ConfigError: POCKETBASE_URL" in output
    assert "Fatal" not in output


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    result = CliRunner().invoke(main, ["demo", "--keep", str(tmp_path)])
    assert result.exit_code == 1
    assert "not empty" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_without_its_extras_the_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pb_cached.cli.demo.run._EXTRAS", ("a_module_that_nobody_has",))
    result = CliRunner().invoke(main, ["demo"])
    assert result.exit_code == 1
    assert "pip install 'pb_cached[embedded,demo]'" in result.output


@pytest.mark.parametrize(
    ("after", "told"),
    [
        ({"events": {"offset 0": 1}}, []),
        ({"events": {}}, ["events: offset 0 is gone"]),
        ({}, ["events: offset 0 is gone"]),
        ({"events": {"offset 0": 1.0}}, ["events: offset 0 was 1, is 1.0"]),
        ({"events": {"offset 0": 1, "offset 1": 2}}, ["events: offset 1 is new: 2"]),
    ],
)
def test_differences_are_told_one_by_one(after: Snapshot, told: list[str]) -> None:
    assert differences({"events": {"offset 0": 1}}, after) == told


def test_help_names_the_demo() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    assert "demo" in result.output
