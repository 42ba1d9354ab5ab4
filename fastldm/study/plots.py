"""The plots of a study, each as PNG and SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastldm.storage import atomic_file

_STYLES = {"none": ("black", "-", "o"), "kl": ("C0", "-", "o"), "vq": ("C1", "--", "s")}
_SHADES = {1: 1.0, 2: 1.0, 4: 0.65, 8: 0.4, 16: 0.3, 32: 0.2}
_DPI = 110
_LABEL = 14
"""Height of a line with a cell's name, in pixels."""


def draw_plots(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw all plots that there are figures for; gives the PNG files."""
    import matplotlib

    # SVG text stays text, and its ids do not change from run to run.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastldm"}):
        drawn = [
            _draw(folder / "study_samples", _samples, results),
            _draw(folder / "study_rate_distortion", _rate_distortion, results),
        ]
        if any("psnr" in cell["first_stage"] for cell in results["cells"]):
            drawn.insert(0, _draw(folder / "study_reconstruction", _reconstruction, results))
    return [*drawn, _stack_pictures(results, folder)]


def _draw(stem: Path, plot: Any, results: dict[str, Any]) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    plot(figure, results)
    for suffix, metadata in ((".svg", {"Date": None}), (".png", {})):
        with atomic_file(stem.with_suffix(suffix)) as temporary:
            figure.savefig(temporary, format=suffix[1:], dpi=_DPI, metadata=metadata)
    return stem.with_suffix(".png")


def _reconstruction(figure: Any, results: dict[str, Any]) -> None:
    """PSNR, SSIM and LPIPS against f: KL, VQ and principal components."""
    stages = [cell for cell in results["cells"] if "psnr" in cell["first_stage"]]
    labels = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS (lower is better)"}
    names = [name for name in labels if name in stages[0]["first_stage"]]
    figure.set_size_inches(3.6 * len(names), 3.2)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for kind in ("kl", "vq"):
            points = [
                (cell["f"], cell["first_stage"][name])
                for cell in stages
                if cell["regularization"] == kind
            ]
            if points:
                colour, line, marker = _STYLES[kind]
                axes.plot(*zip(*points, strict=True), line, color=colour, marker=marker,
                          label=kind.upper())  # fmt: skip
        points = [(entry["f"], entry[name]) for entry in results["pca"]]
        axes.plot(*zip(*points, strict=True), ":", color="0.4", marker="^", label="PCA")
        factors = sorted({entry["f"] for entry in results["pca"]})
        axes.set_xscale("log", base=2)
        axes.set_xticks(factors, [str(f) for f in factors])
        axes.set(xlabel="downsampling factor f", ylabel=labels[name])
        axes.grid(alpha=0.3)
    figure.axes[0].legend()


def _samples(figure: Any, results: dict[str, Any]) -> None:
    """Distance of samples against the cost of training, and of drawing one."""
    from matplotlib.ticker import LogFormatter

    figure.set_size_inches(9.2, 3.8)
    training, sampling = figure.subplots(1, 2, sharey=True)
    for cell in results["cells"]:
        style = _style(cell)
        costs = [cell["first_stage"]["tflop"] + point["tflop"] for point in cell["curve"]]
        distances = [point["distance"] for point in cell["curve"]]
        training.plot(costs, distances, label=cell["name"], **style)
        gflop = 1000 * cell["sampling_tflop"]
        sampling.plot([gflop], distances[-1:], label=cell["name"], **style)
        sampling.annotate(cell["name"], (gflop, distances[-1]), textcoords="offset points",
                          xytext=(5, 5), fontsize=8, annotation_clip=False)  # fmt: skip
    for axes in (training, sampling):
        axes.axhline(results["held_out_distance"], color="0.5", linestyle=":", linewidth=1)
        axes.set(xscale="log", yscale="log")
        axes.margins(x=0.12)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.6)))
        axes.grid(alpha=0.3, which="both")
    training.set(xlabel="training cost, both stages, TFLOP", ylabel=results["distance"])
    sampling.set(xlabel="cost of one sample, GFLOP")
    training.legend(fontsize=8)


def _rate_distortion(figure: Any, results: dict[str, Any]) -> None:
    """RMSE in grey levels against bits a dimension of the image."""
    figure.set_size_inches(5.4, 3.8)
    axes = figure.subplots()
    for cell in results["cells"]:
        curve = cell["rate_distortion"]
        style = _style(cell) | {"marker": ""}
        axes.plot(curve["rate"], curve["distortion"], label=cell["name"], **style)
    axes.set(xlabel="rate, bits/dim of the image", ylabel="distortion, RMSE of 0…255")
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _stack_pictures(results: dict[str, Any], folder: Path) -> Path:
    """The samples of every cell below each other, each with its name; a PNG alone."""
    from PIL import Image, ImageDraw

    names = [cell["name"] for cell in results["cells"]]
    grids = [Image.open(folder / "cells" / name / "samples.png") for name in names]
    size = max(grid.width for grid in grids), sum(grid.height + _LABEL for grid in grids)
    stacked = Image.new("RGB", size, "white")
    draw, top = ImageDraw.Draw(stacked), 0
    for name, grid in zip(names, grids, strict=True):
        draw.text((4, top + 1), name, fill="black")
        stacked.paste(grid, (0, top + _LABEL))
        top += grid.height + _LABEL
    path = folder / "study_pictures.png"
    with atomic_file(path) as temporary:
        stacked.save(temporary, format="PNG")
    return path


def _style(cell: dict[str, Any]) -> dict[str, Any]:
    colour, line, marker = _STYLES[cell["regularization"]]
    return {
        "color": colour, "linestyle": line, "marker": marker, "alpha": _SHADES[cell["f"]],
        "markersize": 4,
    }  # fmt: skip
