"""What peers hold before they are measured: the same documents for all, whatever keeps them.

They are written as Parlant's stores write them, but not through the stores: those would take minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from parlant.core.context_variables import ContextVariableDocumentStore
from parlant.core.customers import CustomerDocumentStore
from parlant.core.persistence.document_database import DocumentCollection
from parlant.core.sessions import SessionDocumentStore
from parlant.core.tags import Tag

from bench.samples import (
    AGENT,
    EVENTS_OF_A_SESSION,
    LONG_SESSION,
    TAG,
    at,
    customer_id,
    customer_of,
    event,
    session,
    session_of,
    stored_session,
)

VARIABLES: Final = 5
Document = dict[str, Any]


@dataclass(frozen=True)
class Contents:
    """How much there is of what."""

    events: int
    """In sessions of `EVENTS_OF_A_SESSION`."""
    customers: int = 10
    """Each with a tag; at least 2."""
    long: int = 0
    """Events of one session more, `LONG_SESSION`."""

    @classmethod
    def of(cls, size: int | Contents) -> Contents:
        """A number stands for so many events."""
        return size if isinstance(size, Contents) else cls(size)

    @property
    def sessions(self) -> int:
        """Without the long one."""
        return -(-self.events // EVENTS_OF_A_SESSION)

    def events_of(self, session_number: int) -> int:
        return min(EVENTS_OF_A_SESSION, self.events - session_number * EVENTS_OF_A_SESSION)

    def session_documents(self) -> Iterator[Document]:
        for number in range(self.sessions):
            customer = customer_of(number, self.customers)
            yield session(stored_session(number)) | {"creation_utc": at(number), "customer_id": customer}
        if self.long:
            # Of no customer that is there, so that it is in nobody's list.
            yield session(LONG_SESSION) | {"creation_utc": at(self.sessions), "customer_id": "nobody"}

    def event_documents(self) -> Iterator[Document]:
        shared = {**event(0)}
        for number in range(self.events + self.long):
            is_long = number >= self.events
            yield shared | {
                "id": f"e{number:09}",
                "creation_utc": at(number),
                "session_id": LONG_SESSION if is_long else session_of(number),
                "offset": number - self.events if is_long else number % EVENTS_OF_A_SESSION,
                "trace_id": f"{number:032x}",
            }

    def customer_documents(self) -> Iterator[Document]:
        for number in range(self.customers):
            yield {
                "id": customer_id(number),
                "version": "0.1.0",
                "creation_utc": at(number),
                "name": f"Ida {number}",
                "extra": {"language": "en", "plan": "monthly"},
            }

    def tag_documents(self) -> Iterator[Document]:
        for number in range(self.customers):
            yield {
                "id": f"t{number:09}",
                "version": "0.1.0",
                "creation_utc": at(number),
                "customer_id": customer_id(number),
                "tag_id": TAG,
            }


@dataclass(frozen=True)
class StockStores:
    """Parlant's stores over a document database, or what is derived from them: their collections are known."""

    sessions: SessionDocumentStore
    customers: CustomerDocumentStore
    variables: ContextVariableDocumentStore


@dataclass(frozen=True)
class Part:
    """One collection, and what it shall hold."""

    store: str
    """Whose it is: `sessions`, `customers`."""
    name: str
    collection: DocumentCollection[Any]
    documents: Iterator[Document]
    varying: tuple[str, ...]
    """The fields in which its documents differ."""


def parts(contents: Contents, stores: StockStores) -> list[Part]:
    """The collections that are large enough to be filled past the stores."""
    sessions, customers = stores.sessions, stores.customers
    return [
        Part(
            "sessions",
            "sessions",
            sessions._session_collection,
            contents.session_documents(),
            ("id", "creation_utc", "customer_id"),
        ),
        Part(
            "sessions",
            "events",
            sessions._event_collection,
            contents.event_documents(),
            ("id", "creation_utc", "session_id", "offset", "trace_id"),
        ),
        Part(
            "customers",
            "customers",
            customers._customers_collection,
            contents.customer_documents(),
            ("id", "creation_utc", "name"),
        ),
        Part(
            "customers",
            "customer_tag_associations",
            customers._tag_association_collection,
            contents.tag_documents(),
            ("id", "creation_utc", "customer_id"),
        ),
    ]


async def add_variables(stores: StockStores) -> None:
    """The agent's variables, each with a value for all customers who have the tag."""
    for number in range(VARIABLES):
        variable = await stores.variables.create_variable(
            f"variable {number}", "what the agent knows of a customer", tags=[Tag.for_agent_id(AGENT).id]
        )
        await stores.variables.update_value(
            variable.id, f"tag:{TAG}", {"number": number, "text": "of some length"}
        )


async def check(contents: Contents, stores: StockStores) -> None:
    """Read the session in the middle, the last one, and a customer through the stores.

    Raises:
        AssertionError: something else than the contents is there.
    """
    for number in {contents.sessions // 2, contents.sessions - 1}:
        found = await stores.sessions.list_events(stored_session(number))
        offsets = [each.offset for each in found]
        expected = contents.events_of(number)
        assert offsets == list(range(expected)), f"session {number} holds {offsets}, not {expected} events"
        read = await stores.sessions.read_session(stored_session(number))
        assert read.customer_id == customer_of(number, contents.customers), f"session {number} is another's"
    customer = await stores.customers.read_customer(customer_id(contents.customers - 1))
    assert list(customer.tags) == [TAG], f"a customer has the tags {customer.tags}"
    variables = await stores.variables.list_variables()
    assert len(variables) == VARIABLES, f"there are {len(variables)} variables"
