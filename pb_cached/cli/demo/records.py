"""What PocketBase itself has, record by record, and whether that is as much as Parlant's API shows.

Knows how Parlant's stores lay things out: one record for each session, event, customer, variable and value, and
one for each tag that a customer or a variable has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import httpx

from pb_cached.config import StoreSettings

RECORDS: Final = "records in PocketBase"
"""The kind under which a snapshot holds them."""
PER_PAGE: Final = 500
"""What every PocketBase gives at once; from 0.23 on it would be 1000."""

_STORES: Final = StoreSettings()


async def records(pocketbase: Mapping[str, str]) -> dict[str, Any]:
    """Every record of the stores but `metadata`, which Parlant writes at each start, and the logs of commits.

    Returns:
        By `collection/id`.
    """
    found: dict[str, Any] = {}
    headers = {"Authorization": pocketbase["admin_token"]}
    async with httpx.AsyncClient(base_url=pocketbase["url"], headers=headers, trust_env=False) as http:
        names = [collection["name"] async for collection in _every(http, "/api/collections")]
        for name in names:
            if name.startswith("parlant_") and not name.endswith(("_metadata", "_log")):
                async for record in _every(http, f"/api/collections/{name}/records"):
                    found[f"{name}/{record['id']}"] = record
    return found


def unaccounted(snapshot: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Collections that hold more records, or fewer, than what the API shows is made of; one line each."""
    shown = _shown(snapshot)
    held = Counter(name.partition("/")[0] for name in snapshot[RECORDS])
    return [
        f"{RECORDS}: {collection} holds {held[collection]}, for {shown[collection]} that the API shows"
        for collection in sorted(held.keys() | shown.keys())
        if held[collection] != shown[collection]
    ]


def _shown(snapshot: Mapping[str, Mapping[str, Any]]) -> Counter[str]:
    sessions, customers, variables = _STORES.session_prefix, _STORES.customer_prefix, _STORES.variable_prefix
    return Counter(
        {
            f"{sessions}_sessions": len(snapshot["sessions"]),
            f"{sessions}_events": len(snapshot["events"]),
            f"{customers}_customers": len(snapshot["customers"]),
            f"{customers}_customer_tag_associations": _tags(snapshot["customers"]),
            f"{variables}_variables": len(snapshot["variables"]),
            f"{variables}_variable_tag_associations": _tags(snapshot["variables"]),
            f"{variables}_values": len(snapshot["values"]),
        }
    )


def _tags(tagged: Mapping[str, Any]) -> int:
    return sum(len(one["tags"]) for one in tagged.values())


async def _every(http: httpx.AsyncClient, path: str) -> AsyncIterator[Any]:
    """All items of a list, page by page. Had somebody written meanwhile, the next snapshot would be another."""
    page = pages = 1
    while page <= pages:
        params: dict[str, str | int] = {"page": page, "perPage": PER_PAGE, "sort": "id"}
        answer = (await http.get(path, params=params)).raise_for_status().json()
        for item in answer["items"]:
            yield item
        page, pages = page + 1, answer["totalPages"]
