"""How a person looks into the data that a demo has kept.

Nobody knows a password there, so the visitor gets an account. Not the embedded server's: to set a password, even
the same one again, ends all tokens of its account (facts: pocketbase, section 1).
"""

from __future__ import annotations

import os
import secrets
import shlex
import subprocess
from pathlib import Path
from typing import Final

from msgspec import Struct

from pb_cached.pocketbase.server import find_binary
from pb_cached.pocketbase.superuser import Folders

EMAIL: Final = "visitor@example.com"
ADDRESS: Final = "127.0.0.1:8090"
"""PocketBase's own default, named so that it can be seen and changed."""


class Visit(Struct, frozen=True):
    commands: tuple[str, ...]
    """To be copied into a shell, one after the other; the last one runs until it is stopped."""
    dashboard: str
    email: str
    password: str


def visit(data_dir: Path) -> Visit:
    """For the folder of a `PocketBaseServer`, when that has ended."""
    binary = str(find_binary())
    flags = Folders(data_dir / "pb_data", data_dir / "migrations").flags
    password = secrets.token_hex(8)
    commands = (
        (binary, "superuser", "upsert", EMAIL, password, *flags),
        (binary, "serve", f"--http={ADDRESS}", *flags, "--automigrate=false"),
    )
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return Visit(tuple(map(join, commands)), f"http://{ADDRESS}/_/", EMAIL, password)
