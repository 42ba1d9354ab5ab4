"""Operator families: what an operator's name says about what it does.

attention: scores, softmax and values, with every matrix product around them: projections, feed-
    forward layers, and the two small ones of the time embedding.
norm: GroupNorm, LayerNorm and SiLU, fused or not.
update: the sampler's step; in training, the optimiser's.
lookup: the nearest code of each latent.
other: residual sums, concatenation, resampling, copies; and where time is concerned, what passes
    between the operators.
"""

from __future__ import annotations

import functools
import re

FAMILIES = ("convolution", "attention", "norm", "update", "lookup", "other")

UPDATE_RANGE = "fastldm update"
"""Name of the profiler's range around an update, whose operators are those of many others."""

# In the order in which they are tried on an operator's or a kernel's name.
_PATTERNS = (
    ("update", re.compile(
        rf"{UPDATE_RANGE}|(?:ddim|ddpm|diffusion)_step|optimizer|_fused_adam", re.I)),
    ("lookup", re.compile(r"vector_?quantize|codebook", re.I)),
    ("norm", re.compile(r"norm|silu", re.I)),
    ("attention", re.compile(
        r"attention|geglu|sdpa|fmha|flash|softmax|gemm|nvjet|(?:^|::|\.)(?:add|b|badd|addb)?mm(?:$|\.|_)"
        r"|linear|matmul|addmmbackward|mmbackward|einsum", re.I)),
    ("convolution", re.compile(r"conv|fprop|dgrad|wgrad|winograd", re.I)),
)  # fmt: skip


@functools.cache
def family_of(name: str) -> str | None:
    """The family of an operator, or None where its name alone says nothing.

    Args:
        name: such as "aten.convolution.default", "aten::mkldnn_convolution",
            "ConvolutionBackward0" or that of a CUDA kernel.
    """
    return next((family for family, pattern in _PATTERNS if pattern.search(name)), None)
