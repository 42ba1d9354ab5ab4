"""Whether the parts of a latent diffusion model fit each other, and their sizes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastldm.errors import ConfigError, DataError


def latent_channels_of(first_stage: Any) -> int:
    """C: the channels of what ``encode`` gives."""
    config = first_stage.config
    narrowed = config.get("vq_embed_dim") or config.get("embed_dim")
    return int(narrowed or config["latent_channels"])


def downsampling_factor_of(first_stage: Any) -> int:
    """f: the factor between the sizes of images and latents."""
    levels = first_stage.config.get("block_out_channels") or [None]
    return int(2 ** (len(levels) - 1))


def check_parts(
    conditioning: str,
    first_stage: Any,
    unet: Any,
    conditioner: nn.Module | None,
    tokenizer: Any | None,
) -> None:
    """Require that channels, widths and vocabularies agree.

    Raises:
        ConfigError: they do not; the message names both sides.
    """
    channels = latent_channels_of(first_stage)
    _check_channels(conditioning, channels, unet.config)
    width = context_width_of(conditioner)
    attends = _cross_attends(unet.config)
    uses_context = conditioning in ("crossattn", "hybrid") or (
        conditioning == "class" and conditioner is not None
    )
    if uses_context != attends:
        raise ConfigError(
            f"conditioning: {conditioning!r} {'needs' if uses_context else 'has no use for'} a "
            f"UNet with cross-attention, and {type(unet).__name__} "
            f"{'has one' if attends else 'has none'} (down_block_types "
            f"{list(unet.config['down_block_types'])})"
        )
    if uses_context and width is not None:
        expected = unet.config.get("encoder_hid_dim") or unet.config["cross_attention_dim"]
        widths = {expected} if isinstance(expected, int) else set(expected)
        if widths != {width}:
            raise ConfigError(
                f"cross_attention_dim: the UNet's is {expected}, but {type(conditioner).__name__} "
                f"gives a context of width {width}"
            )
    if conditioning == "none" and conditioner is not None:
        raise ConfigError(
            f"conditioning: 'none', but there is a conditioner ({type(conditioner).__name__})"
        )
    if conditioning == "class" and conditioner is None and not unet.config.get("num_class_embeds"):
        raise ConfigError(
            "num_class_embeds: the UNet has no class embedding, which conditioning 'class' needs"
        )
    _check_tokenizer(conditioner, tokenizer)


def _check_channels(conditioning: str, channels: int, config: Any) -> None:
    if config["out_channels"] != channels:
        raise ConfigError(
            f"out_channels: the UNet's are {config['out_channels']}, but the first stage has "
            f"{channels} latent channels"
        )
    extra = config["in_channels"] - channels
    appends = conditioning in ("concat", "hybrid")
    if extra < 0 or appends != (extra > 0):
        raise ConfigError(
            f"in_channels: the UNet's are {config['in_channels']}, but the first stage has "
            f"{channels} latent channels, to which conditioning {conditioning!r} appends "
            f"{'at least one' if appends else 'none'}"
        )


def _cross_attends(config: Any) -> bool:
    blocks = [*config["down_block_types"], config.get("mid_block_type"), *config["up_block_types"]]
    return any("CrossAttn" in str(block) for block in blocks)


def context_width_of(conditioner: Any | None) -> int | None:
    """D of the context that a text encoder or class embedder gives; None where it is not known."""
    width = getattr(getattr(conditioner, "config", None), "hidden_size", None)
    return width if isinstance(width, int) else None


def _check_tokenizer(conditioner: Any | None, tokenizer: Any | None) -> None:
    if tokenizer is None:
        return
    if conditioner is None:
        raise ConfigError("tokenizer: there is a tokenizer, but no text encoder")
    rows = getattr(getattr(conditioner, "config", None), "vocab_size", None)
    if rows is not None and len(tokenizer) > rows:
        raise ConfigError(
            f"vocab_size: the text encoder's is {rows}, but the tokenizer has {len(tokenizer)} "
            "tokens"
        )


def warn_of_clipping(scheduler: Any) -> None:
    """Warn of a sampler that clips latents as if they were images, which is diffusers' default."""
    if scheduler.config.get("clip_sample"):
        warnings.warn(
            "scheduler: clip_sample is True, so that sampling clips latents to "
            "±clip_sample_range; latent diffusion wants False",
            stacklevel=3,
        )


def latent_size_of(
    first_stage: Any, unet: Any, size: tuple[int, int] | None, concat: Tensor | None
) -> tuple[int, int]:
    """Height and width of the latents to sample.

    Args:
        size: of the images in pixels, or None.
        concat: the condition to concatenate, [B, Cc, h, w], which decides where `size` is None.

    Raises:
        DataError: `size` is not a multiple of f.
        ConfigError: nothing says the size.
    """
    if size is not None:
        f = downsampling_factor_of(first_stage)
        if any(side < f or side % f for side in size):
            raise DataError(f"size: got {size}; accepted: multiples of f = {f}")
        return size[0] // f, size[1] // f
    if concat is not None:
        return concat.shape[2], concat.shape[3]
    side = unet.config["sample_size"]
    if side is None:
        raise ConfigError("size: not given, and the UNet's config has no sample_size")
    return (side[0], side[1]) if isinstance(side, Sequence) else (side, side)
