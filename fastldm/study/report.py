"""A study's figures as JSON, CSV and one Markdown page with the plots."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastldm.storage import atomic_file, write_json
from fastldm.study.plots import draw_plots


def write_report(results: dict[str, Any], folder: Path) -> Path:
    """Write ``study.json``, the CSV files, the plots and ``report.md``; gives the last.

    Args:
        results: the figures, from `fastldm.study.run.run_study`.
    """
    write_json(folder / "study.json", results)
    _write_csv(folder / "cells.csv", [_row(cell) for cell in results["cells"]])
    _write_csv(folder / "curves.csv", _curve_rows(results["cells"]))
    _write_csv(folder / "rate_distortion.csv", _rate_rows(results["cells"]))
    _write_csv(folder / "pca.csv", results["pca"])
    plots = draw_plots(results, folder)
    path = folder / "report.md"
    with atomic_file(path) as temporary:
        temporary.write_text("\n".join(_page(results, plots)) + "\n", encoding="utf-8")
    return path


def _row(cell: dict[str, Any]) -> dict[str, Any]:
    """The figures of one cell, one after the other."""
    costs, stage, last = cell["costs"], cell["first_stage"], cell["curve"][-1]
    bound = cell["rate_distortion"]
    return {
        "name": cell["name"],
        "f": cell["f"],
        "latent": "×".join(map(str, costs["latent_shape"])),
        "first_stage_parameters": costs["first_stage_parameters"],
        "unet_parameters": costs["unet_parameters"],
        "first_stage_steps": stage["steps"],
        "first_stage_tflop": stage["tflop"],
        "psnr": stage.get("psnr"),
        "ssim": stage.get("ssim"),
        "lpips": stage.get("lpips"),
        "codebook_usage": stage.get("codebook_usage"),
        "diffusion_steps": last["steps"],
        "diffusion_tflop": last["tflop"],
        "training_seconds": stage["seconds"] + last["seconds"],
        "distance": last["distance"],
        "sampling_tflop": cell["sampling_tflop"],
        "sampling_seconds": last["sampling_seconds_per_image"],
        "bits_per_dim": bound["bound"] if cell["f"] == 1 else None,
        "prior_bits": bound["prior"],
        "step_bits": bound["steps"],
        "decoder_bits": bound["decoder"],
    }


def _curve_rows(cells: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"name": cell["name"], "first_stage_tflop": cell["first_stage"]["tflop"], **point}
        for cell in cells
        for point in cell["curve"]
    ]


def _rate_rows(cells: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for cell in cells:
        curve = cell["rate_distortion"]
        columns = (curve["timesteps"], curve["rate"], curve["distortion"])
        for timestep, rate, distortion in zip(*columns, strict=True):
            rows.append(
                {"name": cell["name"], "timestep": timestep, "rate": rate, "rmse": distortion}
            )
    return rows


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        if rows:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def _page(results: dict[str, Any], plots: list[Path]) -> Iterable[str]:
    config, images, machine = results["config"], results["images"], results["machine"]
    budget = (
        f"{config['budget_tflop']:g} TFLOP of training"
        if config["budget_tflop"] is not None
        else f"{config['budget_minutes']:g} minutes of training"
    )
    yield "# Quality against cost"
    yield ""
    yield (
        f"{config['data']['source']} at {config['data']['resolution']}², {images['training']} "
        f"training images, {images['held_out']} held out. Each f had {budget}, of which the first "
        f"stage had {config['first_stage_share']:.0%} and the diffusion model the rest; `pixel` "
        f"(f = 1) had all of it for diffusion. Seed {config['seed']}. Machine: "
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}."
    )
    yield ""
    yield (
        f"Distance of samples: {results['distance']}, of {config['evaluation']['samples']} samples "
        f"({config['evaluation']['num_inference_steps']} steps of DDIM) to {images['reference']} "
        f"training images. Held-out images are at {_number(results['held_out_distance'])}. "
        f"{results['lpips']}."
    )
    if results["distance"] != "FID":
        yield ""
        yield "It is no FID and compares with no figure outside of this report."
    for plot in plots:
        yield ""
        yield f"![{plot.stem}]({plot.name})"
    yield ""
    yield "## Cells"
    yield ""
    rows = [_row(cell) for cell in results["cells"]]
    lpips = any(row["lpips"] is not None for row in rows)
    yield from _table(
        {
            "": "name",
            "latent": "latent",
            "parameters, first stage + UNet": lambda row: (
                f"{row['first_stage_parameters'] / 1e6:.2f}M + {row['unet_parameters'] / 1e6:.2f}M"
            ),
            "PSNR, dB": "psnr",
            "SSIM": "ssim",
            **({"LPIPS": "lpips"} if lpips else {}),
            "steps, first stage + diffusion": lambda row: (
                f"{row['first_stage_steps']} + {row['diffusion_steps']}"
            ),
            "TFLOP, first stage + diffusion": lambda row: (
                f"{_number(row['first_stage_tflop'])} + {_number(row['diffusion_tflop'])}"
            ),
            "training, s": "training_seconds",
            "distance": "distance",
            "a sample: GFLOP": lambda row: _number(row["sampling_tflop"] * 1e3),
            "a sample: ms": lambda row: _number(row["sampling_seconds"] * 1e3),
        },
        rows,
    )
    yield ""
    yield "## Principal components"
    yield ""
    yield "As many coefficients as an image's latents have numbers, fitted to the training images."
    yield ""
    columns = {"f": "f", "numbers": "numbers", "components": "components", "PSNR, dB": "psnr",
               "SSIM": "ssim", **({"LPIPS": "lpips"} if lpips else {})}  # fmt: skip
    yield from _table(columns, results["pca"])
    yield ""
    yield "## The variational bound"
    yield ""
    yield (
        "Bits a dimension of the pixels or latents, on held-out images. Only the sum of `pixel` is "
        "a bound on bits/dim of images; those of latents are of a density, change with the "
        "latents' scale and do not compare. The plot's rates are bits a dimension of the image for "
        "all."
    )
    yield ""
    yield from _table(
        {
            "": lambda cell: cell["name"],
            "L_T": lambda cell: _number(cell["rate_distortion"]["prior"]),
            "sum of L_{t−1}": lambda cell: _number(cell["rate_distortion"]["steps"]),
            "L_0": lambda cell: _number(cell["rate_distortion"]["decoder"]),
            "bound": lambda cell: _number(cell["rate_distortion"]["bound"]),
        },
        results["cells"],
    )


def _table(columns: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Iterable[str]:
    """Rows of a Markdown table; a column is a key or a function of the row."""
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        values = [
            column(row) if callable(column) else _number(row[column]) for column in columns.values()
        ]
        yield "| " + " | ".join(values) + " |"


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return (
        value if isinstance(value, str) else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    )
