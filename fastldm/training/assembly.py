"""From the configuration of the second stage to its parts, sizes filled in where they follow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastldm.errors import ConfigError, DataError
from fastldm.latent_diffusion import LatentDiffusion
from fastldm.models import CaptionTokenizer
from fastldm.models.tokenizer import train_tokenizer
from fastldm.training.config import LatentDiffusionTrainingConfig, ModelConfig
from fastldm.training.registry import CONDITIONERS, SCHEDULERS, UNETS, build

_TEXT_LENGTH = 77


def build_tokenizer(
    config: LatentDiffusionTrainingConfig, captions: list[str] | None
) -> CaptionTokenizer:
    """The tokenizer that the config names, or one learned from the captions.

    Raises:
        DataError: there are no captions to learn from.
    """
    settings = config.tokenizer
    if settings.pretrained is not None:
        return CaptionTokenizer.from_pretrained(settings.pretrained)
    if captions is None:
        raise DataError(
            "captions: conditioner TextEncoder needs them and the data has none (or is a stream: "
            "then give tokenizer.pretrained)"
        )
    assert config.conditioner is not None
    return train_tokenizer(
        captions,
        settings.vocab_size,
        max_length=config.conditioner.config.get("max_length", _TEXT_LENGTH),
        model=settings.model,
        lowercase=settings.lowercase,
    )


def build_diffusion(
    config: LatentDiffusionTrainingConfig,
    first_stage: Any,
    latent_shape: list[int],
    tokenizer: CaptionTokenizer | None,
    num_classes: int | None,
) -> LatentDiffusion:
    """The second stage around a trained first stage.

    Args:
        config: the parts.
        first_stage: the autoencoder.
        latent_shape: [C, h, w].
        tokenizer: for a text encoder.
        num_classes: of the data, where it has classes.

    Raises:
        ConfigError: a part is refused, or two do not fit each other.
        DataError: there are no classes and the conditioner needs them.
    """
    settings: dict[str, Any] = {
        "sample_size": latent_shape[1],
        "in_channels": latent_shape[0],
        "out_channels": latent_shape[0],
    }
    conditioner = None
    if config.conditioner is not None:
        _require_classes(config.conditioner, num_classes)
        conditioner = build(
            _with_data_sizes(config.conditioner, tokenizer, num_classes),
            CONDITIONERS,
            "conditioner",
        )
        if config.unet.class_name == "UNet2DConditionModel":
            settings["cross_attention_dim"] = conditioner.config["hidden_size"]
    elif config.conditioning == "class" and num_classes is not None:
        # The last row is the class of samples without a condition.
        settings["num_class_embeds"] = num_classes + 1
    unet = build(_with_defaults(config.unet, settings), UNETS, "unet")
    diffusion = LatentDiffusion(
        first_stage,
        unet,
        build(config.scheduler, SCHEDULERS, "scheduler"),
        conditioner,
        conditioning=config.conditioning,
        tokenizer=tokenizer,
        conditioning_dropout=config.conditioning_dropout,
        loss=config.loss,
    )
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return diffusion


def uses_captions(config: LatentDiffusionTrainingConfig) -> bool:
    """Whether the conditions are captions."""
    return config.conditioner is not None and config.conditioner.class_name == "TextEncoder"


def with_required_conditions(
    config: LatentDiffusionTrainingConfig,
) -> LatentDiffusionTrainingConfig:
    """The config, its data required to have the captions or classes that the model is trained on.

    So an image that lacks one is named when the data is opened.
    """
    if config.data is None or config.conditioning == "none":
        return config
    if uses_captions(config):
        return replace(config, data=replace(config.data, require_captions=True))
    return replace(config, data=replace(config.data, require_classes=True))


def condition_of(config: LatentDiffusionTrainingConfig, batch: dict[str, Any]) -> Any:
    """Captions, classes or None, as `LatentDiffusion.loss` takes them.

    Raises:
        DataError: the batch lacks them.
    """
    if config.conditioning == "none":
        return None
    name = "caption" if uses_captions(config) else "class_label"
    if name not in batch:
        raise DataError(f"conditioning {config.conditioning!r} needs a {name}; the data has none")
    return batch[name]


def require_trainable(config: LatentDiffusionTrainingConfig) -> None:
    """Refuse kinds of conditioning whose conditions no data set gives.

    Raises:
        ConfigError: it is one of these.
    """
    if config.conditioning in ("concat", "hybrid"):
        raise ConfigError(
            f"conditioning: {config.conditioning!r} needs an image as condition, which the data "
            "sources do not give; train with LatentDiffusion.loss in a loop of your own"
        )
    if config.conditioning == "crossattn" and config.conditioner is None:
        raise ConfigError("conditioner: 'crossattn' needs a TextEncoder or ClassEmbedder")


def _require_classes(conditioner: ModelConfig, num_classes: int | None) -> None:
    known = num_classes is not None or conditioner.pretrained is not None
    if conditioner.class_name == "ClassEmbedder" and not (
        known or "num_classes" in conditioner.config
    ):
        raise DataError("classes: conditioner ClassEmbedder needs them and the data has none")


def _with_data_sizes(
    conditioner: ModelConfig, tokenizer: CaptionTokenizer | None, num_classes: int | None
) -> ModelConfig:
    if conditioner.class_name == "TextEncoder" and tokenizer is not None:
        return _with_defaults(conditioner, {"vocab_size": tokenizer.vocab_size})
    if conditioner.class_name == "ClassEmbedder" and num_classes is not None:
        return _with_defaults(conditioner, {"num_classes": num_classes})
    return conditioner


def _with_defaults(model: ModelConfig, defaults: dict[str, Any]) -> ModelConfig:
    if model.pretrained is not None:
        return model
    return replace(model, config={**defaults, **model.config})
