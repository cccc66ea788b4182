"""Access to an embedded PocketBase: a superuser that is created once, and tokens without a stored password.

Creating (or "upserting") a superuser again would invalidate every token, so it is done for a new folder only.
Without a password we sign tokens ourselves, as PocketBase would: HS256 with the account's `tokenKey` and its
collection's secret, both of which are in the folder's database.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import sqlite3
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
from msgspec import Struct

from pb_cached.errors import EmbeddedServerError

EMAIL: Final = "embedded@pb-cached.local"
"""The account of ours in a folder whose caller names none."""
TOKEN_SECONDS: Final = 10 * 365 * 86_400
COMMAND_SECONDS: Final = 60.0


class Account(Struct, frozen=True):
    """An email and a password that somebody wants to sign in with."""

    email: str
    password: str

    def __repr__(self) -> str:
        return f"Account({self.email!r}, ***)"


class Folders(Struct, frozen=True):
    data: Path
    migrations: Path

    @property
    def flags(self) -> list[str]:
        # The default migrations folder lies beside the data, and would be shared with other servers there.
        return [f"--dir={self.data}", f"--migrationsDir={self.migrations}"]

    @property
    def database(self) -> Path:
        return self.data / "data.db"

    @property
    def unfinished(self) -> Path:
        """There from the moment before the first superuser is created until access to it has been tried out."""
        return self.data.with_name("setup_unfinished")


def ensure(binary: Path, folders: Folders, account: Account | None) -> str | None:
    """Create a superuser where the folder has none, before PocketBase serves it.

    Returns:
        Its password, which nobody else knows yet; None where there was a superuser already.

    Raises:
        EmbeddedServerError: PocketBase's command failed.
    """
    emails = _emails(folders.database)
    if emails and not folders.unfinished.exists():
        return None
    older = _version(binary) < (0, 23)
    if older and account is None:
        raise EmbeddedServerError("PocketBase before 0.23 needs a password: pass admin_email and admin_password")
    folders.unfinished.touch()
    # Other users can read a command line for as long as it runs, so `access` replaces this password at once.
    password = secrets.token_urlsafe(24)
    email = account.email if account else EMAIL
    if older:
        _run(binary, "migrate", "up", *folders.flags)
    command = "update" if _is_among(email, emails) else "create"
    kind = "admin" if older else "superuser"
    said = _run(binary, kind, command, *folders.flags, "--", email, password)  # one may begin with a dash
    if not _is_among(email, _emails(folders.database)):  # up to 0.39 it fails with exit code 0
        raise EmbeddedServerError(
            f"PocketBase did not create a superuser in {folders.data}: {said.strip()[-300:]}"
        )
    return password


async def access(url: str, folders: Folders, account: Account | None, first: str | None) -> dict[str, str]:
    """What it takes to connect to the running server, tried out.

    Args:
        first: what `ensure` returned.

    Raises:
        EmbeddedServerError: the folder's superuser has another password, or our token is not accepted.
    """
    async with httpx.AsyncClient(base_url=url, timeout=30.0, trust_env=False) as http:
        if account is None:
            if first is not None:
                await _set_password(http, folders, Account(EMAIL, secrets.token_urlsafe(24)), first)
            token = signed_token(folders.database)
            answer = await http.get("/api/collections", params={"perPage": 1}, headers={"Authorization": token})
            if answer.status_code != 200:
                raise EmbeddedServerError(
                    f"this PocketBase does not accept a token signed with its own keys ({answer.status_code}); "
                    "pass admin_email and admin_password"
                )
            folders.unfinished.unlink(missing_ok=True)
            return {"url": url, "admin_token": token}
        if await _signed_in(http, account) is None:
            await _set_password(http, folders, account, first)
            if await _signed_in(http, account) is None:
                raise EmbeddedServerError(f"PocketBase refuses the email and password of '{account.email}'")
        folders.unfinished.unlink(missing_ok=True)
        return {"url": url, "admin_email": account.email, "admin_password": account.password}


def signed_token(database: Path) -> str:
    """A superuser's token for PocketBase 0.23 and later.

    Raises:
        EmbeddedServerError: the database does not hold the keys where they are expected.
    """
    try:
        with _Opened(database) as connection:
            collection_id, options = connection.execute(
                "SELECT id, options FROM _collections WHERE name = '_superusers'"
            ).fetchone()
            account_id, key = connection.execute(
                "SELECT id, tokenKey FROM _superusers ORDER BY email = ? DESC, created LIMIT 1", (EMAIL,)
            ).fetchone()
        secret = msgspec.json.decode(options)["authToken"]["secret"]
    except (sqlite3.Error, TypeError, KeyError, msgspec.DecodeError) as error:
        raise EmbeddedServerError(
            f"{database} has no superuser keys where PocketBase 0.23 and later keep them; "
            "pass admin_email and admin_password"
        ) from error
    claims = {
        "collectionId": collection_id,
        "exp": int(time.time()) + TOKEN_SECONDS,
        "id": account_id,
        "refreshable": False,
        "type": "auth",
    }
    signed = b".".join(_base64(msgspec.json.encode(part)) for part in ({"alg": "HS256", "typ": "JWT"}, claims))
    signature = hmac.new(f"{key}{secret}".encode(), signed, hashlib.sha256).digest()
    return (signed + b"." + _base64(signature)).decode()


async def _set_password(http: httpx.AsyncClient, folders: Folders, account: Account, first: str | None) -> None:
    """Give a new account its password; never change that of one which had one.

    Raises:
        EmbeddedServerError: it had one, or PocketBase refuses the new one.
    """
    wanted: dict[str, Any] = {"password": account.password, "passwordConfirm": account.password}
    if first is not None:
        signed_in = await _signed_in(http, Account(account.email, first))
        if signed_in is None:
            return
        token, path = signed_in
        answer = await http.patch(path, json=wanted, headers={"Authorization": token})
    elif _is_among(account.email, _emails(folders.database)):
        raise EmbeddedServerError(
            f"the superuser '{account.email}' of {folders.data} has another password; pass the right one, "
            "or change it in the dashboard"
        )
    else:
        answer = await http.post(
            "/api/collections/_superusers/records",
            json=wanted | {"email": account.email},
            headers={"Authorization": signed_token(folders.database)},
        )
    if answer.status_code != 200:  # it says what is wrong with an email or a password, and repeats neither
        raise EmbeddedServerError(
            f"PocketBase refuses the superuser '{account.email}' or its password: {answer.text.strip()}"
        )


async def _signed_in(http: httpx.AsyncClient, account: Account) -> tuple[str, str] | None:
    """A token, and the path of the account's record."""
    body = {"identity": account.email, "password": account.password}
    answer = await http.post("/api/collections/_superusers/auth-with-password", json=body)
    record, path = "record", "/api/collections/_superusers/records/"
    if answer.status_code == 404:  # before 0.23
        answer = await http.post("/api/admins/auth-with-password", json=body)
        record, path = "admin", "/api/admins/"
    if answer.status_code != 200:
        return None
    found = answer.json()
    return found["token"], path + found[record]["id"]


def _is_among(email: str, emails: Sequence[str]) -> bool:
    return email.lower() in {known.lower() for known in emails}


def _emails(database: Path) -> list[str]:
    """The superusers' emails.

    Raises:
        EmbeddedServerError: the file is no SQLite database.
    """
    if not database.exists():
        return []
    try:
        with _Opened(database) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
            table = next((name for name in ("_superusers", "_admins") if name in tables), None)
            return [email for (email,) in connection.execute(f"SELECT email FROM {table}")] if table else []
    except sqlite3.Error as error:
        raise EmbeddedServerError(f"{database} cannot be read as PocketBase's database: {error}") from error


class _Opened:
    """A database, read only and closed at the end, which sqlite3's own context manager does not do."""

    def __init__(self, database: Path) -> None:
        self._connection = sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=10.0)

    def __enter__(self) -> sqlite3.Connection:
        return self._connection

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def _version(binary: Path) -> tuple[int, int]:
    found = re.search(r"(\d+)\.(\d+)\.", _run(binary, "--version"))
    if found is None:
        raise EmbeddedServerError(f"{binary} does not look like PocketBase: it tells no version")
    return int(found[1]), int(found[2])


def _run(binary: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            [binary, *arguments], capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise EmbeddedServerError(f"PocketBase's command '{arguments[0]}' took too long") from error
    if done.returncode != 0:
        what = done.stderr.strip() or done.stdout.strip()
        raise EmbeddedServerError(f"PocketBase's command '{arguments[0]}' failed: {what[-300:]}")
    return done.stdout + done.stderr


def _base64(content: bytes) -> bytes:
    return base64.urlsafe_b64encode(content).rstrip(b"=")
