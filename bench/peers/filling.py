"""Fills a PocketBase past its API: a million events take seconds, not an hour.

An adapter writes one document, so the layout of its rows is the adapter's own; the others are made of that row,
straight in PocketBase's SQLite file. Nothing of what is filled may have been read before: no cache hears of it.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Final

from parlant.core.persistence.document_database import DocumentCollection

from bench.peers.contents import Document, Part
from pb_cached.pocketbase.commit.triggers import LOGS

ROWS_OF_A_TRANSACTION: Final = 50_000
"""About a second, for which nobody else can write."""
ROWS_OF_A_STATEMENT: Final = 50
"""Where there are triggers, a statement costs more than a row."""
REST_SECONDS: Final = 0.1
"""Between transactions, so that others get to write."""
_PROTOTYPE: Final = "prototype"
_BUSY_SECONDS: Final = 30.0


async def fill(data_dir: Path, table: str, part: Part) -> None:
    """Put the documents of a part into the table that its collection is kept in, while PocketBase runs."""
    await fill_collection(data_dir, table, part.collection, part.documents, part.varying)


async def fill_collection(
    data_dir: Path,
    table: str,
    collection: DocumentCollection[Any],
    documents: Iterator[Document],
    varying: tuple[str, ...],
) -> None:
    """Put documents into a collection that is empty, while PocketBase runs.

    Args:
        data_dir: of the `PocketBaseServer`.
        table: PocketBase's name of the collection.
        varying: the fields in which the documents differ; all of them hold strings or numbers.
    """
    first = next(documents, None)
    if first is None:
        return
    names = {field: _PROTOTYPE for field in varying if isinstance(first[field], str) and field != "creation_utc"}
    await collection.insert_one(first | names)
    file = data_dir / "pb_data" / "data.db"
    expected, found = await asyncio.to_thread(_copy, file, table, _chained(first, documents), varying)
    await collection.delete_one({"id": {"$eq": _PROTOTYPE}})
    assert found == expected, f"{table} holds {found} rows of {expected}"


def _copy(file: Path, table: str, documents: Iterator[Document], varying: tuple[str, ...]) -> tuple[int, int]:
    """Returns how many rows were written, and how many there are beside the prototype."""
    with closing(sqlite3.connect(file, timeout=_BUSY_SECONDS, isolation_level=None)) as database:
        # Only what SQLite may lose of them in a crash of the machine: the whole folder is thrown away.
        database.execute("PRAGMA synchronous=OFF")
        database.execute("PRAGMA cache_size=-200000")
        database.execute("PRAGMA temp_store=MEMORY")
        columns, prototype = _row(database, table)
        ids = (f"0000{number:011}" for number in count())
        fields = {columns.index(_column(field, columns)): field for field in varying}
        id_place = columns.index("id")

        def values(document: Document) -> list[Any]:
            row = prototype.copy()
            row[id_place] = next(ids)
            for place, field in fields.items():
                row[place] = document[field]
            return row

        written = 0
        while transaction := list(islice(documents, ROWS_OF_A_TRANSACTION)):
            if written:
                time.sleep(REST_SECONDS)
            database.execute("BEGIN IMMEDIATE")
            _set_applying(database, 1)
            for start in range(0, len(transaction), ROWS_OF_A_STATEMENT):
                rows = [values(document) for document in transaction[start : start + ROWS_OF_A_STATEMENT]]
                database.execute(_insertion(table, columns, len(rows)), list(chain.from_iterable(rows)))
            _set_applying(database, 0)
            database.execute("COMMIT")
            written += len(transaction)
        # As PocketBase does every night: without it SQLite chooses among the indexes of the table blindly.
        database.execute(f"ANALYZE `{table}`")
        database.execute("PRAGMA wal_checkpoint(PASSIVE)")
        (found,) = database.execute(f"SELECT count(*) FROM `{table}`").fetchone()
        return written, found - 1


def _insertion(table: str, columns: list[str], rows: int) -> str:
    row = f"({','.join('?' * len(columns))})"
    names = ",".join(f"`{column}`" for column in columns)
    return f"INSERT INTO `{table}`({names}) VALUES {','.join([row] * rows)}"


def _row(database: sqlite3.Connection, table: str) -> tuple[list[str], list[Any]]:
    found = database.execute(f"SELECT * FROM `{table}` WHERE doc_id=?", (_PROTOTYPE,))
    row = found.fetchone()
    assert row is not None, f"{table} has no prototype"
    return [column for column, *_ in found.description], list(row)


def _column(field: str, columns: list[str]) -> str:
    """Both of our adapters keep the document's id apart, and most fields under their own names."""
    name = "doc_id" if field == "id" else field
    return name if name in columns else f"f_{name}"


def _set_applying(database: sqlite3.Connection, value: int) -> None:
    """Have the triggers of the log path take what follows for commits, not for a foreign hand."""
    if database.execute("SELECT 1 FROM sqlite_master WHERE name=?", (LOGS,)).fetchone():
        database.execute(f"UPDATE {LOGS} SET applying={value}")


def _chained(first: Document, rest: Iterator[Document]) -> Iterator[Document]:
    yield first
    yield from rest
