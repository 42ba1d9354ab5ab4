"""What diffusion costs for each downsampling factor f: counted, and measured on a device."""

from fastldm.profiling import paper
from fastldm.profiling.costs import LDMCosts, ldm_costs
from fastldm.profiling.counting import Cost, count
from fastldm.profiling.families import FAMILIES, family_of
from fastldm.profiling.specs import FACTORS, REGULARIZATIONS, LDMSpec, narrow, pairs

__all__ = [
    "FACTORS",
    "FAMILIES",
    "REGULARIZATIONS",
    "Cost",
    "LDMCosts",
    "LDMSpec",
    "count",
    "family_of",
    "ldm_costs",
    "narrow",
    "pairs",
    "paper",
]
