"""Samplers with diffusers' names and signatures, whose steps are fastldm's operators."""

from fastldm.schedulers.base import SchedulerMixin, SchedulerOutput, randn
from fastldm.schedulers.betas import make_betas, rescale_zero_terminal_snr
from fastldm.schedulers.ddim import DDIMScheduler, DDIMSchedulerOutput
from fastldm.schedulers.ddpm import DDPMScheduler, DDPMSchedulerOutput
from fastldm.schedulers.diffusion import DiffusionScheduler
from fastldm.schedulers.noise_scheduler import NoiseScheduler
from fastldm.schedulers.pndm import PNDMScheduler
from fastldm.schedulers.timesteps import spaced_timesteps

__all__ = [
    "DDIMScheduler",
    "DDIMSchedulerOutput",
    "DDPMScheduler",
    "DDPMSchedulerOutput",
    "DiffusionScheduler",
    "NoiseScheduler",
    "PNDMScheduler",
    "SchedulerMixin",
    "SchedulerOutput",
    "make_betas",
    "randn",
    "rescale_zero_terminal_snr",
    "spaced_timesteps",
]
