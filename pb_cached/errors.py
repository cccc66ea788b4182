"""The errors of this package: one tree, so that `except PBCachedError` catches all of them.

Each message says what was tried, what PocketBase answered, and what the user can do. No message holds
a secret or a document's content. Where Parlant's own databases raise a built-in error, ours is a subclass
of it, so that code written against them keeps working.
"""

from __future__ import annotations

from collections.abc import Sequence


class PBCachedError(Exception):
    """Whatever goes wrong in this package."""


class ConfigError(PBCachedError):
    """The configuration cannot be used: names the source (file or variable), the key, and what was expected."""


class PocketBaseUnavailable(PBCachedError):
    """PocketBase could not be reached, or went on failing, until the deadline."""


class AuthenticationFailed(PBCachedError):
    """PocketBase refused the token, or the email and password."""


class RequestRejected(PBCachedError):
    """PocketBase understood a request and refused it.

    `status` is the HTTP status, `codes` the validation codes by field (`{"id": "validation_pk_invalid"}`).
    """

    def __init__(self, message: str, *, status: int = 0, codes: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.codes = codes or {}


class RecordNotFound(RequestRejected):
    """The record to update or delete is not there (any more)."""


class StaleRevision(RequestRejected):
    """A record was changed by others, again and again, while it was updated or deleted. Nothing was written."""


class StaleRead(StaleRevision):
    """A record was changed by others since that was read which its update follows from. Nothing was written."""


class UniqueViolation(RequestRejected):
    """A unique index refused a document. `fields` names the columns that the index covers."""

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(self.codes)


class OutcomeUnknown(PBCachedError):
    """A write was sent, no answer came, and until the deadline it could not be learned whether it was applied."""


class NotCommitted(PBCachedError):
    """The database was closed before a write was committed. Nothing of it was applied."""


class QueueFull(PBCachedError):
    """So many writes were waiting that there was no room for this one until its deadline. Nothing was written."""


class SchemaError(PBCachedError):
    """A PocketBase collection does not have the shape that this package gives its collections."""


class ForeignCollection(SchemaError):
    """The name belongs to a collection that this package did not create. It is left as it is."""


class CollectionNotFound(SchemaError, ValueError):
    """The collection does not exist (Parlant's databases raise a ValueError here)."""


class CollectionExists(SchemaError, ValueError):
    """`create_collection` was asked for a collection that is there already."""


class InvalidDocument(PBCachedError, TypeError):
    """A document misses keys, or holds something that is not JSON. Nothing was written.

    `path` is the place inside the document, in the form `$.data.items[3]`.
    """

    def __init__(self, message: str, *, path: str = "$") -> None:
        super().__init__(message)
        self.path = path


class DocumentTooLarge(PBCachedError, ValueError):
    """A document exceeds what PocketBase accepts. Found before anything was sent."""


class InvalidFilter(PBCachedError, ValueError):
    """A `Where` holds an unknown operator, or a value that no document can hold."""


class EmbeddedServerError(PBCachedError):
    """The embedded PocketBase could not be found, started, or used."""


def named(names: Sequence[str], limit: int = 10) -> str:
    """The names as they appear in a message: quoted, and no more of them than can be read."""
    shown = ", ".join(f"'{name}'" for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
