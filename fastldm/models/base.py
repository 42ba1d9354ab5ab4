"""What every fastldm model has: a config, weights on disk, gradient checkpointing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from fastldm.configuration import ConfigMixin, read_config_file
from fastldm.diffusers_classes import join_diffusers
from fastldm.errors import CheckpointError, ConfigError, FastLDMError
from fastldm.models.weights import (
    Locator,
    check_state_dict,
    folder_locator,
    make_locator,
    parse_size,
    read_state_dict,
    rename_old_attention_keys,
    write_model_folder,
)
from fastldm.storage import load_weights

_OFF_ONLY = frozenset({
    # keywords of diffusers' from_pretrained for what is not offered here; None and False are off
    "disable_mmap", "flashpack_kwargs", "from_flax", "ignore_mismatched_sizes", "max_memory",
    "offload_folder", "offload_state_dict", "output_loading_info", "parallel_config", "proxies",
    "quantization_config", "use_flashpack",
})  # fmt: skip


class ModelMixin(ConfigMixin, nn.Module):
    """A model that is stored as ``config.json`` and safetensors, in diffusers' layout."""

    weights_name: ClassVar[str] = "diffusion_pytorch_model.safetensors"
    diffusers_class: ClassVar[str] = "ModelMixin"
    """What a class of this kind also is in a program that uses diffusers."""

    def __init__(self) -> None:
        # A class of diffusers among the bases would go on to build its own modules.
        nn.Module.__init__(self)

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        join_diffusers(cls)

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
        use_safetensors: bool | None = None,
        low_cpu_mem_usage: bool = True,
        device_map: str | torch.device | Mapping[str, str | torch.device] | None = None,
        config: Mapping[str, Any] | str | Path | None = None,
        **config_overrides: Any,
    ) -> Self:
        """Build the model from a saved folder or a Hugging Face Hub repository, in eval mode.

        The names and shapes of the weights must be exactly the model's. Floating-point weights
        are given the model's dtype (float32), or `torch_dtype`.

        Args:
            pretrained_model_name_or_path: a folder here, ``owner/name`` on the Hub, or one weights
                file with diffusers' names, whose config is `config` or lies beside it.
            subfolder: the folder inside it that holds the config and the weights.
            torch_dtype: floating-point dtype of the returned model.
            variant: such as ``"fp16"``, to read ``….fp16.safetensors``.
            revision, cache_dir, token, force_download, local_files_only: as huggingface_hub's.
            use_safetensors: True never reads a pickle, not even without running code.
            low_cpu_mem_usage: diffusers' keyword; memory is only ever taken for the weights that
                were read, whatever its value.
            device_map: a device for the whole model, or ``{"": device}``.
            config: fields, or the folder or file that holds them, in place of the stored config.
            config_overrides: replace single fields of the config. Other loading keywords of
                diffusers are accepted while they are off.

        Raises:
            CheckpointError: a file is missing, damaged or unsafe, or the weights belong to
                another architecture.
            ConfigError: the config has a field or value that this model does not know, or an
                argument has a value that is not listed.
        """
        dtype = _checked_dtype(torch_dtype)
        device = _whole_device(device_map)
        _refuse_options(config_overrides)
        source = Path(pretrained_model_name_or_path, subfolder or "")
        if source.is_file():
            locate = folder_locator(source.parent)
        else:
            locate = make_locator(
                pretrained_model_name_or_path,
                subfolder,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        fields = cls._read_config(locate, config, source)
        model = cls._build_for_loading({**fields, **config_overrides}, str(source))
        pickles = use_safetensors is not True
        if source.is_file():
            if not pickles and source.suffix != ".safetensors":
                raise CheckpointError(f"{source}: use_safetensors=True, and it is none")
            state_dict = load_weights(source)
        else:
            state_dict = read_state_dict(
                locate, cls.weights_name, variant, str(source), pickles=pickles
            )
        model._assign(state_dict, str(source), dtype, device)
        return model.eval()

    @classmethod
    def _read_config(
        cls, locate: Locator, config: Mapping[str, Any] | str | Path | None, source: Path
    ) -> dict[str, Any]:
        """`config` where it is given, else the config file that `locate` finds."""
        if isinstance(config, Mapping):
            return dict(config)
        path = locate(cls.config_name) if config is None else Path(config)
        if path is None:
            beside = " beside it; say with config=… what it is of" if source.is_file() else ""
            raise CheckpointError(f"{source}: no {cls.config_name}{beside}")
        return read_config_file(path / cls.config_name if path.is_dir() else path)

    def _assign(
        self,
        state_dict: dict[str, torch.Tensor],
        source: str,
        dtype: torch.dtype | None,
        device: torch.device | None,
    ) -> None:
        """Make the weights of `state_dict` this model's; the dict is used up."""
        expected = self.state_dict()
        state_dict = rename_old_attention_keys(state_dict, expected)
        check_state_dict(state_dict, expected, source)
        for name, tensor in expected.items():
            floating = dtype is not None and tensor.is_floating_point()
            # Copied, because a weight lies in the file at any address, and CPU kernels round
            # differently where vectors are not aligned.
            state_dict[name] = state_dict[name].to(
                device=device, dtype=dtype if floating else tensor.dtype, copy=True
            )
        self.load_state_dict(state_dict, assign=True)
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    @classmethod
    def from_single_file(
        cls,
        source: str | Path | Mapping[str, torch.Tensor],
        *,
        config: str | Path | Mapping[str, Any] | None = None,
        use_ema: bool | None = None,
        torch_dtype: torch.dtype | None = None,
        **config_overrides: Any,
    ) -> Self:
        """Build the model from a single file in CompVis's or Stability's layout, in eval mode.

        The file may be that of a whole latent diffusion model, or of this part alone. The names
        and shapes of the weights must be exactly the model's.

        Args:
            source: a ``.safetensors`` file, a pickle (``.ckpt``), of which only tensors are read,
                or the tensors by name.
            config: the YAML file that came with it, or its content; or a config of this class.
                Without it names and shapes tell the architecture, all but the number of heads,
                which is known for the published models.
            use_ema: read the moving averages of a UNet's weights; by default as the YAML file
                says, else where the file has them.
            torch_dtype: floating-point dtype of the returned model; by default its own (float32).
            config_overrides: replace single fields of this model's config.

        Raises:
            CheckpointError: the file is missing, damaged or unsafe, or its weights belong to
                another architecture.
            ConfigError: the config has a name or value that fastldm does not know.
        """
        from fastldm.checkpoints import load_single_file

        return load_single_file(cls, source, config, use_ema, torch_dtype, **config_overrides)

    def save_single_file(
        self, path: str | Path, *, prefix: str | None = None, new_attention_order: bool = False
    ) -> None:
        """Write the weights to one file in CompVis's layout.

        Args:
            path: ``.safetensors``, or ``.ckpt`` (``.pt``, ``.pth``) for a pickle.
            prefix: of the names, by default that of the part in the file of a whole model; none
                for a first stage, which has files of its own.
            new_attention_order: the order inside packed projections that UNets with
                ``use_new_attention_order`` have.

        Raises:
            ConfigError: CompVis's layout cannot hold this model, or `path` has another extension.
            OSError: the file cannot be written; an earlier one is unchanged.
        """
        from fastldm.checkpoints import compvis_state_dict, write_single_file

        write_single_file(compvis_state_dict(self, prefix, new_attention_order), path)

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
        safe_serialization: bool = True,
    ) -> None:
        """Write ``config.json`` and the weights into a folder, which is made if it is missing.

        The files replace those of an earlier save only once all of them are whole on the disk;
        other files in the folder are kept.

        Args:
            max_shard_size: weights beyond this many bytes (or such as ``"10GB"``) are split into
                several files with an index.
            variant: such as ``"fp16"``, put into the file names.
            safe_serialization: diffusers' keyword; weights are only ever written as safetensors.

        Raises:
            ConfigError: `safe_serialization` is False.
            OSError: the folder cannot be written; what was in it is unchanged.
        """
        if not safe_serialization:
            raise ConfigError("safe_serialization: False would write a pickle; fastldm writes none")
        write_model_folder(
            Path(save_directory),
            self.config_name,
            self.stored_config(),
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


def _checked_dtype(dtype: Any) -> torch.dtype | None:
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return dtype
    raise ConfigError(f"torch_dtype: expected a floating torch.dtype, got {dtype!r}")


def _whole_device(device_map: Any) -> torch.device | None:
    """The one device of a `device_map`."""
    if isinstance(device_map, Mapping) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map is None or isinstance(device_map, torch.device):
        return device_map
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError):
        raise ConfigError(
            f"device_map: expected one device, or a dict of '' to one, got {device_map!r}"
        ) from None


def _refuse_options(options: dict[str, Any]) -> None:
    """Take diffusers' loading keywords out of `options`.

    Raises:
        ConfigError: one of them asks for something.
    """
    for name in _OFF_ONLY & set(options):
        if options.pop(name) not in (None, False):
            raise ConfigError(f"{name}: fastldm's from_pretrained does not offer this")
