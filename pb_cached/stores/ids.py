"""Ids for documents of Parlant's stores.

Parlant derives the ids of customers, variables, values and tag associations from their content and a counter
in process memory, so they repeat after a restart and on a second server (facts: parlant, section 4).
"""

from __future__ import annotations

from parlant.core.common import IdGenerator, UniqueId, generate_id
from typing_extensions import override


class UniqueIds(IdGenerator):
    """Ids that do not repeat. Remembers nothing, where Parlant's generator grows with every id."""

    @override
    def generate(self, content_checksum: str) -> UniqueId:
        return generate_id()
