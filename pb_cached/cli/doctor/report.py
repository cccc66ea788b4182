"""What the doctor has found. No secret and no document's content is ever in it; keys of records are."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

State = Literal["good", "weak", "bad"]
"""`weak`: it works, and could be better. `bad`: the library cannot use this PocketBase as long as it is so."""


class Finding(Struct, frozen=True):
    """The answer to one question."""

    about: str
    state: State
    found: str
    advice: str = ""
    """What to do about it, where there is something to do."""


class Count(Struct, frozen=True):
    """How many records a collection of ours has."""

    collection: str
    records: int
    more: bool
    """There are more: nobody counts millions for this."""


class Duplicate(Struct, frozen=True):
    """Records that stand against a unique index: they have the same key."""

    collection: str
    key: dict[str, str]
    records: tuple[str, ...]
    """Their ids in PocketBase, in the order of their insertion; not all where there are many."""


class Report(Struct):
    """All findings, in the order in which they were made."""

    url: str
    usable: bool = True
    findings: list[Finding] = []
    collections: list[Count] = []
    duplicates: list[Duplicate] = []

    def add(self, *findings: Finding) -> None:
        self.findings += findings
        self.usable = self.usable and all(finding.state != "bad" for finding in findings)
