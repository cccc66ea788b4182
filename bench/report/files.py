"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

HEAD_BYTES: Final = 2000
"""Of a picture, with its maker's name in them."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place when all is written."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def remove_made(folder: Path, by: str, kept: Container[str]) -> None:
    """Remove pictures that carry this maker's name, other than those to keep: nobody else's."""
    for path in [*folder.glob("*.svg"), *folder.glob("*.png")]:
        if path.name not in kept and by.encode() in path.read_bytes()[:HEAD_BYTES]:
            path.unlink()
