"""Runs one stage in this process: ``python -m benchmarks.gpu.worker STAGE --out DIR``."""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import records
from benchmarks.gpu.machine import stamp
from benchmarks.gpu.records import DONE, FAILED, Record
from benchmarks.gpu.stages import NAMES, Context


def main(arguments: Sequence[str] | None = None) -> int:
    """1 where the stage ends by an exception."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.worker", description=__doc__)
    parser.add_argument("stage", choices=NAMES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--limit", type=float, default=float("inf"))
    options = parser.parse_args(arguments)
    return run_stage(options.stage, Context(options.device, options.out, options.limit))


def run_stage(name: str, context: Context) -> int:
    """Store what a stage yields, row by row."""
    record = Record(name, stamp={"date": records.now()})
    try:
        record.stamp |= stamp(context.device)
        record.write(context.out)
        module = importlib.import_module(f"benchmarks.gpu.stages.{name}")
        for row in module.run(context):
            record.rows.append(row)
            record.write(context.out)
            print(json.dumps(row), flush=True)
    except Exception as error:
        traceback.print_exc()
        record.state, record.reason = FAILED, f"{type(error).__name__}: {error}"
    else:
        record.state = DONE
    record.write(context.out)
    return 0 if record.state == DONE else 1


def _end(*_: Any) -> None:
    # As an exception, so that the commands which a stage has started are ended, too.
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    raise SystemExit(main())
