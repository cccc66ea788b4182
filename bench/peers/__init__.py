"""Whom this library is measured beside, each as the three stores that a Parlant server is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
from parlant.core.context_variables import ContextVariableStore
from parlant.core.customers import CustomerStore
from parlant.core.sessions import SessionListener, SessionStore


@dataclass(frozen=True)
class Peer:
    """Open stores, which hold as many events as was asked for."""

    name: str
    session_store: SessionStore
    customer_store: CustomerStore
    variable_store: ContextVariableStore
    session_listener: SessionListener
    servers: Sequence[psutil.Process] = ()
    """The database's own processes."""
