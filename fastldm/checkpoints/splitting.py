"""The parts of a single file, told by the prefixes of its names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fastldm.checkpoints.reading import Source, describe_source, read_tensors
from fastldm.errors import CheckpointError

UNET_PREFIX = "model.diffusion_model."
EMA_PREFIX = "model_ema."
FIRST_STAGE_PREFIX = "first_stage_model."
CONDITION_PREFIX = "cond_stage_model."
EMBEDDER_PREFIX = "conditioner.embedders."
SCHEDULE_NAMES = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
_ROOT_NAMES = frozenset({*SCHEDULE_NAMES, "scale_factor", "logvar", "lvlb_weights"})

_UNET_MARK = "input_blocks.0.0.weight"
_FIRST_STAGE_MARKS = ("encoder.conv_in.weight", "decoder.conv_in.weight")
_CONDITION_MARKS = (
    "transformer.token_emb.weight",
    "channel_mapper.weight",
    "embedding.weight",
    "transformer.text_model.final_layer_norm.weight",
    "model.ln_final.weight",
)
_LOSS_PREFIXES = ("loss.", "model_ema.")
"""In a first stage: discriminator and perceptual loss, and averages that its users do not load."""
_EMBEDDER = re.compile(re.escape(EMBEDDER_PREFIX) + r"(\d{1,2})\.(.+)")
_EMA_STATE = ("decay", "num_updates")
_EMA_MODEL = "diffusion_model"


@dataclass
class SingleFile:
    """Tensors of each part, named without its prefix.

    Attributes:
        source: for messages.
        root: buffers of the noise schedule, ``scale_factor`` and ``logvar``.
        unet, first_stage, condition: weights.
        averages: moving averages of the UNet's weights, named without dots.
        ema_state: ``decay`` and ``num_updates`` of these.
        embedders: of each of SDXL's text encoders, by number.
        others: names of what belongs to no part.
        is_bare: the file has one part, without prefixes.
    """

    source: str
    root: dict[str, Tensor] = field(default_factory=dict)
    unet: dict[str, Tensor] = field(default_factory=dict)
    first_stage: dict[str, Tensor] = field(default_factory=dict)
    condition: dict[str, Tensor] = field(default_factory=dict)
    averages: dict[str, Tensor] = field(default_factory=dict)
    ema_state: dict[str, Tensor] = field(default_factory=dict)
    embedders: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    is_bare: bool = False

    def require(self, part: str) -> dict[str, Tensor]:
        """The weights of a part.

        Raises:
            CheckpointError: the file has none.
        """
        tensors: dict[str, Tensor] = getattr(self, part)
        if not tensors:
            names = {"unet": "UNet", "first_stage": "first stage", "condition": "cond stage"}
            found = [name for key, name in names.items() if getattr(self, key)]
            shown = self.others[:3]
            raise CheckpointError(
                f"{self.source}: holds no {names[part]} in CompVis's layout, but "
                f"{' and '.join(found) or ', '.join(shown) or 'nothing'}"
            )
        return tensors

    def weights_of_unet(self, use_ema: bool, names: Iterable[str]) -> dict[str, Tensor]:
        """The UNet's weights, or their moving averages under the same names.

        Args:
            names: of the UNet's weights, since those of averages have lost their dots.

        Raises:
            CheckpointError: there are no averages, or they are of another model.
        """
        if not use_ema:
            return self.require("unet")
        if not self.averages:
            raise CheckpointError(f"{self.source}: holds no moving averages (model_ema)")
        full_name: dict[str, str] = {}
        for name in names:
            if full_name.setdefault(name.replace(".", ""), name) != name:
                raise CheckpointError(f"{self.source}: {name} has no name of its own without dots")
        unknown = [name for name in self.averages if name not in full_name]
        if unknown:
            raise CheckpointError(
                f"{self.source}: moving averages of no weight of the UNet: {', '.join(unknown[:3])}"
            )
        return {full_name[name]: tensor for name, tensor in self.averages.items()}


def name_of_average(name: str) -> str:
    """The name of a UNet weight's moving average in a file."""
    return f"{EMA_PREFIX}{_EMA_MODEL}{name.replace('.', '')}"


def split_file(source: Source) -> SingleFile:
    """Read a file and divide it into parts.

    Raises:
        CheckpointError: the file cannot be read, or holds no part of a latent diffusion model.
    """
    name = describe_source(source)
    return split_tensors(read_tensors(source), name)


def split_tensors(tensors: Mapping[str, Tensor], source: str) -> SingleFile:
    """Divide tensors into parts; see `split_file`."""
    if _UNET_MARK in tensors:
        return SingleFile(source, unet=dict(tensors), is_bare=True)
    if any(mark in tensors for mark in _FIRST_STAGE_MARKS):
        return SingleFile(source, first_stage=_without_loss(tensors), is_bare=True)
    if any(mark in tensors for mark in _CONDITION_MARKS):
        return SingleFile(source, condition=dict(tensors), is_bare=True)
    file = SingleFile(source)
    parts = {
        UNET_PREFIX: file.unet,
        FIRST_STAGE_PREFIX: file.first_stage,
        CONDITION_PREFIX: file.condition,
        f"{EMA_PREFIX}{_EMA_MODEL}": file.averages,
    }
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in parts if name.startswith(prefix)), None)
        if prefix is not None:
            parts[prefix][name.removeprefix(prefix)] = tensor
        elif name in _ROOT_NAMES:
            file.root[name] = tensor
        elif name.removeprefix(EMA_PREFIX) in _EMA_STATE:
            file.ema_state[name.removeprefix(EMA_PREFIX)] = tensor
        elif found := _EMBEDDER.fullmatch(name):
            file.embedders.setdefault(int(found[1]), {})[found[2]] = tensor
        else:
            file.others.append(name)
    file.first_stage = _without_loss(file.first_stage)
    parts_found = (file.unet, file.averages, file.first_stage, file.condition, file.embedders)
    if not any(parts_found):
        raise CheckpointError(
            f"{source}: no part of a latent diffusion model in CompVis's layout; it holds "
            f"{', '.join(file.others[:3]) or ', '.join(file.root) or 'nothing'}"
        )
    return file


def _without_loss(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_LOSS_PREFIXES)}
