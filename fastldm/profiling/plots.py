"""The figures of a profile."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastldm.profiling.families import FAMILIES
from fastldm.profiling.tables import measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind tell apart.
_COLOURS = {"kl": "#0072B2", "vq": "#D55E00", "none": "#000000"}
_LABELS = {"kl": "KL", "vq": "VQ", "none": "pixels"}
_MARKERS = {"kl": "o", "vq": "s", "none": "*"}
# Hollow and larger, so that one series shows what is behind it.
_SIZES = {"kl": 4, "vq": 8, "none": 8}
_FAMILY_COLOURS = {
    "convolution": "#0072B2",
    "attention": "#E69F00",
    "norm": "#009E73",
    "update": "#CC79A7",
    "lookup": "#D55E00",
    "other": "#BBBBBB",
}
_WIDTH = 4.8
"""Inches: a column of a page, and as wide as a phone with text that can be read."""
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E0E0E0",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "fastldm",
}

TITLES = {
    "costs": "What an image costs",
    "throughput": "Images a second",
    "families": "Where the time of a denoising step goes",
    "roofline": "How near to the device's roofs",
}
"""What each plot shows."""


def draw(name: str, report: dict[str, Any]) -> Figure | None:
    """One of `PLOTS`; None where nothing of it was measured.

    Args:
        name: of the plot.
        report: from `fastldm.profiling.runner.Profile`.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 3.6), layout="constrained")
        drawn = PLOTS[name](figure, report)
        if drawn:
            figure.suptitle(TITLES[name], fontsize=11, fontweight="bold")
        return figure if drawn else None


def _series(report: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The cells of each regularisation, by f; pixels begin each line."""
    cells = sorted(report["cells"], key=lambda cell: cell["f"])
    pixels = [cell for cell in cells if cell["f"] == 1]
    kinds = dict.fromkeys(cell["regularization"] for cell in cells if cell["f"] > 1)
    found = [
        (kind, pixels + [cell for cell in cells if cell["regularization"] == kind])
        for kind in kinds
    ]
    return found or [("none", pixels)]


def _by_f(axes: Axes, report: dict[str, Any], y: str) -> None:
    """A logarithmic axis with one tick for each f."""
    factors = sorted({cell["f"] for cell in report["cells"]})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(factors, [str(f) for f in factors])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlabel("downsampling factor f (1: pixels)")
    axes.set_ylabel(y)


def _line(
    axes: Axes, cells: list[dict[str, Any]], values: list[float | None], kind: str, **style: Any
) -> None:
    points = [
        (cell["f"], value) for cell, value in zip(cells, values, strict=True) if value is not None
    ]
    if points:
        axes.plot(
            *zip(*points, strict=True),
            marker=_MARKERS[kind],
            color=_COLOURS[kind],
            markersize=_SIZES[kind],
            fillstyle="none" if kind == "vq" else "full",
            **style,
        )


def _draw_costs(figure: Figure, report: dict[str, Any]) -> bool:
    figure.set_size_inches(_WIDTH, 6.4)
    sampling, training = figure.subplots(2)
    for kind, cells in _series(report):
        label = _LABELS[kind]
        samples = [cell["cost"]["sample"]["flops"] / 1e12 for cell in cells]
        cached = [cell["cost"]["train_from_cache"]["flops"] / 1e9 for cell in cells]
        encoded = [cell["cost"]["train_from_image"]["flops"] / 1e9 for cell in cells]
        _line(sampling, cells, samples, kind, label=label)
        _line(training, cells, cached, kind, label=f"{label}, from a latent cache")
        _line(training, cells, encoded, kind, linestyle=":", label=f"{label}, encoding")
    _by_f(sampling, report, f"TFLOP an image ({report['settings']['steps']} steps)")
    _by_f(training, report, "GFLOP a training image")
    sampling.legend(fontsize=8)
    training.legend(fontsize=8)
    return True


def _draw_throughput(figure: Figure, report: dict[str, Any]) -> bool:
    figure.set_size_inches(_WIDTH, 6.4)
    axes = figure.subplots(2)
    found = False
    for panel, task in zip(axes, ("sample", "train"), strict=True):
        for kind, cells in _series(report):
            for batch, style in (("batch_1", "-"), ("largest", "--")):
                rates = [
                    reached["images_per_second"] if reached else None
                    for reached in (measured(cell, task, batch) for cell in cells)
                ]
                found = found or any(rates)
                label = f"{_LABELS[kind]}, {'batch 1' if batch == 'batch_1' else 'largest batch'}"
                _line(panel, cells, rates, kind, linestyle=style, label=label)
        what = "images sampled" if task == "sample" else "training images"
        _by_f(panel, report, f"{what} a second")
        if found:
            panel.legend(fontsize=8)
    return found


def _draw_families(figure: Figure, report: dict[str, Any]) -> bool:
    cells = [cell for cell in report["cells"] if cell["measured"].get("sample", {}).get("families")]
    if not cells:
        return False
    figure.set_size_inches(_WIDTH, 1.6 + 0.42 * len(cells))
    axes = figure.subplots()
    height, labels = 0.38, []
    for place, cell in enumerate(cells):
        families = cell["measured"]["sample"]["families"]
        slowest = max(entry["seconds"] for entry in families.values())
        for offset, backend in ((-0.2, "eager"), (0.2, "fused")):
            start = 0.0
            for family in FAMILIES:
                share = families[backend]["seconds_by_family"][family] / slowest
                axes.barh(place + offset, share, height, start, color=_FAMILY_COLOURS[family])
                start += share
        labels.append(cell["name"])
    axes.set_yticks(range(len(cells)), labels)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("above plain torch, below fastldm; the slower is 1", fontsize=9)
    handles = [_patch(_FAMILY_COLOURS[family]) for family in FAMILIES]
    figure.legend(handles, FAMILIES, ncols=3, fontsize=8, loc="outside lower center")
    return True


def _patch(colour: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour)


def _point(kind: str) -> dict[str, Any]:
    return {
        "marker": _MARKERS[kind],
        "color": _COLOURS[kind],
        "linestyle": "none",
        "markersize": _SIZES[kind],
        "fillstyle": "none" if kind == "vq" else "full",
    }


def _draw_roofline(figure: Figure, report: dict[str, Any]) -> bool:
    roofs = report["roofs"]
    cells = [cell for cell in report["cells"] if measured(cell, "sample", "batch_1")]
    if not roofs or not cells:
        return False
    axes = figure.subplots()
    xs = []
    for cell in cells:
        reached = measured(cell, "sample", "batch_1")
        assert reached is not None
        x, y = cell["cost"]["step"]["intensity"], reached["flops_per_second"] / 1e9
        kind = cell["regularization"]
        axes.plot(x, y, **_point(kind))
        if kind != "vq":
            axes.annotate(
                f"f={cell['f']}", (x, y), textcoords="offset points", xytext=(6, 4), fontsize=8
            )
        xs.append(x)
    rate, bandwidth = roofs["flops_per_second"] / 1e9, roofs["bytes_per_second"] / 1e9
    ridge = rate / bandwidth
    low, high = min([*xs, ridge]) / 2, max([*xs, ridge]) * 2
    axes.plot([low, ridge, high], [low * bandwidth, rate, rate], color="#555555", linewidth=1)
    axes.annotate(
        "matrix product", (high, rate), textcoords="offset points", xytext=(-4, 4), ha="right",
        fontsize=8, color="#555555",
    )  # fmt: skip
    axes.annotate(
        "copy", (low, low * bandwidth), textcoords="offset points", xytext=(4, 10), fontsize=8,
        color="#555555",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs a byte moved by the operators of a denoising step")
    axes.set_ylabel("GFLOP/s at batch 1")
    kinds = dict.fromkeys(cell["regularization"] for cell in cells)
    for kind in kinds:
        axes.plot([], [], label=_LABELS[kind], **_point(kind))
    axes.legend(fontsize=8, loc="lower right")
    return True


PLOTS: dict[str, Callable[[Figure, dict[str, Any]], bool]] = {
    "costs": _draw_costs,
    "throughput": _draw_throughput,
    "families": _draw_families,
    "roofline": _draw_roofline,
}
