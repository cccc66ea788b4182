"""The look of each peer, the same in every picture: ours strong and solid, the others muted and dashed.

A colour says the same as a dash and a label beside it, so that nobody needs to tell colours apart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from msgspec import Struct

Dashes = tuple[float, tuple[float, ...]]
"""As matplotlib has them: an offset, and the lengths of dashes and gaps in points; none for a solid line."""


class Look(Struct, frozen=True):
    light: str
    """On white paper, and in the files."""
    dark: str
    """On the page where its reader prefers dark ones."""
    dashes: Dashes = (0, ())
    is_ours: bool = False


INK: Final = Look("#1c2430", "#e6e9ee")
SOFT: Final = Look("#5c6673", "#a3adba")
FAINT: Final = Look("#dfe3e8", "#333b46")
PAPER: Final = Look("#ffffff", "#14181e")

_OURS: Final = {
    "realtime": Look("#0b57d0", "#7cb0ff", is_ours=True),
    "exclusive": Look("#00847a", "#3fd0bf", is_ours=True),
    "batch": Look("#a3219b", "#ec8fe4", is_ours=True),
    "off": Look("#3c93e0", "#9fd4ff", is_ours=True),
    " also ": Look("#5a46b2", "#b3a4ff", is_ours=True),
}
_OTHERS: Final = {
    "memory": Look("#6f7885", "#9aa4b1", (0, (5, 2))),
    "json": Look("#ad8647", "#cdae7a", (0, (1.5, 1.5))),
    "plain pocketbase": Look("#b4614a", "#e09a85", (0, (7, 2, 1.5, 2))),
    "batch": Look("#434b57", "#c3cad4", (0, (3, 1.5))),
    "sqlite": Look("#7f8450", "#b9be85", (0, (1, 1))),
    "mongo": Look("#66885c", "#9cc090", (0, (4, 1, 1, 1, 1, 1))),
    "post": Look("#94708f", "#c8a4c3", (0, (6, 3))),
    " also ": Look("#5b8792", "#93bfca", (0, (3, 1, 1, 1))),
    " too ": Look("#9b9b9b", "#bdbdbd", (0, (2, 2))),
}
"""Like those above by a word of the names that they are for; the last that fits counts."""

LOOKS: Final = (INK, SOFT, FAINT, PAPER, *_OURS.values(), *_OTHERS.values())


def is_ours(peer: str) -> bool:
    return "pb_cached" in peer.lower()


def looks(compared: Iterable[Collection[str]]) -> dict[str, Look]:
    """That of each peer: the one that its name stands for, if nobody it is compared with has it, or else the first
    of its kind that is free.

    It depends on the names alone and not on their order; a name that says what it stands for comes before others.

    Args:
        compared: those that are seen in one picture, for each picture.
    """
    rivals: dict[str, set[str]] = {}
    for peers in compared:
        for peer in peers:
            rivals.setdefault(peer, set()).update(peers)
    given: dict[str, Look] = {}
    for peer in sorted(rivals, key=lambda peer: (not _words(peer), len(peer), peer)):
        family = _OURS if is_ours(peer) else _OTHERS
        taken = [given[rival] for rival in rivals[peer] if rival in given]
        wanted = [family[word] for word in reversed(_words(peer))]
        choice = [look for look in (*wanted, *family.values()) if look not in taken]
        given[peer] = choice[0] if choice else [*family.values()][-1]
    return given


def _words(peer: str) -> list[str]:
    return [word for word in (_OURS if is_ours(peer) else _OTHERS) if word in peer.lower()]
