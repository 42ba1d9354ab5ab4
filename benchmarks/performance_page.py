"""Writes docs/performance.md from benchmarks/results: ``python -m benchmarks.performance_page``.

A folder under benchmarks/results is a device. In it are files as ``pytest benchmarks --results``
writes them, and in its folder gpu/ the records of ``python -m benchmarks.gpu``. The page holds no
figure that is not in a file, and says of each file on what, with what and when it was measured.
``--check`` only compares.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contestants import FASTLDM_COMPILED
from benchmarks.gpu import records, report
from benchmarks.gpu.contest import OURS
from benchmarks.gpu.records import ROOT
from benchmarks.gpu.stages import NAMES

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
GPU = "gpu"
"""Folder of the records of ``python -m benchmarks.gpu``, in that of their device."""

MOST_DISTURBANCE = 0.1
"""Share of the processors that other programs may have had; what had more is not shown."""
_YARDSTICKS = ("copy", "clone")
"""What these do is no norm, no sampling step."""

Content = dict[str, Any]
Contestants = Mapping[str, Mapping[str, float]]


def main(arguments: Sequence[str] | None = None) -> int:
    """1 where ``--check`` finds another page than the files would make."""
    parser = argparse.ArgumentParser(prog="benchmarks.performance_page", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    options = parser.parse_args(arguments)
    made = page(RESULTS)
    if not options.check:
        PAGE.write_text(made, encoding="utf-8")
        return 0
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != made:
        print(f"{PAGE} is not what benchmarks/results makes of it", file=sys.stderr)
        return 1
    return 0


def page(folder: Path) -> str:
    """Markdown of all devices in `folder`.

    Raises:
        ValueError: a file is neither of the two kinds, or is of a dry run.
    """
    devices = sorted(path for path in folder.iterdir() if path.is_dir())
    parts = [
        "# Performance",
        "Made by `python -m benchmarks.performance_page` from the files under "
        "[benchmarks/results](../benchmarks/results), which `pytest benchmarks --results FILE` and "
        "`python -m benchmarks.gpu` write. Times are medians of contestants that had their turns "
        "one after another, each after its result was checked; in brackets how many times as long "
        "as the first one took. Only figures from one file were measured together. On a CPU the "
        "process keeps the memory that it frees; with glibc's settings each new tensor of more "
        "than 32 MB costs its pages again, in every contestant.",
    ]
    for device in devices:
        parts += list(_device(device))
    if not any((device / GPU).is_dir() for device in devices):
        parts += ["## GPU", "No GPU has been measured: there is no result file of one."]
    return "\n\n".join(parts) + "\n"


def _device(folder: Path) -> Iterator[str]:
    contents = {path.name: _read(path) for path in sorted(folder.glob("*.json"))}
    names = {content["stamp"]["device"] for content in contents.values()}
    if contents:
        yield f"## {', '.join(sorted(names))}"
        yield from _summary(contents)
        yield from _lost(contents)
    for name, content in contents.items():
        yield f"### {name.removesuffix('.json')}"
        yield f"`{folder.name}/{name}`: {_stamp(content['stamp'])}."
        disturbed = len(content["disturbance"].keys() - content["benchmarks"].keys())
        if disturbed:
            yield (
                f"Left out: {disturbed} during which other programs had more than "
                f"{MOST_DISTURBANCE:.0%} of the processors."
            )
        for function, tests in _by_function(content["benchmarks"]).items():
            yield f"**{function}**"
            yield from _tables(tests)
            yield from _spreads(
                {size: content["ratios"].get(node, {}) for size, (node, _) in tests.items()}
            )
    if (folder / GPU).is_dir():
        yield _gpu(folder / GPU)


def _read(path: Path) -> Content:
    content: Content = json.loads(path.read_text(encoding="utf-8"))
    if not {"stamp", "benchmarks", "ratios", "disturbance"} <= content.keys():
        raise ValueError(f"{path}: no file of `pytest benchmarks --results`")
    for test, share in content["disturbance"].items():
        if share > MOST_DISTURBANCE:
            del content["benchmarks"][test]
    return content


def _stamp(stamp: Mapping[str, Any]) -> str:
    """All that a figure depends on, but the device, which is the heading."""
    given = {key: value for key, value in stamp.items() if key != "device" and value is not None}
    return ", ".join(f"{key} {value}" for key, value in given.items())


def _by_function(benchmarks: Mapping[str, Contestants]) -> dict[str, Any]:
    """Function → size → name of the test and its contestants."""
    found: dict[str, Any] = {}
    for node, contestants in benchmarks.items():
        test, _, size = node.rpartition("/")[2].partition("[")
        function = test.removeprefix("test_").replace(".py::test_", ": ").replace("_", " ")
        found.setdefault(function, {})[size.removesuffix("]")] = (node, contestants)
    return found


def _tables(tests: Mapping[str, tuple[str, Contestants]]) -> Iterator[str]:
    """One for each set of contestants."""
    tables: dict[tuple[str, ...], list[str]] = {}
    for size, (_, contestants) in tests.items():
        first = next(iter(contestants.values()))["median"]
        cells = [
            _time(found["median"]) + (f" ({found['median'] / first:.2f})" if place else "")
            for place, found in enumerate(contestants.values())
        ]
        memory = " / ".join(f"{found['peak_bytes'] / 2**20:.3g}" for found in contestants.values())
        row = f"| {' | '.join([size, *cells, memory])} |"
        tables.setdefault(tuple(contestants), []).append(row)
    for names, rows in tables.items():
        head = f"| | {' | '.join(names)} | peak memory of each, MiB |"
        yield "\n".join([head, "|" + " --- |" * (len(names) + 2), *rows])


def _time(microseconds: float) -> str:
    if microseconds < 1e3:
        return f"{microseconds:.1f} µs"
    return f"{microseconds / 1e3:.2f} ms" if microseconds < 1e6 else f"{microseconds / 1e6:.2f} s"


def _spreads(ratios: Mapping[str, Mapping[str, Sequence[float]]]) -> Iterator[str]:
    """Of the ratios, where there were several runs."""
    lines = []
    for size, contestants in ratios.items():
        first = next(iter(contestants), None)
        for name, found in contestants.items():
            if name != first:
                lines.append(
                    f"- {size}: {name} takes {statistics.median(found):.2f} times as long as "
                    f"{first} ({min(found):.2f} to {max(found):.2f} in {len(found)} runs)"
                )
    if lines:
        yield "\n".join(lines)


def _summary(contents: Mapping[str, Content]) -> Iterator[str]:
    """How many times as long as ours another takes, over all sizes of a function."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for content in contents.values():
        for function, tests in _by_function(content["benchmarks"]).items():
            for _, contestants in tests.values():
                for name, ratio in _against_ours(contestants):
                    ratios.setdefault(function, {}).setdefault(name, []).append(ratio)
    rows = []
    for function, of_function in ratios.items():
        found = [f"{name} {_mean_and_range(of_name)}" for name, of_name in of_function.items()]
        rows.append(f"| {function} | {', '.join(found)} |")
    if rows:
        yield "How many times as long as fastldm another takes: the geometric mean over all sizes."
        yield "\n".join(["| | |", "| --- | --- |", *rows])


def _mean_and_range(ratios: Sequence[float]) -> str:
    mean = f"{statistics.geometric_mean(ratios):.2f}"
    return f"{mean} ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else mean


def _lost(contents: Mapping[str, Content]) -> Iterator[str]:
    """Where another contestant was faster than ours."""
    lines, races = [], 0
    for content in contents.values():
        for function, tests in _by_function(content["benchmarks"]).items():
            for size, (_, contestants) in tests.items():
                races += next(iter(contestants)).startswith(OURS)
                lines += [
                    f"- {function}, {size}: {name} takes {ratio:.2f} of our time"
                    for name, ratio in _against_ours(contestants)
                    if ratio < 1
                ]
    if lines:
        yield "\n".join(["Here fastldm was slower than another:", "", *lines])
    elif races:
        yield f"In none of {races} races was another faster than fastldm."


def _against_ours(contestants: Contestants) -> Iterator[tuple[str, float]]:
    """Each that does the same work, with its median time over ours."""
    ours, *others = contestants
    if not ours.startswith(OURS):
        return
    for name in others:
        if name.startswith((OURS, *_YARDSTICKS)):
            continue
        time = contestants[name]["median"]
        yield name, time / contestants[ours]["median"]
        if FASTLDM_COMPILED in contestants:
            yield f"{name} (ours compiled, too)", time / contestants[FASTLDM_COMPILED]["median"]


def _gpu(folder: Path) -> str:
    """The table of ``python -m benchmarks.gpu``, one level lower."""
    for stage in NAMES:
        record = records.read(folder, stage)
        if record is not None and record.stamp.get("on") not in (None, "cuda"):
            raise ValueError(f"{folder / stage}.json: a dry run, not a measurement")
    lines = report.page(folder).rstrip("\n").split("\n")
    return "\n".join(f"#{line}" if line.startswith("#") else line for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())
