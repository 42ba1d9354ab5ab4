"""Patch-adversarial losses and the weight that balances them against the reconstruction.

The adversarial game of VQGAN (Esser et al. 2021, arXiv 2012.09841, section 3.2): logits of a patch
discriminator, hinge or vanilla, and the adaptive weight of eq. 7.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from fastldm.errors import TrainingError

ADAPTIVE_WEIGHT_EPS = 1e-4
ADAPTIVE_WEIGHT_MAX = 1e4
_BACKWARD_SCALE = 2.0**10
_LAST_LAYER_MASS = 2.0**9


def hinge_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """½ (mean max(0, 1 − D(x)) + mean max(0, 1 + D(x̂))), a scalar (Lim and Ye 2017)."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """½ (mean −log σ(D(x)) + mean −log(1 − σ(D(x̂)))), a scalar (Goodfellow et al. 2014)."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


def linear_generator_loss(logits_fake: Tensor) -> Tensor:
    """−mean D(x̂): the generator's side of the hinge game, and CompVis's for both games."""
    return -logits_fake.mean()


def non_saturating_generator_loss(logits_fake: Tensor) -> Tensor:
    """mean −log σ(D(x̂)): the generator's side of the vanilla game (Goodfellow et al. 2014)."""
    return F.softplus(-logits_fake).mean()


def adopt_weight(weight: float, global_step: int, threshold: int, value: float = 0.0) -> float:
    """`value` before step `threshold`, `weight` from it on."""
    return weight if global_step >= threshold else value


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None


def with_gradient(value: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    """A scalar of the given value whose gradient with respect to `x` is `gradient`.

    It stands for a loss whose gradient is already known: its network (LPIPS, the discriminator)
    is not gone through a second time, and its activations are already freed.
    """
    result: Tensor = _WithGradient.apply(x, value.detach(), gradient)
    return result


def value_and_gradient(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `function`, which returns a scalar and something to report, and differentiate by `x`.

    Nothing is added to the gradients of any parameter. The backward pass runs 2¹⁰ times larger
    than the loss and is scaled back in `x`'s dtype: powers of two change nothing in float32, and
    keep the small gradients of a network under float16 autocast from being flushed to zero.

    Returns:
        the scalar, the report, both detached, and ∂scalar/∂x of x's shape and dtype.
    """
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        value, report = function(leaf)
        (gradient,) = torch.autograd.grad(value * _BACKWARD_SCALE, leaf)
    return value.detach(), report.detach(), gradient / _BACKWARD_SCALE


class AdaptiveWeight(NamedTuple):
    """Scalars on the device: eq. 7's weight, the two norms of it, and whether all is finite."""

    weight: Tensor
    grad_norm_rec: Tensor
    grad_norm_adv: Tensor
    finite: Tensor


def adaptive_weight(
    reconstructions: Tensor, last_layer: Tensor, rec_gradient: Tensor, adv_gradient: Tensor
) -> AdaptiveWeight:
    """λ = ‖∇L_rec‖ / (‖∇L_adv‖ + 10⁻⁴) at the last layer, clamped to [0, 10⁴] (VQGAN, eq. 7).

    A ratio that is not finite gives weight 0. In a process group the two last-layer gradients are
    averaged over the processes first, so that the weight is that of the global batch and the same
    everywhere; every process must call this. The graph of `reconstructions` is kept.

    Args:
        reconstructions: decoder output [B, C, H, W] with its graph.
        last_layer: weight of the decoder's last layer, a parameter of that graph.
        rec_gradient: ∂L_rec/∂reconstructions, same shape.
        adv_gradient: ∂L_adv/∂reconstructions, same shape.

    Raises:
        TrainingError: `last_layer` has no part in `reconstructions`, or does not need gradients.
    """
    gradients = torch.stack(
        [
            _last_layer_gradient(reconstructions, last_layer, gradient)
            for gradient in (rec_gradient, adv_gradient)
        ]
    )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(gradients)
        gradients = gradients / torch.distributed.get_world_size()
    norm_rec, norm_adv = torch.linalg.vector_norm(gradients, dim=1).unbind()
    ratio = norm_rec / (norm_adv + ADAPTIVE_WEIGHT_EPS)
    # An infinite adversarial gradient makes the ratio a deceptively finite 0.
    finite = torch.isfinite(ratio) & torch.isfinite(norm_adv)
    weight = torch.where(finite, ratio.clamp(0.0, ADAPTIVE_WEIGHT_MAX), 0.0)
    return AdaptiveWeight(weight, norm_rec, norm_adv, finite)


def _last_layer_gradient(reconstructions: Tensor, last_layer: Tensor, gradient: Tensor) -> Tensor:
    """The gradient carried back to `last_layer`, flat, in float32 or float64.

    On its way it is scaled by a power of two to a sum of magnitudes of about 2⁹, which neither
    underflows in a half-precision decoder nor, with activations below 2⁷, overflows there.
    """
    mass = gradient.abs().sum()
    usable = torch.isfinite(mass) & (mass > 0)
    exponent = torch.log2(_LAST_LAYER_MASS / torch.where(usable, mass, _LAST_LAYER_MASS))
    scale = torch.exp2(exponent.floor().clamp(-60.0, 60.0))
    try:
        (result,) = torch.autograd.grad(
            reconstructions, last_layer, grad_outputs=gradient * scale, retain_graph=True
        )
    except RuntimeError as error:
        raise TrainingError(
            "last_layer: expected a trainable weight of the decoder that made the reconstructions "
            f"(model.last_layer), got a tensor without part in their graph ({error})"
        ) from None
    return result.flatten().to(torch.promote_types(result.dtype, torch.float32)) / scale
