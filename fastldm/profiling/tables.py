"""The tables of a profile, as rows of text and as flat records."""

from __future__ import annotations

import statistics
from typing import Any

from fastldm.profiling import paper

NOTHING = "–"
_RATIOS = (
    ("sample", "sampling, decoding included"),
    ("train", "training from a latent cache"),
    ("train_from_image", "training with encoding"),
)


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """A flat record for each model: what the CSV holds, without units but those in the names."""
    found = []
    for cell in report["cells"]:
        cost, printed = cell["cost"], cell["paper"]
        record: dict[str, Any] = {
            "f": cell["f"],
            "regularization": cell["regularization"],
            "conditioning": cell["conditioning"],
            "image_size": cell["image_size"],
            "latent_shape": "x".join(map(str, cost["latent_shape"])),
            "parameters": cost["parameters"],
            "first_stage_parameters": cost["first_stage_parameters"],
            "paper_printed_parameters_millions": printed["printed_parameters_millions"],
            "paper_counted_parameters_millions": printed["counted_parameters_millions"],
        }
        for part in ("step", "step_eager", "encode", "decode", "sample", "train_from_cache",
                     "train_from_image"):  # fmt: skip
            for what in ("flops", "bytes", "intensity"):
                record[f"{part}_{what}"] = cost[part][what]
        for task in ("sample", "train"):
            for batch in ("batch_1", "largest"):
                reached = measured(cell, task, batch)
                for what in ("batch_size", "images_per_second", "images_per_second_from_images",
                             "images_per_second_eager", "peak_bytes", "flops_per_second",
                             "share_of_matrix_rate", "share_of_bandwidth"):  # fmt: skip
                    record[f"{task}_{batch}_{what}"] = (reached or {}).get(what)
        record["device"] = report["stamp"]["device"]
        found.append(record)
    return found


def measured(cell: dict[str, Any], task: str, batch: str) -> dict[str, Any] | None:
    """What ``task`` reached at ``batch``, or None where it was not measured."""
    found: dict[str, Any] | None = cell["measured"].get(task, {}).get(batch)
    return found


def main_table(report: dict[str, Any]) -> list[list[str]]:
    """A header and a row for each model."""
    steps = report["settings"]["steps"]
    table = [
        [
            "model", "z", "parameters", "printed", "step", f"sample, {steps} steps", "train",
            "+ encode", "FLOP/B", "sample/s", "largest batch", "train/s", "largest batch",
            "peak, train", "of FLOP/s",
        ]
    ]  # fmt: skip
    for cell in report["cells"]:
        cost = cell["cost"]
        channels, height, width = cost["latent_shape"]
        train = measured(cell, "train", "batch_1")
        sample = measured(cell, "sample", "batch_1")
        table.append(
            [
                cell["name"],
                f"{height}×{width}×{channels}",
                f"{cost['parameters'] / 1e6:.1f}M",
                f"{cell['paper']['printed_parameters_millions']}M"
                if cell["is_papers"]
                else NOTHING,
                flops(cost["step"]["flops"]),
                flops(cost["sample"]["flops"]),
                flops(cost["train_from_cache"]["flops"]),
                flops(cost["train_from_image"]["flops"]),
                f"{cost['step']['intensity']:.0f}",
                _rate(sample),
                _rate_of_batch(measured(cell, "sample", "largest")),
                _rate(train),
                _rate_of_batch(measured(cell, "train", "largest")),
                nbytes(train["peak_bytes"]) if train else NOTHING,
                f"{sample['share_of_matrix_rate']:.0%}" if sample else NOTHING,
            ]
        )
    return table


def comparison_table(report: dict[str, Any]) -> list[list[str]]:
    """The paper's sampling throughput (Table 18) beside ours, each with its device.

    Ours stands there only where the same model was measured at the paper's width, with the
    largest batch that fits; for other rows it says why not.
    """
    table = [["Table 18", "steps", f"quoted, {paper.DEVICE}", "ours", "on"]]
    for row in paper.TABLE_18:
        ours, where = _ours(report, row)
        table.append([row.name, str(row.steps), f"{row.images_per_second:g}/s", ours, where])
    return table


def _ours(report: dict[str, Any], row: paper.SamplingRow) -> tuple[str, str]:
    if row.table is None:
        return NOTHING, "another model than those of Tables 13 and 14"
    cells = [
        cell
        for cell in report["cells"]
        if cell["f"] == row.f
        and cell["paper"]["table"] == row.table
        and cell["regularization"] == "vq"
    ]
    if not cells:
        return NOTHING, f"not asked for (Table {row.table}, VQ)"
    if not cells[0]["is_papers"]:
        return NOTHING, "measured narrower than the paper's"
    reached = measured(cells[0], "sample", "largest")
    if reached is None:
        return NOTHING, "not measured"
    seconds = row.steps * reached["seconds_of_step"] + reached["seconds_of_decode"]
    rate = reached["batch_size"] / seconds
    return f"{rate:.3g}/s", f"{report['stamp']['device']}, batch {reached['batch_size']}"


def notes(report: dict[str, Any]) -> list[str]:
    """What has to be said beside the tables."""
    found = [_surroundings(report), *_ratio(report)]
    for cell in report["cells"]:
        for problem in not_measured(cell):
            found.append(f"{cell['name']}: not measured: {problem}")
    quoted = ", ".join(
        f"{row.name} {row.train_images_per_second:g} and {row.sample_images_per_second:g}"
        for row in paper.TABLE_6
    )
    found.append(
        f"Quoted from Table 6 ({paper.SOURCE}, {paper.DEVICE}; inpainting at 256², images a second "
        f"in training and sampling): {quoted}."
    )
    return found


def not_measured(cell: dict[str, Any]) -> list[str]:
    """The reasons why figures are missing."""
    found = cell["measured"]
    reasons = [found, *(found.get(task, {}) for task in ("sample", "train"))]
    return [entry["not_measured"] for entry in reasons if "not_measured" in entry]


def _surroundings(report: dict[str, Any]) -> str:
    stamp, roofs = report["stamp"], report["roofs"]
    threads = f", {stamp['threads']} threads" if stamp["threads"] else ""
    limits = ""
    if roofs:
        limits = (
            f"; measured roofs: {roofs['flops_per_second'] / 1e9:.0f} GFLOP/s (matrix product), "
            f"{roofs['bytes_per_second'] / 1e9:.1f} GB/s (copy)"
        )
    return (
        f"Measured on {stamp['device']}{threads}, {stamp['dtype']}, torch {stamp['torch']}, "
        f"{stamp['date']}{limits}. Images a second are those of {report['settings']['steps']} "
        "times the measured step, with decoding; batch 1 unless another is named."
    )


def _ratio(report: dict[str, Any]) -> list[str]:
    ratio = report["ratio"]
    if ratio is None:
        return []
    if "not_measured" in ratio:
        return [f"Latents against pixels: not measured: {ratio['not_measured']}"]
    lines = [
        f"{what} {statistics.median(ratio[key]):.1f} times ({min(ratio[key]):.1f}–"
        f"{max(ratio[key]):.1f})"
        for key, what in _RATIOS
    ]
    return [
        f"{ratio['latents']} against {ratio['pixels']} at the same image size, median (range) of "
        f"{ratio['rounds']} rounds: {'; '.join(lines)}."
    ]


def flops(value: float) -> str:
    """Such as "202 GFLOP"."""
    for unit in ("", "K", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g} {unit}FLOP"
        value /= 1000
    return f"{value:.3g} PFLOP"


def nbytes(value: float) -> str:
    """Such as "1.4 GB"."""
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def _rate(reached: dict[str, Any] | None) -> str:
    return f"{reached['images_per_second']:.3g}" if reached else NOTHING


def _rate_of_batch(reached: dict[str, Any] | None) -> str:
    return f"{_rate(reached)} at {reached['batch_size']}" if reached else NOTHING
