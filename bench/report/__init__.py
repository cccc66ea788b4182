"""What a run has found, told to its reader: in the terminal, and as a page with pictures."""

from __future__ import annotations

from pathlib import Path

from bench.report.canvas import MADE_BY
from bench.report.files import remove_made, whole
from bench.report.page import page
from bench.report.pictures import pictures
from bench.report.terminal import show
from bench.results import Results

__all__ = ["show", "write"]


def write(results: Results, out: Path) -> Path:
    """Write the results, the pictures and the page into a folder.

    Pictures of an earlier run that are of nothing in this one go, so that all files there tell of one run.

    Returns:
        The page's path.
    """
    out.mkdir(parents=True, exist_ok=True)
    with whole(out / "results.json") as file:
        results.write(file)
    drawn = pictures(results)
    for picture in drawn:
        with whole(out / f"{picture.name}.svg") as file:
            file.write_text(picture.svg, encoding="utf-8")
        with whole(out / f"{picture.name}.png") as file:
            file.write_bytes(picture.png)
    remove_made(out, MADE_BY, {f"{picture.name}.{ending}" for picture in drawn for ending in ("svg", "png")})
    path = out / "report.html"
    with whole(path) as file:
        file.write_text(page(results, drawn), encoding="utf-8")
    return path
