"""The table at the end, made of nothing but what is stored: what was run, targets, figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import records
from benchmarks.gpu.contest import COPY, OURS
from benchmarks.gpu.records import DONE, Record, Row
from benchmarks.gpu.stages import STAGES
from benchmarks.gpu.stages.cross_attention import SDPA
from benchmarks.gpu.stages.vector_quantize import CDIST


@dataclass(frozen=True)
class Target:
    """What the median with a cold L2 cache has to be: that of a peer over ours."""

    stage: str
    text: str
    peer: str
    least: float


TARGETS = (
    Target(
        "group_norm_silu",
        "GroupNorm + SiLU: ≥ 85 % of the bandwidth of a copy of as many bytes, at VAE sizes in "
        "channels_last, C = 128…2560, forward and backward",
        COPY,
        0.85,
    ),
    Target(
        "diffusion_step",
        "sampling step: ≥ 85 % of the bandwidth of a copy of as many bytes, from 32 MiB on",
        COPY,
        0.85,
    ),
    Target("cross_attention", "cross-attention: ≥ 1.3× SDPA at 77 keys, forward", SDPA, 1.3),
    Target("vector_quantize", "codebook lookup: ≥ 10× cdist + argmin", CDIST, 10.0),
)
_CONTESTS = (*(target.stage for target in TARGETS), "geglu")
_COPY_ROOF = 2**30
"""Bytes of the smallest copy that counts as the roof."""


def page(folder: Path) -> str:
    """Markdown, of the records in `folder`."""
    found = {stage.name: records.read(folder, stage.name) for stage in STAGES}
    present = {name: record for name, record in found.items() if record is not None}
    parts = [
        ["# Measured on a GPU" if _all_on_gpu(present) else "# Dry run: no GPU was measured"],
        list(_stamps(present)),
        list(_targets(present)),
        list(_stages(found)),
        list(_roofs(present.get("roofs"))),
        *(list(_contest(present[name], present.get("roofs"))) for name in _CONTESTS
          if name in present),
        list(_models(present.get("models"))),
        list(_throughput(present.get("throughput"))),
    ]  # fmt: skip
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _all_on_gpu(present: dict[str, Record]) -> bool:
    stamps = [record.stamp for record in present.values() if "on" in record.stamp]
    return bool(stamps) and all(stamp["on"] == "cuda" for stamp in stamps)


def _stamps(present: dict[str, Record]) -> Iterator[str]:
    """Where the results come from; more than one line where they differ."""
    keys = ("device", "driver", "torch", "triton", "cuda", "commit", "sources")
    seen: dict[tuple[Any, ...], list[str]] = {}
    for name, record in present.items():
        if "on" in record.stamp:
            seen.setdefault(tuple(record.stamp[key] for key in keys), []).append(name)
    for values, names in seen.items():
        text = ", ".join(f"{k} {v}" for k, v in zip(keys, values, strict=True) if v is not None)
        yield f"- {text}" + (f" ({', '.join(names)})" if len(seen) > 1 else "")


def _targets(present: dict[str, Record]) -> Iterator[str]:
    yield "## Targets"
    yield ""
    yield "| target | verdict | cases that meet it | worst |"
    yield "| --- | --- | --- | --- |"
    for target in TARGETS:
        yield f"| {target.text} | {' | '.join(verdict(target, present.get(target.stage)))} |"


def verdict(target: Target, record: Record | None) -> tuple[str, str, str]:
    """Met, not met or not run; how many cases meet it; and the worst one.

    A case whose result was wrong is one that does not meet it. A stage that did not come to its end
    can show that a target is not met, not that it is.
    """
    if record is None or record.stamp.get("on") != "cuda":
        return "not run", "", ""
    rows = [row for row in record.rows if row.get("is_target")]
    ratios = [(_over(row, target.peer), row["case"]) for row in rows]
    measured = [(ratio, case) for ratio, case in ratios if ratio is not None]
    good = sum(ratio >= target.least for ratio, _ in measured)
    count = f"{good} of {len(rows)}"
    worst = f"{min(measured)[0]:.2f} at {min(measured)[1]}" if measured else ""
    if any(row.get("problem") for row in rows) or good < len(measured):
        return "**not met**", count, worst
    if record.state != DONE or len(measured) < len(rows) or not rows:
        return f"not run to its end ({record.state})", count, worst
    return "met", count, worst


def _over(row: Row, peer: str, which: str = "cold_us") -> float | None:
    """A peer's time over ours."""
    times = row.get(which, {})
    return times[peer] / times[OURS] if peer in times and OURS in times else None


def _stages(found: dict[str, Record | None]) -> Iterator[str]:
    yield "## Stages"
    yield ""
    yield "| stage | state | seconds | date | problems | not done |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, record in found.items():
        if record is None:
            yield f"| {name} | not run | | | | |"
            continue
        problems = "; ".join(_cell(text) for text in record.problems)
        skipped = sorted({_cell(row["skipped"]) for row in record.rows if row.get("skipped")})
        if record.state == records.SKIPPED:
            skipped = [_cell(record.reason)]
        yield (
            f"| {name} | {record.state} | {record.seconds:.1f} | {record.stamp.get('date')} | "
            f"{problems} | {'; '.join(skipped)} |"
        )


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _roofs(record: Record | None) -> Iterator[str]:
    if record is None or not record.rows:
        return
    yield "## What the device can do"
    yield ""
    for row in record.rows:
        if row["what"] == "copy":
            rate = f"{row['bytes_per_second'] / 1e9:.1f} GB/s read and written"
            yield f"- copy that moves {row['bytes'] / 1e6:.4g} MB: {rate}"
        else:
            rate = f"{row['flops_per_second'] / 1e12:.4g} TFLOP/s"
            yield f"- matrix product {row['side']}³, {row['dtype']}: {rate}"


def copy_roof(record: Record | None) -> float | None:
    """Bytes per second of the largest copy."""
    rows = [row for row in record.rows if row["what"] == "copy"] if record else []
    rows = [row for row in rows if row["bytes"] >= _COPY_ROOF]
    return max((row["bytes_per_second"] for row in rows), default=None)


def matrix_roof(record: Record | None, dtype: str | None) -> float | None:
    """Operations per second of the matrix product in `dtype`."""
    rows = [row for row in record.rows if row["what"] == "matrix product"] if record else []
    return next((row["flops_per_second"] for row in rows if row["dtype"] == dtype), None)


def _contest(record: Record, roofs: Record | None) -> Iterator[str]:
    """Medians in µs with a cold L2 (with a warm one beside), and ours as shares and ratios."""
    rows = [row for row in record.rows if row.get("cold_us")]
    if not rows:
        return
    peers = list(dict.fromkeys(name for row in rows for name in row["cold_us"]))
    yield f"## {record.stage}"
    yield ""
    yield (
        "µs with a cold L2 cache (with a warm one in brackets; † without a CUDA graph), each "
        "peer's time over ours with a cold one, and of ours the share of the bandwidth of a large "
        "copy or, where that is the floor, of the matrix rate."
    )
    yield ""
    yield f"| case | {' | '.join(peers)} | {' | '.join(f'{p} / ours' for p in peers[1:])} | roof |"
    yield "|" + " --- |" * (2 * len(peers) + 1)
    for row in rows:
        cells = [_times(row, peer) for peer in peers]
        ratios = [_ratio(_over(row, peer)) for peer in peers[1:]]
        yield f"| {' | '.join([row['case'], *cells, *ratios, _roof_share(row, roofs)])} |"
    left_out = {
        f"- {peer}: {_cell(reason)}" for row in rows for peer, reason in row["left_out"].items()
    }
    if left_out:
        yield ""
        yield "Not measured, at some sizes:"
        yield ""
        yield from sorted(left_out)


def _times(row: Row, peer: str) -> str:
    if peer not in row["cold_us"]:
        return "–"
    mark = "" if row["how"][peer] == "graph" else "†"
    return f"{row['cold_us'][peer]:.2f} ({row['warm_us'][peer]:.2f}){mark}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _roof_share(row: Row, roofs: Record | None) -> str:
    """The least time that the device allows over ours."""
    if OURS not in row["cold_us"]:
        return "–"
    bandwidth, rate = copy_roof(roofs), matrix_roof(roofs, row["rate"])
    floors = [row["bytes"] / bandwidth] if bandwidth else []
    floors += [row["flops"] / rate] if rate else []
    return f"{max(floors) / (row['cold_us'][OURS] * 1e-6):.2f}" if floors else "–"


def _models(record: Record | None) -> Iterator[str]:
    if record is None or not record.rows:
        return
    families = _ordered(record.rows)
    yield "## Models"
    yield ""
    yield "Milliseconds a call, and microseconds by what is computed."
    yield ""
    yield f"| model | layout | backend | ms | {' | '.join(families)} |"
    yield "|" + " --- |" * (4 + len(families))
    for row in record.rows:
        mark = "" if row["how"] == "graph" else "†"
        cells = [f"{row['families_us'].get(name, 0):.1f}" for name in families]
        first = [row["what"], row["layout"], row["backend"], f"{row['ms']:.3f}{mark}"]
        yield f"| {' | '.join([*first, *cells])} |"


def _ordered(rows: Sequence[Row]) -> list[str]:
    """Families, the one that takes most first."""
    totals: dict[str, float] = {}
    for row in rows:
        for name, value in row["families_us"].items():
            totals[name] = totals.get(name, 0.0) + value
    return sorted(totals, key=lambda name: -totals[name])


def _throughput(record: Record | None) -> Iterator[str]:
    rows = [row for row in record.rows if "images_per_second" in row] if record else []
    if not rows:
        return
    yield "## Throughput for each f"
    yield ""
    yield (
        "Images a second, and how many times as many as at f = 1: at batch 1, or each at the "
        "paper's batch. † without a CUDA graph."
    )
    yield ""
    yield "| | model | images | batch | backend | dtype | step, ms | images/s | over f = 1 | GiB |"
    yield "|" + " --- |" * 10
    for row in sorted(rows, key=lambda row: (row["what"], row["f"], row["batch"])):
        mark = "" if row["how"] == "graph" else "†"
        cells = [
            row["what"], row["model"], f"{row['image_size']}²", row["batch"], row["backend"],
            row["dtype"], f"{row['step_ms']:.2f}{mark}", f"{row['images_per_second']:.4g}",
            _ratio(_over_pixels(row, rows)), f"{row['peak_bytes'] / 2**30:.2f}",
        ]  # fmt: skip
        yield f"| {' | '.join(map(str, cells))} |"


def _over_pixels(row: Row, rows: Sequence[Row]) -> float | None:
    """Images a second over those of f = 1, at batch 1 or at the paper's batches."""
    for other in rows:
        same = all(row[key] == other[key] for key in ("what", "backend", "image_size"))
        if same and other["f"] == 1 and (row["batch"] == 1) == (other["batch"] == 1):
            ratio: float = row["images_per_second"] / other["images_per_second"]
            return ratio
    return None
