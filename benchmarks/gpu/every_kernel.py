"""Launches every kernel once, on small tensors: ``python -m benchmarks.gpu.every_kernel``.

It is the program that compute-sanitizer watches, so it computes nothing else on the device but its
operands, and ends with a line that says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.gpu.peers import backend_of
from fastldm import ops

DONE = "every kernel was launched"
_CODEBOOKS = ((1, 40), (2, 40), (3, 40), (4, 40), (5, 40), (6, 40), (7, 40), (8, 40), (24, 200))
"""Depth and codes: a kernel for each of the narrow ones, and the wide ones."""

Call = Callable[[str], object]


def calls() -> Iterator[tuple[str, Call]]:
    """Operator and call; each takes the device."""
    for channels_last in (False, True):
        # Groups that are read at once, and a group that is split.
        yield "group_norm_silu", _norm((2, 24, 6, 5), 2, channels_last)
        yield "group_norm_silu", _norm((1, 60, 20, 15), 1, channels_last)
    for width in (40, 160):
        yield "cross_attention", _attention(width)
    for sampler in ("ddim", "ddpm"):
        yield "diffusion_step", _step(sampler)
    yield "geglu", _gated
    for depth, codes in _CODEBOOKS:
        for channels_last in (False, True):
            yield "vector_quantize", _lookup(depth, codes, channels_last)


def _norm(shape: tuple[int, ...], groups: int, channels_last: bool) -> Call:
    def call(device: str) -> object:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        x, residual = (
            torch.randn(shape, device=device).to(torch.bfloat16, memory_format=layout)
            for _ in range(2)
        )
        per_sample = torch.randn(3, *shape[:2], device=device)
        leaves = [x, *torch.randn(2, shape[1], device=device), residual, *per_sample]
        leaves = [value.requires_grad_() for value in (v.detach() for v in leaves)]
        x, weight, bias, residual, add, scale, shift = leaves
        y = ops.group_norm_silu(
            x, groups, weight, bias, residual=residual, channel_add=add, scale=scale, shift=shift
        )
        return torch.autograd.grad(y, leaves, torch.randn_like(y))

    return call


def _attention(width: int) -> Call:
    def call(device: str) -> object:
        # So many queries that the gradients of the keys are summed over several programs.
        leaves = [
            torch.randn(1, n, 2, width, device=device).half().requires_grad_()
            for n in (100, 77, 77)
        ]
        mask = torch.arange(77, device=device)[None] < 70
        o = ops.cross_attention(*leaves, key_mask=mask)
        return torch.autograd.grad(o, leaves, torch.randn_like(o))

    return call


def _step(sampler: str) -> Call:
    def call(device: str) -> object:
        sample, output, uncond = (torch.randn(2, 4, 9, 7, device=device) for _ in range(3))
        alphas = torch.tensor(0.4), torch.tensor(0.7)
        step, make = (
            (ops.ddim_step, ops.ddim_coefficients)
            if sampler == "ddim"
            else (ops.ddpm_step, ops.ddpm_coefficients)
        )
        row = make(*alphas).to(device)
        guidance = {"model_output_uncond": uncond, "guidance_scale": 3.0}
        seed = torch.tensor([5], device=device)
        offset = torch.tensor(2, device=device)
        plain: Tensor = step(sample, output, row, seed=seed, offset=offset)[0]
        guided = step(sample, output, row, noise=plain, guidance_rescale=0.7, **guidance)[0]
        strided = output.contiguous(memory_format=torch.channels_last)
        return plain, guided, step(sample, strided, row, seed=seed, offset=offset)

    return call


def _gated(device: str) -> object:
    hidden = torch.randn(3, 7, 2 * 74, device=device).half().requires_grad_()
    y = ops.geglu(hidden)
    return torch.autograd.grad(y, hidden, torch.randn_like(y))


def _lookup(depth: int, codes: int, channels_last: bool) -> Call:
    def call(device: str) -> object:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        z = torch.randn(2, depth, 8, 16, device=device).contiguous(memory_format=layout)
        z = z.requires_grad_()
        codebook = torch.randn(codes, depth, device=device, requires_grad=True)
        found = ops.vector_quantize(z, codebook)
        total = found.z_q.sum() + found.codebook_loss + found.commitment_loss
        gradients = torch.autograd.grad(total, (z, codebook))
        return gradients, ops.codebook_statistics(z, found.indices, codes)

    return call


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes every call, in order."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.every_kernel", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("operators", nargs="*", help="all if none")
    options = parser.parse_args(arguments)
    for operator, call in calls():
        if not options.operators or operator in options.operators:
            with ops.backend(backend_of(operator, options.device)):
                call(options.device)
    if options.device == "cuda":
        torch.cuda.synchronize()
    print(DONE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
