"""CompVis's losses of a first stage (``lossconfig``), as configs of our loss and discriminator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastldm.checkpoints.yaml_files import child, parse_fields, read_yaml, short
from fastldm.errors import ConfigError
from fastldm.losses.first_stage_config import FirstStageLossConfig

_IGNORED = frozenset({"pixelloss_weight"})
"""Which the original's constructors take and nothing there reads."""


@dataclass(frozen=True)
class AdversarialParams:
    """What both losses have: LPIPS and a patch discriminator."""

    disc_start: int
    disc_num_layers: int = 3
    disc_in_channels: int = 3
    disc_factor: float = 1.0
    disc_weight: float = 1.0
    perceptual_weight: float = 1.0
    use_actnorm: bool = False
    disc_conditional: bool = False
    disc_loss: str = "hinge"


@dataclass(frozen=True)
class KLLossParams(AdversarialParams):
    """Arguments of LPIPSWithDiscriminator."""

    logvar_init: float = 0.0
    kl_weight: float = 1.0


@dataclass(frozen=True)
class VQLossParams(AdversarialParams):
    """Arguments of VQLPIPSWithDiscriminator."""

    codebook_weight: float = 1.0
    disc_ndf: int = 64
    n_classes: int | None = None
    perceptual_loss: str = "lpips"
    pixel_loss: str = "l1"


class FirstStageTraining(NamedTuple):
    """What a first stage is trained with.

    Attributes:
        loss: of `FirstStageLoss`.
        discriminator: arguments of `PatchDiscriminator`.
    """

    loss: FirstStageLossConfig
    discriminator: dict[str, Any]


def read_first_stage_loss(config: str | Path | Mapping[str, Any]) -> FirstStageTraining:
    """From CompVis's YAML file of a first stage, or its ``lossconfig`` alone.

    Of a VQ model β = 0.25 stands on the codebook term, as in the original (``legacy``).

    Raises:
        CheckpointError: there is no such file.
        ConfigError: it has no such loss, or an argument is unknown or has a value that is not ours.
    """
    node = config if isinstance(config, Mapping) else read_yaml(Path(config))
    if not isinstance(node, Mapping):
        raise ConfigError(f"config: expected a mapping, got {short(node)}")
    params = child(child(node, "model", "config") or node, "params", "config")
    loss = child(params, "lossconfig", "params") or node
    target, where = loss.get("target"), "lossconfig"
    name = target.rpartition(".")[2] if isinstance(target, str) else ""
    if name not in ("LPIPSWithDiscriminator", "VQLPIPSWithDiscriminator"):
        raise ConfigError(
            f"{where}.target: expected LPIPSWithDiscriminator or VQLPIPSWithDiscriminator, got "
            f"{short(target)}"
        )
    kind: type[KLLossParams] | type[VQLossParams]
    kind = KLLossParams if name == "LPIPSWithDiscriminator" else VQLossParams
    given = parse_fields(kind, child(loss, "params", where), f"{where}.params", _IGNORED)
    return FirstStageTraining(_loss_config(given), _discriminator(given))


def _loss_config(params: KLLossParams | VQLossParams) -> FirstStageLossConfig:
    if params.disc_conditional:
        raise ConfigError(
            "disc_conditional: fastldm's discriminator sees the image alone, got True"
        )
    shared = {
        "discriminator_start": params.disc_start,
        "discriminator_factor": params.disc_factor,
        "discriminator_weight": params.disc_weight,
        "perceptual_weight": params.perceptual_weight,
        "adversarial_loss": params.disc_loss,
    }
    if isinstance(params, KLLossParams):
        return FirstStageLossConfig.compvis_kl(
            logvar_init=params.logvar_init, kl_weight=params.kl_weight, **shared
        )
    if params.perceptual_loss != "lpips":
        raise ConfigError(f"perceptual_loss: expected 'lpips', got {params.perceptual_loss!r:.60}")
    if params.pixel_loss not in ("l1", "l2"):
        raise ConfigError(f"pixel_loss: expected 'l1' or 'l2', got {params.pixel_loss!r:.60}")
    return FirstStageLossConfig.compvis_vq(
        codebook_weight=params.codebook_weight, reconstruction=params.pixel_loss, **shared
    )


def _discriminator(params: KLLossParams | VQLossParams) -> dict[str, Any]:
    return {
        "in_channels": params.disc_in_channels,
        "base_channels": params.disc_ndf if isinstance(params, VQLossParams) else 64,
        "num_layers": params.disc_num_layers,
        "normalization": "actnorm" if params.use_actnorm else "batch",
    }
