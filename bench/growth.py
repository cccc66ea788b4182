"""How a cost grows with size: flat, logarithmic or linear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from bench.results import Cell, Growth, Law

LEVEL: Final = 0.25
"""Root mean square of the relative distance up to which a cost that is the same for all sizes explains them: what
this machine drifts by between two rounds."""
STORED: Final = "stored"
"""How what a size counts ends, where it is something that a database holds: `events stored`."""


def fitted(costs: Mapping[int, float]) -> tuple[Law, float]:
    """The simplest law that explains what each size costs, and how far it is from what was measured.

    Distances are relative, so that a microsecond counts as much for a small size as a millisecond for a large one.
    A law never falls with size.
    """
    sizes = np.array(sorted(costs), dtype=float)
    measured = np.array([costs[int(size)] for size in sizes])
    misfits: dict[Law, float] = {"flat": _misfit([np.ones_like(sizes)], measured)}
    if misfits["flat"] <= LEVEL or len(sizes) < 3:
        return "flat" if misfits["flat"] <= LEVEL else "linear", misfits["flat"]
    misfits["logarithmic"] = _misfit([np.ones_like(sizes), np.log(sizes)], measured)
    misfits["linear"] = _misfit([np.ones_like(sizes), sizes], measured)
    law = min(misfits, key=lambda law: misfits[law])
    return law, misfits[law]


def _misfit(terms: Sequence[np.ndarray], measured: np.ndarray) -> float:
    """Of the best non-negative factors."""
    while True:
        matrix = np.stack([term / measured for term in terms], axis=1)
        factors, *_ = np.linalg.lstsq(matrix, np.ones_like(measured), rcond=None)
        if (factors >= 0).all() or len(terms) == 1:
            return float(np.sqrt(np.mean((matrix @ factors - 1) ** 2)))
        terms = [term for term, factor in zip(terms, factors, strict=True) if factor >= 0]


def growths(cells: Sequence[Cell]) -> list[Growth]:
    """Of every operation and peer that was measured with three sizes of what is stored, or more."""
    by: dict[tuple[str, str, str, str], dict[int, float]] = {}
    for cell in cells:
        if cell.of.endswith(STORED):
            by.setdefault((cell.workload, cell.peer, cell.of, cell.unit), {})[cell.size] = cell.milliseconds
    found = []
    for (workload, peer, of, unit), costs in by.items():
        if len(costs) >= 3:
            law, misfit = fitted(costs)
            factor = costs[max(costs)] / costs[min(costs)]
            found.append(
                Growth(workload=workload, peer=peer, of=of, unit=unit, law=law, factor=factor, misfit=misfit)
            )
    return found
