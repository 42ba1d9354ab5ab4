"""Linear attention against its formula, pixel by pixel."""

from __future__ import annotations

import torch

from fastldm.modules.linear_attention import LinearAttention


def test_it_is_its_formula() -> None:
    torch.manual_seed(0)
    module = LinearAttention(5).double()
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    projected = torch.einsum("oc,bchw->bohw", module.to_qkv.weight[:, :, 0, 0], x).flatten(2)
    query, key, value = projected[:, :5], projected[:, 5:10], projected[:, 10:]
    key = key.exp() / key.exp().sum(dim=2, keepdim=True)
    read = torch.zeros_like(value)
    for pixel in range(12):
        for other in range(12):
            agreement = (query[:, :, pixel] * key[:, :, other]).sum(dim=1, keepdim=True)
            read[:, :, pixel] += agreement * value[:, :, other]
    expected = torch.einsum("oc,bcn->bon", module.to_out.weight[:, :, 0, 0], read)
    expected = expected + module.to_out.bias[:, None]
    torch.testing.assert_close(module(x).flatten(2), expected, rtol=1e-12, atol=1e-12)


def test_it_has_no_memory_of_pairs_of_pixels() -> None:
    module = LinearAttention(4)
    largest = 0

    def record(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        module(torch.randn(1, 4, 16, 16))
    assert largest <= 3 * 4 * 256
