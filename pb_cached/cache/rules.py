"""How each collection is cached: Parlant's as their hot queries need it, any other document by document.

What a user sets for a collection counts before what stands here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

from pb_cached.cache.collection import Rule
from pb_cached.config import CollectionSettings
from pb_cached.errors import ConfigError, named

PARLANT: Final[Mapping[str, Rule]] = {
    "sessions": Rule(("id",)),
    "events": Rule(("session_id",), sequence="offset", unique_ids=True),
    "customers": Rule(("id",)),
    "customer_tag_associations": Rule(("customer_id",)),
    "variables": Rule(()),
    "variable_tag_associations": Rule(()),
    # Not by variable alone: one may have a value for each of a million customers, and is asked for one of them.
    "values": Rule(("variable_id", "key")),
    "metadata": Rule(()),
}
"""Parlant's session, customer and variable collections (facts: parlant, section 2)."""

OTHER: Final = Rule(("id",))


def rule_for(name: str, fields: Collection[str], settings: CollectionSettings | None) -> Rule:
    """The rule for a collection.

    Args:
        name: as Parlant calls it.
        fields: those of its documents, `id` among them.
        settings: what the user set for it, if anything.

    Raises:
        ConfigError: the user named a field that the documents do not have.
    """
    rule = PARLANT.get(name, OTHER)
    if not set(_fields_of(rule)) <= set(fields):  # somebody else's collection that shares the name
        rule = OTHER
    if settings is None:
        return rule
    by, sequence = settings.partition_by, settings.sequence
    chosen = Rule(
        partition_by=rule.partition_by if by is None else _listed(by),
        sequence=rule.sequence if sequence is None else sequence or None,
        unique_ids=rule.unique_ids if settings.unique_ids is None else settings.unique_ids,
        max_documents=settings.max_partition_documents or rule.max_documents,
    )
    unknown = [field for field in _fields_of(chosen) if field not in fields]
    if unknown:
        raise ConfigError(
            f"collections.{name}: its documents have no field {named(unknown)}; "
            f"partition_by and sequence must be among {named(sorted(fields), 30)}"
        )
    return chosen


def indexed_fields(rule: Rule) -> tuple[str, ...]:
    """The fields by which partitions are looked up and ordered in PocketBase; none where that needs no index of
    its own."""
    return () if rule.partition_by in ((), ("id",)) else tuple(_fields_of(rule))


def _listed(by: str | Sequence[str]) -> tuple[str, ...]:
    return ((by,) if by else ()) if isinstance(by, str) else tuple(by)


def _fields_of(rule: Rule) -> list[str]:
    return [*rule.partition_by, *([rule.sequence] if rule.sequence else [])]
