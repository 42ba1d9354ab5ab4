"""Everything that needs a GPU: ``python -m benchmarks.gpu --out DIR``.

Builds the extension, runs the tests marked gpu and compute-sanitizer, measures every operator
against its peers and against what the device can do, and tunes what is kept as data. Each stage
writes DIR/<stage>.json as it goes and DIR/<stage>.txt, and is stopped at its limit; the table of
DIR/table.md is made of all that is in DIR. A stage that is done for the same sources is kept, so a
call that was cut short is taken up again. ``--device cpu`` is a dry run of the script itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu import report
from benchmarks.gpu.runner import run_stages
from benchmarks.gpu.stages import NAMES, STAGES

_TOTAL = 1500.0


def main(arguments: Sequence[str] | None = None) -> int:
    """1 where a stage did not end well, or found something wrong."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--stages", type=_names, default=NAMES, metavar="A,B", help=f"of {', '.join(NAMES)}"
    )
    parser.add_argument(
        "--limit", type=_limit, action="append", default=[], metavar="STAGE=SECONDS",
        help="in place of: " + ", ".join(f"{stage.name}={stage.limit:g}" for stage in STAGES),
    )  # fmt: skip
    parser.add_argument(
        "--total", type=float, default=_TOTAL, help=f"seconds for all stages ({_TOTAL:g})"
    )
    parser.add_argument("--again", action="store_true", help="repeat stages that are done")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu is a dry run")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    chosen = [stage for stage in STAGES if stage.name in options.stages]
    problems = 0
    for record, line in run_stages(
        chosen, out, options.device, limits=dict(options.limit), total=options.total,
        again=options.again,
    ):  # fmt: skip
        print(f"{record.stage}: {line}", flush=True)
        for problem in record.problems:
            print(f"  {problem}", file=sys.stderr, flush=True)
        problems += len(record.problems)
    page = report.page(out)
    (out / "table.md").write_text(page, encoding="utf-8")
    print(f"\n{page}", end="")
    return 1 if problems else 0


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(NAMES):
        raise argparse.ArgumentTypeError(f"no stage {', '.join(sorted(unknown))}")
    return names


def _limit(text: str) -> tuple[str, float]:
    name, _, seconds = text.partition("=")
    if name not in NAMES:
        raise argparse.ArgumentTypeError(f"no stage {name!r}; write STAGE=SECONDS")
    return name, float(seconds)


if __name__ == "__main__":
    raise SystemExit(main())
