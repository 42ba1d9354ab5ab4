"""The command line: ``fastldm <command>``; each command's module is loaded when it is called.

Exit status: 0 done, 2 wrong input (one line on stderr says what), 130 interrupted.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence

from fastldm._version import __version__
from fastldm.errors import FastLDMError

COMMANDS = {
    "train-autoencoder": "train a first stage (KL, VQ or plain) on images",
    "encode": "encode images with a first stage into a latent cache",
    "train-ldm": "train a diffusion model on the latents of a first stage",
    "sample": "draw images from a trained model",
    "reconstruct": "encode and decode images with a first stage",
    "evaluate": "measure PSNR, SSIM, LPIPS, rFID, codebook usage or FID",
    "study": "train under one budget at each f, and draw quality against cost",
    "profile": "what diffusion costs at each downsampling factor, counted and measured",
    "env": "show versions, devices and which backend serves each operator",
}
_USAGE_ERROR = 2
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: those after the program's name; by default of this process.

    Returns:
        the exit status.
    """
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or [""]
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(f"fastldm {__version__}")
        return 0
    if name not in COMMANDS:
        problem = f"unknown command {name!r}" if name else "no command given"
        print(f"fastldm: error: {problem}; try fastldm --help", file=sys.stderr)
        return _USAGE_ERROR
    _set_up_logging()
    try:
        importlib.import_module(f"fastldm.cli.{name.replace('-', '_')}").run(rest)
    except FastLDMError as error:
        print(f"fastldm {name}: error: {_one_line(error)}", file=sys.stderr)
        return _USAGE_ERROR
    except ModuleNotFoundError as error:
        if (error.name or "fastldm").partition(".")[0] == "fastldm":
            raise
        print(
            f"fastldm {name}: error: the package {error.name} is not installed; "
            "pip install 'fastldm[train]'",
            file=sys.stderr,
        )
        return _USAGE_ERROR
    except KeyboardInterrupt as error:
        print(f"fastldm {name}: {_one_line(error) or 'interrupted'}", file=sys.stderr)
        return _INTERRUPTED
    return 0


def is_main_process() -> bool:
    """Whether this is the only process, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


class LogHandler(logging.Handler):
    """Writes lines to stderr, above a progress bar rather than into it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        line = self.format(record)
        if "tqdm" in sys.modules:
            from tqdm.auto import tqdm

            tqdm.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr)


def _usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastldm COMMAND [--config FILE.yaml] [--OPTION VALUE …]",
            "",
            *lines,
            "",
            "fastldm COMMAND --help lists its options.",
        ]
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _set_up_logging() -> None:
    """Progress to stderr from the main process; the choice of operator backends is not news.

    Nor is each of the attempts to reach the hub, whose last failure becomes the command's error.
    """
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[LogHandler()])
    if is_main_process():
        logging.getLogger("fastldm").setLevel(logging.INFO)
    logging.getLogger("fastldm.ops").setLevel(logging.WARNING)
