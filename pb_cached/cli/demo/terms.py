"""What the demo and its Parlant server, a process of its own, have agreed on."""

from __future__ import annotations

from typing import Final

PORT: Final = "PB_CACHED_DEMO_PORT"
TOOL_PORT: Final = "PB_CACHED_DEMO_TOOL_PORT"
CACHE_REPORT: Final = "PB_CACHED_DEMO_CACHE_REPORT"
"""Names the file into which the server writes, when it ends in order, what its cache has done."""

AGENT: Final = "Robin"
TAG: Final = "vip"
VARIABLE: Final = "plan"
