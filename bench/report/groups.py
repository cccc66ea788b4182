"""Cells that can be compared with each other: of one workload, with sizes and operations of one kind."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from bench.report.words import slug
from bench.results import Cell


class Group(Struct, frozen=True, kw_only=True):
    workload: str
    of: str
    unit: str
    cells: list[Cell]
    name: str
    """For files and anchors."""

    @property
    def sizes(self) -> list[int]:
        return sorted({cell.size for cell in self.cells})

    @property
    def peers(self) -> list[str]:
        """In the order in which they were measured."""
        return list(dict.fromkeys(cell.peer for cell in self.cells))

    def of_peer(self, peer: str) -> list[Cell]:
        """By size."""
        return sorted((cell for cell in self.cells if cell.peer == peer), key=lambda cell: cell.size)

    def at(self, size: int) -> list[Cell]:
        return [cell for cell in self.cells if cell.size == size]

    @property
    def counts_load(self) -> bool:
        """Is a size how many work at once, and not how much there is?"""
        return any(word in self.of for word in ("writer", "server", "at once"))

    def sized(self, size: int) -> str:
        """A size in words, such as `1,000 events stored`."""
        return f"{size:,} {self.of}" if size > 1 else f"{self.of}: {size}"


def groups(cells: Sequence[Cell]) -> list[Group]:
    """In the order in which they were measured. Cells without a round that can be told are left out."""
    by: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        if cell.rates and cell.rate > 0:
            by.setdefault((cell.workload, cell.of, cell.unit), []).append(cell)
    found = []
    for (workload, of, unit), some in by.items():
        siblings = [key for key in by if key[0] == workload]
        name = slug(" ".join((workload, *_told_apart(of, unit, siblings))))
        found.append(Group(workload=workload, of=of, unit=unit, cells=some, name=name))
    return found


def _told_apart(of: str, unit: str, siblings: Sequence[tuple[str, str, str]]) -> tuple[str, ...]:
    """The least that tells a group from the others of its workload."""
    if len(siblings) == 1:
        return ()
    if sum(unit == other for _, _, other in siblings) == 1:
        return (unit,)
    if sum(of == other for _, other, _ in siblings) == 1:
        return (of,)
    return unit, of


def common(cells: Sequence[Cell]) -> list[Cell]:
    """Those of the largest size at which all peers were measured, or else most."""
    peers: dict[int, set[str]] = {}
    for cell in cells:
        peers.setdefault(cell.size, set()).add(cell.peer)
    size = max(peers, key=lambda size: (len(peers[size]), size), default=None)
    return [cell for cell in cells if cell.size == size]
