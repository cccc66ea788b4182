"""What benchmarks store and read: documents as Parlant's stores write them (facts: parlant, section 4)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final

from parlant.core.agents import AgentId
from parlant.core.common import Version, generate_id
from parlant.core.customers import CustomerId
from parlant.core.persistence.common import ObjectId
from parlant.core.sessions import SessionId, _EventDocument
from parlant.core.tags import TagId

EVENTS_OF_A_SESSION: Final = 20
AGENT: Final = AgentId("9876543210")
TAG: Final = TagId("regular")
"""Which every customer has, and the variables have their values for."""
LONG_SESSION: Final = SessionId("session-long")
"""Beside those that are numbered."""
_BEGAN: Final = datetime(2025, 1, 1, tzinfo=UTC)
_TEXT: Final = "a message of usual length, as customers write them when they have lost something on a train"


def session_of(number: int) -> SessionId:
    """The session that the event of this number belongs to."""
    return SessionId(f"session{number // EVENTS_OF_A_SESSION:07}")


def event(number: int) -> _EventDocument:
    """A customer's message of about 450 bytes: the number tells its session and its offset."""
    return _EventDocument(
        id=ObjectId(generate_id()),
        version=Version.String("0.9.0"),
        creation_utc=datetime.now(UTC).isoformat(),
        session_id=session_of(number),
        source="customer",
        kind="message",
        offset=number % EVENTS_OF_A_SESSION,
        trace_id=f"{number:032x}",
        data={"message": _TEXT, "participant": {"id": "0123456789", "display_name": "Ida"}, "tags": []},
        metadata=None,
        deleted=False,
    )


def session(id_: str) -> dict[str, Any]:
    """A session after a few turns, of about 800 bytes."""
    state = {"trace_id": "f" * 32, "applied_guideline_ids": ["0123456789"] * 3, "journey_paths": {}}
    return {
        "id": id_,
        "version": "0.9.0",
        "creation_utc": "2026-11-23T06:41:20.859214+00:00",
        "customer_id": "0123456789",
        "agent_id": "9876543210",
        "mode": "auto",
        "title": None,
        "consumption_offsets": {"client": 3},
        "agent_states": [state] * 5,
        "metadata": {},
        "labels": [],
    }


def stored_session(number: int) -> SessionId:
    return session_of(number * EVENTS_OF_A_SESSION)


def customer_id(number: int) -> CustomerId:
    return CustomerId(f"customer{number:06}")


def customer_of(session_number: int, customers: int) -> CustomerId:
    """The first customer has half of all sessions, so that one has a long list; the others share the rest."""
    return customer_id(1 + session_number // 2 % (customers - 1) if session_number % 2 else 0)


def at(number: int) -> str:
    """The moment of creation of a document that is stored before a benchmark begins, one a millisecond."""
    return (_BEGAN + timedelta(milliseconds=number)).isoformat()
