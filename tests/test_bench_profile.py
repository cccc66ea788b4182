"""`python -m bench profile`: what it shows."""

import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from bench.profile import WORKLOADS, profiled

OURS = {
    "reads": "list_events",
    "writes": "_append",
    "writes-batch": "_append",
    "lone": "_append",
    "cold": "_load",
    "listing": "list_sessions|find",
    "opening": "open_stores",
    "following": "received",
}
"""What must be seen of us in the profile of each workload; of all others any function."""


@pytest.mark.soak  # each starts a PocketBase
@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_profile_names_the_functions_that_the_time_went_into(workload: str, tmp_path: Path) -> None:
    shown, page = StringIO(), tmp_path / "profile.html"
    profiled(workload, 0.2, page, Console(file=shown, width=80))
    told = shown.getvalue()
    assert re.search(r": [1-9][\d,]* operations a second, [1-9][\d,]* microseconds of CPU each\n", told), told
    ours = [line for line in told.splitlines() if "pb_cached/" in line]
    assert any(re.search(OURS.get(workload, ""), line) for line in ours), told
    assert "</html>" in page.read_text("utf-8")
