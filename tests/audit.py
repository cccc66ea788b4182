"""Whether a PocketBase holds exactly what the logs of the log path say: each commit whole, and each once.

It reads PocketBase itself, past all of our code, and asks nothing but this: every record was inserted by one
commit, each of its revisions was left by one commit, and it is there, of the last revision, unless a commit
deleted it. A half commit, one that was applied twice, and one that nobody logged all break that.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from typing import Any

import httpx

_PAGE = 1000


async def require_whole_commits(http: httpx.AsyncClient, prefix: str) -> int:
    """Fails where records and logs of these collections differ. Nobody but the log path may have written to them.

    Args:
        prefix: of one database, or of several.

    Returns:
        How many commits there are.
    """
    names = await _collections(http, prefix)
    logs = [name for name in names if name.endswith("_log")]
    while True:
        commits = {log: [entry async for entry in _records(http, log) if entry["n"]] for log in logs}
        found = {
            record["id"]: record["rev"]
            for name in names
            if name not in logs
            async for record in _records(http, name)
        }
        # What a writer that has died had sent may still be applied: then this was no single moment.
        if [await _total(http, log) for log in logs] == [len(commits[log]) for log in logs]:
            break
    inserted: Counter[str] = Counter()
    left: defaultdict[str, list[int]] = defaultdict(list)
    deleted: dict[str, int] = {}
    for entry in (entry for entries in commits.values() for entry in entries):
        payload = json.loads(entry["payload"])
        assert payload and payload.keys() <= {"c", "u", "d"}, entry
        inserted.update(operation[0] for operation in payload.get("c", ()))
        for id_, rev, *_ in payload.get("u", ()):
            left[id_].append(rev + 1)
        for id_, rev in payload.get("d", ()):
            assert id_ not in deleted, f"{id_} was deleted twice"
            deleted[id_] = rev
    assert set(inserted.values()) <= {1}, "a commit was applied twice"
    assert left.keys() | deleted.keys() | found.keys() <= inserted.keys(), "a record that no commit has inserted"
    for id_ in inserted:
        last = 1 + len(left[id_])
        assert sorted(left[id_]) == list(range(2, last + 1)), f"{id_}: revisions {left[id_]}"
        assert deleted.get(id_, last) == last, f"{id_}: deleted at {deleted[id_]} of {last}"
        assert found.get(id_) == (None if id_ in deleted else last), f"{id_}: {found.get(id_)} of {last}"
    for log, entries in commits.items():
        numbers = Counter((entry["server"], entry["n"]) for entry in entries)
        assert set(numbers.values()) <= {1}, f"{log}: two commits of one number"
    return sum(map(len, commits.values()))


async def _collections(http: httpx.AsyncClient, prefix: str) -> list[str]:
    params: dict[str, str | int] = {"perPage": _PAGE, "filter": f"name ~ '{prefix}_%'"}
    found = (await http.get("/api/collections", params=params)).raise_for_status().json()["items"]
    return [collection["name"] for collection in found]


async def _records(http: httpx.AsyncClient, collection: str) -> AsyncIterator[dict[str, Any]]:
    last = ""
    while True:
        params: dict[str, str | int] = {
            "filter": f"id > '{last}'", "sort": "id", "perPage": _PAGE, "skipTotal": 1,
        }  # fmt: skip
        found = await http.get(f"/api/collections/{collection}/records", params=params)
        records = found.raise_for_status().json()["items"]
        for record in records:
            yield record
        if len(records) < _PAGE:
            return
        last = records[-1]["id"]


async def _total(http: httpx.AsyncClient, log: str) -> int:
    params: dict[str, str | int] = {"filter": "n > 0", "perPage": 1, "fields": "id"}
    found = await http.get(f"/api/collections/{log}/records", params=params)
    return int(found.raise_for_status().json()["totalItems"])
