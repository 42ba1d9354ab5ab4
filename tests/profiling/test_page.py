"""The page: whole in one file, and shown without an error by a browser as wide as a phone."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastldm.profiling.plots import PLOTS

Profiled = tuple[dict[str, Any], Path]
_PHONE = 390
_MEASURES = """<script>
const wide = [...document.querySelectorAll("body > *")].filter(
  e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName);
const drawn = [...document.querySelectorAll("figure svg")].map(
  e => Math.round(e.getBoundingClientRect().width));
const ids = [...document.querySelectorAll("[id]")].map(e => e.id);
document.title = JSON.stringify({
  width: innerWidth, scroll: document.documentElement.scrollWidth, wide, drawn,
  repeated: ids.length - new Set(ids).size,
  font: parseFloat(getComputedStyle(document.querySelector("td")).fontSize)});
</script>"""


@pytest.fixture
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("chromium is not installed")
    return found


def test_the_page_needs_nothing_but_itself(profiled: Profiled) -> None:
    report, folder = profiled
    page = (folder / "index.html").read_text()
    assert page.count("<svg") == len(PLOTS)
    assert 'name="viewport"' in page
    assert "<script" not in page
    for address in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert address.startswith(("#", "data:")), address
    assert not re.search(r"url\((?!#)", page)
    for cell in report["cells"]:
        assert cell["name"] in page
    assert "quoted, one NVIDIA A100" in page


def test_a_browser_as_wide_as_a_phone_shows_it(
    profiled: Profiled, chromium: str, tmp_path: Path
) -> None:
    import json

    page = (profiled[1] / "index.html").read_text()
    measured = tmp_path / "page.html"
    frame = tmp_path / "frame.html"
    measured.write_text(page.replace("</body>", _MEASURES + "</body>"))
    # A window is never as narrow as a phone, a frame in it is.
    frame.write_text(
        f'<!DOCTYPE html><title>frame</title><iframe src="page.html" width="{_PHONE}" height="3000"'
        ' style="border:0" onload="document.title = this.contentDocument.title"></iframe>'
    )
    dom, log = _browse(chromium, tmp_path, "--dump-dom", frame)
    assert "CONSOLE" not in log, log
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title is not None
    found = json.loads(title[1])
    assert found["width"] == _PHONE
    assert found["scroll"] <= _PHONE
    assert found["wide"] == []
    assert found["repeated"] == 0
    assert len(found["drawn"]) == len(PLOTS)
    assert min(found["drawn"]) > 0.85 * _PHONE
    assert found["font"] >= 12
    picture = tmp_path / "page.png"
    _browse(chromium, tmp_path, f"--screenshot={picture}", frame)
    with Image.open(picture) as image:
        # Text and plots: many colours in it, and not on one line.
        assert len(image.convert("RGB").getcolors(2**20)) > 50


def _browse(chromium: str, folder: Path, what: str, page: Path) -> tuple[str, str]:
    """What the browser prints, and its log with the page's console."""
    result = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--allow-file-access-from-files", "--enable-logging=stderr",
            f"--user-data-dir={folder / 'browser'}", "--window-size=600,3000",
            "--virtual-time-budget=2000", what, page.as_uri(),
        ],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    return result.stdout, result.stderr
