"""Looking at the records that a commit touches, as they are now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pb_cached.pocketbase.client import PocketBaseClient
from pb_cached.pocketbase.commit.interface import records_path

_IDS_PER_FILTER: Final = 100


async def multi_gets(
    client: PocketBaseClient, collection: str, record_ids: Sequence[str], fields: Sequence[str] = ()
) -> list[bytes]:
    """PocketBase's listings of these records, those that exist, with these fields; with all if none is named."""
    contents = []
    for start in range(0, len(record_ids), _IDS_PER_FILTER):
        some = record_ids[start : start + _IDS_PER_FILTER]
        params: dict[str, str | int] = {
            "filter": " || ".join(f"id = '{id_}'" for id_ in some),
            "perPage": len(some),
            "skipTotal": 1,
        }
        if fields:
            params["fields"] = ",".join(fields)
        contents.append(await client.call("GET", records_path(collection), params=params))
    return contents
