"""The benchmarks' own arithmetic: what they count, how they take turns, and which law they see."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import cli
from bench.growth import fitted, growths
from bench.results import SHARES, Cell, Results, at_shares
from bench.rounds import Contender, take_turns
from bench.targets import TARGETS, Target

ROOT = Path(__file__).parent.parent
SIZES = (100, 1_000, 10_000, 100_000, 1_000_000)


@pytest.mark.parametrize("noise", [0.0, 0.15])
@pytest.mark.parametrize(
    ("law", "cost"),
    [
        ("flat", lambda size: 3.0),
        ("logarithmic", lambda size: 0.5 + 0.8 * math.log(size)),
        ("linear", lambda size: 2.0 + size / 500),
    ],
)
def test_a_law_is_seen_through_the_noise(law: str, cost: object, noise: float) -> None:
    assert callable(cost)
    costs = {size: cost(size) * (1 + noise * (-1) ** place) for place, size in enumerate(SIZES)}
    found, misfit = fitted(costs)
    assert found == law
    assert misfit <= noise + 0.1


def cell(size: int, milliseconds: float, peer: str = "a peer", workload: str = "work") -> Cell:
    return Cell(
        workload=workload,
        peer=peer,
        of="events stored",
        size=size,
        unit="turn",
        rates=[1000 / milliseconds],
        waits=[],
        client_cpu=[],
        server_cpu=[],
        client_bytes=0,
        server_bytes=0,
    )


def test_growth_is_told_of_what_was_measured_at_three_sizes() -> None:
    cells = [cell(size, 1 + size / 100) for size in SIZES] + [cell(size, 1, "other") for size in SIZES[:2]]
    (growth,) = growths(cells)
    assert (growth.peer, growth.law) == ("a peer", "linear")
    assert growth.factor == pytest.approx((1 + 1e4) / 2)


@pytest.mark.parametrize(
    ("is_least", "values", "verdict", "reaches_aim"),
    [
        (True, [7.0, 9.0, 8.5], "pass", False),
        (True, [7.0, 7.9, 20.0], "short", False),
        (True, [15.0], "pass", True),
        (False, [8.1], "short", True),
        (False, [8.0], "pass", True),
    ],
)
def test_the_median_of_the_rounds_is_held_against_a_target(
    is_least: bool, values: list[float], verdict: str, reaches_aim: bool
) -> None:
    row = Target("key", "what", 8, 15, "x", is_least, "because").row(values)
    assert (row.verdict, row.reaches_aim) == (verdict, reaches_aim)
    assert row.why == ("because" if verdict == "short" else "")
    assert row.wanted == f"at {'least' if is_least else 'most'} 8x"


async def test_contenders_take_turns_and_the_first_round_does_not_count() -> None:
    turns: list[tuple[str, int]] = []

    def contender(name: str, seconds: float) -> Contender:
        async def work(operations: int) -> Sequence[float]:
            turns.append((name, operations))
            await asyncio.sleep(seconds)
            return [seconds] * operations

        return Contender(name, work, 8)

    contenders = [contender("quick", 0.01), contender("slow", 0.05)]
    found = await take_turns(contenders, 3, workload="work", of="events", size=1, unit="turn")
    assert turns == [
        ("quick", 2),
        ("slow", 2),
        *(("slow", 8), ("quick", 8)),
        *(("quick", 8), ("slow", 8)),
        *(("slow", 8), ("quick", 8)),
    ]
    quick, slow = (found.cells[name].rates for name in ("quick", "slow"))
    assert len(quick) == len(slow) == 3
    assert found.faster("quick", "slow") == [one / other for one, other in zip(quick, slow, strict=True)]
    assert all(rate < 8 / 0.05 for rate in slow)
    assert found.slower("slow", "quick", 0.5) == pytest.approx(5)
    assert found.cells["slow"].wait(0.99) == pytest.approx(50)


def test_quantiles_are_of_all_waits() -> None:
    waits = at_shares([float(number) for number in range(1000)])
    by_share = dict(zip(SHARES, waits, strict=True))
    assert (by_share[0.0], by_share[0.5], by_share[0.999], by_share[1.0]) == (0, 500, 999, 999)
    assert at_shares([]) == []


def test_every_target_is_judged_by_a_workload_that_there_is() -> None:
    workloads = {
        "updates": "writes",
        "lone": "writes",
        "crowd": "writes",
        "hot": "writes",
        "following": "coherence",
    }
    for key in TARGETS:
        name = key.partition(".")[0]
        assert workloads.get(name, name) in cli.workloads(), key


def test_a_workload_that_there_is_not_is_named_with_those_that_there_are() -> None:
    answer = CliRunner().invoke(cli.main, ["--only", "raeds"])
    assert answer.exit_code == 2
    assert "no workload 'raeds'" in answer.output and "reads" in answer.output


def test_a_file_that_is_no_run_is_refused_in_words(tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("runs") / "other.json"
    file.write_text('{"rows": 1}')
    answer = CliRunner().invoke(cli.main, ["compare", str(file), str(file)])
    assert answer.exit_code == 1
    assert "not the results of a run" in answer.output


@pytest.mark.slow
def test_one_command_measures_judges_and_reports(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "--quick", "--rounds", "1", "--only", "opening", "--only", "listing"]
    ran = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    results = Results.read(tmp_path / "results.json")
    assert [row.key for row in results.rows] == ["opening.growth"]
    assert {cell.workload.partition(" ")[0] for cell in results.cells} == {"opening", "listing"}
    assert (tmp_path / "report.html").read_text("utf-8").count("opening") > 1
    compared = CliRunner().invoke(cli.main, ["compare", str(tmp_path), str(tmp_path / "results.json")])
    assert compared.exit_code == 0, compared.output
