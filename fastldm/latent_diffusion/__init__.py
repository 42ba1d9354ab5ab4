"""Latent diffusion (arXiv 2112.10752): both stages as one object."""

from fastldm.latent_diffusion.conditioning import (
    CONDITIONING_KINDS,
    ConditionEncoder,
    Conditioning,
)
from fastldm.latent_diffusion.model import LatentDiffusion
from fastldm.latent_diffusion.scale import LatentScale

__all__ = [
    "CONDITIONING_KINDS",
    "ConditionEncoder",
    "Conditioning",
    "LatentDiffusion",
    "LatentScale",
]
