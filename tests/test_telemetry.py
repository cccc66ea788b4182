"""Whoever supplies the logger, the same events and facts arrive there; without one they go to standard error."""

from __future__ import annotations

import json
import logging
from typing import Literal

import pytest
import structlog
from parlant.core.loggers import Logger, StdoutLogger
from parlant.core.tracer import LocalTracer

from pb_cached import Config, PocketBaseDocumentDatabase, PocketBaseServer
from pb_cached.config import LoggingSettings
from pb_cached.telemetry import log_through

Level = Literal["debug", "info", "warning", "error"]


def parlants_logger() -> Logger:
    return StdoutLogger(LocalTracer(), logger_id="parlant under test")


@pytest.mark.parametrize("logger", [logging.getLogger("standard"), parlants_logger()], ids=["standard", "parlant"])
def test_a_plain_logger_gets_the_facts_behind_the_phrase(
    logger: logging.Logger | Logger, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    log = log_through(logger)
    log.debug("connected")
    log.warning("index refused", index="idx", reason="100 %s sure", count=3)
    assert [record.levelname for record in caplog.records] == ["DEBUG", "WARNING"]
    assert "pb_cached: connected" in caplog.messages[0]
    assert "pb_cached: index refused (index=idx reason=100 %s sure count=3)" in caplog.messages[1]


def test_structlogs_logger_gets_facts_as_facts() -> None:
    with structlog.testing.capture_logs() as events:
        log_through(structlog.get_logger().bind(tenant="a")).info("collection created", collection="events")
    assert events == [{"event": "collection created", "collection": "events", "tenant": "a", "log_level": "info"}]


def test_without_a_logger_ours_writes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    log_through(None).info("collection created", collection="events")
    written = capsys.readouterr()
    assert "collection created" in written.err
    assert "collection=events" in written.err
    assert not written.out


def test_ours_can_write_json_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    log_through(None, LoggingSettings(format="json")).info("collection created", collection="events")
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["collection"], line["level"]) == ("collection created", "events", "info")
    assert line["timestamp"].endswith("Z")


@pytest.mark.parametrize(("level", "shown"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_ours_shows_what_is_at_least_as_grave_as_its_level(
    level: Level, shown: int, capsys: pytest.CaptureFixture[str]
) -> None:
    log = log_through(None, LoggingSettings(level=level))
    for write in (log.debug, log.info, log.warning, log.error):
        write("something happened")
    assert capsys.readouterr().err.count("something happened") == shown


def test_structlogs_own_settings_stay_as_they_are() -> None:
    before = structlog.get_config()
    log_through(None).info("one")
    log_through(logging.getLogger("standard")).info("other")
    assert structlog.get_config() == before


async def test_a_database_speaks_through_the_logger_that_it_is_given(
    pocketbase: PocketBaseServer, prefix: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    logger = logging.getLogger("given")
    async with PocketBaseDocumentDatabase(
        logger, pocketbase.connection_params, collection_prefix=prefix, config=Config()
    ):
        pass
    ours = [record.getMessage() for record in caplog.records if record.name == "given"]
    assert f"pb_cached: collection created (collection={prefix}_log)" in ours
    assert "collection created" not in capsys.readouterr().err
