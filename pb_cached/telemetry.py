"""Logging: one structured logger, whoever supplies it.

Events are short phrases, facts are keys: `log.info("collection created", collection="events")`. A logger of
Parlant's takes plain text, so the facts are written behind the phrase. No secret and no document content is
ever passed to a logger.
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from typing import Any, cast

import structlog
from structlog.typing import FilteringBoundLogger

from pb_cached.config import LoggingSettings

Log = FilteringBoundLogger

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def log_through(logger: Any | None, settings: LoggingSettings | None = None) -> Log:
    """The log of a database: the caller's logger (Parlant's, structlog's or the standard library's), or ours.

    Ours writes to standard error and leaves structlog's global configuration alone.
    """
    settings = settings or LoggingSettings()
    if logger is None:
        return _own(settings)
    if hasattr(logger, "bind") and hasattr(logger, "unbind"):
        return cast(Log, logger)
    return cast(
        Log,
        structlog.wrap_logger(
            logger,
            processors=[_as_text],
            wrapper_class=structlog.make_filtering_bound_logger(_LEVELS["debug"]),
        ),
    )


def _own(settings: LoggingSettings) -> Log:
    renderer: Any
    if settings.format == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    return cast(
        Log,
        structlog.wrap_logger(
            structlog.PrintLogger(sys.stderr),
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.format_exc_info,
                renderer,
            ],
            wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[settings.level]),
        ),
    )


def _as_text(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
    phrase = f"pb_cached: {event.pop('event', '')}"
    facts = " ".join(f"{key}={value}" for key, value in event.items())
    return f"{phrase} ({facts})" if facts else phrase
