"""What a run has found is told whole and safely: on a page, in pictures, and beside another run."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

import msgspec
import pytest
from rich.console import Console

from bench import compare
from bench.growth import growths
from bench.report import show, write
from bench.report.canvas import apart
from bench.report.groups import common, groups
from bench.report.palette import looks
from bench.report.words import duration, number, spread
from bench.results import Cell, Machine, Results, Row, Series, at_shares
from bench.targets import TARGETS

MEMORY, FILE, PLAIN = "Parlant in memory", "Parlant JSON file", "plain PocketBase adapter"
REALTIME, EXCLUSIVE, BATCH = "pb_cached, log, realtime", "pb_cached, log, exclusive", "pb_cached, batch, realtime"
BARE, SQLITE = "bare /api/batch", "plain SQLite"


def machine(**versions: str) -> Machine:
    return Machine(
        system="Linux-6.8",
        processor="Some Processor @ 2.80GHz",
        cores=2,
        memory_bytes=8 * 2**30,
        versions={"Python": "3.11.7", "PocketBase": "0.39.0", "pb_cached": "0.1.0"} | versions,
    )


def cell(
    workload: str,
    peer: str,
    of: str,
    size: int,
    cost: float,
    *,
    unit: str = "operation",
    rounds: int = 5,
    has_waits: bool = True,
    has_server: bool = True,
) -> Cell:
    """One whose operations take so many milliseconds, more or less."""
    some = random.Random(f"{workload} {peer} {size}")
    return Cell(
        workload=workload,
        peer=peer,
        of=of,
        size=size,
        unit=unit,
        rates=[1000 / cost * some.uniform(0.95, 1.05) for _ in range(rounds)],
        waits=at_shares([cost * some.lognormvariate(-0.08, 0.4) for _ in range(400)]) if has_waits else [],
        client_cpu=[400 * cost * some.uniform(0.95, 1.05) for _ in range(rounds)],
        server_cpu=[200 * cost * some.uniform(0.95, 1.05) for _ in range(rounds)] if has_server else [],
        client_bytes=312_000_000,
        server_bytes=some.randrange(60, 200) * 1_000_000 if has_server else 0,
    )


def turns() -> list[Cell]:
    """Of a conversation, by peers of which not all were measured at all sizes."""
    found = []
    for size in (100, 10_000, 100_000, 1_000_000):
        some = {
            MEMORY: 0.4 + size * 9e-4,
            PLAIN: 46 + 4 * (size / 1e5),
            REALTIME: 2.6,
            EXCLUSIVE: 2.45,
            BATCH: 4.1,
        }
        if size <= 10_000:
            some[FILE] = 8 + size * 0.03
        if size == 1_000_000:
            del some[MEMORY]
        found += [
            cell(
                "turns",
                peer,
                "events stored",
                size,
                cost,
                unit="turn",
                has_server="PocketBase" in peer or "pb" in peer,
            )
            for peer, cost in some.items()
        ]
    return found


def full() -> Results:
    """A run of everything."""
    cells = turns()
    cells += [
        cell("turns at once", peer, "events stored", 10_000, cost, unit="turn", has_waits=False)
        for peer, cost in ((PLAIN, 38.0), (REALTIME, 0.9), (MEMORY, 9.4))
    ]
    for size in (1000, 10_000, 100_000):
        cells.append(cell("reads", "Parlant's in-memory store", "events stored", size, size * 9.5e-4, unit="read"))
        cells.append(cell("reads", "pb_cached", "events stored", size, 0.055, unit="read", has_server=False))
    for size in (1, 100):
        for peer, cost in (
            (REALTIME, 1.1 if size == 1 else 0.055),
            (BATCH, 1.6 if size == 1 else 0.19),
            (PLAIN, 3.1 if size == 1 else 2.8),
            (BARE, 1.2 if size == 1 else 0.11),
            (SQLITE, 0.02),
        ):
            cells.append(cell("writes", peer, "writers", size, cost, unit="create_event", has_waits=size == 1))
    for unit in ("list_sessions page", "list_events page"):
        for size in (100, 1000, 10_000):
            for peer, cost in ((MEMORY, size * 1e-3), (PLAIN, 3.0), (REALTIME, 0.31)):
                cells.append(cell("listing", peer, "sessions stored", size, cost, unit=unit, has_waits=False))
    cells += [
        cell("streaming", peer, "replies at once", 1, cost, unit="chunk", has_waits=False)
        for peer, cost in ((PLAIN, 3), (REALTIME, 0.1))
    ]
    for size in (1, 2, 4):
        cells.append(cell("servers", REALTIME, "server processes", size, 0.09 / size**0.4, has_waits=False))
        cells.append(cell("servers", PLAIN, "server processes", size, 2.8 / size**0.1, has_waits=False))
    cells.append(cell("cold", REALTIME, "events stored", 100_000, 4.2, unit="first read"))
    cells.append(cell("cold", PLAIN, "events stored", 100_000, 5.1, unit="first read"))
    cells += [
        cell("opening", REALTIME, "events stored", size, 21.0, unit="opening", rounds=1, has_waits=False)
        for size in (10, 1000, 100_000, 1_000_000)
    ]
    for peer, held in ((REALTIME, 136_000_000), (MEMORY, 247_000_000)):
        held_alone = cell("memory", peer, "events cached", 200_000, 2.1, has_waits=False, has_server=False)
        cells.append(msgspec.structs.replace(held_alone, client_bytes=held))
    some = random.Random(7)
    results = Results(
        began="2026-11-25 20:00:00",
        seconds=1512.3,
        is_quick=False,
        rounds=5,
        machine=machine(),
        cells=cells,
        rows=[
            target.row([(target.aim if place % 2 else target.bound) * some.uniform(0.6, 1.4) for _ in range(5)])
            for place, target in enumerate(TARGETS.values())
        ],
        series=[
            Series(
                workload="coherence",
                name=name,
                x="seconds",
                y="ms until another server shows it",
                points=[(0.02 * step, some.lognormvariate(base, 0.35)) for step in range(200)],
            )
            for name, base in (("in quiet", 0.9), ("while 100 writers burst", 2.6), ("of nothing", 0.0))
        ],
        notes=["Parlant's JSON file is left out beyond 10,000 events: a write rewrites all of it."],
    )
    results.series[-1].points.clear()
    results.growths = growths(results.cells)
    return results


def empty(**changes: object) -> Results:
    """A run that has found nothing."""
    results = Results(began="2026-11-25 20:00:00", is_quick=True, rounds=2, machine=machine())
    return msgspec.structs.replace(results, **changes)


SVG: Final = "{http://www.w3.org/2000/svg}"
HOSTILE: Final = """<script>alert("1")</script> & 'pb' -- $x_1$ ]]> <b"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path]:
    """A run of everything, with reasons for what falls short, and the folder where it is told."""
    results = full()
    results.rows = [
        msgspec.structs.replace(row, why=f"Reason {place}.") if row.verdict == "short" else row
        for place, row in enumerate(results.rows)
    ]
    out = tmp_path_factory.mktemp("told")
    write(results, out)
    return results, out


def parsed(page: Path) -> ElementTree.Element:
    return ElementTree.fromstring(page.read_text(encoding="utf-8").removeprefix("<!DOCTYPE html>"))


def words(element: ElementTree.Element) -> str:
    return "".join(element.itertext())


def lines(page: ElementTree.Element) -> list[list[str]]:
    """All rows of all tables."""
    return [[words(entry) for entry in line] for line in page.iter("tr")]


def printed(show: Callable[[Console], None], width: int = 240) -> str:
    console = Console(file=io.StringIO(), width=width)
    show(console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_page_is_well_formed_and_needs_nothing_but_itself(told: tuple[Results, Path]) -> None:
    page = parsed(told[1] / "report.html")
    for element in page.iter():
        assert not element.tag.endswith(("script", "link", "iframe", "img"))
        for name, value in element.attrib.items():
            if name.endswith(("href", "src")):
                assert value.startswith("#")
    text = (told[1] / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r"https?:[^\s\"']*", text)) == {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }, "but for the names of what SVG is"
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\((.)", text))


def test_every_anchor_of_the_page_leads_to_one_place(told: tuple[Results, Path]) -> None:
    page = parsed(told[1] / "report.html")
    ids = [element.attrib["id"] for element in page.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    links = {
        value[1:] for element in page.iter() for name, value in element.attrib.items() if name.endswith("href")
    }
    text = (told[1] / "report.html").read_text(encoding="utf-8")
    assert links | set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)
    assert {"targets", "turns", "turns-at-once", "machine"} <= links


def test_the_page_holds_every_target_with_its_verdict_and_the_reason_where_it_falls_short(
    told: tuple[Results, Path],
) -> None:
    results, out = told
    found = lines(parsed(out / "report.html"))
    kinds = set()
    for row in results.rows:
        verdict = "short" if row.verdict == "short" else "aim reached" if row.reaches_aim else "pass"
        kinds.add(verdict)
        [place] = [
            place
            for place, line in enumerate(found)
            if line[:3] == [row.what, row.wanted, row.aim] and line[3].startswith(number(row.measured))
        ]
        assert found[place][4] == f"{number(min(row.values))} to {number(max(row.values))}"
        assert found[place][5] == verdict
        if row.why:
            assert found[place + 1] == [row.why]
    assert kinds == {"short", "pass", "aim reached"}


def test_the_page_holds_every_cell_note_law_and_version(told: tuple[Results, Path]) -> None:
    results, out = told
    page = parsed(out / "report.html")
    found = lines(page)
    for cell in results.cells:
        line = next(line for line in found if line[:3] == [cell.peer, f"{cell.size:,}", spread(cell.rates)])
        assert all(number(cell.wait(share)) in line for share in (0.5, 0.99) if cell.waits)
    for growth in results.growths:
        assert any(line[:4] == [growth.workload, growth.peer, growth.of, growth.law] for line in found)
    for fact in results.machine.versions.items():
        assert list(fact) in found
    assert [words(note) for note in page.iter("li")] == results.notes


def test_names_are_told_as_they_are_and_do_no_harm(tmp_path: Path) -> None:
    row = msgspec.structs.replace(TARGETS["reads.one"].row([9.0, 10.0]), what=HOSTILE, why=HOSTILE)
    results = empty(
        cells=[cell(HOSTILE, HOSTILE, HOSTILE, size, 2.0, unit=HOSTILE) for size in (1, 10, 100)],
        rows=[row],
        series=[Series(workload=HOSTILE, name=HOSTILE, x=HOSTILE, y=HOSTILE, points=[(0.0, 1.0), (1.0, 2.0)])],
        notes=[HOSTILE],
        machine=machine(**{HOSTILE: HOSTILE}),
    )
    results.growths = growths(results.cells)
    page = parsed(write(results, tmp_path))
    assert not list(page.iter("script"))
    told = [words(element) for element in page.iter() if element.tag in ("td", "th", "li", f"{SVG}text")]
    assert sum(HOSTILE in text for text in told) > 10
    pictures = [words(ElementTree.parse(path).getroot()) for path in tmp_path.glob("*.svg")]
    assert pictures
    assert all(HOSTILE in words for words in pictures)
    shown = printed(lambda console: show(results, console))
    assert shown.count(HOSTILE) >= 8


def test_there_are_pictures_of_all_that_there_is(told: tuple[Results, Path]) -> None:
    results, out = told
    drawn = {path.stem for path in out.glob("*.svg")}
    assert drawn == {path.stem for path in out.glob("*.png")}
    assert drawn == {
        "headline",
        "resident",
        "resident-memory",
        "staleness-coherence-ms-until-another-server-shows-it",
        *(f"throughput-{name}" for name in ("servers", "writes")),
        *(f"growth-{name}" for name in ("turns", "reads", "opening")),
        *(f"growth-listing-{name}" for name in ("list-sessions-page", "list-events-page")),
        *(f"latency-{name}" for name in ("turns", "reads", "writes", "cold")),
    }
    assert len(list(parsed(out / "report.html").iter(f"{SVG}svg"))) == len(drawn)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.glob("*.png"))
    turns = words(ElementTree.parse(out / "latency-turns.svg").getroot())
    at_most = [cell for cell in results.cells if cell.workload == "turns" and cell.size == 10_000]
    assert len(at_most) == 6
    for cell in at_most:
        assert cell.peer in turns
        assert duration(cell.wait(0.99)) in turns


@pytest.mark.parametrize(
    ("cells", "drawn"),
    [
        ([], set()),
        ([cell("turns", MEMORY, "events stored", 100, 2.0, has_server=False)], {"headline", "latency-turns"}),
        ([cell("turns", MEMORY, "events stored", 100, 2.0, has_server=False, has_waits=False)], set()),
        ([cell("cold", PLAIN, "events stored", 100, 2.0, has_waits=False)], {"resident"}),
        ([cell("writes", SQLITE, "writers", 9, 2.0, rounds=1, has_server=False, has_waits=False)], {"headline"}),
        ([cell("opening", PLAIN, "events stored", 9, 2.0, rounds=0, has_server=False)], set()),
        (
            [cell("opening", PLAIN, "events", size, 2.0, has_server=False, has_waits=False) for size in (1, 2)],
            set(),
        ),
        (
            [cell("opening", PLAIN, "events", size, 2.0, has_server=False, has_waits=False) for size in (1, 2, 9)],
            {"growth-opening"},
        ),
        (
            [cell("mixed", PLAIN, "servers", size, 2.0, has_server=False, has_waits=False) for size in (1, 2, 4)],
            {"throughput-mixed"},
        ),
    ],
)
def test_there_are_no_pictures_of_what_there_is_not(tmp_path: Path, cells: list[Cell], drawn: set[str]) -> None:
    some = Series(workload="coherence", name="in quiet", x="seconds", y="ms", points=[])
    page = parsed(write(empty(cells=cells, series=[some]), tmp_path))
    files = {f"{name}.{ending}" for name in drawn for ending in ("svg", "png")}
    assert names(tmp_path) == files | {"results.json", "report.html"}
    assert len(list(page.iter(f"{SVG}svg"))) == len(drawn)
    assert printed(lambda console: show(empty(cells=cells), console))


def test_results_are_what_they_were_when_read_back(told: tuple[Results, Path]) -> None:
    results, out = told
    assert Results.read(out / "results.json") == results


def test_the_same_results_make_the_same_files(tmp_path: Path) -> None:
    results = empty(cells=turns()[:6], series=full().series, rows=full().rows)
    for name in ("one", "other"):
        write(results, tmp_path / name)
    assert len(names(tmp_path / "one")) == 10
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


def test_pictures_of_an_earlier_run_go_and_those_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "holiday.svg").write_text("<svg/>", encoding="utf-8")
    (tmp_path / "growth-of-my-tomatoes.png").write_bytes(b"\x89PNG")
    others = names(tmp_path)
    write(empty(cells=[cell("turns", MEMORY, "events stored", 100, 2.0, has_server=False)]), tmp_path)
    assert "latency-turns.png" in names(tmp_path)
    write(empty(), tmp_path)
    assert names(tmp_path) == others | {"results.json", "report.html"}


def test_an_interrupted_report_leaves_the_page_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = write(empty(), tmp_path)
    before = page.read_bytes(), names(tmp_path)

    def interrupted(self: Path, text: str, **_: str) -> int:
        self.write_bytes(text.encode()[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(empty(notes=["more"]), tmp_path)
    assert (page.read_bytes(), names(tmp_path)) == before


def test_a_peer_looks_the_same_everywhere_and_unlike_its_rivals() -> None:
    found = [group.peers for group in groups(full().cells)]
    given = looks(found)
    for peers in found:
        assert len({given[peer].light for peer in peers}) == len(peers)
    assert looks([peers[::-1] for peers in found[::-1]]) == given
    alone = looks([[REALTIME]])
    assert alone[REALTIME] == given[REALTIME]
    assert [given[peer].is_ours for peer in (REALTIME, BATCH, "pb_cached", BARE, PLAIN)] == [True] * 3 + [
        False
    ] * 2
    assert len(looks([[f"stranger {number}" for number in range(30)]])) == 30


def test_peers_are_compared_at_the_largest_size_at_which_most_were_measured() -> None:
    assert {cell.size for cell in common(turns())} == {10_000}
    assert {cell.peer for cell in common(turns())} == {MEMORY, FILE, PLAIN, REALTIME, EXCLUSIVE, BATCH}
    assert common([]) == []


@pytest.mark.parametrize(
    ("wanted", "placed"),
    [
        ([], []),
        ([0.5], [0.5]),
        ([0.1, 0.9], [0.1, 0.9]),
        ([0.5, 0.5], [0.4, 0.6]),
        ([0.9, 0.5, 0.5], [0.9, 0.4, 0.6]),
        ([0.0, 0.1, 0.2, 9.0], [-0.1, 0.1, 0.3, 9.0]),
    ],
)
def test_labels_keep_their_order_and_a_distance(wanted: Sequence[float], placed: Sequence[float]) -> None:
    assert apart(wanted, 0.2) == pytest.approx(placed)


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0, "0"), (0.01234, "0.0123"), (1.0, "1.00"), (99.97, "100"), (123.4, "123"), (12345.6, "12,346")],
)
def test_numbers_are_said_with_three_digits_that_count(value: float, said: str) -> None:
    assert number(value) == said


def test_the_terminal_shows_targets_cells_laws_notes_and_the_machine(told: tuple[Results, Path]) -> None:
    results, _ = told
    shown = printed(lambda console: show(results, console))
    for row in results.rows:
        assert row.what in shown
        assert row.why in shown
    for cell in results.cells:
        assert f" {cell.peer} " in shown
        assert spread(cell.rates) in shown
    assert all(note in shown for note in results.notes)
    assert "Some Processor @ 2.80GHz" in shown
    narrow = printed(lambda console: show(results, console), width=80)
    assert max(map(len, narrow.splitlines())) <= 80
    assert "client memory" not in narrow


def scaled(results: Results, key: tuple[str, str, int], factor: float) -> Results:
    """The same results, but for one cell that is so many times as fast."""
    cells = [
        msgspec.structs.replace(
            cell, rates=[rate * factor for rate in cell.rates], waits=[wait / factor for wait in cell.waits]
        )
        if (cell.workload, cell.peer, cell.size) == key
        else cell
        for cell in results.cells
    ]
    return msgspec.structs.replace(results, cells=cells)


def compared(before: Results, after: Results) -> list[str]:
    return printed(lambda console: compare.show(before, after, console)).splitlines()


def line_of(said: list[str], *parts: str) -> str:
    [line] = [line for line in said if all(part in line for part in parts)]
    return line


def few() -> Results:
    return empty(cells=turns()[:6], is_quick=False)


@pytest.mark.parametrize(("factor", "verdict", "change"), [(1.3, "better", "+30.0 %"), (0.5, "worse", "-50.0 %")])
def test_a_planted_change_is_found(factor: float, verdict: str, change: str) -> None:
    said = compared(few(), scaled(few(), ("turns", PLAIN, 100), factor))
    assert verdict in line_of(said, PLAIN)
    assert change in line_of(said, PLAIN)
    assert "within noise" in line_of(said, REALTIME)
    assert said[-1] == f"Of what is in both runs: 2 {verdict}, 10 within noise.", "rate and p99"


def test_a_change_inside_the_spread_is_noise() -> None:
    said = compared(few(), scaled(few(), ("turns", PLAIN, 100), 1.04))
    assert "+4.0 %" in line_of(said, PLAIN)
    assert said[-1] == "Of what is in both runs: 12 within noise."


def test_a_run_of_one_round_judges_nothing() -> None:
    some = cell("opening", PLAIN, "events stored", 10, 2.0, rounds=1, has_waits=False)
    before = empty(cells=[some])
    said = compared(before, scaled(before, ("opening", PLAIN, 10), 9.0))
    assert "9x" in line_of(said, PLAIN)
    assert said[-1] == "Of what is in both runs: 1 cannot tell."


def test_a_p99_of_a_handful_of_operations_judges_nothing() -> None:
    some = msgspec.structs.replace(few().cells[0], waits=at_shares([1.0, 2.0, 3.0]))
    assert compare.judged_tail(some, msgspec.structs.replace(some, waits=at_shares([7.0, 8.0]))) == "cannot tell"


def row(key: str, *values: float) -> Row:
    return TARGETS[key].row(values)


@pytest.mark.parametrize(
    ("key", "before", "after", "verdict"),
    [
        ("writes.log.bare", (90, 110, 120), (130, 140, 150), "better"),
        ("writes.log.bare", (90, 110, 120), (120, 140, 150), "within noise"),
        ("waits.other", (4, 5, 6), (7, 8, 9), "worse"),
        ("waits.other", (4, 5, 6), (2, 3, 3.5), "better"),
        ("waits.other", (4,), (400,), "cannot tell"),
    ],
)
def test_a_target_is_better_in_its_own_direction(
    key: str, before: Sequence[float], after: Sequence[float], verdict: str
) -> None:
    said = compared(empty(rows=[row(key, *before)]), empty(rows=[row(key, *after)]))
    assert said[-1] == f"Of what is in both runs: 1 {verdict}."


def test_a_target_that_fell_short_since_is_pointed_out() -> None:
    said = compared(empty(rows=[row("waits.other", 9, 9.5)]), empty(rows=[row("waits.other", 11, 12)]))
    assert "pass, now short" in line_of(said, "at most 10 ms")


def test_what_only_one_run_has_is_named_and_so_is_what_differs_around_it() -> None:
    before = empty(cells=turns()[:1], rows=[row("waits.other", 9)])
    after = empty(
        cells=turns()[1:2], rows=[row("waits.same", 1)], machine=machine(PocketBase="0.40.1"), is_quick=False
    )
    said = compared(before, after)
    assert line_of(said, "turns", MEMORY, "100 events stored", "only before")
    assert line_of(said, "turns", PLAIN, "100 events stored", "only after")
    assert line_of(said, "waits.other", "only before")
    assert line_of(said, "waits.same", "only after")
    assert line_of(said, "PocketBase", "0.39.0", "0.40.1")
    assert not [line for line in said if "3.11.7" in line], "the same in both"
    assert line_of(said, "One run is quick and the other is not")
    assert said[-1] == "Nothing is in both runs."
