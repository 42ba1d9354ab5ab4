"""The processes and the device that a run has, through Accelerate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastldm.errors import ConfigError
from fastldm.training.config import TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Environment:
    """Device, processes and precision of a run.

    Autocast and the gradient scaler are torch's own: Accelerate's prepared optimisers update one
    scaler after each optimiser, which is wrong where two share a step (see `Stepper`), and its
    precision is fixed for the life of the Python process.

    Raises:
        ConfigError: the device cannot do the precision asked for.
    """

    def __init__(self, config: TrainingConfig) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        self.accelerator: Accelerator = Accelerator(
            mixed_precision="no",
            # Unless told of the CPU, Accelerate leaves processes without GPUs strangers.
            cpu=config.cpu or not torch.accelerator.is_available(),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        self.device: torch.device = self.accelerator.device
        self.num_processes: int = self.accelerator.num_processes
        self.process_index: int = self.accelerator.process_index
        self.is_main: bool = self.accelerator.is_main_process
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != self.num_processes:
            raise ConfigError(
                f"{started} processes were started, but Accelerate joins {self.num_processes} on "
                f"{self.device.type}; set cpu: true or start one process"
            )
        precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if precision not in ("no", *_DTYPES):
            raise ConfigError(f"mixed_precision: expected no, bf16 or fp16, got {precision!r}")
        if precision == "fp16" and self.device.type == "cpu":
            raise ConfigError("mixed_precision: fp16 needs a GPU; use bf16 or no on a CPU")
        self.autocast_dtype = _DTYPES.get(precision)

    @property
    def scales_gradients(self) -> bool:
        """Whether gradients need a scaler to survive the precision."""
        return self.autocast_dtype is torch.float16

    def autocast(self) -> AbstractContextManager[None]:
        """The precision of forward passes."""
        return torch.autocast(
            self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None
        )

    def wrap(self, module: nn.Module) -> nn.Module:
        """Move a module to the device and, with several processes, average its gradients."""
        if self.num_processes > 1 and self.device.type == "cuda":
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return self.accelerator.prepare_model(module)

    @contextmanager
    def accumulate(self, modules: list[nn.Module], *, last: bool) -> Iterator[None]:
        """Average gradients over the processes only in the last micro-batch of a step."""
        with ExitStack() as stack:
            if not last:
                for module in modules:
                    stack.enter_context(self.accelerator.no_sync(module))
            yield

    def positions(self, micro_batch: int, batch_size: int) -> range:
        """Places of this process's samples in the global batch of a step.

        Args:
            micro_batch: its number in the step.
            batch_size: samples of this process in it.
        """
        first = (micro_batch * self.num_processes + self.process_index) * batch_size
        return range(first, first + batch_size)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        return self.accelerator.reduce(value, "mean")

    def agree(self, elapsed: float, interrupted: bool) -> tuple[float, bool]:
        """The main process's clock, and whether any process was interrupted."""
        if self.num_processes == 1:
            return elapsed, interrupted
        own = torch.tensor([[elapsed, float(interrupted)]], dtype=torch.float64)
        gathered = self.accelerator.gather(own.to(self.device))
        return float(gathered[0, 0]), bool(gathered[:, 1].any())

    def all_finite(self, value: Tensor) -> bool:
        """Whether a tensor is finite in every process."""
        finite = torch.isfinite(value).all()
        if self.num_processes == 1:
            return bool(finite)
        return bool(self.accelerator.gather(finite.reshape(1)).all())
