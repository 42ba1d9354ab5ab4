"""A profile as files: JSON, CSV, text, plots and a page."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from fastldm.profiling.page import html_page
from fastldm.profiling.plots import PLOTS, draw
from fastldm.profiling.tables import comparison_table, main_table, notes, rows
from fastldm.storage import atomic_file, write_json


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write ``profile.json``, ``.csv``, ``.txt``, each plot as PNG and SVG, and ``index.html``."""
    write_json(folder / "profile.json", report)
    _write(folder / "profile.csv", _csv(report))
    _write(folder / "profile.txt", text(report))
    drawings = {}
    for name in PLOTS:
        figure = draw(name, report)
        if figure is None:
            continue
        for kind in ("png", "svg"):
            with atomic_file(folder / f"{name}.{kind}") as temporary:
                figure.savefig(temporary, format=kind, dpi=200)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg")
        drawings[name] = buffer.getvalue()
    _write(folder / "index.html", html_page(report, drawings))


def text(report: dict[str, Any]) -> str:
    """The tables and what is to be said about them, for a terminal."""
    parts = [_aligned(main_table(report)), _aligned(comparison_table(report)), *notes(report)]
    return "\n\n".join(parts) + "\n"


def _csv(report: dict[str, Any]) -> str:
    flat = rows(report)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return buffer.getvalue()


def _aligned(table: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if not index else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _write(path: Path, content: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(content, encoding="utf-8")
