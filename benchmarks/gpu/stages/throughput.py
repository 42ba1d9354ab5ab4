"""Images a second for each f, trained and sampled: the paper's unconditional models (Table 14).

Training is from a latent cache; sampling is `STEPS` denoising steps and a decoding. Both at batch 1
and at the batch with which the paper trained. f = 1 is the pixel-space model of equal image size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.clock import Clock, clock_for
from benchmarks.gpu.records import Row
from benchmarks.gpu.stages import Context
from benchmarks.memory import peak_bytes
from benchmarks.timing import interleaved, timer_of
from fastldm import ops
from fastldm.profiling import LDMSpec, narrow

STEPS = 200
"""As the paper samples most of its unconditional models (Table 18 says how fast)."""
# Latent against pixel first, should time run out.
_FACTORS = (4, 1, 8, 16, 2, 32)
_DRY_FACTORS, _DRY_SIZE = (4, 1), 64
_BACKENDS = {"plain torch": "reference", "fastldm": "auto"}
_LARGEST_ERROR = 0.05
_ROUNDS = 5

Calls = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class _Work:
    """What is timed for a number of images."""

    spec: LDMSpec
    batch: int
    context: Context

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and images while sampling, and of autocast while training."""
        return torch.float32 if self.context.is_dry else torch.bfloat16

    def row(self, what: str, backend: str) -> Row:
        """What all rows have."""
        return {
            "what": what, "f": self.spec.f, "model": self.spec.name, "batch": self.batch,
            "image_size": self.spec.image_size, "backend": backend,
            "dtype": str(self.dtype).removeprefix("torch."),
        }  # fmt: skip


def run(context: Context) -> Iterator[Row]:
    clock = clock_for(context.device)
    for f in _DRY_FACTORS if context.is_dry else _FACTORS:
        regularization = "none" if f == 1 else "vq"
        spec = narrow(f, regularization, image_size=_DRY_SIZE)
        if not context.is_dry:
            spec = LDMSpec(f, regularization)
        for batch in (1,) if context.is_dry else (1, spec.row.batch_size):
            work = _Work(spec, batch, context)
            for what, measured in (("sample", _sampling(work, clock)), ("train", _training(work))):
                try:
                    yield from measured
                except torch.OutOfMemoryError:
                    yield {
                        "what": what, "f": f, "batch": batch,
                        "skipped": f"{spec.name}: a batch of {batch} does not fit to {what}",
                    }  # fmt: skip


@torch.inference_mode()
def _sampling(work: _Work, clock: Clock) -> Iterator[Row]:
    """A denoising step with DDIM's update and, beside it, a decoding."""
    device, spec = work.context.device, work.spec
    options = {"dtype": work.dtype, "memory_format": torch.channels_last}
    unet = spec.build_unet(device).to(**options).eval()
    z, timesteps = spec.unet_inputs(work.batch, device, work.dtype)
    z = z.contiguous(memory_format=torch.channels_last)
    coefficients = ops.ddim_coefficients(torch.tensor(0.4), torch.tensor(0.7)).to(device)

    def step() -> Tensor:
        return ops.ddim_step(z, unet(z, timesteps).sample, coefficients).prev_sample

    steps = _on_backends(step)
    problem = _disagreement(f"{spec.name}, a step", steps)
    step_times = clock.times(steps, rounds=_ROUNDS)
    memory = {name: peak_bytes(call, device) for name, call in steps.items()}
    decoding = dict.fromkeys(steps, 0.0)
    first_stage = spec.build_first_stage(device)
    if first_stage is not None:
        network = first_stage.to(**options).eval()

        def decode() -> Tensor:
            image: Tensor = network.decode(z).sample
            return image

        decodes = _on_backends(decode)
        decoding = {name: t.cold for name, t in clock.times(decodes, rounds=_ROUNDS).items()}
        for name, call in decodes.items():
            memory[name] = max(memory[name], peak_bytes(call, device))
    for name, times in step_times.items():
        row = work.row("sample", name) | {
            "steps": STEPS,
            "step_ms": times.cold * 1e3,
            "decode_ms": decoding[name] * 1e3,
            "images_per_second": work.batch / (STEPS * times.cold + decoding[name]),
            "how": times.how,
            "peak_bytes": memory[name],
        }
        if problem and name == "fastldm":
            row["problem"] = problem
        yield row


def _training(work: _Work) -> Iterator[Row]:
    """Forward, backward and Adam's update, of latents that are there; not as a CUDA graph."""
    device, spec = work.context.device, work.spec
    unet: nn.Module = spec.build_unet(device).to(memory_format=torch.channels_last)
    z, timesteps = spec.unet_inputs(work.batch, device)
    z = z.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)

    def step() -> Tensor:
        with torch.autocast(device, work.dtype, enabled=work.dtype != torch.float32):
            loss = F.mse_loss(unet(z, timesteps).sample.float(), z)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    calls = _on_backends(step)
    rounds = 1 if work.context.is_dry else _ROUNDS
    times = interleaved(calls, rounds, timer_of(device))
    for name, call in calls.items():
        seconds = times[name].quartiles.median
        row = work.row("train", name) | {
            "step_ms": seconds * 1e3,
            "images_per_second": work.batch / seconds,
            "how": "calls",
            "peak_bytes": peak_bytes(call, device),
        }
        if not call().isfinite():
            row["problem"] = f"{spec.name}: the loss is not finite"
        yield row


def _on_backends(call: Callable[[], Tensor]) -> Calls:
    def on(backend: str) -> Callable[[], Tensor]:
        def run_on() -> Tensor:
            with ops.backend(backend):
                return call()

        return run_on

    return {name: on(backend) for name, backend in _BACKENDS.items()}


def _disagreement(what: str, calls: Calls) -> str | None:
    """By how much the kernels' result differs from that of plain torch, where that is too much."""
    plain, ours = (call().double() for call in calls.values())
    error = ((ours - plain).norm() / plain.norm()).item()
    return None if error <= _LARGEST_ERROR else f"{what}: the kernels differ by {error:.3g}"
