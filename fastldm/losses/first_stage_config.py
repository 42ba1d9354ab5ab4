"""The configuration of the first-stage loss, with CompVis's two settings as presets."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from fastldm.errors import ConfigError
from fastldm.losses.reconstruction import Reconstruction

Reduction = Literal["auto", "sum_per_sample", "mean"]
AdversarialLoss = Literal["hinge", "vanilla"]
GeneratorLoss = Literal["auto", "linear", "non_saturating"]

_CHOICES = {
    "reconstruction": get_args(Reconstruction),
    "reduction": get_args(Reduction),
    "adversarial_loss": get_args(AdversarialLoss),
    "generator_loss": get_args(GeneratorLoss),
}


@dataclass
class FirstStageLossConfig:
    """What the first-stage loss is made of.

    Attributes:
        reconstruction: ``"l1"``, ``"l2"`` (squared error) or ``"bce"`` (Bernoulli likelihood of
            Kingma's VAE), per pixel.
        reduction: ``"sum_per_sample"`` sums reconstruction and perceptual terms over C·H·W and
            takes the mean over the batch, as CompVis does with a KL term; ``"mean"`` takes the
            mean over all, as it does with a codebook; ``"auto"`` is the first where the call
            has a KL term and the second elsewhere.
        logvar_init: logarithm of the variance that divides the reconstruction term.
        learn_logvar: whether that logarithm is trained. The loss's parameters must then be given
            to the generator's optimiser. (CompVis declares it trained but optimises it nowhere.)
        perceptual_weight: weight of LPIPS; 0 leaves it out and needs no backbone.
        perceptual_net: LPIPS's backbone, ``"vgg"``, ``"alex"`` or ``"squeeze"``.
        perceptual_weights: local file of the backbone's torchvision weights, else downloaded.
        perceptual_channels: three channel indices for LPIPS, where images have neither 1 nor 3.
        kl_weight: β, the weight of the KL term (summed over the latent, mean over the batch).
        codebook_weight: weight of the codebook and commitment terms together.
        commitment_weight: β = 0.25 of VQ-VAE, the weight inside of that sum.
        legacy: put that β on the codebook term, as taming does, and not on the commitment term.
        discriminator_weight: weight of the adversarial term; 0 leaves the discriminator out.
        discriminator_start: step from which both adversarial losses count.
        discriminator_factor: factor on both adversarial losses from that step on.
        adversarial_loss: the discriminator's, ``"hinge"`` or ``"vanilla"``.
        generator_loss: ``"linear"`` −D(x̂), ``"non_saturating"`` −log σ(D(x̂)), or ``"auto"``: the
            first for hinge and the second for vanilla. CompVis uses ``"linear"`` for both.
        adaptive_weight: whether `discriminator_weight` is multiplied by the ratio of last-layer
            gradient norms (VQGAN, eq. 7).

    Raises:
        ConfigError: a value is not among those accepted.
    """

    reconstruction: Reconstruction = "l1"
    reduction: Reduction = "auto"
    logvar_init: float = 0.0
    learn_logvar: bool = False
    perceptual_weight: float = 1.0
    perceptual_net: str = "vgg"
    perceptual_weights: str | None = None
    perceptual_channels: list[int] | None = None
    kl_weight: float = 1e-6
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    legacy: bool = False
    discriminator_weight: float = 0.5
    discriminator_start: int = 50001
    discriminator_factor: float = 1.0
    adversarial_loss: AdversarialLoss = "hinge"
    generator_loss: GeneratorLoss = "auto"
    adaptive_weight: bool = True

    def __post_init__(self) -> None:
        for name, accepted in _CHOICES.items():
            if getattr(self, name) not in accepted:
                raise ConfigError(
                    f"{name}: expected one of {', '.join(accepted)}, got {getattr(self, name)!r}"
                )
        for name in (field.name for field in fields(self) if field.type == "float"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or (value < 0 and name != "logvar_init"):
                raise ConfigError(f"{name}: expected a finite number, not negative, got {value!r}")
        if not isinstance(self.discriminator_start, int) or self.discriminator_start < 0:
            raise ConfigError(
                f"discriminator_start: expected a step ≥ 0, got {self.discriminator_start!r}"
            )

    @classmethod
    def compvis_kl(cls, **overrides: Any) -> FirstStageLossConfig:
        """The loss of CompVis's KL first stages; `overrides` replace single fields."""
        values = {"reduction": "sum_per_sample", "generator_loss": "linear", **overrides}
        return cls(**values)

    @classmethod
    def compvis_vq(cls, **overrides: Any) -> FirstStageLossConfig:
        """The loss of CompVis's VQ first stages; `overrides` replace single fields."""
        values = {
            "reduction": "mean",
            "legacy": True,
            "discriminator_weight": 0.75,
            "discriminator_start": 0,
            "generator_loss": "linear",
            **overrides,
        }
        return cls(**values)
