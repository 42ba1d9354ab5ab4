"""Samplers with diffusers' names and signatures, whose steps are fastldm's operators."""

from fastldm.schedulers.base import SchedulerMixin, SchedulerOutput, randn
from fastldm.schedulers.betas import make_betas, rescale_zero_terminal_snr
from fastldm.schedulers.ddim import DDIMScheduler, DDIMSchedulerOutput
from fastldm.schedulers.ddpm import DDPMScheduler, DDPMSchedulerOutput
from fastldm.schedulers.diffusion import DiffusionScheduler
from fastldm.schedulers.dpmsolver_multistep import DPMSolverMultistepScheduler
from fastldm.schedulers.dpmsolver_singlestep import DPMSolverSinglestepScheduler
from fastldm.schedulers.euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from fastldm.schedulers.euler_discrete import EulerDiscreteScheduler
from fastldm.schedulers.heun_discrete import HeunDiscreteScheduler
from fastldm.schedulers.lcm import LCMScheduler, LCMSchedulerOutput
from fastldm.schedulers.lms_discrete import LMSDiscreteScheduler
from fastldm.schedulers.noise_scheduler import NoiseScheduler
from fastldm.schedulers.pndm import PNDMScheduler
from fastldm.schedulers.sigma_scheduler import SigmaScheduler
from fastldm.schedulers.timesteps import spaced_timesteps
from fastldm.schedulers.unipc_multistep import UniPCMultistepScheduler

__all__ = [
    "DDIMScheduler",
    "DDIMSchedulerOutput",
    "DDPMScheduler",
    "DDPMSchedulerOutput",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DiffusionScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "LCMSchedulerOutput",
    "LMSDiscreteScheduler",
    "NoiseScheduler",
    "PNDMScheduler",
    "SchedulerMixin",
    "SchedulerOutput",
    "SigmaScheduler",
    "UniPCMultistepScheduler",
    "make_betas",
    "randn",
    "rescale_zero_terminal_snr",
    "spaced_timesteps",
]
