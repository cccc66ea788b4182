"""What a `Where` says about partitions: which of them can hold matches, and which part of each.

Everything here may say too much, never too little: the predicate decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Final

from pb_cached.cache.collection import CollectionCache
from pb_cached.cache.partition import Key

MOST_VALUES: Final = 64
"""Beyond so many partitions a query is one for PocketBase."""


def only_key(where: Mapping[str, Any], cache: CollectionCache) -> Key | None:
    """The key of the one partition that a plain query names, by `$eq` with a string for each of its fields. None
    for all other queries, those for several partitions among them."""
    values = []
    for field in cache.rule.partition_by:
        condition = where.get(field)
        if condition.__class__ is not dict or len(condition) != 1:
            return None
        value = condition.get("$eq")
        if value.__class__ is not str:
            return None
        values.append(value)
    return cache.key(*values)


def keys_of(where: Mapping[str, Any], cache: CollectionCache) -> list[Key] | None:
    """The partitions in which all matches are, each once; None where they may be in any, or in one that cannot be
    kept."""
    choices = [values_of(where, field) for field in cache.rule.partition_by]
    if None in choices:
        return None
    keys: dict[Key, None] = {}
    for values in product(*[values for values in choices if values is not None]):
        key = cache.key(*values)
        if key is None or len(keys) == MOST_VALUES:
            return None
        keys[key] = None
    return list(keys)


def values_of(where: Mapping[str, Any], field: str) -> tuple[Any, ...] | None:
    """The values that `field` has in every match; None where it may have any."""
    found: tuple[Any, ...] | None = None
    for key, condition in where.items():
        if key == field:
            allowed = _allowed(condition)
        elif key == "$and":
            allowed = next((values for part in condition if (values := values_of(part, field)) is not None), None)
        elif key == "$or":
            allowed = _of_any(condition, field)
        else:
            continue
        if allowed is not None and (found is None or len(allowed) < len(found)):
            found = allowed
    return found


def _allowed(condition: Mapping[str, Any]) -> tuple[Any, ...] | None:
    if "$eq" in condition:
        return (condition["$eq"],)
    return tuple(condition["$in"]) if "$in" in condition else None


def _of_any(parts: Sequence[Mapping[str, Any]], field: str) -> tuple[Any, ...] | None:
    """Of alternatives, each must name its values. The same value named by two of them counts once."""
    union: list[Any] = []
    for part in parts:
        values = values_of(part, field)
        if values is None:
            return None
        union += [value for value in values if value not in union]
        if len(union) > MOST_VALUES:
            return None
    return tuple(union)


def least_of(where: Mapping[str, Any], field: str) -> int | None:
    """A number that `field` is not below in any match; None where it may be."""
    least: int | None = None
    for key, condition in where.items():
        bound: int | None = None
        if key == field:
            bound = next((condition[op] for op in ("$gte", "$gt", "$eq") if type(condition.get(op)) is int), None)
        elif key == "$and":
            bounds = [bound for part in condition if (bound := least_of(part, field)) is not None]
            bound = max(bounds, default=None)
        elif key == "$or" and condition:
            bounds = [bound for part in condition if (bound := least_of(part, field)) is not None]
            bound = min(bounds) if len(bounds) == len(condition) else None
        if bound is not None and (least is None or bound > least):
            least = bound
    return least
