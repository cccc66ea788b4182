"""Which pictures the results give, and how each is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from matplotlib.axes import Axes

from bench.quantiles import quantile
from bench.report.canvas import (
    EDGE,
    HEAD,
    WIDTH,
    Sheet,
    apart,
    around,
    linear_scale,
    log_scale,
    marks_at,
    one_look,
    plain_tick,
    width_of,
)
from bench.report.groups import Group, common, groups
from bench.report.palette import FAINT, INK, SOFT, Look, looks
from bench.report.words import duration, megabytes, number, several, slug
from bench.results import SHARES, Cell, Growth, Results, Series

FOOT: Final = 0.6
"""Inches under a drawing, for its marks and what they count."""
LINE: Final = 0.24
"""From one label to the next."""
GAP: Final = 0.14


@dataclass(frozen=True)
class Picture:
    name: str
    """Of its files, without the ending."""
    title: str
    caption: str
    """How to read it."""
    workload: str
    """Whose section of the page it stands in; empty if it stands for itself."""
    svg: str
    png: bytes


@dataclass(frozen=True)
class _Drawer:
    """Draws what is there, with one look for each peer."""

    looks: Mapping[str, Look]
    laws: Mapping[tuple[str, str, str], Growth]

    def weight(self, peer: str) -> str:
        return "bold" if self.looks[peer].is_ours else "normal"

    def stroke(self, peer: str) -> float:
        return 2.3 if self.looks[peer].is_ours else 1.5

    def names_width(self, names: Sequence[str]) -> float:
        return max(width_of(name, weight="bold") for name in names)

    def latency(self, group: Group) -> Picture | None:
        """The share of operations that took no longer than so many milliseconds."""
        cells = [cell for cell in common([cell for cell in group.cells if cell.waits]) if cell.wait(0.5) > 0]
        if not cells:
            return None
        cells.sort(key=lambda cell: cell.wait(0.5))
        names = self.names_width([cell.peer for cell in cells])
        sheet = Sheet(
            f"{group.workload.capitalize()}: how long one {group.unit} takes",
            f"Share of all that took no longer; {group.sized(cells[0].size)}",
            HEAD + max(2.7, 0.3 + LINE * len(cells)) + FOOT - 0.2,
        )
        stroke, column = 0.35, 0.72
        key = WIDTH - EDGE - 2 * column - names - stroke - GAP
        axes = sheet.axes(0.62, HEAD + 0.1, key - 0.62 - 0.3, sheet.height - HEAD + 0.1 - FOOT)
        waits = [wait for cell in cells for wait in cell.waits if wait > 0]
        log_scale(axes, "x", *around(waits, 0.03))
        axes.set_ylim(0, 1.02)
        marks_at(axes, "y", (0, 0.25, 0.5, 0.75, 1), lambda share, _: f"{100 * share:.0f} %")
        axes.grid(True, axis="y", color=FAINT.light, linewidth=0.8)
        for place, cell in enumerate(reversed(cells)):
            look = self.looks[cell.peer]
            shown = [(wait, share) for wait, share in zip(cell.waits, SHARES, strict=False) if wait > 0]
            axes.plot(
                [wait for wait, _ in shown],
                [share for _, share in shown],
                color=look.light,
                linewidth=self.stroke(cell.peer),
                linestyle=look.dashes,
                zorder=3 + place + 20 * look.is_ours,
            )
        top = HEAD + 0.16
        right = WIDTH - EDGE
        sheet.text(right - column, top, "p50", colour=SOFT.light, size=9, align="right")
        sheet.text(right, top, "p99", colour=SOFT.light, size=9, align="right")
        for place, cell in enumerate(cells, 1):
            look, row = self.looks[cell.peer], top + LINE * place
            sheet.stroke(key, row - 0.05, stroke, look.light, self.stroke(cell.peer), look.dashes)
            weight = self.weight(cell.peer)
            sheet.text(key + stroke + GAP, row, cell.peer, colour=look.light, weight=weight)
            sheet.text(right - column, row, duration(cell.wait(0.5)), weight=weight, align="right")
            sheet.text(right, row, duration(cell.wait(0.99)), weight=weight, align="right")
        return self._picture(
            sheet,
            f"latency-{group.name}",
            f"{group.workload.capitalize()}: how long one {group.unit} takes, at {group.sized(cells[0].size)}",
            "A line further to the left is quicker, a steeper one more even. The scale is logarithmic.",
            group.workload,
        )

    def growth(self, group: Group) -> Picture | None:
        """What an operation costs, over size."""
        if group.counts_load or not any(len(group.of_peer(peer)) >= 3 for peer in group.peers):
            return None
        lines = {peer: [(cell.size, cell.milliseconds) for cell in group.of_peer(peer)] for peer in group.peers}
        labels = {peer: self._with_law(group, peer) for peer in lines}
        sheet = Sheet(
            f"{group.workload.capitalize()}: cost of one {group.unit}, by {group.of}",
            "Median of the rounds; both scales are logarithmic",
            HEAD + max(3.1, 0.3 + LINE * len(lines)) + FOOT,
        )
        axes = self._beside_labels(sheet, list(labels.values()))
        costs = [cost for points in lines.values() for _, cost in points]
        log_scale(axes, "x", *around([float(size) for size in group.sizes], 0.03), plain_tick)
        marks_at(axes, "x", _some_of(group.sizes))
        log_scale(axes, "y", *around(costs, least=10))
        for peer, points in lines.items():
            self._line(axes, peer, points)
        axes.set_xlabel(group.of, color=SOFT.light, fontsize=9, loc="left")
        self._label_ends(sheet, axes, lines, labels)
        return self._picture(
            sheet,
            f"growth-{group.name}",
            f"{group.workload.capitalize()}: cost of one {group.unit}, by {group.of}",
            "A level line costs the same however much there is. After a peer: the law that explains it best.",
            group.workload,
        )

    def _with_law(self, group: Group, peer: str) -> str:
        law = self.laws.get((group.workload, peer, group.of))
        return f"{peer} ({law.law})" if law else peer

    def throughput(self, group: Group) -> Picture | None:
        """Operations a second, over how many work at once."""
        if not group.counts_load or len(group.sizes) < 2:
            return None
        lines = {peer: [(cell.size, cell.rate) for cell in group.of_peer(peer)] for peer in group.peers}
        sheet = Sheet(
            f"{group.workload.capitalize()}: operations a second, by {group.of}",
            f"{_operation(group)}Median of the rounds, strokes from the lowest to the highest",
            HEAD + max(3.1, 0.3 + LINE * len(lines)) + FOOT,
        )
        axes = self._beside_labels(sheet, group.peers)
        log_scale(axes, "x", *around([float(size) for size in group.sizes], 0.04), plain_tick)
        marks_at(axes, "x", _some_of(group.sizes))
        linear_scale(axes, "y", 1.08 * max(max(cell.rates) for cell in group.cells))
        for peer, points in lines.items():
            self._line(axes, peer, points)
            for cell in group.of_peer(peer):
                axes.plot([cell.size] * 2, [min(cell.rates), max(cell.rates)], color=self.looks[peer].light, lw=1)
        axes.set_xlabel(group.of, color=SOFT.light, fontsize=9, loc="left")
        self._label_ends(sheet, axes, lines, {peer: peer for peer in lines})
        return self._picture(
            sheet,
            f"throughput-{group.name}",
            f"{group.workload.capitalize()}: operations a second, by {group.of}",
            "Higher is better.",
            group.workload,
        )

    def staleness(self, some: Sequence[Series]) -> Picture | None:
        """What was watched over time, one strip for each."""
        strips = [series for series in some if series.points]
        if not strips:
            return None
        first = strips[0]
        strip = 1.25
        sheet = Sheet(
            f"{first.workload.capitalize()}: over time", first.y, HEAD + len(strips) * (strip + 0.5) + FOOT - 0.25
        )
        values = [value for series in strips for _, value in series.points]
        is_log = min(values) > 0 and max(values) / min(values) > 30
        until = max(moment for series in strips for moment, _ in series.points)
        look = next((look for look in self.looks.values() if look.is_ours), INK)
        for place, series in enumerate(strips):
            top = HEAD + 0.3 + place * (strip + 0.5)
            axes = sheet.axes(0.75, top, WIDTH - 0.75 - EDGE, strip)
            if is_log:
                log_scale(axes, "y", *around(values), plain_tick)
            else:
                linear_scale(axes, "y", 1.1 * max(*values, 1e-9))
            axes.set_xlim(-0.01 * until, 1.01 * until or 1)
            axes.scatter(
                [moment for moment, _ in series.points],
                [value for _, value in series.points],
                s=7,
                color=look.light,
                alpha=0.55,
                linewidths=0,
                clip_on=False,
            )
            ordered = sorted(value for _, value in series.points)
            shares = f"p50 {number(quantile(ordered, 0.5))}, p99 {number(quantile(ordered, 0.99))}"
            sheet.text(0.75, top - 0.1, series.name, weight="bold")
            sheet.text(WIDTH - EDGE, top - 0.1, shares, align="right", colour=SOFT.light)
            if place == len(strips) - 1:
                axes.set_xlabel(first.x, color=SOFT.light, fontsize=9, loc="left")
            else:
                axes.tick_params(labelbottom=False)
        return self._picture(
            sheet,
            f"staleness-{slug(f'{first.workload} {first.y}')}",
            f"{first.workload.capitalize()}: {first.y}",
            f"A dot for each that was watched, over {first.x}; lower is better.",
            first.workload,
        )

    def memory(self, group: Group) -> Picture | None:
        """What is resident, where each client had a process of its own."""
        cells = common([cell for cell in group.cells if cell.client_bytes])
        if len(cells) < 2 or _share_process(cells):
            return None
        has_servers = any(cell.server_bytes for cell in cells)
        bars = []
        for cell in cells:
            name = f"{cell.peer}: client" if has_servers else cell.peer
            bars.append((name, cell.peer, cell.client_bytes))
            if cell.server_bytes:
                bars.append((f"{cell.peer}: database", cell.peer, cell.server_bytes))
        what = "The client's processes, and the database's" if has_servers else "Each in a process of its own"
        return self._memory(f"resident-{group.name}", group, cells[0].size, what, bars, group.workload)

    def memory_of_servers(self, found: Sequence[Group]) -> Picture | None:
        """What is resident in the databases' processes, in the workload that has most peers: the clients share
        a process, and which of them has how much of it nobody knows."""
        by = [(group, common([cell for cell in group.cells if cell.server_bytes])) for group in found]
        by = [(group, cells) for group, cells in by if cells and (len(cells) == 1 or _share_process(cells))]
        if not by:
            return None
        group, cells = max(by, key=lambda found: (found[0].workload == "turns", len(found[1])))
        cells.sort(key=lambda cell: cell.server_bytes)
        what = f"The database's processes; all clients share one, of {megabytes(cells[0].client_bytes)}"
        bars = [(cell.peer, cell.peer, cell.server_bytes) for cell in cells]
        return self._memory("resident", group, cells[0].size, what, bars, "")

    def _memory(
        self, name: str, group: Group, size: int, what: str, bars: Sequence[tuple[str, str, int]], workload: str
    ) -> Picture:
        title = f"{group.workload.capitalize()}: bytes resident"
        sheet = Sheet(title, f"{what}; {group.sized(size)}", _bars_height(bars))
        shown = [(said, peer, count / 1e6, megabytes(count)) for said, peer, count in bars]
        names = self.names_width([said for said, _, _ in bars])
        self._bars(sheet, EDGE, names, WIDTH - EDGE, shown, is_log=False)
        return self._picture(sheet, name, title, "At the end of the last round; shorter is better.", workload)

    def headline(self, found: Sequence[Group], where: str) -> Picture | None:
        """A turn of conversation, and writes: the whole story in one look."""
        turns = next((group for group in found if group.workload == "turns"), None)
        writes = _writes(found)
        sides = []
        if turns is not None:
            timed = common([cell for cell in turns.cells if cell.waits and cell.wait(0.5) > 0])
            if timed:
                timed.sort(key=lambda cell: cell.wait(0.5))
                bars = [(cell.peer, cell.peer, cell.wait(0.5), duration(cell.wait(0.5))) for cell in timed]
                title = "A turn of conversation"
                sides.append(
                    (title, f"p50, {turns.sized(timed[0].size)}; log scale, shorter is better", bars, True)
                )
        if writes is not None:
            cells = sorted(common(writes.cells), key=lambda cell: -cell.rate)
            bars = [(cell.peer, cell.peer, cell.rate, number(cell.rate)) for cell in cells]
            sides.append(("Writes a second", f"{writes.sized(cells[0].size)}; longer is better", bars, False))
        if not sides:
            return None
        heads = 0.62
        sheet = Sheet(
            "pb_cached beside its peers", where, heads + max(_bars_height(bars) for _, _, bars, _ in sides)
        )
        width = (WIDTH - 2 * EDGE - 0.4 * (len(sides) - 1)) / len(sides)
        for place, (title, subtitle, bars, is_log) in enumerate(sides):
            left = EDGE + place * (width + 0.4)
            sheet.text(left, HEAD + 0.2, title, weight="bold", size=11)
            sheet.text(left, HEAD + 0.41, subtitle, colour=SOFT.light, size=9)
            names = self.names_width([name for name, _, _, _ in bars])
            self._bars(sheet, left, names, left + width, bars, is_log=is_log, top=HEAD + heads)
        return self._picture(
            sheet,
            "headline",
            "pb_cached beside its peers",
            "What one turn of a conversation costs in the store, and how many events are written in a second.",
            "",
        )

    def _bars(
        self,
        sheet: Sheet,
        left: float,
        names: float,
        right: float,
        bars: Sequence[tuple[str, str, float, str]],
        *,
        is_log: bool,
        top: float = HEAD,
    ) -> None:
        """A bar for each name, peer, value and how the value is said."""
        said = max(width_of(words, weight="bold") for _, _, _, words in bars) + 0.1
        start = left + names + 0.12
        axes = sheet.axes(start, top, right - said - start, LINE * len(bars))
        values = [value for _, _, value, _ in bars]
        low = 10.0 ** _decade_below(min(values)) if is_log else 0.0
        if is_log:
            axes.set_xscale("log")
        axes.set_xlim(low, max(values))
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_axis_off()
        for place, (name, peer, value, words) in enumerate(bars):
            look = self.looks[peer]
            axes.barh(
                place, value - low, left=low, height=0.62, color=look.light, alpha=1 if look.is_ours else 0.75
            )
            weight = self.weight(peer)
            baseline = top + LINE * (place + 0.5) + 0.048
            sheet.text(start - 0.1, baseline, name, weight=weight, align="right")
            axes.annotate(
                words, (value, place), (6, 0), textcoords="offset points", va="center_baseline", weight=weight
            )

    def _beside_labels(self, sheet: Sheet, labels: Sequence[str]) -> Axes:
        right = WIDTH - EDGE - self.names_width(labels) - 0.35
        return sheet.axes(0.75, HEAD + 0.1, right - 0.75, sheet.height - HEAD - 0.1 - FOOT)

    def _line(self, axes: Axes, peer: str, points: Sequence[tuple[int, float]]) -> None:
        look = self.looks[peer]
        axes.plot(
            [size for size, _ in points],
            [value for _, value in points],
            color=look.light,
            linewidth=self.stroke(peer),
            linestyle=look.dashes,
            zorder=4 if look.is_ours else 3,
        )
        axes.scatter(
            [size for size, _ in points],
            [value for _, value in points],
            s=26 if look.is_ours else 14,
            color=look.light,
            zorder=5,
            clip_on=False,
        )

    def _label_ends(
        self,
        sheet: Sheet,
        axes: Axes,
        lines: Mapping[str, Sequence[tuple[int, float]]],
        labels: Mapping[str, str],
    ) -> None:
        """Name each line at its right end, with a thin stroke to where it ends."""
        box = axes.get_window_extent()
        peers = list(lines)
        ends = [axes.transData.transform(lines[peer][-1]) for peer in peers]
        step = LINE * sheet.figure.dpi / box.height
        places = apart([(end[1] - box.y0) / box.height for end in ends], step)
        over = max(0.0, max(places) - 1.0)
        for peer, end, place in zip(peers, ends, places, strict=True):
            look, height = self.looks[peer], place - over
            start = ((end[0] - box.x0) / box.width, (end[1] - box.y0) / box.height)
            axes.annotate(
                labels[peer],
                start,
                (1 + 0.26 * sheet.figure.dpi / box.width, height),
                xycoords="axes fraction",
                textcoords="axes fraction",
                color=look.light,
                weight=self.weight(peer),
                va="center",
                annotation_clip=False,
                arrowprops={
                    "arrowstyle": "-",
                    "color": look.light,
                    "linewidth": 0.6,
                    "alpha": 0.5,
                    "relpos": (0, 0.5),
                    "shrinkA": 1,
                    "shrinkB": 4,
                },
            )

    @staticmethod
    def _picture(sheet: Sheet, name: str, title: str, caption: str, workload: str) -> Picture:
        svg, png = sheet.files()
        return Picture(name, title, caption, workload, svg, png)


def pictures(results: Results) -> list[Picture]:
    """All that there is something for, the headline first."""
    with one_look():
        return _pictures(results)


def _pictures(results: Results) -> list[Picture]:
    found = groups(results.cells)
    drawer = _Drawer(
        looks(group.peers for group in found),
        {(growth.workload, growth.peer, growth.of): growth for growth in results.growths},
    )
    machine = results.machine
    where = f"{machine.processor}, {machine.cores} cores; {several(results.rounds, 'round')}"
    if results.is_quick:
        where += ", a quick run"
    drawn = [drawer.headline(found, where)]
    for group in found:
        drawn += [drawer.latency(group), drawer.throughput(group), drawer.growth(group), drawer.memory(group)]
    watched: dict[tuple[str, str, str], list[Series]] = {}
    for series in results.series:
        watched.setdefault((series.workload, series.x, series.y), []).append(series)
    drawn += [drawer.staleness(some) for some in watched.values()]
    drawn.append(drawer.memory_of_servers(found))
    return [picture for picture in drawn if picture is not None]


def _share_process(cells: Sequence[Cell]) -> bool:
    return len({cell.client_bytes for cell in cells}) < len(cells)


def _operation(group: Group) -> str:
    return "" if group.unit == "operation" else f"Operation: {group.unit}. "


def _writes(found: Sequence[Group]) -> Group | None:
    """Of events, where several kinds are written."""
    groups = [group for group in found if group.workload == "writes"]
    return next((group for group in groups if "event" in group.unit), groups[0] if groups else None)


def _bars_height(bars: Sequence[object]) -> float:
    return HEAD + LINE * len(bars) + 0.25


def _decade_below(value: float) -> int:
    """The power of ten that leaves some of a bar to be seen."""
    power = 0
    while 10.0**power > value / 1.5:
        power -= 1
    while 10.0 ** (power + 1) <= value / 1.5:
        power += 1
    return power


def _some_of(sizes: Sequence[int]) -> list[float]:
    """Not so many that their labels would touch on a logarithmic scale."""
    kept: list[float] = []
    for size in sizes:
        if not kept or size / kept[-1] >= (sizes[-1] / sizes[0]) ** 0.12:
            kept.append(float(size))
    return kept
