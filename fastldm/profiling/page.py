"""A profile as one HTML page that needs nothing but itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from typing import Any

from fastldm.profiling import paper
from fastldm.profiling.plots import TITLES
from fastldm.profiling.tables import comparison_table, main_table, notes

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 60rem; margin: 0 auto; padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.15rem; margin-top: 2rem; }
figure { margin: 1rem 0; }
figure svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid #ddd; text-align: right;
  white-space: nowrap; }
th { border-bottom: 2px solid #888; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
"""
# Matplotlib names the same things in every drawing.
_ID = re.compile(r'\bid="([^"]+)"')


def html_page(report: dict[str, Any], drawings: Mapping[str, str]) -> str:
    """The page: tables, plots as inline SVG, and where each figure comes from.

    Args:
        report: from `fastldm.profiling.runner.Profile`.
        drawings: plot → SVG document.
    """
    figures = "\n".join(
        f'<figure aria-label="{escape(TITLES[name])}">{_inline(svg, name)}</figure>'
        for name, svg in drawings.items()
    )
    remarks = "\n".join(f"<p>{escape(note)}</p>" for note in notes(report))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>Diffusion on latents and pixels: what each f costs</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Diffusion on latents and pixels: what each f costs</h1>
{remarks}
{figures}
<h2>Counted and measured</h2>
<div class="scroll">{_table(main_table(report))}</div>
<h2>The paper's sampling throughput beside ours</h2>
<p>Quoted from Table 18 of {escape(paper.SOURCE)}, on {escape(paper.DEVICE)}. Ours is there where
the same model was measured at the same width and step count, on the device in its row.</p>
<div class="scroll">{_table(comparison_table(report))}</div>
</body>
</html>
"""


def _inline(svg: str, name: str) -> str:
    """The drawing without its prologue, its ids made unique on the page."""
    body = svg[svg.index("<svg") :]
    ids = set(_ID.findall(body))
    body = _ID.sub(rf'id="{name}-\1"', body)
    for reference in (r'(href=")#([^"]+)"', r"(url\()#([^)]+)\)"):
        end = '"' if "href" in reference else ")"
        body = re.sub(
            reference,
            lambda found, end=end: (
                f"{found[1]}#{name}-{found[2]}{end}" if found[2] in ids else found[0]
            ),
            body,
        )
    return body


def _table(table: list[list[str]]) -> str:
    head, *body = table
    header = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body
    )
    return f"<table><thead><tr>{header}</tr></thead><tbody>\n{lines}\n</tbody></table>"
