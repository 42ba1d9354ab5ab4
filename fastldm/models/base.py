"""What every fastldm model has: a config, weights on disk, gradient checkpointing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from fastldm.configuration import ConfigMixin
from fastldm.errors import CheckpointError, ConfigError, FastLDMError
from fastldm.models.weights import (
    check_state_dict,
    make_locator,
    parse_size,
    read_state_dict,
    rename_old_attention_keys,
    write_model_folder,
)


class ModelMixin(nn.Module, ConfigMixin):
    """A model that is stored as ``config.json`` and safetensors, in diffusers' layout."""

    weights_name: ClassVar[str] = "diffusion_pytorch_model.safetensors"

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **config_overrides: Any,
    ) -> Self:
        """Build the model from a saved folder or a Hugging Face Hub repository, in eval mode.

        The names and shapes of the weights must be exactly the model's. Floating-point weights
        are given the model's dtype (float32), or `torch_dtype`.

        Args:
            pretrained_model_name_or_path: a folder here, or ``owner/name`` on the Hub.
            subfolder: the folder inside it that holds the config and the weights.
            torch_dtype: floating-point dtype of the returned model.
            variant: such as ``"fp16"``, to read ``….fp16.safetensors``.
            revision, cache_dir, token, force_download, local_files_only: as huggingface_hub's.
            config_overrides: replace single fields of the stored config.

        Raises:
            CheckpointError: a file is missing, damaged or unsafe, or the weights belong to
                another architecture.
            ConfigError: the config has a field or value that this model does not know.
        """
        if torch_dtype is not None and not (
            isinstance(torch_dtype, torch.dtype) and torch_dtype.is_floating_point
        ):
            raise ConfigError(f"torch_dtype: expected a floating torch.dtype, got {torch_dtype!r}")
        source = str(Path(pretrained_model_name_or_path, subfolder or ""))
        locate = make_locator(
            pretrained_model_name_or_path,
            subfolder,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            force_download=force_download,
            local_files_only=local_files_only,
        )
        config_path = locate(cls.config_name)
        if config_path is None:
            raise CheckpointError(f"{source}: no {cls.config_name}")
        config = cls.load_config(config_path.parent)
        model = cls._build_for_loading({**config, **config_overrides}, source)
        state_dict = read_state_dict(locate, cls.weights_name, variant, source)
        expected = model.state_dict()
        state_dict = rename_old_attention_keys(state_dict, expected)
        check_state_dict(state_dict, expected, source)
        # Copied, because a weight lies in the file at any address, and CPU kernels round
        # differently where vectors are not aligned.
        model.load_state_dict(
            {name: value.to(expected[name].dtype, copy=True) for name, value in state_dict.items()},
            assign=True,
        )
        if torch_dtype is not None:
            model.to(torch_dtype)
        return model.eval()

    @classmethod
    def _build_for_loading(cls, config: dict[str, Any], source: str) -> Self:
        """The model without storage for its weights, or with it where something needs it."""
        try:
            with torch.device("meta"):
                model = cls.from_config(config)
        except Exception as error:
            stored = config.get("_class_name", cls.__name__)
            if stored != cls.__name__:
                raise CheckpointError(
                    f"{source}: holds {stored}, not {cls.__name__} ({error})"
                ) from error
            if isinstance(error, FastLDMError):
                raise
            raise ConfigError(f"{source}: no {cls.__name__} has this config: {error}") from error
        persistent = model.state_dict().keys()
        if all(name in persistent for name, _ in model.named_buffers()):
            return model
        return cls.from_config(config)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        max_shard_size: int | str = "10GB",
        variant: str | None = None,
    ) -> None:
        """Write ``config.json`` and the weights into a folder, which is made if it is missing.

        The files replace those of an earlier save only once all of them are whole on the disk;
        other files in the folder are kept.

        Args:
            max_shard_size: weights beyond this many bytes (or such as ``"10GB"``) are split into
                several files with an index.
            variant: such as ``"fp16"``, put into the file names.

        Raises:
            OSError: the folder cannot be written; what was in it is unchanged.
        """
        write_model_folder(
            Path(save_directory),
            self.config_name,
            {"_class_name": type(self).__name__, **self.config},
            self.state_dict(),
            self.weights_name,
            variant,
            parse_size(max_shard_size),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first floating-point parameter."""
        for parameter in self.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
        return torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        for parameter in self.parameters():
            return parameter.device
        return torch.device("cpu")

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Number of scalars in the parameters."""
        return sum(
            parameter.numel()
            for parameter in self.parameters()
            if parameter.requires_grad or not only_trainable
        )

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any part recomputes its activations in the backward pass."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of keeping them.

        Raises:
            ConfigError: no part of this model can.
        """
        self._set_gradient_checkpointing(True)

    def disable_gradient_checkpointing(self) -> None:
        """Keep activations for the backward pass."""
        self._set_gradient_checkpointing(False)

    def _set_gradient_checkpointing(self, enabled: bool) -> None:
        parts = [module for module in self.modules() if hasattr(module, "gradient_checkpointing")]
        if not parts:
            raise ConfigError(f"{type(self).__name__} has no gradient checkpointing")
        for module in parts:
            module.gradient_checkpointing = enabled  # type: ignore[assignment]
