"""What following others tells about itself."""

from __future__ import annotations

from collections import deque
from typing import Final

from msgspec import Struct

SAMPLES: Final = 1024
"""Beats that quantiles are taken over, the last ones."""


class CoherenceStats(Struct, frozen=True, kw_only=True):
    """How well the caches follow what others commit."""

    state: str
    """`following`; `catching up`, or `lost`: then every read goes to PocketBase."""
    staleness: float | None
    """Seconds since when it is proven that nothing is missing; None where it is not."""
    lag_p50: float
    lag_p99: float
    """Seconds from sending a beat of ours until the stream has brought it: the most that a commit took to us."""
    commits: int
    changes: int
    """Of others, and of ours whose answer had not come, that were applied, and the records in them."""
    edits: int
    """By foreign hands."""
    gaps: int
    """How often numbers were missing, and looked up in a log."""
    losses: int
    """Of the stream."""
    catch_ups: int
    """Logs that were read back after a loss."""
    epochs: int
    """How often caches were dropped, as a log or a collection was not what it had been."""
    audits: int
    """Partitions that were compared with what PocketBase holds."""
    mismatches: int
    """Those that were not the same. There should be none: tell us."""


class CoherenceCounters:
    """What `CoherenceStats` are made of."""

    def __init__(self) -> None:
        self.commits = self.changes = self.edits = self.gaps = 0
        self.losses = self.catch_ups = self.epochs = self.audits = self.mismatches = 0
        self._lags: deque[float] = deque(maxlen=SAMPLES)

    def lag(self, seconds: float) -> None:
        self._lags.append(seconds)

    def snapshot(self, state: str, staleness: float | None) -> CoherenceStats:
        """The numbers as they are now."""
        lags = sorted(self._lags)
        return CoherenceStats(
            state=state,
            staleness=staleness,
            lag_p50=lags[len(lags) // 2] if lags else 0.0,
            lag_p99=lags[min(len(lags) - 1, len(lags) * 99 // 100)] if lags else 0.0,
            commits=self.commits,
            changes=self.changes,
            edits=self.edits,
            gaps=self.gaps,
            losses=self.losses,
            catch_ups=self.catch_ups,
            epochs=self.epochs,
            audits=self.audits,
            mismatches=self.mismatches,
        )
