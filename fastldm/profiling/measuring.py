"""What the models of one f reach on a device: images a second, memory, and where time goes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastldm.errors import ConfigError
from fastldm.profiling.batches import largest_batch
from fastldm.profiling.costs import LDMCosts
from fastldm.profiling.device import Roofs, available_memory, median_seconds
from fastldm.profiling.specs import LDMSpec
from fastldm.profiling.tracing import fastest_by_family, peak_memory
from fastldm.profiling.workloads import BACKENDS, Call, Sampling, Training

_ALLOCATOR_SHARE = 1.25
"""What is needed beside the counted tensors: workspaces, fragments, the process itself."""
_SECONDS_OF_LARGEST = 3
"""A call with the largest batch may take so many times as long as a measurement."""


@dataclass(frozen=True)
class Conditions:
    """How and where is measured.

    Attributes:
        device, dtype: where the models are, and what they compute in.
        steps: denoising steps of an image.
        budget: seconds for the repeats of one call.
        max_batch_size: the largest batch that is tried.
        memory: bytes that may be used; None: those that are free.
        roofs: of the device.
    """

    device: torch.device
    dtype: torch.dtype
    steps: int
    budget: float
    max_batch_size: int
    memory: int | None
    roofs: Roofs

    def seconds(self, call: Call | None) -> float:
        """The median time of a call; 0 for one that there is not."""
        return 0.0 if call is None else median_seconds(call, self.device, self.budget)

    def families(self, call: Call) -> dict[str, Any]:
        """Where the time of a call goes."""
        return fastest_by_family(call, self.device, self.budget).as_dict()

    def why_no_memory(self, what: str, needed: int) -> str | None:
        """Why so many bytes cannot be had, or None."""
        free = available_memory(self.device) if self.memory is None else self.memory
        wanted = int(needed * _ALLOCATOR_SHARE)
        if wanted <= free:
            return None
        return f"{what} needs about {wanted / 1e9:.2f} GB, of which {free / 1e9:.2f} GB are free"


def measure(spec: LDMSpec, costs: LDMCosts, conditions: Conditions) -> dict[str, Any]:
    """Sampling and training of `spec`, each at batch 1 and at the largest batch.

    Returns:
        For JSON: ``sample`` and ``train``, each with the reason under ``not_measured`` where it
        does not fit, else with ``batch_1``, ``largest``, ``families`` and, for sampling,
        ``decode_families``.
    """
    found: dict[str, Any] = {}
    for name, needed, work in (
        ("sample", costs.sampling_memory(1), _sampling),
        ("train", costs.training_memory(1), _training),
    ):
        problem = conditions.why_no_memory(f"{spec.name}, to {name} at batch 1,", needed)
        found[name] = {"not_measured": problem} if problem else work(spec, costs, conditions)
        gc.collect()
        if conditions.device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def _sampling(spec: LDMSpec, costs: LDMCosts, conditions: Conditions) -> dict[str, Any]:
    work = Sampling(spec, conditions.device, conditions.dtype)
    steps = conditions.steps
    peak = _sampling_peak(work, 1, conditions)
    seconds = {
        backend: (
            conditions.seconds(work.step(1, backend)),
            conditions.seconds(work.decode(1, backend)),
        )
        for backend in BACKENDS
    }
    rates = {backend: 1 / (steps * step + decode) for backend, (step, decode) in seconds.items()}
    step, decode = seconds["fused"]
    found: dict[str, Any] = {
        "batch_1": {
            "batch_size": 1,
            "images_per_second": rates["fused"],
            "images_per_second_eager": rates["eager"],
            "seconds_of_step": step,
            "seconds_of_step_eager": seconds["eager"][0],
            "seconds_of_decode": decode,
            "peak_bytes": peak,
            **_shares(costs.step.total_flops, costs.step.total_bytes, step, conditions.roofs),
        },
        "families": {backend: conditions.families(work.step(1, backend)) for backend in BACKENDS},
    }
    decoding = work.decode(1)
    if decoding is not None:
        found["decode_families"] = conditions.families(decoding)

    def rate(batch_size: int) -> dict[str, Any]:
        peak = _sampling_peak(work, batch_size, conditions)
        step = conditions.seconds(work.step(batch_size))
        decode = conditions.seconds(work.decode(batch_size))
        return {
            "images_per_second": batch_size / (steps * step + decode),
            "seconds_of_step": step,
            "seconds_of_decode": decode,
            "peak_bytes": peak,
            **_shares(
                batch_size * costs.step.total_flops,
                batch_size * costs.step.total_bytes,
                step,
                conditions.roofs,
            ),
        }

    def run(batch_size: int) -> None:
        work.step(batch_size)()
        decoding = work.decode(batch_size)
        if decoding is not None:
            decoding()

    found["largest"] = _largest(
        found["batch_1"], max(step, decode), costs.sampling_memory, run, rate, conditions
    )
    return found


def _sampling_peak(work: Sampling, batch_size: int, conditions: Conditions) -> int:
    calls = work.step(batch_size), work.decode(batch_size)
    return max(
        peak_memory(call, conditions.device, work.held_bytes) for call in calls if call is not None
    )


def _training(spec: LDMSpec, costs: LDMCosts, conditions: Conditions) -> dict[str, Any]:
    encoding = conditions.seconds(Sampling(spec, conditions.device, conditions.dtype).encode(1))
    work = Training(spec, conditions.device, conditions.dtype)
    peak = peak_memory(work.step(1), conditions.device, work.held_bytes)
    seconds = {backend: conditions.seconds(work.step(1, backend)) for backend in BACKENDS}
    step = seconds["fused"]
    found: dict[str, Any] = {
        "batch_1": {
            "batch_size": 1,
            "images_per_second": 1 / step,
            "images_per_second_eager": 1 / seconds["eager"],
            "images_per_second_from_images": 1 / (step + encoding),
            "seconds_of_step": step,
            "seconds_of_step_eager": seconds["eager"],
            "seconds_of_encode": encoding,
            "peak_bytes": peak,
            **_shares(costs.train.total_flops, costs.train.total_bytes, step, conditions.roofs),
        },
        "families": {backend: conditions.families(work.step(1, backend)) for backend in BACKENDS},
    }

    def rate(batch_size: int) -> dict[str, Any]:
        peak = peak_memory(work.step(batch_size), conditions.device, work.held_bytes)
        step = conditions.seconds(work.step(batch_size))
        return {
            "images_per_second": batch_size / step,
            "images_per_second_from_images": batch_size / (step + batch_size * encoding),
            "seconds_of_step": step,
            "peak_bytes": peak,
            **_shares(
                batch_size * costs.train.total_flops,
                # The optimiser's share is that of a batch, not of an image.
                batch_size * (costs.train.total_bytes - costs.train.bytes["update"])
                + costs.train.bytes["update"],
                step,
                conditions.roofs,
            ),
        }

    def run(batch_size: int) -> None:
        work.step(batch_size)()

    found["largest"] = _largest(
        found["batch_1"], step, costs.training_memory, run, rate, conditions
    )
    return found


def _largest(
    batch_1: dict[str, Any],
    seconds: float,
    memory: Any,
    run: Any,
    rate: Any,
    conditions: Conditions,
) -> dict[str, Any]:
    """The largest batch that fits and what it reaches; batch 1's figures where it is no larger.

    Args:
        batch_1: what was measured there.
        seconds: of the longest call at batch 1.
        memory: batch size → bytes that it is expected to need.
        run: batch size → tries it.
        rate: batch size → what it reaches.
    """
    longest = _SECONDS_OF_LARGEST * conditions.budget

    def why_not(batch_size: int) -> str | None:
        if batch_size == 1:
            return None
        if batch_size * seconds > longest:
            return f"a call of {batch_size * seconds:.1f} s, longer than {longest:.1f} s"
        problem = conditions.why_no_memory(f"batch {batch_size}", memory(batch_size))
        if problem is None and conditions.device.type == "cuda":
            try:
                run(batch_size)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                return f"batch {batch_size} ran out of memory"
        return problem

    size, reason = largest_batch(why_not, conditions.max_batch_size)
    reached = rate(size) if size > 1 else batch_1
    return {**reached, "batch_size": size, "limited_by": reason}


def _shares(flops: int, nbytes: int, seconds: float, roofs: Roofs) -> dict[str, float]:
    """What a step reaches, and as shares of the roofs; bytes that a cache serves count as moved."""
    return {
        "flops_per_second": flops / seconds,
        "share_of_matrix_rate": flops / seconds / roofs.flops_per_second,
        "share_of_bandwidth": nbytes / seconds / roofs.bytes_per_second,
    }


def measure_ratio(
    pixels: LDMSpec,
    latents: LDMSpec,
    conditions: Conditions,
    rounds: int,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """How many times faster latents of images are than pixels of the same size, at batch 1.

    Both take turns, so that a slow moment of the machine slows both; a round gives one ratio.
    `advance` is called after each.

    Returns:
        For JSON: ``sample`` (with decoding), ``train`` (from a latent cache) and
        ``train_from_image``: the ratio of each round.

    Raises:
        ConfigError: the image sizes differ.
    """
    if pixels.image_size != latents.image_size:
        raise ConfigError(
            f"image_size: got {pixels.image_size} and {latents.image_size}; accepted: the same"
        )
    device, steps = conditions.device, conditions.steps
    sampling = [Sampling(spec, device, conditions.dtype) for spec in (pixels, latents)]
    training = [Training(spec, device, conditions.dtype) for spec in (pixels, latents)]
    decode, encode = sampling[1].decode(1), sampling[1].encode(1)
    calls = [part.step(1) for part in sampling] + [work.step(1) for work in training]
    if decode is not None and encode is not None:
        calls += [decode, encode]
    for call in calls[1::2]:
        call()
    found: dict[str, Any] = {"sample": [], "train": [], "train_from_image": []}
    for _ in range(rounds):
        sample_1, sample_f, train_1, train_f, decoded, encoded = (
            median_seconds(call, device, 0) for call in calls
        )
        found["sample"].append(steps * sample_1 / (steps * sample_f + decoded))
        found["train"].append(train_1 / train_f)
        found["train_from_image"].append(train_1 / (train_f + encoded))
        advance()
    return {"pixels": pixels.name, "latents": latents.name, "rounds": rounds, **found}
