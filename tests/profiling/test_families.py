"""Names of operators, gradients and kernels, and the families that they belong to."""

from __future__ import annotations

import pytest

from fastldm.profiling.families import FAMILIES, UPDATE_RANGE, family_of

NAMES = {
    "convolution": [
        "aten::convolution", "aten.convolution_backward.default", "aten::mkldnn_convolution",
        "ConvolutionBackward0", "aten::cudnn_convolution",
    ],
    "attention": [
        "fastldm::cross_attention_fwd", "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten.addmm.default", "aten::mm", "aten::bmm", "aten::linear", "AddmmBackward0",
        "MmBackward0", "aten._softmax_backward_data.default", "fastldm::geglu_fwd",
        "_GEGLUBackward",
    ],
    "norm": [
        "aten::native_group_norm", "fastldm::group_norm_silu_bwd", "aten.silu_backward.default",
        "_GroupNormSiLUBackward", "aten::layer_norm",
    ],
    "update": [
        UPDATE_RANGE, "fastldm::ddim_step_fwd", "fastldm::diffusion_step_fwd",
        "Optimizer.step#AdamW.step",
    ],
    "lookup": [
        "fastldm::vector_quantize_fwd", "_VectorQuantize", "fastldm::codebook_statistics",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("family", "name"), [(f, n) for f, names in NAMES.items() for n in names])
def test_family_of_a_name(family: str, name: str) -> None:
    assert family in FAMILIES
    assert family_of(name) == family


@pytest.mark.parametrize(
    "name", ["aten::add", "aten::cat", "aten::copy_", "aten::upsample_nearest2d"]
)
def test_what_a_name_alone_does_not_say(name: str) -> None:
    assert family_of(name) is None
