"""The report as one page that needs nothing but itself: pictures within, no script, light or dark as asked for.

It is HTML that is well-formed XML, too. Whatever comes from results is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import Final

from bench.report import tables
from bench.report.groups import Group, groups
from bench.report.palette import FAINT, INK, LOOKS, PAPER, SOFT
from bench.report.pictures import Picture
from bench.report.tables import Line, Table
from bench.report.words import slug
from bench.results import Results

MEASURED: Final = (
    "All that are compared take turns within each round, and each round begins with another one, so that a drift"
    " of the machine meets all alike. A round before the first warms up and does not count. Rates are medians of"
    " the rounds, with the lowest and the highest; p50 and p99 are of all operations of all rounds. CPU is in"
    " microseconds for an operation: the client is the process that runs the benchmark, the server those of the"
    " database. A client's memory is that of its whole process, at the end of the last round."
)

_STYLE: Final = """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 70rem; background: var(--paper); color: var(--ink);
       font: 16px/1.55 system-ui, "Segoe UI", "DejaVu Sans", Verdana, sans-serif; }
h1 { margin: 0.5rem 0 0; font-size: 1.9rem; line-height: 1.2; }
h2 { margin: 3rem 0 0.75rem; padding-top: 1rem; border-top: 1px solid var(--faint); font-size: 1.35rem; }
h3 { margin: 2rem 0 0.5rem; font-size: 1.05rem; }
p { max-width: 46rem; }
a { color: var(--link); }
h2 a, h3 a { color: inherit; text-decoration: none; }
h2 a:hover, h3 a:hover { text-decoration: underline; }
nav { margin: 1rem 0; line-height: 1.9; }
nav a { margin-right: 1rem; white-space: nowrap; }
figure { margin: 1.25rem 0; }
figure svg { display: block; width: 100%; max-width: 56rem; height: auto; }
figcaption { color: var(--soft); font-size: 0.9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 1.1rem 0.3rem 0; text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; border-bottom: 1px solid var(--soft); }
tbody tr { border-top: 1px solid var(--faint); }
tbody tr.below { border-top: 0; color: var(--soft); }
tbody tr:target { background: var(--faint); }
.number { text-align: right; white-space: nowrap; }
.strong { font-weight: 600; }
code { color: var(--soft); font-size: 0.8rem; }
.best, .good, .bad { font-weight: 600; white-space: nowrap; }
.best { color: var(--best); }
.good { color: var(--good); }
.bad { color: var(--bad); }
.quiet { color: var(--soft); }
@media print { body { max-width: none; padding: 0; } h2 { break-after: avoid; } figure { break-inside: avoid; } }
"""
_LIGHT: Final = {"link": "#0b57d0", "best": "#00695c", "good": "#2e6b1f", "bad": "#b3261e"}
_DARK: Final = {"link": "#7cb0ff", "best": "#3fd0bf", "good": "#a3d492", "bad": "#ff9d94"}
_NAMED: Final = {"ink": INK, "soft": SOFT, "faint": FAINT, "paper": PAPER}
_VARIABLES: Final = {look.light: f"--look-{place}" for place, look in enumerate(LOOKS)}


def page(results: Results, pictures: Sequence[Picture]) -> str:
    """The whole page."""
    parts = _parts(results, pictures)
    anchors = _anchors([title for title, _ in parts])
    links = " ".join(
        f'<a href="#{anchor}">{escape(title)}</a>' for anchor, (title, _) in zip(anchors, parts, strict=True)
    )
    sections = "".join(_section(title, anchor, body) for anchor, (title, body) in zip(anchors, parts, strict=True))
    headline = "".join(_figure(picture) for picture in pictures if picture.name == "headline")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8" />'
        '<meta name="viewport" content="width=device-width, initial-scale=1" />'
        '<meta name="color-scheme" content="light dark" />'
        f"<title>pb_cached beside its peers</title><style>{_colours()}{_STYLE}</style></head>\n"
        f"<body><header><h1>pb_cached beside its peers</h1><p>{escape(tables.about(results))} "
        f"{escape(tables.tally(results.rows))}</p><nav>{links}</nav>{headline}</header>\n"
        f"<main>{sections}</main></body></html>\n"
    )


def _parts(results: Results, pictures: Sequence[Picture]) -> list[tuple[str, str]]:
    """Titles, and what stands under them."""
    found = groups(results.cells)
    parts = []
    if results.rows:
        parts.append(("Targets", _table(tables.targets(results.rows))))
    workloads = [group.workload for group in found] + [
        picture.workload for picture in pictures if picture.workload
    ]
    for workload in dict.fromkeys(workloads):
        drawn = [picture for picture in pictures if picture.workload == workload]
        some = [group for group in found if group.workload == workload]
        parts.append((workload.capitalize(), "".join([*map(_figure, drawn), *map(_group, some)])))
    if results.growths:
        parts.append(("How costs grow", _table(tables.laws(results.growths))))
    if memory := [picture for picture in pictures if picture.name == "resident"]:
        parts.append(("Memory resident", "".join(map(_figure, memory))))
    if results.notes:
        notes = "".join(f"<li>{escape(note)}</li>" for note in results.notes)
        parts.append(("Notes", f"<ul>{notes}</ul>"))
    parts.append(("Machine", _table(tables.machine(results.machine))))
    parts.append(("How it is measured", f"<p>{escape(MEASURED)}</p>"))
    return parts


def _anchors(titles: Sequence[str]) -> list[str]:
    """Different ones for titles that differ in nothing that an anchor can have."""
    given: list[str] = []
    for title in titles:
        anchor = slug(title)
        while anchor in given:
            anchor += "-"
        given.append(anchor)
    return given


def _section(title: str, anchor: str, body: str) -> str:
    return f'<section id="{anchor}"><h2><a href="#{anchor}">{escape(title)}</a></h2>{body}</section>\n'


def _group(group: Group) -> str:
    table = tables.workload(group)
    return f"<h3>{escape(table.title)}</h3>{_table(table)}"


def _table(table: Table) -> str:
    heads = "".join(
        f"<th{_class('number' if column.is_number else '')}>{escape(column.name)}</th>" for column in table.columns
    )
    lines = "\n".join(_line(line, table) for line in table.lines)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>\n{lines}</tbody></table></div>'


def _line(line: Line, table: Table) -> str:
    anchor = f' id="{escape(line.anchor)}"' if line.anchor else ""
    cells = "".join(
        f"<td{_class('number' if column.is_number else '', entry.mark)}>{escape(entry.text)}</td>"
        for column, entry in zip(table.columns, line.entries, strict=True)
    )
    below = (
        f'<tr class="below"><td colspan="{len(table.columns)}">{escape(line.below)}</td></tr>'
        if line.below
        else ""
    )
    return f"<tr{anchor}{_class('strong' if line.is_strong else '')}>{cells}</tr>{below}"


def _class(*names: str) -> str:
    some = " ".join(name for name in names if name)
    return f' class="{some}"' if some else ""


def _figure(picture: Picture) -> str:
    return f"<figure>{inline(picture)}<figcaption>{escape(picture.caption)}</figcaption></figure>"


def inline(picture: Picture) -> str:
    """The picture as a part of the page: its ids its own among all pictures, its colours those that the reader
    prefers, and nothing in it that names an address."""
    svg = picture.svg[picture.svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{picture.name}-', svg)
    svg = re.sub(r"""(url\(#|href="#)""", rf"\1{picture.name}-", svg)
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda colour: _variable(colour.group()), svg)
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    return f'{opening} role="img" aria-label="{escape(picture.title)}">{rest.strip()}'


def _variable(colour: str) -> str:
    name = _VARIABLES.get(colour)
    return f"var({name}, {colour})" if name else colour


def _colours() -> str:
    light = _LIGHT | {name: look.light for name, look in _NAMED.items()}
    dark = _DARK | {name: look.dark for name, look in _NAMED.items()}
    for look in LOOKS:
        light[_VARIABLES[look.light][2:]], dark[_VARIABLES[look.light][2:]] = look.light, look.dark
    return (
        f":root {{ color-scheme: light dark; {_declared(light)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {_declared(dark)} }} }}"
    )


def _declared(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())
